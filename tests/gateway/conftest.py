"""Stores of both kinds, and the servers behind them."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import uvloop

from gateway.store import SqlStore, open_store
from gateway.store.engines import Engine
from tests.gateway.stores import engine_of
from tests.services import Postgres, new_sqlite, postgres, redis_server

__all__ = ["postgres", "redis_server"]


#: Tests of what speaks to sockets itself run on the event loop that the gateway runs on.
_ON_SOCKETS = ("test_openai_edge", "test_servers", "test_upstream")


def pytest_asyncio_loop_factories(
    item: pytest.Item,
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Which event loop a test runs on."""
    if item.path.stem in _ON_SOCKETS:
        return {"uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of a SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'holdgate.db'}"


@pytest.fixture(params=["sqlite", "postgres"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new database with our schema, once of each kind."""
    if request.param == "sqlite":
        return new_sqlite(tmp_path / "holdgate.db")
    server: Postgres = request.getfixturevalue("postgres")
    return server.new_database()


@pytest.fixture(params=["sqlite", "postgres"])
def empty_url(request: pytest.FixtureRequest, sqlite_url: str) -> str:
    """The URL of a new database with nothing in it, once of each kind."""
    if request.param == "sqlite":
        return sqlite_url
    server: Postgres = request.getfixturevalue("postgres")
    return server.new_database(empty=True)


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[SqlStore]:
    """A store on a new database, once of each kind."""
    opened = await open_store(store_url)
    yield opened
    await opened.close()


@pytest.fixture
async def engine(store: SqlStore, store_url: str) -> AsyncIterator[Engine]:
    """Direct access to the database of `store`."""
    opened = engine_of(store_url)
    yield opened
    await opened.close()


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with the schema and nothing in it, to be copied: making one takes a second."""
    path = tmp_path_factory.mktemp("store") / "empty.db"

    async def make() -> None:
        await (await open_store(f"sqlite:///{path}")).close()

    asyncio.run(make())
    return path


@pytest.fixture
async def sqlite_store(empty_database: Path, tmp_path: Path) -> AsyncIterator[SqlStore]:
    """A new, empty SQLite store."""
    path = shutil.copy(empty_database, tmp_path / "holdgate.db")
    opened = await open_store(f"sqlite:///{path}")
    yield opened
    await opened.close()


@pytest.fixture
def database(tmp_path: Path, sqlite_store: SqlStore) -> Path:
    """The file of the store."""
    return tmp_path / "holdgate.db"
