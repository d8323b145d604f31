"""`pavane events list` and `pavane events show`."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Sequence

import click
import msgspec

from pavane.cli.connection import Where, connected, where_options
from pavane.cli.moments import moment
from pavane.cli.names import complete_event, complete_logged_event
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
from pavane.cli.text import clock, counted, duration, printable, short_clock, wrapped
from pavane.engine.mailbox import MAILBOX, Kept
from pavane.engine.publishing import cloud_event
from pavane.engine.words import handler_in_words, source_in_words
from pavane.steering.events import Became, EventStory, Handled
from pavane.stores.eventlog import EventFilter, EventRow

DATA_MIN = 20


@click.command(
    "list",
    epilog="""\b
Examples:
  pavane events list --app shop.py
  pavane events list --store shop.db --type OrderPlaced --type OrderShipped --since 2h
  pavane events list --store shop.db --conversation o-1 -o jsonl | jq -r .type

\b
json and jsonl print the events as CloudEvents.
""",
)
@where_options
@click.option(
    "-t", "--type", "types", multiple=True, metavar="NAME", shell_complete=complete_event,
    help="Of this type; may be repeated.",
)  # fmt: skip
@click.option("-k", "--key", metavar="KEY", help="With this key.")
@click.option("--since", type=moment, default=0, metavar="TIME", help='Such as "2h" or a date.')
@click.option("--conversation", metavar="ID", help="Caused by this first event or run.")
@click.option("--source", metavar="NAME", help="Published by this service or app.")
@click.option("-n", "--limit", default=50, show_default=True, type=click.IntRange(1, 100_000))
@output_option
def list_events(
    where: Where, types: tuple[str, ...], key: str | None, since: int, conversation: str | None,
    source: str | None, limit: int, output: Format,
) -> None:  # fmt: skip
    """List events, newest first."""
    app = where.app_or_none("events")
    which = EventFilter(
        types=types, key=key, source=source, conversation=conversation, since_us=since, limit=limit
    )

    async def look() -> list[EventRow]:
        async with connected(app, where.store) as client:
            return await client.events.list(which)

    found = asyncio.run(look())
    if output != "table":
        print_json([cloud_event(row) for row in found], output)
        return
    if not found:
        say("no events" + (" fit these filters" if which != EventFilter(limit=limit) else ""))
        return
    print_events(found)
    if len(found) == limit:
        say(f"the newest {limit}; --limit shows more")


def print_events(found: Sequence[EventRow]) -> None:
    heads = ["ID", "TIME", "TYPE", "KEY", "FROM"]
    rows = [[e.id, short_clock(e.at_us), e.type, e.key, source_in_words(e.source)] for e in found]
    widths = [max(len(cell) for cell in column) for column in zip(heads, *rows, strict=True)]
    room = shutil.get_terminal_size().columns - sum(widths) - 2 * len(widths)
    if room >= DATA_MIN or not sys.stdout.isatty():
        heads.append("DATA")
        for row, event in zip(rows, found, strict=True):
            row.append(event.data.decode(errors="replace"))
    print_table(heads, rows, squeezed=(2, 3, 4) if len(heads) > 5 else (2, 3))


# -- one event ---------------------------------------------------------------------------------


@click.command(
    epilog="""\b
Examples:
  pavane events show 00064c2f1a --app shop.py
  pavane events show 00064c2f1a --store shop.db -o json | jq '.handled[] | .outcome'
