"""PostgreSQL: the engine for many replicas. Imported only when it is used: asyncpg and what it needs are 7 MB."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

import asyncpg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from gateway.errors import GatewayError, StoreError
from gateway.store.engines import PATIENCE_S, Operation, Refused, T

_POSTGRES_FAULTS = {
    "25006": "the database is read-only; is this a standby?",
    "28": "the database does not accept this user or password",
    "3D": "the database of that name does not exist; create it",
    "42501": "the database user may not write to these tables; grant it",
    "53100": "the disk that holds the database is full",
    "53300": "the database has no connection to spare",
    "57": "the database is shutting down or starting",
}


def _postgres_error(error: BaseException) -> StoreError:
    cause = error.orig if isinstance(error, DBAPIError) else error
    state = getattr(cause, "sqlstate", None) or ""
    fault = _POSTGRES_FAULTS.get(state) or _POSTGRES_FAULTS.get(state[:2])
    if fault is not None:
        return StoreError(fault)
    if state.startswith(("22", "23")):
        return Refused(f"the database does not take these values (SQLSTATE {state})")
    if isinstance(cause, TimeoutError):
        return StoreError("the database did not answer in time")
    return StoreError(f"the database cannot be reached or failed ({state or type(cause).__name__})")


class PostgresEngine:
    """A PostgreSQL database, by a libpq URL."""

    def __init__(self, url: str) -> None:
        self._engine = create_async_engine(
            "postgresql+asyncpg://",
            async_creator=partial(asyncpg.connect, url, timeout=PATIENCE_S),
            pool_timeout=PATIENCE_S,
            hide_parameters=True,
        )
        self._writing: set[asyncio.Task[None]] = set()
        self._reading = self._engine.execution_options(isolation_level="AUTOCOMMIT")

    async def read(self, operation: Operation[T]) -> T:
        """Run an operation that only reads."""
        return await self._run(self._reading, operation, PATIENCE_S)

    async def write(self, operation: Operation[T], *, patience_s: float | None = None) -> T:
        """Run an operation in a transaction, durable when this returns."""
        return await self._run(self._engine, operation, patience_s or PATIENCE_S)

    def submit(self, operation: Operation[None], done: Callable[[Exception | None], None]) -> None:
        """Write without anybody awaiting it: `done` is called on the event loop, once it is durable or has failed."""
        writing = asyncio.create_task(self._report(operation, done))
        self._writing.add(writing)
        writing.add_done_callback(self._writing.discard)

    async def _report(
        self, operation: Operation[None], done: Callable[[Exception | None], None]
    ) -> None:
        failed: Exception | None = None
        try:
            await self.write(operation)
        except GatewayError as error:
            failed = error
        done(failed)

    async def _run(self, engine: AsyncEngine, operation: Operation[T], patience_s: float) -> T:
        try:
            async with asyncio.timeout(patience_s):
                try:
                    return await _transact(engine, operation)
                except DBAPIError as error:
                    if not error.connection_invalidated:
                        raise
                # A connection of the pool that a restart of the server had cut: nothing was committed on it.
                return await _transact(engine, operation)
        except GatewayError:
            raise
        except Exception as error:
            raise _postgres_error(error) from error

    async def close(self) -> None:
        """Finish what was begun and let go of connections."""
        await self._engine.dispose()


async def _transact(engine: AsyncEngine, operation: Operation[T]) -> T:
    async with engine.connect() as connection:
        result = await connection.run_sync(operation)
        try:
            await connection.commit()
        except DBAPIError as error:
            # Whether it was committed is not known, so it must not be tried again.
            raise _postgres_error(error) from error
        return result
