"""Custody: events that a handler cannot be done with at once, kept in the store.

A failing event is parked with its next attempt, and what is behind it in its key too, so that
neither memory nor the cursor waits; in the end it becomes a dead letter. Before anything that may
have been under way when a process died is touched again, it is parked with that death counted, so
what kills processes is found. What people ask for dead letters and old events passes here too.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pavane.core.codec import encode_error, error_summary
from pavane.core.envelope import Redo, unpack
from pavane.engine.config import SUSPECT_DEATHS
from pavane.engine.consumer import PAGE, taken_up
from pavane.engine.handling import mark
from pavane.engine.subscription import QUEUE_MAX, Item, Lane, Subscription
from pavane.errors import (
    BadEvent,
    CorruptJournal,
    LeaseLost,
    Locked,
    NotDeclared,
    NotDecodable,
    NotEncodable,
    PavaneError,
    StoreError,
    TooLarge,
)
from pavane.policy import Retry
from pavane.stores.eventlog import (
    DeadFilter,
    DeadRow,
    EventRow,
    MarkRow,
    ParkedEvent,
    Reaction,
    ShadowRow,
    StateRow,
)
from pavane.stores.port import LAST_US, Commit, Conflict, InboxRow, Message

if TYPE_CHECKING:
    from pavane.engine.session import Session

log = logging.getLogger("pavane.custody")

FINAL = (BadEvent, NotDeclared, NotEncodable, NotDecodable, TooLarge)
"""Errors that another attempt would meet again."""
CAUSE_MAX = 200
EDITED = "~edited"
"""Owns, as states by handler and position, the payloads with which events were handled again."""
REDO_PAUSE_S = 0.01
REDO_LATER_S = 0.5
_CODE = re.compile(r"[1-5]\d\d")
"""Numbers that tell causes apart, as 404 and 503 do."""
_TOKEN = re.compile(r"[\w-]+(?:[.:][\w-]+)*")


class Custody:
    """Owns what is parked for the handlers of one session; see the module."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._store = session.store
        self._config = session.config
        self._loop = asyncio.get_running_loop()
        self._asked: deque[Message] = deque()
        self._is_answering = False
        self._about_to_park: set[tuple[int, int]] = set()
        """(handler, position) of what was asked for and is not durable yet."""

    # -- what was under way --------------------------------------------------------------------

    async def take_over(
        self, subscription: Subscription, slots: list[int], cursors: dict[int, int], until: int
    ) -> set[int]:
        """Park, with one death counted, what may have been under way when a process died."""
        if subscription.paused_until_us:
            return set()  # nothing was under way
        after = min(cursors.get(slot, 0) for slot in slots)
        types = list(subscription.handler.events)
        found: list[EventRow] = []
        while after < until and len(found) < QUEUE_MAX:
            rows = await self._store.read_events(after, until, PAGE, types, slots)
            upto = rows[-1].pos if len(rows) == PAGE else until
            handled = await taken_up(self._store, subscription.no, slots, after, upto)
            found += [
                row for row in rows
                if row.pos > cursors.get(row.slot, 0) and row.pos not in handled
            ]  # fmt: skip
            after = upto
        now = self._session.now_us()
        parked = [
            ParkedEvent(subscription.no, row.pos, row.slot, row.key, 1, now, now)
            for row in found[:QUEUE_MAX]
        ]
        await self._count(subscription, parked)
        return {row.pos for row in parked}

    async def load(
        self,
        subscription: Subscription,
        slots: Sequence[int],
        dirty: set[int],
        counted: set[int],
    ) -> list[Lane]:
        """Rebuild the lanes of parked events; return those whose first one may kill processes."""
        heads: list[ParkedEvent] = []
        after = 0
        now = self._session.now_us()
        while True:
            rows = await self._store.parked_events(subscription.no, slots, after, PAGE)
            for row in rows:
                key = row.key or row.pos
                lane = subscription.lanes.get(key)
                if lane is None:
                    lane = subscription.lanes[key] = Lane(key, row.slot)
                if lane.head is None:
                    lane.head = row
                    heads.append(row)
                else:
                    lane.behind += 1
            if len(rows) < PAGE:
                break
            after = rows[-1].pos
        which = DeadFilter(handlers=(subscription.no,), slots=tuple(slots), holding=True)
        for dead in await self._store.dead_letters(which):
            lane = subscription.lanes.setdefault(dead.key, Lane(dead.key, dead.slot))
            lane.stopped = True
        under_way = [
            row for row in heads
            if row.slot in dirty and row.pos not in counted
            and (row.due_us <= now or row.due_us == LAST_US)  # its turn had come, or it was due
            and not subscription.lanes[row.key or row.pos].stopped
            and not subscription.paused_until_us
        ]  # fmt: skip
        calm = [row for row in under_way if row.deaths < SUSPECT_DEATHS]
        await self._count(subscription, calm)
        return [subscription.lanes[row.key or row.pos] for row in under_way if row not in calm]

    async def try_suspect(self, subscription: Subscription, lane: Lane) -> None:
        """Count one more touch of a parked event, durably, then handle it, alone."""
        head = lane.head
        if head is None or lane.stopped or subscription.lanes.get(lane.key) is not lane:
            return
        if subscription.paused_until_us:
            return  # it is not touched now, so that counts for nothing
        if head.deaths + 1 >= self._config.deaths_max:
            row = (await self._store.events_at([head.pos])).get(head.pos)
            if row is not None and not lane.stopped and lane.head is head:
                text = (
                    f"Quarantined: {head.deaths + 1} processes died while {subscription.handler!r} "
                    f"handled this event. Find out why, then `pavane dead retry`."
                )
                item = Item(row, head)
                lane.head, lane.busy = None, True
                self._bury(subscription, [lane], item, PavaneError(text))
            return
        await self._count(subscription, [head])
        self.go_on(subscription, lane)
        while lane.busy and self._session.open:
            await asyncio.sleep(0.005)

    async def _count(self, subscription: Subscription, parked: Sequence[ParkedEvent]) -> None:
        """Count a death, durably, for each of these; see `Deaths.touched`."""
        if not parked:
            return
        for row in parked:
            target = self._session.target_at(subscription.handler.service.name, row.slot)
            touched = self._session.deaths.touched[target]
            touched.events[row.handler, row.pos] = row.deaths
            row.deaths += 1
        await self._session.durable(reaction=Reaction(parked=parked))

    # -- what is next in a key -----------------------------------------------------------------

    def go_on(self, subscription: Subscription, lane: Lane) -> None:
        """Let a lane do what is next: its parked events first."""
        if lane.busy or lane.stopped:
            return
        if lane.head is not None:
            delay_s = (lane.head.due_us - self._session.now_us()) / 1e6
            if lane.head.due_us == LAST_US or delay_s <= 0:
                subscription.queue(lane)
            else:
                self._loop.call_later(delay_s, self._due, subscription, lane, lane.head)
        elif lane.behind:
            lane.busy = True
            self._session.spawn(self._next_parked(subscription, lane))
        else:
            subscription.wake(lane)

    def _due(self, subscription: Subscription, lane: Lane, head: ParkedEvent) -> None:
        if lane.head is head and self._session.open:
            self.go_on(subscription, lane)

    async def _next_parked(self, subscription: Subscription, lane: Lane) -> None:
        """Find the parked event that is next in its key; it is durable or about to be."""
        flushed = False
        after, key = (lane.key - 1, "") if isinstance(lane.key, int) else (0, lane.key)
        while self._session.open:
            rows = await self._store.parked_events(subscription.no, [lane.slot], after, 1, key)
            if rows and lane.key in (rows[0].key, rows[0].pos):
                lane.head = rows[0]
                lane.behind -= 1
                break
            if flushed:
                lane.behind = 0
                break
            await self._session.committer.flush()
            flushed = True
        lane.busy = False
        self.go_on(subscription, lane)

    def resume(self, subscription: Subscription, lane: Lane) -> None:
        """Handle the parked event at the head of a lane."""
        assert lane.head is not None
        head, lane.head = lane.head, None
        subscription.began()
        self._session.spawn(self._resume_from_store(subscription, lane, head))

    async def _resume_from_store(
        self, subscription: Subscription, lane: Lane, head: ParkedEvent
    ) -> None:
        row = (await self._store.events_at([head.pos])).get(head.pos)
        if row is not None:
            self._session.handlers.make_call(subscription, [lane], [Item(row, head)])
            return
        subscription.ended()
        log.error("event %d of handler %r is gone", head.pos, subscription.handler)
        gone = Reaction(unparked=[(subscription.no, head.pos)])
        await self._session.durable(reaction=gone)
        lane.busy = False
        self.go_on(subscription, lane)
        subscription.unanswered()

    # -- what failed ---------------------------------------------------------------------------

    def failed(
        self, subscription: Subscription, lanes: list[Lane], items: list[Item],
        error: BaseException,
    ) -> None:  # fmt: skip
        """Park each event for its next attempt, or give it up."""
        if len(items) == 1:
            self._failed_one(subscription, lanes, items[0], error)
            return
        self.try_alone(subscription, lanes, items, encode_error(error))

    def try_alone(
        self, subscription: Subscription, lanes: list[Lane], items: list[Item], raw: bytes
    ) -> None:
        """One of a batch may be to blame: from now on each is tried alone."""
        now = self._session.now_us()
        by_key: dict[Any, Lane] = {lane.key: lane for lane in lanes}
        parked: list[ParkedEvent] = []
        for item in items:
            lane = by_key[item.row.key or item.row.pos]
            row = self._parked(subscription, item, now, raw)
            if lane.head is None:
                lane.head = row
            else:
                row.due_us = LAST_US
                lane.behind += 1
            parked.append(row)
        self._park(subscription, lanes, items, parked)

    def _failed_one(
        self, subscription: Subscription, lanes: list[Lane], item: Item, error: BaseException
    ) -> None:
        retry: Retry = subscription.options.retry
        counts = not isinstance(error, Locked)
        delay_s = None if counts else Locked.pause_s
        if counts and not isinstance(error, FINAL):
            elapsed_s = (self._session.now_us() - item.began_us) / 1e6
            delay_s = retry.delay_s(item.attempt, error, elapsed_s, self._session.process.random)
        if subscription.options.shadow or delay_s is None:
            self._bury(subscription, lanes, item, error)
            return
        raw = encode_error(error)
        number = item.attempt

        def told() -> None:
            log.info(
                "%r failed on event %s (attempt %d), next in %.2f s: %s", subscription.handler,
                item.row.id, number, delay_s, error_summary(raw),
            )  # fmt: skip

        item.attempt += counts
        due_us = self._session.now_us() + round(delay_s * 1e6)
        row = self._parked(subscription, item, due_us, raw)
        lanes[0].head = row
        self._park(subscription, lanes, [item], [row], told)

    def _parked(
        self, subscription: Subscription, item: Item, due_us: int, error: bytes
    ) -> ParkedEvent:
        old = item.parked
        return ParkedEvent(
            subscription.no, item.row.pos, item.row.slot, item.row.key, item.attempt, due_us,
            item.began_us, error, 0, item.again, item.data, old.dead if old is not None else 0,
        )  # fmt: skip

    def _park(
        self, subscription: Subscription, lanes: list[Lane], items: list[Item],
        parked: list[ParkedEvent], told: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """Write the next attempts, and take what waits in their lanes into custody behind them.

        `told` is called if they are written: they may be another node's by now.
        """

        def written(error: PavaneError | None) -> None:
            if told is not None and error is None:
                told()
            if not isinstance(error, (LeaseLost, StoreError)):
                self._session.handlers.settled(subscription, lanes, items)

        for lane in lanes:
            self._park_queue(subscription, lane)
        self._session.submit(Commit(written, reaction=Reaction(parked=parked)))

    def _park_queue(self, subscription: Subscription, lane: Lane) -> None:
        behind, lane.queue = list(lane.queue), deque()
        self.park_behind(subscription, lane, behind)

    def park_behind(self, subscription: Subscription, lane: Lane, items: list[Item]) -> None:
        """Take events into custody that wait behind another of their key."""
        if not items:
            return
        lane.behind += len(items)

        def written(error: PavaneError | None) -> None:
            if not isinstance(error, (LeaseLost, StoreError)):
                subscription.settled(items)

        parked = [self._parked(subscription, item, LAST_US, b"null") for item in items]
        self._session.submit(Commit(written, reaction=Reaction(parked=parked)))

    def _bury(
        self, subscription: Subscription, lanes: list[Lane], item: Item, error: BaseException
    ) -> None:
        """Give an event up: it becomes a dead letter, and its key goes on or waits, as declared."""
        lane, row = lanes[0], item.row
        raw = encode_error(error)
        cause = cause_of(raw, row)
        holds = subscription.options.on_dead == "stop" and bool(row.key)
        if subscription.options.shadow:
            log.warning(
                "shadow %r failed on event %s, which changes nothing: %s", subscription.handler,
                row.id, error_summary(raw),
            )  # fmt: skip
        else:
            log.error("%r gave up event %s: %s", subscription.handler, row.id, error_summary(raw))

        def written(failure: PavaneError | None) -> None:
            if isinstance(failure, Conflict):
                self._session.handlers.was_handled(subscription, lanes, [item])
            elif not isinstance(failure, (LeaseLost, StoreError)):
                self._session.handlers.settled(subscription, lanes, [item])

        reaction = Reaction()
        mark(reaction, subscription.no, [item], "dead", self._session.now_us())
        if subscription.options.shadow:
            now = self._session.now_us()
            reaction.shadows = [ShadowRow(subscription.no, row.pos, now, b"[]", raw)]
        else:
            reaction.dead = [
                DeadRow(
                    0, subscription.no, row.pos, row.slot, row.key, row.type, row.id,
                    self._session.now_us(), item.attempt, cause, raw,
                    row.data if item.data is None else item.data, holds, "", item.again,
                )
            ]  # fmt: skip
            if holds:
                lane.stopped = True
                self._park_queue(subscription, lane)
        self._session.submit(Commit(written, reaction=reaction))

    # -- what people ask for -------------------------------------------------------------------

    def redo_message(self, message: Message) -> None:
        """Handle a dead letter once more, or drop it; or handle an old event again."""
        if not self._session.open:
            return
        self._asked.append(message)
        if not self._is_answering:
            self._is_answering = True
            self._session.spawn(self._answer_all())

    async def _answer_all(self) -> None:
        """Take what was asked for one after the other: the log's order is the order per key."""
        try:
            while self._asked and self._session.open:
                message = self._asked.popleft()
                try:
                    await self._redo(message, unpack(Redo, message.body))
                except CorruptJournal as error:
                    log.error("message %s: %s", message.id, error)
                    self._session.consumed(message)
        finally:
            self._is_answering = False

    async def _redo(self, message: Message, redo: Redo) -> None:
        if await self._store.seen(message.to, [message.id]):
            self._session.consumed(message)
            return
        letters = await self._store.dead_letters(DeadFilter(numbers=(redo.dead,)))
        dead = letters[0] if redo.dead and letters else None
        subscription = self._session.handlers.by_no.get(redo.handler)
        row = (await self._store.events_at([redo.pos])).get(redo.pos)
        if not self._session.owns(message.target):
            return  # it was handed over meanwhile, or is about to be
        if row is None or (redo.dead and dead is None):
            self._answer(message, Reaction())  # it is over already
        elif subscription is not None:
            await self._redo_in(subscription, message, redo, row, dead)
        elif redo.drop:
            self._answer(message, self._dropped(redo))
        else:
            log.error("message %s is for a handler that is not declared here", message.id)
            asked = [(redo.dead, "")] if redo.dead else []
            self._answer(message, Reaction(asked=asked), for_good=False)

    def _answer(
        self, message: Message, reaction: Reaction, *, for_good: bool = True,
        then: Callable[[PavaneError | None], None] | None = None,
    ) -> None:  # fmt: skip
        """Write what becomes of a request; unless `for_good`, it may be made once more."""

        def written(error: PavaneError | None) -> None:
            self._session.consumed(message)
            if then is not None:
                then(error)

        commit = Commit(written, reaction=reaction)
        if for_good:
            commit.inbox = [InboxRow(message.to, message.id, self._session.now_us())]
        self._session.submit(commit)

    def _dropped(self, redo: Redo) -> Reaction:
        now = self._session.now_us()
        remark = MarkRow(redo.handler, redo.pos, now, 0, 0, "dropped")
        return Reaction(undead=[redo.dead], remarks=[remark])

    async def _redo_in(
        self, subscription: Subscription, message: Message, redo: Redo, row: EventRow,
        dead: DeadRow | None,
    ) -> None:  # fmt: skip
        place = (subscription.no, row.pos)
        if place in self._about_to_park or await self._is_parked(*place):
            # An earlier request for the same event is not over yet.
            self._loop.call_later(REDO_LATER_S, self.redo_message, message)
            return
        while self._session.owns(message.target) and row.slot not in subscription.slots:
            await asyncio.sleep(REDO_PAUSE_S)  # its partition is being taken over
        if not self._session.owns(message.target):
            return
        if redo.drop:
            reaction = self._dropped(redo)
        else:
            redone = self._redone(subscription, redo, row, dead)
            edited = StateRow(EDITED, str(subscription.no), str(row.pos), redone.data)
            undead = [redo.dead] if redo.dead else []
            reaction = Reaction(undead=undead, parked=[redone], states=[edited])
            self._about_to_park.add(place)

        def then(error: PavaneError | None) -> None:
            self._about_to_park.discard(place)
            if error is None:
                self._granted(subscription, row, dead, redo.drop)

        self._answer(message, reaction, then=then)

    async def _is_parked(self, no: int, pos: int) -> bool:
        return any(parked.handler == no for parked in await self._store.parked_at([pos]))

    def _redone(
        self, subscription: Subscription, redo: Redo, row: EventRow, dead: DeadRow | None
    ) -> ParkedEvent:
        now = self._session.now_us()
        data = bytes(redo.data) if bytes(redo.data) != b"null" else None
        if data is None and dead is not None and dead.data != row.data:
            data = dead.data
        again = redo.again or (dead.again if dead is not None else "")
        return ParkedEvent(
            subscription.no, row.pos, row.slot, row.key, 1, now, now, again=again, data=data,
            dead=redo.dead,
        )  # fmt: skip

    def _granted(
        self, subscription: Subscription, row: EventRow, dead: DeadRow | None, drop: bool
    ) -> None:
        """What was asked for an event is durable: let its key go on, with this event first."""
        progress = subscription.slots.get(row.slot)
        if progress is None or progress.limit is not None:
            return  # the next owner of the slot finds it in the store
        key = row.key or row.pos
        lane = subscription.lanes.get(key)
        if lane is None:
            lane = subscription.lanes[key] = Lane(key, row.slot)
        if dead is not None and dead.holds:
            lane.stopped = False
        if not drop:
            lane.behind += 1
            if lane.head is not None and not lane.busy and row.pos < lane.head.pos:
                lane.behind += 1
                lane.head = None  # what was asked for is older
            self._park_queue(subscription, lane)
        self.go_on(subscription, lane)


def cause_of(error: bytes, event: EventRow) -> str:
    """Return an error in one line that is the same for all events which failed alike.

    The event's id and key, and what else looks like an id, an amount or a time, is left out.
    """
    kind, colon, text = error_summary(error).partition(": ")
    for own in (event.id, event.key):
        if own:
            text = re.sub(rf"(?<!\w){re.escape(own)}(?!\w)", "…", text)
    return f"{kind}{colon}{_TOKEN.sub(_without_what_varies, text)}"[:CAUSE_MAX]


def _without_what_varies(token: re.Match[str]) -> str:
    text = token[0]
    varies = any(c.isdigit() for c in text) and not _CODE.fullmatch(text)
    return "…" if varies else text
