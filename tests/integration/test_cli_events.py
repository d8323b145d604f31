"""The command line for events, handlers and dead letters, on real SQLite files."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pavane.cli import main
from pavane.cli.bulk import with_bar
from tests.integration import command_line, event_shop
from tests.integration.command_line import good, in_folder_of, pavane, refused

APP = "event_shop.py"
STORE = ("--store", "event_shop.db")
DEADLINE_S = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("event_shop")
    shutil.copy(event_shop.__file__, made / APP)
    return made


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with in_folder_of(folder, APP, monkeypatch, "changed_shop", "starts_shop", "till"):
        yield


@pytest.fixture(scope="module")
def worker(folder: Path) -> Iterator[None]:
    """A worker for all services, on the app's own store."""
    process = command_line.worker(folder, APP)
    yield
    process.terminate()
    process.communicate(timeout=DEADLINE_S)


def read(*arguments: str) -> Any:
    return json.loads(good(*arguments, "-o", "json"))


def until(look: Callable[[], Any], what: str = "") -> Any:
    """Return what `look` gives as soon as that is true."""
    ends = time.monotonic() + DEADLINE_S
    while not (found := look()):
        assert time.monotonic() < ends, f"waited in vain for {what or look}"
        time.sleep(0.02)
    return found


def events(*filters: str) -> list[dict[str, Any]]:
    return read("events", "list", *filters)


def published(type: str, key: str, count: int = 1) -> list[dict[str, Any]]:
    """Return the events of this type and key once there are so many."""
    found = until(
        lambda: len(found := events("-t", type, "-k", key)) >= count and found, f"{type} {key}"
    )
    assert len(found) == count
    return found


def place(order_id: str, cents: int, *options: str) -> str:
    return good(
        "events", "publish", "OrderPlaced", f"order_id={order_id}", f"cents={cents}", *options
    ).strip()


def dead(*filters: str) -> list[dict[str, Any]]:
    return read("dead", "list", "--each", *filters)


def given_up(key: str) -> dict[str, Any]:
    """Return the dead letter of a key once there is one that nobody asked for yet."""
    letters = until(lambda: [row for row in dead("-k", key) if not row["asked"]], f"dead {key}")
    return letters[0]


def handler(name: str) -> dict[str, Any]:
    return next(h for h in read("handlers", "list") if f"{h['service']}.{h['name']}" == name)


# -- events ------------------------------------------------------------------------------------


def test_publish_prints_the_id_and_handlers_react(worker: None) -> None:
    id = place("p-1", 990)
    (thanked,) = published("Thanked", "p-1")
    assert thanked["data"]["text"] == "thanks for 990"
    assert thanked["correlationid"] == id


def test_an_id_is_published_once(worker: None) -> None:
    assert place("p-2", 990, "--id", "given") == "given"
    result = pavane("events", "publish", "OrderPlaced", "order_id=p-2", "--id", "given")
    assert (result.exit_code, result.stdout) == (0, "given\n")
    assert "event given is in the log already; nothing was published" in result.stderr
    published("OrderPlaced", "p-2")


def test_publish_takes_the_fields_as_json(worker: None) -> None:
    data = '{"order_id": "p-3", "cents": 5}'
    good("events", "publish", "OrderPlaced", "--data", data)
    assert published("OrderPlaced", "p-3")[0]["data"] == {"order_id": "p-3", "cents": 5}


def test_text_that_looks_like_a_number_stays_text(worker: None) -> None:
    place("17", 5)
    assert published("OrderPlaced", "17")[0]["data"]["order_id"] == "17"


TILL = '''
"""A service that only publishes, what another module declares."""
from event_shop import Charged
from pavane import App, Event, Service

class OrderPlaced(Event, key="order_id"):
    order_id: str

app = App("till", services=[Service("till")], store="till.db")
'''


def test_an_app_that_only_publishes_knows_the_events_of_its_module(folder: Path) -> None:
    (folder / "till.py").write_text(TILL)
    here = ("--app", "till.py")
    good("events", "publish", "OrderPlaced", "order_id=t-1", *here)
    good("events", "publish", "Charged", "order_id=t-1", "cents=5", *here)
    assert [e["type"] for e in events("-k", "t-1", *here)] == ["Charged", "OrderPlaced"]


