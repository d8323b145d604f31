"""How a rehearsal is shown: a bar while it goes on, and what was found, as text."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import click

from pavane.cli.output import is_unicode, terminal_width
from pavane.cli.text import counted, duration, fit
from pavane.cli.timeline import draw
from pavane.core.operations import Mode
from pavane.insight.timeline import Timeline
from pavane.testing.performance import Finding
from pavane.testing.rehearsal import (
    Rehearsal,
    RehearsalFailed,
    Report,
    check_modes,
    checked_seeds,
)

MISHAPS_MAX = 12
_KINDS = {
    "invariant": "the invariant is broken",
    "scenario": "the scenario failed",
    "ends": "something never ends",
    "left": "a step leaves the simulation",
    "engine": "a promise of Pavane itself is broken, please report this",
}


def with_bar(
    rehearsal: Rehearsal[Any], seeds: int | Iterable[int], modes: Sequence[Mode], repeat: str
) -> Report:
    """Play a rehearsal, with a progress bar on a terminal; raise RehearsalFailed.

    `repeat` is the command that plays one seed again, with places for {seed} and {mode}.
    """
    __tracebackhide__ = True
    report = played(rehearsal, seeds, modes)
    if report.finding is not None:
        raise RehearsalFailed(report, "\n".join(map(click.unstyle, told(report.finding, repeat))))
    return report


def played(rehearsal: Rehearsal[Any], seeds: int | Iterable[int], modes: Sequence[Mode]) -> Report:
    chosen = checked_seeds(seeds)
    check_modes(modes)
    if not sys.stderr.isatty():
        return rehearsal.run(chosen, modes)
    with click.progressbar(
        length=len(chosen) * len(modes), label="rehearsing", file=sys.stderr, show_pos=True
    ) as bar:
        return rehearsal.run(chosen, modes, lambda done, total: bar.update(done))


def told(finding: Finding, repeat: str) -> Iterator[str]:
    """Yield all there is to say of a finding, as lines."""
    width = terminal_width()
    calm = finding.seed < 0
    first = "without any fault" if calm else f"seed {finding.seed}"
    head = f"{first}, {finding.mode}: {_KINDS[finding.failure.kind]}"
    yield click.style(head, fg="red", bold=True)
    for line in finding.failure.text.splitlines():
        yield f"  {line}"
    if finding.failure.where:
        yield click.style(f"  {finding.failure.where}", dim=True)
    yield ""
    if not calm:
        yield from _faults(finding)
    for line in finding.timelines:
        yield from draw(line, width=width, unicode=is_unicode())
        yield ""
    if finding.runs > len(finding.timelines):
        rest = finding.runs - len(finding.timelines)
        yield f"{counted(rest, 'other run')} not shown; name the run in the message to see it."
        yield ""
    if not calm:
        yield "Repeat it:  " + click.style(
            repeat.format(seed=finding.seed, mode=finding.mode), bold=True
        )


def _faults(finding: Finding) -> Iterator[str]:
    kept = len(finding.faults)
    if not kept:
        yield "No fault is needed for this: the order in which things happen is enough."
    elif kept == finding.faults_before:
        yield f"It takes {counted(kept, 'fault')}:"
    else:
        yield f"Of {finding.faults_before} faults, {kept} matter{'s' * (kept == 1)}:"
    for fault in finding.faults:
        yield f"  {fault.at_us / 1e6:7.3f} s  {fault}"
    if finding.skew_us:
        yield f"Clocks are off by up to {duration(finding.skew_us)}."
    planned = {str(fault) for fault in finding.faults}
    led_to = [(at_us, text) for at_us, text in finding.happened if text not in planned]
    if led_to:
        yield "What came of it:" if kept else "What happened:"
    for at_us, text in led_to[:MISHAPS_MAX]:
        yield f"  {at_us / 1e6:7.3f} s  {text}"
    if len(led_to) > MISHAPS_MAX:
        yield f"  and {len(led_to) - MISHAPS_MAX} more"
    if finding.repeated:
        yield "Done more than once, under the same idempotency key:"
    for name, done_us in finding.repeated[:MISHAPS_MAX]:
        times = " and ".join(f"{at_us / 1e6:.3f} s" for at_us in done_us)
        yield f"  {fit(name, 60).rstrip()} at {times}"
    yield ""


def summary(report: Report) -> Iterator[str]:
    """Yield what was rehearsed, as lines."""
    total = sum(report.runs.values())
    kinds = ", ".join(f"{count:,} {status}" for status, count in sorted(report.runs.items()))
    faults = ", ".join(f"{count:,} {kind}" for kind, count in report.faults.items())
    word, colour = ("held", "green") if report.finding is None else ("broken", "red")
    modes = " and ".join(report.modes)
    yield click.style(word, fg=colour, bold=True) + f" in {counted(report.plays, 'play')}, {modes}"
    yield f"  runs    {total:,}{f': {kinds}' if kinds else ''}"
    yield f"  events  {report.events:,}"
    yield f"  faults  {sum(report.faults.values()):,}{f': {faults}' if faults else ''}"
    simulated, took = duration(report.virtual_s * 1e6), duration(report.took_s * 1e6)
    yield f"  time    {simulated} simulated in {took}"
    if report.note:
        yield click.style(f"  note    {report.note}", fg="yellow")


def drawn(line: Timeline) -> list[str]:
    """Return a run's timeline as plain lines."""
    return list(map(click.unstyle, draw(line, width=terminal_width(), unicode=is_unicode())))
