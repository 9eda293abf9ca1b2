"""What is read of requests and responses, and the edits that touch only what they should."""

from __future__ import annotations

import itertools
import json
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import edits, wire
from tests.gateway.bodies import CHAT, COMPLETIONS, RESPONSES, bodies, said
from tests.gateway.timing import grows_in_proportion
from tests.validators.exchanges import scan_of
from validators import Exchange, Finding, Passage

ENDPOINTS = [CHAT, COMPLETIONS, RESPONSES]
everywhere = pytest.mark.parametrize("endpoint", ENDPOINTS)

#: The ways a JSON text may be laid out.
layouts = st.fixed_dictionaries(
    {
        "indent": st.sampled_from([None, 0, 2, "\t"]),
        "separators": st.sampled_from([(",", ":"), (", ", ": "), (" , ", " :\n")]),
        "ensure_ascii": st.booleans(),
    }
)

# -------------------------------------------------------------------------------------------------- requests

keys = st.sampled_from(
    ["model", "messages", "logprobs", "top_logprobs", "include", "stream", "x", "é", "a b"]
)
requests = st.dictionaries(
    keys,
    st.recursive(
        st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
        max_leaves=6,
    ),
    max_size=5,
)


@everywhere
@given(request=requests, layout=layouts, space=st.sampled_from([b"", b" ", b"\n\t "]))
def test_asking_for_logprobs_leaves_all_other_bytes_alone(
    endpoint: str, request: dict[str, Any], layout: dict[str, Any], space: bytes
) -> None:
    body = space + json.dumps(request, **layout).encode() + space
    asking = wire.with_logprobs(endpoint, body, request, 5)
    asked = orjson.loads(asking)
    added = {name: asked[name] for name in asked if request.get(name, ...) != asked[name]}
    assert {**request, **added} == asked
    assert wire.wants_logprobs(endpoint, asked)
    wanted = {
        CHAT: {"logprobs", "top_logprobs"},
        COMPLETIONS: {"logprobs"},
        RESPONSES: {"include", "top_logprobs"},
    }
    assert set(added) <= wanted[endpoint]
    if not wanted[endpoint] & set(request):
        start = body.index(b"{") + 1
        assert asking.startswith(body[:start])
        assert asking.endswith(body[start:])
        inserted = asking[start : len(asking) - len(body) + start].rstrip(b",")
        assert orjson.loads(b"{" + inserted + b"}") == added


def test_what_the_client_asked_to_be_included_stays_included() -> None:
    request: dict[str, Any] = {"include": ["file_search_call.results"], "input": "x"}
    asked = orjson.loads(wire.with_logprobs(RESPONSES, orjson.dumps(request), request, 3))
    assert asked["include"] == ["file_search_call.results", "message.output_text.logprobs"]


@pytest.mark.parametrize(
    ("endpoint", "request_", "wants"),
    [
        (CHAT, {}, False),
        (CHAT, {"logprobs": None}, False),
        (CHAT, {"logprobs": False, "top_logprobs": 3}, False),
        (CHAT, {"logprobs": True}, True),
        (COMPLETIONS, {}, False),
        (COMPLETIONS, {"logprobs": None}, False),
        (COMPLETIONS, {"logprobs": 0}, True),
        (COMPLETIONS, {"logprobs": 5}, True),
        (RESPONSES, {"include": None}, False),
        (RESPONSES, {"include": "message.output_text.logprobs"}, False),
        (RESPONSES, {"include": ["x"], "top_logprobs": 3}, False),
        (RESPONSES, {"include": ["x", "message.output_text.logprobs"]}, True),
    ],
)
def test_who_asked_for_logprobs(endpoint: str, request_: dict[str, Any], wants: bool) -> None:
    assert wire.wants_logprobs(endpoint, request_) is wants


