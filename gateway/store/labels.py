"""Labels: each operation one function of a connection inside one transaction. Rows are added, and never changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, RowMapping, case, func, select
from sqlalchemy import insert as sql_insert

from gateway.errors import NotFound
from gateway.labels import by_decision, latest, reduced
from gateway.records import DecisionRecord, Label, LabelledDecision, LabelSource, NewLabel, Said
from gateway.store.decisions import log, verdicts, with_ids
from gateway.store.rows import audit_row, label_record, micros, text
from gateway.store.schema import decisions, labels, tasks
from validators import JSON

#: Ids in one query: both engines limit the number of parameters.
_IDS = 500

_FACTS = select(
    decisions.c.id,
    decisions.c.policy,
    decisions.c.action,
    decisions.c.intended,
    decisions.c.risk,
    decisions.c.confidence,
    decisions.c.inclusion_floor,
    tasks.c.inclusion,
).outerjoin_from(decisions, tasks, (tasks.c.decision_id == decisions.c.id) & (tasks.c.round == 0))


def add(connection: Connection, given: Sequence[NewLabel]) -> int:
    """Insert those labels that say something new, with audit entries; how many that are. All of them or none.

    Raises `NotFound` with the ids that name no decision in `extra["decisions"]`.
    """
    ids = list(dict.fromkeys(each.decision_id for each in given))
    said = {(each.decision_id, each.labeller): each for each in latest(_of(connection, ids))}
    new: dict[tuple[str, str], NewLabel] = {}
    for each in given:
        key = each.decision_id, text(each.labeller)
        before = new.get(key) or said.get(key)
        is_known = before is not None and _content(before) == _content(each)
        if not is_known or (each.inclusion not in (None, before and before.inclusion)):
            new[key] = each
    insert(connection, list(new.values()))
    entries = []
    for each in new.values():
        facts: dict[str, JSON] = {
            "source": each.source,
            "labeller": text(each.labeller),
            "acceptable": each.acceptable,
        }
        entries.append(audit_row("label.given", each.decision_id, micros(each.at), facts))
    log(connection, entries, [])
    return len(new)


def _content(label: NewLabel) -> tuple[Any, ...]:
    comment = label.comment and text(label.comment)
    return label.source, label.acceptable, label.weight, label.blind, comment


def insert(connection: Connection, given: Sequence[NewLabel]) -> None:
    """Insert labels, with what their decisions say. Raises `NotFound` as `add`."""
    facts: dict[str, RowMapping] = {}
    for ids in _chunks({each.decision_id for each in given}):
        found = connection.execute(_FACTS.where(decisions.c.id.in_(ids))).mappings()
        facts |= {row["id"]: row for row in found}
    unknown = [each.decision_id for each in given if each.decision_id not in facts]
    if unknown:
        listed: list[JSON] = list(dict.fromkeys(unknown))
        raise NotFound(f"there is no decision {unknown[0]}", extra={"decisions": listed})
    if given:
        rows = [_row(each, facts[each.decision_id]) for each in given]
        connection.execute(sql_insert(labels), rows)


def _row(label: NewLabel, decision: RowMapping) -> dict[str, Any]:
    inclusion = label.inclusion
    if inclusion is None and label.source in (LabelSource.REVIEW, LabelSource.AUDIT):
        inclusion = decision["inclusion"]
    floor = None if inclusion is None else min(decision["inclusion_floor"] or inclusion, inclusion)
    return {
        "decision_id": label.decision_id,
        "task_id": label.task_id,
        "at": micros(label.at),
        "source": label.source.value,
        "labeller": text(label.labeller),
        "acceptable": label.acceptable,
        "weight": label.weight,
        "inclusion": inclusion,
        "inclusion_floor": floor,
        "blind": label.blind,
        "comment": label.comment and text(label.comment),
        "policy": decision["policy"].partition("@")[0],
        "intended": decision["intended"] or decision["action"],
        "risk": decision["risk"],
        "confidence": decision["confidence"],
    }


def after(connection: Connection, policy: str, seq: int, limit: int) -> list[Label]:
    """The labels of a policy after one, oldest first."""
    query = select(labels).where(labels.c.policy == policy, labels.c.seq > seq)
    rows = connection.execute(query.order_by(labels.c.seq).limit(limit)).mappings()
    return [label_record(row) for row in rows]


def said(connection: Connection, decision_ids: Sequence[str]) -> dict[str, Said]:
    """What people and judges said of these decisions."""
    given = by_decision(_of(connection, decision_ids))
    passed: dict[str, dict[str, bool]] = {}
    for some in _chunks(decision_ids):
        passed |= verdicts(connection, some)
    return {each: Said(tuple(given.get(each, ())), passed[each]) for each in passed}


def since(connection: Connection, at: datetime) -> list[Label]:
    """The labels given since then, oldest first."""
    query = select(labels).where(labels.c.at >= micros(at)).order_by(labels.c.at, labels.c.seq)
    return [label_record(row) for row in connection.execute(query).mappings()]


def counts(connection: Connection) -> dict[str, tuple[int, int]]:
    """By policy, how many decisions were judged, and how many of them somebody found not acceptable."""
    decision = labels.c.decision_id
    wrong = case((labels.c.acceptable.is_(False), decision))
    query = select(labels.c.policy, func.count(decision.distinct()), func.count(wrong.distinct()))
    rows = connection.execute(query.group_by(labels.c.policy))
    return {policy: (judged, bad) for policy, judged, bad in rows}


def labelled(connection: Connection, after: str, limit: int) -> list[LabelledDecision]:
    """Decisions with their labels reduced, by decision id, those after the given one."""
    query = select(labels.c.decision_id).where(labels.c.decision_id > after).distinct()
    ids = list(connection.scalars(query.order_by(labels.c.decision_id).limit(limit)))
    given = by_decision(_of(connection, ids))
    records: dict[str, DecisionRecord] = {}
    for some in _chunks(ids):
        records |= with_ids(connection, some)
    return [_labelled(records[each], given[each]) for each in ids]


def inclusion(connection: Connection, decision_id: str) -> float | None:
    """The probability with which a decision came to be judged, as far as its labels know it."""
    given = _of(connection, [decision_id])
    return reduced(given).label.inclusion if given else None


def _labelled(decision: DecisionRecord, given: Sequence[Label]) -> LabelledDecision:
    one, settled = reduced(given)
    return LabelledDecision(
        decision=decision,
        acceptable=one.acceptable,
        inclusion=one.inclusion,
        source=one.source,
        labeller=one.labeller,
        at=one.at,
        weight=one.weight,
        blind=one.blind,
        labels=len(latest(given)),
        settled=settled,
    )


def _of(connection: Connection, decision_ids: Iterable[str]) -> list[Label]:
    """All labels of these decisions, oldest first."""
    found: list[Label] = []
    for ids in _chunks(decision_ids):
        query = select(labels).where(labels.c.decision_id.in_(ids)).order_by(labels.c.seq)
        found += [label_record(row) for row in connection.execute(query).mappings()]
    return found


def _chunks(values: Iterable[str]) -> Iterator[list[str]]:
    listed = list(values)
    for start in range(0, len(listed), _IDS):
        yield listed[start : start + _IDS]
