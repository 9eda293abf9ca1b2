"""How much of what is returned is reviewed after the fact, and when that share changes.

Every response that could be returned has a known probability of being reviewed. None is zero where a policy audits at all:
otherwise nothing could be said of the errors that go out.

References
----------
ISO 2859-1:1999, "Sampling procedures for inspection by attributes", section 9.3, whose switching rules these are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache

from policies.agreement import binomial_cdf
from policies.model import Action, Audit, Cell, Mode, Policy

#: The least share of a cell of the matrix that is audited where the policy audits.
LEAST_RATE = 0.01

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


def audit_floor(policy: Policy, level: AuditLevel) -> float:
    """The least probability above 0 with which a response that is returned is audited; 0 if none is."""
    least = audit_rate(policy, level)
    for cell in policy.matrix.returning:
        rate = audit_rate(policy, level, cell)
        if rate > 0 and (rate < least or not least):
            least = rate
    return least


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


@dataclass(frozen=True, slots=True)
class Switching:
    """The state of the switching rules: the level, and of the lot under way the audits and the errors.

    `lots` says of the last few lots at this level whether they passed. `failed` counts those that failed while tightened,
    `score` grows with every lot at the normal level that would have passed at half the target.
    """

    level: AuditLevel = AuditLevel.TIGHTENED
    audits: int = 0
    errors: int = 0
    lots: tuple[bool, ...] = ()
    failed: int = 0
    score: int = 0

    def after(self, acceptable: bool, target: float) -> Switching:
        """The state after one more audit; nothing but a person leads out of `stop`.

        A lot fails if it has more errors than `allowed_errors`. Normal to tightened: 2 of at most 5 lots in a row fail.
        Tightened to normal: 5 pass in a row. Normal to reduced: a score of 30, 3 for every lot that would pass at half the
        target, nothing left of it after one that would not. Reduced to normal: one fails. Tightened to stop: 5 have failed.
        """
        audits, errors = self.audits + 1, self.errors + (not acceptable)
        if self.level is AuditLevel.STOP:
            return self
        if audits < LOT:
            return replace(self, audits=audits, errors=errors)
        passed = errors <= allowed_errors(LOT, target)
        lots = (*self.lots, passed)[-_LOTS_LOOKED_BACK:]
        score = 0
        if passed and errors <= allowed_errors(LOT, target / 2):
            score = self.score + _SCORE_OF_A_GOOD_LOT
        return replace(
            self,
            audits=0,
            errors=0,
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
