"""Announcing a fact to a whole system: a user was deleted, and six services do their part.

    python examples/announcements.py

Whoever deletes a user publishes one event and knows nobody who reacts. Each service has its own
progress: the search index is down at first and is tried again, billing gives up on an unpaid
invoice until a person has sorted that out, the files go when the time to think it over has passed,
and none of them holds up another. The audit service listens to all, and says when it is over.
"""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass, field
from datetime import timedelta

from pavane import App, Event, Retry, Service, delivery, receive
from pavane.steering.dead import DeadQuery

sessions, mailing, search, billing, files, audit = map(
    Service, ("sessions", "mailing", "search", "billing", "files", "audit")
)


class UserDeleted(Event, key="user_id"):
    """A user wants to be forgotten; files are kept for `grace`, should they think it over."""

    user_id: str
    grace: timedelta = timedelta(days=30)


class PartDone(Event, key="user_id"):
    """A service has forgotten its part of a user."""

    user_id: str
    what: str


class UserForgotten(Event, key="user_id"):
    """Everybody has, and this is who did what."""

    user_id: str
    parts: list[str]


# -- what the services know of users -----------------------------------------------------------

SESSIONS = {"u-7": ["phone", "laptop"], "u-8": ["phone"]}
LISTS = {"news": {"u-7", "u-8"}, "offers": {"u-7"}}
INDEX = {"u-7": "Thoinot Arbeau", "u-8": "Fabritio Caroso"}
UNPAID = {"u-7": "invoice 1588"}
FILES = {"u-7": ["orchesographie.pdf"], "u-8": []}


# -- six services, one event -------------------------------------------------------------------


@sessions.on(UserDeleted)
async def revoke(user: UserDeleted) -> PartDone:
    # A handler may be called again if its process dies at the wrong moment; what it returns is
    # published once all the same. So what it does must bear repetition: `pop` with a default does.
    SESSIONS.pop(user.user_id, None)
    return PartDone(user_id=user.user_id, what="sessions revoked")


@mailing.on(UserDeleted)
async def unsubscribe(user: UserDeleted) -> PartDone:
    for subscribers in LISTS.values():
        subscribers.discard(user.user_id)
    return PartDone(user_id=user.user_id, what="taken off all mailing lists")


@search.on(UserDeleted, retry=Retry(attempts=8, first="50ms"))
async def unlist(user: UserDeleted) -> PartDone:
    """Fails at first; later events of this user wait for it, those of others do not."""
    if delivery().attempt <= 2:
        raise ConnectionError("the search index is being rebuilt")
    INDEX.pop(user.user_id, None)
    return PartDone(
        user_id=user.user_id, what=f"removed from the index at attempt {delivery().attempt}"
    )


@billing.on(UserDeleted, retry=Retry(attempts=2, first="50ms"))
async def close_account(user: UserDeleted) -> PartDone:
    """Gives up while an invoice is open; the event is kept as a dead letter, for a person."""
    if user.user_id in UNPAID:
        raise ValueError(f"{UNPAID[user.user_id]} is not paid")
    return PartDone(user_id=user.user_id, what="account closed")


@files.step
async def erase(user_id: str) -> int:
    return len(FILES.pop(user_id, []))


@files.workflow(starts_on=UserDeleted)
async def forget_files(user: UserDeleted) -> None:
    """An event starts a run where reacting takes long: this timer survives restarts."""
    await asyncio.sleep(user.grace.total_seconds())
    count = await erase(user.user_id)
    await files.publish(PartDone(user_id=user.user_id, what=f"{count} files erased"))


@dataclass
class Record:
    """What the audit service keeps of each user who is being forgotten."""

    parts: list[str] = field(default_factory=list)


PARTS = 5


@audit.on(PartDone, state=Record)
async def note(part: PartDone, record: Record) -> UserForgotten | None:
    """Write down who did what, one event of a user at a time; say when all have."""
    record.parts.append(f"{delivery().source}: {part.what}")
    if len(record.parts) < PARTS:
        return None
    return UserForgotten(user_id=part.user_id, parts=record.parts)


@audit.workflow(receives=[UserForgotten])
async def wait_until_forgotten(user_id: str) -> list[str]:
    """For those who want to know: an event that came before the wait is found, too."""
    return (await receive(UserForgotten, key=user_id)).parts


def make_app(store: str | None = None) -> App:
    services = [sessions, mailing, search, billing, files, audit]
    app = App("announcements", services=services, store=store)
    # Nobody directs, but somebody watches: `pavane conversations list` shows who is late, and why.
    app.conversation(start=UserDeleted, ends=[UserForgotten], within="31d")
    return app


app = make_app()


# -- two users leave ---------------------------------------------------------------------------


async def delete_users(app: App) -> None:
    for user_id in ("u-7", "u-8"):
        await app.publish(UserDeleted(user_id=user_id, grace=timedelta(seconds=0.5)))
    # u-8 owes nothing: that u-7 does holds back neither this user nor any other service.
    await show(app, "u-8")
    await sort_out_invoice(app)
    await show(app, "u-7")


async def show(app: App, user_id: str) -> None:
    """Wait until a user is forgotten, and print who did what."""
    run = await app.start(wait_until_forgotten, user_id)
    parts = await run.result(timeout="20s")
    print(f"{user_id} is forgotten:")
    for part in parts:
        print(f"  {part}")


async def sort_out_invoice(app: App) -> None:
    """Be the person who looks after dead letters; `pavane dead list` and `retry` do the same."""
    dead = app.client.dead
    while not (letters := await dead.list()):
        await asyncio.sleep(0.01)
    for letter in letters:
        print(f"dead letter after {letter.attempts} attempts, {letter.key}: {letter.cause}")
        UNPAID.pop(letter.key)
    await dead.retry(DeadQuery(handler="billing.close_account"))


async def main() -> None:
    with tempfile.TemporaryDirectory(prefix="pavane-announcements-") as folder:
        async with make_app(f"{folder}/announcements.db") as app:
            await delete_users(app)


if __name__ == "__main__":
    asyncio.run(main())
