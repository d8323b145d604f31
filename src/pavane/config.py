"""Where an app keeps its state: an address becomes a store."""

from __future__ import annotations

import os
import re

from pavane.errors import StoreError
from pavane.stores.port import Store

STORE_VARIABLE = "PAVANE_STORE"
MEMORY = "memory:"
SCHEMES = ("sqlite", "postgresql", "postgres")


def store_address(given: str | None, app: str) -> str:
    """Return the address to use: the given one, $PAVANE_STORE, or a file named after the app."""
    return given if given is not None else os.environ.get(STORE_VARIABLE) or f"{app}.db"


def without_password(address: str) -> str:
    """Return an address for people to see: without its password, and otherwise as it is."""
    bare = re.sub(r"(://[^:/@]*):.*@", r"\1@", address)
    return re.sub(r"([?&])\w*password=[^&]*&?", r"\1", bare).rstrip("?&")


def check_address(address: str) -> None:
    """Raise StoreError for an address that is of no store."""
    scheme, mark, rest = address.partition("://")
    if not address or (mark and not (scheme in SCHEMES and rest)):
        raise StoreError(
            f"{without_password(address)!r} is no store that this version knows. Use a file path, "
            f"sqlite:///path (sqlite:////path from the root), postgresql://user@host/database, or "
            f"memory:."
        )


def make_store(address: str, *, create: bool = True) -> Store:
    """Return the store of an address: a path, `sqlite:///path`, `postgresql://…`, or `memory:`.

    As is usual, `sqlite:///shop.db` is in this directory, and `sqlite:////srv/shop.db` is not.
    Without `create`, one on Postgres that is not there or not up to date is refused when opened.
    """
    check_address(address)
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
        return PostgresStore(address, create=create)
    from pavane.stores.sqlite import SqliteStore

    return SqliteStore(rest.removeprefix("/") if mark else address)
