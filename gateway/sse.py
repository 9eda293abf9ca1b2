"""Streams on the OpenAI wire: cut bytes into events, put chunks together, take a body apart into chunks.

References
----------
WHATWG HTML, section 9.2 "Server-sent events" (the event stream format); OpenAI API document,
`CreateChatCompletionStreamResponse` and `ResponseStreamEvent`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import orjson

from gateway.errors import GatewayError
from gateway.wire import CHAT, NO_RAW, RESPONSES, Unreadable

DONE = b"data: [DONE]\n\n"
_BLANK = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_DATA = re.compile(rb"^data:[ ]?(.*?)\r?$", re.MULTILINE)
_MAX_INDEX = 1024


@dataclass(frozen=True, slots=True)
class Event:
    """One event: its bytes as they came, blank line included, and its data (None for a comment or an empty event)."""

    raw: bytes
    data: bytes | None

    @property
    def is_done(self) -> bool:
        """True for the `[DONE]` that ends chat and completion streams."""
        return self.data == b"[DONE]"


class Splitter:
    """Cuts a byte stream into events, whatever the chunks it arrives in."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> list[Event]:
        """The events completed by this chunk."""
        rest = self._rest
        unseen = max(0, len(rest) - 3)
        rest += chunk
        events, start = [], 0
        for end in [blank.end() for blank in _BLANK.finditer(rest, unseen)]:
            events.append(event(bytes(rest[start:end])))
            start = end
        del rest[:start]
        return events

    @property
    def pending_bytes(self) -> int:
        """Bytes of an event that has not ended yet."""
        return len(self._rest)


def event(raw: bytes) -> Event:
    """One event from its bytes."""
    if raw.startswith(b"data: ") and raw.count(b"\n") == 2 and raw.endswith(b"\n\n"):
        return Event(raw, raw[6:-2])
    lines = _DATA.findall(raw)
    return Event(raw, b"\n".join(lines) if lines else None)


def encode(data: bytes, name: str | None = None) -> bytes:
    """An event carrying `data`; named events are for the Responses API only (chat clients trip over `event:` lines)."""
    return (b"event: " + name.encode() + b"\n" if name else b"") + b"data: " + data + b"\n\n"


def comment(text: str) -> bytes:
    """A comment: bytes that keep a connection alive and every client ignores."""
    return b": " + text.encode() + b"\n\n"


def error_events(endpoint: str, error: GatewayError) -> bytes:
    """An error on a stream that has begun: one event the SDKs raise as `APIError`, then the end."""
    if endpoint == RESPONSES:
        fields = {
            "type": "error",
            "code": error.code,
            "message": error.message,
            "param": error.param,
        }
        body = orjson.dumps(
            {**fields, "error": orjson.loads(error.body())["error"], "sequence_number": 0}
        )
        return encode(body, "error")
    return encode(error.body()) + DONE


# ------------------------------------------------------------------------------------------------- putting together


class _Pieces(list[str]):
    """Text that arrives in pieces; joined once, so that a long answer costs linear time."""


