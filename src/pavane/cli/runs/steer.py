"""`pavane runs send`, `cancel`, `kill`, `retry` and `fork`: what people ask of runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import click
import msgspec

from pavane.app import Client
from pavane.cli.bulk import ask_each
from pavane.cli.connection import Where, connected, register_home, where_options
from pavane.cli.events.publish import event_from
from pavane.cli.names import complete_event, complete_run, complete_step
from pavane.cli.output import Format, output_option, print_one, say
from pavane.event import type_for


@click.command(
    epilog="""\b
Examples:
  pavane runs send o-1 Approved '{"order_id": "o-1", "by": "ada"}' --app shop.py
  pavane runs send o-1 Paid '{"cents": 990}' --app shop.py --id bank-77

\b
With --id, sending the same again has no further effect.
"""
)
@click.argument("run", shell_complete=complete_run)
@click.argument("event", shell_complete=complete_event)
@click.argument("body", default="{}")
@where_options
@click.option("--id", "id", metavar="ID", help="Names this sending, so that it takes effect once.")
def send(where: Where, run: str, event: str, body: str, id: str | None) -> None:
    """Send an EVENT, with its fields as JSON, to the mailbox of RUN."""
    app = where.app()
    value = event_from(type_for(event, app.registry.events), body.encode())

    async def work() -> None:
        async with connected(app, where.store) as client:
            await client.send(run, value, id)

    asyncio.run(work())
    say(f"sent {event} to run {run}")


Ask = Callable[[Client, str], Awaitable[Any]]


def _ask_each(where: Where, ids: tuple[str, ...], said: str, ask: Ask) -> None:
    async def asked(client: Client, id: str) -> str:
        await register_home(client, id)
        await ask(client, id)
        return f"{said} run {id}"

    ask_each(where, "runs", ids, asked)


@click.command(
    epilog="""\b
Examples:
  pavane runs cancel o-1 o-2 --app shop.py
  pavane runs list --store shop.db -w fulfil --status waiting -o jsonl | jq -r .id \\
    | xargs pavane runs cancel --store shop.db
"""
)
@click.argument("ids", nargs=-1, required=True, shell_complete=complete_run)
@where_options
def cancel(where: Where, ids: tuple[str, ...]) -> None:
    """Ask runs to stop: a CancelledError at their next await, with clean-up and compensation."""
    _ask_each(where, ids, "asked to cancel", lambda client, id: client.request(id, "cancel"))


@click.command(
    epilog="""\b
Examples:
  pavane runs kill o-1 --store shop.db

\b
Nothing is compensated. To let a run clean up, cancel it.
"""
)
@click.argument("ids", nargs=-1, required=True, shell_complete=complete_run)
@where_options
def kill(where: Where, ids: tuple[str, ...]) -> None:
    """End runs at once, without any clean-up."""
    _ask_each(where, ids, "asked to kill", lambda client, id: client.request(id, "kill"))


@click.command(
    epilog="""\b
Examples:
  pavane runs retry o-1 --app shop.py
  pavane runs list --store shop.db --status stuck -o jsonl | jq -r .id \\
    | xargs pavane runs retry --store shop.db
"""
)
@click.argument("ids", nargs=-1, required=True, shell_complete=complete_run)
@where_options
def retry(where: Where, ids: tuple[str, ...]) -> None:
    """Go on with stuck runs, and with failed ones from the point of their failure."""
    _ask_each(where, ids, "asked to retry", lambda client, id: client.retry(id))


@click.command(
    epilog="""\b
Examples:
  pavane runs fork o-1 --at ship --app shop.py
  pavane runs fork o-1 --at payments.charge --id o-1-again --store shop.db

\b
The new run has the old one's results up to the step, and does the step and what follows anew. Its
id is printed on stdout.
"""
)
@click.argument("run", shell_complete=complete_run)
@where_options
@click.option(
    "--at",
    required=True,
    metavar="STEP",
    shell_complete=complete_step,
    help="A step's name, or an operation's number.",
)
@click.option("--id", "id", metavar="ID", help="The new run's id. Default: a new one.")
@output_option
def fork(where: Where, run: str, at: str, id: str | None, output: Format) -> None:
    """Start a new run that shares the journal of RUN up to a step and does it anew."""
    app = where.app_or_none()

    async def work() -> str:
        async with connected(app, where.store) as client:
            await register_home(client, run)
            return await client.fork(run, int(at) if at.isdigit() else at, id)

    forked = asyncio.run(work())
    if output == "table":
        click.echo(forked)
    else:
        print_one(msgspec.structs.asdict(_Forked(forked, run)), output)


class _Forked(msgspec.Struct):
    id: str
    of: str
