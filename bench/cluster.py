"""Several worker processes on one Postgres: `cluster`, `growth`, `pruning`, `idle`.

`python -m bench.cluster STORE RECORD` is one of them: it works until SIGTERM, and then drains.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import struct
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import quantiles
from typing import Any

import asyncpg

from bench.figures import Figure, against, p50
from bench.processes import make_app
from bench.steps import steps_per_s
from pavane import App, EngineConfig, Service, continue_as_new
from pavane.core.tasks import stop_all
from pavane.testing.postgres import PostgresServer

LEASE_S = 1.5
WORKERS = 3
RUNS = 96
ROUNDS = 4
FINISHED = int(os.environ.get("BENCH_FINISHED", "1_000_000"))
IDLE_NODES = int(os.environ.get("BENCH_IDLE_NODES", "100"))
IDLE_S = 30.0
RETENTION_S = 2.0
SETTLING_S = 75.0
MARK = struct.Struct("<iid")

beats = Service("beats")


@beats.step
async def mark(number: int) -> None:
    """Note who was here when, outside of the store."""
    file = os.open(os.environ["BENCH_RECORD"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, MARK.pack(number, os.getpid(), time.time()))
    os.close(file)


@beats.workflow
async def marks(number: int, rounds: int = 1) -> None:
    """Do a hundred steps a round, each as a run of its own, so that journals stay short."""
    for _ in range(100 if rounds > 1 else 1):
        await mark(number)
        await asyncio.sleep(0.05)
    if rounds > 1:
        continue_as_new(number, rounds - 1)


def app_on(store: str) -> App:
    return App("bench", [beats], store=store, config=EngineConfig(lease_s=LEASE_S, grace_s=5.0))


class _Workers:
    """Worker processes on one store."""

    def __init__(self, store: str, record: Path) -> None:
        self._command = [sys.executable, "-m", "bench.cluster", store, str(record)]
        self._record = record
        self.processes: list[subprocess.Popen[str]] = []

    def start(self) -> None:
        process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        self.processes.append(process)

    def marks(self) -> list[tuple[int, int, float]]:
        return list(MARK.iter_unpack(self._record.read_bytes())) if self._record.exists() else []

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


async def cluster(folder: Path) -> list[Figure]:
    """What a node's end costs its runs, and a start at a node elsewhere; Postgres, fsync on."""
    with PostgresServer() as server:
        url = server.create_database("bench")
        workers = _Workers(url, folder / "record")
        try:
            await asyncio.to_thread(workers.start)
            return await _disturbed(url, workers)
        finally:
            workers.end()


async def _disturbed(url: str, workers: _Workers) -> list[Figure]:
    async with app_on(url).connect() as client:
        waits: list[float] = []
        for at in range(200):
            began = time.time()
            await (await client.start(marks, -1 - at)).result()
            waits.append((next(t for n, _, t in workers.marks() if n == -1 - at) - began) * 1e3)
        figures = [Figure("start at another node, p50", p50(waits), "ms", wanted="≤ 10")]
        for _ in range(WORKERS - 1):
            await asyncio.to_thread(workers.start)
        for at in range(RUNS):
            await client.start(marks, at, 10_000)
        await asyncio.sleep(5)
        pauses = _pauses(workers.marks())
        figures.append(Figure("undisturbed, between two steps, p50", p50(pauses), "s"))
        for how, bounds in (
            (signal.SIGKILL, ("≤ 2", "≤ 4")), (signal.SIGTERM, ("≤ 0.2", "")),
        ):  # fmt: skip
            gaps: list[float] = []
            for _ in range(ROUNDS):
                gaps += await asyncio.to_thread(_end_one, workers, how)
            name = "kill -9" if how is signal.SIGKILL else "SIGTERM"
            figures.append(Figure(f"{name}, until a run goes on, p50", p50(gaps), "s",
                                  wanted=bounds[0]))  # fmt: skip
            figures.append(Figure(f"{name}, until a run goes on, p99",
                                  quantiles(gaps, n=100)[98], "s", wanted=bounds[1]))  # fmt: skip
        return figures


def _pauses(marks: list[tuple[int, int, float]]) -> list[float]:
    """Return how long runs took from one step to the next in the last seconds."""
    last: dict[int, float] = {}
    pauses: list[float] = []
    for number, _, at in marks:
        if at > time.time() - 3:
            if number in last:
                pauses.append(at - last[number])
            last[number] = at
    return pauses


def _end_one(workers: _Workers, how: signal.Signals) -> list[float]:
    """End the oldest worker, and start another; return for how long each of its runs stood."""
    victim = workers.processes.pop(0)
    began = time.time()
    victim.send_signal(how)
    time.sleep(2 * LEASE_S + 3)
    victim.wait()
    last: dict[int, tuple[int, float]] = {}
    gaps: dict[int, float] = {}
    for number, pid, at in workers.marks():
        if at < began or pid == victim.pid:
            last[number] = (pid, at)
        elif last.get(number, (0, 0.0))[0] == victim.pid and number not in gaps:
            gaps[number] = at - (began if how is signal.SIGKILL else last[number][1])
    assert gaps, "it had no runs"
    workers.start()
    time.sleep(3)
    return list(gaps.values())


