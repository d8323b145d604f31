"""Durations and retry schedules, as users write them."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pavane import BadDeclaration, EngineConfig, Retry
from pavane.policy import ONCE, PERSISTENT, Duration, seconds


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ("200ms", 0.2), ("10s", 10), ("5m", 300), ("2h", 7200), ("3 days", 259200), ("1d", 86400),
        ("1w", 604800), ("1h 30m", 5400), ("1h30m", 5400), ("1.5s", 1.5), ("50us", 5e-5),
        ("2 Minutes", 120), (" 7 s ", 7), (3, 3), (0.25, 0.25), (0, 0), (timedelta(hours=1), 3600),
    ],
)  # fmt: skip
def test_durations_are_read(given_: Duration, expected: float) -> None:
    assert seconds(given_) == pytest.approx(expected)


@pytest.mark.parametrize(
    "given_",
    ["", "  ", "s", "10", "5 parsecs", "1h nonsense", "-5s", -1, float("nan"), float("inf"),
     timedelta(seconds=-1), 1e12],
)  # fmt: skip
def test_what_is_no_duration_is_refused_with_examples(given_: Duration) -> None:
    with pytest.raises(BadDeclaration, match="is not a duration"):
        seconds(given_)


@pytest.mark.parametrize("fields", [{"attempts": -1}, {"factor": 0.5}, {"jitter": 2}])
def test_a_senseless_retry_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(BadDeclaration, match="attempts must be"):
        Retry(**fields)  # pyright: ignore


def test_a_retry_with_an_unreadable_duration_is_refused_where_it_is_written() -> None:
    for fields in ({"first": "soon"}, {"most": "later"}, {"within": "some time"}):
        with pytest.raises(BadDeclaration, match="is not a duration"):
            Retry(**fields)  # pyright: ignore


def delays(retry: Retry, count: int, chance: float = 0.0) -> list[float | None]:
    return [retry.delay_s(n, ValueError(), 0, lambda: chance) for n in range(1, count + 1)]


def test_waits_grow_by_the_factor_up_to_the_most() -> None:
    retry = Retry(attempts=6, first="1s", factor=3, most="20s")
    assert delays(retry, 6) == [1, 3, 9, 20, 20, None]


def test_no_limit_means_no_limit_and_no_overflow() -> None:
    retry = Retry(attempts=0, first="1s", most="1m")
    assert retry.delay_s(1_000_000, ValueError(), 0, lambda: 0.0) == 60


def test_once_never_waits_and_persistence_ends() -> None:
    assert delays(ONCE, 1) == [None]
    assert delays(PERSISTENT, 10)[-1] is None
    assert None not in delays(PERSISTENT, 9)


def test_give_up_counts_for_subclasses_and_for_nothing_else() -> None:
    retry = Retry(give_up=(LookupError,))
    assert retry.delay_s(1, KeyError(), 0, lambda: 0.0) is None
    assert retry.delay_s(1, ValueError(), 0, lambda: 0.0) == pytest.approx(0.2)


def test_within_bounds_the_time_including_the_next_wait() -> None:
    retry = Retry(attempts=0, first="4s", factor=1, within="10s")
    assert retry.delay_s(1, ValueError(), 6, lambda: 0.0) == 4
    assert retry.delay_s(1, ValueError(), 6.1, lambda: 0.0) is None


@given(st.integers(1, 60), st.floats(0, 1), st.floats(0, 1))
def test_jitter_only_shortens_and_never_below_its_share(
    attempt: int, jitter: float, chance: float
) -> None:
    full = Retry(attempts=0, jitter=0).delay_s(attempt, ValueError(), 0, lambda: chance)
    some = Retry(attempts=0, jitter=jitter).delay_s(attempt, ValueError(), 0, lambda: chance)
    assert full is not None
    assert some is not None
    assert full * (1 - jitter) - 1e-9 <= some <= full


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("retention_s", "3 days", "a number of seconds of 0 or more"),
        ("retention_s", -1, "a number of seconds of 0 or more"),
        ("retention_s", math.inf, "a number of seconds of 0 or more"),
        ("lease_s", "3s", "a number of seconds above 0"),
        ("lease_s", 0, "a number of seconds above 0"),
        ("poll_s", math.nan, "a number of seconds above 0"),
        ("step_threads", 0, "a whole number above 0"),
        ("step_threads", 1.5, "a whole number above 0"),
        ("payload_max_bytes", -5, "a whole number above 0"),
        ("hops_max", True, "a whole number of 0 or more"),
    ],
)
def test_a_config_that_cannot_be_is_refused_with_what_can(
    field: str, value: Any, allowed: str
) -> None:
    with pytest.raises(BadDeclaration) as refused:
        EngineConfig(**{field: value})
    assert str(refused.value) == f"EngineConfig({field}={value!r}): write {allowed}."
