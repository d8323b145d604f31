"""One performance of chaos; see `tests.chaos.__main__`."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from examples.shop.demo import form_of
from examples.shop.fulfil import fulfil
from examples.shop.orders import read_orders
from examples.shop.outcome import Ending, event_endings, run_ending
from examples.shop.reactions import OrderCancelled
from examples.shop.services import OrderPlaced, OrderShipped
from examples.shop.world import World
from pavane import Client, Run, RunFailed
from pavane.app import status_of
from pavane.stores.eventlog import EventRow
from pavane.testing.sim.simulation import insist
from tests.chaos.checks import events, open_work, runs, violations
from tests.chaos.faults import Fault, draw
from tests.chaos.grounds import Ground
from tests.chaos.nodes import ChaosNode
from tests.chaos.shop import app

LOOK_S = 0.5
HEALED_WITHIN_S = 300.0
ANSWERED_WITHIN_S = 120.0
AT_ONCE = 50
WAITS_EVERY = 20
"""Of so many customers one waits for what becomes of the order."""


@dataclass(frozen=True)
class Plan:
    """How much is to be done, by how many nodes, and for how long things go wrong meanwhile."""

    orders: int
    seconds: float
    nodes: int = 4
    seed: int = 0


@dataclass
class Outcome:
    """What came of it; printed, it is all that is needed to find out why."""

    plan: Plan
    folder: Path
    took_s: float = 0.0
    faults: list[Fault] = field(default_factory=list[Fault])
    again: int = 0
    violations: list[str] = field(default_factory=list[str])

    def __str__(self) -> str:
        counts = sorted(Counter(fault.kind for fault in self.faults).items())
        faults = ", ".join(f"{count} {kind}" for kind, count in counts)
        summary = (
            f"Seed {self.plan.seed}: {self.plan.orders:,} orders in {self.took_s:.1f} s through "
            f"{faults}; {self.again:,} steps done again, {len(self.violations)} violations"
        )
        if not self.violations:
            return summary
        struck = [str(fault) for fault in self.faults]
        logs = [
            f"-- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-30:])
            for path in sorted(self.folder.glob("*.log"))
        ]
        kept = f"All of it is kept in {self.folder}."
        return "\n".join([*struck, *logs, kept, summary, *self.violations[:20]])


def orders_of(count: int) -> list[OrderPlaced]:
    """Return so many orders: the demo's, over and over."""
    known = read_orders()
    return [
        msgspec.structs.replace(known[number % len(known)], order_id=f"c-{number:06}")
        for number in range(count)
    ]


