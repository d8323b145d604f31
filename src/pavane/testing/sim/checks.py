"""What must hold in every simulation, whatever is simulated.

`Ledger` watches each write as it lands, `is_settled` tells what has not ended yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pavane.app import App
from pavane.core.baton import ENDED, decode_baton
from pavane.core.codec import decoder
from pavane.core.envelope import operation_id
from pavane.core.execution import rebuilt
from pavane.core.journal import decode_chunk, eras, resumed_us
from pavane.engine.held import decode_header
from pavane.engine.steps import Attempt
from pavane.errors import PavaneError
from pavane.service import current_step
from pavane.stores.memory import SLOTS
from pavane.stores.port import Commit, Fence, NodeRow
from pavane.testing.sim.database import Database
from pavane.testing.sim.outside import LATENCY_US, SLOW_US, Outside, Request
from pavane.testing.sim.process import SimProcess

ATTEMPT_MAX_US = 2 * (LATENCY_US[1] + SLOW_US)
"""An attempt asks the world outside within so much time."""


class Violation(Exception):
    """Something that must never happen did."""


class Ledger:
    """Watches what is written, and remembers what was wrong with it."""

    def __init__(self, database: Database) -> None:
        self.wrong: list[str] = []
        self._database = database
        self._data: Any = database.root._data  # pyright: ignore[reportPrivateUsage]
        self._ends: dict[str, tuple[str, bytes | None]] = {}
        self._batons: dict[str, bytes] = {}
        self._journalled: dict[str, int] = {}
        """When the result of an operation was journalled, by its idempotency key."""
        database.watchers.append(self._watch)
        database.lease_watchers.append(self)

    def check(self) -> None:
        """Raise Violation if anything was wrong, or is."""
        self._check_journals()
        if self.wrong:
            raise Violation(self.wrong[0])

    def renewed(self, by: SimProcess, fence: Fence) -> None:
        """A process whose event loop is stuck keeps no lease: others take over (9)."""
        stuck_us = self._database.clock.now_us - by.stuck_since_us
        if by.loop.is_frozen and stuck_us > fence.lease_us / 2:
            self.wrong.append(f"{by.name} renewed its lease, stuck since {stuck_us / 1e6:.3f} s.")

    def expired(self, by: SimProcess, nodes: Sequence[NodeRow]) -> None:
        """Only the store's clock ends the lease of a process that is alive."""
        for node in nodes:
            held = self._data.nodes.get(node.no)
            owner = by.pids.get((node.host, node.pid))
            is_over = node.expires_us < self._database.clock.now_us + by.skew_us
            if held == node and owner is not None and owner.is_alive and not is_over:
                self.wrong.append(f"{by.name} ended the lease of {owner.name} before it was over.")

    def requested(self, request: Request, by: SimProcess) -> None:
        """No step is done again whose result is in the journal (invariant 1), nor elsewhere.

        A process that lost its lease may be in the middle of an attempt, and not know it yet.
        """
        mine = [n for n in self._data.nodes.values() if (n.host, n.pid) == (by.host, by.pid)]
        attempt = current_step.get()
        if attempt is not None and any(
            attempt.info().service not in node.services for node in mine
        ):
            self.wrong.append(
                f"{by.name} did {request.key}, a step of a service that it does not host."
            )
        journalled_us = self._journalled.get(request.key)
        if journalled_us is None or not mine:
            return
        late_us = self._database.clock.now_us - journalled_us
        begun_us = attempt.started_us - by.skew_us if isinstance(attempt, Attempt) else 0
        if late_us > ATTEMPT_MAX_US or begun_us > journalled_us:
            self.wrong.append(
                f"{by.name} did {request.key} again, {late_us / 1e6:.3f} s after its result was "
                f"journalled."
            )

    def _watch(
        self, batch: Sequence[Commit], fence: Fence | None, results: Sequence[PavaneError | None]
    ) -> None:
        for commit, refused in zip(batch, results, strict=True):
            if refused is None:
                if fence is not None:
                    self._check_owner(commit, fence)
                self._check_ends(commit)
                self._check_batons(commit)
                self._note_results(commit)

    def _check_owner(self, commit: Commit, fence: Fence) -> None:
        """Nobody writes what belongs to a partition of another (invariant 2)."""
        data = self._data
        targets = [row.target for row in commit.runs]
        targets += [data.runs[row.run].target for row in commit.journal if row.run in data.runs]
        targets += [row.target for row in commit.parked]
        targets += [target for target, _ in commit.positions]
        if commit.reaction is not None:
            for mark in (*commit.reaction.marks, *commit.reaction.parked):
                handler = data.events.handlers.get(mark.handler)
                event = next((e for e in reversed(data.events.log) if e.pos == mark.pos), None)
                if handler is not None and event is not None:
                    targets.append(data.services[handler.service] * SLOTS + event.slot)
        for target in targets:
            owner = data.partitions[target].owner
            if owner != fence.node:
                self.wrong.append(
                    f"Zombie write: node {fence.node} wrote in partition {target}, which belongs "
                    f"to {f'node {owner}' if owner else 'nobody'}."
                )

    def _note_results(self, commit: Commit) -> None:
        now_us = self._database.clock.now_us
        for row in commit.journal:
            if row.run not in self._data.runs:
                continue
            id = self._data.runs[row.run].id
            for entry in decode_chunk(row.body):
                if entry.what in ("done", "failed"):
                    self._journalled.setdefault(operation_id(id, entry.op, 0), now_us)

    def _check_ends(self, commit: Commit) -> None:
        """A run ends once, and once more after somebody retried it (invariant 3)."""
        if any("#retry" in mark.id for mark in commit.inbox):
            for row in commit.runs:
                self._ends.pop(row.id, None)
        for row in commit.runs:
            if row.service == row.home:
                before = self._ends.get(row.id)
                if before is not None and before != (row.status, row.result):
                    self.wrong.append(
                        f"Run {row.id} ended as {before} and then became {row.status}."
                    )
                elif row.status in ENDED:
                    self._ends[row.id] = (row.status, row.result)

    def _check_batons(self, commit: Commit) -> None:
        """One hop has one successor (invariant 5)."""
        for message in commit.messages:
            if message.kind == "baton":
                known = self._batons.setdefault(message.id, message.body)
                if decode_baton(known) != decode_baton(message.body):
                    self.wrong.append(f"Baton {message.id} was sent twice, with other content.")

    def _check_journals(self) -> None:
        """Journals have no gap (invariant 2)."""
        data = self._data
        for row in data.runs.values():
            at: int | None = None
            for seq, body in sorted(data.journals.get(row.no, {}).items()):
                if at is not None and seq != at:
                    self.wrong.append(f"The journal of {row.id} at {row.service} has a gap: {seq}.")
                at = seq + len(decode_chunk(body))


