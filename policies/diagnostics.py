"""What a fitted calibrator does on the labels it is judged by: all that a report draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from policies.agreement import Measure, wilson
from policies.calibration import Certificate, Knot
from policies.labelled import Labelled
from policies.measures import (
    Bools,
    Floats,
    aurc,
    auroc,
    brier,
    ece,
    equal_mass,
)
from policies.suspects import Suspect

_BINS = 15
_POINTS = 50
_MISTAKES = 20

#: A slice with fewer labels says nothing on its own.
_SLICE_AT_LEAST = 30


class SignalUse(msgspec.Struct, frozen=True):
    """A signal: its AUROC alone (below 0.5 it speaks against acceptance), whether it is used, and why not.

    `adds` is by how much the log loss of the score would rise without it, None where it is not one of
    several.
    """

    name: str
    auroc: float
    used: bool
    reason: str = ""
    adds: float | None = None


class Bin(msgspec.Struct, frozen=True):
    """Responses of about equal confidence: its mean, and the share that is acceptable with its interval."""

    confidence: float
    acceptable: Measure
    n: int


class Slice(msgspec.Struct, frozen=True):
    """Responses that have something in common; the errors are None if none is autonomous.

    `off` says that the mean confidence is outside the interval of the share that is acceptable.
    """

    by: str
    value: str
    n: int
    confidence: float
    acceptable: Measure
    autonomous: float
    errors: Measure | None
    off: bool


class Mistake(msgspec.Struct, frozen=True):
    """A response that was not acceptable, and the confidence it got."""

    id: str
    confidence: float
    task: str | None


class Quality(msgspec.Struct, frozen=True):
    """Figures on labels that the map has not seen; `ece` in 15 bins of equal mass, debiased."""

    n: int
    auroc: float
    best_single_auroc: float
    brier: float
    ece: float
    ece_raw: float
    aurc: float


class Diagnostics(msgspec.Struct, frozen=True):
    """What was found while fitting.

    `remarks` are sentences about the data: what was left out and what to be careful of. `scorers` and
    `maps` hold the cross-validated log loss of each kind that was tried. `offers` say what the asked and
    other shares of errors would give, for all responses; each keeps its promise alone, not the best of
    several. All shares are of responses:
    labels are weighted by the inverse of their inclusion probability. `suspects` are labels to ask somebody else about.
    """

    n: int
    errors: int
    remarks: tuple[str, ...]
    signals: tuple[SignalUse, ...]
    scorers: dict[str, float]
    maps: dict[str, float]
    quality: Quality
    reliability: tuple[Bin, ...]
    curve: tuple[Knot, ...]
    offers: tuple[Certificate, ...]
    slices: tuple[Slice, ...]
    mistakes: tuple[Mistake, ...]
    suspects: tuple[Suspect, ...] = ()


def measured(
    raw: Floats, confidence: Floats, labels: Bools, weights: Floats, single: Floats
) -> Quality:
    """The figures for n responses; `raw` is the score, `single` the best signal alone."""
    return Quality(
        n=len(labels),
        auroc=auroc(raw, labels, weights=weights),
        best_single_auroc=auroc(single, labels, weights=weights),
        brier=brier(confidence, labels, weights=weights),
        ece=ece(confidence, labels, bins=_BINS, debiased=True, weights=weights),
        ece_raw=ece(raw, labels, bins=_BINS, debiased=True, weights=weights),
        aurc=aurc(raw, labels, weights=weights),
    )


def reliability(confidence: Floats, labels: Bools, weights: Floats) -> tuple[Bin, ...]:
    """Bins of equal mass, ascending."""
    return tuple(
        Bin(
            float(np.average(confidence[rows], weights=weights[rows])),
            _share(labels[rows], weights[rows]),
            len(rows),
        )
        for rows in equal_mass(confidence, weights, _BINS)
        if len(rows)
    )


def risk_coverage(confidence: Floats, labels: Bools, weights: Floats) -> tuple[Knot, ...]:
    """Errors among what is at least as confident, at up to 50 confidences, from the highest down."""
    at = np.unique(np.quantile(confidence, np.linspace(0, 1, _POINTS), method="nearest"))[::-1]
    knots = []
    for threshold in at:
        rows = confidence >= threshold
        good = _share(labels[rows], weights[rows])
        knots.append(
            Knot(
                confidence=float(threshold),
                coverage=min(float(weights[rows].sum() / weights.sum()), 1.0),
                risk=max(1 - good.value, 0.0),
                low=max(1 - good.high, 0.0),
                high=min(1 - good.low, 1.0),
            )
        )
    return tuple(knots)


def slices(
    rows: Sequence[Labelled],
    confidence: Floats,
    labels: Bools,
    weights: Floats,
    autonomous: Bools,
) -> tuple[Slice, ...]:
    """By task, tier and model, and by length in thirds: each with 30 labels or more, and only if there are several."""
    length = np.array([row.signals.get("n_tokens", np.nan) for row in rows])
    keys: dict[str, Callable[[int], str | None]] = {
        "task": lambda i: rows[i].task,
        "tier": lambda i: None if (tier := rows[i].tier) is None else tier.value,
        "model": lambda i: rows[i].model or None,
    }
    if np.isfinite(length).any():
        one, two = np.nanquantile(length, [1 / 3, 2 / 3])
        names = (f"up to {one:g} tokens", f"up to {two:g} tokens", f"over {two:g} tokens")
        keys["length"] = lambda i: (
            None if np.isnan(length[i]) else names[int(length[i] > one) + int(length[i] > two)]
        )
    found = []
    for by, key in keys.items():
        members: dict[str, list[int]] = {}
        for i in range(len(rows)):
            if (value := key(i)) is not None:
                members.setdefault(value, []).append(i)
        large = {v: np.array(m) for v, m in members.items() if len(m) >= _SLICE_AT_LEAST}
        if len(members) > 1:
            found += [
                _slice(by, value, at, confidence, labels, weights, autonomous)
                for value, at in sorted(large.items())
            ]
    return tuple(found)


def _slice(
    by: str,
    value: str,
    at: NDArray[np.intp],
    confidence: Floats,
    labels: Bools,
    weights: Floats,
    autonomous: Bools,
) -> Slice:
    mean = float(np.average(confidence[at], weights=weights[at]))
    good = _share(labels[at], weights[at], level=0.99)
    alone = at[autonomous[at]]
    return Slice(
        by=by,
        value=value,
        n=len(at),
        confidence=mean,
        acceptable=good,
        autonomous=float(weights[alone].sum() / weights[at].sum()),
        errors=_share(~labels[alone], weights[alone]) if len(alone) else None,
        off=not good.low <= mean <= good.high,
    )


def mistakes(rows: Sequence[Labelled], confidence: Floats, labels: Bools) -> tuple[Mistake, ...]:
    """The 20 responses that were not acceptable and got the highest confidence."""
    wrong = np.flatnonzero(~labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:_MISTAKES]
    return tuple(Mistake(rows[i].id, float(confidence[i]), rows[i].task) for i in worst)


def _share(labels: Bools, weights: Floats, level: float = 0.95) -> Measure:
    """The weighted share of True, and its interval on as many labels as the weights are worth (Kish)."""
    share = float(weights @ labels / weights.sum())
    worth = max(round(float(weights.sum() ** 2 / (weights @ weights))), 1)
    interval = wilson(round(share * worth), worth, level)
    assert interval is not None
    return Measure(share, min(interval.low, share), max(interval.high, share))