@pytest.mark.parametrize(
    "body",
    [b"", b"x", b"[]", b'"x"', b"1", b"null", b"{", b"{}x", b'{"a":1,}', b"{'a':1}", b'{"a":"\xff"}', b'{"a":NaN}',
     b'{"a":1e999}', b'{"a":"\\ud800"}', b"\xef\xbb\xbf{}", b'{"a":' * 300 + b"1" + b"}" * 300, b"[" * 100_000],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
def test_a_request_that_is_no_json_object_is_unreadable(body: bytes) -> None:
    with pytest.raises(wire.Unreadable, match="request body"):
        wire.parse_request(body)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_request_or_unreadable(body: bytes) -> None:
    try:
        json.loads(body.decode())
    except ValueError:
        with pytest.raises(wire.Unreadable):
            wire.parse_request(body)


def test_the_facts_of_a_request() -> None:
    request: dict[str, Any] = {
        "model": "gpt-4o",
        "metadata": {"task": "refunds", "customer": "7", "count": 3},
        "tools": [
            {"type": "function", "function": {"name": "chat_tool"}},
            {"type": "function", "name": "responses_tool"},
            {"type": "custom", "custom": {"name": "custom_tool"}},
            {"type": "web_search"},
            "odd",
            {"function": "odd"},
            {"function": {"name": 5}},
        ],
        "functions": [{"name": "old_tool"}],
    }
    facts = wire.facts(CHAT, request, task=None, key="app")
    assert (facts.task, facts.model, facts.endpoint, facts.key) == (
        "refunds", "gpt-4o", CHAT, "app",
    )  # fmt: skip
    assert facts.context == {"task": "refunds", "customer": "7"}
    assert facts.tools == {"chat_tool", "responses_tool", "custom_tool", "old_tool"}


def test_the_task_of_the_header_wins() -> None:
    facts = wire.facts(CHAT, {"metadata": {"task": "body"}}, task="header", key=None)
    assert facts.task == "header"
    assert facts.context["task"] == "body"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"model": 5}, "`model` must be a string"),
        ({"model": ["m"]}, "`model` must be a string"),
        ({"metadata": "x"}, "`metadata` must be an object"),
        ({"metadata": [1]}, "`metadata` must be an object"),
    ],
)
def test_facts_of_the_wrong_type_are_unreadable(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(wire.Unreadable, match=message):
        wire.facts(CHAT, request_, task=None, key=None)


@pytest.mark.parametrize("tools", [None, 5, "x", {"a": 1}, []])
def test_tools_that_are_no_list_offer_nothing(tools: Any) -> None:
    assert wire.facts(CHAT, {"tools": tools}, task=None, key=None).tools == frozenset()


# ------------------------------------------------------------------------------------------------- responses


def read(endpoint: str, body: dict[str, Any]) -> wire.Reading:
    return wire.read_response(endpoint, orjson.dumps(body))


def message(**fields: Any) -> wire.Reading:
    return read(CHAT, {"choices": [{"message": fields}]})


def texts_of(reading: wire.Reading) -> dict[str, str]:
    return {p.path: p.text for choice in reading.choices for p in wire.passages_of(choice)}


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ({"content": "x"}, {"content": "x"}),
        ({"content": None, "refusal": "no"}, {"refusal": "no"}),
        ({}, {}),
        ({"content": [{"type": "text", "text": "a"}, {"type": "image_url"}, {"type": "refusal", "refusal": "b"}]},
         {"content[0].text": "a", "content[2].refusal": "b"}),
        ({"content": "x", "reasoning_content": "r", "reasoning": "s"},
         {"content": "x", "reasoning_content": "r", "reasoning": "s"}),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}, {"custom": {"name": "c", "input": "in"}}]},
         {"tool_calls[0].function.arguments": "{}", "tool_calls[1].custom.input": "in"}),
        ({"tool_calls": [{"id": "only"}, {"function": {"name": "f"}}]}, {"tool_calls[1].function.arguments": ""}),
        ({"function_call": {"name": "f", "arguments": "{}"}}, {"function_call.arguments": "{}"}),
        ({"tool_calls": None, "function_call": None, "x": {"content": "unknown"}}, {}),
    ],
)  # fmt: skip
def test_what_a_chat_message_says(fields: dict[str, Any], texts: dict[str, str]) -> None:
    expected = {f"choices[0].message.{path}": text for path, text in texts.items()}
    assert texts_of(message(**fields)) == expected


def test_a_choice_without_a_message_says_nothing() -> None:
    reading = read(CHAT, {"choices": [{"finish_reason": "stop", "message": None}, {}]})
    assert texts_of(reading) == {}
    assert [choice.finish_reason for choice in reading.choices] == ["stop", None]


