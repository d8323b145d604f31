"""A harbour for simulations: nobody may crowd a berth, whatever dies.

Ships enter by turns (a limit of runs), are unloaded at a berth of their size (a limit of steps, by
key), get a stamp now and then (a rate), and each is told of by criers (a limit of handlers).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from pavane import App, Client, EngineConfig, Event, Limit, Retry, Run, RunEnded, RunFailed, Service
from pavane.core.envelope import Permit, unpack
from pavane.engine.limits import LIMIT
from pavane.errors import PavaneError
from pavane.service import step_info
from pavane.stores.port import Commit, Fence
from pavane.testing.sim.checks import Violation, check_answers, check_same_requests
from pavane.testing.sim.outside import outside
from pavane.testing.sim.simulation import Simulation, insist

harbour, quay, town = services = [Service(name) for name in ("harbour", "quay", "town")]
SHIPS = 7
AT_ONCE = 3
"""Ships in the harbour."""
BERTHS = 1
"""Ships of one size that are unloaded at once."""
STAMPS = 2
STAMPS_PER_S = 0.5
CRIERS = 1
TIRELESS = Retry(attempts=200, first="20ms", most="200ms")


class Landed(Event, key="ship"):
    ship: str


class Ledgers:
    """What was done for whom."""

    def __init__(self) -> None:
        self.unloaded: list[str] = []
        self.stamped: list[str] = []
        self.cried: list[str] = []


async def _ask(what: str, key: str, ship: str, into: list[str]) -> None:
    await outside.get().ask(what, key, ship, effect=lambda: into.append(ship))


@quay.step(retry=TIRELESS, limit=Limit(concurrency=BERTHS, key=lambda ship, size: size))
async def unload(ship: str, size: str) -> None:
    await _ask("unload", step_info().idempotency_key, ship, outside.get().model.unloaded)


@town.step(retry=TIRELESS, limit=Limit(rate=STAMPS, per=STAMPS_PER_S))
async def stamp(ship: str) -> None:
    await _ask("stamp", step_info().idempotency_key, ship, outside.get().model.stamped)


@harbour.workflow(limit=Limit(concurrency=AT_ONCE))
async def call_at(ship: str, size: str) -> str:
    await unload(ship, size)
    await asyncio.sleep(0.01)
    await stamp(ship)
    await harbour.publish(Landed(ship=ship))
    return ship


@town.on(Landed, retry=TIRELESS, limit=Limit(concurrency=CRIERS, name="criers"))
async def cry(event: Landed) -> None:
    await _ask("cry", f"cry {event.ship}", event.ship, outside.get().model.cried)


MOST = {"call_at-runs": AT_ONCE, "unload": BERTHS, "criers": CRIERS}


class Harbour:
    """The scenario: more ships than there is room for, some of them called off or killed."""

    def __init__(self) -> None:
        self.app = app
        self.answers: dict[str, tuple[str, Any]] = {}
        self.crowded = ""
        self.stamps: dict[str, int] = {}
        """When each piece of work was given its permit first."""

    async def customer(self, sim: Simulation, client: Client) -> None:
        sim.outside.model = Ledgers()
        self._data: Any = sim.database.root._data
        sim.database.watchers.append(self._watch)
        async with asyncio.TaskGroup() as group:
            for number in range(SHIPS):
                group.create_task(self._call(sim, client, f"s{number}"))

    async def _call(self, sim: Simulation, client: Client, id: str) -> None:
        random = sim.clock.random
        args = (id, random.choice(("big", "small")))
        await asyncio.sleep(random.random() * sim.storm.ends_us / 1e6 * 0.5)
        run: Run[str] = await insist(
            lambda: client.start(call_at, *args, id=id, mode=sim.mode, priority=len(id) % 2)
        )
        fate = random.random()
        if fate < 0.2:
            await asyncio.sleep(random.random() * 0.3)
            try:
                await insist(run.cancel if fate < 0.1 else run.kill)
            except RunEnded:
                pass
        await sim.ended(id)
        try:
            self.answers[id] = ("completed", await insist(run.result))
        except RunFailed as failed:
            self.answers[id] = (failed.status, None)

    def _watch(
        self, batch: Sequence[Commit], fence: Fence | None, results: Sequence[PavaneError | None]
    ) -> None:
        """See that never more permits are out than there are."""
        if not any(commit.reaction and commit.reaction.awaited for commit in batch):
            return
        out: dict[tuple[str, str], int] = {}
        for row in self._data.events.awaits.values():
            permit = unpack(Permit, row.reply) if row.type.startswith(LIMIT) else None
            if permit is not None and permit.given_us:
                place = (permit.limit, permit.key)
                out[place] = out.get(place, 0) + 1
                if permit.limit == "stamp":
                    self.stamps.setdefault(permit.work, permit.given_us)
        for (limit, key), number in out.items():
            if number > MOST.get(limit, number):
                self.crowded = self.crowded or f"{number} permits of {limit} {key} are out."

    def check(self, sim: Simulation) -> None:
        check_same_requests(sim.outside)
        check_answers(sim.database, self.answers)
        if self.crowded:
            raise Violation(self.crowded)
        times = sorted(self.stamps.values())
        for at, time in enumerate(times):
            within = [one for one in times[at:] if one < time + STAMPS_PER_S * 1e6]
            if len(within) > STAMPS:
                raise Violation(f"{len(within)} stamps were given within {STAMPS_PER_S} s.")
        ledgers: Ledgers = sim.outside.model
        for id, (status, _) in self.answers.items():
            if status == "completed":
                for done in (ledgers.unloaded, ledgers.stamped, ledgers.cried):
                    if done.count(id) != 1:
                        raise Violation(f"{id} was done {done.count(id)} times: {done}.")


app = App("harbour", services, store="memory", config=EngineConfig(lease_s=0.6, poll_s=0.06))
