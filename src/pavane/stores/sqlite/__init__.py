"""The embedded store: one SQLite file, shared by any number of processes of one machine."""

from pavane.stores.sqlite.store import SqliteStore

__all__ = ["SqliteStore"]
