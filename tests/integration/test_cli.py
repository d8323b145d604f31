"""The command line on real SQLite files: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import apsw
import pytest

from pavane.config import without_password
from pavane.stores.port import COUNT_MAX
from tests.integration.command_line import good, in_folder_of, pavane, refused, worker
from tests.postgres import Database, server

DEADLINE_S = 60
SHOP = '''
"""A shop with what a command line should be able to show."""
import asyncio
import os
import time
from pathlib import Path
from pavane import App, EngineConfig, Event, Retry, Service
from pavane import continue_as_new, receive, saga, set_attributes

class Approved(Event, key="order_id"):
    order_id: str
    by: str = "nobody"

orders, payments, shipping = map(Service, ("orders", "payments", "shipping"))

@payments.step
async def charge(order_id: str) -> str:
    return f"pay-{order_id}"

@payments.step(retry=Retry(attempts=2, first="5ms"))
async def refund(payment: str) -> None:
    if "stuck" in payment and not Path("bank-is-open").exists():
        raise ValueError("the bank is closed")

@shipping.step(retry=Retry(attempts=9, first="1m", jitter=0))
async def book(order_id: str) -> str:
    raise ConnectionError("no\\x1b[31m line")

@shipping.step
async def ship(order_id: str) -> str:
    if "noship" in order_id:
        raise RuntimeError("no truck")
    return f"TR-{order_id}"

@shipping.step
def stubborn(path: str) -> None:
    with open(path, "a") as file:
        file.write("began ")
    time.sleep(0 if Path("hurry").exists() else 60)

@orders.workflow
async def waits(path: str) -> str:
    await stubborn(path)
    return "done"

@shipping.step
async def slow(path: str) -> None:
    with open(path, "a") as file:
        file.write("began ")
    await asyncio.sleep(float(os.environ.get("SLOW_S", "0.4")))
    with open(path, "a") as file:
        file.write("ended ")

@orders.workflow(mode="choreography")
async def fulfil(order_id: str, express: bool = False) -> str:
    set_attributes(order=order_id, express=express)
    async with saga() as undo:
        undo(refund, await charge(order_id))
        return await ship(order_id)

@orders.workflow(receives=[Approved])
async def approve(order_id: str) -> str:
    return (await receive(Approved)).by

@orders.workflow
async def patient(order_id: str) -> str:
    return await book(order_id)

@orders.workflow
async def steady(path: str) -> str:
    await slow(path)
    return "done"

@orders.workflow
async def count_down(left: int) -> str:
    if left:
        continue_as_new(left - 1)
    return "over"

config = EngineConfig(grace_s=float(os.environ.get("GRACE_S", "10")))
app = App("cli_shop", services=[orders, payments, shipping], config=config)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("shop")
    (made / "cli_shop.py").write_text(SHOP)
    return made


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with in_folder_of(folder, "cli_shop.py", monkeypatch, "other_shop", "broken_shop"):
        yield


@pytest.fixture(scope="module")
def shop(folder: Path) -> Iterator[None]:
    """A worker for all services, on the app's own store."""
    process = worker(folder, "cli_shop.py")
    yield
    process.terminate()
    process.communicate(timeout=DEADLINE_S)


def status_until(wanted: str, id: str, *options: str) -> dict[str, Any]:
    """Return the status of a run as soon as it is the wanted one."""
    ends = time.monotonic() + DEADLINE_S
    while True:
        status = json.loads(good("runs", "show", id, "-o", "json", *options))["status"]
        if status["status"] == wanted:
            return status
        assert time.monotonic() < ends, status
        time.sleep(0.02)


# -- starting and looking ----------------------------------------------------------------------


def test_a_run_started_with_wait_prints_its_result(shop: None) -> None:
    result = pavane("runs", "start", "fulfil", '"o-1"', "--id", "o-1", "--wait")
    assert (result.exit_code, result.stdout) == (0, '"TR-o-1"\n')
    assert "run o-1 started" in result.stderr


