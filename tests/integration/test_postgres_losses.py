"""Connections to Postgres that are lost: nothing is lost with them, and nothing written twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import msgspec
import pytest

from pavane import App, EngineConfig, Event, Service
from pavane.core.operations import Mode
from pavane.errors import LeaseLost, StoreError
from pavane.stores.port import Commit, Conflict, Fence, InboxRow, JournalRow, RunFilter
from pavane.stores.postgres import PostgresStore, watch, writer
from pavane.stores.postgres import connection as connection_module
from pavane.stores.postgres import store as store_module
from pavane.testing.event_stores import an_event
from pavane.testing.postgres import PostgresServer
from pavane.testing.store_check import (
    SERVICES,
    a_commit,
    a_message,
    a_run,
    joined,
    whole_log,
    written,
)
from tests.integration import crew
from tests.integration.command_line import worker
from tests.integration.fleet import Fleet, start
from tests.integration.wire import ANSWERS, ASKS, BOTH, Wire
from tests.integration.world import MODES, World, in_loop, until, until_status
from tests.postgres import Database

WAYS = ["swallow", "deafen"]


async def heard(store: PostgresStore) -> None:
    """Return when wake-ups of other processes arrive."""
    while not store._watch.hears:
        await asyncio.sleep(0.02)


async def result(run: Any) -> Any:
    """Wait for a run's result, also while the database is away: then one has to ask again."""
    while True:
        try:
            return await run.result(timeout=60)
        except StoreError:
            await asyncio.sleep(0.1)


@pytest.fixture(autouse=True)
def hearing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a busy server the time to tell that it can be heard: who does not hear, never tries."""
    monkeypatch.setattr(watch, "PROBE_S", 10.0)


@asynccontextmanager
async def wired(partitions: int = 8) -> AsyncIterator[tuple[PostgresStore, Wire]]:
    """Yield a store whose connections all go over a wire."""
    with Database() as url:
        async with Wire(urlsplit(url).port or 0) as wire:
            port = f":{urlsplit(url).port}/"
            store = PostgresStore(url.replace(port, f":{wire.port}/"), partitions=partitions)
            await store.open()
            await store.register(SERVICES)
            try:
                yield store, wire
            finally:
                wire.watch = lambda piece: "pass"
                wire.held = ()
                await store.close()


def once(wire: Wire, marker: str, way: str) -> None:
    """Cut the connection that sends `marker` next, once."""

    def watch(piece: bytes) -> str:
        if marker.encode() in piece:
            wire.watch = lambda piece: "pass"
            return way
        return "pass"

    wire.watch = watch


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fenced", [True, False], ids=["under a lease", "without"])
@in_loop
async def test_a_batch_whose_answer_is_lost_takes_effect_once(way: str, fenced: bool) -> None:
    """Invariants 4, 10."""
    async with wired() as (store, wire):
        fence = await joined(store) if fenced else None
        await written(store, a_commit(messages=[a_message(store, "before#1")]), fence=fence)
        for no in range(1, 4):
            once(wire, f"marker-{no}", way)
            message = a_message(store, f"marker-{no}#1", run=f"r{no}")
            commit = a_commit(
                messages=[message], inbox=[InboxRow("shop", f"in-{no}", no)],
                runs=[a_run(store, no, f"r{no}")],
            )  # fmt: skip
            assert await written(store, commit, fence=fence) == [None]
            assert message.pos == no + 1 or not fenced, "it is told where it is"
        after = a_message(store, "after#1")
        assert await written(store, a_commit(messages=[after]), fence=fence) == [None]
        ids = [message.id for message in await whole_log(store)]
        assert ids == ["before#1", "marker-1#1", "marker-2#1", "marker-3#1", "after#1"]
        assert after.pos == 5


def a_large_commit(store: PostgresStore, id: str, size: int) -> Commit:
    message = msgspec.structs.replace(a_message(store, id), body=b"1" * size)
    return a_commit(messages=[message])


@pytest.mark.parametrize("fenced", [True, False], ids=["under a lease", "without"])
@in_loop
async def test_what_is_large_is_written_in_parts_and_in_order(fenced: bool) -> None:
    """One statement of all of it would outlast the patience of the writer, and the lease."""
    async with wired() as (store, _):
        fence = await joined(store) if fenced else None
        sizes = [1, *[1 << 20] * 12, 1, 6 << 20, 1]
        commits = [a_large_commit(store, f"m-{no}#1", size) for no, size in enumerate(sizes)]
        assert await written(store, *commits, fence=fence) == [None] * 16
        assert [m.id for m in await whole_log(store)] == [f"m-{no}#1" for no in range(16)]
        rows = await store._rows("SELECT sum(length(body)) AS it FROM pavane.log GROUP BY xmin")
        sizes = sorted(row["it"] for row in rows)
        assert sizes[-1] == 6 << 20, "what is too large by itself is alone"
        assert sizes[-2] <= writer.WRITTEN_MAX_BYTES + 1


@pytest.mark.usefixtures("impatient")
@in_loop
async def test_what_a_slow_line_carries_is_written_and_what_it_does_not_is_refused_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Invariant 11: sent again with the same patience, it went round for ever."""
    monkeypatch.setattr(writer, "ANSWER_S", 4.0)
    monkeypatch.setattr(writer, "SETTLE_S", 5.0)
    monkeypatch.setattr(writer, "CALL_S", 20.0)
    async with wired() as (store, wire):
        fence = msgspec.structs.replace(await joined(store), lease_us=1_000_000)
        of = partial(a_large_commit, store)
        assert await written(store, of("before#1", 1), fence=fence) == [None]
        wire.slow_bytes_s = 1 << 20
        assert await written(store, of("slow#1", 6 << 18), fence=fence) == [None]
        commits = of("first#1", 1), of("huge#1", 24 << 20), of("last#1", 1)
        first, refused, last = await written(store, *commits, fence=fence)
        assert (first, last) == (None, None)
        assert not isinstance(refused, (StoreError, LeaseLost)), "the session goes on"
        assert "A commit of 25.2 MB is too much for the line to postgresql://" in str(refused)
        ids = [message.id for message in await whole_log(store)]
        assert ids == ["before#1", "slow#1", "first#1", "last#1"]


