from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.match import Facts, PolicySet, matches_everything
from policies.model import Condition, Policy


def policy(name: str, **match: Any) -> Policy:
    document = {"policy": name, "match": match, "confidence": {"when_uncalibrated": "return"}}
    return Policy.model_validate(document)


def reason(facts: Facts, **match: Any) -> str | None:
    found = PolicySet([policy("p", **match)]).select(facts)
    return None if found is None else found.reason


REFUND = Facts(
    task="refund_decision",
    model="gpt-4o-mini",
    endpoint="chat",
    tools=frozenset({"issue_refund", "look_up"}),
    key="shop",
    context={"region": "eu-west", "tier": "gold"},
)


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ({}, "the policy applies to every request"),
        ({"task": "refund_decision"}, "task is refund_decision"),
        ({"task": "refund*"}, "task is refund*"),
        ({"task": "Refund*"}, None),
        ({"model": "gpt-?o-*"}, "model is gpt-?o-*"),
        ({"model": "gpt-4o"}, None),
        ({"model": "[!a-f]*"}, "model is [!a-f]*"),
        ({"tool": "issue_*"}, "a tool offered is issue_*"),
        ({"tool": "delete_*"}, None),
        ({"endpoint": "responses"}, None),
        ({"endpoint": "chat"}, "endpoint is chat"),
        ({"key": "sho?"}, "key is sho?"),
        ({"context": {"region": "eu-*"}}, "context.region is eu-*"),
        ({"context": {"region": "eu-*", "tier": "basic"}}, None),
        ({"context": {"country": "*"}}, None),
        ({"task": "refund*", "model": "claude*"}, None),
        ({"task": "refund*", "key": "shop"}, "task is refund* and key is shop"),
        ({"any": [{"task": "x"}, {"tool": "look_up"}]}, "a tool offered is look_up"),
        ({"any": [{"task": "x"}, {"task": "y"}]}, None),
        (
            {"all": [{"key": "shop"}, {"tool": "look_up"}]},
            "key is shop and a tool offered is look_up",
        ),
        ({"all": [{"key": "shop"}, {"tool": "x"}]}, None),
        ({"not": {"task": "x"}}, "it is nothing the policy excludes"),
        ({"not": {"task": "refund*"}}, None),
        (
            {"key": "shop", "not": {"any": [{"task": "x"}, {"model": "o3*"}]}},
            "key is shop and it is nothing the policy excludes",
        ),
    ],
)
def test_condition_holds_when_all_it_names_holds(
    match: dict[str, Any], expected: str | None
) -> None:
    assert reason(REFUND, **match) == expected


@pytest.mark.parametrize(
    "match", [{"task": "*"}, {"key": "*"}, {"tool": "*"}, {"context": {"a": "*"}}]
)
def test_pattern_never_matches_what_the_request_does_not_name(match: dict[str, Any]) -> None:
    assert reason(Facts(), **match) is None


def test_first_policy_that_matches_is_selected() -> None:
    policies = PolicySet([policy("a", task="x"), policy("b", task="refund*"), policy("c")])
    found = policies.select(REFUND)
    assert found is not None
    assert (found.policy.policy, found.reason) == ("b", "task is refund*")
    other = policies.select(Facts(task="tagging"))
    assert other is not None
    assert other.policy.policy == "c"


def test_nothing_is_selected_when_no_policy_matches() -> None:
    assert PolicySet([policy("a", task="x")]).select(REFUND) is None
    assert PolicySet([]).select(REFUND) is None


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ({}, True),
        ({"any": [{"task": "x"}, {}]}, True),
        ({"all": [{}, {}]}, True),
        ({"all": [{}, {"task": "x"}]}, False),
        ({"any": [{"task": "x"}]}, False),
        ({"task": "*"}, False),
        ({"not": {}}, False),
        ({"context": {"a": "b"}}, False),
    ],
)
def test_catch_all_is_a_condition_that_excludes_nothing(
    match: dict[str, Any], expected: bool
) -> None:
    assert matches_everything(Condition.model_validate(match)) is expected


_GLOB = st.text("ab*?[]!-.", min_size=1, max_size=8)


@given(_GLOB, st.text("ab[]!-.\n", max_size=8))
def test_globs_mean_what_fnmatchcase_says(pattern: str, text: str) -> None:
    assert (reason(Facts(model=text), model=pattern) is not None) is fnmatchcase(text, pattern)


def test_glob_made_to_backtrack_takes_linear_time() -> None:
    assert reason(Facts(model="a" * 1_000_000), model="*a" * 20 + "*b") is None
