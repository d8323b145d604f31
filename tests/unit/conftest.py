"""What all unit tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.pure_driver import discard_driven


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    """Executions that a test left open are put away, as the engine does it."""
    yield
    discard_driven()
