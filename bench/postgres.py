"""The store on Postgres, with a real server and fsync on: `postgres`."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import asyncpg

from bench.figures import Figure, against, p50
from bench.processes import five, make_app, tour
from bench.raw import task_us
from bench.steps import AT_ONCE, ROW_BYTES, five_once, many, one_at_a_time_ms, steps_per_s
from pavane.testing.postgres import PostgresServer

_LIKE = """
CREATE SCHEMA raw;
CREATE TABLE raw.runs (LIKE pavane.runs INCLUDING ALL);
CREATE TABLE raw.journal (LIKE pavane.journal INCLUDING ALL);
CREATE TABLE raw.inbox (LIKE pavane.inbox INCLUDING ALL);
"""
_ROWS = """
WITH begun AS (INSERT INTO raw.runs SELECT * FROM unnest($1::pavane.run_1[])),
    marked AS (INSERT INTO raw.inbox SELECT * FROM unnest($2::pavane.inbox_1[])),
    written AS (INSERT INTO raw.journal SELECT * FROM unnest($3::pavane.journal_1[]))
UPDATE raw.runs AS r SET status = e.status, ended_us = e.ended_us, result = e.result
FROM unnest($4::pavane.run_1[]) AS e WHERE r.no = e.no
"""
_RUNS = 40
"""Runs that begin in a batch, and as many that end: with their steps, as many commits as a batch
of the store has when 500 run at once."""


async def postgres(folder: Path) -> list[Figure]:
    """Steps and hops per second and latency on Postgres 18, one process, fsync on."""
    with PostgresServer() as server:
        url = server.create_database("bench")
        async with make_app(url) as app:
            orchestrated = partial(five_once, app)

            async def passed() -> None:
                await (await app.start(tour, mode="choreography")).result()

            await many(orchestrated, 500, AT_ONCE)
            raw_s = await _raw_steps_per_s(url)
            task = [await task_us()]
            steps_s = await steps_per_s(app, 3000)
            task.append(await task_us())
            figures = [
                Figure("steps, Postgres", steps_s, "steps/s", wanted="≥ 30,000"),
                against("one step, in asyncio tasks", 1e6 / steps_s, "us", mean(task), "≤ 5.75 x"),
                against("steps, against the same rows", steps_s, "steps/s", raw_s, "≥ 0.4"),
            ]
            await many(passed, 500, AT_ONCE)
            took = min([await many(passed, 2000, AT_ONCE) for _ in range(3)])
            figures.append(Figure("hops, Postgres", 10_000 / took, "hops/s"))
            commit_ms = await _commit_ms(url)
            five_ms = await one_at_a_time_ms(app, five, 300)
        raw_ms = 5 * commit_ms
        figures.append(
            against("latency, five steps, Postgres", five_ms, "ms", raw_ms, "ratio ≤ 1.5")
        )
    return figures


async def _raw_steps_per_s(url: str) -> float:
    """Return how many steps/s come to be if nothing but their rows is written, in batches.

    The rows are those of a run of five steps that this database has: the run's own, its mark, its
    journal, and what its end changes, in tables of the same shape.
    """
    connection: Any = await asyncpg.connect(url)
    await connection.execute(_LIKE)
    run = tuple(await connection.fetchrow("SELECT * FROM pavane.runs ORDER BY no DESC LIMIT 1"))
    of_it = "SELECT * FROM pavane.journal WHERE run = $1"
    journal = [tuple(row) for row in await connection.fetch(of_it, run[0])]
    of_it = "SELECT * FROM pavane.inbox WHERE id LIKE $1 || '%'"
    marks = [tuple(row) for row in await connection.fetch(of_it, run[2])]
    write = await connection.prepare(_ROWS)
    rates: list[float] = []
    number, ended = 0, list[tuple[Any, ...]]()
    for _ in range(3):
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < 0.7:
            numbers = range(number, number + _RUNS)
            begun = [(no, run[1], f"{run[2]}-{no}", *run[3:]) for no in numbers]
            await write.fetch(
                begun,
                [(f"{mark[0]}-{no}", *mark[1:]) for no in numbers for mark in marks],
                [(no, *entry[1:]) for no in numbers for entry in journal],
                ended,
            )
            number, ended, done = number + _RUNS, begun, done + _RUNS
        rates.append(5 * done / (time.perf_counter() - began))
    await connection.close()
    return max(rates)


async def _commit_ms(url: str) -> float:
    """Return the milliseconds of a commit of one row, p50."""
    connection: Any = await asyncpg.connect(url)
    await connection.execute("CREATE TABLE raw.rows (run bigint PRIMARY KEY, body text)")
    insert = await connection.prepare("INSERT INTO raw.rows VALUES ($1, $2)")
    times: list[float] = []
    for at in range(400):
        began = time.perf_counter()
        await insert.fetch(at, "x" * ROW_BYTES)
        times.append((time.perf_counter() - began) * 1e3)
    await connection.close()
    return p50(times)
