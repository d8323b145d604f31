"""`pavane events schema`: what the data of an event type looks like, for other languages."""

from __future__ import annotations

import click

from pavane.cli.connection import Where, where_options
from pavane.cli.names import complete_event
from pavane.cli.output import print_one
from pavane.engine.publishing import SCHEMA, json_schema
from pavane.errors import UnknownName
from pavane.event import type_for


@click.command(
    epilog="""\b
Examples:
  pavane events schema OrderPlaced --app shop.py > order-placed.schema.json
  pavane events schema pavane:event:OrderPlaced:2 --app shop.py

\b
TYPE is the type of an event, or its `dataschema`, which names the version as well.
"""
)
@click.argument("type", shell_complete=complete_event)
@where_options
def schema(where: Where, type: str) -> None:
    """Print the JSON Schema of an event TYPE, from its class."""
    name, _, version = type.removeprefix(SCHEMA).partition(":")
    kind = type_for(name, where.app().registry.events)
    if version not in ("", str(kind.event_version)):
        raise UnknownName(
            f"{name} is of version {kind.event_version} in this code, and {type!r} asks for "
            f"another: ask the code that has it."
        )
    print_one(json_schema(kind), "json")
