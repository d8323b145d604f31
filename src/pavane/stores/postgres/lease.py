"""The lease's own connection, for the thread that renews: blocking calls, an event loop inside.

The thread of the event loop may be stuck, which is what a lease is about, so nothing here is shared
with it: all of this happens on a thread of its own, and the caller waits.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from pavane.stores.port import LAST_US, Fence, Glance
from pavane.stores.postgres.connection import (
    FAILED,
    Connection,
    answered,
    connect,
    explained,
    is_lost,
)

_RENEW = (
    "UPDATE pavane.nodes SET expires_us = pavane.clock_us() + $3"
    " FROM (SELECT set_config('synchronous_commit', 'off', true)) AS at_once,"
    " (SELECT count(*) FILTER (WHERE no <> $1) AS count,"
    " coalesce(max(no) FILTER (WHERE no <> $1), 0) AS newest,"
    " count(*) FILTER (WHERE asked <> '') AS asked,"
    f" coalesce(min(expires_us) FILTER (WHERE no <> $1), {LAST_US}) AS expires_us"
    " FROM pavane.nodes) AS seen"
    " WHERE no = $1 AND nonce = $2 RETURNING pavane.clock_us(), seen.*,"
    " (SELECT ARRAY[log, events] FROM pavane.heads), EXISTS (SELECT FROM pavane.outbox)"
)
"""It does not wait for the disk: should the server forget it, the lease is over too early."""


class Renewed(msgspec.Struct, frozen=True):
    """What a renewal tells: the time, who else is there, and what is new in the logs."""

    now_us: int
    glance: Glance
    heads: tuple[int, int]
    is_staged: bool
    """Whether the outbox holds what transactions of users' published."""


class LeaseConnection:
    """See the module."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._thread: ThreadPoolExecutor | None = None
        self._runner: asyncio.Runner | None = None
        self._connection: Connection | None = None

    def renew(self, fence: Fence, within_s: float) -> Renewed | None:
        """Prolong the lease, `within_s` and the time to connect; None if it is lost."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "pavane-lease-connection")
        return self._thread.submit(self._renew_here, fence, within_s).result()

    def close(self) -> None:
        if self._thread is not None:
            self._thread.submit(self._close_here).result()
            self._thread.shutdown()
            self._thread = None

    def _renew_here(self, fence: Fence, within_s: float) -> Renewed | None:
        if self._runner is None:
            self._runner = asyncio.Runner()
        try:
            return self._runner.run(self._renew(fence, within_s))
        except Exception as error:  # whatever it is, the thread that renews goes on
            raise explained(self._dsn, error) from error

    def _close_here(self) -> None:
        if self._runner is not None:
            if self._connection is not None:
                connection, self._connection = self._connection, None
                self._runner.run(_closed(connection))
            self._runner.close()
            self._runner = None

    async def _renew(self, fence: Fence, within_s: float) -> Renewed | None:
        while True:
            fresh = self._connection is None or self._connection.is_closed()
            connection: Connection
            try:
                async with asyncio.timeout(within_s):
                    connection = await connect(self._dsn) if fresh else self._connection
                self._connection = connection
                asking = connection.fetchrow(_RENEW, fence.node, fence.nonce, fence.lease_us)
                return _read(await answered(connection, asking, within_s))
            except Exception as error:
                if self._connection is not None:
                    self._connection.terminate()
                    self._connection = None
                if fresh or not is_lost(error):
                    raise  # else it was lost since the last round, which says nothing of the next


def _read(row: Any) -> Renewed | None:
    if row is None:
        return None
    now_us, count, newest, asked, expires_us, heads, is_staged = row
    glance = Glance((count, newest, asked), expires_us)
    return Renewed(now_us, glance, tuple(heads), is_staged)


async def _closed(connection: Connection) -> None:
    try:
        await connection.close(timeout=1)
    except FAILED:
        connection.terminate()
