"""Example decisions and tasks; and, run as `python -m tests.gateway.stores URL COUNT`, a writer that can be killed."""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

from msgspec.structs import replace
from sqlalchemy import Connection, Table, select
from sqlalchemy.engine import make_url

from gateway.records import DecisionRecord, NewTask, Resolution, TaskKind, Verdict
from gateway.store import SqlStore, open_store
from gateway.store.engines import Engine, SqliteEngine
from gateway.store.postgres import PostgresEngine
from policies.model import Action, RiskTier

NOW = datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)

_numbers = itertools.count(1)


def later(seconds: float) -> datetime:
    """So long after NOW."""
    return NOW + timedelta(seconds=seconds)


def a_decision(**changes: Any) -> DecisionRecord:
    """A decision with an id of its own."""
    number = next(_numbers)
    values: dict[str, Any] = {
        "id": f"hgd_{number:06d}",
        "created_at": NOW,
        "endpoint": "chat",
        "model": "gpt-4o-mini",
        "task_type": None,
        "policy": "refunds@1",
        "action": Action.HOLD,
        "risk": RiskTier.HIGH,
        "confidence": None,
        "fingerprint": f"fingerprint-{number}",
        "key_id": None,
        "request_id": f"req_{number}",
        "status": 200,
    }
    return DecisionRecord(**(values | changes))


def a_task(**changes: Any) -> NewTask:
    """A task with an id of its own and ten minutes to its deadline."""
    values: dict[str, Any] = {
        "id": f"hgt_{next(_numbers):06d}",
        "kind": TaskKind.HOLD,
        "inclusion": 1.0,
        "due_at": later(600),
    }
    return NewTask(**(values | changes))


def engine_of(url: str) -> Engine:
    """Direct access to the database at a store's URL."""
    database = make_url(url).database
    return SqliteEngine(str(database)) if url.startswith("sqlite") else PostgresEngine(url)


async def rows(engine: Engine, table: Table) -> list[dict[str, Any]]:
    """Every row of the table, oldest first where it has an order."""
    query = select(table).order_by(table.c.seq) if "seq" in table.c else select(table)

    def read(connection: Connection) -> list[dict[str, Any]]:
        return [dict(row) for row in connection.execute(query).mappings()]

    return await engine.read(read)


async def put(store: SqlStore, task: NewTask, **decision: Any) -> tuple[DecisionRecord, str]:
    """Store the task with a new decision; gives the decision and the task's id."""
    recorded = a_decision(**decision)
    await store.record(recorded, task)
    return recorded, task.id


def a_resolution(task_id: str, version: int = 1, **changes: Any) -> Resolution:
    """An approval by ann after a minute."""
    return replace(Resolution(task_id, version, Verdict.APPROVE, "ann", later(60)), **changes)


async def _write(url: str, count: int) -> None:
    """Print the id of each decision once it is durable."""
    store, prefix = await open_store(url), f"{random.getrandbits(64):016x}"
    numbers = iter(range(count))

    async def work() -> None:
        for number in numbers:
            decision = a_decision(id=f"{prefix}-{number}", response=random.randbytes(3000))
            await store.record(decision, a_task(id=f"task-{decision.id}"))
            print(decision.id, flush=True)  # noqa: T201 - how the parent hears of it

    async with asyncio.TaskGroup() as group:
        for _ in range(16):
            group.create_task(work())
    await store.close()


if __name__ == "__main__":
    asyncio.run(_write(sys.argv[1], int(sys.argv[2])))
