"""Streams on the OpenAI wire: cut bytes into events, put chunks together, take a body apart into chunks.

References
----------
WHATWG HTML, section 9.2 "Server-sent events" (the event stream format); OpenAI API document,
`CreateChatCompletionStreamResponse` and `ResponseStreamEvent`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from io import StringIO
from typing import Any

import msgspec
import orjson

from gateway import responses
from gateway.errors import GatewayError
from gateway.wire import CHAT, NO_RAW, RESPONSES, Message, Unreadable, is_too_deep, says_something

DONE = b"data: [DONE]\n\n"
#: The end of a line and an empty line. A carriage return may be half of an end: only the next byte tells.
_BLANK = re.compile(rb"\n(?:\n|\r\n|\r(?=[^\n]))|\r(?:\r\n|\r(?=[^\n]))")
_BOM = b"\xef\xbb\xbf"
_MAX_INDEX = 1024


class Event(msgspec.Struct, frozen=True):
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


def event(raw: bytes) -> Event:
    """One event from its bytes."""
    if raw.startswith(b"data: ") and raw.find(b"\n") == len(raw) - 2 and b"\r" not in raw:
        return Event(raw, raw[6:-2])
    # A byte order mark may stand before the first line, and clients that pass over it must not see more than we do.
    lines = (line.partition(b":") for line in raw.removeprefix(_BOM).splitlines())
    data = [value.removeprefix(b" ") for name, _, value in lines if name == b"data"]
    return Event(raw, b"\n".join(data) if data else None)


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


class Assembler:
    """Puts the events of one stream together into the body that the same answer would have had without `stream`.

    `error` is the error object if the provider sent one, `complete` whether every choice ended; unknown fields survive.
    `says_more` is set if the events say something that is not in the body, so that they may not go out in its place: chunks
    with a `message` that repeats what their deltas say piece by piece, as some providers' have, or events of a response
    that do not lead up to the response in the last one.
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.error: dict[str, Any] | None = None
        self.done = False
        self.says_more = False
        self._top: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self._final: bytes | None = None
        self._told = responses.Told()

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
            if is_too_deep(event.data, chunk):
                raise ValueError("it is nested too deeply")
            if chunk.get("error") and chunk.get("type", "error") == "error":
                self.error = (
                    chunk["error"]
                    if isinstance(chunk["error"], dict)
                    else {"message": str(chunk["error"])}
                )
            elif self.endpoint == RESPONSES:
                self._add_response_event(chunk)
            else:
                _CHUNK.decode(event.data)
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
        """The equivalent non-streamed body; of an incomplete stream, as much as came."""
        if self.endpoint == RESPONSES:
            if self._final is not None:
                return self._final
            parts = [
                {"type": "output_text", "text": text, "annotations": []}
                for text in self._told.texts
            ]
            item = {
                "type": "message",
                "role": "assistant",
                "status": "incomplete",
                "content": parts,
            }
            return orjson.dumps(
                {**self._top, "status": "incomplete", "output": [item] if parts else []}
            )
        kind = "chat.completion" if self.endpoint == CHAT else "text_completion"
        choices = [_whole(self._choices[index]) for index in sorted(self._choices)]
        return orjson.dumps({**self._top, "object": kind, "choices": choices})

    def _add_response_event(self, chunk: dict[str, Any]) -> None:
        kind = chunk.get("type")
        if not isinstance(kind, str):
            raise TypeError("an event without a `type`")
        if kind == "error":
            self.error = {
                "message": chunk.get("message"),
                "code": chunk.get("code"),
                "param": chunk.get("param"),
            }
            return
        self.says_more = self.says_more or self._final is not None
        self._told.add(chunk)
        if kind == "response.created":
            self._top = {k: v for k, v in chunk["response"].items() if k != "output"}
        elif kind in ("response.completed", "response.incomplete", "response.failed"):
            self._final = orjson.dumps(chunk["response"])
            self.says_more = self.says_more or not self._told.leads_to(chunk["response"])

    def _add_chunk(self, chunk: dict[str, Any]) -> None:
        for name, value in chunk.items():
            if name != "choices" and (value is not None or name not in self._top):
                self._top[name] = value
        for delta in chunk.get("choices") or ():
            index = delta.get("index") or 0
            if not isinstance(index, int):
                raise TypeError("an index must be a whole number")
            if index not in self._choices and len(self._choices) >= _MAX_INDEX:
                raise ValueError("too many choices")
            choice = self._choices.setdefault(index, {"index": index})
            self._add_choice(choice, delta)

    def _add_choice(self, choice: dict[str, Any], delta: dict[str, Any]) -> None:
        for name, value in delta.items():
            if name == "message" and "delta" in delta:
                self.says_more = True
            elif name in ("delta", "message"):
                choice["message"] = _grown(name, choice.get("message", {"content": None}), value)
            elif name == "logprobs":
                choice["logprobs"] = _extend(choice.get("logprobs"), value)
            elif name == "text":
                choice["text"] = _grown(name, choice.get("text"), value)
            elif name != "index" and (value is not None or name not in choice):
                choice[name] = value


