"""Databases that are refused, with the reason and the remedy; and those that are not."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from pavane import App, Event, Service, outbox
from pavane.errors import StoreError
from pavane.stores.postgres import PostgresStore, connection, schema, store, writer
from pavane.stores.postgres.connection import explained, place_of
from pavane.stores.postgres.schema import newest_schema
from pavane.testing.postgres import PostgresServer
from pavane.testing.store_check import SERVICES, a_commit, a_message, joined, written
from tests.bouncer import bounced
from tests.integration.command_line import good, in_folder_of, pavane
from tests.integration.world import in_loop
from tests.postgres import Database, Role, server

SHOP = """
from pavane import App, Service

shop = Service("shop")


@shop.workflow
async def sell() -> None: ...


app = App("shop", [shop])
"""
shop = Service("shop")


@shop.workflow
async def sell(count: int) -> int:
    return count + 1


def told(code: int, *arguments: str) -> str:
    """Return what a command says that must end with `code`, on one line."""
    result = pavane(*arguments)
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return " ".join((result.stdout + result.stderr).split())


async def refused(url: str) -> str:
    """Return what is said of a database that is no store."""
    with pytest.raises(StoreError) as refusal:
        await opened(url)
    return str(refusal.value)


class Said(Event):
    word: str


def as_role(url: str, name: str) -> str:
    """Return the address of the same database for another user."""
    return url.replace("//postgres@", f"//{name}@")


async def opened(url: str) -> None:
    """Open a store, and close it again."""
    there = PostgresStore(url, partitions=8)
    await there.open()
    await there.close()


def grant_in(url: str, sql: str) -> None:
    """Let the owner of a database say something there."""
    server().execute(sql, url.rpartition("/")[2])


def shop_on(url: str) -> App:
    return App("shop", [shop], store=url)


async def refused_worker(url: str) -> str:
    """Return what a worker is told that must not start."""
    with pytest.raises(StoreError) as refusal:
        async with shop_on(url).worker():
            pass
    return str(refusal.value)


@in_loop
async def test_a_schema_that_was_made_for_the_role_is_taken() -> None:
    """It may have no right to make one, which Postgres checks also if it is there."""
    with Role() as role, Database() as url:
        grant_in(url, f"CREATE SCHEMA pavane AUTHORIZATION {role}")
        await opened(as_role(url, role))


@in_loop
async def test_a_worker_that_lacks_a_right_is_refused_with_what_to_grant() -> None:
    with Role() as role, Database() as url:
        await opened(url)
        tables = "SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA pavane"
        grant_in(url, f"GRANT USAGE ON SCHEMA pavane TO {role}; GRANT {tables} TO {role}")
        grant_in(url, f"REVOKE INSERT ON pavane.runs FROM {role}")
        refusal = await refused_worker(as_role(url, role))
        assert f"cannot be {role}, who lacks INSERT on pavane.runs. Let the owner" in refusal
        grant_in(url, refusal[refusal.index("GRANT") :])
        async with shop_on(as_role(url, role)).worker():
            pass


async def publish(url: str) -> None:
    connection: Any = await asyncpg.connect(url)
    async with connection.transaction():
        await outbox.publish(connection, Said(word="hello"))
    await connection.close()


@in_loop
async def test_the_rights_that_the_manual_grants_are_enough() -> None:
    text = Path("docs/postgres.md").read_text("utf-8")
    (granted,) = re.findall(r"```sql\n(.*?)```", text, re.DOTALL)
    with Role() as worker, Role() as looker, Role() as publisher, Database() as url:
        await opened(url)
        for name, role in (("worker", worker), ("looker", looker), ("publisher", publisher)):
            granted = granted.replace(f"TO {name};", f"TO {role};")
        grant_in(url, granted)
        async with shop_on(as_role(url, worker)).worker() as working:
            run = await working.start(sell, 1)
            assert await run.result() == 2
            async with App("look", [], store=as_role(url, looker)).connect() as looking:
                assert (await looking.get(run.id).status()).status == "completed"
            await publish(as_role(url, publisher))
            assert await working.store.events_head() == 1
        await publish(as_role(url, publisher))
        async with App("look", [], store=as_role(url, looker)).connect() as looking:
            assert await looking.store.events_head() == 1, "another is not moved by who only looks"
            assert len(await looking.events.list()) == 1


def test_a_command_that_only_looks_makes_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    with Database() as url:
        for look in (("nodes", "list"), ("runs", "list"), ("runs", "kill", "r-1")):
            assert "holds no store yet. `pavane run` and" in told(4, *look, "--store", url)
        assert "holds no store yet" in told(1, "doctor", "--store", url)
        monkeypatch.setenv("PAVANE_STORE", url)
        assert "warn store" in told(0, "doctor"), "it may not have been used yet"
        name = url.rpartition("/")[2]
        assert server().execute("SELECT to_regnamespace('pavane') IS NULL", name) == "t"


def test_a_command_that_only_looks_leaves_the_schema_to_workers_of_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shop.py").write_text(SHOP)
    with Database() as url, in_folder_of(tmp_path, "shop.py", monkeypatch):
        name = url.rpartition("/")[2]
        known = "SELECT value FROM pavane.meta WHERE key = 'schema'"
        good("runs", "start", "sell", "--store", url)
        newest = newest_schema()
        forget = (
            "ALTER TABLE pavane.nodes DROP COLUMN lease_us; DROP TABLE pavane.past, pavane.beats;"
            " UPDATE pavane.meta SET value = '2' WHERE key = 'schema'"
        )
        server().execute(forget, name)
        said = told(4, "runs", "list", "--store", url)
        assert f"was written by an older Pavane (schema 2, this one knows {newest})" in said
        assert server().execute(known, name) == "2"
        good("runs", "start", "sell", "--store", url)
        assert server().execute(known, name) == str(newest)
        good("runs", "list", "--store", url)


@in_loop
async def test_a_node_of_the_version_before_writes_on_after_a_migration() -> None:
    """It leaves columns empty that are newer than it, such as the time of its lease."""
    with Database() as url:
        there = PostgresStore(url, partitions=8)
        await there.open()
        await there.register(SERVICES)
        fence = await joined(there)
        grant_in(url, "UPDATE pavane.nodes SET lease_us = NULL")
        commit = a_commit(messages=[a_message(there, "one#1")])
        assert await written(there, commit, fence=fence) == [None]
        await there.close()


@in_loop
async def test_who_waits_to_bring_the_schema_up_to_date_does_not_stop_those_who_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A backup reads the tables, and who waits to change them comes before all who ask later."""
    monkeypatch.setattr(schema, "WAIT_S", 3.0)
    with Database() as url:
        there = PostgresStore(url, partitions=8)
        await there.open()
        await there.register(SERVICES)
        fence = await joined(there)
        grant_in(url, "UPDATE pavane.meta SET value = '4' WHERE key = 'schema'")
        backup: Any = await asyncpg.connect(url, server_settings={"application_name": "pg_dump"})
        async with backup.transaction():
            await backup.fetch("SELECT FROM pavane.heads")
            waiting = asyncio.create_task(refused(url))
            took: list[float] = []
            while not waiting.done():
                began = time.monotonic()
                commit = a_commit(messages=[a_message(there, f"{len(took)}#1")])
                assert await written(there, commit, fence=fence) == [None]
                took.append(time.monotonic() - began)
                await asyncio.sleep(0.01)
            assert max(took) < 1.5
            who = f"pid {backup.get_server_pid()}, user 'postgres', application 'pg_dump'"
            assert f"while another session uses its tables ({who})" in await waiting
        await backup.close()
        await opened(url)
        name = url.rpartition("/")[2]
        value = server().execute("SELECT value FROM pavane.meta WHERE key = 'schema'", name)
        assert value == str(newest_schema())
        await there.close()


