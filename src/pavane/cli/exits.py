"""Exit codes, and which error leads to which: for scripts, so they stay as they are."""

from __future__ import annotations

import click

from pavane.cli.text import printable
from pavane.errors import (
    BadArguments,
    BadDeclaration,
    LeaseLost,
    NotDecodable,
    NotEncodable,
    PavaneError,
    StoreError,
    TooLarge,
    UnknownName,
    UnknownRun,
)

OK = 0
FAILED = 1
USAGE = 2
UNKNOWN = 3
STORE = 4
INTERRUPTED = 130

_USAGE = (BadArguments, BadDeclaration, NotDecodable, NotEncodable, TooLarge)


class BadTarget(PavaneError):
    """What was given as the app cannot be loaded as one."""

    code = "bad-target"


def exit_code(error: PavaneError) -> int:
    """Return the code that a command ends with because of `error`."""
    if isinstance(error, UnknownName | UnknownRun):
        return UNKNOWN
    if isinstance(error, StoreError | LeaseLost):
        return STORE
    return USAGE if isinstance(error, (*_USAGE, BadTarget)) else FAILED


def show_error(error: PavaneError) -> None:
    """Say what is wrong on stderr, in one clean message."""
    head = click.style(f"error[{error.code}]:", fg="red", bold=True)
    click.echo(f"{head} {printable(str(error))}", err=True)
