"""Size: many sleeping runs, many runs in flight at a crash, one very long run."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import apsw

from bench.figures import Figure, against, rss_mb
from bench.processes import RECOVERED, make_app, sleeper, two_part
from bench.processes import long as long_workflow
from pavane.core.baton import Header
from pavane.core.execution import Execution

SLEEPERS = 100_000
DUE = 10_000
IN_FLIGHT = 10_000
STEPS = 10_000


async def _gather(count: int, at_once: int, work: object) -> None:
    numbers = iter(range(count))

    async def one() -> None:
        for number in numbers:
            await work(number)  # type: ignore[operator]

    await asyncio.gather(*(one() for _ in range(at_once)))


async def sleepers(folder: Path) -> list[Figure]:
    """Memory with 100,000 sleeping runs, and the time to wake 10,000 that are due at once."""
    return await asyncio.to_thread(_in_process, "sleepers", folder)


async def recovery(folder: Path) -> list[Figure]:
    """From a kill -9 with 10,000 runs in flight until the last of them has progressed."""
    store = str(folder / "recovery.db")
    await asyncio.to_thread(_kill_in_flight, store)
    os.environ[RECOVERED] = "1"
    began = time.perf_counter()
    async with make_app(store):
        await _until_completed(store, IN_FLIGHT)
        all_s = time.perf_counter() - began
    return [Figure("recovery, all of 10,000 progress", all_s, "s", wanted="≤ 5")]


def _kill_in_flight(store: str) -> None:
    """Kill a process with all runs in flight."""
    child = subprocess.Popen(
        [sys.executable, "-m", "bench.scale", "flight", store], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()
    os.kill(child.pid, signal.SIGKILL)
    child.wait()


async def _until_completed(store: str, count: int) -> None:
    """Return when so many runs have ended; looks into the file, to leave the engine alone."""
    reader = apsw.Connection(store, flags=apsw.SQLITE_OPEN_READONLY)
    sql = "SELECT count(*) FROM runs WHERE ended_us IS NOT NULL"
    while reader.execute(sql).fetchall()[0][0] < count:
        await asyncio.sleep(0.02)
    reader.close()


async def long(folder: Path) -> list[Figure]:
    """Cost of a step at the end of a run of 10,000 against one at its beginning, and its replay."""
    async with make_app(str(folder / "long.db")) as app:
        run = await app.start(long_workflow, STEPS)
        await run.result()
        history = await run.history()
    at = [entry.at_us for entry in history.entries]
    tenth = STEPS // 10
    first_us, last_us = at[tenth] - at[0], at[-1] - at[-1 - tenth]
    ratio = against("long, step at the end", last_us / tenth, "µs", first_us / tenth, "ratio ≤ 1.5")
    header = Header("x", "long", 1, "home", "orchestration", at[0], "x")
    best = 0.0
    for _ in range(3):
        execution = Execution(header, app.registry.workflow("long"), history.entries)
        began = time.perf_counter()
        execution.replay(history.entries)
        best = max(best, len(history.entries) / (time.perf_counter() - began))
    return [ratio, Figure("long, replay", best, "entries/s", wanted="≥ 100,000")]


def _in_process(name: str, folder: Path) -> list[Figure]:
    """Measure in a process of its own, whose memory is its own."""
    output = subprocess.run(
        [sys.executable, "-m", "bench.scale", name, str(folder / f"{name}.db")],
        stdout=subprocess.PIPE, check=True,
    ).stdout  # fmt: skip
    return [Figure(**json.loads(line)) for line in output.decode().splitlines()]


async def _sleepers(store: str) -> list[Figure]:
    base_mb = rss_mb()
    async with make_app(store) as app:
        await _gather(SLEEPERS - DUE, 200, lambda n: app.start(sleeper, 86_400.0))
        lead_s = 12.0
        ends = time.time() + lead_s
        await _gather(DUE, 200, lambda n: app.start(sleeper, max(0.1, ends - time.time())))
        memory = rss_mb()
        if time.time() > ends:
            raise SystemExit("starting took too long for the measurement; the machine is too busy")
        await asyncio.sleep(ends - time.time())
        began = time.perf_counter()
        await _until_completed(store, DUE)
        woken_s = time.perf_counter() - began
    return [
        against("sleepers, memory of 100,000", memory, "MB", base_mb, "≤ 150 MB"),
        Figure("sleepers, wake 10,000", woken_s, "s", wanted="≤ 2"),
    ]


async def _flight(store: str) -> None:
    """Start runs whose step never ends, and say when all are in flight."""
    async with make_app(store) as app:
        await _gather(IN_FLIGHT, 200, lambda n: app.start(two_part))
        print("ready", flush=True)
        await asyncio.sleep(600)


if __name__ == "__main__":
    what, where = sys.argv[1:]
    if what == "sleepers":
        for figure in asyncio.run(_sleepers(where)):
            print(json.dumps(figure.__dict__))
    else:
        asyncio.run(_flight(where))
