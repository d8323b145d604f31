"""How sessions of a node end, and begin again, on real stores."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

import pytest

from pavane import (
    App,
    BadArguments,
    Client,
    EngineConfig,
    LeaseLost,
    Retry,
    RunFilter,
    Service,
    StoreError,
    UnknownName,
    step_info,
)
from pavane.engine import session as session_module
from pavane.engine.session import LOOK_ROUND, Session, tell_nodes
from pavane.engine.steps import NotHere
from pavane.stores.port import Message
from pavane.workflow import Workflow
from tests.integration.world import PATIENT_S, Place, in_loop, rows, until, until_status

PATIENT = EngineConfig(lease_s=PATIENT_S, grace_s=600)
"""For nodes of which none is to be given up, nor a step that a test lets run."""


def inn(begun: asyncio.Queue[str], may_end: asyncio.Event) -> tuple[Service, Workflow[[str], str]]:
    """A service with steps that take long, and short ones."""
    service = Service("inn")

    @service.step
    async def cook(dish: str) -> None:
        begun.put_nowait(dish)
        if dish == "roast":
            await may_end.wait()

    @service.workflow
    async def dine(dish: str) -> str:
        await cook(dish)
        return dish

    return service, dine


def session_of(worker: Client) -> Session:
    assert worker.node is not None
    assert worker.node.session is not None
    return worker.node.session


async def rejoined(worker: Client, before: Session) -> Session:
    async def joined() -> Any:
        node = worker.node
        is_new = node is not None and node.session not in (None, before)
        return is_new and session_of(worker)

    return await until(joined, "the next session")


@in_loop
async def test_a_step_that_takes_long_holds_up_no_other_partition(place: Place) -> None:
    """A node that joins has its share, and one that drains gives it, while a step is running."""
    begun, may_end = asyncio.Queue[str](), asyncio.Event()
    service, dine = inn(begun, may_end)
    apps = [App("inn", [service], store=str(place), config=PATIENT) for _ in range(2)]
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(apps[0].worker())
        roast = await first.start(dine, "roast", id="roast")
        assert await begun.get() == "roast"
        second = await stack.enter_async_context(apps[1].worker())

        async def is_shared() -> bool:
            return len(session_of(second).owned) >= 15

        await until(is_shared, "a share of the second worker")
        assert not may_end.is_set()

        leaving = asyncio.create_task(session_of(first).drain())

        async def is_left() -> bool:
            return len(session_of(second).owned) == 31

        await until(is_left, "all but the partition in which the step is running")
        soup = await second.start(dine, "soup", id="soup")
        assert await soup.result(timeout=30) == "soup"
        may_end.set()
        await leaving
        assert await roast.result(timeout=30) == "roast"
    dishes = [begun.get_nowait() for _ in range(begun.qsize())]
    assert dishes.count("roast") == 0, "it was done once"


@in_loop
async def test_a_node_that_joins_or_leaves_moves_its_own_share_only(place: Place) -> None:
    services = [Service("inn"), Service("stable")]
    even = {3: [20, 22, 22], 4: [16, 16, 16, 16]}

    async def shared_by(workers: list[Client]) -> dict[tuple[str, int], int | None]:
        hosts = {session_of(worker).fence.node for worker in workers}

        async def is_shared() -> dict[tuple[str, int], int | None]:
            rows = await workers[0].store.partition_rows(["inn", "stable"])
            owners = {(row.service, row.partition): row.owner for row in rows}
            counts = Counter(owners.values())
            are_shared = set(counts) == hosts and sorted(counts.values()) == even[len(hosts)]
            as_one = all(owners["inn", at] == owners["stable", at] for at in range(32))
            return owners if are_shared and as_one else {}

        return await until(is_shared, "even shares, of both services as of one")

    async with AsyncExitStack() as stack:
        apps = [App("inn", services, store=str(place), config=PATIENT) for _ in range(4)]
        three = [await stack.enter_async_context(app.worker()) for app in apps[:3]]
        before = await shared_by(three)
        async with apps[3].worker() as fourth:
            between = await shared_by([*three, fourth])
            moved = {at for at, owner in between.items() if owner != before[at]}
            assert {between[at] for at in moved} == {session_of(fourth).fence.node}
        after = await shared_by(three)
        assert {at for at, owner in after.items() if owner != between[at]} == moved


@in_loop
async def test_a_node_reads_of_the_log_only_what_concerns_it(place: Place) -> None:
    begun, may_end = asyncio.Queue[str](), asyncio.Event()
    service, dine = inn(begun, may_end)
    garage = App("garage", [Service("garage")], store=str(place))
    async with App("inn", [service], store=str(place)).worker() as busy, garage.worker() as other:
        read: list[Message] = []
        read_log = other.store.read_log

        async def noted(*query: Any) -> list[Message]:
            messages = await read_log(*query)
            read.extend(messages)
            return messages

        other.store.read_log = noted
        for number in range(10):
            await (await busy.start(dine, "soup", id=f"{number}")).result(timeout=30)
        await tell_nodes(busy.store)
        head = await busy.store.log_head()

        async def is_read() -> bool:
            return other.store.tail >= head

        await until(is_read, "the end of the log")
        assert {message.kind for message in read} == {LOOK_ROUND}


@in_loop
async def test_what_comes_while_a_partition_is_taken_up_is_read(place: Place) -> None:
    """It is above the end of the log when that begins, and read when nobody asks for it yet."""
    service, dine = inn(asyncio.Queue(), asyncio.Event())
    app = App("inn", [service], store=str(place))
    async with app.worker() as worker, app.connect() as client:
        session, store = session_of(worker), worker.store
        target = store.target_of("inn", "soup")
        rows = await store.partition_rows(["inn"])
        await session._hand_over([row for row in rows if row.target == target])
        claimed = await store.claim(session.fence, [target])
        is_missed = asyncio.Event()
        log_head, read_log = store.log_head, store.read_log
        taking_up = asyncio.current_task()

        async def log_head_before() -> int:
            head = await log_head()
            if asyncio.current_task() is taking_up and not is_missed.is_set():
                await client.start(dine, "soup", id="soup")
                await is_missed.wait()
            return head

        async def read_without(*query: Any) -> list[Message]:
            messages = await read_log(*query)
            if target not in query[2] and query[1] == await log_head() > before:
                is_missed.set()
                while target not in session._floors:
                    await asyncio.sleep(0)
            return messages

        before = await log_head()
        store.log_head, store.read_log = log_head_before, read_without
        await session._own(claimed)
        assert await client.get("soup").result(timeout=30) == "soup"


@in_loop
async def test_partitions_with_long_steps_are_served_on_until_these_end(place: Place) -> None:
    begun, may_end = asyncio.Queue[str](), asyncio.Event()
    service, dine = inn(begun, may_end)
    config = EngineConfig(lease_s=PATIENT_S, grace_s=0)
    async with App("inn", [service], store=str(place), config=config).worker() as first:
        roasts = [await first.start(dine, "roast", id=f"roast-{n}") for n in range(4)]
        busy = {first.store.target_of("inn", run.id) for run in roasts}
        for _ in roasts:
            assert await begun.get() == "roast"
        async with App("inn", [service], store=str(place), config=config).worker() as second:

            async def is_shared() -> bool:
                return len(session_of(second).owned) >= 16 - len(busy)

            await until(is_shared, "a share of the second worker")
            soup = [await first.start(dine, "soup", id=f"soup-{n}") for n in range(64)]
            assert busy <= {first.store.target_of("inn", run.id) for run in soup}
            await asyncio.gather(*(run.result(timeout=30) for run in soup))
            may_end.set()
            await asyncio.gather(*(run.result(timeout=30) for run in roasts))

            async def is_even() -> bool:
                return len(session_of(second).owned) == 16

            await until(is_even, "what was served on until its steps ended")
        cooked = [begun.get_nowait() for _ in range(begun.qsize())]
        assert "roast" not in cooked, "none was cancelled and done once more"


@in_loop
async def test_a_node_that_waits_for_a_step_before_it_hands_over_takes_up_what_is_free(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "LINGER_US", 0)
    monkeypatch.setattr(session_module, "LOOK_S", 3600.0)  # by itself it looks too late
    begun, may_end = asyncio.Queue[str](), asyncio.Event()
    service, dine = inn(begun, may_end)
    apps = [App("inn", [service], store=str(place), config=PATIENT) for _ in range(2)]
    async with apps[0].worker() as first:
        roasts = [await first.start(dine, "roast", id=f"roast-{n}") for n in range(4)]
        for _ in roasts:
            assert await begun.get() == "roast"
        async with apps[1].worker() as second:

            async def is_shared() -> bool:
                return len(session_of(second).owned) >= 12

            await until(is_shared, "a share of the second worker")
            assert session_of(first).draining, "it waits for a step"

        async def is_taken_up() -> bool:
            rows = await first.store.partition_rows(["inn"])
            return {row.owner for row in rows} == {session_of(first).fence.node}

        await until(is_taken_up, "what the second worker left")
        soup = [await first.start(dine, "soup", id=f"soup-{n}") for n in range(16)]
        left = session_of(first).draining
        for run in soup:
            if first.store.target_of("inn", run.id) not in left:
                assert await run.result(timeout=30) == "soup"
        may_end.set()
        for run in [*roasts, *soup]:
            await run.result(timeout=60)  # what was handed over is taken back at once


@in_loop
async def test_what_nobody_foresaw_counts_as_a_death(place: Place) -> None:
    """Invariant 11: a run that breaks the engine is quarantined as one that ends processes."""
    begun = asyncio.Queue[str]()
    service, dine = inn(begun, asyncio.Event())
    config = EngineConfig(lease_s=0.2)
    async with App("inn", [service], store=str(place), config=config).worker() as worker:
        run = await worker.start(dine, "roast")
        for _ in range(worker.node._config.deaths_max if worker.node else 0):
            await begun.get()
            session = session_of(worker)
            session.failed(ValueError("nobody foresaw this"))
            await rejoined(worker, session)
        await until_status(run, "stuck", reason="Quarantined")
        await run.kill()


@in_loop
async def test_sessions_that_do_not_last_begin_with_growing_pauses(place: Place) -> None:
    loop = asyncio.get_running_loop()
    service, _ = inn(asyncio.Queue(), asyncio.Event())
    async with App("inn", [service], store=str(place), config=PATIENT).worker() as worker:
        pauses: list[float] = []
        for _ in range(5):
            session = session_of(worker)
            session.lost(StoreError("The test takes the store away."))
            began_s = loop.time()
            await rejoined(worker, session)
            pauses.append(loop.time() - began_s)
    assert all(
        pause >= least for pause, least in zip(pauses, (0, 0.05, 0.1, 0.2, 0.4), strict=True)
    )


@in_loop
async def test_a_node_that_differs_from_its_store_in_what_it_owns_joins_anew(place: Place) -> None:
    """As after a crash of a server that had not written down who owns what."""
    service, dine = inn(asyncio.Queue(), asyncio.Event())
    async with App("inn", [service], store=str(place)).worker() as worker:
        session = session_of(worker)
        await rows(place, "UPDATE partitions SET owner = NULL WHERE partition < 9 RETURNING 1")
        for _ in range(2):
            await session.balance()
        await rejoined(worker, session)
        assert await (await worker.start(dine, "soup")).result() == "soup"

        async def owns_all() -> bool:
            return len(session_of(worker).owned) == 32

        await until(owns_all, "all partitions")


@in_loop
async def test_a_session_that_loses_its_lease_says_so_without_traces(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """As by a process that was frozen: it is no fault in the code, and must alarm nobody."""

    async def write_too_late() -> None:
        raise LeaseLost("It was silent for too long.")

    service, dine = inn(asyncio.Queue(), asyncio.Event())
    async with App("inn", [service], store=str(place)).worker() as worker:
        session = session_of(worker)
        for _ in range(3):
            session.holder._spawn(write_too_late())
        await rejoined(worker, session)
        assert await (await worker.start(dine, "soup")).result(timeout=30) == "soup"
    told = [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert [record.levelname for record in told] == ["WARNING"]
    assert "It was silent for too long." in told[0].getMessage()
    assert not told[0].exc_info


@in_loop
async def test_what_failed_here_is_not_said_to_be_tried_again_if_it_is_another_s_by_now(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """As by a process that was frozen: heartbeats are missed by the time it comes back."""
    caplog.set_level(logging.INFO)
    kitchen, begun, failing = Service("kitchen"), asyncio.Event(), asyncio.Event()

    @kitchen.step(retry=Retry(attempts=2, first="10ms"))
    async def cook(dish: str) -> str:
        if step_info().attempt == 1:
            begun.set()
            await failing.wait()
            raise ConnectionError("the stove is cold")
        return dish

    @kitchen.workflow
    async def serve(dish: str) -> str:
        return await cook(dish)

    async with App("inn", [kitchen], store=str(place)).worker() as worker:
        run = await worker.start(serve, "soup")
        await begun.wait()
        session = session_of(worker)
        await worker.store.leave(session.fence, [])
        failing.set()
        await rejoined(worker, session)
        assert await run.result(timeout=30) == "soup"
    told = [record for record in caplog.records if "next in" in record.getMessage()]
    assert len(told) == 1, "by the session that has it"


@pytest.mark.parametrize("unfit", ["a\0b", "a\ud800b"], ids=["NUL", "surrogate"])
@in_loop
async def test_what_no_id_can_be_is_refused_and_says_nothing_of_the_store(
    place: Place, unfit: str
) -> None:
    async with App("inn", [Service("inn")], store=str(place)).connect() as client:
        with pytest.raises(BadArguments, match="No run can be called 'a"):
            client.get(unfit)
        with pytest.raises(BadArguments, match="Nothing can be called 'a"):
            await client.runs(RunFilter(id_prefix=unfit))
        with pytest.raises(
            (UnknownName, BadArguments), match=r"nothing is called that|No event has the id"
        ):
            await client.events.get(unfit)


@in_loop
async def test_a_step_that_the_code_of_its_node_does_not_have_waits_for_one_that_has_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant 3: while workers are exchanged one by one, no run fails of it."""
    monkeypatch.setattr(NotHere, "pause_s", 0.05)
    hall, old_kitchen, kitchen = Service("hall"), Service("kitchen"), Service("kitchen")

    @kitchen.step
    async def bake(dish: str) -> str:
        return f"baked {dish} {step_info().attempt}"

    @hall.workflow
    async def serve(dish: str) -> str:
        return await bake(dish)

    before = App("inn", [old_kitchen], store=str(place))
    after = App("inn", [hall, kitchen], store=str(place))
    async with after.worker(["hall"]) as worker:
        async with before.worker():
            run = await worker.start(serve, "pie")

            async def put_off() -> Any:
                parked = (await run.history()).parked
                return [row for row in parked if b"no step 'bake' in the code" in row.error]

            await until(put_off, "the step that is put off")
        async with after.worker(["kitchen"]):
            assert await run.result(timeout=30) == "baked pie 1"


