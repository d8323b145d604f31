"""The lease: proof that this node is alive, renewed from a thread of its own.

The thread renews only if the event loop ran since the last round, so that a stuck node loses its
partitions to others. Whether the lease is still held is decided by the store alone.

Nodes that have nothing to do rest: they prolong their leases for long and seldom, so that a hundred
of them cost the store no more than a few. Whoever writes something that may concern a node that
rests shortens its lease to what it was, and wakes it; one that does not answer is given up as any.

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

ROUNDS = 4
"""How often a lease is prolonged in its time."""
REST_MAX_S = 80.0
"""How long at most the lease is of a node that rests."""


class LeaseKeeper:
    """Renews `fence` until stopped; tells on the event loop what it saw, or that it is lost."""

    def __init__(
        self, store: Store, fence: Fence, process: Process, glance_s: float,
        lost: Callable[[], None], saw: Callable[[Glance], None],
    ) -> None:  # fmt: skip
        self._store = store
        self._fence = fence
        self._process = process
        self._glance_s = glance_s
        self._lost = lost
        self._saw = saw
        self._loop = asyncio.get_running_loop()
        self._alive = True
        self.rests = False
        self._others = 0
        self._rounds: Rounds | None = None
        self._renewed_us = store.now_us()
        self._prolonged_us = fence.lease_us
        """For how long the lease was prolonged last."""
        self._steady_from_us = 0
        self._is_answered = True
        """Whether the store answered the last time."""

    @property
    def is_steady(self) -> bool:
        """Whether the store answered this node all the time for at least a lease."""
        now_us = self._store.now_us()
        is_late = now_us - self._renewed_us > self._prolonged_us
        return self._is_answered and not is_late and now_us >= self._steady_from_us

    def start(self) -> None:
        self._rounds = self._process.repeat(lambda: self._lease_us / 1e6 / ROUNDS, self._renew)

    async def stop(self) -> None:
        if self._rounds is not None:
            await self._rounds.stop()

    def rest(self) -> None:
        """Prolong the lease for long from the next round on: there is nothing to do."""
        self.rests = True

    def rouse(self) -> None:
        """Prolong it for as long as usual again, at once: there may be something to do."""
        if self.rests:
            self.rests = False
            if self._rounds is not None:
                self._rounds.hurry()

    @property
    def _lease_us(self) -> int:
        """For how long to prolong the lease."""
        usual_us = self._fence.lease_us
        if not self.rests:
            return usual_us
        rest_s = min(REST_MAX_S, ROUNDS * self._glance_s * (self._others + 1))
        return max(usual_us, round(rest_s * 1e6))

    def _renew(self) -> bool:
        """Renew, unless the event loop is stuck; tell whether to go on with it."""
        if not self._alive:
            return True  # the event loop did not run since the last renewal
        self._alive = False
        lease_us = self._lease_us
        try:
            self._loop.call_soon_threadsafe(self._beat)
            fence = Fence(self._fence.node, self._fence.nonce, lease_us)
            glance = self._store.renew(fence)
            if glance is None:
                self._loop.call_soon_threadsafe(self._lost)
                return False
            self._is_answered = True
            self._others = glance.roster[0]
            self._renewed(lease_us)
            self._loop.call_soon_threadsafe(self._saw, glance)
        except StoreError as error:
            log.warning("the lease could not be renewed: %s", error)
            # The leases of others may be over by now, whose nodes find the store as this one does.
            self._is_answered = self.rests = False
            self._prolonged_us = self._fence.lease_us
        except RuntimeError:
            return False  # the event loop was closed
        return True

    def _renewed(self, lease_us: int) -> None:
        before_us, self._renewed_us = self._renewed_us, self._store.now_us()
        if self._renewed_us - before_us > self._prolonged_us:
            self._steady_from_us = self._renewed_us + self._fence.lease_us
        self._prolonged_us = lease_us

    def _beat(self) -> None:
        self._alive = True
