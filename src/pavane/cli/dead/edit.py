"""`pavane dead edit`: change the payload of a dead letter, then have it handled again."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import click
import msgspec

from pavane.app import Client
from pavane.cli.connection import Where, connected, where_options
from pavane.cli.events.publish import field_value, fields_of, no_field
from pavane.cli.exits import show_error
from pavane.cli.names import complete_dead
from pavane.cli.output import say
from pavane.errors import BadArguments, PavaneError
from pavane.event import type_for
from pavane.steering.dead import DeadLetter


@click.command(
    epilog="""\b
Examples:
  pavane dead edit 7 --app shop.py                       opens $EDITOR
  pavane dead edit 7 --set cents=990 --app shop.py
  pavane dead edit 7 --data '{"order_id": "o-1", "cents": 990}' --app shop.py

\b
A VALUE is text for a field that is text; for any other field it is JSON. What is changed is checked
against the event's class, through its upcasts, before anything is written. The event in the log
stays as it was.
"""
)
@click.argument("no", type=int, shell_complete=complete_dead)
@where_options
@click.option("--set", "changes", multiple=True, metavar="FIELD=VALUE", help="May be repeated.")
@click.option("--data", metavar="JSON", help="The whole payload; - reads it from stdin.")
def edit(where: Where, no: int, changes: tuple[str, ...], data: str | None) -> None:
    """Change the payload of dead letter NO and have it handled again."""
    if changes and data is not None:
        raise click.UsageError("Give either --set or --data, not both.")
    app = where.app()

    async def work() -> bool:
        async with connected(app, where.store) as client:
            letter = await client.dead.get(no)
            if data is not None:
                await client.dead.edit(no, (sys.stdin.read() if data == "-" else data).encode())
            elif changes:
                await client.dead.edit(no, _changed(client, letter, changes))
            elif not await _edited(client, letter):
                return False
            service = letter.handler.partition(".")[0]
            if service not in await client.handlers.hosted():
                say(f"no worker hosts {service} now; it is handled when one does")
            return True

    done = asyncio.run(work())
    click.echo(f"asked to retry dead letter {no}, edited" if done else "nothing changed")


def _changed(client: Client, letter: DeadLetter, changes: tuple[str, ...]) -> bytes:
    try:
        values = msgspec.json.decode(bytes(letter.data), type=dict[str, Any])
    except msgspec.ValidationError:
        raise BadArguments(
            f"The payload of dead letter {letter.no} is no object; use --data."
        ) from None
    kind = type_for(letter.type, client.registry.events)
    hints = fields_of(kind)
    for change in changes:
        name, mark, text = change.partition("=")
        if not mark or not name:
            raise click.UsageError(f"{change!r} must be FIELD=VALUE.")
        if name not in hints and name not in values:  # it may be of an older version
            raise no_field(kind, name)
        values[name] = field_value(hints.get(name), text)
    return msgspec.json.encode(values)


async def _edited(client: Client, letter: DeadLetter) -> bool:
    """Open the editor until what is written fits; False if nothing was changed."""
    before = msgspec.json.format(bytes(letter.data), indent=2).decode() + "\n"
    text = before
    while True:
        changed = click.edit(text, extension=".json")
        if changed is None or changed.strip() == before.strip():
            return False
        try:
            await client.dead.edit(letter.no, changed.encode())
        except PavaneError as error:
            show_error(error)
            if not sys.stdin.isatty():
                raise
            click.confirm("Edit again?", default=True, abort=True, err=True)
            text = changed
        else:
            return True
