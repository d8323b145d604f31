"""The store port: what the engine asks of a store, as small values and one protocol.

A store keeps, per service: runs and their journals, the inbox, mailboxes, parked work, and the
log of messages; for all: nodes with their leases, and partitions with their owners. Everything
that one piece of progress changes is one `Commit`, written atomically, or refused with a reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import msgspec

from pavane.core.baton import Status
from pavane.errors import BadArguments, PavaneError
from pavane.stores.eventlog import EventRow, EventStore, Reaction

LAST_US = 2**62
"""Later than any time; the end of an open range."""

COUNT_MAX = 10_000
"""A store that is described counts rows up to this many, and one more tells that there are more:
millions take seconds to count, and nobody needs to know how many exactly."""


class Conflict(PavaneError):
    """A commit repeats something that is there already (a run, an inbox mark, a journal entry)."""

    code = "conflict"


class Message(msgspec.Struct, eq=False):
    """Anything that crosses between services.

    `id` is derived from what caused it, so that a repetition is recognised; `to` is a service,
    empty for a published event; `target` is its partition; `pos` its place in the log once it is
    written. `live` never leaves the process: an execution that travels along, to spare a replay.
    """

    kind: str
    id: str
    to: str
    run: str
    body: bytes
    at_us: int
    target: int = 0
    pos: int = 0
    live: Any = None

    def __repr__(self) -> str:
        return f"<{self.kind} {self.id} to {self.to or 'all'} at {self.pos}>"


class RunRow(msgspec.Struct):
    """One run at one service: its state as a projection of its journal.

    `no` is the store's number of it. The row at `service == home` is the run itself; another
    service has one while it holds the baton for longer than a step, or did. `wake_us` is when its
    earliest timer is due; `reason` says what it waits for or why it is stuck; `deaths` counts how
    often it was touched after a crash without progress since; `entries` is the journal's length
    here. `header`, `trail` and `attributes` are JSON.
    """

    no: int
    service: str
    id: str
    target: int
    workflow: str
    version: int
    mode: str
    home: str
    status: Status
    holder: str
    hop: int
    header: bytes
    trail: bytes
    attributes: bytes
    wake_us: int | None
    reason: str
    deaths: int
    started_us: int
    ended_us: int | None
    result: bytes | None
    undone: int
    entries: int


class JournalRow(msgspec.Struct):
    """A chunk of a journal: entries from number `seq` on, as one JSON array."""

    run: int
    seq: int
    body: bytes


class Touched(msgspec.Struct):
    """What a session counted a death of in one partition, each with its deaths before that."""

    runs: dict[int, int] = {}
    """By number."""
    parked: dict[tuple[str, str], int] = {}
    """By (service, id)."""
    events: dict[tuple[int, int], int] = {}
    """By (handler, position)."""
    tries: list[tuple[str, str]] = []
    """The marks, (service, id), by which tries of starts are counted."""


class InboxRow(msgspec.Struct):
    """Message `id` took effect at `service`; `passed_to` is where a baton went from there."""

    service: str
    id: str
    at_us: int
    passed_to: str = ""


class MailRow(msgspec.Struct):
    """An event sent to a run that does not wait for it yet (or, with `run` ended, came late)."""

    service: str
    run: str
    id: str
    type: str
    body: bytes
    at_us: int


class ParkedRow(msgspec.Struct):
    """A step in custody: running for long, or waiting for its next attempt at `due_us`.

    `call` is the command's JSON; `beat` the last heartbeat's details; `deaths` as for runs.
    """

    service: str
    run: str
    id: str
    target: int
    call: bytes
    attempt: int
    due_us: int
    began_us: int
    beat: bytes
    error: bytes
    deaths: int


class NodeRow(msgspec.Struct):
    """A process that hosts services, with its lease, and what people ask of it: "" or "drain"."""

    no: int
    nonce: str
    name: str
    host: str
    pid: int
    services: list[str]
    expires_us: int
    joined_us: int = 0
    asked: str = ""


class PartitionRow(msgspec.Struct):
    """A slice of a service: who owns it, up to where its messages are consumed.

    `clean` tells that its last owner released it in order, so nothing in it was cut short.
    """

    target: int
    service: str
    partition: int
    owner: int | None
    clean: bool
    position: int


class Glance(msgspec.Struct, frozen=True):
    """What a node sees of the others while it renews its lease.

    `roster` (how many there are, the newest's number, how many are asked for something) is another
    one when a node came, left or was asked. `expires_us` is when the first of their leases is over.
    """

    roster: tuple[int, int, int]
    expires_us: int


class RunFilter(msgspec.Struct, frozen=True):
    """Which runs to list; unset fields do not restrict."""

    service: str | None = None
    workflow: str | None = None
    status: tuple[str, ...] = ()
    id_prefix: str = ""
    attributes: tuple[tuple[str, str | int | float | bool], ...] = ()
    before: int | None = None
    limit: int = 100

    def __post_init__(self) -> None:
        status: Any = self.status
        attributes: Any = self.attributes
        if type(status) is str:  # each letter of it would be taken for a status
            raise BadArguments(f"status={status!r} must be a tuple, as ({status!r},).")
        texts = (self.service or "", self.workflow or "", self.id_prefix)
        if unfit := [text for text in texts if not text.isprintable()]:
            raise BadArguments(f"Nothing can be called {unfit[0]!r}: names and ids are printable.")
        if isinstance(attributes, Mapping):
            pairs = tuple(cast("Mapping[str, Any]", attributes).items())
            raise BadArguments(f"attributes={attributes!r} must be pairs, as {pairs!r}.")


class Fence(msgspec.Struct, frozen=True):
    """Proof of a node's lease; a commit under a lost one is refused whole."""

    node: int
    nonce: str
    lease_us: int


Done = Callable[[PavaneError | None], None]


def nobody_waits(_: PavaneError | None) -> None:
    """Be told of a commit that nothing depends on."""


class Commit(msgspec.Struct, eq=False):
    """Everything that one piece of progress changes. Written whole or not at all.

    `done` is called once, on the event loop: with None after it is durable, or with why not.
    Commits of one `chain` (but 0) build on each other: after a refused one the later ones of its
    chain are refused too.
    """

    done: Done = nobody_waits
    chain: int = 0
    runs: Sequence[RunRow] = ()
    journal: Sequence[JournalRow] = ()
    messages: Sequence[Message] = ()
    inbox: Sequence[InboxRow] = ()
    mail: Sequence[MailRow] = ()
    mail_taken: Sequence[tuple[str, str, str]] = ()
    """(service, run, id) of mail that was delivered; id "*" takes all of a run's."""
    parked: Sequence[ParkedRow] = ()
    unparked: Sequence[tuple[str, str]] = ()
    """(service, id) of parked work that is finished."""
    positions: Sequence[tuple[int, int]] = ()
    """(target, position) up to which messages are consumed."""
    events: Sequence[EventRow] = ()
    """Published events; each gets its `pos`, or 0 if its id is in the log already."""
    reaction: Reaction | None = None
    """What handlers made of events."""
    work: Callable[[Any, bytes | None], Any] | None = None
    """Called inside the transaction, before this commit's rows are read, with a connection and the
    state named by `work_state`; awaited if the store's features say so. What it raises refuses the
    commit, as WorkFailed."""
    work_state: tuple[str, str, str] | None = None


def submit_alone(store: Store, commit: Commit) -> None:
    """Submit a commit that needs no lease."""
    store.submit([commit], None, lambda results: commit.done(results[0]))


async def durable(commit: Commit, submit: Callable[[Commit], None]) -> None:
    """Submit a commit, and return when it is written; raise if it cannot be."""
    done, settled = promise()
    commit.done = done
    submit(commit)
    await settled


def promise() -> tuple[Done, Awaitable[None]]:
    """Return what to tell of a commit, and what to await: it raises if that was refused."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def done(error: PavaneError | None) -> None:
        if future.done():
            return  # nobody waits any more
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    return done, future


def no_text(error: BaseException) -> BadArguments:
    """Return the refusal of a question in which there is text that the store cannot have."""
    return BadArguments(
        f"What is asked for holds a character that no text here can have ({error}), so nothing is "
        f"called that."
    )


def broken_chain() -> Conflict:
    """Return the refusal of a commit whose predecessor was refused."""
    return Conflict("What this builds on was refused.")


class Features(msgspec.Struct, frozen=True):
    """What a store can do."""

    durable: bool
    shared: bool
    """Other processes may use it at the same time."""
    transactions: bool = False
    """Commits can carry `work` that is given a connection."""
    awaits_work: bool = False
    """`work` is a coroutine function on the event loop, not a plain one on a thread that writes."""
    nul: bool = True
    """Ids, keys and bodies may contain NUL; else they are refused, and reasons show it as "␀"."""
    batch_max: int = 1000
    """How many commits to give it at once."""
    prune_max: int = 500
    """How many old rows to delete at once: few where all that is written waits for that."""


class Store(EventStore, Protocol):
    """See the module. Reads see everything committed before they began."""

    features: Features
    partitions: int
    """Partitions per service, fixed when the store is made."""
    tail: int
    """Log position up to which the user of this object has seen every message.

    The user sets it after `read_log`. The store moves it over messages that were submitted here
    under a fence, if they directly follow it: there is nothing to read.
    """

    def connect(self) -> Store:
        """Return another view of the same store, to be opened by another client."""
        ...

    async def open(self) -> None:
        """Open or create it, and set `tail` to the log's end; raise StoreError with a remedy."""
        ...

    async def reopen(self) -> None:
        """Go on with new connections after a StoreError; raise one, and stay closed, if it lasts.

        What the old ones have in memory may not be what is on disk. What was submitted is written
        or refused before, what is asked for meanwhile is done after.
        """
        ...

    async def close(self) -> None:
        """Write what was submitted, then close; what is asked for afterwards gets a StoreError."""
        ...

    def now_us(self) -> int:
        """The store's clock, in microseconds since the epoch; the only one that decides leases."""
        ...

    def target_of(self, service: str, run: str) -> int:
        """The partition of `run` at `service`; the service must be registered."""
        ...

    async def register(self, services: Sequence[str]) -> None:
        """Make services and their partitions known."""
        ...

    def submit(
        self,
        batch: Sequence[Commit],
        fence: Fence | None,
        done: Callable[[Sequence[PavaneError | None]], None],
    ) -> None:
        """Write `batch` in one transaction, then call `done` on the event loop, perhaps at once.

        Commits take effect in the order of the batch, batches in the order of submission, and other
        writes after the batches that were submitted before. Each commit gets None or the reason of
        its refusal: Conflict for what is there already (a run of this id at the service, an inbox
        mark, a journal entry), a plain PavaneError for values that cannot be stored, such as text
        with lone surrogates. One bad commit does not harm the others. LeaseLost and StoreError
        refuse all that is left. Messages get their `pos`; that of a refused one means nothing.
        Rows are copied: changing them afterwards changes nothing here.

        A run whose `no` is known is replaced, except for its number, service, id, target, workflow,
        version, home and start. Mail that is there already stays as it is.
        Parked work that is there keeps its run, target, call and beginning.
        """
        ...

    async def take_run_numbers(self, count: int) -> int:
        """Reserve `count` run numbers; return the first."""
        ...

    # reading
    async def run_rows(self, id: str) -> list[RunRow]:
        """The run's rows at all services."""
        ...

    async def run_row(self, service: str, id: str) -> RunRow | None: ...
    async def halted_runs(self, ids: Sequence[str]) -> list[RunRow]:
        """The rows, at their homes, of those of these runs that ended or are stuck."""
        ...

    async def rows_of(self, runs: Sequence[int]) -> list[RunRow]:
        """The rows of these numbers, those that exist."""
        ...

    async def list_runs(self, which: RunFilter) -> list[RunRow]:
        """Rows of runs at their homes, newest number first."""
        ...

    async def journals(self, runs: Sequence[int]) -> dict[int, list[JournalRow]]:
        """The journals of these run numbers, in order of `seq`; empty for unknown ones."""
        ...

    async def live_runs(self, targets: Sequence[int], after: int, limit: int) -> list[RunRow]:
        """Runs with status running or stuck, numbered above `after`, in order of number."""
        ...

    async def due_runs(
        self, targets: Sequence[int], after: tuple[int, int], until_us: int, limit: int
    ) -> list[RunRow]:
        """Runs whose (wake_us, no) is above `after`, up to `until_us`, earliest first."""
        ...

    async def due_parked(
        self, targets: Sequence[int], after: tuple[int, str], until_us: int, limit: int
    ) -> list[ParkedRow]:
        """Parked work whose (due_us, id) is above `after`, up to `until_us`, earliest first."""
        ...

    async def parked_of(self, service: str, run: str) -> list[ParkedRow]: ...
    async def mail_of(self, service: str, run: str) -> list[MailRow]:
        """Mail in the order in which it was written."""
        ...

    async def inbox_of(self, run: str) -> list[InboxRow]:
        """All marks whose id begins with `run` and "#", at every service, in order of id."""
        ...

    async def seen(self, service: str, ids: Sequence[str]) -> set[str]:
        """Those of `ids` that are in the inbox of `service`."""
        ...

    async def message(self, id: str) -> Message | None:
        """The newest message of this id that the log still has."""
        ...

    async def read_log(
        self, after: int, until: int | None, targets: Sequence[int] | None, limit: int,
        skip_node: int | None,
    ) -> list[Message]:  # fmt: skip
        """Messages above `after` up to `until`, in log order, which is commit order.

        `targets` restricts to partitions; `skip_node` leaves out what was written under the fence
        of that node. A message never appears below one that a reader has seen before.
        """
        ...

    async def log_head(self) -> int:
        """The newest position ever given, also if its message was deleted."""
        ...

    def changed(self) -> bool:
        """Whether anyone has written messages or events since the last call; cheap.

        It may be told late, and without a reason: nothing but how soon one looks hangs on it.
        """
        ...

    @property
    def hears(self) -> bool:
        """Whether it is noticed at once, and without looking, that others wrote something."""
        ...

    # membership
    async def join(
        self, name: str, host: str, pid: int, services: Sequence[str], lease_us: int
    ) -> NodeRow:
        """Become a node, with a number and a nonce that no node before had."""
        ...

    def renew(self, fence: Fence) -> Glance | None:
        """Prolong the lease, and see who else is there; None if it is lost.

        Called from a thread of its own. Who idles looks no other way, so it is to cost little. One
        that `hears` may prolong its lease for longer than it joined with: once anybody has written
        messages or events, it is as if it had been prolonged then, for as long as it joined with.
        """
        ...

    async def leave(self, fence: Fence, touched: Sequence[Touched] = ()) -> None:
        """Give the lease back; partitions that were not released before become free, not clean.

        Whoever takes them over counts a death. One who leaves alive says what it `touched` in
        them, and takes back what it counted: nothing there has more deaths than before.
        """
        ...

    async def nodes(self) -> list[NodeRow]: ...
    async def ask_node(self, node: int, what: str) -> bool:
        """Note what a node is asked for, durably; False if there is no such node."""
        ...

    async def partition_rows(self, services: Sequence[str]) -> list[PartitionRow]: ...
    async def expire(self, nodes: Sequence[NodeRow]) -> None:
        """Delete these nodes unless renewed meanwhile; their partitions become free, not clean."""
        ...

    async def claim(self, fence: Fence, targets: Sequence[int]) -> list[PartitionRow]:
        """Own those of `targets` that are free; return them as they were left, or LeaseLost."""
        ...

    async def release(self, fence: Fence, positions: Sequence[tuple[int, int]]) -> None:
        """Give (target, consumed position) back, clean; what others own stays theirs."""
        ...

    # upkeep
    async def touch(
        self, fence: Fence, runs: Mapping[int, int], parked: Sequence[ParkedRow]
    ) -> None:
        """Count one more touch after a crash, durably: raises `deaths` of `runs` to what is given
        for their numbers, and writes `parked`, whose `deaths` the caller has counted already."""
        ...

    async def prune(self, before_us: int, limit: int) -> int:
        """Delete up to `limit` runs that ended before `before_us`, and as many consumed messages
        older than that; return how many of both.

        A run goes with all its rows, journals, mail, marks, open waits and memberships. A message
        goes when its partition has consumed it (a published event when all have), its mark when its
        run is over too.
        """
        ...

    async def describe(self) -> dict[str, str | int | float]:
        """Facts for people: kind, place, versions, sizes, and rows counted up to COUNT_MAX + 1."""
        ...
