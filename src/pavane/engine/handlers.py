"""Handlers: reacts to events, with effects exactly once, in order per key.

What a handler returns and publishes is one commit with the mark that it handled the event. What
fails goes into custody (`custody.py`); what is next is up to the subscription (`subscription.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Collection, Coroutine, Iterable, Sequence
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from msgspec import Raw

from pavane.core.codec import encode, encode_error, error_summary
from pavane.engine.breaker import BREAKER, Circuit
from pavane.engine.consumer import Consumer
from pavane.engine.custody import CAUSE_MAX, FINAL, Custody
from pavane.engine.handling import Handling, mark
from pavane.engine.mailbox import Mailbox
from pavane.engine.publishing import read_event
from pavane.engine.subscription import Item, Lane, Progress, Subscription
from pavane.engine.transactions import then
from pavane.errors import (
    LeaseLost,
    NotDeclared,
    PavaneError,
    StepTimeout,
    StoreError,
    WorkFailed,
)
from pavane.event import class_of, is_event
from pavane.handler import BEGINNING, Handler, current_handler
from pavane.policy import Limit
from pavane.stores.eventlog import (
    HandlerSpec,
    Outcome,
    Reaction,
    ShadowRow,
    StateRow,
)
from pavane.stores.port import Commit, Conflict, Message

if TYPE_CHECKING:
    from pavane.engine.session import Session

log = logging.getLogger("pavane.handlers")

CURSORS_EVERY_S = 1.0
BREAKER_STALE_US = 10_000_000
"""How long after its end a breaker's pause is still shown, for the node that is about to retry."""


