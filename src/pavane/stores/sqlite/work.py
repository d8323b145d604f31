"""User code inside the store's transaction: `Commit.work`.

Each runs in a savepoint, on the writer thread, with the writer's own connection. It may read and
write as it likes, but not end the transaction, which is not its own: the authoriser denies that to
statements, and a conflict clause that rolls back all the same fails the work, alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import apsw

from pavane.errors import PavaneError, WorkFailed
from pavane.stores.port import Commit, Conflict, broken_chain
from pavane.stores.sqlite.connection import Connection, Cursor, new_cursor

_SAVEPOINT = "pavane work"
_OF_THE_STORE = (apsw.FullError, apsw.IOError, apsw.CorruptError, apsw.NotADBError)
"""Errors that no work is to blame for, and that no other commit would fare better with."""


def do_work(c: Connection, batch: Sequence[Commit]) -> dict[Commit, PavaneError]:
    """Do the work of these commits; return those that are refused, with the reason.

    Raises WorkFailed if one ended the transaction, in which the others' work is lost then.
    """
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
    state = _state(c, commit)
    c.execute(f'SAVEPOINT "{_SAVEPOINT}"')
    error = _called(c, commit, state)
    if isinstance(error, _OF_THE_STORE):
        raise error
    if not c.in_transaction:
        raise WorkFailed(_ended()) from error
    if error is not None:
        c.execute(f'ROLLBACK TO "{_SAVEPOINT}"')
    c.execute(f'RELEASE "{_SAVEPOINT}"')
    return None if error is None else WorkFailed(error)


def _called(c: Connection, commit: Commit, state: bytes | None) -> BaseException | None:
    """Call the work; return what it raised. Statements that it left unfinished are ended."""
    assert commit.work is not None
    cursors: WeakSet[Cursor] = WeakSet()

    def cursor(connection: Connection) -> Cursor:
        if not connection.in_transaction:  # what follows would be a transaction of its own
            raise _ended()
        made = new_cursor(connection)
        cursors.add(made)
        return made

    c.authorizer, c.cursor_factory = _not_its_own, cursor
    try:
        commit.work(c, state)
        return None
    except apsw.AuthError as error:
        return _forbidden(error)
    except BaseException as error:  # work that exits has failed; the writer thread goes on
        return error
    finally:
        c.authorizer, c.cursor_factory = None, new_cursor
        for left in list(cursors):
            left.close(True)  # an unfinished statement would keep the transaction from ending


def _ended() -> PavaneError:
    return PavaneError(
        "The transaction was rolled back by a statement in it (such as INSERT OR ROLLBACK, or "
        "RAISE(ROLLBACK) in a trigger), but it is not its own: others' work is in it too. Write OR "
        "ABORT, and raise an error to undo what was done here."
    )


def _forbidden(denied: apsw.AuthError) -> PavaneError:
    error = PavaneError(
        "COMMIT, ROLLBACK and BEGIN are not for what runs in a transaction of Pavane's, which "
        "commits it with the result. Leave them out; raise an error to undo what was done here."
    )
    error.__cause__ = denied
    return error


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


def _not_its_own(operation: int, _: Any, name: Any, *__: Any) -> int:
    if operation == apsw.SQLITE_TRANSACTION:
        return apsw.SQLITE_DENY
    if operation == apsw.SQLITE_SAVEPOINT and str(name).lower() == _SAVEPOINT:
        return apsw.SQLITE_DENY
    return apsw.SQLITE_OK
