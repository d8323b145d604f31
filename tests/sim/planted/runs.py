"""Mistakes in how runs go on: their ids, timers, compensations, and what they are given."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any
from unittest.mock import patch
from zlib import crc32

import msgspec

from pavane.app import Client
from pavane.core import execution
from pavane.core.envelope import Reply
from pavane.core.execution import Execution
from pavane.core.journal import Entry, effective
from pavane.core.loop import DurableTimer, WorkflowLoop
from pavane.core.operations import Operation
from pavane.core.saga import Saga
from pavane.engine.held import Held
from pavane.engine.holder import Holder
from pavane.engine.steps import Attempt
from pavane.engine.timers import DueQueue
from pavane.service import StepInfo
from pavane.stores.port import Fence, MailRow, Message, ParkedRow
from pavane.testing.sim.database import SimStore
from tests.sim.planted.plant import planted

EARLY_US = 10_000


@planted("bank")
def another_key_on_retry() -> Iterator[None]:
    """Give each attempt of a step an idempotency key of its own."""
    info = Attempt.info

    def told(self: Attempt) -> StepInfo:
        given = info(self)
        key = f"{given.idempotency_key}-{given.attempt}"
        return msgspec.structs.replace(given, idempotency_key=key)

    with patch.object(Attempt, "info", told):
        yield


@planted("shop")
def another_id_when_asked_again() -> Iterator[None]:
    """Give what is sent to a run an id that its sender did not choose, each time another one."""
    send, numbers = Client.send, count()

    async def sent(self: Client, run: str, event: Any, id: str | None) -> None:
        await send(self, run, event, f"{id}-{next(numbers)}")

    with patch.object(Client, "send", sent):
        yield


@planted("shop")
def order_by_address() -> Iterator[None]:
    """Let tasks of a workflow have places in sets as if by where they are in memory."""
    numbers = count()
    next_ordinal = WorkflowLoop.next_ordinal

    def scattered(self: WorkflowLoop) -> int:
        next_ordinal(self)
        return crc32(f"{next(numbers)}".encode())

    with patch.object(WorkflowLoop, "next_ordinal", scattered):
        yield


@planted("shop")
def replay_in_another_order() -> Iterator[None]:
    """Replay results in the order in which they were asked for, not in which they came."""

    def sorted_by_operation(entries: Sequence[Entry]) -> list[Entry]:
        delivered = effective(entries)
        return delivered[:1] + sorted(delivered[1:], key=lambda entry: entry.op)

    with patch.object(execution, "effective", sorted_by_operation):
        yield


@planted("shop")
def result_matched_by_name() -> Iterator[None]:
    """Give a result to the first operation that asked for the same step."""
    reply_to = Holder._reply

    def replied(
        self: Holder, held: Held | None, reply: Reply, message: Message | None, unparked: Any
    ) -> None:
        for operation in held.execution.pending.values() if held is not None else ():
            if operation.fingerprint == reply.fingerprint:
                reply = msgspec.structs.replace(reply, op=operation.ordinal)
                break
        reply_to(self, held, reply, message, unparked)

    done = Holder.local_done

    def done_here(
        self: Holder, held: Held, operation: Operation, attempt: Attempt, ok: bool, raw: bytes
    ) -> None:
        for other in held.execution.pending.values():
            if other.fingerprint == operation.fingerprint:
                operation = other
                break
        done(self, held, operation, attempt, ok, raw)

    with patch.object(Holder, "_reply", replied), patch.object(Holder, "local_done", done_here):
        yield


@planted("shop")
def early_event_dropped() -> Iterator[None]:
    """Drop an event that comes before the run waits for it."""
    deliver = Holder._deliver_kept

    def delivered(self: Holder, held: Held, mail: MailRow, message: Message) -> None:
        if any(operation.kind == "receive" for operation in held.execution.pending.values()):
            deliver(self, held, mail, message)
        else:
            held.mail = [known for known in held.mail if known.id != mail.id]
            self._session.consumed(message)

    with patch.object(Holder, "_deliver_kept", delivered):
        yield


@planted("bank")
def marks_forgotten_at_takeover() -> Iterator[None]:
    """Know only from memory which messages took effect."""

    async def none(self: SimStore, service: str, ids: Sequence[str]) -> set[str]:
        return set()

    with patch.object(SimStore, "seen", none):
        yield


# -- timers ------------------------------------------------------------------------------------


@planted("shop")
def timer_early() -> Iterator[None]:
    """Round the time at which a timer is due, down."""
    on_timer = Execution._on_timer

    def rounded(self: Execution, handle: DurableTimer) -> None:
        on_timer(self, handle)
        if handle.operation >= 0:
            self.pending[handle.operation].deadline_us -= EARLY_US

    with patch.object(Execution, "_on_timer", rounded):
        yield


@planted("harbour")
def timers_lost_at_takeover() -> Iterator[None]:
    """Read only what becomes due from now on, in partitions that are taken over."""

    async def nothing(self: DueQueue, targets: Sequence[int]) -> None:
        return

    with patch.object(DueQueue, "catch_up", nothing):
        yield


# -- undoing -----------------------------------------------------------------------------------


@planted("bank")
def no_compensation_on_cancel() -> Iterator[None]:
    """Forget the compensations of a run that is cancelled."""
    leave = Saga.__aexit__

    async def left(self: Saga, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, asyncio.CancelledError):
            self._registered.clear()
        await leave(self, kind, error, trace)

    with patch.object(Saga, "__aexit__", left):
        yield


@planted("shop")
def undone_in_the_order_of_doing() -> Iterator[None]:
    """Compensate first what was done first."""
    leave = Saga.__aexit__

    async def left(self: Saga, kind: Any, error: Any, trace: Any) -> None:
        self._registered.reverse()
        await leave(self, kind, error, trace)

    with patch.object(Saga, "__aexit__", left):
        yield


@planted("shop")
def cancel_lost_in_a_hop() -> Iterator[None]:
    """Send no cancellation after a run that went on."""
    not_here = Holder._not_here

    def dropped(self: Holder, message: Message) -> None:
        if message.kind == "cancel":
            self._session.consumed(message)
        else:
            not_here(self, message)

    with patch.object(Holder, "_not_here", dropped):
        yield


# -- deaths ------------------------------------------------------------------------------------


@planted("poison")
def deaths_forgotten() -> Iterator[None]:
    """Touch what a process may have died of without counting that, durably, before."""

    async def untouched(
        self: SimStore, fence: Fence, runs: Mapping[int, int], parked: Sequence[ParkedRow]
    ) -> None:
        return

    with patch.object(SimStore, "touch", untouched):
        yield
