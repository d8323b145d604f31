"""One performance of a rehearsal: a seed in a mode, played, and what came of it."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import sys
import traceback
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import msgspec

from pavane.app import Client
from pavane.core.operations import Mode
from pavane.errors import RunEnded
from pavane.insight.timeline import Mark, Timeline
from pavane.testing.sim.app import Sim, simulated
from pavane.testing.sim.calls import Calls
from pavane.testing.sim.checks import Violation
from pavane.testing.sim.clock import EPOCH_US, Lost
from pavane.testing.sim.seclusion import secluded
from pavane.testing.sim.simulation import LOOK_S, Simulation
from pavane.testing.sim.storm import Fault, Storm

if TYPE_CHECKING:
    from pavane.testing.rehearsal import Rehearsal

TIMELINES_MAX = 3
FAULT = "fault: "
_OURS = str(Path(__file__).parents[1])
_PYTHONS = str(Path(os.__file__).parent)

Kind = Literal["invariant", "scenario", "ends", "left", "engine"]


class Failure(msgspec.Struct, frozen=True):
    """What was wrong in one play: which promise, how, and at which line of the user's code."""

    kind: Kind
    text: str
    where: str = ""

    def is_like(self, other: Failure) -> bool:
        """Tell whether the same promise was broken at the same line."""
        return (self.kind, self.where) == (other.kind, other.where)


class Play(msgspec.Struct, frozen=True):
    """What came of one seed in one mode."""

    seed: int
    mode: Mode
    failure: Failure | None
    runs: dict[str, int]
    """How many ended how."""
    events: int
    faults: dict[str, int]
    busy_us: int
    """Virtual time in which something happened."""


class Finding(msgspec.Struct, frozen=True):
    """A play that failed, shrunk: the faults that matter, of how many, and what they led to.

    Clocks of processes are off by up to `skew_us`.
    `happened` are all mishaps, with their times since the beginning; `repeated` is what was done
    more than once under one idempotency key, and when, as every crash may have it; `timelines` are
    those of the runs that the failure names, or else of the first ones.
    """

    seed: int
    mode: Mode
    failure: Failure
    faults: tuple[Fault, ...]
    faults_before: int
    skew_us: int
    happened: list[tuple[int, str]]
    repeated: list[tuple[str, list[int]]]
    timelines: list[Timeline]
    runs: int


class Performance:
    """One play: the scenario of a simulation, and what came of it."""

    def __init__(self, rehearsal: Rehearsal[Any], seed: int, mode: Mode, storm: Storm) -> None:
        self.app = simulated(rehearsal.app)
        self._rehearsal = rehearsal
        self._mode: Mode = mode
        self._seed = seed
        self._failure: Failure | None = None
        self._storm = storm
        self._calls = Calls(self.app, rehearsal.fakes, takes_time=True)
        self._simulation = Simulation(self, seed, mode, storm=storm)
        self._world: Any = None
        self.sim: Sim[Any] | None = None

    def play(self) -> Play:
        simulation = self._simulation
        with _quietly(), secluded(), self._calls.standing_in(simulation, self._mode):
            world = self._rehearsal.world
            self._world = None if world is None else world()
            outcome = simulation.run()
        failure = self._failure
        if self._calls.left is not None:
            failure = _failure("left", self._calls.left)
        if outcome.violation and failure is None:
            is_late = "virtual time" in outcome.violation or "left to happen" in outcome.violation
            failure = Failure("ends" if is_late else "engine", outcome.violation)
        sim = self.sim
        runs = Counter([status.status for status in sim.runs()] if sim is not None else ())
        return Play(
            self._seed, self._mode, failure, dict(runs),
            len(simulation.database.root._data.events.log),  # pyright: ignore
            dict(Counter(fault.kind for fault in self._storm.faults)),
            simulation.clock.at_us - simulation.clock.leaped_us,
        )  # fmt: skip

    # -- as a scenario -------------------------------------------------------------------------

    async def customer(self, sim: Simulation, client: Client) -> None:
        self.sim = Sim(self.app, sim, self._calls, self._world, self._mode)
        try:
            await self._rehearsal.scenario(self.sim)
        except BaseException as error:
            self._fail("scenario", error)
        if self.app.registry.schedules:
            await self._end_schedules(self.sim)

    async def _end_schedules(self, sim: Sim[Any]) -> None:
        """Cancel the app's schedules, which would go on for ever.

        Not before the storm is over: a node that is started begins a schedule that was cancelled.
        """
        while not self._simulation.is_healed:
            await asyncio.sleep(LOOK_S)
        await sim.settle()
        for keeper in sim.keepers():
            with suppress(RunEnded):
                await sim.get(keeper.id).cancel()

    def check(self, sim: Simulation) -> None:
        try:
            assert self.sim is not None
            if self._rehearsal.invariant(self.sim) is False:
                raise AssertionError(f"{name_of(self._rehearsal.invariant)} returned False")
        except BaseException as error:
            self._fail("invariant", error)

    def _fail(self, kind: Kind, error: BaseException) -> None:
        """Take for a failure whatever code raises: `pytest.fail` and `sys.exit` are no Exception.

        What skips a test does so before there is a storm, and not in the middle of a thousand.
        """
        if isinstance(error, (KeyboardInterrupt, GeneratorExit, Lost)):
            raise error
        if self._seed < 0 and _skips(error):
            raise error
        self._failure = _failure(kind, error)
        raise Violation(self._failure.text) from error

    # -- what came of it -----------------------------------------------------------------------

    def finding(self, failure: Failure | None, faults_before: int) -> Finding:
        """Tell what was found in this play, which is over."""
        failure = failure or Failure("engine", "Nothing is wrong any more.")
        happened = self._happened()
        sim = self.sim
        statuses = [] if sim is None else sim.runs()
        named = [status for status in statuses if status.id in failure.text]
        timelines = [
            _with_mishaps(sim.timeline(status.id), happened)
            for status in (named or statuses)[:TIMELINES_MAX]
            if sim is not None
        ]
        return Finding(
            self._seed, self._mode, failure, self._storm.faults, faults_before,
            self._storm.skew_us, happened, self._calls.repeated(), timelines, len(statuses),
        )  # fmt: skip

    def _happened(self) -> list[tuple[int, str]]:
        """Return all that went wrong, from the trace."""
        found: list[tuple[int, str]] = []
        for line in self._simulation.trace.lines:
            at, _, text = line.partition(" ")
            if text.startswith(FAULT):
                found.append((int(at), text.removeprefix(FAULT)))
        return found


