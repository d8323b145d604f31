"""A process that works for a small shop and watches its conversations, to be killed by tests.

`python -m tests.integration.watchers STORE LEASE_S` works until it is killed. What its handlers are
told of overdue conversations is in the store, as events.
"""

from __future__ import annotations

import asyncio
import sys

from pavane import App, ConversationOverdue, EngineConfig, Event, Service
from pavane.observe import monitor

office = Service("office")


class Asked(Event, key="id"):
    id: str


class Answered(Event, key="id"):
    id: str


class Complained(Event, key="id"):
    id: str


@office.on(Asked)
async def answer(event: Asked) -> Answered | None:
    return None if event.id.startswith("silent") else Answered(id=event.id)


@office.on(ConversationOverdue)
async def complain(event: ConversationOverdue) -> Complained:
    return Complained(id=event.conversation)


def app_on(store: str, lease_s: float, *, watched: bool = True) -> App:
    app = App("office", [office], store=store, config=EngineConfig(lease_s=lease_s))
    if watched:
        app.conversation(start=Asked, ends=[Answered], within="1s", name="questions")
    return app


async def main(store: str, lease_s: float) -> None:
    async with app_on(store, lease_s).worker():
        await asyncio.Event().wait()


if __name__ == "__main__":
    monitor.POLL_S = 0.01
    asyncio.run(main(sys.argv[1], float(sys.argv[2])))
