"""What the evidence comes to: score and confidence, and why there is none."""

from __future__ import annotations

import math
from typing import Any

import pytest
from msgspec.structs import replace

from policies.calibration import Calibrator, LogisticScore, Platt, SignalScore
from policies.evidence import Estimate, Evidence, Reason, estimate
from policies.model import Policy
from policies.signals import Absence
from tests.policies.build import Opines, exchange, opines, policy, says, stage
from validators import OnFail, Outcome

SIGNALS = {"mean_logprob": -0.1}


def calibrator(**changes: Any) -> Calibrator:
    fields: dict[str, Any] = {
        "format": 1,
        "name": "demo",
        "created_at": "2026-01-02T03:04:05Z",
        "source": "logprob",
        "model": "demo-*",
        "score": SignalScore(kind="signal", name="mean_logprob"),
        "n": 10,
        "calibrator": Platt(kind="platt", a=-1.0, b=0.0),
    }
    return Calibrator.model_validate(fields | changes, strict=False)


def estimated(
    checked: Policy, evidence: Evidence, fitted: Calibrator | None, model: str = "demo-orders"
) -> Estimate:
    return estimate(checked, evidence, model=model, calibrator=fitted)


def test_confidence_comes_from_the_calibrator_and_names_it() -> None:
    known = estimated(policy(), Evidence(signals=SIGNALS), calibrator())
    assert (known.source, known.calibrator, known.uncalibrated) == ("logprob", "demo", None)
    assert known.score == pytest.approx(math.exp(-0.1))
    assert known.confidence == pytest.approx(math.exp(-0.1))


@pytest.mark.parametrize(
    ("evidence", "fitted", "why"),
    [
        (Evidence(signals=SIGNALS), None, "there is no calibrator"),
        (Evidence(signals=SIGNALS), calibrator(model="gpt-*"), "is for model gpt-*"),
        (Evidence(signals=SIGNALS), calibrator(checks_digest="a" * 64), "stale"),
        (Evidence(signals={"n_tokens": 3.0}), calibrator(), "needs the signal"),
        *[
            (Evidence(signals_absent=absence), calibrator(), f"logprobs are {absence}")
            for absence in Absence
        ],
    ],
)
def test_without_a_fitting_calibrator_there_is_no_confidence(
    evidence: Evidence, fitted: Calibrator | None, why: str
) -> None:
    known = estimated(policy(), evidence, fitted)
    assert (known.confidence, known.source, known.calibrator) == (None, "none", None)
    assert why in (known.uncalibrated or "")


def test_a_policy_that_asks_for_no_logprobs_has_no_confidence() -> None:
    checked = policy(confidence={"source": "none"})
    assert estimated(checked, Evidence(signals=SIGNALS), calibrator()).confidence is None


def test_a_failed_score_check_lowers_score_and_confidence() -> None:
    feeding = says("one", Outcome.FAIL, OnFail.SCORE, score=0.2)
    checked = policy(stage(feeding))
    fitted = calibrator(checks_digest=checked.checks_digest)
    evidence = replace(Evidence().after("rules", {"one": feeding.run(exchange())}), signals=SIGNALS)
    known = estimated(checked, evidence, fitted)
    assert known.score == 0.2
    assert known.confidence == pytest.approx(0.2)


def test_a_score_check_that_could_not_tell_leaves_nothing_to_calibrate() -> None:
    feeding = says("one", Outcome.ERROR, OnFail.SCORE)
    checked = policy(stage(feeding))
    fitted = calibrator(checks_digest=checked.checks_digest)
    evidence = replace(Evidence().after("rules", {"one": feeding.run(exchange())}), signals=SIGNALS)
    known = estimated(checked, evidence, fitted)
    assert (known.score, known.confidence) == (None, None)


def of_judges(*ids: str, **changes: Any) -> Calibrator:
    """A calibrator that needs the scores of these judges, each weighing 1, and nothing else."""
    score = LogisticScore(
        kind="logistic", intercept=0.0, coefficients={f"judge.{each}": 1.0 for each in ids}
    )
    judges = {each: opines(each).digest for each in ids}
    return calibrator(**{"source": "judge", "score": score, "judges": judges} | changes)


