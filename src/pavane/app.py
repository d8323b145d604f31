"""The app: all services of a process together, and the client that starts and steers its runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Self, TypeVar

import msgspec
from msgspec import Raw

from pavane.config import MEMORY, check_address, make_store, store_address
from pavane.contract import Contract, make_contract
from pavane.core.baton import ENDED, Header, Stop, chain_of, chained, decode_baton
from pavane.core.codec import decode_error, decoder, encode_fitting
from pavane.core.envelope import Request, Signal, Start, pack, unpack
from pavane.core.execution import current
from pavane.core.journal import Entry, decode_chunk, effective, encode_entry
from pavane.core.operations import Mode
from pavane.engine.config import EngineConfig
from pavane.engine.duties import Duty
from pavane.engine.handlers import handler_spec
from pavane.engine.held import blank_row, decode_header, decode_trail, encode_plain
from pavane.engine.holder import start_claim
from pavane.engine.node import Node
from pavane.engine.process import Process
from pavane.engine.publishing import checked_size, event_row
from pavane.engine.registry import Registry
from pavane.engine.session import Session
from pavane.errors import (
    BadArguments,
    BadDeclaration,
    CorruptJournal,
    NotInHandler,
    NotInWorkflow,
    PavaneError,
    RunConflict,
    RunEnded,
    RunFailed,
    StoreError,
    TooLarge,
    UnknownName,
    UnknownRun,
)
from pavane.event import class_of, is_event
from pavane.handler import current_handler
from pavane.observe.conversations import Conversations
from pavane.policy import Duration, seconds
from pavane.service import Service, checked_name
from pavane.steering.dead import DeadLetters
from pavane.steering.desk import Desk
from pavane.steering.events import Events
from pavane.steering.forks import Forks
from pavane.steering.handlers import HandlerDesk
from pavane.steering.variants import Variants
from pavane.stores.eventlog import Reaction
from pavane.stores.port import (
    Commit,
    Conflict,
    JournalRow,
    MailRow,
    Message,
    ParkedRow,
    RunFilter,
    RunRow,
    Store,
    durable,
    promise,
    submit_alone,
)
from pavane.workflow import Workflow

if TYPE_CHECKING:
    from pavane.schedule import Missed, Schedule
    from pavane.steering.limits import Limits
    from pavane.steering.nodes import Nodes
    from pavane.steering.restored import Restored
    from pavane.steering.schedules import Schedules

P = ParamSpec("P")
R = TypeVar("R")

log = logging.getLogger("pavane.client")

POLL_S = 0.01
RUN_ID_MAX = 200
PRIORITY_MAX = 1_000_000
CHAIN_MAX = 1000
"""Of a run that goes on as another, and so on, so many are asked what they were sent."""
_plain = decoder(Any)


class RunStatus(msgspec.Struct, frozen=True):
    """What can be told of a run at a glance. Times are microseconds since the epoch."""

    id: str
    workflow: str
    version: int
    mode: str
    status: str
    reason: str
    home: str
    holder: str
    hops: int
    started_us: int
    ended_us: int | None
    compensated: int
    """How many compensations were carried out."""
    attributes: dict[str, str | int | float | bool]
    conversation: str = ""
    cause: str = ""
    """What started it: an event, or the run that it is a child or the continuation of."""
    successor: str = ""
    """The run that continues it, if it ended so."""


class RunHistory(msgspec.Struct, frozen=True):
    """Everything recorded of a run: its journal so far, where its baton was, what waits."""

    status: RunStatus
    entries: list[Entry]
    trail: list[Stop]
    mail: list[MailRow]
    parked: list[ParkedRow]
    problem: str = ""
    """Why part of it cannot be shown, if so."""


class Run(Generic[R]):
    """A handle on a run."""

    def __init__(self, client: Client, id: str, home: str = "") -> None:
        self._client = client
        self._home = home
        self.id = id

    async def result(self, timeout: Duration | None = None) -> R:
        """Wait for the end and return the result.

        While the run is stuck this waits until somebody has repaired it; that it is, is logged as a
        warning of "pavane.client" (by the worker, if that is this process). `status()` tells, too.

        Raises RunFailed, with the workflow's error as its cause, when the run failed, was
        cancelled or killed; TimeoutError when `timeout` passes first (the run goes on); StoreError
        when the store fails meanwhile, which says nothing of the run: ask again.
        """
        if timeout is None:
            return self._client.outcome(await self._client.wait_end(self.id, self._home))
        async with asyncio.timeout(seconds(timeout)):
            row = await self._client.wait_end(self.id, self._home)
        return self._client.outcome(row)

    async def status(self) -> RunStatus:
        return (await self.history()).status

    async def history(self) -> RunHistory:
        """Return the run's journal and stations, wherever in this store its baton is."""
        return await self._client.history(self.id)

    async def send(self, event: Any, *, id: str | None = None) -> None:
        """Send `event` to the run's mailbox; a repeated `id` takes effect once.

        That holds also for a run that went on as a new one meanwhile, or has ended.
        Raises RunEnded for a finished run, UnknownRun for none, BadArguments for an event type that
        its workflow does not receive, or values that are not of the types that the class declares.
        """
        await self._client.send(self.id, event, id)

    async def cancel(self) -> None:
        """Ask the run to stop: CancelledError at its next await, with clean-up and compensation."""
        await self._client.request(self.id, "cancel")

    async def kill(self) -> None:
        """End the run at once, without any clean-up."""
        await self._client.request(self.id, "kill")

    async def retry(self) -> None:
        """Go on with a stuck run, or with a failed one from the point of its failure.

        A run with a `timeout` has all of it again. Raises BadArguments for any other run, and for a
        failed one that was compensated: the text names a step where it can be forked.
        """
        await self._client.retry(self.id)

    async def fork(self, at: str | int, *, id: str | None = None) -> Run[R]:
        """Start a new run that shares this one's journal up to step `at` and does it anew.

        `at` is a step's name ("charge" or "payments.charge") or an operation's number. The new run
        has a `timeout` of its own, from now on. Raises BadArguments for a step that is not there,
        and for one that something comes before which was undone after it: the text names another.
        """
        return Run(self._client, await self._client.fork(self.id, at, id))

    def __repr__(self) -> str:
        return f"<run {self.id}>"


