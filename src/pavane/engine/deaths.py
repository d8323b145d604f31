"""What processes may have died of: counted durably before it is touched again, and then alone.

What was under way in `SUSPECT_DEATHS` process deaths is set aside, and tried when nothing else is
that may end the process; what was in `deaths_max` is quarantined.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pavane.core.envelope import Call, unpack
from pavane.engine.config import SUSPECT_DEATHS
from pavane.stores.port import ParkedRow, RunRow, Touched

if TYPE_CHECKING:
    from pavane.engine.session import Session

PAGE = 500
LOOK_S = 0.01
LOOKS_MAX = 500

Key = tuple[str, str]
Suspect = RunRow | ParkedRow


def _who_is_told(row: Suspect) -> str:
    """Return the service, perhaps of another app, that is told if this is given up."""
    return row.home if isinstance(row, RunRow) else unpack(Call, row.call).reply_to


class Deaths:
    """Owns the suspects of one session; see the module."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.touched: dict[int, Touched] = defaultdict(Touched)
        """What this session counted a death of, by target; it takes that back if it is lost alive.
        """
        self._aside: dict[Key, Suspect] = {}
        self._queue: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self._lane: asyncio.Task[None] | None = None

    def is_aside(self, service: str, id: str) -> bool:
        """Tell whether a run or a step was set aside, and not tried yet."""
        return (service, id) in self._aside

    @property
    def is_idle(self) -> bool:
        """Whether nothing is tried, or waits for its turn."""
        return self._lane is None or self._lane.done()

    def release(self, targets: Collection[int]) -> None:
        """Forget what is in these partitions: whoever has them next may count more."""
        self._aside = {key: row for key, row in self._aside.items() if row.target not in targets}
        for target in targets:
            self.touched.pop(target, None)

    def try_alone(self, rows: Sequence[Suspect]) -> None:
        """Queue what was set aside."""
        for row in rows:
            self.suspect(partial(self._try_again, row))

    async def count(self, positions: Mapping[int, int]) -> list[Suspect]:
        """Count a death, durably, for all that a dead process may have died of, and not touch it.

        Return those for which that is not enough, because they saw several already: each is
        counted when it is touched again, alone. A start, baton or command that nobody has a row of
        is counted when it comes again, by a mark or by being taken into custody.
        """
        suspects: list[Suspect] = []
        async for rows in self._under_way(positions):
            for row in rows:
                if row.deaths >= SUSPECT_DEATHS:
                    suspects.append(row)
                    await self._session.make_known(_who_is_told(row))
            calm = [row for row in rows if row.deaths < SUSPECT_DEATHS]
            if calm:
                await self._touch(calm)
        return suspects

    async def _touch(self, rows: Sequence[Suspect]) -> None:
        """Count a death, durably, for each of these, and note how many it had before.

        A session that is lost in a living process takes back what it counted, landed or not.
        """
        runs: dict[int, int] = {}
        parked: list[ParkedRow] = []
        for row in rows:
            touched = self.touched[row.target]
            if isinstance(row, RunRow):
                touched.runs[row.no] = row.deaths
                runs[row.no] = row.deaths + 1
            else:
                touched.parked[row.service, row.id] = row.deaths
                row.deaths += 1
                parked.append(row)
        await self._session.store.touch(self._session.fence, runs, parked)

    async def _under_way(self, positions: Mapping[int, int]) -> AsyncIterator[Sequence[Suspect]]:
        """Find parked steps that are due, runs that are running, and those something came for."""
        store, now = self._session.store, self._session.now_us()
        targets = list(positions)
        due = (0, "")
        while parked := await store.due_parked(targets, due, now, PAGE):
            yield parked
            due = (parked[-1].due_us, parked[-1].id)
        after = 0
        while rows := await store.live_runs(targets, after, PAGE):
            yield [row for row in rows if row.status == "running"]
            after = rows[-1].no
        woken: set[int] = set()
        wake = (0, 0)
        while rows := await store.due_runs(targets, wake, now, PAGE):
            yield [row for row in rows if row.status == "waiting"]
            woken.update(row.no for row in rows)
            wake = (rows[-1].wake_us or 0, rows[-1].no)
        at, head = min(positions.values()), await store.log_head()
        while messages := await store.read_log(at, head, targets, PAGE, None):
            told = {(m.to, m.run) for m in messages if m.pos > positions[m.target]}
            found = [await store.run_row(*key) for key in sorted(told)]
            # What a run asked for may be in other partitions than the run.
            here = [row for row in found if row is not None and row.target in positions]
            rows = [row for row in here if row.no not in woken]
            yield [row for row in rows if row.status == "waiting" and row.holder == row.service]
            woken.update(row.no for row in rows)
            at = messages[-1].pos

    def set_aside(self, rows: Sequence[Suspect]) -> list[Suspect]:
        """Quarantine what saw too many deaths; return the rest, each to be kept until its turn."""
        rest: list[Suspect] = []
        for row in rows:
            self._aside[row.service, row.id] = row
            if row.deaths + 1 < self._session.config.deaths_max:
                rest.append(row)
                if isinstance(row, RunRow):
                    self._session.holder.set_aside(row)
            elif isinstance(row, RunRow):
                self._session.holder.quarantine(row)
            else:
                self._session.steps.quarantine(row)
        return rest

    def suspect(self, attempt: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Queue what may have ended processes; it has its turn alone.

        `attempt` counts one more touch, durably, then touches, and returns when that is over.
        """
        self._queue.append(attempt)
        if self._lane is None or self._lane.done():
            self._lane = self._session.spawn(self._try_all())

    async def _try_all(self) -> None:
        while self._queue:
            await self._queue.pop(0)()

    async def _try_again(self, row: Suspect) -> None:
        """Go on with a run or a step that was set aside."""
        key = (row.service, row.id)
        if self._aside.get(key) is not row or not self._session.owns(row.target):
            return  # its partition was handed over, or is about to be
        if isinstance(row, RunRow):
            await self._touch([row])
            if self._aside.pop(key, None) is row and self._session.owns(row.target):
                await self._session.holder.try_again(row)
        else:
            await self._touch([row])
            if self._aside.pop(key, None) is row:
                self._session.steps.resume(row)
        await self.until_calm(key)
        if self._session.owns(row.target):
            self._session.holder.acquit(key)
        await self._session.committer.flush()

    async def until_calm(self, key: Key) -> None:
        """Return when a run or step does nothing that may end the process; after a while, anyway.

        One that takes long holds up the others for that while only. What it made of its turn is
        durable then: a death by the next one must not count against it.
        """
        for _ in range(LOOKS_MAX):
            if not (self._session.holder.is_busy(key) or self._session.steps.is_running(*key)):
                break
            await asyncio.sleep(LOOK_S)
        await self._session.committer.flush()
