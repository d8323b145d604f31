"""A step is done by nodes that host its service, even if its code is elsewhere, too."""

from __future__ import annotations

import asyncio

import pytest

from pavane import App, EngineConfig, Limit, Retry, Service, step_info
from tests.integration.world import PATIENT_S, Place, in_loop, until

PATIENT = EngineConfig(lease_s=PATIENT_S)
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

        @payments.step(limit=Limit(rate=1, per="6s"))
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
        self.app = App("shop", [shop, payments], store=str(place), config=PATIENT)


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
        await (await client.start(both.take_back)).result(timeout=30)
        run = await client.start(both.take_back)

        async def waits() -> bool:
            """Start others until one is seen to wait for its permit."""
            nonlocal run
            status = (await run.status()).status
            if status == "completed":
                run = await client.start(both.take_back)
            return status == "waiting"

        await until(waits, "one that waits for its permit")
    before = len(done)
    async with shop.app.worker(["shop"]) as client, payments.app.worker(["payments"]):
        assert await client.get(run.id).result(timeout=30) == "payments"
    assert done[before:] == [("payments", 1)]


class Clinic:
    """Who asks for what may be done twice within 400 ms, and who does it, as one process' code."""

    def __init__(self, place: Place, began_s: list[float]) -> None:
        desk, surgery = Service("desk"), Service("surgery")

        @surgery.step(limit=Limit(rate=2, per="400ms"))
        async def see() -> None:
            began_s.append(asyncio.get_running_loop().time())

        @desk.workflow
        async def visit() -> None:
            await see()

        self.visit = visit
        config = EngineConfig(custody_after_s=0.1, lease_s=PATIENT_S)
        self.app = App("clinic", [desk, surgery], store=str(place), config=config)


@in_loop
async def test_one_that_is_done_by_its_permit_after_a_restart_is_not_asked_for_again(
    place: Place,
) -> None:
    began_s: list[float] = []
    before, after = Clinic(place, began_s), Clinic(place, began_s)
    async with before.app.worker() as client:
        runs = [await client.start(before.visit) for _ in range(8)]
        await asyncio.sleep(0.7)  # those that wait are in custody
    async with after.app.worker() as client:
        await asyncio.gather(*(client.get(run.id).result(timeout=30) for run in runs))
        await asyncio.sleep(2.0)
    assert len(began_s) == len(runs)


@in_loop
@pytest.mark.parametrize("after", [["desk", "surgery"], ["desk"]])
async def test_permits_that_nobody_was_there_to_use_are_not_used_all_at_once(
    place: Place, after: list[str]
) -> None:
    began_s: list[float] = []
    one, two, three, four = (Clinic(place, began_s) for _ in range(4))
    async with one.app.worker() as client:
        runs = [await client.start(one.visit) for _ in range(16)]
        await asyncio.sleep(0.8)  # those that wait are in custody at the desk
    async with two.app.worker(["surgery"]):
        await asyncio.sleep(2.0)
    async with three.app.worker(["surgery"]), four.app.worker(after) as client:
        await asyncio.gather(*(client.get(run.id).result(timeout=30) for run in runs))
    most = max(sum(at <= other < at + 0.39 for other in began_s) for at in began_s)
    # Two anew, and two by permits that are not too old; some more after a pause of the machine.
    assert most <= 8, began_s


@in_loop
async def test_the_last_step_of_a_fork_is_not_done_again_when_its_holder_was_away(
    place: Place,
) -> None:
    done: list[str] = []
    begun, gate = asyncio.Event(), asyncio.Event()
    desk, surgery = Service("desk"), Service("surgery")

    @desk.step
    async def note() -> None: ...

    @surgery.step
    async def operate() -> None:
        done.append(step_info().idempotency_key)
        begun.set()
        await gate.wait()

    @desk.workflow(mode="choreography")
    async def visit() -> None:
        await asyncio.gather(note(), operate())

    app = App("clinic", [desk, surgery], store=str(place), config=PATIENT)
    async with app.worker(["surgery"]) as client:
        async with app.worker(["desk"]):
            run = await client.start(visit)
            await begun.wait()

            async def noted() -> bool:
                return len((await run.history()).entries) == 2

            await until(noted)
        gate.set()
        await asyncio.sleep(0.3)  # it is answered
        async with app.worker(["desk"]):
            await run.result(timeout=30)
            await asyncio.sleep(0.3)
    assert done == [f"{run.id}#1"]
