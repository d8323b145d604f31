"""Real input: replay recorded incidents of a support desk as runs over three support lines.

    python examples/incidents.py incidents.jsonl.gz --cases 500

Each line of the file is one incident: `{"case": id, "events": [{"at", "activity", "transition",
"team"}, …]}`, as in the log of the BPI Challenge 2013 (doi
10.4121/uuid:500573e6-accc-4b0c-9576-aa5468b10cee), which was made by Ward Steeman at Volvo IT.

An incident wanders between teams of the first, second and third line, as real processes do: nobody
designed these paths. Every recorded activity becomes a step at the line of its team, every recorded
wait a durable timer, and what the steps returned must equal the record, in both modes.
"""

from __future__ import annotations

import asyncio
import gzip
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

import click
import msgspec

from pavane import App, RunFailed, Service
from pavane.stores.port import Store

Mode = Literal["orchestration", "choreography"]
MODES: tuple[Mode, ...] = ("orchestration", "choreography")

# A recorded day takes a millisecond here, so that the incident that lay about for two years keeps
# nobody waiting for more than a second.
SHRINK = 86_400_000
IN_FLIGHT = 300


class Work(msgspec.Struct, frozen=True):
    """One recorded activity: which line did what, and how long the incident waited afterwards."""

    line: str
    what: str
    wait_s: float | None = None


class Incident(msgspec.Struct, frozen=True):
    """One recorded incident: its case number and all that was done about it, in order."""

    case: str
    works: list[Work]

    @property
    def record(self) -> list[str]:
        """What a faithful replay returns."""
        return [f"{work.line}: {work.what}" for work in self.works]


# -- the process -------------------------------------------------------------------------------

first, second, third = Service("first"), Service("second"), Service("third")
SERVICES = [first, second, third]


# The line is written into each result by the service that did the work, not copied from the
# argument: a step that went to the wrong service would show.
@first.step
async def first_line(case: str, what: str) -> str:
    return f"first: {what}"


@second.step
async def second_line(case: str, what: str) -> str:
    return f"second: {what}"


@third.step
async def third_line(case: str, what: str) -> str:
    return f"third: {what}"


LINES = {"first": first_line, "second": second_line, "third": third_line}


# Incidents come in at the first line, so that is the home of their runs. Orchestrated, the first
# line sends every activity of the others to them and waits for the answer; choreographed, the
# incident itself travels.
@first.workflow
async def handle(incident: Incident) -> list[str]:
    performed: list[str] = []
    for work in incident.works:
        performed.append(await LINES[work.line](incident.case, work.what))
        if work.wait_s is not None:
            await asyncio.sleep(work.wait_s)  # durable: it would survive a restart
    return performed


app = App("incidents", services=SERVICES)


# -- the input ---------------------------------------------------------------------------------


class RecordedEvent(msgspec.Struct, frozen=True):
    """One event as the file has it; the persons in it are nobody's business here."""

    at: datetime
    activity: str
    transition: str
    team: str

    @property
    def line(self) -> str:
        """Teams are called "V30", "N52 2nd", "V5 3rd", and "V13 2nd 3rd" when they serve two."""
        return {"2nd": "second", "3rd": "third"}.get(self.team[-3:], "first")

    @property
    def waits(self) -> bool:
        return self.activity == "Queued" or self.transition.startswith("Wait")


class RecordedIncident(msgspec.Struct, frozen=True):
    """One line of the file."""

    case: str
    events: list[RecordedEvent]


def read_incidents(path: Path) -> list[Incident]:
    """Read all incidents of a .jsonl.gz file, waits scaled down."""
    decode = msgspec.json.Decoder(RecordedIncident).decode
    with gzip.open(path) as lines:
        return [_incident(decode(line)) for line in lines]


def _incident(recorded: RecordedIncident) -> Incident:
    works: list[Work] = []
    for event, following in zip(recorded.events, [*recorded.events[1:], None], strict=True):
        wait_s = None
        if following is not None and event.waits:
            wait_s = (following.at - event.at).total_seconds() / SHRINK
        works.append(Work(event.line, f"{event.activity}/{event.transition}", wait_s))
    return Incident(recorded.case, works)


