"""An app in simulation: what a test of it can do, see, and break."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import pytest

from pavane import (
    App,
    BadArguments,
    BadDeclaration,
    Event,
    Retry,
    RunFailed,
    Service,
    UnknownRun,
)
from pavane.errors import NotInSimulation
from pavane.testing.sim.app import CALLBACKS_MAX, Sim, calm_sim
from pavane.testing.sim.clock import Stalled
from tests.sim import tailor
from tests.sim.tailor import Delivered, Fitted, Ordered

T = TypeVar("T")


def play(test: Callable[[Sim[None]], Awaitable[T]], app: App = tailor.app) -> T:
    sim = calm_sim(app)

    async def acted() -> T:
        return await test(sim)

    return sim.play(acted())


# -- time --------------------------------------------------------------------------------------


def test_a_month_is_over_in_a_moment() -> None:
    async def order(sim: Sim[None]) -> str:
        began = sim.now
        coat = await sim.run(tailor.make, Ordered(order="o"), id="o")
        assert timedelta(days=30) < sim.now - began < timedelta(days=30, seconds=1)
        assert sim._simulation.trace.callbacks < 300
        return coat

    play(order)  # what is imported and compiled once does not count
    began_s = time.process_time()
    assert play(order) == "coat-of-cloth-o"
    assert time.process_time() - began_s < 1


def test_each_day_of_a_month_costs_little() -> None:
    async def be_reminded(sim: Sim[None]) -> int:
        times = await sim.run(tailor.remind, 300)
        assert sim._simulation.trace.callbacks < 300 * 100
        return times

    began_s = time.process_time()
    assert play(be_reminded) == 300
    assert time.process_time() - began_s < 300 * 0.03


def test_what_is_due_in_skipped_time_happens_at_its_time() -> None:
    async def order(sim: Sim[None]) -> list[list[Delivered]]:
        await sim.publish(Ordered(order="o", days=3))
        seen: list[list[Delivered]] = []
        for _ in range(3):
            seen.append(sim.published(Delivered))
            await sim.skip("1 day")
        return [*seen, sim.published(Delivered)]

    assert play(order) == [[], [], [], [Delivered(order="o")]]


def test_a_step_that_takes_long_is_leapt_over_too() -> None:
    async def wait(sim: Sim[None]) -> int:
        await sim.run(tailor.rest, 7200.0)
        return sim._simulation.trace.callbacks

    assert play(wait) < 2_000


def test_settled_is_what_waits_for_nothing_but_time() -> None:
    async def order(sim: Sim[None]) -> None:
        sim.fails(tailor.cut, times=2)
        await sim.publish(Ordered(order="o"), id="e")
        await sim.settle()
        assert len(sim.calls(tailor.cut)) == 3
        assert [status.status for status in sim.runs()] == ["waiting"]
        assert sim.now < datetime(2025, 6, 16, tzinfo=UTC)

    play(order)


def test_who_awaits_what_never_comes_is_told_where_and_why() -> None:
    async def wait(sim: Sim[None]) -> int:
        run = await sim.start(tailor.fit, "o", id="o-1")
        return await run.result()

    with pytest.raises(
        Stalled, match=r"does not come.*Run o-1 is waiting \(event Fitted\)"
    ) as told:
        play(wait)
    assert [entry.name for entry in told.traceback][-1] == "wait"


restless = Service("restless")


class Asked(Event, key="who"):
    who: str


@restless.step
async def poll() -> None:
    while True:
        await asyncio.sleep(1)


@restless.workflow
async def wait_for_poll() -> None:
    await poll()


@restless.workflow
async def tick() -> None:
    while True:
        await asyncio.sleep(1)


@restless.on(Asked, retry=Retry(attempts=0))
async def answer(asked: Asked) -> None:
    raise ValueError("nobody knows")


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda sim: sim.start(wait_for_poll, id="w"), r"w waits for restless\.poll\."),
        (lambda sim: sim.publish(Asked(who="a")), r"restless\.answer was called \d+ times"),
    ],
)
def test_what_never_settles_is_named(
    ask: Callable[[Any], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pavane.testing.sim.app.SETTLING_MAX", 2_000)

    async def settle(sim: Sim[None]) -> None:
        await ask(sim)
        await sim.settle()

    text = rf"Something still goes on after 2,000 callbacks, at .*{message}"
    with pytest.raises(Stalled, match=text) as told:
        play(settle, App("restless", services=[restless]))
    assert [entry.name for entry in told.traceback][-1] == "settle"


def test_a_day_is_skipped_in_which_a_run_wakes_each_second() -> None:
    async def skip(sim: Sim[None]) -> None:
        await sim.start(tick)
        before = sim._simulation.trace.callbacks
        await sim.skip("10 minutes")
        assert (sim._simulation.trace.callbacks - before) * 6 * 24 < CALLBACKS_MAX
        assert sim.runs()[0].status == "waiting"

    play(skip, App("restless", services=[restless]))


def test_who_waits_for_what_goes_on_for_ever_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pavane.testing.sim.app.CALLBACKS_MAX", 20_000)

    async def wait(sim: Sim[None]) -> None:
        await sim.run(tick, id="t")

    with pytest.raises(Stalled, match=r"goes on after 20,000 callbacks.* Run t is waiting"):
        play(wait, App("restless", services=[restless]))


def test_schedules_begin_runs_in_virtual_time() -> None:
    app = App("reports", services=[tailor.shop, tailor.workshop, tailor.till])
    app.schedule("0 9 * * *", tailor.remind, 1, name="daily")

    async def wait(sim: Sim[None]) -> list[str]:
        await sim.skip("3 days")
        return [status.id for status in sim.runs()]

    days = ("16", "17", "18")
    assert play(wait, app) == [f"daily@2025-06-{day}T09:00:00+00:00" for day in days]


# -- runs and events ---------------------------------------------------------------------------


def test_runs_are_sent_to_cancelled_and_looked_at() -> None:
    async def steer(sim: Sim[None]) -> None:
        run = await sim.start(tailor.fit, "o-1", id="o-1")
        other = await sim.start(tailor.fit, "o-2", id="o-2")
        await sim.settle()
        with pytest.raises(BadArguments, match="has not ended; it is waiting"):
            sim.result("o-1")
        await run.send(Fitted(inches=42))
        await other.cancel()
        assert await run.result() == sim.result("o-1") == 42
        await sim.settle()
        assert {it.id: it.status for it in sim.runs()} == {"o-1": "completed", "o-2": "cancelled"}
        assert sim.calls(tailor.undo_payment) == [("o-2",)]
        assert [span.label for span in sim.timeline("o-1").spans] == ["till.pay", "shop.Fitted"]

    play(steer)


def test_a_handler_that_gives_up_leaves_a_dead_letter() -> None:
    async def deliver(sim: Sim[None]) -> None:
        await sim.publish(Delivered(order="rude"), id="e-1")
        await sim.settle()
        (letter,) = sim.dead_letters()
        assert (letter.handler, letter.event, letter.attempts) == ("till.thank", "e-1", 2)
        assert "no thanks" in letter.error
        assert len(sim.calls(tailor.thank)) == 2

    play(deliver)


def test_a_run_that_nobody_started_is_unknown() -> None:
    async def look(sim: Sim[None]) -> None:
        await sim.get("o-1").result()

    with pytest.raises(UnknownRun):
        play(look)


# -- trouble -----------------------------------------------------------------------------------


def test_steps_fail_as_they_are_told_and_are_tried_again() -> None:
    async def order(sim: Sim[None]) -> None:
        sim.fails(tailor.cut, times=2)
        await sim.run(tailor.make, Ordered(order="o"))
        assert sim.calls(tailor.cut) == [("o",)] * 3
        sim.fails(tailor.cut, times=3, error=ValueError("no cloth"))
        with pytest.raises(RunFailed) as failed:
            await sim.run(tailor.make, Ordered(order="o"))
        assert repr(failed.value.__cause__) == "ValueError('no cloth')"

    play(order)


def test_each_failure_that_was_asked_for_has_a_trace_of_its_own() -> None:
    async def deliver(sim: Sim[None]) -> None:
        sim.fails(tailor.thank, times=2, error=ValueError("no thanks"))
        await sim.publish(Delivered(order="o"))
        await sim.settle()
        (letter,) = sim.dead_letters()
        assert letter.trace.count("in _attempt") == 1

    play(deliver)


def test_what_a_process_did_before_it_died_is_done_again() -> None:
    async def order(sim: Sim[None]) -> None:
        sim.crash_after(tailor.cut)
        sim.crash_after(tailor.sew)
        sim.crash_after(tailor.thank)
        assert await sim.run(tailor.make, Ordered(order="o")) == "coat-of-cloth-o"
        await sim.settle()
        assert len(sim.calls(tailor.cut)) == len(sim.calls(tailor.sew)) == 2
        assert len(sim.calls(tailor.thank)) == 2
        assert not sim.dead_letters()

    play(order)


def test_fakes_stand_in_and_are_gone_afterwards() -> None:
    async def order(sim: Sim[None]) -> tuple[str, str]:
        async def other_cloth(order: str) -> str:
            return f"silk-{order}"

        sim.replace(tailor.cut, other_cloth)
        first = await sim.run(tailor.make, Ordered(order="o"))
        sim.replace(tailor.sew, lambda cloth: f"dress-of-{cloth}")
        return first, await sim.run(tailor.make, Ordered(order="o"))

    assert play(order) == ("coat-of-silk-o", "dress-of-silk-o")
    assert asyncio.run(tailor.cut("o")) == "cloth-o"
    assert not tailor.sew.is_async
    assert tailor.make.mode == "choreography"


def test_what_is_no_step_of_the_app_is_refused_with_those_that_are() -> None:
    async def replace(sim: Sim[None]) -> None:
        sim.replace(print, print)

    with pytest.raises(BadArguments, match=r"no step or handler of app 'tailor'. It has: workshop"):
        play(replace)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda sim: sim.run("make"), "'make' is no workflow. Give the function"),
        (lambda sim: sim.start(tailor.cut, "o"), "is no workflow. Give the function"),
        (lambda sim: sim.fails(tailor.cut, times=0), "times=0: how many attempts fail"),
        (lambda sim: sim.fails(tailor.cut, times="2"), "times='2': how many attempts fail"),
        (lambda sim: sim.fails(tailor.cut, error="declined"), "error='declined' is no exception"),
        (lambda sim: sim.skip(None), "None is not a duration. Write a number of seconds"),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_to_write(
    ask: Callable[[Any], Any], message: str
) -> None:
    async def act(sim: Sim[None]) -> None:
        await ask(sim)

    with pytest.raises((BadArguments, BadDeclaration), match=message):
        play(act)


def test_a_step_that_reaches_for_the_network_is_told_to_use_a_fake() -> None:
    async def phone(sim: Sim[None]) -> None:
        await sim.run(tailor.call)

    with pytest.raises(RunFailed) as failed:
        play(phone)
    assert isinstance(failed.value.__cause__, NotInSimulation)
    assert "sim.replace(step, fake)" in str(failed.value.__cause__)


bank = Service("bank")


class Paid(Event, key="account"):
    account: str
    cents: int


@bank.transaction
def book(connection: Any, cents: int) -> int:
    return connection.execute("SELECT 1")


@bank.on(Paid, transaction=True, retry=Retry(attempts=1))
def add(event: Paid, connection: Any) -> None:
    connection.execute("SELECT 1")


@bank.workflow
async def settle(cents: int) -> int:
    return await book(cents)


@bank.workflow
async def ask() -> str:
    return "how much?"


banking = App("bank", services=[bank])


def test_who_needs_no_transaction_is_simulated_beside_who_does() -> None:
    async def unrelated(sim: Sim[None]) -> str:
        return await sim.run(ask)

    assert play(unrelated, banking) == "how much?"


def test_what_needs_a_transaction_is_refused_when_it_is_called() -> None:
    async def unprepared(sim: Sim[None]) -> None:
        await sim.publish(Paid(account="a", cents=5))
        await sim.settle()
        (letter,) = sim.dead_letters()
        assert "bank.add runs inside a transaction of the store's database" in letter.error
        await sim.run(settle, 5)

    with pytest.raises(RunFailed, match=r"sim.replace\(book, fake\)"):
        play(unprepared, banking)


def test_fakes_stand_in_for_what_needs_a_transaction() -> None:
    booked: list[Paid] = []

    async def prepared(sim: Sim[None]) -> int:
        sim.replace(book, lambda cents: -cents)
        sim.replace(add, booked.append)
        await sim.publish(Paid(account="a", cents=5))
        await sim.settle()
        assert booked == sim.published(Paid)
        return await sim.run(settle, 5)

    assert play(prepared, banking) == -5
    assert book.transaction
    assert bank.handlers["add"].options.transaction


def test_plain_functions_sleep_in_virtual_time() -> None:
    async def order(sim: Sim[None]) -> float:
        def sew_slowly(cloth: str) -> str:
            time.sleep(3600)
            return f"fine-{cloth}"

        sim.replace(tailor.sew, sew_slowly)
        began = sim.now
        assert await sim.run(tailor.make, Ordered(order="o", days=0)) == "fine-cloth-o"
        return (sim.now - began).total_seconds()

    began_s = time.monotonic()
    assert 3600 < play(order) < 3601
    assert time.monotonic() - began_s < 60


@pytest.mark.parametrize(
    "act",
    [
        lambda sim: sim.run(tailor.make, Ordered(order="o")),
        lambda sim: sim.publish(Ordered(order="o")),
        lambda sim: sim.get("o").cancel(),
        lambda sim: sim.skip("1 day"),
        lambda sim: sim.settle(),
    ],
)
def test_who_acts_outside_of_the_simulation_is_told_to_act_in_the_test(
    act: Callable[[Any], Any],
) -> None:
    with pytest.raises(BadArguments, match=r"outside of the simulation.* Act in the test itself"):
        asyncio.run(act(calm_sim(tailor.app)))


def test_plain_functions_that_sleep_until_a_time_get_there() -> None:
    slept = 0

    def sew_until_evening(cloth: str) -> str:
        nonlocal slept
        clocks = (time.monotonic, time.perf_counter, time.time)
        ends_s = [clock() + 36000 for clock in clocks]
        while any(clock() < end_s for clock, end_s in zip(clocks, ends_s, strict=True)):
            time.sleep(3600)
            slept += 1
        return f"fine-{cloth}"

    async def order(sim: Sim[None]) -> float:
        sim.replace(tailor.sew, sew_until_evening)
        began = sim.now
        await sim.run(tailor.make, Ordered(order="o", days=0))
        return (sim.now - began).total_seconds()

    clocks = (time.sleep, time.monotonic, time.perf_counter, time.time)
    assert 36000 < play(order) < 36001
    assert slept == 10
    assert clocks == (time.sleep, time.monotonic, time.perf_counter, time.time)


def test_a_simulation_is_played_once() -> None:
    sim = calm_sim(tailor.app)

    async def nothing() -> None: ...

    sim.play(nothing())
    with pytest.raises(BadArguments, match="played once"):
        sim.play(nothing())
