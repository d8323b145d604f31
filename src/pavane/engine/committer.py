"""The committer: merges all pending commits of a node into one batch, one batch at a time.

The next batch forms while the first is being written (group commit); if much waits by then, it is
on its way before anyone is told of the first. A commit's `done` is called only after the batch that
contains it is durable, in the order of submission.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence

from pavane.errors import LeaseLost, PavaneError, StoreError
from pavane.stores.eventlog import EventRow
from pavane.stores.port import Commit, Fence, Message, Store, broken_chain

log = logging.getLogger("pavane.committer")

Results = Sequence[PavaneError | None]


class Committer:
    """Owns the way to the store for everything fenced by one lease.

    `deliver` gets the messages of each durable commit, `published` the events of a batch; `failed`
    is told once when the store refuses a whole batch, after which nothing is written any more.
    """

    def __init__(
        self,
        store: Store,
        fence: Fence,
        deliver: Callable[[Sequence[Message]], None],
        published: Callable[[Sequence[EventRow]], None],
        failed: Callable[[PavaneError], None],
    ) -> None:
        self._store = store
        self._fence = fence
        self._deliver = deliver
        self._published = published
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._waiting: list[Commit] = []
        self._writing: list[Commit] = []
        self._settled: deque[tuple[Sequence[Commit], Results, int | None]] = deque()
        """What nobody was told of yet; of a batch with the log's tail when it was written."""
        self._scheduled = False
        self._broken: set[int] = set()
        self._idle: list[asyncio.Future[None]] = []
        self.closed: PavaneError | None = None
        self.routed_tail = store.tail

    def submit(self, commit: Commit) -> None:
        """Queue `commit`; its `done` is called later, never from here."""
        self._waiting.append(commit)
        self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._writing and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._scheduled = False
        if self._writing or not self._waiting:
            return
        most = len(self._waiting) if self.closed else self._store.features.batch_max
        batch = self._waiting[:most]
        del self._waiting[:most]
        if self._broken:
            broken = [commit for commit in batch if commit.chain in self._broken]
            batch = [commit for commit in batch if commit.chain not in self._broken]
            self._settled.append((broken, [broken_chain() for _ in broken], None))
        self._writing = batch
        if self.closed is not None or not batch:
            self._finished([self.closed] * len(batch))
        else:
            self._store.submit(batch, self._fence, self._finished)

    def _finished(self, results: Results) -> None:
        batch, self._writing = self._writing, []
        for commit, result in zip(batch, results, strict=True):
            if result is None:
                continue
            if commit.chain:
                self._broken.add(commit.chain)
            if isinstance(result, (LeaseLost, StoreError)) and self.closed is None:
                self.closed = result
                self._failed(result)
        self._settled.append((batch, results, self._store.tail))
        if len(self._waiting) >= self._store.features.batch_max // 2:
            self._loop.call_soon(self._tell)
            self._flush()
        else:
            self._tell()

    def _tell(self) -> None:
        """Tell, in order, what became of commits."""
        while self._settled:
            batch, results, tail = self._settled[0]
            self._tell_of(batch, results)
            if tail is not None:
                self.routed_tail = tail
            self._settled.popleft()
        if self._waiting:
            self._flush_soon()
        elif not self._writing:
            idle, self._idle = self._idle, []
            for future in idle:
                if not future.done():
                    future.set_result(None)

    def _tell_of(self, batch: Sequence[Commit], results: Results) -> None:
        events: list[EventRow] = []
        for commit, result in zip(batch, results, strict=True):
            try:
                commit.done(result)
            except Exception:  # of one; the others are told all the same
                log.exception("what followed from a commit failed")
            if result is None:
                if commit.messages:
                    self._deliver(commit.messages)
                if commit.events:
                    events += commit.events
        if events:
            self._published(events)

    def close(self) -> None:
        """Write nothing any more: what is submitted from now on is refused."""
        if self.closed is None:
            self.closed = LeaseLost("The session that this belongs to has ended.")

    async def flush(self) -> None:
        """Return when everything submitted so far was written or refused."""
        while self._waiting or self._writing or self._settled:
            future = self._loop.create_future()
            self._idle.append(future)
            await future
