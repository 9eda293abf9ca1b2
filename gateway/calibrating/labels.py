"""What a calibrator is fitted to: labelled responses, from a file or from the store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from gateway.app import SystemClock
from gateway.labels import LabelError
from gateway.ports import Store
from gateway.recording import new_id
from gateway.records import Asked, LabelledDecision
from gateway.store import open_store
from policies import Policy, RiskTier
from policies.labelled import Labelled
from policies.signals import JUDGE, JudgeSignal, SignalName

_AT_ONCE = 500
_MAX_LINE = 100_000
_MOST_TOLD = 50

_Share = Annotated[float, Field(gt=0, le=1)]
_Score = Annotated[float, Field(ge=0, le=1)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Line(BaseModel):
    """One line of a file of labels: the fields of `policies.labelled.Labelled`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: Annotated[str, Field(min_length=1, max_length=256)]
    acceptable: bool
    signals: dict[SignalName | JudgeSignal, _Finite]
    check_scores: tuple[_Score, ...] = ()
    model: Annotated[str, Field(max_length=256)] = ""
    task: Annotated[str, Field(max_length=256)] | None = None
    tier: RiskTier | None = None
    inclusion: _Share = 1.0
    weight: _Share = 1.0
    blind: bool = False
    at: AwareDatetime | None = None
    digest: Annotated[str, Field(max_length=256)] = ""
    settled: bool = False


def read_labelled(path: Path) -> list[Labelled]:
    """The labelled responses of a JSON Lines file, one object a line; blank lines are passed over.

    Raises
    ------
    LabelError
        If the file cannot be read, or with its mistakes, each with its line: a line that is not such an object, an id that
        came before, no line at all.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LabelError(f"{path}: cannot be read: {error}") from error
    found: dict[str, Labelled] = {}
    mistakes: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = _row(line)
        except LabelError as error:
            mistakes += [f"{path}:{number}: {each}" for each in str(error).splitlines()]
            continue
        if row.id in found:
            mistakes.append(f"{path}:{number}: the id {row.id!r} came before; ids must differ")
        found[row.id] = row
    if mistakes[_MOST_TOLD:]:
        mistakes[_MOST_TOLD:] = [f"{path}: and {len(mistakes) - _MOST_TOLD} mistakes more"]
    if not found and not mistakes:
        mistakes = [f"{path}: there is no label in it"]
    if mistakes:
        raise LabelError("\n".join(mistakes))
    return list(found.values())


def _row(line: str) -> Labelled:
    if len(line) > _MAX_LINE:
        raise LabelError(f"longer than {_MAX_LINE} characters")
    try:
        return Labelled(**dict(_Line.model_validate_json(line)))
    except ValidationError as error:
        told = (
            f"{'.'.join(str(part) for part in each['loc'] if part != '[key]') or 'the line'}: {each['msg']}"
            for each in error.errors(include_url=False, include_input=False)
        )
        raise LabelError("\n".join(told)) from error


async def reviewed(
    store: Store, policy: Policy, since: datetime | None = None
) -> tuple[list[Labelled], int]:
    """What was said of a policy's responses, oldest first, since then if a time is given; and how many labels are left out.

    Left out are those whose probability to be given nobody knows: applications and files choose what they speak of.
    """
    rows: list[Labelled] = []
    unknown, after = 0, ""
    while found := await store.labelled(after, _AT_ONCE):
        after = found[-1].decision.id
        for each in found:
            name = each.decision.policy.partition("@")[0]
            if name != policy.policy or (since is not None and each.at <= since):
                continue
            if (row := labelled(each, policy)) is None:
                unknown += 1
            else:
                rows.append(row)
    return rows, unknown


def labelled(judged: LabelledDecision, policy: Policy) -> Labelled | None:
    """A decision and its label as a calibrator of the policy is fitted to it; None if its inclusion is not known."""
    decision = judged.decision
    if judged.inclusion is None:
        return None
    evidence: Any = decision.detail.get("evidence") or {}
    results: Mapping[str, Any] = evidence.get("results") or {}
    scores = {name: each["score"] for name, each in results.items() if each["score"] is not None}
    judges = {JUDGE + each.id: scores[each.id] for each in policy.judges if each.id in scores}
    signals = {**(evidence.get("signals") or {}), **judges}
    return Labelled(
        id=decision.id,
        acceptable=judged.acceptable,
        signals={name: value for name, value in signals.items() if _is_number(value)},
        check_scores=tuple(scores[each.id] for each in policy.feeding if each.id in scores),
        model=decision.model,
        task=decision.task_type,
        tier=decision.risk,
        inclusion=judged.inclusion,
        weight=judged.weight,
        blind=judged.blind,
        at=judged.at,
        digest=f"{decision.request_digest}{decision.response_digest}",
        settled=judged.settled,
    )


async def ask_again(url: str, decisions: Iterable[str]) -> Asked:
    """Ask other reviewers about the responses of these decisions, in the queue of the store at that address."""
    store, now = await open_store(url), SystemClock().now()
    try:
        return await store.ask_again({each: new_id("hgt", now) for each in decisions}, now)
    finally:
        await store.close()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and isfinite(value)
