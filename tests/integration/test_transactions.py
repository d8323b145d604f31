"""Steps and handlers inside the store's own transaction: written once, with their result."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import apsw
import pytest

from pavane import (
    App,
    BadDeclaration,
    Event,
    OnlyInWorkflow,
    Retry,
    RunFailed,
    Service,
    StoreError,
    TooLarge,
    heartbeat,
    outbox,
    saga,
    step_info,
)
from pavane.core.operations import Mode
from pavane.stores.eventlog import DeadFilter
from tests.integration.world import (
    BUSY_MS,
    LAYOUTS,
    MODES,
    Director,
    Layout,
    World,
    in_loop,
    until,
    until_status,
)

SOON = Retry(attempts=3, first="5ms", factor=1)
FAILURES: Counter[str] = Counter()
"""How often something is still to fail."""
CALLS: list[str] = []

desk, ledger, depot = Service("desk"), Service("ledger"), Service("depot")
SERVICES = (desk, ledger, depot)


class Booked(Event, key="account"):
    account: str
    cents: int


@pytest.fixture(autouse=True)
def nothing_done() -> None:
    FAILURES.clear()
    CALLS.clear()


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Mode:
    return request.param


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    return request.param


@pytest.fixture
def world(tmp_path: Path, mode: Mode, layout: Layout) -> World:
    return World(tmp_path / "world.db", mode, layout)


@pytest.fixture
def one(tmp_path: Path) -> World:
    return World(tmp_path / "world.db", "orchestration", "one node")


@contextmanager
def opened(world: World) -> Iterator[apsw.Connection]:
    with closing(apsw.Connection(str(world.path))) as connection:
        connection.set_busy_timeout(BUSY_MS)
        yield connection


def rows(world: World, sql: str) -> list[Any]:
    with opened(world) as connection:
        return connection.execute(sql).fetchall()


def make_tables(world: World) -> None:
    with opened(world) as connection:
        connection.execute("CREATE TABLE bookings (account TEXT, cents INT)")
        connection.execute("CREATE TABLE taken (no INTEGER PRIMARY KEY)")
        connection.execute("INSERT INTO taken VALUES (1)")


def bookings(world: World) -> list[Any]:
    return rows(world, "SELECT account, cents FROM bookings ORDER BY rowid")


def write(connection: Any, account: str, cents: int) -> None:
    CALLS.append(account)
    connection.execute("CREATE TABLE IF NOT EXISTS bookings (account TEXT, cents INT)")
    connection.execute("INSERT INTO bookings VALUES (?, ?)", (account, cents))
    if FAILURES[account] > 0:
        FAILURES[account] -= 1
        raise ValueError(f"{account} is closed")


@ledger.transaction
def unbook(connection: Any, account: str, cents: int) -> None:
    write(connection, account, -cents)


@ledger.transaction(undo=unbook, retry=SOON)
def book(connection: Any, account: str, cents: int) -> int:
    write(connection, account, cents)
    return connection.execute("SELECT sum(cents) FROM bookings").get


@ledger.transaction
def book_once(connection: Any, account: str, cents: int = 5) -> str:
    write(connection, account, cents)
    return step_info().idempotency_key


@depot.step
async def ship(what: str) -> str:
    if FAILURES["ship"] > 0:
        FAILURES["ship"] -= 1
        raise ValueError("no truck")
    return f"shipped {what}"


@desk.workflow
async def pay(account: str, cents: int) -> list[Any]:
    async with saga():
        total = await book(account, cents)
        return [total, await ship(account), await book(account, 1)]


@desk.workflow
async def books_twice_at_once(account: str) -> list[int]:
    return sorted(await asyncio.gather(book(account, 1), book(account, 2)))


# -- steps -------------------------------------------------------------------------------------


@in_loop
async def test_a_step_in_a_transaction_is_done_once_and_its_result_reaches_the_run(
    world: World,
) -> None:
    async with world.working(*SERVICES) as director:
        assert await director.result(pay, "a", 5) == [5, "shipped a", 6]
        assert await director.result(books_twice_at_once, "b") in ([7, 9], [8, 9])
    assert bookings(world)[:2] == [("a", 5), ("a", 1)]
    assert sorted(bookings(world)[2:]) == [("b", 1), ("b", 2)]
    assert rows(world, "SELECT * FROM parked") == []


@in_loop
async def test_a_failed_attempt_leaves_nothing_and_is_retried(world: World) -> None:
    FAILURES["a"] = 2
    async with world.working(*SERVICES) as director:
        assert await director.result(pay, "a", 5) == [5, "shipped a", 6]
    assert bookings(world) == [("a", 5), ("a", 1)]
    assert len(CALLS) == 4
    assert rows(world, "SELECT * FROM parked") == []


@in_loop
async def test_a_failure_for_good_reaches_the_workflow(world: World) -> None:
    FAILURES["a"] = 3

    async with world.working(*SERVICES) as director:
        run = await director.start(pay, "a", 5, id="r")
        with pytest.raises(RunFailed, match="a is closed") as failed:
            await run.result(timeout=30)
        assert isinstance(failed.value.__cause__, ValueError)
        # The declared compensation was carried out: it must tolerate that nothing happened.
        assert bookings(world) == [("a", -5)]
        assert (await run.status()).compensated == 1


@in_loop
async def test_a_compensation_in_a_transaction_is_recorded_once(world: World) -> None:
    FAILURES["ship"] = 1
    async with world.working(*SERVICES) as director:
        run = await director.start(pay, "a", 5)
        with pytest.raises(RunFailed, match="no truck"):
            await run.result(timeout=30)
        assert bookings(world) == [("a", 5), ("a", -5)]


@in_loop
async def test_a_retried_run_is_told_what_its_transaction_did(world: World) -> None:
    """The run failed while the work was being written; a person takes it back to before that."""
    desk, ledger, depot = Service("desk"), Service("ledger"), Service("depot")

    @ledger.transaction
    def booked(connection: Any, account: str) -> str:
        write(connection, account, 5)
        time.sleep(0.05)
        return f"{account} {len(CALLS)}"

    @depot.step
    async def fails() -> str:
        while not CALLS:
            await asyncio.sleep(0.001)
        return await ship("x")

    @desk.workflow
    async def both() -> list[str]:
        return await asyncio.gather(fails(), booked("a"))

    FAILURES["ship"] = 1
    async with world.working(desk, ledger, depot) as director:
        run = await director.start(both, id="r")
        with pytest.raises(RunFailed):
            await run.result(timeout=30)
        await run.retry()
        await until_status(run, "completed")
        assert await run.result(timeout=30) == ["shipped x", "a 1"]
    assert CALLS == ["a"]
    assert bookings(world) == [("a", 5)]


@in_loop
async def test_what_was_done_after_the_failure_is_done_anew_by_a_retry(world: World) -> None:
    desk, ledger, depot = Service("desk"), Service("ledger"), Service("depot")

    @ledger.transaction
    def booked(connection: Any, account: str) -> None:
        write(connection, account, 5)

    @depot.step
    async def fails() -> str:
        return await ship("x")

    @desk.workflow
    async def cleans_up() -> str:
        await booked("first")
        try:
            return await fails()
        finally:
            await booked("last")

    FAILURES["ship"] = 1
    async with world.working(desk, ledger, depot) as director:
        run = await director.start(cleans_up, id="r")
        with pytest.raises(RunFailed):
            await run.result(timeout=30)
        await run.retry()
        await until_status(run, "completed")
    assert [account for account, _ in bookings(world)] == ["first", "last", "last"]


@in_loop
async def test_a_run_that_gives_up_is_not_answered(world: World) -> None:
    desk, ledger = Service("desk"), Service("ledger")

    @ledger.transaction(retry=Retry(attempts=0, first="20ms", factor=1))
    def never(connection: Any) -> None:
        write(connection, "a", 5)
        raise ValueError("not now")

    @ledger.transaction
    def other(connection: Any) -> str:
        return "other"

    @desk.workflow
    async def gives_up() -> str:
        try:
            async with asyncio.timeout(0.1):
                await never()
        except TimeoutError:
            return await other()
        raise AssertionError

    async with world.working(desk, ledger) as director:
        assert await director.result(gives_up) == "other"

        async def nothing_is_left() -> bool:
            return not rows(world, "SELECT * FROM parked")

        await until(nothing_is_left)

        async def is_quiet() -> bool:
            done = len(CALLS)
            await asyncio.sleep(0.1)
            return len(CALLS) == done

        await until(is_quiet)
    assert rows(world, "SELECT name FROM sqlite_schema WHERE name = 'bookings'") == []


@in_loop
async def test_a_result_that_cannot_be_stored_undoes_the_work(one: World) -> None:
    desk, ledger = Service("desk"), Service("ledger")

    @ledger.transaction(retry=SOON)
    def too_large(connection: Any) -> str:
        write(connection, "a", 5)
        return "x" * 2_000_000

    @ledger.transaction(retry=SOON)
    def surrogate(connection: Any) -> str:
        write(connection, "b", 5)
        return "\ud800"

    @desk.workflow
    async def tries(which: str) -> Any:
        return await (too_large() if which == "large" else surrogate())

    async with one.working(desk, ledger) as director:
        for which, kind in (("large", TooLarge), ("surrogate", Exception)):
            run = await director.start(tries, which)
            with pytest.raises(RunFailed) as failed:
                await run.result(timeout=30)
            assert isinstance(failed.value.__cause__, kind)
        assert CALLS == ["a", "b"]
    assert rows(one, "SELECT name FROM sqlite_schema WHERE name = 'bookings'") == []


def commits(connection: Any) -> None:
    connection.execute("COMMIT")


def rolls_back(connection: Any) -> None:
    connection.execute("ROLLBACK")


def begins(connection: Any) -> None:
    connection.execute("BEGIN")


def leaves_the_savepoint(connection: Any) -> None:
    connection.execute('RELEASE "pavane work"')


def hides_the_savepoint(connection: Any) -> None:
    connection.execute('SAVEPOINT "PAVANE work"')
    raise ValueError("and fails")


def rolls_back_by_conflict(connection: Any) -> None:
    connection.execute("INSERT OR ROLLBACK INTO taken VALUES (1)")


def swallows_the_conflict(connection: Any) -> None:
    try:
        connection.execute("INSERT OR ROLLBACK INTO taken VALUES (1)")
    except apsw.ConstraintError:
        write(connection, "bad", 1)


def leaves_a_statement_unfinished(connection: Any) -> None:
    cursor = connection.execute("INSERT INTO bookings VALUES ('bad', 1), ('bad', 2) RETURNING 1")
    next(cursor)
    raise ValueError("with a cursor in its traceback")


def exits(connection: Any) -> None:
    sys.exit("enough")


def is_cancelled(connection: Any) -> None:
    raise asyncio.CancelledError


def breaks_a_constraint(connection: Any) -> None:
    connection.execute("INSERT INTO taken VALUES (1)")


def writes_no_sql(connection: Any) -> None:
    connection.execute("SELEKT 1")


MISDEEDS = [
    commits, rolls_back, begins, leaves_the_savepoint, hides_the_savepoint, rolls_back_by_conflict,
    swallows_the_conflict, leaves_a_statement_unfinished, exits, is_cancelled,
    breaks_a_constraint, writes_no_sql,
]  # fmt: skip


@pytest.mark.parametrize("misdeed", MISDEEDS)
@in_loop
async def test_bad_work_fails_alone_and_leaves_nothing(
    one: World, misdeed: Callable[[Any], None]
) -> None:
    """Invariant 11, inside a batch: what is in the same transaction is written all the same."""
    desk, ledger = Service("desk"), Service("ledger")

    @ledger.transaction
    def good(connection: Any, account: str) -> None:
        connection.execute("INSERT INTO bookings VALUES (?, 1)", (account,))

    @ledger.transaction
    def bad(connection: Any) -> None:
        connection.execute("INSERT INTO bookings VALUES ('bad', 0)")
        misdeed(connection)

    @desk.workflow
    async def many() -> list[Any]:
        steps = [good(f"g{n}") for n in range(3)]
        results = await asyncio.gather(*steps, bad(), *[good(f"h{n}") for n in range(3)],
                                       return_exceptions=True)  # fmt: skip
        return [type(result).__name__ for result in results]

    async with one.working(desk, ledger) as director:
        make_tables(one)
        results = await director.result(many)
        assert results[:3] == results[4:] == ["NoneType"] * 3
        assert results[3] != "NoneType"
        session = director.client.node and director.client.node.session
        assert session is not None
        assert session.fence.node == 1  # the node did not have to join again
    assert [account for account, _ in bookings(one)] == ["g0", "g1", "g2", "h0", "h1", "h2"]


@pytest.mark.parametrize("misdeed", [commits, rolls_back, begins])
@in_loop
async def test_who_ends_the_transaction_is_told_that_pavane_does(
    one: World, misdeed: Callable[[Any], None]
) -> None:
    ledger, desk = Service("ledger"), Service("desk")

    @ledger.transaction
    def bad(connection: Any) -> None:
        misdeed(connection)

    @desk.workflow
    async def pay_badly() -> None:
        await bad()

    why = "COMMIT, ROLLBACK and BEGIN are not for .* commits it with the result. Leave them out"
    async with one.working(desk, ledger) as director:
        with pytest.raises(RunFailed, match=why):
            await director.result(pay_badly)


@in_loop
async def test_a_heartbeat_in_a_transaction_does_no_harm(one: World) -> None:
    desk, ledger = Service("desk"), Service("ledger")

    @ledger.transaction
    def beats(connection: Any) -> int:
        heartbeat({"at": 1})
        return 1

    @desk.workflow
    async def alive() -> int:
        return await beats()

    async with one.working(desk, ledger) as director:
        assert await director.result(alive) == 1
        await asyncio.sleep(0.05)
    assert rows(one, "SELECT * FROM parked") == []


@in_loop
async def test_an_event_of_a_transaction_belongs_to_the_run(one: World) -> None:
    desk, ledger = Service("desk"), Service("ledger")
    seen: list[Booked] = []

    @ledger.transaction(retry=SOON)
    def tells(connection: Any, account: str) -> str:
        write(connection, account, 5)
        return outbox.publish_sync(connection, Booked(account=account, cents=5))

    @desk.on(Booked)
    async def hear(event: Booked) -> None:
        seen.append(event)

    @desk.workflow
    async def flow(account: str) -> str:
        return await tells(account)

    async with one.working(desk, ledger) as director:
        for failures in (0, 2, 3):
            FAILURES["a"] = failures
            run = await director.start(flow, "a", id=f"r{failures}")
            if failures < 3:
                id = await run.result(timeout=30)
                row = await director.client.store.event(id)
                assert row is not None
                assert (row.source, row.conversation, row.cause) == ("ledger", run.id, run.id)
            else:
                with pytest.raises(RunFailed):
                    await run.result(timeout=30)

        async def both() -> bool:
            return len(seen) == 2

        await until(both)
    assert len(rows(one, "SELECT * FROM events")) == len(bookings(one)) == 2


def print_event(event: Booked) -> None:
    print(event)


def test_a_transaction_is_called_by_its_function_in_a_test() -> None:
    connection = apsw.Connection("")
    assert book.fn(connection, "a", 5) == 5
    with pytest.raises(OnlyInWorkflow, match=r"call `book\.fn\(connection, …\)`"):
        book("a", 5)


def test_what_cannot_be_a_transaction_is_refused_when_it_is_declared() -> None:
    service = Service("s")
    with pytest.raises(BadDeclaration, match="must take a connection"):

        @service.transaction()
        def takes_nothing() -> None: ...  # pyright: ignore

    with pytest.raises(BadDeclaration, match="cannot be stopped"):
        book.options(timeout="1s")
    with pytest.raises(BadDeclaration, match="must be a step"):
        service.transaction(undo=print)  # pyright: ignore
    service.on(Booked)(print_event)
    with pytest.raises(BadDeclaration, match="must not change anything"):

        @service.on(Booked, transaction=True, shadow=True)
        def shadow(event: Booked, connection: Any) -> None: ...

    with pytest.raises(BadDeclaration, match="cannot be stopped"):

        @service.on(Booked, transaction=True, timeout="1s")
        def bounded(event: Booked, connection: Any) -> None: ...


@in_loop
async def test_a_store_without_transactions_is_refused_at_the_start() -> None:
    app = App("app", [ledger], store="memory:")
    with pytest.raises(StoreError, match=r"ledger\.unbook.*gives no connection.*SQLite"):
        await app.__aenter__()


# -- handlers ----------------------------------------------------------------------------------


class Account:
    """Kept per key."""


async def publish(director: Director, event: Any, id: str | None = None) -> str:
    return await director.client.publish(event, source="test", id=id)


@in_loop
async def test_a_handler_in_a_transaction_tells_how_long_its_work_took(one: World) -> None:
    clerk = Service("clerk")

    @clerk.on(Booked, transaction=True)
    def enter(event: Booked, connection: Any) -> None:
        time.sleep(0.05)
        write(connection, event.account, event.cents)

    async with one.working(clerk) as director:
        id = await publish(director, Booked(account="a", cents=1))

        async def done() -> Any:
            (handled,) = (await director.client.events.story(id)).handled
            return handled if handled.outcome == "done" else None

        handled = await until(done)
    assert 50_000 <= handled.took_us < 10_000_000


@in_loop
async def test_a_batch_with_a_bad_event_writes_the_others(one: World) -> None:
    clerk = Service("clerk")

    @clerk.on(Booked, transaction=True, batch=10, linger="20ms", retry=SOON)
    def enter(events: list[Booked], connection: Any) -> None:
        for event in events:
            write(connection, event.account, event.cents)

    async with one.working(clerk) as director:
        FAILURES["a3"] = 1000
        await asyncio.gather(*(publish(director, Booked(account=f"a{n}", cents=n))
                               for n in range(10)))  # fmt: skip
        letters = await until(lambda: director.client.store.dead_letters(DeadFilter()))

        async def entered() -> bool:
            return len(bookings(one)) == 9

        await until(entered)
        assert [letter.key for letter in letters] == ["a3"]
    assert {account for account, _ in bookings(one)} == {f"a{n}" for n in range(10)} - {"a3"}


@pytest.mark.parametrize("misdeed", MISDEEDS)
@in_loop
async def test_a_handler_with_bad_work_fails_alone(
    one: World, misdeed: Callable[[Any], None]
) -> None:
    clerk = Service("clerk")

    @clerk.on(Booked, transaction=True, retry=SOON, breaker=None)
    def enter(event: Booked, connection: Any) -> None:
        connection.execute("INSERT INTO bookings VALUES (?, ?)", (event.account, event.cents))
        if event.cents == 3:
            misdeed(connection)

    async with one.working(clerk) as director:
        make_tables(one)
        await asyncio.gather(*(publish(director, Booked(account=f"a{n}", cents=n))
                               for n in range(6)))  # fmt: skip
        letters = await until(lambda: director.client.store.dead_letters(DeadFilter()))
        assert [(letter.key, letter.attempts) for letter in letters] == [("a3", 3)]

        async def entered() -> bool:
            return len(bookings(one)) == 5

        await until(entered)
        session = director.client.node and director.client.node.session
        assert session is not None
        assert session.fence.node == 1
    assert sorted(cents for _, cents in bookings(one)) == [0, 1, 2, 4, 5]
