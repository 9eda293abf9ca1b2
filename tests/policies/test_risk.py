from __future__ import annotations

from typing import Any

from policies.evidence import Reason
from policies.expressions import Variables
from policies.model import Policy, RiskTier
from policies.risk import assess, stage_applies
from validators import Choice, Exchange, Passage, ToolCall


def policy(*rules: tuple[str, str], base: str = "medium", when: str | None = None) -> Policy:
    document: dict[str, Any] = {
        "policy": "p",
        "risk": {"base": base, "raise": [{"to": to, "when": source} for to, source in rules]},
        "stages": [{"name": "s", "when": when, "checks": [{"id": "a", "use": "secrets"}]}],
        "confidence": {"when_uncalibrated": "hold"},
    }
    return Policy.model_validate(document)


def refund(amount: str, **context: str) -> Exchange:
    call = ToolCall("issue_refund", Passage("arguments", f'{{"amount": {amount}}}'))
    return Exchange("chat", {}, (Choice("choices[0]", tool_calls=(call,)),), context=context)


AMOUNT = "tool.arguments.amount > 10000.0"
NEW_USER = "context.is_new_user == 'true'"


def test_without_a_rule_that_holds_the_risk_is_the_base() -> None:
    found = assess(policy(("critical", AMOUNT)), Variables(refund("5"), results={}))
    assert found.tier is RiskTier.MEDIUM
    assert found.reasons == (Reason("risk", "base tier medium"),)


def test_rule_that_holds_raises_the_risk_and_says_so() -> None:
    found = assess(policy(("critical", AMOUNT)), Variables(refund("20000"), results={}))
    assert found.tier is RiskTier.CRITICAL
    assert found.reasons[1:] == (Reason("risk", f"raised to critical: {AMOUNT}"),)


def test_rules_never_lower_the_risk() -> None:
    found = assess(policy(("low", "true"), ("medium", "true"), base="high"), Variables(refund("1")))
    assert found.tier is RiskTier.HIGH
    assert len(found.reasons) == 1


def test_highest_tier_wins_whatever_the_order_of_the_rules() -> None:
    rules = (("critical", "true"), ("high", "true"))
    for ordered in (rules, rules[::-1]):
        assert assess(policy(*ordered), Variables(refund("1"))).tier is RiskTier.CRITICAL


def test_rules_about_the_response_do_not_apply_before_the_call() -> None:
    both = policy(("critical", AMOUNT), ("high", NEW_USER))
    before = Exchange("chat", {}, (), context={"is_new_user": "true"})
    assert assess(both, Variables(before)).tier is RiskTier.HIGH
    after = refund("20000", is_new_user="true")
    assert assess(both, Variables(after, results={})).tier is RiskTier.CRITICAL


def test_value_missing_at_run_time_raises_the_risk_and_is_recorded() -> None:
    found = assess(policy(("high", NEW_USER)), Variables(refund("1"), results={}))
    assert found.tier is RiskTier.HIGH
    expected = f"raised to high: {NEW_USER} could not be decided: there is no key 'is_new_user'"
    assert found.reasons[1:] == (Reason("risk", expected),)


def test_rules_see_the_tier_reached_so_far() -> None:
    chained = policy(("high", "true"), ("critical", "risk >= HIGH"))
    assert assess(chained, Variables(refund("1"))).tier is RiskTier.CRITICAL
    assert assess(policy(("critical", "risk >= HIGH")), Variables(refund("1"), risk=3)).tier is (
        RiskTier.MEDIUM
    )


def test_stage_without_condition_runs() -> None:
    plain = policy()
    assert stage_applies(plain, plain.stages[0], Variables(refund("1"), results={})) == (True, None)


def test_stage_runs_if_its_condition_holds_and_is_skipped_with_a_reason_if_not() -> None:
    gated = policy(when="risk >= HIGH")
    high, low = Variables(refund("1"), risk=2, results={}), Variables(refund("1"), results={})
    assert stage_applies(gated, gated.stages[0], high) == (True, None)
    skipped = Reason("stage:s", "skipped: risk >= HIGH does not hold")
    assert stage_applies(gated, gated.stages[0], low) == (False, skipped)


def test_stage_whose_condition_cannot_be_decided_runs_and_says_so() -> None:
    gated = policy(when="score < 0.5")
    expected = Reason(
        "stage:s", "runs because score < 0.5 could not be decided: score is not known"
    )
    applies = stage_applies(gated, gated.stages[0], Variables(refund("1"), results={}))
    assert applies == (True, expected)
