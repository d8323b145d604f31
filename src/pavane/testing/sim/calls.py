"""What stands between the engine and a user's steps and handlers while an app is simulated.

Each call passes here: it is counted, may be made to fail or be done by a fake, and may end its
process. With `takes_time` it goes to the outside world of the simulation and back, which takes a
while either way, so that a kill may come before it takes effect, and after, and in a storm the
way may fail. Apps stay as they are: what is changed in them is changed back in the end.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from random import Random
from typing import Any

from msgspec.structs import replace

from pavane.app import App
from pavane.core.operations import Mode
from pavane.errors import BadArguments, NotInSimulation
from pavane.handler import Handler, current_handler
from pavane.service import Step, current_step, step_info
from pavane.testing.sim.process import here
from pavane.testing.sim.simulation import Simulation

RESTART_US = 10_000
_CLOCKS = ("monotonic", "perf_counter", "time")

Called = Step[..., Any] | Handler
Fakes = Mapping[Any, Callable[..., Any]]
"""Functions by the steps or handlers that they stand in for."""


class Calls:
    """All calls of the steps and handlers of an app in one simulation."""

    def __init__(self, app: App, fakes: Fakes, *, takes_time: bool) -> None:
        self._app = app
        self._simulation: Simulation | None = None
        self._takes_time = takes_time
        services = app.registry.services.values()
        self._steps = [step for service in services for step in service.steps.values()]
        self._handlers = [
            handler for service in services for handler in service.handlers.values()
            if handler.starts is None
        ]  # fmt: skip
        self._own = {called: called.fn for called in (*self._steps, *self._handlers)}
        self._in_transaction = {
            *(step for step in self._steps if step.transaction),
            *(handler for handler in self._handlers if handler.options.transaction),
        }
        self._fakes: dict[Called, Callable[..., Any]] = {}
        self._errors: dict[Called, deque[BaseException]] = {}
        self._crashes: Counter[Called] = Counter()
        self._made: dict[Called, list[tuple[Any, ...]]] = {}
        self._done_us: dict[tuple[str, str], list[int]] = {}
        """When each call was done, by what it was and its idempotency key."""
        self.left: NotInSimulation | None = None
        """The first error of a call that tried to leave the simulation."""
        for called, fake in fakes.items():
            self.replace(called, fake)

    def find(self, called: Any) -> Called:
        """Return the step, or the handler that a function is; raise BadArguments."""
        for known, fn in self._own.items():
            same_step = (
                isinstance(called, Step) and isinstance(known, Step)
                and (called.service.name, called.name) == (known.service.name, known.name)
            )  # fmt: skip
            if same_step or known is called or fn is called:
                return known
        raise BadArguments(
            f"{called!r} is no step or handler of app {self._app.name!r}. It has: "
            f"{', '.join(map(repr, self._own)) or 'none'}."
        )

    # -- what tests ask for --------------------------------------------------------------------

    def replace(self, called: Any, fake: Callable[..., Any]) -> None:
        if not callable(fake):
            raise BadArguments(f"{fake!r} cannot stand in for {called!r}: it is no function.")
        self._fakes[self.find(called)] = fake

    def fail(self, called: Any, errors: list[BaseException]) -> None:
        self._errors.setdefault(self.find(called), deque()).extend(errors)

    def crash_after(self, called: Any) -> None:
        self._crashes[self.find(called)] += 1

    def made(self, called: Any) -> list[tuple[Any, ...]]:
        return list(self._made.get(self.find(called), ()))

    def repeated(self) -> list[tuple[str, list[int]]]:
        """Return what was done more than once under one idempotency key, and when."""
        return [(what, done_us) for (what, _), done_us in self._done_us.items() if done_us[1:]]

    # -- standing in ---------------------------------------------------------------------------

    @contextmanager
    def standing_in(self, simulation: Simulation, mode: Mode | None) -> Generator[None]:
        """Have all calls pass here, and all runs in `mode`, until the block ends."""
        self._simulation = simulation
        workflows = list(self._app.registry.workflows.values())
        modes: list[Mode] = [workflow.mode for workflow in workflows]
        callables: list[Any] = list(self._own)
        before = [(it.fn, it.is_async) for it in callables]
        transactions = [step.transaction for step in self._steps]
        options = [handler.options for handler in self._handlers]
        try:
            for it in callables:
                it.fn, it.is_async = partial(self._call, it), True
            for step in self._steps:
                step.transaction = False
            for handler in self._handlers:
                handler.options = replace(handler.options, transaction=False)
            for workflow in workflows:
                workflow.mode = mode or workflow.mode
            yield
        finally:
            for it, (fn, is_async) in zip(callables, before, strict=True):
                it.fn, it.is_async = fn, is_async
            for step, transaction in zip(self._steps, transactions, strict=True):
                step.transaction = transaction
            for handler, was in zip(self._handlers, options, strict=True):
                handler.options = was
            for workflow, was in zip(workflows, modes, strict=True):
                workflow.mode = was

    def _function(self, called: Called) -> Callable[..., Any]:
        return self._fakes.get(called, self._own[called])

    async def _call(self, called: Called, *args: Any, **kwargs: Any) -> Any:
        process, simulation = here.get(), self._simulation
        is_plain = current_step.get() is None and current_handler.get() is None
        if process is None or simulation is None or is_plain:  # just a function
            return await self._do(called, args, kwargs)
        if called in self._in_transaction and called not in self._fakes:
            error = _without_transaction(called)
            self.left = self.left or error
            raise error
        bound = inspect.signature(self._function(called)).bind(*args, **kwargs)
        bound.apply_defaults()
        self._made.setdefault(called, []).append(tuple(bound.arguments.values()))
        work = partial(self._noted, simulation, called, args, kwargs)
        errors = self._errors.get(called)
        if errors:
            raise errors.popleft().with_traceback(None)  # it may have been raised before
        if self._takes_time:
            made = len(self._made[called])
            chance = Random(f"{simulation.seed} {called!r} {made}")
            answer = await simulation.outside.reach(repr(called), work, chance)
        else:
            answer = await work()
        if self._crashes[called]:
            self._crashes[called] -= 1
            await self._crash(simulation, repr(called))
        return answer

    async def _noted(
        self, simulation: Simulation, called: Called, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        what = f"{called!r}({', '.join(map(repr, args))})"
        key = (what, step_info().idempotency_key)
        self._done_us.setdefault(key, []).append(simulation.clock.at_us)
        try:
            return await self._do(called, args, kwargs)
        except NotInSimulation as error:
            self.left = self.left or error
            raise

    async def _do(self, called: Called, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the function or its fake: at one instant, unless it awaits something."""
        fn = self._function(called)
        if not inspect.iscoroutinefunction(fn):
            # What a thread raises comes back as a value: not all of it passes through a future.
            work: Any = partial(copy_context().run, _tried, fn, args, kwargs)
            answer, error, slept_s = await asyncio.get_running_loop().run_in_executor(None, work)
            if slept_s:
                await asyncio.sleep(slept_s)
            if error is not None:
                raise error
            return await answer if inspect.isawaitable(answer) else answer
        return await fn(*args, **kwargs)

    async def _crash(self, simulation: Simulation, what: str) -> None:
        process = here.get()
        for node in simulation.nodes:
            if node.process is process:
                simulation.clock.note(f"fault: {node.name} is about to die after {what}")
                node.kill()
                simulation.clock.after(RESTART_US, node.start)
        await asyncio.get_running_loop().create_future()  # which a dead process never does


def _without_transaction(called: Called) -> NotInSimulation:
    return NotInSimulation(
        f"{called!r} runs inside a transaction of the store's database, which a simulation has "
        f"not. Let a fake stand in: sim.replace({called.name}, fake), or "
        f"rehearse(…, fakes={{{called.name}: fake}}). It is called without the connection."
    )


Tried = tuple[Any, BaseException | None, float]


def _tried(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tried:
    """Return the answer or error of a plain function, and how long it wanted to sleep."""
    slept_s = 0.0

    def sleep(duration_s: float) -> None:
        nonlocal slept_s
        slept_s += duration_s

    def after_sleep(clock: Callable[[], float]) -> float:
        return clock() + slept_s

    before = {name: getattr(time, name) for name in ("sleep", *_CLOCKS)}
    time.sleep = sleep
    for name in _CLOCKS:  # or who polls until a time would do so for as long as it really takes
        setattr(time, name, partial(after_sleep, before[name]))
    try:
        return fn(*args, **kwargs), None, slept_s
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return None, error, slept_s
    finally:
        for name, function in before.items():
            setattr(time, name, function)
