"""The Postgres store on asyncpg: any number of nodes on any number of machines share a database.

Guarantees: a commit that was acknowledged is as durable as the server's settings make it, and those
that make it less than durable are refused; a batch under a lost lease is refused whole, since it
locks the node's row, which takeover deletes; log positions are taken under the lock of one row that
is kept until the commit, so their order is commit order and a reader never skips. A write whose
answer is lost is looked up before anything else happens.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any
from zlib import crc32

import msgspec

from pavane.errors import LeaseLost, PavaneError, StoreError
from pavane.stores.port import (
    COUNT_MAX,
    Commit,
    Features,
    Fence,
    Glance,
    InboxRow,
    JournalRow,
    MailRow,
    Message,
    NodeRow,
    ParkedRow,
    PartitionRow,
    RunFilter,
    RunRow,
    Touched,
    no_text,
)
from pavane.stores.postgres.batch import Batch, parked_values
from pavane.stores.postgres.connection import (
    ANSWER_S,
    BUSY,
    CONNECT_S,
    FAILED,
    QUICK_S,
    Connection,
    Silent,
    answered,
    asyncpg,
    check_address,
    check_server,
    connect,
    is_lost,
    is_no_text,
    looked_into,
    place_of,
)
from pavane.stores.postgres.events import EventTables
from pavane.stores.postgres.lease import LeaseConnection
from pavane.stores.postgres.past import Beat, Found, Past
from pavane.stores.postgres.rights import check_rights
from pavane.stores.postgres.schema import prepare
from pavane.stores.postgres.together import Together
from pavane.stores.postgres.watch import Watch
from pavane.stores.postgres.writer import PAUSE_MAX_S, PAUSE_S, Work, Writer

log = logging.getLogger("pavane.postgres")

SLOTS = 1024
"""Targets are `service number * SLOTS + partition`."""
BATCH_MAX = 250
"""Few enough that the event loop has others to go on with while the server writes some."""
PRUNE_MAX = 2000
READERS_MAX = 4
READER_IDLE_S = 60.0
"""How long a connection that reads is kept for nothing. Others may be refused because of it; nodes
that idle look more often than that."""
READ_S = 15.0
"""How long a read is tried again when the database is gone."""

_RUN_COLUMNS = ", ".join(RunRow.__struct_fields__)
_RUN_TEXTS = [
    RunRow.__struct_fields__.index(name) for name in ("header", "trail", "attributes", "result")
]
_PARKED_COLUMNS = ", ".join(ParkedRow.__struct_fields__)
_MESSAGE_COLUMNS = "kind, id, receiver, run, body, at_us, target, pos"


class _Reader(asyncpg.Connection):
    """A connection that needs no cleaning up after use: it only reads."""

    __slots__ = ()

    def get_reset_query(self) -> str:
        return ""


class PostgresStore(EventTables):
    """See the module. `dsn` is a libpq URL; the database must exist.

    Its schema is made and brought up to date, or without `create` refused if it is not.
    """

    features = Features(
        durable=True, shared=True, transactions=True, awaits_work=True, nul=False,
        batch_max=BATCH_MAX, prune_max=PRUNE_MAX,
    )  # fmt: skip

    def __init__(self, dsn: str, *, partitions: int = 32, create: bool = True) -> None:
        check_address(dsn)
        self.dsn = dsn
        self.partitions = partitions
        self._create = create
        self.tail = 0
        self._services: dict[str, int] = {}
        self._clock_offset_us = 0
        self._pool: Any = None
        self._pid = 0
        self._lease_us = 0
        self._lease = LeaseConnection(dsn)
        self.past = Past(dsn)
        self._writer = Writer(dsn, self._wrote)
        self._runs_of = Together[list[RunRow]](self._rows_by_run, [])
        self._seen_at = Together[list[str]](self._marks_by_id, [])
        self._newest = Together[Message | None](self._messages_by_id, None)

    # -- opening -------------------------------------------------------------------------------

    def connect(self) -> PostgresStore:
        return PostgresStore(self.dsn, partitions=self.partitions, create=self._create)

    async def open(self) -> None:
        if self._pid:
            raise StoreError(
                f"{place_of(self.dsn)} is open already. Give each client a store of its own: the "
                f"database is what they share."
            )
        self._services.clear()
        try:
            connection = await connect(self.dsn)
            try:
                await answered(connection, self._prepare(connection), ANSWER_S)
            finally:
                connection.terminate()
            await self._connect_all()
        except FAILED as error:
            await self._close_all()
            raise await looked_into(self.dsn, error) from error
        except BaseException:
            await self._close_all()
            raise

    async def _prepare(self, connection: Connection) -> None:
        await check_server(connection, self.dsn)
        self.partitions = await prepare(connection, self.dsn, self.partitions, create=self._create)
        began = _ticks_us()
        now = await connection.fetchval("SELECT pavane.clock_us()")
        self._set_clock(began, now)
        self.tail = await connection.fetchval("SELECT log FROM pavane.heads")

    async def _connect_all(self) -> None:
        self._pool = await asyncpg.create_pool(
            self.dsn, min_size=0, max_size=READERS_MAX, connect=self._connect_reader,
            connection_class=_Reader, timeout=CONNECT_S,
            max_inactive_connection_lifetime=READER_IDLE_S,
        )  # fmt: skip
        await self._writer.open()
        self._pid = os.getpid()
        self._watch = Watch(self.dsn, self._row)
        self._watch.open()

    @staticmethod
    async def _connect_reader(dsn: str, **given: Any) -> Connection:
        return await connect(dsn, given["connection_class"])

    async def reopen(self) -> None:
        if self._pid not in (0, os.getpid()):
            raise self._unusable()
        pool = self._pool
        try:
            if pool is not None:
                await pool.expire_connections()
            connection = await connect(self.dsn)
            try:
                await answered(connection, check_server(connection, self.dsn), QUICK_S)
                head = connection.fetchval("SELECT log FROM pavane.heads")
                self.tail = await answered(connection, head, QUICK_S)
                if self.past.is_kept:
                    await answered(connection, self.past.check(connection), QUICK_S)
            finally:
                connection.terminate()
        except FAILED as error:
            raise await looked_into(self.dsn, error) from error

    async def close(self) -> None:
        if self._pid not in (0, os.getpid()):
            return  # what was inherited by a fork belongs to the parent
        if self._pid:
            await self._watch.finish()
        await self._close_all()

    async def _close_all(self) -> None:
        was_open, self._pid = self._pid, 0
        await self.past.stop()
        if was_open:
            await self._watch.close()
        await self._writer.close()
        await asyncio.to_thread(self._lease.close)
        if self._pool is not None:
            pool, self._pool = self._pool, None
            try:
                async with asyncio.timeout(2):
                    await pool.close()
            except FAILED:
                pool.terminate()

    def _unusable(self) -> StoreError:
        """Say why this store, in this process, takes no work."""
        place = place_of(self.dsn)
        if self._pid:
            return StoreError(f"{place} was opened by another process; open it again after a fork.")
        return StoreError(f"{place} is closed; open the store before using it.")

    # -- names and clocks ----------------------------------------------------------------------

    def now_us(self) -> int:
        return time.monotonic_ns() // 1000 + self._clock_offset_us  # twice a step: it saves a call

    def _set_clock(self, began_us: int, now_us: int) -> None:
        """Note what the database's clock said between `began_us` and now."""
        ended_us = _ticks_us()
        offset = now_us - (began_us + ended_us) // 2
        if abs(offset - self._clock_offset_us) > ended_us - began_us:
            self._clock_offset_us = offset

    def target_of(self, service: str, run: str) -> int:
        return self._services[service] * SLOTS + crc32(run.encode()) % self.partitions

    async def register(self, services: Sequence[str]) -> None:
        missing = [name for name in services if name not in self._services]
        if not missing:
            return
        sql = "SELECT name, no FROM pavane.services WHERE name = ANY($1)"
        known = dict(await self._rows(sql, missing))
        unknown = [name for name in missing if name not in known]
        if unknown:
            await self._execute(lambda c: self._add_services(c, unknown))
            known = dict(await self._rows(sql, missing))
        self._services.update(known)

    async def _add_services(self, c: Connection, names: Sequence[str]) -> None:
        await c.execute(
            "INSERT INTO pavane.services (name) SELECT unnest($1::text[])"
            " ON CONFLICT (name) DO NOTHING",
            names,
        )
        await c.execute(
            "INSERT INTO pavane.partitions (target, service, partition, position)"
            " SELECT s.no * $2 + p, s.name, p, (SELECT log FROM pavane.heads)"
            " FROM pavane.services AS s, generate_series(0, $3 - 1) AS p WHERE s.name = ANY($1)"
            " ON CONFLICT (target) DO NOTHING",
            names, SLOTS, self.partitions,
        )  # fmt: skip

    # -- writing -------------------------------------------------------------------------------

    def submit(
        self,
        batch: Sequence[Commit],
        fence: Fence | None,
        done: Callable[[Sequence[PavaneError | None]], None],
    ) -> None:
        if self._pid != os.getpid():
            done([self._unusable()] * len(batch))
        else:
            self._writer.submit(batch, fence, done)

    def _wrote(self, fence: Fence | None, batch: Batch | None, log_before: int) -> None:
        if batch is None or batch.concerns_others:
            self._watch.announce()
        if fence is None or batch is None or batch.events:
            self._watch.wake()
        if fence is not None and batch is not None and batch.messages:
            if self.tail == log_before:
                self.tail += len(batch.messages)  # nobody else wrote: nothing is to be read
            else:
                self._watch.wake()

    async def _execute(self, work: Work) -> Any:
        """Do `work` in a transaction of its own, after what was submitted before."""
        if self._pid != os.getpid():
            raise self._unusable()
        return await self._writer.execute(work)

    async def _execute_aside(self, work: Work) -> Any:
        """Do `work`, which concerns nobody, in a transaction of its own, not in line with others.

        Nobody is told of it, and no batch waits for it.
        """

        async def alone(c: Connection) -> Any:
            async with c.transaction():
                return await work(c)

        return await self._ask(alone)

    async def take_run_numbers(self, count: int) -> int:
        async def take(c: Connection) -> int:
            sql = (
                "UPDATE pavane.meta SET value = (value::bigint + $1)::text WHERE key = 'next_run'"
                " RETURNING value::bigint - $1"
            )
            return await c.fetchval(sql, count)

        return await self._execute(take)

    # -- reading -------------------------------------------------------------------------------

    async def _ask(self, ask: Callable[[Connection], Any]) -> Any:
        """Ask a reader; on new connections, for a while, if the database is gone.

        Most answers take milliseconds, so silence soon means that a connection is half-open. Should
        it be a long read, it gets more time on the next one.
        """
        loop = asyncio.get_running_loop()
        ends, within_s, pause_s = 0.0, QUICK_S, PAUSE_S
        while True:
            if self._pid != os.getpid():
                raise self._unusable()
            try:
                async with self._pool.acquire(timeout=CONNECT_S) as connection:
                    return await answered(connection, ask(connection), within_s)
            except FAILED as error:
                ends = ends or loop.time() + READ_S  # the first may have taken long
                if is_no_text(error):
                    raise no_text(error) from error
                if not (is_lost(error) or isinstance(error, BUSY)) or loop.time() > ends:
                    raise await looked_into(self.dsn, error) from error
                if isinstance(error, Silent):
                    log.warning("asking %s again: %s", place_of(self.dsn), error)
                if is_lost(error):
                    await self._pool.expire_connections()  # the others are lost as well, perhaps
                within_s = min(ANSWER_S, 2 * within_s)
            await asyncio.sleep(pause_s * (0.5 + random.random()))
            pause_s = min(PAUSE_MAX_S, 2 * pause_s)

    async def _rows(self, sql: str, *values: Any) -> list[Any]:
        return await self._ask(lambda c: c.fetch(sql, *values))

    async def _row(self, sql: str, *values: Any) -> Any:
        return await self._ask(lambda c: c.fetchrow(sql, *values))

    async def _one(self, sql: str, *values: Any) -> Any:
        return await self._ask(lambda c: c.fetchval(sql, *values))

    async def _run_rows(self, where: str, *values: Any) -> list[RunRow]:
        rows = await self._rows(f"SELECT {_RUN_COLUMNS} FROM pavane.runs WHERE {where}", *values)
        return [_run(row) for row in rows]

    async def _rows_by_run(self, ids: Sequence[str]) -> dict[str, list[RunRow]]:
        found: dict[str, list[RunRow]] = {}
        for row in await self._run_rows("id = ANY($1) ORDER BY no", ids):
            found.setdefault(row.id, []).append(row)
        return found

    async def run_rows(self, id: str) -> list[RunRow]:
        return [copy(row) for row in await self._runs_of(id)]

    async def run_row(self, service: str, id: str) -> RunRow | None:
        return next((row for row in await self.run_rows(id) if row.service == service), None)

    async def halted_runs(self, ids: Sequence[str]) -> list[RunRow]:
        return await self._run_rows(
            "id = ANY($1) AND service = home AND (ended_us IS NOT NULL OR status = 'stuck')",
            list(ids),
        )

    async def rows_of(self, runs: Sequence[int]) -> list[RunRow]:
        return await self._run_rows("no = ANY($1) ORDER BY no", list(runs))

    async def list_runs(self, which: RunFilter) -> list[RunRow]:
        values: list[Any] = []

        def given(value: Any) -> str:
            values.append(value)
            return f"${len(values)}"

        where = ["service = home"]
        for column, value in (("service", which.service), ("workflow", which.workflow)):
            if value is not None:
                where.append(f"{column} = {given(value)}")
        if which.status:
            where.append(f"status = ANY({given(list(which.status))})")
        if which.id_prefix:
            where.append(f"starts_with(id, {given(which.id_prefix)})")
        for name, value in which.attributes:
            texts = given(_as_json(value))
            where.append(f"(attributes::json -> {given(name)})::text = ANY({texts})")
        if which.before is not None:
            where.append(f"no < {given(which.before)}")
        limit = given(which.limit)
        return await self._run_rows(
            f"{' AND '.join(where)} ORDER BY no DESC LIMIT {limit}", *values
        )

    async def journals(self, runs: Sequence[int]) -> dict[int, list[JournalRow]]:
        found: dict[int, list[JournalRow]] = {run: [] for run in runs}
        sql = "SELECT run, seq, body FROM pavane.journal WHERE run = ANY($1) ORDER BY run, seq"
        for run, seq, body in await self._rows(sql, list(runs)):
            found[run].append(JournalRow(run, seq, body.encode()))
        return found

    async def live_runs(self, targets: Sequence[int], after: int, limit: int) -> list[RunRow]:
        where = (
            "status IN ('running', 'stuck') AND target = ANY($1) AND no > $2 ORDER BY no LIMIT $3"
        )
        return await self._run_rows(where, list(targets), after, limit)

    async def due_runs(
        self, targets: Sequence[int], after: tuple[int, int], until_us: int, limit: int
    ) -> list[RunRow]:
        where = (
            "(wake_us, no) > ($1, $2) AND wake_us <= $3 AND target = ANY($4)"
            " ORDER BY wake_us, no LIMIT $5"
        )
        return await self._run_rows(where, *after, until_us, list(targets), limit)

    async def _parked_rows(self, where: str, *values: Any) -> list[ParkedRow]:
        sql = f"SELECT {_PARKED_COLUMNS} FROM pavane.parked WHERE {where}"
        return [_parked(row) for row in await self._rows(sql, *values)]

    async def due_parked(
        self, targets: Sequence[int], after: tuple[int, str], until_us: int, limit: int
    ) -> list[ParkedRow]:
        where = (
            "(due_us, id) > ($1, $2) AND due_us <= $3 AND target = ANY($4)"
            " ORDER BY due_us, id LIMIT $5"
        )
        return await self._parked_rows(where, *after, until_us, list(targets), limit)

    async def parked_of(self, service: str, run: str) -> list[ParkedRow]:
        return await self._parked_rows("run = $1 AND service = $2", run, service)

    async def mail_of(self, service: str, run: str) -> list[MailRow]:
        sql = (
            "SELECT service, run, id, type, body, at_us FROM pavane.mailbox"
            " WHERE run = $1 AND service = $2 ORDER BY no"
        )
        rows = await self._rows(sql, run, service)
        return [MailRow(s, r, id, kind, body.encode(), at) for s, r, id, kind, body, at in rows]

    async def inbox_of(self, run: str) -> list[InboxRow]:
        sql = (
            "SELECT service, id, at_us, passed_to FROM pavane.inbox WHERE id >= $1 AND id < $2"
            " ORDER BY id, service"
        )
        return [InboxRow(*row) for row in await self._rows(sql, run + "#", run + "$")]

    async def _marks_by_id(self, ids: Sequence[str]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        sql = "SELECT id, service FROM pavane.inbox WHERE id = ANY($1)"
        for id, service in await self._rows(sql, ids):
            found.setdefault(id, []).append(service)
        return found

    async def seen(self, service: str, ids: Sequence[str]) -> set[str]:
        if len(ids) == 1:
            return {*ids} if service in await self._seen_at(ids[0]) else set()
        sql = "SELECT id FROM pavane.inbox WHERE service = $1 AND id = ANY($2)"
        return {row[0] for row in await self._rows(sql, service, list(ids))}

    async def _messages_by_id(self, ids: Sequence[str]) -> dict[str, Message | None]:
        rows = await self._rows(
            f"SELECT {_MESSAGE_COLUMNS} FROM pavane.log WHERE id = ANY($1) ORDER BY pos", ids
        )
        return {row[1]: _message(row) for row in rows}

    async def message(self, id: str) -> Message | None:
        found = await self._newest(id)
        return found and copy(found)

    async def read_log(
        self, after: int, until: int | None, targets: Sequence[int] | None, limit: int,
        skip_node: int | None,
    ) -> list[Message]:  # fmt: skip
        rows = await self._rows(
            f"SELECT {_MESSAGE_COLUMNS} FROM pavane.log WHERE pos > $1"
            f" AND ($2::bigint IS NULL OR pos <= $2) AND ($3::int[] IS NULL OR target = ANY($3))"
            f" AND ($4::bigint IS NULL OR origin IS DISTINCT FROM $4) ORDER BY pos LIMIT $5",
            after, until, None if targets is None else list(targets), skip_node, limit,
        )  # fmt: skip
        return [_message(row) for row in rows]

    async def log_head(self) -> int:
        return (await self._row("SELECT log FROM pavane.heads"))[0]

    def changed(self) -> bool:
        if self._pid != os.getpid():
            raise self._unusable()
        return self._watch.changed()

    @property
    def hears(self) -> bool:
        return self._watch.hears

    # -- membership ----------------------------------------------------------------------------

    async def join(
        self, name: str, host: str, pid: int, services: Sequence[str], lease_us: int
    ) -> NodeRow:
        nonce = os.urandom(12).hex()

        async def insert(c: Connection) -> tuple[NodeRow, Beat]:
            await check_rights(c, self.dsn)
            beat = await self.past.beat(c, nonce)
            sql = (
                "INSERT INTO pavane.nodes"
                " (nonce, name, host, pid, services, joined_us, expires_us, lease_us)"
                " SELECT $1, $2, $3, $4, $5, now, now + $6, $6 FROM pavane.clock_us() AS now"
                " RETURNING no, expires_us, joined_us"
            )
            row = await c.fetchrow(sql, nonce, name, host, pid, list(services), lease_us)
            node = NodeRow(row[0], nonce, name, host, pid, list(services), row[1], row[2])
            return node, beat

        node, beat = await self._execute(insert)
        await asyncio.to_thread(self.past.note, beat)
        self.past.keep(nonce, self._ask)
        self._lease_us = lease_us
        return node

    def renew(self, fence: Fence) -> Glance | None:
        if self._pid != os.getpid():
            raise self._unusable()
        began = _ticks_us()
        # Also one that rests must be able to answer within the lease that it joined with.
        renewed = self._lease.renew(fence, self._lease_us / 4e6)
        if renewed is None:
            return None
        self._set_clock(began, renewed.now_us)
        self._watch.saw(renewed.heads, renewed.is_staged, fence.lease_us / 1e6)
        self.past.is_quiet = fence.lease_us > self._lease_us
        return renewed.glance

    async def look_at_past(self) -> Found:
        """Tell whether the database was put back, by what is noted on this machine."""
        return await self._ask(self.past.look)

    async def check_past(self) -> None:
        """Raise StoreError if nodes may not work here; writes nothing."""
        await self._ask(self.past.check)

    async def accept_past(self) -> None:
        """Let nodes work here again, as in a new generation of the database."""
        await self._execute(self.past.accept)

    async def leave(self, fence: Fence, touched: Sequence[Touched] = ()) -> None:
        try:
            for of_one in touched:
                await self._execute(partial(_take_back, fence, of_one))
        except LeaseLost:
            return

        async def delete(c: Connection) -> None:
            sql = "DELETE FROM pavane.nodes WHERE no = $1 AND nonce = $2 RETURNING no"
            if await c.fetchval(sql, fence.node, fence.nonce) is not None:
                await c.execute(_FREE, fence.node)

        await self._execute(delete)

    async def nodes(self) -> list[NodeRow]:
        rows = await self._rows(
            "SELECT no, nonce, name, host, pid, services, expires_us, joined_us, asked"
            " FROM pavane.nodes ORDER BY no"
        )
        return [NodeRow(*row) for row in rows]

    async def ask_node(self, node: int, what: str) -> bool:
        async def ask(c: Connection) -> bool:
            sql = "UPDATE pavane.nodes SET asked = $2 WHERE no = $1 RETURNING no"
            return await c.fetchval(sql, node, what) is not None

        return await self._execute(ask)

    async def partition_rows(self, services: Sequence[str]) -> list[PartitionRow]:
        rows = await self._rows(
            "SELECT target, service, partition, owner, clean, position FROM pavane.partitions"
            " WHERE service = ANY($1) ORDER BY target",
            list(services),
        )
        return [PartitionRow(*row) for row in rows]

    async def expire(self, nodes: Sequence[NodeRow]) -> None:
        async def delete(c: Connection) -> None:
            sql = (
                "DELETE FROM pavane.nodes WHERE no = $1 AND nonce = $2 AND expires_us = $3"
                " RETURNING no"
            )
            for node in sorted(nodes, key=lambda node: node.no):
                if await c.fetchval(sql, node.no, node.nonce, node.expires_us) is not None:
                    await c.execute(_FREE, node.no)

        await self._execute(delete)

    async def claim(self, fence: Fence, targets: Sequence[int]) -> list[PartitionRow]:
        mine = 0
        was_clean: dict[int, bool] = {}

        async def take(c: Connection) -> list[PartitionRow]:
            nonlocal mine
            await _prove(c, fence)
            rows = await c.fetch(
                "SELECT target, service, partition, owner, clean, position FROM pavane.partitions"
                " WHERE target = ANY($1) AND (owner IS NULL OR owner = $2)"
                " ORDER BY target FOR UPDATE",
                list(targets), mine,
            )  # fmt: skip
            mine = fence.node  # claimed already, if this is done again because its answer was lost
            was_clean.update((row["target"], row["clean"]) for row in rows if row["owner"] is None)
            await c.execute(
                "UPDATE pavane.partitions SET owner = $2, clean = false WHERE target = ANY($1)",
                [row[0] for row in rows], fence.node,
            )  # fmt: skip
            return [
                PartitionRow(target, service, partition, None, was_clean[target], position)
                for target, service, partition, _, _, position in rows
            ]

        return await self._execute(take)

    async def release(self, fence: Fence, positions: Sequence[tuple[int, int]]) -> None:
        async def give(c: Connection) -> None:
            await _prove(c, fence)
            await c.execute(
                "UPDATE pavane.partitions AS p SET position = t.position"
                " FROM unnest($1::bigint[], $2::bigint[]) AS t (target, position)"
                " WHERE p.target = t.target AND p.position < t.position",
                *_columns(2, positions),
            )
            await c.execute(
                "UPDATE pavane.partitions SET owner = NULL, clean = true"
                " WHERE target = ANY($1) AND owner = $2",
                [target for target, _ in positions], fence.node,
            )  # fmt: skip

        await self._execute(give)

    # -- upkeep --------------------------------------------------------------------------------

    async def touch(
        self, fence: Fence, runs: Mapping[int, int], parked: Sequence[ParkedRow]
    ) -> None:
        async def count(c: Connection) -> None:
            await _prove(c, fence)
            await c.execute(
                "UPDATE pavane.runs AS r SET deaths = t.deaths"
                " FROM unnest($1::bigint[], $2::integer[]) AS t (no, deaths)"
                " WHERE r.no = t.no AND r.deaths < t.deaths",
                list(runs), list(runs.values()),
            )  # fmt: skip
            await c.execute(
                "INSERT INTO pavane.parked SELECT * FROM unnest($1::pavane.parked_1[])"
                " ON CONFLICT (id, service) DO UPDATE SET attempt = excluded.attempt,"
                " due_us = excluded.due_us, beat = excluded.beat, error = excluded.error,"
                " deaths = excluded.deaths",
                [parked_values(row) for row in parked],
            )

        await self._execute(count)

    async def prune(self, before_us: int, limit: int) -> int:
        async def delete(c: Connection) -> int:
            runs = await self._prune_runs(c, before_us, limit)
            return runs + await self._prune_log(c, before_us, limit)

        return await self._execute_aside(delete)

    async def _prune_runs(self, c: Connection, before_us: int, limit: int) -> int:
        """Delete what is left, at every service, of runs that ended at home."""
        sql = (
            "SELECT id FROM pavane.runs WHERE ended_us < $1 AND service = home"
            " ORDER BY ended_us LIMIT $2"
        )
        ids = [row[0] for row in await c.fetch(sql, before_us, limit)]
        if not ids:
            return 0
        await c.execute(
            "DELETE FROM pavane.journal WHERE run IN"
            " (SELECT no FROM pavane.runs WHERE id = ANY($1))",
            ids,
        )
        await c.execute(
            "DELETE FROM pavane.mailbox AS m USING pavane.runs AS r"
            " WHERE r.id = ANY($1) AND m.run = r.id AND m.service = r.service",
            ids,
        )
        await c.execute("DELETE FROM pavane.runs WHERE id = ANY($1)", ids)
        # What a run was given goes with the event: one that goes on from it must not get it too.
        await c.execute("DELETE FROM pavane.awaits WHERE run = ANY($1) AND pos = 0", ids)
        await c.execute("DELETE FROM pavane.members WHERE run = ANY($1)", ids)
        # Marks of messages that someone has still to consume stay, or they would count twice.
        await c.execute(
            "DELETE FROM pavane.inbox AS i USING unnest($1::text[]) AS old (id)"
            " WHERE (i.id = old.id OR i.id > old.id || '#' AND i.id < old.id || '$')"
            " AND NOT EXISTS ("
            "  SELECT 1 FROM pavane.log AS l WHERE l.id = i.id"
            "  AND l.pos > (SELECT min(position) FROM pavane.partitions))",
            ids,
        )
        return len(ids)

    async def _prune_log(self, c: Connection, before_us: int, limit: int) -> int:
        """Delete consumed messages from the log's beginning up to the first that is not old."""
        rows = await c.fetch(
            "SELECT pos, id, receiver, run, at_us FROM pavane.log AS l"
            " LEFT JOIN pavane.partitions AS p USING (target) WHERE pos <="
            " coalesce(p.position, (SELECT min(position) FROM pavane.partitions))"
            " ORDER BY pos LIMIT $1",
            limit,
        )
        stale: list[Any] = []
        for row in rows:
            if row["at_us"] >= before_us:
                break
            stale.append(row)
        if stale:
            await c.execute(
                "DELETE FROM pavane.log WHERE pos = ANY($1)", [row["pos"] for row in stale]
            )
            # While its run goes on a mark stays: it tells where a baton went.
            await c.execute(
                "DELETE FROM pavane.inbox AS i"
                " USING unnest($1::text[], $2::text[], $3::text[]) AS old (id, receiver, run)"
                " WHERE i.id = old.id AND (i.service = old.receiver OR old.receiver = '')"
                " AND NOT EXISTS (SELECT 1 FROM pavane.runs AS r"
                "  WHERE r.id = old.run AND r.service = r.home AND r.ended_us IS NULL)",
                *([row[name] for row in stale] for name in ("id", "receiver", "run")),
            )
        return len(stale)

    async def heard(self) -> bool:
        """Whether wake-ups of other processes arrive; takes a moment to tell after opening."""
        return await self._watch.probed()

    async def describe(self) -> dict[str, str | int | float]:
        row = await self._row(
            "SELECT current_setting('server_version') AS server,"
            " (SELECT value FROM pavane.meta WHERE key = 'schema') AS schema,"
            " pg_database_size(current_database()) AS bytes,"
            f" {_count('runs WHERE service = home')} AS runs,"
            f" {_count('log')} AS messages,"
            f" {_count('parked')} AS parked,"
            " (SELECT coalesce(sum(count), 0)::bigint FROM pavane.event_types) AS events,"
            f" {_count('dead_letters')} AS dead"
        )
        return {
            "kind": "Postgres",
            "place": place_of(self.dsn),
            "postgres": row["server"],
            "schema": int(row["schema"]),
            "bytes": row["bytes"],
            "wake-ups": "NOTIFY" if self._watch.hears else "polling",
            "runs": row["runs"],
            "messages": row["messages"],
            "parked": row["parked"],
            "events": row["events"],
            "dead letters": row["dead"],
        }


_FREE = "UPDATE pavane.partitions SET owner = NULL, clean = false WHERE owner = $1"


async def _prove(c: Connection, fence: Fence) -> None:
    # Not as a lease is renewed: what is done under it here is to outlive a crash of the server.
    sql = (
        "UPDATE pavane.nodes SET expires_us = pavane.clock_us() + $3"
        " WHERE no = $1 AND nonce = $2 RETURNING no"
    )
    if await c.fetchval(sql, fence.node, fence.nonce, fence.lease_us) is None:
        raise LeaseLost(
            f"Node {fence.node} lost its lease (it was silent for longer than "
            f"{fence.lease_us / 1e6:g} s); it stops its runs and joins again."
        )


async def _take_back(fence: Fence, touched: Touched, c: Connection) -> None:
    """Take back what was counted in one partition; see `Store.leave`."""
    await _prove(c, fence)
    await c.execute(
        "UPDATE pavane.runs AS r SET deaths = t.before FROM unnest($1::bigint[], $2::integer[])"
        " AS t (no, before) WHERE r.no = t.no AND r.deaths > t.before",
        list(touched.runs), list(touched.runs.values()),
    )  # fmt: skip
    await c.execute(
        "UPDATE pavane.parked AS p SET deaths = t.before"
        " FROM unnest($1::text[], $2::text[], $3::integer[]) AS t (service, id, before)"
        " WHERE p.service = t.service AND p.id = t.id AND p.deaths > t.before",
        *_columns(2, touched.parked), list(touched.parked.values()),
    )  # fmt: skip
    await c.execute(
        "UPDATE pavane.parked_events AS p SET deaths = t.before"
        " FROM unnest($1::integer[], $2::bigint[], $3::integer[]) AS t (handler, pos, before)"
        " WHERE p.handler = t.handler AND p.pos = t.pos AND p.deaths > t.before",
        *_columns(2, touched.events), list(touched.events.values()),
    )  # fmt: skip
    await c.execute(
        "DELETE FROM pavane.inbox AS i USING unnest($1::text[], $2::text[]) AS t (service, id)"
        " WHERE i.service = t.service AND i.id = t.id",
        *_columns(2, touched.tries),
    )


def _columns(width: int, rows: Iterable[Sequence[Any]]) -> list[list[Any]]:
    """Return rows as what `unnest` takes: one statement for all of them is one answer to wait for.

    `executemany` of a connection that is cut in the middle of it never ends.
    """
    return [list(column) for column in zip(*rows, strict=True)] or [[] for _ in range(width)]


def _count(rows: str) -> str:
    """Return an expression that counts rows as far as a store is counted."""
    return f"(SELECT count(*) FROM (SELECT FROM pavane.{rows} LIMIT {COUNT_MAX + 1}) AS counted)"


def _ticks_us() -> int:
    return time.monotonic_ns() // 1000


def _as_json(value: str | int | float | bool) -> list[str]:
    """Return the JSON texts of a value; a whole number may have been written either way."""
    texts = [msgspec.json.encode(value).decode()]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == int(value):
        texts = [str(int(value)), str(float(value))]
    return texts


def _run(row: Sequence[Any]) -> RunRow:
    values = list(row)
    for at in _RUN_TEXTS:
        if values[at] is not None:
            values[at] = values[at].encode()
    return RunRow(*values)


def _parked(row: Sequence[Any]) -> ParkedRow:
    service, run, id, target, call, attempt, due, began, beat, error, deaths = row
    return ParkedRow(
        service, run, id, target, call.encode(), attempt, due, began, beat.encode(),
        error.encode(), deaths,
    )  # fmt: skip


def _message(row: Sequence[Any]) -> Message:
    kind, id, receiver, run, body, at_us, target, pos = row
    return Message(kind, id, receiver, run, body.encode(), at_us, target, pos)
