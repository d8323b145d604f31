"""Events, handlers and conversations in the Postgres store; see `stores/eventlog.py`."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from zlib import crc32

from pavane.stores.eventlog import (
    AwaitRow,
    ConversationFilter,
    ConversationRow,
    DeadFilter,
    DeadRow,
    EventFilter,
    EventRow,
    HandlerRow,
    HandlerSpec,
    KeptRow,
    MarkRow,
    ParkedEvent,
    ShadowRow,
)
from pavane.stores.postgres.connection import Connection

SCAN_MAX = 20_000
"""Positions that one search for what may be pruned looks at."""
DELETED_AT_ONCE = 5_000
EVENT_COLUMNS = "id, type, version, key, source, at_us, conversation, cause, trace, data, slot, pos"
_MARK = "handler, pos, at_us, took_us, attempts, outcome, variant"
_PARKED = "handler, pos, slot, key, attempt, due_us, began_us, error, deaths, again, data, dead"
_DEAD = (
    "no, handler, pos, slot, key, type, event, at_us, attempts, cause, error, data, holds, asked,"
    " again"
)
_AWAIT = "service, type, key, run, id, at_us, reply, pos"
_CONVERSATION = (
    "contract, id, key, started_us, due_us, ended_us, first_end, ends, last, last_us, milestones,"
    " raised"
)


class EventTables:
    """The reading side, and what is written outside of commits; a part of `PostgresStore`."""

    partitions: int
    _pruned_to: int = 0

    async def _rows(self, sql: str, *values: Any) -> list[Any]: ...
    async def _row(self, sql: str, *values: Any) -> Any: ...
    async def _one(self, sql: str, *values: Any) -> Any: ...
    async def _execute(self, work: Callable[[Connection], Awaitable[Any]]) -> Any: ...
    async def _execute_aside(self, work: Callable[[Connection], Awaitable[Any]]) -> Any: ...

    def slot_of(self, key: str, id: str) -> int:
        return crc32((key or id).encode()) % self.partitions

    async def events_head(self) -> int:
        sql = (
            "SELECT events, EXISTS (SELECT FROM pavane.outbox)"
            " AND has_table_privilege('pavane.outbox', 'DELETE') FROM pavane.heads"
        )
        while True:
            head, staged = await self._row(sql)
            if not staged:
                return head
            # Transactions of users' published: whoever looks first, and may, moves that to the log.
            await self._execute(lambda c: c.execute("SELECT pavane.relay_1()"))

    async def _events(self, where: str, *values: Any) -> list[EventRow]:
        sql = f"SELECT {EVENT_COLUMNS} FROM pavane.events WHERE {where}"
        return [_event(row) for row in await self._rows(sql, *values)]

    async def read_events(
        self, after: int, until: int, limit: int,
        types: Sequence[str] | None = None, slots: Sequence[int] | None = None,
    ) -> list[EventRow]:  # fmt: skip
        return await self._events(
            "pos > $1 AND pos <= $2 AND ($3::text[] IS NULL OR type = ANY($3))"
            " AND ($4::int[] IS NULL OR slot = ANY($4)) ORDER BY pos LIMIT $5",
            after, until, None if types is None else list(types),
            None if slots is None else list(slots), limit,
        )  # fmt: skip

    async def find_events(self, which: EventFilter) -> list[EventRow]:
        where = _Where("at_us >= {}", which.since_us)
        if which.before is not None:
            where.add("pos < {}", which.before)
        for column in ("key", "source", "cause"):
            value = getattr(which, column)
            if value is not None:
                where.add(f"{column} = {{}}", value)
        if which.types:
            where.add("type = ANY({})", list(which.types))
        # Only conversations have an index: each one costs every publish, and people look for what
        # is new, which is found at the log's end.
        if which.conversation is not None:
            where.add(
                "(id = {0} AND conversation = {0} OR conversation = {0} AND conversation <> id)",
                which.conversation,
            )
        limit = where.given(which.limit)
        return await self._events(f"{where} ORDER BY pos DESC LIMIT {limit}", *where.values)

    async def event(self, id: str) -> EventRow | None:
        rows = await self._events("id = $1", id)
        return rows[0] if rows else None

    async def events_at(self, positions: Sequence[int]) -> dict[int, EventRow]:
        return {row.pos: row for row in await self._events("pos = ANY($1)", list(positions))}

    async def event_types(self) -> list[tuple[str, int, int]]:
        rows = await self._rows(
            "SELECT type, max(version), sum(count)::bigint FROM pavane.event_types"
            " GROUP BY type ORDER BY type"
        )
        return [tuple(row) for row in rows]

    # -- handlers ------------------------------------------------------------------------------

    async def register_handlers(self, specs: Sequence[HandlerSpec]) -> list[HandlerRow]:
        rows = {(row.service, row.name): row for row in await self.handler_rows()}
        changed = [
            spec for spec in specs
            if (row := rows.get((spec.service, spec.name))) is None
            or sorted(row.types) != sorted(spec.types)
        ]  # fmt: skip
        if changed:

            async def write(c: Connection) -> None:
                for spec in sorted(changed, key=lambda spec: (spec.service, spec.name)):
                    await self._register(c, spec)

            await self._execute(write)
            rows = {(row.service, row.name): row for row in await self.handler_rows()}
        return [rows[spec.service, spec.name] for spec in specs]

    async def _register(self, c: Connection, spec: HandlerSpec) -> None:
        values = (spec.service, spec.name, sorted(spec.types))
        update = (
            "UPDATE pavane.handlers SET types = $3 WHERE service = $1 AND name = $2 RETURNING no"
        )
        if await c.fetchval(update, *values) is not None:
            return
        no = await c.fetchval(
            "INSERT INTO pavane.handlers (service, name, types, created_us)"
            " VALUES ($1, $2, $3, pavane.clock_us()) ON CONFLICT (service, name) DO NOTHING"
            " RETURNING no",
            *values,
        )  # fmt: skip
        if no is None:
            return  # another node made it known at the same time
        position = await c.fetchval("SELECT events FROM pavane.heads")
        if spec.since_us is not None:
            # Times need not rise with positions, so this reads from the log's beginning.
            sql = "SELECT pos FROM pavane.events WHERE at_us >= $1 ORDER BY pos LIMIT 1"
            first = await c.fetchval(sql, spec.since_us)
            position = position if first is None else first - 1
        await c.execute(
            "INSERT INTO pavane.cursors (handler, slot, position)"
            " SELECT $1, slot, $2 FROM generate_series(0, $3 - 1) AS slot",
            no, position, self.partitions,
        )  # fmt: skip

    async def handler_rows(self) -> list[HandlerRow]:
        rows = await self._rows(
            "SELECT no, service, name, types, created_us, paused_until_us, reason"
            " FROM pavane.handlers ORDER BY service, name"
        )
        return [HandlerRow(*row) for row in rows]

    async def pause_handler(self, no: int, until_us: int, reason: str) -> None:
        sql = "UPDATE pavane.handlers SET paused_until_us = $2, reason = $3 WHERE no = $1"
        await self._execute(lambda c: c.execute(sql, no, until_us, reason))

    async def forget_handler(self, no: int) -> bool:
        async def give_up(c: Connection) -> bool:
            sql = "SELECT 1 FROM pavane.dead_letters WHERE handler = $1 LIMIT 1"
            if await c.fetchval(sql, no) is not None:
                return False
            # Declared again before its marks are gone, it must not do anything a second time.
            await c.execute(
                "UPDATE pavane.cursors SET position = (SELECT events FROM pavane.heads)"
                " WHERE handler = $1",
                no,
            )
            await c.execute("DELETE FROM pavane.parked_events WHERE handler = $1", no)
            return True

        async def delete_some(c: Connection, table: str) -> int:
            return await c.fetchval(
                f"WITH gone AS (DELETE FROM pavane.{table} WHERE handler = $1 AND pos IN"
                f" (SELECT pos FROM pavane.{table} WHERE handler = $1 LIMIT $2) RETURNING 1)"
                f" SELECT count(*) FROM gone",
                no, DELETED_AT_ONCE,
            )  # fmt: skip

        async def delete(c: Connection) -> None:
            await c.execute("DELETE FROM pavane.cursors WHERE handler = $1", no)
            await c.execute("DELETE FROM pavane.handlers WHERE no = $1", no)

        if not await self._execute(give_up):
            return False
        for table in ("marks", "shadows"):
            while await self._execute(lambda c, table=table: delete_some(c, table)):
                await asyncio.sleep(0)
        await self._execute(delete)
        return True

    async def cursors(self, handler: int) -> dict[int, int]:
        sql = "SELECT slot, position FROM pavane.cursors WHERE handler = $1"
        return dict(await self._rows(sql, handler))

    async def backlog(self, handler: int) -> int:
        return await self._one(
            "SELECT count(*) FROM pavane.events AS e"
            " JOIN pavane.cursors AS c ON c.handler = $1 AND c.slot = e.slot"
            " WHERE e.pos > c.position"
            " AND e.pos > (SELECT min(position) FROM pavane.cursors WHERE handler = $1)"
            " AND e.type = ANY (SELECT unnest(types) FROM pavane.handlers WHERE no = $1)"
            " AND NOT EXISTS"
            " (SELECT FROM pavane.marks AS m WHERE m.handler = $1 AND m.pos = e.pos)"
            " AND NOT EXISTS"
            " (SELECT FROM pavane.parked_events AS p WHERE p.handler = $1 AND p.pos = e.pos)",
            handler,
        )

    async def marks(self, handler: int, after: int, until: int) -> list[MarkRow]:
        sql = (
            f"SELECT {_MARK} FROM pavane.marks WHERE handler = $1 AND pos > $2 AND pos <= $3"
            f" ORDER BY pos"
        )
        return [MarkRow(*row) for row in await self._rows(sql, handler, after, until)]

    async def marks_at(self, positions: Sequence[int]) -> list[MarkRow]:
        sql = (
            f"SELECT {_MARK} FROM pavane.marks"
            f" WHERE handler = ANY (SELECT no FROM pavane.handlers) AND pos = ANY($1)"
            f" ORDER BY at_us, handler, pos"
        )
        return [MarkRow(*row) for row in await self._rows(sql, list(positions))]

    async def parked_events(
        self, handler: int, slots: Sequence[int], after: int, limit: int, key: str | None = None
    ) -> list[ParkedEvent]:
        where = _Where("handler = {}", handler)
        where.add("pos > {}", after)
        if key is not None:
            where.add("key = {}", key)
        where.add("slot = ANY({})", list(slots))
        order = f"ORDER BY pos LIMIT {where.given(limit)}"
        sql = f"SELECT {_PARKED} FROM pavane.parked_events WHERE {where} {order}"
        return [_parked(row) for row in await self._rows(sql, *where.values)]

    async def parked_at(self, positions: Sequence[int]) -> list[ParkedEvent]:
        sql = (
            f"SELECT {_PARKED} FROM pavane.parked_events WHERE pos = ANY($1) ORDER BY pos, handler"
        )
        return [_parked(row) for row in await self._rows(sql, list(positions))]

    async def parked_count(self, handler: int) -> int:
        sql = "SELECT count(*) FROM pavane.parked_events WHERE handler = $1"
        return await self._one(sql, handler)

    async def dead_letters(self, which: DeadFilter) -> list[DeadRow]:
        where = _dead_where(which)
        where.add("no > {}", which.after)
        order = f"ORDER BY no LIMIT {where.given(which.limit)}"
        sql = f"SELECT {_DEAD} FROM pavane.dead_letters WHERE {where} {order}"
        return [_dead(row) for row in await self._rows(sql, *where.values)]

    async def dead_counts(self, which: DeadFilter) -> list[tuple[int, str, str, int, int, int]]:
        where = _dead_where(which)
        rows = await self._rows(
            f"SELECT handler, type, cause, count(*), min(at_us), max(at_us)"
            f" FROM pavane.dead_letters WHERE {where} GROUP BY handler, type, cause"
            f" ORDER BY count(*) DESC, handler, type, cause",
            *where.values,
        )
        return [tuple(row) for row in rows]

    async def state(self, service: str, name: str, key: str) -> bytes | None:
        sql = "SELECT body FROM pavane.states WHERE service = $1 AND name = $2 AND key = $3"
        body = await self._one(sql, service, name, key)
        return None if body is None else body.encode()

    async def shadows(self, handler: int, limit: int) -> list[ShadowRow]:
        rows = await self._rows(
            "SELECT handler, pos, at_us, events, error FROM pavane.shadows WHERE handler = $1"
            " ORDER BY pos DESC LIMIT $2",
            handler, limit,
        )  # fmt: skip
        return [ShadowRow(h, p, at, ev.encode(), er.encode()) for h, p, at, ev, er in rows]

    # -- mailbox -------------------------------------------------------------------------------

    async def awaits(self, service: str, type: str, key: str) -> list[AwaitRow]:
        sql = (
            f"SELECT {_AWAIT} FROM pavane.awaits WHERE service = $1 AND type = $2 AND key = $3"
            f" ORDER BY at_us, run, id"
        )
        return [_await(row) for row in await self._rows(sql, service, type, key)]

    async def awaits_like(self, service: str, types: str) -> list[AwaitRow]:
        sql = (
            f"SELECT {_AWAIT} FROM pavane.awaits WHERE service = $1 AND type >= $2 AND type < $3"
            f" ORDER BY at_us, run, id"
        )
        rows = await self._rows(sql, service, types, f"{types}\U0010ffff")
        return [_await(row) for row in rows]

    async def awaits_of(self, run: str) -> list[AwaitRow]:
        sql = f"SELECT {_AWAIT} FROM pavane.awaits WHERE run = $1 ORDER BY at_us, id"
        return [_await(row) for row in await self._rows(sql, run)]

    async def kept_events(self, service: str, type: str, key: str) -> list[KeptRow]:
        rows = await self._rows(
            "SELECT service, type, key, pos, expires_us FROM pavane.kept_events"
            " WHERE service = $1 AND type = $2 AND key = $3 ORDER BY pos",
            service, type, key,
        )  # fmt: skip
        return [KeptRow(*row) for row in rows]

    # -- conversations -------------------------------------------------------------------------

    async def conversations(self, which: ConversationFilter) -> list[ConversationRow]:
        where = _Where("true")
        for column in ("contract", "id", "key"):
            value = getattr(which, column)
            if value is not None:
                where.add(f"{column} = {{}}", value)
        if which.state in ("open", "overdue", "unraised"):
            where.add("ended_us IS NULL")
        if which.state in ("overdue", "unraised"):
            where.add("due_us <= {}", which.now_us)
        if which.state == "unraised":
            where.add("NOT raised")
        elif which.state == "ended":
            where.add("ended_us IS NOT NULL")
        elif which.state == "twice":
            where.add("ends > 1")
        order = f"ORDER BY started_us DESC, contract, id LIMIT {where.given(which.limit)}"
        sql = f"SELECT {_CONVERSATION} FROM pavane.conversations WHERE {where} {order}"
        return [_conversation(row) for row in await self._rows(sql, *where.values)]

    async def conversation(self, contract: str, id: str) -> ConversationRow | None:
        sql = f"SELECT {_CONVERSATION} FROM pavane.conversations WHERE id = $1 AND contract = $2"
        row = await self._row(sql, id, contract)
        return row and _conversation(row)

    async def runs_in(self, conversation: str) -> list[str]:
        sql = "SELECT run FROM pavane.members WHERE conversation = $1 ORDER BY run"
        rows = await self._rows(sql, conversation)
        found: dict[str, None] = {}
        for root in [conversation, *(row[0] for row in rows)]:
            rows = await self._rows(
                "SELECT DISTINCT id FROM pavane.runs"
                " WHERE id = $1 OR id > $1 || '/' AND id < $1 || '0' ORDER BY id",
                root,
            )
            found.update(dict.fromkeys(row[0] for row in rows))
        return list(found)

    async def prune_events(self, before_us: int, limit: int) -> int:
        async def delete(c: Connection) -> int:
            expired = await _count(c, _UNKEEP, before_us, limit)
            events = await self._prunable(c, before_us, limit)
            await _delete_events(c, events)
            over = await _count(c, _DROP_GIVEN, before_us, limit)
            ended = await _count(c, _DROP_ENDED, before_us, limit)
            return expired + len(events) + over + ended

        return await self._execute_aside(delete)

    async def _prunable(self, c: Connection, before_us: int, limit: int) -> list[_Prunable]:
        """Find events to delete, from where the last call stopped looking.

        Much may be held for long at the log's beginning, and that is not looked at each time.
        Times need not rise with positions, so only a stretch of young events ends the search.
        """
        handled = dict(
            await c.fetch("SELECT slot, min(position) FROM pavane.cursors GROUP BY slot")
        )
        head = await c.fetchval("SELECT events FROM pavane.heads")
        first = await c.fetchval("SELECT min(pos) FROM pavane.events") or head
        after = max(self._pruned_to, first - 1)
        until = min(after + SCAN_MAX, head, max(handled.values(), default=head))
        found: list[_Prunable] = []
        young = 0
        self._pruned_to = until if until == after + SCAN_MAX else 0
        for pos, slot, type, version, at_us in await c.fetch(_PRUNABLE, after, until):
            if at_us >= before_us:
                young += 1
            elif pos <= handled.get(slot, pos):
                found.append((pos, type, version))
            if len(found) == limit:
                self._pruned_to = pos
                break
            if young == limit:
                self._pruned_to = 0
                break
        return found


_Prunable = tuple[int, str, int]
"""Position, type and version of an event that may go."""

_PRUNABLE = (
    "SELECT pos, slot, type, version, at_us FROM pavane.events AS e WHERE pos > $1 AND pos <= $2"
    " AND NOT EXISTS (SELECT FROM pavane.parked_events AS p WHERE p.pos = e.pos)"
    " AND NOT EXISTS (SELECT FROM pavane.dead_letters AS d WHERE d.pos = e.pos)"
    " AND NOT EXISTS (SELECT FROM pavane.kept_events AS k WHERE k.pos = e.pos) ORDER BY pos"
)
_UNKEEP = (
    "DELETE FROM pavane.kept_events WHERE (service, type, key, pos) IN"
    " (SELECT service, type, key, pos FROM pavane.kept_events WHERE expires_us < $1 LIMIT $2)"
)
# As long as the event is there, a run that asks again gets the same one.
_DROP_GIVEN = (
    "DELETE FROM pavane.awaits WHERE (run, id) IN (SELECT run, id FROM pavane.awaits AS a"
    " WHERE pos > 0 AND at_us < $1"
    " AND NOT EXISTS (SELECT FROM pavane.events AS e WHERE e.pos = a.pos) LIMIT $2)"
)
_DROP_ENDED = (
    "DELETE FROM pavane.conversations WHERE (id, contract) IN"
    " (SELECT id, contract FROM pavane.conversations WHERE ended_us < $1 LIMIT $2)"
)


async def _count(c: Connection, delete: str, *values: Any) -> int:
    return int((await c.execute(delete, *values)).split()[-1])


async def _delete_events(c: Connection, events: Sequence[_Prunable]) -> None:
    if not events:
        return
    positions = [pos for pos, _, _ in events]
    await c.execute("DELETE FROM pavane.events WHERE pos = ANY($1)", positions)
    handlers = [row[0] for row in await c.fetch("SELECT no FROM pavane.handlers")]
    for table in ("marks", "shadows"):
        await c.execute(
            f"DELETE FROM pavane.{table} WHERE handler = ANY($1) AND pos = ANY($2)",
            handlers, positions,
        )  # fmt: skip
    gone = Counter((type, version) for _, type, version in events)
    await c.executemany(
        "UPDATE pavane.event_types SET count = count - $3 WHERE type = $1 AND version = $2",
        [(*what, number) for what, number in sorted(gone.items())],
    )
    await c.execute("DELETE FROM pavane.event_types WHERE count = 0")


class _Where:
    """A condition and its values, which grow together."""

    def __init__(self, condition: str, *values: Any) -> None:
        self.values: list[Any] = []
        self._conditions: list[str] = []
        self.add(condition, *values)

    def add(self, condition: str, *values: Any) -> None:
        self._conditions.append(condition.format(*map(self.given, values)))

    def given(self, value: Any) -> str:
        self.values.append(value)
        return f"${len(self.values)}"

    def __str__(self) -> str:
        return " AND ".join(self._conditions)


def _dead_where(which: DeadFilter) -> _Where:
    where = _Where("true")
    for column in ("type", "key", "cause"):
        value = getattr(which, column)
        if value is not None:
            where.add(f"{column} = {{}}", value)
    for column, wanted in (
        ("handler", which.handlers or None), ("no", which.numbers or None),
        ("slot", which.slots), ("pos", which.positions or None),
    ):  # fmt: skip
        if wanted is not None:
            where.add(f"{column} = ANY({{}})", list(wanted))
    if which.holding:
        where.add("holds")
    return where


def _event(row: Sequence[Any]) -> EventRow:
    id, type, version, key, source, at_us, conversation, cause, trace, data, slot, pos = row
    return EventRow(
        id, type, version, key, source, at_us, conversation, cause, trace, data.encode(), slot, pos
    )


def _parked(row: Sequence[Any]) -> ParkedEvent:
    handler, pos, slot, key, attempt, due, began, error, deaths, again, data, dead = row
    return ParkedEvent(
        handler, pos, slot, key, attempt, due, began, error.encode(), deaths, again,
        None if data is None else data.encode(), dead,
    )  # fmt: skip


def _dead(row: Sequence[Any]) -> DeadRow:
    values = list(row)
    values[10], values[11] = row[10].encode(), row[11].encode()
    return DeadRow(*values)


def _await(row: Sequence[Any]) -> AwaitRow:
    service, type, key, run, id, at_us, reply, pos = row
    return AwaitRow(service, type, key, run, id, at_us, reply.encode(), pos)


def _conversation(row: Sequence[Any]) -> ConversationRow:
    values = list(row)
    values[10] = row[10].encode()
    return ConversationRow(*values)
