"""One request from top to bottom, in this process: what its client gets, and what is durable by then."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway import sse, wire
from gateway.errors import (
    ResponseBlocked,
    StoreError,
    UpstreamError,
    UpstreamTimeout,
)
from gateway.records import TaskKind
from gateway.store import SqlStore
from policies import Action, Policy
from tests.fakes import Says
from tests.gateway.rig import (
    BLOCKS,
    BUFFERS,
    FLAGS,
    HOLDS,
    KEY,
    LOGPROBS,
    OBSERVES,
    REDACTS,
    RETURNS,
    STREAM,
    STREAMED,
    WINDOW,
    Rig,
    a_call,
    a_policy,
    broken,
    chat,
    events_of,
    forbid,
    header,
    read,
    says,
    streams,
    together,
)

# ------------------------------------------------------------------------------------------------------------ actions


async def test_a_response_is_returned_as_it_came(sqlite_store: SqlStore) -> None:
    body = b' {"choices" :[{"message":{"content":"caf\\u00e9","x":1.0}}],"x":[1]} \n'
    answer = Says(
        body,
        headers=[("content-type", "application/json"), ("x-request-id", "req_up"), ("date", "x")],
    )
    rig = Rig(sqlite_store, answer)
    call = a_call({"user": "u"}, {"x-request-id": "mine"})
    reply = await rig.reply(call, RETURNS)
    assert (reply.status, reply.body) == (200, body)
    assert reply.headers[:2] == [
        ("content-type", "application/json"),
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
    draws = [again.audits.draw(call.id) < 0.5 for call in calls]
    assert draws == sampled


# ---------------------------------------------------------------------------------------------- the provider's faults


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


# --------------------------------------------------------------------------------------------------------- regenerate

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


# ----------------------------------------------------------------------------------------------------------- logprobs

SCORED = a_policy(confidence={"source": "logprob", "when_uncalibrated": "return"})


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


# ----------------------------------------------------------------------------------------------------- a broken store


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
