"""A process that lives among events: an event starts it, it waits for one, and publishes others.

    python examples/hybrid.py

A workshop builds lutes to order. `build` is a workflow: the order of its steps matters, and it
undoes what it did if the customer never pays. Everything around it only reacts: the event
`LuteOrdered` starts it, the bank announces `PaymentConfirmed` to whom it may concern, and the
newsletter rejoices in `LuteReady`. None of them knows the workflow, and it knows none of them.
"""

from __future__ import annotations

import asyncio
import tempfile
from datetime import timedelta

from pavane import App, Event, Service, receive, saga

workshop, timber, bank, newsletter = map(Service, ("workshop", "timber", "bank", "newsletter"))


class LuteOrdered(Event, key="order_id"):
    order_id: str
    courses: int
    pay_within: timedelta = timedelta(days=14)


class InvoiceSent(Event, key="order_id"):
    order_id: str
    cents: int


class PaymentConfirmed(Event, key="order_id"):
    order_id: str
    cents: int


class LuteReady(Event, key="order_id"):
    order_id: str
    courses: int


class OrderDropped(Event, key="order_id"):
    order_id: str
    reason: str


# -- the process: what must happen in order, and be undone -------------------------------------

WOOD: list[str] = []


@timber.step
async def put_back(order_id: str) -> None:
    if order_id in WOOD:
        WOOD.remove(order_id)


@timber.step(undo=put_back)
async def set_aside(order_id: str) -> None:
    if order_id not in WOOD:
        WOOD.append(order_id)


@workshop.step
async def build_it(order_id: str, courses: int) -> str:
    return f"a lute of {courses} courses"


@workshop.workflow(starts_on=LuteOrdered, receives=[PaymentConfirmed], mode="choreography")
async def build(order: LuteOrdered) -> str:
    """Each `LuteOrdered` starts one run of this, whatever crashes."""
    try:
        async with saga():
            await set_aside(order.order_id)
            await workshop.publish(
                InvoiceSent(order_id=order.order_id, cents=order.courses * 12_000)
            )
            # A published event, found by its key; one that came before the wait is found, too.
            async with asyncio.timeout(order.pay_within.total_seconds()):
                await receive(PaymentConfirmed, key=order.order_id)
            lute = await build_it(order.order_id, order.courses)
    except TimeoutError:
        await workshop.publish(OrderDropped(order_id=order.order_id, reason="it was not paid"))
        return "nothing"
    await workshop.publish(LuteReady(order_id=order.order_id, courses=order.courses))
    return lute


# -- around it: whoever is concerned -----------------------------------------------------------

BROKE = {"l-2"}
PRINTED: list[str] = []


@bank.on(InvoiceSent, where=lambda invoice: invoice.order_id not in BROKE)
async def pay(invoice: InvoiceSent) -> PaymentConfirmed:
    return PaymentConfirmed(order_id=invoice.order_id, cents=invoice.cents)


@newsletter.on(LuteReady)
async def rejoice(lute: LuteReady) -> None:
    PRINTED.append(f"{lute.order_id} has a new lute of {lute.courses} courses")


@newsletter.on(OrderDropped)
async def regret(order: OrderDropped) -> None:
    PRINTED.append(f"{order.order_id} has none, because {order.reason}")


SERVICES = [workshop, timber, bank, newsletter]
app = App("hybrid", services=SERVICES)


# -- two orders --------------------------------------------------------------------------------


async def order_two(app: App) -> None:
    for order in (
        LuteOrdered(order_id="l-1", courses=6),
        LuteOrdered(order_id="l-2", courses=10, pay_within=timedelta(seconds=0.5)),
    ):
        await app.publish(order, id=order.order_id)
    async with asyncio.timeout(60):
        while len(PRINTED) < 2:
            await asyncio.sleep(0.01)
    for order_id in ("l-1", "l-2"):
        # A run that an event started is named after the event and the workflow.
        print(f"{order_id}: {await app.get(f'{order_id}.build').result()}")
    print("\n".join(sorted(PRINTED)))
    print(f"wood still set aside for: {', '.join(WOOD)}")


async def main() -> None:
    with tempfile.TemporaryDirectory(prefix="pavane-hybrid-") as folder:
        async with App("hybrid", services=SERVICES, store=f"{folder}/hybrid.db") as app:
            await order_two(app)


if __name__ == "__main__":
    asyncio.run(main())
