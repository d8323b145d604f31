"""The outbox: publishes events inside the user's own transaction, on the store's database.

```python
from pavane import outbox

async with AsyncSession(engine) as session, session.begin():
    session.add(Order(id="o-1", cents=4200))
    await outbox.publish(session, OrderPlaced(order_id="o-1", cents=4200))

with sqlite3.connect("shop.db") as connection:
    connection.execute("INSERT INTO orders VALUES ('o-1', 4200)")
    outbox.publish_sync(connection, OrderPlaced(order_id="o-1", cents=4200))
```

The event is published if and only if the transaction commits, and events of one key are handled in
the order of commits. `publish` takes any connection; `publish_sync` is for code without `await`.

Connections to Postgres: of `asyncpg` and `psycopg` (both kinds), and SQLAlchemy's `Connection`,
`Session`, `AsyncConnection` and `AsyncSession` over any driver. To SQLite: of `sqlite3` and `apsw`,
and SQLAlchemy's over them. In a process that opens an SQLite store itself (a worker,
`app.connect()`) only `apsw`: the standard library brings another copy of SQLite, and two copies in
one process do not see each other's locks on a file.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Any

from pavane.app import checked_run_id, checked_source
from pavane.core.codec import encode_fitting
from pavane.core.execution import PAYLOAD_MAX_BYTES, current
from pavane.engine.process import new_id
from pavane.engine.publishing import checked_size
from pavane.errors import BadArguments, NotInWorkflow, StoreError
from pavane.event import class_of, is_event, key_of
from pavane.handler import Origin, current_handler
from pavane.service import current_step
from pavane.stores.eventlog import EventRow

SOURCE = "outbox"


async def publish(
    connection: Any, event: Any, *, id: str | None = None, source: str | None = None
) -> str:
    """Publish `event` with the transaction of `connection`; return its id.

    Takes effect when the transaction commits, or never. An `id` that was published before changes
    nothing. `source` is the CloudEvents source, "outbox" by default.

    Inside a step or a handler the event belongs to the same conversation, with the run or the
    handled event as its cause and the service as its source; its id derives from the step or event
    and from what is published, so that another attempt publishes the same only once.

    Raises StoreError for a connection on another database or one that would publish at once,
    BadArguments for what is no event or no connection and for an event whose values are not of the
    types that its class declares, NotEncodable and TooLarge for one that cannot be written.
    """
    row = _row(event, id, source)
    if _is_a(connection, "asyncpg", "Connection") or _is_pooled_asyncpg(connection):
        await _append_by_asyncpg(connection, row)
    elif _is_a(connection, "psycopg", "AsyncConnection"):
        await _append_by_psycopg_async(connection, row)
    elif _is_asynchronous(connection):
        await connection.run_sync(_append, row)
    else:
        _append(connection, row)
    return row.id


def publish_sync(
    connection: Any, event: Any, *, id: str | None = None, source: str | None = None
) -> str:
    """Do as `publish`, for code that cannot await, on a connection that needs no await."""
    row = _row(event, id, source)
    if _is_asynchronous(connection) or _is_async_driver(connection):
        raise BadArguments(
            f"{_spelled(connection)} is asynchronous: write `await outbox.publish(…)`."
        )
    _append(connection, row)
    return row.id


# -- the event ---------------------------------------------------------------------------------


def _row(event: Any, id: str | None, source: str | None) -> EventRow:
    """Return the row to write, but for its slot."""
    if not is_event(event):
        raise BadArguments(
            f"{event!r} is no event. Derive its class from pavane.Event, or use @event."
        )
    context = current_handler.get() or current_step.get()
    if context is None and current() is not None:
        raise NotInWorkflow(
            "outbox.publish(…) belongs into a step, where connections do. In workflow code use "
            "`await service.publish(event)`."
        )
    kind, data, key = class_of(event), encode_fitting(event), key_of(event)
    chosen = new_id() if id is None else checked_run_id(id)
    if context is not None:
        content = f"{kind.event_type} {kind.event_version} {key} {data.decode()}"
        origin = context.origin(content)
    else:
        origin = Origin(chosen, SOURCE, chosen, "", "", PAYLOAD_MAX_BYTES)
    row = EventRow(
        origin.id if id is None else chosen, kind.event_type, kind.event_version, key,
        checked_source(source or origin.source), time.time_ns() // 1000, origin.conversation,
        origin.cause, origin.trace, data,
    )  # fmt: skip
    return checked_size(row, origin.payload_max_bytes)


# -- the connection ----------------------------------------------------------------------------
# Types are looked for in modules that are loaded: whoever has such a connection has loaded them.


def _is_a(value: Any, module: str, *names: str) -> bool:
    loaded = sys.modules.get(module)
    kinds = tuple(getattr(loaded, name) for name in names if hasattr(loaded, name))
    return isinstance(value, kinds)


def _is_asynchronous(connection: Any) -> bool:
    return _is_a(
        connection, "sqlalchemy.ext.asyncio", "AsyncConnection", "AsyncSession",
        "async_scoped_session",
    )  # fmt: skip


def _is_async_driver(connection: Any) -> bool:
    return (
        _is_a(connection, "asyncpg", "Connection")
        or _is_pooled_asyncpg(connection)
        or _is_a(connection, "psycopg", "AsyncConnection")
    )


def _is_pooled_asyncpg(connection: Any) -> bool:
    return _is_a(connection, "asyncpg.pool", "PoolConnectionProxy")


def _append(connection: Any, row: EventRow) -> None:
    if _is_a(connection, "sqlalchemy.orm", "Session", "scoped_session"):
        connection = connection.connection()
    if _is_a(connection, "sqlalchemy.engine", "Connection"):
        _append_by_sqlalchemy(connection, row)
    elif _is_a(connection, "sqlite3", "Connection") or _is_a(connection, "apsw", "Connection"):
        _check_transaction(connection)
        _append_by_driver(connection, row)
    elif _is_a(connection, "psycopg", "Connection"):
        _append_by_psycopg(connection, row)
    else:
        raise _refused(connection)


def _append_by_driver(connection: Any, row: EventRow) -> None:
    from pavane.stores.sqlite.outbox import append_event

    is_apsw = _is_a(connection, "apsw", "Connection")

    def execute(sql: str, values: Any) -> Any:
        cursor = connection.cursor()
        if not is_apsw:
            cursor.row_factory = None  # the user's own may give no tuples
        cursor.execute(sql, values)
        return cursor.fetchall()

    append_event(execute, row, is_apsw=is_apsw)


async def _append_by_asyncpg(connection: Any, row: EventRow) -> None:
    from pavane.stores.postgres.outbox import append_event

    if not connection.is_in_transaction():
        raise _no_transaction(connection, "async with connection.transaction():")
    appending = append_event(row)
    sql, values = next(appending)
    with suppress(StopIteration):
        while True:
            found = await connection.fetch(_numbered(sql), *values)
            sql, values = appending.send(found)


async def _append_by_psycopg_async(connection: Any, row: EventRow) -> None:
    from pavane.stores.postgres.outbox import append_event

    _check_psycopg(connection)
    appending = append_event(row)
    sql, values = next(appending)
    with suppress(StopIteration):
        while True:
            cursor = await _tuples(connection).execute(_formatted(sql), values)
            sql, values = appending.send(await cursor.fetchall())


def _append_by_psycopg(connection: Any, row: EventRow) -> None:
    from pavane.stores.postgres.outbox import append_event

    _check_psycopg(connection)
    appending = append_event(row)
    sql, values = next(appending)
    with suppress(StopIteration):
        while True:
            cursor = _tuples(connection).execute(_formatted(sql), values)
            sql, values = appending.send(cursor.fetchall())


def _append_by_sqlalchemy_postgres(connection: Any, row: EventRow) -> None:
    from pavane.stores.postgres.outbox import append_event

    # The level may be the engine's, the connection's or the session's: the driver knows in the end.
    if getattr(connection.connection.dbapi_connection, "autocommit", False):
        raise StoreError(
            f"{_spelled(connection)} has the isolation level AUTOCOMMIT, so the event would be "
            f"published at once, whatever becomes of the rest, also within `begin()`. Give the "
            f"connection another one (execution_options(isolation_level=…)), or use `await "
            f"app.publish(event)`."
        )
    text: Any = sys.modules["sqlalchemy"].text
    appending = append_event(row)
    sql, values = next(appending)
    with suppress(StopIteration):
        while True:
            names = [f"p{at}" for at in range(len(values))]
            filled = text(sql.format(*(f":{name}" for name in names)))
            found = connection.execute(filled, dict(zip(names, values, strict=True)))
            sql, values = appending.send([tuple(each) for each in found])


def _check_psycopg(connection: Any) -> None:
    idle = connection.info.transaction_status == 0
    if connection.autocommit and idle:
        raise _no_transaction(connection, "with connection.transaction():")


def _tuples(connection: Any) -> Any:
    """Return a cursor whose rows are tuples, whatever the user's own gives."""
    return connection.cursor(row_factory=sys.modules["psycopg"].rows.tuple_row)


