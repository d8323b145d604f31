"""The event half of the store port: published events, and what handlers made of them.

Events are in one log, in commit order. An event's `slot` is the hash of its key; slot n of the log
concerns partition n of every service, so whoever owns that partition handles it, in order. A
handler's progress is a cursor per slot, below which everything is handled, and a mark for each
event that it handled, written in the same commit as the effects: the mark is unique, so an event
takes effect once per handler, whatever crashes. What must wait is parked, what gave up is a dead
letter; both are rows here, so a cursor can pass them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import msgspec

Outcome = Literal["done", "expired", "dead", "dropped"]


class EventRow(msgspec.Struct):
    """One published event; the CloudEvents attributes as columns, its payload as JSON.

    `pos` is its place in the log once it is written, 0 if its id was in the log already. `value`
    never leaves the process: the decoded event, shared by the handlers of this process.
    """

    id: str
    type: str
    version: int
    key: str
    source: str
    at_us: int
    conversation: str
    cause: str
    trace: str
    data: bytes
    slot: int = 0
    pos: int = 0
    value: Any = None


class EventFilter(msgspec.Struct, frozen=True):
    """Which events to list, newest first; unset fields do not restrict."""

    types: tuple[str, ...] = ()
    key: str | None = None
    source: str | None = None
    conversation: str | None = None
    cause: str | None = None
    since_us: int = 0
    before: int | None = None
    limit: int = 100


class HandlerSpec(msgspec.Struct, frozen=True):
    """A handler as declared: it begins at the log's end (`since_us` None), or at a time."""

    service: str
    name: str
    types: tuple[str, ...]
    since_us: int | None = None


class HandlerRow(msgspec.Struct):
    """A handler as the store knows it.

    `paused_until_us` is 0 while it works; `reason` says who or what paused it.
    """

    no: int
    service: str
    name: str
    types: list[str]
    created_us: int
    paused_until_us: int = 0
    reason: str = ""


class MarkRow(msgspec.Struct):
    """Handler `handler` handled the event at `pos`. `by` names the variant that did, if one did."""

    handler: int
    pos: int
    at_us: int
    took_us: int
    attempts: int
    outcome: Outcome
    by: str = ""


class ParkedEvent(msgspec.Struct):
    """An event in custody of a handler: waiting for an attempt at `due_us`, or behind another.

    `due_us` is LAST_US for one that waits behind an earlier one of its key. `again` names the
    replay that asked for it, if one did; `data` replaces the event's payload if it was edited;
    `dead` is the number of the dead letter it was, 0 if none.
    """

    handler: int
    pos: int
    slot: int
    key: str
    attempt: int
    due_us: int
    began_us: int
    error: bytes = b"null"
    deaths: int = 0
    again: str = ""
    data: bytes | None = None
    dead: int = 0


class DeadRow(msgspec.Struct):
    """An event that a handler gave up, kept for people, with the last error.

    `no` is given by the store (0 when new). `cause` groups dead letters that failed alike. `holds`:
    later events of its key wait for it. `asked` is set once someone asked for a retry or a drop.
    """

    no: int
    handler: int
    pos: int
    slot: int
    key: str
    type: str
    event: str
    at_us: int
    attempts: int
    cause: str
    error: bytes
    data: bytes
    holds: bool = False
    asked: str = ""
    again: str = ""


class DeadFilter(msgspec.Struct, frozen=True):
    """Which dead letters; unset fields do not restrict. Oldest first, numbered above `after`."""

    handlers: tuple[int, ...] = ()
    type: str | None = None
    key: str | None = None
    cause: str | None = None
    numbers: tuple[int, ...] = ()
    slots: tuple[int, ...] | None = None
    holding: bool = False
    positions: tuple[int, ...] = ()
    after: int = 0
    limit: int = 500


class StateRow(msgspec.Struct):
    """The state that handlers of `service` keep under `name` for one key; None deletes it."""

    service: str
    name: str
    key: str
    body: bytes | None


class ShadowRow(msgspec.Struct):
    """What a shadow handler would have published for the event at `pos`, as a JSON array."""

    handler: int
    pos: int
    at_us: int
    events: bytes
    error: bytes = b"null"


class AwaitRow(msgspec.Struct):
    """A run waits for an event of `type` and `key`: `id` is its operation's.

    `pos` is the event that it was given, 0 as long as it waits. `reply` is what the answer needs.
    """

    service: str
    type: str
    key: str
    run: str
    id: str
    at_us: int
    reply: bytes
    pos: int = 0


class KeptRow(msgspec.Struct):
    """An event kept for runs of `service` that may wait for it until `expires_us`."""

    service: str
    type: str
    key: str
    pos: int
    expires_us: int


class ConversationRow(msgspec.Struct):
    """What the monitor knows of one conversation under one contract.

    `ends` counts end events; `end` is the type of the first one, `last` of the newest event seen.
    `milestones` is a JSON object of event type to the time it was first seen. `raised`: the event
    that says it is overdue was published.
    """

    contract: str
    id: str
    key: str
    started_us: int
    due_us: int
    ended_us: int | None = None
    end: str = ""
    ends: int = 0
    last: str = ""
    last_us: int = 0
    milestones: bytes = b"{}"
    raised: bool = False


class ConversationFilter(msgspec.Struct, frozen=True):
    """Which conversations, newest start first; `state` is judged at `now_us`.

    "unraised" are the overdue ones whose event was not published yet.
    """

    contract: str | None = None
    id: str | None = None
    key: str | None = None
    state: Literal["any", "open", "overdue", "unraised", "ended", "twice"] = "any"
    now_us: int = 0
    limit: int = 100


