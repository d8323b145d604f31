"""The queues of one handler: which event is next, per key; nothing is executed here."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any

from pavane import Event, Service
from pavane.engine.subscription import QUEUE_MAX, Item, Lane, Progress, Subscription
from pavane.handler import Handler
from pavane.stores.eventlog import EventRow, HandlerRow, ParkedEvent
from pavane.stores.port import LAST_US

SLOTS = 4


class Placed(Event, key="order"):
    order: str


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


class Bench:
    """A subscription, what it began and parked, and a clock."""

    def __init__(self, **options: Any) -> None:
        service = Service("bank")

        def one(event: Placed) -> None: ...
        def many(events: list[Placed]) -> None: ...

        service.on(Placed, name="charge", **options)(many if "batch" in options else one)
        self.handler: Handler = service.handlers["charge"]
        self.now_s = 0.0
        self.begun: list[tuple[list[Lane], list[Item]]] = []
        self.resumed: list[Lane] = []
        self.parked: list[int] = []
        self.subscription = Subscription(
            self.handler, HandlerRow(1, "bank", "charge", ["Placed"], 0), self._start,
            self._resume, self._park_behind, lambda: self.now_s,
        )  # fmt: skip
        for slot in range(SLOTS):
            self.subscription.slots[slot] = Progress(0, 0)

    def _start(self, subscription: Subscription, lanes: list[Lane], items: list[Item]) -> None:
        subscription.began()
        self.begun.append((lanes, items))

    def _resume(self, subscription: Subscription, lane: Lane) -> None:
        subscription.began()
        lane.head = None
        self.resumed.append(lane)

    def _park_behind(self, subscription: Subscription, lane: Lane, items: list[Item]) -> None:
        lane.behind += len(items)
        self.parked += [item.row.pos for item in items]

    def offer(self, *events: tuple[int, str]) -> None:
        for pos, key in events:
            slot = (ord(key[0]) if key else pos) % SLOTS
            self.subscription.offer(row(pos, key, slot))
        self.subscription.pump()

    def begun_at(self) -> list[list[int]]:
        return [[item.row.pos for item in items] for _, items in self.begun]

    def end(self, pos: int) -> None:
        """The call of the event at `pos` has ended, and what became of it is durable."""
        lanes, items = next(one for one in self.begun if one[1][0].row.pos == pos)
        self.subscription.ended()
        self.subscription.settled(items)
        for lane in lanes:
            lane.busy = False
            self.subscription.wake(lane)
        self.subscription.pump()


def row(pos: int, key: str, slot: int) -> EventRow:
    return EventRow(
        f"e{pos}", "Placed", 1, key, "test", 0, f"e{pos}", "", "", b"{}", slot, pos
    )  # fmt: skip


def head(pos: int) -> ParkedEvent:
    return ParkedEvent(1, pos, 0, "a", 1, LAST_US, 0)


@in_loop
async def test_one_event_of_a_key_at_a_time_and_different_keys_at_once() -> None:
    """Invariant 6."""
    bench = Bench()
    bench.offer((1, "a"), (2, "a"), (3, "b"), (4, "a"))
    assert bench.begun_at() == [[1], [3]]
    bench.end(1)
    assert bench.begun_at() == [[1], [3], [2]]
    bench.end(3)
    bench.end(2)
    assert bench.begun_at() == [[1], [3], [2], [4]]
    bench.end(4)
    assert bench.subscription.lanes == {}


@in_loop
async def test_events_without_a_key_wait_for_no_other() -> None:
    bench = Bench()
    bench.offer((1, ""), (2, ""), (3, ""))
    assert bench.begun_at() == [[1], [2], [3]]


@in_loop
async def test_no_more_calls_at_once_than_declared() -> None:
    bench = Bench(concurrency=2)
    bench.offer((1, "a"), (2, "b"), (3, "c"))
    assert bench.begun_at() == [[1], [2]]
    bench.end(2)
    assert bench.begun_at() == [[1], [2], [3]]


@in_loop
async def test_calls_are_as_far_apart_as_the_rate_says() -> None:
    bench = Bench(rate="10/s", concurrency=10)
    bench.offer((1, "a"), (2, "b"), (3, "c"))
    assert bench.begun_at() == [[1]]
    bench.now_s = 0.1
    bench.subscription.pump()
    assert bench.begun_at() == [[1], [2]]
    bench.now_s = 0.19
    bench.subscription.pump()
    assert len(bench.begun) == 2


@in_loop
async def test_an_event_that_was_offered_is_not_taken_again() -> None:
    """Invariant 4."""
    bench = Bench()
    bench.offer((1, "a"), (5, "a"))
    bench.offer((1, "a"), (5, "a"), (4, "a"), (9, "e"))
    assert bench.subscription.queued == 3
    assert bench.begun_at() == [[1], [9]]


@in_loop
async def test_what_comes_behind_a_blocked_event_is_parked() -> None:
    bench = Bench()
    bench.offer((1, "a"))
    lane = bench.subscription.lanes["a"]
    lane.busy, lane.head = False, head(1)
    bench.offer((2, "a"), (3, "b"), (4, "a"))
    assert bench.parked == [2, 4]
    assert lane.behind == 2
    assert bench.begun_at() == [[1], [3]]


@in_loop
async def test_a_parked_event_is_handled_alone_and_before_what_follows() -> None:
    """Invariant 6."""
    bench = Bench(batch=5)
    lane = bench.subscription.lanes["a"] = Lane("a", 1)
    lane.head = head(1)
    bench.subscription.queue(lane)
    assert bench.resumed == [lane]
    bench.offer((3, "b"), (4, "c"))
    assert bench.begun_at() == [[3, 4]]


@in_loop
async def test_the_cursor_stops_before_the_first_event_that_is_not_durable() -> None:
    """Invariant 9."""
    bench = Bench()
    subscription = bench.subscription
    bench.offer((4, "a"), (8, "a"), (12, "e"))
    assert {ord(key) % SLOTS for key in "ae"} == {1}
    subscription.position = 12
    assert subscription.reached(1, 0) == 3
    bench.end(12)
    assert subscription.reached(1, 0) == 3
    bench.end(4)
    assert subscription.reached(1, 0) == 7
    bench.end(8)
    assert subscription.reached(1, 0) == 12
    assert subscription.reached(2, 0) == 12
    subscription.live = True
    assert subscription.reached(2, 20) == 20


@in_loop
async def test_a_slot_that_leaves_takes_nothing_more_and_keeps_its_cursor() -> None:
    bench = Bench(concurrency=1)
    subscription = bench.subscription
    subscription.live = True
    bench.offer((1, "a"), (2, "a"), (3, "b"))
    busy = subscription.leave({1}, 3)
    assert [lane.key for lane in busy] == ["a"]
    bench.offer((4, "a"), (5, "b"))
    bench.end(1)
    assert bench.begun_at() == [[1], [3]]
    assert subscription.reached(1, 5) == 1
    subscription.drop({1})
    assert busy[0].left
    assert set(subscription.slots) == {0, 2, 3}
    assert subscription.queued == 2


@in_loop
async def test_a_slot_that_leaves_twice_keeps_the_cursor_of_the_first_time() -> None:
    """As when a node drains while it hands a partition over: it took nothing since."""
    bench = Bench()
    bench.subscription.live = True
    bench.subscription.leave({1}, 3)
    bench.offer((4, "a"))
    bench.subscription.leave({1}, 9)
    assert bench.subscription.reached(1, 9) == 3


@in_loop
async def test_there_is_room_again_when_enough_is_settled_or_has_left() -> None:
    bench = Bench()
    subscription = bench.subscription
    bench.offer(*((pos, "a") for pos in range(1, QUEUE_MAX + 1)))
    assert subscription.is_full
    assert not subscription.room.is_set()
    subscription.leave({1}, 0)
    subscription.drop({1})
    assert subscription.room.is_set()
    assert not subscription.is_full


@in_loop
async def test_a_batch_takes_many_keys_and_a_key_in_order() -> None:
    bench = Bench(batch=3)
    bench.offer((1, "a"))
    assert bench.begun_at() == [[1]]
    bench.offer((2, "a"), (3, "b"), (4, "b"), (5, "c"))
    bench.end(1)
    taken = [pos for call in bench.begun_at() for pos in call]
    assert sorted(taken) == [1, 2, 3, 4, 5]
    assert taken.index(3) < taken.index(4)
    assert all(len(call) <= 3 for call in bench.begun_at())


@in_loop
async def test_a_batch_waits_for_more_as_long_as_it_lingers() -> None:
    bench = Bench(batch=3, linger=5)
    bench.offer((1, "a"), (2, "b"))
    assert bench.begun == []
    bench.now_s = 4.9
    bench.subscription.pump()
    assert bench.begun == []
    bench.now_s = 5.0
    bench.subscription.pump()
    assert bench.begun_at() == [[1, 2]]
    bench.offer((3, "c"), (4, "d"), (5, "e"))
    assert bench.begun_at() == [[1, 2], [3, 4, 5]]


@in_loop
async def test_a_paused_handler_begins_nothing() -> None:
    bench = Bench()
    bench.subscription.paused_until_us = LAST_US
    bench.offer((1, "a"))
    assert bench.begun == []
    bench.subscription.paused_until_us = 0
    bench.subscription.pump()
    assert bench.begun_at() == [[1]]


@in_loop
async def test_a_share_is_stable_and_about_as_large_as_declared() -> None:
    bench = Bench()
    other = Bench(concurrency=2).handler
    bench.subscription.variants.append((other, 0.1))
    keys = [f"k{number}" for number in range(2000)]
    chosen = {key: bench.subscription.variant(key, "id") for key in keys}
    assert {key: bench.subscription.variant(key, "x") for key in keys} == chosen
    assert 150 < sum(handler is other for handler in chosen.values()) < 250
