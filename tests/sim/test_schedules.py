"""Invariant 4 for schedules: each nominal time once, whatever dies."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from pavane.testing.sim.simulation import Simulation
from tests.sim.calendar import Calendar

SEEDS = 60


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_each_second_has_one_run_through_every_storm() -> None:
    outcomes = [Simulation(Calendar(), seed, "orchestration").run() for seed in range(SEEDS)]
    assert not [(outcome.seed, outcome.violation) for outcome in outcomes if outcome.violation]
