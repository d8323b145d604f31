"""Simulated processes: started, killed without any clean-up, frozen and thawed, restarted.

Each runs `App` code unchanged, on an event loop and a view of the database of its own. What it has
in memory goes with it; the database and the outside world stay.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any

from pavane.app import App, Client
from pavane.engine.process import Process, Rounds
from pavane.errors import PavaneError
from pavane.stores.port import NodeRow
from pavane.testing.sim.clock import Clock, SimLoop
from pavane.testing.sim.database import Database

log = logging.getLogger("pavane.sim")

RESTART_PAUSE_S = 0.2
JITTER_US = 2_000

here: ContextVar[SimProcess | None] = ContextVar("pavane_sim_process", default=None)
"""The process in which the current code runs."""


class SimProcess(Process):
    """One process: its identity, its event loop, its second thread."""

    def __init__(self, clock: Clock, database: Database, name: str, host: str, number: int) -> None:
        # Nothing of this machine: `Process.__init__` would read it.
        self.clock = clock
        self.database = database
        self.name = name
        self.host = host
        self.pid = self.number = number
        self.random: Callable[[], float] = clock.random.random
        self.loop = SimLoop(clock, number)
        self.thread_is_frozen = False
        self.stuck_since_us = 0
        self.skew_us = 0
        self.store = database.view(self)
        self.pids: dict[tuple[str, int], SimProcess] = {}

    @property
    def is_alive(self) -> bool:
        return self.loop.is_alive

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Begin work in this process."""
        context = copy_context()
        context.run(here.set, self)
        return self.loop.create_task(work, context=context)

    # -- how it ends, or does not --------------------------------------------------------------

    def kill(self) -> None:
        """End it as SIGKILL does: here and now."""
        if self.is_alive:
            self.clock.note(f"fault: {self.name} is killed")
            self.loop.kill()
            self.store.cut(told=False)

    def freeze(self, *, thread: bool) -> None:
        """Stop it as SIGSTOP does; without its thread, as code that blocks the event loop does."""
        what = "is stopped" if thread else "has a stuck event loop"
        self.clock.note(f"fault: {self.name} {what}")
        self.stuck_since_us = self.clock.now_us
        self.loop.freeze()
        self.thread_is_frozen = thread

    def thaw(self) -> None:
        if self.loop.is_frozen:
            self.clock.note(f"{self.name} goes on")
            self.loop.thaw()
            self.thread_is_frozen = False

    # -- what the engine asks of its process ---------------------------------------------------

    def is_gone(self, node: NodeRow, now_us: int) -> bool:
        if node.expires_us < now_us:
            return True
        other = self.pids.get((node.host, node.pid))
        return node.host == self.host and (other is None or not other.is_alive)

    def new_id(self) -> str:
        return f"{self.clock.now_us:014x}{self.clock.random.getrandbits(40):010x}"

    def repeat(self, pause_s: Callable[[], float], work: Callable[[], bool]) -> Rounds:
        return SimRounds(self, pause_s, work)


class SimRounds:
    """A thread of a simulated process that does something again and again."""

    def __init__(
        self, process: SimProcess, pause_s: Callable[[], float], work: Callable[[], bool]
    ) -> None:
        self._process = process
        self._pause_s = pause_s
        self._work = work
        self._number = 0
        """Of the round that comes next: one that was hurried is not done again."""
        self._is_stopped = False
        self._wait(self._next_us())

    def _next_us(self) -> int:
        return round(self._pause_s() * 1e6) + self._process.clock.between(0, JITTER_US)

    def _wait(self, after_us: int) -> None:
        self._number += 1
        self._process.clock.after(after_us, partial(self._round, self._number))

    def _round(self, number: int) -> None:
        process = self._process
        if self._is_stopped or not process.is_alive or number != self._number:
            return
        if process.thread_is_frozen or self._work():
            self._wait(self._next_us())
        else:
            self._is_stopped = True  # whoever hurries it then finds no thread

    def hurry(self) -> None:
        self._wait(1)

    async def stop(self) -> None:
        self._is_stopped = True


class SimNode:
    """A worker and its place: after its process has ended, another may be started in it."""

    def __init__(
        self, app: App, name: str, services: Sequence[str], begin: Callable[[str], SimProcess]
    ) -> None:
        self.app = app
        self.name = name
        self.services = services
        self.process: SimProcess | None = None
        self.client: Client | None = None
        self.is_stopping = False
        self._begin = begin
        self._starts = 0

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.is_alive

    def start(self) -> None:
        """Start a process here unless one is running."""
        if self.is_alive:
            return
        self._starts += 1
        self.is_stopping = False
        self.process = self._begin(f"{self.name}.{self._starts}")
        self.process.clock.note(f"{self.process.name} starts")
        self.process.spawn(self._work(self.process))

    async def _work(self, process: SimProcess) -> None:
        """Be a worker; one that cannot open its store is started again, as a supervisor would."""
        app = self.app
        while True:
            client = Client(
                app.registry, process.store, self.services, app.config, app.monitors(), process
            )
            try:
                await client.open()
            except PavaneError as error:
                process.clock.note(f"{process.name} cannot start: {type(error).__name__}")
                await asyncio.sleep(RESTART_PAUSE_S)
            else:
                self.client = client
                return

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.client = None

    def stop(self) -> None:
        """Drain it in order, then end its process; one that does not work yet is killed."""
        process, client = self.process, self.client
        if process is None or client is None or not process.is_alive or self.is_stopping:
            return
        self.is_stopping = True
        self.client = None
        process.clock.note(f"{process.name} is asked to stop")
        process.spawn(self._leave(process, client))

    async def _leave(self, process: SimProcess, client: Client) -> None:
        with suppress(PavaneError):
            await client.close()
        process.clock.note(f"{process.name} stops")
        process.loop.call_soon(process.kill)