def test_what_a_completion_says() -> None:
    logprobs = {
        "tokens": ["a", "b"],
        "token_logprobs": [None, -1.5],
        "top_logprobs": [None, {"b": -1.5, "c": -2}],
    }
    reading = read(COMPLETIONS, {"id": "cmpl-1", "model": "m", "choices": [{"text": "ab", "logprobs": logprobs}, {"text": None}]})  # fmt: skip
    assert texts_of(reading) == {"choices[0].text": "ab", "choices[1].text": ""}
    assert (reading.upstream_id, reading.model) == ("cmpl-1", "m")
    tokens = reading.choices[0].logprobs or []
    assert [(token.token, token.logprob) for token in tokens] == [("a", None), ("b", -1.5)]
    assert [top.logprob for top in tokens[1].top_logprobs or []] == [-1.5, -2]
    assert reading.choices[1].logprobs is None


def test_what_a_response_says() -> None:
    output = [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "why"}], "content": [{"text": "how"}]},
        {"type": "message", "content": [{"type": "output_text", "text": "x", "logprobs": [{"token": "x", "logprob": -1}]},
                                        {"type": "refusal", "refusal": "no"}]},
        {"type": "function_call", "name": "f", "arguments": "{}"},
        {"type": "custom_tool_call", "name": "c", "input": "in"},
        {"type": "message", "content": "plain"},
        {"type": "web_search_call", "action": {}},
    ]  # fmt: skip
    reading = read(RESPONSES, {"id": "resp_1", "status": "completed", "output": output})
    assert texts_of(reading) == {
        "output[1].content[0].text": "x",
        "output[4].content": "plain",
        "output[1].content[1].refusal": "no",
        "output[0].summary[0].text": "why",
        "output[0].content[0].text": "how",
        "output[2].arguments": "{}",
        "output[3].input": "in",
    }
    [choice] = reading.choices
    assert [call.name for call in choice.tool_calls] == ["f", "c"]
    assert choice.finish_reason == "completed"
    assert [token.logprob for token in choice.logprobs or ()] == [-1]


ITEMS = [
    {"type": "code_interpreter_call", "code": "print('é')", "outputs": [{"type": "logs", "logs": "é"}]},
    {"type": "mcp_call", "name": "look_up", "arguments": "{}", "output": "found", "error": None},
    {"type": "local_shell_call", "call_id": "c", "action": {"type": "exec", "command": ["ls", "/"]}},
    {"type": "computer_call", "actions": [{"type": "type", "text": "hello"}]},
    {"type": "apply_patch_call", "operation": {"type": "create_file", "diff": "+x"}},
    {"type": "web_search_call", "action": {"type": "search", "query": "q"}},
    {"type": "file_search_call", "queries": ["a", "b"], "results": [{"text": "t"}]},
    {"type": "image_generation_call", "result": "aGVsbG8="},
    {"type": "shell_call_output", "output": [{"stdout": "out", "stderr": ""}]},
]  # fmt: skip


def test_what_tools_of_a_response_are_asked_and_give_back() -> None:
    reading = read(RESPONSES, {"output": ITEMS})
    [choice] = reading.choices
    called = {call.name: json.loads(call.arguments.text) for call in choice.tool_calls}
    assert called == {
        "look_up": {},
        "local_shell": {"type": "exec", "command": ["ls", "/"]},
        "computer": [{"type": "type", "text": "hello"}],
        "apply_patch": {"type": "create_file", "diff": "+x"},
    }
    assert {p.path: p.text for p in choice.hosted if not p.is_json()} == {
        "output[0].code": "print('é')",
        "output[1].output": "found",
    }
    assert {p.path: p.parsed() for p in choice.hosted if p.is_json()} == {
        "output[0].outputs": [{"type": "logs", "logs": "é"}],
        "output[5].action": {"type": "search", "query": "q"},
        "output[6].queries": ["a", "b"],
        "output[6].results": [{"text": "t"}],
        "output[8].output": [{"stdout": "out", "stderr": ""}],
    }
    assert choice.text == ""


