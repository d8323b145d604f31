"""Real input: all recorded incidents, replayed in both modes, each equal to its record."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from bench.figures import Figure
from examples.incidents import read_incidents, replay
from pavane.core.operations import Mode

DATA = "PAVANE_INCIDENTS"
BESIDE = Path(__file__).parents[2] / "shared" / "data" / "incidents.jsonl.gz"
MODES: tuple[Mode, ...] = ("orchestration", "choreography")


async def incidents(folder: Path) -> list[Figure]:
    """Cases per second over all 7,554 recorded incidents, and how many equal their record."""
    path = Path(os.environ.get(DATA, BESIDE))
    if not path.exists():
        print(f"skipped: no incident file (set ${DATA} to its path)", file=sys.stderr)
        return []
    cases = read_incidents(path)
    figures: list[Figure] = []
    for mode in MODES:
        report = await replay(cases, mode, str(folder / f"{mode}.db"))
        equal = report.cases - len(report.different)
        per_s = report.cases / report.seconds
        figures.append(Figure(f"incidents, {mode}", per_s, "cases/s"))
        wanted = f"= {report.cases:,}"
        figures.append(Figure(f"incidents equal, {mode}", equal, "cases", wanted=wanted))
        if report.different:
            raise SystemExit(f"{len(report.different)} cases differ from their record in {mode}")
    return figures
