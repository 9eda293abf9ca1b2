"""The judges of a stage: asked side by side, within a time and a budget, and no longer than their answer matters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import isnan

from msgspec.structs import replace

from gateway.calls import Call
from gateway.interviews import Interviewer, Terms, begin
from gateway.ports import Clock
from gateway.records import Effort, Spend
from gateway.spending import Purse, Spending
from gateway.telemetry import Metrics
from gateway.verdicts import Verdicts
from judges import Judge
from policies import Policy, Stage
from validators import Cause, CheckResult, Exchange, Outcome

Results = Mapping[str, CheckResult]


@dataclass(slots=True)
class Bill:
    """What the judges of one answer took so far: time, money as far as it is known, and from which accounts."""

    judge_ms: float = 0.0
    is_known: bool = True
    spends: list[Spend] = field(default_factory=list)

    def effort(self, rules_ms: float) -> Effort:
        """The same as it is recorded, with the time that validators took."""
        if not self.spends:
            return Effort(rules_ms)
        usd = sum(spend.usd for spend in self.spends)
        return Effort(rules_ms, self.judge_ms, usd if self.is_known else None, tuple(self.spends))


class Jury:
    """Hears the judges of stages; `timeout_s` is how long they have where a stage names no latency."""

    def __init__(
        self,
        interviewer: Interviewer,
        verdicts: Verdicts,
        spending: Spending,
        clock: Clock,
        metrics: Metrics,
        *,
        timeout_s: float,
    ) -> None:
        self._interviewer = interviewer
        self._verdicts = verdicts
        self._spending = spending
        self._clock = clock
        self._metrics = metrics
        self._timeout_s = timeout_s

    async def hear(
        self,
        call: Call,
        policy: Policy,
        stage: Stage,
        exchange: Exchange,
        *,
        bill: Bill,
        is_settled: Callable[[Results], bool],
    ) -> Results:
        """The result of every judge of the stage, by check id in order.

        As soon as the results so far settle the outcome, the judges still at work are stopped; they give an ERROR whose cause
        is `cancelled`. If the caller is cancelled, so are they. Either way what they cost is put on the bill.
        """
        began_s = self._clock.monotonic_s()
        day, account = self._spending.account(policy.policy, stage.name)
        limit_usd = stage.budget.usd_per_day if stage.budget else None
        purses = {judge.id: Purse(account, limit_usd) for judge in stage.judges}
        deadline_s, is_fair = self._deadline_s(call, stage, began_s)
        results: dict[str, CheckResult] = {}
        hearing: dict[str, asyncio.Task[None]] = {}

        async def hear_one(judge: Judge) -> None:
            terms = Terms(purses[judge.id], deadline_s, is_fair)
            results[judge.id] = await self._result(judge, exchange, terms)
            if is_settled(results):
                for check_id in hearing.keys() - results.keys():
                    hearing[check_id].cancel()

        try:
            async with asyncio.TaskGroup() as group:
                for judge in stage.judges:
                    hearing[judge.id] = group.create_task(hear_one(judge))
        finally:
            for judge in stage.judges:
                if judge.id not in results:
                    results[judge.id] = self._stopped(judge, purses[judge.id])
            bill.judge_ms += 1000 * (self._clock.monotonic_s() - began_s)
            bill.is_known = bill.is_known and not any(isnan(p.cost_usd) for p in purses.values())
            spent_usd = sum(purse.spent_usd for purse in purses.values())
            bill.spends.append(Spend(day, policy.policy, stage.name, spent_usd))
        return {judge.id: results[judge.id] for judge in stage.judges}

    def abandon(self, bill: Bill) -> None:
        """Have the bill recorded although no decision will carry it."""
        self._spending.abandon(bill.spends)

    def _deadline_s(self, call: Call, stage: Stage, now_s: float) -> tuple[float, bool]:
        """When the judges have to be done, on the event loop's clock, and whether that is what the policy gives them."""
        latency_s = stage.budget.latency if stage.budget else None
        ours_s = latency_s or self._timeout_s
        theirs_s = call.patience.until_s(call.received_s, streamed=call.streamed) - now_s
        return asyncio.get_running_loop().time() + min(ours_s, theirs_s), ours_s <= theirs_s

    async def _result(self, judge: Judge, exchange: Exchange, terms: Terms) -> CheckResult:
        interview = begin(judge, exchange)
        ask = partial(self._interviewer.answer, interview, terms)
        try:
            key = interview.key
            if key is None:
                result = await ask()
            else:
                result = await self._verdicts.verdict(key, ask, deadline_s=terms.deadline_s)
        except TimeoutError:
            message = "the same question was under way for too long"
            result = self._unable(judge, Cause.TIMEOUT, message)
        except Exception as error:  # noqa: BLE001 - a judge that breaks is evidence like any other
            result = self._unable(judge, Cause.RAISED, f"{type(error).__name__} in the judge")
        source = "cached" if result.cached else "asked"
        self._metrics.verdicts.labels(judge.id, result.outcome.value, source).inc()
        return replace(result, check=judge.id)

    def _unable(self, judge: Judge, cause: Cause, message: str) -> CheckResult:
        result = CheckResult(judge.id, Outcome.ERROR, error=message, cause=cause)
        self._metrics.count_judge_failure(judge, result)
        return result

    def _stopped(self, judge: Judge, purse: Purse) -> CheckResult:
        result = CheckResult(
            judge.id,
            Outcome.ERROR,
            error="stopped: its answer no longer mattered",
            cost_usd=purse.cost_usd,
            cause=Cause.CANCELLED,
        )
        self._metrics.count_judge_failure(judge, result)
        return result
