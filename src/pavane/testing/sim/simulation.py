"""One simulation: nodes and a customer on one database, a storm, and what came of it.

The same seed repeats everything. When the storm is over everything heals, and then the customer
must get its answers and every run, event and step its end, within bounded virtual time.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import msgspec

from pavane.app import App, Client
from pavane.core.baton import ENDED
from pavane.core.operations import Mode
from pavane.errors import PavaneError
from pavane.stores.port import Commit, Fence
from pavane.testing.sim.checks import Ledger, Violation, check_results, is_settled
from pavane.testing.sim.clock import Clock, Stalled
from pavane.testing.sim.database import Database, Weather
from pavane.testing.sim.outside import Outside, outside
from pavane.testing.sim.process import SimNode, SimProcess
from pavane.testing.sim.storm import CUSTOMER, Fault, Kind, Storm, draw_storm
from pavane.testing.sim.trace import Trace

WITHIN_S = 120.0
LOOK_S = 0.05
AMBIGUOUS = 0.2
FAILING = 0.5
PARTITIONS = 4
KILLED_WITHIN_US = 5_000


class Scenario(Protocol):
    """What is simulated: an app, its customer, and what must be true in the end."""

    app: App

    def customer(self, sim: Simulation, client: Client) -> Awaitable[None]:
        """Ask for things and return when all answers have come; the store may fail meanwhile."""
        ...

    def check(self, sim: Simulation) -> None:
        """Raise Violation if something is wrong after everything has ended."""
        ...


class Outcome(msgspec.Struct):
    """What came of one seed."""

    seed: int
    mode: Mode
    violation: str
    digest: str
    callbacks: int
    virtual_s: float
    storm: Storm
    lines: list[str]


class Simulation:
    """See the module."""

    def __init__(
        self, scenario: Scenario, seed: int, mode: Mode, *, storm: Storm | None = None,
        verbose: bool = False,
    ) -> None:  # fmt: skip
        self.scenario = scenario
        self.seed = seed
        self.mode: Mode = mode
        self.trace = Trace(verbose=verbose)
        self.clock = Clock(seed, self.trace)
        self.database = Database(self.clock, PARTITIONS)
        self.outside = Outside(self.clock)
        self.ledger = Ledger(self.database)
        self.outside.watchers.append(self.ledger.requested)
        self.storm = storm or draw_storm(seed, len(scenario.app.registry.services))
        self.processes: dict[tuple[str, int], SimProcess] = {}
        self.is_over = False
        self.is_healed = False
        self._awaited: dict[str, list[asyncio.Future[None]]] = {}
        self.database.watchers.append(self._tell_ends)
        self._failure: BaseException | None = None
        names = sorted(scenario.app.registry.services)
        self.nodes = [
            SimNode(
                scenario.app, f"node{index}", [names[number] for number in hosted],
                partial(self._begin, "one" if self.storm.same_host else f"host{index}"),
            )
            for index, hosted in enumerate(self.storm.layout)
        ]  # fmt: skip
        self.shop = self._begin("customer's", "customer")

    def _begin(self, host: str, name: str) -> SimProcess:
        number = len(self.processes) + 1
        process = SimProcess(self.clock, self.database, name, host, number)
        process.pids = self.processes
        process.skew_us = self.clock.between(-self.storm.skew_us, self.storm.skew_us)
        self.processes[host, number] = process
        return process

    def run(self) -> Outcome:
        """Run to the end; a violation is in the outcome, anything else is raised."""
        violation = ""
        with self.staged():
            try:
                self.shop.spawn(self.customer())
                self.clock.run(lambda: self.is_over, self.storm.ends_us / 1e6 + WITHIN_S)
                if self._failure is not None:
                    raise self._failure
                self.ledger.check()
                check_results(self.database, self.scenario.app)
                self.scenario.check(self)
            except Violation as found:
                violation = str(found)
            except Stalled as stalled:
                violation = f"{stalled} {is_settled(self.database) or 'The customer waits.'}"
        return Outcome(
            self.seed, self.mode, violation, self.trace.digest, self.trace.callbacks,
            self.clock.at_us / 1e6, self.storm, self.trace.lines,
        )  # fmt: skip

    @contextmanager
    def staged(self) -> Generator[None]:
        """Have nodes and storm ahead of whoever lets time pass, and nothing left behind."""
        token = outside.set(self.outside)
        with _calm_collector():
            try:
                self._schedule()
                yield
            finally:
                self.outside.is_closed = True
                self.clock.close()
                outside.reset(token)

    async def customer(self) -> None:
        """Be the customer of the scenario until everything has ended."""
        try:
            client = Client(
                self.scenario.app.registry, self.shop.store, [], self.scenario.app.config, (),
                self.shop,
            )  # fmt: skip
            await insist(client.open)
            await self.scenario.customer(self, client)
            while not self.is_healed or is_settled(self.database):
                await asyncio.sleep(LOOK_S)
        except BaseException as error:
            self._failure = error
        self.is_over = True

    # -- what scenarios ask --------------------------------------------------------------------

    async def ended(self, run: str) -> None:
        """Return when the end of a run is in the store.

        Asking a client for it, who looks again and again, is most of what there is to simulate.
        """
        data: Any = self.database.root._data  # pyright: ignore[reportPrivateUsage]
        if not data.is_over(run) or not data.runs_of(run):
            future = asyncio.get_running_loop().create_future()
            self._awaited.setdefault(run, []).append(future)
            await future

    def break_off(self, violation: str) -> None:
        """End here, at once: something has happened that must not."""
        self._failure = Violation(violation)
        self.is_over = True

    def _tell_ends(
        self, batch: Sequence[Commit], fence: Fence | None, results: Sequence[PavaneError | None]
    ) -> None:
        for commit, refused in zip(batch, results, strict=True):
            for row in commit.runs if refused is None else ():
                if row.service == row.home and row.status in ENDED:
                    for future in self._awaited.pop(row.id, ()):
                        future.set_result(None)

    # -- the storm -----------------------------------------------------------------------------

    def _schedule(self) -> None:
        for node in self.nodes:
            self.clock.after(self.clock.between(0, 50_000), node.start)
        for fault in self.storm.faults:
            self.clock.after(fault.at_us, partial(self._happen, fault))
        self.clock.after(self.storm.ends_us, self._heal)

    def _happen(self, fault: Fault) -> None:
        weather = self.database.weather
        if fault.kind in ("kill", "stop", "freeze", "stick"):
            self._strike(self.nodes[fault.node], fault)
            return
        self.clock.note(f"fault: {fault}")
        ends = partial(self._end, fault)
        if fault.kind in ("cut", "unreachable"):
            process = self.shop if fault.node == CUSTOMER else self.nodes[fault.node].process
            if process is None or not process.is_alive:
                return
            process.store.cut(told=True)
            if fault.kind == "cut":
                return
            weather.unreachable.add(process.number)
            ends = partial(weather.unreachable.discard, process.number)
        elif fault.kind == "stall":
            weather.stalled_until_us = self.clock.now_us + fault.for_us
        else:
            self._turn(fault.kind, on=True)
        self.clock.after(fault.for_us, ends)

    def _end(self, fault: Fault) -> None:
        self.clock.note(f"fault over: {fault.kind}")
        self._turn(fault.kind, on=False)

    def _turn(self, kind: Kind, *, on: bool) -> None:
        """Begin or end what is wrong for everybody; a stall knows its own end."""
        weather = self.database.weather
        if kind == "down":
            weather.is_down = on
        elif kind == "full":
            weather.is_full = on
        elif kind == "slow":
            weather.is_slow = on
        elif kind == "ambiguous":
            weather.ambiguous = AMBIGUOUS if on else 0.0
        elif kind == "outside":
            self.outside.failing = FAILING if on else 0.0

    def _strike(self, node: SimNode, fault: Fault) -> None:
        process = node.process
        if process is None or not process.is_alive:
            return
        if fault.kind == "kill":
            kill = partial(self._kill, node, process)
            process.loop.after_callbacks(fault.callbacks, kill)
            self.clock.after(KILLED_WITHIN_US, kill)  # should it have nothing to do
            self.clock.after(fault.for_us, node.start)
        elif fault.kind == "stop":
            node.stop()
            self.clock.after(fault.for_us, node.start)
        else:
            process.freeze(thread=fault.kind == "freeze")
            self.clock.after(fault.for_us, process.thaw)

    def _kill(self, node: SimNode, process: SimProcess) -> None:
        if node.process is process:
            node.kill()

    def _heal(self) -> None:
        self.is_healed = True
        self.clock.note("the storm is over")
        self.database.weather = Weather()
        self.outside.failing = 0.0
        for process in self.processes.values():
            process.thaw()
        self._keep_all_running()

    def _keep_all_running(self) -> None:
        """Start what is not running, from now on."""
        for node in self.nodes:
            node.start()
        self.clock.after(500_000, self._keep_all_running)


async def insist(ask: Callable[[], Awaitable[Any]], pause_s: float = 0.1) -> Any:
    """Ask again while the store fails, as a customer would who must know."""
    while True:
        try:
            return await ask()
        except PavaneError as error:
            if error.code not in ("store", "lease-lost"):
                raise
        await asyncio.sleep(pause_s)


@contextmanager
def _calm_collector() -> Generator[None]:
    """Leave the garbage collector's limits, which nodes change, as they were."""
    before = gc.get_threshold()
    try:
        yield
    finally:
        gc.set_threshold(*before)
