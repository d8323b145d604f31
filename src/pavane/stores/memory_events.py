"""Events, handlers and conversations in the memory store; see `stores/eventlog.py`.

What all views of one store share is `EventData`, plain dicts by the keys that the port names;
`EventViews` reads them. A commit is checked before anything of it is written, so that writing
cannot fail; rows are copied on their way in and out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from operator import attrgetter
from typing import Any, Protocol, TypeVar
from zlib import crc32

import msgspec

from pavane.stores.eventlog import (
    AwaitRow,
    ConversationFilter,
    ConversationRow,
    DeadFilter,
    DeadRow,
    EventFilter,
    EventRow,
    HandlerRow,
    HandlerSpec,
    KeptRow,
    MarkRow,
    ParkedEvent,
    Reaction,
    ShadowRow,
    StateRow,
)

T = TypeVar("T", bound=msgspec.Struct)


class EventData:
    """The event half of what all views of one store share."""

    def __init__(self, partitions: int, clock: Callable[[], int]) -> None:
        self.partitions = partitions
        self.clock = clock
        self.log: list[EventRow] = []
        self.ids: dict[str, EventRow] = {}
        self.head = 0
        self.handlers: dict[int, HandlerRow] = {}
        self.last_handler = 0
        self.cursors: dict[int, dict[int, int]] = {}
        """Positions by handler and slot."""
        self.marks: dict[int, dict[int, MarkRow]] = {}
        """By handler and position."""
        self.parked: dict[tuple[int, int], ParkedEvent] = {}
        """By (handler, position)."""
        self.dead: dict[int, DeadRow] = {}
        self.dead_ever = 0
        self.states: dict[tuple[str, str, str], bytes] = {}
        """By (service, name, key)."""
        self.shadows: dict[tuple[int, int], ShadowRow] = {}
        """By (handler, position)."""
        self.awaits: dict[tuple[str, str], AwaitRow] = {}
        """By (run, id)."""
        self.kept: dict[tuple[str, str, str, int], KeptRow] = {}
        """By (service, type, key, position)."""
        self.conversations: dict[tuple[str, str], ConversationRow] = {}
        """By (contract, id)."""
        self.members: dict[str, set[str]] = {}
        """Runs by conversation."""

    def has_mark(self, pos: int, handler: int) -> bool:
        return pos in self.marks.get(handler, ())

    def between(self, after: int, until: int) -> Sequence[EventRow]:
        by_pos = attrgetter("pos")
        low = bisect_right(self.log, after, key=by_pos)
        return self.log[low : bisect_right(self.log, until, low, key=by_pos)]

    # -- writing, after everything was checked ---------------------------------------------------

    def publish(self, events: Iterable[EventRow]) -> None:
        for event in events:
            self.head += 1  # an event that is there already leaves a gap, as in databases
            if event.id in self.ids:
                event.pos = 0
                continue
            event.pos = self.head
            row = _event(event)
            self.log.append(row)
            self.ids[row.id] = row

    def react(self, r: Reaction) -> None:
        for mark in (*r.marks, *r.remarks):
            self.marks.setdefault(mark.handler, {})[mark.pos] = copy(mark)
        for key in r.unparked:
            self.parked.pop(key, None)
        for parked in r.parked:
            self.parked[parked.handler, parked.pos] = copy(parked)
        for no in r.undead:
            self.dead.pop(no, None)
        for dead in r.dead:
            self.dead_ever += 1
            self.dead[self.dead_ever] = msgspec.structs.replace(dead, no=self.dead_ever)
        for no, asked in r.asked:
            if no in self.dead:
                self.dead[no].asked = asked
        for state in r.states:
            self.put_state(state)
        for shadow in r.shadows:
            self.shadows[shadow.handler, shadow.pos] = copy(shadow)
        for run, id in r.unawaited:
            self.forget_awaits(run, id)
        for wait in r.awaited:
            self.awaits[wait.run, wait.id] = copy(wait)
        for kept in r.kept:
            self.kept.setdefault((kept.service, kept.type, kept.key, kept.pos), copy(kept))
        for handler, slot, position in r.cursors:
            slots = self.cursors.get(handler, {})
            if slot in slots:
                slots[slot] = max(slots[slot], position)
        for conversation in r.conversations:
            self.conversations[conversation.contract, conversation.id] = copy(conversation)
        for conversation, run in r.members:
            self.members.setdefault(conversation, set()).add(run)

    def forget(self, no: int) -> bool:
        if any(row.handler == no for row in self.dead.values()):
            return False
        for by_handler in (self.handlers, self.cursors, self.marks):
            by_handler.pop(no, None)
        for of_events in (self.parked, self.shadows):
            for place in [place for place in of_events if place[0] == no]:
                del of_events[place]
        return True

    def put_state(self, row: StateRow) -> None:
        key = (row.service, row.name, row.key)
        if row.body is None:
            self.states.pop(key, None)
        else:
            self.states[key] = row.body

    def forget_awaits(self, run: str, id: str) -> None:
        if id == "*":
            for key in [it for it in self.awaits if it[0] == run]:
                del self.awaits[key]
        else:
            self.awaits.pop((run, id), None)

    def forget_run(self, run: str) -> None:
        """Delete what a run leaves behind here when it is pruned.

        What it was given goes with the event: a run that goes on from it must not get the same one.
        """
        for key in [it for it, row in self.awaits.items() if row.run == run and not row.pos]:
            del self.awaits[key]
        for conversation in [it for it, runs in self.members.items() if run in runs]:
            self.members[conversation].discard(run)
            if not self.members[conversation]:
                del self.members[conversation]

    # -- handlers --------------------------------------------------------------------------------

    def handler(self, service: str, name: str) -> HandlerRow | None:
        rows = self.handlers.values()
        return next((row for row in rows if (row.service, row.name) == (service, name)), None)

    def register(self, spec: HandlerSpec) -> HandlerRow:
        row = self.handler(spec.service, spec.name)
        if row is not None:
            row.types = sorted(spec.types)
            return row
        self.last_handler += 1
        no = self.last_handler
        row = HandlerRow(no, spec.service, spec.name, sorted(spec.types), self.clock())
        self.handlers[no] = row
        self.cursors[no] = dict.fromkeys(range(self.partitions), self.position_at(spec.since_us))
        return row

    def position_at(self, since_us: int | None) -> int:
        """Return the position below the first event of that time or later; None is the end."""
        if since_us is None:
            return self.head
        return next((event.pos - 1 for event in self.log if event.at_us >= since_us), self.head)

    # -- pruning ---------------------------------------------------------------------------------

    def prune(self, before_us: int, limit: int) -> int:
        expired = [key for key, row in self.kept.items() if row.expires_us < before_us][:limit]
        for key in expired:
            del self.kept[key]
        events = self.prune_log(before_us, limit)
        over = [
            key for key, row in self.awaits.items()
            if row.pos and row.at_us < before_us and not self.between(row.pos - 1, row.pos)
        ][:limit]  # fmt: skip
        for key in over:
            del self.awaits[key]
        ended = [
            key for key, row in self.conversations.items()
            if row.ended_us is not None and row.ended_us < before_us
        ][:limit]  # fmt: skip
        for key in ended:
            del self.conversations[key]
        return len(expired) + events + len(over) + len(ended)

    def prune_log(self, before_us: int, limit: int) -> int:
        held = {pos for _, pos in self.parked}
        held |= {row.pos for row in self.dead.values()} | {row.pos for row in self.kept.values()}
        old = [
            event for event in self.log
            if event.at_us < before_us and event.pos not in held and self.is_handled(event)
        ][:limit]  # fmt: skip
        for event in old:
            del self.ids[event.id]
            for no in self.handlers:
                self.marks.get(no, {}).pop(event.pos, None)
                self.shadows.pop((no, event.pos), None)
        gone = {event.pos for event in old}
        self.log[:] = [event for event in self.log if event.pos not in gone]
        return len(old)

    def is_handled(self, event: EventRow) -> bool:
        """Tell whether every handler is past it, also those that its type does not concern."""
        return all(slots.get(event.slot, event.pos) >= event.pos for slots in self.cursors.values())


class SharedData(Protocol):
    """What `EventViews` uses of the data that all views share."""

    lock: Any
    version: int
    events: EventData
    numbers: dict[str, dict[str, int]]


class EventViews:
    """The reading side, and what is written outside of commits; a part of `MemoryStore`."""

    partitions: int

    _open_data: Callable[[], SharedData]

    def slot_of(self, key: str, id: str) -> int:
        return crc32((key or id).encode()) % self.partitions

    async def events_head(self) -> int:
        return self._open_data().events.head

    async def read_events(
        self, after: int, until: int, limit: int,
        types: Sequence[str] | None = None, slots: Sequence[int] | None = None,
    ) -> list[EventRow]:  # fmt: skip
        wanted = (
            event
            for event in self._open_data().events.between(after, until)
            if (types is None or event.type in types) and (slots is None or event.slot in slots)
        )
        return _first(limit, wanted)

    async def find_events(self, which: EventFilter) -> list[EventRow]:
        newest_first = reversed(self._open_data().events.log)
        return _first(which.limit, (row for row in newest_first if _fits(row, which)))

    async def event(self, id: str) -> EventRow | None:
        return copy(self._open_data().events.ids.get(id))

    async def events_at(self, positions: Sequence[int]) -> dict[int, EventRow]:
        wanted = set(positions)
        log = self._open_data().events.log
        return {event.pos: copy(event) for event in log if event.pos in wanted}

    async def event_types(self) -> list[tuple[str, int, int]]:
        versions: dict[str, list[int]] = {}
        for event in self._open_data().events.log:
            versions.setdefault(event.type, []).append(event.version)
        return [(type, max(found), len(found)) for type, found in sorted(versions.items())]

    # -- handlers ------------------------------------------------------------------------------

    async def register_handlers(self, specs: Sequence[HandlerSpec]) -> list[HandlerRow]:
        with self._writing() as events:
            return [_handler(events.register(spec)) for spec in specs]

    async def handler_rows(self) -> list[HandlerRow]:
        rows = self._open_data().events.handlers.values()
        return [_handler(row) for row in sorted(rows, key=attrgetter("service", "name"))]

    async def pause_handler(self, no: int, until_us: int, reason: str) -> None:
        with self._writing() as events:
            if no in events.handlers:
                row = events.handlers[no]
                row.paused_until_us, row.reason = until_us, reason

    async def forget_handler(self, no: int) -> bool:
        with self._writing() as events:
            return events.forget(no)

    async def cursors(self, handler: int) -> dict[int, int]:
        return dict(self._open_data().events.cursors.get(handler, {}))

    async def backlog(self, handler: int) -> int:
        events = self._open_data().events
        if handler not in events.handlers:
            return 0
        types, cursors = events.handlers[handler].types, events.cursors[handler]
        return sum(
            event.type in types
            and event.pos > cursors[event.slot]
            and not events.has_mark(event.pos, handler)
            and (handler, event.pos) not in events.parked
            for event in events.between(min(cursors.values()), events.head)
        )

    async def marks(self, handler: int, after: int, until: int) -> list[MarkRow]:
        marks = self._open_data().events.marks.get(handler, {})
        return [copy(marks[pos]) for pos in sorted(marks) if after < pos <= until]

    async def marks_at(self, positions: Sequence[int]) -> list[MarkRow]:
        wanted = set(positions)
        by_handler = self._open_data().events.marks.values()
        rows = [marks[pos] for marks in by_handler for pos in wanted if pos in marks]
        return _copies(sorted(rows, key=attrgetter("at_us", "handler", "pos")))

    async def parked_events(
        self, handler: int, slots: Sequence[int], after: int, limit: int, key: str | None = None
    ) -> list[ParkedEvent]:
        rows = [
            row
            for row in self._open_data().events.parked.values()
            if row.handler == handler
            and row.slot in slots
            and row.pos > after
            and key in (None, row.key)
        ]
        return _first(limit, sorted(rows, key=attrgetter("pos")))

    async def parked_at(self, positions: Sequence[int]) -> list[ParkedEvent]:
        rows = [row for row in self._open_data().events.parked.values() if row.pos in positions]
        return _copies(sorted(rows, key=attrgetter("pos", "handler")))

    async def parked_count(self, handler: int) -> int:
        return sum(no == handler for no, _ in self._open_data().events.parked)

    async def dead_letters(self, which: DeadFilter) -> list[DeadRow]:
        rows = self._open_data().events.dead.values()
        wanted = (row for row in rows if row.no > which.after and _is_asked_for(row, which))
        return _first(which.limit, wanted)

    async def dead_counts(self, which: DeadFilter) -> list[tuple[int, str, str, int, int, int]]:
        times: dict[tuple[int, str, str], list[int]] = {}
        for row in self._open_data().events.dead.values():
            if _is_asked_for(row, which):
                times.setdefault((row.handler, row.type, row.cause), []).append(row.at_us)
        counts = [(*group, len(at), min(at), max(at)) for group, at in times.items()]
        return sorted(counts, key=lambda it: (-it[3], it[0], it[1], it[2]))

    async def state(self, service: str, name: str, key: str) -> bytes | None:
        return self._open_data().events.states.get((service, name, key))

    async def shadows(self, handler: int, limit: int) -> list[ShadowRow]:
        rows = [row for row in self._open_data().events.shadows.values() if row.handler == handler]
        return _first(limit, sorted(rows, key=attrgetter("pos"), reverse=True))

    # -- mailbox -------------------------------------------------------------------------------

    async def awaits(self, service: str, type: str, key: str) -> list[AwaitRow]:
        rows = [
            row
            for row in self._open_data().events.awaits.values()
            if (row.service, row.type, row.key) == (service, type, key)
        ]
        return _copies(sorted(rows, key=attrgetter("at_us", "run", "id")))

    async def awaits_like(self, service: str, types: str) -> list[AwaitRow]:
        rows = [
            row
            for row in self._open_data().events.awaits.values()
            if row.service == service and row.type.startswith(types)
        ]
        return _copies(sorted(rows, key=attrgetter("at_us", "run", "id")))

    async def awaits_of(self, run: str) -> list[AwaitRow]:
        rows = [row for row in self._open_data().events.awaits.values() if row.run == run]
        return _copies(sorted(rows, key=attrgetter("at_us", "id")))

    async def kept_events(self, service: str, type: str, key: str) -> list[KeptRow]:
        rows = [
            row
            for row in self._open_data().events.kept.values()
            if (row.service, row.type, row.key) == (service, type, key)
        ]
        return _copies(sorted(rows, key=attrgetter("pos")))

    # -- conversations -------------------------------------------------------------------------

    async def conversations(self, which: ConversationFilter) -> list[ConversationRow]:
        rows = self._open_data().events.conversations.values()
        wanted = (row for row in rows if _is_meant(row, which))
        return _first(
            which.limit, sorted(wanted, key=lambda row: (-row.started_us, row.contract, row.id))
        )

    async def conversation(self, contract: str, id: str) -> ConversationRow | None:
        return copy(self._open_data().events.conversations.get((contract, id)))

    async def runs_in(self, conversation: str) -> list[str]:
        data = self._open_data()
        runs = sorted(data.numbers)
        roots = [conversation, *sorted(data.events.members.get(conversation, ()))]
        found = [id for root in roots for id in runs if id == root or id.startswith(f"{root}/")]
        return list(dict.fromkeys(found))

    async def prune_events(self, before_us: int, limit: int) -> int:
        with self._writing() as events:
            return events.prune(before_us, limit)

    @contextmanager
    def _writing(self) -> Generator[EventData, None, None]:
        data = self._open_data()
        with data.lock:
            data.version += 1
            yield data.events


# -- what filters mean ---------------------------------------------------------------------------


def _fits(row: EventRow, which: EventFilter) -> bool:
    if which.types and row.type not in which.types:
        return False
    if which.before is not None and row.pos >= which.before:
        return False
    return (
        row.at_us >= which.since_us
        and which.key in (None, row.key)
        and which.source in (None, row.source)
        and which.conversation in (None, row.conversation)
        and which.cause in (None, row.cause)
    )


def _is_asked_for(row: DeadRow, which: DeadFilter) -> bool:
    if which.slots is not None and row.slot not in which.slots:
        return False
    return (
        (not which.handlers or row.handler in which.handlers)
        and (not which.numbers or row.no in which.numbers)
        and (not which.positions or row.pos in which.positions)
        and (row.holds or not which.holding)
        and which.type in (None, row.type)
        and which.key in (None, row.key)
        and which.cause in (None, row.cause)
    )


def _is_meant(row: ConversationRow, which: ConversationFilter) -> bool:
    wanted = ((which.contract, row.contract), (which.id, row.id), (which.key, row.key))
    if any(given not in (None, found) for given, found in wanted):
        return False
    match which.state:
        case "any":
            return True
        case "open":
            return row.ended_us is None
        case "overdue":
            return row.ended_us is None and row.due_us <= which.now_us
        case "unraised":
            return row.ended_us is None and row.due_us <= which.now_us and not row.raised
        case "ended":
            return row.ended_us is not None
        case "twice":
            return row.ends > 1


# -- checking ------------------------------------------------------------------------------------


def event_values(events: Iterable[EventRow], r: Reaction | None) -> Iterator[Iterable[Any]]:
    """Yield everything of a commit's event half that has to be storable."""
    for e in events:
        yield e.slot, e.id, e.type, e.version, e.key, e.source, e.at_us, e.conversation, e.cause
        yield e.trace, e.data
    if r is None:
        return
    for rows in (
        r.marks, r.remarks, r.parked, r.dead, r.states, r.shadows, r.awaited, r.kept,
        r.conversations,
    ):  # fmt: skip
        for row in rows:
            yield msgspec.structs.astuple(row)
    yield r.undead
    for tuples in (r.unparked, r.asked, r.unawaited, r.cursors, r.members):
        yield from tuples


# -- copies --------------------------------------------------------------------------------------


def _event(event: EventRow) -> EventRow:
    """Copy an event without what must not leave its writer."""
    return msgspec.structs.replace(event, value=None)


def _handler(row: HandlerRow) -> HandlerRow:
    return msgspec.structs.replace(row, types=list(row.types))


def _copies(rows: Iterable[T]) -> list[T]:
    return [copy(row) for row in rows]


def _first(limit: int, rows: Iterable[T]) -> list[T]:
    return [copy(row) for _, row in zip(range(limit), rows, strict=False)]
