"""What `gateway.ports.Store` promises of review tasks: queue, claims, resolution, expiry; SQLite and PostgreSQL alike."""

from __future__ import annotations

import hashlib
from datetime import datetime

import orjson
import pytest
from msgspec.structs import replace

from gateway.errors import Conflict, NotFound
from gateway.records import Resolution, TaskKind, TaskRecord, TaskState, Verdict
from gateway.store import SqlStore
from gateway.store.engines import Engine
from gateway.store.schema import audit_entries, labels, outbox, reviews
from policies.model import RiskTier
from tests.gateway.stores import NOW, a_decision, a_resolution, a_task, later, put, rows


class TestQueue:
    async def test_new_task_is_open_at_version_one(self, store: SqlStore) -> None:
        decision = a_decision(risk=RiskTier.CRITICAL, confidence=0.25)
        task = a_task(kind=TaskKind.AUDIT, inclusion=0.15, due_at=None, on_deadline="release")
        await store.record(decision, task)
        expected = TaskRecord(
            id=task.id,
            decision_id=decision.id,
            kind=TaskKind.AUDIT,
            state=TaskState.OPEN,
            version=1,
            risk=RiskTier.CRITICAL,
            policy="refunds@1",
            confidence=0.25,
            created_at=NOW,
            due_at=None,
            on_deadline="release",
            inclusion=0.15,
        )
        assert await store.task(task.id) == expected
        assert await store.task_of(decision.id) == expected
        assert await store.task("nope") is None
        assert await store.task_of("nope") is None

    async def test_riskiest_then_earliest_due_then_oldest_comes_first(
        self, store: SqlStore
    ) -> None:
        order: list[tuple[RiskTier, datetime | None, datetime]] = [
            (RiskTier.CRITICAL, None, NOW),
            (RiskTier.HIGH, later(10), later(3)),
            (RiskTier.HIGH, later(20), later(1)),
            (RiskTier.HIGH, later(20), later(2)),
            (RiskTier.HIGH, None, NOW),
            (RiskTier.MEDIUM, later(1), NOW),
            (RiskTier.LOW, later(1), NOW),
        ]
        ids = {}
        for n in (3, 0, 6, 2, 5, 1, 4):
            risk, due_at, created_at = order[n]
            _, ids[n] = await put(store, a_task(due_at=due_at), risk=risk, created_at=created_at)
        assert [task.id for task in await store.queue(NOW, 20)] == [ids[n] for n in range(7)]
        assert [task.id for task in await store.queue(NOW, 2)] == [ids[0], ids[1]]

    async def test_lapsed_claim_shows_as_open_and_live_one_as_claimed(
        self, store: SqlStore
    ) -> None:
        _, task_id = await put(store, a_task())
        await store.claim(task_id, "ann", NOW, 300)
        (claimed,) = await store.queue(later(299), 20)
        assert (claimed.state, claimed.claimed_by, claimed.claimed_until) == (
            TaskState.CLAIMED,
            "ann",
            later(300),
        )
        (lapsed,) = await store.queue(later(300), 20)
        assert (lapsed.state, lapsed.claimed_by, lapsed.claimed_until) == (
            TaskState.OPEN,
            None,
            None,
        )

    async def test_settled_tasks_leave_the_queue(self, store: SqlStore) -> None:
        _, approved = await put(store, a_task())
        _, late = await put(store, a_task(due_at=later(1)))
        _, waiting = await put(store, a_task())
        await store.resolve(a_resolution(approved))
        await store.expire_due(later(2), 10)
        assert [task.id for task in await store.queue(later(2), 20)] == [waiting]
        asked = [approved, late, waiting, *(f"unknown-{n}" for n in range(1200))]
        expected = {approved: TaskState.RESOLVED, late: TaskState.EXPIRED}
        assert await store.settled(asked) == expected
        assert await store.settled([]) == {}