@pytest.mark.parametrize("mode", ["orchestration", "choreography"])
def test_a_run_can_be_started_in_either_mode(shop: None, mode: str) -> None:
    id = f"mode-{mode}"
    good("runs", "start", "fulfil", '"m"', "--id", id, "--mode", mode, "--wait")
    line = json.loads(good("runs", "show", id, "-o", "json"))
    assert line["status"]["mode"] == mode
    assert line["result"] == "TR-m"
    held = [leg["service"] for leg in line["legs"]]
    travelled = ["orders", "payments", "shipping", "orders"]
    assert held == (["orders"] if mode == "orchestration" else travelled)


def test_start_prints_the_id_alone(shop: None) -> None:
    assert good("runs", "start", "fulfil", '"x"', "--id", "plain") == "plain\n"
    assert good("runs", "start", "fulfil", '"x"', "--id", "plain", "-o", "jsonl") == (
        '{"id":"plain"}\n'
    )


def test_a_failed_run_is_exit_code_1_with_the_reason(shop: None) -> None:
    said = refused(1, "runs", "start", "fulfil", '"noship"', "--id", "failed-1", "--wait")
    assert "error[run-failed]: Run 'failed-1' failed: RuntimeError: no truck\n" in said
    assert "`pavane runs show failed-1` shows what happened." in said


def test_show_draws_the_timeline(shop: None) -> None:
    pavane("runs", "start", "fulfil", '"noship"', "--id", "shown", "--wait")
    drawn = good("runs", "show", "shown")
    assert re.search(r"^fulfil  shown +failed, 1 undone$", drawn, re.M)
    assert re.search(r"^choreography from orders · .* · took ", drawn, re.M)
    assert "4 hops" in drawn
    assert "order=noship" in drawn
    for line in (
        r"^  payments +[\d.]+m?s  .*█",
        r"^✓ payments\.charge +[\d.]+m?s  .*[█░]",
        r"^✗ shipping\.ship +[\d.]+m?s  .*█",
        r"^  └ RuntimeError: no truck$",
        r"^↶ undo payments\.refund ",
        r"^failed  RuntimeError: no truck$",
    ):
        assert re.search(line, drawn, re.M), (line, drawn)
    assert "\x1b" not in drawn
    assert 'raise RuntimeError("no truck")' in good("runs", "show", "shown", "--trace")


def test_show_tells_of_a_parked_step_and_its_next_attempt(shop: None) -> None:
    good("runs", "start", "patient", '"p"', "--id", "parked")
    ends = time.monotonic() + DEADLINE_S
    while "attempt 2" not in (drawn := good("runs", "show", "parked")):
        assert time.monotonic() < ends, drawn
        time.sleep(0.02)
    assert "◌ shipping.book" in drawn
    assert re.search(r"attempt 2 in (5\d\.\ds|1m 00s).*failed with ConnectionError: no\\x1b", drawn)
    assert "most often tried: run parked, attempt 2 next" in good("doctor")


def test_list_filters_and_prints_json(shop: None) -> None:
    good("runs", "start", "fulfil", '"li"', "--arg", "express=true", "--id", "li-1", "--wait")
    pavane("runs", "start", "fulfil", '"li-noship"', "--id", "li-2", "--wait")
    found = json.loads(good("runs", "list", "--prefix", "li-", "-o", "json"))
    assert [(run["id"], run["status"]) for run in found] == [
        ("li-2", "failed"), ("li-1", "completed"),
    ]  # fmt: skip
    for options, ids in (
        (["--status", "failed"], ["li-2"]),
        (["--where", "express=true"], ["li-1"]),
        (["--where", "order=li"], ["li-1"]),
        (["--workflow", "approve"], []),
        (["--limit", "1"], ["li-2"]),
    ):
        lines = good("runs", "list", "--prefix", "li-", "-o", "jsonl", *options).splitlines()
        assert [json.loads(line)["id"] for line in lines] == ids
    table = good("runs", "list", "--prefix", "li-").splitlines()
    assert table[0].split() == ["ID", "WORKFLOW", "STATUS", "MODE", "AT", "HOPS", "STARTED", "TOOK"]
    assert table[1].endswith("RuntimeError: no truck")


