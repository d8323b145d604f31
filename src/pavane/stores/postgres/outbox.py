"""Publishing inside a transaction of the user's, on a connection of theirs to a store's database.

Guarantees: the event is published if and only if that transaction commits, and events of one key
are handled in the order of commits. It waits in a table of its own, so that a long transaction
holds back nobody; whoever reads the log next moves it there.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any
from zlib import crc32

from pavane.errors import StoreError
from pavane.stores.eventlog import EventRow

SCHEMA_MIN = 2
"""The schema that brought `publish_1`. Later ones keep it, so workers may migrate before this."""
Statement = tuple[str, Sequence[Any]]
"""SQL with `{}` for each value, and the values."""
Rows = Sequence[Sequence[Any]]

_IS_THERE = "SELECT CAST(to_regclass('pavane.meta') AS text)"
_FACTS = "SELECT key, value FROM pavane.meta WHERE key IN ('schema', 'partitions')"
_PUBLISH = (
    "SELECT pavane.publish_1(CAST({} AS integer), CAST({} AS text), CAST({} AS text),"
    " CAST({} AS integer), CAST({} AS text), CAST({} AS text), CAST({} AS bigint),"
    " CAST({} AS text), CAST({} AS text), CAST({} AS text), CAST({} AS text))"
)


def append_event(row: EventRow) -> Generator[Statement, Rows, None]:
    """Append `row`, whose slot is not known yet, by statements that the caller executes.

    Raises StoreError if this is no store's database.
    """
    ((there,),) = yield _IS_THERE, ()
    if there is None:
        raise StoreError(
            "This database is no store of Pavane, so nobody would read the event. Publish on a "
            "connection to the database that App(store=…) names; a worker or `async with "
            "app.connect()` prepares it."
        )
    facts = {key: int(value) for key, value in (yield _FACTS, ())}
    if facts["schema"] < SCHEMA_MIN:
        raise StoreError(
            f"This database has schema {facts['schema']}, which has no outbox yet. Start a worker "
            f"of this version on it first."
        )
    row.slot = crc32((row.key or row.id).encode()) % facts["partitions"]
    yield (
        _PUBLISH,
        (
            row.slot, row.id, row.type, row.version, row.key, row.source, row.at_us,
            row.conversation, row.cause, row.trace, row.data.decode(),
        ),
    )  # fmt: skip
