"""Steps: executes attempts, retries them, and takes into custody what is not done at once.

A step that succeeds at once costs no write of its own: its result is committed with the run's
progress, or, for a command, with the inbox mark and the reply. One that fails and is retried, runs
for long or sends heartbeats is first parked: written with its attempt number, so that retries,
attempt counts and heartbeat details survive a crash.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import msgspec
from msgspec import Raw

from pavane.core.codec import decoder, encode, encode_error, error_summary, loaded_class
from pavane.core.envelope import Call, Permit, Reply, Request, operation_id, pack, unpack
from pavane.core.operations import Operation
from pavane.engine.held import Held
from pavane.engine.publishing import origin
from pavane.engine.transactions import Transactions
from pavane.errors import (
    BadArguments,
    CorruptJournal,
    HeartbeatTimeout,
    Locked,
    NotDecodable,
    NotEncodable,
    PavaneError,
    StepTimeout,
    TooLarge,
    UnknownName,
)
from pavane.handler import Origin
from pavane.policy import ONCE, PERSISTENT, Retry, StepOptions, seconds
from pavane.service import Step, StepInfo, current_step, deadline_from
from pavane.stores.port import Commit, InboxRow, Message, ParkedRow

if TYPE_CHECKING:
    from pavane.engine.session import Session

log = logging.getLogger("pavane.steps")

BEAT_EVERY_S = 1.0
QUEUED_US = 3600_000_000
"""A step in custody that waits for a permit asks again after so long; it should never have to."""
FINAL = (BadArguments, NotEncodable, TooLarge, NotDecodable)
"""Errors that another attempt would meet again."""
_decode_any = decoder(Any)


AS_DECLARED = Raw(b"null")


class _Options(msgspec.Struct, array_like=True):
    """Options of a call that differ from the declared ones, as they travel; types by name."""

    timeout_s: float | None
    heartbeat_s: float | None
    attempts: int | None = None
    first_s: float = 0.0
    factor: float = 1.0
    most_s: float = 0.0
    jitter: float = 0.0
    within_s: float | None = None
    give_up: list[str] = []

    @staticmethod
    def of(options: StepOptions) -> _Options:
        retry = options.retry
        if retry is None:
            return _Options(options.timeout_s, options.heartbeat_s)
        return _Options(
            options.timeout_s, options.heartbeat_s, retry.attempts, seconds(retry.first),
            retry.factor, seconds(retry.most), retry.jitter,
            None if retry.within is None else seconds(retry.within),
            [f"{kind.__module__}:{kind.__qualname__}" for kind in retry.give_up],
        )  # fmt: skip

    def restored(self, undo: Any) -> StepOptions:
        retry = None
        if self.attempts is not None:
            found = (loaded_class(name) for name in self.give_up)
            give_up = tuple(kind for kind in found if kind is not None)
            retry = Retry(
                self.attempts, self.first_s, self.factor, self.most_s, self.jitter, give_up,
                self.within_s,
            )  # fmt: skip
        return StepOptions(retry, self.timeout_s, self.heartbeat_s, undo)


UNTIL = "It is tried again until a node whose code fits has it."


class NotHere(UnknownName):
    """This node does not have the code for a step; while versions are exchanged another one may.

    No run fails of that (invariant 3): the step is put off, which counts as no attempt.
    """

    pause_s = 5.0


class Attempt(msgspec.Struct, eq=False):
    """One step under way: which call, which attempt, for whom.

    `held` is the run if it is held here and the step needs no command; `message` the command until
    its inbox mark is written. `parked` is its custody row, once there is one. `owner` is the
    service whose partition it belongs to: the command's receiver, or the holder of the run.
    """

    steps: Steps
    key: tuple[str, str]
    args: bytes
    step: Step[..., Any] | None
    options: StepOptions
    made_call: Call | None = None
    operation: Operation | None = None
    number: int = 1
    began_us: int = 0
    started_us: int = 0
    details: bytes = b"null"
    beaten: asyncio.Event | None = None
    pending_beat: bool = False
    held: Held | None = None
    message: Message | None = None
    parked: ParkedRow | None = None
    task: asyncio.Task[None] | None = None
    has_begun: bool = False
    revoked: bool = False
    abandoned: bool = False
    permit: str = ""
    """The work that it has a permit for, where there is a limit."""
    outboxed: Counter[str] | None = None
    """How often it published the same through a connection."""

    @property
    def owner(self) -> str:
        return self.key[0]

    @property
    def call(self) -> Call:
        """The command, made when it is needed: most steps are done before anyone asks."""
        if self.made_call is None:
            assert self.held is not None
            assert self.operation is not None
            self.made_call = self.steps.call(self.held, self.operation)
        return self.made_call

    def arguments(self, step: Step[..., Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what the step is called with; the code that asked for it has checked that."""
        try:
            return step.params.decode(self.args)
        except NotDecodable as error:
            raise NotHere(f"{error} {UNTIL}") from error

    def reply(self, ok: bool, raw: bytes) -> Reply:
        """Say what became of it: its encoded result, or (not `ok`) its error."""
        call = self.call
        kind = "undo" if call.undo else "step"
        return Reply(
            call.run, call.op, call.era, f"{kind} {call.service}.{call.step}", ok, Raw(raw),
            call.service, self.number, self.started_us,
        )  # fmt: skip

    @property
    def unparked(self) -> Sequence[tuple[str, str]]:
        """What its end takes out of custody."""
        return () if self.parked is None else [(self.parked.service, self.parked.id)]

    def info(self) -> StepInfo:
        call = self.call
        return StepInfo(
            call.run, call.service, call.step, self.number, operation_id(call.run, call.op, 0),
            deadline_from(self.options.timeout_s, self.started_us / 1e6),
            None if self.details == b"null" else _decode_any(self.details),
        )  # fmt: skip

    @property
    def is_transaction(self) -> bool:
        return self.step is not None and self.step.transaction

    def stop(self) -> None:
        """Cancel it. One whose task has not begun sees so when it does: cancelled, it never would,
        and nobody would give its permit back.
        """
        if self.task is not None and self.has_begun:
            self.task.cancel()

    def beat(self, details: Any) -> None:
        """Take a heartbeat, from the step's task or thread; a transaction needs none."""
        if not self.is_transaction:
            self.steps.beat_soon(self, encode(details))

    def origin(self, content: str) -> Origin:
        call = self.call
        seed = call.work_id if self.is_transaction else operation_id(call.run, call.op, 0)
        self.outboxed = self.outboxed or Counter()
        return origin(
            f"{seed}>{call.service}.{call.step}", content, self.outboxed, call.service,
            call.conversation, call.run, "", self.steps.payload_max_bytes,
        )  # fmt: skip


