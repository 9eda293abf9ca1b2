"""Calibrators: fitted maps from score to probability of acceptance, and the file they live in.

A calibrator is its own artefact: one JSON document that names what it was fitted for. Where that is
not what is before us (another model, a signal that is missing, checks that have changed since) it
does not apply, and there is no confidence.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import combinations, pairwise
from math import exp, isfinite, isnan, log, log1p, nan
from typing import Annotated, Any, Literal, TypeAlias

import orjson
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from policies.auditing import Spread
from policies.model import Name, Probability, RiskTier
from policies.signals import (
    CLIP,
    JUDGE,
    JudgeSignal,
    LogprobName,
    SignalName,
    log_odds,
    scale_of,
)

MAX_CHARS = 1_000_000

#: Weights beyond this are a broken fit; within it no sum of features can overflow.
Weight: TypeAlias = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]


Finite: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
Digest: TypeAlias = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

_NONE: Mapping[str, str] = {}


class CalibrationError(ValueError):
    """A calibrator file is wrong; the message names the file and the key."""


def logistic(z: float) -> float:
    """``1 / (1 + exp(-z))`` without overflow, for any z that is not NaN.

    References
    ----------
    Lin, Lin and Weng (2007), "A note on Platt's probabilistic outputs for support vector machines",
    section 3.

    Examples
    --------
    >>> logistic(0.0), logistic(-1e308), logistic(1e308)
    (0.5, 0.0, 1.0)
    """
    if z >= 0.0:
        return 1.0 / (1.0 + exp(-z))
    small = exp(z)
    return small / (1.0 + small)


class Part(BaseModel):
    """A mapping in the artefact: frozen, an unknown key is an error, text is not a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SignalScore(Part):
    """The score is one signal: the exponential of a log-probability, or what a judge gave."""

    kind: Literal["signal"]
    name: LogprobName | JudgeSignal

    @property
    def signals(self) -> tuple[str, ...]:
        """The signals it needs."""
        return (self.name,)

    def of(self, values: Mapping[str, float]) -> float:
        """The score in [0, 1]."""
        value = values[self.name]
        return value if self.name.startswith(JUDGE) else min(exp(value), 1.0)


class NormalScale(Part):
    """Which normal quantile a feature is at among the labels: linear between points (x, z), constant outside.

    However a signal is distributed, its normal scores are not: values far out, or the round numbers that
    judges like, count for no more than how rare they are.

    References
    ----------
    van der Waerden (1952), "Order tests for the two-sample problem and their power" (normal scores).
    """

    x: Annotated[tuple[Finite, ...], Field(min_length=2, max_length=100)]
    z: Annotated[tuple[Finite, ...], Field(min_length=2, max_length=100)]

    @model_validator(mode="after")
    def _monotone(self) -> NormalScale:
        if len(self.x) != len(self.z):
            raise ValueError(f"x has {len(self.x)} values and z has {len(self.z)}")
        if any(left >= right for values in (self.x, self.z) for left, right in pairwise(values)):
            raise ValueError("x and z must increase strictly")
        return self

    def apply(self, feature: float) -> float:
        """The normal score of a feature."""
        return _between(self.x, self.z, feature)


class LogisticScore(Part):
    """The score is ``logistic(intercept + sum weight * scale(feature(signal)))``.

    `policies.signals.feature` says how each signal is scaled at first; where `scales` name it, its normal
    score takes the place of that.
    """

    kind: Literal["logistic"]
    intercept: Weight
    coefficients: Annotated[
        dict[SignalName | JudgeSignal, Weight], Field(min_length=1, max_length=10)
    ]
    scales: dict[SignalName | JudgeSignal, NormalScale] = {}

    @model_validator(mode="after")
    def _known(self) -> LogisticScore:
        if unknown := sorted(self.scales.keys() - self.coefficients.keys()):
            raise ValueError(f"there is a scale, but no coefficient, for {', '.join(unknown)}")
        return self

    @property
    def signals(self) -> tuple[str, ...]:
        """The signals it needs."""
        return tuple(self.coefficients)

    def of(self, values: Mapping[str, float]) -> float:
        """The score in [0, 1]."""
        z = self.intercept
        for name, weight, scale, normal in self._terms:
            feature = scale(values[name])
            z += weight * (feature if normal is None else normal.apply(feature))
        return logistic(z)

    @cached_property
    def _terms(self) -> list[tuple[str, float, Callable[[float], float], NormalScale | None]]:
        return [
            (name, weight, scale_of(name), self.scales.get(name))
            for name, weight in self.coefficients.items()
        ]


