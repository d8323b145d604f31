"""What docs/postgres.md shows of the user's own transactions works as it is written there."""

from __future__ import annotations

import asyncio
import importlib
import sys
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from tests.integration.test_testing_docs import program
from tests.integration.world import DEADLINE_S, until
from tests.postgres import Database


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that the page shows."""
    (tmp_path / "postgres_shop.py").write_text(program("docs/postgres.md", "place_by_asyncpg"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "postgres_shop", raising=False)
    return importlib.import_module("postgres_shop")


def test_orders_are_placed_and_booked_once_by_each_driver(shop: Any) -> None:
    with Database() as url:
        asyncio.run(asyncio.wait_for(_place_and_book(shop, url), DEADLINE_S))


async def _place_and_book(shop: Any, url: str) -> None:
    engine = create_async_engine(url.replace("postgresql:", "postgresql+asyncpg:"))
    async with asyncpg.create_pool(url, min_size=1) as pool, shop.app.worker(store=url):
        await pool.execute(
            "CREATE TABLE orders (id text); CREATE TABLE bookings (id text, cents int)"
        )
        await shop.place_by_asyncpg(pool, shop.OrderPlaced(order_id="o-1", cents=1))
        await shop.place_by_sqlalchemy(engine, shop.OrderPlaced(order_id="o-2", cents=20))
        order = shop.OrderPlaced(order_id="o-3", cents=300)
        await asyncio.to_thread(shop.place_by_psycopg, url, order)

        async def all_booked() -> bool:
            return await pool.fetchval("SELECT sum(cents) FROM bookings") == 321

        await until(all_booked)
        assert await pool.fetchval("SELECT string_agg(id, ' ' ORDER BY id) FROM orders") == (
            "o-1 o-2 o-3"
        )
    await engine.dispose()
