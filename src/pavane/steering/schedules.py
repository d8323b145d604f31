"""Schedules as people see them: what comes next, pausing, triggering, backfilling, deleting."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Literal, get_args

import msgspec

from pavane.core.baton import ENDED, Header, Status
from pavane.engine.held import decode_attributes
from pavane.engine.registry import unknown
from pavane.errors import BadArguments, UnknownName
from pavane.event import Event
from pavane.schedule import Asked, Schedule, count_times, micros, moment
from pavane.steering.desk import Desk
from pavane.stores.port import Conflict, RunFilter, RunRow
from pavane.workflow import KEEPER

State = Literal["working", "paused", "idle", "stuck", "failed"]
LIST_MAX = 10_000
BACKFILL_MAX = 10_000
"""How many times may be asked for at once: a year that is mistyped may be meant for millions."""
LIVE: tuple[Status, ...] = tuple(status for status in get_args(Status) if status not in ENDED)
DELETED: tuple[Status, ...] = ("cancelled", "killed")
WRONG: tuple[Status, ...] = ("completed", "failed")
"""How a keeper may end that nobody deleted."""


class ScheduleStatus(msgspec.Struct, frozen=True):
    """What can be told of a schedule at a glance; times are µs since the epoch, 0 if there is none.

    `state`: "idle" when no node hosts its workflow's service, so that nothing starts. `reason` says
    more of a pause or of what is wrong. `run` is the run that keeps it: `pavane runs show` tells
    what it did. `backfills` are spans that are under way.
    """

    name: str
    service: str
    workflow: str
    cron: str
    zone: str
    missed: str
    state: State
    reason: str
    next_us: int
    last_us: int
    backfills: int
    run: str


class Schedules:
    """The schedules of a store; see the module."""

    def __init__(
        self, desk: Desk, begin: Callable[[Header, bytes], Awaitable[None]],
        send: Callable[[str, Event, str | None], Awaitable[None]],
        request: Callable[[str, str], Awaitable[None]],
    ) -> None:  # fmt: skip
        self._desk = desk
        self._store = desk.store
        self._begin = begin
        self._send = send
        self._request = request

    # -- declaring -----------------------------------------------------------------------------

    async def declare(self, services: Sequence[str]) -> None:
        """Begin what the app declares for these services, or tell it what is declared now."""
        for schedule in self._desk.registry.schedules.values():
            if schedule.workflow.service.name in services:
                await self._declare(schedule)

    async def _declare(self, schedule: Schedule) -> None:
        row = await self._keeper(schedule.name, LIVE)
        if row is None:
            # One that was deleted begins anew, under an id that all who see this choose alike.
            last = await self._keeper(schedule.name, DELETED + WRONG)
            id = KEEPER + schedule.name + (f":{last.no}" if last is not None else "")
            await self._start(schedule, id)
            return
        known = decode_attributes(row.attributes)
        declared = {
            "cron": schedule.cron, "zone": schedule.zone, "missed": schedule.missed,
            "workflow": schedule.workflow.name,
        }  # fmt: skip
        if known and any(known.get(name) != value for name, value in declared.items()):
            revision = int(known["revision"]) + 1
            asked = Asked(
                what="declare", cron=schedule.cron, zone=schedule.zone, missed=schedule.missed
            )
            await self._ask(row, asked, f"declare-{revision}")

    async def _start(self, schedule: Schedule, id: str) -> None:
        now, keeper = self._store.now_us(), schedule.keeper
        header = Header(
            run=id, workflow=keeper.name, version=keeper.version, home=keeper.service.name,
            mode=keeper.mode, started_us=now, conversation=id,
        )  # fmt: skip
        with suppress(Conflict):  # another worker was quicker
            await self._begin(header, keeper.params.check((schedule.plan(now),), {}))

    # -- looking -------------------------------------------------------------------------------

    async def _keeper(self, name: str, statuses: Sequence[Status]) -> RunRow | None:
        """Return the newest run of these statuses that keeps a schedule, found by its id."""
        keeper = KEEPER + name
        which = RunFilter(workflow=keeper, id_prefix=keeper, status=tuple(statuses), limit=1)
        return next(iter(await self._store.list_runs(which)), None)

    async def list(self) -> list[ScheduleStatus]:
        """Return all schedules by name, those that failed too, without those that were deleted."""
        hosted = await self._desk.hosted()
        found: dict[str, ScheduleStatus] = {}
        which = RunFilter(id_prefix=KEEPER, status=LIVE + WRONG, limit=LIST_MAX)
        for row in await self._store.list_runs(which):
            name = row.workflow.removeprefix(KEEPER)
            if name not in found:
                found[name] = _status(name, row, hosted)
        return [found[name] for name in sorted(found)]

    async def show(self, name: str) -> ScheduleStatus:
        """Return one schedule, or raise UnknownName."""
        return _status(name, await self._row(name), await self._desk.hosted())

    async def _row(self, name: str) -> RunRow:
        row = await self._keeper(name, LIVE)
        if row is not None:
            return row
        names = [status.name for status in await self.list()]
        raise UnknownName(
            f"{unknown('schedule', name, names)} One that is declared begins with the first worker "
            f"for its workflow's service."
        )

    # -- asking --------------------------------------------------------------------------------

    async def pause(self, name: str, *, reason: str = "by hand") -> None:
        """Let it start nothing at its times until it is resumed; those times are passed over."""
        await self._ask(await self._row(name), Asked(what="pause", reason=reason))

    async def resume(self, name: str) -> None:
        """Let it start runs at its times again, from now on."""
        await self._ask(await self._row(name), Asked(what="resume"))

    async def trigger(self, name: str) -> str:
        """Let it start one run now, also while it is paused; return that run's id."""
        row, now = await self._row(name), self._store.now_us()
        await self._ask(row, Asked(what="trigger", at_us=now), f"trigger-{now}")
        return f"{name}@{moment(now).isoformat()}"

    async def backfill(self, name: str, begin: datetime, until: datetime) -> int:
        """Let it start runs for its times from `begin` up to, not including, `until`; count them.

        Times that have a run keep that one. Raises BadArguments for a span that is empty, not over
        yet, or of more than `BACKFILL_MAX` times.
        """
        count = await self.count(name, begin, until)
        asked = Asked(what="backfill", at_us=micros(begin), until_us=micros(until))
        await self._ask(await self._row(name), asked)
        return count

    async def count(self, name: str, begin: datetime, until: datetime) -> int:
        """Count the times that a backfill of this span would ask for."""
        known = _status(name, await self._row(name), set())
        begin_us, until_us = micros(begin), micros(until)
        if not begin_us < until_us <= self._store.now_us():
            raise BadArguments(
                f"From {begin.isoformat()} until {until.isoformat()} is no span of the past. What "
                f"is still to come, {name!r} starts by itself."
            )
        if not known.cron:
            raise BadArguments(f"Schedule {name!r} has not begun yet. Ask again in a moment.")
        count = count_times(known.cron, known.zone, begin_us, until_us, BACKFILL_MAX + 1)
        if count > BACKFILL_MAX:
            raise BadArguments(
                f"From {begin.isoformat()} until {until.isoformat()} {name!r} has more than "
                f"{BACKFILL_MAX:,} times. If that is meant, ask for one part after the other."
            )
        return count

    async def delete(self, name: str) -> None:
        """End a schedule; what it started goes on. One that the code still declares is refused."""
        if name in self._desk.registry.schedules:
            raise BadArguments(
                f"Schedule {name!r} is declared by this app, so the next worker would begin it "
                f"anew. Remove app.schedule(…) from the code first, or pause it."
            )
        row = await self._row(name)
        # Killed, not cancelled: without its declaration it may be stuck, and it has no clean-up.
        await self._request(row.id, "kill")

    async def _ask(self, row: RunRow, asked: Asked, id: str | None = None) -> None:
        await self._send(row.id, asked, id)


def _status(name: str, row: RunRow, hosted: set[str]) -> ScheduleStatus:
    known = decode_attributes(row.attributes)
    paused, reason = str(known.get("paused", "")), row.reason
    if row.status in ("stuck", "failed"):
        state: State = "stuck" if row.status == "stuck" else "failed"
    elif paused:
        state, reason = "paused", paused
    else:
        state, reason = ("working" if row.service in hosted else "idle"), ""
    return ScheduleStatus(
        name, row.service, str(known.get("workflow", "")), str(known.get("cron", "")),
        str(known.get("zone", "")), str(known.get("missed", "")), state, reason,
        int(known.get("next_us", 0)), int(known.get("last_us", 0)), int(known.get("backfills", 0)),
        row.id,
    )  # fmt: skip
