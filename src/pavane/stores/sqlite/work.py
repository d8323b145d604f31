"""User code inside the store's transaction: `Commit.work`.

Each runs in a savepoint, on the writer thread, with the writer's own connection. It may read and
write as it likes, but not end the transaction, which is not its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import apsw

from pavane.errors import PavaneError, WorkFailed
from pavane.stores.port import Commit, Conflict, broken_chain
from pavane.stores.sqlite.connection import Connection


def do_work(c: Connection, batch: Sequence[Commit]) -> dict[Commit, PavaneError]:
    """Do the work of these commits; return those that are refused, with the reason."""
    refused: dict[Commit, PavaneError] = {}
    broken: set[int] = set()
    for commit in batch:
        reason = broken_chain() if commit.chain in broken else _do(c, commit)
        if reason is not None:
            refused[commit] = reason
            broken |= {commit.chain} - {0}
    return refused


def _do(c: Connection, commit: Commit) -> PavaneError | None:
    if commit.work is None:
        return None
    if _is_done(c, commit):
        return Conflict("This was done before.")
    c.execute("SAVEPOINT work")
    c.authorizer = _not_its_own
    try:
        commit.work(c, _state(c, commit))
        return None
    except Exception as error:
        c.authorizer = None
        c.execute("ROLLBACK TO work")
        return WorkFailed(error)
    finally:
        c.authorizer = None
        c.execute("RELEASE work")


def _is_done(c: Connection, commit: Commit) -> bool:
    """Tell whether the commit would repeat a mark, before anything is done for it."""
    marks = commit.reaction.marks if commit.reaction is not None else ()
    for mark in marks:
        sql = "SELECT 1 FROM marks WHERE handler = ? AND pos = ?"
        if c.execute(sql, (mark.handler, mark.pos)).get is not None:
            return True
    for mark in commit.inbox:
        sql = "SELECT 1 FROM inbox WHERE id = ? AND service = ?"
        if c.execute(sql, (mark.id, mark.service)).get is not None:
            return True
    return False


def _state(c: Connection, commit: Commit) -> bytes | None:
    if commit.work_state is None:
        return None
    sql = "SELECT body FROM states WHERE service = ? AND name = ? AND key = ?"
    body = c.execute(sql, commit.work_state).get
    return None if body is None else body.encode()


def _not_its_own(operation: int, *_: Any) -> int:
    if operation == apsw.SQLITE_TRANSACTION:
        return apsw.SQLITE_DENY
    return apsw.SQLITE_OK
