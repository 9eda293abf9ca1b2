"""Real, throw-away PostgreSQL and Redis servers for the tests and benchmarks; both can be killed and started again."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy.engine import make_url

from gateway.store import open_store

_START_S = 30.0


class ServiceMissing(Exception):
    """A server that the tests need is not installed."""


def _program(name: str) -> str:
    """The newest installed program of that name; Debian keeps PostgreSQL's out of PATH."""
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=_version, reverse=True)
    found = shutil.which(name) or (str(debian[0]) if debian else None)
    if found is None:
        raise ServiceMissing(
            f"{name} is not installed and `make test` skips nothing: "
            "run `make services`, or install postgresql and redis-server"
        )
    return found


def _version(program: Path) -> int:
    name = program.parent.parent.name
    return int(name) if name.isdigit() else 0


class _Server:
    """A server process in the foreground, in a folder of its own."""

    _quickest_end = signal.SIGKILL

    def __init__(self, kind: str, *, user: str | None = None) -> None:
        # Not pytest's tmp_path: the path of a unix socket is limited to 107 bytes, and `user` must get in.
        self.folder = Path(tempfile.mkdtemp(prefix=f"holdgate-{kind}-"))
        self._user = user if user and os.geteuid() == 0 else None
        if self._user:
            shutil.chown(self.folder, self._user)
        self._log = (self.folder / "log").open("ab")
        self._process: subprocess.Popen[bytes] | None = None

    def _spawn(self, command: list[str], ready: Path) -> None:
        ready.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=self._log, user=self._user, cwd=self.folder
        )
        deadline_s = time.monotonic() + _START_S
        while not _listens(ready):
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError((self.folder / "log").read_text())
            time.sleep(0.01)

    @property
    def pid(self) -> int:
        """The id of the running process."""
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self._process is not None and self._process.poll() is None

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End the process without warning, and wait until it is gone."""
        assert self._process is not None
        self._process.send_signal(how)
        self._process.wait(_START_S)

    def remove(self) -> None:
        """Stop the server if it runs and delete its folder."""
        if self.is_running:
            self.kill(self._quickest_end)
        self._log.close()
        shutil.rmtree(self.folder)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def migrate(url: str) -> None:
    """Give an empty database our schema."""

    async def run() -> None:
        await (await open_store(url)).close()

    with ThreadPoolExecutor(1) as elsewhere:
        elsewhere.submit(asyncio.run, run()).result()


@lru_cache
def _sqlite_template() -> bytes:
    with tempfile.TemporaryDirectory(prefix="holdgate-template-") as folder:
        path = Path(folder) / "holdgate.db"
        migrate(f"sqlite:///{path}")
        return path.read_bytes()


def new_sqlite(path: Path) -> str:
    """The URL of a new SQLite file with our schema."""
    path.write_bytes(_sqlite_template())
    return f"sqlite:///{path}"


class Postgres(_Server):
    """A PostgreSQL cluster on a unix socket. `durable`: with fsync, for measurements."""

    _quickest_end = signal.SIGQUIT

    def __init__(self, *, durable: bool = False) -> None:
        super().__init__("postgres", user="postgres")
        initdb = [_program("initdb"), "-D", "data", "-U", "holdgate", "-A", "trust", "-E", "UTF8"]
        subprocess.run(
            [*initdb, "--no-sync", "--no-locale"],
            check=True,
            stdout=self._log,
            stderr=self._log,
            user=self._user,
            cwd=self.folder,
        )
        self._durable = durable
        self._template: str | None = None
        self.start()

    def start(self) -> None:
        """Start, or start again after `kill`; what was committed is there."""
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.folder),
            "fsync": "on" if self._durable else "off",
            "full_page_writes": "on" if self._durable else "off",
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        command = [_program("postgres"), "-D", "data", *options]
        self._spawn(command, self.folder / ".s.PGSQL.5432")
        asyncio.run(self._answer())

    async def _answer(self) -> None:
        deadline_s = time.monotonic() + _START_S
        while True:
            try:
                await (await asyncpg.connect(self.url("postgres"))).close()
                return
            except asyncpg.CannotConnectNowError:
                if time.monotonic() > deadline_s:
                    raise
                await asyncio.sleep(0.02)

    def crash(self) -> None:
        """Stop at once, as a crash does: nothing is flushed, every connection is cut."""
        self.kill(signal.SIGQUIT)

    def url(self, database: str) -> str:
        """The URL of a database of this cluster."""
        return f"postgresql://holdgate@/{database}?host={self.folder}"

    def new_database(self, *, empty: bool = False) -> str:
        """The URL of a new database with our schema, or of an empty one."""
        if self._template is None and not empty:
            url = self.new_database(empty=True)
            migrate(url)
            self._template = make_url(url).database
        name = f"test_{secrets.token_hex(6)}"
        template = "template1" if empty else self._template
        psql = [_program("psql"), "-h", str(self.folder), "-U", "holdgate", "-q", "postgres"]
        subprocess.run([*psql, "-c", f"CREATE DATABASE {name} TEMPLATE {template}"], check=True)
        return self.url(name)


class Redis(_Server):
    """A Redis server on a unix socket that keeps nothing."""

    def __init__(self) -> None:
        super().__init__("redis")
        self._socket = self.folder / "socket"
        self.url = f"unix://{self._socket}"
        self.start()

    def start(self) -> None:
        """Start, or start again after `kill`."""
        command = [_program("redis-server"), "--port", "0", "--unixsocket", str(self._socket)]
        self._spawn([*command, "--save", "", "--appendonly", "no"], self._socket)

    def restart(self) -> None:
        """Kill it if it runs, and start it."""
        if self.is_running:
            self.kill()
        self.start()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server that lives as long as the test run; a test that kills it starts it again."""
    server = Postgres()
    yield server
    server.remove()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Redis]:
    """A Redis server that lives as long as the test run; a test that kills it starts it again."""
    server = Redis()
    yield server
    server.remove()
