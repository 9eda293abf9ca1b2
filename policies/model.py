"""The policy document: what the YAML may say, as frozen values.

Loading (`policies.loading`) turns text into a `Policy`; nothing here reads files. Durations are
written `50s`, `30m`, `4h` and are seconds inside.
"""

from __future__ import annotations

import re
from enum import StrEnum
from functools import cached_property
from hashlib import sha256
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

from judges import AnyJudge, Judge
from policies.expressions import Expression, compile_expression
from validators import AnyValidator, OnError, OnFail, Validator

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration_s(value: object) -> object:
    """Seconds of a duration such as `50s`, `1h30m` or `0s`; what is not text comes back as it is.

    Raises
    ------
    ValueError
        If the text is not a sequence of numbers each with a unit ms, s, m, h or d.
    """
    if not isinstance(value, str):
        return value
    parts = _DURATION.findall(value)
    if not parts or "".join(number + unit for number, unit in parts) != value.strip():
        raise ValueError(
            f"{value!r} is not a duration; write a number and a unit, such as 50s, 30m or 4h"
        )
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def _duration(value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f"{value} has no unit; write {value:g}s, {value:g}m or {value:g}h")
    return parse_duration_s(value)


DurationS = Annotated[
    float, Field(ge=0, le=30 * 86400), BeforeValidator(_duration, json_schema_input_type=str)
]
Probability = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,63}$")]
Glob = Annotated[str, Field(min_length=1, max_length=200)]


class RiskTier(StrEnum):
    """How much a wrong answer costs; the second axis beside confidence. Ordered by `rank`."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        """0 for low to 3 for critical."""
        return _RANKS[self]


_RANKS = {tier: rank for rank, tier in enumerate(RiskTier)}


class Band(StrEnum):
    """Where a confidence lies between the two thresholds."""

    CONFIDENT = "confident"
    UNSURE = "unsure"
    DOUBTFUL = "doubtful"


class Action(StrEnum):
    """What happens to a response. A total order: block > hold > flag > return, by `severity`."""

    RETURN = "return"
    FLAG = "flag"
    HOLD = "hold"
    BLOCK = "block"

    @property
    def severity(self) -> int:
        """0 for return to 3 for block."""
        return _SEVERITIES[self]


_SEVERITIES = {action: severity for severity, action in enumerate(Action)}


class Mode(StrEnum):
    """`enforce` acts on the decision; `observe` decides and records, and always returns."""

    ENFORCE = "enforce"
    OBSERVE = "observe"


class StreamMode(StrEnum):
    """How a streamed response is checked; see the design, section 6."""

    AUTO = "auto"
    BUFFER = "buffer"
    WINDOW = "window"
    OBSERVE = "observe"


class Document(BaseModel):
    """A mapping in the document: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Condition(Document):
    """What a request must be for a policy to apply. All keys given must hold.

    Patterns are globs (`gpt-*`) and never match what a request does not name.
    `tool` holds if the request offers a tool of that name. An empty condition always holds.
    """

    task: Glob | None = None
    model: Glob | None = None
    tool: Glob | None = None
    endpoint: Literal["chat", "completions", "responses"] | None = None
    key: Glob | None = Field(default=None, description="name of the API key the request came with")
    context: dict[str, Glob] = Field(default_factory=dict)
    any: tuple[Condition, ...] | None = Field(default=None, min_length=1)
    all: tuple[Condition, ...] | None = Field(default=None, min_length=1)
    not_: Condition | None = Field(default=None, alias="not")


class RaiseRule(Document):
    """Raise the risk to `to` when the CEL expression `when` holds."""

    to: RiskTier
    when: str


class Risk(Document):
    """A base tier, raised (never lowered) by what is in the request or the response."""

    base: RiskTier = RiskTier.MEDIUM
    raise_: tuple[RaiseRule, ...] = Field(default=(), alias="raise")


#: Every check a policy may name, told apart by `use`.
AnyCheck: TypeAlias = Annotated[AnyValidator | AnyJudge, Field(discriminator="use")]


class Budget(Document):
    """What the judges of a stage may cost.

    `usd_per_day` is what they may spend together in a day (UTC), `latency` how long one may take.
    `when_used_up` says what a judge asks for that is not asked because the day's money is spent; by
    default that is for its `on_error`.
    """

    usd_per_day: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    latency: Annotated[DurationS, Field(gt=0)] | None = None
    when_used_up: OnError | None = None


