"""One request from top to bottom, in this process: what its client gets, and what is durable by then."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway import sse, wire
from gateway.auth import Caller, new_key
from gateway.calls import Call, Held, Reply
from gateway.errors import (
    GatewayError,
    InvalidRequest,
    ResponseBlocked,
    StoreError,
    UpstreamError,
    UpstreamTimeout,
)
from gateway.records import Resolution, Role, TaskKind, Verdict
from gateway.store import SqlStore
from policies import Action, Policy
from tests.fakes import Says
from tests.gateway.rig import (
    STREAM,
    Rig,
    a_call,
    a_policy,
    broken,
    chat,
    events_of,
    forbid,
    header,
    parts_of,
    read,
    says,
    streams,
    text_of,
)

STREAMED = {"stream": True}
KEY = {"idempotency-key": "k-1"}
RETRY = {"x-stainless-retry-count": "1"}
RETURNS = a_policy()
FLAGS = a_policy(forbid("secret", "flag"))
HOLDS = a_policy(forbid("secret", "hold"))
BLOCKS = a_policy(forbid("secret", "block"))
REDACTS = a_policy({"id": "mask", "use": "redact", "patterns": ["secret"], "replacement": "***"})
BUFFERS = a_policy(stream="buffer")
WINDOW = a_policy(forbid("secret", "block"), stream="window")
OBSERVES = a_policy(forbid("secret", "block"), mode="observe")


@pytest.fixture
def database(tmp_path: Path, sqlite_store: SqlStore) -> Path:
    """The file of the store."""
    return tmp_path / "holdgate.db"


# ---------------------------------------------------------------------------------------------------- actions


async def test_a_response_is_returned_as_it_came(sqlite_store: SqlStore) -> None:
    body = b' {"choices" :[{"message":{"content":"caf\\u00e9","x":1.0}}],"x":[1]} \n'
    answer = Says(
        body,
        headers=[("Content-Type", "application/json"), ("x-request-id", "req_up"), ("Date", "x")],
    )
    rig = Rig(sqlite_store, answer)
    call = a_call({"user": "u"}, {"x-request-id": "mine"})
    reply = await rig.reply(call, RETURNS)
    assert (reply.status, reply.body) == (200, body)
    assert reply.headers[:2] == [
        ("Content-Type", "application/json"),
        ("x-holdgate-upstream-request-id", "req_up"),
    ]
    told = dict(reply.headers[2:])
    assert told.pop("x-holdgate-overhead-ms") == "0.00"
    assert told == {
        "x-request-id": "mine",
        "x-holdgate-decision": call.id,
        "x-holdgate-action": "return",
        "x-holdgate-risk": "low",
        "x-holdgate-policy": RETURNS.label,
    }
    record = await rig.record(call)
    assert (record.action, record.status, record.response) == (Action.RETURN, 200, body)
    assert record.request == call.body
    assert rig.models.calls[0].body == call.body
    assert rig.at_rest


async def test_a_flagged_response_is_returned_and_reviewed(sqlite_store: SqlStore) -> None:
    rig = Rig(sqlite_store, says("a secret"))
    call = a_call()
    reply = await rig.reply(call, FLAGS)
    assert reply.body == chat("a secret")
    assert header(reply.headers, "x-holdgate-action") == "flag"
    task = await rig.task(call)
    assert task is not None
    assert (task.kind, [event.id for event in rig.told]) == (TaskKind.FLAG, [task.id])


async def test_a_held_response_is_kept_back_and_reviewed(sqlite_store: SqlStore) -> None:
    rig = Rig(sqlite_store, says("a secret"))
    call = a_call({}, {"prefer": "wait=7"})
    held = await rig.held(call, HOLDS)
    task = await rig.task(call)
    assert task is not None
    assert (held.decision_id, held.task_id, held.wait_s) == (call.id, task.id, 7)
    assert (held.due_at, task.kind, task.inclusion) == (task.due_at, TaskKind.HOLD, 1.0)
    assert ("x-holdgate-action", "hold") in held.headers
    assert (await rig.record(call)).response == chat("a secret")


async def test_a_blocked_response_is_kept_back_and_the_reason_told(sqlite_store: SqlStore) -> None:
    rig = Rig(sqlite_store, says("a secret"))
    call = a_call()
    with pytest.raises(ResponseBlocked) as caught:
        await rig.answer(call, BLOCKS)
    error = caught.value
    assert (error.status, error.code) == (403, "response_blocked")
    assert error.extra["decision"] == call.id
    assert error.extra["reasons"] == [
        "check:no_secret: failed (block): matches the forbidden pattern pattern_1 (6 characters)"
    ]
    assert error.headers["x-holdgate-action"] == "block"
    assert error.headers["x-should-retry"] == "false"
    assert b"a secret" not in error.body()
    assert (await rig.record(call)).action is Action.BLOCK
    assert await rig.task(call) is None
    assert rig.at_rest


@pytest.mark.parametrize("request_", [{}, STREAMED], ids=["whole", "stream"])
async def test_a_redacted_response_is_returned_and_recorded_masked(
    sqlite_store: SqlStore, request_: dict[str, Any]
) -> None:
    rig = Rig(sqlite_store, says("one secret", "two secrets"))
    call = a_call(request_)
    body = await read(await rig.reply(call, REDACTS))
    assert b"secret" not in body
    assert b"one ***" in body
    assert b"two ***s" in body
    assert b"secret" not in ((await rig.record(call)).response or b"")


async def test_every_choice_is_looked_at(sqlite_store: SqlStore) -> None:
    rig = Rig(sqlite_store, says("fine", "fine", "a secret"))
    with pytest.raises(ResponseBlocked):
        await rig.answer(a_call({"n": 3}), BLOCKS)


async def test_nothing_is_enforced_in_observe_mode(sqlite_store: SqlStore) -> None:
    rig = Rig(sqlite_store, says("a secret"))
    call = a_call()
    reply = await rig.reply(call, OBSERVES)
    assert reply.body == chat("a secret")
    record = await rig.record(call)
    decision = record.detail["decision"]
    assert isinstance(decision, dict)
    assert (record.action, decision["intended"]) == (Action.RETURN, Action.BLOCK)


async def test_the_sample_for_audit_can_be_drawn_again(sqlite_store: SqlStore) -> None:
    policy = a_policy(audit={"rate": 0.5})
    rig = Rig(sqlite_store, says("fine"))
    calls = [a_call() for _ in range(40)]
    for call in calls:
        await rig.reply(call, policy)
    sampled = [await rig.task(call) is not None for call in calls]
    assert {True, False} == set(sampled)
    again = Rig(sqlite_store, says("fine"))
    draws = [again.assessor._draw(call.id) < 0.5 for call in calls]
    assert draws == sampled


# --------------------------------------------------------------------------------------- the provider's faults


@pytest.mark.parametrize("policy", [BLOCKS, OBSERVES], ids=["enforce", "observe"])
@pytest.mark.parametrize("request_", [{}, STREAMED], ids=["whole", "stream"])
async def test_the_providers_error_is_relayed_and_not_checked(
    sqlite_store: SqlStore, policy: Policy, request_: dict[str, Any]
) -> None:
    headers = [("content-type", "application/json"), ("retry-after-ms", "40")]
    rig = Rig(sqlite_store, Says(b'{"error": {"message": "a secret"} }', 429, headers))
    call = a_call(request_)
    reply = await rig.reply(call, policy)
    assert (reply.status, reply.body) == (429, b'{"error": {"message": "a secret"} }')
    assert reply.headers[:2] == headers
    record = await rig.record(call)
    assert (record.action, record.status) == (Action.RETURN, 429)
    assert record.detail["evidence"] is not None
    assert await rig.task(call) is None


@pytest.mark.parametrize("error", [UpstreamError("No route."), UpstreamTimeout("Too slow.")])
async def test_a_provider_that_cannot_be_asked_leaves_a_record(
    sqlite_store: SqlStore, error: UpstreamError
) -> None:
    rig = Rig(sqlite_store, error)
    call = a_call()
    with pytest.raises(type(error)):
        await rig.answer(call, RETURNS)
    record = await rig.record(call)
    assert (record.action, record.status, record.response) == (Action.BLOCK, 0, None)
    assert rig.at_rest


UNUSABLE = {
    "html": (Says(b"<html>a secret</html>", headers=[("content-type", "text/html")]), "unreadable"),
    "not a body": (Says(b'{"choices": 1}'), "unreadable"),
    "cut short": (Says(chat("a secret")[:-9]), "unreadable"),
    "broken off": (Says(b'{"choices"', fault=UpstreamError("Gone.")), "truncated"),
    "no chunk": (Says(b"data: {}x\n\n", headers=STREAM), "unreadable"),
    "no end": (streams("a ", "secret", finish=None, done=False), "truncated"),
    "an error": (Says(b'data: {"error": {"message": "a secret"}}\n\n', headers=STREAM), "error"),
    "off the wire": (streams("a ", "secret", fault=UpstreamError("Gone.")), "truncated"),
}


@pytest.mark.parametrize(("answer", "fault"), UNUSABLE.values(), ids=UNUSABLE)
@pytest.mark.parametrize("request_", [{}, STREAMED], ids=["whole", "stream"])
async def test_an_answer_that_cannot_be_checked_is_refused(
    sqlite_store: SqlStore, answer: Says, fault: str, request_: dict[str, Any]
) -> None:
    rig = Rig(sqlite_store, answer)
    call = a_call(request_)
    with pytest.raises(UpstreamError) as caught:
        await rig.answer(call, a_policy(forbid("secret", "hold"), stream="buffer"))
    assert caught.value.code == f"upstream_{fault}"
    record = await rig.record(call)
    assert (record.action, record.detail["fault"]) == (Action.BLOCK, fault)
    assert rig.models.closed == 1
    assert rig.at_rest


@pytest.mark.parametrize(
    "answer",
    [each for name, (each, _) in UNUSABLE.items() if name not in ("broken off", "off the wire")],
    ids=[name for name in UNUSABLE if name not in ("broken off", "off the wire")],
)
@pytest.mark.parametrize("request_", [{}, STREAMED], ids=["whole", "stream"])
@pytest.mark.parametrize("stream", ["buffer", "observe"])
async def test_in_observe_mode_an_answer_that_cannot_be_checked_is_relayed_as_it_came(
    sqlite_store: SqlStore, answer: Says, request_: dict[str, Any], stream: str
) -> None:
    rig = Rig(sqlite_store, answer)
    call = a_call(request_)
    reply = await rig.reply(call, a_policy(mode="observe", stream=stream))
    body = await read(reply)
    assert body.removesuffix(sse.DONE) == b"".join(answer.parts)
    assert header(reply.headers, "content-type") == dict(answer.headers)["content-type"]
    assert (await rig.record(call)).action is Action.RETURN
    assert rig.at_rest


async def test_an_answer_that_is_too_long_is_refused(sqlite_store: SqlStore) -> None:
    rig = Rig(sqlite_store, Says([b"x" * 600_000] * 2))
    call = a_call()
    with pytest.raises(UpstreamError) as caught:
        await rig.answer(call, OBSERVES)
    assert caught.value.code == "upstream_response_too_large"
    assert (await rig.record(call)).status == 0
    assert rig.models.closed == 1


# ------------------------------------------------------------------------------------------------- regenerate

AGAIN = a_policy(forbid("secret", "regenerate"), regenerate={"attempts": 2}, hold={"wait": "0s"})


@pytest.mark.parametrize("request_", [{}, STREAMED], ids=["whole", "stream"])
async def test_a_failing_answer_is_asked_for_again_with_what_was_wrong(
    sqlite_store: SqlStore, request_: dict[str, Any]
) -> None:
    rig = Rig(sqlite_store, says("a secret"), says("fine"))
    call = a_call(request_)
    reply = await rig.reply(call, AGAIN)
    assert b"fine" in await read(reply)
    first, second = (question["messages"] for question in rig.questions)
    assert first == [{"role": "user", "content": "Hi"}]
    assert second[:2] == [*first, {"role": "assistant", "content": "a secret"}]
    assert second[2]["role"] == "user"
    assert "matches the forbidden pattern pattern_1" in second[2]["content"]
    assert (await rig.record(call)).action is Action.RETURN


async def test_an_answer_that_fails_again_and_again_is_held(sqlite_store: SqlStore) -> None:
    rig = Rig(sqlite_store, *(says(f"secret {number}") for number in range(4)))
    call = a_call()
    await rig.held(call, AGAIN)
    assert len(rig.questions) == 3
    assert [turn["role"] for turn in rig.questions[2]["messages"]] == [
        "user", "assistant", "user", "assistant", "user",
    ]  # fmt: skip
    assert (await rig.record(call)).response == chat("secret 2")


async def test_an_answer_of_responses_is_asked_for_again(sqlite_store: SqlStore) -> None:
    def said(text: str) -> Says:
        item = {"type": "message", "content": [{"type": "output_text", "text": text}]}
        return Says(orjson.dumps({"id": "r", "status": "completed", "output": [item]}))

    rig = Rig(sqlite_store, said("a secret"), said("fine"))
    call = a_call({"input": "Hi"}, endpoint=wire.RESPONSES)
    await rig.reply(call, AGAIN)
    turns = rig.questions[1]["input"]
    assert [(turn["role"], turn["content"][:9]) for turn in turns] == [
        ("user", "Hi"), ("assistant", "a secret"), ("user", "That answ"),
    ]  # fmt: skip


async def test_a_completion_is_never_asked_for_again(sqlite_store: SqlStore) -> None:
    """There is nowhere to put what was wrong with it."""
    rig = Rig(
        sqlite_store,
        Says(orjson.dumps({"choices": [{"text": "a secret", "finish_reason": "stop"}]})),
    )
    await rig.held(a_call({"prompt": "Hi"}, endpoint=wire.COMPLETIONS), AGAIN)
    assert len(rig.questions) == 1


async def test_a_fault_of_the_second_attempt_is_told_as_such(sqlite_store: SqlStore) -> None:
    rig = Rig(sqlite_store, says("a secret"), UpstreamError("Gone."))
    with pytest.raises(UpstreamError):
        await rig.answer(a_call(), AGAIN)
    assert rig.at_rest


# --------------------------------------------------------------------------------------------------- logprobs

SCORED = a_policy(confidence={"source": "logprob", "when_uncalibrated": "return"})
LOGPROBS = {"content": [{"token": "fine", "logprob": -0.1, "bytes": None, "top_logprobs": []}]}


def scored(logprobs: Any = LOGPROBS) -> bytes:
    choice = {
        "index": 0,
        "message": {"content": "fine"},
        "logprobs": logprobs,
        "finish_reason": "stop",
    }
    return orjson.dumps({"choices": [choice]})


async def test_logprobs_nobody_asked_for_are_used_and_taken_out(sqlite_store: SqlStore) -> None:
    rig = Rig(sqlite_store, Says(scored()), top=3)
    call = a_call()
    reply = await rig.reply(call, SCORED)
    assert reply.body == scored(None)
    asked = rig.questions[0]
    assert (asked["logprobs"], asked["top_logprobs"]) == (True, 3)
    evidence = (await rig.record(call)).detail["evidence"]
    assert isinstance(evidence, dict)
    assert evidence["signals"]


async def test_logprobs_the_client_asked_for_reach_it(sqlite_store: SqlStore) -> None:
    rig = Rig(sqlite_store, Says(scored()), top=3)
    call = a_call({"logprobs": True})
    reply = await rig.reply(call, SCORED)
    assert reply.body == scored()
    assert rig.models.calls[0].body == call.body


async def test_a_model_that_gives_no_logprobs_is_not_asked_for_them(sqlite_store: SqlStore) -> None:
    rig = Rig(sqlite_store, says("fine"))
    call = a_call()
    await rig.reply(call, SCORED)
    assert rig.models.calls[0].body == call.body


@pytest.mark.parametrize("request_", [{}, STREAMED], ids=["whole", "stream"])
async def test_a_model_that_refuses_logprobs_is_asked_again_without(
    sqlite_store: SqlStore, request_: dict[str, Any]
) -> None:
    refusal = Says(b'{"error": {"message": "logprobs are not supported"}}', 400)
    rig = Rig(sqlite_store, refusal, says("fine"), top=3)
    call = a_call(request_)
    reply = await rig.reply(call, SCORED)
    assert b"fine" in await read(reply)
    assert [question.get("logprobs") for question in rig.questions] == [True, None]
    attempts = (await rig.record(call)).detail["attempts"]
    assert isinstance(attempts, list)
    assert [each["status"] for each in attempts if isinstance(each, dict)] == [400, 200]


async def test_a_refusal_of_logprobs_the_client_asked_for_is_the_clients(
    sqlite_store: SqlStore,
) -> None:
    rig = Rig(sqlite_store, Says(b'{"error": {"message": "logprobs!"}}', 400), top=3)
    reply = await rig.reply(a_call({"logprobs": True}), SCORED)
    assert reply.status == 400
    assert len(rig.questions) == 1


# ----------------------------------------------------------------------------------------------------- streams


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


async def test_a_response_that_failed_is_the_clients_to_hear_of(sqlite_store: SqlStore) -> None:
    body = orjson.dumps(
        {"id": "resp_1", "status": "failed", "output": [], "error": {"message": "x"}}
    )
    rig = Rig(sqlite_store, Says(body))
    call = a_call({"input": "Hi"}, endpoint=wire.RESPONSES)
    assert (await rig.reply(call, HOLDS)).body == body
    assert (await rig.record(call)).action is Action.RETURN


# ------------------------------------------------------------------------------------------- repeated calls


async def test_a_call_repeated_with_its_key_gets_the_same_response(sqlite_store: SqlStore) -> None:
    rig = Rig(sqlite_store, says("one"), says("two"))
    first, second = a_call({}, KEY), a_call({}, KEY)
    bodies = [(await rig.reply(call, RETURNS)).body for call in (first, second)]
    assert bodies == [chat("one")] * 2
    assert len(rig.questions) == 1
    assert await rig.store.decision(second.id) is None


async def test_a_key_belongs_to_one_body(sqlite_store: SqlStore) -> None:
    rig = Rig(sqlite_store, says("one"))
    await rig.reply(a_call({}, KEY), RETURNS)
    with pytest.raises(InvalidRequest) as caught:
        await rig.answer(a_call({"temperature": 1}, KEY), RETURNS)
    assert caught.value.code == "idempotency_key_reused"
    assert rig.at_rest


async def test_a_key_belongs_to_one_caller(sqlite_store: SqlStore) -> None:
    rig = Rig(sqlite_store, says("one"), says("two"))
    key, _ = new_key("key-1", "app", Role.CLIENT, rig.clock.now())
    mine = a_call({}, KEY)
    other = a_call({}, KEY, caller=Caller("app", Role.CLIENT, key))
    assert (await rig.reply(mine, RETURNS)).body == chat("one")
    assert (await rig.reply(other, RETURNS)).body == chat("two")


async def test_a_key_is_forgotten_after_a_day(sqlite_store: SqlStore) -> None:
    rig = Rig(sqlite_store, says("one"), says("two"))
    await rig.reply(a_call({}, KEY), RETURNS)
    rig.clock.advance(86_401)
    assert (await rig.reply(a_call({}, KEY), RETURNS)).body == chat("two")


async def test_a_repeated_call_that_was_blocked_is_blocked(sqlite_store: SqlStore) -> None:
    rig = Rig(sqlite_store, says("a secret"))
    first = a_call({}, KEY)
    for call in (first, a_call({}, KEY)):
        with pytest.raises(ResponseBlocked) as caught:
            await rig.answer(call, BLOCKS)
        assert caught.value.extra["decision"] == first.id
    assert len(rig.questions) == 1


@pytest.mark.parametrize("headers", [KEY, RETRY], ids=["key", "retry"])
async def test_a_repeated_call_attaches_to_the_hold(
    sqlite_store: SqlStore, headers: Mapping[str, str]
) -> None:
    rig = Rig(sqlite_store, says("a secret"))
    first = await rig.held(a_call({}, KEY if headers is KEY else {}), HOLDS)
    second = await rig.held(a_call({}, headers), HOLDS)
    assert (second.task_id, second.decision_id) == (first.task_id, first.decision_id)
    assert len(rig.questions) == 1


@pytest.mark.parametrize(("headers", "asked"), [(KEY, 1), (RETRY, 2)], ids=["key", "retry"])
async def test_a_settled_hold_is_attached_to_with_a_key_only(
    sqlite_store: SqlStore, headers: Mapping[str, str], asked: int
) -> None:
    rig = Rig(sqlite_store, says("a secret"))
    first = await rig.held(a_call({}, KEY if headers is KEY else {}), HOLDS)
    await rig.store.resolve(Resolution(first.task_id, 1, Verdict.APPROVE, "ann", rig.clock.now()))
    rig.clock.advance(60)
    second = await rig.held(a_call({}, headers, now=rig.clock), HOLDS)
    assert len(rig.questions) == asked
    assert (second.task_id == first.task_id) is (asked == 1)


async def test_without_a_key_and_no_retry_every_call_is_its_own(sqlite_store: SqlStore) -> None:
    rig = Rig(sqlite_store, says("a secret"))
    first, second = await rig.held(a_call(), HOLDS), await rig.held(a_call(), HOLDS)
    assert first.task_id != second.task_id
    assert len(rig.questions) == 2


FAILURES: dict[str, tuple[Says | GatewayError, dict[str, Any], Policy]] = {
    "not asked": (UpstreamError("Gone."), {}, RETURNS),
    "busy": (Says(b"{}", 503), {}, RETURNS),
    "unreadable": (Says(b"{"), {}, RETURNS),
    "unreadable, observed": (Says(b"{"), {}, OBSERVES),
    "unreadable, observed, to a stream": (Says(b"{"), STREAMED, OBSERVES),
    "half a stream": (streams("half ", finish=None, done=False), STREAMED, BUFFERS),
    "half a live stream": (streams("half ", finish=None, done=False), STREAMED, RETURNS),
    "half a watched stream": (streams("half ", finish=None, done=False), STREAMED, OBSERVES),
}


@pytest.mark.parametrize(("answer", "request_", "policy"), FAILURES.values(), ids=FAILURES)
async def test_a_call_whose_answer_was_none_is_asked_anew(
    sqlite_store: SqlStore, answer: Says | GatewayError, request_: dict[str, Any], policy: Policy
) -> None:
    rig = Rig(sqlite_store, answer, says("whole"))
    try:
        await read(await rig.reply(a_call(request_, KEY), policy))
    except UpstreamError:
        assert policy is not OBSERVES
    second = await read(await rig.reply(a_call(request_, KEY), policy))
    assert b"whole" in second
    assert b"half" not in second


async def test_a_stream_its_client_left_is_not_taken_for_the_whole(sqlite_store: SqlStore) -> None:
    rig = Rig(sqlite_store, streams("half ", *["and more "] * 50), streams("whole"))
    parts: Any = parts_of(await rig.reply(a_call(STREAMED, KEY), RETURNS))
    await anext(parts)
    await parts.aclose()
    await rig.live.drain()
    assert text_of(await read(await rig.reply(a_call(STREAMED, KEY), RETURNS))) == "whole"


async def test_a_repeated_stream_is_a_stream(sqlite_store: SqlStore) -> None:
    rig = Rig(sqlite_store, streams("It is ", "fine."))
    for policy in (BUFFERS, BUFFERS):
        body = await read(await rig.reply(a_call(STREAMED, KEY), policy))
        assert text_of(body) == "It is fine."
        assert body.endswith(sse.DONE)
    assert len(rig.questions) == 1


async def test_of_content_that_is_not_kept_there_is_nothing_to_repeat(
    sqlite_store: SqlStore,
) -> None:
    rig = Rig(sqlite_store, says("one"), says("two"))
    policy = a_policy(content="digest")
    bodies = [(await rig.reply(a_call({}, KEY), policy)).body for _ in range(2)]
    assert bodies == [chat("one"), chat("two")]


# ---------------------------------------------------------------------------------------------- at the same time


def together(rig: Rig, calls: list[Call], policy: Policy) -> list[asyncio.Task[Reply | Held]]:
    return [asyncio.create_task(rig.answer(call, policy)) for call in calls]


@pytest.mark.parametrize("policy", [RETURNS, HOLDS], ids=["returned", "held"])
async def test_of_identical_calls_at_the_same_time_one_is_asked(
    sqlite_store: SqlStore, policy: Policy
) -> None:
    gate = asyncio.Event()
    rig = Rig(sqlite_store, says("a secret", gate=gate))
    tasks = together(rig, [a_call({}, KEY) for _ in range(8)], policy)
    await rig.models.asked.wait()
    gate.set()
    answers = await asyncio.gather(*tasks)
    assert len(rig.questions) == 1
    told = {header(answer.headers, "x-holdgate-decision") for answer in answers}
    assert len(told) == 1
    assert rig.at_rest


async def test_of_identical_calls_that_are_blocked_one_is_asked(sqlite_store: SqlStore) -> None:
    gate = asyncio.Event()
    rig = Rig(sqlite_store, says("a secret", gate=gate))
    tasks = together(rig, [a_call({}, KEY) for _ in range(5)], BLOCKS)
    await rig.models.asked.wait()
    gate.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(answer) for answer in answers} == {ResponseBlocked}
    assert len(rig.questions) == 1
    assert rig.at_rest


async def test_a_retry_waits_for_the_call_it_repeats(sqlite_store: SqlStore) -> None:
    gate = asyncio.Event()
    rig = Rig(sqlite_store, says("one", gate=gate), says("two"))
    tasks = together(rig, [a_call(), a_call({}, RETRY), a_call({}, RETRY)], RETURNS)
    await rig.models.asked.wait()
    gate.set()
    answers = await asyncio.gather(*tasks)
    assert [answer.body for answer in answers if isinstance(answer, Reply)] == [chat("one")] * 3
    assert rig.at_rest


async def test_calls_that_only_look_alike_do_not_wait_for_each_other(
    sqlite_store: SqlStore,
) -> None:
    gate = asyncio.Event()
    rig = Rig(sqlite_store, says("one", gate=gate), says("two"))
    slow = asyncio.create_task(rig.reply(a_call(), RETURNS))
    await rig.models.asked.wait()
    assert (await rig.reply(a_call(), RETURNS)).body == chat("two")
    gate.set()
    assert (await slow).body == chat("one")
    assert rig.at_rest


async def test_when_the_first_of_identical_calls_is_cancelled_the_next_is_asked(
    sqlite_store: SqlStore,
) -> None:
    gate = asyncio.Event()
    rig = Rig(sqlite_store, says("one", gate=gate), says("two"))
    first, second, third = together(rig, [a_call({}, KEY) for _ in range(3)], RETURNS)
    await rig.models.asked.wait()
    first.cancel()
    answers = await asyncio.gather(second, third)
    assert [answer.body for answer in answers if isinstance(answer, Reply)] == [chat("two")] * 2
    assert first.cancelled()
    assert rig.at_rest


async def test_a_call_cancelled_while_it_waits_leaves_the_other_alone(
    sqlite_store: SqlStore,
) -> None:
    gate = asyncio.Event()
    rig = Rig(sqlite_store, says("one", gate=gate))
    first, second = together(rig, [a_call({}, KEY) for _ in range(2)], RETURNS)
    await rig.models.asked.wait()
    second.cancel()
    await asyncio.wait([second])
    gate.set()
    answer = await first
    assert isinstance(answer, Reply)
    assert answer.body == chat("one")
    assert rig.at_rest


async def test_a_call_cancelled_while_it_is_asked_leaves_nothing_behind(
    sqlite_store: SqlStore,
) -> None:
    rig = Rig(sqlite_store, says("one", gate=asyncio.Event()))
    call = a_call()
    [task] = together(rig, [call], RETURNS)
    await rig.models.asked.wait()
    task.cancel()
    await asyncio.wait([task])
    assert rig.at_rest
    assert await rig.store.decision(call.id) is None


# --------------------------------------------------------------------------------------------- a broken store


@pytest.mark.parametrize(
    ("answer", "request_", "policy"),
    [
        (says("a secret"), {}, RETURNS),
        (says("a secret"), {}, HOLDS),
        (says("a secret"), {}, BLOCKS),
        (says("a secret"), {}, OBSERVES),
        (streams("a secret"), STREAMED, BUFFERS),
        (Says(b"{}", 500), {}, RETURNS),
        (Says(b"{"), {}, OBSERVES),
        (UpstreamError("Gone."), {}, RETURNS),
    ],
    ids=["return", "hold", "block", "observe", "stream", "error", "unreadable", "unreachable"],
)
async def test_what_cannot_be_recorded_is_not_answered(
    sqlite_store: SqlStore, database: Path, answer: Any, request_: dict[str, Any], policy: Policy
) -> None:
    rig = Rig(sqlite_store, answer)
    call = a_call(request_)
    with broken(database), pytest.raises(StoreError) as caught:
        await rig.answer(call, policy)
    assert (caught.value.status, caught.value.headers["retry-after"]) == (503, "2")
    assert rig.told == []
    assert await rig.store.decision(call.id) is None
    assert rig.at_rest


@pytest.mark.parametrize("policy", [RETURNS, WINDOW, OBSERVES], ids=["live", "window", "observe"])
async def test_a_live_stream_that_cannot_be_recorded_has_no_good_end(
    sqlite_store: SqlStore, database: Path, policy: Policy
) -> None:
    rig = Rig(sqlite_store, streams("It is fine. "))
    with broken(database):
        body = await read(await rig.reply(a_call(STREAMED), policy))
    *_, error, done = events_of(body)
    assert (error["error"]["code"], done) == ("store_unavailable", "[DONE]")
    assert rig.at_rest


async def test_identical_calls_that_cannot_be_recorded_are_each_told_so(
    sqlite_store: SqlStore, database: Path
) -> None:
    rig = Rig(sqlite_store, says("one"))
    with broken(database):
        tasks = together(rig, [a_call({}, KEY) for _ in range(2)], RETURNS)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(answer, StoreError) for answer in answers)
    assert (await rig.reply(a_call({}, KEY), RETURNS)).body == chat("one")
    assert rig.at_rest
