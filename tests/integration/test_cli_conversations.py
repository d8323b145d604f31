"""`pavane conversations` against a real store: what it prints, and how it ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.shell_completion import ShellComplete

from pavane import Client
from pavane.cli import main
from pavane.cli.target import find_app
from pavane.observe import monitor
from tests.integration import command_line
from tests.integration.command_line import in_folder_of
from tests.integration.world import until

SHOP = '''
"""A shop whose customers are patient for a second."""

from pavane import App, Event, Retry, Service, receive


class Placed(Event, key="id"):
    id: str


class Paid(Event, key="id"):
    id: str


class Shipped(Event, key="id"):
    id: str


pay, ship = Service("pay"), Service("ship")


@pay.on(Placed)
async def charge(event: Placed) -> Paid:
    return Paid(id=event.id)


@ship.step
async def load(id: str) -> None: ...


@ship.on(Paid, retry=Retry(attempts=1), breaker=None)
async def check(event: Paid) -> None:
    if event.id == "dead":
        raise ValueError("no van")


@ship.workflow(starts_on=Paid)
async def send(event: Paid) -> None:
    if event.id != "dead":
        await load(event.id)
        await ship.publish(Shipped(id=event.id))


@pay.workflow
async def alone() -> None: ...


app = App("watched_shop", [pay, ship], store="watched.db")
app.conversation(start=Placed, ends=[Shipped], within="1s", milestones=[Paid], name="sales")
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a shop and its store, in which one order was sent and one was not."""
    made = tmp_path_factory.mktemp("watched")
    (made / "watched_shop.py").write_text(SHOP)
    trade(
        made, "watched_shop.py", {"good": "good", "dead": "dead"},
        {"good": ("on-time", False), "dead": ("stuck", True)}, alone=True,
    )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def keyed(folder: Path) -> tuple[str, ...]:
    """The options for a store: two have one key, one has its own, and one the id of another."""
    (folder / "keyed_shop.py").write_text(SHOP.replace("watched.db", "keyed.db"))
    orders = {"first": "twin", "second": "twin", "third": "single", "fourth": "first"}
    trade(folder, "keyed_shop.py", orders, dict.fromkeys(orders, ("on-time", False)))
    return ("--store", "keyed.db")


