"""Bringing a calibrator into force: one edit of one policy, looked at before, undone by one command.

An artefact is put beside those in force under its own name; the policy, replaced in one piece, then names it. At every moment the
policies folder is right, and the gateway takes the change up without a restart. What was there before and after is kept in
`history/<policy>/` beside the policies folder.
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import orjson

from gateway.policy_files import Loaded, load, reader
from gateway.records import DecisionRecord
from gateway.settings import Settings
from gateway.spending import Prices
from policies import (
    Action,
    CalibrationError,
    Calibrator,
    Evidence,
    Policy,
    RiskAssessment,
    decide,
    estimate,
    load_calibrator,
    load_policies,
    staleness,
)
from policies.signals import ALWAYS, JUDGE
from policies.source import Source

#: From the policy that is in force to the one that would be.
Moves = Counter[tuple[Action, Action]]


class ChangeError(ValueError):
    """A change cannot be made; the message says why and how to mend it."""


class Version(msgspec.Struct, frozen=True):
    """A policy as it is written, and what it comes to; `calibrator` is None if it names none that is there."""

    text: str
    policy: Policy
    calibrator: Calibrator | None


class Change(msgspec.Struct, frozen=True):
    """A policy file before and after, and the artefact to be put into the calibrators folder, None if it is there."""

    file: Path
    before: Version
    after: Version
    artefact: tuple[Path, bytes] | None
    warnings: tuple[str, ...] = ()

    @property
    def diff(self) -> str:
        """What changes in the policy, as a unified diff."""
        return _diff(self.before.text, self.after.text, self.file)


def in_force(settings: Settings) -> Loaded:
    """The policies and calibrators as the gateway has them. Raises `PolicyError` or `CalibrationError`."""
    return load(settings.policies, settings.calibrators, Prices(settings.models))


def policy_named(loaded: Loaded, name: str) -> Policy:
    """The policy with that name. Raises `ChangeError` with those there are."""
    found = next((each for each in loaded.policies.policies if each.policy == name), None)
    if found is None:
        known = ", ".join(each.policy for each in loaded.policies.policies)
        raise ChangeError(f"there is no policy {name!r}; there are {known}")
    return found


def proposed(settings: Settings, name: str, artefact: Path) -> Change:
    """The change that brings an artefact into force for a policy; nothing is written.

    What is confident comes from the artefact if that has a certificate, be it that nothing is; otherwise the policy keeps its
    own thresholds.

    Raises
    ------
    ChangeError, PolicyError, CalibrationError
        If there is no such policy or artefact, the policy would not be right, or the artefact is not for it.
    """
    loaded = in_force(settings)
    before = policy_named(loaded, name)
    file, text = _file_of(settings, name)
    try:
        content = artefact.read_bytes()
    except OSError as error:
        raise ChangeError(f"{artefact}: cannot be read: {error.strerror}") from error
    calibrator = load_calibrator(content.decode(errors="replace"), file=str(artefact))
    if why := calibrator.stale(before.checks_digest, before.judge_digests):
        raise ChangeError(f"{artefact} is not for policy {name}: {why}; fit it again")
    edited = Source(text, str(file)).edited(("confidence", "calibrator"), calibrator.name)
    if calibrator.certificates:
        edited = Source(edited, str(file)).edited(("thresholds",), _thresholds(before))
    others = [(str(path), path.read_text("utf-8")) for path in _files(settings) if path != file]
    checked = load_policies(
        [(str(file), edited), *others], read=reader(settings.policies.parent.resolve())
    )
    after = next(each for each in checked.policies if each.policy == name)
    problems = staleness(after, {calibrator.name: calibrator})
    return Change(
        file,
        Version(text, before, loaded.calibrators.get(before.confidence.calibrator or "")),
        Version(edited, after, calibrator),
        _to_be_put(settings, loaded, calibrator, content),
        (*problems, *(str(each) for each in checked.warnings if each.file == str(file))),
    )


def _thresholds(policy: Policy) -> str:
    if "unsure" in policy.thresholds.model_fields_set:
        return f"{{from_calibrator: true, unsure: {policy.thresholds.unsure:g}}}"
    return "{from_calibrator: true}"


def _to_be_put(
    settings: Settings, loaded: Loaded, calibrator: Calibrator, content: bytes
) -> tuple[Path, bytes] | None:
    there = loaded.calibrators.get(calibrator.name)
    if there == calibrator:
        return None
    target = settings.calibrators / f"{calibrator.name}.json"
    if there is not None or target.exists():
        raise ChangeError(
            f"another calibrator named {calibrator.name} is there; give the new one a name of its own"
        )
    return target, content


def _files(settings: Settings) -> list[Path]:
    found = (*settings.policies.glob("*.yaml"), *settings.policies.glob("*.yml"))
    return sorted(path for path in found if not path.name.startswith("."))


def _file_of(settings: Settings, name: str) -> tuple[Path, str]:
    for path in _files(settings):
        text = path.read_text("utf-8")
        document = Source(text, str(path)).data
        if isinstance(document, dict) and document.get("policy") == name:
            return path, text
    raise ChangeError(f"{settings.policies}: there is no policy {name!r}")


# ------------------------------------------------------------------------------------------- what it would have changed


def replayed(change: Change, recorded: Sequence[DecisionRecord]) -> tuple[Moves, int]:
    """What enforce mode would have done with recorded responses, before and after; and how many cannot be told.

    The pure core decides again on the recorded evidence. Those cannot be told that got no answer, were recorded under other
    checks than the policy has, or by an earlier version that did not compute a signal which the artefact needs.
    """
    moves: Moves = Counter()
    for record in recorded:
        evidence = _evidence(record)
        if evidence is None or not _is_whole(change.before.policy, evidence):
            continue
        if _predates(change.after.calibrator, evidence):
            continue
        moves[
            _action(change.before, record, evidence), _action(change.after, record, evidence)
        ] += 1
    return moves, len(recorded) - moves.total()


def _action(version: Version, record: DecisionRecord, evidence: Evidence) -> Action:
    known = estimate(
        version.policy,
        evidence,
        model=record.model,
        calibrator=version.calibrator,
        task=record.task_type,
    )
    decision = decide(
        version.policy,
        evidence,
        risk=RiskAssessment(record.risk, ()),
        estimate=known,
        draw=0.0,
        attempts_left=0,
    )
    return decision.intended


def _evidence(record: DecisionRecord) -> Evidence | None:
    if not 200 <= record.status < 300:
        return None
    try:
        return msgspec.convert(_known(record.detail.get("evidence")), Evidence)
    except msgspec.ValidationError:
        return None


def _known(value: Any) -> Any:
    """The value without what was not known: null stands for it."""
    if isinstance(value, dict):
        return {key: _known(each) for key, each in value.items() if each is not None}
    return [_known(each) for each in value] if isinstance(value, list) else value


def _is_whole(policy: Policy, evidence: Evidence) -> bool:
    passed_over = {each.source for each in evidence.skipped}
    return all(
        check.id in evidence.results
        for stage in policy.stages
        if f"stage:{stage.name}" not in passed_over
        for check in stage.checks
    )


def _predates(calibrator: Calibrator | None, evidence: Evidence) -> bool:
    known = evidence.signals.keys()
    if calibrator is None or not known or known >= ALWAYS:
        return False
    return any(
        not each.startswith(JUDGE) and each not in known for each in calibrator.score.signals
    )


# ------------------------------------------------------------------------------------------------------------- files


def apply(settings: Settings, change: Change) -> Path:
    """Write artefact and policy, and keep what was there; returns where.

    Raises
    ------
    ChangeError
        If the policy was edited meanwhile, or a file cannot be written; the policy is then as it was.
    """
    try:
        if change.file.read_text("utf-8") != change.before.text:
            raise ChangeError(f"{change.file} was edited meanwhile; look at the change again")
        if change.artefact is not None:
            path, content = change.artefact
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content)
        kept = _keep(settings, change)
        write_whole(change.file, change.after.text.encode())
    except OSError as error:
        raise ChangeError(f"{error.filename}: cannot be written: {error.strerror}") from error
    return kept


def _history(settings: Settings, name: str) -> Path:
    return settings.policies.parent / "history" / name


def proposals(settings: Settings, name: str) -> Path:
    """Where the proposals for a policy are, and the reports on all that were tried."""
    return settings.policies.parent / "proposals" / name


def newest_proposal(
    settings: Settings, name: str, current: Calibrator | None
) -> tuple[Path, Calibrator] | None:
    """The newest proposal for a policy, if it is newer than its calibrator in force.

    Raises
    ------
    ChangeError
        If one of them cannot be read.
    """
    found = []
    for path in proposals(settings, name).glob("*.json"):
        try:
            each = load_calibrator(path.read_text("utf-8"), file=str(path))
        except (OSError, UnicodeDecodeError, CalibrationError) as error:
            raise ChangeError(f"the proposal {path} cannot be read: {error}") from error
        if current is None or each.created_at > current.created_at:
            found.append((each.created_at, path, each))
    return max(found, key=lambda each: each[:2])[1:] if found else None


def _keep(settings: Settings, change: Change) -> Path:
    folder = _history(settings, change.before.policy.policy)
    folder.mkdir(parents=True, exist_ok=True)
    number = 1 + sum(1 for _ in folder.iterdir())
    path = folder / f"{number:04}.json"
    kept = {"before": change.before.text, "after": change.after.text}
    write_whole(path, orjson.dumps(kept, option=orjson.OPT_INDENT_2))
    return path


def _numbers(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.glob("*.json") if path.stem.isdecimal()]


def rollback(settings: Settings, name: str) -> tuple[Path, str]:
    """Undo the newest change of a policy that was not undone; the file of the policy, and the diff.

    Raises
    ------
    ChangeError
        If there is none, the policy was edited since, or a file cannot be written.
    """
    folder = _history(settings, name)
    if not (numbers := _numbers(folder)):
        raise ChangeError(f"no change of policy {name} is kept in {folder}")
    kept = folder / f"{max(numbers):04}.json"
    file, text = _file_of(settings, name)
    try:
        change: Mapping[str, str] = orjson.loads(kept.read_bytes())
        if text != change["after"]:
            raise ChangeError(
                f"{file} was edited since the change in {kept}; put back by hand what it was before"
            )
        write_whole(file, change["before"].encode())
        kept.rename(kept.with_suffix(".undone"))
    except OSError as error:
        raise ChangeError(f"{error.filename}: cannot be written: {error.strerror}") from error
    return file, _diff(change["after"], change["before"], file)


def _diff(old: str, new: str, file: Path) -> str:
    lines = difflib.unified_diff(
        old.splitlines(keepends=True), new.splitlines(keepends=True), str(file), f"{file} (new)"
    )
    return "".join(lines)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that after a crash it is there whole, or as it was."""
    new = path.with_name(f".{path.name}.new")
    try:
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError:
        with suppress(OSError):
            new.unlink()
        raise
