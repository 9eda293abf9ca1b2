"""The truth: SQLite or PostgreSQL behind `gateway.ports.Store`."""

from gateway.store.store import SqlStore, open_store

__all__ = ["SqlStore", "open_store"]
