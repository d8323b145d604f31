"""A chain of handlers that is killed by SIGKILL at every durable point, and what is left of it.

Handlers with state, one in a transaction of the store, one that gives an event up, runs that an
event starts and that wait for another; every first event is published twice.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from tests.integration.chain_crashes import KEYS, ORDERS, POISON
from tests.integration.killing import crash_reports

LAYOUTS = ("one", "bank", "books", "desk")
CASES = [(layout, when) for layout in LAYOUTS for when in ("before", "after")]
SHIPPED = [n for n in range(ORDERS) if n != POISON]

Case = tuple[str, str]
Crashes = dict[Case, Future[list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def crashes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crashes]:
    with crash_reports("tests.integration.chain_crashes", CASES, tmp_path_factory) as reports:
        yield reports


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_kill_anywhere_in_a_chain_leaves_every_effect_once_and_in_order(
    crashes: Crashes, case: Case
) -> None:
    """Invariants 4, 6, 9, 10, 11."""
    found = crashes[case].result()
    assert len([one for one in found if one["killed"]]) >= (10 if case[0] == "one" else 2)
    for one in found:
        where = f"point {one['point']}"
        assert one["killed"] in (0, -9), where
        assert one["again"] == 0, where
        check_effects(one["after"], where)
        check_order(one["after"], where)
        check_calls(one["after"]["calls"], where)


def check_effects(after: dict[str, Any], where: str) -> None:
    """Each event was published once, each row written once; one event was given up."""
    published: dict[str, list[int]] = {}
    for kind, data in after["events"]:
        published.setdefault(kind, []).append(json.loads(data)["n"])
    assert {kind: sorted(numbers) for kind, numbers in published.items()} == {
        "Placed": list(range(ORDERS)),
        "Paid": list(range(ORDERS)),
        "Settled": list(range(ORDERS)),
        "Shipped": SHIPPED,
    }, where
    assert [n for (n,) in after["ledger"]] == list(range(ORDERS)), where
    assert after["dead"] == [["Paid", "ValueError: no truck", 2]], where
    assert after["parked"] == [], where
    assert [status for _, status in after["runs"]] == ["completed"] * len(SHIPPED), where


def check_order(after: dict[str, Any], where: str) -> None:
    """The state of each key holds every event of it, once, in the order of the log."""
    for service, expected in (("bank", range(ORDERS)), ("desk", SHIPPED)):
        states = sorted(handled for name, handled in after["states"] if name == service)
        by_key = [[n for n in expected if n % KEYS == key] for key in range(KEYS)]
        assert states == sorted(by_key), (where, service)


def check_calls(calls: list[Any], where: str) -> None:
    """A handler is called again only after a crash, always with the same key."""
    keys: dict[tuple[str, int], set[str]] = {}
    for _, name, n, key in calls:
        keys.setdefault((name, n), set()).add(key)
    assert all(len(known) == 1 for known in keys.values()), where
    counts = Counter((name, n) for _, name, n, _ in calls if n != POISON)
    assert all(count <= 2 for count in counts.values()), (where, counts)
