"""Mistakes in how events are handled: their order, custody, state, and who waits for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from unittest.mock import patch

from pavane.engine.custody import Custody
from pavane.engine.handlers import Handlers
from pavane.engine.mailbox import Mailbox, Place
from pavane.engine.subscription import Item, Lane, Subscription
from pavane.stores.eventlog import EventRow, ParkedEvent
from tests.sim.planted.plant import planted


@planted("post")
def retry_that_is_overtaken() -> Iterator[None]:
    """Let later events of a key go on while an earlier one waits for its retry."""
    offer = Subscription.offer

    def offered(self: Subscription, row: EventRow) -> None:
        lane = self.lanes.get(row.key or row.pos)
        if lane is not None and lane.is_blocked:
            del self.lanes[row.key or row.pos]
        offer(self, row)

    with patch.object(Subscription, "offer", offered):
        yield


@planted("post")
def dropped_behind_a_failure() -> Iterator[None]:
    """Forget what waits in memory behind an event that is parked."""

    def dropped(self: Custody, subscription: Subscription, lane: Lane) -> None:
        subscription.settled(lane.queue)
        lane.queue = deque()

    with patch.object(Custody, "_park_queue", dropped):
        yield


@planted("post")
def attempts_forgotten_in_custody() -> Iterator[None]:
    """Begin to count anew with each attempt that is made from custody."""
    make = Item.__init__

    def made(self: Item, row: EventRow, parked: ParkedEvent | None = None) -> None:
        make(self, row, parked)
        self.attempt = 1

    with patch.object(Item, "__init__", made):
        yield


@planted("post")
def cursor_past_what_is_under_way() -> Iterator[None]:
    """Note events as handled that were only offered."""

    def reached(self: Subscription, slot: int, tail: int) -> int:
        progress = self.slots[slot]
        return max(progress.written, tail if self.live else self.position)

    with patch.object(Subscription, "reached", reached):
        yield


@planted("post")
def state_without_its_gate() -> Iterator[None]:
    """Let two handlers at the state of a key at once."""

    def entered(self: Handlers, subscription: Subscription, lane: Lane, item: Item) -> bool:
        return True

    with patch.object(Handlers, "_enter", entered):
        yield


@planted("post")
def mailbox_looked_up_before_registering() -> Iterator[None]:
    """Let an event look for runs that wait, and a run for events, at the same instant."""

    async def taken(self: Mailbox, place: Place) -> None:
        return

    def released(self: Mailbox, place: Place) -> None:
        return

    with (
        patch.object(Mailbox, "_take", taken),
        patch.object(Mailbox, "_release", released),
    ):
        yield