#: Text that is whole each time it comes; all other text in a delta is a piece of something longer.
_WHOLE = frozenset({"role", "id", "type", "name", "object", "model", "index"})


def _grown(name: str, before: Any, value: Any) -> Any:
    """What a field is once a delta has said more of it: text and lists grow, the rest is replaced.

    Text is kept in a `StringIO`, so that a long answer costs linear time. `content` may turn from text into parts.
    """
    if name == "content" and isinstance(before, list) and isinstance(value, str):
        value = [{"type": "text", "text": value}]
    elif name == "content" and isinstance(before, StringIO) and isinstance(value, list):
        before = [{"type": "text", "text": before}]
    match before, value:
        case _, None:
            return before
        case None | StringIO(), str() if name not in _WHOLE:
            text = before or StringIO()
            text.write(value)
            return text
        case None | dict(), dict():
            fields = before or {}
            for key, more in value.items():
                fields[key] = _grown(key, fields.get(key), more)
            return fields
        case None | list(), list():
            return _grown_list(before or [], value)
        case None | str() | int() | float(), str() | int() | float():
            return value
    raise TypeError(f"{name} changes its type")


def _grown_list(into: list[Any], deltas: list[Any]) -> list[Any]:
    for number, delta in enumerate(deltas):
        index = delta.get("index") if isinstance(delta, dict) else None
        if index is None:
            goes_on = number == 0 and bool(into) and _continues(into[-1], delta)
            at = len(into) - goes_on
        elif isinstance(index, int):
            same = (
                n for n, i in enumerate(into) if isinstance(i, dict) and i.get("index") == index
            )
            at = next(same, len(into))
        else:
            raise TypeError("an index must be a whole number")
        if at >= _MAX_INDEX:
            raise ValueError("too many parts")
        into[at : at + 1] = [_grown("", into[at] if at < len(into) else None, delta)]
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


def _whole(choice: dict[str, Any]) -> dict[str, Any]:
    return choice | {name: _joined(choice[name]) for name in ("message", "text") if name in choice}


def _joined(value: Any, name: str = "") -> Any:
    """The value as JSON; tool calls lose the number that tells their pieces apart."""
    match value:
        case StringIO():
            return value.getvalue()
        case dict():
            return {key: _joined(inner, key) for key, inner in value.items()}
        case list() if name == "tool_calls":
            calls = [_joined(call) for call in value]
            return [
                {k: v for k, v in c.items() if k != "index"} for c in calls if isinstance(c, dict)
            ]
        case list():
            return [_joined(item) for item in value]
    return value


# --------------------------------------------------------------------------------------------------- event surgery


