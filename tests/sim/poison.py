"""Poison for simulations: a run or an event that ends every process which touches it.

It must be set aside after a few deaths, by whatever nodes there are, and nothing else may stop.
"""

from __future__ import annotations

import asyncio
from typing import Any

from pavane import App, Client, EngineConfig, Event, Run, RunEnded, RunFailed, Service
from pavane.testing.sim.checks import Violation, check_answers
from pavane.testing.sim.outside import outside
from pavane.testing.sim.process import here
from pavane.testing.sim.simulation import Simulation, insist

kitchen, table = services = [Service(name) for name in ("kitchen", "table")]
GUESTS = 4
DEATHS_MAX = 7
"""The fifth death that is counted is the last. A command is counted where it is sent from and where
it is done, and what is handed over in order before its trial is begun once without being counted.
"""
RESTART_US = 150_000
LOOK_S = 0.2


class Served(Event, key="dish"):
    dish: str


class Plates:
    """Who ate what, and how often it was the last thing a process did."""

    def __init__(self, sim: Simulation) -> None:
        self.deaths = 0
        self.eaten: list[str] = []
        self._sim = sim

    def die(self) -> None:
        """End the process that called, which a supervisor starts again."""
        process = here.get()
        node = next(node for node in self._sim.nodes if node.process is process)
        self.deaths += 1
        if self.deaths > DEATHS_MAX:
            self._sim.break_off(f"{self.deaths} processes were ended.")
        node.kill()
        self._sim.clock.after(RESTART_US, node.start)


@table.step
async def eat(guest: str, is_poisonous: bool) -> None:
    plates: Plates = outside.get().model
    if is_poisonous:
        plates.die()
        await asyncio.sleep(0)
    plates.eaten.append(guest)


@kitchen.workflow
async def dine(guest: str, is_poisonous: bool) -> str:
    await eat(guest, is_poisonous)
    await kitchen.publish(Served(dish=guest))
    return guest


@table.on(Served)
async def clear(event: Served) -> None:
    if event.dish == "poison":
        outside.get().model.die()
        await asyncio.sleep(0)
    outside.get().model.eaten.append(f"plate of {event.dish}")


class Poison:
    """The scenario: some guests, and either one of their dishes is poisonous or an event."""

    def __init__(self) -> None:
        self.app = app
        self.is_event = False
        self.answers: dict[str, tuple[str, Any]] = {}

    async def customer(self, sim: Simulation, client: Client) -> None:
        sim.outside.model = Plates(sim)
        self.is_event = sim.clock.chance(0.5)
        if self.is_event:
            await insist(lambda: client.publish(Served(dish="poison"), id="poison"))
        async with asyncio.TaskGroup() as group:
            for number in range(GUESTS):
                is_poisonous = number == 0 and not self.is_event
                group.create_task(self._dine(sim, client, f"g{number}", is_poisonous))

    async def _dine(self, sim: Simulation, client: Client, id: str, is_poisonous: bool) -> None:
        await asyncio.sleep(sim.clock.random.random() * sim.storm.ends_us / 1e6 * 0.8)
        args = (id, is_poisonous)
        run: Run[str] = await insist(lambda: client.start(dine, *args, id=id, mode=sim.mode))
        if is_poisonous:
            await self._wait_for_quarantine(client, run)
        await sim.ended(id)
        try:
            self.answers[id] = ("completed", await insist(run.result))
        except RunFailed as failed:
            self.answers[id] = (failed.status, None)

    async def _wait_for_quarantine(self, client: Client, run: Run[str]) -> None:
        """Do as a person would who sees that a run is stuck."""
        while (await insist(lambda: client.history(run.id))).status.status != "stuck":
            await asyncio.sleep(LOOK_S)
        try:
            await insist(run.kill)
        except RunEnded:
            pass

    def check(self, sim: Simulation) -> None:
        check_answers(sim.database, self.answers)
        plates: Plates = sim.outside.model
        killed = [id for id, (status, _) in self.answers.items() if status == "killed"]
        dead = [letter.event for letter in sim.database.root._data.events.dead.values()]
        if (killed, dead) != (([], ["poison"]) if self.is_event else (["g0"], [])):
            raise Violation(f"Killed are {killed}, and dead {dead}.")
        for id in self.answers:
            if id not in killed and not {id, f"plate of {id}"} <= set(plates.eaten):
                raise Violation(f"{id} got nothing: {plates.eaten}.")


app = App("inn", services, store="memory", config=EngineConfig(lease_s=0.6, poll_s=0.06))
