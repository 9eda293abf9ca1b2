"""Records to table rows and back: times to microseconds, bodies to zstd, text to what both engines can hold."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import msgspec
import orjson
import zstandard
from sqlalchemy import RowMapping

from gateway.records import (
    Alarm,
    ApiKey,
    DecisionRecord,
    Effort,
    Label,
    LabelSource,
    NewTask,
    Role,
    Spend,
    Standing,
    TaskKind,
    TaskRecord,
    TaskState,
    Verdict,
)
from gateway.store.schema import NEVER
from policies.model import Action, RiskTier
from validators import JSON

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_LOWEST_RANK = RiskTier.CRITICAL.rank

#: JSON longer than this many bytes is stored compressed; a zstd frame and a JSON object differ in their first byte.
_PLAIN_BYTES = 512
_FRAME = b"\x28"

Row = tuple[Any, ...]


def micros(at: datetime) -> int:
    """Microseconds since 1970 UTC. Raises `TypeError` for a time without a zone."""
    return (at - _EPOCH) // _MICROSECOND


def moment(at_us: int) -> datetime:
    """The aware UTC time of `micros`."""
    return _EPOCH + timedelta(microseconds=at_us)


def text(value: str) -> str:
    """The text with what no database holds replaced: NUL (PostgreSQL) and lone surrogates (UTF-8)."""
    if value.isprintable():
        return value
    return value.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


class _Zstd(threading.local):
    """A thread's compressor. Level 1 costs 10 us for a body of 3 KB and is within 1 % of level 3 in size."""

    def __init__(self) -> None:
        self.compress = zstandard.ZstdCompressor(level=1).compress
        self.decompress = zstandard.ZstdDecompressor().decompress


_zstd = _Zstd()


def pack(body: bytes | None) -> bytes | None:
    """The body as a zstd frame."""
    return None if body is None else _zstd.compress(body)


def unpack(frame: bytes | None) -> bytes | None:
    """The body that was packed."""
    return None if frame is None else _zstd.decompress(frame)


def pack_json(value: Mapping[str, Any]) -> bytes:
    """The value as JSON, in a zstd frame if it is long."""
    data = orjson.dumps(value)
    return data if len(data) <= _PLAIN_BYTES else _zstd.compress(data)


def unpack_json(data: bytes) -> Any:
    """The value that was packed."""
    return orjson.loads(_zstd.decompress(data) if data.startswith(_FRAME) else data)


class Entry(NamedTuple):
    """The rows of one decision, in the column order of their tables; `outbox` has one if a task opens."""

    decision: Row
    audit: Row
    task: Row | None
    outbox: Row | None
    spends: tuple[Spend, ...]


class Erasure(msgspec.Struct, frozen=True):
    """When contents are erased, and what takes their place."""

    at: datetime
    request: bytes | None
    response: bytes | None


def entry(decision: DecisionRecord, task: NewTask | None, erasure: Erasure | None) -> Entry:
    """The rows that `Store.record` writes."""
    created_at = micros(decision.created_at)
    facts: dict[str, JSON] = {
        "action": decision.action,
        "risk": decision.risk,
        "policy": decision.policy,
        "request_sha256": decision.request_digest,
        "response_sha256": decision.response_digest,
        "task": task.id if task else None,
    }
    return Entry(
        _decision_row(decision, created_at, erasure),
        audit_row("decision.recorded", decision.id, created_at, facts),
        task_row(task, decision, created_at) if task else None,
        (created_at, "task.opened", task.id) if task else None,
        decision.effort.spends,
    )


def audit_row(kind: str, subject: str, at_us: int, facts: Mapping[str, JSON]) -> Row:
    """A row of `audit_entries` whose body, and so its leaf hash, covers every other column too."""
    body = orjson.dumps({"kind": kind, "subject": subject, "at_us": at_us, **facts})
    leaf = hashlib.sha256(b"\0" + body).hexdigest()
    return at_us, kind, subject, body.decode(), leaf


def _decision_row(record: DecisionRecord, created_at: int, erasure: Erasure | None) -> Row:
    return (
        record.id,
        created_at,
        record.endpoint,
        text(record.model),
        record.task_type and text(record.task_type),
        record.policy,
        record.action.value,
        record.risk.value,
        record.confidence,
        record.fingerprint,
        record.key_id,
        text(record.request_id),
        record.status,
        record.upstream_id and text(record.upstream_id),
        record.streamed,
        record.latency_ms,
        record.overhead_ms,
        pack_json(record.detail),
        record.request_digest,
        record.response_digest,
        pack(record.request),
        pack(record.response),
        pack_json(record.response_headers),
        erasure and micros(erasure.at),
        erasure and pack(erasure.request),
        erasure and pack(erasure.response),
        record.effort.rules_ms,
        record.effort.judge_ms,
        record.effort.judge_usd,
        record.intended and record.intended.value,
        record.inclusion,
        record.inclusion_floor,
    )


