"""What holds a conversation up: the consumer expected next, its backlog, dead letters, stuck runs.

`find_trouble` is pure; `read_trouble` asks the store for the few numbers that it needs besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from pavane.contract import ConversationOverdue
from pavane.core.baton import ENDED
from pavane.core.codec import error_summary
from pavane.observe.traffic import Traffic, homes
from pavane.stores.eventlog import DeadFilter, EventRow, HandlerRow
from pavane.stores.port import LAST_US, RunRow, Store


class Consumer(msgspec.Struct, frozen=True):
    """Who is expected to go on: a handler that has yet to handle an event, or a run that waits.

    `backlog` and `dead` count all that waits for a handler and all that it gave up; `paused` says
    until when and why it is paused, if it is.
    """

    what: Literal["handler", "run"]
    name: str
    waits_for: str
    handler: int = 0
    backlog: int = 0
    dead: int = 0
    paused: str = ""


class Grave(msgspec.Struct, frozen=True):
    """An event of the conversation that a handler gave up."""

    no: int
    handler: str
    type: str
    event: str
    cause: str
    attempts: int


class Blocked(msgspec.Struct, frozen=True):
    """A run of the conversation that is stuck, or that did not complete."""

    run: str
    workflow: str
    status: str
    reason: str

    @property
    def sentence(self) -> str:
        said = {"stuck": "is stuck", "failed": "failed"}.get(self.status, f"was {self.status}")
        first = next(iter(self.reason.splitlines()), "")
        return f"run {self.run} {said}" + (f": {first}" if first else "")


class Trouble(msgspec.Struct, frozen=True):
    """What is known of a conversation that has not ended in time.

    `stuck`: nothing of it moves any more by itself. `last` is the type of the newest event seen,
    `last_id` its id.
    """

    stuck: bool
    last: str
    last_id: str
    last_us: int
    expected: list[Consumer] = []
    dead: list[Grave] = []
    blocked: list[Blocked] = []
    failed: list[Blocked] = []

    @property
    def sentence(self) -> str:
        """Say it in one sentence."""
        parts = [
            f"{grave.handler} gave up {grave.type} after {grave.attempts} attempts: {grave.cause}"
            for grave in self.dead[:2]
        ]
        parts += [run.sentence for run in (*self.blocked[:2], *self.failed[:2])]
        parts += [_expectation(consumer) for consumer in self.expected[:3]]
        if not parts:
            end = self.last or "its start"
            parts = [f"nothing reacts to {end}" if self.stuck else f"it goes on after {end}"]
        return "; ".join(parts)


def _expectation(consumer: Consumer) -> str:
    if consumer.what == "run":
        return f"run {consumer.name} waits for {consumer.waits_for}"
    facts = [f"paused {consumer.paused}"] if consumer.paused else []
    facts += [f"{consumer.backlog} in its backlog"] if consumer.backlog else []
    facts += [f"{consumer.dead} dead letters"] if consumer.dead else []
    return f"{consumer.name} has yet to handle {consumer.waits_for}" + (
        f" ({', '.join(facts)})" if facts else ""
    )


def find_trouble(traffic: Traffic, now_us: int) -> Trouble:
    """Return what holds a conversation up, without the numbers that concern others too."""
    last = traffic.last
    dead = _graves(traffic)
    live = [row for row in traffic.runs if row.status != "passed" and row.status not in ENDED]
    blocked = _blocked(live, "stuck")
    failed = _blocked(homes(traffic.runs), "failed", "cancelled", "killed")
    handlers, retried = _pending(traffic, now_us)
    waiting = [row for row in live if row.status == "waiting"]
    moves = (
        retried
        or any(row.status == "running" for row in live)
        or any(not _waits_for_events_only(row) for row in waiting)
        or _is_between_services(traffic)
    )
    stuck = bool(dead or blocked or any(c.what == "handler" for c in handlers)) or not moves
    runs = [
        Consumer("run", row.id, row.reason) for row in waiting
        if _waits_for_events_only(row) or not handlers
    ]  # fmt: skip
    return Trouble(
        stuck, "" if last is None else last.type, "" if last is None else last.id,
        0 if last is None else last.at_us, [*handlers, *runs], dead, blocked, failed,
    )  # fmt: skip


async def read_trouble(
    store: Store, traffic: Traffic, counted: dict[int, tuple[int, int]] | None = None
) -> Trouble:
    """Return what holds a conversation up, with the state of the handlers expected next.

    `counted` remembers (backlog, dead letters) by handler, for those who ask about many.
    """
    found = find_trouble(traffic, store.now_us())
    counted = {} if counted is None else counted
    expected: list[Consumer] = []
    for consumer in found.expected:
        if consumer.what == "handler":
            if consumer.handler not in counted:
                counts = await store.dead_counts(DeadFilter(handlers=(consumer.handler,)))
                backlog = await store.backlog(consumer.handler)
                counted[consumer.handler] = backlog, sum(count for _, _, _, count, _, _ in counts)
            backlog, dead = counted[consumer.handler]
            consumer = msgspec.structs.replace(consumer, backlog=backlog, dead=dead)
        expected.append(consumer)
    return msgspec.structs.replace(found, expected=expected)


def _graves(traffic: Traffic) -> list[Grave]:
    names = {row.no: f"{row.service}.{row.name}" for row in traffic.handlers}
    return [
        Grave(
            row.no, names.get(row.handler, f"handler {row.handler}"), row.type, row.event,
            row.cause, row.attempts,
        )
        for row in traffic.dead
    ]  # fmt: skip


def _blocked(rows: Sequence[RunRow], *statuses: str) -> list[Blocked]:
    """Return the runs with these statuses, but for children, whose parents know of it."""
    return [
        Blocked(row.id, row.workflow, row.status, row.reason)
        for row in rows
        if row.status in statuses and ("/" not in row.id or row.status == "stuck")
    ]


def _pending(traffic: Traffic, now_us: int) -> tuple[list[Consumer], bool]:
    """Return the handlers that an event waits for, and whether one is tried again by itself."""
    settled = {(mark.handler, mark.pos) for mark in traffic.marks}
    settled |= {(row.handler, row.pos) for row in traffic.dead}
    parked = {(row.handler, row.pos): row for row in traffic.parked}
    found: list[Consumer] = []
    retried = False
    for event in traffic.events:
        if event.type == ConversationOverdue.event_type:
            continue  # who is told that it is held up does not hold it up
        for handler in traffic.subscribers(event):
            row = parked.get((handler.no, event.pos))
            paused = _paused(handler, now_us)
            if row is not None and row.due_us < LAST_US and not paused:
                retried = True
            elif row is not None:
                error = "" if row.error == b"null" else f", after {error_summary(row.error)}"
                behind = " behind another of its key" if row.due_us >= LAST_US else ""
                found.append(_consumer(handler, event, f"{behind}{error}", paused))
            elif (handler.no, event.pos) not in settled and traffic.is_ahead(handler, event):
                found.append(_consumer(handler, event, "", paused))
    return found, retried


def _consumer(handler: HandlerRow, event: EventRow, more: str, paused: str) -> Consumer:
    name = f"{handler.service}.{handler.name}"
    return Consumer("handler", name, f"{event.type}{more}", handler.no, paused=paused)


def _paused(handler: HandlerRow, now_us: int) -> str:
    if handler.paused_until_us <= now_us:
        return ""
    return f"({handler.reason})" if handler.reason else "by hand"


def _waits_for_events_only(row: RunRow) -> bool:
    return bool(row.reason) and all(part.startswith("event ") for part in row.reason.split(", "))


def _is_between_services(traffic: Traffic) -> bool:
    """Tell whether a baton is under way, of which no other service has a row yet."""
    here = {row.id for row in traffic.runs if row.status != "passed"}
    return any(row.status == "passed" and row.id not in here for row in traffic.runs)
