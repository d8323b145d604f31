"""`pavane nodes`: the processes that work on a store, and letting one drain."""

from __future__ import annotations

import click

from pavane.cli.lazy import LazyGroup


@click.command(
    cls=LazyGroup,
    epilog="""\b
Examples:
  pavane nodes list --app shop.py
  pavane nodes list --store shop.db -o jsonl | jq -r 'select(.state == "gone") | .name'
  pavane nodes drain payments-4711 --app shop.py

\b
Every command takes --app and --store (or PAVANE_APP and PAVANE_STORE); --store alone is enough.
A node is a process that works for services: `pavane run`, `pavane dev`, or an open app.
""",
    lazily={
        "list": ("pavane.cli.nodes.look:list_nodes", "List them, and what each owns."),
        "drain": ("pavane.cli.nodes.drain:drain", "Let one hand everything over and end."),
    },
)
def nodes() -> None:
    """List nodes, and let one drain."""
