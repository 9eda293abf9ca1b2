"""The cascade: what runs, in which order, when it stops, and what a broken check becomes."""

from __future__ import annotations

import math
from itertools import count
from operator import and_, le
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judges import Judge, ModelReply
from policies.calibration import load_calibrator
from policies.cascade import RunStage, Settle, next_step, run_validators, start, vetted
from policies.decision import decide
from policies.evidence import Evidence, Reason
from policies.model import Action, Budget, Policy, RiskTier, Stage
from policies.signals import Absence
from tests.policies.build import Breaks, Says, exchange, opines, policy, says, stage, tokens
from validators import (
    Cause,
    Check,
    CheckResult,
    Choice,
    Exchange,
    OnError,
    OnFail,
    Outcome,
    Passage,
)

DEMO = load_calibrator(
    (Path(__file__).parents[2] / "config" / "calibrators" / "demo.json").read_text(),
    file="demo.json",
)
SURE = exchange(tokens([-1e-6] * 8))
UNSURE = exchange(tokens([-0.5] * 8))


def run(checked: Policy, over: Exchange = SURE, draw: float = 0.5) -> Settle:
    """The cascade as its module says it is driven."""
    evidence = start(checked, over)
    ticks = count(step=3)
    while isinstance(step := next_step(checked, evidence, over, DEMO, draw), RunStage):
        results = run_validators(step.stage.validators, over, lambda: float(next(ticks)))
        for judge in step.stage.judges:
            if not step.settled_by(results):
                results[judge.id] = ask(judge)
        evidence = step.done(results)
    return step


def ask(judge: Judge) -> CheckResult:
    """What a judge of these tests says after its one question."""
    dialogue = judge.ask(SURE, "0" * 16)
    assert len(next(dialogue)) == 1
    with pytest.raises(StopIteration) as ended:
        dialogue.send((ModelReply(""),))
    result: CheckResult = ended.value.value
    return vetted(result)


def action(checked: Policy, settled: Settle) -> Action:
    return decide(
        checked,
        settled.evidence,
        risk=settled.risk,
        estimate=settled.estimate,
        draw=0.5,
        attempts_left=0,
    ).action


def test_stages_run_in_order_and_their_results_add_up() -> None:
    settled = run(policy(stage(says("a"), says("b"), name="one"), stage(says("c"), name="two")))
    assert settled.evidence.ran == ("one", "two")
    assert list(settled.evidence.results) == ["a", "b", "c"]
    assert settled.evidence.skipped == ()


def test_a_policy_without_stages_is_settled_at_once() -> None:
    settled = run(policy())
    assert settled.evidence.ran == ()
    assert settled.estimate.confidence is not None


@pytest.mark.parametrize(
    "veto",
    [says("a", Outcome.FAIL, OnFail.BLOCK), says("a", Outcome.ERROR, on_error=OnError.BLOCK)],
    ids=["failed", "could not run"],
)
def test_a_veto_in_the_first_stage_runs_nothing_more(veto: Says) -> None:
    settled = run(policy(stage(veto, name="one"), stage(says("b"), name="two")))
    assert settled.evidence.ran == ("one",)
    assert settled.evidence.skipped == (Reason("stage:two", "skipped: check a demands block"),)


def test_a_hold_does_not_settle_as_a_later_stage_may_block() -> None:
    held = stage(says("a", Outcome.FAIL, OnFail.HOLD), name="one")
    blocking = stage(says("b", Outcome.FAIL, OnFail.BLOCK), name="two")
    checked = policy(held, blocking)
    assert action(checked, run(checked)) is Action.BLOCK


def test_a_stage_whose_condition_does_not_hold_is_skipped_with_the_reason() -> None:
    settled = run(policy(stage(says("a"), name="one", when="score < 0.95"), stage(says("b"))))
    assert settled.evidence.ran == ("rules",)
    assert settled.evidence.skipped == (Reason("stage:one", "skipped: score < 0.95 does not hold"),)


