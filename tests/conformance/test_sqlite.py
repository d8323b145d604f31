"""The SQLite store where files, disks and processes misbehave; what it says then can be read."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from pavane import App, config
from pavane.errors import StoreError
from pavane.stores.eventlog import ConversationFilter, DeadFilter, EventFilter, HandlerSpec
from pavane.stores.port import LAST_US, Message
from pavane.stores.sqlite import SqliteStore
from pavane.testing.event_stores import (
    a_dead_letter,
    an_event,
    ids_in_log,
    published,
    react,
    registered,
)
from pavane.testing.store_check import SERVICES, joined, whole_log, written
from tests.conformance.sqlite_process import numbered
from tests.tidy.source_tree import ROOT, SOURCE

PROGRAM = Path(__file__).with_name("sqlite_process.py")
KILLS = 12
DEADLINE_S = 60


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@contextmanager
def process(duty: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a duty of `sqlite_process.py`; kill it in the end, if it is still there."""
    with subprocess.Popen(
        [sys.executable, str(PROGRAM), duty, str(path)],
        env=os.environ | {"PYTHONPATH": f"{SOURCE}{os.pathsep}{ROOT}"},
        stdout=subprocess.PIPE,
        text=True,
    ) as started:
        try:
            yield started
        finally:
            started.kill()


def told(duty: str, path: Path) -> list[str]:
    """Run a duty to its end; return the lines it printed."""
    with process(duty, path) as started:
        printed, _ = started.communicate(timeout=DEADLINE_S)
    assert started.returncode == 0
    return printed.splitlines()


async def open_store(path: Path) -> SqliteStore:
    store = SqliteStore(path)
    await store.open()
    await store.register(SERVICES)
    return store


def make_store(path: Path) -> None:
    """Leave a store there with some commits in it."""

    async def make() -> None:
        store = await open_store(path)
        await written(store, *[numbered(store, 1, at, 3000) for at in range(50)])
        await store.close()

    asyncio.run(make())


def refused(path: Path) -> str:
    """Open what must not be opened; return what the user is told, without the path."""
    with pytest.raises(StoreError) as caught:
        asyncio.run(SqliteStore(path).open())
    return str(caught.value).replace(str(path), "FILE")


def integrity(path: Path) -> str:
    connection = sqlite3.connect(path)
    try:
        return connection.execute("PRAGMA integrity_check").fetchone()[0]
    finally:
        connection.close()


# -- files that are no stores ------------------------------------------------------------------


@pytest.mark.parametrize("mark", [0, 7])
def test_a_file_of_another_program_is_left_as_it_was(path: Path, mark: int) -> None:
    connection = sqlite3.connect(path)
    connection.executescript(f"CREATE TABLE mine (a); PRAGMA application_id = {mark}")
    connection.close()
    before = path.read_bytes()
    assert refused(path) == (
        "FILE is an SQLite file of another program. Choose another path; nothing was changed."
    )
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_store_without_the_number_of_its_schema_is_left_as_it_was(path: Path) -> None:
    make_store(path)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 0")
    connection.close()
    before = path.read_bytes()
    assert refused(path).startswith("FILE has tables, but not the number of their schema")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("shop.db", "shop.db"),
        ("/srv/shop.db", "/srv/shop.db"),
        ("sqlite:///shop.db", "shop.db"),
        ("sqlite:////srv/shop.db", "/srv/shop.db"),
    ],
)
def test_an_address_of_three_slashes_is_in_this_directory(address: str, place: str) -> None:
    store = config.make_store(address)
    assert isinstance(store, SqliteStore)
    assert store.path == Path(place).absolute()


@pytest.mark.parametrize("address", ["", "mysql://x", "sqlite://", "http://shop.db"])
def test_an_app_refuses_an_address_of_no_store_where_it_is_declared(address: str) -> None:
    with pytest.raises(StoreError, match=f"^'{address}' is no store that this version knows"):
        App("shop", [], store=address)


def test_a_store_of_a_newer_pavane_is_left_as_it_was(path: Path) -> None:
    make_store(path)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = path.read_bytes()
    assert re.fullmatch(
        r"FILE was written by a newer Pavane \(schema 99, this one knows \d+\)\. Upgrade Pavane "
        r"here; nothing was changed\.",
        refused(path),
    )
    assert path.read_bytes() == before


def test_what_is_no_database_is_refused(path: Path) -> None:
    path.write_text("Dear diary, " * 1000)
    assert refused(path) == "FILE is not an SQLite file. Choose another path."
    assert path.read_text() == "Dear diary, " * 1000


