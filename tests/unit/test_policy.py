"""The holder policy: given what is pending, where the baton is and the mode, stay or pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pavane.core.operations import EXPIRY, Kind, Mode, Operation
from pavane.core.policy import Pass, Stay, decide

HOME, A, B = "home", "a", "b"


def op(
    kind: Kind = "step", service: str = A, *, sent: bool = False, mode: Mode | None = None
) -> Operation:
    operation = Operation(0, kind, "name", service, 0, mode=mode)
    operation.sent = sent
    return operation


def expiry() -> Operation:
    operation = Operation(0, "timer", EXPIRY, "", 0)
    operation.sent = True
    return operation


def decision(
    pending: Sequence[Operation],
    here: str = HOME,
    mode: Mode = "choreography",
    *,
    forced: str = "",
    size: int = 0,
    hops: int = 0,
) -> Stay | Pass:
    return decide(
        pending, here=here, home=HOME, mode=mode, forced=forced, journal_bytes=size, hops=hops,
        journal_max_bytes=1000, hops_max=10,
    )  # fmt: skip


@pytest.mark.parametrize("here", [HOME, B])
def test_choreography_passes_for_a_single_step_of_another_service(here: str) -> None:
    assert decision([op()], here) == Pass(A)


def test_a_step_of_this_service_is_done_here_in_both_modes() -> None:
    step = op()
    assert decision([step], A) == Stay()
    step = op(service=HOME)
    assert decision([step], mode="orchestration") == Stay()


def test_orchestration_stays_home_and_commands() -> None:
    step = op()
    assert decision([step], mode="orchestration") == Stay()


def test_a_fork_stays_whatever_its_branches_are() -> None:
    pending = [op(), op(service=B)]
    for here in (HOME, A, B):
        assert decision(pending, here) == Stay()
    timed = [op("timer"), op(service=B)]
    assert decision(timed, A) == Stay()


def test_the_last_branch_that_was_not_asked_for_yet_takes_the_baton() -> None:
    assert decision([op(service=B)], A) == Pass(B)


def test_what_was_asked_for_is_awaited_and_never_passed() -> None:
    for here in (HOME, B):
        assert decision([op(sent=True)], here) == Stay()


def test_a_timer_is_kept_where_the_baton_is() -> None:
    timer = op("timer", "")
    assert decision([timer], A) == Stay()


def test_a_receive_takes_the_baton_home_even_out_of_a_fork() -> None:
    assert decision([op("receive", HOME)], A) == Pass(HOME)
    assert decision([op(), op("receive", HOME)], A) == Pass(HOME)
    waiting = op("receive", HOME)
    assert decision([waiting], HOME) == Stay()


def test_the_run_timeout_does_not_hold_the_baton_back() -> None:
    assert decision([expiry(), op()], HOME) == Pass(A)
    assert decision([expiry(), op("receive", HOME)], A) == Pass(HOME)


def test_a_section_overrides_the_mode_both_ways() -> None:
    step = op(mode="orchestration")
    assert decision([step]) == Stay()
    assert decision([op(mode="orchestration")], B) == Pass(HOME)
    assert decision([op(mode="choreography")], mode="orchestration") == Pass(A)
    assert decision([op(mode="choreography")], B, mode="orchestration") == Pass(A)


def test_an_orchestrated_step_of_the_service_that_holds_is_done_there() -> None:
    step = op(mode="orchestration")
    assert decision([step], A) == Stay()


@pytest.mark.parametrize(("size", "hops", "why"), [(1001, 0, "1,001 bytes"), (0, 10, "10 hops")])
def test_above_a_cap_the_baton_goes_home_and_says_why(size: int, hops: int, why: str) -> None:
    step = op()
    assert decision([step], HOME, size=size, hops=hops) == Stay()
    away = decision([op()], B, size=size, hops=hops)
    assert isinstance(away, Pass)
    assert away.to == HOME
    assert why in away.forced


def test_at_a_cap_it_still_travels() -> None:
    assert decision([op()], size=1000, hops=9) == Pass(A)


def test_a_run_that_was_forced_home_stays_orchestrated() -> None:
    step = op()
    assert decision([step], forced="too large") == Stay()
    assert decision([op()], B, forced="too large") == Pass(HOME)


def test_nothing_pending_means_staying() -> None:
    assert decision([]) == Stay()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["step", "child", "timer", "receive"]),
            st.sampled_from([HOME, A, B]),
            st.booleans(),
            st.sampled_from([None, "orchestration", "choreography"]),
        ),
        max_size=4,
    ),
    st.sampled_from([HOME, A, B]),
    st.sampled_from(["orchestration", "choreography"]),
    st.booleans(),
)
def test_passing_always_gets_the_run_on(
    kinds: list[tuple[Any, str, bool, Any]], here: str, mode: Any, forced: bool
) -> None:
    """Invariant 5: the baton is never passed to where it is, and two services cannot pass it to
    and fro: where it arrives, the same pending operations make it stay."""
    pending = [op(kind, service, sent=sent, mode=way) for kind, service, sent, way in kinds]
    why = "forced" if forced else ""
    first = decision(pending, here, mode, forced=why)
    if isinstance(first, Pass):
        assert first.to != here
        then = decision(pending, first.to, mode, forced=why or first.forced)
        assert isinstance(then, Stay)
