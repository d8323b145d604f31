"""The engine on a real SQLite file: runs, events, requests, failures, both modes and layouts."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from pavane import (
    App,
    BadArguments,
    Event,
    Limit,
    NotEncodable,
    Retry,
    Run,
    RunConflict,
    RunEnded,
    RunFailed,
    RunFilter,
    RunTimeout,
    Service,
    StepTimeout,
    TooLarge,
    UndeclaredReceive,
    UnknownName,
    UnknownRun,
    choreographed,
    continue_as_new,
    heartbeat,
    orchestrated,
    patched,
    receive,
    run_id,
    saga,
    set_attributes,
    step_info,
)
from pavane.core.execution import Execution
from pavane.core.operations import Mode
from pavane.engine.holder import Holder
from pavane.engine.steps import Steps
from pavane.stores.port import Message
from tests.integration.world import (
    LAYOUTS,
    MODES,
    Layout,
    Place,
    World,
    falls_asleep,
    in_loop,
    rows,
    until,
    until_asleep,
    until_status,
)

desk, shop, depot = Service("desk"), Service("shop"), Service("depot")
SERVICES = (desk, shop, depot)
DONE: list[Any] = []
"""What steps did, in order; each test begins with nothing."""
BROKEN: set[str] = set()
"""Names of steps that fail for now."""


class Told(Event):
    text: str


class Asked(Event):
    text: str


@pytest.fixture(autouse=True)
def _nothing_done() -> None:  # pyright: ignore[reportUnusedFunction]
    DONE.clear()
    BROKEN.clear()
    return


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Mode:
    return request.param


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    return request.param


@pytest.fixture
def world(place: Place, mode: Mode, layout: Layout) -> World:
    return World(place, mode, layout)


@pytest.fixture
def small(tmp_path: Path) -> World:
    """For what does not depend on mode and layout."""
    return World(tmp_path / "world.db", "orchestration", "one node")


def act(name: str) -> None:
    DONE.append((name, step_info().attempt))
    if name in BROKEN:
        raise ValueError(f"{name} is broken")


def names() -> list[str]:
    return [name for name, _ in DONE]


@shop.step
async def buy(what: str) -> str:
    act("buy")
    return f"bought {what}"


@shop.step
async def unbuy(what: str) -> None:
    act("unbuy")


@depot.step
async def store(what: str) -> str:
    act("store")
    return f"stored {what}"


@depot.step
async def unstore(what: str) -> None:
    act("unstore")


@desk.step
async def write(what: str) -> str:
    act("write")
    return f"wrote {what}"


@depot.step
async def hang(seconds: float) -> str:
    act("hang")
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        DONE.append(("hang cancelled", 0))
        raise
    return "hung"


@desk.workflow
async def order(what: str) -> list[str]:
    async with saga() as undo:
        bought = await buy(what)
        undo(unbuy, bought)
        stored = await store(what)
        undo(unstore, stored)
        return [bought, stored, await write(what)]


# -- running -----------------------------------------------------------------------------------


@in_loop
async def test_a_run_does_each_step_once_and_returns(world: World) -> None:
    """Invariants 1, 3, 8."""
    async with world.working(*SERVICES) as director:
        run = await director.start(order, "tea")
        assert await run.result(timeout=30) == ["bought tea", "stored tea", "wrote tea"]
        history = await run.history()
        assert names() == ["buy", "store", "write"]
        stations = [stop.service for stop in history.trail]
        expected = ["desk"] if world.mode == "orchestration" else ["desk", "shop", "depot", "desk"]
        assert stations == expected
        assert history.status.status == "completed"


@in_loop
async def test_a_failing_step_compensates_in_reverse_each_once(world: World) -> None:
    """Invariant 7."""
    BROKEN.add("write")
    async with world.working(*SERVICES) as director:
        run = await director.start(order, "tea")
        with pytest.raises(RunFailed, match="write is broken") as caught:
            await run.result(timeout=30)
        assert isinstance(caught.value.__cause__, ValueError)
        assert names() == ["buy", "store", "write", "unstore", "unbuy"]
        status = await run.status()
        assert (status.status, status.compensated) == ("failed", 2)


@in_loop
async def test_forks_races_and_timeouts_end_alike(world: World) -> None:
    """Invariant 8."""

    @desk.workflow(name=f"forks-{world.mode}-{world.layout.replace(' ', '-')}")
    async def forks(late_s: float) -> list[Any]:
        both = await asyncio.gather(buy("a"), store("b"), write("c"))
        try:
            async with asyncio.timeout(late_s):
                await hang(30)
        except TimeoutError:
            both.append("late")
        first, _ = await asyncio.wait(
            [asyncio.ensure_future(buy("d")), asyncio.ensure_future(asyncio.sleep(30))],
            return_when="FIRST_COMPLETED",
        )
        return [*both, *(task.result() for task in first)]

    try:
        async with world.working(*SERVICES) as director:
            late_s = 0.05
            while "hang" not in names():  # which a busy machine may not begin in time
                result = await director.result(forks, late_s)
                assert result == ["bought a", "stored b", "wrote c", "late", "bought d"]
                late_s *= 4

            async def hang_was_stopped() -> bool:
                return "hang cancelled" in names()

            await until(hang_was_stopped)
    finally:
        del desk.workflows[forks.name, 1]


@desk.workflow(timeout="20s")
async def limited(what: str) -> list[str]:
    first = await buy(what)
    second = await store(what)
    return [first, second, *await asyncio.gather(buy("x"), store("y"))]


@in_loop
async def test_a_run_with_a_timeout_travels_like_any_other(world: World) -> None:
    """Invariant 8: the timer of the run's timeout is no branch of a fork."""
    async with world.working(*SERVICES) as director:
        assert await director.result(limited, "tea") == [
            "bought tea", "stored tea", "bought x", "stored y"
        ]  # fmt: skip


@desk.workflow(receives=[Told])
async def fork_beside_receive() -> list[str]:
    await buy("first")

    async def told() -> str:
        return (await receive(Told)).text

    return list(await asyncio.gather(store("second"), told(), write("third")))


@in_loop
async def test_a_fork_away_from_home_goes_home_for_a_receive_and_does_its_steps(
    world: World,
) -> None:
    """Invariant 4: what nobody was asked to do yet is not taken for asked."""
    async with world.working(*SERVICES) as director:
        run = await director.start(fork_beside_receive)
        await until_status(run, "waiting", reason="Told")
        await run.send(Told(text="now"))
        assert await run.result(timeout=30) == ["stored second", "now", "wrote third"]
        assert sorted(names()) == ["buy", "store", "write"]


@desk.workflow
async def sections(what: str) -> list[str]:
    async with orchestrated():
        first = await buy(what)
    async with choreographed():
        second = await store(what)
    return [first, second, await write(what)]