def task_row(task: NewTask, decision: DecisionRecord, created_at: int, round_: int = 0) -> Row:
    """The row of `tasks` of a new task; `round_` counts the tasks of its decision from 0."""
    return (
        task.id,
        decision.id,
        task.kind.value,
        TaskState.OPEN.value,
        1,
        decision.risk.value,
        _LOWEST_RANK - decision.risk.rank,
        decision.policy,
        decision.confidence,
        created_at,
        NEVER if task.due_at is None else micros(task.due_at),
        task.on_deadline,
        task.inclusion,
        None,
        None,
        None,
        None,
        None,
        round_,
    )


def decision_record(row: RowMapping) -> DecisionRecord:
    """The decision of a row of `decisions`."""
    return DecisionRecord(
        id=row["id"],
        created_at=moment(row["created_at"]),
        endpoint=row["endpoint"],
        model=row["model"],
        task_type=row["task_type"],
        policy=row["policy"],
        action=Action(row["action"]),
        risk=RiskTier(row["risk"]),
        confidence=row["confidence"],
        fingerprint=row["fingerprint"],
        key_id=row["key_id"],
        request_id=row["request_id"],
        status=row["status"],
        upstream_id=row["upstream_id"],
        streamed=row["streamed"],
        latency_ms=row["latency_ms"],
        overhead_ms=row["overhead_ms"],
        detail=unpack_json(row["detail"]),
        request_digest=row["request_digest"],
        response_digest=row["response_digest"],
        request=unpack(row["request"]),
        response=unpack(row["response"]),
        response_headers=unpack_json(row["response_headers"]),
        effort=Effort(row["rules_ms"] or 0.0, row["judge_ms"], row["judge_usd"]),
        intended=row["intended"] and Action(row["intended"]),
        inclusion=row["inclusion"] or 0.0,
        inclusion_floor=row["inclusion_floor"] or 0.0,
    )


def task_record(row: RowMapping) -> TaskRecord:
    """The task of a row of `tasks` joined with its review."""
    return TaskRecord(
        id=row["id"],
        decision_id=row["decision_id"],
        kind=TaskKind(row["kind"]),
        state=TaskState(row["state"]),
        version=row["version"],
        risk=RiskTier(row["risk"]),
        policy=row["policy"],
        confidence=row["confidence"],
        created_at=moment(row["created_at"]),
        due_at=None if row["due_at"] == NEVER else moment(row["due_at"]),
        on_deadline=row["on_deadline"],
        inclusion=row["inclusion"],
        claimed_by=row["claimed_by"],
        claimed_until=_moment_or_none(row["claimed_until"]),
        resolved_at=_moment_or_none(row["resolved_at"]),
        verdict=row["verdict"] and Verdict(row["verdict"]),
        reviewer=row["reviewer"],
        reason=row["reason"],
        comment=row["comment"],
        correction=unpack(row["correction"]),
        worked_s=None if row["worked_us"] is None else row["worked_us"] / 1e6,
    )


def label_record(row: RowMapping) -> Label:
    """The label of a row of `labels`."""
    return Label(
        decision_id=row["decision_id"],
        at=moment(row["at"]),
        source=LabelSource(row["source"]),
        labeller=row["labeller"],
        acceptable=row["acceptable"],
        weight=row["weight"],
        inclusion=row["inclusion"],
        blind=row["blind"],
        comment=row["comment"],
        task_id=row["task_id"],
        seq=row["seq"],
        inclusion_floor=row["inclusion_floor"],
        policy=row["policy"],
        intended=Action(row["intended"]),
        risk=RiskTier(row["risk"]),
        confidence=row["confidence"],
    )


def alarm_record(row: RowMapping) -> Alarm:
    """The alarm of a row of `alarms`."""
    return Alarm(
        id=row["id"],
        at=moment(row["at"]),
        policy=row["policy"],
        kind=row["kind"],
        message=row["message"],
        evidence=unpack_json(row["evidence"]),
        cleared_at=_moment_or_none(row["cleared_at"]),
    )


def standing_record(row: RowMapping) -> Standing:
    """The standing of a row of `standings`."""
    return Standing(
        policy=row["policy"],
        version=row["version"],
        at=moment(row["at"]),
        audit_level=row["audit_level"],
        suspended=row["suspended"],
        artefact=row["artefact"],
        memory=unpack(row["memory"]),
    )


def api_key(row: RowMapping) -> ApiKey:
    """The key of a row of `api_keys`."""
    return ApiKey(
        id=row["id"],
        name=row["name"],
        role=Role(row["role"]),
        digest=row["digest"],
        created_at=moment(row["created_at"]),
        revoked_at=_moment_or_none(row["revoked_at"]),
    )


def _moment_or_none(at_us: int | None) -> datetime | None:
    return None if at_us is None else moment(at_us)
