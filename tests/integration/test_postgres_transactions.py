"""The user's own transactions on Postgres: steps, handlers and published events in them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import psycopg
import pytest
import sqlalchemy
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from pavane import (
    App,
    BadArguments,
    Event,
    Retry,
    RunFailed,
    Service,
    StoreError,
    outbox,
    step_info,
)
from pavane.errors import Locked
from pavane.stores.eventlog import DeadFilter, EventFilter
from pavane.stores.postgres import writer
from tests.integration.world import World, in_loop, until
from tests.postgres import Database

SOON = Retry(attempts=3, first="5ms", factor=1)
CALLS: list[str] = []
SEEN: list[int] = []
FAILS: set[str] = set()


class Sold(Event, key="shelf"):
    shelf: str
    by: str
    no: int


class Counted(Event, key="shelf"):
    shelf: str
    sum: int


class Reserved(Event, key="seat"):
    seat: int


class Paid(Event, key="account"):
    account: str


desk, ledger = Service("desk"), Service("ledger")


@ledger.transaction(retry=SOON)
async def book(connection: Any, account: str, cents: int) -> int:
    CALLS.append(account)
    await connection.execute("INSERT INTO bookings VALUES ($1, $2)", account, cents)
    await asyncio.sleep(0)
    if account in FAILS:
        FAILS.discard(account)
        raise ValueError(f"{account} is closed")
    await outbox.publish(connection, Sold(shelf=account, by=step_info().idempotency_key, no=cents))
    return await connection.fetchval("SELECT sum(cents) FROM bookings WHERE account = $1", account)


@ledger.transaction(retry=Retry(attempts=1))
async def goes_wrong(connection: Any, how: str) -> None:
    await connection.execute("INSERT INTO bookings VALUES ('wrong', 1)")
    if how == "it ends the transaction":
        await connection.execute("ROLLBACK")
    else:
        try:
            await connection.execute("SELECT 1 / 0")
        except asyncpg.DivisionByZeroError:
            pass


@ledger.on(Sold, transaction=True, retry=SOON)
async def count(event: Sold, connection: Any) -> Counted | None:
    SEEN.append(event.no)
    await connection.execute("INSERT INTO seen (no) VALUES ($1)", event.no)
    if f"count {event.no}" in FAILS:
        FAILS.discard(f"count {event.no}")
        raise ValueError("not now")
    total = await connection.fetchval("SELECT sum(no) FROM seen")
    return Counted(shelf=event.shelf, sum=total)


@ledger.transaction(retry=SOON)
async def take_seat(connection: Any, seat: int) -> int:
    """Its constraint is deferred: it is violated by the COMMIT."""
    CALLS.append(f"seat {seat}")
    await connection.execute("INSERT INTO seats VALUES ($1)", seat)
    return seat


@ledger.on(Reserved, transaction=True, retry=SOON)
async def reserve(event: Reserved, connection: Any) -> None:
    SEEN.append(event.seat)
    await connection.execute("INSERT INTO seats VALUES ($1)", event.seat)


@ledger.transaction
async def add(connection: Any, account: str) -> None:
    CALLS.append(account)
    await connection.execute("UPDATE bookings SET cents = cents + 1 WHERE account = $1", account)


@ledger.on(Paid, transaction=True, retry=Retry(attempts=1))
async def pays(event: Paid, connection: Any) -> None:
    SEEN.append(0)
    await add.fn(connection, event.account)


@desk.workflow
async def adds(account: str) -> None:
    await add(account)


@desk.workflow
async def sits(seat: int) -> int:
    return await take_seat(seat)


@desk.workflow
async def pay(account: str, cents: int) -> list[int]:
    return [await book(account, cents), *await asyncio.gather(book(account, 1), book("other", 2))]


@desk.workflow
async def tries(how: str) -> None:
    await goes_wrong(how)


@pytest.fixture
def url() -> Iterator[str]:
    """A store that exists and that nobody has open, with tables of the business."""
    CALLS.clear()
    SEEN.clear()
    FAILS.clear()
    with Database() as url:

        async def make() -> None:
            async with App("world", [desk, ledger], store=url).connect():
                connection = await asyncpg.connect(url)
                await connection.execute(
                    "CREATE TABLE bookings (account text, cents int); CREATE TABLE seen (no int);"
                    "CREATE TABLE sales (id serial, seller text, no int);"
                    "CREATE TABLE seats (no int UNIQUE DEFERRABLE INITIALLY DEFERRED)"
                )
                await connection.close()

        asyncio.run(make())
        yield url


async def rows(url: str, sql: str) -> list[Any]:
    connection = await asyncpg.connect(url)
    try:
        return [tuple(row) for row in await connection.fetch(sql)]
    finally:
        await connection.close()


# -- steps and handlers ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["orchestration", "choreography"])
@in_loop
async def test_a_step_and_a_handler_take_effect_once_with_their_commit(url: str, mode: Any) -> None:
    FAILS.update(["a", "count 5"])
    world = World(url, mode, "a node each")
    async with world.working(desk, ledger) as director:
        assert await director.result(pay, "a", 5) == [5, 6, 2]

        async def all_counted() -> bool:
            found = await director.client.store.find_events(EventFilter(types=("Counted",)))
            return len(found) == 3

        await until(all_counted)
        (sold, *_) = await director.client.store.find_events(EventFilter(types=("Sold",)))
        (handled,) = (await director.client.events.story(sold.id)).handled
        assert handled.took_us > 0
    assert sorted(await rows(url, "SELECT * FROM bookings")) == [("a", 1), ("a", 5), ("other", 2)]
    assert sorted(await rows(url, "SELECT * FROM seen")) == [(1,), (2,), (5,)]
    assert (len(CALLS), len(SEEN)) == (4, 4), "what failed left nothing and came again"


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("it ends the transaction", "ended by a statement"),
        ("it goes on after an error", "current transaction is aborted"),
    ],
)
@in_loop
async def test_a_transaction_that_cannot_be_written_fails_alone(
    url: str, how: str, why: str
) -> None:
    world = World(url, "orchestration", "one node")
    async with world.working(desk, ledger) as director:
        wrong = await director.start(tries, how)
        right = await director.start(pay, "b", 5)
        with pytest.raises(RunFailed, match=why):
            await wrong.result(timeout=30)
        assert await right.result(timeout=30) == [5, 6, 2]
    assert await rows(url, "SELECT * FROM bookings WHERE account = 'wrong'") == []


@in_loop
async def test_who_waits_for_a_lock_is_tried_again_uncounted_and_others_go_on(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock may be of a process that is frozen, until the server ends its transaction."""
    monkeypatch.setattr(writer, "LOCK_S", 0.1)
    monkeypatch.setattr(Locked, "pause_s", 0.01)
    world = World(url, "orchestration", "one node")
    async with world.working(desk, ledger) as director:
        async with by_asyncpg(url) as (_, execute):
            await execute("INSERT INTO bookings VALUES ('held', 0)")
        async with by_asyncpg(url) as (_, execute):
            await execute("SELECT 1 FROM bookings FOR UPDATE")
            run = await director.start(adds, "held")
            await director.client.publish(Paid(account="held"))

            async def tried() -> bool:
                return len(SEEN) > 2 and len(CALLS) - len(SEEN) > 2

            await until(tried)
            assert await director.result(pay, "b", 5) == [5, 6, 2]
            assert (await run.status()).status != "failed"
        await run.result(timeout=30)

        async def added() -> bool:
            sql = "SELECT cents FROM bookings WHERE account = 'held'"
            return await rows(url, sql) == [(2,)]

        await until(added)


