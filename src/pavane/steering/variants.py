"""Experiments: how a shadow or a share differs from the handler that it is compared with.

A shadow is given the same events, so what it would have published is compared, event by event, with
what the current handler did publish. A share is given other keys, so only totals can be compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

import msgspec
from msgspec import Raw

from pavane.core.codec import error_summary
from pavane.engine.publishing import derived_id
from pavane.errors import BadArguments
from pavane.handler import Handler
from pavane.steering.desk import Desk
from pavane.stores.eventlog import EventFilter, EventRow, HandlerRow, MarkRow

EVENTS_MAX = 1000
"""Events that a comparison looks at, the newest ones."""
POSITIONS_MAX = 20_000
PUBLISHED_MAX = 256
"""Events that a handler may have published for one event and still be compared."""
SAMPLE = 200


class Published(msgspec.Struct, frozen=True):
    """An event as far as two handlers can differ in it."""

    type: str
    key: str
    data: Any


class Difference(msgspec.Struct, frozen=True):
    """One event for which the two did not do the same."""

    event: str
    type: str
    key: str
    at_us: int
    current: list[Published]
    shadow: list[Published]
    error: str = ""
    """What the shadow failed with, if it did."""


class ShadowComparison(msgspec.Struct, frozen=True):
    """What a shadow would have published, compared with what the current handler published.

    `waiting` counts events that the current handler has not handled (or gave up), so that nothing
    can be compared; `failed` is part of `differ`.
    """

    shadow: str
    current: str
    same: int
    differ: int
    failed: int
    waiting: int
    differences: list[Difference]


class Side(msgspec.Struct, frozen=True):
    """One side of a share, over the newest events; `published` is per handled event, by type."""

    handler: str
    handled: int
    dead: int
    retried: int
    took_us: int
    published: dict[str, float]


class ShareComparison(msgspec.Struct, frozen=True):
    """Totals of the current handler and of those that take a share of its keys."""

    current: Side
    shares: list[Side]


class Variants:
    """Compares shadows and shares with the handlers that they are to replace."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._store = desk.store

    def find(self, name: str) -> Handler | None:
        """Return the shadow or share of this name, full or not, if there is exactly one."""
        variants = [h for h in self._desk.registry.handlers() if h.instead_of is not None]
        found = [h for h in variants if name in (repr(h), h.name)]
        return found[0] if len(found) == 1 else None

    async def shadow(self, name: str, differences: int = 5) -> ShadowComparison:
        """Compare a shadow with its current handler, over the newest events that it saw."""
        handler = self.find(name)
        if handler is None or not handler.options.shadow or handler.instead_of is None:
            raise BadArguments(f"{name!r} is no shadow in this app's code.")
        row = await self._desk.row(repr(handler))
        current = await self._desk.row(repr(handler.instead_of))
        shadows = await self._store.shadows(row.no, EVENTS_MAX)
        positions = [shadow.pos for shadow in shadows]
        events = await self._store.events_at(positions)
        done = {
            mark.pos: mark for mark in await self._store.marks_at(positions)
            if mark.handler == current.no and mark.outcome == "done"
        }  # fmt: skip
        same = differ = failed = waiting = 0
        found: list[Difference] = []
        for shadow in shadows:
            event, mark = events.get(shadow.pos), done.get(shadow.pos)
            if event is None or mark is None:
                waiting += event is not None
                continue
            would = [_published(raw) for raw in msgspec.json.decode(shadow.events)]
            did = await self._did_publish(current, mark, event)
            error = "" if shadow.error == b"null" else error_summary(shadow.error)
            if not error and would == did:
                same += 1
                continue
            differ, failed = differ + 1, failed + bool(error)
            if len(found) < differences:
                found.append(
                    Difference(event.id, event.type, event.key, event.at_us, did, would, error)
                )
        return ShadowComparison(
            repr(handler), repr(handler.instead_of), same, differ, failed, waiting, found
        )

    async def share(self, name: str) -> ShareComparison:
        """Compare a handler with those that take a share of its keys, over the newest events."""
        handler = self.find(name)
        main = handler.instead_of if handler is not None and handler.options.share else None
        row = await self._desk.row(name if main is None else repr(main))
        shares = [
            h for h in self._desk.registry.handlers_of(row.service)
            if h.options.share is not None and repr(h.instead_of) == f"{row.service}.{row.name}"
        ]  # fmt: skip
        head = await self._store.events_head()
        marks = await self._store.marks(row.no, max(0, head - POSITIONS_MAX), head)
        names = ["", *(h.name for h in shares)]
        sides = [
            await self._side(row, by, [mark for mark in marks if mark.by == by]) for by in names
        ]
        return ShareComparison(sides[0], sides[1:])

    async def _side(self, row: HandlerRow, by: str, marks: Sequence[MarkRow]) -> Side:
        done = [mark for mark in marks if mark.outcome == "done"]
        sample = done[-SAMPLE:]
        events = await self._store.events_at([mark.pos for mark in sample])
        types: Counter[str] = Counter()
        for mark in sample:
            if mark.pos in events:
                did = await self._did_publish(row, mark, events[mark.pos])
                types.update(published.type for published in did)
        return Side(
            f"{row.service}.{by or row.name}", len(done),
            sum(mark.outcome == "dead" for mark in marks), sum(mark.attempts > 1 for mark in done),
            round(median(mark.took_us for mark in done)) if done else 0,
            {type: round(count / len(sample), 3) for type, count in sorted(types.items())},
        )  # fmt: skip

    async def _did_publish(
        self, handler: HandlerRow, mark: MarkRow, event: EventRow
    ) -> list[Published]:
        """Return what a handler published for an event: what bears the ids that derive from it."""
        which = EventFilter(conversation=event.conversation, cause=event.id, limit=PUBLISHED_MAX)
        caused = await self._store.find_events(which)
        name = f"{handler.service}.{mark.by or handler.name}"
        ids = {
            derived_id(event.conversation, f"{event.id}>{name}#{count}")
            for count in range(1, PUBLISHED_MAX + 1)
        }
        mine = sorted((row for row in caused if row.id in ids), key=lambda row: row.pos)
        return [_published({"type": r.type, "key": r.key, "data": Raw(r.data)}) for r in mine]


def _published(raw: dict[str, Any]) -> Published:
    data = raw["data"]
    plain = msgspec.json.decode(bytes(data)) if isinstance(data, Raw) else data
    return Published(raw["type"], raw["key"], plain)