def test_watch_prints_a_line_per_happening_until_the_end(shop: None) -> None:
    good("runs", "start", "fulfil", '"w"', "--id", "w-1")
    lines = good("runs", "watch", "w-1").splitlines()
    told = [" ".join(line.split()[1:]) for line in lines]
    assert told[0] == "started fulfil v1 at orders, choreography"
    assert "done step payments.charge" in told
    assert told[-1] == "completed"


def test_watch_of_a_failed_run_is_exit_code_1(shop: None) -> None:
    good("runs", "start", "fulfil", '"noship"', "--id", "w-2")
    result = pavane("runs", "watch", "w-2", "-o", "jsonl")
    assert result.exit_code == 1
    last = json.loads(result.stdout.splitlines()[-1])
    assert (last["id"], last["what"], last["text"]) == ("w-2", "failed", "RuntimeError: no truck")


def test_watch_follows_a_run_that_continued_where_nobody_writes_any_more(folder: Path) -> None:
    here = ("--store", "counted.db")
    process = worker(folder, "cli_shop.py", *here)
    good("runs", "start", "count_down", "2", "--id", "n", "--wait", *here)
    process.terminate()
    process.communicate(timeout=DEADLINE_S)
    watching = subprocess.run(
        [sys.executable, "-m", "pavane", "runs", "watch", "n", "-o", "jsonl", *here], cwd=folder,
        capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert watching.returncode == 0, watching.stderr
    lines = [json.loads(line) for line in watching.stdout.splitlines()]
    assert list(dict.fromkeys(line["id"] for line in lines)) == ["n", "n~2", "n~3"]
    assert good("runs", "show", "n", *here).endswith("\n\nwent on as  run n~2\n")
    assert (
        json.loads(good("runs", "show", "n", *here, "-o", "json"))["status"]["successor"] == "n~2"
    )
    assert lines[-1]["what"] == "completed"


# -- steering ----------------------------------------------------------------------------------


def test_send_delivers_an_event(shop: None) -> None:
    good("runs", "start", "approve", '"a"', "--id", "a-1")
    status_until("waiting", "a-1")
    assert "waits for  event Approved" in good("runs", "show", "a-1")
    good("runs", "send", "a-1", "Approved", '{"order_id": "a", "by": "ada"}')
    status_until("completed", "a-1")
    assert "error[run-ended]: Run 'a-1' has ended (completed)" in refused(
        1, "runs", "send", "a-1", "Approved", '{"order_id": "a"}'
    )


def test_send_refuses_what_is_no_such_event(shop: None) -> None:
    said = refused(2, "runs", "send", "a-1", "Approved", '{"order_id": 3}')
    assert "error[bad-arguments]: This is no Approved: Expected `str`, got `int`" in said
    assert "Its fields: order_id, by." in said
    assert "No event type is called 'Aproved'" in refused(3, "runs", "send", "a-1", "Aproved")


def test_cancel_goes_on_after_an_unknown_run(shop: None) -> None:
    good("runs", "start", "approve", '"c"', "--id", "c-1")
    said = refused(3, "runs", "cancel", "nobody", "c-1")
    assert "error[unknown-run]: No run is called 'nobody'" in said
    assert "asked to cancel run c-1" in said
    status_until("cancelled", "c-1")
    assert "✗ asked to cancel" in good("runs", "show", "c-1")


def test_a_stuck_run_is_found_shown_and_retried_without_its_code(
    shop: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refused(1, "runs", "start", "fulfil", '"noship-stuck"', "--id", "s-1", "--wait")
    assert "Run 's-1' is stuck: The compensation payments.refund failed for good" in said
    monkeypatch.delenv("PAVANE_APP")
    store = ("--store", "cli_shop.db")
    found = json.loads(good("runs", "list", "--status", "stuck", "-o", "json", *store))
    assert [(run["id"], run["holder"]) for run in found] == [("s-1", "payments")]
    drawn = good("runs", "show", "s-1", *store)
    assert "! undo payments.refund" in drawn
    assert "stuck  The compensation payments.refund failed for good" in drawn
    assert "warn  stuck runs" in good("doctor", *store)
    assert pavane("doctor", "--strict", *store).exit_code == 1
    (folder / "bank-is-open").touch()
    assert "asked to retry run s-1" in pavane("runs", "retry", "s-1", *store).stderr
    assert status_until("failed", "s-1", *store)["compensated"] == 1
    drawn = good("runs", "show", "s-1", *store)
    assert "↻ retried by hand" in drawn
    assert "↶ undo payments.refund" in drawn


def test_kill_ends_a_run_without_its_code(shop: None, monkeypatch: pytest.MonkeyPatch) -> None:
    good("runs", "start", "approve", '"k"', "--id", "k-1")
    monkeypatch.delenv("PAVANE_APP")
    store = ("--store", "cli_shop.db")
    assert "asked to kill run k-1" in pavane("runs", "kill", "k-1", *store).stderr
    status_until("killed", "k-1", *store)
    said = refused(1, "runs", "kill", "k-1", *store)
    assert "error[run-ended]: Run 'k-1' has ended (killed)" in said


def test_fork_does_a_step_anew(shop: None) -> None:
    good("runs", "start", "fulfil", '"f"', "--id", "f-1", "--wait")
    assert good("runs", "fork", "f-1", "--at", "ship", "--id", "f-2") == "f-2\n"
    status_until("completed", "f-2")
    assert "⑂ forked here" in good("runs", "show", "f-2")
    said = refused(2, "runs", "fork", "f-1", "--at", "shop")
    assert "no finished step 'shop'. It has: payments.charge, shipping.ship." in said


@pytest.mark.parametrize("with_code", [True, False])
def test_fork_and_retry_of_a_compensated_run_name_the_step_that_can_be_forked(
    shop: None, monkeypatch: pytest.MonkeyPatch, with_code: bool
) -> None:
    id = f"noship-{with_code}"
    good("runs", "start", "fulfil", f'"{id}"', "--id", id)
    status_until("failed", id)
    if not with_code:
        monkeypatch.delenv("PAVANE_APP")
    store = () if with_code else ("--store", "cli_shop.db")
    advice = f"is payments.charge: `pavane runs fork {id} --at payments.charge`."
    assert advice in refused(2, "runs", "fork", id, "--at", "ship", *store)
    assert advice in refused(2, "runs", "retry", id, *store)
    forked = good("runs", "fork", id, "--at", "payments.charge", *store).strip()
    status_until("failed", forked, *store)


# -- services and doctor -----------------------------------------------------------------------


def test_services_shows_what_is_declared_and_who_hosts_it(shop: None) -> None:
    found = {line["name"]: line for line in json.loads(good("services", "-o", "json"))}
    assert list(found) == ["orders", "payments", "shipping"]
    refund = found["payments"]["steps"][1]
    assert (refund["name"], refund["attempts"]) == ("refund", 2)
    approve = next(w for w in found["orders"]["workflows"] if w["name"] == "approve")
    assert (approve["mode"], approve["receives"]) == ("orchestration", ["Approved"])
    (host,) = found["orders"]["hosts"]
    assert (host["alive"], host["partitions"], found["orders"]["free"]) == (True, 32, 0)
    assert "approve v1" in good("services")


def test_doctor_finds_a_healthy_shop_healthy(shop: None) -> None:
    found = {f["check"]: f["level"] for f in json.loads(good("doctor", "-o", "json"))}
    for check in ("python", "sqlite", "app", "store", "durability", "wal", "nodes", "partitions"):
        assert found[check] == "ok", check


def test_doctor_warns_when_nobody_works() -> None:
    good("runs", "start", "fulfil", '"x"', "--store", "idle.db")
    drawn = good("doctor", "--store", "idle.db")
    assert "warn  nodes" in drawn
    assert "→ Start a worker: pavane run cli_shop.py --store idle.db." in drawn


def test_doctor_tells_how_workers_on_postgres_wake_up() -> None:
    with Database() as url:
        good("runs", "start", "fulfil", '"x"', "--store", url)
        found = {f["check"]: f for f in json.loads(good("doctor", "--store", url, "-o", "json"))}
        assert found["postgres"]["text"].startswith("Postgres 1")
        assert found["wake-ups"]["text"].startswith("NOTIFY: ")
        assert found["restored"]["level"] == "ok"


def test_no_password_is_shown() -> None:
    with Database() as url:
        good("runs", "start", "fulfil", '"x"', "--store", url)
        secret = url.replace("@", ":s3cret@", 1)
        drawn = good("doctor", "--store", secret)
        assert "s3cret" not in drawn
        assert f"pavane run cli_shop.py --store {url}" in " ".join(drawn.split())
    said = refused(4, "runs", "list", "--store", "postgresql+asyncpg://shop:s3cret@db/shop")
    assert "'postgresql+asyncpg://shop@db/shop' is no store" in said
    assert without_password("postgresql:///shop?user=shop&password=s3cret&host=db") == (
        "postgresql:///shop?user=shop&host=db"
    )


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_doctor_counts_a_large_store_no_further_than_it_must(kind: str) -> None:
    columns, values = "id, target, kind, receiver, run, at_us, body", "n, 0, '', '', '', 0, ''"
    with ExitStack() as stack:
        store = "large.db" if kind == "sqlite" else stack.enter_context(Database())
        good("runs", "start", "fulfil", '"x"', "--store", store)
        if kind == "sqlite":
            with closing(apsw.Connection(store)) as connection:
                connection.execute(
                    f"INSERT INTO log ({columns}) WITH RECURSIVE numbers AS"
                    f" (SELECT 2 AS n UNION ALL SELECT n + 1 FROM numbers LIMIT {COUNT_MAX})"
                    f" SELECT {values} FROM numbers"
                )
        else:
            server().execute(
                f"INSERT INTO pavane.log (pos, {columns})"
                f" SELECT n, {values} FROM generate_series(2, {COUNT_MAX + 1}) AS n",
                store.rpartition("/")[2],
            )
        told = " ".join(good("doctor", "--store", store).split())
        assert "0 runs, 0 events, more than 10,000 messages" in told


def test_doctor_fails_for_a_file_that_is_no_store() -> None:
    result = pavane("doctor", "--store", "cli_shop.py")
    assert result.exit_code == 1
    assert "fail  store" in result.stdout


def test_a_run_that_nobody_took_yet_is_shown_as_such() -> None:
    result = pavane("runs", "start", "fulfil", '"x"', "--store", "idle.db", "--id", "early")
    assert "no worker hosts 'orders' now" in result.stderr
    assert "not begun  no worker has taken it at orders" in good(
        "runs", "show", "early", "--store", "idle.db"
    )


def test_runs_that_nobody_has_begun_are_listed_until_somebody_does(folder: Path) -> None:
    here = ("--store", "unbegun.db")
    for id in ("u-1", "u-2"):
        pavane("runs", "start", "fulfil", f'"{id}"', "--id", id, *here)
    pavane("runs", "start", "steady", '"marks-unbegun"', "--id", "other", *here)
    for options, ids in (
        ([], ["other", "u-2", "u-1"]),
        (["--workflow", "fulfil"], ["u-2", "u-1"]),
        (["--prefix", "u-", "--limit", "1"], ["u-2"]),
        (["--status", "stuck"], []),
        (["--status", "waiting", "--prefix", "o"], ["other"]),
        (["--where", "order=u-1"], []),
    ):
        lines = good("runs", "list", "-o", "jsonl", *options, *here).splitlines()
        assert [json.loads(line)["id"] for line in lines] == ids
    assert "not begun: no node works for orders" in good("runs", "list", *here)
    assert "3 runs started and not begun, such as other" in good("doctor", *here)
    process = worker(folder, "cli_shop.py", *here)
    assert status_until("completed", "u-1", *here)
    assert status_until("completed", "other", *here)
    process.terminate()
    process.communicate(timeout=DEADLINE_S)
    listed = good("runs", "list", "-o", "jsonl", *here).splitlines()
    assert sorted(json.loads(line)["id"] for line in listed) == ["other", "u-1", "u-2"]
    assert "not begun" not in good("doctor", *here)


# -- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "arguments", "text"),
    [
        (3, ["runs", "show", "nobody"], "error[unknown-run]: No run is called 'nobody' in "),
        (
            3,
            ["runs", "start", "fulfill"],
            "No workflow is called 'fulfill'. Did you mean 'fulfil'?",
        ),
        (3, ["run", "cli_shop.py", "-n", "paymnts"], "Did you mean 'payments'?"),
        (2, ["runs", "start", "fulfil", "x"], "Text needs quotes of its own: '\"x\"'."),
        (2, ["runs", "start", "fulfil", "3"], "error[bad-arguments]: Argument `order_id` of "),
        (2, ["runs", "start", "fulfil", '"x"', "--arg", "express"], "must be NAME=JSON"),
        (2, ["runs", "list", "--where", "order"], "must be KEY=VALUE"),
        (2, ["runs", "lst"], "No such command 'lst'. Did you mean 'list'?"),
        (2, ["runs", "list", "-a", "cli_shp.py"], "Did you mean cli_shop.py?"),
        (2, ["runs", "list", "-a", "cli_shop:api"], "has no 'api'. Apps there: app."),
        (2, ["runs", "list", "-a", "cli_shop:orders"], "is a Service, no App. Apps there: app."),
        (2, ["runs", "list", "-a", "no_such_module"], "No module is called 'no_such_module'."),
        (4, ["runs", "list", "-s", "nowhere.db"], "error[store]: There is no store at "),
        (4, ["runs", "list", "-s", "cli_shop.py"], "is not an SQLite file. Choose another path."),
        (4, ["runs", "list", "-s", "memory:"], "lives only inside the process"),
    ],
)
def test_an_error_says_what_to_do(shop: None, code: int, arguments: list[str], text: str) -> None:
    said = refused(code, *arguments)
    assert text in said
    assert "Traceback" not in said


def test_colours_are_for_terminals_and_on_demand(
    shop: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    good("runs", "start", "fulfil", '"x"', "--id", "colour", "--wait")
    assert "\x1b[" not in good("runs", "show", "colour")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[32m" in good("runs", "show", "colour")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in good("runs", "show", "colour")


def test_ctrl_c_ends_waiting_but_not_the_run(shop: None, folder: Path) -> None:
    arguments = ["runs", "start", "approve", '"i"', "--id", "i-1", "--wait"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pavane", *arguments],
        cwd=folder, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert "run i-1 started" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, said) == (130, "interrupted\n")
    status_until("waiting", "i-1")


def test_another_run_of_the_same_id_is_refused(shop: None) -> None:
    good("runs", "start", "fulfil", '"x"', "--id", "twice")
    said = refused(1, "runs", "start", "fulfil", '"y"', "--id", "twice")
    assert "error[run-conflict]: Run 'twice' exists already, with other arguments" in said
    said = refused(1, "runs", "start", "approve", '"x"', "--id", "twice")
    assert "of workflow 'fulfil' and not 'approve'. Choose another id; `pavane runs show" in said


def test_without_app_and_store_it_asks_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PAVANE_APP")
    assert "Which runs? Give --app shop.py or --store shop.db" in refused(2, "runs", "list")
    assert "Which app? Give --app shop.py" in refused(2, "runs", "start", "fulfil")


def test_code_that_does_not_import_shows_where(folder: Path) -> None:
    (folder / "broken_shop.py").write_text("def f():\n    return 1 / 0\n\nf()\n")
    said = refused(2, "runs", "list", "--app", "broken_shop.py")
    assert 'broken_shop.py", line 2, in f' in said
    assert "error[bad-target]: broken_shop.py cannot be imported: ZeroDivisionError" in said
    assert "importlib" not in said


def test_two_apps_in_a_file_must_be_told_apart(folder: Path) -> None:
    (folder / "other_shop.py").write_text(
        "from pavane import App\none = App('one', [])\ntwo = App('two', [])\n"
    )
    assert "say which one: other_shop.py:one, other_shop.py:two." in refused(
        2, "runs", "list", "--app", "other_shop.py"
    )
    assert "There is no store at" in refused(4, "runs", "list", "--app", "other_shop:two")


def test_a_worker_without_an_app_is_told_how_to_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PAVANE_APP")
    for command in ("run", "dev"):
        assert "Give TARGET, such as shop.py, or set PAVANE_APP." in refused(2, command)


def test_an_empty_store_is_not_taken_for_the_default() -> None:
    for command in ("run", "runs list", "runs start fulfil", "services"):
        said = refused(4, *command.split(), "--store", "")
        assert "error[store]: '' is no store that this version knows." in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="it is Linux's")
def test_output_that_cannot_be_written_is_said_in_a_line(shop: None) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "pavane", "runs", "list", "-o", "json"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert result.returncode == 1
    assert (
        result.stderr == "error[output]: The output cannot be written: No space left on device.\n"
    )


# -- help and completion -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    ["run", "dev", "services", "doctor", "completion", "runs start", "runs list", "runs show",
     "runs watch", "runs send", "runs cancel", "runs kill", "runs retry", "runs fork"],
)  # fmt: skip
def test_every_command_has_help_with_examples(command: str) -> None:
    assert f"Examples:\n    pavane {command}" in good(*command.split(), "--help")


