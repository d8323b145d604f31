"""Imports run one way, from what users start down to the words that everything is made of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tidy.source_tree import PACKAGE, SOURCE, Import, imports

VOCABULARY = {"event", "policy", "key", "errors"}
CORE = VOCABULARY | {"core"}
AUTHORING = CORE | {"service", "workflow", "handler", "contract", "schedule"}
PORTS = CORE | {"stores", "brokers"}
CONFIG = PORTS | {"config"}
ENGINE = CONFIG | AUTHORING | {"engine"}
STEERING = ENGINE | {"steering"}
WATCHING = ENGINE | {"observe"}
APP = STEERING | WATCHING | {"app"}
OUTBOX = APP | {"outbox"}
ON_TOP = OUTBOX | {"insight", "dashboard", "cli", "testing", "contrib", "__main__"}

MAY_IMPORT = (
    dict.fromkeys(ON_TOP, ON_TOP)
    | {"app": APP, "steering": STEERING, "observe": WATCHING, "engine": ENGINE, "config": CONFIG}
    | {"outbox": OUTBOX}
    | {"stores": PORTS, "brokers": PORTS, "service": AUTHORING, "workflow": AUTHORING}
    | {"handler": AUTHORING, "contract": AUTHORING, "schedule": AUTHORING}
    | {"core": CORE}
    | dict.fromkeys(VOCABULARY, VOCABULARY)
)
"""What each module or folder right under `pavane` may import; a new one gets its place here.

`pavane/__init__.py` is not among them. It offers the names of all the others, lazily, and nobody
inside the package goes through it.
"""


def test_imports_run_one_way() -> None:
    wrong = [line for path in sorted(PACKAGE.rglob("*.py")) for line in violations(path, SOURCE)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("core/loop.py", "from pavane.engine import node", "core may not import engine"),
        ("core/loop.py", "from ..stores.port import Store", "core may not import stores"),
        ("core/loop.py", "def f():\n    import pavane.app", "core may not import app"),
        (
            "stores/sqlite/store.py",
            "from ...service import Service",
            "stores may not import service",
        ),
        ("event.py", "from . import core", "event may not import core"),
        ("engine/node.py", "from pavane import Event", "import Event from the module that defines"),
        ("engine/node.py", "import pavane", "import pavane from the module that defines"),
        ("misc.py", "import re", "misc has no place in MAY_IMPORT yet"),
    ],
)
def test_a_wrong_import_is_noticed(tmp_path: Path, file: str, text: str, message: str) -> None:
    assert any(message in line for line in violations(_planted(tmp_path, file, text), tmp_path))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("__init__.py", "from pavane.app import App"),
        ("core/loop.py", "from . import guard"),
        ("core/policy.py", "from pavane.policy import Retry"),
        ("brokers/log.py", "from pavane.stores.port import Store"),
        ("cli/__init__.py", "from pavane import __version__"),
        ("engine/node.py", "import asyncio, msgspec"),
    ],
)
def test_a_right_import_is_let_through(tmp_path: Path, file: str, text: str) -> None:
    assert list(violations(_planted(tmp_path, file, text), tmp_path)) == []


def violations(path: Path, source_folder: Path) -> Iterator[str]:
    """Yield a sentence for each import of a file that the file's place does not allow."""
    inside = path.relative_to(source_folder / "pavane")
    here = inside.with_suffix("").parts[0]
    if here == "__init__":
        return
    if here not in MAY_IMPORT:
        yield f"{inside}: {here} has no place in MAY_IMPORT yet; give it one"
        return
    for found in imports(path, source_folder):
        there = _reached(found)
        if there is None or there in MAY_IMPORT[here]:
            continue
        if there in MAY_IMPORT:
            yield f"{inside}:{found.line}: {here} may not import {there}"
        else:
            yield f"{inside}:{found.line}: import {there} from the module that defines it"


def _reached(found: Import) -> str | None:
    """Name the module or folder right under `pavane` that an import reaches, if any."""
    top, *below = found.module.split(".")
    if top != "pavane" or found.name == "__version__":
        return None
    return below[0] if below else found.name or "pavane"


def _planted(source_folder: Path, file: str, text: str) -> Path:
    path = source_folder / "pavane" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path
