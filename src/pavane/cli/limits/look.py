"""`pavane limits list` and `show`."""

from __future__ import annotations

import asyncio

import click

from pavane.cli.connection import Where, connected, where_options
from pavane.cli.names import complete_limit
from pavane.cli.output import Format, output_option, print_json, print_table, say
from pavane.cli.text import duration
from pavane.errors import UnknownName
from pavane.steering.limits import LimitStatus, Turn


@click.command(
    "list",
    epilog="""\b
Examples:
  pavane limits list --app shop.py
  pavane limits list --store postgresql://localhost/shop -o json

\b
A limit is shown while something has a permit or waits for one. AT ONCE is how many have one, of how
many there are, and how many of those are left by nodes that are gone; LONGEST how long the first of
those who wait has waited.
""",
)
@where_options
@output_option
def list_limits(where: Where, output: Format) -> None:
    """List the limits in use, and how many wait for them."""
    found, now_us = _look(where)
    if output != "table":
        print_json(found, output)
        return
    if not found:
        say("no limit is in use")
        return
    heads = ("SERVICE", "LIMIT", "KEY", "AT ONCE", "RATE", "WAITING", "LONGEST")
    rows = [
        [
            one.service, one.limit, one.key, _given(one),
            f"{one.rate} in {duration(one.per_s * 1e6)}" if one.rate and one.per_s else "",
            str(len(one.waiting)),
            duration(now_us - min(turn.asked_us for turn in one.waiting)) if one.waiting else "",
        ]
        for one in found
    ]  # fmt: skip
    colours = ["yellow" if one.waiting else None for one in found]
    print_table(heads, rows, colours=colours, coloured=5, squeezed=(2,))


@click.command(
    epilog="""\b
Examples:
  pavane limits show charge --app shop.py
  pavane limits show charge --app shop.py -o json

\b
A run's permit is named by the run; a step's by its run, operation and attempt ("o1#2!1"), so that
`pavane runs show o1` tells more; a handler's by the handler, the event's position and the attempt.
What is "left" has a permit of a node that is gone: the node that takes over goes on by it; if it is
not needed there, it is given back within seconds of somebody waiting for it.
"""
)
@click.argument("limit", shell_complete=complete_limit)
@where_options
@output_option
def show(where: Where, limit: str, output: Format) -> None:
    """Show who has a permit of LIMIT, and who waits for one, first the one whose turn is next."""
    found, now_us = _look(where)
    chosen = [one for one in found if one.limit == limit]
    if not chosen:
        listed = ", ".join(sorted({one.limit for one in found})) or "none"
        raise UnknownName(f"No limit called {limit!r} is in use. In use: {listed}.")
    if output != "table":
        print_json(chosen, output)
        return
    heads = ("KEY", "WORK", "STATE", "SINCE", "PRIORITY")
    rows = [
        [one.key, turn.work, state, duration(now_us - since_us), str(turn.priority)]
        for one in chosen
        for turn, state, since_us in _turns(one)
    ]
    colours = ["green" if row[2] == "begun" else "yellow" for row in rows]
    print_table(heads, rows, colours=colours, coloured=2, squeezed=(1,))


def _given(one: LimitStatus) -> str:
    given = (
        str(len(one.given)) if one.concurrency is None else f"{len(one.given)} of {one.concurrency}"
    )
    left = sum(not turn.node for turn in one.given)
    return f"{given}, {left} left" if left else given


def _turns(one: LimitStatus) -> list[tuple[Turn, str, int]]:
    return [(turn, "begun" if turn.node else "left", turn.given_us) for turn in one.given] + [
        (turn, "waiting", turn.asked_us) for turn in one.waiting
    ]


def _look(where: Where) -> tuple[list[LimitStatus], int]:
    app = where.app_or_none("limits")

    async def look() -> tuple[list[LimitStatus], int]:
        async with connected(app, where.store) as client:
            return await client.limits.list(), client.store.now_us()

    return asyncio.run(look())
