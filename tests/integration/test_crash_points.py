"""Runs that are killed by SIGKILL at every durable point of their life, and what is left of them.

One is a saga whose last step fails. Another one hears two events, has a child run, sleeps, is
cancelled and cleans up. The third is a saga whose steps and compensation are transactions.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from tests.integration.crash_points import NAMES
from tests.integration.killing import crash_reports

UNDONE = ["release", "unnote", "refund"]
ORDERS = {"saga": UNDONE, "talk": ["refund", "unnote"], "books": []}
"""What is cleaned up, in which order; transactions leave no trace outside of the store."""
LAYOUTS = {"saga": NAMES, "talk": ("orders",), "books": ("orders", "payments")}
CHECKS = {
    "saga": lambda *found: check_saga(*found),
    "talk": lambda *found: check_talk(*found),
    "books": lambda *found: check_books(*found),
}
CASES = [
    (scenario, mode, layout, when)
    for scenario in ("saga", "talk", "books")
    for layout in ("one", *LAYOUTS[scenario])
    for mode in ("orchestration", "choreography")
    for when in ("before", "after")
]

Case = tuple[str, str, str, str]
Crashes = dict[Case, Future[list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def crashes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crashes]:
    with crash_reports("tests.integration.crash_points", CASES, tmp_path_factory) as reports:
        yield reports


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_kill_between_any_two_durable_points_loses_and_doubles_nothing(
    crashes: Crashes, case: Case
) -> None:
    """Invariants 1, 2, 3, 5, 7, 9, 10."""
    found = crashes[case].result()
    kills = [one for one in found if one["killed"]]
    assert len(kills) >= (8 if case[2] == "one" else 1)
    for one in found:
        where = f"point {one['point']}"
        assert one["killed"] in (0, -9), where
        assert one["again"] == 0, where
        check_nothing_left(one["after"], where)
        CHECKS[case[0]](one["after"], where)
        if one["killed"]:
            check_executions(case[0], one["before"], one["after"], where)


def check_nothing_left(after: dict[str, Any], where: str) -> None:
    assert after["doubled"] == [], where
    assert after["unmarked"] == [], where
    assert (after["parked"], after["mail"]) == ([], []), where
    assert {run[1] for run in after["runs"] if run[0] != "orders"} <= {"passed"}, where


def check_talk(after: dict[str, Any], where: str) -> None:
    """Each event, the child's result and the cancel count once; the clean-up is done."""
    assert after["runs"][0][:2] == ["orders", "cancelled"], where
    assert after["children"] == [["completed"]], where
    assert [(entry[0], entry[2].rpartition(" ")[2]) for entry in after["entries"]] == [
        ("start", ""),
        ("done", "payments.charge"),
        ("received", "orders.Told"),
        ("received", "orders.Told"),
        ("done", "orders.note"),
        ("done", "stock.count"),
        ("cancel", ""),
        ("done", "payments.refund"),
        ("done", "orders.unnote"),
    ], where


def check_books(after: dict[str, Any], where: str) -> None:
    """Each row that a transaction wrote is there once, whatever became of its reply."""
    home = [run for run in after["runs"] if run[0] == "orders"]
    assert [run[1:3] for run in home] == [["failed", 1]], where
    books = [" ".join(row) for row in after["books"]]
    both = sorted(books[2:4])
    assert [*books[:2], *both, *books[4:]] == [
        "debit book", "file book", "file book taken", "take book", "credit book"
    ], where  # fmt: skip
    done = [entry[0] for entry in after["entries"]]
    assert done == ["start", *["done"] * 4, "failed", "done"], where


def check_saga(after: dict[str, Any], where: str) -> None:
    """One outcome; compensated once each, in reverse."""
    home = [run for run in after["runs"] if run[0] == "orders"]
    assert [run[1:3] for run in home] == [["failed", 3]], where
    results = [entry for entry in after["entries"] if entry[0] in ("done", "failed")]
    assert [what.partition(".")[2] for _, _, what in results] == [
        "charge", "note", "reserve", "ship", *UNDONE
    ], where  # fmt: skip
    assert [entry[0] for entry in after["entries"]] == [
        "start", "done", "done", "done", "fired", "failed", "done", "done", "done"
    ], where  # fmt: skip


def check_executions(
    scenario: str, before: dict[str, Any], after: dict[str, Any], where: str
) -> None:
    """A journalled result is not executed again; each step's key never changes; order holds."""
    keys: dict[str, set[str]] = {}
    counts: dict[str, int] = {}
    for _, step, key, _ in after["executions"]:
        keys.setdefault(step, set()).add(key)
        counts[step] = counts.get(step, 0) + 1
    assert all(len(known) == 1 for known in keys.values()), where
    assert all(count <= 2 for count in counts.values()), (where, counts)
    assert sum(count - 1 for count in counts.values()) <= 1, (where, counts)
    later = after["executions"][len(before["executions"]) :]
    journalled = set(before["known"])
    assert not journalled & {key for _, _, key, _ in later}, where
    order = list(dict.fromkeys(step for _, step, _, _ in after["executions"] if step in UNDONE))
    assert order == ORDERS[scenario], where
