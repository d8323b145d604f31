"""Schedules: runs that start at times of a calendar, each nominal time once.

A schedule is itself a run. It sleeps until the next nominal time, starts a run whose id is made of
its own name and that time, and sleeps again; what people ask of it comes to its mailbox. So it is
as durable as any run, goes on at another node when one dies, and needs nothing else in the store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, Literal
from zoneinfo import ZoneInfo

import msgspec
from cronsim import CronSim, CronSimError

from pavane.core.execution import required
from pavane.core.operations import Planned
from pavane.errors import BadDeclaration
from pavane.event import Event
from pavane.workflow import KEEPER, Workflow, continue_as_new, now, receive, set_attributes

Missed = Literal["last", "all", "skip"]
MISSED: tuple[Missed, ...] = ("last", "all", "skip")
LATE = timedelta(minutes=1)
"""A nominal time that passed longer ago was missed."""
STARTS_MAX = 200
"""So many runs are started in one go."""
ROUNDS = 100
"""After so many wake-ups a schedule goes on in a new run, so that its journal stays short."""
AROUND_US = 2 * 3600 * 10**6


class Asked(Event, type_name="pavane.schedule-asked"):
    """What people ask of a schedule; times are µs since the epoch."""

    what: Literal["pause", "resume", "trigger", "backfill", "declare"]
    reason: str = ""
    at_us: int = 0
    until_us: int = 0
    cron: str = ""
    zone: str = ""
    missed: Missed = "last"


class Plan(msgspec.Struct, frozen=True):
    """What a schedule knows of itself.

    Nominal times up to `after_us` were dealt with, and the newest that has a run is `last_us`.
    `paused` says why it is, "" if it is not.
    `backfill` are spans [from, until) of which runs are to be started yet. `revision` counts what
    was declared differently.
    """

    cron: str
    zone: str
    missed: Missed
    after_us: int
    paused: str = ""
    backfill: tuple[tuple[int, int], ...] = ()
    last_us: int = 0
    revision: int = 0

    def times(self, after_us: int) -> Iterator[datetime]:
        """Return the nominal times after this one, in order, in the schedule's zone."""
        return nominal_times(self.cron, self.zone, after_us)

    def next(self) -> datetime | None:
        """Return the nominal time that comes next; None if there is none any more."""
        return next(self.times(self.after_us), None)


class Schedule:
    """One declared schedule; see `App.schedule`."""

    def __init__(
        self, name: str, cron: str, workflow: Workflow[..., Any], args: bytes, zone: str,
        missed: Missed,
    ) -> None:  # fmt: skip
        if missed not in MISSED:
            raise BadDeclaration(
                f"missed={missed!r} is unknown: 'last' starts one run for all times that were "
                f"missed, 'all' one for each, 'skip' none."
            )
        check_cron(cron, zone)
        self.name = name
        self.cron = cron
        self.zone = zone
        self.missed: Missed = missed
        self.workflow = workflow
        self.args = args
        self.keeper: Workflow[[Plan], None] = Workflow(
            workflow.service, _keep(self), KEEPER + name, 1, "orchestration", (Asked,), None
        )

    def plan(self, now_us: int) -> Plan:
        """Return what it begins with: times from now on."""
        return Plan(self.cron, self.zone, self.missed, now_us)

    def run_of(self, nominal: datetime) -> str:
        """Return the id of the run for this time: the same however often it is asked for."""
        return f"{self.name}@{nominal.isoformat()}"

    def start(self, nominal: datetime) -> None:
        """Start the run for this time, from workflow code; once, if that was done before."""
        planned = Planned(self.workflow, self.run_of(nominal), micros(nominal))
        required("a schedule").announce(
            "spawn", self.workflow.name, self.workflow.service.name, args=self.args, detail=planned
        )

    def __repr__(self) -> str:
        return f"schedule {self.name!r}"


def check_cron(cron: str, zone: str) -> None:
    """Raise BadDeclaration with what is wrong with a cron expression or the name of a zone."""
    try:
        ZoneInfo(zone)
    except (KeyError, ValueError, OSError):
        raise BadDeclaration(
            f'zone={zone!r} is no time zone. Write one of the IANA names, such as "Europe/Berlin" '
            f'or "UTC".'
        ) from None
    try:
        next(nominal_times(cron, zone, 0), None)
    except CronSimError as error:
        raise BadDeclaration(
            f"{cron!r} is no cron expression: {error}. Write five fields (minute, hour, day of "
            f'month, month, day of week), such as "0 9 * * mon-fri", or six with the second first.'
        ) from None


def nominal_times(cron: str, zone: str, after_us: int) -> Iterator[datetime]:
    """Yield the times of `cron` in `zone` after a moment, in order, none twice.

    A time that a change of the clocks leaves out is moved behind the gap; one that it repeats
    counts once, unless the expression is of every hour or minute.
    """
    latest_us = after_us
    # The second of `after_us` itself counts as over, whatever its fraction.
    begin = moment(after_us).replace(microsecond=0).astimezone(ZoneInfo(zone))
    for time in CronSim(cron, begin):
        if micros(time) > latest_us:
            latest_us = micros(time)
            yield time


