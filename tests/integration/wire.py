"""A small TCP proxy of ours between a store and its database, to be cut at a chosen moment."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

ASKS, ANSWERS = "asks", "answers"
BOTH = (ASKS, ANSWERS)
_NO_LINGER = struct.pack("ii", 1, 0)


class _Line:
    """One connection: its two ends, and the directions in which bytes are lost without a word."""

    def __init__(self, ends: tuple[asyncio.StreamWriter, ...]) -> None:
        self.ends = ends
        self.lost: Collection[str] = ()
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def cut(self) -> None:
        """Reset both ends."""
        for end in self.ends:
            _reset(end)
        if not self.over.done():
            self.over.set_result(None)


class Wire:
    """Forwards to `port` from a port of its own; use it as an asynchronous context manager.

    `watch` sees each piece on its way to the database and says what to do with it: "pass" it on,
    "swallow" it (the database never gets it, and the connection is cut), "deafen" (it gets it,
    and the connection is cut before the answer comes back), or "lose" (as by `lose`, this one).
    `held` are the directions in which all is held back in silence, to arrive late. `refuses` resets
    whoever connects. `slow_bytes_s` is how much a second each connection carries to the database.
    """

    def __init__(self, port: int) -> None:
        self.target = port
        self.port = 0
        self.watch: Callable[[bytes], str] = lambda piece: "pass"
        self.held: Collection[str] = ()
        self.refuses = False
        self.slow_bytes_s = 0
        self._lines: set[_Line] = set()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Wire:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def cut(self) -> None:
        """Reset all connections."""
        for line in list(self._lines):
            line.cut()

    def lose(self, directions: Collection[str]) -> None:
        """Swallow what goes in these directions on all connections that there are now, for ever.

        Neither end is told when the other has gone.
        """
        for line in self._lines:
            line.lost = {*line.lost, *directions}

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        if self.refuses:
            _reset(to_client)
            return
        try:
            server, to_server = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            _reset(to_client)
            return
        line = _Line((to_client, to_server))
        self._lines.add(line)
        answers = asyncio.ensure_future(self._forward(line, ANSWERS, server, to_client))
        asks = asyncio.ensure_future(self._forward(line, ASKS, client, to_server, answers))
        forwards = {answers, asks}
        self._tasks |= forwards
        await asyncio.wait([answers, asks], return_when=asyncio.FIRST_COMPLETED)
        if line.lost:
            await line.over
        line.cut()
        await asyncio.wait(forwards)
        self._tasks -= forwards
        self._lines.discard(line)

    async def _forward(
        self, line: _Line, direction: str, source: asyncio.StreamReader,
        sink: asyncio.StreamWriter, answers: asyncio.Task[None] | None = None,
    ) -> None:  # fmt: skip
        with suppress(OSError):
            while piece := await source.read(1 << 20):
                while direction in self.held:
                    await asyncio.sleep(0.01)
                if direction in line.lost:
                    continue
                what = self.watch(piece) if direction == ASKS else "pass"
                if what == "swallow":
                    return
                if what == "lose":
                    line.lost = BOTH
                    continue
                if what == "deafen" and answers is not None:
                    answers.cancel()
                if direction == ASKS and self.slow_bytes_s:
                    await asyncio.sleep(len(piece) / self.slow_bytes_s)
                sink.write(piece)
                await sink.drain()
                if what == "deafen":
                    await asyncio.sleep(0.2)  # the database does it meanwhile
                    return


def _reset(end: asyncio.StreamWriter) -> None:
    """Close with a reset, as a host that crashed or a firewall answers, not with a farewell."""
    connection: socket.socket | None = end.get_extra_info("socket")
    if connection is not None:
        with suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    end.transport.abort()
