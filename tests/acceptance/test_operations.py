"""What operators rely on: health, metrics, logs, keys and roles, and thousands of waiting clients."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.acceptance.acting import Reviewer, caller, policy, request, scripted, until
from tests.conftest import GatewayFactory, UpstreamCalls
from tests.processes import Server, start_gateway, write_config

MARKER = "plesiosaurus"
PROVIDER_KEY = "sk-provider-0001"
CHAT = "/v1/chat/completions"
RETURN = "confidence: {source: none, when_uncalibrated: return}\n"
BLOCK = (
    "policy: blocked\nmatch: {task: blocked}\nstages: [{name: rules, checks: [{id: word, use: forbid,"
    f" patterns: [{{name: word, pattern: {MARKER}}}], on_fail: block}}]}}]\n{RETURN}"
)
POLICIES = {
    "1-held": policy("held", "hold: {wait: 50s}"),
    "2-at-once": policy("at_once", "hold: {wait: 0s}"),
    "3-blocked": BLOCK,
    "4-plain": f"policy: plain\n{RETURN}",
}


def holdgate(server: Server, *arguments: str) -> str:
    """What `holdgate` prints to standard output when it is run with the gateway's settings."""
    config = str(server.stderr.parent / "holdgate.yaml")
    command = [sys.executable, "-P", "-m", "gateway.cli", *arguments, "--config", config]
    env = {**os.environ, "PROVIDER_KEY": PROVIDER_KEY}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True, env=env)
    return ended.stdout


async def make_key(server: Server, name: str, role: str) -> str:
    """A key made on the command line."""
    made = await asyncio.to_thread(holdgate, server, "key", "create", name, "--role", role)
    return made.strip()


async def ask(
    http: httpx.AsyncClient, task: str = "any", text: str = MARKER, **script: Any
) -> httpx.Response:
    """Ask for a response that says the text."""
    return await http.post(CHAT, json=request("chat", task, scripted(text=text, **script)))


