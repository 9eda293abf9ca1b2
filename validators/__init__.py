"""Checks that need no model: the vocabulary of the core and every validator."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from validators.base import (
    JSON,
    MAX_FINDINGS,
    Cause,
    Check,
    CheckResult,
    Choice,
    Exchange,
    Finding,
    Malformed,
    OnError,
    OnFail,
    Opinion,
    Outcome,
    Passage,
    Target,
    Targets,
    TokenLogprob,
    ToolCall,
    TopLogprob,
    Validator,
)
from validators.completion import FinishReason
from validators.patterns import Forbid, Redact, Require
from validators.pii import Pii
from validators.regex import explain_re2, max_match_length
from validators.scan import Scan
from validators.secrets import Secrets
from validators.structure import JsonSchema
from validators.text import Length
from validators.tools import ToolCalls

#: Every check a policy may name, told apart by `use`.
AnyValidator = Annotated[
    FinishReason | Forbid | JsonSchema | Length | Pii | Redact | Require | Secrets | ToolCalls,
    Field(discriminator="use"),
]

__all__ = [
    "JSON",
    "MAX_FINDINGS",
    "AnyValidator",
    "Cause",
    "Check",
    "CheckResult",
    "Choice",
    "Exchange",
    "Finding",
    "FinishReason",
    "Forbid",
    "JsonSchema",
    "Length",
    "Malformed",
    "OnError",
    "OnFail",
    "Opinion",
    "Outcome",
    "Passage",
    "Pii",
    "Redact",
    "Require",
    "Scan",
    "Secrets",
    "Target",
    "Targets",
    "TokenLogprob",
    "ToolCall",
    "ToolCalls",
    "TopLogprob",
    "Validator",
    "explain_re2",
    "max_match_length",
]
