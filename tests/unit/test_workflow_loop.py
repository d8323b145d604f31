"""Workflow code on its loop: plain asyncio is durable and deterministic, and nothing else gets in.

Each delivery of the pure driver is followed by a replay of the journal so far (invariants 3 and 8).
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import linecache
import logging
import os
import queue
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import Future
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import pytest
from msgspec import Raw

import pavane
from pavane import (
    Event,
    NotDecodable,
    NotInWorkflow,
    OnlyInWorkflow,
    RunTimeout,
    Service,
    TooLarge,
    UndeclaredReceive,
    heartbeat,
    now,
    patched,
    receive,
    run_id,
    saga,
    uuid4,
)
from pavane.core.execution import Execution
from pavane.core.journal import Entry, decode_chunk
from pavane.errors import Mismatch
from tests.unit.pure_driver import BEGINNING_US, PureRun, assert_same, described, replay

ROOT = Path(__file__).resolve().parents[2]
desk = Service("desk")
other = Service("other")
SEEN: list[Any] = []


class Answer(Event):
    text: str


class Nudge(Event):
    text: str


@desk.step
async def a(value: int = 0) -> int:
    return value


@desk.step
async def b(value: int = 0) -> int:
    return value


@other.step
async def c(value: int = 0) -> int:
    return value


@other.step
async def undo_a(value: int = 0) -> None: ...


@other.step
async def undo_b(value: int = 0) -> None: ...


@desk.step(undo=undo_a)
async def booked(value: int = 0) -> int:
    return value


def workflow(fn: Callable[..., Awaitable[Any]], **options: Any) -> Any:
    """Declare a workflow on a service of its own, so that names never clash."""
    return Service("home").workflow(**options)(fn)  # pyright: ignore


# -- asyncio, durable --------------------------------------------------------------------------


def test_gather_returns_in_argument_order_whatever_arrives_first() -> None:
    async def both() -> list[int]:
        return list(await asyncio.gather(a(1), b(2), c(3)))

    run = PureRun(workflow(both))
    assert run.wanted == ["step desk.a", "step desk.b", "step other.c"]
    run.done("c", 30)
    run.done("a", 10)
    run.done("b", 20)
    assert run.result == [10, 20, 30]


def test_gather_with_return_exceptions_delivers_each_error_as_its_own_class() -> None:
    async def both() -> list[str]:
        results = await asyncio.gather(a(), b(), return_exceptions=True)
        return [repr(result) for result in results]

    run = PureRun(workflow(both))
    run.fail("b", KeyError("k"))
    run.done("a", 1)
    assert run.result == ["1", "KeyError('k')"]


def test_a_failing_gather_leaves_its_siblings_running() -> None:
    async def both() -> int:
        first = asyncio.ensure_future(b())
        try:
            await asyncio.gather(a(), first)
        except ValueError:
            return await first
        raise AssertionError

    run = PureRun(workflow(both))
    run.fail("a", ValueError("no"))
    assert run.wanted == ["step desk.b"]
    run.done("b", 7)
    assert run.result == 7


def test_a_task_group_gives_its_siblings_up_when_one_fails() -> None:
    async def group() -> str:
        try:
            async with asyncio.TaskGroup() as tasks:
                for number in range(4):
                    tasks.create_task(a(number))
        except ExceptionGroup as errors:
            return f"{len(errors.exceptions)} {errors.exceptions[0]!r}"
        raise AssertionError

    run = PureRun(workflow(group))
    run.fail(2, ValueError("third"))
    assert run.given_up == ["step desk.a"] * 3
    assert run.wanted == []
    assert run.result == "1 ValueError('third')"


async def _abort_order() -> list[int]:
    order: list[int] = []

    async def member(number: int) -> None:
        try:
            await a(number)
        except asyncio.CancelledError:
            order.append(number)
            await b(number)
            raise

    try:
        async with asyncio.TaskGroup() as tasks:
            for number in range(8):
                tasks.create_task(member(number))
    except ExceptionGroup:
        pass
    waiting = {asyncio.ensure_future(c(number)): number for number in range(6)}
    done, _ = await asyncio.wait(waiting)
    return [*order, *(waiting[task] for task in done)]


abort_order = workflow(_abort_order, name="abort_order")


def drive_abort_order() -> str:
    """Fail one of eight siblings and see in which order the others are cancelled."""
    run = PureRun(abort_order)
    run.fail(3, ValueError("no"))
    pending = [(op.ordinal, bytes(op.args).decode()) for op in run.execution.pending.values()]
    while run.execution.pending:
        run.done(min(run.execution.pending), 0)
    return f"{pending} {run.result} {run.issued}"


def test_siblings_are_aborted_in_one_order_in_every_process() -> None:
    """Invariants 3 and 8: sets of tasks iterate alike, whatever hash seed and allocations."""
    expected = drive_abort_order()
    script = (
        "import sys, asyncio\n"
        "keep = [object() for _ in range(int(sys.argv[1]) * 37)]\n"
        "async def nothing(): await asyncio.sleep(0)\n"
        "async def before():\n"
        "    await asyncio.gather(*(nothing() for _ in range(int(sys.argv[1]))))\n"
        "asyncio.run(before())\n"
        "from tests.unit.test_workflow_loop import drive_abort_order\n"
        "print(drive_abort_order())\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(earlier)],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONHASHSEED": str(earlier + 1),
                "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for earlier in (0, 1, 2, 3, 5, 8)
    ]
    printed = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert printed == [expected] * len(processes)


def test_wait_tells_first_completed_apart_and_leaves_the_rest() -> None:
    async def race() -> list[int]:
        tasks = [asyncio.ensure_future(step()) for step in (a, b, c)]
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        return [task.result() for task in done]

    run = PureRun(workflow(race))
    run.done("b", 5)
    assert run.result == [5]
    assert run.wanted == ["step desk.a", "step other.c"] or run.wanted == []


def test_wait_with_a_timeout_is_a_durable_timer() -> None:
    async def race() -> int:
        tasks = [asyncio.ensure_future(a()), asyncio.ensure_future(b())]
        done, pending = await asyncio.wait(tasks, timeout=30)
        for task in pending:
            task.cancel()
        return len(done)

    run = PureRun(workflow(race))
    run.done("a", 1)
    assert sorted(run.wanted) == ["step desk.b", "timer timer"]
    run.fire()
    assert run.result == 1


def test_as_completed_yields_in_order_of_delivery() -> None:
    async def race() -> list[int]:
        return [await task for task in asyncio.as_completed([a(), b(), c()])]

    run = PureRun(workflow(race))
    run.done("c", 3)
    run.done("a", 1)
    run.done("b", 2)
    assert run.result == [3, 1, 2]


def test_wait_for_gives_the_step_up_when_its_time_is_over() -> None:
    async def limited() -> str:
        try:
            return f"{await asyncio.wait_for(a(), 5)}"
        except TimeoutError:
            return "late"

    run = PureRun(workflow(limited))
    assert sorted(run.wanted) == ["step desk.a", "timer timer"]
    run.fire()
    assert run.given_up == ["step desk.a"]
    assert run.result == "late"
    run = PureRun(workflow(limited))
    run.done("a", 4)
    assert run.wanted == []
    assert run.result == "4"


def test_timeout_gives_up_everything_inside_and_its_timer_when_in_time() -> None:
    async def limited() -> str:
        try:
            async with asyncio.timeout(5):
                first, second = await asyncio.gather(a(), b())
                return f"{first + second}"
        except TimeoutError:
            return "late"

    run = PureRun(workflow(limited))
    run.done("a", 1)
    run.fire()
    assert run.result == "late"
    run = PureRun(workflow(limited))
    run.done("a", 1)
    run.done("b", 2)
    assert run.result == "3"
    assert run.wanted == []


def test_a_result_and_a_timer_of_the_same_instant_count_in_journal_order() -> None:
    """Invariant 3: a race is decided once, by which delivery was journalled first."""

    async def limited() -> str:
        try:
            async with asyncio.timeout(5):
                return f"{await a()}"
        except TimeoutError:
            return "late"

    in_time, late = PureRun(workflow(limited)), PureRun(workflow(limited))
    in_time.now_us = late.now_us = BEGINNING_US + 5_000_000
    in_time.done("a", 1)
    late.fire()
    assert (in_time.result, late.result) == ("1", "late")


def test_sleep_takes_the_time_of_the_journal() -> None:
    async def nap() -> list[float]:
        begun = now()
        await asyncio.sleep(3600)
        await asyncio.sleep(0)
        return [(now() - begun).total_seconds(), asyncio.get_running_loop().time()]

    run = PureRun(workflow(nap))
    assert run.wanted == ["timer timer"]
    run.fire()
    assert run.result == [3600.0, BEGINNING_US / 1e6 + 3600]


def test_sleepers_wake_by_deadline_and_then_by_order() -> None:
    async def naps() -> list[int]:
        order: list[int] = []

        async def nap(number: int, length: float) -> None:
            await asyncio.sleep(length)
            order.append(number)

        await asyncio.gather(nap(0, 3), nap(1, 1), nap(2, 1), nap(3, 2))
        return order

    run = PureRun(workflow(naps))
    for _ in range(4):
        run.fire()
    assert run.result == [1, 2, 3, 0]


def test_event_lock_semaphore_condition_and_queue_work_between_tasks() -> None:
    async def busy() -> list[str]:
        log: list[str] = []
        event, lock, room = asyncio.Event(), asyncio.Lock(), asyncio.Semaphore(2)
        queue: asyncio.Queue[int] = asyncio.Queue(1)
        condition = asyncio.Condition()

        async def producer() -> None:
            for number in range(3):
                await queue.put(await a(number))
            event.set()

        async def consumer() -> None:
            for _ in range(3):
                log.append(f"got {await queue.get()}")
            async with condition:
                condition.notify_all()

        async def waiter() -> None:
            async with condition:
                await condition.wait()
            log.append("told")

        async def guarded(number: int) -> None:
            async with room, lock:
                log.append(f"in {number}")
                await b(number)
                log.append(f"out {number}")

        await asyncio.gather(waiter(), producer(), consumer(), *(guarded(n) for n in range(3)))
        await event.wait()
        return log

    run = PureRun(workflow(busy))
    while run.outcome is None:
        ordinal = max(run.execution.pending)
        run.done(ordinal, ordinal)
    assert [line for line in run.result if line.startswith("in")] == ["in 0", "in 1", "in 2"]
    assert run.result.index("out 0") < run.result.index("in 1")
    assert sum(line.startswith("got") for line in run.result) == 3


def test_create_task_runs_beside_and_keeps_its_context() -> None:
    colour: contextvars.ContextVar[str] = contextvars.ContextVar("colour", default="none")

    async def beside() -> str:
        colour.set("red")
        task = asyncio.create_task(painter(), name="painter")
        colour.set("blue")
        await b()
        return f"{task.get_name()} {await task} {colour.get()}"

    async def painter() -> str:
        await a()
        return colour.get()

    run = PureRun(workflow(beside))
    run.done("b", 1)
    run.done("a", 1)
    assert run.result == "painter red blue"


def test_a_shielded_step_outlives_the_task_that_was_cancelled() -> None:
    async def shielded() -> int:
        inner = asyncio.ensure_future(a())
        outer = asyncio.ensure_future(asyncio.shield(inner))
        await asyncio.sleep(0)
        outer.cancel()
        try:
            await outer
        except asyncio.CancelledError:
            return await inner + 1
        raise AssertionError

    run = PureRun(workflow(shielded))
    assert run.wanted == ["step desk.a"]
    run.done("a", 41)
    assert run.result == 42


def test_an_asynchronous_generator_and_a_context_manager_may_call_steps() -> None:
    async def outer() -> list[int]:
        async def numbers() -> Any:
            for number in range(3):
                yield await a(number)

        return [number async for number in numbers()]

    run = PureRun(workflow(outer))
    for number in range(3):
        run.done("a", number * 10)
    assert run.result == [0, 10, 20]


async def _stretch(name: str) -> AsyncGenerator[int, None]:
    try:
        for number in itertools.count():
            yield await a(number)
    finally:
        SEEN.append(name)


def test_a_generator_that_workflow_code_abandons_is_run_by_nobody_else() -> None:
    async def reads_one() -> int:
        numbers = _stretch("workflow's")
        first = await anext(numbers)
        del numbers  # in the midst, and nobody closes it
        return first

    async def drive() -> None:
        run = PureRun(workflow(reads_one), shadow=False)  # which would put generators away
        run.done("a", 7)
        assert run.result == 7
        own = _stretch("loop's")
        assert await anext(own) == 0
        del own
        gc.collect()
        await asyncio.sleep(0.01)

    SEEN.clear()
    asyncio.run(drive())
    assert SEEN == ["loop's"], "the outer loop closes what is its own, and only that"


def test_the_hooks_for_generators_are_left_as_they_were() -> None:
    async def two() -> int:
        return await a() + await b()

    before = sys.get_asyncgen_hooks()
    assert PureRun(workflow(two)).wanted == ["step desk.a"]
    assert sys.get_asyncgen_hooks() == before
    asyncio.run(asyncio.to_thread(PureRun, workflow(two)))
    assert sys.get_asyncgen_hooks() == before


# -- what does not belong there ----------------------------------------------------------------


def _sleep() -> None:
    time.sleep(0.001)


def _open() -> None:
    open(os.devnull).close()


def _connect() -> None:
    socket.create_connection(("127.0.0.1", 9)).close()


def _look_up() -> None:
    socket.getaddrinfo("localhost", 80)


def _fetch() -> None:
    urllib.request.urlopen("http://127.0.0.1:9/")


def _thread() -> None:
    threading.Thread(target=print).start()


def _subprocess() -> None:
    subprocess.run(["true"])


def _system() -> None:
    os.system("true")


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (_sleep, "time.sleep"),
        (_open, "open("),
        (lambda: Path(os.devnull).read_text(), "open("),
        (lambda: Path(os.devnull).write_text("x"), "open("),
        (_connect, "socket"),
        (_look_up, "getaddrinfo"),
        (_fetch, "urlopen"),
        (lambda: os.makedirs("x/y"), "os.makedirs"),
        (lambda: Path("x").mkdir(), "Path.mkdir"),
        (lambda: os.rename("x", "y"), "os.rename"),
        (lambda: os.rmdir("x"), "os.rmdir"),
        (lambda: os.remove("x"), "os.remove"),
        (lambda: Path("x").unlink(), "Path.unlink"),
        (lambda: os.listdir(), "os.listdir"),
        (lambda: list(os.scandir()), "os.scandir"),
        (lambda: os.link("x", "y"), "os.link"),
        (lambda: os.symlink("x", "y"), "os.symlink"),
        (lambda: os.truncate("x", 0), "os.truncate"),
        (lambda: os.chmod("x", 0o600), "os.chmod"),
        (lambda: os.chown("x", 0, 0), "os.chown"),
        (lambda: os.utime("x"), "os.utime"),
        (lambda: shutil.rmtree("x"), "shutil.rmtree"),
        (lambda: shutil.copyfile("x", "y"), "shutil.copyfile"),
        (lambda: shutil.move("x", "y"), "shutil.move"),
        (lambda: input("sure? "), "input()"),
        (lambda: threading.Event().wait(5), "threading.Event"),
        (lambda: queue.Queue[int]().get(timeout=5), "queue.Queue"),
        (lambda: Future[int]().result(5), "Future.result"),
        (_thread, "thread"),
        (_subprocess, "subprocess"),
        (_system, "os.system"),
    ],
)
def test_blocking_calls_are_refused_by_name(call: Callable[[], object], names: str) -> None:
    async def blocking() -> None:
        await a()
        call()

    run = PureRun(workflow(blocking), shadow=False)
    run.done("a", 1)
    assert isinstance(run.error, NotInWorkflow), repr(run.error)
    assert names in str(run.error)
    assert "step" in str(run.error)


async def _to_thread() -> None:
    await asyncio.to_thread(print)


async def _executor() -> None:
    await asyncio.get_running_loop().run_in_executor(None, print)


async def _process() -> None:
    await asyncio.create_subprocess_exec("true")


async def _shell() -> None:
    await asyncio.create_subprocess_shell("true")


async def _stream() -> None:
    await asyncio.open_connection("127.0.0.1", 9)


async def _server() -> None:
    await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)


async def _reader() -> None:
    asyncio.get_running_loop().add_reader(0, print)


async def _from_thread() -> None:
    asyncio.get_running_loop().call_soon_threadsafe(print)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (_to_thread, "asyncio.to_thread (loop.run_in_executor)"),
        (_executor, "run_in_executor"),
        (_process, "subprocess_exec"),
        (_shell, "subprocess_shell"),
        (_stream, "asyncio.open_connection (loop.create_connection)"),
        (_server, "create_server"),
        (_reader, "add_reader"),
        (_from_thread, "call_soon_threadsafe"),
    ],
)
def test_asynchronous_io_is_refused_by_name(
    call: Callable[[], Awaitable[None]], names: str
) -> None:
    async def outside() -> None:
        await call()

    run = PureRun(workflow(outside), shadow=False)
    assert isinstance(run.error, NotInWorkflow), repr(run.error)
    assert names in str(run.error)


def test_a_workflow_whose_result_does_not_fit_its_annotation_fails_and_names_both() -> None:
    async def counts() -> int:
        return await a("text")  # pyright: ignore

    run = PureRun(workflow(counts))
    run.done("a", 1)
    assert run.result == 1

    async def miscounts() -> int:
        await a()
        return "three"  # pyright: ignore

    run = PureRun(workflow(miscounts))
    run.done("a", 1)
    assert isinstance(run.error, NotDecodable)
    said = str(run.error)
    assert said.startswith("Workflow miscounts: What `")
    assert "does not fit its declared return type `int`: Expected `int`, got `str`" in said

    async def says_nothing() -> None:
        return "ignored"  # pyright: ignore

    assert PureRun(workflow(says_nothing)).result is None


def test_a_step_whose_result_does_not_fit_its_annotation_is_named() -> None:
    async def asks() -> int:
        return await a()

    run = PureRun(workflow(asks))
    run.done("a", "three")
    assert isinstance(run.error, NotDecodable)
    assert str(run.error) == (
        "Step desk.a: What `a` returned does not fit its declared return type `int`: Expected "
        "`int`, got `str`. Correct what it returns, or the annotation."
    )


def test_imports_tracebacks_and_log_files_are_no_io_of_workflow_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lazy").mkdir()
    (tmp_path / "lazy" / "__init__.py").write_text("")
    (tmp_path / "lazy" / "part.py").write_text("def fail():\n    return 1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    rotated = RotatingFileHandler(tmp_path / "log", maxBytes=10, backupCount=1)
    log = logging.getLogger("tests.rotated")
    log.addHandler(rotated)

    async def looks_harmless() -> str:
        import lazy.part  # pyright: ignore

        for _ in range(3):
            log.warning("a line that fills the file")
        try:
            lazy.part.fail()  # pyright: ignore
        except ZeroDivisionError:
            linecache.clearcache()
            return traceback.format_exc()
        return ""

    try:
        run = PureRun(workflow(looks_harmless), shadow=False)
        assert "return 1 / 0" in str(run.result)
        assert (tmp_path / "log.1").exists()
        assert list((tmp_path / "lazy").glob("__pycache__/part*.pyc"))
    finally:
        log.removeHandler(rotated)
        rotated.close()
        for name in ("lazy", "lazy.part"):
            sys.modules.pop(name, None)


def test_a_heartbeat_of_workflow_code_is_refused() -> None:
    async def beats() -> None:
        heartbeat("alive")

    run = PureRun(workflow(beats), shadow=False)
    assert isinstance(run.error, OnlyInWorkflow)
    assert "heartbeat() belongs into a step" in str(run.error)


def test_refusal_ends_with_the_workflow_code_and_never_reaches_other_threads(
    tmp_path: Path,
) -> None:
    written: list[str] = []
    go, done = threading.Event(), threading.Event()

    def outsider() -> None:
        go.wait(10)
        (tmp_path / "file").write_text("fine")
        time.sleep(0.001)
        written.append("fine")
        done.set()

    async def waits_for_outsider() -> str:
        go.set()
        while not done.is_set():
            pass
        return "fine"

    thread = threading.Thread(target=outsider)
    thread.start()
    run = PureRun(workflow(waits_for_outsider), shadow=False)
    thread.join(10)
    assert run.result == "fine"
    assert written == ["fine"]
    (tmp_path / "file").read_text()


def test_a_loop_that_never_waits_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 11: one workflow cannot keep the node busy for ever."""
    monkeypatch.setattr("pavane.core.loop.CALLBACKS_MAX", 10_000)

    async def spins() -> None:
        while True:
            await asyncio.sleep(0)

    run = PureRun(workflow(spins))
    assert run.status == "failed"
    assert "asyncio.sleep(0)" in str(run.error)