def test_a_mask_on_json_that_was_read_as_text_leaves_json() -> None:
    body = json.dumps(
        {"output": [{"type": "local_shell_call", "action": {"command": ["say", 'a "secret"']}}]}
    ).encode()
    reading = wire.read_response(RESPONSES, body)
    found = (
        scan_of("redact", patterns=["secret"], target=["text", "tool_arguments"])
        .run(Exchange(RESPONSES, {}, reading.choices))
        .findings
    )
    edited = edits.with_texts(body, edits.redacted_texts(reading, found), reading)
    assert json.loads(edited)["output"][0]["action"]["command"][0] == "say"
    assert b"secret" not in edited
    with pytest.raises(wire.Unreadable, match="no JSON"):
        edits.with_texts(body, {"output[0].action": "say"}, reading)


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        (CHAT, {"choices": [{"message": {"content": None, "audio": {"id": "a", "data": "UklGRg==", "transcript": "a secret"}}}]}),
        (RESPONSES, {"output": [{"type": "message", "content": [{"type": "output_audio", "data": "UklGRg==", "transcript": "a secret"}]}]}),
    ],
)  # fmt: skip
def test_speech_is_text_and_goes_when_its_transcript_is_masked(
    endpoint: str, body: dict[str, Any]
) -> None:
    whole = json.dumps(body).encode()
    reading = wire.read_response(endpoint, whole)
    assert reading.choices[0].text == "a secret"
    found = (
        scan_of("redact", patterns=["secret"], target=["text", "tool_arguments"])
        .run(Exchange(endpoint, {}, reading.choices))
        .findings
    )
    edited = edits.with_texts(whole, edits.redacted_texts(reading, found), reading)
    assert b"secret" not in edited
    assert b"UklGRg" not in edited


@pytest.mark.parametrize(
    ("status", "reason", "finish"),
    [
        ("completed", None, "completed"),
        ("incomplete", "max_output_tokens", "length"),
        ("incomplete", "content_filter", "content_filter"),
        ("failed", None, "failed"),
        (None, None, None),
    ],
)
def test_how_a_response_ended(status: str | None, reason: str | None, finish: str | None) -> None:
    details = {"reason": reason} if reason else None
    reading = read(RESPONSES, {"output": [], "status": status, "incomplete_details": details})
    assert reading.choices[0].finish_reason == finish
    assert reading.is_failure is (status == "failed")


BAD = [
    b"", b"x", b"[]", b"null", b"1", b'"x"', b"{}", b"{", b"{}{}", b'{"error":{"message":"no"}}', b"<html></html>",
    b"\xff", b"[" * 100_000, b'{"choices":' * 3_000, b'{"choices":null,"output":null}', b'{"choices":{},"output":{}}',
    b'{"choices":[5],"output":[5]}', b'{"choices":[null],"output":[null]}',
    b'{"choices":[{"message":5,"text":5}],"output":[{"content":5}]}',
    b'{"choices":[{"message":{"content":5},"text":{}}],"output":[{"content":[5]}]}',
    b'{"choices":[{"message":{"content":["x"]},"text":[]}],"output":[{"content":{"a":1}}]}',
    b'{"choices":[{"message":{"tool_calls":[{"function":{"arguments":{"a":1}}}]},"text":1}],"output":[{"content":[5]}]}',
    b'{"choices":[{"message":{"content":"\xff"},"text":"\xff"}],"output":[{"content":"\xff"}]}',
    b'{"choices":[{"message":{"content":"\\ud800"},"text":"\\ud800"}],"output":[{"content":"\\ud800"}]}',
    b'{"choices":[{"logprobs":{"content":5,"tokens":5}}],"output":[{"content":[{"logprobs":{}}]}]}',
    b'{"choices":[{"logprobs":"x"}],"output":[{"content":[{"logprobs":"x"}]}]}',
    b'{"choices":[{"logprobs":{"content":[{"token":"x"}],"tokens":[1]}}],"output":[{"content":[{"logprobs":[{"token":"x"}]}]}]}',
    b'{"choices":[],"output":[],"x":"\xff"}', b'{"choices":[],"output":[],"x":1e999}', b'{"choices":[],"output":[],"x":NaN}',
    b'{"choices":[],"output":[],"x":' + b"[" * 300 + b"]" * 300 + b"}",
    b'{"choices":[],"output":[],"id":5}', b'{"choices":[],"output":[],"model":[]}', b'\xef\xbb\xbf{"choices":[],"output":[]}',
]  # fmt: skip


