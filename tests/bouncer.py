"""A PgBouncer in transaction mode before the tests' Postgres, where one is installed."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from pavane.testing.postgres import free_port
from tests.postgres import Database

VERSION_MIN = (1, 21)
"""The first that knows prepared statements in transaction mode."""
START_S = 60.0

CONFIG = """
[databases]
* = host={host} port={port}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = trust
auth_file = {users}
pool_mode = {mode}
default_pool_size = 4
max_prepared_statements = {prepared}
{user}
"""


def bouncer() -> str:
    """Return the path of PgBouncer, or skip the test."""
    found = os.environ.get("PAVANE_PGBOUNCER") or shutil.which("pgbouncer")
    if not found:
        pytest.skip("pgbouncer is not installed ($PAVANE_PGBOUNCER names one elsewhere)")
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    version = tuple(int(number) for number in re.findall(r"\d+", said.splitlines()[0])[:2])
    if version < VERSION_MIN:
        pytest.skip(f"pgbouncer is {said.splitlines()[0]}; 1.21 is needed")
    return found


@contextmanager
def bounced_database() -> Iterator[str]:
    """Make an empty database, with a PgBouncer before it; yield its address there."""
    bouncer()
    with Database() as url, bounced(url) as there:
        yield there


@contextmanager
def bounced(url: str, *, mode: str = "transaction", prepared: int = 100) -> Iterator[str]:
    """Put a PgBouncer before a database; yield its address there."""
    program = bouncer()
    parts = urlsplit(url)
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="pavane-bouncer-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "users").write_text(f'"{parts.username}" ""\n')
        config = folder / "pgbouncer.ini"
        config.write_text(
            CONFIG.format(
                host=parts.hostname, port=parts.port, listen=port, users=folder / "users",
                mode=mode, prepared=prepared,
                user="user = nobody" if os.geteuid() == 0 else "",
            )
        )  # fmt: skip
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen([program, str(config)], stderr=log, stdout=log)
        try:
            _wait_for(port, process, folder / "log")
            yield f"postgresql://{parts.username}@127.0.0.1:{port}{parts.path}"
        finally:
            process.kill()
            process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    ends = time.monotonic() + START_S
    while time.monotonic() < ends and process.poll() is None:
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise AssertionError(f"pgbouncer does not run: {log.read_text()}")
