"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_SQLITE_APPEND_ONLY = """
CREATE TRIGGER audit_entries_no_{verb} BEFORE {verb} ON audit_entries
BEGIN SELECT RAISE(ABORT, 'audit_entries is append-only'); END
"""
_POSTGRES_APPEND_ONLY = (
    """
    CREATE FUNCTION refuse_audit_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN RAISE EXCEPTION 'audit_entries is append-only'; END $$
    """,
    """
    CREATE TRIGGER audit_entries_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_entries
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_audit_change()
    """,
)


def upgrade() -> None:
    """Create every table, index and trigger."""
    _create_decisions()
    _create_tasks()
    _create_outcomes()
    _create_logs()
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False, unique=True),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("digest", sa.Text, nullable=False, unique=True),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("revoked_at", sa.BigInteger),
    )


def _index(name: str, table: str, columns: list[str], where: str | None = None) -> None:
    condition = sa.text(where) if where else None
    op.create_index(name, table, columns, sqlite_where=condition, postgresql_where=condition)


def _create_decisions() -> None:
    op.create_table(
        "decisions",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("endpoint", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("task_type", sa.Text),
        sa.Column("policy", sa.Text, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("risk", sa.Text, nullable=False),
        sa.Column("confidence", sa.Double),
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("key_id", sa.Text),
        sa.Column("request_id", sa.Text, nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("upstream_id", sa.Text),
        sa.Column("streamed", sa.Boolean, nullable=False),
        sa.Column("latency_ms", sa.Double, nullable=False),
        sa.Column("overhead_ms", sa.Double, nullable=False),
        sa.Column("detail", sa.LargeBinary, nullable=False),
        sa.Column("request_digest", sa.Text, nullable=False),
        sa.Column("response_digest", sa.Text, nullable=False),
        sa.Column("request", sa.LargeBinary),
        sa.Column("response", sa.LargeBinary),
        sa.Column("response_headers", sa.LargeBinary, nullable=False),
        sa.Column("erase_at", sa.BigInteger),
        sa.Column("redacted_request", sa.LargeBinary),
        sa.Column("redacted_response", sa.LargeBinary),
    )
    _index("ix_decisions_fingerprint", "decisions", ["fingerprint", "created_at"])
    _index("ix_decisions_created_at", "decisions", ["created_at"])
    _index(
        "ix_decisions_upstream_id",
        "decisions",
        ["upstream_id", "created_at"],
        "upstream_id IS NOT NULL",
    )
    _index("ix_decisions_erase_at", "decisions", ["erase_at"], "erase_at IS NOT NULL")


def _create_tasks() -> None:
    op.create_table(
        "tasks",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column(
            "decision_id", sa.Text, sa.ForeignKey("decisions.id"), nullable=False, unique=True
        ),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("risk", sa.Text, nullable=False),
        sa.Column("queue_rank", sa.Integer, nullable=False),
        sa.Column("policy", sa.Text, nullable=False),
        sa.Column("confidence", sa.Double),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("due_at", sa.BigInteger, nullable=False),
        sa.Column("on_deadline", sa.Text, nullable=False),
        sa.Column("inclusion", sa.Double, nullable=False),
        sa.Column("claimed_by", sa.Text),
        sa.Column("claimed_until", sa.BigInteger),
        sa.Column("resolved_at", sa.BigInteger),
    )
    _index(
        "ix_tasks_queue",
        "tasks",
        ["queue_rank", "due_at", "created_at", "id"],
        "resolved_at IS NULL",
    )
    _index("ix_tasks_due_at", "tasks", ["due_at"], "resolved_at IS NULL")


def _create_outcomes() -> None:
    op.create_table(
        "reviews",
        sa.Column("task_id", sa.Text, sa.ForeignKey("tasks.id"), primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("verdict", sa.Text, nullable=False),
        sa.Column("reviewer", sa.Text, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("comment", sa.Text),
        sa.Column("correction", sa.LargeBinary),
    )
    op.create_table(
        "labels",
        sa.Column("task_id", sa.Text, sa.ForeignKey("tasks.id"), primary_key=True),
        sa.Column("decision_id", sa.Text, sa.ForeignKey("decisions.id"), nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("acceptable", sa.Boolean, nullable=False),
        sa.Column("inclusion", sa.Double, nullable=False),
    )


def _create_logs() -> None:
    sequence = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table(
        "outbox",
        sa.Column("seq", sequence, primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
    )
    op.create_table(
        "audit_entries",
        sa.Column("seq", sequence, primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("leaf", sa.Text, nullable=False),
    )
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(_SQLITE_APPEND_ONLY.format(verb=verb))
    else:
        for statement in _POSTGRES_APPEND_ONLY:
            op.execute(statement)
