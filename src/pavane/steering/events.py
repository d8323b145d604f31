"""Published events as people see them: what became of one, and the replay of history.

A replay handles old events by one handler once more. It has a name, which goes into the ids of what
the handler publishes, so that this is published anew; the same name again goes on where an
interrupted replay stopped, and handles nothing twice.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

import msgspec
from msgspec import Raw

from pavane.contract import is_internal
from pavane.core.codec import error_summary
from pavane.core.envelope import Redo
from pavane.engine.custody import EDITED
from pavane.engine.held import decode_header
from pavane.engine.mailbox import MAILBOX, Kept, read_mail
from pavane.engine.publishing import cloud_event, read_event
from pavane.errors import BadArguments, UnknownName
from pavane.steering.desk import PAGE, Asking, Desk, Place, full_name
from pavane.stores.eventlog import (
    DeadFilter,
    DeadRow,
    EventFilter,
    EventRow,
    HandlerRow,
    MarkRow,
    ParkedEvent,
)
from pavane.stores.port import LAST_US

SCAN = 1000
RUNS_MAX = 200

Became = Literal["done", "expired", "dead", "dropped", "parked", "behind", "waiting", "passed over"]


class Handled(msgspec.Struct, frozen=True):
    """What became of an event at one handler.

    `outcome`: "parked" waits for its next attempt at `due_us`, "behind" for an earlier event of its
    key, "waiting" is still in the log, "passed over" was never for it: filtered out, too old, or
    published before the handler began; `why` says which, if it is known. `variant` names the share
    that handled it; `dead` is the number of its dead letter; `data` is what it was handled with, if
    that is not what was published.
    """

    handler: str
    outcome: Became
    at_us: int = 0
    took_us: int = 0
    attempts: int = 0
    variant: str = ""
    error: str = ""
    due_us: int = 0
    dead: int = 0
    why: str = ""
    data: Raw | None = None

    @property
    def service(self) -> str:
        return self.handler.partition(".")[0]

    @property
    def is_in_mailbox(self) -> bool:
        """Tell whether this is a mailbox, which has kept the event or given it to runs."""
        return self.outcome == "done" and self.handler == f"{self.service}.{MAILBOX}"


class Taken(msgspec.Struct, frozen=True):
    """A run that was given the event by the mailbox of `service`."""

    service: str
    run: str


class EventStory(msgspec.Struct, frozen=True):
    """An event as it was published, and everything that became of it."""

    event: EventRow
    envelope: dict[str, Any]
    handled: list[Handled]
    caused: list[EventRow]
    started: list[str]
    taken: list[Taken]
    kept: list[Kept]
    """In which mailboxes it is, or was, without being taken."""


class Replay(msgspec.Struct, frozen=True):
    """Which events of the past a handler is to handle again; unset fields do not restrict."""

    types: tuple[str, ...] = ()
    key: str | None = None
    since_us: int = 0
    until_us: int = LAST_US


class Plan(msgspec.Struct, frozen=True):
    """What a replay will do: how many events, and how many are left out because of what."""

    handler: str
    count: int
    in_custody: int
    """About to be handled anyway."""
    dead: int
    """Dead letters, which are retried as such."""
    ahead: int
    """Not handled for the first time yet."""
    until: int
    """The log position up to which it looks."""


class Events:
    """The published events of a store; see the module."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._store = desk.store

    async def list(self, which: EventFilter | None = None) -> list[EventRow]:
        """Return published events, newest first, without Pavane's own."""
        which = which or EventFilter()
        types = which.types or [type for type, _, _ in await self._store.event_types()]
        types = tuple(type for type in types if not is_internal(type))
        if not types:
            return []
        return await self._store.find_events(msgspec.structs.replace(which, types=types))

    async def get(self, id: str) -> EventRow:
        found = await self._store.event(id)
        if found is None:
            place = (await self._store.describe())["place"]
            raise UnknownName(
                f"No event has the id {id!r} in {place}. `pavane events list` shows what is there; "
                f"old ones are pruned once everybody has handled them."
            )
        return found

    # -- the story of one event ----------------------------------------------------------------

    async def story(self, id: str) -> EventStory:
        """Return an event with who handled it, who is about to, and what it caused."""
        event = await self.get(id)
        caused = await self._store.find_events(
            EventFilter(conversation=event.conversation, cause=event.id, limit=SCAN)
        )
        handled = await self._handled(event)
        taken: list[Taken] = []
        kept: list[Kept] = []
        for service in [h.service for h in handled if h.is_in_mailbox]:
            given, left = await read_mail(self._store, service, event)
            taken += [Taken(service, row.run) for row in given]
            kept += [left] if left is not None else []
        return EventStory(
            event, cloud_event(event), [h for h in handled if not h.is_in_mailbox],
            sorted((row for row in caused if not is_internal(row.type)), key=lambda row: row.pos),
            await self._started(event), taken, kept,
        )  # fmt: skip

    async def _handled(self, event: EventRow) -> list[Handled]:
        rows = {row.no: row for row in await self._desk.rows()}
        at = (event.pos,)
        marks = {mark.handler: mark for mark in await self._store.marks_at(at)}
        parked = {row.handler: row for row in await self._store.parked_at(at)}
        dead = {
            row.handler: row for row in await self._store.dead_letters(DeadFilter(positions=at))
        }
        found: list[Handled] = []
        for no, row in rows.items():
            name = full_name(row)
            if no in parked:
                found.append(_waits(name, parked[no]))
            elif no in marks:
                edited = await self._store.state(EDITED, str(no), str(event.pos))
                found.append(_done(name, marks[no], dead.get(no), edited))
            elif event.type in row.types and not self._desk.is_abandoned(row):
                position = (await self._store.cursors(no)).get(event.slot, 0)
                passed = event.pos <= position
                found.append(
                    Handled(name, "passed over", why=self._why_passed(row, event)) if passed
                    else Handled(name, "waiting")
                )  # fmt: skip
        order = {"waiting": 1, "passed over": 2}
        return sorted(found, key=lambda h: (order.get(h.outcome, 0), h.at_us, h.handler))

    def _why_passed(self, row: HandlerRow, event: EventRow) -> str:
        """Say why an event was not for a handler, as far as that can be told afterwards."""
        handler = self._desk.declared(row)
        if event.at_us < row.created_us and (handler is None or handler.options.since is None):
            return "it is from before the handler began"
        cls = None if handler is None else handler.events.get(event.type)
        if handler is None or cls is None:
            return ""
        where, ttl_s = handler.options.where, cls.event_ttl_s
        if where is not None:
            try:
                is_wanted = bool(where(read_event(cls, event)))
            except Exception:  # of the user's function, too
                return ""
            if not is_wanted:
                return "its where= filters it out"
        return "" if ttl_s is None else f"it was older than its ttl of {ttl_s:g} s"

    async def _started(self, event: EventRow) -> list[str]:
        found: list[str] = []
        for id in (await self._store.runs_in(event.conversation))[:RUNS_MAX]:
            rows = await self._store.run_rows(id)
            if any(r.service == r.home and decode_header(r.header).cause == event.id for r in rows):
                found.append(id)
        return found

    # -- replaying -----------------------------------------------------------------------------

    async def plan(self, into: str, which: Replay) -> Plan:
        """Return what `replay` would do; raise for a handler or event type that is not there."""
        row = await self._desk.row(into)
        for name in which.types:
            if name not in row.types:
                raise BadArguments(
                    f"Handler {full_name(row)} does not handle {name!r}; it handles "
                    f"{', '.join(row.types)}."
                )
        if self._desk.is_abandoned(row):
            raise BadArguments(f"Handler {full_name(row)} is not declared any more.")
        until = await self._store.events_head()
        count = in_custody = dead = ahead = 0
        async for page in self._pages(row, which, until):
            chosen = await self._choose(row, page)
            count += len(chosen.rows)
            in_custody, dead = in_custody + chosen.in_custody, dead + chosen.dead
            ahead += chosen.ahead
        return Plan(full_name(row), count, in_custody, dead, ahead, until)

    def replay(self, into: str, which: Replay, name: str, *, until: int | None = None) -> Asking:
        """Have events handled again: `await` it, or iterate for the progress.

        `name` names this replay: what it asked for before, under that name, is passed over and not
        counted, so that an interrupted call can be made again.
        """
        return Asking(self._replay(into, which, name, until))

    async def _replay(
        self, into: str, which: Replay, name: str, until: int | None
    ) -> AsyncIterator[int]:
        if not name or not all(c.isalnum() or c in "-_." for c in name):
            raise BadArguments(f"{name!r} is no name for a replay: use letters, digits, '-_.'.")
        row = await self._desk.row(into)
        head = await self._store.events_head() if until is None else until
        before = await self._store.parked_count(row.no)
        async for page in self._pages(row, which, head):
            chosen = (await self._choose(row, page)).rows
            for at in range(0, len(chosen), PAGE):
                part = chosen[at : at + PAGE]
                requests = [
                    (
                        f"~replay-{name}-{row.no}-{event.pos}",
                        Place(event.pos, event.key, event.id),
                        Redo(row.no, event.pos, again=name),
                    )
                    for event in part
                ]
                known = await self._store.seen(row.service, [id for id, _, _ in requests])
                new = [request for request in requests if request[0] not in known]
                if new:
                    await self._desk.ask(row, new)
                yield len(new)
                if new and len(part) == PAGE:
                    await self._desk.let_catch_up(row, [id for id, _, _ in new], before)

    async def _pages(
        self, row: HandlerRow, which: Replay, until: int
    ) -> AsyncIterator[Sequence[EventRow]]:
        after = 0
        types = list(which.types or row.types)
        while True:
            events = await self._store.read_events(after, until, SCAN, types)
            yield [
                event for event in events
                if which.since_us <= event.at_us <= which.until_us
                and (which.key is None or event.key == which.key)
            ]  # fmt: skip
            if len(events) < SCAN:
                return
            after = events[-1].pos

    async def _choose(self, row: HandlerRow, events: Sequence[EventRow]) -> _Chosen:
        """Leave out what the handler handles anyway, and what people must decide on."""
        if not events:
            return _Chosen([], 0, 0, 0)
        positions = tuple(event.pos for event in events)
        cursors = await self._store.cursors(row.no)
        marks = await self._store.marks(row.no, positions[0] - 1, positions[-1])
        marked = {mark.pos for mark in marks}
        parked = {p.pos for p in await self._store.parked_at(positions) if p.handler == row.no}
        letters = DeadFilter(handlers=(row.no,), positions=positions, limit=len(positions))
        dead = {letter.pos for letter in await self._store.dead_letters(letters)}
        ahead = {
            event.pos for event in events
            if event.pos > cursors.get(event.slot, 0) and event.pos not in marked
        } - parked  # fmt: skip
        left_out = parked | dead | ahead
        rows = [event for event in events if event.pos not in left_out]
        return _Chosen(rows, len(parked), len(dead - parked), len(ahead - dead))


class _Chosen(msgspec.Struct):
    rows: list[EventRow]
    in_custody: int
    dead: int
    ahead: int


def _waits(name: str, row: ParkedEvent) -> Handled:
    error = "" if row.error == b"null" else error_summary(row.error)
    data = None if row.data is None else Raw(row.data)
    if row.due_us == LAST_US:
        return Handled(name, "behind", row.began_us, error=error, data=data)
    return Handled(
        name, "parked", row.began_us, attempts=row.attempt - 1, error=error, due_us=row.due_us,
        data=data,
    )  # fmt: skip


def _done(name: str, mark: MarkRow, letter: DeadRow | None, edited: bytes | None) -> Handled:
    return Handled(
        name, mark.outcome, mark.at_us, mark.took_us, mark.attempts, mark.by,
        "" if letter is None else error_summary(letter.error),
        dead=0 if letter is None else letter.no, data=None if edited is None else Raw(edited),
    )  # fmt: skip
