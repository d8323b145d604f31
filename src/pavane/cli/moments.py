"""Moments on the command line: a time, or how long ago."""

from __future__ import annotations

import contextlib
from datetime import datetime

import click

from pavane.errors import PavaneError
from pavane.policy import seconds


def moment(value: str | int) -> int:
    """Return µs since the epoch of "2h" (ago), "10:30" (today), "2024-05-01T10:30" and the like."""
    if isinstance(value, int):
        return value
    now = datetime.now().astimezone()
    with contextlib.suppress(ValueError):
        text = f"{now.date()}T{value}" if ":" in value and "-" not in value else value
        return round(datetime.fromisoformat(text).astimezone().timestamp() * 1e6)
    with contextlib.suppress(PavaneError, ValueError):
        return round((now.timestamp() - seconds(value)) * 1e6)
    raise click.BadParameter(
        f'{value!r} is no moment. Write "2h" (ago), "10:30" (today), "2024-05-01" or '
        f'"2024-05-01T10:30".'
    )
