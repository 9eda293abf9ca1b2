r"""Text as a reader would see it, with the way back to the text as it was written.

A rule that looks for `password` must also find it written with a zero-width space inside, in full-width letters, or as
`\u0070assword` in JSON. Each rewriting keeps a map of offsets, so that a finding always points at the original.
"""

from __future__ import annotations

import re
import string
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from functools import cache

#: Characters that are not seen: soft hyphen, joiners, direction marks, invisible operators, variation selectors, tags
#: (Unicode 15, `Default_Ignorable_Code_Point` as far as text can carry it).
_HIDDEN = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\u3164\ufe00-\ufe0f\ufeff\uffa0\U000e0000-\U000e0fff]"
)
_JSON_ESCAPE = re.compile(r'\\(?:u[0-9a-fA-F]{4}(?:\\u[dD][c-fC-F][0-9a-fA-F]{2})?|["\\/bfnrt])')
#: An escape that the end of the text cuts off, or one that more text may make half of a pair; or a whole one.
_UNFINISHED = re.compile(
    r"(?P<cut>\\(?:u[dD][89abAB][0-9a-fA-F]{2}(?:\\(?:u(?:[dD](?:[c-fC-F][0-9a-fA-F]?)?)?)?)?|u[0-9a-fA-F]{0,3})?\Z)|"
    + _JSON_ESCAPE.pattern
)
_SHORT_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}

#: Of ASCII, what can become another character with a mark behind it.
_JOINED = frozenset(("<", "=", ">", *string.ascii_letters))

#: Letters of other scripts that look like those of ASCII, and signs that look like a hyphen (after UTS #39, section 4, and
#: its confusables.txt; one character for one, none that marks can make of another).
_LOOKS = str.maketrans(
    "асԁеһіјӏорԛѕѵԝхуүкАВСЕНІЈКМОРЅТХУѴԚԜҮ"  # Cyrillic
    "ανγικορσυχϳΑΒΕΖΗΙΚΜΝΟΡΤΥΧ"  # Greek
    "օոսհցզՏՕԼ"  # Armenian
    "ᎠᎡᎢᎪᎬᎷᎻᏀᏃᏔᏚᏞᏟᏢᏦᏴ"  # Cherokee
    "ıɑɡɩ\u2010\u2012\u2013\u2212",
    "acdehijlopqsvwxyykABCEHIJKMOPSTXYVQWY"
    "avyikopouxjABEZHIKMNOPTYX"
    "onuhgqSOL"
    "DRTAEMHGZWSLCPKB"
    "iagi----",
)
_LOOKS_LIKE_ASCII = re.compile("[" + "".join(map(chr, _LOOKS)) + "]")

#: How often escapes are undone: in JSON, and in JSON in one of its strings.
_MAX_LEVELS = 2

#: Longest run of marks treated as one character; the stream-safe format of UAX #15 allows 30.
_MAX_CLUSTER = 32


class View:
    """A text to search: `text`, its UTF-8 `data`, and `original` to turn its spans into spans of the text written.

    Offsets are code points. `ascii` is true when bytes and code points coincide.
    """

    __slots__ = ("_base", "_pieces", "_starts", "ascii", "data", "text")

    def __init__(
        self,
        text: str,
        base: View | None = None,
        pieces: list[tuple[int, int, bool]] | None = None,
        starts: list[int] | None = None,
    ) -> None:
        self.text = text
        self.data = text.encode("utf-8", "replace")
        self.ascii = len(self.data) == len(text)
        self._base = base
        self._pieces = pieces or []
        self._starts = starts or []

    def original(self, start: int, end: int) -> tuple[int, int]:
        """The smallest span of the original text that holds what became `text[start:end]`; `start < end`."""
        if self._base is None:
            return start, end
        first = bisect_right(self._starts, start) - 1
        last = bisect_right(self._starts, end - 1) - 1
        begin, _, kept = self._pieces[first]
        if kept:
            begin += start - self._starts[first]
        origin, finish, kept = self._pieces[last]
        if kept:
            finish = origin + end - self._starts[last]
        return self._base.original(begin, finish)

    def byte(self, position: int) -> int:
        """Where in `data` a place in `text` is."""
        return position if self.ascii else len(self.text[:position].encode("utf-8", "replace"))

    def position(self, offset: int) -> int:
        """The first place in `text` that comes from `offset` of the original text or from behind it."""
        if self._base is None:
            return offset
        inner = self._base.position(offset)
        index = bisect_right(self._pieces, inner, key=lambda piece: piece[0]) - 1
        if index < 0:
            return 0
        begin, finish, kept = self._pieces[index]
        if inner == begin or (kept and inner < finish):
            return self._starts[index] + inner - begin
        return self._starts[index + 1] if index + 1 < len(self._starts) else len(self.text)


