"""Mistakes in how things are written: what is durable when, with what, and by whose right."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any
from unittest.mock import patch

from pavane.engine.committer import Committer
from pavane.engine.lease import LeaseKeeper
from pavane.engine.session import PAGE, Session
from pavane.errors import PavaneError, StoreError
from pavane.stores.eventlog import Reaction
from pavane.stores.memory import MemoryStore
from pavane.stores.port import Commit, Fence, NodeRow, PartitionRow
from pavane.testing.sim.database import SimStore
from pavane.testing.sim.process import SimProcess
from tests.sim.planted.plant import planted

Results = Sequence[PavaneError | None]
FAST_S = 2.0
"""How far the clock of every second process is ahead."""


@planted("bank")
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


@planted("bank")
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


@planted("bank")
def take_an_error_for_success() -> Iterator[None]:
    """Go on after an ambiguous commit as if it had taken effect."""
    finished = Committer._finished

    def ended(self: Committer, results: Results) -> None:
        finished(self, [None if isinstance(error, StoreError) else error for error in results])

    with patch.object(Committer, "_finished", ended):
        yield


@planted("bank")
def forget_what_came_while_writing() -> Iterator[None]:
    """Lose a wake-up: what is submitted while a batch is written waits for the next submission."""
    finished = Committer._finished

    def ended(self: Committer, results: Results) -> None:
        waiting, self._waiting = self._waiting, []
        finished(self, results)
        self._waiting = waiting + self._waiting

    with patch.object(Committer, "_finished", ended):
        yield


# -- one commit in two -------------------------------------------------------------------------


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


def _without(commit: Commit, **gone: Any) -> Reaction:
    """Give a commit a reaction of its own without these fields; return the one it had."""
    assert commit.reaction is not None
    had, commit.reaction = commit.reaction, copy(commit.reaction)
    for field, value in gone.items():
        setattr(commit.reaction, field, value)
    return had


@planted("post")
def handler_mark_in_another_commit() -> Iterator[None]:
    """Write what a handler did, and then that it did."""

    def split(commit: Commit) -> Commit | None:
        if commit.reaction is None or not commit.reaction.marks or not commit.reaction.states:
            return None
        marks = _without(commit, marks=()).marks
        return Commit(chain=commit.chain, reaction=Reaction(marks=marks))

    with _in_two_commits(split):
        yield


@planted("post")
def state_in_another_commit() -> Iterator[None]:
    """Write that a handler is done, and then the state that it changed."""

    def split(commit: Commit) -> Commit | None:
        if commit.reaction is None or not commit.reaction.states:
            return None
        states = _without(commit, states=()).states
        return Commit(chain=commit.chain, reaction=Reaction(states=states))

    with _in_two_commits(split):
        yield


@planted("post")
def dead_letter_without_its_mark() -> Iterator[None]:
    """Write a dead letter, but not that its event is handled."""
    submit = Committer.submit

    def submitted(self: Committer, commit: Commit) -> None:
        if commit.reaction is not None and commit.reaction.dead:
            commit.reaction.marks = ()
        submit(self, commit)

    with patch.object(Committer, "submit", submitted):
        yield


@planted("bank")
def status_in_another_commit() -> Iterator[None]:
    """Write what a run became before the entry of its journal by which it became so."""

    def split(commit: Commit) -> Commit | None:
        if not commit.journal or not commit.runs or all(row.entries == 1 for row in commit.runs):
            return None
        journal, commit.journal = commit.journal, ()
        return Commit(chain=commit.chain, journal=journal)

    with _in_two_commits(split):
        yield


@planted("hasty")
def inbox_mark_in_another_commit() -> Iterator[None]:
    """Write what a message led to, and then that it came."""

    def split(commit: Commit) -> Commit | None:
        if not commit.inbox or not (commit.messages or commit.journal):
            return None
        inbox, commit.inbox = commit.inbox, ()
        return Commit(chain=commit.chain, inbox=inbox)

    with _in_two_commits(split):
        yield


@planted("bank")
def no_inbox_marks_of_batons() -> Iterator[None]:
    """Take a baton without a mark, so that one that comes again is taken again."""
    submit = Committer.submit

    def submitted(self: Committer, commit: Commit) -> None:
        commit.inbox = [row for row in commit.inbox if "#h" not in row.id]
        submit(self, commit)

    with patch.object(Committer, "submit", submitted):
        yield


# -- whose it is -------------------------------------------------------------------------------


@planted("bank")
def lease_renewed_by_a_stuck_process() -> Iterator[None]:
    """Renew the lease whether the event loop goes on or not."""
    renew = LeaseKeeper._renew

    def renewed(self: LeaseKeeper) -> bool:
        self._alive = True
        return renew(self)

    with patch.object(LeaseKeeper, "_renew", renewed):
        yield


@planted("bank")
def loss_of_the_lease_unnoticed() -> Iterator[None]:
    """Go on, in vain, when the store says that the lease is lost."""
    lost = Session.lost

    def ignored(self: Session, error: PavaneError) -> None:
        if isinstance(error, StoreError):
            lost(self, error)

    with patch.object(Session, "lost", ignored):
        yield


@planted("night")
def rest_not_disturbed() -> Iterator[None]:
    """Let the leases of nodes that rest be, whatever is written for them."""
    with patch("pavane.stores.memory._Data.call", lambda _: None):
        yield


@planted("bank")
def own_clock_trusted() -> Iterator[None]:
    """Let a node's own clock decide whether the lease of another one is over."""
    is_gone = SimProcess.is_gone

    def judged(self: SimProcess, node: NodeRow, now_us: int) -> bool:
        return is_gone(self, node, now_us + round(self.number % 2 * FAST_S * 1e6))

    with patch.object(SimProcess, "is_gone", judged):
        yield


@planted("bank")
def partitions_stolen_from_their_owner() -> Iterator[None]:
    """Take one's share at once, instead of waiting until its owner has handed it over."""
    balance, rows_of, claim = Session.balance, SimStore.partition_rows, MemoryStore.claim

    async def balanced(self: Session) -> None:
        async def as_if_free(services: Sequence[str]) -> Sequence[PartitionRow]:
            rows = await rows_of(self.store, services)
            for row in rows:
                row.owner = row.owner if row.owner == self.fence.node else None
            return rows

        with patch.object(self.store, "partition_rows", as_if_free):
            await balance(self)

    async def claimed(self: SimStore, fence: Fence, targets: Sequence[int]) -> Any:
        async def at_the_database() -> Any:
            for target in targets:
                self._data.partitions[target].owner = None
            return await claim(self, fence, targets)

        return await self.ask("claim", at_the_database)

    with patch.object(Session, "balance", balanced), patch.object(SimStore, "claim", claimed):
        yield


@planted("harbour")
def release_before_it_is_written() -> Iterator[None]:
    """Hand a partition over while what was done in it is still on its way to the store."""

    async def hurried(self: Committer) -> None:
        return

    with patch.object(Committer, "flush", hurried):
        yield


# -- how far it was read -----------------------------------------------------------------------


@planted("bank")
def position_past_what_is_under_way() -> Iterator[None]:
    """Note messages as consumed that were only read."""

    def position(self: Session, target: int) -> int:
        return max(self.committer.routed_tail, self._floors[target])

    with patch.object(Session, "_position", position):
        yield


@planted("bank")
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
