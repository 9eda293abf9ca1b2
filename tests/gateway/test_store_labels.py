"""What `gateway.ports.Store` promises of labels, standings and alarms; SQLite and PostgreSQL alike."""

from __future__ import annotations

import asyncio
import sqlite3
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest
from msgspec.structs import replace
from sqlalchemy import Connection, text

from gateway.errors import NotFound
from gateway.records import (
    Alarm,
    LabelledDecision,
    LabelSource,
    NewLabel,
    Observed,
    Standing,
    Tally,
    TaskKind,
    Verdict,
)
from gateway.store import SqlStore, decisions, open_store
from gateway.store.engines import Engine
from gateway.store.schema import audit_entries, labels, outbox
from policies import Action, RiskTier
from tests.gateway.stores import NOW, a_decision, a_resolution, a_task, engine_of, later, put, rows
from tests.gateway.test_store_schema import plans, populate


def a_label(decision_id: str, **changes: Any) -> NewLabel:
    """A thumb up from an application."""
    given = NewLabel(decision_id, later(90), LabelSource.FEEDBACK, "app", acceptable=True)
    return replace(given, **changes)


async def an_answer(store: SqlStore, **changes: Any) -> str:
    """The id of a returned response."""
    decision = a_decision(action=Action.RETURN, intended=Action.RETURN, **changes)
    await store.record(decision)
    return decision.id


@pytest.mark.parametrize(
    ("kind", "source"), [(TaskKind.AUDIT, LabelSource.AUDIT), (TaskKind.FLAG, LabelSource.REVIEW)]
)
async def test_a_resolved_task_labels_its_decision_with_what_that_says(
    store: SqlStore, kind: TaskKind, source: LabelSource
) -> None:
    decision, task_id = await put(
        store,
        a_task(kind=kind, inclusion=0.3, due_at=None),
        intended=Action.FLAG,
        inclusion=0.3,
        inclusion_floor=0.15,
        confidence=0.9,
    )
    await store.resolve(a_resolution(task_id, verdict=Verdict.REJECT, blind=True))
    (label,) = await store.labels_after("refunds", 0, 10)
    assert (label.decision_id, label.task_id) == (decision.id, task_id)
    assert (label.source, label.labeller, label.at) == (source, "ann", later(60))
    assert (label.acceptable, label.weight, label.blind) == (False, 1.0, True)
    assert (label.inclusion, label.inclusion_floor) == (0.3, 0.15)
    assert (label.intended, label.risk, label.confidence) == (Action.FLAG, RiskTier.HIGH, 0.9)
    assert await store.labels_after("refunds", label.seq, 10) == []
    assert await store.labels_after("other", 0, 10) == []
    assert await store.labels_since(later(60)) == [label]
    assert await store.labels_since(later(61)) == []


async def test_the_latest_word_of_each_labeller_counts_and_the_earlier_ones_stay(
    store: SqlStore, engine: Engine
) -> None:
    decision = await an_answer(store)
    first, second = a_label(decision), a_label(decision, at=later(91), acceptable=False)
    assert await store.label([first]) == 1
    assert await store.label([first]) == 0
    assert await store.label([replace(first, at=later(95))]) == 0
    assert await store.label([second]) == 1
    assert len(await rows(engine, labels)) == 2
    (found,) = await store.labelled("", 10)
    assert (found.acceptable, found.at, found.labels) == (False, later(91), 1)
    entries = [row for row in await rows(engine, audit_entries) if row["kind"] == "label.given"]
    assert [orjson.loads(row["body"])["acceptable"] for row in entries] == [True, False]
    assert await store.label([first]) == 1


async def test_a_decision_nobody_drew_has_no_inclusion_unless_the_label_says_so(
    store: SqlStore,
) -> None:
    plain, given = await an_answer(store), await an_answer(store)
    await store.label([a_label(plain), a_label(given, inclusion=0.25)])
    found = {each.decision.id: each.inclusion for each in await store.labelled("", 10)}
    assert found == {plain: None, given: 0.25}
    (drawn, task_id) = await put(store, a_task(kind=TaskKind.AUDIT, inclusion=0.1, due_at=None))
    await store.label([a_label(drawn.id)])
    assert (await store.labelled(given, 10))[0].inclusion is None
    await store.label([a_label(drawn.id, source=LabelSource.REVIEW, labeller="ann")])
    assert (await store.labelled(given, 10))[0].inclusion == 0.1
    assert task_id


async def test_reduced_labels_come_in_pages_in_the_order_of_their_decisions(
    store: SqlStore,
) -> None:
    ids = [await an_answer(store) for _ in range(7)]
    unlabelled = await an_answer(store)
    for labeller, acceptable in (("eve", True), ("ann", False), ("bob", False)):
        given = [a_label(each, labeller=labeller, acceptable=acceptable) for each in ids[::-1]]
        await store.label(given)
    found: list[LabelledDecision] = []
    after = ""
    while page := await store.labelled(after, 3):
        assert len(page) <= 3
        found += page
        after = page[-1].decision.id
    assert [each.decision.id for each in found] == ids
    assert unlabelled not in ids
    assert {(each.acceptable, each.labels, each.weight, each.settled) for each in found} == {
        (False, 3, 1.0, True)
    }