class _Read:
    """One or more reads of a step's row in custody, under way; a change of the row voids them."""


class Steps:
    """Owns the attempts of one session; see the module."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._store = session.store
        self._config = session.config
        self.payload_max_bytes = session.config.payload_max_bytes
        self._transactions = Transactions(session, self)
        self._loop = asyncio.get_running_loop()
        self._running: dict[tuple[str, str], Attempt] = {}
        self._queued: dict[tuple[str, str], Attempt] = {}
        """Those that wait for a permit."""
        self._commands: dict[tuple[str, str], Message] = {}
        """Commands whose effect is not durable yet."""
        self._changing: Counter[tuple[str, str]] = Counter()
        """Steps whose row in custody is about to go, or to be written for their next attempt."""
        self._reads: WeakValueDictionary[tuple[str, str], _Read] = WeakValueDictionary()
        self.draining = False

    # -- asking --------------------------------------------------------------------------------

    def encode_options(self, service: str, name: str, options: Any) -> Raw:
        """Return what a command must carry of options that were changed for one call."""
        declared = self._session.registry.services[service].steps.get(name)
        if declared is None or options is None or options is declared.options_:
            return AS_DECLARED
        return Raw(pack(_Options.of(options)))

    def launch_local(self, held: Held, operation: Operation) -> None:
        """Run a step for a run held here; its result is delivered without a message."""
        step = self._session.registry.services[operation.service].steps.get(operation.name)
        id = operation_id(held.row.id, operation.ordinal, held.header.era)
        key = (held.row.service, id)
        attempt = Attempt(self, key, operation.args, step, operation.detail)
        attempt.held, attempt.operation = held, operation
        self._begin(attempt)

    def call(self, held: Held, operation: Operation) -> Call:
        return self._session.holder.call(held, operation)

    def command_message(self, message: Message, redelivered: bool) -> None:
        """Do a step that another service asks for, once.

        A run that was taken up asks again, so a command may come while its first copy is under way;
        that one answers, and is delivered again should its effect not become durable.
        """
        key = (message.to, message.id)
        if key in self._commands:
            self._session.consumed(message)
            return
        self._commands[key] = message
        self._session.spawn(self._command_unless_seen(message, redelivered))

    async def _command_unless_seen(self, message: Message, redelivered: bool) -> None:
        try:
            call = unpack(Call, message.body)
        except CorruptJournal as error:
            log.error("command %s: %s", message.id, error)
            self._consumed(message)
            return
        await self._session.make_known(call.reply_to)
        seen = await self._store.seen(message.to, [message.id])
        if not self._session.owns(message.target):
            return  # it was handed over meanwhile, or is about to be
        if seen:
            self._consumed(message)
            return
        if not redelivered and not call.deaths:
            self._command(message)
            return
        # It may have been under way when a process died: count that before touching it again.
        now = self._session.now_us()
        parked = ParkedRow(
            message.to, call.run, message.id, message.target, message.body, call.attempt, now,
            call.began_us or now, bytes(call.beat), b"null", max(1, call.deaths),
        )  # fmt: skip
        touched = self._session.deaths.touched[parked.target]
        touched.parked[parked.service, parked.id] = parked.deaths - 1
        self._park_command(message, parked, partial(self._counted, parked))

    def _counted(self, parked: ParkedRow, error: PavaneError | None) -> None:
        if error is None:
            self.resume(parked)

    def _park_command(
        self, message: Message, parked: ParkedRow, done: Callable[[PavaneError | None], None]
    ) -> None:
        def written(error: PavaneError | None) -> None:
            self._consumed(message)
            done(error)

        mark = InboxRow(message.to, message.id, self._session.now_us())
        self._session.submit(Commit(written, inbox=[mark], parked=[parked]))

    def _command(self, message: Message) -> None:
        call = unpack(Call, message.body)
        attempt = self._attempt(call, message.to)
        attempt.message = message
        self._begin(attempt)

    def _attempt(self, call: Call, owner: str) -> Attempt:
        service = self._session.registry.services.get(call.service)
        step = service.steps.get(call.step) if service else None
        options = step.options_ if step else StepOptions()
        changed = bytes(call.options)
        if changed != b"null":
            options = unpack(_Options, changed).restored(options.undo)
        attempt = Attempt(self, (owner, call.id), bytes(call.args), step, options)
        attempt.made_call = call
        attempt.number, attempt.began_us = call.attempt, call.began_us
        attempt.details = bytes(call.beat)
        return attempt

    def resume(self, parked: ParkedRow) -> None:
        """Run the next attempt of a parked step, which is due."""
        key = (parked.service, parked.id)
        begun = self._begun(key)
        if begun is not None:
            # The run came itself, with a step that it had sent a command for: one end for both.
            begun.parked = begun.parked or parked
            return
        if key in self._changing or not self._session.owns(parked.target):
            return
        self._go_on(self._parked_attempt(parked))

    def _go_on(self, attempt: Attempt) -> None:
        """Make the next attempt at a step in custody, or ask its service for it.

        It may have been begun by a node that hosts both. Its code may be here as well, but not what
        that needs.
        """
        if self._session.hosts(attempt.call.service):
            self._begin(attempt)
            return
        call = msgspec.structs.replace(
            attempt.call, attempt=attempt.number, began_us=attempt.began_us,
            beat=Raw(attempt.details), deaths=attempt.parked.deaths if attempt.parked else 0,
        )  # fmt: skip
        self._session.holder.command(call, attempt.unparked)

    def _parked_attempt(self, parked: ParkedRow) -> Attempt:
        attempt = self._attempt(unpack(Call, parked.call), parked.service)
        attempt.parked = parked
        attempt.number, attempt.began_us = parked.attempt, parked.began_us
        attempt.details = parked.beat
        return attempt

    async def due(self, due: Sequence[tuple[tuple[str, str], None]]) -> None:
        """Resume parked steps by their keys, reading what is parked now; return when all began."""
        await asyncio.wait([self._session.spawn(self._resume_from_store(key)) for key, _ in due])

    async def _resume_from_store(self, key: tuple[str, str]) -> None:
        begun = self._begun(key)
        if begun is not None and begun.parked is not None:
            return
        row = await self._in_custody(key)
        if row is not None and row.due_us <= self._session.now_us():
            self.resume(row)
        elif row is not None:
            self._session.parked_timers.schedule(key, row.due_us)

    async def _in_custody(self, key: tuple[str, str]) -> ParkedRow | None:
        """Read the row of a step, unless it changes meanwhile: what was read may then be old.

        Whoever asked for the step is known then.
        """
        row = await self._row(key)
        if row is not None and await self._session.make_known(unpack(Call, row.call).reply_to):
            row = await self._row(key)
        return row

    async def _row(self, key: tuple[str, str]) -> ParkedRow | None:
        service, id = key
        read = self._reads.setdefault(key, _Read())
        rows = await self._store.parked_of(service, id.rpartition("#")[0])
        if self._reads.get(key) is not read or key in self._changing:
            return None
        return next((row for row in rows if row.id == id), None)

    def leaves_custody(self, commit: Commit) -> None:
        """Take rows that a commit takes out of custody for what they are only until it is done."""
        done, keys = commit.done, commit.unparked
        self._changing.update(keys)

        def written(error: PavaneError | None) -> None:
            for key in keys:
                self._changed(key)
                if error is not None:  # what was read in vain is read again
                    self._session.parked_timers.schedule(key, self._session.now_us())
            done(error)

        commit.done = written

    def _changed(self, key: tuple[str, str]) -> None:
        self._changing[key] -= 1
        if not self._changing[key]:
            del self._changing[key]
        self._reads.pop(key, None)

    def revoke(self, service: str, id: str) -> None:
        """Stop a step whose result nobody waits for any more."""
        attempt = self._begun((service, id))
        if attempt is not None:
            attempt.revoked = True
            if self._queued.pop(attempt.key, None) is not None:
                self._session.limits.give_back(attempt.permit)
                self._drop(attempt)
            else:
                attempt.stop()
        self._session.parked_timers.forget((service, id))
        if attempt is None or attempt.parked is not None:
            self._session.submit(Commit(unparked=[(service, id)]))

    def revoke_message(self, message: Message) -> None:
        self._session.spawn(self._revoke(message))

    async def _revoke(self, message: Message) -> None:
        id = unpack(Request, message.body).by
        seen = await self._store.seen(message.to, [id])
        if not self._session.owns(message.target):
            return
        if seen or self._begun((message.to, id)) is not None:
            self.revoke(message.to, id)
            self._session.consumed(message)
            return
        # The command has not come yet: a mark keeps it from being done when it does.
        mark = InboxRow(message.to, id, self._session.now_us())
        self._session.submit(Commit(lambda _: self._session.consumed(message), inbox=[mark]))

    # -- doing ---------------------------------------------------------------------------------

    def _begun(self, key: tuple[str, str]) -> Attempt | None:
        """Return the attempt at a step that runs, or waits for its permit, if there is one."""
        return self._running.get(key) or self._queued.get(key)

    def _begin(self, attempt: Attempt) -> None:
        key = attempt.key
        if self.draining or self._begun(key) is not None:
            return
        now = self._session.now_us()
        attempt.began_us = attempt.began_us or now
        attempt.started_us = now
        if attempt.step is None:
            error = NotHere(
                f"Service {attempt.call.service!r} has no step {attempt.call.step!r} in the code "
                f"of this node. {UNTIL}"
            )
            self._failed(attempt, error, final=False)
            return
        if attempt.step.options_.limit is not None and not attempt.permit:
            self._queue(attempt, attempt.step)
            return
        self._running[key] = attempt
        if attempt.is_transaction:
            self._transactions.begin(attempt, attempt.step)
            return
        attempt.task = asyncio.Task(
            self._run(attempt, attempt.step), loop=self._loop, name=key[1],
            context=self._session.context.copy(),
        )  # fmt: skip

    def _queue(self, attempt: Attempt, step: Step[..., Any]) -> None:
        """Ask for a permit to make an attempt."""
        limit = step.options_.limit
        assert limit is not None
        try:
            args, kwargs = attempt.arguments(step)
            share = limit.key_of(args, kwargs)
        except Exception as error:  # of the user's function, too
            self._failed(attempt, error, final=True)
            return
        call = attempt.call
        attempt.permit = f"{call.id}!{attempt.number}"
        self._queued[attempt.key] = attempt
        self._session.limits.ask(
            (step.service.name, step.limit_name, share), attempt.permit, attempt.owner,
            self._target(attempt), lambda message: self._permitted(attempt, message),
            call.priority,
        )  # fmt: skip

    def _permitted(self, attempt: Attempt, message: Message) -> None:
        """Make the attempt that a permit came for; one in custody first leaves the line, durably.

        From then on it counts as under way, so that a process may be found to die of it.
        """
        if attempt.parked is None:
            self._session.consumed(message)
            self._permitted_now(attempt)
            return

        def written(error: PavaneError | None) -> None:
            if error is None:
                self._session.consumed(message)
                self._permitted_now(attempt)

        parked = msgspec.structs.replace(attempt.parked, due_us=self._session.now_us())
        attempt.parked = parked
        held, operation = attempt.held, attempt.operation
        if held is not None and operation is not None and not held.dead:
            held.queued.discard(operation.ordinal)
            self._session.holder.custody(held, parked, written)
        else:
            self._session.submit(Commit(written, parked=[parked]))

    def _permitted_now(self, attempt: Attempt) -> None:
        if self._queued.pop(attempt.key, None) is not attempt:
            return
        if self._session.owns(self._target(attempt)):
            self._begin(attempt)
        else:
            self._session.limits.forget(attempt.permit)

    def permitted_message(self, message: Message, permit: Permit) -> None:
        """Take up a step that waited in custody for the permit which came; or give that back."""
        self._session.spawn(self._take_up(message, permit))

    async def _take_up(self, message: Message, permit: Permit) -> None:
        id, _, number = permit.work.rpartition("!")
        key = (permit.to, id)
        row = await self._in_custody(key) if id else None
        if not self._session.owns(message.target):
            return
        waits = (
            row is not None and str(row.attempt) == number
            and row.due_us > self._session.now_us()
        )  # fmt: skip
        attempt = self._parked_attempt(row) if row is not None and waits else None
        asks_again = attempt is not None and (
            not self._session.hosts(attempt.call.service) or self._session.limits.is_stale(permit)
        )
        if attempt is None or asks_again or not self._session.limits.hold(permit):
            self._session.limits.refuse(permit)
            self._session.consumed(message)
            if attempt is not None and asks_again:
                self._go_on(attempt)
            return
        self._queued[key] = attempt
        attempt.permit = permit.work
        self._permitted(attempt, message)

    async def _run(self, attempt: Attempt, step: Step[..., Any]) -> None:
        """Make one attempt and hand on what became of it."""
        error: BaseException | None = None
        final = False
        raw = b"null"
        attempt.has_begun = True
        try:
            if attempt.revoked or self._is_stopped(attempt):
                raise asyncio.CancelledError
            args, kwargs = attempt.arguments(step)
            current_step.set(attempt)
            options = attempt.options
            if options.timeout_s is not None or options.heartbeat_s is not None:
                result = await self._bounded(attempt, step, args, kwargs)
            elif step.is_async:
                result = await step.fn(*args, **kwargs)
            else:
                result = await self._call(step, args, kwargs)
            if not step.returns_none:
                raw = self.encoded(step, result)
        except FINAL as bad:
            error, final = bad, True
        except BaseException as failure:  # a step that exits has failed; its node goes on
            error = failure
        self._ran(attempt)
        attempt.task = None  # breaks the cycle, to spare the garbage collector
        try:
            if attempt.revoked:
                self._drop(attempt)
            elif error is None:
                self._answer(attempt, True, raw)
            elif not (isinstance(error, asyncio.CancelledError) and self._is_stopped(attempt)):
                self._failed(attempt, error, final)
        except Exception as failure:  # of the engine
            self._stick(attempt, failure)

    def _stick(self, attempt: Attempt, error: Exception) -> None:
        """Make the run stuck whose step's result cannot be handed on; or it would wait for ever."""
        log.error("the result of %s cannot be handed on", attempt.call.id, exc_info=error)
        reply = attempt.reply(False, b"null")
        reply.stuck = (
            f"What became of step {attempt.call.service}.{attempt.call.step} cannot be handed on: "
            f"{error!r}. Repair the cause, then `pavane runs retry {attempt.call.run}`."
        )
        self.answer(attempt.call, reply, attempt.unparked, attempt.message)

    def _ran(self, attempt: Attempt) -> None:
        del self._running[attempt.key]
        if attempt.permit:
            self._session.limits.give_back(attempt.permit)
            attempt.permit = ""

    def _is_stopped(self, attempt: Attempt) -> bool:
        return attempt.abandoned or self.draining or not self._session.open

    def encoded(self, step: Step[..., Any], result: Any) -> bytes:
        """Return a result as it is stored; raise if it cannot be."""
        raw = encode(result)
        if len(raw) > self.payload_max_bytes:
            raise TooLarge(
                f"The result of {step} is {len(raw):,} bytes; the limit is "
                f"{self.payload_max_bytes:,}. Store large data elsewhere and return a reference."
            )
        return raw

    def transacted(self, attempt: Attempt, error: BaseException | None) -> None:
        """Go on after a transaction, which has answered already unless it failed."""
        self._ran(attempt)
        if error is None:
            if attempt.message is not None:
                self._consumed(attempt.message)
        elif attempt.revoked:
            self._drop(attempt)
        else:
            self._failed(attempt, error, isinstance(error, FINAL))

    def _drop(self, attempt: Attempt) -> None:
        """Forget a revoked attempt; a command is marked as consumed."""
        if attempt.message is not None:
            message = attempt.message
            mark = InboxRow(message.to, message.id, self._session.now_us())
            self._session.submit(Commit(self._consume(message), inbox=[mark]))

    async def _call(self, step: Step[..., Any], args: Any, kwargs: Any) -> Any:
        if step.is_async:
            return await step.fn(*args, **kwargs)
        return await self._session.threads.call(step.fn, *args, **kwargs)

    async def _outcome(
        self, step: Step[..., Any], args: Any, kwargs: Any
    ) -> tuple[Any, BaseException | None]:
        """Call the step in a task of its own, from which no exit may escape: it ends the loop."""
        try:
            return await self._call(step, args, kwargs), None
        except (SystemExit, KeyboardInterrupt) as exits:
            return None, exits

    async def _bounded(self, attempt: Attempt, step: Step[..., Any], args: Any, kwargs: Any) -> Any:
        """Await the step within its timeout and, if asked for, while its heart beats."""
        options = attempt.options
        if options.heartbeat_s is not None:
            attempt.beaten = asyncio.Event()
        beaten = attempt.beaten
        work = self._loop.create_task(self._outcome(step, args, kwargs))
        ends = None if options.timeout_s is None else self._loop.time() + options.timeout_s
        try:
            while True:
                now = self._loop.time()
                left_s = None if ends is None else max(0.0, ends - now)
                bounds_s = [it for it in (left_s, options.heartbeat_s) if it is not None]
                wait_s = min(bounds_s, default=None)
                waits: set[asyncio.Task[Any]] = {work}
                pulse = self._loop.create_task(beaten.wait()) if beaten is not None else None
                if pulse is not None:
                    waits.add(pulse)
                try:
                    await asyncio.wait(waits, timeout=wait_s, return_when="FIRST_COMPLETED")
                finally:
                    if pulse is not None:
                        pulse.cancel()
                if work.done():
                    result, exits = work.result()
                    if exits is not None:
                        raise exits
                    return result
                if ends is not None and self._loop.time() >= ends:
                    raise StepTimeout(
                        f"{step} took longer than its timeout of {options.timeout_s:g} s; whether "
                        f"it took effect is unknown."
                    )
                if beaten is not None and not beaten.is_set():
                    raise HeartbeatTimeout(
                        f"{step} sent no heartbeat for {options.heartbeat_s:g} s."
                    )
                if beaten is not None:
                    beaten.clear()
        finally:
            if not work.done():
                work.cancel()
                if step.is_async:
                    await asyncio.wait([work], timeout=1.0)

    def beat_soon(self, attempt: Attempt, raw: bytes) -> None:
        self._loop.call_soon_threadsafe(self._beat, attempt, raw)

    def _beat(self, attempt: Attempt, raw: bytes) -> None:
        attempt.details = raw
        if attempt.beaten is not None:
            attempt.beaten.set()
        if not attempt.pending_beat:
            attempt.pending_beat = True
            delay_s = 0.0 if attempt.parked is None else BEAT_EVERY_S
            self._loop.call_later(delay_s, self._keep_beat, attempt)

    def _keep_beat(self, attempt: Attempt) -> None:
        attempt.pending_beat = False
        if attempt.key in self._running:
            self._park(attempt, self._session.now_us())

    def take_custody(self, before_us: int) -> None:
        """Write commands that run since before `before_us`, so that the log can move on."""
        for attempt in list(self._running.values()):
            if attempt.is_transaction:
                continue  # it waits for the writer, and custody would wait behind it
            if attempt.started_us < before_us and attempt.parked is None:
                held = attempt.held
                if attempt.message is not None or (held is not None and held.arrival is not None):
                    self._park(attempt, attempt.started_us)
        for attempt in list(self._queued.values()):
            if attempt.started_us < before_us and attempt.parked is None:
                self._park_queued(attempt)

    def _park_queued(self, attempt: Attempt) -> None:
        """Take a step into custody that waits for a permit: no death of a process is its doing."""
        held, operation = attempt.held, attempt.operation
        if held is not None and operation is not None and not held.dead:
            held.queued.add(operation.ordinal)
        self._park(attempt, self._session.now_us() + QUEUED_US)

    # -- ending --------------------------------------------------------------------------------

    def _failed(self, attempt: Attempt, error: BaseException, final: bool) -> None:
        retry = attempt.options.retry or (PERSISTENT if attempt.call.undo else ONCE)
        delay_s = error.pause_s if isinstance(error, (Locked, NotHere)) else None
        counts = delay_s is None
        if counts and not final:
            elapsed_s = (self._session.now_us() - attempt.began_us) / 1e6
            delay_s = retry.delay_s(attempt.number, error, elapsed_s, self._session.process.random)
        raw = encode_error(error)
        if delay_s is None:
            self._answer(attempt, False, raw)
            return
        call, number = attempt.call, attempt.number

        def told() -> None:
            log.info(
                "%s.%s of run %s failed (attempt %d), next in %.2f s: %s", call.service,
                call.step, call.run, number, delay_s, error_summary(raw),
            )  # fmt: skip

        attempt.number += counts
        self._park(attempt, self._session.now_us() + round(delay_s * 1e6), raw, told)

    def _park(
        self, attempt: Attempt, due_us: int, error: bytes = b"null",
        told: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """Write the attempt that is next; `told` is called if it is: it may be another's by now."""
        call = attempt.call
        deaths = attempt.parked.deaths if attempt.parked and error == b"null" else 0
        parked = ParkedRow(
            attempt.owner, call.run, call.id, self._store.target_of(attempt.owner, call.run),
            pack(call), attempt.number, due_us, attempt.began_us, attempt.details, error, deaths,
        )  # fmt: skip
        attempt.parked = parked
        key = (parked.service, parked.id)
        again = error != b"null"
        if again:
            self._changing[key] += 1

        def written(failure: PavaneError | None) -> None:
            if told is not None and failure is None:
                told()
            # Not before: a timer that fires while the row is being written would not find it.
            if again:
                self._changed(key)
                self._session.parked_timers.schedule(key, due_us)

        held, message = attempt.held, attempt.message
        if message is not None:
            attempt.message = None
            self._park_command(message, parked, written)
        elif held is not None and (held.arrival is not None or not held.exists or held.queued):
            self._session.holder.custody(held, parked, written)
        else:
            self._session.submit(Commit(written, parked=[parked]))

    def _answer(self, attempt: Attempt, ok: bool, raw: bytes) -> None:
        held, operation = attempt.held, attempt.operation
        if held is not None and operation is not None:
            self._session.holder.local_done(held, operation, attempt, ok, raw)
        else:
            reply = attempt.reply(ok, raw)
            self.answer(attempt.call, reply, attempt.unparked, attempt.message)

    def answer(
        self,
        call: Call,
        reply: Reply,
        unparked: Sequence[tuple[str, str]],
        message: Message | None = None,
    ) -> None:
        """Deliver a reply: directly to a run held here, else by a message to its holder.

        A run that is put away, and whose own custody the step was in, is loaded first: without that
        row it would ask for the step again.
        """
        key = (call.reply_to, call.run)
        held = self._session.holder.held.get(key)
        direct = message is None and held is not None and call.op in held.local
        is_ours = message is None and (call.reply_to, call.id) in unparked
        if direct:
            self._session.holder.step_done(key, reply, unparked)
        elif held is None and is_ours and self._session.owns(self._store.target_of(*key)):
            self._session.holder.with_run(
                *key, partial(self._answer_loaded, call, reply, unparked)
            )  # fmt: skip
        else:
            self._reply(call, reply, unparked, message)

    def _answer_loaded(
        self, call: Call, reply: Reply, unparked: Sequence[tuple[str, str]], held: Held | None
    ) -> None:
        if held is None:
            self._reply(call, reply, unparked, None)
        else:
            self._session.holder.step_done(held.key, reply, unparked)

    def _reply(
        self, call: Call, reply: Reply, unparked: Sequence[tuple[str, str]], message: Message | None
    ) -> None:
        """Answer by a message, which follows a run that has gone on."""
        now = self._session.now_us()
        commit = Commit()
        if message is not None:
            commit.done = self._consume(message)
            commit.inbox = [InboxRow(message.to, message.id, now)]
        commit.unparked = unparked
        target = self._store.target_of(call.reply_to, call.run)
        commit.messages = [
            Message("reply", call.id, call.reply_to, call.run, pack(reply), now, target)
        ]
        self._session.submit(commit)

    def _consume(self, message: Message) -> Callable[[PavaneError | None], None]:
        return lambda error: self._consumed(message)

    def _consumed(self, message: Message) -> None:
        self._commands.pop((message.to, message.id), None)
        self._session.consumed(message)

    def quarantine(self, parked: ParkedRow) -> None:
        """Give up a step that was under way in too many process deaths; its run gets stuck."""
        call = unpack(Call, parked.call)
        reply = Reply(
            call.run, call.op, call.era, "", False, Raw(b"null"), call.service, parked.attempt,
            parked.began_us,
            f"Quarantined: {parked.deaths + 1} processes died while step "
            f"{call.service}.{call.step} of this run was under way. Find out why, then `pavane "
            f"runs retry {call.run}`.",
        )  # fmt: skip
        self.answer(call, reply, [(parked.service, parked.id)])

    def is_running(self, service: str, id: str) -> bool:
        return (service, id) in self._running

    @property
    def is_idle(self) -> bool:
        """Whether no attempt runs or waits for its turn."""
        return not self._running and not self._queued

    def at_work(self) -> dict[int, int]:
        """Return the partitions for which an attempt is running (its own, and its run's), and the
        time, in us, at which the oldest of these began.
        """
        since_us: dict[int, int] = {}
        for attempt in self._running.values():
            targets = {self._target(attempt)}
            if attempt.held is not None:
                targets.add(attempt.held.row.target)
            for target in targets:
                since_us[target] = min(attempt.started_us, since_us.get(target, attempt.started_us))
        return since_us

    def abandon(self, targets: set[int]) -> None:
        """Cancel the attempts of these partitions; the next owner makes them again."""
        for attempt in list(self._running.values()):
            if self._target(attempt) in targets and attempt.task is not None:
                attempt.abandoned = True
                attempt.stop()

    def release(self, targets: set[int]) -> None:
        """Forget the commands of these partitions; the next owner reads them again."""
        for key, message in list(self._commands.items()):
            if message.target in targets:
                del self._commands[key]
        for key, attempt in list(self._queued.items()):
            if self._target(attempt) in targets:
                del self._queued[key]
                self._session.limits.forget(attempt.permit)

    def _target(self, attempt: Attempt) -> int:
        return self._store.target_of(attempt.owner, attempt.call.run)

    async def close(self) -> None:
        """Begin nothing more, and stop what is running."""
        self.draining = True
        self._queued.clear()
        running = list(self._running.values())
        for attempt in running:
            attempt.stop()
        if tasks := [attempt.task for attempt in running if attempt.task is not None]:
            await asyncio.wait(tasks, timeout=1.0)