def views(text: str, *, is_json: bool) -> tuple[View, ...]:
    r"""The text as written, then, where it differs, what a reader may make of it.

    First JSON escapes are undone and it is folded (NFKC, hidden characters dropped). The same again if escapes are left, as in
    JSON in a JSON string. Of each of these one more has ASCII in place of the letters of other scripts that look like it.
    Of JSON the escapes are undone in the first view too: there `\u0041` is no more than another way to write a letter.
    Linear in the length of the text; for plain ASCII without a backslash a single view.
    """
    written = View(text)
    if written.ascii and "\\" not in text:
        return (written,)
    levels = [written]
    while len(levels) <= _MAX_LEVELS and "\\" in levels[-1].text:
        levels.append(_rewritten(levels[-1], _escapes(levels[-1].text)))
    seen = [levels[min(is_json, len(levels) - 1)]]
    for level in levels[1:] or levels:
        folded = level if level.ascii else _rewritten(level, _clusters(level.text))
        seen.append(folded)
        if not folded.ascii and _LOOKS_LIKE_ASCII.search(folded.text):
            whole = [(0, len(folded.text), True)]
            seen.append(View(folded.text.translate(_LOOKS), folded, whole, [0]))
    return tuple(dict.fromkeys(seen))


class Growing:
    """A text of which more is to come, unless it has `ended`.

    Matches are looked for from `start` on; what is before that was looked at, and is only there to be looked back at. If it
    `may_be_json`, `views` are those of JSON and those of any other text.
    What comes may still change the `views`: from `settled` on the last character, made from one of `bases`, which marks
    may join; from `marks` on the marks it has; from `cut` on everything, where an escape is unfinished. All are the length
    of the text where nothing can change.
    """

    __slots__ = ("bases", "cut", "ended", "marks", "settled", "start", "text", "views")

    def __init__(
        self, text: str, start: int = 0, *, ended: bool = False, may_be_json: bool = False
    ) -> None:
        self.text = text
        self.start = start
        self.ended = ended
        self.views = views(text, is_json=False)
        if may_be_json and "\\" in text:
            self.views = (self.views[0], *views(text, is_json=True))
        self.settled = self.marks = self.cut = len(text)
        self.bases = ""
        if not ended:
            self._unsettle()

    def context(self, offset: int) -> int:
        """Where the text before `offset` may be cut off so that every view still shows two characters before it."""
        begins = [len(self.text)]
        for view in self.views:
            first = view.position(offset) - 2
            begins.append(view.original(first, first + 1)[0] if first > 0 else 0)
        return min(begins)

    def _unsettle(self) -> None:
        level = View(self.text)
        for number in range(_MAX_LEVELS):
            if "\\" in level.text:
                cuts = (match.start() for match in _UNFINISHED.finditer(level.text) if match["cut"])
                cut = next(cuts, len(level.text))
                if cut < len(level.text):
                    self.cut = level.original(cut, cut + 1)[0]
                    level = View(level.text[:cut], level, [(0, cut, True)], [0])
                level = _rewritten(level, _escapes(level.text))
            elif number:
                break
            self._unsettle_end(level)
        self.settled = min(self.settled, self.cut)
        self.marks = min(self.marks, self.cut)

    def _unsettle_end(self, read: View) -> None:
        """See what marks may still make of the end of the text, with escapes undone."""
        chars = read.text
        size = marks = len(chars)
        while marks and chars[marks - 1] > "\x7f" and _joins(chars[marks - 1]):
            marks -= 1
        first = marks
        if marks and (chars[marks - 1] > "\x7f" or chars[marks - 1] in _JOINED):
            first -= 1
        if first == size:
            return
        first += (size - 1 - first) // _MAX_CLUSTER * _MAX_CLUSTER
        marks = max(marks, first)
        self.bases += unicodedata.normalize("NFKD", chars[first])
        settled = read.original(first, first + 1)[0]
        self.settled = min(self.settled, settled)
        if len(unicodedata.normalize("NFKC", chars[first])) != 1:
            self.marks = min(self.marks, settled)
        elif marks < size:
            self.marks = min(self.marks, read.original(marks, marks + 1)[0])


