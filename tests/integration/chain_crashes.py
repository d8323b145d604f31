"""A chain of handlers whose worker is killed at one durable point, for `test_chain_crashes`.

`python -m tests.integration.chain_crashes LAYOUT WHEN FOLDER` does this for every point in turn,
until all is done without a kill, and prints one line of JSON for each.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import msgspec

from pavane import App, Client, EngineConfig, Event, Retry, Service, delivery, receive
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

NAMES = ("desk", "bank", "depot", "books")
desk, bank, depot, books = services = [Service(name) for name in NAMES]
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


def record_call(name: str, n: int) -> None:
    record(name, n, delivery().idempotency_key)


@bank.on(Placed, state=Account, retry=RETRY)
async def charge(event: Placed, account: Account) -> Paid:
    record_call("charge", event.n)
    account.handled.append(event.n)
    return Paid(key=event.key, n=event.n)


@depot.on(Paid, retry=RETRY)
def ship(event: Paid) -> list[Shipped]:
    record_call("ship", event.n)
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
    record_call("tally", event.n)
    account.handled.append(event.n)


@desk.workflow(starts_on=Shipped, receives=[Settled])
async def thank(event: Shipped) -> int:
    return (await receive(Settled, key=event.n)).n


def app_on(store: SqliteStore | str) -> App:
    return App("chain", services, store=store, config=EngineConfig(lease_s=PATIENT_S))


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


def looked_at() -> dict[str, Any]:
    """What the store holds, read by SQL and not by the engine."""
    with reading() as rows:
        tables = {name for (name,) in rows("SELECT name FROM sqlite_schema")}
        states = rows("SELECT service, body FROM states") if "states" in tables else []
        return {
            "events": rows("SELECT type, data FROM events") if "events" in tables else [],
            "states": [[name, json.loads(body)["handled"]] for name, body in states],
            "ledger": rows("SELECT n FROM ledger ORDER BY n") if "ledger" in tables else [],
            "dead": rows("SELECT type, cause, attempts FROM dead_letters") if states else [],
            "parked": rows("SELECT handler, pos FROM parked_events") if states else [],
            "runs": rows("SELECT id, status FROM runs WHERE service = home") if states else [],
            "calls": recorded(),
        }


def main(layout: str, when: str, folder: str) -> None:
    crash_everywhere(Scenario(NAMES, app_on, publish_and_wait, looked_at), layout, when, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])  # pyright: ignore
