"""What flowed in a conversation: its events, what handlers made of them, and its runs.

Read from the store alone, so it works without the code of the services. A conversation need not
have a contract, and is found by its id, by an event in it or by a run in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pavane.contract import ConversationOverdue
from pavane.core.envelope import Start, unpack
from pavane.engine.held import decode_header
from pavane.engine.mailbox import MAILBOX
from pavane.errors import UnknownName
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


class Traffic(msgspec.Struct):
    """See the module. Events are in log order; `runs` are the rows at all services.

    `reached` tells, for handlers and slots of these events, up to where everything is handled.
    `cut`: there is more than was read.
    """

    id: str
    events: list[EventRow]
    marks: list[MarkRow] = []
    parked: list[ParkedEvent] = []
    dead: list[DeadRow] = []
    handlers: list[HandlerRow] = []
    reached: dict[tuple[int, int], int] = {}
    awaits: list[AwaitRow] = []
    runs: list[RunRow] = []
    cut: bool = False

    @property
    def last(self) -> EventRow | None:
        """The newest event, but for one that says that the conversation is overdue."""
        overdue = ConversationOverdue.event_type
        return next((event for event in reversed(self.events) if event.type != overdue), None)

    def subscribers(self, event: EventRow) -> list[HandlerRow]:
        """Return the handlers of an event's type, without those that keep it for runs."""
        return [h for h in self.handlers if event.type in h.types and h.name != MAILBOX]

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
    runs = await store.runs_in(conversation)
    traffic.cut = traffic.cut or len(runs) > RUNS_MAX
    for run in runs[:RUNS_MAX]:
        rows = await store.run_rows(run)
        if rows and decode_header(rows[0].header).conversation == conversation:
            traffic.runs += rows
            traffic.awaits += await store.awaits_of(run)
    return traffic


def homes(runs: Sequence[RunRow]) -> list[RunRow]:
    """Return one row for each run: the one at its home."""
    return [row for row in runs if row.service == row.home]