def sample(incidents: Sequence[Incident], count: int) -> list[Incident]:
    """Return `count` incidents spread evenly over all of them; all, if there are not so many."""
    total = len(incidents)
    return (
        [incidents[at * total // count] for at in range(count)] if count < total else [*incidents]
    )


# -- the replay --------------------------------------------------------------------------------


class Report(msgspec.Struct, frozen=True):
    """What came of a replay in one mode; `different`: the cases that were not equal, and how."""

    mode: Mode
    cases: int
    activities: int
    seconds: float
    different: dict[str, str]

    @property
    def equal(self) -> int:
        return self.cases - len(self.different)

    @property
    def cases_per_s(self) -> float:
        return self.cases / self.seconds


async def replay(
    cases: Iterable[Incident],
    mode: Mode,
    store: str | Store,
    *,
    in_flight: int = IN_FLIGHT,
    patience: str = "2m",
    on_done: Callable[[], None] = lambda: None,
) -> Report:
    """Replay `cases` in `mode` on `store`, at most `in_flight` at a time, and compare each result.

    All three lines work in this process. A case that takes longer than `patience` counts as
    different: one that went missing is told, not waited for. A case that the store has finished
    already is not done again, so an interrupted replay can be continued (its speed means nothing).
    """
    waiting = iter(cases)
    done = activities = 0
    different: dict[str, str] = {}
    desk = App("incidents", services=SERVICES, store=store)

    async def work_off() -> None:
        nonlocal done, activities
        for incident in waiting:
            # Both modes may share a store; within one mode the case number is the run's id.
            run = await desk.start(handle, incident, id=f"{mode}-{incident.case}", mode=mode)
            try:
                difference = _difference(incident.record, await run.result(timeout=patience))
            except RunFailed as error:
                difference = str(error)
            except TimeoutError:
                difference = f"no result within {patience}"
            if difference:
                different[incident.case] = difference
            done += 1
            activities += len(incident.works)
            on_done()

    async with desk:
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(work_off())
        seconds = time.perf_counter() - began
    return Report(mode, done, activities, seconds, different)


def _difference(record: list[str], performed: list[str]) -> str:
    """Say where a replay left the record; nothing if it did not."""
    if performed == record:
        return ""
    for at, (wanted, got) in enumerate(zip(record, performed, strict=False), 1):
        if wanted != got:
            return f"activity {at} should be {wanted!r} and is {got!r}"
    return f"{len(record)} activities are recorded, {len(performed)} were performed"


# -- the command -------------------------------------------------------------------------------


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--cases", type=click.IntRange(min=1), help="How many, spread evenly; all by default."
)
@click.option("--mode", type=click.Choice([*MODES, "both"]), default="both", show_default=True)
@click.option("--store", help="A store to use and keep; a temporary file by default.")
def main(file: Path, cases: int | None, mode: str, store: str | None) -> None:
    """Replay the incidents of FILE (.jsonl.gz) and compare what was done with the record."""
    incidents = read_incidents(file)
    chosen = sample(incidents, cases or len(incidents))
    modes: list[Mode] = [known for known in MODES if mode in (known, "both")]
    with tempfile.TemporaryDirectory(prefix="pavane-incidents-") as folder:
        address = store or f"{folder}/incidents.db"
        reports = [_replay_shown(chosen, each, address) for each in modes]
    for report in reports:
        click.echo(
            f"{report.mode:<14}{report.cases:>6,} cases, {report.activities:,} activities in "
            f"{report.seconds:.1f} s: {report.cases_per_s:,.0f} cases/s; "
            f"{report.equal:,} of {report.cases:,} equal to the record"
        )
        for case, difference in report.different.items():
            click.echo(f"  {case}: {difference}")
    sys.exit(any(report.different for report in reports))


def _replay_shown(chosen: Sequence[Incident], mode: Mode, store: str) -> Report:
    # The bar goes to stderr, so that stdout holds the figures alone.
    with click.progressbar(
        length=len(chosen), label=f"{mode:<14}", file=sys.stderr, show_pos=True, update_min_steps=20
    ) as bar:
        return asyncio.run(replay(chosen, mode, store, on_done=lambda: bar.update(1)))


if __name__ == "__main__":
    main()
