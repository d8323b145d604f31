"""The pruner: deletes ended runs, consumed messages and handled events older than the retention."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pavane.stores.port import Store


class Pruner:
    """Works in small batches, with pauses, so that it never holds the store for long.

    All nodes prune, in turns that `nodes`, how many they are, makes rarer: what there is to prune
    does not grow with them.
    """

    def __init__(
        self, store: Store, retention_s: float, nodes: Callable[[], int] = lambda: 1
    ) -> None:
        self._store = store
        self._retention_s = retention_s
        self._nodes = nodes

    async def run(self) -> None:
        every_s = max(1.0, min(60.0, self._retention_s / 10))
        while True:
            await asyncio.sleep(every_s * self._nodes())
            while await self.run_once():
                await asyncio.sleep(0.05)

    async def run_once(self) -> bool:
        """Delete one batch; tell whether there may be more."""
        before_us = self._store.now_us() - round(self._retention_s * 1e6)
        most = self._store.features.prune_max
        pruned = await self._store.prune(before_us, most)
        return max(pruned, await self._store.prune_events(before_us, most)) >= most
