"""Dead letters: events that a handler gave up, and the way back out of them.

A retry or a drop is asked for once per dead letter, in one commit with the note that it was. The
owner of its partition then handles the event again, before what is later in its key, or marks it as
dropped. A retry that fails again is a new dead letter, under a new number.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

import msgspec
from msgspec import Raw

from pavane.core.codec import RemoteTraceback, decode_error, encode, error_summary
from pavane.core.envelope import Redo
from pavane.engine.publishing import read_event
from pavane.errors import BadArguments, BadEvent, TooLarge, UnknownName
from pavane.event import key_of, type_for
from pavane.steering.desk import PAGE, Asking, Desk, Place, full_name
from pavane.stores.eventlog import DeadFilter, DeadRow, EventRow, HandlerRow

Ask = Literal["retry", "drop"]


class DeadQuery(msgspec.Struct, frozen=True):
    """Which dead letters; unset fields do not restrict. `cause` is part of the cause's text."""

    handler: str | None = None
    type: str | None = None
    key: str | None = None
    cause: str | None = None
    numbers: tuple[int, ...] = ()


class DeadGroup(msgspec.Struct, frozen=True):
    """Dead letters of one handler and event type that failed alike."""

    handler: str
    type: str
    cause: str
    count: int
    first_us: int
    last_us: int


class DeadLetter(msgspec.Struct, frozen=True):
    """One event that a handler gave up, with the error; `asked` is what was asked for since."""

    no: int
    handler: str
    type: str
    key: str
    event: str
    at_us: int
    attempts: int
    cause: str
    error: str
    trace: str
    data: Raw
    is_edited: bool
    """Whether `data` is not what was published."""
    holds: bool
    """Whether later events of its key wait for it."""
    asked: str
    published: EventRow | None


