"""Streams of the Responses API: whether what their events say is what the response says, and a response told as events.

References
----------
OpenAI API document, `ResponseStreamEvent`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import StringIO
from typing import Any

#: A way into a response: names and positions, outermost first.
_Place = tuple[str | int, ...]

#: Which text the deltas of a kind of event are pieces of.
_DELTAS = {
    "response.output_text.delta": "text",
    "response.refusal.delta": "refusal",
    "response.reasoning_text.delta": "text",
    "response.reasoning_summary_text.delta": "text",
    "response.function_call_arguments.delta": "arguments",
    "response.mcp_call_arguments.delta": "arguments",
    "response.custom_tool_call_input.delta": "input",
    "response.code_interpreter_call_code.delta": "code",
}
#: Fields of events that hold a part of the response, and how much of the event's place is where that is.
_HOLDERS = {"response": 0, "item": 2, "part": 4}
#: What says nothing to a reader, or may change while a response is made.
_UNSPOKEN = frozenset(
    {"type", "id", "item_id", "status", "model", "service_tier", "encrypted_content", "logprobs", "obfuscation"}
)  # fmt: skip
_INDICES = {"output_index": "output", "content_index": "content", "summary_index": "summary"}
_DELTA_FIELDS = {"delta", "sequence_number", *_UNSPOKEN, *_INDICES}

#: What an item says before it has said anything.
_HOLLOW: dict[str, Any] = {"content": [], "summary": [], "arguments": "", "input": "", "code": ""}
#: Items that say one text, and the name of the events that do.
_LONE_TEXTS = {
    "function_call": ("arguments", "function_call_arguments"),
    "mcp_call": ("arguments", "mcp_call_arguments"),
    "custom_tool_call": ("input", "custom_tool_call_input"),
    "code_interpreter_call": ("code", "code_interpreter_call_code"),
}
_Emit = Callable[..., dict[str, Any]]


class Told:
    """What the events of a stream have said, each thing in its place in the response."""

    def __init__(self) -> None:
        self._deltas: dict[_Place, StringIO] = {}
        self._claims: list[tuple[_Place, Any]] = []

    @property
    def texts(self) -> list[str]:
        """The texts that came as deltas, put together."""
        return [text.getvalue() for text in self._deltas.values()]

    def add(self, event: dict[str, Any]) -> None:
        """Take in what an event says; `TypeError` or `KeyError` if it has not the shape of its kind."""
        place = _place(event)
        key = _DELTAS.get(event["type"])
        if key is not None:
            self._deltas.setdefault((*place, key), StringIO()).write(event["delta"])
            if event.keys() <= _DELTA_FIELDS:
                return
        for name, value in event.items():
            if name == "delta" and key is not None:
                continue
            if name in _HOLDERS:
                self._claims.append((place[: _HOLDERS[name]], value))
            elif name == "annotation":
                self._claims.append(((*place, "annotations", event["annotation_index"]), value))
            elif name not in _UNSPOKEN and not isinstance(value, int | float | None):
                self._claims.append(((*place, name), value))

    def leads_to(self, response: dict[str, Any]) -> bool:
        """Whether the response says all of it, in the same places."""
        claims = [*self._claims, *((at, text.getvalue()) for at, text in self._deltas.items())]
        return all(_leads_to(value, _at(response, place)) for place, value in claims)


def events_of(response: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The events that tell a response, in order."""
    numbered = 0

    def emit(kind: str, **fields: Any) -> dict[str, Any]:
        nonlocal numbered
        numbered += 1
        return {"type": kind, "sequence_number": numbered - 1, **fields}

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
        hollow = {**item, "status": "in_progress", **{k: _HOLLOW[k] for k in _HOLLOW if k in item}}
        yield emit("response.output_item.added", output_index=position, item=hollow)
        yield from _item_events(emit, position, item)
        yield emit("response.output_item.done", output_index=position, item=item)
    status = response.get("status")
    final = status if status in ("completed", "incomplete", "failed") else "completed"
    yield emit(f"response.{final}", response=response)


def _place(chunk: dict[str, Any]) -> _Place:
    """Where in the response an event is at work."""
    place: _Place = ()
    for index, name in _INDICES.items():
        if index in chunk:
            place += (name, chunk[index])
    return place


def _at(value: Any, place: _Place) -> Any:
    """What is there; None if nothing is."""
    for step in place:
        if isinstance(step, str) and isinstance(value, dict):
            value = value.get(step)
        elif isinstance(step, int) and isinstance(value, list) and 0 <= step < len(value):
            value = value[step]
        else:
            return None
    return value


def _leads_to(early: Any, final: Any) -> bool:
    """Whether all that is said early, in texts however deep, is said in the same place in the end."""
    if isinstance(early, str):
        return not early or early == final
    if isinstance(early, dict):
        inner: Any = final if isinstance(final, dict) else {}
        return all(
            _leads_to(value, inner.get(name))
            for name, value in early.items()
            if name not in _UNSPOKEN
        )
    if isinstance(early, list):
        inner = final if isinstance(final, list) else []
        return all(_leads_to(value, _at(inner, (at,))) for at, value in enumerate(early))
    return True


def _item_events(emit: _Emit, position: int, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
    where = {"item_id": item.get("id") or "", "output_index": position}
    kind = item.get("type")
    if kind in _LONE_TEXTS:
        key, name = _LONE_TEXTS[kind]
        told = {"name": item["name"]} if kind == "function_call" and "name" in item else {}
        if isinstance(item.get(key), str) and item[key]:
            yield emit(f"response.{name}.delta", **where, delta=item[key])
            yield emit(f"response.{name}.done", **where, **told, **{key: item[key]})
    elif kind == "message":
        for number, part in _parts(item, "content"):
            place = {**where, "content_index": number}
            key = "refusal" if part.get("type") == "refusal" else "text"
            name = "refusal" if key == "refusal" else "output_text"
            more = {"logprobs": part.get("logprobs") or []} if key == "text" else {}
            yield emit("response.content_part.added", **place, part={**part, key: ""})
            yield from _text_events(emit, name, key, place, part, more)
            yield emit("response.content_part.done", **place, part=part)
    elif kind == "reasoning":
        for number, part in _parts(item, "summary"):
            place = {**where, "summary_index": number}
            name = "reasoning_summary"
            yield emit(f"response.{name}_part.added", **place, part={**part, "text": ""})
            yield from _text_events(emit, f"{name}_text", "text", place, part, {})
            yield emit(f"response.{name}_part.done", **place, part=part)
        for number, part in _parts(item, "content"):
            place = {**where, "content_index": number}
            yield from _text_events(emit, "reasoning_text", "text", place, part, {})


def _parts(item: dict[str, Any], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    parts = item.get(name)
    yield from enumerate(parts if isinstance(parts, list) else ())


def _text_events(
    emit: _Emit,
    name: str,
    key: str,
    place: dict[str, Any],
    part: dict[str, Any],
    more: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    if part.get(key):
        yield emit(f"response.{name}.delta", **place, delta=part[key], **more)
        yield emit(f"response.{name}.done", **place, **{key: part[key]}, **more)
