"""Services for tests that kill, stop and drain worker processes, and the process that runs them.

`python -m tests.integration.crew STORE RECORD LEASE_S [SERVICE …]` works until SIGTERM, and then
drains. What steps do is appended to the file RECORD, outside of the store.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from pavane import App, EngineConfig, Event, Limit, Retry, Service, heartbeat, receive, step_info

RECORD = Path("record.txt")
NARROW = 2
deck, galley = Service("deck"), Service("galley")
SERVICES = [deck, galley]


class Told(Event):
    text: str


def record(what: str) -> None:
    key = step_info().idempotency_key
    file = os.open(RECORD, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, json.dumps([what, key, os.getpid()]).encode() + b"\n")
    os.close(file)


def recorded(what: str = "") -> list[tuple[str, str, int]]:
    if not RECORD.exists():
        return []
    lines = [json.loads(line) for line in RECORD.read_text().splitlines()]
    return [(name, key, pid) for name, key, pid in lines if not what or name == what]


def most_executions() -> int:
    """How often the step that was executed most often was."""
    return max(Counter(key for _, key, _ in recorded()).values(), default=0)


@deck.step
async def tick(number: int) -> int:
    record("tick")
    return number


@galley.step
async def cook(number: int) -> int:
    record("cook")
    return number


@galley.step(limit=Limit(concurrency=NARROW))
async def squeeze(number: int, for_s: float) -> int:
    record("in")
    await asyncio.sleep(for_s)
    record("out")
    return number


def most_squeezed() -> int:
    """How many were in the narrow at once; one that was killed there is, until it comes again."""
    inside: set[str] = set()
    most = 0
    for what, key, _ in recorded():
        if what == "in":
            inside.add(key)
            most = max(most, len(inside))
        elif what == "out":
            inside.discard(key)
    return most


@galley.step
async def linger() -> str:
    """Wait for the file `go` beside the record."""
    record("linger")
    while not (RECORD.parent / "go").exists():
        await asyncio.sleep(0.005)
    return "went"


@galley.step(heartbeat="60s", retry=Retry(attempts=3, first="1ms"))
async def carry() -> Any:
    """Report how far it came, and then wait for the process to be killed."""
    if step_info().heartbeat_details is None:
        heartbeat({"at": 7})
        record("carry")
        await asyncio.sleep(60)
    return step_info().heartbeat_details


@galley.step
async def sink() -> None:
    record("sink")
    os._exit(9)


@galley.step
def sink_in_thread() -> None:
    record("sink")
    os._exit(9)


def _sink_in_transaction(connection: Any) -> None:
    record("sink")
    os._exit(9)


async def _sink_in_transaction_of_postgres(connection: Any) -> None:
    _sink_in_transaction(connection)


ON_POSTGRES = len(sys.argv) > 1 and "://" in sys.argv[1]
sink_in_transaction = galley.transaction(name="sink_in_transaction")(
    _sink_in_transaction_of_postgres if ON_POSTGRES else _sink_in_transaction
)


@deck.workflow
async def steady(count: int, pause_s: float) -> int:
    total = 0
    for number in range(count):
        total += await tick(number)
        total += await cook(number)
        await asyncio.sleep(pause_s)
    return total


@deck.workflow
async def narrow(number: int, for_s: float) -> int:
    return await squeeze(number, for_s)


@deck.workflow
async def naps(seconds: float) -> int:
    await asyncio.sleep(seconds)
    return await tick(1)


@deck.workflow
async def lingers() -> str:
    return await linger()


@deck.workflow
async def carries() -> Any:
    return await carry()


@deck.workflow
async def sinks(how: str) -> None:
    await {"async": sink, "thread": sink_in_thread, "transaction": sink_in_transaction}[how]()


@deck.workflow
async def sinks_at_once() -> None:
    os._exit(8)


@deck.workflow
async def sinks_after_a_timer() -> None:
    await asyncio.sleep(0.01)
    os._exit(8)


@deck.workflow(receives=[Told])
async def sinks_after_an_event() -> None:
    await receive(Told)
    os._exit(8)


@deck.workflow
async def sinks_after_a_step() -> None:
    await cook(1)
    os._exit(8)


@deck.workflow
async def sinks_after_a_child() -> None:
    await steady(1, 0.0)
    os._exit(8)


def app_on(store: str, lease_s: float) -> App:
    config = EngineConfig(lease_s=lease_s, grace_s=20.0)
    return App("crew", SERVICES, store=store, config=config)


async def main(store: str, lease_s: float, names: list[str]) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with app_on(store, lease_s).worker(names or None) as client:
        waits = [asyncio.ensure_future(wait) for wait in (stop.wait(), client.drained())]
        await asyncio.wait(waits, return_when="FIRST_COMPLETED")


if __name__ == "__main__":
    RECORD = Path(sys.argv[2])
    sys.modules["tests.integration.crew"] = sys.modules["__main__"]
    asyncio.run(main(sys.argv[1], float(sys.argv[3]), sys.argv[4:]))
