"""A call to a checked endpoint, and what its client gets: a reply, or the news that the response is held."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from math import inf

import msgspec

from gateway import wire
from gateway.auth import Caller
from gateway.errors import InvalidRequest
from policies import Facts
from validators import JSON

Headers = list[tuple[str, str]]

#: How much sooner than the client's own read timeout a waiting client is answered.
_MARGIN_S = 5.0

#: Response headers that describe one hop or one encoding of the body, not the answer (RFC 9110, section 7.6.1).
_NOT_RELAYED = frozenset(
    [
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "content-length",
        "date",
        "server",
        "alt-svc",
    ]
)

#: One element of a list; commas in quotes do not end it (RFC 9110, section 5.6.1).
_ELEMENT = re.compile(r'(?:"(?:[^"\\]|\\.)*"|[^",])+')
_MAX_PREFER_CHARS = 1_000


def combined(headers: Headers) -> dict[str, str]:
    """Each header's value by its name; of a name that is there several times, a list of all (RFC 9110, section 5.3)."""
    values = dict(headers)
    if len(values) != len(headers):
        values.clear()
        for name, value in headers:
            values[name] = f"{values[name]}, {value}" if name in values else value
    return values


class Patience(msgspec.Struct, frozen=True):
    """How long this caller waits: `Prefer` (RFC 7240, sections 4.1 and 4.3) and the SDK's own timeout, in seconds."""

    wait_s: float | None = None
    respond_async: bool = False
    timeout_s: float | None = None

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> Patience:
        """What the request headers (names in lower case) say; a preference that cannot be read is ignored.

        Of a preference that is there twice the first counts.
        """
        preferences: dict[str, str] = {}
        asked = headers.get("prefer", "")[:_MAX_PREFER_CHARS]
        for preference in _ELEMENT.findall(asked) if asked else ():
            name, _, value = preference.partition(";")[0].partition("=")
            preferences.setdefault(name.strip().lower(), value.strip('" '))
        timeout = headers.get("x-stainless-read-timeout") or headers.get("x-stainless-timeout", "")
        wait_s = _seconds(preferences.get("wait", ""))
        return cls(wait_s, "respond-async" in preferences, _seconds(timeout))

    def until_s(self, received_s: float, *, streamed: bool) -> float:
        """When the client of a call that came at `received_s` must have its answer: shortly before it gives up.

        Infinity if it does not say, and on streams, where keep-alive comments reset its timeout.
        """
        if self.timeout_s is None or streamed:
            return inf
        return received_s + max(self.timeout_s - min(_MARGIN_S, self.timeout_s / 4), 0.0)

    def of_hold_s(self, policy_wait_s: float, *, streamed: bool) -> float:
        """How long to wait for a person before saying that the response is held.

        On streams the client's read timeout does not count: keep-alive comments reset it.
        """
        if self.respond_async:
            return 0.0
        waits = [policy_wait_s, self.until_s(0.0, streamed=streamed)]
        if self.wait_s is not None:
            waits.append(self.wait_s)
        return min(waits)


def _seconds(text: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < 1e6 else None


class Call(msgspec.Struct, frozen=True):
    """One request to a checked endpoint, parsed once. `headers` are the client's, names in lower case."""

    id: str
    endpoint: str
    body: bytes
    request: dict[str, JSON]
    query: str
    headers: Headers
    facts: Facts
    caller: Caller
    patience: Patience
    digest: str
    fingerprint: str
    request_id: str
    received_s: float
    is_retry: bool
    is_idempotent: bool

    @property
    def streamed(self) -> bool:
        """Whether the client asked for a stream: the body says so, whatever `Accept` says."""
        return self.request.get("stream") is True

    @property
    def include_usage(self) -> bool:
        """Whether the client asked for the usage chunk at the end of its stream."""
        options = self.request.get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True


def make_call(
    *,
    decision_id: str,
    endpoint: str,
    body: bytes,
    query: str,
    headers: Headers,
    caller: Caller,
    received_s: float,
) -> Call:
    """The call that a request body and headers make.

    Raises
    ------
    InvalidRequest
        If the body is not a JSON object, or `model` or `metadata` have the wrong type.
    """
    values = combined(headers)
    try:
        request = wire.parse_request(body)
        facts = wire.facts(
            endpoint,
            request,
            task=values.get("x-holdgate-task"),
            key=caller.key.name if caller.key else None,
        )
    except wire.Unreadable as error:
        raise InvalidRequest(str(error), code="invalid_body") from error
    idempotency_key = values.get("idempotency-key") or None
    identity = caller.key.id if caller.key else values.get("authorization", "")
    digest = hashlib.sha256(body).hexdigest()
    same = f"key:{idempotency_key}" if idempotency_key else f"body:{digest}"
    fingerprint = hashlib.sha256(
        "\0".join((identity, endpoint, same)).encode("utf-8", "surrogateescape")
    ).hexdigest()
    retries = values.get("x-stainless-retry-count", "0")
    return Call(
        id=decision_id,
        endpoint=endpoint,
        body=body,
        request=request,
        query=query,
        headers=headers,
        facts=facts,
        caller=caller,
        patience=Patience.of(values),
        digest=digest,
        fingerprint=fingerprint,
        request_id=values.get("x-request-id", "")[:128] or decision_id,
        received_s=received_s,
        is_retry=retries.isdecimal() and bool(retries.strip("0")),
        is_idempotent=idempotency_key is not None,
    )


class Reply(msgspec.Struct, frozen=True):
    """A whole answer, or one whose body is still being made."""

    status: int
    headers: Headers
    body: bytes | AsyncIterator[bytes]


class Held(msgspec.Struct, frozen=True):
    """The news that a response waits for a person, and how its client wants to hear the end of it.

    Small on purpose: thousands of these wait at once, so bodies stay in the store.
    """

    decision_id: str
    task_id: str
    endpoint: str
    streamed: bool
    include_usage: bool
    placeholder: bool
    wait_s: float
    due_at: datetime | None
    headers: Headers


def relayed(headers: Headers) -> Headers:
    """The provider's response headers (names in lower case) that a client may see, its request id under a name of its own."""
    kept = []
    for name, value in headers:
        if name == "x-request-id":
            kept.append(("x-holdgate-upstream-request-id", value))
        elif name not in _NOT_RELAYED:
            kept.append((name, value))
    return kept
