"""Commands for whoever runs a gateway: where each policy stands, labels from files, and going on after an alarm."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

import typer

from gateway import economics
from gateway.audits import artefact_of
from gateway.calibrating.applying import ChangeError, newest_proposal
from gateway.errors import GatewayError, NotFound
from gateway.labels import LabelError, Line, imported, read_lines
from gateway.monitors import resumed
from gateway.policy_files import Loaded, load
from gateway.quality import TARGETS, Quality, measured
from gateway.records import Alarm, Standing
from gateway.settings import Settings
from gateway.store import SqlStore, open_store
from gateway.terminal import ConfigOption, config_path, fail, out, settings_at
from policies import AuditLevel, CalibrationError, Calibrator, Mode, Policy, PolicyError, staleness
from policies.auditing import audit_rate
from policies.calibration import Certificate

T = TypeVar("T")

#: With fewer labels, or fewer of what was wrong, a calibrator says little.
LABELS_NEEDED = 200
ERRORS_NEEDED = 30

labels = typer.Typer(no_args_is_help=True, help="What people say of responses.")


def with_store(config: Path | None, act: Callable[[SqlStore], Awaitable[T]]) -> T:
    """What comes of an act on the configured store; ends the command if it fails."""
    url = settings_at(config_path(config), secrets=False).store.url

    async def run() -> T:
        store = await open_store(url)
        try:
            return await act(store)
        finally:
            await store.close()

    try:
        return asyncio.run(run())
    except GatewayError as error:
        fail(error.message)


@labels.command("import")
def import_labels(
    file: Annotated[
        Path, typer.Argument(help="JSON Lines: id, acceptable, and what else is known")
    ],
    labeller: Annotated[
        str, typer.Option(help="who is meant where a line names nobody")
    ] = "import",
    config: ConfigOption = None,
) -> None:
    """Import labels: the whole file or nothing of it.

    A line has `id` (of a decision, or the provider's of its response) and `acceptable`, and may have `labeller`, `weight`,
    `inclusion`, `blind`, `comment` and `at`. Importing a file again changes nothing.
    """
    try:
        lines = read_lines(file.read_text("utf-8"), str(file))
    except (OSError, UnicodeDecodeError, LabelError) as error:
        fail(str(error))

    async def act(store: SqlStore) -> int:
        now = datetime.now(UTC)
        ids = {number: await _decision_id(store, line) for number, line in lines.items()}
        given = [imported(line, ids[number], labeller, now) for number, line in lines.items()]
        try:
            return await store.label(given)
        except NotFound as error:
            unknown = error.extra["decisions"]
            assert isinstance(unknown, list)
            fail(
                "\n".join(
                    f"{file}:{number}: there is no decision {lines[number].id}"
                    for number, each in ids.items()
                    if each in unknown
                )
            )

    new = with_store(config, act)
    out.print(f"{new} new labels, {len(lines) - new} known already")


async def _decision_id(store: SqlStore, line: Line) -> str:
    if line.id.startswith("hgd_"):
        return line.id
    found = await store.decision_by_upstream_id(line.id)
    return line.id if found is None else found.id


def resume(
    policy: Annotated[str, typer.Argument(help="the policy's name")],
    config: ConfigOption = None,
) -> None:
    """Believe a policy's calibrator again after an alarm: clears its alarms, tightens its audits, and watches anew."""

    async def act(store: SqlStore) -> list[Alarm]:
        while True:
            standing = await store.standing(policy)
            if standing is None:
                raise NotFound(
                    f"nothing is known of a policy {policy!r}; `holdgate status` lists them"
                )
            cleared = [each for each in await store.open_alarms() if each.policy == policy]
            if await store.put_standing(resumed(standing, datetime.now(UTC)), clear=True):
                return cleared

    cleared = with_store(config, act)
    for alarm in cleared:
        out.print(f"cleared {alarm.kind}: {alarm.message}", markup=False)
    out.print(f"{policy}: its calibrator is believed again, its audits are tightened", markup=False)


class _Found(NamedTuple):
    standings: dict[str, Standing]
    alarms: list[Alarm]
    counts: dict[str, tuple[int, int]]
    quality: dict[str, Quality]


def status(
    since: Annotated[
        str, typer.Option(help="what the metrics are of: a duration until now, or a time")
    ] = "24h",
    config: ConfigOption = None,
) -> None:
    """Say where each policy stands on its way from observing to routing, and the six metrics."""
    now = datetime.now(UTC)
    settings = settings_at(config_path(config), secrets=False)
    try:
        at = economics.moment_of(since, now)
        loaded = load(settings.policies, settings.calibrators)
    except (ValueError, PolicyError, CalibrationError, OSError) as error:
        fail(str(error))

    async def act(store: SqlStore) -> _Found:
        return _Found(
            {each.policy: each for each in await store.standings()},
            list(await store.open_alarms()),
            dict(await store.label_counts()),
            await measured(store, loaded.policies.policies, loaded.calibrators, at),
        )

    found = with_store(config, act)
    for policy in loaded.policies.policies:
        out.print(f"[b]{policy.policy}[/b] ({policy.mode.value})")
        for line in _lines(policy, loaded, found, now, settings):
            out.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    out.print(f"all: {_metrics(found.quality[''])}", markup=False, highlight=False, soft_wrap=True)
    targets = ", ".join(f"{name.replace('_', ' ')} {target}" for name, target in TARGETS.items())
    out.print(f"targets: {targets}", markup=False, highlight=False, soft_wrap=True)
    out.print(f"Metrics since {at.isoformat(timespec='seconds')}; docs/metrics.md defines them.")


def _lines(
    policy: Policy, loaded: Loaded, found: _Found, now: datetime, settings: Settings
) -> Iterator[str]:
    calibrator = loaded.calibrators.get(policy.confidence.calibrator or "")
    standing = found.standings.get(policy.policy)
    labelled, wrong = found.counts.get(policy.policy, (0, 0))
    yield f"stage: {_stage(policy, calibrator, labelled, wrong)}"
    yield f"labels: {labelled}, of which {wrong} not acceptable{_missing(labelled, wrong)}"
    yield f"calibrator: {_artefact(policy, calibrator, now)}"
    yield from _proposed(policy, calibrator, now, settings)
    if calibrator is not None:
        for each in calibrator.certificates:
            yield f"certificate: {_certificate(each)}"
        for why in staleness(policy, loaded.calibrators):
            yield f"stale: {why}"
    level = AuditLevel.TIGHTENED if standing is None else AuditLevel(standing.audit_level)
    rate = audit_rate(policy, level)
    yield f"audits: {f'{level.value}, ' if policy.audit.adaptive else ''}{rate:.0%} of what is returned"
    if standing and standing.suspended and standing.artefact == artefact_of(calibrator):
        yield f"suspended: {standing.suspended}; `holdgate calibrate resume {policy.policy}` or a new artefact lifts it"
    if (quality := found.quality.get(policy.policy)) is not None:
        yield f"metrics: {_metrics(quality)}"
    for alarm in found.alarms:
        if alarm.policy == policy.policy:
            yield f"ALARM {alarm.kind} since {alarm.at.isoformat(timespec='seconds')}: {alarm.message}"


def _proposed(
    policy: Policy, calibrator: Calibrator | None, now: datetime, settings: Settings
) -> Iterator[str]:
    try:
        proposal = newest_proposal(settings, policy.policy, calibrator)
    except ChangeError as error:
        yield f"proposed: {error}"
        return
    if proposal is not None:
        path, proposed = proposal
        yield f"proposed: {_artefact(policy, proposed, now)}; `holdgate calibrate apply {path} --policy {policy.policy}`"


def _stage(policy: Policy, calibrator: Calibrator | None, labelled: int, wrong: int) -> str:
    """Where on the path observe, enough labels, route, cascade."""
    if calibrator is None:
        enough = labelled >= LABELS_NEEDED and wrong >= ERRORS_NEEDED
        path = "collecting labels"
        if enough:
            path = "enough labels: fit a calibrator (holdgate calibrate fit)"
        elif not policy.audit.rate:
            path += ", but nothing that is returned is reviewed: set `audit`"
        return f"{'observing' if policy.mode is Mode.OBSERVE else 'enforcing without confidence'}, {path}"
    if policy.mode is Mode.OBSERVE:
        return "calibrated and observing; `mode: enforce` lets it route"
    return "cascade: rules, judges, confidence" if policy.judges else "routing by confidence"


def _missing(labelled: int, wrong: int) -> str:
    needs = [
        f"{more} more {what}"
        for more, what in (
            (LABELS_NEEDED - labelled, "labels"),
            (ERRORS_NEEDED - wrong, "that are not acceptable"),
        )
        if more > 0
    ]
    return f"; to fit a calibrator: {' and '.join(needs)}" if needs else ""


def _artefact(policy: Policy, calibrator: Calibrator | None, now: datetime) -> str:
    if policy.confidence.calibrator is None:
        return "none named"
    if calibrator is None:
        return f"{policy.confidence.calibrator} is not there"
    days = (now - calibrator.created_at) / timedelta(days=1)
    return f"{calibrator.name}, {days:.0f} days old, fitted on {calibrator.n} labels"


def _certificate(each: Certificate) -> str:
    where = " ".join(
        str(one)
        for one in (each.tier and f"tier {each.tier}", each.task and f"task {each.task}")
        if one
    )
    threshold = "nothing is confident"
    if each.threshold is not None:
        threshold = f"confident from {each.threshold:.4f}, covers about {each.coverage:.0%}"
    promise = f"{each.mode}: at most {each.alpha:.1%} errors with probability {1 - each.delta:.0%}"
    return f"{where + ': ' if where else ''}{promise}; {threshold}"


def _metrics(each: Quality) -> str:
    """The metrics that are known; nothing but the count if none is."""
    escape = each.error_escape
    interval = f" ({escape.low:.2%} to {escape.high:.2%})" if escape.high < 1.0 else ""
    known = (
        ("escalation", _percent(each.escalation_rate)),
        ("auto-resolve", _percent(each.auto_resolve_rate)),
        ("error escape", _percent(escape.estimate) + interval if escape.reviewed else ""),
        ("review p50", _seconds(each.review_p50_s)),
        ("p95", _seconds(each.review_p95_s)),
        ("agreement", _percent(each.reviewer_agreement)),
        ("feedback used", _percent(each.feedback_utilisation)),
    )
    return ", ".join([f"{each.decisions} decisions", *(f"{n} {v}" for n, v in known if v)])


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} s"
