"""What `gateway.ports.Store` promises, kept by SQLite and PostgreSQL alike."""

from __future__ import annotations

import asyncio
import hashlib
import random
from typing import Any

import orjson
import pytest
from msgspec.structs import replace
from sqlalchemy import delete, insert, update

from gateway.errors import Conflict, NotFound, StoreError
from gateway.records import (
    ApiKey,
    Role,
    Verdict,
)
from gateway.store import SqlStore, open_store
from gateway.store.engines import Engine
from gateway.store.schema import (
    audit_entries,
    decisions,
    labels,
    outbox,
)
from policies.model import Action, RiskTier
from tests.gateway.stores import NOW, a_decision, a_resolution, a_task, later, put, rows

EVERYTHING = a_decision(
    id="hgd_all",
    endpoint="responses",
    model="modèle 📏",
    task_type="refund",
    action=Action.FLAG,
    risk=RiskTier.CRITICAL,
    confidence=0.1 + 0.2,
    key_id="key_1",
    status=502,
    upstream_id="resp_1",
    streamed=True,
    latency_ms=12.5,
    overhead_ms=0.75,
    detail={"reasons": [{"source": "matrix", "n": n} for n in range(100)], "score": None},
    request_digest="a" * 64,
    response_digest="b" * 64,
    request=b'{"messages": []}',
    response=b"\x00\xff not JSON at all",
    response_headers={"x-ratelimit": "1"},
)


class TestDecisions:
    async def test_every_field_comes_back_as_it_was(self, store: SqlStore) -> None:
        await store.record(EVERYTHING)
        assert await store.decision(EVERYTHING.id) == EVERYTHING

    async def test_defaults_come_back_as_they_were(self, store: SqlStore) -> None:
        bare = a_decision()
        await store.record(bare)
        assert await store.decision(bare.id) == bare

    async def test_body_of_a_megabyte_comes_back_as_it_was(self, store: SqlStore) -> None:
        large = a_decision(response=random.Random(1).randbytes(1_000_000))
        await store.record(large)
        assert await store.decision(large.id) == large

    async def test_unknown_decision_is_none(self, store: SqlStore) -> None:
        assert await store.decision("nope") is None
        assert await store.decision_by_upstream_id("nope") is None
        assert await store.decision_by_fingerprint("nope", NOW) is None

    async def test_newest_decision_on_an_upstream_id_is_found(self, store: SqlStore) -> None:
        newer = a_decision(upstream_id="chatcmpl-1", created_at=later(5))
        for each in (newer, a_decision(upstream_id="chatcmpl-1"), a_decision(upstream_id=None)):
            await store.record(each)
        assert await store.decision_by_upstream_id("chatcmpl-1") == newer

    async def test_fingerprint_is_found_from_since_on_newest_first(self, store: SqlStore) -> None:
        older, newer = a_decision(fingerprint="f"), a_decision(fingerprint="f", created_at=later(5))
        await store.record(newer)
        await store.record(older)
        assert await store.decision_by_fingerprint("f", NOW) == newer
        assert await store.decision_by_fingerprint("f", later(5)) == newer
        assert await store.decision_by_fingerprint("f", later(5.000001)) is None

    async def test_text_no_database_holds_is_replaced_and_still_found(
        self, store: SqlStore
    ) -> None:
        hostile = a_decision(model="a\0b", upstream_id="x\0y", task_type="\ud800")
        await store.record(hostile)
        found = await store.decision_by_upstream_id("x\0y")
        assert found is not None
        assert (found.model, found.upstream_id, found.task_type) == ("a\ufffdb", "x\ufffdy", "?")

    async def test_many_at_once_are_all_stored(self, store: SqlStore) -> None:
        many = [a_decision(response=b"r" * 100) for _ in range(600)]
        await asyncio.gather(*(store.record(each) for each in many))
        found = await asyncio.gather(*(store.decision(each.id) for each in many))
        assert found == many

    async def test_only_the_caller_of_a_bad_record_gets_the_error(self, store: SqlStore) -> None:
        many = [a_decision() for _ in range(40)]
        bad = [
            replace(many[3], model="again"),
            a_decision(status=2**70),
            a_decision(detail={"x": {1}}),
        ]
        written = [*many[:20], *bad, *many[20:]]
        outcomes = await asyncio.gather(
            *(store.record(each, a_task()) for each in written), return_exceptions=True
        )
        failed = [each for each, outcome in zip(written, outcomes, strict=True) if outcome]
        assert failed == bad
        assert [await store.decision(each.id) for each in many] == many
        assert all(await asyncio.gather(*(store.task_of(each.id) for each in many)))

    async def test_refused_record_leaves_no_trace(self, store: SqlStore, engine: Engine) -> None:
        first, taken = a_decision(), a_task()
        await store.record(first, taken)
        second = a_decision()
        with pytest.raises(StoreError, match="does not take these values") as refused:
            await store.record(second, replace(taken, inclusion=0.5))
        assert refused.value.headers["retry-after"] == "2"
        assert await store.decision(second.id) is None
        assert [row["subject"] for row in await rows(engine, audit_entries)] == [first.id]
        assert [row["subject"] for row in await rows(engine, outbox)] == [taken.id]

    async def test_cancelled_callers_do_not_disturb_the_others(self, store: SqlStore) -> None:
        many = [a_decision(response=b"r" * 1000) for _ in range(100)]
        writing = [asyncio.create_task(store.record(each)) for each in many]
        await asyncio.sleep(0)
        for each in writing[::3]:
            each.cancel()
        outcomes = await asyncio.gather(*writing, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes[::3]} == {asyncio.CancelledError}
        kept = [each for n, each in enumerate(many) if n % 3]
        assert [await store.decision(each.id) for each in kept] == kept
        afterwards = a_decision()
        await store.record(afterwards)
        assert await store.decision(afterwards.id) == afterwards

    async def test_closing_finishes_what_is_under_way(self, store_url: str) -> None:
        store, last = await open_store(store_url), a_decision()
        writing = asyncio.create_task(store.record(last))
        await asyncio.sleep(0)
        await store.close()
        await writing
        again = await open_store(store_url)
        assert await again.decision(last.id) == last
        await again.close()


