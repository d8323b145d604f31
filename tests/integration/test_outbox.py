"""Events published in the user's own transaction: with it or not at all, in commit order."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

import apsw
import pytest
import sqlalchemy
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from pavane import (
    BadArguments,
    NotEncodable,
    NotInWorkflow,
    Retry,
    RunFailed,
    Service,
    StoreError,
    TooLarge,
    delivery,
    outbox,
    step_info,
)
from pavane.errors import OnlyInHandler
from pavane.stores.sqlite import SqliteStore
from tests.integration.outbox_writers import Sold
from tests.integration.world import World, in_loop, until, until_status

ROOT = Path(__file__).resolve().parents[2]
KINDS = (
    "sqlite3", "apsw", "sqlalchemy Connection", "sqlalchemy Session", "sqlalchemy AsyncConnection",
    "sqlalchemy AsyncSession",
)  # fmt: skip
shop = Service("shop")
SEEN: list[tuple[str, int]] = []
MARK = ContextVar("mark", default="nobody")
WAITING: list[Callable[[], Any]] = []
"""What a test lets the step or handler do that calls it."""


@shop.on(Sold, retry=Retry(attempts=3, first="5ms", factor=1))
async def restock(event: Sold) -> None:
    SEEN.append((event.by, event.no))


@shop.step(retry=Retry(attempts=3, first="5ms", factor=1))
async def act() -> Any:
    return await WAITING[0]()


@shop.workflow
async def acts() -> Any:
    return await act()


@shop.workflow
async def publishes_itself() -> None:
    await outbox.publish(None, Sold(shelf="one", by="flow", no=1))


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    SEEN.clear()
    WAITING.clear()


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A store that exists and that nobody has open, with a table of the business."""
    world = World(tmp_path / "world.db", "orchestration", "one node")

    async def make() -> None:
        async with world.idle(shop):
            pass

    asyncio.run(make())
    with opened(world.path) as connection:
        connection.execute("CREATE TABLE sales (id INTEGER PRIMARY KEY, seller TEXT, no INT)")
    return world


@contextmanager
def opened(path: Path) -> Iterator[apsw.Connection]:
    with closing(apsw.Connection(str(path))) as connection:
        connection.set_busy_timeout(20_000)
        yield connection


def rows(world: World, sql: str) -> list[Any]:
    with opened(world.path) as connection:
        return connection.execute(sql).fetchall()


def sales(world: World) -> list[tuple[str, int]]:
    return rows(world, "SELECT seller, no FROM sales ORDER BY id")


def events(world: World) -> list[tuple[str, int]]:
    sql = "SELECT data ->> 'by', data ->> 'no' FROM events ORDER BY pos"
    return rows(world, sql)


INSERT = "INSERT INTO sales (seller, no) VALUES (?, ?)"


@asynccontextmanager
async def transaction(kind: str, path: Path) -> AsyncIterator[tuple[Any, Callable[..., Any]]]:
    """Yield a connection in a transaction, and what executes a statement on it."""
    kind = kind.rpartition(" ")[2]
    url = f"sqlite:///{path}"
    if kind == "sqlite3":
        with closing(sqlite3.connect(path)) as connection, connection:
            yield connection, connection.execute
    elif kind == "apsw":
        with opened(path) as connection, connection:
            yield connection, connection.execute
    elif kind in ("Connection", "Session"):
        engine = sqlalchemy.create_engine(url)
        try:
            if kind == "Connection":
                with engine.begin() as connection:
                    yield connection, connection.exec_driver_sql
            else:
                with Session(engine) as session, session.begin():
                    yield session, session.connection().exec_driver_sql
        finally:
            engine.dispose()
    else:
        engine = create_async_engine(url.replace("sqlite:", "sqlite+aiosqlite:"))
        try:
            if kind == "AsyncConnection":
                async with engine.begin() as connection:
                    yield connection, connection.exec_driver_sql
            else:
                async with AsyncSession(engine) as session, session.begin():
                    yield session, (await session.connection()).exec_driver_sql
        finally:
            await engine.dispose()


async def done(result: Any) -> None:
    if asyncio.iscoroutine(result):
        await result


