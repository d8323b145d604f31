"""One Postgres for all tests, started when the first one asks, with a database for each."""

from __future__ import annotations

import atexit
from itertools import count

from pavane.testing.postgres import PostgresServer

_servers: list[PostgresServer] = []
_numbers = count(1)


def server() -> PostgresServer:
    if not _servers:
        started = PostgresServer()
        started.__enter__()
        _servers.append(started)
        atexit.register(started.__exit__, None, None, None)
    return _servers[0]


class Database:
    """An empty database, which is gone after the `with` block."""

    def __enter__(self) -> str:
        self._name = f"test_{next(_numbers)}"
        return server().create_database(self._name)

    def __exit__(self, *_: object) -> None:
        server().drop_database(self._name)


class Role:
    """A user without rights, who is gone after the `with` block; enter it before a database."""

    def __enter__(self) -> str:
        self._name = f"role_{next(_numbers)}"
        server().execute(f"CREATE ROLE {self._name} LOGIN")
        return self._name

    def __exit__(self, *_: object) -> None:
        server().execute(f"DROP ROLE {self._name}")
