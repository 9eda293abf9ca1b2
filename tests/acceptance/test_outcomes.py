"""What the official client makes of a policy's outcomes: one request, one exception that says what to do next."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import httpx
import openai
import pydantic
import pytest

from tests.acceptance.acting import ENDPOINTS, PATHS, request, scripted
from tests.acceptance.conftest import ClientFor, FixedUpstream, Submit
from tests.acceptance.wire import DONE, events, said
from tests.conftest import UpstreamCalls
from tests.processes import Server


class Verdict(pydantic.BaseModel):
    answer: str


def call(client: openai.OpenAI, endpoint: str, prompt: str, **fields: Any) -> Any:
    if endpoint == "responses":
        return client.responses.create(model="demo-large", input=prompt, **fields)
    if endpoint == "completions":
        return client.completions.create(model="demo-large", prompt=prompt, **fields)
    messages: Any = [{"role": "user", "content": prompt}]
    return client.chat.completions.create(model="demo-large", messages=messages, **fields)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_held_response_is_one_423_that_says_where_to_ask(
    client_for: ClientFor, upstream_calls: UpstreamCalls, endpoint: str, stream: bool
) -> None:
    client = client_for("hold", max_retries=2)
    with pytest.raises(openai.APIStatusError) as caught:
        call(client, endpoint, scripted(text="Wait for it."), stream=stream)
    assert len(upstream_calls(finished=1)) == 1
    exc = caught.value
    assert exc.status_code == 423
    assert (exc.code, exc.type, exc.param) == ("response_held", "policy_hold", None)
    hold: Any = exc.body["hold"]  # type: ignore[index]
    assert hold["id"] == exc.response.headers["x-holdgate-decision"]
    assert hold["status"] == "held"
    assert hold["url"] == exc.response.headers["location"]
    assert hold["url"].endswith(hold["id"])
    assert {"expires_at", "estimated_wait_s"} < set(hold)
    assert exc.response.headers["x-should-retry"] == "false"
    assert exc.response.headers["x-holdgate-action"] == "hold"
    assert exc.request_id == exc.response.headers["x-request-id"]
    assert hold["url"] in exc.message


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_blocked_response_is_one_403_that_says_why(
    client_for: ClientFor, upstream_calls: UpstreamCalls, endpoint: str, stream: bool
) -> None:
    client = client_for("guard", max_retries=2)
    with pytest.raises(openai.PermissionDeniedError) as caught:
        call(client, endpoint, scripted(text="It is CODE-1234."), stream=stream)
    assert len(upstream_calls(finished=1)) == 1
    exc = caught.value
    assert (exc.code, exc.type) == ("response_blocked", "policy_block")
    assert exc.response.headers["x-should-retry"] == "false"
    [reason] = exc.body["reasons"]  # type: ignore[index]
    assert reason.startswith("check:code: ")
    assert "CODE-1234" not in exc.response.text


def test_a_held_completion_is_retrieved_once_approved(
    client_for: ClientFor, submit: Submit
) -> None:
    client = client_for("hold", max_retries=2)
    with pytest.raises(openai.APIStatusError) as caught:
        call(client, "chat", scripted(text="Worth the wait."))
    hold: Any = caught.value.body["hold"]  # type: ignore[index]
    with pytest.raises(openai.APIStatusError) as again:
        client.chat.completions.retrieve(hold["id"])
    assert again.value.code == "response_held"
    submit(hold["id"], "approve")
    answer = client.chat.completions.retrieve(hold["id"])
    assert answer.choices[0].message.content == "Worth the wait."
    assert answer.choices[0].finish_reason == "stop"


def test_a_held_response_is_retrieved_as_corrected(client_for: ClientFor, submit: Submit) -> None:
    client = client_for("hold")
    with pytest.raises(openai.APIStatusError) as caught:
        call(client, "responses", scripted(text="Nearly right."))
    hold: Any = caught.value.body["hold"]  # type: ignore[index]
    submit(hold["id"], "correct", correction="Right.")
    assert client.responses.retrieve(hold["id"]).output_text == "Right."


def test_a_rejected_response_is_one_403(
    client_for: ClientFor, submit: Submit, upstream_calls: UpstreamCalls
) -> None:
    client = client_for("hold", max_retries=2)
    with pytest.raises(openai.APIStatusError) as caught:
        call(client, "chat", scripted(text="No good."))
    hold: Any = caught.value.body["hold"]  # type: ignore[index]
    submit(hold["id"], "reject", reason="off_topic")
    with pytest.raises(openai.PermissionDeniedError) as rejected:
        client.chat.completions.retrieve(hold["id"])
    assert rejected.value.code == "response_rejected"
    assert rejected.value.response.headers["x-should-retry"] == "false"
    assert "off_topic" in rejected.value.message
    assert len(upstream_calls(finished=1)) == 1


def test_parse_of_a_held_answer_raises_what_create_raises(client_for: ClientFor) -> None:
    messages: Any = [{"role": "user", "content": scripted(text='{"answer": "y"}')}]
    with pytest.raises(openai.APIStatusError) as caught:
        client_for("hold").chat.completions.parse(
            model="demo-large", messages=messages, response_format=Verdict
        )
    assert caught.value.code == "response_held"


def test_a_placeholder_reads_as_a_refusal_that_parse_does_not_take(client_for: ClientFor) -> None:
    client = client_for("placeholder")
    messages: Any = [{"role": "user", "content": scripted(text='{"answer": "y"}')}]
    answer = client.chat.completions.create(model="demo-large", messages=messages)
    [choice] = answer.choices
    assert choice.finish_reason == "content_filter"
    assert choice.message.content is None
    assert "held" in (choice.message.refusal or "")
    hold: Any = (answer.model_extra or {})["holdgate"]
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.retrieve(hold["id"])
    assert caught.value.status_code == 423
    with pytest.raises(openai.ContentFilterFinishReasonError):
        client.chat.completions.parse(
            model="demo-large", messages=messages, response_format=Verdict
        )
    response = client.responses.create(model="demo-large", input=scripted(text="y"))
    assert (response.status, response.output_text) == ("incomplete", "")


@pytest.mark.parametrize(
    "headers",
    [{"prefer": "respond-async"}, {"prefer": "wait=0"}, {"x-stainless-read-timeout": "0.1"}],
)
def test_a_client_waits_no_longer_than_it_wants_to(
    http: httpx.Client, headers: dict[str, str]
) -> None:
    answer = http.post(PATHS["chat"], json=request("chat", "wait", "Hi"), headers=headers)
    assert answer.status_code == 423


def test_a_client_that_would_time_out_hears_of_the_hold_before(client_for: ClientFor) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        call(client_for("wait", timeout=1.2, max_retries=0), "chat", scripted(text="Later."))
    assert caught.value.code == "response_held"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_waiting_client_gets_the_approved_response_as_if_nothing_had_happened(
    holdgate: Server, http: httpx.Client, submit: Submit, endpoint: str, stream: bool
) -> None:
    calls = [{"name": "pay", "arguments": {"amount": 1}}] if endpoint == "chat" else []
    script = scripted(text="Worth it.", tool_calls=calls, extra={"body": {"x_cost": 2}})
    options = {"stream_options": {"include_usage": True}} if stream else {}
    body = request(endpoint, "wait", script, stream=stream, **options)
    marker = {"x-request-id": f"waiting-{endpoint}-{stream}"}
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(http.post, PATHS[endpoint], json=body, headers=marker)
        submit(held_by(holdgate, marker["x-request-id"]), "approve")
        answer = waiting.result(20)
    assert answer.status_code == 200
    assert said(endpoint, answer) == ["Worth it." + ('{"amount": 1}' if calls else "")]
    assert "x_cost" in answer.text
    assert answer.headers["x-holdgate-action"] == "hold"
    if stream and endpoint != "responses":
        assert answer.content.endswith(DONE)
        assert events(answer.content)[-1]["usage"]
        lines = answer.content.splitlines()
        assert not [line for line in lines if line.startswith((b"id:", b"event:"))]


def held_by(server: Server, request_id: str) -> str:
    """The decision on the request with that id, once it is held."""
    query = "SELECT id FROM decisions WHERE request_id = ? AND action = 'hold'"
    deadline_s = time.monotonic() + 15
    with closing(sqlite3.connect(server.stderr.parent / "holdgate.db")) as store:
        while (found := store.execute(query, (request_id,)).fetchone()) is None:
            assert time.monotonic() < deadline_s, f"no hold of {request_id}"
    return str(found[0])


# --------------------------------------------------------------------------------- keeping alive


@pytest.fixture
def impatient(hasty: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{hasty.url}/v1/", timeout=20, verify=False) as client:
        yield client


@pytest.mark.parametrize("task", ["plain", "whole", "guard", "scored", "window"])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_slow_stream_is_kept_alive_by_comments(
    impatient: httpx.Client, endpoint: str, task: str
) -> None:
    body = request(endpoint, task, scripted(text="At last.", delay_ms=300), stream=True)
    answer = impatient.post(PATHS[endpoint], json=body)
    assert answer.content.startswith(b": ")
    assert said(endpoint, answer) == ["At last."]
    assert answer.headers["x-holdgate-decision"].startswith("hgd_")
    if endpoint != "responses":
        assert answer.content.endswith(DONE)
        assert b"event:" not in answer.content


def test_the_sdk_reads_a_stream_that_was_kept_alive(client_for: ClientFor, hasty: Server) -> None:
    client = client_for("guard", hasty, timeout=2)
    chunks = call(client, "chat", scripted(text="At last.", delay_ms=600), stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "At last."


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_what_goes_wrong_after_the_first_comment_is_an_error_event(
    client_for: ClientFor, hasty: Server, endpoint: str
) -> None:
    def error_of(task: str, **script: Any) -> openai.APIError:
        client = client_for(task, hasty, max_retries=0)
        with pytest.raises(openai.APIError) as caught:
            list(call(client, endpoint, scripted(delay_ms=300, **script), stream=True))
        return caught.value

    error = {"message": "Slow down.", "code": "too_fast", "type": "requests", "x_more": 1}
    late = error_of("guard", status=429, error=error)
    assert (late.code, late.type) == ("too_fast", "requests")
    assert "Slow down." in late.message
    assert late.body["x_more"] == 1  # type: ignore[index]
    held: Any = error_of("hold", text="Wait.").body
    assert (held["code"], held["hold"]["status"]) == ("response_held", "held")
    assert error_of("guard", text="CODE-1234").code == "response_blocked"
    assert error_of("guard", fault="close").code == "upstream_error"


# ------------------------------------------------------------------------------- asking once more

RETRY = {"x-stainless-retry-count": "1"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_retry_of_a_held_call_finds_its_hold(
    http: httpx.Client, upstream_calls: UpstreamCalls, endpoint: str, stream: bool
) -> None:
    body = request(endpoint, "hold", scripted(text=f"Held, {endpoint}, {stream}."), stream=stream)
    first = http.post(PATHS[endpoint], json=body)
    second = http.post(PATHS[endpoint], json=body, headers=RETRY)
    assert first.status_code == second.status_code == 423
    assert second.json()["error"]["hold"]["id"] == first.json()["error"]["hold"]["id"]
    assert len(upstream_calls(finished=1)) == 1


@pytest.mark.parametrize(("task", "status"), [("guard", 200), ("hold", 423), ("guard", 403)])
def test_a_retry_of_a_call_under_way_gets_its_decision(
    http: httpx.Client, upstream_calls: UpstreamCalls, task: str, status: int
) -> None:
    text = "CODE-1234" if status == 403 else "Once."
    body = request("chat", task, scripted(text=text, delay_ms=600))
    with ThreadPoolExecutor() as pool:
        first = pool.submit(http.post, PATHS["chat"], json=body)
        upstream_calls(started=1)
        retry = http.post(PATHS["chat"], json=body, headers=RETRY)
    assert (first.result().status_code, retry.status_code) == (status, status)
    ids = {each.headers["x-holdgate-decision"] for each in (first.result(), retry)}
    assert len(ids) == 1
    assert len(upstream_calls(finished=1)) == 1


def test_a_retry_of_a_call_that_failed_asks_again(
    http: httpx.Client, upstream_calls: UpstreamCalls
) -> None:
    attempts = [{"status": 503}, {"text": "Better."}]
    body = request("chat", "guard", scripted(id="retry-after-failure", attempts=attempts))
    assert http.post(PATHS["chat"], json=body).status_code == 503
    second = http.post(PATHS["chat"], json=body, headers=RETRY)
    assert said("chat", second) == ["Better."]
    assert len(upstream_calls(finished=2)) == 2


def test_the_sdk_retries_failures_and_pays_once_for_what_follows(
    client_for: ClientFor, upstream_calls: UpstreamCalls
) -> None:
    attempts = [{"status": 503, "headers": {"retry-after-ms": "1"}}] * 2 + [{"text": "Third."}]
    client = client_for("guard", max_retries=2)
    answer = call(client, "chat", scripted(id="sdk-retries", attempts=attempts))
    assert answer.choices[0].message.content == "Third."
    counts = [made["headers"]["x-stainless-retry-count"] for made in upstream_calls(finished=3)]
    assert counts == ["0", "1", "2"]


def test_another_call_with_the_same_body_is_another_call(
    http: httpx.Client, upstream_calls: UpstreamCalls
) -> None:
    body = request("chat", "guard", scripted(text="Twice."))
    ids = {http.post(PATHS["chat"], json=body).headers["x-holdgate-decision"] for _ in range(2)}
    assert len(ids) == 2
    assert len(upstream_calls(finished=2)) == 2


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_an_idempotency_key_gives_the_same_answer_again(
    client_for: ClientFor, http: httpx.Client, upstream_calls: UpstreamCalls, endpoint: str
) -> None:
    key = {"idempotency-key": f"replay-{endpoint}"}
    logprobs: dict[str, dict[str, Any]] = {
        "chat": {"logprobs": True},
        "completions": {"logprobs": 1},
        "responses": {"include": ["message.output_text.logprobs"]},
    }
    body = request(endpoint, "guard", scripted(text="The same."), **logprobs[endpoint])
    first = http.post(PATHS[endpoint], json=body, headers=key)
    again = http.post(PATHS[endpoint], json=body, headers=key)
    assert b'"token_logprobs":[-' in first.content or b'"logprob":-' in first.content
    assert again.content == first.content
    decisions = [each.headers["x-holdgate-decision"] for each in (first, again)]
    assert decisions[0] == decisions[1]
    assert len(upstream_calls(finished=1)) == 1


def test_an_idempotency_key_holds_for_streams_blocks_and_holds(
    http: httpx.Client, upstream_calls: UpstreamCalls
) -> None:
    for task, text, status in (
        ("guard", "Streamed.", 200),
        ("guard", "CODE-1234", 403),
        ("hold", "Held.", 423),
    ):
        key = {"idempotency-key": f"replay-{task}-{status}"}
        body = request("chat", task, scripted(text=text), stream=True)
        replies = [http.post(PATHS["chat"], json=body, headers=key) for _ in range(2)]
        assert [reply.status_code for reply in replies] == [status, status]
        assert len({reply.headers["x-holdgate-decision"] for reply in replies}) == 1
        if status == 200:
            assert said("chat", replies[0]) == said("chat", replies[1]) == ["Streamed."]
            assert replies[1].content.endswith(DONE)
    assert len(upstream_calls(finished=3)) == 3


def test_calls_with_one_idempotency_key_at_once_are_one_call(
    http: httpx.Client, upstream_calls: UpstreamCalls
) -> None:
    body = request("chat", "guard", scripted(text="Once.", delay_ms=300))
    start = threading.Barrier(4)

    def post() -> httpx.Response:
        start.wait()
        return http.post(PATHS["chat"], json=body, headers={"idempotency-key": "at-once"})

    with ThreadPoolExecutor(4) as pool:
        replies = [made.result() for made in [pool.submit(post) for _ in range(4)]]
    assert {reply.status_code for reply in replies} == {200}
    assert len({reply.headers["x-holdgate-decision"] for reply in replies}) == 1
    assert len(upstream_calls(finished=1)) == 1


def test_an_idempotency_key_of_another_request_is_refused(client_for: ClientFor) -> None:
    client = client_for("guard", max_retries=2)
    key = {"Idempotency-Key": "misused", "x-holdgate-task": "guard"}
    call(client, "chat", scripted(text="One."), extra_headers=key)
    with pytest.raises(openai.BadRequestError) as caught:
        call(client, "chat", scripted(text="Two."), extra_headers=key)
    assert caught.value.code == "idempotency_key_reused"
    other = client_for("guard", api_key="sk-somebody-else")
    answer = call(other, "chat", scripted(text="Mine."), extra_headers=key)
    assert answer.choices[0].message.content == "Mine."


def test_a_client_that_gave_up_waiting_finds_its_hold_again(
    http: httpx.Client, submit: Submit, upstream_calls: UpstreamCalls
) -> None:
    body = request("chat", "wait", scripted(text="Still here."))
    with pytest.raises(httpx.ReadTimeout):
        http.post(PATHS["chat"], json=body, timeout=0.7)
    found = http.post(PATHS["chat"], json=body, headers=RETRY | {"prefer": "wait=0"})
    assert found.status_code == 423
    submit(found.json()["error"]["hold"]["id"], "approve")
    assert len(upstream_calls(finished=1)) == 1
    assert not upstream_calls()[0]["aborted"]


def test_a_failed_response_is_the_providers_failure_and_no_hold(
    http: httpx.Client, fixed_upstream: FixedUpstream
) -> None:
    failed = {
        "id": "resp_f",
        "object": "response",
        "status": "failed",
        "error": {"code": "server_error", "message": "Out of memory."},
        "output": [],
    }
    whole = json.dumps(failed).encode()
    final = json.dumps({"type": "response.failed", "sequence_number": 0, "response": failed})
    stream = f"event: response.failed\ndata: {final}\n\n".encode()
    for task in ("hold", "plain", "guard"):
        for content_type, sent in (("application/json", whole), ("text/event-stream", stream)):
            fixed_upstream.answers["fixed-failed"] = (content_type, [sent])
            body = request("responses", task, "Hi", stream=sent is stream)
            answer = http.post(PATHS["responses"], json=body | {"model": "fixed-failed"})
            assert (answer.status_code, answer.content) == (200, sent)
