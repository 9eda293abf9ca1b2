"""Labels from anybody, where each policy stands, and alarms."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

#: What was a review's label: its kind of task says whether it was an audit.
_LABELS_OF_REVIEWS = """
INSERT INTO labels (decision_id, task_id, at, source, labeller, acceptable, weight, inclusion, inclusion_floor, blind,
                    policy, intended, risk, confidence)
SELECT old.decision_id, old.task_id, old.at, CASE tasks.kind WHEN 'audit' THEN 'audit' ELSE 'review' END, reviews.reviewer,
       old.acceptable, 1.0, old.inclusion, old.inclusion, {no}, {name}, decisions.action, decisions.risk,
       decisions.confidence
FROM labels_0002 AS old
JOIN tasks ON tasks.id = old.task_id
JOIN reviews ON reviews.task_id = old.task_id
JOIN decisions ON decisions.id = old.decision_id
ORDER BY old.at
"""


def upgrade() -> None:
    """Let a decision have many labels, none of them changed; add standings, alarms and what metrics are computed from."""
    op.add_column("decisions", sa.Column("intended", sa.Text))
    for name in ("inclusion", "inclusion_floor"):
        op.add_column("decisions", sa.Column(name, sa.Double))
    op.drop_index("ix_decisions_economics", "decisions")
    op.create_index(
        "ix_decisions_economics",
        "decisions",
        ["created_at", "policy", "intended", "rules_ms", "judge_ms", "judge_usd"],
    )
    op.execute("CREATE TABLE labels_0002 AS SELECT * FROM labels")
    op.drop_table("labels")
    _create_labels()
    sqlite = op.get_bind().dialect.name == "sqlite"
    name = (
        "substr(decisions.policy, 1, instr(decisions.policy || '@', '@') - 1)"
        if sqlite
        else "split_part(decisions.policy, '@', 1)"
    )
    op.execute(_LABELS_OF_REVIEWS.format(no="0" if sqlite else "false", name=name))
    op.drop_table("labels_0002")
    _create_standings()


def _create_labels() -> None:
    op.create_table(
        "labels",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("decision_id", sa.Text, sa.ForeignKey("decisions.id"), nullable=False),
        sa.Column("task_id", sa.Text, sa.ForeignKey("tasks.id")),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("labeller", sa.Text, nullable=False),
        sa.Column("acceptable", sa.Boolean, nullable=False),
        sa.Column("weight", sa.Double, nullable=False),
        sa.Column("inclusion", sa.Double),
        sa.Column("inclusion_floor", sa.Double),
        sa.Column("blind", sa.Boolean, nullable=False),
        sa.Column("comment", sa.Text),
        sa.Column("policy", sa.Text, nullable=False),
        sa.Column("intended", sa.Text, nullable=False),
        sa.Column("risk", sa.Text, nullable=False),
        sa.Column("confidence", sa.Double),
    )
    op.create_index("ix_labels_decision", "labels", ["decision_id", "seq"])
    op.create_index("ix_labels_policy", "labels", ["policy", "seq"])
    op.create_index("ix_labels_at", "labels", ["at", "policy"])


def _create_standings() -> None:
    op.create_table(
        "standings",
        sa.Column("policy", sa.Text, primary_key=True),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("audit_level", sa.Text, nullable=False),
        sa.Column("suspended", sa.Text),
        sa.Column("artefact", sa.Text),
        sa.Column("memory", sa.LargeBinary),
    )
    op.create_table(
        "alarms",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("policy", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("evidence", sa.LargeBinary, nullable=False),
        sa.Column("cleared_at", sa.BigInteger),
    )
    still_open = sa.text("cleared_at IS NULL")
    op.create_index(
        "ix_alarms_open",
        "alarms",
        ["policy", "kind"],
        sqlite_where=still_open,
        postgresql_where=still_open,
    )
    op.create_index("ix_alarms_at", "alarms", ["at"])
