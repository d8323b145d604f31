"""Threads: where the plain functions among steps and handlers run, beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextvars import copy_context
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import Any


class Threads:
    """Up to `count` threads of one session, started when they are needed."""

    def __init__(self, count: int) -> None:
        self._pool = _Daemons(count)

    async def call(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `fn` in a thread, with the caller's context variables."""
        context = copy_context()

        def call() -> Any:
            try:
                return context.run(fn, *args, **kwargs)
            except StopIteration as error:  # which no future takes: it would wait for ever
                raise RuntimeError(f"{fn.__qualname__} raised StopIteration.") from error

        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    def close(self) -> None:
        """Take no more calls, and do not wait for those that run: a thread cannot be stopped."""
        self._pool.shutdown(wait=False)


class _Daemons(Executor):
    """Runs calls in threads that hold no process back.

    At the end of a process Python waits for those of its own ThreadPoolExecutor: for a step that
    was given up, too.
    """

    def __init__(self, count: int) -> None:
        self._left = count
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._idle = Semaphore(0)
        self._closed = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self._closed:
            raise RuntimeError("This session is over; its threads take no more calls.")
        future: Future[Any] = Future()
        self._jobs.put((future, lambda: fn(*args, **kwargs)))
        if not self._idle.acquire(blocking=False) and self._left:
            self._left -= 1
            Thread(target=self._work, name="pavane", daemon=True).start()
        return future

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, call = job
            if self._closed:
                future.cancel()
            elif future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)
            del job, future, call  # they would live until the next call
            self._idle.release()
        self._jobs.put(None)  # for the next thread

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._closed = True
        self._jobs.put(None)
