"""The schema `pavane` in the database: made, and brought up to date, by who first comes to work.

Migrations only add, so that nodes of the version before may go on meanwhile. Several nodes that
start at once wait for each other.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from pavane.errors import NoStore, StoreError
from pavane.stores.postgres.connection import Connection, place_of

LOCK = 0x50415641  # "PAVA"
WAIT_S = 20


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
        async with connection.transaction():
            await connection.execute(f"SET LOCAL lock_timeout = '{WAIT_S}s'")
            await connection.execute("SELECT pg_advisory_xact_lock($1)", LOCK)
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
    elif version > newest:
        raise StoreError(
            f"{place_of(dsn)} was written by a newer Pavane (schema {version}, this one knows "
            f"{newest}). Upgrade Pavane here; nothing was changed."
        )
    sql = "SELECT value FROM pavane.meta WHERE key = 'partitions'"
    return int(await connection.fetchval(sql))


async def _version(connection: Connection) -> int:
    """Return the schema's version, 0 if there is none."""
    if await connection.fetchval("SELECT to_regclass('pavane.meta')") is None:
        return 0
    sql = "SELECT value FROM pavane.meta WHERE key = 'schema'"
    return int(await connection.fetchval(sql) or 0)
