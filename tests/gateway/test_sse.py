"""Streams taken apart and put together again."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import openai
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk
from openai.types.responses import ResponseStreamEvent

from gateway import sse, wire
from gateway.errors import UpstreamError
from tests.gateway.bodies import CHAT, COMPLETIONS, RESPONSES, bodies, said
from tests.gateway.timing import grows_in_proportion

# -------------------------------------------------------------------------------------------------- splitting

ends = st.sampled_from([b"\n", b"\r\n", b"\r"])
lines = st.sampled_from(
    [b"data: {}", b"data:{}", b"data:  x", b"data", b"data:", b": note", b"event: ping", b"id: 1", b"x", b"datax: 1", b""]
)  # fmt: skip


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Bytes of a stream: lines of every kind with ends of every kind."""
    parts = [line + draw(ends) for line in draw(st.lists(lines, max_size=12))]
    return draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + b"".join(parts)


def cut(stream: bytes, places: Iterable[int]) -> list[bytes]:
    return [stream[a:b] for a, b in itertools.pairwise([0, *sorted(places), len(stream)])]


def split(chunks: Iterable[bytes]) -> list[sse.Event]:
    splitter = sse.Splitter()
    return [event for chunk in chunks for event in splitter.feed(chunk)]


def reference(stream: bytes) -> list[bytes]:
    """The data of the events of a stream, by the standard's own algorithm (WHATWG HTML, section 9.2.6)."""
    stream = stream.removeprefix(b"\xef\xbb\xbf")
    dispatched: list[bytes] = []
    data: list[bytes] = []
    for line in stream.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")[:-1]:
        name, _, value = line.partition(b":")
        if not line:
            if b"\n".join(data):
                dispatched.append(b"\n".join(data))
            data = []
        elif name == b"data":
            data.append(value.removeprefix(b" "))
    return dispatched


@settings(max_examples=500)
@given(streams(), st.data())
def test_how_bytes_are_cut_makes_no_difference(stream: bytes, data: st.DataObject) -> None:
    places = data.draw(st.sets(st.integers(0, len(stream))))
    assert split(cut(stream, places)) == split([stream])


@settings(max_examples=500)
@given(streams())
def test_events_are_those_of_the_standard(stream: bytes) -> None:
    stream += b"\n\n: the end"
    events = split([stream])
    assert [event.data for event in events if event.data] == reference(stream)
    assert stream.startswith(b"".join(event.raw for event in events))


@pytest.mark.parametrize(
    ("raw", "data"),
    [
        (b"data: {}\n\n", b"{}"),
        (b"data:{}\r\n\r\n", b"{}"),
        (b"data: {}\r\r", b"{}"),
        (b"data: {\ndata: }\n\n", b"{\n}"),
        (b"data:   x\n\n", b"  x"),
        (b": note\n\n", None),
        (b"event: ping\ndata: {}\n\n", b"{}"),
        (b"event: ping\n\n", None),
        (b"data\n\n", b""),
        (b"\n\n", None),
        (b": note\rdata: {}\n\n", b"{}"),
        (b"\xef\xbb\xbfdata: {}\n\n", b"{}"),
        (b"data: a\rdata: b\n\n", b"a\nb"),
        (b"datum: x\n\n", None),
    ],
)
def test_the_data_of_an_event(raw: bytes, data: bytes | None) -> None:
    assert split([raw + b": next"]) == [sse.Event(raw, data)]


def test_the_official_client_reads_no_event_that_we_do_not() -> None:
    """A carriage return ends a line: data behind one must not pass for part of a comment."""
    hostile = b": note\rdata: 1\n\n\xef\xbb\xbfdata: 2\n\n: x\r\rdata: 3\n\n"
    decoder = openai._streaming.SSEDecoder()
    theirs = {event.data for event in decoder.iter_bytes(iter([hostile])) if event.data}
    assert theirs <= {(event.data or b"").decode() for event in split([hostile])}
    assert theirs == {"1", "3"}


