"""The world outside: what steps and handlers really did, which no crash undoes.

It knows requests by their idempotency key, as good providers do: the same key is answered as it
was the first time. Every request is recorded, whoever sent it and whatever came of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import msgspec

from pavane.testing.sim.clock import Clock, Lost
from pavane.testing.sim.process import here

LATENCY_US = (100, 20_000)
SLOW_PROBABILITY = 0.05
SLOW_US = 400_000


class Unreachable(Exception):
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
        self.is_closed = False
        self._clock = clock
        self._answers: dict[str, Any] = {}

    async def ask(self, what: str, key: str, *args: Any, effect: Callable[[], Any]) -> Any:
        """Send a request and return the answer; `effect` is called for a new key only."""
        await self._wait()
        if self._clock.chance(self.failing / 2):
            raise Unreachable(f"{what} was not received")
        answer = self.act(what, key, *args, effect=effect)
        await self._wait()
        if self._clock.chance(self.failing / 2):
            raise Unreachable(f"{what} was not answered")
        return answer

    def act(self, what: str, key: str, *args: Any, effect: Callable[[], Any]) -> Any:
        """Have it done at once. What `effect` raises is the answer, and leaves the key free."""
        process = here.get()
        if self.is_closed or process is None or not process.is_alive:
            raise Lost
        request = Request(self._clock.at_us, process.number, what, key, args)
        self.requests.append(request)
        if key not in self._answers:
            self._answers[key] = effect()
            self.done[key] = request
            self._clock.note(f"{process.name} had done: {what} {key} {args!r}")
        return self._answers[key]

    async def _wait(self) -> None:
        longest_us = SLOW_US if self._clock.chance(SLOW_PROBABILITY) else LATENCY_US[1]
        await asyncio.sleep(self._clock.between(LATENCY_US[0], longest_us) / 1e6)


outside: ContextVar[Outside] = ContextVar("pavane_sim_outside")
"""What steps of a simulated process act upon."""
