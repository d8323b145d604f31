"""`make demo`: a shop of four processes, half orchestrated, half choreographed, two of them killed.

    python -m examples.shop.demo

It starts one worker process for each service on one SQLite file, places 300 orders, and on the way
kills two of the workers and starts them again. In the end it asks the outside world what was really
charged and shipped, compares both modes, and fails if a single order is neither shipped nor wholly
undone.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import click

from examples.shop.app import OrderPlaced, app, fulfil
from examples.shop.orders import read_orders
from examples.shop.outcome import Figures, figures, messages_per_run, steps_again, took_ms, wrongs
from examples.shop.workers import Worker, WorkerFailed
from examples.shop.world import World
from pavane import Client, RunFilter, RunStatus
from pavane.cli.output import terminal_width
from pavane.cli.runs.record import read_timeline
from pavane.cli.timeline import draw
from pavane.core.operations import Mode

MODES: tuple[Mode, ...] = ("orchestration", "choreography")
TITLES = {"orchestration": "orchestrated", "choreography": "choreographed"}
SERVICES = ("orders", "payments", "stock", "shipping")

ORDERS_PER_S = 25
DOWN_FOR_S = 1.0
LAST_ORDER_WITHIN_S = 60.0
LOOK_EVERY_S = 0.2
BAR_COLUMNS = 16
ENDED = ("completed", "failed", "cancelled", "killed", "stuck")


def mode_of(number: int) -> Mode:
    """Orders take turns; see `orders` for why that is fair."""
    return MODES[number % 2]


# -- the screen --------------------------------------------------------------------------------


class Screen:
    """One live line with a bar per mode, and notes above it.

    Where stdout is no terminal, the line is printed every few seconds instead.
    """

    def __init__(self, total: int) -> None:
        self._totals = {mode: len(range(at, total, 2)) for at, mode in enumerate(MODES)}
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

    def update(self, ended: dict[Mode, int], last: bool = False) -> None:
        parts = [self._bar(mode, ended[mode]) for mode in MODES]
        self._line = f"{self.time_s:6.1f} s  {'   '.join(parts)}"
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

    def _bar(self, mode: Mode, ended: int) -> str:
        total = self._totals[mode]
        full = BAR_COLUMNS * ended // max(total, 1)
        bar = "█" * full + "░" * (BAR_COLUMNS - full)
        return f"{TITLES[mode]} {bar} {ended:>3}/{total}"

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
        self.statuses: list[RunStatus] = []

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
        # First a service that others call, then the home of all runs: orchestrated, nothing goes
        # on while that one is away; choreographed, orders that are on their way go on.
        strikes = {len(self.orders) // 3: "payments", len(self.orders) * 2 // 3: "orders"}
        loop = asyncio.get_running_loop()
        began = loop.time()
        for number, order in enumerate(self.orders):
            await asyncio.sleep(began + number / ORDERS_PER_S - loop.time())
            # The order's number names its run: placing it twice would still be one order.
            await client.start(fulfil, (order,), {}, id=order.order_id, mode=mode_of(number))
            if number in strikes:
                group.create_task(self._strike(strikes[number]))

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
        """Look at all runs every moment until each order has ended, or takes too long."""
        total = len(self.orders)
        until = total / ORDERS_PER_S + LAST_ORDER_WITHIN_S
        while True:
            self.statuses = await client.list(RunFilter(workflow="fulfil", limit=total + 1))
            ended = [status for status in self.statuses if status.status in ENDED]
            over = len(ended) == total or self.screen.time_s > until
            counts = {mode: sum(s.mode == mode for s in ended) for mode in MODES}
            self.screen.update(counts, last=over)
            if over:
                return
            await asyncio.sleep(LOOK_EVERY_S)


# -- the end -----------------------------------------------------------------------------------


def print_table(table: dict[Mode, Figures]) -> None:
    rows = (
        ("orders", "{0.orders}"),
        ("  shipped", "{0.shipped}"),
        ("  compensated", "{0.compensated}"),
        ("  declined, nothing to undo", "{0.declined}"),
        ("hops per order", "{0.hops:.1f}"),
        ("messages per order", "{0.messages:.1f}"),
        ("median time", "{0.median_ms:,.0f} ms"),
        ("99th percentile", "{0.p99_ms:,.0f} ms"),
        ("steps executed twice", "{0.again}"),
    )
    click.echo(f"\n{'':<30}" + "".join(f"{TITLES[mode]:>16}" for mode in MODES))
    for title, shown in rows:
        click.echo(f"{title:<30}" + "".join(f"{shown.format(table[mode]):>16}" for mode in MODES))


def typical(statuses: Sequence[RunStatus]) -> str:
    """Return the id of a shipped order that took about as long as most."""
    shipped = sorted((s for s in statuses if s.status == "completed"), key=took_ms)
    return shipped[len(shipped) // 2].id


async def show(client: Client, id: str) -> None:
    """Print the timeline of a run, as `pavane runs show` does."""
    for line in draw(await read_timeline(client, id), width=min(terminal_width(), 120)):
        click.echo(line)


async def report(client: Client, demo: Demo) -> bool:
    """Print what became of everything; tell whether all is well."""
    messages, again = messages_per_run(demo.store), steps_again(demo.world)
    by_mode = {mode: [s for s in demo.statuses if s.mode == mode] for mode in MODES}
    table: dict[Mode, Figures] = {mode: figures(by_mode[mode], messages, again) for mode in MODES}
    print_table(table)
    found = wrongs([order.order_id for order in demo.orders], demo.statuses, demo.world)
    for mode in MODES:
        click.echo(f"\none order, {TITLES[mode]}:\n")
        await show(client, typical(by_mode[mode]))
    if found:
        click.secho(f"\n{len(found)} orders are wrong:", fg="red", bold=True)
        click.echo("\n".join(found))
        return False
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
  examples/shop/app.py          the process: `fulfil`, ten lines, not one of them about modes
  python examples/payments.py   another one, in a single file and a single process
  python -m examples.shop.demo --keep kept    keeps the store, to look around in:
    pavane runs list --store kept/shop.db
    pavane runs show o-0001 --store kept/shop.db
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
    """Run the shop both ways at the same time, and kill two of its workers."""
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
