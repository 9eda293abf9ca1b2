"""What `gateway.ports.Store` promises of second opinions; SQLite and PostgreSQL alike."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import Connection, text

from gateway.errors import Conflict
from gateway.records import (
    Asked,
    LabelledDecision,
    LabelSource,
    NewLabel,
    TaskKind,
    TaskState,
    Verdict,
)
from gateway.store import SqlStore, open_store
from gateway.store.engines import Engine
from gateway.store.schema import audit_entries, outbox
from policies import Action, RiskTier
from tests.gateway.stores import a_resolution, a_task, engine_of, later, put, rows


async def judged(store: SqlStore, verdict: Verdict = Verdict.REJECT, **decision: object) -> str:
    """The id of an audited decision that ann has judged."""
    kept = {"response": b"{}", "action": Action.RETURN, "intended": Action.RETURN, **decision}
    made, task_id = await put(
        store, a_task(kind=TaskKind.AUDIT, inclusion=0.3, due_at=None), **kept
    )
    await store.resolve(a_resolution(task_id, verdict=verdict))
    return made.id


async def label_of(store: SqlStore, decision_id: str) -> LabelledDecision:
    (found,) = [each for each in await store.labelled("", 100) if each.decision.id == decision_id]
    return found


async def test_a_second_opinion_is_a_task_of_its_own_for_somebody_else(
    store: SqlStore, engine: Engine
) -> None:
    decision = await judged(store, confidence=0.99)
    first = await store.task_of(decision)
    assert await store.ask_again({decision: "hgt_again"}, later(100)) == Asked(opened=1)
    assert await store.task_of(decision) == first
    assert await store.tasks_of([decision]) == {decision: first}
    (task,) = await store.queue(later(100), 20, "bob")
    assert (task.id, task.kind, task.state) == (
        "hgt_again",
        TaskKind.SECOND_OPINION,
        TaskState.OPEN,
    )
    assert (task.decision_id, task.inclusion, task.risk) == (decision, 0.3, RiskTier.HIGH)
    assert (task.created_at, task.due_at, task.verdict) == (later(100), None, None)
    assert await store.queue(later(100), 20, "ann") == []
    with pytest.raises(Conflict, match="you have judged this response before"):
        await store.claim(task.id, "ann", later(101), 300)
    with pytest.raises(Conflict, match="you have judged this response before"):
        await store.resolve(a_resolution(task.id))
    await store.claim(task.id, "bob", later(101), 300)
    done = await store.resolve(a_resolution(task.id, 2, reviewer="bob", at=later(102), blind=True))
    assert (done.state, done.verdict) == (TaskState.RESOLVED, Verdict.APPROVE)
    _, label = await store.labels_after("refunds", 0, 10)
    assert (label.source, label.labeller) == (LabelSource.SECOND_OPINION, "bob")
    assert (label.inclusion, label.blind, label.acceptable) == (0.3, True, True)
    told = [row["subject"] for row in await rows(engine, outbox) if row["kind"] == "task.opened"]
    assert told[-1] == "hgt_again"
    kinds = [row["kind"] for row in await rows(engine, audit_entries)]
    assert kinds[-2:] == ["opinion.asked", "task.resolved"]


async def test_where_two_differ_a_third_settles_it_and_until_then_it_is_an_error(
    store: SqlStore,
) -> None:
    decision = await judged(store)
    assert (await label_of(store, decision)).settled is False
    said = []
    for number, who in enumerate(("bob", "cat")):
        await store.ask_again({decision: f"hgt_{number}"}, later(100))
        await store.resolve(a_resolution(f"hgt_{number}", reviewer=who, at=later(110 + number)))
        found = await label_of(store, decision)
        said.append((found.acceptable, found.settled, found.weight, found.inclusion))
    assert said == [(False, False, 1.0, 0.3), (True, True, 1.0, 0.3)]


async def test_one_who_agrees_settles_it(store: SqlStore) -> None:
    decision = await judged(store)
    await store.ask_again({decision: "hgt_again"}, later(100))
    verdict = Verdict.REJECT
    await store.resolve(a_resolution("hgt_again", reviewer="bob", verdict=verdict))
    found = await label_of(store, decision)
    assert (found.acceptable, found.settled, found.labels) == (False, True, 2)


async def test_of_any_number_who_ask_one_task_is_opened(store: SqlStore) -> None:
    decisions = [await judged(store) for _ in range(3)]
    asked = await asyncio.gather(
        *(
            store.ask_again({each: f"hgt_{each}_{n}" for each in decisions}, later(100))
            for n in range(4)
        )
    )
    assert sum(each.opened for each in asked) == 3
    assert all(each.opened + each.waiting == 3 for each in asked)
    assert len(await store.queue(later(100), 20, "bob")) == 3
    assert await store.ask_again({decisions[0]: "hgt_x"}, later(101)) == Asked(waiting=1)


async def test_what_cannot_be_looked_at_or_was_drawn_by_nobody_is_not_asked_about(
    store: SqlStore,
) -> None:
    erased = await judged(store, response=None)
    made, _ = await put(store, a_task(), response=b"{}")
    feedback = NewLabel(made.id, later(9), LabelSource.IMPORT, "file", acceptable=False)
    await store.label([feedback])
    asked = {erased: "hgt_a", made.id: "hgt_b", "hgd_no": "hgt_c"}
    assert await store.ask_again(asked, later(100)) == Asked()


async def test_what_applications_say_changes_nothing_where_a_reviewer_has_spoken(
    store: SqlStore,
) -> None:
    decision = await judged(store)
    given = [
        NewLabel(decision, later(70), LabelSource.FEEDBACK, f"app-{n}", acceptable=True, weight=0.5)
        for n in range(5)
    ]
    await store.label(given)
    found = await label_of(store, decision)
    assert (found.acceptable, found.weight, found.labels, found.settled) == (False, 1.0, 6, False)


async def test_samples_are_told_of_in_steps_from_where_the_last_ones_ended(store: SqlStore) -> None:
    for _ in range(5):
        await judged(store)
    again = await judged(store)
    await judged(store, Verdict.APPROVE)
    assert [await store.announce_samples(2, later(n)) for n in range(4)] == [True] * 3 + [False]
    await store.ask_again({again: "hgt_again"}, later(100))
    await store.resolve(a_resolution("hgt_again", reviewer="bob", verdict=Verdict.REJECT))
    assert not await store.announce_samples(1, later(200))


_DOWN = (
    "DROP INDEX ix_tasks_decision",
    "ALTER TABLE tasks DROP COLUMN round",
    "DELETE FROM marks WHERE name LIKE 'labels.counted%'",
    "UPDATE alembic_version SET version_num = '0004'",
)


async def test_an_existing_database_goes_on_where_it_was(store_url: str) -> None:
    old = await open_store(store_url)
    decisions = [await judged(old) for _ in range(5)]
    await old.ask_again({}, later(1))
    await old.close()
    engine = engine_of(store_url)

    def to_0004(connection: Connection) -> None:
        for statement in _DOWN:
            connection.execute(text(statement))
        connection.execute(text("UPDATE marks SET value = 3 WHERE name = 'labels.ready'"))
        # As it was: one task for each decision, and no more.
        if connection.dialect.name == "sqlite":
            connection.execute(text("CREATE UNIQUE INDEX once ON tasks (decision_id)"))
        else:
            once = "ALTER TABLE tasks ADD CONSTRAINT tasks_decision_id_key UNIQUE (decision_id)"
            connection.execute(text(once))

    await engine.write(to_0004)
    await engine.close()
    new = await open_store(store_url)
    try:
        for each in decisions:
            task = await new.task_of(each)
            assert task is not None
            assert (task.verdict, task.reviewer) == (Verdict.REJECT, "ann")
        assert await new.ask_again({decisions[0]: "hgt_again"}, later(100)) == Asked(opened=1)
        # Three samples were told of before: two are new, not five.
        assert [await new.announce_samples(2, later(n)) for n in range(2)] == [True, False]
    finally:
        await new.close()
