"""Events that start runs, runs that wait for events, and handlers that talk to runs."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from pavane import (
    App,
    BadArguments,
    Event,
    Retry,
    RunEnded,
    RunFailed,
    Service,
    choreographed,
    continue_as_new,
    receive,
)
from pavane.core.codec import error_summary
from pavane.core.operations import Mode
from pavane.steering.dead import DeadQuery
from pavane.stores.eventlog import DeadFilter, EventFilter
from tests.integration.world import (
    LAYOUTS,
    MODES,
    Director,
    Place,
    World,
    in_loop,
    until,
    until_status,
)

CASES = [(mode, layout) for mode in MODES for layout in LAYOUTS]


class Placed(Event, key="order"):
    order: str
    n: int = 0


class Paid(Event, key="order"):
    order: str
    n: int = 0


class Cancelled(Event, key="order"):
    order: str


class Offer(Event, key="order", ttl="300ms"):
    order: str


class Loose(Event):
    n: int = 0


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case).replace(" ", "_"))
def world(request: pytest.FixtureRequest, place: Place) -> World:
    return World(place, *request.param)


@pytest.fixture
def small(tmp_path: Path) -> World:
    return World(tmp_path / "world.db", "orchestration", "one node")


async def publish(director: Director, event: Any, id: str | None = None) -> str:
    return await director.client.publish(event, source="test", id=id)


async def result(director: Director, id: str) -> Any:
    await until(lambda: director.client.store.run_rows(id), f"run {id}")
    return await director.get(id).result(timeout=30)


# -- waiting for what is published -------------------------------------------------------------


@in_loop
async def test_early_late_and_concurrent_events_all_arrive(world: World) -> None:
    """Invariant 4; the baton is away from home when the run begins to wait."""
    shop, bank = Service("shop"), Service("bank")

    @bank.step
    async def check(order: str) -> str:
        return order

    @shop.workflow(receives=[Paid])
    async def fulfil(order: str) -> list[int]:
        found: list[int] = []
        for _ in range(3):
            await check(order)
            found.append((await receive(Paid, key=order)).n)
            await check(order)
        return found

    async with world.working(shop, bank) as director:
        await publish(director, Paid(order="a", n=1))
        runs = [await director.start(fulfil, "a"), await director.start(fulfil, "a")]
        await publish(director, Paid(order="a", n=2))
        await asyncio.sleep(0.1)
        await publish(director, Paid(order="a", n=3))
        assert [await run.result(timeout=30) for run in runs] == [[1, 2, 3], [1, 2, 3]]


@in_loop
async def test_what_a_handler_sends_to_a_run_before_it_begins_is_received(world: World) -> None:
    """Invariant 4: its mailbox keeps the event, and the run looks there when it begins."""
    shop = Service("shop")

    @shop.workflow(receives=[Loose])
    async def fulfil(order: str) -> list[int]:
        return [(await receive(Loose)).n for _ in range(2)]

    @shop.on(Placed)
    async def tell(event: Placed) -> None:
        await fulfil.send(event.order, Loose(n=event.n))

    async with world.working(shop) as director:
        for order in ("a", "b", "c"):
            await publish(director, Placed(order=order, n=1))
            await until(lambda order=order: director.client.store.mail_of("shop", order), "mail")
            run = await director.start(fulfil, order, id=order)
            await run.send(Loose(n=2))
            assert await run.result(timeout=30) == [1, 2]


@in_loop
async def test_several_receives_may_be_raced_and_the_loser_is_given_back(world: World) -> None:
    shop = Service("shop")

    @shop.workflow(receives=[Paid, Cancelled])
    async def fulfil(order: str) -> list[str]:
        seen: list[str] = []
        for _ in range(3):
            waits = [
                asyncio.ensure_future(receive(Paid, key=order)),
                asyncio.ensure_future(receive(Cancelled, key=order)),
            ]
            done, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()
            seen += sorted(type(task.result()).__name__ for task in done)
            if len(seen) == 3:
                break
        return seen

    async with world.working(shop) as director:
        run = await director.start(fulfil, "a")
        await asyncio.sleep(0.05)
        for event in (Paid(order="a"), Cancelled(order="a"), Paid(order="b"), Paid(order="a")):
            await publish(director, event)
        assert sorted(await run.result(timeout=30)) == ["Cancelled", "Paid", "Paid"]


@in_loop
async def test_two_waits_of_one_run_for_one_key_get_two_events(world: World) -> None:
    """Invariant 4: each event once per run."""
    shop = Service("shop")

    @shop.workflow(receives=[Paid])
    async def fulfil(order: str) -> list[int]:
        both = await asyncio.gather(receive(Paid, key=order), receive(Paid, key=order))
        return [event.n for event in both]

    async with world.working(shop) as director:
        run = await director.start(fulfil, "a")
        for n in (1, 2):
            await publish(director, Paid(order="a", n=n), id=f"p{n}")
            await publish(director, Paid(order="a", n=n), id=f"p{n}")
        assert sorted(await run.result(timeout=30)) == [1, 2]


@in_loop
async def test_an_event_that_a_timeout_missed_is_there_for_the_next_wait(world: World) -> None:
    shop = Service("shop")

    @shop.workflow(receives=[Paid])
    async def fulfil(order: str) -> tuple[int, list[int]]:
        missed, seen = 0, list[int]()
        while len(seen) < 8:
            try:
                async with asyncio.timeout(0.01 * (missed + 1)):  # the answer may take longer
                    seen.append((await receive(Paid, key=order)).n)
            except TimeoutError:
                missed += 1
        return missed, seen

    async with world.working(shop) as director:
        run = await director.start(fulfil, "a")
        for n in range(8):
            await asyncio.sleep(0.004 * (n % 4))
            await publish(director, Paid(order="a", n=n))
        _, seen = await run.result(timeout=30)
    assert seen == list(range(8))


KEPT_S = 0.3


async def promptly(ask: Callable[[str], Awaitable[Any]]) -> tuple[str, Any]:
    """Return an order and what is answered for it, by the first that was in time for all of it.

    A pause of the machine may be longer than what an event is kept, or waited for.
    """
    for number in count():
        began_s, order = time.monotonic(), f"order {number}"
        answer = await ask(order)
        if time.monotonic() - began_s < KEPT_S:
            return order, answer
    raise AssertionError


@in_loop
async def test_an_event_is_kept_for_as_long_as_declared(small: World) -> None:
    shop = Service("shop")

    @shop.workflow(receives=[Paid], keep="300ms")
    async def fulfil(order: str, patient: bool) -> int:
        try:
            async with asyncio.timeout(3600 if patient else KEPT_S):
                return (await receive(Paid, key=order)).n
        except TimeoutError:
            return -1

    async with small.working(shop) as director:

        async def at_once(order: str) -> int:
            await publish(director, Paid(order=order, n=1))
            return await director.result(fulfil, order, False)

        order, number = await promptly(at_once)
        assert number == 1
        await asyncio.sleep(KEPT_S + 0.1)
        run = await director.start(fulfil, order, True)
        await until_status(run, "waiting", reason="Paid")
        await until(lambda: director.client.store.awaits("shop", "Paid", order), "the wait")
        await publish(director, Paid(order=order, n=2))
        assert await run.result(timeout=30) == 2


@in_loop
async def test_an_event_is_kept_no_longer_than_its_own_time_to_live(small: World) -> None:
    shop = Service("shop")

    @shop.workflow(receives=[Offer], keep="1h")
    async def accept(order: str) -> str:
        try:
            async with asyncio.timeout(KEPT_S):
                return (await receive(Offer, key=order)).order
        except TimeoutError:
            return "too late"

    async with small.working(shop) as director:

        async def at_once(order: str) -> str:
            await publish(director, Offer(order=order))
            return await director.result(accept, order)

        order, answer = await promptly(at_once)
        assert answer == order
        await asyncio.sleep(KEPT_S + 0.1)
        assert await director.result(accept, order) == "too late"


@in_loop
async def test_each_workflow_finds_events_for_as_long_as_it_says_itself(small: World) -> None:
    shop = Service("shop")

    async def within(order: str) -> str:
        try:
            async with asyncio.timeout(KEPT_S):
                return (await receive(Paid, key=order)).order
        except TimeoutError:
            return "too late"

    @shop.workflow(receives=[Paid], keep="300ms")
    async def hasty(order: str) -> str:
        return await within(order)

    @shop.workflow(receives=[Paid], keep="1h")
    async def patient(order: str) -> str:
        return await within(order)

    async with small.working(shop) as director:

        async def at_once(order: str) -> str:
            await publish(director, Paid(order=order))
            return await director.result(hasty, order)

        order, answer = await promptly(at_once)
        assert answer == order
        await asyncio.sleep(KEPT_S + 0.1)
        assert await director.result(hasty, order) == "too late"
        _, answer = await promptly(lambda _: director.result(patient, order))
        assert answer == order


@in_loop
async def test_what_an_app_does_is_refused_where_it_would_not_be_part_of_a_commit(
    tmp_path: Path,
) -> None:
    shop = Service("shop")

    @shop.workflow
    async def nothing() -> None: ...

    @shop.workflow
    async def sells(what: str) -> None:
        if what == "publish":
            await app.publish(Loose())
        elif what == "start":
            await app.start(nothing)
        else:
            await app.get("a run").result()

    @shop.on(Placed)
    async def place(event: Placed) -> None:
        await app.publish(Loose())

    app = App("shop", [shop], store=str(tmp_path / "shop.db"))
    async with app:
        for what in ("publish", "start", "result"):
            with pytest.raises(RunFailed, match="not possible in workflow code"):
                await (await app.start(sells, what)).result(timeout=30)
        await app.publish(Placed(order="a"))
        (letter,) = await until(lambda: app.client.store.dead_letters(DeadFilter()))
        assert "Use `service.publish(event)`, which is written" in error_summary(letter.error)
        types = [row.type for row in await app.client.store.find_events(EventFilter())]
        assert types == ["Placed"]


@in_loop
async def test_a_run_that_waits_for_nothing_durable_is_stuck_and_says_so(world: World) -> None:
    shop, depot = Service("shop"), Service("depot")
    patience = True

    @depot.step
    async def look() -> None: ...

    @shop.workflow
    async def waits() -> str:
        await look()
        if patience:
            await asyncio.Event().wait()
        return "done"

    async with world.working(shop, depot) as director:
        run = await director.start(waits)
        await until_status(run, "stuck", reason="waits, but for nothing that is journalled")
        patience = False
        await run.retry()
        assert await run.result(timeout=30) == "done"


@in_loop
async def test_a_run_that_goes_on_anew_gets_each_event_once(world: World) -> None:
    """Invariant 4, across continue_as_new."""
    shop = Service("shop")

    @shop.workflow(receives=[Paid])
    async def fulfil(order: str, seen: list[int]) -> list[int]:
        seen.append((await receive(Paid, key=order)).n)
        seen.append((await receive(Paid, key=order)).n)
        if len(seen) < 6:
            continue_as_new(order, seen)
        return seen

    async with world.working(shop) as director:
        await publish(director, Paid(order="a", n=0))
        run = await director.start(fulfil, "a", [])
        for n in range(1, 6):
            await publish(director, Paid(order="a", n=n))
            await asyncio.sleep(0.01 * (n % 2))
        assert await run.result(timeout=30) == [0, 1, 2, 3, 4, 5]


@in_loop
async def test_what_is_sent_again_takes_effect_once_however_often_the_run_went_on(
    world: World,
) -> None:
    """Invariant 4, across continue_as_new."""
    shop = Service("shop")

    @shop.workflow(receives=[Loose])
    async def add(total: int) -> int:
        event = await receive(Loose)
        if event.n:
            continue_as_new(total + event.n)
        return total

    async with world.working(shop) as director:
        run = await director.start(add, 0)
        await run.send(Loose(n=5), id="once")
        await until_status(director.get(f"{run.id}~2"), "waiting", reason="Loose")
        for _ in range(2):
            await run.send(Loose(n=5), id="once")
            await asyncio.sleep(0.1)
        await run.send(Loose(n=1), id="other")
        await until_status(director.get(f"{run.id}~3"), "waiting", reason="Loose")
        await run.send(Loose(n=0), id="last")
        assert await run.result(timeout=30) == 6
        await run.send(Loose(n=0), id="last")
        with pytest.raises(RunEnded):
            await run.send(Loose(n=0), id="late")


@in_loop
async def test_only_what_has_a_key_can_be_waited_for_by_key(small: World) -> None:
    shop = Service("shop")

    @shop.workflow(receives=[Loose, Paid])
    async def loose() -> None:
        await receive(Loose, key="a")

    @shop.workflow(receives=[Paid])
    async def empty() -> None:
        await receive(Paid, key="")

    @shop.workflow(receives=[Paid])
    async def unfindable() -> None:
        await receive(Paid, key="a\0b")

    whys = {
        loose: "Loose has no key", empty: "an empty key counts as one",
        unfindable: r"receive\(Paid, …\) has the key 'a\\x00b', which holds a NUL",
    }  # fmt: skip
    async with small.working(shop) as director:
        for flow, why in whys.items():
            run = await director.start(flow)
            with pytest.raises(Exception, match=why):
                await run.result(timeout=30)


# -- starting on, sending to -------------------------------------------------------------------


@in_loop
async def test_a_chain_of_runs_that_start_each_other_by_events(world: World) -> None:
    """Invariant 4; ids of events that runs publish are ids of runs in turn."""
    shop, bank = Service("shop"), Service("bank")
    mode: Mode = world.mode

    @bank.step
    async def charge(order: str) -> int:
        return len(order)

    @shop.step
    async def label(order: str) -> str:
        return f"{order}!"

    @shop.workflow(starts_on=Placed, receives=[Paid], mode=mode)
    async def fulfil(event: Placed) -> str:
        await charge(event.order)
        text = await label(event.order)
        await shop.publish(Cancelled(order=event.order))
        paid = await receive(Paid, key=event.order)
        return f"{text} {paid.n}"

    @bank.workflow(starts_on=Cancelled, mode=mode)
    async def refund(event: Cancelled) -> str:
        await label(event.order)
        async with choreographed():
            n = await charge(event.order) + len(await label(event.order))
        await bank.publish(Paid(order=event.order, n=n))
        return event.order

    async with world.working(shop, bank) as director:
        for _ in range(2):
            await publish(director, Placed(order="a"), id="e1")
        assert await result(director, "e1.fulfil") == "a! 3"
        (event,) = await director.client.store.find_events(EventFilter(types=("Cancelled",)))
        assert event.conversation == "e1"
        runs = await director.client.store.runs_in("e1")
        (refunding,) = [id for id in runs if id != "e1.fulfil"]
        assert await result(director, refunding) == "a"
        assert len(await director.client.store.find_events(EventFilter(types=("Paid",)))) == 1


@in_loop
async def test_handlers_start_runs_and_send_to_them_once(world: World) -> None:
    shop, desk = Service("shop"), Service("desk")

    @shop.workflow(receives=[Loose])
    async def gather(order: str, count: int) -> list[int]:
        return [(await receive(Loose)).n for _ in range(count)]

    @desk.on(Placed)
    async def begin(event: Placed) -> None:
        if event.n == 0:
            await gather.start(event.order, 3)
        else:
            await gather.send(event.order, Loose(n=event.n))

    async with world.working(shop, desk) as director:
        run = await director.start(gather, "x", 3, id="known")
        for n in (1, 2, 3):
            for _ in range(2):
                await publish(director, Placed(order="known", n=n), id=f"e{n}")
        assert await run.result(timeout=30) == [1, 2, 3]
        await publish(director, Placed(order="y"), id="begin")

        async def begun() -> Any:
            return await director.client.store.runs_in("begin")

        (id,) = await until(begun, "the run that a handler started")
        for n in range(3):
            await director.get(id).send(Loose(n=n))
        assert await director.get(id).result(timeout=30) == [0, 1, 2]


@in_loop
async def test_events_that_come_for_a_run_that_has_ended_are_refused_or_kept(small: World) -> None:
    """Late and duplicate events are visible, not lost: in the log, and in the run's mail."""
    shop, desk = Service("shop"), Service("desk")

    @shop.workflow(receives=[Loose])
    async def gather() -> int:
        return (await receive(Loose)).n

    @desk.on(Placed)
    async def tell(event: Placed) -> None:
        await gather.send(event.order, Loose(n=event.n))

    async with small.working(shop, desk) as director:
        run = await director.start(gather, id="r1")
        await run.send(Loose(n=1))
        assert await run.result(timeout=30) == 1
        with pytest.raises(RunEnded, match="'r1' has ended"):
            await run.send(Loose(n=2))
        await publish(director, Placed(order="r1", n=3))

        async def kept() -> Any:
            return await director.client.store.mail_of("shop", "r1")

        (mail,) = await until(kept, "late mail")
        assert mail.body == b'{"n":3}'