class TestErasure:
    async def test_contents_are_erased_when_their_time_has_come(self, store: SqlStore) -> None:
        full = a_decision(request=b"secret", response=b"answer", request_digest="d")
        await store.record(full, erase_at=later(10))
        assert await store.erase_due(later(9.999999), 10) == 0
        assert await store.decision(full.id) == full
        assert await store.erase_due(later(10), 10) == 1
        assert await store.decision(full.id) == replace(full, request=None, response=None)
        assert await store.erase_due(later(11), 10) == 0

    async def test_redacted_copies_take_the_place_of_contents(self, store: SqlStore) -> None:
        full = a_decision(request=b"secret", response=b"answer")
        await store.record(full, erase_at=NOW, redacted_request=b"***", redacted_response=b"ans***")
        assert await store.decision(full.id) == full
        await store.erase_due(NOW, 10)
        assert await store.decision(full.id) == replace(full, request=b"***", response=b"ans***")

    async def test_no_trace_of_the_contents_stays_in_the_tables(
        self, store: SqlStore, engine: Engine
    ) -> None:
        await store.record(a_decision(request=b"secret"), erase_at=NOW, redacted_request=b"***")
        await store.erase_due(NOW, 10)
        (row,) = await rows(engine, decisions)
        assert (row["redacted_request"], row["redacted_response"], row["erase_at"]) == (
            None,
            None,
            None,
        )

    async def test_correction_is_erased_with_the_contents(self, store: SqlStore) -> None:
        full, task = a_decision(response=b"answer"), a_task()
        await store.record(full, task, erase_at=later(100))
        await store.resolve(a_resolution(task.id, verdict=Verdict.CORRECT, correction=b"better"))
        assert await store.erase_due(later(100), 10) == 1
        resolved = await store.task(task.id)
        assert resolved is not None
        assert (resolved.verdict, resolved.correction) == (Verdict.CORRECT, None)

    async def test_longest_due_is_erased_first_and_each_logged(
        self, store: SqlStore, engine: Engine
    ) -> None:
        due = [a_decision(response=b"answer") for _ in range(3)]
        for each, at in zip(due, (3, 1, 2), strict=True):
            await store.record(each, erase_at=later(at))
        await store.record(a_decision(response=b"kept"))
        assert await store.erase_due(later(9), 2) == 2
        erased = [
            row["subject"]
            for row in await rows(engine, audit_entries)
            if row["kind"] == "decision.erased"
        ]
        assert erased == [due[1].id, due[2].id]


