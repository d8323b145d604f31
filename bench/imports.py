"""How long a newcomer waits before anything happens."""

from __future__ import annotations

import compileall
import subprocess
import sys
import time
from pathlib import Path

from bench.figures import Figure, against, p50

ROUNDS = 15


async def imports(folder: Path) -> list[Figure]:
    """Import of pavane and `pavane --help`, byte-compiled, beyond the start of Python itself."""
    import pavane

    compileall.compile_dir(str(Path(pavane.__file__).parent), quiet=2)
    bare = _ms("pass")
    everything = "import pavane; pavane.App, pavane.Service, pavane.saga"
    figures: list[Figure] = []
    for name, code, wanted in (
        ("import pavane", "import pavane", "≤ 120 ms"),
        ("import all that an app needs", everything, "≤ 120 ms"),
    ):
        figures.append(against(name, _ms(code) - bare, "ms", bare, wanted))
    command = [str(Path(sys.executable).with_name("pavane")), "--help"]
    figures.append(against("pavane --help, whole process", _time(command), "ms", bare, "≤ 150 ms"))
    return figures


def _ms(code: str) -> float:
    return _time([sys.executable, "-c", code])


def _time(command: list[str]) -> float:
    times: list[float] = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append((time.perf_counter() - began) * 1e3)
    return p50(times)