class DeadLetters:
    """The dead letters of a store; see the module."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._store = desk.store

    # -- looking -------------------------------------------------------------------------------

    async def groups(self, which: DeadQuery | None = None) -> list[DeadGroup]:
        """Return dead letters grouped by handler, type and cause, most first."""
        which = which or DeadQuery()
        names = {row.no: full_name(row) for row in await self._desk.rows()}
        counts = await self._store.dead_counts(await self._filter(which))
        return [
            DeadGroup(names.get(no, f"handler {no}"), type, cause, count, first_us, last_us)
            for no, type, cause, count, first_us, last_us in counts
            if which.cause is None or which.cause in cause
        ]

    async def list(self, which: DeadQuery | None = None, limit: int = 100) -> list[DeadRow]:
        """Return single dead letters, oldest first."""
        found: list[DeadRow] = []
        async for page in self._pages(which or DeadQuery()):
            found += page
            if len(found) >= limit:
                break
        return found[:limit]

    async def names(self) -> dict[int, str]:
        """Return the full names of handlers by their numbers."""
        return {row.no: full_name(row) for row in await self._desk.rows()}

    async def get(self, no: int) -> DeadLetter:
        """Return all of one dead letter, or raise UnknownName."""
        row = await self._row(no)
        published = await self._store.event(row.event)
        return DeadLetter(
            row.no, (await self.names()).get(row.handler, f"handler {row.handler}"), row.type,
            row.key, row.event, row.at_us, row.attempts, row.cause, error_summary(row.error),
            _trace(row.error), Raw(row.data),
            published is not None and published.data != row.data, row.holds, row.asked, published,
        )  # fmt: skip

    async def _row(self, no: int) -> DeadRow:
        found = await self._store.dead_letters(DeadFilter(numbers=(no,)))
        if not found:
            raise UnknownName(
                f"No dead letter has number {no}; perhaps it was retried or dropped. "
                f"`pavane dead list --each` shows what is there."
            )
        return found[0]

    async def _filter(self, which: DeadQuery) -> DeadFilter:
        handlers = () if which.handler is None else ((await self._desk.row(which.handler)).no,)
        return DeadFilter(handlers, which.type, which.key, numbers=which.numbers)

    async def _pages(self, which: DeadQuery) -> AsyncIterator[Sequence[DeadRow]]:
        filter = msgspec.structs.replace(await self._filter(which), limit=PAGE)
        while rows := await self._store.dead_letters(filter):
            page = [row for row in rows if which.cause is None or which.cause in row.cause]
            if page:
                yield page
            filter = msgspec.structs.replace(filter, after=rows[-1].no)

    # -- asking --------------------------------------------------------------------------------

    async def count(self, which: DeadQuery) -> dict[str, int]:
        """Return how many could be retried or dropped, by handler; what was asked for is left out.

        Raises UnknownName for a number that no dead letter has.
        """
        names = await self.names()
        counts: dict[str, int] = {}
        missing = set(which.numbers)
        async for page in self._pages(which):
            for row in page:
                missing.discard(row.no)
                name = names.get(row.handler, f"handler {row.handler}")
                counts[name] = counts.get(name, 0) + (not row.asked)
        if missing:
            await self._row(min(missing))
        return {name: count for name, count in counts.items() if count}

    def retry(self, which: DeadQuery) -> Asking:
        """Have them handled again: `await` it, or iterate for the progress.

        What was asked for before is passed over, so an interrupted call can be made again.
        """
        return Asking(self._ask_all(which, "retry"))

    def drop(self, which: DeadQuery) -> Asking:
        """Have them forgotten, and their events marked as dropped; see `retry`."""
        return Asking(self._ask_all(which, "drop"))

    async def _ask_all(self, which: DeadQuery, what: Ask) -> AsyncIterator[int]:
        handlers = {row.no: row for row in await self._desk.rows()}
        parked = {no: await self._store.parked_count(no) for no in handlers}
        began_us = self._store.now_us()
        async for page in self._pages(which):
            # One that failed again since is another dead letter, for which nobody asked.
            open_ones = [row for row in page if not row.asked and row.at_us < began_us]
            if page[0].at_us >= began_us:
                return
            for no in dict.fromkeys(row.handler for row in open_ones):
                mine = [row for row in open_ones if row.handler == no]
                ids = await self._ask(handlers[no], mine, what)
                yield len(mine)
                if len(mine) == PAGE:
                    await self._desk.let_catch_up(handlers[no], ids, parked[no])

    async def _ask(
        self, handler: HandlerRow, rows: Sequence[DeadRow], what: Ask, data: bytes | None = None
    ) -> list[str]:
        requests = [
            (
                f"~dead-{row.no}", Place(row.pos, row.key, row.event),
                Redo(
                    handler.no, row.pos, row.no, row.again, Raw(b"null" if data is None else data),
                    what == "drop",
                ),
            )
            for row in rows
        ]  # fmt: skip
        await self._desk.ask(handler, requests, [(row.no, what) for row in rows])
        return [id for id, _, _ in requests]

    async def edit(self, no: int, data: bytes) -> None:
        """Have a dead letter handled again with `data`, JSON in the version it was published in.

        Checked against its class, through the upcasts, before anything is written: BadArguments
        says what does not fit. Its key cannot change, because order depends on it.
        """
        row = await self._row(no)
        if row.asked:
            raise BadArguments(f"Dead letter {no} was asked for already: {row.asked}.")
        await self.check(row, data)
        handlers = {handler.no: handler for handler in await self._desk.rows()}
        await self._ask(handlers[row.handler], [row], "retry", _compact(data))

    async def check(self, row: DeadRow, data: bytes) -> None:
        """Raise BadArguments unless `data` can take the place of a dead letter's payload."""
        kind = type_for(row.type, self._desk.registry.events)
        published = await self._store.event(row.event)
        if published is None:
            raise BadArguments(f"Event {row.event} of dead letter {row.no} is not in the log.")
        if len(data) > self._desk.payload_max_bytes:
            raise TooLarge(f"The payload takes {len(data):,} bytes; nothing was written.")
        try:
            value: Any = read_event(kind, published, data)
        except BadEvent as error:
            raise BadArguments(f"{error} Nothing was written.") from error
        if key_of(value) != row.key:
            raise BadArguments(
                f"The key of dead letter {row.no} is {row.key!r} and would become "
                f"{key_of(value)!r}. Keys decide the order of events, so they cannot change: drop "
                f"this one and publish another event. Nothing was written."
            )


def _compact(data: bytes) -> bytes:
    return encode(msgspec.json.decode(data))


def _trace(error: bytes) -> str:
    cause = decode_error(error).__cause__
    return cause.trace.strip() if isinstance(cause, RemoteTraceback) else ""
