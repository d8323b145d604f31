"""`pavane nodes drain`."""

from __future__ import annotations

import asyncio
import time

import click

from pavane.cli.connection import Where, connected, where_options
from pavane.cli.names import complete_node
from pavane.cli.output import say
from pavane.cli.text import counted


@click.command(
    epilog="""\b
Examples:
  pavane nodes drain payments-4711 --app shop.py
  pavane nodes drain 12 --store postgresql://localhost/shop --no-wait

\b
The node takes nothing new, lets its running steps end (for its grace period, ten seconds if unset),
hands its partitions over and ends with exit code 0, as on SIGTERM; an app that opened it in its own
process goes on as a client. It may be asked from any machine.
"""
)
@click.argument("node", shell_complete=complete_node)
@where_options
@click.option("--force", is_flag=True, help="Even if nobody else works for its services.")
@click.option("--no-wait", is_flag=True, help="Only ask.")
def drain(where: Where, node: str, force: bool, no_wait: bool) -> None:
    """Let NODE, by name or number, hand everything over and end."""
    app = where.app_or_none("nodes")

    async def ask() -> None:
        async with connected(app, where.store) as client:
            asked = await client.nodes.drain(node, force=force)
            owned = counted(sum(asked.partitions.values()), "partition")
            say(f"asked {asked.name} to drain; it owns {owned}")
            if no_wait:
                return
            began = time.monotonic()
            await client.nodes.until_left(asked.no)
            say(f"{asked.name} left after {time.monotonic() - began:.1f} s")

    asyncio.run(ask())
