"""Fitting a calibrator to labels, and how good it is.

The only part of the core that needs numpy, scipy and scikit-learn (the extra `analysis`): nothing
that answers a request imports it. What is fitted here is applied by `policies.calibration`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from fnmatch import fnmatchcase
from hashlib import sha256
from math import inf, isfinite, log, nan, sqrt
from typing import Literal, Protocol, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression, minimize
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression

from policies.calibration import (
    Beta,
    CalibrationError,
    Calibrator,
    Certificate,
    Isotonic,
    LogisticScore,
    Platt,
    certificate_for,
)
from policies.certification import Found, certify, estimate_threshold, ridge, thinned
from policies.diagnostics import (
    Diagnostics,
    SignalUse,
    measured,
    mistakes,
    reliability,
    risk_coverage,
    slices,
)
from policies.labelled import Labelled
from policies.measures import (
    Bools,
    Column,
    Floats,
    Labels,
    auroc,
    masses,
    paired,
    quality,
    scored,
)
from policies.model import RiskTier
from policies.signals import CLIP, JUDGE, SignalName, feature


class Fit(Protocol):
    """From scores in [0, 1] and labels, with weights or without, to a map."""

    def __call__(
        self, scores: Column, labels: Labels, weights: Column | None = None, /
    ) -> Platt | Beta | Isotonic:
        """The fitted map."""
        ...


_QUANTILES = 50


def fit_logistic(
    signals: Mapping[str, Column], labels: Labels, weights: Column | None = None
) -> LogisticScore:
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
        values, truth = paired(column, labels, what=name)
        columns.append([feature(name, value) for value in values.tolist()])
    intercept, coefficients = _ridge(np.array(columns).T, truth, masses(weights, len(truth)))
    return LogisticScore(
        kind="logistic",
        intercept=intercept,
        coefficients=dict(zip(signals, coefficients.tolist(), strict=True)),
    )


def _ridge(features: Floats, truth: Bools, mass: Floats) -> tuple[float, Floats]:
    """Intercept and weights for features as they are; the mean mass counts as one label."""
    mass = mass / mass.mean()
    mean = np.average(features, axis=0, weights=mass)
    spread = np.sqrt(np.average((features - mean) ** 2, axis=0, weights=mass))
    # Where rounding alone makes values differ, there is nothing to learn and no scale to learn it on.
    spread = np.where(spread > 1e-9, spread, np.inf)
    standard = np.column_stack([(features - mean) / spread, np.ones(len(truth))])
    penalty = np.append(np.ones(features.shape[1]), 1e-6)
    *weights, intercept = ridge(standard, truth.astype(float), mass, penalty).tolist()
    coefficients = np.array(weights) / spread
    return float(intercept - coefficients @ mean), coefficients


def fit_platt(scores: Column, labels: Labels, weights: Column | None = None) -> Platt:
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
    values, truth = scored(scores, labels)
    clipped = np.clip(values, CLIP, 1 - CLIP)
    slope, intercept = _sigmoid([np.log(clipped / (1 - clipped))], truth, weights)
    return Platt(kind="platt", a=-slope, b=-intercept)


def fit_beta(scores: Column, labels: Labels, weights: Column | None = None) -> Beta:
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
    values, truth = scored(scores, labels)
    clipped = np.clip(values, CLIP, 1 - CLIP)
    a, b, c = _sigmoid([np.log(clipped), -np.log1p(-clipped)], truth, weights)
    return Beta(kind="beta", a=a, b=b, c=c)


def _sigmoid(columns: Sequence[Floats], truth: Bools, weights: Column | None = None) -> list[float]:
    """A weight >= 0 for each column, and the intercept, that minimise the log loss."""
    mass = masses(weights, len(truth))
    mass = mass / mass.mean()
    features = np.column_stack([*columns, np.ones(len(truth))])
    positive, negative = float(mass @ truth), float(mass @ ~truth)
    target = np.where(truth, (positive + 1) / (positive + 2), 1 / (negative + 2))

    def loss(w: Floats) -> tuple[float, Floats]:
        z = features @ w
        return float(mass @ (np.logaddexp(0, z) - target * z)), (
            mass * (expit(z) - target)
        ) @ features

    start = [*[1.0 for _ in columns], float(np.log((positive + 1) / (negative + 1)))]
    limits = [*[(0.0, 1e3) for _ in columns], (-1e5, 1e5)]
    found: list[float] = minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=limits
    ).x.tolist()
    return found


def fit_isotonic(scores: Column, labels: Labels, weights: Column | None = None) -> Isotonic:
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
    values, truth = scored(scores, labels)
    mass = masses(weights, len(values))
    fitted = IsotonicRegression(y_min=0.0, y_max=1.0).fit(values, truth.astype(float), mass)
    return _isotonic(fitted.X_thresholds_, fitted.y_thresholds_)


def _isotonic(x: Floats, y: Floats) -> Isotonic:
    if len(x) == 1:
        x, y = np.array([0.0, 1.0]), np.array([y[0], y[0]])
    return Isotonic(kind="isotonic", x=tuple(x.tolist()), y=tuple(y.tolist()))


def fit_venn_abers(scores: Column, labels: Labels, weights: Column | None = None) -> Isotonic:
    """Fit isotonic steps twice at each score, with one label more of either kind, and merge them.

    Where few labels speak, the two are far apart and the merged probability is drawn to the middle: no
    0 or 1 from a handful of labels that agree. Computed at no more than 50 quantiles of the scores,
    linear between them.

    Raises
    ------
    CalibrationError
        If lengths differ, a score is not in [0, 1], or a class is missing.

    References
    ----------
    Vovk, Petej and Fedorova (2015), "Large-scale probabilistic predictors with and without guarantees of
    validity", sections 2 and 3 (merging for log loss: p1 / (1 - p0 + p1)).

    Examples
    --------
    >>> fit_venn_abers([0.2, 0.4, 0.6, 0.8], [False, False, True, True]).apply(0.8)
    0.75
    """
    values, truth = scored(scores, labels)
    mass = masses(weights, len(values))
    mass = mass / mass.mean()
    distinct, which = np.unique(values, return_inverse=True)
    weight = np.bincount(which, weights=mass)
    share = np.bincount(which, weights=mass * truth) / weight
    at = np.unique(np.quantile(values, np.linspace(0, 1, _QUANTILES), method="nearest"))
    merged = []
    for place in np.searchsorted(distinct, at).tolist():
        more = weight.copy()
        more[place] += 1.0
        with_false = share.copy()
        with_false[place] *= weight[place] / more[place]
        with_true = with_false.copy()
        with_true[place] += 1.0 / more[place]
        low = float(isotonic_regression(with_false, weights=more).x[place])
        high = float(isotonic_regression(with_true, weights=more).x[place])
        merged.append(high / (1 - low + high))
    return _isotonic(at, np.maximum.accumulate(merged))


def best_fit(
    scores: Column, labels: Labels, weights: Column | None = None
) -> Platt | Beta | Isotonic:
    """The map whose log loss is lowest on labels it was not fitted on; see `losses`.

    Raises
    ------
    CalibrationError
        If lengths differ, a score is not in [0, 1], or a class has fewer than 2 labels.
    """
    measured = losses(scores, labels, weights)
    return MAPS[min(measured, key=measured.__getitem__)](scores, labels, weights)


def losses(scores: Column, labels: Labels, weights: Column | None = None) -> dict[str, float]:
    """The five-fold log loss of each kind of map, the simplest first; see `cross_fitted`.

    Probabilities are clipped as scores are.

    Raises
    ------
    CalibrationError
        As `best_fit` does.
    """
    values, truth = scored(scores, labels)
    mass = masses(weights, len(values))
    return {
        name: log_loss(cross_fitted(values, truth, fit, weights=mass), truth, mass)
        for name, fit in MAPS.items()
    }


def log_loss(probabilities: Floats, truth: Bools, mass: Floats) -> float:
    """The mean negative logarithm of what the truth was given, clipped as scores are."""
    clipped = np.clip(probabilities, CLIP, 1 - CLIP)
    return -float(np.average(np.log(np.where(truth, clipped, 1 - clipped)), weights=mass))


#: By name, from the simplest.
MAPS: Mapping[str, Fit] = {
    "platt": fit_platt,
    "beta": fit_beta,
    "isotonic": fit_isotonic,
    "venn-abers": fit_venn_abers,
}


def cross_fitted(
    scores: Column,
    labels: Labels,
    fit: Fit,
    folds: int = 5,
    weights: Column | None = None,
) -> Floats:
    """The probability of every row by a map that was fitted without that row's fold.

    Rows are dealt to the folds in turn, each class by itself, so that the result depends on nothing
    but its arguments.

    Parameters
    ----------
    scores : n scores, each in [0, 1]
    labels : n labels; True means acceptable
    fit : one of `MAPS`, or `best_fit`
    folds : at least 2

    Returns
    -------
    array of n probabilities, in the order of the rows

    Raises
    ------
    CalibrationError
        As `fit` does, and if a class has fewer than 2 labels.
    """
    values, truth = scored(scores, labels)
    if min(truth.sum(), (~truth).sum()) < 2:
        raise CalibrationError("cross-fitting needs 2 labels of each class or more")
    fold = np.empty(len(values), dtype=int)
    for kind in (truth, ~truth):
        fold[kind] = np.arange(kind.sum()) % folds
    mass = masses(weights, len(values))
    fitted = np.empty(len(values))
    for each in np.unique(fold):
        left_out = fold == each
        calibrator = fit(values[~left_out], truth[~left_out], mass[~left_out])
        fitted[left_out] = [calibrator.apply(score) for score in values[left_out].tolist()]
    return fitted


# ------------------------------------------------------------------------------------------- from labels to an artefact

#: In certified mode this share of the labels teaches score and order of the tests; the rest certifies.
_TEACHING = 0.25
_FOLDS = 5

#: With fewer labels, or fewer of either kind, nothing is fitted.
LEAST, LEAST_OF_A_KIND = 40, 8

#: With fewer labels, or fewer of either kind, one signal alone is the score.
_TOGETHER, _TOGETHER_OF_A_KIND = 150, 20
_MOST_SIGNALS = 10

#: A signal must be there in so many of the labels; those without it are left out.
_PRESENT = 0.9

#: What else is said of: what other shares of errors would give.
_OFFERED = (0.01, 0.02, 0.05, 0.1)

#: Isotonic steps are tilted by this much, so that every threshold on a score is one on a confidence.
_TILT = 1e-4

Mode: TypeAlias = Literal["certified", "estimated"]
Per: TypeAlias = Literal["all", "tier", "task"]


def fit(  # noqa: PLR0913 -- one call does it all, and every argument is named
    rows: Sequence[Labelled],
    *,
    name: str,
    created_at: datetime,
    alpha: float,
    delta: float = 0.05,
    mode: Mode = "certified",
    per: Per = "all",
    model: str | None = None,
    checks_digest: str | None = None,
    judges: Mapping[str, str] | None = None,
    recent: Sequence[Mapping[str, float]] = (),
    cost_error: float | None = None,
    cost_review: float | None = None,
) -> tuple[Calibrator, Diagnostics]:
    """Fit score, calibrator and thresholds to labels.

    Parameters
    ----------
    rows : labelled responses
        A sample of what will be decided on, each with the probability of having been drawn.
    name, created_at, checks_digest, judges :
        Of the artefact: see `policies.calibration.Calibrator`. `judges` gives the digest of each judge
        that may be a signal; scores of others are not used.
    alpha, delta : in (0, 1)
        The share of errors to allow among what is returned on its own, and the chance to break that.
    mode : see `policies.certification`
    per : {"all", "tier", "task"}
        One threshold for all, or one for each tier or task that occurs, delta shared evenly.
    model : glob
        Labels of other models are left out. None: all must be of one model.
    recent : signals of recent responses, labelled or not
        Compared with those of the labels.
    cost_error, cost_review : both or none, in one currency
        For the threshold of least cost, ``1 - cost_review / cost_error``, where reviews catch everything.

    Returns
    -------
    Calibrator, Diagnostics
        The same for the same labels in any order.

    Raises
    ------
    CalibrationError
        If there are too few labels, or of one kind only, or of several models and `model` does not say
        which; if no signal is of use, or alpha, delta or the costs are out of range.

    Notes
    -----
    Certified: a quarter of the labels, drawn by a hash of their content, teaches the score and the
    order of the tests; the rest, which neither has seen, certifies and calibrates. Estimated: all labels
    do both, each scored by weights that were fitted without its fold.

    Labels of less than full trust (`weight` < 1) help to order and to calibrate; thresholds rest on
    the others alone.

    The score is a single signal or a logistic combination of several: all that say anything, or as many
    as lower the log loss when added one by one to the best. That is measured by cross-validation after a
    monotone map, as only the order counts; the calibrator is chosen likewise.

    References
    ----------
    Costs: Chow (1970), "On optimum recognition error and reject tradeoff".
    """
    if not 0.0 < alpha < 1.0 or not 0.0 < delta < 1.0:
        raise CalibrationError(f"alpha ({alpha}) and delta ({delta}) must lie between 0 and 1")
    if (cost_error is None) != (cost_review is None):
        raise CalibrationError("cost_error and cost_review go together")
    table, remarks = _cleaned(rows, model, judges or {})
    if mode == "certified":
        teaching = table.draw("teach") < _TEACHING
        score, scorers, uses = _choose_score(table.some(teaching), remarks)
        table, guide = table.some(~teaching), table.some(teaching)
        scores = table.scores(score)
        guide_scores = guide.scores(score)
    else:
        score, scorers, uses = _choose_score(table, remarks)
        scores = guide_scores = table.cross_scored(score)
        guide = table
    losses_of = losses(scores, table.labels, table.weights)
    kind = min(losses_of, key=losses_of.__getitem__)
    calibrator = _rising(MAPS[kind](scores, table.labels, table.weights))
    confidence = cross_fitted(scores, table.labels, MAPS[kind], weights=table.weights)

    remarks += _remarks_on_labels(table)
    certificates, autonomous = [], np.zeros(len(scores), dtype=bool)
    groups = _groups(table, per, remarks)
    for tier, task, members in groups:
        asked = Certificate(
            tier=tier,
            task=task,
            mode=mode,
            alpha=alpha,
            delta=delta / len(groups),
            threshold=None,
            n=0,
        )
        found = _threshold(
            table.some(members), scores[members], (guide_scores, guide.labels), asked
        )
        above = members & (scores >= (2.0 if found.threshold is None else found.threshold))
        autonomous |= above
        certificates.append(_certificate(asked, found, calibrator, table, members, above))
    everything = np.ones(len(scores), dtype=bool)
    offers = []
    for each in sorted({alpha, *_OFFERED}):
        asked = Certificate(mode=mode, alpha=each, delta=delta, threshold=None, n=0)
        found = _threshold(table, scores, (guide_scores, guide.labels), asked)
        above = scores >= (2.0 if found.threshold is None else found.threshold)
        offers.append(_certificate(asked, found, calibrator, table, everything, above))
    remarks += _drifted(table, score, recent)
    curve = risk_coverage(confidence, table.labels, table.weights)
    best = max(uses, key=lambda use: abs(use.auroc - 0.5))
    sign = 1 if best.auroc >= 0.5 else -1
    single = sign * table.features[:, table.names.index(best.name)]
    fitted = Calibrator(
        format=1,
        name=name,
        created_at=created_at,
        source="judge" if all(each.startswith(JUDGE) for each in score.signals) else "logprob",
        model=model or table.rows[0].model,
        score=score,
        checks_digest=checks_digest,
        judges={
            each.removeprefix(JUDGE): (judges or {})[each.removeprefix(JUDGE)]
            for each in score.signals
            if each.startswith(JUDGE)
        },
        n=len(table.rows) + (len(guide.rows) if mode == "certified" else 0),
        calibrator=calibrator,
        metrics=quality(scores, confidence, table.labels, weights=table.weights),
        labels_digest=_digest(rows),
        certificates=tuple(certificates),
        cost_threshold=_cheapest(cost_error, cost_review),
        curve=curve,
    )
    return fitted, Diagnostics(
        n=fitted.n,
        errors=sum(not row.acceptable for row in rows),
        remarks=tuple(remarks),
        signals=uses,
        scorers=scorers,
        maps=losses_of,
        quality=measured(scores, confidence, table.labels, table.weights, single),
        reliability=reliability(confidence, table.labels, table.weights),
        curve=curve,
        offers=tuple(offers),
        slices=slices(table.rows, confidence, table.labels, table.weights, autonomous),
        mistakes=mistakes(table.rows, confidence, table.labels),
    )


def examine(calibrator: Calibrator, rows: Sequence[Labelled]) -> Diagnostics:
    """What a calibrator does on labels: its own, of which it then looks a little too good, or others.

    Raises
    ------
    CalibrationError
        If there are too few labels of its model that have its signals, or of one kind only.
    """
    table, remarks = _cleaned(rows, calibrator.model, calibrator.judges)
    needed = calibrator.score.signals
    if lacking := [each for each in needed if each not in table.names]:
        raise CalibrationError(f"the labels have not the signals {', '.join(lacking)}")
    if calibrator.labels_digest == _digest(rows):
        remarks.append("it was fitted to these labels, so that it looks a little better than it is")
    scored_by, labels, weights = calibrator.score, table.labels, table.weights
    scores = np.array([min(scored_by.of(r.signals), *r.check_scores, 1.0) for r in table.rows])
    confidence = np.array([calibrator.calibrator.apply(each) for each in scores.tolist()])
    promised = [
        certificate_for(calibrator.certified_for(row.task), row.tier or RiskTier.MEDIUM)
        for row in table.rows
    ]
    limits = np.array([2.0 if c is None or c.threshold is None else c.threshold for c in promised])
    alone = [auroc(column, labels, weights=weights) for column in table.features.T]
    uses = [
        SignalUse(name, area, name in needed) for name, area in zip(table.names, alone, strict=True)
    ]
    best = max(range(len(alone)), key=lambda i: abs(alone[i] - 0.5))
    return Diagnostics(
        n=len(table.rows),
        errors=int((~labels).sum()),
        remarks=tuple(remarks),
        signals=tuple(uses),
        scorers={},
        maps={},
        quality=measured(
            scores,
            confidence,
            labels,
            weights,
            np.copysign(1, alone[best] - 0.5) * table.features[:, best],
        ),
        reliability=reliability(confidence, labels, weights),
        curve=risk_coverage(confidence, labels, weights),
        offers=(),
        slices=slices(table.rows, confidence, labels, weights, confidence >= limits),
        mistakes=mistakes(table.rows, confidence, labels),
    )


class _Table:
    """Labelled responses as columns, of the signals that all of them have."""

    def __init__(
        self, rows: Sequence[Labelled], names: Sequence[str], features: Floats | None = None
    ) -> None:
        self.rows, self.names = rows, list(names)
        self.features: Floats = (
            np.array([[feature(each, row.signals[each]) for each in names] for row in rows])
            if features is None
            else features
        )
        self.labels: Bools = np.array([row.acceptable for row in rows])
        #: Of responses a row speaks for, by how likely it was drawn and how far it is trusted.
        self.weights: Floats = np.array([row.weight / row.inclusion for row in rows])

    def some(self, which: Bools) -> _Table:
        picked = [row for row, keep in zip(self.rows, which.tolist(), strict=True) if keep]
        return _Table(picked, self.names, self.features[which])

    def draw(self, what: str) -> Floats:
        """A number in [0, 1) for each row, from its content alone."""
        return np.array(
            [
                int.from_bytes(sha256(f"{what} {row.digest or row.id}".encode()).digest()[:8])
                / 2**64
                for row in self.rows
            ]
        )

    def scores(self, score: LogisticScore) -> Floats:
        found = [min(score.of(row.signals), *row.check_scores, 1.0) for row in self.rows]
        return np.asarray(np.clip(found, CLIP, 1 - CLIP))

    def folds(self) -> NDArray[np.int_]:
        return np.asarray((self.draw("fold") * _FOLDS).astype(int))

    def probabilities(self, columns: Sequence[int]) -> Floats:
        """Of each row by the combination of some columns, fitted without its fold."""
        folds, found = self.folds(), np.empty(len(self.rows))
        for fold in np.unique(folds):
            out = folds == fold
            kept = self.labels[~out]
            if kept.all() or not kept.any():
                found[out] = kept.mean()
                continue
            intercept, weights = _ridge(self.features[~out][:, columns], kept, self.weights[~out])
            found[out] = expit(self.features[out][:, columns] @ weights + intercept)
        return found

    def cross_scored(self, score: LogisticScore) -> Floats:
        """As `scores`, with weights that were fitted without the row's fold."""
        found = self.probabilities([self.names.index(each) for each in score.signals])
        lowest = np.array([min((*row.check_scores, 1.0)) for row in self.rows])
        return np.asarray(np.clip(np.minimum(found, lowest), CLIP, 1 - CLIP))