class Assembler:
    """Puts the events of one stream together into the body that the same answer would have had without `stream`.

    `error` is the error object if the provider sent one, `complete` whether every choice ended; unknown fields survive.
    `repeats` is set if chunks say in a `message` what their deltas say piece by piece, as some providers' do: that copy is
    not in the body.
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.error: dict[str, Any] | None = None
        self.done = False
        self.repeats = False
        self._top: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self._final: bytes | None = None
        self._text = _Pieces()

    def add(self, event: Event) -> None:
        """Take in one event.

        Raises
        ------
        Unreadable
            If its data is not what the API document says.
        """
        if event.data is None:
            return
        if event.is_done:
            self.done = True
            return
        try:
            chunk = orjson.loads(event.data)
            if not isinstance(chunk, dict):
                raise TypeError("an event must be a JSON object")
            if chunk.get("error") and chunk.get("type", "error") == "error":
                self.error = (
                    chunk["error"]
                    if isinstance(chunk["error"], dict)
                    else {"message": str(chunk["error"])}
                )
            elif self.endpoint == RESPONSES:
                self._add_response_event(chunk)
            else:
                self._add_chunk(chunk)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise Unreadable(f"The provider's stream is not readable: {error}.") from error

    @property
    def complete(self) -> bool:
        """True if the answer arrived whole: every choice has a finish reason, or the final event came."""
        if self.endpoint == RESPONSES:
            return self._final is not None
        return bool(self._choices) and all(c.get("finish_reason") for c in self._choices.values())

    def body(self) -> bytes:
        """The equivalent non-streamed body; of an incomplete stream, as much as came.

        Raises
        ------
        Unreadable
            If it is nested too deeply to be written.
        """
        if self.endpoint == RESPONSES:
            if self._final is not None:
                return self._final
            part = {"type": "output_text", "text": "".join(self._text), "annotations": []}
            item = {
                "type": "message",
                "role": "assistant",
                "status": "incomplete",
                "content": [part],
            }
            return orjson.dumps(
                {**self._top, "status": "incomplete", "output": [item] if self._text else []}
            )
        kind = "chat.completion" if self.endpoint == CHAT else "text_completion"
        try:
            choices = [_joined(self._choices[index]) for index in sorted(self._choices)]
            return orjson.dumps({**self._top, "object": kind, "choices": choices})
        except (orjson.JSONEncodeError, RecursionError) as error:
            raise Unreadable(f"The provider's stream is not readable: {error}.") from error

    def _add_response_event(self, chunk: dict[str, Any]) -> None:
        kind = chunk["type"]
        if kind == "response.output_text.delta":
            self._text.append(chunk["delta"])
        elif kind == "response.created":
            self._top = {k: v for k, v in chunk["response"].items() if k != "output"}
        elif kind == "error":
            self.error = {
                "message": chunk.get("message"),
                "code": chunk.get("code"),
                "param": chunk.get("param"),
            }
        elif kind in ("response.completed", "response.incomplete", "response.failed"):
            self._final = orjson.dumps(chunk["response"])

    def _add_chunk(self, chunk: dict[str, Any]) -> None:
        for name, value in chunk.items():
            if name != "choices" and (value is not None or name not in self._top):
                self._top[name] = value
        for delta in chunk.get("choices") or ():
            index = int(delta.get("index") or 0)
            if index not in self._choices and len(self._choices) >= _MAX_INDEX:
                raise ValueError("too many choices")
            choice = self._choices.setdefault(index, {"index": index})
            self._add_choice(choice, delta)

    def _add_choice(self, choice: dict[str, Any], delta: dict[str, Any]) -> None:
        for name, value in delta.items():
            if name == "message" and "delta" in delta:
                self.repeats = True
            elif name in ("delta", "message"):
                _merge(choice.setdefault("message", {"content": None}), value or {})
            elif name == "text" and isinstance(value, str):
                choice.setdefault("text", _Pieces()).append(value)
            elif name == "logprobs":
                choice["logprobs"] = _extend(choice.get("logprobs"), value)
            elif name != "index" and (value is not None or name not in choice):
                choice[name] = value


#: Text that is whole each time it comes; all other text in a delta is a piece of something longer.
_WHOLE = frozenset({"role", "id", "type", "name", "object", "model", "index"})


def _merge(into: dict[str, Any], delta: dict[str, Any]) -> None:
    for name, value in delta.items():
        before = into.get(name)
        if value is None:
            into.setdefault(name, None)
        elif isinstance(value, str) and name not in _WHOLE:
            if not isinstance(before, _Pieces):
                before = into[name] = _Pieces()
            before.append(value)
        elif isinstance(value, dict):
            _merge(into.setdefault(name, {}) if before is None else before, value)
            into[name] = into[name] or {}
        elif isinstance(value, list):
            into[name] = _merge_list(before if isinstance(before, list) else [], value)
        else:
            into[name] = value


def _merge_list(into: list[Any], deltas: list[Any]) -> list[Any]:
    for delta in deltas:
        index = delta.get("index") if isinstance(delta, dict) else None
        if index is not None:
            found = next((i for i in into if isinstance(i, dict) and i.get("index") == index), None)
        else:
            found = into[-1] if into and _continues(into[-1], delta) else None
        if found is None:
            if len(into) >= _MAX_INDEX:
                raise ValueError("too many parts")
            found = {"index": index} if index is not None else {}
            into.append(found if isinstance(delta, dict) else delta)
        if isinstance(delta, dict):
            _merge(found, delta)
    return into


#: What content parts that come without a number are pieces of; `thinking` is Mistral's.
_PART_TEXTS = frozenset({"text", "thinking"})


def _continues(part: Any, delta: Any) -> bool:
    """Whether a part without a number goes on with the text of the one before it."""
    if not isinstance(part, dict) or not isinstance(delta, dict):
        return False
    return part.get("type") == delta.get("type") and bool(_PART_TEXTS & part.keys() & delta.keys())


def _extend(before: Any, value: Any) -> Any:
    if not isinstance(value, dict):
        return before if value is None else value
    if not isinstance(before, dict):
        return {name: list(v) if isinstance(v, list) else v for name, v in value.items()}
    for name, more in value.items():
        if isinstance(more, list) and isinstance(before.get(name), list):
            before[name].extend(more)
        elif more is not None:
            before[name] = more
    return before


def _joined(value: Any) -> Any:
    if isinstance(value, _Pieces):
        return "".join(value)
    if isinstance(value, dict):
        return {name: _joined(inner) for name, inner in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], dict) and "index" in value[0]:
        return [{name: _joined(v) for name, v in item.items() if name != "index"} for item in value]
    return [_joined(item) for item in value] if isinstance(value, list) else value


# --------------------------------------------------------------------------------------------------- event surgery


class _RawChoice(msgspec.Struct, gc=False):
    logprobs: msgspec.Raw = NO_RAW


class _RawChunk(msgspec.Struct, gc=False):
    choices: list[_RawChoice] = []


_RAW_CHUNK = msgspec.json.Decoder(_RawChunk)


def event_without_logprobs(endpoint: str, event: Event) -> bytes:
    """The event's bytes with every `logprobs` value that says something nulled (emptied, for responses)."""
    if event.data is None or b'"logprobs"' not in event.data:
        return event.raw
    if endpoint == RESPONSES:
        chunk = orjson.loads(event.data)
        _empty_logprobs(chunk)
        return encode(orjson.dumps(chunk), chunk.get("type"))
    raw = event.raw
    for choice in _RAW_CHUNK.decode(event.data).choices:
        value = bytes(choice.logprobs)
        if b'"' in value:
            raw = raw.replace(value, b"null", 1)
    return raw


