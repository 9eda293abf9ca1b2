"""Review tasks: each operation one function of a connection inside one transaction.

Every change of state is one compare-and-set `UPDATE`, so that of any number of callers exactly one succeeds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from msgspec.structs import replace
from sqlalchemy import ColumnElement, Connection, Select, case, func, insert, or_, select, update

from gateway.errors import Conflict, NotFound
from gateway.records import (
    Asked,
    LabelSource,
    NewLabel,
    NewTask,
    Resolution,
    TaskKind,
    TaskRecord,
    TaskState,
    Verdict,
)
from gateway.store import labels
from gateway.store.decisions import log, with_ids
from gateway.store.rows import audit_row, micros, pack, task_record, task_row, text
from gateway.store.schema import decisions, reviews, tasks
from gateway.store.schema import labels as given_labels
from validators import JSON

_UNRESOLVED = tasks.c.resolved_at.is_(None)
_REVIEW = [column for column in reviews.c if column.name not in {"task_id", "at"}]
_TASKS = select(tasks, *_REVIEW).outerjoin_from(tasks, reviews)
_MOST_URGENT = (tasks.c.queue_rank, tasks.c.due_at, tasks.c.created_at, tasks.c.id)
_UNCLAIMED = {"claimed_by": None, "claimed_until": None, "claimed_at": None}
_SOURCE = {
    TaskKind.AUDIT: LabelSource.AUDIT,
    TaskKind.SECOND_OPINION: LabelSource.SECOND_OPINION,
}


def by_id(connection: Connection, task_id: str) -> TaskRecord | None:
    """The task with that id."""
    return _first(connection, _TASKS.where(tasks.c.id == task_id))


def of_decision(connection: Connection, decision_id: str) -> TaskRecord | None:
    """The task that was made with that decision."""
    return _first(connection, _TASKS.where(tasks.c.decision_id == decision_id, tasks.c.round == 0))


def awaits_opinion(connection: Connection, decision_id: str) -> bool:
    """Whether a second opinion on that decision has been asked for and not yet been given."""
    query = select(tasks.c.id).where(
        tasks.c.decision_id == decision_id, tasks.c.round > 0, _UNRESOLVED
    )
    return connection.execute(query.limit(1)).first() is not None


def of_decisions(connection: Connection, decision_ids: Sequence[str]) -> dict[str, TaskRecord]:
    """The tasks that were made with these decisions, by decision."""
    query = _TASKS.where(tasks.c.decision_id.in_(decision_ids), tasks.c.round == 0)
    rows = connection.execute(query).mappings()
    return {row["decision_id"]: task_record(row) for row in rows}


def _first(connection: Connection, query: Select[Any]) -> TaskRecord | None:
    row = connection.execute(query).mappings().first()
    return None if row is None else task_record(row)


def _existing(connection: Connection, task_id: str) -> TaskRecord:
    found = by_id(connection, task_id)
    if found is None:
        raise NotFound(f"there is no task {task_id!r}")
    return found


def queue(
    connection: Connection, now: datetime, limit: int, reviewer: str | None = None
) -> list[TaskRecord]:
    """Unresolved tasks, most urgent first; lapsed claims show as open. Of a reviewer's, those that the reviewer may take."""
    query = _TASKS.where(_UNRESOLVED).order_by(*_MOST_URGENT).limit(limit)
    if reviewer is not None:
        query = query.where(_unprejudiced(text(reviewer)))
    found = [task_record(row) for row in connection.execute(query).mappings()]
    return [_reopened(task) if _lapsed(task, now) else task for task in found]


def _lapsed(task: TaskRecord, now: datetime) -> bool:
    return task.claimed_until is not None and task.claimed_until <= now


def _reopened(task: TaskRecord) -> TaskRecord:
    return replace(task, state=TaskState.OPEN, claimed_by=None, claimed_until=None)


def settled(connection: Connection, task_ids: Sequence[str]) -> dict[str, TaskState]:
    """The states of those of these tasks that are terminal."""
    query = select(tasks.c.id, tasks.c.state).where(tasks.c.id.in_(task_ids), ~_UNRESOLVED)
    return {task_id: TaskState(state) for task_id, state in connection.execute(query)}


