"""The embedded store on APSW: WAL, `synchronous=FULL`, one transaction a batch.

Guarantees: a commit that was acknowledged survives kill -9 and power loss; a batch under a lost
lease is refused whole, since every batch renews the lease row in its own transaction and SQLite
has one writer at a time; log positions are assigned under that same lock, so their order is commit
order and a reader never skips. A small batch is written on the event loop's thread while that
takes less than a thread hop would; anything else on a writer thread.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from zlib import crc32

import apsw
import msgspec

from pavane.errors import LeaseLost, PavaneError, StoreError, WorkFailed
from pavane.stores.port import (
    COUNT_MAX,
    LAST_US,
    Commit,
    Conflict,
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
    broken_chain,
    no_text,
)
from pavane.stores.sqlite.connection import Connection, connect
from pavane.stores.sqlite.events import EventTables, write_events, write_reactions
from pavane.stores.sqlite.statements import insert_all, migrations, statement
from pavane.stores.sqlite.work import do_work

APPLICATION_ID = 0x50415641  # "PAVA"
SLOTS = 1024
"""Targets are `service number * SLOTS + partition`."""
PREFIXED_MAX = 1000
"""So many runs whose ids begin alike are sorted; where there are more, all are gone through."""
INLINE_MAX_COMMITS = 4
INLINE_MAX_S = 0.002
BUSY_MS = 20_000
SWITCH_INTERVAL_S = 0.0001
NOW = "CAST(unixepoch('subsec') * 1000000 AS INTEGER)"

LOG_HEAD = "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'log'"
OF_ONE_COMMIT = (apsw.ConstraintError, apsw.TooBigError, apsw.MismatchError)
"""Errors for which one commit is to blame; any other of APSW's is about the file or the disk."""
REPEATED = {apsw.SQLITE_CONSTRAINT_UNIQUE, apsw.SQLITE_CONSTRAINT_PRIMARYKEY}

_RUN_COLUMNS = ", ".join(RunRow.__struct_fields__)
_RUN_TEXTS = [
    RunRow.__struct_fields__.index(name) for name in ("header", "trail", "attributes", "result")
]
_PARKED_COLUMNS = ", ".join(ParkedRow.__struct_fields__)

Results = Sequence[PavaneError | None]


