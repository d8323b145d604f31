"""The checkers themselves: each of them finds what it is there for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import msgspec
import pytest

from pavane.engine.session import Session
from pavane.stores.port import Commit, RunRow
from pavane.testing.sim.checks import Violation, check_results, check_same_requests
from pavane.testing.sim.outside import Outside
from pavane.testing.sim.process import here
from pavane.testing.sim.simulation import Simulation
from pavane.testing.sim.storm import calm
from tests.sim.bank import Bank
from tests.sim.storms import MODES, storm


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def played() -> Simulation:
    simulation = Simulation(Bank(), 1, "choreography", storm=calm(3))
    assert not simulation.run().violation
    return simulation


def completed(simulation: Simulation) -> RunRow:
    data: Any = simulation.database.root._data
    return next(r for r in data.runs.values() if r.service == r.home and r.status == "completed")


def test_a_step_that_is_done_again_after_its_result_is_found() -> None:
    """Invariant 1."""
    act = Outside.act

    def repeated(self: Outside, what: str, key: str, *args: Any, effect: Callable[[], Any]) -> Any:
        answer = act(self, what, key, *args, effect=effect)
        process = here.get()
        assert process is not None
        process.loop.call_later(1.0, lambda: act(self, what, key, *args, effect=effect))
        return answer

    with patch.object(Outside, "act", repeated):
        found = [storm("bank", seed, mode).violation for seed in range(5) for mode in MODES]
    assert any("again" in violation for violation in found), found


def test_a_step_that_is_done_where_its_service_is_not_hosted_is_found() -> None:
    with patch.object(Session, "hosts", lambda self, service: True):
        found = [storm("bank", seed, "orchestration").violation for seed in range(20)]
    assert any("does not host" in violation for violation in found), found


def test_another_request_under_the_same_key_is_found(played: Simulation) -> None:
    """Invariant 1."""
    check_same_requests(played.outside)
    first = played.outside.requests[0]
    other = msgspec.structs.replace(first, args=("other",))
    with (
        patch.object(played.outside, "requests", [first, other]),
        pytest.raises(Violation, match="and then for"),
    ):
        check_same_requests(played.outside)


def test_a_run_that_ends_twice_is_found(played: Simulation) -> None:
    """Invariant 3."""
    row = completed(played)
    played.ledger._check_ends(Commit(runs=[row]))
    assert played.ledger.wrong == []
    played.ledger._check_ends(Commit(runs=[msgspec.structs.replace(row, status="failed")]))
    assert "ended as" in played.ledger.wrong.pop()


def test_a_result_that_is_not_what_the_journal_gives_is_found(played: Simulation) -> None:
    """Invariant 3."""
    check_results(played.database, played.scenario.app)
    row = completed(played)
    with (
        patch.object(row, "result", b'"another"'),
        pytest.raises(Violation, match="its journal gives"),
    ):
        check_results(played.database, played.scenario.app)
