"""Evidence and risk against the matrix: the decision, with every reason recorded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Literal, Protocol, cast

import orjson

from policies.calibration import Calibrator, checks_digest
from policies.model import Action, Band, Mode, Policy, RiskTier
from policies.signals import score
from policies.thresholds import band
from validators import (
    JSON,
    MAX_FINDINGS,
    Check,
    CheckResult,
    Finding,
    OnError,
    OnFail,
    Outcome,
)


class Zone(StrEnum):
    """The four zones a decision falls in."""

    AUTO = "auto"
    AUTO_AUDIT = "auto+audit"
    BATCH = "batch"
    ESCALATE = "escalate"


@dataclass(frozen=True, slots=True)
class Reason:
    """What spoke, what it says, and the action it demands (None if it only explains).

    `source` is `check:<id>`, `stage:<name>`, `matrix`, `risk`, `confidence`, `regenerate`, `mode`.
    """

    source: str
    message: str
    action: Action | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """The check results so far, by check id in the order they ran, plus the logprob signals.

    `signals` maps signal name to value (empty when the response carries no usable logprobs;
    `signals_absent` then says why: one of `policies.signals.Absence`). `ran` are the stages run, in
    order; `skipped` those passed over, with the reason; `notes` say of stages that ran why, where
    their condition could not be decided.
    """

    results: Mapping[str, CheckResult] = field(default_factory=dict)
    signals: Mapping[str, float] = field(default_factory=dict)
    signals_absent: str | None = None
    ran: tuple[str, ...] = ()
    skipped: tuple[Reason, ...] = ()
    notes: tuple[Reason, ...] = ()

    def after(self, stage: str, results: Mapping[str, CheckResult]) -> Evidence:
        """Evidence with the results of one more stage."""
        return replace(self, results={**self.results, **results}, ran=(*self.ran, stage))


class Assessed(Protocol):
    """The risk of an exchange: the shape of `policies.risk.RiskAssessment`."""

    @property
    def tier(self) -> RiskTier:
        """The tier."""

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """Why it is that tier."""


ConfidenceSource = Literal["logprob", "judge", "consistency", "none"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """How good a response probably is.

    `score` in [0, 1] is uncalibrated and only orders responses; None without signals. `confidence`
    in [0, 1] is the calibrated probability that the response is acceptable; None unless a
    calibrator applies, and then `uncalibrated` says why. `source` is `none` exactly when there is
    no confidence. `calibrator` names the one that gave it.
    """

    score: float | None = None
    confidence: float | None = None
    source: ConfidenceSource = "none"
    calibrator: str | None = None
    uncalibrated: str | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to the response, and why: the audit record.

    `action` is what is done to the client; `intended` what would have been done had the mode been
    enforce (equal unless `mode: observe`). `regenerate` asks the caller of the core for another
    attempt instead (then `action` is what applies if no attempt is left). `confidence` is None
    unless a fitting calibrator exists. `audit` is true if the response is returned and sampled for
    review, drawn with probability `inclusion`; for flag and hold `inclusion` is 1, for block 0:
    nobody reviews it. `redactions` are the findings whose spans are to be replaced in what is
    delivered.
    """

    action: Action
    intended: Action
    zone: Zone
    risk: RiskTier
    band: Band | None
    score: float | None
    confidence: float | None
    confidence_source: ConfidenceSource
    calibrator: str | None
    audit: bool
    inclusion: float
    regenerate: bool
    redactions: tuple[Finding, ...]
    reasons: tuple[Reason, ...]


def estimate(
    policy: Policy, evidence: Evidence, *, model: str, calibrator: Calibrator | None
) -> Estimate:
    """The score, and the confidence if `calibrator` applies to this evidence on `model`.

    Scores of the policy's checks with `on_fail: score` lower the score to their minimum. If one of
    them could not tell, neither score nor confidence is known.
    """
    if policy.confidence.source == "none":
        return Estimate(uncalibrated="the policy asks for no logprobs")
    if evidence.signals_absent is not None:
        return Estimate(uncalibrated=f"logprobs are {evidence.signals_absent}")
    feeding = [check for check in policy.checks if check.on_fail is OnFail.SCORE]
    results = [evidence.results[check.id] for check in feeding if check.id in evidence.results]
    check_scores = [each.score for each in results if each.score is not None]
    if len(check_scores) < len(results):
        return Estimate(uncalibrated="a check that feeds the score could not tell")
    known = score(evidence.signals, check_scores)
    if calibrator is None:
        return Estimate(known, uncalibrated="there is no calibrator")
    if reason := calibrator.fits(model, evidence.signals, checks_digest(feeding)):
        return Estimate(known, uncalibrated=reason)
    confidence = calibrator.confidence(evidence.signals, check_scores)
    return Estimate(known, confidence, calibrator.source, calibrator.name)


def most_severe(actions: Iterable[Action | None]) -> Action:
    """The most severe action demanded: block > hold > flag > return; return if there is none."""
    demanded = (action for action in actions if action is not None)
    return max(demanded, key=lambda action: action.severity, default=Action.RETURN)


