"""A small TCP proxy of ours between a store and its database, to be cut at a chosen moment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress


class Wire:
    """Forwards to `port` from a port of its own; use it as an asynchronous context manager.

    `watch` sees each piece on its way to the database and says what to do with it: "pass" it on,
    "swallow" it (the database never gets it, and the connection is cut), or "deafen" (it gets it,
    and the connection is cut before the answer comes back). `mute` holds back all, in silence.
    """

    def __init__(self, port: int) -> None:
        self.target = port
        self.port = 0
        self.watch: Callable[[bytes], str] = lambda piece: "pass"
        self.mute = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

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
        """Cut all connections, without a word."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        try:
            server, to_server = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            to_client.transport.abort()
            return
        ends = {to_client, to_server}
        self._writers |= ends
        answers = asyncio.ensure_future(self._forward(server, to_client))
        asks = asyncio.ensure_future(self._forward(client, to_server, answers, watched=True))
        self._tasks |= {answers, asks}
        await asyncio.wait([answers, asks], return_when=asyncio.FIRST_COMPLETED)
        for writer in ends:
            writer.transport.abort()
        self._writers -= ends

    async def _forward(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter,
        answers: asyncio.Task[None] | None = None, *, watched: bool = False,
    ) -> None:  # fmt: skip
        with suppress(OSError):
            while piece := await source.read(1 << 20):
                while self.mute:
                    await asyncio.sleep(0.01)
                what = self.watch(piece) if watched else "pass"
                if what == "swallow":
                    return
                if what == "deafen" and answers is not None:
                    answers.cancel()
                sink.write(piece)
                await sink.drain()
                if what == "deafen":
                    await asyncio.sleep(0.2)  # the database does it meanwhile
                    return
