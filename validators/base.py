"""The vocabulary of the core: an exchange, and what a check says of it.

Everything here is a value. A check takes an `Exchange` and gives a `CheckResult`; bad answers are data, not exceptions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, ClassVar, Self, TypeAlias

import msgspec
import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from validators.normalise import View, views

JSON: TypeAlias = "dict[str, JSON] | list[JSON] | str | int | float | bool | None"


class TopLogprob(msgspec.Struct, gc=False):
    """How likely one of the likeliest tokens at a position is (OpenAI API, `top_logprobs`); which token it is, nobody asks."""

    logprob: float | None


class TokenLogprob(msgspec.Struct, gc=False):
    """A generated token and its natural-log probability (<= 0; None where the provider sent null).

    `utf8` is the JSON of what it wrote, byte by byte (`bytes` in the API document), for where the text cannot say it.
    """

    logprob: float | None
    token: str = ""
    top_logprobs: list[TopLogprob] | None = None
    utf8: msgspec.Raw = msgspec.field(default=msgspec.Raw(b"null"), name="bytes")


class Malformed(Exception):
    """Text that was to be JSON and is not; the message says where."""


class Passage:
    """A piece of text in the response and its path there, e.g. `choices[0].message.content`."""

    __slots__ = ("_parsed", "_views", "path", "text")

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self.text = text
        self._parsed: JSON | Malformed | None = None
        self._views: tuple[View, ...] | None = None

    def __repr__(self) -> str:
        return f"Passage({self.path!r}, {len(self.text)} characters)"

    def parsed(self) -> JSON:
        """The text as JSON, parsed once however many checks ask.

        Raises
        ------
        Malformed
            If the text is not one JSON document.
        """
        if self._parsed is None:
            try:
                self._parsed = orjson.loads(self.text)
            except orjson.JSONDecodeError as error:
                self._parsed = Malformed(str(error))
        if isinstance(self._parsed, Malformed):
            raise self._parsed
        return self._parsed

    def is_json(self) -> bool:
        """Whether the text is one JSON object or array."""
        if self.text.lstrip()[:1] not in ("{", "["):
            return False
        try:
            self.parsed()
        except Malformed:
            return False
        return True

    def views(self) -> tuple[View, ...]:
        """The text as written and, where it differs, normalised; made once however many checks ask."""
        if self._views is None:
            self._views = views(self.text, is_json="\\" in self.text and self.is_json())
        return self._views


class ToolCall(msgspec.Struct, frozen=True):
    """A function the model wants called; `arguments.text` is the raw JSON text it wrote."""

    name: str
    arguments: Passage


class Choice(msgspec.Struct, frozen=True):
    """One candidate answer, the same shape for chat completions, completions and responses.

    `hosted` is what tools that the provider runs itself were asked and gave back: code and its output, searches.
    """

    path: str
    texts: tuple[Passage, ...] = ()
    refusals: tuple[Passage, ...] = ()
    reasonings: tuple[Passage, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str | None = None
    logprobs: Sequence[TokenLogprob] | None = None
    hosted: tuple[Passage, ...] = ()

    @property
    def text(self) -> str:
        """The whole answer text, parts joined."""
        return self.texts[0].text if len(self.texts) == 1 else "".join(p.text for p in self.texts)

    def passages(self, targets: Sequence[Target]) -> Iterator[Passage]:
        """Every passage that one of `targets` names, by target."""
        for target in targets:
            match target:
                case Target.TEXT:
                    yield from self.texts
                case Target.TOOL_ARGUMENTS:
                    yield from (call.arguments for call in self.tool_calls)
                    yield from self.hosted
                case Target.REFUSAL:
                    yield from self.refusals
                case Target.REASONING:
                    yield from self.reasonings


class Exchange(msgspec.Struct, frozen=True):
    """One request and the candidate response to it.

    `request` is the parsed request body exactly as the client sent it; `endpoint` is `chat`, `completions` or
    `responses`; `context` is what the application says of the case (the request's `metadata`, string to string).
    """

    endpoint: str
    request: Mapping[str, JSON]
    choices: tuple[Choice, ...]
    model: str = ""
    task: str | None = None
    context: Mapping[str, str] = msgspec.field(default_factory=dict)

    def passages(self, targets: Sequence[Target]) -> Iterator[Passage]:
        """Every passage of every choice that one of `targets` names, in response order."""
        for choice in self.choices:
            yield from choice.passages(targets)


class Target(StrEnum):
    """What part of each choice a check looks at."""

    TEXT = "text"
    TOOL_ARGUMENTS = "tool_arguments"
    REFUSAL = "refusal"
    REASONING = "reasoning"


class Outcome(StrEnum):
    """What a check found: nothing, a problem, or that it could not tell."""

    PASS = "pass"
    FAIL = "fail"
    ERROR = "error"


class OnFail(StrEnum):
    """What a failed check asks for. `redact` masks the findings' spans; `score` only lowers the score to 0."""

    BLOCK = "block"
    HOLD = "hold"
    FLAG = "flag"
    REGENERATE = "regenerate"
    REDACT = "redact"
    SCORE = "score"


class OnError(StrEnum):
    """What a check that could not run asks for."""

    BLOCK = "block"
    HOLD = "hold"
    FLAG = "flag"
    RETURN = "return"


class Cause(StrEnum):
    """Why a check could not tell."""

    RAISED = "raised"
    VERDICT = "verdict"
    PROVIDER = "provider"
    TIMEOUT = "timeout"
    UNAVAILABLE = "unavailable"
    BUDGET = "budget"
    UNSURE = "unsure"
    CANCELLED = "cancelled"


class Opinion(msgspec.Struct, frozen=True):
    """What stands behind a judge's score.

    `method` says how the score came about: `logprob`, `votes`, `verbalised` or `normal_form`. `models` are those asked, in
    order. `parts` holds the score in [0, 1] of each criterion, claim or member. `rationale` is in the model's own words,
    which may quote the response: it is content, kept only where the policy keeps content.
    """

    method: str
    models: tuple[str, ...]
    parts: Mapping[str, float] = msgspec.field(default_factory=dict)
    rationale: str = ""


class Finding(msgspec.Struct, frozen=True):
    """One located problem.

    `path` names the passage (and, for JSON, the place inside it: `choices[0].message.content#/items/0/price`); `span` is
    the half-open range of code points in the passage's text. `message` is safe to show and to store: it never quotes a
    secret or personal datum. `replacement` is what a redaction puts in place of the span.
    """

    path: str
    message: str
    span: tuple[int, int] | None = None
    rule: str = ""
    replacement: str | None = None


class CheckResult(msgspec.Struct, frozen=True):
    """What one check said of one exchange.

    `score` is in [0, 1], 1 best, uncalibrated; None when the check could not tell. `error` is set exactly when `outcome`
    is ERROR, and `cause` may then say which kind of failure it was. `latency_ms` and `cost_usd` are filled in by whoever
    ran the check; a cost that nobody knows is NaN. `opinion` is set where a model was asked; `cached` says that it was
    asked earlier, about the same.
    """

    check: str
    outcome: Outcome
    score: float | None = None
    findings: tuple[Finding, ...] = ()
    error: str | None = None
    latency_ms: float = 0.0
    cost_usd: float = 0.0
    version: str = ""
    cause: Cause | None = None
    opinion: Opinion | None = None
    cached: bool = False


def _as_sequence(value: object) -> object:
    return (value,) if isinstance(value, str) else value


_SomeTargets = Annotated[tuple[Target, ...], Field(min_length=1)]
Targets = Annotated[
    _SomeTargets, BeforeValidator(_as_sequence, json_schema_input_type=Target | _SomeTargets)
]

#: At most this many findings are kept of one check, so that hostile text cannot make a record grow without bound.
MAX_FINDINGS = 50


class Check(BaseModel):
    """A check is its own configuration: the YAML mapping, frozen, discriminated on `use`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    on_fail: OnFail = OnFail.HOLD
    on_error: OnError | None = Field(
        default=None, description="Default: hold for tiers high and critical, flag below."
    )

    #: True for checks whose findings carry spans with replacements, so that `on_fail: redact` can be honoured.
    can_redact: ClassVar[bool] = False

    @model_validator(mode="after")
    def _redacts_only_spans(self) -> Self:
        if self.on_fail is OnFail.REDACT and not self.can_redact:
            raise ValueError(
                "this check has no spans to redact; write on_fail: hold, flag or block"
            )
        return self


class Validator(Check):
    """A check that needs no model: a pure function of the exchange."""

    @abstractmethod
    def run(self, exchange: Exchange) -> CheckResult:
        """Say whether the exchange passes; never raises for anything the response contains."""

    def verdict(self, findings: Sequence[Finding]) -> CheckResult:
        """PASS with score 1 if there are no findings, FAIL with score 0 otherwise; findings capped at MAX_FINDINGS."""
        if not findings:
            return CheckResult(self.id, Outcome.PASS, score=1.0)
        return CheckResult(
            self.id, Outcome.FAIL, score=0.0, findings=tuple(findings[:MAX_FINDINGS])
        )

    def unable(self, message: str) -> CheckResult:
        """An ERROR result: the check could not tell, and `on_error` decides."""
        return CheckResult(self.id, Outcome.ERROR, error=message)
