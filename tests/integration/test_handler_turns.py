"""Whose turn it is: nothing that ends without an outcome may keep a place, a gate or a trial.

Hand-overs are made directly, by letting slots leave a node and come back, so that they happen at
exactly the moment that a test is about.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pavane import Breaker, Event, Retry, Service, delivery, event
from pavane.engine.handlers import Handlers
from pavane.engine.session import Session
from pavane.engine.subscription import QUEUE_MAX, Subscription
from pavane.stores.eventlog import (
    DeadFilter,
    EventFilter,
    EventRow,
    MarkRow,
    ParkedEvent,
    Reaction,
)
from pavane.stores.port import LAST_US, Commit, Store
from pavane.stores.sqlite import SqliteStore
from tests.integration.world import Director, World, in_loop, until

SOON = Retry(attempts=3, first="2ms", factor=1)
SEEN: list[Any] = []


class Placed(Event, key="order"):
    order: str
    n: int = 0


class Paid(Event, key="order"):
    order: str
    n: int = 0


@dataclass
class Account:
    events: int = 0


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    SEEN.clear()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "world.db", "orchestration", "one node")


async def publish(director: Director, *events: Any) -> None:
    await asyncio.gather(*(director.client.publish(event, source="test") for event in events))


def seen(count: int) -> Any:
    async def enough() -> bool:
        return len(SEEN) >= count

    return until(enough, f"{count} of {SEEN}")


def session_of(director: Director) -> Session:
    node = director.client.node
    assert node is not None
    assert node.session is not None
    return node.session


def handlers_of(director: Director) -> Handlers:
    return session_of(director).handlers


def subscription(director: Director, name: str) -> Subscription:
    found = handlers_of(director).consumer.subscriptions
    return next(one for one in found if one.handler.name == name)


async def leave(director: Director, keys: str, grace_s: float = 0.0) -> set[int]:
    """Let the slots of these keys leave the only service, as a hand-over does."""
    store = director.client.store
    slots = {store.slot_of(key, "") for key in keys}
    handlers = handlers_of(director)
    places = {("bank", slot) for slot in slots}
    handlers.leave(places)
    await asyncio.sleep(0)
    ends = time.monotonic() + grace_s
    while places & handlers.at_work() and time.monotonic() < ends:
        await asyncio.sleep(0.002)
    await handlers.give("bank", slots)
    await session_of(director).committer.flush()
    return slots


async def come_back(director: Director, slots: set[int]) -> None:
    await handlers_of(director).own("bank", sorted(slots), set())


async def mark_as_handled(director: Director, name: str, n: int) -> None:
    """Write the mark that another node would have written for the event of this number."""
    store = director.client.store
    rows = await store.find_events(EventFilter(types=("Placed",)))
    pos = next(row.pos for row in rows if b'"n":%d}' % n in row.data)
    commit = Commit(lambda error: None)
    commit.reaction = Reaction()
    commit.reaction.marks = [
        MarkRow(subscription(director, name).no, pos, store.now_us(), 0, 1, "done")
    ]
    store.submit([commit], None, lambda results: None)


# -- places ------------------------------------------------------------------------------------


@in_loop
async def test_an_event_that_is_skipped_lets_the_next_key_begin(world: World) -> None:
    """Invariant 11."""
    bank = Service("bank")

    @bank.on(Placed, concurrency=1, where=lambda event: event.n > 0)
    async def charge(event: Placed) -> None:
        SEEN.append(event.order)

    async with world.working(bank) as director:
        await publish(director, *(Placed(order=key, n=int(key == "c")) for key in "abc"))
        await seen(1)


@in_loop
async def test_a_transaction_lets_the_next_key_begin(world: World) -> None:
    bank = Service("bank")

    @bank.on(Placed, concurrency=1, transaction=True)
    def charge(event: Placed, connection: Any) -> None:
        SEEN.append(event.order)

    async with world.working(bank) as director:
        await publish(director, *(Placed(order=key) for key in "abcdef"))
        await seen(6)


@in_loop
async def test_concurrency_holds_also_for_handlers_that_wait_for_the_state_of_a_key(
    world: World,
) -> None:
    bank = Service("bank")
    opened = asyncio.Event()
    running = most = 0

    @bank.on(Placed, state=Account)
    async def first(event: Placed, account: Account) -> None:
        await opened.wait()

    @bank.on(Placed, state=Account, concurrency=2)
    async def second(event: Placed, account: Account) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.002)
        running -= 1
        SEEN.append(event.order)

    async with world.working(bank) as director:
        await publish(director, *(Placed(order=f"o{n}") for n in range(20)))
        opened.set()
        await seen(20)
    assert most <= 2


@in_loop
async def test_a_rate_is_kept_also_by_retries(world: World) -> None:
    bank = Service("bank")
    failed: set[str] = set()

    @bank.on(Placed, rate=200, retry=Retry(first=0), breaker=None)
    async def charge(event: Placed) -> None:
        SEEN.append(asyncio.get_running_loop().time())
        if event.order not in failed:
            failed.add(event.order)
            raise ValueError("at first")

    async with world.working(bank) as director:
        began_s = asyncio.get_running_loop().time()  # the first call may be late, and the last not
        await publish(director, *(Placed(order=f"o{n}") for n in range(20)))
        await seen(40)
    assert SEEN[-1] - began_s >= 39 / 200 * 0.95


# -- the breaker -------------------------------------------------------------------------------


def breaking() -> Breaker:
    return Breaker(window=1, failures=1.0, pause="20ms")


@in_loop
async def test_a_trial_that_is_skipped_is_not_lost(world: World) -> None:
    """Invariant 11."""
    bank = Service("bank")

    @bank.on(Placed, breaker=breaking(), retry=Retry(attempts=1), where=lambda e: e.n != 1)
    async def charge(event: Placed) -> None:
        SEEN.append(event.n)
        if event.n == 0:
            raise ValueError("closed")

    async with world.working(bank) as director:
        await publish(director, Placed(order="a", n=0))
        await until(lambda: director.client.store.dead_letters(DeadFilter()))
        for n in (1, 2):
            await publish(director, Placed(order="a", n=n))
        await seen(2)
    assert SEEN == [0, 2]


@in_loop
async def test_a_trial_that_leaves_with_its_partition_is_not_lost(world: World) -> None:
    """Invariant 11."""
    bank = Service("bank")

    @bank.on(Placed, breaker=breaking(), retry=Retry(attempts=1))
    async def charge(event: Placed) -> None:
        SEEN.append(event.n)
        if event.n == 0:
            raise ValueError("closed")
        if event.n == 1:
            await asyncio.sleep(60)

    async with world.working(bank) as director:
        await publish(director, Placed(order="a", n=0))
        await until(lambda: director.client.store.dead_letters(DeadFilter()))
        await publish(director, Placed(order="a", n=1))
        await seen(2)
        await leave(director, "a")
        await publish(director, Placed(order="b", n=2))
        await seen(3)


@in_loop
async def test_a_pause_by_the_breaker_ends_with_its_session(world: World) -> None:
    """Invariant 9."""
    bank = Service("bank")

    @bank.on(Placed)
    async def charge(event: Placed) -> None:
        SEEN.append(event.n)

    async with world.working(bank) as director:
        no, store = subscription(director, "charge").no, director.client.store
        await store.pause_handler(no, LAST_US, "breaker: 20 of the last 20 attempts failed")
    async with world.working(bank) as director:
        await publish(director, Placed(order="a"))
        await seen(1)


@in_loop
async def test_a_breaker_never_replaces_the_pause_that_a_person_made(world: World) -> None:
    bank = Service("bank")
    opened = asyncio.Event()

    @bank.on(Placed, breaker=breaking(), retry=SOON)
    async def charge(event: Placed) -> None:
        SEEN.append(event.n)
        await opened.wait()
        raise ValueError("closed")

    async with world.working(bank) as director:
        store, charging = director.client.store, subscription(director, "charge")
        await publish(director, Placed(order="a"))
        await seen(1)
        await store.pause_handler(charging.no, LAST_US, "by hand")

        async def is_paused() -> bool:
            return charging.paused_until_us == LAST_US

        await until(is_paused)
        opened.set()
        await until(lambda: store.parked_at([1]))
        await session_of(director).committer.flush()
        (row,) = await store.handler_rows()
    assert (row.reason, row.paused_until_us) == ("by hand", LAST_US)


# -- hand-overs --------------------------------------------------------------------------------


@in_loop
async def test_a_call_that_a_hand_over_cancels_leaves_the_state_to_others(world: World) -> None:
    """Invariants 6 and 11."""
    bank = Service("bank")
    stuck = True

    @bank.on(Placed, state=Account)
    async def charge(event: Placed, account: Account) -> None:
        account.events += 1
        SEEN.append(event.n)
        if stuck:
            await asyncio.sleep(60)

    async with world.working(bank) as director:
        await publish(director, Placed(order="a", n=1))
        await seen(1)
        slots = await leave(director, "a")
        stuck = False
        await come_back(director, slots)
        await publish(director, Placed(order="a", n=2))
        await seen(3)

        async def saved() -> bool:
            return await director.client.store.state("bank", "Account", "a") == b'{"events":2}'

        await until(saved, "the state")
    assert SEEN == [1, 1, 2]


@in_loop
async def test_what_waited_for_a_state_never_runs_after_its_partition_left(world: World) -> None:
    """Invariant 6: the next owner may be at that state by now."""
    bank = Service("bank")
    opened = asyncio.Event()

    @bank.on(Placed, state=Account)
    async def first(event: Placed, account: Account) -> None:
        SEEN.append("first")
        while not opened.is_set():
            try:
                await opened.wait()
            except asyncio.CancelledError:
                pass  # it goes on although its partition leaves
        account.events += 1

    @bank.on(Placed, state=Account)
    async def second(event: Placed, account: Account) -> None:
        SEEN.append("second")
        account.events += 1

    async with world.working(bank) as director:
        await publish(director, Placed(order="a"))
        await seen(1)
        await leave(director, "a")
        opened.set()
        await asyncio.sleep(0.05)
        await session_of(director).committer.flush()
        assert SEEN == ["first"]
        assert await director.client.store.state("bank", "Account", "a") is None
        assert subscription(director, "second").running == 0


@in_loop
async def test_a_reader_hears_of_the_room_that_a_hand_over_makes(world: World) -> None:
    """Invariant 11."""
    bank = Service("bank")

    @bank.on(Placed)
    async def charge(event: Placed) -> None:
        if event.order == "a":
            await asyncio.sleep(60)
        SEEN.append(event.order)

    async with world.working(bank) as director:
        await publish(director, *(Placed(order="a", n=n) for n in range(QUEUE_MAX + 100)))

        async def is_full() -> bool:
            return subscription(director, "charge").is_full

        await until(is_full)
        await publish(director, Placed(order="b"))
        await leave(director, "a")
        await seen(1)
    assert SEEN == ["b"]


@in_loop
async def test_a_batch_that_another_node_handled_in_part_is_handled_for_the_rest(
    world: World,
) -> None:
    """Invariant 4: each event takes effect exactly once."""
    bank = Service("bank")
    opened = asyncio.Event()

    @bank.on(Placed, batch=10, linger="5ms")
    async def charge(events: list[Placed]) -> list[Paid]:
        SEEN.append(len(events))
        await opened.wait()
        return [Paid(order=event.order, n=event.n) for event in events]

    async with world.working(bank) as director:
        store = director.client.store
        await publish(director, *(Placed(order=f"o{n}", n=n) for n in range(10)))
        await seen(1)
        await mark_as_handled(director, "charge", 4)
        opened.set()

        async def paid() -> Any:
            return len(await store.find_events(EventFilter(types=("Paid",)))) >= 9

        await until(paid, "the other nine")
        no = subscription(director, "charge").no

        async def nothing_is_left() -> bool:
            return not await store.parked_count(no) and not await store.backlog(no)

        await until(nothing_is_left)
        assert len(await store.find_events(EventFilter(types=("Paid",)))) == 9


@in_loop
async def test_what_another_node_handled_leaves_custody(world: World) -> None:
    bank = Service("bank")
    opened = asyncio.Event()

    @bank.on(Placed, retry=SOON)
    async def charge(event: Placed) -> None:
        SEEN.append(event.n)
        if len(SEEN) == 1:
            raise ValueError("at first")
        await opened.wait()

    async with world.working(bank) as director:
        store, no = director.client.store, subscription(director, "charge").no
        await publish(director, Placed(order="a", n=1), Placed(order="a", n=2))
        await seen(2)
        await mark_as_handled(director, "charge", 1)
        opened.set()
        await seen(3)

        async def nothing_is_parked() -> bool:
            return not await store.parked_count(no)

        await until(nothing_is_parked)
    assert SEEN == [1, 1, 2]


@in_loop
async def test_what_the_last_owner_did_beyond_the_tail_of_this_node_is_known(world: World) -> None:
    """Invariants 4 and 6: neither is a handled event handled again, nor an attempt forgotten."""
    bank = Service("bank")

    @bank.on(Placed)
    async def charge(event: Placed) -> None:
        SEEN.append((event.n, delivery().attempt))

    async with world.working(bank) as director, world.idle(bank) as owner:
        store, no = owner.client.store, subscription(director, "charge").no
        slots = await leave(director, "a")
        # Nothing is awaited here, so this node has not read of it when it takes the slot over.
        rows = [
            EventRow(
                f"e{n}", "Placed", 1, "a", "test", store.now_us(), f"e{n}", "", "",
                b'{"order":"a","n":%d}' % n, store.slot_of("a", ""),
            )
            for n in (1, 2)
        ]  # fmt: skip
        write(store, lambda commit: setattr(commit, "events", rows))
        reaction, now = Reaction(), store.now_us()
        reaction.marks = [MarkRow(no, rows[0].pos, now, 0, 1, "done")]
        reaction.parked = [ParkedEvent(no, rows[1].pos, rows[1].slot, "a", 3, now, now)]
        write(store, lambda commit: setattr(commit, "reaction", reaction))
        await come_back(director, slots)
        await publish(director, Placed(order="a", n=3))
        await seen(2)
    assert SEEN == [(2, 3), (3, 1)]


def write(store: Store, fill: Callable[[Commit], None]) -> None:
    """Write a commit before anything else happens in this loop."""
    commit = Commit(lambda error: None)
    fill(commit)
    assert isinstance(store, SqliteStore)
    assert store._write([commit], None) == [None]  # pyright: ignore[reportPrivateUsage]


@in_loop
async def test_a_call_that_a_shutdown_cancels_did_not_fail(world: World) -> None:
    """Invariant 9."""
    bank = Service("bank")
    stuck = True

    @bank.on(Placed, retry=Retry(attempts=1))
    async def charge(event: Placed) -> None:
        SEEN.append(event.n)
        if stuck:
            await asyncio.sleep(60)

    async with world.working(bank, grace_s=0.01) as director:
        await publish(director, Placed(order="a", n=1))
        await seen(1)
    stuck = False
    async with world.working(bank) as director:
        await seen(2)
        assert await director.client.store.dead_letters(DeadFilter()) == []
        assert await director.client.store.parked_count(1) == 0


# -- what handlers do --------------------------------------------------------------------------


@in_loop
async def test_what_a_handler_left_behind_cannot_publish_any_more(world: World) -> None:
    bank = Service("bank")
    left: list[asyncio.Task[str]] = []
    opened = asyncio.Event()

    async def later() -> str:
        await opened.wait()
        return await bank.publish(Paid(order="a"))

    @bank.on(Placed)
    async def charge(event: Placed) -> None:
        left.append(asyncio.create_task(later()))
        SEEN.append(event.n)

    async with world.working(bank) as director:
        await publish(director, Placed(order="a"))
        await seen(1)
        opened.set()
        with pytest.raises(Exception, match=r"bank\.charge has returned.*Await"):
            await left[0]


@in_loop
async def test_a_timeout_of_the_handlers_own_is_told_as_such(world: World) -> None:
    bank = Service("bank")

    @bank.on(Placed, retry=Retry(attempts=1), timeout="20s")
    async def own(event: Placed) -> None:
        raise TimeoutError("the bank did not answer")

    async with world.working(bank) as director:
        await publish(director, Placed(order="a"))
        (letter,) = await until(lambda: director.client.store.dead_letters(DeadFilter()))
    assert letter.cause == "TimeoutError: the bank did not answer"


@in_loop
async def test_an_error_that_no_store_can_hold_as_it_is_still_makes_a_dead_letter(
    world: World,
) -> None:
    """Invariant 11."""
    bank = Service("bank")

    @bank.on(Placed, retry=Retry(attempts=1))
    async def charge(event: Placed) -> None:
        raise ValueError("\ud800 \x00 odd")

    async with world.working(bank) as director:
        await publish(director, Placed(order="a"))
        (letter,) = await until(lambda: director.client.store.dead_letters(DeadFilter()))
    assert "odd" in letter.cause


@event(key="order")
@dataclass
class Draft:
    order: str
    lines: int = 0


@in_loop
async def test_an_event_that_can_be_changed_is_each_handlers_own(world: World) -> None:
    bank = Service("bank")

    @bank.on(Draft, retry=SOON)
    async def first(event: Draft) -> None:
        event.lines += 1
        SEEN.append(event.lines)
        if len(SEEN) < 3:
            raise ValueError("at first")

    @bank.on(Draft, retry=SOON)
    async def second(event: Draft) -> None:
        event.lines += 1
        SEEN.append(event.lines)

    async with world.working(bank) as director:
        await publish(director, Draft(order="a"))
        await seen(3)
    assert set(SEEN) == {1}


@in_loop
async def test_a_batch_is_for_one_variant_and_a_key_stays_with_it(world: World) -> None:
    """Each event is handled by exactly one of the two, always the same for a key."""
    bank = Service("bank")

    @bank.on(Placed, batch=20, linger="5ms")
    async def charge(events: list[Placed]) -> None:
        SEEN.extend(("old", event.order) for event in events)

    @bank.on(Placed, share=0.3, batch=20)
    async def charge2(events: list[Placed]) -> None:
        SEEN.extend(("new", event.order) for event in events)

    async with world.working(bank) as director:
        await publish(director, *(Placed(order=f"o{n % 50}", n=n) for n in range(300)))
        await seen(300)
    by_key: dict[str, set[str]] = {}
    for who, order in SEEN:
        by_key.setdefault(order, set()).add(who)
    assert Counter(len(who) for who in by_key.values()) == {1: 50}
    assert {"old", "new"} == {who for who, _ in SEEN}
    assert len(SEEN) == 300


@in_loop
async def test_workflows_of_several_services_start_on_one_event(world: World) -> None:
    """Invariant 4: the event takes effect once for each of them."""
    bank, depot = Service("bank"), Service("depot")

    @depot.step
    async def fetch(order: str) -> str:
        return f"fetched {order}"

    @bank.step
    async def charge(order: str) -> str:
        return f"charged {order}"

    @bank.workflow(starts_on=Placed, mode="choreography")
    async def pay(event: Placed) -> str:
        return await fetch(event.order) + await charge(event.order)

    @depot.workflow(starts_on=Placed, mode="choreography")
    async def pack(event: Placed) -> str:
        return await charge(event.order) + await fetch(event.order)

    @bank.workflow(starts_on=Placed, name="book", version=1)
    async def book1(event: Placed) -> str:
        return "old"

    @bank.workflow(starts_on=Placed, name="book", version=2)
    async def book2(event: Placed) -> str:
        return "new"

    async with world.working(bank, depot) as director:
        for _ in range(2):
            await director.client.publish(Placed(order="a"), source="test", id="e1")

        async def result(id: str) -> Any:
            await until(lambda: director.client.store.run_rows(id))
            return await director.get(id).result(timeout=30)

        assert await result("e1.pay") == "fetched acharged a"
        assert await result("e1.pack") == "charged afetched a"
        assert await result("e1.book") == "new"
        assert sorted(handler.name for handler in bank.handlers.values()) == [
            "start-book", "start-pay",
        ]  # fmt: skip