def asked(*judges: Opines, source: str = "judge") -> tuple[Policy, Evidence]:
    """A policy with these judges, and the evidence once all of them have been asked."""
    checked = policy(stage(*judges, name="judge"), confidence={"source": source})
    return checked, Evidence().after("judge", {each.id: each.said() for each in judges})


def test_confidence_of_judges_needs_no_logprobs() -> None:
    checked, evidence = asked(opines("a", score=0.8), opines("b", score=0.5))
    known = estimated(checked, evidence, of_judges("a", "b"))
    assert (known.source, known.calibrator) == ("judge", "demo")
    assert known.confidence == pytest.approx(0.8)
    assert known.score == 0.5


@pytest.mark.parametrize("absence", [None, *Absence])
def test_a_calibrator_of_judges_does_not_mind_absent_logprobs(absence: Absence | None) -> None:
    checked, evidence = asked(opines("a", score=0.8), source="logprob")
    known = estimated(checked, replace(evidence, signals_absent=absence), of_judges("a"))
    assert (known.score, known.source) == (None, "judge")
    assert known.confidence == pytest.approx(0.8)


def test_logprobs_and_judges_go_into_one_confidence() -> None:
    checked, evidence = asked(opines("a", score=0.8), source="logprob")
    weights = {"judge.a": 1.0, "mean_logprob": 1.0}
    both = LogisticScore(kind="logistic", intercept=0.0, coefficients=weights)
    fitted = of_judges("a", score=both, source="logprob")
    known = estimated(checked, replace(evidence, signals={"mean_logprob": math.log(0.5)}), fitted)
    assert known.source == "logprob"
    assert known.confidence == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("result", "skipped", "why"),
    [
        (opines("a", Outcome.ERROR), (), "judge a could not tell"),
        (None, (), "judge a was not asked: its stage has not run"),
        (
            None,
            (Reason("stage:judge", "skipped: not sampled (0.5)"),),
            "judge a was not asked: skipped: not sampled (0.5)",
        ),
    ],
    ids=["error", "not yet", "not sampled"],
)
def test_without_the_score_of_a_judge_there_is_no_confidence(
    result: Opines | None, skipped: tuple[Reason, ...], why: str
) -> None:
    checked, _ = asked(opines("a"))
    results = {} if result is None else {"a": result.said()}
    known = estimated(checked, Evidence(results, skipped=skipped), of_judges("a"))
    assert (known.score, known.confidence, known.source) == (None, None, "none")
    assert known.uncalibrated == f"calibrator demo does not apply: {why}"


def test_a_calibrator_of_another_judge_is_stale() -> None:
    checked, evidence = asked(opines("a", score=0.8, model="judge-large"))
    known = estimated(checked, evidence, of_judges("a"))
    assert (known.score, known.confidence) == (0.8, None)
    assert "is stale: the model, rubric or asking of judge a" in (known.uncalibrated or "")


def test_a_failed_rule_lowers_the_score_of_judges() -> None:
    feeding = says("one", Outcome.FAIL, OnFail.SCORE, score=0.0)
    checked = policy(stage(opines("a", score=0.8), feeding), confidence={"source": "judge"})
    results = {"a": opines("a", score=0.8).said(), "one": feeding.run(exchange())}
    assert estimated(checked, Evidence(results), None).score == 0.0


def test_a_judge_that_feeds_the_score_lowers_that_of_logprobs() -> None:
    feeding = opines("a", score=0.3, on_fail=OnFail.SCORE)
    checked, evidence = asked(feeding, source="logprob")
    fitted = calibrator(checks_digest=checked.checks_digest)
    known = estimated(checked, replace(evidence, signals=SIGNALS), fitted)
    assert known.score == 0.3
    assert known.confidence == pytest.approx(0.3)