@in_loop
async def test_sections_override_the_mode(world: World) -> None:
    async with world.working(*SERVICES) as director:
        run = await director.start(sections, "tea")
        assert await run.result(timeout=30) == ["bought tea", "stored tea", "wrote tea"]
        assert [stop.service for stop in (await run.history()).trail] == ["desk", "depot", "desk"]


@desk.workflow
async def to_and_fro(times: int) -> int:
    for number in range(times):
        await buy(str(number))
        await store(str(number) * 100)
    return times


@in_loop
async def test_a_hop_cap_brings_the_run_home_for_good(tmp_path: Path, layout: Layout) -> None:
    world = World(tmp_path / "world.db", "choreography", layout)
    async with world.working(*SERVICES, hops_max=5) as director:
        run = await director.start(to_and_fro, 6)
        assert await run.result(timeout=30) == 6
        history = await run.history()
        assert [stop.service for stop in history.trail][-1] == "desk"
        assert history.status.hops == 6
        assert names() == ["buy", "store"] * 6


@in_loop
async def test_a_journal_cap_brings_the_run_home_for_good(tmp_path: Path, layout: Layout) -> None:
    world = World(tmp_path / "world.db", "choreography", layout)
    async with world.working(*SERVICES, journal_max_bytes=800) as director:
        run = await director.start(to_and_fro, 8)
        assert await run.result(timeout=30) == 8
        history = await run.history()
        assert 0 < history.status.hops < 12
        assert [stop.service for stop in history.trail][-1] == "desk"
        assert names() == ["buy", "store"] * 8


# -- events ------------------------------------------------------------------------------------


@desk.workflow(receives=[Told, Asked])
async def listens(times: int) -> list[str]:
    heard: list[str] = []
    for _ in range(times):
        heard.append((await receive(Told)).text)
        await buy(heard[-1])
    return heard


async def until_bought(count: int) -> None:
    async def bought() -> bool:
        return names().count("buy") >= count

    await until(bought, f"{count} to be bought")


@in_loop
async def test_events_count_once_whether_early_awaited_or_repeated(world: World) -> None:
    """Invariant 4."""
    async with world.idle(*SERVICES) as director:
        run = await director.start(listens, 4)
        await run.send(Told(text="before"), id="1")
        await run.send(Told(text="before"), id="1")
    async with world.working(*SERVICES) as director:
        run = director.get(run.id)
        await until_bought(1)
        await until_status(run, "waiting", reason="Told")
        await run.send(Told(text="awaited"))
        await run.send(Told(text="close behind"))
        await run.send(Told(text="before"), id="1")
        await until_bought(3)
        await until_status(run, "waiting", reason="Told")
        await run.send(Told(text="last"))
        assert await run.result(timeout=30) == ["before", "awaited", "close behind", "last"]


@in_loop
async def test_an_event_that_wakes_a_run_out_of_the_store_counts_once(world: World) -> None:
    """Invariant 4: with room for one live run, each event finds its run put away."""
    async with world.working(*SERVICES, live_runs_max=1) as director:
        runs = [await director.start(listens, 3) for _ in range(5)]
        for number in range(3):
            await until_bought(5 * number)
            for run in runs:
                await until_status(run, "waiting", reason="Told")
                await run.send(Told(text=f"{number}"))
        for run in runs:
            assert await run.result(timeout=30) == ["0", "1", "2"]


@in_loop
async def test_an_event_for_a_run_that_ended_or_never_was_is_an_error(small: World) -> None:
    async with small.working(*SERVICES) as director:
        run = await director.start(order, "tea")
        await run.result(timeout=30)
        with pytest.raises(RunEnded, match="completed"):
            await run.send(Told(text="late"))
        with pytest.raises(RunEnded):
            await run.cancel()
        with pytest.raises(UnknownRun, match="nobody"):
            await director.get("nobody").send(Told(text="?"))
        with pytest.raises(UnknownRun):
            await director.get("nobody").result(timeout=1)


@in_loop
async def test_an_event_that_a_run_does_not_receive_is_refused_at_the_sender(
    small: World,
) -> None:
    async with small.working(*SERVICES) as director:
        run = await director.start(order, "tea")
        with pytest.raises((BadArguments, RunEnded)):
            await run.send(Told(text="unexpected"))
        listening = await director.start(listens, 1)
        with pytest.raises(BadArguments, match="no event"):
            await listening.send("text")  # pyright: ignore
        await listening.kill()


@desk.workflow
async def undeclared() -> None:
    await receive(Told)


@in_loop
async def test_an_undeclared_receive_fails_the_run_with_what_to_write(small: World) -> None:
    async with small.working(*SERVICES) as director:
        with pytest.raises(RunFailed) as caught:
            await director.result(undeclared)
        assert isinstance(caught.value.__cause__, UndeclaredReceive)
        assert "receives=[Told]" in str(caught.value.__cause__)


# -- requests ----------------------------------------------------------------------------------


@desk.workflow
async def cleans_up() -> None:
    async with saga() as undo:
        undo(unbuy, await buy("tea"))
        try:
            await hang(60)
        finally:
            await write("clean-up")


@in_loop
async def test_cancel_stops_the_step_cleans_up_and_compensates(world: World) -> None:
    """Invariant 7."""
    async with world.working(*SERVICES) as director:
        run = await director.start(cleans_up)

        async def hangs() -> bool:
            return "hang" in names()

        await until(hangs)
        await run.cancel()
        with pytest.raises(RunFailed) as caught:
            await run.result(timeout=30)
        assert caught.value.status == "cancelled"

        async def step_was_stopped() -> bool:
            return "hang cancelled" in names()

        await until(step_was_stopped)
        assert [name for name in names() if not name.startswith("hang")] == [
            "buy", "write", "unbuy"
        ]  # fmt: skip
        assert (await run.status()).compensated == 1


@in_loop
async def test_kill_ends_at_once_without_clean_up(world: World) -> None:
    async with world.working(*SERVICES) as director:
        run = await director.start(cleans_up)

        async def hangs() -> bool:
            return "hang" in names()

        await until(hangs)
        await run.kill()
        with pytest.raises(RunFailed) as caught:
            await run.result(timeout=30)
        assert caught.value.status == "killed"
        assert "write" not in names()
        assert "unbuy" not in names()


@in_loop
async def test_a_cancel_reaches_a_run_that_sleeps_in_the_store(world: World) -> None:
    """Invariant 4."""
    async with world.working(*SERVICES, live_runs_max=1) as director:
        runs = [await director.start(sleeps, 3600) for _ in range(4)]
        for run in runs:
            await until_status(run, "waiting", reason="timer")
            await run.cancel()
        for run in runs:
            with pytest.raises(RunFailed, match="cancelled"):
                await run.result(timeout=30)