def test_an_event_without_end_takes_time_in_proportion() -> None:
    def feed(size: int) -> None:
        splitter = sse.Splitter()
        for _ in range(size // 50):
            assert splitter.feed(b"data: " + b"x" * 44) == []

    assert grows_in_proportion(feed, 1_250_000)


# ------------------------------------------------------------------------------------------- putting together

#: The official client's classes of the events of Responses, by their type.
EVENTS = {
    get_args(each.model_fields["type"].annotation)[0]: each
    for each in get_args(get_args(ResponseStreamEvent)[0])
}


def assembled(endpoint: str, events: Iterable[bytes]) -> sse.Assembler:
    assembler = sse.Assembler(endpoint)
    for event in split([*events]):
        assembler.add(event)
    return assembler


def chunks(*choices: dict[str, Any] | Sequence[dict[str, Any]], **more: Any) -> list[bytes]:
    """A chunk for each choice, or for several at once."""
    listed = [[choice] if isinstance(choice, dict) else list(choice) for choice in choices]
    return [sse.encode(orjson.dumps({"id": "c", "choices": each, **more})) for each in listed]


def put_together(*choices: dict[str, Any] | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    body = assembled(wire.CHAT, chunks(*choices)).body()
    found: list[dict[str, Any]] = orjson.loads(body)["choices"]
    return found


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS, RESPONSES])
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_body_taken_apart_and_put_together_says_the_same(
    endpoint: str, data: st.DataObject
) -> None:
    body = data.draw(bodies(endpoint))
    whole = orjson.dumps(body)
    events = list(sse.stream_of(endpoint, whole, include_usage=True))
    again = assembled(endpoint, events)
    assert said(wire.read_response(endpoint, again.body())) == said(
        wire.read_response(endpoint, whole)
    )
    assert again.complete == all(
        c.get("finish_reason") for c in body.get("choices", [{"finish_reason": 1}])
    )
    assert again.done == (endpoint != RESPONSES)
    assert again.error is None
    assert not again.says_more
    rebuilt = orjson.loads(again.body())
    for name, value in body.items():
        assert name in ("choices", "object") or rebuilt[name] == value


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS, RESPONSES])
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_body_taken_apart_is_a_stream_to_the_official_client(
    endpoint: str, data: st.DataObject
) -> None:
    body = orjson.dumps(data.draw(bodies(endpoint, official=True)))
    decoder = openai._streaming.SSEDecoder()
    stream = sse.stream_of(endpoint, body, include_usage=True)
    events = [event.data for event in decoder.iter_bytes(iter([b"".join(stream)]))]
    if endpoint == RESPONSES:
        told = [EVENTS[orjson.loads(event)["type"]].model_validate_json(event) for event in events]
        assert [event.sequence_number for event in told] == list(range(len(told)))
        assert told[0].type == "response.created"
        assert told[-1].type in ("response.completed", "response.incomplete")
    else:
        assert events.pop() == "[DONE]"
        chunk = ChatCompletionChunk if endpoint == CHAT else Completion
        assert [chunk.model_validate_json(event).choices for event in events][-1] == []


def test_interleaved_choices_and_tool_calls_come_apart() -> None:
    def call(number: int, arguments: str, **more: str) -> dict[str, Any]:
        inner = {"arguments": arguments, **more}
        return {"tool_calls": [{"index": number, "id": f"call_{number}", "function": inner}]}

    said = put_together(
        {"index": 1, "delta": {"role": "assistant", "content": "B"}},
        {"index": 0, "delta": call(1, '{"b"', name="second")},
        [
            {"index": 0, "delta": call(0, "{", name="first")},
            {"index": 1, "delta": {"content": "C"}},
        ],
        {"index": 0, "delta": call(1, ": 2}")},
        {"index": 0, "delta": call(0, "}"), "finish_reason": "tool_calls"},
        {"index": 1, "delta": {}, "finish_reason": "stop"},
    )
    assert [choice["index"] for choice in said] == [0, 1]
    calls = said[0]["message"]["tool_calls"]
    assert [c["function"] for c in calls] == [
        {"name": "second", "arguments": '{"b": 2}'},
        {"name": "first", "arguments": "{}"},
    ]
    assert [c["id"] for c in calls] == ["call_1", "call_0"]
    assert said[1]["message"]["content"] == "BC"
    assert [choice["finish_reason"] for choice in said] == ["tool_calls", "stop"]


