"""Shrinks a storm to the faults that matter.

Delta debugging (Zeller and Hildebrandt, 2002) over the faults, then clocks that are right, one node
instead of several, shorter faults. A smaller storm gives all of chance another course, so what is
left need not be the least there is; it is what was found with a bounded number of trials.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from msgspec.structs import replace

from pavane.testing.sim.storm import CUSTOMER, Fault, Storm

TRIALS_MAX = 150
SHORTEST_US = 1_000


class _Enough(Exception):
    """All trials are used up."""


def shrink(storm: Storm, fails: Callable[[Storm], bool]) -> Storm:
    """Return the smallest storm that was found in which `fails` is still true."""
    return _Shrinking(storm, fails).run()


class _Shrinking:
    def __init__(self, storm: Storm, fails: Callable[[Storm], bool]) -> None:
        self._storm = storm
        self._fails = fails
        self._trials = 0

    def run(self) -> Storm:
        try:
            self._drop_faults()
            if self._storm.skew_us:
                self._take(replace(self._storm, skew_us=0))
            for simpler in _simpler_places(self._storm):
                if self._take(simpler):
                    break
            self._shorten()
        except _Enough:
            pass
        return self._storm

    def _take(self, smaller: Storm) -> bool:
        """Go on with a smaller storm, if it fails too."""
        if self._trials == TRIALS_MAX:
            raise _Enough
        self._trials += 1
        if not self._fails(smaller):
            return False
        self._storm = smaller
        return True

    def _with(self, faults: Sequence[Fault]) -> Storm:
        return replace(self._storm, faults=tuple(faults))

    def _drop_faults(self) -> None:
        if self._take(self._with(())):
            return
        parts = 2
        while len(faults := self._storm.faults) > 1:
            size = -(-len(faults) // parts)
            cuts = [range(at, min(at + size, len(faults))) for at in range(0, len(faults), size)]
            only = ([faults[n] for n in cut] for cut in cuts) if parts == 2 else ()
            without = ([f for n, f in enumerate(faults) if n not in cut] for cut in cuts)
            if any(self._take(self._with(some)) for some in only):
                parts = 2
            elif any(self._take(self._with(some)) for some in without):
                parts = max(parts - 1, 2)
            elif size == 1:
                return
            else:
                parts = min(parts * 2, len(faults))

    def _shorten(self) -> None:
        for at in range(len(self._storm.faults)):
            while True:
                fault = self._storm.faults[at]
                shorter = replace(fault, for_us=fault.for_us // 4)
                if shorter.for_us < SHORTEST_US:
                    break
                others = self._storm.faults
                if not self._take(self._with((*others[:at], shorter, *others[at + 1 :]))):
                    break


def _simpler_places(storm: Storm) -> Iterator[Storm]:
    """Yield the storm on one node that does everything, and where each node does."""
    everything = tuple(sorted({service for hosted in storm.layout for service in hosted}))
    if len(storm.layout) > 1:
        faults = [replace(f, node=min(f.node, 0) if f.node != CUSTOMER else f.node)
                  for f in storm.faults]  # fmt: skip
        yield replace(storm, layout=(everything,), faults=tuple(faults))
    if any(hosted != everything for hosted in storm.layout):
        yield replace(storm, layout=(everything,) * len(storm.layout))
