"""The holder: drives the runs whose baton this node has.

For each delivery it feeds the run's execution, asks the policy, and submits one commit with the
journal entry, the changed row and everything that leaves. Steps are launched and messages handed
over only after that commit is durable; feeding before it is safe, because workflow code is pure:
should the commit fail, the execution is thrown away and rebuilt from the journal.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from copy import copy
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import Raw

from pavane.core.baton import (
    ENDED,
    Baton,
    Header,
    Outcome,
    Parent,
    Status,
    Stop,
    chain_of,
    chained,
    decode_baton,
    encode_baton,
)
from pavane.core.codec import FORMAT, error_summary
from pavane.core.envelope import (
    Await,
    Call,
    Note,
    Permit,
    Reply,
    Request,
    Signal,
    Start,
    hop_id,
    operation_id,
    pack,
    unpack,
)
from pavane.core.execution import Execution, rebuilt
from pavane.core.journal import (
    DAMAGED,
    Entry,
    decode_chunk,
    effective,
    encode_entry,
    eras,
    expiry_of,
    resumed_us,
    unasked_of,
)
from pavane.core.operations import BEGIN, EXPIRY, Operation, Planned
from pavane.core.policy import Pass, decide
from pavane.engine.config import SUSPECT_DEATHS
from pavane.engine.held import (
    CLEARED_BY,
    Held,
    blank_row,
    decode_attributes,
    decode_header,
    decode_plain,
    decode_trail,
    encode_plain,
)
from pavane.engine.publishing import event_row, start_row, upcast
from pavane.errors import (
    BadEvent,
    CorruptJournal,
    LeaseLost,
    Mismatch,
    NotUndone,
    PavaneError,
    StoreError,
    UnknownName,
)
from pavane.stores.eventlog import EventRow, Reaction
from pavane.stores.port import (
    Commit,
    Conflict,
    InboxRow,
    JournalRow,
    MailRow,
    Message,
    ParkedRow,
    RunRow,
    durable,
)
from pavane.workflow import Workflow, child_id

if TYPE_CHECKING:
    from pavane.engine.session import Session
    from pavane.engine.steps import Attempt

log = logging.getLogger("pavane.holder")

T = TypeVar("T")
Key = tuple[str, str]
Action = Callable[[Held | None], None]
HELD_BACK = "!"
"""Mail of a type that begins so is a message kept for a stuck run, delivered when it goes on."""
OTHER_CODE = (
    "Perhaps another version of the app, or another app that has a service of this name, works on "
    "the store as well: see `pavane nodes list`. The run goes on when a node with fitting code "
    "takes it over."
)
"""Said of a run that does not fit the code which a node has."""
EVICT_LOOKS = 50
BY_PARENT = "parent"


class Holder:
    """Owns the live runs of one session; see the module."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._store = session.store
        self._config = session.config
        self._registry = session.registry
        self.held: OrderedDict[Key, Held] = OrderedDict()
        self._loading: dict[Key, list[Action]] = {}
        self._leaving: set[Key] = set()
        self._notes: dict[Key, list[Message]] = {}
        self._claiming: set[Key] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._again: set[Key] = set()
        self.replays = 0

    # -- starting ------------------------------------------------------------------------------

    def start(
        self,
        header: Header,
        args: bytes,
        *,
        message: Message | None = None,
        done: Callable[[PavaneError | None], None] | None = None,
        deaths: int = 0,
    ) -> None:
        """Begin a run at its home, here, in one commit with whatever it asks for first.

        So many `deaths` saw an earlier try; with too many the run is not begun but quarantined.
        """
        service = header.home
        key = (service, header.run)
        if key in self._loading:  # perhaps something came for it that is earlier than its start
            again = partial(self.start, header, args, message=message, done=done, deaths=deaths)
            self._loading[key].append(lambda held: again())
            return
        if key in self.held or key in self._claiming:
            self._refuse_start(message, done)
            return
        execution, unknown = self._new_execution(header)
        unknown = unknown or _limit(header, execution, args)
        row = blank_row(
            self._session.take_run_number(), service,
            self._store.target_of(service, header.run), header,
        )  # fmt: skip
        entry = Entry("start", header.started_us, value=Raw(args), service=service)
        held = Held(row, header, execution, exists=False)
        held.trail.append(Stop(service, header.started_us, 0))
        if header.workflow in self._registry.announced:
            held.events.append(start_row(self._store, header))
        row.deaths, held.suspect = deaths, CLEARED_BY if deaths else 0
        if deaths >= self._config.deaths_max:
            self._stick_unbegun(held, entry, message, _quarantined(header.run, deaths))
            return
        if unknown:
            self._stick_unbegun(held, entry, message, unknown)
            return
        held.home_row = row
        held.reads_mail = self._has_receive(held)
        if message is None:
            held.arrival = start_claim(header)
        if message is not None:
            held.consuming.append(message)
            self._add(held)
            self._feed(held, entry)
            self._read_first_mail(held)
            return
        self._claiming.add(key)

        def claimed(error: PavaneError | None) -> None:
            self._claiming.discard(key)
            if error is None and not held.dead:
                self._add(held)
                self._read_first_mail(held)
            if done is not None:
                done(error)

        # Another run may have this id: until the claim is durable, this one is not to be found.
        self._feed(held, entry, done=claimed)

    def _read_first_mail(self, held: Held) -> None:
        """Look for events that were sent to a run before it began."""
        if held.reads_mail and not held.dead and held.outcome is None:
            self._spawn(self._settle_with_mail(held))

    def _stick_unbegun(
        self, held: Held, entry: Entry, message: Message | None, reason: str
    ) -> None:
        held.record(entry, self._config.journal_max_bytes)
        held.consuming += _some(message)
        self._stick(held, reason)

    def _new_execution(self, header: Header) -> tuple[Execution, str]:
        """Return a run's execution, not begun; or one of nothing, and why it has no other."""
        try:
            definition = self._registry.workflow(header.workflow, header.version)
        except UnknownName as error:
            return _no_execution(header), _why(header.run, error)
        return Execution(header, definition, (), self._config.payload_max_bytes), ""

    def _refuse_start(
        self, message: Message | None, done: Callable[[PavaneError | None], None] | None
    ) -> None:
        if message is not None:
            self._session.consumed(message)
        if done is not None:
            done(Conflict("This run exists already."))

    def start_message(self, message: Message, redelivered: bool) -> None:
        start = unpack(Start, message.body)
        key = (message.to, start.header.run)
        if key in self._claiming:  # in vain, if this start came first
            asyncio.get_running_loop().call_later(0.001, self.start_message, message, redelivered)
            return
        if key in self._loading:
            self._loading[key].append(lambda held: self.start_message(message, redelivered))
        elif key in self.held:
            self._session.consumed(message)
        else:
            self._loading[key] = []  # what comes for the run meanwhile waits for it
            self._spawn(self._start_if_new(message, start, key, redelivered))

    async def _start_if_new(
        self, message: Message, start: Start, key: Key, redelivered: bool
    ) -> None:
        await self._make_known(start.header)
        row = await self._store.run_row(*key)
        if row is None and redelivered:
            await self._start_again(message, start, key)
        else:
            self._start_or_load(message, start, key, row)

    async def _start_again(self, message: Message, start: Start, key: Key) -> None:
        """Count one more try of a start that a process may have died of, then begin the run."""
        waiting = self._loading.get(key)
        tries = [f"{message.run}#try{number}" for number in range(1, self._config.deaths_max)]
        seen = await self._store.seen(message.to, tries)
        deaths = max((tries.index(id) + 1 for id in seen), default=0) + 1
        alone = SUSPECT_DEATHS < deaths < self._config.deaths_max

        def is_elsewhere() -> bool:
            return self._loading.get(key) is not waiting or not self._session.owns(message.target)

        async def attempt() -> None:
            if is_elsewhere():
                return  # its partition was handed over
            if deaths < self._config.deaths_max:
                mark = InboxRow(message.to, tries[deaths - 1], self._session.now_us())
                touched = self._session.deaths.touched[message.target]
                touched.tries.append((mark.service, mark.id))
                await self._session.durable(inbox=[mark])
                if is_elsewhere():
                    return
            self._start_or_load(message, start, key, None, deaths)
            if alone:
                await self._session.deaths.until_calm(key)

        if alone:
            self._session.deaths.suspect(attempt)
        else:
            await attempt()

    def _start_or_load(
        self, message: Message, start: Start, key: Key, row: RunRow | None, deaths: int = 0
    ) -> None:
        waiting = self._loading.pop(key, [])
        if row is None:
            self.start(start.header, bytes(start.args), message=message, deaths=deaths)
        else:
            self.with_run(*key, _nothing)
            self._session.consumed(message)
        for action in waiting:
            self.with_run(*key, action)

    # -- finding a run -------------------------------------------------------------------------

    async def _make_known(self, header: Header) -> None:
        """Let the store know who is told of a run: its home, its parent, perhaps of another app."""
        await self._session.make_known(header.home)
        if header.parent is not None:
            await self._session.make_known(header.parent.holder)

    def with_run(self, service: str, run: str, action: Action) -> None:
        """Call `action` with the live run, loading it if need be; with None if it is not here.

        In a partition that is another node's by now, nothing is done: that node does it.
        """
        key = (service, run)
        held = self.held.get(key)
        if held is not None:
            self.held.move_to_end(key)
            action(held)
        elif key in self._loading:
            self._loading[key].append(action)
        elif self._session.owns(self._store.target_of(service, run)):
            self._loading[key] = [action]
            self._spawn(self._load(key))

    async def _load(self, key: Key) -> None:
        row = await self._store.run_row(*key)
        await self._load_rows([key], [row] if row is not None else [])

    async def _load_numbered(self, numbers: dict[Key, int], stuck_too: bool = False) -> None:
        """Load runs by number; their keys are in `_loading`, so nothing else touches them."""
        try:
            rows = await self._store.rows_of(list(numbers.values()))
        except BaseException:
            for key in numbers:
                self._loading.pop(key, None)
            raise
        await self._load_rows(list(numbers), rows, stuck_too)

    async def _load_rows(
        self, keys: Sequence[Key], rows: Sequence[RunRow], stuck_too: bool = False
    ) -> None:
        """Activate those that are held here, and do what was asked for meanwhile."""
        left = dict.fromkeys(keys)
        try:
            here = [
                row for row in rows
                if row.holder == row.service
                and (row.status in ("running", "waiting") or (stuck_too and row.status == "stuck"))
            ]  # fmt: skip
            journals = await self._store.journals([row.no for row in here]) if here else {}
            for row in here:
                held = await self._activate(row, journals[row.no])
                del left[row.service, row.id]
                self._act((row.service, row.id), held)
        finally:
            for key in left:
                self._act(key, None)

    def _leave_soon(self, key: Key) -> None:
        """Keep what comes for a run until its last commit here is settled."""
        self._leaving.add(key)
        self._loading.setdefault(key, [])

    def _left(self, key: Key) -> None:
        """A run may be touched again: what came for it meanwhile goes where it is now."""
        self._leaving.discard(key)
        for action in self._loading.pop(key, ()):
            self.with_run(*key, action)

    def _act(self, key: Key, held: Held | None) -> None:
        """Do what was asked for while a run was not to be touched, as far as it may be touched."""
        if key in self._leaving:
            return
        for action in self._loading.pop(key, ()):
            if key in self._loading:
                self._loading[key].append(action)
            else:
                action(self.held.get(key) or held)

    def _apart(self, key: Key, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do something with a run that is not live; nothing else touches it meanwhile."""

        async def alone() -> None:
            try:
                await work()
            finally:
                if key not in self._leaving:
                    self._left(key)

        self._loading[key] = []
        self._spawn(alone())

    async def recover(self, rows: Sequence[RunRow]) -> None:
        """Take up runs that were under way when their last holder stopped."""
        numbers: dict[Key, int] = {}
        for row in rows:
            key = (row.service, row.id)
            if key not in self.held and key not in self._loading:
                self._loading[key] = []
                numbers[key] = row.no
        await self._load_numbered(numbers, stuck_too=True)

    def set_aside(self, row: RunRow) -> None:
        """Keep what comes for a run that may have ended processes, until its turn."""
        self._loading.setdefault((row.service, row.id), [])

    async def try_again(self, row: RunRow) -> None:
        """Go on with a run that was set aside; it has all that came, and its timers, at once."""
        key = (row.service, row.id)
        self._loading.setdefault(key, []).append(self._fire_due)
        # As a task, which is waited for should the run's partition be handed over meanwhile.
        await asyncio.wait([self._spawn(self._load_numbered({key: row.no}))])

    def acquit(self, key: Key) -> None:
        """Clear a run that was touched alone and ended no process; it waits, or has moved on."""
        held = self.held.get(key)
        if held is not None and held.suspect and not self.is_busy(key):
            held.suspect = 0
            self._settle(held, replayed=True)

    def _take_custody(self, held: Held, message: Message) -> None:
        """Write down a baton that a process may have died of, with that death, before it runs."""
        row = held.row
        row.status, row.deaths, row.header = "running", 1, encode_plain(held.header)
        held.consuming.append(message)
        held.dead = True  # it is loaded from the store
        held.execution.discard()
        self._loading[held.key] = [*self._loading.get(held.key, ()), _nothing]
        self._assign_number(held)
        away = row.service != row.home
        note = self._note_home(row, row.service, row.status, "") if away else None
        self._write(held, _some(note), (), (), None)

    async def _activate(self, row: RunRow, journal: list[JournalRow]) -> Held | None:
        """Rebuild a run from its journal; a run that cannot be rebuilt is stuck, alone."""
        header = decode_header(row.header)
        await self._make_known(header)
        try:
            raws = _split(journal)
            entries = [entry for row_ in journal for entry in decode_chunk(row_.body)]
            if not entries or len(entries) != len(raws):
                raise CorruptJournal(f"The journal of run {row.id} has no beginning. {DAMAGED}")
            header.era, header.resumed_us = eras(entries), resumed_us(entries)
            definition = self._registry.workflow(header.workflow, header.version)
            most = self._config.payload_max_bytes
            execution, delivered = rebuilt(header, definition, entries, most)
            begun = len(delivered) > 1 or bool(delivered and delivered[0].issued)
            unasked = unasked_of(delivered)
            if begun:
                execution.replay(delivered, unasked)
        except Exception as error:
            reason = _why(row.id, error)
            if row.status != "stuck" or row.reason != reason:
                held = Held(row, header, _no_execution(header), exists=True)
                held.count = row.entries
                self._stick(held, reason, kept_journal=True)
            return None
        for op in execution.pending.values():
            if op.kind in ("step", "child"):  # should it be given up
                await self._session.make_known(op.service)
        self.replays += 1
        held = Held(row, header, execution, exists=True)
        held.trail = decode_trail(row.trail)
        held.attributes = decode_attributes(row.attributes)
        for raw in raws:
            held.append(raw, self._config.journal_max_bytes)
        held.unwritten.clear()
        held.suspect = CLEARED_BY if row.deaths else 0
        if row.service == row.home:
            held.home_row = row
        if row.status == "stuck":
            row.status, row.reason, held.dirty = "running", "", True
            await self._deliver_held_back(row)
        definition_receives = getattr(definition, "receives", ())
        if row.service == row.home and definition_receives:
            await self._read_mail(held)
        self._add(held)
        if not begun:
            self._begin(held, entries[0])
            return held
        if entries[-1].what == "rewind":
            self._retry_children(held)
        parked = await self._parked_steps(held)
        if held.dead:
            return None  # what came meanwhile ended it here
        for op in execution.pending.values():
            if op.ordinal in unasked:
                op.sent = False
            elif op.kind == "child":
                op.sent = entries[-1].what != "fork"
            elif op.kind != "step":
                anew = entries[-1].what in ("fork", "rewind")
                op.sent = op.kind != "receive" or (op.detail is not None and not anew)
            elif (waits := parked.get(operation_id(row.id, op.ordinal, header.era))) is not None:
                op.sent = True  # its next attempt is due in the store's time
                held.local.add(op.ordinal)
                if waits.error == b"null" and waits.due_us > self._session.now_us():
                    held.queued.add(op.ordinal)
        if entries[-1].what not in ("fork", "rewind"):
            self._ask_again(held, delivered, unasked)
        self._settle(held, replayed=True, recovered=True)
        return held

    def _begin(self, held: Held, start: Entry) -> None:
        """Begin a run that was stuck before its code ever ran; a rewind voids that entry."""
        unknown = _limit(held.header, held.execution, bytes(start.value))
        if unknown:
            self._stick(held, unknown)
            return
        held.row.header, held.dirty = encode_plain(held.header), True
        held.header.era += 1
        held.header.resumed_us = self._session.now_us()
        held.record(Entry("rewind", held.header.resumed_us, 0), self._config.journal_max_bytes)
        self._feed(held, Entry("start", start.at_us, value=start.value, service=start.service))

    def _retry_children(self, held: Held) -> None:
        """A run that was taken back waits again for children that ended: they answer once more."""
        run, era, now = held.row.id, held.header.era, self._session.now_us()
        children = [
            (child_id(run, op.ordinal), op.service)
            for op in held.execution.pending.values()
            if op.kind == "child"
        ]
        if children:
            body = pack(Request(BY_PARENT))
            messages = [
                self._message("retry", f"{child}#retry{era}", service, child, body, now)
                for child, service in children
            ]
            self._session.submit(Commit(messages=messages))

    def _ask_again(self, held: Held, delivered: Sequence[Entry], unasked: frozenset[int]) -> None:
        """Send commands again for steps that were asked for before the last entry, in a fork.

        One that is left alone is awaited: to pass the baton for it would have it done again.
        """
        row, now = held.row, self._session.now_us()
        newest = sum(len(entry.asked) for entry in delivered[:-1])
        messages: list[Message] = []
        for op in held.execution.pending.values():
            is_early = op.kind == "step" and op.ordinal < newest and op.ordinal not in unasked
            if not is_early or op.sent or op.service == row.service:
                continue
            if op.service in self._registry.services:
                op.sent = True
                messages.append(self._command(self.call(held, op), now))
        if messages:
            self._session.submit(Commit(messages=messages))

    async def _parked_steps(self, held: Held) -> dict[str, ParkedRow]:
        if not any(op.kind == "step" for op in held.execution.pending.values()):
            return {}
        rows = await self._store.parked_of(*held.key)
        return {row.id: row for row in rows}

    def _add(self, held: Held) -> None:
        self.held[held.key] = held
        self._evict(held)

    def _evict(self, sparing: Held | None = None) -> None:
        """Put away the runs that waited longest, as long as too many are live."""
        if len(self.held) <= self._config.live_runs_max:
            return
        for held in list(islice(self.held.values(), EVICT_LOOKS)):
            if (
                held.row.status != "waiting"
                or held.commits or held.local or held.reads_mail or held is sparing
            ):  # fmt: skip
                self.held.move_to_end(held.key)
                continue
            self._drop(held)
            if len(self.held) <= self._config.live_runs_max:
                return

    def _drop(self, held: Held) -> None:
        self._forget(held)
        held.execution.discard()

    def _forget(self, held: Held) -> None:
        held.dead = True
        if self.held.get(held.key) is held:
            del self.held[held.key]

    # -- delivering ----------------------------------------------------------------------------

    def step_done(self, key: Key, reply: Reply, unparked: Sequence[tuple[str, str]] = ()) -> None:
        """Deliver the result of a step that ran here for a run held here."""
        held = self.held.get(key)
        if held is not None:
            self._reply(held, reply, None, unparked)
        else:
            self.with_run(*key, lambda held: self._reply(held, reply, None, unparked))

    def reply_message(self, message: Message) -> None:
        reply = unpack(Reply, message.body)

        def deliver(held: Held | None) -> None:
            if held is None:
                self._not_here(message)
            else:
                self._reply(held, reply, message, ())

        self.with_run(message.to, reply.run, deliver)

    def _reply(
        self,
        held: Held | None,
        reply: Reply,
        message: Message | None,
        unparked: Sequence[tuple[str, str]],
    ) -> None:
        if held is None or held.dead or held.outcome is not None:
            self._consume_only(message, unparked)
            return
        operation = held.execution.pending.get(reply.op)
        stale = operation is None or (operation.kind == "step" and reply.era != held.header.era)
        if operation is None or stale:
            self._consume_only(message, unparked)  # given up meanwhile
            return
        if reply.stuck:
            held.consuming += [message] if message else []
            self._stick(held, reply.stuck)
            return
        if operation.fingerprint != reply.fingerprint:
            self._stick(held, _other_operation(reply, operation), *_some(message))
            return
        if reply.version:
            try:
                self._read_published(operation, reply)
            except BadEvent as error:
                self._stick(held, str(error), *_some(message))
                return
        self._answered(held, operation, reply, message, unparked)

    def _read_published(self, operation: Operation, reply: Reply) -> None:
        """Put a published event in the words of its class as it is here; raise BadEvent."""
        cls = self._registry.events.get(operation.detail[0])
        if cls is not None:
            reply.value = Raw(upcast(cls, reply.version, bytes(reply.value)))

    def local_done(
        self, held: Held, operation: Operation, attempt: Attempt, ok: bool, raw: bytes
    ) -> None:
        """Deliver the result of a step that was launched here for a run held here."""
        if held.dead or held.execution.pending.get(operation.ordinal) is not operation:
            # The run was put away and rebuilt, perhaps, and waits for it again.
            self.step_done(held.key, attempt.reply(ok, raw), attempt.unparked)
        elif ok and not operation.undo:
            held.local.discard(operation.ordinal)
            entry = Entry(
                "done", self._session.now_us(), operation.ordinal, Raw(raw), operation.service,
                attempt.number, attempt.started_us,
            )  # fmt: skip
            self._feed(held, entry, unparked=attempt.unparked)
        else:
            self._answered(held, operation, attempt.reply(ok, raw), None, attempt.unparked)

    def _answered(
        self,
        held: Held,
        operation: Operation,
        reply: Reply,
        message: Message | None,
        unparked: Sequence[tuple[str, str]],
    ) -> None:
        if not reply.ok and operation.undo:
            held.consuming += [message] if message else []
            held.local.discard(reply.op)
            why = error_summary(bytes(reply.value)).rstrip(".")
            self._stick(
                held,
                f"The compensation {operation.service}.{operation.name} failed for good: {why}. "
                f"Repair the cause, then `pavane runs retry {held.row.id}`.",
                unparked=unparked,
            )
            return
        held.local.discard(reply.op)
        if operation.undo:
            held.undone += 1
        what = "failed" if not reply.ok else "received" if operation.kind == "receive" else "done"
        entry = Entry(
            what, self._session.now_us(), reply.op, reply.value,
            reply.service, reply.attempts, reply.began_us,
        )  # fmt: skip
        self._feed(held, entry, message=message, unparked=unparked)

    def _consume_only(
        self, message: Message | None, unparked: Sequence[tuple[str, str]] = ()
    ) -> None:
        if message is not None:
            self._session.consumed(message)
        if unparked:
            self._session.submit(Commit(unparked=unparked))

    def _not_here(self, message: Message) -> None:
        self._spawn(self._forward(message))

    async def _forward(self, message: Message) -> None:
        """Send a message after a run that left this service; keep it if the run is stuck here."""
        row = await self._store.run_row(message.to, message.run)
        commit = Commit(lambda error: self._session.consumed(message))
        if row is not None and row.status == "stuck" and row.holder == row.service:
            kind = f"{HELD_BACK}{message.kind}"
            commit.mail = [
                MailRow(row.service, row.id, message.id, kind, message.body, message.at_us)
            ]
        elif row is not None and row.status == "continued" and row.result is not None:
            next_run = decode_plain(row.result)
            commit.messages = [
                self._message(
                    message.kind, f"{next_run}#{message.id.partition('#')[2]}", row.home, next_run,
                    message.body, message.at_us,
                )
            ]  # fmt: skip
            if message.kind == "signal":
                commit.mail_taken = [(message.to, message.run, message.id)]
        elif row is not None and row.status in ENDED:
            self._session.consumed(message)
            return
        else:
            to = row.holder if row is not None else ""
            if row is None:
                marks = [
                    m for m in await self._store.inbox_of(message.run) if m.service == message.to
                ]
                hops = [(_hop_of(mark.id), mark.passed_to) for mark in marks if mark.passed_to]
                to = max(hops)[1] if hops else ""
            if not to or to == message.to:
                log.warning("%s for run %s: no such run was ever here", message.kind, message.run)
                self._session.consumed(message)
                return
            await self._session.make_known(to)
            id = message.id
            if message.kind == "cancel":
                # Should this one come again, the run may be elsewhere; should the run come back
                # meanwhile, it is sent here once more.
                commit.inbox = [self._mark(message)]
                id += ">"
            commit.messages = [
                self._message(message.kind, id, to, message.run, message.body, message.at_us)
            ]
        self._session.submit(commit)

    async def wake(self, due: Sequence[tuple[Key, Any]]) -> None:
        """Fire the timers of runs that are due; each comes with its number, if that is known.

        Return when those that had to be loaded are.
        """
        numbers: dict[Key, int] = {}
        for key, number in due:
            if number is None or key in self.held or key in self._loading:
                self.with_run(*key, self._fire_due)
            elif self._session.owns(self._store.target_of(*key)):
                self._loading[key] = [self._fire_due]
                numbers[key] = number
        if numbers:
            await asyncio.wait([self._spawn(self._load_numbered(numbers))])

    def _fire_due(self, held: Held | None) -> None:
        if held is None or held.dead or held.row.target in self._session.draining:
            return
        fired = False
        while held.outcome is None and not held.dead:
            now = self._session.now_us()
            due = [
                op for op in held.execution.pending.values()
                if op.kind == "timer" and op.deadline_us <= now
            ]  # fmt: skip
            if not due:
                break
            first = min(due, key=lambda op: (op.deadline_us, op.ordinal))
            fired = True
            self._feed(held, Entry("fired", now, first.ordinal))
        if not fired and not held.dead:
            self._settle(held, replayed=True)

    def signal_message(self, message: Message) -> None:
        """Take an event into the mailbox of its run, and deliver it if the run waits for it."""
        signal = unpack(Signal, message.body)
        key = (message.to, message.run)
        mail = MailRow(
            message.to, message.run, message.id, signal.type, bytes(signal.body), message.at_us
        )

        def kept(error: PavaneError | None) -> None:
            if error is not None:
                self._spawn(self._got_kept_mail(message))
                return
            held = self.held.get(key)
            if held is not None and not held.knows_mail(mail.id):
                held.mail.append(mail)  # it is the newest, and nobody can have taken it yet
            self.with_run(*key, lambda held: self._got_mail(held, mail, message))

        mark = InboxRow(message.to, message.id, message.at_us)
        self._session.submit(Commit(kept, inbox=[mark], mail=[mail]))

    def _got_mail(self, held: Held | None, mail: MailRow, message: Message) -> None:
        """Deliver an event that is in the mailbox; its message is consumed with the delivery."""
        if held is None:
            self._spawn(self._keep_or_send_on(message))
        elif held.dead or held.outcome is not None:
            self._session.consumed(message)
        else:
            self._deliver_kept(held, mail, message)

    async def _got_kept_mail(self, message: Message) -> None:
        """Deliver an event that is in the mailbox already, kept by a process that died since.

        The run may have begun only after it, so that nobody has read its mailbox.
        """
        mail = await self._kept(message)
        if mail is None:  # it was delivered
            self._session.consumed(message)
        else:
            key = (message.to, message.run)
            self.with_run(*key, lambda held: self._got_mail(held, mail, message))

    async def _kept(self, message: Message) -> MailRow | None:
        """Return the event of a message, as long as it is in the mailbox of its run."""
        mail = await self._store.mail_of(message.to, message.run)
        return next((one for one in mail if one.id == message.id), None)

    async def _keep_or_send_on(self, message: Message) -> None:
        """The mailbox keeps an event for a run that is away; one that goes on anew has another.

        Only what is in the mailbox after the end is sent on: the run may have come back since its
        event was kept, and have taken it, or have sent it on itself.
        """
        row = await self._store.run_row(message.to, message.run)
        gone_on = row is not None and row.status == "continued"
        if gone_on and await self._kept(message):
            self._not_here(message)
        else:
            self._session.consumed(message)

    def _deliver_kept(self, held: Held, mail: MailRow, message: Message) -> None:
        if not held.reads_mail and not held.knows_mail(mail.id):
            # The run went away and came back since it was kept, and may have taken it before that.
            held.reads_mail = True
            self._spawn(self._settle_with_mail(held))
        if held.reads_mail:
            self._session.consumed(message)
            return
        pending = held.execution.pending.values()
        if any(op.kind == "receive" and op.name == mail.type for op in pending):
            held.consuming.append(message)
        else:
            self._session.consumed(message)
        self._settle(held, replayed=True)

    async def _read_mail(self, held: Held) -> None:
        held.reads_mail = True
        mail = await self._store.mail_of(*held.key)
        known = {one.id for one in mail} | held.taken
        came = [one for one in held.mail if one.id not in known]  # meanwhile, so after the others
        held.mail = [one for one in mail if one.id not in held.taken] + came
        held.reads_mail = False

    def request_message(self, message: Message) -> None:
        """Cancel, kill or retry a run, wherever it is."""
        if message.kind == "cancel":
            self._spawn(self._cancel_once(message))
        else:
            self.with_run(message.to, message.run, lambda held: self._request(held, message))

    def _request(self, held: Held | None, message: Message) -> None:
        if held is None or held.dead:
            work = self._kill if message.kind == "kill" else self._retry
            self._apart((message.to, message.run), partial(work, message))
        elif message.kind == "kill":
            held.consuming.append(message)
            held.execution.outcome = Outcome("killed")
            self._end(held)
        else:
            self._session.consumed(message)  # it is running

    async def _cancel_once(self, message: Message) -> None:
        if message.id in await self._store.seen(message.to, [message.id]):
            self._session.consumed(message)
        else:
            self.with_run(message.to, message.run, lambda held: self._cancel(held, message))

    def _cancel(self, held: Held | None, message: Message) -> None:
        if held is None:
            self._not_here(message)
        elif held.dead or held.outcome is not None:
            self._session.consumed(message)
        else:
            held.marks.append(self._mark(message))
            self._feed(held, Entry("cancel", self._session.now_us()), message=message)

    def _mark(self, message: Message) -> InboxRow:
        return InboxRow(message.to, message.id, self._session.now_us())

    async def _kill(self, message: Message) -> None:
        row = await self._store.run_row(message.to, message.run)
        if row is None or (row.holder != row.service and row.status not in ENDED):
            self._not_here(message)
            return
        if row.status in ENDED:
            self._session.consumed(message)
            return
        header = decode_header(row.header)
        await self._make_known(header)
        held = Held(row, header, _no_execution(), exists=True)
        held.trail = decode_trail(row.trail)
        held.attributes = decode_attributes(row.attributes)
        held.count = row.entries
        if row.service != row.home:
            journal = (await self._store.journals([row.no]))[row.no]
            with suppress(CorruptJournal):  # a kill needs no journal
                held.entries = _split(journal)
        held.consuming.append(message)
        held.execution.outcome = Outcome("killed")
        self._end(held)

    async def _retry(self, message: Message) -> None:
        """Go on with a stuck run, or take a failed one back to before its failure."""
        key = (message.to, message.run)
        row = await self._store.run_row(*key)
        if row is None or (row.holder != row.service and row.status not in ENDED):
            self._not_here(message)
            return
        if message.id in await self._store.seen(message.to, [message.id]):
            self._session.consumed(message)
            return
        if unpack(Request, message.body).by == BY_PARENT and row.status in ENDED:
            if row.status == "continued":
                self._not_here(message)
                return
            if row.status != "failed" or row.undone:  # it does nothing again, but says it again
                await self._answer_again(message, row)
                return
        if row.status not in ("stuck", "failed") or row.service != message.to:
            self._session.consumed(message)
            return
        journal = (await self._store.journals([row.no]))[row.no]
        try:
            entries = [entry for chunk in journal for entry in decode_chunk(chunk.body)]
        except CorruptJournal as error:
            log.error("run %s cannot be retried: %s", row.id, error)
            self._session.consumed(message)
            return
        delivered = effective(entries)
        cut = len(delivered)
        if row.status == "failed":
            failures = [at for at, entry in enumerate(delivered) if entry.what == "failed"]
            cut = failures[-1] if failures else len(delivered) - 1
            expired = expiry_of(delivered)
            cut = cut if expired is None else min(cut, expired)
        rewind = encode_entry(Entry("rewind", self._session.now_us(), max(cut, 1)))
        back = await self._held_back(row)
        row.status, row.reason, row.deaths = "running", "", 0
        row.ended_us = row.result = None
        row.holder, row.entries = row.service, len(entries) + 1

        def resumed(error: PavaneError | None) -> None:
            self._session.consumed(message)
            self._left(key)
            if error is None:
                self.with_run(*key, _nothing)

        commit = Commit(resumed)
        commit.runs = [row]
        commit.journal = [JournalRow(row.no, len(entries), b"[" + rewind + b"]")]
        commit.inbox = [self._mark(message)]
        commit.mail_taken, commit.messages = _as_messages(row, back)
        parked = await self._store.parked_of(row.service, row.id)
        commit.unparked = [(p.service, p.id) for p in parked]
        self._leave_soon(key)
        self._session.submit(commit)

    async def _held_back(self, row: RunRow) -> list[MailRow]:
        """Return what came for a run while it was stuck."""
        mail = await self._store.mail_of(row.service, row.id)
        return [one for one in mail if one.type.startswith(HELD_BACK)]

    async def _deliver_held_back(self, row: RunRow) -> None:
        """Send on what came for a run while it was stuck, now that it goes on."""
        if back := await self._held_back(row):
            commit = Commit()
            commit.mail_taken, commit.messages = _as_messages(row, back)
            self._session.submit(commit)

    async def _answer_again(self, message: Message, row: RunRow) -> None:
        header, now = decode_header(row.header), self._session.now_us()
        await self._make_known(header)
        commit = Commit(lambda error: self._session.consumed(message))
        commit.inbox = [self._mark(message)]
        if header.parent is not None:
            outcome = Outcome(row.status, Raw(row.result or b"null"))
            commit.messages = [self._answer_parent(header, outcome, row, now)]
        self._session.submit(commit)

    def note_message(self, message: Message) -> None:
        """Remember where a travelling run is; a note that comes after its baton counts no more."""
        key = (message.to, message.run)
        if key in self._notes:
            self._notes[key].append(message)
        elif key in self.held or key in self._loading:
            self._session.consumed(message)
        else:
            notes = self._notes[key] = [message]
            self._spawn(self._note(key, notes))

    async def _note(self, key: Key, notes: list[Message]) -> None:
        """Write what notes say of a run, one after the other, unless its baton comes meanwhile."""
        while notes:
            row = await self._store.run_row(*key)
            read, notes[:] = list(notes), []
            commit = Commit()
            if row is not None and row.holder != row.service and row.status not in ENDED:
                for note in (unpack(Note, message.body) for message in read):
                    if row.hop <= note.hop:
                        row.hop, row.holder = note.hop, note.holder
                        row.status, row.reason = note.status, note.reason
                        commit.runs = [row]
            is_back = self._notes.get(key) is not notes or key in self.held or key in self._loading
            if commit.runs and not is_back:
                await durable(commit, self._session.submit)
            for message in read:
                self._session.consumed(message)
        if self._notes.get(key) is notes:
            del self._notes[key]

    # -- batons --------------------------------------------------------------------------------

    def baton_message(self, message: Message, redelivered: bool) -> None:
        """Take a passed baton: go on with the run here, or end it at home."""
        self._notes.pop((message.to, message.run), None)
        passed = message.live
        message.live = None
        if isinstance(passed, Held) and not redelivered:
            self._take_live(message, passed)
        else:
            self._take_written(message, redelivered)

    def _take_live(self, message: Message, passed: Held) -> None:
        """Go on with an execution that was handed over inside this process."""
        service, header = message.to, passed.header
        key = (service, header.run)
        at_home = service == header.home
        if at_home and passed.home_row is not None and key not in self._loading:
            row, exists = passed.home_row, True
        elif (
            at_home
            or key in self.held
            or key in self._loading
            or service in [stop.service for stop in passed.trail[:-1]]
        ):
            # There may be a row of an earlier visit, or one is being read that may be this visit's.
            # So it is taken as if it came from elsewhere.
            passed.execution.discard()
            self._take_written(message, False)
            return
        else:
            row = blank_row(0, service, message.target, header)
            exists = False
        entries = passed.entries or []
        held = Held(
            row, header, passed.execution, exists, passed.trail, passed.attributes, passed.entries,
            entries[row.entries :] if exists else list(entries), passed.count, passed.size_bytes,
            home_row=passed.home_row,
        )  # fmt: skip
        held.undone = passed.undone
        self._arrived(held, message, held.trail[-1].hop)

    def _take_written(self, message: Message, redelivered: bool) -> None:
        """Take a baton as it was written, after whatever the run was just loaded for."""
        key = (message.to, message.run)
        if key in self._loading:
            self._loading[key].append(lambda held: self._take_written(message, redelivered))
        else:
            self._apart(key, partial(self._take_baton, message, redelivered))

    async def _take_baton(self, message: Message, redelivered: bool) -> None:
        try:
            baton = decode_baton(message.body)
        except CorruptJournal as error:
            log.error("baton %s of run %s is unreadable: %s", message.id, message.run, error)
            kept = MailRow(
                message.to, message.run, message.id, "!baton", message.body, message.at_us
            )
            self._session.submit(Commit(lambda _: self._session.consumed(message), mail=[kept]))
            return
        if message.id in await self._store.seen(message.to, [message.id]):
            self._session.consumed(message)
            return
        header = baton.header
        await self._make_known(header)
        row = await self._store.run_row(message.to, header.run)
        exists = row is not None
        if row is None:
            row = blank_row(0, message.to, message.target, header)
        raws = _split([JournalRow(0, 0, bytes(baton.entries))])
        held = Held(row, header, _no_execution(header), exists)
        held.trail, held.attributes = baton.trail, baton.attributes
        for raw in raws:
            held.append(raw, self._config.journal_max_bytes)
        held.entries = raws
        held.unwritten = raws[row.entries :] if exists else list(raws)
        held.home_row = row if message.to == header.home else None
        held.undone = _undone(raws)
        if baton.outcome is not None:
            held.execution.outcome = baton.outcome
            self._arrived(held, message, baton.hop)
            return
        if redelivered:
            row.hop, row.holder = baton.hop, row.service
            row.attributes = encode_plain(baton.attributes)
            held.arrival = self._mark(message)
            self._take_custody(held, message)
            return
        try:
            entries = decode_chunk(bytes(baton.entries))
            definition = self._registry.workflow(header.workflow, header.version)
            most = self._config.payload_max_bytes
            execution, delivered = rebuilt(header, definition, entries, most)
            execution.replay(delivered)
        except Exception as error:
            held.arrival = InboxRow(message.to, message.id, self._session.now_us())
            held.consuming.append(message)
            held.row.hop, held.row.holder = baton.hop, message.to
            self._stick(held, _why(header.run, error))
            return
        held.execution = execution
        for op in execution.pending.values():
            op.sent = op.kind == "timer" or op.ordinal in baton.sent
        self._arrived(held, message, baton.hop)

    def _arrived(self, held: Held, message: Message, hop: int) -> None:
        row = held.row
        row.hop, row.holder = hop, row.service
        row.status = "running"
        held.arrival = InboxRow(message.to, message.id, self._session.now_us())
        held.consuming.append(message)
        if held.outcome is not None and held.outcome.status != "continued":
            self._end(held)
            return
        if held.outcome is not None:
            self._leave_soon(held.key)  # what comes while its mail is read goes to its successor
            self._spawn(self._end_with_mail(held))
            return
        self._add(held)
        if row.service == row.home and self._has_receive(held):
            held.reads_mail = True
            self._spawn(self._settle_with_mail(held))
        else:
            self._settle(held, replayed=True)

    def _has_receive(self, held: Held) -> bool:
        return bool(getattr(held.execution.definition, "receives", ()))

    async def _end_with_mail(self, held: Held, *what: Any) -> None:
        await self._read_mail(held)
        self._end(held, *what)

    async def _settle_with_mail(self, held: Held) -> None:
        await self._read_mail(held)
        if not held.dead and held.outcome is None:
            self._settle(held, replayed=True)

    # -- progress ------------------------------------------------------------------------------

    def _feed(
        self,
        held: Held,
        entry: Entry,
        *,
        message: Message | None = None,
        unparked: Sequence[tuple[str, str]] = (),
        done: Callable[[PavaneError | None], None] | None = None,
    ) -> None:
        """Deliver one entry and commit it with everything that follows from it."""
        execution = held.execution
        try:
            execution.feed(entry)
        except Exception as error:
            if entry.what == "start":  # or its journal would have no beginning
                entry.issued = []
                held.record(entry, self._config.journal_max_bytes)
            held.marks = []  # the message is kept, and counts as new when it comes again
            self._stick(
                held, _why(held.row.id, error), *_some(message), unparked=unparked, done=done
            )
            return
        held.record(entry, self._config.journal_max_bytes)
        held.suspect = max(0, held.suspect - 1)
        if message is not None:
            held.consuming.append(message)
        self._settle(held, unparked=unparked, done=done)

    def _settle(
        self,
        held: Held,
        *,
        replayed: bool = False,
        recovered: bool = False,
        unparked: Sequence[tuple[str, str]] = (),
        done: Callable[[PavaneError | None], None] | None = None,
    ) -> None:
        """Decide what happens next and commit; the run is stuck if that cannot be done.

        `replayed`: no entry was delivered just now. `recovered`: what is pending may have been
        asked for before; it is asked for again, by the same ids.
        """
        row = held.row
        if not (replayed or unparked or done) and (step := _step_alone(held)) is not None:
            self._go_on(held, step)
            return
        if replayed and (step := _step_it_came_for(held)) is not None:
            # A baton whose step runs right here is marked with its result.
            step.sent = True
            held.local.add(step.ordinal)
            self._launch(held, (step,))
            return
        messages: list[Message] = []
        taken: list[tuple[str, str, str]] = []
        hop, trail = row.hop, held.trail
        try:
            self._settle_all(held, replayed, recovered, messages, unparked, taken, done)
        except (StoreError, LeaseLost):
            raise
        except Exception as error:
            row.hop, row.holder, held.trail = hop, row.service, trail
            row.ended_us = row.result = None  # should it have been about to end
            self._stick_with(held, error, messages, unparked, taken, done)

    def _settle_all(
        self,
        held: Held,
        replayed: bool,
        recovered: bool,
        messages: list[Message],
        unparked: Sequence[tuple[str, str]],
        taken: list[tuple[str, str, str]],
        done: Callable[[PavaneError | None], None] | None,
    ) -> None:
        """Decide and commit whatever it is that follows from a delivery."""
        execution, row = held.execution, held.row
        self._collect(held, messages)
        try:
            while held.mail and execution.outcome is None and self._deliver_mail(held, taken):
                self._collect(held, messages)
        except NotUndone as error:
            self._stick(
                held, str(error), unparked=unparked, taken=taken, leaving=messages, done=done
            )
            return
        if execution.outcome is not None:
            if held.reads_mail and execution.outcome.status == "continued":
                self._spawn(self._end_with_mail(held, messages, unparked, taken, done))
            else:
                self._end(held, messages, unparked, taken, done)
            return
        if not execution.pending and not held.dead:
            self._stick(
                held, _idle(row.id), unparked=unparked, taken=taken, leaving=messages, done=done
            )
            return
        header = held.header
        decision = decide(
            list(execution.pending.values()), here=row.service, home=header.home,
            mode=header.mode, forced=header.forced, journal_bytes=held.size_bytes, hops=row.hop,
            journal_max_bytes=self._config.journal_max_bytes, hops_max=self._config.hops_max,
        )  # fmt: skip
        if isinstance(decision, Pass) and not held.local and held.entries is not None:
            for op in execution.pending.values():
                if not op.sent:
                    self._check_listed(op)
            self._pass(held, decision, messages, unparked, taken, done)
            return
        launch = self._dispatch(held, execution.pending.values(), messages, recovered)
        if replayed and not (messages or taken or unparked):
            # Nothing was delivered. A baton is marked with the result of what runs right here.
            at_once = held.arrival is not None and len(launch) == len(
                [op for op in execution.pending.values() if op.name != EXPIRY]
            )
            self._project(held, launch)
            if at_once or (held.arrival is None and not held.dirty):
                self._launch(held, launch)
                return
        self._commit(held, messages, unparked, taken, done, launch)

    def _go_on(self, held: Held, step: Operation) -> None:
        """Commit what was delivered, and nothing else; then do `step`."""
        step.sent = True
        held.local.add(step.ordinal)
        held.commits += 1
        commit = Commit(partial(self._went_on, held, step), held.chain)
        commit.journal = held.take_journal()
        self._session.submit(commit)

    def _went_on(self, held: Held, step: Operation, error: PavaneError | None) -> None:
        held.commits -= 1
        if error is not None:
            self._refused(held, error, ())
        elif not held.dead:
            self._launch(held, (step,))

    def _collect(self, held: Held, messages: list[Message]) -> None:
        """Turn what has no result (publish, spawn, attributes, given-up work) into its effect."""
        execution = held.execution
        if not execution.given_up:
            for op in execution.new:
                if op.future is None:
                    break
            else:
                return
        now = self._session.now_us()
        self._withdraw(held, messages, now)
        while execution.new:  # what is left there, should one of them fail, was not done
            op = execution.new[0]
            if op.kind == "publish":
                held.events.append(self._published(held, op, now))
            elif op.kind == "spawn":
                self._check_listed(op)
                messages.append(self._start_child(held, op, None, now))
            elif op.kind == "attributes":
                held.attributes.update(op.detail)
            del execution.new[0]

    def _withdraw(self, held: Held, messages: list[Message], now: int) -> None:
        """Tell whoever was asked for what the run has given up."""
        execution, run = held.execution, held.row.id
        for op in execution.given_up:
            if not op.sent:
                continue
            if op.kind == "step" and op.ordinal in held.local:
                held.local.discard(op.ordinal)
                self._session.steps.revoke(
                    held.row.service, operation_id(run, op.ordinal, held.header.era)
                )
            elif op.kind == "step":
                id = operation_id(run, op.ordinal, held.header.era)
                body = pack(Request(id))
                messages.append(self._message("revoke", f"{id}r", op.service, run, body, now))
            elif op.kind == "child":
                child = child_id(run, op.ordinal)
                body = pack(Request(f"parent {run}"))
                messages.append(
                    self._message("cancel", f"{child}#cancel", op.service, child, body, now)
                )
            elif op.detail is BEGIN:
                messages.append(self._permit(held, "permit-back"))
            elif op.kind == "receive" and op.detail is not None:
                messages.append(self._await(held, op, "unawait", now))
        execution.given_up = []

    def _check_listed(self, op: Operation) -> None:
        """Raise UnknownName for what no service of this app can do."""
        if op.kind in ("step", "child", "spawn") and op.service not in self._registry.services:
            what = "run of" if op.kind != "step" else "step"
            raise UnknownName(
                f"The workflow asks for {what} {op.service}.{op.name}, but this app has no service "
                f"{op.service!r}. List it, App(services=[…]), and start the workers anew: the run "
                f"then goes on."
            )

    def _message(
        self, kind: str, id: str, to: str, run: str, body: bytes, at_us: int, live: Any = None
    ) -> Message:
        return Message(kind, id, to, run, body, at_us, self._store.target_of(to, run), 0, live)

    def _command(self, call: Call, now: int) -> Message:
        return self._message("command", call.id, call.service, call.run, pack(call), now)

    def _published(self, held: Held, op: Operation, now: int) -> EventRow:
        header = held.header
        return event_row(
            self._store, op.detail, id=f"{header.run}#{op.ordinal}", source=op.service, at_us=now,
            conversation=header.conversation, cause=header.run, data=op.args,
        )  # fmt: skip

    def _start_child(self, held: Held, op: Operation, parent: Parent | None, now: int) -> Message:
        planned = op.detail if isinstance(op.detail, Planned) else None
        detail: Any = op.detail
        workflow: Workflow[..., Any] = detail if planned is None else planned.workflow
        child = child_id(held.row.id, op.ordinal)
        header = Header(
            run=child, workflow=workflow.name, version=workflow.version,
            home=workflow.service.name, mode=op.mode or held.header.mode, started_us=now,
            conversation=held.header.conversation, parent=parent,
            timeout_us=round((workflow.timeout_s or 0) * 1e6), cause=held.row.id,
        )  # fmt: skip
        header.priority = held.header.priority
        if planned is not None:
            child = header.run = header.conversation = planned.run
            header.mode, header.scheduled_us = workflow.mode, planned.at_us
        return self._message(
            "start", child, op.service, child, pack(Start(header, Raw(op.args))), now
        )

    def _deliver_mail(self, held: Held, taken: list[tuple[str, str, str]]) -> bool:
        """Deliver the first event that a `receive` waits for; tell whether there was one."""
        if held.row.service != held.header.home or held.reads_mail:
            return False
        waiting = {
            op.name: op for op in reversed(held.execution.pending.values()) if op.kind == "receive"
        }
        for at, mail in enumerate(held.mail):
            op = waiting.get(mail.type)
            if op is not None:
                del held.mail[at]
                held.taken.add(mail.id)
                entry = Entry(
                    "received", self._session.now_us(), op.ordinal, Raw(mail.body), mail.type,
                    0, mail.at_us,
                )  # fmt: skip
                held.execution.feed(entry)
                held.record(entry, self._config.journal_max_bytes)
                held.suspect = max(0, held.suspect - 1)
                taken.append((mail.service, mail.run, mail.id))
                return True
        return False

    def _must_command(self, held: Held, op: Operation) -> bool:
        """Away from home, a fork's steps travel as commands, so that the baton may go home."""
        row = held.row
        return row.service != row.home and len(held.execution.pending) > 1 and op.name != EXPIRY

    def _dispatch(
        self, held: Held, pending: Iterable[Operation], messages: list[Message], recovered: bool
    ) -> list[Operation]:
        """Ask for what is pending and not asked for yet; return the steps to launch here."""
        launch: list[Operation] = []
        row = held.row
        now = self._session.now_us()
        for op in pending:
            if op.sent:
                continue
            self._check_listed(op)
            if op.kind == "step":
                op.sent = True
                here = op.service == row.service or (
                    not recovered and row.service == row.home and self._session.hosts(op.service)
                )
                if here and not self._must_command(held, op):
                    held.local.add(op.ordinal)
                    launch.append(op)
                else:
                    messages.append(self._command(self.call(held, op), now))
            elif op.kind == "child":
                parent = Parent(row.id, op.ordinal, row.service, held.header.era)
                messages.append(self._start_child(held, op, parent, now))
                op.sent = True
            else:
                sent = op.kind != "receive" or row.service == row.home
                if op.detail is BEGIN:
                    messages.append(self._permit(held, "permit-ask", op))
                elif sent and op.kind == "receive" and op.detail is not None:
                    messages.append(self._await(held, op, "await", now))
                op.sent = sent
        return launch

    def _permit(self, held: Held, kind: str, op: Operation | None = None) -> Message:
        """Return what asks for the permit to begin a run, or gives it back."""
        header = held.header
        target = self._store.target_of(header.home, header.run)
        ordinal, fingerprint = (op.ordinal, op.fingerprint) if op else (0, "")
        permit = Permit(
            header.run, "", header.home, header.limit, header.limit_key, header.home, target,
            header.priority, op=ordinal, era=header.era, fingerprint=fingerprint,
        )  # fmt: skip
        return self._session.limits.message(kind, permit)

    def _await(self, held: Held, op: Operation, kind: str, now: int) -> Message:
        """Return what tells the mailbox that the run waits for a published event, or does no more.

        It goes to the partition where events of this key are kept.
        """
        header = held.header
        type, key = op.detail
        keep_s: float = getattr(held.execution.definition, "keep_s", 0.0)
        wanted = Await(
            header.run, op.ordinal, header.era, header.home, type, key, op.fingerprint,
            round(keep_s * 1e6),
        )  # fmt: skip
        id = f"{wanted.id}{'w' if kind == 'await' else 'x'}"
        target = self._store.target_of(header.home, key)
        return Message(kind, id, header.home, header.run, pack(wanted), now, target)

    def call(self, held: Held, op: Operation) -> Call:
        """Return the command for a step."""
        header = held.header
        return Call(
            header.run, op.ordinal, header.era, op.service, op.name, Raw(op.args),
            held.row.service, header.conversation, op.undo,
            self._session.steps.encode_options(op.service, op.name, op.detail),
            held.row.deaths if held.suspect == CLEARED_BY else 0,
            held.execution.asked_in(op.ordinal), header.priority,
        )  # fmt: skip

    def _launch(self, held: Held, operations: Sequence[Operation]) -> None:
        if held.row.target in self._session.draining:
            return  # the next owner does it
        try:
            for op in operations:
                if op.ordinal in held.local:
                    self._session.steps.launch_local(held, op)
        except Exception as error:
            self._stick(held, _why(held.row.id, error))

    # -- writing -------------------------------------------------------------------------------

    def _project(self, held: Held, launch: Sequence[Operation] = ()) -> None:
        """Bring the row up to date with the run; it is `dirty` if it must be written."""
        row, before = held.row, held.dirty
        deadlines: list[int] = []
        passive: list[str] = []
        busy = bool(launch) or bool(held.at_work)
        for op in held.execution.pending.values():
            if op.kind == "timer":
                deadlines.append(op.deadline_us)
                if op.name != EXPIRY:
                    passive.append("timer")
            elif op.kind == "receive":
                passive.append(op.name if op.detail is BEGIN else f"event {op.name}")
            elif op.kind == "child":
                passive.append(f"run {child_id(row.id, op.ordinal)}")
            elif op.ordinal in held.queued and op.ordinal in held.local:
                passive.append(f"limit of {op.service}.{op.name}")
            else:
                busy = True
        changed = before
        status: Status = "running" if busy or not passive else "waiting"
        reason = "" if status == "running" else ", ".join(dict.fromkeys(passive))
        if (row.status, row.reason) != (status, reason):
            row.status, row.reason, changed = status, reason, True
        if held.attributes and (attributes := encode_plain(held.attributes)) != row.attributes:
            row.attributes, changed = attributes, True
        if row.deaths and not held.suspect:
            row.deaths, changed = 0, True
        if held.undone != row.undone:
            row.undone, changed = held.undone, True
        wake, stored = min(deadlines, default=None), row.wake_us
        if wake != stored:
            # A stored time that is too early only wakes the run for nothing, once.
            sooner = wake is not None and (stored is None or wake < stored)
            overdue = stored is not None and stored <= self._session.now_us()
            if changed or sooner or overdue:
                row.wake_us, changed = wake, True
        if wake is not None:
            self._session.run_timers.schedule(held.key, wake, row.no or None)
        held.dirty = changed

    def _commit(
        self,
        held: Held,
        messages: list[Message],
        unparked: Sequence[tuple[str, str]] = (),
        taken: Sequence[tuple[str, str, str]] = (),
        done: Callable[[PavaneError | None], None] | None = None,
        launch: Sequence[Operation] = (),
        parked: Sequence[ParkedRow] = (),
    ) -> None:
        row = held.row
        self._assign_number(held)
        self._project(held, launch)
        held.dirty = held.dirty or held.arrival is not None
        if held.arrival is not None and row.service != row.home:
            messages.append(self._note_home(row, row.service, row.status, row.reason))
        self._write(held, messages, unparked, taken, done, launch, parked, write_row=held.dirty)

    def _note_home(self, row: RunRow, holder: str, status: Status, reason: str) -> Message:
        """Return what tells home where its run is."""
        body = pack(Note(row.hop, holder, status, reason))
        now = self._session.now_us()
        id = f"{row.id}#n{row.hop}{status[0]}"
        return self._message("note", id, row.home, row.id, body, now)

    def _assign_number(self, held: Held) -> None:
        row = held.row
        if row.no == 0:
            row.no = self._session.take_run_number()
            if row.deaths:  # the last of them is this session's count
                self._session.deaths.touched[row.target].runs[row.no] = row.deaths - 1

    def _write(
        self,
        held: Held,
        messages: Sequence[Message],
        unparked: Sequence[tuple[str, str]],
        taken: Sequence[tuple[str, str, str]],
        done: Callable[[PavaneError | None], None] | None,
        launch: Sequence[Operation] = (),
        parked: Sequence[ParkedRow] = (),
        write_row: bool = True,
        keep_journal: bool = True,
        passed_to: str = "",
    ) -> None:
        row = held.row
        consuming, held.consuming = held.consuming, []
        held.commits += 1

        leaving = held.dead
        if leaving:
            self._leave_soon(held.key)

        def written(error: PavaneError | None) -> None:
            held.commits -= 1
            if leaving:
                self._left(held.key)
            if done is not None:
                done(error)
            if error is not None:
                self._refused(held, error, consuming)
                return
            for message in consuming:
                self._session.consumed(message)
            if row.wake_us is not None:  # who read ahead meanwhile did not find it
                self._session.run_timers.schedule(held.key, row.wake_us)
            if row.status in ENDED and row.service == row.home:
                self._session.ended(row)
            if passed_to and not self._session.owns(self._store.target_of(passed_to, row.id)):
                held.execution.discard()  # another process goes on with it
            if launch and not held.dead:
                self._launch(held, launch)
            if row.status == "waiting":
                self._evict(held)

        commit = Commit(written, held.chain)
        if keep_journal:
            commit.journal = held.take_journal()
        if write_row:
            row.entries = held.count if keep_journal else row.entries
            if held.trail and (not held.exists or held.arrival or passed_to):
                row.trail = encode_plain(held.trail)
            row.header = row.header or encode_plain(held.header)
            commit.runs = [copy(row)]
            held.exists, held.dirty = True, False
        marks, held.marks = held.marks, []
        if held.arrival is not None:
            arrival, held.arrival = held.arrival, None
            marks.append(InboxRow(arrival.service, arrival.id, arrival.at_us, passed_to))
        commit.inbox = marks
        if messages:
            commit.messages = messages
        if held.events:
            commit.events, held.events = held.events, []
        if held.members:
            commit.reaction, held.members = Reaction(members=held.members), []
        if unparked or taken or parked:
            commit.unparked, commit.mail_taken, commit.parked = unparked, taken, parked
        self._session.submit(commit)

    def _refused(self, held: Held, error: PavaneError, consuming: Sequence[Message]) -> None:
        """A commit was not written: forget what was built on it, and lose nothing.

        A conflict means that the store knows better: what came is delivered again to the run as it
        is there, once. Anything else is a value that cannot be stored: the run is stuck with it.
        """
        self._drop(held)
        if not self._session.open:
            return
        row = held.row
        if not isinstance(error, Conflict):
            log.error("run %s: %s", row.id, error)
            self._spawn(self._poisoned(held, error, consuming))
            return
        log.info("run %s: %s", row.id, error)
        if not consuming and held.key not in self._again:
            self._again.add(held.key)
            self.with_run(*held.key, _nothing)
        for message in consuming:
            if (message.to, message.id) in self._again:
                log.error("%r was refused twice: %s", message, error)  # a restart takes it up
            else:
                self._again.add((message.to, message.id))
                self._session.redeliver(message)

    async def _poisoned(self, held: Held, error: PavaneError, consuming: Sequence[Message]) -> None:
        row = await self._store.run_row(*held.key)
        if row is None:
            row = blank_row(0, held.row.service, held.row.target, held.header)
        stuck = Held(row, held.header, _no_execution(held.header), exists=True)
        stuck.count = row.entries
        self._stick(stuck, str(error), *consuming, kept_journal=True)

    def _pass(
        self,
        held: Held,
        decision: Pass,
        messages: list[Message],
        unparked: Sequence[tuple[str, str]],
        taken: Sequence[tuple[str, str, str]],
        done: Callable[[PavaneError | None], None] | None,
    ) -> None:
        """Hand the baton on: one commit with the arrival's mark and the next baton."""
        row, header = held.row, held.header
        now = self._session.now_us()
        header.forced = header.forced or decision.forced
        hop = row.hop + 1
        held.trail = [*held.trail, Stop(decision.to, now, hop)]
        row.hop, row.holder, row.status, row.reason = hop, decision.to, "passed", ""
        row.wake_us = None
        self._forget(held)
        body = self._baton(held, hop, None)
        messages.append(
            self._message("baton", hop_id(row.id, hop), decision.to, row.id, body, now, held)
        )
        self._leave(held, messages, unparked, taken, done, decision.to)

    def _leave(
        self,
        held: Held,
        messages: Sequence[Message],
        unparked: Sequence[tuple[str, str]],
        taken: Sequence[tuple[str, str, str]],
        done: Callable[[PavaneError | None], None] | None,
        to: str,
    ) -> None:
        """Write that the run went on to service `to`; a guest that wrote nothing leaves no row."""
        row = held.row
        row.undone = held.undone
        if held.attributes:
            row.attributes = encode_plain(held.attributes)
        keep = held.exists or row.service == row.home
        if held.exists and row.service != row.home and to != row.home:
            # It was said to wait here; now it goes on.
            messages = [*messages, self._note_home(row, to, "passed", "")]
        if keep:
            self._assign_number(held)
            row.header = encode_plain(held.header)
        self._write(
            held, messages, unparked, taken, done, write_row=keep, keep_journal=keep, passed_to=to
        )

    def _baton(self, held: Held, hop: int, outcome: Outcome | None) -> bytes:
        assert held.entries is not None
        sent = [op.ordinal for op in held.execution.pending.values() if op.sent]
        return encode_baton(
            Baton(
                FORMAT, held.header, hop, held.count, Raw(b"[" + b",".join(held.entries) + b"]"),
                held.trail, held.attributes, outcome, sent,
            )
        )  # fmt: skip

    def _end(
        self,
        held: Held,
        messages: list[Message] | None = None,
        unparked: Sequence[tuple[str, str]] = (),
        taken: Sequence[tuple[str, str, str]] = (),
        done: Callable[[PavaneError | None], None] | None = None,
    ) -> None:
        """End the run: at home its row, elsewhere by a last hop home."""
        outcome, row, header = held.outcome, held.row, held.header
        assert outcome is not None
        messages = messages if messages is not None else []
        now = self._session.now_us()
        for op in list(held.execution.pending.values()):
            held.execution.give_up(op.ordinal)
        self._collect(held, messages)
        self._forget(held)
        self._session.run_timers.forget(held.key)
        held.execution.discard()
        if row.service != header.home and held.entries is not None:
            hop = row.hop + 1
            held.trail = [*held.trail, Stop(header.home, now, hop)]
            row.hop, row.holder, row.status, row.wake_us = hop, header.home, "passed", None
            row.reason = ""
            body = self._baton(held, hop, outcome)
            live = held if not held.exists else None
            messages.append(
                self._message("baton", hop_id(row.id, hop), header.home, row.id, body, now, live)
            )
            self._leave(held, messages, unparked, taken, done, header.home)
            return
        if header.limit:
            messages.append(self._permit(held, "permit-back"))
        row.status, row.reason, row.ended_us = outcome.status, "", now
        row.result, row.wake_us, row.deaths = bytes(outcome.value), None, 0
        row.holder = row.service
        row.undone = held.undone
        row.header = encode_plain(header)
        if held.attributes:
            row.attributes = encode_plain(held.attributes)
        if outcome.status == "failed":
            row.reason = error_summary(bytes(outcome.value))
        if outcome.status == "continued":
            messages.append(self._continued(held, outcome, now))
            successor = messages[-1].run
            for mail in held.mail:
                id = f"{successor}#{mail.id.partition('#')[2]}"
                body = pack(Signal(mail.type, Raw(mail.body)))
                messages.append(
                    self._message("signal", id, row.service, successor, body, mail.at_us)
                )
            taken = [*taken, *((mail.service, mail.run, mail.id) for mail in held.mail)]
        elif header.parent is not None:
            messages.append(self._answer_parent(header, outcome, row, now))
        self._assign_number(held)
        self._write(held, messages, unparked, taken, done)

    def _continued(self, held: Held, outcome: Outcome, now: int) -> Message:
        header = held.header
        successor = next_id(header.run)
        definition = self._registry.workflow(header.workflow)
        following = Header(
            run=successor, workflow=header.workflow, version=definition.version,
            home=header.home, mode=header.mode, started_us=now, conversation=header.conversation,
            timeout_us=header.timeout_us, parent=header.parent, cause=header.run,
            scheduled_us=header.scheduled_us, priority=header.priority,
        )  # fmt: skip
        held.members.append((header.conversation, successor))
        held.row.result = encode_plain(successor)
        body = pack(Start(following, outcome.value))
        return self._message("start", successor, header.home, successor, body, now)

    def _answer_parent(self, header: Header, outcome: Outcome, row: RunRow, now: int) -> Message:
        parent = header.parent
        assert parent is not None
        ok = outcome.status == "completed"
        value = outcome.value
        if outcome.status in ("cancelled", "killed"):
            from pavane.core.codec import encode_error
            from pavane.errors import RunFailed

            value = Raw(
                encode_error(
                    RunFailed(f"Run {row.id} was {outcome.status}.", status=outcome.status)
                )
            )
        reply = Reply(
            parent.run, parent.op, parent.era, f"child {row.home}.{row.workflow}", ok, value,
            row.home, 1, row.started_us,
        )  # fmt: skip
        id = operation_id(parent.run, parent.op, parent.era)
        return self._message("reply", id, parent.holder, parent.run, pack(reply), now)

    # -- trouble -------------------------------------------------------------------------------

    def _stick_with(
        self,
        held: Held,
        error: Exception,
        messages: list[Message],
        unparked: Sequence[tuple[str, str]],
        taken: Sequence[tuple[str, str, str]],
        done: Callable[[PavaneError | None], None] | None,
    ) -> None:
        """Park a run whose next moves cannot be made, and write what was delivered to it.

        Its journal notes what nobody could be asked for, so that this is done when it goes on.
        """
        execution = held.execution
        unasked = [op.ordinal for op in execution.new if op.future is None and op.handle is None]
        unasked += [op.ordinal for op in execution.pending.values() if not op.sent]
        entry = Entry("unasked", self._session.now_us(), value=Raw(encode_plain(unasked)))
        held.record(entry, self._config.journal_max_bytes)
        self._stick(
            held, _why(held.row.id, error), unparked=unparked, taken=taken, leaving=messages,
            done=done,
        )  # fmt: skip

    def _stick(
        self,
        held: Held,
        reason: str,
        *messages: Message,
        unparked: Sequence[tuple[str, str]] = (),
        taken: Sequence[tuple[str, str, str]] = (),
        leaving: Sequence[Message] = (),
        kept_journal: bool = False,
        done: Callable[[PavaneError | None], None] | None = None,
    ) -> None:
        """Park the run for a person, with the reason; keep `messages` that it could not take."""
        row = held.row
        log.error("run %s is stuck: %s", row.id, reason)
        row.status, row.reason, row.wake_us = "stuck", reason, None
        row.undone = held.undone
        if held.trail:
            row.trail = encode_plain(held.trail)
        if held.attributes:
            row.attributes = encode_plain(held.attributes)
        mail: list[MailRow] = []
        for message in messages:
            kind = f"{HELD_BACK}{message.kind}"
            mail.append(MailRow(row.service, row.id, message.id, kind, message.body, message.at_us))
            held.consuming.append(message)
        for op in held.execution.pending.values():
            if op.ordinal in held.local:
                self._session.steps.revoke(
                    row.service, operation_id(row.id, op.ordinal, held.header.era)
                )
        self._drop(held)
        self._assign_number(held)
        consuming, held.consuming = held.consuming, []

        self._leave_soon(held.key)

        def written(error: PavaneError | None) -> None:
            self._left(held.key)
            for consumed in consuming:
                self._session.consumed(consumed)
            if done is not None:
                done(error)

        commit = Commit(written, held.chain)
        commit.journal = [] if kept_journal else held.take_journal()
        if not kept_journal:
            row.entries = held.count
        row.header = row.header or encode_plain(held.header)
        commit.runs = [copy(row)]
        commit.mail = mail
        commit.unparked, commit.mail_taken = unparked, taken
        commit.events, held.events = held.events, []
        commit.inbox = [*held.marks, *_some(held.arrival)]
        commit.messages = leaving
        if row.service != row.home:
            commit.messages = [*leaving, self._note_home(row, row.service, "stuck", reason)]
        self._session.submit(commit)

    def quarantine(self, row: RunRow) -> None:
        """Set a run aside that was under way in too many process deaths."""
        held = Held(row, decode_header(row.header), _no_execution(), exists=True)
        held.trail = decode_trail(row.trail)
        self._stick(held, _quarantined(row.id, row.deaths + 1), kept_journal=True)

    def custody(
        self, held: Held, parked: ParkedRow, done: Callable[[PavaneError | None], None]
    ) -> None:
        """Write a run together with a step of it that takes long or waits for its next attempt."""
        if held.dead:
            done(None)  # nobody waits for it any more
        else:
            self._commit(held, [], parked=[parked], done=done)

    def command(self, call: Call, unparked: Sequence[tuple[str, str]]) -> None:
        """Ask the service of a step that was in custody here to go on with it."""

        def ask(held: Held | None) -> None:
            is_wanted = (
                held is not None and not held.dead and held.outcome is None
                and call.op in held.execution.pending and call.era == held.header.era
            )  # fmt: skip
            if held is None or not is_wanted:
                self._session.submit(Commit(unparked=unparked))
                return
            held.local.discard(call.op)
            held.queued.discard(call.op)
            self._commit(held, [self._command(call, self._session.now_us())], unparked)

        self.with_run(call.reply_to, call.run, ask)

    def is_busy(self, key: Key) -> bool:
        """Tell whether a suspect does something here, or did what is not durable yet."""
        if key in self._loading:  # it is being loaded, or leaves, or what came for it is looked at
            return True
        held = self.held.get(key)
        return held is not None and (held.commits > 0 or (held.suspect > 0 and bool(held.at_work)))

    # -- housekeeping --------------------------------------------------------------------------

    def release(self, targets: set[int]) -> None:
        """Put away all runs of these partitions; their commits were flushed before."""
        for held in list(self.held.values()):
            if held.row.target in targets:
                self._drop(held)
        for key in [key for key in self._loading if self._store.target_of(*key) in targets]:
            del self._loading[key]  # it was set aside

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if not isinstance(error, (StoreError, LeaseLost)):
            log.error("a duty of the holder failed", exc_info=error)
        elif self._session.open:
            self._session.lost(error)

    async def settle(self) -> None:
        """Wait for loads and other short work."""
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        for held in list(self.held.values()):
            self._drop(held)


def _step_alone(held: Held) -> Operation | None:
    """Return the step that alone follows from a delivery and is done right here, if it is so.

    Most deliveries are like that, and all else that one may lead to would be looked for in vain.
    None also when the delivery changes the row, or anything but the journal waits to be written.
    """
    execution, row = held.execution, held.row
    if len(execution.new) != 1 or len(execution.pending) != 1 or execution.given_up:
        return None
    step = execution.new[0]
    if step.kind != "step" or step.service != row.service or execution.outcome is not None:
        return None
    if held.dirty or held.suspect or row.deaths or row.status != "running":
        return None
    if row.wake_us is not None:
        return None
    if held.undone != row.undone or held.arrival or held.consuming or held.marks or held.events:
        return None
    return step


def _step_it_came_for(held: Held) -> Operation | None:
    """Return the step that a baton which just arrived came for, if nothing else is to be done."""
    pending, row = held.execution.pending, held.row
    if held.arrival is None or len(pending) != 1 or held.execution.given_up or held.mail:
        return None
    (step,) = pending.values()
    if step.kind != "step" or step.service != row.service or step.sent or held.attributes:
        return None
    return step


def _limit(header: Header, execution: Execution, args: bytes) -> str:
    """Note what limit a run is under, for all its time; or say why that cannot be known."""
    definition: Any = execution.definition
    limit = definition.limit
    if limit is None:
        return ""
    try:
        header.limit_key = limit.key_of(*definition.params.decode(args))
    except Exception as error:  # of the user's function, too
        return (
            f"The key of the limit of workflow {header.workflow} cannot be told: {error!r}. Repair "
            f"it, then `pavane runs retry {header.run}`."
        )
    header.limit = definition.limit_name
    return ""


def start_claim(header: Header) -> InboxRow:
    """Return the mark that makes a run's id unique before its row is there."""
    return InboxRow(header.home, f"{header.run}#start", header.started_us)


def next_id(run: str) -> str:
    """Return the id of the run that continues `run`."""
    base, number = chain_of(run)
    return chained(base, number + 1)


class _NoDefinition:
    fn: Any = None
    params: Any = None


def _no_execution(header: Header | None = None) -> Execution:
    """An execution of nothing, for rows that are changed without running their code."""
    blank = Header("", "", 1, "", "orchestration", 0, "")
    execution = Execution(header or blank, _NoDefinition())
    execution.discard()  # so that it is no cycle for the garbage collector
    return execution


def _split(journal: Sequence[JournalRow]) -> list[bytes]:
    import msgspec

    try:
        return [
            bytes(raw)
            for row in journal
            for raw in msgspec.json.decode(row.body, type=list[msgspec.Raw])
        ]
    except msgspec.DecodeError as error:
        raise CorruptJournal(f"A journal row cannot be read: {error}. {DAMAGED}") from None


def _quarantined(run: str, deaths: int) -> str:
    return (
        f"Quarantined: {deaths} processes died while this run was under way. Find out why, then "
        f"`pavane runs retry {run}`."
    )


def _idle(run: str) -> str:
    return (
        f"Its code waits, but for nothing that is journalled: no step, timer, event or run is "
        f"under way, so it could never go on. Does it await an asyncio.Event that nobody sets, or "
        f"something from outside of the run? Repair that, then `pavane runs retry {run}`."
    )


def _undone(raws: Sequence[bytes]) -> int:
    entries = decode_chunk(b"[" + b",".join(raws) + b"]")
    issued: list[str] = []
    undone = 0
    for entry in entries:
        if entry.what == "done" and 0 <= entry.op < len(issued):
            undone += issued[entry.op].startswith("undo ")
        issued += entry.asked
    return undone


def _hop_of(id: str) -> int:
    tail = id.rpartition("#h")[2]
    return int(tail) if tail.isdigit() else -1


def _other_operation(reply: Reply, operation: Operation) -> str:
    return (
        f"A result of '{reply.fingerprint}' came for operation {reply.op}, but the code of the "
        f"workflow now asks for '{operation.fingerprint}' there.\n"
        f"--- recorded\n+++ asked for by the code now\n-{reply.fingerprint}\n"
        f"+{operation.fingerprint}\nDeploy the old code again, or guard the change with "
        f"`if patched(…):`, and the run goes on."
    )


def _why(run: str, error: Exception) -> str:
    """Return why a run is stuck; what nobody foresaw is logged whole."""
    if isinstance(error, (Mismatch, UnknownName)):
        return f"{error}\n{OTHER_CODE}"
    if isinstance(error, PavaneError):
        return str(error)
    log.error("run %s failed in the engine", run, exc_info=error)
    return (
        f"The engine failed at it: {error!r}; the worker's log has the traceback. Repair the "
        f"cause, then `pavane runs retry {run}`."
    )


def _as_messages(
    row: RunRow, mail: Sequence[MailRow]
) -> tuple[list[tuple[str, str, str]], list[Message]]:
    """Return what takes held-back mail out of the mailbox, and the messages that it was."""
    return [(m.service, m.run, m.id) for m in mail], [
        Message(m.type[1:], m.id, m.service, m.run, m.body, m.at_us, row.target) for m in mail
    ]


def _some(it: T | None) -> list[T]:
    return [] if it is None else [it]


def _nothing(_: Held | None) -> None:
    """Loading the run was all that was wanted."""