@in_loop
async def test_a_handler_sends_only_what_a_workflow_receives(small: World) -> None:
    shop = Service("shop")

    @shop.workflow(receives=[Loose])
    async def gather() -> int:
        return (await receive(Loose)).n

    failures: list[BaseException] = []

    @shop.on(Placed)
    async def tell(event: Placed) -> None:
        try:
            await gather.send("r1", Paid(order="a"))
        except BadArguments as error:
            failures.append(error)

    async with small.working(shop) as director:
        await publish(director, Placed(order="a"))

        async def failed() -> Any:
            return failures

        (error,) = await until(failed)
    assert "does not receive Paid; it receives: Loose" in str(error)


# -- events that do not fit their class --------------------------------------------------------


@in_loop
async def test_an_event_that_does_not_fit_its_class_is_refused_where_it_is_published(
    small: World,
) -> None:
    shop = Service("shop")
    bad: Any = Paid(order="a", n="many")  # pyright: ignore[reportArgumentType]
    why = r"This Paid does not fit its class: Expected `int`, got `str` - at `\$\.n`"

    @shop.on(Placed, retry=Retry(attempts=1))
    async def pay(event: Placed) -> Paid:
        return bad

    @shop.workflow(receives=[Paid])
    async def settle() -> str:
        try:
            await shop.publish(bad)
        except BadArguments as error:
            return str(error)
        return (await receive(Paid)).order

    async with small.working(shop) as director:
        with pytest.raises(BadArguments, match=why):
            await publish(director, bad)
        assert re.match(why, await director.result(settle))
        await publish(director, Placed(order="a"))
        (letter,) = await until(director.client.dead.list, "a dead letter")
        assert letter.cause.startswith("BadArguments: This Paid does not fit its class")
        assert await director.client.events.list(EventFilter(types=("Paid",))) == []


