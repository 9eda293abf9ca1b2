"""Evidence and risk against the matrix: the decision, with every reason recorded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from typing import cast

import msgspec
from msgspec.structs import replace

from policies.auditing import AuditLevel, Spread, audit_floor, audit_rate, stops
from policies.calibration import certificate_for
from policies.evidence import ConfidenceSource, Estimate, Evidence, Reason
from policies.model import Action, AnyCheck, Band, Cell, Mode, Policy, RiskTier, Stage
from policies.risk import RiskAssessment
from policies.thresholds import band, limits
from validators import (
    JSON,
    MAX_FINDINGS,
    Cause,
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


class Decision(msgspec.Struct, frozen=True):
    """What happens to the response, and why: the audit record.

    `action` is what is done to the client; `intended` what would have been done had the mode been
    enforce (equal unless `mode: observe`). `regenerate` asks the caller of the core for another
    attempt instead (then `action` is what applies if no attempt is left). `confidence` is None
    unless a fitting calibrator exists. `audit` is true if the response is returned and sampled for
    review, drawn with probability `inclusion`; for flag and hold `inclusion` is 1, for block 0:
    nobody reviews it. `inclusion_floor` is the least probability with which any response of the
    policy was audited at the time. `redactions` are the findings whose spans are to be replaced in what is
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
    inclusion_floor: float = 0.0


def most_severe(actions: Iterable[Action | None]) -> Action:
    """The most severe action demanded: block > hold > flag > return; return if there is none."""
    demanded = (action for action in actions if action is not None)
    return max(demanded, key=lambda action: action.severity, default=Action.RETURN)


def decide(
    policy: Policy,
    evidence: Evidence,
    *,
    risk: RiskAssessment,
    estimate: Estimate,
    draw: float,
    attempts_left: int,
    level: AuditLevel = AuditLevel.NORMAL,
    spread: Spread | None = None,
) -> Decision:
    """The decision on a response: the most severe action that any reason demands.

    Reasons come from every check that failed or could not run, and from the risk matrix. A check of
    a stage that was not skipped and has no result counts as one that could not run.

    In observe mode nothing is enforced: the action is return, nothing is redacted or asked for
    again, and what would have been flagged, held or blocked is only sampled, at the policy's rate.

    `level` is how closely the policy is audited, `spread` the calibrator's if there is one that may be
    believed, whether or not it applies here (`policies.auditing`). `draw` in [0, 1) is a random number: a
    returned response is audited if it is below `inclusion`. `attempts_left` >= 0 repeats may still follow.
    """
    verdicts = tuple(_verdicts(policy, evidence))
    where, why, cell = _matrix(policy, risk.tier, estimate)
    demands = (
        *_check_reasons(policy, verdicts, evidence, risk.tier),
        why,
        *_audited(policy, level),
    )
    intended = most_severe(reason.action for reason in demands)
    observed = policy.mode is Mode.OBSERVE
    action = Action.RETURN if observed else intended
    own = cell if intended is Action.RETURN else None
    inclusion = _INCLUSION.get(action, audit_rate(policy, level, own))
    if own and spread:
        inclusion = _spread(spread, inclusion, policy, risk.tier, where, estimate)
    audit = action is Action.RETURN and draw < inclusion
    again = action is not Action.BLOCK and attempts_left > 0 and _wants_another(verdicts)
    remark = Reason("regenerate", f"asked for again, attempts left: {attempts_left}")
    if observed:
        remark = Reason("mode", f"observe: returned, enforced it would be {intended}")
    remarks = (remark,) if observed or again else ()
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
        inclusion_floor=audit_floor(policy, level, spread=spread is not None),
        regenerate=again and not observed,
        redactions=() if observed else _redactions(verdicts),
        reasons=(*risk.reasons, *evidence.skipped, *evidence.notes, *demands, *remarks),
    )


def demand(stage: Stage, check: AnyCheck, result: CheckResult, tier: RiskTier) -> Action | None:
    """The action a result asks for, None if it asks for nothing.

    A check that could not tell asks for its `on_error`, by default hold at tiers high and critical
    and flag below; one not asked for want of money for what the budget of its stage says.
    """
    if result.outcome is Outcome.PASS:
        return None
    if result.outcome is Outcome.FAIL:
        redacts = check.on_fail is OnFail.REDACT
        return (
            Action.HOLD if redacts and not _can_redact_all(result) else FAIL_ACTION[check.on_fail]
        )
    asked = check.on_error
    if result.cause is Cause.BUDGET and stage.budget is not None:
        asked = stage.budget.when_used_up or asked
    return Action(asked or default_on_error(tier))


def default_on_error(tier: RiskTier) -> OnError:
    """What a check that could not tell asks for where the policy says nothing: fail closed."""
    return OnError.HOLD if tier.rank >= RiskTier.HIGH.rank else OnError.FLAG


def settled_by(stages: Iterable[Stage], results: Mapping[str, CheckResult]) -> str | None:
    """The id of the first check whose result demands block, which no other can change, or None."""
    for stage in stages:
        for check in stage.checks:
            result = results.get(check.id)
            if result is None or result.outcome is Outcome.PASS or result.cause is Cause.CANCELLED:
                continue
            if demand(stage, check, result, RiskTier.LOW) is Action.BLOCK:
                return check.id
    return None


def to_json(decision: Decision, evidence: Evidence, *, content: bool = False) -> dict[str, JSON]:
    """The decision and its evidence as plain JSON values; a number that is not finite is null.

    What quotes the response only with `content`: the rationales of judges, and fields by their keys.
    """
    if not content and (evidence.fields or any(each.opinion for each in evidence.results.values())):
        evidence = replace(
            evidence,
            results={name: _without_rationale(each) for name, each in evidence.results.items()},
            fields=(),
        )
    encoded = msgspec.json.encode({"decision": decision, "evidence": evidence})
    return cast("dict[str, JSON]", msgspec.json.decode(encoded))


