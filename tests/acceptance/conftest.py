"""One gateway with a policy for each task that these tests name, and an upstream that sends given bytes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

import httpx
import openai
import pytest

from gateway.settings import PACKAGED_CONFIG
from tests.processes import Server, start_gateway, write_config
from tests.services import postgres, redis_server

__all__ = ["postgres", "redis_server"]

_FORBIDDEN = [{"name": "code", "pattern": "CODE-[0-9]{4}"}]
_ALL = ["text", "tool_arguments", "refusal", "reasoning"]
_SECRETS = {"id": "secrets", "use": "secrets", "target": _ALL, "on_fail": "block"}
_CODE = {"id": "code", "use": "forbid", "patterns": _FORBIDDEN, "target": _ALL, "on_fail": "block"}
_ORDERS = [{"name": "order", "pattern": "ORD-[0-9]{6}"}]
_MASK = {"id": "orders", "use": "redact", "patterns": _ORDERS, "target": _ALL}
_WATCH = {"id": "code", "use": "forbid", "patterns": _FORBIDDEN, "on_fail": "flag"}
_EVERYTHING = (
    {"id": "finished", "use": "finish_reason", "on_fail": "flag"},
    {"id": "secrets", "use": "secrets", "target": _ALL, "on_fail": "hold"},
    {"id": "pii", "use": "pii", "target": _ALL, "on_fail": "redact"},
    {"id": "tools", "use": "tool_calls", "max": 1, "on_fail": "flag"},
    {"id": "words", "use": "forbid", "patterns": "(?i)pass.?word|secret", "on_fail": "score"},
    {"id": "size", "use": "length", "max_chars": 80, "on_fail": "flag"},
    _CODE,
)
_SCORED = {"calibrator": "demo", "when_uncalibrated": "return"}
_HELD = {"source": "none", "when_uncalibrated": "hold"}


def _policy(task: str, *checks: object, **document: Any) -> str:
    """A policy for one task that returns what its checks do not object to."""
    stages = [{"name": "rules", "checks": checks}] if checks else []
    base = {"policy": task, "match": {"task": task}, "risk": {"base": "low"}, "stages": stages}
    confidence = {"source": "none", "when_uncalibrated": "return"}
    return json.dumps({**base, "confidence": confidence, **document})


POLICIES = {
    "plain": _policy("plain"),
    "whole": _policy("whole", stream="buffer"),
    "guard": _policy("guard", _SECRETS, _CODE, _MASK, stream="buffer"),
    "window": _policy("window", _CODE, _MASK, stream="window"),
    "watch": _policy("watch", _WATCH, stream="observe"),
    "scored": _policy("scored", confidence=_SCORED, stream="buffer"),
    "scored-live": _policy("scored-live", confidence=_SCORED, stream="observe"),
    "scored-window": _policy("scored-window", _CODE, confidence=_SCORED, stream="window"),
    "everything": _policy("everything", *_EVERYTHING, confidence=_SCORED, stream="buffer"),
    "hold": _policy("hold", confidence=_HELD, hold={"wait": "0s"}),
    "wait": _policy("wait", confidence=_HELD, hold={"wait": "20s"}),
    "placeholder": _policy("placeholder", confidence=_HELD, hold={"as": "placeholder"}),
}


@dataclass(slots=True)
class FixedUpstream:
    """An upstream that answers a model with exactly the bytes set for it: content type, then pieces, sent one by one."""

    url: str
    answers: dict[str, tuple[str, list[bytes]]] = field(default_factory=dict)
    requests: list[bytes] = field(default_factory=list)


@pytest.fixture(scope="session")
def fixed_upstream() -> Iterator[FixedUpstream]:
    """A server for the models `fixed-*` of the gateway `holdgate`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            upstream.requests.append(body)
            content_type, pieces = upstream.answers[json.loads(body)["model"]]
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for piece in [*pieces, b""]:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                self.wfile.flush()

        def log_message(self, *_: object) -> None:
            """Say nothing: standard error belongs to the tests."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        upstream = FixedUpstream(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield upstream
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def holdgate(
    upstream: Server, fixed_upstream: FixedUpstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A gateway with all of `POLICIES`; what names no task of theirs passes unchecked."""
    with _gateway(tmp_path_factory.mktemp("holdgate"), upstream, fixed_upstream) as server:
        yield server
    assert not server.tracebacks


@pytest.fixture(scope="session")
def hasty(
    upstream: Server, fixed_upstream: FixedUpstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The same gateway, but one that sends a keep-alive comment after a fifth of a second."""
    folder = tmp_path_factory.mktemp("hasty")
    with _gateway(folder, upstream, fixed_upstream, hold={"keepalive_s": 0.2}) as server:
        yield server
    assert not server.tracebacks


def _gateway(
    folder: Path, upstream: Server, fixed: FixedUpstream, **settings: Any
) -> AbstractContextManager[Server]:
    models = [
        {"match": "fixed-*", "base_url": f"{fixed.url}/v1"},
        {"match": "*", "base_url": f"{upstream.url}/v1"},
    ]
    config = write_config(
        folder,
        policies=POLICIES,
        upstream_url=upstream.url,
        calibrators=str(PACKAGED_CONFIG / "calibrators"),
        models=models,
        **settings,
    )
    return start_gateway(config, name=folder.name)


@pytest.fixture
def http(holdgate: Server) -> Iterator[httpx.Client]:
    """A plain HTTP client of `holdgate`, for paths below /v1."""
    with httpx.Client(base_url=f"{holdgate.url}/v1/", timeout=20, verify=False) as client:
        yield client


class ClientFor(Protocol):
    """Makes official clients as an application makes them, retries and all."""

    def __call__(self, task: str, server: Server | None = None, **options: Any) -> openai.OpenAI:
        """Give a client whose every request names the task; `options` are those of `OpenAI`."""


@pytest.fixture
def client_for(holdgate: Server) -> Iterator[ClientFor]:
    """A way to make official clients of `holdgate` or another gateway."""
    with ExitStack() as stack:

        def make(task: str, server: Server | None = None, **options: Any) -> openai.OpenAI:
            given: dict[str, Any] = {
                "base_url": f"{(server or holdgate).url}/v1",
                "api_key": "sk-test-client",
                "timeout": 20,
                "http_client": openai.DefaultHttpxClient(verify=False),
                "default_headers": {"x-holdgate-task": task},
            }
            return stack.enter_context(openai.OpenAI(**given | options))

        yield make


class Submit(Protocol):
    """Settles the review of a decision."""

    def __call__(self, decision_id: str, verdict: str, **more: Any) -> None:
        """Submit a verdict, once there is a task to submit it to."""


@pytest.fixture
def submit(holdgate: Server) -> Iterator[Submit]:
    """A reviewer at `holdgate`."""
    with httpx.Client(base_url=holdgate.url, timeout=20, verify=False) as reviewer:

        def settle(decision_id: str, verdict: str, **more: Any) -> None:
            shown = reviewer.get(f"/decisions/{decision_id}").raise_for_status().json()
            path = f"/review/{shown['review']['id']}/submit"
            reviewer.post(path, json={"verdict": verdict, **more}).raise_for_status()

        yield settle
