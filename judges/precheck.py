"""What an answer says to whoever grades it, found without a model, before one is asked.

A judge that has been talked round is sure of itself, so no calibration of its score helps (Zheng et al. 2024, "Cheating Automatic LLM
Benchmarks": a constant answer beats a strong judge with high probability). These rules look for five things: instructions
about grading, text in the shape of a verdict, text that pretends to end the data, answers that are only an opening (Zhao et al.
2025, "One Token to Fool LLM-as-a-Judge") and answers that are only repetition. Each is looked for in the text as written and
normalised, and in what its letters or its encoded parts come to when decoded. All of it is linear in the length of the text.
"""

from __future__ import annotations

import base64
import re
import string
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from operator import eq

from msgspec.structs import replace

from judges.lures import PARTS, rules
from validators import MAX_FINDINGS, Choice, Finding, Passage, Target
from validators.normalise import View
from validators.scan import Rule, Scanner

#: The end of a sentence; a run of marks is entered at its first only.
_SENTENCE = re.compile(r"(?<![.!?。！？])[.!?。！？]++\s++|\n++|[。！？]")
_JSON_VERDICTS = frozenset({"json", "json_score", "label"})

#: Openings that promise an answer; an answer that is nothing but these is none.
_OPENING = re.compile(
    r"(?:the )?(?:final |short |correct |full |my )?(?:answer|solution|explanation|reasoning|thought process|thoughts?|analysis|response|step \d+"
    r"|respuesta|solución|réponse|lösung|antwort|soluzione|risposta|resposta|решение|ответ|解答|解説|解|答案|答え|かいせつ|풀이|정답|답)(?: is| ist| es| est)?\b"
    r"|\b(?:sure|okay|ok|certainly|of course|alright|well)\b"
    r"|\bhere(?:'s| is) [^\n:.]{0,60}?(?:answer|solution|explanation|reasoning|response)\b(?: to [^\n:.]{0,40})?"
    r"|\b(?:let me|let's|let us|to) (?:think|solve|work|start|begin|see|break|analy[sz]e|go|explain)\b[^\n:.]{0,80}",
    re.IGNORECASE,
)
_JOIN = re.compile(r"[\s:：.,!！*#_`>…\-–—]+")

_LETTERS = str.maketrans(
    "аеорсхуіјѕԁһАВЕЅІЈКМНОРСТХУαεορντικΑΒΕΖΗΙΚΜΝΟΡΤΥΧ431057@$_-",
    "aeopcxyijsdhABESIJKMHOPCTXYaeopvtikABEZHIKMNOPTYXaeiostas  ",
)
_ROTATED = str.maketrans(
    string.ascii_letters,
    "".join(half[13:] + half[:13] for half in (string.ascii_lowercase, string.ascii_uppercase)),
)
_LETTERS.update({0xE0000 + code: code for code in range(0x20, 0x7F)})

#: Runs that may be text in another coding, each with what a text must hold to have one, and how it is read. A run is bounded
#: below, so a search gives up after a few characters, and taken whole, so that it is entered once.
_CODED: tuple[tuple[str, re.Pattern[str], Callable[[str], bytes]], ...] = (
    ("", re.compile(r"[A-Za-z0-9+/_-]{20,}+={0,6}+"), lambda run: _based(run)),
    ("%", re.compile(r"(?:%[0-9A-Fa-f]{2}){8,}+"), lambda run: bytes.fromhex(run.replace("%", ""))),
    ("&#", re.compile(r"(?:&#\d{1,7};){8,}+"), lambda run: _entities(run)),
    ("0", re.compile(r"(?:[01]{8} ?){8,}+"), lambda run: _octets(run)),
    ("", re.compile(r"(?<!\S)(?:\S  ?){8,}+\S?"), lambda run: _apart(run)),
)
_HEXADECIMAL = re.compile(r"(?:[0-9A-Fa-f]{2})++")
_BASE32 = re.compile(r"[A-Z2-7]++")
_MAX_PERIOD = 16
_MAX_OPENING_CHARS = 400


@cache
def _scanner() -> Scanner:
    return Scanner(list(rules()))


@cache
def _parts() -> Scanner:
    return Scanner([Rule(name, f"(?i){pattern}", "", "") for name, pattern in PARTS.items()])


def prepare() -> None:
    """Compile the rules, so that the first answer does not wait for that: 13 MiB, which only those with judges need."""
    _scanner()
    _parts()


#: What of an answer a judge is shown.
SHOWN = (Target.TEXT, Target.REFUSAL, Target.TOOL_ARGUMENTS)


def precheck(choices: Sequence[Choice]) -> tuple[Finding, ...]:
    """What of the answers speaks to a grader or says nothing; empty if no rule holds, at most `MAX_FINDINGS`.

    Each finding's span is that of the original text, of a coded part the whole part.
    """
    findings: dict[tuple[str, tuple[int, int] | None], Finding] = {}
    for choice in choices:
        for finding in _of(choice):
            findings.setdefault((finding.path, finding.span), finding)
            if len(findings) == MAX_FINDINGS:
                return tuple(findings.values())
    return tuple(findings.values())


def _of(choice: Choice) -> Iterator[Finding]:
    for passage in choice.passages(SHOWN):
        # Where the application asked for JSON, a verdict in it may be what it asked for.
        allowed = _JSON_VERDICTS if passage.is_json() else ()
        for finding in (*_scanner().findings([passage]), *_urging(passage), *_in_disguise(passage)):
            if finding.rule not in allowed:
                yield finding
    if not choice.tool_calls and not choice.refusals:
        yield from _empty(choice)
    for passage in choice.texts:
        yield from _repeated(passage)


