"""The engine's limits and times, each with its unit."""

from __future__ import annotations

import msgspec

from pavane.core.execution import PAYLOAD_MAX_BYTES
from pavane.core.policy import HOPS_MAX, JOURNAL_MAX_BYTES
from pavane.errors import BadDeclaration

SUSPECT_DEATHS = 2
"""What was under way in so many process deaths is touched again alone, with nothing else."""

_MAX = 1e11
_ABOVE_ZERO = frozenset({
    "lease_s", "poll_s", "payload_max_bytes", "step_threads", "deaths_max",
})  # fmt: skip


class EngineConfig(msgspec.Struct, frozen=True):
    """How a node behaves; the defaults suit one machine and its embedded store.

    Names tell units: `_s` seconds. Raises BadDeclaration for what cannot be.
    """

    lease_s: float = 3.0
    poll_s: float = 0.01
    """How long, at most, a node does not look for what other processes wrote; while there is
    something, it looks ten times as often."""
    rest_after_s: float = 5.0
    """A node that has had nothing to do for so long rests, where the store can wake it."""
    glance_s: float = 0.2
    """The more nodes there are, the longer one that rests prolongs its lease at once, so that in
    this time one of them looks at the store."""
    live_runs_max: int = 1000
    """Runs that merely wait are kept in memory up to this many, then replayed when woken."""
    payload_max_bytes: int = PAYLOAD_MAX_BYTES
    journal_max_bytes: int = JOURNAL_MAX_BYTES
    hops_max: int = HOPS_MAX
    retention_s: float = 7 * 86400.0
    """How long ended runs and consumed messages are kept, and with them the ids that were used."""
    grace_s: float = 10.0
    """How long a draining node waits for its running steps."""
    step_threads: int = 16
    custody_after_s: float = 1.0
    """A command that runs longer is written to the store, to hold back the log no longer."""
    deaths_max: int = 5
    """A run that was under way in so many process deaths is quarantined."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            kinds = (int, float) if name.endswith("_s") else (int,)
            positive = name in _ABOVE_ZERO
            if (
                not isinstance(value, kinds) or isinstance(value, bool)
                or not 0 <= value < _MAX or (positive and not value)
            ):  # fmt: skip
                what = "number of seconds" if name.endswith("_s") else "whole number"
                least = "above 0" if positive else "of 0 or more"
                raise BadDeclaration(f"EngineConfig({name}={value!r}): write a {what} {least}.")
