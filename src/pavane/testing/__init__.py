"""What users and authors of stores test with. Names are imported when they are used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_WHERE = {
    "ReplayFailed": "pavane.testing.histories",
    "ReplayReport": "pavane.testing.histories",
    "replay_check": "pavane.testing.histories",
}

if TYPE_CHECKING:
    from pavane.testing.histories import ReplayFailed as ReplayFailed
    from pavane.testing.histories import ReplayReport as ReplayReport
    from pavane.testing.histories import replay_check as replay_check

__all__ = sorted(_WHERE)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'pavane.testing' has no attribute {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
