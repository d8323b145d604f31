"""`pavane limits`: what is bounded in the whole cluster, and who waits for it."""

from __future__ import annotations

import click

from pavane.cli.lazy import LazyGroup


@click.command(
    cls=LazyGroup,
    epilog="""\b
Examples:
  pavane limits list --app shop.py
  pavane limits list --app shop.py -o jsonl | jq -r 'select(.waiting != []) | .limit'
  pavane limits show charge --app shop.py

\b
Every command takes --app and --store (or PAVANE_APP and PAVANE_STORE); with --store alone it is not
known how much each limit allows.
""",
    lazily={
        "list": ("pavane.cli.limits.look:list_limits", "List those in use, and how many wait."),
        "show": ("pavane.cli.limits.look:show", "Show who has a permit, and who waits for one."),
    },
)
def limits() -> None:
    """Show what is limited in the whole cluster, and who waits."""