def _cleaned(
    rows: Sequence[Labelled], model: str | None, judges: Mapping[str, str]
) -> tuple[_Table, list[str]]:
    """The rows that can be used, in an order of their own, and what there is to say of the others."""
    remarks: list[str] = []
    if model is not None:
        kept = [row for row in rows if fnmatchcase(row.model, model)]
        if len(kept) < len(rows):
            remarks.append(f"{len(rows) - len(kept)} labels are of models other than {model}")
    else:
        kept = list(rows)
        models = sorted({row.model for row in rows})
        if len(models) > 1:
            raise CalibrationError(
                f"labels are of {len(models)} models ({', '.join(models[:5])}); say which with model"
            )
        if models == [""]:
            raise CalibrationError("labels do not say of which model they are; say so with model")
    # A later word on the same response or content counts, whatever the order of the file.
    kept.sort(key=lambda row: (row.at is not None, row.at and row.at.timestamp(), row.id))
    by_id = {row.id: row for row in kept}
    if len(by_id) < len(kept):
        remarks.append(
            f"{len(kept) - len(by_id)} labels were replaced by later ones of the same id"
        )
    by_content = {row.digest or f"id {row.id}": row for row in by_id.values()}
    if len(by_content) < len(by_id):
        remarks.append(
            f"{len(by_id) - len(by_content)} labels are of content that was labelled before and are "
            "left out: the same content on both sides of a split would vouch for itself"
        )
    unique = sorted(by_content.values(), key=lambda row: row.id)
    names, remarks_of_signals = _available(unique, judges)
    whole = [row for row in unique if all(isfinite(row.signals.get(n, nan)) for n in names)]
    if len(whole) < len(unique):
        remarks.append(f"{len(unique) - len(whole)} labels lack a signal that the others have")
    good = sum(row.acceptable for row in whole)
    if len(whole) < LEAST or min(good, len(whole) - good) < LEAST_OF_A_KIND:
        raise CalibrationError(
            f"{len(whole)} labels can be used, {good} acceptable and {len(whole) - good} not; needed "
            f"are {LEAST}, and {LEAST_OF_A_KIND} of each kind"
        )
    return _Table(whole, names), remarks + remarks_of_signals