async def test_labels_are_stored_all_or_none(store: SqlStore, engine: Engine) -> None:
    decision = await an_answer(store)
    with pytest.raises(NotFound) as refused:
        await store.label([a_label(decision), a_label("hgd_no"), a_label("hgd_nor")])
    assert refused.value.extra["decisions"] == ["hgd_no", "hgd_nor"]
    assert await rows(engine, labels) == []
    assert [r["kind"] for r in await rows(engine, audit_entries)] == ["decision.recorded"]


async def test_many_labels_at_once(store: SqlStore) -> None:
    ids = [await an_answer(store) for _ in range(1200)]
    assert await store.label([a_label(each) for each in ids]) == 1200
    assert len(await store.labelled("", 2000)) == 1200


A_STANDING = Standing("refunds", 1, NOW, "tightened", memory=b'{"seen": 1}')
AN_ALARM = Alarm("hga_1", NOW, "refunds", "drift.confidence", "it fell", {"p": 1e-6})


async def test_of_replicas_that_change_a_standing_at_once_one_succeeds(
    store: SqlStore, engine: Engine
) -> None:
    assert await store.standing("refunds") is None
    assert await store.put_standing(A_STANDING)
    assert not await store.put_standing(A_STANDING, [AN_ALARM])
    rivals = [
        store.put_standing(
            replace(A_STANDING, version=2, suspended=f"drift {n}", artefact="a"),
            [replace(AN_ALARM, id=f"hga_{n}")],
        )
        for n in range(5)
    ]
    assert sorted(await asyncio.gather(*rivals)) == [False] * 4 + [True]
    (alarm,) = await store.open_alarms()
    found = await store.standing("refunds")
    assert found is not None
    assert (found.version, found.memory) == (2, b'{"seen": 1}')
    assert found.suspended == f"drift {alarm.id.removeprefix('hga_')}"
    assert await store.standings() == [replace(found, memory=None)]
    assert await store.alarm(alarm.id) == alarm == replace(AN_ALARM, id=alarm.id)
    assert [(r["kind"], r["subject"]) for r in await rows(engine, outbox)] == [
        ("alarm.raised", alarm.id)
    ]


async def test_cleared_alarms_are_kept_and_no_longer_open(store: SqlStore) -> None:
    await store.put_standing(A_STANDING, [AN_ALARM])
    new = replace(AN_ALARM, id="hga_2", kind="errors")
    changed = replace(A_STANDING, version=2, at=later(5))
    assert await store.put_standing(changed, [new], clear=True)
    assert await store.open_alarms() == [new]
    cleared = await store.alarm("hga_1")
    assert cleared is not None
    assert cleared.cleared_at == later(5)


_DOWN = (
    "DROP INDEX ix_tasks_decision",
    "ALTER TABLE tasks DROP COLUMN round",
    "DROP TABLE deliveries",
    "DROP TABLE marks",
    "DROP TABLE labels",
    "DROP TABLE standings",
    "DROP TABLE alarms",
    "DROP INDEX ix_decisions_economics",
    "ALTER TABLE decisions DROP COLUMN intended",
    "ALTER TABLE decisions DROP COLUMN inclusion",
    "ALTER TABLE decisions DROP COLUMN inclusion_floor",
    "CREATE INDEX ix_decisions_economics ON decisions (created_at, rules_ms, judge_ms, judge_usd)",
    "CREATE TABLE labels (task_id TEXT NOT NULL PRIMARY KEY REFERENCES tasks (id), decision_id TEXT NOT NULL "
    "REFERENCES decisions (id), at BIGINT NOT NULL, acceptable BOOLEAN NOT NULL, inclusion DOUBLE PRECISION NOT NULL)",
    "UPDATE alembic_version SET version_num = '0002'",
)


async def test_labels_of_an_existing_database_are_kept(store_url: str) -> None:
    old = await open_store(store_url)
    audited, task_id = await put(
        old, a_task(kind=TaskKind.AUDIT, inclusion=0.15, due_at=None), confidence=0.7
    )
    await old.resolve(a_resolution(task_id, verdict=Verdict.REJECT))
    await old.close()
    engine = engine_of(store_url)

    def to_0002(connection: Connection) -> None:
        for statement in _DOWN:
            connection.execute(text(statement))
        connection.execute(
            text("INSERT INTO labels VALUES (:task, :decision, 1900000000000000, :no, 0.15)"),
            {"task": task_id, "decision": audited.id, "no": False},
        )

    await engine.write(to_0002)
    await engine.close()
    new = await open_store(store_url)
    (label,) = await new.labels_after("refunds", 0, 10)
    assert (label.decision_id, label.task_id, label.labeller) == (audited.id, task_id, "ann")
    assert (label.source, label.acceptable, label.blind) == (LabelSource.AUDIT, False, False)
    assert (label.inclusion, label.inclusion_floor) == (0.15, 0.15)
    assert (label.intended, label.confidence) == (Action.HOLD, 0.7)
    await new.label([a_label(audited.id)])
    assert (await new.labelled("", 5))[0].labels == 2
    task = await new.task_of(audited.id)
    assert task is not None
    assert (task.id, task.verdict, task.inclusion) == (task_id, Verdict.REJECT, 0.15)
    await new.close()