class Client:
    """Starts and steers runs on a store; with a node, also works for some services.

    ```python
    async with app.connect() as client:
        run = await client.start(fulfil, order, id="o-1")
        await client.get("o-0").cancel()
    ```

    `events`, `handlers`, `dead` and `variants` are about what services react to, `schedules` about
    what starts by the calendar, `limits` about what may go on at once, `nodes` about the processes
    that work, `restored` about a database that was put back.
    """

    def __init__(
        self, registry: Registry, store: Store, services: Sequence[str], config: EngineConfig,
        duties: Sequence[Duty] = (), process: Process | None = None,
    ) -> None:  # fmt: skip
        self.registry = registry
        self.store = store
        self._config = config
        self._duties = duties
        self._process = process or Process()
        self.node = (
            Node(store, registry, services, config, self._ended, duties, self._process)
            if services
            else None
        )
        self._waiting: dict[str, list[asyncio.Future[RunRow]]] = {}
        self._homes: dict[str, tuple[str, int, object]] = {}
        """Home and partition of each run whose end is waited for, and the tenure that tells it."""
        self._stuck: set[str] = set()
        """Runs whose end is waited for, and of which it was logged that they are stuck."""
        self._poller: asyncio.Task[None] | None = None
        desk = Desk(store, registry, self._write, config.payload_max_bytes)
        self.events = Events(desk)
        self.handlers = HandlerDesk(desk)
        self.dead = DeadLetters(desk)
        self.variants = Variants(desk)
        self.conversations = Conversations(store, registry.contracts)
        self._desk = desk

    async def open(self) -> None:
        await self.store.open()
        try:
            if self.node is not None:
                await self.restored.check()  # before anything is written to what is refused
            await self.store.register(sorted(self.registry.services))
            await self.store.register_handlers(
                [handler_spec(h) for h in self.registry.handlers() if h.options.share is None]
            )
            for duty in self._duties:
                await duty.prepare(self.store)
            if self.node is not None:
                if self.registry.schedules:
                    await self.schedules.declare(self.node.services)
                await self.node.start()
        except BaseException:
            await self.store.close()
            raise

    async def close(self) -> None:
        if self._poller is not None:
            self._poller.cancel()
            with suppress(asyncio.CancelledError):
                await self._poller
        try:
            if self.node is not None:
                await self.node.stop()
        finally:
            await self.store.close()

    async def drained(self) -> None:
        """Return when this client's node has drained because people asked it to, and works no more.

        The client itself can be used on.
        """
        if self.node is None:
            raise BadArguments("This client works for no service, so nothing of it can drain.")
        await self.node.drained.wait()

    @cached_property
    def limits(self) -> Limits:
        from pavane.steering.limits import Limits

        return Limits(self.store, self.registry)

    @cached_property
    def nodes(self) -> Nodes:
        from pavane.steering.nodes import Nodes

        return Nodes(self.store)

    @cached_property
    def restored(self) -> Restored:
        from pavane.steering.restored import Restored

        return Restored(self.store)

    @cached_property
    def schedules(self) -> Schedules:
        from pavane.steering.schedules import Schedules

        return Schedules(self._desk, self._begin, self.send, self.request)

    # -- starting ------------------------------------------------------------------------------

    async def start(
        self,
        workflow: Workflow[..., R],
        *args: Any,
        id: str | None = None,
        mode: Mode | None = None,
        timeout: Duration | None = None,
        priority: int = 0,
        **kwargs: Any,
    ) -> Run[R]:
        """Start a run of `workflow`; durable when this returns. See `App.start`."""
        if not isinstance(workflow, Workflow):  # pyright: ignore
            raise BadArguments(f"{workflow!r} is no workflow. Decorate it with @service.workflow.")
        return await self.start_run(
            workflow, args, kwargs, id=id, mode=mode, timeout=timeout, priority=priority
        )

    async def start_run(
        self,
        workflow: Workflow[..., R],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        id: str | None = None,
        mode: Mode | None = None,
        timeout: Duration | None = None,
        priority: int = 0,
    ) -> Run[R]:
        """Start a run with arguments of whatever names; see `App.start`."""
        self._check_outside("Starting a run of an app", "the workflow's own `start(…)`")
        known = self.registry.workflows.get((workflow.name, workflow.version))
        if known is not workflow:
            if self.registry.services.get(workflow.service.name) is workflow.service:
                why = "was declared after this app was opened; declare it before."
            else:
                why = "does not belong to this app; list its service in App(services=[…])."
            raise UnknownName(f"Workflow {workflow!r} {why}")
        raw = self._checked(
            workflow.params.check(args, kwargs), f"The arguments of {workflow!r} are"
        )
        if mode not in (None, "orchestration", "choreography"):
            raise BadArguments(f"mode={mode!r} is unknown: 'orchestration' or 'choreography'.")
        run = self._process.new_id() if id is None else checked_run_id(id)
        limit_s = workflow.timeout_s if timeout is None else seconds(timeout)
        header = Header(
            run=run, workflow=workflow.name, version=workflow.version,
            home=workflow.service.name, mode=mode or workflow.mode,
            started_us=self.store.now_us(), conversation=run,
            timeout_us=round((limit_s or 0) * 1e6), priority=_checked_priority(priority),
        )  # fmt: skip
        try:
            await self._begin(header, raw)
        except Conflict:
            await self._compare(header, raw)
        return Run(self, run, header.home)

    async def _begin(self, header: Header, raw: bytes) -> None:
        session = self._owner(header.home, header.run)
        if session is not None:
            done, begun = promise()
            session.holder.start(header, raw, done=done)
            await begun
        else:
            body = pack(Start(header, Raw(raw)))
            message = self._message("start", header.run, header.home, header.run, body)
            await self._write(Commit(inbox=[start_claim(header)], messages=[message]))

    async def _compare(self, header: Header, raw: bytes) -> None:
        """A run of this id exists: fine if it is the same, else RunConflict."""
        row = await self.store.run_row(header.home, header.run)
        workflow, args = header.workflow, None
        if row is not None:
            workflow = row.workflow
            journal = (await self.store.journals([row.no]))[row.no]
            with suppress(CorruptJournal):
                args = bytes(decode_chunk(journal[0].body)[0].value) if journal else None
        else:
            message = await self.store.message(header.run)
            if message is not None:
                start = unpack(Start, message.body)
                workflow, args = start.header.workflow, bytes(start.args)
        if workflow != header.workflow:
            raise RunConflict(
                f"Run {header.run!r} exists already, of workflow {workflow!r} and not "
                f"{header.workflow!r}. Choose another id; `pavane runs show {header.run}` shows it."
            )
        if args is not None and args != raw:
            raise RunConflict(
                f"Run {header.run!r} exists already, with other arguments: {args[:200].decode()} "
                f"and not {raw[:200].decode()}. Choose another id, or start it with the same."
            )

    def _checked(self, raw: bytes, what: str) -> bytes:
        limit = self._config.payload_max_bytes
        if len(raw) > limit:
            raise TooLarge(
                f"{what} {len(raw):,} bytes; the limit is {limit:,}. Store large data "
                f"elsewhere and pass a reference. Nothing was written."
            )
        return raw

    def _owner(self, service: str, run: str) -> Session | None:
        """Return this process's session if it owns the run's partition."""
        session = self._session()
        if session is None or not session.owns(self.store.target_of(service, run)):
            return None
        return session

    def _tenure(self, target: int) -> object:
        """Return this process's tenure of a partition; see `Session.tenure`."""
        session = self._session()
        return session.tenure(target) if session is not None else None

    def _session(self) -> Session | None:
        session = self.node.session if self.node is not None else None
        return session if session is not None and session.open else None

    def _message(self, kind: str, id: str, to: str, run: str, body: bytes) -> Message:
        target = self.store.target_of(to, run) if to else 0
        return Message(kind, id, to, run, body, self.store.now_us(), target)

    def _submit(self, commit: Commit) -> None:
        session = self._session()
        if session is not None:
            session.submit(commit)
        else:
            submit_alone(self.store, commit)

    def _check_outside(self, what: str, instead: str) -> None:
        """Refuse in a handler of this app what would not be part of its commit."""
        check_outside_workflow(what, instead)
        handling = current_handler.get()
        if handling is not None and handling.registry is self.registry:
            raise NotInHandler(
                f"{what} inside a handler would take effect at once, and again with each attempt. "
                f"Use {instead}, which is written with the mark that the event is handled."
            )

    async def _write(self, commit: Commit) -> None:
        check_outside_workflow("What an app does to runs and events", "a step")
        await durable(commit, self._submit)

    # -- steering ------------------------------------------------------------------------------

    async def home_row(self, id: str) -> RunRow:
        """Return the row of a run at its home, or raise UnknownRun."""
        check_outside_workflow("Looking at runs", "a step")
        for row in await self.store.run_rows(id):
            if row.service == row.home:
                await self.store.register([row.home])
                return row
        message = await self.store.message(id)
        if message is not None and message.kind == "start":
            header = unpack(Start, message.body).header
            await self.store.register([header.home])
            row = blank_row(0, header.home, message.target, header)
            row.header = encode_plain(header)
            return row
        raise UnknownRun(
            f"No run is called {id!r} in {(await self.store.describe())['place']}. "
            f"`pavane runs list` shows what is there."
        )

    async def send(self, run: str, event: Any, id: str | None) -> None:
        self._check_outside("Sending by an app", "the workflow's own `send(…)`")
        if not is_event(event):
            raise BadArguments(f"{event!r} is no event. Derive its class from pavane.Event.")
        row = await self._newest_row(run)
        if id is not None and await self._was_sent(row, id):
            return
        _check_open(row)
        name = class_of(event).event_type
        with suppress(UnknownName):
            self.registry.workflow(row.workflow, row.version).check_receives(event)
        body = self._checked(encode_fitting(event), f"Event {name} is")
        message_id = f"{row.id}#s-{id or self._process.new_id()}"
        signal = pack(Signal(name, Raw(body)))
        message = self._message("signal", message_id, row.home, row.id, signal)
        await self._write(Commit(messages=[message]))

    async def _was_sent(self, row: RunRow, id: str) -> bool:
        """Tell whether this run, or one that it continues, was sent `id`.

        Of a run that goes on, and continues no other, its mailbox will tell.
        """
        base, number = chain_of(row.id)
        if number == 1 and row.status not in ENDED:
            return False
        numbers = range(max(1, number - CHAIN_MAX), number + 1)
        ids = [f"{chained(base, n)}#s-{id}" for n in numbers]
        return bool(await self.store.seen(row.home, ids))

    async def _newest_row(self, run: str) -> RunRow:
        row = await self.home_row(run)
        while (successor := successor_of(row)) is not None:
            row = await self.home_row(successor)
        return row

    async def _open_row(self, run: str) -> RunRow:
        row = await self._newest_row(run)
        _check_open(row)
        return row

    async def request(self, run: str, kind: str) -> None:
        row = await self._open_row(run)
        if kind == "cancel" and row.status == "stuck":
            raise BadArguments(
                f"Run {row.id!r} is stuck and cannot clean up: {row.reason}\nRepair the cause and "
                f"`pavane runs retry {row.id}`, or `pavane runs kill {row.id}`."
            )
        await self._ask(row, kind)

    async def _ask(self, row: RunRow, kind: str) -> None:
        id = f"{row.id}#{kind}-{self._process.new_id()}"
        message = self._message(kind, id, row.home, row.id, pack(Request("client")))
        await self._write(Commit(messages=[message]))

    async def retry(self, run: str) -> None:
        row = await self.home_row(run)
        # Where a travelling run is stuck is known at once, at its home a little later.
        is_stuck = any(at.status == "stuck" for at in await self.store.run_rows(run))
        if not is_stuck and row.status != "failed":
            raise BadArguments(
                f"Run {row.id!r} is {row.status}: only stuck and failed runs can be retried. To do "
                f"a part again in a new run: `pavane runs fork`."
            )
        if row.status == "failed" and row.undone:
            raise BadArguments(
                f"Run {row.id!r} was compensated ({row.undone} steps undone), so going on from its "
                f"failure would build on what is gone. {(await self._forks(row))[1].advice(row.id)}"
            )
        await self._ask(row, "retry")

    async def fork(self, run: str, at: str | int, id: str | None) -> str:
        row = await self.home_row(run)
        delivered, forks = await self._forks(row)
        cut = forks.entry_of(at)
        if cut is None:
            raise BadArguments(
                f"Run {run!r} has no finished step {at!r}. It has: "
                f"{', '.join(forks.steps()) or 'none'}."
            )
        if not forks.is_possible(cut):
            raise BadArguments(
                f"Run {run!r} cannot be forked at {at}: what the fork would build on was undone "
                f"later, or cancelled by the run's timeout. {forks.advice(run)}"
            )
        header, now = decode_header(row.header), self.store.now_us()
        header.seed = header.seed or header.run
        header.run = self._process.new_id() if id is None else checked_run_id(id)
        header.parent, header.era, header.forced, header.cause = None, 0, "", run
        header.started_us, header.resumed_us = now, 0
        entries = [*delivered[:cut], Entry("fork", now)]
        number = await self.store.take_run_numbers(1)
        target = self.store.target_of(row.home, header.run)
        forked = blank_row(number, row.home, target, header)
        forked.header, forked.entries = encode_plain(header), len(entries)
        forked.attributes = row.attributes
        forked.trail = encode_plain([Stop(row.home, now, 0)])
        chunk = b"[" + b",".join(encode_entry(entry) for entry in entries) + b"]"
        start = pack(Start(header, entries[0].value))
        commit = Commit(
            runs=[forked],
            inbox=[start_claim(header)],
            journal=[JournalRow(number, 0, chunk)],
            messages=[self._message("start", header.run, row.home, header.run, start)],
            reaction=Reaction(members=[(header.conversation, header.run)]),
        )
        try:
            await self._write(commit)
        except Conflict:
            raise RunConflict(f"Run {header.run!r} exists already; choose another id.") from None
        return header.run

    async def fork_steps(self, run: str) -> list[str]:
        """Return the steps at which a run can be forked."""
        return (await self._forks(await self.home_row(run)))[1].steps()

    async def _forks(self, row: RunRow) -> tuple[list[Entry], Forks]:
        """Return what was delivered to a run, and where it may be forked."""
        delivered = effective((await self.history(row.id)).entries)
        return delivered, Forks(
            self.registry, decode_header(row.header), delivered, self._config.payload_max_bytes
        )

    async def publish(
        self, event: Any, *, source: str = "client", id: str | None = None,
        conversation: str | None = None, traceparent: str = "",
    ) -> str:  # fmt: skip
        """Publish an event durably; see `App.publish`."""
        self._check_outside("Publishing by an app", "`service.publish(event)`")
        if not is_event(event):
            raise BadArguments(
                f"{event!r} is no event. Derive its class from pavane.Event, or use @event."
            )
        chosen = self._process.new_id() if id is None else checked_id(id, "event id")
        row = event_row(
            self.store, event, id=chosen, source=checked_source(source),
            at_us=self.store.now_us(), conversation=conversation or chosen, cause="",
            trace=traceparent,
        )  # fmt: skip
        checked_size(row, self._config.payload_max_bytes)
        await self._write(Commit(events=[row]))
        return chosen

    # -- looking -------------------------------------------------------------------------------

    def get(self, id: str) -> Run[Any]:
        """Return a handle on the run of this id, whether it exists or not.

        Raises BadArguments for what no run can be called, such as text with a NUL character.
        """
        if not id.isprintable():
            raise BadArguments(f"No run can be called {id!r}: ids are printable.")
        return Run(self, id)

    async def runs(self, which: RunFilter | None = None) -> list[RunStatus]:
        """List runs, newest first."""
        return [status_of(row) for row in await self.store.list_runs(which or RunFilter())]

    async def history(self, id: str) -> RunHistory:
        home = await self.home_row(id)
        rows = [row for row in await self.store.run_rows(id) if row.no]
        newest = max(
            rows,
            key=lambda row: (row.hop, row.holder == row.service, row.service == row.home),
            default=home,
        )
        entries: list[Entry] = []
        trail = decode_trail(newest.trail)
        problem = ""
        row = home
        try:
            if newest.no:
                for chunk in (await self.store.journals([newest.no]))[newest.no]:
                    entries += decode_chunk(chunk.body)
            if home.status not in ENDED:
                # Services that passed the baton on at once keep no row; the log has their batons.
                marks = await self.store.inbox_of(id)
                hops = [int(hop) for m in marks if (hop := m.id.rpartition("#h")[2]).isdigit()]
                at = max([*hops, newest.hop])
                last = None
                for hop in (at + 1, at):
                    last = last or await self.store.message(f"{id}#h{hop}")
                if last is not None:
                    baton = decode_baton(last.body)
                    if baton.hop > newest.hop or baton.count > len(entries):
                        entries = decode_chunk(bytes(baton.entries))
                        trail = baton.trail
                        home.hop, home.holder = baton.hop, last.to
        except CorruptJournal as error:
            problem = str(error)
        if newest.status in ("running", "waiting", "stuck") and newest is not home:
            row = newest
        status = status_of(home, row)
        mail = await self.store.mail_of(home.service, id)
        parked: list[ParkedRow] = []
        visited = [stop.service for stop in trail]
        for service in dict.fromkeys([*visited, home.home, *self.registry.services]):
            parked += await self.store.parked_of(service, id)
        return RunHistory(status, entries, trail, mail, parked, problem)

    def outcome(self, row: RunRow) -> Any:
        """Return the result of an ended run, or raise RunFailed."""
        raw = row.result or b"null"
        if row.status == "completed":
            try:
                return self.registry.workflow(row.workflow, row.version).params.result(raw)
            except UnknownName:
                return _plain(raw)
        failure = RunFailed(
            f"Run {row.id!r} {'failed' if row.status == 'failed' else 'was ' + row.status}"
            + (f": {row.reason}" if row.reason else "."),
            status=row.status,
        )
        if row.status == "failed":
            raise failure from decode_error(raw)
        raise failure

    async def wait_end(self, id: str, home: str = "") -> RunRow:
        """Return the row of the run once it has ended, following its successors."""
        while True:
            row = await self._wait_one(id, home)
            successor = successor_of(row)
            if successor is None:
                return row
            id = successor

    async def _wait_one(self, id: str, home: str) -> RunRow:
        future: asyncio.Future[RunRow] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(id, [])
        waiting.append(future)
        try:
            session = self._owner(home, id) if home else None
            target = self.store.target_of(home, id) if home else 0
            tenure = self._tenure(target) if home else None
            if session is None or (home, id) not in session.holder.held:
                row = await self.home_row(id)
                home, target = row.home, row.target
                if row.status in ENDED:
                    return row
            self._homes[id] = (home, target, tenure)
            if self._poller is None or self._poller.done():
                self._poller = asyncio.get_running_loop().create_task(self._poll())
            return await future
        finally:
            waiting.remove(future)
            if not waiting:
                del self._waiting[id]
                self._homes.pop(id, None)
                self._stuck.discard(id)

    def _ended(self, row: RunRow) -> None:
        for future in self._waiting.get(row.id, ()):
            if not future.done():
                future.set_result(row)

    async def _poll(self) -> None:
        """Look for the ends of runs that may end, or have ended, in another process."""
        try:
            await self._look_for_ends()
        except PavaneError as error:  # or who waits would do so for ever
            for future in [future for waiting in self._waiting.values() for future in waiting]:
                if not future.done():
                    future.set_exception(error)

    async def _look_for_ends(self) -> None:
        pause_s = POLL_S
        while self._waiting:
            await asyncio.sleep(pause_s)
            targets = {target for _, target, _ in self._homes.values()}
            tenures = {target: self._tenure(target) for target in targets}
            looked = {
                id: (home, target, tenure)
                for id, (home, target, looked_in) in self._homes.items()
                # Had it ended before this tenure, it would have been seen; now it is told.
                if (tenure := tenures[target]) is None or tenure is not looked_in
            }
            for row in await self.store.halted_runs(list(looked)) if looked else ():
                if row.service != looked[row.id][0]:
                    continue
                if row.status in ENDED:
                    self._ended(row)
                elif row.id not in self._stuck:
                    self._stuck.add(row.id)
                    log.warning(
                        "run %s, whose result is waited for, is stuck: %s", row.id, row.reason
                    )
            self._homes.update((id, at) for id, at in looked.items() if id in self._homes)
            pause_s = POLL_S + min(0.2, len(looked) * 50e-6)


