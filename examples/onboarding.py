"""User onboarding: an account, a confirmed e-mail address, a desk, a laptop, a welcome.

    python examples/onboarding.py

The process waits for a person: a reminder goes out after a day, and after a week without an answer
the account is removed again. It is written as if nothing ever restarted: `asyncio.timeout` around
`receive` is a durable timer around a durable mailbox, so that week may contain any number of
deployments. Then things are provided in parallel, with an ordinary `asyncio.TaskGroup`.

Here a day takes a quarter of a second; see `Pace`.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from pavane import App, Event, Retry, Run, Service, receive, saga, uuid4

accounts, mail, equipment, access = map(Service, ("accounts", "mail", "equipment", "access"))


@dataclass(frozen=True)
class Person:
    name: str
    address: str


@dataclass(frozen=True)
class Pace:
    """How long we wait for people. It is an argument of the process, so tests can be impatient."""

    reminder: timedelta = timedelta(days=1)
    expiry: timedelta = timedelta(weeks=1)


@dataclass(frozen=True)
class Onboarded:
    """How it ended: with what the person got, or without anything."""

    status: Literal["welcome", "expired"]
    reminded: bool
    provided: tuple[str, ...] = ()


class EmailConfirmed(Event):
    """The person followed the link in the letter."""

    code: str


class NeverConfirmed(Exception):
    """Nobody followed the link in time."""


# -- the outside world -------------------------------------------------------------------------


class Letter:
    """What a person finds in the letter box."""

    def __init__(self, subject: str, code: str = "") -> None:
        self.subject = subject
        self.code = code


LETTER_BOXES: defaultdict[str, asyncio.Queue[Letter]] = defaultdict(asyncio.Queue)
ACCOUNTS: dict[str, Person] = {}


# -- steps -------------------------------------------------------------------------------------

PATIENT = Retry(attempts=5, first="50ms")


@accounts.step
async def open_account(person: Person) -> str:
    # A step may be executed more than once if a process dies at the wrong moment, so it must do the
    # same again: the account is named after the person's address, not after a counter.
    account = f"a-{person.address}"
    ACCOUNTS[account] = person
    return account


@accounts.step
async def remove_account(account: str) -> None:
    ACCOUNTS.pop(account, None)


@mail.step(retry=PATIENT)
async def ask_to_confirm(person: Person, code: str) -> None:
    LETTER_BOXES[person.address].put_nowait(Letter("Please confirm", code))


@mail.step(retry=PATIENT)
async def remind(person: Person, code: str) -> None:
    LETTER_BOXES[person.address].put_nowait(Letter("You have not confirmed yet", code))


@mail.step(retry=PATIENT)
async def say_goodbye(person: Person) -> None:
    LETTER_BOXES[person.address].put_nowait(Letter("Your account was removed"))


@mail.step(retry=PATIENT)
async def say_welcome(person: Person, provided: list[str]) -> None:
    LETTER_BOXES[person.address].put_nowait(Letter(f"Welcome! Yours: {', '.join(provided)}"))


@equipment.step(retry=PATIENT)
async def order_laptop(account: str) -> str:
    return "a laptop"


@equipment.step(retry=PATIENT)
async def assign_desk(account: str) -> str:
    return "a desk by the window"


@access.step(retry=PATIENT)
async def issue_badge(account: str) -> str:
    return "a badge"


# -- the process -------------------------------------------------------------------------------


@accounts.workflow(receives=[EmailConfirmed])
async def onboard(person: Person, pace: Pace = Pace()) -> Onboarded:
    code = str(uuid4())  # pavane's own: the same again when the run is replayed
    reminded = False
    try:
        async with saga() as undo:
            account = await open_account(person)
            undo(remove_account, account)
            await ask_to_confirm(person, code)
            reminded = await confirmed(person, code, pace)
            provided = await provide(account)
    except NeverConfirmed:
        await say_goodbye(person)
        return Onboarded("expired", reminded=True)
    await say_welcome(person, provided)
    return Onboarded("welcome", reminded, tuple(provided))


async def confirmed(person: Person, code: str, pace: Pace) -> bool:
    """Wait until the person confirms, and tell whether it took a reminder."""
    try:
        async with asyncio.timeout(pace.expiry.total_seconds()):
            try:
                async with asyncio.timeout(pace.reminder.total_seconds()):
                    await right_code(code)
                return False
            except TimeoutError:
                await remind(person, code)
            await right_code(code)
            return True
    except TimeoutError:
        raise NeverConfirmed(person.address) from None


async def right_code(code: str) -> None:
    """Wait for the right code; whoever guesses goes on guessing."""
    while (await receive(EmailConfirmed)).code != code:
        pass


async def provide(account: str) -> list[str]:
    """Get everything a new colleague needs, all at the same time."""
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(order_laptop(account)),
            group.create_task(assign_desk(account)),
            group.create_task(issue_badge(account)),
        ]
    return [task.result() for task in tasks]


SERVICES = [accounts, mail, equipment, access]
app = App("onboarding", services=SERVICES)


# -- three people, both ways -------------------------------------------------------------------

Habit = Literal["prompt", "forgetful", "silent"]
HABITS: tuple[Habit, ...] = ("prompt", "forgetful", "silent")


async def play(run: Run[Onboarded], person: Person, habit: Habit) -> Onboarded:
    """Be the person: read letters and answer the first, the second, or none."""
    letters = LETTER_BOXES[person.address]
    ignored = {"prompt": 0, "forgetful": 1, "silent": 0}[habit]
    for _ in range(ignored):
        await letters.get()
    if habit != "silent":
        letter = await letters.get()
        await run.send(EmailConfirmed(code="a guess"))
        await run.send(EmailConfirmed(code=letter.code))
    return await run.result()


async def show(app: App, mode: Literal["orchestration", "choreography"], pace: Pace) -> None:
    print(f"\n{mode}")

    async def one(habit: Habit) -> None:
        person = Person(habit.title(), f"{habit}.{mode}@example.org")
        run = await app.start(onboard, person, pace, id=f"{habit}-{mode}", mode=mode)
        ended = await play(run, person, habit)
        reminder = "after a reminder" if ended.reminded else "at once"
        got = f"confirmed {reminder}: {', '.join(ended.provided)}" if ended.provided else "removed"
        print(f"  {person.name:<10} {ended.status:<8} {got}")

    await asyncio.gather(*map(one, HABITS))
    print(f"  accounts now: {', '.join(sorted(ACCOUNTS))}")


async def main() -> None:
    day = timedelta(seconds=0.25)
    with tempfile.TemporaryDirectory(prefix="pavane-onboarding-") as folder:
        async with App("onboarding", services=SERVICES, store=f"{folder}/onboarding.db") as app:
            await show(app, "orchestration", Pace(reminder=day, expiry=7 * day))
            await show(app, "choreography", Pace(reminder=day, expiry=7 * day))


if __name__ == "__main__":
    asyncio.run(main())
