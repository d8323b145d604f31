"""The pytest plugin: what users write in tests, beside other plugins, and when it is not used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

SHOP = """
import asyncio
from pavane import App, Event, Service, receive

shop, till = Service("shop"), Service("till")

class Ordered(Event, key="order"):
    order: str

class Paid(Event, key="order"):
    order: str

class Confirmed(Event):
    by: str

@till.step
async def charge(order: str) -> str:
    return f"p-{order}"

@shop.workflow(starts_on=Ordered)
async def sell(order: Ordered) -> str:
    payment = await charge(order.order)
    await asyncio.sleep(3 * 86400)
    await shop.publish(Paid(order=order.order))
    return payment

@shop.workflow(receives=[Confirmed])
async def confirm() -> str:
    return (await receive(Confirmed)).by

app = App("plugin_shop", services=[shop, till])
"""
TESTS = """
import pytest
from plugin_shop import *

async def test_time_passes(sim):
    await sim.publish(Ordered(order="o"))
    await sim.skip("3 days")
    assert sim.published(Paid) == [Paid(order="o")]

class TestCharges:
    @pytest.mark.parametrize("times", [1, 2])
    async def test_fails(self, sim, times, tmp_path):
        sim.crash_after(charge)
        assert await sim.run(sell, Ordered(order="o")) == "p-o"
        assert len(sim.calls(charge)) == 2

def test_plain():
    assert charge.name == "charge"
"""


@pytest.fixture
def shop(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.delenv("PAVANE_APP", raising=False)
    pytester.makepyfile(plugin_shop=SHOP)
    pytester.makeini("[pytest]\npavane_app = plugin_shop:app\nfilterwarnings = error\n")
    return pytester


def run(shop: pytest.Pytester, *options: str) -> pytest.RunResult:
    """Run pytest on the shop's tests, with our plugin and no other for async tests."""
    return shop.runpytest_inprocess("-p", "no:asyncio", "-p", "no:anyio", *options)


def test_async_tests_run_in_simulation(shop: pytest.Pytester) -> None:
    shop.makepyfile(test_shop=TESTS)
    run(shop).assert_outcomes(passed=4)


@pytest.mark.parametrize(
    "options",
    [
        ("-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function"),
        ("-o", "asyncio_mode=strict", "-o", "asyncio_default_fixture_loop_scope=function"),
        ("-p", "no:asyncio", "-o", "anyio_mode=auto"),
    ],
    ids=["asyncio-auto", "asyncio-strict", "anyio-auto"],
)
def test_it_gets_along_with_other_plugins_for_async_tests(
    shop: pytest.Pytester, options: tuple[str, ...]
) -> None:
    marker = "anyio" if "anyio" in options[-1] else "asyncio"
    backend = "@pytest.fixture\ndef anyio_backend():\n    return 'asyncio'\n"
    theirs = f"""
@pytest.mark.{marker}
async def test_of_theirs():
    assert type(asyncio.get_running_loop()).__name__ != "SimLoop"
"""
    shop.makepyfile(test_shop=f"{TESTS}\n{backend}\n{theirs}")
    shop.runpytest_subprocess(*options).assert_outcomes(passed=5)


def test_an_async_fixture_that_acts_is_told_to_let_the_test_act(shop: pytest.Pytester) -> None:
    shop.makepyfile(
        test_shop="""
import pytest
from plugin_shop import *

@pytest.fixture
async def seeded(sim):
    await sim.start(sell, Ordered(order="o"))

@pytest.fixture
def prepared(sim):
    sim.replace(charge, lambda order: "gold")

async def test_seeded(sim, seeded): ...

async def test_prepared(sim, prepared):
    assert await sim.run(sell, Ordered(order="o")) == "gold"
"""
    )
    loop = ("-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function")
    result = shop.runpytest_subprocess(*loop)
    result.assert_outcomes(errors=1, passed=1)
    result.stdout.fnmatch_lines(["E *BadArguments: This is outside of the simulation*"])


def test_a_test_that_fails_shows_its_runs(shop: pytest.Pytester) -> None:
    shop.makepyfile(
        test_shop="""
from plugin_shop import *

async def test_wrong(sim):
    assert await sim.run(sell, Ordered(order="o"), id="o-1") == "p-x"

async def test_never(sim):
    run = await sim.start(confirm, id="c-1")
    await run.result()
"""
    )
    result = run(shop)
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines([
        "*assert 'p-o' == 'p-x'*", "*Captured run o-1 call*", "sell  o-1 *completed*",
        "*await run.result()", "E *What is awaited here does not come.*Run c-1 is*Confirmed*",
    ])  # fmt: skip
    result.stdout.no_fnmatch_line("*plugin.py*")
    result.stdout.no_fnmatch_line("*customer.py*")


def test_rehearsals_take_their_seeds_from_the_command_line(shop: pytest.Pytester) -> None:
    shop.makepyfile(
        test_shop="""
from plugin_shop import *

def test_storms(rehearse):
    async def orders(sim):
        await sim.publish(Ordered(order="o"))

    def charged_once(sim):
        assert sim.seed < 0 or len(sim.calls(charge)) == 1, "charged again"

    report = rehearse(orders, charged_once)
    assert report.plays == 6
"""
    )
    failed = run(shop, "--rehearse-seeds", "50")
    failed.assert_outcomes(failed=1)
    failed.stdout.fnmatch_lines([
        "E *RehearsalFailed: seed *: the invariant is broken", "E * charged again",
        "E *Repeat it:  pytest 'test_shop.py::test_storms' --rehearse-seed *",
    ])  # fmt: skip
    line = next(line for line in failed.outlines if "Repeat it" in line)
    again = run(shop, *line.rpartition("pytest ")[2].replace("'", "").split())
    assert line in again.outlines
    run(shop, "--rehearse-seeds", "3").assert_outcomes(passed=1)


def test_without_an_app_it_says_where_to_name_one(shop: pytest.Pytester) -> None:
    shop.makeini("[pytest]\n")
    shop.makepyfile(test_shop="async def test_it(sim): ...")
    result = run(shop)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*Which app? Write `pavane_app = shop:app`*"])
    shop.makeconftest(
        "import pytest, plugin_shop\n@pytest.fixture\ndef pavane_app(): return plugin_shop.app"
    )
    run(shop).assert_outcomes(passed=1)


def test_a_plain_test_that_takes_sim_is_told_to_be_async(shop: pytest.Pytester) -> None:
    shop.makepyfile(test_shop="def test_it(sim): assert not sim.runs()")
    result = run(shop)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*simulates nothing. Write `async def test_it(…)`*"])


def test_a_fixture_of_the_same_name_is_left_alone(shop: pytest.Pytester) -> None:
    shop.makeconftest("import pytest\n@pytest.fixture\ndef sim(): return 'theirs'")
    shop.makepyfile(test_shop="def test_it(sim): assert sim == 'theirs'")
    run(shop).assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("pavane.testing.plugin", ["pavane.app", "pavane.testing.rehearsal", "msgspec", "click"]),
        ("pavane.testing", ["pytest", "pavane.app", "msgspec"]),
        ("pavane.testing.rehearsal", ["pytest"]),
    ],
)
def test_what_is_not_used_is_not_loaded(module: str, absent: list[str]) -> None:
    program = f"import json, sys, {module}; print(json.dumps(list(sys.modules)))"
    source = Path(__file__).resolve().parents[2] / "src"
    printed = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(source)},
        capture_output=True, check=True, text=True,
    ).stdout  # fmt: skip
    assert set(absent).isdisjoint(json.loads(printed))
