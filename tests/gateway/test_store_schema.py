"""The schema: its history agrees with its tables, and no query on the way of a request reads a whole table."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection, event, text

from gateway.errors import SettingsError, StoreError
from gateway.records import Resolution, Verdict
from gateway.store import SqlStore, decisions, labels, open_store, tasks
from gateway.store import rows as stored
from gateway.store.engines import Engine
from gateway.store.schema import REVISION, metadata
from tests.gateway.stores import NOW, a_decision, a_task, engine_of, later


async def test_migrated_database_is_what_the_tables_say(store: SqlStore, engine: Engine) -> None:
    def differences(connection: Connection) -> list[Any]:
        found: list[Any] = compare_metadata(MigrationContext.configure(connection), metadata)
        return found

    assert await engine.read(differences) == []


def test_code_is_written_for_the_newest_revision() -> None:
    config = Config()
    config.set_main_option("script_location", "gateway.store:migrations")
    assert ScriptDirectory.from_config(config).get_heads() == [REVISION]


async def test_replicas_that_open_a_new_store_at_once_all_succeed(empty_url: str) -> None:
    stores = await asyncio.gather(*(open_store(empty_url) for _ in range(6)))
    written = [a_decision() for _ in stores]
    await asyncio.gather(*(s.record(d) for s, d in zip(stores, written, strict=True)))
    assert [await stores[0].decision(each.id) for each in written] == written
    for each in stores:
        await each.close()


async def test_database_of_a_newer_version_is_refused(store_url: str) -> None:
    await (await open_store(store_url)).close()
    engine = engine_of(store_url)
    await engine.write(lambda c: c.execute(text("UPDATE alembic_version SET version_num = '9999'")))
    await engine.close()
    with pytest.raises(StoreError, match="newer version of Holdgate"):
        await open_store(store_url)


@pytest.mark.parametrize(
    "url",
    ["sqlite:///:memory:", "sqlite://", "mysql://h/d", "holdgate.db", "postgresql+psycopg://h/d"],
)
async def test_url_of_no_store_is_a_settings_error_that_says_what_to_write(url: str) -> None:
    with pytest.raises(SettingsError, match="sqlite:///"):
        await open_store(url)


async def test_database_file_is_its_owners_alone(tmp_path: Path) -> None:
    store = await open_store(f"sqlite:///{tmp_path / 'holdgate.db'}")
    await store.record(a_decision(request=b"secret"))
    files = [Path(entry) for entry in os.scandir(tmp_path)]
    assert len(files) == 3
    assert [file.stat().st_mode & 0o077 for file in files] == [0, 0, 0]
    await store.close()


async def populate(store: SqlStore) -> None:
    some = [a_decision(upstream_id=f"chatcmpl-{n}", created_at=later(n)) for n in range(3000)]
    waiting = [a_task(due_at=later(n)) for n in range(2000)]
    plain, held = some[2000:], zip(some[:2000], waiting, strict=True)
    await asyncio.gather(*(store.record(each, erase_at=each.created_at) for each in plain[:100]))
    await asyncio.gather(*(store.record(each) for each in plain[100:]))
    await asyncio.gather(*(store.record(each, task) for each, task in held))
    for task in waiting[:600]:
        await store.resolve(Resolution(task.id, 1, Verdict.APPROVE, "ann", NOW))


async def plans(engine: Engine, operation: Callable[[Connection], object]) -> str:
    """How the database would run each statement of the operation."""
    found: list[str] = []

    def explain(
        connection: Connection, _: Any, statement: str, parameters: Any, *_rest: Any
    ) -> None:
        words = "EXPLAIN QUERY PLAN" if connection.dialect.name == "sqlite" else "EXPLAIN"
        cursor = connection.connection.cursor()
        cursor.execute(f"{words} {statement}", parameters)
        found.extend(str(row[-1]) for row in cursor.fetchall())
        cursor.close()

    def run(connection: Connection) -> None:
        event.listen(connection, "before_cursor_execute", explain)
        try:
            operation(connection)
        finally:
            event.remove(connection, "before_cursor_execute", explain)

    await engine.write(run)
    return "\n".join(found)


QUERIES: dict[str, tuple[Callable[[Connection], object], str]] = {
    "decision": (partial(decisions.by_id, decision_id="hgd_1"), "decisions"),
    "decision_by_upstream_id": (
        partial(decisions.by_upstream_id, upstream_id="chatcmpl-7"),
        "ix_decisions_upstream_id",
    ),
    "decision_by_fingerprint": (
        partial(decisions.by_fingerprint, fingerprint="fingerprint-7", since=NOW),
        "ix_decisions_fingerprint",
    ),
    "task": (partial(tasks.by_id, task_id="hgt_1"), "tasks"),
    "task_of": (partial(tasks.of_decision, decision_id="hgd_1"), "tasks"),
    "queue": (partial(tasks.queue, now=NOW, limit=20), "ix_tasks_queue"),
    "queue of a reviewer": (
        partial(tasks.queue, now=NOW, limit=20, reviewer="ann"),
        "ix_tasks_queue",
    ),
    "expire_due": (partial(tasks.due, now=later(700), limit=20), "ix_tasks_due_at"),
    "erase_due": (partial(decisions.to_erase, now=later(2001), limit=20), "ix_decisions_erase_at"),
    "labels_after": (
        partial(labels.after, policy="refunds", seq=500, limit=20),
        "labels",
    ),
    "settled": (partial(tasks.settled, task_ids=["hgt_1", "hgt_2"]), "tasks"),
}


async def test_every_query_of_a_request_or_sweep_uses_its_index(
    store: SqlStore, engine: Engine
) -> None:
    await populate(store)
    await engine.write(lambda connection: connection.execute(text("ANALYZE")))
    for name, (operation, index) in QUERIES.items():
        plan = await plans(engine, operation)
        scans = [
            line
            for line in plan.splitlines()
            if "Seq Scan" in line or (line.startswith("SCAN") and "INDEX" not in line)
        ]
        assert plan, name
        assert index in plan, f"{name}: {plan}"
        assert scans == [], f"{name}: {plan}"
        assert "Sort" not in plan, f"{name}: {plan}"
        assert "TEMP B-TREE" not in plan, f"{name}: {plan}"


@given(st.datetimes(timezones=st.just(UTC)))
def test_time_comes_back_to_the_microsecond(at: datetime) -> None:
    assert stored.moment(stored.micros(at)) == at


@given(st.binary(max_size=2000))
def test_body_comes_back_as_it_was_packed(body: bytes) -> None:
    assert stored.unpack(stored.pack(body)) == body


@given(st.text(st.characters(codec=None)))
def test_stored_text_is_what_both_engines_hold(value: str) -> None:
    kept = stored.text(value)
    assert "\0" not in kept
    assert kept.encode().decode() == kept
    assert stored.text(kept) == kept
    if value == kept:
        assert len(kept) == len(value)


def test_time_without_a_zone_is_refused() -> None:
    with pytest.raises(TypeError):
        stored.micros(NOW.replace(tzinfo=None))


async def test_file_that_is_no_database_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a database, but long enough to look at" * 100)
    with pytest.raises(StoreError, match="not a SQLite database"):
        await open_store(f"sqlite:///{tmp_path / 'notes.txt'}")


async def test_sqlite_keeps_every_commit_through_a_power_cut(sqlite_url: str) -> None:
    store, engine = await open_store(sqlite_url), engine_of(sqlite_url)

    def settings(connection: Connection) -> tuple[Any, ...]:
        names = ("journal_mode", "synchronous", "foreign_keys")
        return tuple(connection.scalar(text(f"PRAGMA {name}")) for name in names)

    full = 2
    assert await engine.write(settings) == ("wal", full, 1)
    await engine.close()
    await store.close()
