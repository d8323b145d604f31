"""Exported runs are replayed against other code, which tells what would be stuck before it is."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pavane import App, BadArguments, Service, patched
from pavane.testing import ReplayFailed, replay_check
from tests.integration.command_line import good, in_folder_of, pavane, refused

SHOP = '''
"""A shop whose orders are under way when its code changes."""
import asyncio
from pavane import App, Event, Service, patched, receive, saga

class Paid(Event):
    cents: int

shop, till = Service("shop"), Service("till")

@till.step
async def charge(order: str) -> str:
    return f"p-{order}"

@till.step
async def thank(order: str) -> None: ...

@shop.workflow(mode="choreography")
async def sell(order: str) -> str:
    payment = await charge(order)
    await thank(order)
    return payment

@shop.workflow(receives=[Paid])
async def wait(order: str) -> int:
    return (await receive(Paid)).cents

@shop.workflow
async def fail(order: str) -> None:
    raise ValueError(order)

app = App("history_shop", services=[shop, till])

async def main():
    async with app:
        for number in range(6):
            run = await app.start(sell, f"o-{number}", id=f"o-{number}")
            await run.result()
        await app.start(wait, "w", id="w-1")
        failing = await app.start(fail, "f", id="f-1", mode="choreography")
        while (await failing.status()).status != "failed":
            await asyncio.sleep(0.01)

if __name__ == "__main__":
    asyncio.run(main())
'''
CHANGED = SHOP.replace("await thank(order)\n    return", "return").replace(
    "class Paid(Event):", "class Paid(Event):\n    by: str = ''"
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store in which orders were placed."""
    import runpy

    folder = tmp_path_factory.mktemp("histories")
    (folder / "history_shop.py").write_text(SHOP)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runpy.run_path(str(folder / "history_shop.py"), run_name="__main__")
    return folder


@pytest.fixture(autouse=True)
def in_folder(shop: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with in_folder_of(shop, "history_shop.py", monkeypatch, "changed_shop"):
        yield


# -- export ------------------------------------------------------------------------------------


def test_runs_are_exported_as_lines_to_stdout() -> None:
    lines = [json.loads(line) for line in good("runs", "export").splitlines()]
    assert sorted(line["header"]["run"] for line in lines) == [
        "f-1",
        *(f"o-{n}" for n in range(6)),
        "w-1",
    ]
    (one,) = good("runs", "export", "w-1").splitlines()
    assert json.loads(one)["status"] == "waiting"
    filtered = good("runs", "export", "--workflow", "sell", "--status", "completed", "-n", "2")
    assert [json.loads(line)["header"]["run"] for line in filtered.splitlines()] == ["o-5", "o-4"]


def test_a_folder_has_a_file_for_each_workflow(tmp_path: Path) -> None:
    result = pavane("runs", "export", "--to", f"{tmp_path}/new/")
    assert (result.exit_code, result.stderr) == (0, f"8 runs written to {tmp_path}/new/\n")
    files = {path.name: len(path.read_text().splitlines()) for path in (tmp_path / "new").iterdir()}
    assert files == {"sell.v1.jsonl": 6, "wait.v1.jsonl": 1, "fail.v1.jsonl": 1}
    good("runs", "export", "--to", f"{tmp_path}/one.jsonl", "o-1")
    assert len((tmp_path / "one.jsonl").read_text().splitlines()) == 1


def test_what_cannot_be_exported_is_an_error() -> None:
    assert "No run is called 'o-99'" in refused(3, "runs", "export", "o-99")
    assert "not both" in refused(2, "runs", "export", "o-1", "--status", "running")


# -- replay ------------------------------------------------------------------------------------


@pytest.fixture
def histories(tmp_path: Path) -> Path:
    good("runs", "export", "--to", f"{tmp_path}/h/")
    return tmp_path / "h"


def changed(text: str = CHANGED) -> str:
    Path("changed_shop.py").write_text(text)
    return "changed_shop.py"


def test_the_same_code_fits(histories: Path) -> None:
    printed = good("replay-check", "history_shop.py", str(histories))
    assert re.fullmatch(
        r"8 of 8 runs fit; 20 journal entries of 3 workflows in [\d.]+ s \([\d,]+/s\)\n", printed
    )


def test_changed_code_is_refused_once_for_all_that_differ_alike(histories: Path) -> None:
    result = pavane("replay-check", changed(), str(histories))
    assert result.exit_code == 1
    assert f"sell v1: 6 runs do not fit, such as o-5 ({histories}/sell.v1.jsonl:1)" in result.stdout
    assert result.stdout.count("-step till.thank") == 1
    assert "`if patched(…):`" in result.stdout
    assert "2 of 8 runs fit; 6 do not" in result.stdout


def test_programs_get_each_misfit(histories: Path) -> None:
    result = pavane("replay-check", changed(), str(histories), "-o", "json")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["runs"], len(report["misfits"])) == (1, 8, 6)
    assert {it["verdict"] for it in report["misfits"]} == {"mismatch"}


