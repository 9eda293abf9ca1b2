"""What the layers did and cost, by either engine: the same numbers as counting by hand, from indexes alone."""

from __future__ import annotations

import asyncio
from functools import partial
from math import ceil
from typing import Any

import pytest
from sqlalchemy import text

from gateway import economics as shown
from gateway.records import Economics, Effort, Layer, Spend, TaskKind
from gateway.store import SqlStore, economics
from gateway.store.engines import Engine
from tests.gateway.stores import NOW, a_decision, a_resolution, a_task, later, put
from tests.gateway.test_store_schema import plans, populate


def nearest_rank(values: list[float], share: float) -> float:
    return sorted(values)[ceil(share * len(values)) - 1]


async def test_layers_are_counted_as_by_hand(store: SqlStore) -> None:
    rules_ms = [float(7 * number % 41) for number in range(40)]
    judge_ms = [float(13 * number % 100) for number in range(15)]
    for number, ms in enumerate(rules_ms):
        effort = Effort(ms)
        if number < len(judge_ms):
            usd = 0.5 if number % 5 else None
            effort = Effort(ms, judge_ms[number], usd)
        await store.record(a_decision(created_at=later(number), effort=effort))
    await store.record(a_decision(created_at=later(-1), effort=Effort(9999.0, 9999.0, 9999.0)))
    found = await store.economics(NOW)
    assert found.decisions == 40
    assert found.layers[0] == Layer(
        "rules", 40, 0.0, 0, nearest_rank(rules_ms, 0.5), nearest_rank(rules_ms, 0.95)
    )
    assert found.layers[1] == Layer(
        "judge", 15, 6.0, 3, nearest_rank(judge_ms, 0.5), nearest_rank(judge_ms, 0.95)
    )


async def test_people_are_paid_from_claim_to_resolution_and_no_longer_than_their_claim(
    store: SqlStore,
) -> None:
    tasks = [a_task(kind=TaskKind.FLAG, due_at=None) for _ in range(5)]
    for task in tasks:
        await put(store, task)
    claimed, lapsed, unclaimed, others, renewed = (task.id for task in tasks)
    await store.claim(claimed, "ann", later(10), 300)
    await store.resolve(a_resolution(claimed, 2, at=later(70)))
    await store.claim(lapsed, "ann", later(10), 30)
    await store.resolve(a_resolution(lapsed, 2, at=later(1000)))
    await store.resolve(a_resolution(unclaimed, 1, at=later(5)))
    await store.claim(others, "bob", later(10), 30)
    await store.resolve(a_resolution(others, 2, at=later(100)))
    await store.claim(renewed, "ann", later(10), 30)
    await store.claim(renewed, "ann", later(30), 300)
    resolved = await store.resolve(a_resolution(renewed, 3, at=later(100)))
    assert resolved.worked_s == 90
    found = await store.economics(NOW)
    assert found.person_minutes == (60 + 30 + 90) / 60
    person = found.layers[2]
    assert (person.requests, person.unknown) == (5, 2)
    assert (person.latency_p50_ms, person.latency_p95_ms) == (100_000, 1_000_000)
    assert (await store.economics(later(71))).layers[2].requests == 3


async def test_a_claim_given_back_and_an_expired_task_cost_nothing(store: SqlStore) -> None:
    released, expired = a_task(), a_task(due_at=later(60))
    for task in (released, expired):
        await put(store, task)
    await store.claim(released.id, "ann", later(1), 300)
    await store.release(released.id, "ann", later(50))
    await store.resolve(a_resolution(released.id, 3, at=later(70)))
    await store.claim(expired.id, "ann", later(1), 300)
    assert len(await store.expire_due(later(61), 10)) == 1
    found = await store.economics(NOW)
    assert (found.layers[2].requests, found.layers[2].unknown) == (1, 1)
    assert found.person_minutes == 0


async def test_accounts_grow_by_what_many_spend_at_once(store: SqlStore) -> None:
    day = NOW.date()

    async def one(number: int) -> None:
        spends = (Spend(day, "p", f"s{number % 3}", 0.5), Spend(day, "p", "s1", 0.25))
        if number % 2:
            await store.spend(spends)
        else:
            await store.record(a_decision(effort=Effort(1.0, 1.0, 0.75, spends)))

    await asyncio.gather(*(one(number) for number in range(60)))
    spent = await store.spent(day)
    assert spent == {("p", "s0"): 10.0, ("p", "s1"): 25.0, ("p", "s2"): 10.0}
    assert (await store.economics(NOW)).abandoned_usd == 22.5
    assert await store.spent(later(86400).date()) == {}


async def test_the_economics_of_nothing_are_nothing(store: SqlStore) -> None:
    nothing = [Layer(name, 0, 0.0, 0, None, None) for name in ("rules", "judge", "person")]
    found = await store.economics(NOW)
    assert found == Economics(0, tuple(nothing), 0.0, 0.0)
    assert {row.share for row in shown.rows(found, 1.0)} == {None}


async def test_the_economics_read_no_decision_and_no_task(store: SqlStore, engine: Engine) -> None:
    await populate(store)
    await engine.write(lambda connection: connection.execute(text("ANALYZE")))
    plan = await plans(engine, partial(economics.since, at=later(2990)))
    plan += "\n" + await plans(engine, partial(economics.tallies, at=later(2990)))
    if type(engine).__name__ == "SqliteEngine":
        lines = [line for line in plan.splitlines() if "decisions" in line or "tasks" in line]
        assert lines
        assert all("COVERING INDEX ix_" in line for line in lines), plan
    else:
        assert "Seq Scan on decisions" not in plan
        assert "ix_decisions_economics" in plan


@pytest.mark.parametrize(
    ("since", "at"),
    [
        ("90m", later(-5400)),
        ("7d", later(-7 * 86400)),
        ("2030-01-02T03:04:05.678901Z", NOW),
        ("2030-01-02T04:04:05.678901+01:00", NOW),
    ],
)
def test_since_is_a_duration_or_a_time(since: str, at: Any) -> None:
    assert shown.moment_of(since, NOW) == at


def test_a_day_begins_in_utc() -> None:
    assert shown.moment_of("2030-01-02", NOW).isoformat() == "2030-01-02T00:00:00+00:00"


@pytest.mark.parametrize("since", ["", "yesterday", "7", "99999999999d", "1h30"])
def test_another_since_is_refused_with_examples(since: str) -> None:
    with pytest.raises(ValueError, match="neither a duration, such as 90m"):
        shown.moment_of(since, NOW)
