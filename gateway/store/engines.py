"""The two ways to run an operation: SQLite in threads, PostgreSQL on the event loop.

An operation is a function of a connection. `write` runs it in a transaction that is durable when `write` returns; a
`GatewayError` it raises undoes it and passes through; whatever else goes wrong undoes it and is a `StoreError`.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError

from gateway.errors import GatewayError, StoreError

T = TypeVar("T")
Operation = Callable[[Connection], T]

#: How long an operation may wait for a lock, a connection or an answer.
PATIENCE_S = 5.0


class Refused(StoreError):
    """The database is well but does not take these values; others it may take."""


class Engine(Protocol):
    """Runs operations. Every method may raise `StoreError`, after 2 x PATIENCE_S at most."""

    async def read(self, operation: Operation[T]) -> T:
        """Run an operation that only reads."""

    async def write(self, operation: Operation[T], *, patience_s: float | None = None) -> T:
        """Run an operation in a transaction, durable when this returns; `patience_s` is PATIENCE_S unless given."""

    def submit(self, operation: Operation[None], done: Callable[[Exception | None], None]) -> None:
        """Write without anybody awaiting it: `done` is called on the event loop, once it is durable or has failed."""

    async def close(self) -> None:
        """Finish what was begun and let go of threads and connections."""


_SQLITE_FAULTS = {
    sqlite3.SQLITE_BUSY: "the database file is locked by another process",
    sqlite3.SQLITE_LOCKED: "the database file is locked by another process",
    sqlite3.SQLITE_FULL: "the disk that holds the database file is full",
    sqlite3.SQLITE_READONLY: "the database file cannot be written: it or its folder is read-only",
    sqlite3.SQLITE_CANTOPEN: "the database file cannot be opened; do its folder and rights allow it?",
    sqlite3.SQLITE_PERM: "the database file cannot be opened; do its folder and rights allow it?",
    sqlite3.SQLITE_IOERR: "the disk that holds the database file cannot be read or written",
    sqlite3.SQLITE_CORRUPT: "the database file is damaged; restore it from a backup",
    sqlite3.SQLITE_NOTADB: "the file is not a SQLite database; name another",
}


def _sqlite_error(error: Exception) -> StoreError:
    cause = error.orig if isinstance(error, DBAPIError) else error
    code = getattr(cause, "sqlite_errorcode", None)
    fault = None if code is None else _SQLITE_FAULTS.get(code & 0xFF)
    if fault is not None:
        return StoreError(fault)
    return Refused(f"the database file does not take these values ({type(cause).__name__})")


def driver_of(connection: Connection) -> sqlite3.Connection:
    """SQLite's own connection: through SQLAlchemy to begin, insert and commit takes twice as long."""
    driver = connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)
    return driver


class SqliteEngine:
    """One SQLite file: a thread that writes, a few that read. Other processes may do the same."""

    def __init__(self, path: str) -> None:
        self._engine = create_engine(
            URL.create("sqlite", database=path),
            connect_args={
                "timeout": PATIENCE_S,
                "isolation_level": None,
                "check_same_thread": False,
            },
            hide_parameters=True,
        )
        event.listen(self._engine, "connect", _configure_sqlite)
        self._readers = ThreadPoolExecutor(3, thread_name_prefix="holdgate-read")
        self._connection: Connection | None = None
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._writer = threading.Thread(target=self._work, name="holdgate-write", daemon=True)
        self._writer.start()
        self._closed = False

    async def read(self, operation: Operation[T]) -> T:
        """Run an operation that only reads."""
        self._refuse_if_closed()
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._readers, self._read, operation)
        except GatewayError:
            raise
        except Exception as error:
            raise _sqlite_error(error) from error

    def _read(self, operation: Operation[T]) -> T:
        with self._engine.connect() as connection:
            return operation(connection)

    async def write(self, operation: Operation[T], *, patience_s: float | None = None) -> T:
        """Run an operation in a transaction, durable when this returns."""
        self._refuse_if_closed()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._jobs.put(_Job(operation, loop, patience_s or PATIENCE_S, partial(_settle, future)))
        return await future

    def submit(self, operation: Operation[None], done: Callable[[Exception | None], None]) -> None:
        """Write without anybody awaiting it: `done` is called on the event loop, once it is durable or has failed."""
        self._refuse_if_closed()
        loop = asyncio.get_running_loop()
        self._jobs.put(_Job(operation, loop, PATIENCE_S, lambda _, error: done(error)))

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run(self._write)
        if self._connection is not None:
            self._connection.close()

    def _write(self, operation: Operation[T]) -> T:
        if self._connection is None:
            self._connection = self._engine.connect()
        driver = driver_of(self._connection)
        try:
            driver.execute("BEGIN IMMEDIATE")
            result = operation(self._connection)
            self._connection.commit()
            driver.commit()
        except BaseException:
            self._connection.rollback()
            driver.rollback()
            raise
        return result

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise StoreError("the store is closed")

    async def close(self) -> None:
        """Finish what was begun and let go of threads and connections."""
        self._closed = True
        self._jobs.put(None)
        await asyncio.to_thread(self._writer.join)
        await asyncio.to_thread(self._readers.shutdown)
        self._engine.dispose()


class _Job:
    """An operation on its way to the writer thread, and who is to be told how it ended."""

    __slots__ = ("_deadline_s", "_done", "_loop", "_operation")

    def __init__(
        self,
        operation: Operation[Any],
        loop: asyncio.AbstractEventLoop,
        patience_s: float,
        done: Callable[[Any, Exception | None], None],
    ) -> None:
        self._operation = operation
        self._loop = loop
        self._deadline_s = time.monotonic() + patience_s
        self._done = done

    def run(self, write: Callable[[Operation[Any]], Any]) -> None:
        """Write and tell, unless the writer was busy for too long; called in the writer thread."""
        result, error = None, None
        try:
            if time.monotonic() > self._deadline_s:
                raise StoreError("the database file could not keep up")
            result = write(self._operation)
        except GatewayError as refused:
            error = refused
        except Exception as failed:  # noqa: BLE001 - the thread must outlive any operation
            error = _sqlite_error(failed)
            error.__cause__ = failed
        # The loop is closed if the process is going down; then nobody waits.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._done, result, error)


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _configure_sqlite(connection: sqlite3.Connection, _: object) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        # Two processes that turn on WAL at once: SQLite answers "locked" without waiting for the other.
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline_s:
                raise
            time.sleep(0.01)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA secure_delete = ON")
    # 16 MB: index pages are written back once for some hundred records; a quarter less CPU than the default 4 MB.
    connection.execute("PRAGMA wal_autocheckpoint = 4000")
