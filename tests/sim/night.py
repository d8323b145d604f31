"""A bank by night: nodes rest between the transfers, and must be there when one comes.

When all is quiet after the storm, one of the nodes is frozen at rest. What comes then in its
partitions others have to take over as soon as ever, not when the long lease of its rest is over.
"""

from __future__ import annotations

import asyncio

from pavane import App, Client, EngineConfig
from pavane.testing.sim.simulation import Simulation
from tests.sim.bank import ACCOUNTS, START_CENTS, TRANSFERS, Bank, services

QUIET_S = 2.0
FROZEN_S = 12.0
WITHIN_S = 5.0
"""How long the transfers of the night may take: some leases, and their steps."""


class Night(Bank):
    """The scenario."""

    def __init__(self) -> None:
        super().__init__()
        self.app = app

    async def customer(self, sim: Simulation, client: Client) -> None:
        await super().customer(sim, client)
        while not sim.is_healed:
            await asyncio.sleep(QUIET_S / 4)
        await asyncio.sleep(QUIET_S)
        self._freeze_one(sim)
        random, loop = sim.clock.random, asyncio.get_running_loop()
        began_s = loop.time()
        async with asyncio.TaskGroup() as group:
            for number in range(TRANSFERS):
                source, target = random.sample(sorted(ACCOUNTS), 2)
                cents = random.randrange(1, START_CENTS)
                group.create_task(self._move(sim, client, f"n{number}", source, target, cents))
        late_s = loop.time() - began_s - sim.storm.ends_us / 1e6
        if late_s > WITHIN_S:
            sim.break_off(f"The transfers of the night came {late_s:.3f} s late.")

    def _freeze_one(self, sim: Simulation) -> None:
        """Freeze a node, if there is one without which every service has another."""
        for node in sim.nodes:
            process = node.process
            others = {name for other in sim.nodes if other is not node for name in other.services}
            if process is not None and len(others) == len(services):
                process.freeze(thread=True)
                sim.clock.after(round(FROZEN_S * 1e6), process.thaw)
                return


app = App(
    "night", services, store="memory",
    config=EngineConfig(lease_s=0.6, poll_s=0.06, glance_s=2.0, rest_after_s=0.2),
)  # fmt: skip
