"""Decisions: the risk matrix, the total order, what every on_fail and on_error comes to."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from policies.auditing import Spread
from policies.calibration import Certificate
from policies.decision import Decision, Zone, decide, most_severe, to_json
from policies.evidence import Estimate, Evidence, Reason
from policies.model import Action, Band, Budget, Mode, RiskTier, Thresholds
from policies.risk import RiskAssessment
from tests.policies.build import Says, opines, policy, says, stage
from validators import (
    MAX_FINDINGS,
    Cause,
    CheckResult,
    Finding,
    OnError,
    OnFail,
    Opinion,
    Outcome,
)

RETURN, FLAG, HOLD, BLOCK = Action.RETURN, Action.FLAG, Action.HOLD, Action.BLOCK
SURE = Estimate(0.99, 0.99, "logprob", "demo")
UNKNOWN = Estimate(0.99, uncalibrated="there is no calibrator")
MASK = Finding("choices[0].message.content", "an e-mail address", (3, 9), "pii", "[email]")
SIGNALS = {"mean_logprob": -0.1}

checks = st.builds(
    says,
    st.from_regex(r"[a-z]{12}", fullmatch=True),
    st.sampled_from(Outcome),
    st.sampled_from(OnFail),
    st.sampled_from([None, *OnError]),
)
tiers = st.sampled_from(RiskTier)
estimates = st.one_of(
    st.just(UNKNOWN),
    st.floats(min_value=0, max_value=1).map(lambda p: Estimate(p, p, "logprob", "demo")),
)


def evidence_of(*checks: Says, name: str = "rules") -> Evidence:
    results = {
        check.id: CheckResult(
            check.id,
            check.outcome,
            score=check.score,
            findings=check.findings,
            error="timeout" if check.outcome is Outcome.ERROR else None,
        )
        for check in checks
    }
    return Evidence().after(name, results)


def settle(
    *checks: Says,
    tier: RiskTier = RiskTier.LOW,
    known: Estimate = SURE,
    draw: float = 0.999,
    attempts_left: int = 0,
    spread: Spread | None = None,
    **document: Any,
) -> Decision:
    """The decision of a policy with one stage of these checks."""
    return decide(
        policy(*([stage(*checks)] if checks else []), **document),
        evidence_of(*checks) if checks else Evidence(),
        risk=RiskAssessment(tier, (Reason("risk", f"base tier {tier}"),)),
        estimate=known,
        draw=draw,
        attempts_left=attempts_left,
        spread=spread,
    )


MATRIX = {
    RiskTier.LOW: (RETURN, FLAG, FLAG),
    RiskTier.MEDIUM: (RETURN, FLAG, HOLD),
    RiskTier.HIGH: (RETURN, HOLD, HOLD),
    RiskTier.CRITICAL: (HOLD, HOLD, HOLD),
}
CELLS = [
    (tier, band, confidence, action)
    for tier, row in MATRIX.items()
    for (band, confidence), action in zip(
        [(Band.CONFIDENT, 0.97), (Band.UNSURE, 0.8), (Band.DOUBTFUL, 0.1)], row, strict=True
    )
]


@pytest.mark.parametrize(("tier", "band", "confidence", "action"), CELLS)
def test_default_risk_matrix(tier: RiskTier, band: Band, confidence: float, action: Action) -> None:
    decision = settle(tier=tier, known=Estimate(0.5, confidence, "logprob", "demo"))
    assert (decision.action, decision.intended, decision.band) == (action, action, band)
    assert decision.confidence == confidence


def test_the_matrix_of_the_policy_replaces_the_default_cell() -> None:
    row = {"confident": "flag", "unsure": "block", "doubtful": "block"}
    assert settle(matrix={"low": row}).action is FLAG
    assert settle(matrix={"low": row}, known=replace(SURE, confidence=0.1)).action is BLOCK


FAILED = {
    OnFail.BLOCK: BLOCK,
    OnFail.HOLD: HOLD,
    OnFail.FLAG: FLAG,
    OnFail.REGENERATE: HOLD,
    OnFail.REDACT: RETURN,
    OnFail.SCORE: RETURN,
}
ERRED = {
    OnError.BLOCK: BLOCK,
    OnError.HOLD: HOLD,
    OnError.FLAG: FLAG,
    OnError.RETURN: RETURN,
}


@pytest.mark.parametrize(("on_fail", "on_error"), list(product(OnFail, [None, *OnError])))
@pytest.mark.parametrize("tier", [RiskTier.MEDIUM, RiskTier.HIGH])
def test_every_on_fail_with_every_on_error(
    on_fail: OnFail, on_error: OnError | None, tier: RiskTier
) -> None:
    default = HOLD if tier is RiskTier.HIGH else FLAG
    expected = {
        Outcome.PASS: RETURN,
        Outcome.FAIL: FAILED[on_fail],
        Outcome.ERROR: ERRED[on_error] if on_error else default,
    }
    for outcome, action in expected.items():
        decision = settle(says("one", outcome, on_fail, on_error, findings=(MASK,)), tier=tier)
        spoke = [reason for reason in decision.reasons if reason.source == "check:one"]
        assert decision.action is action
        assert len(spoke) == (outcome is not Outcome.PASS)


@pytest.mark.parametrize(
    ("tier", "action"),
    [
        (RiskTier.LOW, FLAG),
        (RiskTier.MEDIUM, FLAG),
        (RiskTier.HIGH, HOLD),
        (RiskTier.CRITICAL, HOLD),
    ],
)
def test_a_check_that_could_not_run_fails_closed_by_tier(tier: RiskTier, action: Action) -> None:
    assert settle(says("one", Outcome.ERROR), tier=tier).action is action


def test_a_check_without_a_result_could_not_run() -> None:
    checked = policy(stage(says("one", on_error=OnError.BLOCK)))
    decision = decide(
        checked,
        Evidence(ran=("rules",)),
        risk=RiskAssessment(RiskTier.LOW, ()),
        estimate=SURE,
        draw=0.5,
        attempts_left=0,
    )
    assert decision.action is BLOCK


def test_a_skipped_stage_asks_for_nothing_and_is_recorded() -> None:
    skipped = Reason("stage:rules", "skipped: risk >= HIGH does not hold")
    decision = decide(
        policy(stage(says("one"))),
        Evidence(skipped=(skipped,)),
        risk=RiskAssessment(RiskTier.LOW, ()),
        estimate=SURE,
        draw=0.5,
        attempts_left=0,
    )
    assert decision.action is RETURN
    assert skipped in decision.reasons


def test_every_reason_that_fires_is_recorded() -> None:
    decision = settle(
        says("one", Outcome.FAIL, OnFail.BLOCK, findings=(MASK, MASK)),
        says("two", Outcome.FAIL, OnFail.FLAG),
        says("three", Outcome.ERROR, on_error=OnError.HOLD),
    )
    assert decision.reasons == (
        Reason("risk", "base tier low"),
        Reason("check:one", "failed (block): an e-mail address and 1 more", BLOCK),
        Reason("check:two", "failed (flag): no details", FLAG),
        Reason("check:three", "could not run: timeout", HOLD),
        Reason("matrix", "tier low, confidence 0.990 is confident", RETURN),
    )


@given(st.lists(st.sampled_from([None, *Action])), st.sampled_from([None, *Action]))
def test_one_more_demand_never_lowers_the_action(
    demands: list[Action | None], more: Action | None
) -> None:
    assert most_severe([*demands, more]).severity >= most_severe(demands).severity


@given(st.lists(checks, max_size=6, unique_by=lambda c: c.id), checks, tiers, estimates)
def test_one_more_check_never_lowers_the_action(
    some: list[Says], more: Says, tier: RiskTier, known: Estimate
) -> None:
    some = [check for check in some if check.id != more.id]
    before, after = (settle(*each, tier=tier, known=known) for each in (some, [*some, more]))
    assert after.action.severity >= before.action.severity


@given(st.data(), st.lists(checks, max_size=6, unique_by=lambda c: c.id), tiers, estimates)
def test_the_order_of_checks_does_not_matter(
    data: st.DataObject, some: list[Says], tier: RiskTier, known: Estimate
) -> None:
    shuffled: Sequence[Says] = data.draw(st.permutations(some))
    first, second = (settle(*each, tier=tier, known=known) for each in (some, shuffled))
    assert (first.action, first.zone, first.inclusion) == (
        second.action,
        second.zone,
        second.inclusion,
    )
    assert sorted(map(repr, first.reasons)) == sorted(map(repr, second.reasons))


@given(st.lists(checks, max_size=6, unique_by=lambda c: c.id), tiers, estimates)
def test_the_action_is_the_most_severe_of_the_recorded_reasons(
    some: list[Says], tier: RiskTier, known: Estimate
) -> None:
    decision = settle(*some, tier=tier, known=known)
    assert decision.action is most_severe(reason.action for reason in decision.reasons)


@pytest.mark.parametrize("uncalibrated", ["return", "flag", "hold"])
@pytest.mark.parametrize("tier", RiskTier)
def test_uncalibrated_is_never_milder_than_the_confident_cell(
    uncalibrated: str, tier: RiskTier
) -> None:
    decision = settle(tier=tier, known=UNKNOWN, uncalibrated=uncalibrated)
    confident = MATRIX[tier][0]
    assert decision.action is most_severe([Action(uncalibrated), confident])
    assert (decision.band, decision.confidence, decision.confidence_source) == (None, None, "none")
    (why,) = [reason for reason in decision.reasons if reason.source == "confidence"]
    assert "there is no calibrator" in why.message
    assert ("is the least" in why.message) == (decision.action is not Action(uncalibrated))


def test_an_uncalibrated_return_is_audited_as_the_confident_cell_says() -> None:
    decision = settle(tier=RiskTier.HIGH, known=UNKNOWN, draw=0.1)
    assert (decision.audit, decision.inclusion) == (True, 0.15)


@pytest.mark.parametrize(
    ("document", "tier", "draw", "audit", "inclusion", "zone"),
    [
        ({}, RiskTier.LOW, 0.0, False, 0.0, Zone.AUTO),
        ({"audit": {"rate": 0.2}}, RiskTier.LOW, 0.19, True, 0.2, Zone.AUTO_AUDIT),
        ({"audit": {"rate": 0.2}}, RiskTier.LOW, 0.2, False, 0.2, Zone.AUTO),
        ({"audit": {"rate": 0.9}}, RiskTier.HIGH, 0.5, False, 0.15, Zone.AUTO),
        ({"audit": {"rate": 1.0}}, RiskTier.LOW, 0.999, True, 1.0, Zone.AUTO_AUDIT),
        ({"audit": {"rate": 1.0}}, RiskTier.CRITICAL, 0.0, False, 1.0, Zone.ESCALATE),
    ],
    ids=["off", "drawn", "not drawn", "cell before policy", "all", "held"],
)
def test_audit_is_drawn_with_the_recorded_probability(
    document: dict[str, Any],
    tier: RiskTier,
    draw: float,
    audit: bool,
    inclusion: float,
    zone: Zone,
) -> None:
    decision = settle(tier=tier, draw=draw, **document)
    assert (decision.audit, decision.inclusion, decision.zone) == (audit, inclusion, zone)


def test_no_cell_is_left_out_where_the_policy_audits() -> None:
    row = {"confident": {"action": "return", "audit": 0}, "unsure": "flag", "doubtful": "flag"}
    decision = settle(matrix={"low": row}, audit={"rate": 1.0}, draw=0.0)
    assert (decision.audit, decision.inclusion, decision.inclusion_floor) == (True, 0.01, 0.01)
    decision = settle(matrix={"low": row}, draw=0.0)
    assert (decision.audit, decision.inclusion) == (False, 0.0)


@pytest.mark.parametrize(
    ("on_fail", "zone", "inclusion"),
    [
        (OnFail.FLAG, Zone.BATCH, 1.0),
        (OnFail.HOLD, Zone.ESCALATE, 1.0),
        (OnFail.BLOCK, Zone.ESCALATE, 0.0),
    ],
)
def test_zone_and_inclusion_follow_the_action(
    on_fail: OnFail, zone: Zone, inclusion: float
) -> None:
    decision = settle(says("one", Outcome.FAIL, on_fail), audit={"rate": 0.5}, draw=0.0)
    assert (decision.zone, decision.inclusion, decision.audit) == (zone, inclusion, False)


def test_a_failed_check_may_ask_for_another_attempt() -> None:
    decision = settle(says("one", Outcome.FAIL, OnFail.REGENERATE), attempts_left=2)
    assert (decision.regenerate, decision.action) == (True, HOLD)
    assert Reason("regenerate", "asked for again, attempts left: 2") in decision.reasons


@pytest.mark.parametrize(
    ("other", "attempts_left"),
    [(says("two"), 0), (says("two", Outcome.FAIL, OnFail.BLOCK), 2)],
    ids=["none left", "blocked"],
)
def test_no_attempt_is_made_in_vain(other: Says, attempts_left: int) -> None:
    failed = says("one", Outcome.FAIL, OnFail.REGENERATE)
    decision = settle(failed, other, attempts_left=attempts_left)
    assert not decision.regenerate
    assert decision.action.severity >= HOLD.severity


def test_an_error_is_no_reason_for_another_attempt() -> None:
    decision = settle(says("one", Outcome.ERROR, OnFail.REGENERATE), attempts_left=2)
    assert not decision.regenerate


def test_redactions_are_collected_whatever_the_action() -> None:
    masked = says("one", Outcome.FAIL, OnFail.REDACT, findings=(MASK, MASK))
    assert settle(masked).action is RETURN
    assert settle(masked).redactions == (MASK, MASK)
    held = settle(masked, says("two", Outcome.FAIL, OnFail.HOLD))
    assert (held.action, held.redactions) == (HOLD, (MASK, MASK))


@pytest.mark.parametrize(
    "findings",
    [
        (),
        (MASK, replace(MASK, span=None)),
        (MASK, replace(MASK, replacement=None)),
        (MASK,) * MAX_FINDINGS,
    ],
    ids=["nothing located", "no span", "no replacement", "more than are reported"],
)
def test_what_cannot_be_redacted_whole_is_held(findings: tuple[Finding, ...]) -> None:
    decision = settle(says("one", Outcome.FAIL, OnFail.REDACT, findings=findings))
    assert decision.action is HOLD


@given(
    st.lists(checks, max_size=6, unique_by=lambda c: c.id),
    tiers,
    estimates,
    st.floats(min_value=0, max_value=1, exclude_max=True),
)
def test_observe_always_returns_and_enforces_nothing(
    some: list[Says], tier: RiskTier, known: Estimate, draw: float
) -> None:
    shared: dict[str, Any] = {"tier": tier, "known": known, "draw": draw, "attempts_left": 1}
    observed = settle(*some, mode=Mode.OBSERVE, audit={"rate": 0.25}, **shared)
    enforced = settle(*some, audit={"rate": 0.25}, **shared)
    assert observed.action is RETURN
    assert observed.intended is enforced.action
    assert (observed.regenerate, observed.redactions) == (False, ())
    assert observed.zone in {Zone.AUTO, Zone.AUTO_AUDIT}
    assert observed.audit == (draw < observed.inclusion)
    if observed.intended is not RETURN:
        assert observed.inclusion == 0.25


def judged(
    result: CheckResult,
    *,
    used_up: OnError | None = None,
    on_error: OnError | None = None,
    tier: RiskTier = RiskTier.LOW,
    others: Sequence[Says] = (),
) -> Decision:
    """The decision where the judge `q`, in a stage with a budget, gave this result."""
    budget = Budget(usd_per_day=20, when_used_up=used_up)
    checked = policy(stage(*others, opines("q", on_error=on_error), budget=budget))
    evidence = Evidence().after("rules", {**evidence_of(*others).results, "q": result})
    risk = RiskAssessment(tier, ())
    return decide(checked, evidence, risk=risk, estimate=SURE, draw=0.999, attempts_left=0)


def unable(cause: Cause) -> CheckResult:
    return CheckResult("q", Outcome.ERROR, error="20 USD a day are spent", cause=cause)


@pytest.mark.parametrize("tier", [RiskTier.LOW, RiskTier.MEDIUM, RiskTier.HIGH])
@pytest.mark.parametrize(("used_up", "on_error"), list(product([None, *OnError], [None, *OnError])))
def test_what_happens_when_the_budget_is_used_up(
    used_up: OnError | None, on_error: OnError | None, tier: RiskTier
) -> None:
    default = OnError.HOLD if tier is RiskTier.HIGH else OnError.FLAG
    decision = judged(unable(Cause.BUDGET), used_up=used_up, on_error=on_error, tier=tier)
    assert decision.action is ERRED[used_up or on_error or default]
    (why,) = [each for each in decision.reasons if each.source == "check:q"]
    assert why.message == "the budget is used up: 20 USD a day are spent"


@pytest.mark.parametrize("cause", [None, *(each for each in Cause if each is not Cause.BUDGET)])
@pytest.mark.parametrize("tier", [RiskTier.LOW, RiskTier.CRITICAL])
def test_the_budget_has_no_say_in_other_errors(cause: Cause | None, tier: RiskTier) -> None:
    error = CheckResult("q", Outcome.ERROR, error="late", cause=cause)
    decision = judged(error, used_up=OnError.RETURN, tier=tier)
    assert decision.action is (HOLD if tier is RiskTier.CRITICAL else FLAG)
    (why,) = [each for each in decision.reasons if each.source == "check:q"]
    assert why.message == "could not run: late"


def test_a_judge_that_was_cancelled_for_a_block_demands_nothing() -> None:
    blocking = says("a", Outcome.FAIL, OnFail.BLOCK)
    decision = judged(unable(Cause.CANCELLED), on_error=OnError.HOLD, others=[blocking])
    assert decision.action is BLOCK
    (why,) = [each for each in decision.reasons if each.source == "check:q"]
    assert (why.action, why.message) == (None, "not needed: check a demands block")


@pytest.mark.parametrize("on_error", list(OnError))
def test_a_judge_that_was_cancelled_without_need_is_an_error(on_error: OnError) -> None:
    """Not even its own `on_error: block` counts as what it was cancelled for."""
    flagged = says("a", Outcome.FAIL, OnFail.FLAG)
    decision = judged(unable(Cause.CANCELLED), on_error=on_error, others=[flagged])
    assert decision.action is most_severe([FLAG, ERRED[on_error]])


def test_a_rationale_is_recorded_only_where_content_is() -> None:
    opinion = Opinion("logprob", ("judge-small",), {"c": 0.4}, rationale="It says: hunter2.")
    result = CheckResult("q", Outcome.FAIL, score=0.4, opinion=opinion)
    evidence = Evidence().after("rules", {"q": result, **evidence_of(says("a")).results})
    bare, whole = to_json(settle(), evidence), to_json(settle(), evidence, content=True)
    assert "hunter2" not in json.dumps(bare)
    assert json.dumps(bare) == json.dumps(whole).replace("It says: hunter2.", "")
    assert evidence.results["q"].opinion == opinion


def test_the_record_is_plain_json() -> None:
    failed = says("one", Outcome.FAIL, OnFail.REDACT, findings=(MASK,), score=0.0)
    evidence = replace(evidence_of(failed), signals=SIGNALS, skipped=(Reason("stage:x", "why"),))
    record = to_json(settle(failed, tier=RiskTier.HIGH), evidence)
    assert json.loads(json.dumps(record)) == record
    decision, seen = record["decision"], record["evidence"]
    assert isinstance(decision, dict)
    assert isinstance(seen, dict)
    assert type(decision["action"]) is str
    assert decision["action"] == "return"
    assert decision["risk"] == "high"
    assert decision["band"] == "confident"
    assert decision["redactions"] == [
        {
            "path": "choices[0].message.content",
            "message": "an e-mail address",
            "span": [3, 9],
            "rule": "pii",
            "replacement": "[email]",
        }
    ]
    assert seen["signals"] == SIGNALS
    assert seen["skipped"] == [{"source": "stage:x", "message": "why", "action": None}]
    assert isinstance(seen["results"], dict)
    assert seen["results"].keys() == {"one"}


def test_a_number_that_is_not_finite_is_null_in_the_record() -> None:
    record = to_json(settle(), Evidence(signals={"mean_logprob": math.nan}))
    assert isinstance(record["evidence"], dict)
    assert record["evidence"]["signals"] == {"mean_logprob": None}


CERTIFIED = Certificate(mode="certified", alpha=0.02, delta=0.05, threshold=0.7, n=500)


@pytest.mark.parametrize(
    ("certificates", "action", "says"),
    [
        ((CERTIFIED,), RETURN, "certified for 0.02 errors from 0.7000"),
        (
            (CERTIFIED.model_copy(update={"threshold": None}),),
            FLAG,
            "no threshold is feasible at 0.02 errors",
        ),
        ((), FLAG, "calibrator c has no certificate for it"),
    ],
)
def test_the_reason_says_what_was_promised(
    certificates: tuple[Certificate, ...], action: Action, says: str
) -> None:
    known = Estimate(0.8, 0.8, "logprob", "c", certificates=certificates)
    decision = settle(known=known, thresholds=Thresholds(from_calibrator=True))
    assert decision.action is action
    (reason,) = (each.message for each in decision.reasons if each.source == "matrix")
    assert reason.endswith(says)


SPREAD = Spread([(1 - n / 100, n / 50) for n in range(1, 51)])


def inclusion(confidence: float, spread: Spread | None = SPREAD, **more: Any) -> float:
    known = Estimate(confidence, confidence, "logprob", "c")
    return settle(known=known, spread=spread, audit={"rate": 0.1}, **more).inclusion


def test_doubtful_responses_of_a_cell_are_audited_more_often() -> None:
    assert 0.05 <= inclusion(0.999) < inclusion(0.96) <= 0.2
    assert inclusion(0.96, None) == 0.1
    assert inclusion(0.8) == 1.0


def test_without_confidence_the_rate_is_the_same_for_all_and_the_floor_says_what_others_have() -> (
    None
):
    unknown = Estimate(0.9, uncalibrated="logprobs are absent")
    returned: dict[str, Any] = {"confidence": {"when_uncalibrated": "return"}}
    decision = settle(known=unknown, spread=SPREAD, audit={"rate": 0.1}, **returned)
    assert (decision.inclusion, decision.inclusion_floor) == (0.1, 0.05)
    decision = settle(known=unknown, audit={"rate": 0.1}, **returned)
    assert (decision.inclusion, decision.inclusion_floor) == (0.1, 0.1)


def test_what_observe_mode_returns_and_enforce_would_not_is_audited_at_the_rate() -> None:
    assert inclusion(0.8, mode="observe") == 0.1
    assert inclusion(0.999, mode="observe") == inclusion(0.999)


@given(st.floats(0, 1), st.floats(0, 0.999), st.sampled_from([None, SPREAD]))
def test_no_response_is_audited_less_than_the_floor_says(
    confidence: float, draw: float, spread: Spread | None
) -> None:
    known = Estimate(confidence, confidence, "logprob", "c")
    decision = settle(known=known, spread=spread, draw=draw, audit={"rate": 0.1})
    assert 0 < decision.inclusion_floor <= decision.inclusion
    assert decision.audit is (decision.action is RETURN and draw < decision.inclusion)