async def growth(folder: Path) -> list[Figure]:
    """Steps per second with a million finished runs (or $BENCH_FINISHED) in the store."""
    with PostgresServer() as server:
        url = server.create_database("bench")
        async with make_app(url) as app:
            await steps_per_s(app, 3000)
            connection: Any = await asyncpg.connect(url, server_settings={"search_path": "pavane"})
            empty = await steps_per_s(app, 3000)
            await _fill(connection)
            full = await steps_per_s(app, 3000)
            bytes = await connection.fetchval("SELECT pg_database_size(current_database())")
            ended = await connection.fetchval("SELECT count(*) FROM runs WHERE no < 0")
            await connection.execute("TRUNCATE runs, journal, inbox, log")
            again = await steps_per_s(app, 3000)
            await connection.close()
        return [
            against(f"steps, {ended:,} runs ended", full, "steps/s", empty, "≥ 0.85"),
            against("steps, empty again", again, "steps/s", empty),
            Figure("the database then", bytes / 2**30, "GB"),
        ]


async def _fill(connection: Any) -> None:
    """Add copies of one finished run and its journal, numbered below all others."""
    no = await connection.fetchval("SELECT max(no) FROM runs WHERE ended_us IS NOT NULL")
    others = ", ".join(
        row[0]
        for row in await connection.fetch(
            "SELECT column_name FROM information_schema.columns WHERE table_schema = 'pavane'"
            " AND table_name = 'runs' AND column_name NOT IN ('no', 'id') ORDER BY ordinal_position"
        )
    )
    for first in range(1, FINISHED, 100_000):
        numbers = f"generate_series({first}, {first + 99_999}) AS n"
        await connection.execute(
            f"INSERT INTO runs (no, id, {others})"
            f" SELECT -n, 'old' || n, {others} FROM runs, {numbers} WHERE no = $1",
            no,
        )
        await connection.execute(
            f"INSERT INTO journal SELECT -n, seq, body FROM journal, {numbers} WHERE run = $1", no
        )
    await connection.execute("ANALYZE runs")
    await connection.execute("ANALYZE journal")


async def pruning(folder: Path) -> list[Figure]:
    """Steps per second while runs are deleted two seconds after their end, and how late that is."""
    with PostgresServer() as server:
        async with make_app(server.create_database("kept")) as app:
            kept = await steps_per_s(app, 3000)
        url = server.create_database("pruned")
        async with make_app(url, retention_s=RETENTION_S) as app:
            began = time.perf_counter()
            pruned = max([await steps_per_s(app, 3000) for _ in range(ROUNDS)])
            runs_s = ROUNDS * 9000 / (time.perf_counter() - began)
            connection: Any = await asyncpg.connect(url, server_settings={"search_path": "pavane"})
            overdue = await connection.fetchval(
                "SELECT count(*) FROM runs WHERE ended_us < pavane.clock_us() - $1",
                round(RETENTION_S * 1e6),
            )
            await connection.close()
        return [
            against("steps, pruned soon after", pruned, "steps/s", kept),
            Figure("how late the pruner is", overdue / runs_s, "s"),
        ]


async def idle(folder: Path) -> list[Figure]:
    """What idle nodes cost the database, as a part of one core; fsync on.

    They are whole nodes, each with its connections, but share this process. The reference: as many
    connections that ask `SELECT 1` as often as a node that works renews its lease.
    """
    with PostgresServer(settings={"max_connections": str(8 * IDLE_NODES + 20)}) as server:
        url = server.create_database("bench")
        async with AsyncExitStack() as stack:
            for _ in range(IDLE_NODES):
                await stack.enter_async_context(make_app(url).worker())
            share = await _share(server.pid)
        asking = [asyncio.create_task(_ask(url)) for _ in range(IDLE_NODES)]
        bare = await _share(server.pid)
        await stop_all(asking)
        name = f"{IDLE_NODES} idle nodes, the database"
        return [against(name, share, "% of a core", bare, wanted="< 1 %")]


async def _ask(url: str) -> None:
    connection: Any = await asyncpg.connect(url)
    try:
        while True:
            await connection.fetchval("SELECT 1")
            await asyncio.sleep(EngineConfig().lease_s / 4 * (0.75 + random.random() / 2))
    finally:
        connection.terminate()


async def _share(server: int) -> float:
    """Return what a server costs when it has settled, in percent of a core."""
    await asyncio.sleep(SETTLING_S)
    before = _cpu_s(server)
    await asyncio.sleep(IDLE_S)
    return (_cpu_s(server) - before) / IDLE_S * 100


def _cpu_s(postmaster: int) -> float:
    """Return the CPU seconds of a server's processes, those that ended too.

    In `stat` each has whole hundredths of a second, of which an idle one takes ten seconds for one:
    that is good enough for the sum of those that ended only, which their parent has.
    """
    of_ended = Path(f"/proc/{postmaster}/stat").read_text().rpartition(")")[2].split()
    spent_ns = sum(map(int, of_ended[13:15])) * 1e9 / os.sysconf("SC_CLK_TCK")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            if postmaster in (int(process.name), int(parent)):
                spent_ns += int((process / "schedstat").read_text().split()[0])
        except OSError:
            continue
    return spent_ns / 1e9


async def _work(store: str) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with app_on(store).worker():
        print("ready", flush=True)
        await stop.wait()


if __name__ == "__main__":
    os.environ["BENCH_RECORD"] = sys.argv[2]
    asyncio.run(_work(sys.argv[1]))
