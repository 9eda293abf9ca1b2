"""The scripted answer as bytes on the wire: whole, streamed, or wrong on purpose."""

from __future__ import annotations

import json
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import msgspec
import zstandard
from msgspec.structs import replace

from gateway.demo import dialect
from gateway.demo.scenarios import OTHERWISE
from gateway.demo.script import Script
from gateway.demo.speech import NOT_UTF8, Ask, Object


class Payload(msgspec.Struct, frozen=True):
    """What goes over the wire.

    `pieces` are written one by one; if `cut`, the connection breaks off after them. `length` is the
    Content-Length announced, None for a chunked body.
    """

    status: int
    headers: Mapping[str, str]
    pieces: Sequence[bytes]
    length: int | None = None
    cut: bool = False


class Endpoint(msgspec.Struct, frozen=True):
    """A scripted endpoint: how it is answered, and how a client asks it for logprobs.

    `required` is the request field without which there is nothing to answer.
    """

    required: str
    body: Callable[[Ask], Object]
    events: Callable[[Ask], Iterable[Object]]
    logprobs: str
    typed_events: bool = False

    def asks_logprobs(self, request: Mapping[str, Any]) -> bool:
        """True if the request wants logprobs."""
        value = request.get(self.logprobs)
        if self.logprobs == "include":
            return isinstance(value, list) and "message.output_text.logprobs" in value
        return value is not None and value is not False

    def encode(self, event: Object) -> bytes:
        """An event as server-sent event; of the Responses API it also names its type."""
        name = f"event: {event['type']}\n".encode() if self.typed_events else b""
        return name + b"data: " + _dumps(event) + b"\n\n"


CHAT = Endpoint("messages", dialect.chat_body, dialect.chat_events, "logprobs")
COMPLETIONS = Endpoint("prompt", dialect.completion_body, dialect.completion_events, "logprobs")
RESPONSES = Endpoint(
    "input", dialect.response_body, dialect.response_events, "include", typed_events=True
)


