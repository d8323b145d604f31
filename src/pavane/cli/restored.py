"""`pavane restored`: that a database was put back, or is another one, and going on with it."""

from __future__ import annotations

import asyncio

import click
import msgspec

from pavane.app import RunStatus
from pavane.cli.connection import Where, connected, where_options
from pavane.cli.exits import FAILED
from pavane.cli.output import Format, output_option, print_one, print_table, say
from pavane.cli.runs.record import read_list
from pavane.cli.text import clock, counted, duration, short_clock
from pavane.cli.timeline import STATUS_COLOURS
from pavane.steering.restored import Lost, Other
from pavane.stores.port import RunFilter

LIVE = ("running", "waiting", "stuck")


class Shown(msgspec.Struct):
    """What shows on this machine: `lost` if it was put back, `other` if it is another one."""

    lost: Lost | None
    other: Other | None
    runs: list[RunStatus]
    """Those that had not ended in what was put back."""

    @property
    def is_refused(self) -> bool:
        """Whether workers of this machine are refused."""
        return self.lost is not None or self.other is not None


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
Workers refuse another database at the same address, too, unless it is blank. To accept one, do so
on each machine that worked for the one before.

\b
Ask on a machine that worked for it until the end. The exit code is 1 if workers are refused.
"""
)
@where_options
@click.option("--accept", is_flag=True, help="Let workers go on with the database as it is.")
@click.option("-n", "--limit", default=1000, show_default=True, type=click.IntRange(1, 1_000_000))
@output_option
def restored(where: Where, accept: bool, limit: int, output: Format) -> None:
    """List what must be looked at after a backup was put back; let workers go on."""
    app = where.app_or_none("database")

    async def look() -> tuple[Shown, int]:
        async with connected(app, where.store) as client:
            shown = Shown(await client.restored.lost(), await client.restored.other(), [])
            if accept and shown.is_refused:
                await client.restored.accept()
            elif shown.lost is not None:
                shown.runs = await read_list(client, RunFilter(status=LIVE, limit=limit))
            return shown, client.store.now_us()

    shown, now_us = asyncio.run(look())
    if accept and shown.is_refused:
        say(_accepted(shown))
        return
    if output != "table":
        print_one(shown, output)
    elif shown.lost is not None:
        _print_lost(shown.lost, shown.runs, limit, now_us)
    elif shown.other is not None:
        say(
            f"This is another database (cluster {shown.other.cluster}) than the one that this "
            f"machine worked for at this address (cluster {shown.other.before}). If that is meant, "
            f"--accept lets workers of this machine go on with it."
        )
    else:
        say("nothing shows on this machine that the database was put back")
    if shown.is_refused:
        click.get_current_context().exit(FAILED)


def _accepted(shown: Shown) -> str:
    if shown.other is not None:
        return "accepted: workers of this machine go on with it; other machines ask for themselves"
    return "accepted: workers go on with it; what waits for a retry or a kill is yours to look at"


def _print_lost(lost: Lost, found: list[RunStatus], limit: int, now_us: int) -> None:
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
