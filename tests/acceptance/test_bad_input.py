"""Whatever clients, providers and operators get wrong: a clear answer, a record, and a log without content."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from tests.acceptance.acting import (
    ENDPOINTS,
    PATHS,
    Reviewer,
    caller,
    policy,
    request,
    scripted,
    text_of,
    until,
)
from tests.acceptance.conftest import FixedUpstream
from tests.conftest import GatewayFactory, UpstreamCalls
from tests.processes import Server, start_gateway, write_config

#: Stands in every prompt and every answer, and may stand in no log.
MARKER = "quetzalcoatlus"
CHAT = "/v1/chat/completions"
RETURN = "confidence: {source: none, when_uncalibrated: return}\n"
POLICIES = {
    "whole": f"policy: whole\nmatch: {{task: whole}}\nstream: buffer\n{RETURN}",
    "live": f"policy: live\nmatch: {{task: live}}\nstream: observe\nrisk: {{base: low}}\n{RETURN}",
    "held": policy("held", "hold: {wait: 0s}"),
}
LIMITS = {"request_bytes": 100_000, "response_bytes": 1_000_000, "header_bytes": 16_000}


@pytest.fixture(scope="module")
def server(
    upstream: Server, fixed_upstream: FixedUpstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    config = write_config(
        tmp_path_factory.mktemp("bad-input"),
        upstream_url=upstream.url,
        policies=POLICIES,
        limits=LIMITS,
        log={"level": "debug", "format": "json"},
        models=[
            {"match": "fixed-*", "base_url": f"{fixed_upstream.url}/v1"},
            {"match": "nobody", "base_url": "http://127.0.0.1:9/v1"},
            {
                "match": "*",
                "base_url": f"{upstream.url}/v1",
                "timeout_s": {"connect": 1, "read": 1.5, "total": 5},
            },
        ],
    )
    with start_gateway(config) as server:
        yield server
    logged = server.errors
    assert not server.tracebacks
    assert MARKER not in logged
    for line in logged.splitlines():
        assert isinstance(json.loads(line), dict), line


@pytest.fixture
async def http(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with caller(server.url) as client:
        yield client


async def post(http: httpx.AsyncClient, body: bytes, path: str = CHAT) -> httpx.Response:
    """Send these bytes as JSON."""
    return await http.post(path, content=body, headers={"content-type": "application/json"})


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error in an answer, in the shape that the official clients read."""
    error: dict[str, Any] = answer.json()["error"]
    assert error["message"]
    assert set(error) >= {"message", "type", "code", "param"}
    assert answer.headers["x-request-id"]
    return error


async def still_serves(http: httpx.AsyncClient) -> bool:
    """Whether the next request is answered as ever."""
    answer = await http.post(CHAT, json=request("chat", "whole", scripted(text=f"{MARKER}!")))
    return answer.status_code == 200 and text_of("chat", answer.json()) == f"{MARKER}!"


# ---------------------------------------------------------------------------------------------- request bodies


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"model": "m", "messages": [}',
        b'{"model": "m"} {}',
        b'{"model": 5}',
        b'{"model": ["m"]}',
        b'{"metadata": []}',
        b'{"metadata": "task"}',
        b'{"temperature": NaN}',
        b'{"temperature": Infinity}',
        b"{'model': 'm'}",
        b"\xff\xfe{\x00}\x00",
        b'{"messages": "\xff\xfe"}',
        b'{"messages": "\xed\xa0\x80"}',
        b'{"messages": "\\ud800"}',
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        b'{"a":' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"a":' + b"[" * 10_000,
    ],
    ids=lambda body: repr(body[:24]) + f"-{len(body)}",
)
@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_body_that_cannot_be_read_is_refused_and_says_why(
    http: httpx.AsyncClient, endpoint: str, body: bytes
) -> None:
    answer = await post(http, body, f"/v1/{PATHS[endpoint]}")
    assert answer.status_code == 400
    error = error_of(answer)
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_body")
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": MARKER},
        {"messages": {"role": "user"}},
        {"messages": [5, None, [], "x"]},
        {"messages": [{"role": 5, "content": {"text": []}}]},
        {"stream": "yes"},
        {"stream": 1},
        {"stream_options": 5, "stream": True},
        {"stream_options": {"include_usage": "x"}, "stream": True},
        {"n": "many"},
        {"tools": 5},
        {"tools": [5, None, {"function": 5}, {"custom": []}, {"function": {"name": 7}}]},
        {"functions": {"name": "f"}},
        {"response_format": 5},
        {"logprobs": "yes", "top_logprobs": "three"},
        {"metadata": {"task": "whole", "n": 5, "deep": {"a": []}}},
        {"background": 1},
    ],
    ids=lambda fields: json.dumps(fields)[:40],
)
@pytest.mark.parametrize("task", ["whole", "live", "held"])
async def test_field_of_the_wrong_type_is_the_providers_to_judge(
    http: httpx.AsyncClient, task: str, fields: dict[str, Any]
) -> None:
    body = request("chat", task, MARKER) | {"model": "demo-large"} | fields
    body["metadata"] = {"task": task} | body["metadata"]
    answer = await post(http, orjson.dumps(body))
    assert answer.status_code in (200, 400, 423)
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
    assert (await http.get(f"/decisions/{answer.headers['x-request-id']}")).status_code == 200


