"""Schedules as values: which times are nominal, which are due, what was missed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import islice
from zoneinfo import ZoneInfo, available_timezones

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pavane import App, BadDeclaration, Service
from pavane.schedule import (
    STARTS_MAX,
    Asked,
    Missed,
    Plan,
    count_times,
    micros,
    moment,
    nominal_times,
    obey,
    take_due,
)

HOUR_US = 3600 * 10**6
START = datetime(2026, 3, 2, 12, tzinfo=UTC)


def plan(cron: str = "0 * * * *", zone: str = "UTC", missed: Missed = "last") -> Plan:
    return Plan(cron, zone, missed, micros(START))


def due(plan: Plan, at: datetime) -> tuple[list[str], Plan]:
    times, after = take_due(plan, micros(at))
    return [time.strftime("%d %H:%M") for time in times], after


@pytest.mark.parametrize("cron", ["*/30 * * * *", "30 2 * * *", "0 0 * * *", "15 1-3 * * sun"])
def test_times_only_go_forward_in_every_zone_and_over_every_change_of_its_clocks(cron: str) -> None:
    """P47: from whichever moment one looks, the same times follow, each once."""
    for zone in sorted(available_timezones()):
        changes = list(_changes(ZoneInfo(zone)))[:2]
        for change in changes:
            begin = micros(change - timedelta(hours=5))
            times = [micros(time) for time in islice(nominal_times(cron, zone, begin), 20)]
            assert times == sorted(set(times)), (zone, change)
            for at, time in enumerate(times[:12]):
                following = next(nominal_times(cron, zone, time))
                assert micros(following) == times[at + 1], (zone, change, moment(time))


def _changes(zone: ZoneInfo) -> list[datetime]:
    """Return when the clocks of a zone change, 2024 to 2026, to the day."""
    found: list[datetime] = []
    day = datetime(2024, 1, 1, tzinfo=UTC)
    offset = day.astimezone(zone).utcoffset()
    while day.year < 2027:
        day += timedelta(days=1)
        if (now := day.astimezone(zone).utcoffset()) != offset:
            found.append(day)
            offset = now
    return found


def test_a_repeated_hour_counts_once_unless_it_is_every_hours() -> None:
    zone = "Europe/Berlin"
    begin = micros(datetime(2026, 10, 25, 0, 0, tzinfo=ZoneInfo(zone)))
    daily = [time.isoformat() for time in islice(nominal_times("30 2 * * *", zone, begin), 2)]
    assert daily == ["2026-10-25T02:30:00+02:00", "2026-10-26T02:30:00+01:00"]
    hourly = [time.isoformat() for time in islice(nominal_times("30 * * * *", zone, begin), 4)]
    assert hourly[2:] == ["2026-10-25T02:30:00+02:00", "2026-10-25T02:30:00+01:00"]


def test_a_time_that_is_left_out_moves_behind_the_gap() -> None:
    begin = micros(datetime(2026, 3, 28, 12, tzinfo=UTC))
    time = next(nominal_times("30 2 * * *", "Europe/Berlin", begin))
    assert time.isoformat() == "2026-03-29T03:00:00+02:00"


def test_what_is_due_is_due_once() -> None:
    assert due(plan(), START + timedelta(minutes=59))[0] == []
    times, after = due(plan(), START + timedelta(hours=1, seconds=1))
    assert times == ["02 13:00"]
    assert due(after, START + timedelta(hours=1, seconds=2))[0] == []
    assert due(after, START + timedelta(hours=2))[0] == ["02 14:00"]


@pytest.mark.parametrize(
    ("missed", "found"),
    [
        ("last", ["02 16:00"]),
        ("all", ["02 13:00", "02 14:00", "02 15:00", "02 16:00"]),
        ("skip", []),
    ],
)
def test_times_that_were_missed_are_made_up_as_declared(missed: Missed, found: list[str]) -> None:
    times, after = due(plan(missed=missed), START + timedelta(hours=4, minutes=30))
    assert times == found
    assert due(after, START + timedelta(hours=5))[0] == ["02 17:00"]


@pytest.mark.parametrize("missed", ["last", "skip"])
def test_a_year_of_missed_minutes_takes_no_time(missed: Missed) -> None:
    old = msgspec.structs.replace(plan("* * * * *", missed=missed), after_us=0)
    times, after = due(old, START)
    assert times == {"last": ["02 11:59", "02 12:00"], "skip": ["02 12:00"]}[missed][-len(times) :]
    assert times
    assert after.after_us == micros(START)


def test_much_that_is_due_comes_in_parts() -> None:
    found: list[str] = []
    current = plan("* * * * *", missed="all")
    while times := due(current, START + timedelta(hours=10))[0]:
        assert len(times) <= STARTS_MAX
        found += times
        _, current = due(current, START + timedelta(hours=10))
    assert len(found) == len(set(found)) == 600


def test_a_paused_schedule_starts_nothing_and_goes_on_with_what_comes_after() -> None:
    paused = obey(plan(), Asked(what="pause", reason="stocktaking"), micros(START))
    later = START + timedelta(hours=3, minutes=30)
    assert paused.paused == "stocktaking"
    assert due(paused, later)[0] == []
    resumed = obey(paused, Asked(what="resume"), micros(later))
    assert due(resumed, later)[0] == []
    assert due(resumed, START + timedelta(hours=4))[0] == ["02 16:00"]


def test_resuming_what_was_not_paused_passes_nothing_over() -> None:
    later = START + timedelta(hours=1)
    assert due(obey(plan(), Asked(what="resume"), micros(later)), later)[0] == ["02 13:00"]


@given(hours=st.integers(1, 500), before=st.integers(0, 2000))
def test_a_backfill_starts_each_time_of_its_span_once(hours: int, before: int) -> None:
    begin_us = micros(START) - (before + hours) * HOUR_US
    until_us = begin_us + hours * HOUR_US
    current = obey(plan(), Asked(what="backfill", at_us=begin_us, until_us=until_us), micros(START))
    found: list[int] = []
    while current.backfill:
        times, current = take_due(current, micros(START))
        found += map(micros, times)
    assert found == list(range(begin_us, until_us, HOUR_US))
    assert len(found) == count_times("0 * * * *", "UTC", begin_us, until_us, 10_000)
    assert current.after_us == micros(START), "what comes by itself is not moved"
    assert current.last_us == found[-1]
    asked = Asked(what="backfill", at_us=begin_us, until_us=begin_us + 1)
    _, again = take_due(obey(current, asked, micros(START)), micros(START))
    assert again.last_us == found[-1], "a backfill of what came before"


@pytest.mark.parametrize(
    ("cron", "zone", "missed", "said"),
    [
        ("61 * * * *", "UTC", "last", "no cron expression: Bad minute"),
        ("* * *", "UTC", "last", "five fields"),
        ("0 9 * * *", "Mars/Olympus", "last", "no time zone"),
        ("0 9 * * *", "UTC", "never", "missed='never' is unknown"),
    ],
)
def test_a_bad_declaration_is_told(cron: str, zone: str, missed: Missed, said: str) -> None:
    service = Service("reports")

    @service.workflow
    async def report() -> None: ...

    with pytest.raises(BadDeclaration, match=said):
        App("shop", [service]).schedule(cron, report, zone=zone, missed=missed)


def test_two_schedules_of_one_name_or_of_a_foreign_workflow_are_refused() -> None:
    service, other = Service("reports"), Service("other")

    @service.workflow
    async def report() -> None: ...

    app = App("shop", [service])
    app.schedule("0 9 * * *", report)
    with pytest.raises(BadDeclaration, match="Two schedules are called 'report'"):
        app.schedule("0 10 * * *", report)
    with pytest.raises(BadDeclaration, match="does not belong to this app"):
        App("shop", [other]).schedule("0 9 * * *", report)
