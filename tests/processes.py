"""Real servers for end-to-end tests: the demo upstream and the gateway, each a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from ruamel.yaml import YAML

from tests.services import new_sqlite

START_S = 30.0
STOP_S = 20.0


class Server:
    """A server process, from its ready line on; killed and restarted it keeps its port.

    `url` is its base URL without `/v1`; `stderr` and `stdout` are the files all its runs write to.
    """

    def __init__(
        self,
        name: str,
        argv: Callable[[int], list[str]],
        *,
        folder: Path,
        env: Mapping[str, str] | None = None,
        port: int = 0,
    ) -> None:
        self.name = name
        self.stderr = folder / f"{name}.stderr"
        self.stdout = folder / f"{name}.stdout"
        self.port = port
        self.url = ""
        self._argv = argv
        self._folder = folder
        self._env = _clean_environment() | dict(env or {})
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    @property
    def pid(self) -> int:
        """The process id of the run under way.

        Raises
        ------
        RuntimeError
            If there is none.
        """
        if self._process is None:
            raise RuntimeError(f"{self.name} is not running")
        return self._process.pid

    @property
    def errors(self) -> str:
        """Everything written to standard error so far."""
        return self.stderr.read_text(errors="replace")

    @property
    def tracebacks(self) -> str:
        """The lines of standard error that tell of exceptions nobody handled, as text or as JSON; empty if there are none."""
        signs = ("Traceback", '"exception":')
        lines = self.errors.splitlines()
        return "\n".join(line for line in lines if any(sign in line for sign in signs))[-4000:]

    def start(self) -> None:
        """Start, and return once the server says it is ready.

        Raises
        ------
        RuntimeError
            If it ends, or START_S pass, before it is.
        """
        with self.stderr.open("a") as stderr:
            self._process = subprocess.Popen(
                self._argv(self.port),
                cwd=self._folder,
                env=self._env,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        if self._process.stdout is None:
            raise RuntimeError("a pipe was asked for")
        said_something = threading.Event()
        self._reader = threading.Thread(
            target=self._read, args=(self._process.stdout, said_something), daemon=True
        )
        self.url = ""
        self._reader.start()
        said_something.wait(START_S)
        if not self.url:
            self.kill()
            raise RuntimeError(f"{self.name} did not get ready; it said:\n{self.errors[-4000:]}")
        self.port = int(self.url.rpartition(":")[2])

    def _read(self, stdout: TextIO, said_something: threading.Event) -> None:
        """Keep standard output flowing; the first line that names a URL is the ready line."""
        with stdout, self.stdout.open("a") as copy:
            for line in stdout:
                copy.write(line)
                copy.flush()
                if not self.url and " ready on http://" in line:
                    self.url = line.split()[-1]
                    said_something.set()
        said_something.set()

    def stop(self) -> int:
        """End the run with SIGTERM; give its exit status, 0 if there is no run.

        Raises
        ------
        RuntimeError
            If it has not ended after STOP_S; it is then killed.
        """
        if self._process is None:
            return 0
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise RuntimeError(
                f"{self.name} did not stop on SIGTERM:\n{self.errors[-4000:]}"
            ) from error
        self._forget()
        return status

    def kill(self) -> None:
        """End the run with SIGKILL, workers included."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._forget()

    def restart(self) -> None:
        """Start again on the same port, with the same store; a run under way is stopped first."""
        self.stop()
        self.start()

    def _forget(self) -> None:
        if self._reader is not None:
            self._reader.join(STOP_S)
        self._process = self._reader = None


def _clean_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI_", "HOLDGATE_"))}


@contextmanager
def start_upstream(folder: Path, *, port: int = 0) -> Iterator[Server]:
    """Run the demo upstream until the block is left; its output goes to files in `folder`."""

    def argv(port: int) -> list[str]:
        return [sys.executable, "-P", "-c", f"from gateway.demo import main; main({port})"]

    with _running(Server("upstream", argv, folder=folder, port=port)) as server:
        yield server


@contextmanager
def start_gateway(
    config: Path, *, env: Mapping[str, str] | None = None, name: str = "gateway"
) -> Iterator[Server]:
    """Run `holdgate serve` with this holdgate.yaml until the block is left.

    Its output goes to files named after `name` beside it. Once it has a port it keeps it: a restart
    writes the port into the file.
    """

    def argv(port: int) -> list[str]:
        if port:
            _edit(config, port)
        return [sys.executable, "-P", "-m", "gateway.cli", "serve", "--config", str(config)]

    with _running(Server(name, argv, folder=config.parent, env=env)) as server:
        yield server


@contextmanager
def _running(server: Server) -> Iterator[Server]:
    server.start()
    try:
        yield server
    finally:
        server.stop()


def write_config(
    folder: Path,
    *,
    upstream_url: str,
    policies: Mapping[str, str],
    store_url: str | None = None,
    redis_url: str | None = None,
    **settings: Any,
) -> Path:
    """Write `holdgate.yaml` and the policies (name to YAML text) into `folder`; give its path.

    Further `settings` are top-level keys of the file and replace what is written by default.
    """
    (folder / "policies").mkdir(parents=True, exist_ok=True)
    for name, text in policies.items():
        (folder / "policies" / f"{name}.yaml").write_text(text)
    document: dict[str, Any] = {
        "listen": {"host": "127.0.0.1", "port": 0},
        "store": {"url": store_url or new_sqlite(folder / "holdgate.db")},
        "redis": {"url": redis_url},
        "policies": "policies/",
        "models": [{"match": "*", "base_url": f"{upstream_url}/v1", "api_key_env": None}],
        **settings,
    }
    config = folder / "holdgate.yaml"
    _yaml().dump(document, config)
    return config


def _edit(config: Path, port: int) -> None:
    document = _yaml().load(config)
    document["listen"]["port"] = port
    _yaml().dump(document, config)


def _yaml() -> YAML:
    return YAML(typ="safe", pure=True)
