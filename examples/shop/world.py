"""The outside world of the shop: card company, warehouse and carrier, in a SQLite file of its own.

It keeps records that no process of the shop can lose, so that the demo can ask in the end what was
really charged, refunded and shipped. It knows each request by its idempotency key, as good payment
providers do: the same key again changes nothing, another key for the same order would charge it
twice, and would show. It also counts how often each step or handler was executed.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path

from pavane import step_info

PLACE = "SHOP_WORLD"
"""The environment variable that tells the shop's processes where the world is."""

ANSWERS_AFTER_S = 0.04
"""How long the world takes to answer; without it the demo would be over before anyone saw it."""

_CREATE = """
PRAGMA journal_mode = WAL;
CREATE TABLE IF NOT EXISTS effects (
    kind TEXT NOT NULL, key TEXT NOT NULL, order_id TEXT NOT NULL, PRIMARY KEY (kind, key)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS executions (
    key TEXT PRIMARY KEY, order_id TEXT NOT NULL, begun INTEGER NOT NULL, failed INTEGER NOT NULL
) WITHOUT ROWID;
"""


class World:
    """The outside world in the file at `path`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def here(cls) -> World:
        """Return the world that this process lives in."""
        world = cls(os.environ.get(PLACE, "shop-world.db"))
        if not world.path.exists():
            world.create()
        return world

    @contextmanager
    def _open(self) -> Generator[sqlite3.Connection]:
        # Steps run in threads, and a connection is cheap: each takes its own.
        with closing(sqlite3.connect(self.path, timeout=30, isolation_level=None)) as db:
            db.execute("PRAGMA synchronous = NORMAL")
            yield db

    def create(self) -> None:
        """Make the file; harmless if it is there."""
        with self._open() as db:
            db.executescript(_CREATE)

    # -- asked by steps and handlers -----------------------------------------------------------

    @contextmanager
    def asked(self, order_id: str) -> Generator[None]:
        """Let the world take its time over what runs, and count this execution of it."""
        key = step_info().idempotency_key
        with self._open() as db:
            db.execute(
                "INSERT INTO executions VALUES (?, ?, 1, 0) "
                "ON CONFLICT (key) DO UPDATE SET begun = begun + 1",
                (key, order_id),
            )
        time.sleep(ANSWERS_AFTER_S)
        try:
            yield
        except Exception:
            with self._open() as db:
                db.execute("UPDATE executions SET failed = failed + 1 WHERE key = ?", (key,))
            raise

    def record(self, kind: str, order_id: str) -> None:
        """Let something happen to an order, once per idempotency key."""
        with self._open() as db:
            db.execute(
                "INSERT INTO effects VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                (kind, step_info().idempotency_key, order_id),
            )

    # -- asked by the demo ---------------------------------------------------------------------

    def happened(self, kind: str) -> dict[str, int]:
        """Return to which orders this happened, and how often."""
        with self._open() as db:
            return dict(
                db.execute(
                    "SELECT order_id, count(*) FROM effects WHERE kind = ? GROUP BY 1", (kind,)
                ).fetchall()
            )

    def executed_again(self) -> dict[str, int]:
        """Count, per order, what was executed again although no attempt had failed."""
        with self._open() as db:
            return dict(
                db.execute(
                    "SELECT order_id, count(*) FROM executions WHERE begun > failed + 1 GROUP BY 1"
                ).fetchall()
            )