@pytest.mark.parametrize("kind", KINDS)
@in_loop
async def test_an_event_is_published_with_the_users_transaction_or_not_at_all(
    world: World, kind: str
) -> None:
    for no in range(4):
        try:
            async with transaction(kind, world.path) as (connection, execute):
                if no % 2:
                    await outbox.publish(connection, Sold(shelf="one", by=kind, no=no))
                await done(execute(INSERT, (kind, no)))
                if not no % 2:
                    await outbox.publish(connection, Sold(shelf="one", by=kind, no=no))
                if no == 1:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            pass
    assert sales(world) == events(world) == [(kind, 0), (kind, 2), (kind, 3)]
    assert rows(world, "SELECT type, version, count FROM event_types") == [("Sold", 1, 3)]
    async with world.working(shop) as director:
        await until(lambda: seen(3))
        assert sales(world) == SEEN
        await director.client.publish(Sold(shelf="one", by="app", no=9), source="app")
        await until(lambda: seen(4))


async def seen(count: int) -> bool:
    return len(SEEN) >= count


@pytest.mark.parametrize("kind", KINDS[:4])
def test_code_that_cannot_await_publishes_too(world: World, kind: str) -> None:
    async def publish() -> None:
        async with transaction(kind, world.path) as (connection, _):
            outbox.publish_sync(connection, Sold(shelf="one", by=kind, no=1), id="e-1")
            outbox.publish_sync(connection, Sold(shelf="one", by=kind, no=2), id="e-1")

    asyncio.run(publish())
    row = rows(world, "SELECT id, source, conversation, cause, key FROM events")
    assert row == [("e-1", "outbox", "e-1", "", "one")]
    assert events(world) == [(kind, 1)]
    assert rows(world, "SELECT count FROM event_types") == [(1,)]


@in_loop
async def test_a_worker_handles_an_event_soon_after_the_commit(world: World) -> None:
    async with world.working(shop):
        with opened(world.path) as connection:
            connection.execute("BEGIN IMMEDIATE")
            await outbox.publish(connection, Sold(shelf="one", by="me", no=1))
            await asyncio.sleep(0.05)
            assert SEEN == []
            connection.execute("COMMIT")
            await until(lambda: seen(1))


# -- several processes -------------------------------------------------------------------------


def writer(world: World, name: str, what: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.integration.outbox_writers", str(world.path), name, what],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])},
    )


@in_loop
async def test_events_of_two_writers_are_handled_in_the_order_of_their_commits(
    world: World,
) -> None:
    """Invariant 6, across processes that know nothing of each other; each fifth rolls back."""
    async with world.working(shop):
        writers = [writer(world, name, "150") for name in ("left", "right")]
        for process in writers:
            assert await asyncio.to_thread(process.wait) == 0
        await until(lambda: seen(240))
    assert sales(world) == events(world) == SEEN
    assert len(SEEN) == 240
    numbers = [no for by, no in SEEN if by == "left"]
    assert numbers == [no for no in range(1, 151) if no % 5]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_at_the_commit_leaves_both_or_neither(world: World, when: str) -> None:
    assert writer(world, "killed", when).wait() == -9
    assert sales(world) == events(world) == ([("killed", 1)] if when == "after" else [])


@in_loop
async def test_writers_killed_anywhere_leave_rows_and_events_that_agree(world: World) -> None:
    """Invariant 10."""
    async with world.working(shop):
        for turn in range(4):
            process = writer(world, f"w{turn}", "0")

            async def begun(turn: int = turn) -> bool:
                return any(by == f"w{turn}" for by, _ in sales(world))

            await until(begun)
            await asyncio.sleep(0.007 * turn)
            process.kill()
            assert await asyncio.to_thread(process.wait) == -9
        await until(lambda: seen(len(sales(world))))
    assert sales(world) == events(world) == SEEN


# -- in a step or a handler --------------------------------------------------------------------


@in_loop
async def test_an_event_of_a_step_belongs_to_its_run_and_is_published_once(world: World) -> None:
    """Its transaction commits, and the attempt fails after that: the next one says the same."""

    async def sell_then_fail() -> list[str]:
        with opened(world.path) as connection, connection:
            first = await outbox.publish(connection, Sold(shelf="one", by="step", no=1))
            same = await outbox.publish(connection, Sold(shelf="one", by="step", no=1))
            news = Sold(shelf="one", by="step", no=1 + step_info().attempt)
            other = await outbox.publish(connection, news)
        if step_info().attempt < 3:
            raise ValueError("after the commit")
        return [first, same, other]

    WAITING.append(sell_then_fail)
    async with world.working(shop) as director:
        run = await director.start(acts, id="r")
        ids = await run.result(timeout=30)
        assert len(set(ids)) == 3
    assert events(world) == [("step", 1), ("step", 1), ("step", 2), ("step", 3), ("step", 4)]
    found = rows(world, "SELECT DISTINCT source, conversation, cause FROM events")
    assert found == [("shop", "r", "r")]


