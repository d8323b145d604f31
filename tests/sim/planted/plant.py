"""What a planted bug is: a context manager that changes the engine or the database while open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from inspect import getdoc

Change = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Bug:
    """A mistake, and the scenario in whose storms it is looked for."""

    change: Change
    scenario: str
    says: str


BUGS: dict[str, Bug] = {}


def planted(scenario: str) -> Callable[[Callable[[], Iterator[None]]], Change]:
    """Enter a bug, written as a generator that undoes what it changed."""

    def enter(change: Callable[[], Iterator[None]]) -> Change:
        made = contextmanager(change)
        BUGS[change.__name__] = Bug(made, scenario, getdoc(change) or "")
        return made

    return enter
