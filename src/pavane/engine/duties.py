"""Duties: work that one node at a time does for everybody, such as watching.

A duty has a name under which the nodes that offer it share a partition; whoever owns that does it.
It writes under the fence of its session, so one that lost the partition changes nothing any more.
A duty that fails is begun anew, with growing pauses, and harms nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from pavane.core.tasks import stop_all

if TYPE_CHECKING:
    from pavane.engine.session import Session
    from pavane.stores.port import Store

log = logging.getLogger("pavane.duties")

PAUSE_S = 0.5
PAUSE_MAX_S = 60.0
MARK = "~"
"""Names of duties begin so, which those of services cannot."""
MONITOR = f"{MARK}monitor"


class Duty(Protocol):
    """What is done by one node at a time; `name` begins with `MARK`."""

    @property
    def name(self) -> str: ...
    async def prepare(self, store: Store) -> None:
        """Note in the store that it exists; called by every client that knows it."""
        ...

    async def run(self, session: Session) -> None:
        """Work until cancelled."""
        ...


class Duties:
    """Owns the duties of one session; see the module."""

    def __init__(self, session: Session, duties: Sequence[Duty]) -> None:
        self._session = session
        self._duties = duties
        self._running: dict[int, asyncio.Task[None]] = {}

    def own(self, targets: Sequence[int]) -> None:
        """Begin the duties of these partitions."""
        for duty in self._duties:
            target = self._session.store.target_of(duty.name, duty.name)
            if target in targets and target not in self._running:
                work = asyncio.get_running_loop().create_task(self._keep_on(duty))
                self._running[target] = work

    async def give(self, targets: set[int]) -> None:
        """Stop the duties of these partitions."""
        await stop_all([self._running.pop(t) for t in targets & self._running.keys()])

    @property
    def is_idle(self) -> bool:
        """Whether this session has no duty to do."""
        return not self._running

    async def close(self) -> None:
        await self.give(set(self._running))

    async def _keep_on(self, duty: Duty) -> None:
        pause_s = PAUSE_S
        while self._session.open:
            began_s = asyncio.get_running_loop().time()
            try:
                await duty.run(self._session)
            except Exception:
                if not self._session.open:
                    return
                if asyncio.get_running_loop().time() - began_s > PAUSE_MAX_S:
                    pause_s = PAUSE_S
                log.exception("%s failed and begins anew in %.1f s", duty.name, pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(PAUSE_MAX_S, 2 * pause_s)


def monitor_name(contract: str) -> str:
    """Return the name of the duty that watches the conversations of a contract."""
    return f"{MONITOR}.{contract}"


def without_duties(names: Sequence[str]) -> list[str]:
    """Return those of `names` that are services."""
    return [name for name in names if not name.startswith(MARK)]
