"""`pavane events publish`: an event from the command line."""

from __future__ import annotations

import asyncio
import sys
import typing
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import click
import msgspec

from pavane.cli.connection import Where, connected, where_options
from pavane.cli.names import complete_event
from pavane.cli.output import Format, output_option, print_one, say
from pavane.core.codec import decoder
from pavane.errors import BadArguments, NotDecodable, UnknownName
from pavane.event import type_for


@click.command(
    epilog="""\b
Examples:
  pavane events publish OrderPlaced order_id=o-1 cents=990 --app shop.py
  pavane events publish OrderPlaced --data '{"order_id": "o-1", "cents": 990}' --app shop.py
  pavane events publish OrderPlaced --data - --id order-o-1 --app shop.py < order.json

\b
A VALUE is text for a field that is text; for any other field it is JSON (990, true, [1, 2]). The
event's id is printed on stdout. With --id, publishing again has no further effect.

\b
TYPE is of a class that a service of the app names, or that the app's module defines or imports.
"""
)
@click.argument("type", shell_complete=complete_event)
@click.argument("fields", nargs=-1, metavar="[FIELD=VALUE]…")
@where_options
@click.option(
    "--data", metavar="JSON", help="All fields as one JSON object; - reads it from stdin."
)
@click.option("--id", "id", metavar="ID", help="The event's id. Default: a new one.")
@output_option
def publish(
    where: Where, type: str, fields: tuple[str, ...], data: str | None, id: str | None,
    output: Format,
) -> None:  # fmt: skip
    """Publish an event of TYPE; durable when this returns."""
    app = where.app()
    kind = type_for(type, app.registry.events)
    if data is not None and fields:
        raise click.UsageError("Give the fields either as FIELD=VALUE or by --data, not both.")
    text = sys.stdin.read() if data == "-" else data
    event = event_from(kind, (text or "{}").encode()) if not fields else _from_fields(kind, fields)

    async def work() -> tuple[str, bool, set[str]]:
        async with connected(app, where.store, create=True) as client:
            new = id is None or await client.store.event(id) is None
            given = await client.publish(event, source=app.name, id=id)
            takers = {h.service.name for h in app.registry.handlers() if type in h.events}
            return given, new, takers - await client.handlers.hosted()

    given, new, idle = asyncio.run(work())
    if not new:
        say(f"event {given} is in the log already; nothing was published")
    elif idle:
        say(f"no worker hosts {', '.join(sorted(idle))} now; it is handled when one does")
    if output == "table":
        click.echo(given)
    else:
        print_one({"id": given, "published": new}, output)


def event_from(kind: type[Any], raw: bytes) -> Any:
    """Return an event from its JSON, or raise BadArguments."""
    try:
        return decoder(kind)(raw)
    except NotDecodable as error:
        raise BadArguments(
            f"This is no {kind.event_type}: {error.__cause__ or error}. Its fields: "
            f"{', '.join(fields_of(kind)) or 'none'}. Given: {raw.decode(errors='replace')}"
        ) from None


def _from_fields(kind: type[Any], fields: Iterable[str]) -> Any:
    values: dict[str, Any] = {}
    hints = fields_of(kind)
    for field in fields:
        name, mark, text = field.partition("=")
        if not mark or not name:
            raise click.UsageError(f"{field!r} must be FIELD=VALUE.")
        if name not in hints:
            raise no_field(kind, name)
        values[name] = field_value(hints[name], text)
    return event_from(kind, msgspec.json.encode(values))


def no_field(kind: type[Any], name: str) -> UnknownName:
    """Return the error that a field does not exist."""
    fields = fields_of(kind)
    close = get_close_matches(name, fields, 1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UnknownName(
        f"{kind.event_type} has no field {name!r}.{hint} Its fields: {', '.join(fields)}."
    )


def field_value(hint: Any, text: str) -> Any:
    """Return what the text of a field means: itself for text, else JSON, if it is any."""
    if hint is str:
        return text
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError):
        return text


def fields_of(kind: type[Any]) -> dict[str, Any]:
    """Return the fields of an event class with their types."""
    names = (
        getattr(kind, "model_fields", None)
        or getattr(kind, "__dataclass_fields__", None)
        or getattr(kind, "__struct_fields__", ())
    )
    hints = typing.get_type_hints(kind)
    return {name: hints.get(name, Any) for name in names}
