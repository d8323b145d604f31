"""What users and authors of stores test with. Names are imported when they are used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_WHERE = {
    "Rehearsal": "pavane.testing.rehearsal",
    "RehearsalFailed": "pavane.testing.rehearsal",
    "ReplayFailed": "pavane.testing.histories",
    "ReplayReport": "pavane.testing.histories",
    "Report": "pavane.testing.rehearsal",
    "Sim": "pavane.testing.sim.app",
    "replay_check": "pavane.testing.histories",
    "rehearse": "pavane.testing.rehearsal",
}

if TYPE_CHECKING:
    from pavane.testing.histories import ReplayFailed as ReplayFailed
    from pavane.testing.histories import ReplayReport as ReplayReport
    from pavane.testing.histories import replay_check as replay_check
    from pavane.testing.rehearsal import Rehearsal as Rehearsal
    from pavane.testing.rehearsal import RehearsalFailed as RehearsalFailed
    from pavane.testing.rehearsal import Report as Report
    from pavane.testing.rehearsal import rehearse as rehearse
    from pavane.testing.sim.app import Sim as Sim

__all__ = sorted(_WHERE)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'pavane.testing' has no attribute {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