def _numbered(sql: str) -> str:
    return sql.format(*(f"${at}" for at in range(1, sql.count("{}") + 1)))


def _formatted(sql: str) -> str:
    return sql.format(*["%s"] * sql.count("{}"))


def _no_transaction(connection: Any, begin: str) -> StoreError:
    return StoreError(
        f"{_spelled(connection)} has no open transaction, so the event would be published at once, "
        f"whatever becomes of the rest. Publish inside `{begin}`, or use `await "
        f"app.publish(event)`."
    )


def _append_by_sqlalchemy(connection: Any, row: EventRow) -> None:
    from pavane.stores.sqlite.outbox import append_event

    if connection.dialect.name == "postgresql":
        _append_by_sqlalchemy_postgres(connection, row)
        return
    if connection.dialect.name != "sqlite":
        raise _refused(connection, connection.dialect.name)
    connection.exec_driver_sql("SELECT 1").close()  # now SQLAlchemy has begun what it begins
    driver = connection.connection.driver_connection
    _check_transaction(driver)

    def execute(sql: str, values: Any) -> Any:
        result = connection.exec_driver_sql(sql, tuple(values))
        return result.fetchall() if result.returns_rows else []

    append_event(execute, row, is_apsw=_is_a(driver, "apsw", "Connection"))


def _check_transaction(driver: Any) -> None:
    """Refuse a connection on which the event would be a transaction of its own."""
    if driver.in_transaction:
        return
    # The standard library begins a transaction by itself, unless it is told not to.
    legacy = getattr(driver, "autocommit", -1) == -1
    if legacy and getattr(driver, "isolation_level", None) is not None:
        return
    raise StoreError(
        f"{_spelled(driver)} has no open transaction and commits each statement by itself, so the "
        f"event would be published at once, whatever becomes of the rest. Begin a transaction "
        f"first (BEGIN IMMEDIATE), or use `await app.publish(event)`."
    )


def _refused(connection: Any, dialect: str = "") -> Exception:
    return BadArguments(
        f"{_spelled(connection)}{f' ({dialect})' if dialect else ''} is no connection that the "
        f"outbox knows: one of asyncpg, psycopg, sqlite3 or apsw, or SQLAlchemy's Connection, "
        f"Session, AsyncConnection or AsyncSession to Postgres or SQLite."
    )


def _spelled(connection: object) -> str:
    kind = type(connection)
    return f"{kind.__module__}.{kind.__qualname__}"
