"""The demo's orders: read from `orders.jsonl`, which this module once wrote.

    python -m examples.shop.orders      # writes the same file again

Orders come in threes of the same kind, so that each form gets the same share of every trouble.
"""

from __future__ import annotations

import random
from pathlib import Path

import msgspec

from examples.shop.services import BEYOND, FOG, OrderPlaced

FILE = Path(__file__).with_name("orders.jsonl")
THREES = 100
GOODS = {"lute": 89_000, "recorder": 4_900, "crumhorn": 21_500, "tabor": 12_000, "viol": 145_000}
TOWNS = ("Langres", "Ferrara", "Mantua", "Burgos", "Dijon", "Exeter")


def read_orders(count: int | None = None) -> list[OrderPlaced]:
    """Read the first `count` orders; all by default."""
    lines = FILE.read_bytes().splitlines()[:count]
    return [msgspec.json.decode(line, type=OrderPlaced) for line in lines]


def write_orders(file: Path = FILE) -> None:
    """Make up the orders, always the same ones."""
    chance = random.Random(1561)
    troubles = ["declined"] * 6 + ["sold out"] * 4 + ["fog"] * 8 + ["beyond"] * 3
    troubles += ["none"] * (THREES - len(troubles))
    chance.shuffle(troubles)
    lines: list[bytes] = []
    for trouble in troubles:
        for _ in range(3):
            sku = "orpharion" if trouble == "sold out" else chance.choice(list(GOODS))
            town = {"fog": FOG, "beyond": BEYOND}.get(trouble) or chance.choice(TOWNS)
            order = OrderPlaced(
                order_id=f"o-{len(lines) + 1:04}",
                sku=sku,
                cents=GOODS.get(sku, 210_000),
                card="declined" if trouble == "declined" else "good",
                town=town,
            )
            lines.append(msgspec.json.encode(order) + b"\n")
    file.write_bytes(b"".join(lines))


if __name__ == "__main__":
    write_orders()
