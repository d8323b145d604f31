"""`pavane handlers`: what the handlers of services do, pausing and forgetting them."""

from __future__ import annotations

import click

from pavane.cli.lazy import LazyGroup


@click.command(
    cls=LazyGroup,
    epilog="""\b
Examples:
  pavane handlers list --app shop.py
  pavane handlers show mail.thank2 --app shop.py
  pavane handlers pause mail.thank --store shop.db --reason "provider is down"
  pavane handlers resume mail.thank --store shop.db
  pavane handlers forget mail.thank_old --app shop.py

\b
Every command takes --app and --store (or PAVANE_APP and PAVANE_STORE). Comparing a shadow or a
share needs the app's code; for all else --store alone is enough.
""",
    lazily={
        "list": ("pavane.cli.handlers.look:list_handlers", "List handlers, and how far they are."),
        "show": ("pavane.cli.handlers.look:show", "Show one; compare a shadow or share."),
        "pause": ("pavane.cli.handlers.steer:pause", "Let handlers begin nothing more."),
        "resume": ("pavane.cli.handlers.steer:resume", "Let handlers go on."),
        "forget": ("pavane.cli.handlers.forget:forget", "Delete one that no code has any more."),
    },
)
def handlers() -> None:
    """List, compare, pause, resume and forget handlers."""