class ApiError(Exception):
    """An answer in OpenAI's error shape."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.error: Object = {"message": message, "type": kind, "param": param, "code": code}


def payload_for(endpoint: Endpoint, body: Mapping[str, Any], script: Script) -> Payload:
    """What answers the request as the script says, wrong where the script wants it wrong.

    Raises
    ------
    ApiError
        If the model gives no logprobs, or knows no schema of its reply, and the request asks for it.
    """
    if script.fault == "html502":
        page = b"<html><head><title>502 Bad Gateway</title></head><body>Bad Gateway</body></html>"
        return _whole(502, "text/html", [page], script)
    fails = script.error is not None and script.fault != "error_mid"
    status = script.status or (500 if fails else 200)
    if fails or status >= 400:
        return _whole(
            status, "application/json", [_dumps({"error": _error(script, status)})], script
        )
    if str(body.get("model", "")).startswith("no-logprobs") and endpoint.asks_logprobs(body):
        message = f"Unsupported parameter: '{endpoint.logprobs}' is not supported with this model."
        if endpoint.logprobs == "include":
            message += " It gives no logprobs."
        raise ApiError(400, message, param=endpoint.logprobs, code="unsupported_parameter")
    if str(body.get("model", "")).startswith("no-schema") and "response_format" in body:
        message = "Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model."
        raise ApiError(400, message, param="response_format")
    ask = Ask(body, script, uuid.uuid4().hex, int(time.time()))
    if body.get("stream"):
        return _streamed(endpoint, ask, status)
    return _misdelivered(_dumps(endpoint.body(ask)), script, status)


def _dumps(document: Object) -> bytes:
    """JSON, with whatever numbers the script has in it: NaN and integers of any size too."""
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    return text.encode().replace(NOT_UTF8.encode(), b"\xff\xfe")


def _misdelivered(body: bytes, script: Script, status: int) -> Payload:
    first, rest = body[: len(body) // 2], body[len(body) // 2 :]
    pieces = {
        "close_mid": [first],
        "truncate": [first],
        "garbage": [first, b'}}"<\x00not json'],
    }.get(script.fault or "", [first, rest])
    payload = _whole(status, "application/json", pieces, script)
    if script.fault == "close_mid":
        return replace(payload, length=len(body) + (payload.length or 0), cut=True)
    return payload


def _whole(status: int, content_type: str, pieces: Sequence[bytes], script: Script) -> Payload:
    sent = _compressed(pieces, script.encoding)
    return Payload(status, headers_of(content_type, script), sent, sum(map(len, sent)))


def _streamed(endpoint: Endpoint, ask: Ask, status: int) -> Payload:
    script = ask.script
    events = [endpoint.encode(event) for event in endpoint.events(ask)]
    done = [] if endpoint.typed_events else [b"data: [DONE]\n\n"]
    first, rest = events[: len(events) // 2], events[len(events) // 2 :]
    pieces = {
        "close_mid": first,
        "truncate": first,
        "garbage": [
            *first,
            b'data: {"choices": [{"delta":\n\n',
            b"\x00\x01nonsense\n\n",
            *rest,
            *done,
        ],
        "error_mid": [*first, _error_event(endpoint, script, len(first))],
        "after_done": [*events, *done, *events[-1:]],
        "odd_sse": _odd([*events, *done]),
    }.get(script.fault or "", [*events, *done])
    headers = headers_of("text/event-stream; charset=utf-8", script) | {"cache-control": "no-cache"}
    return Payload(
        status, headers, _compressed(pieces, script.encoding), cut=script.fault == "close_mid"
    )


def _error(script: Script, status: int) -> Object:
    return ApiError(status, "The script asks for this error.").error | (script.error or {})


def _error_event(endpoint: Endpoint, script: Script, number: int) -> bytes:
    error = _error(script, 500)
    if endpoint.typed_events:
        return endpoint.encode(error | {"type": "error", "sequence_number": number})
    return endpoint.encode({"error": error})


def _odd(events: Sequence[bytes]) -> list[bytes]:
    """The same events as the standard also allows: CRLF, comments, no spaces, split anywhere."""
    lines = (event.replace(b": ", b":", 1).replace(b"\n", b"\r\n") for event in events)
    stream = b"".join(chain.from_iterable((b": still here\r\n\r\n", line) for line in lines))
    return [stream[at : at + 7] for at in range(0, len(stream), 7)]


def _compressed(pieces: Sequence[bytes], encoding: str | None) -> Sequence[bytes]:
    if encoding is None:
        return pieces
    if encoding == "zstd":
        zstd = zstandard.ZstdCompressor().compressobj()
        flushed = [zstd.compress(p) + zstd.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) for p in pieces]
        return [*flushed, zstd.flush()]
    deflate = zlib.compressobj(wbits=31 if encoding == "gzip" else 15)
    flushed = [deflate.compress(piece) + deflate.flush(zlib.Z_SYNC_FLUSH) for piece in pieces]
    return [*flushed, deflate.flush()]


def headers_of(content_type: str, script: Script = OTHERWISE) -> dict[str, str]:
    """The headers OpenAI sends, with those of the script over them."""
    headers = {
        "content-type": content_type,
        "x-request-id": f"req_{uuid.uuid4().hex}",
        "openai-organization": "demo",
        "openai-version": "2020-10-01",
        "openai-processing-ms": str(round(script.delay_ms)),
        "x-ratelimit-limit-requests": "10000",
        "x-ratelimit-limit-tokens": "2000000",
        "x-ratelimit-remaining-requests": "9999",
        "x-ratelimit-remaining-tokens": "1999000",
        "x-ratelimit-reset-requests": "6ms",
        "x-ratelimit-reset-tokens": "30ms",
    }
    if script.encoding is not None:
        headers["content-encoding"] = script.encoding
    return headers | {name.lower(): value for name, value in script.headers.items()}
