"""The raw limits: what bare APSW does with the same bytes in batches of the same size."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import apsw


async def task_us(count: int = 20_000) -> float:
    """Return the microseconds to create an asyncio task and await it: how fast this Python is."""

    async def nothing() -> None: ...

    began = time.perf_counter()
    for _ in range(count):
        await asyncio.create_task(nothing())
    return (time.perf_counter() - began) / count * 1e6


def open_raw(path: Path) -> apsw.Connection:
    connection = apsw.Connection(str(path))
    connection.execute("PRAGMA journal_mode = wal")
    connection.execute("PRAGMA synchronous = full")
    connection.execute("CREATE TABLE rows (run INTEGER, seq INTEGER, body TEXT)")
    connection.execute("CREATE UNIQUE INDEX rows_by_run ON rows (run, seq)")
    return connection


def rows_per_s(folder: Path, batch: int, size_bytes: int, seconds: float = 1.5) -> float:
    """Return rows per second, inserted in transactions of `batch` rows of `size_bytes`."""
    connection = open_raw(folder / f"raw-{batch}-{size_bytes}-{time.time_ns()}.db")
    body = "x" * size_bytes
    written = 0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(
            "INSERT INTO rows VALUES (?, ?, ?)",
            [(written + at, 0, body) for at in range(batch)],
        )
        connection.execute("COMMIT")
        written += batch
    took = time.perf_counter() - began
    connection.close()
    return written / took


def commit_s(folder: Path, size_bytes: int, count: int = 500) -> float:
    """Return the median seconds of a commit of one row."""
    connection = open_raw(folder / f"raw-single-{time.time_ns()}.db")
    body = "x" * size_bytes
    times: list[float] = []
    for at in range(count):
        began = time.perf_counter()
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO rows VALUES (?, 0, ?)", (at, body))
        connection.execute("COMMIT")
        times.append(time.perf_counter() - began)
    connection.close()
    return sorted(times)[count // 2]
