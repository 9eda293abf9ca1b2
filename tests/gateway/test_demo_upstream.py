"""The scripted upstream, asked by the official client, and over raw sockets where it breaks."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import socket
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from gateway.demo import SCENARIOS, Scenario, Script
from gateway.demo.scenarios import OTHERWISE, script_for
from gateway.demo.script import ScriptError, Turn, read_script, turns
from gateway.demo.speech import logprob_entries, tokenize
from tests.conftest import UpstreamCalls
from tests.processes import Server, start_upstream

ClientFactory = Callable[..., openai.OpenAI]

REFUND = {"name": "issue_refund", "arguments": {"order_id": "A-1", "amount": 40.0}}


@pytest.fixture
def client(upstream: Server, openai_client: ClientFactory) -> openai.OpenAI:
    return openai_client(upstream.url)


def scripted(**script: Any) -> str:
    return json.dumps({"demo": script})


def chat(**script: Any) -> dict[str, Any]:
    return {"model": "demo-large", "messages": [{"role": "user", "content": scripted(**script)}]}


def post(
    upstream: Server, body: dict[str, Any], path: str = "/v1/chat/completions"
) -> httpx.Response:
    return httpx.post(upstream.url + path, json=body, timeout=20)


def exchange_raw(upstream: Server, body: dict[str, Any]) -> bytes:
    """Everything the server sends until it closes the connection."""
    content = json.dumps(body).encode()
    with raw_request(upstream, content) as connection:
        return b"".join(iter(lambda: connection.recv(65_536), b""))


def raw_request(upstream: Server, content: bytes) -> socket.socket:
    host, port = urlsplit(upstream.url).hostname, urlsplit(upstream.url).port
    connection = socket.create_connection((host, port), timeout=20)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


# --------------------------------------------------------------------------------- chat completions


def test_chat_answer_has_the_fields_that_openai_sends(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**chat(text="Hello."))
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == "demo-large"
    assert answer.system_fingerprint
    assert answer.service_tier == "default"
    [choice] = answer.choices
    assert choice.message.content == "Hello."
    assert choice.message.role == "assistant"
    assert choice.message.refusal is None
    assert choice.message.annotations == []
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id is not None
    assert answer._request_id.startswith("req_")


def test_script_is_found_inside_other_text_and_parts(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": f"Please: {scripted(text='found')} Thanks."}]
    answer = client.chat.completions.create(
        model="demo-large",
        messages=[
            {"role": "system", "content": scripted(text="not from here")},
            {"role": "user", "content": parts},  # type: ignore[misc,list-item]
        ],
    )
    assert answer.choices[0].message.content == "found"


def test_stream_spells_the_answer_token_by_token(client: openai.OpenAI) -> None:
    text = "Naïve café: 12 345 🦉 owls.\n"
    chunks = list(
        client.chat.completions.create(
            **chat(text=text), stream=True, stream_options={"include_usage": True}
        )
    )
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(deltas) == text
    assert len(deltas) > 10
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == [
        "stop"
    ]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None


def test_stream_gives_usage_only_when_asked(upstream: Server) -> None:
    body = post(upstream, chat(text="Hi.") | {"stream": True}).text
    assert body.endswith("data: [DONE]\n\n")
    assert '"usage"' not in body


def test_stream_and_whole_answer_say_the_same(client: openai.OpenAI) -> None:
    request = chat(
        text="Refunded 40 dollars.", reasoning="It broke.", tool_calls=[REFUND], certainty=0.8
    )
    request |= {"logprobs": True, "top_logprobs": 4}
    whole = client.chat.completions.create(**request).choices[0]
    text, reasoning, arguments = "", "", ""
    entries: list[Any] = []
    for chunk in client.chat.completions.create(**request, stream=True):
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        for call in choice.delta.tool_calls or ():
            arguments += (call.function.arguments if call.function else None) or ""
        if choice.logprobs:
            entries += choice.logprobs.content or []
    assert text == whole.message.content
    assert reasoning == whole.message.reasoning_content
    assert whole.message.tool_calls is not None
    assert arguments == whole.message.tool_calls[0].function.arguments
    assert whole.logprobs is not None
    assert entries == whole.logprobs.content
    assert whole.finish_reason == "tool_calls"


def test_tool_call_arguments_may_be_broken_json(client: openai.OpenAI) -> None:
    broken = {"name": "issue_refund", "arguments": '{"amount": '}
    answer = client.chat.completions.create(**chat(tool_calls=[REFUND, broken]))
    first, second = answer.choices[0].message.tool_calls or []
    assert json.loads(first.function.arguments) == REFUND["arguments"]
    assert second.function.arguments == '{"amount": '
    assert answer.choices[0].message.content is None


def test_parallel_tool_calls_stream_by_index(client: openai.OpenAI) -> None:
    second = {"name": "lookup", "arguments": {"id": 7}}
    spelled: dict[int, str] = {}
    names: dict[int, str] = {}
    for chunk in client.chat.completions.create(**chat(tool_calls=[REFUND, second]), stream=True):
        for call in chunk.choices[0].delta.tool_calls or ():
            assert call.function is not None
            spelled[call.index] = spelled.get(call.index, "") + (call.function.arguments or "")
            if call.function.name:
                names[call.index] = call.function.name
                assert (call.id or "").startswith("call_")
    assert names == {0: "issue_refund", 1: "lookup"}
    assert [json.loads(spelled[i]) for i in (0, 1)] == [REFUND["arguments"], {"id": 7}]


def test_choices_are_interleaved_on_a_stream(client: openai.OpenAI) -> None:
    request = chat(texts=["one two three", "uno dos tres"]) | {"n": 2}
    whole = client.chat.completions.create(**request)
    assert [choice.message.content for choice in whole.choices] == ["one two three", "uno dos tres"]
    order, said = [], ["", ""]
    for chunk in client.chat.completions.create(**request, stream=True):
        [choice] = chunk.choices
        order.append(choice.index)
        said[choice.index] += choice.delta.content or ""
    assert said == ["one two three", "uno dos tres"]
    assert order == [0, 1] * (len(order) // 2)


def test_refusal_is_told_apart_from_text(client: openai.OpenAI) -> None:
    request = chat(refusal="I cannot.") | {"logprobs": True}
    [choice] = client.chat.completions.create(**request).choices
    assert (choice.message.content, choice.message.refusal) == (None, "I cannot.")
    assert choice.logprobs is not None
    assert choice.logprobs.content is None
    assert choice.logprobs.refusal
    deltas = [c.choices[0].delta for c in client.chat.completions.create(**request, stream=True)]
    assert "".join(delta.refusal or "" for delta in deltas) == "I cannot."


def test_finish_reason_usage_and_unknown_fields_are_as_scripted(client: openai.OpenAI) -> None:
    extra = {"body": {"x_body": 1}, "choice": {"x_choice": [2]}, "message": {"x_message": "3"}}
    request = chat(text="Cut", finish_reason="length", usage={"total_tokens": 99}, extra=extra)
    answer = client.chat.completions.create(**request)
    [choice] = answer.choices
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 99
    assert answer.model_extra == {"x_body": 1}
    assert choice.model_extra == {"x_choice": [2]}
    assert (choice.message.model_extra or {})["x_message"] == "3"
    chunk = next(iter(client.chat.completions.create(**request, stream=True)))
    assert chunk.model_extra == {"x_body": 1}


def test_numbers_that_json_libraries_refuse_pass_through(upstream: Server) -> None:
    big = 123456789012345678901234567890
    script = scripted(text="x", extra={"body": {"nan": math.nan, "big": big}})
    body = {"model": "m", "messages": [{"role": "user", "content": script}]}
    content = post(upstream, body).content
    assert b'"nan":NaN' in content
    assert b'"big":123456789012345678901234567890' in content


def test_echo_tells_what_the_server_received(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**chat(echo=True), extra_headers={"x-marker": "m-1"})
    seen = json.loads(answer.choices[0].message.content or "")
    assert seen["headers"]["x-marker"] == "m-1"
    assert seen["headers"]["authorization"] == "Bearer sk-test-client"
    assert seen["body"]["model"] == "demo-large"
    assert (seen["method"], seen["path"]) == ("POST", "/v1/chat/completions")


# ----------------------------------------------------------------------------------------- logprobs


def test_logprobs_follow_certainty_and_repeat_exactly(client: openai.OpenAI) -> None:
    def entries(certainty: float) -> list[Any]:
        request = chat(text="The refund of 40 dollars is due in 14 days.", certainty=certainty)
        answer = client.chat.completions.create(**request, logprobs=True, top_logprobs=5)
        logprobs = answer.choices[0].logprobs
        return list((logprobs.content if logprobs else None) or ())

    sure, unsure = entries(0.99), entries(0.5)
    assert sum(e.logprob for e in sure) > sum(e.logprob for e in unsure) + 1
    assert entries(0.5) == unsure
    for entry in unsure:
        assert entry.logprob < 0
        tops = [top.logprob for top in entry.top_logprobs]
        assert len(tops) == 5
        assert tops == sorted(tops, reverse=True)
        assert sum(map(math.exp, tops)) <= 1 + 1e-9
        assert entry.token in {top.token for top in entry.top_logprobs}


def test_token_bytes_joined_are_the_text(client: openai.OpenAI) -> None:
    text = "Owl 🦉, café, 東京."
    answer = client.chat.completions.create(**chat(text=text), logprobs=True)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert b"".join(bytes(e.bytes or ()) for e in logprobs.content or ()).decode() == text


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("null", {"logprobs": None}), ("absent", {})],
)
def test_logprobs_can_be_null_or_absent_though_asked_for(
    upstream: Server, mode: str, expected: dict[str, Any]
) -> None:
    [choice] = post(upstream, chat(text="Hi.", logprobs=mode) | {"logprobs": True}).json()[
        "choices"
    ]
    assert {k: v for k, v in choice.items() if k == "logprobs"} == expected


def test_constant_logprobs_are_all_zero(client: openai.OpenAI) -> None:
    request = chat(text="Certain of everything.", logprobs="constant")
    answer = client.chat.completions.create(**request, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert {entry.logprob for entry in logprobs.content or ()} == {0.0}


def test_explicit_logprobs_are_sent_as_they_are(client: openai.OpenAI) -> None:
    entries = [
        {"token": "Yes", "logprob": -0.25, "bytes": None, "top_logprobs": []},
        {"token": ".", "logprob": None, "odd": True},
    ]
    request = chat(logprobs=entries) | {"logprobs": True}
    [choice] = client.chat.completions.create(**request).choices
    assert choice.message.content == "Yes."
    assert choice.logprobs is not None
    assert [e.to_dict() for e in choice.logprobs.content or ()] == entries
    streamed = []
    for chunk in client.chat.completions.create(**request, stream=True):
        given = chunk.choices[0].logprobs
        streamed += [e.to_dict() for e in (given.content or [])] if given else []
    assert streamed == entries


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": [], "logprobs": True}, "logprobs"),
        ("/v1/completions", {"prompt": "x", "logprobs": 0}, "logprobs"),
        ("/v1/responses", {"input": "x", "include": ["message.output_text.logprobs"]}, "include"),
    ],
    ids=["chat", "completions", "responses"],
)
def test_model_without_logprobs_refuses_them_by_name(
    upstream: Server, path: str, body: dict[str, Any], param: str
) -> None:
    answer = post(upstream, {"model": "no-logprobs-1", **body}, path)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", param)
    assert "logprobs" in error["message"]
    without = {k: v for k, v in body.items() if k not in ("logprobs", "include")}
    assert post(upstream, {"model": "no-logprobs-1", **without}, path).status_code == 200


@given(st.text())
def test_tokens_spell_any_text(text: str) -> None:
    tokens = tokenize(text)
    assert "".join(token.delta for token in tokens) == text
    assert b"".join(token.raw for token in tokens).decode() == text


@given(st.text(max_size=40), st.floats(0, 1), st.integers(0, 20))
def test_logprobs_are_a_distribution_at_every_token(text: str, certainty: float, top: int) -> None:
    for entry in logprob_entries(tokenize(text), certainty, top):
        assert math.log(1e-4) - 1e-6 <= entry["logprob"] <= 0
        assert len(entry["top_logprobs"]) == top
        assert len({option["token"] for option in entry["top_logprobs"]}) == top
        assert sum(math.exp(option["logprob"]) for option in entry["top_logprobs"]) <= 1 + 1e-6


# --------------------------------------------------------------------------- completions, responses


def test_legacy_completion_carries_legacy_logprobs(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "m", "prompt": scripted(text="One 🦉 two."), "logprobs": 3}
    answer = client.completions.create(**request)
    [choice] = answer.choices
    assert (answer.object, choice.text) == ("text_completion", "One 🦉 two.")
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.text_offset is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs or ()) == len(logprobs.text_offset)
    assert all(len(tops) == 3 for tops in logprobs.top_logprobs or ())
    streamed = list(client.completions.create(**request, stream=True))
    assert "".join(part.choices[0].text for part in streamed) == "One 🦉 two."
    given = [part.choices[0].logprobs for part in streamed]
    assert [t for part in given if part for t in part.tokens or ()] == logprobs.tokens
    assert [o for part in given if part for o in part.text_offset or ()] == logprobs.text_offset
    assert streamed[-1].choices[0].finish_reason == "stop"


def test_every_prompt_of_a_list_is_completed(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="m", prompt=["a", scripted(text="b")], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


def test_response_stream_has_the_typed_events_in_order(client: openai.OpenAI) -> None:
    events = list(
        client.responses.create(
            model="demo-large",
            input=scripted(text="Yes.", reasoning="Hm.", tool_calls=[REFUND]),
            include=["message.output_text.logprobs"],
            top_logprobs=2,
            stream=True,
        )
    )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert list(dict.fromkeys(kinds)) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.reasoning_summary_part.added",
        "response.reasoning_summary_text.delta",
        "response.reasoning_summary_text.done",
        "response.reasoning_summary_part.done",
        "response.output_item.done",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.completed",
    ]
    text, arguments = "", ""
    for event in events:
        if event.type == "response.output_text.delta":
            text += event.delta
            assert [len(entry.top_logprobs or ()) for entry in event.logprobs] == [2]
        elif event.type == "response.function_call_arguments.delta":
            arguments += event.delta
    assert text == "Yes."
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == "Yes."
    assert [item.type for item in last.response.output] == ["reasoning", "message", "function_call"]
    assert json.loads(arguments) == REFUND["arguments"]


def test_response_says_the_same_whole_and_streamed(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {
        "model": "m",
        "input": [{"role": "user", "content": scripted(text="Hi.")}],
    }
    request["metadata"] = {"task": "t"}
    whole = client.responses.create(**request)
    *_, last = client.responses.create(**request, stream=True)
    assert (whole.status, whole.output_text, whole.metadata) == ("completed", "Hi.", {"task": "t"})
    assert last.response.output_text == whole.output_text
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    assert whole.error is None


@pytest.mark.parametrize(
    ("finish", "reason"), [("length", "max_output_tokens"), ("content_filter", "content_filter")]
)
def test_response_cut_short_is_incomplete(client: openai.OpenAI, finish: str, reason: str) -> None:
    answer = client.responses.create(model="m", input=scripted(text="Cut", finish_reason=finish))
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == reason


def test_response_refusal_has_its_own_events(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="m", input=scripted(refusal="No."), stream=True))
    assert {"response.refusal.delta", "response.refusal.done"} <= {event.type for event in events}
    last = events[-1]
    assert last.type == "response.completed"
    [item] = last.response.output
    assert item.type == "message"
    assert item.content[0].to_dict() == {"type": "refusal", "refusal": "No."}


# ---------------------------------------------------------------------------------- other endpoints


def test_models_are_listed_and_unknown_ones_are_not_found(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert "demo-large" in names
    assert client.models.retrieve(names[0]).id == names[0]
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nothing")
    assert caught.value.code == "model_not_found"


def test_embeddings_repeat_and_come_packed_or_plain(client: openai.OpenAI) -> None:
    packed = client.embeddings.create(model="e", input=["a", "c"], dimensions=16)
    plain = client.embeddings.create(model="e", input="a", dimensions=16, encoding_format="float")
    assert len(packed.data) == 2
    assert packed.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-6)
    assert packed.data[0].embedding != packed.data[1].embedding


def test_embeddings_are_alike_where_words_are_shared(client: openai.OpenAI) -> None:
    texts = ["Where is my parcel?", "My parcel, where is it?", "Cancel the annual plan"]
    one, same, other = (
        each.embedding for each in client.embeddings.create(model="e", input=texts).data
    )
    assert sum(a * a for a in one) == pytest.approx(1.0, abs=1e-5)
    assert sum(a * b for a, b in zip(one, same, strict=True)) > 0.8
    assert abs(sum(a * b for a, b in zip(one, other, strict=True))) < 0.3


def test_moderation_answers_every_input(client: openai.OpenAI) -> None:
    answer = client.moderations.create(input=["a", "b"])
    assert [result.flagged for result in answer.results] == [False, False]
    assert answer.results[0].categories.harassment_threatening is False


def test_stored_answers_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    listed = client.chat.completions.list()
    assert len(listed.data) == 2
    assert client.chat.completions.retrieve(listed.data[0].id).id == listed.data[0].id
    assert client.responses.retrieve("resp_1").id == "resp_1"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.retrieve("dec_1")


def test_upload_is_digested_as_it_streams(client: openai.OpenAI) -> None:
    content = bytes(range(256)) * 20_000
    answer = client.files.create(file=("a.bin", io.BytesIO(content)), purpose="batch")
    assert (answer.bytes, answer.filename, answer.purpose) == (len(content), "a.bin", "batch")
    assert (answer.model_extra or {})["sha256"] == hashlib.sha256(content).hexdigest()


def test_file_content_has_the_size_asked_for_and_is_chunked(client: openai.OpenAI) -> None:
    answer = client.files.content("file-200001")
    assert answer.content == (bytes(range(256)) * 782)[:200_001]
    assert answer.response.headers["transfer-encoding"] == "chunked"


def test_speech_is_binary(client: openai.OpenAI) -> None:
    answer = client.audio.speech.create(model="tts", voice="alloy", input="Hello")
    assert answer.content.startswith(b"ID3")
    assert answer.response.headers["content-type"] == "audio/mpeg"


def test_any_other_path_tells_what_came(upstream: Server) -> None:
    content = b"\x00\xff" * 1000
    answer = httpx.put(f"{upstream.url}/v1/vector_stores/vs_1?a=1&b", content=content).json()
    assert (answer["method"], answer["path"]) == ("PUT", "/v1/vector_stores/vs_1")
    assert answer["query"] == "a=1&b"
    assert answer["body_sha256"] == hashlib.sha256(content).hexdigest()
    assert answer["body_bytes"] == 2000


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{", "could not parse"),
        (b"[]", "Missing required parameter"),
        (b'{"messages": [{"role": "user", "content": "{\\"demo\\": {\\"txt\\": 1}}"}]}', "txt"),
        (b'{"messages": [{"role": "user", "content": "{\\"demo\\": oops"}]}', "not JSON"),
    ],
    ids=["not JSON", "not an object", "unknown key", "broken script"],
)
def test_bad_requests_and_scripts_are_told_why(
    upstream: Server, content: bytes, complaint: str
) -> None:
    answer = httpx.post(f"{upstream.url}/v1/chat/completions", content=content)
    assert answer.status_code == 400
    assert complaint in answer.json()["error"]["message"]


# -------------------------------------------------------------------------------- errors and faults


def test_scripted_error_arrives_as_the_typed_exception(client: openai.OpenAI) -> None:
    headers = {"Retry-After": "7", "x-ratelimit-remaining-requests": "0"}
    error = {"message": "Slow down.", "code": "rate_limit_exceeded"}
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(**chat(status=429, error=error, headers=headers))
    assert caught.value.code == "rate_limit_exceeded"
    assert caught.value.type == "rate_limit_error"
    assert caught.value.response.headers["retry-after"] == "7"
    assert caught.value.response.headers["x-ratelimit-remaining-requests"] == "0"


def test_error_without_status_is_a_500(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(**chat(error={}))
    assert caught.value.status_code == 500


def test_successive_attempts_follow_their_scripts(
    upstream: Server, openai_client: ClientFactory
) -> None:
    request = chat(
        id="retried-1", attempts=[{"status": 503}, {"text": "second"}, {"text": "third"}]
    )
    patient = openai_client(upstream.url, max_retries=1)
    answers = [patient.chat.completions.create(**request) for _ in range(3)]
    assert [a.choices[0].message.content for a in answers] == ["second", "third", "third"]


def test_attempts_without_id_follow_the_conversation(client: openai.OpenAI) -> None:
    asked = {"role": "user", "content": scripted(attempts=[{"text": "first"}, {"text": "second"}])}
    again = [{"role": "assistant", "content": "first"}, {"role": "user", "content": "No, again."}]
    answers = [
        client.chat.completions.create(model="m", messages=messages)  # type: ignore[arg-type]
        for messages in ([asked], [asked, *again], [asked])
    ]
    assert [a.choices[0].message.content for a in answers] == ["first", "second", "first"]


def test_html_error_page_is_no_json(upstream: Server) -> None:
    answer = post(upstream, chat(fault="html502"))
    assert answer.status_code == 502
    assert answer.headers["content-type"] == "text/html"
    assert answer.text.startswith("<html>")


def test_close_sends_not_a_byte(upstream: Server) -> None:
    assert exchange_raw(upstream, chat(fault="close")) == b""


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_close_mid_breaks_off_the_announced_body(upstream: Server, stream: bool) -> None:
    request = chat(text="word " * 50, fault="close_mid") | {"stream": stream}
    with pytest.raises(httpx.RemoteProtocolError, match="peer closed connection"):
        post(upstream, request)


def test_truncated_stream_ends_properly_but_too_soon(upstream: Server) -> None:
    body = post(upstream, chat(text="a b c d e f", fault="truncate") | {"stream": True}).text
    assert body.endswith("\n\n")
    assert "[DONE]" not in body
    assert '"finish_reason":"stop"' not in body


def test_truncated_body_is_half_a_json_document(upstream: Server) -> None:
    answer = post(upstream, chat(fault="truncate"))
    assert answer.status_code == 200
    with pytest.raises(json.JSONDecodeError):
        answer.json()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_garbage_breaks_the_client(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(ValueError, match=r"Expecting|Extra data|Unterminated|control character"):
        list(client.chat.completions.create(**chat(fault="garbage"), stream=stream))


def test_error_in_mid_stream_reaches_the_client(client: openai.OpenAI) -> None:
    script = {"text": "a b c d", "fault": "error_mid", "error": {"message": "Out of memory."}}
    stream = client.chat.completions.create(**chat(**script), stream=True)
    assert next(stream).choices[0].delta.role == "assistant"
    with pytest.raises(openai.APIError, match="Out of memory"):
        list(stream)


def test_error_event_ends_a_response_stream(client: openai.OpenAI) -> None:
    script = {"text": "a b c d", "fault": "error_mid", "error": {"message": "Out of memory."}}
    events = list(client.responses.create(model="m", input=scripted(**script), stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert last.type == "error"
    assert last.message == "Out of memory."


def test_a_chunk_can_follow_done(upstream: Server) -> None:
    body = post(upstream, chat(fault="after_done") | {"stream": True}).text
    assert body.partition("data: [DONE]\n\n")[2].startswith("data: {")


def test_odd_but_legal_stream_reads_the_same(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(**chat(text="a: b", fault="odd_sse"), stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "a: b"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_slow_headers_deliver_the_same_answer_in_the_end(upstream: Server, stream: bool) -> None:
    request = chat(text="Late.", fault="slow_headers", token_delay_ms=5) | {"stream": stream}
    answer = exchange_raw(upstream, request)
    assert answer.startswith(b"HTTP/1.1 200 Slow\r\n")
    assert b"Late" in answer


def test_wrong_type_puts_a_number_where_text_belongs(upstream: Server) -> None:
    whole = post(upstream, chat(fault="wrong_type")).json()
    assert whole["choices"][0]["message"]["content"] == 42
    assert '"content":42' in post(upstream, chat(fault="wrong_type") | {"stream": True}).text
    response = {"model": "m", "input": scripted(fault="wrong_type")}
    assert '"text":42' in post(upstream, response, "/v1/responses").text


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_huge_answer_has_the_size_asked_for(client: openai.OpenAI, stream: bool) -> None:
    request = chat(fault="huge", size_mb=2) | {"logprobs": True, "stream": stream}
    answer = client.chat.completions.create(**request)
    if stream:
        size = sum(len(chunk.choices[0].delta.content or "") for chunk in answer)
    else:
        size = len(answer.choices[0].message.content)
    assert size == 2 * 2**20


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_invalid_utf8_is_in_the_text(upstream: Server, stream: bool) -> None:
    content = post(upstream, chat(text="x", fault="invalid_utf8") | {"stream": stream}).content
    with pytest.raises(UnicodeDecodeError):
        content.decode()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("encoding", "decode"),
    [
        ("gzip", gzip.decompress),
        ("deflate", zlib.decompress),
        ("zstd", lambda content: zstandard.ZstdDecompressor().decompressobj().decompress(content)),
    ],
    ids=["gzip", "deflate", "zstd"],
)
def test_answers_can_come_compressed(
    upstream: Server, encoding: str, decode: Callable[[bytes], bytes], stream: bool
) -> None:
    request = chat(text="Small", encoding=encoding) | {"stream": stream}
    url = f"{upstream.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=request) as answer:
        content = b"".join(answer.iter_raw())
    assert answer.headers["content-encoding"] == encoding
    assert decode(content) != content
    assert b'"Small"' in decode(content)


# ------------------------------------------------------------------------------------- log of calls


def test_log_tells_what_came_and_that_it_ended(
    upstream: Server, upstream_calls: UpstreamCalls
) -> None:
    content = json.dumps(chat(text="Hi.")).encode()
    httpx.post(f"{upstream.url}/v1/chat/completions?q=1", content=content, headers={"X-Tag": "t"})
    [call] = upstream_calls(finished=1)
    assert (call["method"], call["path"], call["query"]) == ("POST", "/v1/chat/completions", "q=1")
    assert call["headers"]["x-tag"] == "t"
    assert call["body_sha256"] == hashlib.sha256(content).hexdigest()
    assert call["aborted"] is False
    assert call["started"] <= call["finished"]


@pytest.mark.parametrize(
    "script",
    [
        {"fault": "hang"},
        {"delay_ms": 60_000},
        {"text": "a b c d e f", "token_delay_ms": 20_000},
    ],
    ids=["hang", "before the first byte", "in mid stream"],
)
def test_log_tells_that_the_client_went_away(
    upstream: Server, upstream_calls: UpstreamCalls, script: dict[str, Any]
) -> None:
    content = json.dumps(chat(**script) | {"stream": True}).encode()
    with raw_request(upstream, content):
        [call] = upstream_calls(started=1)
        assert call["finished"] is None
    [call] = upstream_calls(finished=1)
    assert call["aborted"] is True


def test_breaking_off_itself_is_not_the_client_going_away(
    upstream: Server, upstream_calls: UpstreamCalls
) -> None:
    for fault in ("close", "close_mid", "slow_headers"):
        exchange_raw(upstream, chat(fault=fault, token_delay_ms=1))
    assert [call["aborted"] for call in upstream_calls(finished=3)] == [False, False, False]


def test_log_keeps_the_last_two_hundred(upstream: Server, upstream_calls: UpstreamCalls) -> None:
    with httpx.Client() as session:
        for number in range(205):
            session.get(f"{upstream.url}/v1/models", params={"number": number})
    kept = upstream_calls(finished=200)
    assert [call["query"] for call in kept] == [f"number={n}" for n in range(5, 205)]


def test_calls_run_side_by_side(upstream: Server, upstream_calls: UpstreamCalls) -> None:
    content = json.dumps(chat(fault="hang")).encode()
    with ExitStack() as open_connections:
        for _ in range(8):
            open_connections.enter_context(raw_request(upstream, content))
        assert [call["finished"] for call in upstream_calls(started=8)] == [None] * 8
        assert post(upstream, chat(text="Hi.")).status_code == 200
    assert sum(call["aborted"] for call in upstream_calls(finished=9)) == 8


# ------------------------------------------------------------------------------- scenarios, scripts


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_each_scenario_is_answered_by_its_own_script(scenario: Scenario) -> None:
    assert script_for([Turn("user", scenario.prompt)]) == (scenario.script, 0)
    assert all(isinstance(value, str) for value in scenario.metadata.values())


def test_scenario_of_a_large_refund_calls_the_tool(client: openai.OpenAI) -> None:
    scenario = next(s for s in SCENARIOS if s.name == "refund_large")
    answer = client.chat.completions.create(
        model="demo-large",
        messages=[{"role": "user", "content": scenario.prompt}],
        metadata=dict(scenario.metadata),
        **scenario.request,
    )
    [call] = answer.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments)["amount"] == 25000.0


def test_scenario_is_mended_when_asked_again() -> None:
    scenario = next(s for s in SCENARIOS if s.name == "refund_mended")
    asked = Turn("user", scenario.prompt)
    script, later = script_for(
        [asked, Turn("assistant", ""), Turn("other", "wrong"), Turn("user", "mend")]
    )
    assert later == 1
    arguments = script.attempt(later).tool_calls[0].arguments
    assert isinstance(arguments, dict)
    assert arguments["amount"] == 120.0


def test_what_no_scenario_knows_gets_the_standing_answer() -> None:
    assert script_for([Turn("user", "Hm?")]) == (OTHERWISE, 0)
    assert script_for([]) == (OTHERWISE, 0)


@pytest.mark.parametrize(
    "request_body",
    [
        {"messages": [{"role": "user", "content": None}, 3, {"role": "user"}]},
        {"messages": "no list"},
        {"input": {"role": "user"}},
        {"prompt": [1, 2, 3]},
        {"prompt": 7},
        {},
    ],
    ids=repr,
)
def test_malformed_turns_are_passed_over(request_body: dict[str, Any]) -> None:
    assert script_for(turns(request_body)) == (OTHERWISE, 0)


@given(st.text())
def test_no_text_breaks_the_reading_of_scripts(text: str) -> None:
    assert read_script(text) is None or '"demo"' in text


def test_deeply_nested_script_is_refused() -> None:
    with pytest.raises(ScriptError, match="nested too deeply"):
        read_script('{"demo": ' + "[" * 100_000)


def test_script_says_where_it_is_wrong() -> None:
    with pytest.raises(ScriptError, match=r"tool_calls\.0\.name"):
        read_script('{"demo": {"tool_calls": [{"nme": "x"}]}}')


def test_header_that_would_split_the_response_is_refused() -> None:
    with pytest.raises(ScriptError, match="headers"):
        read_script(json.dumps({"demo": {"headers": {"x": "a\r\nset-cookie: b"}}}))


def test_last_attempt_repeats() -> None:
    script = Script(attempts=(Script(text="a"), Script(text="b")))
    assert [script.attempt(n).text for n in range(4)] == ["a", "b", "b", "b"]


def test_upstream_keeps_its_port_over_a_kill_and_a_restart(tmp_path: Path) -> None:
    with start_upstream(tmp_path) as server:
        before = server.url
        server.kill()
        server.start()
        server.restart()
        assert server.url == before
        assert post(server, chat(text="Back.")).status_code == 200
    assert server.errors == ""


def test_upstream_that_cannot_listen_says_why(upstream: Server, tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="address already in use"),
        start_upstream(tmp_path, port=upstream.port),
    ):
        raise AssertionError("two servers on one port")
