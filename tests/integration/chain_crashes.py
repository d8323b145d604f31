"""Kills a worker at one durable point of a chain of handlers, recovers, and reports what is there.

`python -m tests.integration.chain_crashes LAYOUT WHEN FOLDER` does this for every point in turn,
until all is done without a kill, and prints one line of JSON for each.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apsw
import msgspec

from pavane import App, Client, EngineConfig, Event, Retry, Service, delivery, receive
from pavane.stores.sqlite import SqliteStore
from tests.integration.crash_points import KilledStore, fork, reap

NAMES = ("desk", "bank", "depot", "books")
desk, bank, depot, books = services = [Service(name) for name in NAMES]
RECORD = "calls.txt"
PATH = "chain.db"
DEADLINE_S = 60.0
ORDERS = 6
KEYS = 2
POISON = 3
RETRY = Retry(attempts=2, first="5ms")


class Placed(Event, key="key"):
    key: str
    n: int


class Paid(Event, key="key"):
    key: str
    n: int


class Shipped(Event, key="key"):
    key: str
    n: int


class Settled(Event, key="n"):
    n: int


class Account(msgspec.Struct):
    handled: list[int] = []


def record(name: str, n: int) -> None:
    """Write down outside of the store that a handler was called."""
    line = json.dumps([os.getpid(), name, n, delivery().idempotency_key])
    file = os.open(RECORD, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line.encode() + b"\n")
    os.close(file)


@bank.on(Placed, state=Account, retry=RETRY)
async def charge(event: Placed, account: Account) -> Paid:
    record("charge", event.n)
    account.handled.append(event.n)
    return Paid(key=event.key, n=event.n)


@depot.on(Paid, retry=RETRY)
def ship(event: Paid) -> list[Shipped]:
    record("ship", event.n)
    if event.n == POISON:
        raise ValueError("no truck")
    return [Shipped(key=event.key, n=event.n)]


@books.on(Paid, transaction=True)
def book(event: Paid, connection: Any) -> Settled:
    connection.execute("CREATE TABLE IF NOT EXISTS ledger (n INT)")
    connection.execute("INSERT INTO ledger VALUES (?)", (event.n,))
    return Settled(n=event.n)


@desk.on(Shipped, state=Account)
async def tally(event: Shipped, account: Account) -> None:
    record("tally", event.n)
    account.handled.append(event.n)


@desk.workflow(starts_on=Shipped, receives=[Settled])
async def thank(event: Shipped) -> int:
    return (await receive(Settled, key=event.n)).n


def app_on(store: SqliteStore | None = None) -> App:
    return App("chain", services, store=store or PATH, config=EngineConfig(lease_s=5.0))


async def work(names: Sequence[str], store: SqliteStore | None) -> None:
    """Work for `names`; with all of them, also publish and wait for the end."""
    async with app_on(store).worker(names) as worker:
        if len(names) == len(NAMES):
            await publish_and_wait(worker)
        else:
            await asyncio.sleep(DEADLINE_S)


async def publish_and_wait(client: Client) -> None:
    """Publish every order twice, by the same ids, and wait until all that follows is done."""
    for n in range(ORDERS):
        for _ in range(2):
            await client.publish(Placed(key=f"k{n % KEYS}", n=n), source="test", id=f"p{n}")
    ends = time.monotonic() + DEADLINE_S
    while not is_done():
        assert time.monotonic() < ends, looked_at()
        await asyncio.sleep(0.005)


def is_done() -> bool:
    found = looked_at()
    return (
        len(found["dead"]) == 1
        and len(found["runs"]) == ORDERS - 1
        and all(status == "completed" for _, status in found["runs"])
        and len(found["ledger"]) >= ORDERS
        and sum(len(handled) for name, handled in found["states"] if name == "desk") >= ORDERS - 1
    )


async def ask() -> None:
    async with app_on().connect() as client:
        await publish_and_wait(client)


def looked_at() -> dict[str, Any]:
    """What the store holds, read by SQL and not by the engine."""
    db = apsw.Connection(PATH)
    db.set_busy_timeout(10_000)

    def rows(sql: str) -> list[Any]:
        return [list(row) for row in db.execute(sql)]

    try:
        tables = {name for (name,) in rows("SELECT name FROM sqlite_schema")}
        states = rows("SELECT service, body FROM states") if "states" in tables else []
        return {
            "events": rows("SELECT type, data FROM events") if "events" in tables else [],
            "states": [[name, json.loads(body)["handled"]] for name, body in states],
            "ledger": rows("SELECT n FROM ledger ORDER BY n") if "ledger" in tables else [],
            "dead": rows("SELECT type, cause, attempts FROM dead_letters") if states else [],
            "parked": rows("SELECT handler, pos FROM parked_events") if states else [],
            "runs": rows("SELECT id, status FROM runs WHERE service = home") if states else [],
        }
    finally:
        db.close()


def calls() -> list[Any]:
    path = Path(RECORD)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def crash_all_in_one(when: str, point: int) -> dict[str, Any]:
    killed = reap(fork(lambda: work(NAMES, KilledStore(PATH, when, point))))
    again = reap(fork(lambda: work(NAMES, None)))
    return {"killed": killed, "again": again, "after": looked_at(), "calls": calls()}


def crash_one_of_many(when: str, point: int, victim: str) -> dict[str, Any]:
    others = {name: fork(lambda name=name: work([name], None)) for name in NAMES if name != victim}
    asker = fork(ask)
    doomed = fork(lambda: work([victim], KilledStore(PATH, when, point)))
    try:
        killed, asked = 0, None
        while killed == 0 and asked is None:
            found, status = os.waitpid(doomed, os.WNOHANG)
            killed = os.waitstatus_to_exitcode(status) if found else 0
            found, status = os.waitpid(asker, os.WNOHANG)
            asked = os.waitstatus_to_exitcode(status) if found else None
            time.sleep(0.002)
        others[victim] = fork(lambda: work([victim], None)) if killed else doomed
        again = asked if asked is not None else reap(asker)
    finally:
        for child in others.values():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return {"killed": killed, "again": again, "after": looked_at(), "calls": calls()}


def main(layout: str, when: str, folder: str) -> None:
    for point in range(1, 200):
        place = Path(folder, str(point))
        place.mkdir()
        os.chdir(place)
        found = (
            crash_all_in_one(when, point)
            if layout == "one"
            else crash_one_of_many(when, point, layout)
        )
        print(json.dumps({"point": point, **found}), flush=True)
        if not found["killed"]:
            return
    raise AssertionError("it never ended")


if __name__ == "__main__":
    main(*sys.argv[1:])  # pyright: ignore
