"""Waiting for the end of a run, while the store does not always answer."""

from __future__ import annotations

import asyncio

import pytest

from pavane import App, Service, StoreError
from pavane.stores.memory import MemoryStore
from pavane.stores.port import RunRow
from tests.integration.world import in_loop

desk = Service("desk")


@desk.workflow
async def greet() -> str:
    return "hello"


class FailingStore(MemoryStore):
    """Fails when it is asked for one row, as long as it is told to."""

    is_failing = False

    async def run_row(self, service: str, id: str) -> RunRow | None:
        if self.is_failing:
            raise StoreError("not now")
        return await super().run_row(service, id)

    def connect(self) -> MemoryStore:
        return self


@in_loop
async def test_who_waits_for_a_run_is_told_that_the_store_failed() -> None:
    store = FailingStore()
    async with App("desk", [desk], store=store).connect() as client:
        run = await client.start(greet, (), {}, id="g-1")
        waits = asyncio.create_task(run.result())
        await asyncio.sleep(0)
        store.is_failing = True
        with pytest.raises(StoreError, match="not now"):
            await asyncio.wait_for(waits, 5)
        store.is_failing = False
        async with App("desk", [desk], store=MemoryStore.connect(store)).worker():
            assert await run.result(timeout="5s") == "hello"
