"""Drives a workflow function against a journal: one entry in, new operations out.

The same code runs live and on replay. Delivery order is the journal's order; after each entry the
loop runs until idle, so what the workflow does depends on nothing but its code and its journal.
"""

from __future__ import annotations

import asyncio
import difflib
import random
import sys
import uuid
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from contextvars import Context, ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from msgspec import Raw

from pavane.core.baton import Header, Outcome
from pavane.core.codec import Params, decode_error, encode, encode_error
from pavane.core.journal import PATCH, Entry, effective, issue_eras
from pavane.core.loop import DurableTimer, Runaway, WorkflowFuture, WorkflowLoop
from pavane.core.operations import BEGIN, EXPIRY, Kind, Mode, Operation
from pavane.errors import (
    ContinueAsNew,
    Discarded,
    Mismatch,
    NotDecodable,
    NotEncodable,
    NotUndone,
    OnlyInWorkflow,
    PavaneError,
    RunTimeout,
    TooLarge,
)

PAYLOAD_MAX_BYTES = 1024 * 1024
REFUSALS_MAX = 5

_current: ContextVar[Execution | None] = ContextVar("pavane_execution", default=None)
section_mode: ContextVar[Mode | None] = ContextVar("pavane_section_mode", default=None)


class WorkflowDefinition(Protocol):
    """What the core needs to know of a workflow."""

    @property
    def fn(self) -> Callable[..., Any]: ...
    @property
    def params(self) -> Params: ...


@dataclass(slots=True)
class Undoing:
    """A compensation of a saga that did not complete.

    It was registered while entry `since` was delivered, for operation `of` if that is known (else
    -1), and was carried out when entry `until` was.
    """

    since: int
    of: int
    until: int = sys.maxsize


class OperationFuture(WorkflowFuture):
    """The future of an operation; cancelling it gives the operation up."""

    __slots__ = ("execution", "of")
    execution: Execution
    of: int

    def cancel(self, msg: Any | None = None) -> bool:
        if not super().cancel(msg):
            return False
        self.execution.give_up(self.of)
        return True


def current() -> Execution | None:
    """Return the execution whose workflow code is running, if any."""
    return _current.get()


def required(call: str) -> Execution:
    """Return the running execution, or raise OnlyInWorkflow naming `call`."""
    execution = _current.get()
    if execution is None:
        raise OnlyInWorkflow(
            f"{call} works only inside a running workflow. Start one with app.start(…) and call it "
            f"from the workflow function."
        )
    return execution


def rebuilt(
    header: Header, definition: WorkflowDefinition, entries: Sequence[Entry], payload_max_bytes: int
) -> tuple[Execution, list[Entry]]:
    """Return an execution that is yet to replay a journal, and those entries of it that count."""
    delivered = effective(entries)
    execution = Execution(header, definition, delivered, payload_max_bytes)
    execution.eras = issue_eras(entries) if header.era else ()
    return execution, delivered


