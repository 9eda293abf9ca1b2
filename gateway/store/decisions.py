"""Decisions, their erasure, and API keys: each operation one function of a connection inside one transaction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection, Dialect, Select, Table, exists, insert, or_, select, update

from gateway.errors import Conflict, NotFound
from gateway.records import ApiKey, DecisionRecord, Observed
from gateway.store import economics
from gateway.store.engines import driver_of
from gateway.store.rows import (
    Entry,
    Row,
    api_key,
    audit_row,
    decision_record,
    micros,
    moment,
    text,
    unpack_json,
)
from gateway.store.schema import (
    api_keys,
    audit_entries,
    decisions,
    labels,
    outbox,
    reviews,
    tasks,
)
from policies.signals import JUDGE
from validators import Outcome

_KEPT = select(*(column for column in decisions.c if not column.name.startswith("redacted_")))


@lru_cache(maxsize=32)
def _insert_sql(table: Table, dialect: Dialect) -> str:
    columns = [column.name for column in table.c if column.name != "seq"]
    return str(insert(table).inline().compile(dialect=dialect, column_keys=columns))


def _insert(connection: Connection, table: Table, rows: list[Row]) -> None:
    if not rows:
        return
    sql = _insert_sql(table, connection.dialect)
    if connection.dialect.name == "sqlite":
        driver_of(connection).executemany(sql, rows)
    else:
        connection.exec_driver_sql(sql, rows)


def log(connection: Connection, audit: list[Row], outgoing: list[Row]) -> None:
    """Append to the audit log and to the outbox."""
    _insert(connection, audit_entries, audit)
    _insert(connection, outbox, outgoing)


def record(connection: Connection, entries: Sequence[Entry]) -> None:
    """Insert decisions with audit entries, tasks and outbox rows."""
    _insert(connection, decisions, [entry.decision for entry in entries])
    _insert(connection, tasks, [entry.task for entry in entries if entry.task])
    outgoing = [entry.outbox for entry in entries if entry.outbox]
    log(connection, [entry.audit for entry in entries], outgoing)
    if spends := [spend for entry in entries for spend in entry.spends]:
        economics.spend(connection, spends, abandoned=False)


def by_id(connection: Connection, decision_id: str) -> DecisionRecord | None:
    """The decision with that id."""
    return _first(connection, _KEPT.where(decisions.c.id == decision_id))


def by_upstream_id(connection: Connection, upstream_id: str) -> DecisionRecord | None:
    """The newest decision on the response that the provider gave that id."""
    found = _KEPT.where(decisions.c.upstream_id == text(upstream_id))
    return _first(connection, found.order_by(decisions.c.created_at.desc()).limit(1))


def by_fingerprint(
    connection: Connection, fingerprint: str, since: datetime
) -> DecisionRecord | None:
    """The newest decision on the same call made at `since` or later."""
    found = _KEPT.where(
        decisions.c.fingerprint == fingerprint, decisions.c.created_at >= micros(since)
    )
    return _first(connection, found.order_by(decisions.c.created_at.desc()).limit(1))


def unlabelled(
    connection: Connection, since: datetime, after: str, limit: int
) -> list[DecisionRecord]:
    """Decisions on whole answers that nobody has labelled, by id."""
    said = exists().where(labels.c.decision_id == decisions.c.id)
    query = _KEPT.where(
        decisions.c.created_at >= micros(since),
        decisions.c.id > after,
        decisions.c.status.between(200, 299),
        ~said,
    )
    rows = connection.execute(query.order_by(decisions.c.id).limit(limit)).mappings()
    return [decision_record(row) for row in rows]


def _first(connection: Connection, query: Select[Any]) -> DecisionRecord | None:
    row = connection.execute(query).mappings().first()
    return None if row is None else decision_record(row)


def with_ids(connection: Connection, decision_ids: Sequence[str]) -> dict[str, DecisionRecord]:
    """Those of these decisions that there are, by id."""
    rows = connection.execute(_KEPT.where(decisions.c.id.in_(decision_ids))).mappings()
    return {row["id"]: decision_record(row) for row in rows}


def observed(
    connection: Connection, label: str, after: tuple[datetime, str], until: datetime, limit: int
) -> list[Observed]:
    """The numbers of a policy's answered decisions before a time, oldest first, those after a time and id."""
    columns, (at, id_) = decisions.c, after
    query = select(columns.id, columns.created_at, columns.detail).where(
        columns.policy == label,
        columns.created_at >= micros(at),
        or_(columns.created_at > micros(at), columns.id > id_),
        columns.created_at < micros(until),
        columns.status.between(200, 299),
    )
    rows = connection.execute(query.order_by(columns.created_at, columns.id).limit(limit))
    return [
        Observed(row.id, moment(row.created_at), _numbers(unpack_json(row.detail))) for row in rows
    ]


