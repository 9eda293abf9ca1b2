r"""What an RE2 pattern is made of: how wide its matches are, and what the beginning of one looks like.

A text that ends in `pass` may go on to be a match of `password\b`. `Part.begun` says so as a pattern of its own: it matches
every text that is the beginning of a match and could, with more text, become one or become a longer one. Of a sequence
`ab` that is what begins `a`, or `a` and then what begins `b`; of `a{2,5}` up to four times `a` and then what begins `a`.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

TOKEN = re.compile(
    r"""
    (?P<quote>\\Q(?:.*?)(?:\\E|\Z))
  | (?P<set>\[\^?\]?(?:\[:\^?\w+:\]|\\.|[^\]\\])*+\])
  | (?P<escape>\\(?:x\{[0-9A-Fa-f]*\}|x[0-9A-Fa-f]{2}|[pP](?:\{[^}]*\}|.)
        |[kg](?:<\w*>|\{\w*\}|'\w*')|u[0-9A-Fa-f]{4}|c[A-Za-z]|[0-7]{1,3}|.))
  | (?P<group>\((?:\?(?:P?<[A-Za-z_]\w*>|P[=>]\w*\)?|[A-Za-z-]*:|[A-Za-z-]*\)|<[=!]|.))?)
  | (?P<repeat>(?:[*+?]|\{\d+(?:,\d*)?\})[?+]?)
  | (?P<alt>\|) | (?P<close>\)) | (?P<anchor>[\^$]) | (?P<char>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_ZERO_WIDTH = ("\\b", "\\B", "\\A", "\\z")
_MAX_CHARS = 400_000


class Part(NamedTuple):
    """A part of a pattern that says the same wherever it stands.

    `shortest` and `longest` are widths in code points, `longest` may be infinite. `text` is the part written out, `begun`
    matches what may still become a match of it, the empty text too; either is None if it would be too large. `first` are
    patterns for the character a match begins with.
    """

    shortest: int = 0
    longest: float = 0
    text: str | None = ""
    begun: str | None = ""
    first: frozenset[str] = frozenset()


def read(pattern: str) -> Part:
    """The whole of a pattern that RE2 accepts."""
    groups = [_Group("")]
    for token in TOKEN.finditer(pattern):
        kind, text, group = token.lastgroup, token[0], groups[-1]
        if kind == "group":
            flags = _flags(group.flags, text)
            if text.endswith(")"):
                group.flags = flags
            else:
                groups.append(_Group(flags))
        elif kind == "close":
            groups.pop()
            groups[-1].parts.append(group.whole())
        elif kind == "alt":
            group.split()
        elif kind == "repeat":
            group.parts.append(_repeated(group.parts.pop(), *counts(text)))
        elif kind == "quote":
            chars = text[2:].removesuffix("\\E")
            group.parts += [_char(char, group.flags) for char in chars]
        elif kind == "char" and text != ".":
            group.parts.append(_char(text, group.flags))
        else:
            group.parts.append(_leaf(text, group.flags))
    return groups[0].whole()


def counts(repeat: str) -> tuple[int, float]:
    """How often `*`, `+`, `?` or `{n,m}` repeats at least and at most."""
    match repeat[0]:
        case "*":
            return 0, math.inf
        case "+":
            return 1, math.inf
        case "?":
            return 0, 1
    low, comma, high = repeat.rstrip("?+")[1:-1].partition(",")
    if not comma:
        return int(low), int(low)
    return int(low), int(high) if high else math.inf


class _Group:
    """What is between two parentheses, while it is read."""

    def __init__(self, flags: str) -> None:
        self.flags = flags
        self.parts: list[Part] = []
        self._branches: list[Part] = []

    def split(self) -> None:
        """Begin another alternative."""
        self._branches.append(_sequence(self.parts))
        self.parts = []

    def whole(self) -> Part:
        """The group closed."""
        self.split()
        branches = self._branches
        if len(branches) == 1:
            return branches[0]
        return Part(
            min(branch.shortest for branch in branches),
            max(branch.longest for branch in branches),
            _either(*(branch.text for branch in branches)),
            _either(*(branch.begun for branch in branches)),
            frozenset().union(*(branch.first for branch in branches)),
        )


def _flags(flags: str, group: str) -> str:
    """The flags in force inside a group, or behind one that only sets flags."""
    if not group.startswith("(?") or group[2] in "P<":
        return flags
    added, _, removed = group[2:-1].partition("-")
    return "".join(flag for flag in "ims" if flag in flags + added and flag not in removed)


def _char(char: str, flags: str) -> Part:
    return _leaf(re.escape(char), flags if char.lower() != char.upper() else "")


def _leaf(text: str, flags: str) -> Part:
    anchor = text in ("^", "$")
    matters = "m" if anchor else "s" if text == "." else "i"
    spelt = f"(?{matters}:{text})" if matters in flags else text
    if anchor or text in _ZERO_WIDTH:
        return Part(text=spelt)
    return Part(1, 1, spelt, first=frozenset((spelt,)))


def _sequence(parts: list[Part]) -> Part:
    first: frozenset[str] = frozenset()
    for part in parts:
        first |= part.first
        if part.shortest:
            break
    return Part(
        sum(part.shortest for part in parts),
        sum(part.longest for part in parts),
        _joined(*(part.text for part in parts)),
        _begun(parts),
        first,
    )


def _begun(parts: list[Part]) -> str | None:
    """What begins a sequence; halving it keeps the result short and its nesting flat."""
    if len(parts) < 2:
        return parts[0].begun if parts else ""
    left, right = parts[: len(parts) // 2], parts[len(parts) // 2 :]
    return _either(_begun(left), _joined(*(part.text for part in left), _begun(right)))


def _repeated(part: Part, low: int, high: float) -> Part:
    if not high:
        return Part()
    bounded = high < math.inf
    up_to, before = (int(high), f"{{0,{int(high) - 1}}}") if bounded else ("", "*")
    return Part(
        part.shortest * low,
        part.longest * high if part.longest else 0,
        _joined(_either(part.text), f"{{{low},{up_to}}}"),
        _joined(_either(part.text), before, part.begun),
        part.first,
    )


def _joined(*texts: str | None) -> str | None:
    """Patterns one after the other; None if one is missing, or the whole is too large."""
    known = [text for text in texts if text is not None]
    fits = len(known) == len(texts) and sum(map(len, known)) <= _MAX_CHARS
    return "".join(known) if fits else None


def _either(*texts: str | None) -> str | None:
    joined = _joined(*texts)
    return None if joined is None else _joined("(?:", "|".join(map(str, texts)), ")")
