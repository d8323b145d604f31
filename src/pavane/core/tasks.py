"""Tasks that work until they are stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

AGAIN_S = 1.0


async def stop_all(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel tasks and return when all have ended.

    A task that goes on is cancelled again: on Python 3.11, `asyncio.wait_for` swallows a
    cancellation that comes in the moment in which what it waits for is there, and libraries use it.
    """
    while left := [task for task in tasks if not task.done()]:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=AGAIN_S)