def claim(
    connection: Connection, task_id: str, reviewer: str, *, now: datetime, lease_s: float
) -> TaskRecord:
    """Lease the task to the reviewer, or renew their lease."""
    reviewer = text(reviewer)
    renewed = (tasks.c.claimed_by == reviewer) & (tasks.c.claimed_until > micros(now))
    change = _change(task_id, _free_for(reviewer, now)).values(
        state=TaskState.CLAIMED.value,
        claimed_by=reviewer,
        claimed_at=case((renewed, tasks.c.claimed_at), else_=micros(now)),
        claimed_until=micros(now + timedelta(seconds=lease_s)),
    )
    claimed = connection.execute(change).rowcount
    task = _existing(connection, task_id)
    if not claimed:
        raise _conflict(connection, task, now, reviewer, "the task has changed; load it again")
    return task


def release(connection: Connection, task_id: str, reviewer: str, now: datetime) -> TaskRecord:
    """Give back the reviewer's live claim."""
    reviewer = text(reviewer)
    held = (tasks.c.claimed_by == reviewer) & (tasks.c.claimed_until > micros(now))
    change = _change(task_id, held).values(state=TaskState.OPEN.value, **_UNCLAIMED)
    released = connection.execute(change).rowcount
    task = _existing(connection, task_id)
    if not released:
        raise _conflict(connection, task, now, reviewer, "you do not hold this task")
    return task


def resolve(connection: Connection, resolution: Resolution) -> TaskRecord:
    """Resolve the task, with review, label, audit entry and outbox row."""
    reviewer, at_us = text(resolution.reviewer), micros(resolution.at)
    change = _change(
        resolution.task_id,
        (tasks.c.version == resolution.version) & _free_for(reviewer, resolution.at),
    ).values(
        state=TaskState.RESOLVED.value,
        resolved_at=at_us,
        worked_us=_worked_us(reviewer, at_us),
        **_UNCLAIMED,
    )
    resolved = connection.execute(
        change.returning(tasks.c.decision_id, tasks.c.kind, tasks.c.inclusion)
    ).first()
    if resolved is None:
        task = _existing(connection, resolution.task_id)
        changed = f"the task is at version {task.version}, not {resolution.version}; load it again"
        raise _conflict(connection, task, resolution.at, reviewer, changed)
    connection.execute(
        insert(reviews).values(
            task_id=resolution.task_id,
            at=at_us,
            verdict=resolution.verdict.value,
            reviewer=reviewer,
            reason=resolution.reason and text(resolution.reason),
            comment=resolution.comment and text(resolution.comment),
            correction=pack(resolution.correction),
        )
    )
    source = _SOURCE.get(TaskKind(resolved.kind), LabelSource.REVIEW)
    label = NewLabel(
        decision_id=resolved.decision_id,
        at=resolution.at,
        source=source,
        labeller=reviewer,
        acceptable=resolution.verdict is Verdict.APPROVE,
        inclusion=resolved.inclusion,
        blind=resolution.blind,
        task_id=resolution.task_id,
    )
    labels.insert(connection, [label])
    _log_resolution(connection, resolution, resolved.decision_id)
    return _existing(connection, resolution.task_id)


def _log_resolution(connection: Connection, resolution: Resolution, decision_id: str) -> None:
    at_us, correction = micros(resolution.at), resolution.correction
    facts: dict[str, JSON] = {
        "decision": decision_id,
        "verdict": resolution.verdict.value,
        "reviewer": text(resolution.reviewer),
        "correction_sha256": None if correction is None else hashlib.sha256(correction).hexdigest(),
    }
    audit = audit_row("task.resolved", resolution.task_id, at_us, facts)
    log(connection, [audit], [(at_us, "task.settled", resolution.task_id)])


def due(connection: Connection, now: datetime, limit: int) -> list[str]:
    """Ids of unresolved tasks past their deadline, longest overdue first, locked for this transaction."""
    query = select(tasks.c.id).where(_UNRESOLVED, tasks.c.due_at <= micros(now))
    query = query.order_by(tasks.c.due_at).limit(limit).with_for_update(skip_locked=True)
    return list(connection.scalars(query))


def expire(connection: Connection, now: datetime, limit: int) -> list[TaskRecord]:
    """Expire due tasks, with audit entries and outbox rows, and no decider."""
    ids, at_us = due(connection, now, limit), micros(now)
    if not ids:
        return []
    connection.execute(
        update(tasks)
        .where(tasks.c.id.in_(ids))
        .values(
            state=TaskState.EXPIRED.value,
            version=tasks.c.version + 1,
            resolved_at=at_us,
            **_UNCLAIMED,
        )
    )
    rows = connection.execute(_TASKS.where(tasks.c.id.in_(ids)).order_by(tasks.c.due_at))
    expired = [task_record(row) for row in rows.mappings()]
    log(
        connection,
        [
            audit_row("task.expired", task.id, at_us, {"decision": task.decision_id})
            for task in expired
        ],
        [(at_us, "task.settled", task.id) for task in expired],
    )
    return expired


