"""Any sequence of publishes, failures, pauses, hand-overs and lost leases keeps the order per key.

Two nodes share one file. What happens is drawn; the model is the log itself: per key, each event
takes effect once, and in its order.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pavane import App, Client, EngineConfig, Event, LeaseLost, Retry, Service
from pavane.engine import node as node_module
from pavane.engine import session as session_module
from pavane.engine.session import Session
from pavane.stores.eventlog import DeadFilter
from pavane.stores.port import LAST_US
from tests.integration.world import PATIENT_S, in_loop, until

KEYS = "abcde"
SERVICES = ("first", "second")


class Moved(Event, key="key"):
    key: str
    n: int


class Noted(Event, key="key"):
    key: str
    n: int


class Trail(msgspec.Struct):
    numbers: list[int] = []


class Publish(msgspec.Struct, frozen=True):
    key: str
    failures: int


class Wait(msgspec.Struct, frozen=True):
    seconds: float


class Pause(msgspec.Struct, frozen=True):
    handler: str
    paused: bool


class Move(msgspec.Struct, frozen=True):
    service: str
    sender: Literal[0, 1]
    key: str


class Lose(msgspec.Struct, frozen=True):
    node: Literal[0, 1]


Act = Publish | Wait | Pause | Move | Lose
services = st.sampled_from(SERVICES)
nodes: st.SearchStrategy[Any] = st.sampled_from([0, 1])
publishes = st.builds(Publish, st.sampled_from(KEYS), st.sampled_from([0, 0, 0, 1, 2]))
moves = st.builds(Move, services, nodes, st.sampled_from(KEYS))
acts: st.SearchStrategy[list[Act]] = st.lists(
    publishes
    | publishes
    | publishes
    | moves
    | moves
    | st.builds(Wait, st.sampled_from([0.0, 0.001, 0.01]))
    | st.builds(Pause, st.sampled_from(["move", "note", "tell"]), st.booleans())
    | st.builds(Lose, nodes),
    min_size=10,
    max_size=60,
)


def make_app(path: Path, failures: dict[int, int]) -> App:
    first, second = Service("first"), Service("second")
    retry = Retry(attempts=0, first="3ms", factor=1)
    failed: Counter[tuple[str, int]] = Counter()

    def fail_now_and_then(who: str, n: int) -> None:
        if failed[who, n] < failures[n]:
            failed[who, n] += 1
            raise ValueError("now and then")

    @first.on(Moved, state=Trail, retry=retry, concurrency=3, breaker=None)
    async def move(event: Moved, trail: Trail) -> Noted:
        trail.numbers.append(event.n)
        await asyncio.sleep(0.001 * (event.n % 3))
        fail_now_and_then("move", event.n)
        return Noted(key=event.key, n=event.n)

    @second.on(Noted, state=Trail, retry=retry, breaker=None)
    async def note(event: Noted, trail: Trail) -> None:
        fail_now_and_then("note", event.n)
        trail.numbers.append(event.n)

    @second.on(Noted, batch=4, retry=retry, breaker=None)
    async def tell(events: list[Noted]) -> None:
        await asyncio.sleep(0.001)
        fail_now_and_then("tell", events[0].n)

    return App(
        "lanes",
        [first, second],
        store=str(path),
        config=EngineConfig(lease_s=PATIENT_S, grace_s=0.02),
    )


class Pair:
    """Two nodes of one app, whose balancing is done by the test."""

    def __init__(self, workers: list[Client]) -> None:
        self.workers = workers

    async def session(self, number: int) -> Session:
        async def joined() -> Any:
            node = self.workers[number].node
            assert node is not None
            return node.session if node.session is not None and node.session.open else None

        return await until(joined, "a session")

    async def move(self, act: Move) -> None:
        """Hand the partition of a key over, whatever is under way in it."""
        sender, receiver = [await self.session(n) for n in (act.sender, 1 - act.sender)]
        target = sender.store.target_of(act.service, act.key)
        rows = await sender.store.partition_rows([act.service])
        row = next(row for row in rows if row.target == target)
        if row.owner == sender.fence.node and sender.owns(target):
            await sender._give([row])
            if sender.open and receiver.open:
                await receiver._own(await receiver.store.claim(receiver.fence, [target]))

    async def lose(self, number: int) -> None:
        (await self.session(number)).lost(LeaseLost("The test takes it."))

    async def balance(self) -> None:
        for number in (0, 1):
            session = await self.session(number)
            await session.balance()
            await session.handlers.look()


async def numbers(client: Client, service: str) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for key in KEYS:
        raw = await client.store.state(service, "Trail", key)
        found[key] = msgspec.json.decode(raw, type=Trail).numbers if raw else []
    return found


async def play(path: Path, drawn: list[Act]) -> None:
    failures: dict[int, int] = {}
    published: dict[str, list[int]] = {key: [] for key in KEYS}
    app = make_app(path, failures)
    async with AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(app.worker()) for _ in range(2)]
        client = await stack.enter_async_context(app.connect())
        pair = Pair(workers)
        nos = {row.name: row.no for row in await client.store.handler_rows()}
        for n, act in enumerate(drawn):
            match act:
                case Publish():
                    failures[n] = act.failures
                    published[act.key].append(n)
                    who = (*workers, client)[n % 3]
                    await who.publish(Moved(key=act.key, n=n), source="test")
                case Wait():
                    await asyncio.sleep(act.seconds)
                case Pause():
                    until_us = LAST_US if act.paused else 0
                    await client.store.pause_handler(nos[act.handler], until_us, "by hand")
                    for number in (0, 1):
                        await (await pair.session(number)).handlers.look()
                case Move():
                    await pair.move(act)
                case Lose():
                    await pair.lose(act.node)
        for no in nos.values():
            await client.store.pause_handler(no, 0, "")

        async def all_is_done() -> bool:
            await pair.balance()
            left = [await client.store.backlog(no) for no in nos.values()]
            parked = [await client.store.parked_count(no) for no in nos.values()]
            seconds = await numbers(client, "second")
            total = sum(map(len, seconds.values()))
            return not any(left) and not any(parked) and total == len(failures)

        await until(all_is_done, f"the end of {drawn}")
        assert await numbers(client, "first") == published
        assert await numbers(client, "second") == published
        assert await client.store.dead_letters(DeadFilter()) == []


@pytest.fixture(autouse=True)
def balanced_by_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "TICK_S", 3600.0)
    monkeypatch.setattr(node_module, "PAUSE_MAX_S", 0.1)  # however often the test takes a lease


@settings(
    max_examples=20, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(acts)
def test_order_and_once_hold_whatever_happens(drawn: list[Act]) -> None:
    """Invariants 2, 4, 6 and 9."""
    with tempfile.TemporaryDirectory() as folder:
        in_loop(play)(Path(folder) / "lanes.db", drawn)