@in_loop
async def test_what_a_commit_refuses_is_a_failure_of_the_work(url: str) -> None:
    """Of the step, which is told, and of the handler, which gives its event up; not a conflict."""
    await rows(url, "INSERT INTO seats VALUES (7) RETURNING no")
    world = World(url, "orchestration", "one node")
    async with world.working(desk, ledger) as director:
        with pytest.raises(RunFailed, match=r"UniqueViolationError.*seats_no_key"):
            await director.result(sits, 7)
        assert await director.result(sits, 8) == 8
        await director.client.publish(Reserved(seat=7))

        async def given_up() -> Any:
            return await director.client.store.dead_letters(DeadFilter())

        (dead,) = await until(given_up)
        assert "seats_no_key" in dead.cause
        await director.client.publish(Reserved(seat=9))

        async def reserved() -> bool:
            return len(await rows(url, "SELECT * FROM seats")) == 3

        await until(reserved)
    assert (CALLS, SEEN) == (["seat 7"] * 3 + ["seat 8"], [7, 7, 7, 9])


@in_loop
async def test_a_plain_function_is_refused_where_its_connection_has_to_be_awaited(url: str) -> None:
    service = Service("plain")

    @service.transaction
    def books(connection: Any) -> None: ...

    with pytest.raises(StoreError, match=r"plain\.books .*Write it as `async def`.*asyncpg"):
        async with App("plain", [service], store=url).worker():
            pass


