"""`pavane nodes list`."""

from __future__ import annotations

import asyncio

import click

from pavane.cli.connection import Where, connected, where_options
from pavane.cli.output import Format, output_option, print_json, print_table, say
from pavane.cli.text import duration, short_clock
from pavane.steering.nodes import NodeStatus

STATE_COLOURS = {"working": "green", "draining": "yellow", "gone": "red"}


@click.command(
    "list",
    epilog="""\b
Examples:
  pavane nodes list --app shop.py
  pavane nodes list --store postgresql://localhost/shop -o json

\b
PARTITIONS are the slices of each service that a node owns; nodes share them evenly. A node that is
gone is taken over when its lease is over, by those that work for the same services.
""",
)
@where_options
@output_option
def list_nodes(where: Where, output: Format) -> None:
    """List nodes: the processes that work, since when, and what each owns."""
    app = where.app_or_none("nodes")

    async def look() -> tuple[list[NodeStatus], int]:
        async with connected(app, where.store) as client:
            return await client.nodes.list(), client.store.now_us()

    found, now_us = asyncio.run(look())
    if output != "table":
        print_json(found, output)
        return
    if not found:
        say("no nodes")
        return
    heads = ("NODE", "NAME", "STATE", "PID", "SINCE", "LEASE", "PARTITIONS")
    rows = [
        [
            str(one.no), one.name, one.state, str(one.pid), short_clock(one.joined_us),
            _lease(one.lease_until_us - now_us),
            ", ".join(f"{service} {count}" for service, count in one.partitions.items()),
        ]
        for one in found
    ]  # fmt: skip
    colours = [STATE_COLOURS[one.state] for one in found]
    print_table(heads, rows, colours=colours, coloured=2, squeezed=(6,))


def _lease(left_us: int) -> str:
    return f"{duration(left_us)} left" if left_us > 0 else f"over since {duration(-left_us)}"