@pytest.mark.parametrize(
    ("address", "wrong"),
    [
        ("postgresql://shop:secret@db:abc/x", "its port is no number up to 65535"),
        ("postgresql://shop:secret@db:99999/x", "its port is no number up to 65535"),
        ("postgresql://shop:secret@one:5432,two:abc/x", "its port is no number up to 65535"),
        ("postgresql://shop:secret@db/x?port=abc", "its port is no number up to 65535"),
        ("postgresql://shop:secret#1@db/x", "in a password write .* # as %23"),
        ("postgresql://shop:secret@1@db/x", "it has two @ before the host"),
        ("postgresql://shop:secret@[::1/x", "such as an IPv6 address with one bracket"),
        ("postgresql://shop:secret@db/x?sslmode", "what follows its \\? is not name=value"),
        ("postgresql://shop:secret@db/x?sslrootcert=/no/ca.crt", "its sslrootcert names no file"),
    ],
)
def test_an_address_that_is_none_is_refused_without_a_password(address: str, wrong: str) -> None:
    with pytest.raises(StoreError, match=wrong) as refusal:
        PostgresStore(address)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://shop:s%40cret@db.example/shop",
        "postgresql://one:5432,two/shop?sslmode=require",
        "postgresql://[::1]:5432,[::2]/shop",
        "postgresql:///shop?host=/run/postgresql&port=5432",
        "postgres://shop@%2Frun%2Fpostgresql/shop",
    ],
)
def test_an_address_that_is_one_is_taken(address: str) -> None:
    PostgresStore(address)


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("postgresql://shop:secret@db/x?password=secret", "postgresql://db/x"),
        ("postgresql:///x?host=one,two&port=1,2", "postgresql://one,two/x"),
        ("postgresql:///x", "postgresql://of.the.environment/x"),
    ],
)
def test_a_place_is_told_by_what_it_is_found_by(
    address: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGHOST", "of.the.environment")
    assert place_of(address) == place


@in_loop
async def test_of_several_hosts_the_one_is_taken_that_can_be_written_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with PostgresServer() as primary, primary.follower() as standby:
        ports = f"{standby.port},{primary.port}"
        at = "@".join(("postgresql://postgres", f"127.0.0.1:{ports.replace(',', ',127.0.0.1:')}"))
        await opened(f"{at}/postgres")
        given = f"host=127.0.0.1,127.0.0.1&port={ports}"
        await opened(f"postgresql:///postgres?user=postgres&{given}")
        monkeypatch.setenv("PGHOST", "127.0.0.1,127.0.0.1")
        monkeypatch.setenv("PGPORT", ports)
        monkeypatch.setenv("PGUSER", "postgres")
        await opened("postgresql:///postgres")


@in_loop
async def test_an_option_that_nobody_knows_is_told_and_may_be_left_out() -> None:
    with Database() as url:
        said = await refused(f"{url}?connect_timeout=5")
        assert 'option of the address (unrecognized configuration parameter "connect_tim' in said
        assert "leave others out" in said


@in_loop
async def test_a_server_that_cannot_watch_its_clients_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as one on Windows."""
    monkeypatch.setitem(connection.SETTINGS, "client_connection_check_interval", "-1")
    with Database() as url:
        await opened(url)


@in_loop
async def test_a_database_all_of_whose_tables_are_published_is_written_to() -> None:
    with Database() as url:
        await opened(url)
        grant_in(url, "CREATE PUBLICATION everything FOR ALL TABLES")
        async with shop_on(url).worker() as client:
            assert await (await client.start(sell, 1)).result() == 2
            await client.restored.accept()


@pytest.mark.parametrize("made", [True, False], ids=["a store", "an empty database"])
@in_loop
async def test_a_pooler_in_statement_mode_is_refused_at_once(
    made: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with Database() as url, bounced(url, mode="statement") as there:
        if made:
            await opened(url)
        assert "Set pool_mode=transaction there." in await refused_worker(there)
    assert "writing again" not in caplog.text


@pytest.mark.parametrize(
    "kind", [asyncpg.DuplicatePreparedStatementError, asyncpg.InvalidSQLStatementNameError]
)
def test_a_pooler_that_knows_no_prepared_statements_is_explained(kind: type[Exception]) -> None:
    said = str(explained("postgresql://db/shop", kind("mixed up")))
    assert "PgBouncer 1.21 or newer with max_prepared_statements above 0" in said


def test_a_server_that_is_starting_is_not_asked_whether_it_is_running() -> None:
    error = asyncpg.CannotConnectNowError("the database system is starting up")
    said = str(explained("postgresql://db/shop", error))
    assert "at the moment: the database system is starting up. Workers that run try again" in said
    assert "Is it running" not in said
    assert "reached: no answer in time. Is it" in str(explained("postgresql://db", TimeoutError()))


@in_loop
async def test_a_synchronous_standby_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store, "ANSWER_S", 1.0)
    monkeypatch.setattr(writer, "CALL_S", 1.0)
    monkeypatch.setattr(writer, "SETTLE_S", 1.0)
    reason = "commits wait for a synchronous standby that does not answer"
    with PostgresServer(settings={"synchronous_standby_names": "nobody"}) as server:
        assert reason in await refused(server.url())
        assert reason in await refused_worker(server.url())


@in_loop
async def test_what_a_server_refuses_is_told_with_a_remedy() -> None:
    with Role() as role, Database() as url:
        name = url.rpartition("/")[2]
        admin = url.replace(name, "postgres")
        grant_in(url, f"CREATE SCHEMA pavane AUTHORIZATION {role}")
        theirs = as_role(url, role)

        async def refused_with(setting: str) -> str:
            grant_in(admin, setting)
            return await refused(theirs)

        said = await refused_with(f"ALTER ROLE {role} SET synchronous_commit = local")
        assert f"ALTER ROLE {role} SET synchronous_commit = on;" in said
        grant_in(admin, f"ALTER ROLE {role} RESET synchronous_commit")
        said = await refused_with(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        assert "default_transaction_read_only is on: turn it off for this user" in said
        grant_in(admin, f"ALTER DATABASE {name} RESET default_transaction_read_only")
        said = await refused_with(f"ALTER DATABASE {name} CONNECTION LIMIT 0")
        assert f'too many connections for database "{name}"' in said
        assert "CONNECTION LIMIT of the database or the role" in said
        said = await refused_with(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        assert f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true;' in said
        grant_in(admin, f"ALTER DATABASE {name} CONNECTION LIMIT -1 ALLOW_CONNECTIONS true")
        said = await refused_with(f"ALTER ROLE {role} NOLOGIN")
        assert "The role must be there, with LOGIN" in said
        assert "The role must be there, with LOGIN" in await refused(as_role(url, "nobody"))
        said = await refused(url.replace(name, "my%20shop"))
        assert "CREATE DATABASE \"my shop\" ENCODING 'UTF8' TEMPLATE template0;" in said


@in_loop
async def test_a_wrong_password_is_told_with_where_it_is_taken_from() -> None:
    with PostgresServer() as server:
        server.execute("CREATE ROLE one LOGIN PASSWORD 'right'")
        rules = server.folder / "data" / "pg_hba.conf"
        rules.write_text("host all one all scram-sha-256\n" + rules.read_text())
        loaded = server.execute("SELECT pg_conf_load_time()")
        server.execute("SELECT pg_reload_conf()")
        while server.execute("SELECT pg_conf_load_time()") == loaded:
            await asyncio.sleep(0.01)
        said = await refused(server.url().replace("//postgres@", "//one:wrong@"))
        assert "else from $PGPASSWORD or ~/.pgpass" in said
        assert "wrong" not in said
