"""The core does no I/O, starts no thread, and takes no clock or chance: they are given to it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tidy.source_tree import PACKAGE, SOURCE, imports, parsed

MODULES_REFUSED = {
    "_thread", "apsw", "asyncpg", "concurrent", "http", "multiprocessing", "nats", "os", "pathlib",
    "sched", "secrets", "select", "selectors", "shutil", "signal", "socket", "socketserver",
    "sqlite3", "ssl", "subprocess", "tempfile", "threading", "time", "urllib",
}  # fmt: skip

# Tasks, futures and CancelledError are what the core is made of. The rest of asyncio does I/O,
# reaches for threads or runs a loop that is not ours.
ASYNCIO_REFUSED = re.compile(
    r"open_\w+|start_\w*server|create_subprocess_\w+|to_thread|run|Runner|new_event_loop"
    r"|Stream\w+|streams|subprocess|threads|selector_events|unix_events|windows_events"
)

TAKEN = re.compile(
    r"(datetime\.)?(datetime|date)\.(now|utcnow|today)|uuid\.uuid[14]"
    r"|random\.(choice|getrandbits|randint|random|randrange|sample|shuffle|uniform|SystemRandom)"
)


def test_the_core_is_pure() -> None:
    core = PACKAGE / "core"
    wrong = [line for path in sorted(core.rglob("*.py")) for line in impurities(path, SOURCE)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "text",
    [
        "import os.path",
        "from time import monotonic",
        "import sqlite3",
        "import asyncio.streams",
        "from asyncio import open_connection",
        "import asyncio\nasyncio.to_thread(print)",
        "from datetime import datetime, UTC\ndatetime.now(UTC)",
        "import datetime\ndatetime.datetime.now()",
        "import uuid\nuuid.uuid4()",
        "from uuid import uuid4",
        "import random\nrandom.random()",
    ],
)
def test_an_impurity_is_noticed(tmp_path: Path, text: str) -> None:
    assert list(impurities(_planted(tmp_path, text), tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "import asyncio\nasyncio.Future",
        "from asyncio import CancelledError, events",
        "import random\nrandom.Random(7).random()",
        "from uuid import UUID, uuid5",
        "from datetime import datetime\ndatetime.fromtimestamp(0)",
    ],
)
def test_what_is_pure_is_let_through(tmp_path: Path, text: str) -> None:
    assert list(impurities(_planted(tmp_path, text), tmp_path)) == []


def impurities(path: Path, source_folder: Path) -> Iterator[str]:
    """Yield a sentence for each thing in a file of the core that only the engine may do."""
    for found in imports(path, source_folder):
        dotted = f"{found.module}.{found.name}" if found.name else found.module
        if found.module.split(".")[0] in MODULES_REFUSED or _refused(dotted):
            yield f"{path.name}:{found.line}: imports {dotted}"
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Attribute) and _refused(dotted := ast.unparse(node)):
            yield f"{path.name}:{node.lineno}: uses {dotted}"


def _refused(dotted: str) -> bool:
    top, _, below = dotted.partition(".")
    if top == "asyncio":
        return any(map(ASYNCIO_REFUSED.fullmatch, below.split(".")))
    return TAKEN.fullmatch(dotted) is not None


def _planted(source_folder: Path, text: str) -> Path:
    path = source_folder / "planted.py"
    path.write_text(text)
    return path
