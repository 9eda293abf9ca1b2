"""The history of the schema: one module in `versions/` for each revision, written by hand."""

from __future__ import annotations

from sqlalchemy import Connection, inspect, text

from gateway.errors import StoreError
from gateway.store.schema import REVISION


def is_current(connection: Connection) -> bool:
    """Whether the database has exactly the schema this code is written for."""
    if not inspect(connection).has_table("alembic_version"):
        return False
    found: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return found == REVISION


def migrate(connection: Connection) -> None:
    """Bring the schema to the newest revision, one process at a time.

    Raises
    ------
    StoreError
        If a newer version of Holdgate has been here.
    """
    # Alembic is 12 MB and 0.3 s that only a start with an outdated schema needs.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415
    from alembic.util import CommandError  # noqa: PLC0415

    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('holdgate.schema'))"))
    config = Config()
    config.set_main_option("script_location", "gateway.store:migrations")
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise StoreError(
            "the database was written by a newer version of Holdgate; start that version"
        ) from error
