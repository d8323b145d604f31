"""`pavane conversations list` and `pavane conversations show`."""

from __future__ import annotations

import asyncio

import click

from pavane.cli.connection import Where, connected, where_options
from pavane.cli.conversations.picture import Picture, find_conversation, read_picture
from pavane.cli.names import complete_contract, complete_conversation
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
from pavane.cli.text import clock, duration
from pavane.cli.tree import STATE_COLOURS, draw_conversation
from pavane.engine.words import event_in_words
from pavane.observe.conversations import ConversationStatus
from pavane.observe.progress import State

STATES: tuple[State, ...] = ("open", "on-time", "late", "overdue", "stuck", "twice")


@click.command(
    "list",
    epilog="""\b
Examples:
  pavane conversations list --app shop.py
  pavane conversations list --store shop.db --state stuck --state overdue
  pavane conversations list --store shop.db --contract OrderPlaced --limit 20
  pavane conversations list --store shop.db --state late -o jsonl | jq -r .key

\b
States: open (within its time), on-time and late (ended within it, after it), overdue (open after
it), stuck (overdue, and nothing of it moves by itself), twice (ended more than once).
""",
)
@where_options
@click.option(
    "-c", "--contract", metavar="NAME", shell_complete=complete_contract, help="Under this one."
)
@click.option(
    "--state", "states", multiple=True, type=click.Choice(STATES),
    help="In this state; may be repeated.",
)  # fmt: skip
@click.option("-n", "--limit", default=50, show_default=True, type=click.IntRange(1, 10_000))
@output_option
def list_conversations(
    where: Where, contract: str | None, states: tuple[State, ...], limit: int, output: Format
) -> None:
    """List conversations under a contract, newest first."""
    app = where.app_or_none()
    if contract is not None and app.registry.contracts:
        app.registry.contract(contract)

    async def look() -> tuple[list[ConversationStatus], list[str], int]:
        async with connected(app, where.store) as client:
            found: list[ConversationStatus] = []
            for state in dict.fromkeys(states) or (None,):
                found += await client.conversations.list(
                    contract=contract, state=state, limit=limit
                )
            found.sort(key=lambda status: -status.started_us)
            known = {status.contract for status in found}
            known |= set(app.registry.contracts) if contract is None else {contract}
            unwatched = await client.conversations.unwatched(known)
            return found[:limit], unwatched, client.store.now_us()

    found, unwatched, now_us = asyncio.run(look())
    if unwatched:
        listed = ", ".join(unwatched)
        say(f"no worker watches {listed} now; what happened since is seen when one does")
    if output != "table":
        print_json(found, output)
        return
    if not found:
        fits = " fit these filters" if states or contract else " under a contract"
        say(f"no conversations{fits}")
        return
    heads = ("ID", "CONTRACT", "KEY", "STATE", "STARTED", "TOOK", "LIMIT", "")
    colours = [STATE_COLOURS[status.state] for status in found]
    rows = [_list_row(status, now_us) for status in found]
    print_table(heads, rows, colours=colours, coloured=3)
    if len(found) == limit:
        say(f"the newest {limit}; --limit shows more")


def _list_row(status: ConversationStatus, now_us: int) -> list[str]:
    about = status.end
    if status.trouble is not None:
        about = status.trouble.sentence
    elif status.ends > 1:
        about = f"{status.end}, and {status.ends - 1} more"
    elif not status.end:
        missed = [m.type for m in status.milestones if m.state in ("late", "missed")]
        about = f"{', '.join(missed)} late" if missed else f"after {event_in_words(status.last)}"
    return [
        status.id, status.contract, status.key, status.state, clock(status.started_us),
        duration((status.ended_us or now_us) - status.started_us),
        duration(status.due_us - status.started_us), about,
    ]  # fmt: skip


@click.command(
    epilog="""\b
Examples:
  pavane conversations show 06611576df11721f14a7ce74 --store shop.db
  pavane conversations show o-1 --app shop.py
  pavane conversations show o-1 --store shop.db -o json | jq '.tree.roots[].children[].name'

\b
ID is that of the conversation, or of any event or run in it, or the key that list shows, if only
one conversation has it. In the picture everything stands below what caused it: full bars are work,
light ones attempts that failed, dots are waiting; bars have the colour of their service.
"""
)
@click.argument("id", shell_complete=complete_conversation)
@where_options
@output_option
def show(where: Where, id: str, output: Format) -> None:
    """Draw a conversation: a tree of causes over time, across services, handlers and runs."""
    app = where.app_or_none()

    async def look() -> Picture:
        async with connected(app, where.store) as client:
            return await read_picture(client, await find_conversation(client, id))

    picture = asyncio.run(look())
    if output != "table":
        print_one(picture, output)
        return
    lines = draw_conversation(
        picture.tree, picture.contracts, picture.trouble, width=terminal_width(),
        unicode=is_unicode(),
    )  # fmt: skip
    for line in lines:
        click.echo(line)
