"""From labels to an artefact: what goes in, what is left out and why, and what comes out."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC, datetime
from math import exp, log
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from policies.calibration import CalibrationError, Calibrator, LogisticScore, load_calibrator
from policies.diagnostics import Diagnostics
from policies.fitting import fit
from policies.labelled import Labelled
from policies.measures import auroc
from policies.model import RiskTier

WHEN = datetime(2026, 1, 2, tzinfo=UTC)
JUDGES = {"opinion": "1" * 64}


def answers(n: int, *, accuracy: float = 0.85, seed: int = 1, **same: Any) -> list[Labelled]:
    """Answers that are the more probable, and the better liked by a judge, if they are right."""
    chance = np.random.default_rng(seed)
    found = []
    for at in range(n):
        right = bool(chance.uniform() < accuracy)
        z, opinion = chance.normal() + 2.2 * right, chance.normal() + 1.2 * right
        said = {
            "id": f"{seed}-{at}",
            "signals": {
                "mean_logprob": -log(1 + exp(-z)),
                "judge.opinion": 1 / (1 + exp(-opinion)),
            },
            "model": "m-1",
        }
        found.append(Labelled(acceptable=right, **{**said, **same}))
    return found


def fitted(rows: list[Labelled], **options: Any) -> tuple[Calibrator, Diagnostics]:
    return fit(
        rows, **{"name": "a", "created_at": WHEN, "alpha": 0.05, "judges": JUDGES, **options}
    )


@pytest.mark.parametrize("mode", ["certified", "estimated"])
def test_the_file_does_to_responses_what_its_certificate_says(mode: str) -> None:
    rows = answers(1200)
    calibrator, _ = fitted(rows, mode=mode)
    (certificate,) = calibrator.certificates
    assert certificate.threshold is not None
    read = load_calibrator(calibrator.model_dump_json(), file="a.json")
    assert read == calibrator
    later = answers(6000, seed=9)
    returned = [row for row in later if read.confidence(row.signals) >= certificate.threshold]
    assert len(returned) / len(later) == pytest.approx(certificate.coverage, abs=0.04)
    assert sum(not row.acceptable for row in returned) / len(returned) <= 0.05


@pytest.mark.parametrize("mode", ["certified", "estimated"])
def test_the_order_of_the_labels_does_not_matter(mode: str) -> None:
    rows = answers(400)
    shuffled = random.Random(3).sample(rows, len(rows))
    assert fitted(rows, mode=mode) == fitted(shuffled, mode=mode)


def test_two_signals_order_better_than_one() -> None:
    _, diagnostics = fitted(answers(3000), mode="estimated")
    assert diagnostics.quality.auroc > diagnostics.quality.best_single_auroc
    assert diagnostics.scorers["mean_logprob + judge.opinion"] < min(
        loss for name, loss in diagnostics.scorers.items() if "+" not in name
    )
    assert all(use.used and use.adds is not None and use.adds > 0 for use in diagnostics.signals)


def test_round_numbers_that_a_judge_likes_do_not_drown_the_other_signal() -> None:
    """A judge says 1 of most answers, and 0.9 or 0.8 of the others, which are wrong more often."""
    rows = []
    for row in answers(3000, accuracy=0.7):
        liked = row.signals["judge.opinion"]
        said = 1.0 if liked > 0.4 else 0.9 if liked > 0.3 else 0.8
        rows.append(replace(row, signals={**row.signals, "judge.opinion": said}))
    calibrator, _ = fitted(rows[:1000], mode="estimated")
    assert set(calibrator.score.signals) == {"mean_logprob", "judge.opinion"}
    assert isinstance(calibrator.score, LogisticScore)
    assert calibrator.score.scales.keys() == {"mean_logprob", "judge.opinion"}
    right = np.array([row.acceptable for row in rows[1000:]])
    both = np.array([calibrator.confidence(row.signals) for row in rows[1000:]])
    alone = np.array([row.signals["mean_logprob"] for row in rows[1000:]])
    assert auroc(both, right) > auroc(alone, right) + 0.01


def test_confidence_means_what_it_says() -> None:
    calibrator, diagnostics = fitted(answers(3000), mode="estimated")
    assert diagnostics.quality.ece < 0.02
    later = answers(8000, seed=5)
    told = np.array([calibrator.confidence(row.signals) for row in later])
    right = np.array([row.acceptable for row in later])
    for low, high in ((0.0, 0.5), (0.5, 0.9), (0.9, 1.01)):
        some = (told >= low) & (told < high)
        assert told[some].mean() == pytest.approx(right[some].mean(), abs=0.05)


def test_a_dead_signal_is_noticed_and_not_used() -> None:
    rows = [
        replace(row, signals={**row.signals, "min_margin": 7.0 if at else 7.1})
        for at, row in enumerate(answers(400))
    ]
    calibrator, diagnostics = fitted(rows)
    assert "min_margin" not in calibrator.score.signals
    assert (
        "signal min_margin is left out: it is constant: its values carry no information"
        in diagnostics.remarks
    )


def test_noise_is_not_used() -> None:
    chance = np.random.default_rng(2)
    rows = [
        replace(row, signals={**row.signals, "n_tokens": float(chance.integers(5, 500))})
        for row in answers(1000)
    ]
    _, diagnostics = fitted(rows, mode="estimated")
    (noise,) = (use for use in diagnostics.signals if use.name == "n_tokens")
    assert not noise.used
    assert noise.reason


def without(row: Labelled, name: str) -> Labelled:
    return replace(row, signals={k: v for k, v in row.signals.items() if k != name})


def test_labels_that_lack_a_signal_are_left_out_and_a_signal_most_lack_too() -> None:
    rows = answers(400)
    few = [without(row, "judge.opinion") if at % 20 == 0 else row for at, row in enumerate(rows)]
    _, diagnostics = fitted(few)
    assert "20 labels lack a signal that the others have" in diagnostics.remarks
    many = [without(row, "judge.opinion") if at % 2 else row for at, row in enumerate(rows)]
    calibrator, diagnostics = fitted(many)
    assert calibrator.score.signals == ("mean_logprob",)
    assert calibrator.judges == {}
    assert "signal judge.opinion is left out: only 200 of 400 labels have it" in diagnostics.remarks


def test_the_score_of_a_judge_the_policy_has_not_is_not_used() -> None:
    calibrator, diagnostics = fitted(answers(400), judges={})
    assert calibrator.judges == {}
    assert "signal judge.opinion is left out: the policy has no such judge" in diagnostics.remarks


def test_the_same_content_counts_once_and_the_last_word_on_it() -> None:
    rows = [replace(row, digest=row.id, at=WHEN) for row in answers(400)]
    again = [
        replace(
            row, id=f"again {row.id}", acceptable=not row.acceptable, at=WHEN.replace(year=2025)
        )
        for row in rows[:50]
    ]
    calibrator, diagnostics = fitted(again + rows)
    assert calibrator.n == 400
    assert any(remark.startswith("50 labels are of content") for remark in diagnostics.remarks)
    alone, _ = fitted(rows)
    assert calibrator.score == alone.score


REFUSED: dict[str, tuple[Callable[[], list[Labelled]], dict[str, Any], str]] = {
    "few": (lambda: answers(39), {}, "39 labels can be used"),
    "one kind": (lambda: answers(400, accuracy=1.0), {}, "400 acceptable and 0 not"),
    "two models": (
        lambda: answers(50) + answers(50, seed=2, model="m-2"),
        {},
        "labels are of 2 models (m-1, m-2)",
    ),
    "no model": (lambda: answers(50, model=""), {}, "do not say of which model"),
    "no signal": (lambda: answers(50, signals={}), {}, "no signal is of use"),
    "half a cost": (lambda: answers(400), {"cost_error": 1.0}, "go together"),
    "alpha": (lambda: answers(400), {"alpha": 0.0}, "must lie between 0 and 1"),
    "alphas": (lambda: answers(400), {"alpha": {"*": 0.1, "x": 1.0}}, "must lie between 0 and 1"),
    "alpha of nothing": (lambda: answers(400), {"alpha": {"low": 0.1}}, "one threshold is for all"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_fitted_is_refused_with_the_reason(case: str) -> None:
    rows, options, reason = REFUSED[case]
    with pytest.raises(CalibrationError) as raised:
        fitted(rows(), **options)
    assert reason in str(raised.value)


def test_labels_of_other_models_are_left_out() -> None:
    calibrator, diagnostics = fitted(answers(400) + answers(100, seed=2, model="x"), model="m-*")
    assert (calibrator.n, calibrator.model) == (400, "m-*")
    assert "100 labels are of models other than m-*" in diagnostics.remarks


def test_each_tier_has_its_threshold_and_its_share_of_delta() -> None:
    rows = answers(900, tier=RiskTier.LOW) + answers(900, seed=2, accuracy=0.6, tier=RiskTier.HIGH)
    calibrator, diagnostics = fitted(rows, per="tier", alpha=0.1)
    high, low = calibrator.certificates
    assert (high.tier, low.tier) == (RiskTier.HIGH, RiskTier.LOW)
    assert high.delta == low.delta == 0.025
    assert low.threshold is not None
    assert high.threshold is None or high.threshold > low.threshold
    assert {each.value for each in diagnostics.slices if each.by == "tier"} == {"low", "high"}


def test_labels_of_little_trust_calibrate_but_do_not_certify() -> None:
    rows = answers(600) + answers(600, seed=2, weight=0.5)
    calibrator, diagnostics = fitted(rows)
    (certificate,) = calibrator.certificates
    assert calibrator.n == 1200
    assert 400 < certificate.n < 500
    assert any("of less than full trust" in remark for remark in diagnostics.remarks)


def test_labels_of_what_was_held_do_not_bend_the_threshold() -> None:
    """All doubtful answers are labelled, and a tenth of the others: still the confidence is that of all answers."""
    everything = answers(12_000)
    middle = float(np.median([row.signals["mean_logprob"] for row in everything]))
    chance = np.random.default_rng(1)
    rows = []
    for row in everything:
        inclusion = 0.1 if row.signals["mean_logprob"] > middle else 1.0
        if chance.uniform() < inclusion:
            rows.append(replace(row, inclusion=inclusion))
    weighted, _ = fitted(rows, mode="estimated")
    blind, _ = fitted([replace(row, inclusion=1.0) for row in rows], mode="estimated")
    truth, _ = fitted(everything, mode="estimated")
    told = [weighted.certificates[0].coverage, truth.certificates[0].coverage]
    assert told[0] == pytest.approx(told[1], abs=0.05)
    assert abs(blind.certificates[0].coverage - told[1]) > 0.2


def test_recent_responses_that_are_otherwise_are_told_of() -> None:
    rows = answers(600)
    same = [row.signals for row in answers(500, seed=7)]
    other = [row.signals for row in answers(500, seed=7, accuracy=0.4)]
    assert not any("has drifted" in each for each in fitted(rows, recent=same)[1].remarks)
    assert any(
        each.startswith("signal mean_logprob has drifted")
        for each in fitted(rows, recent=other)[1].remarks
    )


def test_costs_give_a_threshold_of_their_own() -> None:
    calibrator, _ = fitted(answers(400), cost_error=50.0, cost_review=1.2)
    assert calibrator.cost_threshold == pytest.approx(0.976)


def test_what_is_not_feasible_returns_nothing() -> None:
    calibrator, diagnostics = fitted(answers(200, accuracy=0.6), alpha=0.01)
    (certificate,) = calibrator.certificates
    assert certificate.threshold is None
    assert certificate.coverage == 0.0
    assert certificate.best_alpha is not None
    assert [offer.alpha for offer in diagnostics.offers] == [0.01, 0.02, 0.05, 0.1]


def test_what_a_report_draws_adds_up() -> None:
    rows = answers(1000, task="t")
    calibrator, found = fitted(rows, mode="estimated")
    assert sum(each.n for each in found.reliability) == 1000
    assert found.errors == sum(not row.acceptable for row in rows)
    last = found.curve[-1]
    assert last.coverage == pytest.approx(1.0)
    assert last.risk == pytest.approx(found.errors / 1000)
    assert all(each.low <= each.risk <= each.high for each in found.curve)
    confidences = [each.confidence for each in found.mistakes]
    assert confidences == sorted(confidences, reverse=True)
    assert calibrator.curve == found.curve
    assert found.slices == ()


def test_a_check_that_lowers_the_score_lowers_it_here_too() -> None:
    rows = [
        replace(row, check_scores=(0.0,)) if at % 10 == 0 else row
        for at, row in enumerate(answers(1500))
    ]
    calibrator, _ = fitted(rows, mode="estimated", alpha=0.1)
    (certificate,) = calibrator.certificates
    assert certificate.threshold is not None
    assert calibrator.confidence(rows[0].signals, (0.0,)) < certificate.threshold
    assert certificate.coverage < 0.9
