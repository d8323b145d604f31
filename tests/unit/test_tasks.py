"""Tasks that are stopped."""

from __future__ import annotations

import asyncio

import pytest

from pavane.core import tasks
from pavane.core.tasks import stop_all


def test_a_task_that_swallows_its_cancellation_is_stopped_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks, "AGAIN_S", 0.01)
    swallowed = 0

    async def stubborn() -> None:
        nonlocal swallowed
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                swallowed += 1
                if swallowed == 3:
                    raise

    async def main() -> None:
        task = asyncio.create_task(stubborn())
        ended = asyncio.create_task(asyncio.sleep(0))
        await asyncio.sleep(0.01)
        async with asyncio.timeout(10):
            await stop_all([task, ended])
            await stop_all([])
        assert task.cancelled()

    asyncio.run(main())
    assert swallowed == 3
