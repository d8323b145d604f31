"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what this machine knows of databases away from those of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAVANE_STATE", str(tmp_path_factory.mktemp("state")))
        yield
