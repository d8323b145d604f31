"""Runs that leave and come back: what happens between a commit's submission and its durability."""

from __future__ import annotations

import asyncio
import logging
import sys
from contextlib import closing
from pathlib import Path

import apsw
import pytest
from msgspec import Raw

from pavane import App, BadArguments, EngineConfig, Retry, RunFilter, Service, saga, step_info
from pavane.core.baton import Header
from pavane.core.envelope import Call, Start, pack
from pavane.stores.port import Commit, Message
from tests.integration.world import BUSY_MS, DEADLINE_S

home, away = Service("home"), Service("away")


@home.step
async def at_home() -> str:
    return "home"


@away.step
async def at_away() -> str:
    return "away"


@away.step(retry=Retry(attempts=1))
async def broken_undo() -> None:
    if not REPAIRED:
        raise ValueError("the till is locked")


REPAIRED: list[bool] = []
VISITS: list[asyncio.Event] = []


@away.step
async def visits() -> None:
    """Stay until the event is set."""
    VISITS.append(asyncio.Event())
    await VISITS[-1].wait()


@home.workflow(mode="choreography")
async def back_and_forth() -> list[str]:
    """Wait at the other service, leave it, come back and wait there again."""
    seen: list[str] = []
    for _ in range(3):
        seen.append(await at_away())
        await asyncio.sleep(0.01)
        seen.append(await at_home())
    return seen


@away.step(retry=Retry(attempts=2, first="1ms"))
async def fails_under_a_lock() -> str:
    """Fail once, at an instant when no commit gets through."""
    if step_info().attempt == 1:
        LOCKS[-1].execute("BEGIN IMMEDIATE")
        raise ValueError("not yet")
    return "done"


LOCKS: list[apsw.Connection] = []


@home.workflow(mode="choreography")
async def retries_away() -> str:
    return await fails_under_a_lock()