class Platt(Part):
    """``1 / (1 + exp(a * f + b))`` where f is `policies.signals.log_odds` of the score.

    Non-decreasing in the score because a <= 0; the identity (up to the clip) for a = -1, b = 0. The
    log-odds take the place of the margin of a support vector machine: over six sets of labelled
    answers the log loss on fresh rows is 0.003 to 0.06 lower than with the probability itself on
    five, and 0.006 higher on the smallest.

    References
    ----------
    Platt (1999), "Probabilistic Outputs for Support Vector Machines", section 2.2, whose letters
    these are.
    """

    kind: Literal["platt"]
    a: Annotated[Weight, Field(le=0)]
    b: Weight

    def apply(self, score: float) -> float:
        """The probability in [0, 1] for a score in [0, 1]."""
        return logistic(-(self.a * log_odds(score) + self.b))


class Beta(Part):
    """``1 / (1 + exp(-c) * (1 - s)**b / s**a)``, with the score s clipped as for log-odds.

    Non-decreasing because a, b >= 0; a = b is `Platt`, a = b = 1 and c = 0 the identity. The two
    ends bend on their own, as a judge's do: among 6,200 labelled answers one is right in 94 % of
    its surest fifteenth and still in 24 % of what it is surest is wrong.

    References
    ----------
    Kull, Silva Filho and Flach (2017), "Beta calibration: a well-founded and easily implemented
    improvement on logistic calibration for binary classifiers", whose letters these are.
    """

    kind: Literal["beta"]
    a: Annotated[Weight, Field(ge=0)]
    b: Annotated[Weight, Field(ge=0)]
    c: Weight

    def apply(self, score: float) -> float:
        """The probability in [0, 1] for a score in [0, 1]."""
        clipped = min(max(score, CLIP), 1.0 - CLIP)
        return logistic(self.a * log(clipped) - self.b * log1p(-clipped) + self.c)


class Isotonic(Part):
    """Linear between the points (x, y) in [0, 1], constant outside.

    x increases strictly and y does not decrease.

    References
    ----------
    Zadrozny and Elkan (2002), "Transforming Classifier Scores into Accurate Multiclass Probability
    Estimates", section 3.
    """

    kind: Literal["isotonic"]
    x: Annotated[tuple[Probability, ...], Field(min_length=2, max_length=10_000)]
    y: Annotated[tuple[Probability, ...], Field(min_length=2, max_length=10_000)]

    @model_validator(mode="after")
    def _monotone(self) -> Isotonic:
        if len(self.x) != len(self.y):
            raise ValueError(f"x has {len(self.x)} values and y has {len(self.y)}")
        if any(left >= right for left, right in pairwise(self.x)):
            raise ValueError("x must increase strictly")
        if any(left > right for left, right in pairwise(self.y)):
            raise ValueError("y must not decrease: a higher score cannot mean a lower confidence")
        return self

    def apply(self, score: float) -> float:
        """The probability in [0, 1] for a score in [0, 1]."""
        return _between(self.x, self.y, score)


def _between(x: tuple[float, ...], y: tuple[float, ...], at: float) -> float:
    """Linear between the points, which do not decrease, and constant outside."""
    right = bisect_right(x, at)
    if right == 0:
        return y[0]
    if right == len(x):
        return y[-1]
    low, high = y[right - 1], y[right]
    return min(low + (at - x[right - 1]) / (x[right] - x[right - 1]) * (high - low), high)


#: From a score to a probability, both in [0, 1].
AnyMap: TypeAlias = Annotated[Platt | Beta | Isotonic, Field(discriminator="kind")]


