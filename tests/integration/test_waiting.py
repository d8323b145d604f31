"""Waiting for the end of a run, while the store does not always answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from pavane import App, Client, EngineConfig, Event, Service, StoreError, receive
from pavane.core.baton import ENDED
from pavane.errors import PavaneError
from pavane.stores.memory import MemoryStore
from pavane.stores.port import Commit, Fence, RunRow
from tests.integration.world import in_loop, until

desk = Service("desk")


@desk.workflow
async def greet() -> str:
    return "hello"


class FailingStore(MemoryStore):
    """Fails when it is asked what has ended, as long as it is told to."""

    is_failing = False

    async def halted_runs(self, ids: Sequence[str]) -> list[RunRow]:
        if self.is_failing:
            raise StoreError("not now")
        return await super().halted_runs(ids)

    def connect(self) -> MemoryStore:
        return self


@in_loop
async def test_who_waits_for_a_run_is_told_that_the_store_failed() -> None:
    store = FailingStore()
    async with App("desk", [desk], store=store).connect() as client:
        run = await client.start(greet, id="g-1")
        waits = asyncio.create_task(run.result())
        await asyncio.sleep(0)
        store.is_failing = True
        with pytest.raises(StoreError, match="not now"):
            await asyncio.wait_for(waits, 60)
        store.is_failing = False
        async with App("desk", [desk], store=MemoryStore.connect(store)).worker():
            assert await run.result(timeout="60s") == "hello"


class Go(Event):
    pass


@desk.workflow(receives=[Go])
async def wait() -> str:
    await receive(Go)
    return "gone"


@in_loop
async def test_who_waits_is_told_of_runs_that_ended_elsewhere_before_they_came_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that takes partitions over is told of the ends of their runs from then on only."""
    monkeypatch.setattr("pavane.app.POLL_S", 3.0)  # so that nobody looks while it is elsewhere
    app = App("desk", [desk], store=str(tmp_path / "desk.db"), config=EngineConfig(lease_s=15.0))
    async with app.worker() as client:
        async with app.worker() as elsewhere:

            async def shared() -> list[str]:
                ids = [f"w-{n}" for n in range(20)]
                return [id for id in ids if is_owner(elsewhere, id)]

            runs = [await client.start(wait, id=id) for id in await until(shared)]
            ends = [asyncio.create_task(run.result()) for run in runs]
            for run in runs:
                await run.send(Go())

            async def ended() -> bool:
                found = [await client.store.run_row("desk", run.id) for run in runs]
                return all(row is not None and row.status in ENDED for row in found)

            await until(ended)

        async def here() -> bool:
            return all(is_owner(client, run.id) for run in runs)

        await until(here)
        assert await asyncio.wait_for(asyncio.gather(*ends), 60) == ["gone"] * len(runs)


def is_owner(worker: Client, run: str) -> bool:
    session = worker.node.session if worker.node else None
    return session is not None and session.owns(worker.store.target_of("desk", run))


@desk.workflow
async def nap() -> str:
    await asyncio.sleep(0.2)
    await asyncio.sleep(1.0)
    return "awake"


class LateStore(MemoryStore):
    """Writes late, as on a disk that does not answer for a while."""

    late_s = 0.0

    def submit(
        self,
        batch: Sequence[Commit],
        fence: Fence | None,
        done: Callable[[Sequence[PavaneError | None]], None],
    ) -> None:
        later = partial(super().submit, batch, fence, done)
        asyncio.get_running_loop().call_later(self.late_s, later)

    def connect(self) -> MemoryStore:
        return self


@in_loop
async def test_a_timer_is_not_missed_that_was_written_after_its_time_was_read_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pavane.engine.timers.HORIZON_US", 800_000)
    monkeypatch.setattr("pavane.engine.session.TIMERS_S", 0.1)
    store = LateStore()
    async with App("desk", [desk], store=store).worker() as worker:
        run = await worker.start(nap, id="n-1")
        store.late_s = 0.6
        await asyncio.sleep(0.5)
        store.late_s = 0.0
        assert await run.result(timeout="60s") == "awake"
