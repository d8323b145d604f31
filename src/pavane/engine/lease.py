"""The lease: proof that this node is alive, renewed from a thread of its own.

The thread renews only if the event loop ran since the last round, so that a stuck node loses its
partitions to others. Whether the lease is still held is decided by the store alone.

A store that was away let the leases of all nodes run out. Whoever finds it first must not take over
from the others, who are alive and about to renew: `is_steady` tells when they have had the time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from pavane.engine.process import Process, Rounds
from pavane.errors import StoreError
from pavane.stores.port import Fence, Glance, Store

log = logging.getLogger("pavane.lease")


class LeaseKeeper:
    """Renews `fence` until stopped; tells on the event loop what it saw, or that it is lost."""

    def __init__(
        self, store: Store, fence: Fence, process: Process, lost: Callable[[], None],
        saw: Callable[[Glance], None],
    ) -> None:  # fmt: skip
        self._store = store
        self._fence = fence
        self._process = process
        self._lost = lost
        self._saw = saw
        self._loop = asyncio.get_running_loop()
        self._alive = True
        self._rounds: Rounds | None = None
        self._renewed_us = store.now_us()
        self._steady_from_us = 0

    @property
    def is_steady(self) -> bool:
        """Whether the store answered this node all the time for at least a lease."""
        now_us = self._store.now_us()
        is_late = now_us - self._renewed_us > self._fence.lease_us
        return not is_late and now_us >= self._steady_from_us

    def start(self) -> None:
        self._rounds = self._process.repeat(self._fence.lease_us / 1e6 / 4, self._renew)

    async def stop(self) -> None:
        if self._rounds is not None:
            await self._rounds.stop()

    def _renew(self) -> bool:
        """Renew, unless the event loop is stuck; tell whether to go on with it."""
        if not self._alive:
            return True  # the event loop did not run since the last renewal
        self._alive = False
        try:
            self._loop.call_soon_threadsafe(self._beat)
            glance = self._store.renew(self._fence)
            if glance is None:
                self._loop.call_soon_threadsafe(self._lost)
                return False
            self._renewed()
            self._loop.call_soon_threadsafe(self._saw, glance)
        except StoreError as error:
            log.warning("the lease could not be renewed: %s", error)
        except RuntimeError:
            return False  # the event loop was closed
        return True

    def _renewed(self) -> None:
        before_us, self._renewed_us = self._renewed_us, self._store.now_us()
        if self._renewed_us - before_us > self._fence.lease_us:
            self._steady_from_us = self._renewed_us + self._fence.lease_us

    def _beat(self) -> None:
        self._alive = True
