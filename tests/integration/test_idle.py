"""Nodes that have nothing to do: they leave the database, and each other, alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pavane.stores.postgres import PostgresStore, past, watch
from pavane.testing.store_check import SERVICES, joined
from tests.integration.world import in_loop, until
from tests.postgres import Database


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setenv("PAVANE_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(past, "BEAT_S", 0.05)
    monkeypatch.setattr(watch, "LOOK_S", 60.0)
    monkeypatch.setattr(watch, "PROBE_S", 30.0)
    with Database() as url:
        yield url


async def beaten_us(store: Any) -> int:
    """Return when the newest beat was."""
    return await store._one("SELECT max(beaten_us) FROM pavane.beats")


async def until_quiet(store: PostgresStore) -> None:
    """Wait until the store hears, and all is heard that was written before."""

    async def is_quiet() -> bool:
        store.changed()
        await asyncio.sleep(0.2)
        return store._watch.hears and not store.changed()  # pyright: ignore[reportPrivateUsage]

    await until(is_quiet, "quiet")


@in_loop
async def test_what_a_node_does_by_itself_wakes_no_other(url: str) -> None:
    one, two = PostgresStore(url), PostgresStore(url)
    await one.open()
    await two.open()
    await one.register(SERVICES)
    await joined(one)
    await until_quiet(two)
    before_us = await beaten_us(one)
    for _ in range(5):
        await one.prune(0, 10)
        await one.prune_events(0, 10)
        await asyncio.sleep(0.1)
        assert not two.changed()

    async def has_beaten() -> bool:
        return await beaten_us(one) > before_us

    await until(has_beaten)
    assert not two.changed()
    await one.close()
    await two.close()


@in_loop
async def test_a_renewal_tells_of_news_that_nobody_announced(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = PostgresStore(url), PostgresStore(url)
    await one.open()
    await two.open()
    await one.register(SERVICES)
    fence = await joined(two)
    await until_quiet(two)
    for news in (
        "UPDATE pavane.heads SET log = log + 1",
        "UPDATE pavane.heads SET events = events + 1",
    ):
        await asyncio.to_thread(two.renew, fence)
        two.changed()
        assert not two.changed()
        await one._execute_aside(lambda c, news=news: c.execute(news))  # pyright: ignore
        assert not two.changed()
        await asyncio.to_thread(two.renew, fence)
        assert two.changed()
    await one.close()
    await two.close()
