"""A shop for simulations: five services, orders to be paid, picked, packed, approved and shipped.

An order is a saga with children, timers and signals. What follows from a shipped one is up to
events: a book with state, runs that are started by an event and wait for another one, and a judge
whose refusals end as dead letters. In the end every order is shipped and paid, or all is undone.
"""

from __future__ import annotations

import asyncio
from typing import Any

from pavane import (
    App,
    BadArguments,
    Client,
    EngineConfig,
    Event,
    Retry,
    Run,
    RunEnded,
    RunFailed,
    Service,
    receive,
    saga,
    step_info,
)
from pavane.core.codec import decoder
from pavane.testing.sim.checks import Violation, check_answers, check_same_requests
from pavane.testing.sim.outside import outside
from pavane.testing.sim.process import here
from pavane.testing.sim.simulation import Simulation, insist
from tests.sim.books import FOR_EVER, STUBBORN, Book, Refused, check_books

orders, payments, stock, shipping, mail = services = [
    Service(name) for name in ("orders", "payments", "stock", "shipping", "mail")
]
ORDERS = 2
CUSTOMERS = ("ada", "bob")
ITEMS = ("lute", "viol", "tabor", "orpharion")
SOLD_OUT = "orpharion"
DECLINED = 7
"""Every so many cents a card is declined."""
BEYOND = 5
"""Every so many cents the carrier does not know the way."""
PATIENCE_S = 0.3
DRYING_S = 0.03
REVERSE = ("undo ship", "undo pick", "undo charge")
TRIALS = 2


class Approved(Event):
    by: str


class Shipped(Event, key="customer"):
    customer: str
    order: str


class Arrived(Event, key="order"):
    order: str


class Unapproved(Exception):
    """Nobody approved in time."""


class Mixup(Exception):
    """A run was given what another operation had asked for."""


class Doubt(Exception):
    """Perhaps it is judged otherwise later."""


class Deeds:
    """What the shop did to the world, by what it did and to what."""

    def __init__(self) -> None:
        self.done: dict[tuple[str, str], bool] = {}
        """Whether it is done; False once it was undone, or forbidden before it came."""
        self.till_cents = 0
        self.parcels: dict[str, str] = {}
        self.wrong: list[str] = []

    def do(self, deed: str, what: str, cents: int = 0) -> None:
        before = self.done.get((deed, what))
        if before is False:
            raise Refused(f"{deed} {what} was undone before it came")
        if before:
            self.wrong.append(f"{deed} {what} was done twice.")
        self.done[deed, what] = True
        self.till_cents += cents

    def undo(self, deed: str, what: str, cents: int = 0) -> None:
        if self.done.get((deed, what)):
            self.till_cents -= cents
        self.done[deed, what] = False


async def did(deed: str, what: str, cents: int = 0, *details: str) -> None:
    world = outside.get()
    deeds: Deeds = world.model
    await world.ask(
        deed, step_info().idempotency_key, what, cents, *details,
        effect=lambda: deeds.do(deed, what, cents),
    )  # fmt: skip


async def undid(deed: str, what: str, cents: int = 0) -> None:
    world = outside.get()
    deeds: Deeds = world.model
    await world.ask(
        f"undo {deed}", step_info().idempotency_key, what, cents,
        effect=lambda: deeds.undo(deed, what, cents),
    )  # fmt: skip


@payments.step
async def refund(order: str, cents: int) -> None:
    await undid("charge", order, cents)


@payments.step(undo=refund, retry=STUBBORN)
async def charge(order: str, cents: int) -> None:
    if cents % DECLINED == 0:
        raise Refused("the card is declined")
    await did("charge", order, cents)


@stock.step
async def put_back(order: str, item: str) -> None:
    await undid("pick", f"{order} {item}")


@stock.step(undo=put_back, retry=STUBBORN)
async def pick(order: str, item: str) -> str:
    if item == SOLD_OUT:
        raise Refused(f"no {item} left")
    await did("pick", f"{order} {item}")
    return item


@stock.step(retry=FOR_EVER)
async def call_off(order: str, item: str) -> str:
    await did("call off", f"{order} {item}")
    return item


@shipping.step(retry=FOR_EVER)
async def weigh(order: str) -> int:
    """Weigh a parcel, never twice with the same outcome: which one counts, the journal decides."""
    process = here.get()
    assert process is not None
    await did("weigh", order)
    return process.clock.random.getrandbits(30)


@shipping.step(retry=FOR_EVER)
async def seal(order: str) -> None:
    await did("seal", order)


