"""The process that a node lives in: who it is, who else is alive, chance, and a second thread.

A node takes all of these from here, and its clock from the store and the event loop, so that a
simulation can give it others.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from pavane.stores.port import NodeRow, Store


class Rounds(Protocol):
    """Work that is repeated until it is stopped, or ends itself."""

    def hurry(self) -> None:
        """Begin the next round now."""
        ...

    async def stop(self) -> None: ...


class Process:
    """This process."""

    def __init__(self) -> None:
        self.host = this_host()
        self.pid = os.getpid()
        self.random: Callable[[], float] = random.random

    def is_gone(self, node: NodeRow, now_us: int) -> bool:
        """Tell whether a node's lease is over, or its process is known to have ended."""
        return is_gone(node, now_us, self.host)

    def new_id(self) -> str:
        return new_id()

    def repeat(self, pause_s: Callable[[], float], work: Callable[[], bool]) -> Rounds:
        """Call `work` from a thread of its own, each time after a pause, until it returns False."""
        return _ThreadedRounds(pause_s, work)


class _ThreadedRounds:
    def __init__(self, pause_s: Callable[[], float], work: Callable[[], bool]) -> None:
        self._pause_s = pause_s
        self._work = work
        self._now = threading.Event()
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="pavane-lease", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._is_stopped:
            self._now.wait(self._pause_s() * random.uniform(0.9, 1.1))  # not in step with others
            self._now.clear()
            if self._is_stopped or not self._work():
                return

    def hurry(self) -> None:
        self._now.set()

    async def stop(self) -> None:
        self._is_stopped = True
        self._now.set()
        await asyncio.to_thread(self._thread.join, 5.0)


def new_id() -> str:
    """Return a random id that sorts by time."""
    return f"{time.time_ns() // 1000:014x}{os.urandom(5).hex()}"


def this_host() -> str:
    """Return what tells processes of this machine, boot and process namespace from others."""
    parts: list[str] = []
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        try:
            parts.append(read())
        except OSError:
            parts.append(os.uname().nodename)
    return "/".join(parts)


async def hosted_services(store: Store) -> set[str]:
    """Return the services that a live node works for."""
    return {name for node in living(await store.nodes(), store) for name in node.services}


def living(nodes: Sequence[NodeRow], store: Store) -> list[NodeRow]:
    """Return those of `nodes` that are not gone, by what this machine and the store know."""
    now_us, host = store.now_us(), this_host()
    return [node for node in nodes if not is_gone(node, now_us, host)]


def is_gone(node: NodeRow, now_us: int, host: str) -> bool:
    """Tell whether a node's lease is over, or its process is known to have ended."""
    if node.expires_us < now_us:
        return True
    if node.host != host:
        return False
    try:
        os.kill(node.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