def test_a_condition_sees_the_results_of_the_stages_before() -> None:
    judged = stage(says("b"), name="two", when="checks.a.failed")
    failed = policy(stage(says("a", Outcome.FAIL, OnFail.FLAG)), judged)
    passed = policy(stage(says("a")), judged)
    assert run(failed).evidence.ran == ("rules", "two")
    assert run(passed).evidence.ran == ("rules",)


def test_a_condition_sees_score_and_confidence() -> None:
    checked = policy(stage(says("a"), when="score < 0.9 && confidence < 0.9"))
    assert run(checked, UNSURE).evidence.ran == ("rules",)
    assert run(checked, SURE).evidence.ran == ()


def test_a_condition_that_cannot_be_decided_runs_the_stage_and_says_so() -> None:
    settled = run(policy(stage(says("a"), when="score < 0.5")), exchange(None))
    assert settled.evidence.ran == ("rules",)
    (note,) = settled.evidence.notes
    assert note.source == "stage:rules"
    assert "score is not known" in note.message


def test_risk_raised_by_a_check_is_seen_by_the_stages_after_it() -> None:
    checked = policy(
        stage(says("a", Outcome.FAIL, OnFail.SCORE, score=0.5)),
        stage(says("b"), name="two", when="risk >= CRITICAL"),
        risk={"base": "low", "raise": [{"to": "critical", "when": "checks.a.failed"}]},
    )
    settled = run(checked)
    assert settled.risk.tier is RiskTier.CRITICAL
    assert settled.evidence.ran == ("rules", "two")


def test_signals_are_gathered_before_the_first_stage() -> None:
    evidence = start(policy(), UNSURE)
    assert evidence.signals["mean_logprob"] == -0.5
    assert start(policy(), exchange(None)).signals_absent is Absence.ABSENT


def test_signals_are_not_gathered_if_the_policy_asks_for_none() -> None:
    assert start(policy(confidence={"source": "none"}), UNSURE) == Evidence()


def test_every_result_carries_its_latency() -> None:
    results = run_validators(
        [says("a"), Breaks(id="b")], SURE, iter([5.0, 7.0, 7.0, 17.5]).__next__
    )
    assert {name: each.latency_ms for name, each in results.items()} == {"a": 2.0, "b": 10.5}


def test_a_check_that_raises_is_an_error_that_quotes_nothing() -> None:
    choice = Choice("choices[0]", texts=(Passage("choices[0].message.content", "hunter2"),))
    secret = Exchange("chat", {}, (choice,))
    result = run_validators([Breaks(id="b")], secret, lambda: 0.0)["b"]
    assert result.outcome is Outcome.ERROR
    assert result.error is not None
    assert result.error.startswith("KeyError in Breaks.run, line ")
    assert "hunter2" not in result.error
    assert result.score is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.001, 1.001])
def test_a_score_that_is_no_probability_is_an_error(value: float) -> None:
    result = run_validators([says("a", score=value)], SURE, lambda: 0.0)["a"]
    assert (result.outcome, result.score) == (Outcome.ERROR, None)
    assert result.error == f"score {value} is not in [0, 1]"


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, None])
def test_a_sound_result_is_left_as_it_is(value: float | None) -> None:
    result = CheckResult("a", Outcome.PASS, score=value)
    assert vetted(result) == result


def test_an_error_never_keeps_a_score() -> None:
    result = vetted(CheckResult("a", Outcome.ERROR, score=1.0))
    assert (result.score, result.error) == (None, "no reason given")
    assert vetted(CheckResult("a", Outcome.ERROR, error="timeout")).error == "timeout"


def test_a_result_goes_by_the_name_of_its_check() -> None:
    class Impostor(Says):
        def run(self, exchange: Exchange) -> CheckResult:
            return CheckResult("someone_else", Outcome.PASS, score=1.0)

    results = run_validators([Impostor(id="a")], SURE, lambda: 0.0)
    assert [(name, each.check) for name, each in results.items()] == [("a", "a")]


