"""The shop's worker processes: one `pavane run` per service, started, killed, started again.

They are ordinary workers. Nothing prepares them for being killed, and nothing tells the others.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path

from examples.shop.world import PLACE

ROOT = Path(__file__).parents[2]
READY_WITHIN_S = 30.0
DRAINED_WITHIN_S = 10.0


class WorkerFailed(Exception):
    """A worker did not start; the text is what it said last."""


class Worker:
    """The process that works for one service."""

    def __init__(self, service: str, store: Path, world: Path) -> None:
        self.service = service
        self._store = store
        self._world = world
        self._process: asyncio.subprocess.Process | None = None
        self._ready = asyncio.Event()
        self._said: deque[str] = deque(maxlen=20)
        self._listening: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    async def start(self) -> None:
        """Start it and wait until it is ready to work."""
        self._ready.clear()
        # A session of its own: Ctrl-C is for the demo, which then stops its workers itself. And
        # --with-parent, so that they end too if the demo is killed.
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "pavane", "run", "examples.shop.app:app",
            "--service", self.service, "--store", str(self._store), "--with-parent",
            cwd=ROOT, env=os.environ | {PLACE: str(self._world)}, start_new_session=True,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        self._listening = asyncio.create_task(self._listen(self._process))
        with suppress(TimeoutError):
            await asyncio.wait_for(self._ready.wait(), READY_WITHIN_S)
        if self._process.returncode is not None or not self._ready.is_set():
            raise WorkerFailed(f"The worker for {self.service} did not start:\n{self.last_words()}")

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        async for line in process.stderr:
            self._said.append(line.decode(errors="replace").rstrip())
            if self._said[-1] == "ready":
                self._ready.set()
        await process.wait()
        self._ready.set()  # nobody needs to wait for it any longer

    def last_words(self) -> str:
        return "\n".join(self._said)

    async def kill(self) -> None:
        """Kill it with SIGKILL: it writes nothing, says nothing, hands nothing over."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
        await self._ended()

    async def stop(self) -> None:
        """Let it drain and end."""
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), DRAINED_WITHIN_S)
        await self.kill()

    async def _ended(self) -> None:
        if self._process is not None:
            await self._process.wait()
        if self._listening is not None:
            await self._listening
