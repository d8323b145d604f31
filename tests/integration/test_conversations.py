"""Conversations on a real SQLite file: contracts, and the monitor that watches them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pavane import (
    App,
    BadDeclaration,
    Client,
    ConversationOverdue,
    EngineConfig,
    Event,
    Retry,
    Service,
    UnknownName,
    continue_as_new,
    receive,
)
from pavane.core.baton import Header
from pavane.engine.duties import MARK
from pavane.engine.held import blank_row, decode_header
from pavane.errors import PavaneError
from pavane.observe import monitor
from pavane.observe.conversations import ConversationStatus
from pavane.observe.monitor import Monitor
from pavane.stores.eventlog import ConversationFilter, ConversationRow, EventFilter, EventRow
from pavane.stores.port import Commit, durable, submit_alone
from tests.integration import watchers
from tests.integration.fleet import ROOT
from tests.integration.world import PATIENT_S, in_loop, until, until_status

pay, ship, orders, desk = Service("pay"), Service("ship"), Service("orders"), Service("desk")
SERVICES = (pay, ship, orders, desk)
TOLD: list[ConversationOverdue] = []
BROKEN: set[str] = set()


class Placed(Event, key="id"):
    id: str


class Paid(Event, key="id"):
    id: str


class Shipped(Event, key="id"):
    id: str


class Cancelled(Event, key="id"):
    id: str


@pay.on(Placed)
async def charge(event: Placed) -> Paid | None:
    return None if event.id.startswith("silent") else Paid(id=event.id)


@ship.on(Paid, retry=Retry(attempts=1), breaker=None)
async def send(event: Paid) -> list[Shipped]:
    if event.id.startswith("dead") or "send" in BROKEN:
        raise ValueError("no van")
    while event.id in BROKEN:
        await asyncio.sleep(0.005)
    return [Shipped(id=event.id)] * (2 if event.id.startswith("twice") else 1)


@desk.on(ConversationOverdue)
async def alarm(event: ConversationOverdue) -> Cancelled | None:
    TOLD.append(event)
    return Cancelled(id=event.subject) if event.subject.startswith("dead-give-up") else None


@orders.step
async def pack(id: str) -> str:
    if "pack" in BROKEN:
        raise ValueError("no box")
    return id


@orders.workflow(receives=[ConversationOverdue, Paid])
async def fulfil(id: str) -> str:
    """Wait for what never comes, until told that it is late."""
    await pack(id)
    overdue = await receive(ConversationOverdue, key=id)
    await orders.publish(Cancelled(id=id))
    return overdue.contract


@pay.step
async def bill(id: str) -> None: ...


@orders.workflow
async def billed(id: str) -> None:
    await bill(id)
    await orders.publish(Cancelled(id=id))


@orders.workflow
async def family(id: str) -> None:
    await child(id)
    await child.start(id)


@orders.workflow
async def child(id: str) -> None:
    await orders.publish(Paid(id=id))


@orders.workflow
async def again(count: int) -> None:
    await orders.publish(Cancelled(id=str(count)))
    if count:
        continue_as_new(count - 1)


@orders.workflow(starts_on=Cancelled)
async def refund(event: Cancelled) -> None:
    await pack(event.id)


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    TOLD.clear()
    BROKEN.clear()
    monkeypatch.setattr(monitor, "POLL_S", 0.01)
    monkeypatch.setattr(monitor, "MARGIN_US", 0)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "shop.db")


def app_on(
    path: str, within: str = "1h", *, watched: bool = True, services: Sequence[Service] = SERVICES,
    **options: Any,
) -> App:  # fmt: skip
    app = App("shop", services, store=path, config=EngineConfig(lease_s=PATIENT_S))
    if watched:
        given = {"start": Placed, "ends": [Shipped, Cancelled], "name": "sales", **options}
        app.conversation(within=within, **given)
    return app


async def publish(client: Client, *events: Event) -> None:
    for event in events:
        id = f"{type(event).__name__}-{event.id}" if not isinstance(event, Placed) else event.id  # type: ignore
        await client.publish(event, source="test", id=id)


async def in_state(client: Client, id: str, *states: str, contract: str = "sales") -> Any:
    """Wait until the conversation is in one of these states, and return how it stands."""

    async def reached() -> ConversationStatus | None:
        for status in await client.conversations.list(contract=contract):
            if status.id == id and status.state in states:
                return status
        return None

    return await until(reached, f"{id} to be {states}")


# -- states ------------------------------------------------------------------------------------


@in_loop
async def test_a_conversation_that_ends_within_its_time_is_on_time(path: str) -> None:
    async with app_on(path).worker() as client:
        await publish(client, Placed(id="o-1"))
        status = await in_state(client, "o-1", "on-time")
    assert (status.contract, status.key, status.end, status.ends) == ("sales", "o-1", "Shipped", 1)
    assert status.started_us < status.ended_us <= status.due_us
    assert status.trouble is None


@in_loop
async def test_one_that_has_not_ended_yet_is_open(path: str) -> None:
    async with app_on(path).worker() as client:
        await publish(client, Placed(id="silent"))
        status = await in_state(client, "silent", "open")
    assert (status.ended_us, status.last) == (None, "Placed")


@in_loop
async def test_one_that_ends_after_its_time_is_overdue_and_then_late(path: str) -> None:
    BROKEN.add("slow")
    async with app_on(path, "300ms").worker() as client:
        await publish(client, Placed(id="slow"))
        status = await in_state(client, "slow", "overdue", "stuck")
        assert status.raised or status.ended_us is None
        BROKEN.clear()
        status = await in_state(client, "slow", "late")
    assert status.ended_us > status.due_us


@in_loop
async def test_a_dead_letter_makes_it_stuck_and_says_where(path: str) -> None:
    await known(path, "200ms")
    async with app_on(path, watched=False).worker() as client:
        await publish(client, Placed(id="dead"))
        await until(client.dead.list, "a dead letter")
    async with app_on(path, "200ms").worker() as client:
        status = await in_state(client, "dead", "stuck")
        (grave,) = status.trouble.dead
        assert (grave.handler, grave.type, grave.error) == (
            "ship.send",
            "Paid",
            "ValueError: no van",
        )
        assert status.trouble.last == "Paid"
        assert "ship.send gave up Paid" in status.trouble.sentence


@in_loop
async def test_the_consumer_expected_next_is_told_with_its_backlog_dead_letters_and_pause(
    path: str,
) -> None:
    async with app_on(path, "200ms").worker() as client:
        await publish(client, Placed(id="dead-0"))
        await until(client.dead.list, "a dead letter")
        (no,) = [row.no for row in await client.store.handler_rows() if row.name == "send"]
    async with app_on(path, "200ms").worker(["pay", "desk", "orders"]) as client:
        await client.store.pause_handler(no, 2**62, "stocktaking")
        await publish(client, Placed(id="o-1"), Placed(id="o-2"))
        await until(lambda: counted(client, "Paid", 3))
        status = await in_state(client, "o-1", "stuck")
        (expected,) = status.trouble.expected
        assert (expected.name, expected.waits_for) == ("ship.send", "Paid")
        assert (expected.backlog, expected.dead) == (2, 1)
        assert (expected.paused, expected.idle) == ("stocktaking", ["ship"])
        assert "(no node hosts ship, 2 in its backlog, 1 dead letter)" in status.trouble.sentence
        assert status.trouble.last == "Paid"


@pytest.mark.parametrize("mode", ["orchestration", "choreography"])
@in_loop
async def test_a_run_that_needs_a_service_that_no_node_hosts_is_stuck_and_says_so(
    path: str, mode: Any
) -> None:
    app = app_on(path, "200ms", start=billed, ends=[Cancelled])
    async with app.worker(["orders", "desk"]) as client:
        await client.start(billed, "b", id="b", mode=mode)
        status = await in_state(client, "b", "stuck")
        assert status.trouble.sentence == "run b waits for pay (no node hosts pay)"
        await until(lambda: told(1))
    assert (TOLD[0].last, TOLD[0].trouble) == ("the start of billed", status.trouble.sentence)


@in_loop
async def test_a_stuck_run_makes_it_stuck(path: str) -> None:
    app = app_on(path, "200ms", start=fulfil, ends=[Cancelled])
    async with app.worker() as client:
        BROKEN.add("pack")
        run = await client.start(fulfil, "r", id="r")
        await until_status(run, "failed")
        status = await in_state(client, "r", "stuck")
        (failed,) = status.trouble.failed
        assert (failed.run, failed.reason) == ("r", "ValueError: no box")


@in_loop
async def test_a_run_that_waits_for_an_event_is_what_it_is_stuck_at(path: str) -> None:
    @orders_only.workflow(receives=[Paid])
    async def wait(id: str) -> None:
        await receive(Paid, key=id)

    app = App("shop", [orders_only], store=path)
    app.conversation(start=wait, ends=[Shipped], within="200ms")
    async with app.worker() as client:
        await client.start(wait, "r", id="r")
        status = await in_state(client, "r", "stuck", contract="wait")
        (expected,) = status.trouble.expected
        assert (expected.what, expected.name) == ("run", "r")
        assert expected.waits_for == "event Paid of r"


orders_only = Service("orders")


@in_loop
async def test_a_second_end_is_told(path: str) -> None:
    async with app_on(path).worker() as client:
        await publish(client, Placed(id="twice"))
        status = await in_state(client, "twice", "twice")
    assert (status.ends, status.end) == (2, "Shipped")


@in_loop
async def test_milestones_are_reached_late_or_missed(path: str) -> None:
    app = app_on(path, milestones={Paid: "30m", Cancelled: None}, ends=[Shipped])
    async with app.worker() as client:
        await publish(client, Placed(id="o-1"))
        status = await in_state(client, "o-1", "on-time")
    states = {passed.type: passed.state for passed in status.milestones}
    assert states == {"Paid": "reached", "Cancelled": "missed"}


@in_loop
async def test_conversations_are_listed_by_state_and_contract(path: str) -> None:
    app = app_on(path)
    app.conversation(start=Paid, ends=[Cancelled], within="1h", name="other")
    async with app.worker() as client:
        await publish(client, Placed(id="o-1"), Placed(id="silent"))
        await in_state(client, "o-1", "on-time")
        await in_state(client, "o-1", "open", contract="other")
        await in_state(client, "silent", "open")

        async def ids(**which: Any) -> list[tuple[str, str]]:
            found = await client.conversations.list(**which)
            return sorted((status.contract, status.id) for status in found)

        assert await ids(state="on-time") == [("sales", "o-1")]
        assert await ids(contract="sales", state="open") == [("sales", "silent")]
        assert await ids(state="stuck") == []
        assert len(await ids(limit=2)) == 2


# -- what carries conversation and cause ---------------------------------------------------------


async def header_of(client: Client, run: str) -> Header:
    return decode_header((await client.home_row(run)).header)


@in_loop
async def test_children_carry_the_conversation_and_their_parent_as_the_cause(path: str) -> None:
    async with app_on(path, watched=False).worker() as client:
        run = await client.start(family, "f", id="f")
        await run.result(timeout=30)
        for kid in ("f/0", "f/1"):
            await until(lambda kid=kid: ended(client, kid))
            header = await header_of(client, kid)
            assert (header.conversation, header.cause) == ("f", "f")
        events = await client.store.find_events(EventFilter(conversation="f", types=("Paid",)))
        assert sorted(event.cause for event in events) == ["f/0", "f/1"]


async def ended(client: Client, run: str) -> bool:
    row = await client.store.run_row("orders", run)
    return row is not None and row.ended_us is not None


@in_loop
async def test_a_continued_run_and_all_it_causes_stay_in_the_conversation(path: str) -> None:
    async with app_on(path, watched=False).worker() as client:
        run = await client.start(again, 2, id="a")
        await run.result(timeout=30)
        assert (await header_of(client, "a~3")).cause == "a~2"
        runs = await client.store.runs_in("a")
        assert {"a", "a~2", "a~3"} <= set(runs)
        events = await client.store.find_events(EventFilter(conversation="a"))
        assert {event.cause for event in events} == {"a", "a~2", "a~3"}
        refunds = await until(lambda: three_refunds(client))
        headers = [await header_of(client, id) for id in refunds]
        assert {header.conversation for header in headers} == {"a"}
        assert {header.cause for header in headers} == {event.id for event in events}


async def three_refunds(client: Client) -> list[str]:
    runs = await client.store.runs_in("a")
    found = [run for run in runs if not run.startswith(("a~", "a/")) and run != "a"]
    return found if len(found) == 3 else []


@in_loop
async def test_a_fork_stays_in_the_conversation_of_what_it_was_forked_from(path: str) -> None:
    async with app_on(path, watched=False).worker() as client:
        run = await client.start(refund, Cancelled(id="x"), id="r")
        await run.result(timeout=30)
        await (await run.fork("pack", id="r-2")).result(timeout=30)
        header = await header_of(client, "r-2")
        assert (header.conversation, header.cause) == ("r", "r")
        assert await client.store.runs_in("r") == ["r", "r-2"]


@in_loop
async def test_any_event_or_run_leads_to_its_conversation(path: str) -> None:
    async with app_on(path, watched=False).worker() as client:
        await publish(client, Placed(id="o-1"))
        run = await client.start(family, "f", id="f")
        await run.result(timeout=30)
        shipped = await until(lambda: first_event(client, "Shipped", "o-1"))
        assert (await client.conversations.show(shipped.id)).id == "o-1"
        assert (await client.conversations.show("f/0")).id == "f"
        found = await client.conversations.show("o-1")
        assert [event.type for event in found.traffic.events] == ["Placed", "Paid", "Shipped"]
        assert found.contracts == []
        with pytest.raises(UnknownName, match="No conversation, event or run is called 'nothing'"):
            await client.conversations.show("nothing")


async def first_event(client: Client, type: str, conversation: str) -> EventRow | None:
    which = EventFilter(types=(type,), conversation=conversation)
    return next(iter(await client.store.find_events(which)), None)


@in_loop
async def test_runs_that_begin_no_contract_tell_nothing_in_the_log(path: str) -> None:
    app = app_on(path, start=fulfil, ends=[Cancelled])
    async with app.worker() as client:
        await (await client.start(refund, Cancelled(id="x"), id="r")).result(timeout=30)
        await client.start(fulfil, "f", id="f")
        await in_state(client, "f", "open")
        types = {type for type, _, _ in await client.store.event_types()}
    assert types == {"~start-fulfil"}


# -- what others make of it ----------------------------------------------------------------------


@in_loop
async def test_a_handler_sees_that_a_conversation_is_overdue_once(path: str) -> None:
    await known(path, "200ms")
    async with app_on(path, watched=False).worker() as client:
        await publish(client, Placed(id="silent"))
        await until(lambda: charged(client))
    async with app_on(path, "200ms", milestones=[Paid]).worker() as client:
        await until(lambda: told(1))
        (event,) = TOLD
        assert (event.contract, event.conversation, event.subject) == ("sales", "silent", "silent")
        assert (event.last, event.missing) == ("Placed", ["Paid"])
        assert event.trouble == "nothing reacts to Placed"
        assert (event.due - event.started).total_seconds() == 0.2
        row = await until(lambda: first_event(client, "ConversationOverdue", "silent"))
        assert row.cause == "silent"
    async with app_on(path, "200ms").worker() as client:
        await publish(client, Placed(id="silent-2"))
        await until(lambda: told(2))
    assert [event.conversation for event in TOLD] == ["silent", "silent-2"]


async def known(path: str, within: str) -> None:
    """Let the store know the contract: what happens from here on is watched, soon or late."""
    async with app_on(path, within).connect():
        pass


async def charged(client: Client) -> bool:
    """Tell whether nobody is to be charged any more."""
    return all(one.backlog == 0 for one in await client.handlers.list() if one.name == "charge")


async def told(count: int) -> bool:
    return len(TOLD) >= count


@in_loop
async def test_a_handler_can_end_what_is_overdue(path: str) -> None:
    async with app_on(path, "200ms").worker() as client:
        await publish(client, Placed(id="dead-give-up"))
        status = await in_state(client, "dead-give-up", "late")
    assert status.end == "Cancelled"


@in_loop
async def test_a_workflow_receives_that_its_conversation_is_overdue(path: str) -> None:
    app = app_on(path, "200ms", start=fulfil, ends=[Cancelled], name="fulfilment")
    async with app.worker() as client:
        run = await client.start(fulfil, "f-1", id="f-1")
        assert await run.result(timeout=30) == "fulfilment"
        status = await in_state(client, "f-1", "late", contract="fulfilment")
        row = await until(lambda: first_event(client, "ConversationOverdue", "f-1"))
        assert b'"last":"the start of fulfil"' in row.data
    assert (status.key, status.end) == ("f-1", "Cancelled")


@in_loop
async def test_one_that_ended_in_time_is_never_told_as_overdue_however_late_the_monitor_is(
    path: str,
) -> None:
    await known(path, "500ms")
    async with app_on(path, watched=False).worker() as client:

        async def took_us(id: str) -> int:
            await publish(client, Placed(id=id))
            shipped = await until(lambda: first_event(client, "Shipped", id))
            placed = await until(lambda: first_event(client, "Placed", id))
            return shipped.at_us - placed.at_us

        late: list[str] = []
        while await took_us(in_time := f"o-{len(late)}") >= 500_000:  # on a busy machine
            late.append(in_time)
        await asyncio.sleep(0.6)
    async with app_on(path, "500ms").worker() as client:
        await in_state(client, in_time, "on-time")
        await publish(client, Placed(id="silent"))
        await until(lambda: told(1 + len(late)))
    assert sorted(event.conversation for event in TOLD) == [*late, "silent"]


# -- the monitor -------------------------------------------------------------------------------


@in_loop
async def test_invariant_12_without_a_monitor_everything_goes_on_and_it_catches_up(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dies(self: Monitor, session: Any, position: int) -> Any:
        raise PavaneError("the monitor is down")

    app = app_on(path)
    with monkeypatch.context() as patched:
        patched.setattr(Monitor, "run_once", dies)
        async with app.worker() as client:
            await publish(client, *(Placed(id=f"o-{n}") for n in range(20)))
            await until(lambda: counted(client, "Shipped", 20))
            await (await client.start(refund, Cancelled(id="x"))).result(timeout=30)
            assert await client.conversations.list() == []
            assert client.node is not None
            assert client.node.session is not None
            assert client.node.session.open
    async with app.worker() as client:
        await until(lambda: all_on_time(client, 20))


async def counted(client: Client, type: str, count: int) -> bool:
    return (type, 1, count) in await client.store.event_types()


async def all_on_time(client: Client, count: int) -> bool:
    found = await client.conversations.list(state="on-time")
    return len(found) == count


@in_loop
async def test_invariant_12_a_monitor_that_is_down_holds_back_no_pruning(path: str) -> None:
    await known(path, "1h")
    async with app_on(path, watched=False).worker() as client:
        await publish(client, Placed(id="o-1"))
        await until(lambda: counted(client, "Shipped", 1))

    async with app_on(path, watched=False).worker() as client:

        async def all_gone() -> bool:
            await client.store.prune_events(2**60, 100)
            return not await client.store.event_types()

        await until(all_gone)
        names = {row.service for row in await client.store.handler_rows()}
        assert not any(name.startswith(MARK) for name in names), "it is no handler to be listed"


@in_loop
async def test_one_node_at_a_time_watches_and_another_takes_over(path: str) -> None:
    app = app_on(path)
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(app.worker())
        second = app.worker()
        other = await second.__aenter__()
        await publish(first, *(Placed(id=f"a-{n}") for n in range(10)))
        await until(lambda: all_on_time(first, 10))
        assert await owners(first) == 1
        await second.__aexit__(None, None, None)
        del other
        await publish(first, *(Placed(id=f"b-{n}") for n in range(10)))
        await until(lambda: all_on_time(first, 20))
    assert all(row.ends == 1 for row in await stored(path))


async def owners(client: Client) -> int:
    name = f"{MARK}monitor.sales"
    await client.store.register([name])
    target = client.store.target_of(name, name)
    rows = await client.store.partition_rows([name])
    return sum(row.target == target and row.owner is not None for row in rows)


async def stored(path: str) -> list[ConversationRow]:
    async with app_on(path, watched=False).connect() as client:
        return await client.store.conversations(ConversationFilter(limit=1000))


@in_loop
async def test_following_the_same_events_again_changes_nothing(path: str) -> None:
    app = app_on(path)
    async with app.worker() as client:
        await publish(client, Placed(id="o-1"), Placed(id="twice"))
        await in_state(client, "twice", "twice")
        await in_state(client, "o-1", "on-time")
        before = await client.store.conversations(ConversationFilter())
        assert client.node is not None
        session = client.node.session
        assert session is not None
        again = Monitor(app.registry.contracts["sales"])
        position, _ = await again.run_once(session, 0)
        assert position == await client.store.events_head()
        assert await client.store.conversations(ConversationFilter()) == before


@in_loop
async def test_a_new_contract_begins_at_the_end_of_the_log(path: str) -> None:
    async with app_on(path, watched=False).worker() as client:
        await publish(client, Placed(id="before"))
    async with app_on(path).worker() as client:
        await publish(client, Placed(id="after"))
        await in_state(client, "after", "on-time")
        assert [status.id for status in await client.conversations.list()] == ["after"]


@in_loop
async def test_what_is_published_right_after_the_start_is_seen(path: str) -> None:
    app = app_on(path)
    async with app.worker() as client:
        await publish(client, Placed(id="o-1"))
        await in_state(client, "o-1", "on-time")


@in_loop
async def test_more_overdue_ones_than_a_page_are_all_told(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "PAGE", 3)
    async with app_on(path, "100ms").worker() as client:
        await publish(client, *(Placed(id=f"silent-{n}") for n in range(10)))
        await until(lambda: told(10))
        await asyncio.sleep(0.05)
        rows = await client.store.conversations(ConversationFilter(state="overdue", now_us=2**60))
        assert all(row.raised for row in rows)
    assert sorted(event.conversation for event in TOLD) == [f"silent-{n}" for n in range(10)]


@in_loop
async def test_invariant_11_a_damaged_run_hides_no_other_overdue_conversation(path: str) -> None:
    async with app_on(path, "200ms").worker() as client:
        store = client.store
        damaged = blank_row(
            await store.take_run_numbers(1), "orders", store.target_of("orders", "silent-1"),
            Header("silent-1", "fulfil", 1, "orders", "orchestration", 1, "silent-1"),
        )  # fmt: skip
        damaged.header, damaged.status = b"{}", "completed"
        await durable(Commit(runs=[damaged]), partial(submit_alone, store))
        await publish(client, Placed(id="silent-1"), Placed(id="silent-2"))
        await until(lambda: told(2))
    assert sorted(event.conversation for event in TOLD) == ["silent-1", "silent-2"]


@in_loop
async def test_a_contract_that_comes_too_late_to_be_watched_is_refused(path: str) -> None:
    app = app_on(path, watched=False)
    async with app:
        with pytest.raises(BadDeclaration, match="Declare it before `async with app:`"):
            app.conversation(start=Placed, ends=[Shipped], within="1h")


# -- killed --------------------------------------------------------------------------------------


def launch(path: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.integration.watchers", path, str(PATIENT_S)], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])},
    )  # fmt: skip


async def watcher(
    client: Client, processes: list[subprocess.Popen[bytes]]
) -> subprocess.Popen[bytes] | None:
    """Return the one of these processes that watches, if one does."""
    name = f"{MARK}monitor.questions"
    await client.store.register([name])
    target = client.store.target_of(name, name)
    pids = {node.no: node.pid for node in await client.store.nodes()}
    owners = {row.target: row.owner for row in await client.store.partition_rows([name])}
    pid = pids.get(owners.get(target) or 0)
    return next((process for process in processes if process.pid == pid), None)


async def all_settled(client: Client, count: int) -> list[ConversationRow]:
    rows = await client.store.conversations(ConversationFilter(limit=1000))
    settled = [row for row in rows if row.raised or row.ended_us is not None]
    done = [row for row in rows if row.ends or row.id.startswith("silent")]
    return rows if len(rows) == len(settled) == len(done) == count else []


@in_loop
async def test_a_killed_monitor_is_taken_over_and_misses_and_repeats_nothing(path: str) -> None:
    processes = [launch(path) for _ in range(2)]
    try:
        async with watchers.app_on(path, PATIENT_S, watched=False).connect() as client:
            asked = 0
            for _ in range(3):
                watching = await until(lambda: watcher(client, processes), "a watcher")
                for _ in range(30):
                    asked += 1
                    kind = "silent" if asked % 5 == 0 else "o"
                    id = f"{kind}-{asked}"
                    await client.publish(watchers.Asked(id=id), source="test", id=id)
                    if asked % 30 == 15:
                        watching.kill()
                watching.wait()
                processes[processes.index(watching)] = launch(path)
            rows = await until(lambda: all_settled(client, asked), "each to end or be told of")
            assert all(row.ends == (not row.id.startswith("silent")) for row in rows)
            raised = sum(row.raised for row in rows)
            await until(lambda: counted(client, "Complained", raised), "each to be told of once")
            assert await counted(client, "ConversationOverdue", raised)
    finally:
        for process in processes:
            process.kill()
            process.wait()