def test_logprobs_of_the_pieces_are_those_of_the_whole() -> None:
    tokens = [{"token": str(number), "logprob": -0.1} for number in range(3)]
    said = put_together(
        {"index": 0, "delta": {"content": ""}, "logprobs": None},
        *({"index": 0, "delta": {}, "logprobs": {"content": [t], "refusal": None}} for t in tokens),
    )
    assert said[0]["logprobs"] == {"content": tokens, "refusal": None}


def test_content_that_turns_from_text_into_parts_loses_nothing() -> None:
    said = put_together(
        {"index": 0, "delta": {"content": "One, "}},
        {"index": 0, "delta": {"content": [{"type": "text", "text": "two, "}]}},
        {"index": 0, "delta": {"content": [{"type": "thinking", "thinking": "Hm"}]}},
        {"index": 0, "delta": {"content": "three"}},
    )
    assert said[0]["message"]["content"] == [
        {"type": "text", "text": "One, two, "},
        {"type": "thinking", "thinking": "Hm"},
        {"type": "text", "text": "three"},
    ]


def test_only_tool_calls_lose_their_numbers() -> None:
    delta = {"reasoning_details": [{"index": 0, "text": "a"}], "citations": [1, 2]}
    said = put_together({"index": 0, "delta": delta}, {"index": 0, "delta": delta})
    assert said[0]["message"]["reasoning_details"] == [{"index": 0, "text": "aa"}]
    assert said[0]["message"]["citations"] == [1, 2, 1, 2]


@pytest.mark.parametrize(
    "choice",
    [
        {"index": "x"},
        {"index": [1]},
        {"index": {}, "delta": {"tool_calls": [{"index": {"a": 1}, "function": {}}]}},
        {"index": 0, "delta": {"tool_calls": [{"index": "0"}]}},
        {"index": 0, "delta": {"tool_calls": [{"index": [0]}]}},
        {"index": 0, "delta": {"tool_calls": ["call"]}},
        {"index": 0, "delta": {"tool_calls": [{"function": {"arguments": {"a": 1}}}]}},
        {"index": 0, "delta": {"tool_calls": [{"function": "f"}]}},
        {"index": 0, "delta": {"content": 5}},
        {"index": 0, "delta": {"content": {"text": "x"}}},
        {"index": 0, "delta": {"content": ["x"]}},
        {"index": 0, "delta": {"content": [{"type": "text", "text": 5}]}},
        {"index": 0, "delta": {"refusal": ["x"]}},
        {"index": 0, "delta": "x"},
        {"index": 0, "message": "x"},
        {"index": 0, "text": 5},
        "choice",
        None,
    ],
    ids=repr,
)
def test_a_chunk_that_says_what_no_chunk_may_is_unreadable(choice: Any) -> None:
    with pytest.raises(wire.Unreadable):
        assembled(wire.CHAT, [sse.encode(orjson.dumps({"choices": [choice]}))]).body()


@pytest.mark.parametrize(
    ("first", "then"),
    [("text", 5), ("text", {"a": 1}), ([1], 5), ({"a": 1}, "text"), (5, [1]), ("text", [1]), ([1], "text")],
    ids=repr,
)  # fmt: skip
def test_a_field_that_changes_its_type_is_unreadable(first: Any, then: Any) -> None:
    """Else what was said first would be lost to the checks, and not to the client."""
    with pytest.raises(wire.Unreadable):
        put_together({"index": 0, "delta": {"x": first}}, {"index": 0, "delta": {"x": then}})


@pytest.mark.parametrize(
    "data",
    [b"", b"x", b"[]", b"1", b"null", b'"x"', b"{", b"\xff", b'{"choices": 1}', b'{"choices": {"a": 1}}',
     b'{"choices": "text"}', b'{"choices":[{"index":1e999}]}', b'{"a":' * 300 + b"1" + b"}" * 300,
     b'{"choices":[{"delta":' + b'{"a":' * 990 + b"1" + b"}" * 990 + b"}]}", b"[" * 100_000],
    ids=lambda data: repr(data[:20]),
)  # fmt: skip
@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS, RESPONSES])
def test_an_event_that_is_no_chunk_is_unreadable(endpoint: str, data: bytes) -> None:
    with pytest.raises(wire.Unreadable):
        assembled(endpoint, [sse.encode(data)])