def test_a_patched_change_fits(histories: Path) -> None:
    text = SHOP.replace(
        "    await thank(order)\n", "    if not patched('no thanks'):\n        await thank(order)\n"
    )
    assert "8 of 8 runs fit" in good("replay-check", changed(text), str(histories))


def test_code_that_is_gone_matters_to_runs_under_way_only(histories: Path) -> None:
    text = SHOP.replace("receives=[Paid]", "receives=[Paid], version=2").replace(
        "@shop.workflow\nasync def fail", "async def fail"
    )
    result = pavane("replay-check", changed(text), str(histories))
    assert result.exit_code == 1
    assert "wait v1: 1 run does not fit, such as w-1" in result.stdout
    assert "Keep old versions declared" in result.stdout
    assert "6 of 8 runs fit; 1 do not; 1 ended under code that is gone" in result.stdout


def test_what_is_no_history_is_said_with_its_line(histories: Path) -> None:
    (histories / "odd.jsonl").write_text('\n{"header": 5}\n')
    result = pavane("replay-check", "history_shop.py", str(histories))
    assert result.exit_code == 1
    assert f"{histories}/odd.jsonl:2" in result.stdout
    assert "no history of a run" in result.stdout
    assert "8 of 9 runs fit" in result.stdout
    assert "of 3 workflows" in result.stdout


def test_alike_lines_that_are_no_histories_are_counted(histories: Path) -> None:
    (histories / "odd.jsonl").write_text("[]\n[]\n[]\n")
    result = pavane("replay-check", "history_shop.py", str(histories))
    assert f"{histories}/odd.jsonl:1 and 2 lines more\n" in result.stdout


def test_nothing_to_replay_passes_no_gate(tmp_path: Path) -> None:
    (tmp_path / "failed.jsonl").touch()
    text = refused(2, "replay-check", "history_shop.py", str(tmp_path))
    assert f"There is no run in {tmp_path}, so nothing was checked." in text
    assert "`pavane runs export --app shop.py --to histories/`" in text


def test_histories_are_read_from_pipes(histories: Path) -> None:
    reading, writing = os.pipe()
    try:
        os.write(writing, (histories / "wait.v1.jsonl").read_bytes())
        os.close(writing)
        printed = good("replay-check", "history_shop.py", f"/dev/fd/{reading}")
    finally:
        os.close(reading)
    assert "1 of 1 runs fit" in printed
    assert "of 1 workflow in" in printed


def test_arguments_are_not_compared_which_the_help_says(histories: Path) -> None:
    text = SHOP.replace("await charge(order)", "await charge(order * 2)")
    assert "8 of 8 runs fit" in good("replay-check", changed(text), str(histories))
    assert "Arguments, durations and" in good("replay-check", "--help")


def test_paths_without_histories_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in refused(2, "replay-check", "history_shop.py", str(tmp_path / "no"))
    assert "no .jsonl files" in refused(2, "replay-check", "history_shop.py", str(tmp_path))


# -- from tests --------------------------------------------------------------------------------


def test_replay_checks_are_tests_as_well(histories: Path) -> None:
    shop, till = Service("shop"), Service("till")

    @till.step
    async def charge(order: str) -> str:
        return order

    @shop.workflow
    async def sell(order: str) -> str:
        if patched("other"):
            await charge("first")
        return await charge(order)

    app = App("other", services=[shop, till])
    with pytest.raises(ReplayFailed, match="6 runs do not fit, such as o-5") as failed:
        replay_check(app, histories / "sell.v1.jsonl")
    assert len(failed.value.report.misfits) == 6
    report = replay_check(app, histories / "fail.v1.jsonl")
    assert (report.runs, report.retired) == (1, 1)
    with pytest.raises(BadArguments):
        replay_check(app, histories / "nothing")
