"""What is due is found, however slowly the store answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from pavane.engine.timers import BURST, TAKING_UP_MAX, DueQueue, Found, Key


def test_a_partition_taken_over_while_it_is_read_ahead_misses_nothing() -> None:
    """The read that is under way leaves out what was not owned when it began."""

    async def test() -> None:
        now_us, fired = 1_000_000, list[Key]()
        slow = asyncio.Event()
        rows: dict[int, list[Found]] = {
            1: [(now_us, 1, ("shop", "of the first"), None)],
            2: [(now_us, 2, ("shop", "of the second"), None)],
        }

        async def read(
            targets: Sequence[int], after: tuple[int, Any], until_us: int, limit: int
        ) -> list[Found]:
            if list(targets) == [1]:
                await slow.wait()
            found = [row for target in targets for row in rows[target]]
            return [row for row in found if after <= (row[0], row[1]) and row[0] <= until_us]

        def fire(due: Sequence[tuple[Key, Any]]) -> asyncio.Future[None]:
            fired.extend(key for key, _ in due)
            return asyncio.ensure_future(asyncio.sleep(0))

        queue = DueQueue(lambda: now_us, read, 0, fire)
        reading = asyncio.create_task(queue.poll([1]))
        await asyncio.sleep(0)
        await queue.catch_up([2])
        slow.set()
        await reading
        await queue.poll([1, 2])
        await asyncio.sleep(0.01)
        queue.close()
        assert sorted(fired) == [("shop", "of the first"), ("shop", "of the second")]

    asyncio.run(test())


def test_a_crowd_is_fired_no_faster_than_it_is_taken_up() -> None:
    """However many are due at once, a burst waits until those before it are under way."""

    async def test() -> None:
        crowd: list[Found] = [(1, number, ("shop", str(number)), None) for number in range(5000)]
        fired = list[Key]()
        taking_up = list[asyncio.Future[None]]()

        async def read(
            targets: Sequence[int], after: tuple[int, Any], until_us: int, limit: int
        ) -> list[Found]:
            return [row for row in crowd if after < (row[0], row[1])][:limit]

        def fire(due: Sequence[tuple[Key, Any]]) -> asyncio.Future[None]:
            fired.extend(key for key, _ in due)
            taking_up.append(asyncio.get_running_loop().create_future())
            return taking_up[-1]

        queue = DueQueue(lambda: 1_000_000, read, -1, fire)
        await queue.poll([1])
        while len(fired) < len(crowd):
            await asyncio.sleep(0.001)
            assert 0 < len(taking_up) * BURST < TAKING_UP_MAX + BURST
            taking_up.pop(0).set_result(None)
        queue.close()
        assert fired == [key for _, _, key, _ in crowd]

    asyncio.run(test())
