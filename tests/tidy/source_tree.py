"""The files that the tidy tests look at, and what their modules import."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"
PACKAGE = SOURCE / "pavane"
OUR_FOLDERS = ("bench", "examples", "src", "tests")


@dataclass(frozen=True)
class Import:
    """One imported module, or one name out of it; `name` is None for `import module`."""

    module: str
    name: str | None
    line: int


@cache
def our_python_files() -> tuple[Path, ...]:
    """Return every Python file of ours, committed or not yet."""
    return tuple(sorted(path for folder in OUR_FOLDERS for path in (ROOT / folder).rglob("*.py")))


@cache
def tracked_files() -> tuple[Path, ...]:
    """Return the files that git knows of and that are still there; skip the test without git."""
    try:
        listing = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
        ).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout, or no git")
    return tuple(path for name in listing.split("\0") if name and (path := ROOT / name).is_file())


@cache
def parsed(path: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path, source_folder: Path) -> Iterator[Import]:
    """Yield what a module imports: at the top, inside functions, and for type checkers alike."""
    package = path.relative_to(source_folder).parent.parts
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, None, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(module, alias.name, node.lineno)
