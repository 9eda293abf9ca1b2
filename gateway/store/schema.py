"""The tables, for SQLite and PostgreSQL alike. Times are integer microseconds since 1970 UTC.

The Alembic revisions in `migrations` build them; a test asserts that both agree.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
)

#: The revision this code reads and writes.
REVISION = "0005"

#: `due_at` of a task without a deadline, so that one ascending index serves queue and expiry.
NEVER = 2**63 - 1

metadata = MetaData()
_Sequence = BigInteger().with_variant(Integer, "sqlite")

decisions = Table(
    "decisions",
    metadata,
    Column("id", Text, primary_key=True),
    Column("created_at", BigInteger, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("task_type", Text),
    Column("policy", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("risk", Text, nullable=False),
    Column("confidence", Double),
    Column("fingerprint", Text, nullable=False),
    Column("key_id", Text),
    Column("request_id", Text, nullable=False),
    Column("status", Integer, nullable=False),
    Column("upstream_id", Text),
    Column("streamed", Boolean, nullable=False),
    Column("latency_ms", Double, nullable=False),
    Column("overhead_ms", Double, nullable=False),
    Column("detail", LargeBinary, nullable=False),
    Column("request_digest", Text, nullable=False),
    Column("response_digest", Text, nullable=False),
    Column("request", LargeBinary),
    Column("response", LargeBinary),
    Column("response_headers", LargeBinary, nullable=False),
    Column("erase_at", BigInteger),
    Column("redacted_request", LargeBinary),
    Column("redacted_response", LargeBinary),
    Column("rules_ms", Double),
    Column("judge_ms", Double),
    Column("judge_usd", Double),
    Column("intended", Text),
    Column("inclusion", Double),
    Column("inclusion_floor", Double),
)
# Partial indexes are so on PostgreSQL too (see the revisions); to say it here would load that dialect for everybody, 2 MB.
Index("ix_decisions_fingerprint", decisions.c.fingerprint, decisions.c.created_at)
#: Holds all that the economics and the metrics of a time are computed from, so that no decision has to be read.
Index(
    "ix_decisions_economics",
    decisions.c.created_at,
    decisions.c.policy,
    decisions.c.intended,
    decisions.c.rules_ms,
    decisions.c.judge_ms,
    decisions.c.judge_usd,
)
_from_upstream = decisions.c.upstream_id.is_not(None)
Index(
    "ix_decisions_upstream_id",
    decisions.c.upstream_id,
    decisions.c.created_at,
    sqlite_where=_from_upstream,
)
_to_erase = decisions.c.erase_at.is_not(None)
Index(
    "ix_decisions_erase_at",
    decisions.c.erase_at,
    sqlite_where=_to_erase,
)

#: `queue_rank` is 0 for tier critical to 3 for low; `resolved_at` is set exactly when the state is terminal. `worked_us` is the
#: time from the resolver's claim to the resolution, or to the claim's lapse; NULL where they did not claim the task. `round` is 0
#: for the task that was made with its decision, and counts the second opinions that were asked for later.
tasks = Table(
    "tasks",
    metadata,
    Column("id", Text, primary_key=True),
    Column("decision_id", Text, ForeignKey("decisions.id"), nullable=False),
    Column("kind", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("risk", Text, nullable=False),
    Column("queue_rank", Integer, nullable=False),
    Column("policy", Text, nullable=False),
    Column("confidence", Double),
    Column("created_at", BigInteger, nullable=False),
    Column("due_at", BigInteger, nullable=False),
    Column("on_deadline", Text, nullable=False),
    Column("inclusion", Double, nullable=False),
    Column("claimed_by", Text),
    Column("claimed_until", BigInteger),
    Column("resolved_at", BigInteger),
    Column("claimed_at", BigInteger),
    Column("worked_us", BigInteger),
    Column("round", Integer, nullable=False),
)
Index("ix_tasks_decision", tasks.c.decision_id, tasks.c.round, unique=True)
_unresolved = tasks.c.resolved_at.is_(None)
Index(
    "ix_tasks_queue",
    tasks.c.queue_rank,
    tasks.c.due_at,
    tasks.c.created_at,
    tasks.c.id,
    sqlite_where=_unresolved,
)
Index("ix_tasks_due_at", tasks.c.due_at, sqlite_where=_unresolved)
_resolved = tasks.c.resolved_at.is_not(None)
Index(
    "ix_tasks_economics",
    tasks.c.resolved_at,
    tasks.c.state,
    tasks.c.created_at,
    tasks.c.worked_us,
    sqlite_where=_resolved,
)

#: What the judges of a stage cost on a day (UTC, as 2030-01-31); `abandoned_usd` is the part that no decision carries.
spending = Table(
    "spending",
    metadata,
    Column("day", Text, primary_key=True),
    Column("policy", Text, primary_key=True),
    Column("stage", Text, primary_key=True),
    Column("usd", Double, nullable=False),
    Column("abandoned_usd", Double, nullable=False),
)

reviews = Table(
    "reviews",
    metadata,
    Column("task_id", Text, ForeignKey("tasks.id"), primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("verdict", Text, nullable=False),
    Column("reviewer", Text, nullable=False),
    Column("reason", Text),
    Column("comment", Text),
    Column("correction", LargeBinary),
)

#: What people say of responses: one row for each time somebody said something, never changed. The latest of a labeller counts.
#: What monitors and metrics need of the decision is here too, so that no decision has to be read.
labels = Table(
    "labels",
    metadata,
    Column("seq", _Sequence, primary_key=True),
    Column("decision_id", Text, ForeignKey("decisions.id"), nullable=False),
    Column("task_id", Text, ForeignKey("tasks.id")),
    Column("at", BigInteger, nullable=False),
    Column("source", Text, nullable=False),
    Column("labeller", Text, nullable=False),
    Column("acceptable", Boolean, nullable=False),
    Column("weight", Double, nullable=False),
    Column("inclusion", Double),
    Column("inclusion_floor", Double),
    Column("blind", Boolean, nullable=False),
    Column("comment", Text),
    Column("policy", Text, nullable=False),
    Column("intended", Text, nullable=False),
    Column("risk", Text, nullable=False),
    Column("confidence", Double),
)
Index("ix_labels_decision", labels.c.decision_id, labels.c.seq)
Index("ix_labels_policy", labels.c.policy, labels.c.seq)
Index("ix_labels_at", labels.c.at, labels.c.policy)

#: Where each policy stands; `memory` is what its monitors remember, a zstd frame of JSON.
standings = Table(
    "standings",
    metadata,
    Column("policy", Text, primary_key=True),
    Column("version", Integer, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("audit_level", Text, nullable=False),
    Column("suspended", Text),
    Column("artefact", Text),
    Column("memory", LargeBinary),
)

alarms = Table(
    "alarms",
    metadata,
    Column("id", Text, primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("policy", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("evidence", LargeBinary, nullable=False),
    Column("cleared_at", BigInteger),
)
_open = alarms.c.cleared_at.is_(None)
Index("ix_alarms_open", alarms.c.policy, alarms.c.kind, sqlite_where=_open)
Index("ix_alarms_at", alarms.c.at)

#: What happened and others may want to be told; `dispatch` turns each row into deliveries, or drops it if nobody asked for it.
outbox = Table(
    "outbox",
    metadata,
    Column("seq", _Sequence, primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("kind", Text, nullable=False),
    Column("subject", Text, nullable=False),
)

#: An event on its way to one webhook, at least once: the row is deleted when it got there, or is given up. Whoever tries to
#: deliver it moves `next_at` on first, so that no other does meanwhile.
deliveries = Table(
    "deliveries",
    metadata,
    Column("id", Text, primary_key=True),
    Column("webhook", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("next_at", BigInteger, nullable=False),
)
Index("ix_deliveries_next_at", deliveries.c.webhook, deliveries.c.next_at)
Index("ix_deliveries_at", deliveries.c.at)

#: How far something has come that must happen once for every so many, whichever replica notices.
marks = Table(
    "marks",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", BigInteger, nullable=False),
)

#: Append-only, by trigger. `leaf` is SHA-256(0x00 || body) in hex, the leaf hash of RFC 9162, section 2.1.1.
audit_entries = Table(
    "audit_entries",
    metadata,
    Column("seq", _Sequence, primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("kind", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("body", Text, nullable=False),
    Column("leaf", Text, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("role", Text, nullable=False),
    Column("digest", Text, nullable=False, unique=True),
    Column("created_at", BigInteger, nullable=False),
    Column("revoked_at", BigInteger),
)
