"""From labels to an artefact: score, calibrator, thresholds with certificates, and how good they are.

Certified: a fifth of the labels, drawn by a hash of their content, teaches the score and the order of the
tests; the rest, which neither has seen, certifies and calibrates. Estimated: all labels do both, each
scored by weights that were fitted without its fold. Labels of less than full trust (`weight` < 1) help to
order and to calibrate; thresholds rest on the others alone.

`policies.maps` chooses the calibrator by cross-validated log loss, `policies.scoring` the score.

Fitting needs numpy, scipy and scikit-learn (the extra `analysis`): nothing that answers a request imports it.

References
----------
Costs: Chow (1970), "On optimum recognition error and reject tradeoff".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from math import ceil, inf
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np
from msgspec.structs import asdict, replace

from policies.calibration import (
    OTHERS,
    Beta,
    CalibrationError,
    Calibrator,
    Certificate,
    Isotonic,
    LogisticScore,
    Platt,
    certificate_for,
)
from policies.certification import Found, certify, estimate_threshold, thinned
from policies.columns import Table, cleaned, digest_of, drifted, remarks_on
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
from policies.maps import (
    MAPS,
    compared,
    isotonic_of,
)
from policies.measures import Bools, Floats, auroc, quality
from policies.model import RiskTier
from policies.scoring import choose_score
from policies.signals import JUDGE
from policies.suspects import suspected, told

#: In certified mode this share of the labels teaches score and order of the tests; the rest certifies.
_TEACHING = 0.2

#: What else is said of: what other shares of errors would give.
_OFFERED = (0.01, 0.02, 0.05, 0.1)

#: Isotonic steps are tilted by this much, so that every threshold on a score is one on a confidence.
_TILT = 1e-4

Mode: TypeAlias = Literal["certified", "estimated"]
Per: TypeAlias = Literal["all", "tier", "task"]


class _Scored(msgspec.Struct, frozen=True):
    """Labels with scores that were not fitted to them, and the map from these to confidence.

    `guide` are other labels of the same scale (the same, where nothing is certified), `confidence` is
    cross-fitted; `n` counts the labels that anything was fitted to.
    """

    table: Table
    n: int
    guide: tuple[Floats, Bools]
    score: LogisticScore
    scores: Floats
    map: Platt | Beta | Isotonic
    confidence: Floats
    uses: tuple[SignalUse, ...]
    scorers: dict[str, float]
    maps: dict[str, float]

    def described(self, digests: Mapping[str, str]) -> dict[str, Any]:
        """What the artefact says of the score: its source, the judges it needs, and how good it is."""
        needed = [each for each in self.score.signals if each.startswith(JUDGE)]
        return {
            "source": "judge" if len(needed) == len(self.score.signals) else "logprob",
            "judges": {(id_ := each.removeprefix(JUDGE)): digests[id_] for each in needed},
            "metrics": quality(
                self.scores, self.confidence, self.table.labels, weights=self.table.weights
            ),
        }


def fit(  # noqa: PLR0913 -- one call does it all, and every argument is named
    rows: Sequence[Labelled],
    *,
    name: str,
    created_at: datetime,
    alpha: float | Mapping[str, float],
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
    """Fit score, calibrator and thresholds to labels; the same for the same labels in any order.

    `alpha` and `delta` in (0, 1) are the share of errors to allow among what is returned on its own, and
    the chance to break that; `mode` says how that is meant (`policies.certification`), `per` whether
    one threshold is for all or one for each tier or task, delta shared evenly; `alpha` may then be one for
    each by its name, that of all others under OTHERS. Labels of models that the
    glob `model` does not match are left out; without it all must be of one. Only judges whose digest is
    in `judges` are signals. `recent` are signals of recent responses, to compare with. With both costs, in
    one currency, the artefact has the threshold of least cost.

    Raises
    ------
    CalibrationError
        If there are too few labels, or of one kind only, or of several models and `model` does not say
        which; if no signal is of use, or alpha, delta or the costs are out of range, or said of the wrong groups.
    """
    alphas = alpha if isinstance(alpha, Mapping) else {OTHERS: alpha}
    if not all(0.0 < each < 1.0 for each in (delta, *alphas.values())):
        raise CalibrationError(f"alpha ({alpha}) and delta ({delta}) must lie between 0 and 1")
    cheapest = _cheapest(cost_error, cost_review)
    digests = judges or {}
    table, remarks = cleaned(rows, model, digests)
    found = _scored(table, mode, remarks)
    alpha = next(iter(alphas.values()))
    asked = Certificate(mode=mode, alpha=alpha, delta=delta, threshold=None, n=0)
    certificates, autonomous = _certificates(found, asked, per, alphas, remarks)
    remarks += [*remarks_on(found.table), *drifted(found.table, found.score, recent)]
    offers = _offers(found, asked, alphas)
    diagnostics = _diagnosed(found, rows, offers, autonomous, remarks)
    return Calibrator(
        format=1,
        name=name,
        created_at=created_at,
        model=model or table.rows[0].model,
        score=found.score,
        checks_digest=checks_digest,
        n=found.n,
        calibrator=found.map,
        labels_digest=digest_of(rows),
        certificates=certificates,
        cost_threshold=cheapest,
        curve=diagnostics.curve,
        **found.described(digests),
    ), diagnostics


def _scored(table: Table, mode: Mode, remarks: list[str]) -> _Scored:
    n = len(table.rows)
    if mode == "certified":
        teaching = table.draw("teach") < _TEACHING
        taught, table = table.some(teaching), table.some(~teaching)
        score, scorers, uses = choose_score(taught, remarks)
        scores, guide = table.scores(score), (taught.scores(score), taught.labels)
    else:
        score, scorers, uses = choose_score(table, remarks)
        scores = table.cross_scored(score)
        guide = (scores, table.labels)
    best = compared(scores, table.labels, table.weights)
    return _Scored(
        table=table,
        n=n,
        guide=guide,
        score=score,
        scores=scores,
        map=_rising(MAPS[best.name](scores, table.labels, table.weights)),
        confidence=best.probabilities,
        uses=uses,
        scorers=scorers,
        maps=best.losses,
    )


def _certificates(
    found: _Scored,
    asked: Certificate,
    per: Per,
    alphas: Mapping[str, float],
    remarks: list[str],
) -> tuple[tuple[Certificate, ...], Bools]:
    """One for each group, and which labels are at or above the threshold of theirs."""
    groups = _groups(found.table, per, remarks)
    names = [str(tier or task or OTHERS) for tier, task, _ in groups]
    if per == "all" and (named := [each for each in alphas if each != OTHERS]):
        raise CalibrationError(f"alpha is said of {named[0]}, but one threshold is for all")
    if unsaid := [each for each in names if each not in alphas and OTHERS not in alphas]:
        raise CalibrationError(
            f"alpha is said of {', '.join(alphas)}, and not of {per} {unsaid[0]}"
        )
    if absent := [each for each in alphas if each not in (*names, OTHERS)]:
        raise CalibrationError(f"alpha is said of {per} {absent[0]}, of which there is no label")
    certificates, autonomous = [], np.zeros(len(found.scores), dtype=bool)
    for (tier, task, members), group in zip(groups, names, strict=True):
        own = asked.model_copy(
            update={
                "tier": tier,
                "task": task,
                "alpha": alphas.get(group) or alphas[OTHERS],
                "delta": asked.delta / len(groups),
            }
        )
        certificate, above = _certificate(found, own, members)
        certificates.append(certificate)
        autonomous |= above
    return tuple(certificates), autonomous


def _diagnosed(
    found: _Scored,
    rows: Sequence[Labelled],
    offers: Sequence[Certificate],
    autonomous: Bools,
    remarks: list[str],
) -> Diagnostics:
    table, confidence = found.table, found.confidence
    labels, weights = table.labels, table.weights
    best = max(found.uses, key=lambda use: abs(use.auroc - 0.5))
    sign = 1 if best.auroc >= 0.5 else -1
    single = sign * table.features[:, table.names.index(best.name)]
    suspects = suspected(table.rows, confidence)
    return Diagnostics(
        n=found.n,
        errors=sum(not row.acceptable for row in rows),
        remarks=(*remarks, *told(suspects)),
        signals=found.uses,
        scorers=found.scorers,
        maps=found.maps,
        quality=measured(found.scores, confidence, labels, weights, single),
        reliability=reliability(confidence, labels, weights),
        curve=risk_coverage(confidence, labels, weights),
        offers=tuple(offers),
        slices=slices(table.rows, confidence, labels, weights, autonomous),
        mistakes=mistakes(table.rows, confidence, labels),
        suspects=suspects,
    )


def _offers(found: _Scored, asked: Certificate, alphas: Mapping[str, float]) -> list[Certificate]:
    """What other shares of errors would give, for all labels together."""
    everything = np.ones(len(found.scores), dtype=bool)
    return [
        _certificate(found, asked.model_copy(update={"alpha": alpha}), everything)[0]
        for alpha in sorted({*alphas.values(), *_OFFERED})
    ]


def examine(calibrator: Calibrator, rows: Sequence[Labelled]) -> Diagnostics:
    """What a calibrator does on labels: its own, of which it then looks a little too good, or others.

    Raises
    ------
    CalibrationError
        If there are too few labels of its model that have its signals, or of one kind only.
    """
    table, remarks = cleaned(rows, calibrator.model, calibrator.judges)
    needed = calibrator.score.signals
    if lacking := [each for each in needed if each not in table.names]:
        raise CalibrationError(f"the labels have not the signals {', '.join(lacking)}")
    if calibrator.labels_digest == digest_of(rows):
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


def _rising(fitted: Platt | Beta | Isotonic) -> Platt | Beta | Isotonic:
    """The map, with isotonic steps tilted so that it rises strictly from 0 to 1."""
    if not isinstance(fitted, Isotonic):
        return fitted
    x = np.array([0.0, *(each for each in fitted.x if 0.0 < each < 1.0), 1.0])
    y = (1 - _TILT) * np.array([fitted.apply(each) for each in x.tolist()]) + _TILT * x
    return isotonic_of(x, np.maximum.accumulate(y))


def _confidence_at(calibrator: Platt | Beta | Isotonic, threshold: float | None) -> float | None:
    if threshold is None:
        return None
    return calibrator.apply(threshold) if threshold > 0.0 else 0.0


def _groups(
    table: Table, per: Per, remarks: list[str]
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


def _certificate(found: _Scored, asked: Certificate, members: Bools) -> tuple[Certificate, Bools]:
    """What is asked, answered by the labels of a group, and which of these are at or above the threshold."""
    table = found.table
    threshold = _threshold(table.some(members), found.scores[members], found.guide, asked)
    above = members & (
        found.scores >= (2.0 if threshold.threshold is None else threshold.threshold)
    )
    drawn = 1 / np.array([row.inclusion for row in table.rows])
    answered = {
        **asdict(threshold),
        "threshold": _confidence_at(found.map, threshold.threshold),
        "coverage": min(float(drawn[above].sum() / drawn[members].sum()), 1.0),
    }
    return asked.model_copy(update=answered), above


def _threshold(
    table: Table,
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
    found = certify(scores[used], table.labels[used], *guide, alpha=alpha, delta=delta)
    if found.more_labels is None:
        return found
    asked_for = len(scores) / (1 - _TEACHING) / int(used.sum())
    return replace(found, more_labels=ceil(found.more_labels * asked_for))


def _cheapest(cost_error: float | None, cost_review: float | None) -> float | None:
    """The confidence from which returning costs less than a review (Chow 1970)."""
    if (cost_error is None) != (cost_review is None):
        raise CalibrationError("cost_error and cost_review go together")
    if cost_error is None or cost_review is None:
        return None
    if not (0 <= cost_review < inf and 0 < cost_error < inf):
        raise CalibrationError("cost_error must be above 0 and cost_review not below")
    return max(1 - cost_review / cost_error, 0.0)
