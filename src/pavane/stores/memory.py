"""The store in plain dicts: for tests, simulation and trying things out; gone with the process.

It keeps the port's promises except durability: a batch is atomic, a bad commit is refused alone, a
lost lease refuses all. A batch takes effect inside `submit`; its `done` is called by the event loop
afterwards, never from `submit`. Everything is copied on its way in and out. Nothing here is left to
chance, and the clock is given, so a simulation repeats exactly.

One object is one user's view, with a `tail` of its own: two nodes in one process need two views of
the same data, which `connect` gives. Clients without a node may share a view. Closing keeps the
data, opening again finds it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from operator import attrgetter
from typing import Any, TypeVar
from zlib import crc32

import msgspec

from pavane.errors import LeaseLost, PavaneError, StoreError
from pavane.stores.memory_events import EventData, EventViews, event_values
from pavane.stores.port import (
    LAST_US,
    Commit,
    Conflict,
    Features,
    Fence,
    Glance,
    InboxRow,
    JournalRow,
    MailRow,
    Message,
    NodeRow,
    ParkedRow,
    PartitionRow,
    RunFilter,
    RunRow,
    Touched,
    broken_chain,
)

SLOTS = 1024
"""Targets are `service number * SLOTS + partition`."""
INTEGER_MAX = 2**63 - 1

T = TypeVar("T", bound=msgspec.Struct)
Results = Sequence[PavaneError | None]


class _Logged(msgspec.Struct):
    """A message in the log, with the node under whose fence it was written."""

    pos: int
    message: Message
    origin: int | None


class _Data:
    """What all views of one store share."""

    def __init__(self, partitions: int, clock: Callable[[], int]) -> None:
        self.partitions_per_service = partitions
        self.clock = clock
        self.lock = threading.RLock()  # leases are renewed from a thread
        self.version = 0
        self.services: dict[str, int] = {}
        self.partitions: dict[int, PartitionRow] = {}
        self.nodes: dict[int, NodeRow] = {}
        self.leases_us: dict[int, int] = {}
        """What nodes joined with."""
        self.nodes_ever = 0
        self.next_run = 1
        self.runs: dict[int, RunRow] = {}
        self.numbers: dict[str, dict[str, int]] = {}
        """Run numbers by run id and service."""
        self.waking: dict[int, RunRow] = {}
        self.journals: dict[int, dict[int, bytes]] = {}
        self.log: list[_Logged] = []
        self.head = 0
        self.inbox: dict[str, dict[str, InboxRow]] = {}
        """By message id and service."""
        self.mail: dict[tuple[str, str], dict[str, MailRow]] = {}
        """By (service, run) and message id."""
        self.parked: dict[tuple[str, str], ParkedRow] = {}
        """By (service, id)."""
        self.events = EventData(partitions, clock)

    # -- the fence -----------------------------------------------------------------------------

    def holds(self, fence: Fence) -> bool:
        """Prolong a lease; tell whether it is still held."""
        node = self.nodes.get(fence.node)
        if node is None or node.nonce != fence.nonce:
            return False
        node.expires_us = self.clock() + fence.lease_us
        return True

    def call(self) -> None:
        """Prolong the leases of nodes that rest for no longer than usual: they are woken."""
        for node in self.nodes.values():
            node.expires_us = min(node.expires_us, self.clock() + self.leases_us[node.no])

    def prove(self, fence: Fence) -> None:
        if not self.holds(fence):
            raise LeaseLost(
                f"Node {fence.node} lost its lease (it was silent for longer than "
                f"{fence.lease_us / 1e6:g} s); it stops its runs and joins again."
            )

    # -- one commit ----------------------------------------------------------------------------

    def check(self, commit: Commit) -> None:
        """Raise what refuses `commit`; after this, writing it cannot fail."""
        for values in _values_of(commit):
            for value in values:
                _check_value(value)
        begun: dict[int, tuple[str, str]] = {}
        for row in commit.runs:
            if row.no in self.runs or row.no in begun:
                continue  # it stays the run that it is
            key = (row.id, row.service)
            if key in begun.values() or row.service in self.numbers.get(row.id, {}):
                raise _conflict("run", row.id, "at", row.service)
            begun[row.no] = key
        _check_new("entry", ((r.seq, r.run) for r in commit.journal), self._has_entry)
        _check_new("message", ((r.id, r.service) for r in commit.inbox), self._has_mark)
        if commit.reaction is not None:
            marks = ((row.pos, row.handler) for row in commit.reaction.marks)
            _check_new("mark", marks, self.events.has_mark)

    def _has_entry(self, seq: int, run: int) -> bool:
        return seq in self.journals.get(run, ())

    def _has_mark(self, id: str, service: str) -> bool:
        return service in self.inbox.get(id, ())

    def write(self, commit: Commit, origin: int | None) -> None:
        for message in commit.messages:
            self.head += 1
            message.pos = self.head
            self.log.append(_Logged(self.head, _message(message), origin))
        for row in commit.runs:
            self.put_run(row)
        for row in commit.journal:
            self.journals.setdefault(row.run, {})[row.seq] = row.body
        for row in commit.inbox:
            self.inbox.setdefault(row.id, {})[row.service] = copy(row)
        for row in commit.mail:
            self.mail.setdefault((row.service, row.run), {}).setdefault(row.id, copy(row))
        for service, run, id in commit.mail_taken:
            if id == "*":
                self.mail.pop((service, run), None)
            else:
                self.mail.get((service, run), {}).pop(id, None)
        for row in commit.parked:
            self.put_parked(row)
        for service, id in commit.unparked:
            self.parked.pop((service, id), None)
        for target, position in commit.positions:
            self.advance(target, position)
        self.events.publish(commit.events)
        if commit.messages or commit.events:
            self.call()
        if commit.reaction is not None:
            self.events.react(commit.reaction)

    def put_run(self, row: RunRow) -> None:
        new = copy(row)
        old = self.runs.get(row.no)
        if old is not None:
            new.service, new.id, new.target, new.home = old.service, old.id, old.target, old.home
            new.workflow, new.version = old.workflow, old.version
            new.started_us = old.started_us
        self.runs[new.no] = new
        self.numbers.setdefault(new.id, {})[new.service] = new.no
        if new.wake_us is None:
            self.waking.pop(new.no, None)
        else:
            self.waking[new.no] = new

    def take_back(self, touched: Touched) -> None:
        """Take back what was counted; see `Store.leave`."""
        kinds: list[tuple[dict[Any, Any], Mapping[Any, int]]] = [
            (self.runs, touched.runs), (self.parked, touched.parked),
            (self.events.parked, touched.events),
        ]  # fmt: skip
        for rows, befores in kinds:
            for key, before in befores.items():
                if key in rows:
                    rows[key].deaths = min(rows[key].deaths, before)
        for service, id in touched.tries:
            self.inbox.get(id, {}).pop(service, None)

    def put_parked(self, row: ParkedRow) -> None:
        new = copy(row)
        old = self.parked.get((row.service, row.id))
        if old is not None:
            new.run, new.target, new.call = old.run, old.target, old.call
            new.began_us = old.began_us
        self.parked[row.service, row.id] = new

    def advance(self, target: int, position: int) -> None:
        partition = self.partitions.get(target)
        if partition is not None and partition.position < position:
            partition.position = position

    # -- what several readers and the pruner ask -------------------------------------------------

    def runs_of(self, id: str) -> list[RunRow]:
        return [self.runs[no] for no in self.numbers.get(id, {}).values()]

    def is_over(self, run: str) -> bool:
        rows = self.runs_of(run)
        return all(r.ended_us is not None for r in rows if r.service == r.home)

    def consumed(self, target: int = 0) -> int:
        """Up to where a partition has consumed; without one (published events), up to where all."""
        partition = self.partitions.get(target)
        if partition is not None:
            return partition.position
        return min((p.position for p in self.partitions.values()), default=0)


class MemoryStore(EventViews):
    """See the module. `clock` returns microseconds since the epoch."""

    features = Features(durable=False, shared=False)

    def __init__(self, partitions: int = 32, *, clock: Callable[[], int] | None = None) -> None:
        self.partitions = partitions
        self.tail = 0
        self._data = _Data(partitions, clock or _system_clock)
        self._users = 0
        self._version = -1

    def connect(self) -> MemoryStore:
        """Return another view of the same data, to be opened by another node."""
        view = MemoryStore(self.partitions)
        view._data = self._data
        return view

    async def open(self) -> None:
        self._users += 1
        if self._users == 1:
            self.tail = self._data.head
            self._version = -1

    async def reopen(self) -> None:
        self._open_data()

    async def close(self) -> None:
        self._users = max(0, self._users - 1)

    def _open_data(self) -> _Data:
        if not self._users:
            raise StoreError("The memory store is closed; open the store before using it.")
        return self._data

    # -- names and clocks ----------------------------------------------------------------------

    def now_us(self) -> int:
        return self._data.clock()

    def target_of(self, service: str, run: str) -> int:
        return self._data.services[service] * SLOTS + crc32(run.encode()) % self.partitions

    async def register(self, services: Sequence[str]) -> None:
        data = self._open_data()
        with data.lock:
            for name in services:
                if name in data.services:
                    continue
                number = data.services[name] = len(data.services) + 1
                for slot in range(self.partitions):
                    target = number * SLOTS + slot
                    data.partitions[target] = PartitionRow(
                        target, name, slot, None, True, data.head
                    )
                data.version += 1

    # -- writing -------------------------------------------------------------------------------

    def submit(
        self, batch: Sequence[Commit], fence: Fence | None, done: Callable[[Results], None]
    ) -> None:
        """Write `batch` now; `done` follows from the event loop."""
        asyncio.get_running_loop().call_soon(done, self._write(batch, fence))

    def _write(self, batch: Sequence[Commit], fence: Fence | None) -> Results:
        try:
            data = self._open_data()
            with data.lock:
                if fence is not None:
                    data.prove(fence)
                before = data.head
                broken: set[int] = set()
                results: list[PavaneError | None] = []
                for commit in batch:
                    refused = commit.chain != 0 and commit.chain in broken
                    bad = broken_chain() if refused else self._write_one(data, commit, fence)
                    if bad is not None:
                        broken.add(commit.chain)
                    results.append(bad)
                data.version += 1
                if fence is not None and self.tail == before:
                    self.tail = data.head  # nobody else wrote: there is nothing to read
                return results
        except (LeaseLost, StoreError) as error:
            return [error] * len(batch)

    def _write_one(self, data: _Data, commit: Commit, fence: Fence | None) -> PavaneError | None:
        try:
            data.check(commit)
        except Conflict as conflict:
            return conflict
        except (TypeError, ValueError, AttributeError) as error:
            return PavaneError(f"A value cannot be stored: {error!r}.")
        data.write(commit, fence.node if fence else None)
        return None

    async def take_run_numbers(self, count: int) -> int:
        data = self._open_data()
        with data.lock:
            first = data.next_run
            data.next_run += count
            data.version += 1
            return first

    # -- reading -------------------------------------------------------------------------------

    async def run_rows(self, id: str) -> list[RunRow]:
        return _copies(self._open_data().runs_of(id))

    async def run_row(self, service: str, id: str) -> RunRow | None:
        data = self._open_data()
        no = data.numbers.get(id, {}).get(service)
        return None if no is None else copy(data.runs[no])

    async def halted_runs(self, ids: Sequence[str]) -> list[RunRow]:
        data = self._open_data()
        at_home = [row for id in ids for row in data.runs_of(id) if row.service == row.home]
        return _copies(row for row in at_home if row.ended_us is not None or row.status == "stuck")

    async def rows_of(self, runs: Sequence[int]) -> list[RunRow]:
        rows = self._open_data().runs
        return _copies([rows[no] for no in runs if no in rows])

    async def list_runs(self, which: RunFilter) -> list[RunRow]:
        runs = self._open_data().runs
        newest_first = (runs[no] for no in sorted(runs, reverse=True))
        found = (row for row in newest_first if _fits(row, which))
        return _copies(row for row, _ in zip(found, range(which.limit), strict=False))

    async def journals(self, runs: Sequence[int]) -> dict[int, list[JournalRow]]:
        journals = self._open_data().journals
        return {
            run: [JournalRow(run, seq, body) for seq, body in sorted(journals.get(run, {}).items())]
            for run in runs
        }

    async def live_runs(self, targets: Sequence[int], after: int, limit: int) -> list[RunRow]:
        wanted = set(targets)
        rows = [
            row
            for row in self._open_data().runs.values()
            if row.no > after and row.status in ("running", "stuck") and row.target in wanted
        ]
        return _copies(sorted(rows, key=attrgetter("no"))[:limit])

    async def due_runs(
        self, targets: Sequence[int], after: tuple[int, int], until_us: int, limit: int
    ) -> list[RunRow]:
        wanted = set(targets)
        due = sorted(
            key
            for row in self._open_data().waking.values()
            if (key := (row.wake_us or 0, row.no)) > after
            and key[0] <= until_us
            and row.target in wanted
        )
        return _copies(self._data.runs[no] for _, no in due[:limit])

    async def due_parked(
        self, targets: Sequence[int], after: tuple[int, str], until_us: int, limit: int
    ) -> list[ParkedRow]:
        wanted = set(targets)
        rows = [
            row
            for row in self._open_data().parked.values()
            if row.target in wanted and row.due_us <= until_us and (row.due_us, row.id) > after
        ]
        return _copies(sorted(rows, key=attrgetter("due_us", "id"))[:limit])

    async def parked_of(self, service: str, run: str) -> list[ParkedRow]:
        rows = self._open_data().parked.values()
        return _copies(row for row in rows if row.run == run and row.service == service)

    async def mail_of(self, service: str, run: str) -> list[MailRow]:
        return _copies(self._open_data().mail.get((service, run), {}).values())

    async def inbox_of(self, run: str) -> list[InboxRow]:
        inbox = self._open_data().inbox
        ids = sorted(id for id in inbox if id.startswith(f"{run}#"))
        return _copies(inbox[id][service] for id in ids for service in sorted(inbox[id]))

    async def seen(self, service: str, ids: Sequence[str]) -> set[str]:
        inbox = self._open_data().inbox
        return {id for id in ids if service in inbox.get(id, ())}

    async def message(self, id: str) -> Message | None:
        newest_first = reversed(self._open_data().log)
        return next((_message(it.message) for it in newest_first if it.message.id == id), None)

    async def read_log(
        self, after: int, until: int | None, targets: Sequence[int] | None, limit: int,
        skip_node: int | None,
    ) -> list[Message]:  # fmt: skip
        log = self._open_data().log
        wanted = None if targets is None else set(targets)
        found: list[Message] = []
        for at in range(bisect_right(log, after, key=attrgetter("pos")), len(log)):
            logged = log[at]
            if len(found) == limit or (until is not None and logged.pos > until):
                break
            if skip_node is not None and logged.origin == skip_node:
                continue
            if wanted is None or logged.message.target in wanted:
                found.append(_message(logged.message))
        return found

    async def log_head(self) -> int:
        return self._open_data().head

    def changed(self) -> bool:
        version = self._open_data().version
        before, self._version = self._version, version
        return version != before

    @property
    def hears(self) -> bool:
        return True

    # -- membership ----------------------------------------------------------------------------

    async def join(
        self, name: str, host: str, pid: int, services: Sequence[str], lease_us: int
    ) -> NodeRow:
        data = self._open_data()
        with data.lock:
            data.nodes_ever += 1
            no = data.nodes_ever
            expires_us = data.clock() + lease_us
            # Numbers are never used twice here, so a nonce made of one is as good as a random one.
            node = NodeRow(
                no, f"{no:024x}", name, host, pid, list(services), expires_us, data.clock()
            )
            data.nodes[no] = node
            data.leases_us[no] = lease_us
            data.version += 1
            return _node(node)

    def renew(self, fence: Fence) -> Glance | None:
        data = self._open_data()
        with data.lock:
            if not data.holds(fence):
                return None
            others = [node for no, node in data.nodes.items() if no != fence.node]
            asked = sum(node.asked != "" for node in data.nodes.values())
            roster = (len(others), max((node.no for node in others), default=0), asked)
            return Glance(roster, min((node.expires_us for node in others), default=LAST_US))

    async def leave(self, fence: Fence, touched: Sequence[Touched] = ()) -> None:
        data = self._open_data()
        with data.lock:
            node = data.nodes.get(fence.node)
            if node is not None and node.nonce == fence.nonce:
                for of_one in touched:
                    data.take_back(of_one)
                self._remove(data, node)

    async def nodes(self) -> list[NodeRow]:
        return [_node(node) for _, node in sorted(self._open_data().nodes.items())]

    async def ask_node(self, node: int, what: str) -> bool:
        data = self._open_data()
        with data.lock:
            row = data.nodes.get(node)
            if row is not None:
                row.asked = what
            return row is not None

    async def partition_rows(self, services: Sequence[str]) -> list[PartitionRow]:
        rows = sorted(self._open_data().partitions.items())
        return _copies(row for _, row in rows if row.service in services)

    async def expire(self, nodes: Sequence[NodeRow]) -> None:
        data = self._open_data()
        with data.lock:
            for node in nodes:
                known = data.nodes.get(node.no)
                if known is not None and known.expires_us == node.expires_us:
                    self._remove(data, known)

    def _remove(self, data: _Data, node: NodeRow) -> None:
        del data.nodes[node.no]
        del data.leases_us[node.no]
        for partition in data.partitions.values():
            if partition.owner == node.no:
                partition.owner, partition.clean = None, False
        data.version += 1

    async def claim(self, fence: Fence, targets: Sequence[int]) -> list[PartitionRow]:
        data = self._open_data()
        with data.lock:
            data.prove(fence)
            rows = [
                data.partitions[target] for target in sorted(set(targets) & set(data.partitions))
            ]
            free = [row for row in rows if row.owner is None]
            left = _copies(free)
            for row in free:
                row.owner, row.clean = fence.node, False
            data.version += 1
            return left

    async def release(self, fence: Fence, positions: Sequence[tuple[int, int]]) -> None:
        data = self._open_data()
        with data.lock:
            data.prove(fence)
            for target, position in positions:
                data.advance(target, position)
                partition = data.partitions.get(target)
                if partition is not None and partition.owner == fence.node:
                    partition.owner, partition.clean = None, True
            data.version += 1

    # -- upkeep --------------------------------------------------------------------------------

    async def touch(
        self, fence: Fence, runs: Mapping[int, int], parked: Sequence[ParkedRow]
    ) -> None:
        data = self._open_data()
        with data.lock:
            data.prove(fence)
            for no, deaths in runs.items():
                if no in data.runs:
                    data.runs[no].deaths = max(data.runs[no].deaths, deaths)
            for row in parked:
                data.put_parked(row)
            data.version += 1

    async def prune(self, before_us: int, limit: int) -> int:
        data = self._open_data()
        with data.lock:
            data.version += 1
            return _prune_runs(data, before_us, limit) + _prune_log(data, before_us, limit)

    async def describe(self) -> dict[str, str | int | float]:
        data = self._open_data()
        return {
            "kind": "memory",
            "place": "this process",
            "runs": sum(row.service == row.home for row in data.runs.values()),
            "messages": len(data.log),
            "parked": len(data.parked),
            "events": len(data.events.log),
            "dead letters": len(data.events.dead),
        }


# -- checking ----------------------------------------------------------------------------------


def _values_of(commit: Commit) -> Iterator[Iterable[Any]]:
    for m in commit.messages:
        yield m.target, m.kind, m.id, m.to, m.run, m.at_us, m.body
    for rows in (commit.runs, commit.journal, commit.inbox, commit.mail, commit.parked):
        for row in rows:
            yield msgspec.structs.astuple(row)
    yield from commit.mail_taken
    yield from commit.unparked
    yield from commit.positions
    yield from event_values(commit.events, commit.reaction)


def _check_value(value: Any) -> None:
    """Refuse what a store of UTF-8 text and 64-bit integers cannot keep."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, bytes):
        value.decode()
    elif isinstance(value, int):
        if not -INTEGER_MAX - 1 <= value <= INTEGER_MAX:
            raise ValueError(f"{value} does not fit into 64 bits")
    elif value is not None:
        raise TypeError(f"{value!r} is neither text nor a whole number")


