"""A bank for simulations: five accounts at three services, and transfers between them.

The accounts are in the outside world. It must have as much money in the end as in the beginning,
each transfer moved all of its money or none, and the books, kept by a handler, must list the
transfers of each account in the order in which they were published.
"""

from __future__ import annotations

import asyncio
from typing import Any

from pavane import (
    App,
    Client,
    EngineConfig,
    Event,
    Run,
    RunEnded,
    RunFailed,
    Service,
    saga,
    step_info,
)
from pavane.testing.sim.checks import Violation, check_answers, check_same_requests
from pavane.testing.sim.outside import outside
from pavane.testing.sim.process import here
from pavane.testing.sim.simulation import Simulation, insist
from tests.sim.books import FOR_EVER, STUBBORN, Book, Refused, check_books

north, south, west = services = [Service(name) for name in ("north", "south", "west")]
ACCOUNTS = {"ada": north, "bob": north, "cem": south, "dot": south, "eve": west}
CLOSED = "eve"
"""An account that takes no money, every now and then."""
START_CENTS = 1000
TRANSFERS = 6


class Moved(Event, key="source"):
    source: str
    ticket: str


class Booked(Event, key="source"):
    source: str
    ticket: str


class Money:
    """Balances, and what was done under each ticket."""

    def __init__(self) -> None:
        self.balance = dict.fromkeys(ACCOUNTS, START_CENTS)
        self.legs: dict[tuple[str, str], int] = {}
        """By ticket and "withdraw" or "deposit": what it moved; 0 once undone or forbidden."""

    def move(self, leg: str, account: str, cents: int, ticket: str) -> None:
        if self.legs.get((ticket, leg)) == 0:
            raise Refused(f"{leg} of {ticket} was undone before it came")
        if self.balance[account] + cents < 0:
            raise Refused(f"{account} has only {self.balance[account]}")
        if leg == "deposit" and account == CLOSED and cents % 3 == 0:
            raise Refused(f"{account} takes no {cents}")
        self.balance[account] += cents
        self.legs[ticket, leg] = cents

    def undo(self, leg: str, account: str, ticket: str) -> None:
        self.balance[account] -= self.legs.get((ticket, leg), 0)
        self.legs[ticket, leg] = 0


async def moved(leg: str, account: str, cents: int, ticket: str) -> None:
    world = outside.get()
    money: Money = world.model
    await world.ask(
        leg, step_info().idempotency_key, account, cents, ticket,
        effect=lambda: money.move(leg, account, cents, ticket),
    )  # fmt: skip


async def undone(leg: str, account: str, cents: int, ticket: str) -> None:
    world = outside.get()
    money: Money = world.model
    await world.ask(
        f"undo {leg}", step_info().idempotency_key, account, cents, ticket,
        effect=lambda: money.undo(leg, account, ticket),
    )  # fmt: skip


def declare(service: Service) -> tuple[Any, Any]:
    """Declare what a service does with its accounts."""

    @service.step
    async def give_back(account: str, cents: int, ticket: str) -> None:
        await undone("withdraw", account, cents, ticket)

    @service.step
    async def take_back(account: str, cents: int, ticket: str) -> None:
        await undone("deposit", account, cents, ticket)

    @service.step(undo=give_back, retry=STUBBORN)
    async def withdraw(account: str, cents: int, ticket: str) -> None:
        await moved("withdraw", account, -cents, ticket)

    @service.step(undo=take_back, retry=STUBBORN)
    async def deposit(account: str, cents: int, ticket: str) -> None:
        await moved("deposit", account, cents, ticket)

    return withdraw, deposit


STEPS = {service.name: declare(service) for service in services}


@west.step
def stamp() -> str:
    """Draw a ticket, another one at every attempt: which one counts, the journal decides."""
    process = here.get()
    assert process is not None
    number = process.clock.random.getrandbits(40)
    outside.get().act("stamp", f"{step_info().idempotency_key} {number}", effect=lambda: None)
    return f"{step_info().run}:{number:010x}"


