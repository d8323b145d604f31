"""`pavane dead`: events that handlers gave up, and the way back."""

from __future__ import annotations

import click

from pavane.cli.lazy import LazyGroup


@click.command(
    cls=LazyGroup,
    epilog="""\b
Examples:
  pavane dead list --app shop.py
  pavane dead show 7 --store shop.db
  pavane dead retry --cause "ConnectionError" --dry-run --store shop.db
  pavane dead edit 7 --set cents=990 --app shop.py
  pavane dead drop 7 8 --store shop.db

\b
Every command takes --app and --store (or PAVANE_APP and PAVANE_STORE). edit needs the app's code;
for all others --store alone is enough.
""",
    lazily={
        "list": ("pavane.cli.dead.look:list_dead", "List dead letters, grouped by cause."),
        "show": ("pavane.cli.dead.look:show", "Show one, with its event and error."),
        "retry": ("pavane.cli.dead.steer:retry", "Have their handlers handle them again."),
        "edit": ("pavane.cli.dead.edit:edit", "Change the payload of one, then retry it."),
        "drop": ("pavane.cli.dead.steer:drop", "Forget them."),
    },
)
def dead() -> None:
    """List, retry, edit and drop dead letters."""
