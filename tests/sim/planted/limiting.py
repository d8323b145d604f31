"""Mistakes in who may begin: permits that are given twice, or never."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from pavane.core.envelope import Permit, unpack
from pavane.engine.limits import LIMIT, Limits
from pavane.stores.eventlog import AwaitRow
from pavane.testing.sim.database import SimStore
from tests.sim.planted.plant import planted


@planted("harbour")
def permits_forgotten_at_takeover() -> Iterator[None]:
    """Take up a limit with those who wait, and without those who have a permit."""
    awaits = SimStore.awaits

    async def of_those_who_wait(self: SimStore, *place: str) -> list[AwaitRow]:
        return [
            row
            for row in await awaits(self, *place)
            if not row.type.startswith(LIMIT) or not unpack(Permit, row.reply).given_us
        ]

    with patch.object(SimStore, "awaits", of_those_who_wait):
        yield


@planted("harbour")
def those_who_wait_forgotten_at_takeover() -> Iterator[None]:
    """Take up a limit only when somebody asks."""

    async def own(self: Limits, service: str, targets: Any) -> None:
        return

    with patch.object(Limits, "own", own):
        yield


@planted("harbour")
def rate_forgotten_at_takeover() -> Iterator[None]:
    """Know only from memory how many permits were given of late."""
    state = SimStore.state

    async def none(self: SimStore, service: str, name: str, key: str) -> bytes | None:
        return None if name.startswith(LIMIT) else await state(self, service, name, key)

    with patch.object(SimStore, "state", none):
        yield


@planted("harbour")
def nobody_is_asked_for_a_permit() -> Iterator[None]:
    """Never ask those who have a permit whether they need it."""
    with patch.object(Limits, "tick", lambda self: None):  # pyright: ignore
        yield
