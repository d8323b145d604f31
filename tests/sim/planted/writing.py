"""Planted bugs: each re-creates a real class of mistake, to prove that the storms find it.

A bug is a context manager that changes the engine or the database while it is open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from typing import Any
from unittest.mock import patch

import msgspec

from pavane.core.saga import Saga
from pavane.engine.committer import Committer
from pavane.engine.node import PAGE, Session
from pavane.engine.steps import Attempt
from pavane.engine.subscription import Subscription
from pavane.errors import PavaneError, StoreError
from pavane.service import StepInfo
from pavane.stores.eventlog import EventRow, Reaction
from pavane.stores.memory import MemoryStore
from pavane.stores.port import Commit, Fence
from pavane.testing.sim.database import SimStore

Bug = Callable[[], AbstractContextManager[None]]
Results = Sequence[PavaneError | None]


@contextmanager
def fence_by_plain_read() -> Iterator[None]:
    """Look at the lease before the transaction instead of in it: a zombie's write lands."""
    submit, write = SimStore.submit, MemoryStore._write
    proved: set[int] = set()

    def submitted(self: SimStore, batch: Sequence[Commit], fence: Fence | None, done: Any) -> None:
        if fence is not None and self._data.holds(fence):
            submit(self, batch, fence, done)
            proved.add(fence.node)
        else:
            submit(self, batch, fence, done)

    def written(self: MemoryStore, batch: Sequence[Commit], fence: Fence | None) -> Results:
        if fence is None or fence.node not in proved:
            return write(self, batch, fence)
        with patch.object(self._data, "prove", lambda _: None):
            return write(self, batch, fence)

    with patch.object(SimStore, "submit", submitted), patch.object(MemoryStore, "_write", written):
        yield


@contextmanager
def acknowledge_before_commit() -> Iterator[None]:
    """Go on with what was sent to the store, as if it were durable."""
    submit = SimStore.submit

    def submitted(self: SimStore, batch: Sequence[Commit], fence: Fence | None, done: Any) -> None:
        submit(self, batch, fence, lambda results: None)
        for commit in batch:
            for row in (*commit.messages, *commit.events):
                row.pos = 10**6
        asyncio.get_running_loop().call_soon(done, [None] * len(batch))

    with patch.object(SimStore, "submit", submitted):
        yield


@contextmanager
def take_an_error_for_success() -> Iterator[None]:
    """Go on after an ambiguous commit as if it had taken effect."""
    finished = Committer._finished

    def ended(self: Committer, results: Results) -> None:
        finished(self, [None if isinstance(error, StoreError) else error for error in results])

    with patch.object(Committer, "_finished", ended):
        yield


@contextmanager
def another_key_on_retry() -> Iterator[None]:
    """Give each attempt of a step an idempotency key of its own."""
    info = Attempt.info

    def told(self: Attempt) -> StepInfo:
        given = info(self)
        key = f"{given.idempotency_key}-{given.attempt}"
        return msgspec.structs.replace(given, idempotency_key=key)

    with patch.object(Attempt, "info", told):
        yield


@contextmanager
def _in_two_commits(split: Callable[[Commit], Commit | None]) -> Iterator[None]:
    """Write first what `split` leaves of a commit, and what it returns in another one."""
    submit = Committer.submit

    def submitted(self: Committer, commit: Commit) -> None:
        rest = split(commit)
        if rest is not None:
            rest.done, commit.done = commit.done, _then(self, rest, commit.done)
        submit(self, commit)

    def _then(self: Committer, rest: Commit, done: Callable[[Any], None]) -> Callable[[Any], None]:
        return lambda error: submit(self, rest) if error is None else done(error)

    with patch.object(Committer, "submit", submitted):
        yield


def handler_mark_in_another_commit() -> AbstractContextManager[None]:
    """Write what a handler did, and then that it did."""

    def split(commit: Commit) -> Commit | None:
        reaction = commit.reaction
        if reaction is None or not reaction.marks or not reaction.states:
            return None
        commit.reaction = copy(reaction)
        commit.reaction.marks = ()
        return Commit(chain=commit.chain, reaction=Reaction(marks=reaction.marks))

    return _in_two_commits(split)


def status_in_another_commit() -> AbstractContextManager[None]:
    """Write what a run became before the entry of its journal by which it became so."""

    def split(commit: Commit) -> Commit | None:
        if not commit.journal or not commit.runs or all(row.entries == 1 for row in commit.runs):
            return None
        journal, commit.journal = commit.journal, ()
        return Commit(chain=commit.chain, journal=journal)

    return _in_two_commits(split)


@contextmanager
def no_inbox_marks_of_batons() -> Iterator[None]:
    """Take a baton without a mark, so that one that comes again is taken again."""
    submit = Committer.submit

    def submitted(self: Committer, commit: Commit) -> None:
        commit.inbox = [row for row in commit.inbox if "#h" not in row.id]
        submit(self, commit)

    with patch.object(Committer, "submit", submitted):
        yield


@contextmanager
def cursor_that_skips() -> Iterator[None]:
    """Take the log's end after reading it for what was read."""

    async def read_tail(self: Session) -> bool:
        messages = await self.store.read_log(self.store.tail, None, None, PAGE, self.fence.node)
        head = await self.store.log_head()
        found = False
        for message in messages:
            floor = self._floors.get(message.target)
            if floor is not None and message.pos > floor:
                found = True
                self._take(message, redelivered=False)
        self.store.tail = max(self.store.tail, head)
        return found

    with patch.object(Session, "_read_tail", read_tail):
        yield


@contextmanager
def no_compensation_on_cancel() -> Iterator[None]:
    """Forget the compensations of a run that is cancelled."""
    leave = Saga.__aexit__

    async def left(self: Saga, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, asyncio.CancelledError):
            self._registered.clear()
        await leave(self, kind, error, trace)

    with patch.object(Saga, "__aexit__", left):
        yield


@contextmanager
def retry_that_is_overtaken() -> Iterator[None]:
    """Let later events of a key go on while an earlier one waits for its retry."""
    offer = Subscription.offer

    def offered(self: Subscription, row: EventRow) -> None:
        lane = self.lanes.get(row.key or row.pos)
        if lane is not None and lane.is_blocked:
            del self.lanes[row.key or row.pos]
        offer(self, row)

    with patch.object(Subscription, "offer", offered):
        yield


BUGS: dict[str, Bug] = {
    bug.__name__: bug
    for bug in (
        fence_by_plain_read,
        acknowledge_before_commit,
        take_an_error_for_success,
        another_key_on_retry,
        handler_mark_in_another_commit,
        status_in_another_commit,
        no_inbox_marks_of_batons,
        cursor_that_skips,
        no_compensation_on_cancel,
        retry_that_is_overtaken,
    )
}