def test_the_judges_of_a_stage_are_not_asked_once_a_rule_blocks() -> None:
    veto = says("a", Outcome.FAIL, OnFail.BLOCK)
    settled = run(policy(stage(opines("q"), veto, opines("r", score=0.9))))
    assert list(settled.evidence.results) == ["q", "a", "r"]
    for judge in ("q", "r"):
        result = settled.evidence.results[judge]
        assert (result.outcome, result.cause) == (Outcome.ERROR, Cause.CANCELLED)
        assert result.error == "check a demands block"


def test_a_judge_that_blocks_cancels_the_others_of_its_stage() -> None:
    blocks = opines("q", Outcome.FAIL, score=0.1, on_fail=OnFail.BLOCK)
    checked = policy(stage(blocks, opines("r", on_error=OnError.BLOCK)))
    settled = run(checked)
    assert settled.evidence.results["r"].cause is Cause.CANCELLED
    assert action(checked, settled) is Action.BLOCK


def test_a_judge_without_a_result_and_without_a_block_could_not_run() -> None:
    checked = policy(stage(says("a"), opines("q", on_error=OnError.HOLD)))
    step = next_step(checked, start(checked, SURE), SURE, DEMO, 0.5)
    assert isinstance(step, RunStage)
    evidence = step.done(run_validators(step.stage.validators, SURE, lambda: 0.0))
    settled = next_step(checked, evidence, SURE, DEMO, 0.5)
    assert isinstance(settled, Settle)
    assert action(checked, settled) is Action.HOLD


@pytest.mark.parametrize(
    ("first", "judge", "is_asked"),
    [
        (says("a", Outcome.FAIL, OnFail.HOLD), opines("q"), False),
        (says("a", Outcome.FAIL, OnFail.REGENERATE), opines("q"), False),
        (says("a", Outcome.ERROR, on_error=OnError.HOLD), opines("q"), False),
        (says("a", Outcome.FAIL, OnFail.HOLD), opines("q", on_fail=OnFail.BLOCK), True),
        (says("a", Outcome.FAIL, OnFail.HOLD), opines("q", on_error=OnError.BLOCK), True),
        (says("a", Outcome.FAIL, OnFail.HOLD), opines("q", on_fail=OnFail.REGENERATE), True),
        (says("a", Outcome.FAIL, OnFail.HOLD), opines("q", on_fail=OnFail.SCORE), True),
        (says("a", Outcome.FAIL, OnFail.FLAG), opines("q"), True),
        (says("a", Outcome.FAIL, OnFail.FLAG), opines("q", on_fail=OnFail.FLAG), False),
        (says("a", Outcome.ERROR), opines("q", on_fail=OnFail.FLAG), False),
        (says("a"), opines("q", on_fail=OnFail.FLAG), True),
    ],
)
def test_judges_are_asked_only_where_they_can_change_the_action(
    first: Says, judge: Judge, is_asked: bool
) -> None:
    settled = run(policy(stage(first), stage(judge, name="judge")))
    assert ("judge" in settled.evidence.ran) is is_asked
    for reason in settled.evidence.skipped:
        assert reason.message.endswith("no judge here can ask for more")
        assert reason.message.startswith("skipped: check a demands ")


@pytest.mark.parametrize(
    "rest",
    [
        {"risk": {"base": "low", "raise": [{"to": "high", "when": "checks.q.failed"}]}},
        {"confidence": {"source": "judge"}},
    ],
    ids=["risk", "confidence"],
)
def test_judges_are_asked_whose_answer_matters_elsewhere(rest: dict[str, Any]) -> None:
    held = stage(says("a", Outcome.FAIL, OnFail.HOLD))
    assert run(policy(held, stage(opines("q"), name="judge"), **rest)).evidence.ran[-1] == "judge"


def test_a_judge_beside_a_rule_is_asked_though_the_response_is_held() -> None:
    """So that a policy can have its opinion for the reviewer."""
    first = stage(says("a", Outcome.FAIL, OnFail.HOLD))
    assert "q" in run(policy(first, stage(says("b"), opines("q"), name="judge"))).evidence.results
    assert "q" in run(policy(stage(says("a", Outcome.FAIL), opines("q")))).evidence.results


