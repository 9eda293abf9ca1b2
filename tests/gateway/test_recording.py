"""What is kept of a call, for how long, and what is masked in it."""

from __future__ import annotations

import asyncio
import json
import string
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from gateway import wire
from gateway.asking import Answer, Question
from gateway.errors import StoreError
from gateway.judging import Judgement
from gateway.ports import Attempt
from gateway.recording import Outcome, masked, new_id
from gateway.records import DecisionRecord, NewTask, TaskKind, TaskState
from gateway.store import SqlStore
from policies import Action, Decision, Evidence, Match, Policy, Reason, RiskTier, Zone
from tests.gateway.rig import Rig, a_call, a_policy, broken, chat, says
from tests.validators.exchanges import said as exchange
from tests.validators.exchanges import scan_of

CARD = "4242 4242 4242 4242"
MASK = "[redacted:card]"


def a_decision(action: Action = Action.RETURN, **changes: Any) -> Decision:
    decision = Decision(
        action=action,
        intended=action,
        zone=Zone.AUTO,
        risk=RiskTier.MEDIUM,
        band=None,
        score=None,
        confidence=None,
        confidence_source="none",
        calibrator=None,
        audit=False,
        inclusion=0.25,
        regenerate=False,
        redactions=(),
        reasons=(Reason("matrix", "because", action),),
    )
    return replace(decision, **changes)


def an_answer(body: bytes = chat(f"Card {CARD}"), **changes: Any) -> Answer:
    answer = Answer(200, [("content-type", "application/json")], Question(b"{}", injected=False))
    answer.body, answer.reading = body, wire.read_response(wire.CHAT, body)
    for name, value in changes.items():
        setattr(answer, name, value)
    return answer


ANSWER = an_answer()


async def record(
    rig: Rig,
    decision: Decision,
    policy: Policy,
    *,
    answer: Answer | None = ANSWER,
    headers: Mapping[str, str] = {},
) -> tuple[DecisionRecord, NewTask | None]:
    call = a_call({"user": f"my card: {CARD}"}, headers, now=rig.clock)
    match = Match(policy, "it was chosen")
    body = answer.body if answer else None
    return await rig.recorder.record(
        Outcome(call, match, Judgement(decision, Evidence()), answer, body)
    )


@pytest.fixture
def rig(sqlite_store: SqlStore) -> Rig:
    return Rig(sqlite_store, says("x"))


async def kept(rig: Rig, record: DecisionRecord) -> tuple[bytes | None, bytes | None]:
    stored = await rig.store.decision(record.id)
    assert stored is not None
    return stored.request, stored.response


# -------------------------------------------------------------------------------------------- content and erasure


@pytest.mark.parametrize("content", ["full", "redacted", "digest"])
async def test_what_is_kept_where_nobody_reviews(rig: Rig, content: str) -> None:
    made, _ = await record(rig, a_decision(), a_policy(content=content))
    request, response = await kept(rig, made)
    match content:
        case "full":
            assert response == chat(f"Card {CARD}")
            assert request is not None
            assert CARD.encode() in request
        case "redacted":
            assert response == chat(f"Card {MASK}")
            assert request is not None
            assert orjson.loads(request)["user"] == f"my card: {MASK}"
        case _:
            assert (request, response) == (None, None)
    assert len(made.request_digest) == len(made.response_digest) == 64


@pytest.mark.parametrize("content", ["full", "redacted", "digest"])
@pytest.mark.parametrize(
    ("action", "kept_for"),
    [(Action.HOLD, timedelta(hours=24, minutes=30)), (Action.FLAG, timedelta(hours=24))],
)
async def test_content_is_kept_while_a_review_needs_it_and_no_longer(
    rig: Rig, content: str, action: Action, kept_for: timedelta
) -> None:
    made, task = await record(rig, a_decision(action, inclusion=1.0), a_policy(content=content))
    assert task is not None
    whole = await kept(rig, made)
    assert whole[1] == chat(f"Card {CARD}")
    rig.clock.advance(kept_for.total_seconds() - 1)
    await rig.store.erase_due(rig.clock.now(), 100)
    assert await kept(rig, made) == whole
    rig.clock.advance(1)
    await rig.store.erase_due(rig.clock.now(), 100)
    request, response = await kept(rig, made)
    match content:
        case "full":
            assert (request, response) == whole
        case "redacted":
            assert response == chat(f"Card {MASK}")
            assert CARD.encode() not in (request or b"")
        case _:
            assert (request, response) == (None, None)


