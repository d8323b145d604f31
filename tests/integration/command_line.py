"""The `pavane` command as tests call it: about an app in a folder, here or in a process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pavane.cli import main


@contextmanager
def in_folder_of(
    folder: Path, app: str, monkeypatch: pytest.MonkeyPatch, *others: str
) -> Generator[None]:
    """Be in `folder`, about the app in the file `app`; forget its module and `others` then."""
    monkeypatch.chdir(folder)
    for name in ("PAVANE_STORE", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PAVANE_APP", app)
    monkeypatch.setenv("COLUMNS", "100")
    path = list(sys.path)
    yield
    sys.path[:] = path
    for name in (Path(app).stem, *others):
        sys.modules.pop(name, None)


def worker(folder: Path, app: str, *options: str) -> subprocess.Popen[str]:
    """Start a worker and wait until it says that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pavane", "run", app, *options],
        cwd=folder, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line == "ready\n":
            return process
    raise AssertionError(f"the worker did not start: {process.wait()}")


def pavane(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def good(*arguments: str) -> str:
    """Return what a command that must work prints."""
    result = pavane(*arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result.stdout


def refused(code: int, *arguments: str) -> str:
    """Return what a command that must fail with `code` says."""
    result = pavane(*arguments)
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    return result.stderr
