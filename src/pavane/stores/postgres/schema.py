"""The schema `pavane` in the database: made, and brought up to date, by who first comes to work.

Migrations only add, so that nodes of the version before may go on meanwhile. Several nodes that
start at once wait for each other. Whoever reads a table, as a backup does, keeps it from being
changed; and who waits for that keeps all others from the table, so that is tried for moments only.
"""

from __future__ import annotations

import asyncio
import logging
import random
from functools import cache
from importlib.resources import files

from pavane.errors import NoStore, StoreError
from pavane.stores.postgres.connection import Connection, asyncpg, place_of

log = logging.getLogger("pavane.postgres")

LOCK = 0x50415641  # "PAVA"
WAIT_S = 20.0
LOCK_S = 0.3
"""How long to wait for a table at a time: others must be able to renew their leases."""
PAUSE_S = 1.0

_READER = (
    "SELECT other.pid, other.usename, other.application_name FROM pg_locks"
    " JOIN pg_class ON pg_class.oid = relation JOIN pg_stat_activity AS other USING (pid)"
    " WHERE relnamespace = to_regnamespace('pavane') AND other.application_name <> 'pavane'"
    " ORDER BY other.xact_start LIMIT 1"
)


@cache
def migrations() -> tuple[tuple[int, str], ...]:
    """Return all numbered migrations in order."""
    found = (files(__package__ or "") / "migrations").iterdir()
    return tuple(
        sorted(
            (int(file.name[:3]), file.read_text("utf-8"))
            for file in found
            if file.name.endswith(".sql")
        )
    )


def newest_schema() -> int:
    """Return the number of the schema that this version writes."""
    return migrations()[-1][0]


async def prepare(connection: Connection, dsn: str, partitions: int, *, create: bool) -> int:
    """Bring the schema up to date; return how many partitions a service has in this database.

    Without `create`, refuse one that is not up to date.
    """
    newest = newest_schema()
    version = await _version(connection)
    if not version and not create:
        raise NoStore(
            f"{place_of(dsn)} holds no store yet. `pavane run` and `pavane runs start` make one; "
            f"perhaps you mean another database."
        )
    if version < newest and not create:
        raise StoreError(
            f"{place_of(dsn)} was written by an older Pavane (schema {version}, this one knows "
            f"{newest}). The first worker of this version brings it up to date, or `pavane runs "
            f"start`; nothing was changed."
        )
    if version < newest:
        await _migrate_patiently(connection, dsn, partitions)
    elif version > newest:
        raise StoreError(
            f"{place_of(dsn)} was written by a newer Pavane (schema {version}, this one knows "
            f"{newest}). Upgrade Pavane here; nothing was changed."
        )
    sql = "SELECT value FROM pavane.meta WHERE key = 'partitions'"
    return int(await connection.fetchval(sql))


async def _migrate_patiently(connection: Connection, dsn: str, partitions: int) -> None:
    loop = asyncio.get_running_loop()
    ends = loop.time() + WAIT_S
    is_told = False
    while True:
        try:
            async with connection.transaction():
                await _migrate(connection, partitions, max(LOCK_S, ends - loop.time()))
        except asyncpg.LockNotAvailableError as error:
            if loop.time() > ends:
                raise await _locked(connection, dsn) from error
            if not is_told:
                log.warning(
                    "the schema of %s is to be brought up to date, and somebody uses a table of it",
                    place_of(dsn),
                )
            is_told = True
        else:
            return
        await asyncio.sleep(PAUSE_S * (0.5 + random.random()))


async def _migrate(connection: Connection, partitions: int, within_s: float) -> None:
    newest = newest_schema()
    await _wait_for_locks(connection, within_s)
    await connection.execute("SELECT pg_advisory_xact_lock($1)", LOCK)
    await _wait_for_locks(connection, LOCK_S)
    version = await _version(connection)
    if await connection.fetchval("SELECT to_regnamespace('pavane') IS NULL"):
        await connection.execute("CREATE SCHEMA pavane")
    for number, sql in migrations():
        if number > version:
            await connection.execute(sql)
    if not version:
        await connection.execute(
            "INSERT INTO pavane.meta VALUES ('partitions', $1), ('next_run', '1')",
            str(partitions),
        )
    if version < newest:
        await connection.execute(
            "INSERT INTO pavane.meta VALUES ('schema', $1)"
            " ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            str(newest),
        )


async def _wait_for_locks(connection: Connection, within_s: float) -> None:
    await connection.execute(f"SET LOCAL lock_timeout = '{within_s * 1000:.0f}ms'")


async def _locked(connection: Connection, dsn: str) -> StoreError:
    reader = await connection.fetchrow(_READER)
    who = "pid {}, user {!r}, application {!r}".format(*reader) if reader else "it is gone by now"
    return StoreError(
        f"{place_of(dsn)} cannot be brought up to date while another session uses its tables "
        f"({who}), such as a backup or an open transaction. Start again when it has ended; nothing "
        f"was changed."
    )


async def _version(connection: Connection) -> int:
    """Return the schema's version, 0 if there is none."""
    if await connection.fetchval("SELECT to_regclass('pavane.meta')") is None:
        return 0
    sql = "SELECT value FROM pavane.meta WHERE key = 'schema'"
    return int(await connection.fetchval(sql) or 0)
