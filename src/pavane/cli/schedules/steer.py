"""`pavane schedules pause`, `resume`, `trigger`, `backfill` and `delete`."""

from __future__ import annotations

import asyncio

import click

from pavane.app import Client
from pavane.cli.bulk import ask_each, confirmed
from pavane.cli.connection import Where, connected, where_options
from pavane.cli.moments import moment
from pavane.cli.names import complete_schedule
from pavane.cli.output import say
from pavane.cli.text import counted
from pavane.schedule import moment as time_at


@click.command(
    epilog="""\b
Examples:
  pavane schedules pause sales-report --app shop.py --reason "numbers are wrong"
  pavane schedules pause sales-report stock-count --store shop.db

\b
Times that pass meanwhile start nothing, also not later; backfill starts runs for them.
"""
)
@click.argument("names", nargs=-1, required=True, shell_complete=complete_schedule)
@where_options
@click.option("--reason", default="by hand", metavar="TEXT", help="Shown by list.")
def pause(where: Where, names: tuple[str, ...], reason: str) -> None:
    """Let schedules start nothing until they are resumed; what they started goes on."""

    async def ask(client: Client, name: str) -> str:
        await client.schedules.pause(name, reason=reason)
        return f"asked {name} to pause"

    ask_each(where, "schedules", names, ask)


@click.command(
    epilog="""\b
Examples:
  pavane schedules resume sales-report --app shop.py
"""
)
@click.argument("names", nargs=-1, required=True, shell_complete=complete_schedule)
@where_options
def resume(where: Where, names: tuple[str, ...]) -> None:
    """Let schedules start runs at their times again, from now on."""

    async def ask(client: Client, name: str) -> str:
        await client.schedules.resume(name)
        return f"asked {name} to go on"

    ask_each(where, "schedules", names, ask)


@click.command(
    epilog="""\b
Examples:
  pavane schedules trigger sales-report --app shop.py
  pavane runs watch $(pavane schedules trigger sales-report --app shop.py)

\b
Prints the id of the run. A paused schedule starts it too.
"""
)
@click.argument("names", nargs=-1, required=True, shell_complete=complete_schedule)
@where_options
def trigger(where: Where, names: tuple[str, ...]) -> None:
    """Start one run of each schedule now."""

    async def ask(client: Client, name: str) -> str:
        click.echo(await client.schedules.trigger(name))
        return f"asked {name} to start a run"

    ask_each(where, "schedules", names, ask)


@click.command(
    epilog="""\b
Examples:
  pavane schedules backfill sales-report --since 2026-03-01 --until 2026-03-08 --app shop.py
  pavane schedules backfill sales-report --since 2d --dry-run --app shop.py

\b
A time that has a run already keeps that one, so doing it twice starts nothing twice.
"""
)
@click.argument("name", shell_complete=complete_schedule)
@where_options
@click.option(
    "--since", type=moment, required=True, metavar="TIME", help='From then: "2h" ago, a date.'
)
@click.option("--until", type=moment, metavar="TIME", help="Up to, not including, then; or now.")
@click.option("--dry-run", is_flag=True, help="Only count.")
def backfill(where: Where, name: str, since: int, until: int | None, dry_run: bool) -> None:
    """Start runs for the times of a span of the past."""
    app = where.app_or_none("schedules")

    async def work() -> None:
        async with connected(app, where.store) as client:
            until_us = client.store.now_us() if until is None else until
            span = (time_at(since), time_at(until_us))
            if dry_run:
                count = await client.schedules.count(name, *span)
                say(f"would ask {name} for {counted(count, 'run')}")
            else:
                count = await client.schedules.backfill(name, *span)
                say(f"asked {name} for {counted(count, 'run')}; follow: pavane schedules show")

    asyncio.run(work())


@click.command(
    epilog="""\b
Examples:
  pavane schedules delete old-report --app shop.py
  pavane schedules delete old-report --store shop.db --yes

\b
First remove app.schedule(…) from the code of all workers: a worker that still declares it begins
it anew when it starts.
"""
)
@click.argument("name", shell_complete=complete_schedule)
@where_options
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def delete(where: Where, name: str, yes: bool) -> None:
    """End a schedule that was removed from the code; what it started goes on."""
    app = where.app_or_none("schedules")

    async def work() -> None:
        async with connected(app, where.store) as client:
            found = await client.schedules.show(name)
            confirmed(f"End schedule {name} ({found.cron}, {found.zone})?", yes=yes)
            await client.schedules.delete(name)
            say(f"ended {name}")

    asyncio.run(work())
