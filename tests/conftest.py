"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes, or to draw one, says more of the machine than of the code.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


@pytest.fixture(autouse=True, scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what this machine knows of databases away from those of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAVANE_STATE", str(tmp_path_factory.mktemp("state")))
        yield
