"""Handlers on a real SQLite file: events in, effects out, each once and in order per key."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from msgspec import Raw

from pavane import (
    Breaker,
    Client,
    Event,
    OnlyInHandler,
    Retry,
    Service,
    delete_state,
    delivery,
    receive,
    step_info,
)
from pavane.core.envelope import Redo, pack
from pavane.engine.subscription import Subscription
from pavane.stores.eventlog import DeadFilter, EventFilter, EventRow
from pavane.stores.port import LAST_US, Commit, Message
from tests.integration.world import LAYOUTS, Director, Layout, Place, World, in_loop, until

SOON = Retry(attempts=3, first="5ms", factor=1)
SEEN: list[Any] = []
"""What handlers saw, in order; each test begins with nothing."""
BROKEN: set[Any] = set()
"""What fails for now."""


class Placed(Event, key="order"):
    order: str
    cents: int = 0


class Paid(Event, key="order"):
    order: str


class Refused(Event, key="order"):
    order: str


class Shipped(Event, key="order"):
    order: str


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    SEEN.clear()
    BROKEN.clear()


@pytest.fixture(params=LAYOUTS)
def world(request: pytest.FixtureRequest, place: Place) -> World:
    return World(place, "orchestration", request.param)


@pytest.fixture
def one(tmp_path: Path) -> World:
    layout: Layout = "one node"
    return World(tmp_path / "world.db", "orchestration", layout)


async def publish(director: Director, event: Any, id: str | None = None) -> str:
    return await director.client.publish(event, source="test", id=id)


async def published(client: Client, *types: type[Any]) -> list[EventRow]:
    which = EventFilter(types=tuple(t.event_type for t in types), limit=10_000)
    return list(reversed(await client.store.find_events(which)))


def seen(count: int) -> Any:
    async def enough() -> bool:
        return len(SEEN) >= count

    return until(enough, f"{count} of {SEEN}")


async def dead(client: Client) -> Any:
    return await until(lambda: client.store.dead_letters(DeadFilter()), "a dead letter")


async def redo(client: Client, service: str, redo: Redo, key: str) -> None:
    target = client.store.target_of(service, key)
    id = f"redo-{redo.pos}-{redo.dead}-{redo.again}"
    message = Message("redo", id, service, "", pack(redo), 0, target)
    await client._write(Commit(messages=[message]))


def subscriptions(director: Director) -> list[Subscription]:
    """Return those of all workers."""
    sessions = [worker.node.session for worker in director.workers if worker.node]
    return [one for its in sessions if its for one in its.handlers.consumer.subscriptions]


async def handler_no(client: Client, name: str) -> int:
    return next(row.no for row in await client.store.handler_rows() if row.name == name)


@in_loop
async def test_a_chain_of_services_answers_each_event_with_the_next(world: World) -> None:
    """Invariant 4: each accepted event takes effect exactly once per consumer."""
    desk, bank, depot = Service("desk"), Service("bank"), Service("depot")

    @bank.on(Placed)
    async def charge(event: Placed) -> Paid | Refused:
        return Paid(order=event.order) if event.cents < 500 else Refused(order=event.order)

    @depot.on(Paid)
    def ship(event: Paid) -> list[Shipped]:
        return [Shipped(order=event.order)]

    @desk.on(Shipped, Refused)
    async def note(event: Shipped | Refused) -> None:
        SEEN.append((type(event).__name__, event.order))

    async with world.working(desk, bank, depot) as director:
        for number in range(10):
            await publish(director, Placed(order=f"o{number}", cents=100 * number))
        await seen(10)
        rows = await published(director.client, Placed, Paid, Refused, Shipped)
    assert Counter(name for name, _ in SEEN) == {"Shipped": 5, "Refused": 5}
    assert Counter(row.type for row in rows) == {
        "Placed": 10, "Paid": 5, "Refused": 5, "Shipped": 5,
    }  # fmt: skip
    first = next(row for row in rows if row.type == "Placed")
    caused = [row for row in rows if row.conversation == first.id and row.id != first.id]
    assert [(row.type, row.source) for row in caused] == [("Paid", "bank"), ("Shipped", "depot")]
    assert [row.cause for row in caused] == [first.id, caused[0].id]


@in_loop
async def test_a_step_that_a_handler_calls_is_a_function_with_the_handlers_key(one: World) -> None:
    """Invariant 1: the key is the same on every attempt, and another for every event."""
    bank = Service("bank")

    @bank.step
    def charge(order: str) -> str:
        SEEN.append((order, step_info().idempotency_key, step_info().attempt))
        assert threading.current_thread() is not threading.main_thread()
        if step_info().attempt == 1:
            raise ValueError("not yet")
        return order

    @bank.on(Placed, retry=SOON)
    async def pay(event: Placed) -> Paid:
        paid = Paid(order=await charge(event.order))
        SEEN.append((event.order, delivery().idempotency_key, delivery().attempt))
        return paid

    async with one.working(bank) as director:
        for order in ("a", "b"):
            await publish(director, Placed(order=order), id=order)
        await seen(6)
    for order in ("a", "b"):
        key = f"{order}:bank.pay"
        assert [s for s in SEEN if s[0] == order] == [(order, key, n) for n in (1, 2, 2)]


@in_loop
async def test_the_time_of_an_event_is_when_it_was_published(one: World) -> None:
    bank = Service("bank")

    @bank.on(Placed)
    async def pay(event: Placed) -> Paid:
        await asyncio.sleep(0.005)
        SEEN.append(time.time())
        return Paid(order=event.order)

    async with one.working(bank) as director:
        await publish(director, Placed(order="a"))
        (paid,) = await until(lambda: published(director.client, Paid), "a payment")
    assert paid.at_us / 1e6 >= SEEN[0] - 0.001  # the store's clock and this one may round apart


@in_loop
async def test_an_event_published_twice_takes_effect_once(world: World) -> None:
    """Invariant 4."""
    bank = Service("bank")

    @bank.on(Placed)
    async def charge(event: Placed) -> Paid:
        SEEN.append(event.order)
        return Paid(order=event.order)

    async with world.working(bank) as director:
        for _ in range(5):
            await publish(director, Placed(order="a"), id="same")
        await publish(director, Placed(order="z"))

        async def both() -> bool:
            return len(await published(director.client, Paid)) >= 2

        await until(both, "both payments")
        rows = await published(director.client, Paid)
    assert sorted(SEEN) == ["a", "z"]
    assert len(rows) == 2


@in_loop
async def test_events_of_a_key_are_handled_in_order_also_across_retries(world: World) -> None:
    """Invariant 6."""
    bank = Service("bank")
    failed: Counter[int] = Counter()

    @bank.on(Placed, retry=SOON)
    async def charge(event: Placed) -> None:
        await asyncio.sleep(0)
        if event.cents % 3 == 0 and failed[event.cents] < 2:
            failed[event.cents] += 1
            raise ValueError("not yet")
        SEEN.append((event.order, event.cents))

    async with world.working(bank) as director:
        for number in range(60):
            await publish(director, Placed(order=f"o{number % 4}", cents=number))
        await seen(60)
    for key in range(4):
        own = [cents for order, cents in SEEN if order == f"o{key}"]
        assert own == sorted(own)
        assert len(own) == 15


@in_loop
async def test_a_failing_event_holds_back_only_its_own_key(one: World) -> None:
    """Invariant 11."""
    bank = Service("bank")
    BROKEN.add("a")

    @bank.on(Placed, retry=Retry(attempts=0, first="20ms", factor=1), breaker=None)
    async def charge(event: Placed) -> None:
        if event.order in BROKEN:
            raise ValueError("closed")
        SEEN.append(event.order)

    async with one.working(bank) as director:
        await publish(director, Placed(order="a"))
        await publish(director, Placed(order="a"))
        for key in "bcde":
            await publish(director, Placed(order=key))
        await seen(4)
        assert sorted(SEEN) == list("bcde")
        BROKEN.clear()
        await seen(6)
    assert SEEN[4:] == ["a", "a"]


@in_loop
async def test_a_poison_event_among_a_thousand_is_one_dead_letter(world: World) -> None:
    """Invariant 11: 999 done, one dead letter."""
    bank = Service("bank")

    @bank.on(Placed, retry=SOON)
    async def charge(event: Placed) -> None:
        if event.cents == 500:
            raise ValueError("poison")
        SEEN.append(event.cents)

    async with world.working(bank) as director:
        await asyncio.gather(
            *(publish(director, Placed(order=f"o{n % 50}", cents=n)) for n in range(1000))
        )
        await seen(999)
        (letter,) = await dead(director.client)
    assert sorted(SEEN) == [n for n in range(1000) if n != 500]
    assert (letter.type, letter.key, letter.attempts) == ("Placed", "o0", 3)
    assert letter.cause == "ValueError: poison"


@in_loop
async def test_a_dead_letter_that_is_retried_succeeds_and_is_gone(world: World) -> None:
    """Invariant 9."""
    bank = Service("bank")
    BROKEN.add("a")

    @bank.on(Placed, retry=SOON)
    async def charge(event: Placed) -> Paid:
        if event.order in BROKEN:
            raise ValueError("closed")
        SEEN.append((event.order, event.cents))
        return Paid(order=event.order)

    async with world.working(bank) as director:
        client = director.client
        await publish(director, Placed(order="a", cents=1))
        (letter,) = await dead(client)
        await publish(director, Placed(order="b", cents=2))
        await seen(1)
        BROKEN.clear()
        data = Raw(b'{"order":"a","cents":7}')
        await redo(client, "bank", Redo(letter.handler, letter.pos, letter.no, data=data), "a")
        await seen(2)
        assert await client.store.dead_letters(DeadFilter()) == []
        await publish(director, Placed(order="a", cents=3))
        await seen(3)
    assert SEEN == [("b", 2), ("a", 7), ("a", 3)]


@in_loop
async def test_a_key_waits_behind_its_dead_letter_if_it_is_declared_so(world: World) -> None:
    """Invariant 6."""
    bank = Service("bank")
    BROKEN.add(1)

    @bank.on(Placed, retry=SOON, on_dead="stop")
    async def charge(event: Placed) -> None:
        if event.cents in BROKEN:
            raise ValueError("closed")
        SEEN.append((event.order, event.cents))

    async with world.working(bank) as director:
        client = director.client
        for cents in (1, 2, 3):
            await publish(director, Placed(order="a", cents=cents))
        (letter,) = await dead(client)
        await publish(director, Placed(order="a", cents=4))
        await publish(director, Placed(order="b", cents=5))
        await seen(1)
        assert SEEN == [("b", 5)]
        BROKEN.clear()
        await redo(client, "bank", Redo(letter.handler, letter.pos, letter.no), "a")
        await seen(5)
    assert SEEN[1:] == [("a", 1), ("a", 2), ("a", 3), ("a", 4)]


@dataclass
class Account:
    cents: int = 0
    events: int = 0


@in_loop
async def test_keyed_state_is_changed_one_event_at_a_time(world: World) -> None:
    bank = Service("bank")

    @bank.on(Placed, state=Account)
    async def credit(event: Placed, account: Account) -> None:
        before = account.cents
        await asyncio.sleep(0.0005)
        account.cents = before + event.cents
        account.events += 1
        SEEN.append(("credit", event.order, account.cents))

    @bank.on(Placed, state=Account)
    async def count(event: Placed, account: Account) -> None:
        account.events += 1
        await asyncio.sleep(0)
        SEEN.append(("count", event.order, account.events))

    async with world.working(bank) as director:
        for number in range(40):
            await publish(director, Placed(order=f"o{number % 4}", cents=1))
        await seen(80)

        async def saved() -> bool:
            state = await director.client.store.state("bank", "Account", "o1")
            return state == b'{"cents":10,"events":20}'

        await until(saved, "the state")


@pytest.mark.parametrize("where", ["async", "plain", "transaction"])
@in_loop
async def test_a_handler_may_delete_the_state_of_its_key(one: World, where: str) -> None:
    bank = Service("bank")

    def change(event: Placed, account: Account) -> None:
        account.cents += event.cents
        SEEN.append((event.order, account.cents))
        if event.cents == 100:
            delete_state()
            account.cents = -1  # counts for nothing

    if where == "async":

        @bank.on(Placed, state=Account)
        async def credit(event: Placed, account: Account) -> None:
            change(event, account)

    elif where == "plain":
        bank.on(Placed, state=Account, name="credit")(change)
    else:

        @bank.on(Placed, state=Account, transaction=True)
        def credit_all(event: Placed, account: Account, connection: Any) -> None:
            change(event, account)

    async with one.working(bank) as director:
        for cents in (1, 100, 7):
            await publish(director, Placed(order="o", cents=cents))
        await seen(3)
        assert SEEN == [("o", 1), ("o", 101), ("o", 7)]
        await publish(director, Placed(order="o", cents=100))

        async def gone() -> bool:
            return await director.client.store.state("bank", "Account", "o") is None

        await until(gone, "the state to be deleted")
    with pytest.raises(OnlyInHandler, match=r"delete_state\(\) works only inside a handler"):
        delete_state()


@in_loop
async def test_a_handler_without_state_has_none_to_delete(one: World) -> None:
    bank = Service("bank")

    @bank.on(Placed)
    async def credit(event: Placed) -> None:
        delete_state()

    async with one.working(bank) as director:
        await publish(director, Placed(order="o", cents=1))
        (letter,) = await dead(director.client)
        assert "keeps no state: declare it with state=" in letter.cause


@in_loop
async def test_a_batch_is_one_call_and_a_bad_event_in_it_fails_alone(one: World) -> None:
    bank = Service("bank")

    @bank.on(Placed, batch=10, linger="300ms", retry=SOON)
    async def charge(events: list[Placed]) -> list[Paid]:
        if any(event.cents == 5 for event in events):
            raise ValueError("bad")
        SEEN.append([event.cents for event in events])
        return [Paid(order=event.order) for event in events]

    async with one.working(bank) as director:
        await asyncio.gather(
            *(publish(director, Placed(order=f"o{n}", cents=n)) for n in range(20))
        )
        (letter,) = await dead(director.client)

        async def all_paid() -> bool:
            return len(await published(director.client, Paid)) == 19

        await until(all_paid, "19 payments")
    assert letter.key == "o5"
    assert max(map(len, SEEN)) == 10
    assert sorted(cents for batch in SEEN for cents in batch) == [n for n in range(20) if n != 5]


@in_loop
async def test_a_handler_begins_where_it_says(one: World) -> None:
    bank = Service("bank")

    @bank.on(Placed)
    async def first(event: Placed) -> None:
        SEEN.append(("first", event.order))

    async with one.working(bank) as director:
        await publish(director, Placed(order="a"))
        await seen(1)
    later = Service("later")

    @later.on(Placed)
    async def at_end(event: Placed) -> None:
        SEEN.append(("end", event.order))

    @later.on(Placed, since="beginning")
    async def at_beginning(event: Placed) -> None:
        SEEN.append(("beginning", event.order))

    async with one.working(bank, later) as director:
        await publish(director, Placed(order="b"))
        await seen(5)
    assert sorted(SEEN) == [
        ("beginning", "a"), ("beginning", "b"), ("end", "b"), ("first", "a"), ("first", "b"),
    ]  # fmt: skip


@in_loop
async def test_where_filters_and_a_ttl_expires(one: World) -> None:
    bank = Service("bank")

    class Price(Event, key="sku", ttl="50ms"):
        sku: str

    @bank.on(Placed, where=lambda event: event.cents > 5)
    async def big(event: Placed) -> None:
        SEEN.append(event.cents)

    @bank.on(Price)
    async def price(event: Price) -> None:
        SEEN.append(event.sku)

    async with one.idle(bank) as director:
        await publish(director, Price(sku="old"))
        await asyncio.sleep(0.06)
    async with one.working(bank) as director:
        for cents in (1, 9, 2):
            await publish(director, Placed(order="a", cents=cents))
        await publish(director, Price(sku="new"))
        await publish(director, Placed(order="a", cents=10))
        await seen(3)
        assert await whys(director.client) == {
            "a 1": "its where= filters it out", "a 2": "its where= filters it out",
            "old": "it was older than its ttl of 0.05 s",
        }  # fmt: skip
    assert sorted(map(str, SEEN)) == ["10", "9", "new"]


async def whys(client: Client) -> dict[str, str]:
    """Say why events were passed over, by what is in them, once all cursors are written."""

    async def found() -> dict[str, str]:
        stories = [await client.events.story(row.id) for row in await client.events.list()]
        handled = [(s.event, handled) for s in stories for handled in s.handled]
        if any(one.outcome == "waiting" for _, one in handled):
            return {}
        said = {
            " ".join(map(str, json.loads(event.data).values())): one.why
            for event, one in handled if one.outcome == "passed over"
        }  # fmt: skip
        return said

    return await until(found)


@in_loop
async def test_what_is_from_before_a_handler_began_says_so(one: World) -> None:
    early, late = Service("bank"), Service("bank")

    @early.on(Placed)
    async def first(event: Placed) -> None: ...

    late.on(Placed)(first)

    @late.on(Placed)
    async def second(event: Placed) -> None: ...

    async with one.idle(early) as director:
        await publish(director, Placed(order="a"))
    async with one.working(late) as director:
        said = await whys(director.client)
    assert list(said.values()) == ["it is from before the handler began"]


@in_loop
async def test_a_shadow_that_fails_is_not_logged_as_one_that_gave_up(
    one: World, caplog: pytest.LogCaptureFixture
) -> None:
    bank = Service("bank")

    @bank.on(Placed)
    async def charge(event: Placed) -> None: ...

    @bank.on(Placed, shadow=True)
    async def charge2(event: Placed) -> None:
        raise ValueError("unlucky")

    async with one.working(bank) as director:
        await publish(director, Placed(order="a"), id="p-1")
        no = await handler_no(director.client, "charge2")
        await until(lambda: director.client.store.shadows(no, 10))
    said = [record.getMessage() for record in caplog.records if "p-1" in record.getMessage()]
    assert said == [
        "shadow bank.charge2 failed on event p-1, which changes nothing: ValueError: unlucky"
    ]


@in_loop
async def test_a_shadow_publishes_nothing_and_records_what_it_would_have(one: World) -> None:
    bank = Service("bank")

    @bank.on(Placed)
    async def charge(event: Placed) -> Paid:
        return Paid(order=event.order)

    @bank.on(Placed, shadow=True)
    async def charge2(event: Placed) -> Paid | Refused:
        return Refused(order=event.order) if event.cents > 1 else Paid(order=event.order)

    async with one.working(bank) as director:
        client = director.client
        for cents in range(4):
            await publish(director, Placed(order=f"o{cents}", cents=cents))
        no = await handler_no(client, "charge2")

        async def recorded() -> Any:
            rows = await client.store.shadows(no, 10)
            return rows if len(rows) == 4 else None

        rows = await until(recorded, "shadows")
        assert len(await published(client, Refused)) == 0
        assert len(await published(client, Paid)) == 4
    assert Counter(b"Refused" in row.events for row in rows) == {True: 2, False: 2}


@in_loop
async def test_a_share_of_the_keys_goes_to_the_new_version_for_good(one: World) -> None:
    """Each event is handled by exactly one of the two, always the same for a key."""
    bank = Service("bank")

    @bank.on(Placed)
    async def charge(event: Placed) -> None:
        SEEN.append(("old", event.order))

    @bank.on(Placed, share=0.25)
    async def charge2(event: Placed) -> None:
        SEEN.append(("new", event.order))

    async with one.working(bank) as director:
        for number in range(400):
            await publish(director, Placed(order=f"o{number % 200}"))
        await seen(400)
    by_key: dict[str, set[str]] = {}
    for who, order in SEEN:
        by_key.setdefault(order, set()).add(who)
    assert all(len(who) == 1 for who in by_key.values())
    assert 25 <= sum(who == {"new"} for who in by_key.values()) <= 75
    assert len(SEEN) == 400


@in_loop
async def test_the_breaker_pauses_a_handler_and_lets_it_go_on(one: World) -> None:
    bank = Service("bank")
    BROKEN.add("all")
    breaker = Breaker(window=5, failures=0.8, pause="100ms")

    @bank.on(Placed, retry=Retry(attempts=0, first="1ms", factor=1, most="1ms"), breaker=breaker)
    async def charge(event: Placed) -> None:
        SEEN.append(event.order)
        if BROKEN:
            raise ValueError("closed")

    async with one.working(bank) as director:
        client = director.client
        for number in range(10):
            await publish(director, Placed(order=f"o{number}"))

        async def paused() -> bool:
            (row,) = await client.store.handler_rows()
            return row.reason.startswith("breaker")

        await until(paused, "the breaker")
        calls = len(SEEN)
        assert calls < 30
        BROKEN.clear()

        async def all_done() -> bool:
            (row,) = await client.store.handler_rows()
            return not row.reason and await client.store.parked_count(row.no) == 0

        await until(all_done, "all handled")
    assert len(set(SEEN)) == 10


@in_loop
async def test_a_paused_handler_waits_and_goes_on(world: World) -> None:
    bank = Service("bank")

    @bank.on(Placed)
    async def charge(event: Placed) -> None:
        SEEN.append(event.order)

    async with world.working(bank) as director:
        client = director.client
        no = await handler_no(client, "charge")
        await client.handlers.pause("charge")
        (subscription,) = subscriptions(director)

        async def is_paused() -> bool:
            return subscription.paused_until_us == LAST_US

        await until(is_paused, "the pause")
        await publish(director, Placed(order="a"))
        await asyncio.sleep(0.2)
        assert SEEN == []
        assert await client.store.backlog(no) == 1
        await client.handlers.resume("charge")
        await seen(1)


@in_loop
async def test_data_that_does_not_fit_is_a_dead_letter_and_blocks_no_other(world: World) -> None:
    """Invariant 11."""
    bank = Service("bank")

    @bank.on(Placed, retry=SOON)
    async def charge(event: Placed) -> None:
        SEEN.append(event.order)

    async with world.working(bank) as director:
        store = director.client.store
        now = store.now_us()
        bad = [b'{"cents":1}', b'{"order":"x","cents":"many"}', b"[]"]
        commit = Commit(lambda error: None)
        commit.events = [
            EventRow(
                f"bad{n}", "Placed", 1, "x", "test", now, f"bad{n}", "", "", data,
                store.slot_of("x", ""),
            )
            for n, data in enumerate(bad)
        ]  # fmt: skip
        store.submit([commit], None, lambda results: None)
        await publish(director, Placed(order="x"))
        await seen(1)

        async def three() -> Any:
            letters = await store.dead_letters(DeadFilter())
            return letters if len(letters) == 3 else None

        letters = await until(three, "three dead letters")
    assert SEEN == ["x"]
    assert [letter.attempts for letter in letters] == [1, 1, 1]
    assert "order" in letters[0].cause


@in_loop
async def test_memory_is_bounded_however_fast_events_come(one: World) -> None:
    bank = Service("bank")
    gate = asyncio.Event()

    @bank.on(Placed, concurrency=5)
    async def charge(event: Placed) -> None:
        await gate.wait()
        SEEN.append(event.cents)

    async with one.working(bank) as director:
        await asyncio.gather(
            *(publish(director, Placed(order=f"o{n}", cents=n)) for n in range(5000))
        )
        (subscription,) = subscriptions(director)
        assert subscription.queued <= 1000
        assert len(subscription.lanes) <= 1000
        gate.set()
        await seen(5000)
    assert sorted(SEEN) == list(range(5000))


# -- events and runs ---------------------------------------------------------------------------


@in_loop
async def test_an_event_starts_a_run_once_and_the_run_answers_with_events(world: World) -> None:
    shop, mail = Service("shop"), Service("mail")

    @shop.workflow(starts_on=Placed)
    async def fulfil(order: Placed) -> str:
        await shop.publish(Shipped(order=order.order))
        return order.order

    @mail.on(Shipped)
    async def thank(event: Shipped) -> None:
        SEEN.append((event.order, delivery().conversation))

    async with world.working(shop, mail) as director:
        for _ in range(3):
            await publish(director, Placed(order="a"), id="evt-1")
        await seen(1)
        assert await director.get("evt-1.fulfil").result(timeout=30) == "a"
        await publish(director, Placed(order="b"), id="evt-2")
        await seen(2)
    assert SEEN == [("a", "evt-1"), ("b", "evt-2")]


@pytest.mark.parametrize("first", ["event", "wait"])
@in_loop
async def test_a_run_receives_a_published_event_early_or_late(world: World, first: str) -> None:
    shop = Service("shop")

    @shop.workflow(receives=[Paid])
    async def fulfil(order: str) -> str:
        return (await receive(Paid, key=order)).order

    async with world.working(shop) as director:
        if first == "event":
            await publish(director, Paid(order="a"))
            run = await director.start(fulfil, "a")
        else:
            run = await director.start(fulfil, "a")
            await asyncio.sleep(0.1)
            await publish(director, Paid(order="b"))
            await publish(director, Paid(order="a"))
        assert await run.result(timeout=30) == "a"


@in_loop
async def test_a_run_receives_each_event_of_a_key_once_and_in_order(world: World) -> None:
    shop = Service("shop")

    @shop.workflow(receives=[Placed])
    async def gather(key: str, count: int) -> list[int]:
        got = []
        for _ in range(count):
            try:
                async with asyncio.timeout(0.05):
                    got.append((await receive(Placed, key=key)).cents)
            except TimeoutError:
                got.append((await receive(Placed, key=key)).cents)
        return got

    async with world.working(shop) as director:
        run = await director.start(gather, "k", 6)
        other = await director.start(gather, "k", 6)
        for cents in range(6):
            await publish(director, Placed(order="k", cents=cents))
            await asyncio.sleep(0.03 * (cents % 3))
        assert await run.result(timeout=30) == [0, 1, 2, 3, 4, 5]
        assert await other.result(timeout=30) == [0, 1, 2, 3, 4, 5]


@in_loop
async def test_no_event_is_lost_that_comes_at_the_instant_of_the_wait(world: World) -> None:
    """Invariant 4: the mailbox race."""
    shop = Service("shop")

    @shop.workflow(receives=[Paid])
    async def fulfil(order: str) -> str:
        return (await receive(Paid, key=order)).order

    async with world.working(shop) as director:

        async def race(number: int) -> str:
            run, _ = await asyncio.gather(
                director.start(fulfil, f"o{number}"), publish(director, Paid(order=f"o{number}"))
            )
            return await run.result(timeout=30)

        results = await asyncio.gather(*(race(number) for number in range(300)))
    assert results == [f"o{number}" for number in range(300)]


@in_loop
async def test_a_handler_starts_runs_and_sends_to_them(world: World) -> None:
    shop, bank = Service("shop"), Service("bank")

    @shop.workflow(receives=[Paid])
    async def fulfil(order: str) -> str:
        return (await receive(Paid)).order

    @bank.on(Placed)
    async def begin(event: Placed) -> Refused:
        SEEN.append(await fulfil.start(event.order))
        return Refused(order=event.order)

    @bank.on(Refused)
    async def go_on(event: Refused) -> None:
        await fulfil.send(SEEN[0], Paid(order=event.order))

    async with world.working(shop, bank) as director:
        await publish(director, Placed(order="a"))
        await seen(1)
        await until(lambda: director.client.store.run_rows(SEEN[0]), "the run")
        assert await director.get(SEEN[0]).result(timeout=30) == "a"


@in_loop
async def test_a_handler_in_a_transaction_writes_with_its_commit_or_not_at_all(one: World) -> None:
    bank = Service("bank")
    failures = Counter[str]()

    @bank.on(Placed, transaction=True, retry=SOON, state=Account)
    def charge(event: Placed, account: Account, connection: Any) -> Paid:
        connection.execute("CREATE TABLE IF NOT EXISTS charges (id TEXT PRIMARY KEY, cents INT)")
        connection.execute("INSERT INTO charges VALUES (?, ?)", (event.order, event.cents))
        account.cents += event.cents
        if failures[event.order] < event.cents:
            failures[event.order] += 1
            raise ValueError("not yet")
        return Paid(order=event.order)

    async with one.working(bank) as director:
        for cents in range(4):
            await publish(director, Placed(order=f"o{cents}", cents=cents))
        (letter,) = await dead(director.client)
        assert letter.key == "o3"

        async def paid() -> bool:
            return len(await published(director.client, Paid)) == 3

        await until(paid)
    import apsw

    rows = apsw.Connection(str(one.path)).execute("SELECT * FROM charges ORDER BY id").fetchall()
    assert rows == [("o0", 0), ("o1", 1), ("o2", 2)]
