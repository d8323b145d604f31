"""The simulator: how much happens in it in a second, on one core."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from bench.figures import Figure
from pavane.testing.sim.clock import Clock, SimLoop
from pavane.testing.sim.simulation import Simulation
from pavane.testing.sim.storm import draw_storm
from pavane.testing.sim.trace import Trace
from tests.sim.shop import Shop, services
from tests.sim.storms import MODES, be_quiet

PROCESSES = 3
TASKS = 10
CALLBACKS = 400_000
STORMS = 200
NODES = 3


async def simulator(folder: Path) -> list[Figure]:
    """Callbacks of three processes that merely go on; storms over the shop, in both modes."""
    be_quiet()
    return [_callbacks(), *_storms()]


def _callbacks() -> Figure:
    clock = Clock(1, Trace())
    for number in range(PROCESSES):
        loop = SimLoop(clock, number)
        for _ in range(TASKS):
            loop.create_task(_go_on())
    began_s = time.process_time()
    clock.run(lambda: clock.trace.callbacks >= CALLBACKS, 3600)
    spent_s = time.process_time() - began_s
    clock.close()
    return Figure(
        "callbacks, of the simulator alone", CALLBACKS / spent_s, "1/s", wanted="≥ 200,000"
    )


async def _go_on() -> None:
    while True:
        await asyncio.sleep(0)


def _storms() -> list[Figure]:
    seeds = [seed for seed in range(STORMS * 4) if _nodes(seed) == NODES][: STORMS // len(MODES)]
    for mode in MODES:  # once, to fill what is made only once
        Simulation(Shop(), seeds[0], mode).run()
    began_s, callbacks = time.process_time(), 0
    for seed in seeds:
        for mode in MODES:
            callbacks += Simulation(Shop(), seed, mode).run().callbacks
    spent_s = time.process_time() - began_s
    storms = len(seeds) * len(MODES)
    return [
        Figure("storms over a shop", storms / spent_s, "1/s"),
        Figure("callbacks of a storm", callbacks / storms, ""),
        Figure("storms of 500 callbacks", callbacks / spent_s / 500, "1/s", wanted="≥ 100"),
    ]


def _nodes(seed: int) -> int:
    return len(draw_storm(seed, len(services)).layout)
