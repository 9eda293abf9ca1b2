"""The six metrics: how much people do, how fast and how well, and what goes out wrong. Defined here, and in docs/metrics.md."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import chain

import msgspec
from msgspec.structs import replace

from gateway.labels import by_decision, latest, reduced
from gateway.ports import Store
from gateway.records import Label, LabelSource, Tally
from policies import Action, Calibrator, Policy
from policies.monitoring import Audited, Escape, agreement, error_escape
from validators import JSON

#: What to aim at; see docs/metrics.md.
TARGETS: dict[str, str] = {
    "escalation_rate": "0.15 to 0.30",
    "auto_resolve_rate": "0.70 to 0.85",
    "error_escape": "below 0.02",
    "review_latency": "p95 below 300 s",
    "reviewer_agreement": "above 0.85",
    "feedback_utilisation": "every label used within a month",
}

_BY_PEOPLE = (LabelSource.REVIEW, LabelSource.AUDIT, LabelSource.SECOND_OPINION)


class Quality(msgspec.Struct, frozen=True):
    """The six metrics of one policy, or of all. A rate of nothing is None.

    `escalation_rate` and `auto_resolve_rate` are shares of the answered `decisions`: intended to be flagged or held, and to be
    returned. `error_escape` is the share of errors among those intended to be returned, from audits, with an interval that
    holds at all times together; over all policies it has none. `review_p50_s` and `review_p95_s` are from a task's creation to
    its resolution, over all policies. `reviewer_agreement` is the share of agreeing pairs among `reviewer_pairs` of people
    who judged the same response. `feedback_utilisation` is the share of the `labels` that were there when the artefact in
    force was fitted.
    """

    decisions: int
    escalation_rate: float | None
    auto_resolve_rate: float | None
    error_escape: Escape
    reviewer_agreement: float | None
    reviewer_pairs: int
    feedback_utilisation: float | None
    labels: int
    review_p50_s: float | None = None
    review_p95_s: float | None = None


async def measured(
    store: Store,
    policies: Sequence[Policy],
    calibrators: Mapping[str, Calibrator],
    since: datetime,
) -> dict[str, Quality]:
    """The metrics since a time: of all policies under the name "", and of each that has decisions or labels under its own."""
    tallies, labels = await store.tallies(since), await store.labels_since(since)
    person = (await store.economics(since)).layers[2]
    fitted_at = {
        each.policy: calibrators[name].created_at
        for each in policies
        if (name := each.confidence.calibrator or "") in calibrators
    }
    # An application may give many thousands of labels a day; requests do not wait for their counting.
    found = await asyncio.to_thread(_computed, tallies, labels, fitted_at)
    p50_ms, p95_ms = person.latency_p50_ms, person.latency_p95_ms
    found[""] = replace(
        found[""],
        review_p50_s=None if p50_ms is None else p50_ms / 1000,
        review_p95_s=None if p95_ms is None else p95_ms / 1000,
    )
    return found


def _computed(
    tallies: Iterable[Tally], labels: Iterable[Label], fitted_at: Mapping[str, datetime]
) -> dict[str, Quality]:
    tallies_of: dict[str, list[Tally]] = defaultdict(list)
    labels_of: dict[str, list[Label]] = defaultdict(list)
    for tally in tallies:
        tallies_of[tally.policy].append(tally)
    for label in labels:
        labels_of[label.policy].append(label)
    found = {
        name: _quality(tallies_of[name], labels_of[name], _escape(labels_of[name]), fitted_at)
        for name in sorted(tallies_of.keys() | labels_of.keys())
    }
    every = _quality(
        list(chain(*tallies_of.values())),
        list(chain(*labels_of.values())),
        _escape_of_all(found, tallies_of),
        fitted_at,
    )
    return {"": every, **found}


def _quality(
    tallies: Sequence[Tally],
    labels: Sequence[Label],
    escape: Escape,
    fitted_at: Mapping[str, datetime],
) -> Quality:
    decisions = sum(each.decisions for each in tallies)
    # Second opinions are asked for where labels are doubtful: they say nothing of how well people agree elsewhere.
    people = [
        each
        for each in latest(labels)
        if each.source in _BY_PEOPLE and each.source is not LabelSource.SECOND_OPINION
    ]
    agreed, pairs = agreement(
        [each.acceptable for each in given] for given in by_decision(people).values()
    )
    used = sum(each.policy in fitted_at and each.at <= fitted_at[each.policy] for each in labels)
    return Quality(
        decisions=decisions,
        escalation_rate=_share(_count(tallies, Action.FLAG, Action.HOLD), decisions),
        auto_resolve_rate=_share(_count(tallies, Action.RETURN), decisions),
        error_escape=escape,
        reviewer_agreement=_share(agreed, pairs),
        reviewer_pairs=pairs,
        feedback_utilisation=_share(used, len(labels)),
        labels=len(labels),
    )


def _count(tallies: Iterable[Tally], *actions: Action) -> int:
    return sum(each.decisions for each in tallies if each.intended in actions)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _escape(labels: Sequence[Label]) -> Escape:
    """Of one policy: from what was drawn with a known probability, and would be returned."""
    people = [each for each in labels if each.source in _BY_PEOPLE]
    counts: dict[float, list[int]] = defaultdict(lambda: [0, 0])
    for given in by_decision(people).values():
        one = reduced(given).label
        if one.intended is Action.RETURN and one.inclusion is not None:
            count = counts[(one.inclusion_floor or one.inclusion) / one.inclusion]
            count[0] += 1
            count[1] += not one.acceptable
    return error_escape(Audited(share, n, errors) for share, (n, errors) in counts.items())


def _escape_of_all(found: Mapping[str, Quality], tallies: Mapping[str, Sequence[Tally]]) -> Escape:
    """Each policy's estimate by how much it returns, where there is one; without an interval."""
    errors, returned, reviewed = 0.0, 0, 0
    for name, quality in found.items():
        if quality.error_escape.estimate is not None:
            volume = _count(tallies[name], Action.RETURN)
            errors += quality.error_escape.estimate * volume
            returned += volume
            reviewed += quality.error_escape.reviewed
    return Escape(errors / returned if returned else None, 0.0, 1.0, reviewed)


def shown(found: Mapping[str, Quality], since: datetime) -> dict[str, JSON]:
    """The metrics as `GET /admin/metrics` gives them."""
    return {
        "since": since.isoformat(),
        "all": msgspec.to_builtins(found[""]),
        "policies": {name: msgspec.to_builtins(each) for name, each in found.items() if name},
        "targets": dict(TARGETS),
    }


def numbers(quality: Quality) -> dict[str, float]:
    """Every metric that is known, by the name it has in `/metrics`."""
    escape = quality.error_escape
    values = {
        "escalation_rate": quality.escalation_rate,
        "auto_resolve_rate": quality.auto_resolve_rate,
        "error_escape": escape.estimate,
        "error_escape_low": escape.low if escape.reviewed else None,
        "error_escape_high": escape.high if escape.reviewed else None,
        "review_p50_s": quality.review_p50_s,
        "review_p95_s": quality.review_p95_s,
        "reviewer_agreement": quality.reviewer_agreement,
        "feedback_utilisation": quality.feedback_utilisation,
    }
    return {name: value for name, value in values.items() if value is not None}
