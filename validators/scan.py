"""Rules run over the text of a response: one RE2 set finds which could match, only those are located.

Shared by every check that looks for something in text: `forbid`, `redact`, `secrets` and `pii`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import ClassVar, NamedTuple

import msgspec
import orjson
import re2
from pydantic import PrivateAttr

from validators.base import (
    MAX_FINDINGS,
    CheckResult,
    Exchange,
    Finding,
    Outcome,
    Passage,
    Target,
    Targets,
    Validator,
)
from validators.location import Place, places
from validators.normalise import Growing, View, composed
from validators.regex import compile_beginnings, compile_re2, match_widths, re2_options
from validators.syntax import read

Accept = Callable[[str, int, int], "tuple[int, int] | None"]

#: Candidates of one rule looked at in one passage. Past that the rest of the passage counts as found, so that a flood of
#: near misses can neither slow the gateway down nor hide what comes after it.
_MAX_CANDIDATES = 5_000


class Rule(msgspec.Struct, frozen=True):
    """Something to look for.

    `accept(text, start, end)` takes a match of `pattern` and gives the span that counts, or None to refuse it; it looks at
    no more than the match, two characters before it and one behind. The span begins where the match does; the search goes on
    behind it. With `overlapping` it goes on inside a refused match too, for patterns with a bounded length only. `longest` is the longest span in code points where `accept` bounds it and
    the pattern does not.
    """

    name: str
    pattern: str
    message: str
    replacement: str
    accept: Accept | None = None
    overlapping: bool = False
    longest: int | None = None


@dataclass(frozen=True, slots=True, order=True)
class _Hit:
    start: int
    end: int
    rule: int
    overflow: bool = False


@dataclass(slots=True)
class _Search:
    """A text to search from `start` on; `spans` are the stretches that a search found and does not look into again."""

    views: tuple[View, ...]
    size: int
    start: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)


class Sighting(NamedTuple):
    """What a check says of a text that grows.

    `findings` are all that begin before `decided`, whatever follows. `start` is where the next look at the text has to
    begin. `flooded` is true if there was too much to list.
    """

    findings: tuple[Finding, ...]
    decided: int
    start: int
    flooded: bool


class Scanner:
    """Compiled rules.

    Raises
    ------
    ValueError
        If RE2 refuses a pattern, or all of them together are too large.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)
        self._patterns = [compile_re2(rule.pattern) for rule in self.rules]
        self._prefilter = re2.Set.SearchSet(re2_options())
        # An empty pattern, which always matches: if even that is missing, the set ran out of memory and said nothing.
        self._prefilter.Add("")
        for rule in self.rules:
            self._prefilter.Add(rule.pattern)
        try:
            self._prefilter.Compile()
        except re2.error as error:
            raise ValueError(
                "the patterns are too large together; split them over two checks"
            ) from error

    def matching(self, view: View) -> Sequence[int]:
        """Indices of the rules whose pattern matches somewhere, in no particular order."""
        matched = self._prefilter.Match(view.data)
        if not matched:
            return [i for i, pattern in enumerate(self._patterns) if pattern.search(view.data)]
        return [index - 1 for index in matched if index] if len(matched) > 1 else ()

    def findings(self, passages: Iterable[Passage]) -> list[Finding]:
        """What was found, at most `MAX_FINDINGS` and one per passage more.

        Nothing that matches is left out: where there are too many findings, the last one reaches to the end of the passage.
        """
        findings: list[Finding] = []
        for passage in passages:
            search = _Search(passage.views(), len(passage.text))
            hits = self._hits(search, max(MAX_FINDINGS - 1 - len(findings), 0))
            if hits:
                findings += self._located(passage, hits)
        return findings

    def follow(self, text: Growing, path: str) -> Sighting:
        """What can be said of a text however it goes on; its findings are at `path`."""
        search = _Search(text.views, len(text.text), text.start)
        hits = self._hits(search, MAX_FINDINGS - 1)
        decided = len(text.text) if text.ended else self._decided(text)
        for hit in hits:
            if hit.end > text.settled:
                decided = min(decided, hit.start)
        start = decided
        # In the second half of a stretch cut in two, a search would find what it passes over in the whole.
        for first, last in sorted(search.spans, reverse=True):
            if first < start < last:
                start = first
        sure = [hit for hit in hits if hit.start < decided]
        findings = tuple(self._finding(hit, path) for hit in sure)
        return Sighting(findings, decided, start, any(hit.overflow for hit in sure))

    @cached_property
    def longest_match(self) -> int | None:
        """The longest match of any rule in code points of the normalised text, None if there is no bound."""
        lengths = [rule.longest or match_widths(rule.pattern)[1] for rule in self.rules]
        longest = max(lengths)
        return None if longest == math.inf else int(longest)

    @cached_property
    def _beginnings(self) -> re2._Regexp | None:
        return compile_beginnings(rule.pattern for rule in self.rules)

    @cached_property
    def _bases(self) -> frozenset[str]:
        """Characters of which marks can make one that a match begins with, and "" if it can begin with a mark."""
        first = frozenset().union(*(read(rule.pattern).first for rule in self.rules))
        begins = re2.compile("|".join(first), re2_options())
        return frozenset(base for base, made in composed().items() if begins.search(made))

    def _decided(self, text: Growing) -> int:
        """The first place where a match may begin that is not there yet, or may still become another one."""
        decided = text.cut
        if not self._bases.isdisjoint(text.bases):
            decided = min(decided, text.settled)
        if "" in self._bases:
            decided = min(decided, text.marks)
        for view in text.views:
            begun = self._begun(view, text)
            if begun < len(view.text):
                decided = min(decided, view.original(begun, begun + 1)[0])
        return max(decided, text.start)

    def _begun(self, view: View, text: Growing) -> int:
        start, settled, cut = (view.position(at) for at in (text.start, text.settled, text.cut))
        if self.longest_match is not None:
            start = max(start, settled - self.longest_match - 1)
        if self._beginnings is None:
            return start
        first = view.byte(start)
        for end in sorted({settled, min(settled + 1, cut), cut}):
            data = view.data[: view.byte(end)]
            match = self._beginnings.search(data, first)
            if match and match.start() < len(data):
                return end - len(data[match.start() :].decode())
        return len(view.text)

    def _hits(self, search: _Search, room: int) -> list[_Hit]:
        """Matches by where they start, at most `room` and one more, which then covers all the rest."""
        streams = [
            self._stream(view, index, search)
            for view in search.views
            for index in self.matching(view)
        ]
        if not streams:
            return []
        hits: list[_Hit] = []
        reached: dict[int, int] = {}
        merged = heapq.merge(*streams)
        for hit in islice(merged, 4 * (room + 1)):
            if hit.start < reached.get(hit.rule, 0):
                continue
            hits.append(hit)
            reached[hit.rule] = hit.end
            if hit.overflow or len(hits) > room:
                break
        rest = next(merged, None)
        if rest is None:
            return hits
        first = min(rest.start, hits.pop().start) if len(hits) > room else rest.start
        return [*hits, _Hit(first, search.size, rest.rule, overflow=True)]

    def _stream(self, view: View, index: int, search: _Search) -> Iterator[_Hit]:
        """Matches of one rule in one view, in order, as spans of the original text."""
        rule, pattern, data = self.rules[index], self._patterns[index], view.data
        chars = view.position(search.start)
        position = counted = view.byte(chars)
        candidates = 0
        while match := pattern.search(data, position):
            first, last = match.span()
            chars += first - counted if view.ascii else len(data[counted:first].decode())
            counted = first
            candidates += 1
            if candidates > _MAX_CANDIDATES:
                yield _Hit(*view.original(chars, len(view.text)), index, overflow=True)
                return
            length = last - first if view.ascii else len(data[first:last].decode())
            span = (chars, chars + length)
            accepted = rule.accept(view.text, *span) if rule.accept else span
            if accepted:
                yield _Hit(*view.original(*accepted), index)
                position = first + len(view.text[slice(*accepted)].encode("utf-8", "replace"))
                search.spans.append(view.original(*accepted))
            elif rule.overlapping:
                position = first + 1
            else:
                position = last
                search.spans.append(view.original(*span))

    def _located(self, passage: Passage, hits: Sequence[_Hit]) -> Iterator[Finding]:
        where = (
            places(passage.text, [(hit.start, hit.end) for hit in hits])
            if passage.is_json()
            else ()
        )
        for number, hit in enumerate(hits):
            yield self._finding(hit, passage.path, where[number] if where else None)

    def _finding(self, hit: _Hit, path: str, place: Place | None = None) -> Finding:
        rule = self.rules[hit.rule]
        span, replacement = (hit.start, hit.end), rule.replacement
        if place:
            # What replaces a span must leave the document JSON, or the caller cannot read the rest.
            path = f"{path}#{place.pointer}" if place.pointer else path
            quoted = orjson.dumps(replacement).decode()
            replacement = quoted[1:-1] if place.in_string else quoted
            span = span if place.in_string else (place.start, place.end)
        size = "too many to list" if hit.overflow else f"{hit.end - hit.start} characters"
        return Finding(path, f"{rule.message} ({size})", span, rule.name, replacement)


class Scan(Validator):
    """A check that fails where one of its rules matches."""

    target: Targets = (Target.TEXT, Target.TOOL_ARGUMENTS, Target.REFUSAL)

    can_redact: ClassVar[bool] = True

    _scanner: Scanner = PrivateAttr()

    @property
    def longest_match(self) -> int | None:
        """The longest text a rule can match, in code points after normalisation; None if there is no bound."""
        return self._scanner.longest_match

    def follow(self, text: Growing, path: str) -> Sighting:
        """What can be said of a text however it goes on, as text and not as JSON; its findings are at `path`."""
        return self._scanner.follow(text, path)

    def run(self, exchange: Exchange) -> CheckResult:
        """FAIL with one finding per match, each with its span and replacement."""
        findings = self._scanner.findings(exchange.passages(self.target))
        if not findings:
            return self.verdict(())
        return CheckResult(self.id, Outcome.FAIL, score=0.0, findings=tuple(findings))
