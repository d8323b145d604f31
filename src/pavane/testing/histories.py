"""Histories of runs as files, and their replay against the code as it is now.

A history is a line of JSON: what is known of a run from its start, and its journal. Replaying it
tells whether a run that is under way would go on with this code, or be stuck: before that code is
deployed. Histories hold the arguments and results of the runs: keep them as you keep these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Literal

import msgspec

from pavane.app import App, Client
from pavane.cli.text import counted
from pavane.core.baton import ENDED, Header, Status
from pavane.core.execution import rebuilt
from pavane.core.journal import Entry, eras
from pavane.engine.held import decode_header
from pavane.errors import BadArguments, CorruptJournal, Mismatch, PavaneError, UnknownName
from pavane.testing.parallel import spread

FORMAT = 1
SUFFIX = ".jsonl"
CHUNK = 100
"""Histories that a process replays between two reports of progress."""

Verdict = Literal["fits", "mismatch", "unknown", "retired", "unreadable"]
Progress = Callable[[int, int], None]
"""Told of histories that were replayed, and of how many there are."""


class History(msgspec.Struct, frozen=True):
    """One run, as it is written to a file."""

    header: Header
    status: Status
    entries: list[Entry]
    format: int = FORMAT


class Replayed(msgspec.Struct, frozen=True):
    """What came of one history.

    "fits"; "mismatch": the code would ask for something else, as `text` shows; "unknown": the run
    is under way, and the code has no workflow of this name and version; "retired": that too, but
    the run has ended; "unreadable".
    """

    run: str
    workflow: str
    version: int
    verdict: Verdict
    entries: int
    text: str
    where: str


class ReplayReport(msgspec.Struct, frozen=True):
    """What was replayed: `misfits` are those that keep this code from being deployed."""

    runs: int
    entries: int
    retired: int
    workflows: dict[str, int]
    misfits: list[Replayed]
    took_s: float


class ReplayFailed(AssertionError):
    """Runs would be stuck under the code as it is now; the text shows why."""

    def __init__(self, report: ReplayReport, text: str) -> None:
        super().__init__(text)
        self.report = report


_decoder = msgspec.json.Decoder(History)
_encoder = msgspec.json.Encoder()


async def read_history(client: Client, run: str) -> bytes:
    """Return a run's history as a line of JSON, without its end; raise UnknownRun and the like."""
    row = await client.home_row(run)
    history = await client.history(run)
    if history.problem:
        raise CorruptJournal(f"The history of run {run!r} cannot be read: {history.problem}")
    return _encoder.encode(History(decode_header(row.header), row.status, history.entries))


def replay_check(app: App, *paths: str | Path) -> ReplayReport:
    """Replay exported histories against an app's code; raise ReplayFailed if one does not fit.

    ```python
    def test_running_orders_go_on():
        replay_check(app, "tests/histories")
    ```

    `paths` are files as `pavane runs export` writes them, or folders with such files. What is
    compared is what each entry of a journal led to: the steps, timers, events and the like that
    the workflow asked for, by kind, service and name, in order. Arguments, durations and what the
    workflow returns are not. Raises BadArguments if there is no run to replay.
    """
    __tracebackhide__ = True
    report = replay(app, paths)
    if report.misfits:
        raise ReplayFailed(report, "\n".join(told(report)))
    return report