class Metrics(Part):
    """How good the map is on `n` labels it was not fitted on.

    Expected calibration error in `bins` bins of equal mass, and Brier score; `raw` is the score
    taken as a probability.
    """

    n: Annotated[int, Field(ge=1)]
    bins: Annotated[int, Field(ge=1)]
    ece_raw: Probability
    ece: Probability
    brier_raw: Probability
    brier: Probability


#: Stands, where shares of errors are said by tier or task, for all that are not named.
OTHERS = "*"


class Certificate(Part):
    """What was found for the responses of a tier, of a task or of all: see `policies.certification`.

    With `threshold` not None: among what is returned on its own at that confidence or above, the share
    of errors is at most `alpha`, with probability 1 - `delta` over the labels if `certified`; measured, not
    proven, if `estimated`. `delta` is the share that fell to this certificate. `n` labels
    were used, of which `accepted` were at or above the threshold, `errors` of these not acceptable;
    `coverage` is the share of responses expected there, `bound` the upper limit of their errors.

    With None the labels give no threshold: nothing is confident. `best_alpha` is then about what they
    would give one for, and `more_labels` about how many more are needed for `alpha`.
    """

    tier: RiskTier | None = Field(default=None, strict=False)
    task: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    mode: Literal["certified", "estimated"]
    alpha: Annotated[Probability, Field(gt=0, lt=1)]
    delta: Annotated[Probability, Field(gt=0, lt=1)]
    threshold: Probability | None
    n: Annotated[int, Field(ge=0)]
    accepted: Annotated[int, Field(ge=0)] = 0
    errors: Annotated[int, Field(ge=0)] = 0
    coverage: Probability = 0.0
    bound: Probability | None = None
    best_alpha: Probability | None = None
    more_labels: Annotated[int, Field(ge=0)] | None = None


class Knot(Part):
    """At a confidence or above: the share of responses there, and of errors among them with its limits."""

    confidence: Probability
    coverage: Probability
    risk: Probability
    low: Probability
    high: Probability


