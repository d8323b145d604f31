"""What flowed in a conversation: its events, what handlers made of them, and its runs.

Read from the store alone, so it works without the code of the services. A conversation need not
have a contract, and is found by its id, by an event in it or by a run in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

import msgspec

from pavane.contract import ConversationOverdue
from pavane.core.envelope import Start, unpack
from pavane.core.journal import Entry, decode_chunk, effective
from pavane.engine.held import decode_header
from pavane.engine.mailbox import MAILBOX, Kept, read_mail
from pavane.engine.process import hosted_services
from pavane.errors import CorruptJournal, UnknownName
from pavane.stores.eventlog import (
    AwaitRow,
    DeadFilter,
    DeadRow,
    EventFilter,
    EventRow,
    HandlerRow,
    MarkRow,
    ParkedEvent,
)
from pavane.stores.port import RunRow, Store

EVENTS_MAX = 5000
"""Of a larger conversation only the newest events are read."""
RUNS_MAX = 1000
NEEDS_MAX = 100
"""Of so many runs that are under way it is read what they wait for."""
MAIL_MAX = 200
"""Of so many events, the newest, it is told who took them from a mailbox."""


class Traffic(msgspec.Struct):
    """See the module. Events are in log order; `runs` are the rows at all services.

    `reached` tells, for handlers and slots of these events, up to where everything is handled.
    `hosted` are the services that a live node works for, None if that is not known; `needs` those
    from which a run waits for an answer. `cut`: there is more than was read.
    """

    id: str
    events: list[EventRow]
    marks: list[MarkRow] = []
    parked: list[ParkedEvent] = []
    dead: list[DeadRow] = []
    handlers: list[HandlerRow] = []
    reached: dict[tuple[int, int], int] = {}
    awaits: list[AwaitRow] = []
    """Who took which of the events from a mailbox, also runs of other conversations."""
    kept: list[Kept] = []
    mailed: set[tuple[int, int]] = set()
    """(mailbox, position) of the events that are, or were, in a mailbox."""
    runs: list[RunRow] = []
    hosted: set[str] | None = None
    needs: dict[str, set[str]] = {}
    cut: bool = False

    @property
    def flow(self) -> list[EventRow]:
        """The events without those that say that it is overdue, and what came of these."""
        late = {e.id for e in self.events if e.type == ConversationOverdue.event_type}
        if not late:
            return self.events
        causes = {row.id: decode_header(row.header).cause for row in homes(self.runs)}
        causes |= {event.id: event.cause for event in self.events}

        def is_late(id: str) -> bool:
            seen: set[str] = set()
            while id in causes and id not in seen and id not in late:
                seen.add(id)
                id = causes[id]
            return id in late

        return [event for event in self.events if not is_late(event.id)]

    @property
    def last(self) -> EventRow | None:
        """The newest event of its flow."""
        return next(reversed(self.flow), None)

    def idle(self, services: Iterable[str]) -> set[str]:
        """Return those of `services` that no node hosts."""
        return set() if self.hosted is None else set(services) - self.hosted

    def subscribers(self, event: EventRow) -> list[HandlerRow]:
        """Return the handlers of an event's type; a mailbox until the event is in it."""
        return [
            handler for handler in self.handlers
            if event.type in handler.types and (handler.no, event.pos) not in self.mailed
        ]  # fmt: skip

    def is_ahead(self, handler: HandlerRow, event: EventRow) -> bool:
        """Tell whether the handler has yet to come to this event."""
        return self.reached.get((handler.no, event.slot), event.pos) < event.pos


async def conversation_of(store: Store, id: str) -> str:
    """Return the conversation that `id` (of itself, an event or a run) belongs to."""
    event = await store.event(id)
    if event is not None:
        return event.conversation
    for row in await store.run_rows(id):
        return decode_header(row.header).conversation
    if await store.find_events(EventFilter(conversation=id, limit=1)) or await store.runs_in(id):
        return id
    message = await store.message(id)
    if message is not None and message.kind == "start":
        return unpack(Start, message.body).header.conversation
    raise UnknownName(
        f"No conversation, event or run is called {id!r} in {(await store.describe())['place']}. "
        f"`pavane conversations list` shows those under a contract, `pavane events list` what was "
        f"published; old ones are deleted in the end."
    )


async def read_traffic(store: Store, conversation: str) -> Traffic:
    """Return what flowed in a conversation so far."""
    which = EventFilter(conversation=conversation, limit=EVENTS_MAX + 1)
    events = await store.find_events(which)
    traffic = Traffic(conversation, events[:EVENTS_MAX][::-1], cut=len(events) > EVENTS_MAX)
    positions = [event.pos for event in traffic.events]
    types = {event.type for event in traffic.events}
    slots = {event.slot for event in traffic.events}
    if positions:
        traffic.marks = await store.marks_at(positions)
        traffic.parked = await store.parked_at(positions)
        traffic.dead = await store.dead_letters(DeadFilter(positions=tuple(positions)))
        traffic.handlers = await store.handler_rows()
    for handler in traffic.handlers:
        if types & set(handler.types):
            cursors = await store.cursors(handler.no)
            traffic.reached |= {(handler.no, slot): cursors.get(slot, 0) for slot in slots}
    traffic.hosted = await hosted_services(store)
    runs = await store.runs_in(conversation)
    traffic.cut = traffic.cut or len(runs) > RUNS_MAX
    for run in runs[:RUNS_MAX]:
        rows = await store.run_rows(run)
        if rows and decode_header(rows[0].header).conversation == conversation:
            traffic.runs += rows
    await _read_mail(store, traffic)
    await _read_needs(store, traffic)
    return traffic


async def _read_needs(store: Store, traffic: Traffic) -> None:
    live = [row for row in traffic.runs if row.status in ("running", "waiting")]
    for row in live[:NEEDS_MAX]:
        entries: list[Entry] = []
        with suppress(CorruptJournal):  # then the run tells of it
            for chunk in (await store.journals([row.no])).get(row.no, ()):
                entries += decode_chunk(chunk.body)
        traffic.needs[row.id] = set(_asked(effective(entries)))


def _asked(delivered: Sequence[Entry]) -> Iterator[str]:
    """Yield the services of steps and children that a run has asked for and waits for."""
    issued = [mark for entry in delivered for mark in entry.asked]
    done = {entry.op for entry in delivered}
    for op, mark in enumerate(issued):
        kind, _, name = mark.partition(" ")
        if op not in done and kind in ("step", "undo", "child"):
            yield name.partition(".")[0]


async def _read_mail(store: Store, traffic: Traffic) -> None:
    mailboxes = {row.no: row for row in traffic.handlers if row.name == MAILBOX}
    events = {event.pos: event for event in traffic.events}
    traffic.mailed = {
        (mark.handler, mark.pos) for mark in traffic.marks
        if mark.handler in mailboxes and mark.outcome == "done"
    }  # fmt: skip
    for pos, no in sorted((pos, no) for no, pos in traffic.mailed)[-MAIL_MAX:]:
        taken, kept = await read_mail(store, mailboxes[no].service, events[pos])
        traffic.awaits += taken
        traffic.kept += [kept] if kept is not None else []


def homes(runs: Sequence[RunRow]) -> list[RunRow]:
    """Return one row for each run: the one at its home."""
    return [row for row in runs if row.service == row.home]
