"""What a node does with messages of partitions that it is still taking up, on real stores."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from pavane import App, Client, EngineConfig, Event, Service, receive
from pavane.stores.port import Fence, Store
from tests.integration.world import PATIENT_S, Place, in_loop, until, until_status


class Go(Event):
    """Lets a run go on."""


desk = Service("desk")


@desk.workflow(receives=[Go])
async def wait_for_go() -> str:
    await receive(Go)
    return "gone"


@in_loop
async def test_what_comes_meanwhile_does_not_overtake_what_was_written_before(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, claimed, read, may_claim, may_read = (asyncio.Event() for _ in range(5))
    patient = EngineConfig(lease_s=PATIENT_S)
    apps = [App("desk", [desk], store=str(place), config=patient) for _ in range(2)]
    first = asyncio.create_task(work(apps[0], stopped))
    async with apps[1].worker() as client:
        kind = type(client.store)
        claim, read_log = kind.claim, kind.read_log

        async def claim_late(self: Store, fence: Fence, targets: Sequence[int]) -> Any:
            claimed.set()
            await may_claim.wait()
            return await claim(self, fence, targets)

        async def read_late(self: Store, *asked: Any) -> Any:
            if claimed.is_set() and asked[2] is not None:  # what is in the partitions claimed then
                read.set()
                await may_read.wait()
            return await read_log(self, *asked)

        await until(lambda: is_shared(client), "two owners")
        monkeypatch.setattr(kind, "claim", claim_late)
        monkeypatch.setattr(kind, "read_log", read_late)
        stopped.set()
        await first
        await claimed.wait()
        runs = [await client.start(wait_for_go) for _ in range(8)]
        may_claim.set()
        await read.wait()
        for at, run in enumerate(runs):
            await (run.cancel() if at % 2 else run.send(Go()))
        await asyncio.sleep(0.3)
        may_read.set()
        for at, run in enumerate(runs):
            await until_status(run, ("completed", "cancelled")[at % 2])


async def work(app: App, stopped: asyncio.Event) -> None:
    async with app.worker():
        await stopped.wait()


async def is_shared(client: Client) -> bool:
    rows = await client.store.partition_rows(["desk"])
    return len({row.owner for row in rows} - {None}) == 2
