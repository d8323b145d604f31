"""A calendar for simulations: one run for every second, whatever dies."""

from __future__ import annotations

import asyncio
from typing import Any

from pavane import App, Client, EngineConfig, Retry, Service, scheduled_time, step_info
from pavane.core.baton import ENDED
from pavane.schedule import micros, moment
from pavane.stores.port import RunFilter
from pavane.testing.sim.checks import Violation
from pavane.testing.sim.outside import outside
from pavane.testing.sim.simulation import Simulation, insist
from pavane.workflow import KEEPER

NAME = "tick"
SECOND_US = 10**6

clockwork, tower = Service("clockwork"), Service("tower")


@tower.step(retry=Retry(attempts=100, first="20ms", most="200ms"))
async def ring(time: str) -> None:
    await outside.get().ask("ring", step_info().idempotency_key, time, effect=lambda: None)


@clockwork.workflow
async def tell() -> str:
    time = scheduled_time()
    assert time is not None
    await ring(time.isoformat())
    return time.isoformat()


class Calendar:
    """The scenario: a schedule of every second, asked for runs of the past and of now as well."""

    def __init__(self) -> None:
        self.app = App(
            "calendar", [clockwork, tower], store="memory", config=EngineConfig(lease_s=0.6)
        )
        self.app.schedule("* * * * * *", tell, name=NAME, missed="all")
        self.wanted: set[str] = set()

    async def customer(self, sim: Simulation, client: Client) -> None:
        keeper = await insist(lambda: self._keeper(client))
        now_us = client.store.now_us()
        past = moment(now_us - 10 * SECOND_US), moment(now_us - 4 * SECOND_US)
        for _ in range(2):
            await insist(lambda: client.schedules.backfill(NAME, *past))
        first_us = micros(past[0]) // SECOND_US * SECOND_US + SECOND_US
        self.wanted |= {self._id(first_us + n * SECOND_US) for n in range(6)}
        self.wanted.add(await insist(lambda: client.schedules.trigger(NAME)))
        begin_us = client.store.now_us()
        await asyncio.sleep(sim.storm.ends_us / 1e6 + 2.5)
        until_us = client.store.now_us() - SECOND_US
        while self.wanted - await self._runs(client):
            await asyncio.sleep(0.1)
        seconds = range(begin_us // SECOND_US + 1, until_us // SECOND_US)
        self.wanted |= {self._id(second * SECOND_US) for second in seconds}
        await insist(lambda: client.request(keeper, "cancel"))

    async def _keeper(self, client: Client) -> str:
        while not (known := await client.schedules.list()):
            await asyncio.sleep(0.05)
        return known[0].run

    async def _runs(self, client: Client) -> set[str]:
        which = RunFilter(id_prefix=f"{NAME}@", limit=1000)
        return {run.id for run in await insist(lambda: client.runs(which))}

    def _id(self, at_us: int) -> str:
        return f"{NAME}@{moment(at_us).isoformat()}"

    def check(self, sim: Simulation) -> None:
        data: Any = sim.database.root._data
        rows = [row for row in data.runs.values() if row.service == row.home]
        told = {row.id for row in rows if row.id.startswith(f"{NAME}@")}
        if lost := sorted(self.wanted - told):
            raise Violation(f"Nothing was started for {lost}.")
        if open := [row.id for row in rows if row.status not in ENDED]:
            raise Violation(f"{open} did not end.")
        if bad := [row.id for row in rows if row.status not in ("completed", "cancelled")]:
            raise Violation(f"{bad} ended otherwise.")
        rung = [args[0] for args in (request.args for request in sim.outside.requests)]
        if len(set(rung)) != len(told):
            raise Violation(f"{len(set(rung))} times were told by {len(told)} runs.")
        if not any(row.workflow == KEEPER + NAME for row in rows):
            raise Violation("The schedule never began.")
