"""A post office for simulations: letters come in bursts, and are handled in order by recipient.

The world fails all the time, so that much is parked. Two services keep books, one of which two
handlers write into; what is refused becomes a dead letter; and runs wait for answers that are
published at the same instant.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from pavane import App, Client, EngineConfig, Event, Retry, Run, Service, receive
from pavane.testing.sim.checks import Violation, check_answers
from pavane.testing.sim.outside import outside
from pavane.testing.sim.simulation import Simulation, insist
from tests.sim.books import FOR_EVER, Book, check_books

office, rounds = services = [Service(name) for name in ("office", "rounds")]
RECIPIENTS = ("ada", "bob", "cem")
LETTERS = 12
QUESTIONS = 3
TRIALS = 2
PATIENCE = 20
FAILING = 0.4
BURST_S = 0.03


class Letter(Event, key="to"):
    to: str
    number: int


class Sorted(Event, key="to"):
    to: str


class Answer(Event, key="question"):
    question: str


class Unreadable(Exception):
    """Nobody can read that."""


class Readers:
    """Who reads the letters, and does not do so for ever."""

    def __init__(self, sim: Simulation) -> None:
        self._sim = sim
        self._times: Counter[int] = Counter()

    def read(self, number: int) -> None:
        self._times[number] += 1
        if self._times[number] > PATIENCE:
            self._sim.break_off(f"Letter {number} was read {PATIENCE} times.")


@office.on(Letter, state=Book, retry=FOR_EVER)
async def sort(letter: Letter, book: Book) -> Sorted:
    await book.enter("sort")
    return Sorted(to=letter.to)


@office.on(Sorted, state=Book, retry=FOR_EVER)
async def count(event: Sorted, book: Book) -> None:
    """Write into the same book as `sort`."""
    await book.enter("count")


@rounds.on(Sorted, state=Book, retry=FOR_EVER)
async def carry(event: Sorted, book: Book) -> None:
    await book.enter("carry")


@rounds.on(Letter, retry=Retry(attempts=TRIALS, first="20ms"), breaker=None)
async def read(letter: Letter) -> None:
    readers: Readers = outside.get().model
    readers.read(letter.number)
    if is_unreadable(letter.number):
        raise Unreadable(letter.to)


def is_unreadable(number: int) -> bool:
    return number % 3 == 0


@office.workflow(receives=[Answer])
async def ask(question: str) -> str:
    return (await receive(Answer, key=question)).question


class Post:
    """The scenario: bursts of letters, and questions that are answered as they are asked."""

    def __init__(self) -> None:
        self.app = app
        self.answers: dict[str, tuple[str, Any]] = {}

    async def customer(self, sim: Simulation, client: Client) -> None:
        sim.outside.failing = FAILING
        sim.outside.model = Readers(sim)
        async with asyncio.TaskGroup() as group:
            for number in range(LETTERS):
                group.create_task(self._send(sim, client, number))
            for number in range(QUESTIONS):
                group.create_task(self._ask(sim, client, f"q{number}"))

    async def _send(self, sim: Simulation, client: Client, number: int) -> None:
        bursts, random = len(RECIPIENTS), sim.clock.random
        begins_s = (number % bursts) / bursts * sim.storm.ends_us / 1e6
        await asyncio.sleep(begins_s + random.random() * BURST_S)
        letter = Letter(to=random.choice(RECIPIENTS), number=number)
        await insist(lambda: client.publish(letter, id=f"l{number}"))

    async def _ask(self, sim: Simulation, client: Client, id: str) -> None:
        await asyncio.sleep(sim.clock.random.random() * sim.storm.ends_us / 1e6 * 0.8)
        run: Run[str] = await insist(lambda: client.start(ask, id, id=id, mode=sim.mode))
        await insist(lambda: client.publish(Answer(question=id), id=f"a{id}"))
        await sim.ended(id)
        self.answers[id] = ("completed", await insist(run.result))

    def check(self, sim: Simulation) -> None:
        check_answers(sim.database, self.answers)
        check_books(sim, "office", "Letter", RECIPIENTS)
        check_books(sim, "office", "Sorted", RECIPIENTS)
        check_books(sim, "rounds", "Sorted", RECIPIENTS)
        dead = sim.database.root._data.events.dead.values()
        found = sorted((letter.event, letter.attempts) for letter in dead)
        if found != [
            (f"l{n}", TRIALS) for n in sorted(range(LETTERS), key=str) if is_unreadable(n)
        ]:
            raise Violation(f"Dead letters are {found}.")
        log = sim.database.root._data.events.log
        if len([event for event in log if event.type == "Sorted"]) != LETTERS:
            raise Violation("Not every letter was sorted once.")


app = App("post", services, store="memory", config=EngineConfig(lease_s=0.6, poll_s=0.06))