@in_loop
async def test_an_event_that_does_not_fit_its_class_is_not_sent(small: World) -> None:
    shop = Service("shop")

    @shop.workflow(receives=[Loose])
    async def wait() -> int:
        return (await receive(Loose)).n

    async with small.working(shop) as director:
        run = await director.start(wait)
        with pytest.raises(BadArguments, match=r"This Loose does not fit.* - at `\$\.n`"):
            await run.send(Loose(n="1"))  # pyright: ignore[reportArgumentType]
        await run.send(Loose(n=1))
        assert await run.result(timeout=30) == 1


# -- events of newer code ----------------------------------------------------------------------


class Booked(Event, key="order"):
    order: str
    amount: int


class BookedNow(Event, key="order", version=2, type_name="Booked"):
    order: str
    amount: int
    """In cents since version 2."""


def book_keepers(kind: Any, seen: list[tuple[str, int]]) -> list[Service]:
    """Return services that take bookings in every way there is, as code that knows `kind`."""
    desk, archive = Service("desk"), Service("archive")

    async def note(event: Any) -> None:
        seen.append(("handler", event.amount))

    async def file(events: list[Any]) -> None:
        seen.extend(("batch", event.amount) for event in events)

    async def settle(event: Any) -> None:
        seen.append(("started", event.amount))

    async def wait(order: str) -> None:
        seen.append(("received", (await receive(kind, key=order)).amount))

    settle.__annotations__["event"] = kind
    desk.on(kind)(note)
    archive.on(kind, batch=10)(file)
    desk.workflow(starts_on=kind)(settle)
    archive.workflow(receives=[kind])(wait)
    return [desk, archive]