def test_help_tells_the_exit_codes_and_imports_no_engine() -> None:
    program = (
        "import sys, pavane.cli\n"
        "try: pavane.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('msgspec', 'apsw', 'asyncio', 'pavane.app') if m in sys.modules])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True
    ).stdout
    assert "130  interrupted" in printed
    assert printed.endswith("[]\n")


def test_completion_knows_commands_workflows_and_runs(shop: None) -> None:
    good("runs", "start", "fulfil", '"t"', "--id", "tab-1", "--wait")

    def offered(words: str) -> list[str]:
        variables = {
            "_PAVANE_COMPLETE": "bash_complete", "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
        }  # fmt: skip
        command = [sys.executable, "-c", "from pavane.cli import main; main(prog_name='pavane')"]
        printed = subprocess.run(
            command, env=os.environ | variables, capture_output=True, text=True, check=False
        ).stdout
        return [line.partition(",")[2] for line in printed.splitlines()]

    assert offered("pavane runs st") == ["start"]
    assert offered("pavane runs start ful") == ["fulfil"]
    assert offered("pavane runs show tab-") == ["tab-1"]
    assert offered("pavane runs fork tab-1 --at ") == ["payments.charge", "shipping.ship"]
    assert "_PAVANE_COMPLETE=bash_complete" in good("completion", "bash")


