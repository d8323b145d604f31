"""One check of a store: how it gets its connections, and what checks write and ask for.

Shared by the parts of the conformance suite, whose entry is `testing/stores.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from pavane.errors import PavaneError
from pavane.stores.port import Commit, Fence, MailRow, Message, ParkedRow, RunRow, Store

Connect = Callable[[], Awaitable[Store]]
Results = Sequence[PavaneError | None]

SERVICES = ("shop", "bank")
LEASE_US = 30_000_000
CLOCK_US = 1_000_000
"""How far the time of a store and what a connection takes for it may be apart, on a busy machine:
it was told once, in an answer that was on its way for a while."""


class Connections:
    """Opens connections to the store under test, and closes them after the check."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._opened: list[Store] = []

    async def open(self) -> Store:
        store = await self._connect()
        self._opened.append(store)
        await store.register(SERVICES)
        return store

    async def close(self, store: Store) -> None:
        self._opened.remove(store)
        await store.close()

    async def close_all(self) -> None:
        while self._opened:
            await self._opened.pop().close()


Body = Callable[[Connections], Awaitable[None]]


class StoreCheck:
    """One statement about a store; its name is the statement."""

    def __init__(self, body: Body) -> None:
        self.name = body.__name__
        self._body = body

    def __repr__(self) -> str:
        return self.name

    async def run(self, connect: Connect) -> None:
        """Check the empty store to which `connect` opens one more connection at each call."""
        connections = Connections(connect)
        try:
            await self._body(connections)
        finally:
            await connections.close_all()


def into(checks: list[StoreCheck]) -> Callable[[Body], StoreCheck]:
    """Return a decorator that makes a check of a function and appends it to `checks`."""

    def add(body: Body) -> StoreCheck:
        check = StoreCheck(body)
        checks.append(check)
        return check

    return add


# -- what is written ---------------------------------------------------------------------------


def a_run(store: Store, no: int, id: str, service: str = "shop", **changes: Any) -> RunRow:
    """Return the row of a run that has just begun, with `changes`."""
    row = RunRow(
        no=no, service=service, id=id, target=store.target_of(service, id), workflow="shop.order",
        version=1, mode="orchestration", home="shop", status="running", holder=service, hop=0,
        header=b'{"run":1}', trail=b"[]", attributes=b"{}", wake_us=None, reason="", deaths=0,
        started_us=1000, ended_us=None, result=None, undone=0, entries=0,
    )  # fmt: skip
    return msgspec.structs.replace(row, **changes)


def a_message(store: Store, id: str, to: str = "bank", run: str = "", at_us: int = 1000) -> Message:
    run = run or id.partition("#")[0]
    target = store.target_of(to, run) if to else 0
    return Message("command" if to else "event", id, to, run, b'{"a":1}', at_us, target)


def a_parked(store: Store, id: str, service: str = "bank", **changes: Any) -> ParkedRow:
    run = id.partition("#")[0]
    target = store.target_of(service, run)
    row = ParkedRow(service, run, id, target, b'{"c":1}', 1, 5000, 1000, b"null", b"null", 0)
    return msgspec.structs.replace(row, **changes)


def some_mail(run: str, id: str, service: str = "shop", body: bytes = b"{}") -> MailRow:
    return MailRow(service, run, id, "Paid", body, 1000)


def a_commit(**parts: Any) -> Commit:
    """Return a commit of these parts: `runs`, `journal`, `messages` and so on."""
    commit = Commit(lambda error: None)
    for name, rows in parts.items():
        setattr(commit, name, rows)
    return commit


async def written(store: Store, *commits: Commit, fence: Fence | None = None) -> Results:
    """Submit one batch; return what became of each commit."""
    future: asyncio.Future[Results] = asyncio.get_running_loop().create_future()
    store.submit(commits, fence, future.set_result)
    results = await future
    assert len(results) == len(commits)
    return results


async def write(store: Store, fence: Fence | None = None, **parts: Any) -> None:
    """Write one commit that must succeed."""
    (result,) = await written(store, a_commit(**parts), fence=fence)
    assert result is None, result


async def joined(store: Store, name: str = "node") -> Fence:
    row = await store.join(name, "host", 1, SERVICES, LEASE_US)
    return Fence(row.no, row.nonce, LEASE_US)


async def all_targets(store: Store) -> list[int]:
    return [row.target for row in await store.partition_rows(SERVICES)]


async def whole_log(store: Store, after: int = 0) -> list[Message]:
    return await store.read_log(after, None, None, 100_000, None)


async def consume_all(store: Store) -> None:
    """Move every partition's position to the log's end."""
    head = await store.log_head()
    await write(store, positions=[(target, head) for target in await all_targets(store)])


def refused(results: Results) -> list[int]:
    return [at for at, result in enumerate(results) if result is not None]


async def refusal(work: Awaitable[object]) -> PavaneError | None:
    """Return the PavaneError that `work` raises, if any."""
    try:
        await work
    except PavaneError as error:
        return error
    return None
