"""Conversations for people: which there are, how they stand, and what holds them up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from pavane.contract import Contract
from pavane.engine.duties import monitor_name
from pavane.engine.process import hosted_services
from pavane.observe.progress import Passed, State, milestones_of, state_of
from pavane.observe.traffic import Traffic, conversation_of, read_traffic
from pavane.observe.trouble import Trouble, read_trouble
from pavane.stores.eventlog import ConversationFilter, ConversationRow
from pavane.stores.port import Store

STORED: dict[State, Literal["open", "overdue", "ended", "twice"]] = {
    "open": "open", "overdue": "overdue", "stuck": "overdue", "on-time": "ended", "late": "ended",
    "twice": "twice",
}  # fmt: skip
LOOKED_AT_MAX = 10_000


class ConversationStatus(msgspec.Struct, frozen=True):
    """How a conversation stands under one contract. Times are microseconds since the epoch.

    `key` is that of the event (or the id of the run) that began it; `last` the newest event that
    the contract names; `trouble` is what holds it up, of one that is overdue or stuck.
    """

    id: str
    contract: str
    state: State
    key: str
    started_us: int
    due_us: int
    ended_us: int | None
    end: str
    ends: int
    last: str
    last_us: int
    milestones: list[Passed]
    raised: bool
    trouble: Trouble | None = None


class Conversation(msgspec.Struct, frozen=True):
    """One conversation: under which contracts it is, and all that flowed in it."""

    id: str
    contracts: list[ConversationStatus]
    traffic: Traffic
    trouble: Trouble


class Conversations:
    """What a client can ask about conversations; needs no code of theirs, just the store."""

    def __init__(self, store: Store, contracts: Mapping[str, Contract]) -> None:
        self._store = store
        self._contracts = contracts

    async def list(
        self, *, contract: str | None = None, state: State | None = None, limit: int = 100
    ) -> list[ConversationStatus]:
        """Return conversations under a contract, newest start first."""
        store = self._store
        now_us = store.now_us()
        found: list[ConversationStatus] = []
        counted: dict[int, tuple[int, int]] = {}
        asked = LOOKED_AT_MAX if state in ("overdue", "stuck", "on-time", "late", "open") else limit
        which = ConversationFilter(
            contract=contract, state="any" if state is None else STORED[state], now_us=now_us,
            limit=asked,
        )  # fmt: skip
        for row in await store.conversations(which):
            if state not in (None, state_of(row, now_us), state_of(row, now_us, stuck=True)):
                continue
            status = await self._status(row, now_us, counted)
            if state in (None, status.state):
                found.append(status)
            if len(found) == limit:
                break
        return found

    async def unwatched(self, contracts: Iterable[str]) -> list[str]:
        """Return those of `contracts` that no node watches now."""
        hosted = await hosted_services(self._store)
        return sorted({name for name in contracts if monitor_name(name) not in hosted})

    async def show(self, id: str) -> Conversation:
        """Return the conversation that `id` (of itself, an event or a run) belongs to.

        Raises UnknownName if nothing is called so.
        """
        store = self._store
        conversation = await conversation_of(store, id)
        traffic = await read_traffic(store, conversation)
        trouble = await read_trouble(store, traffic)
        now_us = store.now_us()
        rows = await store.conversations(ConversationFilter(id=conversation))
        contracts = [self._judged(row, now_us, trouble) for row in rows]
        return Conversation(conversation, contracts, traffic, trouble)

    async def _status(
        self, row: ConversationRow, now_us: int, counted: dict[int, tuple[int, int]]
    ) -> ConversationStatus:
        trouble = None
        if state_of(row, now_us) == "overdue":
            traffic = await read_traffic(self._store, row.id)
            trouble = await read_trouble(self._store, traffic, counted)
        return self._judged(row, now_us, trouble)

    def _judged(
        self, row: ConversationRow, now_us: int, trouble: Trouble | None
    ) -> ConversationStatus:
        state = state_of(row, now_us, stuck=trouble is not None and trouble.stuck)
        return ConversationStatus(
            row.id, row.contract, state, row.key, row.started_us, row.due_us, row.ended_us, row.end,
            row.ends, row.last, row.last_us,
            milestones_of(self._contracts.get(row.contract), row, now_us), row.raised,
            trouble if state in ("overdue", "stuck") else None,
        )  # fmt: skip
