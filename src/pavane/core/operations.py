"""What a workflow asks for: operations, each with an ordinal and a fingerprint."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Literal

from pavane.core.loop import DurableTimer

Kind = Literal["step", "child", "spawn", "timer", "receive", "publish", "attributes"]
Mode = Literal["orchestration", "choreography"]

EXPIRY = "expiry"
"""The name of the timer behind a run's own timeout."""


class Operation:
    """One durable request of a workflow.

    `args` are encoded when it is issued, so that later changes of the arguments do not count.
    `fingerprint` (kind, service, name) is what replay must ask for again at this ordinal.
    `decode` turns the journalled result into the declared type. `sent` is set by the engine once
    someone was asked to do it.
    """

    __slots__ = (
        "args", "deadline_us", "decode", "detail", "fingerprint", "future", "handle", "issued_us",
        "kind", "mode", "name", "ordinal", "sent", "service", "undo",
    )  # fmt: skip

    def __init__(
        self,
        ordinal: int,
        kind: Kind,
        name: str,
        service: str,
        issued_us: int,
        args: bytes = b"[]",
        detail: Any = None,
        mode: Mode | None = None,
        undo: bool = False,
    ) -> None:
        self.ordinal = ordinal
        self.kind: Kind = kind
        self.name = name
        self.service = service
        self.issued_us = issued_us
        self.args = args
        self.decode: Callable[[bytes], Any] | None = None
        self.future: asyncio.Future[Any] | None = None
        self.handle: DurableTimer | None = None
        self.deadline_us = 0
        self.detail = detail
        self.mode: Mode | None = mode
        self.undo = undo
        self.sent = False
        where = f"{service}." if service else ""
        self.fingerprint = f"{'undo' if undo else kind} {where}{name}"

    def __repr__(self) -> str:
        return f"<{self.ordinal}: {self.fingerprint}>"
