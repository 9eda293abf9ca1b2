"""Which policy applies to a request: the first, in order, whose condition holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import translate

import msgspec

from policies.model import Condition, Policy
from policies.source import Problem


class Facts(msgspec.Struct, frozen=True):
    """What is known of a request before the call. `tools` are the names of the tools it offers."""

    task: str | None = None
    model: str = ""
    endpoint: str = "chat"
    tools: frozenset[str] = frozenset()
    key: str | None = None
    context: Mapping[str, str] = msgspec.field(default_factory=dict)


class Match(msgspec.Struct, frozen=True):
    """The policy that applies, and in words the condition that held."""

    policy: Policy
    reason: str


class PolicySet:
    """Policies in order, ready to be matched; immutable. `warnings` is what lint found in them."""

    def __init__(self, policies: Sequence[Policy], warnings: Iterable[Problem] = ()) -> None:
        self.policies = tuple(policies)
        self.warnings = tuple(warnings)
        self._tests = tuple((policy, _condition(policy.match)) for policy in self.policies)

    def select(self, facts: Facts) -> Match | None:
        """The first policy whose condition holds, or None if none does."""
        for policy, test in self._tests:
            if (reason := test(facts)) is not None:
                return Match(policy, reason)
        return None


def matches_everything(condition: Condition) -> bool:
    """Whether a condition holds for every request, whatever it is."""
    given = condition.model_dump(exclude={"any", "all", "not_"}, exclude_defaults=True)
    return (
        not given
        and condition.not_ is None
        and (condition.any is None or any(map(matches_everything, condition.any)))
        and (condition.all is None or all(map(matches_everything, condition.all)))
    )


#: Says in words why a condition holds, or gives None if it does not.
_Test = Callable[[Facts], str | None]


def _condition(condition: Condition) -> _Test:
    tests = list(_own_tests(condition))
    if condition.any is not None:
        tests.append(_any_of([_condition(part) for part in condition.any]))
    if condition.all is not None:
        tests.append(_all_of([_condition(part) for part in condition.all]))
    if condition.not_ is not None:
        tests.append(_not(_condition(condition.not_)))
    return tests[0] if len(tests) == 1 else _all_of(tests)


def _own_tests(condition: Condition) -> Iterable[_Test]:
    if condition.endpoint is not None:
        yield _text("endpoint", condition.endpoint, lambda facts: facts.endpoint)
    if condition.task is not None:
        yield _text("task", condition.task, lambda facts: facts.task)
    if condition.model is not None:
        yield _text("model", condition.model, lambda facts: facts.model)
    if condition.key is not None:
        yield _text("key", condition.key, lambda facts: facts.key)
    if condition.tool is not None:
        yield _tool(condition.tool)
    for name, pattern in condition.context.items():
        yield _text(f"context.{name}", pattern, _context(name))


def _context(name: str) -> Callable[[Facts], str | None]:
    return lambda facts: facts.context.get(name)


def _text(what: str, pattern: str, read: Callable[[Facts], str | None]) -> _Test:
    fits = _glob(pattern)
    reason = f"{what} is {pattern}"

    def test(facts: Facts) -> str | None:
        value = read(facts)
        return reason if value is not None and fits(value) else None

    return test


def _tool(pattern: str) -> _Test:
    fits = _glob(pattern)
    reason = f"a tool offered is {pattern}"

    def test(facts: Facts) -> str | None:
        return reason if any(map(fits, facts.tools)) else None

    return test


def _glob(pattern: str) -> Callable[[str], object]:
    """Whether a text fits a glob: `*`, `?`, `[abc]`, `[!abc]`, case matters.

    `fnmatch.translate` writes expressions that do not backtrack from one `*` to the one before, so
    that the time is linear in the text.
    """
    if not re.search(r"[*?[]", pattern):
        return pattern.__eq__
    return re.compile(translate(pattern)).match


def _any_of(tests: Sequence[_Test]) -> _Test:
    def test(facts: Facts) -> str | None:
        return next((reason for part in tests if (reason := part(facts)) is not None), None)

    return test


def _all_of(tests: Sequence[_Test]) -> _Test:
    def test(facts: Facts) -> str | None:
        reasons = []
        for part in tests:
            if (reason := part(facts)) is None:
                return None
            reasons.append(reason)
        return " and ".join(reasons) or "the policy applies to every request"

    return test


def _not(negated: _Test) -> _Test:
    return lambda facts: "it is nothing the policy excludes" if negated(facts) is None else None
