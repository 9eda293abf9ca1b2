"""No way around the checks: every part of every answer, and every spelling of the way to it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.acceptance.acting import ENDPOINTS, PATHS, request, scripted
from tests.acceptance.conftest import POLICIES, FixedUpstream, Submit
from tests.acceptance.wire import SECRET, events, said
from tests.conftest import GatewayFactory, UpstreamCalls
from tests.processes import Server

CODE = "CODE-1234"
TOOL = {"type": "function", "function": {"name": "pay", "parameters": {"type": "object"}}}

#: Where something can be said, as a script that says it there; `choices` are how many there are then.
PLACES: dict[str, dict[str, Any]] = {
    "text": {"text": f"It is {CODE}."},
    "the last choice": {"texts": ["Fine.", "Fine too.", f"It is {CODE}."]},
    "the first choice": {"texts": [f"It is {CODE}.", "Fine.", "Fine too."]},
    "tool arguments": {"tool_calls": [{"name": "pay", "arguments": {"to": CODE}}]},
    "the second call": {
        "tool_calls": [
            {"name": "pay", "arguments": {"to": "me"}},
            {"name": "pay", "arguments": {"to": [{"deep": CODE}]}},
        ]
    },
    "broken arguments": {"tool_calls": [{"name": "pay", "arguments": '{"to": "' + CODE}]},
    "escaped arguments": {
        "tool_calls": [{"name": "pay", "arguments": '{"to": "\\u0043ODE\\u002d1234"}'}]
    },
    "arguments escaped twice": {
        "tool_calls": [{"name": "pay", "arguments": '{"to": "{\\"a\\": \\"\\\\u0043ODE-1234\\"}"}'}]
    },
    "refusal": {"refusal": f"I will not say {CODE}."},
    "reasoning": {"reasoning": f"So it is {CODE}.", "text": "Fine."},
    "hidden text": {"text": "It is C\u200bOD\u00adE-1\ufe0f234."},
    "wide text": {"text": "It is ＣＯＤＥ－１２３４."},
    "look-alikes": {"text": "It is \u0421\u041eDE\u20131234."},
    "structured text": {"text": json.dumps({"answer": {"code": CODE}})},
}
SPOKEN = {
    "chat": set(PLACES),
    "completions": {
        "text",
        "the last choice",
        "the first choice",
        "hidden text",
        "wide text",
        "look-alikes",
    },
    "responses": set(PLACES) - {"the last choice", "the first choice"},
}


def fields(endpoint: str, place: str) -> dict[str, Any]:
    """What a client that gets such an answer may well have asked for."""
    asked: dict[str, Any] = {}
    if "choice" in place:
        asked["n"] = 3
    if endpoint == "chat" and ("call" in place or "arguments" in place):
        asked["tools"] = [TOOL]
    if "structured" in place:
        form = {"type": "json_schema", "name": "a", "schema": {"type": "object"}}
        asked |= (
            {"text": {"format": form}}
            if endpoint == "responses"
            else {"response_format": {"type": "json_schema", "json_schema": form}}
        )
    return asked


CASES = [(e, place) for e in ENDPOINTS for place in PLACES if place in SPOKEN[e]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("endpoint", "place"), CASES)
def test_a_rule_fires_wherever_it_is_said(
    http: httpx.Client, endpoint: str, place: str, stream: bool
) -> None:
    asked = fields(endpoint, place)
    body = request(endpoint, "guard", scripted(**PLACES[place]), stream=stream, **asked)
    answer = http.post(PATHS[endpoint], json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "response_blocked")
    spelt = json.dumps(PLACES[place], ensure_ascii=False)
    harmless = json.loads(spelt.replace("34", "XY").replace("３４", "XY"))
    body = request(endpoint, "guard", scripted(**harmless), stream=stream, **asked)
    assert http.post(PATHS[endpoint], json=body).status_code == 200


@pytest.mark.parametrize(("endpoint", "place"), CASES)
def test_a_rule_fires_on_a_window_wherever_it_is_said(
    http: httpx.Client, endpoint: str, place: str
) -> None:
    body = request(
        endpoint, "window", scripted(**PLACES[place]), stream=True, **fields(endpoint, place)
    )
    answer = http.post(PATHS[endpoint], json=body)
    error = events(answer.content)[-1] if answer.status_code == 200 else answer.json()
    assert error["error"]["code"] == "response_blocked"
    assert CODE not in answer.text


@pytest.mark.parametrize("task", ["guard", "window"])
def test_a_rule_fires_on_parts_custom_tools_and_old_function_calls(
    http: httpx.Client, fixed_upstream: FixedUpstream, task: str
) -> None:
    parts = [{"type": "text", "text": "It is CO"}, {"type": "text", "text": f"No: {CODE}"}]
    deltas: list[dict[str, Any]] = [
        {"content": parts},
        {"tool_calls": [{"index": 0, "type": "custom", "custom": {"name": "f", "input": CODE}}]},
        {"function_call": {"name": "f", "arguments": json.dumps({"a": CODE})}},
        {"reasoning": CODE},
    ]
    for delta in deltas:
        whole = {"choices": [{"index": 0, "message": delta, "finish_reason": "stop"}]}
        chunk = {"choices": [{"index": 0, "delta": delta, "finish_reason": "stop"}]}
        stream = b"data: " + json.dumps(chunk).encode() + b"\n\ndata: [DONE]\n\n"
        for streamed, sent in ((False, json.dumps(whole).encode()), (True, stream)):
            content_type = "text/event-stream" if streamed else "application/json"
            fixed_upstream.answers["fixed-parts"] = (content_type, [sent])
            body = request("chat", task, "Hi", stream=streamed) | {"model": "fixed-parts"}
            answer = http.post(PATHS["chat"], json=body)
            assert "response_blocked" in answer.text, delta
            assert CODE not in answer.text


SPOKEN_ITEMS: list[dict[str, Any]] = [
    {"type": "code_interpreter_call", "code": f"print('{CODE}')", "outputs": []},
    {"type": "code_interpreter_call", "code": "x", "outputs": [{"type": "logs", "logs": CODE}]},
    {"type": "mcp_call", "name": "f", "arguments": json.dumps({"a": CODE}), "output": None},
    {"type": "mcp_call", "name": "f", "arguments": "{}", "output": CODE},
    {"type": "local_shell_call", "action": {"type": "exec", "command": ["echo", CODE]}},
    {"type": "shell_call", "action": {"commands": [f"echo {CODE}"]}},
    {"type": "computer_call", "action": {"type": "type", "text": CODE}},
    {"type": "apply_patch_call", "operation": {"type": "create_file", "diff": f"+{CODE}"}},
    {"type": "web_search_call", "action": {"type": "search", "query": CODE}},
    {"type": "file_search_call", "queries": [CODE], "results": None},
    {"type": "message", "content": [{"type": "output_audio", "transcript": CODE}]},
]


@pytest.mark.parametrize("item", SPOKEN_ITEMS, ids=lambda item: item["type"])
def test_a_rule_fires_on_all_that_tools_are_asked_and_give_back(
    http: httpx.Client, fixed_upstream: FixedUpstream, item: dict[str, Any]
) -> None:
    def post(said: str, *, stream: bool) -> httpx.Response:
        items = json.loads(json.dumps([{"id": "i_1", **item}]).replace(CODE, said))
        whole = json.dumps({"id": "r", "status": "completed", "output": items}).encode()
        sent = [b'data: {"type": "response.completed", "response": %s}\n\n' % whole]
        streamed = ("text/event-stream", sent)
        fixed_upstream.answers["fixed-item"] = streamed if stream else ("application/json", [whole])
        body = request("responses", "guard", "Hi", stream=stream) | {"model": "fixed-item"}
        return http.post(PATHS["responses"], json=body)

    for stream in (False, True):
        assert post(CODE, stream=stream).json()["error"]["code"] == "response_blocked"
        masked = post("ORD-123456", stream=stream)
        assert masked.status_code == 200
        assert "[redacted:order]" in masked.text
        assert "123456" not in masked.text


@pytest.mark.parametrize("task", ["guard", "window"])
def test_a_rule_fires_on_speech(
    http: httpx.Client, fixed_upstream: FixedUpstream, task: str
) -> None:
    def audio(text: str) -> dict[str, Any]:
        return {"audio": {"id": "a", "data": "UklGRg==", "transcript": text}}

    pieces: list[dict[str, Any]] = [
        *({"delta": audio(text)} for text in ("CODE", "-1234")),
        {"finish_reason": "stop"},
    ]
    chunks = [{"choices": [{"index": 0, **piece}]} for piece in pieces]
    lines = [b"data: " + json.dumps(chunk).encode() for chunk in chunks]
    stream = b"\n\n".join([*lines, b"data: [DONE]", b""])
    choice = {"index": 0, "message": {"content": None, **audio(CODE)}, "finish_reason": "stop"}
    whole = json.dumps({"choices": [choice]}).encode()
    for modalities in (None, ["text", "audio"]):
        for streamed, sent in ((False, whole), (True, stream)):
            content_type = "text/event-stream" if streamed else "application/json"
            fixed_upstream.answers["fixed-speech"] = (content_type, [sent])
            body = request("chat", task, "Hi", stream=streamed, modalities=modalities)
            answer = http.post(PATHS["chat"], json=body | {"model": "fixed-speech"})
            assert "response_blocked" in answer.text
            assert "UklGRg" not in answer.text


def test_events_that_say_other_things_than_the_response_are_not_a_way_around(
    http: httpx.Client, fixed_upstream: FixedUpstream
) -> None:
    item = {"type": "message", "id": "m", "content": [{"type": "output_text", "text": "Fine."}]}
    last = {
        "type": "response.completed",
        "response": {"id": "r", "status": "completed", "output": [item]},
    }
    told = {
        "type": "response.output_text.delta",
        "output_index": 0,
        "content_index": 0,
        "delta": CODE,
    }
    sent = [b"data: %s\n\n" % json.dumps(each).encode() for each in (told, last)]
    fixed_upstream.answers["fixed-liar"] = ("text/event-stream", sent)
    body = request("responses", "guard", "Hi", stream=True) | {"model": "fixed-liar"}
    answer = http.post(PATHS["responses"], json=body)
    assert said("responses", answer) == ["Fine."]
    assert CODE not in answer.text


def test_a_copy_of_the_text_in_the_chunks_is_not_a_way_around(
    http: httpx.Client, fixed_upstream: FixedUpstream
) -> None:
    """Some providers send the text so far as `message` beside each `delta`."""

    def chunks(*texts: str, copy: str) -> bytes:
        sent = [
            {"index": 0, "delta": {"content": text}, "message": {"content": copy}} for text in texts
        ]
        sent[-1]["finish_reason"] = "stop"
        lines = [b"data: " + json.dumps({"choices": [each]}).encode() for each in sent]
        return b"\n\n".join([*lines, b"data: [DONE]", b""])

    def post(task: str) -> httpx.Response:
        body = request("chat", task, "Hi", stream=True) | {"model": "fixed-copy"}
        return http.post(PATHS["chat"], json=body)

    fixed_upstream.answers["fixed-copy"] = ("text/event-stream", [chunks("CODE", "-1234", copy="")])
    assert post("guard").status_code == 403
    fixed_upstream.answers["fixed-copy"] = ("text/event-stream", [chunks("Fi", "ne.", copy=CODE)])
    answer = post("guard")
    assert said("chat", answer) == ["Fine."]
    assert CODE not in answer.text
    answer = post("window")
    assert CODE not in answer.text
    assert events(answer.content)[-1]["error"]["code"] == "upstream_unreadable"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_secrets_are_found_and_masks_put_on(
    http: httpx.Client, endpoint: str, stream: bool
) -> None:
    body = request(endpoint, "guard", scripted(text=f"The key is {SECRET}."), stream=stream)
    assert http.post(PATHS[endpoint], json=body).status_code == 403
    masked = scripted(text="Your ORD-123456 and ORD-999999.")
    answer = http.post(PATHS[endpoint], json=request(endpoint, "guard", masked, stream=stream))
    assert said(endpoint, answer) == ["Your [redacted:order] and [redacted:order]."]
    assert "123456" not in answer.text


# ----------------------------------------------------------------------------------- spellings of a path

SPELLINGS = [
    "/v1/chat/completions/",
    "/v1//chat/completions",
    "/v1/chat//completions",
    "//v1/chat/completions",
    "/v1/chat%2Fcompletions",
    "/v1/chat%2fcompletions",
    "/v1/chat%252Fcompletions",
    "/v1/chat%25252fcompletions",
    "/v1/%63hat/completion%73",
    "/v1/%2563hat/completions",
    "/v1/Chat/Completions",
    "/v1/CHAT/COMPLETIONS/",
    "/V1/chat/completions",
    "/v1/./chat/completions",
    "/v1/files/../chat/completions",
    "/v1/files/%2e%2e/chat/completions",
    "/v1/files/%252e%252e/chat/completions",
    "/v1/files/..%2fchat/completions",
    "/v1/files/..%5cchat/completions",
    "/v1\\chat\\completions",
    "/v1/chat/completions;v=1",
    "/v1/chat;v=1/completions",
    "/v1/chat/completions%20",
    "/v1/chat/completions%00",
    "/v1/chat/completions%3Fa=b",
    "/v1/chat/completions%23",
    "/v1/chat/completions?stream=false",
    "/v1/chat/completions#now",
    "http://somewhere.example/v1/chat/completions",
    "http://somewhere.example//v1/chat/completions",
]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "GET", "DELETE", "REPORT"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_no_spelling_of_the_path_leads_around_the_checks(
    holdgate: Server, upstream: Server, http: httpx.Client, spelling: str, method: str
) -> None:
    http.delete(f"{upstream.url}/calls")
    body = json.dumps(request("chat", "guard", scripted(text=f"It is {CODE}.")))
    status, told = send(holdgate, method, spelling, body)
    calls = http.get(f"{upstream.url}/calls").json()["calls"]
    assert f"It is {CODE}." not in told
    assert status in (400, 403, 404, 405), told
    assert len(calls) == (status == 403)
    assert all((c["method"], c["path"]) == ("POST", "/v1/chat/completions") for c in calls)


@pytest.mark.parametrize("header", ["X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/things"])
def test_no_header_makes_a_post_of_a_get(
    holdgate: Server, upstream: Server, path: str, header: str
) -> None:
    httpx.delete(f"{upstream.url}/calls")
    send(holdgate, "GET", path, "", header)
    calls = httpx.get(f"{upstream.url}/calls", params={"finished": 1}).json()["calls"]
    assert [c["method"] for c in calls] == ["GET"]
    assert header.lower() not in calls[0]["headers"]


def send(
    server: Server, method: str, target: str, body: str, override: str | None = None
) -> tuple[int, str]:
    """Status and body of the answer to a request with exactly this target."""
    address = urlsplit(server.url)
    lines = [
        f"{method} {target} HTTP/1.1",
        f"Host: {address.netloc}",
        "Connection: close",
        "Content-Type: application/json",
        *([f"{override}: POST"] if override else []),
        *([f"Content-Length: {len(body.encode())}"] if body else []),
    ]
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(("\r\n".join(lines) + f"\r\n\r\n{body}").encode())
        answer = b"".join(iter(lambda: connection.recv(65_536), b"")).decode()
    head, _, told = answer.partition("\r\n\r\n")
    return int(head.split()[1]), told


# ------------------------------------------------------------------------------- what the provider stored


@pytest.mark.parametrize(
    "path", ["chat/completions", "conversations/conv_1/items", "chat/completions/chatcmpl-1"]
)
def test_what_the_provider_stored_is_not_to_be_had_where_passthrough_refuses(
    gateway: GatewayFactory, upstream_calls: UpstreamCalls, path: str
) -> None:
    server = gateway({"hold": POLICIES["hold"]}, passthrough={"default": "refuse"})
    answer = httpx.get(f"{server.url}/v1/{path}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "path_refused")
    assert upstream_calls() == []


@contextmanager
def stored(http: httpx.Client, endpoint: str, task: str, text: str, name: str) -> Iterator[str]:
    """Have a response with an id that the demo upstream then says it has stored."""
    extra = {"body": {"id": name}}
    body = request(endpoint, task, scripted(text=text, extra=extra), store=True)
    answer = http.post(PATHS[endpoint], json=body)
    yield str(answer.headers["x-holdgate-decision"])


STORED = [("chat", "chatcmpl-"), ("responses", "resp_")]


@pytest.mark.parametrize(("endpoint", "prefix"), STORED)
@pytest.mark.parametrize(
    ("task", "text"), [("hold", "Wait."), ("guard", CODE), ("guard", "Your ORD-123456.")]
)
def test_the_providers_copy_of_what_was_kept_back_is_not_to_be_had(
    http: httpx.Client, holdgate: Server, endpoint: str, prefix: str, task: str, text: str
) -> None:
    name = f"{prefix}{task}{len(text)}"
    standing = "A colleague will answer"
    with stored(http, endpoint, task, text, name):
        path = f"{PATHS[endpoint]}/{name}"
        spelt = [
            path,
            f"{path}/",
            f"{path}?include[]=x",
            path.replace(endpoint[:4], endpoint[:4].upper()),
            path.replace(name, name.replace("-", "%2D").replace("_", "%5F")),
            path.replace(name, name.replace("-", "%252D").replace("_", "%255F")),
            f"{path}%20",
            f"{path};v=1",
            f"{path}/input_items",
            f"{path}/messages",
        ]
        for spelling in spelt:
            for method in ("GET", "POST", "DELETE"):
                status, told = send(holdgate, method, f"/v1/{spelling}", "")
                assert standing not in told, (method, spelling)
                assert status == 200 or '"error"' in told, (method, spelling)
                assert text not in told


def test_what_was_returned_as_it_was_can_be_fetched_from_the_provider(http: httpx.Client) -> None:
    for endpoint, prefix in STORED:
        with stored(http, endpoint, "guard", "Fine.", f"{prefix}returned") as decision:
            copy = http.get(f"{PATHS[endpoint]}/{prefix}returned")
            assert "A colleague will answer" in copy.text
            ours = http.get(f"{PATHS[endpoint]}/{decision}")
            assert said(endpoint, ours) == ["Fine."]


def test_a_masked_response_is_fetched_with_its_mask(http: httpx.Client) -> None:
    name = "chatcmpl-masked"
    with stored(http, "chat", "guard", "Your ORD-123456.", name) as decision:
        for each in (name, decision):
            answer = http.get(f"{PATHS['chat']}/{each}")
            assert said("chat", answer) == ["Your [redacted:order]."]


def test_an_approved_response_is_fetched_by_either_name(http: httpx.Client, submit: Submit) -> None:
    name = "chatcmpl-approved"
    with stored(http, "chat", "hold", "Wait.", name) as decision:
        submit(decision, "correct", correction="Waited.")
        for each in (name, decision):
            assert said("chat", http.get(f"{PATHS['chat']}/{each}")) == ["Waited."]


def test_the_list_of_stored_completions_leaves_out_what_was_kept_back(http: httpx.Client) -> None:
    listed = http.get(PATHS["chat"], params={"limit": 2})
    assert [item["id"] for item in listed.json()["data"]] == ["chatcmpl-demo0", "chatcmpl-demo1"]
    assert listed.headers["x-holdgate-action"] == "passthrough"
    with stored(http, "chat", "hold", "Wait.", "chatcmpl-demo1"):
        for query in ({}, {"limit": 2}):
            answer = http.get(PATHS["chat"], params=query)
            assert [item["id"] for item in answer.json()["data"]] == ["chatcmpl-demo0"]
            assert answer.json()["object"] == "list"
        for spelling in ("Chat/Completions", "chat%2Fcompletions", "chat/completions;v=1"):
            assert "chatcmpl-demo1" not in http.get(spelling).text
