"""What the tests with worker processes share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pavane.core.operations import Mode
from tests.integration import crew
from tests.integration.fleet import Fleet
from tests.integration.world import MODES


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Mode:
    return request.param


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    """Processes that are gone when the test is over."""
    monkeypatch.setattr(crew, "RECORD", tmp_path / "record.txt")
    fleet = Fleet(tmp_path)
    try:
        yield fleet
    finally:
        fleet.sink()
