"""What became of the demo's orders: the figures of each mode, and everything that is not right.

The run's status says what Pavane thinks; the world's records say what really happened. Both must
agree, for every single order.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import apsw

from examples.shop.world import World
from pavane import RunStatus


@dataclass(frozen=True)
class Figures:
    """What there is to compare of one mode."""

    orders: int
    shipped: int
    compensated: int
    declined: int
    hops: float
    messages: float
    median_ms: float
    p99_ms: float
    again: int


def messages_per_run(store: Path) -> dict[str, int]:
    """Count the messages that each run sent between services: rows of the store's log."""
    db = apsw.Connection(str(store), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        db.set_busy_timeout(5000)
        return dict(db.execute("SELECT run, count(*) FROM log WHERE run <> '' GROUP BY run"))
    finally:
        db.close()


def figures(
    statuses: Sequence[RunStatus], messages: Mapping[str, int], again: Counter[str]
) -> Figures:
    """Sum up the ended runs of one mode."""
    times = sorted(took_ms(status) for status in statuses)
    failed = [status for status in statuses if status.status == "failed"]
    return Figures(
        orders=len(statuses),
        shipped=sum(status.status == "completed" for status in statuses),
        compensated=sum(
            status.status == "failed" and status.compensated > 0 for status in statuses
        ),
        declined=sum(status.compensated == 0 for status in failed),
        hops=statistics.fmean(status.hops for status in statuses),
        messages=statistics.fmean(messages.get(status.id, 0) for status in statuses),
        median_ms=statistics.median(times),
        p99_ms=times[max(0, round(len(times) * 0.99) - 1)],
        again=sum(again[status.id] for status in statuses),
    )


def took_ms(status: RunStatus) -> float:
    return ((status.ended_us or status.started_us) - status.started_us) / 1000


def steps_again(world: World) -> Counter[str]:
    """Count, per run, the steps that a killed process may have left half done; see `World`."""
    # An idempotency key is the run's id, a "#" and the operation's number.
    return Counter(key.partition("#")[0] for key in world.executed_again())


def wrongs(ids: Sequence[str], statuses: Sequence[RunStatus], world: World) -> list[str]:
    """Say of each order what is wrong with it; nothing if it was shipped or wholly undone."""
    by_id = {status.id: status for status in statuses}
    kinds = ("charged", "refunded", "reserved", "released", "shipped")
    done = {kind: world.happened(kind) for kind in kinds}
    found: list[str] = []
    for id in ids:
        status = by_id.get(id)
        times = {kind: done[kind].get(id, 0) for kind in kinds}
        if status is None or status.status not in ("completed", "failed"):
            state = f"{status.status} {status.reason}" if status else "lost"
            found.append(f"{id} has not ended: {state}")
        elif status.status == "completed":
            if times != {"charged": 1, "refunded": 0, "reserved": 1, "released": 0, "shipped": 1}:
                found.append(f"{id} is said to be shipped, but the world has {times}")
        else:
            undone = times["refunded"] >= times["charged"] and (
                times["released"] >= times["reserved"]
            )
            if times["shipped"] or times["charged"] > 1 or not undone:
                found.append(f"{id} is said to be undone, but the world has {times}")
    return found