def _change(task_id: str, condition: ColumnElement[bool]) -> Any:
    """An UPDATE of an unresolved task, if the condition holds, to its next version."""
    change = update(tasks).where(tasks.c.id == task_id, _UNRESOLVED, condition)
    return change.values(version=tasks.c.version + 1)


def _worked_us(reviewer: str, at_us: int) -> ColumnElement[int | None]:
    """How long the reviewer has had the task, until now or until the claim lapsed; NULL if they have not claimed it."""
    until_us = case((tasks.c.claimed_until < at_us, tasks.c.claimed_until), else_=at_us)
    return case((tasks.c.claimed_by == reviewer, until_us - tasks.c.claimed_at))


def _free_for(reviewer: str, now: datetime) -> ColumnElement[bool]:
    unclaimed = or_(
        tasks.c.claimed_by.is_(None),
        tasks.c.claimed_by == reviewer,
        tasks.c.claimed_until <= micros(now),
    )
    return unclaimed & _unprejudiced(reviewer)


def _unprejudiced(reviewer: str) -> ColumnElement[bool]:
    """Whether a task is not a second opinion on what the reviewer has judged before."""
    # A count, because PostgreSQL would read all labels of the reviewer for an EXISTS.
    judged = (
        select(func.count())
        .where(
            given_labels.c.decision_id == tasks.c.decision_id, given_labels.c.labeller == reviewer
        )
        .scalar_subquery()
    )
    return (tasks.c.round == 0) | (judged == 0)


def ask_again(connection: Connection, new_ids: Mapping[str, str], now: datetime) -> Asked:
    """Open tasks for second opinions, with those ids by decision, where none is open and the content is there."""
    opened = waiting = 0
    # In one order, and each decision locked: two who ask at once do not ask twice.
    for decision_id in sorted(new_ids):
        lock = select(decisions.c.id).where(decisions.c.id == decision_id).with_for_update()
        connection.execute(lock)
        query = _TASKS.where(tasks.c.decision_id == decision_id)
        before = [task_record(row) for row in connection.execute(query).mappings()]
        if any(t.kind is TaskKind.SECOND_OPINION and t.resolved_at is None for t in before):
            waiting += 1
            continue
        decision = with_ids(connection, [decision_id]).get(decision_id)
        inclusion = labels.inclusion(connection, decision_id)
        if decision is None or decision.response is None or inclusion is None:
            continue
        asked = sum(t.kind is TaskKind.SECOND_OPINION for t in before)
        new = NewTask(new_ids[decision_id], TaskKind.SECOND_OPINION, inclusion, due_at=None)
        row = task_row(new, decision, micros(now), asked + 1)
        connection.execute(insert(tasks).values(row))
        entry = audit_row("opinion.asked", new.id, micros(now), {"decision": decision_id})
        log(connection, [entry], [(micros(now), "task.opened", new.id)])
        opened += 1
    return Asked(opened, waiting)


def _conflict(
    connection: Connection, task: TaskRecord, now: datetime, reviewer: str, otherwise: str
) -> Conflict:
    """Why the reviewer's change was refused, with the task as it is."""
    may_take = select(tasks.c.id).where(tasks.c.id == task.id, _unprejudiced(reviewer))
    if task.state is TaskState.RESOLVED:
        message = f"{task.reviewer} was first and decided: {task.verdict}"
    elif task.state is TaskState.EXPIRED:
        message = "the task expired before anybody decided"
    elif connection.scalar(may_take) is None:
        message = "you have judged this response before; a second opinion is somebody else's"
    elif task.claimed_by not in {None, reviewer} and not _lapsed(task, now):
        message = f"{task.claimed_by} holds this task until {_iso(task.claimed_until)}"
    else:
        message = otherwise
    result: dict[str, JSON] = {
        "id": task.id,
        "state": task.state,
        "verdict": task.verdict,
        "reviewer": task.reviewer,
        "version": task.version,
        "resolved_at": _iso(task.resolved_at),
        "claimed_by": task.claimed_by,
        "claimed_until": _iso(task.claimed_until),
    }
    return Conflict(message, extra={"task": result})


def _iso(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat()
