"""The monitor: follows the conversations of one contract, and tells of those that are overdue.

It only reads what services do anyway: the log of events, from a position of its own, which is
written in one commit with what it made of the events up to there. One node at a time does it, and
following an event twice changes nothing. Nobody waits for it: while it is down, processes go on,
events are pruned as ever, and it reads what it missed when it is back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import partial

import msgspec

from pavane.contract import Contract, ConversationOverdue
from pavane.engine.duties import MONITOR, monitor_name
from pavane.engine.publishing import derived_id, event_row
from pavane.engine.session import Session
from pavane.engine.words import event_in_words
from pavane.observe.progress import follow, milestones_of
from pavane.observe.traffic import Traffic, read_traffic
from pavane.observe.trouble import find_trouble
from pavane.stores.eventlog import (
    ConversationFilter,
    ConversationRow,
    EventFilter,
    EventRow,
    Reaction,
    StateRow,
)
from pavane.stores.port import Commit, Store, durable, submit_alone

log = logging.getLogger("pavane.monitor")

POLL_S = 0.2
PAGE = 200
PACE_S = 0.002
SHY = 2.0
"""So much longer than it works it rests, while it is behind."""
STRIDE = 20_000
"""Positions without anything of interest after which the own position is written nevertheless."""
MARGIN_US = 100_000
"""What was published so long before its deadline is in the log by now."""
ENDS_MAX = 1000


class Monitor:
    """Watches one contract; see the module. It is a `Duty`."""

    def __init__(self, contract: Contract) -> None:
        self.contract = contract
        self.name = monitor_name(contract.name)

    async def prepare(self, store: Store) -> None:
        """Let a new contract begin at the end of the log."""
        if await self._position(store) is None:
            commit = Commit(reaction=self._moved(await store.events_head()))
            await durable(commit, partial(submit_alone, store))

    async def run(self, session: Session) -> None:
        """Follow what happens until cancelled."""
        position = await self._position(session.store) or 0
        loop = asyncio.get_running_loop()
        while True:
            began_s = loop.time()
            position, is_behind = await self.run_once(session, position)
            # Also when much waits, the services of this node have most of the time.
            await asyncio.sleep(SHY * (loop.time() - began_s) if is_behind else POLL_S)

    async def run_once(self, session: Session, position: int) -> tuple[int, bool]:
        """Read a page, or look for what is overdue; return the new position, and if more waits."""
        store = session.store
        now_us, head = store.now_us(), await store.events_head()
        types = self.contract.types
        events = await store.read_events(position, head, PAGE, types) if head > position else []
        until = events[-1].pos if len(events) == PAGE else head
        if events or until > position + STRIDE:
            reaction = self._moved(until)
            reaction.conversations = await self._followed(store, events)
            await session.durable(reaction=reaction)
        if len(events) == PAGE:
            return until, True
        return (until if events else position), await self._tell_of_overdue(session, now_us)

    # -- following -----------------------------------------------------------------------------

    async def _followed(self, store: Store, events: Iterable[EventRow]) -> list[ConversationRow]:
        rows: dict[str, ConversationRow] = {}
        recount: set[str] = set()
        for event in events:
            id = event.conversation
            row = rows.get(id) or await store.conversation(self.contract.name, id)
            ends = 0 if row is None else row.ends
            row = follow(self.contract, row, event)
            if row is None:
                continue
            rows[id] = row
            if ends and row.ends > ends:
                recount.add(id)
        for id in recount:  # one of them may have been followed before
            which = EventFilter(types=self.contract.ends, conversation=id, limit=ENDS_MAX)
            rows[id].ends = len(await store.find_events(which))
        return list(rows.values())

    async def _position(self, store: Store) -> int | None:
        body = await store.state(MONITOR, self.contract.name, "")
        return None if body is None else msgspec.json.decode(body, type=int)

    def _moved(self, position: int) -> Reaction:
        return Reaction(states=[StateRow(MONITOR, self.contract.name, "", b"%d" % position)])

    # -- overdue -------------------------------------------------------------------------------

    async def _tell_of_overdue(self, session: Session, now_us: int) -> bool:
        """Publish, once each, that conversations are overdue; tell whether there may be more."""
        which = ConversationFilter(
            contract=self.contract.name, state="unraised", now_us=now_us - MARGIN_US, limit=PAGE
        )
        rows = await session.store.conversations(which)
        for row in rows:
            event = await self._overdue(session.store, row)
            row.raised = True
            await session.durable(reaction=Reaction(conversations=[row]), events=[event])
            log.warning("conversation %s of %s is overdue", row.id, self.contract.name)
            await asyncio.sleep(PACE_S)
        return len(rows) == PAGE

    async def _overdue(self, store: Store, row: ConversationRow) -> EventRow:
        now_us = store.now_us()
        try:
            traffic = await read_traffic(store, row.id)
        except msgspec.DecodeError as error:  # a damaged row must not hide all other conversations
            log.error("conversation %s cannot be read: %s", row.id, error)
            traffic = Traffic(row.id, [])
        trouble = find_trouble(traffic, now_us)
        missing = [
            passed.type for passed in milestones_of(self.contract, row, now_us)
            if passed.reached_us is None
        ]  # fmt: skip
        event = ConversationOverdue(
            contract=self.contract.name, conversation=row.id, subject=row.key,
            started=_utc(row.started_us), due=_utc(row.due_us),
            last=event_in_words(trouble.last or row.last),
            last_at=_utc(trouble.last_us or row.last_us), missing=missing,
            trouble=trouble.sentence,
        )  # fmt: skip
        last = traffic.last
        return event_row(
            store, event, id=derived_id(row.id, f"overdue {self.contract.name}"),
            source=MONITOR, at_us=now_us, conversation=row.id, cause=last.id if last else "",
            trace=last.trace if last else "",
        )  # fmt: skip


def _utc(at_us: int) -> datetime:
    return datetime.fromtimestamp(at_us / 1e6, UTC)