@desk.workflow
async def shrugs() -> str:
    """Catch the first cancellation and go on as if nothing had been asked."""
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        await asyncio.sleep(3600)
    return "slept"


@in_loop
async def test_a_cancel_that_workflow_code_swallows_is_seen_and_may_be_asked_again(
    world: World,
) -> None:
    """Invariant 7: it is never sent again by itself, since that would break into a clean-up."""
    async with world.working(*SERVICES) as director:
        run = await director.start(shrugs)
        await until_status(run, "waiting", reason="timer")
        await run.cancel()

        async def asked() -> bool:
            return [e.what for e in (await run.history()).entries] == ["start", "cancel"]

        await until(asked)
        await until_status(run, "waiting", reason="timer")
        await run.cancel()
        with pytest.raises(RunFailed, match="cancelled"):
            await run.result(timeout=30)


@desk.workflow
async def plain(what: str) -> list[str]:
    return [await buy(what), await store(what), await write(what)]


@in_loop
async def test_retry_goes_on_with_a_failed_run_from_its_failure(world: World) -> None:
    """Invariant 1: what is journalled is not done again."""
    BROKEN.add("store")
    async with world.working(*SERVICES) as director:
        run = await director.start(plain, "tea")
        with pytest.raises(RunFailed):
            await run.result(timeout=30)
        BROKEN.clear()
        await run.retry()
        await until_status(run, "completed")
        assert await run.result(timeout=30) == ["bought tea", "stored tea", "wrote tea"]
        assert names() == ["buy", "store", "store", "write"]


@in_loop
async def test_retry_of_what_needs_none_is_refused_with_a_reason(small: World) -> None:
    async with small.working(*SERVICES) as director:
        run = await director.start(order, "tea")
        await run.result(timeout=30)
        with pytest.raises(BadArguments, match="completed"):
            await run.retry()
        BROKEN.add("write")
        compensated = await director.start(order, "tea")
        with pytest.raises(RunFailed):
            await compensated.result(timeout=30)
        with pytest.raises(BadArguments, match="compensated"):
            await compensated.retry()


@shop.step(retry=Retry(attempts=2, first="1ms"))
async def stubborn_undo(what: str) -> None:
    act("stubborn_undo")


@desk.workflow
async def hard_to_undo() -> None:
    async with saga() as undo:
        undo(unstore, await store("a"))
        undo(stubborn_undo, "b")
        await write("c")


@in_loop
async def test_a_compensation_that_fails_for_good_leaves_the_run_stuck_until_retry(
    world: World,
) -> None:
    """Invariant 7: never compensated by half and called compensated."""
    BROKEN.update({"write", "stubborn_undo"})
    async with world.working(*SERVICES) as director:
        run = await director.start(hard_to_undo)
        status = await until_status(run, "stuck")
        assert "stubborn_undo failed for good" in status.reason
        assert "retry" in status.reason
        assert names() == ["store", "write", "stubborn_undo", "stubborn_undo"]

        async def home_knows() -> bool:
            return bool(await director.client.runs(RunFilter(status=("stuck",))))

        await until(home_knows)
        with pytest.raises(BadArguments, match="stuck"):
            await run.cancel()
        BROKEN.clear()
        await run.retry()
        with pytest.raises(RunFailed, match="write is broken"):
            await run.result(timeout=30)
        assert names()[4:] == ["stubborn_undo", "unstore"]
        assert (await run.status()).compensated == 2


@desk.workflow
async def undoes_one() -> None:
    async with saga() as undo:
        undo(unstore, await store("a"))
        await write("c")


