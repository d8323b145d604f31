"""What commands share that ask for much at once: a question before, a bar meanwhile."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterable

import click


def confirmed(question: str, *, yes: bool) -> None:
    """Ask before something that cannot be taken back; end the command unless the answer is yes."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} Nobody can be asked here: give --yes.")
    click.confirm(question, abort=True, err=True)


async def with_bar(counts: AsyncIterable[int], total: int, label: str) -> int:
    """Show a progress bar on stderr while `counts` comes in; return their sum."""
    done = 0
    if not sys.stderr.isatty():
        async for count in counts:
            done += count
        return done
    with click.progressbar(length=total, label=label, file=sys.stderr, show_pos=True) as bar:
        async for count in counts:
            done += count
            bar.update(count)
    return done
