"""Run by Alembic: apply revisions to the connection that `gateway.store` opened, inside its transaction.

To write a revision, see `gateway.store.migrating`.
"""

from __future__ import annotations

from alembic import context

from gateway.store.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
