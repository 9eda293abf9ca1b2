"""The cascade: what runs, in which order, when it stops, and what a broken check becomes."""

from __future__ import annotations

import math
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.calibration import load_calibrator
from policies.cascade import RunStage, Settle, next_step, run_stage, start, vetted
from policies.decision import Evidence, Reason, decide
from policies.model import Action, Policy, RiskTier, Stage
from policies.signals import Absence
from tests.policies.build import Breaks, Says, exchange, policy, says, stage, tokens
from validators import CheckResult, Choice, Exchange, OnError, OnFail, Outcome, Passage

DEMO = load_calibrator(
    (Path(__file__).parents[2] / "config" / "calibrators" / "demo.json").read_text(),
    file="demo.json",
)
SURE = exchange(tokens([-1e-6] * 8))
UNSURE = exchange(tokens([-0.5] * 8))


def run(checked: Policy, over: Exchange = SURE) -> Settle:
    """The cascade as its module says it is driven."""
    evidence = start(checked, over)
    ticks = count(step=3)
    while isinstance(step := next_step(checked, evidence, over, DEMO), RunStage):
        results = run_stage(step.stage, over, lambda: float(next(ticks)))
        evidence = step.evidence.after(step.stage.name, results)
    return step


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
    results = run_stage(
        stage(says("a"), Breaks(id="b")), SURE, iter([5.0, 7.0, 7.0, 17.5]).__next__
    )
    assert {name: each.latency_ms for name, each in results.items()} == {"a": 2.0, "b": 10.5}


def test_a_check_that_raises_is_an_error_that_quotes_nothing() -> None:
    choice = Choice("choices[0]", texts=(Passage("choices[0].message.content", "hunter2"),))
    secret = Exchange("chat", {}, (choice,))
    result = run_stage(stage(Breaks(id="b")), secret, lambda: 0.0)["b"]
    assert result.outcome is Outcome.ERROR
    assert result.error is not None
    assert result.error.startswith("KeyError in Breaks.run, line ")
    assert "hunter2" not in result.error
    assert result.score is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.001, 1.001])
def test_a_score_that_is_no_probability_is_an_error(value: float) -> None:
    result = run_stage(stage(says("a", score=value)), SURE, lambda: 0.0)["a"]
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

    results = run_stage(stage(Impostor(id="a")), SURE, lambda: 0.0)
    assert [(name, each.check) for name, each in results.items()] == [("a", "a")]


@st.composite
def cascades(draw: st.DrawFn) -> list[Stage]:
    stages = []
    for index in range(draw(st.integers(min_value=0, max_value=4))):
        made = [
            says(
                f"check_{index}_{at}",
                draw(st.sampled_from(Outcome)),
                draw(st.sampled_from(OnFail)),
                draw(st.sampled_from([None, *OnError])),
            )
            for at in range(draw(st.integers(min_value=1, max_value=3)))
        ]
        stages.append(stage(*made, name=f"stage_{index}"))
    return stages


@given(cascades())
def test_stopping_early_never_changes_the_action(stages: list[Stage]) -> None:
    checked = policy(*stages)
    early = run(checked)
    whole = start(checked, SURE)
    for each in stages:
        whole = whole.after(each.name, run_stage(each, SURE, lambda: 0.0))
    everything = next_step(checked, whole, SURE, DEMO)
    assert isinstance(everything, Settle)
    assert action(checked, early) is action(checked, everything)


@given(cascades())
def test_every_stage_is_in_the_evidence_once(stages: list[Stage]) -> None:
    evidence = run(policy(*stages)).evidence
    skipped = [reason.source.removeprefix("stage:") for reason in evidence.skipped]
    assert [*evidence.ran, *skipped] == [each.name for each in stages]
