"""Whether what was certified still holds: error escape, calibration and agreement, each with a stated rate of false alarms.

Plain Python, because it runs beside what answers requests. Every figure may be looked at as often as one likes: bounds hold at all
times at once, and what is tested again and again pays for it in its threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import erfc, exp, log, log1p, sqrt
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from policies.agreement import clopper_pearson

#: The chance of a false alarm that each kind of monitor may have, over the horizon it states.
ALPHA = 0.05

#: Bettors of a confidence sequence: how much of the most that may be staked each of them stakes.
_STAKES = tuple(0.01 * 99 ** (step / 23) for step in range(24))
_BISECTIONS = 40


class Audited(NamedTuple):
    """So many responses that were reviewed, drawn with the same probability, of which `errors` were not acceptable.

    `share` in (0, 1] is the least probability with which any response was drawn at the time, over that of these.
    """

    share: float
    reviewed: int
    errors: int


class Escape(msgspec.Struct, frozen=True):
    """The share of errors: the estimate, and bounds that hold at all times together with the stated probability.

    `estimate` is None without reviews; then `low` is 0 and `high` is 1.
    """

    estimate: float | None
    low: float
    high: float
    reviewed: int


def error_escape(audited: Iterable[Audited], level: float = 0.95) -> Escape:
    """The share of errors among all responses that could have been drawn, from those that were drawn and reviewed.

    Parameters
    ----------
    audited : iterable of Audited
        Reviews so far, added up by their `share`; any order.
    level : float in (0, 1)
        With this probability `low <= share of errors <= high` after every review, for ever, as long as that share stays
        the same.

    Returns
    -------
    Escape
        The Horvitz-Thompson ratio: errors over reviews, each weighted by one over its inclusion probability.

    Notes
    -----
    For a share m a review z (1: an error) drawn with probability p when the least was f has
    ``E[(f / p) (z - m)] = 0`` given the past, whatever the strata and however f changes, because f / p takes back what the
    drawing gave. So the wealth of anybody who bets on (f / p) (z - m) with stakes fixed beforehand is a non-negative martingale; the mean
    of 24 of them with different stakes is one too; and by Ville's inequality the m at which it ever exceeds 2 / (1 - level)
    can be left out. One half of the risk is for each end. Unreviewed draws may be left out if they are not chosen by what
    they say. A response that was drawn with a low probability when others could be drawn with a lower one still counts little.

    References
    ----------
    Waudby-Smith and Ramdas (2024), "Estimating means of bounded random variables by betting", sections 4.1 and B.
    Horvitz and Thompson (1952). Hajek (1971) for the ratio. Waudby-Smith et al. (2022), "Anytime-valid off-policy
    inference for contextual bandits", section 3, for weights.

    Examples
    --------
    >>> found = error_escape([Audited(1.0, 400, 4)])
    >>> found.estimate, round(found.low, 3), round(found.high, 3)
    (0.01, 0.001, 0.037)
    """
    rows = [each for each in audited if each.reviewed]
    total = sum(each.share * each.reviewed for each in rows)
    if not total:
        return Escape(None, 0.0, 1.0, 0)
    estimate = sum(each.share * each.errors for each in rows) / total
    limit = log(2 / (1 - level))
    high = _crossing(lambda m: _wealth_below(rows, m) > limit, estimate, 1.0)
    low = 1.0 - _crossing(lambda m: _wealth_above(rows, 1.0 - m) > limit, 1.0 - estimate, 1.0)
    return Escape(estimate, min(low, estimate), max(high, estimate), sum(r.reviewed for r in rows))


def _crossing(is_out: Callable[[float], bool], inside: float, outside: float) -> float:
    """Where a condition that holds from somewhere on begins to hold; `outside` if it nowhere does."""
    if not is_out(outside - 1e-12):
        return outside
    for _ in range(_BISECTIONS):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if is_out(middle) else (middle, outside)
    return outside


def _wealth_below(rows: Sequence[Audited], m: float) -> float:
    """The log of the mean wealth of those who bet that the share is less than m in (0, 1)."""
    odds = m / (1 - m)
    return _log_mean_exp(
        sum(
            row.errors * log1p(-stake * row.share)
            + (row.reviewed - row.errors) * log1p(stake * row.share * odds)
            for row in rows
        )
        for stake in _STAKES
    )


def _wealth_above(rows: Sequence[Audited], m: float) -> float:
    """The log of the mean wealth of those who bet that the share is more than m in (0, 1)."""
    odds = (1 - m) / m
    return _log_mean_exp(
        sum(
            row.errors * log1p(stake * row.share * odds)
            + (row.reviewed - row.errors) * log1p(-stake * row.share)
            for row in rows
        )
        for stake in _STAKES
    )


def _log_mean_exp(logs: Iterable[float]) -> float:
    values = list(logs)
    top = max(values)
    return top + log(sum(exp(each - top) for each in values) / len(values))


class ErrorCusum(msgspec.Struct, frozen=True):
    """Whether errors have become more than a policy means to have, from the order in which reviews come.

    `evidence` is the log of the greatest wealth of all who began to bet at some review that the share of errors exceeds
    `target`, on `FACTOR` times as much. If it does not, an alarm among the next `horizon` reviews has a probability of at
    most `alpha`: by Ville's inequality, once for each who may begin. `usual` is the mean of the last shares: stakes are for
    a review with that one.

    References
    ----------
    Page (1954), "Continuous Inspection Schemes". Shin, Ramdas and Rinaldo (2024), "E-detectors: a nonparametric framework
    for sequential change detection", section 2. Weights as in `error_escape`.
    """

    target: float
    horizon: int = 2000
    alpha: float = 0.05
    evidence: float = 0.0
    reviewed: int = 0
    usual: float = 1.0

    def after(self, acceptable: bool, share: float = 1.0) -> ErrorCusum:
        """The state after one more review; `share` is that of `Audited`."""
        bad = min(_FACTOR * self.target, (1 + self.target) / 2)
        best = (bad - self.target) / (1 - self.target)
        # Set before this review is drawn, so that the bet stays a fair one.
        stake = share * min(best / self.usual, _MOST_STAKED)
        gain = log1p(-stake) if acceptable else log1p(stake * (1 / self.target - 1))
        seen = self.reviewed + 1
        return replace(
            self,
            evidence=max(self.evidence, 0.0) + gain,
            reviewed=seen,
            usual=self.usual + (share - self.usual) / min(seen + 1, _USUAL_OF),
        )

    @property
    def limit(self) -> float:
        """The evidence from which on there is an alarm."""
        return log(self.horizon / self.alpha)

    @property
    def is_alarm(self) -> bool:
        """Whether errors have become too many."""
        return self.evidence >= self.limit


_FACTOR = 3.0
_MOST_STAKED = 0.9
_USUAL_OF = 200


class Disagreement(NamedTuple):
    """Two who judge the same responses differ more often than they did, or than they may.

    `n` pairs since the evidence began to gather, of which `differ`; in the reference it was `differed` of `reference`, the two numbers
    0 while there is none. The share was held against `limit`, in (0, 1).
    """

    n: int
    differ: int
    reference: int
    differed: int
    limit: float


#: So many pairs say how often two differ, before they are held to it.
REFERENCE_PAIRS = 200
_HOPELESS = 0.99


@dataclass(slots=True)
class AgreementMonitor:
    """Whether two who judge the same responses still differ no more often than at first, and than `most`, if that is given.

    The first REFERENCE_PAIRS say how often they do: at most `error_escape(...).high`, or the end of the exact interval where all
    were drawn alike, but for a chance of `alpha` / 2. What comes later is held against that, or against `most` if it is less, by an `ErrorCusum` with the other half: if the share does not change and is not above
    `most`, an alarm in the first 2000 pairs has a probability of at most `alpha`. `counts` has reviews and
    differences of the reference by `share`, as `Audited`. Who differ nearly always can get no worse: then there is no alarm.
    """

    alpha: float
    most: float | None = None
    counts: dict[float, tuple[int, int]] = field(default_factory=dict)
    cusum: ErrorCusum | None = None
    n: int = 0
    differ: int = 0

    def add(self, *, differ: bool, share: float = 1.0) -> Disagreement | None:
        """Take in one more pair, and give the evidence if it is enough; `share` in (0, 1] is that of `Audited`."""
        if self.cusum is None and self.most is not None:
            self.cusum = self._held_to(self.most)
        pairs, differed = self._reference()
        if pairs < REFERENCE_PAIRS:
            n, k = self.counts.get(share, (0, 0))
            self.counts[share] = n + 1, k + differ
        if self.cusum is None or self.cusum.evidence <= 0.0:
            self.n = self.differ = 0
        if self.cusum is not None:
            self.cusum = self.cusum.after(not differ, share)
            self.n, self.differ = self.n + 1, self.differ + differ
        is_alarm = self.cusum is not None and self.cusum.is_alarm
        limit = 1.0 if self.cusum is None else self.cusum.target
        if pairs == REFERENCE_PAIRS - 1:
            self._learn()
        return Disagreement(self.n, self.differ, pairs, differed, limit) if is_alarm else None

    def _reference(self) -> tuple[int, int]:
        return sum(n for n, _ in self.counts.values()), sum(k for _, k in self.counts.values())

    def _learn(self) -> None:
        rows = [Audited(share, n, k) for share, (n, k) in self.counts.items()]
        high = error_escape(rows, 1.0 - self.alpha).high
        if len(rows) == 1 and (
            exact := clopper_pearson(rows[0].errors, rows[0].reviewed, 1.0 - self.alpha)
        ):
            high = exact.high
        if self.most is None or high < self.most:
            self.cusum = self._held_to(high) if high < _HOPELESS else None

    def _held_to(self, target: float) -> ErrorCusum:
        return ErrorCusum(target, alpha=self.alpha / 2)


class Miscalibration(NamedTuple):
    """Confidence that is not what it says, on the last `n` labels.

    `error` is the expected calibration error in bins of equal mass; `statistic` would exceed `critical` by chance with the
    stated probability. `claimed` and `found` are the mean confidence and the share that was acceptable.
    """

    n: int
    error: float
    statistic: float
    critical: float
    claimed: float
    found: float


CALIBRATION_LABELS = 200
_CALIBRATION_BINS = 10
_CALIBRATION_LOOKS = 40


def miscalibration(pairs: Sequence[tuple[float, bool]]) -> Miscalibration | None:
    """Whether n labels contradict the confidences given before; None if not, or with fewer than CALIBRATION_LABELS.

    Parameters
    ----------
    pairs : sequence of (confidence in [0, 1], acceptable)
        Which responses were labelled may depend on their confidence, but for the same confidence not on what they say.

    Notes
    -----
    Given the confidences, labels of a calibrated model are independent draws. The sum over bins of squared
    differences over their variance is then about chi-squared with as many degrees of freedom. A look finds something by
    chance with a probability of ALPHA / 40: 40 looks at fresh labels together ALPHA.

    References
    ----------
    Hosmer and Lemeshow (1980), "Goodness of fit tests for the multiple logistic regression model". Wilson and Hilferty
    (1931) for the tail.
    """
    n = len(pairs)
    if n < CALIBRATION_LABELS:
        return None
    ordered = sorted(pairs)
    statistic = error = 0.0
    for at in range(_CALIBRATION_BINS):
        rows = ordered[n * at // _CALIBRATION_BINS : n * (at + 1) // _CALIBRATION_BINS]
        expected = sum(confidence for confidence, _ in rows)
        variance = sum(confidence * (1 - confidence) for confidence, _ in rows)
        gap = sum(acceptable for _, acceptable in rows) - expected
        statistic += gap * gap / max(variance, 0.25)
        error += abs(gap) / n
    critical = chi_squared_quantile(_CALIBRATION_BINS, ALPHA / _CALIBRATION_LOOKS)
    if statistic <= critical:
        return None
    claimed = sum(confidence for confidence, _ in pairs) / n
    return Miscalibration(n, error, statistic, critical, claimed, sum(a for _, a in pairs) / n)


@cache
def chi_squared_quantile(degrees: int, tail: float) -> float:
    """What chi-squared exceeds with the probability `tail` in (0, 1), by Wilson and Hilferty's approximation.

    In the far tail it is too high, by 1 to 3 % for many degrees of freedom and 15 % for one: on the quiet side.

    Examples
    --------
    >>> round(chi_squared_quantile(10, 0.05), 1)
    18.3
    """
    low, high = -10.0, 10.0
    for _ in range(60):
        z = (low + high) / 2
        low, high = (z, high) if erfc(z / sqrt(2)) / 2 > tail else (low, z)
    spread = 2 / (9 * degrees)
    return degrees * float((1 - spread + low * sqrt(spread)) ** 3)


def agreement(answers: Iterable[Sequence[bool]]) -> tuple[int, int]:
    """Of all pairs of people who judged the same response: how many agree, and how many there are."""
    agreed = pairs = 0
    for each in answers:
        n, yes = len(each), sum(each)
        pairs += n * (n - 1) // 2
        agreed += yes * (yes - 1) // 2 + (n - yes) * (n - yes - 1) // 2
    return agreed, pairs
