"""The desk: what everything that steers handlers shares, names and the way requests are sent.

A request is a `redo` message to the owner of the event's partition. Its id is derived from what is
asked for, so asking twice, or going on after an interruption, does a thing once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from difflib import get_close_matches
from typing import Any

import msgspec

from pavane.core.envelope import Redo, pack
from pavane.engine.process import hosted_services
from pavane.engine.registry import Registry
from pavane.errors import BadArguments, UnknownName
from pavane.handler import Handler
from pavane.stores.eventlog import HandlerRow, Reaction
from pavane.stores.port import Commit, Message, Store

PAGE = 200
"""Requests in one commit."""
AHEAD_MAX = 5_000
PATIENCE_S = 5.0
LOOK_S = 0.05


class Place(msgspec.Struct, frozen=True):
    """An event that something is asked for: its position in the log, and its partition."""

    pos: int
    key: str
    id: str


class Asking:
    """Asks for many things, commit by commit: await it for how many it were, or iterate over how
    many each commit had. Either way it goes on as fast as nodes take the requests up, if there are
    any; it does nothing before."""

    def __init__(self, counts: AsyncIterator[int]) -> None:
        self._counts = counts

    def __aiter__(self) -> AsyncIterator[int]:
        return self._counts

    def __await__(self) -> Generator[Any, Any, int]:
        return self._total().__await__()

    async def _total(self) -> int:
        return sum([count async for count in self._counts])


class Desk:
    """The store with its handlers, as the app declares them and as the store knows them."""

    def __init__(
        self, store: Store, registry: Registry, write: Callable[[Commit], Awaitable[None]],
        payload_max_bytes: int,
    ) -> None:  # fmt: skip
        self.store = store
        self.registry = registry
        self.payload_max_bytes = payload_max_bytes
        self._write = write

    # -- names ---------------------------------------------------------------------------------

    async def rows(self) -> list[HandlerRow]:
        return await self.store.handler_rows()

    async def row(self, name: str) -> HandlerRow:
        """Return the handler "SERVICE.NAME", or "NAME" if one service only has it; UnknownName."""
        rows = await self.rows()
        found = [row for row in rows if name in (full_name(row), row.name)]
        exact = [row for row in found if full_name(row) == name]
        if len(exact or found) == 1:
            return (exact or found)[0]
        if found:
            listed = ", ".join(full_name(row) for row in found)
            raise BadArguments(f"Several handlers are called {name!r}: {listed}.")
        shared = [h for h in self.registry.handlers() if h.options.share is not None]
        for handler in shared:
            if name in (repr(handler), handler.name):
                raise BadArguments(
                    f"{handler!r} takes its share of the events of {handler.instead_of!r}; name "
                    f"that one."
                )
        known = [full_name(row) for row in rows]
        close = get_close_matches(name, [*known, *(row.name for row in rows)], 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UnknownName(
            f"No handler is called {name!r}.{hint} Known: {', '.join(known) or 'none'}."
        )

    def declared(self, row: HandlerRow) -> Handler | None:
        """Return the handler in the app's code, if it is there."""
        handlers = self.registry.handlers_of(row.service)
        return next((h for h in handlers if h.name == row.name), None)

    def is_abandoned(self, row: HandlerRow) -> bool:
        """Tell whether the app has the service of a handler, but the handler no more."""
        return row.service in self.registry.services and self.declared(row) is None

    async def hosted(self) -> set[str]:
        """Return the services that a live node works for."""
        return await hosted_services(self.store)

    # -- requests ------------------------------------------------------------------------------

    async def ask(
        self, row: HandlerRow, requests: Sequence[tuple[str, Place, Redo]],
        asked: Sequence[tuple[int, str]] = (),
    ) -> None:  # fmt: skip
        """Send requests, each with its id, durably and in one commit with `asked`."""
        await self.store.register([row.service])
        now = self.store.now_us()
        messages = [
            Message(
                "redo", id, row.service, "", pack(redo), now,
                self.store.target_of(row.service, place.key or place.id),
            )
            for id, place, redo in requests
        ]  # fmt: skip
        await self._write(Commit(messages=messages, reaction=Reaction(asked=asked)))

    async def let_catch_up(self, row: HandlerRow, ids: Sequence[str], parked_before: int) -> None:
        """Wait while much is asked for that no node has taken up; for so long as that moves."""
        if row.service not in await self.hosted():
            return
        last, patience = (-1, -1), PATIENCE_S
        while patience > 0:
            taken = len(await self.store.seen(row.service, ids))
            parked = await self.store.parked_count(row.no)
            if taken == len(ids) and parked <= parked_before + AHEAD_MAX:
                return
            patience = PATIENCE_S if (taken, parked) != last else patience - LOOK_S
            last = (taken, parked)
            await asyncio.sleep(LOOK_S)


def full_name(row: HandlerRow) -> str:
    return f"{row.service}.{row.name}"
