"""The shop: four services, and three ways to fulfil an order with them.

    pavane run examples.shop.app:app --service payments --store shop.db

`fulfil.py` is the process as one function, run orchestrated or with the baton passed;
`reactions.py` is the same by events alone. Nothing prevents a shop from doing all three at once,
and this one does.
"""

from __future__ import annotations

from examples.shop import fulfil, reactions
from examples.shop.reactions import OrderCancelled
from examples.shop.services import OrderPlaced, OrderShipped, orders, payments, shipping, stock
from pavane import App

__all__ = ["app", "fulfil", "reactions"]

app = App("shop", services=[orders, payments, stock, shipping])

# Where nobody directs, somebody watches: `pavane conversations list` tells which orders are late
# or stuck, and why. Nothing waits for the watcher.
app.conversation(start=OrderPlaced, ends=[OrderShipped, OrderCancelled], within="1m")
