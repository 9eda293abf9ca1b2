"""Rules run over the text of a response: one RE2 set finds which could match, only those are located.

Shared by every check that looks for something in text: `forbid`, `redact`, `secrets` and `pii`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

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
from validators.location import places
from validators.normalise import View
from validators.regex import compile_re2, match_widths, re2_options

Accept = Callable[[str, int, int], "tuple[int, int] | None"]

#: Candidates of one rule looked at in one passage. Past that the rest of the passage counts as found, so that a flood of
#: near misses can neither slow the gateway down nor hide what comes after it.
_MAX_CANDIDATES = 5_000


@dataclass(frozen=True, slots=True)
class Rule:
    """Something to look for.

    `accept(text, start, end)` takes a match of `pattern` and gives the span that counts, or None to refuse it. With
    `overlapping` the search goes on inside a refused match, for patterns with a bounded length only. `longest` is the
    longest span in code points where `accept` bounds it and the pattern does not.
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
            hits = self._hits(passage, max(MAX_FINDINGS - 1 - len(findings), 0))
            if hits:
                findings += self._located(passage, hits)
        return findings

    def longest_match(self) -> int | None:
        """The longest match of any rule in code points of the normalised text, None if there is no bound."""
        lengths = [rule.longest or match_widths(rule.pattern)[1] for rule in self.rules]
        longest = max(lengths)
        return None if longest == math.inf else int(longest)

    def _hits(self, passage: Passage, room: int) -> list[_Hit]:
        """Matches by where they start, at most `room` and one more, which then covers all the rest."""
        streams = [
            self._stream(view, index) for view in passage.views() for index in self.matching(view)
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
        return [*hits, _Hit(first, len(passage.text), rest.rule, overflow=True)]

    def _stream(self, view: View, index: int) -> Iterator[_Hit]:
        """Matches of one rule in one view, in order, as spans of the original text."""
        rule, pattern, data = self.rules[index], self._patterns[index], view.data
        position = counted = chars = candidates = 0
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
            position = first + 1 if accepted is None and rule.overlapping else last

    def _located(self, passage: Passage, hits: Sequence[_Hit]) -> Iterator[Finding]:
        where = (
            places(passage.text, [(hit.start, hit.end) for hit in hits])
            if passage.is_json()
            else ()
        )
        for number, hit in enumerate(hits):
            rule = self.rules[hit.rule]
            path, span, replacement = passage.path, (hit.start, hit.end), rule.replacement
            place = where[number] if where else None
            if place:
                # What replaces a span must leave the document JSON, or the caller cannot read the rest.
                path = f"{path}#{place.pointer}" if place.pointer else path
                quoted = orjson.dumps(replacement).decode()
                replacement = quoted[1:-1] if place.in_string else quoted
                span = span if place.in_string else (place.start, place.end)
            size = "too many to list" if hit.overflow else f"{hit.end - hit.start} characters"
            yield Finding(path, f"{rule.message} ({size})", span, rule.name, replacement)


class Scan(Validator):
    """A check that fails where one of its rules matches."""

    target: Targets = (Target.TEXT, Target.TOOL_ARGUMENTS, Target.REFUSAL)

    can_redact: ClassVar[bool] = True

    _scanner: Scanner = PrivateAttr()

    @property
    def longest_match(self) -> int | None:
        """The longest text a rule can match, in code points after normalisation; None if there is no bound."""
        return self._scanner.longest_match()

    def run(self, exchange: Exchange) -> CheckResult:
        """FAIL with one finding per match, each with its span and replacement."""
        findings = self._scanner.findings(exchange.passages(self.target))
        if not findings:
            return self.verdict(())
        return CheckResult(self.id, Outcome.FAIL, score=0.0, findings=tuple(findings))
