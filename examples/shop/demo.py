"""`make demo`: a shop of four processes, run in three ways at once, two of the processes killed.

    python -m examples.shop.demo

It starts one worker process for each service on one SQLite file and places 300 orders: a third is
orchestrated, a third travels as a baton, and to a third the services only react, by events. On the
way it kills two of the workers and starts them again. In the end it asks the outside world what was
really charged and shipped, compares the three, and fails if a single order is neither shipped nor
wholly undone.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import click

from examples.shop.app import app
from examples.shop.fulfil import fulfil
from examples.shop.orders import read_orders
from examples.shop.outcome import (
    FORMS,
    Ending,
    Figures,
    Form,
    event_endings,
    figures,
    run_ending,
    traffic,
    wrongs,
)
from examples.shop.reactions import OrderCancelled
from examples.shop.services import OrderPlaced, OrderShipped
from examples.shop.workers import Worker, WorkerFailed
from examples.shop.world import World
from pavane import Client, RunFilter
from pavane.cli.conversations.picture import read_picture
from pavane.cli.output import is_unicode, terminal_width
from pavane.cli.runs.record import read_timeline
from pavane.cli.timeline import draw
from pavane.cli.tree import draw_conversation
from pavane.stores.eventlog import EventFilter

TITLES: dict[Form, str] = {
    "orchestration": "orchestrated", "choreography": "baton passed", "events": "by events"
}  # fmt: skip
SHORT: dict[Form, str] = {
    "orchestration": "orchestrated", "choreography": "baton", "events": "events"
}  # fmt: skip
SERVICES = ("orders", "payments", "stock", "shipping")
ENDS = (OrderShipped.event_type, OrderCancelled.event_type)

ORDERS_PER_S = 25
DOWN_FOR_S = 1.0
LAST_ORDER_WITHIN_S = 60.0
LOOK_EVERY_S = 0.2


def form_of(number: int) -> Form:
    """Orders take turns; see `orders` for why that is fair."""
    return FORMS[number % len(FORMS)]


# -- the screen --------------------------------------------------------------------------------


class Screen:
    """One live line with a bar per form, and notes above it.

    Where stdout is no terminal, the line is printed every few seconds instead.
    """

    def __init__(self, total: int) -> None:
        self._totals = {form: len(range(at, total, 3)) for at, form in enumerate(FORMS)}
        self._bar_columns = min(16, max(4, (terminal_width() - 66) // 3))
        self._live = sys.stdout.isatty()
        self._began = time.monotonic()
        self._next_line = 0.0
        self._line = ""

    @property
    def time_s(self) -> float:
        return time.monotonic() - self._began

    def note(self, text: str) -> None:
        """Print something that stays."""
        self._clear()
        click.echo(f"{self.time_s:6.1f} s  {text}")
        self._show()

    def update(self, ended: Mapping[Form, int], last: bool = False) -> None:
        parts = [self._bar(form, ended[form]) for form in FORMS]
        self._line = f"{self.time_s:6.1f} s  {'  '.join(parts)}"
        if self._live:
            self._clear()
            self._show()
        elif last or self.time_s >= self._next_line:
            self._next_line = self.time_s + 3
            click.echo(self._line)

    def close(self) -> None:
        if self._live and self._line:
            click.echo()
        self._line = ""

    def _bar(self, form: Form, ended: int) -> str:
        total = self._totals[form]
        full = self._bar_columns * ended // max(total, 1)
        bar = "█" * full + "░" * (self._bar_columns - full)
        return f"{SHORT[form]} {bar} {ended:>3}/{total}"

    def _clear(self) -> None:
        if self._live:
            click.echo("\r\x1b[2K", nl=False)

    def _show(self) -> None:
        if self._live:
            click.echo(self._line, nl=False)


# -- the plot ----------------------------------------------------------------------------------


class Demo:
    """One performance: its workers, its client, what it has seen so far."""

    def __init__(self, orders: Sequence[OrderPlaced], folder: Path) -> None:
        self.orders = orders
        self.store = folder / "shop.db"
        self.world = World(folder / "world.db")
        self.workers = {name: Worker(name, self.store, self.world.path) for name in SERVICES}
        self.screen = Screen(len(orders))
        self.placed_us: dict[str, int] = {}
        self.endings: list[Ending] = []

    @asynccontextmanager
    async def staged(self) -> AsyncGenerator[Client]:
        """Have the workers running; whatever happens, none is left behind."""
        self.world.create()
        try:
            await asyncio.gather(*(worker.start() for worker in self.workers.values()))
            async with app.connect(store=str(self.store)) as client:
                yield client
            await asyncio.gather(*(worker.stop() for worker in self.workers.values()))
        finally:
            await asyncio.gather(*(worker.kill() for worker in self.workers.values()))

    async def run(self, client: Client) -> None:
        """Place all orders, make trouble, and return when every order has ended."""
        self.screen.note(f"four workers on {self.store.name}; {len(self.orders)} orders to fulfil")
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._place_orders(client, group))
                group.create_task(self._watch(client))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None  # the first says what is wrong

    async def _place_orders(self, client: Client, group: asyncio.TaskGroup) -> None:
        # First a service that others need, then the home of all runs: orchestrated, nothing goes
        # on while that one is away; what travels goes on, and so do the services that react.
        strikes = {len(self.orders) // 3: "payments", len(self.orders) * 2 // 3: "orders"}
        loop = asyncio.get_running_loop()
        began = loop.time()
        for number, order in enumerate(self.orders):
            await asyncio.sleep(began + number / ORDERS_PER_S - loop.time())
            await self._place(client, order, form_of(number))
            if number in strikes:
                group.create_task(self._strike(strikes[number]))

    async def _place(self, client: Client, order: OrderPlaced, form: Form) -> None:
        # The order's number names its run or its event: placing it twice would still be one order.
        id = order.order_id
        if form == "events":
            self.placed_us[id] = client.store.now_us()
            await client.publish(order, source="shop", id=id)
        else:
            await client.start(fulfil, order, id=id, mode=form)

    async def _strike(self, service: str) -> None:
        """Kill a worker, and start it again after a while."""
        worker = self.workers[service]
        pid = worker.pid
        await worker.kill()
        self.screen.note(f"kill -9 {pid}: the worker for {service} is gone")
        await asyncio.sleep(DOWN_FOR_S)
        began = time.monotonic()
        await worker.start()
        took_s = time.monotonic() - began
        self.screen.note(f"{service} is back (pid {worker.pid}), ready after {took_s:.1f} s")

    async def _watch(self, client: Client) -> None:
        """Look at all orders every moment until each has ended, or takes too long."""
        until = len(self.orders) / ORDERS_PER_S + LAST_ORDER_WITHIN_S
        while True:
            self.endings = await self._look(client)
            over = len(self.endings) == len(self.orders) or self.screen.time_s > until
            counts: dict[Form, int] = {
                form: sum(e.form == form for e in self.endings) for form in FORMS
            }
            self.screen.update(counts, last=over)
            if over:
                return
            await asyncio.sleep(LOOK_EVERY_S)

    async def _look(self, client: Client) -> list[Ending]:
        limit = 2 * len(self.orders)
        runs = await client.runs(RunFilter(workflow="fulfil", limit=limit))
        told = await client.events.list(EventFilter(types=ENDS, limit=limit))
        forms: dict[str, Form] = {o.order_id: form_of(n) for n, o in enumerate(self.orders)}
        ended = [run_ending(status, forms[status.id]) for status in runs]
        return [e for e in ended if e is not None] + event_endings(self.placed_us, told)


# -- the end -----------------------------------------------------------------------------------


def print_table(table: Mapping[Form, Figures]) -> None:
    rows = (
        ("orders", "{0.orders}"),
        ("  shipped", "{0.shipped}"),
        ("  compensated", "{0.compensated}"),
        ("  declined, nothing to undo", "{0.declined}"),
        ("hops per order", "{0.hops:.1f}"),
        ("messages per order", "{0.messages:.1f}"),
        ("events per order", "{0.events:.1f}"),
        ("median time", "{0.median_ms:,.0f} ms"),
        ("99th percentile", "{0.p99_ms:,.0f} ms"),
        ("effects executed twice", "{0.again}"),
    )
    click.echo(f"\n{'':<28}" + "".join(f"{TITLES[form]:>16}" for form in FORMS))
    for title, shown in rows:
        click.echo(f"{title:<28}" + "".join(f"{shown.format(table[form]):>16}" for form in FORMS))


def typical(endings: Sequence[Ending]) -> str:
    """Return the id of a shipped order that took about as long as most."""
    shipped = sorted((e for e in endings if e.what == "shipped"), key=lambda e: e.took_ms)
    return shipped[len(shipped) // 2].id


def telling(endings: Sequence[Ending], world: World) -> str:
    """Return the id of an order with much to undo, if there is one; else a typical one."""
    released = world.happened("released")
    return next((ending.id for ending in endings if ending.id in released), typical(endings))


async def show_run(client: Client, id: str) -> None:
    """Print the timeline of a run, as `pavane runs show` does."""
    for line in draw(await read_timeline(client, id), width=min(terminal_width(), 120)):
        click.echo(line)


async def show_conversation(client: Client, id: str) -> None:
    """Print everything that one event caused, as `pavane conversations show` does."""
    picture = await read_picture(client, id)
    for line in draw_conversation(
        picture.tree, picture.contracts, picture.trouble, width=min(terminal_width(), 120),
        unicode=is_unicode(),
    ):  # fmt: skip
        click.echo(line)


async def show_orders(client: Client, demo: Demo) -> None:
    """Print one order of each form."""
    for form in FORMS:
        click.echo(f"\none order, {TITLES[form]}:\n")
        mine = [ending for ending in demo.endings if ending.form == form]
        if form == "events":
            await show_conversation(client, telling(mine, demo.world))
        else:
            await show_run(client, typical(mine))


async def report(client: Client, demo: Demo) -> bool:
    """Print what became of everything; tell whether all is well."""
    found = wrongs([order.order_id for order in demo.orders], demo.endings, demo.world)
    if found:
        click.secho(f"\n{len(found)} orders are wrong:", fg="red", bold=True)
        click.echo("\n".join(found))
        return False
    sent = traffic(demo.store)
    by_form = {form: [e for e in demo.endings if e.form == form] for form in FORMS}
    print_table({form: figures(by_form[form], sent, demo.world) for form in FORMS})
    await show_orders(client, demo)
    click.secho(
        f"\nAll {len(demo.orders)} orders were shipped, or undone to the last cent, and the "
        f"world's own records agree.",
        fg="green",
    )
    return True


async def perform(orders: Sequence[OrderPlaced], folder: Path) -> bool:
    """Give the whole demo in `folder`; tell whether every order came to a good end."""
    demo = Demo(orders, folder)
    async with demo.staged() as client:
        await demo.run(client)
        demo.screen.close()
        return await report(client, demo)


NEXT = """
What next:
  examples/shop/fulfil.py       the process as one function, which knows nothing of modes
  examples/shop/reactions.py    the same without a process: services that react to events
  python examples/announcements.py            one event, six services
  python -m examples.shop.demo --keep kept    keeps the store, to look around in:
    pavane runs list --store kept/shop.db
    pavane runs show o-0001 --store kept/shop.db
    pavane conversations show o-0003 --store kept/shop.db
    pavane events show o-0003 --store kept/shop.db
"""


@contextmanager
def _folder(keep: Path | None) -> Generator[Path]:
    if keep is not None:
        if (keep / "shop.db").exists():
            raise click.UsageError(f"{keep} holds an earlier demo; name another folder.")
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()  # the workers run elsewhere
        return
    with tempfile.TemporaryDirectory(prefix="pavane-shop-") as folder:
        yield Path(folder)


@click.command()
@click.option("--orders", "count", type=click.IntRange(min=6), help="Fewer orders than all 300.")
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Keep files there.")
def main(count: int | None, keep: Path | None) -> None:
    """Run the shop in three ways at the same time, and kill two of its workers."""
    try:
        with _folder(keep) as folder:
            well = asyncio.run(perform(read_orders(count), folder))
    except KeyboardInterrupt:
        click.echo("\nStopped; the workers too.", err=True)
        sys.exit(130)
    except WorkerFailed as failure:
        click.echo(str(failure), err=True)
        sys.exit(1)
    click.echo(NEXT if well else "", nl=False)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
