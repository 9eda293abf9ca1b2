"""`holdgate calibrate`: what the command line takes; the work is done by the modules beside this one, loaded when needed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from math import nan
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import typer
from rich.table import Table

from gateway import terminal
from gateway.calibrating import applying, renewing
from gateway.errors import GatewayError
from gateway.records import DecisionRecord
from gateway.settings import Settings
from gateway.store import open_store
from gateway.terminal import ConfigOption, config_path, err, fail, settings_at
from policies import Action, CalibrationError, PolicyError, RiskTier
from policies.calibration import OTHERS
from policies.model import parse_duration_s

calibrate = typer.Typer(
    no_args_is_help=True,
    help="Fit confidence to labels, see how true it is, bring it into force and out of it.",
)

LabelsOption = Annotated[
    Path | None, typer.Option(help="JSON Lines: id, acceptable, signals, and what else is known")
]
ReviewsOption = Annotated[
    bool, typer.Option("--from-reviews", help="take what was said of the policy's responses")
]
PolicyOption = Annotated[str, typer.Option(help="the policy it is for")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="the artefact, called after its file")]
_Share = {"min": 0.0001, "max": 0.5}
_NAMED_SHARE = "a share between 0.0001 and 0.5, or one for each tier or task: low=0.1,high=0.02, or 0.05,critical=0.01"
AlphaOption = Annotated[
    str, typer.Option(help=f"errors allowed among what is returned on its own: {_NAMED_SHARE}")
]
DeltaOption = Annotated[float, typer.Option(help="how likely the promise may be broken", **_Share)]


@calibrate.command()
def fit(
    policy: PolicyOption,
    out: OutOption,
    labels: LabelsOption = None,
    from_reviews: ReviewsOption = False,
    alpha: AlphaOption = "0.02",
    delta: DeltaOption = 0.05,
    mode: Annotated[
        Literal["certified", "estimated"], typer.Option(help="proven, or bolder and not proven")
    ] = "certified",
    per: Annotated[
        Literal["all", "tier", "task"], typer.Option(help="a threshold for all, or for each")
    ] = "all",
    model: Annotated[
        str | None, typer.Option(help="take only labels of models with such names")
    ] = None,
    cost_error: Annotated[
        float | None, typer.Option(help="what an error that is let out costs", min=0)
    ] = None,
    cost_review: Annotated[
        float | None, typer.Option(help="what a review costs, in the same currency", min=0)
    ] = None,
    second_opinions: Annotated[
        bool,
        typer.Option("--second-opinions", help="ask other reviewers about suspect labels"),
    ] = False,
    config: ConfigOption = None,
) -> None:
    """Fit a calibrator with thresholds that can be promised: an artefact, and a report as one HTML file beside it.

    Exits 0; 1 on an error; 3 if these labels do not prove the promise, in which case the artefact says that nothing is confident.
    """
    work = _work()
    settings = _settings(config)
    target = work.Target(_alpha(alpha, per), delta, mode, per, model, cost_error, cost_review)
    with work.told():
        status = work.fit(
            settings,
            policy,
            labels,
            target,
            out,
            from_reviews=from_reviews,
            second_opinions=second_opinions,
        )
    raise typer.Exit(status)


@calibrate.command()
def report(
    artefact: Annotated[
        Path | None, typer.Argument(help="default: the one in force for --policy")
    ] = None,
    policy: Annotated[str | None, typer.Option(help="the policy it is for")] = None,
    labels: LabelsOption = None,
    from_reviews: ReviewsOption = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="the report")] = Path("calibration.html"),
    config: ConfigOption = None,
) -> None:
    """Measure a calibrator on labels: a table, and a report as one HTML file."""
    work = _work()
    settings = _settings(config)
    with work.told():
        work.report(settings, artefact, policy, labels, out, from_reviews=from_reviews)


@calibrate.command()
def propose(
    policy: PolicyOption,
    out: OutOption,
    labels: LabelsOption = None,
    from_reviews: ReviewsOption = False,
    alpha: Annotated[
        str | None, typer.Option(help=f"default: as the certificate in force; {_NAMED_SHARE}")
    ] = None,
    delta: DeltaOption = 0.05,
    mode: Annotated[Literal["certified", "estimated"], typer.Option()] = "certified",
    do_apply: Annotated[
        bool, typer.Option("--apply", help="bring it into force if it is better")
    ] = False,
    config: ConfigOption = None,
) -> None:
    """Fit a calibrator to the labels since the last one; propose it only if it is better on others and keeps its promise.

    Exits 0; 1 on an error; 3 if it is not proposed.
    """
    work = _work()
    settings = _settings(config)
    with work.told():
        target = None if alpha is None else work.Target(_alpha(alpha), delta, mode)
        status = work.propose(settings, policy, labels, target, out, from_reviews=from_reviews)
    if status == work.OK and do_apply:
        apply(out, policy, yes=True, config=config)
    raise typer.Exit(status)


@calibrate.command()
def renew(
    policy: Annotated[str | None, typer.Option(help="only that policy; default: all")] = None,
    labels: Annotated[
        int, typer.Option(min=1, help="how many newly reviewed responses make it due")
    ] = 500,
    every: Annotated[
        str | None, typer.Option(help="stay, and look again so often, such as 1h; default: once")
    ] = None,
    do_apply: Annotated[
        bool, typer.Option("--apply", help="bring into force what is better")
    ] = False,
    config: ConfigOption = None,
) -> None:
    """Propose a new calibrator, as `calibrate propose` does, for each policy that has enough new labels since the last.

    After an alarm that has suspended the calibrator 150 are enough. Proposals go to proposals/POLICY/ beside the policies folder;
    `holdgate status` names them. Exits 0; without --every 1 if something went wrong, which with it is only told.
    """
    _work()
    pause_s = _pause_s(every) if every is not None else None
    settings = _settings(config)
    while True:
        is_well = _renewed(settings, policy, labels, config, do_apply=do_apply)
        if pause_s is None:
            raise typer.Exit(0 if is_well else 1)
        time.sleep(pause_s)


def _pause_s(every: str) -> float:
    try:
        pause_s = parse_duration_s(every)
    except ValueError as error:
        fail(f"--every {every}: {error}")
    if not isinstance(pause_s, float) or pause_s < 1:
        fail(f"--every {every}: no more often than every second")
    return pause_s


def _renewed(
    settings: Settings, policy: str | None, labels: int, config: Path | None, *, do_apply: bool
) -> bool:
    """Look once, and propose what is due; whether nothing went wrong. What did is told."""
    work, is_well = _work(), True
    found: list[renewing.Due] = []
    with suppress(typer.Exit), work.told():
        is_well = False
        found = renewing.due(settings, policy, labels, datetime.now(UTC))
        is_well = True
    for each in found:
        terminal.out.print(f"{each.policy}: {each.why}", markup=False, soft_wrap=True)
        done = False
        with suppress(typer.Exit), work.told():
            _make(each.path.parent)
            status = work.propose(settings, each.policy, None, None, each.path, from_reviews=True)
            if status != work.OK:
                each.path.unlink(missing_ok=True)
            elif do_apply:
                apply(each.path, each.policy, yes=True, config=config)
            done = True
        is_well = is_well and done
    return is_well


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"{folder}: cannot be made: {error.strerror}")


@calibrate.command()
def apply(
    artefact: Annotated[Path, typer.Argument(help="what `calibrate fit` wrote")],
    policy: PolicyOption,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
    replay: Annotated[
        int, typer.Option(min=0, max=100_000, help="on how many recorded responses to try it")
    ] = 2_000,
    config: ConfigOption = None,
) -> None:
    """Bring a calibrator into force: shows the edit and what it would have changed, and asks. The gateway takes it up by itself."""
    settings = _settings(config)
    try:
        change = applying.proposed(settings, policy, artefact)
        recorded = asyncio.run(_recorded(settings, policy, replay)) if replay else []
        _show(change, recorded)
        if not yes:
            typer.confirm("Apply this?", abort=True)
        kept = applying.apply(settings, change)
    except (applying.ChangeError, CalibrationError, PolicyError) as error:
        fail(str(error))
    except GatewayError as error:
        fail(error.message)
    terminal.out.print(
        f"Applied. What was before is kept in {kept}; holdgate calibrate rollback {policy} brings it back.",
        markup=False,
        soft_wrap=True,
    )


@calibrate.command()
def rollback(
    policy: Annotated[str, typer.Argument(help="the policy to put back as it was")],
    config: ConfigOption = None,
) -> None:
    """Undo the last `calibrate apply` of a policy."""
    try:
        _, diff = applying.rollback(_settings(config), policy)
    except (applying.ChangeError, PolicyError) as error:
        fail(str(error))
    terminal.out.print(diff, markup=False, highlight=False, soft_wrap=True)
    terminal.out.print(f"Policy {policy} is as it was before.", markup=False)


def _alpha(said: str, per: str | None = None) -> float | dict[str, float]:
    """The share of errors allowed, or one for each tier or task; ends the command if it is neither.

    `per` says of which there is a threshold each, None if that is not known.
    """
    found: dict[str, float] = {}
    for part in said.split(","):
        name, is_named, value = part.strip().rpartition("=")
        try:
            share = float(value)
        except ValueError:
            share = nan
        if not _Share["min"] <= share <= _Share["max"]:
            fail(f"--alpha {said}: {value!r} is not {_NAMED_SHARE}")
        if name in found or (not is_named and OTHERS in found) or (is_named and not name):
            fail(f"--alpha {said}: say each tier or task once")
        found[name if is_named else OTHERS] = share
    named = [each for each in found if each != OTHERS]
    if named and per == "all":
        fail(f"--alpha {said}: for a share of its own for {named[0]}, say --per tier or --per task")
    unknown = [each for each in named if per == "tier" and each not in list(RiskTier)]
    if unknown:
        fail(f"--alpha {said}: there is no tier {unknown[0]!r}; there are {', '.join(RiskTier)}")
    return found if named else found[OTHERS]


def _settings(config: Path | None) -> Settings:
    return settings_at(config_path(config), secrets=False)


async def _recorded(settings: Settings, policy: str, limit: int) -> Sequence[DecisionRecord]:
    store = await open_store(settings.store.url)
    try:
        return await store.recent(policy, limit)
    finally:
        await store.close()


def _show(change: applying.Change, recorded: Sequence[DecisionRecord]) -> None:
    terminal.out.print(
        change.diff or "The policy is so already.", markup=False, highlight=False, soft_wrap=True
    )
    for warning in change.warnings:
        err.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    if not recorded:
        terminal.out.print("There is no recorded traffic of this policy to try it on.")
        return
    moves, untold = applying.replayed(change, recorded)
    terminal.out.print(f"{moves.total()} recorded responses, decided on again:")
    table = Table("action")
    for heading in ("before", "after"):
        table.add_column(heading, justify="right")
    for action in Action:
        before = sum(n for (old, _), n in moves.items() if old is action)
        after = sum(n for (_, new), n in moves.items() if new is action)
        table.add_row(action.value, str(before), str(after))
    terminal.out.print(table)
    if untold:
        terminal.out.print(
            f"{untold} more cannot be told: they got no answer, were checked otherwise, or lack a signal that is new.",
            soft_wrap=True,
        )


def _work() -> ModuleType:
    try:
        from gateway.calibrating import fitting  # noqa: PLC0415 - needs the extra `analysis`
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("numpy", "plotly", "scipy", "sklearn"):
            raise
        fail(f"This needs {missing}: install holdgate[analysis].")
    return fitting
