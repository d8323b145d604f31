"""Virtual time, and an event loop for each simulated process.

Each process has a loop of its own, as real ones have, and all loops share one clock and one order.
Within a process callbacks run in the order in which they became ready, which asyncio promises;
which process is next is the seed's choice. When nobody has anything to do, the clock jumps to the
next timer. Every callback takes a microsecond, so that nothing can loop without time passing.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from heapq import heappop, heappush
from math import ceil
from random import Random
from typing import Any

from pavane.core.loop import WorkflowLoop, tell
from pavane.testing.sim.seclusion import refusal
from pavane.testing.sim.trace import Trace

log = logging.getLogger("pavane.sim")

EPOCH_US = 1_750_000_000_000_000
THREAD_MAX_US = 3_000
CLOSE_TRIES_MAX = 100


class Stalled(Exception):
    """What was waited for did not come within the virtual time allowed."""


class Lost(BaseException):
    """Thrown into what is left of a simulation that is over."""


class SimTask(asyncio.Task[Any]):
    """A task whose place in a set does not depend on its address."""

    __slots__ = ("ordinal",)
    ordinal: int

    def __hash__(self) -> int:
        return _ordinal(self)


class SimFuture(asyncio.Future[Any]):
    """A future whose place in a set does not depend on its address."""

    __slots__ = ("ordinal",)
    ordinal: int

    def __hash__(self) -> int:
        return _ordinal(self)


def _ordinal(it: Any) -> int:
    """Number a task or future when it is asked for first: most futures never are in a set."""
    try:
        return it.ordinal
    except AttributeError:
        it.ordinal = it.get_loop().clock.next_serial()
        return it.ordinal


class SimHandle:
    """A callback that may be given up: what asyncio's handles are, without what they cost."""

    __slots__ = ("args", "callback", "context", "is_cancelled", "when_s")
    callback: Any
    args: Any

    def __init__(self, callback: Any, args: Any, context: Context, when_s: float = 0.0) -> None:
        self.callback = callback
        self.args = args
        self.context = context
        self.is_cancelled = False
        self.when_s = when_s

    def cancel(self) -> None:
        self.is_cancelled = True
        self.callback = self.args = None  # it may be kept until its time comes

    def cancelled(self) -> bool:
        return self.is_cancelled

    def when(self) -> float:
        return self.when_s

    def run(self) -> None:
        try:
            self.context.run(self.callback, *self.args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            tell(log, {"message": f"Exception in callback {self.callback}", "exception": error})


class Clock:
    """Virtual time, all timers, and whose turn it is."""

    def __init__(self, seed: int, trace: Trace) -> None:
        self.now_us = EPOCH_US
        self.trace = trace
        self.random = Random(seed)
        self.loops: list[SimLoop] = []
        self.timers: list[tuple[int, int, SimLoop | None, Any]] = []
        self.leaped_us = 0
        """How much of the time was leapt over because nothing happened in it."""
        self.ends_us = sys.maxsize
        self.quiet_us = sys.maxsize
        self.on_quiet: Callable[[], None] = _nothing
        """Called when no process has anything to do before a time after `quiet_us`."""
        self._ready: list[SimLoop] = []
        self._serial = 0

    @property
    def at_us(self) -> int:
        """Virtual time since the beginning."""
        return self.now_us - EPOCH_US

    def next_serial(self) -> int:
        self._serial += 1
        return self._serial

    def note(self, text: str) -> None:
        self.trace.note(self.at_us, text)

    def between(self, low_us: int, high_us: int) -> int:
        """Draw a number of microseconds."""
        return low_us + int(self.random.random() * (high_us - low_us + 1))

    def chance(self, probability: float) -> bool:
        return probability > 0 and self.random.random() < probability

    # -- timers --------------------------------------------------------------------------------

    def at(self, when_us: int, happen: Callable[[], None]) -> None:
        """Let something happen that is not a process's doing."""
        self._serial += 1
        heappush(self.timers, (when_us, self._serial, None, happen))

    def after(self, delay_us: int, happen: Callable[[], None]) -> None:
        self.at(self.now_us + delay_us, happen)

    def add_timer(self, when_us: int, loop: SimLoop, handle: SimHandle) -> None:
        self._serial += 1
        heappush(self.timers, (when_us, self._serial, loop, handle))

    def became_ready(self, loop: SimLoop) -> None:
        self._ready.append(loop)

    # -- running -------------------------------------------------------------------------------

    def run(self, is_over: Callable[[], bool], within_s: float) -> None:
        """Let time pass until `is_over()`; raise Stalled if it is not within so much of it."""
        self.ends_us = self.now_us + round(within_s * 1e6)
        timers, ready, random = self.timers, self._ready, self.random.random
        note, enter = self.trace.callback, events._set_running_loop
        outer, running = events._get_running_loop(), None
        enter(None)
        try:
            while not is_over():
                if not ready:
                    if not timers:
                        raise Stalled("Nothing is left to happen.")
                    if timers[0][0] > self.quiet_us:
                        self.on_quiet()
                    self.now_us = max(self.now_us, timers[0][0])
                now_us = self.now_us
                while timers and timers[0][0] <= now_us:
                    _, _, loop, what = heappop(timers)
                    if loop is None:
                        if running is not None:
                            enter(running := None)
                        what()
                    elif not what.is_cancelled:
                        loop.put(what)
                if now_us > self.ends_us:
                    raise Stalled(f"{within_s:g} s of virtual time were not enough.")
                if not ready:
                    continue
                turn = int(random() * len(ready)) if len(ready) > 1 else 0
                loop = ready[turn]
                waiting = loop.waiting
                if waiting and not loop.is_frozen:
                    handle = waiting.popleft()
                    if not handle.is_cancelled:
                        self.now_us = now_us + 1
                        loop.serial += 1
                        note(now_us - EPOCH_US, loop.number, handle.callback)
                        if running is not loop:
                            enter(running := loop)
                        handle.run()
                        if loop.serial == loop.watched_serial:
                            loop.reached()
                if not waiting or loop.is_frozen:
                    loop.is_queued = False
                    ready[turn] = ready[-1]
                    ready.pop()
        finally:
            enter(outer)

    def close(self) -> None:
        """End what still waits in any process, quietly; the simulation is over."""
        for execution in _executions():
            execution.discard()
        for loop in self.loops:
            loop.kill()
        for loop in self.loops:
            loop.bury()
        self.timers.clear()
        self._ready.clear()


class SimLoop(asyncio.AbstractEventLoop):
    """The event loop of one simulated process."""

    def __init__(self, clock: Clock, number: int) -> None:
        self.clock = clock
        self.number = number
        self.serial = 0
        self.watched_serial = -1
        self.waiting: deque[SimHandle] = deque()
        self.is_queued = False
        self.is_frozen = False
        self.is_alive = True
        self._lost: list[asyncio.Task[Any]] = []
        self._is_buried = False
        self._then: Callable[[], None] = _nothing
        self._since_us = clock.now_us - clock.between(0, 10**9)
        """When the machine was booted: monotonic clocks of processes have nothing in common."""
        clock.loops.append(self)

    # -- life and death ------------------------------------------------------------------------

    def kill(self) -> None:
        """Stop for ever, here: no callback runs any more, no `finally` and no clean-up."""
        if self.is_alive:
            self.is_alive = False
            # As long as somebody has them, Python does not close their coroutines.
            self._lost = list(asyncio.all_tasks(self))
            self.waiting.clear()

    def freeze(self) -> None:
        self.is_frozen = True

    def thaw(self) -> None:
        self.is_frozen = False
        if self.waiting and not self.is_queued:
            self.is_queued = True
            self.clock.became_ready(self)

    def bury(self) -> None:
        """Close what a killed process left, so that Python does not do so at some other time."""
        self._is_buried = True
        outer = events._get_running_loop()
        events._set_running_loop(self)
        try:
            lost, self._lost = self._lost, []
            for task in lost:
                task._log_destroy_pending = False  # pyright: ignore
                _end(task.get_coro())
        finally:
            events._set_running_loop(outer)

    def after_callbacks(self, count: int, happen: Callable[[], None]) -> None:
        """Let something happen right after so many more callbacks have run here."""
        if not count:
            happen()
            return
        self.watched_serial, self._then = self.serial + count, happen

    def reached(self) -> None:
        """So many callbacks have run."""
        self.watched_serial, then, self._then = -1, self._then, _nothing
        then()

    def put(self, handle: SimHandle) -> None:
        """Let a callback run soon."""
        if not self.is_alive:
            return
        self.waiting.append(handle)
        if not self.is_queued and not self.is_frozen:
            self.is_queued = True
            self.clock.became_ready(self)

    # -- what asyncio asks ---------------------------------------------------------------------

    def time(self) -> float:
        return (self.clock.now_us - self._since_us) / 1e6

    def call_soon(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, callback: Any, *args: Any, context: Context | None = None
    ) -> SimHandle:
        if self._is_buried:
            raise Lost
        handle = SimHandle(callback, args, context or copy_context())
        self.put(handle)
        return handle

    call_soon_threadsafe = call_soon  # pyright: ignore[reportAssignmentType]

    def call_later(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, delay: float, callback: Any, *args: Any, context: Context | None = None
    ) -> SimHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, when: float, callback: Any, *args: Any, context: Context | None = None
    ) -> SimHandle:
        if self._is_buried:
            raise Lost
        handle = SimHandle(callback, args, context or copy_context(), when)
        self.clock.add_timer(ceil(when * 1e6) + self._since_us, self, handle)
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        if self._is_buried:
            raise Lost
        return SimFuture(loop=self)

    def create_task(  # pyright: ignore
        self, coro: Coroutine[Any, Any, Any], *, name: str | None = None,
        context: Context | None = None, **options: Any,
    ) -> SimTask:  # fmt: skip
        if self._is_buried:
            coro.close()
            raise Lost
        return SimTask(coro, loop=self, name=name or "", context=context, **options)

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> asyncio.Future[Any]:  # pyright: ignore
        """Call `func` at one instant, as if a thread did, some time after now."""
        future = self.create_future()

        def work() -> None:
            events._set_running_loop(None)
            try:
                result, error = func(*args), None
            except Exception as raised:
                result, error = None, raised
            events._set_running_loop(self)
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        handle = SimHandle(work, (), Context())
        self.clock.add_timer(
            self.clock.now_us + self.clock.between(10, THREAD_MAX_US), self, handle
        )
        return future

    def is_running(self) -> bool:
        return events._get_running_loop() is self

    def is_closed(self) -> bool:
        return self._is_buried

    def get_debug(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        tell(log, context)

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.call_exception_handler(context)


def _refused(name: str) -> Callable[..., Any]:
    """Return the method of an event loop that would leave the simulation."""

    async def refuse(self: SimLoop, *args: Any, **options: Any) -> Any:
        raise refusal(name)

    return refuse


for _name in (
    "create_connection", "create_datagram_endpoint", "create_server", "create_unix_connection",
    "create_unix_server", "getaddrinfo", "getnameinfo", "sock_connect", "subprocess_exec",
    "subprocess_shell",
):  # fmt: skip
    setattr(SimLoop, _name, _refused(_name))
SimLoop.__abstractmethods__ = frozenset()  # pyright: ignore


def _nothing() -> None:
    pass


def _executions() -> list[WorkflowLoop]:
    """Find the loops of all runs whose workflow code waits for something."""
    if sys.version_info >= (3, 14):
        return [it for it in gc.get_objects() if isinstance(it, WorkflowLoop)]
    name = "_all_tasks" if sys.version_info < (3, 12) else "_scheduled_tasks"
    tasks: list[asyncio.Task[Any]] = list(getattr(asyncio.tasks, name))
    loops = dict.fromkeys(task.get_loop() for task in tasks if not task.done())
    return [loop for loop in loops if isinstance(loop, WorkflowLoop)]


def _end(coro: Any) -> None:
    """Throw into a coroutine until it has ended, also while its clean-up awaits."""
    for _ in range(CLOSE_TRIES_MAX):
        try:
            coro.throw(Lost())
        except BaseException:
            return
