"""Checks that ask a model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from judges.base import (
    Alternative,
    CallsFailed,
    Dialogue,
    Judge,
    ModelCall,
    ModelReply,
    ReplyToken,
    VerdictError,
)
from judges.comparison import Comparison
from judges.consistency import Consistency
from judges.escalating import Escalating, JudgeThresholds
from judges.grounded import Grounded
from judges.panel import Panel
from judges.rubric import Rubric, RubricJudge
from judges.verdict import Method

#: Every judge a policy may name, told apart by `use`.
AnyJudge = Annotated[
    Comparison | Consistency | Escalating | Grounded | Panel | RubricJudge,
    Field(discriminator="use"),
]

__all__ = [
    "Alternative",
    "AnyJudge",
    "CallsFailed",
    "Comparison",
    "Consistency",
    "Dialogue",
    "Escalating",
    "Grounded",
    "Judge",
    "JudgeThresholds",
    "Method",
    "ModelCall",
    "ModelReply",
    "Panel",
    "ReplyToken",
    "Rubric",
    "RubricJudge",
    "VerdictError",
]
