"""Leaps over time in which nothing happens, so that a month costs no more than a moment.

Nodes look around many times a second even if nobody wants anything of them. While that is all, the
clock leaps to the next thing that will happen: a timer of a run, a retry, a sleep in a step or in
the scenario. It is as if all processes had been stopped for that time, but their leases are kept,
and what the storm has in store for them comes later by as much: a storm counts busy time only, so
it hits a process that takes a month in all of its moments.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from heapq import heapify
from typing import Any

from pavane.app import Client
from pavane.engine.duties import Duties
from pavane.engine.pruner import Pruner
from pavane.engine.session import Session
from pavane.engine.timers import DueQueue
from pavane.observe.monitor import MARGIN_US
from pavane.stores.port import LAST_US
from pavane.testing.sim.clock import Stalled
from pavane.testing.sim.process import SimRounds
from pavane.testing.sim.simulation import Simulation

QUIET_US = 50_000
"""Nodes notice within 10 ms what others wrote; after so long without a write, they all have."""
LEAST_US = 100_000
AHEAD_US = 5_000
"""Nodes read what becomes due a little ahead."""
PATIENCE_US = 10_000_000
"""What does not wait for anything has moved by then, by one of the rounds of nodes or customer."""

_ROUNDS = {
    routine.__code__
    for routine in (
        Session._poll_log, Session._tick, Session._read_timers, Pruner.run,  # pyright: ignore
        Client._look_for_ends, Simulation.customer,  # pyright: ignore
    )
}  # fmt: skip
_DUTY = Duties._keep_on.__code__  # pyright: ignore[reportPrivateUsage]
_FIRE_DUE = DueQueue._fire_due  # pyright: ignore[reportPrivateUsage]


class Leaper:
    """Lets the clock of a simulation leap."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._clock = simulation.clock
        self._data: Any = simulation.database.root._data  # pyright: ignore[reportPrivateUsage]
        self._version = -1
        self._since_us = 0
        """Since when nothing was written, and the storm is over."""
        self._settling: list[asyncio.Future[None]] = []
        self._clock.on_quiet = self._look
        self._clock.quiet_us = 0

    async def settle(self) -> None:
        """Return when all that can happen by now has happened, with retries."""
        future = asyncio.get_running_loop().create_future()
        self._settling.append(future)
        self._clock.quiet_us = 0
        await future

    def _look(self) -> None:
        """Leap, if nothing is under way; else say when to look again."""
        clock = self._clock
        if not self._simulation.is_healed:
            self._since_us = clock.now_us
        if self._data.version != self._version:
            self._version, self._since_us = self._data.version, clock.now_us
            clock.quiet_us = clock.now_us + QUIET_US
            return
        clock.quiet_us = clock.now_us + QUIET_US
        if not self._is_calm():
            return
        waits = self._waits()
        if waits is None:
            return
        happens_us, wakes_us = waits
        if self._settling and happens_us >= wakes_us:
            settling, self._settling = self._settling, []
            for future in settling:
                if not future.done():
                    future.set_result(None)
            return
        until_us = min(happens_us, wakes_us)
        if until_us == LAST_US:
            if clock.now_us - self._since_us > PATIENCE_US:
                raise Stalled("Nothing is left to happen.")
        elif until_us - clock.now_us > LEAST_US:
            self._leap(until_us - clock.now_us)

    def _is_calm(self) -> bool:
        """Tell whether the database works and every partition is owned by a node that does."""
        if not self._simulation.database.weather.is_calm(self._clock.now_us):
            return False
        working: set[int | None] = set()
        for node in self._simulation.nodes:
            client, process = node.client, node.process
            if client is not None and client.node is not None and process is not None:
                session = client.node.session
                if session is not None and session.open and not process.loop.is_frozen:
                    working.add(session.fence.node)
        return all(row.owner in working for row in self._data.partitions.values())

    def _waits(self) -> tuple[int, int] | None:
        """Return when something happens next: by itself, and because a run or the customer wakes.

        None if something is under way.
        """
        happens_us, wakes_us = LAST_US, self._wakes_us()
        for when_us, _, loop, what in self._clock.timers:
            if loop is None:
                if not self._is_rounds(what):
                    return None
            elif not what.cancelled() and loop.is_alive and not _is_a_round(what):
                if loop is self._simulation.shop.loop:
                    wakes_us = min(wakes_us, when_us)
                else:
                    happens_us = min(happens_us, when_us)
        for due_us in self._dues_us():
            happens_us = min(happens_us, due_us - AHEAD_US)
        return happens_us, wakes_us

    def _is_rounds(self, what: Any) -> bool:
        """Tell whether something that is no process's doing can be late: rounds, or the storm."""
        owner = _owner(what)
        return isinstance(owner, SimRounds) or owner is self._simulation

    def _wakes_us(self) -> int:
        """Return when the next run wakes, or a conversation is overdue."""
        conversations = self._data.events.conversations.values()
        dues = [row.wake_us - AHEAD_US for row in self._data.waking.values()]
        dues += [
            row.due_us + MARGIN_US for row in conversations if not row.ended_us and not row.raised
        ]
        return min(dues, default=LAST_US)

    def _dues_us(self) -> Iterator[int]:
        """Yield when retries are due; what is due by now is being tried."""
        now_us = self._clock.now_us
        for row in (*self._data.parked.values(), *self._data.events.parked.values()):
            if now_us < row.due_us < LAST_US:
                yield row.due_us

    def _leap(self, by_us: int) -> None:
        clock = self._clock
        clock.now_us += by_us
        clock.leaped_us += by_us
        clock.ends_us += by_us
        for node in self._data.nodes.values():
            node.expires_us += by_us
        storm = self._simulation
        for at, (when_us, serial, loop, what) in enumerate(clock.timers):
            if loop is None and _owner(what) is storm:
                clock.timers[at] = (when_us + by_us, serial, loop, what)
        heapify(clock.timers)


def _owner(what: Any) -> object:
    """Return whose method something is, also if it is a partial one."""
    return getattr(getattr(what, "func", what), "__self__", None)


def _is_a_round(handle: Any) -> bool:
    """Tell whether a timer only makes a node look around, or is found in the store as well."""
    callback = handle.callback
    if getattr(callback, "__func__", None) is _FIRE_DUE:
        return True
    owner: Any = _owner(callback)
    if isinstance(owner, asyncio.Timeout):
        codes = list(_codes(owner._task))  # pyright: ignore
    elif handle.args and isinstance(handle.args[0], asyncio.Future):
        codes = list(_awaiting(handle.args[0]))
    else:
        return False
    return _DUTY in codes or (len(codes) > 1 and codes[-2] in _ROUNDS)


def _awaiting(future: Any) -> Iterator[object]:
    """Yield the code of the coroutines that await a future, outermost first."""
    for callback, _ in future._callbacks or ():
        yield from _codes(getattr(callback, "__self__", None))


def _codes(task: Any) -> Iterator[object]:
    """Yield the code of the coroutines that a task is in, outermost first."""
    coro: Any = getattr(task, "get_coro", lambda: None)()
    while hasattr(coro, "cr_code"):
        yield coro.cr_code
        coro = coro.cr_await
