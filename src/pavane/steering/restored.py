"""A database that was put back, or is another one: telling, and letting workers go on with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from pavane.errors import BadArguments
from pavane.stores.port import Store

if TYPE_CHECKING:
    from pavane.stores.postgres.store import PostgresStore


class Lost(msgspec.Struct, frozen=True):
    """From when to when work was done of which the database knows nothing; µs since the epoch."""

    from_us: int
    until_us: int


class Other(msgspec.Struct, frozen=True):
    """That the database is another one, which is not blank, than this machine worked for before."""

    cluster: str
    before: str
    """The cluster that it worked for."""


class Restored:
    """Looks at a database that was put back, and accepts it; see the module.

    Only a Postgres store tells: of others, all but `check` raise BadArguments.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    async def check(self) -> None:
        """Raise StoreError for a store that refuses workers, before they write anything to it."""
        if self._tells():
            await self._postgres().check_past()

    async def lost(self) -> Lost | None:
        """Return what the database has forgotten, as far as this machine knows; None for nothing.

        Runs that were started and events that were published in that time are gone. Steps of runs
        that had not ended before may have been done since, and are done again, with the same
        idempotency keys, when workers go on.
        """
        found = await self._postgres().look_at_past()
        return None if found.lost is None else Lost(*found.lost)

    async def other(self) -> Other | None:
        """Return which database this is, if it is another one; None for the one of before."""
        found = await self._postgres().look_at_past()
        return Other(found.cluster, found.other) if found.other and not found.is_blank else None

    async def accept(self) -> None:
        """Let workers of all machines go on with the database as it is. Durable.

        If it is another one, only those of this machine: each machine knows which was its own.
        """
        await self._postgres().accept_past()

    def _tells(self) -> bool:
        return hasattr(self._store, "past")

    def _postgres(self) -> PostgresStore:
        if not self._tells():
            raise BadArguments(
                "Only a Postgres store tells that it was put back. A copy of a SQLite file goes on "
                "where it was made: steps done since are done again, with the same idempotency "
                "keys."
            )
        return self._store  # pyright: ignore[reportReturnType]