@pytest.mark.usefixtures("impatient")
@in_loop
async def test_what_is_large_and_written_late_is_found_to_be_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is under way in the server when the writer gives up, and holds the lock of its number."""
    # A commit goes on without its client, and so does anything behind a pooler.
    monkeypatch.setitem(connection_module.SETTINGS, "client_connection_check_interval", "0")
    monkeypatch.setattr(writer, "SETTLE_S", 0.5)
    monkeypatch.setattr(writer, "CALL_S", 20.0)
    async with wired() as (store, _):
        fence = msgspec.structs.replace(await joined(store), lease_us=100_000)
        await store._execute(
            lambda c: c.execute(
                "CREATE FUNCTION pavane.slow() RETURNS trigger LANGUAGE plpgsql AS"
                " 'BEGIN PERFORM pg_sleep(6); RETURN NEW; END';"
                " CREATE TRIGGER slow BEFORE INSERT ON pavane.log FOR EACH ROW"
                " EXECUTE FUNCTION pavane.slow()"
            )
        )
        message = msgspec.structs.replace(a_message(store, "late#1"), body=b"1" * 100_000)
        event = msgspec.structs.replace(an_event(store, "e"), data=b"1")
        commit = a_commit(messages=[message], events=[event])
        assert await written(store, commit, fence=fence) == [None]
        assert (message.pos, event.pos) == (1, 1)
        assert await written(store, a_commit(inbox=[InboxRow("shop", "i", 1)]), fence=fence) == [
            None
        ]
        assert [message.id for message in await whole_log(store)] == ["late#1"]


@pytest.mark.parametrize("way", WAYS)
@in_loop
async def test_a_chunk_of_a_journal_whose_answer_is_lost_is_written_once(way: str) -> None:
    """Invariants 2, 10: alone in its batch, it is written by another statement."""
    async with wired() as (store, wire):
        fence = await joined(store)
        bodies = [b'["marker-0"]', b'["marker-1"]', b'["marker-2"]']
        for seq, body in enumerate(bodies):
            once(wire, f"marker-{seq}", way)
            commit = a_commit(journal=[JournalRow(1, seq, body)])
            assert await written(store, commit, fence=fence) == [None]
        (again,) = await written(store, a_commit(journal=[JournalRow(1, 2, b"[]")]), fence=fence)
        assert isinstance(again, Conflict)
        assert [row.body for row in (await store.journals([1]))[1]] == bodies


@pytest.mark.parametrize("way", WAYS)
@in_loop
async def test_a_refused_commit_is_still_refused_alone_after_a_loss(way: str) -> None:
    async with wired() as (store, wire):
        fence = await joined(store)
        await written(store, a_commit(inbox=[InboxRow("shop", "taken", 1)]), fence=fence)
        once(wire, "marker", way)
        batch = [
            a_commit(messages=[a_message(store, "marker#1")]),
            a_commit(inbox=[InboxRow("shop", "taken", 2)]),
            a_commit(messages=[a_message(store, "other#1")]),
        ]
        results = await written(store, *batch, fence=fence)
        assert [result is None for result in results] == [True, False, True]
        assert [message.id for message in await whole_log(store)] == ["marker#1", "other#1"]


@in_loop
async def test_what_comes_late_under_an_earlier_lease_leaves_the_next_alone() -> None:
    async with wired() as (store, _):
        before, fence = await joined(store), await joined(store)
        for no in range(3):
            for each in (before, fence):
                message = a_message(store, f"{each.node} {no}#1")
                assert await written(store, a_commit(messages=[message]), fence=each) == [None]
        await store.expire([row for row in await store.nodes() if row.no == before.node])
        for _ in range(2):
            (late,) = await written(store, a_commit(), fence=before)
            assert isinstance(late, LeaseLost)
            assert await written(store, a_commit(), fence=fence) == [None]
        assert len(await whole_log(store)) == 6


@pytest.mark.parametrize("with_work", [False, True], ids=["plain", "with work"])
@in_loop
async def test_nothing_follows_a_batch_that_may_be_written(
    with_work: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number may be taken, so what comes under it could be told as written, and is not."""
    monkeypatch.setattr(writer, "SETTLE_S", 0.2)

    async def work(connection: Any, state: bytes | None) -> None: ...

    async with wired() as (store, wire):
        row = await store.join("node", "host", 1, SERVICES, 200_000)
        fence = Fence(row.no, row.nonce, 200_000)

        def watch(piece: bytes) -> str:
            if (b"COMMIT" if with_work else b"first#1") in piece:
                wire.refuses = True
                return "deafen"
            return "pass"

        wire.watch = watch
        first, second = (a_commit(messages=[a_message(store, f"{n}#1")]) for n in ("first", "next"))
        first.work = work if with_work else None
        for under in (fence, None):
            commit = first if under else a_commit(messages=[a_message(store, "free#1")])
            (result,) = await written(store, commit, fence=under)
            assert isinstance(result, StoreError)
        wire.refuses = False
        once(wire, "next#1", "swallow")
        (result,) = await written(store, second, fence=fence)
        assert isinstance(result, StoreError)
        await until(partial(whole_log, store), "what the database got, and did not answer")
        assert [message.id for message in await whole_log(store)] == ["first#1"]


