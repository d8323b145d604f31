"""Invariants 1 to 7 and 9 to 11 with real processes; `python -m tests.chaos` goes on for longer."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.chaos import Chaos, Plan
from tests.chaos.grounds import OneFile, OnePostgres


def test_nodes_on_one_file_may_be_killed_and_frozen(tmp_path: Path) -> None:
    outcome = Chaos(Plan(orders=1500, seconds=20.0), tmp_path, OneFile(tmp_path)).run()
    assert not outcome.violations, str(outcome)
    assert len(outcome.faults) >= 3, "it was quiet"


def test_nodes_on_postgres_may_be_killed_and_frozen_and_cut_off(tmp_path: Path) -> None:
    plan = Plan(orders=3000, seconds=90.0)
    outcome = Chaos(plan, tmp_path, OnePostgres(tmp_path, plan.nodes, outage_s=10.0)).run()
    assert not outcome.violations, str(outcome)
    assert len(outcome.faults) >= 30, "it was quiet"