@in_loop
async def test_an_event_of_a_handler_belongs_to_its_conversation(world: World) -> None:
    clerk = Service("clerk")
    attempts: list[str] = []

    @clerk.on(Sold, where=lambda event: event.by == "first", retry=Retry(3, "5ms"))
    async def answer(event: Sold) -> None:
        with opened(world.path) as connection, connection:
            source = "elsewhere" if attempts else None
            answered = Sold(shelf="one", by="answer", no=1)
            attempts.append(await outbox.publish(connection, answered, source=source))
        if len(attempts) < 2:
            raise ValueError("after the commit")

    @clerk.on(Sold, name="write", where=lambda event: event.by == "first", transaction=True)
    def write(event: Sold, connection: Any) -> None:
        outbox.publish_sync(connection, Sold(shelf="one", by="written", no=1))

    async with world.working(clerk) as director:
        id = await director.client.publish(
            Sold(shelf="one", by="first", no=1), source="app", id="e", traceparent="00-a-b-01"
        )

        async def answered() -> bool:
            return len(attempts) == 2 and len(events(world)) == 3

        await until(answered)
    assert attempts[0] == attempts[1]
    found = rows(world, "SELECT source, conversation, cause, trace FROM events WHERE pos > 1")
    assert found == [("clerk", id, id, "00-a-b-01")] * 2


@in_loop
async def test_a_step_does_not_inherit_from_the_handler_that_led_to_it(world: World) -> None:
    clerk = Service("clerk")

    async def tell() -> list[str]:
        with pytest.raises(OnlyInHandler):
            delivery()
        with opened(world.path) as connection, connection:
            await outbox.publish(connection, Sold(shelf="one", by="step", no=1))
        return [MARK.get()]

    @clerk.on(Sold, where=lambda event: event.by == "first")
    async def begin(event: Sold) -> None:
        MARK.set("a handler was here")
        SEEN.append((await acts.start(), 0))

    WAITING.append(tell)
    async with world.working(clerk, shop) as director:
        await director.client.publish(Sold(shelf="one", by="first", no=1), source="app")

        async def begun() -> str:
            return next((name for name, no in SEEN if not no), "")

        run = director.get(await until(begun, "the run that the handler starts"))
        await until_status(run, "completed")
        assert await run.result() == ["nobody"]
    assert rows(world, "SELECT cause FROM events WHERE source = 'shop'") == [(run.id,)]


# -- what is refused ---------------------------------------------------------------------------


SALE = Sold(shelf="one", by="me", no=1)


@pytest.mark.parametrize("kind", ["sqlite3", "apsw", "sqlalchemy", "autocommit=True"])
def test_a_connection_that_commits_by_itself_is_refused(world: World, kind: str) -> None:
    def publish(connection: Any) -> None:
        with pytest.raises(StoreError, match=r"no open transaction.*BEGIN IMMEDIATE"):
            outbox.publish_sync(connection, SALE)

    if kind == "sqlite3":
        with closing(sqlite3.connect(world.path, isolation_level=None)) as connection:
            publish(connection)
    elif kind == "apsw":
        with opened(world.path) as connection:
            publish(connection)
    elif kind == "sqlalchemy":
        url = f"sqlite:///{world.path}"
        engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            publish(connection)
        engine.dispose()
    elif sys.version_info >= (3, 12):
        with closing(sqlite3.connect(world.path, autocommit=True)) as connection:
            publish(connection)
    assert events(world) == []


def test_a_connection_on_another_database_is_refused(tmp_path: Path) -> None:
    for path in (":memory:", tmp_path / "other.db"):
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE events (id)")
            with pytest.raises(StoreError, match=r"no store of Pavane.*App\(store=…\)"):
                outbox.publish_sync(connection, SALE)