@in_loop
async def test_work_whose_answer_is_lost_is_not_done_again() -> None:
    """And what it wrote is told as written, with the places of what was sent."""
    async with wired() as (store, wire):
        fence = await joined(store)
        calls: list[int] = []

        async def work(connection: Any, state: bytes | None) -> None:
            calls.append(1)
            await connection.execute("CREATE TABLE IF NOT EXISTS done (no int)")
            await connection.execute("INSERT INTO done VALUES (1)")

        for no, way in enumerate(WAYS):
            once(wire, "COMMIT", way)
            sent, event = a_message(store, f"{way}#1"), an_event(store, way)
            commit = a_commit(
                inbox=[InboxRow("shop", f"work {way}", 1)], messages=[sent], events=[event]
            )
            commit.work = work
            assert await written(store, commit, fence=fence) == [None]
            assert (sent.pos, event.pos) == (2 * no + 1, no + 1)
            following = a_message(store, f"{way}#2")
            assert await written(store, a_commit(messages=[following]), fence=fence) == [None]
        assert await store._one("SELECT count(*) FROM done") == 2
        assert len(calls) == 3
        ids = [message.id for message in await whole_log(store)]
        assert ids == ["swallow#1", "swallow#2", "deafen#1", "deafen#2"]


@in_loop
async def test_work_whose_commit_is_still_under_way_is_not_done_again() -> None:
    """As one that waits for a standby: nobody sees it, and it may yet be there."""
    async with wired() as (store, wire):
        fence = await joined(store)
        url = store.dsn.replace(f":{wire.port}/", f":{wire.target}/")
        other = await asyncpg.connect(url)
        await other.execute(
            "CREATE TABLE done (no int); SELECT pg_advisory_lock(1);"
            "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END';"
            "CREATE CONSTRAINT TRIGGER waits AFTER INSERT ON done DEFERRABLE INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE FUNCTION wait()"
        )
        calls: list[int] = []
        looked = asyncio.Event()

        async def work(connection: Any, state: bytes | None) -> None:
            calls.append(1)
            await connection.execute("INSERT INTO done VALUES (1)")

        def look(piece: bytes) -> str:
            if b"pavane.write_1" in piece:
                looked.set()
            return "pass"

        def watch(piece: bytes) -> str:
            if b"COMMIT" in piece:
                wire.watch = look
                return "deafen"
            return "pass"

        wire.watch = watch
        sent = a_message(store, "sent#1")
        commit = a_commit(inbox=[InboxRow("shop", "work", 1)], messages=[sent])
        commit.work = work
        writing = asyncio.ensure_future(written(store, commit, fence=fence))
        await looked.wait()
        await other.execute("SELECT pg_advisory_unlock(1)")
        assert await writing == [None]
        assert (sent.pos, len(calls)) == (1, 1)
        assert await other.fetchval("SELECT count(*) FROM done") == 1
        await other.close()


