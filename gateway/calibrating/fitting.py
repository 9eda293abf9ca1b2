"""Fitting calibrators: from what the command line names to what it prints and writes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace
from pydantic import TypeAdapter, ValidationError

from gateway.app import SystemClock
from gateway.calibrating import applying
from gateway.calibrating.applying import ChangeError, write_whole
from gateway.calibrating.labels import ask_again, read_labelled, reviewed
from gateway.calibrating.report import group_of, html_report, promise, summary
from gateway.errors import GatewayError
from gateway.labels import LabelError
from gateway.settings import Settings
from gateway.store import open_store
from gateway.terminal import err, fail, out
from policies import (
    CalibrationError,
    Calibrator,
    Policy,
    PolicyError,
    RiskTier,
    load_calibrator,
)
from policies.agreement import contradicted
from policies.calibration import Certificate, certificate_for
from policies.columns import LEAST
from policies.diagnostics import Diagnostics
from policies.fitting import Mode, Per, examine
from policies.fitting import fit as fitted
from policies.labelled import Labelled
from policies.maps import log_loss
from policies.model import Name
from policies.suspects import Suspect, suspected

OK, MISSED = 0, 3

#: So many recent responses are compared with the labels.
_RECENT = 2_000

#: A proposal is fitted to this share of the new labels and tried on the others.
_FITTED_TO = 2 / 3

_NAME: TypeAdapter[str] = TypeAdapter(Name)


class Target(msgspec.Struct, frozen=True):
    """What is to be promised of the responses that are returned on their own; `alpha` as `policies.fitting.fit` takes it."""

    alpha: float | Mapping[str, float]
    delta: float
    mode: Mode = "certified"
    per: Per = "all"
    model: str | None = None
    cost_error: float | None = None
    cost_review: float | None = None


class Labels(msgspec.Struct, frozen=True):
    """The labels there were, signals of recent responses, and where they come from; `doubt` says why not to rely on them."""

    rows: list[Labelled]
    recent: list[Mapping[str, float]]
    about: tuple[str, str]
    doubt: str | None = None


@contextmanager
def told() -> Iterator[None]:
    """Ends the command with what is wrong, if it is something that the person at it can mend."""
    try:
        yield
    except (CalibrationError, ChangeError, LabelError, PolicyError) as error:
        fail(str(error))
    except GatewayError as error:
        fail(error.message)


def labels_of(
    settings: Settings,
    policy: Policy | None,
    labels: Path | None,
    *,
    from_reviews: bool,
    since: datetime | None = None,
) -> Labels:
    """The labels of a file, or those of a policy in the store, given since then.

    Raises
    ------
    LabelError
        If it is not clear which, or there are none.
    GatewayError
        If the store cannot be read.
    """
    if (labels is None) != from_reviews:
        raise LabelError("name the labels: --labels FILE, or --from-reviews")
    if labels is not None:
        rows = [
            row for row in read_labelled(labels) if since is None or (row.at and row.at > since)
        ]
        found = Labels(rows, [], ("labels", str(labels)))
    elif policy is None:
        raise LabelError("--from-reviews needs the policy whose responses were reviewed: --policy")
    else:
        found = asyncio.run(_stored(settings.store.url, policy, since))
    if not found.rows:
        raise LabelError("there are no labels" + (f" since {since.isoformat()}" if since else ""))
    return found


async def _stored(url: str, policy: Policy, since: datetime | None) -> Labels:
    store = await open_store(url)
    try:
        rows, unknown = await reviewed(store, policy, since)
        recent = await store.recent(policy.policy, _RECENT)
        alarms = [each for each in await store.open_alarms() if each.policy == policy.policy]
    finally:
        await store.close()
    if unknown:
        err.print(
            f"{unknown} labels are left out: nobody knows how probable it was that they came to be given."
        )
    signals = (_signals(each.detail) for each in recent)
    about = ("labels", f"of policy {policy.policy}, from the store")
    doubts = [each.message for each in alarms if each.kind == "reviewers"]
    return Labels(rows, [each for each in signals if each], about, next(iter(doubts), None))


def _signals(detail: Mapping[str, Any]) -> Mapping[str, float]:
    evidence = detail.get("evidence") or {}
    found: Mapping[str, float] = evidence.get("signals") or {}
    return found


# ------------------------------------------------------------------------------------------------------------- the work


def fit(
    settings: Settings,
    policy: str,
    labels: Path | None,
    target: Target,
    path: Path,
    *,
    from_reviews: bool,
    second_opinions: bool = False,
) -> int:
    """Fit a calibrator for a policy, print what it promises, write it and its report; the exit status.

    With `second_opinions` other reviewers are asked about the labels from reviews that are suspect.
    """
    if second_opinions and not from_reviews:
        raise LabelError("--second-opinions asks reviewers again: it goes with --from-reviews")
    loaded = applying.in_force(settings)
    wanted = applying.policy_named(loaded, policy)
    found = labels_of(settings, wanted, labels, from_reviews=from_reviews)
    calibrator, diagnostics = _fitted(wanted, found, found.rows, target, path)
    _written(path, calibrator)
    status = tell(calibrator, diagnostics, found.about, path)
    if second_opinions:
        _ask_again(settings, diagnostics.suspects)
    elif from_reviews and diagnostics.suspects:
        err.print("--second-opinions asks other reviewers about the suspect labels.")
    return status


def _ask_again(settings: Settings, suspects: Sequence[Suspect]) -> int:
    """Ask for second opinions on suspect labels, and say so; how many there is to wait for."""
    if not suspects:
        return 0
    asked = asyncio.run(ask_again(settings.store.url, [each.id for each in suspects]))
    lost = len(suspects) - asked.opened - asked.waiting
    out.print(
        f"Second opinions: {asked.opened} asked for in the review queue, {asked.waiting} were there already"
        + (f", {lost} cannot be given, the content is gone." if lost else "."),
        soft_wrap=True,
    )
    return asked.opened + asked.waiting


def _fitted(
    policy: Policy, labels: Labels, rows: Sequence[Labelled], target: Target, path: Path
) -> tuple[Calibrator, Diagnostics]:
    try:
        name = _NAME.validate_python(path.stem)
    except ValidationError as error:
        raise ChangeError(
            f"{path}: the calibrator is called after its file: small letters, digits, - and _, such as orders-2.json"
        ) from error
    return fitted(
        rows,
        name=name,
        created_at=SystemClock().now(),
        alpha=target.alpha,
        delta=target.delta,
        mode=target.mode,
        per=target.per,
        model=target.model,
        checks_digest=policy.checks_digest,
        judges=policy.judge_digests,
        recent=labels.recent,
        cost_error=target.cost_error,
        cost_review=target.cost_review,
    )


def _written(path: Path, calibrator: Calibrator) -> None:
    try:
        write_whole(path, calibrator.model_dump_json(indent=2).encode() + b"\n")
    except OSError as error:
        raise ChangeError(f"{path}: cannot be written: {error.strerror}") from error


def tell(calibrator: Calibrator, found: Diagnostics, about: tuple[str, str], path: Path) -> int:
    """Print what there is to say of a calibrator, write the report beside it; the exit status."""
    out.print(summary(calibrator, found))
    for remark in found.remarks:
        err.print(f"Note: {remark}.", style="yellow", markup=False, soft_wrap=True)
    report = path.with_suffix(".html")
    write_report(report, calibrator, found, about)
    out.print(f"The calibrator is {path}, the report is {report}.", markup=False, soft_wrap=True)
    missed = [each for each in calibrator.certificates if each.threshold is None]
    for each in missed:
        err.print(f"Not feasible: {promise(each)}.", style="red", markup=False, soft_wrap=True)
    return MISSED if missed else OK


def write_report(
    path: Path, calibrator: Calibrator, found: Diagnostics, about: tuple[str, str]
) -> None:
    """Write the report. Raises `ChangeError` if that cannot be done."""
    page = html_report(calibrator, found, about=[about], at=SystemClock().now())
    try:
        write_whole(path, page.encode())
    except OSError as error:
        raise ChangeError(f"{path}: cannot be written: {error.strerror}") from error


def report(
    settings: Settings,
    artefact: Path | None,
    policy: str | None,
    labels: Path | None,
    path: Path,
    *,
    from_reviews: bool,
) -> None:
    """Measure an artefact, or the calibrator in force for a policy, on labels; print the figures, write the report."""
    wanted = calibrator = None
    if policy is not None:
        loaded = applying.in_force(settings)
        wanted = applying.policy_named(loaded, policy)
        calibrator = loaded.calibrators.get(wanted.confidence.calibrator or "")
    if artefact is not None:
        try:
            calibrator = load_calibrator(artefact.read_text("utf-8"), file=str(artefact))
        except (OSError, UnicodeDecodeError) as error:
            raise ChangeError(f"{artefact}: cannot be read: {error}") from error
    if calibrator is None:
        raise ChangeError("name the calibrator: its file, or --policy with one that is in force")
    found = labels_of(settings, wanted, labels, from_reviews=from_reviews)
    diagnostics = examine(calibrator, found.rows)
    out.print(summary(calibrator, diagnostics))
    write_report(path, calibrator, diagnostics, found.about)
    out.print(f"The report is {path}.", markup=False, soft_wrap=True)


# ------------------------------------------------------------------------------------------------------- recalibration


class Comparison(msgspec.Struct, frozen=True):
    """Two calibrators on labels that neither has seen: mean log loss, and what the new one returns of them.

    `kept` has, by certificate, how many it would return and how many of them are errors; `returned_old` is how many the old
    one returns, None as `loss_old` if there is none that applies.
    """

    n: int
    loss_old: float | None
    loss_new: float
    kept: Mapping[Certificate, tuple[int, int]]
    returned_old: int | None = None

    @property
    def returned(self) -> int:
        """How many the new one would return."""
        return sum(returned for returned, _ in self.kept.values())

    @property
    def errors(self) -> int:
        """How many of these are errors."""
        return sum(errors for _, errors in self.kept.values())

    def refusal(self, calibrator: Calibrator, waiting: int = 0) -> str | None:
        """Why the new one is not to take the place of the old one; None if it is.

        `waiting` suspect labels wait for a second opinion. Until then they count as they are, so that nothing is promised that
        they speak against; but what would be returned less may be for their sake alone.
        """
        if infeasible := [each for each in calibrator.certificates if each.threshold is None]:
            return promise(infeasible[0])
        if self.loss_old is not None and self.loss_new >= self.loss_old:
            return (
                f"it is no better: log loss {self.loss_new:.4f} on {self.n} labels held out, "
                f"that in force {self.loss_old:.4f}"
            )
        for each, (returned, errors) in self.kept.items():
            if contradicted(each.alpha, returned, errors):
                return (
                    f"its certificate ({group_of(each)}) does not hold: {errors} errors among the {returned} held-out "
                    f"labels that it would return, promised are {each.alpha:.3g}"
                )
        if waiting and self.returned_old is not None and self.returned < self.returned_old:
            return (
                f"of {self.n} labels held out it would return {self.returned}, that in force {self.returned_old}, and "
                f"{waiting} suspect labels wait for a second opinion"
            )
        return None


def propose(
    settings: Settings,
    policy: str,
    labels: Path | None,
    target: Target | None,
    path: Path,
    *,
    from_reviews: bool,
) -> int:
    """Fit a calibrator to the labels given since the one in force was fitted, and say whether it is better.

    Two thirds of the labels, by a hash of their ids, fit it; on the others it must have the lower log loss and keep its promise.
    None is while reviewers do not agree with each other. Other reviewers are asked about suspect labels from reviews; a
    calibrator that would return less waits for them. Without a target it is that of the certificate in force, with one for
    each tier or task if that has. The exit status: 0 if it is to be taken, 3 if not.
    """
    loaded = applying.in_force(settings)
    wanted = applying.policy_named(loaded, policy)
    current = loaded.calibrators.get(wanted.confidence.calibrator or "")
    since = current.created_at if current else None
    found = labels_of(settings, wanted, labels, from_reviews=from_reviews, since=since)
    if found.doubt is not None:
        err.print(f"Not proposed: {found.doubt}.", style="red", markup=False, soft_wrap=True)
        return MISSED
    fit_to = [row for row in found.rows if _draw(row) < _FITTED_TO]
    held_out = [row for row in found.rows if _draw(row) >= _FITTED_TO]
    if len(held_out) < LEAST:
        raise CalibrationError(
            f"{len(found.rows)} labels since the last calibrator are too few: {len(held_out)} would be held out, "
            f"needed are {LEAST}"
        )
    goal = _target_of(current) if target is None else replace(target, per=_per_of(current))
    calibrator, diagnostics = _fitted(wanted, found, fit_to, goal, path)
    _written(path, calibrator)
    compared = _compared(wanted, current, calibrator, held_out)
    tell(calibrator, diagnostics, found.about, path)
    doubted = (*diagnostics.suspects, *_doubted(calibrator, held_out))
    waiting = _ask_again(settings, doubted) if from_reviews else 0
    if why := compared.refusal(calibrator, waiting):
        err.print(f"Not proposed: {why}.", style="red", markup=False, soft_wrap=True)
        return MISSED
    old = (
        "none is in force"
        if compared.loss_old is None
        else f"that in force {compared.loss_old:.4f}"
    )
    out.print(
        f"Proposed: log loss {compared.loss_new:.4f} on {compared.n} labels held out, {old}; "
        f"{compared.errors} errors among {compared.returned} returned.",
        markup=False,
        soft_wrap=True,
    )
    return OK


def _target_of(current: Calibrator | None) -> Target:
    if current is None or not current.certificates:
        raise ChangeError(
            "no certificate is in force: say what is to be promised, --alpha and --delta"
        )
    first, per = current.certificates[0], _per_of(current)
    delta = sum(each.delta for each in current.certificates)
    alphas = {str(each.tier or each.task): each.alpha for each in current.certificates}
    alpha = first.alpha if len(set(alphas.values())) == 1 else alphas
    return Target(alpha, delta, first.mode, per, current.model)


def _per_of(current: Calibrator | None) -> Per:
    if current is None or not current.certificates:
        return "all"
    first = current.certificates[0]
    return "tier" if first.tier else "task" if first.task else "all"


def _draw(row: Labelled) -> float:
    digest = sha256(f"held out {row.digest or row.id}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def _compared(
    policy: Policy, current: Calibrator | None, new: Calibrator, held_out: Sequence[Labelled]
) -> Comparison:
    usable = [row for row in held_out if new.lacks(row.signals) is None]
    kept: dict[Certificate, tuple[int, int]] = {}
    for row in usable:
        if (certificate := _returning(new, row)) is not None:
            returned, errors = kept.get(certificate, (0, 0))
            kept[certificate] = returned + 1, errors + (not row.acceptable)
    applies = current is not None and not any(
        current.fits(row.model, policy.checks_digest, policy.judge_digests)
        or current.lacks(row.signals)
        for row in usable
    )
    return Comparison(
        n=len(usable),
        loss_old=_loss(current, usable) if current is not None and applies else None,
        loss_new=_loss(new, usable),
        kept=kept,
        returned_old=sum(_returning(current, row) is not None for row in usable)
        if current is not None and applies
        else None,
    )


def _doubted(calibrator: Calibrator, held_out: Sequence[Labelled]) -> tuple[Suspect, ...]:
    """The suspect ones of labels that the calibrator has not seen."""
    usable = [row for row in held_out if calibrator.lacks(row.signals) is None]
    confidence = [calibrator.confidence(row.signals, row.check_scores) for row in usable]
    return suspected(usable, np.array(confidence))


def _returning(calibrator: Calibrator, row: Labelled) -> Certificate | None:
    """The certificate by which a response is returned on its own; None if it is not."""
    certificates = calibrator.certified_for(row.task)
    first = certificate_for(certificates, row.tier or RiskTier.MEDIUM)
    if first is None or first.threshold is None:
        return None
    confidence = calibrator.confidence(row.signals, row.check_scores)
    return first if confidence >= first.threshold else None


def _loss(calibrator: Calibrator, rows: Sequence[Labelled]) -> float:
    """Mean log loss, each label for as many responses as it speaks for."""
    return log_loss(
        np.array([calibrator.confidence(row.signals, row.check_scores) for row in rows]),
        np.array([row.acceptable for row in rows]),
        np.array([row.weight / row.inclusion for row in rows]),
    )
