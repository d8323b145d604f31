"""Rehearsals: a user's own process in a thousand storms, in both modes, under their own invariant.

One seed decides everything that happens, so what went wrong once can be played again, with fewer
faults, until those are left that matter.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from time import perf_counter
from typing import Any, Generic, TypeVar, overload

import msgspec

from pavane.app import App
from pavane.core.operations import Mode
from pavane.errors import BadArguments
from pavane.testing.parallel import spread
from pavane.testing.performance import Failure, Finding, Performance, Play, name_of
from pavane.testing.shrinking import shrink
from pavane.testing.sim.app import Sim
from pavane.testing.sim.calls import Calls, Fakes
from pavane.testing.sim.storm import Storm, calm, draw_storm

World = TypeVar("World")

MODES: tuple[Mode, ...] = ("orchestration", "choreography")
SEEDS = 1000
BATCH = 64
"""Plays between two looks at whether one of them failed."""
SHORTEST_US = 100_000
OTHERWISE = (
    "Played again, the same seed does something else. So something outlives a seed, or is left to "
    "chance: a global that `world=` does not make anew, `datetime.now()`, `uuid4()`, a set that is "
    "iterated."
)

Progress = Callable[[int, int], None]
"""Told of plays that are over, and of how many there will be."""


class Report(msgspec.Struct, frozen=True):
    """What was rehearsed: `finding` is None if the invariant held in all plays."""

    plays: int
    modes: tuple[Mode, ...]
    runs: dict[str, int]
    events: int
    faults: dict[str, int]
    virtual_s: float
    took_s: float
    note: str = ""
    """What makes one doubt whether this was a good rehearsal, if anything does."""
    finding: Finding | None = None


class RehearsalFailed(AssertionError):
    """A process did not keep a promise in a storm; the text tells all, `report` has the values."""

    def __init__(self, report: Report, text: str) -> None:
        super().__init__(text)
        self.report = report


class Rehearsal(Generic[World]):
    """A process to be rehearsed: its app, what its customers do, and what must hold in the end.

    See `rehearse`, which plays one at once; `pavane rehearse` plays those that a module defines.
    """

    @overload
    def __init__(
        self: Rehearsal[None],
        app: App,
        scenario: Callable[[Sim[None]], Awaitable[object]],
        invariant: Callable[[Sim[None]], object],
        *,
        fakes: Fakes | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self,
        app: App,
        scenario: Callable[[Sim[World]], Awaitable[object]],
        invariant: Callable[[Sim[World]], object],
        *,
        world: Callable[[], World],
        fakes: Fakes | None = None,
    ) -> None: ...
    def __init__(
        self,
        app: App,
        scenario: Callable[[Sim[Any]], Awaitable[object]],
        invariant: Callable[[Sim[Any]], object],
        *,
        world: Callable[[], Any] | None = None,
        fakes: Fakes | None = None,
    ) -> None:
        self.app = app
        self.scenario = scenario
        self.invariant = invariant
        self.world = world
        self.fakes: Mapping[Any, Callable[..., Any]] = fakes or {}
        self._lengths: dict[Mode, tuple[int, int]] = {}
        self._check()

    def _check(self) -> None:
        if not isinstance(self.app, App):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise BadArguments(f"{self.app!r} is no App.")
        if not inspect.iscoroutinefunction(self.scenario):
            raise BadArguments(
                f"The scenario {name_of(self.scenario)} must be an async function of one "
                f"parameter, the simulation: `async def …(sim): await sim.start(…)`."
            )
        if inspect.iscoroutinefunction(self.invariant) or not callable(self.invariant):
            raise BadArguments(
                f"The invariant {name_of(self.invariant)} must be a plain function of one "
                f"parameter, the simulation. It is called when everything has ended, so there is "
                f"nothing to await."
            )
        Calls(self.app, self.fakes, takes_time=True)  # refuses fakes for what the app has not

    def run(
        self, seeds: int | Iterable[int] = SEEDS, modes: Sequence[Mode] = MODES,
        progress: Progress | None = None,
    ) -> Report:  # fmt: skip
        """Play seeds until one fails, and shrink that; see `rehearse`."""
        chosen = checked_seeds(seeds)
        check_modes(modes)
        began_s = perf_counter()
        plays = _Sum()
        failed: Play | None = None
        note = ""
        for mode in modes:
            calm = self._calm(mode)
            if calm.runs and not {"completed", "continued"} & set(calm.runs):
                note = "no run completes even without any fault, so little was rehearsed"
            plays.add(calm)
            failed = failed or (calm if calm.failure else None)
        if failed is None:
            pairs: list[tuple[int, Mode]] = [(seed, mode) for seed in chosen for mode in modes]
            failed = self._first_failure(pairs, plays, progress or _nobody)
        finding = None if failed is None else self._shrunk(failed)
        return plays.report(tuple(modes), perf_counter() - began_s, note, finding)

    def _calm(self, mode: Mode) -> Play:
        """Play without any fault, to see how long that takes, and whether it works at all."""
        play = Performance(self, -1, mode, self._calm_storm).play()
        if play.failure is None and not play.runs and not play.events:
            raise BadArguments(
                f"The scenario {name_of(self.scenario)} started no run and published no event, so "
                f"there is nothing to rehearse."
            )
        busy_us = max(play.busy_us, SHORTEST_US)
        self._lengths[mode] = (busy_us // 2, busy_us * 4)
        return play

    def _first_failure(
        self, pairs: Sequence[tuple[int, Mode]], plays: _Sum, progress: Progress
    ) -> Play | None:
        """Play all, in parallel, and return the first that failed, in their order."""
        for at in range(0, len(pairs), BATCH):
            failed: dict[int, Play] = {}
            for number, play in spread(self._play, pairs[at : at + BATCH]):
                plays.add(play)
                progress(1, len(pairs))
                if play.failure is not None:
                    failed[number] = play
            if failed:
                return failed[min(failed)]
        return None

    def _play(self, pair: tuple[int, Mode]) -> Play:
        seed, mode = pair
        return Performance(self, seed, mode, self._storm(seed, mode)).play()

    def _storm(self, seed: int, mode: Mode) -> Storm:
        return draw_storm(seed, len(self.app.registry.services), self._lengths[mode])

    # -- after a failure -----------------------------------------------------------------------

    def _shrunk(self, failed: Play) -> Finding:
        """Find the faults that matter, and what they lead to."""
        seed, mode, failure = failed.seed, failed.mode, failed.failure
        if seed < 0 or failure is None:
            return self._found(Performance(self, seed, mode, self._calm_storm), 0)
        before = self._storm(seed, mode)

        def fails(storm: Storm) -> bool:
            again = Performance(self, seed, mode, storm).play().failure
            return again is not None and again.is_like(failure)

        if fails(before) and fails(before):
            shrunk = shrink(before, fails)
            return self._found(Performance(self, seed, mode, shrunk), len(before.faults))
        found = self._found(Performance(self, seed, mode, before), len(before.faults))
        text = f"{failure.text}\n{OTHERWISE}"
        return msgspec.structs.replace(found, failure=Failure(failure.kind, text, failure.where))

    def _found(self, performance: Performance, faults: int) -> Finding:
        """Play the last time, and tell what was found of so many faults."""
        return performance.finding(performance.play().failure, faults)

    @property
    def _calm_storm(self) -> Storm:
        return calm(len(self.app.registry.services))


def checked_seeds(seeds: int | Iterable[int]) -> Sequence[int]:
    """Return the seeds that are meant; raise BadArguments if none are."""
    is_either = isinstance(seeds, (int, Iterable)) and not isinstance(seeds, str)  # pyright: ignore
    if not is_either:
        raise BadArguments(f"seeds={seeds!r}: write how many, such as 200, or which: [4711].")
    chosen = range(seeds) if isinstance(seeds, int) else list(seeds)
    if not chosen:
        raise BadArguments("A rehearsal needs at least one seed.")
    for seed in chosen:
        if not isinstance(seed, int) or seed < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise BadArguments(f"{seed!r} is no seed: seeds are whole numbers from 0.")
    return chosen


def check_modes(modes: Sequence[Mode]) -> None:
    """Raise BadArguments if these are no modes."""
    is_several = isinstance(modes, Sequence) and not isinstance(modes, str)  # pyright: ignore
    if not is_several or not modes or any(mode not in MODES for mode in modes):
        raise BadArguments(f"modes={modes!r}: write some of {list(MODES)!r}, as a list.")


class _Sum:
    """Adds plays up."""

    def __init__(self) -> None:
        self._plays = self._events = self._busy_us = 0
        self._runs: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()

    def add(self, play: Play) -> None:
        self._plays += play.seed >= 0
        self._events += play.events
        self._busy_us += play.busy_us
        self._runs.update(play.runs)
        self._faults.update(play.faults)

    def report(
        self, modes: tuple[Mode, ...], took_s: float, note: str, finding: Finding | None
    ) -> Report:
        return Report(
            self._plays, modes, dict(self._runs), self._events, dict(self._faults.most_common()),
            self._busy_us / 1e6, took_s, note, finding,
        )  # fmt: skip


def _nobody(done: int, total: int) -> None:
    """Show no progress."""


# -- at once -----------------------------------------------------------------------------------


@overload
def rehearse(
    app: App,
    scenario: Callable[[Sim[None]], Awaitable[object]],
    invariant: Callable[[Sim[None]], object],
    *,
    fakes: Fakes | None = None,
    seeds: int | Iterable[int] = SEEDS,
    modes: Sequence[Mode] = MODES,
) -> Report: ...
@overload
def rehearse(
    app: App,
    scenario: Callable[[Sim[World]], Awaitable[object]],
    invariant: Callable[[Sim[World]], object],
    *,
    world: Callable[[], World],
    fakes: Fakes | None = None,
    seeds: int | Iterable[int] = SEEDS,
    modes: Sequence[Mode] = MODES,
) -> Report: ...
def rehearse(
    app: App,
    scenario: Callable[[Sim[Any]], Awaitable[object]],
    invariant: Callable[[Sim[Any]], object],
    *,
    world: Callable[[], Any] | None = None,
    fakes: Fakes | None = None,
    seeds: int | Iterable[int] = SEEDS,
    modes: Sequence[Mode] = MODES,
) -> Report:
    """Run a process in a thousand storms, in both modes, and check an invariant after each.

    ```python
    async def two_orders(sim):
        for order_id in ("o-1", "o-2"):
            await sim.start(fulfil, order_id, 4200, id=order_id)

    def nobody_pays_twice(sim):
        for order_id, payments in sim.world.payments.items():
            assert len(payments) == 1, f"{order_id} was charged {len(payments)} times"

    rehearse(app, two_orders, nobody_pays_twice, world=Bank)
    ```

    `scenario` asks for things; it need not wait for them: when the storm is over and everything
    has ended, `invariant` may look at runs, results, events, and at `sim.world`, which `world()`
    made for this seed. That is the world outside, which no kill of a process undoes: let `world`
    also put it where the steps find it. `fakes` stand in for steps or handlers.

    `seeds` is how many, or which. Raises RehearsalFailed, an AssertionError, for the first that
    breaks the invariant or in which something never ends: with the few faults that matter, the
    timelines of the runs that the message names, and the line that repeats it.
    """
    __tracebackhide__ = True
    play = FixedRehearse(app, None, 'rehearse(…, seeds=[{seed}], modes=["{mode}"])')
    return play(scenario, invariant, world=world, fakes=fakes, seeds=seeds, modes=modes)


class FixedRehearse:
    """`rehearse` for one app, with other seeds if `seeds` is given."""

    def __init__(self, app: App, seeds: int | Sequence[int] | None, repeat: str) -> None:
        self._app = app
        self._seeds = seeds
        self._repeat = repeat

    def __call__(
        self,
        scenario: Callable[[Sim[Any]], Awaitable[object]],
        invariant: Callable[[Sim[Any]], object],
        *,
        world: Callable[[], Any] | None = None,
        fakes: Fakes | None = None,
        seeds: int | Iterable[int] = SEEDS,
        modes: Sequence[Mode] = MODES,
    ) -> Report:
        __tracebackhide__ = True
        from pavane.testing.report import with_bar

        make: Any = Rehearsal
        rehearsal: Rehearsal[Any] = make(self._app, scenario, invariant, world=world, fakes=fakes)
        chosen = seeds if self._seeds is None else self._seeds
        return with_bar(rehearsal, chosen, modes, self._repeat)
