"""The watch: tells that someone wrote, by NOTIFY where that works, by the clock everywhere.

The clock is that of the lease where there is one: who renews it sees the heads of the logs as well.

A wake-up is never needed: whoever is told only looks earlier. What this process wrote is announced
from the background, at most every few milliseconds and in a statement of its own, since a NOTIFY
takes a lock of the whole server until its commit. Behind a pooler in transaction mode LISTEN does
not work; then all look as often as it takes.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from pavane.core.tasks import stop_all
from pavane.errors import StoreError
from pavane.stores.postgres.connection import (
    FAILED,
    QUICK_S,
    Connection,
    answered,
    connect,
    explained,
    is_lost,
)

log = logging.getLogger("pavane.postgres")

CHANNEL = "pavane"
ANNOUNCE_EVERY_S = 0.005
LOOK_S = 2.0
"""How often to look although nobody was heard, and nothing was seen."""
LISTEN_AFTER_S = 0.1
"""What is done sooner, as most commands are, need not listen. Of a connection that is given up
while it is made, asyncpg sometimes logs an error."""
LOOK_DEAF_S = 0.05
LOOK_DEAF_MAX_S = 0.5
PROBE_S = 2.0
DEAF_S = 30.0
"""After how long a process that heard nothing of its probe tries again: it may have been slow."""
DEAF_MAX_S = 600.0
PAUSE_S = 0.1
FINISH_S = 1.0
"""How long to try to announce the last of it when a store is closed."""
HEARTBEAT_S = 30.0
"""How often the connection that listens is asked whether it is there: it says nothing by itself.
What is not heard because of that is seen when the lease is renewed."""
AGAIN_MAX_S = 10.0

_RESTS = "expires_us > pavane.clock_us() + lease_us"
_NOTIFY = (
    f"SELECT pg_backend_pid(), EXISTS (SELECT FROM pavane.nodes WHERE {_RESTS})"
    " FROM set_config('synchronous_commit', 'off', true), pg_notify($1, '')"
)
"""A hint need not outlive a crash of the server, so nobody waits for its disk."""
_CALL = (
    "UPDATE pavane.nodes SET expires_us = pavane.clock_us() + lease_us WHERE no IN"
    f" (SELECT no FROM pavane.nodes WHERE {_RESTS} ORDER BY no FOR NO KEY UPDATE SKIP LOCKED)"
    " RETURNING no"
)
"""Nodes that rest are to answer a notification by renewing their leases. One that is locked does
that just now, or another process calls it."""


class Watch:
    """Owns the connection that listens; `ask` returns a row from some other connection."""

    def __init__(self, dsn: str, ask: Callable[..., Awaitable[Any]]) -> None:
        self._dsn = dsn
        self._ask = ask
        self._listening: Connection | None = None
        self._heard: asyncio.Event | None = None
        self._probed = asyncio.Event()
        self._changed = True
        self._seen: tuple[tuple[int, int], bool, float] | None = None
        """What was seen last, if it was not judged yet, and how long to rely on seeing more."""
        self._heads = (-1, -1)
        self._look_at = 0.0
        self._look_s = LOOK_DEAF_S
        self._to_announce: asyncio.Event = asyncio.Event()
        self._announced = True
        self._own_pids: set[int] = set()
        self._tasks: list[asyncio.Task[None]] = []

    def open(self) -> None:
        loop = asyncio.get_running_loop()
        self._clock = loop.time
        self._tasks = [loop.create_task(self._announce()), loop.create_task(self._listen())]

    async def close(self) -> None:
        await stop_all(self._tasks)
        self._tasks.clear()
        self._drop()

    @property
    def hears(self) -> bool:
        """Whether wake-ups of other processes arrive."""
        return self._heard is not None and self._heard.is_set()

    async def probed(self) -> bool:
        """Return `hears` as soon as a probe has told, or cannot."""
        with suppress(TimeoutError):
            async with asyncio.timeout(2 * PROBE_S):
                await self._probed.wait()
        return self.hears

    def changed(self) -> bool:
        """Whether someone may have written since the last call."""
        now = self._clock()
        seen, self._seen = self._seen, None
        if seen is not None:
            heads, is_staged, within_s = seen
            self._changed = self._changed or is_staged or heads != self._heads
            self._heads = heads
            if self.hears:
                self._look_at = now + max(LOOK_S, within_s)
        if self._changed:
            self._look_s = LOOK_DEAF_S
        elif now < self._look_at:
            return False
        else:
            self._look_s = min(LOOK_DEAF_MAX_S, self._look_s * 1.5)
        self._changed = False
        # Not in step with other nodes, which began when this one did, perhaps.
        pause_s = LOOK_S if self.hears else self._look_s
        self._look_at = now + pause_s * (0.75 + random.random() / 2)
        return True

    def saw(self, heads: tuple[int, int], is_staged: bool, within_s: float) -> None:
        """Note the ends of the logs, and whether events wait to be moved there; from any thread.

        This process is to see them again `within_s`.
        """
        self._seen = heads, is_staged, within_s

    def wake(self) -> None:
        """Note that this process wrote something that it has yet to read."""
        self._changed = True

    def announce(self) -> None:
        """Note that this process wrote something that others may want to know."""
        self._announced = False
        self._to_announce.set()

    async def finish(self) -> None:
        """Announce what is not announced yet, before others have to find it by looking."""
        if not self._announced:
            with suppress(Exception):
                async with asyncio.timeout(FINISH_S):
                    await self._tell()

    # -- speaking ------------------------------------------------------------------------------

    async def _announce(self) -> None:
        while True:
            await self._to_announce.wait()
            self._to_announce.clear()
            with suppress(Exception):  # those who are not told look by themselves
                await self._tell()
            self._announced = not self._to_announce.is_set()
            await asyncio.sleep(ANNOUNCE_EVERY_S)

    async def _tell(self) -> None:
        pid, is_one_at_rest = await self._ask(_NOTIFY, CHANNEL)
        self._own_pids.add(pid)
        if is_one_at_rest:
            await self._ask(_CALL)

    # -- listening -----------------------------------------------------------------------------

    async def _listen(self) -> None:
        """Listen, and again after each loss, with growing pauses."""
        await asyncio.sleep(LISTEN_AFTER_S)
        pause_s, deaf_s = PAUSE_S, DEAF_S
        while True:
            wait_s, pause_s = pause_s, min(AGAIN_MAX_S, pause_s * 2)
            try:
                if await self._hear():
                    wait_s = pause_s = PAUSE_S
                    deaf_s = DEAF_S
                else:
                    if deaf_s == DEAF_S:
                        log.info(
                            "no notifications arrive (a pooler in transaction mode?): this process "
                            "looks every %g ms instead, up to %g ms when idle",
                            LOOK_DEAF_S * 1e3, LOOK_DEAF_MAX_S * 1e3,
                        )  # fmt: skip
                    wait_s, deaf_s = deaf_s, min(DEAF_MAX_S, deaf_s * 2)
            except (*FAILED, StoreError) as error:
                if not (is_lost(error) or isinstance(error, StoreError)):
                    log.warning("this process cannot listen: %s", explained(self._dsn, error))
            finally:
                self._drop()
            await asyncio.sleep(wait_s * (0.5 + random.random()))

    async def _hear(self) -> bool:
        """Listen until the connection is lost; False if nothing is to be heard that way."""
        self._listening = connection = await connect(self._dsn)
        gone = asyncio.Event()

        def lost(_: Connection) -> None:
            gone.set()

        connection.add_termination_listener(lost)
        self._heard = asyncio.Event()
        listening = connection.add_listener(CHANNEL, self._notified)
        await answered(connection, listening, QUICK_S)
        self._changed = True  # what was announced meanwhile was not heard
        if await self._probe():
            while not gone.is_set():
                await answered(connection, connection.execute("SELECT 1"), QUICK_S)
                with suppress(TimeoutError):
                    async with asyncio.timeout(HEARTBEAT_S):
                        await gone.wait()
            return True
        await answered(connection, connection.execute("SELECT 1"), QUICK_S)  # or was it lost?
        return False

    async def _probe(self) -> bool:
        """Tell whether notifications arrive, by one of our own."""
        assert self._heard is not None
        await self._ask("SELECT pg_notify($1, 'probe')", CHANNEL)
        with suppress(TimeoutError):
            async with asyncio.timeout(PROBE_S):
                await self._heard.wait()
        self._probed.set()
        return self._heard.is_set()

    def _notified(self, _: Any, pid: int, __: str, payload: str) -> None:
        if self._heard is not None:
            self._heard.set()
        if pid not in self._own_pids or payload:
            self._changed = True

    def _drop(self) -> None:
        connection, self._listening = self._listening, None
        self._heard = None
        if connection is not None and not connection.is_closed():
            connection.terminate()