class Stage(Document):
    """Checks that run together.

    Skipped if `when` (CEL) does not hold, and for a share 1 - `sample` of the exchanges.
    """

    name: Name
    when: str | None = None
    sample: Probability = 1.0
    budget: Budget | None = None
    checks: tuple[AnyCheck, ...] = Field(min_length=1)

    @cached_property
    def validators(self) -> tuple[Validator, ...]:
        """The checks that need no model, in order."""
        return tuple(check for check in self.checks if isinstance(check, Validator))

    @cached_property
    def judges(self) -> tuple[Judge, ...]:
        """The checks that ask a model, in order."""
        return tuple(check for check in self.checks if isinstance(check, Judge))


class Confidence(Document):
    """Where confidence comes from, and what happens to a response that has none.

    `source: logprob` asks the provider for logprobs, `judge` and `none` do not; with `none` there
    is no confidence. Without a calibrator nothing is called confidence.
    """

    source: Literal["logprob", "judge", "none"] = "logprob"
    calibrator: Name | None = None
    when_uncalibrated: Literal["return", "flag", "hold"]


class ThresholdPair(Document):
    """Confidence >= `confident` is confident, >= `unsure` is unsure, anything lower is doubtful."""

    confident: Probability
    unsure: Probability

    @model_validator(mode="after")
    def _ordered(self) -> ThresholdPair:
        if self.unsure > self.confident:
            raise ValueError(
                f"unsure ({self.unsure}) must not be above confident ({self.confident})"
            )
        return self


class Thresholds(ThresholdPair):
    """The two thresholds, for all tiers or (`low:` … `critical:`) for one.

    With `from_calibrator: true` what is confident is what the calibrator has a certificate for, by tier
    and task, and only `unsure` is written here.
    """

    confident: Probability = 0.95
    unsure: Probability = 0.60
    from_calibrator: bool = False
    low: ThresholdPair | None = None
    medium: ThresholdPair | None = None
    high: ThresholdPair | None = None
    critical: ThresholdPair | None = None

    @model_validator(mode="after")
    def _confident_once(self) -> Thresholds:
        written = self.model_fields_set - {"from_calibrator", "unsure"}
        if self.from_calibrator and written:
            raise ValueError(
                f"with from_calibrator, the calibrator says what is confident; leave out {', '.join(sorted(written))}"
            )
        return self

    def of(self, tier: RiskTier) -> ThresholdPair:
        """The pair that applies to a tier."""
        own: ThresholdPair | None = getattr(self, tier.value)
        return own or self


class Cell(Document):
    """An action, and for `return` the share of responses sampled for audit, if not `audit.rate`."""

    action: Action
    audit: Probability | None = None


def _as_cell(value: object) -> object:
    return {"action": value} if isinstance(value, str) else value


AnyCell = Annotated[Cell, BeforeValidator(_as_cell, json_schema_input_type=Action | Cell)]


class Row(Document):
    """The actions of one tier."""

    confident: AnyCell
    unsure: AnyCell
    doubtful: AnyCell

    def of(self, band: Band) -> Cell:
        """The cell of a band."""
        cell: Cell = getattr(self, band.value)
        return cell


def _row(confident: Cell, unsure: Action, doubtful: Action) -> Row:
    return Row(confident=confident, unsure=Cell(action=unsure), doubtful=Cell(action=doubtful))


class Matrix(Document):
    """The risk matrix: tier x band -> action. Rows not written keep the defaults."""

    low: Row = _row(Cell(action=Action.RETURN), Action.FLAG, Action.FLAG)
    medium: Row = _row(Cell(action=Action.RETURN), Action.FLAG, Action.HOLD)
    high: Row = _row(Cell(action=Action.RETURN, audit=0.15), Action.HOLD, Action.HOLD)
    critical: Row = _row(Cell(action=Action.HOLD), Action.HOLD, Action.HOLD)

    def of(self, tier: RiskTier) -> Row:
        """The row of a tier."""
        row: Row = getattr(self, tier.value)
        return row

    @cached_property
    def returning(self) -> tuple[Cell, ...]:
        """The cells that return a response and name a rate of audits of their own, each rate once."""
        cells = {
            cell.audit: cell
            for tier in RiskTier
            for cell in map(self.of(tier).of, Band)
            if cell.action is Action.RETURN and cell.audit is not None
        }
        return tuple(cells.values())


class Regenerate(Document):
    """How often a response that fails `on_fail: regenerate` is asked for again before a hold."""

    attempts: Annotated[int, Field(ge=0, le=5)] = 0


