"""Keeps rehearsals from doing real things: a thousand seeds would charge a card a thousand times.

What would open a connection or start a process is refused while code runs that is rehearsed, in
this thread, through CPython's audit events, also where it is blocking code that the simulated
event loop does not see. Files are left alone. The hook costs a look-up per audit event elsewhere.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from pavane.errors import NotInSimulation

_REFUSED = frozenset({
    "os.exec", "os.posix_spawn", "os.startfile", "os.system", "socket.connect",
    "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "subprocess.Popen",
})  # fmt: skip

_secluded: set[int] = set()
"""Threads in which something is rehearsed."""
_is_installed = False


def refusal(what: str) -> NotInSimulation:
    """Return the error for what would leave the simulation."""
    return NotInSimulation(
        f"{what} would leave the simulation, in which there is no network and no subprocess. Let "
        f"the step talk to a fake, or replace it: sim.replace(step, fake), or "
        f"rehearse(…, fakes={{step: fake}})."
    )


@contextmanager
def secluded() -> Generator[None]:
    """Refuse network and subprocesses in this thread until the block ends."""
    global _is_installed
    if not _is_installed:
        sys.addaudithook(_hook)
        _is_installed = True
    thread = threading.get_ident()
    _secluded.add(thread)
    try:
        yield
    finally:
        _secluded.discard(thread)


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if event in _REFUSED and threading.get_ident() in _secluded:
        raise refusal(event)
