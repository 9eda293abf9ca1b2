"""The history of the schema: one module in `versions/` for each revision, written by hand."""

from __future__ import annotations

from sqlalchemy import Connection, inspect, text

from gateway.store.schema import REVISION


def is_current(connection: Connection) -> bool:
    """Whether the database has exactly the schema this code is written for."""
    if not inspect(connection).has_table("alembic_version"):
        return False
    found: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return found == REVISION