# -- workers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_a_worker(folder: Path, number: signal.Signals) -> None:
    store, marks = ("--store", f"drain-{number}.db"), folder / f"marks-{number}"
    process = worker(folder, "cli_shop.py", *store)
    good("runs", "start", "steady", json.dumps(str(marks)), "--id", "d-1", *store)
    ends = time.monotonic() + DEADLINE_S
    while not marks.exists():
        assert time.monotonic() < ends
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, said
    assert f"{number.name}: draining" in said
    assert said.endswith("drained\n")
    assert marks.read_text() == "began ended "  # it was let finish, and was not begun again
    assert status_until("completed", "d-1", *store)


def test_a_second_signal_stops_a_worker_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOW_S", "600")
    monkeypatch.setenv("GRACE_S", "600")
    store, marks = ("--store", "second.db"), folder / "marks-second"
    process = worker(folder, "cli_shop.py", *store)
    good("runs", "start", "steady", json.dumps(str(marks)), "--id", "d-1", *store)
    ends = time.monotonic() + DEADLINE_S
    while not marks.exists():
        assert time.monotonic() < ends
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "draining" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, said) == (130, "SIGINT again: stopped at once\n")
    assert marks.read_text() == "began "


def test_a_worker_ends_after_the_grace_period_though_a_thread_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRACE_S", "0.2")
    store, marks = ("--store", "stubborn.db"), folder / "marks-stubborn"
    process = worker(folder, "cli_shop.py", *store)
    good("runs", "start", "waits", json.dumps(str(marks)), "--id", "d-1", *store)
    ends = time.monotonic() + DEADLINE_S
    while not marks.exists():
        assert time.monotonic() < ends
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, said.splitlines()[-1]) == (0, "drained")
    (folder / "hurry").touch()
    process = worker(folder, "cli_shop.py", *store)
    assert status_until("completed", "d-1", *store)
    process.terminate()
    process.communicate(timeout=DEADLINE_S)
    assert marks.read_text() == "began began "


