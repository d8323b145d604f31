"""Where an app keeps its state: an address becomes a store."""

from __future__ import annotations

import os

from pavane.errors import StoreError
from pavane.stores.port import Store

STORE_VARIABLE = "PAVANE_STORE"
MEMORY = "memory:"


def store_address(given: str | None, app: str) -> str:
    """Return the address to use: the given one, $PAVANE_STORE, or a file named after the app."""
    return given or os.environ.get(STORE_VARIABLE) or f"{app}.db"


def make_store(address: str) -> Store:
    """Return the store of an address: a path, `sqlite:///path`, `postgresql://…`, or `memory:`."""
    if address == MEMORY:
        from pavane.stores.memory import MemoryStore

        return MemoryStore()
    scheme, mark, rest = address.partition("://")
    if mark and scheme in ("postgresql", "postgres"):
        try:
            from pavane.stores.postgres import PostgresStore
        except ModuleNotFoundError as error:
            raise StoreError(
                f"A store on Postgres needs the package {error.name}: pip install "
                f"'pavane[postgres]'."
            ) from None
        return PostgresStore(address)
    if mark and scheme != "sqlite":
        raise StoreError(
            f"{address!r} is no store that this version knows. Use a file path, sqlite:///path, "
            f"postgresql://user@host/database, or memory:."
        )
    from pavane.stores.sqlite import SqliteStore

    return SqliteStore(
        rest.removeprefix("/") if mark and rest.startswith("//") else rest or address
    )
