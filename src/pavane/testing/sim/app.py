"""An app in simulation, as those see it who test it: what they can do, and what they can look at.

What happens takes no real time, and looking takes no time at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from copy import copy
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, Generic, TypeVar

import msgspec

from pavane.app import App, Client, Run, RunStatus
from pavane.cli.runs.record import read_list, read_timeline
from pavane.core.baton import ENDED
from pavane.core.operations import Mode
from pavane.engine.config import EngineConfig
from pavane.engine.publishing import read_event
from pavane.errors import BadArguments
from pavane.event import is_event_type
from pavane.handler import Handler
from pavane.insight.timeline import Timeline
from pavane.policy import Duration, seconds
from pavane.service import Service, Step
from pavane.steering.dead import DeadLetter
from pavane.stores.port import RunFilter
from pavane.testing.sim.calls import Calls
from pavane.testing.sim.checks import is_settled
from pavane.testing.sim.clock import Stalled
from pavane.testing.sim.customer import Customer, check_inside
from pavane.testing.sim.database import at_once
from pavane.testing.sim.leap import Leaper
from pavane.testing.sim.simulation import Simulation
from pavane.testing.sim.storm import calm
from pavane.workflow import KEEPER, Workflow

R = TypeVar("R")
T = TypeVar("T")
World = TypeVar("World")

LEASE_S = 0.6
FOR_EVER_S = 1e9
CALLBACKS_MAX = 5_000_000
"""More than anybody waits for: some minutes, or two days of a run that wakes each second."""
SETTLING_MAX = 200_000
"""More than it takes until all has happened that waits for nothing, were it 30,000 events."""
NAMED_MAX = 3
ALL = 1_000_000
_OURS = str(Path(__file__).parents[2])


class Sim(Generic[World]):
    """An app in simulation, with its own database, processes, clock and world outside.

    Runs, events and handlers behave as in production, except that time is virtual: whoever waits
    for a month has it over at once. `world` is what `rehearse(…, world=…)` made for this seed.
    """

    def __init__(
        self, app: App, simulation: Simulation, calls: Calls, world: World, mode: Mode | None = None
    ) -> None:
        self.world = world
        self.seed = simulation.seed
        self.mode: Mode | None = mode
        """In which mode all runs are; None: in that which they are declared or started with."""
        self.random = Random(f"scenario {simulation.seed}")
        """For choices of a scenario: the same for the same seed."""
        self._app = app
        self._calls = calls
        self._simulation = simulation
        self._leaper = Leaper(simulation)
        self._onlooker = Client(app.registry, simulation.database.root.connect(), [], app.config)
        self._look(self._onlooker.store.open())
        self._client: Customer | None = None
        self._callbacks_max = CALLBACKS_MAX
        self.is_played = False

    # -- acting --------------------------------------------------------------------------------

    async def run(
        self, workflow: Workflow[..., R], *args: Any, id: str | None = None,
        mode: Mode | None = None, timeout: Duration | None = None, **kwargs: Any,
    ) -> R:  # fmt: skip
        """Start a run and return its result; raise RunFailed if it does not complete."""
        run = await self.start(workflow, *args, id=id, mode=mode, timeout=timeout, **kwargs)
        return await run.result()

    async def start(
        self, workflow: Workflow[..., R], *args: Any, id: str | None = None,
        mode: Mode | None = None, timeout: Duration | None = None, **kwargs: Any,
    ) -> Run[R]:  # fmt: skip
        """Start a run; see `App.start`."""
        if not isinstance(workflow, Workflow):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise BadArguments(
                f"{workflow!r} is no workflow. Give the function that is decorated with "
                f"@service.workflow."
            )
        return await self._customer().start_run(
            workflow, args, kwargs, id=id, mode=self.mode or mode, timeout=timeout
        )

    async def publish(self, event: Any, *, id: str | None = None) -> str:
        """Publish an event; see `App.publish`. What it leads to follows: see `settle`."""
        return await self._customer().publish(event, source=self._app.name, id=id)

    def get(self, id: str) -> Run[Any]:
        """Return a handle on the run of this id, to send to it, cancel it, await its result."""
        return self._customer().get(id)

    async def skip(self, duration: Duration) -> None:
        """Let time pass, and all happen that is due by then."""
        check_inside(self._simulation)
        await asyncio.sleep(seconds(duration))
        await self.settle()

    async def settle(self) -> None:
        """Return when everything has happened that does not wait for a later time or for you.

        Steps, handlers and their retries are through then; timers of runs have not fired. What
        never is, such as a step that polls for ever, makes it raise Stalled.
        """
        check_inside(self._simulation)
        self._callbacks_max = self._simulation.trace.callbacks + SETTLING_MAX
        try:
            await self._leaper.settle()
        finally:
            self._callbacks_max = CALLBACKS_MAX

    # -- making trouble ------------------------------------------------------------------------

    def replace(self, step: Step[..., Any] | Callable[..., Any], fake: Callable[..., Any]) -> None:
        """Let `fake`, async or not, do what a step or handler does; it is called with the same.

        One that stands in for what runs inside a transaction is called without the connection.
        """
        self._calls.replace(step, fake)

    def fails(
        self, step: Step[..., Any] | Callable[..., Any], times: int = 1,
        error: BaseException | None = None,
    ) -> None:  # fmt: skip
        """Let the next attempts of a step or handler fail, before they do anything."""
        if not isinstance(times, int) or times < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise BadArguments(f"times={times!r}: how many attempts fail is a number from 1.")
        if error is not None and not isinstance(error, BaseException):  # pyright: ignore
            raise BadArguments(
                f'error={error!r} is no exception. Write one: error=ValueError("card declined").'
            )
        default = ConnectionError(f"{self._calls.find(step)!r} fails (simulated)")
        self._calls.fail(step, [error or default] * times)

    def crash_after(self, step: Step[..., Any] | Callable[..., Any]) -> None:
        """Kill the process when a step or handler has done its work the next time.

        Nothing of it was written down, so another process, which is there soon, does it again.
        """
        self._calls.crash_after(step)

    # -- looking -------------------------------------------------------------------------------

    @property
    def now(self) -> datetime:
        """The time of the simulation, in UTC; it begins in June 2025."""
        return datetime.fromtimestamp(self._simulation.clock.now_us / 1e6, UTC)

    def calls(self, step: Step[..., Any] | Callable[..., Any]) -> list[tuple[Any, ...]]:
        """Return the arguments of each attempt of a step or handler so far, in order."""
        return self._calls.made(step)

    def published(self, event: type[T]) -> list[T]:
        """Return all events of this class that were published, in order."""
        if not is_event_type(event):
            raise BadArguments(f"published({event!r}) must be given an event class.")
        described: Any = event
        log = self._simulation.database.root._data.events.log  # pyright: ignore
        return [read_event(event, row) for row in log if row.type == described.event_type]

    def dead_letters(self) -> list[DeadLetter]:
        """Return the events that handlers gave up, oldest first, each with its error."""
        dead = self._onlooker.dead
        return [self._look(dead.get(row.no)) for row in self._look(dead.list(limit=ALL))]

    def runs(self) -> list[RunStatus]:
        """Return what can be told of all runs, in the order in which they were started."""
        return [status for status in self._all_runs() if not status.id.startswith(KEEPER)]

    def keepers(self) -> list[RunStatus]:
        """Return the runs that keep the app's schedules."""
        return [status for status in self._all_runs() if status.id.startswith(KEEPER)]

    def _all_runs(self) -> list[RunStatus]:
        return self._look(read_list(self._onlooker, RunFilter(limit=ALL)))[::-1]

    def result(self, run: str) -> Any:
        """Return the result of a run that has ended; raise RunFailed if it did not complete."""
        row = self._look(self._onlooker.home_row(run))
        while row.status == "continued" and row.result is not None:
            row = self._look(self._onlooker.home_row(msgspec.json.decode(row.result, type=str)))
        if row.ended_us is None:
            raise BadArguments(f"Run {run!r} has not ended; it is {row.status}.")
        return self._onlooker.outcome(row)

    def timeline(self, run: str) -> Timeline:
        """Return what became of each operation of a run, as `pavane runs show` draws it."""
        return self._look(read_timeline(self._onlooker, run))

    # -- inside --------------------------------------------------------------------------------

    def play(self, test: Coroutine[Any, Any, T]) -> T:
        """Let a coroutine act in the simulation and time pass until it has ended."""
        __tracebackhide__ = True
        if self.is_played:
            test.close()
            raise BadArguments("A simulation is played once; make another one for another test.")
        self.is_played = True
        simulation = self._simulation
        with simulation.staged(), self._calls.standing_in(simulation, self.mode):
            task = simulation.shop.spawn(test)
            try:
                simulation.clock.run(lambda: self._is_over(task), FOR_EVER_S)
            except Stalled as stalled:
                raise _awaited_for_ever(
                    test, f"{stalled} {is_settled(simulation.database)}{self._under_way()}"
                ) from None
            return task.result()

    def _is_over(self, test: asyncio.Task[Any]) -> bool:
        """Tell whether the test has ended; raise Stalled if what it awaits takes too much."""
        simulation = self._simulation
        if simulation.trace.callbacks > self._callbacks_max:
            is_settling = self._callbacks_max != CALLBACKS_MAX
            count = SETTLING_MAX if is_settling else CALLBACKS_MAX
            raise Stalled(
                f"Something still goes on after {count:,} callbacks, at "
                f"{simulation.clock.at_us / 1e6:,.0f} s of virtual time."
            )
        return test.done()

    def _under_way(self) -> str:
        """Say which operations of runs are open, and which step or handler was called most."""
        said = ""
        runs = [status for status in self.runs() if status.status not in ENDED]
        for status in runs[:NAMED_MAX]:
            spans = self.timeline(status.id).spans
            names = [span.label for span in spans if span.ended_us is None]
            if names:
                said += f" {status.id} waits for {', '.join(names[:NAMED_MAX])}."
        services = self._app.registry.services.values()
        calls = {
            repr(called): len(self.calls(called))
            for service in services for called in (*service.steps.values(), *_handlers(service))
        }  # fmt: skip
        most = max(calls, key=lambda name: calls[name], default="")
        if calls.get(most, 0) > 1:
            said += f" {most} was called {calls[most]:,} times."
        return said

    def _look(self, coro: Coroutine[Any, Any, T]) -> T:
        """Ask the database something, at once."""
        return at_once(lambda: coro)

    def _customer(self) -> Customer:
        if self._client is None:
            self._client = Customer(self._app.registry, self._app.config, self._simulation)
        return self._client