def test_a_label_cannot_name_a_decision_that_is_not_there(empty_database: Path) -> None:
    with sqlite3.connect(f"file:{empty_database}?mode=ro", uri=True) as database:
        references = database.execute("PRAGMA foreign_key_list(labels)").fetchall()
    database.close()
    assert {row[2] for row in references} == {"decisions", "tasks"}


async def test_decisions_are_tallied_by_policy_and_what_was_intended(store: SqlStore) -> None:
    given = [("a@1", Action.RETURN), ("a@2", Action.RETURN), ("a@2", Action.HOLD), ("b@1", None)]
    for policy, intended in given:
        await store.record(a_decision(policy=policy, intended=intended))
    await store.record(a_decision(policy="a@1", intended=Action.FLAG, created_at=later(-1)))
    assert await store.tallies(NOW) == [
        Tally("a", Action.HOLD, 1),
        Tally("a", Action.RETURN, 2),
    ]


async def test_judged_decisions_are_counted_once(store: SqlStore) -> None:
    first, second = await an_answer(store), await an_answer(store)
    await store.label([a_label(first), a_label(second), a_label(first, labeller="bob")])
    await store.label([a_label(first, acceptable=False)])
    assert await store.label_counts() == {"refunds": (2, 1)}


async def test_monitors_are_given_every_decision_once_in_order(store: SqlStore) -> None:
    detail: dict[str, Any] = {
        "decision": {"confidence": 0.9, "score": None},
        "evidence": {"signals": {"mean_logprob": -0.1, "n_tokens": 3}},
    }
    made = [a_decision(created_at=later(n / 3), detail=detail) for n in range(10)]
    for each in made:
        await store.record(each)
    await store.record(a_decision(created_at=later(2), status=500))
    await store.record(a_decision(created_at=later(2), policy="other@1"))
    found: list[Observed] = []
    after = (later(-1), "")
    while page := await store.observed("refunds@1", after, later(3), 4):
        found += page
        after = (page[-1].at, page[-1].id)
    assert [each.id for each in found] == [each.id for each in made[:9]]
    assert found[0].values == {"confidence": 0.9, "mean_logprob": -0.1, "n_tokens": 3.0}


async def test_decisions_of_one_moment_are_given_once_each_however_pages_part_them(
    store: SqlStore,
) -> None:
    made = sorted(a_decision().id for _ in range(9))
    for id_ in reversed(made):
        await store.record(a_decision(id=id_))
    found: list[str] = []
    after = (NOW, "")
    while page := await store.observed("refunds@1", after, later(1), 4):
        found += [each.id for each in page]
        after = (page[-1].at, page[-1].id)
    assert found == made


async def test_what_judges_said_is_given_with_the_labels_unless_they_could_not_tell(
    store: SqlStore,
) -> None:
    def result(outcome: str, score: float | None, opinion: dict[str, str] | None) -> dict[str, Any]:
        return {"outcome": outcome, "score": score, "opinion": opinion}

    results = {
        "good": result("pass", 0.9, {"method": "logprob"}),
        "bad": result("fail", 0.2, {"method": "logprob"}),
        "down": result("error", None, {"method": "logprob"}),
        "shape": result("fail", 0.0, None),
    }
    id_ = await an_answer(store, detail={"evidence": {"results": results}})
    await store.label([a_label(id_), a_label(id_, labeller="bob")])
    other = await an_answer(store)
    said = await store.said([id_, other, "hgd_unknown"])
    assert said[id_].judges == {"good": True, "bad": False}
    assert [each.labeller for each in said[id_].labels] == ["app", "bob"]
    assert said.keys() == {id_, other}
    assert (said[other].labels, said[other].judges) == ((), {})
    (first, _) = await store.observed("refunds@1", (NOW, ""), later(1), 10)
    assert first.values == {"judge.good": 0.9, "judge.bad": 0.2}


async def test_monitors_read_no_more_than_what_is_new(store: SqlStore, engine: Engine) -> None:
    await populate(store)
    await engine.write(lambda connection: connection.execute(text("ANALYZE")))
    operation = partial(
        decisions.observed, label="refunds@1", after=(later(2900), ""), until=later(3000), limit=500
    )
    plan = await plans(engine, operation)
    assert "ix_decisions_economics" in plan
    assert "Seq Scan" not in plan