class Rung(Event, key="bell"):
    bell: str


tower = Service("tower")
RUNG = asyncio.Event()


@tower.workflow
async def answer(bell: str) -> str:
    return bell


@tower.on(Rung, transaction=True)
async def ring(event: Rung, connection: Any) -> None:
    await connection.execute("INSERT INTO rung VALUES ($1)", event.bell)
    await answer.start(event.bell)
    RUNG.set()


@in_loop
async def test_what_a_handler_starts_begins_though_the_answer_to_its_commit_is_lost() -> None:
    RUNG.clear()
    with Database() as url:
        async with Wire(urlsplit(url).port or 0) as wire:

            def watch(piece: bytes) -> str:
                if RUNG.is_set() and b"COMMIT" in piece:
                    wire.watch = lambda piece: "pass"
                    return "deafen"
                return "pass"

            wire.watch = watch
            store = url.replace(f":{wire.target}/", f":{wire.port}/")
            async with App("tower", [tower], store=store).worker() as worker:
                other = await asyncpg.connect(url)
                await other.execute("CREATE TABLE rung (bell text)")
                await worker.publish(Rung(bell="noon"))

                async def answered() -> bool:
                    runs = await worker.store.list_runs(RunFilter(status=("completed",)))
                    return len(runs) == 1

                await until(answered)
                assert await other.fetchval("SELECT count(*) FROM rung") == 1
                await other.close()