@home.workflow
async def nap(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "rested"


@home.workflow(mode="choreography")
async def rests_and_leaves(rest_s: float) -> str:
    await asyncio.sleep(rest_s)
    return await at_away()


@home.workflow(mode="choreography")
async def undone_away() -> None:
    async with saga() as undo:
        undo(broken_undo)
        await at_away()
        raise RuntimeError("the order was withdrawn")


@home.step
async def exits() -> None:
    sys.exit(3)


@home.step(timeout="10s")
async def exits_in_time() -> None:
    sys.exit(3)


@home.step
async def interrupts() -> None:
    raise KeyboardInterrupt


@home.workflow
async def calls_one_that_ends_the_loop(which: str) -> str:
    try:
        await (exits_in_time() if which == "SystemExit" else interrupts())
    except Exception as error:
        return repr(error)
    return ""


@home.workflow
async def calls_exit() -> str:
    try:
        await exits()
    except Exception as error:
        return str(error)
    return "no error"


def make_app(store: str, **config: float) -> App:
    return App("test", [home, away], store=store, config=EngineConfig(**config))  # type: ignore[arg-type]


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory:" if request.param == "memory" else str(tmp_path / "test.db")


def test_a_baton_that_returns_to_a_service_where_it_waited_goes_on(store: str) -> None:
    """Invariants 4 and 5: the row of an earlier visit neither stops nor doubles the run."""

    async def body() -> None:
        async with make_app(store) as app:
            run = await app.start(back_and_forth)
            assert await run.result("30s") == ["away", "home"] * 3
            assert (await run.status()).hops >= 5

    asyncio.run(body())


def test_waking_many_runs_at_once_refuses_no_commit(
    store: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant 2: a run that has just ended is not read back before its end is durable."""
    caplog.set_level(logging.INFO, "pavane.holder")

    async def body() -> None:
        async with make_app(store, live_runs_max=20) as app:
            runs = [await app.start(nap, 0.5) for _ in range(400)]
            assert {await run.result("60s") for run in runs} == {"rested"}

    asyncio.run(body())
    assert [r.getMessage() for r in caplog.records if r.name == "pavane.holder"] == []


def test_a_cancel_right_behind_the_start_is_not_lost(tmp_path: Path) -> None:
    """Invariant 4: both come by the log, and the start takes a moment."""

    async def body() -> None:
        app = make_app(str(tmp_path / "test.db"))
        async with app.worker(), app.connect() as client:
            for _ in range(30):
                run = await client.start(nap, 3600.0)
                await run.cancel()
                row = await client.wait_end(run.id)
                assert row.status == "cancelled"

    asyncio.run(body())


@pytest.mark.parametrize("by_log", [False, True])
def test_a_start_is_not_lost_while_the_run_is_looked_up(by_log: bool, store: str) -> None:
    """Invariant 4: a handler may send to a run that has not begun, just before it does."""

    async def body() -> None:
        async with make_app(store) as app:
            session = app.client.node.session if app.client.node else None
            assert session is not None
            session.holder.with_run("home", "r", lambda held: None)
            if by_log:
                header = Header("r", nap.name, 1, "home", "orchestration", session.now_us(), "r")
                start = pack(Start(header, Raw(nap.params.check((0.0,), {}))))
                target = session.store.target_of("home", "r")
                message = Message("start", "r", "home", "r", start, header.started_us, target)
                session.holder.start_message(message, redelivered=False)
            else:
                await app.start(nap, 0.0, id="r")
            while not await app.runs(RunFilter(status=("completed",))):
                await asyncio.sleep(0.005)

    asyncio.run(asyncio.wait_for(body(), DEADLINE_S))


def test_a_run_that_leaves_as_soon_as_it_is_loaded_is_not_loaded_again(tmp_path: Path) -> None:
    """Invariants 1 and 5: until it is durable that it left, its row says it is still here."""
    path = str(tmp_path / "test.db")

    async def body() -> None:
        async with make_app(path, live_runs_max=0) as app:
            session = app.client.node.session if app.client.node else None
            assert session is not None
            found: list[object] = []
            with closing(apsw.Connection(path)) as other:
                other.set_busy_timeout(BUSY_MS)
                loads, rest_s = -1, 0.2
                while loads != session.holder.replays:  # it woke before
                    if loads >= 0:
                        other.execute("ROLLBACK")
                    loads = session.holder.replays
                    run = await app.start(rests_and_leaves, rest_s)
                    await app.start(nap, 3600.0)  # puts the other one away
                    other.execute("BEGIN IMMEDIATE")
                    rest_s *= 2
                while session.holder.replays == loads:
                    await asyncio.sleep(0.001)
                session.holder.with_run("home", run.id, found.append)
                for _ in range(50):
                    await asyncio.sleep(0)
                assert found == []
                assert session.holder.replays == loads + 1
            assert await run.result("60s") == "away"

    asyncio.run(asyncio.wait_for(body(), DEADLINE_S))


def test_a_command_that_is_asked_again_is_not_done_again(store: str) -> None:
    """Invariant 1: a run that was taken up asks again, perhaps while its command is under way."""
    VISITS.clear()

    async def body() -> None:
        async with make_app(store) as app:
            session = app.client.node.session if app.client.node else None
            assert session is not None
            call = Call("r", 0, 0, "away", "visits", Raw(b"[]"), "home", "r")
            target = session.store.target_of("away", "r")

            async def ask() -> None:
                written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                commit = Commit(lambda _: written.set_result(None))
                commit.messages = [Message("command", call.id, "away", "r", pack(call), 1, target)]
                session.submit(commit)
                await written

            await ask()
            while not VISITS:
                await asyncio.sleep(0)
            await ask()
            VISITS[0].set()
            while not await session.store.seen("away", [call.id]):
                await asyncio.sleep(0.001)
            await ask()
            assert await (await app.start(nap, 0.05)).result("30s") == "rested"
            assert len(VISITS) == 1

    asyncio.run(body())


def test_a_run_stuck_at_another_service_is_seen_and_retried_from_home(store: str) -> None:
    """Invariant 7: stuck and visible, wherever its baton is."""
    REPAIRED.clear()

    async def body() -> None:
        async with make_app(store) as app:
            run = await app.start(undone_away)
            while not (stuck := await app.runs(RunFilter(status=("stuck",)))):
                await asyncio.sleep(0.005)
            assert stuck[0].holder == "away"
            assert "the till is locked" in stuck[0].reason
            history = await run.history()
            assert [e.service for e in history.entries if e.what == "done"] == ["away"]
            with pytest.raises(BadArguments, match="is stuck and cannot clean up"):
                await run.cancel()
            REPAIRED.append(True)
            await run.retry()
            row = await app.client.wait_end(run.id)
            assert (row.status, row.undone) == ("failed", 1)

    asyncio.run(body())


def test_a_step_that_exits_fails_and_its_node_goes_on(store: str) -> None:
    """Invariant 11."""

    async def body() -> None:
        async with make_app(store) as app:
            run = await app.start(calls_exit)
            assert "SystemExit" in await run.result("30s")
            for which in ("SystemExit", "KeyboardInterrupt"):
                run = await app.start(calls_one_that_ends_the_loop, which)
                assert which in await run.result("30s")
            assert await (await app.start(nap, 0.0)).result("30s") == "rested"

    asyncio.run(body())


def test_a_retry_that_is_due_before_it_is_durable_is_made(tmp_path: Path) -> None:
    """Invariant 4: the first attempt of a step after a hop writes the run and the retry at once."""
    path = str(tmp_path / "test.db")

    async def body() -> None:
        async with make_app(path) as app:
            with closing(apsw.Connection(path)) as other:
                other.set_busy_timeout(BUSY_MS)
                LOCKS.append(other)
                run = await app.start(retries_away)
                while not other.in_transaction:
                    await asyncio.sleep(0.001)
                await asyncio.sleep(0.1)  # the retry is due meanwhile, and nothing of it is written
            assert await run.result("60s") == "done"

    asyncio.run(asyncio.wait_for(body(), DEADLINE_S))
