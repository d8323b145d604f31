"""The examples do what they say, in all their forms: readers copy from them."""

from __future__ import annotations

import asyncio
import gzip
import os
import re
import runpy
import subprocess
import sys
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from examples import incidents, onboarding, payments
from examples.incidents import Incident, Work
from examples.shop.app import app as shop
from examples.shop.orders import FILE, read_orders, write_orders
from examples.shop.outcome import Ending, What, event_endings, wrongs
from examples.shop.reactions import OrderCancelled
from examples.shop.services import BEYOND, FOG, OrderPlaced, OrderShipped
from examples.shop.world import World
from pavane import App, Client, RunFailed
from pavane.core.operations import Mode
from pavane.stores.eventlog import EventFilter, EventRow

ROOT = Path(__file__).resolve().parents[2]
MODES: tuple[Mode, ...] = ("orchestration", "choreography")
LONG = timedelta(hours=1)
SHORT = timedelta(milliseconds=20)

both_modes = pytest.mark.parametrize("mode", MODES)


def run_program(*arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout_s,
        env=os.environ | {"PYTHONIOENCODING": "utf-8", "PYTHONPATH": "src"},
    )  # fmt: skip


# -- payments ----------------------------------------------------------------------------------


@pytest.fixture
def bank(monkeypatch: pytest.MonkeyPatch) -> payments.Bank:
    """A bank and books that know of nothing yet."""
    monkeypatch.setattr(payments, "THE_BOOKS", defaultdict(int))
    monkeypatch.setattr(payments, "THE_BANK", payments.Bank())
    return payments.THE_BANK


async def paid(store: Path, name: str, mode: Mode) -> payments.Outcome:
    async with App("payments", services=payments.SERVICES, store=str(store)) as app:
        run = await app.start(payments.pay, payments.PAYMENTS[name], mode=mode)
        return await run.result(timeout="60s")


@both_modes
@pytest.mark.parametrize(
    ("name", "status", "kept_cents"),
    [
        ("good", "paid", 4_200),
        ("jam", "paid", 1_999),
        ("slow-bank", "paid", 6_000),
        ("declined", "declined", 0),
        ("fraud", "refused", 0),
    ],
)
def test_a_payment_moves_money_once_or_not_at_all(
    bank: payments.Bank, tmp_path: Path, name: str, status: str, kept_cents: int, mode: Mode
) -> None:
    outcome = asyncio.run(paid(tmp_path / "payments.db", name, mode))
    assert outcome.status == status
    assert (bank.kept_cents(), bank.held_cents()) == (kept_cents, 0)
    assert sum(payments.THE_BOOKS.values()) == kept_cents


@both_modes
def test_a_payment_that_the_books_refuse_fails_and_is_given_back(
    bank: payments.Bank, tmp_path: Path, mode: Mode
) -> None:
    with pytest.raises(RunFailed) as failed:
        asyncio.run(paid(tmp_path / "payments.db", "too-big", mode))
    assert isinstance(failed.value.__cause__, payments.BooksClosed)
    assert list(bank.captured.values()) == [2_000_000]
    assert (bank.kept_cents(), bank.held_cents()) == (0, 0)


@both_modes
def test_a_refund_gives_back_what_was_paid(bank: payments.Bank, tmp_path: Path, mode: Mode) -> None:
    async def pay_and_return() -> str:
        store = tmp_path / "payments.db"
        outcome = await paid(store, "good", mode)
        async with App("payments", services=payments.SERVICES, store=str(store)) as app:
            run = await app.start(payments.give_back, "Ms Arbeau", outcome.hold, 4_200, mode=mode)
            return (await run.result(timeout="60s")).status

    assert asyncio.run(pay_and_return()) == "refunded"
    assert bank.kept_cents() == 0
    assert sum(payments.THE_BOOKS.values()) == 0


# -- onboarding --------------------------------------------------------------------------------


