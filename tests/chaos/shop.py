"""The shop of the examples, and a service that writes down every event of each order, in order."""

from __future__ import annotations

from examples.shop import services
from examples.shop.app import fulfil, reactions
from examples.shop.reactions import (
    DeliveryFailed,
    GoodsReleased,
    GoodsReserved,
    GoodsSoldOut,
    LabelPrinted,
    OrderCancelled,
    ParcelPacked,
    PaymentDeclined,
    PaymentRefunded,
    PaymentTaken,
)
from examples.shop.services import OrderPlaced, OrderShipped
from pavane import App, Event, Service, delivery
from tests.sim.books import Book

__all__ = ["app", "fulfil", "reactions"]

audit = Service("audit")
EVENTS: tuple[type[Event], ...] = (
    OrderPlaced, PaymentTaken, PaymentDeclined, GoodsReserved, GoodsSoldOut, LabelPrinted,
    ParcelPacked, OrderShipped, DeliveryFailed, GoodsReleased, PaymentRefunded, OrderCancelled,
)  # fmt: skip


@audit.on(*EVENTS, state=Book)
async def note(event: Event, book: Book) -> None:
    book.events.append(delivery().id)


app = App(
    "shop", [services.orders, services.payments, services.stock, services.shipping, audit]
)  # fmt: skip
app.conversation(start=OrderPlaced, ends=[OrderShipped, OrderCancelled], within="1m")
