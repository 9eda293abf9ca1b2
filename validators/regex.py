"""RE2 patterns: compiled with bounds, explained when RE2 refuses them, and measured.

RE2 runs in time linear in the text whatever the pattern, which is why policies may bring their own. What it leaves out for
that (look-around, back-references) is listed at https://github.com/google/re2/wiki/Syntax.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, NamedTuple

import re2

from validators.syntax import TOKEN, counts, read

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_MAX_MEM_BYTES = 16 << 20
_MAX_PATTERN_CHARS = 10_000
_MAX_BEGINNINGS_CHARS = 400_000
#: RE2 instructions; from some 150,000 on the automaton outgrows its memory and every search takes milliseconds.
_MAX_BEGINNINGS_SIZE = 100_000


class _Refusal(NamedTuple):
    """A construct RE2 does not run: how it is spelt, its name, and what to write instead."""

    spelling: re.Pattern[str]
    name: str
    instead: str


def _refusals(*rows: tuple[str, str, str]) -> tuple[_Refusal, ...]:
    return tuple(_Refusal(re.compile(spelling), name, instead) for spelling, name, instead in rows)


_ALTERNATIVES = "write the possible texts out as alternatives, (?:a.*a|b.*b)"
_REFUSED_GROUPS = _refusals(
    (
        r"\(\?=",
        "look-ahead",
        "match the text that follows as part of the pattern, or end it with \\b",
    ),
    (r"\(\?!", "negative look-ahead", "name the characters that may follow, such as (?:[^x]|$)"),
    (
        r"\(\?<=",
        "look-behind",
        "match the text before as part of the pattern, or begin it with \\b",
    ),
    (
        r"\(\?<!",
        "negative look-behind",
        "name the characters that may stand before, as in (?:^|[^x])",
    ),
    (r"\(\?>", "an atomic group", "write (?:...); RE2 never backtracks, so nothing is lost"),
    (r"\(\?P=", "a back-reference", _ALTERNATIVES),
    (r"\(\?(?:P>|R|&|\d)", "recursion", "write the nesting out to the depth you need"),
    (r"\(\?\(", "a conditional group", "write both cases as alternatives, (?:...|...)"),
    (r"\(\?\|", "a branch reset", "write (?:...|...)"),
    (r"\(\?#", "a comment", "put it in the YAML, after #"),
    (r"\(\?[A-Za-z-]*x", "the flag x", "remove the white space and comments from the pattern"),
    (r"\(\?[imsU-]*[^\WimsUP]", "that flag", "use only the flags i, m, s and U"),
)
_REFUSED_ESCAPES = _refusals(
    (r"\\[1-9]$", "a back-reference", _ALTERNATIVES),
    (r"\\[kg].+", "a back-reference", _ALTERNATIVES),
    (r"\\Z", "\\Z", "write \\z"),
    (r"\\G", "\\G", "leave it out"),
    (r"\\K", "\\K", "leave it out; the whole match is reported"),
    (r"\\h", "\\h", "write [ \\t]"),
    (r"\\H", "\\H", "write [^ \\t]"),
    (r"\\R", "\\R", "write (?:\\r\\n|\\n|\\r)"),
    (r"\\N", "\\N", "write [^\\n]"),
    (r"\\X", "\\X", "write (?:.\\pM*)"),
    (r"\\e", "\\e", "write \\x1b"),
    (r"\\u", "\\u", "write the code point as \\x{...}"),
    (r"\\c", "\\c", "write the code point as \\x01 to \\x1a"),
)


def compile_re2(pattern: str) -> re2._Regexp:
    """The compiled pattern, without capture groups, using at most 16 MiB.

    Raises
    ------
    ValueError
        If RE2 refuses it; the message says what, where, and how to write it instead.
    """
    if len(pattern) > _MAX_PATTERN_CHARS:
        raise ValueError(
            f"the pattern has {len(pattern)} characters, at most {_MAX_PATTERN_CHARS} are allowed"
        )
    try:
        compiled = re2.compile(pattern, re2_options())
    except re2.error as error:
        raise ValueError(_explanation(pattern, error)) from error
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the pattern is not text: {error.reason} at offset {error.start}"
        ) from error
    for token in TOKEN.finditer(pattern):
        if token[0] == "\\C":
            raise ValueError(
                f"\\C at offset {token.start()} matches half a character: write (?s:.)"
            )
    return compiled


def re2_options() -> re2.Options:
    """Options every pattern is compiled with: bounded memory, no captures, nothing printed."""
    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    options.max_mem = _MAX_MEM_BYTES
    return options


def explain_re2(pattern: str) -> str:
    """What RE2 refuses in a pattern, at which offset, and what to write instead; empty if it is accepted."""
    try:
        compile_re2(pattern)
    except ValueError as error:
        return str(error)
    return ""


def max_match_length(pattern: str) -> int | None:
    """The longest text the pattern can match, in code points; None if there is no bound.

    Raises
    ------
    ValueError
        If RE2 refuses the pattern.

    Examples
    --------
    >>> max_match_length(r"(?i)colou?r|gr[ae]y{1,3}"), max_match_length("a+")
    (6, None)
    """
    compile_re2(pattern)
    longest = match_widths(pattern)[1]
    return None if longest == math.inf else int(longest)


def match_widths(pattern: str) -> tuple[int, float]:
    """The shortest and the longest match of an accepted pattern in code points; the longest may be infinite."""
    return read(pattern)[:2]


def compile_beginnings(patterns: Iterable[str]) -> re2._Regexp | None:
    r"""A pattern that finds, at the end of a text, what may still become a match of one of some accepted patterns.

    Its match is the longest such end of the text, empty if there is none: `\bno` finds `n` in `yes, n`, nothing in `yes, no`
    (that is a match already) and nothing in `yes`. What a longer text decides, such as a `\b` or `$` at the end of the text,
    counts as possible. None if it would be too large to run fast.
    """
    begun = [read(pattern).begun for pattern in patterns]
    if sum(len(each or "") for each in begun) > _MAX_BEGINNINGS_CHARS or None in begun:
        return None
    try:
        compiled = re2.compile(f"(?:{'|'.join(map(str, begun))})\\z", re2_options())
    except re2.error:
        return None
    return compiled if compiled.reverseprogramsize <= _MAX_BEGINNINGS_SIZE else None


def _explanation(pattern: str, error: re2.error) -> str:
    for token in TOKEN.finditer(pattern):
        problem = _problem(token)
        if problem:
            name, instead = problem
            return (
                f"RE2 does not know {name} (`{token[0][:20]}` at offset {token.start()}): {instead}"
            )
    raw = error.args[0] if error.args else b""
    reason = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else str(raw)
    at = pattern.rfind(reason.rpartition(": ")[2]) if ": " in reason else -1
    where = f" at offset {at}" if at >= 0 else ""
    if "repetition size" in reason:
        return f"{reason}{where}: repetitions, and the product of nested ones, may not exceed 1000"
    return f"{reason}{where}"


def _problem(token: re.Match[str]) -> tuple[str, str] | None:
    text = token[0]
    match token.lastgroup:
        case "group":
            return _refused(text, _REFUSED_GROUPS)
        case "escape":
            return _refused(text, _REFUSED_ESCAPES)
        case "set":
            found = (_refused(escape, _REFUSED_ESCAPES) for escape in _set_escapes(text))
            return next((problem for problem in found if problem), None)
        case "repeat":
            return _repeat_problem(text)
    return None


def _set_escapes(text: str) -> Iterator[str]:
    return (match[0] for match in re.finditer(r"\\.", text))


def _refused(text: str, refusals: tuple[_Refusal, ...]) -> tuple[str, str] | None:
    for refusal in refusals:
        if refusal.spelling.match(text):
            return refusal.name, refusal.instead
    return None


def _repeat_problem(text: str) -> tuple[str, str] | None:
    if len(text) > 1 and text.endswith("+"):
        return (
            "a possessive repetition",
            f"write {text[:-1]}; RE2 never backtracks, so nothing is lost",
        )
    low, high = counts(text)
    if low > 1000 or 1000 < high < math.inf:
        return (
            "repetitions over 1000",
            "split it, as in x{1000}x{500}, or use + and a `length` check",
        )
    return None
