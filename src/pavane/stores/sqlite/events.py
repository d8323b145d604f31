"""Events, handlers and conversations in the SQLite store; see `stores/eventlog.py`."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from zlib import crc32

import msgspec

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
    Reaction,
    ShadowRow,
)
from pavane.stores.port import LAST_US
from pavane.stores.sqlite.connection import Connection
from pavane.stores.sqlite.statements import insert_all, statement

EVENTS_HEAD = "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'events'"
SCAN_MAX = 20_000
"""Positions that are looked at in one go, so that it takes milliseconds; others run in between."""
DELETED_AT_ONCE = 5_000
EVENT_COLUMNS = "id, type, version, key, source, at_us, conversation, cause, trace, data, slot, pos"
_OF_CONVERSATION = (
    f"SELECT {EVENT_COLUMNS} FROM events WHERE id = ?3 AND conversation = ?3 UNION ALL"
    f" SELECT {EVENT_COLUMNS} FROM events WHERE conversation = ?3 AND conversation <> id"
)
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


def write_events(c: Connection, events: Sequence[EventRow]) -> None:
    """Append events; one whose id is there already gets position 0."""
    head = c.execute(EVENTS_HEAD).get
    at = head
    rows: list[tuple[Any, ...]] = []
    for at, e in enumerate(events, head + 1):
        e.pos = at
        rows.append(
            (
                at, e.slot, e.id, e.type, e.version, e.key, e.source, e.at_us, e.conversation,
                e.cause, e.trace, e.data.decode(),
            )
        )  # fmt: skip
    if insert_all(c, "add_event", rows) < len(rows):
        found = c.execute("SELECT pos FROM events WHERE pos > ? AND pos <= ?", (head, at))
        new = {pos for (pos,) in found.fetchall()}
        for event in events:
            if event.pos not in new:
                event.pos = 0
    _count(c, Counter((event.type, event.version) for event in events if event.pos))


def _count(c: Connection, counts: Counter[tuple[str, int]]) -> None:
    """Add to how many events of each type and version there are; counting them would read all."""
    c.executemany(statement("count_events"), [(*what, number) for what, number in counts.items()])


def write_reactions(c: Connection, reactions: Sequence[Reaction]) -> None:
    _write_marks(c, reactions)
    for r in reactions:
        for key in r.unparked:
            c.execute(statement("unpark_event"), key)
        if r.parked:
            insert_all(c, "park_event", [_parked_values(row) for row in r.parked])
        for no in r.undead:
            c.execute(statement("drop_dead"), (no,))
        if r.dead:
            insert_all(c, "add_dead", [_dead_values(row) for row in r.dead])
        if r.asked:
            c.executemany(statement("ask_dead"), r.asked)
        for state in r.states:
            key = (state.service, state.name, state.key)
            if state.body is None:
                c.execute(statement("drop_state"), key)
            else:
                c.execute(statement("put_state"), (*key, state.body.decode()))
        if r.shadows:
            rows = [
                (s.handler, s.pos, s.at_us, s.events.decode(), s.error.decode()) for s in r.shadows
            ]
            insert_all(c, "put_shadow", rows)
        for key in r.unawaited:
            c.execute(statement("drop_await"), key)
        if r.awaited:
            rows = [
                (a.service, a.type, a.key, a.run, a.id, a.at_us, a.reply.decode(), a.pos)
                for a in r.awaited
            ]
            insert_all(c, "put_await", rows)
        if r.kept:
            rows = [(k.service, k.type, k.key, k.pos, k.expires_us) for k in r.kept]
            insert_all(c, "keep_event", rows)
        if r.cursors:
            c.executemany(statement("set_cursor"), r.cursors)
        if r.conversations:
            rows = [_conversation_values(row) for row in r.conversations]
            insert_all(c, "put_conversation", rows)
        if r.members:
            insert_all(c, "add_member", r.members)


def _write_marks(c: Connection, reactions: Sequence[Reaction]) -> None:
    """Write marks in few statements, but none before a remark that it may repeat."""
    marks: list[tuple[Any, ...]] = []
    for r in reactions:
        marks += map(_mark_values, r.marks)
        if r.remarks:
            insert_all(c, "add_mark", marks)
            insert_all(c, "put_mark", [_mark_values(row) for row in r.remarks])
            marks.clear()
    insert_all(c, "add_mark", marks)


class EventTables:
    """The reading side, and what is written outside of commits; a part of `SqliteStore`."""

    partitions: int
    _pruned_to: int = 0
    _rows: Callable[..., list[Any]]
    _row: Callable[..., Any]
    _one: Callable[..., Any]

    async def _execute(self, work: Callable[[Connection], Any]) -> Any: ...

    def slot_of(self, key: str, id: str) -> int:
        return crc32((key or id).encode()) % self.partitions

    async def events_head(self) -> int:
        return self._one(EVENTS_HEAD)

    async def read_events(
        self, after: int, until: int, limit: int,
        types: Sequence[str] | None = None, slots: Sequence[int] | None = None,
    ) -> list[EventRow]:  # fmt: skip
        sql = f"SELECT {EVENT_COLUMNS} FROM events WHERE pos > ? AND pos <= ?"
        more: list[Any] = []
        if types is not None:
            sql += " AND type IN (SELECT value FROM json_each(?))"
            more.append(_json(types))
        if slots is not None:
            sql += " AND slot IN (SELECT value FROM json_each(?))"
            more.append(_json(slots))
        sql += " ORDER BY pos LIMIT ?"
        found: list[EventRow] = []
        for at, (low, high) in enumerate(self._pages(after, until)):
            if len(found) >= limit:
                break
            if at:
                await asyncio.sleep(0)
            found += map(_event, self._rows(sql, (low, high, *more, limit - len(found))))
        return found

    def _pages(self, after: int, until: int) -> list[tuple[int, int]]:
        """Split a range of positions into (above, up to) pairs that one statement may look at."""
        if until - after > SCAN_MAX:  # it may be open, and what is pruned need not be looked at
            first, last = self._row(
                "SELECT (SELECT min(pos) FROM events), (SELECT max(pos) FROM events)"
            )
            if first is None:
                return []
            after, until = max(after, first - 1), min(until, last)
        return [(low, min(until, low + SCAN_MAX)) for low in range(after, until, SCAN_MAX)]

    async def find_events(self, which: EventFilter) -> list[EventRow]:
        where, values = ["at_us >= ?"], list[Any]([which.since_us])
        for column in ("key", "source", "cause"):
            value = getattr(which, column)
            if value is not None:
                where.append(f"{column} = ?")
                values.append(value)
        if which.types:
            where.append("type IN (SELECT value FROM json_each(?))")
            values.append(_json(which.types))
        until = LAST_US if which.before is None else which.before - 1
        # Only conversations have an index: each one costs every publish, and people look for what
        # is new, which is found at the log's end.
        if which.conversation is None:
            source, pages = "events", self._pages(0, until)
        else:
            source, pages = f"({_OF_CONVERSATION})", [(0, until)]
            values = [which.conversation, *values]
        sql = (
            f"SELECT {EVENT_COLUMNS} FROM {source} WHERE pos > ?1 AND pos <= ?2"
            f" AND {' AND '.join(where)} ORDER BY pos DESC LIMIT ?"
        )
        found: list[EventRow] = []
        for at, (low, high) in enumerate(reversed(pages)):
            if len(found) >= which.limit:
                break
            if at:
                await asyncio.sleep(0)
            rows = self._rows(sql, (low, high, *values, which.limit - len(found)))
            found += map(_event, rows)
        return found

    async def event(self, id: str) -> EventRow | None:
        row = self._row(f"SELECT {EVENT_COLUMNS} FROM events WHERE id = ?", (id,))
        return row and _event(row)

    async def events_at(self, positions: Sequence[int]) -> dict[int, EventRow]:
        sql = f"SELECT {EVENT_COLUMNS} FROM events WHERE pos IN (SELECT value FROM json_each(?))"
        return {row[-1]: _event(row) for row in self._rows(sql, (_json(positions),))}

    async def event_types(self) -> list[tuple[str, int, int]]:
        return self._rows(
            "SELECT type, max(version), sum(count) FROM event_types GROUP BY type ORDER BY type"
        )

    # -- handlers ------------------------------------------------------------------------------

    async def register_handlers(self, specs: Sequence[HandlerSpec]) -> list[HandlerRow]:
        rows = {(row.service, row.name): row for row in await self.handler_rows()}
        changed = [
            spec for spec in specs
            if (row := rows.get((spec.service, spec.name))) is None
            or sorted(row.types) != sorted(spec.types)
        ]  # fmt: skip
        if changed:
            older = {spec.since_us: await self._older_than(spec.since_us) for spec in changed}

            def write(c: Connection) -> None:
                for spec in changed:
                    self._register(c, spec, older[spec.since_us])

            await self._execute(write)
            rows = {(row.service, row.name): row for row in await self.handler_rows()}
        return [rows[spec.service, spec.name] for spec in specs]

    async def _older_than(self, at_us: int | None) -> int:
        """Return a position up to which no event is of that time or later; None is the end.

        Times need not rise with positions, so this reads from the log's beginning.
        """
        if at_us is None:
            return 0
        sql = (
            "SELECT pos FROM events WHERE pos > ? AND pos <= ? AND at_us >= ? ORDER BY pos LIMIT 1"
        )
        older = 0
        for at, (low, high) in enumerate(self._pages(0, LAST_US)):
            if at:
                await asyncio.sleep(0)
            if found := self._row(sql, (low, high, at_us)):
                return found[0] - 1
            older = high
        return older

    def _register(self, c: Connection, spec: HandlerSpec, older: int) -> None:
        types = _json(sorted(spec.types))
        found = c.execute(
            "UPDATE handlers SET types = ? WHERE service = ? AND name = ? RETURNING no",
            (types, spec.service, spec.name),
        ).fetchall()
        if found:
            return
        no = c.execute(
            "INSERT INTO handlers (service, name, types, created_us)"
            " VALUES (?, ?, ?, CAST(unixepoch('subsec') * 1000000 AS INTEGER)) RETURNING no",
            (spec.service, spec.name, types),
        ).get
        position = c.execute(EVENTS_HEAD).get
        if spec.since_us is not None:
            sql = "SELECT pos FROM events WHERE pos > ? AND at_us >= ? ORDER BY pos LIMIT 1"
            first = c.execute(sql, (older, spec.since_us)).get
            position = position if first is None else first - 1
        c.executemany(
            "INSERT INTO cursors (handler, slot, position) VALUES (?, ?, ?)",
            [(no, slot, position) for slot in range(self.partitions)],
        )

    async def handler_rows(self) -> list[HandlerRow]:
        rows = self._rows(
            "SELECT no, service, name, types, created_us, paused_until_us, reason FROM handlers"
            " ORDER BY service, name"
        )
        return [HandlerRow(n, s, m, msgspec.json.decode(t), *rest) for n, s, m, t, *rest in rows]

    async def pause_handler(self, no: int, until_us: int, reason: str) -> None:
        sql = "UPDATE handlers SET paused_until_us = ?, reason = ? WHERE no = ?"

        def write(c: Connection) -> None:
            c.execute(sql, (until_us, reason, no))

        await self._execute(write)

    async def forget_handler(self, no: int) -> bool:
        def give_up(c: Connection) -> bool:
            if c.execute("SELECT 1 FROM dead_letters WHERE handler = ? LIMIT 1", (no,)).get:
                return False
            # Declared again before its marks are gone, it must not do anything a second time.
            head = c.execute(EVENTS_HEAD).get
            c.execute("UPDATE cursors SET position = ? WHERE handler = ?", (head, no))
            c.execute("DELETE FROM parked_events WHERE handler = ?", (no,))
            return True

        def delete_some(c: Connection, table: str) -> int:
            some = f"SELECT pos FROM {table} WHERE handler = ?1 LIMIT ?2"
            c.execute(
                f"DELETE FROM {table} WHERE handler = ?1 AND pos IN ({some})", (no, DELETED_AT_ONCE)
            )
            return c.changes()

        def delete(c: Connection) -> None:
            c.execute("DELETE FROM cursors WHERE handler = ?", (no,))
            c.execute("DELETE FROM handlers WHERE no = ?", (no,))

        if not await self._execute(give_up):
            return False
        for table in ("marks", "shadows"):
            while await self._execute(partial(delete_some, table=table)):
                await asyncio.sleep(0)
        await self._execute(delete)
        return True

    async def cursors(self, handler: int) -> dict[int, int]:
        return dict(self._rows("SELECT slot, position FROM cursors WHERE handler = ?", (handler,)))

    async def backlog(self, handler: int) -> int:
        sql = (
            "SELECT count(*) FROM events JOIN cursors ON cursors.handler = ?1"
            " AND cursors.slot = events.slot WHERE pos > ?2 AND pos <= ?3 AND pos > position"
            " AND type IN"
            " (SELECT value FROM handlers, json_each(handlers.types) WHERE handlers.no = ?1)"
            " AND NOT EXISTS"
            " (SELECT 1 FROM marks AS m WHERE m.handler = ?1 AND m.pos = events.pos)"
            " AND NOT EXISTS"
            " (SELECT 1 FROM parked_events AS p WHERE p.handler = ?1 AND p.pos = events.pos)"
        )
        count = 0
        lowest = min((await self.cursors(handler)).values(), default=LAST_US)
        for at, (low, high) in enumerate(self._pages(lowest, LAST_US)):
            if at:
                await asyncio.sleep(0)
            count += self._one(sql, (handler, low, high))
        return count

    async def marks(self, handler: int, after: int, until: int) -> list[MarkRow]:
        sql = f"SELECT {_MARK} FROM marks WHERE handler = ? AND pos > ? AND pos <= ? ORDER BY pos"
        return [MarkRow(*row) for row in self._rows(sql, (handler, after, until))]

    async def marks_at(self, positions: Sequence[int]) -> list[MarkRow]:
        sql = (
            f"SELECT {_MARK} FROM json_each(?) AS at CROSS JOIN handlers"
            f" CROSS JOIN marks ON handler = handlers.no AND pos = at.value"
            f" ORDER BY marks.at_us, handler, pos"
        )
        return [MarkRow(*row) for row in self._rows(sql, (_json(positions),))]

    async def parked_events(
        self, handler: int, slots: Sequence[int], after: int, limit: int, key: str | None = None
    ) -> list[ParkedEvent]:
        # Left alone, SQLite looks for a key among all that is parked for the handler.
        index = "" if key is None else " INDEXED BY parked_events_by_key"
        sql = f"SELECT {_PARKED} FROM parked_events{index} WHERE handler = ? AND pos > ?"
        values: list[Any] = [handler, after]
        if key is not None:
            sql += " AND key = ?"
            values.append(key)
        sql += " AND slot IN (SELECT value FROM json_each(?)) ORDER BY pos LIMIT ?"
        return [_parked(row) for row in self._rows(sql, (*values, _json(slots), limit))]

    async def parked_at(self, positions: Sequence[int]) -> list[ParkedEvent]:
        sql = (
            f"SELECT {_PARKED} FROM parked_events WHERE pos IN (SELECT value FROM json_each(?))"
            f" ORDER BY pos, handler"
        )
        return [_parked(row) for row in self._rows(sql, (_json(positions),))]

    async def parked_count(self, handler: int) -> int:
        return self._one("SELECT count(*) FROM parked_events WHERE handler = ?", (handler,))

    async def dead_letters(self, which: DeadFilter) -> list[DeadRow]:
        where, values = _dead_where(which)
        sql = f"SELECT {_DEAD} FROM dead_letters WHERE {where} AND no > ? ORDER BY no LIMIT ?"
        return [_dead(row) for row in self._rows(sql, (*values, which.after, which.limit))]

    async def dead_counts(self, which: DeadFilter) -> list[tuple[int, str, str, int, int, int]]:
        where, values = _dead_where(which)
        return self._rows(
            f"SELECT handler, type, cause, count(*), min(at_us), max(at_us) FROM dead_letters"
            f" WHERE {where} GROUP BY handler, type, cause "
            f" ORDER BY count(*) DESC, handler, type, cause",
            values,
        )

    async def state(self, service: str, name: str, key: str) -> bytes | None:
        sql = "SELECT body FROM states WHERE service = ? AND name = ? AND key = ?"
        row = self._row(sql, (service, name, key))
        return None if row is None else row[0].encode()

    async def shadows(self, handler: int, limit: int) -> list[ShadowRow]:
        rows = self._rows(
            "SELECT handler, pos, at_us, events, error FROM shadows WHERE handler = ?"
            " ORDER BY pos DESC LIMIT ?",
            (handler, limit),
        )
        return [ShadowRow(h, p, at, ev.encode(), er.encode()) for h, p, at, ev, er in rows]

    # -- mailbox -------------------------------------------------------------------------------

    async def awaits(self, service: str, type: str, key: str) -> list[AwaitRow]:
        sql = (
            f"SELECT {_AWAIT} FROM awaits WHERE service = ? AND type = ? AND key = ?"
            f" ORDER BY at_us, run, id"
        )
        return [_await(row) for row in self._rows(sql, (service, type, key))]

    async def awaits_like(self, service: str, types: str) -> list[AwaitRow]:
        sql = (
            f"SELECT {_AWAIT} FROM awaits WHERE service = ? AND type >= ? AND type < ?"
            f" ORDER BY at_us, run, id"
        )
        return [_await(row) for row in self._rows(sql, (service, types, f"{types}\U0010ffff"))]

    async def awaits_of(self, run: str) -> list[AwaitRow]:
        sql = f"SELECT {_AWAIT} FROM awaits WHERE run = ? ORDER BY at_us, id"
        return [_await(row) for row in self._rows(sql, (run,))]

    async def kept_events(self, service: str, type: str, key: str) -> list[KeptRow]:
        rows = self._rows(
            "SELECT service, type, key, pos, expires_us FROM kept_events"
            " WHERE service = ? AND type = ? AND key = ? ORDER BY pos",
            (service, type, key),
        )
        return [KeptRow(*row) for row in rows]

    # -- conversations -------------------------------------------------------------------------

    async def conversations(self, which: ConversationFilter) -> list[ConversationRow]:
        where, values = ["1"], list[Any]()
        index = "conversations_started"
        if which.contract is not None:
            where.append("contract = ?")
            values.append(which.contract)
        if which.key is not None:
            where.append("key = ?")
            values.append(which.key)
        if which.state == "open":
            where.append("ended_us IS NULL")
            index = "conversations_due"
        elif which.state == "overdue":
            where.append("ended_us IS NULL AND due_us <= ?")
            values.append(which.now_us)
            index = "conversations_due"
        elif which.state == "unraised":
            where.append("ended_us IS NULL AND raised = 0 AND due_us <= ?")
            values.append(which.now_us)
            index = "conversations_unraised"
        elif which.state == "ended":
            where.append("ended_us IS NOT NULL")
        elif which.state == "twice":
            where.append("ends > 1")
            index = "conversations_twice"
        source = f"conversations INDEXED BY {index}"
        if which.id is not None:
            where.append("id = ?")
            values.append(which.id)
            source = "conversations"
        # Left alone, SQLite sorts all conversations of a contract to find the newest few.
        sql = (
            f"SELECT {_CONVERSATION} FROM {source} WHERE {' AND '.join(where)}"
            f" ORDER BY started_us DESC, contract, id LIMIT ?"
        )
        return [_conversation(row) for row in self._rows(sql, (*values, which.limit))]

    async def conversation(self, contract: str, id: str) -> ConversationRow | None:
        sql = f"SELECT {_CONVERSATION} FROM conversations WHERE contract = ? AND id = ?"
        row = self._row(sql, (contract, id))
        return row and _conversation(row)

    async def runs_in(self, conversation: str) -> list[str]:
        roots = self._rows("SELECT run FROM members WHERE conversation = ?", (conversation,))
        found: dict[str, None] = {}
        for (root,) in [(conversation,), *roots]:
            rows = self._rows(
                "SELECT DISTINCT id FROM runs WHERE id = ?1 OR id > ?1 || '/' AND id < ?1 || '0'"
                " ORDER BY id",
                (root,),
            )
            found.update(dict.fromkeys(id for (id,) in rows))
        return list(found)

    async def prune_events(self, before_us: int, limit: int) -> int:
        def delete(c: Connection) -> int:
            expired = _delete_some(c, "unkeep_events", before_us, limit)
            events = self._prunable(c, before_us, limit)
            _delete_events(c, events)
            over = _delete_some(c, "drop_given_awaits", before_us, limit)
            ended = _delete_some(c, "drop_ended_conversations", before_us, limit)
            return expired + len(events) + over + ended

        return await self._execute(delete)

    def _prunable(self, c: Connection, before_us: int, limit: int) -> list[_Prunable]:
        """Find events to delete, from where the last call stopped looking.

        Much may be held for long at the log's beginning, and that is not looked at each time.
        Times need not rise with positions, so only a stretch of young events ends the search.
        """
        handled = dict(c.execute("SELECT slot, min(position) FROM cursors GROUP BY slot"))
        head = c.execute(EVENTS_HEAD).get
        first = c.execute("SELECT min(pos) FROM events").get or head
        after = max(self._pruned_to, first - 1)
        until = min(after + SCAN_MAX, head, max(handled.values(), default=head))
        found: list[_Prunable] = []
        young = 0
        self._pruned_to = until if until == after + SCAN_MAX else 0
        rows = c.execute(statement("prunable"), (after, until))
        for pos, slot, type, version, at_us in rows:
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
        rows.close(True)
        return found


_Prunable = tuple[int, str, int]
"""Position, type and version of an event that may go."""


def _delete_events(c: Connection, events: Sequence[_Prunable]) -> None:
    positions = [(pos,) for pos, _, _ in events]
    c.executemany("DELETE FROM events WHERE pos = ?", positions)
    for (no,) in c.execute("SELECT no FROM handlers").fetchall():
        of_handler = [(no, pos) for (pos,) in positions]
        c.executemany("DELETE FROM marks WHERE handler = ? AND pos = ?", of_handler)
        c.executemany("DELETE FROM shadows WHERE handler = ? AND pos = ?", of_handler)
    gone = Counter((type, version) for _, type, version in events)
    _count(c, Counter({what: -number for what, number in gone.items()}))
    c.execute("DELETE FROM event_types WHERE count = 0")


def _delete_some(c: Connection, name: str, before_us: int, limit: int) -> int:
    c.execute(statement(name), (before_us, limit))
    return c.changes()


def _json(values: Sequence[Any]) -> str:
    return msgspec.json.encode(list(values)).decode()


def _dead_where(which: DeadFilter) -> tuple[str, list[Any]]:
    where, values = ["1"], list[Any]()
    for column in ("type", "key", "cause"):
        value = getattr(which, column)
        if value is not None:
            where.append(f"{column} = ?")
            values.append(value)
    for column, wanted in (
        ("handler", which.handlers or None), ("no", which.numbers or None),
        ("slot", which.slots), ("pos", which.positions or None),
    ):  # fmt: skip
        if wanted is not None:
            where.append(f"{column} IN (SELECT value FROM json_each(?))")
            values.append(_json(wanted))
    if which.holding:
        where.append("holds = 1")
    return " AND ".join(where), values


def _event(row: Sequence[Any]) -> EventRow:
    id, type, version, key, source, at_us, conversation, cause, trace, data, slot, pos = row
    return EventRow(
        id, type, version, key, source, at_us, conversation, cause, trace, data.encode(), slot, pos
    )


def _mark_values(r: MarkRow) -> tuple[Any, ...]:
    return (r.handler, r.pos, r.at_us, r.took_us, r.attempts, r.outcome, r.by)


def _parked_values(r: ParkedEvent) -> tuple[Any, ...]:
    return (
        r.handler, r.pos, r.slot, r.key, r.attempt, r.due_us, r.began_us, r.error.decode(),
        r.deaths, r.again, None if r.data is None else r.data.decode(), r.dead,
    )  # fmt: skip


def _parked(row: Sequence[Any]) -> ParkedEvent:
    handler, pos, slot, key, attempt, due, began, error, deaths, again, data, dead = row
    return ParkedEvent(
        handler, pos, slot, key, attempt, due, began, error.encode(), deaths, again,
        None if data is None else data.encode(), dead,
    )  # fmt: skip


def _dead_values(r: DeadRow) -> tuple[Any, ...]:
    return (
        r.handler, r.pos, r.slot, r.key, r.type, r.event, r.at_us, r.attempts, r.cause,
        r.error.decode(), r.data.decode(), int(r.holds), r.asked, r.again,
    )  # fmt: skip


def _dead(row: Sequence[Any]) -> DeadRow:
    values = list(row)
    values[10], values[11], values[12] = row[10].encode(), row[11].encode(), bool(row[12])
    return DeadRow(*values)


def _await(row: Sequence[Any]) -> AwaitRow:
    service, type, key, run, id, at_us, reply, pos = row
    return AwaitRow(service, type, key, run, id, at_us, reply.encode(), pos)


def _conversation_values(r: ConversationRow) -> tuple[Any, ...]:
    return (
        r.contract, r.id, r.key, r.started_us, r.due_us, r.ended_us, r.end, r.ends, r.last,
        r.last_us, r.milestones.decode(), int(r.raised),
    )  # fmt: skip


def _conversation(row: Sequence[Any]) -> ConversationRow:
    values = list(row)
    values[10], values[11] = row[10].encode(), bool(row[11])
    return ConversationRow(*values)