def count_times(cron: str, zone: str, begin_us: int, until_us: int, most: int) -> int:
    """Count the times from a moment up to, not including, another, up to `most` of them."""
    times = _until(nominal_times(cron, zone, begin_us - 1), until_us - 1)
    return sum(1 for _ in islice(times, most))


def moment(at_us: int) -> datetime:
    return datetime.fromtimestamp(0, UTC) + timedelta(microseconds=at_us)


def micros(time: datetime) -> int:
    return (time - datetime.fromtimestamp(0, UTC)) // timedelta(microseconds=1)


def take_due(plan: Plan, now_us: int) -> tuple[list[datetime], Plan]:
    """Return the times for which runs are to be started now, and the plan after that.

    The first part of what is due, if that is much: then there is more at once.
    """
    if plan.backfill:
        (begin_us, until_us), *later = plan.backfill
        times = list(islice(plan.times(begin_us - 1), STARTS_MAX))
        chosen = [time for time in times if micros(time) < until_us]
        if len(chosen) == STARTS_MAX:
            later.insert(0, (micros(chosen[-1]) + 1, until_us))
        last_us = max([plan.last_us, *map(micros, chosen[-1:])])
        return chosen, msgspec.structs.replace(plan, backfill=tuple(later), last_us=last_us)
    if plan.paused:
        return [], plan
    late_us = now_us - LATE // timedelta(microseconds=1)
    chosen = []
    if plan.missed != "all" and plan.after_us < late_us:
        if plan.missed == "last":
            chosen = _newest(plan, late_us)
        plan = msgspec.structs.replace(plan, after_us=late_us)
    for time in islice(plan.times(plan.after_us), STARTS_MAX):
        if micros(time) > now_us:
            break
        chosen.append(time)
    if chosen:
        after_us = max(plan.after_us, micros(chosen[-1]))
        plan = msgspec.structs.replace(plan, after_us=after_us, last_us=micros(chosen[-1]))
    return chosen, plan


def _newest(plan: Plan, until_us: int) -> list[datetime]:
    """Return the last of the times that were missed until a moment, if there is one."""
    begin = moment(until_us).astimezone(ZoneInfo(plan.zone))
    guess = next(CronSim(plan.cron, begin, reverse=True), None)
    begin_us = plan.after_us
    if guess is not None:  # backwards a repeated hour is seen otherwise: the way forwards counts
        begin_us = max(begin_us, micros(guess) - AROUND_US)
    return list(_until(plan.times(begin_us), until_us))[-1:]


def _until(times: Iterator[datetime], until_us: int) -> Iterator[datetime]:
    for time in times:
        if micros(time) > until_us:
            return
        yield time


def obey(plan: Plan, asked: Asked, now_us: int) -> Plan:
    """Return the plan after what was asked for; a trigger changes nothing in it."""
    if asked.what == "pause":
        return msgspec.structs.replace(plan, paused=asked.reason or "by hand")
    if asked.what == "resume" and plan.paused:
        return msgspec.structs.replace(plan, paused="", after_us=now_us)
    if asked.what == "backfill":
        spans = (*plan.backfill, (asked.at_us, asked.until_us))
        return msgspec.structs.replace(plan, backfill=spans)
    if asked.what == "declare":
        return msgspec.structs.replace(
            plan, cron=asked.cron, zone=asked.zone, missed=asked.missed, after_us=now_us,
            revision=plan.revision + 1,
        )  # fmt: skip
    return plan


def _keep(schedule: Schedule) -> Callable[[Plan], Coroutine[Any, Any, None]]:
    async def keep(plan: Plan) -> None:
        """Start runs at their times until cancelled."""
        asked = asyncio.create_task(receive(Asked))
        for _ in range(ROUNDS):
            times, plan = take_due(plan, micros(now()))
            for time in times:
                schedule.start(time)
            upcoming = None if plan.paused else plan.next()
            set_attributes(
                workflow=schedule.workflow.name,
                cron=plan.cron, zone=plan.zone, missed=plan.missed, revision=plan.revision,
                paused=plan.paused, last_us=plan.last_us, backfills=len(plan.backfill),
                next_us=0 if upcoming is None else micros(upcoming),
            )  # fmt: skip
            wait_s = None if upcoming is None else max(0.0, (upcoming - now()).total_seconds())
            await asyncio.wait([asked], timeout=0.0 if plan.backfill else wait_s)
            if asked.done():
                request = asked.result()
                plan = obey(plan, request, micros(now()))
                if request.what == "trigger":
                    schedule.start(moment(request.at_us))
                asked = asyncio.create_task(receive(Asked))
        asked.cancel()
        continue_as_new(plan)

    return keep
