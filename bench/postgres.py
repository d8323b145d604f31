"""The store on Postgres, with a real server and fsync on: `postgres`."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import asyncpg

from bench.figures import Figure, against, p50
from bench.processes import make_app, tour
from bench.steps import AT_ONCE, BATCH, ROW_BYTES, five_once, many, steps_per_s
from pavane.testing.postgres import PostgresServer

_INSERT = "INSERT INTO raw SELECT * FROM unnest($1::bigint[], $2::int[], $3::text[])"


async def postgres(folder: Path) -> list[Figure]:
    """Steps and hops per second and latency on Postgres 18, one process, fsync on."""
    with PostgresServer() as server:
        url = server.create_database("bench")
        rows_s, commit_ms = await _raw(url)
        async with make_app(url) as app:
            orchestrated = partial(five_once, app)

            async def passed() -> None:
                await (await app.start(tour, mode="choreography")).result()

            await many(orchestrated, 500, AT_ONCE)
            steps_s = await steps_per_s(app, 3000)
            figures = [against("steps, Postgres", steps_s, "steps/s", rows_s, "≥ 30,000")]
            await many(passed, 500, AT_ONCE)
            took = min([await many(passed, 2000, AT_ONCE) for _ in range(3)])
            figures.append(against("hops, Postgres", 10_000 / took, "hops/s", rows_s))
            times: list[float] = []
            for _ in range(300):
                began = time.perf_counter()
                await orchestrated()
                times.append((time.perf_counter() - began) * 1e3)
        raw_ms = 5 * commit_ms
        figures.append(
            against("latency, five steps, Postgres", p50(times[50:]), "ms", raw_ms, "ratio ≤ 1.5")
        )
    return figures


async def _raw(url: str) -> tuple[float, float]:
    """Return rows/s inserted in batches, and the milliseconds of a commit of one row."""
    connection: Any = await asyncpg.connect(url)
    await connection.execute(
        "CREATE TABLE raw (run bigint, seq int, body text, PRIMARY KEY (run, seq))"
    )
    body, written, began = "x" * ROW_BYTES, 0, time.perf_counter()
    while time.perf_counter() - began < 1.5:
        runs = list(range(written, written + BATCH))
        await connection.execute(_INSERT, runs, [0] * BATCH, [body] * BATCH)
        written += BATCH
    rows_s = written / (time.perf_counter() - began)
    times: list[float] = []
    for at in range(300):
        began = time.perf_counter()
        await connection.execute("INSERT INTO raw VALUES ($1, 1, $2)", at, body)
        times.append((time.perf_counter() - began) * 1e3)
    await connection.close()
    return rows_s, median(times)
