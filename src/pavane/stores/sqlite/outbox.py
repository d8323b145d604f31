"""Publishing inside a transaction of the user's, on a connection of theirs to a store's file.

Guarantees: the event is in the log if and only if that transaction commits, at a position in commit
order, since its INSERT takes the one write lock of the file and keeps it until the end. Nodes find
it as they find what other processes write.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any
from zlib import crc32

import apsw

from pavane.errors import StoreError
from pavane.stores.eventlog import EventRow
from pavane.stores.sqlite.statements import migrations, statement
from pavane.stores.sqlite.store import APPLICATION_ID

Execute = Callable[[str, Sequence[Any]], Sequence[Sequence[Any]]]
"""Executes one statement in the user's transaction and returns its rows."""

CHECKPOINTS_SAFELY = (3, 51, 3)
"""Older ones may corrupt a file by a checkpoint that meets a write; see sqlite.org/wal.html."""
_LIBRARY = "SELECT sqlite_version(), file FROM pragma_database_list WHERE name = 'main'"
_LOCK = "DELETE FROM main.meta WHERE 0"
"""Takes the write lock; a transaction that reads first may be refused when it comes to write."""
_FACTS = """
SELECT application_id, user_version, (SELECT value FROM main.meta WHERE key = 'partitions')
FROM pragma_application_id, pragma_user_version
"""


def append_event(execute: Execute, row: EventRow, *, is_apsw: bool) -> None:
    """Append `row`, whose slot is not known yet; raise StoreError if this is no store's database.

    `is_apsw` tells that the connection is of the SQLite library that stores use in this process.
    """
    try:
        execute(_LOCK, ())  # before any look at the file, which would be a read
    except Exception as error:
        if "no such table" in str(error):
            raise _no_store(_checked_library(execute, is_apsw)) from error
        if "locked" in str(error):
            error.add_note(
                "Others write to this database too. Let the connection wait for them (a busy "
                "timeout), and begin transactions that publish with BEGIN IMMEDIATE: one that has "
                "read before it writes is refused at once if anyone wrote meanwhile."
            )
        raise
    name = _checked_library(execute, is_apsw)
    row.slot = crc32((row.key or row.id).encode()) % _checked_partitions(execute, name)
    values = (
        row.slot, row.id, row.type, row.version, row.key, row.source, row.at_us, row.conversation,
        row.cause, row.trace, row.data.decode(),
    )  # fmt: skip
    execute(_bare("outbox_event"), values)
    execute(_bare("outbox_count"), (row.type, row.version))


def _checked_library(execute: Execute, is_apsw: bool) -> str:
    """Return the database's name, after a look at which copy of SQLite this is."""
    ((version, file),) = execute(_LIBRARY, ())
    name = _text(file)
    if not is_apsw and name and _is_open_here(name):
        raise StoreError(
            f"{name} is open in this process by the SQLite that Pavane brings (APSW), and this "
            f"connection is of another copy of SQLite. Two copies in one process do not see each "
            f"other's locks, and lose commits. Use `apsw.Connection(path)` here, or publish from a "
            f"process that does not open the store."
        )
    if not is_apsw and tuple(map(int, _text(version).split("."))) < CHECKPOINTS_SAFELY:
        execute("PRAGMA wal_autocheckpoint = 0", ())  # workers make the checkpoints
    return name or "This database (in memory)"


def _checked_partitions(execute: Execute, name: str) -> int:
    """Return the number of partitions, after a look at whose database this is."""
    ((application, schema, partitions),) = execute(_FACTS, ())
    newest = _newest_schema()
    if application != APPLICATION_ID:
        raise _no_store(name)
    if schema != newest:
        what = "Start a worker of this version on it first" if schema < newest else "Upgrade here"
        raise StoreError(
            f"{name} has schema {schema}, and this version of Pavane writes {newest}. {what}."
        )
    return int(partitions)


def _no_store(name: str) -> StoreError:
    return StoreError(
        f"{name} is no store of Pavane, so nobody would read the event. Publish on a connection to "
        f"the file that App(store=…) names, as its main database; a worker or `async with "
        f"app.connect()` makes it."
    )


def _is_open_here(file: str) -> bool:
    """Tell whether APSW has this file open in this process."""
    for connection in apsw.connections():
        try:
            if connection.filename and os.path.samefile(connection.filename, file):
                return True
        except (apsw.ConnectionClosedError, OSError):
            continue
    return False


@cache
def _newest_schema() -> int:
    return migrations()[-1][0]


@cache
def _bare(name: str) -> str:
    """Return a statement without its header: some drivers look at how the text begins."""
    lines = statement(name).splitlines()
    return "\n".join(line for line in lines if not line.startswith("--"))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
