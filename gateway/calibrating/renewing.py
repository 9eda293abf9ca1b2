"""When a calibrator is due to be renewed: after so many new labels, or sooner when an alarm has suspended it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from gateway.audits import artefact_of
from gateway.calibrating import applying
from gateway.records import Label, LabelSource, Standing
from gateway.settings import Settings
from gateway.store import open_store
from policies import Calibrator

#: So many new labels after an alarm are enough to fit a calibrator and to try it on others.
LABELS_AFTER_ALARM = 150

_STEM_CHARS = 40


class Due(NamedTuple):
    """A policy whose calibrator is to be renewed, why, and where the proposal goes."""

    policy: str
    why: str
    path: Path


def due(settings: Settings, wanted: str | None, labels: int, now: datetime) -> list[Due]:
    """The policies, or the one that is wanted, with a certificate in force and enough reviewed responses since it was fitted or last tried.

    Enough are `labels`, or LABELS_AFTER_ALARM if that is less and an alarm has suspended the calibrator. A try is known by the report that it leaves.

    Raises
    ------
    ChangeError, CalibrationError, PolicyError, StoreError
        If there is no such policy, or policies, calibrators or the store cannot be read.
    """
    loaded = applying.in_force(settings)
    if wanted is not None:
        applying.policy_named(loaded, wanted)
    fitted = {
        policy.policy: calibrator
        for policy in loaded.policies.policies
        if wanted in (None, policy.policy)
        and (calibrator := loaded.calibrators.get(policy.confidence.calibrator or ""))
        and calibrator.certificates
    }
    since = {name: max(each.created_at, _last_try(settings, name)) for name, each in fitted.items()}
    if not since:
        return []
    given, standings = asyncio.run(_said(settings.store.url, min(since.values())))
    found = []
    for name, calibrator in fitted.items():
        count = len({each.decision_id for each in given if _counts(each, name, since[name])})
        suspended = _suspended(standings.get(name), calibrator)
        needed = labels if suspended is None else min(labels, LABELS_AFTER_ALARM)
        if count >= needed:
            why = f"{count} new labels" + (f"; suspended: {suspended}" if suspended else "")
            stem = f"{name[:_STEM_CHARS]}-{now:%Y%m%d-%H%M%S}"
            found.append(Due(name, why, applying.proposals(settings, name) / f"{stem}.json"))
    return found


async def _said(url: str, since: datetime) -> tuple[list[Label], Mapping[str, Standing]]:
    store = await open_store(url)
    try:
        given = await store.labels_since(since)
        return list(given), {each.policy: each for each in await store.standings()}
    finally:
        await store.close()


def _counts(label: Label, policy: str, since: datetime) -> bool:
    is_ours = label.policy == policy and label.at > since
    return is_ours and label.source in (LabelSource.REVIEW, LabelSource.AUDIT)


def _suspended(standing: Standing | None, calibrator: Calibrator) -> str | None:
    if standing is None or standing.artefact != artefact_of(calibrator):
        return None
    return standing.suspended


def _last_try(settings: Settings, policy: str) -> datetime:
    folder = applying.proposals(settings, policy)
    reports = folder.glob("*.html") if folder.is_dir() else ()
    last_s = max((each.stat().st_mtime for each in reports), default=0.0)
    return datetime.fromtimestamp(last_s, UTC)
