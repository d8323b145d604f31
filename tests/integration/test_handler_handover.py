"""Handlers while nodes come, go and die: every event once, and in order per key."""

from __future__ import annotations

import asyncio
import os
import random
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pavane import App, Client, EngineConfig, Event, Retry, Service, receive
from pavane.core.codec import error_summary
from pavane.stores.eventlog import DeadFilter
from pavane.stores.port import LAST_US
from tests.integration.killing import fork, reap
from tests.integration.world import in_loop, until

EVENTS = 400
KEYS = 7


class Moved(Event, key="key"):
    key: str
    n: int


class Noted(Event, key="key"):
    key: str
    n: int


class Trail(msgspec.Struct):
    numbers: list[int] = []


def make_app(path: Path, seed: int) -> App:
    """Two services in a chain, whose handlers fail now and then."""
    chance = random.Random(seed)
    first, second = Service("first"), Service("second")
    retry = Retry(attempts=0, first="2ms", factor=1)

    @first.on(Moved, state=Trail, retry=retry, concurrency=5)
    async def move(event: Moved, trail: Trail) -> Noted:
        trail.numbers.append(event.n)
        await asyncio.sleep(chance.choice([0, 0, 0.001, 0.004]))
        if chance.random() < 0.1:
            raise ValueError("now and then")
        return Noted(key=event.key, n=event.n)

    @second.on(Noted, state=Trail, retry=retry)
    def note(event: Noted, trail: Trail) -> None:
        trail.numbers.append(event.n)
        if chance.random() < 0.05:
            raise ValueError("now and then")

    @second.on(Noted, batch=8, linger="2ms", retry=retry, state=None)
    async def count(events: list[Noted]) -> None:
        if chance.random() < 0.05:
            raise ValueError("now and then")

    return App("moving", [first, second], store=str(path), config=EngineConfig(lease_s=15.0))


async def trails(client: Client, service: str) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for key in range(KEYS):
        raw = await client.store.state(service, "Trail", f"k{key}")
        found[f"k{key}"] = msgspec.json.decode(raw, type=Trail).numbers if raw else []
    return found


@pytest.mark.parametrize("seed", range(4))
@in_loop
async def test_order_and_once_hold_while_nodes_join_and_leave(tmp_path: Path, seed: int) -> None:
    """Invariants 4 and 6, also across hand-overs of partitions."""
    chance = random.Random(seed)
    app = make_app(tmp_path / "moving.db", seed)
    published: dict[str, list[int]] = {f"k{key}": [] for key in range(KEYS)}
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(app.connect())
        workers: list[AsyncExitStack] = []

        async def join() -> None:
            worker = AsyncExitStack()
            await worker.enter_async_context(app.worker())
            workers.append(worker)

        async def come_and_go() -> None:
            await join()
            for _ in range(4):
                await asyncio.sleep(chance.uniform(0.05, 0.5))
                await join()
                await asyncio.sleep(chance.uniform(0.05, 0.9))
                await workers.pop(chance.randrange(len(workers))).aclose()

        async def publish() -> None:
            for n in range(EVENTS):
                key = f"k{chance.randrange(KEYS)}"
                published[key].append(n)
                await client.publish(Moved(key=key, n=n), source="test")
                if n % 10 == 0:
                    await asyncio.sleep(0.03)

        await asyncio.gather(come_and_go(), publish())

        async def all_done() -> bool:
            found = await trails(client, "second")
            counter = next(r for r in await client.store.handler_rows() if r.name == "count")
            counted = await client.store.marks(counter.no, 0, LAST_US)
            return sum(map(len, found.values())) >= EVENTS and len(counted) >= EVENTS

        try:
            await until(all_done, "all events")
            assert await trails(client, "first") == published
            assert await trails(client, "second") == published
        finally:
            for worker in workers:
                await worker.aclose()
        rows = {row.name: row.no for row in await client.store.handler_rows()}
        assert await client.store.dead_letters(DeadFilter()) == []
        assert len(await client.store.marks(rows["count"], 0, LAST_US)) == EVENTS
        for no in rows.values():
            assert await client.store.backlog(no) == 0
            assert await client.store.parked_count(no) == 0


# -- what kills its process --------------------------------------------------------------------


def killing_app(path: Path) -> App:
    bank = Service("bank")

    @bank.on(Moved, state=Trail)
    async def move(event: Moved, trail: Trail) -> None:
        if event.n == 3:
            os._exit(3)
        trail.numbers.append(event.n)

    return App("killing", [bank], store=str(path), config=EngineConfig(lease_s=5.0))


def test_an_event_that_kills_its_process_is_quarantined_and_the_others_are_handled(
    tmp_path: Path,
) -> None:
    """Invariant 11: after five deaths at the most."""
    path = tmp_path / "killing.db"

    async def publish() -> None:
        async with killing_app(path).connect() as client:
            for n in range(20):
                await client.publish(Moved(key=f"k{n % KEYS}", n=n), source="test")

    async def work() -> None:
        async with killing_app(path).worker() as worker:

            async def settled() -> Any:
                found = await trails(worker, "bank")
                letters = await worker.store.dead_letters(DeadFilter())
                return sum(map(len, found.values())) == 19 and letters

            await until(settled)

    assert reap(fork(publish)) == 0
    deaths = 0
    while code := reap(fork(work)):
        assert code == 3
        deaths += 1
        assert deaths <= 5

    async def look() -> None:
        async with killing_app(path).connect() as client:
            (letter,) = await client.store.dead_letters(DeadFilter())
            summary = error_summary(letter.error)
            assert summary.startswith("PavaneError: Quarantined: 5 processes died")
            found = await trails(client, "bank")
            expected = [n for n in range(20) if n != 3]
            assert found == {
                f"k{key}": [n for n in expected if n % KEYS == key] for key in range(KEYS)
            }

    asyncio.run(look())
    assert deaths == 5


# -- the mailbox, with its two sides on two nodes ------------------------------------------------


class Paid(Event, key="order"):
    order: str


def waiting_app(path: Path) -> tuple[App, Any]:
    shop = Service("shop")

    @shop.workflow(receives=[Paid])
    async def fulfil(order: str) -> str:
        first = asyncio.ensure_future(receive(Paid, key=order))
        other = asyncio.ensure_future(receive(Paid, key=f"not {order}"))
        done, _ = await asyncio.wait([first, other], return_when=asyncio.FIRST_COMPLETED)
        other.cancel()
        return done.pop().result().order

    return App("waiting", [shop], store=str(path), config=EngineConfig(lease_s=15.0)), fulfil


@in_loop
async def test_event_and_wait_meet_whichever_nodes_have_them(tmp_path: Path) -> None:
    """Invariant 4: the mailbox race, while a node joins and one leaves."""
    app, fulfil = waiting_app(tmp_path / "waiting.db")
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(app.worker())
        other = AsyncExitStack()

        async def race(number: int) -> str:
            await asyncio.sleep(number * 0.004)
            order = f"o{number}"
            run, _ = await asyncio.gather(
                client.start(fulfil, order),
                client.publish(Paid(order=order), source="test"),
            )
            return await run.result(timeout=30)

        async def come_and_go() -> None:
            await asyncio.sleep(0.2)
            await other.enter_async_context(app.worker())
            await asyncio.sleep(1.2)
            await other.aclose()

        results, _ = await asyncio.gather(
            asyncio.gather(*(race(number) for number in range(500))), come_and_go()
        )
        assert results == [f"o{number}" for number in range(500)]