class Calibrator(Part):
    """A fitted calibrator and all that says when it applies.

    `model` is a glob over model names. `checks_digest` is `Policy.checks_digest` when it was
    fitted: of the checks that fed the score, None if there were none. `judges` holds the digest of
    every judge whose score is one of its signals, by check id. `n` is the number of labels it was
    fitted on, `labels_digest` of their ids, contents and verdicts.

    `certificates` are the thresholds that can be promised, each for other responses; `cost_threshold`
    is the confidence from which returning costs less than a review. `curve` is errors against coverage.
    """

    format: Literal[1]
    name: Name
    description: str = ""
    created_at: AwareDatetime
    source: Literal["logprob", "judge", "consistency"]
    model: Annotated[str, Field(min_length=1, max_length=256)]
    score: Annotated[SignalScore | LogisticScore, Field(discriminator="kind")]
    checks_digest: Digest | None = None
    judges: dict[str, Digest] = Field(default_factory=dict)
    n: Annotated[int, Field(ge=1)]
    calibrator: AnyMap
    metrics: Metrics | None = None
    labels_digest: Digest | None = None
    certificates: Annotated[tuple[Certificate, ...], Field(max_length=100)] = ()
    cost_threshold: Probability | None = None
    curve: Annotated[tuple[Knot, ...], Field(max_length=200)] = ()

    @model_validator(mode="after")
    def _certifies_once(self) -> Calibrator:
        for one, other in combinations(self.certificates, 2):
            if _meet(one.tier, other.tier) and _meet(one.task, other.task):
                raise ValueError(
                    "two certificates are for the same responses: at most one may apply to a tier "
                    "and a task"
                )
        return self

    @cached_property
    def spread(self) -> Spread | None:
        """How audits are spread over confidences that are distributed as those of its labels; None without a curve."""
        if not self.curve:
            return None
        return Spread((each.confidence, each.coverage) for each in self.curve)

    def certified_for(self, task: str | None) -> tuple[Certificate, ...]:
        """The certificates for responses of a task: at most one for each tier."""
        return tuple(each for each in self.certificates if each.task in (None, task))

    @model_validator(mode="after")
    def _names_its_judges(self) -> Calibrator:
        asked = {name.removeprefix(JUDGE) for name in self.score.signals if name.startswith(JUDGE)}
        if asked != self.judges.keys():
            raise ValueError(
                f"judges must give the digest of each judge the score needs, {_listed(asked)}, "
                f"and of no other; it has {_listed(self.judges)}"
            )
        return self

    def stale(self, checks_digest: str | None, judges: Mapping[str, str]) -> str | None:
        """Why it is of no use any more to a policy with these checks and judges, None if it is."""
        if checks_digest != self.checks_digest:
            return f"calibrator {self.name} is stale: the checks that feed the score have changed"
        for check, digest in self.judges.items():
            if check not in judges:
                return f"calibrator {self.name} needs the judge {check}, which the policy has not"
            if judges[check] != digest:
                return (
                    f"calibrator {self.name} is stale: "
                    f"the model, rubric or asking of judge {check} has changed"
                )
        return None

    def fits(
        self,
        model: str,
        checks_digest: str | None = None,
        judges: Mapping[str, str] = _NONE,
    ) -> str | None:
        """None if it is for responses of `model` under these checks and judges, else why not.

        `checks_digest` and `judges` (digest by check id) are those of the policy.
        """
        if not fnmatchcase(model, self.model):
            shown = model[:100] or "unnamed"
            return f"calibrator {self.name} is for model {self.model}, this is {shown}"
        return self.stale(checks_digest, judges)

    def lacks(self, values: Mapping[str, float]) -> str | None:
        """The first signal it needs that is missing or not finite, None if it has them all."""
        for name in self.score.signals:
            if not isfinite(values.get(name, nan)):
                return name
        return None

    def confidence(self, values: Mapping[str, float], check_scores: Iterable[float] = ()) -> float:
        """The probability in [0, 1] that the response is acceptable.

        The score of the signals is lowered to the least of `check_scores`, then mapped; the result
        is non-decreasing in all of them, and 0 if one is NaN. Ask `fits` and `lacks` first: a
        signal that is missing is a KeyError here, never a guess.
        """
        scores = [self.score.of(values), *check_scores]
        return 0.0 if isnan(sum(scores)) else self.calibrator.apply(min(scores))


def certificate_for(certificates: Iterable[Certificate], tier: RiskTier) -> Certificate | None:
    """The first of them that is for a tier, None if none is."""
    return next((each for each in certificates if each.tier in (None, tier)), None)


def is_calibrator(text: str) -> bool:
    """Whether a document is meant to be a calibrator, not the thresholds of a cascade of judges.

    Both are JSON files of one folder; thresholds are read by the policies that name them. What can
    be neither is for `load_calibrator` to refuse.
    """
    try:
        document = orjson.loads(text) if len(text) <= MAX_CHARS else None
    except orjson.JSONDecodeError:
        return True
    return not (isinstance(document, dict) and "target_agreement" in document)


def load_calibrator(text: str, *, file: str) -> Calibrator:
    """The calibrator a JSON document describes; `file` is only for the message.

    Raises
    ------
    CalibrationError
        If the text is not JSON, is larger than MAX_CHARS, or is not a calibrator of format 1; one
        line for each problem.
    """
    if len(text) > MAX_CHARS:
        raise CalibrationError(f"{file}: larger than {MAX_CHARS} characters")
    try:
        return Calibrator.model_validate_json(text)
    except ValidationError as error:
        problems = (
            f"{file}: {'.'.join(map(str, each['loc'])) or 'the document'}: {each['msg']}"
            for each in error.errors(include_url=False, include_input=False)
        )
        raise CalibrationError("\n".join(problems)) from error


def _meet(one: str | None, other: str | None) -> bool:
    return one is None or other is None or one == other


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def artefact_schema() -> dict[str, Any]:
    """The JSON Schema of the artefact file, for editors."""
    return Calibrator.model_json_schema()