class Reaction(msgspec.Struct, eq=False):
    """What a handler's progress changes, as the part of a commit; see `Commit`.

    What takes rows away comes before what writes rows of the same kind.
    """

    marks: Sequence[MarkRow] = ()
    """A mark that is there already refuses the commit with a Conflict."""
    remarks: Sequence[MarkRow] = ()
    """Marks that replace older ones."""
    parked: Sequence[ParkedEvent] = ()
    """Replaces what is parked for the same handler and position."""
    unparked: Sequence[tuple[int, int]] = ()
    """(handler, position)"""
    dead: Sequence[DeadRow] = ()
    undead: Sequence[int] = ()
    asked: Sequence[tuple[int, str]] = ()
    """(dead letter, what was asked for)"""
    states: Sequence[StateRow] = ()
    shadows: Sequence[ShadowRow] = ()
    awaited: Sequence[AwaitRow] = ()
    """Replaces the row of the same operation."""
    unawaited: Sequence[tuple[str, str]] = ()
    """(run, id); id "*" forgets all of a run's."""
    kept: Sequence[KeptRow] = ()
    """One that is kept already stays as it is."""
    cursors: Sequence[tuple[int, int, int]] = ()
    """(handler, slot, position) up to which everything is handled; never moves back."""
    conversations: Sequence[ConversationRow] = ()
    """Replaces the row of the same contract and id."""
    members: Sequence[tuple[str, str]] = ()
    """(conversation, run) of runs that an event started."""


class EventStore(Protocol):
    """What a store does with events. An event's id is in the log once, whoever publishes it."""

    def slot_of(self, key: str, id: str) -> int:
        """Return the slot of an event: by its key, or by its id if it has none."""
        ...

    async def events_head(self) -> int:
        """A position that every event so far is at or below, and every later one above."""
        ...

    async def read_events(
        self, after: int, until: int, limit: int,
        types: Sequence[str] | None = None, slots: Sequence[int] | None = None,
    ) -> list[EventRow]:  # fmt: skip
        """Events above `after` up to `until`, in log order, which is commit order.

        An event never appears below one that a reader has seen before.
        """
        ...

    async def find_events(self, which: EventFilter) -> list[EventRow]:
        """Events, newest first."""
        ...

    async def event(self, id: str) -> EventRow | None: ...
    async def events_at(self, positions: Sequence[int]) -> dict[int, EventRow]: ...
    async def event_types(self) -> list[tuple[str, int, int]]:
        """(type, newest version, count) of what is in the log."""
        ...

    # handlers
    async def register_handlers(self, specs: Sequence[HandlerSpec]) -> list[HandlerRow]:
        """Make handlers known; a new one gets a cursor in every slot. Rows in the order given.

        A known one keeps its cursors, and gets the types given now.
        """
        ...

    async def handler_rows(self) -> list[HandlerRow]:
        """All that were ever made known, by service and name."""
        ...

    async def pause_handler(self, no: int, until_us: int, reason: str) -> None:
        """Let its nodes stop (until LAST_US: by hand), or go on (0), soon."""
        ...

    async def forget_handler(self, no: int) -> bool:
        """Delete a handler with its progress and custody; False, and nothing is, if it has dead
        letters. Interrupted, it has at least given up all that is in the log."""
        ...

    async def cursors(self, handler: int) -> dict[int, int]:
        """The handler's position in every slot."""
        ...

    async def backlog(self, handler: int) -> int:
        """How many events of its types the handler has not handled or parked yet."""
        ...

    async def marks(self, handler: int, after: int, until: int) -> list[MarkRow]: ...
    async def marks_at(self, positions: Sequence[int]) -> list[MarkRow]:
        """The marks of all handlers for these events, in order of time."""
        ...

    async def parked_events(
        self, handler: int, slots: Sequence[int], after: int, limit: int, key: str | None = None
    ) -> list[ParkedEvent]:
        """What is parked for a handler, at positions above `after`, in log order."""
        ...

    async def parked_at(self, positions: Sequence[int]) -> list[ParkedEvent]: ...
    async def parked_count(self, handler: int) -> int: ...
    async def dead_letters(self, which: DeadFilter) -> list[DeadRow]: ...
    async def dead_counts(self, which: DeadFilter) -> list[tuple[int, str, str, int, int, int]]:
        """(handler, type, cause, count, oldest µs, newest µs) of dead letters, most first."""
        ...

    async def state(self, service: str, name: str, key: str) -> bytes | None: ...
    async def shadows(self, handler: int, limit: int) -> list[ShadowRow]:
        """What a shadow handler recorded, newest first."""
        ...

    # mailbox
    async def awaits(self, service: str, type: str, key: str) -> list[AwaitRow]:
        """Who waits for such an event, or was given one, in order of time."""
        ...

    async def awaits_like(self, service: str, types: str) -> list[AwaitRow]:
        """Who waits at `service` for what has a type that begins with `types`, in order of time."""
        ...

    async def awaits_of(self, run: str) -> list[AwaitRow]: ...
    async def kept_events(self, service: str, type: str, key: str) -> list[KeptRow]:
        """Events that are kept, in log order."""
        ...

    # conversations
    async def conversations(self, which: ConversationFilter) -> list[ConversationRow]: ...
    async def conversation(self, contract: str, id: str) -> ConversationRow | None: ...
    async def runs_in(self, conversation: str) -> list[str]:
        """Ids of the runs that belong to a conversation: the one it began with, those that events
        started, and their children."""
        ...

    async def prune_events(self, before_us: int, limit: int) -> int:
        """Delete up to `limit` events older than `before_us` that every handler is past and nothing
        parked, dead or kept refers to, with their marks and shadows; and up to as many each of
        conversations that ended before, kept events that expired before, and older waits whose
        event has left the log. Return how many of all.

        It may look at a part of the log at a time, and go on there at the next call.
        """
        ...
