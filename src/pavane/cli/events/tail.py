"""`pavane events tail`: events as they are published."""

from __future__ import annotations

import asyncio
import sys
from difflib import get_close_matches

import click

from pavane.app import Client
from pavane.cli.connection import Where, connected, where_options
from pavane.cli.names import complete_event
from pavane.cli.output import Format, output_option, print_one, say, terminal_width
from pavane.cli.runs.record import until_changed
from pavane.cli.text import fit, printable, short_clock
from pavane.contract import is_internal
from pavane.engine.publishing import cloud_event
from pavane.engine.words import source_in_words
from pavane.stores.eventlog import EventFilter, EventRow

PAGE = 500


@click.command(
    epilog="""\b
Examples:
  pavane events tail --app shop.py
  pavane events tail --store shop.db --type OrderPlaced -n 20
  pavane events tail --store shop.db -o jsonl | jq .data

\b
json and jsonl print one CloudEvent per line. Ctrl-C ends it (130).
"""
)
@where_options
@click.option(
    "-t", "--type", "types", multiple=True, metavar="NAME", shell_complete=complete_event,
    help="Of this type; may be repeated.",
)  # fmt: skip
@click.option(
    "-n", "--last", default=0, type=click.IntRange(0, 10_000), help="Begin with this many old ones."
)
@output_option
def tail(where: Where, types: tuple[str, ...], last: int, output: Format) -> None:
    """Print events as they are published, by whichever process, until Ctrl-C."""
    app = where.app_or_none("events")

    async def follow() -> None:
        async with connected(app, where.store) as client:
            at = await client.store.events_head()
            await _warn_of_unknown(client, types)
            if last:
                old = await client.events.list(EventFilter(types=types, before=at + 1, limit=last))
                _print(old[::-1], output)
            if sys.stdout.isatty():
                say("waiting for events; Ctrl-C ends")
            await _follow(client, at, types, output)

    asyncio.run(follow())


async def _warn_of_unknown(client: Client, types: tuple[str, ...]) -> None:
    """Say which of `types` nobody knows, if the app's code is there to tell."""
    if not client.registry.events:
        return
    logged = {type for type, _, _ in await client.store.event_types()}
    for type in types:
        if type not in logged and type not in client.registry.events:
            close = get_close_matches(type, logged | set(client.registry.events), 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            say(f"no event {type} is declared in the app or was ever published{hint}")


async def _follow(client: Client, at: int, types: tuple[str, ...], output: Format) -> None:
    while True:
        head = await client.store.events_head()
        while at < head:
            rows = await client.store.read_events(at, head, PAGE, types or None)
            _print([row for row in rows if not is_internal(row.type)], output)
            at = rows[-1].pos if len(rows) == PAGE else head
        await until_changed(client)


def _print(rows: list[EventRow], output: Format) -> None:
    room = terminal_width() if sys.stdout.isatty() else None
    for row in rows:
        if output != "table":
            print_one(cloud_event(row), "jsonl")
            continue
        data = printable(row.data.decode(errors="replace"))
        head = f"{short_clock(row.at_us)}  {row.type.ljust(20)}  {printable(row.key).ljust(12)}  "
        line = f"{head}{source_in_words(row.source).ljust(10)}  {data}"
        if room is not None:
            line = fit(line, room).rstrip()
        click.echo(click.style(line[: len(head)], bold=True) + line[len(head) :])
    sys.stdout.flush()