class Hold(Document):
    """What a hold is: `wait`, how long the client waits; `deadline`, when the hold itself is due.

    `on_deadline: reject` refuses the response; `release` returns it with a notice, only below tier
    critical. `as: placeholder` answers at once with a 200 that says the response is held, for chat
    interfaces.
    """

    wait: DurationS = Field(default=50.0, json_schema_extra={"default": "50s"})
    deadline: DurationS = Field(default=1800.0, json_schema_extra={"default": "30m"})
    on_deadline: Literal["reject", "release"] = "reject"
    as_: Literal["error", "placeholder"] = Field(default="error", alias="as")


class Adaptive(Document):
    """An audit rate that follows what audits find.

    `max` while little is known or quality has dropped, `audit.rate` once it is in order, `min` when it is proven. `target` is
    the share of wrong responses among those returned that the policy means to keep to.
    """

    min: Annotated[Probability, Field(gt=0)]
    max: Annotated[Probability, Field(gt=0)]
    target: Annotated[float, Field(gt=0, le=0.5)] = 0.02


class Audit(Document):
    """Share of returned responses that is sampled for review after the fact."""

    rate: Probability = 0.0
    adaptive: Adaptive | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Audit:
        if self.adaptive is not None and not self.adaptive.min <= self.rate <= self.adaptive.max:
            raise ValueError(
                f"rate ({self.rate}) must lie between adaptive.min ({self.adaptive.min}) and "
                f"adaptive.max ({self.adaptive.max})"
            )
        return self


class Policy(Document):
    """One policy document.

    Raises `ExpressionError` when it is made with an expression that does not compile.
    """

    policy: Name
    version: Annotated[int, Field(ge=1)] = 1
    mode: Mode = Mode.ENFORCE
    match: Condition = Condition()
    risk: Risk = Risk()
    stages: tuple[Stage, ...] = ()
    confidence: Confidence
    thresholds: Thresholds = Thresholds()
    matrix: Matrix = Matrix()
    regenerate: Regenerate = Regenerate()
    hold: Hold = Hold()
    audit: Audit = Audit()
    stream: StreamMode = StreamMode.AUTO
    content: Literal["full", "redacted", "digest"] = Field(
        default="full",
        description="what is kept of prompts and responses once no review needs them",
    )

    _digest: str = PrivateAttr(default="")
    _expressions: dict[str, Expression] = PrivateAttr(default_factory=dict)
    _stream: StreamMode | None = PrivateAttr(default=None)

    def model_post_init(self, context: object, /) -> None:
        """Compile every expression against the ids of this policy's checks."""
        sources = [rule.when for rule in self.risk.raise_]
        sources += [stage.when for stage in self.stages if stage.when is not None]
        ids = [check.id for check in self.checks]
        self._expressions = {source: compile_expression(source, ids) for source in sources}

    @cached_property
    def checks(self) -> tuple[AnyCheck, ...]:
        """Every check of every stage, in order."""
        return tuple(check for stage in self.stages for check in stage.checks)

    @cached_property
    def judges(self) -> tuple[Judge, ...]:
        """The checks that ask a model, in order."""
        return tuple(judge for stage in self.stages for judge in stage.judges)

    @cached_property
    def referred(self) -> frozenset[str]:
        """The ids of the checks that its expressions refer to."""
        return frozenset[str]().union(*(each.checks for each in self._expressions.values()))

    @cached_property
    def feeding(self) -> tuple[AnyCheck, ...]:
        """The checks with `on_fail: score`, whose scores lower the score."""
        return tuple(check for check in self.checks if check.on_fail is OnFail.SCORE)

    @cached_property
    def checks_digest(self) -> str | None:
        """SHA-256 (hex) of the checks that feed the score, in any order; None if there are none."""
        if not self.feeding:
            return None
        shapes = [
            f"{each.id} {each.digest}" if isinstance(each, Judge) else each.model_dump_json()
            for each in sorted(self.feeding, key=lambda each: each.id)
        ]
        return sha256("\n".join(shapes).encode()).hexdigest()

    @cached_property
    def judge_digests(self) -> dict[str, str]:
        """By the id of each judge, SHA-256 (hex) of all that shapes its score."""
        return {judge.id: judge.digest for judge in self.judges}

    def expression(self, when: str) -> Expression:
        """The compiled form of one of the policy's `when` texts."""
        return self._expressions[when]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all that determines its decisions; empty if it was not loaded."""
        return self._digest

    @cached_property
    def label(self) -> str:
        """The name and the first 12 digits of the digest, `refunds@0123456789ab`."""
        return f"{self.policy}@{self.digest[:12]}"
