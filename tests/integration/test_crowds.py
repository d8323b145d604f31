"""A crowd of timers that is due at once, as after an outage, leaves room for everybody else."""

from __future__ import annotations

import asyncio
from functools import partial
from statistics import median

import pytest

from pavane import App, Client, EngineConfig, Event, Service, receive
from pavane.engine.timers import TAKING_UP_MAX
from pavane.stores.postgres import PostgresStore
from pavane.stores.sqlite import SqliteStore
from tests.integration.world import Place, in_loop

CROWD = 10_000
DAY_S = 86_400.0
shop = Service("shop")
awake: list[str] = []


@shop.step
async def wake(who: str) -> None:
    awake.append(who)


@shop.step
async def nap() -> None:
    await asyncio.sleep(0)


class Farewell(Event):
    pass


@shop.workflow(receives=[Farewell])
async def sleeper(who: str) -> None:
    await asyncio.sleep(DAY_S)
    await wake(who)
    await receive(Farewell)  # it never comes, and keeps nobody from waking


@shop.workflow
async def passer_by() -> None:
    await nap()


@partial(in_loop, within_s=600)
async def test_a_crowd_that_wakes_holds_up_nobody_and_fits_in_memory(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    awake.clear()
    app = App("crowd", [shop], store=str(place), config=EngineConfig(live_runs_max=100))
    async with app.worker() as client:
        await fall_asleep(client)
    kind = SqliteStore if str(place).endswith(".db") else PostgresStore
    now_us = kind.now_us
    monkeypatch.setattr(kind, "now_us", lambda store: now_us(store) + round(1.5e6 * DAY_S))
    passed_by: list[int] = []
    at_once = 0
    async with app.worker() as client:
        assert client.node is not None
        while len(awake) < CROWD:
            before = len(awake)
            await (await client.start(passer_by)).result()
            passed_by.append(len(awake) - before)
            session = client.node.session
            assert session is not None
            holder = session.holder
            at_once = max(at_once, len(holder.held) + len(holder._loading))  # pyright: ignore
    assert sorted(awake) == sorted(map(str, range(CROWD)))
    assert median(passed_by) < CROWD / 10, "of the crowd were served before one who came later"
    assert at_once < 4 * TAKING_UP_MAX


async def fall_asleep(client: Client) -> None:
    numbers = iter(range(CROWD))

    async def start() -> None:
        for number in numbers:
            await client.start(sleeper, str(number))

    await asyncio.gather(*(start() for _ in range(200)))
