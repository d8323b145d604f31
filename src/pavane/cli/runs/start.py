"""`pavane runs start`: start a run from the command line, and perhaps wait for its result."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import click
import msgspec

from pavane.app import App, Client, successor_of
from pavane.cli.connection import Where, connected, where_options
from pavane.cli.names import complete_workflow
from pavane.cli.output import Format, output_option, print_one, say
from pavane.cli.runs.record import idle_services, true_status, until_changed
from pavane.core.baton import ENDED
from pavane.core.operations import Mode
from pavane.errors import BadArguments, RunFailed
from pavane.stores.port import RunRow


@click.command(
    epilog="""\b
Examples:
  pavane runs start fulfil '{"order_id": "o-1", "cents": 990}' --app shop.py --id o-1
  pavane runs start greet '"Ada"' --arg times=3 --app shop:app --mode choreography
  pavane runs start fulfil "$(cat order.json)" --app shop.py --wait
  pavane runs start fulfil '"o-2"' --app shop:app --store postgresql://shop@db.example/shop

\b
ARGS are the workflow's arguments, each as JSON: text has quotes of its own. The run's id is printed
on stdout; with --wait, its result as JSON, and the exit code is 1 if it does not complete. Starting
an id again with the same arguments is the same run.
"""
)
@click.argument("workflow", shell_complete=complete_workflow)
@click.argument("args", nargs=-1)
@where_options
@click.option("--arg", "named", multiple=True, metavar="NAME=JSON", help="May be repeated.")
@click.option("--id", "id", metavar="ID", help="The run's id. Default: a new one.")
@click.option(
    "-m",
    "--mode",
    type=click.Choice(["orchestration", "choreography"]),
    help="Default: what the workflow declares.",
)
@click.option("--timeout", metavar="TIME", help='Bound the whole run, such as "30s" or "2h".')
@click.option("--priority", type=int, default=0, help="Where it waits for a limit. Default: 0.")
@click.option("--wait", is_flag=True, help="Wait for the end.")
@output_option
def start(
    where: Where, workflow: str, args: tuple[str, ...], named: tuple[str, ...], id: str | None,
    mode: str | None, timeout: str | None, priority: int, wait: bool, output: Format,
) -> None:  # fmt: skip
    """Start a run of WORKFLOW; durable when this returns."""
    app = where.app()
    definition = app.registry.workflow(workflow)
    values = tuple(_json(text, f"Argument {at}") for at, text in enumerate(args, 1))
    keywords = dict(_named(text) for text in named)

    async def work() -> None:
        async with connected(app, where.store, create=True) as client:
            run = await client.start_run(
                definition,
                values,
                keywords,
                id=id,
                mode=cast("Mode | None", mode),
                timeout=timeout,
                priority=priority,
            )
            if await idle_services(client, {definition.service.name}):
                name = definition.service.name
                say(f"no worker hosts {name!r} now; the run begins when one does (`pavane run`)")
            if not wait:
                _print_started(run.id, output)
                return
            say(f"run {run.id} started; waiting for its end (Ctrl-C leaves it running)")
            await _print_end(app, client, run.id, output)

    asyncio.run(work())


def _json(text: str, what: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError) as error:
        hint = ""
        if not any(c in text for c in '"{}[]'):
            hint = f" Text needs quotes of its own: '\"{text}\"'."
        raise BadArguments(f"{what} is not JSON ({error}): {text}.{hint}") from None


def _named(text: str) -> tuple[str, Any]:
    name, mark, value = text.partition("=")
    if not mark or not name:
        raise click.BadParameter(f"{text!r} must be NAME=JSON.", param_hint="--arg")
    return name, _json(value, f"Argument {name}")


def _print_started(id: str, output: Format) -> None:
    if output == "table":
        click.echo(id)
    else:
        print_one({"id": id}, output)


async def _print_end(app: App, client: Client, id: str, output: Format) -> None:
    row = await _end(client, id)
    if output != "table":
        result = msgspec.Raw(row.result or b"null") if row.status == "completed" else None
        said = {"id": row.id, "status": row.status, "reason": row.reason, "result": result}
        print_one(said, output)
    if row.status == "completed":
        if output == "table":
            click.echo((row.result or b"null").decode())
        return
    try:
        client.outcome(row)
    except RunFailed as error:
        raise RunFailed(
            f"{error}\n`pavane runs show {row.id}` shows what happened.", status=row.status
        ) from None


async def _end(client: Client, id: str) -> RunRow:
    """Wait for the end of a run, following its successors; raise RunFailed if it gets stuck."""
    while True:
        row = await client.home_row(id)
        if (successor := successor_of(row)) is not None:
            id = successor
            continue
        if row.status in ENDED:
            return row
        status = await true_status(client, row)
        if status.status == "stuck":
            raise RunFailed(f"Run {id!r} is stuck: {status.reason}", status="stuck")
        await until_changed(client)