def _available(rows: Sequence[Labelled], judges: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The signals that can be used, as far as that can be told without looking at labels."""
    counts = Counter(name for row in rows for name, value in row.signals.items() if isfinite(value))
    names, remarks = [], []
    for name, count in sorted(counts.items()):
        values = [row.signals[name] for row in rows if isfinite(row.signals.get(name, nan))]
        scaled = np.array([feature(name, value) for value in values]) if _known(name) else None
        if scaled is None:
            why = "it is no signal that a calibrator can use"
        elif name.startswith(JUDGE) and name.removeprefix(JUDGE) not in judges:
            why = "the policy has no such judge"
        elif count < _PRESENT * len(rows):
            why = f"only {count} of {len(rows)} labels have it"
        elif _is_dead(scaled):
            why = "it is constant: its values carry no information"
        else:
            names.append(name)
            continue
        remarks.append(f"signal {name} is left out: {why}")
    if not names:
        raise CalibrationError("no signal is of use: " + ("; ".join(remarks) or "there is none"))
    return names, remarks


def _known(name: str) -> bool:
    return name in get_args(SignalName) or name.startswith(JUDGE)


def _is_dead(values: Floats) -> bool:
    """Whether all but one in 200 say the same, as far as one can tell."""
    middle = float(np.median(values))
    return float((np.abs(values - middle) > 1e-6).mean()) < 0.005


def _choose_score(
    table: _Table, remarks: list[str]
) -> tuple[LogisticScore, dict[str, float], tuple[SignalUse, ...]]:
    """The score, the log loss of each that was tried, and what there is to say of each signal."""
    labels, weights = table.labels, table.weights
    kinds = int(labels.sum()), int((~labels).sum())
    if min(kinds) < 2:
        raise CalibrationError(f"{kinds[0]} and {kinds[1]} labels of the two kinds are too few")
    alone = [auroc(column, labels, weights=weights) for column in table.features.T]
    noise = sqrt((len(labels) + 1) / (12 * kinds[0] * kinds[1]))
    says = [abs(each - 0.5) > 2 * noise for each in alone]
    ranked = sorted(range(len(alone)), key=lambda i: -abs(alone[i] - 0.5))
    able = [i for i in ranked if says[i]] or ranked[:1]

    def loss(columns: tuple[int, ...]) -> float:
        # Only the order matters: whatever the scale, a monotone map comes after.
        found = table.probabilities(columns)
        return log_loss(
            cross_fitted(found, labels, fit_venn_abers, weights=weights), labels, weights
        )

    tried: dict[tuple[int, ...], float] = {(i,): loss((i,)) for i in able}
    chosen = min(tried, key=tried.__getitem__)
    if len(able) > 1 and (len(labels) < _TOGETHER or min(kinds) < _TOGETHER_OF_A_KIND):
        remarks.append(
            f"{len(labels)} labels, {min(kinds)} of the rarer kind, are too few to combine "
            f"signals ({_TOGETHER} and {_TOGETHER_OF_A_KIND}): the best one is the score"
        )
    elif len(able) > 1:
        tried[tuple(able[:_MOST_SIGNALS])] = loss(tuple(able[:_MOST_SIGNALS]))
        while len(chosen) < _MOST_SIGNALS:
            more = [(*chosen, i) for i in able if i not in chosen]
            wider = {some: loss(some) for some in more}
            if not wider or min(wider.values()) >= tried[chosen]:
                break
            chosen = min(wider, key=wider.__getitem__)
            tried[chosen] = wider[chosen]
        chosen = min(tried, key=tried.__getitem__)
    intercept, coefficients = _ridge(table.features[:, chosen], labels, weights)
    score = LogisticScore(
        kind="logistic",
        intercept=intercept,
        coefficients=dict(
            zip((table.names[i] for i in chosen), coefficients.tolist(), strict=True)
        ),
    )
    uses = []
    for i, name in enumerate(table.names):
        adds = None
        if i in chosen and len(chosen) > 1:
            rest = [j for j in chosen if j != i]
            adds = loss(tuple(rest)) - tried[chosen]
        reason = ""
        if i not in chosen:
            reason = "the others say it better" if says[i] else "it says nothing on these labels"
        uses.append(SignalUse(name, alone[i], i in chosen, reason, adds))
    losses_of = {" + ".join(table.names[i] for i in some): value for some, value in tried.items()}
    return score, losses_of, tuple(uses)


def _rising(fitted: Platt | Beta | Isotonic) -> Platt | Beta | Isotonic:
    """The map, with isotonic steps tilted so that it rises strictly from 0 to 1."""
    if not isinstance(fitted, Isotonic):
        return fitted
    x = np.array([0.0, *(each for each in fitted.x if 0.0 < each < 1.0), 1.0])
    y = (1 - _TILT) * np.array([fitted.apply(each) for each in x.tolist()]) + _TILT * x
    return _isotonic(x, np.maximum.accumulate(y))


def _confidence_at(calibrator: Platt | Beta | Isotonic, threshold: float | None) -> float | None:
    if threshold is None:
        return None
    return calibrator.apply(threshold) if threshold > 0.0 else 0.0


def _groups(
    table: _Table, per: Per, remarks: list[str]
) -> list[tuple[RiskTier | None, str | None, Bools]]:
    """Tier, task and members of each certificate."""
    if per == "all":
        return [(None, None, np.ones(len(table.rows), dtype=bool))]
    values = [getattr(row, per) for row in table.rows]
    if None in values:
        remarks.append(f"{values.count(None)} labels have no {per}: they get no threshold")
    return [
        (
            RiskTier(value) if per == "tier" else None,
            value if per == "task" else None,
            np.array([each == value for each in values]),
        )
        for value in sorted({each for each in values if each is not None})
    ]


def _threshold(
    table: _Table,
    scores: Floats,
    guide: tuple[Floats, Bools],
    asked: Certificate,
) -> Found:
    """What the labels of a group give for what is asked."""
    alpha, delta = asked.alpha, asked.delta
    trusted = np.array([row.weight == 1.0 for row in table.rows])
    inclusion = np.array([row.inclusion for row in table.rows])
    if trusted.any() and asked.mode == "estimated":
        weights = 1 / inclusion[trusted]
        return estimate_threshold(
            scores[trusted], table.labels[trusted], weights, alpha=alpha, delta=delta
        )
    used = trusted & thinned([row.id for row in table.rows], inclusion)
    if not used.any():
        return Found(None, 0)
    return certify(scores[used], table.labels[used], *guide, alpha=alpha, delta=delta)


def _certificate(
    asked: Certificate,
    found: Found,
    calibrator: Platt | Beta | Isotonic,
    table: _Table,
    members: Bools,
    above: Bools,
) -> Certificate:
    drawn = 1 / np.array([row.inclusion for row in table.rows])
    return asked.model_copy(
        update={
            **asdict(found),
            "threshold": _confidence_at(calibrator, found.threshold),
            "coverage": min(float(drawn[above].sum() / drawn[members].sum()), 1.0),
        }
    )


def _remarks_on_labels(table: _Table) -> list[str]:
    """What to know of the labels on which thresholds rest."""
    found = []
    if doubted := sum(row.weight < 1.0 for row in table.rows):
        found.append(f"{doubted} labels of less than full trust take no part in thresholds")
    rates = sorted({row.inclusion for row in table.rows})
    if len(rates) > 1:
        found.append(
            f"labels came with probabilities from {rates[0]:g} to {rates[-1]:g}: an exact test uses "
            "a plain random sample of them, an estimate weights them"
        )
    return found


def _drifted(
    table: _Table, score: LogisticScore, recent: Sequence[Mapping[str, float]]
) -> list[str]:
    """Signals of recent responses that are distributed otherwise than those of the labels.

    Kolmogorov–Smirnov, at a thousandth for all signals together.
    """
    found = []
    for name in score.signals:
        now = np.sort([feature(name, each[name]) for each in recent if name in each])
        if len(now) < LEAST:
            continue
        then = table.features[:, table.names.index(name)]
        order = np.argsort(then)
        then, mass = then[order], table.weights[order]
        worth = mass.sum() ** 2 / (mass @ mass)
        steps = np.concatenate([[0.0], mass.cumsum() / mass.sum()])
        at = np.concatenate([then, now])
        apart = np.abs(
            steps[np.searchsorted(then, at, side="right")]
            - np.searchsorted(now, at, side="right") / len(now)
        ).max()
        limit = sqrt(-log(0.001 / len(score.signals) / 2) / 2 * (1 / worth + 1 / len(now)))
        if apart > limit:
            found.append(
                f"signal {name} has drifted: recent responses differ from the labels by {apart:.2f} "
                f"in distribution, {limit:.2f} would be chance"
            )
    return found


def _cheapest(cost_error: float | None, cost_review: float | None) -> float | None:
    if cost_error is None or cost_review is None:
        return None
    if not (0 <= cost_review < inf and 0 < cost_error < inf):
        raise CalibrationError("cost_error must be above 0 and cost_review not below")
    return max(1 - cost_review / cost_error, 0.0)


def _digest(rows: Sequence[Labelled]) -> str:
    lines = sorted(f"{row.id} {row.digest} {row.acceptable}" for row in rows)
    return sha256("\n".join(lines).encode()).hexdigest()