def _check_new(what: str, keys: Iterable[tuple[Any, Any]], has: Callable[[Any, Any], bool]) -> None:
    given: set[tuple[Any, Any]] = set()
    for key in keys:
        if key in given or has(*key):
            raise _conflict(what, key[0], "of", key[1])
        given.add(key)


def _conflict(what: str, first: object, word: str, second: object) -> Conflict:
    return Conflict(f"This was written before: {what} {first!r} {word} {second!r}.")


def _fits(row: RunRow, which: RunFilter) -> bool:
    if row.service != row.home or not row.id.startswith(which.id_prefix):
        return False
    if which.service not in (None, row.service) or which.workflow not in (None, row.workflow):
        return False
    if which.before is not None and row.no >= which.before:
        return False
    if which.status and row.status not in which.status:
        return False
    if not which.attributes:
        return True
    attributes = msgspec.json.decode(row.attributes, type=dict[str, Any])
    return all(name in attributes and attributes[name] == value for name, value in which.attributes)


# -- pruning -----------------------------------------------------------------------------------


def _prune_runs(data: _Data, before_us: int, limit: int) -> int:
    """Delete what is left, at every service, of runs that ended at home."""
    ended = sorted(
        (row.ended_us, row.id)
        for row in data.runs.values()
        if row.service == row.home and row.ended_us is not None and row.ended_us < before_us
    )[:limit]
    # Marks of messages that someone has still to consume stay, or they would count twice.
    done = data.consumed()
    pending = {it.message.id for it in data.log if it.pos > done} if ended else set[str]()
    for _, id in ended:
        for row in data.runs_of(id):
            del data.runs[row.no]
            data.waking.pop(row.no, None)
            data.journals.pop(row.no, None)
            data.mail.pop((row.service, id), None)
        del data.numbers[id]
        data.events.forget_run(id)
        for mark in [it for it in data.inbox if it == id or it.startswith(f"{id}#")]:
            if mark not in pending:
                del data.inbox[mark]
    return len(ended)


def _prune_log(data: _Data, before_us: int, limit: int) -> int:
    """Delete consumed messages from the log's beginning up to the first that is not old."""
    stale: set[int] = set()
    for logged in data.log:
        message = logged.message
        if logged.pos > data.consumed(message.target):
            continue
        if message.at_us >= before_us or len(stale) == limit:
            break
        stale.add(logged.pos)
        if data.is_over(message.run):
            marks = data.inbox.get(message.id, {})
            for service in [message.to] if message.to else list(marks):
                marks.pop(service, None)
    data.log[:] = [logged for logged in data.log if logged.pos not in stale]
    return len(stale)


# -- copies ------------------------------------------------------------------------------------


def _copies(rows: Iterable[T]) -> list[T]:
    return [copy(row) for row in rows]


def _node(node: NodeRow) -> NodeRow:
    return msgspec.structs.replace(node, services=list(node.services))


def _message(m: Message) -> Message:
    """Copy a message without what must not leave its writer."""
    return Message(m.kind, m.id, m.to, m.run, m.body, m.at_us, m.target, m.pos)


def _system_clock() -> int:
    return time.time_ns() // 1000
