"""What a judge is: a check that asks a model, written as a generator that does no I/O itself.

It yields each question and is sent each reply, so that whoever drives it owns the network, the
budget and the clock, and a test is a written dialogue of `next` and `send`. The driver ends the
dialogue as soon as the judge returns its result, and throws into the judge what went wrong with a
call; a judge that lets it, or a `VerdictError`, pass is an ERROR result, just as a validator that
raises is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from validators import JSON, Check, CheckResult, Exchange, TokenLogprob


class VerdictError(ValueError):
    """A reply holds no verdict, or more than one; the message quotes nothing of it."""


@dataclass(frozen=True, slots=True)
class ModelCall:
    """A question to a model.

    `messages` and `parameters` (such as `temperature`, `logprobs`) are those of an OpenAI chat
    completion request.
    """

    model: str
    messages: Sequence[Mapping[str, JSON]]
    parameters: Mapping[str, JSON] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelReply:
    """The model's answer, its tokens' logprobs if the provider sent them, and what it cost."""

    text: str
    logprobs: Sequence[TokenLogprob] | None = None
    cost_usd: float = 0.0
    latency_ms: float = 0.0


Dialogue: TypeAlias = Generator[ModelCall, ModelReply, CheckResult]


class Judge(Check):
    """A check that asks a model."""

    @abstractmethod
    def ask(self, exchange: Exchange) -> Dialogue:
        """Yield calls, take their replies, return the result with their costs added up.

        Raises
        ------
        VerdictError
            If a reply cannot be parsed: a missing or ambiguous verdict is never a pass.
        """
