"""The world outside: what steps and handlers really did, which no crash undoes.

It knows requests by their idempotency key, as good providers do: the same key is answered as it
was the first time. Every request is recorded, whoever sent it and whatever came of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from random import Random
from typing import Any

import msgspec

from pavane.testing.sim.clock import Clock, Lost
from pavane.testing.sim.process import SimProcess, here

LATENCY_US = (100, 20_000)
SLOW_PROBABILITY = 0.05
SLOW_US = 400_000


class Unreachable(ConnectionError):
    """The world did not answer; whether it did what was asked for is unknown."""


class Request(msgspec.Struct, frozen=True):
    """What was asked for, by whom."""

    at_us: int
    process: int
    what: str
    key: str
    args: tuple[Any, ...]


class Outside:
    """See the module."""

    def __init__(self, clock: Clock) -> None:
        self.requests: list[Request] = []
        self.done: dict[str, Request] = {}
        """What took effect, by key, in order."""
        self.failing = 0.0
        self.model: Any = None
        """What a scenario keeps of it: balances, stock and the like."""
        self.watchers: list[Callable[[Request, SimProcess], None]] = []
        """Told of each request before it is answered."""
        self.is_closed = False
        self._clock = clock
        self._answers: dict[str, Any] = {}

    async def ask(self, what: str, key: str, *args: Any, effect: Callable[[], Any]) -> Any:
        """Send a request and return the answer; `effect` is called for a new key only."""

        async def act() -> Any:
            return self.act(what, key, *args, effect=effect)

        return await self.reach(what, act)

    async def reach(
        self, what: str, work: Callable[[], Awaitable[Any]], random: Random | None = None
    ) -> Any:
        """Do some work outside: it takes time to get there and back, and either way may fail.

        With `random`, what chance brings does not depend on what else happens.
        """
        random = random or self._clock.random
        await self._wait(random)
        self._perhaps_fail(f"{what} was not received", random)
        answer = await work()
        await self._wait(random)
        self._perhaps_fail(f"{what} took effect, and was not answered", random)
        return answer

    def _perhaps_fail(self, how: str, random: Random) -> None:
        if self.failing and random.random() < self.failing / 2:
            process = here.get()
            self._clock.note(f"fault: {how}" + (f" ({process.name})" if process else ""))
            raise Unreachable(how)

    def act(self, what: str, key: str, *args: Any, effect: Callable[[], Any]) -> Any:
        """Have it done at once. What `effect` raises is the answer, and leaves the key free."""
        process = here.get()
        if self.is_closed or process is None or not process.is_alive:
            raise Lost
        request = Request(self._clock.at_us, process.number, what, key, args)
        self.requests.append(request)
        for watch in self.watchers:
            watch(request, process)
        if key not in self._answers:
            self._answers[key] = effect()
            self.done[key] = request
            self._clock.note(f"{process.name} had done: {what} {key} {args!r}")
        return self._answers[key]

    async def _wait(self, random: Random) -> None:
        longest_us = SLOW_US if random.random() < SLOW_PROBABILITY else LATENCY_US[1]
        away_us = LATENCY_US[0] + int(random.random() * (longest_us - LATENCY_US[0] + 1))
        await asyncio.sleep(away_us / 1e6)


outside: ContextVar[Outside] = ContextVar("pavane_sim_outside")
"""What steps of a simulated process act upon."""