def test_a_directory_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path) == "FILE is a directory. Name a file in it."


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    path = tmp_path / "no" / "store.db"
    assert refused(path) == (f"FILE cannot be created: the directory {path.parent} does not exist.")
    assert not path.parent.exists()


def test_an_empty_file_becomes_a_store(path: Path) -> None:
    path.touch()
    make_store(path)
    assert integrity(path) == "ok"


# -- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [110, 4096])
def test_a_damaged_file_is_refused_at_opening(path: Path, begin: int) -> None:
    make_store(path)
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(b"\xa5" * (path.stat().st_size - begin))
    text = refused(path)
    assert text.startswith("FILE is damaged (")
    assert text.endswith("Restore it from a backup.")


def test_a_truncated_file_is_refused_at_opening(path: Path) -> None:
    make_store(path)
    os.truncate(path, 5000)
    assert refused(path).startswith("FILE is damaged (")


def test_damage_found_later_refuses_what_touches_it_and_says_so(path: Path) -> None:
    make_store(path)
    journal = sqlite3.connect(path).execute(
        "SELECT rootpage FROM sqlite_schema WHERE name = 'journal_by_run'"
    )
    (page,) = journal.fetchone()
    journal.connection.close()
    with path.open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xa5" * 4096)

    async def use() -> None:
        store = await open_store(path)
        with pytest.raises(StoreError, match=r"is damaged \(.*\)\. Restore it from a backup\."):
            await store.journals([1])
        results = await written(store, *[numbered(store, 2, at) for at in range(3)])
        assert {type(result) for result in results} == {StoreError}
        assert "is damaged" in str(results[0])
        assert await store.run_row("shop", "r") is None, "the rest can be read"
        await store.close()

    asyncio.run(use())


# -- permissions and full disks ----------------------------------------------------------------

READ_ONLY = "FILE is read-only for this process. Make it and its directory writable."
NOT_OPENED = (
    "FILE cannot be opened or created. This process must be allowed to write it and its directory."
)
LINUX_ONLY = pytest.mark.skipif(sys.platform != "linux", reason="uses limits of Linux")


@LINUX_ONLY
@pytest.mark.parametrize(
    ("file_mode", "directory_mode", "text"),
    [
        (0o444, 0o755, READ_ONLY),
        (0o444, 0o555, READ_ONLY),
        (0o644, 0o555, READ_ONLY),
        (0o000, 0o755, NOT_OPENED),
        (None, 0o555, NOT_OPENED),
        (0o644, 0o755, "opened"),
    ],
)
def test_missing_rights_are_explained(
    tmp_path: Path, file_mode: int | None, directory_mode: int, text: str
) -> None:
    directory = tmp_path / "place"
    directory.mkdir()
    path = directory / "store.db"
    if file_mode is not None:
        make_store(path)
        path.chmod(file_mode)
    directory.chmod(directory_mode)
    try:
        assert [line.replace(str(path), "FILE") for line in told("opening", path)] == [text]
    finally:
        directory.chmod(0o755)


@LINUX_ONLY
def test_a_full_disk_loses_nothing_and_is_survived(path: Path) -> None:
    refusal, again, counts, after_room, complete = told("filling", path)
    assert re.fullmatch(
        r"True .*store\.db( is full| failed \(.*\))\. Nothing of the refused writes was kept; .+\.",
        refusal,
    )
    assert again == "True"
    acknowledged, kept = counts.split()
    assert int(acknowledged) > 5
    assert kept == acknowledged
    assert after_room == "[None]"
    assert complete == "True"
    assert integrity(path) == "ok"


# -- processes ---------------------------------------------------------------------------------


def test_a_forked_child_is_refused_and_its_parent_goes_on(path: Path) -> None:
    *child, parent = told("forking", path)
    refusal = f"{path} was opened by another process; open it again after a fork."
    assert child == [refusal] * 6
    assert parent == "[None] True"


def test_a_store_is_opened_once_at_a_time(path: Path) -> None:
    async def twice() -> None:
        store = await open_store(path)
        with pytest.raises(StoreError, match=r"is open already\. Give each client a store of its"):
            await store.open()
        assert await written(store, numbered(store, 1, 0)) == [None]
        await store.close()
        await store.open()
        assert len(await whole_log(store)) == 1
        assert store.changed()
        await store.close()
        await store.close()

    asyncio.run(twice())


