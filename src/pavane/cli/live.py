"""How something is followed: drawn over itself on a terminal, elsewhere a line per happening."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType

import click
import msgspec

from pavane.cli.output import Format, print_one
from pavane.cli.text import duration, printable
from pavane.insight.timeline import Moment

FRAME_S = 0.2
_TO_START = "\x1b[{}F\x1b[J"
_HIDE, _SHOW = "\x1b[?25l", "\x1b[?25h"


class Canvas:
    """Draws lines over those that it drew before; the cursor is hidden until the block ends."""

    def __init__(self) -> None:
        self._height = 0

    def __enter__(self) -> Canvas:
        click.echo(_HIDE, nl=False, color=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        click.echo(_SHOW, nl=False, color=True)

    def draw(self, lines: Sequence[str]) -> None:
        if self._height:
            click.echo(_TO_START.format(self._height), nl=False, color=True)
        click.echo("\n".join(lines))
        self._height = len(lines)

    def keep(self) -> None:
        """Leave what is drawn as it is; what comes next is drawn below it."""
        self._height = 0
        click.echo("")


def print_moment(
    moment: Moment, output: Format, *, of: str, from_us: int, colours: Mapping[str, str]
) -> None:
    """Print what happened in the run or conversation `of`, which began at `from_us`."""
    if output != "table":
        print_one({"id": of} | msgspec.structs.asdict(moment), "jsonl")
        return
    after = f"+{duration(moment.at_us - from_us)}".rjust(9)
    what = click.style(moment.what.ljust(9), fg=colours.get(moment.what))
    click.echo(f"{after}  {what}  {printable(moment.text)}".rstrip())
