"""`pavane runs watch`: a run's timeline, live."""

from __future__ import annotations

import asyncio
import shutil
import sys

import click

from pavane.app import Client
from pavane.cli.connection import Where, connected, where_options
from pavane.cli.exits import FAILED
from pavane.cli.live import FRAME_S, Canvas, print_moment
from pavane.cli.names import complete_run
from pavane.cli.output import Format, is_unicode, output_option, say
from pavane.cli.runs.record import read_timeline, until_changed
from pavane.cli.timeline import STATUS_COLOURS, draw
from pavane.insight.timeline import Timeline, moments

_COLOURS = STATUS_COLOURS | {
    "failed": "red", "parked": "yellow", "retry": "yellow", "cancel": "yellow"
}  # fmt: skip


@click.command(
    epilog="""\b
Examples:
  pavane runs watch o-1 --app shop.py
  pavane runs watch o-1 --store shop.db | tee o-1.log

\b
The exit code is 0 if the run completes, 1 if it ends otherwise or is stuck. Without a terminal each
thing that happens is one line. Ctrl-C stops watching, not the run.
"""
)
@click.argument("id", shell_complete=complete_run)
@where_options
@output_option
def watch(where: Where, id: str, output: Format) -> None:
    """Follow a run until it ends or is stuck; json and jsonl print one line per happening."""
    app = where.app_or_none()

    async def follow() -> Timeline:
        async with connected(app, where.store) as client:
            if output == "table" and sys.stdout.isatty():
                return await _follow_drawn(client, id)
            return await _follow_lines(client, id, output)

    line = asyncio.run(follow())
    if line.status.status == "stuck":
        say(
            f"run {line.status.id} is stuck; `pavane runs retry` goes on once the cause is repaired"
        )
    if line.status.status != "completed":
        click.get_current_context().exit(FAILED)


def _is_over(line: Timeline) -> bool:
    return line.ended or line.status.status == "stuck"


async def _follow_drawn(client: Client, id: str) -> Timeline:
    """Draw the timeline again and again over itself."""
    with Canvas() as canvas:
        while True:
            line = await read_timeline(client, id)
            columns, rows = shutil.get_terminal_size()
            height = None if _is_over(line) else rows - 2
            canvas.draw(draw(line, width=columns - 1, unicode=is_unicode(), height=height))
            if _is_over(line):
                if not line.status.successor:
                    return line
                id = line.status.successor
                canvas.keep()
            await asyncio.sleep(FRAME_S)


async def _follow_lines(client: Client, id: str, output: Format) -> Timeline:
    """Print what happened since the last look, one line each."""
    told: set[str] = set()
    while True:
        line = await read_timeline(client, id)
        for moment in moments(line):
            if moment.key not in told:
                told.add(moment.key)
                print_moment(moment, output, of=id, from_us=line.from_us, colours=_COLOURS)
        sys.stdout.flush()
        if _is_over(line):
            if not line.status.successor:
                return line
            id, told = line.status.successor, set()
        else:
            await until_changed(client)
