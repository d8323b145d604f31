"""The event loop that workflow code runs on: deterministic, without a clock or a socket.

Time is the journal's; `call_at` becomes a durable timer operation; everything that would do I/O
raises. Tasks and futures hash by their ordinal in the run, so that the sets inside `asyncio.wait`
and `TaskGroup` iterate in the same order in every process.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from contextvars import Context, copy_context
from typing import Any, NoReturn
from zlib import crc32

from pavane.core import guard
from pavane.errors import Discarded, NotInWorkflow, PavaneError

log = logging.getLogger("pavane.workflow")

CLOSE_TRIES_MAX = 10
CALLBACKS_MAX = 1_000_000
"""Callbacks that one delivered entry may cause; more is a workflow that never waits."""


class WorkflowFuture(asyncio.Future[Any]):
    """A future that hashes by its ordinal, set by whoever makes it: an `__init__` takes long."""

    __slots__ = ("ordinal",)
    ordinal: int

    def __hash__(self) -> int:
        return self.ordinal


class WorkflowTask(asyncio.Task[Any]):
    """A task that hashes by its ordinal, and knows its context, which 3.11 does not tell."""

    __slots__ = ("context", "ordinal")

    def __init__(self, coro: Any, *, loop: WorkflowLoop, context: Context, **options: Any) -> None:
        self.ordinal = loop.next_ordinal()
        self.context = context
        super().__init__(coro, loop=loop, context=context, **options)

    def __hash__(self) -> int:
        return self.ordinal


class _Callback(asyncio.Handle):
    """A handle that is made without asking whether its loop is being debugged."""

    __slots__ = ()

    def __init__(
        self, callback: Any, args: tuple[Any, ...], loop: WorkflowLoop, context: Context | None
    ) -> None:
        self._context = copy_context() if context is None else context
        self._loop = loop
        self._callback = callback
        self._args = args
        self._cancelled = False
        self._repr = self._source_traceback = None


class DurableTimer(asyncio.TimerHandle):
    """A timer handle that knows its operation."""

    __slots__ = ("operation",)
    operation: int


class Runaway(PavaneError):
    """Workflow code keeps running without ever waiting for anything durable."""

    code = "runaway"


class WorkflowLoop(asyncio.AbstractEventLoop):
    """Runs the callbacks of one run in order, when told to; see the module's docstring.

    `on_timer(handle)` is called for each `call_at`, `on_timer_cancelled(handle)` when one is given
    up. The owner sets `now_us` and calls `run_ready`.
    """

    is_workflow = True
    """What `guard` asks the running loop."""

    def __init__(
        self,
        salt: str,
        on_timer: Callable[[DurableTimer], None],
        on_timer_cancelled: Callable[[DurableTimer], None],
    ) -> None:
        guard.install()
        # The high bits keep tasks of different runs apart in asyncio's own global sets.
        self._ordinal = (crc32(salt.encode()) & 0xFFFFFFFF) << 24
        self._ready: deque[asyncio.Handle] = deque()
        self._on_timer = on_timer
        self._on_timer_cancelled = on_timer_cancelled
        self.tasks: list[WorkflowTask] = []
        self._closing = False
        self._compact_at = 64
        self.now_us = 0

    def next_ordinal(self) -> int:
        self._ordinal += 1
        return self._ordinal

    # -- running -------------------------------------------------------------------------------

    def run_ready(self) -> None:
        """Run callbacks until none is ready."""
        ready = self._ready
        if not ready:
            return
        outer = events._get_running_loop()
        hooks = sys.get_asyncgen_hooks()
        if type(hooks.finalizer) is not _Generators:
            generators = _Generators(hooks)
            sys.set_asyncgen_hooks(generators.begun, generators)
        events._set_running_loop(self)
        try:
            left = CALLBACKS_MAX
            while ready:
                handle = ready.popleft()
                if not handle._cancelled:  # pyright: ignore
                    handle._run()
                left -= 1
                if not left:
                    raise Runaway(
                        f"The workflow ran {CALLBACKS_MAX:,} callbacks without waiting for a step, "
                        f"a timer or an event. Does a loop poll with asyncio.sleep(0)?"
                    )
        finally:
            events._set_running_loop(outer)
            if hooks.finalizer is None:
                sys.set_asyncgen_hooks(*hooks)

    def discard(self) -> None:
        """Close what still waits, without letting it do anything durable.

        Clean-up code of the workflow runs, since Python insists; but it can neither wait nor ask
        for anything any more, and nothing is left for the garbage collector to close elsewhere.
        """
        self._closing = True
        for task in self.tasks:
            if not task.done():
                self._close_unfinished()
                break
        for task in self.tasks:
            if task.done() and task._log_traceback:  # pyright: ignore
                task._log_traceback = False  # pyright: ignore
                log.warning("nobody awaited a task that failed: %r", task.exception())
        self.tasks.clear()
        self._ready.clear()

    def _close_unfinished(self) -> None:
        """Close all tasks, also those that clean-up code makes meanwhile."""
        outer = events._get_running_loop()
        events._set_running_loop(self)
        try:
            for task in self.tasks:
                if not task.done():
                    task._log_destroy_pending = False  # pyright: ignore
                    _close(task)
                    # What it waits for would call it: a cycle for the garbage collector.
                    awaited: asyncio.Future[Any] | None = task._fut_waiter  # pyright: ignore
                    if awaited is not None:
                        asyncio.Future.cancel(awaited)  # pyright: ignore
        finally:
            events._set_running_loop(outer)

    def close_up(self) -> None:
        """Let go of the owner; the loop is not used any more."""
        self._on_timer = self._on_timer_cancelled = _refuse_timer

    def call_soon(self, callback: Any, *args: Any, context: Context | None = None) -> Any:
        handle = _Callback(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_later(
        self, delay: float, callback: Any, *args: Any, context: Context | None = None
    ) -> DurableTimer:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Any, *args: Any, context: Context | None = None
    ) -> DurableTimer:
        handle = DurableTimer(when, callback, args, self, context)
        self._on_timer(handle)
        return handle

    def fire(self, handle: DurableTimer) -> None:
        """Let a due timer's callback run."""
        self._ready.append(handle)

    def _timer_handle_cancelled(self, handle: DurableTimer) -> None:
        self._on_timer_cancelled(handle)

    def time(self) -> float:
        return self.now_us / 1e6

    def create_future(self) -> asyncio.Future[Any]:
        if self._closing:
            raise Discarded("This execution was put away.")
        future = WorkflowFuture(loop=self)
        future.ordinal = self.next_ordinal()
        return future

    def create_task(  # pyright: ignore
        self,
        coro: Coroutine[Any, Any, Any],
        *,
        name: str | None = None,
        context: Context | None = None,
        **options: Any,
    ) -> WorkflowTask:
        task = WorkflowTask(
            coro, loop=self, name=name, context=context or copy_context(), **options
        )
        if len(self.tasks) >= self._compact_at:
            self.tasks = [known for known in self.tasks if not known.done()]
            self._compact_at = max(64, 2 * len(self.tasks))
        self.tasks.append(task)
        return task

    def is_running(self) -> bool:
        return events._get_running_loop() is self

    def is_closed(self) -> bool:
        return False

    def get_debug(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        tell(log, context)  # what matters of a task was said when its run was put away

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.call_exception_handler(context)


def tell(log: logging.Logger, context: dict[str, Any]) -> None:
    """Log what a loop's exception handler is called with.

    What it says of a task or a future comes from garbage collection, at any time.
    """
    level = logging.DEBUG if "task" in context or "future" in context else logging.ERROR
    log.log(level, "%s", context.get("message"), exc_info=context.get("exception"))


def _close(task: WorkflowTask) -> None:
    """End a task's coroutine in its own context, or a step called there would be done for real.

    By `throw`, again and again while its clean-up awaits: `close` would end the outermost coroutine
    and leave an inner one open.
    """
    coro: Any = task.get_coro()
    try:
        for _ in range(CLOSE_TRIES_MAX):
            task.context.run(coro.throw, Discarded("This execution was put away."))
    except BaseException as error:
        if not isinstance(error, (Discarded, StopIteration)):
            log.debug("clean-up of a discarded run raised %r", error)
        return
    log.warning("%r resists being put away: its code catches everything, in a loop", coro)
    # Never to be freed: Python would resume it once more, outside of its run.
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(coro))


