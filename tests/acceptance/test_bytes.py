"""What must not change does not change, to the byte, in either direction."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import psutil
import pytest

from tests.acceptance.acting import ENDPOINTS, PATHS, request, scripted
from tests.acceptance.conftest import ClientFor, FixedUpstream
from tests.acceptance.wire import said
from tests.conftest import UpstreamCalls
from tests.processes import Server

#: Spelt as no serialiser of ours spells it: order, spaces, escapes, numbers, a key written twice.
WHOLE = {
    "chat": (
        b'\n{ "x" : 1.0E+30, "choices" :[ {"index":0, "finish_reason":"stop","message":'
        b'{"role":"assistant","content":"\\u0041 caf\xc3\xa9 \\/ \\ud83e\\udd89","x":1.50}, '
        b'"logprobs": null }],"usage":{"total_tokens":1.0},"id":"c-1","x":2}\r\n '
    ),
    "completions": (
        b'{"choices":[{"text":"\\u0041 caf\xc3\xa9\\n","finish_reason" : "stop" , "index":0}],'
        b'"id":"t-1","n":12345678901234567890}'
    ),
    "responses": (
        b'{"output":[{"type":"message","role":"assistant","content":[{"text":"\\u0041","type":'
        b'"output_text","annotations":[],"logprobs":[]}]}],"id":"r-1", "status":"completed"}'
    ),
}
STREAMS = {
    "chat": [
        b": welcome\n\n",
        b'data:{"choices":[{"index":0,"delta":{"role":"assistant","content":""}}], "id":"c"}\r\n\r\n',
        b'data: { "choices" : [ {"index":0,"delta":{"content":"caf\xc3\xa9 \\u0041"} } ]}\n\n',
        b'data: {"choices":[],"x":1.50}\n\n: still here\n\ndata: {"choices":[{"index":0,"delta":{},',
        b'"finish_reason":"stop"}]}\n\n',
        b"data:[DONE]\r\n\r\n",
    ],
    "completions": [
        b'data: {"choices":[{"text":"caf\\u00e9","index":0,"finish_reason":null}]}\n\n',
        b'data: { "choices":[{"text":"","index":0,"finish_reason":"stop"}] }\n\ndata: [DO',
        b"NE]\n\n",
    ],
    "responses": [
        b'event: response.created\ndata: {"type":"response.created","response":{"id":"r"}}\n\n',
        b'event: response.output_text.delta\ndata: {"delta":"\\u0041", "type":',
        b'"response.output_text.delta", "output_index":0,"content_index":0}\n\nevent: response.completed\n',
        b'data: {"response":{"id":"r","status":"completed","output":[{"type":"message","content":[{"text":"A",',
        b'"type":"output_text"}]}]},"type":"response.completed"}\n\n',
    ],
}


@pytest.mark.parametrize("task", ["", "plain", "whole", "guard", "scored"])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_whole_answers_arrive_as_the_provider_wrote_them(
    http: httpx.Client, fixed_upstream: FixedUpstream, endpoint: str, task: str
) -> None:
    sent = WHOLE[endpoint]
    fixed_upstream.answers["fixed-whole"] = ("application/json", [sent[:40], sent[40:]])
    body = request(endpoint, task, "Hi") | {"model": "fixed-whole"}
    assert http.post(PATHS[endpoint], json=body).content == sent


@pytest.mark.parametrize("task", ["", "plain", "whole", "guard", "watch", "scored", "scored-live"])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_streams_arrive_as_the_provider_wrote_them(
    http: httpx.Client, fixed_upstream: FixedUpstream, endpoint: str, task: str
) -> None:
    fixed_upstream.answers["fixed-stream"] = ("text/event-stream", STREAMS[endpoint])
    body = request(endpoint, task, "Hi", stream=True) | {"model": "fixed-stream"}
    answer = http.post(PATHS[endpoint], json=body)
    assert answer.content == b"".join(STREAMS[endpoint])
    assert answer.headers["content-type"] == "text/event-stream"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_only_logprobs_change_in_an_answer_that_we_asked_for_them(
    http: httpx.Client, fixed_upstream: FixedUpstream, endpoint: str, stream: bool
) -> None:
    token = b'{ "token" : "{}", "logprob": -0.5, "bytes":[123,125] ,"top_logprobs":[]}'
    values = {
        "chat": (b'{"content":[' + token + b"]}", b"null"),
        "completions": (b'{"tokens":["{}"],"token_logprobs":[-0.5]}', b"null"),
        "responses": (b"[" + token + b"]", b"[]"),
    }
    given, left = values[endpoint]
    template = {
        ("chat", False): (
            b'{"choices": [{"message":{"content":"{} null"},"logprobs": %s ,"finish_reason":"stop"}]}'
        ),
        (
            "completions",
            False,
        ): b'{"choices":[{"text":"{}", "logprobs":%s,"finish_reason":"stop"}]}',
        ("responses", False): (
            b'{"output":[{"type":"message","content":[{"type":"output_text","text":"{}","logprobs":%s }]}],'
            b'"status":"completed"}'
        ),
        ("chat", True): (
            b'data: {"choices":[{"index":0,"delta":{"content":"{}"},"logprobs": %s ,"finish_reason":"stop"}]}'
            b"\n\ndata: [DONE]\n\n"
        ),
        ("completions", True): (
            b'data: {"choices":[{"index":0,"text":"{}","logprobs":%s,"finish_reason":"stop"}]}'
            b"\n\ndata: [DONE]\n\n"
        ),
        ("responses", True): (
            b'event: response.completed\ndata: {"type":"response.completed","response":{"status":'
            b'"completed","output":[{"type":"message","content":[{"type":"output_text","text":"{}",'
            b'"logprobs":%s}]}]}}\n\n'
        ),
    }[endpoint, stream]
    content_type = "text/event-stream" if stream else "application/json"
    fixed_upstream.answers["fixed-scored"] = (content_type, [template % given])
    body = request(endpoint, "scored", "Hi", stream=stream) | {"model": "fixed-scored"}
    assert http.post(PATHS[endpoint], json=body).content == template % left


@pytest.mark.parametrize("task", ["", "plain", "whole", "guard", "window"])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_requests_reach_the_provider_as_the_client_wrote_them(
    http: httpx.Client, upstream_calls: UpstreamCalls, endpoint: str, task: str
) -> None:
    body = json.dumps(request(endpoint, task, "Hi"), indent=3)
    body = body.replace('"model"', '"mod\\u0065l"').replace("demo-large", "demo\\u002dlarge") + "\n"
    body = body[:-3] + ', "seed": 1.50e1, "seed": 2, "é": "\\ud83e\\udd89 ü"}\r\n'
    sent = body.encode()
    answer = http.post(PATHS[endpoint], content=sent, headers={"content-type": "application/json"})
    assert answer.status_code == 200
    [call] = upstream_calls(finished=1)
    assert call["body_sha256"] == hashlib.sha256(sent).hexdigest()


def test_logprobs_are_asked_for_by_a_splice_that_leaves_all_else(
    http: httpx.Client, fixed_upstream: FixedUpstream
) -> None:
    fixed_upstream.answers["fixed-splice"] = ("application/json", [WHOLE["chat"]])
    fixed_upstream.requests.clear()
    sent = b' { "model": "fixed-splice", "metadata":{"task":"scored"}, "x": 1.50, "messages":[] }'
    assert http.post(PATHS["chat"], content=sent).status_code == 200
    [received] = fixed_upstream.requests
    start = sent.index(b"{") + 1
    assert received.startswith(sent[:start])
    assert received.endswith(sent[start:])
    assert json.loads(b"{" + received[start : -len(sent[start:])].rstrip(b",") + b"}") == {
        "logprobs": True,
        "top_logprobs": 5,
    }


# ------------------------------------------------------------------------------ what is not checked

UPLOAD_BYTES = 30_000_000


def test_a_large_upload_flows_through_and_does_not_stay(
    holdgate: Server, http: httpx.Client, upstream_calls: UpstreamCalls
) -> None:
    boundary, block = "cut-here", bytes(range(256)) * 256
    digest, rss = hashlib.sha256(), []
    gateway = psutil.Process(holdgate.pid)

    def parts() -> Iterator[bytes]:
        head = 'Content-Disposition: form-data; name="{}"'
        yield f"--{boundary}\r\n{head.format('purpose')}\r\n\r\nuser_data\r\n".encode()
        name = f'{head.format("file")}; filename="large.bin"'
        yield f"--{boundary}\r\n{name}\r\nContent-Type: application/octet-stream\r\n\r\n".encode()
        for at in range(0, UPLOAD_BYTES, len(block)):
            piece = block[: UPLOAD_BYTES - at]
            digest.update(piece)
            rss.append(gateway.memory_info().rss)
            yield piece
        yield f"\r\n--{boundary}--\r\n".encode()

    content_type = {"content-type": f"multipart/form-data; boundary={boundary}"}
    about = http.post("files", content=parts(), headers=content_type)
    assert about.status_code == 200, about.text
    assert (about.json()["bytes"], about.json()["sha256"]) == (UPLOAD_BYTES, digest.hexdigest())
    assert about.headers["x-holdgate-action"] == "passthrough"
    [call] = upstream_calls(finished=1)
    assert call["headers"]["content-type"] == content_type["content-type"]
    assert max(rss) - rss[0] < 12_000_000


def test_a_large_download_flows_through_and_does_not_stay(
    holdgate: Server, http: httpx.Client
) -> None:
    gateway, digest, rss = psutil.Process(holdgate.pid), hashlib.sha256(), []
    with http.stream("GET", f"files/file-{UPLOAD_BYTES}/content") as answer:
        assert answer.headers["content-type"] == "application/octet-stream"
        for piece in answer.iter_raw(65_536):
            digest.update(piece)
            rss.append(gateway.memory_info().rss)
    expected = (bytes(range(256)) * (UPLOAD_BYTES // 256 + 1))[:UPLOAD_BYTES]
    assert digest.hexdigest() == hashlib.sha256(expected).hexdigest()
    assert max(rss) - rss[0] < 12_000_000


def test_the_sdk_reaches_everything_else(client_for: ClientFor, upstream: Server) -> None:
    client = client_for("guard")
    direct = openai.OpenAI(base_url=f"{upstream.url}/v1", api_key="sk-test")
    assert [m.id for m in client.models.list()] == [m.id for m in direct.models.list()]
    given: Any = {"model": "text-embedding-3-small", "input": ["a", "b"]}
    assert (
        client.embeddings.create(**given).data[1].embedding
        == direct.embeddings.create(**given).data[1].embedding
    )
    assert client.moderations.create(input="x").results[0].flagged is False
    stored = client.files.create(file=("a.txt", b"hello"), purpose="user_data")
    assert stored.bytes == 5
    assert client.files.content("file-5").content == bytes(range(5))
    speech: Any = {"model": "tts-1", "voice": "alloy", "input": "Hi"}
    assert (
        client.audio.speech.create(**speech).content == direct.audio.speech.create(**speech).content
    )
    direct.close()


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_any_method_any_path_any_query_passes_as_it_was_written(
    holdgate: Server, upstream: Server, method: str
) -> None:
    path = "/v1/things/a%20b%2Fc%C3%A9/%7Ex+y;v=1/%2525/"
    query = "limit=2&after=a%2Bb+c&empty=&flag&x=%E2%82%AC&y=%252B"
    body = b"" if method in ("GET", "OPTIONS") else b"\x00\x01 not json \xff"
    seen = raw(holdgate, method, f"{path}?{query}", body)
    direct = raw(upstream, method, f"{path}?{query}", body)
    names = ("method", "path", "query", "body_sha256", "body_bytes")
    assert [seen[name] for name in names] == [direct[name] for name in names]
    assert seen["body_sha256"] == hashlib.sha256(body).hexdigest()


def raw(server: Server, method: str, target: str, body: bytes) -> dict[str, Any]:
    """The JSON that answers a request whose target is written as it is given here."""
    address = urlsplit(server.url)
    head = f"{method} {target} HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
    told: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])
    return told


def test_head_has_headers_and_no_body(http: httpx.Client) -> None:
    answer = http.head("things/1")
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["x-holdgate-action"] == "passthrough"
    assert int(answer.headers["content-length"]) > 0


def test_compression_of_what_is_not_read_stays(http: httpx.Client) -> None:
    body = request("chat", "", scripted(text="Packed.", encoding="gzip"))
    answer = http.post(PATHS["chat"], json=body, headers={"accept-encoding": "gzip"})
    assert answer.headers["content-encoding"] == "gzip"
    assert said("chat", answer) == ["Packed."]


def test_a_client_that_leaves_a_download_ends_it(
    http: httpx.Client, upstream_calls: UpstreamCalls
) -> None:
    with http.stream("GET", "files/file-100000000/content") as answer:
        assert next(answer.iter_raw())
    [call] = upstream_calls(finished=1)
    assert call["aborted"]
