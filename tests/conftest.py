"""Fixtures that start real servers and the official client."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import httpx
import openai
import pytest
from hypothesis import settings

from tests.processes import Server, start_gateway, start_upstream, write_config

# How long an example takes is for benchmarks: a busy machine fails no test.
settings.register_profile("holdgate", deadline=None)
settings.load_profile("holdgate")


class GatewayFactory(Protocol):
    """Starts a gateway in front of the demo upstream; it stops with the test."""

    def __call__(
        self,
        policies: Mapping[str, str],
        *,
        env: Mapping[str, str] | None = None,
        name: str = "gateway",
        **settings: Any,
    ) -> Server:
        """Give the running gateway; `settings` are those of `write_config`."""


@pytest.fixture(scope="session")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo upstream, one process for the whole run."""
    with start_upstream(tmp_path_factory.mktemp("upstream")) as server:
        yield server
    assert not server.tracebacks


class UpstreamCalls(Protocol):
    """What the upstream was asked since the test began: `GET /calls`, dicts of `CallRecord`."""

    def __call__(self, *, started: int = 0, finished: int = 0) -> list[dict[str, Any]]:
        """Give the calls once so many have started and finished, or after ten seconds."""


@pytest.fixture
def upstream_calls(upstream: Server) -> UpstreamCalls:
    """A way to read the upstream's log of calls, emptied before the test."""
    httpx.delete(f"{upstream.url}/calls")

    def calls(*, started: int = 0, finished: int = 0) -> list[dict[str, Any]]:
        wanted = {"started": started, "finished": finished}
        answer = httpx.get(f"{upstream.url}/calls", params=wanted, timeout=20)
        return list(answer.json()["calls"])

    return calls


@pytest.fixture
def gateway(upstream: Server, tmp_path: Path) -> Iterator[GatewayFactory]:
    """A way to start gateways, each in its own folder; none may have left a traceback behind."""
    started: list[Server] = []
    with ExitStack() as stack:

        def start(
            policies: Mapping[str, str],
            *,
            env: Mapping[str, str] | None = None,
            name: str = "gateway",
            **settings: Any,
        ) -> Server:
            settings = {"upstream_url": upstream.url} | settings
            config = write_config(tmp_path / name, policies=policies, **settings)
            started.append(stack.enter_context(start_gateway(config, env=env, name=name)))
            return started[-1]

        yield start
    for server in started:
        assert not server.tracebacks


@pytest.fixture
def openai_client() -> Iterator[Callable[..., openai.OpenAI]]:
    """A way to make official clients, `openai_client(url)`; they do not retry unless told."""
    with ExitStack() as stack:

        def make(url: str, **options: Any) -> openai.OpenAI:
            given: dict[str, Any] = {"api_key": "sk-test-client", "max_retries": 0, "timeout": 20}
            return stack.enter_context(openai.OpenAI(base_url=f"{url}/v1", **given | options))

        yield make