@west.workflow
async def transfer(source: str, target: str, cents: int) -> str:
    withdraw, deposit = STEPS[ACCOUNTS[source].name][0], STEPS[ACCOUNTS[target].name][1]
    ticket = await stamp()
    async with saga():
        await withdraw(source, cents, ticket)
        await asyncio.sleep(0.02)
        await deposit(target, cents, ticket)
    await west.publish(Moved(source=source, ticket=ticket))
    return ticket


@south.on(Moved, state=Book, retry=FOR_EVER)
async def book(event: Moved, state: Book) -> Booked:
    await state.enter("book")
    return Booked(source=event.source, ticket=event.ticket)


@north.on(Booked, state=Book, retry=FOR_EVER)
async def file(event: Booked, state: Book) -> None:
    await state.enter("file")


@north.on(Moved, state=Book, retry=FOR_EVER)
async def watch(event: Moved, state: Book) -> None:
    """Write into the same book as `file`."""
    await state.enter("watch")


class Bank:
    """The scenario: some transfers at once, some of them cancelled on their way."""

    def __init__(self) -> None:
        self.app = app
        self.answers: dict[str, tuple[str, str]] = {}
        """What the customer was told: status and ticket, by run."""

    async def customer(self, sim: Simulation, client: Client) -> None:
        sim.outside.model = Money()
        random = sim.clock.random
        async with asyncio.TaskGroup() as group:
            for number in range(TRANSFERS):
                source, target = random.sample(sorted(ACCOUNTS), 2)
                cents = random.randrange(1, START_CENTS)
                group.create_task(
                    self._move(sim, client, f"t{number}", source, target, cents)
                )  # fmt: skip

    async def _move(
        self, sim: Simulation, client: Client, id: str, source: str, target: str, cents: int
    ) -> None:
        random = sim.clock.random
        await asyncio.sleep(random.random() * sim.storm.ends_us / 1e6 * 0.8)
        args = (source, target, cents)
        run: Run[str] = await insist(lambda: client.start(transfer, *args, id=id, mode=sim.mode))
        sim.clock.note(f"customer was told that {id} is accepted")
        if random.random() < 0.2:
            await asyncio.sleep(random.random() * 0.1)
            try:
                await insist(run.cancel)
            except RunEnded:
                pass
        if random.random() < 0.9:
            await sim.ended(id)
        await self._learn(sim, run)

    async def _learn(self, sim: Simulation, run: Run[str]) -> None:
        """Await how a run ends, and remember what was told."""
        try:
            self.answers[run.id] = ("completed", await insist(run.result))
        except RunFailed as failed:
            self.answers[run.id] = (failed.status, "")
        sim.clock.note(f"customer was told that {run.id} {self.answers[run.id]}")

    def check(self, sim: Simulation) -> None:
        check_same_requests(sim.outside)
        self._check_answers(sim)
        self._check_money(sim.outside.model)
        if sim.database.root._data.events.dead:
            raise Violation("There are dead letters.")
        check_books(sim, "south", "Moved", ACCOUNTS)
        check_books(sim, "north", "Booked", ACCOUNTS)
        check_books(sim, "north", "Moved", ACCOUNTS)

    def _check_answers(self, sim: Simulation) -> None:
        check_answers(sim.database, self.answers)

    def _check_money(self, money: Money) -> None:
        if sum(money.balance.values()) != START_CENTS * len(ACCOUNTS):
            raise Violation(f"Money was made or lost: {money.balance}.")
        tickets: dict[str, set[str]] = {}
        for ticket, _ in money.legs:
            tickets.setdefault(ticket.partition(":")[0], set()).add(ticket)
        for id, (status, answer) in self.answers.items():
            used = tickets.get(id, set())
            if len(used) > 1:
                raise Violation(f"{id} used two results of one step: {sorted(used)}.")
            ticket = next(iter(used), "")
            legs = [money.legs.get((ticket, leg), 0) for leg in ("withdraw", "deposit")]
            if sum(legs):
                raise Violation(f"{id} is half done: {legs}, and {status}.")
            if status == "completed" and (not legs[1] or ticket != answer):
                raise Violation(f"{id} completed with {answer}, and moved nothing: {ticket}.")
            if status == "failed" and legs[1]:
                raise Violation(f"{id} failed, and was not undone.")


app = App("bank", services, store="memory", config=EngineConfig(lease_s=0.6, poll_s=0.06))
