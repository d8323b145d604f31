"""A benchmark's figure, and how figures are printed."""

from __future__ import annotations

import json
import resource
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """`value` in `unit`; `reference` is what it is compared with, measured in the same run.

    `wanted` is the bound the project set itself, as text.
    """

    bench: str
    value: float
    unit: str
    reference: float | None = None
    ratio: float | None = None
    wanted: str = ""


def against(bench: str, value: float, unit: str, reference: float, wanted: str = "") -> Figure:
    return Figure(bench, value, unit, reference, value / reference if reference else None, wanted)


def show(figures: Sequence[Figure], as_json: bool) -> None:
    for figure in figures:
        if as_json:
            row = {k: v for k, v in asdict(figure).items() if k != "wanted"}
            print(json.dumps(row), flush=True)
            continue
        text = f"{figure.bench:<34} {number(figure.value):>12} {figure.unit:<12}"
        if figure.reference is not None and figure.ratio is not None:
            text += f" reference {number(figure.reference):>12}  ratio {figure.ratio:6.2f}"
        if figure.wanted:
            text += f"  wanted {figure.wanted}"
        print(text, flush=True)


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.2f}"


def p50(values: Sequence[float]) -> float:
    return statistics.median(values)


def rss_mb() -> float:
    """Return this process's resident memory now, in MB."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)
