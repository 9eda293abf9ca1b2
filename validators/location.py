"""Where in the text of a JSON document a value stands, found in one pass without recursion."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import orjson

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+"|[{}\[\],:]|[^\s{}\[\],:"]++', re.DOTALL)

#: Of valid JSON, past the key if it has one, a string, another scalar, or the beginning of an object or array.
_VALUE = re.compile(
    r'(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"\s*+:\s*+)?+'
    r'(?:"([^"\\]*+(?:\\.[^"\\]*+)*+)"|([^\s{}\[\],:"]++)|[{\[])',
    re.DOTALL,
)

#: Texts longer than this are not searched; a finding in them names the passage only.
MAX_TEXT_CHARS = 1 << 18

_MAX_POINTER_CHARS = 300

JsonPath = Sequence[str | int]


class Place(NamedTuple):
    """The smallest JSON value (or key) that holds a span: its pointer and span, and whether the span lies inside quotes."""

    pointer: str
    start: int
    end: int
    in_string: bool


class _Container:
    """An object or array that is being read, and which member of it."""

    __slots__ = ("expects_key", "is_object", "member", "start")

    def __init__(self, start: int, is_object: bool) -> None:
        self.start = start
        self.is_object = is_object
        self.expects_key = is_object
        self.member: str | int = "" if is_object else 0


def pointer(path: JsonPath) -> str:
    """The JSON pointer (RFC 6901) of a path; cut with an ellipsis after 300 characters.

    Examples
    --------
    >>> pointer(["items", 0, "a/b"])
    '/items/0/a~1b'
    """
    text = "".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in path)
    return text if len(text) <= _MAX_POINTER_CHARS else f"{text[:_MAX_POINTER_CHARS]}…"


def value_spans(
    text: str, paths: Sequence[JsonPath]
) -> dict[tuple[str | int, ...], tuple[int, int]]:
    """The spans of the values at these paths, as far as there are such values; the last one where a key is repeated.

    `text` is valid JSON; one longer than `MAX_TEXT_CHARS` gives no spans.
    """
    wanted: dict[tuple[int, str | int | None], set[tuple[str | int, ...]]] = {}
    for path in paths:
        last = path[-1] if path else None
        wanted.setdefault((len(path), last), set()).add(tuple(path))
    spans: dict[tuple[str | int, ...], tuple[int, int]] = {}
    for start, end, around, is_key in _walk(text):
        if is_key:
            continue
        last = around[-1].member if around else None
        for path in wanted.get((len(around), last), ()):
            if all(step == container.member for step, container in zip(path, around, strict=True)):
                spans[path] = start, end
    return spans


def scalar_spans(text: str) -> list[tuple[int, int]]:
    """The spans of the strings, numbers, booleans and nulls of valid JSON in order, keys left out; of strings without the quotes.

    An empty string keeps its quotes, so that no span is empty. A text longer than `MAX_TEXT_CHARS` gives no spans.

    Examples
    --------
    >>> text = '{"sku": "GA6", "qty": 4}'
    >>> [text[slice(*span)] for span in scalar_spans(text)]
    ['GA6', '4']
    """
    if len(text) > MAX_TEXT_CHARS:
        return []
    found = [match.span(match.lastindex) for match in _VALUE.finditer(text) if match.lastindex]
    return [(a, b) if a < b else (a - 1, b + 1) for a, b in found]


def scalars(text: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """The pointer and the span of every scalar of valid JSON, in order, spans as in `scalar_spans`.

    An object or array with nothing in it has none. A key that is repeated gives its pointer again.
    """
    for start, end, around, is_key in _walk(text):
        if not is_key and text[start] not in "{[":
            yield pointer([container.member for container in around]), _inside(text, start, end)


def _inside(text: str, start: int, end: int) -> tuple[int, int]:
    return (start + 1, end - 1) if text[start] == '"' and end - start > 2 else (start, end)


def places(text: str, spans: Sequence[tuple[int, int]]) -> list[Place | None]:
    """For each span of valid JSON text the smallest key or value around it, None where there is none."""
    found: list[Place | None] = [None] * len(spans)
    pending = sorted(range(len(spans)), key=lambda index: spans[index][1], reverse=True)
    open_ones: list[int] = []
    for start, end, around, _ in _walk(text):
        while pending and spans[pending[-1]][1] <= end:
            open_ones.append(pending.pop())
        for index in open_ones:
            if spans[index][0] >= start:
                found[index] = _place(text, start, end, around, spans[index])
        open_ones = [index for index in open_ones if found[index] is None]
        if not pending and not open_ones:
            break
    return found


def _place(
    text: str, start: int, end: int, around: Sequence[_Container], span: tuple[int, int]
) -> Place:
    where = pointer([container.member for container in around])
    inside = text[start] == '"' and start < span[0] and span[1] < end
    return Place(where, start, end, inside)


def _walk(text: str) -> Iterator[tuple[int, int, list[_Container], bool]]:
    """Every key and value in the order they end: start, end, the containers around it, and whether it is a key.

    The list is the live stack; read it before going on.
    """
    if len(text) > MAX_TEXT_CHARS:
        return
    stack: list[_Container] = []
    for token in _TOKEN.finditer(text):
        first = text[token.start()]
        if first in "{[":
            stack.append(_Container(token.start(), first == "{"))
        elif first in "}]":
            yield stack.pop().start, token.end(), stack, False
        elif first == ",":
            _next_member(stack[-1])
        elif first != ":":
            is_key = bool(stack) and stack[-1].expects_key
            if is_key:
                stack[-1].member = orjson.loads(token[0])
                stack[-1].expects_key = False
            yield token.start(), token.end(), stack, is_key


def _next_member(container: _Container) -> None:
    if isinstance(container.member, int):
        container.member += 1
    else:
        container.expects_key = True
