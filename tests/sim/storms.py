"""Storms over every scenario, on all cores: `python -m tests.sim` and the tests run them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

from pavane.core.operations import Mode
from pavane.testing.sim.simulation import Outcome, Scenario, Simulation
from tests.sim.bank import Bank
from tests.sim.calendar import Calendar
from tests.sim.harbour import Harbour
from tests.sim.hasty import Hasty
from tests.sim.night import Night
from tests.sim.planted import Bug
from tests.sim.poison import Poison
from tests.sim.post import Post
from tests.sim.shop import Shop

MODES: tuple[Mode, ...] = ("orchestration", "choreography")
SCENARIOS: dict[str, type[Scenario]] = {
    "bank": Bank, "hasty": Hasty, "shop": Shop, "post": Post, "poison": Poison,
    "calendar": Calendar, "harbour": Harbour, "night": Night,
}  # fmt: skip
PROCESSES = 2
AT_ONCE = 20
"""Seeds that a process is given at a time."""


@dataclass(frozen=True)
class Broken:
    """A storm in which a promise was broken."""

    scenario: str
    seed: int
    mode: Mode
    violation: str

    def __str__(self) -> str:
        return (
            f"{self.scenario} {self.seed} {self.mode}: {self.violation}\n"
            f"  again: python -m tests.sim {self.scenario} --first {self.seed} --seeds 1 "
            f"--mode {self.mode} --trace"
        )


def storm(scenario: str, seed: int, mode: Mode, *, verbose: bool = False) -> Outcome:
    return Simulation(SCENARIOS[scenario](), seed, mode, verbose=verbose).run()


def broken(scenario: str, seed: int, mode: Mode) -> str:
    """Return which promise a storm broke; an error that stopped the customer is one, too."""
    try:
        return storm(scenario, seed, mode).violation
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Found:
    """Where a planted bug was found, and what it broke."""

    seed: int
    mode: Mode
    violation: str


def find(bug: Bug, seeds: int) -> Found | None:
    """Look for a planted bug in the storms of so many seeds, in both modes."""
    for seed in range(seeds):
        for mode in MODES:
            with bug.change():
                violation = broken(bug.scenario, seed, mode)
            if violation:
                return Found(seed, mode, violation)
    return None


def storms(
    scenarios: Sequence[str], modes: Sequence[Mode], seeds: range, processes: int = PROCESSES
) -> Iterator[tuple[int, list[Broken]]]:
    """Run every seed of every scenario and mode; yield how many storms are over and what broke."""
    parts = [
        (scenario, mode, seeds[at : at + AT_ONCE])
        for at in range(0, len(seeds), AT_ONCE)
        for scenario in scenarios
        for mode in modes
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=_begin) as pool:
        for part, broken in zip(parts, pool.map(_run, *zip(*parts, strict=True)), strict=True):
            yield len(part[2]), broken


def _run(scenario: str, mode: Mode, seeds: range) -> list[Broken]:
    found = ((seed, broken(scenario, seed, mode)) for seed in seeds)
    return [Broken(scenario, seed, mode, violation) for seed, violation in found if violation]


def _begin() -> None:
    """Begin a process of the pool: it ends with its parent, however that ends."""
    be_quiet()
    threading.Thread(
        target=_end_with, args=(multiprocessing.parent_process(),), daemon=True
    ).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def be_quiet() -> None:
    """Log nothing: nodes that lose their database say so a hundred times a storm."""
    logging.disable(logging.CRITICAL)
