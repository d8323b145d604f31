"""`pavane replay-check`: replays exported runs against the code as it is now, as a gate for CI."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from pavane.cli.exits import FAILED
from pavane.cli.names import complete_target
from pavane.cli.output import Format, output_option, print_one
from pavane.cli.target import find_app
from pavane.cli.timeline import coloured_diff
from pavane.testing.histories import replay, summary, told


@click.command(
    "replay-check",
    epilog="""\b
Examples:
  pavane runs export --store /var/lib/shop/shop.db --to histories/
  pavane replay-check shop:app histories/
  pavane replay-check shop:app <(cat histories/*.jsonl)
  pavane replay-check shop.py open.jsonl -o json | jq -r '.misfits[].run'

\b
HISTORIES are files as `pavane runs export` writes them, or folders with such files. A run fits if
after every entry of its journal the workflow's code asks for the same steps, timers, events and
the like as it did then: the same kinds, services and names, in the same order. One that does not
would be stuck when this code is deployed. Arguments, durations and what the workflow returns are
not compared: a step that is now asked for with other arguments fits. The exit code is 1 if any
run does not fit, and 2 if there is none to replay.
""",
)
@click.argument("target", envvar="PAVANE_APP", shell_complete=complete_target)
@click.argument("histories", nargs=-1, required=True, type=click.Path(path_type=Path))
@output_option
def replay_check(target: str, histories: tuple[Path, ...], output: Format) -> None:
    """Replay HISTORIES against the code of TARGET, and show which runs would be stuck."""
    app = find_app(target)
    if sys.stderr.isatty():
        with click.progressbar(length=1, label="replaying", file=sys.stderr, show_pos=True) as bar:

            def show(done: int, total: int) -> None:
                bar.length = total
                bar.update(done)

            report = replay(app, histories, show)
    else:
        report = replay(app, histories)
    if output != "table":
        print_one(report, output)
    elif report.misfits:
        for line in told(report):
            click.echo(coloured_diff(line))
    else:
        click.echo(summary(report))
    if report.misfits:
        click.get_current_context().exit(FAILED)
