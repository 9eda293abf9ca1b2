"""What judges spent, and what each layer of the cascade did: each operation one function of a connection."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import date, datetime
from math import ceil
from typing import Any

from sqlalchemy import ColumnElement, Connection, func, select, text

from gateway.records import Economics, Layer, Spend, Tally, TaskState
from gateway.store.rows import micros, moment
from gateway.store.schema import decisions, spending, tasks
from policies.model import Action

_MICROSECONDS_PER_MINUTE = 60e6

#: Both engines read this; what SQLAlchemy has for it is apart for each, and loads PostgreSQL's dialect for everybody, 2 MB.
_ADD = text(
    "INSERT INTO spending (day, policy, stage, usd, abandoned_usd) "
    "VALUES (:day, :policy, :stage, :usd, :abandoned) "
    "ON CONFLICT (day, policy, stage) DO UPDATE SET usd = spending.usd + excluded.usd, "
    "abandoned_usd = spending.abandoned_usd + excluded.abandoned_usd"
)


def spend(connection: Connection, spends: Iterable[Spend], *, abandoned: bool) -> None:
    """Add to the accounts, always in the same order, so that two transactions never wait for each other."""
    sums: dict[tuple[str, str, str], float] = defaultdict(float)
    for each in spends:
        sums[each.day.isoformat(), each.policy, each.stage] += each.usd
    rows = [
        {"day": day, "policy": policy, "stage": stage, "usd": usd, "abandoned": abandoned * usd}
        for (day, policy, stage), usd in sorted(sums.items())
    ]
    if rows:
        connection.execute(_ADD, rows)


def spent(connection: Connection, day: date) -> dict[tuple[str, str], float]:
    """The accounts of a day by policy and stage."""
    query = select(spending.c.policy, spending.c.stage, spending.c.usd)
    rows = connection.execute(query.where(spending.c.day == day.isoformat()))
    return {(policy, stage): usd for policy, stage, usd in rows}


def since(connection: Connection, at: datetime) -> Economics:
    """What each layer did since then; reads indexes only."""
    at_us = micros(at)
    taken = decisions.c.created_at >= at_us
    asked = taken & decisions.c.judge_ms.is_not(None)
    resolved = (tasks.c.resolved_at >= at_us) & (tasks.c.state == TaskState.RESOLVED.value)
    total = _one(connection, func.count(), taken)
    worked_us = _one(connection, func.sum(tasks.c.worked_us), resolved) or 0
    abandoned = select(func.sum(spending.c.abandoned_usd)).where(
        spending.c.day >= moment(at_us).date().isoformat()
    )
    layers = (
        _layer(connection, "rules", decisions.c.rules_ms, taken),
        _layer(connection, "judge", decisions.c.judge_ms, asked, usd=decisions.c.judge_usd),
        _layer(
            connection,
            "person",
            (tasks.c.resolved_at - tasks.c.created_at) / 1000.0,
            resolved,
            unknown=tasks.c.worked_us.is_(None),
        ),
    )
    return Economics(
        decisions=total,
        layers=layers,
        person_minutes=float(worked_us) / _MICROSECONDS_PER_MINUTE,
        abandoned_usd=connection.scalar(abandoned) or 0.0,
    )


def tallies(connection: Connection, at: datetime) -> list[Tally]:
    """How many answered decisions of each policy came to each action since then; reads an index only."""
    columns = decisions.c
    query = select(columns.policy, columns.intended, func.count()).where(
        columns.created_at >= micros(at), columns.intended.is_not(None)
    )
    sums: dict[tuple[str, Action], int] = defaultdict(int)
    for label, intended, count in connection.execute(
        query.group_by(columns.policy, columns.intended)
    ):
        sums[label.partition("@")[0], Action(intended)] += count
    return [Tally(policy, action, count) for (policy, action), count in sorted(sums.items())]


def _layer(
    connection: Connection,
    name: str,
    latency_ms: ColumnElement[Any],
    where: ColumnElement[bool],
    *,
    usd: ColumnElement[Any] | None = None,
    unknown: ColumnElement[bool] | None = None,
) -> Layer:
    if usd is not None:
        unknown = usd.is_(None)
    requests = _one(connection, func.count(), where)
    return Layer(
        name=name,
        requests=requests,
        usd=0.0 if usd is None else _one(connection, func.sum(usd), where) or 0.0,
        unknown=0 if unknown is None else _one(connection, func.count(), where & unknown),
        latency_p50_ms=_rank(connection, latency_ms, where, 0.5, requests),
        latency_p95_ms=_rank(connection, latency_ms, where, 0.95, requests),
    )


def _one(connection: Connection, value: ColumnElement[Any], where: ColumnElement[bool]) -> Any:
    return connection.scalar(select(value).where(where))


def _rank(
    connection: Connection,
    value: ColumnElement[Any],
    where: ColumnElement[bool],
    share: float,
    count: int,
) -> float | None:
    """The value below or at which that share of all lies (nearest rank); the same on every engine."""
    if not count:
        return None
    place = max(ceil(share * count) - 1, 0)
    found = select(value).where(where).order_by(value).offset(place).limit(1)
    return float(connection.scalar(found) or 0.0)