async def samples(http: httpx.AsyncClient) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of /metrics by name and labels."""
    answer = await http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


# --------------------------------------------------------------------------------------- without keys, on loopback


@pytest.fixture(scope="module")
def server(upstream: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    config = write_config(
        tmp_path_factory.mktemp("open"),
        upstream_url=upstream.url,
        policies=POLICIES,
        log={"format": "json"},
    )
    with start_gateway(config) as server:
        yield server
    assert not server.tracebacks


@pytest.fixture
async def http(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with caller(server.url) as client:
        yield client


async def test_health_says_alive_and_readiness_says_what_is_in_force(
    http: httpx.AsyncClient,
) -> None:
    assert (await http.get("/healthz")).json()["status"] == "ok"
    ready = await http.get("/readyz")
    assert ready.status_code == 200
    told = ready.json()
    assert (told["status"], told["store"]) == ("ready", "ok")
    names = [label.partition("@")[0] for label in told["policies"]]
    assert names == ["held", "at_once", "blocked", "plain"]


async def test_metrics_count_decisions_by_action_and_errors_by_code(
    http: httpx.AsyncClient,
) -> None:
    before = await samples(http)
    for task in ("any", "any", "at_once", "blocked"):
        await ask(http, task)
    await ask(http, fault="close")
    await http.post(CHAT, content=b"{")
    after = await samples(http)

    def grown(name: str, **labels: str) -> float:
        wanted = labels.items()
        return sum(
            value - before.get(key, 0)
            for key, value in after.items()
            if key[0] == name and wanted <= set(key[1])
        )

    decisions = "holdgate_decisions_total"
    assert grown(decisions, action="return", policy="plain", endpoint="chat") == 2
    assert grown(decisions, action="hold", policy="at_once", risk="critical") == 1
    assert grown(decisions, action="block", policy="blocked") == 1
    assert grown(decisions) == 5
    assert grown("holdgate_checks_total", check="word", outcome="fail") == 1
    assert grown("holdgate_errors_total", code="response_held") == 1
    assert grown("holdgate_errors_total", code="response_blocked") == 1
    assert grown("holdgate_errors_total", code="upstream_error") == 1
    assert grown("holdgate_errors_total", code="invalid_body") == 1
    assert grown("holdgate_overhead_seconds_count") == 5
    assert grown("holdgate_layer_seconds_count", layer="record") == 5


async def test_log_has_one_line_for_each_decision_with_its_ids_and_no_content(
    server: Server, http: httpx.AsyncClient
) -> None:
    answers = [await ask(http, task) for task in ("any", "at_once", "blocked")]
    answers.append(await ask(http, fault="close"))
    named = await http.post(
        CHAT,
        json=request("chat", "any", scripted(text=MARKER)),
        headers={"x-request-id": "from-the-client"},
    )
    task = await Reviewer(http).approve(MARKER)
    lines = [json.loads(line) for line in server.errors.splitlines()]
    assert all({"event", "level", "timestamp"} <= set(line) for line in lines)
    assert MARKER not in server.errors
    decided = {line["id"]: line for line in lines if line["event"] == "decision"}
    actions = [decided[answer.headers["x-request-id"]]["action"] for answer in answers]
    assert actions == ["return", "hold", "block", "block"]
    assert (
        decided[named.headers["x-holdgate-decision"]]["request_id"]
        == "from-the-client"
        == named.headers["x-request-id"]
    )
    assert decided[task["decision_id"]]["task"] == task["id"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://127.0.0.1:{port}"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost:{port}"}, 403),
        ({"host": "localhost:{port}"}, 200),
        ({"host": "rebound.example"}, 403),
        ({"host": "rebound.example", "origin": "http://rebound.example"}, 403),
        ({"host": "127.0.0.1.evil.example:{port}"}, 403),
    ],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("path", ["/review/queue", "/v1/models"])
async def test_without_keys_pages_of_other_origins_are_refused(
    server: Server, http: httpx.AsyncClient, path: str, headers: dict[str, str], status: int
) -> None:
    sent = {name: value.format(port=server.port) for name, value in headers.items()}
    answer = await http.get(path, headers=sent)
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"]["code"] == "forbidden"


async def test_readiness_says_why_while_the_database_is_locked_and_nothing_is_answered_unrecorded(
    server: Server, http: httpx.AsyncClient
) -> None:
    held = asyncio.create_task(ask(http, "held", "meanwhile"))
    await Reviewer(http).task("meanwhile")
    lock = sqlite3.connect(server.stderr.parent / "holdgate.db", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    try:
        ready, answer = await asyncio.gather(http.get("/readyz"), ask(http))
        assert ready.status_code == answer.status_code == 503
        assert ready.json()["store"].startswith("the database file ")
        assert answer.json()["error"]["code"] == "store_unavailable"
        assert MARKER not in answer.text
        assert (await http.get("/healthz")).status_code == 200
    finally:
        lock.rollback()
        lock.close()
    assert (await http.get("/readyz")).status_code == 200
    assert (await ask(http)).status_code == 200
    await Reviewer(http).approve("meanwhile")
    assert (await held).status_code == 200


# --------------------------------------------------------------------------------------------------- keys and roles


@dataclass(frozen=True)
class Keyed:
    """A gateway that asks for keys, with a key of each role made on the command line."""

    server: Server
    keys: dict[str, str | None]


@pytest.fixture(scope="module")
def keyed(upstream: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    config = write_config(
        tmp_path_factory.mktemp("keyed"),
        upstream_url=upstream.url,
        policies=POLICIES,
        keys={"required": "yes"},
        models=[
            {"match": "own-key-*", "base_url": f"{upstream.url}/v1", "api_key_env": "PROVIDER_KEY"},
            {"match": "*", "base_url": f"{upstream.url}/v1"},
        ],
    )

    async def make_keys(server: Server) -> dict[str, str | None]:
        roles = ("client", "reviewer", "admin")
        made = await asyncio.gather(*(make_key(server, role, role) for role in roles))
        return dict(zip(roles, made, strict=True))

    with start_gateway(config, env={"PROVIDER_KEY": PROVIDER_KEY}) as server:
        yield Keyed(server, {"nobody": None, **asyncio.run(make_keys(server))})
    assert not server.tracebacks
    assert PROVIDER_KEY not in server.errors
    assert "hgk_" not in server.errors


#: Who may do what, beside admins, who may do everything. `{task}` and `{decision}` are of a hold of the client's own.
ROUTES: list[tuple[str, str, set[str]]] = [
    ("GET", "/healthz", {"nobody", "client", "reviewer"}),
    ("GET", "/readyz", {"nobody", "client", "reviewer"}),
    ("GET", "/metrics", {"nobody", "client", "reviewer"}),
    ("POST", "/v1/chat/completions", {"client"}),
    ("POST", "/v1/completions", {"client"}),
    ("POST", "/v1/responses", {"client"}),
    ("POST", "/v1/embeddings", {"client"}),
    ("GET", "/v1/models", {"client"}),
    ("GET", "/v1/files", {"client"}),
    ("GET", "/v1/chat/completions/{decision}", {"client"}),
    ("GET", "/decisions/{decision}", {"client", "reviewer"}),
    ("POST", "/decisions/{decision}/label", {"reviewer"}),
    ("POST", "/v1/feedback", {"client"}),
    ("GET", "/admin/economics", set()),
    ("GET", "/admin/metrics", set()),
    ("GET", "/review/queue", {"reviewer"}),
    ("GET", "/review/{task}", {"reviewer"}),
    ("POST", "/review/{task}/claim", {"reviewer"}),
    ("POST", "/review/{task}/release", {"reviewer"}),
    ("POST", "/review/{task}/submit", {"reviewer"}),
]


@pytest.mark.parametrize(
    ("method", "path", "allowed"), ROUTES, ids=[f"{method} {path}" for method, path, _ in ROUTES]
)
async def test_each_role_may_do_what_is_its_own_and_nothing_else(
    keyed: Keyed, method: str, path: str, allowed: set[str]
) -> None:
    async with caller(keyed.server.url, keyed.keys["client"]) as client:
        held = await client.post(CHAT, json=request("chat", "at_once", MARKER))
        decision = held.json()["error"]["hold"]["id"]
        task = (await client.get(f"/decisions/{decision}")).json()["review"]["id"]
    body = {"verdict": "approve"} if path.endswith("submit") else {"model": "m", "input": "x"}
    for who, key in keyed.keys.items():
        async with caller(keyed.server.url, key) as http:
            url = path.format(decision=decision, task=task)
            json_ = body if path.endswith("submit") or path.startswith("/v1/") else None
            answer = await http.request(method, url, json=json_ if method == "POST" else None)
        if who in allowed or who == "admin":
            assert answer.status_code not in (401, 403, 404, 422, 500), (who, answer.text)
        else:
            assert answer.status_code == (401 if who == "nobody" else 403), (who, answer.text)
            assert answer.json()["error"]["code"] in ("invalid_api_key", "forbidden")


async def test_no_route_is_missing_from_the_table_of_roles(keyed: Keyed) -> None:
    async with caller(keyed.server.url) as http:
        described = (await http.get("/openapi.json")).json()["paths"]
    known = {
        (method, path.replace("{task}", "{task_id}").replace("{decision}", "{decision_id}"))
        for method, path, _ in ROUTES
    }
    served = {(method.upper(), path) for path, methods in described.items() for method in methods}
    assert served <= known


@pytest.mark.parametrize(
    "authorization",
    ["Bearer hgk_unknown", "Bearer", "Basic dTpw", "hgk_x", "Bearer \xe9", "Bearer x y"],
)
async def test_key_that_is_none_is_refused(keyed: Keyed, authorization: str) -> None:
    async with caller(keyed.server.url) as http:
        headers = {b"authorization": authorization.encode("latin-1")}
        for path in ("/v1/models", "/review/queue", "/decisions/hgd_1"):
            answer = await http.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"


async def test_own_keys_never_reach_the_provider_and_its_key_never_the_client(
    keyed: Keyed, upstream_calls: UpstreamCalls
) -> None:
    async with caller(keyed.server.url, keyed.keys["client"]) as http:
        for model in ("demo-large", "own-key-1"):
            for stream in (False, True):
                body = request("chat", "any", scripted(text="hello"), stream=stream, model=model)
                answer = await http.post(CHAT, json=body)
                assert answer.status_code == 200
                assert PROVIDER_KEY not in answer.text + str(answer.headers)
        await http.post("/v1/embeddings", json={"model": "demo-large", "input": "x"})
        await http.get("/v1/files")
    calls = upstream_calls(finished=6)
    assert "hgk_" not in orjson.dumps(calls).decode()
    sent = [call["headers"].get("authorization") for call in calls]
    own = f"Bearer {PROVIDER_KEY}"
    assert sent == [None, None, own, own, None, None]


async def test_first_key_closes_the_door_and_once_revoked_stops_working_but_does_not_open_it(
    gateway: GatewayFactory,
) -> None:
    server = gateway(POLICIES)
    async with caller(server.url) as http:
        assert (await http.get("/review/queue")).status_code == 200
        key = {"authorization": f"Bearer {await make_key(server, 'only', 'admin')}"}

        async def refused(headers: dict[str, str]) -> bool:
            return (await http.get("/review/queue", headers=headers)).status_code == 401

        await until(lambda: refused({}), within_s=6)
        assert not await refused(key)
        await asyncio.to_thread(holdgate, server, "key", "revoke", "only")
        await until(lambda: refused(key), within_s=6)
        server.restart()
        assert await refused({})
        assert await refused(key)


async def test_away_from_loopback_keys_are_asked_for_before_there_is_one(
    gateway: GatewayFactory,
) -> None:
    server = gateway(POLICIES, listen={"host": "0.0.0.0", "port": 0})
    async with caller(f"http://127.0.0.1:{server.port}") as http:
        for path in ("/v1/models", "/review/queue", "/decisions/x"):
            answer = await http.get(path)
            assert answer.status_code == 401
            assert "hgk_" in answer.json()["error"]["message"]
        assert (await http.get("/healthz")).status_code == 200
        key = await make_key(server, "app", "client")
        with_key = await http.get("/v1/models", headers={"authorization": f"Bearer {key}"})
        assert with_key.status_code == 200


# -------------------------------------------------------------------------------------------- thousands who wait

CLIENTS = 2000
APPROVED = 400
MOST_KIB = 64


@pytest.fixture
def many_files() -> Iterator[None]:
    """As many open files as the machine allows, here and in the processes started meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 20_000), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def wait_for_answer(port: int, number: int) -> int:
    """The status that one client gets which waits on a connection of its own."""
    prompt = scripted(text=f"number {number} of {CLIENTS}") + " " + "x" * 4000
    body = orjson.dumps(request("chat", "held", prompt))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    answer = await reader.read()
    writer.close()
    return int(answer.split(b" ", 2)[1])


