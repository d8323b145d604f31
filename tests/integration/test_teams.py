"""Two apps, of two teams, share a store: one calls a service of the other, which knows it not.

The shop lists the bank's service without the code of it, and works for its own.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pavane import App, EngineConfig, Limit, RunFailed, Service
from tests.integration.world import Place, in_loop, until, until_status


class Bank:
    """The app of the team that is called; each is the code of one process."""

    def __init__(self, place: Place, rate: int = 100) -> None:
        bank = Service("bank")

        @bank.step(limit=Limit(rate=rate, per="1500ms"))
        async def book(cents: int) -> int:
            return cents

        @bank.workflow
        async def settle(cents: int, after_s: float) -> int:
            await asyncio.sleep(after_s)
            if cents < 0:
                raise ValueError("nothing to settle")
            return cents

        config = EngineConfig(custody_after_s=0.05, grace_s=0.1)
        self.app = App("bank", [bank], store=str(place), config=config)


class Shop:
    """The app of the team that calls."""

    def __init__(self, place: Place) -> None:
        shop, bank = Service("shop"), Service("bank")

        @bank.step
        async def book(cents: int) -> int: ...  # pyright: ignore[reportReturnType]

        @bank.workflow
        async def settle(cents: int, after_s: float) -> int: ...  # pyright: ignore[reportReturnType]

        @shop.workflow
        async def buy(cents: int) -> int:
            return await book(cents)

        @shop.workflow
        async def close(cents: int, after_s: float = 0) -> int:
            return await settle(cents, after_s)

        asked: list[int] = []

        @shop.step
        async def ask() -> None:
            asked.append(1)
            if len(asked) == 1:
                raise ConnectionError("the register does not answer")

        @shop.workflow
        async def ask_and_close(cents: int) -> None:
            await asyncio.gather(settle(cents, 3600), ask())

        self.buy, self.close, self.ask_and_close = buy, close, ask_and_close
        self.app = App("shop", [shop, bank], store=str(place))


@in_loop
async def test_a_run_of_another_app_is_told_how_its_child_ended(place: Place) -> None:
    shop = Shop(place)
    async with Bank(place).app.worker(), shop.app.worker(["shop"]) as client:
        assert await (await client.start(shop.close, 42)).result(timeout=30) == 42
        with pytest.raises(RunFailed, match="nothing to settle"):
            await (await client.start(shop.close, -1)).result(timeout=30)


@in_loop
async def test_a_run_of_another_app_is_told_that_its_child_was_killed(place: Place) -> None:
    shop = Shop(place)
    async with shop.app.worker(["shop"]) as client:
        async with Bank(place).app.worker():
            run = await client.start(shop.close, 42, 3600.0)
            child: Any = client.get(f"{run.id}/0")
            await until_status(child, "waiting")
        await child.kill()
        async with Bank(place).app.worker():
            with pytest.raises(RunFailed, match="was killed"):
                await run.result(timeout=30)


@in_loop
async def test_a_run_of_another_app_that_is_taken_back_is_told_again(place: Place) -> None:
    shop = Shop(place)
    async with shop.app.worker(["shop"]) as client:
        async with Bank(place).app.worker():
            run = await client.start(shop.ask_and_close, 42)
            await until_status(run, "failed", reason="ConnectionError")
            child: Any = client.get(f"{run.id}/0")
            await until_status(child, "cancelled")
        await run.retry()
        async with Bank(place).app.worker():
            await until_status(run, "failed", reason="was cancelled")


@in_loop
async def test_a_step_for_another_app_that_waited_for_a_permit_is_answered(place: Place) -> None:
    shop = Shop(place)
    async with shop.app.worker(["shop"]) as client:
        async with Bank(place, rate=1).app.worker():
            runs = [await client.start(shop.buy, cents) for cents in (1, 2)]

            async def one_is_done() -> bool:
                return "completed" in [(await run.status()).status for run in runs]

            await until(one_is_done)
            await asyncio.sleep(0.7)  # the other is taken into custody
        async with Bank(place, rate=1).app.worker():
            assert [await run.result(timeout=30) for run in runs] == [1, 2]