def decide(
    policy: Policy,
    evidence: Evidence,
    *,
    risk: Assessed,
    estimate: Estimate,
    draw: float,
    attempts_left: int,
) -> Decision:
    """The decision on a response: the most severe action that any reason demands.

    Reasons come from every check that failed or could not run, and from the risk matrix. A check of
    a stage that was not skipped and has no result counts as one that could not run.

    In observe mode nothing is enforced: the action is return, nothing is redacted or asked for
    again, and what would have been flagged, held or blocked is only sampled, at `audit.rate`.

    `draw` in [0, 1) is a random number: a returned response is sampled for audit if it is below the
    rate. `attempts_left` >= 0 says how often the model may still be asked again.
    """
    verdicts = tuple(_verdicts(policy, evidence))
    where, why, cell_audit = _matrix(policy, risk.tier, estimate)
    demands = (*_check_reasons(verdicts, risk.tier), why)
    intended = most_severe(reason.action for reason in demands)
    observed = policy.mode is Mode.OBSERVE
    action = Action.RETURN if observed else intended
    rate = cell_audit if intended is Action.RETURN and cell_audit is not None else policy.audit.rate
    inclusion = _INCLUSION.get(action, rate)
    audit = action is Action.RETURN and draw < inclusion
    again = action is not Action.BLOCK and attempts_left > 0 and _wants_another(verdicts)
    remarks: tuple[Reason, ...] = ()
    if observed:
        remarks = (Reason("mode", f"observe: returned, enforced it would be {intended}"),)
    elif again:
        remarks = (Reason("regenerate", f"asked for again, attempts left: {attempts_left}"),)
    return Decision(
        action=action,
        intended=intended,
        zone=_ZONE.get(action, Zone.AUTO_AUDIT if audit else Zone.AUTO),
        risk=risk.tier,
        band=where,
        score=estimate.score,
        confidence=estimate.confidence,
        confidence_source=estimate.source,
        calibrator=estimate.calibrator,
        audit=audit,
        inclusion=inclusion,
        regenerate=again and not observed,
        redactions=() if observed else _redactions(verdicts),
        reasons=(*risk.reasons, *evidence.skipped, *evidence.notes, *demands, *remarks),
    )


def to_json(decision: Decision, evidence: Evidence) -> dict[str, JSON]:
    """The decision and its evidence as plain JSON values; a number that is not finite is null."""
    record = {"decision": decision, "evidence": evidence}
    return cast("dict[str, JSON]", orjson.loads(orjson.dumps(record)))


_ZONE = {Action.FLAG: Zone.BATCH, Action.HOLD: Zone.ESCALATE, Action.BLOCK: Zone.ESCALATE}
_INCLUSION = {Action.FLAG: 1.0, Action.HOLD: 1.0, Action.BLOCK: 0.0}
_FAIL_ACTION = {
    OnFail.BLOCK: Action.BLOCK,
    OnFail.HOLD: Action.HOLD,
    OnFail.FLAG: Action.FLAG,
    OnFail.REGENERATE: Action.HOLD,
    OnFail.REDACT: None,
    OnFail.SCORE: None,
}

Verdict = tuple[Check, CheckResult]


def _verdicts(policy: Policy, evidence: Evidence) -> Iterator[Verdict]:
    skipped = {reason.source for reason in evidence.skipped}
    for stage in policy.stages:
        if f"stage:{stage.name}" in skipped:
            continue
        for check in stage.checks:
            missing = CheckResult(check.id, Outcome.ERROR, error="it gave no result")
            yield check, evidence.results.get(check.id, missing)


def _check_reasons(verdicts: Iterable[Verdict], tier: RiskTier) -> Iterator[Reason]:
    for check, result in verdicts:
        if result.outcome is Outcome.FAIL:
            yield _failed(check, result)
        elif result.outcome is Outcome.ERROR:
            default = OnError.HOLD if tier in {RiskTier.HIGH, RiskTier.CRITICAL} else OnError.FLAG
            action = Action((check.on_error or default).value)
            yield Reason(f"check:{check.id}", f"could not run: {result.error}", action)


def _failed(check: Check, result: CheckResult) -> Reason:
    first = result.findings[0].message if result.findings else "no details"
    more = f" and {len(result.findings) - 1} more" if len(result.findings) > 1 else ""
    message = f"failed ({check.on_fail}): {first}{more}"
    action = _FAIL_ACTION[check.on_fail]
    if check.on_fail is OnFail.REDACT and not _can_redact_all(result):
        return Reason(
            f"check:{check.id}", f"{message}; not everything can be redacted", Action.HOLD
        )
    return Reason(f"check:{check.id}", message, action)


def _can_redact_all(result: CheckResult) -> bool:
    # A check reports at most MAX_FINDINGS, so that many may not be all.
    found = result.findings
    return 0 < len(found) < MAX_FINDINGS and all(
        each.span is not None and each.replacement is not None for each in found
    )


def _wants_another(verdicts: Iterable[Verdict]) -> bool:
    return any(
        check.on_fail is OnFail.REGENERATE and result.outcome is Outcome.FAIL
        for check, result in verdicts
    )


def _redactions(verdicts: Iterable[Verdict]) -> tuple[Finding, ...]:
    return tuple(
        finding
        for check, result in verdicts
        if check.on_fail is OnFail.REDACT and result.outcome is Outcome.FAIL
        for finding in result.findings
        if finding.span is not None and finding.replacement is not None
    )


def _matrix(
    policy: Policy, tier: RiskTier, estimate: Estimate
) -> tuple[Band | None, Reason, float | None]:
    """The band, what the matrix demands, and the audit rate the cell names."""
    row = policy.matrix.of(tier)
    if estimate.confidence is not None:
        where = band(estimate.confidence, policy.thresholds, tier)
        cell = row.of(where)
        message = f"tier {tier}, confidence {estimate.confidence:.3f} is {where}"
        return where, Reason("matrix", message, cell.action), cell.audit
    asked = Action(policy.confidence.when_uncalibrated)
    action = most_severe((asked, row.confident.action))
    message = f"no confidence, {estimate.uncalibrated}: {asked} when uncalibrated"
    if action is not asked:
        message += f", but {action} is the least for tier {tier}"
    return None, Reason("confidence", message, action), row.confident.audit