@pytest.mark.parametrize(("schema", "hint"), [(1, "Start a worker"), (99, "Upgrade here")])
def test_a_store_of_another_schema_is_refused(world: World, schema: int, hint: str) -> None:
    with closing(sqlite3.connect(world.path)) as connection:
        connection.execute(f"PRAGMA user_version = {schema}")
        with pytest.raises(StoreError, match=rf"has schema {schema}.*{hint}"):
            outbox.publish_sync(connection, SALE)


@in_loop
async def test_another_copy_of_sqlite_beside_an_open_store_is_refused(world: World) -> None:
    """Two copies in one process do not see each other's locks: a commit was lost that way."""
    async with world.working(shop), transaction("sqlalchemy AsyncSession", world.path) as (c, _):
        with pytest.raises(StoreError, match=r"another copy of SQLite.*apsw\.Connection"):
            await outbox.publish(c, SALE)


def test_an_old_sqlite_makes_no_checkpoints_any_more(world: World) -> None:
    with closing(sqlite3.connect(world.path)) as connection, connection:
        outbox.publish_sync(connection, SALE)
        (pages,) = connection.execute("PRAGMA wal_autocheckpoint").fetchone()
        assert (pages == 0) == (sqlite3.sqlite_version_info < (3, 51, 3))


def test_what_is_no_connection_is_refused() -> None:
    with pytest.raises(BadArguments, match=r"builtins\.str is no connection that the outbox knows"):
        outbox.publish_sync("shop.db", SALE)


@pytest.mark.parametrize("kind", [AsyncConnection, AsyncSession])
def test_an_asynchronous_connection_must_be_awaited(kind: Any) -> None:
    with pytest.raises(BadArguments, match=r"asynchronous: write `await outbox\.publish"):
        outbox.publish_sync(kind.__new__(kind), SALE)


@pytest.mark.parametrize(
    ("event", "options", "error", "text"),
    [
        ({"shelf": "one"}, {}, BadArguments, "is no event"),
        (Sold(shelf="one", by="x" * 2_000_000, no=1), {}, TooLarge, "Store large data elsewhere"),
        (Sold(shelf="\ud800", by="me", no=1), {}, NotEncodable, "surrogate"),
        (
            Sold(shelf="one", by="me", no=cast("Any", "1")),
            {},
            BadArguments,
            r"This Sold does not fit its class: Expected `int`, got `str` - at `\$\.no`",
        ),
        (SALE, {"id": "a#b"}, BadArguments, "a#b"),
        (SALE, {"id": "\ud800"}, BadArguments, "printable"),
        (SALE, {"source": "\ud800"}, BadArguments, "printable"),
    ],
)
def test_an_event_that_cannot_be_stored_is_refused_before_anything_is_written(
    world: World, event: Any, options: dict[str, str], error: type[Exception], text: str
) -> None:
    with opened(world.path) as connection, connection:
        connection.execute(INSERT, ("me", 1))
        with pytest.raises(error, match=text):
            outbox.publish_sync(connection, event, **options)
    assert sales(world) == [("me", 1)]
    assert events(world) == []


@in_loop
async def test_workflow_code_has_no_connection(world: World) -> None:
    async with world.working(shop) as director:
        run = await director.start(publishes_itself)
        with pytest.raises(RunFailed, match=r"belongs into a step"):
            await run.result(timeout=30)
    assert NotInWorkflow.code == "not-in-workflow"


def test_a_transaction_that_read_before_others_wrote_is_told_how_to_begin(world: World) -> None:
    with (
        closing(sqlite3.connect(world.path, isolation_level=None)) as late,
        closing(sqlite3.connect(world.path, isolation_level=None)) as other,
    ):
        late.execute("BEGIN")
        late.execute("SELECT * FROM sales").fetchall()
        other.execute(INSERT, ("other", 1))
        with pytest.raises(sqlite3.OperationalError, match="locked") as refused:
            outbox.publish_sync(late, SALE)
        assert "BEGIN IMMEDIATE" in refused.value.__notes__[0]
        late.execute("ROLLBACK")


def test_the_module_is_found_without_being_loaded_before() -> None:
    program = "import pavane, sys; assert 'apsw' not in sys.modules; print(pavane.outbox.publish)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
    assert SqliteStore.features.transactions


def test_the_example_of_the_guide_runs(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "guide.md").read_text("utf-8")
    section = guide.partition("## Your own transaction")[2]
    program = section.partition("```python\n")[2].partition("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        check=False, env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("booked 4200\n", "")
