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

from pavane import App, Client, Event, Retry, Service, delivery, receive
from pavane.core.envelope import Redo, pack
from pavane.stores.eventlog import DeadFilter, DeadRow
from pavane.stores.port import Commit, Message

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


SERVICES = [sessions, mailing, search, billing, files, audit]
app = App("announcements", services=SERVICES)


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
    """Be the person who looks after dead letters: see the cause, repair it, have it retried."""
    letter = await first_dead(app.client)
    print(f"dead letter after {letter.attempts} attempts, {letter.key}: {letter.cause}")
    UNPAID.pop(letter.key)
    await retry_dead(app.client, letter, billing.name)


async def first_dead(client: Client) -> DeadRow:
    """Wait for a dead letter and return it."""
    while not (found := await client.store.dead_letters(DeadFilter())):
        await asyncio.sleep(0.01)
    return found[0]


async def retry_dead(client: Client, letter: DeadRow, service: str) -> None:
    """Have the handler, which is one of `service`, try again; durable when this returns."""
    written: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
    commit = Commit(lambda _: None)
    target = client.store.target_of(service, letter.key)
    redo = Redo(letter.handler, letter.pos, letter.no, letter.again)
    now_us = client.store.now_us()
    commit.messages = [
        Message("redo", f"~dead-{letter.no}", service, "", pack(redo), now_us, target)
    ]
    client.store.submit([commit], None, lambda results: written.set_result(results[0]))
    error = await written
    if error is not None:
        raise error


async def main() -> None:
    with tempfile.TemporaryDirectory(prefix="pavane-announcements-") as folder:
        store = f"{folder}/announcements.db"
        async with App("announcements", services=SERVICES, store=store) as app:
            await delete_users(app)


if __name__ == "__main__":
    asyncio.run(main())
