"""Patterns a policy brings along: what must not, what must, and what must not be seen in a response."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

from validators.base import CheckResult, Exchange, Finding, OnFail, Target, Targets, Validator
from validators.regex import compile_re2, match_widths
from validators.scan import Rule, Scan, Scanner

_MASK = "[redacted:<name>]"


class Pattern(BaseModel):
    """An RE2 regular expression and the name findings give it; written as text alone, it is named by its place."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,63}$")] | None = None
    pattern: str

    @model_validator(mode="after")
    def _is_runnable(self) -> Self:
        compile_re2(self.pattern)
        if match_widths(self.pattern)[0] == 0:
            raise ValueError(
                f"{self.pattern!r} matches even where there is no text; let it ask for a character at least"
            )
        return self


def _as_mapping(value: object) -> object:
    return {"pattern": value} if isinstance(value, str) else value


def _as_sequence(value: object) -> object:
    return [value] if isinstance(value, str | dict) else value


AnyPattern = Annotated[Pattern, BeforeValidator(_as_mapping, json_schema_input_type=str | Pattern)]
_SomePatterns = Annotated[tuple[AnyPattern, ...], Field(min_length=1, max_length=1000)]
Patterns = Annotated[
    _SomePatterns,
    BeforeValidator(_as_sequence, json_schema_input_type=AnyPattern | _SomePatterns),
]


def _named(patterns: tuple[Pattern, ...]) -> list[tuple[str, str]]:
    named = [
        (pattern.name or f"pattern_{number}", pattern.pattern)
        for number, pattern in enumerate(patterns, start=1)
    ]
    names = [name for name, _ in named]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two patterns are named {twice[0]!r}; give each its own name")
    return named


def _scanner(patterns: tuple[Pattern, ...], message: str, replacement: str) -> Scanner:
    return Scanner(
        [
            Rule(name, pattern, f"{message} {name}", replacement.replace("<name>", name))
            for name, pattern in _named(patterns)
        ]
    )


class Forbid(Scan):
    """Fails where one of the patterns matches; the text is searched as written and as normalised."""

    use: Literal["forbid"]
    patterns: Patterns

    @model_validator(mode="after")
    def _compile(self) -> Self:
        self._scanner = _scanner(self.patterns, "matches the forbidden pattern", _MASK)
        return self


class Redact(Scan):
    """Fails where one of the patterns matches, and asks for the matches to be masked.

    `replacement` takes the place of each match; `<name>` in it becomes the name of the pattern.
    """

    use: Literal["redact"]
    patterns: Patterns
    replacement: Annotated[str, Field(max_length=200)] = _MASK
    on_fail: OnFail = OnFail.REDACT

    @model_validator(mode="after")
    def _compile(self) -> Self:
        self._scanner = _scanner(self.patterns, "matches the pattern", self.replacement)
        return self


class Require(Validator):
    """Fails for each choice in which one of the patterns matches nowhere, as written or normalised."""

    use: Literal["require"]
    patterns: Patterns
    target: Targets = (Target.TEXT, Target.TOOL_ARGUMENTS, Target.REFUSAL)

    _scanner: Scanner = PrivateAttr()

    @model_validator(mode="after")
    def _compile(self) -> Self:
        self._scanner = _scanner(self.patterns, "", "")
        return self

    def run(self, exchange: Exchange) -> CheckResult:
        """FAIL with one finding per choice and pattern that is not there."""
        findings: list[Finding] = []
        for choice in exchange.choices:
            missing = set(range(len(self.patterns)))
            for passage in choice.passages(self.target):
                for view in passage.views():
                    missing.difference_update(self._scanner.matching(view))
            findings += (
                Finding(
                    choice.path, f"nothing matches the required pattern {rule.name}", rule=rule.name
                )
                for rule in (self._scanner.rules[index] for index in sorted(missing))
            )
        return self.verdict(findings)
