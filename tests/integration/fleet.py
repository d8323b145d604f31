"""Worker processes on one store, to be killed, stopped and replaced by tests."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import apsw

from pavane import Client, Run
from tests.integration import crew
from tests.integration.world import PATIENT_S

BUSY_MS = 300
ROOT = Path(__file__).resolve().parents[2]


class Fleet:
    """Worker processes on one store; who is killed is known to be gone before its lease is over."""

    def __init__(self, folder: Path, store: str) -> None:
        self.folder = folder
        self.store = store
        self.processes: list[subprocess.Popen[bytes]] = []

    def launch(self, *services: str, lease_s: float = PATIENT_S) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.integration.crew", self.store]
        with (self.folder / f"{len(self.processes)}.log").open("wb") as log:
            process = subprocess.Popen(
                [*command, str(crew.RECORD), str(lease_s), *services],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])},
                stderr=log,
            )
        self.processes.append(process)
        return process

    def sink(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()


async def connected(stack: AsyncExitStack, fleet: Fleet) -> Client:
    return await stack.enter_async_context(crew.app_on(fleet.store, PATIENT_S).connect())


async def start(client: Client, flow: Any, *args: Any, **options: Any) -> Run[Any]:
    return await client.start(flow, *args, **options)


async def is_free(store: str) -> bool:
    """Tell whether somebody can write into this store: no stopped process has SQLite's lock."""
    if "://" in store:
        return True
    db = apsw.Connection(store)
    db.set_busy_timeout(BUSY_MS)
    try:
        await asyncio.to_thread(_write_nothing, db)
    except apsw.BusyError:
        return False
    finally:
        db.close()
    return True


def _write_nothing(db: apsw.Connection) -> None:
    db.execute("BEGIN IMMEDIATE; ROLLBACK")  # pyright: ignore[reportUnknownMemberType]
