"""The Postgres store."""

from pavane.stores.postgres.store import PostgresStore

__all__ = ["PostgresStore"]
