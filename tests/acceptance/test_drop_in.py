"""The official client behind the gateway: nothing that it sends, gets or relies on may change."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pydantic
import pytest

from tests.acceptance.acting import ENDPOINTS, PATHS, request, scripted
from tests.acceptance.conftest import ClientFor, FixedUpstream
from tests.acceptance.wire import DONE, events, said
from tests.conftest import UpstreamCalls
from tests.processes import Server

#: Every way a stream gets to its client: as it comes, collected and played back, through a window.
STREAMED = ("plain", "whole", "window")
SCORED = ("scored", "scored-live", "scored-window")
REFUND = {"order_id": "A-1007", "amount": 40.0, "reason": "broken"}


def user(**script: Any) -> list[Any]:
    return [{"role": "user", "content": scripted(**script)}]


def test_every_client_header_goes_upstream_but_ours_and_those_of_the_hop(
    http: httpx.Client, upstream_calls: UpstreamCalls
) -> None:
    ours = {
        "x-holdgate-task": "plain",
        "x-holdgate-whatever": "1",
        "prefer": "wait=1",
        "cookie": "session=1",
    }
    theirs = {
        "authorization": "Bearer sk-provider",
        "idempotency-key": "header-test",
        "openai-beta": "assistants=v2",
        "openai-organization": "org-1",
        "user-agent": "OpenAI/Python 2.54.0",
        "x-request-id": "req-of-the-client",
        "x-stainless-retry-count": "0",
        "x-unheard-of": "yes",
    }
    answer = http.post(PATHS["chat"], json=request("chat", "plain", "Hi"), headers=ours | theirs)
    assert answer.status_code == 200
    [call] = upstream_calls(finished=1)
    assert {name: call["headers"].get(name) for name in theirs} == theirs
    assert not set(ours) & set(call["headers"])


@pytest.mark.parametrize("task", ["plain", "scored"])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_unknown_request_fields_reach_the_provider(
    http: httpx.Client, endpoint: str, task: str
) -> None:
    unknown: dict[str, Any] = {"x_new": {"a": [1, None, "ü"]}, "moderation": {"mode": "auto"}}
    unknown["seed"] = 2**63 - 1
    body = request(endpoint, task, scripted(echo=True), **unknown)
    [text] = said(endpoint, http.post(PATHS[endpoint], json=body))
    received = json.loads(text)["body"]
    assert body.items() <= received.items()
    assert set(received) - set(body) <= {"logprobs", "top_logprobs", "include"}
    assert (set(received) == set(body)) is (task == "plain")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("task", [*STREAMED, "scored", "guard"])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_unknown_response_fields_reach_the_client(
    http: httpx.Client, endpoint: str, task: str, stream: bool
) -> None:
    extra = {"body": {"x_cost": 1.25}, "choice": {"x_rank": 7}, "message": {"x_mood": "calm"}}
    body = request(endpoint, task, scripted(text="Well.", extra=extra), stream=stream)
    answer = http.post(PATHS[endpoint], json=body)
    shown = events(answer.content)[2 if endpoint == "responses" else 0] if stream else answer.json()
    assert '"x_rank": 7' in json.dumps(shown)
    assert endpoint == "completions" or '"x_mood": "calm"' in answer.text.replace('":"', '": "')
    assert '"x_cost":1.25' in answer.text.replace(": ", ":")


def test_sdk_keeps_the_fields_it_does_not_know(client_for: ClientFor) -> None:
    verdict = {"input": {"flagged": False}, "output": {"flagged": False}}
    messages = user(text="Hi", reasoning="Let me see.", extra={"body": {"x_moderation": verdict}})
    for task in ("plain", "scored"):
        answer = client_for(task).chat.completions.create(model="demo-large", messages=messages)
        assert (answer.model_extra or {})["x_moderation"] == verdict
        message = answer.choices[0].message
        assert (message.model_extra or {})["reasoning_content"] == "Let me see."


@pytest.mark.parametrize("task", ["plain", "hold", "guard"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 409, 422, 429, 500, 503, 529])
def test_provider_errors_are_relayed_and_no_rule_runs_on_them(
    http: httpx.Client, upstream: Server, status: int, stream: bool, task: str
) -> None:
    error = {"message": "CODE-1234 is wrong", "code": "own_code", "type": "own_type", "param": "p"}
    told = {
        "retry-after": "7",
        "retry-after-ms": "7000",
        "x-ratelimit-remaining-requests": "0",
        "x-should-retry": "true",
        "x-request-id": "req_provider",
    }
    script = scripted(status=status, error=error, headers=told)
    body = request("chat", task, script, stream=stream)
    direct = http.post(f"{upstream.url}/v1/chat/completions", json=body)
    answer = http.post(PATHS["chat"], json=body)
    assert (answer.status_code, answer.content) == (status, direct.content)
    relayed = {name: value for name, value in told.items() if name != "x-request-id"}
    assert {name: answer.headers.get(name) for name in relayed} == relayed
    assert answer.headers["content-type"] == direct.headers["content-type"]
    assert answer.headers["x-holdgate-action"] == "return"
    assert answer.headers["x-holdgate-upstream-request-id"] == "req_provider"


def test_provider_errors_become_the_same_exception(client_for: ClientFor) -> None:
    error = {"message": "Slow down.", "code": "rate_limit_exceeded", "type": "requests"}
    for task in ("plain", "hold"):
        with pytest.raises(openai.RateLimitError) as caught:
            client_for(task, max_retries=0).chat.completions.create(
                model="demo-large", messages=user(status=429, error=error)
            )
        exc = caught.value
        assert (exc.code, exc.type, exc.param) == ("rate_limit_exceeded", "requests", None)
        assert exc.request_id == exc.response.headers["x-request-id"]
        assert "Slow down." in exc.message


@pytest.mark.parametrize(
    ("headers", "asked"), [({"retry-after-ms": "1"}, 3), ({"x-should-retry": "false"}, 1)]
)
def test_only_the_client_retries_and_as_the_provider_tells_it(
    client_for: ClientFor, upstream_calls: UpstreamCalls, headers: dict[str, str], asked: int
) -> None:
    with pytest.raises(openai.RateLimitError):
        client_for("guard", max_retries=2).chat.completions.create(
            model="demo-large", messages=user(status=429, headers=headers)
        )
    assert len(upstream_calls(finished=asked)) == asked


def test_html_error_page_is_relayed_as_it_is(client_for: ClientFor) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client_for("hold", max_retries=0).chat.completions.create(
            model="demo-large", messages=user(fault="html502")
        )
    assert caught.value.status_code == 502
    assert (
        b"<h1>" in caught.value.response.content or b"Bad Gateway" in caught.value.response.content
    )


# ----------------------------------------------------------------------------------------- logprobs


def asking_logprobs(endpoint: str) -> dict[str, Any]:
    asked: dict[str, dict[str, Any]] = {
        "chat": {"logprobs": True, "top_logprobs": 2},
        "completions": {"logprobs": 2},
        "responses": {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
    }
    return asked[endpoint]


def logprobs_in(value: Any) -> list[Any]:
    """Every `logprobs` in a document that says something."""
    if isinstance(value, list):
        return [found for item in value for found in logprobs_in(item)]
    if not isinstance(value, dict):
        return []
    own = [value["logprobs"]] if value.get("logprobs") else []
    return own + [found for item in value.values() for found in logprobs_in(item)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("task", SCORED)
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_logprobs_we_asked_for_never_reach_the_client(
    http: httpx.Client, upstream: Server, endpoint: str, task: str, stream: bool
) -> None:
    fixed = {"id": "same", "created": 1}
    tools = [] if endpoint == "completions" else [{"name": "f", "arguments": {"a": 1}}]
    script = scripted(text="Sure, so be it.", tool_calls=tools, extra={"body": fixed})
    body = request(endpoint, task, script, stream=stream)
    answer = http.post(PATHS[endpoint], json=body)
    direct = http.post(f"{upstream.url}/v1/{PATHS[endpoint]}", json=body)
    shown = events(answer.content) if stream else answer.json()
    assert logprobs_in(shown) == []
    if stream and task == "scored-window":
        # One text may overtake another there, so only what is said of each is compared.
        assert said(endpoint, answer) == said(endpoint, direct)
        return
    unasked = events(direct.content) if stream else direct.json()
    assert without_ids(shown) == without_ids(unasked)


def without_ids(value: Any) -> Any:
    """A document without what differs between any two answers."""
    changing = {
        "id",
        "item_id",
        "call_id",
        "created_at",
        "completed_at",
        "created",
        "usage",
        "include",
    }
    if isinstance(value, list):
        return [without_ids(item) for item in value]
    if isinstance(value, dict):
        return {k: without_ids(v) for k, v in value.items() if k not in changing | {"top_logprobs"}}
    return value


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("task", ["plain", *SCORED])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_logprobs_the_client_asked_for_are_the_providers(
    http: httpx.Client, upstream: Server, endpoint: str, task: str, stream: bool
) -> None:
    fields = asking_logprobs(endpoint)
    body = request(endpoint, task, scripted(text="Sure, so be it."), stream=stream, **fields)
    answer = http.post(PATHS[endpoint], json=body)
    direct = http.post(f"{upstream.url}/v1/{PATHS[endpoint]}", json=body)
    shown, expected = [
        logprobs_in(events(each.content) if stream else each.json()) for each in (answer, direct)
    ]
    assert shown == expected != []


@pytest.mark.parametrize("task", SCORED)
def test_finish_reason_survives_logprobs_on_a_stream(client_for: ClientFor, task: str) -> None:
    stream = client_for(task).chat.completions.create(
        model="demo-large", messages=user(text="Sure."), stream=True, logprobs=True, top_logprobs=2
    )
    reasons = [choice.finish_reason for chunk in stream for choice in chunk.choices]
    assert reasons[-1] == "stop"
    assert set(reasons[:-1]) == {None}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("task", SCORED)
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_model_without_logprobs_is_asked_again_and_nobody_notices(
    http: httpx.Client, upstream_calls: UpstreamCalls, endpoint: str, task: str, stream: bool
) -> None:
    model = f"no-logprobs-{endpoint}-{task}-{stream}"
    body = request(endpoint, task, scripted(text="Here."), stream=stream) | {"model": model}
    replies = [http.post(PATHS[endpoint], json=body) for _ in range(2)]
    assert [said(endpoint, reply) for reply in replies] == [["Here."], ["Here."]]
    assert all("x-holdgate-confidence" not in reply.headers for reply in replies)
    assert len(upstream_calls(finished=3)) == 3


# ------------------------------------------------------------------------------------ how streams end


@pytest.mark.parametrize("task", [*STREAMED, "scored", "scored-window"])
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_usage_comes_last_with_no_choices_and_only_if_asked_for(
    http: httpx.Client, endpoint: str, task: str
) -> None:
    for asked in (False, True):
        options = {"stream_options": {"include_usage": True}} if asked else {}
        body = request(endpoint, task, scripted(text="Well."), stream=True, **options)
        chunks = events(http.post(PATHS[endpoint], json=body).content)
        with_usage = [chunk for chunk in chunks if chunk.get("usage")]
        if asked:
            assert with_usage == chunks[-1:]
            assert chunks[-1]["choices"] == []
        else:
            assert with_usage == []
            assert all(chunk["choices"] for chunk in chunks)


@pytest.mark.parametrize(
    "fault", [None, "after_done", "truncate", "close_mid", "error_mid", "odd_sse"]
)
@pytest.mark.parametrize("task", [*STREAMED, "scored-live"])
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_streams_always_end_with_done_and_nothing_after_it(
    http: httpx.Client, endpoint: str, task: str, fault: str | None
) -> None:
    body = request(endpoint, task, scripted(text="One two three.", fault=fault), stream=True)
    answer = http.post(PATHS[endpoint], json=body)
    if fault in ("truncate", "close_mid", "error_mid") and task == "whole":
        assert answer.status_code == 502
        assert answer.json()["error"]["code"].startswith("upstream_")
        return
    assert answer.content.count(b"[DONE]") == 1
    assert answer.content.replace(b"\r", b"").replace(b"data:[", b"data: [").endswith(DONE)
    assert not [
        line for line in answer.content.splitlines() if line.startswith((b"id:", b"event:"))
    ]


@pytest.mark.parametrize("fault", ["truncate", "close_mid", "garbage", "error_mid", "wrong_type"])
@pytest.mark.parametrize("task", [*STREAMED, "scored-live", "scored-window"])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_broken_stream_is_an_error_and_never_a_silent_end(
    client_for: ClientFor, endpoint: str, task: str, fault: str
) -> None:
    client = client_for(task, max_retries=0)
    prompt = scripted(text="One two three four five.", fault=fault)
    if endpoint == "responses" and fault == "error_mid" and task in ("plain", "scored-live"):
        # An error event of the provider's own, of which this client makes no exception.
        assert [event.type for event in streamed(client, endpoint, prompt)][-1] == "error"
        return
    with pytest.raises(openai.APIError) as caught:
        for _ in streamed(client, endpoint, prompt):
            pass
    assert caught.value.message
    assert fault == "error_mid" or caught.value.code


def streamed(client: openai.OpenAI, endpoint: str, prompt: str) -> Any:
    if endpoint == "responses":
        return client.responses.create(model="demo-large", input=prompt, stream=True)
    if endpoint == "completions":
        return client.completions.create(model="demo-large", prompt=prompt, stream=True)
    messages: Any = [{"role": "user", "content": prompt}]
    return client.chat.completions.create(model="demo-large", messages=messages, stream=True)


def test_error_in_mid_stream_keeps_the_providers_code(client_for: ClientFor) -> None:
    error = {"message": "Out of memory.", "code": "oom", "type": "server_error"}
    for task in ("plain", "whole", "window"):
        prompt = scripted(text="One two three.", fault="error_mid", error=error)
        with pytest.raises(openai.APIError) as caught:
            list(streamed(client_for(task, max_retries=0), "chat", prompt))
        assert "Out of memory." in str(caught.value), task


@pytest.mark.parametrize("fault", ["truncate", "close_mid", "garbage", "close", "wrong_type"])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_broken_body_is_a_502_that_says_so(http: httpx.Client, endpoint: str, fault: str) -> None:
    body = request(endpoint, "guard", scripted(text="One two three.", fault=fault))
    answer = http.post(PATHS[endpoint], json=body)
    assert answer.status_code == 502
    assert answer.json()["error"]["type"] == "upstream_error"


@pytest.mark.parametrize(
    "body", [b'{"error": {"message": "no"}}', b"<html>hello</html>", b"", b"[]"]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_200_that_is_no_completion_is_no_completion_here(
    http: httpx.Client, fixed_upstream: FixedUpstream, body: bytes, stream: bool
) -> None:
    fixed_upstream.answers["fixed-odd"] = ("text/html", [body])
    asked = request("chat", "guard", "Hi", stream=stream) | {"model": "fixed-odd"}
    answer = http.post(PATHS["chat"], json=asked)
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_unreadable")


@pytest.mark.parametrize("task", [*STREAMED, "scored"])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_provider_that_answers_json_to_a_stream_is_streamed(
    client_for: ClientFor,
    http: httpx.Client,
    upstream: Server,
    fixed_upstream: FixedUpstream,
    endpoint: str,
    task: str,
) -> None:
    whole = http.post(
        f"{upstream.url}/v1/{PATHS[endpoint]}",
        json=request(endpoint, task, scripted(text="As you wish.", refusal=None)),
    )
    fixed_upstream.answers["fixed-json"] = ("application/json", [whole.content])
    asked = request(endpoint, task, "Hi", stream=True, stream_options={"include_usage": True})
    answer = http.post(PATHS[endpoint], json=asked | {"model": "fixed-json"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert said(endpoint, answer) == ["As you wish."]
    if endpoint != "responses":
        assert answer.content.endswith(DONE)
        assert events(answer.content)[-1]["usage"] == whole.json()["usage"]
        assert b"event:" not in answer.content


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_compressed_answers_are_read_and_still_checked(
    http: httpx.Client, encoding: str, stream: bool
) -> None:
    for task, text, status in (("guard", "Plain.", 200), ("guard", "CODE-1234", 403)):
        body = request("chat", task, scripted(text=text, encoding=encoding), stream=stream)
        answer = http.post(PATHS["chat"], json=body, headers={"accept-encoding": "gzip, br, zstd"})
        assert answer.status_code == status
        assert "content-encoding" not in answer.headers
        assert status != 200 or said("chat", answer) == ["Plain."]


@pytest.mark.parametrize(
    ("accept", "stream"), [("application/json", True), ("text/event-stream", False)]
)
def test_the_body_decides_about_streaming_and_not_accept(
    http: httpx.Client, accept: str, stream: bool
) -> None:
    for task in ("plain", "whole", "guard"):
        body = request("chat", task, "Hi", stream=stream)
        answer = http.post(PATHS["chat"], json=body, headers={"accept": accept})
        is_stream = answer.headers["content-type"].startswith("text/event-stream")
        assert is_stream is stream


# ------------------------------------------------------------------------------------ headers and ids


def test_request_id_is_ours_or_the_clients_and_the_providers_has_its_own_name(
    client_for: ClientFor, http: httpx.Client
) -> None:
    for task in ("plain", "scored"):
        answer = client_for(task).chat.completions.with_raw_response.create(
            model="demo-large", messages=user(text="Hi", headers={"x-request-id": "req_theirs"})
        )
        assert answer.parse()._request_id == answer.headers["x-request-id"]
        assert answer.headers["x-request-id"] == answer.headers["x-holdgate-decision"]
        assert answer.headers["x-holdgate-upstream-request-id"] == "req_theirs"
    own = {"x-request-id": "my-own-id"}
    for task, status in (("plain", 200), ("hold", 423)):
        held = http.post(PATHS["chat"], json=request("chat", task, "Hi"), headers=own)
        assert (held.status_code, held.headers["x-request-id"]) == (status, "my-own-id")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_replies_say_what_was_decided(http: httpx.Client, endpoint: str, stream: bool) -> None:
    body = request(endpoint, "scored", scripted(text="Certain.", certainty=1), stream=stream)
    told = http.post(PATHS[endpoint], json=body).headers
    assert told["x-holdgate-decision"].startswith("hgd_")
    assert told["x-holdgate-action"] in ("return", "flag")
    assert told["x-holdgate-risk"] == "low"
    assert told["x-holdgate-policy"].partition("@")[0] == "scored"
    assert 0 < float(told["x-holdgate-confidence"]) < 1
    assert 0 <= float(told["x-holdgate-overhead-ms"]) < 5000
    plain = http.post(PATHS[endpoint], json=request(endpoint, "plain", "Hi", stream=stream))
    assert "x-holdgate-confidence" not in plain.headers


def test_task_comes_from_the_header_before_the_metadata(http: httpx.Client) -> None:
    def policy_of(metadata: dict[str, str], headers: dict[str, str]) -> str | None:
        body = request("chat", "", "Hi") | {"metadata": metadata}
        label = http.post(PATHS["chat"], json=body, headers=headers).headers.get(
            "x-holdgate-policy"
        )
        return label.partition("@")[0] if label else None

    assert policy_of({"task": "plain"}, {}) == "plain"
    assert policy_of({"task": "plain"}, {"x-holdgate-task": "whole"}) == "whole"
    assert policy_of({}, {"x-holdgate-task": "whole"}) == "whole"
    assert policy_of({}, {}) is None


# ----------------------------------------------------------------------------------- what people send


class Verdict(pydantic.BaseModel):
    answer: str
    sure: bool


@pytest.mark.parametrize("task", ["plain", "guard", "scored"])
def test_structured_output_parses(client_for: ClientFor, task: str) -> None:
    text = '{"answer": "yes", "sure": true}'
    client = client_for(task)
    chat = client.chat.completions.parse(
        model="demo-large", messages=user(text=text), response_format=Verdict
    )
    assert chat.choices[0].message.parsed == Verdict(answer="yes", sure=True)
    response = client.responses.parse(
        model="demo-large", input=scripted(text=text), text_format=Verdict
    )
    assert response.output_parsed == Verdict(answer="yes", sure=True)


def test_parse_raises_on_an_answer_cut_short_and_create_does_not(client_for: ClientFor) -> None:
    for reason, error in (
        ("length", openai.LengthFinishReasonError),
        ("content_filter", openai.ContentFilterFinishReasonError),
    ):
        messages = user(text='{"answer": "y', finish_reason=reason)
        client = client_for("guard")
        with pytest.raises(error):
            client.chat.completions.parse(
                model="demo-large", messages=messages, response_format=Verdict
            )
        plain = client.chat.completions.create(model="demo-large", messages=messages)
        assert plain.choices[0].finish_reason == reason


@pytest.mark.parametrize("task", ["plain", "guard", "scored"])
def test_parallel_tool_calls_arrive_whole_and_streamed(client_for: ClientFor, task: str) -> None:
    calls = [{"name": "refund", "arguments": REFUND}, {"name": "notify", "arguments": {"to": "A"}}]
    client, messages = client_for(task), user(text="On it.", tool_calls=calls)
    tools: Any = [{"type": "function", "function": {"name": call["name"]}} for call in calls]
    given: Any = {"model": "demo-large", "messages": messages, "tools": tools}
    whole = client.chat.completions.create(**given, parallel_tool_calls=True)
    with client.chat.completions.stream(**given) as stream:
        streamed = stream.get_final_completion()
    for answer in (whole, streamed):
        [choice] = answer.choices
        assert choice.finish_reason == "tool_calls"
        functions: Any = [call.function for call in choice.message.tool_calls or ()]
        assert [(f.name, json.loads(f.arguments)) for f in functions] == [
            (call["name"], call["arguments"]) for call in calls
        ]


@pytest.mark.parametrize("task", ["plain", "guard", "window", "scored"])
def test_several_choices_stay_apart(client_for: ClientFor, task: str) -> None:
    texts = ["The first one.", "The second one, longer.", "Third."]
    client, messages = client_for(task), user(texts=texts)
    whole = client.chat.completions.create(model="demo-large", messages=messages, n=3)
    assert [choice.message.content for choice in whole.choices] == texts
    spoken = ["", "", ""]
    for chunk in client.chat.completions.create(
        model="demo-large", messages=messages, n=3, stream=True
    ):
        for choice in chunk.choices:
            spoken[choice.index] += choice.delta.content or ""
    assert spoken == texts


@pytest.mark.parametrize("task", ["plain", "guard", "scored"])
def test_refusals_and_reasoning_are_kept_apart_from_text(client_for: ClientFor, task: str) -> None:
    client = client_for(task)
    refused = user(refusal="I would rather not.", reasoning="Hmm, no.")
    whole = client.chat.completions.create(model="demo-large", messages=refused).choices[0].message
    assert (whole.content, whole.refusal) == (None, "I would rather not.")
    spoken: dict[str, str] = {}
    for chunk in client.chat.completions.create(model="demo-large", messages=refused, stream=True):
        for name, value in chunk.choices[0].delta.to_dict().items():
            spoken[name] = spoken.get(name, "") + (value if isinstance(value, str) else "")
    assert spoken["refusal"] == "I would rather not."
    assert spoken["reasoning_content"] == "Hmm, no."
    assert spoken["content"] == ""


def test_images_and_all_else_in_messages_reach_the_provider(client_for: ClientFor) -> None:
    content: Any = [
        {"type": "text", "text": scripted(echo=True)},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
        {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
        {"type": "file", "file": {"file_id": "file-1"}},
    ]
    for task in ("plain", "scored"):
        answer = client_for(task).chat.completions.create(
            model="demo-large",
            messages=[{"role": "user", "content": content}],
            response_format={"type": "json_object"},
        )
        received = json.loads(answer.choices[0].message.content or "")["body"]
        assert received["messages"][0]["content"] == content
        assert received["response_format"] == {"type": "json_object"}


@pytest.mark.parametrize("task", ["plain", "whole", "guard", "scored", "scored-live"])
def test_responses_stream_accumulates_in_the_sdk(client_for: ClientFor, task: str) -> None:
    prompt = scripted(text="On it.", tool_calls=[{"name": "refund", "arguments": REFUND}])
    with client_for(task).responses.stream(model="demo-large", input=prompt) as stream:
        final = stream.get_final_response()
    assert final.output_text == "On it."
    call: Any = final.output[-1]
    assert json.loads(call.arguments) == REFUND


async def test_async_client_sees_the_same(holdgate: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{holdgate.url}/v1", api_key="sk-test") as client:
        for task in ("plain", "guard", "scored"):
            given: Any = {
                "model": "demo-large",
                "messages": user(text="Hello."),
                "extra_headers": {"x-holdgate-task": task},
            }
            whole = await client.chat.completions.create(**given)
            assert whole.choices[0].message.content == "Hello."
            chunks = [c async for c in await client.chat.completions.create(**given, stream=True)]
            assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Hello."


# ---------------------------------------------------------------------------------------- going away


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("task", ["plain", "whole", "guard"])
def test_a_client_that_leaves_before_the_answer_cancels_the_call(
    http: httpx.Client, upstream_calls: UpstreamCalls, task: str, stream: bool
) -> None:
    body = request("chat", task, scripted(text="Late.", delay_ms=20_000), stream=stream)
    with pytest.raises(httpx.ReadTimeout):
        http.post(PATHS["chat"], json=body, timeout=0.3)
    [call] = upstream_calls(finished=1)
    assert call["aborted"]


@pytest.mark.parametrize("task", ["plain", "window", "whole"])
def test_a_client_that_leaves_in_mid_stream_cancels_the_call(
    http: httpx.Client, upstream_calls: UpstreamCalls, task: str
) -> None:
    script = scripted(text="And so on. " * 200, token_delay_ms=20)
    body = request("chat", task, script, stream=True)
    if task == "whole":
        with pytest.raises(httpx.ReadTimeout):
            http.post(PATHS["chat"], json=body, timeout=0.5)
    else:
        with http.stream("POST", PATHS["chat"], json=body) as answer:
            assert next(answer.iter_raw())
    [call] = upstream_calls(finished=1)
    assert call["aborted"]


async def test_many_identical_calls_at_once_are_all_answered(
    holdgate: Server, upstream_calls: UpstreamCalls
) -> None:
    body = request("chat", "guard", scripted(text="Hi.", delay_ms=200))
    async with httpx.AsyncClient(base_url=f"{holdgate.url}/v1/", timeout=20) as http:
        replies = await asyncio.gather(*(http.post(PATHS["chat"], json=body) for _ in range(8)))
    assert {reply.status_code for reply in replies} == {200}
    assert len({reply.headers["x-holdgate-decision"] for reply in replies}) == 8
    assert len(upstream_calls(finished=8)) == 8