def test_an_app_that_runs_a_script_ends_though_a_thread_goes_on(folder: Path) -> None:
    script = """
import asyncio
from cli_shop import app, waits

async def main():
    await app.start(waits, "marks-script")
    while not __import__("os").path.exists("marks-script"):
        await asyncio.sleep(0.01)

app.run(main)
print("over")
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True,
        timeout=DEADLINE_S, env={**os.environ, "GRACE_S": "0.2", "PAVANE_STORE": "script.db"},
    )  # fmt: skip
    assert (ended.stdout, ended.returncode) == ("over\n", 0), ended.stderr


def test_a_worker_that_is_asked_to_drain_ends(folder: Path) -> None:
    here = ("--store", "asked.db")
    process = worker(folder, "cli_shop.py", *here)
    (node,) = json.loads(good("nodes", "list", "-o", "json", *here))
    assert (node["state"], node["pid"]) == ("working", process.pid)
    assert node["partitions"]["orders"] == 32
    assert f"{node['name']}  working" in good("nodes", "list", *here)
    said = refused(2, "nodes", "drain", node["name"], *here)
    assert f"Nobody but {node['name']} works for orders" in said
    assert "No node is called 'other'" in refused(3, "nodes", "drain", "other", *here)
    said = pavane("nodes", "drain", node["name"], "--force", *here).stderr
    assert f"asked {node['name']} to drain" in said
    assert f"{node['name']} left after" in said
    _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, said
    assert said.endswith("drained\n")
    assert pavane("nodes", "list", *here).stderr == "no nodes\n"


def test_dev_starts_anew_when_code_changes(folder: Path, tmp_path: Path) -> None:
    code = tmp_path / "dev_shop.py"
    code.write_text(SHOP.replace('App("cli_shop"', 'App("before"'))
    process = subprocess.Popen(
        [sys.executable, "-m", "pavane", "dev", "dev_shop.py", "--store", "dev.db"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    said: list[str] = []

    def read_until(text: str) -> None:
        for line in process.stderr or ():
            said.append(line)
            if line.startswith(text):
                return
        raise AssertionError(said)

    read_until("before  pid")
    read_until("ready")
    code.write_text(SHOP.replace('App("cli_shop"', 'App("afterwards"'))
    read_until("changed: dev_shop.py; starting anew")
    read_until("afterwards  pid")
    read_until("ready")
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0
    assert rest.endswith("drained\n")


def test_dev_brings_a_postgres_that_keeps_what_was_done() -> None:
    with TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)  # a server that root starts runs as somebody else
        (place / "dev_shop.py").write_text(SHOP)
        address = ""
        for turn in range(2):
            process = subprocess.Popen(
                [sys.executable, "-m", "pavane", "dev", "dev_shop.py", "--postgres"],
                cwd=place, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            said: list[str] = []
            for line in process.stderr or ():
                said.append(line)
                if line == "ready\n":
                    break
            (told,) = [line for line in said if "PAVANE_STORE=" in line]
            found = told.split("PAVANE_STORE=")[1].strip()
            assert found.startswith("postgresql://")
            assert address in ("", found)
            address, here = found, ("--store", found)
            if turn == 0:
                good("runs", "start", "fulfil", '"x"', "--id", "kept", "--wait", *here)
            assert status_until("completed", "kept", *here)
            process.send_signal(signal.SIGINT)
            _, rest = process.communicate(timeout=DEADLINE_S)
            assert process.returncode == 0, rest
        assert (place / ".pavane" / ".gitignore").read_text() == "*\n"


def test_dev_takes_a_store_or_a_postgres_of_its_own() -> None:
    said = refused(2, "dev", "cli_shop.py", "--postgres", "--store", "x.db")
    assert "leave one of both out" in said
