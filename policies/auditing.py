"""How much of what is returned is reviewed after the fact, and when that share changes.

Every response that could be returned has a known probability of being reviewed. None is zero where a policy audits at all:
otherwise nothing could be said of the errors that go out. Of the responses of one cell of the matrix those that may well be
wrong are drawn more often than those that claim to be right (`Spread`).

References
----------
ISO 2859-1:1999, "Sampling procedures for inspection by attributes", section 9.3, whose switching rules these are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from enum import StrEnum
from functools import cache, lru_cache
from math import sqrt
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from policies.agreement import binomial_cdf
from policies.model import Action, Audit, Cell, Mode, Policy

#: The least share of a cell of the matrix that is audited where the policy audits.
LEAST_RATE = 0.01

#: Of the rate of a cell, what a response in it is audited with at the least, however sure it is.
LEAST_OF_RATE = 0.5

#: Confidences of a cell are told apart in so many groups, each of which gets about as many audits.
_GROUPS = 8

#: A claimed share of errors of 0 or 1 is believed no further than this; a smaller share of responses is none.
_SUREST = 1e-9

#: Audits judged together: what the standard calls a lot.
LOT = 50

#: How unlikely a lot may be at the target before it fails.
LOT_ALPHA = 0.05

_PASSES_TO_RELAX = 5
_FAILURES_TO_TIGHTEN = 2
_LOTS_LOOKED_BACK = 5
_FAILURES_TO_STOP = 5
_SCORE_TO_REDUCE = 30
_SCORE_OF_A_GOOD_LOT = 3

#: What sums of shares are off by at the most.
_ROUNDING = 1e-6


class AuditLevel(StrEnum):
    """How closely a policy is audited; at `stop` every response waits for a person until a person says otherwise."""

    NORMAL = "normal"
    TIGHTENED = "tightened"
    REDUCED = "reduced"
    STOP = "stop"


def audit_rate(policy: Policy, level: AuditLevel, cell: Cell | None = None) -> float:
    """The share in [0, 1] of returned responses that is audited.

    That of the policy; of a cell of the matrix that names its own rate, that one, and with `adaptive` the greater of the
    two. Where the policy audits, no cell is audited less than LEAST_RATE, or than the policy's rate if that is less still.
    """
    rate = _base_rate(policy.audit, policy.mode, level)
    own = None if cell is None else cell.audit
    if own is None:
        return rate
    return max(own, rate if policy.audit.adaptive is not None else min(rate, LEAST_RATE))


def audit_floor(policy: Policy, level: AuditLevel, *, spread: bool = False) -> float:
    """The least probability above 0 with which a response that is returned is audited; 0 if none is.

    `spread` says that audits of a cell are spread over its confidences.
    """
    rates = [audit_rate(policy, level)]
    rates += [audit_rate(policy, level, cell) for cell in policy.matrix.returning]
    floors = (_floor(rate) if spread else rate for rate in rates if rate > 0)
    return min(floors, default=0.0)


def _floor(rate: float) -> float:
    return rate if rate >= 1.0 else LEAST_OF_RATE * rate


class _Group(NamedTuple):
    """Neighbouring confidences: the least of them, the share of responses, and the mean of sqrt(e (1 - e))."""

    low: float
    mass: float
    noise: float


class Spread:
    """How the audits of a cell are spread over the confidences of its responses.

    Parameters
    ----------
    curve : pairs of a confidence in [0, 1] and the share in [0, 1] of responses that are at least so confident
        In any order; that of the labels to which the calibrator was fitted.

    Notes
    -----
    With e, one minus the confidence, as the probability of an error, the Horvitz-Thompson estimate of the share of errors has
    the least variance for a given number of audits when the probability p to be audited is proportional to sqrt(e (1 - e)).
    So ``p = min(max(c sqrt(e (1 - e)), LEAST_OF_RATE * rate), 1)``, with c such that the mean of p over the curve is the rate.
    The floor is high because e is only claimed: p is right whatever the truth, and an error where none was expected must
    not count for more than twice an audit.

    References
    ----------
    Neyman (1934), "On the Two Different Aspects of the Representative Method", part III (allocation). Zrnic and Candes (2024),
    "Active Statistical Inference", section 3.
    """

    def __init__(self, curve: Iterable[tuple[float, float]]) -> None:
        self._points: list[tuple[float, float, float]] = []
        above, covered = None, 0.0
        for confidence, coverage in sorted(curve, reverse=True):
            middle = confidence if above is None else (confidence + above) / 2
            error = min(max(1.0 - middle, _SUREST), 1.0 - _SUREST)
            mass = max(coverage - covered, 0.0)
            self._points.append((middle, mass, sqrt(error * (1.0 - error))))
            above, covered = confidence, max(coverage, covered)
        self._points.reverse()
        self._solved = lru_cache(maxsize=64)(self._solve)

    def probability(self, confidence: float, rate: float, low: float, high: float) -> float:
        """The probability with which a response is audited, for a cell of confidences in [low, high) with that mean rate.

        In [LEAST_OF_RATE * rate, 1]; the rate itself where the curve knows nothing of the cell, and where it is 0 or 1.
        """
        if not 0.0 < rate < 1.0:
            return rate
        lows, probabilities = self._solved(rate, low, high)
        if not lows:
            return rate
        return probabilities[max(bisect_right(lows, confidence) - 1, 0)]

    def _solve(self, rate: float, low: float, high: float) -> tuple[list[float], list[float]]:
        """Where each group begins, ascending, and the probability with which its members are audited."""
        groups = self._groups(low, high)
        floor, whole = _floor(rate), sum(each.mass for each in groups)
        if not whole:
            return [], []
        few, many = 0.0, 1.0 / min(each.noise for each in groups)
        for _ in range(60):
            scale = (few + many) / 2
            drawn = sum(each.mass * min(max(scale * each.noise, floor), 1.0) for each in groups)
            few, many = (scale, many) if drawn < rate * whole else (few, scale)
        probabilities = [min(max(many * each.noise, floor), 1.0) for each in groups]
        return [each.low for each in groups], probabilities

    def _groups(self, low: float, high: float) -> list[_Group]:
        inside = [each for each in self._points if low <= each[0] < high and each[1] > _SUREST]
        share = sum(mass * noise for _, mass, noise in inside) / _GROUPS
        groups: list[_Group] = []
        begins, mass, noise, cut = low, 0.0, 0.0, share
        total = 0.0
        for at, (_, own, deviation) in enumerate(inside):
            mass, noise, total = mass + own, noise + own * deviation, total + own * deviation
            if total >= cut * (1 - 1e-9) or at == len(inside) - 1:
                groups.append(_Group(begins, mass, noise / mass))
                cut = total + share
                if at < len(inside) - 1:
                    begins, mass, noise = (inside[at][0] + inside[at + 1][0]) / 2, 0.0, 0.0
        return groups


def _base_rate(audit: Audit, mode: Mode, level: AuditLevel) -> float:
    adaptive = audit.adaptive
    if adaptive is None or level is AuditLevel.NORMAL:
        return audit.rate
    if level is AuditLevel.REDUCED:
        return adaptive.min
    return 1.0 if mode is Mode.OBSERVE or level is AuditLevel.STOP else adaptive.max


@cache
def allowed_errors(n: int, target: float) -> int:
    """The most errors that a lot of n audits may have and pass.

    If no more than `target` of the responses are wrong, a lot fails with a probability of at most LOT_ALPHA.

    Examples
    --------
    >>> allowed_errors(50, 0.02), allowed_errors(50, 0.0)
    (3, 0)
    """
    return next(k for k in range(n + 1) if 1.0 - binomial_cdf(k, n, target) <= LOT_ALPHA)


class Switching(msgspec.Struct, frozen=True):
    """The state of the switching rules: the level, and of the lot under way the audits and the errors, by what each counts for.

    `lots` says of the last few lots at this level whether they passed. `failed` counts those that failed while tightened,
    `score` grows with every lot at the normal level that would have passed at half the target.
    """

    level: AuditLevel = AuditLevel.TIGHTENED
    audits: float = 0.0
    errors: float = 0.0
    lots: tuple[bool, ...] = ()
    failed: int = 0
    score: int = 0

    def after(self, acceptable: bool, target: float, share: float = 1.0) -> Switching:
        """The state after one more audit; nothing but a person leads out of `stop`.

        Responses that were drawn more often than others count for less: an audit for its `share` in (0, 1], the least
        probability with which a response is audited over that of this one. So lots are held to errors among what is returned.
        A lot fails if it has more errors than `allowed_errors`. Normal to tightened: 2 of at most 5 lots in a row fail.
        Tightened to normal: 5 pass in a row. Normal to reduced: a score of 30, 3 for every lot that would pass at half the
        target, nothing left of it after one that would not. Reduced to normal: one fails. Tightened to stop: 5 have failed.
        """
        audits, errors = self.audits + share, self.errors + (0.0 if acceptable else share)
        if self.level is AuditLevel.STOP:
            return self
        if audits < LOT - _ROUNDING:
            return replace(self, audits=audits, errors=errors)
        whole_errors = int(errors + _ROUNDING)
        passed = whole_errors <= allowed_errors(LOT, target)
        lots = (*self.lots, passed)[-_LOTS_LOOKED_BACK:]
        score = 0
        if passed and whole_errors <= allowed_errors(LOT, target / 2):
            score = self.score + _SCORE_OF_A_GOOD_LOT
        return replace(
            self,
            audits=0.0,
            errors=0.0,
            lots=lots,
            failed=self.failed + (not passed),
            score=score,
        )._switched()

    def _switched(self) -> Switching:
        if self.level is AuditLevel.TIGHTENED:
            if self.failed >= _FAILURES_TO_STOP:
                return Switching(AuditLevel.STOP)
            if len(self.lots) == _PASSES_TO_RELAX and all(self.lots):
                return Switching(AuditLevel.NORMAL)
        elif self.level is AuditLevel.REDUCED:
            if not self.lots[-1]:
                return Switching(AuditLevel.NORMAL)
        elif self.lots.count(False) >= _FAILURES_TO_TIGHTEN:
            return Switching(AuditLevel.TIGHTENED)
        elif self.score >= _SCORE_TO_REDUCE:
            return Switching(AuditLevel.REDUCED)
        return self

    def tightened(self) -> Switching:
        """The state after an alarm: tightened, from the start, unless it is `stop` or tightened already."""
        if self.level in (AuditLevel.STOP, AuditLevel.TIGHTENED):
            return self
        return Switching(AuditLevel.TIGHTENED)


def stops(policy: Policy, level: AuditLevel) -> Action | None:
    """Hold if nothing of a policy goes out without a person any more, else None."""
    stopped = level is AuditLevel.STOP and policy.audit.adaptive is not None
    return Action.HOLD if stopped else None