def test_judges_may_be_paid_for_where_the_budget_may_block() -> None:
    held = stage(says("a", Outcome.FAIL, OnFail.HOLD))
    budget = Budget(usd_per_day=1, when_used_up=OnError.BLOCK)
    judged = stage(opines("q"), name="judge", budget=budget)
    assert run(policy(held, judged)).evidence.ran == ("rules", "judge")


DRAWS = [(step + 0.5) / 4000 for step in range(4000)]


def sampled(name: str, share: float) -> list[bool]:
    """For which of DRAWS a stage of that name and share runs."""
    checked = policy(stage(says("a"), name=name, sample=share))
    ran = []
    for draw in DRAWS:
        step = next_step(checked, Evidence(), SURE, None, draw)
        ran.append(isinstance(step, RunStage))
        if isinstance(step, Settle):
            skipped = Reason(f"stage:{name}", f"skipped: not sampled ({share:g})")
            assert step.evidence.skipped == (skipped,)
    return ran


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_stage_runs_for_its_share_of_the_exchanges(share: float) -> None:
    deviation = math.sqrt(share * (1 - share) / len(DRAWS))
    assert sum(sampled("judge", share)) / len(DRAWS) == pytest.approx(share, abs=4 * deviation)


def test_stages_and_audit_are_sampled_independently_and_again_alike() -> None:
    one, two, audited = sampled("one", 0.5), sampled("two", 0.5), [draw < 0.5 for draw in DRAWS]
    assert sampled("one", 0.5) == one
    deviation = math.sqrt(0.25 * 0.75 / len(DRAWS))
    for left, right in ((one, two), (one, audited), (two, audited)):
        both = sum(map(and_, left, right)) / len(DRAWS)
        assert both == pytest.approx(0.25, abs=4 * deviation)


def test_a_larger_share_samples_what_a_smaller_one_does() -> None:
    assert all(map(le, sampled("judge", 0.1), sampled("judge", 0.5)))


@st.composite
def cascades(draw: st.DrawFn) -> list[Stage]:
    stages = []
    for index in range(draw(st.integers(min_value=0, max_value=4))):
        made: list[Check] = []
        for at in range(draw(st.integers(min_value=1, max_value=3))):
            settings: dict[str, Any] = {
                "on_fail": draw(st.sampled_from(OnFail)),
                "on_error": draw(st.sampled_from([None, *OnError])),
                "score": draw(st.sampled_from([0.0, 0.5, 1.0])),
            }
            name, outcome = f"check_{index}_{at}", draw(st.sampled_from(Outcome))
            if settings["on_fail"] is OnFail.REDACT or draw(st.booleans()):
                made.append(says(name, outcome, **settings))
            else:
                made.append(opines(name, outcome, **settings))
        used_up = draw(st.sampled_from([None, *OnError]))
        stages.append(stage(*made, name=f"stage_{index}", budget=Budget(when_used_up=used_up)))
    return stages


@given(cascades(), st.sampled_from(RiskTier))
def test_stopping_early_never_changes_the_action(stages: list[Stage], base: RiskTier) -> None:
    checked = policy(*stages, risk={"base": base})
    early = run(checked)
    whole = start(checked, SURE)
    for each in stages:
        results = run_validators(each.validators, SURE, lambda: 0.0)
        whole = whole.after(each.name, results | {one.id: ask(one) for one in each.judges})
    everything = next_step(checked, whole, SURE, DEMO, 0.5)
    assert isinstance(everything, Settle)
    assert action(checked, early) is action(checked, everything)
    if action(checked, early) is not Action.BLOCK:
        assert early.estimate == everything.estimate


@given(cascades())
def test_every_stage_is_in_the_evidence_once(stages: list[Stage]) -> None:
    evidence = run(policy(*stages)).evidence
    skipped = [reason.source.removeprefix("stage:") for reason in evidence.skipped]
    assert sorted([*evidence.ran, *skipped]) == [each.name for each in stages]