def test_list_and_show_print_cloud_events(worker: None) -> None:
    id = place("s-1", 990)
    published("Thanked", "s-1")
    (event,) = events("-t", "OrderPlaced", "-k", "s-1")
    assert (event["specversion"], event["id"], event["subject"]) == ("1.0", id, "s-1")
    assert event["dataschema"] == "pavane:event:OrderPlaced:2"
    types = [e["type"] for e in events("--conversation", id)]
    assert types == ["Thanked", "Charged", "OrderPlaced"]
    assert read("events", "show", id)["envelope"] == event


def test_an_event_looks_the_same_with_and_without_the_code(
    worker: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    place("s-3", 990)
    published("Thanked", "s-3")
    with_code = events("-k", "s-3")
    monkeypatch.delenv("PAVANE_APP")
    assert events("-k", "s-3", *STORE) == with_code
    assert {e["source"] for e in with_code} == {
        "/pavane/event_shop", "/pavane/payments", "/pavane/mail",
    }  # fmt: skip


def test_show_tells_what_became_of_an_event(worker: None) -> None:
    id = place("s-2", 990)
    published("Thanked", "s-2")
    done = r"✓ the start of audit.follow +done"
    drawn = until(lambda: re.search(done, shown := good("events", "show", id)) and shown, "the run")
    assert re.search(r"✓ payments.charge +done \d\d:\d\d:\d\d, took", drawn)
    assert re.search(r"Charged +s-2 +" + re.escape(id), drawn)
    assert f"run {id}" in drawn
    thanked = published("Thanked", "s-2")[0]["id"]
    until(lambda: read("events", "show", thanked)["taken"], "the mailbox")
    drawn = good("events", "show", thanked)
    assert re.search(rf"✓ the mailbox of audit +run {id}.follow took it", drawn)
    assert "~" not in drawn


def test_the_run_that_took_an_event_is_named_and_names_it(worker: None) -> None:
    """Wherever the event comes from, and whichever of the two one looks at."""
    order = '{"order_id": "m-1", "cents": 5}'
    good("runs", "start", "follow", order, "--id", "m-run")
    mine = ("order_id=m-1", "text=hi")
    good("events", "publish", "Thanked", *mine, "--id", "m-event")
    until(lambda: read("events", "show", "m-event")["taken"], "the mailbox")
    until(lambda: read("runs", "show", "m-run")["status"]["status"] == "completed", "the run")
    assert "run m-run receives it" in good("conversations", "show", "m-event")
    assert "event m-event" in good("conversations", "show", "m-run")
    assert "event m-event" in good("runs", "show", "m-run")

    good("events", "publish", "Thanked", *mine, "--id", "m-late")
    until(lambda: read("events", "show", "m-late")["kept"], "the mailbox")
    drawn = good("events", "show", "m-late")
    assert re.search(r"· the mailbox of audit +kept until [-\d]+ [:\d]+, nobody took it", drawn)
    took_another = "run m-run took another one of its key, and has ended"
    assert took_another in re.sub(r"\s+", " ", drawn)
    drawn = good("conversations", "show", "m-late")
    assert "in the mailbox of audit" in drawn
    assert took_another in re.sub(r"\s+", " ", drawn)
    assert "~" not in drawn


def test_tail_says_that_nobody_knows_a_type(worker: None, folder: Path) -> None:
    command = [sys.executable, "-m", "pavane", "events", "tail", "-t", "Chargd"]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.readline()
    process.terminate()
    process.communicate(timeout=DEADLINE_S)
    expected = "no event Chargd is declared in the app or was ever published; did you mean Charged?"
    assert said == f"{expected}\n"


def test_the_schema_of_an_event_is_found_by_its_dataschema(worker: None) -> None:
    place("s-4", 990)
    (event,) = published("OrderPlaced", "s-4")
    schema = json.loads(good("events", "schema", event["dataschema"]))
    assert schema["$id"] == event["dataschema"]
    assert schema == json.loads(good("events", "schema", "OrderPlaced"))
    (described,) = schema["$defs"].values()
    assert described["properties"]["cents"] == {"type": "integer", "default": 0}


def test_list_filters_by_time(worker: None) -> None:
    place("s-5", 990)
    published("Charged", "s-5")
    assert events("-k", "s-5", "--since", "1h")
    assert events("-k", "s-5", "--since", "2999-01-01") == []
    said = refused(2, "events", "list", "--since", "soon")
    assert "'soon' is no moment. Write \"2h\" (ago)" in said


def test_tail_follows_what_is_published_and_ends_with_ctrl_c(worker: None, folder: Path) -> None:
    place("t-0", 990)
    published("Charged", "t-0")
    command = [sys.executable, "-m", "pavane", "events", "tail", "-t", "Charged", "-n", "1"]
    process = subprocess.Popen(
        [*command, "-o", "jsonl"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["subject"] == "t-0"
    place("t-1", 990)
    assert json.loads(process.stdout.readline())["subject"] == "t-1"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, said) == (130, "interrupted\n")


STARTS = '''
"""A service whose runs are conversations, so that their starts are in the log."""
from pavane import App, Event, Service

class Greeted(Event, key="id"):
    id: str

class Missed(Event, key="id", type_name="start-greet"):
    id: str

desk = Service("desk")

@desk.workflow
async def greet(id: str) -> None:
    await desk.publish(Greeted(id=id))

@desk.on(Missed)
async def listen(event: Missed) -> None: ...

app = App("starts_shop", services=[desk])
app.conversation(start=greet, ends=[Greeted], within="1m")
'''


@pytest.fixture
def starts(folder: Path, tmp_path: Path) -> Iterator[tuple[str, ...]]:
    """The options that name a store in which the start of a run was told to the monitor."""
    (folder / "starts_shop.py").write_text(STARTS)
    here = ("--app", "starts_shop.py", "--store", str(tmp_path / "starts.db"))
    process = command_line.worker(folder, "starts_shop.py", *here[2:])
    good("runs", "start", "greet", '"g-1"', "--id", "g-1", "--wait", *here)
    until(lambda: read("conversations", "list", *here), "the conversation")
    yield here
    process.terminate()
    process.communicate(timeout=DEADLINE_S)


def test_list_and_tail_leave_out_what_pavane_tells_itself(
    starts: tuple[str, ...], folder: Path
) -> None:
    assert [e["type"] for e in events(*starts)] == ["Greeted"]
    assert [e["type"] for e in events("-n", "2", *starts)] == ["Greeted"]
    assert events("-t", "~start-greet", *starts) == []
    command = [sys.executable, "-m", "pavane", "events", "tail", "-n", "5", "-o", "jsonl"]
    process = subprocess.Popen([*command, *starts], cwd=folder, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["subject"] == "g-1"
    good("runs", "start", "greet", '"g-2"', "--wait", *starts)
    assert json.loads(process.stdout.readline())["subject"] == "g-2"
    process.terminate()
    process.communicate(timeout=DEADLINE_S)


def test_doctor_leaves_out_what_pavane_tells_itself(starts: tuple[str, ...]) -> None:
    (name,) = findings(*starts)["names"]
    assert "nobody declares to publish start-greet" in name["text"]
    assert "~start" not in pavane("doctor", *starts).output


# -- dead letters ------------------------------------------------------------------------------


def test_dead_letters_are_grouped_by_cause_whatever_their_ids(worker: None) -> None:
    for order in ("g-1", "g-2", "g-3"):
        place(order, 0)
        given_up(order)
    group = next(g for g in read("dead", "list") if g["cause"].startswith("ValueError"))
    assert group["cause"] == "ValueError: nothing to charge for …"
    assert (group["handler"], group["type"]) == ("payments.charge", "OrderPlaced")
    assert group["count"] >= 3
    drawn = good("dead", "list")
    assert drawn.splitlines()[0].split() == "COUNT HANDLER EVENT FIRST LAST CAUSE".split()


def test_a_dead_letter_shows_its_event_and_its_trace(worker: None) -> None:
    id = place("g-4", 0)
    no = given_up("g-4")["no"]
    drawn = good("dead", "show", str(no))
    assert f"dead letter {no}  OrderPlaced  g-4  at payments.charge" in drawn
    assert "after 2 attempts" in drawn
    assert "ValueError: nothing to charge for g-4\nTraceback" in drawn
    assert f"event      {id}" in drawn
    assert f"dead letter {no} after 2 attempts" in good("events", "show", id)


def test_a_retry_needs_no_code_and_succeeds_once_the_cause_is_repaired(
    worker: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    event_shop.SHUT.touch()
    for order in ("r-1", "r-2"):
        place(order, 5)
        given_up(order)
    event_shop.SHUT.unlink()
    monkeypatch.delenv("PAVANE_APP")
    which = ("--cause", "ConnectionError", *STORE)
    assert "2 dead letters would be asked to retry" in good("dead", "retry", "--dry-run", *which)
    assert len(dead("--cause", "ConnectionError", *STORE)) == 2
    assert good("dead", "retry", "--yes", *which) == "asked to retry 2 dead letters\n"
    until(lambda: not dead("--cause", "ConnectionError", *STORE), "the retries")
    assert len(until(lambda: events("-t", "Thanked", "-k", "r-1", *STORE))) == 1


def test_an_edited_dead_letter_is_checked_then_handled(worker: None) -> None:
    id = place("e-1", 0)
    no = str(given_up("e-1")["no"])
    said = refused(2, "dead", "edit", no, "--set", "cents=many")
    assert "is no OrderPlaced (version 2): Expected `int`, got `str`" in said
    assert "Nothing was written." in said
    said = refused(2, "dead", "edit", no, "--set", "order_id=e-2")
    assert "The key of dead letter" in said
    said = refused(3, "dead", "edit", no, "--set", "cent=1")
    assert "OrderPlaced has no field 'cent'. Did you mean 'cents'?" in said
    assert dead("-k", "e-1")[0]["asked"] == ""
    assert (
        good("dead", "edit", no, "--set", "cents=7") == f"asked to retry dead letter {no}, edited\n"
    )
    assert published("Charged", "e-1")[0]["data"]["cents"] == 7
    assert published("OrderPlaced", "e-1")[0]["data"]["cents"] == 0, "the log stays as it was"
    handled = {h["handler"]: h for h in read("events", "show", id)["handled"]}["payments.charge"]
    assert handled["outcome"] == "done"
    assert handled["data"] == {"order_id": "e-1", "cents": 7}
    assert 'with other data: {"order_id":"e-1","cents":7}' in good("events", "show", id)
    good("events", "replay", "--into", "payments.charge", "-k", "e-1", "--yes")
    again = until(lambda: dead("-k", "e-1"), "the replay with what was published")
    assert (again[0]["cause"], len(again)) == ("ValueError: nothing to charge for …", 1)
    assert "other data" not in good("events", "show", id)


def test_an_editor_edits_a_dead_letter(worker: None, monkeypatch: pytest.MonkeyPatch) -> None:
    place("e-3", 0)
    no = str(given_up("e-3")["no"])
    monkeypatch.setenv("VISUAL", "true")
    assert good("dead", "edit", no) == "nothing changed\n"
    monkeypatch.setenv("VISUAL", """sed -i 's/"cents": 0/"cents": 8/'""")
    good("dead", "edit", no)
    assert published("Charged", "e-3")[0]["data"]["cents"] == 8


def test_a_dropped_dead_letter_is_forgotten_and_its_event_marked(worker: None) -> None:
    id = place("d-1", 0)
    no = str(given_up("d-1")["no"])
    good("dead", "drop", no)
    until(lambda: not dead("-k", "d-1"), "the drop")
    handled = {h["handler"]: h["outcome"] for h in read("events", "show", id)["handled"]}
    assert handled["payments.charge"] == "dropped"
    assert f"No dead letter has number {no}" in refused(3, "dead", "drop", no)


def test_what_was_asked_for_once_is_not_asked_for_again(folder: Path) -> None:
    """Without a worker: the request waits in the log, and the dead letter tells of it."""
    here = ("--store", "asked.db")
    process = command_line.worker(folder, APP, *here)
    place("a-1", 0, *here)
    until(lambda: dead(*here))
    process.terminate()
    process.communicate(timeout=DEADLINE_S)
    result = pavane("dead", "retry", "--all", "--yes", *here)
    assert result.stdout == "asked to retry 1 dead letter\n"
    assert "no worker hosts payments now" in result.stderr
    assert [row["asked"] for row in dead(*here)] == ["retry"]
    result = pavane("dead", "retry", "--all", "--yes", *here)
    assert (result.stdout, result.exit_code) == ("", 0)
    assert "nothing to retry" in result.stderr


def test_bulk_needs_a_choice_and_a_yes(worker: None) -> None:
    place("b-1", 0)
    given_up("b-1")
    assert "Which ones? Give numbers (pavane dead drop 7 8)" in refused(2, "dead", "drop")
    assert "Give either numbers, or filters" in refused(2, "dead", "drop", "7", "-k", "b-1")
    both = ("--all", "--handler", "payments.charge", "--dry-run")
    assert "would be asked to drop" in good("dead", "drop", *both)
    assert "give --yes" in refused(2, "dead", "drop", "-k", "b-1")
    assert dead("-k", "b-1")


# -- handlers ----------------------------------------------------------------------------------


def test_a_replay_publishes_anew_and_once_per_name(worker: None) -> None:
    place("y-1", 990)
    published("Thanked", "y-1")
    which = ("events", "replay", "--into", "mail.thank", "-k", "y-1")
    assert good(*which, "--dry-run") == "1 event would be replayed into mail.thank\n"
    assert good(*which, "--yes", "--name", "again") == "asked mail.thank to handle 1 event again\n"
    published("Thanked", "y-1", 2)
    result = pavane(*which, "--yes", "--name", "again")
    assert result.stdout == "asked mail.thank to handle 0 events again\n"
    assert "1 of 1 were asked for before under this name" in result.stderr
    good(*which, "--yes", "--name", "more")
    published("Thanked", "y-1", 3)


def test_what_is_asked_for_in_bulk_and_interrupted_says_how_far_it_came(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def counts() -> AsyncIterator[int]:
        yield 200
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(with_bar(counts(), 3001, "into mail.thank", "--name again goes on"))
    assert capsys.readouterr().err == "interrupted after 200 of 3,001; --name again goes on\n"


def test_a_replay_into_what_does_not_handle_the_type_is_refused(worker: None) -> None:
    said = refused(2, "events", "replay", "--into", "mail.thank", "-t", "OrderPlaced")
    assert "Handler mail.thank does not handle 'OrderPlaced'; it handles Charged." in said
    said = refused(3, "events", "replay", "--into", "mail.thnk")
    assert "No handler is called 'mail.thnk'. Did you mean 'mail.thank'?" in said


def test_a_paused_handler_waits_until_it_is_resumed(worker: None) -> None:
    result = pavane("handlers", "pause", "mail.thank", "nobody", "--reason", "provider is down")
    assert result.exit_code == 3
    assert "paused mail.thank" in result.stderr
    paused = handler("mail.thank")
    assert (paused["state"], paused["reason"]) == ("paused", "provider is down")
    assert "paused: mail.thank (provider is down)" in good("doctor")
    handled = 0

    def thanked() -> bool:
        return len(events("-t", "Thanked", "-k", "w-1")) > handled

    while True:  # a worker is told at once, and hears it a moment later
        id = place("w-1", 990)
        charged = published("Charged", "w-1", handled + 1)[0]
        until(lambda: handler("mail.thank")["backlog"] == 1 or thanked(), "the backlog")
        time.sleep(0.2)
        if not thanked():
            break
        handled += 1
    waiting = read("events", "show", charged["id"])["handled"]
    assert {"handler": "mail.thank", "outcome": "waiting"}.items() <= waiting[-1].items()
    assert "resumed mail.thank" in pavane("handlers", "resume", "mail.thank").stderr
    assert published("Thanked", "w-1", handled + 1)[0]["correlationid"] == id
    until(lambda: handler("mail.thank")["state"] == "working", "the state")
    result = pavane("handlers", "resume", "mail.thank")
    assert (result.exit_code, result.stderr) == (0, "mail.thank was not paused\n")


def test_a_shadow_is_shown_with_its_difference(worker: None) -> None:
    place("x-1", 990)
    place("x-2", 13)
    place("x-3", 4)
    for order in ("x-1", "x-2", "x-3"):
        published("Thanked", order)
    whole = ("handlers", "show", "mail.thank_warmly", "--differences", "100")

    def both() -> dict[str, Any] | None:
        found = read(*whole)["shadow"]
        keys = {d["key"] for d in found["differences"]}
        return found if {"x-1", "x-2"} <= keys and found["same"] else None

    found = until(both, "the shadow")
    assert not events("-t", "Thanked", "-k", "x-1")[1:], "a shadow publishes nothing"
    keys = {d["key"]: d for d in found["differences"]}
    assert "x-3" not in keys
    assert keys["x-2"]["error"] == "ValueError: unlucky"
    drawn = good(*whole)
    assert '  -    text: "thanks for 990"\n  +    text: "many thanks for 990"\n' in drawn
    assert "mail.thank_warmly failed: ValueError: unlucky" in drawn


def test_a_share_is_shown_beside_the_handler_it_takes_from(worker: None) -> None:
    place("x-4", 990)
    published("Thanked", "x-4")
    found = read("handlers", "show", "thank_briefly")["share"]
    (share,) = found["shares"]
    assert (found["current"]["handler"], share["handler"]) == ("mail.thank", "mail.thank_briefly")
    assert found["current"]["handled"] + share["handled"] >= 1
    assert handler("mail.thank_briefly")["state"] == "share"


def test_services_shows_handlers(worker: None) -> None:
    drawn = good("services")
    assert re.search(r"handler +charge +on OrderPlaced · publishes Charged", drawn)
    assert "shadow of mail.thank" in drawn
    assert "takes 50.0% of mail.thank" in drawn
    assert re.search(r"handler +start-follow +on OrderPlaced · starts follow", drawn)


# -- doctor ------------------------------------------------------------------------------------

CHANGED = '''
"""The shop after a change that old events do not fit."""
from pavane import App, Event, Service

class OrderPlaced(Event, key="order_id", version=2):
    order_id: str
    cents: int
    currency: str

class OrderLost(Event, key="order_id"):
    order_id: str

payments = Service("payments")

@payments.on(OrderPlaced)
async def bill(event: OrderPlaced) -> None: ...

@payments.on(OrderLost)
async def search(event: OrderLost) -> None: ...

app = App("changed_shop", services=[payments])
'''


def findings(*options: str) -> dict[str, list[dict[str, Any]]]:
    result = pavane("doctor", "-o", "json", *options)
    found: dict[str, list[dict[str, Any]]] = {}
    for finding in json.loads(result.stdout):
        found.setdefault(finding["check"], []).append(finding)
    return found


def test_doctor_finds_names_and_schemas_that_do_not_meet(folder: Path) -> None:
    (folder / "changed_shop.py").write_text(CHANGED)
    here = ("--store", "changed.db")
    place("c-1", 5, *here)
    found = findings("--app", "changed_shop.py", *here)
    (schema,) = found["schemas"]
    assert schema["level"] == "fail"
    assert "1 of the newest 1 events OrderPlaced of version 2 do not fit" in schema["text"]
    assert "missing required field `currency`" in schema["text"]
    assert "raise version= to 3 and declare @OrderPlaced.upcast(2)" in schema["remedy"]
    (name,) = found["names"]
    assert name["level"] == "warn"
    assert "nobody declares to publish OrderLost, for which payments.search waits" in name["text"]
    (gone,) = [f for f in found["handlers"] if "not in the code" in f["text"]]
    assert "payments.charge" in gone["text"]
    assert "pavane handlers forget NAME" in gone["remedy"]


def test_doctor_finds_events_of_newer_code(folder: Path) -> None:
    (folder / "changed_shop.py").write_text(CHANGED.replace(", version=2", ""))
    here = ("--store", "newer.db")
    place("n-1", 5, *here)
    (schema,) = findings("--app", "changed_shop.py", *here)["schemas"]
    assert schema["level"] == "fail"
    assert "OrderPlaced version 2 was published by newer code" in schema["text"]
    assert "Deploy the newer code here, too" in schema["remedy"]


def test_a_handler_that_is_not_in_the_code_any_more_is_forgotten(folder: Path) -> None:
    (folder / "changed_shop.py").write_text(CHANGED)
    here = ("--store", "forgotten.db")
    place("f-1", 5, *here)
    names = {row["name"] for row in read("handlers", "list", *here)}
    assert "charge" in names
    said = refused(2, "handlers", "forget", "payments.charge", "--yes", *here)
    assert "Handler payments.charge is declared in the app's code; delete it there first." in said
    changed = ("--app", "changed_shop.py", *here)
    said = refused(2, "handlers", "forget", "payments.charge", *changed)
    assert "Forget payments.charge, and give up 1 event that waits for it?" in said
    assert "give --yes" in said
    result = pavane("handlers", "forget", "payments.charge", "--yes", *changed)
    assert (result.exit_code, result.stderr) == (0, "forgot payments.charge\n")
    assert "charge" not in {row["name"] for row in read("handlers", "list", *changed)}
    assert "No handler is called" in refused(3, "handlers", "forget", "payments.charge", *changed)


def test_doctor_names_the_app_that_a_worker_is_to_be_started_for(folder: Path) -> None:
    here = ("--store", "hint.db")
    place("h-1", 5, *here)
    (nodes,) = findings(*here)["nodes"]
    assert nodes["remedy"] == f"Start a worker: pavane run {APP} --store hint.db."


def test_doctor_tells_of_dead_letters(worker: None) -> None:
    place("c-2", 0)
    given_up("c-2")
    (found,) = findings()["dead letters"]
    assert found["level"] == "warn"
    assert "payments.charge: " in found["text"]
    assert [f["level"] for f in findings()["schemas"]] == ["ok"]


# -- errors, help and completion ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "arguments", "text"),
    [
        (3, ["events", "show", "nope"], "No event has the id 'nope' in "),
        (3, ["events", "publish", "OrderPlacd"], "No event type is called 'OrderPlacd'."),
        (3, ["events", "publish", "OrderPlaced", "order=1"], "Did you mean 'order_id'?"),
        (3, ["events", "schema", "OrderPlacd"], "No event type is called 'OrderPlacd'."),
        (
            3,
            ["events", "schema", "pavane:event:OrderPlaced:1"],
            "OrderPlaced is of version 2 in this code, and 'pavane:event:OrderPlaced:1' asks for",
        ),
        (2, ["events", "publish", "OrderPlaced", "x"], "'x' must be FIELD=VALUE."),
        (
            2,
            ["events", "publish", "OrderPlaced", "order_id=1", "cents=x"],
            "This is no OrderPlaced",
        ),
        (
            2,
            ["events", "publish", "OrderPlaced", "order_id=1", "--id", "we ird/id"],
            "'we ird/id' is no event id",
        ),
        (3, ["dead", "show", "4711"], "No dead letter has number 4711"),
        (3, ["handlers", "show", "mail.thnk"], "Did you mean 'mail.thank'?"),
        (2, ["events", "replay", "--into", "thank_briefly"], "name that one"),
        (2, ["dead", "edit", "1", "--set", "a=1", "--data", "{}"], "not both"),
    ],
)
def test_an_error_says_what_to_do(worker: None, code: int, arguments: list[str], text: str) -> None:
    said = refused(code, *arguments)
    assert text in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "command",
    ["events publish", "events list", "events show", "events tail", "events replay",
     "events schema",
     "handlers list", "handlers show", "handlers pause", "handlers resume", "dead list",
     "dead show", "dead retry", "dead edit", "dead drop"],
)  # fmt: skip
def test_every_command_has_help_with_examples(command: str) -> None:
    said = good(*command.split(), "--help")
    assert "Examples:" in said
    assert f"pavane {command} " in said


def test_names_complete(worker: None, monkeypatch: pytest.MonkeyPatch) -> None:
    id = place("n-1", 990)
    published("Thanked", "n-1")

    def completed(*words: str) -> list[str]:
        line = ["pavane", *words]
        environment = {
            "_PAVANE_COMPLETE": "zsh_complete",
            "COMP_WORDS": " ".join(line),
            "COMP_CWORD": str(len(line) - 1),
        }
        shown = CliRunner().invoke(main, [], env=environment, prog_name="pavane").stdout
        return shown.splitlines()[1::3]

    assert completed("handlers", "pause", "mail.th") == [
        "mail.thank", "mail.thank_warmly", "mail.thank_briefly",
    ]  # fmt: skip
    assert id in completed("events", "show", id[:12])
    assert "OrderPlaced" in completed("events", "publish", "Ord")
    assert completed("events", "schema", "Ord") == ["OrderPlaced"]
