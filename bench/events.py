"""Events: `events` (a chain of handlers), `publish`, `fanout`, `backlog`, `mailbox`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from bench.figures import Figure, against, p50, rss_mb
from bench.raw import commit_s, rows_per_s, task_us
from pavane import App, Client, Event, Service, receive
from pavane.stores.eventlog import EventRow
from pavane.stores.port import LAST_US, Commit

LINKS = 5
CHAIN = 10_000
CALLERS = 500
PUBLISHES = 20_000
FANOUT = 50
BACKLOG = 1_000_000
SAMPLE = 100_000
RACES = 10_000
ROW_BYTES = 190
BATCH = 200
TASKS_AN_EVENT = "≤ 11.5 x"
"""15,000 events/s where an asyncio task takes 5.8 us; see `bench/steps.py`."""


class Link0(Event, key="key"):
    key: str
    note: str


class Link1(Link0, key="key"): ...


class Link2(Link0, key="key"): ...


class Link3(Link0, key="key"): ...


class Link4(Link0, key="key"): ...


class Link5(Link0, key="key"): ...


KINDS = [Link0, Link1, Link2, Link3, Link4, Link5]
NOTE = "x" * 60


class Count:
    """How many were handled, and a future for when that is enough."""

    def __init__(self) -> None:
        self.done = 0
        self._enough = 0
        self._future: asyncio.Future[None] | None = None

    def add(self) -> None:
        self.done += 1
        if self.done == self._enough and self._future is not None:
            self._future.set_result(None)

    async def until(self, count: int) -> None:
        """Return when `count` more were handled than at the call."""
        self._enough = self.done + count
        self._future = asyncio.get_running_loop().create_future()
        await self._future


def _chain(folder: Path, name: str, count: Count) -> App:
    """Return an app of five services, each of which answers an event with the next."""
    services: list[Service] = []
    for number in range(LINKS):
        service = Service(f"link{number}")
        here, following = KINDS[number], KINDS[number + 1]
        last = number == LINKS - 1

        async def pass_on(
            event: Link0, following: type[Link0] = following, last: bool = last
        ) -> Link0:
            if last:
                count.add()
            return following(key=event.key, note=event.note)

        service.on(here, emits=[following])(_one_argument(pass_on))
        services.append(service)
    return App("chain", services, store=str(folder / f"{name}.db"))


def _one_argument(fn: Callable[..., object]) -> Callable[[Link0], object]:
    async def handler(event):  # type: ignore[no-untyped-def]
        return await fn(event)  # type: ignore[misc]

    return handler


async def _publish(app: App | Client, kind: type[Link0], count: int, keys: int) -> float:
    numbers = iter(range(count))

    async def caller() -> None:
        for number in numbers:
            await app.publish(kind(key=f"k{number % keys}", note=NOTE))  # type: ignore[call-arg]

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return time.perf_counter() - began


async def events(folder: Path) -> list[Figure]:
    """Events/s through a chain of five services, and its latency when nothing else happens."""
    raw = rows_per_s(folder, BATCH, ROW_BYTES)
    raw_ms = commit_s(folder, ROW_BYTES) * (LINKS + 1) * 1e3
    count = Count()
    async with _chain(folder, "chain", count) as app:
        task = [await task_us()]
        took: list[float] = []
        for number in (1000, CHAIN, CHAIN, CHAIN):
            began = time.perf_counter()
            done = asyncio.ensure_future(count.until(number))
            await _publish(app, Link0, number, number)
            await done
            took.append(time.perf_counter() - began)
        task.append(await task_us())
        times: list[float] = []
        for number in range(500):
            began = time.perf_counter()
            done = asyncio.ensure_future(count.until(1))
            await app.publish(Link0(key=f"l{number}", note=NOTE))
            await done
            times.append((time.perf_counter() - began) * 1e3)
    rate = LINKS * CHAIN / min(took[1:])
    return [
        against("events, chain of five", rate, "events/s", raw, "≥ 15,000"),
        against("one event, in asyncio tasks", 1e6 / rate, "us", mean(task), TASKS_AN_EVENT),
        against("events, unloaded chain p50", p50(times[50:]), "ms", raw_ms, "≤ 7.5 ms"),
    ]


async def publish(folder: Path) -> list[Figure]:
    """Durable publishes per second, from 500 callers."""
    raw = rows_per_s(folder, BATCH, ROW_BYTES)
    app = App("publish", [Service("quiet")], store=str(folder / "publish.db"))
    async with app:
        await _publish(app, Link0, 1000, 1000)
        took = min([await _publish(app, Link0, PUBLISHES, PUBLISHES) for _ in range(3)])
    return [against("publish, durable", PUBLISHES / took, "events/s", raw, "≥ 20,000")]


def _fans(folder: Path, name: str, handlers: int, count: Count) -> App:
    services: list[Service] = []
    for number in range(handlers):
        service = Service(f"fan{number}")

        async def take(event: Link0) -> None:
            count.add()

        service.on(Link0)(take)
        services.append(service)
    return App(name, services, store=str(folder / f"{name}.db"))


async def _delivery_s(folder: Path, name: str, handlers: int, events: int) -> float:
    """Return the seconds of processor time and waiting that one delivery costs."""
    count = Count()
    async with _fans(folder, name, handlers, count) as app:
        best = 1e9
        for number in (events // 10, events, events, events):
            began = time.perf_counter()
            done = asyncio.ensure_future(count.until(number * handlers))
            await _publish(app, Link0, number, number)
            await done
            best = min(best, (time.perf_counter() - began) / (number * handlers))
    return best


async def fanout(folder: Path) -> list[Figure]:
    """What a delivery costs when one event goes to 50 handlers, against one to one."""
    one = await _delivery_s(folder, "one", 1, 10_000)
    many = await _delivery_s(folder, "many", FANOUT, 400)
    return [against("fanout, a delivery to one of 50", many * 1e6, "µs", one * 1e6, "ratio ≤ 1.2")]


async def _fill(client: Client, events: int) -> None:
    """Put events into the log, a thousand a commit."""
    store, now = client.store, client.store.now_us()
    for first in range(0, events, 1000):
        commit = Commit(lambda error: None)
        commit.events = [
            EventRow(
                f"{now:014x}{number:08x}", "Link0", 1, f"k{number}", "bench", now,
                f"{now:014x}{number:08x}", "", "", b'{"key":"k%d","note":"%s"}' % (
                    number, NOTE.encode()
                ), store.slot_of(f"k{number}", ""),
            )
            for number in range(first, first + 1000)
        ]  # fmt: skip
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        store.submit([commit], None, lambda _, f=written: f.set_result(None))
        await written


async def _drained(folder: Path, name: str, waiting: int) -> tuple[float, float]:
    """Return events/s over the first sample of a backlog, and by how many MB memory grew."""
    count = Count()
    app = _fans(folder, name, 1, count)
    async with app.connect() as client:
        (row,) = await client.store.handler_rows()
        await client.store.pause_handler(row.no, LAST_US, "benchmark")
        await _fill(client, waiting)
        await client.store.pause_handler(row.no, 0, "")
    before = rss_mb()
    peak = before
    async with app:
        await count.until(1000)
        began = time.perf_counter()
        for _ in range(9):
            await count.until(SAMPLE // 10)
            peak = max(peak, rss_mb())
        took = time.perf_counter() - began
    return SAMPLE * 0.9 / took, peak - before


async def backlog(folder: Path) -> list[Figure]:
    """Events/s with a million waiting, against a log with a tenth of that, and memory."""
    few, _ = await _drained(folder, "few", SAMPLE + 1000)
    rate, grew_mb = await _drained(folder, "many", BACKLOG)
    return [
        against("backlog, a million waiting", rate, "events/s", few, "ratio ≥ 0.8"),
        against("backlog, memory it takes", grew_mb, "MB", 0.0, "flat"),
    ]


async def mailbox(folder: Path) -> list[Figure]:
    """Runs/s that wait for an event published at the same instant; none may be lost."""
    home = Service("home")

    @home.workflow(receives=[Link0])
    async def wait(key: str) -> str:
        return (await receive(Link0, key=key)).key

    app = App("mailbox", [home], store=str(folder / "mailbox.db"))
    numbers = iter(range(RACES))
    met = 0
    async with app:

        async def racer() -> None:
            nonlocal met
            for number in numbers:
                key = f"k{number}"
                run, _ = await asyncio.gather(
                    app.start(wait, key), app.publish(Link0(key=key, note=NOTE))
                )
                result = await run.result(timeout=60)
                met += result == key

        began = time.perf_counter()
        await asyncio.gather(*(racer() for _ in range(CALLERS)))
        took = time.perf_counter() - began
    if met != RACES:
        raise AssertionError(f"{RACES - met} of {RACES} runs never got their event")
    return [Figure("mailbox, events met by their runs", RACES / took, "runs/s")]
