"""The published suite, run against the stores of this package."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from pavane.stores.memory import MemoryStore
from pavane.stores.port import Store
from pavane.stores.postgres import PostgresStore
from pavane.stores.sqlite import SqliteStore
from pavane.testing.store_check import StoreCheck
from pavane.testing.stores import STORE_CHECKS
from tests.bouncer import bounced_database
from tests.postgres import Database

Place = Callable[[Path], AbstractContextManager[Callable[[], Store]]]


@contextmanager
def memory(tmp_path: Path) -> Iterator[Callable[[], Store]]:
    yield MemoryStore(8).connect


@contextmanager
def sqlite(tmp_path: Path) -> Iterator[Callable[[], Store]]:
    yield lambda: SqliteStore(tmp_path / "store.db", partitions=8)


@contextmanager
def postgres(tmp_path: Path) -> Iterator[Callable[[], Store]]:
    with Database() as url:
        yield lambda: PostgresStore(url, partitions=8)


@contextmanager
def bouncer(tmp_path: Path) -> Iterator[Callable[[], Store]]:
    with bounced_database() as url:
        yield lambda: PostgresStore(url, partitions=8)


@pytest.mark.parametrize("check", STORE_CHECKS, ids=str)
@pytest.mark.parametrize("place", [memory, sqlite, postgres, bouncer])
def test_a_store_conforms(place: Place, check: StoreCheck, tmp_path: Path) -> None:
    with place(tmp_path) as make:

        async def connect() -> Store:
            store = make()
            await store.open()
            return store

        asyncio.run(check.run(connect))
