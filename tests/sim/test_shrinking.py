"""Storms are shrunk to the faults that matter, with a bounded number of trials."""

from __future__ import annotations

from pavane.testing.shrinking import TRIALS_MAX, shrink
from pavane.testing.sim.storm import Fault, Storm, draw_storm


def kinds(storm: Storm) -> list[str]:
    return sorted(fault.kind for fault in storm.faults)


def a_storm_with(*wanted: str) -> Storm:
    """Return a drawn storm of many faults, among them these kinds."""
    drawn = (draw_storm(seed, 3) for seed in range(1000))
    return next(s for s in drawn if len(s.faults) >= 9 and set(wanted) <= set(kinds(s)))


def test_two_faults_that_matter_together_are_left_of_many() -> None:
    storm = a_storm_with("kill", "full")
    shrunk = shrink(storm, lambda it: {"kill", "full"} <= set(kinds(it)))
    assert kinds(shrunk) == ["full", "kill"]


def test_no_fault_is_left_if_none_matters() -> None:
    assert shrink(a_storm_with("kill"), lambda it: True).faults == ()


def test_what_is_left_is_short_and_on_one_node_that_does_everything() -> None:
    freeze = Fault(5, "freeze", 2, 1_000_000)
    storm = Storm((freeze,), 10, ((0,), (1,), (0, 2)), same_host=False, skew_us=7)
    shrunk = shrink(storm, lambda it: bool(it.faults) and it.faults[0].for_us >= 50_000)
    assert (shrunk.layout, shrunk.skew_us) == (((0, 1, 2),), 0)
    (fault,) = shrunk.faults
    assert fault.node == 0
    assert 50_000 <= fault.for_us < 4 * 50_000


def test_a_storm_that_needs_its_places_keeps_them() -> None:
    storm = Storm((Fault(5, "kill", 1, 10),), 10, ((0,), (1,)), same_host=True)
    assert shrink(storm, lambda it: len(it.layout) == 2 and bool(it.faults)).layout == ((0, 1),) * 2


def test_trials_are_bounded() -> None:
    trials = 0

    def fails(storm: Storm) -> bool:
        nonlocal trials
        trials += 1
        return len(storm.faults) == 300

    faults = tuple(Fault(at, "kill", 0, 10**6) for at in range(300))
    storm = Storm(faults, 10, ((0,),), same_host=True)
    assert shrink(storm, fails) == storm
    assert trials == TRIALS_MAX