@in_loop
async def test_the_server_ends_transactions_of_a_frozen_process_also_behind_a_pooler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection_module, "SETTINGS", {})  # as a pooler that takes none
    seen: list[str] = []

    async def look(connection: Any, state: bytes | None = None) -> None:
        seen.append(await connection.fetchval("SHOW idle_in_transaction_session_timeout"))

    async with wired() as (store, _):
        commit = a_commit()
        commit.work = look
        assert await written(store, commit, fence=await joined(store)) == [None]
        await store._execute(look)
        assert seen == ["10s", "10s"]
        assert await store._one("SHOW idle_in_transaction_session_timeout") == "0"


@in_loop
async def test_reads_and_waits_go_on_over_a_cut() -> None:
    async with wired() as (store, wire):
        for _ in range(3):
            wire.cut()
            assert await store.log_head() == 0
            assert await store.take_run_numbers(1) > 0


LOST = [ASKS], [ANSWERS], BOTH


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give connections up as dead sooner, to save time."""
    for module in (writer, store_module, watch):
        monkeypatch.setattr(module, "QUICK_S", 1.0)
    monkeypatch.setattr(writer, "CALL_S", 1.0)
    monkeypatch.setattr(store_module, "READ_S", 10.0)
    monkeypatch.setattr(store_module, "ANSWER_S", 4.0)
    monkeypatch.setattr(watch, "HEARTBEAT_S", 1.0)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("lost", LOST, ids="-".join)
@in_loop
async def test_half_open_connections_are_given_up_and_all_goes_on(lost: Sequence[str]) -> None:
    """Nothing resets them, ever: whoever waits for an answer must stop waiting."""
    async with wired() as (store, wire):
        fence = await joined(store)
        no = await store.take_run_numbers(1)
        await written(store, a_commit(messages=[a_message(store, "before#1")]), fence=fence)
        async with asyncio.timeout(60):
            wire.lose(lost)
            assert await store.events_head() == 0
            assert await store.log_head() == 1
            wire.lose(lost)
            assert await store.nodes(), "a slow read has a second chance, too"
            assert await asyncio.to_thread(store.renew, fence)
            # The lease holds, and so does the session: what it writes is written, once.
            commit = a_commit(messages=[a_message(store, "once#1")])
            assert await written(store, commit, fence=fence) == [None]
        async with asyncio.timeout(60):
            wire.lose(lost)
            assert await store.take_run_numbers(1) > no
        assert [message.id for message in await whole_log(store)] == ["before#1", "once#1"]


@pytest.mark.usefixtures("impatient")
@in_loop
async def test_a_read_that_is_not_answered_is_soon_asked_anew_and_a_long_one_gets_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store_module, "ANSWER_S", 60.0)
    async with wired() as (store, wire):
        assert await store.nodes() == []
        wire.lose(BOTH)
        async with asyncio.timeout(60):
            assert await store.nodes() == []
        assert len(await store._rows("SELECT pg_sleep(1.2)")) == 1


@pytest.mark.usefixtures("impatient")
@in_loop
async def test_who_was_hung_up_on_waits_for_no_lock_and_is_told_who_has_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each question that was asked again was one more session, until the server took no more."""
    with Database() as url:
        store = PostgresStore(url, partitions=8)
        await store.open()
        other: Any = await asyncpg.connect(url, server_settings={"application_name": "vacuum"})
        async with other.transaction():
            await other.execute("LOCK TABLE pavane.nodes, pavane.services")
            with pytest.raises(StoreError, match="a lock that another session holds") as refusal:
                await store.nodes()
            who = f"pid {other.get_server_pid()}, user 'postgres', application 'vacuum'"
            assert who in str(refusal.value)
            assert "again: it did not answer within 1 s" in caplog.text, "before half a minute"

            async def nobody_waits() -> bool:
                waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                return await other.fetchval(waiting) == 0

            await until(nobody_waits)
        await other.close()
        assert await store.nodes() == []
        await store.close()


