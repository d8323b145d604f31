"""Nodes that have nothing to do rest: they renew their leases seldom, until they are called."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count, islice
from pathlib import Path

import pytest

from pavane import App, Client, EngineConfig, Service
from pavane.core.tasks import stop_all
from pavane.engine.lease import REST_MAX_S
from pavane.engine.session import Session
from pavane.stores.memory import MemoryStore
from pavane.stores.port import Fence, JournalRow, Store
from pavane.stores.postgres import PostgresStore, watch
from pavane.testing.event_stores import an_event
from pavane.testing.store_check import LEASE_US, SERVICES, joined, write
from pavane.testing.stores import a_message
from tests.integration.world import in_loop, until
from tests.postgres import Database

LEASE_S = 6.0
inn = Service("inn")
may_end = asyncio.Event()
numbers = count()


@inn.step
async def cook(dish: str) -> str:
    if dish == "roast":
        await may_end.wait()
    return dish


@inn.workflow
async def dine(dish: str) -> str:
    return await cook(dish)


@inn.workflow
async def nap(for_s: float) -> None:
    await asyncio.sleep(for_s)


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setenv("PAVANE_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(watch, "PROBE_S", 30.0)
    may_end.clear()
    with Database() as url:
        yield url


@asynccontextmanager
async def workers(url: str) -> AsyncIterator[list[Client]]:
    """Work with three nodes, each of which holds its share and rests for as long as a node may."""
    config = EngineConfig(lease_s=LEASE_S, rest_after_s=1.0, glance_s=REST_MAX_S)
    async with AsyncExitStack() as stack:
        apps = [App("inn", [inn], store=url, config=config) for _ in range(3)]
        nodes = [await stack.enter_async_context(app.worker()) for app in apps]

        async def shared() -> bool:
            return sorted(len(session_of(it).owned) for it in nodes) == [10, 11, 11]

        await until(shared, "a share for each")
        yield nodes


def session_of(worker: Client) -> Session:
    assert worker.node is not None
    assert worker.node.session is not None
    return worker.node.session


async def until_at_rest(among: Sequence[Client], worker: Client) -> None:
    """Wait until the leases of exactly these last for much longer than a lease."""

    async def rest() -> bool:
        sessions = [it.node.session for it in among if it.node]
        resting = {session.fence.node for session in sessions if session}
        ends_us = worker.store.now_us() + round(5 * LEASE_S * 1e6)
        found = {row.no for row in await worker.store.nodes() if row.expires_us > ends_us}
        return found == resting and len(found) == len(among)

    await until(rest, "rest")


def id_at(worker: Client) -> str:
    """Return a new id of a run that is held by this node."""
    session = session_of(worker)
    ids = (f"run-{number}" for number in islice(numbers, 10_000))
    return next(id for id in ids if session.owns(worker.store.target_of("inn", id)))


@in_loop
async def test_nodes_with_nothing_to_do_rest_until_something_is_written(url: str) -> None:
    async with workers(url) as nodes:
        sessions = [session_of(it) for it in nodes]
        await until_at_rest(nodes, nodes[0])
        called = asyncio.create_task(until_at_rest([], nodes[0]))  # for a moment only
        run = await nodes[0].start(dine, "soup", id=id_at(nodes[1]))
        assert await run.result(timeout=REST_MAX_S / 8) == "soup"
        await called
        await until_at_rest(nodes, nodes[0])
        assert [session_of(it) for it in nodes] == sessions, "none was taken for gone"


@in_loop
async def test_one_that_died_at_rest_is_taken_over_when_there_is_something_to_do(url: str) -> None:
    async with workers(url) as nodes:
        await until_at_rest(nodes, nodes[0])
        dead, id = session_of(nodes[2]), id_at(nodes[2])
        await dead.lease.stop()
        await stop_all(list(dead._tasks))  # pyright: ignore[reportPrivateUsage]
        run = await nodes[0].start(dine, "soup", id=id)
        assert await run.result(timeout=REST_MAX_S / 2) == "soup"
        assert dead.fence.node not in {row.no for row in await nodes[0].store.nodes()}


@in_loop
async def test_one_that_works_without_writing_does_not_rest_nor_is_it_taken_for_gone(
    url: str,
) -> None:
    async with workers(url) as nodes:
        sessions = [session_of(it) for it in nodes]
        await until_at_rest(nodes, nodes[0])
        run = await nodes[1].start(dine, "roast", id=id_at(nodes[1]))
        await until_at_rest([nodes[0], nodes[2]], nodes[0])
        await asyncio.sleep(2 * LEASE_S)
        await until_at_rest([nodes[0], nodes[2]], nodes[0])
        assert [session_of(it) for it in nodes] == sessions
        may_end.set()
        assert await run.result(timeout=10) == "roast"


@in_loop
async def test_one_whose_timer_is_due_soon_does_not_rest(url: str) -> None:
    async with workers(url) as nodes:
        soon = await nodes[0].start(nap, REST_MAX_S, id=id_at(nodes[0]))
        late = await nodes[1].start(nap, REST_MAX_S + 600, id=id_at(nodes[1]))
        await until_at_rest(nodes[1:], nodes[0])
        for run in (soon, late):
            await run.kill()


@pytest.mark.parametrize("kind", ["memory", "postgres"])
@in_loop
async def test_who_writes_shortens_the_leases_of_those_that_rest(kind: str, url: str) -> None:
    one: Store = MemoryStore() if kind == "memory" else PostgresStore(url)
    two = one.connect()
    await one.open()
    await two.open()
    await one.register(SERVICES)
    await two.register(SERVICES)
    fence, theirs = await joined(one), await joined(two)
    longer = Fence(fence.node, fence.nonce, 10 * LEASE_US)

    async def rests() -> bool:
        (mine,) = [row for row in await two.nodes() if row.no == fence.node]
        return mine.expires_us > two.now_us() + 5 * LEASE_US

    async def is_called() -> bool:
        return not await rests()

    numbers = count()

    async def is_left_alone() -> bool:
        """Tell whether what concerns nobody else calls nobody; not once it was told who joined."""
        assert one.renew(longer)
        await write(two, theirs, journal=[JournalRow(1, next(numbers), b"[]")])
        await asyncio.sleep(0.05)
        return await rests()

    for by, news in (
        (None, {"messages": [a_message(two, "a")]}),
        (theirs, {"messages": [a_message(two, "b")]}),
        (theirs, {"events": [an_event(two, "c")]}),
    ):
        await until(is_left_alone)
        await write(two, by, **news)
        await until(is_called, "the call")
        (mine,) = [row for row in await two.nodes() if row.no == fence.node]
        assert mine.expires_us > two.now_us() + LEASE_US / 2, "it has the time to answer"
    await one.close()
    await two.close()