@shipping.step
async def recall(order: str, parcel: str, cents: int) -> None:
    await undid("ship", order)


@shipping.step(undo=recall, retry=STUBBORN)
async def ship(order: str, parcel: str, cents: int) -> None:
    if cents % BEYOND == 0:
        raise Refused("no way there")
    await did("ship", order, 0, parcel)


@mail.step(retry=FOR_EVER)
async def thank(order: str) -> None:
    await did("thank", order)


@shipping.workflow
async def pack(order: str) -> str:
    """Pack a parcel, and let the ink dry before it is sealed."""
    grams = await weigh(order)
    await asyncio.sleep(DRYING_S)
    await seal(order)
    return f"{order}:{grams}"


async def fetch(order: str, item: str) -> None:
    try:
        picked = await pick(order, item)
    except asyncio.CancelledError:
        if await call_off(order, item) != item:
            raise Mixup(item) from None
        raise
    if picked != item:
        raise Mixup(item)


@orders.workflow(receives=[Approved])
async def fulfil(order: str, customer: str, cents: int, items: list[str], patient: bool) -> str:
    async with saga():
        await charge(order, cents)
        async with asyncio.TaskGroup() as group:
            for item in items:
                group.create_task(fetch(order, item))
        parcel = await pack(order)
        try:
            async with asyncio.timeout(None if patient else PATIENCE_S):
                await receive(Approved)
        except TimeoutError:
            raise Unapproved from None
        await ship(order, parcel, cents)
    await orders.publish(Shipped(customer=customer, order=order))
    return parcel


@mail.workflow(starts_on=Shipped, receives=[Arrived], mode="choreography")
async def follow(event: Shipped) -> str:
    """Thank for an order when it has arrived."""
    arrived = await receive(Arrived, key=event.order)
    await thank(arrived.order)
    return arrived.order


@shipping.on(Shipped, retry=FOR_EVER)
async def deliver(event: Shipped) -> Arrived:
    await outside.get().ask("deliver", step_info().idempotency_key, event.order, effect=bool)
    return Arrived(order=event.order)


@orders.on(Shipped, state=Book, retry=FOR_EVER)
async def note(event: Shipped, book: Book) -> None:
    await book.enter("note")


@payments.on(Shipped, retry=Retry(attempts=TRIALS, first="20ms"), breaker=None)
async def judge(event: Shipped) -> None:
    """Refuse what was shipped to one of the customers: a person has to look at it."""
    if event.customer == CUSTOMERS[0]:
        raise Doubt("that one again")


