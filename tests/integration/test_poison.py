"""Runs and steps that end their process: quarantined after a few deaths; all others finish."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import pytest

from pavane import RunFailed
from pavane.core.operations import Mode
from tests.integration import crew
from tests.integration.fleet import Fleet, connected, start
from tests.integration.world import in_loop, until

DEATHS_MAX = 5


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
