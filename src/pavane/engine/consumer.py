"""The consumer: reads the event log for the handlers of this node, in order and in bounded memory.

What this node publishes is handed to its handlers without a read, as long as it directly follows
what was read last; anything else is read at the log's tail, soon after it was written. A handler
that cannot keep up stops listening at the tail and reads page by page from where it is, whenever
it has room, until it is back at the tail.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from pavane.engine.subscription import Subscription
from pavane.stores.eventlog import EventRow, EventStore

PAGE = 500


class Consumer:
    """Owns the subscriptions of one session; `spawn` runs its readers."""

    def __init__(
        self, store: EventStore, spawn: Callable[..., asyncio.Task[None]], tail: int
    ) -> None:
        self._store = store
        self._spawn = spawn
        self.tail = tail
        """Every event up to here was offered to the live subscriptions."""
        self._behind = False
        self._reading = False
        self._by_type: dict[str, list[Subscription]] = {}
        self.subscriptions: list[Subscription] = []

    def add(self, subscription: Subscription) -> None:
        self.subscriptions.append(subscription)
        subscription.live = True  # it has no slots yet
        self.listen(subscription)

    def listen(self, subscription: Subscription) -> None:
        """Offer it the events of all types that its handler is for, here or in newer code."""
        for name in subscription.types:
            listening = self._by_type.setdefault(name, [])
            if subscription not in listening:
                listening.append(subscription)

    # -- at the tail ---------------------------------------------------------------------------

    def published(self, events: Sequence[EventRow]) -> None:
        """Take what this node just wrote, durably, in log order."""
        if not self.subscriptions:
            return
        for at, row in enumerate(events):
            if self._reading or row.pos != self.tail + 1:
                self._behind = self._behind or any(e.pos > self.tail for e in events[at:])
                break
            self.tail = row.pos
            self._offer(row)
        self.pump()
        if self._behind and not self._reading:
            self._spawn(self.read_tail())

    def _offer(self, row: EventRow) -> None:
        for subscription in self._by_type.get(row.type, ()):
            if not subscription.live:
                continue
            if subscription.is_full:
                subscription.live = False
                subscription.position = row.pos - 1
                self.read(subscription)
            else:
                subscription.offer(row)

    def pump(self) -> None:
        for subscription in self.subscriptions:
            if subscription.ready:
                subscription.pump()

    async def read_tail(self) -> bool:
        """Read what others wrote since; tell whether there was anything."""
        if self._reading:
            self._behind = True
            return False
        self._reading = True
        found = False
        try:
            while True:
                self._behind = False
                head = await self._store.events_head()
                if head <= self.tail:
                    if self._behind:
                        continue
                    return found
                found = True
                rows = await self._store.read_events(self.tail, head, PAGE, list(self._by_type))
                for row in rows:
                    self.tail = row.pos
                    self._offer(row)
                if len(rows) < PAGE:
                    self.tail = max(self.tail, head)
                self.pump()
                await asyncio.sleep(0)
        finally:
            self._reading = False

    async def catch_up(self) -> None:
        """Return when all that is in the log by now was offered to the live subscriptions."""
        head = await self._store.events_head()
        while self.tail < head:
            await self.read_tail()
            await asyncio.sleep(0)

    # -- behind the tail -----------------------------------------------------------------------

    def read(self, subscription: Subscription) -> None:
        """Let a subscription that is not live read up to the tail."""
        if subscription.reader is None or subscription.reader.done():
            subscription.reader = self._spawn(self._read_up(subscription))

    async def _read_up(self, subscription: Subscription) -> None:
        while not subscription.live:
            if subscription.is_full:
                subscription.room.clear()
                await subscription.room.wait()
            slots = list(subscription.slots)
            after, until = subscription.position, self.tail
            takeovers = subscription.takeovers
            rows: list[EventRow] = []
            if slots and after < until:
                types = subscription.types
                rows = await self._store.read_events(after, until, PAGE, types, slots)
            upto = rows[-1].pos if len(rows) == PAGE else until
            handled = await self._handled(subscription, after, upto)
            if subscription.takeovers != takeovers:
                continue  # slots were taken over meanwhile, which need an earlier start
            for row in rows:
                if row.pos in handled:
                    subscription.pass_over(row)
                else:
                    subscription.offer(row)
            subscription.position = upto
            if upto == self.tail:
                subscription.live = True
            subscription.pump()
            await asyncio.sleep(0)

    async def _handled(self, subscription: Subscription, after: int, until: int) -> set[int]:
        """Return what earlier owners of the slots handled, or took into custody, in this range."""
        known = max((p.known for p in subscription.slots.values()), default=0)
        if after >= known:
            return set()
        slots = list(subscription.slots)
        return await taken_up(self._store, subscription.no, slots, after, min(until, known))


async def taken_up(
    store: EventStore, handler: int, slots: Sequence[int], after: int, until: int
) -> set[int]:
    """Return the events above `after` up to `until` that were handled or taken into custody."""
    found: set[int] = set()
    at = after
    while True:
        parked = await store.parked_events(handler, slots, at, PAGE)
        found.update(row.pos for row in parked)
        if len(parked) < PAGE or parked[-1].pos >= until:
            break
        at = parked[-1].pos
    # After that, since what leaves custody meanwhile is marked by the same commit.
    found.update(mark.pos for mark in await store.marks(handler, after, until))
    return found