@in_loop
async def test_an_async_function_is_refused_where_a_thread_calls_it(tmp_path: Any) -> None:
    with pytest.raises(StoreError, match=r"ledger\.book.*Write it as a plain `def`.*APSW"):
        async with App("plain", [ledger], store=str(tmp_path / "s.db")).worker():
            pass


# -- the outbox --------------------------------------------------------------------------------

Execute = Callable[..., Any]


@asynccontextmanager
async def by_asyncpg(url: str) -> AsyncIterator[tuple[Any, Execute]]:
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction():
            yield connection, connection.execute
    finally:
        await connection.close()


@asynccontextmanager
async def by_asyncpg_pool(url: str) -> AsyncIterator[tuple[Any, Execute]]:
    async with (
        asyncpg.create_pool(url, min_size=1, max_size=1) as pool,
        pool.acquire() as connection,
        connection.transaction(),
    ):
        yield connection, connection.execute


@asynccontextmanager
async def by_psycopg(url: str) -> AsyncIterator[tuple[Any, Execute]]:
    with psycopg.connect(url) as connection:
        yield connection, connection.execute


@asynccontextmanager
async def by_psycopg_async(url: str) -> AsyncIterator[tuple[Any, Execute]]:
    async with (
        await psycopg.AsyncConnection.connect(url, autocommit=True) as connection,
        connection.transaction(),
    ):
        yield connection, connection.execute


@asynccontextmanager
async def by_sqlalchemy(url: str) -> AsyncIterator[tuple[Any, Execute]]:
    engine = sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    try:
        with Session(engine) as session, session.begin():
            yield session, session.connection().exec_driver_sql
    finally:
        engine.dispose()


@asynccontextmanager
async def by_sqlalchemy_async(url: str) -> AsyncIterator[tuple[Any, Execute]]:
    engine = create_async_engine(url.replace("postgresql:", "postgresql+asyncpg:"))
    try:
        async with AsyncSession(engine) as session, session.begin():
            yield session, (await session.connection()).exec_driver_sql
    finally:
        await engine.dispose()


WAYS = [
    by_asyncpg, by_asyncpg_pool, by_psycopg, by_psycopg_async, by_sqlalchemy, by_sqlalchemy_async,
]  # fmt: skip


async def done(result: Any) -> None:
    if asyncio.iscoroutine(result):
        await result


@pytest.mark.parametrize("way", WAYS)
@in_loop
async def test_an_event_is_published_with_the_users_transaction_or_not_at_all(
    url: str, way: Any
) -> None:
    world = World(url, "orchestration", "one node")
    async with world.working(desk, ledger) as director:
        for no in range(4):
            try:
                async with way(url) as (connection, execute):
                    await done(execute(f"INSERT INTO sales (seller, no) VALUES ('x', {no})"))
                    event = Sold(shelf="one", by=way.__name__, no=no)
                    await outbox.publish(connection, event, id=f"sale-{no}")
                    await outbox.publish(connection, event, id=f"sale-{no}")
                    if no == 1:
                        raise ZeroDivisionError
            except ZeroDivisionError:
                pass

        async def all_seen() -> bool:
            return len(SEEN) == 3

        await until(all_seen)
        stored = await director.client.store.find_events(EventFilter(types=("Sold",)))
        assert [event.id for event in reversed(stored)] == ["sale-0", "sale-2", "sale-3"]
    assert SEEN == [0, 2, 3], "in the order of commits, each once"
    assert await rows(url, "SELECT no FROM sales ORDER BY id") == [(0,), (2,), (3,)]


