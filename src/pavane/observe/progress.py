"""How far a conversation is under its contract: pure functions over its row and one event."""

from __future__ import annotations

from typing import Literal

import msgspec

from pavane.contract import Contract
from pavane.stores.eventlog import ConversationRow, EventRow

State = Literal["open", "on-time", "late", "overdue", "stuck", "twice"]
"""Open within its time, ended within it, ended after it, open after it, open after it and nothing
moves any more, ended more than once."""

_times = msgspec.json.Decoder(dict[str, int])


class Passed(msgspec.Struct, frozen=True):
    """A milestone: when it was reached, by when it should be, and whether that was kept."""

    type: str
    reached_us: int | None
    due_us: int | None
    state: Literal["pending", "reached", "late", "missed"]


def follow(
    contract: Contract, row: ConversationRow | None, event: EventRow
) -> ConversationRow | None:
    """Return the row with `event` taken into account, or None if it is of no conversation.

    Following an event again changes nothing, except that `ends` counts it again.
    """
    if row is None:
        if event.type != contract.start:
            return None
        row = ConversationRow(
            contract.name, event.conversation, event.key, event.at_us,
            event.at_us + contract.within_us,
        )  # fmt: skip
    if event.at_us >= row.last_us:
        row.last, row.last_us = event.type, event.at_us
    if event.type in contract.ends:
        row.ends += 1
        if row.ended_us is None:
            row.ended_us, row.end = event.at_us, event.type
    if any(milestone.type == event.type for milestone in contract.milestones):
        seen = _times.decode(row.milestones)
        if event.type not in seen:
            row.milestones = msgspec.json.encode({**seen, event.type: event.at_us})
    return row


def state_of(row: ConversationRow, now_us: int, *, stuck: bool = False) -> State:
    """Return how a conversation stands; `stuck` is whether something is known to hold it up."""
    if row.ends > 1:
        return "twice"
    if row.ended_us is not None:
        return "on-time" if row.ended_us <= row.due_us else "late"
    if now_us < row.due_us:
        return "open"
    return "stuck" if stuck else "overdue"


def milestones_of(contract: Contract | None, row: ConversationRow, now_us: int) -> list[Passed]:
    """Return the milestones as declared; without the contract, those that were reached."""
    seen = _times.decode(row.milestones)
    if contract is None:
        return [Passed(type, at_us, None, "reached") for type, at_us in seen.items()]
    found: list[Passed] = []
    for milestone in contract.milestones:
        at_us = seen.get(milestone.type)
        within_us = milestone.within_us
        due_us = None if within_us is None else row.started_us + within_us
        if at_us is not None:
            late = due_us is not None and at_us > due_us
            found.append(Passed(milestone.type, at_us, due_us, "late" if late else "reached"))
        else:
            over = row.ended_us is not None or (due_us is not None and now_us >= due_us)
            found.append(Passed(milestone.type, None, due_us, "missed" if over else "pending"))
    return found