def _with_mishaps(line: Timeline, happened: Sequence[tuple[int, str]]) -> Timeline:
    """Mark in a run's timeline what went wrong meanwhile."""
    marks = [
        Mark(EPOCH_US + at_us, "fault", text) for at_us, text in happened
        if line.from_us <= EPOCH_US + at_us <= line.until_us
    ]  # fmt: skip
    return msgspec.structs.replace(line, marks=[*line.marks, *marks])


@contextmanager
def _quietly() -> Generator[None]:
    """Let nobody print or log: thousands of plays say the same thousands of times."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def name_of(function: object) -> str:
    """Return what a function is called."""
    return getattr(function, "__name__", repr(function))


def _skips(error: BaseException) -> bool:
    """Tell whether an error is that of `pytest.skip`."""
    pytest = sys.modules.get("pytest")
    return pytest is not None and isinstance(error, pytest.skip.Exception)


def _failure(kind: Kind, error: BaseException) -> Failure:
    leaves = list(_leaves(error))
    frames = [_users_frame(leaf) for leaf in leaves]
    text = "\n".join(map(_told, leaves, frames))
    frame = next(filter(None, frames), None) or _users_frame(error)
    return Failure(kind, text, f"{_short(frame.filename)}:{frame.lineno}" if frame else "")


def _told(error: BaseException, frame: traceback.FrameSummary | None) -> str:
    text, name = str(error).strip(), type(error).__name__
    if isinstance(error, AssertionError):
        text = text or (frame.line if frame else None) or "assertion failed"
    else:
        text = f"{name}: {text}" if text else name
    if error.__cause__ is not None:
        for cause in _leaves(error.__cause__):
            if not isinstance(cause, asyncio.CancelledError):  # of which a time-out is made
                text += f"\nbecause of {type(cause).__name__}: {cause}"
    return text


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the errors that are in a group, and in those in it; an error that is none, itself."""
    if isinstance(error, BaseExceptionGroup):
        for inner in cast("BaseExceptionGroup[BaseException]", error).exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _users_frame(error: BaseException) -> traceback.FrameSummary | None:
    """Return the innermost line of the user's code at which an error passed."""
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if not _is_foreign(frame.filename)]
    return users[-1] if users else None


def _is_foreign(file: str) -> bool:
    """Tell whether code is not the user's: Pavane's, Python's own, or of what was installed."""
    is_installed = not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)
    return is_installed or file.startswith((_OURS, _PYTHONS, "<frozen "))


def _short(file: str) -> str:
    with suppress(ValueError):
        return str(Path(file).relative_to(Path.cwd()))
    return file
