"""One worker process on a Postgres, and two: `spread`.

`python -m bench.spread STORE` is one of them: for each number that it reads it starts so many runs,
waits for them, and prints from when to when; half of them are held by the other process, if there
is one, since ids are spread over partitions by their hash.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from bench.figures import Figure, against
from bench.processes import long, make_app
from bench.steps import AT_ONCE, five_once, many
from pavane import Client
from pavane.testing.postgres import PostgresServer

ROUNDS = 3
STEPS = 15_000
LONG = 50


async def spread(folder: Path) -> list[Figure]:
    """Steps/s from two worker processes that share a database, against one; fsync on."""
    with PostgresServer() as server:
        url = server.create_database("bench")
        one = await asyncio.to_thread(_rates, url, 1)
        two = await asyncio.to_thread(_rates, url, 2)
    wanted = "≥ 1.5 where there is room"
    return [
        against("two processes, runs of 5 steps", two[0], "steps/s", one[0], wanted),
        against(f"two processes, runs of {LONG}", two[1], "steps/s", one[1], wanted),
    ]


def _rates(url: str, count: int) -> tuple[float, float]:
    """Return the best rates of `count` processes, with runs of five steps and with long ones."""
    command = [sys.executable, "-m", "bench.spread", url]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    try:
        for worker in workers:
            _answer(worker)
        time.sleep(5)  # until they share the partitions
        return _best(workers, 5), _best(workers, LONG)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def _best(workers: list[subprocess.Popen[str]], steps: int) -> float:
    """Return the best of some rates; the first round warms up."""
    runs = STEPS // steps // len(workers)
    rates: list[float] = []
    for _ in range(1 + ROUNDS):
        for worker in workers:
            assert worker.stdin is not None
            print(json.dumps([runs, steps]), file=worker.stdin, flush=True)
        times = [json.loads(_answer(worker)) for worker in workers]
        took = max(ended for _, ended in times) - min(began for began, _ in times)
        rates.append(runs * steps * len(workers) / took)
    return max(rates[1:])


def _answer(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    return worker.stdout.readline()


async def _long_once(app: Client, steps: int) -> None:
    await (await app.start(long, steps)).result()


async def _work(store: str) -> None:
    async with make_app(store) as app:
        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            runs, steps = json.loads(line)
            began = time.time()
            go = partial(five_once, app) if steps == 5 else partial(_long_once, app, steps)
            await many(go, runs, AT_ONCE)
            print(json.dumps([began, time.time()]), flush=True)


if __name__ == "__main__":
    asyncio.run(_work(sys.argv[1]))
