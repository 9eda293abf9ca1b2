"""Which tools a response calls."""

from __future__ import annotations

import re
from fnmatch import translate
from typing import Annotated, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from validators.base import CheckResult, Choice, Exchange, Finding, Malformed, ToolCall, Validator

_MAX_GLOB_CHARS = 200

Glob = Annotated[str, Field(min_length=1, max_length=_MAX_GLOB_CHARS)]


class ToolCalls(Validator):
    """Fails for each choice that calls a tool it may not, too few or too many, or with arguments that are no JSON object.

    `allow` and `forbid` are globs (`refund_*`); without `allow` every tool not forbidden is allowed. `min` and `max` bound
    the calls of one choice; each name in `required` must be called by every choice.
    """

    use: Literal["tool_calls"]
    allow: tuple[Glob, ...] | None = None
    forbid: tuple[Glob, ...] = ()
    min: Annotated[int, Field(ge=0)] = 0
    max: Annotated[int, Field(ge=0)] | None = None
    required: tuple[str, ...] = ()
    allow_malformed: bool = False

    _allow: re.Pattern[str] | None = PrivateAttr(None)
    _forbid: re.Pattern[str] = PrivateAttr()

    @model_validator(mode="after")
    def _compile(self) -> Self:
        if self.max is not None and self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max}): nothing can pass")
        self._allow = None if self.allow is None else _any_of(self.allow)
        self._forbid = _any_of(self.forbid)
        barred = [name for name in self.required if not self._may_call(name)]
        if barred:
            raise ValueError(f"required tool {barred[0]!r} is not allowed: nothing can pass")
        return self

    def run(self, exchange: Exchange) -> CheckResult:
        """FAIL with findings named forbidden, malformed, too_few, too_many or missing."""
        findings: list[Finding] = []
        for choice in exchange.choices:
            for call in choice.tool_calls:
                findings += self._of_call(call)
            findings += self._of_choice(choice)
        return self.verdict(findings)

    def _may_call(self, name: str) -> bool:
        allowed = self._allow is None or self._allow.match(name)
        return bool(allowed) and not self._forbid.match(name)

    def _of_call(self, call: ToolCall) -> list[Finding]:
        findings = []
        path = call.arguments.path
        if not self._may_call(call.name):
            findings.append(
                Finding(path, f"tool {call.name[:64]!r} may not be called", rule="forbidden")
            )
        if not self.allow_malformed:
            try:
                problem = (
                    None if isinstance(call.arguments.parsed(), dict) else "are JSON but no object"
                )
            except Malformed as error:
                problem = f"are not JSON: {error}"
            if problem:
                message = f"the arguments of {call.name[:64]!r} {problem}"
                findings.append(Finding(path, message, rule="malformed"))
        return findings

    def _of_choice(self, choice: Choice) -> list[Finding]:
        findings = []
        calls = len(choice.tool_calls)
        if calls < self.min:
            message = f"{calls} tool calls, at least {self.min} wanted"
            findings.append(Finding(choice.path, message, rule="too_few"))
        if self.max is not None and calls > self.max:
            message = f"{calls} tool calls, at most {self.max} wanted"
            findings.append(Finding(choice.path, message, rule="too_many"))
        called = {call.name for call in choice.tool_calls}
        findings += (
            Finding(choice.path, f"tool {name!r} is not called", rule="missing")
            for name in self.required
            if name not in called
        )
        return findings


def _any_of(globs: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(translate(glob) for glob in globs) or "(?!)")
