"""What the store does when the world breaks: nothing acknowledged is lost, nothing is half done, every failure is told."""

from __future__ import annotations

import asyncio
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import psutil
import pytest
from sqlalchemy import select, text

from gateway.errors import Conflict, StoreError
from gateway.records import DecisionRecord, Resolution, TaskRecord, TaskState, Verdict
from gateway.store import SqlStore, engines, open_store
from gateway.store.engines import Engine
from gateway.store.schema import audit_entries, labels
from tests.gateway.stores import NOW, a_decision, a_task, engine_of, later
from tests.services import Postgres

FULL_BYTES = 1 << 20


def start_writer(url: str, count: int) -> subprocess.Popen[str]:
    """A process that writes decisions and prints the id of each once it is durable."""
    command = [sys.executable, "-m", "tests.gateway.stores", url, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


async def assert_stored(store: SqlStore, ids: list[str]) -> None:
    """Each decision is there, whole, with its task."""
    for decision_id in ids:
        decision = await store.decision(decision_id)
        assert decision is not None
        assert decision.response is not None
        assert len(decision.response) == 3000
        assert await store.task_of(decision_id) is not None


async def test_process_killed_under_load_loses_nothing_it_acknowledged(store_url: str) -> None:
    writer = await asyncio.to_thread(start_writer, store_url, 1_000_000)
    assert writer.stdout is not None
    acknowledged = [(await asyncio.to_thread(writer.stdout.readline)).strip() for _ in range(300)]
    writer.send_signal(signal.SIGKILL)
    rest, _ = await asyncio.to_thread(writer.communicate)
    acknowledged += [line for line in rest.split("\n")[:-1] if line]
    store = await open_store(store_url)
    await assert_stored(store, acknowledged)
    await store.record(a_decision())
    await store.close()


async def test_two_processes_share_a_new_store(store_url: str) -> None:
    writers = [await asyncio.to_thread(start_writer, store_url, 300) for _ in range(2)]
    outputs = [(await asyncio.to_thread(writer.communicate))[0].split() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert [len(ids) for ids in outputs] == [300, 300]
    store = await open_store(store_url)
    await assert_stored(store, outputs[0] + outputs[1])
    await store.close()


async def test_of_reviewers_deciding_at_once_one_wins_and_the_others_hear_who(
    store_url: str,
) -> None:
    stores = [await open_store(store_url) for _ in range(2)]
    task = a_task()
    await stores[0].record(a_decision(), task)
    resolutions = [
        Resolution(task.id, 1, Verdict.APPROVE if n % 2 else Verdict.REJECT, f"reviewer-{n}", NOW)
        for n in range(12)
    ]
    outcomes = await asyncio.gather(
        *(stores[n % 2].resolve(each) for n, each in enumerate(resolutions)), return_exceptions=True
    )
    (winner,) = (each for each in outcomes if isinstance(each, TaskRecord))
    losers = [each for each in outcomes if isinstance(each, Conflict)]
    assert len(losers) == 11
    assert {str(each) for each in losers} == {
        f"{winner.reviewer} was first and decided: {winner.verdict}"
    }
    engine = engine_of(store_url)
    assert len(await engine.read(lambda c: c.execute(select(labels)).all())) == 1
    await engine.close()
    for store in stores:
        await store.close()


async def test_replicas_expiring_at_once_expire_each_task_once(store_url: str) -> None:
    stores = [await open_store(store_url) for _ in range(3)]
    due = [a_task(due_at=later(n % 7)) for n in range(60)]
    await asyncio.gather(*(stores[0].record(a_decision(), task) for task in due))
    batches = await asyncio.gather(*(each.expire_due(later(10), 25) for each in stores * 4))
    expired = [task.id for batch in batches for task in batch]
    assert sorted(expired) == sorted(task.id for task in due)
    engine = engine_of(store_url)
    logged = select(audit_entries).where(audit_entries.c.kind == "task.expired")
    assert len(await engine.read(lambda c: c.execute(logged).all())) == 60
    await engine.close()
    for store in stores:
        await store.close()


async def test_expiry_and_resolution_at_once_settle_a_task_once(store_url: str) -> None:
    stores = [await open_store(store_url) for _ in range(2)]
    due = [a_task(due_at=NOW) for _ in range(30)]
    await asyncio.gather(*(stores[0].record(a_decision(), task) for task in due))
    resolving = [stores[1].resolve(Resolution(t.id, 1, Verdict.REJECT, "ann", NOW)) for t in due]
    expiring = asyncio.create_task(stores[0].expire_due(NOW, 100))
    resolved = await asyncio.gather(*resolving, return_exceptions=True)
    expired = await expiring
    won = [task.id for task in resolved if isinstance(task, TaskRecord)]
    assert sorted([*won, *(task.id for task in expired)]) == sorted(task.id for task in due)
    assert {type(each) for each in resolved} <= {TaskRecord, Conflict}
    states = await stores[0].settled([task.id for task in due])
    assert {task for task, state in states.items() if state is TaskState.RESOLVED} == set(won)
    for each in stores:
        await each.close()


@contextmanager
def _tmpfs(folder: Path) -> Iterator[Callable[[], None]]:
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={FULL_BYTES}", "tmpfs", folder], check=True
    )

    def grow() -> None:
        subprocess.run(["mount", "-o", f"remount,size={64 * FULL_BYTES}", folder], check=True)

    try:
        yield grow
    finally:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def _limited_files() -> Iterator[Callable[[], None]]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_BYTES, before[1]))

    def grow() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    try:
        yield grow
    finally:
        grow()