def test_exit_in_workflow_code_fails_the_run_and_not_the_node() -> None:
    """Invariant 11."""

    async def exits() -> None:
        await a()
        sys.exit(3)

    run = PureRun(workflow(exits))
    run.done("a", 1)
    assert run.status == "failed"
    assert "SystemExit" in str(run.error)


def test_exit_in_a_task_of_a_workflow_fails_the_run_and_not_the_node() -> None:
    async def exits() -> None:
        async def inner() -> None:
            sys.exit(3)

        await asyncio.gather(inner(), a())

    run = PureRun(workflow(exits))
    assert run.status == "failed"
    assert "SystemExit" in str(run.error)


def test_a_step_that_failed_with_stop_iteration_is_delivered_as_an_error() -> None:
    """Invariant 11: no future takes a StopIteration."""

    async def catches() -> str:
        try:
            await a()
        except Exception as error:
            return f"{type(error).__name__} {error}"
        raise AssertionError

    run = PureRun(workflow(catches))
    run.fail("a", StopIteration("end"))
    assert "StopIteration" in run.result


# -- putting away ------------------------------------------------------------------------------


def test_a_discarded_execution_does_nothing_durable_in_its_cleanup() -> None:
    """Invariant 1: putting a run away is not an event in its life."""
    SEEN.clear()

    async def cleans() -> None:
        try:
            async with saga() as undo:
                undo(undo_a, 1)
                await a()
        finally:
            SEEN.append("finally")
            asyncio.create_task(b())  # noqa: RUF006
            await b()
            SEEN.append("after")

    run = PureRun(workflow(cleans), shadow=False)
    run.execution.discard()
    assert SEEN == ["finally"]
    assert run.execution.given_up == []
    assert [op.fingerprint for op in run.execution.new] == ["step desk.a"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_discarded_execution_is_put_away_even_if_its_code_resists() -> None:
    """Invariant 11: a bare `except` in a loop cannot hang the node."""
    SEEN.clear()

    async def resists() -> None:
        while True:
            try:
                await a()
            except BaseException:
                SEEN.append("resisted")

    run = PureRun(workflow(resists), shadow=False)
    run.execution.discard()
    assert len(SEEN) < 20


def test_a_discarded_task_leaves_no_complaint_behind(caplog: pytest.LogCaptureFixture) -> None:
    async def waits() -> None:
        await asyncio.gather(a(), b(), asyncio.sleep(5))

    with caplog.at_level(logging.DEBUG, "asyncio"):
        for _ in range(3):
            run = PureRun(workflow(waits), shadow=False)
            run.execution.discard()
            del run
    assert not [record for record in caplog.records if "destroyed" in record.getMessage()]


# -- cancel ------------------------------------------------------------------------------------


def test_cancel_lets_finally_call_steps_and_then_ends_cancelled() -> None:
    async def cleans() -> None:
        try:
            await a()
        finally:
            await b(7)

    run = PureRun(workflow(cleans))
    run.cancel()
    assert (run.given_up, run.wanted) == (["step desk.a"], ["step desk.b"])
    run.done("b", 0)
    assert run.status == "cancelled"


def test_a_swallowed_cancel_lets_the_run_go_on_and_a_second_one_is_delivered_too() -> None:
    async def stubborn() -> str:
        try:
            await a()
        except asyncio.CancelledError:
            pass
        await b()
        return "went on"

    run = PureRun(workflow(stubborn))
    run.cancel()
    assert run.wanted == ["step desk.b"]
    run.cancel()
    assert run.status == "cancelled"
    run = PureRun(workflow(stubborn))
    run.cancel()
    run.done("b", 1)
    assert run.result == "went on"


def test_cancel_before_the_first_await_of_a_second_step_is_not_lost() -> None:
    async def two() -> None:
        await a()
        await b()

    run = PureRun(workflow(two))
    run.done("a", 1)
    run.cancel()
    assert run.status == "cancelled"


def test_a_run_timeout_cancels_with_cleanup_and_fails_with_run_timeout() -> None:
    async def slow() -> None:
        try:
            await a()
        finally:
            await b()

    run = PureRun(workflow(slow), timeout_s=60)
    assert run.wanted == ["timer expiry", "step desk.a"]
    run.fire()
    assert run.wanted == ["step desk.b"]
    run.done("b", 0)
    assert isinstance(run.error, RunTimeout)
    assert "60 s" in str(run.error)


def test_a_workflow_that_ends_in_time_takes_its_expiry_along() -> None:
    async def quick() -> int:
        return await a()

    run = PureRun(workflow(quick), timeout_s=60)
    run.done("a", 3)
    assert run.result == 3


# -- saga --------------------------------------------------------------------------------------


async def _booking(fail_at: int = 3) -> str:
    async with saga() as undo:
        first = await a(1)
        undo(undo_a, first)
        second = await b(2)
        undo(undo_b, second)
        await c(3)
    return "booked"


booking = workflow(_booking, name="booking")


def test_a_saga_compensates_in_reverse_with_the_results_it_was_given() -> None:
    """Invariant 7."""
    run = PureRun(booking)
    run.done("a", 10)
    run.done("b", 20)
    run.fail("c", ValueError("no"))
    assert run.wanted == ["undo other.undo_b"]
    assert bytes(run.find("undo_b").args) == b"[20]"
    run.done("undo_b")
    assert run.wanted == ["undo other.undo_a"]
    assert bytes(run.find("undo_a").args) == b"[10]"
    run.done("undo_a")
    assert isinstance(run.error, ValueError)
    assert [mark for mark in run.issued if mark.startswith("undo")] == [
        "undo other.undo_b",
        "undo other.undo_a",
    ]


def test_a_completed_saga_compensates_nothing() -> None:
    run = PureRun(booking)
    for name in ("a", "b", "c"):
        run.done(name, 1)
    assert run.result == "booked"
    assert not [mark for mark in run.issued if mark.startswith("undo")]


def test_cancel_compensates_and_a_cancel_meanwhile_does_not_stop_it() -> None:
    """Invariant 7: half a compensation helps nobody."""
    run = PureRun(booking)
    run.done("a", 10)
    run.done("b", 20)
    run.cancel()
    assert run.wanted == ["undo other.undo_b"]
    run.cancel()
    assert run.wanted == ["undo other.undo_b"]
    run.done("undo_b")
    run.cancel()
    run.done("undo_a")
    assert run.status == "cancelled"


def test_a_run_timeout_during_compensation_does_not_stop_it() -> None:
    run = PureRun(booking, timeout_s=60)
    run.done("a", 10)
    run.fail("b", ValueError("no"))
    run.fire()
    assert run.wanted == ["undo other.undo_a"]
    run.done("undo_a")
    assert run.status == "failed"


def test_a_declared_undo_is_registered_before_its_step_starts() -> None:
    """Invariant 7: a step in doubt is compensated too."""

    async def declared() -> None:
        async with saga():
            await booked(5)

    run = PureRun(workflow(declared))
    run.fail("booked", TimeoutError("in doubt"))
    assert run.wanted == ["undo other.undo_a"]
    assert bytes(run.find("undo_a").args) == b"[5]"
    run.done("undo_a")
    assert isinstance(run.error, TimeoutError)


def test_a_declared_undo_does_nothing_outside_a_saga() -> None:
    async def declared() -> None:
        await booked(5)

    run = PureRun(workflow(declared))
    run.fail("booked", ValueError("no"))
    assert isinstance(run.error, ValueError)


def test_sagas_nest_and_the_outer_one_undoes_what_the_inner_one_completed() -> None:
    async def nested() -> None:
        async with saga() as outer:
            outer(undo_a, 1)
            async with saga() as inner:
                inner(undo_b, 2)
                await a()
            await b()

    run = PureRun(workflow(nested))
    run.fail("a", ValueError("inner"))
    run.done("undo_b")
    run.done("undo_a")
    assert run.status == "failed"
    run = PureRun(workflow(nested))
    run.done("a", 1)
    run.fail("b", ValueError("outer"))
    assert run.wanted == ["undo other.undo_a"]


def test_parallel_registrations_are_undone_in_reverse_of_their_registration() -> None:
    async def parallel() -> None:
        async with saga() as undo:

            async def one(number: int) -> None:
                await a(number)
                undo(undo_a, number)

            await asyncio.gather(*(one(number) for number in range(3)))
            await c()

    run = PureRun(workflow(parallel))
    for ordinal in (1, 0, 2):
        run.done(ordinal, 0)
    run.fail("c", ValueError("no"))
    undone: list[bytes] = []
    while run.outcome is None:
        undone.append(bytes(run.find("undo_a").args))
        run.done("undo_a")
    assert undone == [b"[2]", b"[0]", b"[1]"]


# -- patched and changed code ------------------------------------------------------------------


async def _old() -> str:
    await a()
    await b()
    return "old"


async def _new() -> str:
    await a()
    if patched("skip b"):
        await c()
        return "new"
    await b()
    return "old"


def test_patched_is_false_for_runs_that_passed_before_and_true_for_later_ones() -> None:
    """Invariant 3."""
    old, new = workflow(_old, name="flow"), workflow(_new, name="flow")
    run = PureRun(old)
    run.done("a", 1)
    before = run.replayed(new)
    assert [op.fingerprint for op in before.pending.values()] == ["step desk.b"]
    early = PureRun(old)
    live = early.replayed(new)
    live.feed(Entry("done", early.now_us, 0, value=Raw(b"1")))
    assert [op.fingerprint for op in live.pending.values()] == ["step other.c"]
    fresh = PureRun(new)
    fresh.done("a", 1)
    assert fresh.journal[-1].issued == ["patch skip b", "step other.c"]
    fresh.done("c", 1)
    assert fresh.result == "new"


def test_patched_gives_one_answer_for_the_whole_life_of_a_run() -> None:
    async def loops() -> list[bool]:
        answers: list[bool] = []
        for _ in range(3):
            answers.append(patched("twice"))
            await a()
        return answers

    async def plain() -> list[bool]:
        for _ in range(3):
            await a()
        return []

    run = PureRun(workflow(loops, name="flow"))
    for _ in range(3):
        run.done("a", 1)
    assert run.result == [True] * 3
    old = PureRun(workflow(plain, name="flow"))
    old.done("a", 1)
    live = old.replayed(workflow(loops, name="flow"))
    for number in (1, 2):
        live.feed(Entry("done", old.now_us, number, value=Raw(b"1")))
    assert live.outcome is not None
    assert bytes(live.outcome.value) == b"[false,false,false]"


@pytest.mark.parametrize("at", [1, 2, 3])
def test_changed_code_is_noticed_with_a_diff_before_it_does_anything(at: int) -> None:
    """Invariant 3: a mismatch says what was recorded and what the code asks for now."""

    async def before() -> None:
        await a()
        await b()
        await c()

    async def after() -> None:
        await a()
        await c()
        await b()

    run = PureRun(workflow(before, name="flow"))
    for name in ("a", "b", "c")[:at]:
        run.done(name, 1)
    if at == 3:
        assert run.status == "completed"
    with pytest.raises(Mismatch) as caught:
        run.replayed(workflow(after, name="flow"))
    text = str(caught.value)
    assert "-step desk.b" in text
    assert "+step other.c" in text
    assert "recorded in the journal" in text
    assert "patched" in text
    assert "flow" in text


def test_code_that_asks_for_less_or_ends_sooner_is_noticed() -> None:
    async def before() -> None:
        await a()
        await b()

    async def after() -> None:
        await a()

    run = PureRun(workflow(before, name="flow"))
    run.done("a", 1)
    with pytest.raises(Mismatch, match=r"-step desk\.b"):
        run.replayed(workflow(after, name="flow"))


def test_a_result_for_what_nobody_waits_for_is_a_mismatch_that_lists_what_is_waited_for() -> None:
    async def one() -> None:
        await a()

    run = PureRun(workflow(one), shadow=False)
    with pytest.raises(Mismatch, match=r"operation 7.*step desk\.a"):
        run.execution.feed(Entry("done", run.now_us, 7))


# -- values of the run -------------------------------------------------------------------------


def test_random_values_times_and_ids_are_the_same_on_every_replay() -> None:
    async def draws() -> list[Any]:
        first: list[Any] = [str(uuid4()), pavane.random(), now().isoformat(), run_id()]
        await asyncio.gather(a(), asyncio.sleep(1))
        return [*first, str(uuid4()), pavane.random(), now().isoformat()]

    run = PureRun(workflow(draws))
    run.fire()
    run.done("a", 1)
    entries = decode_chunk(run.written())
    again = replay(run.header, run.workflow, entries)
    assert again.outcome == run.outcome
    assert len({value for value in run.result if isinstance(value, str)}) == 5
    another = PureRun(workflow(draws), run="run-2")
    another.fire()
    another.done("a", 1)
    assert another.result[0] != run.result[0]
    assert another.result[1] != run.result[1]


def test_every_prefix_of_a_journal_replays_to_where_the_run_then_was() -> None:
    """Invariants 3 and 9."""
    stages: list[list[Any]] = []
    run = PureRun(booking)
    stages.append(described(run.execution))
    for deliver in (
        lambda: run.done("a", 1),
        lambda: run.done("b", 2),
        lambda: run.fail("c", ValueError("no")),
        lambda: run.done("undo_b"),
        lambda: run.done("undo_a"),
    ):
        deliver()
        stages.append(described(run.execution))
    for length, stage in enumerate(stages, 1):
        assert described(run.replayed(upto=length)) == stage
    assert_same(run.replayed(), run.execution)


def test_what_a_workflow_is_given_live_has_been_through_the_codec() -> None:
    """Invariant 8: a live value and its replay have the same type."""
    service = Service("types")

    @service.step
    async def pair() -> tuple[int, ...]:
        return (1, 2)

    @service.workflow
    async def typed() -> str:
        return type(await pair()).__name__

    run = PureRun(typed)
    run.done("pair", [1, 2])
    assert run.result == "tuple"


def test_a_result_that_does_not_fit_its_type_is_an_error_in_the_workflow() -> None:
    async def catches() -> str:
        try:
            await a()
        except pavane.NotDecodable:
            return "caught"
        return "not noticed"

    run = PureRun(workflow(catches))
    run.done("a", "text")
    assert run.result == "caught"


def test_arguments_are_those_of_the_moment_of_the_call() -> None:
    service = Service("lists")

    @service.step
    async def take(values: list[int]) -> None: ...

    @service.workflow
    async def mutates() -> None:
        values = [1]
        task = asyncio.ensure_future(take(values))
        await asyncio.sleep(0)
        values.append(2)
        await task

    run = PureRun(mutates)
    assert bytes(run.find("take").args) == b"[[1]]"


def test_arguments_and_results_above_the_limit_fail_before_anything_is_sent() -> None:
    service = Service("large")

    @service.step
    async def take(text: str) -> None: ...

    @service.workflow
    async def sends() -> None:
        await take("x" * 2_000_000)

    @service.workflow
    async def returns() -> str:
        return "x" * 2_000_000

    for flow in (sends, returns):
        run = PureRun(flow)
        assert run.wanted == []
        assert isinstance(run.error, TooLarge), repr(run.error)
        assert "1,048,576" in str(run.error)


def test_a_result_that_cannot_be_written_fails_the_run() -> None:
    async def returns() -> Any:
        return object()

    run = PureRun(workflow(returns))
    assert isinstance(run.error, pavane.NotEncodable)


# -- receive -----------------------------------------------------------------------------------


def test_receive_delivers_declared_events_by_type() -> None:
    async def asks() -> str:
        nudge, answer = await asyncio.gather(receive(Nudge), receive(Answer))
        return nudge.text + answer.text

    run = PureRun(workflow(asks, receives=[Answer, Nudge]))
    run.receive("Answer", Answer(text="!"))
    run.receive("Nudge", Nudge(text="hey"))
    assert run.result == "hey!"


def test_an_undeclared_receive_is_an_error_that_says_what_to_write() -> None:
    async def asks() -> None:
        await receive(Answer)

    run = PureRun(workflow(asks))
    assert isinstance(run.error, UndeclaredReceive)
    assert "receives=[Answer]" in str(run.error)


@pytest.mark.parametrize(
    "call",
    [now, uuid4, run_id, pavane.random, lambda: patched("x"), lambda: pavane.set_attributes(a=1)],
)
def test_calls_for_workflows_say_so_elsewhere(call: Callable[[], object]) -> None:
    with pytest.raises(OnlyInWorkflow, match="only inside a running workflow"):
        call()


def test_steps_and_workflows_are_plain_functions_outside_of_runs() -> None:
    async def plain() -> int:
        return await a(4)

    assert asyncio.run(a(3)) == 3  # pyright: ignore
    assert asyncio.run(workflow(plain)()) == 4


def test_an_execution_may_be_driven_inside_a_task_of_another_loop() -> None:
    """The engine's own tasks and a user's `await app.start(…)` drive executions."""

    async def two() -> int:
        return await a() + await b()

    async def outer() -> int:
        task = asyncio.current_task()
        run = PureRun(workflow(two))
        run.done("a", 1)
        await asyncio.sleep(0)
        run.done("b", 2)
        assert asyncio.current_task() is task
        return run.result

    assert asyncio.run(outer()) == 3


def test_two_runs_interleave_without_touching_each_other() -> None:
    async def two() -> str:
        await a()
        await b()
        return run_id()

    flow = workflow(two)
    one, another = PureRun(flow, run="one"), PureRun(flow, run="another")
    one.done("a", 1)
    another.done("a", 1)
    another.done("b", 1)
    one.done("b", 1)
    assert (one.result, another.result) == ("one", "another")


def test_a_driven_execution_costs_no_reference_cycle_with_its_journal() -> None:
    async def one() -> None:
        await a()

    run = PureRun(workflow(one), shadow=False)
    execution: Execution = run.execution
    execution.discard()
    assert execution.loop.tasks == []


def test_cleanup_that_forks_and_waits_is_put_away_whole() -> None:
    """Invariant 1: nothing is left whose clean-up garbage collection would run elsewhere."""
    SEEN.clear()

    async def stubborn() -> None:
        try:
            await a()
        finally:
            for _ in range(3):
                try:
                    await asyncio.sleep(0)
                    await asyncio.gather(asyncio.sleep(1), b())
                finally:
                    await asyncio.sleep(0)
                    await b()

    run = PureRun(workflow(stubborn))
    run.execution.discard()
    del run
    gc.collect()
    assert SEEN == []


def test_a_saga_left_running_is_undone_before_the_run_ends() -> None:
    """Invariant 7: `gather` leaves siblings of a failed one running; a saga among them counts."""

    async def sells() -> None:
        async with saga() as undo:
            undo(b, 1)
            await c()

    async def both() -> None:
        await asyncio.gather(sells(), a())

    run = PureRun(workflow(both))
    run.fail("a", ValueError("no"))
    assert run.status == "open"
    assert run.wanted == ["undo desk.b"]
    run.done("b", 1)
    assert run.status == "failed"