@in_loop
async def test_a_connection_that_cannot_be_made_is_not_blamed_on_what_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A certificate that is not there, or not good, any more says nothing of a value."""
    async with wired() as (store, wire):
        fence = await joined(store)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("PGSSLMODE", "verify-full")
        wire.cut()
        commit = a_commit(messages=[a_message(store, "once#1")])
        (refusal,) = await written(store, commit, fence=fence)
        assert isinstance(refusal, StoreError), refusal
        assert "root certificate file" in str(refusal)
        monkeypatch.delenv("PGSSLMODE")
        assert await store.log_head() == 0


@in_loop
async def test_those_who_read_ask_ever_less_often_while_the_database_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hundreds may wait for results, and each connection costs a database that is just starting."""
    tried = 0

    async def counted(*given: Any) -> Any:
        nonlocal tried
        tried += 1
        return await connection_module.connect(*given)

    monkeypatch.setattr(store_module, "READ_S", 4.0)
    async with wired() as (store, wire):
        monkeypatch.setattr(store_module, "connect", counted)
        wire.refuses = True
        wire.cut()
        asking = [store._rows(f"SELECT {number}") for number in range(8)]
        refused = await asyncio.gather(*asking, return_exceptions=True)
        assert all(isinstance(error, StoreError) for error in refused)
        assert tried <= 8 * 14, "in four seconds; it was once in 0.175 s"
        wire.refuses = False


@in_loop
async def test_connections_that_read_are_left_to_others_when_they_are_not_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a crowd of readers each client kept six, and clients that started then found none."""
    monkeypatch.setattr(store_module, "READER_IDLE_S", 0.2)
    async with wired() as (store, wire):
        await heard(store)
        other = await asyncpg.connect(store.dsn.replace(f":{wire.port}/", f":{wire.target}/"))
        sql = (
            "SELECT count(*) AS it FROM pg_stat_activity WHERE datname = current_database()"
            f" AND pid <> {other.get_server_pid()}"
        )
        await other.execute("SELECT pg_advisory_lock(1)")
        waiting = "SELECT pg_advisory_xact_lock_shared(1)"
        crowd = asyncio.gather(*(store._rows(waiting) for _ in range(8)))

        async def are_there() -> bool:
            return await other.fetchval(sql) == 6

        await until(are_there, "four that read, one that writes, one that listens")
        await other.execute("SELECT pg_advisory_unlock(1)")
        await crowd

        async def left() -> bool:
            await asyncio.sleep(0.4)
            return (await store._rows(sql))[0]["it"] == 3

        await until(left, "one that reads, one that writes, one that listens")
        await other.close()


@in_loop
async def test_what_is_soon_done_does_not_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands, one of sixty, showed an error of the connection that they gave up half-made."""
    listening = 0

    async def counted(*given: Any) -> Any:
        nonlocal listening
        listening += 1
        return await connection_module.connect(*given)

    monkeypatch.setattr(watch, "connect", counted)
    monkeypatch.setattr(watch, "LISTEN_AFTER_S", 5.0)
    async with wired() as (store, _):
        assert await store.nodes() == []
    assert listening == 0


@pytest.mark.usefixtures("impatient")
@in_loop
async def test_a_process_listens_again_when_it_was_deaf() -> None:
    async with wired() as (store, wire):
        await heard(store)
        before = store._watch._listening
        wire.lose(BOTH)
        async with asyncio.timeout(60):
            while store._watch._listening is before:
                await asyncio.sleep(0.05)
            await heard(store)


