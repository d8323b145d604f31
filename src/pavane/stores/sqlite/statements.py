"""The SQL files of this store, read once; and multi-row inserts.

Writing many rows in one statement matters in Python: each step of a statement gives up the
interpreter lock, and a busy event loop keeps it for a whole switch interval.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from pavane.stores.sqlite.connection import Connection

_CHUNKS = (128, 32, 8, 2, 1)


@cache
def statement(name: str) -> str:
    """Return the SQL of `sql/NAME.sql`."""
    return (files(__package__ or "") / "sql" / f"{name}.sql").read_text("utf-8")


def migrations() -> list[tuple[int, str]]:
    """Return all numbered migrations in order."""
    found = (files(__package__ or "") / "migrations").iterdir()
    return sorted(
        (int(file.name[:3]), file.read_text("utf-8"))
        for file in found
        if file.name.endswith(".sql")
    )


@cache
def _widened(name: str, rows: int) -> tuple[str, int]:
    head, values, tail = statement(name).partition("VALUES (")
    row, _, rest = tail.partition(")")
    one = f"({row})"
    return f"{head}{values[:-1]}{', '.join([one] * rows)}{rest}", one.count("?")


def insert_all(connection: Connection, name: str, rows: Sequence[Iterable[Any]]) -> int:
    """Insert `rows` by statement `name`, as many rows a statement as are there, up to 128.

    Returns how many were inserted or replaced.
    """
    at, count, changed = 0, len(rows), 0
    for size in _CHUNKS:
        while count - at >= size:
            sql, _ = _widened(name, size)
            connection.execute(sql, [value for row in rows[at : at + size] for value in row])
            at += size
            changed += connection.changes()
    return changed