class _Generators:
    """Keeps asynchronous generators of workflow code apart from others, by a thread's two hooks.

    One that workflow code abandons is left to garbage collection: nothing may run it outside of its
    run. Any other is a matter of `outer`, the hooks of the loop that drives workflows. They are
    wrapped once and stay so until that loop ends, since setting hooks raises audit events, which
    took a sixth of a delivery's time; without such a loop they are set for a delivery only.
    """

    def __init__(self, outer: Any) -> None:
        self._outer = outer
        self._of_workflows: set[int] = set()
        """By address: whatever is there later passes `begun` first, and is told apart anew."""

    def begun(self, generator: Any) -> None:
        if isinstance(events._get_running_loop(), WorkflowLoop):
            self._of_workflows.add(id(generator))
            return
        self._of_workflows.discard(id(generator))
        if self._outer.firstiter is not None:
            self._outer.firstiter(generator)

    def __call__(self, generator: Any) -> None:
        """Do what is to be done with an abandoned one."""
        if id(generator) in self._of_workflows:
            self._of_workflows.discard(id(generator))
        elif self._outer.finalizer is not None:
            self._outer.finalizer(generator)


def _refuse_timer(_: DurableTimer) -> None:
    raise Discarded("This execution was put away.")


_CALLERS = {
    "run_in_executor": "asyncio.to_thread",
    "create_connection": "asyncio.open_connection",
    "create_unix_connection": "asyncio.open_unix_connection",
    "create_server": "asyncio.start_server",
    "create_unix_server": "asyncio.start_unix_server",
    "subprocess_exec": "asyncio.create_subprocess_exec",
    "subprocess_shell": "asyncio.create_subprocess_shell",
    "call_soon_threadsafe": "asyncio.run_coroutine_threadsafe",
}
"""By what people call the loop's methods, mostly."""


