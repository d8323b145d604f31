"""The rights that a node needs in the schema `pavane`: asked for when it joins.

A node that lacks one of them would begin work that it cannot write down, and do it again and again.
"""

from __future__ import annotations

from pavane.errors import StoreError
from pavane.stores.postgres.connection import Connection, place_of

SHOWN_MAX = 3
"""How many of the rights that are missing are named."""

_MISSING = """
    SELECT kind || ' on pavane.' || relname
    FROM pg_class, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS kind
    WHERE relnamespace = to_regnamespace('pavane') AND relkind = 'r'
        AND NOT has_table_privilege(pg_class.oid, kind)
    UNION ALL
    SELECT 'EXECUTE on pavane.' || proname FROM pg_proc
    WHERE pronamespace = to_regnamespace('pavane') AND NOT has_function_privilege(oid, 'EXECUTE')
    ORDER BY 1
"""


def grants(role: str) -> str:
    """Return the statements that give `role`, quoted for SQL, what nodes need."""
    tables = "SELECT, INSERT, UPDATE, DELETE ON"
    return (
        f"GRANT USAGE ON SCHEMA pavane TO {role}; "
        f"GRANT {tables} ALL TABLES IN SCHEMA pavane TO {role}; "
        f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA pavane TO {role}; "
        f"ALTER DEFAULT PRIVILEGES IN SCHEMA pavane GRANT {tables} TABLES TO {role};"
    )


async def check_rights(connection: Connection, dsn: str) -> None:
    """Raise StoreError, with the statements that help, if this user may not do a node's work."""
    missing = [row[0] for row in await connection.fetch(_MISSING)]
    if missing:
        role = await connection.fetchval("SELECT quote_ident(current_user)")
        named = ", ".join(missing[:SHOWN_MAX])
        if len(missing) > SHOWN_MAX:
            named += f" and {len(missing) - SHOWN_MAX} more"
        raise StoreError(
            f"{place_of(dsn)}: a worker cannot be {role}, who lacks {named}. Let the owner of the "
            f"schema say: {grants(role)}"
        )
