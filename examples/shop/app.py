"""A shop of four services that fulfils orders: charge, reserve, label, ship, or undo all of it.

    pavane run examples.shop.app:app --service payments --store shop.db

The process is `fulfil`, and it says nothing about how it is run: orchestrated, the service `orders`
directs the others; choreographed, each order travels from service to service with its journal. The
demo beside this file runs one half this way and one half that way, and kills processes meanwhile.
"""

from __future__ import annotations

import asyncio

from examples.shop.world import World
from pavane import App, Event, Retry, Service, saga, step_info

orders, payments, stock, shipping = map(Service, ("orders", "payments", "stock", "shipping"))


class OrderPlaced(Event, key="order_id"):
    """A customer wants something."""

    order_id: str
    sku: str
    cents: int
    card: str
    town: str


class OrderShipped(Event, key="order_id"):
    """It is on its way."""

    order_id: str
    tracking: str


class CardDeclined(Exception):
    """Final: asking again would not help."""


class SoldOut(Exception):
    """There is none left."""


class CarrierBusy(Exception):
    """The carrier does not take the parcel now; perhaps later."""


SOLD_OUT = {"orpharion"}
FOG = "Fogbank"
"""A town where the carrier gets lost once or twice before it arrives."""
BEYOND = "Thule"
"""A town where it never does."""


# Steps may be plain functions; they run in threads. Each goes through `World.asked`, which takes
# its time and counts, and records its effect under the idempotency key of the step.


@payments.step(retry=Retry(attempts=5, first="200ms", give_up=(CardDeclined,)), timeout="10s")
def charge(order_id: str, card: str, cents: int) -> str:
    """Charge a card; return the payment's number."""
    world = World.here()
    with world.asked():
        if card == "declined":
            raise CardDeclined(f"{cents / 100:,.2f} is more than there is")
        world.record("charged", order_id)
        return f"p-{order_id}"


@payments.step
def refund(order_id: str, payment: str) -> None:
    """Give the money back."""
    world = World.here()
    with world.asked():
        world.record("refunded", order_id)


@stock.step
def release(order_id: str, sku: str) -> None:
    """Put a reserved thing back on the shelf, if it was taken from there at all."""
    world = World.here()
    with world.asked():
        world.record("released", order_id)


@stock.step(undo=release)
def reserve(order_id: str, sku: str) -> str:
    """Take a thing from the shelf; return the parcel's number."""
    world = World.here()
    with world.asked():
        if sku in SOLD_OUT:
            raise SoldOut(f"no {sku} left")
        world.record("reserved", order_id)
        return f"b-{order_id}"


@shipping.step
def label(order_id: str, town: str) -> str:
    """Print a label. One that is not used costs nothing, so nothing undoes it."""
    with World.here().asked():
        return f"{order_id} to {town}"


@shipping.step(retry=Retry(attempts=4, first="100ms", factor=1.5, jitter=0.5))
def ship(order_id: str, parcel: str, town: str) -> str:
    """Hand a parcel to the carrier; return its tracking number."""
    world = World.here()
    with world.asked():
        lost = {FOG: 1 + order_id.endswith(("1", "2")), BEYOND: 99}.get(town, 0)
        if step_info().attempt <= lost:
            raise CarrierBusy(f"no way to {town} today")
        world.record("shipped", order_id)
        return f"t-{parcel}"


@orders.workflow
async def fulfil(order: OrderPlaced) -> str:
    """Fulfil one order; return the tracking number."""
    async with saga() as undo:
        payment = await charge(order.order_id, order.card, order.cents)
        undo(refund, order.order_id, payment)
        # Two things at once. `reserve` brings its own undo (see there), which is registered before
        # it starts: if printing the label fails, nobody here has the parcel's number to undo with.
        parcel, _ = await asyncio.gather(
            reserve(order.order_id, order.sku), label(order.order_id, order.town)
        )
        tracking = await ship(order.order_id, parcel, order.town)
    await orders.publish(OrderShipped(order_id=order.order_id, tracking=tracking))
    return tracking


app = App("shop", services=[orders, payments, stock, shipping])