async def test_logprobs_are_not_kept_unless_somebody_may_ask_for_the_response(rig: Rig) -> None:
    logprobs = {"content": [{"token": "x", "logprob": -0.5}]}
    choice = {"message": {"content": "x"}, "finish_reason": "stop", "logprobs": logprobs}
    answer = an_answer(orjson.dumps({"choices": [choice]}))
    for decision, headers, whole in (
        (a_decision(), {}, False),
        (a_decision(Action.HOLD), {}, True),
        (a_decision(), {"idempotency-key": "k"}, True),
    ):
        made, _ = await record(rig, decision, a_policy(), answer=answer, headers=headers)
        assert made.response is not None
        assert (orjson.loads(made.response)["choices"][0]["logprobs"] == logprobs) is whole


async def test_a_call_without_an_answer_leaves_a_record(rig: Rig) -> None:
    made, task = await record(rig, a_decision(Action.BLOCK), a_policy(), answer=None)
    assert (made.status, made.response, made.response_digest, task) == (0, None, "", None)
    assert made.model == "m-1"


async def test_the_record_says_what_the_provider_was_asked_and_how_it_went(rig: Rig) -> None:
    tried = [Attempt("m-1", 429, None, 1.5), Attempt("m-2", None, "upstream_error", 2.5)]
    answer = an_answer(attempts=tried, upstream_ms=4.0, fault="truncated")
    made, _ = await record(rig, a_decision(), a_policy(), answer=answer)
    stored = await rig.store.decision(made.id)
    assert stored is not None
    assert stored.detail["attempts"] == [
        {"model": "m-1", "status": 429, "error": None, "ms": 1.5},
        {"model": "m-2", "status": None, "error": "upstream_error", "ms": 2.5},
    ]
    assert (stored.detail["fault"], stored.detail["upstream_ms"]) == ("truncated", 4.0)
    assert stored.detail["match"] == "it was chosen"
    assert (stored.model, stored.upstream_id) == ("m-1-2030", "chatcmpl-1")


# ------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize(
    ("decision", "kind", "inclusion"),
    [
        (a_decision(Action.RETURN), None, None),
        (a_decision(Action.RETURN, audit=True), TaskKind.AUDIT, 0.25),
        (a_decision(Action.FLAG, inclusion=1.0), TaskKind.FLAG, 1.0),
        (a_decision(Action.HOLD), TaskKind.HOLD, 1.0),
        (a_decision(Action.BLOCK), None, None),
    ],
    ids=["returned", "sampled", "flagged", "held", "blocked"],
)
async def test_who_has_to_look(
    rig: Rig, decision: Decision, kind: TaskKind | None, inclusion: float | None
) -> None:
    made, _ = await record(rig, decision, a_policy())
    task = await rig.store.task_of(made.id)
    assert (task and task.kind, task and task.inclusion) == (kind, inclusion)
    assert [event.id for event in rig.told] == ([task.id] if task else [])
    if task is not None:
        assert task.state is TaskState.OPEN
        deadline = made.created_at + timedelta(minutes=30)
        assert task.due_at == (deadline if kind is TaskKind.HOLD else None)


@pytest.mark.parametrize("changes", [{"fault": "truncated"}, {"status": 500}])
async def test_nobody_has_to_look_at_an_answer_that_is_none(
    rig: Rig, changes: dict[str, Any]
) -> None:
    answer = an_answer(**changes)
    _, task = await record(rig, a_decision(Action.HOLD), a_policy(), answer=answer)
    assert task is None


@pytest.mark.parametrize(
    ("risk", "on_deadline", "kept"),
    [
        (RiskTier.LOW, "release", "release"),
        (RiskTier.HIGH, "release", "release"),
        (RiskTier.CRITICAL, "release", "reject"),
        (RiskTier.LOW, "reject", "reject"),
        (RiskTier.CRITICAL, "reject", "reject"),
    ],
)
async def test_a_critical_response_is_never_released_at_its_deadline(
    rig: Rig, risk: RiskTier, on_deadline: str, kept: str
) -> None:
    policy = a_policy(hold={"deadline": "10m", "on_deadline": on_deadline})
    made, task = await record(rig, a_decision(Action.HOLD, risk=risk), policy)
    assert task is not None
    assert task.on_deadline == kept
    assert task.due_at == made.created_at + timedelta(minutes=10)


async def test_what_could_not_be_stored_is_neither_counted_nor_told(
    rig: Rig, tmp_path: Path
) -> None:
    with broken(tmp_path / "holdgate.db"), pytest.raises(StoreError):
        await record(rig, a_decision(Action.HOLD), a_policy())
    assert rig.told == []
    assert b"holdgate_decisions_total{" not in rig.metrics.render()
    await record(rig, a_decision(Action.HOLD), a_policy())
    await asyncio.sleep(0)  # counted after the reply is on its way
    assert len(rig.told) == 1
    assert b'action="hold"' in rig.metrics.render()


# --------------------------------------------------------------------------------------------------------- ids


