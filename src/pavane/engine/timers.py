"""Timers: what is due soon, in memory; the rest waits in the store.

Two queues of one shape, runs that wake and parked steps that are due. Each reads the store ahead
by a horizon, page by page, so that a million sleepers cost no memory. Nor does a crowd of them that
is due at once, as after an outage: the next are taken up when those before are under way again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from heapq import heappop, heappush
from typing import Any

from pavane.stores.port import LAST_US

HORIZON_US = 25_000_000
PAGE = 1000
HEAP_MAX = 10_000
BURST = 200
TAKING_UP_MAX = 400
"""How many keys may be fired and not taken up yet: one burst is read while another is written.
Whoever comes meanwhile waits behind these, not behind a crowd."""

Key = tuple[str, str]
Found = tuple[int, Any, Key, Any]
"""What the store read: due time in µs, tie-break, key, and what `fire` is given with the key."""
Reader = Callable[[Sequence[int], tuple[int, Any], int, int], Awaitable[Sequence[Found]]]
Fire = Callable[[Sequence[tuple[Key, Any]]], asyncio.Future[None]]
"""Begins to take up what is due; its future is done when that is taken up."""


class DueQueue:
    """Calls `fire` with keys that are due, each with what `read` found for it, or None.

    `read(targets, after, until_us, limit)` returns what is due, in order. A key has one due time;
    the earliest counts, and firing early or twice is harmless by contract.
    """

    def __init__(self, now_us: Callable[[], int], read: Reader, first_tie: Any, fire: Fire) -> None:
        self._now_us = now_us
        self._read = read
        self._first_tie = first_tie
        self._fire = fire
        self._heap: list[tuple[int, int, Key]] = []
        self._due: dict[Key, tuple[int, Any]] = {}
        self._serial = 0
        self._taking_up = 0
        self._cursor: tuple[int, Any] = (0, first_tie)
        self._until = 0
        """Up to when it was read ahead, or is being read, in the partitions owned by then."""
        self._handle: asyncio.TimerHandle | None = None
        self._handle_at = 0
        self._loop = asyncio.get_running_loop()
        self.closed = False

    def schedule(self, key: Key, due_us: int, found: Any = None) -> None:
        """Fire `key` at `due_us`, if that is soon; later ones are found in the store in time.

        `found` is what `read` would find for it, if that is known.
        """
        if due_us > self._cursor[0] and due_us > self._now_us() + HORIZON_US:
            return
        known = self._due.get(key)
        if known is not None and known[0] <= due_us:
            return
        self._push(due_us, key, found)
        self._arm()

    def _push(self, due_us: int, key: Key, found: Any) -> None:
        self._due[key] = (due_us, found)
        self._serial += 1
        heappush(self._heap, (due_us, self._serial, key))

    def forget(self, key: Key) -> None:
        self._due.pop(key, None)

    def _arm(self) -> None:
        if self.closed or not self._heap or self._taking_up >= TAKING_UP_MAX:
            return
        at = self._heap[0][0]
        if self._handle is not None:
            if self._handle_at <= at:
                return
            self._handle.cancel()
        self._handle_at = at
        delay_s = max(0.0, (at - self._now_us()) / 1e6)
        self._handle = self._loop.call_later(delay_s, self._fire_due)

    def _fire_due(self) -> None:
        self._handle = None
        now = self._now_us()
        due: list[tuple[Key, Any]] = []
        while self._heap and self._heap[0][0] <= now and len(due) < BURST:
            due_us, _, key = heappop(self._heap)
            known = self._due.get(key)
            if known is not None and known[0] == due_us:
                del self._due[key]
                due.append((key, known[1]))
        if due:
            self._taking_up += len(due)
            self._fire(due).add_done_callback(partial(self._taken_up, len(due)))
        self._arm()

    def _taken_up(self, count: int, _: asyncio.Future[None]) -> None:
        self._taking_up -= count
        self._arm()

    async def poll(self, targets: Sequence[int]) -> None:
        """Read ahead what becomes due within the horizon, in all owned partitions."""
        self._until = self._now_us() + HORIZON_US
        self._cursor = await self._read_up(targets, self._cursor, self._until)

    async def first_us(self, targets: Sequence[int], until_us: int) -> int:
        """Return when the first is due by what the store knows; LAST_US if none is until then."""
        rows = await self._read(targets, (0, self._first_tie), until_us, 1)
        return rows[0][0] if rows else LAST_US

    async def catch_up(self, targets: Sequence[int]) -> None:
        """Read in newly owned partitions what `poll` has passed by, or is about to."""
        await self._read_up(targets, (0, self._first_tie), self._until)

    async def _read_up(
        self, targets: Sequence[int], after: tuple[int, Any], until: int
    ) -> tuple[int, Any]:
        while not self.closed:
            while len(self._heap) >= HEAP_MAX and not self.closed:
                await asyncio.sleep(0.005)
            rows = await self._read(targets, after, until, PAGE)
            for due_us, _, key, found in rows:
                if key not in self._due:
                    self._push(due_us, key, found)
            self._arm()
            if len(rows) < PAGE:
                break
            after = (rows[-1][0], rows[-1][1])
        return (until, self._first_tie)

    def close(self) -> None:
        self.closed = True
        if self._handle is not None:
            self._handle.cancel()
