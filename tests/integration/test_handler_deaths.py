"""Events that end the process that handles them, wherever in its custody they are."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pavane import App, EngineConfig, Event, Retry, Service
from pavane.core.codec import error_summary
from pavane.stores.eventlog import DeadFilter
from pavane.stores.port import LAST_US
from tests.integration.killing import fork, reap
from tests.integration.world import until

POISON = 5


class Moved(Event, key="key"):
    key: str
    n: int


class Trail(msgspec.Struct):
    numbers: list[int] = []


def behind(path: Path) -> App:
    """The poison waits in custody, behind an event of its key that fails twice."""
    bank = Service("bank")
    failed: set[int] = set()

    @bank.on(Moved, state=Trail, retry=Retry(attempts=0, first="20ms", factor=1))
    async def move(event: Moved, trail: Trail) -> None:
        if event.n == POISON:
            os._exit(3)
        if event.n == 1 and not failed:
            failed.add(event.n)
            raise ValueError("at first")
        trail.numbers.append(event.n)

    return App("behind", [bank], store=str(path), config=EngineConfig(lease_s=5.0))


def in_a_batch(path: Path) -> App:
    bank = Service("bank")

    @bank.on(Moved, name="move", batch=7)
    async def move(events: list[Moved]) -> None:
        if any(event.n == POISON for event in events):
            os._exit(3)

    return App("batch", [bank], store=str(path), config=EngineConfig(lease_s=5.0))


def in_a_transaction(path: Path) -> App:
    bank = Service("bank")

    @bank.on(Moved, transaction=True, state=Trail)
    def move(event: Moved, trail: Trail, connection: Any) -> None:
        if event.n == POISON:
            os._exit(3)
        trail.numbers.append(event.n)

    return App("transaction", [bank], store=str(path), config=EngineConfig(lease_s=5.0))


@pytest.mark.parametrize("make", [behind, in_a_batch, in_a_transaction])
def test_what_kills_its_process_is_quarantined_wherever_it_waits(tmp_path: Path, make: Any) -> None:
    """Invariant 11: after five deaths at the most, and all others are handled."""
    path = tmp_path / "deaths.db"

    async def publish() -> None:
        async with make(path).connect() as client:
            await client.store.register(["bank"])
            for n in range(12):
                await client.publish(Moved(key=f"k{n % 2}", n=n), source="test")

    async def begin() -> None:
        async with make(path).worker():
            pass

    async def work() -> None:
        async with make(path).worker() as worker:

            async def settled() -> Any:
                marks = await worker.store.marks(1, 0, LAST_US)
                return len(marks) == 12 and await worker.store.dead_letters(DeadFilter())

            await until(settled)

    assert reap(fork(begin)) == 0
    assert reap(fork(publish)) == 0
    deaths = 0
    while code := reap(fork(work)):
        assert code == 3
        deaths += 1
        assert deaths <= 5

    async def look() -> None:
        async with make(path).connect() as client:
            (letter,) = await client.store.dead_letters(DeadFilter())
            assert b'"n":5' in letter.data
            assert "Quarantined: 5 processes died" in error_summary(letter.error)
            assert await client.store.parked_count(1) == 0
            raw = await client.store.state("bank", "Trail", "k1")
            if raw is not None:
                assert msgspec.json.decode(raw, type=Trail).numbers == [1, 3, 7, 9, 11]

    asyncio.run(look())
    assert deaths >= 3


def test_deaths_while_a_handler_was_paused_count_for_nothing_of_its(tmp_path: Path) -> None:
    """Invariant 11: an event that was not touched is not to blame."""
    path = tmp_path / "paused.db"

    def make(ends: bool) -> App:
        bank = Service("bank")

        @bank.on(Moved)
        async def move(event: Moved) -> None:
            if ends:
                os._exit(4)

        return App("paused", [bank], store=str(path), config=EngineConfig(lease_s=5.0))

    async def pause() -> None:
        async with make(ends=False).worker() as worker:
            await worker.store.pause_handler(1, LAST_US, "by hand")
        async with make(ends=False).connect() as client:
            await client.publish(Moved(key="a", n=1), source="test")

    async def die() -> None:
        async with make(ends=True).worker():
            await asyncio.sleep(0.05)
            os._exit(4)

    async def go_on() -> None:
        async with make(ends=False).worker() as worker:
            await worker.store.pause_handler(1, 0, "")

            async def handled() -> Any:
                return await worker.store.marks(1, 0, LAST_US)

            (mark,) = await until(handled)
            assert mark.outcome == "done"

    assert reap(fork(pause)) == 0
    for _ in range(6):
        assert reap(fork(die)) == 4
    assert reap(fork(go_on)) == 0
