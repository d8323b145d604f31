"""How results are printed: as a table for people, as JSON or JSON lines for programs."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import click
import msgspec

from pavane.cli.text import columns, fit, printable

LAST_MIN = 12
SQUEEZED_MIN = 6
"""Columns of a table that even a narrow terminal shows."""

Format = Literal["table", "json", "jsonl"]


def output_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add -o/--output; the command gets it as `output`."""
    return click.option(
        "-o", "--output", type=click.Choice(["table", "json", "jsonl"]), default="table",
        show_default=True, help="table for people; json or jsonl (one value a line) for programs.",
    )(command)  # fmt: skip


def print_json(values: Sequence[Any], output: Format) -> None:
    """Print a list: as one JSON array, or one value a line."""
    if output == "jsonl":
        for value in values:
            click.echo(msgspec.json.encode(value).decode())
    else:
        click.echo(msgspec.json.format(msgspec.json.encode(list(values)), indent=2).decode())


def print_one(value: Any, output: Format) -> None:
    """Print a single value as JSON, on one line for jsonl."""
    raw = msgspec.json.encode(value)
    click.echo((raw if output == "jsonl" else msgspec.json.format(raw, indent=2)).decode())


def print_table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    colours: Sequence[str | None] = (),
    coloured: int = -1,
    squeezed: Sequence[int] = (),
) -> None:
    """Print rows below `heads`; `colours` has one for each row's cell number `coloured`.

    On a terminal the last column is cut so that a row is one line, and, where that is not enough,
    those that may be `squeezed`; elsewhere nothing is cut.
    """
    cells = [[printable(cell).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(columns, column)) for column in zip(heads, *cells, strict=True)]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    ellipsis = "…" if is_unicode() else "..."
    if room is not None:
        _squeeze(widths, squeezed, room)
        widths[-1] = max(8, min(widths[-1], room - sum(widths[:-1]) - 2 * (len(widths) - 1)))
    head = "  ".join(fit(h, w) for h, w in zip(heads, widths, strict=True)).rstrip()
    click.secho(head, dim=True)
    for at, row in enumerate(cells):
        fitted = [fit(cell, w, ellipsis=ellipsis) for cell, w in zip(row, widths, strict=True)]
        fitted[-1] = fitted[-1].rstrip()
        if colours and coloured >= 0:
            fitted[coloured] = click.style(fitted[coloured], fg=colours[at])
        click.echo("  ".join(fitted).rstrip())


def _squeeze(widths: list[int], which: Sequence[int], room: int) -> None:
    """Take width from the widest of these columns until the last one has some."""
    wanted = sum(widths[:-1]) + min(widths[-1], LAST_MIN) + 2 * (len(widths) - 1)
    while wanted > room and which:
        widest = max(which, key=lambda at: widths[at])
        if widths[widest] <= SQUEEZED_MIN:
            return
        widths[widest] -= 1
        wanted -= 1


def say(text: str) -> None:
    """Tell of progress, on stderr."""
    click.echo(text, err=True)


def is_unicode() -> bool:
    """Tell whether stdout can show more than ASCII."""
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower().replace("-", "")
    return encoding.startswith("utf") and os.environ.get("TERM") != "linux"


def terminal_width() -> int:
    """Return the columns to draw in; $COLUMNS decides where there is no terminal."""
    return shutil.get_terminal_size((100, 24)).columns
