"""What the pruner deletes, and when it goes on; its clock is the store's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from pavane.engine.pruner import Pruner
from pavane.stores.eventlog import EventFilter
from pavane.stores.memory import MemoryStore
from pavane.stores.port import RunFilter
from pavane.testing.event_stores import an_event, published
from pavane.testing.store_check import a_run, write

RETENTION_S = 60.0
NOW_US = 100_000_000
OLD_US = NOW_US - 60_000_001
YOUNG_US = NOW_US - 60_000_000
MOST = MemoryStore.features.prune_max


def with_store(test: Callable[[MemoryStore], Awaitable[None]]) -> Callable[[], None]:
    async def body() -> None:
        store = MemoryStore(8, clock=lambda: NOW_US)
        await store.open()
        await store.register(["shop"])
        await test(store)

    def run() -> None:
        asyncio.run(body())

    return run


@with_store
async def test_runs_and_events_have_the_same_retention(store: MemoryStore) -> None:
    ages = {"old": OLD_US, "young": YOUNG_US}
    await published(store, *(an_event(store, id, at_us=at_us) for id, at_us in ages.items()))
    runs = [
        a_run(store, no, id, status="completed", ended_us=at_us)
        for no, (id, at_us) in enumerate(ages.items(), 1)
    ]
    await write(store, runs=runs)
    assert not await Pruner(store, RETENTION_S).run_once(), "there is no more"
    assert [row.id for row in await store.list_runs(RunFilter())] == ["young"]
    assert [event.id for event in await store.find_events(EventFilter())] == ["young"]


@with_store
async def test_the_pruner_goes_on_while_there_are_old_events(store: MemoryStore) -> None:
    await published(store, *(an_event(store, f"e{n}", at_us=OLD_US) for n in range(MOST + 1)))
    pruner = Pruner(store, RETENTION_S)
    assert await pruner.run_once()
    assert len(await store.find_events(EventFilter())) == 1
    assert not await pruner.run_once()
    assert await store.find_events(EventFilter()) == []


@with_store
async def test_the_pruner_goes_on_while_there_are_old_runs(store: MemoryStore) -> None:
    old = [a_run(store, no, f"r{no}", status="failed", ended_us=OLD_US) for no in range(MOST + 1)]
    await write(store, runs=old)
    pruner = Pruner(store, RETENTION_S)
    assert await pruner.run_once()
    assert not await pruner.run_once()
    assert await store.list_runs(RunFilter()) == []