async def test_question_of_the_wrong_shape_does_not_upset_a_second_attempt(
    gateway: GatewayFactory,
) -> None:
    """With feedback the gateway itself adds to the conversation, whatever shape it has."""
    text = f"policy: again\nhold: {{wait: 0s}}\nregenerate: {{attempts: 1}}\n{RETURN}stages: [{{name: rules, checks: [{{id: size, use: length, max_chars: 1, on_fail: regenerate}}]}}]\n"
    server = gateway({"again": text})
    questions: tuple[object, ...] = (5, {"a": 1}, [5, None], "plain", None, [], True)
    names = {"messages": "chat/completions", "input": "responses", "prompt": "completions"}
    async with caller(server.url) as http:
        for (name, path), question in product(names.items(), questions):
            body = orjson.dumps({"model": "demo-large", name: question})
            answer = await post(http, body, f"/v1/{path}")
            assert answer.status_code in (400, 423), answer.text


async def test_of_duplicate_keys_the_last_counts_as_it_does_for_the_provider(
    http: httpx.AsyncClient,
) -> None:
    echo = orjson.dumps(request("chat", "whole", scripted(echo=True)))
    answer = await post(http, echo[:-1] + b',"model":"first","model":"second"}')
    shown = (await http.get(f"/decisions/{answer.headers['x-holdgate-decision']}")).json()
    assert shown["policy"].startswith("whole@")
    assert orjson.loads(text_of("chat", answer.json()))["body"]["model"] == "second"


async def test_body_up_to_the_limit_is_served_and_one_byte_more_is_not(
    http: httpx.AsyncClient,
) -> None:
    body = orjson.dumps(request("chat", "whole", scripted(text=MARKER)))
    full = body + b" " * (LIMITS["request_bytes"] - len(body))
    assert (await post(http, full)).status_code == 200
    answer = await post(http, full + b" ")
    assert answer.status_code == 413
    assert "limits.request_bytes" in error_of(answer)["message"]
    assert await still_serves(http)


@pytest.mark.parametrize("path", [CHAT, "/v1/files", "/review/hgt_1/submit"])
async def test_endless_body_in_chunks_is_cut_off(
    http: httpx.AsyncClient, upstream_calls: UpstreamCalls, path: str
) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(400):
            yield MARKER.encode() * 1000

    try:
        answer = await http.post(path, content=endless())
    except httpx.WriteError:
        answer = None
    if answer is not None and path != "/v1/files":
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
    assert await still_serves(http)


async def test_announced_body_over_the_limit_is_refused_before_it_is_sent(server: Server) -> None:
    async with connection(server) as (reader, writer):
        writer.write(head(b"content-length: 900000"))
        answer = await asyncio.wait_for(reader.readuntil(b"}}"), 10)
        assert answer.startswith(b"HTTP/1.1 413 ")
        # Whoever sends it nevertheless can go on with the connection.
        writer.write(b" " * 900_000 + whole(MARKER, b"connection: close"))
        answer = await asyncio.wait_for(reader.read(), 10)
    assert answer.startswith(b"HTTP/1.1 200 ")


# ------------------------------------------------------------------------------------------------ the connection


