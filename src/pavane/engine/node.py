"""A node: one process that hosts services, and joins the others of its store again when it must."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from pavane.engine.config import EngineConfig
from pavane.engine.duties import Duty
from pavane.engine.process import Process
from pavane.engine.registry import Registry
from pavane.engine.session import Session
from pavane.errors import PavaneError, StoreError
from pavane.handler import Handler
from pavane.service import Step
from pavane.stores.port import Fence, RunRow, Store, Touched

log = logging.getLogger("pavane.node")

PAUSE_MIN_S, PAUSE_MAX_S = 0.1, 3.0
"""How long to wait before joining again, when the session before did not last a lease."""
GC_YOUNG = 50_000
NAMED_MAX = 5


class Node:
    """Hosts `services` until stopped; see the module."""

    def __init__(
        self,
        store: Store,
        registry: Registry,
        services: Sequence[str],
        config: EngineConfig,
        ended: Callable[[RunRow], None],
        duties: Sequence[Duty] = (),
        process: Process | None = None,
    ) -> None:
        for service in services:
            registry.service(service)
        _check_transactions(registry.transactions_of(services), store)
        self._store = store
        self._registry = registry
        self.services = list(services)
        self._config = config
        self._ended = ended
        self._duties = duties
        self._process = process or Process()
        self.session: Session | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._stopping = False
        self.drained = asyncio.Event()
        """Set when people asked this node to drain, and it did: it works no more."""
        self._is_draining = False
        self._lost: list[tuple[Fence, list[Touched]]] = []
        """Sessions that were lost and are still to be left: this process did not die."""

    async def start(self) -> None:
        """Join the store's other nodes and begin to work; raise if the store cannot be used."""
        _calm_garbage_collector()
        await self._store.register(sorted(self._registry.services))
        await self._store.register([duty.name for duty in self._duties])
        await self._join()
        self._supervisor = asyncio.get_running_loop().create_task(self._supervise())

    async def _join(self) -> None:
        while self._lost:
            await self._store.leave(*self._lost[0])
            del self._lost[0]
        lease_us = round(self._config.lease_s * 1e6)
        process = self._process
        name = f"{_spelled(self.services)}-{process.pid}"
        offered = [*self.services, *(duty.name for duty in self._duties)]
        row = await self._store.join(name, process.host, process.pid, offered, lease_us)
        fence = Fence(row.no, row.nonce, lease_us)
        session = Session(
            self._store, self._registry, self.services, self._config, fence, self._ended,
            process, self._duties,
        )  # fmt: skip
        try:
            await session.start()
        except BaseException:
            await self._put_away(session)  # else it would renew its lease for ever
            raise
        self.session = session

    async def _put_away(self, session: Session) -> None:
        """Close a session that is lost; it is left before the next one joins."""
        await session.close()
        self._lost.append((session.fence, list(session.deaths.touched.values())))

    async def _supervise(self) -> None:
        """Join again each time the session is lost; with growing pauses if it did not last.

        When the store failed, its connections are not trusted any more.
        """
        loop = asyncio.get_running_loop()
        pause_s = 0.0
        joined_s = loop.time()
        failure: PavaneError | None = None
        while not self._stopping:
            session = self.session
            if session is not None:
                failure = await asyncio.shield(session.failure)
                if failure is None:
                    self._is_draining = True
                    await self._drain()
                    return
                self.session = None
                await self._put_away(session)
                if loop.time() - joined_s > self._config.lease_s:
                    pause_s = 0.0
            await asyncio.sleep(pause_s * (0.5 + self._process.random()))
            pause_s = min(PAUSE_MAX_S, max(PAUSE_MIN_S, 2 * pause_s))
            try:
                if isinstance(failure, StoreError):
                    log.warning("this node opens its store anew")
                    await self._store.reopen()
                await self._join()
                joined_s = loop.time()
            except PavaneError as error:
                failure = error
                log.error("this node cannot join: %s", error)

    async def stop(self) -> None:
        """Drain and leave; runs go on at other nodes, or when one starts again."""
        self._stopping = True
        if self._supervisor is not None:
            if not self._is_draining:
                self._supervisor.cancel()
            with suppress(asyncio.CancelledError):
                await self._supervisor
        await self._drain()

    async def _drain(self) -> None:
        try:
            if self.session is not None:
                await self.session.drain()
        finally:
            self.session = None
            self.drained.set()


def _spelled(services: Sequence[str]) -> str:
    """Name some of the services, so that the name of a node fits a line of a log or table."""
    if len(services) <= NAMED_MAX:
        return "+".join(services)
    return f"{'+'.join(services[: NAMED_MAX - 1])}+{len(services) - NAMED_MAX + 1}-more"


def _check_transactions(declared: Sequence[Step[..., Any] | Handler], store: Store) -> None:
    """Refuse what the store cannot run inside its own transaction."""
    features = store.features
    if declared and not features.transactions:
        raise StoreError(
            f"{', '.join(map(repr, declared))} must run inside the store's own transaction, and a "
            f"{type(store).__name__} gives no connection to it. Use an SQLite or Postgres store."
        )
    unfit = [repr(it) for it in declared if it.is_async != features.awaits_work]
    if unfit:
        wanted = "`async def`: its connection is asyncpg's" if features.awaits_work else (
            "a plain `def`: its connection is APSW's, on the thread that writes"
        )  # fmt: skip
        raise StoreError(
            f"{', '.join(unfit)} must run inside the transaction of a {type(store).__name__}. "
            f"Write it as {wanted}."
        )


def _calm_garbage_collector() -> None:
    """Collect less often: the engine makes no cycles, and collecting took a third of its time."""
    young, middle, old = gc.get_threshold()
    if young:
        gc.set_threshold(max(young, GC_YOUNG), max(middle, 20), max(old, 20))
