"""Rehearsals find what is wrong with a user's process, say what matters, and play it again."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pavane import App, BadArguments, Event, PavaneError, Retry, Service, receive, saga
from pavane.core.operations import Mode
from pavane.testing import Rehearsal, RehearsalFailed, Sim, rehearse
from pavane.testing.performance import Performance
from pavane.testing.sim.storm import Storm
from tests.sim import tailor
from tests.sim.tailor import Delivered, Ordered

orders, payments, shipping = map(Service, ("orders", "payments", "shipping"))
MODES: tuple[Mode, ...] = ("orchestration", "choreography")


class Bank:
    """The world outside."""

    def __init__(self) -> None:
        self.cents: Counter[str] = Counter()
        self.cancelled: set[str] = set()


bank = Bank()


def new_bank() -> Bank:
    global bank
    bank = Bank()
    return bank


class Shipped(Event, key="order_id"):
    order_id: str


class Go(Event):
    pass


@payments.step
async def refund(order_id: str) -> None:
    bank.cents[order_id] = 0


@payments.step
async def charge_again(order_id: str) -> None:
    bank.cents[order_id] += 42


@payments.step
async def charge(order_id: str) -> None:
    bank.cents[order_id] = 42


@payments.step
def cancel(order_id: str) -> None:
    bank.cancelled.add(order_id)
    bank.cents[order_id] = 0


@payments.step(undo=cancel)
async def charge_for_good(order_id: str) -> None:
    if order_id not in bank.cancelled:
        bank.cents[order_id] = 42


@shipping.step
def ship(order_id: str) -> str:
    return f"parcel-{order_id}"


def workflow(name: str, take_money: Callable[[str], Awaitable[None]], *, late: bool) -> Any:
    @orders.workflow(name=name)
    async def fulfil(order_id: str) -> str:
        async with saga() as undo:
            await take_money(order_id)
            if late:
                undo(refund, order_id)
            parcel = await ship(order_id)
        await orders.publish(Shipped(order_id=order_id))
        return parcel

    return fulfil


charging_twice = workflow("charging_twice", charge_again, late=True)
undone_too_late = workflow("undone_too_late", charge, late=True)
right = workflow("right", charge_for_good, late=False)


@orders.workflow(receives=[Go])
async def waiting(order_id: str) -> None:
    await receive(Go)


@payments.step
def pay_by_wire(order_id: str) -> None:
    socket.create_connection(("bank.example", 443))


@orders.workflow
async def never_right(order_id: str) -> None:
    await pay_by_wire(order_id)


@payments.step
def start_a_process() -> None:
    subprocess.run(["true"], check=True)


@orders.workflow
async def starts_a_process() -> None:
    await start_a_process()


@orders.workflow
async def failing_in_a_group(order_id: str) -> None:
    async def fail() -> None:
        raise ValueError("no bank")

    async with asyncio.TaskGroup() as group:
        group.create_task(fail())


@payments.on(Shipped, retry=Retry(attempts=20, first="20ms", most="200ms"))
async def book(event: Shipped) -> None:
    pass


app = App("shop", services=[orders, payments, shipping])


def starting(workflow: Any) -> Callable[[Sim[Bank]], Awaitable[None]]:
    async def scenario(sim: Sim[Bank]) -> None:
        for order_id in ("o-1", "o-2"):
            await sim.start(workflow, order_id, id=order_id)

    return scenario


def pays_for_what_is_shipped(sim: Sim[Bank]) -> None:
    shipped = {event.order_id for event in sim.published(Shipped)}
    for run in sim.runs():
        due = 42 if run.status == "completed" else 0
        assert sim.world.cents[run.id] == due, f"{run.id} {run.status}, and paid"
        assert (run.id in shipped) == (run.status == "completed")
        assert run.mode == sim.mode


def nobody_pays_twice(sim: Sim[Bank]) -> None:
    for order_id, cents in sim.world.cents.items():
        assert cents <= 42, f"{order_id} paid {cents}"


def found(workflow: Any, invariant: Callable[[Sim[Bank]], None]) -> RehearsalFailed:
    with pytest.raises(RehearsalFailed) as failed:
        rehearse(app, starting(workflow), invariant, world=new_bank, seeds=300)
    return failed.value


def test_a_charge_that_is_repeated_is_found_with_the_fault_that_matters() -> None:
    failed = found(charging_twice, nobody_pays_twice)
    finding = failed.report.finding
    assert finding is not None
    assert len(finding.faults) <= 2
    text = str(failed)
    assert "the invariant is broken" in text
    assert "payments.charge_again('o-" in text.partition("same idempotency key:")[2]
    assert f'rehearse(…, seeds=[{finding.seed}], modes=["{finding.mode}"])' in text
    (line,) = finding.timelines
    assert line.status.id in finding.failure.text
    assert "test_rehearsal.py:" in finding.failure.where


@pytest.fixture(scope="module")
def too_late() -> RehearsalFailed:
    return found(undone_too_late, pays_for_what_is_shipped)


def test_an_undo_that_is_registered_too_late_is_found(too_late: RehearsalFailed) -> None:
    finding = too_late.report.finding
    assert finding is not None
    assert "failed, and paid" in finding.failure.text
    assert [fault.kind for fault in finding.faults] == ["outside"]
    assert any("took effect, and was not answered" in text for _, text in finding.happened)
    assert any(mark.what == "fault" for line in finding.timelines for mark in line.marks)


def test_what_was_found_is_found_again_by_its_seed_alone(too_late: RehearsalFailed) -> None:
    finding = too_late.report.finding
    assert finding is not None
    with pytest.raises(RehearsalFailed) as again:
        rehearse(
            app, starting(undone_too_late), pays_for_what_is_shipped, world=new_bank,
            seeds=[finding.seed], modes=[finding.mode],
        )  # fmt: skip
    assert str(again.value) == str(too_late)


def test_a_right_process_keeps_its_promise_and_the_report_says_in_what() -> None:
    report = rehearse(app, starting(right), pays_for_what_is_shipped, world=new_bank, seeds=40)
    assert report.finding is None
    assert (report.plays, report.modes) == (80, MODES)
    assert set(report.runs) <= {"completed", "failed"}
    assert sum(report.runs.values()) == 2 * (80 + 2)  # and two plays without a fault
    assert report.runs["completed"] == report.events
    assert len(report.faults) > 8


def test_what_is_wrong_without_any_fault_is_said_so() -> None:
    def nobody_pays(sim: Sim[Bank]) -> None:
        assert not sim.world.cents

    with pytest.raises(RehearsalFailed, match="without any fault, choreography") as failed:
        rehearse(app, starting(right), nobody_pays, world=new_bank, modes=["choreography"])
    assert "Repeat it" not in str(failed.value)


def test_a_run_that_never_ends_is_found() -> None:
    with pytest.raises(RehearsalFailed, match=r"never ends\n.* Run o-. is waiting \(event Go\)"):
        rehearse(app, starting(waiting), lambda sim: None, world=new_bank)


def test_a_process_that_ends_long_before_its_storm_has_ended() -> None:
    """Also if its customer does not look at once when the storm is over."""
    rehearsal = Rehearsal(app, starting(right), pays_for_what_is_shipped, world=new_bank)
    storm = Storm((), 15_000_000, ((0, 1, 2),), same_host=True)
    plays = [Performance(rehearsal, seed, "orchestration", storm).play() for seed in range(10)]
    assert {play.failure for play in plays} == {None}


def test_a_step_that_would_do_real_things_is_refused() -> None:
    """Also by code that blocks; a thousand seeds must not pay a thousand times."""
    with pytest.raises(RehearsalFailed, match=r"socket\.getaddrinfo would leave") as failed:
        rehearse(app, starting(never_right), lambda sim: None, world=new_bank)
    assert "a step leaves the simulation" in str(failed.value)


def test_threads_that_a_step_starts_are_refused_the_network_as_well() -> None:
    bank = Service("bank")

    def in_another(connect: Callable[[], None]) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(connect).result()

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)

        def connect() -> None:
            socket.create_connection(server.getsockname()).close()

        @bank.step
        def pay() -> None:
            in_another(lambda: in_another(connect))

        @bank.workflow
        async def settle() -> None:
            await pay()

        async def one(sim: Sim[None]) -> None:
            await sim.start(settle)

        with pytest.raises(RehearsalFailed, match=r"socket\.getaddrinfo would leave") as failed:
            rehearse(App("bank", services=[bank]), one, lambda sim: None, seeds=1)
        with pytest.raises(BlockingIOError):
            server.accept()
        in_another(connect)  # which is nothing that is rehearsed
        server.accept()[0].close()
    assert "a step leaves the simulation" in str(failed.value)


def test_a_rehearsal_in_which_nothing_works_is_doubted() -> None:
    def fail(order_id: str) -> None:
        raise ValueError("no bank")

    report = rehearse(
        app, starting(never_right), lambda sim: None, world=new_bank, seeds=2,
        fakes={pay_by_wire: fail},
    )  # fmt: skip
    assert report.note.startswith("no run completes even without any fault")


def test_a_scenario_that_fails_is_shown() -> None:
    async def scenario(sim: Sim[None]) -> None:
        await sim.start(right, "o-1")
        raise LookupError("no such customer")

    with pytest.raises(RehearsalFailed, match="scenario failed\n  LookupError: no such customer"):
        rehearse(app, scenario, lambda sim: None)


@pytest.mark.parametrize("end", [pytest.fail, sys.exit, asyncio.CancelledError])
@pytest.mark.parametrize("kind", ["scenario", "invariant"])
def test_whatever_is_raised_in_a_storm_is_shown_with_its_seed(end: Any, kind: str) -> None:
    def raise_in(here: str, sim: Sim[None]) -> None:
        if here == kind and sim.seed > 1:
            raise end("enough")

    async def scenario(sim: Sim[None]) -> None:
        await sim.start(right, "o-1")
        raise_in("scenario", sim)

    with pytest.raises(RehearsalFailed) as failed:
        rehearse(app, scenario, lambda sim: raise_in("invariant", sim), seeds=4)
    text = str(failed.value)
    assert text.startswith(f"seed 2, orchestration: the {kind} ")
    assert "enough" in text
    assert "test_rehearsal.py:" in text


async def fail_in_groups(sim: Sim[None]) -> None:
    async def fail() -> None:
        async with asyncio.TaskGroup() as inner:
            inner.create_task(raise_it())

    async def raise_it() -> None:
        raise LookupError("no such customer")

    async with asyncio.TaskGroup() as outer:
        outer.create_task(fail())


async def run_in_a_group(sim: Sim[None]) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(sim.run(failing_in_a_group, "o-2"))


async def run_out_of_time(sim: Sim[None]) -> None:
    async with asyncio.timeout(1):
        await asyncio.sleep(2)


async def start_in_a_run(sim: Sim[None]) -> None:
    await sim.run(starts_a_process)


@pytest.mark.parametrize(
    ("act", "message", "line"),
    [
        (fail_in_groups, "LookupError: no such customer", 'raise LookupError("no such customer")'),
        (run_in_a_group, "because of ValueError: no bank", "async with asyncio.TaskGroup() as gr"),
        (run_out_of_time, "TimeoutError", "async with asyncio.timeout(1)"),
        (start_in_a_run, "NotInSimulation: subprocess.Popen would", "subprocess.run("),
    ],
)
def test_an_error_is_shown_with_the_line_of_the_users_code(
    act: Callable[[Sim[None]], Awaitable[None]], message: str, line: str
) -> None:
    async def scenario(sim: Sim[None]) -> None:
        await sim.start(right, "o-1")
        await act(sim)

    with pytest.raises(RehearsalFailed) as failed:
        rehearse(app, scenario, lambda sim: None)
    finding = failed.value.report.finding
    assert finding is not None
    assert message in finding.failure.text
    file, _, number = finding.failure.where.rpartition(":")
    assert file.endswith("test_rehearsal.py")
    assert line in Path(__file__).read_text("utf-8").splitlines()[int(number) - 1]


@pytest.mark.parametrize("kind", ["scenario", "invariant"])
def test_skipping_in_a_rehearsal_skips_the_test(kind: str) -> None:
    def skip_in(here: str) -> None:
        if here == kind:
            pytest.skip("not today")

    async def scenario(sim: Sim[None]) -> None:
        await sim.start(right, "o-1")
        skip_in("scenario")

    with pytest.raises(pytest.skip.Exception, match="not today"):
        rehearse(app, scenario, lambda sim: skip_in("invariant"))


def test_a_seed_that_does_something_else_the_next_time_is_not_trusted() -> None:
    seen: set[int] = set()

    def is_old_news(sim: Sim[None]) -> None:
        is_new = sim.seed >= 0 and sim.seed not in seen
        seen.add(sim.seed)
        assert not is_new

    async def scenario(sim: Sim[None]) -> None:
        await sim.start(right, "o-1")

    with pytest.raises(RehearsalFailed, match="the same seed does something else"):
        rehearse(app, scenario, is_old_news, seeds=5)


def test_a_month_long_process_is_hit_in_all_of_its_moments() -> None:
    """Faults come while something happens, before and after the month in which nothing does."""
    hit: Counter[bool] = Counter()
    day_us = 86_400 * 10**6

    async def scenario(sim: Sim[None]) -> None:
        await sim.publish(Ordered(order="o"), id="o")

    def is_delivered(sim: Sim[None]) -> None:
        assert sim.published(Delivered) or sim.runs()[0].status == "failed"
        faults = (line for line in sim._simulation.trace.lines if " fault: " in line)
        hit.update(int(line.partition(" ")[0]) > day_us for line in faults)

    rehearsal: Rehearsal[None] = Rehearsal(tailor.app, scenario, is_delivered)
    for seed in range(60):
        assert rehearsal.run([seed], ["orchestration"]).finding is None
    assert min(hit[True], hit[False]) > 20


def test_an_app_with_schedules_can_be_rehearsed() -> None:
    scheduled = App("scheduled", services=[tailor.shop, tailor.workshop, tailor.till])
    scheduled.schedule("0 9 * * *", tailor.remind, 1, name="daily")

    async def order(sim: Sim[None]) -> None:
        await sim.publish(Ordered(order="o"))

    def is_delivered(sim: Sim[None]) -> None:
        assert sim.published(Delivered) or "failed" in {status.status for status in sim.runs()}

    assert rehearse(scheduled, order, is_delivered, seeds=20).finding is None


def test_fakes_stand_in_for_steps() -> None:
    async def scenario(sim: Sim[None]) -> None:
        await sim.start(right, "o-1", id="o-1")

    def result(sim: Sim[None]) -> None:
        if sim.runs()[0].status == "completed":
            assert sim.result("o-1") == "a fake"

    rehearse(app, scenario, result, fakes={ship: lambda order_id: "a fake"}, seeds=5)
    assert asyncio.run(ship("o-1")) == "parcel-o-1"


def test_fakes_stand_in_for_handlers_that_need_a_transaction() -> None:
    ledger = Service("ledger")

    class Balance(msgspec.Struct):
        cents: int = 0

    class Paid(Event, key="account"):
        account: str
        cents: int

    class Counted(Event):
        cents: int

    @ledger.on(Paid, transaction=True, state=Balance)
    def add(event: Paid, balance: Balance, connection: Any) -> Counted:
        raise AssertionError("a real one")

    def count(event: Paid, balance: Balance) -> Counted:
        balance.cents += event.cents
        return Counted(cents=balance.cents)

    async def two(sim: Sim[None]) -> None:
        await sim.publish(Paid(account="a", cents=5))
        await sim.publish(Paid(account="a", cents=6))

    def both_are_counted(sim: Sim[None]) -> None:
        assert max(event.cents for event in sim.published(Counted)) == 11

    app = App("ledger", services=[ledger])
    rehearse(app, two, both_are_counted, fakes={add: count}, seeds=5)
    with pytest.raises(RehearsalFailed, match=r"rehearse\(…, fakes=\{add: fake\}\)"):
        rehearse(app, two, both_are_counted, seeds=5)


def test_chance_is_given_by_the_seed() -> None:
    drawn: list[tuple[int, float]] = []

    async def scenario(sim: Sim[None]) -> None:
        await sim.start(right, "o-1")
        drawn.append((sim.seed, sim.random.random()))

    for _ in range(2):
        Rehearsal(app, scenario, lambda sim: None).run([3], ["orchestration"])
    assert drawn[:2] == drawn[2:]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((app, lambda sim: None, print), {}, "scenario <lambda> must be an async function"),
        ((app, starting(right), starting(right)), {}, "invariant scenario must be a plain"),
        ((orders, starting(right), print), {}, "is no App"),
        ((app, starting(right), print), {"seeds": 0}, "at least one seed"),
        ((app, starting(right), print), {"seeds": [-5]}, "-5 is no seed: seeds are whole"),
        ((app, starting(right), print), {"seeds": ["x"]}, "'x' is no seed: seeds are whole"),
        ((app, starting(right), print), {"seeds": 1.5}, r"seeds=1\.5: write how many"),
        ((app, starting(right), print), {"seeds": "abc"}, "seeds='abc': write how many"),
        ((app, starting(right), print), {"modes": ["waltz"]}, r"modes=\['waltz'\]: write some"),
        ((app, starting(right), print), {"modes": "orchestration"}, "write some of .*, as a list"),
        ((app, starting(right), print), {"modes": ()}, r"modes=\(\): write some of"),
        ((app, starting(right), print), {"fakes": {print: print}}, "no step or handler of app"),
    ],
)
def test_bad_input_is_refused_with_what_to_write(
    arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadArguments, match=message):
        rehearse(*arguments, **options)


def test_a_step_that_ends_the_process_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(sim: Sim[None]) -> None:
        await sim.start(right, "o-1")

    def end(sim: Sim[None]) -> None:
        if sim.seed > 0:
            os._exit(7)

    monkeypatch.setattr("pavane.testing.parallel.cores", lambda: 2)
    with pytest.raises(PavaneError, match=r"exit code 7\. Does the code that it runs end its"):
        rehearse(app, scenario, end, seeds=10)


def test_a_scenario_that_starts_nothing_is_refused() -> None:
    async def idle(sim: Sim[None]) -> None:
        await sim.settle()

    with pytest.raises(BadArguments, match="idle started no run and published no event"):
        rehearse(app, idle, lambda sim: None)