@in_loop
async def test_a_compensation_that_cannot_be_made_leaves_the_run_stuck_with_what_is_left(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant 7: whatever the reason is, nothing is passed over."""
    BROKEN.add("write")

    async def out_of_memory() -> None:
        raise MemoryError

    with monkeypatch.context() as broken:
        broken.setattr(type(unstore), "compensation", lambda *_: out_of_memory)  # pyright: ignore
        async with world.working(*SERVICES) as director:
            run = await director.start(undoes_one)
            status = await until_status(run, "stuck")
            assert "unstore cannot be carried out: MemoryError" in status.reason
    async with world.working(*SERVICES) as director:
        await director.get(run.id).retry()
        with pytest.raises(RunFailed, match="write is broken"):
            await director.get(run.id).result(timeout=30)
        assert names()[-1] == "unstore"
        assert (await director.get(run.id).status()).compensated == 1


@in_loop
async def test_who_waits_for_the_result_of_a_run_that_is_stuck_elsewhere_is_warned_once(
    small: World, caplog: pytest.LogCaptureFixture
) -> None:
    BROKEN.update({"write", "stubborn_undo"})
    async with small.working(*SERVICES) as director, small.idle(*SERVICES) as far:
        run = await director.start(hard_to_undo)
        waiting = asyncio.create_task(far.get(run.id).result())

        async def warned() -> list[str]:
            return [r.message for r in caplog.records if r.name == "pavane.client"]

        (said,) = await until(warned)
        assert said.startswith(f"run {run.id}, whose result is waited for, is stuck: The comp")
        assert not waiting.done()
        BROKEN.clear()
        await run.retry()
        with pytest.raises(RunFailed, match="write is broken"):
            await waiting
        assert len(await warned()) == 1


@in_loop
async def test_a_client_starts_finds_and_lists_runs_as_an_open_app_does(small: World) -> None:
    app = small.app(SERVICES)
    async with app, app.connect() as client:
        for number, ground in enumerate((app, client)):
            run = await ground.start(plain, what="tea", id=f"r{number}", mode="choreography")
            assert await ground.get(run.id).result() == ["bought tea", "stored tea", "wrote tea"]
            newest = (await ground.runs(RunFilter(workflow="plain")))[0]
            assert (newest.id, newest.mode) == (run.id, "choreography")
            with pytest.raises(BadArguments, match="no workflow"):
                await ground.start(print)  # pyright: ignore
        assert await app.runs() == await client.runs()


@in_loop
async def test_a_stuck_run_can_be_killed(world: World) -> None:
    BROKEN.update({"write", "stubborn_undo"})
    async with world.working(*SERVICES) as director:
        run = await director.start(hard_to_undo)
        await until_status(run, "stuck")
        await run.kill()
        with pytest.raises(RunFailed) as caught:
            await run.result(timeout=30)
        assert caught.value.status == "killed"


@in_loop
async def test_fork_shares_the_journal_up_to_a_step_and_does_the_rest_anew(world: World) -> None:
    """Invariant 1."""
    async with world.working(*SERVICES) as director:
        run = await director.start(plain, "tea")
        await run.result(timeout=30)
        forked = await run.fork("store", id="again")
        assert await forked.result(timeout=30) == ["bought tea", "stored tea", "wrote tea"]
        assert names() == ["buy", "store", "write", "store", "write"]
        with pytest.raises(BadArguments, match=r"shop\.buy"):
            await run.fork("nonsense")
        with pytest.raises(RunConflict):
            await run.fork("store", id="again")


@shop.step
async def hike() -> None:
    act("hike")


@desk.workflow
async def two_sagas() -> None:
    with suppress(LookupError):
        async with saga() as undo:
            undo(unbuy, await buy("map"))
            raise LookupError
    await write("plan")
    async with saga() as undo:
        undo(unstore, await store("tent"))
        await hike()


@in_loop
async def test_a_compensated_run_is_forked_only_at_a_step_before_what_was_undone(
    world: World,
) -> None:
    """Invariant 7: nothing is built on what is gone, nor undone twice."""
    BROKEN.add("hike")
    async with world.working(*SERVICES) as director:
        run = await director.start(two_sagas, id="bad")
        with pytest.raises(RunFailed):
            await run.result(timeout=30)
        assert names() == ["buy", "unbuy", "write", "store", "hike", "unstore"]
        advice = r"can be forked is depot\.store: `pavane runs fork bad --at depot\.store`"
        for gone in ("hike", "unstore"):
            with pytest.raises(BadArguments, match=advice):
                await run.fork(gone)
        with pytest.raises(BadArguments, match=advice):
            await run.retry()
        BROKEN.clear()
        DONE.clear()
        forked = await run.fork("store")
        await forked.result(timeout=30)
        assert names() == ["store", "hike"]
    async with App("other", [], store=str(world.path)).connect() as blind:
        advice = r"can be forked is shop\.buy"
        with pytest.raises(BadArguments, match=advice):
            await Run(blind, "bad").fork("store")


@in_loop
async def test_starting_an_id_again_gives_the_same_run_or_a_conflict(world: World) -> None:
    """Invariant 4."""
    async with world.working(*SERVICES) as director:
        first = await director.start(order, "tea", id="one")
        second = await director.start(order, "tea", id="one")
        assert await first.result(timeout=30) == await second.result(timeout=30)
        third = await director.start(order, "tea", id="one")
        assert await third.result(timeout=30) == ["bought tea", "stored tea", "wrote tea"]
        assert names() == ["buy", "store", "write"]
        with pytest.raises(RunConflict, match="other arguments"):
            await director.start(order, "coffee", id="one")
        with pytest.raises(RunConflict, match="'order'"):
            await director.start(plain, "tea", id="one")


@in_loop
async def test_many_starts_of_one_id_at_once_make_one_run(world: World) -> None:
    """Invariant 4."""
    async with world.working(*SERVICES) as director:
        runs = await asyncio.gather(*(director.start(order, "tea", id="one") for _ in range(8)))
        results = await asyncio.gather(*(run.result(timeout=30) for run in runs))
        assert len(set(map(tuple, results))) == 1
        assert names() == ["buy", "store", "write"]


# -- time --------------------------------------------------------------------------------------


@desk.workflow
async def sleeps(seconds: float) -> str:
    await buy("before")
    await asyncio.sleep(seconds)
    return await store("after")


@in_loop
async def test_a_run_sleeps_over_a_restart_and_wakes(world: World) -> None:
    """Invariants 4, 10."""
    async with world.working(*SERVICES) as director:

        async def nap(for_s: float) -> Run[str]:
            DONE.clear()
            return await director.start(sleeps, for_s)

        run = await until_asleep(nap, 0.6)
    async with world.working(*SERVICES) as director:
        assert await director.get(run.id).result(timeout=30) == "stored after"
        assert names() == ["buy", "store"]


@in_loop
async def test_what_was_due_while_nobody_worked_is_done_at_once(world: World) -> None:
    async with world.working(*SERVICES) as director:
        slept_s: list[float] = []

        async def nap(for_s: float) -> Run[str]:
            slept_s.append(for_s)
            return await director.start(sleeps, for_s)

        run = await until_asleep(nap, 0.3)
    ends = time.time() + slept_s[-1] + 0.05
    while time.time() < ends:
        await asyncio.sleep(0.01)
    async with world.working(*SERVICES) as director:
        assert await director.get(run.id).result(timeout=30) == "stored after"


@in_loop
async def test_many_sleepers_fit_a_node_that_keeps_five_live(tmp_path: Path, mode: Mode) -> None:
    """Invariant 4: runs that wait are put away and wake all the same."""
    world = World(tmp_path / "world.db", mode, "one node")
    async with world.working(*SERVICES, live_runs_max=5) as director:
        session = director.workers[0].node.session  # pyright: ignore
        assert session is not None

        async def put_away_or_awake() -> str:
            """Say whether all sleep and most are put away, or the first of them is awake."""
            if "store" in names():
                return "awake"
            waiting = await director.client.runs(RunFilter(status=("waiting",), limit=1000))
            asleep = ["timer" in status.reason for status in waiting].count(True)
            # That they wait is seen in the store a moment before the node is told of it.
            return "put away" if asleep == 200 and len(session.holder.held) < 100 else ""

        found, for_s = "", 3.0
        while found != "put away":  # in time, which a busy machine may not
            DONE.clear()
            runs = await asyncio.gather(*(director.start(sleeps, for_s) for _ in range(200)))
            found = await until(put_away_or_awake)
            for run in runs:
                assert await run.result(timeout=60) == "stored after"
            assert (names().count("buy"), names().count("store")) == (200, 200)
            for_s *= 4


@desk.workflow(timeout="300ms")
async def too_slow() -> None:
    try:
        await asyncio.sleep(60)
    finally:
        await write("clean-up")


@in_loop
async def test_a_run_timeout_cleans_up_and_fails_with_run_timeout(world: World) -> None:
    async with world.working(*SERVICES) as director:
        with pytest.raises(RunFailed) as caught:
            await director.result(too_slow)
        assert isinstance(caught.value.__cause__, RunTimeout)
        assert names() == ["write"]


@desk.workflow(timeout="1s")
async def slow_once(what: str) -> list[str]:
    bought = await buy(what)
    try:
        if "slow" in BROKEN:
            await asyncio.sleep(60)
        return [bought, await store(what)]
    finally:
        if "slow" in BROKEN:
            await write("clean-up")


@in_loop
async def test_a_run_that_timed_out_has_all_its_time_again_when_retried_or_forked(
    world: World,
) -> None:
    BROKEN.add("slow")
    async with world.working(*SERVICES) as director:
        while "write" not in names():  # until it bought in time
            DONE.clear()
            run = await director.start(slow_once, "tea")
            with pytest.raises(RunFailed, match="longer than its timeout"):
                await run.result(timeout=30)
        with pytest.raises(BadArguments, match=r"--at shop\.buy`"):
            await run.fork("write")
        before = await run.status()
        await run.retry()

        async def cleaned_up_again() -> bool:
            return names().count("write") == 2

        await until(cleaned_up_again)
        with pytest.raises(RunFailed, match="longer than its timeout"):
            await run.result(timeout=30)
        assert names() == ["buy", "write", "write"]
        after = await run.status()
        assert (after.ended_us or 0) - (before.ended_us or 0) > 1_000_000
        forked = await run.fork("buy")
        status = await forked.status()
        # The clocks of client and worker may differ a little.
        assert status.started_us > (after.ended_us or 0) - 500_000
        with pytest.raises(RunFailed, match="longer than its timeout"):
            await forked.result(timeout=30)
        ended = await forked.status()
        assert (ended.ended_us or 0) - ended.started_us > 500_000
        found = await director.client.runs(RunFilter(limit=2))
        assert [one.id for one in found] == [forked.id, run.id]


async def retried(run: Run[Any]) -> int:
    """Tell how often it was taken back."""
    return [entry.what for entry in (await run.history()).entries].count("rewind")


desk_of_words = Service("words")


@desk_of_words.workflow(timeout="1s", receives=[Told])
async def patient() -> str:
    return (await receive(Told)).text


@in_loop
async def test_a_run_that_timed_out_waiting_waits_anew_when_retried(small: World) -> None:
    async with small.working(desk_of_words) as director:
        run = await director.start(patient)
        with pytest.raises(RunFailed, match="longer than its timeout"):
            await run.result(timeout=30)

        async def is_answered() -> bool:
            """Have it wait anew, and tell it; that may be too late again."""
            turns = await retried(run)
            await run.retry()

            async def waits_anew() -> bool:
                return await retried(run) > turns

            try:
                await until(waits_anew)
                await run.send(Told(text="at last"))
                return await run.result(timeout=30) == "at last"
            except (RunEnded, RunFailed):
                return False

        await until(is_answered)


# -- code that changes -------------------------------------------------------------------------


def version_of(body: Any, **options: Any) -> tuple[Service, Any]:
    """A service of its own with one workflow called `flow`, as one deployment has it."""
    service = Service("changing")
    return service, service.workflow(name="flow", receives=[Told], **options)(body)


async def _old() -> list[str]:
    first = await buy("old")
    await receive(Told)
    return [first, await store("old")]


async def _changed() -> list[str]:
    first = await store("new")
    await receive(Told)
    return [first]


async def _patched() -> list[str]:
    first = await buy("old")
    await receive(Told)
    if patched("no store"):
        return [first, await write("patched")]
    return [first, await store("old")]


@in_loop
async def test_changed_code_leaves_the_run_stuck_with_a_diff_and_the_old_code_resumes_it(
    world: World,
) -> None:
    """Invariant 3: a mismatch fails nothing and does nothing."""
    before, flow = version_of(_old)
    async with world.working(before, *SERVICES) as director:
        run = await director.start(flow)
        await until_status(run, "waiting", reason="Told")
    after, _ = version_of(_changed)
    async with world.working(after, *SERVICES) as director:
        run = director.get(run.id)
        await run.send(Told(text="go"))
        status = await until_status(run, "stuck")
        assert "-step shop.buy" in status.reason
        assert "+step depot.store" in status.reason
        assert "or another app that has a service of this name" in status.reason
        assert names() == ["buy"]
    async with world.working(before, *SERVICES) as director:
        assert await director.get(run.id).result(timeout=30) == ["bought old", "stored old"]
        assert names() == ["buy", "store"]


@in_loop
async def test_patched_code_serves_old_and_new_runs(world: World) -> None:
    before, flow = version_of(_old)
    async with world.working(before, *SERVICES) as director:
        waiting = await director.start(flow)
        await until_status(waiting, "waiting", reason="Told")
        BROKEN.add("store")
        failed = await director.start(flow)
        await until_status(failed, "waiting", reason="Told")
        await failed.send(Told(text="go"))
        with pytest.raises(RunFailed):
            await failed.result(timeout=30)
        BROKEN.clear()
    after, flow = version_of(_patched)
    async with world.working(after, *SERVICES) as director:
        fresh = await director.start(flow)
        await until_status(fresh, "waiting", reason="Told")
        for run in (director.get(waiting.id), fresh):
            await run.send(Told(text="go"))
            assert await run.result(timeout=30) == ["bought old", "wrote patched"]
        old = director.get(failed.id)
        await old.retry()
        await until_status(old, "completed")
        assert await old.result(timeout=30) == ["bought old", "stored old"]


@in_loop
async def test_a_run_of_a_version_that_is_gone_is_stuck_until_it_is_back(world: World) -> None:
    """Invariant 11: other runs go on."""
    before, flow = version_of(_old, version=1)
    async with world.working(before, *SERVICES) as director:
        run = await director.start(flow)
        await until_status(run, "waiting", reason="Told")
    after, newer = version_of(_changed, version=2)
    async with world.working(after, *SERVICES) as director:
        run = director.get(run.id)
        await run.send(Told(text="go"))
        status = await until_status(run, "stuck")
        assert "no version 1" in status.reason
        assert "or another app that has a service of this name" in status.reason
        other = await director.start(newer)
        await until_status(other, "waiting", reason="Told")
        await other.send(Told(text="go"))
        assert await other.result(timeout=30) == ["stored new"]
    async with world.working(before, *SERVICES) as director:
        assert await director.get(run.id).result(timeout=30) == ["bought old", "stored old"]


@depot.workflow
async def inventory(what: str) -> str:
    return await store(what)


@desk.workflow
async def asks_the_depot(how: str) -> Any:
    await buy("first")
    if how == "step":
        return await store("tea")
    if how == "child":
        return await inventory("tea")
    if how == "spawn":
        return await inventory.start("tea")
    return await asyncio.gather(buy("beside"), store("tea"))


@in_loop
@pytest.mark.parametrize("how", ["step", "child", "spawn", "beside"])
async def test_what_needs_a_service_that_the_app_does_not_list_is_stuck_until_it_does(
    world: World, how: str
) -> None:
    """Nothing that was done is lost, and nothing is done again."""
    for _ in range(2):  # another start with the same code changes nothing
        async with world.working(desk, shop) as director:
            run = await director.start(asks_the_depot, how, id="r")
            asked = "run of depot.inventory" if how in ("child", "spawn") else "step depot.store"
            status = await until_status(run, "stuck", reason=asked)
            assert "List it, App(services=[" in status.reason
            if how == "beside" and world.layout == "a node each":
                await until(lambda: _kept_reply(world), "the reply that came meanwhile")
    async with world.working(*SERVICES) as director:
        result = await director.get("r").result(timeout=30)
        if how == "spawn":
            result = await director.get(result).result(timeout=30)
        assert result == (["bought beside", "stored tea"] if how == "beside" else "stored tea")
        assert names() == ["buy", *["buy"] * (how == "beside"), "store"]


async def _kept_reply(world: World) -> bool:
    return bool(await rows(world.path, "SELECT 1 FROM mailbox WHERE type = '!reply'"))


@desk.workflow
async def begins_at_the_depot() -> str:
    return await store("tea")


@in_loop
async def test_a_start_returns_though_its_first_step_is_of_a_service_not_listed(
    world: World,
) -> None:
    async with world.working(desk) as director:
        run = await director.start(begins_at_the_depot, id="r")
        await until_status(run, "stuck", reason="depot")
    async with world.working(*SERVICES) as director:
        assert await director.get("r").result(timeout=30) == "stored tea"


@in_loop
async def test_a_run_that_the_engine_fails_at_is_stuck_and_goes_on_after_a_retry(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.working(*SERVICES) as director:
        with monkeypatch.context() as broken:
            broken.setattr(Holder, "_end", lambda *_: 1 / 0)
            run = await director.start(order, "tea")
            await until_status(run, "stuck", reason="ZeroDivisionError")
        await run.retry()
        assert await run.result(timeout=30) == ["bought tea", "stored tea", "wrote tea"]
        assert names() == ["buy", "store", "write"]


@in_loop
async def test_a_corrupt_journal_stops_its_run_and_no_other(world: World) -> None:
    """Invariant 11."""
    async with world.working(*SERVICES) as director:
        both: list[Run[str]] = []

        async def nap(for_s: float) -> Run[str]:
            both[:] = [await director.start(sleeps, for_s) for _ in range(2)]
            await falls_asleep(both[1])
            return both[0]

        await until_asleep(nap, 2.0)
        bad, good = both
    where = f"run IN (SELECT no FROM runs WHERE id = '{bad.id}')"
    assert await rows(
        world.path, f"UPDATE journal SET body = '[[\"done\"' WHERE {where} RETURNING run"
    )
    async with world.working(*SERVICES) as director:
        assert await director.get(good.id).result(timeout=30) == "stored after"
        status = await until_status(director.get(bad.id), "stuck")
        assert "cannot be read" in status.reason
        assert "restore the store from a backup, or end the run" in status.reason
        assert await director.result(order, "tea") == ["bought tea", "stored tea", "wrote tea"]
        await director.get(bad.id).kill()
        with pytest.raises(RunFailed, match="killed"):
            await director.get(bad.id).result(timeout=30)


# -- runs of runs ------------------------------------------------------------------------------


@shop.workflow
async def part(what: str, seconds: float = 0) -> str:
    try:
        await asyncio.sleep(seconds)
        return await store(what)
    except asyncio.CancelledError:
        await write("part cancelled")
        raise


@desk.workflow
async def whole() -> list[str]:
    left_alone = await part.start("alone")
    one, two = await asyncio.gather(part("one"), part("two"))
    return [one, two, left_alone.rpartition("/")[2]]


@in_loop
async def test_children_are_awaited_or_left_to_themselves(world: World) -> None:
    """Invariant 4."""
    async with world.working(*SERVICES) as director:
        run = await director.start(whole)
        assert await run.result(timeout=30) == ["stored one", "stored two", "0"]
        assert await director.get(f"{run.id}/0").result(timeout=30) == "stored alone"
        assert names().count("store") == 3


@desk.workflow
async def gives_part_up() -> str:
    try:
        async with asyncio.timeout(0.1):
            return await part("slow", 60)
    except TimeoutError:
        return "given up"


@in_loop
async def test_a_child_that_is_given_up_is_cancelled_with_clean_up(world: World) -> None:
    async with world.working(*SERVICES) as director:
        run = await director.start(gives_part_up)
        assert await run.result(timeout=30) == "given up"
        status = await until_status(director.get(f"{run.id}/1"), "cancelled")
        assert status.status == "cancelled"
        assert names() == ["write"]


@desk.workflow
async def depends() -> str:
    return await part("weak")


@in_loop
async def test_a_failed_child_fails_its_parent_and_a_retry_of_the_parent_does_it_again(
    world: World,
) -> None:
    BROKEN.add("store")
    async with world.working(*SERVICES) as director:
        run = await director.start(depends)
        with pytest.raises(RunFailed, match="store is broken") as caught:
            await run.result(timeout=30)
        assert isinstance(caught.value.__cause__, ValueError)
        BROKEN.clear()
        await run.retry()
        await until_status(run, "completed")
        assert await run.result(timeout=30) == "stored weak"


@desk.workflow
async def counts_down(left: int) -> str:
    await buy(str(left))
    if left:
        continue_as_new(left - 1)
    return run_id()


@in_loop
async def test_a_run_goes_on_as_a_new_one_and_its_handle_follows(world: World) -> None:
    async with world.working(*SERVICES) as director:
        run = await director.start(counts_down, 3, id="down")
        assert await run.result(timeout=30) == "down~4"
        assert names() == ["buy"] * 4
        assert (await director.get("down").status()).status == "continued"
        assert len((await director.get("down~4").history()).entries) == 2


@shop.workflow(receives=[Told])
async def again(left: int) -> str:
    if left:
        continue_as_new(left - 1)
    try:
        return (await receive(Told)).text
    except asyncio.CancelledError:
        await write("again cancelled")
        raise


@desk.workflow
async def awaits_again(seconds: float) -> str:
    try:
        async with asyncio.timeout(seconds):
            return await again(2)
    except TimeoutError:
        return "given up"


@in_loop
async def test_a_child_that_goes_on_as_a_new_run_answers_its_parent(world: World) -> None:
    async with world.working(*SERVICES) as director:
        run = await director.start(awaits_again, 60)
        child = director.get(f"{run.id}/1")

        await until_status(director.get(f"{run.id}/1~3"), "waiting", reason="Told")
        assert (await child.status()).status == "continued"
        await child.send(Told(text="through the old handle"))
        assert await run.result(timeout=30) == "through the old handle"


@in_loop
async def test_a_child_that_went_on_as_a_new_run_is_cancelled_there(world: World) -> None:
    async with world.working(*SERVICES) as director:

        async def cancelled_at(id: str) -> str:
            """Return as which of the runs that it goes on as the child was cancelled."""
            for as_id in (id, f"{id}~2", f"{id}~3"):
                with suppress(UnknownRun):
                    if (await director.get(as_id).status()).status == "cancelled":
                        return as_id
            return ""

        found, seconds = "", 0.5
        while not found.endswith("~3"):  # which it may not be yet if the machine is busy
            run = await director.start(awaits_again, seconds)
            assert await run.result(timeout=60) == "given up"
            found = await until(lambda child=f"{run.id}/1": cancelled_at(child))
            seconds *= 4


@desk.workflow(receives=[Told])
async def hears_in_parts(left: int, heard: list[str]) -> list[str]:
    heard.append((await receive(Told)).text)
    if left:
        await buy(heard[-1])
        continue_as_new(left - 1, heard)
    return heard


@in_loop
async def test_events_follow_a_run_that_goes_on_as_a_new_one(world: World) -> None:
    """Invariant 4: what was accepted for the old run is for the new one."""
    async with world.working(*SERVICES) as director:
        run = await director.start(hears_in_parts, 9, [])
        for number in range(10):
            await run.send(Told(text=str(number)))
        assert sorted(await run.result(timeout=30)) == list("0123456789")


@in_loop
async def test_an_event_that_comes_while_a_mailbox_is_read_for_the_last_time_is_not_lost(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant 4: also if reads are slow, and answer with what was there when they were asked."""
    async with world.working(*SERVICES) as director:
        kind: Any = type(director.client.store)
        read = kind.mail_of

        async def slowly(*key: Any) -> Any:
            mail = await read(*key)
            await asyncio.sleep(0.02)
            return mail

        monkeypatch.setattr(kind, "mail_of", slowly)
        run = await director.start(hears_in_parts, 9, [])
        for number in range(10):
            await run.send(Told(text=str(number)))
            await asyncio.sleep(0.015)
        assert sorted(await run.result(timeout=30)) == list("0123456789")


@desk.workflow(receives=[Told])
async def hears_after_a_journey(left: int, heard: list[str]) -> list[str]:
    await hang(0.1)
    heard.append((await receive(Told)).text)
    if left:
        continue_as_new(left - 1, heard)
    return heard


@in_loop
async def test_an_event_that_finds_its_run_away_is_not_sent_on_once_the_run_has_taken_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant 4: also if where it went is asked so late that it is back, and gone on anew."""
    send_on = Holder._keep_or_send_on  # pyright: ignore[reportPrivateUsage]

    async def late(holder: Holder, message: Message) -> None:
        await asyncio.sleep(1)
        await send_on(holder, message)

    monkeypatch.setattr(Holder, "_keep_or_send_on", late)
    async with world.working(*SERVICES) as director:
        run = await director.start(hears_after_a_journey, 2, [])
        for number in range(2):
            await asyncio.sleep(0.03)
            await run.send(Told(text=str(number)))
        await asyncio.sleep(2)
        await run.send(Told(text="2"))
        assert sorted(await run.result(timeout=30)) == list("012")


@desk.workflow
async def labelled() -> None:
    set_attributes(customer="ann", cents=5)
    await buy("x")
    set_attributes(cents=7, vip=True)
    await store("y")


@in_loop
async def test_attributes_are_found_and_survive_the_journey(world: World) -> None:
    async with world.working(*SERVICES) as director:
        run = await director.start(labelled)
        await run.result(timeout=30)
        await director.result(order, "tea")
        which = RunFilter(attributes=(("customer", "ann"), ("cents", 7)))
        found = await director.client.runs(which)
        assert [status.id for status in found] == [run.id]
        assert found[0].attributes == {"customer": "ann", "cents": 7, "vip": True}


# -- steps -------------------------------------------------------------------------------------

ATTEMPTS: list[Any] = []


@shop.step(retry=Retry(attempts=4, first="5ms"))
async def flaky(until_attempt: int) -> list[Any]:
    info = step_info()
    act("flaky")
    if info.attempt < until_attempt:
        raise ConnectionError("again")
    return [info.service, info.step, info.attempt, info.idempotency_key.partition("#")[2]]


@shop.step(retry=Retry(attempts=0, first="5ms", give_up=(LookupError,)))
async def hopeless() -> None:
    act("hopeless")
    raise KeyError("never")


@shop.step(retry=Retry(attempts=0, first="30ms", factor=1, within="150ms"))
async def hurried() -> None:
    act("hurried")
    raise ConnectionError("slow")


@shop.step(timeout="50ms", retry=Retry(attempts=2, first="1ms"))
async def slow() -> None:
    act("slow")
    assert step_info().deadline is not None
    await asyncio.sleep(30)


@shop.step
def in_a_thread() -> list[Any]:
    act("in_a_thread")
    return [threading.current_thread() is threading.main_thread(), step_info().step]


@shop.step
def runs_out() -> None:
    next(iter(()))


@shop.step(heartbeat="80ms", retry=Retry(attempts=3, first="1ms"))
async def beats() -> Any:
    info = step_info()
    act("beats")
    if info.attempt == 1:
        heartbeat({"at": 3})
        await asyncio.sleep(30)
    return info.heartbeat_details


@shop.step
async def large() -> str:
    return "x" * 2_000_000


@shop.step
async def odd() -> Any:
    act("odd")
    return object()


@desk.workflow
async def calls(name: str, argument: int | None = None) -> Any:
    step: Any = {**shop.steps, **depot.steps}[name]
    return await (step() if argument is None else step(argument))


@in_loop
async def test_a_step_is_retried_with_one_key_and_knows_its_attempt(world: World) -> None:
    """Invariant 1."""
    async with world.working(*SERVICES) as director:
        assert await director.result(calls, "flaky", 3) == ["shop", "flaky", 3, "0"]
        assert DONE == [("flaky", 1), ("flaky", 2), ("flaky", 3)]
        with pytest.raises(RunFailed, match="again"):
            await director.result(calls, "flaky", 9)
        assert len(DONE) == 7


@in_loop
async def test_a_step_whose_row_is_read_while_its_attempt_ends_is_not_done_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant 1: a takeover reads what is due, and resumes what it counted; both may be slow."""
    due = Steps.due

    async def twice(self: Steps, found: Any) -> None:
        await asyncio.gather(due(self, found), due(self, found))

    monkeypatch.setattr(Steps, "due", twice)
    async with world.working(*SERVICES) as director:
        kind: Any = type(director.client.store)
        read, pauses = kind.parked_of, cycle((0.0, 0.05))

        async def slowly(*key: Any) -> Any:
            pause_s = next(pauses)
            rows = await read(*key)
            await asyncio.sleep(pause_s)
            return rows

        monkeypatch.setattr(kind, "parked_of", slowly)
        assert await director.result(calls, "flaky", 3) == ["shop", "flaky", 3, "0"]
        await asyncio.sleep(0.1)
        assert DONE == [("flaky", 1), ("flaky", 2), ("flaky", 3)]


@in_loop
async def test_give_up_and_within_end_retries(world: World) -> None:
    async with world.working(*SERVICES) as director:
        with pytest.raises(RunFailed) as caught:
            await director.result(calls, "hopeless")
        assert isinstance(caught.value.__cause__, KeyError)
        assert names() == ["hopeless"]
        times = 0
        while times < 2:  # a pause of the machine may be longer than the time for retries
            DONE.clear()
            with pytest.raises(RunFailed, match="slow"):
                await director.result(calls, "hurried")
            times = names().count("hurried")
            assert times <= 7


@in_loop
async def test_options_of_one_call_count_wherever_the_step_runs(world: World) -> None:
    """Invariant 8."""

    @desk.workflow(name=f"options-{world.mode}-{world.layout.replace(' ', '-')}")
    async def options() -> str:
        once = flaky.options(retry=Retry(attempts=9, first="1ms", give_up=(ConnectionError,)))
        try:
            await once(5)
        except ConnectionError:
            return "gave up after 1"
        return "went on"

    try:
        async with world.working(*SERVICES) as director:
            assert await director.result(options) == "gave up after 1"
            assert names() == ["flaky"]
    finally:
        del desk.workflows[options.name, 1]


@in_loop
async def test_a_step_that_takes_too_long_is_stopped_and_retried(world: World) -> None:
    async with world.working(*SERVICES) as director:
        with pytest.raises(RunFailed) as caught:
            await director.result(calls, "slow")
        assert isinstance(caught.value.__cause__, StepTimeout)
        assert DONE == [("slow", 1), ("slow", 2)]


@in_loop
async def test_plain_functions_run_in_threads(world: World) -> None:
    async with world.working(*SERVICES) as director:
        assert await director.result(calls, "in_a_thread") == [False, "in_a_thread"]


@in_loop
async def test_a_plain_function_that_raises_stop_iteration_fails_its_run(world: World) -> None:
    """Invariant 11: no future takes one, so it could wait for ever."""
    async with world.working(*SERVICES) as director:
        with pytest.raises(RunFailed, match="StopIteration"):
            await director.result(calls, "runs_out")


@in_loop
async def test_the_next_attempt_sees_what_the_last_one_reported(world: World) -> None:
    async with world.working(*SERVICES) as director:
        assert await director.result(calls, "beats") == {"at": 3}
        assert DONE == [("beats", 1), ("beats", 2)]


@in_loop
async def test_a_result_that_is_too_large_or_has_no_form_fails_at_once(world: World) -> None:
    """Invariant 11."""
    async with world.working(*SERVICES) as director:
        for name, error in (("large", TooLarge), ("odd", NotEncodable)):
            with pytest.raises(RunFailed) as caught:
                await director.result(calls, name)
            assert isinstance(caught.value.__cause__, error)
        assert names() == ["odd"]
        with pytest.raises(TooLarge, match="Nothing was written"):
            await director.start(order, "x" * 2_000_000)
        with pytest.raises(BadArguments):
            await director.start(order, 5)


# -- upkeep ------------------------------------------------------------------------------------


RUNS = 10


def executions() -> int:
    return sum(isinstance(thing, Execution) for thing in gc.get_objects())


@in_loop
async def test_runs_that_ended_leave_nothing_to_the_garbage_collector(world: World) -> None:
    """With a cycle in each, collecting took a tenth of the time at load."""
    async with world.working(*SERVICES) as director:
        gc.collect()
        gc.disable()
        before = executions()

        async def hardly_any_left() -> bool:
            return executions() <= before + RUNS / 10

        try:
            for _ in range(RUNS):
                await (await director.start(order, "tea")).result(timeout=30)
            await until(hardly_any_left)
        finally:
            gc.enable()


@in_loop
async def test_ended_runs_are_pruned_after_their_retention_and_live_ones_stay(
    world: World,
) -> None:
    async with world.working(*SERVICES, retention_s=0.2) as director:
        live = await director.start(sleeps, 3600)
        ended = await director.start(order, "tea")
        await until_status(live, "waiting", reason="timer")

        async def has_written() -> bool:
            return "write" in names()

        await until(has_written)

        async def gone() -> bool:
            left = [await rows(world.path, f"{sql} = '{ended.id}'") for sql in WHAT_IS_LEFT]
            found = [status.id for status in await director.client.runs(RunFilter())]
            return left == [[], [], []] and found == [live.id]

        await until(gone)
        assert (await live.status()).status == "waiting"


WHAT_IS_LEFT = (
    "SELECT no FROM runs WHERE service = home AND id",
    "SELECT id FROM mailbox WHERE run",
    "SELECT id FROM parked WHERE run",
)


@in_loop
async def test_only_who_takes_something_over_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pavane.node")
    world = World(tmp_path / "world.db", "orchestration", "one node")
    for hosted, said in (("other", []), ("shop", ["taking over from gone"])):
        async with world.idle(Service("shop")) as director:
            await director.client.store.join("gone", "elsewhere", 1, [hosted], 1)
        caplog.clear()
        async with world.working(Service("shop")):
            pass
        told = [record.getMessage() for record in caplog.records]
        assert [text for text in told if text.startswith("taking over")] == said


@in_loop
async def test_an_app_may_be_made_before_its_services_declare_anything(tmp_path: Path) -> None:
    """Whatever stands below the app was left out, but for steps: nobody handled such events."""
    shop = Service("shop")
    app = App("shop", [shop], store=str(tmp_path / "shop.db"))
    handled: list[str] = []

    class Rung(Event):
        by: str

    @shop.step(limit=Limit(concurrency=1))
    async def greet(name: str) -> str:
        return f"good day, {name}"

    @shop.workflow
    async def serve(name: str) -> str:
        await shop.publish(Rung(by=name))
        return await greet(name)

    @shop.on(Rung)
    async def note(event: Rung) -> None:
        handled.append(event.by)

    app.schedule("0 9 * * *", serve, "nobody")
    async with app:
        assert await (await app.start(serve, "ann")).result(timeout=20) == "good day, ann"

        async def is_handled() -> bool:
            return handled == ["ann"]

        await until(is_handled)

        @shop.workflow
        async def late() -> None: ...

        with pytest.raises(UnknownName, match="declared after this app was opened"):
            await app.start(late)


def test_a_filter_of_runs_that_would_find_none_says_what_it_must_be() -> None:
    with pytest.raises(BadArguments, match=r"status='stuck' must be a tuple, as \('stuck',\)"):
        RunFilter(status="stuck")  # pyright: ignore
    with pytest.raises(BadArguments, match=r"must be pairs, as \(\('customer', 'c-1'\),\)"):
        RunFilter(attributes={"customer": "c-1"})  # pyright: ignore
