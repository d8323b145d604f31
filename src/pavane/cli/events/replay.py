"""`pavane events replay`: history into one handler."""

from __future__ import annotations

import asyncio
import time

import click

from pavane.app import Client
from pavane.cli.bulk import confirmed, with_bar
from pavane.cli.connection import Where, connected, where_options
from pavane.cli.moments import moment
from pavane.cli.names import complete_event, complete_handler
from pavane.cli.output import Format, output_option, print_one, say
from pavane.cli.text import counted
from pavane.steering.events import Plan, Replay
from pavane.stores.port import LAST_US


@click.command(
    epilog="""\b
Examples:
  pavane events replay --into mail.thank --since 2024-05-01 --dry-run --app shop.py
  pavane events replay --into mail.thank --since 2024-05-01 --app shop.py
  pavane events replay --into stock.count --type OrderPlaced --key o-1 --yes --store shop.db

\b
The handler is called again, and what it publishes is published anew, under new ids. Events that are
parked or dead letters are left out. An interrupted replay goes on with --name and the name that it
printed; under one name an event is handled once.
"""
)
@where_options
@click.option(
    "--into", required=True, metavar="SERVICE.HANDLER", shell_complete=complete_handler,
    help="Which handler.",
)  # fmt: skip
@click.option("--since", type=moment, default=0, metavar="TIME", help='Such as "2h" or a date.')
@click.option("--until", type=moment, default=LAST_US, metavar="TIME", help="Up to then.")
@click.option(
    "-t", "--type", "types", multiple=True, metavar="NAME", shell_complete=complete_event,
    help="Of this type; may be repeated. Default: all that it handles.",
)  # fmt: skip
@click.option("-k", "--key", metavar="KEY", help="With this key.")
@click.option("--name", metavar="NAME", help="Names the replay. Default: a new name.")
@click.option("--dry-run", is_flag=True, help="Say how many events it would be; do nothing.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@output_option
def replay(
    where: Where, into: str, since: int, until: int, types: tuple[str, ...], key: str | None,
    name: str | None, dry_run: bool, yes: bool, output: Format,
) -> None:  # fmt: skip
    """Have one handler handle events of the past again, in order."""
    app = where.app_or_none("events")
    which = Replay(types, key, since, until)
    chosen = name or f"r{time.time_ns() // 1_000_000:x}"

    async def work() -> None:
        async with connected(app, where.store) as client:
            plan = await client.events.plan(into, which)
            _tell_left_out(plan)
            if dry_run or not plan.count:
                _print_end(plan, "", 0, output)
                return
            confirmed(f"Replay {counted(plan.count, 'event')} into {plan.handler}?", yes=yes)
            await _replay(client, plan, which, chosen, output)

    asyncio.run(work())


async def _replay(client: Client, plan: Plan, which: Replay, name: str, output: Format) -> None:
    say(f"replay {name}; if it is interrupted, --name {name} goes on with it")
    counts = client.events.replay(plan.handler, which, name, until=plan.until)
    go_on = f"--name {name} goes on with the rest"
    done = await with_bar(counts, plan.count, f"into {plan.handler}", go_on)
    service = plan.handler.partition(".")[0]
    if service not in await client.handlers.hosted():
        say(f"no worker hosts {service} now; they are handled when one does (`pavane run`)")
    _print_end(plan, name, done, output)


def _tell_left_out(plan: Plan) -> None:
    for count, why in (
        (plan.dead, "are dead letters of it: `pavane dead retry`"),
        (plan.in_custody, "wait for an attempt anyway"),
        (plan.ahead, "were not handled for the first time yet"),
    ):
        if count:
            say(f"left out: {count:,} that {why}")


def _print_end(plan: Plan, name: str, done: int, output: Format) -> None:
    if output != "table":
        print_one(
            {"handler": plan.handler, "events": plan.count, "asked": done, "name": name}, output
        )
    elif name:
        click.echo(f"asked {plan.handler} to handle {counted(done, 'event')} again")
        if done < plan.count:
            say(f"{plan.count - done:,} of {plan.count:,} were asked for before under this name")
    else:
        click.echo(f"{counted(plan.count, 'event')} would be replayed into {plan.handler}")
