"""Streams, replayed or let through: what their clients get, and what is durable by their end."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from gateway import sse, wire
from gateway.errors import (
    ResponseBlocked,
    UpstreamError,
)
from gateway.store import SqlStore
from policies import Action, Policy
from tests.fakes import Says
from tests.gateway.rig import (
    BUFFERS,
    HOLDS,
    LOGPROBS,
    OBSERVES,
    RETURNS,
    STREAM,
    STREAMED,
    WINDOW,
    Rig,
    a_call,
    a_policy,
    events_of,
    forbid,
    header,
    parts_of,
    read,
    says,
    streams,
    text_of,
)


async def test_a_buffered_stream_is_replayed_as_it_came(sqlite_store: SqlStore) -> None:
    answer = streams("It is ", "fine.")
    rig = Rig(sqlite_store, answer)
    call = a_call(STREAMED)
    reply = await rig.reply(call, BUFFERS)
    assert reply.body == b"".join(answer.parts)
    assert header(reply.headers, "x-ratelimit-remaining") == "7"
    assert header(reply.headers, "x-holdgate-action") == "return"
    record = await rig.record(call)
    assert wire.read_response(wire.CHAT, record.response or b"").choices[0].text == "It is fine."
    assert record.streamed


async def test_a_whole_answer_to_a_client_that_wants_a_stream_becomes_one(
    sqlite_store: SqlStore,
) -> None:
    rig = Rig(sqlite_store, says("It is fine."))
    reply = await rig.reply(a_call(STREAMED), RETURNS)
    body = await read(reply)
    assert text_of(body) == "It is fine."
    assert body.endswith(sse.DONE)
    assert header(reply.headers, "content-type") == "text/event-stream; charset=utf-8"


async def test_a_buffered_stream_is_held_and_blocked_like_a_whole_answer(
    sqlite_store: SqlStore,
) -> None:
    rig = Rig(sqlite_store, streams("a sec", "ret"))
    held = await rig.held(a_call(STREAMED), HOLDS)
    assert held.streamed
    with pytest.raises(ResponseBlocked):
        await rig.answer(a_call(STREAMED), a_policy(forbid("secret", "block"), stream="buffer"))


async def test_a_stream_that_is_only_watched_goes_out_before_it_is_decided_on(
    sqlite_store: SqlStore,
) -> None:
    rig = Rig(sqlite_store, streams("a ", "secret"))
    call = a_call(STREAMED)
    reply = await rig.reply(call, OBSERVES)
    parts = parts_of(reply)
    assert b"a " in await anext(parts)
    assert await rig.store.decision(call.id) is None
    rest = b"".join([part async for part in parts])
    assert rest.endswith(sse.DONE)
    decision = (await rig.record(call)).detail["decision"]
    assert isinstance(decision, dict)
    assert decision["intended"] == Action.BLOCK
    assert header(reply.headers, "x-holdgate-decision") == call.id
    assert header(reply.headers, "x-holdgate-action") is None
    assert rig.models.closed == 1


async def test_the_end_of_a_stream_waits_until_the_decision_is_durable(
    sqlite_store: SqlStore,
) -> None:
    rig = Rig(sqlite_store, streams("fine"))
    call = a_call(STREAMED)
    async for part in parts_of(await rig.reply(call, RETURNS)):
        if part.endswith(sse.DONE):
            assert (await rig.record(call)).action is Action.RETURN


async def test_a_stream_through_a_window_ends_where_it_is_blocked(sqlite_store: SqlStore) -> None:
    rig = Rig(sqlite_store, streams("Here it is: a sec", "ret", ", you see"))
    call = a_call(STREAMED)
    body = await read(await rig.reply(call, WINDOW))
    *said, error, done = events_of(body)
    assert (error["error"]["code"], done) == ("response_blocked", "[DONE]")
    assert error["error"]["decision"] == call.id
    assert not said
    assert (await rig.record(call)).action is Action.BLOCK
    assert rig.models.closed == 1
    assert rig.at_rest


async def test_a_stream_through_a_window_is_masked(sqlite_store: SqlStore) -> None:
    mask = {"id": "mask", "use": "redact", "patterns": ["secret"], "replacement": "***"}
    rig = Rig(sqlite_store, streams("A sec", "ret and", " more"))
    call = a_call(STREAMED)
    body = await read(await rig.reply(call, a_policy(mask, stream="window")))
    assert text_of(body) == "A *** and more"
    assert b"secret" not in ((await rig.record(call)).response or b"")


async def test_a_stream_that_cannot_be_masked_whole_ends_with_an_error(
    sqlite_store: SqlStore,
) -> None:
    """A check can tell of so many places and no more; the whole answer would be held."""
    mask = {"id": "mask", "use": "redact", "patterns": ["secret"], "replacement": "***"}
    rig = Rig(sqlite_store, streams(*["A secret. "] * 60))
    body = await read(await rig.reply(a_call(STREAMED), a_policy(mask, stream="window")))
    assert events_of(body)[-2]["error"]["code"] == "response_blocked"
    assert b"secret" not in body


@pytest.mark.parametrize("policy", [RETURNS, WINDOW], ids=["observe", "window"])
async def test_a_live_stream_that_breaks_off_says_so(
    sqlite_store: SqlStore, policy: Policy
) -> None:
    rig = Rig(
        sqlite_store, streams("It is ", finish=None, done=False, fault=UpstreamError("Gone."))
    )
    call = a_call(STREAMED)
    body = await read(await rig.reply(call, policy))
    *_, error, done = events_of(body)
    assert (error["error"]["code"], done) == ("upstream_truncated", "[DONE]")
    assert (await rig.record(call)).detail["fault"] == "truncated"
    assert rig.at_rest


@pytest.mark.parametrize("policy", [RETURNS, WINDOW, OBSERVES], ids=["live", "window", "observe"])
async def test_a_client_that_leaves_a_stream_leaves_a_record(
    sqlite_store: SqlStore, policy: Policy
) -> None:
    rig = Rig(sqlite_store, streams("It is ", *["fine. "] * 50))
    call = a_call(STREAMED)
    parts: Any = parts_of(await rig.reply(call, policy))
    assert b"It is" in await anext(parts)
    await parts.aclose()
    await rig.live.drain()
    record = await rig.record(call)
    assert (record.detail["fault"], record.detail["note"]) == ("truncated", "the client went away")
    assert rig.models.closed == 1
    assert rig.at_rest


async def test_a_client_that_leaves_before_its_stream_begins_leaves_a_record(
    sqlite_store: SqlStore,
) -> None:
    rig = Rig(sqlite_store, streams("It is ", "fine."))
    call = a_call(STREAMED)
    parts: Any = parts_of(await rig.reply(call, RETURNS))
    await parts.aclose()
    await rig.live.drain()
    record = await rig.record(call)
    assert record.detail["fault"] == "truncated"
    assert "the client went away" in str(record.detail)
    assert rig.models.closed == 1
    assert rig.at_rest


async def test_a_client_that_leaves_while_its_stream_is_recorded_leaves_a_record(
    sqlite_store: SqlStore,
) -> None:
    rig = Rig(sqlite_store, streams("fine"))
    call = a_call(STREAMED)
    reply = await rig.reply(call, RETURNS)
    rig.clock.looked_at.clear()
    reading = asyncio.create_task(read(reply))
    await rig.clock.looked_at.wait()
    reading.cancel()
    await asyncio.wait([reading])
    assert reading.cancelled()
    await rig.live.drain()
    assert (await rig.record(call)).detail["fault"] is None
    assert rig.at_rest


@pytest.mark.parametrize("policy", [RETURNS, WINDOW, BUFFERS], ids=["live", "window", "buffer"])
async def test_a_stream_that_is_too_long_is_ended(sqlite_store: SqlStore, policy: Policy) -> None:
    rig = Rig(sqlite_store, streams(*["x" * 50_000] * 30))
    call = a_call(STREAMED)
    try:
        body = await read(await rig.reply(call, policy))
    except UpstreamError as error:
        body = error.body()
    assert b"upstream_response_too_large" in body
    assert rig.models.closed == 1
    assert rig.at_rest


UNREADABLE = Says([b'data: {"choices":[{"index":0,"delta":{"content":"It "}}]}\n\n', b"data: {x\n\n",
                   b'data: {"choices":[{"index":0,"delta":{"content":"is."}}]}\n\n', sse.DONE], headers=STREAM)  # fmt: skip


@pytest.mark.parametrize("policy", [RETURNS, WINDOW], ids=["live", "window"])
async def test_a_live_stream_ends_at_an_event_that_cannot_be_read(
    sqlite_store: SqlStore, policy: Policy
) -> None:
    rig = Rig(sqlite_store, UNREADABLE)
    call = a_call(STREAMED)
    *said, error, done = events_of(await read(await rig.reply(call, policy)))
    assert (error["error"]["code"], done) == ("upstream_unreadable", "[DONE]")
    assert "is." not in str(said)
    assert (await rig.record(call)).detail["fault"] == "unreadable"


async def test_a_watched_stream_goes_on_behind_an_event_that_cannot_be_read(
    sqlite_store: SqlStore,
) -> None:
    rig = Rig(sqlite_store, UNREADABLE)
    call = a_call(STREAMED)
    assert await read(await rig.reply(call, OBSERVES)) == b"".join(UNREADABLE.parts)
    assert (await rig.record(call)).detail["fault"] == "unreadable"


@pytest.mark.parametrize("policy", [RETURNS, WINDOW, BUFFERS], ids=["live", "window", "buffer"])
async def test_a_stream_ends_with_done_and_nothing_comes_after(
    sqlite_store: SqlStore, policy: Policy
) -> None:
    whole = streams("It is fine.")
    late = sse.encode(b'{"choices":[{"index":0,"delta":{"content":"a secret"}}]}')
    for answer in (
        whole,
        streams("It is fine.", done=False),
        Says([*whole.parts, late], headers=STREAM),
    ):
        rig = Rig(sqlite_store, answer)
        body = await read(await rig.reply(a_call(STREAMED), policy))
        assert body == b"".join(whole.parts)


@pytest.mark.parametrize("stream", ["observe", "buffer"])
async def test_logprobs_nobody_asked_for_are_taken_out_of_a_stream(
    sqlite_store: SqlStore, stream: str
) -> None:
    choice = {
        "index": 0,
        "delta": {"content": "fine"},
        "logprobs": LOGPROBS,
        "finish_reason": "stop",
    }
    event = sse.encode(orjson.dumps({"choices": [choice]}))
    rig = Rig(sqlite_store, Says([event, sse.DONE], headers=STREAM), top=3)
    call = a_call(STREAMED)
    policy = a_policy(
        confidence={"source": "logprob", "when_uncalibrated": "return"}, stream=stream
    )
    body = await read(await rig.reply(call, policy))
    assert body == event.replace(orjson.dumps(LOGPROBS), b"null") + sse.DONE
    evidence = (await rig.record(call)).detail["evidence"]
    assert isinstance(evidence, dict)
    assert evidence["signals"]


TWICE = [
    {
        "index": 0,
        "delta": {"content": "a sec"},
        "message": {"content": "a sec"},
        "finish_reason": None,
    },
    {
        "index": 0,
        "delta": {"content": "ret"},
        "message": {"content": "a secret"},
        "finish_reason": "stop",
    },
]


@pytest.mark.parametrize("stream", ["window", "buffer"])
async def test_chunks_that_say_all_so_far_again_hide_nothing(
    sqlite_store: SqlStore, stream: str
) -> None:
    events = [sse.encode(orjson.dumps({"choices": [choice]})) for choice in TWICE]
    rig = Rig(sqlite_store, Says([*events, sse.DONE], headers=STREAM))
    mask = {"id": "mask", "use": "redact", "patterns": ["secret"], "replacement": "***"}
    body = await read(await rig.reply(a_call(STREAMED), a_policy(mask, stream=stream)))
    assert b"secret" not in body
    if stream == "buffer":
        assert text_of(body) == "a ***"
    else:
        assert events_of(body)[-2]["error"]["code"] == "upstream_unreadable"


RESPONSE = {"id": "resp_1", "model": "m", "status": "completed", "output": [
    {"type": "message", "id": "msg_1", "content": [{"type": "output_text", "text": "a secret"}]}]}  # fmt: skip


@pytest.mark.parametrize("policy", [RETURNS, OBSERVES, BUFFERS], ids=["live", "observe", "buffer"])
async def test_a_stream_of_responses_goes_out_as_it_came(
    sqlite_store: SqlStore, policy: Policy
) -> None:
    parts = list(sse.stream_of(wire.RESPONSES, orjson.dumps(RESPONSE), include_usage=False))
    rig = Rig(sqlite_store, Says(parts, headers=STREAM))
    call = a_call({"input": "Hi", **STREAMED}, endpoint=wire.RESPONSES)
    assert await read(await rig.reply(call, policy)) == b"".join(parts)
    assert (await rig.record(call)).upstream_id == "resp_1"


async def test_a_stream_of_responses_is_blocked_before_any_of_it_goes_out(
    sqlite_store: SqlStore,
) -> None:
    parts = list(sse.stream_of(wire.RESPONSES, orjson.dumps(RESPONSE), include_usage=False))
    rig = Rig(sqlite_store, Says(parts, headers=STREAM))
    with pytest.raises(ResponseBlocked):
        await rig.answer(a_call({"input": "Hi", **STREAMED}, endpoint=wire.RESPONSES), WINDOW)


FINE = orjson.loads(orjson.dumps(RESPONSE).replace(b"secret", b"remark"))


def lying(final: dict[str, Any]) -> Says:
    """A stream whose deltas say a secret and whose last event is another response."""
    told: dict[str, Any] = {
        "type": "response.output_text.delta",
        "output_index": 0,
        "content_index": 0,
        "delta": "a secret",
    }
    last: dict[str, Any] = {"type": f"response.{final['status']}", "response": final}
    return Says([sse.encode(orjson.dumps(each), each["type"]) for each in (told, last)], headers=STREAM)  # fmt: skip


async def test_deltas_that_say_what_the_response_does_not_say_do_not_go_out(
    sqlite_store: SqlStore,
) -> None:
    failed = {"id": "resp_1", "status": "failed", "output": [], "error": {"message": "x"}}
    for final in (FINE, failed):
        rig = Rig(sqlite_store, lying(final))
        call = a_call({"input": "Hi", **STREAMED}, endpoint=wire.RESPONSES)
        body = await read(await rig.reply(call, BUFFERS))
        assert b"secret" not in body
        assert events_of(body)[0]["type"] == "response.created"
        assert events_of(body)[-1]["response"] == final


async def test_that_a_watched_stream_said_more_than_was_checked_is_recorded(
    sqlite_store: SqlStore,
) -> None:
    rig = Rig(sqlite_store, lying(FINE))
    call = a_call({"input": "Hi", **STREAMED}, endpoint=wire.RESPONSES)
    await read(await rig.reply(call, OBSERVES))
    assert "more than what was checked" in str((await rig.record(call)).detail["note"])


async def test_a_response_that_failed_is_the_clients_to_hear_of(sqlite_store: SqlStore) -> None:
    body = orjson.dumps(
        {"id": "resp_1", "status": "failed", "output": [], "error": {"message": "x"}}
    )
    rig = Rig(sqlite_store, Says(body))
    call = a_call({"input": "Hi"}, endpoint=wire.RESPONSES)
    assert (await rig.reply(call, HOLDS)).body == body
    assert (await rig.record(call)).action is Action.RETURN
