"""Stages with judges: who is asked, when they are stopped, what is charged; and that nobody else pays for it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gateway.calls import Call
from gateway.judging import Judgement
from gateway.jury import Bill, Jury
from gateway.local_bus import InProcessBus
from gateway.settings import ModelEntry
from gateway.spending import Spending
from gateway.store import SqlStore
from gateway.verdicts import Verdicts
from policies import Policy, Stage, StreamMode
from policies.model import Budget
from tests.fakes import Says
from tests.gateway.court import DOLLARS, EXCHANGE, Court, Models, Toy, says
from tests.gateway.rig import RETURNS, STREAMED, Rig, a_call, chat
from tests.gateway.rig import says as answers
from tests.policies.build import policy, stage
from validators import Cause, CheckResult, OnFail, Outcome

YES, NO = says("yes"), says("no")
PATIENCE = {"x-stainless-read-timeout": "0.08"}


def hanging() -> Says:
    return Says(b"", gate=asyncio.Event())


class Bench:
    """A jury before scripted providers."""

    def __init__(self, store: SqlStore, models: Models, *, timeout_s: float = 5) -> None:
        self.court = court = Court(models)
        self.spending = Spending(store, court.clock)
        verdicts = Verdicts(InProcessBus(), court.clock, limit_bytes=10_000, keep_s=60)
        self.jury = Jury(
            court.interviewer,
            verdicts,
            self.spending,
            court.clock,
            court.metrics,
            timeout_s=timeout_s,
        )
        self.bill = Bill()

    async def hear(
        self, hearing: Stage, call: Call | None = None, settled_by: Outcome | None = None
    ) -> dict[str, CheckResult]:
        """The results of a stage; one of `settled_by` settles the matter."""

        def is_settled(results: Any) -> bool:
            return any(result.outcome is settled_by for result in results.values())

        found = await self.jury.hear(
            call or a_call(),
            policy(hearing),
            hearing,
            EXCHANGE,
            bill=self.bill,
            is_settled=is_settled,
        )
        return dict(found)


def toys(*models: str) -> list[Toy]:
    return [Toy(id=f"toy_{number}", asks=(model,)) for number, model in enumerate(models)]


async def test_the_judges_of_a_stage_are_asked_together_and_told_apart(
    sqlite_store: SqlStore,
) -> None:
    models = Models(m_1=[YES], m_2=[NO], m_3=[says("perhaps")])
    bench = Bench(sqlite_store, models)
    results = await bench.hear(stage(*toys("m-1", "m-2", "m-3"), name="judge"))
    assert list(results) == ["toy_0", "toy_1", "toy_2"]
    outcomes = [result.outcome for result in results.values()]
    assert outcomes == [Outcome.PASS, Outcome.FAIL, Outcome.ERROR]
    assert models.most == 3
    (spend,) = bench.bill.spends
    assert (spend.policy, spend.stage, spend.usd) == ("test", "judge", 9.0)
    assert bench.bill.effort(1.0).judge_usd == 9.0


async def test_a_judge_whose_question_cannot_be_written_is_an_error_and_the_others_are_heard(
    sqlite_store: SqlStore,
) -> None:
    bench = Bench(sqlite_store, Models(m_1=[YES], m_2=[YES]))
    unwritable = Toy(id="toy_2", asks=("m-2",), parameters={"seed": 2**70})
    results = await bench.hear(stage(*toys("m-1"), unwritable, name="judge"))
    assert results["toy_0"].outcome is Outcome.PASS
    assert (results["toy_2"].outcome, results["toy_2"].cause) == (Outcome.ERROR, Cause.RAISED)
    assert b'cause="raised",judge="toy_2",model="m-2"} 1.0' in bench.court.metrics.render()


async def test_the_others_are_stopped_as_soon_as_the_matter_is_settled(
    sqlite_store: SqlStore,
) -> None:
    models = Models(m_1=[NO], m_2=[hanging()], m_3=[hanging()])
    bench = Bench(sqlite_store, models)
    async with asyncio.timeout(2):
        results = await bench.hear(stage(*toys("m-2", "m-1", "m-3")), settled_by=Outcome.FAIL)
    assert [result.cause for result in results.values()] == [Cause.CANCELLED, None, Cause.CANCELLED]
    assert models.stopped == 2
    assert bench.bill.spends[0].usd > 3
    assert (
        'cause="cancelled",judge="toy_0",model="m-2"} 1.0' in bench.court.metrics.render().decode()
    )


@pytest.mark.parametrize(
    ("budget", "headers", "request_", "took_s"),
    [
        (Budget.model_construct(latency=0.05), {}, {}, 0.05),
        (None, PATIENCE, {}, 0.06),
        (Budget.model_construct(latency=0.02), PATIENCE, {}, 0.02),
        (None, {}, {}, 0.3),
        (None, PATIENCE, STREAMED, 0.3),
    ],
    ids=["the stage's", "the client's", "the shorter", "the default", "streams have time"],
)
async def test_judges_have_until_the_earliest_deadline(
    sqlite_store: SqlStore, budget: Any, headers: Any, request_: Any, took_s: float
) -> None:
    timeout_s = 0.3 if took_s == 0.3 else 60.0
    bench = Bench(sqlite_store, Models(m_1=[hanging()]), timeout_s=timeout_s)
    call = a_call(request_, headers, now=bench.court.clock)
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    results = await bench.hear(stage(*toys("m-1"), budget=budget), call)
    assert results["toy_0"].cause is Cause.TIMEOUT
    assert took_s <= loop.time() - began_s < 20


async def test_what_a_client_that_leaves_has_cost_is_on_the_bill(sqlite_store: SqlStore) -> None:
    models = Models(m_1=[YES], m_2=[hanging()])
    bench = Bench(sqlite_store, models)
    hearing = asyncio.create_task(bench.hear(stage(*toys("m-1", "m-2"), name="judge")))
    for _ in range(2):
        await models.asked.acquire()
    await asyncio.sleep(0.01)
    hearing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hearing
    assert models.stopped == 1
    bench.jury.abandon(bench.bill)
    await bench.spending.refresh()
    spent = await sqlite_store.spent(bench.court.clock.now().date())
    assert spent[("test", "judge")] == bench.bill.spends[0].usd > 3


async def test_a_price_that_is_not_known_makes_the_bill_unknown(sqlite_store: SqlStore) -> None:
    bench = Bench(sqlite_store, Models(m_1=[YES], free=[YES]))
    await bench.hear(stage(*toys("m-1", "free")))
    effort = bench.bill.effort(0.0)
    assert (effort.judge_usd, effort.spends[0].usd) == (None, 3.0)


# ------------------------------------------------------------------------------------------------- the whole pipeline


def judged(*checks: Toy, **more: Any) -> Policy:
    return policy(stage(*checks, name="judge"), confidence={"source": "none"}, **more)


async def test_a_policy_without_judges_takes_no_turn_of_the_event_loop(
    sqlite_store: SqlStore,
) -> None:
    """Judging such an answer ends before anything else could run."""
    rig = Rig(sqlite_store, answers("fine"))
    call = a_call()
    answer = await rig.asker.ask(call, rig.asker.question(call, RETURNS), StreamMode.BUFFER)
    judging = rig.assessor.judge(call, RETURNS, answer, 0)
    with pytest.raises(StopIteration) as ended:
        judging.send(None)
    assert isinstance(ended.value.value, Judgement)
    assert ended.value.value.effort.judge_ms is None


async def test_a_judged_answer_is_recorded_with_what_it_took(sqlite_store: SqlStore) -> None:
    verdict = chat("yes", usage={"prompt_tokens": 2, "completion_tokens": 1})
    entries = [ModelEntry(match="*", price=DOLLARS)]
    rig = Rig(sqlite_store, answers("fine"), Says(verdict), entries=entries)
    call = a_call()
    await rig.reply(call, judged(Toy(id="toy")))
    record = await rig.record(call)
    assert (record.effort.judge_usd, record.effort.judge_ms) == (3.0, 0.0)
    assert await sqlite_store.spent(rig.clock.now().date()) == {("test", "judge"): 3.0}
    metrics = rig.metrics.render().decode()
    assert 'holdgate_layer_usd_total{layer="judge"} 3.0' in metrics
    assert 'holdgate_layer_requests_total{layer="judge"} 1.0' in metrics


async def test_what_an_answer_asked_for_again_has_cost_is_not_lost(sqlite_store: SqlStore) -> None:
    def verdict(text: str) -> Says:
        return Says(chat(text, usage={"prompt_tokens": 2, "completion_tokens": 1}))

    entries = [ModelEntry(match="*", price=DOLLARS)]
    rig = Rig(
        sqlite_store,
        answers("bad"),
        verdict("no"),
        answers("good"),
        verdict("yes"),
        entries=entries,
    )
    toy = Toy(id="toy", on_fail=OnFail.REGENERATE)
    await rig.reply(a_call(), judged(toy, regenerate={"attempts": 1}))
    await rig.spending.refresh()
    assert await sqlite_store.spent(rig.clock.now().date()) == {("test", "judge"): 6.0}
    found = await sqlite_store.economics(rig.clock.now())
    assert (found.layers[1].usd, found.abandoned_usd) == (3.0, 3.0)