def is_settled(database: Database) -> str:
    """Say what has not ended yet; nothing if all has."""
    data: Any = database.root._data  # pyright: ignore[reportPrivateUsage]
    for logged in data.log:
        if logged.message.kind == "start" and logged.message.run not in data.numbers:
            return f"Run {logged.message.run} was accepted and has not begun."
    for row in data.runs.values():
        if row.service == row.home and row.status not in ENDED:
            return f"Run {row.id} is {row.status} ({row.reason})."
    for row in data.parked.values():
        return f"Step {row.id} at {row.service} is parked."
    for row in data.events.parked.values():
        return f"An event at {row.pos} is parked for handler {row.handler}."
    for handler, slots in data.events.cursors.items():
        types = data.events.handlers[handler].types
        for event in data.events.log:
            is_open = event.type in types and event.pos > slots[event.slot]
            if is_open and not data.events.has_mark(event.pos, handler):
                return f"Event {event.id} was not handled by handler {handler}."
    return ""


def check_results(database: Database, app: App) -> None:
    """What a run returned is what its journal replays to (invariant 3)."""
    data: Any = database.root._data  # pyright: ignore[reportPrivateUsage]
    for row in data.runs.values():
        chunks = sorted(data.journals.get(row.no, {}).items())
        if row.service != row.home or row.status != "completed" or not chunks:
            continue
        entries = [entry for _, body in chunks for entry in decode_chunk(body)]
        header = decode_header(row.header)
        header.era, header.resumed_us = eras(entries), resumed_us(entries)
        definition = app.registry.workflow(header.workflow, header.version)
        most = app.config.payload_max_bytes
        execution, delivered = rebuilt(header, definition, entries, most)
        execution.replay(delivered)
        outcome = execution.outcome
        if outcome is None or bytes(outcome.value) != row.result:
            raise Violation(f"{row.id} gave {row.result!r}, and its journal gives {outcome!r}.")


def check_answers(database: Database, answers: Mapping[str, tuple[str, Any]]) -> None:
    """What a client was told of runs, their status and result, is what is there (10, 4)."""
    data: Any = database.root._data  # pyright: ignore[reportPrivateUsage]
    ends = {
        row.id: (row.status, row.result) for row in data.runs.values() if row.service == row.home
    }
    for wrong in wrong_answers(ends, answers):
        raise Violation(wrong)


def wrong_answers(
    ends: Mapping[str, tuple[str, bytes | None]], answers: Mapping[str, tuple[str, Any]]
) -> list[str]:
    """Say where runs ended otherwise than a client was told (10, 4)."""
    found: list[str] = []
    for id, (status, result) in answers.items():
        is_status, raw = ends.get(id, (None, None))
        if is_status != status:
            found.append(f"{id} was said to be {status}, and is {is_status}.")
        elif status == "completed" and (raw is None or decoder(Any)(raw) != result):
            found.append(f"{id} gave {raw!r}, and its customer was told {result!r}.")
    return found


def check_same_requests(outside: Outside) -> None:
    """Every attempt under one idempotency key asks for the same (invariant 1)."""
    first: dict[str, tuple[Any, ...]] = {}
    for request in outside.requests:
        asked = (request.what, *request.args)
        if first.setdefault(request.key, asked) != asked:
            raise Violation(
                f"{request.key} asked for {first[request.key]!r} and then for {asked!r}."
            )
