"""What must hold once a shop that went through chaos is at rest, seen through the store's port.

The same questions as in simulations (`pavane.testing.sim.checks`), asked of any store.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from examples.shop.outcome import Ending, wrongs
from examples.shop.world import World
from pavane import Client, RunFilter
from pavane.core.baton import ENDED
from pavane.core.codec import decoder
from pavane.core.journal import decode_chunk
from pavane.stores.eventlog import EventFilter, EventRow
from pavane.stores.port import RunRow
from pavane.testing.sim.checks import wrong_answers
from tests.chaos.shop import EVENTS, audit
from tests.sim.books import Book, wrong_book

PAGE = 500
AT_ONCE = 50


async def runs(client: Client) -> AsyncIterator[list[RunRow]]:
    """Yield all runs at their homes."""
    before: int | None = None
    while rows := await client.store.list_runs(RunFilter(before=before, limit=PAGE)):
        yield rows
        before = rows[-1].no


async def events(client: Client, types: Sequence[str]) -> list[EventRow]:
    """Return all events of these types, oldest first."""
    found: list[EventRow] = []
    before: int | None = None
    while rows := await client.store.find_events(
        EventFilter(types=tuple(types), before=before, limit=PAGE)
    ):
        found += rows
        before = rows[-1].pos
    return found[::-1]


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
    client: Client, ids: Sequence[str], endings: Sequence[Ending],
    answers: Mapping[str, tuple[str, Any]], world: World,
) -> list[str]:  # fmt: skip
    """Return every promise that was broken."""
    found = wrongs(ids, endings, world)
    ends: dict[str, tuple[str, bytes | None]] = {}
    async for rows in runs(client):
        found += [f"Run {row.id} has two rows at its home." for row in rows if row.id in ends]
        ends.update((row.id, (row.status, row.result)) for row in rows)
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
    return found + wrong_answers(ends, answers) + await _wrong_books(client)


async def _wrong_books(client: Client) -> list[str]:
    """Each event was handled once by the service that keeps books, in order per key (4, 6)."""
    published: defaultdict[str, list[str]] = defaultdict(list)
    kinds: set[tuple[str, str]] = set()
    found: list[str] = []
    for row in await events(client, [event.event_type for event in EVENTS]):
        published[row.key].append(row.id)
        if (row.key, row.type) in kinds:
            found.append(f"{row.type} of {row.key} was published twice.")
        kinds.add((row.key, row.type))
    store = client.store
    keys = sorted(published)
    for at in range(0, len(keys), AT_ONCE):
        some = keys[at : at + AT_ONCE]
        books = await asyncio.gather(*(store.state(audit.name, Book.__name__, key) for key in some))
        for key, raw in zip(some, books, strict=True):
            seen = decoder(Book)(raw).events if raw else []
            found += wrong_book(audit.name, key, seen, published[key])
    return found
