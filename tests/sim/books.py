"""What scenarios have in common: refusals, and handlers that write down what they saw, in order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pavane import Retry, delivery
from pavane.core.codec import decoder
from pavane.testing.sim.checks import Violation
from pavane.testing.sim.outside import outside
from pavane.testing.sim.simulation import Simulation


class Refused(Exception):
    """That is not done, now or later."""


STUBBORN = Retry(attempts=4, first="20ms", most="200ms", give_up=(Refused,))
FOR_EVER = Retry(attempts=100, first="20ms", most="200ms")


@dataclass
class Book:
    """What happened under a key, in order."""

    events: list[str] = field(default_factory=list[str])

    async def enter(self, what: str) -> None:
        """Tell the outside world of the event that is handled, and write it down."""
        it = delivery()
        await outside.get().ask(what, it.idempotency_key, it.id, effect=lambda: None)
        self.events.append(it.id)


def check_books(sim: Simulation, service: str, event: str, keys: Iterable[str]) -> None:
    """Each event was seen once by the service that keeps a book of it, in order per key (4, 6)."""
    data: Any = sim.database.root._data
    type_of = {row.id: row.type for row in data.events.log}
    for key in keys:
        published = [row.id for row in data.events.log if row.type == event and row.key == key]
        raw = data.events.states.get((service, Book.__name__, key))
        seen = [id for id in (decoder(Book)(raw).events if raw else []) if type_of[id] == event]
        for wrong in wrong_book(service, key, seen, published):
            raise Violation(wrong)


def wrong_book(service: str, key: str, seen: list[str], published: list[str]) -> list[str]:
    """Say what is wrong with what a service saw of a key."""
    if seen == published:
        return []
    return [f"{service} saw {seen} of {key}, and published were {published}."]