def _numbers(detail: Mapping[str, Any]) -> dict[str, float]:
    decision, evidence = detail.get("decision") or {}, detail.get("evidence") or {}
    values = {name: decision.get(name) for name in ("confidence", "score")}
    values |= evidence.get("signals") or {}
    values |= {JUDGE + name: each["score"] for name, each in _judged(evidence)}
    return {name: float(each) for name, each in values.items() if isinstance(each, int | float)}


def _judged(evidence: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The results of judges that came to a verdict, by check id."""
    results: Mapping[str, Any] = evidence.get("results") or {}
    for name, each in results.items():
        if each.get("opinion") and each.get("outcome") != Outcome.ERROR:
            yield name, each


def verdicts(connection: Connection, decision_ids: Sequence[str]) -> dict[str, dict[str, bool]]:
    """By decision, which of its judges passed it (true) and which did not, by check id."""
    query = select(decisions.c.id, decisions.c.detail).where(decisions.c.id.in_(decision_ids))
    return {
        row.id: {
            name: each["outcome"] == Outcome.PASS
            for name, each in _judged(unpack_json(row.detail).get("evidence") or {})
        }
        for row in connection.execute(query)
    }


def recent(connection: Connection, policy: str, limit: int) -> list[DecisionRecord]:
    """The newest decisions of a policy (its name), newest first."""
    of_policy = _KEPT.where(decisions.c.policy.startswith(f"{text(policy)}@", autoescape=True))
    query = of_policy.order_by(decisions.c.created_at.desc(), decisions.c.id.desc()).limit(limit)
    return [decision_record(row) for row in connection.execute(query).mappings()]


def to_erase(connection: Connection, now: datetime, limit: int) -> list[str]:
    """Ids of decisions whose contents are due for erasure, longest due first, locked for this transaction."""
    due = select(decisions.c.id).where(decisions.c.erase_at <= micros(now))
    due = due.order_by(decisions.c.erase_at).limit(limit).with_for_update(skip_locked=True)
    return list(connection.scalars(due))


def erase(connection: Connection, now: datetime, limit: int) -> int:
    """Replace due contents by their redacted copies, or by nothing; drop corrections; say so in the audit log."""
    ids = to_erase(connection, now, limit)
    if not ids:
        return 0
    connection.execute(
        update(decisions)
        .where(decisions.c.id.in_(ids))
        .values(
            request=decisions.c.redacted_request,
            response=decisions.c.redacted_response,
            redacted_request=None,
            redacted_response=None,
            erase_at=None,
        )
    )
    reviewed = select(tasks.c.id).where(tasks.c.decision_id.in_(ids))
    connection.execute(
        update(reviews).where(reviews.c.task_id.in_(reviewed)).values(correction=None)
    )
    at_us = micros(now)
    log(connection, [audit_row("decision.erased", each, at_us, {}) for each in ids], [])
    return len(ids)


def create_key(connection: Connection, key: ApiKey) -> None:
    """Insert an API key, unless the name is taken."""
    if connection.scalar(select(api_keys.c.id).where(api_keys.c.name == text(key.name))):
        raise Conflict(f"there is an API key named {key.name!r}; choose another name")
    created_at, revoked_at = micros(key.created_at), key.revoked_at and micros(key.revoked_at)
    row = (key.id, text(key.name), key.role.value, key.digest, created_at, revoked_at)
    _insert(connection, api_keys, [row])
    log(connection, [audit_row("key.created", key.id, created_at, {"role": key.role})], [])


def key_by_digest(connection: Connection, digest: str) -> ApiKey | None:
    """The unrevoked key with that digest."""
    query = select(api_keys).where(api_keys.c.digest == digest, api_keys.c.revoked_at.is_(None))
    row = connection.execute(query).mappings().first()
    return None if row is None else api_key(row)


def keys(connection: Connection) -> list[ApiKey]:
    """Every key, newest first."""
    query = select(api_keys).order_by(api_keys.c.created_at.desc(), api_keys.c.id)
    return [api_key(row) for row in connection.execute(query).mappings()]


def revoke_key(connection: Connection, name: str, now: datetime) -> None:
    """Revoke a key for good; revoking it again changes nothing."""
    named = api_keys.c.name == text(name)
    key_id = connection.scalar(select(api_keys.c.id).where(named))
    if key_id is None:
        raise NotFound(f"there is no API key named {name!r}")
    at_us = micros(now)
    change = update(api_keys).where(named, api_keys.c.revoked_at.is_(None))
    if connection.execute(change.values(revoked_at=at_us)).rowcount:
        log(connection, [audit_row("key.revoked", key_id, at_us, {})], [])


def touch(connection: Connection) -> None:
    """Do nothing that a database which cannot be written would let pass."""
    connection.execute(update(api_keys).where(api_keys.c.id == "").values(name=""))
