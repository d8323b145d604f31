"""A subscription: the queues of one handler on one node.

Events of one key are in one lane, and a lane has at most one event under way, until what became of
it is durable. A lane whose first event waits for another attempt is blocked: what comes behind is
parked in the store, so that neither memory nor the cursor waits for it. Everything here is about
which event is next; executing it is `handlers.py`, reading it from the log is `consumer.py`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from zlib import crc32

from pavane.engine.breaker import Circuit
from pavane.handler import Handler
from pavane.stores.eventlog import EventRow, HandlerRow, ParkedEvent

QUEUE_MAX = 1000
"""Events of one handler that wait in memory; above that it reads from the log when it has room."""
LaneKey = str | int


class Item:
    """One event on its way through a handler; `parked` is its row if it is in custody."""

    __slots__ = ("attempt", "began_us", "data", "parked", "permit", "row")

    def __init__(self, row: EventRow, parked: ParkedEvent | None = None) -> None:
        self.row = row
        self.parked = parked
        self.attempt = 1 if parked is None else parked.attempt
        self.began_us = 0 if parked is None else parked.began_us
        self.data = None if parked is None else parked.data
        self.permit = ""
        """The work that its call has a permit for, where there is a limit."""

    @property
    def again(self) -> str:
        return "" if self.parked is None else self.parked.again

    @property
    def is_repetition(self) -> bool:
        """Whether the event was marked as handled before: a retried dead letter, or a replay."""
        return self.parked is not None and bool(self.parked.dead or self.parked.again)


class Lane:
    """The events of one key, in order.

    `head` is the parked event that is next; `behind` counts those parked after it. `stopped`: a
    dead letter holds the key, or its slot leaves this node; `left`: it has left, so what comes of a
    call that is still under way is void. `call` is the task that it keeps busy, `gate` the keyed
    state that it may change meanwhile.
    """

    __slots__ = (
        "behind", "busy", "call", "gate", "head", "key", "left", "queue", "ready", "slot", "stopped"
    )  # fmt: skip

    def __init__(self, key: LaneKey, slot: int) -> None:
        self.key = key
        self.slot = slot
        self.queue: deque[Item] = deque()
        self.busy = False
        self.call: asyncio.Task[None] | None = None
        self.ready = False
        self.head: ParkedEvent | None = None
        self.behind = 0
        self.stopped = False
        self.left = False
        self.gate: tuple[str, str, str] | None = None

    @property
    def is_blocked(self) -> bool:
        return self.head is not None or self.behind > 0 or self.stopped

    @property
    def is_idle(self) -> bool:
        return not (self.busy or self.queue or self.is_blocked)


class Progress:
    """How far one slot was read (`offered`) and handled: `pending` is not durable yet.

    `written` is the cursor in the store; up to `known`, marks and custody of earlier owners count.
    Once the slot is to leave this node, `limit` is the position up to which it was read. `foreign`
    is the first event that only other code can handle: the cursor stays before it.
    """

    __slots__ = ("foreign", "known", "limit", "offered", "pending", "written")

    def __init__(self, position: int, known: int) -> None:
        self.offered = position
        self.written = position
        self.known = known
        self.limit: int | None = None
        self.foreign: int | None = None
        self.pending: dict[int, None] = {}


class Subscription:
    """See the module.

    `start` is called with lanes and their next events, which may be handled now; `resume` with a
    lane whose parked head may be.
    """

    def __init__(
        self,
        handler: Handler,
        row: HandlerRow,
        start: Callable[[Subscription, list[Lane], list[Item]], None],
        resume: Callable[[Subscription, Lane], None],
        park_behind: Callable[[Subscription, Lane, list[Item]], None],
        now_s: Callable[[], float],
    ) -> None:
        self.handler = handler
        self.no = row.no
        self.options = handler.options
        self.foreign: frozenset[str] = frozenset()
        """Types of events that the handler is for in the newest code, and not in this node's."""
        self.lanes: dict[LaneKey, Lane] = {}
        self.ready: deque[Lane] = deque()
        self.slots: dict[int, Progress] = {}
        self.position = 0
        """Everything up to here was offered, unless `live`: then the consumer's tail is meant."""
        self.live = False
        self.takeovers = 0
        self.reader: asyncio.Task[None] | None = None
        self.queued = 0
        self.running = 0
        self.paused_until_us = 0
        self.room = asyncio.Event()
        self.circuit = Circuit(self.options.breaker) if self.options.breaker else None
        self.variants: list[tuple[Handler, float]] = [(handler, 0.0)]
        self._start = start
        self._resume = resume
        self._park_behind = park_behind
        self._now_s = now_s
        self._loop = asyncio.get_running_loop()
        self._next_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = 0.0
        self._waiting_since_s: float | None = None
        self._hold = False

    @property
    def types(self) -> list[str]:
        """The types of events that are offered to it."""
        return [*self.handler.events, *sorted(self.foreign)]

    def variant(self, key: str, id: str) -> Handler:
        """Return the handler that this key is for: a share of the keys may be another's."""
        at = crc32(f"share:{key or id}".encode()) / 2**32
        for handler, share in self.variants[1:]:
            if at < share:
                return handler
            at -= share
        return self.handler

    # -- coming in -----------------------------------------------------------------------------

    def offer(self, row: EventRow) -> None:
        """Take an event that was not offered before, in log order."""
        progress = self.slots.get(row.slot)
        if progress is None or row.pos <= progress.offered or progress.limit is not None:
            return
        progress.offered = row.pos
        if self.foreign and row.type in self.foreign:
            progress.foreign = progress.foreign or row.pos
            return
        progress.pending[row.pos] = None
        self.queued += 1
        key: LaneKey = row.key or row.pos
        lane = self.lanes.get(key)
        if lane is None:
            lane = self.lanes[key] = Lane(key, row.slot)
        item = Item(row)
        if lane.is_blocked:
            self._park_behind(self, lane, [item])
            return
        lane.queue.append(item)
        if not lane.busy and not lane.ready:
            lane.ready = True
            self.ready.append(lane)

    def pass_over(self, row: EventRow) -> None:
        """Note an event that was handled, or parked, before this node took over."""
        progress = self.slots.get(row.slot)
        if progress is not None and row.pos > progress.offered:
            progress.offered = row.pos

    def settled(self, items: Iterable[Item]) -> None:
        """Note that what became of these events is durable."""
        for item in items:
            progress = self.slots.get(item.row.slot)
            if progress is not None and item.row.pos in progress.pending:
                del progress.pending[item.row.pos]
                self.queued -= 1
                self._tell_room()

    def _tell_room(self) -> None:
        if self.queued * 2 < QUEUE_MAX:
            self.room.set()

    @property
    def is_full(self) -> bool:
        return self.queued >= QUEUE_MAX

    # -- going out -----------------------------------------------------------------------------

    def wake(self, lane: Lane) -> None:
        """Go on with a lane that is not blocked; forget it if nothing is left."""
        if lane.queue:
            self.queue(lane)
        elif lane.is_idle:
            self.lanes.pop(lane.key, None)

    def queue(self, lane: Lane) -> None:
        """Let a lane be served in its turn: its parked head, which is due, or its next event."""
        if not lane.ready:
            lane.ready = True
            self.ready.append(lane)
        self.pump()

    def may_begin(self) -> bool:
        """Tell whether one more call may be made now; if not, `pump` is called when it may."""
        if self.running >= self.options.concurrency or self._hold or self.paused_until_us:
            return False
        circuit = self.circuit
        if self.options.rate_per_s is not None and self._now_s() < self._next_s:
            self._pump_at(self._next_s)
            return False
        if circuit is None or circuit.retry_at_s is None:
            return True
        now_s = self._now_s()
        if circuit.allows(now_s):
            return True
        if now_s < circuit.retry_at_s:  # else its trial is under way
            self._pump_at(circuit.retry_at_s)
        return False

    def began(self) -> None:
        self.running += 1
        if self.options.rate_per_s is not None:
            now_s = self._now_s()
            self._next_s = max(self._next_s, now_s) + 1 / self.options.rate_per_s

    def ended(self) -> None:
        self.running -= 1

    def unanswered(self) -> None:
        """Note that a call that might begin had no outcome: if it was the trial, make another."""
        if self.circuit is not None:
            self.circuit.give_back()
        if self.ready:
            self.pump()

    def pump(self) -> None:
        """Begin with whatever may begin."""
        while self.ready and self._batch_is_due() and self.may_begin():
            lanes: list[Lane] = []
            items: list[Item] = []
            others: list[Lane] = []
            while self.ready and len(items) < self.options.batch:
                lane = self.ready.popleft()
                lane.ready = False
                if lane.busy or lane.stopped:
                    continue
                if lane.head is not None:
                    if not items:
                        lane.busy = True
                        lanes.append(lane)
                    else:  # what was parked is handled alone
                        lane.ready = True
                        self.ready.appendleft(lane)
                    break
                if lane.behind or not lane.queue:
                    continue
                if items and not self._are_alike(items[0], lane.queue[0]):
                    lane.ready = True
                    others.append(lane)
                    continue
                lane.busy = True
                lanes.append(lane)
                items.append(lane.queue.popleft())
                while lane.queue and len(items) < self.options.batch:
                    items.append(lane.queue.popleft())
            self._waiting_since_s = None
            self.ready.extendleft(reversed(others))
            if items:
                self._start(self, lanes, items)
            elif lanes:
                self._resume(self, lanes[0])
            elif self.circuit is not None:
                self.circuit.give_back()

    def _are_alike(self, one: Item, other: Item) -> bool:
        """Tell whether two events are for the same variant, and so may be in one batch."""
        if len(self.variants) == 1:
            return True
        return self.variant(one.row.key, one.row.id) is self.variant(other.row.key, other.row.id)

    def _batch_is_due(self) -> bool:
        """Tell whether a batch is full, or its first event has waited for long enough."""
        options = self.options
        if options.batch == 1 or not options.linger_s:
            return True
        if sum(len(lane.queue) for lane in self.ready) >= options.batch:
            return True
        now_s = self._now_s()
        if self._waiting_since_s is None:
            self._waiting_since_s = now_s
        due_s = self._waiting_since_s + options.linger_s
        if now_s >= due_s:
            return True
        self._pump_at(due_s)
        return False

    def _pump_at(self, at_s: float) -> None:
        if self._timer is not None:
            if self._timer_s <= at_s:
                return
            self._timer.cancel()
        self._timer_s = at_s
        self._timer = self._loop.call_later(max(0.0, at_s - self._now_s()), self._timed)

    def _timed(self) -> None:
        self._timer = None
        self.pump()

    def hold(self) -> None:
        """Begin nothing any more."""
        self._hold = True

    def close(self) -> None:
        self.hold()
        if self._timer is not None:
            self._timer.cancel()

    # -- slots ---------------------------------------------------------------------------------

    def reached(self, slot: int, tail: int) -> int:
        """Return the position up to which everything in the slot is handled or parked."""
        progress = self.slots[slot]
        if progress.pending:
            read = next(iter(progress.pending)) - 1
        elif progress.limit is None:
            read = tail if self.live else self.position
        else:
            read = progress.limit
        if progress.foreign is not None:
            read = min(read, progress.foreign - 1)
        return read if progress.pending else max(progress.written, read)

    def knows_of(self, types: Iterable[str]) -> None:
        """Leave events of these types that this node's code does not handle to other code."""
        self.foreign = frozenset(types) - self.handler.events.keys()
        if not self.foreign:
            for progress in self.slots.values():
                progress.foreign = None

    def leave(self, slots: set[int], tail: int) -> list[Lane]:
        """Begin nothing more in these slots; return their lanes that are busy."""
        for slot in slots & self.slots.keys():
            progress = self.slots[slot]
            if progress.limit is None:  # else it is leaving already, and took nothing since
                progress.limit = tail if self.live else self.position
        lanes = [lane for lane in self.lanes.values() if lane.slot in slots]
        for lane in lanes:
            lane.stopped = True
        return [lane for lane in lanes if lane.busy]

    def drop(self, slots: set[int]) -> None:
        """Forget what waits in these slots; another node goes on with it."""
        for lane in [lane for lane in self.lanes.values() if lane.slot in slots]:
            lane.queue.clear()
            lane.left = True
            del self.lanes[lane.key]
        self.ready = deque(lane for lane in self.ready if lane.slot not in slots)
        for slot in slots:
            progress = self.slots.pop(slot, None)
            if progress is not None:
                self.queued -= len(progress.pending)
        self._tell_room()
