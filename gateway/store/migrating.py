"""Bringing the schema up to date, in a process of its own: `python -m gateway.store.migrating`."""

from __future__ import annotations

import asyncio
import os
import sys

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, text

from gateway.errors import StoreError
from gateway.store.store import engine_at

_PATIENCE_S = 600.0


def migrate(connection: Connection) -> None:
    """Bring the schema to the newest revision, one process at a time.

    Raises
    ------
    StoreError
        If a newer version of Holdgate has been here.
    """
    if not connection.in_transaction():
        # Else Alembic would end the one that the driver has begun, and others would see half a schema.
        connection.begin()
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


async def _run(url: str) -> None:
    engine = engine_at(url)
    try:
        await engine.write(migrate, patience_s=_PATIENCE_S)
    finally:
        await engine.close()


if __name__ == "__main__":
    try:
        asyncio.run(_run(os.environ["HOLDGATE_STORE_URL"]))
    except StoreError as error:
        sys.exit(error.message)
