"""One performance of chaos; see `tests.chaos.__main__`."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from examples.shop.app import app
from examples.shop.demo import form_of
from examples.shop.fulfil import fulfil
from examples.shop.orders import read_orders
from examples.shop.outcome import Ending, event_endings, run_ending
from examples.shop.reactions import OrderCancelled
from examples.shop.services import OrderPlaced, OrderShipped
from examples.shop.world import World
from pavane import Client
from pavane.app import status_of
from pavane.stores.eventlog import EventFilter, EventRow
from pavane.testing.sim.simulation import insist
from tests.chaos.checks import open_work, runs, violations
from tests.chaos.nodes import ChaosNode, pick
from tests.integration.fleet import is_free

LOOK_S = 0.5
HEALED_WITHIN_S = 120.0
FAULT_EVERY_S = (0.8, 2.5)
LEASE_S = 1.5
AT_ONCE = 50


@dataclass(frozen=True)
class Plan:
    """How much is to be done, by how many nodes, and for how long things go wrong meanwhile."""

    orders: int
    seconds: float
    nodes: int = 4
    seed: int = 0


@dataclass
class Outcome:
    """What came of it."""

    orders: int
    took_s: float = 0.0
    faults: dict[str, int] = field(default_factory=dict[str, int])
    again: int = 0
    violations: list[str] = field(default_factory=list[str])

    def __str__(self) -> str:
        faults = ", ".join(f"{count} {kind}" for kind, count in sorted(self.faults.items()))
        lines = [
            f"{self.orders:,} orders in {self.took_s:.1f} s through {faults}; "
            f"{self.again:,} steps done again, {len(self.violations)} violations"
        ]
        return "\n".join([*lines, *self.violations[:20]])


def orders_of(count: int) -> list[OrderPlaced]:
    """Return so many orders: the demo's, over and over."""
    known = read_orders()
    return [
        msgspec.structs.replace(known[number % len(known)], order_id=f"c-{number:06}")
        for number in range(count)
    ]


class Chaos:
    """See `tests.chaos.__main__`; `store` is an address, or a file in `folder`."""

    def __init__(
        self, plan: Plan, folder: Path, store: str | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        self.plan = plan
        self.folder = folder
        self.store = store or str(folder / "shop.db")
        self.world = World(folder / "world.db")
        self.outcome = Outcome(plan.orders)
        self.nodes = [
            ChaosNode(number, self.store, self.world.path, folder) for number in range(plan.nodes)
        ]
        self._random = random.Random(plan.seed)
        self._say = say
        self._is_file = "://" not in self.store
        self._kinds = ("kill", "freeze")
        self._placed_us: dict[str, int] = {}
        self._began_s = 0.0

    def run(self) -> Outcome:
        """Perform it; violations are in the outcome, anything else is raised."""
        self.world.create()
        try:
            asyncio.run(self._perform())
        finally:
            for node in self.nodes:
                node.end()
        return self.outcome

    async def _perform(self) -> None:
        async with app.connect(store=self.store) as client:
            self._began_s = time.monotonic()
            orders = orders_of(self.plan.orders)
            placing = asyncio.create_task(self._place_all(client, orders))
            await self._trouble(placing)
            await placing
            healed_s = time.monotonic()
            while left := await insist(lambda: open_work(client)):
                for node in self.nodes:
                    node.tend()
                if time.monotonic() - healed_s > HEALED_WITHIN_S:
                    words = "\n".join(node.last_words() for node in self.nodes)
                    self.outcome.violations.append(f"It does not end: {left}\n{words}")
                    break
                await asyncio.sleep(LOOK_S)
            self.outcome.took_s = time.monotonic() - self._began_s
            endings = await self._endings(client)
            ids = [order.order_id for order in orders]
            self.outcome.again = sum(self.world.executed_again().values())
            self.outcome.violations += await violations(client, ids, endings, self.world)
            codes = [node.stop() for node in self.nodes]
            if any(codes):
                self.outcome.violations.append(f"Nodes ended with {codes}.")

    # -- the customers -------------------------------------------------------------------------

    async def _place_all(self, client: Client, orders: list[OrderPlaced]) -> None:
        """Place orders evenly over the time of trouble."""
        queue = iter(list(enumerate(orders)))

        async def customer() -> None:
            for number, order in queue:
                due_s = self._began_s + self.plan.seconds * number / len(orders)
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                await insist(lambda n=number, o=order: self._place(client, n, o))

        await asyncio.gather(*(customer() for _ in range(AT_ONCE)))

    async def _place(self, client: Client, number: int, order: OrderPlaced) -> None:
        # The order's number names its run or its event: placing it twice is one order.
        form = form_of(number)
        if form == "events":
            self._placed_us.setdefault(order.order_id, client.store.now_us())
            await client.publish(order, source="shop", id=order.order_id)
        else:
            await client.start(fulfil, (order,), {}, id=order.order_id, mode=form)

    async def _endings(self, client: Client) -> list[Ending]:
        """Return how each order ended, by what Pavane tells."""
        found: list[Ending] = []
        async for rows in runs(client):
            for row in rows:
                number = int(row.id.removeprefix("c-"))
                ending = run_ending(status_of(row), form_of(number))
                found += [ending] if ending is not None else []
        last: list[EventRow] = []
        which = EventFilter(
            types=(OrderShipped.event_type, OrderCancelled.event_type), limit=1_000_000
        )
        last += await client.events.list(which)
        return found + event_endings(self._placed_us, last)

    # -- trouble -------------------------------------------------------------------------------

    async def _trouble(self, placing: asyncio.Task[None]) -> None:
        """Strike now and then until the time is over, then let everything heal."""
        for node in self.nodes:
            node.tend()
        await asyncio.sleep(1.5)
        ends_s = self._began_s + self.plan.seconds
        next_s = time.monotonic()
        while time.monotonic() < ends_s:
            for node in self.nodes:
                node.tend()
            if time.monotonic() >= next_s:
                await self._strike()
                next_s = time.monotonic() + self._random.uniform(*FAULT_EVERY_S)
            await asyncio.sleep(0.05)
        for node in self.nodes:
            node.heal()
        self._say(f"{time.monotonic() - self._began_s:6.1f} s  everything heals")

    async def _strike(self) -> None:
        kind = self._random.choice(self._kinds)
        node = pick(self._random, self.nodes)
        if node is None:
            return
        if kind == "kill":
            down_s = self._random.uniform(0.1, 2.0)
            node.kill(down_s)
            self._count(kind, f"node {node.number} is killed and down for {down_s:.1f} s")
        elif kind == "freeze":
            for_s = self._random.uniform(0.2, 3 * LEASE_S)
            node.freeze(for_s)
            if self._is_file and not await is_free(self.store):
                node.heal()  # it holds the file's lock, which would stop everybody
                return
            self._count(kind, f"node {node.number} is frozen for {for_s:.1f} s")

    def _count(self, kind: str, what: str) -> None:
        self.outcome.faults[kind] = self.outcome.faults.get(kind, 0) + 1
        self._say(f"{time.monotonic() - self._began_s:6.1f} s  {what}")
