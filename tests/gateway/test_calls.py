"""What a request is, how long its caller waits, and which headers go back."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from gateway.auth import Caller, new_key
from gateway.calls import Call, Headers, Patience, combined, make_call, relayed
from gateway.errors import InvalidRequest
from gateway.records import Role
from gateway.wire import CHAT, RESPONSES

NOBODY = Caller("local", Role.ADMIN)
BODY = b'{"model": "m", "messages": []}'


def caller(name: str) -> Caller:
    key, _ = new_key(f"id-{name}", name, Role.CLIENT, datetime(2030, 1, 1, tzinfo=UTC))
    return Caller(name, Role.CLIENT, key)


def call(body: bytes = BODY, headers: Headers | None = None, **more: Any) -> Call:
    given = {
        "decision_id": "hgd_1",
        "endpoint": CHAT,
        "query": "",
        "caller": NOBODY,
        "received_s": 0.0,
    }
    return make_call(body=body, headers=headers or [], **{**given, **more})


# -------------------------------------------------------------------------------------------------- patience


@pytest.mark.parametrize(
    ("prefer", "wait_s", "respond_async"),
    [
        ("", None, False),
        ("wait=10", 10, False),
        ("respond-async", None, True),
        ("respond-async, wait=10", 10, True),
        ("RESPOND-ASYNC,WAIT=10", 10, True),
        ('wait="10"', 10, False),
        ("wait = 10", 10, False),
        ("wait=10; foo=bar", 10, False),
        ("wait=10, wait=20", 10, False),
        ("wait=2.5", 2.5, False),
        ("wait=0", 0, False),
        ("wait=-1", None, False),
        ("wait=soon", None, False),
        ("wait=nan", None, False),
        ("wait=inf", None, False),
        ("wait=1e9", None, False),
        ("wait", None, False),
        ("waiting=10", None, False),
        ('note="a, wait=10", handling=lenient', None, False),
        ('note="a \\", respond-async", wait=3', 3, False),
        (",,;;==,wait=4", 4, False),
        ("return=minimal; respond-async", None, False),
        ('"' * 50_000 + "wait=1", None, False),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_preferences_are_read_as_rfc_7240_writes_them(
    prefer: str, wait_s: float | None, respond_async: bool
) -> None:
    patience = Patience.of({"prefer": prefer})
    assert (patience.wait_s, patience.respond_async) == (wait_s, respond_async)


def test_several_headers_of_one_name_are_one_list() -> None:
    """RFC 9110, section 5.3."""
    sent = [("prefer", "wait=5"), ("x-other", "1"), ("prefer", "respond-async")]
    assert combined(sent) == {"prefer": "wait=5, respond-async", "x-other": "1"}
    assert call(headers=sent).patience == Patience(wait_s=5.0, respond_async=True)


@given(st.text(max_size=200))
def test_any_preference_can_be_read_or_ignored(prefer: str) -> None:
    patience = Patience.of({"prefer": prefer, "x-stainless-read-timeout": prefer})
    assert patience.wait_s is None or 0 <= patience.wait_s < 1e6
    assert patience.timeout_s is None or 0 <= patience.timeout_s < 1e6


@pytest.mark.parametrize(
    ("headers", "timeout_s"),
    [
        ({}, None),
        ({"x-stainless-read-timeout": "600"}, 600),
        ({"x-stainless-timeout": "30"}, 30),
        ({"x-stainless-read-timeout": "60", "x-stainless-timeout": "30"}, 60),
        ({"x-stainless-read-timeout": "None"}, None),
        ({"x-stainless-read-timeout": ""}, None),
    ],
)
def test_the_sdk_says_how_long_it_waits(headers: dict[str, str], timeout_s: float | None) -> None:
    assert Patience.of(headers).timeout_s == timeout_s


@pytest.mark.parametrize(
    ("patience", "policy_s", "whole_s", "stream_s"),
    [
        (Patience(), 50, 50, 50),
        (Patience(), 0, 0, 0),
        (Patience(wait_s=10), 50, 10, 10),
        (Patience(wait_s=90), 50, 50, 50),
        (Patience(wait_s=0), 50, 0, 0),
        (Patience(respond_async=True), 50, 0, 0),
        (Patience(wait_s=10, respond_async=True), 50, 0, 0),
        (Patience(timeout_s=600), 50, 50, 50),
        (Patience(timeout_s=30), 50, 25, 50),
        (Patience(timeout_s=20), 50, 15, 50),
        (Patience(timeout_s=8), 50, 6, 50),
        (Patience(timeout_s=0), 50, 0, 50),
        (Patience(wait_s=10, timeout_s=8), 50, 6, 10),
    ],
)
def test_how_long_a_caller_waits_for_a_person(
    patience: Patience, policy_s: float, whole_s: float, stream_s: float
) -> None:
    assert patience.of_hold_s(policy_s, streamed=False) == whole_s
    assert patience.of_hold_s(policy_s, streamed=True) == stream_s


# ---------------------------------------------------------------------------------------------- fingerprints


def variants() -> dict[str, Call]:
    """Calls no two of which are the same."""
    key = ("idempotency-key", "k1")
    return {
        "plain": call(),
        "body": call(b'{"model": "m", "messages": [1]}'),
        "space": call(BODY + b" "),
        "endpoint": call(endpoint=RESPONSES),
        "key": call(caller=caller("a")),
        "other key": call(caller=caller("b")),
        "authorization": call(headers=[("authorization", "Bearer sk-1")]),
        "other authorization": call(headers=[("authorization", "Bearer sk-2")]),
        "idempotency key": call(headers=[key]),
        "other idempotency key": call(headers=[("idempotency-key", "k2")]),
        "idempotency key of another": call(headers=[key], caller=caller("a")),
    }


def test_fingerprints_of_different_calls_differ() -> None:
    for (one, first), (other, second) in itertools.combinations(variants().items(), 2):
        assert first.fingerprint != second.fingerprint, (one, other)


@pytest.mark.parametrize(
    "same",
    [
        call(decision_id="hgd_2"),
        call(received_s=9.0),
        call(headers=[("x-stainless-retry-count", "2")]),
        call(headers=[("x-request-id", "other")]),
        call(headers=[("prefer", "wait=1")]),
    ],
)
def test_a_repeated_call_has_the_same_fingerprint(same: Call) -> None:
    assert same.fingerprint == call().fingerprint
    assert same.digest == call().digest


def test_an_idempotency_key_stands_for_the_body() -> None:
    key = [("idempotency-key", "k1")]
    assert call(headers=key).fingerprint == call(b"{}", headers=key).fingerprint
    assert call(headers=key).digest != call(b"{}", headers=key).digest


def test_a_key_of_ours_counts_and_not_how_it_is_written() -> None:
    headers = [("authorization", "bearer  x")]
    mine = caller("a")
    assert call(headers=headers, caller=mine).fingerprint == call(caller=mine).fingerprint


@pytest.mark.parametrize(
    ("headers", "is_retry", "is_idempotent"),
    [
        ([], False, False),
        ([("x-stainless-retry-count", "0")], False, False),
        ([("x-stainless-retry-count", "000")], False, False),
        ([("x-stainless-retry-count", "1")], True, False),
        ([("x-stainless-retry-count", "-1")], False, False),
        ([("x-stainless-retry-count", "²")], False, False),
        ([("x-stainless-retry-count", "")], False, False),
        ([("x-stainless-retry-count", "9" * 5_000)], True, False),
        ([("idempotency-key", "k")], False, True),
        ([("idempotency-key", "")], False, False),
    ],
    ids=repr,
)
def test_which_calls_are_repeated(headers: Headers, is_retry: bool, is_idempotent: bool) -> None:
    made = call(headers=headers)
    assert (made.is_retry, made.is_idempotent) == (is_retry, is_idempotent)


# ------------------------------------------------------------------------------------------------ the request


@pytest.mark.parametrize(
    ("request_", "streamed", "usage"),
    [
        ({}, False, False),
        ({"stream": True}, True, False),
        ({"stream": "true"}, False, False),
        ({"stream": 1}, False, False),
        ({"stream": True, "stream_options": {"include_usage": True}}, True, True),
        ({"stream": True, "stream_options": {"include_usage": 1}}, True, False),
        ({"stream": True, "stream_options": [1]}, True, False),
    ],
)
def test_the_body_says_whether_it_is_a_stream(
    request_: dict[str, Any], streamed: bool, usage: bool
) -> None:
    made = call(orjson.dumps(request_))
    assert (made.streamed, made.include_usage) == (streamed, usage)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"model": 5}', b'{"metadata": 5}'])
def test_a_body_that_is_no_request_is_the_clients_mistake(body: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        call(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_body")


def test_the_task_of_the_header_and_the_name_of_the_key_are_what_policies_match() -> None:
    made = call(headers=[("x-holdgate-task", "refunds")], caller=caller("app"))
    assert (made.facts.task, made.facts.key, made.facts.model) == ("refunds", "app", "m")


@pytest.mark.parametrize(
    ("headers", "request_id"),
    [([], "hgd_1"), ([("x-request-id", "abc")], "abc"), ([("x-request-id", "a" * 500)], "a" * 128)],
    ids=["none", "short", "long"],
)
def test_the_clients_request_id_is_kept_within_bounds(headers: Headers, request_id: str) -> None:
    assert call(headers=headers).request_id == request_id


# ------------------------------------------------------------------------------------------------ the headers

HOP = ["connection", "keep-alive", "proxy-authenticate", "proxy-connection", "te", "trailer",
       "transfer-encoding", "upgrade", "content-length", "date", "server", "alt-svc"]  # fmt: skip
KEPT = ["content-type", "retry-after", "retry-after-ms", "x-ratelimit-remaining-tokens", "openai-processing-ms",
        "x-should-retry", "set-cookie", "cf-ray"]  # fmt: skip


@pytest.mark.parametrize("name", HOP)
def test_headers_of_one_hop_are_not_relayed(name: str) -> None:
    assert relayed([(name, "x"), (name, "y")]) == []


@pytest.mark.parametrize("name", KEPT)
def test_headers_of_the_answer_are_relayed_as_often_as_they_are_there(name: str) -> None:
    assert relayed([(name, "1"), (name, "2")]) == [(name, "1"), (name, "2")]


def test_the_providers_request_id_has_a_name_of_its_own() -> None:
    assert relayed([("x-request-id", "req_1")]) == [("x-holdgate-upstream-request-id", "req_1")]


def test_a_call_is_a_value() -> None:
    assert replace(call(), id="hgd_1") == call()
