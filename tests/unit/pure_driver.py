"""Drives one run without an engine: the core alone, fed by hand, in one process, without a clock.

Every delivery is checked by a shadow: a second execution, rebuilt from the journal written so far,
must wait for exactly the same and have asked for exactly the same, or the driver fails the test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import Raw

from pavane.core.baton import Header, Outcome
from pavane.core.codec import decode_error, decoder, encode, encode_error
from pavane.core.execution import Execution
from pavane.core.journal import Entry, decode_chunk, encode_entry, join_entries
from pavane.core.operations import Mode, Operation
from pavane.workflow import Workflow

BEGINNING_US = 1_700_000_000_000_000
_plain = decoder(Any)
_driven: list[Execution] = []


class PureRun:
    """One run of `workflow`, already started; deliver results by `done`, `fail`, `fire`, `cancel`.

    `wanted` lists the fingerprints of what it waits for. Time stands still except by `fire`, which
    moves it to the timer's deadline, and `at_us`.
    """

    def __init__(
        self,
        workflow: Workflow[..., Any],
        *args: Any,
        run: str = "run-1",
        mode: Mode = "orchestration",
        timeout_s: float = 0,
        shadow: bool = True,
    ) -> None:
        self.workflow = workflow
        self.header = Header(
            run, workflow.name, workflow.version, workflow.service.name, mode, BEGINNING_US, run,
            round(timeout_s * 1e6),
        )  # fmt: skip
        self.execution = Execution(self.header, workflow)
        self.journal: list[Entry] = []
        self.now_us = BEGINNING_US
        self.issued: list[str] = []
        self.given_up: list[str] = []
        self._shadow = shadow
        _driven.append(self.execution)
        self.deliver(Entry("start", self.now_us, value=Raw(workflow.params.encode(args, {}))))

    # -- delivering ----------------------------------------------------------------------------

    def deliver(self, entry: Entry) -> None:
        self.execution.feed(entry)
        self.journal.append(entry)
        self.issued += entry.issued
        self.given_up = [op.fingerprint for op in self.execution.given_up]
        if self._shadow:
            self.assert_replays()

    def done(self, name: str | int, value: Any = None) -> None:
        self._deliver("done", name, encode(value))

    def fail(self, name: str | int, error: BaseException) -> None:
        self._deliver("failed", name, encode_error(error))

    def receive(self, name: str, event: Any) -> None:
        self._deliver("received", name, encode(event))

    def fire(self) -> None:
        """Let the earliest timer fire, at its time."""
        timers = [op for op in self.execution.pending.values() if op.kind == "timer"]
        first = min(timers, key=lambda op: (op.deadline_us, op.ordinal))
        self.now_us = max(self.now_us, first.deadline_us)
        self.deliver(Entry("fired", self.now_us, first.ordinal))

    def cancel(self) -> None:
        self.deliver(Entry("cancel", self.now_us))

    def _deliver(self, what: Any, name: str | int, value: bytes) -> None:
        op = self.find(name)
        self.deliver(Entry(what, self.now_us, op.ordinal, Raw(value), op.service, 1, self.now_us))

    def find(self, name: str | int) -> Operation:
        """Return the first pending operation of this name (or this ordinal)."""
        for op in self.execution.pending.values():
            if name in (op.name, op.ordinal):
                return op
        raise AssertionError(f"{name!r} is not pending: {self.wanted}")

    # -- looking -------------------------------------------------------------------------------

    @property
    def wanted(self) -> list[str]:
        return [op.fingerprint for op in self.execution.pending.values()]

    @property
    def outcome(self) -> Outcome | None:
        return self.execution.outcome

    @property
    def status(self) -> str:
        return self.outcome.status if self.outcome else "open"

    @property
    def result(self) -> Any:
        assert self.outcome is not None, f"it has not ended; it waits for {self.wanted}"
        assert self.outcome.status == "completed", self.error
        return _plain(bytes(self.outcome.value))

    @property
    def error(self) -> Exception:
        assert self.outcome is not None, f"it has not ended; it waits for {self.wanted}"
        assert self.outcome.status == "failed", self.outcome
        return decode_error(bytes(self.outcome.value))

    # -- replaying -----------------------------------------------------------------------------

    def written(self) -> bytes:
        """Return the journal as a store would keep it."""
        return join_entries(map(encode_entry, self.journal))

    def replayed(
        self, workflow: Workflow[..., Any] | None = None, upto: int | None = None
    ) -> Execution:
        """Rebuild the execution from the journal as it was written; see `replay`."""
        return replay(self.header, workflow or self.workflow, decode_chunk(self.written())[:upto])

    def assert_replays(self) -> None:
        """Invariant 3: whoever has the journal can continue the run, at the same place."""
        shadow = self.replayed()
        assert_same(shadow, self.execution)
        shadow.discard()


def discard_driven() -> None:
    """Put away what tests left open."""
    while _driven:
        _driven.pop().discard()


def replay(header: Header, workflow: Workflow[..., Any], entries: Sequence[Entry]) -> Execution:
    """Rebuild an execution; raises Mismatch if the workflow's code does not fit the entries."""
    execution = Execution(header, workflow, entries)
    _driven.append(execution)
    execution.replay(entries)
    return execution


def assert_same(one: Execution, other: Execution) -> None:
    """Two executions wait for the same (ordinal, name, arguments, deadline), or ended alike."""
    assert described(one) == described(other)
    assert _plainly(one.outcome) == _plainly(other.outcome)


def described(execution: Execution) -> list[tuple[Any, ...]]:
    return [
        (op.ordinal, op.fingerprint, bytes(op.args), op.deadline_us, op.mode)
        for op in execution.pending.values()
    ]


def _plainly(outcome: Outcome | None) -> Any:
    """An outcome without the traceback's text, which tells how it was driven."""
    if outcome is None:
        return None
    value = _plain(bytes(outcome.value))
    if outcome.status == "failed":
        value = _without_traces(value)
    return outcome.status, value


def _without_traces(record: Any) -> Any:
    if isinstance(record, dict):
        return {key: _without_traces(part) for key, part in record.items() if key != "trace"}
    if isinstance(record, list):
        return [_without_traces(part) for part in record]
    return record
