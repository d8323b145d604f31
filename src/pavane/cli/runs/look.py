"""`pavane runs list` and `pavane runs show`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import click
import msgspec

from pavane.app import App, RunStatus
from pavane.cli.connection import Where, connected, where_options
from pavane.cli.names import complete_run, complete_workflow
from pavane.cli.output import (
    Format,
    is_unicode,
    output_option,
    print_json,
    print_one,
    print_table,
    say,
    terminal_width,
)
from pavane.cli.runs.record import (
    idle_services,
    needed_services,
    read_list,
    read_timeline,
    read_unbegun,
)
from pavane.cli.text import clock, duration, printable
from pavane.cli.timeline import STATUS_COLOURS, draw
from pavane.core.codec import RemoteTraceback, decode_error
from pavane.insight.timeline import Timeline
from pavane.stores.port import RunFilter, RunRow

STATUSES = (
    "running", "waiting", "stuck", "completed", "failed", "cancelled", "killed", "continued",
)  # fmt: skip


def filter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options by which runs are chosen; see `run_filter`."""
    for option in (
        click.option("--prefix", default="", metavar="TEXT", help="With an id that begins so."),
        click.option(
            "--where", "attributes", multiple=True, metavar="KEY=VALUE", help="May be repeated."
        ),
        click.option(
            "--status", "statuses", multiple=True, type=click.Choice(STATUSES),
            help="With this status; may be repeated.",
        ),
        click.option(
            "-w", "--workflow", metavar="NAME", shell_complete=complete_workflow,
            help="Of this workflow.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def run_filter(
    app: App, workflow: str | None, statuses: tuple[str, ...], attributes: tuple[str, ...],
    prefix: str, limit: int,
) -> RunFilter:  # fmt: skip
    """Return the filter that these options ask for; raise UnknownName for a workflow."""
    if workflow is not None and app.registry.workflows:
        app.registry.workflow(workflow)
    return RunFilter(
        workflow=workflow, status=statuses, id_prefix=prefix, limit=limit,
        attributes=tuple(_attribute(text) for text in attributes),
    )  # fmt: skip


@click.command(
    "list",
    epilog="""\b
Examples:
  pavane runs list --app shop.py
  pavane runs list --store shop.db --status stuck --status failed
  pavane runs list --app shop.py --workflow fulfil --where customer=ada --limit 20
  pavane runs list --app shop.py -o jsonl | jq -r .id

\b
--where compares an attribute that the workflow has set (set_attributes); true, false and numbers
are read as such, anything else and what is in "quotes" as text.
""",
)
@where_options
@filter_options
@click.option("-n", "--limit", default=50, show_default=True, type=click.IntRange(1, 100_000))
@output_option
def list_runs(
    where: Where, workflow: str | None, statuses: tuple[str, ...], attributes: tuple[str, ...],
    prefix: str, limit: int, output: Format,
) -> None:  # fmt: skip
    """List runs, newest first."""
    app = where.app_or_none()
    which = run_filter(app, workflow, statuses, attributes, prefix, limit)

    async def look() -> tuple[list[RunStatus], int]:
        async with connected(app, where.store) as client:
            unbegun = await read_unbegun(client, which)
            begun = await read_list(client, which)
            return [*unbegun, *begun][:limit], client.store.now_us()

    found, now_us = asyncio.run(look())
    if output != "table":
        print_json(found, output)
        return
    if not found:
        say("no runs" + (" fit these filters" if which != RunFilter(limit=limit) else ""))
        return
    rows = [_list_row(status, now_us) for status in found]
    colours = [STATUS_COLOURS.get(status.status) for status in found]
    heads = ("ID", "WORKFLOW", "STATUS", "MODE", "AT", "HOPS", "STARTED", "TOOK", "")
    print_table(heads, rows, colours=colours, coloured=2)
    if len(found) == limit:
        say(f"the newest {limit}; --limit shows more")


def _attribute(text: str) -> tuple[str, str | int | float | bool]:
    key, mark, value = text.partition("=")
    if not mark or not key:
        raise click.BadParameter(f"{text!r} must be KEY=VALUE.", param_hint="--where")
    if value in ("true", "false"):
        return key, value == "true"
    with contextlib.suppress(msgspec.DecodeError):
        return key, msgspec.json.decode(value, type=int | float | str)
    return key, value


def _list_row(status: RunStatus, now_us: int) -> list[str]:
    took = duration((status.ended_us or now_us) - status.started_us)
    version = f" v{status.version}" if status.version != 1 else ""
    undone = f"{status.compensated} undone" if status.compensated else ""
    about = status.reason.splitlines()[0] if status.reason else undone
    return [
        status.id, status.workflow + version, status.status, status.mode,
        status.home if status.ended_us else status.holder, str(status.hops),
        clock(status.started_us), took, about,
    ]  # fmt: skip


@click.command(
    epilog="""\b
Examples:
  pavane runs show o-1 --app shop.py
  pavane runs show o-1 --store shop.db -o json | jq '.spans[] | select(.state == "failed")'

\b
In the picture: a full bar is the last attempt of a step, a light one the time before it (queued, or
earlier attempts), dots are waiting. Bars have the colour of their service.
"""
)
@click.argument("id", shell_complete=complete_run)
@where_options
@click.option("--trace", is_flag=True, help="With the traceback of what a failed run failed with.")
@output_option
def show(where: Where, id: str, trace: bool, output: Format) -> None:
    """Draw a run: who held the baton when, what became of each step, how it ended."""
    app = where.app_or_none()

    async def look() -> tuple[Timeline, RunRow, list[str]]:
        async with connected(app, where.store) as client:
            line = await read_timeline(client, id)
            idle = await idle_services(client, needed_services(line))
            return line, await client.home_row(id), idle

    line, row, idle = asyncio.run(look())
    if output != "table":
        print_one(line, output)
        return
    for text in draw(line, width=terminal_width(), unicode=is_unicode()):
        click.echo(text)
    if idle:
        say(f"no worker hosts {', '.join(idle)} now; the run goes on when one does (`pavane run`)")
    if trace and row.status == "failed" and row.result:
        click.echo("\n" + _trace(row.result))


def _trace(raw: bytes) -> str:
    """Return the traceback that came with an error, from whichever process it happened in."""
    cause = decode_error(raw).__cause__
    return printable(cause.trace.strip()) if isinstance(cause, RemoteTraceback) else "no traceback"
