"""Which tokens wrote the answer, and which each value of a JSON answer.

Most tokens of a structured answer are scaffold: braces, keys, "The answer is". What is right or wrong stands in few others.
They are found by text: a passage is where it stands in what all tokens say put together, the last such place, so that
reasoning before it and special tokens around it do no harm. Where it does not stand there, nothing is located.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

import msgspec

from validators import Choice, Passage, TokenLogprob
from validators.location import scalar_spans, scalars
from validators.structure import fenced

#: Of so many passages of a choice, the last ones, the tokens are looked for.
_MAX_PASSAGES = 32

#: So much of a final line is looked at, its end.
_MAX_LINE_CHARS = 300

_LEADS = ("answer", "choice", "option", "result")
_LEAD = re.compile(
    rf".*\b(?:{'|'.join(_LEADS)})\b(?: is\b)?+[ :=*_`\"'(\[$]*+(?=[-+.\w])", re.IGNORECASE
)
_LETTER = re.compile(r"[*_`(\[]*+([A-Za-z])(?:[)\].:*_`]|$)")
_LAST_NUMBER = re.compile(r".*(?<![\w.,])(\d(?:[\d,]*\d)?(?:\.\d+)?(?:[eE][-+]?\d{1,3})?)")

_UTF8 = msgspec.json.Decoder(list[int] | None)

Span = tuple[int, int]


class Written:
    """A text as tokens wrote it: `ends` says where in what they say each one ends, `at` where in it the text begins.

    With `in_bytes` both count bytes of UTF-8, otherwise code points.
    """

    __slots__ = ("_at", "_ends", "_in_bytes", "_text")

    def __init__(self, text: str, ends: Sequence[int], at: int, *, in_bytes: bool) -> None:
        self._text, self._ends, self._at, self._in_bytes = text, ends, at, in_bytes

    def tokens(self, spans: Sequence[Span]) -> list[Span]:
        """The half-open ranges of the tokens that wrote any part of each span; spans come in order and are not empty."""
        at, ends = self._at, self._ends
        if self._in_bytes:
            spans = self._bytes_of(spans)
        return [(bisect_right(ends, at + a), bisect_left(ends, at + b) + 1) for a, b in spans]

    def _bytes_of(self, spans: Sequence[Span]) -> list[Span]:
        found, chars, size = [], 0, 0
        for start, end in spans:
            size += len(_as_bytes(self._text[chars:start]))
            width = len(_as_bytes(self._text[start:end]))
            found.append((size, size + width))
            chars, size = end, size + width
        return found


def written(
    tokens: Sequence[TokenLogprob], passages: Sequence[Passage]
) -> list[tuple[Passage, Written]]:
    r"""Those of these passages, which come in the order they were written in, that the tokens add up to.

    Tokens that split a character say so in ways of their own (`\xf0`, U+FFFD); then their bytes are put together instead.
    """
    passages = [each for each in passages if each.text.strip()][-_MAX_PASSAGES:]
    said, texts = [token.token for token in tokens], [each.text for each in passages]
    found, in_bytes = _located("".join(said), texts), False
    if None in found and any("\ufffd" in each or "\\x" in each for each in said):
        said, in_bytes = [_bytes_of(token) for token in tokens], True
        found = _located("".join(said), [_as_bytes(each) for each in texts])
    ends = list(accumulate(map(len, said)))
    return [
        (passage, Written(passage.text, ends, at, in_bytes=in_bytes))
        for passage, at in zip(passages, found, strict=True)
        if at is not None
    ]


def _located(whole: str, texts: Sequence[str]) -> list[int | None]:
    """Where each text stands, the last one as far back as it can be, each before the next."""
    if len(texts) == 1 and whole.endswith(texts[0]):
        return [len(whole) - len(texts[0])]
    # Looking from the end would take time that grows with the square of the length.
    backwards, position = whole[::-1], 0
    found: list[int | None] = []
    for text in reversed(texts):
        at = backwards.find(text[::-1], position)
        if at >= 0:
            position = at + len(text)
        found.append(None if at < 0 else len(whole) - position)
    return found[::-1]


def _as_bytes(text: str) -> str:
    """A character for each byte of a text in UTF-8."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("latin-1")


