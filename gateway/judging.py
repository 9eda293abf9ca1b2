"""Judging an answer: the cascade, the risk and the confidence at work on one call."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import msgspec
from msgspec.structs import replace

from gateway.asking import Answer
from gateway.audits import Audits
from gateway.calls import Call
from gateway.jury import Bill, Jury
from gateway.ports import Clock, LivePolicies
from gateway.records import Effort
from policies import (
    Action,
    Decision,
    Evidence,
    Policy,
    Reason,
    RunStage,
    Variables,
    Zone,
    assess,
    decide,
    field_signals,
    next_step,
    run_validators,
    start,
)
from validators import CheckResult, Choice, Exchange

_REVIEWED = frozenset({Action.FLAG, Action.HOLD})


class Judgement(msgspec.Struct, frozen=True):
    """The decision on one answer, the evidence for it, and what it took."""

    decision: Decision
    evidence: Evidence
    effort: Effort = msgspec.field(default_factory=Effort)


class Assessor:
    """Gives every answer its decision."""

    def __init__(self, policies: LivePolicies, jury: Jury, audits: Audits, clock: Clock) -> None:
        self._policies = policies
        self._jury = jury
        self._audits = audits
        self._clock = clock

    async def judge(
        self, call: Call, policy: Policy, answer: Answer, attempts_left: int
    ) -> Judgement:
        """Run the cascade over an answer and decide; without judges that is done before anything else runs.

        If the caller is cancelled, because its client has left, the judges under way are stopped. What they cost counts.
        """
        exchange = _exchange(call, answer)
        calibrator = self._policies.calibrators.get(policy.confidence.calibrator or "")
        draw = self._audits.draw(call.id)
        suspended = self._audits.suspended(policy.policy, calibrator)
        evidence = start(policy, exchange)
        rules_ms, bill = 0.0, Bill()
        while isinstance(
            step := next_step(policy, evidence, exchange, calibrator, draw, suspended), RunStage
        ):
            began_ms = self._monotonic_ms()
            results = run_validators(step.stage.validators, exchange, self._monotonic_ms)
            rules_ms += self._monotonic_ms() - began_ms
            if step.stage.judges and not step.settled_by(results):
                results |= await self._heard(call, policy, step, exchange, results, bill)
            evidence = step.done(results)
        decision = decide(
            policy,
            step.evidence,
            risk=step.risk,
            estimate=step.estimate,
            draw=draw,
            attempts_left=attempts_left,
            level=self._audits.level(policy.policy),
            spread=calibrator.spread if calibrator and not suspended else None,
        )
        if decision.regenerate:
            self._jury.abandon(bill)
        evidence = step.evidence
        if decision.audit or decision.action in _REVIEWED:
            evidence = replace(evidence, fields=field_signals(exchange))
        return Judgement(decision, evidence, bill.effort(rules_ms))

    async def _heard(
        self,
        call: Call,
        policy: Policy,
        step: RunStage,
        exchange: Exchange,
        rules: Mapping[str, CheckResult],
        bill: Bill,
    ) -> Mapping[str, CheckResult]:
        """The results of the judges of a stage, given those of its validators."""
        try:
            return await self._jury.hear(
                call,
                policy,
                step.stage,
                exchange,
                bill=bill,
                is_settled=lambda heard: step.settled_by({**rules, **heard}) is not None,
            )
        except asyncio.CancelledError:
            self._jury.abandon(bill)
            raise

    def unanswered(self, call: Call, policy: Policy, action: Action, note: str) -> Judgement:
        """The judgement on a call that gave no response to check."""
        risk = assess(policy, Variables(_exchange(call, None)))
        decision = Decision(
            action=action,
            intended=action,
            zone=Zone.AUTO if action is Action.RETURN else Zone.ESCALATE,
            risk=risk.tier,
            band=None,
            score=None,
            confidence=None,
            confidence_source="none",
            calibrator=None,
            audit=False,
            inclusion=0.0,
            regenerate=False,
            redactions=(),
            reasons=(*risk.reasons, Reason("upstream", note, action)),
        )
        return Judgement(decision, Evidence())

    def _monotonic_ms(self) -> float:
        return 1000 * self._clock.monotonic_s()


def _exchange(call: Call, answer: Answer | None) -> Exchange:
    reading = answer.reading if answer else None
    choices: tuple[Choice, ...] = reading.choices if reading else ()
    model = (reading.model if reading else "") or call.facts.model
    return Exchange(
        call.endpoint, call.request, choices, model, call.facts.task, call.facts.context
    )


def stopped(judgement: Judgement, why: str) -> Judgement:
    """The judgement on a stream that a check has stopped: a block, whatever the part that came would have led to."""
    decision = judgement.decision
    blocked = replace(
        decision,
        action=Action.BLOCK,
        intended=Action.BLOCK,
        zone=Zone.ESCALATE,
        audit=False,
        inclusion=0.0,
        reasons=(*decision.reasons, Reason("stream", why, Action.BLOCK)),
    )
    return replace(judgement, decision=blocked)