def trade(
    folder: Path, file: str, orders: dict[str, str], ends: dict[str, tuple[str, bool]],
    *, alone: bool = False,
) -> None:  # fmt: skip
    """Place orders, given as id and key, and work until all stand as in `ends`.

    Anew, in another store, if one that was to be on time is late: the machine may have paused.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(monitor, "POLL_S", 0.01)
        app = find_app(file)
        event: Any = app.registry.events["Placed"]

        async def settled(client: Client) -> str:
            found = {s.id: (s.state, s.raised) for s in await client.conversations.list()}
            is_late = any(ends[id][0] == "on-time" and raised for id, (_, raised) in found.items())
            return "late" if is_late else "settled" if found == ends else ""

        async def work() -> str:
            async with app.worker() as client:
                if alone:
                    await client.start(app.registry.workflow("alone"), id="alone")
                for id, key in orders.items():
                    await client.publish(event(id=key), source="test", id=id)
                return await until(lambda: settled(client))

        while asyncio.run(work()) == "late":
            for path in folder.glob(f"{Path(app.address).name}*"):
                path.unlink()


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with in_folder_of(folder, "watched_shop.py", monkeypatch, "keyed_shop"):
        yield


def good(*arguments: str) -> str:
    return command_line.good("conversations", *arguments)


def refused(code: int, *arguments: str) -> str:
    return command_line.refused(code, "conversations", *arguments)


def completed(command: str, *before: str, incomplete: str = "") -> list[str]:
    shell = ShellComplete(main, {}, "pavane", "_PAVANE_COMPLETE")
    found = shell.get_completions(["conversations", command, *before], incomplete)
    return [item.value for item in found]


def test_list_shows_how_each_stands_and_what_holds_it_up() -> None:
    lines = good("list").splitlines()
    assert lines[0].split()[:4] == ["ID", "CONTRACT", "KEY", "STATE"]
    assert [line.split()[:4] for line in lines[1:]] == [
        ["dead", "sales", "dead", "stuck"],
        ["good", "sales", "good", "on-time"],
    ]
    assert "ship.check gave up Paid after 1 attempt: ValueError: no van" in lines[1]


def test_list_says_that_nobody_watches() -> None:
    said = command_line.pavane("conversations", "list").stderr
    assert "no worker watches sales now; what happened since is seen when one does" in said


def test_list_filters_and_prints_json() -> None:
    def ids(*options: str) -> list[str]:
        return [json.loads(line)["id"] for line in good("list", "-o", "jsonl", *options).split()]

    assert [c["id"] for c in json.loads(good("list", "-o", "json"))] == ["dead", "good"]
    (found,) = json.loads(good("list", "-o", "json", "--state", "stuck"))
    assert (found["id"], found["trouble"]["last"]) == ("dead", "Paid")
    assert [m["state"] for m in found["milestones"]] == ["reached"]
    assert json.loads(good("list", "-o", "json", "--state", "late")) == []
    both = json.loads(good("list", "-o", "json", "--state", "stuck", "--state", "on-time"))
    assert [c["id"] for c in both] == ["dead", "good"]
    assert len(json.loads(good("list", "-o", "json", "--limit", "1"))) == 1


def test_list_needs_the_store_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PAVANE_APP")
    assert "stuck" in good("list", "--store", "watched.db", "--contract", "sales")


def test_show_draws_the_tree_of_causes() -> None:
    lines = [line.split("  ")[0].rstrip() for line in good("show", "good").splitlines()]
    text = good("show", "good")
    assert lines[0] == "conversation good"
    assert "sales on time, Shipped after" in text
    order = [
        "Placed",
        "pay.charge",
        "Paid",
        "the start of ship.send",
        "run send",
        "ship.load",
        "Shipped",
    ]
    places = [text.index(name, text.index("0 ")) for name in order]
    assert places == sorted(places)


def test_show_tells_what_holds_a_stuck_one_up() -> None:
    text = good("show", "dead")
    assert "sales stuck, due within 1.0s" in text
    assert "gave up: ValueError: no van" in text
    assert "last event   Paid" in text
    assert "ConversationOverdue" in text


def test_show_finds_a_conversation_by_any_of_its_events_and_runs() -> None:
    def nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield node
        for child in node["children"]:
            yield from nodes(child)

    tree = json.loads(good("show", "good", "-o", "json"))["tree"]
    found = {node["name"]: node["id"] for root in tree["roots"] for node in nodes(root)}
    for id in (found["Shipped"], found["send"]):
        assert json.loads(good("show", id, "-o", "jsonl"))["tree"]["id"] == "good"


def test_show_works_without_a_contract() -> None:
    text = good("show", "alone")
    assert "run alone" in text
    assert "stuck" not in text


def test_show_and_watch_find_a_conversation_by_its_key(keyed: tuple[str, ...]) -> None:
    rows = [line.split()[:4] for line in good("list", *keyed).splitlines()]
    assert rows[0] == ["ID", "CONTRACT", "KEY", "STATE"]
    assert ["third", "sales", "single", "on-time"] in rows
    assert json.loads(good("show", "single", "-o", "json", *keyed))["tree"]["id"] == "third"
    assert good("show", "single", *keyed) == good("show", "third", *keyed)
    assert good("watch", "single", *keyed) == good("watch", "third", *keyed)


@pytest.mark.parametrize("command", ["show", "watch"])
def test_a_key_that_several_have_lists_them_and_asks_for_the_id(
    keyed: tuple[str, ...], command: str
) -> None:
    said = refused(2, command, "twin", *keyed)
    first, *rest = said.splitlines()
    assert "Several conversations have the key 'twin'; give the id of one." in first
    assert [line.split()[:3] for line in rest] == [
        ["second", "under", "sales,"],
        ["first", "under", "sales,"],
    ]
    assert good("show", "first", *keyed)


def test_an_id_goes_before_a_key(keyed: tuple[str, ...]) -> None:
    assert json.loads(good("show", "first", "-o", "json", *keyed))["tree"]["id"] == "first"


def test_watch_of_one_that_is_over_prints_a_line_per_happening_and_is_good() -> None:
    lines = good("watch", "good").splitlines()
    happened = [tuple(line.split(maxsplit=2)[1:]) for line in lines]
    assert happened[0] == ("event", "Placed good")
    assert ("done", "pay.charge") in happened
    assert ("on-time", "under sales") in happened
    values = [json.loads(line) for line in good("watch", "good", "-o", "jsonl").splitlines()]
    assert {value["id"] for value in values} == {"good"}


def test_watch_of_a_stuck_one_is_exit_code_1() -> None:
    said = refused(1, "watch", "dead")
    assert "sales: stuck" in said
    assert "stuck: ship.check gave up Paid" in said


@pytest.mark.parametrize(
    ("code", "arguments", "text"),
    [
        (3, ["show", "nothing"], "No conversation, event or run is called 'nothing'"),
        (3, ["watch", "nothing"], "No conversation, event or run is called 'nothing'"),
        (3, ["list", "--contract", "sale"], "Did you mean 'sales'?"),
        (2, ["list", "--state", "lost"], "'lost' is not one of"),
        (2, ["shwo"], "Did you mean 'show'?"),
        (4, ["list", "--store", "nowhere.db"], "There is no store at"),
    ],
)
def test_an_error_says_what_to_do(code: int, arguments: list[str], text: str) -> None:
    assert text in refused(code, *arguments)


@pytest.mark.parametrize("command", ["list", "show", "watch"])
def test_help_has_examples(command: str) -> None:
    assert f"pavane conversations {command}" in good(command, "--help")


def test_ids_contracts_and_states_complete() -> None:
    assert completed("show", incomplete="g") == ["good"]
    assert completed("list", "--contract") == ["sales"]
    assert completed("list", "--state", incomplete="st") == ["stuck"]
