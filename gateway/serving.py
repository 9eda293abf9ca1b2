"""Running the application: one process or several, on one socket, stopped without losing anything."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NoReturn

import uvicorn
from uvicorn.supervisors import Multiprocess

from gateway import logs
from gateway.api.protocol import Protocol
from gateway.settings import Settings, load_settings

_KEEP_ALIVE_S = 75


def become_server(config_path: Path | None) -> NoReturn:
    """Have this process go on as the server, without what it has loaded so far (8 MB of a command line's libraries)."""
    os.environ["HOLDGATE_CONFIG"] = str(config_path.resolve()) if config_path else ""
    os.execv(sys.executable, [sys.executable, "-P", "-m", "gateway.serving"])


def _serve() -> None:
    """Serve until told to stop; prints one line to standard output when requests are answered."""
    path = os.environ["HOLDGATE_CONFIG"]
    settings = load_settings(Path(path) if path else None, os.environ)
    logs.configure(settings.log.level, settings.log.format)
    sock = _listen(settings)
    config = uvicorn.Config(
        "gateway.app:worker",
        factory=True,
        http=Protocol,
        loop="uvloop",
        ws="none",
        workers=settings.workers,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(settings.shutdown_grace_s),
        backlog=4096,
    )
    host, port = sock.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    threading.Thread(target=_announce, args=(url,), daemon=True).start()
    if settings.workers == 1:
        server = uvicorn.Server(config)
        server.run(sockets=[sock])
        if not server.started:
            sys.exit(1)
        return
    with tempfile.TemporaryDirectory(prefix="holdgate-metrics-") as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        Multiprocess(config, sockets=[sock]).run()


def _listen(settings: Settings) -> socket.socket:
    host = settings.listen.host
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, settings.listen.port))
    except OSError as error:
        sys.exit(
            f"Cannot listen on {host}:{settings.listen.port}: {error.strerror}. Choose another listen.port."
        )
    sock.listen(4096)
    sock.set_inheritable(True)
    return sock


def _announce(url: str) -> None:
    # A proxy that the environment names is for the way out, not for the way to ourselves.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            with opener.open(f"{url}/healthz", timeout=30):
                break
        except urllib.error.HTTPError:
            break
        except OSError:
            time.sleep(0.05)
    sys.stdout.write(f"holdgate ready on {url}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _serve()