"""
)
@click.argument("id", shell_complete=complete_logged_event)
@where_options
@output_option
def show(where: Where, id: str, output: Format) -> None:
    """Show an event: what it says, who handled it or is about to, and what it caused."""
    app = where.app_or_none("events")

    async def look() -> EventStory:
        async with connected(app, where.store) as client:
            return await client.events.story(id)

    story = asyncio.run(look())
    if output == "table":
        _draw(story)
        return
    caused = [cloud_event(row) for row in story.caused]
    fields = ("envelope", "handled", "started", "taken", "kept")
    said = {field: getattr(story, field) for field in fields}
    print_one({**said, "caused": caused}, output)


def _draw(story: EventStory) -> None:
    event = story.event
    version = f" v{event.version}" if event.version != 1 else ""
    key = f"  {printable(event.key)}" if event.key else ""
    click.echo(click.style(f"{event.type}{version}{key}", bold=True))
    who = source_in_words(event.source)
    facts = [("id", event.id), ("published", f"{clock(event.at_us)} by {who}")]
    facts += [("conversation", event.conversation)] if event.conversation != event.id else []
    facts += [("caused by", event.cause)] if event.cause else []
    facts += [("trace", str(story.envelope["traceparent"]))]
    for label, text in facts:
        click.echo(click.style(label.ljust(14), dim=True) + printable(text))
    click.echo("")
    click.echo(pretty(event.data))
    mailed = [_mailed_line(f"run {one.run} took it", one.service) for one in story.taken]
    mailed += [_mailed_line(_kept_text(one), one.service, taken=False) for one in story.kept]
    handled = [_handled_line(h) for h in story.handled] + mailed
    _section("handled", handled or ["  nobody handles it"])
    caused = [
        f"  {row.type.ljust(20)}  {printable(row.key).ljust(12)}  {row.id}" for row in story.caused
    ]
    caused += [f"  run {printable(id)}" for id in story.started]
    _section(f"caused {counted(len(caused), 'thing')}" if caused else "caused nothing", caused)


def pretty(data: bytes) -> str:
    """Return JSON with a line for each field."""
    return printable(msgspec.json.format(data, indent=2).decode())


def _section(title: str, lines: Sequence[str]) -> None:
    click.echo("\n" + click.style(title, bold=True))
    for line in lines:
        click.echo(line)


_SIGNS = {
    "done": ("✓", "+", "green"), "dead": ("✗", "x", "red"), "dropped": ("-", "-", None),
    "expired": ("-", "-", None), "parked": ("◌", "o", "yellow"), "behind": ("◌", "o", "yellow"),
    "waiting": ("○", "o", "blue"), "passed over": ("·", ".", None),
}  # fmt: skip


def _handled_line(handled: Handled) -> str:
    said = _said(handled)
    if handled.data is not None and handled.outcome in ("done", "dead", "parked", "behind"):
        said += f"\nwith other data: {printable(bytes(handled.data).decode())}"
    return _line(handled.outcome, handler_in_words(handled.handler), said)


def _mailed_line(said: str, service: str, *, taken: bool = True) -> str:
    name = handler_in_words(f"{service}.{MAILBOX}")
    return _line("done" if taken else "passed over", name, printable(said))


def _kept_text(kept: Kept) -> str:
    until = f"kept until {clock(kept.until_us)}" if kept.until_us else "not kept any more"
    return f"{until}, nobody took it" + (f"; {kept.said}" if kept.said else "")


def _line(outcome: Became, name: str, said: str) -> str:
    fancy, plain, colour = _SIGNS[outcome]
    sign = click.style(fancy if is_unicode() else plain, fg=colour)
    lines = wrapped(said, max(terminal_width() - 34, 30))
    rest = "".join(f"\n{' ' * 34}{line}" for line in lines[1:])
    return f"  {sign} {printable(name).ljust(28)}  {lines[0]}{rest}"


def _said(handled: Handled) -> str:
    tries = f" at attempt {handled.attempts}" if handled.attempts > 1 else ""
    by = f", by the share {handled.variant}" if handled.variant else ""
    took = f"{short_clock(handled.at_us)}, took {duration(handled.took_us)}"
    error = printable(handled.error)
    if handled.outcome == "done":
        return f"done{tries} {took}{by}"
    if handled.outcome == "dead":
        letter = f"dead letter {handled.dead}" if handled.dead else "dead"
        return f"{letter} after {counted(handled.attempts, 'attempt')}: {error}"
    if handled.outcome == "parked":
        import time

        wait = handled.due_us - time.time() * 1e6
        when = f"in {duration(wait)}" if wait > 0 else "due"
        failed = f"; the last one failed with {error}" if error else ""
        return f"attempt {handled.attempts + 1} {when}{failed}"
    if handled.outcome == "behind":
        return "waits behind an earlier event of its key"
    if handled.outcome == "waiting":
        return "waiting in the log"
    if handled.outcome == "passed over":
        why = handled.why or "filtered out, too old, or from before it began"
        return f"not for it: {why}"
    return f"{handled.outcome} {short_clock(handled.at_us)}"