def _urging(passage: Passage) -> Iterator[Finding]:
    """Where a sentence, or two in a row, hold the parts of a message to a grader, however it is worded."""
    parts = _parts()
    view = passage.views()[-1]
    ends = [match.end() for match in _SENTENCE.finditer(view.text)]
    start, before, earlier = 0, 0, frozenset[str]()
    for end in (*ends, len(view.text)):
        sentence = View(view.text[start:end])
        said = frozenset(parts.rules[index].name for index in parts.matching(sentence))
        if said and _urges(said, earlier):
            span = view.original(before if earlier else start, end)
            yield Finding(passage.path, "speaks to whoever grades it", span, rule="urging")
        before, start, earlier = start, end, said


def _urges(said: frozenset[str], earlier: frozenset[str]) -> bool:
    both = said | earlier
    about = {"grader", "this"}
    return (
        both >= {"grader", "this", "good"}
        or (both >= {"good", "override"} and not both.isdisjoint(about))
        or (said >= {"good", "order"} and not said.isdisjoint(about))
        or said >= {"grader", "override"}
    )


def _in_disguise(passage: Passage) -> Iterator[Finding]:
    """Findings in the text with look-alike letters, digits and marks read as letters, backwards, rotated, or decoded."""
    text = passage.text
    plain = text
    places: Sequence[int] = range(len(text))
    if not text.isascii():
        kept = [index for index in places if unicodedata.category(text[index]) != "Mn"]
        plain, places = "".join(map(text.__getitem__, kept)), kept
    for other in (plain.translate(_LETTERS), plain.translate(_ROTATED)):
        if other != text:
            for finding, start, end in _found(passage.path, other):
                yield replace(finding, span=(places[start], places[end - 1] + 1))
    for finding, start, end in _found(passage.path, text[::-1]):
        yield replace(finding, span=(len(text) - end, len(text) - start))
    runs = list(_decoded(text))
    # There may be thousands of them: they are looked at one by one only if there is something to find.
    if any(_found(passage.path, "\n".join(said for _, _, said in runs))):
        for start, end, said in runs:
            for finding, _, _ in _found(passage.path, said):
                yield replace(finding, span=(start, end))


def _found(path: str, text: str) -> Iterator[tuple[Finding, int, int]]:
    for finding in _scanner().findings([Passage(path, text)]):
        start, end = finding.span or (0, len(text))
        yield replace(finding, path=path), start, end


def _decoded(text: str) -> Iterator[tuple[int, int, str]]:
    for mark, pattern, decode in _CODED:
        if mark not in text:
            continue
        for match in pattern.finditer(text):
            try:
                yield match.start(), match.end(), decode(match[0]).decode()
            except ValueError:
                continue


def _based(run: str) -> bytes:
    """What hexadecimal, base32 or base64 digits stand for; base64 with either of its alphabets."""
    digits = run.rstrip("=")
    if _HEXADECIMAL.fullmatch(digits):
        return bytes.fromhex(digits)
    if _BASE32.fullmatch(digits):
        return base64.b32decode(digits + "=" * (-len(digits) % 8))
    return base64.urlsafe_b64decode(
        digits.replace("+", "-").replace("/", "_") + "=" * (-len(digits) % 4)
    )


def _octets(run: str) -> bytes:
    digits = run.replace(" ", "")
    return bytes(int(digits[at : at + 8], 2) for at in range(0, len(digits), 8))


def _entities(run: str) -> bytes:
    codes = (int(each) for each in run.replace("&#", "").split(";") if each)
    return "".join(chr(code) for code in codes if code < 0xD800).encode()


def _apart(run: str) -> bytes:
    """Letters that stand apart, joined; two spaces part words."""
    return " ".join(word.replace(" ", "") for word in run.split("  ")).encode()


def _empty(choice: Choice) -> Iterator[Finding]:
    """A finding if the answer is blank, marks only, or only an opening."""
    path = choice.texts[0].path if choice.texts else choice.path
    text = choice.text
    is_json = len(choice.texts) == 1 and choice.texts[0].is_json()
    if not is_json and not any(unicodedata.category(char)[0] in "LNS" for char in text):
        yield Finding(path, "says nothing", (0, len(text)) if text else None, rule="empty")
        return
    if len(text) > _MAX_OPENING_CHARS:
        return
    rest = [part for part in _JOIN.split(_OPENING.sub(" ", text)) if part]
    if not rest:
        yield Finding(path, "is only the opening of an answer", (0, len(text)), rule="opening")


def _repeated(passage: Passage) -> Iterator[Finding]:
    """A finding if the text says one thing over and over: the same words, or the same run of words or characters."""
    text = passage.text
    # What repeats itself packs well; the lags are tried only then.
    if len(text) < 40 or len(zlib.compress(text.encode("utf-8", "replace"))) > 0.5 * len(text):
        return
    words = text.casefold().split()
    is_of_words = len(words) >= 12 and any(char.isalpha() for char in text)
    few = is_of_words and len(set(words)) <= 2
    if few or (is_of_words and _is_periodic(words)) or (len(words) < 4 and _is_periodic(text)):
        yield Finding(passage.path, "repeats itself", (0, len(text)), rule="repetition")


def _is_periodic(units: Sequence[str]) -> bool:
    """Whether at least nine in ten units are what stood some few places before."""
    return any(
        sum(map(eq, units, units[lag:])) >= 0.9 * (len(units) - lag)
        for lag in range(1, min(_MAX_PERIOD, len(units) // 3) + 1)
    )
