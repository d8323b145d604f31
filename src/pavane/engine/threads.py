"""Threads: where the plain functions among steps and handlers run, beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any


class Threads:
    """Up to `count` threads of one session, started when they are needed."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool: ThreadPoolExecutor | None = None

    async def call(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `fn` in a thread, with the caller's context variables."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._count, "pavane")
        context = copy_context()

        def call() -> Any:
            try:
                return context.run(fn, *args, **kwargs)
            except StopIteration as error:  # which no future takes: it would wait for ever
                raise RuntimeError(f"{fn.__qualname__} raised StopIteration.") from error

        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    def close(self) -> None:
        """Take no more calls, and do not wait for those that run: a thread cannot be stopped."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
