"""The processes of a demo: servers of ours that run until it ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_START_S = 60.0


def is_taken(port: int) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def server(folder: Path, *arguments: str, **environment: str) -> Iterator[str]:
    """A server process of ours and its address, once it is ready; stopped in the end. `environment` is added to ours."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("HOLDGATE_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway.cli", *arguments],
        stdout=subprocess.PIPE,
        cwd=folder,
        env=ours | environment,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    watchdog = threading.Timer(_START_S, process.kill)
    watchdog.start()
    try:
        ready = process.stdout.readline()
        watchdog.cancel()
        if " ready on " not in ready:
            raise RuntimeError(f"`holdgate {arguments[0]}` did not start")
        threading.Thread(target=_drain, args=(process.stdout,), daemon=True).start()
        yield ready.split()[-1]
    finally:
        watchdog.cancel()
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)
        process.kill()


def _drain(stream: IO[str]) -> None:
    for _ in stream:
        pass
