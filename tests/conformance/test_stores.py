"""The published suite, run against the stores of this package."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from pavane.stores.memory import MemoryStore
from pavane.stores.port import Store
from pavane.stores.sqlite import SqliteStore
from pavane.testing.store_check import Connect, StoreCheck
from pavane.testing.stores import STORE_CHECKS


def memory(tmp_path: Path) -> Connect:
    root = MemoryStore(8)

    async def connect() -> Store:
        store = root.connect()
        await store.open()
        return store

    return connect


def sqlite(tmp_path: Path) -> Connect:
    async def connect() -> Store:
        store = SqliteStore(tmp_path / "store.db", partitions=8)
        await store.open()
        return store

    return connect


@pytest.mark.parametrize("check", STORE_CHECKS, ids=str)
@pytest.mark.parametrize("place", [memory, sqlite])
def test_a_store_conforms(
    place: Callable[[Path], Connect], check: StoreCheck, tmp_path: Path
) -> None:
    asyncio.run(check.run(place(tmp_path)))
