"""Fitting a calibrator to labels, and how good it is.

The only part of the core that needs numpy, scipy and scikit-learn (the extra `analysis`): nothing
that answers a request imports it. What is fitted here is applied by `policies.calibration`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, ndtr
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from policies.calibration import Beta, CalibrationError, Isotonic, LogisticScore, Metrics, Platt
from policies.signals import CLIP, feature

Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]
Column: TypeAlias = Sequence[float] | Floats
Labels: TypeAlias = Sequence[bool] | Bools
Fit: TypeAlias = Callable[[Floats, Bools], Platt | Beta | Isotonic]


def fit_logistic(signals: Mapping[str, Column], labels: Labels) -> LogisticScore:
    """Fit the weights with which signals together order responses best.

    Parameters
    ----------
    signals : mapping from name to column of n finite values, at most 10 names
        As `policies.signals` makes them; a judge's score under `judge.<check id>`.
    labels : n labels; True means acceptable

    Returns
    -------
    LogisticScore
        With a coefficient for every name: 0 for a signal that is constant. Weights are for the
        features as `policies.signals.feature` scales them.

    Raises
    ------
    CalibrationError
        If there are no signals, lengths differ, a value is not finite, or a class is missing.

    Notes
    -----
    Features are standardised, and the squared length of the weights on that scale is penalised
    with strength 1 against the sum of the log losses of all rows, so that a few labels do not
    give extreme weights. The weights are then mapped back.

    References
    ----------
    le Cessie and van Houwelingen (1992), "Ridge Estimators in Logistic Regression".

    Examples
    --------
    >>> fitted = fit_logistic({"judge.jury": [0.1, 0.2, 0.8, 0.9]}, [False, False, True, True])
    >>> fitted.of({"judge.jury": 0.95}) > 0.5 > fitted.of({"judge.jury": 0.05})
    True
    """
    if not signals:
        raise CalibrationError("there are no signals to fit")
    columns = []
    for name, column in signals.items():
        values, truth = _paired(column, labels, what=name)
        columns.append([feature(name, value) for value in values.tolist()])
    features = np.array(columns).T
    mean, spread = features.mean(axis=0), features.std(axis=0)
    # Where rounding alone makes values differ, there is nothing to learn and no scale to learn it on.
    spread = np.where(spread > 1e-9, spread, np.inf)
    fitted = LogisticRegression(C=1.0).fit((features - mean) / spread, truth)
    weights = fitted.coef_[0] / spread
    return LogisticScore(
        kind="logistic",
        intercept=float(fitted.intercept_[0] - weights @ mean),
        coefficients=dict(zip(signals, weights.tolist(), strict=True)),
    )


def fit_platt(scores: Column, labels: Labels) -> Platt:
    """Fit a sigmoid from score to probability of acceptance.

    Parameters
    ----------
    scores : n scores, each in [0, 1]
    labels : n labels; True means acceptable

    Returns
    -------
    Platt
        Non-decreasing in the score; constant (a = 0) where the labels speak against the scores.

    Raises
    ------
    CalibrationError
        If lengths differ, a score is not in [0, 1], or a class is missing.

    Notes
    -----
    Targets are smoothed with the class counts, so that two labels do not give 0 or 1.

    References
    ----------
    Platt (1999), "Probabilistic Outputs for Support Vector Machines", section 2.2 (targets t+ and
    t-); Lin, Lin and Weng (2007), "A note on Platt's probabilistic outputs", section 2 (gradient).

    Examples
    --------
    >>> fitted = fit_platt([0.2, 0.4, 0.6, 0.8], [False, False, True, True])
    >>> fitted.apply(0.9) > fitted.apply(0.5) > fitted.apply(0.1)
    True
    """
    values, truth = _scored(scores, labels)
    clipped = np.clip(values, CLIP, 1 - CLIP)
    slope, intercept = _sigmoid([np.log(clipped / (1 - clipped))], truth)
    return Platt(kind="platt", a=-slope, b=-intercept)


def fit_beta(scores: Column, labels: Labels) -> Beta:
    """Fit a sigmoid that may bend differently at its two ends; targets as in `fit_platt`.

    Raises
    ------
    CalibrationError
        If lengths differ, a score is not in [0, 1], or a class is missing.

    References
    ----------
    Kull, Silva Filho and Flach (2017), "Beta calibration: a well-founded and easily implemented
    improvement on logistic calibration for binary classifiers".

    Examples
    --------
    >>> fitted = fit_beta([0.2, 0.4, 0.6, 0.8], [False, False, True, True])
    >>> fitted.apply(0.9) > fitted.apply(0.5) > fitted.apply(0.1)
    True
    """
    values, truth = _scored(scores, labels)
    clipped = np.clip(values, CLIP, 1 - CLIP)
    a, b, c = _sigmoid([np.log(clipped), -np.log1p(-clipped)], truth)
    return Beta(kind="beta", a=a, b=b, c=c)


def _sigmoid(columns: Sequence[Floats], truth: Bools) -> list[float]:
    """A weight >= 0 for each column, and the intercept, that minimise the log loss."""
    features = np.column_stack([*columns, np.ones(len(truth))])
    positive, negative = int(truth.sum()), int((~truth).sum())
    target = np.where(truth, (positive + 1) / (positive + 2), 1 / (negative + 2))

    def loss(weights: Floats) -> tuple[float, Floats]:
        z = features @ weights
        return float((np.logaddexp(0, z) - target * z).sum()), (expit(z) - target) @ features

    start = [*[1.0 for _ in columns], float(np.log((positive + 1) / (negative + 1)))]
    limits = [*[(0.0, 1e3) for _ in columns], (-1e5, 1e5)]
    found: list[float] = minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=limits
    ).x.tolist()
    return found


def fit_isotonic(scores: Column, labels: Labels) -> Isotonic:
    """Fit the non-decreasing steps from score to probability that are nearest to the labels.

    It follows any monotone shape and needs more labels than `fit_platt`; at the ends it gives 0 or
    1 where the labels there agree, however few they are.

    Raises
    ------
    CalibrationError
        If lengths differ, a score is not in [0, 1], or a class is missing.

    References
    ----------
    Zadrozny and Elkan (2002), "Transforming Classifier Scores into Accurate Multiclass Probability
    Estimates", section 3.

    Examples
    --------
    >>> fit_isotonic([0.2, 0.4, 0.6, 0.8], [False, True, False, True]).apply(0.5)
    0.5
    """
    values, truth = _scored(scores, labels)
    fitted = IsotonicRegression(y_min=0.0, y_max=1.0).fit(values, truth.astype(float))
    x, y = fitted.X_thresholds_.tolist(), fitted.y_thresholds_.tolist()
    if len(x) == 1:
        x, y = [0.0, 1.0], y * 2
    return Isotonic(kind="isotonic", x=tuple(x), y=tuple(y))


def best_fit(scores: Column, labels: Labels) -> Platt | Beta | Isotonic:
    """The map of the three kinds whose log loss is lowest on labels it was not fitted on.

    Five-fold, see `cross_fitted`; probabilities are clipped as scores are. Equal losses go to the
    simpler map.

    Raises
    ------
    CalibrationError
        If lengths differ, a score is not in [0, 1], or a class has fewer than 2 labels.
    """
    values, truth = _scored(scores, labels)
    fits: tuple[Fit, ...] = (fit_platt, fit_beta, fit_isotonic)

    def loss(fit: Fit) -> float:
        fitted = np.clip(cross_fitted(values, truth, fit), CLIP, 1 - CLIP)
        return -float(np.log(np.where(truth, fitted, 1 - fitted)).mean())

    return min(fits, key=loss)(values, truth)


def cross_fitted(scores: Column, labels: Labels, fit: Fit, folds: int = 5) -> Floats:
    """The probability of every row by a map that was fitted without that row's fold.

    Rows are dealt to the folds in turn, each class by itself, so that the result depends on nothing
    but its arguments.

    Parameters
    ----------
    scores : n scores, each in [0, 1]
    labels : n labels; True means acceptable
    fit : `fit_platt`, `fit_beta`, `fit_isotonic` or `best_fit`
    folds : at least 2

    Returns
    -------
    array of n probabilities, in the order of the rows

    Raises
    ------
    CalibrationError
        As `fit` does, and if a class has fewer than 2 labels.
    """
    values, truth = _scored(scores, labels)
    if min(truth.sum(), (~truth).sum()) < 2:
        raise CalibrationError("cross-fitting needs 2 labels of each class or more")
    fold = np.empty(len(values), dtype=int)
    for kind in (truth, ~truth):
        fold[kind] = np.arange(kind.sum()) % folds
    fitted = np.empty(len(values))
    for each in np.unique(fold):
        left_out = fold == each
        calibrator = fit(values[~left_out], truth[~left_out])
        fitted[left_out] = [calibrator.apply(score) for score in values[left_out].tolist()]
    return fitted


def ece(probabilities: Column, labels: Labels, *, bins: int = 15, debiased: bool = False) -> float:
    """Expected calibration error in [0, 1], in bins of equal mass.

    The mean over the bins, weighted by size, of the distance between mean probability and share of
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
    values, truth = _rated(probabilities, labels)
    order = np.argsort(values, kind="stable")
    total = 0.0
    for rows in np.array_split(order, min(bins, len(order))):
        share = float(truth[rows].mean())
        distance = abs(float(values[rows].mean()) - share)
        noise = np.sqrt(share * (1 - share) / len(rows)) if debiased else 0.0
        total += len(rows) * (distance - _folding(distance, float(noise)))
    return max(total / len(order), 0.0)


