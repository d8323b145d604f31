"""Runs and steps that end their process: quarantined after a few deaths; all others finish."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest

from pavane import App, Event, Retry, RunFailed, Service, StoreError
from pavane.core.operations import Mode
from pavane.stores.eventlog import DeadFilter
from tests.integration import crew
from tests.integration.fleet import Fleet, connected, start
from tests.integration.world import Place, in_loop, until

DEATHS_MAX = 5


class Bell(Event):
    """Something is ready."""


POISON = [
    (crew.sinks, "async"),
    (crew.sinks, "thread"),
    (crew.sinks, "transaction"),
    (crew.sinks_at_once,),
    (crew.sinks_after_a_timer,),
    (crew.sinks_after_an_event,),
    (crew.sinks_after_a_step,),
    (crew.sinks_after_a_child,),
]


@pytest.mark.parametrize("poison", POISON, ids=lambda poison: f"{poison[0].name}{poison[1:]}")
@pytest.mark.parametrize("services", [(), ("deck", "galley")], ids=["one node", "a node each"])
@in_loop
async def test_what_kills_its_process_is_quarantined_and_the_others_finish(
    fleet: Fleet, mode: Mode, poison: tuple[Any, ...], services: tuple[str, ...]
) -> None:
    """Invariant 11: a run or step that ends its process does so five times at most."""
    async with AsyncExitStack() as stack:
        client = await connected(stack, fleet)
        others = [await start(client, crew.steady, 2, 0.01, mode=mode) for _ in range(3)]
        run = await start(client, *poison, mode=mode, id="poison")
        others += [await start(client, crew.steady, 2, 0.01, mode=mode) for _ in range(3)]
        if poison[0] is crew.sinks_after_an_event:
            await run.send(crew.Told(text="go"))
        layout = [(name,) for name in services] or [()]
        working = {names: fleet.launch(*names) for names in layout}
        deaths = 0

        async def settled() -> bool:
            nonlocal deaths
            for names, process in working.items():
                if process.poll() is not None:
                    deaths += 1
                    assert deaths <= DEATHS_MAX, f"{deaths} deaths: {await run.history()}"
                    working[names] = fleet.launch(*names)
            try:
                return (await run.status()).status == "stuck"
            except RunFailed:
                return False

        await until(settled, "the quarantine")
        assert deaths <= DEATHS_MAX
        for other in others:
            assert await other.result(timeout=30) == 2
        assert "Quarantined" in (await run.status()).reason
        await run.kill()
        with pytest.raises(RunFailed, match="killed"):
            await run.result(timeout=30)


@in_loop
async def test_a_session_that_is_lost_in_a_living_process_counts_as_no_death(place: Place) -> None:
    """Invariant 11: whoever did nothing wrong goes on, however often the store was away."""
    inn = Service("inn")
    begun, may_end = asyncio.Queue[str](), asyncio.Event()

    @inn.step(retry=Retry(attempts=0, first="1ms", factor=1))
    async def cook() -> None:
        begun.put_nowait("step")
        await may_end.wait()

    @inn.workflow
    async def dine() -> str:
        await cook()
        return "fed"

    @inn.on(Bell)
    async def serve(event: Bell) -> None:
        begun.put_nowait("handler")
        await may_end.wait()

    async with App("inn", [inn], store=str(place)).worker() as worker:
        run = await worker.start(dine)
        await worker.publish(Bell())
        for _ in range(2 * DEATHS_MAX):
            assert {await begun.get(), await begun.get()} == {"step", "handler"}
            assert worker.node is not None
            assert worker.node.session is not None
            worker.node.session.lost(StoreError("The test takes the store away."))
        may_end.set()
        assert await run.result(timeout=30) == "fed"
        assert await worker.store.dead_letters(DeadFilter()) == []
