"""What a judge is: a check that asks a model, written as a generator that does no I/O itself.

It yields the questions it wants answered next and is sent their replies, so that whoever drives it owns the network, the
budget and the clock, and a test is a written dialogue of `next` and `send`. The driver ends the dialogue as soon as the
judge returns its result, and throws into the judge what went wrong with a call; a judge that lets it, or a
`VerdictError`, pass is an ERROR result, just as a validator that raises is. Where several calls are asked side by side and
some fail, a driver that throws `CallsFailed` lets a panel go on with the members that did get an answer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Mapping, Sequence
from typing import TypeAlias

import msgspec

from validators import JSON, Check, CheckResult, Exchange


class Alternative(msgspec.Struct, gc=False):
    """One of the likeliest tokens at a position and its natural-log probability (OpenAI API, `top_logprobs`)."""

    token: str
    logprob: float | None


class ReplyToken(msgspec.Struct, gc=False):
    """A token of a judge's reply: what `TokenLogprob` is to a response, with the texts of the alternatives too."""

    token: str
    logprob: float | None
    top_logprobs: list[Alternative] | None = None


class VerdictError(ValueError):
    """There is no verdict: a reply holds none or more than one, or there is nothing to ask. The message quotes no content."""


class ModelCall(msgspec.Struct, frozen=True):
    """A question to a model.

    `messages` and `parameters` (such as `temperature`, `logprobs`, `response_format`) are those of an OpenAI chat
    completion request; a driver may leave out parameters that the provider is known to refuse.
    """

    model: str
    messages: Sequence[Mapping[str, JSON]]
    parameters: Mapping[str, JSON] = msgspec.field(default_factory=dict)


class ModelReply(msgspec.Struct, frozen=True):
    """The model's answer: its text, why it ended, its tokens' logprobs if the provider sent them, what it cost."""

    text: str
    logprobs: Sequence[ReplyToken] | None = None
    finish_reason: str | None = None
    cost_usd: float = 0.0
    latency_ms: float = 0.0


class CallsFailed(Exception):
    """Some calls of a tuple failed: `outcomes` holds the reply, or what went wrong, of each call in its order."""

    def __init__(self, outcomes: Sequence[ModelReply | Exception]) -> None:
        self.outcomes = tuple(outcomes)
        super().__init__(str(self.first))

    @property
    def first(self) -> Exception:
        """What went wrong with the first call that failed."""
        return next(outcome for outcome in self.outcomes if isinstance(outcome, Exception))


#: The calls of one tuple are asked side by side, and their replies sent back in the same order.
Dialogue: TypeAlias = Generator[tuple[ModelCall, ...], tuple[ModelReply, ...], CheckResult]


class Judge(Check):
    """A check that asks a model."""

    @property
    @abstractmethod
    def models(self) -> tuple[str, ...]:
        """The models it may ask, in the order it asks them."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """SHA-256 (hex) of all that shapes its score: kind, models, rubric, parameters, the words of its prompts."""

    @abstractmethod
    def ask(self, exchange: Exchange, nonce: str) -> Dialogue:
        """Yield calls, take their replies, return the result.

        `nonce` is fresh random text (lower-case hex, at least 16 digits) that fences what is judged; two dialogues on the
        same exchange with the same nonce yield the same first calls.

        Raises
        ------
        VerdictError
            If a reply cannot be parsed, or the exchange cannot be judged: a missing or ambiguous verdict is never a pass.
        """
