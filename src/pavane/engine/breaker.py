"""The circuit breaker of one handler on one node: pure, its clock is given."""

from __future__ import annotations

from collections import deque

from pavane.handler import Breaker
from pavane.policy import seconds

BREAKER = "breaker"
"""How the reason of a pause begins that a breaker made."""
BY_HAND = "by hand"
"""The reason of a pause that a person made without one."""


class Circuit:
    """Closed while enough attempts succeed; else open until `opens_s`, then one trial at a time."""

    def __init__(self, policy: Breaker) -> None:
        self._policy = policy
        self._recent: deque[bool] = deque(maxlen=policy.window)
        self._pause_s = seconds(policy.pause)
        self._trying = False
        self.retry_at_s: float | None = None
        """When the next trial may be made; None while it is closed."""

    def allows(self, now_s: float) -> bool:
        """Tell whether an attempt may be made now; while open, the one allowed is the trial."""
        if self.retry_at_s is None:
            return True
        if self._trying or now_s < self.retry_at_s:
            return False
        self._trying = True
        return True

    def record(self, ok: bool, now_s: float) -> bool:
        """Take the outcome of an attempt; tell whether the circuit opened or closed by it."""
        if self.retry_at_s is not None:
            if not self._trying:
                return False  # it began before the circuit opened
            self._trying = False
            if ok:
                self.retry_at_s = None
                self._recent.clear()
                self._pause_s = seconds(self._policy.pause)
            else:
                self._pause_s = min(self._pause_s * 2, seconds(self._policy.most))
                self.retry_at_s = now_s + self._pause_s
            return True
        self._recent.append(ok)
        failed = len(self._recent) - sum(self._recent)
        if len(self._recent) < self._policy.window:
            return False
        if failed < self._policy.failures * self._policy.window:
            return False
        self.retry_at_s = now_s + self._pause_s
        return True

    def give_back(self) -> None:
        """Note that the allowed attempt was not made after all."""
        self._trying = False

    def says(self) -> str:
        failed = len(self._recent) - sum(self._recent)
        return f"{BREAKER}: {failed} of the last {len(self._recent)} attempts failed"
