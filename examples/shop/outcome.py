"""What became of the demo's orders: the figures of each form, and everything that is not right.

A run's status, or the event that ended an order, says what Pavane thinks; the world's records say
what really happened. Both must agree, for every single order.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import apsw

from examples.shop.reactions import OrderCancelled
from examples.shop.services import OrderShipped
from examples.shop.world import World
from pavane import RunStatus
from pavane.stores.eventlog import EventRow

Form = Literal["orchestration", "choreography", "events"]
FORMS: tuple[Form, ...] = ("orchestration", "choreography", "events")

What = Literal["shipped", "cancelled", "neither"]
WHAT: dict[str, What] = {"completed": "shipped", "failed": "cancelled"}

ENDED = ("completed", "failed", "cancelled", "killed", "stuck")


@dataclass(frozen=True)
class Ending:
    """How an order ended, as Pavane tells it; `said` is the reason if it was neither of the two."""

    id: str
    form: Form
    what: What
    took_ms: float
    hops: int = 0
    said: str = ""


def run_ending(status: RunStatus, form: Form) -> Ending | None:
    """Return how the run of an order ended, None if it has not."""
    if status.status not in ENDED:
        return None
    took_ms = ((status.ended_us or status.started_us) - status.started_us) / 1000
    what: What = WHAT.get(status.status, "neither")
    said = f"{status.status} {status.reason}" if what == "neither" else ""
    return Ending(status.id, form, what, took_ms, status.hops, said)


def event_endings(placed: Mapping[str, int], last: Sequence[EventRow]) -> list[Ending]:
    """Return how the orders that events were to fulfil ended, by the events that say so.

    `placed` tells when each of them was placed, in microseconds since the epoch.
    """
    endings: dict[str, Ending] = {}
    for row in last:
        if row.key not in placed:
            continue  # a run published it
        took_ms = (row.at_us - placed[row.key]) / 1000
        if row.key in endings:
            said = f"ended twice: {endings[row.key].what}, {row.type}"
            endings[row.key] = Ending(row.key, "events", "neither", took_ms, said=said)
        elif row.type == OrderShipped.event_type:
            endings[row.key] = Ending(row.key, "events", "shipped", took_ms)
        elif row.type == OrderCancelled.event_type:
            endings[row.key] = Ending(row.key, "events", "cancelled", took_ms)
    return list(endings.values())


# -- figures -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """What there is to compare of one form."""

    orders: int
    shipped: int
    compensated: int
    declined: int
    hops: float
    messages: float
    events: float
    median_ms: float
    p99_ms: float
    again: int


@dataclass(frozen=True)
class Traffic:
    """What each order sent between services: rows of the store's two logs."""

    messages: Mapping[str, int]
    events: Mapping[str, int]


def traffic(store: Path) -> Traffic:
    by_run = "SELECT run, count(*) FROM log WHERE run <> '' GROUP BY run"
    by_key = "SELECT key, count(*) FROM events GROUP BY key"
    return Traffic(_counts(store, by_run), _counts(store, by_key))


def _counts(store: Path, sql: str) -> dict[str, int]:
    db = apsw.Connection(str(store), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        db.set_busy_timeout(5000)
        return dict(db.execute(sql))
    finally:
        db.close()


def figures(endings: Sequence[Ending], sent: Traffic, world: World) -> Figures:
    """Sum up the orders of one form, of which there is at least one."""
    times = sorted(ending.took_ms for ending in endings)
    cancelled = [ending for ending in endings if ending.what == "cancelled"]
    undone = world.happened("refunded").keys() | world.happened("released").keys()
    again = world.executed_again()
    return Figures(
        orders=len(endings),
        shipped=sum(ending.what == "shipped" for ending in endings),
        compensated=sum(ending.id in undone for ending in cancelled),
        declined=sum(ending.id not in undone for ending in cancelled),
        hops=statistics.fmean(ending.hops for ending in endings),
        messages=statistics.fmean(sent.messages.get(ending.id, 0) for ending in endings),
        events=statistics.fmean(sent.events.get(ending.id, 0) for ending in endings),
        median_ms=statistics.median(times),
        p99_ms=times[max(0, round(len(times) * 0.99) - 1)],
        again=sum(again.get(ending.id, 0) for ending in endings),
    )


# -- what is wrong -----------------------------------------------------------------------------

SHIPPED = {"charged": 1, "refunded": 0, "reserved": 1, "released": 0, "shipped": 1}


def wrongs(ids: Sequence[str], endings: Collection[Ending], world: World) -> list[str]:
    """Say of each order what is wrong with it; nothing if it was shipped or wholly undone."""
    by_id = {ending.id: ending for ending in endings}
    done = {kind: world.happened(kind) for kind in SHIPPED}
    found: list[str] = []
    for id in ids:
        times = {kind: done[kind].get(id, 0) for kind in SHIPPED}
        wrong = _wrong(by_id.get(id), times)
        if wrong:
            found.append(f"{id} {wrong}")
    return found


def _wrong(ending: Ending | None, times: dict[str, int]) -> str:
    if ending is None:
        return f"has not ended, and the world has {times}"
    if ending.what == "neither":
        return f"has not ended well: {ending.said}"
    if ending.what == "shipped":
        return "" if times == SHIPPED else f"is said to be shipped, but the world has {times}"
    undone = times["refunded"] >= times["charged"] and times["released"] >= times["reserved"]
    if times["shipped"] or times["charged"] > 1 or not undone:
        return f"is said to be undone, but the world has {times}"
    return ""
