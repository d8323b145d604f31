"""Handlers: reacts to events, with effects exactly once, in order per key.

What a handler returns and publishes is one commit with the mark that it handled the event. A
failing event is taken into custody with its next attempt, and what is behind it in its key too; in
the end it becomes a dead letter. Before anything that may have been under way when a process died
is touched again, it is in custody with that death counted, so what kills processes is found.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from msgspec import Raw

from pavane.core.baton import Header
from pavane.core.codec import encode, encode_error, error_summary
from pavane.core.envelope import Redo, Signal, Start, pack, unpack
from pavane.engine.breaker import Circuit
from pavane.engine.consumer import PAGE, Consumer
from pavane.engine.mailbox import Mailbox
from pavane.engine.publishing import checked_size, derived_id, event_row, read_event
from pavane.engine.subscription import QUEUE_MAX, Item, Lane, Progress, Subscription
from pavane.errors import (
    BadEvent,
    LeaseLost,
    NotDeclared,
    NotDecodable,
    NotEncodable,
    PavaneError,
    StepTimeout,
    StoreError,
    TooLarge,
    WorkFailed,
)
from pavane.event import class_of, is_event
from pavane.handler import BEGINNING, Delivery, Handler, current_handler
from pavane.policy import Retry
from pavane.stores.eventlog import (
    DeadFilter,
    DeadRow,
    EventRow,
    HandlerSpec,
    MarkRow,
    Outcome,
    ParkedEvent,
    Reaction,
    ShadowRow,
    StateRow,
)
from pavane.stores.port import LAST_US, Commit, Conflict, InboxRow, Message

if TYPE_CHECKING:
    from pavane.engine.node import Session

log = logging.getLogger("pavane.handlers")

SUSPECT_DEATHS = 2
FINAL = (BadEvent, NotDeclared, NotEncodable, NotDecodable, TooLarge)
"""Errors that another attempt would meet again."""
CURSORS_EVERY_S = 1.0
CAUSE_MAX = 200


class Handling:
    """One call of a handler: what it is about, and what it asks for."""

    def __init__(self, handlers: Handlers, handler: Handler, item: Item, now_us: int) -> None:
        self._handlers = handlers
        self._handler = handler
        self._item = item
        self._count = 0
        self.now_us = now_us
        self.events: list[EventRow] = []
        self.messages: list[Message] = []
        self.members: list[tuple[str, str]] = []
        self.reaction = Reaction()
        self.settled: list[Callable[[], None]] = []
        """Called when what became of the call is durable, or known not to be."""

    @property
    def row(self) -> EventRow:
        return self._item.row

    @property
    def mailbox(self) -> Mailbox:
        return self._handlers.mailbox

    def restart(self) -> None:
        """Forget what was asked for: the handler is called once more, for the same attempt."""
        self._count = 0
        self.events, self.messages, self.members = [], [], []

    def delivery(self) -> Delivery:
        row, item = self._item.row, self._item
        return Delivery(
            row.id, row.type, row.key, row.source, datetime.fromtimestamp(row.at_us / 1e6, UTC),
            row.conversation, row.cause, item.attempt,
            f"{row.id}:{self._handler!r}{':' + item.again if item.again else ''}",
        )  # fmt: skip

    def _derived_id(self) -> str:
        self._count += 1
        row, handler = self._item.row, self._handler
        return derived_id(
            row.conversation,
            f"{row.id}>{handler.service.name}.{handler.name}#{self._count}{self._item.again}",
        )

    def publish(self, event: Any, source: str) -> str:
        row = self._item.row
        published = event_row(
            self._handlers.store, event, id=self._derived_id(), source=source, at_us=self.now_us,
            conversation=row.conversation, cause=row.id, trace=row.trace,
        )  # fmt: skip
        self.events.append(checked_size(published, self._handlers.payload_max_bytes))
        return published.id

    def start(self, workflow: Any, args: bytes, id: str | None) -> str:
        row, home = self._item.row, workflow.service.name
        run = id or self._derived_id()
        header = Header(
            run=run, workflow=workflow.name, version=workflow.version, home=home,
            mode=workflow.mode, started_us=self.now_us, conversation=row.conversation,
            timeout_us=round((workflow.timeout_s or 0) * 1e6), cause=row.id,
        )  # fmt: skip
        self._message("start", run, home, run, pack(Start(header, Raw(args))))
        self.members.append((row.conversation, run))
        return run

    def send(self, workflow: Any, run: str, event: Any) -> None:
        id = f"{run}#s-{self._derived_id()}"
        body = pack(Signal(class_of(event).event_type, Raw(encode(event))))
        self._message("signal", id, workflow.service.name, run, body)

    def _message(self, kind: str, id: str, to: str, run: str, body: bytes) -> None:
        target = self._handlers.store.target_of(to, run)
        self.messages.append(Message(kind, id, to, run, body, self.now_us, target))


class Handlers:
    """Owns the handlers of one session; see the module."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.store = session.store
        self._config = session.config
        self.payload_max_bytes = session.config.payload_max_bytes
        self._loop = asyncio.get_running_loop()
        self._by_service: dict[str, list[Subscription]] = {}
        self._by_no: dict[int, Subscription] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._calls: dict[Item, asyncio.Task[None]] = {}
        self._gates: dict[tuple[str, str, str], deque[tuple[Subscription, Lane, Item]]] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._cursors_due_s = 0.0
        self.consumer = Consumer(self.store, session.spawn, 0)
        self.mailbox = Mailbox(session)

    async def start(self) -> None:
        """Subscribe the handlers of the services that this node hosts."""
        self.consumer.tail = await self.store.events_head()
        own = [
            handler for service in sorted(self._session.services)
            for handler in self._session.registry.handlers_of(service)
        ]  # fmt: skip
        variants = [h for h in own if h.options.share is not None]
        mains = [h for h in own if h.options.share is None]
        rows = await self.store.register_handlers([handler_spec(h) for h in mains])
        for handler, row in zip(mains, rows, strict=True):
            subscription = Subscription(
                handler, row, self._start, self._resume, self._park_behind, self._loop.time
            )
            subscription.variants += [
                (variant, variant.options.share or 0)
                for variant in variants
                if variant.instead_of is handler
            ]
            subscription.paused_until_us = row.paused_until_us
            self._by_service.setdefault(handler.service.name, []).append(subscription)
            self._by_no[row.no] = subscription
            self.consumer.add(subscription)

    # -- partitions ----------------------------------------------------------------------------

    async def own(self, service: str, slots: Sequence[int], dirty: set[int]) -> None:
        """Take these slots up where they were left; in `dirty` ones a process may have died."""
        for subscription in self._by_service.get(service, ()):
            await self._own(subscription, slots, dirty)

    async def _own(self, subscription: Subscription, slots: Sequence[int], dirty: set[int]) -> None:
        cursors = await self.store.cursors(subscription.no)
        known = self.consumer.tail
        counted: set[int] = set()
        if dirty:
            counted = await self._take_custody(subscription, sorted(dirty), cursors, known)
        suspects = await self._load_parked(subscription, slots, dirty, counted)
        first = min((cursors.get(slot, 0) for slot in slots), default=known)
        for slot in slots:
            subscription.slots[slot] = Progress(cursors.get(slot, 0), known)
        if subscription.live:
            subscription.live = False
            subscription.position = self.consumer.tail
        subscription.position = min(subscription.position, first)
        subscription.takeovers += 1
        self.consumer.read(subscription)
        for lane in [lane for lane in subscription.lanes.values() if lane.slot in set(slots)]:
            if lane not in suspects:
                self._go_on(subscription, lane)
        for lane in suspects:
            self._session.suspect(partial(self._try_suspect, subscription, lane))

    async def _take_custody(
        self, subscription: Subscription, slots: list[int], cursors: dict[int, int], until: int
    ) -> set[int]:
        """Park, with one death counted, what may have been under way when a process died."""
        after = min(cursors.get(slot, 0) for slot in slots)
        types = list(subscription.handler.events)
        found: list[EventRow] = []
        while after < until and len(found) < QUEUE_MAX:
            rows = await self.store.read_events(after, until, PAGE, types, slots)
            upto = rows[-1].pos if len(rows) == PAGE else until
            marks = await self.store.marks(subscription.no, after, upto)
            parked = await self.store.parked_events(subscription.no, slots, after, QUEUE_MAX * 2)
            handled = {mark.pos for mark in marks} | {row.pos for row in parked}
            found += [
                row for row in rows
                if row.pos > cursors.get(row.slot, 0) and row.pos not in handled
            ]  # fmt: skip
            after = upto
        now = self._session.now_us()
        reaction = Reaction()
        reaction.parked = [
            ParkedEvent(subscription.no, row.pos, row.slot, row.key, 1, now, now, deaths=1)
            for row in found[:QUEUE_MAX]
        ]
        if reaction.parked:
            await self._session.durable(reaction=reaction)
        return {row.pos for row in reaction.parked}

    async def _load_parked(
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
            rows = await self.store.parked_events(subscription.no, slots, after, PAGE)
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
        for dead in await self.store.dead_letters(which):
            lane = subscription.lanes.setdefault(dead.key, Lane(dead.key, dead.slot))
            lane.stopped = True
        under_way = [
            row for row in heads
            if row.slot in dirty and row.due_us <= now and row.pos not in counted
        ]  # fmt: skip
        calm = [row for row in under_way if row.deaths < SUSPECT_DEATHS]
        for row in calm:
            row.deaths += 1
        if calm:
            reaction = Reaction()
            reaction.parked = calm
            await self._session.durable(reaction=reaction)
        return [subscription.lanes[row.key or row.pos] for row in under_way if row not in calm]

    async def _try_suspect(self, subscription: Subscription, lane: Lane) -> None:
        """Count one more touch of a parked event, durably, then handle it, alone."""
        head = lane.head
        if head is None or subscription.lanes.get(lane.key) is not lane:
            return
        if head.deaths + 1 >= self._config.deaths_max:
            row = (await self.store.events_at([head.pos])).get(head.pos)
            if row is not None:
                text = (
                    f"Quarantined: {head.deaths + 1} processes died while {subscription.handler!r} "
                    f"handled this event. Find out why, then `pavane dead retry`."
                )
                item = Item(row, head)
                lane.head, lane.busy = None, True
                self._bury(subscription, [lane], item, PavaneError(text))
            return
        head.deaths += 1
        reaction = Reaction()
        reaction.parked = [head]
        await self._session.durable(reaction=reaction)
        self._go_on(subscription, lane)
        while lane.busy and self._session.open:
            await asyncio.sleep(0.005)

    async def give(self, service: str, slots: set[int], grace_s: float) -> None:
        """Let what is under way in these slots end, and forget the rest."""
        ends = self._loop.time() + grace_s
        mine = self._by_service.get(service, ())
        busy = [lane for s in mine for lane in s.leave(slots, self.consumer.tail)]
        while self._loop.time() < ends and any(lane.busy for lane in busy):
            await asyncio.sleep(0.002)
        calls = {lane.call for lane in busy if lane.busy and lane.call is not None}
        for call in calls:
            call.cancel()
        if calls:
            await asyncio.wait(calls, timeout=1.0)
        self._write_cursors([(s, slot) for s in mine for slot in slots if slot in s.slots])
        for subscription in mine:
            subscription.drop(slots)

    def _write_cursors(self, of: Iterable[tuple[Subscription, int]]) -> None:
        moved: list[tuple[int, int, int]] = []
        for subscription, slot in of:
            progress = subscription.slots[slot]
            position = subscription.reached(slot, self.consumer.tail)
            if position > progress.written:
                progress.written = position
                moved.append((subscription.no, slot, position))
        if moved:
            commit = Commit(_ignore)
            commit.reaction = Reaction()
            commit.reaction.cursors = moved
            self._session.submit(commit)

    async def tick(self) -> None:
        """Write the cursors now and then, and do what people asked for."""
        now_s = self._loop.time()
        if now_s >= self._cursors_due_s:
            self._cursors_due_s = now_s + CURSORS_EVERY_S
            self._write_cursors(
                [(s, slot) for s in self.consumer.subscriptions for slot in s.slots]
            )
        if self._by_no:
            for row in await self.store.handler_rows():
                subscription = self._by_no.get(row.no)
                if subscription is not None:
                    self._obey(subscription, row.paused_until_us, row.reason)

    def _obey(self, subscription: Subscription, until_us: int, reason: str) -> None:
        if reason.startswith("breaker"):
            return  # that is this node's own, or another's
        if until_us <= self._session.now_us():
            until_us = 0
        was, subscription.paused_until_us = subscription.paused_until_us, until_us
        if was and not until_us:
            for lane in list(subscription.lanes.values()):
                self._go_on(subscription, lane)
            subscription.pump()

    # -- one call ------------------------------------------------------------------------------

    def _start(self, subscription: Subscription, lanes: list[Lane], items: list[Item]) -> None:
        """Handle these events, the first of their lanes, in a task of its own."""
        if subscription.options.state is not None and not self._enter(
            subscription, lanes[0], items[0]
        ):
            return
        subscription.began()
        self._call_soon(subscription, lanes, items)

    def _call_soon(self, subscription: Subscription, lanes: list[Lane], items: list[Item]) -> None:
        # A task made directly, and no callback when it is done, save a tenth of an event's cost.
        task = asyncio.Task(self._handle(subscription, lanes, items), loop=self._loop)
        for lane in lanes:
            lane.call = task
        self._calls[items[0]] = task

    def _spawn(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a duty of the handlers failed", exc_info=error)
            if self._session.open and isinstance(error, (StoreError, LeaseLost)):
                self._session.lost(error)

    def _gate(self, subscription: Subscription, row: EventRow) -> tuple[str, str, str]:
        handler = subscription.handler
        return handler.service.name, handler.state_name, row.key

    def _enter(self, subscription: Subscription, lane: Lane, item: Item) -> bool:
        """Let one handler at a time at the state of a key; the others wait for their turn."""
        gate = self._gate(subscription, item.row)
        waiting = self._gates.get(gate)
        if waiting is None:
            self._gates[gate] = deque()
            return True
        waiting.append((subscription, lane, item))
        return False

    def _leave(self, subscription: Subscription, item: Item) -> None:
        gate = self._gate(subscription, item.row)
        waiting = self._gates.get(gate)
        if waiting:
            other, lane, following = waiting.popleft()
            other.began()
            self._call_soon(other, [lane], [following])
        else:
            self._gates.pop(gate, None)

    async def _handle(
        self, subscription: Subscription, lanes: list[Lane], items: list[Item]
    ) -> None:
        """Make one attempt and hand on what became of it; never raises."""
        first = items[0]
        try:
            await self._attempt(subscription, lanes, items, first)
        except asyncio.CancelledError:
            if self._session.open:
                raise
        except Exception as error:
            log.exception("a duty of the handlers failed")
            self._session.lost(StoreError(f"A duty of this node failed: {error!r}."))
        finally:
            self._calls.pop(first, None)

    async def _attempt(
        self, subscription: Subscription, lanes: list[Lane], items: list[Item], first: Item
    ) -> None:
        now = self._session.now_us()
        handler = subscription.handler
        if len(subscription.variants) > 1:
            handler = subscription.variant(first.row.key, first.row.id)
        context = Handling(self, handler, first, now)
        current_handler.set(context)
        for item in items:
            item.began_us = item.began_us or now
        error: BaseException | None = None
        try:
            wanted = self._wanted(handler, items, now)
            if not wanted:
                subscription.ended()
                self._skipped(subscription, lanes, items)
                return
            if handler.options.transaction:
                subscription.ended()
                self._in_transaction(subscription, handler, context, lanes, items, wanted)
                return
            state = None if handler.state_decoder is None else await self._state(handler, first)
            given = wanted if handler.takes_list else wanted[0]
            if handler.is_async and state is None and handler.options.timeout_s is None:
                result = await handler.fn(given)
            else:
                result = await self._call(handler, given, state)
            self._collect(handler, context, result, first, state)
        except KeyboardInterrupt:
            raise
        except BaseException as failure:  # a handler that exits has failed; its node goes on
            error = failure
        subscription.ended()
        if isinstance(error, asyncio.CancelledError) and (
            lanes[0].stopped or not self._session.open
        ):
            return  # the next owner handles it
        if subscription.circuit is not None:
            self._recorded(subscription, subscription.circuit, error)
        if error is None:
            self._done(subscription, handler, context, lanes, items)
        else:
            for settle in context.settled:
                settle()
            self._failed(subscription, lanes, items, error)
        if subscription.ready:
            subscription.pump()

    def _wanted(self, handler: Handler, items: list[Item], now_us: int) -> list[Any]:
        """Return the events to handle: neither too old nor filtered out."""
        wanted: list[Any] = []
        where = handler.options.where
        for item in items:
            cls = handler.events[item.row.type]
            ttl_s = cls.event_ttl_s
            if ttl_s is not None and item.row.at_us + ttl_s * 1e6 < now_us and not item.again:
                continue
            value = read_event(cls, item.row, item.data)
            if where is None or where(value):
                wanted.append(value)
        return wanted

    async def _state(self, handler: Handler, item: Item) -> Any:
        if handler.state_decoder is None:
            return None
        raw = await self.store.state(handler.service.name, handler.state_name, item.row.key)
        kind = handler.options.state
        assert kind is not None
        return kind() if raw is None else handler.state_decoder(raw)

    async def _call(self, handler: Handler, given: Any, state: Any) -> Any:
        args = (given,) if handler.state_decoder is None else (given, state)
        timeout_s = handler.options.timeout_s
        if timeout_s is None:
            return await (handler.fn(*args) if handler.is_async else self._in_thread(handler, args))
        try:
            async with asyncio.timeout(timeout_s):
                return await (
                    handler.fn(*args) if handler.is_async else self._in_thread(handler, args)
                )
        except TimeoutError as error:
            raise StepTimeout(
                f"{handler!r} took longer than its timeout of {timeout_s:g} s; whether it took "
                f"effect outside is unknown."
            ) from error

    async def _in_thread(self, handler: Handler, args: tuple[Any, ...]) -> Any:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._config.step_threads, "pavane-handler")
        context = copy_context()

        def call() -> Any:
            try:
                return context.run(handler.fn, *args)
            except StopIteration as error:  # which no future takes: it would wait for ever
                raise RuntimeError(f"{handler!r} raised StopIteration.") from error

        return await self._loop.run_in_executor(self._threads, call)

    def _collect(
        self, handler: Handler, context: Handling, result: Any, item: Item, state: Any
    ) -> None:
        """Turn what a call returned and changed into what its commit writes."""
        if result is not None:
            returned = cast("list[Any]", result if isinstance(result, (list, tuple)) else [result])
            for event in returned:
                if not is_event(event):
                    raise NotDeclared(
                        f"{handler!r} returned {event!r}, which is no event. Return an event, a "
                        f"list of events or None."
                    )
                if handler.emits is not None and type(event) not in handler.emits:
                    listed = ", ".join(e.event_type for e in handler.emits) or "nothing"
                    raise NotDeclared(
                        f"{handler!r} returned {class_of(event).event_type}, but declares to "
                        f"publish {listed}. Add it to the return annotation, or to emits=[…]."
                    )
                context.publish(event, handler.service.name)
        if handler.state_decoder is not None:
            service, name, key = handler.service.name, handler.state_name, item.row.key
            context.reaction.states = [StateRow(service, name, key, encode(state))]

    def _in_transaction(
        self, subscription: Subscription, handler: Handler, context: Handling,
        lanes: list[Lane], items: list[Item], wanted: list[Any],
    ) -> None:  # fmt: skip
        """Call the handler where its commit is written, with the connection that writes it."""
        first = items[0]

        def work(connection: Any, state: bytes | None) -> None:
            args: list[Any] = [wanted if handler.takes_list else wanted[0]]
            value: Any = None
            if handler.state_decoder is not None:
                kind = handler.options.state
                assert kind is not None
                value = kind() if state is None else handler.state_decoder(state)
                args.append(value)
            context.restart()
            variables = copy_context()
            variables.run(current_handler.set, context)
            result = variables.run(handler.fn, *args, connection)
            self._collect(handler, context, result, first, value)
            commit.events, commit.messages = context.events, context.messages
            context.reaction.members = context.members

        commit = self._commit_of(subscription, handler, context, lanes, items)
        commit.work = work
        if handler.state_decoder is not None:
            commit.work_state = (handler.service.name, handler.state_name, first.row.key)
        self._session.submit(commit)

    # -- what became of it ---------------------------------------------------------------------

    def _skipped(self, subscription: Subscription, lanes: list[Lane], items: list[Item]) -> None:
        """None of these events is for the handler: nothing is written, unless they were parked."""
        parked = [item for item in items if item.parked is not None]
        if parked:
            self._finish(subscription, lanes, items, "expired")
            return
        for item in items:
            subscription.settled(item.row.pos, item.row.slot)
        self._lanes_done(subscription, lanes, items)

    def _done(
        self, subscription: Subscription, handler: Handler, context: Handling,
        lanes: list[Lane], items: list[Item],
    ) -> None:  # fmt: skip
        commit = self._commit_of(subscription, handler, context, lanes, items)
        if handler.options.shadow:
            self._shadow(context, subscription.no, items[0].row.pos, b"null")
        else:
            commit.events, commit.messages = context.events, context.messages
            context.reaction.members = context.members
        self._session.submit(commit)

    def _shadow(self, context: Handling, no: int, pos: int, error: bytes) -> None:
        would = [
            {"type": row.type, "key": row.key, "data": Raw(row.data)} for row in context.events
        ]
        now = self._session.now_us()
        context.reaction.shadows = [ShadowRow(no, pos, now, encode(would), error)]

    def _commit_of(
        self, subscription: Subscription, handler: Handler, context: Handling,
        lanes: list[Lane], items: list[Item],
    ) -> Commit:  # fmt: skip
        # Made without a cycle (`written` must not know `commit`), to spare the garbage collector.
        def written(error: PavaneError | None) -> None:
            for settle in context.settled:
                settle()
            if handler.options.transaction and subscription.circuit is not None:
                self._recorded(subscription, subscription.circuit, error)
            if error is None or isinstance(error, Conflict):
                # A conflict: another node handled it, in whose custody this partition was.
                for item in items:
                    subscription.settled(item.row.pos, item.row.slot)
                self._lanes_done(subscription, lanes, items)
            elif not isinstance(error, (LeaseLost, StoreError)):
                failure = error.error if isinstance(error, WorkFailed) else error
                self._failed(subscription, lanes, items, failure)

        commit = Commit(written)
        commit.reaction = context.reaction
        variant = "" if handler is subscription.handler else handler.name
        self._mark(context.reaction, subscription.no, items, "done", variant)
        return commit

    def _mark(
        self, reaction: Reaction, no: int, items: list[Item], outcome: Outcome, by: str = ""
    ) -> None:
        now = self._session.now_us()
        reaction.marks = marks = [
            MarkRow(no, item.row.pos, now, now - item.began_us, item.attempt, outcome, by)
            for item in items
        ]
        parked = [item for item in items if item.parked is not None]
        if parked:
            reaction.unparked = [(no, item.row.pos) for item in parked]
            again = {item.row.pos for item in parked if item.is_repetition}
            reaction.marks = [mark for mark in marks if mark.pos not in again]
            reaction.remarks = [mark for mark in marks if mark.pos in again]

    def _finish(
        self, subscription: Subscription, lanes: list[Lane], items: list[Item], outcome: Outcome
    ) -> None:
        """Write that these events need no handling, and go on."""

        def written(error: PavaneError | None) -> None:
            if not isinstance(error, (LeaseLost, StoreError)):
                for item in items:
                    subscription.settled(item.row.pos, item.row.slot)
                self._lanes_done(subscription, lanes, items)

        commit = Commit(written)
        commit.reaction = Reaction()
        self._mark(commit.reaction, subscription.no, items, outcome)
        self._session.submit(commit)

    def _lanes_done(self, subscription: Subscription, lanes: list[Lane], items: list[Item]) -> None:
        if subscription.options.state is not None:
            self._leave(subscription, items[0])
        for lane in lanes:
            lane.busy, lane.call = False, None
            self._go_on(subscription, lane)

    def _go_on(self, subscription: Subscription, lane: Lane) -> None:
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
            self._spawn(self._next_parked(subscription, lane))
        else:
            subscription.wake(lane)

    def _due(self, subscription: Subscription, lane: Lane, head: ParkedEvent) -> None:
        if lane.head is head and self._session.open:
            self._go_on(subscription, lane)

    async def _next_parked(self, subscription: Subscription, lane: Lane) -> None:
        """Find the parked event that is next in its key; it is durable or about to be."""
        flushed = False
        after, key = (lane.key - 1, "") if isinstance(lane.key, int) else (0, lane.key)
        while self._session.open:
            rows = await self.store.parked_events(subscription.no, [lane.slot], after, 1, key)
            if rows:
                lane.head = rows[0]
                lane.behind -= 1
                break
            if flushed:
                lane.behind = 0
                break
            await self._session.committer.flush()
            flushed = True
        lane.busy = False
        self._go_on(subscription, lane)

    def _resume(self, subscription: Subscription, lane: Lane) -> None:
        """Handle the parked event at the head of a lane."""
        assert lane.head is not None
        head, lane.head = lane.head, None
        subscription.began()
        self._spawn(self._resume_from_store(subscription, lane, head))

    async def _resume_from_store(
        self, subscription: Subscription, lane: Lane, head: ParkedEvent
    ) -> None:
        row = (await self.store.events_at([head.pos])).get(head.pos)
        subscription.ended()
        if row is not None:
            self._start(subscription, [lane], [Item(row, head)])
            return
        log.error("event %d of handler %r is gone", head.pos, subscription.handler)
        reaction = Reaction()
        reaction.unparked = [(subscription.no, head.pos)]
        await self._session.durable(reaction=reaction)
        lane.busy = False
        self._go_on(subscription, lane)

    def _recorded(
        self, subscription: Subscription, circuit: Circuit, error: BaseException | None
    ) -> None:
        """Tell the breaker; when it opens or closes, tell people."""
        if isinstance(error, FINAL):
            circuit.give_back()
            return
        if not circuit.record(error is None, self._loop.time()):
            return
        if circuit.retry_at_s is None:
            log.info("%r goes on", subscription.handler)
            self._session.spawn(self.store.pause_handler(subscription.no, 0, ""))
            subscription.pump()
            return
        reason = f"{circuit.says()}; the last: {error!r}"[:CAUSE_MAX]
        log.warning("%r is paused, %s", subscription.handler, reason)
        until = self._session.now_us() + round((circuit.retry_at_s - self._loop.time()) * 1e6)
        self._session.spawn(self.store.pause_handler(subscription.no, until, reason))

    # -- failures ------------------------------------------------------------------------------

    def _failed(
        self, subscription: Subscription, lanes: list[Lane], items: list[Item],
        error: BaseException,
    ) -> None:  # fmt: skip
        """Park each event for its next attempt, or give it up."""
        if len(items) == 1:
            self._failed_one(subscription, lanes, items[0], error)
            return
        # One of them may be to blame: from now on each is tried alone.
        now = self._session.now_us()
        by_key: dict[Any, Lane] = {lane.key: lane for lane in lanes}
        parked: list[ParkedEvent] = []
        raw = encode_error(error)
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
        delay_s = None
        if not isinstance(error, FINAL):
            elapsed_s = (self._session.now_us() - item.began_us) / 1e6
            delay_s = retry.delay_s(item.attempt, error, elapsed_s, random.random)
        if subscription.options.shadow or delay_s is None:
            self._bury(subscription, lanes, item, error)
            return
        raw = encode_error(error)
        log.info(
            "%r failed on event %s (attempt %d), next in %.2f s: %s", subscription.handler,
            item.row.id, item.attempt, delay_s, error_summary(raw),
        )  # fmt: skip
        item.attempt += 1
        due_us = self._session.now_us() + round(delay_s * 1e6)
        row = self._parked(subscription, item, due_us, raw)
        lanes[0].head = row
        self._park(subscription, lanes, [item], [row])

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
        parked: list[ParkedEvent],
    ) -> None:  # fmt: skip
        """Write the next attempts, and take what waits in their lanes into custody behind them."""

        def written(error: PavaneError | None) -> None:
            if isinstance(error, (LeaseLost, StoreError)):
                return
            for item in items:
                subscription.settled(item.row.pos, item.row.slot)
            self._lanes_done(subscription, lanes, items)

        for lane in lanes:
            behind, lane.queue = list(lane.queue), deque()
            self._park_behind(subscription, lane, behind)
        commit = Commit(written)
        commit.reaction = Reaction()
        commit.reaction.parked = parked
        self._session.submit(commit)

    def _park_behind(self, subscription: Subscription, lane: Lane, items: list[Item]) -> None:
        """Take events into custody that wait behind another of their key."""
        if not items:
            return
        lane.behind += len(items)

        def written(error: PavaneError | None) -> None:
            if not isinstance(error, (LeaseLost, StoreError)):
                for item in items:
                    subscription.settled(item.row.pos, item.row.slot)

        commit = Commit(written)
        commit.reaction = Reaction()
        commit.reaction.parked = [
            self._parked(subscription, item, LAST_US, b"null") for item in items
        ]
        self._session.submit(commit)

    def _bury(
        self, subscription: Subscription, lanes: list[Lane], item: Item, error: BaseException
    ) -> None:
        """Give an event up: it becomes a dead letter, and its key goes on or waits, as declared."""
        lane, row = lanes[0], item.row
        raw = encode_error(error)
        cause = error_summary(raw)[:CAUSE_MAX]
        holds = subscription.options.on_dead == "stop" and bool(row.key)
        log.error("%r gave up event %s: %s", subscription.handler, row.id, cause)

        def written(failure: PavaneError | None) -> None:
            if isinstance(failure, (LeaseLost, StoreError)):
                return
            subscription.settled(row.pos, row.slot)
            self._lanes_done(subscription, lanes, [item])

        commit = Commit(written)
        commit.reaction = reaction = Reaction()
        self._mark(reaction, subscription.no, [item], "dead")
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
                behind, lane.queue = list(lane.queue), deque()
                self._park_behind(subscription, lane, behind)
        self._session.submit(commit)

    # -- what people ask for -------------------------------------------------------------------

    def redo_message(self, message: Message, redelivered: bool) -> None:
        """Handle a dead letter once more, or drop it; or handle an old event again."""
        self._spawn(self._redo(message, unpack(Redo, message.body)))

    async def _redo(self, message: Message, redo: Redo) -> None:
        subscription = self._by_no.get(redo.handler)
        seen = await self.store.seen(message.to, [message.id])
        row = (await self.store.events_at([redo.pos])).get(redo.pos)
        if seen or subscription is None or row is None:
            if subscription is None:
                log.error("message %s is for a handler that is not declared here", message.id)
            self._session.consumed(message)
            return
        dead = None
        if redo.dead:
            letters = await self.store.dead_letters(DeadFilter(numbers=(redo.dead,)))
            if not letters:
                self._session.consumed(message)
                return
            dead = letters[0]
        while row.slot not in subscription.slots:  # its partition is being taken over
            if not self._session.owns(message.target):
                return
            await asyncio.sleep(0.01)
        now = self._session.now_us()

        def written(error: PavaneError | None) -> None:
            self._session.consumed(message)
            if error is None:
                self._asked(subscription, row, dead, redo.drop)

        commit = Commit(written)
        commit.inbox = [InboxRow(message.to, message.id, now)]
        commit.reaction = reaction = Reaction()
        if redo.dead:
            reaction.undead = [redo.dead]
        if redo.drop:
            reaction.remarks = [MarkRow(subscription.no, row.pos, now, 0, 0, "dropped")]
        else:
            data = bytes(redo.data) if bytes(redo.data) != b"null" else None
            if data is None and dead is not None and dead.data != row.data:
                data = dead.data
            again = redo.again or (dead.again if dead is not None else "")
            reaction.parked = [
                ParkedEvent(
                    subscription.no, row.pos, row.slot, row.key, 1, now, now, again=again,
                    data=data, dead=redo.dead,
                )
            ]  # fmt: skip
        self._session.submit(commit)

    def _asked(
        self, subscription: Subscription, row: EventRow, dead: DeadRow | None, drop: bool
    ) -> None:
        """What was asked for an event is durable: let its key go on, with this event first."""
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
            behind, lane.queue = list(lane.queue), deque()
            self._park_behind(subscription, lane, behind)
        self._go_on(subscription, lane)

    # -- stopping ------------------------------------------------------------------------------

    async def drain(self, grace_s: float) -> None:
        """Let what is under way end within the grace period, and write how far everything is."""
        for subscription in self.consumer.subscriptions:
            subscription.hold()
        ends = self._loop.time() + grace_s
        while self._loop.time() < ends and any(s.running for s in self.consumer.subscriptions):
            await asyncio.sleep(0.002)
        await self._session.committer.flush()
        self._write_cursors([(s, slot) for s in self.consumer.subscriptions for slot in s.slots])

    async def close(self) -> None:
        """Stop at once."""
        for subscription in self.consumer.subscriptions:
            subscription.close()
        tasks = [*self._tasks, *self._calls.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            with suppress(TimeoutError):
                await asyncio.wait(tasks, timeout=1.0)
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)


def handler_spec(handler: Handler) -> HandlerSpec:
    """Return a handler as the store is told of it."""
    since = handler.options.since
    if since is None:
        since_us = None
    elif since == BEGINNING:
        since_us = 0
    else:
        since_us = round(since.timestamp() * 1e6)
    return HandlerSpec(handler.service.name, handler.name, tuple(handler.events), since_us)


def _ignore(_: PavaneError | None) -> None:
    """Nothing waits for this commit."""
