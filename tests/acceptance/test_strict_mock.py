"""What passes through, against a mock of OpenAI's whole API that others wrote: nothing on the way may change a byte.

The mock (`@stdy/cli`) serves OpenAI's own OpenAPI document and answers 400 to every request that the document does not allow, so
that a good answer through the gateway says that the request arrived as it was sent.
"""

from __future__ import annotations

import asyncio
import lzma
import os
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.acceptance.openapi import Operation, operations
from tests.processes import start_gateway, write_config

NODE = Path(__file__).parent / "node"
DOCUMENT = Path(__file__).parent.parent / "vectors" / "openai" / "openapi.yaml.xz"
CHECKED = {("POST", path) for path in ("/chat/completions", "/completions", "/responses")}
#: The list of what the provider stored is read too, to leave out what its client did not get.
READ = CHECKED | {("GET", "/chat/completions")}
RETURNS = """\
policy: returns
match: {model: "*"}
risk: {base: low}
confidence: {source: none, when_uncalibrated: return}
stages: [{name: rules, checks: [{id: secrets, use: secrets, on_fail: block}]}]
"""


@pytest.fixture(scope="module")
def mock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the mock."""
    folder = tmp_path_factory.mktemp("mock")
    document = folder / "openapi.yaml"
    document.write_bytes(lzma.decompress(DOCUMENT.read_bytes()))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    log = folder / "mock.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [NODE / "node_modules/.bin/steady", "--host", "127.0.0.1", "-p", port, "-q", document],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline_s = time.monotonic() + 40
        while not _answers(int(port)):
            if process.poll() is not None or time.monotonic() > deadline_s:
                pytest.fail(f"the mock did not start: {log.read_text()}")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def _answers(port: int) -> bool:
    """Whether anything listens there; what the mock prints depends on where it runs."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def document(mock: str) -> dict[str, Any]:
    """The document as the mock has read it."""
    found: dict[str, Any] = httpx.get(f"{mock}/_x-steady/spec", timeout=20).json()
    return found


@pytest.fixture(scope="module")
def unchecked(document: dict[str, Any]) -> list[Operation]:
    """The operations whose responses are not read."""
    return [each for each in operations(document) if (each.method, each.path) not in READ]


@pytest.fixture(scope="module")
def through(mock: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a gateway before the mock; its policy returns everything."""
    config = write_config(
        tmp_path_factory.mktemp("through"),
        policies={"returns": RETURNS},
        upstream_url=mock,
        models=[{"match": "*", "base_url": mock}],
    )
    with start_gateway(config) as server:
        yield f"{server.url}/v1"
    assert not server.tracebacks


def _told(response: httpx.Response) -> tuple[Any, ...]:
    """What must be the same: status, every byte, and the headers that describe it or that the mock adds."""
    described = ("content-type", "content-encoding", "vary", "x-steady-")
    headers = [pair for pair in response.headers.multi_items() if pair[0].startswith(described)]
    return response.status_code, response.content, headers


@dataclass(slots=True)
class Comparison:
    """Every answer twice from the mock itself and once through the gateway.

    `different` are those that the gateway changed, `varying` those that the mock itself never gives twice. `told` is what
    the gateway says it did on the operations that it did not pass on unchecked.
    """

    direct: httpx.AsyncClient
    gated: httpx.AsyncClient
    different: list[str] = field(default_factory=list)
    varying: list[tuple[str, str]] = field(default_factory=list)
    compared: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    told: dict[tuple[str, str], str | None] = field(default_factory=dict)

    async def of(self, asked: Iterable[Operation]) -> None:
        """Compare all of these, a few at a time."""
        room = asyncio.Semaphore(8)

        async def add(operation: Operation) -> None:
            async with room:
                await self._add(operation)

        await asyncio.gather(*map(add, asked))

    async def _add(self, operation: Operation) -> None:
        once, again, gated = [
            await client.request(operation.method, operation.path, **operation.options)
            for client in (self.direct, self.direct, self.gated)
        ]
        name = operation.method, operation.path
        if (action := gated.headers.get("x-holdgate-action")) != "passthrough":
            self.told[name] = action
        if _told(once) != _told(again):
            self.varying.append(name)
        elif _told(once) != _told(gated):
            self.different.append(f"{name}: {_told(once)!r:.900} became {_told(gated)!r:.900}")
        else:
            self.compared[operation.method] += 1
            self.statuses[once.status_code] += 1


@pytest.fixture
async def comparison(mock: str, through: str) -> AsyncIterator[Comparison]:
    """Nothing compared yet."""
    headers = {"authorization": "Bearer sk-mock", "x-steady-stream-interval-ms": "1"}
    options: dict[str, Any] = {"headers": headers, "timeout": 30, "trust_env": False}
    async with (
        httpx.AsyncClient(base_url=mock, **options) as direct,
        httpx.AsyncClient(base_url=through, **options) as gated,
    ):
        yield Comparison(direct, gated)


def _with(operation: Operation, **headers: str) -> Operation:
    headers = {**operation.options["headers"], **headers}
    return replace(operation, options=operation.options | {"headers": headers})


async def test_every_operation_of_the_api_passes_through_unchanged(
    comparison: Comparison, document: dict[str, Any]
) -> None:
    plain = (_with(each, **{"accept-encoding": "identity"}) for each in operations(document))
    await comparison.of(plain)
    assert comparison.different == [], "\n\n".join(comparison.different)
    assert comparison.varying == []
    assert comparison.compared == {"GET": 122, "POST": 123, "DELETE": 43}
    assert comparison.statuses == {200: 285, 201: 3}
    assert comparison.told == dict.fromkeys(CHECKED, "return")


async def test_compressed_answers_stay_compressed_where_nothing_is_checked(
    comparison: Comparison, unchecked: list[Operation]
) -> None:
    await comparison.of(_with(each, **{"accept-encoding": "gzip"}) for each in unchecked)
    assert comparison.different == [], "\n\n".join(comparison.different)
    assert comparison.compared.total() == 283


async def test_event_streams_pass_through_unchanged(
    comparison: Comparison, unchecked: list[Operation]
) -> None:
    streamed = [each for each in unchecked if "text/event-stream" in each.produces]
    await comparison.of(_with(each, accept="text/event-stream") for each in streamed)
    assert comparison.different == [], "\n\n".join(comparison.different)
    assert comparison.compared == {"POST": 4}


async def test_what_the_provider_refuses_is_refused_in_its_own_words(
    comparison: Comparison, unchecked: list[Operation]
) -> None:
    wrong = {"content": b"never asked for", "headers": {"content-type": "text/plain"}}
    bodies = [each for each in unchecked if each.options.keys() & {"json", "files"}]
    await comparison.of(replace(each, options=wrong) for each in bodies)
    assert comparison.different == [], "\n\n".join(comparison.different)
    assert comparison.statuses == {400: 106}
