"""Where a run may be forked: at a step before which nothing is that was undone later.

A fork shares the journal up to a step, and so builds on what is in it. What a saga undid after that
is gone, and would be undone again. Which compensation belongs to which part of the journal is found
by replaying it; without the code of the workflow, each is taken to undo the very first step.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress

from pavane.core.baton import Header
from pavane.core.execution import Execution
from pavane.core.journal import DELIVERIES, Entry, expiry_of
from pavane.engine.registry import Registry
from pavane.errors import Mismatch, UnknownName

NEVER = sys.maxsize


class Forks:
    """The delivered entries of one run, and where it may be forked."""

    def __init__(
        self,
        registry: Registry,
        header: Header,
        delivered: Sequence[Entry],
        payload_max_bytes: int,
    ) -> None:
        self._delivered = delivered
        self._marks = [mark for entry in delivered for mark in entry.asked]
        self._index = {
            entry.op: index for index, entry in enumerate(delivered) if entry.what in DELIVERIES
        }
        self._work = [
            (index, op)
            for op, index in self._index.items()
            if self._marks[op].startswith(("step ", "child "))
        ]
        self._barred = self._undone(registry, header, payload_max_bytes)
        """From after which entry on, and up to which, a fork would share what is gone."""
        expired = expiry_of(delivered)
        if expired is not None:
            self._barred.append((expired, NEVER))

    def _undone(
        self, registry: Registry, header: Header, payload_max_bytes: int
    ) -> list[tuple[int, int]]:
        first = min((index for index, _ in self._work), default=NEVER)
        compensations = [op for op, mark in enumerate(self._marks) if mark.startswith("undo ")]
        if not compensations:
            return []
        with suppress(UnknownName, Mismatch):
            definition = registry.workflow(header.workflow, header.version)
            execution = Execution(header, definition, self._delivered, payload_max_bytes)
            execution.replay(self._delivered)
            undoing = execution.undoing
            execution.discard()
            return [
                (self._index.get(it.of, NEVER) if it.of >= 0 else max(it.since, first), it.until)
                for it in undoing
            ]
        return [(first, self._index.get(op, NEVER)) for op in compensations]

    def entry_of(self, at: str | int) -> int | None:
        """Return the index of the entry that delivers the operation `at`, a name or a number."""
        for op, index in self._index.items():
            name = self._marks[op].partition(" ")[2]
            if op == at or at in (name, name.rpartition(".")[2]):
                return index
        return None

    def is_possible(self, cut: int) -> bool:
        """Tell whether nothing before `cut` is gone, for a run that shares it to build on."""
        return not any(since < cut <= until for since, until in self._barred)

    def steps(self) -> list[str]:
        """Return the steps at which the run may be forked, as `entry_of` takes them."""
        return [
            name if self.entry_of(name := self._marks[op].partition(" ")[2]) == index else str(op)
            for index, op in self._work
            if self.is_possible(index)
        ]

    def advice(self, run: str) -> str:
        """Say how the run can be done again."""
        steps = self.steps()
        if not steps:
            return "No step of it was before all that was undone: start it anew."
        return (
            f"The last step where it can be forked is {steps[-1]}: `pavane runs fork {run} --at "
            f"{steps[-1]}`."
        )