class TestClaims:
    async def test_claim_is_a_lease_that_its_holder_renews(self, store: SqlStore) -> None:
        _, task_id = await put(store, a_task())
        first = await store.claim(task_id, "ann", NOW, 300)
        assert (first.state, first.claimed_by, first.version) == (TaskState.CLAIMED, "ann", 2)
        renewed = await store.claim(task_id, "ann", later(100), 300)
        assert (renewed.claimed_until, renewed.version) == (later(400), 3)
        assert await store.task(task_id) == renewed

    async def test_live_claim_keeps_others_out_and_says_who_and_until_when(
        self, store: SqlStore
    ) -> None:
        _, task_id = await put(store, a_task())
        await store.claim(task_id, "ann", NOW, 300)
        with pytest.raises(
            Conflict, match=r"ann holds this task until 2030-01-02T03:09:05"
        ) as refused:
            await store.claim(task_id, "bob", later(299), 300)
        assert refused.value.extra["task"]["claimed_by"] == "ann"  # type: ignore[index, call-overload]
        assert (await store.claim(task_id, "bob", later(300), 300)).claimed_by == "bob"

    async def test_released_task_is_open_to_others(self, store: SqlStore) -> None:
        _, task_id = await put(store, a_task())
        await store.claim(task_id, "ann", NOW, 300)
        released = await store.release(task_id, "ann", later(1))
        assert (released.state, released.claimed_by, released.claimed_until) == (
            TaskState.OPEN,
            None,
            None,
        )
        assert (await store.claim(task_id, "bob", later(2), 300)).version == 4

    async def test_release_needs_a_live_claim_of_ones_own(self, store: SqlStore) -> None:
        _, task_id = await put(store, a_task())
        with pytest.raises(Conflict, match="you do not hold"):
            await store.release(task_id, "ann", NOW)
        await store.claim(task_id, "ann", NOW, 300)
        with pytest.raises(Conflict, match="ann holds"):
            await store.release(task_id, "bob", NOW)
        with pytest.raises(Conflict, match="you do not hold"):
            await store.release(task_id, "ann", later(300))

    async def test_unknown_task_is_not_found(self, store: SqlStore) -> None:
        with pytest.raises(NotFound, match="'nope'"):
            await store.claim("nope", "ann", NOW, 300)
        with pytest.raises(NotFound):
            await store.release("nope", "ann", NOW)
        with pytest.raises(NotFound):
            await store.resolve(a_resolution("nope"))

    async def test_settled_task_cannot_be_claimed(self, store: SqlStore) -> None:
        _, task_id = await put(store, a_task())
        await store.resolve(a_resolution(task_id))
        with pytest.raises(Conflict, match="ann was first and decided: approve"):
            await store.claim(task_id, "bob", later(61), 300)


