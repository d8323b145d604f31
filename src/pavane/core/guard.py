"""Refuses I/O, threads and subprocesses while workflow code runs.

A workflow is replayed, so whatever it does besides awaiting durable operations happens again on
every replay. The event loop of a workflow refuses asynchronous I/O by itself; this module refuses
the blocking kind, through CPython's audit events, while the running loop of the thread is a
workflow's. The hook costs one set look-up per audit event elsewhere.
"""

from __future__ import annotations

import sys
from asyncio import events
from collections.abc import Callable
from types import FrameType
from typing import Any

from pavane.errors import NotInWorkflow

_REFUSED = frozenset({
    "_thread.start_new_thread", "_thread.start_joinable_thread",
    "builtins.input", "glob.glob", "http.client.connect", "open",
    "os.chmod", "os.chown", "os.exec", "os.fork", "os.forkpty", "os.link", "os.listdir", "os.mkdir",
    "os.posix_spawn", "os.remove", "os.rename", "os.rmdir", "os.scandir", "os.startfile",
    "os.symlink", "os.system", "os.truncate", "os.utime", "os.walk", "pathlib.Path.glob",
    "shutil.copyfile", "shutil.copymode", "shutil.copystat", "shutil.copytree",
    "shutil.make_archive", "shutil.move", "shutil.rmtree", "shutil.unpack_archive",
    "socket.bind", "socket.connect", "socket.getaddrinfo", "socket.gethostbyaddr",
    "socket.gethostbyname", "socket.sendmsg", "socket.sendto", "sqlite3.connect",
    "subprocess.Popen", "tempfile.mkdtemp", "tempfile.mkstemp", "threading.wait", "time.sleep",
    "urllib.Request",
})  # fmt: skip
_NAMES = {
    "_thread.start_new_thread": "starting a thread",
    "_thread.start_joinable_thread": "starting a thread",
    "builtins.input": "input()",
    "os.mkdir": "os.mkdir (or os.makedirs, Path.mkdir)",
    "os.remove": "os.remove (or Path.unlink)",
    "os.rename": "os.rename (or os.replace, Path.rename)",
    "os.scandir": "os.scandir (or Path.iterdir, os.walk)",
    "subprocess.Popen": "subprocess",
    "socket.getaddrinfo": "a name look-up (socket.getaddrinfo)",
    "threading.wait": "waiting for a thread (threading.Event, queue.Queue, Future.result)",
    "urllib.Request": "urlopen (urllib.request)",
}
_UNAUDITED = (("time", "sleep", "time.sleep", (3, 13)),
              ("threading", "_start_new_thread", "_thread.start_new_thread", (3, 12)))  # fmt: skip
"""What tells the hook nothing before some version: module, name, event, version."""
_CODE = (".py", ".pyc", ".so", ".pyd")
_ALLOWED = frozenset({
    "importlib", "_frozen_importlib", "_frozen_importlib_external", "zipimport", "logging", "pdb",
})  # fmt: skip
"""Packages that may do I/O for workflow code: nothing that it does depends on it."""

_installed = False


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if event not in _REFUSED or not _in_workflow():
        return
    name = _NAMES.get(event, event)
    if event == "open":
        path = args[0]
        if isinstance(path, int) or str(path).endswith(_CODE):
            return  # a lazy import, or a traceback that reads its source
        name = f"open({path!r})"
    if _is_allowed(sys._getframe(1)):  # pyright: ignore[reportPrivateUsage]
        return
    raise NotInWorkflow(
        f"{name} is not possible in workflow code, which is replayed and must not do I/O. "
        f"Move it to a step: a function with @service.step, called from the workflow."
    )


def _is_allowed(frame: FrameType | None) -> bool:
    """Tell whether Python itself does it: a lazy import, a log file that is rotated, a debugger."""
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] in _ALLOWED:
            return True
        if frame.f_globals.get("__name__") == "pavane.core.loop":
            return False
        frame = frame.f_back
    return False


class _Audited:
    """A function that raises an audit event first, as later Pythons do it themselves."""

    def __init__(self, event: str, function: Callable[..., Any]) -> None:
        self._event = event
        self._function = function
        self.__doc__, self.__wrapped__ = function.__doc__, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _hook(self._event, args)
        return self._function(*args, **kwargs)


def _in_workflow() -> bool:
    return getattr(events._get_running_loop(), "is_workflow", False)


def install() -> None:
    """Refuse from now on, in every thread, while its running loop has a true `is_workflow`."""
    global _installed
    if _installed:
        return
    _installed = True
    sys.addaudithook(_hook)
    for module, name, event, audited_since in _UNAUDITED:
        found = sys.modules.get(module)
        if sys.version_info < audited_since and found is not None:
            setattr(found, name, _Audited(event, getattr(found, name)))
    _audit_waits(sys.modules["threading"].Condition)  # asyncio has imported it


def _audit_waits(condition: Any) -> None:
    """Refuse to wait for threads, which no audit event tells of: it would stop the whole node."""
    waits = condition.wait

    def wait(self: Any, timeout: float | None = None) -> bool:
        _hook("threading.wait", ())
        return waits(self, timeout)

    condition.wait = wait