class TestAuditLog:
    async def test_leaf_is_the_rfc_9162_hash_of_the_body(
        self, store: SqlStore, engine: Engine
    ) -> None:
        await put(store, a_task())
        await store.create_key(ApiKey("key_1", "ci", Role.ADMIN, "d", NOW))
        for entry in await rows(engine, audit_entries):
            body = entry["body"].encode()
            assert entry["leaf"] == hashlib.sha256(b"\x00" + body).hexdigest()
            told = orjson.loads(body)
            assert (told["kind"], told["subject"], told["at_us"]) == (
                entry["kind"],
                entry["subject"],
                entry["at"],
            )

    async def test_log_and_outbox_hold_no_content(self, store: SqlStore, engine: Engine) -> None:
        decision, task = (
            a_decision(request=b"CANARY", response=b"CANARY", detail={"x": "CANARY"}),
            a_task(),
        )
        await store.record(decision, task, erase_at=NOW, redacted_request=b"CANARY")
        await store.resolve(a_resolution(task.id, comment="CANARY", correction=b"CANARY"))
        await store.erase_due(NOW, 1)
        assert "CANARY" not in str(await rows(engine, audit_entries) + await rows(engine, outbox))

    @pytest.mark.parametrize(
        "change",
        [update(audit_entries).values(body="{}"), delete(audit_entries)],
        ids=["update", "delete"],
    )
    async def test_entries_can_be_neither_changed_nor_deleted(
        self, store: SqlStore, engine: Engine, change: Any
    ) -> None:
        await put(store, a_task())
        before = await rows(engine, audit_entries)
        with pytest.raises(StoreError) as refused:
            await engine.write(lambda connection: connection.execute(change))
        assert "append-only" in str(refused.value.__cause__)
        assert await rows(engine, audit_entries) == before


class TestKeys:
    KEY = ApiKey("key_1", "ci", Role.CLIENT, "a" * 64, NOW)

    async def test_key_is_found_by_its_digest_until_revoked(self, store: SqlStore) -> None:
        await store.create_key(self.KEY)
        assert await store.key_by_digest(self.KEY.digest) == self.KEY
        await store.revoke_key("ci", later(5))
        assert await store.key_by_digest(self.KEY.digest) is None
        await store.revoke_key("ci", later(9))
        assert await store.keys() == [replace(self.KEY, revoked_at=later(5))]

    async def test_keys_are_listed_newest_first(self, store: SqlStore) -> None:
        newer = ApiKey("key_2", "web", Role.REVIEWER, "b" * 64, later(1))
        await store.create_key(self.KEY)
        await store.create_key(newer)
        assert await store.keys() == [newer, self.KEY]

    async def test_taken_name_conflicts(self, store: SqlStore) -> None:
        await store.create_key(self.KEY)
        with pytest.raises(Conflict, match="an API key named 'ci'"):
            await store.create_key(replace(self.KEY, id="key_2", digest="b" * 64))

    async def test_taken_digest_is_refused(self, store: SqlStore) -> None:
        await store.create_key(self.KEY)
        with pytest.raises(StoreError):
            await store.create_key(replace(self.KEY, id="key_2", name="web"))

    async def test_unknown_key_is_not_found(self, store: SqlStore) -> None:
        with pytest.raises(NotFound, match="'nope'"):
            await store.revoke_key("nope", NOW)
        assert await store.key_by_digest("nope") is None


async def test_ping_of_a_healthy_store_returns_and_changes_nothing(
    store: SqlStore, engine: Engine
) -> None:
    await store.create_key(TestKeys.KEY)
    await store.ping()
    assert await store.keys() == [TestKeys.KEY]


async def test_task_of_an_unknown_decision_cannot_be_inserted(
    store: SqlStore, engine: Engine
) -> None:
    orphan = insert(labels).values(
        task_id="nope", decision_id="nope", at=0, acceptable=True, inclusion=1
    )
    with pytest.raises(StoreError, match="does not take these values"):
        await engine.write(lambda connection: connection.execute(orphan))
