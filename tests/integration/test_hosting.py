"""A step is done by nodes that host its service, even if its code is elsewhere, too."""

from __future__ import annotations

import asyncio

from pavane import App, Limit, Retry, Service, step_info
from tests.integration.world import Place, in_loop, until

AGAIN = Retry(attempts=0, first="200ms", factor=1)


class Shop:
    """A shop and what it is paid by, as the code of one process, which is called `where`."""

    def __init__(self, where: str, place: Place, done: list[tuple[str, int]]) -> None:
        shop, payments = Service("shop"), Service("payments")

        @payments.step(retry=AGAIN)
        async def charge() -> str:
            done.append((where, step_info().attempt))
            if where != "payments":
                raise ConnectionError("only payments can reach the bank")
            return where

        @payments.step(limit=Limit(rate=1, per="2s"))
        async def refund() -> str:
            done.append((where, step_info().attempt))
            return where

        @shop.workflow
        async def order() -> str:
            return await charge()

        @shop.workflow
        async def take_back() -> str:
            return await refund()

        self.order, self.take_back = order, take_back
        self.app = App("shop", [shop, payments], store=str(place))


@in_loop
async def test_another_attempt_is_made_where_the_service_is_hosted(place: Place) -> None:
    done: list[tuple[str, int]] = []
    both, shop, payments = (Shop(it, place, done) for it in ("both", "shop", "payments"))
    async with both.app.worker() as client:
        run = await client.start(both.order)

        async def tried() -> bool:
            return len(done) >= 2

        await until(tried, "a second attempt")
    before = len(done)
    async with shop.app.worker(["shop"]) as client, payments.app.worker(["payments"]):
        assert await client.get(run.id).result(timeout=30) == "payments"
    assert done[before:] == [("payments", before + 1)]


@in_loop
async def test_one_that_waited_for_a_permit_is_done_where_the_service_is_hosted(
    place: Place,
) -> None:
    done: list[tuple[str, int]] = []
    both, shop, payments = (Shop(it, place, done) for it in ("both", "shop", "payments"))
    async with both.app.worker() as client:
        runs = [await client.start(both.take_back) for _ in range(2)]

        async def one_waits() -> bool:
            return sorted([(await run.status()).status for run in runs]) == ["completed", "waiting"]

        await until(one_waits, "one that waits for its permit")
    async with shop.app.worker(["shop"]) as client, payments.app.worker(["payments"]):
        results = await asyncio.gather(*(client.get(it.id).result(timeout=30) for it in runs))
    assert sorted(results) == ["both", "payments"]
    assert done == [("both", 1), ("payments", 1)]
