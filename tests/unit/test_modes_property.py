"""Any program, both ways: orchestrated, passed along and forced home, it is the same run.

A generated program is interpreted by one workflow. A small pure driver stands in for the engine: it
asks the policy, encodes and decodes the baton at each pass, and answers operations after times that
depend on nothing but the operation. Whatever the mode, the journal must be the same, byte by byte.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw, structs

from pavane import Event, Service, now, patched, receive, saga, uuid4
from pavane.core.baton import Baton, Header, Stop, decode_baton, encode_baton
from pavane.core.codec import FORMAT, encode, encode_error
from pavane.core.execution import Execution
from pavane.core.journal import (
    Entry,
    decode_chunk,
    effective,
    encode_entry,
    join_entries,
    resumed_us,
)
from pavane.core.operations import EXPIRY, Mode, Operation
from pavane.core.policy import Pass, decide
from tests.unit.pure_driver import BEGINNING_US, assert_same, described, replay

DELIVERIES_MAX = 60


class Told(Event):
    number: int


home, left, right = (Service(name) for name in ("home", "left", "right"))
services = [home, left, right]


def _declare(service: Service) -> tuple[Any, Any]:
    @service.step
    async def work(number: int) -> int:
        raise AssertionError(number)

    @service.step
    async def undo(number: int) -> None:
        raise AssertionError(number)

    return work, undo


steps = [_declare(service) for service in services]


@right.workflow
async def child(number: int) -> int:
    raise AssertionError(number)


@home.workflow(receives=[Told])
async def interpret(program: Any) -> list[Any]:
    trace: list[Any] = [str(uuid4())]
    try:
        await _run(program, trace)
    except Exception as error:
        trace.append(type(error).__name__)
        raise ValueError(repr(trace)) from None
    return trace


async def _run(node: Any, trace: list[Any]) -> None:
    kind, *rest = node
    match kind:
        case "step":
            trace.append(await steps[rest[0]][0](rest[1]))
        case "sleep":
            await asyncio.sleep(rest[0])
            trace.append(now().isoformat())
        case "child":
            trace.append(await child(rest[0]))
        case "receive":
            trace.append((await receive(Told)).number)
        case "patched":
            trace.append(patched(f"p{rest[0]}"))
        case "sequence":
            for part in rest[0]:
                await _run(part, trace)
        case "loop":
            for _ in range(rest[0]):
                await _run(rest[1], trace)
        case "gather":
            await asyncio.gather(*(_run(part, trace) for part in rest[0]))
        case "group":
            try:
                async with asyncio.TaskGroup() as tasks:
                    for part in rest[0]:
                        tasks.create_task(_run(part, trace))
            except ExceptionGroup as errors:
                trace.append(["group", len(errors.exceptions)])
                raise errors.exceptions[0] from None
        case "race":
            racers = [asyncio.ensure_future(_run(part, trace)) for part in rest[0]]
            done, pending = await asyncio.wait(racers, return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
            trace.append(["raced", *(racers.index(task) for task in done)])
            for task in done:
                task.result()
        case "timeout":
            try:
                async with asyncio.timeout(rest[0]):
                    await _run(rest[1], trace)
            except TimeoutError:
                trace.append("late")
        case "catch":
            try:
                await _run(rest[0], trace)
            except Exception as error:
                trace.append(["caught", type(error).__name__])
        case "finally":
            try:
                await _run(rest[0], trace)
            finally:
                await _run(rest[1], trace)
        case "saga":
            async with saga() as undo:
                for service, number in rest[0]:
                    undo(steps[service][1], await steps[service][0](number))
                await _run(rest[1], trace)
        case _:
            raise AssertionError(node)


# -- programs ----------------------------------------------------------------------------------

numbers = st.integers(0, 30)
any_step = st.tuples(st.just("step"), st.integers(0, 2), numbers)
leaves = st.one_of(
    any_step,
    any_step,
    st.tuples(st.just("sleep"), st.integers(0, 6)),
    st.tuples(st.just("child"), numbers),
    st.tuples(st.just("receive")),
    st.tuples(st.just("patched"), st.integers(0, 2)),
)


def _nested(inner: Any) -> Any:
    several = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        st.tuples(st.just("sequence"), several),
        st.tuples(st.just("gather"), several),
        st.tuples(st.just("group"), several),
        st.tuples(st.just("race"), several),
        st.tuples(st.just("loop"), st.integers(1, 3), inner),
        st.tuples(st.just("timeout"), st.integers(1, 8), inner),
        st.tuples(st.just("catch"), inner),
        st.tuples(st.just("finally"), inner, inner),
        st.tuples(
            st.just("saga"),
            st.lists(st.tuples(st.integers(0, 2), numbers), min_size=1, max_size=3),
            inner,
        ),
    )


programs = st.recursive(leaves, _nested, max_leaves=10)


# -- driving -----------------------------------------------------------------------------------


@dataclass
class Ended:
    """What became of a run: its journal and how its baton went."""

    journal: list[bytes]
    outcome: Any
    hops: list[str]


def answer(op: Operation, at_us: int) -> Entry:
    """The result of an operation: a third of the steps fail, compensations never do."""
    if op.kind == "timer":
        return Entry("fired", at_us, op.ordinal)
    number = int(bytes(op.args).strip(b"[]") or b"0")
    if op.kind == "receive":
        return Entry("received", at_us, op.ordinal, Raw(encode(Told(number=op.ordinal))))
    if not op.undo and number % 3 == 2:
        error = KeyError(number) if number % 2 else TimeoutError("no answer")
        return Entry("failed", at_us, op.ordinal, Raw(encode_error(error)), op.service, 1)
    value = None if op.undo else number * 100 + op.ordinal
    return Entry("done", at_us, op.ordinal, Raw(encode(value)), op.service, 1)


def due_us(op: Operation) -> int:
    if op.kind == "timer":
        return op.deadline_us
    number = int(bytes(op.args).strip(b"[]") or b"3")
    return op.issued_us + (number * 7 % 5) * 1_000_000 + op.ordinal


def drive(
    program: Any, mode: Mode, *, cancel_at: int = -1, timeout_s: int = 0, hops_max: int = 1000
) -> Ended:
    header = Header("run", "interpret", 1, "home", mode, BEGINNING_US, "run", timeout_s * 1_000_000)
    execution = Execution(header, interpret)
    written: list[bytes] = []
    here, hops = "home", list[str]()
    now_us = BEGINNING_US

    def deliver(entry: Entry) -> None:
        execution.feed(entry)
        written.append(encode_entry(entry))
        # Invariant 3: any prefix of the journal leads to the same place.
        shadow = replay(header, interpret, decode_chunk(join_entries(written)))
        assert_same(shadow, execution)
        shadow.discard()

    deliver(Entry("start", now_us, value=Raw(interpret.params.encode((program,), {}))))
    while execution.outcome is None and len(written) < DELIVERIES_MAX:
        if len(written) == cancel_at:
            cancel_at = -1
            deliver(Entry("cancel", now_us))
            continue
        decision = decide(
            list(execution.pending.values()), here=here, home="home", mode=mode,
            forced=header.forced, journal_bytes=sum(map(len, written)), hops=len(hops),
            hops_max=hops_max,
        )  # fmt: skip
        if isinstance(decision, Pass):
            header.forced = header.forced or decision.forced
            here = decision.to
            hops.append(here)
            execution, header = passed(execution, header, written, len(hops))
            continue
        for op in execution.pending.values():
            op.sent = op.kind != "receive" or here == "home"
        first = min(execution.pending.values(), key=lambda op: (due_us(op), op.ordinal))
        now_us = max(now_us, due_us(first))
        deliver(answer(first, now_us))
    outcome = execution.outcome and (execution.outcome.status, bytes(execution.outcome.value))
    if outcome is not None and outcome[0] == "failed":
        outcome = ("failed", outcome[1].partition(b'"trace"')[0])
    execution.discard()
    return Ended(written, outcome, hops)


def passed(
    execution: Execution, header: Header, written: list[bytes], hop: int
) -> tuple[Execution, Header]:
    """Hand the run over as bytes, and rebuild it from them."""
    sent = {op.ordinal for op in execution.pending.values() if op.sent}
    stops = [Stop("home", BEGINNING_US, 0)]
    chunk = Raw(join_entries(written))
    baton = decode_baton(encode_baton(Baton(FORMAT, header, hop, len(written), chunk, stops, {})))
    arrived = replay(baton.header, interpret, effective(decode_chunk(bytes(baton.entries))))
    assert_same(arrived, execution)
    for op in arrived.pending.values():
        op.sent = op.ordinal in sent
    execution.discard()
    return arrived, baton.header


# -- what holds --------------------------------------------------------------------------------


@settings(max_examples=250, deadline=None)
@given(programs, st.sampled_from([0, 0, 7]))
def test_both_modes_write_the_same_journal_and_end_alike(program: Any, timeout_s: int) -> None:
    """Invariants 2, 3, 5, 8: no mismatch at any prefix, one journal, one outcome."""
    orchestrated = drive(program, "orchestration", timeout_s=timeout_s)
    choreographed = drive(program, "choreography", timeout_s=timeout_s)
    assert orchestrated.hops == []
    assert choreographed.journal == orchestrated.journal
    assert choreographed.outcome == orchestrated.outcome


@settings(max_examples=150, deadline=None)
@given(programs, st.integers(1, 12), st.integers(0, 3))
def test_cancel_at_any_point_and_any_cap_change_nothing_between_modes(
    program: Any, cancel_at: int, hops_max: int
) -> None:
    """Invariants 3, 7, 8: clean-up and compensation too are the same both ways."""
    one = drive(program, "orchestration", cancel_at=cancel_at)
    other = drive(program, "choreography", cancel_at=cancel_at, hops_max=hops_max)
    assert other.journal == one.journal
    assert other.outcome == one.outcome
    assert len(other.hops) <= hops_max + 1


@settings(max_examples=100, deadline=None)
@given(programs, st.integers(1, DELIVERIES_MAX), st.integers(0, 1000))
def test_a_run_that_is_taken_back_is_the_same_with_its_whole_timeout_again(
    program: Any, cut: int, later_s: int
) -> None:
    """Invariant 3: only the deadline moves, and it does by the journal alone."""
    told = drive(program, "orchestration", timeout_s=7)
    entries = decode_chunk(join_entries(told.journal))[:cut]
    before = Header("run", "interpret", 1, "home", "orchestration", BEGINNING_US, "run", 7_000_000)
    rewound_us = BEGINNING_US + later_s * 1_000_000
    after = structs.replace(before, resumed_us=resumed_us([Entry("rewind", rewound_us, cut)]))
    first = {op.ordinal: op for op in replay(before, interpret, entries).pending.values()}
    again = {op.ordinal: op for op in replay(after, interpret, entries).pending.values()}
    assert first.keys() == again.keys()
    for op in again.values():
        assert (op.fingerprint, op.args) == (first[op.ordinal].fingerprint, first[op.ordinal].args)
        moved = op.deadline_us - first[op.ordinal].deadline_us
        assert moved == (rewound_us - BEGINNING_US if op.name == EXPIRY else 0)


@settings(max_examples=150, deadline=None)
@given(programs, st.sampled_from(["orchestration", "choreography"]))
def test_compensations_mirror_what_was_registered(program: Any, mode: Mode) -> None:
    """Invariant 7: a saga's compensations come in reverse order, and each once."""
    flow = ("saga", [(0, 0), (1, 3), (2, 6)], program)
    told = drive(flow, mode)
    entries = decode_chunk(join_entries(told.journal))
    issued = [mark for entry in entries for mark in entry.issued if not mark.startswith("patch")]
    if told.outcome is None or told.outcome[0] == "completed":
        return
    undone = [mark for mark in issued if mark.startswith("undo")]
    # A failed gather leaves its siblings running, so a saga among them may undo in between.
    in_order = iter(undone)
    assert all(mark in in_order for mark in ("undo right.undo", "undo left.undo", "undo home.undo"))
    done = [e.op for e in entries if e.what == "done" and issued[e.op].startswith("undo")]
    assert len(done) == len(set(done)) == len(undone)


def test_choreography_really_passes_the_baton() -> None:
    flow = ("sequence", [("step", 1, 0), ("step", 2, 0), ("receive",), ("step", 1, 1)])
    told = drive(flow, "choreography")
    assert told.hops == ["left", "right", "home", "left"]


def test_a_rebuilt_run_asks_for_the_same_with_the_same_arguments() -> None:
    told = drive(("gather", [("step", 0, 1), ("step", 1, 4), ("sleep", 3)]), "orchestration")
    entries = decode_chunk(join_entries(told.journal))
    header = Header("run", "interpret", 1, "home", "orchestration", BEGINNING_US, "run")
    twice = [described(replay(header, interpret, entries[:2])) for _ in range(2)]
    assert twice[0] == twice[1]
