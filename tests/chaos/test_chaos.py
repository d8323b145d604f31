"""Invariants 1 to 7 and 9 to 11 with real processes; `python -m tests.chaos` goes on for longer."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.chaos import Chaos, Plan


def test_nodes_on_one_file_may_be_killed_and_frozen(tmp_path: Path) -> None:
    outcome = Chaos(Plan(orders=1500, seconds=20.0), tmp_path).run()
    assert not outcome.violations, str(outcome)
    assert sum(outcome.faults.values()) >= 3, "it was quiet"
