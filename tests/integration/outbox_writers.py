"""Processes that write business rows and events in one transaction, by the standard library.

`python -m tests.integration.outbox_writers PATH NAME COUNT` does so COUNT times, and
`… PATH NAME before|after` dies right before or after its COMMIT. COUNT 0 never ends by itself.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
from contextlib import closing
from itertools import count

from pavane import Event, outbox


class Sold(Event, key="shelf"):
    shelf: str
    by: str
    no: int


def sell(connection: sqlite3.Connection, by: str, no: int, shelf: str = "one") -> None:
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT INTO sales (seller, no) VALUES (?, ?)", (by, no))
    outbox.publish_sync(connection, Sold(shelf=shelf, by=by, no=no))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(path: str, name: str, what: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None, timeout=20)) as connection:
        if what in ("before", "after"):
            sell(connection, name, 1)
            if what == "before":
                die()
            connection.execute("COMMIT")
            die()
        for no in count(1) if what == "0" else range(1, int(what) + 1):
            sell(connection, name, no)
            connection.execute("COMMIT" if no % 5 else "ROLLBACK")


if __name__ == "__main__":
    main(*sys.argv[1:])