class Execution:
    """A workflow function being driven. Feed entries in order, look at `pending` and `outcome`."""

    def __init__(
        self,
        header: Header,
        definition: WorkflowDefinition,
        journal: Sequence[Entry] = (),
        payload_max_bytes: int = PAYLOAD_MAX_BYTES,
    ) -> None:
        """Prepare for the entries of `journal`, which the caller then feeds by `replay`."""
        self.header = header
        self.definition = definition
        self.payload_max_bytes = payload_max_bytes
        self.loop = WorkflowLoop(header.run, self._on_timer, self._on_timer_cancelled)
        self.pending: dict[int, Operation] = {}
        self.new: list[Operation] = []
        self.given_up: list[Operation] = []
        self.outcome: Outcome | None = None
        self.fed = 0
        self.eras: Sequence[int] = ()
        """In which era each operation was asked for; this one's, for those that are missing."""
        self.undoing: list[Undoing] = []
        self._issued: list[str] = []
        self._next_op = 0
        self._main: asyncio.Task[Any] | None = None
        self._random: random.Random | None = None
        self._patches: dict[str, bool] = {}
        self._recorded_patches = {
            mark[len(PATCH) :]
            for entry in journal
            for mark in entry.issued
            if mark.startswith(PATCH)
        }
        self._replaying = False
        self._discarded = False
        self._refusals = 0
        self._sagas: dict[asyncio.Task[Any], int] = {}
        self._expired = False
        self._driving = False
        self._not_undone: NotUndone | None = None

    # -- driven by the engine ------------------------------------------------------------------

    def feed(self, entry: Entry) -> None:
        """Deliver one entry and run until idle; `entry.issued` is then what the workflow asked for.

        Raises Mismatch when the entry does not fit what the workflow waits for, NotUndone when a
        compensation that follows from it cannot be carried out: then it is not to be recorded. What
        is new since is in `new` and `given_up` until the next call.
        """
        self.new, self.given_up, self._issued = [], [], []
        if entry.at_us > self.loop.now_us:
            self.loop.now_us = entry.at_us
        self._driving = True
        try:
            self._deliver(entry)
            self.loop.run_ready()
        except (Runaway, SystemExit) as error:  # a run may end itself, never its node
            self.outcome = Outcome("failed", Raw(encode_error(error)))
        finally:
            self._driving = False
        if self._not_undone is not None:
            raise self._not_undone
        self.fed += 1
        if self._main is not None and self._main.done() and self.outcome is None:
            self.outcome = self._conclude(self._main)
        if not self._replaying:
            entry.issued = self._issued

    def replay(self, entries: Sequence[Entry], unasked: Collection[int] = ()) -> None:
        """Feed recorded entries, comparing what the workflow asks for with what it asked then.

        `new` is then what of `unasked`, by ordinal, is not pending.
        """
        new: list[Operation] = []
        self._replaying = True
        try:
            for entry in entries:
                self.feed(entry)
                if self._issued != entry.issued:
                    raise Mismatch(self._diff(entry))
                if unasked:
                    new += [op for op in self.new if op.ordinal in unasked and op.future is None]
        except BaseException:
            self.discard()  # left to the garbage collector, its clean-up would run for real
            raise
        finally:
            self._replaying = False
        self.new = new

    def asked_in(self, ordinal: int) -> int:
        """Return the era in which an operation was first asked for; later rewinds kept it."""
        return self.eras[ordinal] if ordinal < len(self.eras) else self.header.era

    def discard(self) -> None:
        """Put the execution away: its code can do nothing durable any more."""
        self._discarded = True
        self.loop.discard()
        # Break the cycles, so that nothing waits for the garbage collector.
        for operation in self.pending.values():
            operation.future = operation.handle = None
        self.pending.clear()
        self._sagas.clear()
        self._main = None
        self.loop.close_up()

    def _deliver(self, entry: Entry) -> None:
        what = entry.what
        if what == "done" or what == "received":
            operation = self._take(entry)
            future = operation.future
            assert future is not None
            try:
                value = operation.decode(entry.value) if operation.decode else None
            except NotDecodable as error:
                if operation.kind == "step":
                    who = f"Step {operation.service}.{operation.name}"
                    error = NotDecodable(f"{who}: {error}")
                future.set_exception(error)
            else:
                future.set_result(value)
        elif what == "failed":
            operation = self._take(entry)
            assert operation.future is not None
            error = decode_error(bytes(entry.value))
            if isinstance(error, StopIteration):  # which no future takes
                error = RuntimeError(f"A step raised StopIteration({error.value!r}).")
            operation.future.set_exception(error)
        elif what == "fired":
            operation = self._take(entry)
            assert operation.handle is not None
            self.loop.fire(operation.handle)
        elif what == "start":
            context = Context()
            context.run(_current.set, self)
            body = self._body(*self._arguments(bytes(entry.value)))
            self._main = self.loop.create_task(body, context=context)
        elif what == "cancel":
            if self._main is not None:
                self._main.cancel()
        elif what == "fork":
            self._random = random.Random(self.header.run)  # what was drawn before stays as it was

    def _take(self, entry: Entry) -> Operation:
        operation = self.pending.pop(entry.op, None)
        if operation is None:
            raise Mismatch(
                f"Entry {self.fed} of the journal is '{entry.what}' for operation {entry.op}, "
                f"which the workflow does not wait for. It waits for: "
                f"{', '.join(map(repr, self.pending.values())) or 'nothing'}. "
                f"Was its code changed while the run was under way?"
            )
        return operation

    def _diff(self, entry: Entry) -> str:
        lines = difflib.unified_diff(
            entry.issued, self._issued, "recorded in the journal", "asked for by the code now",
            lineterm="", n=5,
        )  # fmt: skip
        after = f"'{entry.what}'" + (f" of operation {entry.op}" if entry.op >= 0 else "")
        return (
            f"The code of workflow {self.header.workflow} (version {self.header.version}) no "
            f"longer fits this run: after entry {self.fed - 1} ({after}) it asked for something "
            "else.\n"
            + "\n".join(lines)
            + "\nDeploy the old code again, or guard the change with `if patched(…):`, and the run "
            "goes on."
        )

    def _arguments(self, raw: bytes) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what the workflow is called with; they were checked by the code that gave them."""
        try:
            return self.definition.params.decode(raw)
        except NotDecodable as error:
            raise Mismatch(str(error)) from error

    async def _body(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.header.timeout_us:
            begun_us = self.header.resumed_us or self.header.started_us
            self.loop.call_at((begun_us + self.header.timeout_us) / 1e6, self._expire)
        if self.header.limit:
            await self.issue(
                "receive", f"limit {self.header.limit}", self.header.home, detail=BEGIN
            )
        try:
            return await self.definition.fn(*args, **kwargs)
        finally:
            while self._sagas:
                await self._end_sagas()

    async def _end_sagas(self) -> None:
        """Cancel what was left running inside a saga, and wait: nothing is left half undone."""
        left = list(self._sagas)
        for task in left:
            task.cancel()
        while not all(task.done() for task in left):
            with suppress(asyncio.CancelledError):
                await asyncio.wait(left)
        for task in left:
            self._sagas.pop(task, None)

    def saga_opened(self, task: asyncio.Task[Any] | None) -> None:
        if task is not None and task is not self._main:
            self._sagas[task] = self._sagas.get(task, 0) + 1

    def saga_closed(self, task: asyncio.Task[Any] | None) -> None:
        if task in self._sagas:
            self._sagas[task] -= 1
            if not self._sagas[task]:
                del self._sagas[task]

    async def not_undone(self, error: BaseException, left: Sequence[str]) -> None:
        """Go on no more, since the first of the compensations that are `left` failed to be made."""
        if self._replaying:  # recorded before that was so
            raise error
        self._not_undone = NotUndone(
            f"The compensation {left[0]} cannot be carried out: {error!r}. Still to be undone: "
            f"{', '.join(left)}. Repair the cause, then `pavane runs retry {self.header.run}`."
        )
        await self._future(-1)  # for ever

    def _expire(self) -> None:
        self._expired = True
        if self._main is not None:
            self._main.cancel()

    def _conclude(self, main: asyncio.Task[Any]) -> Outcome:
        if main.cancelled():
            if not self._expired:
                return Outcome("cancelled")
            limit_s = self.header.timeout_us / 1e6
            error = RunTimeout(f"The run took longer than its timeout of {limit_s:g} s.")
            return Outcome("failed", Raw(encode_error(error)))
        error = main.exception()
        if isinstance(error, ContinueAsNew):
            try:
                params = self.definition.params
                return Outcome("continued", Raw(params.encode(error.new_args, error.new_kwargs)))
            except PavaneError as bad:
                error = bad
        if error is None:
            try:
                return Outcome("completed", Raw(self._result(main.result())))
            except (NotEncodable, TooLarge) as bad:
                error = bad
            except NotDecodable as bad:
                error = NotDecodable(f"Workflow {self.header.workflow}: {bad}")
        return Outcome("failed", Raw(encode_error(error)))

    def _result(self, value: Any) -> bytes:
        """Encode what the workflow returned, and prove that whoever asks for it can read it."""
        params = self.definition.params
        if params.returns in (None, type(None)):
            return b"null"
        raw = self.encoded(value, "The result is")
        params.result(raw)
        return raw

    # -- called by workflow code ---------------------------------------------------------------

    def issue(
        self,
        kind: Kind,
        name: str,
        service: str,
        *,
        args: bytes = b"[]",
        decode: Callable[[bytes], Any] | None = None,
        detail: Any = None,
        undo: bool = False,
    ) -> OperationFuture:
        """Ask for something that is awaited; return its future."""
        if self._refusals > REFUSALS_MAX:  # code that catches everything, in a loop: let it wait
            return self._future(-1)
        operation = self._add(kind, name, service, args, detail, undo)
        operation.decode = decode
        operation.future = future = self._future(operation.ordinal)
        self.pending[operation.ordinal] = operation
        return future

    def _future(self, of: int) -> OperationFuture:
        future = OperationFuture(loop=self.loop)
        future.ordinal = self.loop.next_ordinal()
        future.execution, future.of = self, of
        return future

    @property
    def next_ordinal(self) -> int:
        """The ordinal of what is asked for next."""
        return self._next_op

    def announce(
        self, kind: Kind, name: str, service: str, *, args: bytes = b"[]", detail: Any = None
    ) -> Operation:
        """Ask for something that takes effect with the next commit and has no result."""
        return self._add(kind, name, service, args, detail)

    def _add(
        self,
        kind: Kind,
        name: str,
        service: str,
        args: bytes = b"[]",
        detail: Any = None,
        undo: bool = False,
    ) -> Operation:
        if self._discarded or not self._driving:
            self._refusals += 1
            raise Discarded("This execution was put away.")
        operation = Operation(
            self._next_op, kind, name, service, self.loop.now_us, args, detail,
            section_mode.get(), undo,
        )  # fmt: skip
        self._next_op += 1
        self._issued.append(operation.fingerprint)
        self.new.append(operation)
        return operation

    def give_up(self, ordinal: int) -> None:
        operation = self.pending.pop(ordinal, None)
        if operation is None:
            return
        if operation in self.new:
            self.new.remove(operation)
        self.given_up.append(operation)

    def encoded(self, value: Any, what: str) -> bytes:
        """Encode `value`; raise NotEncodable or TooLarge, which begins with `what`, "X is"."""
        raw = encode(value)
        return self.checked(raw, what)

    def checked(self, raw: bytes, what: str) -> bytes:
        if len(raw) > self.payload_max_bytes:
            raise self.too_large(raw, what)
        return raw

    def too_large(self, raw: bytes, what: str) -> TooLarge:
        return TooLarge(
            f"{what} {len(raw):,} bytes; the limit is {self.payload_max_bytes:,}. Store "
            f"large data elsewhere and pass a reference."
        )

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.loop.now_us / 1e6, UTC)

    @property
    def chance(self) -> random.Random:
        """The run's own source of randomness, the same on every replay."""
        if self._random is None:
            self._random = random.Random(self.header.seed or self.header.run)
        return self._random

    def random(self) -> float:
        return self.chance.random()

    def uuid4(self) -> uuid.UUID:
        return uuid.UUID(int=self.chance.getrandbits(128), version=4)

    def patched(self, mark: str) -> bool:
        """Tell whether this run goes through the new code; recorded at the first call."""
        known = self._patches.get(mark)
        if known is None:
            known = mark in self._recorded_patches or not self._replaying
            self._patches[mark] = known
            if known:
                self._issued.append(PATCH + mark)
        return known

    def _on_timer(self, handle: DurableTimer) -> None:
        if self._refusals > REFUSALS_MAX:
            handle.operation = -1
            return
        name = EXPIRY if handle._callback == self._expire else "timer"  # pyright: ignore
        operation = self._add("timer", name, "")
        operation.handle = handle
        operation.deadline_us = round(handle.when() * 1e6)
        self.pending[operation.ordinal] = operation
        handle.operation = operation.ordinal

    def _on_timer_cancelled(self, handle: DurableTimer) -> None:
        self.give_up(handle.operation)