@in_loop
async def test_a_parameter_that_is_added_fails_nothing_while_workers_are_exchanged(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant 3. Its default is written down with the call, which old code cannot read."""
    monkeypatch.setattr(NotHere, "pause_s", 0.05)
    hall, old_kitchen, kitchen = Service("hall"), Service("kitchen"), Service("kitchen")

    @old_kitchen.step(name="bake")
    async def bake_as_before(dish: str) -> str:
        return f"burnt {dish}"

    @old_kitchen.workflow(name="grill")
    async def grill_as_before(dish: str) -> str:
        return f"burnt {dish}"

    @kitchen.step
    async def bake(dish: str, degrees: int = 180) -> str:
        return f"baked {dish} at {degrees}, {step_info().attempt}"

    @kitchen.workflow
    async def grill(dish: str, minutes: int = 5) -> str:
        return f"grilled {dish} for {minutes}"

    @hall.workflow
    async def serve(dish: str) -> str:
        return await bake(dish)

    before = App("inn", [old_kitchen], store=str(place))
    after = App("inn", [hall, kitchen], store=str(place))
    async with after.worker(["hall"]) as worker:
        async with before.worker():
            baked, grilled = await worker.start(serve, "pie"), await worker.start(grill, "fish")
            await until_status(grilled, "stuck", reason="2 arguments are stored for `grill_as_")

            async def put_off() -> Any:
                parked = (await baked.history()).parked
                return [row for row in parked if b"2 arguments are stored for" in row.error]

            await until(put_off, "the step that is put off")
        async with after.worker(["kitchen"]):
            assert await baked.result(timeout=30) == "baked pie at 180, 1"
            assert await grilled.result(timeout=30) == "grilled fish for 5"


@in_loop
async def test_the_name_of_a_node_does_not_grow_with_its_services(place: Place) -> None:
    services = [Service(f"s{number}") for number in range(7)]
    async with App("inn", services[:5], store=str(place)).worker() as worker:
        (node,) = await worker.nodes.list()
        assert node.name.startswith("s0+s1+s2+s3+s4-")
    async with App("inn", services, store=str(place)).worker() as worker:
        (node,) = await worker.nodes.list()
        assert node.name.startswith("s0+s1+s2+s3+3-more-")
