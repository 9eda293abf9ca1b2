"""How good probabilities and orders are, against labels.

Everything takes weights, which stand for how many responses a row speaks for; without them every row
speaks for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr
from sklearn.metrics import roc_auc_score

from policies.calibration import CalibrationError, Metrics

Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]
Column: TypeAlias = Sequence[float] | Floats
Labels: TypeAlias = Sequence[bool] | Bools


def ece(
    probabilities: Column,
    labels: Labels,
    *,
    bins: int = 15,
    debiased: bool = False,
    weights: Column | None = None,
) -> float:
    """Expected calibration error in [0, 1], in bins of equal mass.

    The mean over the bins, weighted by mass, of the distance between mean probability and share of
    True labels. There are `bins` bins, or one for each row if those are fewer.

    Sampling noise alone makes it positive for a perfect calibrator; `debiased` takes the expected
    part of that noise off (never below 0).

    Raises
    ------
    CalibrationError
        If lengths differ, there are no rows, or a probability is not in [0, 1].

    References
    ----------
    Nixon et al. (2019), "Measuring Calibration in Deep Learning" (equal mass); Kumar, Liang and Ma (2019), "Verified Uncertainty
    Calibration" (debiasing; here for the absolute distance, with their normal
    approximation of a bin's label mean, whose expectation is that of a folded normal).

    Examples
    --------
    >>> ece([0.5, 0.5, 0.5, 0.5], [True, False, True, False], bins=1)
    0.0
    """
    values, truth = rated(probabilities, labels)
    mass = masses(weights, len(values))
    total = 0.0
    for rows in equal_mass(values, mass, bins):
        size = mass[rows].sum()
        share = float(mass[rows] @ truth[rows] / size)
        distance = abs(float(mass[rows] @ values[rows] / size) - share)
        worth = size**2 / (mass[rows] @ mass[rows])
        noise = np.sqrt(share * (1 - share) / worth) if debiased else 0.0
        total += size * (distance - _folding(distance, float(noise)))
    return max(float(total / mass.sum()), 0.0)


def equal_mass(values: Floats, mass: Floats, bins: int) -> list[NDArray[np.intp]]:
    """The rows in ascending order of value, cut into at most so many parts of about equal mass."""
    order = np.argsort(values, kind="stable")
    bins = min(bins, len(order))
    if (mass == mass[0]).all():
        return np.array_split(order, bins)
    ends = mass[order].cumsum() / mass.sum()
    at = np.minimum((ends - mass[order] / mass.sum() / 2) * bins, bins - 1).astype(int)
    return [order[at == each] for each in np.unique(at)]


def masses(weights: Column | None, n: int) -> Floats:
    """The weights of n rows, 1 each if there are none.

    Raises
    ------
    CalibrationError
        If there are not n of them, or one is not positive and finite.
    """
    if weights is None:
        return np.ones(n)
    mass = np.asarray(weights, dtype=float)
    if mass.shape != (n,) or not (np.isfinite(mass) & (mass > 0)).all():
        raise CalibrationError(f"{n} rows need {n} weights, each positive and finite")
    return mass


def _folding(distance: float, noise: float) -> float:
    """How much further from 0 a normal variable with this mean >= 0 and deviation is, on average."""
    if noise == 0.0:
        return 0.0
    ratio = distance / noise
    density = float(np.exp(-ratio * ratio / 2) * np.sqrt(2 / np.pi))
    return noise * density - 2 * distance * float(ndtr(-ratio))


def brier(probabilities: Column, labels: Labels, *, weights: Column | None = None) -> float:
    """The mean squared distance in [0, 1] between probability and label (1 or 0).

    Raises
    ------
    CalibrationError
        If lengths differ, there are no rows, or a probability is not in [0, 1].

    References
    ----------
    Brier (1950), "Verification of Forecasts Expressed in Terms of Probability".

    Examples
    --------
    >>> brier([1.0, 0.5], [True, False])
    0.125
    """
    values, truth = rated(probabilities, labels)
    return float(np.average((values - truth) ** 2, weights=masses(weights, len(values))))


def auroc(scores: Column, labels: Labels, *, weights: Column | None = None) -> float:
    """The share in [0, 1] of pairs of a True and a False in which the True scores higher.

    Ties count half. The scale of the scores does not matter.

    Raises
    ------
    CalibrationError
        If lengths differ, a score is not finite, or a class is missing.

    References
    ----------
    Hanley and McNeil (1982), "The Meaning and Use of the Area under a Receiver Operating
    Characteristic (ROC) Curve".

    Examples
    --------
    >>> auroc([0.1, 0.4, 0.4, 0.9], [False, False, True, True])
    0.875
    """
    values, truth = paired(scores, labels, what="a score")
    return float(roc_auc_score(truth, values, sample_weight=masses(weights, len(values))))


def aurc(scores: Column, labels: Labels, *, weights: Column | None = None) -> float:
    """The area in [0, 1] under the share of errors among the best, over all shares of responses.

    Ties are taken in as one, so that the order of the rows does not matter. Lower is better.

    Raises
    ------
    CalibrationError
        If lengths differ, there are no rows, or a score is not in [0, 1].

    References
    ----------
    Geifman, Uziel and El-Yaniv (2019), "Bias-Reduced Uncertainty Estimation for Deep Neural
    Classifiers", section 2.

    Examples
    --------
    >>> round(aurc([0.9, 0.8, 0.7, 0.6], [True, True, False, False]), 4)
    0.2083
    """
    values, truth = rated(scores, labels)
    mass = masses(weights, len(values))
    _, at = np.unique(-values, return_inverse=True)
    own = np.bincount(at, weights=mass)
    wrong = np.bincount(at, weights=mass * ~truth).cumsum() / own.cumsum()
    return float(own @ wrong / own.sum())


def quality(
    raw: Column,
    calibrated: Column,
    labels: Labels,
    *,
    bins: int = 15,
    weights: Column | None = None,
) -> Metrics:
    """What the artefact says of a calibrator, on labels it was not fitted on.

    `raw` and `calibrated` are the score and the confidence, each in [0, 1], of n rows.

    Raises
    ------
    CalibrationError
        As `ece` and `brier` do.
    """
    return Metrics(
        n=len(labels),
        bins=bins,
        ece_raw=ece(raw, labels, bins=bins, weights=weights),
        ece=ece(calibrated, labels, bins=bins, weights=weights),
        brier_raw=brier(raw, labels, weights=weights),
        brier=brier(calibrated, labels, weights=weights),
    )


def rated(probabilities: Column, labels: Labels) -> tuple[Floats, Bools]:
    """The values, each in [0, 1], and the labels of one or more rows.

    Raises
    ------
    CalibrationError
        If they are not.
    """
    values, truth = np.asarray(probabilities, dtype=float), np.asarray(labels, dtype=bool)
    if values.ndim != 1 or values.shape != truth.shape or not len(values):
        raise CalibrationError(f"{values.size} values and {truth.size} labels do not go together")
    if not ((values >= 0.0) & (values <= 1.0)).all():
        raise CalibrationError("a score or probability is not in [0, 1]")
    return values, truth


def paired(column: Column, labels: Labels, *, what: str) -> tuple[Floats, Bools]:
    """The finite values and the labels, of both kinds; `what` names the values in the message.

    Raises
    ------
    CalibrationError
        If they are not.
    """
    values, truth = np.asarray(column, dtype=float), np.asarray(labels, dtype=bool)
    if values.ndim != 1 or values.shape != truth.shape:
        raise CalibrationError(f"{what}: {values.size} values for {truth.size} labels")
    if not np.isfinite(values).all():
        raise CalibrationError(f"{what}: a value is missing or not finite")
    if truth.all() or not truth.any():
        raise CalibrationError(f"of {truth.size} labels none is {bool(not truth.any())}")
    return values, truth


def scored(scores: Column, labels: Labels) -> tuple[Floats, Bools]:
    """Both: values in [0, 1] with labels of both kinds.

    Raises
    ------
    CalibrationError
        If they are not.
    """
    values, truth = paired(scores, labels, what="scores")
    return rated(values, truth)
