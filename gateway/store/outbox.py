"""What others are told: from the outbox to deliveries, and each delivery until it got there or is given up."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from sqlalchemy import Connection, Select, delete, exists, func, insert, select, update

from gateway.records import Delivery, TaskKind, Verdict
from gateway.store.rows import micros, moment
from gateway.store.schema import deliveries, marks, outbox, reviews, tasks

_READY = marks.c.name == "labels.ready"


def is_waiting(connection: Connection, before: datetime) -> bool:
    """Whether there is anything for `dispatch` to do."""
    overdue = exists().where(deliveries.c.at < micros(before))
    return bool(connection.scalar(select(exists(select(outbox.c.seq)) | overdue)))


def dispatch(
    connection: Connection, takers: Mapping[str, Sequence[str]], before: datetime, limit: int
) -> int:
    """Turn rows of the outbox into a delivery to each taker of their kind; drop what is older than `before`."""
    query = select(outbox).order_by(outbox.c.seq).limit(limit).with_for_update(skip_locked=True)
    events = connection.execute(query).all()
    made = [
        {
            "id": f"msg_{os.urandom(16).hex()}",
            "webhook": webhook,
            "kind": event.kind,
            "subject": event.subject,
            "at": event.at,
            "attempts": 0,
            "next_at": event.at,
        }
        for event in events
        for webhook in takers.get(event.kind, ())
        if event.at >= micros(before)
    ]
    if made:
        connection.execute(insert(deliveries), made)
    connection.execute(delete(outbox).where(outbox.c.seq.in_([event.seq for event in events])))
    connection.execute(delete(deliveries).where(deliveries.c.at < micros(before)))
    return len(events)


def _due(webhook: str, now: datetime, limit: int) -> Select[tuple[str]]:
    due = select(deliveries.c.id).where(
        deliveries.c.webhook == webhook, deliveries.c.next_at <= micros(now)
    )
    return due.order_by(deliveries.c.next_at, deliveries.c.id).limit(limit)


def is_due(connection: Connection, webhook: str, now: datetime) -> bool:
    """Whether there is something to deliver to a webhook."""
    return connection.scalar(_due(webhook, now, 1)) is not None


def take(
    connection: Connection, webhook: str, now: datetime, lease_s: float, limit: int
) -> list[Delivery]:
    """Count an attempt at each of the due deliveries, longest due first; nobody else takes them within the lease."""
    ids = connection.scalars(_due(webhook, now, limit).with_for_update(skip_locked=True)).all()
    taken = (
        update(deliveries)
        .where(deliveries.c.id.in_(ids))
        .values(
            attempts=deliveries.c.attempts + 1, next_at=micros(now + timedelta(seconds=lease_s))
        )
        .returning(deliveries)
    )
    found = [
        Delivery(row.id, row.kind, row.subject, moment(row.at), row.attempts)
        for row in connection.execute(taken)
    ]
    return sorted(found, key=lambda each: ids.index(each.id))


def put_off(connection: Connection, delivery_id: str, until: datetime) -> None:
    """Have a delivery tried again from then on."""
    change = update(deliveries).where(deliveries.c.id == delivery_id)
    connection.execute(change.values(next_at=micros(until)))


def finish(connection: Connection, delivery_id: str) -> None:
    """Forget a delivery: it got there, or is given up."""
    connection.execute(delete(deliveries).where(deliveries.c.id == delivery_id))


def samples(connection: Connection) -> int:
    """How many responses people corrected or rejected, or approved though the policy was not sure of them."""
    learnt = (reviews.c.verdict != Verdict.APPROVE.value) | (tasks.c.kind != TaskKind.AUDIT.value)
    query = select(func.count()).select_from(reviews).join(tasks).where(learnt)
    return connection.scalar(query) or 0


def is_ready(connection: Connection, every: int) -> bool:
    """Whether that many samples have come since the mark."""
    mark = connection.scalar(select(marks.c.value).where(_READY)) or 0
    return samples(connection) - mark >= every


def announce(connection: Connection, every: int, now: datetime) -> bool:
    """Move the mark on and put `labels.ready` into the outbox if that many samples have come since; True if so."""
    count = samples(connection)
    change = update(marks).where(_READY, marks.c.value <= count - every).values(value=count)
    if not connection.execute(change).rowcount:
        return False
    row = {"at": micros(now), "kind": "labels.ready", "subject": str(count)}
    connection.execute(insert(outbox).values(row))
    return True
