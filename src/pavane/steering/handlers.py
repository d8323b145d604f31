"""Handlers as people see them: what they do now, how far behind they are, pausing and resuming."""

from __future__ import annotations

from typing import Literal

import msgspec

from pavane.engine.breaker import BREAKER, BY_HAND
from pavane.engine.mailbox import MAILBOX
from pavane.engine.session import tell_nodes
from pavane.errors import BadArguments
from pavane.handler import Handler
from pavane.steering.desk import Desk, full_name
from pavane.stores.eventlog import DeadFilter, HandlerRow
from pavane.stores.port import LAST_US

State = Literal["working", "paused", "breaker", "shadow", "share", "idle", "undeclared"]


class HandlerStatus(msgspec.Struct, frozen=True):
    """What can be told of a handler at a glance.

    `state`: "idle" when no node hosts its service, "breaker" while most of its events fail,
    "undeclared" when its service is in the app's code and it is not. `reason` says more of a
    pause. `backlog` counts events that it has not begun with, `parked` those that wait for another
    attempt or behind one. A share has none of its own: its events are those of `instead_of`.
    """

    service: str
    name: str
    types: list[str]
    state: State
    reason: str
    until_us: int
    backlog: int
    parked: int
    dead: int
    created_us: int
    instead_of: str = ""
    share: float | None = None
    keeps_for_runs: bool = False
    """Whether it is the one that keeps events for the runs of its service."""


class HandlerDesk:
    """The handlers of a store; see the module."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._store = desk.store

    async def list(self) -> list[HandlerStatus]:
        """Return all handlers, by service and name; shares after those they take from."""
        hosted = await self._desk.hosted()
        counts: dict[int, int] = {}
        for no, _, _, count, _, _ in await self._store.dead_counts(DeadFilter()):
            counts[no] = counts.get(no, 0) + count
        found: list[HandlerStatus] = []
        for row in await self._desk.rows():
            handler = self._desk.declared(row)
            found.append(await self._status(row, handler, hosted, counts.get(row.no, 0)))
            found += [
                _share_status(share, found[-1])
                for share in self._desk.registry.handlers_of(row.service)
                if share.options.share is not None and share.instead_of is handler
            ]
        return found

    async def _status(
        self, row: HandlerRow, handler: Handler | None, hosted: set[str], dead: int
    ) -> HandlerStatus:
        shadows = handler is not None and handler.options.shadow
        return HandlerStatus(
            row.service, row.name, row.types, self._state(row, shadows, hosted), row.reason,
            row.paused_until_us, await self._store.backlog(row.no),
            await self._store.parked_count(row.no), dead, row.created_us,
            repr(handler.instead_of) if handler is not None and handler.instead_of else "",
            keeps_for_runs=row.name == MAILBOX,
        )  # fmt: skip

    def _state(self, row: HandlerRow, shadows: bool, hosted: set[str]) -> State:
        if self._desk.is_abandoned(row):
            return "undeclared"
        if row.reason.startswith(BREAKER):
            return "breaker"
        if row.paused_until_us > self._store.now_us():
            return "paused"
        if row.service not in hosted:
            return "idle"
        return "shadow" if shadows else "working"

    async def hosted(self) -> set[str]:
        """Return the services that a live node works for."""
        return await self._desk.hosted()

    async def full_name(self, name: str) -> str:
        """Return "SERVICE.NAME" of a handler, or raise UnknownName."""
        return full_name(await self._desk.row(name))

    async def pause(self, name: str, *, reason: str = BY_HAND) -> str:
        """Let a handler begin nothing more, soon and on all nodes; return its full name.

        Events wait in the log meanwhile; what is under way ends.
        """
        row = await self._desk.row(name)
        await self._store.pause_handler(
            row.no, LAST_US, reason.removeprefix(BREAKER).strip() or BY_HAND
        )
        await tell_nodes(self._store)
        return full_name(row)

    async def is_paused(self, name: str) -> bool:
        """Tell whether a person or its breaker paused a handler."""
        row = await self._desk.row(name)
        return bool(row.reason) or row.paused_until_us > self._store.now_us()

    async def resume(self, name: str) -> str:
        """Let a handler go on, also one that its breaker paused; return its full name."""
        row = await self._desk.row(name)
        await self._store.pause_handler(row.no, 0, "")
        await tell_nodes(self._store)
        return full_name(row)

    async def check_unused(self, name: str) -> HandlerStatus:
        """Return a handler that may be forgotten, or raise BadArguments with what is to do first.

        That is one that no code has any more: not the app's, or, where the app does not have its
        service, not that of any node at work.
        """
        return await self._unused_status(await self._unused(name))

    async def forget(self, name: str) -> HandlerStatus:
        """Delete what the store knows of a handler that is not in the code any more.

        What waits for it is given up; the events stay in the log until they are pruned, which it
        holds up no longer. Return what it was. Nodes that run older code with it must be stopped
        before: they know nothing of this. Raises UnknownName and BadArguments; see `check_unused`.
        """
        row = await self._unused(name)
        status = await self._unused_status(row)
        if not await self._store.forget_handler(row.no):
            raise _has_dead_letters(full_name(row))
        return status

    async def _unused(self, name: str) -> HandlerRow:
        row = await self._desk.row(name)
        known = full_name(row)
        if self._desk.declared(row) is not None:
            raise BadArguments(
                f"Handler {known} is declared in the app's code; delete it there first."
            )
        if not self._desk.is_abandoned(row) and row.service in await self._desk.hosted():
            raise BadArguments(
                f"A node works for {row.service} now, perhaps with {known}. Stop it, or name the "
                f"app that it runs, whose code tells."
            )
        if await self._store.dead_letters(DeadFilter(handlers=(row.no,), limit=1)):
            raise _has_dead_letters(known)
        return row

    async def _unused_status(self, row: HandlerRow) -> HandlerStatus:
        return await self._status(row, None, await self._desk.hosted(), 0)


def _has_dead_letters(name: str) -> BadArguments:
    return BadArguments(
        f"Handler {name} has dead letters; see to them first: `pavane dead list --handler {name}`, "
        f"then `pavane dead drop --handler {name}`."
    )


def _share_status(share: Handler, main: HandlerStatus) -> HandlerStatus:
    state = "share" if main.state == "working" else main.state
    return HandlerStatus(
        main.service, share.name, list(share.events), state, main.reason, main.until_us, 0, 0, 0,
        main.created_us, repr(share.instead_of), share.options.share,
    )  # fmt: skip
