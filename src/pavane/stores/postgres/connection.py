"""Connections to Postgres: how they are made, which databases are refused, and when one is lost.

asyncpg is used without its time-outs: they send a cancel request, and a commit that is cancelled
while it waits for a standby is done here but not there. What does not answer in time is hung up on
instead, and then looked up.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Coroutine
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from pavane.errors import StoreError

asyncpg: Any = import_module("asyncpg")
"""It brings no types; a strict checker would call all that touches it unknown."""
Connection = Any
"""An `asyncpg.Connection`."""

VERSION_MIN = 150000
CONNECT_S = 10.0
ANSWER_S = 30.0
"""How long a statement may take before its connection is taken for dead."""
QUICK_S = 5.0
"""The same for statements that take milliseconds: by those, half-open connections are found."""

SETTINGS = {
    "application_name": "pavane",
    "jit": "off",  # statements are short, and asyncpg's own look at types would be compiled
    "idle_in_transaction_session_timeout": "10s",
    "tcp_user_timeout": "10s",
    "client_connection_check_interval": "3s",  # who was hung up on waits for no lock any more
}

_AWAITED = (
    "SELECT current_setting('synchronous_standby_names') FROM pg_stat_activity"
    " WHERE wait_event = 'SyncRep' LIMIT 1"
)
"""Of a connection that was hung up on in its commit, the server still knows that it waits."""

_BLOCKER = (
    "SELECT other.pid, other.usename, other.application_name FROM pg_stat_activity AS ours"
    " JOIN pg_stat_activity AS other ON other.pid = ANY(pg_blocking_pids(ours.pid))"
    " WHERE ours.wait_event_type = 'Lock' AND ours.application_name = 'pavane'"
    " AND ours.datname = current_database() AND other.application_name <> 'pavane' LIMIT 1"
)
"""Likewise of one that waited for a lock, for a moment."""

_OF_UNIX = "client_connection_check_interval"
_UNSETTABLE = (
    asyncpg.ProtocolViolationError,
    asyncpg.InvalidParameterValueError,
    asyncpg.UndefinedObjectError,
)
_FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl")


class Silent(ConnectionError):
    """A connection was hung up on, since it did not answer in time."""


LOST: tuple[type[BaseException], ...] = (
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # it was told that the server ends, when it expected more
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.TooManyConnectionsError,
    OSError,
    asyncio.TimeoutError,
)
"""Errors of a connection, not of what was asked. Whether a write took effect is unknown."""

FAILED: tuple[type[BaseException], ...] = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
)
"""All errors that asking a database may raise."""

BUSY: tuple[type[BaseException], ...] = (
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
    asyncpg.LockNotAvailableError,
    asyncpg.QueryCanceledError,
)
"""Errors after which nothing was written, and the same may succeed."""

OF_ONE_COMMIT: tuple[type[BaseException], ...] = (
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.DataError,
    asyncpg.exceptions.ProgramLimitExceededError,
)
"""Errors for which one commit is to blame."""

_STATEMENT_MODE = "statement pooling mode"
"""In what PgBouncer says to who begins a transaction where there are none."""


def is_lost(error: BaseException) -> bool:
    """Tell whether an error is about the connection. A bad value is an InterfaceError too."""
    if _STATEMENT_MODE in str(error):
        return False  # a pooler says so, hangs up, and always will
    return isinstance(error, LOST) and not isinstance(error, (asyncpg.DataError, ValueError))


def is_no_text(error: BaseException) -> bool:
    """Tell whether a value is to blame that no text can be: with a NUL or a lone surrogate."""
    no_utf8 = isinstance(error, asyncpg.DataError) and "surrogates not allowed" in str(error)
    return no_utf8 or isinstance(error, asyncpg.CharacterNotInRepertoireError)


def check_address(dsn: str) -> None:
    """Raise StoreError for an address that is none.

    Nothing of it is shown: in a wrong one, anything may be a part of the password.
    """
    wrong = _what_is_wrong(dsn)
    if wrong:
        raise StoreError(
            f"The address of the Postgres is wrong: {wrong}. It should be like "
            f"postgresql://user:password@host:5432/database; in a password write @ as %40, / as "
            f"%2F, : as %3A, ? as %3F and # as %23."
        )


def _what_is_wrong(dsn: str) -> str:
    try:
        parts = urlsplit(dsn)
    except ValueError:
        return "its host cannot be one, such as an IPv6 address with one bracket"
    if parts.netloc.count("@") > 1:
        return "it has two @ before the host"
    try:
        given = parse_qs(parts.query, strict_parsing=True) if parts.query else {}
    except ValueError:
        return "what follows its ? is not name=value, joined by &"
    hosts = [parts.netloc.rpartition("@")[2], *given.get("host", ())]
    hosts += [f":{port}" for ports in given.get("port", ()) for port in ports.split(",")]
    try:
        for host in ",".join(hosts).split(","):
            _ = urlsplit(f"//{host}").port
    except ValueError:
        return "its port is no number up to 65535"
    for name in _FILES:
        if name in given and not Path(given[name][-1]).is_file():
            return f"its {name} names no file that is there"
    return ""


def place_of(dsn: str) -> str:
    """Return what a DSN points at, for people: without the password."""
    return f"postgresql://{_hosts_of(dsn) or 'localhost'}{urlsplit(dsn).path}"


def _hosts_of(dsn: str) -> str:
    """Return the hosts that a DSN names, or else the environment, as far as any are named."""
    parts = urlsplit(dsn)
    given = parse_qs(parts.query).get("host")
    at = parts.netloc.rpartition("@")[2]
    return at or (given[-1] if given else os.environ.get("PGHOST", ""))


async def connect(dsn: str, connection_class: type[Connection] | None = None) -> Connection:
    """Connect to the primary; raise StoreError that says what to do, or an error of Postgres."""
    options: dict[str, Any] = {
        "timeout": CONNECT_S, "target_session_attrs": "any", "server_settings": SETTINGS,
        "connection_class": connection_class or asyncpg.Connection,
    }  # fmt: skip
    if "," in _hosts_of(dsn):  # of several hosts, take the one that can be written to
        options["target_session_attrs"] = "read-write"
    try:
        try:
            return await asyncpg.connect(dsn, **options)
        except _UNSETTABLE as error:
            if not any(it in str(error) for it in ("startup parameter", _OF_UNIX)):
                raise
            # A pooler in transaction mode takes no settings of a session; a server on Windows, or
            # an old one, does not take all of them.
            options["server_settings"] = {"application_name": "pavane"}
            return await asyncpg.connect(dsn, **options)
    except ValueError as error:  # of a certificate, or of what the address names; of no write
        raise explained(dsn, error) from error


def explained(dsn: str, error: BaseException) -> StoreError:
    """Return what an error of Postgres means here, and what to do."""
    place = place_of(dsn)
    if isinstance(error, StoreError):
        return error
    if isinstance(error, asyncpg.InvalidCatalogNameError):
        text = (
            f"{place} has no such database. Create it: CREATE DATABASE {_database_of(dsn)} "
            f"ENCODING 'UTF8' TEMPLATE template0;"
        )
    elif isinstance(error, asyncpg.UndefinedObjectError) and _is_of_address(dsn, error):
        text = (
            f"{place} does not know an option of the address ({error}). After its ? may stand "
            f"those of asyncpg, such as sslmode and sslrootcert, and settings of the server, such "
            f"as search_path; leave others out."
        )
    elif (
        isinstance(error, asyncpg.ObjectNotInPrerequisiteStateError)
        and getattr(error, "severity_en", "") != "ERROR"  # it is about the connection
    ):
        text = (
            f"{place} takes no connections ({error}). Let it: ALTER DATABASE {_database_of(dsn)} "
            f"ALLOW_CONNECTIONS true;"
        )
    elif isinstance(error, asyncpg.InvalidPasswordError):
        text = (
            f"{place} refuses the password ({error}). It is taken from the address, where @ is "
            f"written %40, else from $PGPASSWORD or ~/.pgpass."
        )
    elif isinstance(error, asyncpg.InvalidAuthorizationSpecificationError):
        text = (
            f"{place} refuses this user ({error}). The role must be there, with LOGIN, and "
            f"pg_hba.conf must let it in from here."
        )
    elif isinstance(error, asyncpg.TooManyConnectionsError):
        text = (
            f"{place} takes no more connections ({error}). Raise what limits them, which is "
            f"max_connections of the server or CONNECTION LIMIT of the database or the role, or "
            f"put a pooler before it."
        )
    elif isinstance(error, asyncpg.ReadOnlySQLTransactionError):
        text = (
            f"{place} takes no writes ({error}). Unless it has become a replica, "
            f"default_transaction_read_only is on: turn it off for this user (ALTER ROLE), this "
            f"database (ALTER DATABASE) or the server."
        )
    elif isinstance(error, asyncpg.InsufficientPrivilegeError):
        text = (
            f"{place}: this user lacks a right ({error}). “Rights” in docs/postgres.md tells what "
            f"is needed."
        )
    elif isinstance(error, asyncpg.DiskFullError):
        text = f"The disk of {place} is full. Nothing of the refused writes was kept; free space."
    elif _STATEMENT_MODE in str(error):
        text = (
            f"{place} is behind a pooler in statement mode, in which there are no transactions. "
            f"Set pool_mode=transaction there."
        )
    elif isinstance(
        error, (asyncpg.InvalidSQLStatementNameError, asyncpg.DuplicatePreparedStatementError)
    ):
        text = (
            f"{place} mixes up prepared statements: a pooler is between that does not know them. "
            f"Use PgBouncer 1.21 or newer with max_prepared_statements above 0."
        )
    elif isinstance(error, (asyncpg.UndefinedTableError, asyncpg.UndefinedFunctionError)):
        text = (
            f"{place} has lost a part of its schema `pavane` ({error}). Restore it from a backup."
        )
    elif isinstance(error, asyncpg.CannotConnectNowError):
        text = (
            f"{place} is there, and takes no connections at the moment: {error}. Workers that run "
            f"try again by themselves until it does; start anything else once more then."
        )
    elif isinstance(error, ssl.SSLError):
        text = (
            f"{place} cannot be reached by TLS ({error}). See sslmode, sslrootcert, sslcert and "
            f"sslkey in the address."
        )
    elif isinstance(error, Silent):
        text = (
            f"{place} does not answer: {error}. It is overloaded, or cut off from here, or what "
            f"was asked waits for a lock of somebody else's."
        )
    elif is_lost(error):
        is_late = isinstance(error, TimeoutError)
        detail = str(error) or ("no answer in time" if is_late else type(error).__name__)
        text = f"{place} cannot be reached: {detail}. Is it running, and is the address right?"
    else:
        text = f"{place} cannot be used: {str(error).rstrip('.')}."
    return StoreError(text)


def _is_of_address(dsn: str, error: BaseException) -> bool:
    """Tell whether an error names an option that stands in the address."""
    return any(f'"{name}"' in str(error) for name in parse_qs(urlsplit(dsn).query))


def _database_of(dsn: str) -> str:
    """Return the database that a DSN names, quoted for SQL."""
    return '"{}"'.format(unquote(urlsplit(dsn).path.lstrip("/")).replace('"', '""'))


async def looked_into(dsn: str, error: BaseException) -> StoreError:
    """Like `explained`; of one that was silent, ask first what it waits for."""
    if isinstance(error, Silent):
        with suppress(*FAILED, StoreError):
            connection = await connect(dsn)
            try:
                names = await answered(connection, connection.fetchval(_AWAITED), QUICK_S)
                blocker = await answered(connection, connection.fetchrow(_BLOCKER), QUICK_S)
            finally:
                connection.terminate()
            if names:
                return StoreError(
                    f"{place_of(dsn)}: commits wait for a synchronous standby that does not answer "
                    f"(synchronous_standby_names = '{names}'). Start it, or take it off that "
                    f"setting."
                )
            if blocker:
                pid, user, application = blocker
                return StoreError(
                    f"{place_of(dsn)}: what is asked waits for a lock that another session holds "
                    f"(pid {pid}, user {user!r}, application {application!r}). Let it end, or end "
                    f"it: SELECT pg_terminate_backend({pid});"
                )
    return explained(dsn, error)


async def check_server(connection: Connection, dsn: str) -> None:
    """Refuse a database in which what was acknowledged could be lost or not be written."""
    place = place_of(dsn)
    row = await connection.fetchrow(
        "SELECT current_setting('server_version_num')::int AS version,"
        " pg_is_in_recovery() AS replica,"
        " current_setting('fsync') AS fsync, current_setting('synchronous_commit') AS commits,"
        " current_setting('full_page_writes') AS pages,"
        " quote_ident(session_user) AS role, (SELECT pg_encoding_to_char(encoding) FROM pg_database"
        "  WHERE datname = current_database()) AS encoding,"
        " current_setting('server_version') AS name"
    )
    reason = ""
    if row["version"] < VERSION_MIN:
        reason = f"is Postgres {row['name']}; Pavane needs 15 or newer. Upgrade the server."
    elif row["replica"]:
        reason = (
            "is a replica, which cannot be written to. Name the primary, or all hosts: "
            "postgresql://a,b/name finds it."
        )
    elif row["fsync"] != "on" or row["pages"] != "on":
        setting = "fsync" if row["fsync"] != "on" else "full_page_writes"
        reason = (
            f"runs with {setting}=off: a power cut would destroy it. Set {setting}=on in "
            f"postgresql.conf and reload."
        )
    elif row["commits"] in ("off", "local"):
        reason = (
            f"has synchronous_commit={row['commits']}, so what was acknowledged may be lost. "
            f"Set it to on for this user: ALTER ROLE {row['role']} SET synchronous_commit = on;"
        )
    elif row["encoding"] != "UTF8":
        reason = (
            f"has encoding {row['encoding']}. Create a database with ENCODING 'UTF8' TEMPLATE "
            f"template0."
        )
    if reason:
        raise StoreError(f"{place} {reason}")


async def answered(
    connection: Connection, asking: Coroutine[Any, Any, Any], within_s: float = ANSWER_S
) -> Any:
    """Return what `connection` answers; hang up if it is silent for too long, and raise `Silent`.

    If the caller is cancelled meanwhile, the connection is hung up on as well: what it was about to
    say is not known.
    """
    is_silent = False

    def hang_up() -> None:
        nonlocal is_silent
        is_silent = True
        connection.terminate()

    silent = asyncio.get_running_loop().call_later(within_s, hang_up)
    try:
        return await asking
    except asyncio.CancelledError:
        connection.terminate()
        raise
    except LOST as error:
        if is_silent:
            raise Silent(f"it did not answer within {within_s:g} s") from error
        raise
    finally:
        silent.cancel()
