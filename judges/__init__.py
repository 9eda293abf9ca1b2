"""Checks that ask a model."""

from __future__ import annotations

from judges.base import Dialogue, Judge, ModelCall, ModelReply, VerdictError

__all__ = ["Dialogue", "Judge", "ModelCall", "ModelReply", "VerdictError"]
