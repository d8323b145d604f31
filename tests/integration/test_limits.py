"""Limits: never more at once, never more within a time, whoever decides and whoever dies."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pavane import App, Client, EngineConfig, Event, Limit, Run, RunFailed, Service
from pavane.core.operations import Mode
from pavane.errors import BadArguments, BadDeclaration
from tests.integration import crew
from tests.integration.command_line import good
from tests.integration.crew import recorded
from tests.integration.fleet import Fleet, connected, start
from tests.integration.world import PATIENT_S, Place, in_loop, until, until_status

shop, bank = Service("shop"), Service("bank")


class Gauge:
    """How many are at something, and were at most."""

    def __init__(self) -> None:
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.began: list[tuple[float, Any]] = []

    async def pass_through(self, what: str, who: Any = None, for_s: float = 0.02) -> None:
        self.began.append((asyncio.get_running_loop().time(), who))
        self.now[what] += 1
        self.most[what] = max(self.most[what], self.now[what])
        await asyncio.sleep(for_s)
        self.now[what] -= 1


gauge = Gauge()
gate = asyncio.Event()


class Paid(Event, key="order"):
    order: str
    account: str


@bank.step(limit=Limit(concurrency=3))
async def transfer(number: int) -> int:
    await gauge.pass_through("transfer", number)
    return number


@bank.step(limit=Limit(concurrency=1, key=lambda account, number: account))
async def book(account: str, number: int) -> int:
    await gauge.pass_through(account)
    return number


@bank.step(limit=Limit(rate=4, per="400ms"))
async def call_out(number: int) -> int:
    await gauge.pass_through("call", number)
    return number


@bank.step(limit=Limit(concurrency=1, key=lambda number: {}[number]))
async def unkeyed(number: int) -> int:
    return number


@bank.step(limit=Limit(concurrency=1))
async def hold(number: int) -> int:
    await gate.wait()
    gauge.began.append((0, number))
    return number


@shop.workflow
async def pay(number: int) -> int:
    return await transfer(number)


@shop.workflow
async def book_to(account: str, number: int) -> int:
    return await book(account, number)


@shop.workflow
async def call(number: int) -> int:
    return await call_out(number)


@shop.workflow
async def fail_key(number: int) -> int:
    return await unkeyed(number)


@shop.workflow
async def hold_on(number: int) -> int:
    return await hold(number)


@shop.workflow(limit=Limit(concurrency=2))
async def few(number: int) -> int:
    await gauge_run(number)
    await asyncio.sleep(0.01)
    return number


@shop.workflow(limit=Limit(concurrency=1), receives=[Paid])
async def alone(number: int) -> int:
    await asyncio.sleep(3600)
    return number


@shop.step
async def gauge_run(number: int) -> None:
    await gauge.pass_through("runs", number)


@bank.on(Paid, limit=Limit(concurrency=1, key=lambda event: event.account))
async def credit(event: Paid) -> None:
    await gauge.pass_through(event.account, event.order)


@pytest.fixture(autouse=True)
def fresh() -> None:
    global gauge, gate
    gauge, gate = Gauge(), asyncio.Event()


def app_on(store: Place, **config: Any) -> App:
    return App("limits", [shop, bank], store=str(store), config=EngineConfig(**config))


@asynccontextmanager
async def three_nodes(store: Place) -> AsyncGenerator[Client]:
    async with AsyncExitStack() as stack:
        patient = [app_on(store, lease_s=PATIENT_S) for _ in range(3)]
        apps = [await stack.enter_async_context(app) for app in patient]
        client = apps[0].client

        async def shared() -> bool:
            rows = await client.store.partition_rows(["shop", "bank"])
            return len({row.owner for row in rows} - {None}) == 3

        await until(shared)
        yield client


async def results(client: Client, flow: Any, mode: Mode, *calls: tuple[Any, ...]) -> list[Any]:
    """Start a run for each call, all at once, and return what they give."""
    runs = await asyncio.gather(*(client.start(flow, *call, mode=mode) for call in calls))
    return [await run.result(timeout=60) for run in runs]


@in_loop
async def test_steps_of_all_nodes_together_keep_to_their_limit(place: Place, mode: Mode) -> None:
    async with three_nodes(place) as client:
        paid = await results(client, pay, mode, *((n,) for n in range(40)))
        assert paid == list(range(40))
        assert 1 < gauge.most["transfer"] <= 3
        calls = [(f"account {n % 3}", n) for n in range(24)]
        assert await results(client, book_to, mode, *calls) == list(range(24))
        assert {gauge.most[f"account {number}"] for number in range(3)} == {1}


@in_loop
async def test_no_more_begin_within_a_time_than_the_rate_says(place: Place, mode: Mode) -> None:
    async with three_nodes(place) as client:
        began_s = asyncio.get_running_loop().time()
        called = await results(client, call, mode, *((n,) for n in range(14)))
        assert called == list(range(14))
        # A permit is on its way for a while, so what is begun may be closer together than permits.
        assert max(at_s for at_s, _ in gauge.began) - began_s >= 3 * 0.4 * 0.9


@in_loop
async def test_runs_wait_for_their_turn_before_their_code_begins(place: Place, mode: Mode) -> None:
    async with three_nodes(place) as client:
        passed = await results(client, few, mode, *((n,) for n in range(12)))
        assert passed == list(range(12))
        assert gauge.most["runs"] <= 2


@in_loop
async def test_a_run_that_ends_in_any_way_makes_room_for_the_next(place: Place) -> None:
    async with app_on(place) as app:
        runs = [await app.start(alone, n, id=f"a{n}") for n in range(4)]
        first = runs[0]
        await until_status(first, "waiting", reason="timer")
        for run in runs[1:]:
            await until_status(run, "waiting", reason="limit alone-runs")

        async def all_asked() -> bool:
            return len((await app.client.limits.list())[0].waiting) == 3

        await until(all_asked)
        (limit,) = await app.client.limits.list()
        assert [turn.work for turn in limit.given] == ["a0"]
        assert sorted(turn.work for turn in limit.waiting) == ["a1", "a2", "a3"]
        await runs[1].cancel()  # while it waits
        assert (await ended(runs[1])) == "cancelled"
        await first.kill()
        await until_status(runs[2], "waiting", reason="timer")
        await runs[2].cancel()
        await until_status(runs[3], "waiting", reason="timer")
        await runs[3].kill()

        async def unused() -> bool:
            return not await app.client.limits.list()

        await until(unused)


async def ended(run: Run[Any]) -> str:
    try:
        await run.result(timeout=30)
    except RunFailed as failed:
        return failed.status
    return "completed"


@in_loop
async def test_handlers_of_all_nodes_together_keep_to_their_limit(place: Place) -> None:
    async with three_nodes(place) as client:
        for number in range(20):
            await client.publish(Paid(order=f"o{number}", account=f"account {number % 2}"))

        async def all_credited() -> bool:
            return len(gauge.began) >= 20

        await until(all_credited)
        assert sorted(who for _, who in gauge.began) == sorted(f"o{n}" for n in range(20))
        assert {gauge.most["account 0"], gauge.most["account 1"]} == {1}


@in_loop
async def test_who_has_priority_is_first_among_those_who_wait(tmp_path: Path) -> None:
    async with app_on(str(tmp_path / "world.db")) as app:
        first = await app.start(hold_on, 0)

        async def waits_for_the_gate() -> bool:
            found = await app.client.limits.list()
            return bool(found and found[0].given)

        await until(waits_for_the_gate)
        runs = [first]
        for number, priority in ((1, 0), (2, 0), (3, 2), (4, 1)):
            runs.append(await app.start(hold_on, number, priority=priority))

            async def asked(many: int = number) -> bool:
                return len((await app.client.limits.list())[0].waiting) == many

            await until(asked)
        gate.set()
        for run in runs:
            await run.result(timeout=30)
        assert [who for _, who in gauge.began] == [0, 3, 4, 1, 2]


@pytest.mark.parametrize("priority", ["high", 1.5, True, None, 10**7])
@in_loop
async def test_what_is_no_priority_is_refused_before_anything_is_written(
    tmp_path: Path, priority: Any
) -> None:
    """Nodes could not read the start, and would say so whenever they met it."""
    async with app_on(str(tmp_path / "world.db")) as app:
        with pytest.raises(BadArguments, match=r"priority=.* must be a whole number"):
            await app.start(pay, 1, id="r", priority=priority)
        assert await app.runs() == []
        assert await (await app.start(pay, 1, id="r", priority=-3)).result(timeout=30) == 1


@in_loop
async def test_a_step_that_waits_long_is_in_custody_and_none_of_its_process_s_deaths(
    tmp_path: Path,
) -> None:
    """Neither it nor its run is a suspect, however often processes die meanwhile (11)."""
    store = str(tmp_path / "world.db")
    async with app_on(store, custody_after_s=0.05) as app:
        runs = [await app.start(hold_on, number, id=f"h{number}") for number in range(3)]
        await until_status(runs[2], "waiting", reason="limit of bank.hold")
        (parked,) = await app.client.store.parked_of("shop", "h2")
        assert parked.deaths == 0
        assert parked.due_us > app.client.store.now_us() + 60_000_000
        gate.set()
        assert [await run.result(timeout=30) for run in runs] == [0, 1, 2]


@in_loop
async def test_a_key_that_cannot_be_told_fails_the_step_and_no_other(tmp_path: Path) -> None:
    async with app_on(str(tmp_path / "world.db")) as app:
        run = await app.start(fail_key, 7)
        with pytest.raises(RunFailed, match="KeyError"):
            await run.result(timeout=30)


@in_loop
async def test_a_key_that_no_store_finds_fails_its_step_and_holds_up_nobody(place: Place) -> None:
    """Invariant 11. All nodes looked for it in the store, one after the other, for ever."""
    async with app_on(place) as app:
        bad = await app.start(book_to, "a\0b", 1)
        with pytest.raises(RunFailed, match="holds a NUL character"):
            await bad.result(timeout=30)
        assert await (await app.start(book_to, "a", 2)).result(timeout=30) == 2


@in_loop
async def test_a_permit_outlives_the_node_that_gave_it_and_the_one_that_has_it(
    fleet: Fleet, mode: Mode
) -> None:
    """What a killed process was at goes on in another one, by the permit that it had."""
    victims = [fleet.launch() for _ in range(3)]
    async with AsyncExitStack() as stack:
        client = await connected(stack, fleet)
        runs = [await start(client, crew.narrow, number, 0.05, mode=mode) for number in range(30)]
        for victim in victims[:2]:

            async def under_way(some: int = len(recorded()) + 6) -> bool:
                return len(recorded()) >= some

            await until(under_way)
            victim.kill()
            victim.wait()
            fleet.launch()
        for number, run in enumerate(runs):
            assert await run.result(timeout=60) == number
        assert crew.most_squeezed() == crew.NARROW


def test_what_cannot_be_a_limit_is_refused() -> None:
    with pytest.raises(BadDeclaration, match="limits nothing"):
        Limit()
    with pytest.raises(BadDeclaration, match="at least 1"):
        Limit(concurrency=0)
    with pytest.raises(BadDeclaration, match="longer than 0"):
        Limit(rate=3, per=0)


def test_two_limits_of_one_name_are_refused_unless_they_are_one() -> None:
    service = Service("till")
    api = Limit(concurrency=2, name="api")

    @service.step(limit=api)
    async def one() -> None: ...

    @service.step(limit=api)
    async def two() -> None: ...

    App("fine", [service], store="memory")

    @service.step(limit=Limit(concurrency=3, name="api"))
    async def three() -> None: ...

    with pytest.raises(BadDeclaration, match="has a limit called 'api'"):
        App("wrong", [service], store="memory")


@in_loop
async def test_limits_are_listed_with_who_waits(tmp_path: Path) -> None:
    store = tmp_path / "world.db"
    async with app_on(str(store)) as app:
        for number in range(3):
            await app.start(hold_on, number, id=f"l{number}")

        async def two_wait() -> bool:
            found = await app.client.limits.list()
            return bool(found) and len(found[0].waiting) == 2

        await until(two_wait)

        here = ("--store", str(store), "--app", f"{__name__}:APP")
        listed = await asyncio.to_thread(good, "limits", "list", *here)
        assert "1 of 1" in listed
        shown = json.loads(
            await asyncio.to_thread(good, "limits", "show", "hold", "-o", "json", *here)
        )
        assert [turn["work"] for turn in shown[0]["waiting"]] == ["l1#0!1", "l2#0!1"]
        assert "begun" in await asyncio.to_thread(good, "limits", "show", "hold", *here)
        gate.set()


@in_loop
async def test_what_a_node_that_is_gone_had_begun_is_listed_as_left(fleet: Fleet) -> None:
    victim = fleet.launch()
    async with AsyncExitStack() as stack:
        client = await connected(stack, fleet)
        for number in range(2):
            await start(client, crew.narrow, number, 60.0)

        async def begun() -> bool:
            return len(recorded()) == 2

        await until(begun)
        (found,) = await client.limits.list()
        assert [bool(turn.node) for turn in found.given] == [True, True]
        victim.kill()
        victim.wait()
        (found,) = await client.limits.list()
        assert [turn.node for turn in found.given] == ["", ""]
        here = ("--store", fleet.store)
        listed = await asyncio.to_thread(good, "limits", "list", *here)
        assert "2, 2 left" in listed
        assert " left " in await asyncio.to_thread(good, "limits", "show", found.limit, *here)


APP = App("limits", [shop, bank], store="memory")
