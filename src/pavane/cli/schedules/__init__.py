"""`pavane schedules`: what starts at times of a calendar, and steering it."""

from __future__ import annotations

import click

from pavane.cli.lazy import LazyGroup


@click.command(
    cls=LazyGroup,
    epilog="""\b
Examples:
  pavane schedules list --app shop.py
  pavane schedules show sales-report --app shop.py
  pavane schedules pause sales-report --store shop.db --reason "numbers are wrong"
  pavane schedules trigger sales-report --store shop.db
  pavane schedules backfill sales-report --since 2026-03-01 --until 2026-03-08 --store shop.db
  pavane schedules delete old-report --app shop.py

\b
Every command takes --app and --store (or PAVANE_APP and PAVANE_STORE); --store alone is enough.
A schedule is declared in code, by app.schedule(…), and begins with a worker for its service.
""",
    lazily={
        "list": ("pavane.cli.schedules.look:list_schedules", "List them, and when each is next."),
        "show": ("pavane.cli.schedules.look:show", "Show one, its next times and newest runs."),
        "pause": ("pavane.cli.schedules.steer:pause", "Let them start nothing at their times."),
        "resume": ("pavane.cli.schedules.steer:resume", "Let them go on."),
        "trigger": ("pavane.cli.schedules.steer:trigger", "Start one run now."),
        "backfill": ("pavane.cli.schedules.steer:backfill", "Start runs for times of the past."),
        "delete": ("pavane.cli.schedules.steer:delete", "End one that no code has any more."),
    },
)
def schedules() -> None:
    """List, pause, trigger, backfill and delete schedules."""
