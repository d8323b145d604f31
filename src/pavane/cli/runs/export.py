"""`pavane runs export`: writes runs with their journals to files, for `pavane replay-check`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import click

from pavane.app import Client
from pavane.cli.bulk import with_bar
from pavane.cli.connection import Where, connected, where_options
from pavane.cli.exits import FAILED, show_error
from pavane.cli.names import complete_run
from pavane.cli.output import say
from pavane.cli.runs.look import filter_options, run_filter
from pavane.cli.runs.record import read_list
from pavane.cli.text import counted
from pavane.errors import CorruptJournal
from pavane.stores.port import RunFilter
from pavane.testing.histories import file_name, read_history

ALL = 10_000_000


@click.command(
    epilog="""\b
Examples:
  pavane runs export --app shop.py --to histories/
  pavane runs export --store shop.db --status running --status waiting --to open.jsonl
  pavane runs export o-1 --app shop.py | jq .entries

\b
Each run is a line of JSON, with its arguments and all results: handle it as you handle these.
--to names a file or, with a / at its end, a folder, in which each workflow has a file.
""",
)
@click.argument("ids", nargs=-1, shell_complete=complete_run)
@where_options
@filter_options
@click.option("-n", "--limit", default=ALL, type=click.IntRange(1), help="The newest so many.")
@click.option(
    "--to", metavar="PATH", type=click.Path(), help="A file, or a folder/. Default: stdout."
)
def export(
    where: Where, ids: tuple[str, ...], workflow: str | None, statuses: tuple[str, ...],
    attributes: tuple[str, ...], prefix: str, limit: int, to: str | None,
) -> None:  # fmt: skip
    """Write runs with their journals as JSON Lines: those with IDS, or all that fit the filters."""
    app = where.app_or_none()
    which = run_filter(app, workflow, statuses, attributes, prefix, limit)
    if ids and which != RunFilter(limit=limit):
        raise click.UsageError("Give either ids or filters, not both.")

    async def work() -> tuple[int, int]:
        async with connected(app, where.store) as client:
            chosen = list(ids) or [status.id for status in await read_list(client, which)]
            with _Files(to) as files:
                counts = _write_each(client, chosen, files)
                return len(chosen), await with_bar(counts, len(chosen), "exporting")

    total, written = asyncio.run(work())
    if to is not None:
        say(f"{counted(written, 'run')} written to {to}")
    if written < total:
        click.get_current_context().exit(FAILED)


async def _write_each(client: Client, ids: list[str], files: _Files) -> AsyncIterator[int]:
    for id in ids:
        try:
            history = await read_history(client, id)
        except CorruptJournal as error:
            show_error(error)
        else:
            files.write(history)
            yield 1


class _Files:
    """Where histories go: stdout, a file, or a file for each workflow in a folder."""

    def __init__(self, to: str | None) -> None:
        self._folder = (
            Path(to) if to is not None and (to.endswith("/") or Path(to).is_dir()) else None
        )
        self._file = Path(to) if to is not None and self._folder is None else None
        self._open: dict[Path, BinaryIO] = {}
        self._stack = ExitStack()

    def __enter__(self) -> _Files:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def write(self, history: bytes) -> None:
        path = self._file
        if self._folder is not None:
            path = self._folder / file_name(history)
        if path is None:
            click.echo(history)
            return
        if path not in self._open:
            self._open[path] = self._stack.enter_context(path.open("wb"))
        self._open[path].write(history + b"\n")
