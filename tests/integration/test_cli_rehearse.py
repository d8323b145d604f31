"""`pavane rehearse`: what it finds to rehearse, prints, and ends with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.command_line import good, in_folder_of, pavane, refused

SHOP = '''
"""A shop that ships at most once, and one that hopes so."""
from collections import Counter
from dataclasses import dataclass
from pavane import App, Event, Service, receive
from pavane.testing import Rehearsal, Sim

@dataclass
class Parcel:
    sku: str
    count: int

class Go(Event):
    now: bool

parcels: Counter[str] = Counter()

def forget() -> None:
    parcels.clear()

shop = Service("shop")

@shop.step
def ship(order: str) -> Parcel:
    parcels[order] += 1
    return Parcel(order, 1)

@shop.workflow
async def sell(order: str) -> str:
    return (await ship(order)).sku

@shop.workflow(receives=[Go])
async def wait(parcel: Parcel) -> bool:
    return (await receive(Go)).now

app = App("storm_shop", services=[shop])

async def two_orders(sim: Sim) -> None:
    await sim.start(sell, "o-1", id="o-1")
    await sim.start(sell, "o-2", id="o-2")

def all_is_shipped(sim: Sim) -> None:
    for run in sim.runs():
        assert run.status == "failed" or parcels[run.id], f"{run.id} was not shipped"

def nothing_is_shipped_twice(sim: Sim) -> None:
    for order, times in parcels.items():
        assert times < 2, f"{order} was shipped {times} times"
'''
REHEARSALS = '''
"""What must hold, beside the shop."""
from storm_shop import *

ships_all = Rehearsal(app, two_orders, all_is_shipped, world=forget)
ships_once = Rehearsal(app, two_orders, nothing_is_shipped_twice, world=forget)
'''


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "storm_shop.py").write_text(SHOP)
    (tmp_path / "storms.py").write_text(REHEARSALS)
    (tmp_path / "empty.py").write_text("from storm_shop import Parcel")
    with in_folder_of(tmp_path, "storm_shop.py", monkeypatch, "storms", "empty", "other"):
        yield


def test_what_holds_is_told_in_figures() -> None:
    printed = good("rehearse", "storms:ships_all", "--seeds", "5", "--mode", "choreography")
    assert printed.startswith("held in 5 plays, choreography\n  runs    12: ")
    assert "  faults " in printed


def test_what_breaks_is_shown_with_the_line_that_repeats_it() -> None:
    result = pavane("rehearse", "storms.py", "-n", "100")
    assert result.exit_code == 1
    assert result.stdout.startswith("storms.py:ships_all\nheld in 200 plays, ")
    assert "\nstorms.py:ships_once\n" in result.stdout
    assert "the invariant is broken" in result.stdout
    assert "was shipped 2 times" in result.stdout
    assert "shop.ship('o-" in result.stdout
    line = next(line for line in result.stdout.splitlines() if "Repeat it" in line)
    arguments = line.split()[3:]
    assert arguments[:2] == ["rehearse", "storms.py:ships_once"]
    again = pavane(*arguments)
    assert again.exit_code == 1
    assert again.stdout.partition("Repeat")[0] in result.stdout


def test_programs_get_reports() -> None:
    result = pavane("rehearse", "storms.py", "-n", "100", "-o", "json")
    first, second = json.loads(result.stdout)
    assert result.exit_code == 1
    assert (first["rehearsal"], first["report"]["finding"]) == ("storms.py:ships_all", None)
    assert second["report"]["finding"]["failure"]["kind"] == "invariant"
    assert second["report"]["finding"]["timelines"][0]["status"]["workflow"] == "sell"


def test_an_app_without_rehearsals_is_played_with_examples() -> None:
    result = pavane("rehearse", "storm_shop:app", "-n", "3")
    assert result.exit_code == 0, result.output
    assert "examples stand in for arguments and steps" in result.stderr
    assert "held in 6 plays" in result.stdout
    assert "ships" not in result.stdout


def app_of(text: str) -> str:
    Path("other.py").write_text("from pavane import App, Event, Service\n\n" + text)
    return "other.py"


def test_examples_are_passed_as_parameters_want_them() -> None:
    text = """
shop = Service("shop")

@shop.workflow
async def sell(order: str, /, sku: str, *, count: int, gift: bool = False) -> str:
    return order + sku * count

app = App("keywords", services=[shop])
"""
    printed = good("rehearse", app_of(text), "-n", "2")
    assert "held in 4 plays" in printed
    assert "12 completed" in printed


def test_an_app_of_handlers_only_is_played_with_examples_of_their_events() -> None:
    text = """
class Sold(Event, key="order"):
    order: str
    cents: int

shop = Service("shop")

@shop.on(Sold)
async def thank(event: Sold) -> None:
    raise AssertionError("a real one")

app = App("handlers", services=[shop])
"""
    printed = good("rehearse", app_of(text), "-n", "2")
    assert "held in 4 plays" in printed
    assert "events  12\n" in printed


def test_a_type_without_examples_is_refused_before_anything_is_played() -> None:
    text = """
from typing import Annotated
from msgspec import Meta

shop = Service("shop")

@shop.workflow
async def sell(sku: Annotated[str, Meta(pattern="^[A-Z]{3}$")]) -> str:
    return sku

app = App("patterns", services=[shop])
"""
    error = refused(2, "rehearse", app_of(text))
    assert "shop.sell, sku: No example of " in error
    assert error.count("can be made up") == 1
    assert "`mine = Rehearsal(app, scenario, invariant)`" in error


def test_an_app_with_nothing_to_begin_with_is_refused() -> None:
    error = refused(2, "rehearse", app_of('app = App("none", services=[Service("shop")])'))
    assert "has no workflows to start and handles no events." in error


def test_targets_that_are_nothing_to_rehearse_are_refused() -> None:
    assert "There: ships_all, ships_once" in refused(2, "rehearse", "storms:ships")
    assert "is no Rehearsal and no App" in refused(2, "rehearse", "storms:Parcel")
    assert "defines no App" in refused(2, "rehearse", "empty")