class Shop:
    """The scenario: some orders, approved in time or not, some of them cancelled."""

    def __init__(self) -> None:
        self.app = app
        self.answers: dict[str, tuple[str, Any]] = {}
        self.orders: dict[str, tuple[str, int, list[str]]] = {}
        """Customer, cents and items, by order."""

    async def customer(self, sim: Simulation, client: Client) -> None:
        sim.outside.model = Deeds()
        async with asyncio.TaskGroup() as group:
            for number in range(ORDERS):
                group.create_task(self._order(sim, client, f"o{number}"))

    async def _order(self, sim: Simulation, client: Client, id: str) -> None:
        random = sim.clock.random
        customer, cents = random.choice(CUSTOMERS), random.randrange(1, 1000)
        items = random.sample(ITEMS, random.choice((1, 1, 2, 3)))
        self.orders[id] = customer, cents, items
        patient, is_forgotten = random.random() < 0.5, random.random() < 0.2
        await asyncio.sleep(random.random() * sim.storm.ends_us / 1e6 * 0.8)
        args = (id, customer, cents, items, patient)
        run: Run[str] = await insist(lambda: client.start(fulfil, *args, id=id, mode=sim.mode))
        sim.clock.note(f"customer was told that {id} is accepted")
        await asyncio.sleep(random.random() * 0.2)
        try:
            for _ in range(0 if is_forgotten else random.choice((1, 1, 2))):  # some click twice
                await insist(lambda: run.send(Approved(by=customer), id="yes"))
            if is_forgotten or random.random() < 0.2:
                await asyncio.sleep(random.random() * 0.2)
                await insist(run.cancel)
        except (RunEnded, BadArguments):
            pass  # if it is stuck, it does not end
        await sim.ended(id)
        try:
            self.answers[id] = ("completed", await insist(run.result))
        except RunFailed as failed:
            self.answers[id] = (failed.status, None)
        sim.clock.note(f"customer was told that {id} {self.answers[id]}")

    def check(self, sim: Simulation) -> None:
        check_same_requests(sim.outside)
        check_answers(sim.database, self.answers)
        deeds: Deeds = sim.outside.model
        if deeds.wrong:
            raise Violation(deeds.wrong[0])
        for id in self.orders:
            if len([mark for mark in _data(sim).inbox if mark.startswith(f"{id}#s-")]) > 1:
                raise Violation(f"{id} was approved more than once.")
            self._check_whole(id, deeds)
            self._check_undone(id, sim)
        self._check_results(sim)
        self._check_parcels(sim)
        paid = sum(cents for id, (_, cents, _) in self.orders.items() if self._is_completed(id))
        if deeds.till_cents != paid:
            raise Violation(f"{deeds.till_cents} cents are in the till, and not {paid}.")
        check_books(sim, "orders", "Shipped", CUSTOMERS)
        self._check_shipped(sim, deeds)

    def _is_completed(self, id: str) -> bool:
        return self.answers[id][0] == "completed"

    def _check_whole(self, id: str, deeds: Deeds) -> None:
        """Either everything was done for an order, or nothing is (7)."""
        wanted = self._is_completed(id)
        _, _, items = self.orders[id]
        for deed, what in (("charge", id), ("ship", id), *(("pick", f"{id} {it}") for it in items)):
            if deeds.done.get((deed, what), False) != wanted:
                raise Violation(f"{id} {self.answers[id][0]}, and {deed} {what}: {not wanted}.")

    def _check_undone(self, id: str, sim: Simulation) -> None:
        """What was done is undone in reverse order (7)."""
        undone = [
            REVERSE.index(request.what)
            for request in sim.outside.done.values()
            if request.what in REVERSE and request.args[0].partition(" ")[0] == id
        ]
        if undone != sorted(undone):
            raise Violation(f"{id} was undone in the order of {[REVERSE[at] for at in undone]}.")

    def _check_results(self, sim: Simulation) -> None:
        for row in _data(sim).runs.values():
            if row.result and Mixup.__name__.encode() in row.result:
                raise Violation(f"{row.id} was given what it had not asked for: {row.result!r}.")

    def _check_parcels(self, sim: Simulation) -> None:
        """What a child run gave is what its parent got, and did not come before its time."""
        dried_us = {
            request.args[0]: request.at_us + DRYING_S * 1e6 - 2 * sim.storm.skew_us
            for request in sim.outside.done.values()
            if request.what == "weigh"
        }
        children = {
            row.id.partition("/")[0]: row.result
            for row in _data(sim).runs.values()
            if row.workflow == "pack" and row.service == row.home
        }
        for request in sim.outside.requests:
            if request.what == "ship":
                order, _, parcel = request.args
                if decoder(str)(children[order]) != parcel:
                    raise Violation(f"{order} ships {parcel}, and packed is {children[order]!r}.")
            if request.what == "seal" and request.at_us < dried_us[request.args[0]]:
                raise Violation(f"The ink of {request.args[0]} had no time to dry.")

    def _check_shipped(self, sim: Simulation, deeds: Deeds) -> None:
        """Each completed order is published once, and what follows from it happens once (4)."""
        events = _data(sim).events
        shipped = [decoder(Shipped)(e.data).order for e in events.log if e.type == "Shipped"]
        completed = [id for id in self.orders if self._is_completed(id)]
        if sorted(shipped) != completed:
            raise Violation(f"Shipped are {shipped}, and completed {completed}.")
        arrived = [e.key for e in events.log if e.type == "Arrived"]
        if sorted(arrived) != completed:
            raise Violation(f"{completed} are completed, and arrived are {arrived}.")
        follows = [
            row.status for row in _data(sim).runs.values()
            if row.workflow == "follow" and row.service == row.home
        ]  # fmt: skip
        if follows != ["completed"] * len(completed):
            raise Violation(f"{completed} are completed, and the runs that follow are {follows}.")
        for id in completed:
            if not deeds.done.get(("thank", id)):
                raise Violation(f"Nobody thanked for {id}.")
        judged = sorted(e.id for e in events.log if e.type == "Shipped" and e.key == CUSTOMERS[0])
        dead = sorted((letter.event, letter.attempts) for letter in events.dead.values())
        if dead != [(id, TRIALS) for id in judged]:
            raise Violation(f"Dead are {dead}, and judged were {judged}.")


def _data(sim: Simulation) -> Any:
    return sim.database.root._data


app = App("shop", services, store="memory", config=EngineConfig(lease_s=0.6, poll_s=0.06))
