"""Workers of two versions of one app at once, or one after the other: nothing is lost or left."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest

from pavane import App, EngineConfig, Event, Limit, Service, receive
from tests.integration.world import Place, in_loop, until, until_status

KEYS = [f"o-{number}" for number in range(20)]


class Ordered(Event, key="order"):
    order: str


class Packed(Event, key="order"):
    order: str


class Paid(Event, key="order"):
    order: str


def app(place: Place, *services: Service) -> App:
    config = EngineConfig(custody_after_s=0.05)
    return App("shop", services, store=str(place), config=config)


@in_loop
async def test_a_type_that_newer_code_adds_to_a_handler_is_left_to_that_by_older(
    place: Place,
) -> None:
    seen: list[tuple[str, str]] = []
    old, new = Service("mail"), Service("mail")

    @old.on(Ordered, name="note")
    async def note_orders(event: Ordered) -> None:
        seen.append((event.event_type, event.order))

    @new.on(Ordered, Packed, name="note")
    async def note_both(event: Ordered | Packed) -> None:
        seen.append((event.event_type, event.order))

    async with AsyncExitStack() as newer:
        async with app(place, old).worker():
            client = await newer.enter_async_context(app(place, new).worker())
            await asyncio.sleep(1.0)  # the older worker hears of it, and hands some partitions over
            for key in KEYS:
                await client.publish(Ordered(order=key))
                await client.publish(Packed(order=key))

            async def older_code_goes_on() -> bool:
                return {order for type, order in seen if type == "Ordered"} == set(KEYS)

            await until(older_code_goes_on)
            assert len(seen) < 2 * len(KEYS)

        async def all_seen() -> bool:
            return len(seen) >= 2 * len(KEYS)

        await until(all_seen)
    assert sorted(seen) == sorted((type, key) for key in KEYS for type in ("Ordered", "Packed"))


@in_loop
async def test_a_run_of_newer_code_gets_what_came_while_older_code_was_there(place: Place) -> None:
    old, new = Service("shop"), Service("shop")

    @old.workflow(name="ship", receives=[Packed])
    async def ship_packed(order: str) -> str:
        return (await receive(Packed, key=order)).order

    @new.workflow(name="ship", receives=[Packed, Paid])
    async def ship_paid(order: str) -> str:
        return (await receive(Paid, key=order)).order

    async with AsyncExitStack() as newer:
        async with app(place, old).worker():
            client = await newer.enter_async_context(app(place, new).worker())
            await asyncio.sleep(1.0)
            for key in KEYS:
                await client.publish(Paid(order=key))
        runs = [await client.start(ship_paid, key) for key in KEYS]
        assert [await run.result(timeout=30) for run in runs] == KEYS


@in_loop
@pytest.mark.parametrize("what", ["step", "run"])
async def test_who_waits_for_a_limit_that_is_declared_no_more_goes_on(
    place: Place, what: str
) -> None:
    def shop(limit: Limit | None) -> tuple[App, Any]:
        service = Service("shop")

        @service.step(limit=limit if what == "step" else None)
        async def book() -> None: ...

        @service.workflow(limit=limit if what == "run" else None)
        async def buy() -> None:
            await book()

        return app(place, service), buy

    limited, buy = shop(Limit(rate=1, per="1h"))
    async with limited.worker() as client:
        runs = [await client.start(buy) for _ in range(3)]

        async def two_wait() -> bool:
            return sorted([(await run.status()).status for run in runs]) == [
                "completed", "waiting", "waiting",
            ]  # fmt: skip

        await until(two_wait)
    async with shop(None)[0].worker() as client:
        for run in runs:
            await client.get(run.id).result(timeout=30)


@in_loop
async def test_a_child_of_a_service_that_is_listed_no_more_is_cancelled_with_its_parent(
    place: Place,
) -> None:
    shop, bank = Service("shop"), Service("bank")

    @bank.workflow
    async def settle() -> None:
        await asyncio.sleep(3600)

    @shop.workflow
    async def close() -> None:
        await settle()

    async with app(place, shop, bank).worker() as client:
        run = await client.start(close)
        child: Any = client.get(f"{run.id}/0")
        await until_status(child, "waiting")
    async with app(place, shop).worker() as client:
        run = client.get(run.id)
        await run.cancel()
        await until_status(run, "cancelled")
    async with app(place, shop, bank).worker() as client:
        await until_status(client.get(child.id), "cancelled")
