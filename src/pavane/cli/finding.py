"""What a check of `pavane doctor` found."""

from __future__ import annotations

from typing import Literal

import msgspec

Level = Literal["ok", "warn", "fail"]


class Finding(msgspec.Struct, frozen=True):
    """What a check found; `remedy` says what to do unless all is well."""

    check: str
    level: Level
    text: str
    remedy: str = ""
