"""`pavane run`: a worker, from its first line to a drained end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Coroutine
from typing import Any, NoReturn

import click

from pavane.app import App, Client
from pavane.cli.connection import check_store, own_address, target_argument
from pavane.cli.exits import INTERRUPTED, OK, STORE
from pavane.cli.names import complete_service
from pavane.cli.output import say, terminal_width
from pavane.cli.target import find_app
from pavane.cli.text import columns, counted, fit, printable, wrapped

PARENT_EVERY_S = 0.5
GIVE_UP_S = 10.0
"""How long, after the grace period, a store is waited for that does not answer while it is left."""
THREADS_S = 0.5
"""How long a process that has drained may wait for threads that steps have started."""


@click.command(
    epilog="""\b
Examples:
  pavane run shop.py
  pavane run shop:app --service payments --service stock --store /var/lib/shop/shop.db
  pavane run shop:app --store postgresql://shop@db.example/shop

\b
SIGTERM or Ctrl-C drains: running steps may end, everything is written, partitions are handed over,
and the exit code is 0. A second one stops at once (130); nothing that was durable is lost. A step
that takes longer than the grace period (10 s) is cut off, and done again by the next owner. If the
store does not answer, the worker ends ten seconds after that (4), and others take over from it.
"""
)
@target_argument
@click.option(
    "-n",
    "--service",
    "services",
    multiple=True,
    metavar="NAME",
    shell_complete=complete_service,
    help="Work for this service; may be repeated. Default: all.",
)
@click.option("-s", "--store", metavar="ADDRESS", help="Default: the app's own, or $PAVANE_STORE.")
@click.option("-v", "--verbose", count=True, help="Log more.")
@click.option("-q", "--quiet", count=True, help="Log warnings only; -qq: errors only.")
@click.option("--with-parent", is_flag=True, hidden=True, help="Drain when the parent ends.")
def run(
    target: str, services: tuple[str, ...], store: str | None, verbose: int, quiet: int,
    with_parent: bool,
) -> None:  # fmt: skip
    """Work for the services of an app until told to stop.

    TARGET is shop:app, shop.py or shop.py:app; default $PAVANE_APP.
    """
    set_up_logging(verbose - quiet)
    app = find_app(target)
    for name in services:
        app.registry.service(name)
    hosted = list(dict.fromkeys(services)) or sorted(app.registry.services)
    if not hosted:
        raise click.UsageError(f"App {app.name!r} has no services; nothing to work for.")
    address = store if store is not None else own_address(app)
    if address is not None:
        check_store(address, create=True)
    run_loop(_work_to_the_end(work(app, hosted, address, quiet=quiet > 0, with_parent=with_parent)))


def run_loop(work: Coroutine[Any, Any, None]) -> None:
    """Run to the end on the fastest event loop that is installed (`pip install pavane[fast]`)."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(work)
    else:
        uvloop.run(work)


async def _work_to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Work until drained; soon after that the process ends, whatever threads still do.

    Python would wait for them, and no thread can be stopped.
    """
    await work
    end = threading.Timer(THREADS_S, _end, [OK])
    end.daemon = True  # it counts only if something else keeps the process
    end.start()


def _end(code: int) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def set_up_logging(level: int) -> None:
    """Log to stderr; `level` is how often -v was given, less -q."""
    chosen = {0: logging.INFO, -1: logging.WARNING}.get(level)
    if chosen is None:
        chosen = logging.DEBUG if level > 0 else logging.ERROR
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=chosen, handlers=[handler])
    logging.getLogger("asyncio").setLevel(max(chosen, logging.INFO))


class _Printable(logging.Formatter):
    """Spells out control characters: errors of steps are logged, and may hold anything."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _Stop:
    """Turns the first signal into a drain, of at most `within_s`, and the second into an end."""

    def __init__(self, within_s: float) -> None:
        self.asked = asyncio.Event()
        self._within_s = within_s
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self._signalled, number)

    def _signalled(self, number: signal.Signals) -> None:
        if self.asked.is_set():
            say(f"{number.name} again: stopped at once")
            _end(INTERRUPTED)
        say(f"{number.name}: draining; once more stops at once")
        self.asked.set()
        self._loop.call_later(self._within_s, self._give_up)

    def _give_up(self) -> None:
        say(f"not drained within {self._within_s:g} s: others take over when the lease is over")
        _end(STORE)

    async def watch_parent(self) -> None:
        """Ask to stop when the process that started this one has ended."""
        parent = os.getppid()
        while not self.asked.is_set():
            await asyncio.sleep(PARENT_EVERY_S)
            if os.getppid() != parent:
                self.asked.set()


async def work(
    app: App, hosted: list[str], store: str | None, *, quiet: bool, with_parent: bool
) -> None:
    """Work for the services `hosted` until a signal comes, then drain."""
    stop = _Stop(app.config.grace_s + GIVE_UP_S)
    watch = asyncio.create_task(stop.watch_parent()) if with_parent else None
    async with app.worker(hosted, store=store) as client:
        if not quiet:
            await _introduce(app, hosted, client)
        await _first(stop.asked.wait(), client.drained())
    if watch is not None:
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch
    if not quiet:
        say("drained")


async def _first(*waits: Coroutine[Any, Any, Any]) -> None:
    """Return when one of them does."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


async def _introduce(app: App, hosted: list[str], client: Client) -> None:
    facts = await client.store.describe()
    say(f"{app.name}  pid {os.getpid()}  {facts['kind']} {facts['place']}")
    width = max(map(columns, hosted)) + 4
    room = max(terminal_width() - width, 40)
    for name in hosted:
        service = app.registry.services[name]
        parts: list[str] = []
        if service.workflows:
            listed = ", ".join(
                f"{w.name}{f' v{w.version}' if w.version != 1 else ''} ({w.mode})"
                for w in service.workflows.values()
            )
            parts.append(f"{counted(len(service.workflows), 'workflow')}: {listed}")
        if service.steps:
            parts.append(f"{counted(len(service.steps), 'step')}: {', '.join(service.steps)}")
        handlers = [h.name for h in service.handlers.values() if h.starts is None]
        if handlers:
            parts.append(f"{counted(len(handlers), 'handler')}: {', '.join(handlers)}")
        lines = wrapped("; ".join(parts) or "declares nothing yet", room, lines_max=8)
        for at, text in enumerate(lines):
            say(fit(f"  {name}" if at == 0 else "", width) + text)
    say("ready")
