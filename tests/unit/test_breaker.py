"""The circuit breaker of a handler, by a clock that the test sets."""

from __future__ import annotations

import pytest

from pavane import BadDeclaration, Breaker
from pavane.engine.breaker import Circuit

POLICY = Breaker(window=4, failures=0.5, pause="10s", most="30s")


def opened(at_s: float = 0.0) -> Circuit:
    circuit = Circuit(POLICY)
    for ok in (True, True, False):
        assert not circuit.record(ok, at_s)
    assert circuit.record(False, at_s)
    return circuit


def test_it_stays_closed_until_its_window_is_full_and_enough_of_it_failed() -> None:
    circuit = Circuit(POLICY)
    for ok in (False, False, False):
        assert not circuit.record(ok, 0.0)
        assert circuit.allows(0.0)
    assert circuit.record(True, 0.0)
    assert circuit.retry_at_s == 10.0
    assert circuit.says() == "breaker: 3 of the last 4 attempts failed"


def test_old_failures_leave_the_window() -> None:
    circuit = Circuit(POLICY)
    for ok in (False, True, True, True, True, False, True, True):
        assert not circuit.record(ok, 0.0)
    assert circuit.retry_at_s is None


def test_open_it_allows_one_trial_after_its_pause() -> None:
    circuit = opened()
    assert not circuit.allows(9.9)
    assert circuit.allows(10.0)
    assert not circuit.allows(10.0)


def test_a_trial_that_succeeds_closes_it_and_forgets_what_failed() -> None:
    circuit = opened()
    assert circuit.allows(10.0)
    assert circuit.record(True, 11.0)
    assert circuit.retry_at_s is None
    assert not circuit.record(False, 11.0)
    assert circuit.allows(11.0)


def test_each_failed_trial_doubles_the_pause_up_to_the_most() -> None:
    circuit, now_s, pauses = opened(), 0.0, list[float]()
    for _ in range(4):
        assert circuit.retry_at_s is not None
        pauses.append(circuit.retry_at_s - now_s)
        now_s = circuit.retry_at_s
        assert circuit.allows(now_s)
        assert circuit.record(False, now_s)
    assert pauses == [10.0, 20.0, 30.0, 30.0]
    assert circuit.allows(now_s + 30.0)
    circuit.record(True, now_s)
    for _ in range(4):
        circuit.record(False, 100.0)
    assert circuit.retry_at_s == 110.0


def test_what_began_before_it_opened_changes_nothing() -> None:
    circuit = opened()
    assert not circuit.record(True, 1.0)
    assert not circuit.record(False, 1.0)
    assert circuit.retry_at_s == 10.0


def test_a_trial_that_is_given_back_may_be_made_again() -> None:
    circuit = opened()
    assert circuit.allows(10.0)
    circuit.give_back()
    assert circuit.allows(10.0)


@pytest.mark.parametrize(
    "fields", [{"window": 0}, {"failures": 0.0}, {"failures": 1.1}, {"pause": "soon"}]
)
def test_a_senseless_breaker_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(BadDeclaration, match=r"window must be at least 1|is not a duration"):
        Breaker(**fields)  # pyright: ignore[reportArgumentType]
