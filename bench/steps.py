"""Throughput and latency of runs: `steps`, `latency`, `start`, `limits`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from statistics import mean

from bench.figures import Figure, against, p50
from bench.processes import five, limited, make_app, nothing, tour
from bench.raw import commit_s, rows_per_s, task_us
from pavane import App, Client, Workflow

AT_ONCE = 500
ROW_BYTES = 190
BATCH = 200
# The goals were set where creating and awaiting an asyncio task takes 5.8 us: 30,000 steps/s are
# 5.75 tasks a step there. A step is mostly Python, so the ratio tells more than the rate elsewhere.


async def many(work: Callable[[], Awaitable[object]], count: int, at_once: int) -> float:
    """Do `work` `count` times, `at_once` at a time; return the seconds."""
    left = count

    async def one() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await work()

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(at_once)))
    return time.perf_counter() - began


async def five_once(app: Client) -> None:
    await (await app.start(five)).result()


async def steps_per_s(app: Client, runs: int) -> float:
    """Return the best of three rates of steps, of so many runs of five each."""
    return 5 * runs / min([await many(partial(five_once, app), runs, AT_ONCE) for _ in range(3)])


async def one_at_a_time_ms(app: App, flow: Workflow[[], str], count: int) -> float:
    """Return the p50 of a run, `count` of them one after the other; the first tenth warms up."""
    times: list[float] = []
    for _ in range(count):
        began = time.perf_counter()
        await (await app.start(flow)).result()
        times.append((time.perf_counter() - began) * 1e3)
    return p50(times[count // 10 :])


async def steps(folder: Path) -> list[Figure]:
    """Journalled steps/s orchestrated, and hops/s when the baton is passed at every step."""
    raw = rows_per_s(folder, BATCH, ROW_BYTES)
    async with make_app(str(folder / "steps.db")) as app:
        orchestrated = partial(five_once, app)

        async def passed() -> None:
            await (await app.start(tour, mode="choreography")).result()

        await many(orchestrated, 500, AT_ONCE)
        task = [await task_us()]
        steps_s = await steps_per_s(app, 5000)
        figures = [against("steps, orchestrated", steps_s, "steps/s", raw, "≥ 30,000")]
        task.append(await task_us())
        step_us = 1e6 / steps_s
        figures.append(against("one step, in asyncio tasks", step_us, "us", mean(task), "≤ 5.75 x"))
        await many(passed, 500, AT_ONCE)
        took = min([await many(passed, 3000, AT_ONCE) for _ in range(3)])
        figures.append(against("steps, baton passed", 15_000 / took, "hops/s", raw, "≥ 15,000"))
        task.append(await task_us())
        hop_us = took / 15_000 * 1e6
        figures.append(
            against("one hop, in asyncio tasks", hop_us, "us", mean(task[1:]), "≤ 11.5 x")
        )
    return figures


async def latency(folder: Path) -> list[Figure]:
    """p50 of one run of five steps at a time, against five raw one-row commits."""
    raw_ms = commit_s(folder, ROW_BYTES) * 5e3
    async with make_app(str(folder / "latency.db")) as app:
        five_ms = await one_at_a_time_ms(app, five, 500)
    return [against("latency, five steps p50", five_ms, "ms", raw_ms, "ratio ≤ 2.5")]


async def limits(folder: Path) -> list[Figure]:
    """Steps under a limit of the cluster, against the same without one."""
    async with make_app(str(folder / "limits.db")) as app:

        async def rate(flow: Workflow[[], str]) -> float:
            async def one() -> None:
                await (await app.start(flow)).result()

            await many(one, 200, AT_ONCE)
            return 5 * 1000 / await many(one, 1000, AT_ONCE)

        free, bound = await rate(five), await rate(limited)
        free_ms = await one_at_a_time_ms(app, five, 100)
        bound_ms = await one_at_a_time_ms(app, limited, 100)
    return [
        against("limits, steps under a limit", bound, "steps/s", free),
        against("limits, five steps p50", bound_ms, "ms", free_ms),
    ]


async def start(folder: Path) -> list[Figure]:
    """Durable starts per second, from 500 callers."""
    raw = rows_per_s(folder, BATCH, ROW_BYTES)
    async with make_app(str(folder / "start.db")) as app:
        await many(lambda: app.start(nothing), 500, AT_ONCE)
        took = min([await many(lambda: app.start(nothing), 8000, AT_ONCE) for _ in range(3)])
    return [against("start, durable", 8000 / took, "starts/s", raw, "≥ 10,000")]