@in_loop
async def test_old_code_keeps_events_of_newer_code_as_dead_letters(small: World) -> None:
    seen: list[tuple[str, int]] = []
    old, new = book_keepers(Booked, seen), book_keepers(BookedNow, seen)
    async with small.working(*old) as director:
        (wait,) = old[1].workflows.values()
        await director.start(wait, "o-1", id="waits")
        await publish(director, BookedNow(order="o-1", amount=4200))

        async def all_dead() -> Any:
            letters = await director.client.dead.list()
            return letters if len(letters) == 4 else None

        letters = await until(all_dead, "four dead letters")
    assert seen == []
    for letter in letters:
        assert "was published by newer code" in letter.cause
    async with small.working(*new) as director:
        assert await director.client.dead.retry(DeadQuery()) == 4

        async def all_seen() -> bool:
            return len(seen) == 4

        await until(all_seen, f"four of {seen}")
        await director.get("waits").result(timeout=30)
    assert sorted(seen) == [(way, 4200) for way in ("batch", "handler", "received", "started")]


@in_loop
async def test_a_run_is_stuck_at_a_kept_event_of_newer_code_until_that_is_here(
    small: World,
) -> None:
    seen: list[tuple[str, int]] = []
    old, new = book_keepers(Booked, seen), book_keepers(BookedNow, seen)
    async with small.working(*new) as director:
        await publish(director, BookedNow(order="o-1", amount=4200))

        async def kept() -> Any:
            return await director.client.store.kept_events("archive", "Booked", "o-1")

        await until(kept, "a kept event")
    (wait,) = old[1].workflows.values()
    async with small.working(*old) as director:
        run = await director.start(wait, "o-1", id="waits")
        await until_status(run, "stuck", reason="published by newer code")
    async with small.working(*new) as director:
        await director.get("waits").result(timeout=30)
    assert ("received", 4200) in seen


@pytest.mark.parametrize("source", ["a\0b", "a b", "\ud800"])
@in_loop
async def test_a_source_that_no_store_keeps_is_refused(small: World, source: str) -> None:
    shop = Service("shop")
    async with small.working(shop) as director:
        with pytest.raises(BadArguments, match="must be printable"):
            await director.client.publish(Paid(order="a", n=1), source=source)


@pytest.mark.parametrize("exits", [SystemExit, KeyboardInterrupt])
@in_loop
async def test_a_handler_that_exits_fails_and_its_node_goes_on(
    small: World, exits: type[BaseException]
) -> None:
    """Invariant 11."""
    shop = Service("shop")
    handled: list[int] = []

    @shop.on(Paid, retry=Retry(attempts=1), timeout="10s")
    async def note(event: Paid) -> None:
        if not event.n:
            raise exits
        handled.append(event.n)

    async with small.working(shop) as director:
        await publish(director, Paid(order="a", n=0))
        (letter,) = await until(lambda: director.client.dead.list(DeadQuery()))
        assert letter.cause.startswith(exits.__name__)
        await publish(director, Paid(order="a", n=1))

        async def is_handled() -> bool:
            return handled == [1]

        await until(is_handled)
