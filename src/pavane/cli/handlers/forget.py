"""`pavane handlers forget`."""

from __future__ import annotations

import asyncio

import click

from pavane.cli.bulk import confirmed
from pavane.cli.connection import Where, connected, where_options
from pavane.cli.names import complete_handler
from pavane.cli.output import say
from pavane.cli.text import counted


@click.command(
    epilog="""\b
Examples:
  pavane handlers forget mail.thank_old --app shop.py
  pavane handlers forget mail.thank_old --app shop.py --yes

\b
What waits for it is given up; the events stay in the log. As long as a handler is known, events
that it has not handled are kept for it, also when no code has it any more. First stop all workers
that run older code with it, and see to its dead letters.
"""
)
@click.argument("name", shell_complete=complete_handler)
@where_options
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def forget(where: Where, name: str, yes: bool) -> None:
    """Delete what is known of a handler that was deleted or renamed in the code."""
    app = where.app_or_none("handlers")

    async def work() -> None:
        async with connected(app, where.store) as client:
            found = await client.handlers.check_unused(name)
            waiting = found.backlog + found.parked
            known = f"{found.service}.{found.name}"
            confirmed(
                f"Forget {known}, and give up {counted(waiting, 'event')} that "
                f"{'waits' if waiting == 1 else 'wait'} for it?",
                yes=yes,
            )
            await client.handlers.forget(known)
            say(f"forgot {known}")

    asyncio.run(work())
