"""Calls that come again, later or at the same time: what is asked of the provider once only."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from gateway import sse
from gateway.auth import Caller, new_key
from gateway.calls import Reply
from gateway.errors import (
    GatewayError,
    InvalidRequest,
    ResponseBlocked,
    UpstreamError,
)
from gateway.records import Resolution, Role, Verdict
from gateway.store import SqlStore
from policies import Policy
from tests.fakes import Says
from tests.gateway.rig import (
    BLOCKS,
    BUFFERS,
    HOLDS,
    KEY,
    OBSERVES,
    RETRY,
    RETURNS,
    STREAMED,
    Rig,
    a_call,
    a_policy,
    chat,
    header,
    parts_of,
    read,
    says,
    streams,
    text_of,
    together,
)

# ----------------------------------------------------------------------------------------------------- repeated calls


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


# --------------------------------------------------------------------------------------------------- at the same time


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
