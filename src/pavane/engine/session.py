"""A session: all that a node does under one lease.

It owns partitions, reads the log for them, and drives their runs and steps. When its lease is lost
it stops everything at once; its node joins again under a new nonce, in another session.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import Any

from pavane.core.tasks import stop_all
from pavane.engine.committer import Committer
from pavane.engine.config import EngineConfig
from pavane.engine.deaths import Deaths
from pavane.engine.duties import Duties, Duty
from pavane.engine.handlers import Handlers
from pavane.engine.held import Held
from pavane.engine.holder import Holder
from pavane.engine.lease import REST_MAX_S, LeaseKeeper
from pavane.engine.limits import Limits
from pavane.engine.process import Process
from pavane.engine.pruner import Pruner
from pavane.engine.registry import Registry
from pavane.engine.shares import shares
from pavane.engine.steps import Steps
from pavane.engine.threads import Threads
from pavane.engine.timers import BURST, DueQueue, Fire, Found
from pavane.errors import CorruptJournal, LeaseLost, PavaneError, StoreError
from pavane.stores.eventlog import EventRow, Reaction
from pavane.stores.port import (
    LAST_US,
    Commit,
    Fence,
    Glance,
    InboxRow,
    Message,
    NodeRow,
    PartitionRow,
    RunRow,
    Store,
    durable,
    submit_alone,
)

log = logging.getLogger("pavane.node")

POLL_GROWTH = 1.2
PAGE = 500
RUN_NUMBERS = 1000
POSITIONS_EVERY_S = 2.0
TICK_S = 0.5
LOOK_S = 10.0
"""How long, at most, a node does not look who else is there, and what people ask for, though it
saw no change of that and nobody told it of one."""
LOOK_AT_REST_S = 40.0
LONG_STEP_US = 1_000_000
LINGER_US = 60_000_000
"""How long, at most, a partition that another node is to own is served on while a step runs in it
that takes longer than `LONG_STEP_US`: it would be waited for, or cancelled and done once more."""
REST_AHEAD_US = 300_000_000
"""How far a node that wants to rest looks for what will be due."""
TIMERS_S = 10.0

DRAIN = "drain"
"""What people ask a node for."""
LOOK_ROUND = "released"
"""The kind of message that makes all nodes look who is there, what is free, and what people ask."""
EVERYBODY = 0
"""The target of what concerns all nodes, and no partition."""

Key = tuple[str, str]


def look_round(store: Store) -> Commit:
    """Return what makes all nodes look round at once; they would soon anyway."""
    now = store.now_us()
    return Commit(
        messages=[Message(LOOK_ROUND, f"{LOOK_ROUND}-{now}", "", "", b"null", now, EVERYBODY)]
    )


async def tell_nodes(store: Store) -> None:
    """Let all nodes look round at once."""
    await durable(look_round(store), partial(submit_alone, store))


class Session:
    """Everything a node does under one lease."""

    def __init__(
        self,
        store: Store,
        registry: Registry,
        services: Sequence[str],
        config: EngineConfig,
        fence: Fence,
        ended: Callable[[RunRow], None],
        process: Process,
        duties: Sequence[Duty] = (),
    ) -> None:
        self.store = store
        self.process = process
        self.registry = registry
        self.config = config
        self.fence = fence
        self.open = True
        self.ended = ended
        self.draining: set[int] = set()
        self.failure: asyncio.Future[PavaneError | None] = (
            asyncio.get_running_loop().create_future()
        )
        """Why it must end; None when people asked this node to drain."""
        self._called = asyncio.Event()
        """Set when somebody asks all nodes to look round."""
        self._disputed: set[int] = set()
        """What it owned by its own account or by the store's, not by both, at the last look."""
        self._surplus: dict[int, tuple[PartitionRow, int]] = {}
        """What others should own and this node does not give away yet, and since when, in us."""
        self._others: list[NodeRow] = []
        """Who else was there at the last look."""
        self._roster = (0, 0, 0)
        """The same, as a glance tells it."""
        self._over_us = LAST_US
        """When the first lease of the others is over, by the last glance or look."""
        self._is_stirred = True
        """Whether there was something to do since the last tick."""
        self._next_due_us = self._known_until_us = 0
        """When something is due next, and up to when that is known, if nothing is done till then.
        """
        self.services = frozenset(services)
        self._shared = sorted({*services, *(duty.name for duty in duties)})
        """What nodes share the partitions of."""
        self._floors: dict[int, int] = {}
        self._flight: dict[int, dict[int, None]] = {}
        self._unread: dict[int, int] = {}
        """Where partitions were left that are being taken up: what came since is yet to be read."""
        self._early: list[Message] = []
        """What came for those meanwhile: its turn is after what was written before it."""
        self._routed = 0
        """Position of the newest message of this node's own: the log's tail leaves those out."""
        self._written_positions: dict[int, int] = {}
        self._numbers = iter(range(0))
        self._next_numbers: range | None = None
        self._refill: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._slots: dict[tuple[str, int], int] = {}
        """The targets that it owned, by service and partition."""
        self._ticking: asyncio.Task[None] | None = None
        self._giving: set[asyncio.Task[None]] = set()
        self.now_us = store.now_us
        self.committer = Committer(store, fence, self._route, self._published, self.lost)
        self.context = copy_context()
        """What steps and handlers begin with; else they would inherit from whoever came before."""
        self.threads = Threads(config.step_threads)
        self.holder = Holder(self)
        self.limits = Limits(self)
        self.steps = Steps(self)
        self.handlers = Handlers(self)
        self.deaths = Deaths(self)
        self._duties = Duties(self, duties)
        self.run_timers = DueQueue(self.now_us, self._due_runs, 0, self._in_turn(self.holder.wake))
        self.parked_timers = DueQueue(
            self.now_us, self._due_parked, "", self._in_turn(self.steps.due)
        )
        self.lease = LeaseKeeper(
            store, fence, process, config.glance_s, self._lease_lost, self._saw
        )
        self._pruner = Pruner(store, config.retention_s, lambda: len(self._others) + 1)

    # -- what the duties ask -------------------------------------------------------------------

    def submit(self, commit: Commit) -> None:
        """Queue a commit; see `Committer`."""
        if commit.unparked:
            self.steps.leaves_custody(commit)
        self._stir()
        self.committer.submit(commit)

    def hosts(self, service: str) -> bool:
        return service in self.services

    async def make_known(self, service: str) -> bool:
        """Let the store know a service, perhaps of another app; tell whether that took a while."""
        if service in self.registry.services:
            return False
        await self.store.register([service])
        return True

    def owns(self, target: int) -> bool:
        return target in self._floors and target not in self.draining

    def tenure(self, target: int) -> object:
        """Return what is one and the same for as long as a partition is this session's, or None.

        What a session tells of its runs says nothing of what became of them before its tenure.
        """
        return self._flight[target] if self.owns(target) else None

    def target_at(self, service: str, partition: int) -> int:
        """Return the target of a partition that is, or was, this session's."""
        return self._slots[service, partition]

    @property
    def owned(self) -> list[int]:
        return list(self._floors)

    def take_run_number(self) -> int:
        """Return a number for a new run, from a block reserved ahead."""
        number = next(self._numbers, None)
        if number is None:
            if self._next_numbers is None:
                raise StoreError("Run numbers ran out; the store does not answer.")
            self._numbers, self._next_numbers = iter(self._next_numbers), None
            number = next(self._numbers)
        if self._next_numbers is None and self._refill is None:
            self._refill = self.spawn(self._reserve_numbers())
        return number

    async def durable(
        self, *, inbox: Sequence[InboxRow] = (), reaction: Reaction | None = None,
        events: Sequence[EventRow] = (),
    ) -> None:  # fmt: skip
        """Return when this is written; raise if it cannot be."""
        commit = Commit(inbox=inbox, reaction=reaction, events=events)
        await durable(commit, self.submit)

    async def _reserve_numbers(self) -> None:
        first = await self.store.take_run_numbers(RUN_NUMBERS)
        self._next_numbers = range(first, first + RUN_NUMBERS)
        self._refill = None

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run short work of the session; a failure of the store ends the session."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, CorruptJournal):
            log.error("%s", error)  # one bad row or message stops no other
        elif isinstance(error, PavaneError):
            self.lost(error)
        else:
            self.failed(error)

    def lost(self, error: PavaneError) -> None:
        """End the session: its lease is lost or its store does not work."""
        if self.open:
            self.open = False
            log.warning("node %d stops: %s", self.fence.node, error)
        if not self.failure.done():
            self.failure.set_result(error)

    def failed(self, error: BaseException) -> None:
        """End the session for what nobody foresaw: that counts as a death of what was under way."""
        log.error("a duty of this node failed", exc_info=error)
        self.deaths.touched.clear()
        self.lost(StoreError(f"A duty of this node failed with {type(error).__name__}."))

    def _asked_to_drain(self) -> None:
        if not self.failure.done():
            log.info("node %d was asked to drain", self.fence.node)
            self.failure.set_result(None)

    def _lease_lost(self) -> None:
        self.lost(LeaseLost(f"Node {self.fence.node} lost its lease."))

    # -- messages ------------------------------------------------------------------------------

    def _route(self, messages: Sequence[Message]) -> None:
        """Hand over what was just written and belongs to a partition of this node."""
        self._routed = messages[-1].pos
        for message in messages:
            floor = self._floors.get(message.target)
            if floor is not None and message.pos > floor:
                message.live = message.live or True
                self._take(message, redelivered=False)

    def _published(self, events: Sequence[EventRow]) -> None:
        self.handlers.consumer.published(events)

    def _take(self, message: Message, *, redelivered: bool) -> None:
        self._flight[message.target][message.pos] = None
        if message.target not in self.draining:
            if message.target in self._unread and message.pos > self._floors[message.target]:
                self._early.append(message)
            else:
                self._handle(message, redelivered)
        elif isinstance(message.live, Held):
            message.live.execution.discard()  # the next owner goes on with it

    def _handle(self, message: Message, redelivered: bool) -> None:
        kind = message.kind
        try:
            if kind == "baton":
                self.holder.baton_message(message, redelivered)
            elif kind == "command":
                self.steps.command_message(message, redelivered)
            elif kind == "reply":
                self.holder.reply_message(message)
            elif kind == "start":
                self.holder.start_message(message, redelivered)
            elif kind == "signal":
                self.holder.signal_message(message)
            elif kind in ("cancel", "kill", "retry"):
                self.holder.request_message(message)
            elif kind == "note":
                self.holder.note_message(message)
            elif kind in ("await", "unawait"):
                self.handlers.mailbox.await_message(message)
            elif kind == "redo":
                self.handlers.custody.redo_message(message)
            elif kind == "revoke":
                self.steps.revoke_message(message)
            elif kind == "permit-ask":
                self.limits.ask_message(message)
            elif kind == "permit-given":
                self.limits.given_message(message)
            elif kind == "permit-back":
                self.limits.back_message(message)
            elif kind == "permit-probe":
                self.limits.probe_message(message)
            elif kind == LOOK_ROUND:
                self.consumed(message)  # of a version that told one partition
            else:
                log.error("message %s has unknown kind %r", message.id, kind)
                self.consumed(message)
        except CorruptJournal as error:
            log.error("message %s of run %s: %s", message.id, message.run, error)
            self.consumed(message)
        except (LeaseLost, StoreError):
            raise
        except Exception:  # it stops no other, and comes again when a node starts
            log.exception("%s %s of run %s was not taken", kind, message.id, message.run)

    def redeliver(self, message: Message) -> None:
        """Handle a message again, soon: what was made of it could not be written."""
        message.live = None
        asyncio.get_running_loop().call_soon(self._handle, message, False)

    def consumed(self, message: Message) -> None:
        """Note that a message took effect, durably."""
        flight = self._flight.get(message.target)
        if flight is not None:
            flight.pop(message.pos, None)

    def _position(self, target: int) -> int:
        """Return the position up to which every message was read and took effect."""
        if target in self._unread:
            return self._unread[target]
        read = max(self.committer.routed_tail, self._floors[target])
        flight = self._flight[target]
        return min(read, min(flight) - 1) if flight else read

    async def _poll_log(self) -> None:
        """Read what other processes wrote, soon after they did."""
        longest_s = self.config.poll_s
        pause_s = shortest_s = longest_s / 10
        while True:
            found = False
            if self.store.changed():
                self._stir()
                found = await self._read_tail()
                found |= await self.handlers.consumer.read_tail()
            pause_s = shortest_s if found else min(longest_s, pause_s * POLL_GROWTH)
            await asyncio.sleep(pause_s)

    async def _read_tail(self) -> bool:
        head = await self.store.log_head()
        found = False
        while self.store.tail < head:
            targets = [EVERYBODY, *self._floors]
            messages = await self.store.read_log(
                self.store.tail, head, targets, PAGE, self.fence.node
            )
            if not self._floors.keys() <= set(targets):
                continue  # what was taken up meanwhile was not asked for
            for message in messages:
                if message.kind == LOOK_ROUND:
                    self._called.set()
                floor = self._floors.get(message.target)
                if floor is not None and message.pos > floor:
                    found = True
                    self._take(message, redelivered=False)
            tail = messages[-1].pos if len(messages) == PAGE else head
            self.store.tail = max(self.store.tail, tail)
            if len(messages) == PAGE:
                await asyncio.sleep(0)
        return found

    # -- partitions ----------------------------------------------------------------------------

    async def balance(self) -> None:
        """Own the share of partitions that is this node's, taking over from nodes that are gone."""
        nodes = await self._present()
        if any(n.no == self.fence.node and n.asked == DRAIN for n in nodes):
            self._asked_to_drain()
        if gone := self._gone():
            theirs = [n.name for n in gone if not set(n.services).isdisjoint(self._shared)]
            if theirs:
                log.info("taking over from %s", ", ".join(theirs))
            await self.store.expire(gone)
            nodes = await self._present()
        surplus: list[PartitionRow] = []
        want: list[int] = []
        held: set[int] = set()
        rows = await self.store.partition_rows(self._shared)
        plan = _plan(rows, nodes)
        for row in rows:
            mine = plan[row.target] == self.fence.node
            if row.owner == self.fence.node:
                held.add(row.target)
            if row.owner == self.fence.node and not mine and row.target not in self.draining:
                surplus.append(row)
            elif row.owner is None and mine and row.target not in self._floors:
                want.append(row.target)
        # A database that crashed, or failed over, may have forgotten who owns what.
        disputed = (held ^ self._floors.keys()) - self.draining
        if disputed & self._disputed:
            self.lost(LeaseLost(f"Node {self.fence.node} and its store differ in what it owns."))
            return
        self._disputed = disputed
        if surplus or want:
            self._stir()
        now_us, known = self.now_us(), self._surplus
        self._surplus = {row.target: known.get(row.target, (row, now_us)) for row in surplus}
        self._make_room()
        if want:
            await self._own(await self.store.claim(self.fence, want))

    def _make_room(self) -> None:
        """Begin to give away what others should own, where no step takes long; or after a while.

        Of a step that was running when that was first seen, it is not known how long it takes.
        """
        if not self._surplus:
            return
        now_us = self.now_us()
        at_work = self.steps.at_work()
        give = [
            row for row, since_us in self._surplus.values()
            if at_work.get(row.target, now_us) >= max(since_us, now_us - LONG_STEP_US)
            or now_us > since_us + LINGER_US
        ]  # fmt: skip
        for row in give:
            del self._surplus[row.target]
        if give:  # beside the rest: it takes as long as a step, and nobody waits for a takeover
            giving = self.spawn(self._give(give))
            self._giving.add(giving)
            giving.add_done_callback(self._giving.discard)

    async def _present(self) -> list[NodeRow]:
        """Look who is there."""
        nodes = await self.store.nodes()
        self._others = [node for node in nodes if node.no != self.fence.node]
        newest = max((node.no for node in self._others), default=0)
        self._roster = (len(self._others), newest, sum(node.asked != "" for node in nodes))
        self._over_us = min((node.expires_us for node in self._others), default=LAST_US)
        return nodes

    def _saw(self, glance: Glance) -> None:
        """Look properly, if who is there is not who was, or one of them may be gone."""
        self._over_us = glance.expires_us
        if glance.roster != self._roster or self._over_us < self._judged_us():
            self._called.set()

    def _gone(self) -> list[NodeRow]:
        """Return those of the others who, by the last look, are not there any more."""
        now = self._judged_us()
        return [node for node in self._others if self.process.is_gone(node, now)]

    def _is_one_gone(self) -> bool:
        """Tell whether one of the others may be gone: its lease is over, or its process ended.

        What a node that rests saw of leases is too old to judge by.
        """
        if not self.lease.rests and self._over_us < self._judged_us():
            return True
        return any(self.process.is_gone(node, 0) for node in self._others)

    def _judged_us(self) -> int:
        """Return the time by which leases are judged: 0 while they cannot be, when none is over."""
        return self.store.now_us() if self.lease.is_steady else 0

    async def _give(self, rows: Sequence[PartitionRow]) -> None:
        """Hand partitions over, each as soon as nothing runs there, or its time is over."""
        self.draining.update(row.target for row in rows)
        self.handlers.leave([(row.service, row.partition) for row in rows])
        await asyncio.sleep(0)  # a call must begin, or it cannot tidy up when it is cancelled
        loop = asyncio.get_running_loop()
        ends = loop.time() + self.config.grace_s
        left = list(rows)
        while left and self.open:
            is_over = loop.time() >= ends
            steps, slots = self.steps.at_work(), self.handlers.at_work()
            ready = [
                row for row in left
                if is_over
                or (row.target not in steps and (row.service, row.partition) not in slots)
            ]  # fmt: skip
            if ready:
                await self._hand_over(ready)
                left = [row for row in left if row not in ready]
            else:
                await asyncio.sleep(0.005)
        self._called.set()  # meanwhile their turn may have come back to this node

    async def _hand_over(self, rows: Sequence[PartitionRow]) -> None:
        """Cancel what runs in these partitions, write, forget, release."""
        targets = [row.target for row in rows]
        leaving = set(targets)
        self.steps.abandon(leaving)
        await self._duties.give(leaving)
        for service in dict.fromkeys(row.service for row in rows):
            slots = {row.partition for row in rows if row.service == service}
            await self.handlers.give(service, slots)
        await self.committer.flush()
        await self.holder.settle()
        await self.committer.flush()
        self.holder.release(leaving)
        self.steps.release(leaving)
        self.limits.release(leaving)
        if not self.open:
            return  # what was not written may land yet, and belongs to these partitions
        self.deaths.release(leaving)
        positions = [
            (target, self._position(target)) for target in targets if target in self._flight
        ]
        await self.store.release(self.fence, positions)
        self.submit(look_round(self.store))
        for target in targets:
            self._floors.pop(target, None)
            self._flight.pop(target, None)
            self._written_positions.pop(target, None)
        self.draining.difference_update(targets)

    async def _own(self, rows: Sequence[PartitionRow]) -> None:
        """Take partitions up where they were left: messages, runs, parked steps, timers."""
        if not rows:
            return
        self._slots.update(((row.service, row.partition), row.target) for row in rows)
        position = {row.target: row.position for row in rows}
        dirty = {row.target: row.position for row in rows if not row.clean}
        suspects = await self.deaths.count(dirty) if dirty else []
        # What comes later is handed over or read at the tail; what passed there is read here.
        head = max(await self.store.log_head(), self._routed, self.store.tail)
        for row in rows:
            self._flight[row.target] = {}
            self._floors[row.target] = head
        self._unread.update(position)
        targets = list(position)
        suspects = self.deaths.set_aside(suspects)
        await self._recover_runs(targets)
        at = min(position.values())
        while at < head:
            messages = await self.store.read_log(at, head, targets, PAGE, None)
            for message in messages:
                if message.pos > position[message.target]:
                    self._take(message, redelivered=message.target in dirty)
            if len(messages) < PAGE:
                break
            at = messages[-1].pos
            await asyncio.sleep(0)
        for target in targets:
            del self._unread[target]
        early, self._early = self._early, []
        for message in early:
            self._handle(message, redelivered=False)
        for service in dict.fromkeys(row.service for row in rows):
            own = [row for row in rows if row.service == service]
            await self.handlers.own(
                service, [row.partition for row in own],
                {row.partition for row in own if not row.clean},
            )  # fmt: skip
            await self.limits.own(service, [row.target for row in own])
        self._duties.own(targets)
        self.deaths.try_alone(suspects)
        self.spawn(self.run_timers.catch_up(targets))
        self.spawn(self.parked_timers.catch_up(targets))

    async def _recover_runs(self, targets: Sequence[int]) -> None:
        after = 0
        while rows := await self.store.live_runs(targets, after, PAGE):
            after = rows[-1].no
            # A stuck run goes on if the code that fits it has been deployed again, perhaps.
            final = ("Quarantined", "The compensation")
            await self.holder.recover(
                [
                    row for row in rows
                    if not self.deaths.is_aside(row.service, row.id)
                    and (row.status != "stuck" or not row.reason.startswith(final))
                ]
            )  # fmt: skip
            await asyncio.sleep(0)

    # -- timers --------------------------------------------------------------------------------

    async def _due_runs(
        self, targets: Sequence[int], after: tuple[int, Any], until_us: int, limit: int
    ) -> list[Found]:
        rows = await self.store.due_runs(targets, after, until_us, limit)
        return [(row.wake_us or 0, row.no, (row.service, row.id), row.no) for row in rows]

    async def _due_parked(
        self, targets: Sequence[int], after: tuple[int, Any], until_us: int, limit: int
    ) -> list[Found]:
        rows = await self.store.due_parked(targets, after, until_us, limit)
        return [
            (row.due_us, row.id, (row.service, row.id), None)
            for row in rows
            if not self.deaths.is_aside(row.service, row.id)
        ]

    # -- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        first = await self.store.take_run_numbers(RUN_NUMBERS)
        self._numbers = iter(range(first, first + RUN_NUMBERS))
        await self._reserve_numbers()
        self.lease.start()
        await self.handlers.start()
        await self.balance()
        if self._others:
            self.submit(look_round(self.store))
        self.spawn(self._poll_log())
        self._ticking = self.spawn(self._tick())
        self.spawn(self._read_timers(self.run_timers))
        self.spawn(self._read_timers(self.parked_timers))
        self.spawn(self._pruner.run())

    def _in_turn(self, take_up: Callable[[Sequence[Any]], Awaitable[None]]) -> Fire:
        """Return what fires timers so that a crowd of them stays behind what the store can do.

        A full burst is taken up when all that was submitted until then is written: what others
        wrote as well as what became of it. A run or step that goes on to wait holds no place.
        """

        async def fire(due: Sequence[Any]) -> None:
            await take_up(due)
            if len(due) == BURST:
                await self.durable()

        return lambda due: self.spawn(fire(due))

    async def _read_timers(self, queue: DueQueue) -> None:
        while True:
            await queue.poll(self.owned)
            await asyncio.sleep(TIMERS_S)
            while self.lease.rests:
                await asyncio.sleep(TICK_S)

    # -- rest ----------------------------------------------------------------------------------

    def _stir(self) -> None:
        """Note that there is something to do."""
        self._is_stirred = True
        self.lease.rouse()

    @property
    def _is_idle(self) -> bool:
        """Whether there is nothing to do, but for timers, until the store tells of something."""
        parts = (self.steps, self.handlers, self.limits, self.deaths, self._duties)
        return (
            self.store.hears and all(part.is_idle for part in parts)
            and not (self.draining or self._unread)
            and not any(self._flight.values())
        )  # fmt: skip

    async def _may_rest(self) -> bool:
        """Tell whether no timer is due while this node rests: who took it over would be late."""
        if not self.lease.is_steady:
            return False
        now = self.now_us()
        ends_us = now + round(REST_MAX_S * 1e6)
        if self._known_until_us < ends_us:
            until_us, targets = now + REST_AHEAD_US, self.owned
            run_us = await self.run_timers.first_us(targets, until_us)
            step_us = await self.parked_timers.first_us(targets, until_us)
            self._next_due_us, self._known_until_us = min(run_us, step_us), until_us
        return self._next_due_us > ends_us and not self._is_stirred

    async def _tick(self) -> None:
        positions_due = look_due = stirred_s = 0.0
        loop = asyncio.get_running_loop()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._called.wait()
            if self._called.is_set() or loop.time() >= look_due or self._is_one_gone():
                self._called.clear()
                look_due = loop.time() + (LOOK_AT_REST_S if self.lease.rests else LOOK_S)
                await self.balance()
                await self.handlers.look()
            self._make_room()
            self.handlers.tick()
            self.limits.tick()
            self.steps.take_custody(self.now_us() - round(self.config.custody_after_s * 1e6))
            if loop.time() >= positions_due:
                positions_due = loop.time() + POSITIONS_EVERY_S
                self._write_positions()
            if self._is_stirred or not self._is_idle:
                self._is_stirred, stirred_s, self._known_until_us = False, loop.time(), 0
                self.lease.rouse()
            elif loop.time() - stirred_s > self.config.rest_after_s:
                if await self._may_rest():
                    self.lease.rest()
                else:
                    self.lease.rouse()

    def _write_positions(self) -> None:
        moved: list[tuple[int, int]] = []
        for target in self._floors.keys() - self.draining:
            position = self._position(target)
            if position > self._written_positions.get(target, -1):
                moved.append((target, position))
                self._written_positions[target] = position
        if moved:
            self.submit(Commit(positions=moved))

    async def drain(self) -> None:
        """Stop in order: let steps end, write everything, release the partitions."""
        if self._ticking is not None:
            await stop_all([self._ticking, *self._giving])  # it would take up more
        # What was being taken up is left to be taken up again, with the deaths it was to count.
        rows = [
            PartitionRow(target, service, partition, self.fence.node, False, 0)
            for (service, partition), target in self._slots.items()
            if target in self._floors and target not in self._unread
        ]
        self.draining.update(self._floors)
        with suppress(PavaneError):
            await self.store.ask_node(self.fence.node, DRAIN)  # others take what it releases
            await self._give(rows)
        await self.steps.close()
        await self.handlers.drain()
        await self._duties.close()
        await self.holder.settle()
        await self.committer.flush()
        await self.close()
        if self.open:
            self.open = False
            with suppress(PavaneError):
                await self.store.leave(self.fence)
                if rows:
                    await tell_nodes(self.store)

    async def close(self) -> None:
        """Stop at once."""
        self.run_timers.close()
        self.parked_timers.close()
        await self.lease.stop()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=5)
        await self.steps.close()
        await self.handlers.close()
        await self._duties.close()
        self.limits.close()
        self.holder.close()
        await self.committer.flush()
        self.committer.close()


def _plan(rows: Sequence[PartitionRow], nodes: Sequence[NodeRow]) -> dict[int, int | None]:
    """Return who is to own each partition, by target.

    Services that are hosted by the same nodes are shared as one: a run finds its partitions of all
    of them at one node. Where their owners differ, as while some are handed over, the first counts.
    """
    by_service: dict[str, list[PartitionRow]] = defaultdict(list)
    for row in rows:
        by_service[row.service].append(row)
    together: dict[tuple[int, ...], list[list[PartitionRow]]] = defaultdict(list)
    for service in sorted(by_service):
        hosts = [n.no for n in nodes if service in n.services and n.asked != DRAIN]
        together[tuple(sorted(hosts))].append(by_service[service])
    plan: dict[int, int | None] = {}
    for hosts, services in together.items():
        slots = list(zip(*services, strict=True))
        owners = [next((r.owner for r in slot if r.owner in hosts), None) for slot in slots]
        for slot, owner in zip(slots, shares(owners, hosts), strict=True):
            plan.update((row.target, owner) for row in slot)
    return plan
