"""`pavane runs`: everything about single runs."""

from __future__ import annotations

import click

from pavane.cli.lazy import LazyGroup


@click.command(
    cls=LazyGroup,
    epilog="""\b
Examples:
  pavane runs start fulfil '{"order_id": "o-1"}' --app shop.py --id o-1
  pavane runs list --app shop.py --status stuck --status failed
  pavane runs show o-1 --store shop.db

\b
Every command takes --app and --store (or PAVANE_APP and PAVANE_STORE). start and send need the
app's code; for all others --store alone is enough.
""",
    lazily={
        "start": ("pavane.cli.runs.start:start", "Start a run, and perhaps wait for its result."),
        "list": ("pavane.cli.runs.look:list_runs", "List runs, newest first."),
        "show": ("pavane.cli.runs.look:show", "Draw a run's timeline."),
        "watch": ("pavane.cli.runs.watch:watch", "Follow a run until it ends or is stuck."),
        "export": ("pavane.cli.runs.export:export", "Write runs with their journals to files."),
        "send": ("pavane.cli.runs.steer:send", "Send an event to a run."),
        "cancel": ("pavane.cli.runs.steer:cancel", "Stop runs, with clean-up and compensation."),
        "kill": ("pavane.cli.runs.steer:kill", "End runs at once, without clean-up."),
        "retry": ("pavane.cli.runs.steer:retry", "Go on with stuck or failed runs."),
        "fork": ("pavane.cli.runs.steer:fork", "Do a run again from one of its steps."),
    },
)
def runs() -> None:
    """Start, list, show, watch and steer runs."""
