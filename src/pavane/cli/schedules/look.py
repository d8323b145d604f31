"""`pavane schedules list` and `show`."""

from __future__ import annotations

import asyncio
from itertools import islice

import click
import msgspec
from cronsim import CronSim

from pavane.cli.connection import Where, connected, where_options
from pavane.cli.names import complete_schedule
from pavane.cli.output import Format, output_option, print_json, print_one, print_table, say
from pavane.cli.text import clock, printable, short_clock
from pavane.schedule import moment, nominal_times
from pavane.steering.schedules import ScheduleStatus
from pavane.stores.port import RunFilter

STATE_COLOURS = {
    "working": "green", "paused": "yellow", "idle": "yellow", "stuck": "red", "failed": "red",
}  # fmt: skip
TIMES = 5
_MISSED = {
    "last": "one run for all times that were missed", "all": "a run for each time that was missed",
    "skip": "no run for times that were missed",
}  # fmt: skip


@click.command(
    "list",
    epilog="""\b
Examples:
  pavane schedules list --app shop.py
  pavane schedules list --store shop.db -o jsonl | jq 'select(.state != "working") | .name'

\b
Times are this machine's; the cron expression counts in the schedule's own zone.
""",
)
@where_options
@output_option
def list_schedules(where: Where, output: Format) -> None:
    """List schedules: what they start, and when they did last and will next."""
    app = where.app_or_none("schedules")

    async def look() -> list[ScheduleStatus]:
        async with connected(app, where.store) as client:
            return await client.schedules.list()

    found = asyncio.run(look())
    if output != "table":
        print_json(found, output)
        return
    if not found:
        say("no schedules")
        return
    heads = ("SCHEDULE", "STATE", "NEXT", "LAST", "CRON", "ZONE", "WORKFLOW", "")
    rows = [
        [
            one.name, one.state, _or_none(one.next_us), _or_none(one.last_us), one.cron, one.zone,
            f"{one.service}.{one.workflow}", one.reason,
        ]
        for one in found
    ]  # fmt: skip
    colours = [STATE_COLOURS[one.state] for one in found]
    print_table(heads, rows, colours=colours, coloured=1, squeezed=(6,))


def _or_none(us: int) -> str:
    return short_clock(us) if us else "-"


class RunLine(msgspec.Struct):
    id: str
    status: str


class Shown(msgspec.Struct):
    """A schedule with its next times, in its own zone, and its newest runs."""

    schedule: ScheduleStatus
    meaning: str
    next: list[str]
    runs: list[RunLine]


@click.command(
    epilog="""\b
Examples:
  pavane schedules show sales-report --app shop.py
  pavane schedules show sales-report --store shop.db -o json
"""
)
@click.argument("name", shell_complete=complete_schedule)
@where_options
@output_option
def show(where: Where, name: str, output: Format) -> None:
    """Show a schedule: what its cron expression means, its next times, its newest runs."""
    app = where.app_or_none("schedules")

    async def look() -> Shown:
        async with connected(app, where.store) as client:
            status = await client.schedules.show(name)
            which = RunFilter(id_prefix=f"{name}@", limit=TIMES)
            runs = [RunLine(run.id, run.status) for run in await client.runs(which)]
            now_us = client.store.now_us()
        works = status.state == "working"
        times = nominal_times(status.cron, status.zone, now_us) if works else iter(())
        meaning = CronSim(status.cron, moment(now_us)).explain() if status.cron else ""
        return Shown(status, meaning, [time.isoformat() for time in islice(times, TIMES)], runs)

    shown = asyncio.run(look())
    if output != "table":
        print_one(shown, output)
        return
    status = shown.schedule
    state = click.style(status.state, fg=STATE_COLOURS[status.state], bold=True)
    click.echo(f"{click.style(name, bold=True)}  {state}  {printable(status.reason)}".rstrip())
    facts = [
        f"{shown.meaning} ({status.cron}), {status.zone}",
        f"starts {status.service}.{status.workflow}; {_MISSED.get(status.missed, '')}",
        f"last {clock(status.last_us) if status.last_us else 'never'}; kept by run {status.run}",
    ]
    if status.backfills:
        facts.append(f"backfilling {status.backfills} spans")
    for fact in facts:
        click.echo(click.style(f"  {fact}", dim=True))
    for time in shown.next:
        click.echo(f"  next  {time}")
    for run in shown.runs:
        click.echo(f"  run   {run.id}  {run.status}")