def _refuse(name: str) -> Callable[..., NoReturn]:
    what = f"{_CALLERS[name]} (loop.{name})" if name in _CALLERS else f"loop.{name}"

    def refused(self: WorkflowLoop, *_args: object, **_kwargs: object) -> NoReturn:
        raise NotInWorkflow(
            f"{what}: I/O, a thread or a subprocess is not possible in workflow code, which "
            f"is replayed. Move it to a step: a function with @service.step, called from the "
            f"workflow."
        )

    refused.__name__ = name
    return refused


def _unique(items: Iterable[Any] = ()) -> Any:
    """Return a set; in workflow code one that iterates in the order of `items`."""
    in_order = isinstance(events._get_running_loop(), WorkflowLoop)
    return dict.fromkeys(items) if in_order and items else set(items)


# `asyncio.as_completed` makes tasks of coroutines in the order of `set(coroutines)`, that is of
# their addresses, before any task is there to be hashed. So `set` means the above in that module.
asyncio.tasks.set = _unique  # pyright: ignore

for _name in (
    "run_forever run_until_complete stop close shutdown_asyncgens shutdown_default_executor "
    "call_soon_threadsafe run_in_executor set_default_executor getaddrinfo getnameinfo "
    "create_connection create_server start_tls sendfile create_unix_connection create_unix_server "
    "connect_accepted_socket create_datagram_endpoint connect_read_pipe connect_write_pipe "
    "subprocess_shell subprocess_exec add_reader remove_reader add_writer remove_writer sock_recv "
    "sock_recv_into sock_recvfrom sock_recvfrom_into sock_sendall sock_sendto sock_connect "
    "sock_accept sock_sendfile add_signal_handler remove_signal_handler set_task_factory "
    "set_debug set_exception_handler"
).split():
    setattr(WorkflowLoop, _name, _refuse(_name))
WorkflowLoop.__abstractmethods__ = frozenset()  # pyright: ignore
