"""`pavane handlers pause` and `resume`."""

from __future__ import annotations

import click

from pavane.app import Client
from pavane.cli.bulk import ask_each
from pavane.cli.connection import Where, where_options
from pavane.cli.names import complete_handler
from pavane.engine.breaker import BY_HAND


@click.command(
    epilog="""\b
Examples:
  pavane handlers pause mail.thank --app shop.py --reason "provider is down"
  pavane handlers pause mail.thank mail.warn --store shop.db

\b
What is under way ends. Events wait in the log meanwhile, and other handlers go on.
"""
)
@click.argument("names", nargs=-1, required=True, shell_complete=complete_handler)
@where_options
@click.option("--reason", default=BY_HAND, metavar="TEXT", help="Shown by list and doctor.")
def pause(where: Where, names: tuple[str, ...], reason: str) -> None:
    """Let handlers begin nothing more, on all nodes, until they are resumed."""

    async def ask(client: Client, name: str) -> str:
        return f"paused {await client.handlers.pause(name, reason=reason)}"

    ask_each(where, "handlers", names, ask)


@click.command(
    epilog="""\b
Examples:
  pavane handlers resume mail.thank --app shop.py

\b
One that its breaker paused tries its next event at once.
"""
)
@click.argument("names", nargs=-1, required=True, shell_complete=complete_handler)
@where_options
def resume(where: Where, names: tuple[str, ...]) -> None:
    """Let handlers go on with what waits for them."""

    async def ask(client: Client, name: str) -> str:
        was_paused = await client.handlers.is_paused(name)
        known = await client.handlers.resume(name)
        return f"resumed {known}" if was_paused else f"{known} was not paused"

    ask_each(where, "handlers", names, ask)