@in_loop
async def test_who_heard_nothing_of_its_probe_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The database may have been slow: it need not be a pooler that no notification passes."""
    monkeypatch.setattr(watch, "PROBE_S", 0)
    monkeypatch.setattr(watch, "DEAF_S", 0.2)
    async with wired() as (store, _):
        assert not await store._watch.probed()
        monkeypatch.setattr(watch, "PROBE_S", 30.0)
        await heard(store)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("marker", ["server_version_num", "pavane.heads"])
@in_loop
async def test_opening_anew_does_not_hang_on_a_connection_that_goes_silent(marker: str) -> None:
    async with wired() as (store, wire):
        once(wire, marker, "lose")
        async with asyncio.timeout(60):
            try:
                await store.reopen()
            except StoreError:
                await store.reopen()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("marker", ["pavane.write_1", "LISTEN"])
@in_loop
async def test_new_connections_that_go_silent_are_given_up(marker: str) -> None:
    async with wired() as (store, wire):
        fence = await joined(store)
        once(wire, marker, "lose")
        wire.cut()
        async with asyncio.timeout(60):
            commit = a_commit(messages=[a_message(store, "once#1")])
            assert await written(store, commit, fence=fence) == [None]
            await heard(store)


@pytest.mark.parametrize("sends", [True, False], ids=["a message", "nothing"])
@in_loop
async def test_a_zombie_behind_a_dead_wire_writes_nothing_once_it_is_back(sends: bool) -> None:
    """Invariant 2."""
    async with wired() as (store, wire):
        other = PostgresStore(store.dsn.replace(f":{wire.port}/", f":{wire.target}/"))
        await other.open()
        await other.register(SERVICES)
        row = await store.join("node", "host", 1, SERVICES, 300_000)
        fence = Fence(row.no, row.nonce, 300_000)
        wire.held = BOTH
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        late = a_commit(journal=[JournalRow(1, 0, b"[1]")])
        if sends:
            late.messages = [a_message(store, "late#1")]
        store.submit([late], fence, future.set_result)
        await asyncio.sleep(0.5)
        assert other.now_us() > row.expires_us
        await other.expire(await other.nodes())
        wire.held = ()
        (result,) = await future
        assert isinstance(result, LeaseLost)
        assert await whole_log(other) == []
        assert await other.journals([1]) == {1: []}
        await other.close()


@in_loop
async def test_runs_go_on_after_a_restart_of_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariants 1, 4, 10."""
    monkeypatch.setattr(crew, "RECORD", tmp_path / "record.txt")
    with PostgresServer() as server:
        url = server.create_database("restarted")
        app_services = (crew.deck, crew.galley)
        monkeypatch.delitem(crew.galley.steps, "sink_in_transaction")  # it is for SQLite
        world = World(url, "choreography", "one node")
        async with world.working(*app_services, lease_s=2.0) as director:
            runs = [await director.start(crew.steady, 6, 0.05) for _ in range(10)]
            asleep = await director.start(crew.naps, 4.0)
            await until_status(asleep, "waiting", reason="timer")
            await asyncio.to_thread(server.restart)
            await asyncio.sleep(0.3)
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
            for run in [*runs, asleep]:
                assert await result(run) == (1 if run is asleep else 30)


@in_loop
async def test_nodes_take_nothing_from_each_other_when_the_database_was_away_for_all() -> None:
    lease_s = 3.0  # which no pause of the machine should end but the one of the database
    with PostgresServer() as server:
        app = App("world", [crew.deck], store=server.create_database("away"))
        app.config = EngineConfig(lease_s=lease_s)
        async with app.worker() as one, app.worker() as other:
            nodes = await one.store.nodes()
            assert len(nodes) == 2
            await asyncio.to_thread(server.kill)
            await asyncio.sleep(1.5 * lease_s)
            await asyncio.to_thread(server.start)
            for _ in range(8):  # whoever comes back first finds the other's lease over
                await asyncio.sleep(lease_s / 4)
                assert [node.no for node in await other.store.nodes()] == [n.no for n in nodes]
            for client in (one, other):
                assert client.node is not None
                assert client.node.session is not None
                assert client.node.session.open


