"""Keeps rehearsals from doing real things: a thousand seeds would charge a card a thousand times.

What would open a connection or start a process is refused while code runs that is rehearsed, in
this thread and in those that it starts, through CPython's audit events, also where it is blocking
code that the simulated event loop does not see. Files are left alone. The hook costs a look-up per
audit event elsewhere.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from pavane.errors import NotInSimulation

_REFUSED = frozenset({
    "os.exec", "os.posix_spawn", "os.startfile", "os.system", "socket.connect",
    "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "subprocess.Popen",
})  # fmt: skip

_secluded: set[int] = set()
"""Threads in which something is rehearsed."""
_started_by: WeakKeyDictionary[threading.Thread, int] = WeakKeyDictionary()
"""Which of these a thread is a child of, or a child's child."""
_is_installed = False
_start = threading.Thread.start


def refusal(what: str) -> NotInSimulation:
    """Return the error for what would leave the simulation."""
    return NotInSimulation(
        f"{what} would leave the simulation, in which there is no network and no subprocess. Let "
        f"the step talk to a fake, or replace it: sim.replace(step, fake), or "
        f"rehearse(…, fakes={{step: fake}})."
    )


@contextmanager
def secluded() -> Generator[None]:
    """Refuse network and subprocesses in this thread, and its children, until the block ends."""
    global _is_installed
    if not _is_installed:
        sys.addaudithook(_hook)
        threading.Thread.start = _start_known  # Python 3.11 has no audit event for it
        _is_installed = True
    thread = threading.get_ident()
    _secluded.add(thread)
    try:
        yield
    finally:
        _secluded.discard(thread)


def _secluded_in() -> int | None:
    """Return the thread whose rehearsal this call is part of, if it is part of one."""
    thread = threading.get_ident()
    if thread not in _secluded:
        thread = _started_by.get(threading.current_thread())
    return thread if thread in _secluded else None


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if event in _REFUSED and _secluded_in() is not None:
        raise refusal(event)


def _start_known(self: threading.Thread) -> None:
    secluded_in = _secluded_in()
    if secluded_in is not None:
        _started_by[self] = secluded_in
    _start(self)
