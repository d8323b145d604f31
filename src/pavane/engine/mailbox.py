"""The mailbox: published events that runs wait for, by type and key.

Both sides of the meeting are in one partition of the run's home service: the event, by its key, and
the run's wait, which travels there as a message. They are taken one at a time per key, so an event
that comes at the same instant as the wait is either found by it or finds it. An event is kept for
as long as the workflow says, and given once to each run that waits; a wait that is given up gives
back what it was given but did not take.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import msgspec
from msgspec import Raw

from pavane.core.baton import ENDED, chain_of
from pavane.core.envelope import Await, Reply, pack, unpack
from pavane.errors import PavaneError
from pavane.handler import Handler, HandlerOptions, current_handler
from pavane.service import Service
from pavane.stores.eventlog import AwaitRow, EventRow, KeptRow, Reaction
from pavane.stores.port import Commit, InboxRow, Message, Store

if TYPE_CHECKING:
    from pavane.engine.handling import Handling
    from pavane.engine.session import Session

MAILBOX = "~mailbox"
Place = tuple[str, str, str]
"""Home service, event type, key."""
OTHERS_MAX = 3


class Kept(msgspec.Struct, frozen=True):
    """An event that the mailbox of `service` kept, or keeps until `until_us`, and nobody took.

    `others` are runs that took another one of its type and key instead, and whether they have ended
    since.
    """

    service: str
    pos: int
    until_us: int
    others: dict[str, bool]

    @property
    def said(self) -> str:
        """Say who took another one."""
        return "; ".join(
            f"run {run} took another one of its key{', and has ended' if has_ended else ''}"
            for run, has_ended in self.others.items()
        )


class Mailbox:
    """Owns the waits of one session's partitions; see the module."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._store = session.store
        self._locks: dict[Place, tuple[asyncio.Lock, list[int]]] = {}

    async def keep(
        self, handling: Handling, service: Service, row: EventRow, keep_s: float
    ) -> None:
        """Keep a published event, and give it to the runs that wait for it; in its commit."""
        place = (service.name, row.type, row.key)
        await self._take(place)
        handling.settled.append(lambda: self._release(place))
        now = self._session.now_us()
        expires_us = row.at_us + round(keep_s * 1e6)
        if expires_us > now:
            handling.reaction.kept = [KeptRow(*place, row.pos, expires_us)]
        given: list[AwaitRow] = []
        served: set[str] = set()
        for waiting in await self._store.awaits(*place):
            run = chain_of(waiting.run)[0]
            if waiting.pos == 0 and run not in served:
                served.add(run)
                given.append(self._give(waiting, row, handling.messages, now))
        handling.reaction.awaited = given

    def await_message(self, message: Message) -> None:
        """Note that a run waits, or find what came before; or forget that it waits."""
        self._session.spawn(self._await(message, unpack(Await, message.body)))

    async def _await(self, message: Message, wanted: Await) -> None:
        place = (wanted.home, wanted.type, wanted.key)
        await self._take(place)
        now = self._session.now_us()

        def written(error: PavaneError | None) -> None:
            self._release(place)
            self._session.consumed(message)

        if message.id in await self._store.seen(message.to, [message.id]):
            written(None)
            return
        reaction = Reaction()
        messages: list[Message] = []
        rows = await self._store.awaits(*place)
        first, _ = chain_of(wanted.run)
        mine = [row for row in rows if chain_of(row.run)[0] == first]
        known = next((row for row in mine if row.run == wanted.run and row.id == wanted.id), None)
        if message.kind == "unawait":
            reaction.unawaited = [(wanted.run, wanted.id)]
            left = [row for row in mine if row is not known]
            waiting = next((row for row in left if row.pos == 0), None)
            if known is not None and known.pos and waiting is not None:
                reaction.awaited = await self._find(place, waiting, left, messages, now)
        elif known is not None and known.pos:
            # It was asked for again, by a run that was taken back to before it came.
            found = (await self._store.events_at([known.pos])).get(known.pos)
            if found is not None:
                self._give(known, found, messages, now)
        elif known is None:
            row = AwaitRow(*place, wanted.run, wanted.id, now, message.body)
            reaction.awaited = await self._find(place, row, mine, messages, now) or [row]
        if not self._session.owns(message.target):
            self._release(place)  # it was handed over meanwhile, or is about to be
            return
        mark = InboxRow(message.to, message.id, now)
        self._session.submit(Commit(written, inbox=[mark], messages=messages, reaction=reaction))

    async def _find(
        self, place: Place, row: AwaitRow, mine: list[AwaitRow], messages: list[Message], now: int
    ) -> list[AwaitRow]:
        """Give the run the first kept event that it was not given yet."""
        taken = {other.pos for other in mine if other.pos}
        kept = [
            kept.pos
            for kept in await self._store.kept_events(*place)
            if kept.pos not in taken and kept.expires_us > now
        ]
        keep_us = unpack(Await, row.reply).keep_us
        for pos in kept:
            found = (await self._store.events_at([pos])).get(pos)
            if found is not None and (not keep_us or found.at_us + keep_us > now):
                return [self._give(row, found, messages, now)]
        return []

    def _give(
        self, waiting: AwaitRow, event: EventRow, messages: list[Message], now: int
    ) -> AwaitRow:
        wanted = unpack(Await, waiting.reply)
        reply = Reply(
            wanted.run, wanted.op, wanted.era, wanted.fingerprint, True, Raw(event.data),
            event.source, 0, event.at_us, version=event.version,
        )  # fmt: skip
        target = self._store.target_of(wanted.home, wanted.run)
        messages.append(
            Message("reply", wanted.id, wanted.home, wanted.run, pack(reply), now, target)
        )
        return AwaitRow(
            waiting.service, waiting.type, waiting.key, waiting.run, waiting.id, waiting.at_us,
            waiting.reply, event.pos,
        )  # fmt: skip

    async def _take(self, place: Place) -> None:
        lock, users = self._locks.setdefault(place, (asyncio.Lock(), [0]))
        users[0] += 1
        try:
            await lock.acquire()
        except BaseException:
            self._forget(place)
            raise

    def _release(self, place: Place) -> None:
        self._locks[place][0].release()
        self._forget(place)

    def _forget(self, place: Place) -> None:
        _, users = self._locks[place]
        users[0] -= 1
        if not users[0]:
            del self._locks[place]


