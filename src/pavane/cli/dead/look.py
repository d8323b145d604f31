"""`pavane dead list` and `pavane dead show`."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import click

from pavane.cli.connection import Where, connected, where_options
from pavane.cli.events.look import pretty
from pavane.cli.names import complete_dead, complete_event, complete_handler
from pavane.cli.output import (
    Format,
    is_unicode,
    output_option,
    print_json,
    print_one,
    print_table,
    say,
)
from pavane.cli.text import clock, counted, printable, short_clock
from pavane.core.codec import error_summary
from pavane.engine.words import handler_with_words, source_in_words
from pavane.steering.dead import DeadGroup, DeadLetter, DeadQuery
from pavane.stores.eventlog import DeadRow


def filter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --handler, --type, --key and --cause; the command gets them as `which`."""

    @click.option(
        "--handler", metavar="NAME", shell_complete=complete_handler, help="Of this handler."
    )
    @click.option(
        "-t", "--type", metavar="NAME", shell_complete=complete_event, help="Of this event type."
    )
    @click.option("-k", "--key", metavar="KEY", help="With this key.")
    @click.option("--cause", metavar="TEXT", help="With this in its cause.")
    @functools.wraps(command)
    def wrapped(
        handler: str | None, type: str | None, key: str | None, cause: str | None, **options: Any
    ) -> Any:
        return command(which=DeadQuery(handler, type, key, cause), **options)

    return wrapped


@click.command(
    "list",
    epilog="""\b
Examples:
  pavane dead list --app shop.py
  pavane dead list --store shop.db --handler mail.thank --each
  pavane dead list --store shop.db --each -o jsonl | jq -r .no

\b
A cause is the error without what differs from event to event, such as ids and amounts.
""",
)
@where_options
@filter_options
@click.option("--each", is_flag=True, help="Single ones, oldest first, with their numbers.")
@click.option("-n", "--limit", default=100, show_default=True, type=click.IntRange(1, 100_000))
@output_option
def list_dead(where: Where, which: DeadQuery, each: bool, limit: int, output: Format) -> None:
    """List dead letters, grouped by handler, event type and cause."""
    app = where.app_or_none("dead letters")

    async def look() -> tuple[list[DeadGroup], list[DeadRow], dict[int, str]]:
        async with connected(app, where.store) as client:
            if each:
                return [], await client.dead.list(which, limit), await client.dead.names()
            return await client.dead.groups(which), [], {}

    groups, rows, names = asyncio.run(look())
    if output != "table":
        print_json([_plain(row, names) for row in rows] if each else groups, output)
    elif not groups and not rows:
        say("no dead letters" + (" fit these filters" if which != DeadQuery() else ""))
    elif each:
        _print_each(rows, names, limit)
    else:
        _print_groups(groups)


def _print_groups(groups: list[DeadGroup]) -> None:
    rows = [
        [
            f"{g.count:,}", handler_with_words(g.handler), g.type, short_clock(g.first_us),
            short_clock(g.last_us), g.cause,
        ]
        for g in groups
    ]  # fmt: skip
    print_table(("COUNT", "HANDLER", "EVENT", "FIRST", "LAST", "CAUSE"), rows, squeezed=(1, 2))
    total = sum(group.count for group in groups)
    say(f"{counted(total, 'dead letter')}; --each shows single ones, `pavane dead show NO` one")


def _print_each(rows: list[DeadRow], names: dict[int, str], limit: int) -> None:
    heads = ["NO", "HANDLER", "EVENT", "KEY", "SINCE", "TRIES", "ERROR"]
    cells = [
        [
            str(row.no), handler_with_words(names.get(row.handler, "")), row.type, row.key,
            short_clock(row.at_us), str(row.attempts), error_summary(row.error),
        ]
        for row in rows
    ]  # fmt: skip
    if any(row.asked for row in rows):
        heads.insert(-1, "ASKED")
        for cell, row in zip(cells, rows, strict=True):
            cell.insert(-1, row.asked)
    print_table(heads, cells, squeezed=(1, 2, 3))
    if len(rows) == limit:
        say(f"the oldest {limit}; --limit shows more")


def _plain(row: DeadRow, names: dict[int, str]) -> dict[str, Any]:
    return {
        "no": row.no, "handler": names.get(row.handler, ""), "type": row.type, "key": row.key,
        "event": row.event, "at_us": row.at_us, "attempts": row.attempts, "cause": row.cause,
        "error": error_summary(row.error), "holds": row.holds, "asked": row.asked,
    }  # fmt: skip


@click.command(
    epilog="""\b
Examples:
  pavane dead show 7 --app shop.py
  pavane dead show 7 --store shop.db -o json | jq -r .trace
"""
)
@click.argument("no", type=int, shell_complete=complete_dead)
@where_options
@output_option
def show(where: Where, no: int, output: Format) -> None:
    """Show dead letter NO: its event, its attempts, its error with the trace."""
    app = where.app_or_none("dead letters")

    async def look() -> DeadLetter:
        async with connected(app, where.store) as client:
            return await client.dead.get(no)

    letter = asyncio.run(look())
    if output == "table":
        _draw(letter)
        return
    published = letter.published
    fields = {name: getattr(letter, name) for name in letter.__struct_fields__}
    said = {
        "published_us": None if published is None else published.at_us,
        "version": None if published is None else published.version,
    }
    print_one(fields | {"published": None} | said, output)


def _draw(letter: DeadLetter) -> None:
    key = f"  {letter.key}" if letter.key else ""
    title = click.style(f"dead letter {letter.no}", bold=True)
    what = f"{letter.type}{key}  at {handler_with_words(letter.handler)}"
    click.echo(f"{title}  {printable(what)}")
    facts = [("event", letter.event)]
    if letter.published is not None:
        who = source_in_words(letter.published.source)
        facts += [("published", f"{clock(letter.published.at_us)} by {who}")]
    facts += [("given up", f"{clock(letter.at_us)} after {counted(letter.attempts, 'attempt')}")]
    facts += [("cause", letter.cause)]
    if letter.holds:
        facts += [("holds", f"later events of key {letter.key} wait for it")]
    if letter.asked:
        facts += [("asked for", letter.asked)]
    for label, text in facts:
        click.echo(click.style(label.ljust(11), dim=True) + printable(text))
    click.echo(click.style("\nerror", bold=True))
    click.echo(click.style(printable(letter.error), fg="red"))
    if letter.trace:
        click.echo(click.style(printable(letter.trace), dim=True))
    click.echo(click.style("\npayload" + (", edited" if letter.is_edited else ""), bold=True))
    click.echo(pretty(bytes(letter.data)))
    if not letter.asked:
        arrow = "→" if is_unicode() else "->"
        no = letter.no
        say(f"{arrow} pavane dead retry {no}, pavane dead edit {no} or pavane dead drop {no}")
