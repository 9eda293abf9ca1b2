"""Labelled responses as columns: what of the labels can be used, and what there is to say of the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from hashlib import sha256
from math import isfinite, log, nan, sqrt
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from policies.calibration import CalibrationError, LogisticScore, NormalScale
from policies.labelled import Labelled
from policies.maps import fit_ridge
from policies.measures import Bools, Floats
from policies.signals import CLIP, JUDGE, SignalName, feature

_FOLDS = 5

#: With fewer labels, or fewer of either kind, nothing is fitted.
LEAST, LEAST_OF_A_KIND = 40, 8

#: A signal must be there in so many of the labels; those without it are left out.
_PRESENT = 0.9


class Table:
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

    def some(self, which: Bools) -> Table:
        """The rows that are chosen."""
        picked = [row for row, keep in zip(self.rows, which.tolist(), strict=True) if keep]
        return Table(picked, self.names, self.features[which])

    def on(self, scales: Mapping[str, NormalScale]) -> Table:
        """The same rows, with features on those scales where there is one for them."""
        columns = [
            np.interp(column, scales[name].x, scales[name].z) if name in scales else column
            for name, column in zip(self.names, self.features.T, strict=True)
        ]
        return Table(self.rows, self.names, np.column_stack(columns))

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
        """Of each row, lowered to the least of its checks, and clipped as for log-odds."""
        found = [min(score.of(row.signals), *row.check_scores, 1.0) for row in self.rows]
        return np.asarray(np.clip(found, CLIP, 1 - CLIP))

    def folds(self) -> NDArray[np.int_]:
        """The fold of each row; the same content is always in the same."""
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
            intercept, weights = fit_ridge(
                self.features[~out][:, columns], kept, self.weights[~out]
            )
            found[out] = expit(self.features[out][:, columns] @ weights + intercept)
        return found

    def cross_scored(self, score: LogisticScore) -> Floats:
        """As `scores`, with weights that were fitted without the row's fold."""
        columns = [self.names.index(each) for each in score.signals]
        found = self.on(score.scales).probabilities(columns)
        lowest = np.array([min((*row.check_scores, 1.0)) for row in self.rows])
        return np.asarray(np.clip(np.minimum(found, lowest), CLIP, 1 - CLIP))


def cleaned(
    rows: Sequence[Labelled], model: str | None, judges: Mapping[str, str]
) -> tuple[Table, list[str]]:
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
    return Table(whole, names), remarks + remarks_of_signals


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


def drifted(table: Table, score: LogisticScore, recent: Sequence[Mapping[str, float]]) -> list[str]:
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


def remarks_on(table: Table) -> list[str]:
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


def digest_of(rows: Sequence[Labelled]) -> str:
    """SHA-256 (hex) of ids, contents and verdicts, in any order."""
    lines = sorted(f"{row.id} {row.digest} {row.acceptable}" for row in rows)
    return sha256("\n".join(lines).encode()).hexdigest()
