"""`pavane rehearse`: plays an app's rehearsals in storms, and shows what broke and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import click
import msgspec

from pavane.app import App
from pavane.cli.exits import FAILED, BadTarget
from pavane.cli.names import complete_target
from pavane.cli.output import Format, output_option, print_json, say
from pavane.cli.target import imported, locate
from pavane.core.operations import Mode
from pavane.testing.rehearsal import MODES, SEEDS, Rehearsal, Report
from pavane.testing.report import played, summary, told


class Rehearsed(msgspec.Struct):
    """The report of one rehearsal, by its name."""

    rehearsal: str
    report: Report


@click.command(
    epilog="""\b
Examples:
  pavane rehearse shop_rehearsals.py
  pavane rehearse shop_rehearsals:nobody_pays_twice --seeds 20000
  pavane rehearse shop_rehearsals:nobody_pays_twice --seed 4711 --mode choreography
  pavane rehearse shop.py -o json | jq '.[].report.faults'

\b
TARGET is a module with rehearsals, or one of them:
  nobody_pays_twice = Rehearsal(app, place_orders, one_payment_each, world=Bank)
Of an app without any, each workflow is started with examples of its arguments, an example of each
event that is handled is published, and examples of results stand in for all steps and handlers:
nothing real is done, and all that is checked is that everything ends, in both modes.

\b
One seed decides everything that happens, so --seed plays the same again. The exit code is 1 if a
rehearsal found something.
"""
)
@click.argument("target", envvar="PAVANE_APP", shell_complete=complete_target)
@click.option("-n", "--seeds", default=SEEDS, show_default=True, type=click.IntRange(1))
@click.option("--seed", "one", type=click.IntRange(0), help="Play this seed only.")
@click.option(
    "-m", "--mode", "modes", multiple=True, type=click.Choice(MODES), help="Default: both."
)
@output_option
def rehearse(
    target: str, seeds: int, one: int | None, modes: tuple[str, ...], output: Format
) -> None:
    """Play the rehearsals of TARGET in storms: killed processes, a failing database, lost answers.

    Shows what was rehearsed or, for the first seed that breaks something, the few faults that
    matter and the timeline of the run.
    """
    found = find_rehearsals(target)
    chosen = cast("Sequence[Mode]", modes or MODES)
    reports: list[Rehearsed] = []
    for name, rehearsal in found:
        if output == "table" and len(found) > 1:
            click.secho(name, bold=True)  # to where its report will be
        report = played(rehearsal, seeds if one is None else [one], chosen)
        reports.append(Rehearsed(name, report))
        if output == "table":
            _show(report, f"pavane rehearse {name}")
    if output != "table":
        print_json(reports, output)
    if any(it.report.finding for it in reports):
        click.get_current_context().exit(FAILED)


def _show(report: Report, command: str) -> None:
    if report.finding is not None:
        for line in told(report.finding, f"{command} --seed {{seed}} --mode {{mode}}"):
            click.echo(line)
    for line in summary(report):
        click.echo(line)


def find_rehearsals(target: str) -> list[tuple[str, Rehearsal[Any]]]:
    """Return the rehearsals that a target names, each with the target that names it alone."""
    place = locate(target)
    module = imported(place, target)
    base = target.partition(":")[0]
    there: dict[str, Any] = {
        name: value for name, value in vars(module).items() if isinstance(value, Rehearsal)
    }
    if place.attribute:
        named: Any = getattr(module, place.attribute, None)
        if isinstance(named, Rehearsal):
            return [(target, cast("Rehearsal[Any]", named))]
        if not isinstance(named, App):
            known = f" There: {', '.join(there)}." if there else ""
            raise BadTarget(f"{target} is no Rehearsal and no App.{known}")
        there = {name: it for name, it in there.items() if it.app is named}
    if there:
        return [(f"{base}:{name}", rehearsal) for name, rehearsal in there.items()]
    from pavane.cli.target import find_app
    from pavane.testing.examples import example_rehearsal

    say("no rehearsals there, so examples stand in for arguments and steps: see --help")
    return [(target, example_rehearsal(find_app(target)))]