def test_many_processes_may_create_one_store_at_once(path: Path) -> None:
    for attempt in range(3):
        with ExitStack() as stack:
            fresh = path.with_name(f"{attempt}.db")
            racing = [stack.enter_context(process("opening", fresh)) for _ in range(3)]
            assert [started.communicate()[0] for started in racing] == ["opened\n"] * 3


def test_what_was_acknowledged_survives_kill_9(path: Path) -> None:
    chance = random.Random()
    acknowledged: dict[int, int] = {}
    for kills in range(5 * KILLS):  # more than so many if the machine is slow
        if kills >= KILLS and any(acknowledged.values()):
            break
        with process("writing", path) as victim:
            assert victim.stdout is not None
            run = int(victim.stdout.readline().split()[1])
            acknowledged[run] = 0
            # Real time: the moment must not depend on anything that the victim does.
            time.sleep(chance.uniform(0.0, 0.08))
            victim.send_signal(signal.SIGKILL)
            for line in victim.stdout:
                if line.endswith("\n"):
                    acknowledged[run] = int(line)
    assert integrity(path) == "ok"
    asyncio.run(_check_acknowledged(path, acknowledged))
    assert any(acknowledged.values())


async def _check_acknowledged(path: Path, acknowledged: dict[int, int]) -> None:
    store = await open_store(path)
    log = await whole_log(store)
    assert [m.pos for m in log] == list(range(1, len(log) + 1))
    for run, count in acknowledged.items():
        numbers = [row.seq for row in (await store.journals([run]))[run]]
        assert numbers == list(range(len(numbers))), "no gap"
        assert len(numbers) >= count, "every acknowledged commit is there"
        assert len(numbers) <= count + 31, "at most the last batch was not acknowledged"
        ids = [f"r{run}#{number}" for number in numbers]
        assert [m.id for m in log if m.run == f"r{run}"] == ids, "a commit is whole"
        assert await store.seen("shop", ids) == set(ids)
    await store.close()


def test_a_stopped_process_that_wakes_up_writes_nothing_more(path: Path) -> None:
    async def take_over() -> None:
        store = await open_store(path)
        fence = await joined(store)
        with process("holding", path) as zombie:
            assert zombie.stdout is not None
            node = int(zombie.stdout.readline())
            zombie.send_signal(signal.SIGSTOP)
            await _beside(zombie, _expire(store, node))
            before = await _state(store)
            commit = numbered(store, 2, 0)
            assert await _beside(zombie, written(store, commit, fence=fence)) == [None]
            zombie.send_signal(signal.SIGCONT)
            printed, _ = await asyncio.to_thread(zombie.communicate, timeout=DEADLINE_S)
            log, journal = before
            assert printed.split() == [str(len(journal)), "False", "{'LeaseLost'}"]
            now_log, now_journal = await _state(store)
            assert now_journal == journal
            assert [m.id for m in now_log] == [*(m.id for m in log), "r2#0"]
        await store.close()

    asyncio.run(take_over())


async def _beside(zombie: subprocess.Popen[str], work: Coroutine[Any, Any, Any]) -> Any:
    """Do something while a process is stopped, now and then for a moment only.

    It may hold the writer's lock just now, which nobody can take away while it lives.
    """
    working = asyncio.ensure_future(work)
    while not (await asyncio.wait([working], timeout=0.15))[0]:
        zombie.send_signal(signal.SIGCONT)
        await asyncio.sleep(0.001)
        zombie.send_signal(signal.SIGSTOP)
    return await working


async def _expire(store: SqliteStore, node: int) -> None:
    """Take a node over, however often its batches prolong its lease meanwhile."""
    while gone := [row for row in await store.nodes() if row.no == node]:
        await store.expire(gone)


async def _state(store: SqliteStore) -> tuple[list[Message], list[Any]]:
    return await whole_log(store), (await store.journals([1]))[1]


def test_an_odd_error_in_one_commit_does_not_stop_the_writer(path: Path) -> None:
    async def use() -> None:
        store = await open_store(path)
        batch = [numbered(store, 1, at) for at in range(20)]
        batch[7].journal[0].body = None
        results = await asyncio.wait_for(written(store, *batch), DEADLINE_S)
        assert [at for at, result in enumerate(results) if result is not None] == [7]
        assert "cannot be stored" in str(results[7])
        batch = [numbered(store, 2, at) for at in range(20)]
        assert not any(await asyncio.wait_for(written(store, *batch), DEADLINE_S))
        await store.close()

    asyncio.run(use())


