"""Runs whose worker is killed at one durable point, for `test_crash_points`.

`python -m tests.integration.crash_points SCENARIO MODE LAYOUT WHEN FOLDER` does this for every
point in turn, until the run ends without a kill, and prints one line of JSON for each.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable
from typing import Any

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
from pavane.stores.sqlite import SqliteStore
from tests.integration.killing import (
    DEADLINE_S,
    Scenario,
    crash_everywhere,
    reading,
    record,
    recorded,
)
from tests.integration.world import PATIENT_S

NAMES = ("orders", "payments", "stock", "shipping")
orders, payments, stock, shipping = services = [Service(name) for name in NAMES]


def record_step() -> None:
    info = step_info()
    record(info.step, info.idempotency_key, info.attempt)


@payments.step
async def charge(cents: int) -> str:
    record_step()
    return f"payment of {cents}"


@payments.step
async def refund(payment: str) -> None:
    record_step()


@stock.step
async def reserve(sku: str) -> str:
    record_step()
    return f"parcel of {sku}"


@stock.step
async def release(parcel: str) -> None:
    record_step()


@orders.step
async def note(text: str) -> str:
    record_step()
    return text


@orders.step
async def unnote(text: str) -> None:
    record_step()


@shipping.step
async def ship(parcel: str) -> str:
    record_step()
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


# -- driving -----------------------------------------------------------------------------------


def app_on(store: SqliteStore | str) -> App:
    return App("shop", services=services, store=store, config=EngineConfig(lease_s=PATIENT_S))


async def start_and_await(client: Client, mode: Mode, scenario: str) -> None:
    flow = {"saga": fulfil, "talk": talk, "books": settle}[scenario]
    run = await client.start(flow, "book", id="r-1", mode=mode)
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


# -- looking -----------------------------------------------------------------------------------


def looked_at() -> dict[str, Any]:
    """What the store and the outside record hold now, read by SQL and not by the engine."""
    with reading() as rows:
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
            "executions": recorded(),
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


def main(scenario: str, mode: Mode, layout: str, when: str, folder: str) -> None:
    def drive(client: Client) -> Awaitable[None]:
        return start_and_await(client, mode, scenario)

    crash_everywhere(Scenario(NAMES, app_on, drive, looked_at), layout, when, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])  # pyright: ignore