@asynccontextmanager
async def connection(
    server: Server,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A bare connection to the gateway."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    yield reader, writer
    writer.close()


def head(*lines: bytes) -> bytes:
    """The head of a chat request with these header lines."""
    fixed = [
        f"POST {CHAT} HTTP/1.1".encode(),
        b"host: 127.0.0.1",
        b"content-type: application/json",
    ]
    return b"\r\n".join([*fixed, *lines, b"", b""])


def whole(text: str, *lines: bytes) -> bytes:
    """A whole chat request for an answer that says the text."""
    body = orjson.dumps(request("chat", "whole", scripted(text=text)))
    return head(b"content-length: %d" % len(body), *lines) + body


@pytest.mark.parametrize(
    "sent",
    [
        head(b"x-large: " + b"y" * 20_000),
        head(*(b"x-%d: %s" % (n, b"y" * 100) for n in range(200))),
        head(b"x-endless: " + b"y" * 3_000_000),
        head(b"x-endless: " + b"y" * 3_000_000).removesuffix(b"\r\n\r\n"),
        b"GET /v1/models?" + b"q" * 20_000 + b" HTTP/1.1\r\nhost: h\r\n\r\n",
        b"GET /" + b"p" * 3_000_000,
    ],
    ids=["large", "many", "huge", "endless", "long-path", "endless-path"],
)
async def test_head_over_the_limit_is_refused(
    server: Server, http: httpx.AsyncClient, sent: bytes
) -> None:
    async with connection(server) as (reader, writer):
        writer.write(sent)
        answer = await asyncio.wait_for(reader.read(), 10)
    status, _, rest = answer.partition(b"\r\n")
    assert status.startswith(b"HTTP/1.1 431 ")
    error = orjson.loads(rest.partition(b"\r\n\r\n")[2])["error"]
    assert error["code"] == "headers_too_large"
    assert "limits.header_bytes" in error["message"]
    assert await still_serves(http)


async def test_head_below_the_limit_passes(http: httpx.AsyncClient) -> None:
    answer = await http.post(
        CHAT,
        json=request("chat", "whole", scripted(text="ok")),
        headers={"x-large": "y" * 6_000, "x-larger": "y" * 6_000},
    )
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS greeting",
        b"NONSENSE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        head(b"content-length: -1"),
        head(b"content-length: 5", b"transfer-encoding: chunked") + b"0\r\n\r\n",
        head(b"content-length: 5", b"content-length: 6") + b"hello",
        head(b"transfer-encoding: chunked") + b"zz\r\n",
        head(b"bad header line"),
    ],
    ids=lambda sent: repr(sent[-30:]),
)
async def test_what_is_not_http_is_refused_and_the_connection_closed(
    server: Server, http: httpx.AsyncClient, sent: bytes
) -> None:
    async with connection(server) as (reader, writer):
        writer.write(sent)
        answer = await asyncio.wait_for(reader.read(), 10)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert orjson.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"
    assert await still_serves(http)


async def test_body_that_arrives_byte_by_byte_is_served(server: Server) -> None:
    sent = whole(MARKER, b"connection: close")
    async with connection(server) as (reader, writer):
        for at in range(len(sent)):
            writer.write(sent[at : at + 1])
            await writer.drain()
            await asyncio.sleep(0)
        answer = await asyncio.wait_for(reader.read(), 10)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert MARKER.encode() in answer


async def test_client_that_leaves_in_the_middle_of_its_upload_asks_nothing(
    server: Server, http: httpx.AsyncClient, upstream_calls: UpstreamCalls
) -> None:
    async with connection(server) as (_, writer):
        writer.write(whole(MARKER)[:-10])
        await writer.drain()
    assert await still_serves(http)
    assert len(upstream_calls(finished=1)) == 1


async def test_requests_sent_at_once_are_answered_in_their_order(server: Server) -> None:
    async with connection(server) as (reader, writer):
        writer.write(whole("one") + whole("two") + whole("three", b"connection: close"))
        answer = await asyncio.wait_for(reader.read(), 10)
    assert answer.count(b"HTTP/1.1 200 ") == 3
    places = [answer.index(b'"content":"%s"' % word) for word in (b"one", b"two", b"three")]
    assert places == sorted(places)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE"])
async def test_other_methods_on_a_checked_path_are_the_providers_to_judge(
    http: httpx.AsyncClient, method: str
) -> None:
    answer = await http.request(method, CHAT)
    assert answer.status_code < 500


@pytest.mark.parametrize(
    "path",
    ["/v1//chat/completions", "/v1/chat/../chat/completions", "/v1/./models", "/v1/%2e%2e/x"],
)
async def test_path_that_could_mean_another_is_refused(server: Server, path: str) -> None:
    async with connection(server) as (reader, writer):
        sent = whole(MARKER, b"connection: close").replace(CHAT.encode(), path.encode(), 1)
        writer.write(sent)
        answer = await asyncio.wait_for(reader.read(), 10)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"invalid_path" in answer


@pytest.mark.parametrize("path", ["/", "/nothing", "/review", "/decisions", "/docs", "/openapi"])
async def test_paths_where_nothing_is_say_so_in_the_usual_shape(
    http: httpx.AsyncClient, path: str
) -> None:
    answer = await http.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


# ---------------------------------------------------------------------------------------------- provider's faults

