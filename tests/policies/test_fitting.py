"""Fitting: the maps that labels ask for, and the figures that say how good they are."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from policies.calibration import CalibrationError, Isotonic, logistic
from policies.maps import (
    Fit,
    best_fit,
    compared,
    cross_fitted,
    fit_beta,
    fit_isotonic,
    fit_logistic,
    fit_platt,
    fit_pooled,
    fit_venn_abers,
    normal_scale,
)
from policies.measures import Bools, Column, Floats, Labels, auroc, brier, ece, quality
from policies.signals import CLIP, log_odds

PROBABILITY = st.floats(min_value=0, max_value=1)
FITS = [fit_platt, fit_beta, fit_isotonic, fit_venn_abers, fit_pooled, best_fit]


@st.composite
def labelled(draw: st.DrawFn, at_least: int = 2) -> tuple[Floats, Bools]:
    """Scores and labels, with that many labels of each class or more."""
    positive = draw(st.lists(PROBABILITY, min_size=at_least, max_size=30))
    negative = draw(st.lists(PROBABILITY, min_size=at_least, max_size=30))
    labels = np.array([True] * len(positive) + [False] * len(negative))
    order = draw(st.permutations(range(len(labels))))
    return np.array(positive + negative)[order], labels[order]


def drawn(n: int, truth: Callable[[Floats], Floats], seed: int = 1) -> tuple[Floats, Bools]:
    """Scores over the whole range, and labels that are True with the probability `truth`."""
    chance = np.random.default_rng(seed)
    scores = chance.uniform(0.01, 0.99, n)
    return scores, chance.uniform(size=n) < truth(scores)


def overconfident(scores: Floats) -> Floats:
    return np.array([logistic(0.4 * log_odds(each) - 0.5) for each in scores])


@pytest.mark.parametrize("fit", FITS)
@given(rows=labelled())
@settings(max_examples=20, deadline=None)
def test_every_fit_is_a_probability_that_never_falls(fit: Fit, rows: tuple[Floats, Bools]) -> None:
    fitted = fit(*rows)
    mapped = [fitted.apply(score) for score in np.linspace(0, 1, 21)]
    assert all(0 <= each <= 1 for each in mapped)
    assert mapped == sorted(mapped)


@pytest.mark.parametrize("fit", [fit_platt, fit_beta, fit_isotonic])
@given(rows=labelled(), seed=st.integers(min_value=0, max_value=99))
@settings(max_examples=25, deadline=None)
def test_the_order_of_the_rows_does_not_matter_to_a_fit(
    fit: Fit, rows: tuple[Floats, Bools], seed: int
) -> None:
    order = np.random.default_rng(seed).permutation(len(rows[0]))
    one, other = fit(*rows), fit(rows[0][order], rows[1][order])
    for score in (0.05, 0.5, 0.95):
        assert one.apply(score) == pytest.approx(other.apply(score), abs=2e-3)


def test_platt_finds_the_sigmoid_that_the_labels_were_drawn_from() -> None:
    fitted = fit_platt(*drawn(20_000, overconfident))
    assert fitted.a == pytest.approx(-0.4, abs=0.03)
    assert fitted.b == pytest.approx(0.5, abs=0.05)


def test_platt_minimises_the_loss_of_smoothed_targets() -> None:
    """At the minimum the residuals are orthogonal to 1 and to the log-odds."""
    scores, labels = drawn(200, overconfident)
    fitted = fit_platt(scores, labels)
    positive, negative = labels.sum(), (~labels).sum()
    target = np.where(labels, (positive + 1) / (positive + 2), 1 / (negative + 2))
    residual = np.array([fitted.apply(score) for score in scores]) - target
    margins = np.array([log_odds(score) for score in scores])
    assert residual.sum() == pytest.approx(0, abs=0.05)
    assert residual @ margins == pytest.approx(0, abs=0.2)


def test_two_labels_give_neither_0_nor_1() -> None:
    fitted = fit_platt([0.2, 0.8], [False, True])
    assert fitted.apply(0.2) == pytest.approx(1 / 3, abs=1e-4)
    assert fitted.apply(0.8) == pytest.approx(2 / 3, abs=1e-4)


@pytest.mark.parametrize("fit", FITS)
def test_labels_that_speak_against_the_score_give_their_share_everywhere(fit: Fit) -> None:
    scores = np.repeat([0.1, 0.9], 500)
    labels = np.concatenate([np.arange(500) % 4 != 0, np.arange(500) % 4 == 0])
    fitted = fit(scores, labels)
    assert fitted.apply(0.1) == pytest.approx(0.5, abs=0.01)
    assert fitted.apply(0.9) == pytest.approx(0.5, abs=0.01)


def test_beta_bends_its_two_ends_on_their_own() -> None:
    """A judge that is right where it is sure of yes, and no better than half where it is of no."""
    scores, labels = drawn(20_000, lambda s: 1 - 0.5 * (1 - s) ** 0.4)
    beta, platt = fit_beta(scores, labels), fit_platt(scores, labels)
    fresh, truth = drawn(20_000, lambda s: 1 - 0.5 * (1 - s) ** 0.4, seed=2)
    one = ece([beta.apply(score) for score in fresh], truth)
    other = ece([platt.apply(score) for score in fresh], truth)
    assert one < 0.015 < 0.02 < other


def test_isotonic_is_the_mean_of_each_pool() -> None:
    fitted = fit_isotonic([0.1, 0.2, 0.3, 0.4], [False, True, False, True])
    assert [fitted.apply(score) for score in (0.1, 0.2, 0.3, 0.4)] == [0.0, 0.5, 0.5, 1.0]


def test_isotonic_of_one_score_is_the_share_of_true_labels() -> None:
    fitted = fit_isotonic([0.7] * 4, [True, True, True, False])
    assert {fitted.apply(score) for score in (0.0, 0.7, 1.0)} == {0.75}


def test_pooled_is_the_mean_of_its_two_maps_where_the_rough_one_bends() -> None:
    data = drawn(500, overconfident)
    smooth, rough, pooled = fit_beta(*data), fit_venn_abers(*data), fit_pooled(*data)
    for x, y in zip(rough.x, rough.y, strict=True):
        assert pooled.apply(x) == pytest.approx((smooth.apply(x) + y) / 2, abs=1e-9)


def test_a_map_that_is_clearly_better_is_taken_and_else_the_pooled_one() -> None:
    name, _, losses = compared(*drawn(4000, lambda s: np.where(s < 0.5, 0.05, 0.95)))
    assert name in {"isotonic", "venn-abers"}
    assert losses[name] < losses["pooled"] < losses["beta"]
    wavy = [drawn(1000, lambda s: 0.8 * s + 0.1 * np.sin(9 * s) + 0.1, seed=i) for i in range(8)]
    found = [compared(*each) for each in wavy]
    assert [each.name for each in found].count("pooled") >= 6
    for name, _, losses in found:
        assert losses[name] == min(losses.values()) or name == "pooled"
        assert losses["pooled"] < max(losses["beta"], losses["venn-abers"])


def test_cross_fitting_never_shows_a_row_its_own_label() -> None:
    """A map that repeats what it has seen is right on seen rows and no use on others."""
    scores = np.linspace(0, 1, 40)
    labels = np.arange(40) % 2 == 0
    seen: list[set[float]] = []

    def remember(some: Column, truth: Labels, weights: Column | None = None) -> Isotonic:
        seen.append(set(np.asarray(some).tolist()))
        return Isotonic(kind="isotonic", x=(0.0, 1.0), y=(len(seen) / 10, len(seen) / 10))

    fitted = cross_fitted(scores, labels, remember)
    assert len(seen) == 5
    for score, value in zip(scores.tolist(), fitted.tolist(), strict=True):
        assert score not in seen[round(value * 10) - 1]
    for each in range(5):
        assert labels[fitted == (each + 1) / 10].sum() == 4


def test_weights_come_back_on_the_scale_of_the_features() -> None:
    chance = np.random.default_rng(1)
    length = np.exp(chance.uniform(0, 5, 20_000))
    judged = chance.uniform(0.01, 0.99, 20_000)
    z = 1.0 - 0.5 * np.log(length) + 0.8 * np.log(judged / (1 - judged))
    labels = chance.uniform(size=20_000) < 1 / (1 + np.exp(-z))
    fitted = fit_logistic({"n_tokens": length, "judge.q": judged}, labels)
    assert fitted.intercept == pytest.approx(1.0, abs=0.1)
    assert fitted.coefficients["n_tokens"] == pytest.approx(-0.5, abs=0.05)
    assert fitted.coefficients["judge.q"] == pytest.approx(0.8, abs=0.05)
    value = fitted.of({"n_tokens": 10.0, "judge.q": 0.9})
    assert value == pytest.approx(logistic(1 - 0.5 * math.log(10) + 0.8 * log_odds(0.9)), abs=0.02)


def test_a_constant_signal_has_no_weight() -> None:
    scores, labels = drawn(100, overconfident)
    fitted = fit_logistic({"judge.q": scores, "n_tokens": [7.0] * 100}, labels)
    assert fitted.coefficients["n_tokens"] == 0.0
    assert fitted.coefficients["judge.q"] > 0


def test_separable_labels_do_not_give_extreme_weights() -> None:
    fitted = fit_logistic({"judge.q": [0.1, 0.2, 0.8, 0.9]}, [False, False, True, True])
    assert 0 < fitted.coefficients["judge.q"] < 3


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, 0.2], [True], "2 values for 1 labels"),
        ([0.1, 0.2], [True, True], "of 2 labels none is False"),
        ([0.1, 0.2], [False, False], "of 2 labels none is True"),
        ([0.1, math.nan], [True, False], "missing or not finite"),
        ([0.1, 1.5], [True, False], "not in \\[0, 1\\]"),
    ],
    ids=["lengths", "no False", "no True", "nan", "range"],
)
def test_what_cannot_be_fitted_is_refused(fit: Fit, scores: Any, labels: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        fit(scores, labels)


def test_what_cannot_be_combined_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no signals"):
        fit_logistic({}, [True, False])
    with pytest.raises(CalibrationError, match=r"judge\.q: a value is missing"):
        fit_logistic({"judge.q": [0.1, math.nan]}, [True, False])
    with pytest.raises(CalibrationError, match="2 labels of each class"):
        cross_fitted([0.1, 0.2, 0.3], [True, False, False], fit_platt)


def test_ece_is_the_distance_of_shares_weighted_by_bins_of_equal_mass() -> None:
    probabilities = [0.1, 0.1, 0.6, 0.6, 0.6]
    labels = [False, True, True, True, True]
    assert ece(probabilities, labels, bins=2) == pytest.approx(
        (3 * abs(0.8 / 3 - 2 / 3) + 2 * 0.4) / 5
    )
    assert ece([0.2], [True]) == pytest.approx(0.8)


def test_ece_of_what_is_calibrated_is_noise_that_debiasing_takes_off() -> None:
    plain, debiased = [], []
    for seed in range(40):
        rows = drawn(600, lambda scores: scores, seed)
        plain.append(ece(*rows))
        debiased.append(ece(*rows, debiased=True))
    assert np.mean(plain) > 0.04
    assert np.mean(debiased) < 0.6 * np.mean(plain)


def test_debiasing_leaves_what_is_plainly_wrong() -> None:
    rows = np.full(3000, 0.9), np.arange(3000) % 2 == 0
    assert ece(*rows) == pytest.approx(0.4)
    assert ece(*rows, debiased=True) == pytest.approx(0.4, abs=0.001)


@given(labelled())
def test_figures_are_in_their_range(rows: tuple[Floats, Bools]) -> None:
    assert 0 <= ece(*rows, debiased=True) <= ece(*rows) <= 1
    assert 0 <= brier(*rows) <= 1
    assert 0 <= auroc(*rows) <= 1


@given(labelled())
def test_auroc_counts_the_pairs_in_the_right_order(rows: tuple[Floats, Bools]) -> None:
    scores, labels = rows
    above, below = scores[labels][:, None], scores[~labels][None, :]
    pairs = (above > below) + 0.5 * (above == below)
    assert auroc(scores, labels) == pytest.approx(pairs.mean())
    assert auroc(-scores, labels) == pytest.approx(1 - pairs.mean())


@given(arrays.arrays(bool, st.integers(min_value=1, max_value=50)))
def test_a_sure_and_right_forecast_has_no_error(labels: Bools) -> None:
    assert brier(labels.astype(float), labels) == 0
    assert brier(np.full(len(labels), 0.5), labels) == 0.25


def test_quality_has_the_figures_of_both() -> None:
    scores, labels = drawn(2000, overconfident)
    platt = fit_platt(scores, labels)
    fitted = [platt.apply(score) for score in scores]
    fresh = quality(scores, fitted, labels)
    assert (fresh.n, fresh.bins) == (2000, 15)
    assert fresh.ece == ece(fitted, labels) < fresh.ece_raw == ece(scores, labels)
    assert fresh.brier == brier(fitted, labels) < fresh.brier_raw == brier(scores, labels)


@pytest.mark.parametrize("figure", [ece, brier])
def test_figures_of_nothing_are_refused(figure: Callable[[Any, Any], float]) -> None:
    with pytest.raises(CalibrationError, match="0 values and 0 labels"):
        figure([], [])
    with pytest.raises(CalibrationError, match="not in"):
        figure([1.5], [True])


def test_clipped_scores_are_fitted_as_they_will_be_applied() -> None:
    fitted = fit_beta([0.0, CLIP, 1 - CLIP, 1.0] * 5, [False, True, False, True] * 5)
    assert fitted.apply(0.0) == fitted.apply(CLIP)
    assert fitted.apply(1.0) == fitted.apply(1 - CLIP)


@pytest.mark.parametrize("module", ["gateway.app", "policies"])
def test_nothing_that_answers_a_request_imports_what_fitting_needs(module: str) -> None:
    code = f"import sys, {module}; print(sys.modules.keys() & {{'numpy', 'scipy', 'sklearn'}})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


@given(
    arrays.arrays(
        np.float64, st.integers(2, 200), elements=st.floats(-50, 50, allow_subnormal=False)
    )
)
def test_normal_scores_rise_with_the_feature_and_end_where_the_labels_do(values: Floats) -> None:
    scale = normal_scale(values)
    if scale is None:
        assert len(np.unique(values)) < 2
        return
    there = sorted({*values.tolist(), -60.0, 60.0})
    found = [scale.apply(each) for each in there]
    assert found == sorted(found)
    assert (found[0], found[-1]) == (scale.z[0], scale.z[-1])
    assert found == pytest.approx(np.interp(there, scale.x, scale.z))


def test_the_normal_scores_of_a_normal_feature_are_its_own() -> None:
    values = np.random.default_rng(1).normal(size=20_000)
    scale = normal_scale(values)
    assert scale is not None
    assert [scale.apply(each) for each in (-1.5, 0.0, 1.5)] == pytest.approx(
        [-1.5, 0, 1.5], abs=0.05
    )
