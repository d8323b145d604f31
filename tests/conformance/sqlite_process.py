"""Another process that uses a store, to be starved, forked, stopped or killed by the tests.

Started as `sqlite_process.py DUTY PATH`; it prints what happened, a line each.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import resource
import signal
import sys
from typing import Any

from pavane.errors import LeaseLost, PavaneError, StoreError
from pavane.stores.port import Fence, InboxRow, JournalRow
from pavane.stores.sqlite import SqliteStore
from pavane.testing.store_check import SERVICES, a_commit, a_message, joined, refusal, written

FILE_LIMIT_BYTES = 600_000
"""More than the schema takes, of which there is a copy in the write-ahead log."""


def tell(*words: object) -> None:
    print(*words, flush=True)


def numbered(store: SqliteStore, run: int, number: int, size_bytes: int = 10) -> Any:
    """Return a commit of three parts that all carry `number`."""
    id = f"r{run}#{number}"
    return a_commit(
        journal=[JournalRow(run, number, b'"' + b"x" * size_bytes + b'"')],
        inbox=[InboxRow("shop", id, 1)],
        messages=[a_message(store, id)],
    )


def drop_privileges() -> None:
    """Give up root's right to ignore file permissions."""
    if os.geteuid() == 0:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        nothing = (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, nothing) == 0


async def opening(store: SqliteStore) -> None:
    """Open as a process without rights of its own; tell the refusal."""
    drop_privileges()
    error = await refusal(store.open())
    tell(error or "opened")
    if error is None:
        await store.close()


async def filling(store: SqliteStore) -> None:
    """Write until the disk is full, make room, go on."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    await store.open()
    await store.register(SERVICES)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT_BYTES, hard))
    number, error = 0, None
    while error is None:
        (error,) = await written(store, numbered(store, 1, number, 5000))
        number += error is None
    tell(type(error) is StoreError, error)
    (again,) = await written(store, numbered(store, 1, number, 5000))
    tell(type(again) is StoreError)
    tell(number, len((await store.journals([1]))[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    tell(await written(store, numbered(store, 1, number, 5000)))
    tell([row.seq for row in (await store.journals([1]))[1]] == list(range(number + 1)))
    await store.close()


async def forking(store: SqliteStore) -> None:
    """Use the store in a forked child, where every way into it must be closed."""
    await store.open()
    await store.register(SERVICES)
    fence = await joined(store)
    child = os.fork()
    if child == 0:
        try:
            await _use_inherited(store, fence)
        finally:
            os._exit(0)
    await asyncio.to_thread(os.waitpid, child, 0)
    tell(await written(store, numbered(store, 1, 0), fence=fence), store.renew(fence) is not None)
    await store.close()


async def _use_inherited(store: SqliteStore, fence: Fence) -> None:
    for work in (
        store.run_row("shop", "r"), store.take_run_numbers(1), store.claim(fence, [1]),
        store.register(["other"]),
    ):  # fmt: skip
        tell(await refusal(work))
    store.submit([numbered(store, 1, 0)], fence, lambda results: tell(*results))
    await store.close()
    try:
        store.renew(fence)
    except StoreError as error:
        tell(error)


async def writing(store: SqliteStore) -> None:
    """Write numbered commits for ever; tell each that was acknowledged."""
    await store.open()
    await store.register(SERVICES)
    fence = await joined(store)
    run = await store.take_run_numbers(1)
    chance = random.Random(run)
    tell("run", run)
    number = 0
    while True:
        size = chance.choice((1, 1, 1, 3, 30))
        sizes = [chance.choice((10, 10, 5000)) for _ in range(size)]
        batch = [numbered(store, run, number + at, it) for at, it in enumerate(sizes)]
        assert not any(await written(store, *batch, fence=fence))
        number += size
        tell(number)


async def holding(store: SqliteStore) -> None:
    """Write under one lease until it is lost; tell the first number that was refused."""
    await store.open()
    await store.register(SERVICES)
    fence = await joined(store, "zombie")
    number = 0
    while True:
        (error,) = await written(store, numbered(store, 1, number), fence=fence)
        if isinstance(error, LeaseLost):
            break
        if error is not None:
            raise error
        if number == 20:
            tell(fence.node)
        number += 1
    renewed = store.renew(fence) is not None
    results = await written(store, *[numbered(store, 1, number) for _ in range(20)], fence=fence)
    tell(number, renewed, {type(it).__name__ for it in results})
    await store.close()


DUTIES = {work.__name__: work for work in (opening, filling, forking, writing, holding)}

if __name__ == "__main__":
    try:
        asyncio.run(DUTIES[sys.argv[1]](SqliteStore(sys.argv[2])))
    except PavaneError as unexpected:
        tell("unexpected", unexpected)
