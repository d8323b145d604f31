"""The `pavane` command: works for services, and shows and steers runs, events and handlers.

What is asked for goes to stdout, everything else to stderr. Importing this loads click and nothing
else; each command is imported when it is used.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import click

from pavane import __version__
from pavane.cli.lazy import LazyGroup

EPILOG = """\b
Examples:
  pavane dev shop.py                         work for all services, reload on change
  pavane run shop:app --service payments     a worker for production
  pavane runs start fulfil '{"order_id": "o-1"}' --app shop.py --wait
  pavane runs list --app shop.py --status stuck
  pavane runs show o-1 --app shop.py
  pavane events publish OrderPlaced order_id=o-1 cents=990 --app shop.py
  pavane dead list --app shop.py

\b
Exit codes:
  0    it worked
  1    what was asked for failed: a run failed, a check failed, something ended already
  2    the command line, the app or an argument is wrong
  3    no run, workflow, service, event, handler or dead letter has this name
  4    the store cannot be used
  130  interrupted

\b
Environment:
  PAVANE_APP     the app, where --app or TARGET is not given
  PAVANE_STORE   the store, where neither --store nor the app names one
  PAVANE_STATE   the folder in which this machine notes how far databases had come
  NO_COLOR       no colours
"""


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


class _Root(LazyGroup):
    """Turns errors into one message and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        _set_up_streams(ctx)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)
        except OSError as error:
            if error.filename is not None or error.errno not in _NO_ROOM:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python tries again when it ends
            click.echo(f"error[output]: The output cannot be written: {error.strerror}.", err=True)
            ctx.exit(1)
        except Exception as error:
            from pavane.errors import PavaneError

            if not isinstance(error, PavaneError):
                raise
            from pavane.cli.exits import exit_code, show_error

            show_error(error)
            ctx.exit(exit_code(error))


def _set_up_streams(ctx: click.Context) -> None:
    if os.environ.get("NO_COLOR"):
        ctx.color = False
    elif os.environ.get("FORCE_COLOR"):
        ctx.color = True
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal cannot show must not end a command.
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None and stream.errors == "strict":
            reconfigure(errors="replace")


@click.command(
    cls=_Root,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    lazily={
        "run": ("pavane.cli.run:run", "Work for an app's services, in production."),
        "dev": ("pavane.cli.dev:dev", "Work for all services; reload when code changes."),
        "runs": ("pavane.cli.runs:runs", "Start, list, show, watch and steer runs."),
        "events": ("pavane.cli.events:events", "Publish, list, show, follow and replay events."),
        "handlers": ("pavane.cli.handlers:handlers", "List, compare, pause and resume handlers."),
        "dead": ("pavane.cli.dead:dead", "List, retry, edit and drop dead letters."),
        "schedules": ("pavane.cli.schedules:schedules", "List, pause and trigger schedules."),
        "conversations": (
            "pavane.cli.conversations:conversations",
            "See what an event or start led to, and whether in time.",
        ),
        "rehearse": ("pavane.cli.rehearse:rehearse", "Play an app in storms; show what breaks."),
        "replay-check": (
            "pavane.cli.replay_check:replay_check",
            "Replay exported runs against the code as it is now.",
        ),
        "limits": (
            "pavane.cli.limits:limits",
            "Show what is limited in the cluster, and who waits.",
        ),
        "nodes": ("pavane.cli.nodes:nodes", "List nodes, and let one drain."),
        "restored": (
            "pavane.cli.restored:restored",
            "See what a backup that was put back has forgotten.",
        ),
        "services": ("pavane.cli.services:services", "Show services, and which nodes host them."),
        "doctor": ("pavane.cli.doctor:doctor", "Check this machine, the store and its runs."),
        "completion": ("pavane.cli.completion:completion", "Print a shell's completion script."),
    },
)
@click.version_option(__version__, message="pavane %(version)s")
def main() -> None:
    """Durable workflows, run orchestrated or choreographed."""
