"""What holds a conversation up: the consumer expected next, its backlog, dead letters, stuck runs.

`find_trouble` is pure; `read_trouble` asks the store for the few numbers that it needs besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from pavane.core.baton import ENDED
from pavane.core.codec import error_summary
from pavane.engine.breaker import BREAKER, BY_HAND
from pavane.engine.words import event_in_words, handler_in_words
from pavane.observe.traffic import Traffic, homes
from pavane.stores.eventlog import DeadFilter, DeadRow, HandlerRow
from pavane.stores.port import LAST_US, RunRow, Store


class Consumer(msgspec.Struct, frozen=True):
    """Who is expected to go on: a handler that has yet to handle an event, or a run that waits.

    `backlog` and `dead` count all that waits for a handler and all that it gave up; `paused` says
    why it is paused, if it is. No node hosts the services in `idle`, which it needs.
    """

    what: Literal["handler", "run"]
    name: str
    waits_for: str
    handler: int = 0
    backlog: int = 0
    dead: int = 0
    paused: str = ""
    idle: list[str] = []

    @property
    def cause(self) -> str:
        """Say why it does not go on, if that is known."""
        if self.idle:
            return f"no node hosts {', '.join(self.idle)}"
        if not self.paused or self.paused == BY_HAND:
            return self.paused and f"paused {self.paused}"
        return f"paused: {self.paused}"


class Grave(msgspec.Struct, frozen=True):
    """An event of the conversation that a handler gave up."""

    no: int
    handler: str
    type: str
    event: str
    error: str
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
            f"{handler_in_words(grave.handler)} gave up {grave.type} after "
            f"{_counted(grave.attempts, 'attempt')}: {grave.error}"
            for grave in self.dead[:2]
        ]
        parts += [run.sentence for run in (*self.blocked[:2], *self.failed[:2])]
        parts += [_expectation(consumer) for consumer in self.expected[:3]]
        if not parts:
            end = event_in_words(self.last) or "its start"
            parts = [f"nothing reacts to {end}" if self.stuck else f"it goes on after {end}"]
        return "; ".join(parts)


def _expectation(consumer: Consumer) -> str:
    facts = [consumer.cause] if consumer.cause else []
    facts += [f"{consumer.backlog:,} in its backlog"] if consumer.backlog else []
    facts += [_counted(consumer.dead, "dead letter")] if consumer.dead else []
    said = f"{handler_in_words(consumer.name)} has yet to handle {consumer.waits_for}"
    if consumer.what == "run":
        said = f"run {consumer.name} waits for {consumer.waits_for}"
    return said + (f" ({', '.join(facts)})" if facts else "")


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def find_trouble(traffic: Traffic, now_us: int) -> Trouble:
    """Return what holds a conversation up, without the numbers that concern others too."""
    last = traffic.last
    dead = _graves(traffic)
    live = [row for row in traffic.runs if row.status != "passed" and row.status not in ENDED]
    blocked = _blocked(live, "stuck")
    failed = _blocked(homes(traffic.runs), "failed", "cancelled", "killed")
    handlers, is_held, retried = _pending(traffic, now_us)
    runs, goes_on = _under_way(traffic, live)
    stuck = bool(dead or blocked or is_held) or not (retried or goes_on)
    if handlers:
        runs = [run for run in runs if run.idle or _is_for_events_only(run.waits_for)]
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
            shown_error(row), row.attempts,
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


def _pending(traffic: Traffic, now_us: int) -> tuple[list[Consumer], bool, bool]:
    """Return the handlers that an event waits for; whether one is held until somebody does
    something, and whether one is tried again by itself."""
    settled = {(mark.handler, mark.pos) for mark in traffic.marks}
    settled |= {(row.handler, row.pos) for row in traffic.dead}
    parked = {(row.handler, row.pos): row for row in traffic.parked}
    found: list[Consumer] = []
    is_held = retried = False
    for event in traffic.flow:  # who is told that it is held up does not hold it up
        for handler in traffic.subscribers(event):
            row = parked.get((handler.no, event.pos))
            paused = _paused(handler, now_us)
            idle = sorted(traffic.idle([handler.service]))
            if row is not None and row.due_us < LAST_US and not paused and not idle:
                retried = True
                continue
            waits_for = event.type
            if row is not None:
                waits_for += " behind another of its key" if row.due_us >= LAST_US else ""
                waits_for += "" if row.error == b"null" else f", after {error_summary(row.error)}"
            elif (handler.no, event.pos) in settled or not traffic.is_ahead(handler, event):
                continue
            name = f"{handler.service}.{handler.name}"
            found.append(Consumer("handler", name, waits_for, handler.no, paused=paused, idle=idle))
            if paused.startswith(BREAKER) and not idle:
                retried = True
            else:
                is_held = True
    return found, is_held, retried


def _under_way(traffic: Traffic, live: Sequence[RunRow]) -> tuple[list[Consumer], bool]:
    """Return the runs that wait, and whether one of all goes on by itself."""
    found: list[Consumer] = []
    goes_on = False
    for row in (*live, *_between_services(traffic)):
        if row.status == "stuck":
            continue
        at = row.holder if row.status == "passed" else row.service
        needs = traffic.needs.get(row.id, set())
        idle = traffic.idle({at, *needs})
        if row.status == "waiting" or idle:
            waits_for = row.reason or ", ".join(sorted(idle))
            found.append(Consumer("run", row.id, waits_for, idle=sorted(idle)))
        asked = needs - {at}
        is_held = at in idle or (bool(asked) and asked <= idle and "timer" not in row.reason)
        goes_on |= not is_held and not (row.status == "waiting" and _is_for_events_only(row.reason))
    return found, goes_on


def _paused(handler: HandlerRow, now_us: int) -> str:
    return (handler.reason or BY_HAND) if handler.paused_until_us > now_us else ""


def _is_for_events_only(reason: str) -> bool:
    return bool(reason) and all(part.startswith("event ") for part in reason.split(", "))


def _between_services(traffic: Traffic) -> list[RunRow]:
    """Return the runs whose baton is under way, of which no other service has a row yet."""
    here = {row.id for row in traffic.runs if row.status != "passed"}
    by_hop = sorted(traffic.runs, key=lambda row: row.hop)
    away = {row.id: row for row in by_hop if row.status == "passed" and row.id not in here}
    return list(away.values())


def shown_error(row: DeadRow) -> str:
    """Return the error itself: its cause leaves out what tells one from another."""
    return row.cause if row.error == b"null" else error_summary(row.error)
