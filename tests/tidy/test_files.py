"""Files say what they are, in their name and their first lines, and nothing about a machine."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.tidy.source_tree import PACKAGE, ROOT, our_python_files, parsed, tracked_files

NAMES_THAT_SAY_NOTHING = {"base", "common", "helper", "helpers", "manager", "util", "utils"}

# Written so that this file does not match itself.
OF_ONE_MACHINE = re.compile(
    r"(?<![\w.-])/(?:work|root)/"
    r"|/tmp/(?:v\b|venv)"
    r"|https?://[^\s\"']+/simple\b"
    r"|(?:extra-)?index-url\s*="
)


def test_every_module_has_a_docstring() -> None:
    silent = [_inside(path) for path in our_python_files() if not ast.get_docstring(parsed(path))]
    assert not silent, f"say in a docstring what these are, why, and what they guarantee: {silent}"


def test_no_file_is_named_after_nothing() -> None:
    vague = [
        _inside(path)
        for path in our_python_files()
        if NAMES_THAT_SAY_NOTHING & set(re.split(r"[/_.]", _inside(path)))
    ]
    assert not vague, f"name these after the duty that they have: {vague}"


def test_every_sql_file_opens_with_a_comment() -> None:
    bare = [
        _inside(path)
        for path in sorted(PACKAGE.rglob("*.sql"))
        if not re.match(r"--[ \t]*\S", path.read_text(encoding="utf-8"))
    ]
    assert not bare, f"say in a header what these are for, their index and their locks: {bare}"


def test_nothing_committed_names_a_machine_or_a_registry() -> None:
    found = [line for path in tracked_files() for line in _machine_lines(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text", ["cd {}work/x", "'{}root/.cache'", "{}tmp/v/bin/pip", "index-{}url = x"]
)
def test_a_machine_path_is_noticed(text: str) -> None:
    slash_or_nothing = "" if "index" in text else "/"
    assert OF_ONE_MACHINE.search(text.format(slash_or_nothing))


def _machine_lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        return []  # an image or the like
    return [
        f"{_inside(path)}:{number}: {line.strip()[:100]}"
        for number, line in enumerate(lines, 1)
        if OF_ONE_MACHINE.search(line)
    ]


def _inside(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()
