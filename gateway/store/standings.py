"""Where policies stand, and alarms: each operation one function of a connection inside one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Connection, insert, select, update

from gateway.records import Alarm, Standing
from gateway.store.decisions import log
from gateway.store.rows import (
    alarm_record,
    audit_row,
    micros,
    moment,
    pack,
    pack_json,
    standing_record,
    text,
)
from gateway.store.schema import alarms, standings
from validators import JSON

_BRIEF = [column for column in standings.c if column.name != "memory"]


def every(connection: Connection) -> list[Standing]:
    """Where every policy stands, without what the monitors remember."""
    return [
        Standing(
            row.policy, row.version, moment(row.at), row.audit_level, row.suspended, row.artefact
        )
        for row in connection.execute(select(*_BRIEF))
    ]


def of_policy(connection: Connection, policy: str) -> Standing | None:
    """Where a policy stands."""
    query = select(standings).where(standings.c.policy == policy)
    row = connection.execute(query).mappings().first()
    return None if row is None else standing_record(row)


def put(
    connection: Connection, standing: Standing, raised: Sequence[Alarm], *, clear: bool
) -> bool:
    """Store a standing if it is the version after the one stored, and its alarms with it; False if it is not."""
    values = {
        "version": standing.version,
        "at": micros(standing.at),
        "audit_level": standing.audit_level,
        "suspended": standing.suspended,
        "artefact": standing.artefact,
        "memory": pack(standing.memory),
    }
    if standing.version == 1:
        there = select(standings.c.version).where(standings.c.policy == standing.policy)
        if connection.scalar(there) is not None:
            return False
        connection.execute(insert(standings).values(policy=standing.policy, **values))
    else:
        is_before = standings.c.version == standing.version - 1
        change = update(standings).where(standings.c.policy == standing.policy, is_before)
        if not connection.execute(change.values(**values)).rowcount:
            return False
    if clear:
        _clear(connection, standing.policy, standing.at)
    for alarm in raised:
        _raise(connection, alarm)
    return True


def _raise(connection: Connection, alarm: Alarm) -> None:
    at_us, message = micros(alarm.at), text(alarm.message)
    connection.execute(
        insert(alarms).values(
            id=alarm.id,
            at=at_us,
            policy=alarm.policy,
            kind=alarm.kind,
            message=message,
            evidence=pack_json(alarm.evidence),
        )
    )
    facts: dict[str, JSON] = {"policy": alarm.policy, "kind": alarm.kind, "message": message}
    audit = audit_row("alarm.raised", alarm.id, at_us, facts)
    log(connection, [audit], [(at_us, "alarm.raised", alarm.id)])


def _clear(connection: Connection, policy: str, at: datetime) -> None:
    still_open = alarms.c.cleared_at.is_(None) & (alarms.c.policy == policy)
    connection.execute(update(alarms).where(still_open).values(cleared_at=micros(at)))
    log(connection, [audit_row("alarms.cleared", policy, micros(at), {})], [])


def alarm(connection: Connection, alarm_id: str) -> Alarm | None:
    """The alarm with that id."""
    row = connection.execute(select(alarms).where(alarms.c.id == alarm_id)).mappings().first()
    return None if row is None else alarm_record(row)


def open_alarms(connection: Connection) -> list[Alarm]:
    """The alarms that are not cleared, by policy and kind."""
    query = select(alarms).where(alarms.c.cleared_at.is_(None))
    rows = connection.execute(query.order_by(alarms.c.policy, alarms.c.kind)).mappings()
    return [alarm_record(row) for row in rows]
