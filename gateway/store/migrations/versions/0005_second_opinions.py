"""More than one task for a decision; samples are counted from where they were last told of."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_COLUMNS = (
    "id, decision_id, kind, state, version, risk, queue_rank, policy, confidence, created_at, due_at, on_deadline, inclusion, "
    "claimed_by, claimed_until, resolved_at, claimed_at, worked_us"
)

#: Of the samples that were told of only the number was known. That is where the last of them is.
_COUNTED_TO = """
INSERT INTO marks (name, value)
SELECT 'labels.counted_to', coalesce(max(seq), 0)
FROM (SELECT seq FROM labels
      WHERE task_id IS NOT NULL AND source = 'review' OR source = 'audit' AND NOT acceptable
      ORDER BY seq LIMIT (SELECT value FROM marks WHERE name = 'labels.ready')) AS told
"""


def upgrade() -> None:
    """Let a decision have a task for each round of opinions; count what there is to learn from where it was left off."""
    if op.get_bind().dialect.name == "sqlite":
        _make_tasks_again()
    else:
        op.execute("ALTER TABLE tasks DROP CONSTRAINT IF EXISTS tasks_decision_id_key")
        op.execute("ALTER TABLE tasks ADD COLUMN round INTEGER NOT NULL DEFAULT 0")
        op.execute("ALTER TABLE tasks ALTER COLUMN round DROP DEFAULT")
    op.create_index("ix_tasks_decision", "tasks", ["decision_id", "round"], unique=True)
    op.execute(_COUNTED_TO)
    op.execute("INSERT INTO marks (name, value) VALUES ('labels.counted', 0)")


def _make_tasks_again() -> None:
    """SQLite cannot drop a constraint. Labels and reviews point at nothing meanwhile, which is checked at the end."""
    op.execute("PRAGMA defer_foreign_keys = ON")
    op.execute("CREATE TABLE tasks_0004 AS SELECT * FROM tasks")
    op.drop_table("tasks")
    op.create_table(
        "tasks",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("decision_id", sa.Text, sa.ForeignKey("decisions.id"), nullable=False),
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
        sa.Column("claimed_at", sa.BigInteger),
        sa.Column("worked_us", sa.BigInteger),
        sa.Column("round", sa.Integer, nullable=False),
    )
    op.execute(f"INSERT INTO tasks ({_COLUMNS}, round) SELECT {_COLUMNS}, 0 FROM tasks_0004")
    op.drop_table("tasks_0004")
    is_open = sa.text("resolved_at IS NULL")
    queue = ["queue_rank", "due_at", "created_at", "id"]
    op.create_index("ix_tasks_queue", "tasks", queue, sqlite_where=is_open)
    op.create_index("ix_tasks_due_at", "tasks", ["due_at"], sqlite_where=is_open)
    op.create_index(
        "ix_tasks_economics",
        "tasks",
        ["resolved_at", "state", "created_at", "worked_us"],
        sqlite_where=sa.text("resolved_at IS NOT NULL"),
    )
