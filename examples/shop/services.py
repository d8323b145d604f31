"""The four services of the shop and what they can do: charge, reserve, label, ship, and undo it.

All three forms of the shop use these functions as they are. In a workflow (`fulfil.py`) calling one
is a step: it may be executed in another process, and is retried as declared here. In a handler
(`reactions.py`) it is a function that is called, and the handler is retried.
"""

from __future__ import annotations

from examples.shop.world import World
from pavane import Event, Retry, Service, step_info

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

CARRIER = Retry(attempts=4, first="100ms", factor=1.5, jitter=0.5)
"""How often the carrier is asked before the shop gives up."""


# They may be plain functions; they run in threads. Each goes through `World.asked`, which takes its
# time and counts, and records its effect under the idempotency key of the step or handler.


@payments.step(retry=Retry(attempts=5, first="200ms", give_up=(CardDeclined,)), timeout="10s")
def charge(order_id: str, card: str, cents: int) -> str:
    """Charge a card; return the payment's number."""
    world = World.here()
    with world.asked(order_id):
        if card == "declined":
            raise CardDeclined(f"{cents / 100:,.2f} is more than there is")
        world.record("charged", order_id)
        return f"p-{order_id}"


@payments.step
def refund(order_id: str, payment: str) -> None:
    """Give the money back."""
    world = World.here()
    with world.asked(order_id):
        world.record("refunded", order_id)


@stock.step
def release(order_id: str, sku: str) -> None:
    """Put a reserved thing back on the shelf, if it was taken from there at all."""
    world = World.here()
    with world.asked(order_id):
        world.record("released", order_id)


@stock.step(undo=release)
def reserve(order_id: str, sku: str) -> str:
    """Take a thing from the shelf; return the parcel's number."""
    world = World.here()
    with world.asked(order_id):
        if sku in SOLD_OUT:
            raise SoldOut(f"no {sku} left")
        world.record("reserved", order_id)
        return f"b-{order_id}"


@shipping.step
def label(order_id: str, town: str) -> str:
    """Print a label. One that is not used costs nothing, so nothing undoes it."""
    with World.here().asked(order_id):
        return f"{order_id} to {town}"


@shipping.step(retry=CARRIER)
def ship(order_id: str, parcel: str, town: str) -> str:
    """Hand a parcel to the carrier; return its tracking number."""
    world = World.here()
    with world.asked(order_id):
        lost = {FOG: 1 + order_id.endswith(("1", "2")), BEYOND: 99}.get(town, 0)
        if step_info().attempt <= lost:
            raise CarrierBusy(f"no way to {town} today")
        world.record("shipped", order_id)
        return f"t-{parcel}"
