"""What must hold once a shop that went through chaos is at rest, seen through the store's port.

The same questions as in simulations (`pavane.testing.sim.checks`), asked of any store.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from examples.shop.outcome import Ending, wrongs
from examples.shop.world import World
from pavane import Client, RunFilter
from pavane.core.baton import ENDED
from pavane.core.journal import decode_chunk
from pavane.stores.port import RunRow

PAGE = 500


async def runs(client: Client) -> AsyncIterator[list[RunRow]]:
    """Yield all runs at their homes."""
    before: int | None = None
    while rows := await client.store.list_runs(RunFilter(before=before, limit=PAGE)):
        yield rows
        before = rows[-1].no


async def open_work(client: Client) -> str:
    """Say what has not ended yet; nothing if all has."""
    async for rows in runs(client):
        for row in rows:
            if row.status not in ENDED:
                return f"Run {row.id} is {row.status} ({row.reason})."
    for handler in await client.handlers.list():
        if handler.share is None and (handler.backlog or handler.parked):
            return (
                f"{handler.name} has {handler.backlog} events to handle, {handler.parked} parked."
            )
    return ""


async def violations(
    client: Client, ids: Sequence[str], endings: Sequence[Ending], world: World
) -> list[str]:
    """Return every promise that was broken."""
    found = wrongs(ids, endings, world)
    seen: set[str] = set()
    async for rows in runs(client):
        found += [f"Run {row.id} has two rows at its home." for row in rows if row.id in seen]
        seen.update(row.id for row in rows)
        found += [f"Run {row.id} is {row.status}." for row in rows if row.status not in ENDED]
        journals = await client.store.journals([row.no for row in rows])
        for row in rows:
            at = 0
            for chunk in journals[row.no]:
                if chunk.seq != at:
                    found.append(f"The journal of {row.id} has a gap at {at}.")
                at = chunk.seq + len(decode_chunk(chunk.body))
            if at != row.entries:
                found.append(f"Run {row.id} says {row.entries} entries, and has {at}.")
    for group in await client.dead.groups():
        found.append(f"Dead letters of {group.handler}: {group.cause}.")
    return found
