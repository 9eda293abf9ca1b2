"""How much a response says."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from validators.base import CheckResult, Choice, Exchange, Finding, Validator

Count = Annotated[int, Field(ge=0)]


class Length(Validator):
    """Fails for each choice whose text is too short or too long.

    Characters are code points, words are runs without white space, lines are what line feeds separate (a last empty one is
    not counted). A choice that only calls tools or refuses has no text to measure.
    """

    use: Literal["length"]
    min_chars: Count | None = None
    max_chars: Count | None = None
    min_words: Count | None = None
    max_words: Count | None = None
    max_lines: Count | None = None

    @model_validator(mode="after")
    def _has_limits(self) -> Self:
        limits = (self.min_chars, self.max_chars, self.min_words, self.max_words, self.max_lines)
        if all(limit is None for limit in limits):
            raise ValueError(
                "no limit is given; write one of min_chars, max_chars, min_words, max_words, max_lines"
            )
        for unit, low, high in (
            ("chars", self.min_chars, self.max_chars),
            ("words", self.min_words, self.max_words),
        ):
            if low is not None and high is not None and low > high:
                raise ValueError(
                    f"min_{unit} ({low}) is above max_{unit} ({high}): nothing can pass"
                )
        return self

    def run(self, exchange: Exchange) -> CheckResult:
        """FAIL with one finding per choice and limit that is broken."""
        findings: list[Finding] = []
        for choice in exchange.choices:
            if choice.text or not (choice.tool_calls or choice.refusals):
                findings += self._of(choice)
        return self.verdict(findings)

    def _of(self, choice: Choice) -> list[Finding]:
        text = choice.text
        path = choice.texts[0].path if len(choice.texts) == 1 else choice.path
        chars = len(text)
        words = 0 if self.min_words is None and self.max_words is None else len(text.split())
        lines = 0 if self.max_lines is None else text.removesuffix("\n").count("\n") + bool(text)
        findings = []
        for rule, limit, broken, size in (
            ("min_chars", self.min_chars, chars < (self.min_chars or 0), f"{chars} characters"),
            ("min_words", self.min_words, words < (self.min_words or 0), f"{words} words"),
            ("max_chars", self.max_chars, chars > (self.max_chars or 0), f"{chars} characters"),
            ("max_words", self.max_words, words > (self.max_words or 0), f"{words} words"),
            ("max_lines", self.max_lines, lines > (self.max_lines or 0), f"{lines} lines"),
        ):
            if limit is not None and broken:
                bound = "at least" if rule.startswith("min") else "at most"
                findings.append(Finding(path, f"has {size}, {bound} {limit} wanted", rule=rule))
        return findings
