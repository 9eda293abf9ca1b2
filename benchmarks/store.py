"""Awaited durable records per second, and CPU per record, by number of concurrent tasks.

Run as `python -m benchmarks.store [sqlite|postgres]`; PostgreSQL is started for it, with fsync. CPU is of this process
alone, threads included; the server's is not counted.
"""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson
import uvloop
from msgspec.structs import replace

from gateway.recording import new_id
from gateway.records import DecisionRecord
from gateway.store import SqlStore, open_store
from policies.model import Action, RiskTier
from tests.services import Postgres
from validators import JSON

CONCURRENCY = (1, 16, 64)
RECORDS = 4000
ROUNDS = 3


def _body(text_bytes: int, chance: random.Random) -> bytes:
    words = [
        f"{chance.choice('bcdfglmnprst')}{chance.choice('aeiou')}{chance.choice('lnrst')}"
        for _ in range(400)
    ]
    text = " ".join(chance.choice(words) for _ in range(text_bytes // 4))
    return orjson.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def _records(chance: random.Random) -> list[DecisionRecord]:
    detail: dict[str, JSON] = {
        "reasons": [{"source": f"check:{n}", "message": "passed"} for n in range(8)]
    }
    example = DecisionRecord(
        id="",
        created_at=datetime.now(UTC),
        endpoint="chat",
        model="gpt-4o-mini",
        task_type="refund",
        policy="refunds@0123456789abcdef",
        action=Action.RETURN,
        risk=RiskTier.MEDIUM,
        confidence=0.97,
        fingerprint="",
        key_id="key_1",
        request_id="req_1",
        status=200,
        detail=detail,
        request_digest="0" * 64,
        response_digest="1" * 64,
        request=_body(2000, chance),
        response=_body(3000, chance),
    )
    return [
        replace(
            example,
            id=new_id("hgd", example.created_at + timedelta(milliseconds=n)),
            created_at=example.created_at + timedelta(milliseconds=n),
            fingerprint=f"{chance.getrandbits(256):064x}",
            upstream_id=f"chatcmpl-{chance.getrandbits(96):024x}",
        )
        for n in range(RECORDS)
    ]


async def _load(store: SqlStore, concurrency: int, seed: int) -> tuple[float, float, list[float]]:
    records, waits_s = iter(_records(random.Random(seed))), []

    async def work() -> None:
        for record in records:
            before_s = time.perf_counter()
            await store.record(record)
            waits_s.append(time.perf_counter() - before_s)

    gc.collect()
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(work())
    return time.perf_counter() - wall_s, time.process_time() - cpu_s, waits_s


async def measure(name: str, url: str) -> None:
    """Print the median of the rounds for each concurrency."""
    store = await open_store(url)
    try:
        await _load(store, 16, seed=0)
        for concurrency in CONCURRENCY:
            rounds = [await _load(store, concurrency, 10 * concurrency + n) for n in range(ROUNDS)]
            wall_s, cpu_s, waits_s = sorted(rounds, key=lambda taken: taken[1])[ROUNDS // 2]
            slices = statistics.quantiles(waits_s, n=100)
            print(
                f"{name:9} {concurrency:3} tasks {RECORDS / wall_s:8.0f} records/s "
                f"{cpu_s / RECORDS * 1e6:7.1f} us CPU/record "
                f"p50 {slices[49] * 1e3:6.2f} ms p99 {slices[98] * 1e3:6.2f} ms"
            )
    finally:
        await store.close()


@contextmanager
def _sqlite() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        yield f"sqlite:///{Path(folder) / 'bench.db'}"


@contextmanager
def _postgres() -> Iterator[str]:
    server = Postgres(durable=True)
    try:
        yield server.new_database()
    finally:
        server.remove()


if __name__ == "__main__":
    for name, url_of in {"sqlite": _sqlite, "postgres": _postgres}.items():
        if name in (sys.argv[1:] or [name]):
            with url_of() as url:
                uvloop.run(measure(name, url))
