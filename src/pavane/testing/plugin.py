"""The pytest plugin: fixtures that run an app in simulation, and storms over it.

    async def test_a_reminder_comes_after_three_days(sim):
        await sim.publish(OrderPlaced(order_id="o-1"))
        await sim.skip("3 days")
        assert sim.published(Reminded) == [Reminded(order_id="o-1")]

pytest loads this module always, so it imports what it needs only when a fixture is used. Async
tests that take `sim` run on the simulation's own event loop, whatever other plugins there are for
async tests; those that do not are left to these.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pavane.app import App
    from pavane.testing.rehearsal import FixedRehearse
    from pavane.testing.sim.app import Sim

APP_VARIABLE = "PAVANE_APP"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("pavane_app", "The app of `sim` and `rehearse`: shop:app or shop.py.", default="")
    group = parser.getgroup("pavane")
    group.addoption(
        "--rehearse-seeds", type=int, metavar="N", help="How many seeds `rehearse` plays."
    )
    group.addoption(
        "--rehearse-seed", type=int, metavar="SEED", help="The one seed that `rehearse` plays."
    )


@pytest.fixture
def pavane_app(request: pytest.FixtureRequest) -> App:
    """The app that is tested; define a fixture of this name to choose it in code."""
    target = str(request.config.getini("pavane_app")) or os.environ.get(APP_VARIABLE)
    if not target:
        raise pytest.UsageError(
            "Which app? Write `pavane_app = shop:app` among pytest's settings, or define a fixture "
            "`pavane_app` that returns it, in conftest.py or beside the test."
        )
    from pavane.cli.target import find_app

    return find_app(target)


@pytest.fixture
def sim(pavane_app: App) -> Sim[None]:
    """The app in simulation: virtual time, a database and a node of its own; for async tests."""
    from pavane.testing.sim.app import calm_sim

    return calm_sim(pavane_app)


@pytest.fixture
def rehearse(pavane_app: App, request: pytest.FixtureRequest) -> FixedRehearse:
    """`pavane.testing.rehearse` for this app; --rehearse-seeds and --rehearse-seed decide."""
    from pavane.testing.rehearsal import FixedRehearse

    seeds: int | None = request.config.getoption("--rehearse-seeds")
    seed: int | None = request.config.getoption("--rehearse-seed")
    chosen = seeds if seed is None else [seed]
    return FixedRehearse(
        pavane_app, chosen, f"pytest '{request.node.nodeid}' --rehearse-seed {{seed}}"
    )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Run an async test that takes `sim` in its simulation."""
    __tracebackhide__ = True
    sim = _simulation_of(pyfuncitem)
    test = _async_test(pyfuncitem) if sim is not None else None
    if sim is None:
        return (yield)
    if test is None:
        result = yield
        if not sim.is_played:
            pytest.fail(
                f"{pyfuncitem.name} takes `sim`, and simulates nothing. Write `async def "
                f"{pyfuncitem.originalname}(…)`.",
                pytrace=False,
            )
        return result
    before: Any = pyfuncitem.obj
    pyfuncitem.obj = partial(_play, sim, test)
    try:
        return (yield)
    except BaseException:
        _show_runs(pyfuncitem, sim)
        raise
    finally:
        pyfuncitem.obj = before


def _simulation_of(item: pytest.Function) -> Sim[Any] | None:
    """Return what the test takes as `sim`, unless that is somebody else's fixture."""
    module = sys.modules.get("pavane.testing.sim.app")
    found: Any = item.funcargs.get("sim")
    return found if module is not None and isinstance(found, module.Sim) else None


def _async_test(item: pytest.Function) -> Callable[..., Any] | None:
    """Return the async function of a test, also if a plugin for such tests has wrapped it."""
    function: Any = item.obj
    if not inspect.iscoroutinefunction(function) and type(item).__module__.startswith("pytest_"):
        function = inspect.unwrap(function)
    return function if inspect.iscoroutinefunction(function) else None


def _play(sim: Sim[Any], test: Callable[..., Any], /, **arguments: Any) -> None:
    __tracebackhide__ = True
    sim.play(test(**arguments))


def _show_runs(item: pytest.Function, sim: Sim[Any]) -> None:
    """Add the timelines of the newest runs to the report of a test that failed."""
    from pavane.testing.report import drawn

    for status in sim.runs()[-3:]:
        text = "\n".join(drawn(sim.timeline(status.id)))
        item.add_report_section("call", f"run {status.id}", text)