@everywhere
@pytest.mark.parametrize("body", BAD, ids=lambda body: repr(body[:60]))
def test_a_body_that_is_none_of_the_endpoint_is_unreadable(endpoint: str, body: bytes) -> None:
    with pytest.raises(wire.Unreadable, match=wire.PATH_OF[endpoint]):
        wire.read_response(endpoint, body)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["choices", "output", "message", "content", "text", "tool_calls", "function", "arguments",
                         "logprobs", "token", "logprob", "tokens", "token_logprobs", "top_logprobs", "type", "summary",
                         "refusal", "id", "model", "status", "incomplete_details", "reason", "index"]),
        inner, max_size=5),
    max_leaves=20,
)  # fmt: skip


@everywhere
@settings(max_examples=300)
@given(value=st.fixed_dictionaries({"choices": json_values, "output": json_values}) | json_values)
def test_any_json_is_a_body_or_unreadable(endpoint: str, value: Any) -> None:
    body = json.dumps(value).encode()
    try:
        reading = wire.read_response(endpoint, body)
    except wire.Unreadable:
        return
    paths = [path for path, _ in said(reading)[0][0]] if reading.choices else []
    # Text for a string, and JSON for what was JSON and read as text.
    assert orjson.loads(edits.with_texts(body, dict.fromkeys(paths, '"new"'), reading))


@everywhere
@settings(max_examples=100)
@given(data=st.data())
def test_a_body_cut_short_is_unreadable(endpoint: str, data: st.DataObject) -> None:
    body = orjson.dumps(data.draw(bodies(endpoint)))
    end = data.draw(st.integers(0, len(body) - 1))
    with pytest.raises(wire.Unreadable):
        wire.read_response(endpoint, body[:end])


# -------------------------------------------------------------------------------------------------- logprobs