def _empty_logprobs(value: Any) -> None:
    for inner in value if isinstance(value, list) else value.values():
        if isinstance(inner, list | dict):
            _empty_logprobs(inner)
    if isinstance(value, dict) and isinstance(value.get("logprobs"), list):
        value["logprobs"] = []


# ------------------------------------------------------------------------------------------------------ taking apart


def stream_of(endpoint: str, body: bytes, *, include_usage: bool) -> Iterator[bytes]:
    """The events that say what this non-streamed body says, `[DONE]` last where the endpoint has one."""
    document = orjson.loads(body)
    if endpoint == RESPONSES:
        yield from _response_events(document)
        return
    usage = document.pop("usage", None)
    choices = document.pop("choices", [])
    document["object"] = "chat.completion.chunk" if endpoint == CHAT else "text_completion"
    pieces = _chat_pieces if endpoint == CHAT else _text_pieces
    for choice in choices:
        for piece in pieces(choice):
            yield encode(orjson.dumps({**document, "choices": [piece]}))
    if include_usage:
        yield encode(orjson.dumps({**document, "choices": [], "usage": usage}))
    yield DONE


def _text_pieces(choice: dict[str, Any]) -> Iterable[dict[str, Any]]:
    yield choice


def _chat_pieces(choice: dict[str, Any]) -> Iterable[dict[str, Any]]:
    message = dict(choice.get("message") or {})
    index = choice.get("index", 0)
    calls = message.pop("tool_calls", None) or []
    role = message.pop("role", "assistant")
    yield {
        "index": index,
        "delta": {"role": role, "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }
    said = {name: value for name, value in message.items() if value not in (None, [])}
    if said:
        yield {
            "index": index,
            "delta": said,
            "logprobs": choice.get("logprobs"),
            "finish_reason": None,
        }
    for number, call in enumerate(calls):
        delta = {"tool_calls": [{"index": number, **call}]}
        yield {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
    extra = {
        k: v
        for k, v in choice.items()
        if k not in ("index", "message", "logprobs", "finish_reason")
    }
    finish = choice.get("finish_reason")
    yield {"index": index, "delta": {}, "logprobs": None, "finish_reason": finish, **extra}


def _response_events(response: dict[str, Any]) -> Iterator[bytes]:
    numbered = 0

    def emit(kind: str, **fields: Any) -> bytes:
        nonlocal numbered
        numbered += 1
        data = {"type": kind, "sequence_number": numbered - 1, **fields}
        return encode(orjson.dumps(data), kind)

    begun = {
        **response,
        "status": "in_progress",
        "output": [],
        "usage": None,
        "incomplete_details": None,
    }
    yield emit("response.created", response=begun)
    yield emit("response.in_progress", response=begun)
    for position, item in enumerate(response.get("output") or ()):
        hollow = {**item, "status": "in_progress"}
        hollow |= {"content": []} if "content" in item else {}
        hollow |= {"arguments": ""} if "arguments" in item else {}
        yield emit("response.output_item.added", output_index=position, item=hollow)
        yield from _item_events(emit, position, item)
        yield emit("response.output_item.done", output_index=position, item=item)
    status = response.get("status")
    final = status if status in ("completed", "incomplete", "failed") else "completed"
    yield emit(f"response.{final}", response=response)


def _item_events(
    emit: Callable[..., bytes], position: int, item: dict[str, Any]
) -> Iterator[bytes]:
    where = {"item_id": item.get("id"), "output_index": position}
    if item.get("type") == "function_call":
        yield emit("response.function_call_arguments.delta", **where, delta=item["arguments"])
        yield emit("response.function_call_arguments.done", **where, arguments=item["arguments"])
        return
    if item.get("type") != "message":
        return
    for number, part in enumerate(item.get("content") or ()):
        place = {**where, "content_index": number}
        name, key = (
            ("refusal", "refusal") if part.get("type") == "refusal" else ("output_text", "text")
        )
        yield emit("response.content_part.added", **place, part={**part, key: ""})
        more = {"logprobs": part.get("logprobs") or []} if key == "text" else {}
        yield emit(f"response.{name}.delta", **place, delta=part[key], **more)
        yield emit(f"response.{name}.done", **place, **{key: part[key]}, **more)
        yield emit("response.content_part.done", **place, part=part)
