"""What judges cost, and what each layer of the cascade did."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the columns, indexes and the table that the economics are computed from."""
    for name in ("rules_ms", "judge_ms", "judge_usd"):
        op.add_column("decisions", sa.Column(name, sa.Double))
    for name in ("claimed_at", "worked_us"):
        op.add_column("tasks", sa.Column(name, sa.BigInteger))
    op.drop_index("ix_decisions_created_at", "decisions")
    op.create_index(
        "ix_decisions_economics", "decisions", ["created_at", "rules_ms", "judge_ms", "judge_usd"]
    )
    resolved = sa.text("resolved_at IS NOT NULL")
    op.create_index(
        "ix_tasks_economics",
        "tasks",
        ["resolved_at", "state", "created_at", "worked_us"],
        sqlite_where=resolved,
        postgresql_where=resolved,
    )
    op.create_table(
        "spending",
        sa.Column("day", sa.Text, primary_key=True),
        sa.Column("policy", sa.Text, primary_key=True),
        sa.Column("stage", sa.Text, primary_key=True),
        sa.Column("usd", sa.Double, nullable=False),
        sa.Column("abandoned_usd", sa.Double, nullable=False),
    )