class App:
    """A named set of services.

    ```python
    app = App("shop", services=[orders, payments])

    async with app:                       # works for all services, on shop.db
        run = await app.start(fulfil, order, id="o-1")
        print(await run.result())
    ```

    `store` is a file path or address, `sqlite:///shop.db` (in this directory) or
    `postgresql://…`; without it $PAVANE_STORE or `NAME.db` in this directory.
    """

    def __init__(
        self,
        name: str,
        services: Sequence[Service],
        *,
        store: str | Store | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        self.name = checked_name(name, "app")
        for service in services:
            if not isinstance(service, Service):  # pyright: ignore
                raise BadDeclaration(f"services=[…] lists {service!r}, which is no Service.")
        self._registry = Registry(services)
        self.config = config or EngineConfig()
        if isinstance(store, str):
            check_address(store)
        self._store = make_store(MEMORY) if store == MEMORY else store
        self._client: Client | None = None

    @property
    def registry(self) -> Registry:
        """What its services declare by now."""
        self._registry.collect()
        return self._registry

    def conversation(
        self,
        start: Any,
        ends: Sequence[type[Any]],
        within: Duration,
        *,
        milestones: Mapping[Any, Duration | None] | Sequence[type[Any]] | None = None,
        name: str | None = None,
    ) -> Contract:
        """Declare what is to follow from `start`, an event class or a workflow, and by when.

        ```python
        app.conversation(
            start=OrderPlaced, ends=[OrderShipped, OrderCancelled], within="2h",
            milestones={PaymentTaken: "10m", Packed: None},
        )
        ```

        Everything caused by one such event, across services, handlers and runs, is to contain one
        of the events `ends` within that time. Workers of this app watch it, one at a time, and
        nothing waits for them: `pavane conversations` shows what is on time, late, overdue, stuck
        or ended twice. When one is overdue, `ConversationOverdue` is published, once, in that
        conversation. `milestones` are to be seen on the way, perhaps within times of their own.
        """
        self._check_closed("watch this conversation")
        contract = make_contract(start, ends, within, milestones, name)
        self.registry.add_contract(contract)
        return contract

    def schedule(
        self,
        cron: str,
        workflow: Workflow[..., Any],
        *args: Any,
        name: str | None = None,
        zone: str = "UTC",
        missed: Missed = "last",
        **kwargs: Any,
    ) -> Schedule:
        """Declare that a run of `workflow` starts at the times of a cron expression.

        ```python
        app.schedule("0 9 * * mon-fri", report, "sales", zone="Europe/Berlin", name="sales-report")
        ```

        Each nominal time starts one run, once, whatever dies; its id is "NAME@TIME", and
        `scheduled_time()` gives it the time. `cron` has five fields, or six with seconds first, and
        counts in `zone`: a time that a change of the clocks leaves out is moved behind the gap, one
        that it repeats counts once. For times that passed while no worker was there, longer ago
        than a minute, `missed` starts one run ("last"), one for each ("all") or none ("skip").

        It begins with the first worker for the workflow's service and goes on until it is deleted:
        `pavane schedules` shows, pauses, triggers, backfills and deletes. A changed declaration
        takes effect when a worker starts.
        """
        self._check_closed("begin this schedule")
        from pavane.schedule import Schedule

        chosen = checked_name(name or workflow.name, "schedule")
        raw = workflow.params.check(args, kwargs)
        schedule = Schedule(chosen, cron, workflow, raw, zone, missed)
        self.registry.add_schedule(schedule)
        return schedule

    def _check_closed(self, what: str) -> None:
        if self._client is not None:
            raise BadDeclaration(
                f"App {self.name!r} is open already, so nobody would {what}. Declare it before "
                f"`async with app:`, beside the app."
            )

    @property
    def address(self) -> str:
        """Where the app keeps its state."""
        given = self._store if isinstance(self._store, str) else None
        return store_address(given, self.name)

    def _make_client(self, services: Sequence[str], store: str | Store | None) -> Client:
        given = self._store if store is None else store
        chosen = self.address if given is None else given
        chosen = make_store(chosen) if isinstance(chosen, str) else chosen.connect()
        return Client(self.registry, chosen, services, self.config, self.monitors())

    def monitors(self) -> list[Duty]:
        """Return who watches the conversations that were declared here."""
        if not self.registry.contracts:
            return []
        from pavane.observe.monitor import Monitor

        return [Monitor(contract) for contract in self.registry.contracts.values()]

    @asynccontextmanager
    async def connect(self, *, store: str | Store | None = None) -> AsyncGenerator[Client, None]:
        """Open a client that starts and steers runs but works for no service."""
        async with self.worker([], store=store) as client:
            yield client

    @asynccontextmanager
    async def worker(
        self, services: Sequence[str] | None = None, *, store: str | Store | None = None
    ) -> AsyncGenerator[Client, None]:
        """Work for `services` (all by default) until the block ends, then drain."""
        chosen = sorted(self.registry.services) if services is None else services
        client = self._make_client(chosen, store)
        await client.open()
        try:
            yield client
        finally:
            await client.close()

    async def __aenter__(self) -> Self:
        if self._client is not None:
            raise StoreError(f"App {self.name!r} is open already.")
        client = self._make_client(sorted(self.registry.services), None)
        await client.open()
        self._client = client
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    @property
    def client(self) -> Client:
        check_outside_workflow(f"App {self.name!r}", "a step")
        if self._client is None:
            raise StoreError(
                f"App {self.name!r} is not open. Write `async with app:` around it, or use "
                f"`async with app.connect() as client:` to steer runs without working for them."
            )
        return self._client

    async def start(
        self,
        workflow: Workflow[..., R],
        *args: Any,
        id: str | None = None,
        mode: Mode | None = None,
        timeout: Duration | None = None,
        priority: int = 0,
        **kwargs: Any,
    ) -> Run[R]:
        """Start a run of `workflow`; durable when this returns.

        `id` names it: starting an id again gives the same run, whatever `mode`, `timeout` and
        `priority` are then; with another workflow or other arguments it raises RunConflict.
        `mode` is "orchestration" or "choreography", the workflow's own by default; `timeout` bounds
        the whole run. `priority` counts where the run, its children or their steps wait for a
        `Limit`: each step of it like having waited for a minute longer. Arguments are checked
        against the signature (BadArguments).
        """
        return await self.client.start(
            workflow, *args, id=id, mode=mode, timeout=timeout, priority=priority, **kwargs
        )

    def get(self, id: str) -> Run[Any]:
        """Return a handle on the run of this id, whether it exists or not."""
        return self.client.get(id)

    async def runs(self, which: RunFilter | None = None) -> list[RunStatus]:
        """List runs, newest first."""
        return await self.client.runs(which)

    async def publish(self, event: Any, *, id: str | None = None, traceparent: str = "") -> str:
        """Publish `event`, durably; return its id.

        An `id` that was published before changes nothing, so a repeated call takes effect once.
        `traceparent` is the W3C trace context that it belongs to; without one it begins its own.

        Raises BadArguments for what is no event, and for one whose values are not of the types that
        its class declares; NotEncodable and TooLarge for one that cannot be written.
        """
        return await self.client.publish(event, source=self.name, id=id, traceparent=traceparent)

    def run(self, main: Callable[[], Awaitable[R]]) -> R:
        """Open the app, await `main()`, close it: for scripts."""

        async def body() -> R:
            async with self:
                return await main()

        return asyncio.run(body())


def check_outside_workflow(what: str, instead: str) -> None:
    """Raise NotInWorkflow in workflow code."""
    if current() is not None:
        raise NotInWorkflow(
            f"{what} is not possible in workflow code: it would take effect outside of the "
            f"journal, and again on every replay. Use {instead}."
        )


def _check_open(row: RunRow) -> None:
    if row.status in ENDED:
        raise RunEnded(f"Run {row.id!r} has ended ({row.status}); nothing was sent.")


def checked_run_id(id: str) -> str:
    return checked_id(id, "run id")


def checked_id(id: str, what: str) -> str:
    if not id or len(id) > RUN_ID_MAX or any(c in id for c in "#/~ ") or not id.isprintable():
        raise BadArguments(
            f"{id!r} is no {what}: 1 to {RUN_ID_MAX} printable characters without spaces and "
            f"without '#', '/' and '~', which Pavane uses."
        )
    return id


def checked_source(source: str) -> str:
    if not source.isprintable() or " " in source:
        raise BadArguments(f"source={source!r} must be printable and without spaces.")
    return source


def _checked_priority(priority: int) -> int:
    if type(priority) is not int or abs(priority) > PRIORITY_MAX:
        raise BadArguments(
            f"priority={priority!r} must be a whole number, from -{PRIORITY_MAX:,} to "
            f"{PRIORITY_MAX:,}."
        )
    return priority


def status_of(home: RunRow, at: RunRow | None = None) -> RunStatus:
    """Return the status of a run from its home's row and the row where it is now."""
    at = at or home
    status = "running" if at.status == "passed" else at.status
    attributes = msgspec.json.decode(at.attributes)
    header = decode_header(home.header)
    return RunStatus(
        home.id, home.workflow, home.version, home.mode, status, at.reason, home.home, home.holder
        if home.status == "passed" else at.holder, max(home.hop, at.hop), home.started_us,
        home.ended_us, home.undone or at.undone, attributes, header.conversation, header.cause,
        successor_of(home) or "",
    )  # fmt: skip


def successor_of(row: RunRow) -> str | None:
    """Return the run that continues an ended one, if there is one."""
    if row.status != "continued" or row.result is None:
        return None
    return msgspec.json.decode(row.result, type=str)
