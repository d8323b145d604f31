"""Kills a process at each durable point of a scenario in turn, recovers, and reports what is left.

A scenario is a module that can be run as a program. Its processes are forked from one that has
imported everything and opened nothing. Tests run such programs by `crash_reports`.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import apsw
import msgspec
import pytest

from pavane import App, Client
from pavane.errors import PavaneError
from pavane.stores.port import Commit, Fence
from pavane.stores.sqlite import SqliteStore

DEADLINE_S = 60.0
POINTS_MAX = 200
ROOT = Path(__file__).resolve().parents[2]
STORE = "world.db"
RECORD = "record.txt"


# -- the program -------------------------------------------------------------------------------


class Scenario(msgspec.Struct, frozen=True):
    """What is done by workers for the services `names`, while one of them is killed.

    `drive` starts it and waits for its end, `look` reports what is there now.
    """

    names: Sequence[str]
    app: Callable[[SqliteStore | str], App]
    drive: Callable[[Client], Awaitable[None]]
    look: Callable[[], dict[str, Any]]


def crash_everywhere(scenario: Scenario, layout: str, when: str, folder: str) -> None:
    """Print a line of JSON for each point of a kill, until all is done without one.

    `layout` is "one" process for all services, or the service whose process is killed.
    """
    for point in range(1, POINTS_MAX):
        place = Path(folder, str(point))
        place.mkdir()
        os.chdir(place)
        if layout == "one":
            found = _crash_all_in_one(scenario, when, point)
        else:
            found = _crash_one_of_many(scenario, when, point, layout)
        print(json.dumps({"point": point, **found}), flush=True)
        if not found["killed"]:
            return
    raise AssertionError("it never ended")


def _crash_all_in_one(scenario: Scenario, when: str, point: int) -> dict[str, Any]:
    killed = reap(fork(lambda: _work(scenario, scenario.names, KilledStore(STORE, when, point))))
    before = scenario.look() if killed else {}
    again = reap(fork(lambda: _work(scenario, scenario.names, STORE)))
    return {"killed": killed, "again": again, "before": before, "after": scenario.look()}


def _crash_one_of_many(scenario: Scenario, when: str, point: int, victim: str) -> dict[str, Any]:
    others = {
        name: fork(lambda name=name: _work(scenario, [name], STORE))
        for name in scenario.names
        if name != victim
    }
    asker = fork(lambda: _ask(scenario))
    doomed = fork(lambda: _work(scenario, [victim], KilledStore(STORE, when, point)))
    try:
        killed, asked = 0, None
        while killed == 0 and asked is None:
            found, status = os.waitpid(doomed, os.WNOHANG)
            killed = os.waitstatus_to_exitcode(status) if found else 0
            found, status = os.waitpid(asker, os.WNOHANG)
            asked = os.waitstatus_to_exitcode(status) if found else None
            time.sleep(0.002)
        before = scenario.look() if killed else {}
        others[victim] = fork(lambda: _work(scenario, [victim], STORE)) if killed else doomed
        again = asked if asked is not None else reap(asker)
    finally:
        for child in others.values():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return {"killed": killed, "again": again, "before": before, "after": scenario.look()}


async def _work(scenario: Scenario, names: Sequence[str], store: SqliteStore | str) -> None:
    """Work for `names`; with all of them, also drive the scenario."""
    async with scenario.app(store).worker(names) as worker:
        if len(names) == len(scenario.names):
            await scenario.drive(worker)
        else:
            await asyncio.sleep(DEADLINE_S)


async def _ask(scenario: Scenario) -> None:
    async with scenario.app(STORE).connect() as client:
        await scenario.drive(client)


class KilledStore(SqliteStore):
    """A store whose process dies right before or right after its n-th batch is durable."""

    def __init__(self, path: str, when: str, point: int) -> None:
        super().__init__(path)
        self._when = when
        self._left = point

    def connect(self) -> SqliteStore:
        return self

    def submit(
        self,
        batch: Sequence[Commit],
        fence: Fence | None,
        done: Callable[[Sequence[PavaneError | None]], None],
    ) -> None:
        self._left -= 1
        if self._left == 0 and self._when == "before":
            die()

        def written(results: Sequence[PavaneError | None]) -> None:
            if last and self._when == "after":
                die()
            done(results)

        last = self._left == 0
        super().submit(batch, fence, written)


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def fork(body: Callable[[], Any]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        asyncio.run(body())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def reap(child: int) -> int:
    """Return the exit code, negative for a signal; a process that does not end is an error."""
    ends = time.monotonic() + DEADLINE_S
    while time.monotonic() < ends:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"process {child} did not end")


# -- what is left ------------------------------------------------------------------------------


def record(*fields: Any) -> None:
    """Write down outside of the store that something was executed by this process."""
    file = os.open(RECORD, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, json.dumps([os.getpid(), *fields]).encode() + b"\n")
    os.close(file)


def recorded() -> list[Any]:
    path = Path(RECORD)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@contextmanager
def reading() -> Generator[Callable[[str], list[Any]]]:
    """Yield what asks the store by SQL, and not by the engine."""
    db = apsw.Connection(STORE)
    db.set_busy_timeout(10_000)
    try:
        yield lambda sql: [list(row) for row in db.execute(sql)]
    finally:
        db.close()


# -- the tests ---------------------------------------------------------------------------------

Case = TypeVar("Case", bound=tuple[str, ...])

# Taken once: pytest changes os.environ for each test, while threads would read it.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
}


@contextmanager
def crash_reports(
    program: str, cases: Sequence[Case], folders: pytest.TempPathFactory
) -> Generator[dict[Case, Future[list[dict[str, Any]]]]]:
    """Run a scenario with the arguments of each case, two at a time; a report for each point."""
    with ThreadPoolExecutor(2) as pool:
        yield {
            case: pool.submit(_reports, program, case, folders.mktemp("-".join(case)))
            for case in cases
        }


def _reports(program: str, case: tuple[str, ...], folder: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", program, *case, str(folder)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return [json.loads(line) for line in done.stdout.splitlines()]
