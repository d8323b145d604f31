"""A tailor's shop for tests of what users are given: steps, a month of waiting, handlers."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from pavane import App, Event, Retry, Service, receive, saga, step_info
from pavane.testing import Sim

shop, workshop, till = map(Service, ("shop", "workshop", "till"))


class Ordered(Event, key="order"):
    order: str
    days: int = 30


class Delivered(Event, key="order"):
    order: str


class Fitted(Event):
    inches: int


@workshop.step(retry=Retry(attempts=3, first="10m", jitter=0))
async def cut(order: str) -> str:
    return f"cloth-{order}"


@workshop.step
def sew(cloth: str) -> str:
    return f"coat-of-{cloth}"


@workshop.step
async def nap(duration_s: float) -> str:
    await asyncio.sleep(duration_s)
    return step_info().step


@workshop.step
async def telephone() -> None:
    await asyncio.open_connection("tailor.example", 80)


@till.step
def undo_payment(order: str) -> None:
    pass


@till.step(undo=undo_payment)
def pay(order: str) -> str:
    return f"receipt-{order}"


@shop.workflow(starts_on=Ordered, mode="choreography")
async def make(order: Ordered) -> str:
    coat = await sew(await cut(order.order))
    await asyncio.sleep(timedelta(days=order.days).total_seconds())
    await shop.publish(Delivered(order=order.order))
    return coat


@shop.workflow
async def remind(times: int) -> int:
    for _ in range(times):
        await pay("reminder")
        await asyncio.sleep(86_400)
    return times


@shop.workflow(receives=[Fitted])
async def fit(order: str) -> int:
    async with saga():
        await pay(order)
        return (await receive(Fitted)).inches


@shop.workflow
async def rest(duration_s: float) -> str:
    return await nap(duration_s)


@shop.workflow
async def call() -> None:
    await telephone()


@till.on(Delivered, retry=Retry(attempts=2, first="1h", jitter=0))
async def thank(event: Delivered) -> None:
    if event.order == "rude":
        raise ValueError("no thanks")


app = App("tailor", services=[shop, workshop, till])

TailorSim = Sim[None]
