"""The shop as one process: orchestrated, or with the baton passed from service to service.

The process says nothing about how it is run; `mode=` of a start does. Orchestrated, the service
`orders` directs the others; choreographed, each order travels with its journal.
"""

from __future__ import annotations

import asyncio

from examples.shop.services import (
    OrderPlaced,
    OrderShipped,
    charge,
    label,
    orders,
    refund,
    reserve,
    ship,
)
from pavane import saga


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
