"""What this store uses of APSW, with types that hold on every Python.

APSW's own stubs name a type that Python 3.11 does not have, so a strict checker calls everything
that touches a value unknown. These protocols say the same once; nothing is wrapped, so a call
costs what it costs without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, cast

import apsw

Row = tuple[Any, ...]


class Cursor(Protocol):
    """The rows of one execution."""

    @property
    def get(self) -> Any:
        """The only value of the only row, all of them if there are more, None without a row."""
        ...

    def __iter__(self) -> Iterator[Row]: ...
    def fetchall(self) -> list[Row]: ...
    def close(self, force: bool = False) -> None: ...


class Connection(Protocol):
    """One connection; to be used by one thread at a time."""

    authorizer: Callable[..., int] | None
    cursor_factory: Callable[[Connection], Cursor]

    @property
    def in_transaction(self) -> bool: ...
    def execute(self, statements: str, bindings: Sequence[Any] | None = None) -> Cursor: ...
    def executemany(
        self, statements: str, sequenceofbindings: Iterable[Sequence[Any]]
    ) -> Cursor: ...
    def changes(self) -> int: ...
    def readonly(self, name: str) -> bool: ...
    def set_busy_timeout(self, milliseconds: int) -> None: ...
    def setlk_timeout(self, ms: int, flags: int) -> None: ...
    def close(self, force: bool = False) -> None: ...


new_cursor = cast("Callable[[Connection], Cursor]", apsw.Cursor)
"""Make a cursor of a connection, as it does by itself."""


def connect(path: str) -> Connection:
    """Open the file, or create it."""
    return cast(Connection, apsw.Connection(path))