@pytest.mark.parametrize(
    "event",
    [{"type": "response.output_text.delta", "delta": 5}, {"type": "response.output_text.delta"}, {},
     {"type": "response.completed"}, {"type": "response.created", "response": [1]}, {"type": 1},
     {"type": "response.refusal.delta", "content_index": {}, "delta": "x"}],
    ids=repr,
)  # fmt: skip
def test_an_event_of_responses_without_what_it_must_have_is_unreadable(event: Any) -> None:
    with pytest.raises(wire.Unreadable):
        assembled(RESPONSES, [sse.encode(orjson.dumps(event))])


def test_an_event_of_responses_without_type_is_said_to_have_none() -> None:
    with pytest.raises(wire.Unreadable, match="without a `type`"):
        assembled(RESPONSES, [sse.encode(b"{}")])


def test_choices_and_parts_without_number_are_bounded() -> None:
    many = [{"index": number, "delta": {}} for number in range(2_000)]
    with pytest.raises(wire.Unreadable, match="too many"):
        put_together(many)
    calls = [{"index": number} for number in range(2_000)]
    with pytest.raises(wire.Unreadable, match="too many"):
        put_together({"index": 0, "delta": {"tool_calls": calls}})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "x", "text", "function"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["index", "delta", "message", "content", "text", "tool_calls", "function", "arguments",
                         "logprobs", "type", "choices", "error", "response", "output", "finish_reason", "x"]),
        inner, max_size=5),
    max_leaves=25,
)  # fmt: skip


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS, RESPONSES])
@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries({"choices": st.lists(json_values, max_size=2)}) | json_values,
        max_size=4,
    )
)
def test_hostile_chunks_are_unreadable_or_make_a_body(endpoint: str, sent: list[Any]) -> None:
    """Whatever comes: `Unreadable`, or a body of which the same holds; never another exception."""
    try:
        assembler = assembled(endpoint, [sse.encode(orjson.dumps(each)) for each in sent])
        body = assembler.body()
        wire.read_response(endpoint, body)
    except wire.Unreadable:
        return
    events = list(sse.stream_of(endpoint, body, include_usage=True))
    assert all(isinstance(event, bytes) for event in events)


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"error": {"message": "Out of luck", "code": 1}}, "Out of luck"),
        ({"error": "Out of luck"}, "Out of luck"),
        ({"type": "error", "message": "Out of luck", "code": "c"}, "Out of luck"),
    ],
)
def test_an_error_event_is_the_streams_error(event: dict[str, Any], message: str) -> None:
    endpoint = RESPONSES if event.get("type") else CHAT
    assembler = assembled(endpoint, [sse.encode(orjson.dumps(event))])
    assert assembler.error is not None
    assert assembler.error["message"] == message
    assert not assembler.complete


def test_of_an_incomplete_response_there_is_as_much_as_came() -> None:
    events = [
        {"type": "response.created", "response": {"id": "resp_1", "output": [], "x": 1}},
        {"type": "response.output_text.delta", "delta": "Half an "},
        {"type": "response.output_text.delta", "delta": "answer"},
    ]
    assembler = assembled(RESPONSES, [sse.encode(orjson.dumps(each)) for each in events])
    reading = wire.read_response(RESPONSES, assembler.body())
    assert not assembler.complete
    assert (reading.choices[0].text, reading.upstream_id) == ("Half an answer", "resp_1")
    assert reading.choices[0].finish_reason == "incomplete"


