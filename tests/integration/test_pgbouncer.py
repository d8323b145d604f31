"""Nodes that share a Postgres behind a PgBouncer in transaction mode, where one is installed."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from pavane import App, Service
from pavane.core.operations import Mode
from tests.bouncer import bounced_database
from tests.integration import crew
from tests.integration.command_line import pavane
from tests.integration.crew import most_executions
from tests.integration.fleet import Fleet, connected, start
from tests.integration.world import in_loop, until


@in_loop
async def test_nodes_work_through_a_pooler_and_take_over_from_one_that_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Mode
) -> None:
    """Invariants 1, 4, 9; they look by the clock, since no notification passes."""
    monkeypatch.setattr(crew, "RECORD", tmp_path / "record.txt")
    with bounced_database() as url:
        fleet = Fleet(tmp_path, url)
        try:
            first, _ = fleet.launch(), fleet.launch()
            async with AsyncExitStack() as stack:
                client = await connected(stack, fleet)
                runs = [await start(client, crew.steady, 6, 0.05, mode=mode) for _ in range(20)]

                async def under_way() -> bool:
                    return len(crew.recorded()) > 40

                await until(under_way)
                first.kill()
                first.wait()
                for run in runs:
                    assert await run.result(timeout=60) == 30

                async def looks_by_the_clock() -> bool:
                    return (await client.store.describe())["wake-ups"] == "polling"

                await until(looks_by_the_clock)
                assert most_executions() <= 2
        finally:
            await asyncio.to_thread(fleet.sink)


async def made(url: str) -> None:
    async with App("bouncing", [Service("desk")], store=url).connect():
        pass


def test_doctor_tells_that_workers_look_by_the_clock() -> None:
    with bounced_database() as url:
        asyncio.run(made(url))
        told = json.loads(pavane("doctor", "--store", url, "-o", "json").stdout)
        assert "polling: " in next(one["text"] for one in told if one["check"] == "wake-ups")
