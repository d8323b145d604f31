"""`pavane handlers list` and `pavane handlers show`, with what a shadow or share does otherwise."""

from __future__ import annotations

import asyncio
from difflib import unified_diff
from typing import Any, cast

import click
import msgspec

from pavane.app import Client
from pavane.cli.connection import Where, connected, where_options
from pavane.cli.names import complete_handler
from pavane.cli.output import Format, output_option, print_json, print_one, print_table, say
from pavane.cli.text import clock, counted, duration, printable, short_clock
from pavane.steering.dead import DeadGroup, DeadQuery
from pavane.steering.handlers import HandlerStatus
from pavane.steering.variants import (
    Difference,
    Published,
    ShadowComparison,
    ShareComparison,
    Side,
)
from pavane.stores.port import LAST_US
from pavane.workflow import STARTER

STATE_COLOURS = {
    "working": "green", "paused": "yellow", "breaker": "red", "shadow": "cyan", "share": "cyan",
    "idle": "yellow", "undeclared": "red",
}  # fmt: skip
_ABOUT = {
    "idle": "no node hosts its service",
    "undeclared": "not declared any more; its service is",
}


@click.command(
    "list",
    epilog="""\b
Examples:
  pavane handlers list --app shop.py
  pavane handlers list --store shop.db -o jsonl | jq 'select(.backlog > 1000) | .name'

\b
BACKLOG: events in the log that it has not begun with. PARKED: waiting for another attempt, or
behind one of their key. DEAD: given up; `pavane dead list`.
""",
)
@where_options
@output_option
def list_handlers(where: Where, output: Format) -> None:
    """List handlers: what they react to, what they do now, how far behind they are."""
    app = where.app_or_none("handlers")

    async def look() -> list[HandlerStatus]:
        async with connected(app, where.store) as client:
            return await client.handlers.list()

    found = asyncio.run(look())
    if output != "table":
        print_json(found, output)
        return
    if not found:
        say("no handlers")
        return
    heads = ("HANDLER", "STATE", "BACKLOG", "PARKED", "DEAD", "EVENTS", "")
    rows = [_row(handler) for handler in found]
    colours = [STATE_COLOURS[handler.state] for handler in found]
    print_table(heads, rows, colours=colours, coloured=1, squeezed=(5,))


def _row(handler: HandlerStatus) -> list[str]:
    counts = [f"{n:,}" for n in (handler.backlog, handler.parked, handler.dead)]
    if handler.share is not None:
        counts = ["", "", ""]
    return [
        f"{handler.service}.{handler.name}", handler.state, *counts, ", ".join(handler.types),
        about(handler),
    ]  # fmt: skip


def about(handler: HandlerStatus) -> str:
    """Return in a few words what its state and name do not say."""
    said: list[str] = []
    if handler.share is not None:
        said.append(f"takes {handler.share:.1%} of {handler.instead_of}")
    elif handler.instead_of:
        said.append(f"compared with {handler.instead_of}")
    if handler.state in ("paused", "breaker"):
        until = "" if handler.until_us == LAST_US else f" until {short_clock(handler.until_us)}"
        said.append(f"{handler.reason}{until}".strip())
    elif handler.state in _ABOUT:
        said.append(_ABOUT[handler.state])
    if handler.keeps_for_runs:
        said.append("keeps events for runs")
    elif handler.name.startswith(STARTER):
        said.append(f"starts runs of {handler.name.removeprefix(STARTER)}")
    return "; ".join(said)


# -- one handler -------------------------------------------------------------------------------


class Shown(msgspec.Struct, omit_defaults=True):
    """A handler with its dead letters and, if it is an experiment, its comparison."""

    handler: HandlerStatus
    dead: list[DeadGroup]
    shadow: ShadowComparison | None = None
    share: ShareComparison | None = None


@click.command(
    epilog="""\b
Examples:
  pavane handlers show mail.thank --app shop.py
  pavane handlers show mail.thank2 --app shop.py --differences 20

\b
For a shadow: what it would have published, compared event by event with what the current handler
did publish. For a share, or a handler that shares its keys: totals over its newest events.
"""
)
@click.argument("name", shell_complete=complete_handler)
@where_options
@click.option(
    "--differences", default=5, show_default=True, type=click.IntRange(0, 1000),
    help="Show so many events for which a shadow differs.",
)  # fmt: skip
@output_option
def show(where: Where, name: str, differences: int, output: Format) -> None:
    """Show a handler; for a shadow or a share, its difference from the current one."""
    app = where.app_or_none("handlers")

    async def look() -> Shown:
        async with connected(app, where.store) as client:
            return await _look(client, name, differences)

    shown = asyncio.run(look())
    if output != "table":
        print_one(shown, output)
        return
    _draw(shown)


