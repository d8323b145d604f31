"""The customer: a client that asks again while the store fails, as one must who wants to know.

Ids are drawn before the first attempt, so that what is asked for twice takes effect once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from pavane.app import Client, Run, RunHistory, RunStatus
from pavane.core.operations import Mode
from pavane.engine.config import EngineConfig
from pavane.engine.registry import Registry
from pavane.errors import BadArguments
from pavane.policy import Duration
from pavane.stores.port import RunFilter, RunRow
from pavane.testing.sim.simulation import Simulation, insist
from pavane.workflow import Workflow


def check_inside(simulation: Simulation) -> None:
    """Raise BadArguments where no virtual time passes: on an event loop that is not simulated."""
    if getattr(asyncio.get_running_loop(), "clock", None) is not simulation.clock:
        raise BadArguments(
            "This is outside of the simulation, such as in an async fixture or in asyncio.run(…), "
            "where its time stands still. Act in the test itself: "
            "`async def test_…(sim): await sim.start(…)`, or in what it awaits."
        )


class Customer(Client):
    """See the module."""

    def __init__(self, registry: Registry, config: EngineConfig, simulation: Simulation) -> None:
        shop = simulation.shop
        super().__init__(registry, shop.store, [], config, (), shop)
        self.simulation = simulation
        self._is_open = False

    async def _insist(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        """Ask until there is an answer; the first time, introduce oneself."""
        check_inside(self.simulation)
        if not self._is_open:
            await insist(self.open)
            self._is_open = True
        return await insist(ask)

    async def start_run(
        self, workflow: Workflow[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *,
        id: str | None = None, mode: Mode | None = None, timeout: Duration | None = None,
        priority: int = 0,
    ) -> Run[Any]:  # fmt: skip
        chosen = id or self._process.new_id()
        start = super().start_run
        return await self._insist(
            lambda: start(
                workflow, args, kwargs, id=chosen, mode=mode, timeout=timeout, priority=priority
            )
        )

    async def send(self, run: str, event: Any, id: str | None) -> None:
        chosen = id or self._process.new_id()
        send = super().send
        await self._insist(lambda: send(run, event, chosen))

    async def publish(
        self, event: Any, *, source: str = "client", id: str | None = None,
        conversation: str | None = None, traceparent: str = "",
    ) -> str:  # fmt: skip
        chosen = id or self._process.new_id()
        publish = super().publish
        return await self._insist(
            lambda: publish(
                event, source=source, id=chosen, conversation=conversation, traceparent=traceparent
            )
        )

    async def request(self, run: str, kind: str) -> None:
        request = super().request
        await self._insist(lambda: request(run, kind))

    async def retry(self, run: str) -> None:
        retry = super().retry
        await self._insist(lambda: retry(run))

    async def fork(self, run: str, at: str | int, id: str | None) -> str:
        chosen = id or self._process.new_id()
        fork = super().fork
        return await self._insist(lambda: fork(run, at, chosen))

    async def _wait_one(self, id: str, home: str) -> RunRow:
        await self._insist(lambda: self.home_row(id))  # there must be one
        await self.simulation.ended(id)  # asking the store again and again would take long
        wait = super()._wait_one
        return await self._insist(lambda: wait(id, home))

    async def history(self, id: str) -> RunHistory:
        history = super().history
        return await self._insist(lambda: history(id))

    async def runs(self, which: RunFilter | None = None) -> list[RunStatus]:
        look = super().runs
        return await self._insist(lambda: look(which))
