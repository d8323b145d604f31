"""Kills a worker at one durable point of a run, recovers, and reports what is there then.

`python -m tests.integration.crash_points SCENARIO MODE LAYOUT WHEN FOLDER` does this for every
point in turn, until the run ends without a kill, and prints one line of JSON for each. Processes
are forked from this one, which has imported everything and opened nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NoReturn

import apsw

from pavane import (
    App,
    Client,
    EngineConfig,
    Event,
    Run,
    RunEnded,
    RunFailed,
    Service,
    receive,
    saga,
    step_info,
)
from pavane.core.baton import decode_baton
from pavane.core.envelope import Reply, unpack
from pavane.core.journal import Entry, decode_chunk
from pavane.core.operations import Mode
from pavane.errors import PavaneError
from pavane.stores.port import Commit, Fence
from pavane.stores.sqlite import SqliteStore

NAMES = ("orders", "payments", "stock", "shipping")
orders, payments, stock, shipping = services = [Service(name) for name in NAMES]
RECORD = "executions.txt"
DEADLINE_S = 60.0


def record() -> None:
    """Write down outside of the store that a step was executed."""
    info = step_info()
    line = json.dumps([os.getpid(), info.step, info.idempotency_key, info.attempt])
    file = os.open(RECORD, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line.encode() + b"\n")
    os.close(file)


@payments.step
async def charge(cents: int) -> str:
    record()
    return f"payment of {cents}"


@payments.step
async def refund(payment: str) -> None:
    record()


@stock.step
async def reserve(sku: str) -> str:
    record()
    return f"parcel of {sku}"


@stock.step
async def release(parcel: str) -> None:
    record()


@orders.step
async def note(text: str) -> str:
    record()
    return text


@orders.step
async def unnote(text: str) -> None:
    record()


@shipping.step
async def ship(parcel: str) -> str:
    record()
    raise ValueError(f"no truck for {parcel}")


@orders.workflow
async def fulfil(sku: str) -> str:
    async with saga() as undo:
        payment = await charge(100)
        undo(refund, payment)
        text = await note("paid")
        undo(unnote, text)
        parcel = await reserve(sku)
        undo(release, parcel)
        await asyncio.sleep(0.001)
        return await ship(parcel)


def enter(connection: Any, what: str, sku: str) -> str:
    connection.execute("CREATE TABLE IF NOT EXISTS books (what TEXT, sku TEXT)")
    connection.execute("INSERT INTO books VALUES (?, ?)", (what, sku))
    return f"{what} {sku}"


@payments.transaction
def credit(connection: Any, sku: str) -> str:
    return enter(connection, "credit", sku)


@payments.transaction(undo=credit)
def debit(connection: Any, sku: str) -> str:
    return enter(connection, "debit", sku)


@stock.transaction
def take(connection: Any, sku: str) -> str:
    return enter(connection, "take", sku)


@orders.transaction
def file(connection: Any, sku: str) -> str:
    return enter(connection, "file", sku)


@orders.workflow
async def settle(sku: str) -> str:
    async with saga():
        await debit(sku)
        await file(sku)
        await asyncio.gather(take(sku), file(f"{sku} taken"))
        return await ship(sku)


class Told(Event):
    text: str


@stock.workflow
async def count(sku: str) -> str:
    return await reserve(sku)


@orders.workflow(receives=[Told])
async def talk(sku: str) -> None:
    await charge(1)
    heard = [(await receive(Told)).text, (await receive(Told)).text]
    await note(" ".join(heard))
    await count(sku)
    try:
        await asyncio.sleep(3600)
    finally:
        await refund("all of it")
        await unnote("said")


class KilledStore(SqliteStore):
    """A store whose process dies right before or right after its n-th batch is durable."""

    def __init__(self, path: str, when: str, point: int) -> None:
        super().__init__(path)
        self._when = when
        self._left = point

    def connect(self) -> SqliteStore:
        return self

    def submit(
        self,
        batch: Sequence[Commit],
        fence: Fence | None,
        done: Callable[[Sequence[PavaneError | None]], None],
    ) -> None:
        self._left -= 1
        if self._left == 0 and self._when == "before":
            die()

        def written(results: Sequence[PavaneError | None]) -> None:
            if last and self._when == "after":
                die()
            done(results)

        last = self._left == 0
        super().submit(batch, fence, written)


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


# -- the processes -----------------------------------------------------------------------------

CONFIG = EngineConfig(lease_s=5.0)
PATH = "shop.db"


def app_on(store: SqliteStore | None = None) -> App:
    return App("shop", services=services, store=store or PATH, config=CONFIG)


async def work_until_ended(
    mode: Mode, scenario: str, names: Sequence[str], store: SqliteStore | None
) -> None:
    """Work for `names`; with all of them, also start the run and await its end."""
    app = app_on(store)
    async with app.worker(names) as worker:
        if len(names) == len(NAMES):
            await start_and_await(worker, mode, scenario)
        else:
            await asyncio.sleep(DEADLINE_S)


async def start_and_await(client: Client, mode: Mode, scenario: str) -> None:
    flow = {"saga": fulfil, "talk": talk, "books": settle}[scenario]
    run = await client.start(flow, ("book",), {}, id="r-1", mode=mode)
    if scenario == "talk":
        await tell_and_cancel(client, run)
    try:
        await run.result(timeout=DEADLINE_S)
    except RunFailed as error:
        assert "no truck" in str(error) or error.status == "cancelled", error


async def tell_and_cancel(client: Client, run: Run[Any]) -> None:
    """Say two things and ask to stop; what an earlier process managed to ask counts as asked."""
    try:
        for number, text in enumerate(("hello", "world")):
            await run.send(Told(text=text), id=f"e{number}")
        while "timer" not in (await run.status()).reason:
            if await was_cancelled(client):
                return
            await asyncio.sleep(0.002)
        if not await was_cancelled(client):
            await run.cancel()
    except RunEnded:
        pass


async def was_cancelled(client: Client) -> bool:
    messages = await client.store.read_log(0, None, None, 999, None)
    return any(message.kind == "cancel" for message in messages)


async def ask(mode: Mode, scenario: str) -> None:
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(app_on().connect())
        await start_and_await(client, mode, scenario)


def fork(body: Callable[[], Any]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        asyncio.run(body())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def reap(child: int) -> int:
    """Return the exit code, negative for a signal; a process that does not end is an error."""
    ends = time.monotonic() + DEADLINE_S
    while time.monotonic() < ends:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"process {child} did not end")


def crash_all_in_one(mode: Mode, scenario: str, when: str, point: int) -> dict[str, Any]:
    killed = reap(
        fork(lambda: work_until_ended(mode, scenario, NAMES, KilledStore(PATH, when, point)))
    )
    before = looked_at() if killed else {}
    again = reap(fork(lambda: work_until_ended(mode, scenario, NAMES, None)))
    return {"killed": killed, "again": again, "before": before, "after": looked_at()}


def crash_one_of_many(
    mode: Mode, scenario: str, when: str, point: int, victim: str
) -> dict[str, Any]:
    others = {
        name: fork(lambda name=name: work_until_ended(mode, scenario, [name], None))
        for name in NAMES
        if name != victim
    }
    asker = fork(lambda: ask(mode, scenario))
    doomed = fork(
        lambda: work_until_ended(mode, scenario, [victim], KilledStore(PATH, when, point))
    )
    try:
        killed, asked = 0, None
        while killed == 0 and asked is None:
            found, status = os.waitpid(doomed, os.WNOHANG)
            killed = os.waitstatus_to_exitcode(status) if found else 0
            found, status = os.waitpid(asker, os.WNOHANG)
            asked = os.waitstatus_to_exitcode(status) if found else None
            time.sleep(0.002)
        before = looked_at() if killed else {}
        if killed:
            others[victim] = fork(lambda: work_until_ended(mode, scenario, [victim], None))
        else:
            others[victim] = doomed
        again = asked if asked is not None else reap(asker)
    finally:
        for child in others.values():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return {"killed": killed, "again": again, "before": before, "after": looked_at()}


# -- looking -----------------------------------------------------------------------------------


def looked_at() -> dict[str, Any]:
    """What the store and the outside record hold now, read by SQL and not by the engine."""
    db = apsw.Connection(PATH)
    db.set_busy_timeout(10_000)

    def rows(sql: str) -> list[Any]:
        return [list(row) for row in db.execute(sql)]

    try:
        if not rows("SELECT 1 FROM sqlite_schema WHERE name = 'log'"):
            return {"executions": [], "known": []}
        home = [e for (body,) in rows(HOME_JOURNAL) for e in decode_chunk(body.encode())]
        every = [(run, e) for run, body in rows(JOURNALS) for e in decode_chunk(body.encode())]
        for run, body in rows("SELECT run, body FROM log WHERE kind = 'baton'"):
            entries = decode_chunk(bytes(decode_baton(body.encode()).entries))
            every += [(run, entry) for entry in entries]
        known = {f"{run}#{e.op}" for run, e in every if e.what in ("done", "failed")}
        replies = [unpack(Reply, body.encode()) for (body,) in rows(REPLIES)]
        known |= {f"{reply.run}#{reply.op}" for reply in replies}
        issued = [mark for entry in home for mark in entry.issued]
        return {
            "executions": executions(),
            "known": sorted(known),
            "entries": [describe(entry, issued) for entry in home],
            "children": rows("SELECT status FROM runs WHERE id != 'r-1' AND service = home"),
            "runs": rows(
                "SELECT service, status, undone, holder FROM runs WHERE id = 'r-1' ORDER BY no"
            ),
            "doubled": rows(
                "SELECT id, receiver, count(*) FROM log WHERE kind = 'baton'"
                " GROUP BY id, receiver HAVING count(*) > 1"
            ),
            "unmarked": rows(UNMARKED),
            "parked": rows("SELECT id FROM parked"),
            "mail": rows("SELECT id FROM mailbox"),
            "books": rows("SELECT what, sku FROM books") if rows(HAS_BOOKS) else [],
        }
    finally:
        db.close()


HOME_JOURNAL = """
SELECT journal.body FROM journal JOIN runs ON runs.no = journal.run
WHERE runs.service = runs.home AND runs.id = 'r-1' ORDER BY journal.seq
"""
JOURNALS = "SELECT runs.id, journal.body FROM journal JOIN runs ON runs.no = journal.run"
REPLIES = "SELECT body FROM log WHERE kind = 'reply'"
HAS_BOOKS = "SELECT 1 FROM sqlite_schema WHERE name = 'books'"
UNMARKED = """
SELECT id, kind, receiver FROM log WHERE kind IN ('baton', 'command')
AND NOT EXISTS (SELECT 1 FROM inbox WHERE inbox.id = log.id AND inbox.service = log.receiver)
"""
"""Messages whose effect has no mark: none may be left once the run has ended."""


def describe(entry: Entry, issued: list[str]) -> list[Any]:
    return [entry.what, entry.op, issued[entry.op] if entry.op >= 0 else ""]


def executions() -> list[Any]:
    path = Path(RECORD)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(scenario: str, mode: Mode, layout: str, when: str, folder: str) -> None:
    for point in range(1, 100):
        place = Path(folder, str(point))
        place.mkdir()
        os.chdir(place)
        if layout == "one":
            found = crash_all_in_one(mode, scenario, when, point)
        else:
            found = crash_one_of_many(mode, scenario, when, point, layout)
        print(json.dumps({"point": point, **found}), flush=True)
        if not found["killed"]:
            return
    raise AssertionError("the run never ended")


if __name__ == "__main__":
    main(*sys.argv[1:])  # pyright: ignore
