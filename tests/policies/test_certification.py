"""Certificates: what is promised is kept where the truth is known, and nothing is promised that cannot be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, ndtr, ndtri

from policies.agreement import binomial_cdf
from policies.calibration import CalibrationError
from policies.certification import certify, estimate_threshold, ridge, thinned
from policies.measures import Bools, Floats

DELTA = 0.05


class World:
    """Answers whose score is a normal variable, further up if they are right: all shares are known."""

    def __init__(self, accuracy: float, area: float, levels: int = 0) -> None:
        self.accuracy, self.apart, self.levels = accuracy, float(ndtri(area)) * 2**0.5, levels

    def draw(self, n: int, chance: np.random.Generator) -> tuple[Floats, Bools]:
        right = chance.uniform(size=n) < self.accuracy
        z = chance.normal(size=n) + self.apart * right
        if self.levels:
            z = np.round(z * self.levels) / self.levels
        return expit(z - 1), right

    def risk(self, threshold: float) -> float:
        """The share of errors among what scores at least this."""
        at = np.log(threshold / (1 - threshold)) + 1 if 0 < threshold < 1 else -np.inf
        if self.levels and np.isfinite(at):
            at = (np.round(at * self.levels) - 0.5) / self.levels
        wrong, right = ndtr(-at), ndtr(self.apart - at)
        bad = (1 - self.accuracy) * wrong
        return float(bad / (bad + self.accuracy * right))


WORLDS = {
    "good": World(0.88, 0.9),
    "hard": World(0.7, 0.8),
    "coarse": World(0.85, 0.88, levels=2),
    "hopeless": World(0.8, 0.55),
}


@pytest.mark.parametrize("alpha", [0.02, 0.1])
@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_a_certificate_is_broken_no_more_often_than_it_says(world: World, alpha: float) -> None:
    """120 sets of labels: more than 11 broken would be a chance of 1 in 50 at a true rate of 5 %."""
    chance = np.random.default_rng(7)
    broken = 0
    for _ in range(120):
        scores, labels = world.draw(500, chance)
        found = certify(
            scores[:350], labels[:350], scores[350:], labels[350:], alpha=alpha, delta=DELTA
        )
        broken += found.threshold is not None and world.risk(found.threshold) > alpha
    assert broken <= 11


@pytest.mark.parametrize("alpha", [0.05, 0.1])
@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_an_estimate_is_rarely_broken_where_its_curve_is_fair(world: World, alpha: float) -> None:
    chance = np.random.default_rng(7)
    broken = 0
    for _ in range(80):
        scores, labels = world.draw(800, chance)
        found = estimate_threshold(scores, labels, np.ones(800), alpha=alpha, delta=DELTA)
        broken += found.threshold is not None and world.risk(found.threshold) > alpha
    assert broken <= 9


def test_an_estimate_reaches_further_than_a_certificate() -> None:
    chance = np.random.default_rng(3)
    certified, estimated = 0, 0
    for _ in range(40):
        scores, labels = WORLDS["good"].draw(1000, chance)
        one = certify(
            scores[250:], labels[250:], scores[:250], labels[:250], alpha=0.05, delta=DELTA
        )
        other = estimate_threshold(scores, labels, np.ones(1000), alpha=0.05, delta=DELTA)
        certified += int((scores >= (one.threshold or 2)).sum())
        estimated += int((scores >= (other.threshold or 2)).sum())
    assert 0.5 * estimated < certified < estimated


def test_a_misleading_guide_costs_reach_but_never_the_promise() -> None:
    chance = np.random.default_rng(5)
    broken = 0
    for _ in range(120):
        scores, labels = WORLDS["hard"].draw(400, chance)
        guide, _ = WORLDS["hard"].draw(150, chance)
        found = certify(scores, labels, guide, np.arange(150) % 50 > 0, alpha=0.05, delta=DELTA)
        broken += found.threshold is not None and WORLDS["hard"].risk(found.threshold) > 0.05
    assert broken <= 11


def test_the_limit_that_is_told_is_the_exact_one() -> None:
    scores, labels = WORLDS["good"].draw(1000, np.random.default_rng(1))
    found = certify(scores[300:], labels[300:], scores[:300], labels[:300], alpha=0.05, delta=DELTA)
    assert found.threshold is not None
    assert found.bound is not None
    above = scores[300:] >= found.threshold
    assert (found.n, found.accepted) == (700, int(above.sum()))
    assert found.errors == int((~labels[300:][above]).sum())
    assert found.bound <= 0.05
    assert binomial_cdf(found.errors, found.accepted, found.bound) == pytest.approx(DELTA)


def test_what_is_not_feasible_is_said_with_what_would_be() -> None:
    scores, labels = WORLDS["hard"].draw(300, np.random.default_rng(2))
    found = certify(scores[100:], labels[100:], scores[:100], labels[:100], alpha=0.01, delta=DELTA)
    assert found.threshold is None
    assert found.best_alpha is not None
    assert 0.01 < found.best_alpha < 0.3
    again = certify(
        scores[100:],
        labels[100:],
        scores[:100],
        labels[:100],
        alpha=found.best_alpha,
        delta=DELTA,
    )
    assert again.threshold is not None


def test_the_labels_that_are_said_to_be_missing_are_about_enough() -> None:
    chance = np.random.default_rng(4)
    scores, labels = WORLDS["good"].draw(150, chance)
    found = certify(scores[50:], labels[50:], scores[:50], labels[:50], alpha=0.02, delta=DELTA)
    assert found.threshold is None
    assert found.more_labels is not None
    enough = 0
    for _ in range(40):
        scores, labels = WORLDS["good"].draw(3 * (100 + found.more_labels), chance)
        half = len(scores) // 3
        later = certify(
            scores[half:], labels[half:], scores[:half], labels[:half], alpha=0.02, delta=DELTA
        )
        enough += later.threshold is not None
    assert enough >= 20


def test_no_number_of_labels_helps_where_the_surest_err_too_often() -> None:
    chance = np.random.default_rng(4)
    scores, labels = chance.uniform(size=500), chance.uniform(size=500) < 0.8
    found = estimate_threshold(scores, labels, np.ones(500), alpha=0.02, delta=DELTA)
    assert found.threshold is None
    assert found.more_labels is None


def test_if_all_is_well_everything_is_returned() -> None:
    scores = np.random.default_rng(1).uniform(size=600)
    labels = np.ones(600, dtype=bool)
    found = certify(scores[100:], labels[100:], scores[:100], labels[:100], alpha=0.05, delta=DELTA)
    assert found.threshold == 0.0
    assert found.accepted == 500


def test_unequal_probabilities_are_not_counts() -> None:
    """Errors are seen ten times as often as the rest: thinned, the labels are as the responses are."""
    chance = np.random.default_rng(6)
    shares, kept_of = [], []
    for round_ in range(60):
        right = chance.uniform(size=4000) < 0.9
        inclusion = np.where(right, 0.05, 0.5)
        seen = chance.uniform(size=4000) < inclusion
        ids = [f"{round_} {i}" for i in np.flatnonzero(seen)]
        kept = thinned(ids, inclusion[seen])
        shares.append((~right[seen][kept]).mean())
        kept_of.append((~right[seen]).mean())
    assert np.mean(shares) == pytest.approx(0.1, abs=0.01)
    assert np.mean(kept_of) > 0.4


def test_weights_make_an_estimate_of_the_responses_not_of_the_labels() -> None:
    """Doubtful answers are labelled five times as often; the threshold is much the same."""
    chance = np.random.default_rng(8)
    world = WORLDS["good"]
    scores, labels = world.draw(12_000, chance)
    inclusion = np.where(scores > np.median(scores), 0.1, 0.5)
    seen = chance.uniform(size=12_000) < inclusion
    found = estimate_threshold(
        scores[seen], labels[seen], 1 / inclusion[seen], alpha=0.05, delta=DELTA
    )
    assert found.threshold is not None
    assert world.risk(found.threshold) <= 0.05
    assert (scores >= found.threshold).mean() > 0.5


@given(
    ids=st.lists(st.text(max_size=8), min_size=1, max_size=30),
    rate=st.floats(min_value=1e-6, max_value=1),
)
def test_equal_probabilities_keep_every_label(ids: list[str], rate: float) -> None:
    assert thinned(ids, np.full(len(ids), rate)).all()


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 60))
def test_newton_finds_the_minimum(seed: int, n: int) -> None:
    """The slope is 0 there, even where one column tells the labels apart."""
    chance = np.random.default_rng(seed)
    features = np.column_stack([chance.normal(size=(n, 2)), np.ones(n)])
    truth = (features[:, 0] > 0).astype(float)
    penalty = np.array([1.0, 1.0, 1e-6])
    if truth.min() == truth.max():
        return
    w = ridge(features, truth, np.ones(n), penalty)
    slope = features.T @ (truth - expit(features @ w)) - penalty * w
    assert np.abs(slope).max() < 1e-5


@pytest.mark.parametrize(("alpha", "delta"), [(0.0, 0.05), (1.0, 0.05), (0.05, 0.0)])
def test_a_promise_of_all_or_nothing_is_refused(alpha: float, delta: float) -> None:
    scores, labels = WORLDS["good"].draw(50, np.random.default_rng(1))
    with pytest.raises(CalibrationError, match="between 0 and 1"):
        certify(scores, labels, scores, labels, alpha=alpha, delta=delta)


def test_without_a_guide_there_is_no_order_to_test_in() -> None:
    scores, labels = WORLDS["good"].draw(50, np.random.default_rng(1))
    with pytest.raises(CalibrationError, match="no labels left"):
        certify(scores, labels, scores[:0], labels[:0], alpha=0.05, delta=DELTA)
