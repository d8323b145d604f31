"""What the tests with worker processes share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pavane.core.operations import Mode
from tests.integration import crew
from tests.integration.fleet import Fleet
from tests.integration.world import MODES, Place
from tests.postgres import Database


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Mode:
    return request.param


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Where the store is: a file, or an empty database of a real server."""
    if request.param == "sqlite":
        yield tmp_path / "world.db"
    else:
        with Database() as url:
            yield url


@pytest.fixture
def fleet(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    """Processes that are gone when the test is over."""
    monkeypatch.setattr(crew, "RECORD", tmp_path / "record.txt")
    fleet = Fleet(tmp_path, str(place))
    try:
        yield fleet
    finally:
        fleet.sink()