@both_modes
@pytest.mark.parametrize(
    ("habit", "pace", "status", "reminded"),
    [
        ("prompt", onboarding.Pace(LONG, LONG), "welcome", False),
        ("forgetful", onboarding.Pace(SHORT, LONG), "welcome", True),
        ("silent", onboarding.Pace(SHORT, 2 * SHORT), "expired", True),
    ],
)
def test_onboarding_ends_as_the_person_behaves(
    tmp_path: Path,
    habit: onboarding.Habit,
    pace: onboarding.Pace,
    status: str,
    reminded: bool,
    mode: Mode,
) -> None:
    person = onboarding.Person(habit, f"{habit}.{mode}@test.example")

    async def board() -> onboarding.Onboarded:
        store = str(tmp_path / "onboarding.db")
        async with App("onboarding", services=onboarding.SERVICES, store=store) as app:
            run = await app.start(onboarding.onboard, person, pace, mode=mode)
            async with asyncio.timeout(60):
                return await onboarding.play(run, person, habit)

    ended = asyncio.run(board())
    assert (ended.status, ended.reminded) == (status, reminded)
    has_account = person in onboarding.ACCOUNTS.values()
    assert has_account == (status == "welcome") == bool(ended.provided)


# -- incidents ---------------------------------------------------------------------------------

RECORDED = ROOT / "../shared/data/incidents.jsonl.gz"


@both_modes
def test_replayed_incidents_equal_the_record(tmp_path: Path, mode: Mode) -> None:
    if not RECORDED.exists():
        pytest.skip("the recorded incidents are not beside this checkout (../shared/data)")
    cases = incidents.sample(incidents.read_incidents(RECORDED), 500)
    store = str(tmp_path / "incidents.db")
    report = asyncio.run(incidents.replay(cases, mode, store, patience="60s"))
    assert report.different == {}
    assert report.cases == 500


def test_a_replay_that_leaves_the_record_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(incidents.LINES, "second", incidents.third_line)
    case = Incident("c-1", [Work("first", "Accepted"), Work("second", "Closed")])
    store = str(tmp_path / "incidents.db")
    report = asyncio.run(incidents.replay([case], "choreography", store))
    assert report.equal == 0
    assert report.different == {
        "c-1": "activity 2 should be 'second: Closed' and is 'third: Closed'"
    }


def test_incidents_are_read_with_the_line_of_each_team_and_the_waits(tmp_path: Path) -> None:
    events = [
        ("2012-05-01T00:00:00+02:00", "Accepted", "In Progress", "V30"),
        ("2012-05-02T00:00:00+02:00", "Queued", "Awaiting Assignment", "N52 2nd"),
        ("2012-05-03T00:00:00+02:00", "Accepted", "Wait - User", "V13 2nd 3rd"),
        ("2012-05-05T00:00:00+02:00", "Accepted", "Wait", "V5 3rd"),
    ]
    (read,) = incidents.read_incidents(_recorded(tmp_path, events))
    assert read.works == [
        Work("first", "Accepted/In Progress"),
        Work("second", "Queued/Awaiting Assignment", 0.001),
        Work("third", "Accepted/Wait - User", 0.002),
        Work("third", "Accepted/Wait"),
    ]


def test_the_incidents_command_replays_a_file_in_both_modes(tmp_path: Path) -> None:
    at = "2012-05-01T00:00:00+02:00"
    file = _recorded(tmp_path, [(at, "Queued", "Awaiting Assignment", "V1 2nd")] * 3)
    result = CliRunner().invoke(incidents.main, [str(file)])
    assert result.exit_code == 0, result.output
    for mode in MODES:
        assert mode in result.stdout
    assert result.stdout.count("1 of 1 equal to the record") == 2


