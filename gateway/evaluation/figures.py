"""What the verdicts of one judge amount to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import quantiles

import msgspec

from gateway.evaluation.cases import Case
from gateway.evaluation.running import Judged
from policies import CalibrationError
from policies.agreement import (
    Confusion,
    Measure,
    PositionBias,
    confusion,
    corrected_rate,
    length_bias,
    position_bias,
)
from policies.maps import best_fit, cross_fitted
from policies.measures import auroc, brier, ece
from validators import Outcome

Pair = tuple[Case, Judged]


class Calibration(msgspec.Struct, frozen=True):
    """How far scores are probabilities, as they are and calibrated on other labels than the ones they are measured on.

    Expected calibration errors and Brier scores of `n` labels; `calibrated` are the probabilities, in the order of the pairs.
    """

    n: int
    ece_raw: float
    ece: float
    brier_raw: float
    brier: float
    auroc: float
    calibrated: tuple[float, ...]


class Figures(msgspec.Struct, frozen=True):
    """What is known of a judge after an evaluation.

    Errors are in no rate: they are counted by cause, and never are a pass. `unlabelled` cases were judged and have no label;
    `corrected` is the share of acceptable answers among them. A cost of None: the price of the model is not known.
    """

    judge: str
    n: int
    errors: Counter[str]
    unlabelled: int
    outcomes: Confusion
    groups: dict[str, Confusion]
    calibration: Calibration | None
    corrected: Measure | None
    length: Measure | None
    position: PositionBias | None
    cost_usd: float | None
    latency_ms: tuple[float, float]


def measure(judge: str, judged: Sequence[Pair], swapped: Sequence[Pair] = ()) -> Figures:
    """The figures of a judge's verdicts; `swapped` are those on the same cases, by id, with answer and reference exchanged."""
    told = [(case, each) for case, each in judged if each.outcome is not Outcome.ERROR]
    labelled = [pair for pair in told if pair[0].acceptable is not None]
    unlabelled = [each for case, each in told if case.acceptable is None]
    outcomes = _confusion(labelled)
    passed = sum(each.outcome is Outcome.PASS for each in unlabelled)
    costs = [each.cost_usd for _, each in judged]
    known = [cost for cost in costs if cost is not None]
    return Figures(
        judge=judge,
        n=len(judged),
        errors=Counter(
            str(each.cause or "raised") for _, each in judged if each.outcome is Outcome.ERROR
        ),
        unlabelled=len(unlabelled),
        outcomes=outcomes,
        groups={
            group: _confusion([pair for pair in labelled if pair[0].group == group])
            for group in sorted({case.group for case, _ in labelled} - {""})
        },
        calibration=_calibration(scored(labelled)),
        corrected=corrected_rate(passed, len(unlabelled), outcomes),
        length=_length_bias(labelled),
        position=_position_bias(told, swapped),
        cost_usd=sum(known) if len(known) == len(costs) else None,
        latency_ms=_latency_ms([each.latency_ms for _, each in judged]),
    )


def scored(labelled: Sequence[Pair]) -> list[tuple[float, bool]]:
    """The scores of verdicts that have one, with the labels."""
    return [
        (each.score, bool(case.acceptable)) for case, each in labelled if each.score is not None
    ]


def _confusion(labelled: Sequence[Pair]) -> Confusion:
    verdicts = [each.outcome is Outcome.PASS for _, each in labelled]
    return confusion(verdicts, [bool(case.acceptable) for case, _ in labelled])


def _calibration(rows: Sequence[tuple[float, bool]]) -> Calibration | None:
    """None if there are too few labels of either kind to calibrate on some and measure on others."""
    scores, labels = [score for score, _ in rows], [label for _, label in rows]
    try:
        calibrated = cross_fitted(scores, labels, best_fit).tolist()
    except CalibrationError:
        return None
    return Calibration(
        n=len(rows),
        ece_raw=ece(scores, labels),
        ece=ece(calibrated, labels),
        brier_raw=brier(scores, labels),
        brier=brier(calibrated, labels),
        auroc=auroc(scores, labels),
        calibrated=tuple(calibrated),
    )


def _length_bias(labelled: Sequence[Pair]) -> Measure | None:
    rows = [
        (each.score, len(case.answer), bool(case.acceptable))
        for case, each in labelled
        if each.score is not None
    ]
    return length_bias([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows])


def _position_bias(told: Sequence[Pair], swapped: Sequence[Pair]) -> PositionBias | None:
    again = {case.id: each.outcome for case, each in swapped if each.outcome is not Outcome.ERROR}
    return position_bias(
        [
            (each.outcome is Outcome.PASS, again[case.id] is Outcome.PASS)
            for case, each in told
            if case.id in again
        ]
    )


def _latency_ms(all_ms: Sequence[float]) -> tuple[float, float]:
    """Median and 95th percentile; 0 without verdicts."""
    if len(all_ms) < 2:
        return (all_ms[0], all_ms[0]) if all_ms else (0.0, 0.0)
    cuts = quantiles(all_ms, n=20, method="inclusive")
    return cuts[9], cuts[18]
