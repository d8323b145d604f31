"""Workers in this process on one store: all services on one node, or one node per service."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any, Literal, TypeVar

import apsw
import asyncpg

from pavane import App, Client, EngineConfig, Run, Service, UnknownRun
from pavane.core.operations import Mode
from pavane.workflow import Workflow

Layout = Literal["one node", "a node each"]
MODES: tuple[Mode, ...] = ("orchestration", "choreography")
LAYOUTS: tuple[Layout, ...] = ("one node", "a node each")
DEADLINE_S = 60.0
PATIENT_S = 15.0
"""A lease that no pause of the machine ends, for what must hold as long as it is held."""
BUSY_MS = 20_000
T = TypeVar("T")


def in_loop(
    test: Callable[..., Coroutine[Any, Any, None]], within_s: float = 2 * DEADLINE_S
) -> Callable[..., None]:
    """Run an asynchronous test in a loop of its own, within some time."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def body() -> None:
            async with asyncio.timeout(within_s):
                await test(*args, **kwargs)

        asyncio.run(body())

    return run


Place = Path | str
"""A store's file, or the address of its database."""


async def rows(place: Place, sql: str) -> list[tuple[Any, ...]]:
    """Execute a statement that both kinds of database understand in a store."""
    if isinstance(place, Path):
        with closing(apsw.Connection(str(place))) as file:
            file.set_busy_timeout(BUSY_MS)
            return file.execute(sql).fetchall()
    connection = await asyncpg.connect(place, server_settings={"search_path": "pavane, public"})
    try:
        return [tuple(row) for row in await connection.fetch(sql)]
    finally:
        await connection.close()


class World:
    """A store (a file, or an address) and how its services are spread over nodes."""

    def __init__(self, path: Place, mode: Mode, layout: Layout) -> None:
        self.path = path
        self.mode: Mode = mode
        self.layout: Layout = layout

    def app(self, services: Sequence[Service], **config: Any) -> App:
        patient = EngineConfig(**{"lease_s": PATIENT_S, **config})
        return App("world", services, store=str(self.path), config=patient)

    @asynccontextmanager
    async def working(self, *services: Service, **config: Any) -> AsyncIterator[Director]:
        """Work for all services until the block ends; yield what starts runs."""
        app = self.app(services, **config)
        async with AsyncExitStack() as stack:
            if self.layout == "one node":
                workers = [await stack.enter_async_context(app.worker())]
                client = workers[0]
            else:
                workers = [
                    await stack.enter_async_context(app.worker([service.name]))
                    for service in services
                ]
                client = await stack.enter_async_context(app.connect())
            yield Director(client, workers, self.mode)

    @asynccontextmanager
    async def idle(self, *services: Service) -> AsyncIterator[Director]:
        """Yield what starts runs, with nobody working."""
        async with self.app(services).connect() as client:
            yield Director(client, [], self.mode)


class Director:
    """Starts runs in one mode."""

    def __init__(self, client: Client, workers: list[Client], mode: Mode) -> None:
        self.client = client
        self.workers = workers
        self.mode: Mode = mode

    async def start(self, flow: Workflow[..., Any], *args: Any, **options: Any) -> Run[Any]:
        return await self.client.start(flow, *args, **{"mode": self.mode, **options})

    async def result(self, flow: Workflow[..., Any], *args: Any, **options: Any) -> Any:
        run = await self.start(flow, *args, **options)
        return await run.result(timeout=DEADLINE_S)

    def get(self, id: str) -> Run[Any]:
        return self.client.get(id)


async def until(condition: Callable[[], Awaitable[T]], what: str = "") -> T:
    """Return what `condition` gives as soon as it is true; fail after the deadline."""
    ends = time.monotonic() + DEADLINE_S
    while True:
        found = await condition()
        if found:
            return found
        assert time.monotonic() < ends, f"waited in vain for {what or condition}"
        await asyncio.sleep(0.005)


async def until_asleep(begin: Callable[[float], Awaitable[Run[Any]]], for_s: float) -> Run[Any]:
    """Begin a run that sleeps for so long, and once it does return it.

    If it was awake before anybody saw it asleep, since the machine paused, begin one that sleeps
    for longer.
    """
    while not await falls_asleep(run := await begin(for_s)):
        for_s *= 4
    return run


async def falls_asleep(run: Run[Any]) -> bool:
    """Wait until the run sleeps, or has completed; tell whether it sleeps."""

    async def sleeps_or_slept() -> str:
        status = await run.status()
        return status.status if status.status == "completed" or "timer" in status.reason else ""

    return await until(sleeps_or_slept, "a run that sleeps") != "completed"


async def until_status(run: Run[Any], *statuses: str, reason: str = "") -> Any:
    """Wait until the run has one of these statuses, with `reason` in its reason."""

    async def reached() -> Any:
        try:
            status = await run.status()
        except UnknownRun:  # a child that is about to start
            return None
        return status if status.status in statuses and reason in status.reason else None

    try:
        return await until(reached)
    except AssertionError:
        raise AssertionError(f"{statuses} {reason!r} never came: {await run.history()}") from None