class SqliteStore(EventTables):
    """See the module. `path` is a file; its directory must exist."""

    features = Features(durable=True, shared=True, transactions=True)

    def __init__(self, path: str | os.PathLike[str], *, partitions: int = 32) -> None:
        self.path = Path(path).absolute()
        self.partitions = partitions
        self.tail = 0
        self._services: dict[str, int] = {}
        self._lock = threading.Lock()
        self._lease_lock = threading.Lock()
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._inline_s = 0.0
        self._version = -1
        self._appended = (-1, -1)
        self._pid = 0
        self._opened: list[Connection] = []

    # -- opening -------------------------------------------------------------------------------

    def connect(self) -> SqliteStore:
        return SqliteStore(self.path, partitions=self.partitions)

    async def open(self) -> None:
        if self._opened:
            raise StoreError(
                f"{self.path} is open already. Give each client a store of its own: the file is "
                f"what they share."
            )
        self._loop = asyncio.get_running_loop()
        self._services.clear()
        self._connect_all()

    async def reopen(self) -> None:
        if self._pid not in (0, os.getpid()):
            raise self._unusable()
        await self._stop_writer()
        # Nothing is awaited from here on: whoever reads never finds the store closed.
        self._pid = 0
        self._close_all()
        try:
            self._connect_all()
        finally:
            while not self._pid and not self._jobs.empty():
                if (job := self._jobs.get()) is not None:
                    job()  # it is refused, since its connection is closed

    def _connect_all(self) -> None:
        self._version = -1
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))
        try:
            self._write_to = self._connect()
            self._prepare(self._write_to)
            self._read_from = self._connect()
            self._lease_by = self._connect()
            self.tail = self._read_from.execute(LOG_HEAD).get
        except apsw.Error as error:
            self._close_all()
            raise self._explained(error) from error
        except BaseException:
            self._close_all()
            raise
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._write_jobs, name="pavane-writer", daemon=True)
        self._thread.start()

    def _connect(self) -> Connection:
        connection = connect(str(self.path))
        self._opened.append(connection)
        connection.set_busy_timeout(BUSY_MS)
        connection.setlk_timeout(BUSY_MS, 0)
        if connection.readonly("main"):  # else SQLite would say so at the first write only
            raise self._explained(apsw.ReadOnlyError())
        self._check_owner(connection)
        for pragma, wanted in (("journal_mode", "wal"), ("synchronous", 2)):
            _patiently(connection, f"PRAGMA {pragma} = {wanted}")
            got = connection.execute(f"PRAGMA {pragma}").get
            if got != wanted:
                raise StoreError(
                    f"{self.path} cannot be used safely: SQLite gives {pragma}={got!r} instead of "
                    f"{wanted!r}. Is it on a network file system? Use a local disk."
                )
        connection.execute(
            "PRAGMA cache_size = -16384; PRAGMA wal_autocheckpoint = 4000; PRAGMA mmap_size = 0;"
            "PRAGMA temp_store = MEMORY"
        )
        return connection

    def _check_owner(self, connection: Connection) -> None:
        """Refuse a file that is not ours or newer than this code, before anything changes in it."""
        # One statement, since another process may be creating the schema right now.
        application, version, tables = connection.execute(
            "SELECT * FROM pragma_application_id, pragma_user_version,"
            " (SELECT count(*) FROM sqlite_schema)"
        ).get
        newest = migrations()[-1][0]
        if application != APPLICATION_ID:
            if tables:
                raise StoreError(
                    f"{self.path} is an SQLite file of another program. Choose another path; "
                    f"nothing was changed."
                )
        elif tables and not version:
            raise StoreError(
                f"{self.path} has tables, but not the number of their schema (user_version is 0): "
                f"it was copied in part, or changed. Copy the original with SQLite's backup, or "
                f"choose another path; nothing was changed."
            )
        elif version > newest:
            raise StoreError(
                f"{self.path} was written by a newer Pavane (schema {version}, this one knows "
                f"{newest}). Upgrade Pavane here; nothing was changed."
            )

    def _prepare(self, connection: Connection) -> None:
        """Create the schema, or bring an older one up to date."""
        newest = migrations()[-1][0]
        connection.execute("BEGIN IMMEDIATE")
        try:
            version = connection.execute("PRAGMA user_version").get
            empty = not connection.execute("SELECT count(*) FROM sqlite_schema").get
            for number, sql in migrations():
                if number > version:
                    connection.execute(sql)
            if empty:
                connection.execute(
                    "INSERT INTO meta VALUES ('partitions', ?), ('next_run', '1')",
                    (str(self.partitions),),
                )
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            if version < newest:
                connection.execute(f"PRAGMA user_version = {newest}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        self.partitions = int(
            connection.execute("SELECT value FROM meta WHERE key = 'partitions'").get
        )

    def _explained(self, error: Exception) -> StoreError:
        path = self.path
        if isinstance(error, apsw.NotADBError):
            text = f"{path} is not an SQLite file. Choose another path."
        elif isinstance(error, apsw.ReadOnlyError):
            text = f"{path} is read-only for this process. Make it and its directory writable."
        elif isinstance(error, apsw.CantOpenError):
            if path.is_dir():
                text = f"{path} is a directory. Name a file in it."
            elif not path.parent.is_dir():
                text = f"{path} cannot be created: the directory {path.parent} does not exist."
            else:
                text = (
                    f"{path} cannot be opened or created. This process must be allowed to write it "
                    f"and its directory."
                )
        elif isinstance(error, apsw.FullError):
            text = (
                f"The disk of {path} is full. Nothing of the refused writes was kept; free space."
            )
        elif isinstance(error, apsw.CorruptError):
            text = f"{path} is damaged ({error}). Restore it from a backup."
        elif isinstance(error, apsw.IOError):
            text = (
                f"The disk of {path} failed ({error}). Nothing of the refused writes was kept; "
                f"look after the disk, then restart."
            )
        elif isinstance(error, apsw.BusyError):
            text = f"{path} was locked by another process for {BUSY_MS / 1000:g} s."
        else:
            text = f"{path} cannot be used: {error}."
        return StoreError(text)

    async def close(self) -> None:
        if self._pid not in (0, os.getpid()):
            return  # closing what was inherited by a fork could harm the parent's file
        self._pid = 0
        await self._stop_writer()
        self._close_all()

    async def _stop_writer(self) -> None:
        if self._thread is not None:
            self._jobs.put(None)
            await asyncio.to_thread(self._thread.join)
            self._thread = None

    def _unusable(self) -> StoreError:
        """Say why this store, in this process, takes no work."""
        if self._pid:
            return StoreError(
                f"{self.path} was opened by another process; open it again after a fork."
            )
        return StoreError(f"{self.path} is closed; open the store before using it.")

    def _close_all(self) -> None:
        with self._lock, self._lease_lock:
            for connection in self._opened:
                connection.close()
            self._opened.clear()

    # -- names and clocks ----------------------------------------------------------------------

    def now_us(self) -> int:
        return time.time_ns() // 1000

    def target_of(self, service: str, run: str) -> int:
        return self._services[service] * SLOTS + crc32(run.encode()) % self.partitions

    async def register(self, services: Sequence[str]) -> None:
        missing = [name for name in services if name not in self._services]
        for name in missing:
            number = self._row("SELECT no FROM services WHERE name = ?", (name,))
            if number is None:
                self._execute_now(lambda c, name=name: self._add_service(c, name))
                number = self._row("SELECT no FROM services WHERE name = ?", (name,))
            assert number is not None
            self._services[name] = number[0]

    def _add_service(self, connection: Connection, name: str) -> None:
        connection.execute("INSERT OR IGNORE INTO services (name) VALUES (?)", (name,))
        number = connection.execute("SELECT no FROM services WHERE name = ?", (name,)).get
        head = connection.execute(LOG_HEAD).get
        connection.executemany(
            "INSERT OR IGNORE INTO partitions (target, service, partition, position)"
            " VALUES (?, ?, ?, ?)",
            [(number * SLOTS + slot, name, slot, head) for slot in range(self.partitions)],
        )

    # -- writing -------------------------------------------------------------------------------

    def submit(
        self, batch: Sequence[Commit], fence: Fence | None, done: Callable[[Results], None]
    ) -> None:
        if self._pid != os.getpid():
            done([self._unusable()] * len(batch))
            return
        if (
            len(batch) <= INLINE_MAX_COMMITS
            and self._inline_s < INLINE_MAX_S
            and self._jobs.empty()
            and not any(commit.work for commit in batch)
        ):
            began = time.perf_counter()
            results = self._try_inline(batch, fence)
            self._inline_s += 0.1 * (time.perf_counter() - began - self._inline_s)
            if results is not None:
                done(results)
                return
        else:
            self._inline_s *= 0.99  # forget a slow disk after a while

        def job() -> None:
            results = self._write(batch, fence)
            self._call_back(done, results)

        self._jobs.put(job)

    def _call_back(self, done: Callable[[Any], None], value: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(done, value)
        except RuntimeError:
            pass  # the loop was closed; the batch is durable, and nobody waits for it

    def _try_inline(self, batch: Sequence[Commit], fence: Fence | None) -> Results | None:
        """Write on this thread; None if another process or thread is writing."""
        if not self._lock.acquire(blocking=False):
            return None
        try:
            self._write_to.setlk_timeout(0, 0)
            self._write_to.set_busy_timeout(0)
            try:
                self._write_to.execute("BEGIN IMMEDIATE")
            except apsw.BusyError:
                return None
            except apsw.Error as error:
                return [self._explained(error)] * len(batch)
            finally:
                self._write_to.set_busy_timeout(BUSY_MS)
                self._write_to.setlk_timeout(BUSY_MS, 0)
            return self._write_begun(batch, fence)
        finally:
            self._lock.release()

    def _write_jobs(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # or what was written last would stay in memory until the next comes

    def _write(self, batch: Sequence[Commit], fence: Fence | None) -> Results:
        with self._lock:
            try:
                self._write_to.execute("BEGIN IMMEDIATE")
            except apsw.Error as error:
                return [self._explained(error)] * len(batch)
            return self._write_begun(batch, fence)

    def _write_begun(self, batch: Sequence[Commit], fence: Fence | None) -> Results:
        connection = self._write_to
        try:
            if fence is not None:
                self._prove(connection, fence)
            self._appended = (-1, -1)
            refused = do_work(connection, batch)
            good = [commit for commit in batch if commit not in refused] if refused else batch
            self._write_rows(connection, good, fence)
            connection.execute("COMMIT")
            if fence is not None and self.tail == self._appended[0]:
                self.tail = self._appended[1]  # nobody else wrote: there is nothing to read
            return [refused.get(commit) for commit in batch] if refused else [None] * len(batch)
        except LeaseLost as lost:
            self._roll_back()
            return [lost] * len(batch)
        except Exception as error:
            self._roll_back()
            if isinstance(error, apsw.Error) and not isinstance(error, OF_ONE_COMMIT):
                return [self._explained(error)] * len(batch)
            # What is not APSW's comes from making rows and binding: a bad value, not a bad store.
            if len(batch) == 1:
                return [_refusal(error)]
        # One bad commit: halve until it is alone, keeping the order.
        middle = len(batch) // 2
        first = self._write_half(batch[:middle], fence)
        rest = batch[middle:]
        if first and isinstance(first[-1], (LeaseLost, StoreError)):
            return [*first, *[first[-1]] * len(rest)]  # the store failed, not a commit
        broken = {c.chain for c, bad in zip(batch, first, strict=False) if bad is not None} - {0}
        if not any(c.chain in broken for c in rest):
            return [*first, *self._write_half(rest, fence)]
        good = iter(self._write_half([c for c in rest if c.chain not in broken], fence))
        return [*first, *(broken_chain() if c.chain in broken else next(good) for c in rest)]

    def _write_half(self, half: Sequence[Commit], fence: Fence | None) -> Results:
        if not half:
            return []
        try:
            self._write_to.execute("BEGIN IMMEDIATE")
        except apsw.Error as error:
            return [self._explained(error)] * len(half)
        return self._write_begun(half, fence)

    def _roll_back(self) -> None:
        with suppress(apsw.Error):  # if it stays open, the next BEGIN says so
            if self._write_to.in_transaction:
                self._write_to.execute("ROLLBACK")

    def _prove(self, connection: Connection, fence: Fence) -> None:
        connection.execute(statement("prove_lease"), (fence.node, fence.nonce, fence.lease_us))
        if not connection.changes():
            raise LeaseLost(
                f"Node {fence.node} lost its lease (it was silent for longer than "
                f"{fence.lease_us / 1e6:g} s); it stops its runs and joins again."
            )

    def _write_rows(self, c: Connection, batch: Sequence[Commit], fence: Fence | None) -> None:
        messages = [message for commit in batch for message in commit.messages]
        if messages:
            self._write_messages(c, messages, fence)
        runs = [row for commit in batch for row in commit.runs]
        if runs:
            insert_all(c, "put_run", [_run_values(row) for row in runs])
        journal = [row for commit in batch for row in commit.journal]
        if journal:
            rows = [(row.run, row.seq, row.body.decode()) for row in journal]
            insert_all(c, "add_journal", rows)
        inbox = [row for commit in batch for row in commit.inbox]
        if inbox:
            rows = [(row.id, row.service, row.at_us, row.passed_to) for row in inbox]
            insert_all(c, "add_inbox", rows)
        for commit in batch:
            if commit.mail:
                rows = [
                    (r.service, r.run, r.id, r.type, r.body.decode(), r.at_us) for r in commit.mail
                ]
                insert_all(c, "add_mail", rows)
            for taken in commit.mail_taken:
                c.execute(statement("take_mail"), taken)
            if commit.parked:
                insert_all(c, "put_parked", [_parked_values(row) for row in commit.parked])
            for unparked in commit.unparked:
                c.execute(statement("drop_parked"), unparked)
            if commit.positions:
                c.executemany(statement("set_position"), commit.positions)
        events = [event for commit in batch for event in commit.events]
        if events:
            write_events(c, events)
        reactions = [commit.reaction for commit in batch if commit.reaction is not None]
        if reactions:
            write_reactions(c, reactions)

    def _write_messages(
        self, c: Connection, messages: Sequence[Message], fence: Fence | None
    ) -> None:
        head = c.execute(LOG_HEAD).get
        origin = fence.node if fence else None
        rows: list[tuple[Any, ...]] = []
        for pos, m in enumerate(messages, head + 1):
            m.pos = pos
            rows.append(
                (pos, m.target, m.kind, m.id, m.to, m.run, m.at_us, origin, m.body.decode())
            )
        insert_all(c, "add_message", rows)
        self._appended = (head, head + len(rows))

    def _execute_now(self, work: Callable[[Connection], Any]) -> Any:
        """Run `work` in a transaction of its own, on this thread."""
        with self._lock:
            connection = self._write_to
            try:
                connection.execute("BEGIN IMMEDIATE")
                result = work(connection)
                connection.execute("COMMIT")
                return result
            except apsw.Error as error:
                self._roll_back()
                raise self._explained(error) from error
            except BaseException:
                self._roll_back()
                raise

    async def _execute(self, work: Callable[[Connection], Any]) -> Any:
        """Run `work` in a transaction of its own, on the writer thread."""
        if self._pid != os.getpid():
            raise self._unusable()
        future: asyncio.Future[Any] = self._loop.create_future()

        def job() -> None:
            try:
                outcome: Any = self._execute_now(work)
            except BaseException as error:
                outcome = error
            self._call_back(finish, outcome)

        def finish(outcome: Any) -> None:
            if future.cancelled():
                return
            if isinstance(outcome, BaseException):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        self._jobs.put(job)
        return await future

    async def take_run_numbers(self, count: int) -> int:
        def take(c: Connection) -> int:
            first = int(c.execute("SELECT value FROM meta WHERE key = 'next_run'").get)
            c.execute("UPDATE meta SET value = ? WHERE key = 'next_run'", (str(first + count),))
            return first

        return await self._execute(take)

    # -- reading -------------------------------------------------------------------------------

    def _rows(self, sql: str, bindings: Sequence[Any] = ()) -> list[Any]:
        if self._pid != os.getpid():
            raise self._unusable()
        try:
            return self._read_from.execute(sql, bindings).fetchall()
        except UnicodeEncodeError as error:
            raise no_text(error) from error
        except apsw.Error as error:
            raise self._explained(error) from error

    def _row(self, sql: str, bindings: Sequence[Any] = ()) -> Any:
        rows = self._rows(sql, bindings)
        return rows[0] if rows else None

    def _one(self, sql: str, bindings: Sequence[Any] = ()) -> Any:
        return self._rows(sql, bindings)[0][0]

    async def run_rows(self, id: str) -> list[RunRow]:
        return [_run(r) for r in self._rows(f"SELECT {_RUN_COLUMNS} FROM runs WHERE id = ?", (id,))]

    async def run_row(self, service: str, id: str) -> RunRow | None:
        row = self._row(
            f"SELECT {_RUN_COLUMNS} FROM runs WHERE id = ? AND service = ?", (id, service)
        )
        return row and _run(row)

    async def halted_runs(self, ids: Sequence[str]) -> list[RunRow]:
        sql = (
            f"SELECT {_RUN_COLUMNS} FROM runs WHERE id IN (SELECT value FROM json_each(?))"
            f" AND service = home AND (ended_us IS NOT NULL OR status = 'stuck')"
        )
        return [_run(row) for row in self._rows(sql, (_json(ids),))]

    async def rows_of(self, runs: Sequence[int]) -> list[RunRow]:
        sql = f"SELECT {_RUN_COLUMNS} FROM runs WHERE no IN (SELECT value FROM json_each(?))"
        return [_run(row) for row in self._rows(sql, (msgspec.json.encode(list(runs)).decode(),))]

    async def list_runs(self, which: RunFilter) -> list[RunRow]:
        where, values = ["service = home"], list[Any]()
        for column, value in (("service", which.service), ("workflow", which.workflow)):
            if value is not None:
                where.append(f"{column} = ?")
                values.append(value)
        if which.status:
            where.append(f"status IN ({', '.join('?' * len(which.status))})")
            values += which.status
        if which.id_prefix:
            # Few are found by their ids at once, many by their numbers soon.
            begins = (which.id_prefix, which.id_prefix.encode() + b"\xff")
            between = "id >= ? AND id < CAST(? AS TEXT)"
            limited = f"SELECT 1 FROM runs WHERE {between} LIMIT {PREFIXED_MAX + 1}"
            few = self._one(f"SELECT count(*) FROM ({limited})", begins) <= PREFIXED_MAX
            where.append(between if few else between.replace("id", "+id"))
            values += begins
        for name, value in which.attributes:
            where.append("json_extract(attributes, ?) = ?")
            values += [f"$.{msgspec.json.encode(name).decode()}", value]
        if which.before is not None:
            where.append("no < ?")
            values.append(which.before)
        sql = (
            f"SELECT {_RUN_COLUMNS} FROM runs WHERE {' AND '.join(where)} ORDER BY no DESC LIMIT ?"
        )
        return [_run(row) for row in self._rows(sql, [*values, which.limit])]

    async def journals(self, runs: Sequence[int]) -> dict[int, list[JournalRow]]:
        found: dict[int, list[JournalRow]] = {run: [] for run in runs}
        sql = (
            "SELECT run, seq, body FROM journal WHERE run IN (SELECT value FROM json_each(?))"
            " ORDER BY run, seq"
        )
        for run, seq, body in self._rows(sql, (_json(list(runs)),)):
            found[run].append(JournalRow(run, seq, _bytes(body)))
        return found

    async def live_runs(self, targets: Sequence[int], after: int, limit: int) -> list[RunRow]:
        sql = (
            f"SELECT {_RUN_COLUMNS} FROM runs INDEXED BY runs_live"
            f" WHERE status IN ('running', 'stuck')"
            f" AND target IN (SELECT value FROM json_each(?)) AND no > ? ORDER BY no LIMIT ?"
        )
        wanted = _json(list(targets))
        return [_run(row) for row in self._rows(sql, (wanted, after, limit))]

    async def due_runs(
        self, targets: Sequence[int], after: tuple[int, int], until_us: int, limit: int
    ) -> list[RunRow]:
        sql = (
            f"SELECT {_RUN_COLUMNS} FROM runs WHERE wake_us >= ?1 AND (wake_us, no) > (?1, ?2)"
            f" AND wake_us <= ?3 AND target IN (SELECT value FROM json_each(?4))"
            f" ORDER BY wake_us, no LIMIT ?5"
        )
        values = (*after, until_us, _json(list(targets)), limit)
        return [_run(row) for row in self._rows(sql, values)]

    async def due_parked(
        self, targets: Sequence[int], after: tuple[int, str], until_us: int, limit: int
    ) -> list[ParkedRow]:
        sql = (
            f"SELECT {_PARKED_COLUMNS} FROM parked WHERE due_us >= ?1 AND (due_us, id) > (?1, ?2)"
            f" AND due_us <= ?3 AND target IN (SELECT value FROM json_each(?4))"
            f" ORDER BY due_us, id LIMIT ?5"
        )
        values = (*after, until_us, _json(list(targets)), limit)
        return [_parked(row) for row in self._rows(sql, values)]

    async def parked_of(self, service: str, run: str) -> list[ParkedRow]:
        sql = f"SELECT {_PARKED_COLUMNS} FROM parked WHERE run = ? AND service = ?"
        return [_parked(row) for row in self._rows(sql, (run, service))]

    async def mail_of(self, service: str, run: str) -> list[MailRow]:
        sql = (
            "SELECT service, run, id, type, body, at_us FROM mailbox WHERE run = ? AND service = ?"
            " ORDER BY no"
        )
        rows = self._rows(sql, (run, service))
        return [MailRow(s, r, id, kind, _bytes(body), at) for s, r, id, kind, body, at in rows]

    async def inbox_of(self, run: str) -> list[InboxRow]:
        sql = "SELECT service, id, at_us, passed_to FROM inbox WHERE id >= ? AND id < ?"
        return [InboxRow(*row) for row in self._rows(sql, (run + "#", run + "$"))]

    async def seen(self, service: str, ids: Sequence[str]) -> set[str]:
        sql = "SELECT id FROM inbox WHERE service = ? AND id IN (SELECT value FROM json_each(?))"
        return {row[0] for row in self._rows(sql, (service, _json(ids)))}

    async def message(self, id: str) -> Message | None:
        rows = self._rows(
            "SELECT kind, id, receiver, run, body, at_us, target, pos FROM log WHERE id = ?"
            " ORDER BY pos DESC LIMIT 1",
            (id,),
        )
        return _message(rows[0]) if rows else None

    async def read_log(
        self, after: int, until: int | None, targets: Sequence[int] | None, limit: int,
        skip_node: int | None,
    ) -> list[Message]:  # fmt: skip
        sql = "SELECT kind, id, receiver, run, body, at_us, target, pos FROM log WHERE pos > ?"
        values: list[Any] = [after]
        if until is not None:
            sql += " AND pos <= ?"
            values.append(until)
        if skip_node is not None:
            sql += " AND origin IS NOT ?"
            values.append(skip_node)
        if targets is not None:
            sql += " AND target IN (SELECT value FROM json_each(?))"
            values.append(_json(list(targets)))
        rows = self._rows(f"{sql} ORDER BY pos LIMIT ?", [*values, limit])
        return [_message(row) for row in rows]

    async def log_head(self) -> int:
        return self._one(LOG_HEAD)

    def changed(self) -> bool:
        version = self._one("PRAGMA data_version")
        before, self._version = self._version, version
        return version != before

    @property
    def hears(self) -> bool:
        return False

    # -- membership ----------------------------------------------------------------------------

    async def join(
        self, name: str, host: str, pid: int, services: Sequence[str], lease_us: int
    ) -> NodeRow:
        nonce = os.urandom(12).hex()

        def insert(c: Connection) -> NodeRow:
            sql = (
                f"INSERT INTO nodes (nonce, name, host, pid, services, joined_us, expires_us)"
                f" VALUES (?, ?, ?, ?, ?, {NOW}, {NOW} + ?) RETURNING no, expires_us, joined_us"
            )
            values = (nonce, name, host, pid, _json(list(services)), lease_us)
            no, expires, joined = next(iter(c.execute(sql, values)))
            return NodeRow(no, nonce, name, host, pid, list(services), expires, joined)

        return await self._execute(insert)

    def renew(self, fence: Fence) -> Glance | None:
        if self._pid != os.getpid():
            raise self._unusable()
        with self._lease_lock:
            try:
                connection = self._lease_by
                connection.execute(
                    statement("prove_lease"), (fence.node, fence.nonce, fence.lease_us)
                )
                if not connection.changes():
                    return None
                seen = next(iter(connection.execute(statement("glance"), (fence.node, LAST_US))))
                return Glance(seen[:3], seen[3])
            except apsw.Error as error:
                raise self._explained(error) from error

    async def leave(self, fence: Fence, touched: Sequence[Touched] = ()) -> None:
        def delete(c: Connection) -> None:
            c.execute("DELETE FROM nodes WHERE no = ? AND nonce = ?", (fence.node, fence.nonce))
            if c.changes():
                for of_one in touched:
                    _take_back(c, of_one)
                c.execute(
                    "UPDATE partitions SET owner = NULL, clean = 0 WHERE owner = ?", (fence.node,)
                )

        await self._execute(delete)

    async def nodes(self) -> list[NodeRow]:
        rows = self._rows(
            "SELECT no, nonce, name, host, pid, services, expires_us, joined_us, asked FROM nodes"
            " ORDER BY no"
        )
        return [
            NodeRow(no, nonce, name, host, pid, msgspec.json.decode(services), *rest)
            for no, nonce, name, host, pid, services, *rest in rows
        ]

    async def ask_node(self, node: int, what: str) -> bool:
        def ask(c: Connection) -> bool:
            c.execute("UPDATE nodes SET asked = ? WHERE no = ?", (what, node))
            return bool(c.changes())

        return await self._execute(ask)

    async def partition_rows(self, services: Sequence[str]) -> list[PartitionRow]:
        rows = self._rows(
            "SELECT target, service, partition, owner, clean, position FROM partitions"
            " WHERE service IN (SELECT value FROM json_each(?)) ORDER BY target",
            (_json(list(services)),),
        )
        return [
            PartitionRow(t, s, p, owner, bool(clean), pos) for t, s, p, owner, clean, pos in rows
        ]

    async def expire(self, nodes: Sequence[NodeRow]) -> None:
        def delete(c: Connection) -> None:
            for node in nodes:
                c.execute(
                    "DELETE FROM nodes WHERE no = ? AND nonce = ? AND expires_us = ?",
                    (node.no, node.nonce, node.expires_us),
                )
                if c.changes():
                    c.execute(
                        "UPDATE partitions SET owner = NULL, clean = 0 WHERE owner = ?", (node.no,)
                    )

        await self._execute(delete)

    async def claim(self, fence: Fence, targets: Sequence[int]) -> list[PartitionRow]:
        def take(c: Connection) -> list[PartitionRow]:
            self._prove(c, fence)
            wanted = _json(list(targets))
            rows = c.execute(
                "SELECT target, service, partition, owner, clean, position FROM partitions"
                " WHERE owner IS NULL AND target IN (SELECT value FROM json_each(?))",
                (wanted,),
            ).fetchall()
            c.execute(
                "UPDATE partitions SET owner = ?, clean = 0"
                " WHERE owner IS NULL AND target IN (SELECT value FROM json_each(?))",
                (fence.node, wanted),
            )
            return [PartitionRow(t, s, p, None, bool(k), pos) for t, s, p, _, k, pos in rows]

        return await self._execute(take)

    async def release(self, fence: Fence, positions: Sequence[tuple[int, int]]) -> None:
        def give(c: Connection) -> None:
            self._prove(c, fence)
            c.executemany(statement("set_position"), positions)
            c.executemany(
                "UPDATE partitions SET owner = NULL, clean = 1 WHERE target = ? AND owner = ?",
                [(target, fence.node) for target, _ in positions],
            )

        await self._execute(give)

    # -- upkeep --------------------------------------------------------------------------------

    async def touch(
        self, fence: Fence, runs: Mapping[int, int], parked: Sequence[ParkedRow]
    ) -> None:
        def count(c: Connection) -> None:
            self._prove(c, fence)
            c.executemany(
                "UPDATE runs SET deaths = max(deaths, ?) WHERE no = ?",
                [(deaths, no) for no, deaths in runs.items()],
            )
            if parked:
                insert_all(c, "put_parked", [_parked_values(row) for row in parked])

        await self._execute(count)

    async def prune(self, before_us: int, limit: int) -> int:
        def delete(c: Connection) -> int:
            runs = self._prune_runs(c, before_us, limit)
            return runs + self._prune_log(c, before_us, limit)

        return await self._execute(delete)

    def _prune_runs(self, c: Connection, before_us: int, limit: int) -> int:
        """Delete what is left, at every service, of runs that ended at home."""
        old = c.execute(
            "SELECT id FROM runs WHERE ended_us < ? AND service = home ORDER BY ended_us LIMIT ?",
            (before_us, limit),
        ).fetchall()
        ids = _json([id for (id,) in old])
        # Marks of messages that someone has still to consume stay, or they would count twice.
        pending = c.execute(
            "SELECT id FROM log WHERE pos > (SELECT min(position) FROM partitions)"
            " AND run IN (SELECT value FROM json_each(?))",
            (ids if old else "[]",),
        ).fetchall()
        kept = _json([id for (id,) in pending])
        for (id,) in old:
            for no, service in c.execute(
                "SELECT no, service FROM runs WHERE id = ?", (id,)
            ).fetchall():
                c.execute("DELETE FROM journal WHERE run = ?", (no,))
                c.execute("DELETE FROM runs WHERE no = ?", (no,))
                c.execute(statement("take_mail"), (service, id, "*"))
            c.execute(statement("forget_awaits"), (id,))
            c.execute(statement("forget_members"), (id,))
            c.execute(
                "DELETE FROM inbox WHERE (id = ?1 OR id > ?1 || '#' AND id < ?1 || '$')"
                " AND id NOT IN (SELECT value FROM json_each(?2))",
                (id, kept),
            )
        return len(old)

    def _prune_log(self, c: Connection, before_us: int, limit: int) -> int:
        """Delete consumed messages from the log's beginning up to the first that is not old."""
        stale: list[tuple[int, str, str, str]] = []
        cursor = c.execute(
            "SELECT pos, id, receiver, run, at_us FROM log LEFT JOIN partitions USING (target)"
            " WHERE pos <= coalesce(position, (SELECT min(position) FROM partitions)) ORDER BY pos"
        )
        for pos, id, receiver, run, at_us in cursor:
            if at_us >= before_us or len(stale) == limit:
                break
            stale.append((pos, id, receiver, run))
        cursor.close(True)
        for pos, id, receiver, run in stale:
            c.execute("DELETE FROM log WHERE pos = ?", (pos,))
            c.execute(statement("drop_mark"), (id, receiver, run))
        return len(stale)

    async def describe(self) -> dict[str, str | int | float]:
        wal = Path(f"{self.path}-wal")
        return {
            "kind": "SQLite",
            "place": str(self.path),
            "sqlite": apsw.sqlite_lib_version(),
            "schema": self._one("PRAGMA user_version"),
            "bytes": self.path.stat().st_size,
            "wal bytes": wal.stat().st_size if wal.exists() else 0,
            "runs": self._count("runs WHERE service = home"),
            "messages": self._count("log"),
            "parked": self._count("parked"),
            "events": self._one("SELECT coalesce(sum(count), 0) FROM event_types"),
            "dead letters": self._count("dead_letters"),
        }

    def _count(self, rows: str) -> int:
        return self._one(f"SELECT count(*) FROM (SELECT 1 FROM {rows} LIMIT {COUNT_MAX + 1})")


def _refusal(error: Exception) -> PavaneError:
    if isinstance(error, WorkFailed):
        return error
    if isinstance(error, apsw.ConstraintError) and getattr(error, "extendedresult", 0) in REPEATED:
        return Conflict(f"This was written before: {error}.")
    return PavaneError(f"A value cannot be stored: {error!r}.")


def _take_back(c: Connection, touched: Touched) -> None:
    """Take back what was counted; see `Store.leave`."""
    c.executemany(
        "UPDATE runs SET deaths = ?1 WHERE no = ?2 AND deaths > ?1",
        [(before, no) for no, before in touched.runs.items()],
    )
    c.executemany(
        "UPDATE parked SET deaths = ?1 WHERE service = ?2 AND id = ?3 AND deaths > ?1",
        [(before, *key) for key, before in touched.parked.items()],
    )
    c.executemany(
        "UPDATE parked_events SET deaths = ?1 WHERE handler = ?2 AND pos = ?3 AND deaths > ?1",
        [(before, *at) for at, before in touched.events.items()],
    )
    c.executemany("DELETE FROM inbox WHERE service = ? AND id = ?", touched.tries)


def _json(values: Sequence[Any]) -> str:
    return msgspec.json.encode(values).decode()


def _patiently(connection: Connection, sql: str) -> None:
    """Execute what SQLite refuses at once if it is busy: another process may switch to WAL too."""
    ends = time.monotonic() + BUSY_MS / 1000
    while True:
        try:
            connection.execute(sql)
            return
        except apsw.BusyError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.005)


def _bytes(text: Any) -> bytes:
    return text if isinstance(text, bytes) else str(text).encode("utf-8", "surrogatepass")


def _run_values(r: RunRow) -> tuple[Any, ...]:
    return (
        r.no, r.service, r.id, r.target, r.workflow, r.version, r.mode, r.home, r.status, r.holder,
        r.hop, r.header.decode(), r.trail.decode(), r.attributes.decode(), r.wake_us, r.reason,
        r.deaths, r.started_us, r.ended_us, None if r.result is None else r.result.decode(),
        r.undone, r.entries,
    )  # fmt: skip


def _run(row: Sequence[Any]) -> RunRow:
    values = list(row)
    for at in _RUN_TEXTS:
        if values[at] is not None:
            values[at] = _bytes(values[at])
    return RunRow(*values)


def _parked_values(r: ParkedRow) -> tuple[Any, ...]:
    return (
        r.id, r.service, r.run, r.target, r.call.decode(), r.attempt, r.due_us, r.began_us,
        r.beat.decode(), r.error.decode(), r.deaths,
    )  # fmt: skip


def _parked(row: Sequence[Any]) -> ParkedRow:
    service, run, id, target, call, attempt, due, began, beat, error, deaths = row
    return ParkedRow(
        service, run, id, target, _bytes(call), attempt, due, began, _bytes(beat), _bytes(error),
        deaths,
    )  # fmt: skip


def _message(row: Sequence[Any]) -> Message:
    kind, id, receiver, run, body, at_us, target, pos = row
    return Message(kind, id, receiver, run, _bytes(body), at_us, target, pos)