def logprob_holders(endpoint: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    if endpoint != RESPONSES:
        return list(body["choices"])
    return [
        part
        for item in body["output"]
        for part in (item["content"] if isinstance(item.get("content"), list) else ())
    ]


def laid_out(body: dict[str, Any], values: list[Any], layout: dict[str, Any]) -> bytes:
    """The body as text with values put in the places marked `@0@`, `@1@`, ..."""
    text = json.dumps(body, **layout)
    for number, value in enumerate(values):
        text = text.replace(
            f'"@{number}@"', value if isinstance(value, str) else json.dumps(value, **layout)
        )
    return text.encode()


@everywhere
@settings(max_examples=200, deadline=None)
@given(data=st.data(), layout=layouts, alike=st.booleans())
def test_cutting_logprobs_out_leaves_all_other_bytes_alone(
    endpoint: str, data: st.DataObject, layout: dict[str, Any], alike: bool
) -> None:
    body = data.draw(bodies(endpoint))
    holders = [each for each in logprob_holders(endpoint, body) if each.get("logprobs")]
    values = [each["logprobs"] for each in holders]
    if alike:
        values = values[:1] * len(values)
    for number, each in enumerate(holders):
        each["logprobs"] = f"@{number}@"
    empty = "[]" if endpoint == RESPONSES else "null"
    said_something = [value for value in values if '"' in json.dumps(value)]
    assert len(said_something) == len(values)
    whole = laid_out(body, values, layout)
    reading = wire.read_response(endpoint, whole)
    assert wire.without_logprobs(whole, reading) == laid_out(body, [empty] * len(values), layout)


@everywhere
def test_logprobs_that_stand_elsewhere_too_are_cut_out_where_they_are_meant(endpoint: str) -> None:
    tokens = [{"token": "x", "logprob": -1.0}]
    value: Any = {CHAT: {"content": tokens}, COMPLETIONS: {"tokens": ["x"], "token_logprobs": [-1]}, RESPONSES: tokens}[endpoint]  # fmt: skip
    part = {"type": "output_text", "text": "x", "copy": {"logprobs": value}, "logprobs": value}
    choice = {"text": "x", "message": {"content": "x"}, "copy": value, "logprobs": value}
    body: dict[str, Any] = {"choices": [choice, choice], "copy": value}
    if endpoint == RESPONSES:
        body = {"copy": value, "output": [{"type": "message", "content": [part, part]}]}
    whole = orjson.dumps(body)
    reading = wire.read_response(endpoint, whole)
    left = orjson.loads(wire.without_logprobs(whole, reading))
    for each in logprob_holders(endpoint, body):
        each["logprobs"] = [] if endpoint == RESPONSES else None
    assert left == body


@pytest.mark.parametrize("value", ["{}", '{"content":null}', "[ ]", "null"])
def test_logprobs_that_say_nothing_are_no_reason_to_touch_a_text(value: str) -> None:
    body = b'{"choices":[{"message":{"content":"{} [ ] null"},"logprobs":%s}]}' % value.encode()
    if value == "[ ]":
        body = b'{"output":[{"type":"message","content":[{"text":"{} [ ] null","logprobs":[ ]}]}]}'
    endpoint = RESPONSES if value == "[ ]" else CHAT
    reading = wire.read_response(endpoint, body)
    left = orjson.loads(wire.without_logprobs(body, reading))
    assert b"{} [ ] null" in orjson.dumps(left)


def test_reading_takes_time_in_proportion_to_hostile_logprobs() -> None:
    """Each of many decoys begins like the value that is looked for."""

    def look(size: int) -> None:
        decoy = '{"content":[{"token":"' + "x" * 64
        logprobs = '{"content":[{"token":"' + "x" * size + '","logprob":0}]}'
        decoys = ",".join([decoy + '"}]}'] * (size // 64))
        body = f'{{"a":[{decoys}],"choices":[{{"logprobs":{logprobs}}}]}}'
        wire.read_response(CHAT, body.encode())

    assert grows_in_proportion(look, 100_000)


# ----------------------------------------------------------------------------------------------------- edits


@everywhere
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_new_texts_are_put_where_the_old_ones_were(endpoint: str, data: st.DataObject) -> None:
    body = data.draw(bodies(endpoint))
    whole = orjson.dumps(body)
    reading = wire.read_response(endpoint, whole)
    paths = list(texts_of(reading))
    chosen = data.draw(st.sets(st.sampled_from(paths))) if paths else set()
    new = {path: data.draw(st.text(min_size=1), label=path) for path in sorted(chosen)}
    edited = edits.with_texts(whole, new, reading)
    again = wire.read_response(endpoint, edited)
    old = texts_of(reading)
    assert {**old, **new} == {**old, **texts_of(again)}
    assert not any(choice.logprobs for choice in again.choices)
    restored = orjson.loads(edits.with_texts(edited, {p: old[p] for p in new if p in old}, again))
    for each in logprob_holders(endpoint, body):
        if each.get("logprobs"):
            each["logprobs"] = [] if endpoint == RESPONSES else None
    assert restored == body


def test_the_joined_text_of_a_response_follows_its_parts() -> None:
    part = {"type": "output_text", "text": "old"}
    body = {
        "output": [{"type": "message", "content": [part, {**part, "text": " stays"}]}],
        "output_text": "old stays",
    }
    reading = read(RESPONSES, body)
    edited = edits.with_texts(orjson.dumps(body), {"output[0].content[0].text": "new"}, reading)
    assert orjson.loads(edited)["output_text"] == "new stays"


def test_a_chat_answer_may_have_a_field_called_output_text() -> None:
    body = {"choices": [{"message": {"content": "old"}}], "output_text": "mine", "output": ["mine"]}
    edited = edits.with_texts(
        orjson.dumps(body), {"choices[0].message.content": "new"}, read(CHAT, body)
    )
    assert orjson.loads(edited) == {**body, "choices": [{"message": {"content": "new"}}]}


def test_a_path_that_is_no_passage_is_refused() -> None:
    body = {"choices": [{"message": {"content": "old", "role": "assistant"}}]}
    for path in ("choices[0].message.role", "choices[1].message.content", "id", ""):
        with pytest.raises(KeyError) as caught:
            edits.with_texts(orjson.dumps(body), {path: "x"}, read(CHAT, body))
        assert caught.value.args == (path,)


def test_a_text_that_is_not_unicode_is_refused() -> None:
    body = {"choices": [{"message": {"content": "old"}}]}
    with pytest.raises(wire.Unreadable, match="cannot be written"):
        edits.with_texts(
            orjson.dumps(body), {"choices[0].message.content": "\ud800"}, read(CHAT, body)
        )


# ----------------------------------------------------------------------------------------------------- masks

#: A text in which every character is there once.
ALPHABET = "".join(map(chr, range(0x4E00, 0x4E40)))
spans = st.tuples(st.integers(0, 64), st.integers(1, 20)).map(
    lambda span: (min(span[0], 63), min(span[0] + span[1], 64))
)
masks = st.lists(st.tuples(spans, st.sampled_from(["", "#", "[hidden]", "{}"])), max_size=8).map(
    lambda made: [(start, end, replacement) for (start, end), replacement in made]
)


def findings(made: list[edits.Mask], path: str = "p") -> list[Finding]:
    return [Finding(path, "x", (start, end), replacement=new) for start, end, new in made]


@given(masks)
def test_no_masked_character_is_left_and_no_other_is_lost(made: list[edits.Mask]) -> None:
    hidden = {offset for start, end, _ in made for offset in range(start, end)}
    shown = edits.masked_texts([Passage("p", ALPHABET)], findings(made)).get("p", ALPHABET)
    kept = [char for offset, char in enumerate(ALPHABET) if offset not in hidden]
    assert [char for char in shown if char in ALPHABET] == kept


@given(masks)
def test_masks_that_overlap_leave_one_replacement(made: list[edits.Mask]) -> None:
    numbered = [(start, end, f"<{n}>") for n, (start, end, _) in enumerate(made)]
    shown = edits.with_masks(ALPHABET, edits.united(numbered))
    stretches = "".join("x" if any(a <= at < b for a, b, _ in made) else " " for at in range(64))
    touching = {b for _, b, _ in made} & {a for a, _, _ in made}
    assert shown.count("<") >= len(stretches.split())
    if not touching:
        assert shown.count("<") == len(stretches.split())


@given(masks, st.sets(st.integers(0, 64)))
def test_masking_a_text_in_parts_masks_the_whole(made: list[edits.Mask], cuts: set[int]) -> None:
    whole = edits.united(made)
    edges = [0, *sorted(cuts), 64]
    parts = [edits.with_masks(ALPHABET[a:b], whole, a) for a, b in itertools.pairwise(edges)]
    assert "".join(parts) == edits.with_masks(ALPHABET, whole)


@given(st.lists(masks, min_size=1, max_size=3))
def test_masks_united_a_few_at_a_time_are_those_united_at_once(
    several: list[list[edits.Mask]],
) -> None:
    apart: list[edits.Mask] = []
    for some in several:
        apart = edits.united([*apart, *some])
    stretches = [mask[:2] for mask in edits.united(mask for some in several for mask in some)]
    assert [mask[:2] for mask in apart] == stretches
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(apart))


def test_a_finding_without_a_replacement_is_masked_all_the_same() -> None:
    found = [
        Finding("p", "x", (0, 3)),
        Finding("p", "x", None),
        Finding("p", "x", (4, 5), replacement=""),
    ]
    assert edits.masked_texts([Passage("p", "abcdef")], found) == {"p": "[redacted]df"}


def test_spans_of_findings_inside_json_are_offsets_in_the_text_as_written() -> None:
    arguments = '{"note": "caf\\u00e9 \\"4242 4242 4242 4242\\"", "card": 4242424242424242, "ada@example.com": 1}'
    calls = [{"function": {"name": "f", "arguments": arguments}}]
    body = {"choices": [{"message": {"content": "x 4242 4242 4242 4242", "tool_calls": calls}}]}
    reading = read(CHAT, body)
    found = scan_of("pii").run(Exchange("chat", {}, reading.choices)).findings
    path = "choices[0].message.tool_calls[0].function.arguments"
    assert {finding.path for finding in found} == {
        "choices[0].message.content", f"{path}#/note", f"{path}#/card", f"{path}#/ada@example.com",
    }  # fmt: skip
    new = edits.redacted_texts(reading, found)
    assert set(new) == {"choices[0].message.content", path}
    assert orjson.loads(new[path]) == {
        "note": 'café "[redacted:card]"',
        "card": "[redacted:card]",
        "[redacted:email]": 1,
    }
    again = wire.read_response(CHAT, edits.with_texts(orjson.dumps(body), new, reading))
    assert scan_of("pii").run(Exchange("chat", {}, again.choices)).findings == ()