class TestResolution:
    @pytest.mark.parametrize(
        ("verdict", "acceptable"),
        [(Verdict.APPROVE, True), (Verdict.CORRECT, False), (Verdict.REJECT, False)],
    )
    async def test_resolution_comes_with_review_label_audit_and_outbox(
        self, store: SqlStore, engine: Engine, verdict: Verdict, acceptable: bool
    ) -> None:
        decision, task_id = await put(store, a_task(inclusion=0.25))
        claimed = await store.claim(task_id, "ann", NOW, 300)
        resolution = Resolution(
            task_id, 2, verdict, "ann", later(7), "tone", "too\0rude", b"mended"
        )
        resolved = await store.resolve(resolution)
        assert resolved == await store.task(task_id)
        assert resolved == replace(
            claimed,
            state=TaskState.RESOLVED,
            version=3,
            claimed_by=None,
            claimed_until=None,
            resolved_at=later(7),
            verdict=verdict,
            reviewer="ann",
            reason="tone",
            comment="too\ufffdrude",
            correction=b"mended",
            worked_s=7.0,
        )
        (label,) = await rows(engine, labels)
        assert (label["task_id"], label["decision_id"]) == (task_id, decision.id)
        assert (label["acceptable"], label["inclusion"]) == (acceptable, 0.25)
        entry = (await rows(engine, audit_entries))[-1]
        body = orjson.loads(entry["body"])
        assert (entry["kind"], entry["subject"]) == ("task.resolved", task_id)
        assert (body["verdict"], body["reviewer"], body["decision"]) == (
            verdict,
            "ann",
            decision.id,
        )
        assert body["correction_sha256"] == hashlib.sha256(b"mended").hexdigest()
        assert [row["kind"] for row in await rows(engine, outbox)] == [
            "task.opened",
            "task.settled",
        ]

    async def test_second_resolution_conflicts_with_the_first_ones_result(
        self, store: SqlStore
    ) -> None:
        _, task_id = await put(store, a_task())
        first = a_resolution(task_id)
        await store.resolve(first)
        for second in (first, a_resolution(task_id, 2, reviewer="bob", verdict=Verdict.REJECT)):
            with pytest.raises(Conflict) as refused:
                await store.resolve(second)
            assert orjson.loads(refused.value.body())["error"]["task"] == {
                "id": task_id,
                "state": "resolved",
                "verdict": "approve",
                "reviewer": "ann",
                "version": 2,
                "resolved_at": later(60).isoformat(),
                "claimed_by": None,
                "claimed_until": None,
            }

    async def test_stale_version_conflicts_and_says_so(self, store: SqlStore) -> None:
        _, task_id = await put(store, a_task())
        await store.claim(task_id, "ann", NOW, 300)
        with pytest.raises(Conflict, match="at version 2, not 1"):
            await store.resolve(a_resolution(task_id, 1))

    async def test_live_claim_of_another_conflicts_and_a_lapsed_one_does_not(
        self, store: SqlStore
    ) -> None:
        _, task_id = await put(store, a_task())
        await store.claim(task_id, "ann", NOW, 300)
        with pytest.raises(Conflict, match="ann holds this task until"):
            await store.resolve(a_resolution(task_id, 2, reviewer="bob", at=later(299)))
        await store.resolve(a_resolution(task_id, 2, reviewer="bob", at=later(300)))

    async def test_resolution_after_expiry_conflicts(self, store: SqlStore, engine: Engine) -> None:
        _, task_id = await put(store, a_task(due_at=later(1)))
        await store.expire_due(later(1), 10)
        with pytest.raises(Conflict, match="expired before anybody decided") as refused:
            await store.resolve(a_resolution(task_id, 2))
        assert orjson.loads(refused.value.body())["error"]["task"]["state"] == "expired"
        assert await rows(engine, labels) == []
        assert await rows(engine, reviews) == []


class TestExpiry:
    async def test_due_tasks_expire_without_a_decider(
        self, store: SqlStore, engine: Engine
    ) -> None:
        decision, task_id = await put(store, a_task(due_at=later(10)))
        await put(store, a_task(due_at=later(10.000001)))
        await put(store, a_task(due_at=None))
        await store.claim(task_id, "ann", NOW, 300)
        assert await store.expire_due(later(9.999999), 10) == []
        (expired,) = await store.expire_due(later(10), 10)
        assert (expired.id, expired.state, expired.version) == (task_id, TaskState.EXPIRED, 3)
        assert expired.resolved_at == later(10)
        assert (expired.verdict, expired.reviewer, expired.claimed_by) == (None, None, None)
        assert await store.task(task_id) == expired
        assert await store.expire_due(later(10), 10) == []
        entry, note = (await rows(engine, audit_entries))[-1], (await rows(engine, outbox))[-1]
        assert (entry["kind"], note["kind"], note["subject"]) == (
            "task.expired",
            "task.settled",
            task_id,
        )
        assert orjson.loads(entry["body"])["decision"] == decision.id

    async def test_longest_overdue_expires_first_up_to_the_limit(self, store: SqlStore) -> None:
        ids = [(await put(store, a_task(due_at=later(at))))[1] for at in (3, 1, 2)]
        assert [task.id for task in await store.expire_due(later(9), 2)] == [ids[1], ids[2]]
        assert [task.id for task in await store.expire_due(later(9), 2)] == [ids[0]]
