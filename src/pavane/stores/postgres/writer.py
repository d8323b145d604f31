"""The writer: one connection, on which everything is written in the order of asking.

A batch is one statement: one round trip with fence, rows and commit. When its answer does not come,
the batch is sent again on a new connection under the same number, until it is known what became of
it: the number makes it take effect once, and the fence makes it wait for an earlier copy that is
still on its way.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import groupby
from typing import Any

from pavane.errors import LeaseLost, Locked, PavaneError, StoreError, WorkFailed
from pavane.stores.port import Commit, Conflict, Fence, broken_chain
from pavane.stores.postgres.batch import WRITE, WRITE_CHUNK, Batch
from pavane.stores.postgres.connection import (
    ANSWER_S,
    BUSY,
    FAILED,
    OF_ONE_COMMIT,
    QUICK_S,
    SETTINGS,
    Connection,
    Silent,
    answered,
    asyncpg,
    connect,
    explained,
    is_lost,
    looked_into,
    place_of,
)

log = logging.getLogger("pavane.postgres")

SETTLE_S = 15.0
"""How long a write is tried again when the database is gone; under a longer lease, for its time."""
CALL_S = 10.0
"""How long a transaction of several statements may take before its connection is taken for dead."""
MERGED_MAX = 1000
WRITTEN_MAX_BYTES = 4 * 1024 * 1024
"""How much is written at once, unless one commit is larger. It must be there soon over any line:
until then the lease cannot be renewed, since its row is locked, and others wait for what is small.
"""
LARGE_BYTES = 64 * 1024
"""What is larger may be on its way for long over a slow line; it gets more time when repeated."""
WORK_S = 8.0
"""How long user code may take inside a transaction; the server ends an idle one after 10 s."""
LOCK_S = 2.0
"""How long it may wait for a lock, as of a process that is frozen: nothing else is written then."""
PAUSE_S = 0.05
PAUSE_MAX_S = 1.0
_END_IDLE = (
    "SET LOCAL idle_in_transaction_session_timeout ="
    f" '{SETTINGS['idle_in_transaction_session_timeout']}'"
)

Results = list[PavaneError | None]
Work = Callable[[Connection], Awaitable[Any]]
Wrote = Callable[[Fence | None, Batch | None, int], None]


class _TooMuch(Exception):
    """Commits that are too large to be written at once."""


class _Batch:
    """Commits to be written together, and who is told."""

    def __init__(
        self, commits: Sequence[Commit], fence: Fence | None, done: Callable[[Results], None]
    ) -> None:
        self.commits = commits
        self.fence = fence
        self.done = done


class _Call:
    """Work in a transaction of its own, and who waits for what it returns."""

    def __init__(self, work: Work, future: asyncio.Future[Any]) -> None:
        self.work = work
        self.future = future


class Writer:
    """See the module. `wrote` is called after each write, with the fence, the batch and where
    its messages begin; without a batch it was something else, of a caller who knows what.
    """

    def __init__(self, dsn: str, wrote: Wrote) -> None:
        self._dsn = dsn
        self._wrote = wrote
        self._connection: Connection | None = None
        self._prepared: dict[str, Any] = {}
        self._jobs: deque[_Batch | _Call] = deque()
        self._wake: asyncio.Future[None] | None = None
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self._newest: dict[str, int] = {}
        """Numbers of the newest batches written under each lease, by its nonce."""
        self._unsettled: set[str] = set()
        """Nonces of leases whose last batch may still be written: nothing may follow it."""
        self._repeating = False

    # -- life ----------------------------------------------------------------------------------

    async def open(self) -> None:
        await self._connected()
        self._closing = False
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Write what was asked for, then hang up."""
        self._closing = True
        self._call()
        if self._task is not None:
            await self._task
            self._task = None
        if self._connection is not None:
            connection, self._connection = self._connection, None
            try:
                await connection.close(timeout=2)
            except Exception:
                connection.terminate()

    def submit(
        self, commits: Sequence[Commit], fence: Fence | None, done: Callable[[Results], None]
    ) -> None:
        self._jobs.append(_Batch(commits, fence, done))
        self._call()

    async def execute(self, work: Work) -> Any:
        """Do `work` in a transaction of its own, after what was asked for before.

        It may be done twice: once more if the connection is lost, perhaps just after the commit.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._jobs.append(_Call(work, future))
        self._call()
        return await future

    def _call(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not self._jobs:
                if self._closing:
                    return
                self._wake = loop.create_future()
                await self._wake
                continue
            job = self._jobs.popleft()
            try:
                if isinstance(job, _Call):
                    await self._do_call(job)
                else:
                    await self._do_batch(job)
            except Exception as error:  # nobody may wait for ever
                log.exception("a write failed in an unexpected way")
                self._fail(job, StoreError(f"A write failed: {error!r}."))

    def _fail(self, job: _Batch | _Call, error: PavaneError) -> None:
        if isinstance(job, _Batch):
            job.done([error] * len(job.commits))
        elif not job.future.done():
            job.future.set_exception(error)

    # -- connection ----------------------------------------------------------------------------

    async def _connected(self) -> Connection:
        if self._connection is None or self._connection.is_closed():
            self._connection = await connect(self._dsn)
            self._prepared.clear()
        return self._connection

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    async def _patiently(
        self,
        ask: Callable[[Connection], Awaitable[Any]],
        within_s: float,
        fence: Fence | None = None,
    ) -> Any:
        """Ask until there is an answer, on new connections, for a while; then raise StoreError.

        Nothing is written under `fence` after that: it is not known what was.
        """
        loop = asyncio.get_running_loop()
        ends = 0.0
        pause_s = PAUSE_S
        self._repeating = False
        while True:
            try:
                return await ask(await self._connected())
            except Exception as error:
                if is_lost(error):
                    self._hang_up()
                    self._repeating = True
                elif not isinstance(error, BUSY):
                    raise
                ends = ends or loop.time() + within_s  # the first answer may have taken long
                if loop.time() > ends:
                    if fence is not None:
                        self._unsettled.add(fence.nonce)
                    raise await looked_into(self._dsn, error) from error
                log.info("writing again: %s", error)
            await asyncio.sleep(pause_s * (0.5 + random.random()))
            pause_s = min(PAUSE_MAX_S, pause_s * 2)

    # -- other work ----------------------------------------------------------------------------

    async def _do_call(self, job: _Call) -> None:
        async def ask(connection: Connection) -> Any:
            async def transaction() -> Any:
                async with _transaction(connection):
                    return await job.work(connection)

            return await answered(connection, transaction(), CALL_S)

        try:
            result = await self._patiently(ask, SETTLE_S)
        except PavaneError as error:
            self._fail(job, error)
        except asyncpg.PostgresError as error:
            self._fail(job, explained(self._dsn, error))
        else:
            self._wrote(None, None, 0)
            if not job.future.done():
                job.future.set_result(result)

    # -- batches -------------------------------------------------------------------------------

    async def _do_batch(self, job: _Batch) -> None:
        jobs = [job]
        if job.fence is None:  # callers that know nothing of each other share a round trip
            count = len(job.commits)
            while self._jobs and count < MERGED_MAX:
                following = self._jobs[0]
                if not isinstance(following, _Batch) or following.fence is not None:
                    break
                jobs.append(following)
                self._jobs.popleft()
                count += len(following.commits)
        commits = job.commits if len(jobs) == 1 else [c for j in jobs for c in j.commits]
        results = await self._results(commits, job.fence)
        at = 0
        for each in jobs:
            each.done(results[at : at + len(each.commits)])
            at += len(each.commits)

    async def _results(self, commits: Sequence[Commit], fence: Fence | None) -> Results:
        if not commits:
            return []
        if any(commit.work for commit in commits):
            return await self._with_work(commits, fence)
        try:
            await self._write_whole(commits, fence)
            return [None] * len(commits)
        except (LeaseLost, StoreError) as error:
            return [error] * len(commits)
        except Exception as error:
            if isinstance(error, asyncpg.PostgresError) and not isinstance(error, OF_ONE_COMMIT):
                return [explained(self._dsn, error)] * len(commits)
            # What is not Postgres's comes from making rows of values: a bad value, not a bad store.
            if len(commits) == 1:
                return [await self._refusal(commits[0], error)]
        # One bad commit, or too much: halve until it is alone, or little, keeping the order.
        middle = len(commits) // 2
        first = await self._results(commits[:middle], fence)
        rest = commits[middle:]
        if isinstance(first[-1], (LeaseLost, StoreError)):
            return [*first, *[first[-1]] * len(rest)]
        broken = {c.chain for c, bad in zip(commits, first, strict=False) if bad is not None} - {0}
        good = iter(await self._results([c for c in rest if c.chain not in broken], fence))
        return [*first, *(broken_chain() if c.chain in broken else next(good) for c in rest)]

    async def _with_work(self, commits: Sequence[Commit], fence: Fence | None) -> Results:
        """Write each commit with work alone, and what is between them together, in order.

        Nothing keeps user code from ending a transaction of Postgres's, and it must not commit what
        belongs to others.
        """
        results: Results = []
        broken: set[int] = set()
        for part in _parts(commits):
            good = [commit for commit in part if commit.chain not in broken]
            if good and good[0].work:
                written: Results = [await self._do_work(good[0], fence)]
            else:
                written = await self._results(good, fence)
            if written and isinstance(written[-1], (LeaseLost, StoreError)):
                return [*results, *[written[-1]] * (len(commits) - len(results))]
            broken |= {c.chain for c, bad in zip(good, written, strict=True) if bad} - {0}
            each = iter(written)
            results += [next(each) if c in good else broken_chain() for c in part]
        return results

    async def _do_work(self, commit: Commit, fence: Fence | None) -> PavaneError | None:
        async def transaction(connection: Connection) -> None:
            written = await self._earlier(connection, commit, fence) if self._repeating else None
            if written is None:
                written = await self._work_committed(connection, commit, fence)
            self._accept(*written, fence)

        async def ask(connection: Connection) -> None:
            await answered(connection, transaction(connection))

        try:
            await self._patiently(ask, SETTLE_S, fence)
        except PavaneError as error:
            return error
        except asyncpg.InFailedSQLTransactionError as failed:
            failed.add_note(
                "An earlier statement of this transaction failed, and nothing can be written in it "
                "after that. Put what may fail into `async with connection.transaction():`."
            )
            return WorkFailed(failed)
        except asyncpg.PostgresError as error:
            if isinstance(error, OF_ONE_COMMIT):
                return await self._refusal(commit, error)
            return explained(self._dsn, error)
        except Exception as error:
            return await self._refusal(commit, error)
        return None

    async def _earlier(
        self, c: Connection, commit: Commit, fence: Fence | None
    ) -> tuple[Any, Batch] | None:
        """Return what `_work_committed` did if its commit, whose answer was lost, was written.

        A COMMIT that is still under way is waited for: it has the lock of the node's row. What is
        written here, without the work, is only a question, and taken back.
        """
        batch = Batch([commit])
        asking = c.transaction()
        await asking.start()
        try:
            row = await c.fetchrow(WRITE, *self._proof(fence), *batch.values)
        finally:
            await asking.rollback()
        self._check(row, fence, repeating=True)
        return (row, batch) if row["verdict"] == "repeated" else None

    async def _work_committed(
        self, c: Connection, commit: Commit, fence: Fence | None
    ) -> tuple[Any, Batch]:
        """Do the work and write its commit, in a transaction of their own."""
        committing = False
        try:
            async with _transaction(c, f"SET LOCAL lock_timeout = '{LOCK_S * 1000:.0f}ms'"):
                written = await self._work_within(c, commit, fence)
                committing = True
            return written
        except asyncpg.PostgresError as error:
            if not committing or is_lost(error):
                raise
            if isinstance(error, asyncpg.LockNotAvailableError):
                raise WorkFailed(_locked(error)) from error
            if isinstance(error, BUSY):
                raise
            raise WorkFailed(error) from error  # the user's constraint was deferred until now

    async def _work_within(
        self, c: Connection, commit: Commit, fence: Fence | None
    ) -> tuple[Any, Batch]:
        """Do the work and write its commit; what is returned counts when both are committed."""
        assert commit.work is not None
        if await _is_done(c, commit):
            raise Conflict("This was done before.")
        state: bytes | None = None
        if commit.work_state is not None:
            sql = "SELECT body FROM pavane.states WHERE service = $1 AND name = $2 AND key = $3"
            body = await c.fetchval(sql, *commit.work_state)
            state = None if body is None else body.encode()
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            async with asyncio.timeout(WORK_S):
                await commit.work(c, state)
        except Exception as error:
            if c.is_closed():
                raise ConnectionResetError("lost while work was done") from error  # tried again
            waited = loop.time() - began_s >= LOCK_S  # sooner, it is by a NOWAIT of the user's
            if isinstance(error, asyncpg.LockNotAvailableError) and waited:
                raise WorkFailed(_locked(error)) from error
            raise WorkFailed(error) from error
        if not c.is_in_transaction():
            raise WorkFailed(
                PavaneError(
                    "The transaction was ended by a statement in it, but it is not its own: what "
                    "belongs to it is written in it as well. Raise an error to undo what was done."
                )
            )
        batch = Batch([commit])
        row = await c.fetchrow(WRITE, *self._proof(fence), *batch.values)
        self._check(row, fence, repeating=False)
        return row, batch

    async def _refusal(self, commit: Commit, error: BaseException) -> PavaneError | None:
        if isinstance(error, asyncpg.UniqueViolationError):
            if self._repeating and await self._is_there(commit):
                return None  # the answer to an earlier copy of it was lost
            return Conflict(f"This was written before: {error}.")
        if isinstance(error, PavaneError):
            return error
        return PavaneError(f"A value cannot be stored: {error!r}.")

    async def _is_there(self, commit: Commit) -> bool:
        """Tell whether the marks and runs of a commit are there as it would have written them."""

        async def look(connection: Connection) -> bool:
            for run in commit.runs:
                sql = "SELECT 1 FROM pavane.runs WHERE no = $1 AND id = $2"
                if await connection.fetchval(sql, run.no, run.id) is None:
                    return False
            for mark in commit.inbox:
                sql = "SELECT 1 FROM pavane.inbox WHERE id = $1 AND service = $2 AND at_us = $3"
                if await connection.fetchval(sql, mark.id, mark.service, mark.at_us) is None:
                    return False
            return bool(commit.runs or commit.inbox)

        async def ask(connection: Connection) -> bool:
            return await answered(connection, look(connection), QUICK_S)

        return await self._patiently(ask, SETTLE_S)

    async def _write_whole(self, commits: Sequence[Commit], fence: Fence | None) -> None:
        batch = Batch(commits)
        if len(commits) > 1 and batch.size_bytes > WRITTEN_MAX_BYTES:
            raise _TooMuch
        within_s = SETTLE_S if fence is None else max(SETTLE_S, fence.lease_us / 1e6)
        proof = self._proof(fence)
        chunk = batch.chunk if fence is not None else None

        async def write(connection: Connection) -> Any:
            if chunk is not None:
                row = await self._row(connection, WRITE_CHUNK, *proof, *chunk)
                if row is not None:
                    return row
            return await self._row(connection, WRITE, *proof, *batch.values)

        time_s = next_s = QUICK_S

        async def ask(connection: Connection) -> Any:
            nonlocal time_s, next_s
            time_s = next_s
            if batch.size_bytes > LARGE_BYTES:
                next_s = min(ANSWER_S, 2 * time_s)
            return await answered(connection, write(connection), time_s)

        try:
            row = await self._patiently(ask, within_s, fence)
        except StoreError as error:
            is_slow = time_s > QUICK_S and isinstance(error.__cause__, Silent)
            if fence is None or not is_slow:
                raise
            row = await self._overtaken(batch, fence, error)
            if row is None and len(commits) > 1:
                raise _TooMuch from error
            if row is None:
                raise PavaneError(
                    f"A commit of {batch.size_bytes / 1e6:.1f} MB is too much for the line to "
                    f"{place_of(self._dsn)}, which did not carry it within {time_s:g} s. Let less "
                    f"be asked for at once, or keep what is large elsewhere."
                ) from error
        self._check(row, fence, self._repeating)
        self._accept(row, batch, fence)

    async def _overtaken(self, batch: Batch, fence: Fence, error: StoreError) -> Any:
        """Write nothing under the number of a batch that was not answered, so that it is settled.

        Returns its row if it was written after all; None if not, and it never will be. What comes
        late of it is refused, as a repetition. If this is not answered either, it is not the size.
        """
        proof = self._numbered(fence)

        async def settle(connection: Connection) -> Any:
            row = await connection.fetchrow(WRITE, *proof, *Batch([]).values)
            if row["verdict"] != "repeated" or not batch.events:
                return row
            sql = "SELECT pos FROM pavane.events WHERE pos > $1 AND pos <= $2"
            before = row["events_before"]
            found = await connection.fetch(sql, before, before + len(batch.events))
            return {**row, "new_events": [each["pos"] for each in found]}

        try:
            connection = await self._connected()
            row = await answered(connection, settle(connection), CALL_S)
        except FAILED:
            self._hang_up()
            raise error from error.__cause__
        self._unsettled.discard(fence.nonce)
        self._repeating = True
        if row["verdict"] != "written":
            return row
        self._newest[fence.nonce] = self._next(fence)
        return None

    async def _row(self, connection: Connection, sql: str, *values: Any) -> Any:
        """Return the row that a prepared statement gives, preparing it if need be."""
        if sql not in self._prepared:
            self._prepared[sql] = await connection.prepare(sql)
        return await self._prepared[sql].fetchrow(*values)

    def _proof(self, fence: Fence | None) -> tuple[Any, ...]:
        """Return the lease and the number under which the next batch is written."""
        if fence is None:
            return (None, None, None, None)
        if fence.nonce in self._unsettled:
            raise StoreError("The database did not answer, and what it was told is not settled.")
        return self._numbered(fence)

    def _numbered(self, fence: Fence) -> tuple[Any, ...]:
        return (fence.node, fence.nonce, fence.lease_us, self._next(fence))

    def _next(self, fence: Fence) -> int:
        return self._newest.get(fence.nonce, 0) + 1

    def _check(self, row: Any, fence: Fence | None, repeating: bool) -> None:
        if fence is None:
            return
        if row["verdict"] == "lost":
            raise LeaseLost(
                f"Node {fence.node} lost its lease (it was silent for longer than "
                f"{fence.lease_us / 1e6:g} s); it stops its runs and joins again."
            )
        if row["verdict"] == "repeated" and not repeating:
            raise StoreError(f"Batch {self._next(fence)} of node {fence.node} is there already.")

    def _accept(self, row: Any, batch: Batch, fence: Fence | None) -> None:
        if fence is not None:
            self._newest[fence.nonce] = self._next(fence)
        before: int = row["log_before"] or 0
        if batch.messages or batch.events:
            batch.placed(before, row["events_before"], row["new_events"] or ())
        self._wrote(fence, batch, before)


def _parts(commits: Sequence[Commit]) -> Iterator[list[Commit]]:
    """Split commits, in order, into those with work, each alone, and what is between them."""
    for has_work, group in groupby(commits, lambda commit: commit.work is not None):
        if has_work:
            yield from ([commit] for commit in group)
        else:
            yield list(group)


def _locked(error: BaseException) -> Locked:
    return Locked(f"Another transaction has kept its locks for {LOCK_S:g} s: {error}.")


@asynccontextmanager
async def _transaction(c: Connection, *settings: str) -> AsyncGenerator[None]:
    """Begin and end one; the server ends it if this process is frozen, which would keep its locks.

    A pooler takes no settings of a session, so this one is set here.
    """
    async with c.transaction():
        await c.execute("; ".join((_END_IDLE, *settings)))
        yield


async def _is_done(c: Connection, commit: Commit) -> bool:
    """Tell whether the commit would repeat a mark, before anything is done for it."""
    for mark in commit.reaction.marks if commit.reaction is not None else ():
        sql = "SELECT 1 FROM pavane.marks WHERE handler = $1 AND pos = $2"
        if await c.fetchval(sql, mark.handler, mark.pos) is not None:
            return True
    for mark in commit.inbox:
        sql = "SELECT 1 FROM pavane.inbox WHERE id = $1 AND service = $2"
        if await c.fetchval(sql, mark.id, mark.service) is not None:
            return True
    return False