def small_disk(folder: Path) -> AbstractContextManager[Callable[[], None]]:
    """A folder with room for a megabyte, and the way to give it more: a real small disk where we may mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        return _limited_files()
    subprocess.run(["umount", folder], check=True)
    return _tmpfs(folder)


async def _is_stored(store: SqlStore, decision: DecisionRecord) -> bool:
    try:
        await store.record(decision)
    except StoreError:
        return False
    return True


async def test_full_disk_is_a_store_error_and_space_mends_it(tmp_path: Path) -> None:
    chance, acknowledged = random.Random(1), []
    with small_disk(tmp_path / "disk") as grow:
        store = await open_store(f"sqlite:///{tmp_path / 'disk' / 'holdgate.db'}")
        fits = True
        while fits:
            decision = a_decision(response=chance.randbytes(50_000))
            fits = await _is_stored(store, decision)
            acknowledged += [decision] * fits
        with pytest.raises(StoreError, match="the disk that holds the database file") as refused:
            await store.record(decision)
        assert refused.value.status == 503
        assert "retry-after" in refused.value.headers
        assert len(acknowledged) > 3
        assert await store.decision(decision.id) is None
        grow()
        await store.record(decision)
        for each in [*acknowledged, decision]:
            assert await store.decision(each.id) == each
        await store.close()


async def test_locked_file_is_a_store_error_in_time_and_release_mends_it(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "PATIENCE_S", 0.3)
    store, task = await open_store(sqlite_url), a_task()
    await store.record(a_decision(), task)
    other = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    began_s = time.monotonic()
    writes = [
        *(store.record(a_decision()) for _ in range(600)),
        *(store.claim(task.id, f"reviewer-{n}", NOW, 300) for n in range(5)),
        store.ping(),
    ]
    outcomes = await asyncio.gather(*writes, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {StoreError}
    assert "the database file is locked by another process" in {str(each) for each in outcomes}
    assert time.monotonic() - began_s < 3
    assert await store.task(task.id) is not None
    other.execute("ROLLBACK")
    other.close()
    await asyncio.gather(store.record(a_decision()), store.ping())
    assert (await store.claim(task.id, "ann", NOW, 300)).version == 2
    await store.close()


async def test_closed_store_is_a_store_error(sqlite_url: str) -> None:
    store = await open_store(sqlite_url)
    await store.close()
    with pytest.raises(StoreError, match="closed"):
        await store.record(a_decision())
    with pytest.raises(StoreError, match="closed"):
        await store.decision("hgd_1")


async def test_file_in_a_missing_folder_is_a_store_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"missing/holdgate\.db cannot be opened: No such file"):
        await open_store(f"sqlite:///{tmp_path / 'missing' / 'holdgate.db'}")


async def test_server_that_crashes_under_load_loses_nothing_acknowledged(
    postgres: Postgres,
) -> None:
    url = await asyncio.to_thread(postgres.new_database)
    store, acknowledged, refused = await open_store(url), [], asyncio.Event()
    enough, recovered = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        while not recovered.is_set():
            decision = a_decision(response=random.randbytes(3000))
            try:
                await store.record(decision, a_task())
                acknowledged.append(decision.id)
                if len(acknowledged) == 200:
                    enough.set()
                elif refused.is_set():
                    recovered.set()
            except StoreError:
                refused.set()

    async with asyncio.TaskGroup() as group:
        for _ in range(16):
            group.create_task(work())
        await enough.wait()
        await asyncio.to_thread(postgres.crash)
        await refused.wait()
        await asyncio.to_thread(postgres.start)
    await assert_stored(store, acknowledged)
    await store.close()


async def test_call_after_a_restart_of_the_server_works_at_once(postgres: Postgres) -> None:
    store = await open_store(await asyncio.to_thread(postgres.new_database))
    decision = a_decision()
    await asyncio.gather(store.record(decision, a_task()), store.decision("x"), store.ping())
    await asyncio.to_thread(postgres.crash)
    await asyncio.to_thread(postgres.start)
    again = a_decision()
    found, *_ = await asyncio.gather(store.decision(decision.id), store.record(again), store.ping())
    assert found == decision
    assert await store.decision(again.id) == again
    await store.close()


async def test_server_that_hangs_is_a_store_error_in_time(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.store.postgres.PATIENCE_S", 0.5)
    store = await open_store(await asyncio.to_thread(postgres.new_database))
    await store.record(a_decision())
    hung = psutil.Process(postgres.pid)
    processes = [hung, *hung.children(recursive=True)]
    for process in processes:
        process.suspend()
    began_s = time.monotonic()
    calls = [*(store.record(a_decision()) for _ in range(300)), store.ping(), store.decision("x")]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    waited_s = time.monotonic() - began_s
    for process in processes:
        process.resume()
    assert {str(each) for each in outcomes} == {"the database did not answer in time"}
    assert waited_s < 4
    await asyncio.gather(store.record(a_decision()), store.ping())
    await store.close()


async def test_server_that_is_gone_is_a_store_error_at_once(postgres: Postgres) -> None:
    url = await asyncio.to_thread(postgres.new_database)
    await asyncio.to_thread(postgres.crash)
    with pytest.raises(StoreError, match="cannot be reached"):
        await open_store(url)
    await asyncio.to_thread(postgres.start)


async def test_read_only_database_fails_ping_and_writes_and_can_be_read(postgres: Postgres) -> None:
    url = await asyncio.to_thread(postgres.new_database)
    store, decision = await open_store(url), a_decision()
    await store.record(decision)
    await store.close()
    engine: Engine = engine_of(url)
    name = url.split("/")[3].split("?")[0]
    read_only = text(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    await engine.write(lambda connection: connection.execute(read_only))
    await engine.close()
    store = await open_store(url)
    for write in (store.ping(), store.record(a_decision())):
        with pytest.raises(StoreError, match="read-only"):
            await write
    assert await store.decision(decision.id) == decision
    await store.close()


async def test_error_says_nothing_of_the_contents(store: SqlStore) -> None:
    decision = a_decision(request=b"CANARY", model="CANARY")
    await store.record(decision)
    with pytest.raises(StoreError) as refused:
        await store.record(decision)
    causes, error = [], refused.value
    while error is not None:
        causes.append(str(error))
        error = error.__cause__  # type: ignore[assignment]
    assert "CANARY" not in "".join(causes)
    assert "INSERT" not in str(refused.value)