def _bytes_of(token: TokenLogprob) -> str:
    try:
        values = _UTF8.decode(token.utf8)
        return _as_bytes(token.token) if values is None else bytes(values).decode("latin-1")
    except (ValueError, msgspec.DecodeError):
        return _as_bytes(token.token)


def answer_tokens(choice: Choice) -> list[int]:
    """Which tokens wrote the answer of a choice, by number and in order; none where it cannot be located.

    The answer is, of tool calls, the values in their arguments. Of a text that is JSON, or has JSON in code fences, it is the
    values; of another its final line, and of that what follows "answer is" or the like if something does: a letter that
    stands alone, else the last number, else all of it.
    """
    if not choice.logprobs:
        return []
    said = [each for each in choice.texts or choice.refusals if each.text.strip()]
    passages = [call.arguments for call in choice.tool_calls] or said[-1:]
    found: list[int] = []
    done = 0
    for passage, by in written(choice.logprobs, passages):
        spans = _values(passage) or [final(passage.text)]
        for first, last in by.tokens(spans):
            found += range(first if first > done else done, last)
            done = last
    return found


def final(text: str) -> Span:
    r"""The span of the answer in a text that is not blank and no JSON; see `answer_tokens`.

    Examples
    --------
    >>> for text in ("So the answer is **(B)**.", "B) Paris", "3 + 4 = 7 apples", "It was\nin Paris.", "Answer: Paris."):
    ...     text[slice(*final(text))]
    'B'
    'B'
    '7'
    'in Paris.'
    'Paris'
    """
    end = len(text.rstrip())
    line = text[max(text.rfind("\n", 0, end) + 1, end - _MAX_LINE_CHARS) : end]
    begin = end - len(line)
    folded = line.casefold()
    # Most lines have none of them, and to find that out by the pattern takes ten times as long.
    led = _LEAD.match(line) if any(each in folded for each in _LEADS) else None
    at = led.end() if led else len(line) - len(line.lstrip())
    if letter := _LETTER.match(line, at):
        return begin + letter.start(1), begin + letter.end(1)
    if number := _LAST_NUMBER.match(line, at):
        start, stop = number.span(1)
        return begin + start - (start > at and line[start - 1] in "+-"), begin + stop
    return begin + at, begin + (len(line.rstrip(" .*_`\"')]")) if led else len(line))


def named_values(choice: Choice) -> Iterator[tuple[str, Span]]:
    """Each value of the JSON in texts and tool calls that can be located: its path and the range of the tokens that wrote it.

    A path names a value as a `Finding` does, `choices[0].message.content#/items/0/price`.
    """
    arguments = (call.arguments for call in choice.tool_calls)
    for passage, by in written(choice.logprobs or (), (*choice.texts, *arguments)):
        for offset, document in _documents(passage):
            named = list(scalars(document.text))
            spans = [(offset + start, offset + end) for _, (start, end) in named]
            for (where, _), tokens in zip(named, by.tokens(spans), strict=True):
                yield f"{passage.path}#{where}", tokens


def _values(passage: Passage) -> list[Span]:
    found: list[Span] = []
    for offset, document in _documents(passage):
        spans = scalar_spans(document.text)
        found += [(offset + start, offset + end) for start, end in spans] if offset else spans
    return found


def _documents(passage: Passage) -> Iterator[tuple[int, Passage]]:
    """Each JSON document in a passage, and where in it that begins."""
    if passage.is_json():
        yield 0, passage
    elif "```" in passage.text:
        for start, end in fenced(passage.text):
            document = Passage(passage.path, passage.text[start:end])
            if document.is_json():
                yield start, document