async def _look(client: Client, name: str, differences: int) -> Shown:
    variant = client.variants.find(name)
    full = repr(variant) if variant is not None else await client.handlers.full_name(name)
    statuses = await client.handlers.list()
    status = next(s for s in statuses if f"{s.service}.{s.name}" == full)
    shares = any(s.share is not None and s.instead_of == full for s in statuses)
    shown = Shown(status, [])
    if status.share is None:
        shown.dead = await client.dead.groups(DeadQuery(handler=full))
    if status.share is not None or shares:
        shown.share = await client.variants.share(full)
    elif variant is not None:
        shown.shadow = await client.variants.shadow(full, differences)
    return shown


def _draw(shown: Shown) -> None:
    status = shown.handler
    state = click.style(status.state, fg=STATE_COLOURS[status.state], bold=True)
    name = click.style(f"{status.service}.{status.name}", bold=True)
    click.echo(f"{name}  {state}  {printable(about(status))}".rstrip())
    facts = [f"reacts to {', '.join(status.types)}", f"known since {clock(status.created_us)}"]
    if status.share is None:
        facts += [f"backlog {status.backlog:,}", f"parked {status.parked:,}"]
        facts += [f"dead {status.dead:,}"]
    for fact in facts:
        click.echo(click.style(f"  {fact}", dim=True))
    for group in shown.dead[:5]:
        click.echo(f"  {group.count:,} × {group.type}: {printable(group.cause)}")
    if shown.shadow is not None:
        _draw_shadow(shown.shadow)
    if shown.share is not None:
        click.echo("")
        _draw_share(shown.share)


def _draw_shadow(found: ShadowComparison) -> None:
    seen = found.same + found.differ
    click.echo(f"\ncompared with {found.current}, over {counted(seen, 'event')}:")
    click.echo(click.style(f"  same    {found.same:,}", fg="green"))
    failed = f", of them {found.failed:,} failed" if found.failed else ""
    colour = "red" if found.differ else None
    click.echo(click.style(f"  differ  {found.differ:,}{failed}", fg=colour))
    if found.waiting:
        click.echo(f"  {found.waiting:,} not handled by {found.current}, so not compared")
    for difference in found.differences:
        _draw_difference(difference, found)


def _draw_difference(found: Difference, of: ShadowComparison) -> None:
    title = f"{found.type} {found.key}  {found.event}  {short_clock(found.at_us)}"
    click.echo("\n" + click.style(printable(title), bold=True))
    if found.error:
        click.echo(click.style(f"  {of.shadow} failed: {printable(found.error)}", fg="red"))
    for line in difference_lines(found):
        colour = {"+": "green", "-": "red"}.get(line[0])
        click.echo("  " + click.style(printable(line), fg=colour))
    if not found.error and not found.current and not found.shadow:
        click.echo("  (both published nothing)")


def difference_lines(found: Difference) -> list[str]:
    """Return what the shadow publishes more (+) and less (-) than the current handler."""
    before = [line for event in found.current for line in _spelled(event)]
    after = [line for event in found.shadow for line in _spelled(event)]
    lines = list(unified_diff(before, after, lineterm="", n=2))
    return [line for line in lines[2:] if not line.startswith("@@")]


def _spelled(event: Published) -> list[str]:
    """Return an event with a line for each of its fields."""
    head = f"{event.type} {event.key}".rstrip()
    if not isinstance(event.data, dict):
        return [f"{head} {_json(event.data)}"]
    fields = cast("dict[str, Any]", event.data)
    return [head, *(f"    {name}: {_json(value)}" for name, value in fields.items())]


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _draw_share(found: ShareComparison) -> None:
    heads = ("", "HANDLED", "RETRIED", "DEAD", "TOOK", "PUBLISHED PER EVENT")
    print_table(heads, [_side(side) for side in (found.current, *found.shares)])


def _side(side: Side) -> list[str]:
    published = ", ".join(f"{type} {count:g}" for type, count in side.published.items())
    return [
        side.handler, f"{side.handled:,}", f"{side.retried:,}", f"{side.dead:,}",
        duration(side.took_us), published or "nothing",
    ]  # fmt: skip