# -- large logs --------------------------------------------------------------------------------

GROWING = "events|marks|states|shadows|awaits|kept_events|members|conversations|runs|log"


def test_no_question_about_events_reads_a_whole_table(path: Path) -> None:
    asked: dict[str, Any] = {}

    def note(cursor: Any, sql: str, bindings: Any) -> bool:
        asked[sql] = bindings
        return True

    async def ask() -> list[str]:
        store = await open_store(path)
        (no,) = await registered(store, "h")
        await published(store, an_event(store, "e"))
        store._read_from.exec_trace = store._write_to.exec_trace = note
        await ask_everything(store, no)
        store._read_from.exec_trace = store._write_to.exec_trace = None
        plans = [
            f"{line}: {sql}"
            for sql, bindings in asked.items()
            if re.match(r"(--.*\n)*(SELECT|DELETE)", sql)
            for _, _, _, line in store._read_from.execute(f"EXPLAIN QUERY PLAN {sql}", bindings)
        ]
        await store.close()
        return plans

    plans = asyncio.run(ask())
    assert len(asked) > 50
    # Conversations are listed from the newest on, which ends at a limit.
    scans = [it for it in plans if re.match(rf"SCAN ({GROWING})\b(?! USING INDEX convers)", it)]
    assert not scans, "\n".join(scans)
    sorts = [it for it in plans if it.startswith("USE TEMP B-TREE FOR ORDER BY") and "LIMIT" in it]
    # What is sorted is few: dead letters, open conversations, those of one id.
    assert [
        it for it in sorts if not re.search(r"dead_letters|conversations_due|\bid = ", it)
    ] == []


async def ask_everything(store: SqliteStore, no: int) -> None:
    """Ask all that can be asked about events, with every filter, and prune."""
    for types, slots in ((None, None), (["Placed"], [1])):
        await store.read_events(0, LAST_US, 9, types, slots)
    for which in (
        {}, {"key": "k"}, {"source": "s"}, {"conversation": "c"}, {"cause": "c"}, {"before": 9},
        {"types": ("Placed",)}, {"since_us": 9}, {"key": "k", "conversation": "c"},
    ):  # fmt: skip
        await store.find_events(EventFilter(**which))
    for which in (
        {}, {"handlers": (no,)}, {"type": "T"}, {"key": "k"}, {"cause": "c"}, {"numbers": (1,)},
        {"slots": (1,)}, {"holding": True}, {"positions": (1,)},
        {"handlers": (no,), "slots": (1,), "holding": True}, {"handlers": (no,), "key": "k"},
    ):  # fmt: skip
        await store.dead_letters(DeadFilter(**which))
        await store.dead_counts(DeadFilter(**which))
    for state in ("any", "open", "overdue", "ended", "twice"):
        for which in ({}, {"contract": "c"}, {"id": "i"}, {"key": "k"}):
            await store.conversations(ConversationFilter(state=state, **which))
    await store.register_handlers([HandlerSpec("shop", "late", ("Placed",), 5)])
    for question in (
        store.events_head(), store.event("e"), store.events_at([1]), store.event_types(),
        store.handler_rows(), store.cursors(no), store.backlog(no), store.marks(no, 0, 9),
        store.marks_at([1]), store.parked_events(no, [1], 0, 9),
        store.parked_events(no, [1], 0, 9, "k"), store.parked_at([1]), store.parked_count(no),
        store.state("shop", "s", "k"), store.shadows(no, 9), store.awaits("shop", "Paid", "k"),
        store.awaits_of("r"), store.kept_events("shop", "Paid", "k"),
        store.conversation("c", "i"), store.runs_in("c"), store.prune_events(9, 9),
    ):  # fmt: skip
        await question


def test_pruning_gets_past_what_is_held_for_long(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pavane.stores.sqlite.events.SCAN_MAX", 10)

    async def prune() -> None:
        store = await open_store(path)
        events = await published(store, *(an_event(store, f"e{n}") for n in range(40)))
        await react(store, dead=[a_dead_letter(1, event) for event in events[:25]])
        pruned = [await store.prune_events(LAST_US, 4) for _ in range(8)]
        assert pruned == [0, 0, 4, 1 + 3, 4, 3, 0, 0]
        assert await ids_in_log(store) == [event.id for event in events[:25]]
        await react(store, undead=[1])
        assert sum([await store.prune_events(LAST_US, 4) for _ in range(4)]) == 1
        await store.close()

    asyncio.run(prune())