@given(st.lists(st.integers(0, 10**13), min_size=2, max_size=20))
def test_later_ids_sort_later(times_ms: list[int]) -> None:
    begin = datetime(1970, 1, 1, tzinfo=UTC)
    ids = [new_id("hgd", begin + timedelta(milliseconds=ms)) for ms in sorted(times_ms)]
    assert len(set(ids)) == len(ids)
    assert all(len(each) == len("hgd_") + 32 and each.startswith("hgd_") for each in ids)
    moments = [each[:16] for each in ids]
    assert moments == sorted(moments)
    assert len(set(moments)) == len(set(times_ms))


# ----------------------------------------------------------------------------------------------------- masking

_ALNUM = string.ascii_letters + string.digits


def random_text(alphabet: str, size: int) -> st.SearchStrategy[str]:
    return st.text(alphabet, min_size=size, max_size=size)


def card(digits: str) -> str:
    """A card number with the right check digit (ISO/IEC 7812-1, annex B)."""
    doubled = [int(d) if n % 2 else sum(map(int, str(2 * int(d)))) for n, d in enumerate(digits)]
    return digits + str(-sum(doubled) % 10)


cards = random_text(string.digits, 14).map(lambda digits: card("4" + digits))
secrets = st.one_of(
    random_text(_ALNUM, 36).map(lambda rest: f"ghp_{rest}"),
    random_text(string.ascii_uppercase + "234567", 16).map(lambda rest: f"AKIA{rest}"),
    random_text(_ALNUM + "_-", 40).map(lambda rest: f"sk-proj-{rest}"),
    random_text(_ALNUM, 24).map(lambda rest: f"sk_live_{rest}"),
    cards,
    cards.map(lambda digits: " ".join(digits[at : at + 4] for at in range(0, 16, 4))),
    random_text(string.ascii_lowercase, 8).map(lambda name: f"{name}@example.com"),
)
places = st.sampled_from(
    [
        lambda secret: {"content": secret},
        lambda secret: {"content": f"It is {secret}, I think."},
        lambda secret: [["deep", [{"a": [f"<{secret}>"]}]]],
        lambda secret: {secret: "in a key"},
        lambda secret: {f"key {secret}!": 1},
        lambda secret: {"arguments": json.dumps({"note": secret, "n": 1})},
        lambda secret: {"arguments": json.dumps({"note": json.dumps([secret])})},
        lambda secret: {
            "arguments": '{"note": "' + "".join(f"\\u{ord(c):04x}" for c in secret) + '"}'
        },
        lambda secret: {"number": int(secret) if secret.isdecimal() else secret},
        lambda secret: {
            "wide": "".join(chr(ord(c) + 0xFEE0) if c.isdecimal() else c for c in secret)
        },
    ]
)


def is_found(text: str) -> bool:
    return any(scan_of(use).run(exchange(text)).findings for use in ("secrets", "pii"))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(secrets, places), min_size=1, max_size=5), st.integers(0, 2))
def test_no_secret_is_left_anywhere(found: list[tuple[str, Any]], indent: int) -> None:
    assume(all(is_found(secret) for secret, _ in found))
    body = {"said": [place(secret) for secret, place in found], "kept": ["plain", 1, None, 2.5]}
    shown = masked(json.dumps(body, indent=indent or None).encode())
    assert shown is not None
    document = orjson.loads(shown)
    assert document["kept"] == body["kept"]
    assert len(document["said"]) == len(found)
    assert not is_found(shown.decode())
    for secret, _ in found:
        assert secret not in shown.decode()
        assert secret not in json.dumps(document)


def test_what_a_string_is_called_may_make_a_secret_of_it() -> None:
    shown = masked(b'{"password": "Tr0ub4dor-and-3", "word": "Tr0ub4dor-and-3"}')
    assert shown is not None
    assert orjson.loads(shown) == {"password": "[redacted:generic]", "word": "Tr0ub4dor-and-3"}


@given(st.recursive(st.none() | st.booleans() | st.integers(-999, 999) | st.text(" abc.", max_size=9),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3)))  # fmt: skip
def test_what_holds_no_secret_stays_as_it_is(document: Any) -> None:
    shown = masked(json.dumps(document).encode())
    assert shown is not None
    assert orjson.loads(shown) == document


@pytest.mark.parametrize(
    "body",
    [None, b"", b"<html>", b'{"a":"\xff"}', b"[" * 900 + b"]" * 900, b"[" * 5_000],
    ids=["none", "empty", "not json", "not unicode", "deep", "too deep"],
)
def test_what_cannot_be_masked_is_not_kept(body: bytes | None) -> None:
    assert masked(body) is None


def test_many_secrets_are_all_masked() -> None:
    cards = [card(f"4{number:014d}") for number in range(1_000)]
    shown = masked(orjson.dumps([*cards, " ".join(cards)]))
    assert shown is not None
    assert not any(number.encode() in shown for number in cards)
