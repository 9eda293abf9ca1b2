"""Calibrating confidence: fitting it to labels, reporting on it, and bringing it into force and out of it again."""