@pytest.mark.usefixtures("many_files")
@pytest.mark.timeout(150)
async def test_two_thousand_clients_wait_in_one_process_and_all_are_answered(
    gateway: GatewayFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    server = gateway(POLICIES, hold={"max_waiting": CLIENTS})
    process = psutil.Process(server.pid)
    async with caller(server.url) as http:
        for _ in range(20):
            await asyncio.gather(*(ask(http) for _ in range(20)))
        before_bytes = process.memory_info().rss

        clients: list[asyncio.Task[int]] = []

        async def all_wait() -> bool:
            return bool((await http.get("/readyz")).json()["waiting"] == len(clients))

        # In groups, so that what they hold while they wait is measured, and not what a burst of requests takes.
        for count in range(100, CLIENTS + 1, 100):
            numbers = range(len(clients), count)
            clients += [
                asyncio.create_task(wait_for_answer(server.port, number)) for number in numbers
            ]
            await until(all_wait)
        each_kib = (process.memory_info().rss - before_bytes) / CLIENTS / 1024
        with capsys.disabled():
            sys.stdout.write(f"\n{each_kib:.1f} KiB for each of {CLIENTS} waiting clients\n")
        assert each_kib < MOST_KIB
        one_too_many = await wait_for_answer(server.port, CLIENTS)
        assert one_too_many == 423

        ann = Reviewer(http)
        for _ in range(APPROVED // 200):
            tasks = [task["id"] for task in await ann.queue()]
            answers = await asyncio.gather(*(ann.submit(task, "approve") for task in tasks))
            assert {answer.status_code for answer in answers} == {200}
        _let_the_deadline_pass(server.stderr.parent / "holdgate.db")
        statuses = await asyncio.wait_for(asyncio.gather(*clients), 60)
    assert statuses.count(200) in (APPROVED, APPROVED - 1)
    assert statuses.count(200) + statuses.count(403) == CLIENTS


def _let_the_deadline_pass(database: Path) -> None:
    """Make every hold that is left due now."""
    connection = sqlite3.connect(database, timeout=20)
    connection.execute("UPDATE tasks SET due_at = created_at WHERE resolved_at IS NULL")
    connection.commit()
    connection.close()
