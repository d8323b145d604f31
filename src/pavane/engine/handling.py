"""One call of a handler: what it is about, and what it asks for while it runs.

What is asked for takes effect with the commit that marks the event as handled, or not at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from msgspec import Raw

from pavane.core.baton import Header
from pavane.core.codec import encode_fitting
from pavane.core.envelope import Signal, Start, pack
from pavane.engine.mailbox import Mailbox
from pavane.engine.publishing import checked_size, derived_id, event_row, origin
from pavane.engine.subscription import Item
from pavane.errors import OnlyInHandler, UnknownName
from pavane.event import class_of
from pavane.handler import Delivery, Handler, Origin
from pavane.stores.eventlog import EventRow, MarkRow, Outcome, Reaction
from pavane.stores.port import Message

if TYPE_CHECKING:
    from pavane.engine.registry import Registry
    from pavane.engine.session import Session


class Handling:
    """One call of a handler: what it is about, and what it asks for."""

    deletes_state = False
    _outboxed: Counter[str] | None = None
    """How often it published the same through a connection."""

    def __init__(self, session: Session, handler: Handler, item: Item, now_us: int) -> None:
        self._session = session
        self._handler = handler
        self._item = item
        self._count = 0
        self._closed = False
        self.now_us = now_us
        self.events: list[EventRow] = []
        self.messages: list[Message] = []
        self.members: list[tuple[str, str]] = []
        self.reaction = Reaction()
        self.settled: list[Callable[[], None]] = []
        """Called when what became of the call is durable, or known not to be."""

    @property
    def row(self) -> EventRow:
        return self._item.row

    @property
    def registry(self) -> Registry:
        return self._session.registry

    @property
    def mailbox(self) -> Mailbox:
        return self._session.handlers.mailbox

    def restart(self) -> None:
        """Forget what was asked for: the handler is called once more, for the same attempt."""
        self._count, self._closed, self.deletes_state = 0, False, False
        self.events, self.messages, self.members = [], [], []
        self._outboxed = None

    def close(self) -> None:
        """Take nothing more: the handler has returned, and what it asked for is being written."""
        self._closed = True

    def delivery(self) -> Delivery:
        row, item = self._item.row, self._item
        return Delivery(
            row.id, row.type, row.key, row.source, datetime.fromtimestamp(row.at_us / 1e6, UTC),
            row.conversation, row.cause, item.attempt,
            f"{row.id}:{self._handler!r}{':' + item.again if item.again else ''}",
        )  # fmt: skip

    def _derived_id(self) -> str:
        self._count += 1
        row, handler, again = self._item.row, self._handler, self._item.again
        return derived_id(
            row.conversation,
            f"{row.id}>{handler.service.name}.{handler.name}#{self._count}{again and f'~{again}'}",
        )

    def _check_open(self) -> None:
        if self._closed:
            raise OnlyInHandler(
                f"Handler {self._handler!r} has returned, and what it asked for is written. Await "
                f"what publishes, starts or sends inside the handler."
            )

    def origin(self, content: str) -> Origin:
        self._check_open()
        row, handler = self._item.row, self._handler
        self._outboxed = self._outboxed or Counter()
        return origin(
            f"{row.id}>{handler.service.name}.{handler.name}{self._item.again}", content,
            self._outboxed, handler.service.name, row.conversation, row.id, row.trace,
            self._session.config.payload_max_bytes,
        )  # fmt: skip

    def publish(self, event: Any, source: str) -> str:
        self._check_open()
        row = self._item.row
        published = event_row(
            self._session.store, event, id=self._derived_id(), source=source,
            at_us=self._session.now_us(), conversation=row.conversation, cause=row.id,
            trace=row.trace,
        )  # fmt: skip
        self.events.append(checked_size(published, self._session.config.payload_max_bytes))
        return published.id

    def delete_state(self) -> None:
        self._check_open()
        if self._handler.options.state is None:
            raise OnlyInHandler(
                f"Handler {self._handler!r} keeps no state: declare it with state=…."
            )
        self.deletes_state = True

    def start(self, workflow: Any, args: bytes, id: str | None) -> str:
        self._check_open()
        row, home = self._item.row, workflow.service.name
        run = id or self._derived_id()
        header = Header(
            run=run, workflow=workflow.name, version=workflow.version, home=home,
            mode=workflow.mode, started_us=self.now_us, conversation=row.conversation,
            timeout_us=round((workflow.timeout_s or 0) * 1e6), cause=row.id,
        )  # fmt: skip
        self._message("start", run, home, run, pack(Start(header, Raw(args))))
        self.members.append((row.conversation, run))
        return run

    def send(self, workflow: Any, run: str, event: Any) -> None:
        self._check_open()
        id = f"{run}#s-{self._derived_id()}"
        body = pack(Signal(class_of(event).event_type, Raw(encode_fitting(event))))
        self._message("signal", id, workflow.service.name, run, body)

    def _message(self, kind: str, id: str, to: str, run: str, body: bytes) -> None:
        if to not in self._session.registry.services:
            raise UnknownName(
                f"Handler {self._handler!r} asks service {to!r} for something, which this app does "
                f"not have. List it, App(services=[…]), and start the workers anew."
            )
        target = self._session.store.target_of(to, run)
        self.messages.append(Message(kind, id, to, run, body, self.now_us, target))


def mark(
    reaction: Reaction, no: int, items: list[Item], outcome: Outcome, now_us: int, by: str = ""
) -> None:
    """Mark events as handled by handler `no`, and end their custody."""
    reaction.marks = marks = [
        MarkRow(no, item.row.pos, now_us, now_us - item.began_us, item.attempt, outcome, by)
        for item in items
    ]
    parked = [item for item in items if item.parked is not None]
    if parked:
        reaction.unparked = [(no, item.row.pos) for item in parked]
        again = {item.row.pos for item in parked if item.is_repetition}
        reaction.marks = [one for one in marks if one.pos not in again]
        reaction.remarks = [one for one in marks if one.pos in again]
