"""What a workflow asks for: operations, each with an ordinal and a fingerprint."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import msgspec

from pavane.core.loop import DurableTimer

Kind = Literal["step", "child", "spawn", "timer", "receive", "publish", "attributes"]
Mode = Literal["orchestration", "choreography"]

BEGIN = "begin"
"""The detail of the "receive" by which a run waits for the permit to begin."""
EXPIRY = "expiry"
"""The name of the timer behind a run's own timeout."""


class Operation(msgspec.Struct, eq=False):
    """One durable request of a workflow.

    `args` are encoded when it is issued, so that later changes of the arguments do not count.
    `fingerprint` (kind, service, name) is what replay must ask for again at this ordinal.
    `decode` turns the journalled result into the declared type. `sent` is set by the engine once
    someone was asked to do it.
    """

    ordinal: int
    kind: Kind
    name: str
    service: str
    issued_us: int
    args: bytes = b"[]"
    detail: Any = None
    mode: Mode | None = None
    undo: bool = False
    decode: Callable[[bytes], Any] | None = None
    future: asyncio.Future[Any] | None = None
    handle: DurableTimer | None = None
    deadline_us: int = 0
    sent: bool = False

    @property
    def fingerprint(self) -> str:
        return _fingerprint("undo" if self.undo else self.kind, self.service, self.name)

    def __repr__(self) -> str:
        return f"<{self.ordinal}: {self.fingerprint}>"


class Planned(msgspec.Struct, frozen=True):
    """The detail of a "spawn" whose run has an id and a nominal time of its own."""

    workflow: Any
    run: str
    at_us: int


@lru_cache(maxsize=4096)
def _fingerprint(what: str, service: str, name: str) -> str:
    where = f"{service}." if service else ""
    return f"{what} {where}{name}"