ANSWER = {
    "id": "resp_1",
    "status": "completed",
    "output": [
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Why."}]},
        {"type": "message", "id": "msg_1", "status": "completed", "content": [
            {"type": "output_text", "text": "It is fine.", "annotations": [{"type": "url_citation", "title": "A"}]},
            {"type": "refusal", "refusal": "No."}]},
        {"type": "function_call", "id": "fc_1", "name": "pay", "arguments": "{}"},
        {"type": "code_interpreter_call", "id": "ci_1", "code": "1 + 1", "outputs": [{"type": "logs", "logs": "2"}]},
    ],
}  # fmt: skip
TEXT = {"output_index": 1, "content_index": 0, "item_id": "msg_1"}


def response_stream(*events: dict[str, Any], final: dict[str, Any] = ANSWER) -> sse.Assembler:
    """A stream that ends with the answer, told by these events."""
    last = {"type": "response.completed", "response": final}
    return assembled(RESPONSES, [sse.encode(orjson.dumps(each)) for each in (*events, last)])


def test_events_that_lead_up_to_the_response_say_no_more() -> None:
    begun = {**ANSWER, "status": "in_progress", "output": [], "service_tier": "auto", "usage": None}
    hollow = {"type": "message", "id": "msg_1", "status": "in_progress", "content": []}
    assembler = response_stream(
        {"type": "response.created", "sequence_number": 0, "response": begun},
        {"type": "keepalive", "sequence_number": 1},
        {"type": "response.output_item.added", "output_index": 1, "item": hollow},
        {"type": "response.output_text.delta", **TEXT, "delta": "It is ", "obfuscation": "kG3x", "logprobs": []},
        {"type": "response.output_text.delta", **TEXT, "delta": "fine.", "obfuscation": "p"},
        {"type": "response.output_text.annotation.added", **TEXT, "annotation_index": 0,
         "annotation": {"type": "url_citation", "title": "A"}},
        {"type": "response.output_text.done", **TEXT, "text": "It is fine."},
        {"type": "response.code_interpreter_call.interpreting", "output_index": 3, "item_id": "ci_1"},
        {"type": "response.function_call_arguments.done", "output_index": 2, "name": "pay", "arguments": "{}"},
        final={**ANSWER, "service_tier": "default"},
    )  # fmt: skip
    assert assembler.complete
    assert not assembler.says_more


@pytest.mark.parametrize(
    "event",
    [
        {"type": "response.output_text.delta", **TEXT, "delta": "It is CODE."},
        {"type": "response.output_text.delta", **TEXT, "delta": "It is fine"},
        {"type": "response.output_text.delta", "delta": "It is fine."},
        {"type": "response.output_text.delta", **TEXT, "content_index": 5, "delta": "It is fine."},
        {"type": "response.output_text.delta", **TEXT, "output_index": "1", "delta": "It is fine."},
        {"type": "response.output_text.delta", **TEXT, "delta": "It is fine.", "note": "CODE"},
        {"type": "response.output_text.done", **TEXT, "text": "CODE"},
        {"type": "response.output_text.annotation.added", **TEXT, "annotation_index": 0, "annotation": {"title": "CODE"}},
        {"type": "response.refusal.delta", **TEXT, "content_index": 1, "delta": "CODE"},
        {"type": "response.refusal.done", **TEXT, "content_index": 1, "refusal": "CODE"},
        {"type": "response.content_part.added", **TEXT, "part": {"type": "output_text", "text": "CODE"}},
        {"type": "response.content_part.done", **TEXT, "part": {"type": "output_text", "text": "CODE"}},
        {"type": "response.output_item.added", "output_index": 0, "item": {"content": [{"text": "CODE"}]}},
        {"type": "response.output_item.done", "output_index": 2, "item": {"type": "function_call", "arguments": "CODE"}},
        {"type": "response.output_item.done", "output_index": 9, "item": {"type": "message", "content": "CODE"}},
        {"type": "response.output_item.done", "item": {"type": "message", "content": "CODE"}},
        {"type": "response.function_call_arguments.delta", "output_index": 2, "delta": '{"a": "CODE"}'},
        {"type": "response.function_call_arguments.done", "output_index": 2, "name": "CODE", "arguments": "{}"},
        {"type": "response.reasoning_summary_text.delta", "output_index": 0, "summary_index": 0, "delta": "CODE"},
        {"type": "response.reasoning_summary_part.done", "output_index": 0, "summary_index": 0, "part": {"text": "CODE"}},
        {"type": "response.reasoning_text.delta", "output_index": 0, "content_index": 0, "delta": "CODE"},
        {"type": "response.code_interpreter_call_code.delta", "output_index": 3, "delta": "CODE"},
        {"type": "response.code_interpreter_call_code.done", "output_index": 3, "code": "CODE"},
        {"type": "response.created", "response": {"id": "r", "output": [{"content": [{"text": "CODE"}]}]}},
        {"type": "response.created", "response": {"id": "r", "output": [], "output_text": "CODE"}},
        {"type": "response.in_progress", "response": {"instructions": "CODE"}},
        {"type": "response.completed", "response": {**ANSWER, "output": []}},
        {"type": "response.some_news.delta", **TEXT, "delta": "CODE"},
        {"type": "response.some_news", "told": [["CODE"]]},
    ],
    ids=lambda event: event["type"],
)  # fmt: skip
def test_events_that_say_what_the_response_does_not_say_are_noticed(event: dict[str, Any]) -> None:
    assert response_stream(event).says_more


