"""The trace: what happened, one line each, and a digest by which two simulations are compared.

Callbacks are by far the most, so without `verbose` they only go into the digest, as numbers.
"""

from __future__ import annotations

from zlib import crc32

MASK = 2**64 - 1


class Trace:
    """Lines in the order of what happened."""

    def __init__(self, *, verbose: bool = False) -> None:
        self.verbose = verbose
        self.lines: list[str] = []
        self.callbacks = 0
        self._state = 0

    def callback(self, at_us: int, process: int, what: object) -> None:
        """Note that a callback is about to run in a process."""
        self.callbacks += 1
        self._state = hash((self._state, at_us, process))  # of numbers: the same in every process
        if self.verbose:
            self.lines.append(f"{at_us} {process} callback {_name(what)}")

    def note(self, at_us: int, text: str) -> None:
        """Note anything else: a write, a fault, what a client was told."""
        line = f"{at_us} {text}"
        self.lines.append(line)
        self._state = hash((self._state, crc32(line.encode())))

    @property
    def digest(self) -> str:
        return f"{self._state & MASK:016x}"


def _name(callback: object) -> str:
    """Name a callback without its address."""
    owner = getattr(callback, "__self__", None)
    coro = getattr(owner, "get_coro", None)
    if coro is not None:
        return getattr(coro(), "__qualname__", "a coroutine")
    return getattr(callback, "__qualname__", type(callback).__name__)
