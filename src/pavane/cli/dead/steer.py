"""`pavane dead retry` and `drop`: on single ones, on a filter, or on all."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import click
import msgspec

from pavane.app import Client
from pavane.cli.bulk import confirmed, with_bar
from pavane.cli.connection import Where, connected, where_options
from pavane.cli.dead.look import filter_options
from pavane.cli.names import complete_dead
from pavane.cli.output import Format, output_option, print_one, say
from pavane.cli.text import counted
from pavane.engine.words import handler_with_words
from pavane.steering.dead import Ask, DeadQuery


class Wanted(msgspec.Struct, frozen=True):
    """Which dead letters the command line names, and how careful it wants to be."""

    which: DeadQuery
    all: bool
    dry_run: bool
    yes: bool


def wanted_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add NUMBERS, the filters, --all, --dry-run and --yes; the command gets them as `wanted`."""

    @click.argument("numbers", nargs=-1, type=int, shell_complete=complete_dead)
    @filter_options
    @click.option("--all", is_flag=True, help="All that there are, or that fit the filters.")
    @click.option("--dry-run", is_flag=True, help="Say how many; do nothing.")
    @click.option("-y", "--yes", is_flag=True, help="Do not ask.")
    @functools.wraps(command)
    def wrapped(
        numbers: tuple[int, ...], which: DeadQuery, all: bool, dry_run: bool, yes: bool,
        **options: Any,
    ) -> Any:  # fmt: skip
        which = msgspec.structs.replace(which, numbers=numbers)
        return command(wanted=Wanted(which, all, dry_run, yes), **options)

    return wrapped


def _do(where: Where, what: Ask, wanted: Wanted, output: Format) -> None:
    which = wanted.which
    is_filtered = which != DeadQuery(numbers=which.numbers)
    if which.numbers and (is_filtered or wanted.all):
        raise click.UsageError("Give either numbers, or filters and --all, not both.")
    if not (which.numbers or is_filtered or wanted.all):
        raise click.UsageError(
            f"Which ones? Give numbers (pavane dead {what} 7 8), or a filter such as --cause TEXT, "
            f"or --all."
        )
    app = where.app_or_none("dead letters")

    async def work() -> None:
        async with connected(app, where.store) as client:
            counts = await client.dead.count(which)
            total = sum(counts.values())
            if wanted.dry_run or not total:
                _print_counts(counts, what, output)
                return
            if not which.numbers:
                question = f"{what.capitalize()} {counted(total, 'dead letter')}"
                of = ", ".join(handler_with_words(name) for name in counts)
                confirmed(f"{question} of {of}?", yes=wanted.yes)
            await _ask(client, what, which, counts, output)

    asyncio.run(work())


async def _ask(
    client: Client, what: Ask, which: DeadQuery, counts: dict[str, int], output: Format
) -> None:
    asked = client.dead.retry(which) if what == "retry" else client.dead.drop(which)
    go_on = "the same command goes on with the rest"
    done = await with_bar(asked, sum(counts.values()), what, go_on)
    if output == "table":
        click.echo(f"asked to {what} {counted(done, 'dead letter')}")
    else:
        print_one({"asked": done, "what": what, "handlers": counts}, output)
    idle = {name.partition(".")[0] for name in counts} - await client.handlers.hosted()
    if idle:
        say(f"no worker hosts {', '.join(sorted(idle))} now; it is done when one does")


def _print_counts(counts: dict[str, int], what: Ask, output: Format) -> None:
    if output != "table":
        print_one({"asked": 0, "what": what, "handlers": counts}, output)
    elif not counts:
        say(f"nothing to {what}: no dead letters, or all were asked for already")
    else:
        for name, count in counts.items():
            click.echo(f"{count:>8,}  {name}")
        click.echo(f"{counted(sum(counts.values()), 'dead letter')} would be asked to {what}")


@click.command(
    epilog="""\b
Examples:
  pavane dead retry 7 --app shop.py
  pavane dead retry --cause "ConnectionError" --dry-run --store shop.db
  pavane dead retry --handler mail.thank --yes --store shop.db

\b
Each is handled as if for the first time, before later events of its key. One that fails again is a
new dead letter. Interrupted with Ctrl-C, the same command goes on with the rest.
"""
)
@where_options
@wanted_options
@output_option
def retry(where: Where, wanted: Wanted, output: Format) -> None:
    """Have dead letters handled again: NUMBERS, those that fit a filter, or all."""
    _do(where, "retry", wanted, output)


@click.command(
    epilog="""\b
Examples:
  pavane dead drop 7 8 --store shop.db
  pavane dead drop --handler mail.thank --type OrderPlaced --dry-run --store shop.db
  pavane dead drop --all --yes --store shop.db

\b
The events stay in the log, marked as dropped; a key that waited for one goes on.
"""
)
@where_options
@wanted_options
@output_option
def drop(where: Where, wanted: Wanted, output: Format) -> None:
    """Forget dead letters: NUMBERS, those that fit a filter, or all."""
    _do(where, "drop", wanted, output)