@in_loop
async def test_a_transaction_that_lasts_holds_back_nobody(url: str) -> None:
    """And its events come where it commits, not where it began."""
    world = World(url, "orchestration", "one node")
    async with world.working(desk, ledger) as director, by_asyncpg(url) as (slow, _):
        await outbox.publish(slow, Sold(shelf="s", by="slow", no=1))
        async with by_asyncpg(url) as (quick, _):
            await outbox.publish(quick, Sold(shelf="s", by="quick", no=2))
        await director.client.publish(Sold(shelf="s", by="client", no=3))

        async def two_seen() -> bool:
            return len(SEEN) == 2

        await until(two_seen)
        assert sorted(SEEN) == [2, 3]


@in_loop
async def test_a_connection_without_a_transaction_is_refused(url: str) -> None:
    sale = Sold(shelf="one", by="x", no=1)
    connection = await asyncpg.connect(url)
    with pytest.raises(StoreError, match="has no open transaction"):
        await outbox.publish(connection, sale)
    with pytest.raises(BadArguments, match=r"write `await outbox\.publish"):
        outbox.publish_sync(connection, sale)
    await connection.close()
    with (
        psycopg.connect(url, autocommit=True) as plain,
        pytest.raises(StoreError, match="has no open transaction"),
    ):
        outbox.publish_sync(plain, sale)


@pytest.mark.parametrize("whose", ["engine", "connection", "session"])
@in_loop
async def test_a_connection_of_sqlalchemy_that_commits_by_itself_is_refused(
    url: str, whose: str
) -> None:
    """Whoever sets the level: its `begin()` begins nothing, and `rollback()` undoes nothing."""
    level = {"isolation_level": "AUTOCOMMIT"}
    address = url.replace("postgresql:", "postgresql+psycopg:")
    engine = sqlalchemy.create_engine(address, **(level if whose == "engine" else {}))
    of_session = engine.execution_options(**level) if whose == "session" else engine
    refused = pytest.raises(StoreError, match="has the isolation level AUTOCOMMIT")
    with engine.connect() as connection, Session(of_session) as session, refused:
        if whose == "connection":
            connection = connection.execution_options(**level)
        given = session if whose == "session" else connection
        with given.begin():
            outbox.publish_sync(given, Sold(shelf="one", by="x", no=1))
    engine.dispose()
    asynchronous = create_async_engine(url.replace("postgresql:", "postgresql+asyncpg:"), **level)
    async with AsyncSession(asynchronous) as its, its.begin():
        with pytest.raises(StoreError, match="has the isolation level AUTOCOMMIT"):
            await outbox.publish(its, Sold(shelf="one", by="x", no=1))
    await asynchronous.dispose()
    assert await rows(url, "SELECT type FROM pavane.outbox") == []


@in_loop
async def test_a_newer_schema_takes_events_of_the_version_before(url: str) -> None:
    """Workers are upgraded one after the other, and what publishes perhaps last."""

    async def has(schema: int) -> None:
        sql = f"UPDATE pavane.meta SET value = '{schema}' WHERE key = 'schema' RETURNING value"
        await rows(url, sql)

    await has(99)
    async with by_asyncpg(url) as (connection, _):
        await outbox.publish(connection, Sold(shelf="one", by="x", no=1))
    assert await rows(url, "SELECT type FROM pavane.outbox") == [("Sold",)]
    await has(1)
    async with by_asyncpg(url) as (connection, _):
        with pytest.raises(StoreError, match=r"has schema 1, .*Start a worker of this version"):
            await outbox.publish(connection, Sold(shelf="one", by="x", no=2))


@in_loop
async def test_a_database_that_is_no_store_is_refused() -> None:
    with Database() as empty:
        async with by_asyncpg(empty) as (connection, _):
            with pytest.raises(StoreError, match="is no store of Pavane"):
                await outbox.publish(connection, Sold(shelf="one", by="x", no=1))
            assert await connection.fetchval("SELECT 1") == 1, "the transaction can go on"
