"""A backup that is put back while the world has gone on: refused, listed, and accepted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pavane import App, Client, EngineConfig, Event, Run, Service, receive, step_info
from pavane.errors import BadArguments, LeaseLost, StoreError
from pavane.steering.restored import Restored
from pavane.stores.memory import MemoryStore
from pavane.stores.postgres import PostgresStore, past
from pavane.testing.postgres import PostgresServer
from pavane.testing.store_check import SERVICES, a_commit, a_run, joined, written
from tests.integration.command_line import pavane
from tests.integration.world import in_loop, rows, until, until_status
from tests.postgres import Database, server

bank = Service("bank")
PAID: list[tuple[str, str]] = []
LEASE_S = 1.0


class Go(Event):
    pass


@bank.step
async def pay(what: str) -> str:
    PAID.append((what, step_info().idempotency_key))
    return what


@bank.workflow(receives=[Go])
async def in_parts() -> list[str]:
    first = await pay("first")
    await receive(Go)
    return [first, await pay("second")]


teller = Service("teller")


@teller.workflow
async def count() -> None: ...


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    PAID.clear()
    monkeypatch.setattr(past, "BEAT_S", 0.05)
    monkeypatch.setenv("PAVANE_STATE", str(tmp_path / "state"))


@pytest.fixture
def postgres() -> Iterator[PostgresServer]:
    """A server of its own, since all of it is put back."""
    with PostgresServer() as own:
        yield own


def app_on(url: str) -> App:
    return App("bank", [bank], store=url, config=EngineConfig(lease_s=LEASE_S))


def app_with_schedule(url: str) -> App:
    app = app_on(url)
    app.schedule("0 0 1 1 *", in_parts, name="yearly")
    return app


def make_anew(url: str) -> None:
    """Let another database, a blank one, be at the address."""
    name = url.rpartition("/")[2]
    server().drop_database(name)
    server().create_database(name)


async def looked_at(url: str) -> dict[str, Any]:
    """Return what the doctor finds, who fails for it, by what was checked."""
    told = await asyncio.to_thread(pavane, "doctor", "--store", url, "-o", "json")
    found = {finding["check"]: finding for finding in json.loads(told.stdout)}
    assert (told.exit_code, found["restored"]["level"]) == (1, "fail")
    return found


async def gone_on_after_a_backup(client: Client, postgres: PostgresServer) -> None:
    """Have a run finish whose first half is in the backup only."""
    run = await client.start(in_parts, id="before")
    await until_status(run, "waiting")
    await asyncio.to_thread(postgres.back_up, "monday")
    since_us = await client.store._one("SELECT pavane.clock_us()")  # pyright: ignore

    async def is_noted() -> bool:
        """Tell whether a beat that is not in the backup is noted on this machine."""
        noted = client.store.past.noted()  # pyright: ignore
        return noted is not None and noted.beaten_us > since_us

    await until(is_noted, "a beat")
    await run.send(Go())
    assert await run.result(timeout=30) == ["first", "second"]


async def work_once(app: App) -> None:
    """Work until there is a run that waits."""
    async with app.worker() as client:
        run = await client.start(in_parts, id="here")
        await until_status(run, "waiting")


async def in_vain(app: App) -> str:
    """Return why nobody may work there."""
    with pytest.raises(StoreError) as refusal:
        async with app.worker():
            pass
    return str(refusal.value)


@in_loop
async def test_a_backup_that_was_put_back_is_refused_listed_and_accepted(
    postgres: PostgresServer,
) -> None:
    """What was done since is done again under the same keys, and not before a person says so."""
    app = app_on(postgres.create_database("bank"))
    async with app.worker() as client:
        await gone_on_after_a_backup(client, postgres)
        late = await client.start(in_parts, id="since")
        await until_status(late, "waiting")
    first, second, _ = PAID
    await asyncio.to_thread(postgres.put_back, "monday")
    await asyncio.sleep(LEASE_S)  # that of the node which is in the backup

    assert "was put back: it knows nothing of what was done after" in await in_vain(app)
    assert "pavane restored --accept" in await in_vain(app)
    found = await looked_at(app.address)
    assert "refuses workers, since it was put back" in found["restored"]["text"]
    assert found["nodes"]["remedy"].startswith("When workers are let in again, start one: ")
    listed = await asyncio.to_thread(pavane, "restored", "--store", app.address)
    assert listed.exit_code == 1
    assert "before  in_parts  waiting  bank" in listed.stdout
    assert "since" not in listed.stdout.replace("since then", "")
    assert "1 run had not ended" in listed.stderr
    told = await asyncio.to_thread(pavane, "restored", "--store", app.address, "-o", "json")
    found = json.loads(told.stdout)
    assert [one["id"] for one in found["runs"]] == ["before"]
    assert 0 < found["lost"]["from_us"] < found["lost"]["until_us"]
    accepted = await asyncio.to_thread(pavane, "restored", "--store", app.address, "--accept")
    assert accepted.exit_code == 0
    assert "accepted" in accepted.stderr

    async with app.worker() as client:
        run = Run(client, "before")
        await run.send(Go())
        assert await run.result(timeout=30) == ["first", "second"]
        assert PAID[3:] == [second], "the same key, so that the payment counts once"
        again = await client.start(in_parts, id="since")
        await until_status(again, "waiting")
        assert PAID[4:] == [PAID[2]]
        assert await client.restored.lost() is None
    assert first in PAID


@in_loop
async def test_nobody_works_on_after_a_backup_was_put_back_under_him(
    postgres: PostgresServer,
) -> None:
    """Also when the backup knows the node, and its lease."""
    app = app_on(postgres.create_database("bank"))
    async with app.worker() as client:
        await gone_on_after_a_backup(client, postgres)
        node: Any = client.node
        session = node.session
        await asyncio.to_thread(postgres.put_back, "monday")

        async def stopped() -> bool:
            return not session.open

        await until(stopped)
        async with app.connect() as other:
            run = Run(other, "before")
            assert (await run.status()).status == "waiting"
            await run.send(Go())
            await asyncio.sleep(2)
            assert len(PAID) == 2, "it worked on"
            await other.restored.accept()
            assert await run.result(timeout=30) == ["first", "second"]
        assert PAID[2] == PAID[1]


@in_loop
async def test_a_node_stops_whose_newest_batches_are_forgotten() -> None:
    """As by a standby that was behind when it was promoted: there would be a gap."""
    with Database() as url:
        store = PostgresStore(url, partitions=8)
        await store.open()
        await store.register(SERVICES)
        fence = await joined(store)
        for no in range(1, 4):
            assert await written(
                store, a_commit(runs=[a_run(store, no, f"r{no}")]), fence=fence
            ) == [None]
        await rows(url, "UPDATE nodes SET batch = batch - 1")
        (refusal,) = await written(store, a_commit(runs=[a_run(store, 4, "r4")]), fence=fence)
        assert isinstance(refusal, LeaseLost)
        assert await store.rows_of([4]) == []
        await store.close()


@in_loop
async def test_another_database_at_the_same_address_is_refused_unless_it_is_blank() -> None:
    with Database() as url:
        app = app_on(url)
        await work_once(app)
        make_anew(url)
        async with app.worker():
            pass
        (noted,) = past._folder().glob("*.json")
        told = noted.read_text()
        make_anew(url)
        async with app.connect() as client:
            await client.start(in_parts, id="there")
        assert "is another database" in await in_vain(app)
        noted.write_text("{")
        assert "cannot be read" in await in_vain(app)
        noted.unlink()
        async with app.worker():
            assert noted.read_text() != told


@in_loop
async def test_a_blank_database_is_taken_by_an_app_with_schedules_too() -> None:
    with Database() as url:
        app = app_with_schedule(url)
        await work_once(app)
        make_anew(url)
        async with app.worker() as client:
            (schedule,) = await until(client.schedules.list, "the schedule")
            assert schedule.name == "yearly"


@in_loop
async def test_another_database_is_told_of_and_taken_over_on_this_machine() -> None:
    with Database() as url:
        app = app_on(url)
        await work_once(app)
        make_anew(url)
        async with app.connect() as client:
            await client.start(in_parts, id="there")
        assert "`pavane restored --accept` lets workers of this machine go on" in await in_vain(app)
        assert "lets them go on with it" in (await looked_at(url))["restored"]["remedy"]
        told = await asyncio.to_thread(pavane, "restored", "--store", url)
        assert told.exit_code == 1
        assert "This is another database (cluster " in told.stderr
        listed = await asyncio.to_thread(pavane, "restored", "--store", url, "-o", "json")
        found = json.loads(listed.stdout)
        assert listed.exit_code == 1
        assert (found["lost"], found["runs"]) == (None, [])
        assert found["other"]["cluster"] in await in_vain(app)
        accepted = await asyncio.to_thread(pavane, "restored", "--store", url, "--accept")
        assert accepted.exit_code == 0
        assert "accepted: workers of this machine go on" in accepted.stderr
        async with app.worker() as client:
            await until_status(Run(client, "there"), "waiting")
        well = await asyncio.to_thread(pavane, "restored", "--store", url, "-o", "json")
        assert well.exit_code == 0
        assert json.loads(well.stdout) == {"lost": None, "other": None, "runs": []}


@in_loop
async def test_nothing_is_written_to_a_database_that_is_refused() -> None:
    with Database() as url:
        await work_once(app_with_schedule(url))
        make_anew(url)
        async with App("other", [teller], store=url).connect() as client:
            await client.start(count, id="there")
        assert "is another database" in await in_vain(app_with_schedule(url))
        assert await rows(url, "SELECT name FROM services") == [("teller",)]
        assert await rows(url, "SELECT id FROM log") == [("there",)]
        assert await rows(url, "SELECT name FROM handlers") == []


@in_loop
async def test_a_machine_that_was_away_for_long_is_let_in() -> None:
    """Beats of nodes that left are kept for a while only; a missing one tells nothing then."""
    with Database() as url:
        app = app_on(url)
        await work_once(app)
        await rows(url, "DELETE FROM beats")
        assert "was put back" in await in_vain(app)
        (noted,) = past._folder().glob("*.json")
        held = json.loads(noted.read_text())
        held["beat"]["beaten_us"] -= past.KEPT_US + 1_000_000
        noted.write_text(json.dumps(held))
        async with app.worker():
            pass


@in_loop
async def test_other_stores_say_that_they_cannot_tell() -> None:
    with pytest.raises(BadArguments, match="Only a Postgres store"):
        await Restored(MemoryStore()).lost()
