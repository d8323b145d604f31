"""`pavane events`: everything about published events."""

from __future__ import annotations

import click

from pavane.cli.lazy import LazyGroup


@click.command(
    cls=LazyGroup,
    epilog="""\b
Examples:
  pavane events publish OrderPlaced order_id=o-1 cents=990 --app shop.py
  pavane events list --store shop.db --type OrderPlaced --since 2h
  pavane events show 00064c2f1a --store shop.db
  pavane events replay --into mail.thank --since 2024-05-01 --dry-run --app shop.py
  pavane events schema OrderPlaced --app shop.py

\b
Every command takes --app and --store (or PAVANE_APP and PAVANE_STORE). publish and schema need the
app's code; for all others --store alone is enough.
""",
    lazily={
        "publish": ("pavane.cli.events.publish:publish", "Publish an event."),
        "list": ("pavane.cli.events.look:list_events", "List events, newest first."),
        "show": ("pavane.cli.events.look:show", "Show an event and what became of it."),
        "tail": ("pavane.cli.events.tail:tail", "Print events as they are published."),
        "replay": ("pavane.cli.events.replay:replay", "Have a handler handle old events again."),
        "schema": ("pavane.cli.events.schema:schema", "Print the JSON Schema of an event type."),
    },
)
def events() -> None:
    """Publish, list, show, follow and replay events."""