def replay(app: App, paths: Sequence[str | Path], progress: Progress | None = None) -> ReplayReport:
    """Replay exported histories against an app's code, and say which do not fit."""
    began_s = perf_counter()
    lines = [line for path in paths for line in _lines(Path(path))]
    if not lines:
        raise BadArguments(
            f"There is no run in {', '.join(map(str, paths)) or 'nothing'}, so nothing was "
            f"checked. `pavane runs export --app shop.py --to histories/` writes runs to a folder."
        )
    chunks = [lines[at : at + CHUNK] for at in range(0, len(lines), CHUNK)]
    found: dict[int, list[Replayed]] = {}
    for at, replayed in spread(partial(_replay_all, app), chunks):
        found[at] = replayed
        if progress is not None:
            progress(len(replayed), len(lines))
    all_of_them = [it for at in sorted(found) for it in found[at]]
    workflows: dict[str, int] = {}
    for it in all_of_them:
        if it.workflow:  # else it is unreadable
            workflows[it.workflow] = workflows.get(it.workflow, 0) + 1
    return ReplayReport(
        len(all_of_them), sum(it.entries for it in all_of_them),
        sum(it.verdict == "retired" for it in all_of_them), workflows,
        [it for it in all_of_them if it.verdict not in ("fits", "retired")],
        perf_counter() - began_s,
    )  # fmt: skip


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield each history below a path, with where it is."""
    if path.is_dir():
        files = sorted(path.rglob(f"*{SUFFIX}"))
    elif path.exists():  # a pipe, too
        files = [path]
    else:
        raise BadArguments(f"{path} does not exist. `pavane runs export --to {path}` writes it.")
    if not files:
        raise BadArguments(
            f"There are no {SUFFIX} files in {path}; `pavane runs export` writes them."
        )
    for file in files:
        for number, line in enumerate(file.read_bytes().splitlines(), 1):
            if line.strip():
                yield f"{file}:{number}", line


def _replay_all(app: App, lines: Sequence[tuple[str, bytes]]) -> list[Replayed]:
    return [_replay(app, where, line) for where, line in lines]


def _replay(app: App, where: str, line: bytes) -> Replayed:
    try:
        history = _decoder.decode(line)
    except msgspec.DecodeError as error:
        return Replayed("", "", 0, "unreadable", 0, f"This is no history of a run: {error}.", where)
    header, entries = history.header, history.entries
    verdict, text = _verdict(app, history)
    return Replayed(header.run, header.workflow, header.version, verdict, len(entries), text, where)


def _verdict(app: App, history: History) -> tuple[Verdict, str]:
    header, entries = history.header, history.entries
    if history.format != FORMAT:
        return "unreadable", f"It has format {history.format}; this version reads {FORMAT}."
    try:
        definition = app.registry.workflow(header.workflow, header.version)
    except UnknownName as error:
        return ("retired", "") if history.status in ENDED else ("unknown", str(error))
    header.era = eras(entries)
    execution, delivered = rebuilt(header, definition, entries, app.config.payload_max_bytes)
    if not delivered or (len(delivered) == 1 and not delivered[0].issued):
        return "fits", ""  # it has not begun
    try:
        execution.replay(delivered)
    except Mismatch as error:
        return "mismatch", str(error)
    except PavaneError as error:
        return "unreadable", str(error)
    execution.discard()
    return "fits", ""


# -- as text -----------------------------------------------------------------------------------


def told(report: ReplayReport) -> Iterator[str]:
    """Yield what does not fit, as lines: alike runs of a workflow once, with an example."""
    groups: dict[tuple[str, int, str], list[Replayed]] = {}
    for it in report.misfits:
        groups.setdefault((it.workflow, it.version, it.text), []).append(it)
    for (workflow, version, text), alike in groups.items():
        first = alike[0]
        if first.workflow:
            runs = "1 run does" if len(alike) == 1 else f"{len(alike):,} runs do"
            head = f"{workflow} v{version}: {runs} not fit, such as {first.run} ({first.where})"
        else:
            more = f" and {counted(len(alike) - 1, 'line')} more" if alike[1:] else ""
            head = f"{first.where}{more}"
        yield head
        yield from text.splitlines()
        yield ""
    yield summary(report)


def summary(report: ReplayReport) -> str:
    """Return the figures of a replay in one line."""
    fitting = report.runs - report.retired - len(report.misfits)
    facts = [f"{fitting:,} of {report.runs:,} runs fit"]
    facts += [f"{len(report.misfits):,} do not"] if report.misfits else []
    facts += [f"{report.retired:,} ended under code that is gone"] if report.retired else []
    speed = report.entries / max(report.took_s, 1e-9)
    facts.append(
        f"{report.entries:,} journal entries of "
        f"{counted(len(report.workflows), 'workflow')} in {report.took_s:.2f} s ({speed:,.0f}/s)"
    )
    return "; ".join(facts)


def file_name(history: bytes) -> str:
    """Return the name of the file that a history belongs to, where each workflow has one."""
    header = _decoder.decode(history).header
    return f"{header.workflow}.v{header.version}{SUFFIX}"