def test_what_comes_behind_the_response_says_more() -> None:
    told = {"type": "response.output_text.delta", **TEXT, "delta": "CODE"}
    last = {"type": "response.completed", "response": ANSWER}
    assert response_stream(last, told).says_more
    assert response_stream(last).says_more


def test_long_answers_take_time_in_proportion() -> None:
    [event] = split(chunks({"index": 0, "delta": {"content": "some text "}}))

    def assemble(count: int) -> None:
        assembler = sse.Assembler(wire.CHAT)
        for _ in range(count):
            assembler.add(event)
        assembler.body()

    assert grows_in_proportion(assemble, 5_000)


# ----------------------------------------------------------------------------------------------- event surgery

LOGPROBS = b'{"content": [{"token": "x", "logprob": -0.5}] }'


@pytest.mark.parametrize(
    ("data", "left"),
    [
        (b'{"choices":[{"delta":{},"logprobs": %s }]}', b'{"choices":[{"delta":{},"logprobs": null }]}'),
        (b'{"choices":[{"logprobs":%s},{"logprobs":%s}]}', b'{"choices":[{"logprobs":null},{"logprobs":null}]}'),
        (b'{"a":{"logprobs":1},"choices":[{"logprobs":%s,"x":"\\u00e9"}]}',
         b'{"a":{"logprobs":1},"choices":[{"logprobs":null,"x":"\\u00e9"}]}'),
        (b'{"choices":[{"logprobs":null}]}', b'{"choices":[{"logprobs":null}]}'),
        (b'{"choices":[{"delta":{"content":"{}"},"logprobs":{}}]}', b'{"choices":[{"delta":{"content":"{}"},"logprobs":{}}]}'),
        (b'{"choices":null,"logprobs":1}', b'{"choices":null,"logprobs":1}'),
        (b'{"choices":[{"logprobs', b'{"choices":[{"logprobs'),
        (b'"logprobs"', b'"logprobs"'),
        (b"[DONE]", b"[DONE]"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("before", "after"), [(b"data: ", b"\n\n"), (b": odd\r\ndata:", b"\r\n\r\n")]
)
def test_logprobs_are_cut_out_of_a_chunk_and_nothing_else(
    data: bytes, left: bytes, before: bytes, after: bytes
) -> None:
    event = sse.event(before + data.replace(b"%s", LOGPROBS) + after)
    assert sse.event_without_logprobs(CHAT, event) == before + left + after


def test_logprobs_that_stand_elsewhere_too_are_cut_out_where_they_are_meant() -> None:
    data = b'{"copy":%s,"choices":[{"logprobs":%s,"delta":{"content":"x"}}]}' % (LOGPROBS, LOGPROBS)
    left = orjson.loads(
        sse.event(sse.event_without_logprobs(CHAT, sse.event(sse.encode(data)))).data or b""
    )
    assert left == {
        "copy": orjson.loads(LOGPROBS),
        "choices": [{"logprobs": None, "delta": {"content": "x"}}],
    }


def test_logprobs_over_several_lines_of_data_are_cut_out() -> None:
    raw = b'data: {"choices":[{"logprobs":{"content":\ndata: [{"token":"x","logprob":0}]}}]}\n\n'
    assert b"token" not in sse.event_without_logprobs(CHAT, sse.event(raw))


@given(st.lists(st.sampled_from(["content", "refusal"]), min_size=1, max_size=3), st.text())
def test_a_chunk_loses_its_logprobs_and_keeps_all_else(names: list[str], text: str) -> None:
    tokens = [{"token": text, "logprob": -1.0, "bytes": None, "top_logprobs": []}]
    choices = [
        {"index": number, "delta": {name: text}, "logprobs": {name: tokens}, "x": [text]}
        for number, name in enumerate(names)
    ]
    data = orjson.dumps({"choices": choices, "logprobs": "mine"})
    left = sse.event(sse.event_without_logprobs(CHAT, sse.event(sse.encode(data)))).data or b""
    expected = [{**choice, "logprobs": None} for choice in choices]
    assert orjson.loads(left) == {"choices": expected, "logprobs": "mine"}


def test_an_event_of_responses_loses_logprobs_wherever_they_are() -> None:
    tokens = [{"token": "x", "logprob": -0.5}]
    part = {"type": "output_text", "text": "x", "logprobs": tokens}
    item = {"type": "message", "content": [part]}
    events: list[dict[str, Any]] = [
        {"type": "response.output_text.delta", "delta": "x", "logprobs": tokens},
        {"type": "response.output_item.done", "item": item},
        {"type": "response.completed", "response": {"output": [item]}},
    ]
    for event in events:
        raw = b"event: %s\nid: 7\ndata: %s\n\n" % (event["type"].encode(), orjson.dumps(event))
        left = sse.event_without_logprobs(RESPONSES, sse.event(raw))
        assert left.startswith(raw[: raw.index(b"data:")])
        assert orjson.loads(sse.event(left).data or b"") == orjson.loads(
            orjson.dumps(event).replace(orjson.dumps(tokens), b"[]")
        )


def test_an_event_of_responses_without_logprobs_stays_as_it_is() -> None:
    raw = b'event: x\ndata: {"type": "x",  "logprobs": [ ]}\n\n'
    assert sse.event_without_logprobs(RESPONSES, sse.event(raw)) == raw


# ------------------------------------------------------------------------------------------------ taking apart


def test_usage_is_told_only_if_asked_for() -> None:
    body = orjson.dumps({"id": "c", "choices": [], "usage": {"total_tokens": 3}})
    asked, not_asked = (
        b"".join(sse.stream_of(CHAT, body, include_usage=include)) for include in (True, False)
    )
    assert b"total_tokens" in asked
    assert b"usage" not in not_asked
    assert asked.endswith(sse.DONE)
    assert not_asked.endswith(sse.DONE)


@pytest.mark.parametrize("status", ["completed", "incomplete", "failed"])
def test_the_last_event_of_a_response_says_how_it_ended(status: str) -> None:
    body = orjson.dumps({"id": "r", "output": [], "status": status})
    events = [
        orjson.loads(e.data or b"")
        for e in split(sse.stream_of(RESPONSES, body, include_usage=False))
    ]
    assert events[-1]["type"] == f"response.{status}"


@example(wire.CHAT)
@example(wire.RESPONSES)
@given(st.just(wire.COMPLETIONS))
def test_an_error_on_a_stream_is_one_event_and_the_end(endpoint: str) -> None:
    events = split(
        [sse.error_events(endpoint, UpstreamError("No luck", code="upstream_truncated"))]
    )
    error = orjson.loads(events[0].data or b"")["error"]
    assert (error["message"], error["code"]) == ("No luck", "upstream_truncated")
    assert [event.is_done for event in events[1:]] == ([] if endpoint == RESPONSES else [True])


def test_a_comment_is_no_event_to_anybody() -> None:
    [event] = split([sse.comment("held for review")])
    assert event.data is None
    decoder = openai._streaming.SSEDecoder()
    assert list(decoder.iter_bytes(iter([event.raw]))) == []