@in_loop
async def test_a_store_that_is_closed_while_it_loses_its_connection_is_closed() -> None:
    """The loss and the closing may come in any order, also in one round of the loop."""
    with Database() as url:
        for rounds in range(8):
            store = PostgresStore(url, partitions=8)
            await store.open()
            await heard(store)
            connection = store._watch._listening
            assert connection is not None
            connection.terminate()
            for _ in range(rounds):
                await asyncio.sleep(0)
            async with asyncio.timeout(60):
                await store.close()


@in_loop
async def test_what_is_written_last_is_announced_before_a_store_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A node that drains hands over at once: the others need not find by looking that it left."""
    monkeypatch.setattr(watch, "ANNOUNCE_EVERY_S", 60.0)  # that it knows services is told first
    with Database() as url:
        one, two = PostgresStore(url, partitions=8), PostgresStore(url, partitions=8)
        for store in (one, two):
            await store.open()
            await store.register(SERVICES)
        await heard(two)
        while two.changed():
            await asyncio.sleep(0.05)
        two._watch._look_at = float("inf")  # it does not look

        async def told() -> bool:
            return two.changed()

        await written(one, a_commit(messages=[a_message(one, "last#1")]))
        await one.close()
        await until(told)
        await two.close()


def test_a_worker_that_is_to_end_while_the_database_is_away_ends(tmp_path: Path) -> None:
    """What starts it again would kill it, some time, and not know why it did not end."""
    (tmp_path / "shop.py").write_text(
        "import pavane.cli.run\n"
        "from pavane import App, EngineConfig, Service\n"
        "pavane.cli.run.GIVE_UP_S = 0.5\n"
        "app = App('shop', [Service('shop')], config=EngineConfig(grace_s=0.5))\n"
    )
    with PostgresServer() as server:
        working = worker(tmp_path, "shop.py", "--store", server.url())
        server.kill()
        working.terminate()
        _, said = working.communicate(timeout=10)
    assert working.returncode == 4
    assert "not drained within 1 s: others take over when the lease is over" in said


@pytest.mark.parametrize("mode", MODES)
@in_loop
async def test_runs_go_on_after_a_failover_to_a_standby(
    mode: Mode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Invariants 1, 4, 9: with synchronous replication nothing that was acknowledged is lost."""
    monkeypatch.setattr(crew, "RECORD", tmp_path / "record.txt")
    with PostgresServer() as primary, ExitStack() as stack:
        primary.create_database("crew")
        with primary.follower() as standby:
            primary.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            primary.execute("SELECT pg_reload_conf()")

            async def follows() -> bool:
                states = "SELECT sync_state FROM pg_stat_replication"
                return await asyncio.to_thread(primary.execute, states) == "sync"

            await until(follows)
            hosts = f"127.0.0.1:{primary.port},127.0.0.1:{standby.port}"
            fleet = Fleet(tmp_path, f"postgresql://postgres@{hosts}/crew")
            stack.callback(fleet.sink)
            fleet.launch(lease_s=3.0)
            async with crew.app_on(fleet.store, 3.0).connect() as client:
                runs = [await start(client, crew.steady, 20, 0.05, mode=mode) for _ in range(20)]

                async def under_way() -> bool:
                    return len(crew.recorded()) > 100

                await until(under_way)
                await asyncio.to_thread(primary.kill)
                await asyncio.to_thread(standby.execute, "SELECT pg_promote()")
                assert [await result(run) for run in runs] == [380] * 20
                assert crew.most_executions() <= 2
                for run in runs:
                    entries = (await run.history()).entries
                    done = [entry.op for entry in entries if entry.what == "done"]
                    assert len(done) == len(set(done)) == 40
                assert await client.restored.lost() is None