def _handlers(service: Service) -> list[Handler]:
    """Return the handlers of a service that start no run."""
    return [handler for handler in service.handlers.values() if handler.starts is None]


def simulated(app: App, config: EngineConfig | None = None) -> App:
    """Return an app of the same declarations with settings that suit a simulation."""
    changed = copy(app)
    changed.config = config or msgspec.structs.replace(
        app.config, lease_s=LEASE_S, retention_s=FOR_EVER_S
    )
    return changed


class _Calm:
    """A scenario without a storm: the test itself is the customer."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def customer(self, sim: Simulation, client: Client) -> None: ...

    def check(self, sim: Simulation) -> None: ...


def calm_sim(app: App, fakes: Mapping[Any, Callable[..., Any]] | None = None) -> Sim[None]:
    """Return an app in simulation on one node, where nothing goes wrong by itself."""
    own, storm = simulated(app), calm(len(app.registry.services))
    simulation = Simulation(_Calm(own), 0, "orchestration", storm=storm)
    return Sim(own, simulation, Calls(own, fakes or {}, takes_time=False), None)


def _awaited_for_ever(test: Any, why: str) -> BaseException:
    """Return the error of a test that awaits what never comes, as if raised where it does."""
    error = Stalled(f"What is awaited here does not come. {why}".strip())
    try:
        test.throw(error)
    except BaseException as raised:
        return raised.with_traceback(_users_part(raised.__traceback__))
    return error


def _users_part(trace: TracebackType | None) -> TracebackType | None:
    """Return a traceback without the frames of Pavane, between which the user's are."""
    if trace is None:
        return None
    rest = _users_part(trace.tb_next)
    if trace.tb_frame.f_code.co_filename.startswith(_OURS):
        return rest
    return TracebackType(rest, trace.tb_frame, trace.tb_lasti, trace.tb_lineno)
