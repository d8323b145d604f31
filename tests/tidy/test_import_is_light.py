"""`import pavane` loads nothing that it may not need, and the base install stays small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib

from tests.tidy.source_tree import ROOT, SOURCE

NOT_LOADED_EAGERLY = {"apsw", "asyncpg", "attr", "attrs", "click", "nats", "pydantic"}
BASE_DEPENDENCIES_MAX = 5


def test_import_pavane_loads_no_driver_and_no_extra() -> None:
    program = "import json, sys, pavane; print(json.dumps(list(sys.modules)))"
    printed = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    assert NOT_LOADED_EAGERLY.isdisjoint(json.loads(printed))


def test_there_are_few_base_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert len(project["dependencies"]) <= BASE_DEPENDENCIES_MAX