async def read_mail(
    store: Store, service: str, event: EventRow
) -> tuple[list[AwaitRow], Kept | None]:
    """Return who took an event from the mailbox of `service`, or that nobody did."""
    place = (service, event.type, event.key)
    given = [row for row in await store.awaits(*place) if row.pos]
    taken = [row for row in given if row.pos == event.pos]
    if taken:
        return taken, None
    kept = [row.expires_us for row in await store.kept_events(*place) if row.pos == event.pos]
    others: dict[str, bool] = {}
    for run in dict.fromkeys(row.run for row in given[-OTHERS_MAX:]):
        rows = await store.run_rows(run)
        others[run] = any(r.service == r.home and r.status in ENDED for r in rows)
    return [], Kept(service, event.pos, max(kept, default=0), others)


def mailbox_of(service: Service) -> Handler | None:
    """Return the handler that keeps published events for the runs of `service`, if any waits."""
    keeps: dict[Any, float] = {}
    for workflow in service.workflows.values():
        for event in cast("tuple[Any, ...]", workflow.receives):
            if event.event_key is not None:
                ttl_s = workflow.keep_s if event.event_ttl_s is None else event.event_ttl_s
                keeps[event] = max(keeps.get(event, 0.0), min(workflow.keep_s, ttl_s))
    if not keeps:
        return None

    async def keep(event: Any) -> None:
        handling = cast("Handling", current_handler.get())
        await handling.mailbox.keep(handling, service, handling.row, keeps[type(event)])

    options = HandlerOptions(breaker=None)
    return Handler(service, keep, MAILBOX, tuple(keeps), options, ())