class Handlers:
    """Owns the handlers of one session; see the module."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.store = session.store
        self._config = session.config
        self._loop = asyncio.get_running_loop()
        self._by_service: dict[str, list[Subscription]] = {}
        self.by_no: dict[int, Subscription] = {}
        self._calls: dict[Item, asyncio.Task[None]] = {}
        self._queued: dict[Lane, tuple[Subscription, list[Lane], list[Item]]] = {}
        """Calls that wait for a permit, by their first lane."""
        self._gates: dict[tuple[str, str, str], deque[tuple[Subscription, Lane, Item]]] = {}
        self._cursors_due_s = 0.0
        self.consumer = Consumer(self.store, session.spawn, 0)
        self.custody = Custody(session)
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
                handler,
                row,
                self.start_call,
                self.custody.resume,
                self.custody.park_behind,
                self._loop.time,
            )
            subscription.variants += [
                (variant, variant.options.share or 0)
                for variant in variants
                if variant.instead_of is handler
            ]
            if not row.reason.startswith(BREAKER):  # this node finds out by itself
                subscription.paused_until_us = row.paused_until_us
            self._by_service.setdefault(handler.service.name, []).append(subscription)
            self.by_no[row.no] = subscription
            self.consumer.add(subscription)

    # -- partitions ----------------------------------------------------------------------------

    async def own(self, service: str, slots: Sequence[int], dirty: set[int]) -> None:
        """Take these slots up where they were left; in `dirty` ones a process may have died."""
        # What their last owner handled or parked is looked for up to the tail, so it must not be
        # behind what that owner has seen.
        await self.consumer.catch_up()
        for subscription in self._by_service.get(service, ()):
            await self._own(subscription, slots, dirty)

    async def _own(self, subscription: Subscription, slots: Sequence[int], dirty: set[int]) -> None:
        cursors = await self.store.cursors(subscription.no)
        known = self.consumer.tail
        counted: set[int] = set()
        if dirty:
            counted = await self.custody.take_over(subscription, sorted(dirty), cursors, known)
        suspects = await self.custody.load(subscription, slots, dirty, counted)
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
                self.custody.go_on(subscription, lane)
        for lane in suspects:
            self._session.deaths.suspect(partial(self.custody.try_suspect, subscription, lane))

    def leave(self, places: Collection[tuple[str, int]]) -> None:
        """Begin nothing more in these slots of services."""
        for service in {service for service, _ in places}:
            slots = {slot for of, slot in places if of == service}
            for subscription in self._by_service.get(service, ()):
                self._unqueue(subscription.leave(slots, self.consumer.tail))

    @property
    def is_idle(self) -> bool:
        """Whether no event is handled here, or waits for that."""
        return not any(subscription.lanes for subscription in self.by_no.values())

    def at_work(self) -> set[tuple[str, int]]:
        """Return the services and slots in which something is under way."""
        return {
            (service, lane.slot)
            for service, subscriptions in self._by_service.items()
            for subscription in subscriptions
            for lane in subscription.lanes.values()
            if lane.busy
        }

    async def give(self, service: str, slots: set[int]) -> None:
        """Stop what is under way in these slots, and forget the rest."""
        mine = self._by_service.get(service, ())
        busy = [lane for s in mine for lane in s.leave(slots, self.consumer.tail)]
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
            self._session.submit(Commit(reaction=Reaction(cursors=moved)))

    def tick(self) -> None:
        """Write the cursors now and then, and go on with handlers whose pause is over."""
        now_s = self._loop.time()
        if now_s >= self._cursors_due_s:
            self._cursors_due_s = now_s + CURSORS_EVERY_S
            self._write_cursors(
                [(s, slot) for s in self.consumer.subscriptions for slot in s.slots]
            )
        for subscription in self.by_no.values():
            if subscription.paused_until_us:
                self._pause(subscription, subscription.paused_until_us)

    async def look(self) -> None:
        """Do what people asked for."""
        if self.by_no:
            for row in await self.store.handler_rows():
                subscription = self.by_no.get(row.no)
                if subscription is not None:
                    subscription.knows_of(row.types)
                    self.consumer.listen(subscription)
                    self._obey(subscription, row.paused_until_us, row.reason)

    def _obey(self, subscription: Subscription, until_us: int, reason: str) -> None:
        now = self._session.now_us()
        circuit = subscription.circuit
        if reason.startswith(BREAKER):
            # It is this node's own, another's, or of a node that is gone and cannot take it back.
            is_open = circuit is not None and circuit.retry_at_s is not None
            if not is_open and until_us + BREAKER_STALE_US < now:
                self._session.spawn(self._say(subscription, 0, ""))
            until_us = 0
        elif not until_us and circuit is not None and circuit.retry_at_s is not None:
            circuit.retry_at_s = min(circuit.retry_at_s, self._loop.time())  # resumed by hand
            subscription.pump()
        self._pause(subscription, until_us)

    def _pause(self, subscription: Subscription, until_us: int) -> None:
        """Let a handler pause until then; go on with it if that is over."""
        if until_us <= self._session.now_us():
            until_us = 0
        was, subscription.paused_until_us = subscription.paused_until_us, until_us
        if was and not until_us:
            for lane in list(subscription.lanes.values()):
                self.custody.go_on(subscription, lane)
            subscription.pump()

    # -- one call ------------------------------------------------------------------------------

    def start_call(self, subscription: Subscription, lanes: list[Lane], items: list[Item]) -> None:
        """Handle these events, the first of their lanes, in a task of its own."""
        subscription.began()
        self.make_call(subscription, lanes, items)

    def make_call(self, subscription: Subscription, lanes: list[Lane], items: list[Item]) -> None:
        """Go on with a call that has begun, as soon as the state of its key is free."""
        if lanes[0].stopped:
            self._put_off(subscription, lanes)
        elif self._enter(subscription, lanes[0], items[0]):
            self._call_soon(subscription, lanes, items)

    def _call_soon(self, subscription: Subscription, lanes: list[Lane], items: list[Item]) -> None:
        if subscription.options.limit is not None and not items[0].permit:
            self._queue(subscription, lanes, items, subscription.options.limit)
            return
        # A task made directly, and no callback when it is done, save a tenth of an event's cost.
        task = asyncio.Task(
            self._handle(subscription, lanes, items), loop=self._loop,
            context=self._session.context.copy(),
        )  # fmt: skip
        for lane in lanes:
            lane.call = task
        self._calls[items[0]] = task

    def _queue(
        self, subscription: Subscription, lanes: list[Lane], items: list[Item], limit: Limit
    ) -> None:
        """Make the call when there is a permit for it."""
        handler, first = subscription.handler, items[0]
        service, row = handler.service.name, first.row
        try:
            event = read_event(handler.events[row.type], row, first.data)
            share = limit.key_of((event,), {})
        except Exception as error:  # of the user's function, too
            subscription.ended()
            self.custody.failed(subscription, lanes, items, error)
            return
        work = f"{handler!r}@{row.pos}.{first.attempt}{first.again}"
        first.permit = work
        self._queued[lanes[0]] = (subscription, lanes, items)

        def begin(message: Message) -> None:
            self._session.consumed(message)
            if self._queued.pop(lanes[0], None) is not None:
                self._call_soon(subscription, lanes, items)

        place = (service, handler.limit_name, share)
        target = self.store.target_of(service, row.key or row.id)
        self._session.limits.ask(place, work, service, target, begin)

    def _unqueue(self, stopped: Iterable[Lane]) -> None:
        """Make no call for which there is no permit yet: the next owner asks for it again."""
        for lane in stopped:
            queued = self._queued.pop(lane, None)
            if queued is not None:
                subscription, lanes, items = queued
                self._session.limits.forget(items[0].permit)
                self._leave(lane)
                self._put_off(subscription, lanes)

    def _enter(self, subscription: Subscription, lane: Lane, item: Item) -> bool:
        """Let one handler at a time at the state of a key; the others wait for their turn."""
        handler = subscription.variant(item.row.key, item.row.id)
        if handler.options.state is None:
            return True
        gate = (handler.service.name, handler.state_name, item.row.key)
        waiting = self._gates.get(gate)
        if waiting is not None:
            waiting.append((subscription, lane, item))
            return False
        self._gates[gate] = deque()
        lane.gate = gate
        return True

    def _leave(self, lane: Lane) -> None:
        """Let the next one at the state that was this lane's to change, if it was."""
        gate, lane.gate = lane.gate, None
        if gate is None:
            return
        waiting = self._gates[gate]
        while waiting:
            subscription, following, item = waiting.popleft()
            if not following.stopped:
                following.gate = gate
                self._call_soon(subscription, [following], [item])
                return
            self._put_off(subscription, [following])
        del self._gates[gate]

    def _put_off(self, subscription: Subscription, lanes: list[Lane]) -> None:
        """Do not make a call after all: its slot leaves, and the next owner handles the event."""
        for lane in lanes:
            lane.busy = False
        subscription.ended()
        subscription.unanswered()

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
            self._session.failed(error)
        finally:
            self._calls.pop(first, None)

    async def _attempt(
        self, subscription: Subscription, lanes: list[Lane], items: list[Item], first: Item
    ) -> None:
        now = self._session.now_us()
        handler = subscription.handler
        if len(subscription.variants) > 1:  # all of a batch are for the same
            handler = subscription.variant(first.row.key, first.row.id)
        context = Handling(self._session, handler, first, now)
        if first.permit:
            context.settled.append(partial(self._session.limits.give_back, first.permit))
        current_handler.set(context)
        for item in items:
            item.began_us = item.began_us or now
        error: BaseException | None = None
        try:
            wanted = self._wanted(handler, items, now)
            if not wanted:
                subscription.ended()
                subscription.unanswered()
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
        except BaseException as failure:  # a handler that exits has failed; its node goes on
            error = failure
        subscription.ended()
        context.close()
        if lanes[0].left or (
            isinstance(error, asyncio.CancelledError)
            and (lanes[0].stopped or not self._session.open)
        ):
            self._left(subscription, context, lanes[0])
            return
        if subscription.circuit is not None:
            self._recorded(subscription, subscription.circuit, error)
        if error is None:
            self._done(subscription, handler, context, lanes, items)
        else:
            for settle in context.settled:
                settle()
            self.custody.failed(subscription, lanes, items, error)
        if subscription.ready:
            subscription.pump()

    def _left(self, subscription: Subscription, context: Handling, lane: Lane) -> None:
        """Nothing comes of a call: the next owner of its slot handles the event."""
        for settle in context.settled:
            settle()
        self._leave(lane)
        subscription.unanswered()

    def _wanted(self, handler: Handler, items: list[Item], now_us: int) -> list[Any]:
        """Return the events to handle: neither too old nor filtered out."""
        wanted: list[Any] = []
        where = handler.options.where
        for item in items:
            cls = handler.events[item.row.type]
            ttl_s = cls.event_ttl_s
            expired = ttl_s is not None and item.row.at_us + ttl_s * 1e6 < now_us
            if expired and not item.is_repetition:
                continue
            value = read_event(cls, item.row, item.data)
            if where is None or where(value):
                wanted.append(value)
        return wanted

    async def _state(self, handler: Handler, item: Item) -> Any:
        raw = await self.store.state(handler.service.name, handler.state_name, item.row.key)
        return handler.read_state(raw)

    async def _call(self, handler: Handler, given: Any, state: Any) -> Any:
        args = (given,) if handler.state_decoder is None else (given, state)
        timeout_s = handler.options.timeout_s
        if timeout_s is None:
            return await self._result(handler, args)
        scope = asyncio.timeout(timeout_s)
        try:
            async with scope:
                return await self._result(handler, args)
        except TimeoutError as error:
            if not scope.expired():
                raise  # it is the handler's own
            raise StepTimeout(
                f"{handler!r} took longer than its timeout of {timeout_s:g} s; whether it took "
                f"effect outside is unknown."
            ) from error

    def _result(self, handler: Handler, args: tuple[Any, ...]) -> Awaitable[Any]:
        return (
            handler.fn(*args) if handler.is_async else self._session.threads.call(handler.fn, *args)
        )

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
            body = None if context.deletes_state else encode(state)
            context.reaction.states = [StateRow(service, name, key, body)]

    def _in_transaction(
        self, subscription: Subscription, handler: Handler, context: Handling,
        lanes: list[Lane], items: list[Item], wanted: list[Any],
    ) -> None:  # fmt: skip
        """Call the handler where its commit is written, with the connection that writes it."""
        first = items[0]

        def work(connection: Any, state: bytes | None) -> Coroutine[Any, Any, None] | None:
            args: list[Any] = [wanted if handler.takes_list else wanted[0]]
            value: Any = None
            if handler.state_decoder is not None:
                value = handler.read_state(state)
                args.append(value)
            context.restart()
            variables = copy_context()
            variables.run(current_handler.set, context)

            def collect(result: Any) -> None:
                self._collect(handler, context, result, first, value)
                context.close()
                commit.events, commit.messages = context.events, context.messages
                context.reaction.members = context.members
                ends_us = self._session.now_us()
                for made in (*context.reaction.marks, *context.reaction.remarks):
                    made.took_us, made.at_us = made.took_us + ends_us - made.at_us, ends_us

            result = variables.run(handler.fn, *args, connection)
            return then(result, variables, collect) if handler.is_async else collect(result)

        commit = self._commit_of(subscription, handler, context, lanes, items)
        commit.work = work
        if handler.state_decoder is not None:
            commit.work_state = (handler.service.name, handler.state_name, first.row.key)
        self._session.submit(commit)

    # -- what became of it ---------------------------------------------------------------------

    def _skipped(self, subscription: Subscription, lanes: list[Lane], items: list[Item]) -> None:
        """None of these events is for the handler: nothing is written, unless they were parked."""
        if items[0].permit:
            self._session.limits.give_back(items[0].permit)
        parked = [item for item in items if item.parked is not None]
        if parked:
            self._finish(subscription, lanes, items, "expired")
            return
        self.settled(subscription, lanes, items)

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
            failure = error.error if isinstance(error, WorkFailed) else error
            if handler.options.transaction and subscription.circuit is not None:
                self._recorded(subscription, subscription.circuit, failure)
            if failure is None:
                self.settled(subscription, lanes, items)
            elif isinstance(error, Conflict):
                self.was_handled(subscription, lanes, items)
            elif not isinstance(error, (LeaseLost, StoreError)):
                self.custody.failed(subscription, lanes, items, failure)

        variant = "" if handler is subscription.handler else handler.name
        mark(context.reaction, subscription.no, items, "done", self._session.now_us(), variant)
        return Commit(written, reaction=context.reaction)

    def _finish(
        self, subscription: Subscription, lanes: list[Lane], items: list[Item], outcome: Outcome
    ) -> None:
        """Write that these events need no handling, and go on."""

        def written(error: PavaneError | None) -> None:
            if isinstance(error, Conflict):
                self.was_handled(subscription, lanes, items)
            elif not isinstance(error, (LeaseLost, StoreError)):
                self.settled(subscription, lanes, items)

        reaction = Reaction()
        mark(reaction, subscription.no, items, outcome, self._session.now_us())
        self._session.submit(Commit(written, reaction=reaction))

    def was_handled(self, subscription: Subscription, lanes: list[Lane], items: list[Item]) -> None:
        """One of these events bears a mark: another node handled it before this one came."""
        if len(items) > 1:
            self.custody.try_alone(subscription, lanes, items, b"null")
            return

        def written(error: PavaneError | None) -> None:
            if not isinstance(error, (LeaseLost, StoreError)):
                self.settled(subscription, lanes, items)

        unparked = [(subscription.no, items[0].row.pos)]
        self._session.submit(Commit(written, reaction=Reaction(unparked=unparked)))

    def settled(self, subscription: Subscription, lanes: list[Lane], items: list[Item]) -> None:
        """What became of these events is durable: go on with their lanes."""
        subscription.settled(items)
        self._leave(lanes[0])
        for lane in lanes:
            lane.busy, lane.call = False, None
            self.custody.go_on(subscription, lane)
        if subscription.ready:
            subscription.pump()

    def _recorded(
        self, subscription: Subscription, circuit: Circuit, error: BaseException | None
    ) -> None:
        """Tell the breaker; when it opens or closes, tell people."""
        if isinstance(error, (Conflict, *FINAL)):
            circuit.give_back()
            return
        if not circuit.record(error is None, self._loop.time()):
            return
        if circuit.retry_at_s is None:
            log.info("%r goes on", subscription.handler)
            self._session.spawn(self._say(subscription, 0, ""))
            subscription.pump()
            return
        last = error_summary(encode_error(error)) if error is not None else ""
        reason = f"{circuit.says()}; the last: {last}"[:CAUSE_MAX]
        log.warning("%r is paused, %s", subscription.handler, reason)
        until = self._session.now_us() + round((circuit.retry_at_s - self._loop.time()) * 1e6)
        self._session.spawn(self._say(subscription, until, reason))

    async def _say(self, subscription: Subscription, until_us: int, reason: str) -> None:
        """Show what the breaker does, unless a person paused the handler: that counts for more."""
        rows = await self.store.handler_rows()
        row = next(row for row in rows if row.no == subscription.no)
        if not row.reason or row.reason.startswith(BREAKER):
            await self.store.pause_handler(subscription.no, until_us, reason)

    # -- stopping ------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Begin nothing more, and write how far everything is."""
        for subscription in self.consumer.subscriptions:
            subscription.hold()
        while self._queued:  # who waited behind one at the state of a key may be next
            self._unqueue(list(self._queued))
        for subscription in self.consumer.subscriptions:  # who is cancelled now did not fail
            subscription.leave(set(subscription.slots), self.consumer.tail)
        await self._session.committer.flush()
        self._write_cursors([(s, slot) for s in self.consumer.subscriptions for slot in s.slots])

    async def close(self) -> None:
        """Stop at once."""
        for subscription in self.consumer.subscriptions:
            subscription.close()
        calls = list(self._calls.values())
        for call in calls:
            call.cancel()
        if calls:
            await asyncio.wait(calls, timeout=1.0)


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