def _without_rationale(result: CheckResult) -> CheckResult:
    opinion = result.opinion and replace(result.opinion, rationale="")
    return replace(result, opinion=opinion)


_ZONE = {Action.FLAG: Zone.BATCH, Action.HOLD: Zone.ESCALATE, Action.BLOCK: Zone.ESCALATE}
_INCLUSION = {Action.FLAG: 1.0, Action.HOLD: 1.0, Action.BLOCK: 0.0}
FAIL_ACTION = {
    OnFail.BLOCK: Action.BLOCK,
    OnFail.HOLD: Action.HOLD,
    OnFail.FLAG: Action.FLAG,
    OnFail.REGENERATE: Action.HOLD,
    OnFail.REDACT: None,
    OnFail.SCORE: None,
}

Verdict = tuple[Stage, AnyCheck, CheckResult]


def _verdicts(policy: Policy, evidence: Evidence) -> Iterator[Verdict]:
    skipped = {reason.source for reason in evidence.skipped}
    for stage in policy.stages:
        if f"stage:{stage.name}" in skipped:
            continue
        for check in stage.checks:
            result = evidence.results.get(check.id)
            if result is None:
                result = CheckResult(check.id, Outcome.ERROR, error="it gave no result")
            yield stage, check, result


def _check_reasons(
    policy: Policy, verdicts: Iterable[Verdict], evidence: Evidence, tier: RiskTier
) -> Iterator[Reason]:
    for stage, check, result in verdicts:
        if result.outcome is Outcome.PASS:
            continue
        source = f"check:{check.id}"
        action = demand(stage, check, result, tier)
        if result.outcome is Outcome.FAIL:
            yield Reason(source, _failed(check, result), action)
        elif result.cause is Cause.CANCELLED and (
            veto := settled_by(policy.stages, evidence.results)
        ):
            yield Reason(source, f"not needed: check {veto} demands block")
        elif result.cause is Cause.BUDGET:
            yield Reason(source, f"the budget is used up: {result.error}", action)
        else:
            yield Reason(source, f"could not run: {result.error}", action)


def _failed(check: AnyCheck, result: CheckResult) -> str:
    first = result.findings[0].message if result.findings else "no details"
    more = f" and {len(result.findings) - 1} more" if len(result.findings) > 1 else ""
    message = f"failed ({check.on_fail}): {first}{more}"
    if check.on_fail is OnFail.REDACT and not _can_redact_all(result):
        message += "; not everything can be redacted"
    return message


def _can_redact_all(result: CheckResult) -> bool:
    # A check reports at most MAX_FINDINGS, so that many may not be all.
    found = result.findings
    return 0 < len(found) < MAX_FINDINGS and all(
        each.span is not None and each.replacement is not None for each in found
    )


def _wants_another(verdicts: Iterable[Verdict]) -> bool:
    return any(
        check.on_fail is OnFail.REGENERATE and result.outcome is Outcome.FAIL
        for _, check, result in verdicts
    )


def _redactions(verdicts: Iterable[Verdict]) -> tuple[Finding, ...]:
    return tuple(
        finding
        for _, check, result in verdicts
        if check.on_fail is OnFail.REDACT and result.outcome is Outcome.FAIL
        for finding in result.findings
        if finding.span is not None and finding.replacement is not None
    )


def _spread(
    spread: Spread,
    rate: float,
    policy: Policy,
    tier: RiskTier,
    where: Band | None,
    estimate: Estimate,
) -> float:
    """The probability with which a response is audited in a cell with that rate: the rate itself without a confidence."""
    if where is None or estimate.confidence is None:
        return rate
    low, high = limits(where, policy.thresholds, tier, estimate.certificates)
    return spread.probability(estimate.confidence, rate, low, high)


def _audited(policy: Policy, level: AuditLevel) -> Iterator[Reason]:
    if (action := stops(policy, level)) is not None:
        message = "too many audits have failed: every response waits for a person"
        yield Reason("audit", message, action)


def _matrix(policy: Policy, tier: RiskTier, estimate: Estimate) -> tuple[Band | None, Reason, Cell]:
    """The band, what the matrix demands, and its cell."""
    row = policy.matrix.of(tier)
    if estimate.confidence is not None:
        where = band(estimate.confidence, policy.thresholds, tier, estimate.certificates)
        cell = row.of(where)
        message = f"tier {tier}, confidence {estimate.confidence:.3f} is {where}"
        if policy.thresholds.from_calibrator:
            message += _promised(estimate, tier)
        return where, Reason("matrix", message, cell.action), cell
    asked = Action(policy.confidence.when_uncalibrated)
    action = most_severe((asked, row.confident.action))
    message = f"no confidence, {estimate.uncalibrated}: {asked} when uncalibrated"
    if action is not asked:
        message += f", but {action} is the least for tier {tier}"
    return None, Reason("confidence", message, action), row.confident


def _promised(estimate: Estimate, tier: RiskTier) -> str:
    """What the certificate of a tier says, for the reason."""
    certificate = certificate_for(estimate.certificates, tier)
    if certificate is None:
        return f": calibrator {estimate.calibrator} has no certificate for it"
    if certificate.threshold is None:
        return f": no threshold is feasible at {certificate.alpha:g} errors"
    return f": {certificate.mode} for {certificate.alpha:g} errors from {certificate.threshold:.4f}"
