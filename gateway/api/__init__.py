"""The HTTP surface: the OpenAI dialect, the review queue, decisions, and what operators need."""
