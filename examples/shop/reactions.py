"""The shop without a process: each service reacts to what others tell, and nobody directs.

    OrderPlaced ── payments ─┬─ PaymentTaken ─┬─ stock ──── GoodsReserved or GoodsSoldOut
                             │                └─ shipping ─ LabelPrinted
                             └─ PaymentDeclined
    GoodsReserved and LabelPrinted ── shipping ─ ParcelPacked
    ParcelPacked ── shipping ─┬─ OrderShipped
                              └─ DeliveryFailed ─┬─ stock ──── GoodsReleased
                                                 └─ payments ─ PaymentRefunded
    GoodsSoldOut ── payments ─ PaymentRefunded
    and when all is undone ── orders ─ OrderCancelled

An event that says that something failed is what compensation reacts to. No service knows another;
each knows the events that concern it. What a handler returns is published in one commit with the
mark that it handled its event, so a process that dies in between repeats it, under the same
idempotency key, and nothing is published twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from examples.shop.services import (
    CARRIER,
    CardDeclined,
    CarrierBusy,
    OrderPlaced,
    OrderShipped,
    SoldOut,
    charge,
    label,
    orders,
    payments,
    refund,
    release,
    reserve,
    ship,
    shipping,
    stock,
)
from pavane import Event, Retry, delivery


class PaymentTaken(Event, key="order_id"):
    order_id: str
    payment: str
    sku: str
    town: str


class PaymentDeclined(Event, key="order_id"):
    order_id: str
    reason: str


class GoodsReserved(Event, key="order_id"):
    order_id: str
    parcel: str


class GoodsSoldOut(Event, key="order_id"):
    order_id: str
    payment: str
    reason: str


class LabelPrinted(Event, key="order_id"):
    order_id: str
    payment: str
    sku: str
    town: str


class ParcelPacked(Event, key="order_id"):
    """What was reserved has its label."""

    order_id: str
    payment: str
    sku: str
    parcel: str
    town: str


class DeliveryFailed(Event, key="order_id"):
    order_id: str
    payment: str
    sku: str
    reason: str


class GoodsReleased(Event, key="order_id"):
    order_id: str


class PaymentRefunded(Event, key="order_id"):
    order_id: str


class OrderCancelled(Event, key="order_id"):
    """It will not be shipped, and everything that was done for it is undone."""

    order_id: str
    reason: str


# -- payments ----------------------------------------------------------------------------------


@payments.on(OrderPlaced, retry=Retry(attempts=5, first="200ms"))
async def take_payment(order: OrderPlaced) -> PaymentTaken | PaymentDeclined:
    try:
        payment = await charge(order.order_id, order.card, order.cents)
    except CardDeclined as no:  # an answer, not a failure: it is published, and not tried again
        return PaymentDeclined(order_id=order.order_id, reason=str(no))
    return PaymentTaken(order_id=order.order_id, payment=payment, sku=order.sku, town=order.town)


@payments.on(GoodsSoldOut, DeliveryFailed)
async def return_payment(failure: GoodsSoldOut | DeliveryFailed) -> PaymentRefunded:
    await refund(failure.order_id, failure.payment)
    return PaymentRefunded(order_id=failure.order_id)


# -- stock -------------------------------------------------------------------------------------


@stock.on(PaymentTaken)
async def pick(paid: PaymentTaken) -> GoodsReserved | GoodsSoldOut:
    try:
        parcel = await reserve(paid.order_id, paid.sku)
    except SoldOut as none:
        return GoodsSoldOut(order_id=paid.order_id, payment=paid.payment, reason=str(none))
    return GoodsReserved(order_id=paid.order_id, parcel=parcel)


@stock.on(DeliveryFailed)
async def put_back(failure: DeliveryFailed) -> GoodsReleased:
    await release(failure.order_id, failure.sku)
    return GoodsReleased(order_id=failure.order_id)


# -- shipping ----------------------------------------------------------------------------------


@shipping.on(PaymentTaken)
async def print_label(paid: PaymentTaken) -> LabelPrinted:
    await label(paid.order_id, paid.town)
    return LabelPrinted(order_id=paid.order_id, payment=paid.payment, sku=paid.sku, town=paid.town)


@dataclass
class Bench:
    """What lies on the packing bench for one order: whatever came first waits for the other."""

    goods: GoodsReserved | None = None
    label: LabelPrinted | None = None


@shipping.on(GoodsReserved, LabelPrinted, state=Bench)
async def pack(event: GoodsReserved | LabelPrinted, bench: Bench) -> ParcelPacked | None:
    """A join. The state is loaded, changed and saved with the commit, one event at a time."""
    if isinstance(event, GoodsReserved):
        bench.goods = event
    else:
        bench.label = event
    if bench.goods is None or bench.label is None:
        return None
    return ParcelPacked(
        order_id=event.order_id, payment=bench.label.payment, sku=bench.label.sku,
        parcel=bench.goods.parcel, town=bench.label.town,
    )  # fmt: skip


@shipping.on(ParcelPacked, retry=CARRIER)
async def hand_over(packed: ParcelPacked) -> OrderShipped | DeliveryFailed:
    """Ask the carrier again and again; the last refusal is an answer that others react to."""
    try:
        tracking = await ship(packed.order_id, packed.parcel, packed.town)
    except CarrierBusy as busy:
        if delivery().attempt < CARRIER.attempts:
            raise
        return DeliveryFailed(
            order_id=packed.order_id, payment=packed.payment, sku=packed.sku, reason=str(busy)
        )
    return OrderShipped(order_id=packed.order_id, tracking=tracking)


# -- orders ------------------------------------------------------------------------------------


@dataclass
class Cancellation:
    """An order that cannot be shipped: why, and how many services have yet to undo their part."""

    reason: str = ""
    open: int = 0


@orders.on(
    PaymentDeclined, GoodsSoldOut, DeliveryFailed, PaymentRefunded, GoodsReleased,
    state=Cancellation,
)  # fmt: skip
async def cancel(
    event: PaymentDeclined | GoodsSoldOut | DeliveryFailed | PaymentRefunded | GoodsReleased,
    order: Cancellation,
) -> OrderCancelled | None:
    """Say that an order is cancelled once everything is undone.

    Events of one order come in the order in which they were published, so the failure is always
    seen before what was undone because of it.
    """
    match event:
        case PaymentDeclined(reason=reason):
            order.reason, order.open = reason, 0
        case GoodsSoldOut(reason=reason):
            order.reason, order.open = reason, 1
        case DeliveryFailed(reason=reason):
            order.reason, order.open = reason, 2
        case PaymentRefunded() | GoodsReleased():
            order.open -= 1
    if order.open:
        return None
    return OrderCancelled(order_id=event.order_id, reason=order.reason)
