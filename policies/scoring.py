"""The score: a single signal, or the logistic combination of signals that orders labelled responses best.

What is compared is the log loss after a monotone map, cross-validated: only the order of responses counts,
since a calibrator comes after. Signals go in on scales that make them additive (`policies.signals.feature`),
or as normal scores among the labels, whichever loses less.
"""

from __future__ import annotations

from math import sqrt
from typing import TypeAlias

from policies.calibration import CalibrationError, LogisticScore, NormalScale
from policies.columns import Table
from policies.diagnostics import SignalUse
from policies.maps import cross_fitted, fit_ridge, fit_venn_abers, log_loss, normal_scale
from policies.measures import auroc

#: With fewer labels, or fewer of either kind, one signal alone is the score.
TOGETHER, TOGETHER_OF_A_KIND = 150, 20
_MOST_SIGNALS = 10

#: Columns of a table.
Columns: TypeAlias = tuple[int, ...]


def choose_score(
    table: Table, remarks: list[str]
) -> tuple[LogisticScore, dict[str, float], tuple[SignalUse, ...]]:
    """The score, the log loss of each that was tried, and what there is to say of each signal.

    What is too little to combine signals is added to `remarks`.

    Raises
    ------
    CalibrationError
        If there are fewer than two labels of a kind.
    """
    labels, names = table.labels, table.names
    kinds = int(labels.sum()), int((~labels).sum())
    if min(kinds) < 2:
        raise CalibrationError(f"{kinds[0]} and {kinds[1]} labels of the two kinds are too few")
    alone = [auroc(column, labels, weights=table.weights) for column in table.features.T]
    noise = sqrt((len(labels) + 1) / (12 * kinds[0] * kinds[1]))
    says = [abs(each - 0.5) > 2 * noise for each in alone]
    ranked = sorted(range(len(alone)), key=lambda i: -abs(alone[i] - 0.5))
    able = [i for i in ranked if says[i]] or ranked[:1]
    tried: dict[Columns, float] = {(i,): _loss(table, (i,)) for i in able}
    scales: dict[str, NormalScale] = {}
    if len(able) > 1 and (len(labels) < TOGETHER or min(kinds) < TOGETHER_OF_A_KIND):
        remarks.append(
            f"{len(labels)} labels, {min(kinds)} of the rarer kind, are too few to combine "
            f"signals ({TOGETHER} and {TOGETHER_OF_A_KIND}): the best one is the score"
        )
    elif len(able) > 1:
        table, scales = _scaled(table, able, tried)
        _grow(table, able, tried)
    chosen = min(tried, key=tried.__getitem__)
    intercept, coefficients = fit_ridge(table.features[:, chosen], labels, table.weights)
    used = [names[i] for i in chosen]
    score = LogisticScore(
        kind="logistic",
        intercept=intercept,
        coefficients=dict(zip(used, coefficients.tolist(), strict=True)),
        scales={each: scales[each] for each in used if each in scales},
    )
    uses = []
    for i, name in enumerate(names):
        adds, reason = None, ""
        if i not in chosen:
            reason = "the others say it better" if says[i] else "it says nothing on these labels"
        elif len(chosen) > 1:
            adds = _loss(table, tuple(j for j in chosen if j != i)) - tried[chosen]
        uses.append(SignalUse(name, alone[i], i in chosen, reason, adds))
    losses_of = {" + ".join(names[i] for i in some): value for some, value in tried.items()}
    return score, losses_of, tuple(uses)


def _loss(table: Table, columns: Columns) -> float:
    found = cross_fitted(
        table.probabilities(columns), table.labels, fit_venn_abers, weights=table.weights
    )
    return log_loss(found, table.labels, table.weights)


def _scaled(
    table: Table, able: list[int], tried: dict[Columns, float]
) -> tuple[Table, dict[str, NormalScale]]:
    """The table on the scales on which all signals together lose less, and what these are."""
    together = tuple(able[:_MOST_SIGNALS])
    found = {table.names[i]: normal_scale(table.features[:, i]) for i in able}
    scales = {name: scale for name, scale in found.items() if scale is not None}
    normal = table.on(scales)
    plain_loss, normal_loss = _loss(table, together), _loss(normal, together)
    tried[together] = min(plain_loss, normal_loss)
    return (normal, scales) if normal_loss < plain_loss else (table, {})


def _grow(table: Table, able: list[int], tried: dict[Columns, float]) -> None:
    """Add signals one by one to the best single one, as long as that helps."""
    chosen: Columns = min((some for some in tried if len(some) == 1), key=tried.__getitem__)
    while len(chosen) < _MOST_SIGNALS:
        wider: dict[Columns, float] = {
            (*chosen, i): _loss(table, (*chosen, i)) for i in able if i not in chosen
        }
        if not wider or min(wider.values()) >= tried[chosen]:
            break
        chosen = min(wider, key=wider.__getitem__)
        tried[chosen] = wider[chosen]
