"""The cascade: which stage runs next, until the outcome is settled.

Live traffic, replay and `policy test` all run this loop::

    evidence = start(policy, exchange)
    while isinstance(step := next_step(policy, evidence, exchange, calibrator, draw), RunStage):
        results = run_validators(step.stage.validators, exchange, monotonic_ms)
        if not step.settled_by(results):
            ...  # ask step.stage.judges side by side, until step.settled_by(results)
        evidence = step.done(results)
    decision = decide(policy, step.evidence, risk=step.risk, estimate=step.estimate, draw=draw, ...)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256

import msgspec
from msgspec.structs import replace

from judges import Judge
from policies.calibration import Calibrator
from policies.decision import FAIL_ACTION, default_on_error, demand, most_severe, settled_by
from policies.evidence import Estimate, Evidence, Reason, estimate
from policies.expressions import Variables
from policies.model import Action, Policy, Stage
from policies.risk import RiskAssessment, assess, stage_applies
from policies.signals import signals
from policies.streaming import reachable_tiers
from validators import Cause, CheckResult, Exchange, OnFail, Outcome, Validator


class RunStage(msgspec.Struct, frozen=True):
    """Run this stage; `evidence` is what it was, with the stages passed over on the way here."""

    stage: Stage
    evidence: Evidence

    def settled_by(self, results: Mapping[str, CheckResult]) -> str | None:
        """The id of a check of the stage that demands block: nothing else need be asked."""
        return settled_by((self.stage,), results)

    def done(self, results: Mapping[str, CheckResult]) -> Evidence:
        """The evidence with the results of the stage, in the order of its checks.

        Where a check demands block, a judge without a result is recorded as cancelled.
        """
        if not self.stage.judges:
            return self.evidence.after(self.stage.name, results)
        known = dict(results)
        if veto := self.settled_by(results):
            for judge in self.stage.judges:
                known.setdefault(judge.id, _cancelled(judge, veto))
        ordered = {each.id: known[each.id] for each in self.stage.checks if each.id in known}
        return self.evidence.after(self.stage.name, ordered)


class Settle(msgspec.Struct, frozen=True):
    """Nothing is left to run; `evidence` has every stage, as run or as skipped."""

    evidence: Evidence
    risk: RiskAssessment
    estimate: Estimate


def start(policy: Policy, exchange: Exchange) -> Evidence:
    """The evidence before the first stage: the logprob signals, if the policy asks for them."""
    if policy.confidence.source != "logprob":
        return Evidence()
    found = signals(exchange)
    return Evidence(signals=found.values, signals_absent=found.absent)


def next_step(
    policy: Policy,
    evidence: Evidence,
    exchange: Exchange,
    calibrator: Calibrator | None,
    draw: float,
    suspended: str | None = None,
) -> RunStage | Settle:
    """The next stage whose condition holds, or that the outcome is settled.

    Stages run in the policy's order. Skipped, and recorded with the reason, are the stages after a
    check that demands block, as no action is more severe; a stage of nothing but judges none of
    which can change the action or the confidence any more; and one this exchange is not sampled
    for. A condition that cannot be decided holds.

    `draw` in [0, 1) is the random number that `decide` takes. Each stage makes its own of it, so
    that stages and audit are sampled independently of each other, and again in the same way.
    `suspended` is as for `estimate`.
    """
    known = estimate(
        policy,
        evidence,
        model=exchange.model,
        calibrator=calibrator,
        task=exchange.task,
        suspended=suspended,
    )
    variables = Variables(
        exchange, results=evidence.results, score=known.score, confidence=known.confidence
    )
    risk = assess(policy, variables)
    pending = policy.stages[len(evidence.ran) + len(evidence.skipped) :]
    if not pending:
        return Settle(evidence, risk, known)
    variables = replace(variables, risk=risk.tier.rank)
    veto = settled_by(policy.stages, evidence.results)
    for stage in pending:
        applies, reason = stage_applies(policy, stage, variables)
        needless = _needless(policy, stage, evidence, calibrator, draw) if applies else None
        if veto is not None:
            needless = f"check {veto} demands block"
        if needless is not None:
            applies, reason = False, Reason(f"stage:{stage.name}", f"skipped: {needless}")
        remarks = () if reason is None else (reason,)
        if not applies:
            evidence = replace(evidence, skipped=(*evidence.skipped, *remarks))
        elif remarks:
            return RunStage(stage, replace(evidence, notes=(*evidence.notes, *remarks)))
        else:
            return RunStage(stage, evidence)
    return Settle(evidence, risk, known)


def run_validators(
    validators: Iterable[Validator], exchange: Exchange, monotonic_ms: Callable[[], float]
) -> dict[str, CheckResult]:
    """The result of every validator, by check id in order, each with its latency.

    One that raises, and one whose result makes no sense, gives an ERROR: never a pass, and never
    the end of the request. `monotonic_ms` is a clock in milliseconds that does not go back.
    """
    results: dict[str, CheckResult] = {}
    for check in validators:
        began_ms = monotonic_ms()
        try:
            result = vetted(check.run(exchange))
        except Exception as error:  # noqa: BLE001  a check that breaks is evidence like any other
            result = CheckResult(check.id, Outcome.ERROR, error=_where(error), cause=Cause.RAISED)
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


def _needless(
    policy: Policy,
    stage: Stage,
    evidence: Evidence,
    calibrator: Calibrator | None,
    draw: float,
) -> str | None:
    """Why a stage that applies is not run for this exchange, or None."""
    if stage.sample < 1.0 and _own_draw(draw, stage) >= stage.sample:
        return f"not sampled ({stage.sample:g})"
    if len(stage.judges) < len(stage.checks):
        return None
    asked, check = _demanded(policy, evidence)
    for judge in stage.judges:
        feeds = (
            judge.on_fail is OnFail.SCORE
            or policy.confidence.source == "judge"
            or (calibrator is not None and judge.id in calibrator.judges)
        )
        again = judge.on_fail is OnFail.REGENERATE
        if feeds or again or judge.id in policy.referred:
            return None
        if _worst(policy, stage, judge).severity > asked.severity:
            return None
    return f"check {check} demands {asked}, and no judge here can ask for more"


def _own_draw(draw: float, stage: Stage) -> float:
    digest = sha256(f"{draw!r} {stage.name}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def _demanded(policy: Policy, evidence: Evidence) -> tuple[Action, str]:
    """The least that the results so far come to at any tier, and the check that asks for it."""
    demands = [
        (demand(stage, check, result, policy.risk.base) or Action.RETURN, check.id)
        for stage in policy.stages
        for check in stage.checks
        if (result := evidence.results.get(check.id)) is not None
    ]
    return max(demands, key=lambda each: each[0].severity, default=(Action.RETURN, ""))


def _worst(policy: Policy, stage: Stage, judge: Judge) -> Action:
    """The most severe action a judge can ask for."""
    on_error = judge.on_error or default_on_error(reachable_tiers(policy)[-1])
    demands = [FAIL_ACTION[judge.on_fail], Action(on_error)]
    if stage.budget is not None and stage.budget.when_used_up is not None:
        demands.append(Action(stage.budget.when_used_up))
    return most_severe(demands)


def _cancelled(judge: Judge, veto: str) -> CheckResult:
    error = f"check {veto} demands block"
    return CheckResult(judge.id, Outcome.ERROR, error=error, cause=Cause.CANCELLED)


def _where(error: Exception) -> str:
    # Not the message: it may quote the response.
    name = type(error).__name__
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return (
        f"{name} in {trace.tb_frame.f_code.co_qualname}, line {trace.tb_lineno}" if trace else name
    )