#: What comes of each fault: (status, code) where the response is collected first, and for a body that is not a stream.
FAULTS: dict[str, tuple[tuple[int, str | None], tuple[int, str | None]]] = {
    "hang": ((504, "upstream_timeout"), (504, "upstream_timeout")),
    "close": ((502, "upstream_error"), (502, "upstream_error")),
    "close_mid": ((502, "upstream_truncated"), (502, "upstream_truncated")),
    "truncate": ((502, "upstream_truncated"), (502, "upstream_unreadable")),
    "garbage": ((502, "upstream_unreadable"), (502, "upstream_unreadable")),
    "error_mid": ((502, "upstream_error"), (200, None)),
    "after_done": ((200, None), (200, None)),
    "odd_sse": ((200, None), (200, None)),
    "html502": ((502, None), (502, None)),
    "slow_headers": ((200, None), (200, None)),
    "wrong_type": ((502, "upstream_unreadable"), (502, "upstream_unreadable")),
    "huge": ((502, "upstream_response_too_large"), (502, "upstream_response_too_large")),
    "invalid_utf8": ((502, "upstream_unreadable"), (502, "upstream_unreadable")),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_fault_of_the_provider_is_named_to_the_client_and_recorded(
    http: httpx.AsyncClient, endpoint: str, streamed: bool, fault: str
) -> None:
    prompt = scripted(text=f"{MARKER} " * 5, fault=fault, size_mb=2, token_delay_ms=1)
    body = request(endpoint, "whole", prompt, stream=streamed)
    answer = await http.post(f"/v1/{PATHS[endpoint]}", json=body)
    status, code = FAULTS[fault][0 if streamed else 1]
    assert answer.status_code == status, answer.text[:500]
    if code is not None:
        assert error_of(answer)["code"] == code
        assert MARKER not in answer.text
    record = await http.get(f"/decisions/{answer.headers['x-request-id']}")
    assert record.status_code == 200
    assert record.json()["action"] == ("return" if code is None else "block")
    if status != 200:
        reasons = record.json()["detail"]["decision"]["reasons"]
        assert any(reason["source"] == "upstream" and reason["message"] for reason in reasons)
    assert MARKER not in str(record.json()["detail"]["decision"]["reasons"])


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_fault_in_a_stream_let_through_ends_it_with_an_error_and_is_recorded(
    http: httpx.AsyncClient, endpoint: str, fault: str
) -> None:
    prompt = scripted(text=f"{MARKER} " * 5, fault=fault, size_mb=2, token_delay_ms=1)
    body = request(endpoint, "live", prompt, stream=True)
    answer = await http.post(f"/v1/{PATHS[endpoint]}", json=body)
    (status, _), _ = FAULTS[fault]
    if fault in ("hang", "close", "html502"):
        assert answer.status_code == status
    else:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        told = "asks for this error" if fault == "error_mid" else '"code":"upstream_'
        assert (told in answer.text) is (status != 200)
        if endpoint != "responses":
            assert answer.text.rstrip().endswith("[DONE]")
            assert answer.text.count("[DONE]") == 1
    record = await http.get(f"/decisions/{answer.headers['x-request-id']}")
    assert record.status_code == 200
    if status != 200:
        assert fault == "html502" or "upstream" in str(record.json()["detail"])


async def test_provider_that_is_not_there_is_named_without_its_secrets(
    http: httpx.AsyncClient,
) -> None:
    answer = await http.post(CHAT, json=request("chat", "whole", MARKER, model="nobody"))
    assert answer.status_code == 502
    assert "127.0.0.1:9" in error_of(answer)["message"]


DEEP = {
    "deep unknown field": b'"x":' + b"[" * 900 + b"]" * 900,
    "very deep unknown field": b'"x":' + b"[" * 10_000 + b"]" * 10_000,
    "deep usage": b'"usage":' + b'{"a":' * 900 + b"1" + b"}" * 900,
    "a lone surrogate": b'"x":"\\ud800"',
    "NaN": b'"x":NaN',
    "a number beyond all measure": b'"x":1e999',
    "an integer beyond all measure": b'"x":' + b"9" * 5000,
    "the same key twice": b'"choices":[],"choices":[]',
}


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("task", ["whole", "live", "held"])
@pytest.mark.parametrize("oddity", DEEP)
async def test_odd_json_of_the_provider_is_relayed_or_refused_and_never_a_crash(
    http: httpx.AsyncClient,
    fixed_upstream: FixedUpstream,
    oddity: str,
    task: str,
    streamed: bool,
) -> None:
    kind = b"chat.completion.chunk" if streamed else b"chat.completion"
    said = b'"delta"' if streamed else b'"message"'
    body = (
        b'{"id":"c","object":"%s","created":1,"model":"m","choices":[{"index":0,%s:'
        b'{"role":"assistant","content":"%s"},"finish_reason":"stop"}],%s}'
        % (kind, said, MARKER.encode(), DEEP[oddity])
    )
    sent = [b"data: ", body, b"\n\n", b"data: [DONE]\n\n"] if streamed else [body]
    content_type = "text/event-stream" if streamed else "application/json"
    fixed_upstream.answers["fixed-odd"] = (content_type, sent)
    asked = request("chat", task, MARKER, stream=streamed, model="fixed-odd")
    answer = await http.post(CHAT, json=asked)
    assert answer.status_code in (200, 423, 502), answer.text[:300]
    if answer.status_code == 502:
        assert error_of(answer)["code"] in ("upstream_unreadable", "upstream_truncated")
    if answer.status_code == 423:
        hold = answer.json()["error"]["hold"]
        task_id = (await http.get(f"/decisions/{hold['id']}")).json()["review"]["id"]
        shown = (await http.get(f"/review/{task_id}")).json()
        texts = {passage["path"]: "ok" for passage in shown["passages"]}
        decide = ("correct", {"correction": texts}) if texts else ("approve", {})
        assert (await Reviewer(http).submit(task_id, decide[0], **decide[1])).status_code == 200
        assert (await http.get(hold["url"])).status_code == 200


# ---------------------------------------------------------------------------------------- settings and policies

GOOD = "policy: p\nconfidence: {source: none, when_uncalibrated: return}\n"


@pytest.mark.parametrize(
    ("policy_text", "settings", "expected"),
    [
        ("policy: p\nconfidense: {}\n", {}, "policies/p.yaml:2:1"),
        ("policy: [\n", {}, "policies/p.yaml:"),
        (
            GOOD + "stages: [{name: r, checks: [{id: s, use: json_schema, schema: no.json,"
            " on_fail: hold}]}]\n",
            {},
            "no.json",
        ),
        (GOOD, {"lissten": {"port": 1}}, "holdgate.yaml:"),
        (GOOD, {"store": {"url": "sqlite:////no/such/folder/x.db"}}, "/no/such/folder/x.db"),
        (GOOD, {"store": {"url": "postgresql://127.0.0.1:9/x"}}, "database"),
    ],
    ids=[
        "unknown-key",
        "not-yaml",
        "no-schema",
        "unknown-setting",
        "no-folder",
        "no-database",
    ],
)
def test_mistake_stops_the_start_and_says_where_it_is(
    tmp_path: Path, policy_text: str, settings: dict[str, Any], expected: str
) -> None:
    config = write_config(
        tmp_path, upstream_url="http://127.0.0.1:9", policies={"p": policy_text}, **settings
    )
    command = [sys.executable, "-P", "-m", "gateway.cli", "serve", "--config", str(config)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode != 0
    assert expected in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) < 6, ended.stderr
    assert ended.stdout == ""


def test_port_in_use_stops_the_start_and_says_so(server: Server, tmp_path: Path) -> None:
    config = write_config(tmp_path, upstream_url="http://127.0.0.1:9", policies={"p": GOOD})
    command = [sys.executable, "-P", "-m", "gateway.cli", "serve", "--config", str(config)]
    command += ["--port", str(server.port)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode != 0
    assert f"127.0.0.1:{server.port}" in ended.stderr
    assert "listen.port" in ended.stderr


async def test_edited_policy_applies_without_a_restart_and_a_mistake_changes_nothing(
    gateway: GatewayFactory,
) -> None:
    server = gateway({"p": GOOD}, log={"format": "json"})
    file = server.stderr.parent / "policies" / "p.yaml"
    async with caller(server.url) as http:

        async def action() -> str:
            answer = await http.post(CHAT, json=request("chat", "any", MARKER))
            return answer.headers["x-holdgate-action"]

        async def logged(event: str) -> dict[str, Any] | None:
            lines = [json.loads(line) for line in server.errors.splitlines()]
            return next((line for line in lines if line["event"] == event), None)

        assert await action() == "return"
        file.write_text(policy("p", "hold: {wait: 0s}").replace("match: {task: p}\n", ""))

        async def holds() -> bool:
            return await action() == "hold"

        await until(holds, 3)
        assert await logged("policies_reloaded")
        file.write_text("policy: p\nconfidense: {}\n")
        told = await until(lambda: logged("policies_not_reloaded"), 3)
        assert "p.yaml:2:1" in told["problem"]
        assert await action() == "hold"
        file.write_text(GOOD)

        async def returns() -> bool:
            return await action() == "return"

        await until(returns, 3)
