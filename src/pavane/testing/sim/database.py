"""The store that simulated processes share, and everything that may go wrong with it.

The data are those of the memory store. Each process has a view, which sends requests: they arrive
after a latency, are done there at one instant, whatever became of the sender, and the reply takes
its time too. Writes of one connection arrive in order. What a connection that is cut had under way
may arrive later or never, and its user is told an error in either case.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextvars import Context
from copy import copy
from functools import partial
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from pavane.errors import PavaneError, StoreError
from pavane.stores.memory import MemoryStore
from pavane.stores.port import Commit, Fence, Glance, NodeRow
from pavane.testing.sim.clock import Clock, SimHandle

if TYPE_CHECKING:
    from pavane.testing.sim.process import SimProcess

Results = Sequence[PavaneError | None]
Watcher = Callable[[Sequence[Commit], Fence | None, Results], None]


class LeaseWatcher(Protocol):
    """Is told of what happens to leases, before it happens."""

    def renewed(self, by: SimProcess, fence: Fence) -> None: ...
    def expired(self, by: SimProcess, nodes: Sequence[NodeRow]) -> None: ...


LOCAL = {"open", "close", "reopen"}
"""What a view does without asking the database."""
WRITES = {
    "register", "take_run_numbers", "register_handlers", "pause_handler", "forget_handler", "join",
    "ask_node", "expire", "claim", "release", "leave", "touch", "prune", "prune_events",
}  # fmt: skip
LATENCY_US = (40, 900)
SLOW_US = (5_000, 80_000)
LATE_US = 2_000_000
"""What a cut connection had under way arrives up to so much later."""


class Weather:
    """What is wrong with the database at the moment."""

    def __init__(self) -> None:
        self.stalled_until_us = 0
        self.is_down = False
        self.is_full = False
        self.is_slow = False
        self.ambiguous = 0.0
        """How probably a write is answered with an error, whether it took effect or not."""
        self.unreachable: set[int] = set()
        """Processes whose network to the database is down."""

    def is_calm(self, now_us: int) -> bool:
        """Tell whether nothing is wrong."""
        wrong = self.is_down or self.is_full or self.is_slow or self.ambiguous or self.unreachable
        return not wrong and self.stalled_until_us <= now_us


class Database:
    """The data, and who watches what is written."""

    def __init__(self, clock: Clock, partitions: int) -> None:
        self.clock = clock
        self.weather = Weather()
        self.watchers: list[Watcher] = []
        self.lease_watchers: list[LeaseWatcher] = []
        self.root = MemoryStore(partitions, clock=lambda: clock.now_us)

    def view(self, process: SimProcess) -> SimStore:
        return SimStore(self, process)

    def refusal(self, process: SimProcess, *, write: bool) -> StoreError | None:
        """Return why the database does not do what a process asks for, if it does not."""
        weather = self.weather
        if process.number in weather.unreachable:
            return StoreError("The database cannot be reached (simulated).")
        if weather.is_down:
            return StoreError("The database refuses connections (simulated).")
        if write and weather.is_full:
            return StoreError("The disk of the database is full (simulated).")
        return None

    def latency_us(self) -> int:
        return self.clock.between(*(SLOW_US if self.weather.is_slow else LATENCY_US))


class _Request:
    """What was asked for: how to do it, and how to answer."""

    __slots__ = (
        "answer", "do", "has_arrived", "is_answered", "is_call", "is_lost", "name", "write"
    )  # fmt: skip

    def __init__(
        self, name: str, do: Callable[[], Any], answer: Callable[[Any, PavaneError | None], None],
        write: bool, *, is_call: bool = True,
    ) -> None:  # fmt: skip
        self.name = name
        self.do = do
        self.answer = answer
        self.write = write
        self.is_call = is_call
        """Whether `answer` is code of the process; else it wakes somebody there, and no more."""
        self.has_arrived = False
        self.is_lost = False
        self.is_answered = False


class SimStore(MemoryStore):
    """One process's view of the database."""

    def __init__(self, database: Database, process: SimProcess) -> None:
        super().__init__(database.root.partitions)
        self._data = database.root._data  # pyright: ignore[reportPrivateUsage]
        self.database = database
        self.process = process
        self._clock = database.clock
        self._line: deque[_Request] = deque()
        """Writes under way, in order."""
        self._pending: dict[_Request, None] = {}
        self._arrived_us = 0
        self._answered_us = 0

    def connect(self) -> SimStore:
        return SimStore(self.database, self.process)

    # -- what is asked -------------------------------------------------------------------------

    def submit(
        self, batch: Sequence[Commit], fence: Fence | None, done: Callable[[Results], None]
    ) -> None:
        sent = [_as_it_is_now(commit) for commit in batch]

        def answer(landed: tuple[Results, int, int] | None, error: PavaneError | None) -> None:
            results: Results = [error] * len(batch)
            if landed is not None:
                results, before, after = landed
                if self.tail == before:  # only who is told can know that there is nothing to read
                    self.tail = after
            for given, written in zip(batch, sent, strict=True):
                for row, result in zip(given.messages, written.messages, strict=True):
                    row.pos = result.pos
                for row, result in zip(given.events, written.events, strict=True):
                    row.pos = result.pos
            done(results)

        self._send(_Request("submit", partial(self.land, sent, fence), answer, write=True))

    def land(self, batch: Sequence[Commit], fence: Fence | None) -> tuple[Results, int, int]:
        """Write a batch that has arrived; return with its results how that moves the tail."""
        before = self.tail
        results = self._write(batch, fence)
        after, self.tail = self.tail, before
        self._clock.note(f"{self.process.name} wrote {_summary(batch, results)}")
        for watch in self.database.watchers:
            watch(batch, fence, results)
        return results, before, after

    async def ask(self, name: str, do: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Do something at the database and return what it answers."""
        future: asyncio.Future[Any] = self.process.loop.create_future()
        answer = partial(_settle, future)
        self._send(_Request(name, partial(at_once, do), answer, name in WRITES, is_call=False))
        return await future

    def now_us(self) -> int:
        """What the process takes for the database's time."""
        return self._clock.now_us + self.process.skew_us

    def renew(self, fence: Fence) -> Glance | None:
        """Prolong the lease, at once: the thread that does so has nothing else to do."""
        error = self.database.refusal(self.process, write=True)
        if error is None and self.database.weather.stalled_until_us > self._clock.now_us:
            error = StoreError("The database does not answer (simulated).")
        if error is not None:
            raise error
        for watcher in self.database.lease_watchers:
            watcher.renewed(self.process, fence)
        return super().renew(fence)

    async def expire(self, nodes: Sequence[NodeRow]) -> None:
        await self.ask("expire", partial(self._expire, nodes))

    async def _expire(self, nodes: Sequence[NodeRow]) -> None:
        for watcher in self.database.lease_watchers:
            watcher.expired(self.process, nodes)
        await super().expire(nodes)

    # -- the way there and back ----------------------------------------------------------------

    def _send(self, request: _Request) -> None:
        if not self.process.is_alive:
            return
        self._pending[request] = None
        arrives_us = self._clock.now_us + self.database.latency_us()
        if request.write:
            arrives_us = self._arrived_us = max(arrives_us, self._arrived_us + 1)
            self._line.append(request)
        self._clock.at(arrives_us, partial(self._arrive, request))

    def _arrive(self, request: _Request) -> None:
        if request.is_lost:
            return
        weather = self.database.weather
        if weather.stalled_until_us > self._clock.now_us:
            self._clock.at(weather.stalled_until_us, partial(self._arrive, request))
            return
        if request.write and not request.is_answered:
            if self._line[0] is not request:  # an earlier one was held up
                request.has_arrived = True
                return
            self._line.popleft()
            if self._line and self._line[0].has_arrived:
                self._clock.after(1, partial(self._arrive, self._line[0]))
        self._pending.pop(request, None)
        result: Any = None
        error: PavaneError | None = self.database.refusal(self.process, write=request.write)
        if error is None and request.write and self._clock.chance(weather.ambiguous):
            took_effect = self._clock.chance(0.5)
            word = "after" if took_effect else "before"
            self._clock.note(f"fault: {self.process.name} is cut {word} its {request.name}")
            error = StoreError("The connection to the database was lost (simulated).")
            if took_effect:
                self._do(request)
        elif error is None:
            result, error = self._do(request)
        if not request.is_answered:
            self._answer(request, result, error)

    def _do(self, request: _Request) -> tuple[Any, PavaneError | None]:
        if request.write and request.name != "submit":
            self._clock.note(f"{self.process.name} does {request.name}")
        try:
            return request.do(), None
        except PavaneError as error:
            return None, error

    def _answer(self, request: _Request, result: Any, error: PavaneError | None) -> None:
        request.is_answered = True
        at_us = self._clock.now_us + self.database.latency_us()
        if request.write:
            at_us = self._answered_us = max(at_us, self._answered_us + 1)
        if request.is_call:
            handle = SimHandle(request.answer, (result, error), Context())
            self._clock.add_timer(at_us, self.process.loop, handle)
        else:
            self._clock.at(at_us, partial(request.answer, result, error))

    def cut(self, *, told: bool) -> None:
        """Lose the connection. Writes under way arrive late, up to one; the later ones never.

        `told`: whoever waits gets an error; else there is nobody any more.
        """
        arrive = int(self._clock.random.random() * (len(self._line) + 1))
        late_us = self._clock.between(0, LATE_US) if told else 0
        for index, request in enumerate(self._line):
            request.is_lost = True
            if index < arrive:
                late = _Request(request.name, request.do, request.answer, write=True)
                late.is_answered = True
                self._clock.after(late_us + index + 1, partial(self._arrive, late))
        self._line.clear()
        pending, self._pending = self._pending, {}
        for request in pending:
            request.is_lost = True
            if told:
                error = StoreError("The connection to the database was lost (simulated).")
                self._answer(request, None, error)


def _remote(name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Return the memory store's method, done at the database."""
    method = getattr(MemoryStore, name)

    async def asked(self: SimStore, *args: Any, **options: Any) -> Any:
        return await self.ask(name, partial(method, self, *args, **options))

    asked.__name__ = asked.__qualname__ = name
    return asked


for _name in dir(MemoryStore):
    is_asked = iscoroutinefunction(getattr(MemoryStore, _name)) and _name not in LOCAL
    if is_asked and _name not in vars(SimStore):
        setattr(SimStore, _name, _remote(_name))


def _settle(future: asyncio.Future[Any], result: Any, error: PavaneError | None) -> None:
    """Tell who asked, if anybody waits still."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def at_once(do: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run a coroutine that waits for nothing."""
    coro = do()
    try:
        coro.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError(f"{coro!r} waits for something")


def _as_it_is_now(commit: Commit) -> Commit:
    """Copy a commit with its rows: its owner may change them while it is under way."""
    now = copy(commit)
    now.messages = [msgspec.structs.replace(m, pos=0, live=None) for m in commit.messages]
    for field in ("runs", "journal", "inbox", "mail", "parked", "events"):
        rows = getattr(commit, field)
        if rows:
            setattr(now, field, [copy(row) for row in rows])
    if commit.reaction is not None:
        now.reaction = copy(commit.reaction)
        for field in now.reaction.__struct_fields__:
            rows = getattr(commit.reaction, field)
            if rows:
                copies = [copy(row) if isinstance(row, msgspec.Struct) else row for row in rows]
                setattr(now.reaction, field, copies)
    return now


def _summary(batch: Sequence[Commit], results: Results) -> str:
    """Say in a few words what a batch changed."""
    said: list[str] = []
    for commit, refused in zip(batch, results, strict=True):
        words = [f"{row.id}@{row.service} {row.status} {row.entries}" for row in commit.runs]
        words += [f"{m.kind} {m.id} to {m.to}" for m in commit.messages]
        words += [f"mark {row.id}" for row in commit.inbox]
        words += [f"event {row.id}" for row in commit.events]
        words += [f"parked {row.id} {row.attempt}" for row in commit.parked]
        words += [f"unparked {id}" for _, id in commit.unparked]
        words += [f"position {target} {position}" for target, position in commit.positions]
        if commit.reaction is not None:
            words += [f"handled {row.handler}:{row.pos}" for row in commit.reaction.marks]
            words += [f"parked {row.handler}:{row.pos}" for row in commit.reaction.parked]
        if refused is not None:
            words.append(f"refused: {type(refused).__name__}")
        said.append(", ".join(words) or "nothing")
    return "; ".join(said)
