"""`pavane restored`: what a database that was put back has forgotten, and going on with it."""

from __future__ import annotations

import asyncio

import click

from pavane.app import RunStatus
from pavane.cli.connection import Where, connected, where_options
from pavane.cli.exits import FAILED
from pavane.cli.output import Format, output_option, print_one, print_table, say
from pavane.cli.runs.record import read_list
from pavane.cli.text import clock, counted, duration, short_clock
from pavane.cli.timeline import STATUS_COLOURS
from pavane.steering.restored import Lost
from pavane.stores.port import RunFilter

LIVE = ("running", "waiting", "stuck")


@click.command(
    epilog="""\b
Examples:
  pavane restored --app shop.py
  pavane restored --store postgresql://db.example/shop -o json
  pavane restored --app shop.py --accept

\b
Each machine notes how far a Postgres database had come, in a file outside of it; workers refuse a
database that went back. This lists the runs that had not ended in what was put back: their steps
since then may have been done, and are done again with the same idempotency keys. Runs started and
events published in that time are gone: start and publish them again, with the same ids.

\b
Ask on a machine that worked for it until the end. The exit code is 1 if it was put back and is not
accepted yet.
"""
)
@where_options
@click.option("--accept", is_flag=True, help="Let workers go on with the database as it is.")
@click.option("-n", "--limit", default=1000, show_default=True, type=click.IntRange(1, 1_000_000))
@output_option
def restored(where: Where, accept: bool, limit: int, output: Format) -> None:
    """List what must be looked at after a backup was put back; let workers go on."""
    app = where.app_or_none("database")

    async def look() -> tuple[Lost | None, list[RunStatus], int]:
        async with connected(app, where.store) as client:
            lost = await client.restored.lost()
            which = RunFilter(status=LIVE, limit=limit)
            found = [] if lost is None or accept else await read_list(client, which)
            if accept and lost is not None:
                await client.restored.accept()
            return lost, found, client.store.now_us()

    lost, found, now_us = asyncio.run(look())
    if lost is None:
        say("nothing shows on this machine that the database was put back")
        return
    if accept:
        say("accepted: workers go on with it; what waits for a retry or a kill is yours to look at")
        return
    if output != "table":
        print_one({"lost": lost, "runs": found}, output)
    else:
        say(
            f"The database knows nothing of what was done from {clock(lost.from_us)} "
            f"until {clock(lost.until_us)} ({duration(lost.until_us - lost.from_us)})."
        )
        if found:
            _print(found, now_us)
        say(
            f"{counted(len(found), 'run')} had not ended. What they did in that time is done "
            f"again, with the same idempotency keys."
        )
        if len(found) == limit:
            say(f"These are the newest {limit}; --limit shows more.")
    click.get_current_context().exit(FAILED)


def _print(found: list[RunStatus], now_us: int) -> None:
    rows = [
        [
            one.id, one.workflow, one.status, one.holder, short_clock(one.started_us),
            duration(now_us - one.started_us), one.reason,
        ]
        for one in found
    ]  # fmt: skip
    colours = [STATUS_COLOURS.get(one.status) for one in found]
    heads = ("ID", "WORKFLOW", "STATUS", "AT", "STARTED", "AGO", "")
    print_table(heads, rows, colours=colours, coloured=2)
