"""`pavane handlers pause` and `resume`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import click

from pavane.app import Client
from pavane.cli.connection import Where, connected, where_options
from pavane.cli.exits import exit_code, show_error
from pavane.cli.names import complete_handler
from pavane.cli.output import say
from pavane.errors import PavaneError
from pavane.steering.handlers import BY_HAND

Ask = Callable[[Client, str], Awaitable[str]]


def _ask_each(where: Where, names: tuple[str, ...], said: str, ask: Ask) -> None:
    """Ask for each handler; go on after an error, and end with the code of the first one."""
    app = where.app_or_none("handlers")

    async def work() -> int:
        code = 0
        async with connected(app, where.store) as client:
            for name in names:
                try:
                    say(f"{said} {await ask(client, name)}")
                except PavaneError as error:
                    show_error(error)
                    code = code or exit_code(error)
        return code

    code = asyncio.run(work())
    if code:
        click.get_current_context().exit(code)


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
    _ask_each(
        where, names, "paused", lambda client, name: client.handlers.pause(name, reason=reason)
    )


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
    _ask_each(where, names, "resumed", lambda client, name: client.handlers.resume(name))
