"""One order by events, as a tree: under each event what it caused, by whom and when."""

from __future__ import annotations

from collections.abc import Sequence

from pavane import Client
from pavane.stores.eventlog import EventFilter, EventRow


async def read_tree(client: Client, conversation: str) -> list[str]:
    """Return the conversation's tree of causes, line by line."""
    found = await client.events.list(EventFilter(conversation=conversation, limit=1000))
    return draw_tree(found[::-1])


def draw_tree(events: Sequence[EventRow]) -> list[str]:
    """Draw events, oldest first; the first is what began it."""
    lines = _branch(events[0], events, "", "")
    width = max(len(title) for title, _ in lines)
    began_us = events[0].at_us
    return [
        f"{title:<{width}}  {row.source:<10} {(row.at_us - began_us) / 1000:>7,.0f} ms"
        for title, row in lines
    ]


def _branch(
    row: EventRow, events: Sequence[EventRow], first: str, rest: str
) -> list[tuple[str, EventRow]]:
    lines = [(f"{first}{row.type}", row)]
    caused = [event for event in events if event.cause == row.id]
    for event in caused:
        is_last = event is caused[-1]
        fork, line = ("└─ ", "   ") if is_last else ("├─ ", "│  ")
        lines += _branch(event, events, rest + fork, rest + line)
    return lines