class _Choice(msgspec.Struct, gc=False):
    delta: Message | None = None
    message: Message | None = None
    text: str | None = None
    logprobs: msgspec.Raw = NO_RAW


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None


_CHUNK = msgspec.json.Decoder(_Chunk)


def event_without_logprobs(endpoint: str, event: Event) -> bytes:
    """The event's bytes with every `logprobs` value that says something nulled (emptied, for responses).

    An event that cannot be read is left as it is.
    """
    if event.data is None or b'"logprobs"' not in event.data:
        return event.raw
    try:
        data = _spliced(event.data) if endpoint != RESPONSES else None
        if data is None:
            chunk = orjson.loads(event.data)
            data = orjson.dumps(chunk) if _empty_logprobs(chunk) else event.data
    except (ValueError, TypeError, RecursionError):
        return event.raw
    if data == event.data:
        return event.raw
    before, _, after = event.raw.rpartition(event.data)
    return before + data + after if before else encode(data)


def _spliced(data: bytes) -> bytes | None:
    """The chunk with its logprobs cut out; None if they cannot be told from equal values elsewhere in it."""
    values = _logprobs(data)
    cut = data
    for value in values:
        cut = cut.replace(value, b"null", 1)
    return None if values and _logprobs(cut) else cut


def _logprobs(data: bytes) -> list[bytes]:
    raws = (bytes(choice.logprobs) for choice in _CHUNK.decode(data).choices or ())
    return [raw for raw in raws if says_something(raw)]


def _empty_logprobs(value: Any) -> bool:
    """Empty every `logprobs` in an object or array; whether there were any."""
    inner = value if isinstance(value, list) else value.values()
    found = [_empty_logprobs(each) for each in inner if isinstance(each, list | dict)]
    if isinstance(value, dict) and value.get("logprobs"):
        value["logprobs"] = [] if isinstance(value["logprobs"], list) else None
        return True
    return any(found)


# ------------------------------------------------------------------------------------------------------ taking apart


def stream_of(endpoint: str, body: bytes, *, include_usage: bool) -> Iterator[bytes]:
    """The events that say what this non-streamed body says, `[DONE]` last where the endpoint has one."""
    document = orjson.loads(body)
    if endpoint == RESPONSES:
        for told in responses.events_of(document):
            yield encode(orjson.dumps(told), told["type"])
        return
    usage = document.pop("usage", None)
    choices = document.pop("choices", [])
    document["object"] = "chat.completion.chunk" if endpoint == CHAT else "text_completion"
    pieces = _chat_pieces if endpoint == CHAT else _text_pieces
    for number, choice in enumerate(choices):
        if not isinstance(choice.get("index"), int):
            choice["index"] = number
        for piece in pieces(choice):
            yield encode(orjson.dumps({**document, "choices": [piece]}))
    if include_usage:
        yield encode(orjson.dumps({**document, "choices": [], "usage": usage}))
    yield DONE


def _text_pieces(choice: dict[str, Any]) -> Iterable[dict[str, Any]]:
    yield choice


def _chat_pieces(choice: dict[str, Any]) -> Iterable[dict[str, Any]]:
    message = {"role": "assistant", **(choice.get("message") or {})}
    calls = message.pop("tool_calls", None) or []
    begun = {name: value for name, value in message.items() if name == "role" or not value}
    begun["content"] = "" if isinstance(message.get("content"), str) else None
    said = {name: value for name, value in message.items() if name != "role" and value}
    told = {"logprobs": choice.get("logprobs")}
    silent = {"index": choice["index"], "logprobs": None, "finish_reason": None}
    yield {**silent, "delta": begun}
    if said or told["logprobs"]:
        yield {**silent, **told, "delta": said}
    for number, call in enumerate(calls):
        yield {**silent, "delta": {"tool_calls": [{**call, "index": number}]}}
    rest = {k: v for k, v in choice.items() if k not in ("message", "logprobs")}
    yield {**silent, **rest, "delta": {}}
