"""The lease: proof that this node is alive, renewed from a thread of its own.

The thread renews only if the event loop ran since the last round, so that a stuck node loses its
partitions to others. Whether the lease is still held is decided by the store alone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from pavane.errors import StoreError
from pavane.stores.port import Fence, NodeRow, Store

log = logging.getLogger("pavane.lease")


class LeaseKeeper:
    """Renews `fence` until stopped; calls `lost` on the event loop when the store says so."""

    def __init__(self, store: Store, fence: Fence, lost: Callable[[], None]) -> None:
        self._store = store
        self._fence = fence
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._stop = threading.Event()
        self._alive = True
        self._thread = threading.Thread(target=self._run, name="pavane-lease", daemon=True)

    def start(self) -> None:
        self._thread.start()

    async def stop(self) -> None:
        self._stop.set()
        await asyncio.to_thread(self._thread.join, 5.0)

    def _run(self) -> None:
        every_s = self._fence.lease_us / 1e6 / 4
        while not self._stop.wait(every_s):
            if not self._alive:
                continue  # the event loop did not run since the last renewal
            self._alive = False
            try:
                self._loop.call_soon_threadsafe(self._beat)
                if not self._store.renew(self._fence):
                    self._loop.call_soon_threadsafe(self._lost)
                    return
            except StoreError as error:
                log.warning("the lease could not be renewed: %s", error)
            except RuntimeError:
                return  # the event loop was closed

    def _beat(self) -> None:
        self._alive = True


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