class Chaos:
    """See `tests.chaos.__main__`."""

    def __init__(
        self, plan: Plan, folder: Path, ground: Ground,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        self.plan = plan
        self.folder = folder
        self.ground = ground
        self.world = World(folder / "world.db")
        self.outcome = Outcome(plan, folder)
        self.nodes: list[ChaosNode] = []
        self.answers: dict[str, tuple[str, Any]] = {}
        """What customers were told of their orders: status and result."""
        self._say = say
        self._placed_us: dict[str, int] = {}
        self._began_s = 0.0

    def run(self) -> Outcome:
        """Perform it; whatever went wrong is in the outcome."""
        self.world.create()
        try:
            asyncio.run(self._on_ground())
        except Exception:
            self.outcome.violations.append(traceback.format_exc())
        finally:
            for node in self.nodes:
                node.end()
        return self.outcome

    async def _on_ground(self) -> None:
        async with self.ground as ground:
            store = ground.address(self.plan.nodes)
            async with app.connect(store=store) as client:
                await ground.watch()
                self.nodes += [
                    ChaosNode(number, ground.address(number), self.world.path, self.folder)
                    for number in range(self.plan.nodes)
                ]
                await self._perform(client)

    async def _perform(self, client: Client) -> None:
        self._began_s = time.monotonic()
        orders = orders_of(self.plan.orders)
        placing = asyncio.create_task(self._place_all(client, orders))
        await self._trouble()
        waiting = await placing
        healed_s = time.monotonic()
        while left := await insist(lambda: open_work(client)):
            for node in self.nodes:
                node.tend()
            if time.monotonic() - healed_s > HEALED_WITHIN_S:
                self.outcome.violations.append(f"It does not end: {left}")
                break
            await asyncio.sleep(LOOK_S)
        self.outcome.took_s = time.monotonic() - self._began_s
        _, in_vain = await asyncio.wait(waiting, timeout=ANSWERED_WITHIN_S)
        if in_vain:
            self.outcome.violations.append(f"{len(in_vain)} customers wait in vain.")
        endings = await self._endings(client)
        ids = [order.order_id for order in orders]
        self.outcome.again = sum(self.world.executed_again().values())
        self.outcome.violations += await violations(client, ids, endings, self.answers, self.world)
        self.outcome.violations += await self.ground.wrongs()
        codes = [await asyncio.to_thread(node.stop) for node in self.nodes]
        if any(codes):
            self.outcome.violations.append(f"Nodes ended with {codes}.")

    # -- the customers -------------------------------------------------------------------------

    async def _place_all(
        self, client: Client, orders: list[OrderPlaced]
    ) -> list[asyncio.Task[None]]:
        """Place orders evenly over the time of trouble; return those who wait for an answer."""
        queue = iter(list(enumerate(orders)))
        waiting: list[asyncio.Task[None]] = []

        async def customer() -> None:
            for number, order in queue:
                due_s = self._began_s + self.plan.seconds * number / len(orders)
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                await insist(lambda n=number, o=order: self._place(client, n, o))
                if number % WAITS_EVERY == 0 and form_of(number) != "events":
                    waiting.append(asyncio.create_task(self._wait(client, order.order_id)))

        await asyncio.gather(*(customer() for _ in range(AT_ONCE)))
        return waiting

    async def _place(self, client: Client, number: int, order: OrderPlaced) -> None:
        # The order's number names its run or its event: placing it twice is one order.
        form = form_of(number)
        if form == "events":
            self._placed_us.setdefault(order.order_id, client.store.now_us())
            await client.publish(order, source="shop", id=order.order_id)
        else:
            await client.start(fulfil, order, id=order.order_id, mode=form)

    async def _wait(self, client: Client, id: str) -> None:
        async def ask() -> None:
            try:
                self.answers[id] = "completed", await Run(client, id, "orders").result()
            except RunFailed as failed:
                self.answers[id] = failed.status, None

        await insist(ask)

    async def _endings(self, client: Client) -> list[Ending]:
        """Return how each order ended, by what Pavane tells."""
        found: list[Ending] = []
        async for rows in runs(client):
            for row in rows:
                number = int(row.id.removeprefix("c-"))
                ending = run_ending(status_of(row), form_of(number))
                found += [ending] if ending is not None else []
        types = (OrderShipped.event_type, OrderCancelled.event_type)
        last: list[EventRow] = await events(client, types)
        return found + event_endings(self._placed_us, last)

    # -- trouble -------------------------------------------------------------------------------

    async def _trouble(self) -> None:
        """Have everything go wrong that was drawn, then let it heal."""
        for fault in draw(self.ground.climate, self.plan.seed, self.plan.seconds, self.plan.nodes):
            await self._tend_until(self._began_s + fault.at_s)
            await self._strike(fault)
        await self._tend_until(self._began_s + self.plan.seconds)
        await self.ground.heal()
        for node in self.nodes:
            node.heal()
        self._say(f"{time.monotonic() - self._began_s:6.1f} s  everything heals")

    async def _tend_until(self, until_s: float) -> None:
        while True:
            for node in self.nodes:
                node.tend()
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                return
            await asyncio.sleep(min(0.05, left_s))

    async def _strike(self, fault: Fault) -> None:
        if fault.kind not in ("kill", "freeze"):
            self.ground.strike(fault)
        else:
            node = self.nodes[fault.victim]
            if not node.is_up:
                return
            if fault.kind == "kill":
                node.kill(fault.for_s)
            else:
                node.freeze(fault.for_s)
                if await self.ground.is_stopped():
                    node.heal()
                    return
        self.outcome.faults.append(fault)
        self._say(str(fault))
