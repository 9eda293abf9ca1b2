"""The cascade: which stage runs next, until the outcome is settled.

Live traffic, replay and `policy test` all run this loop::

    evidence = start(policy, exchange)
    while isinstance(step := next_step(policy, evidence, exchange, calibrator), RunStage):
        results = run_stage(step.stage, exchange, monotonic_ms)
        evidence = step.evidence.after(step.stage.name, results)
    decision = decide(policy, step.evidence, risk=step.risk, estimate=step.estimate, ...)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from policies.calibration import Calibrator
from policies.decision import Estimate, Evidence, Reason, estimate
from policies.expressions import Variables
from policies.model import Policy, Stage
from policies.risk import RiskAssessment, assess, stage_applies
from policies.signals import signals
from validators import CheckResult, Exchange, OnError, OnFail, Outcome


@dataclass(frozen=True, slots=True)
class RunStage:
    """Run this stage; `evidence` is what it was, with the stages passed over on the way here."""

    stage: Stage
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class Settle:
    """Nothing is left to run; `evidence` has every stage, as run or as skipped."""

    evidence: Evidence
    risk: RiskAssessment
    estimate: Estimate


def start(policy: Policy, exchange: Exchange) -> Evidence:
    """The evidence before the first stage: the logprob signals, if the policy asks for them."""
    if policy.confidence.source == "none":
        return Evidence()
    found = signals(exchange)
    return Evidence(signals=found.values, signals_absent=found.absent)


def next_step(
    policy: Policy, evidence: Evidence, exchange: Exchange, calibrator: Calibrator | None
) -> RunStage | Settle:
    """The next stage whose condition holds, or that the outcome is settled.

    Stages run in the policy's order. A check that demands block settles the outcome, whatever later
    stages would say, as no action is more severe; the stages left are recorded as skipped. A
    condition that cannot be decided holds.
    """
    known = estimate(policy, evidence, model=exchange.model, calibrator=calibrator)
    variables = Variables(
        exchange, results=evidence.results, score=known.score, confidence=known.confidence
    )
    risk = assess(policy, variables)
    variables = replace(variables, risk=risk.tier.rank)
    veto = _veto(policy, evidence)
    for stage in policy.stages[len(evidence.ran) + len(evidence.skipped) :]:
        applies, reason = stage_applies(policy, stage, variables)
        if veto is not None:
            applies = False
            reason = Reason(f"stage:{stage.name}", f"skipped: check {veto} demands block")
        remarks = () if reason is None else (reason,)
        if applies:
            return RunStage(stage, replace(evidence, notes=(*evidence.notes, *remarks)))
        evidence = replace(evidence, skipped=(*evidence.skipped, *remarks))
    return Settle(evidence, risk, known)


def run_stage(
    stage: Stage, exchange: Exchange, monotonic_ms: Callable[[], float]
) -> Mapping[str, CheckResult]:
    """The result of every check of a stage, by check id in order, each with its latency.

    A check that raises, and one whose result makes no sense, gives an ERROR: never a pass, and
    never the end of the request. `monotonic_ms` is a clock in milliseconds that does not go back.
    """
    results: dict[str, CheckResult] = {}
    for check in stage.checks:
        began_ms = monotonic_ms()
        try:
            result = vetted(check.run(exchange))
        except Exception as error:  # noqa: BLE001  a check that breaks is evidence like any other
            result = CheckResult(check.id, Outcome.ERROR, error=_where(error))
        results[check.id] = replace(result, check=check.id, latency_ms=monotonic_ms() - began_ms)
    return results


def vetted(result: CheckResult) -> CheckResult:
    """The result as it may be recorded.

    One whose score is not a number in [0, 1] becomes an ERROR, and an ERROR has no score.
    """
    error = result.error
    if result.score is not None and not 0.0 <= result.score <= 1.0:
        error = f"score {result.score} is not in [0, 1]"
    elif result.outcome is not Outcome.ERROR:
        return result
    return replace(result, outcome=Outcome.ERROR, score=None, error=error or "no reason given")


def _veto(policy: Policy, evidence: Evidence) -> str | None:
    for check in policy.checks:
        result = evidence.results.get(check.id)
        if result is None:
            continue
        failed = result.outcome is Outcome.FAIL and check.on_fail is OnFail.BLOCK
        if failed or (result.outcome is Outcome.ERROR and check.on_error is OnError.BLOCK):
            return check.id
    return None


def _where(error: Exception) -> str:
    # Not the message: it may quote the response.
    name = type(error).__name__
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return (
        f"{name} in {trace.tb_frame.f_code.co_qualname}, line {trace.tb_lineno}" if trace else name
    )
