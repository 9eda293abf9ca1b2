"""Holdgate: an OpenAI-compatible gateway that checks what a model said before anybody acts on it."""

__version__ = "0.1.0"