def _folding(distance: float, noise: float) -> float:
    """How much further from 0 a normal variable with this mean >= 0 and deviation is, on average."""
    if noise == 0.0:
        return 0.0
    ratio = distance / noise
    density = float(np.exp(-ratio * ratio / 2) * np.sqrt(2 / np.pi))
    return noise * density - 2 * distance * float(ndtr(-ratio))


def brier(probabilities: Column, labels: Labels) -> float:
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
    values, truth = _rated(probabilities, labels)
    return float(((values - truth) ** 2).mean())


def auroc(scores: Column, labels: Labels) -> float:
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
    values, truth = _paired(scores, labels, what="a score")
    return float(roc_auc_score(truth, values))


def quality(raw: Column, calibrated: Column, labels: Labels, *, bins: int = 15) -> Metrics:
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
        ece_raw=ece(raw, labels, bins=bins),
        ece=ece(calibrated, labels, bins=bins),
        brier_raw=brier(raw, labels),
        brier=brier(calibrated, labels),
    )


def _rated(probabilities: Column, labels: Labels) -> tuple[Floats, Bools]:
    values, truth = np.asarray(probabilities, dtype=float), np.asarray(labels, dtype=bool)
    if values.ndim != 1 or values.shape != truth.shape or not len(values):
        raise CalibrationError(f"{values.size} values and {truth.size} labels do not go together")
    if not ((values >= 0.0) & (values <= 1.0)).all():
        raise CalibrationError("a score or probability is not in [0, 1]")
    return values, truth


def _paired(column: Column, labels: Labels, *, what: str) -> tuple[Floats, Bools]:
    values, truth = np.asarray(column, dtype=float), np.asarray(labels, dtype=bool)
    if values.ndim != 1 or values.shape != truth.shape:
        raise CalibrationError(f"{what}: {values.size} values for {truth.size} labels")
    if not np.isfinite(values).all():
        raise CalibrationError(f"{what}: a value is missing or not finite")
    if truth.all() or not truth.any():
        raise CalibrationError(f"of {truth.size} labels none is {bool(not truth.any())}")
    return values, truth


def _scored(scores: Column, labels: Labels) -> tuple[Floats, Bools]:
    values, truth = _paired(scores, labels, what="scores")
    return _rated(values, truth)