def _recorded(folder: Path, events: list[tuple[str, str, str, str]]) -> Path:
    listed = ",".join(
        f'{{"at":"{at}","activity":"{activity}","transition":"{transition}","team":"{team}"}}'
        for at, activity, transition, team in events
    )
    file = folder / "incidents.jsonl.gz"
    file.write_bytes(gzip.compress(f'{{"case":"1-1","events":[{listed}]}}\n'.encode()))
    return file


# -- the shop ----------------------------------------------------------------------------------


def test_the_shop_loses_no_order_when_workers_are_killed(tmp_path: Path) -> None:
    shown = run_program("-m", "examples.shop.demo", "--orders", "60", "--keep", str(tmp_path))
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert shown.stdout.count("kill -9") == 2
    assert "All 60 orders were shipped, or undone to the last cent" in shown.stdout
    assert shown.stdout.count("payments.charge") == 2  # a timeline for each mode of runs
    assert "payments.take_payment" in shown.stdout  # and a conversation for events
    assert re.search(r"orders +20 +20 +20\n", shown.stdout)


def test_the_shop_does_not_mix_two_demos_in_one_folder(tmp_path: Path) -> None:
    (tmp_path / "shop.db").touch()
    shown = run_program("-m", "examples.shop.demo", "--keep", str(tmp_path))
    assert shown.returncode == 2
    assert "holds an earlier demo; name another folder" in shown.stderr


GOOD = {"order_id": "o-1", "sku": "lute", "cents": 89_000, "card": "good", "town": "Dijon"}


