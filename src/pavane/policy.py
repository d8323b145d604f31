"""What users decide about steps and runs: retries and durations, as values."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import msgspec

from pavane.errors import BadDeclaration
from pavane.key import key_text

Duration = str | int | float | timedelta

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_WORDS = {
    "second": "s", "seconds": "s", "sec": "s", "minute": "m", "minutes": "m", "min": "m",
    "hour": "h", "hours": "h", "day": "d", "days": "d", "week": "w", "weeks": "w",
}  # fmt: skip
_PART = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zµ]+)\s*")


def seconds(value: Duration) -> float:
    """Return `value` in seconds: a number, a `timedelta`, or text such as "200ms" or "1h 30m"."""
    if isinstance(value, timedelta):
        result = value.total_seconds()
    elif isinstance(value, str):
        result = _parse(value)
    else:
        try:
            result = float(value)
        except (TypeError, ValueError):
            raise _no_duration(value) from None
    if not 0 <= result < 1e11:
        raise BadDeclaration(f"{value!r} is not a duration: it must be finite and not negative.")
    return result


def _parse(text: str) -> float:
    total, at = 0.0, 0
    lowered = text.lower()
    while at < len(lowered):
        part = _PART.match(lowered, at)
        unit = part and _WORDS.get(part[2], part[2])
        if not part or unit not in _UNITS:
            break
        total += float(part[1]) * _UNITS[unit]
        at = part.end()
    if not text.strip() or at < len(lowered):
        raise _no_duration(text)
    return total


def _no_duration(value: object) -> BadDeclaration:
    return BadDeclaration(
        f'{value!r} is not a duration. Write a number of seconds, or text such as "200ms", '
        f'"10s", "5m", "2h", "3 days".'
    )


class Retry(msgspec.Struct, frozen=True):
    """How often and when a failed step is tried again.

    `attempts` counts the first one (0: without limit). The wait before attempt n is
    `first * factor**(n-2)`, at most `most`, shortened at random by up to the share `jitter`.
    An exception of a type in `give_up` is never retried; `within` bounds the total time.
    """

    attempts: int = 5
    first: Duration = "200ms"
    factor: float = 2.0
    most: Duration = "1m"
    jitter: float = 0.2
    give_up: tuple[type[BaseException], ...] = ()
    within: Duration | None = None

    def __post_init__(self) -> None:
        if self.attempts < 0 or self.factor < 1 or not 0 <= self.jitter <= 1:
            raise BadDeclaration(
                f"{self!r}: attempts must be 0 (without limit) or more, factor at least 1, "
                f"jitter between 0 and 1."
            )
        for duration in (self.first, self.most, self.within or 0):
            seconds(duration)

    def delay_s(
        self, attempt: int, error: BaseException, elapsed_s: float, random: Callable[[], float]
    ) -> float | None:
        """Return the wait in seconds after failed attempt `attempt` (from 1); None: give up."""
        if isinstance(error, self.give_up) or (self.attempts and attempt >= self.attempts):
            return None
        first_s, most_s = seconds(self.first), seconds(self.most)
        grown = first_s * self.factor ** min(attempt - 1, 64)
        delay = min(grown, most_s) * (1 - self.jitter * random())
        if self.within is not None and elapsed_s + delay > seconds(self.within):
            return None
        return delay


ONCE = Retry(attempts=1)
PERSISTENT = Retry(attempts=10, first="200ms", most="1m")


class Limit(msgspec.Struct, frozen=True):
    """What may go on at once, or within a time, in the whole cluster.

    At most `concurrency` at the same time; at most `rate` begun within any time of length `per`
    (somewhat less at times: time is counted in tenths of it). `key` is a function of the same
    parameters (for a handler, of the event) whose result, as text, says who shares: one limit for
    each value. `name` lets several steps, handlers and workflows of a service share a limit; all of
    them then declare the same. Who may not begin waits, by priority and then in order.

    It holds across nodes and takeovers, except for what a node does that was taken for dead and is
    not: a step that goes on in a process that lost its lease counts no more.
    """

    concurrency: int | None = None
    rate: int | None = None
    per: Duration = "1s"
    key: Callable[..., object] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.concurrency is None and self.rate is None:
            raise BadDeclaration(
                'Limit(…) limits nothing: give it concurrency=10, or rate=100, per="1m", or both.'
            )
        if any(number is not None and number < 1 for number in (self.concurrency, self.rate)):
            raise BadDeclaration(f"{self!r}: concurrency and rate must be at least 1.")
        if not seconds(self.per):
            raise BadDeclaration(f"{self!r}: per must be longer than 0.")

    def key_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Return who shares the limit with a call of these arguments; raise what `key` raises."""
        if self.key is None:
            return ""
        whose = f"Limit {self.name!r}" if self.name else "A limit"
        return key_text(self.key(*args, **kwargs), whose)


class StepOptions(msgspec.Struct, frozen=True):
    """The declared behaviour of a step. Times are seconds here; None means none.

    Without `retry` a step is tried ONCE, a compensation is PERSISTENT.
    """

    retry: Retry | None = None
    timeout_s: float | None = None
    heartbeat_s: float | None = None
    undo: Any = None
    limit: Limit | None = None
