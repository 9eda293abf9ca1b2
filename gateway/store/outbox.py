"""What others are told: from the outbox to deliveries, and each delivery until it got there or is given up."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy import Connection, Row, Select, delete, exists, insert, select, update

from gateway.records import Delivery, LabelSource
from gateway.store.rows import micros, moment
from gateway.store.schema import deliveries, labels, marks, outbox

#: Marks: how many samples were told of; up to which label they are counted; how many of those nobody was told of yet.
_TOLD, _COUNTED_TO, _COUNTED = "labels.ready", "labels.counted_to", "labels.counted"

_COUNTED_AT_ONCE = 5000


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


class _Count(NamedTuple):
    """How far samples have been counted, and what has come since.

    `told_to` is the label up to which they were counted, `before` how many of those nobody was told of, `rows` the next
    labels, each with whether it is a sample.
    """

    told_to: int
    before: int
    rows: Sequence[Row[tuple[int, bool]]]

    def ready_at(self, every: int) -> int | None:
        """The label with which there are so many samples nobody was told of; None if there are not."""
        missing = every - self.before
        found = [row.seq for row in self.rows if row.is_sample][:missing]
        return found[-1] if len(found) == missing else None

    @property
    def is_full(self) -> bool:
        """Whether there are more labels than were read."""
        return len(self.rows) == _COUNTED_AT_ONCE


def _count(connection: Connection) -> _Count:
    values = {row.name: row.value for row in connection.execute(select(marks))}
    told_to, before = values[_COUNTED_TO], values[_COUNTED]
    by_reviewer = labels.c.task_id.is_not(None) & (labels.c.source == LabelSource.REVIEW.value)
    error = (labels.c.source == LabelSource.AUDIT.value) & labels.c.acceptable.is_(False)
    query = select(labels.c.seq, (by_reviewer | error).label("is_sample"))
    query = query.where(labels.c.seq > told_to).order_by(labels.c.seq).limit(_COUNTED_AT_ONCE)
    return _Count(told_to, before, connection.execute(query).all())


def is_ready(connection: Connection, every: int) -> bool:
    """Whether there is anything for `announce` to do; reads no label twice but for the last few."""
    found = _count(connection)
    return found.is_full or found.ready_at(every) is not None


def announce(connection: Connection, every: int, now: datetime) -> bool:
    """Put `labels.ready` into the outbox if so many samples have come since it last was; True if so.

    Samples are what people corrected or rejected, or approved though the policy was not sure of it; not second opinions.
    """
    found = _count(connection)
    at = found.ready_at(every)
    if at is None and not found.is_full:
        return False
    counted_to = found.rows[-1].seq if at is None else at
    counted = found.before + sum(row.is_sample for row in found.rows) if at is None else 0
    change = update(marks).where(marks.c.name == _COUNTED_TO, marks.c.value == found.told_to)
    if not connection.execute(change.values(value=counted_to)).rowcount:
        return False
    _mark(connection, _COUNTED, counted)
    if at is None:
        return False
    told = update(marks).where(marks.c.name == _TOLD).values(value=marks.c.value + every)
    count = connection.scalar(told.returning(marks.c.value))
    row = {"at": micros(now), "kind": "labels.ready", "subject": str(count)}
    connection.execute(insert(outbox).values(row))
    return True


def _mark(connection: Connection, name: str, value: int) -> None:
    connection.execute(update(marks).where(marks.c.name == name).values(value=value))
