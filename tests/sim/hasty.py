"""Customers in a hurry: the bank's transfers are killed, cancelled and retried on their way.

What a killed run did stays done, so money is not looked at here: only that a run ends once, that
its customer is told how, and what every simulation checks.
"""

from __future__ import annotations

import asyncio

from pavane.app import Client, Run
from pavane.errors import BadArguments, RunEnded
from pavane.testing.sim.simulation import Simulation, insist
from tests.sim.bank import Bank, Money, transfer

HASTY = 0.7
"""So many of the runs are asked for something on their way."""


class Hasty(Bank):
    """The scenario."""

    async def _move(
        self, sim: Simulation, client: Client, id: str, source: str, target: str, cents: int
    ) -> None:
        random = sim.clock.random
        await asyncio.sleep(random.random() * sim.storm.ends_us / 1e6 * 0.8)
        args = (source, target, cents)
        run: Run[str] = await insist(lambda: client.start(transfer, *args, id=id, mode=sim.mode))
        while random.random() < HASTY:
            await asyncio.sleep(random.random() * 0.2)
            try:
                await insist(random.choice((run.kill, run.cancel, run.retry)))
            except (RunEnded, BadArguments):
                pass
        await sim.ended(id)
        await self._learn(sim, run)

    def _check_answers(self, sim: Simulation) -> None:
        """A retried run may end otherwise than it was said to have ended."""

    def _check_money(self, money: Money) -> None:
        """A killed run leaves half of it."""