@cache
def composed() -> Mapping[str, str]:
    """What marks can make of a character, by the character that it is without marks; the marks themselves under "".

    All in normal form (NFKC), as in the last view of a text.
    """
    made: dict[str, str] = {}
    for char in map(
        chr, (*range(0xA0, 0xD7A4), *range(0x10A00, 0x12000), *range(0x1D100, 0x1EA00))
    ):
        apart = unicodedata.normalize("NFD", char)
        base = "" if _joins(char) else apart[0]
        if base != char and unicodedata.is_normalized("NFKC", char) and not _HIDDEN.match(char):
            made[base] = made.get(base, "") + char
    return made


def _rewritten(base: View, changes: Iterator[tuple[int, int, str]]) -> View:
    """`base` with each (start, end, new text) put in place; `base` itself if there is none."""
    text = base.text
    out: list[str] = []
    pieces: list[tuple[int, int, bool]] = []
    starts: list[int] = []
    done = length = 0

    def put(begin: int, finish: int, new: str, kept: bool) -> None:
        nonlocal length
        if new:
            out.append(new)
            pieces.append((begin, finish, kept))
            starts.append(length)
            length += len(new)

    for begin, finish, new in changes:
        put(done, begin, text[done:begin], True)
        put(begin, finish, new, False)
        done = finish
    if not done:
        return base
    put(done, len(text), text[done:], True)
    return View("".join(out), base, pieces, starts)


def _escapes(text: str) -> Iterator[tuple[int, int, str]]:
    for match in _JSON_ESCAPE.finditer(text):
        escape = match[0]
        if escape[1] != "u":
            yield match.start(), match.end(), _SHORT_ESCAPES.get(escape[1], escape[1])
            continue
        unit = int(escape[2:6], 16)
        if len(escape) == 12 and 0xD800 <= unit < 0xDC00:
            low = int(escape[8:], 16)
            yield match.start(), match.end(), chr(0x10000 + ((unit - 0xD800) << 10) + low - 0xDC00)
        else:
            yield match.start(), match.start() + 6, chr(unit)
            if len(escape) == 12:
                yield match.start() + 6, match.end(), "\ufffd"


def _clusters(text: str) -> Iterator[tuple[int, int, str]]:
    """Each character with its marks that NFKC, or dropping what is hidden, changes."""
    if not _HIDDEN.search(text) and unicodedata.is_normalized("NFKC", text):
        return
    changed = {char: unicodedata.normalize("NFKC", char) for char in set(text) if char > "\x7f"}
    changed |= {char: "" for char in changed if _HIDDEN.match(char)}
    joins = {char for char in changed if _joins(char)}
    special = {char for char, new in changed.items() if new != char} | joins
    done = 0
    for index, char in enumerate(text):
        if char not in special or index < done:
            continue
        begin = index - 1 if char in joins and index > done else index
        finish = index + 1
        while finish < len(text) and finish - begin < _MAX_CLUSTER and text[finish] in joins:
            finish += 1
        done = finish
        if finish - begin == 1:
            new = changed[char]
        else:
            new = unicodedata.normalize("NFKC", _HIDDEN.sub("", text[begin:finish]))
        if new == text[begin:finish]:
            continue
        if finish - begin == 1 or text[begin] in joins or len(changed.get(text[begin], "?")) != 1:
            yield begin, finish, new
            continue
        # Only the first character may come from the one that has the marks: what begins behind it begins with the marks.
        if new[:1] != text[begin]:
            yield begin, finish, new[:1]
        yield begin + 1, finish, new[1:]


def _joins(char: str) -> bool:
    """Whether a character may change what stands before it: a mark, a Hangul vowel or final, or hidden."""
    return (
        unicodedata.category(char)[0] == "M"
        or "\u1160" <= char <= "\u11ff"
        or _HIDDEN.match(char) is not None
    )
