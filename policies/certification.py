"""How high a confidence must be for a response to be returned on its own: thresholds with certificates.

A score fixed beforehand orders responses; what scores at least t is returned on its own, and R(t) is
the share of errors among it. A threshold for (alpha, delta) comes in one of two modes:

``certified``
    With probability 1 - delta over the labels, R(t) <= alpha. Exact binomial tests, on labels that
    neither the score nor the order of the tests has seen.
``estimated``
    The lowest threshold whose exact upper limit of R(t) is at most alpha, on labels that score and
    threshold may have been chosen by. It reaches further, and kept its promise about as often:
    measured, not proven.

Labels that came with unequal probabilities are not counts, and an exact binomial test needs counts:
`thinned` makes a plain random sample of them. The estimate weights them instead.

References
----------
Exact limits: Clopper and Pearson (1934). Tests in a fixed order: Bauer (1991), "Multiple Testing in
Clinical Trials"; on thresholds, the order learnt on another part of the labels: Angelopoulos et al.
(2021), "Learn then Test", sections 2 and 2.3. Selective risk: Geifman and El-Yaniv (2017), "Selective
Classification for Deep Neural Networks".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, betaincinv, expit

from policies.calibration import CalibrationError
from policies.signals import CLIP

Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]

#: The tests go on in steps of this share of the labels.
_STEPS = 50

#: A threshold under which fewer responses than this share fall is worth no search.
_LEAST_SHARE = 0.05

#: The curve bends at so many places at most, and its weights are shrunk as by so many labels.
_BENDS, _RIDGE = 3, 1.0

#: So many draws from what a curve may be, and of labels from each.
_DRAWN_CURVES, _DRAWN_LABELS = 32, 16

_MOST_LABELS = 1_000_000


class Found(msgspec.Struct, frozen=True):
    """What labels give for (alpha, delta).

    `threshold` is the least score that is returned on its own, None if there is none that can be
    promised. `n` labels were used, of which `accepted` score at least the threshold, `errors` of them
    not acceptable; `bound` is the upper limit of R(threshold) at 1 - delta. Without a threshold
    `best_alpha` is about the least alpha that the same labels would give one for, and `more_labels`
    about how many more are needed for alpha; each None if there is no such number.
    """

    threshold: float | None
    n: int
    accepted: int = 0
    errors: int = 0
    bound: float | None = None
    best_alpha: float | None = None
    more_labels: int | None = None


def thinned(ids: Sequence[str], inclusion: Floats) -> Bools:
    """Which labels to keep so that every response had the same probability of being among them.

    A label that came with probability p is kept with probability min(inclusion) / p, by a draw that
    depends on its id alone, so that the same labels always give the same sample.

    References
    ----------
    von Neumann (1951), "Various techniques used in connection with random digits" (rejection).
    """
    digests = [sha256(f"thin {each}".encode()).digest()[:8] for each in ids]
    draws = np.array([int.from_bytes(each) / 2**64 for each in digests])
    return np.asarray(draws * inclusion < inclusion.min(initial=1.0))


def certify(
    scores: Floats,
    labels: Bools,
    guide_scores: Floats,
    guide_labels: Bools,
    *,
    alpha: float,
    delta: float,
) -> Found:
    """The least threshold that is certified, with the order of tests learnt on the guide.

    Parameters
    ----------
    scores, labels : n scores in [0, 1] and labels
        A plain random sample of what will be decided on (`thinned`).
    guide_scores, guide_labels : other labels with scores of the same scale
        They cost power if they mislead, never the promise.
    alpha, delta : in (0, 1)

    Returns
    -------
    Found
        With probability at least 1 - delta over the sample, R(threshold) <= alpha.

    Notes
    -----
    The thresholds that are tested lie at every 50th of the guide, so that how many labels lie above one
    is chance and the errors among them are binomial, exactly, ties or not. Each is tested at delta, from
    one on to lower ones, as long as tests pass; the last that passed is the threshold. Where to begin is
    learnt on the guide: where the most responses would be returned on average, over what the guide's curve
    leaves open and the chance of the labels. Beginning high passes more surely, and every test more is
    one more that can fail. Several starts that share delta were no better.
    """
    _check(scores, labels, alpha, delta)
    if not len(guide_scores):
        raise CalibrationError("there are no labels left to learn the order of the tests from")
    curve = _Curve.fit(guide_scores, guide_labels)
    steps = _Steps(scores, labels, guide_scores, curve)
    at = _last_passed(steps, alpha, delta)
    n = len(scores)
    if at is not None:
        accepted, errors = int(steps.n[at]), int(steps.errors[at])
        bound = float(betaincinv(errors + 1, accepted - errors, 1 - delta))
        return Found(float(steps.thresholds[at]), n, accepted, errors, bound)
    best = _least_alpha(lambda a: _last_passed(steps, a, delta) is not None, alpha)
    return Found(None, n, best_alpha=best, more_labels=_more_labels(curve, scores, alpha, delta))


def estimate_threshold(
    scores: Floats, labels: Bools, weights: Floats, *, alpha: float, delta: float
) -> Found:
    """The least threshold whose error is estimated to be at most alpha, at confidence 1 - delta.

    `weights` >= 0 are inverse to the probability with which a label came, up to a factor.

    Notes
    -----
    At every score that occurs the exact upper limit of the share of errors, at 1 - delta, on as many labels
    as the weights are worth. The boldest of these many looks is taken, and nothing pays for looking: that
    it keeps the promise about as often as it says is measured, not proven.

    References
    ----------
    What weighted labels are worth: Kish (1965), "Survey Sampling", section 11.7.
    """
    _check(scores, labels, alpha, delta)
    order = _Prefixes(scores, labels, weights)
    bound = order.upper(delta)
    passed = np.flatnonzero(bound <= alpha)
    if len(passed):
        at = int(passed[-1])
        return Found(
            float(order.values[at]),
            len(scores),
            int(order.counts[at]),
            int(order.error_counts[at]),
            float(bound[at]),
        )
    best = float(bound[order.n >= _LEAST_SHARE * order.n[-1]].min())
    more = _more_labels(_Curve.fit(scores, labels, weights), scores, alpha, delta)
    return Found(None, len(scores), best_alpha=best if alpha < best < 1 else None, more_labels=more)


def _check(scores: Floats, labels: Bools, alpha: float, delta: float) -> None:
    if not 0.0 < alpha < 1.0 or not 0.0 < delta < 1.0:
        raise CalibrationError(f"alpha ({alpha}) and delta ({delta}) must lie between 0 and 1")
    if len(scores) != len(labels) or not len(scores):
        raise CalibrationError(f"{len(scores)} scores and {len(labels)} labels do not go together")


def ridge(features: Floats, truth: Floats, mass: Floats, penalty: Floats) -> Floats:
    """The weights that minimise log loss plus half the penalised squares, by Newton's method.

    Parameters
    ----------
    features : n rows of k finite values, a column of ones for the intercept among them
    truth : n values, 0 or 1
    mass : n weights of the rows
    penalty : k values > 0, those of the intercept next to nothing

    References
    ----------
    le Cessie and van Houwelingen (1992), "Ridge Estimators in Logistic Regression".
    """
    w = np.zeros(features.shape[1])
    for _ in range(100):
        q = expit(features @ w)
        curvature = (features * (mass * np.maximum(q * (1 - q), 1e-9))[:, None]).T @ features
        slope = features.T @ (mass * (truth - q)) - penalty * w
        step = np.linalg.solve(curvature + np.diag(penalty), slope)
        furthest = float(np.abs(step).max())
        # Far from the minimum the parabola misleads.
        w = w + step * min(1.0, 5.0 / max(furthest, 1e-12))
        if furthest < 1e-9:
            break
    return w


class _Prefixes:
    """What scores at least each distinct value, from the highest down."""

    def __init__(self, scores: Floats, labels: Bools, weights: Floats | None = None) -> None:
        values, at = np.unique(scores, return_inverse=True)
        self.values: Floats = values[::-1]
        self.counts = np.bincount(at)[::-1].cumsum()
        self.error_counts = np.bincount(at, weights=~labels)[::-1].cumsum().round().astype(int)
        if weights is None:
            self.n: Floats = self.counts.astype(float)
            self.errors: Floats = self.error_counts.astype(float)
        else:
            mass = np.bincount(at, weights=weights)[::-1].cumsum()
            squared = np.bincount(at, weights=weights**2)[::-1].cumsum()
            wrong = np.bincount(at, weights=weights * ~labels)[::-1].cumsum()
            self.n = mass**2 / np.maximum(squared, 1e-300)
            self.errors = self.n * wrong / np.maximum(mass, 1e-300)

    def upper(self, tail: float) -> Floats:
        """The exact upper limit of the share of errors at 1 - tail, for each value."""
        rest = self.n - self.errors
        return np.where(
            rest <= 1e-9, 1.0, betaincinv(self.errors + 1, np.maximum(rest, 1e-9), 1 - tail)
        )


class _Steps:
    """The thresholds to test, from the highest down, and the labels at or above each."""

    def __init__(self, scores: Floats, labels: Bools, guide: Floats, curve: _Curve) -> None:
        shares = 1 - np.arange(1, _STEPS) / _STEPS
        self.thresholds = np.unique([*np.quantile(guide, shares, method="nearest"), 0.0])[::-1]
        self.n = _at_least(scores, self.thresholds)
        self.errors = _at_least(scores[~labels], self.thresholds)
        self._risk = curve.drawn(np.sort(scores)[::-1], self.n)

    def returned(self, alpha: float, delta: float) -> Floats:
        """How many labels are returned on average, for each threshold to begin with.

        Over draws of the curve, and of labels from each.
        """
        more = np.diff(self.n, prepend=0)
        wrong = np.diff(self._risk * self.n[:, None], axis=0, prepend=0.0)
        chance = np.clip(wrong / np.maximum(more, 1)[:, None], 0.0, 1.0)
        drawn = np.random.default_rng(0).binomial(
            more[:, None, None], np.repeat(chance[:, :, None], _DRAWN_LABELS, axis=2)
        )
        errors = drawn.cumsum(axis=0).reshape(len(self.n), -1)
        allowed = np.where(self.n > 0, _allowed(np.maximum(self.n, 1.0), alpha, delta), -1.0)
        reached, found = np.zeros(errors.shape[1]), np.zeros(len(self.n))
        for step in reversed(range(len(self.n))):
            passed = errors[step] <= allowed[step]
            reached = np.where(passed, np.maximum(reached, self.n[step]), 0.0)
            found[step] = reached.mean()
        return found


def _at_least(scores: Floats, thresholds: Floats) -> NDArray[np.intp]:
    return len(scores) - np.searchsorted(np.sort(scores), thresholds)


def _last_passed(steps: _Steps, alpha: float, delta: float) -> int | None:
    """The last step that passes, None if the first does not."""
    returned = steps.returned(alpha, delta)
    first = int(np.argmax(returned))
    chance = bdtr(steps.errors[first:], np.maximum(steps.n[first:], 1), alpha)
    passed = int(np.argmin(np.append(chance <= delta, False)))
    return first + passed - 1 if passed and returned[first] > 0 else None


class _Curve:
    """A smooth probability of an error over the score, with what is not known of it."""

    def __init__(self, centre: float, spread: float, bends: Floats, w: Floats, cov: Floats):
        self._centre, self._spread, self._bends = centre, spread, bends
        self._w, self._cov = w, cov

    @classmethod
    def fit(cls, scores: Floats, labels: Bools, weights: Floats | None = None) -> _Curve:
        odds = _log_odds(scores)
        mass = np.ones(len(odds)) if weights is None else weights / weights.mean()
        centre, spread = float(np.average(odds, weights=mass)), float(odds.std()) + 1e-9
        z = (odds - centre) / spread
        # Where many share the highest score, nothing bends within.
        below = z[z < z.max() - 1e-9] if z.std() > 1e-9 else z
        bends = np.unique(np.quantile(below, np.arange(1, _BENDS + 1) / (_BENDS + 1)))
        curve = cls(centre, spread, bends[bends < z.max() - 1e-9], np.zeros(0), np.zeros((0, 0)))
        basis = curve._basis(scores)
        error = (~labels).astype(float)
        penalty = np.full(basis.shape[1], _RIDGE)
        penalty[0] = 1e-6
        w = ridge(basis, error, mass, penalty)
        q = expit(basis @ w)
        # Weights count twice in the noise and once in the curvature.
        meat = (basis * (mass**2 * q * (1 - q))[:, None]).T @ basis + np.diag(penalty)
        bread = np.linalg.inv((basis * (mass * q * (1 - q))[:, None]).T @ basis + np.diag(penalty))
        curve._w, curve._cov = w, bread @ meat @ bread
        return curve

    def _basis(self, scores: Floats) -> Floats:
        z = (_log_odds(scores) - self._centre) / self._spread
        hinges = [np.maximum(z - bend, 0.0) for bend in self._bends]
        return np.column_stack([np.ones_like(z), z, *hinges])

    def drawn(self, ranked: Floats, counts: NDArray[np.intp]) -> Floats:
        """R of the first of the ranked scores, for each of k counts of them: draws from what the curve may be."""
        noise = np.random.default_rng(0).normal(size=(len(self._w), _DRAWN_CURVES))
        root = np.linalg.cholesky(self._cov + 1e-12 * np.eye(len(self._w)))
        q = expit(self._basis(ranked) @ (self._w[:, None] + root @ noise))
        n = np.maximum(counts, 1)
        return np.asarray(np.clip(q.cumsum(axis=0)[n - 1] / n[:, None], 1e-9, 1.0))


def _log_odds(scores: Floats) -> Floats:
    clipped = np.clip(scores, CLIP, 1 - CLIP)
    return np.asarray(np.log(clipped / (1 - clipped)))


def _allowed(n: Floats, alpha: float, level: float) -> Floats:
    """The most errors among n with which a test at the level passes; -1 if not even none would do."""
    low, high = np.full(len(n), -1.0), np.floor(n * alpha)
    while (low < high).any():
        middle = np.ceil((low + high) / 2)
        passes = bdtr(np.maximum(middle, 0.0), n.astype(int), alpha) <= level
        low, high = np.where(passes, middle, low), np.where(passes, high, middle - 1)
    return low


def _least_alpha(passes: Callable[[float], bool], alpha: float) -> float | None:
    """About the least alpha above this one that passes."""
    low, high = alpha, 0.99
    if not passes(high):
        return None
    for _ in range(8):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if passes(middle) else (middle, high)
    return float(high)


def _more_labels(curve: _Curve, scores: Floats, alpha: float, delta: float) -> int | None:
    """About how many labels more a test would as soon pass with as not, as far as the curve tells."""
    n = len(scores)
    counts = np.unique(np.linspace(max(_LEAST_SHARE * n, 1), n, 100).astype(int))
    share, risk = counts / n, curve.drawn(np.sort(scores)[::-1], counts)

    def enough(n: int) -> bool:
        accepted = np.floor(n * share)
        allowed = _allowed(accepted, alpha, delta)[:, None]
        chance = bdtr(np.maximum(allowed, 0), accepted.astype(int)[:, None], risk)
        return bool(np.where(allowed < 0, 0.0, chance).mean(axis=1).max() >= 0.5)

    low, high = n, 2 * n
    while not enough(high):
        low, high = high, 2 * high
        if high > _MOST_LABELS:
            return None
    while high - low > max(low // 50, 1):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high - n
