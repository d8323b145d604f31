"""What commands share that ask for much at once: a question before, a bar or a line for each."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterable, Awaitable, Callable
from contextlib import nullcontext

import click

from pavane.app import Client
from pavane.cli.connection import Where, connected
from pavane.cli.exits import exit_code, show_error
from pavane.cli.output import say
from pavane.errors import PavaneError


def confirmed(question: str, *, yes: bool) -> None:
    """Ask before something that cannot be taken back; end the command unless the answer is yes."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} Nobody can be asked here: give --yes.")
    click.confirm(question, abort=True, err=True)


async def with_bar(counts: AsyncIterable[int], total: int, label: str, go_on: str = "") -> int:
    """Show a progress bar on stderr while `counts` comes in; return their sum.

    If that is interrupted, say how far it came, and by `go_on` how to go on.
    """
    done = 0
    bar = None
    if sys.stderr.isatty():
        bar = click.progressbar(length=total, label=label, file=sys.stderr, show_pos=True)
    try:
        with bar or nullcontext():
            async for count in counts:
                done += count
                if bar is not None:
                    bar.update(count)
    except BaseException:
        say(f"interrupted after {done:,} of {total:,}" + (f"; {go_on}" if go_on else ""))
        raise
    return done


def ask_each(
    where: Where, what: str, names: tuple[str, ...], ask: Callable[[Client, str], Awaitable[str]]
) -> None:
    """Ask for each of `names` and say what `ask` returns; end with the code of the first error.

    An error does not keep the others from being asked for. `what` they are is for the message that
    neither an app nor a store was named.
    """
    app = where.app_or_none(what)

    async def work() -> int:
        code = 0
        async with connected(app, where.store) as client:
            for name in names:
                try:
                    say(await ask(client, name))
                except PavaneError as error:
                    show_error(error)
                    code = code or exit_code(error)
        return code

    code = asyncio.run(work())
    if code:
        click.get_current_context().exit(code)