@pytest.mark.parametrize(
    ("order", "last", "effects"),
    [
        ({}, "OrderShipped", ["charged", "reserved", "shipped"]),
        ({"town": FOG}, "OrderShipped", ["charged", "reserved", "shipped"]),
        ({"card": "declined"}, "OrderCancelled", []),
        ({"sku": "orpharion"}, "OrderCancelled", ["charged", "refunded"]),
        (
            {"town": BEYOND}, "OrderCancelled",
            ["charged", "refunded", "released", "reserved"],
        ),
    ],
)  # fmt: skip
def test_an_order_by_events_is_shipped_or_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: dict[str, str], last: str,
    effects: list[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("SHOP_WORLD", str(tmp_path / "world.db"))
    placed = OrderPlaced(**(GOOD | order))  # type: ignore[arg-type]

    async def place() -> list[EventRow]:
        async with shop.worker(store=str(tmp_path / "shop.db")) as client:
            await client.publish(placed, source="shop", id="o-1")
            await told(client, OrderShipped, OrderCancelled)
            return (await client.store.find_events(EventFilter(conversation="o-1")))[::-1]

    events = asyncio.run(place())
    assert events[-1].type == last
    world = World(tmp_path / "world.db")
    kinds = ("charged", "refunded", "released", "reserved", "shipped")
    assert dict.fromkeys(effects, 1) == {
        kind: times for kind in kinds if (times := world.happened(kind).get("o-1", 0))
    }
    assert wrongs(["o-1"], event_endings({"o-1": 0}, events), world) == []


async def told(client: Client, *types: type) -> EventRow:
    """Wait for the first event of one of these types."""
    names = tuple(kind.__name__ for kind in types)
    async with asyncio.timeout(60):
        while not (found := await client.store.find_events(EventFilter(types=names))):
            await asyncio.sleep(0.01)
    return found[-1]


@pytest.mark.parametrize(
    ("what", "effects", "wrong"),
    [
        ("shipped", ["charged", "reserved", "shipped"], ""),
        ("shipped", ["charged", "reserved"], "is said to be shipped, but the world has"),
        ("cancelled", [], ""),
        ("cancelled", ["charged", "refunded", "released"], ""),
        ("cancelled", ["charged"], "is said to be undone, but the world has"),
        ("cancelled", ["charged", "refunded", "reserved"], "is said to be undone"),
        ("neither", [], "has not ended well: stuck"),
    ],
)
def test_an_order_that_the_world_tells_otherwise_is_listed(
    tmp_path: Path, what: What, effects: list[str], wrong: str
) -> None:
    world = World(tmp_path / "world.db")
    world.create()
    for effect in effects:
        world.record(effect, "o-1")
    found = wrongs(["o-1"], [Ending("o-1", "events", what, 1, said="stuck")], world)
    assert (wrong in found[0]) if wrong else not found


def test_an_order_that_nobody_ended_is_listed(tmp_path: Path) -> None:
    world = World(tmp_path / "world.db")
    world.create()
    assert "o-1 has not ended" in wrongs(["o-1"], [], world)[0]


def test_an_order_that_events_ended_twice_is_listed(tmp_path: Path) -> None:
    world = World(tmp_path / "world.db")
    world.create()
    ends = [
        EventRow(id, type, 1, "o-1", "", 1, "o-1", "", "", b"")
        for id, type in (("a", "OrderShipped"), ("b", "OrderCancelled"))
    ]
    assert "ended twice" in wrongs(["o-1"], event_endings({"o-1": 0}, ends), world)[0]


def test_the_orders_file_is_the_one_that_its_module_writes(tmp_path: Path) -> None:
    written = tmp_path / "orders.jsonl"
    write_orders(written)
    assert written.read_bytes() == FILE.read_bytes()
    assert len(read_orders()) == 300


# -- events ------------------------------------------------------------------------------------


def test_everybody_forgets_a_user_although_one_fails_and_one_gives_up() -> None:
    shown = run_program("examples/announcements.py")
    assert shown.returncode == 0, shown.stderr
    first, letter, second = re.split(r"(dead letter .+)\n", shown.stdout)
    assert letter == "dead letter after 2 attempts, u-7: ValueError: invoice … is not paid"
    for user, parts in (("u-8", first), ("u-7", second)):
        assert f"{user} is forgotten:" in parts
        assert "search: removed from the index at attempt 3" in parts
        services = {line.split(":")[0].strip() for line in parts.splitlines()[1:]}
        assert services == {"sessions", "mailing", "search", "billing", "files"}


def test_a_workflow_is_started_by_an_event_awaits_one_and_publishes_others() -> None:
    shown = run_program("examples/hybrid.py")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines() == [
        "l-1: a lute of 6 courses",
        "l-2: nothing",
        "l-1 has a new lute of 6 courses",
        "l-2 has none, because it was not paid",
        "wood still set aside for: l-1",
    ]


def test_the_readme_shows_services_that_react(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a newcomer pastes into an empty folder works, with the workers started afterwards."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (program,) = [block for block in blocks if 'App("parcels"' in block]
    (tmp_path / "parcels.py").write_text(program)
    monkeypatch.setenv("PAVANE_STORE", str(tmp_path / "parcels.db"))
    placed = run_program(str(tmp_path / "parcels.py"), "o-1", "o-2")
    assert placed.returncode == 0, placed.stderr
    parcels: App = runpy.run_path(str(tmp_path / "parcels.py"))["app"]

    async def shipped() -> list[EventRow]:
        async with parcels.worker() as client, asyncio.timeout(60):
            which = EventFilter(types=("OrderShipped",))
            while len(found := await client.store.find_events(which)) < 2:
                await asyncio.sleep(0.01)
            return found

    assert {row.key for row in asyncio.run(shipped())} == {"o-1", "o-2"}


# -- as programs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "shown"),
    [
        ("examples/payments.py", "kept 79.99, still blocked on cards 0.00"),
        ("examples/onboarding.py", "confirmed after a reminder: a laptop"),
    ],
)
def test_an_example_runs_as_a_program_and_shows_both_modes(program: str, shown: str) -> None:
    for _ in range(5):  # a day of theirs is short: a pause of the machine may be longer
        printed = run_program(program)
        assert printed.returncode == 0, printed.stderr
        if printed.stdout.count(shown) == 2:
            return
    assert printed.stdout.count(shown) == 2, printed.stdout
