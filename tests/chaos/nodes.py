"""The nodes of a chaos: processes that are killed, frozen, cut off and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from examples.shop.world import PLACE

ROOT = Path(__file__).resolve().parents[2]
READY_WITHIN_S = 60.0
STOPS_WITHIN_S = 60.0


class ChaosNode:
    """One worker process, started again whenever it is gone."""

    def __init__(self, number: int, address: str, world: Path, logs: Path) -> None:
        self.number = number
        self.address = address
        self.kills = 0
        self._world = world
        self._log = logs / f"node{number}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._said = 0
        self._frozen_until_s = 0.0
        self._down_until_s = 0.0

    @property
    def is_up(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def is_frozen(self) -> bool:
        return self._frozen_until_s > 0

    def tend(self) -> None:
        """Start it if it is gone for long enough, and thaw it if it was frozen for long enough."""
        now = time.monotonic()
        if self.is_frozen and now >= self._frozen_until_s:
            self._frozen_until_s = 0.0
            self._signal(signal.SIGCONT)
        if not self.is_up and now >= self._down_until_s:
            self._start()

    def _start(self) -> None:
        with self._log.open("ab") as log:
            self._said = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.worker", self.address],
                cwd=ROOT, env=os.environ | {PLACE: str(self._world)}, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def kill(self, down_s: float) -> None:
        self._frozen_until_s = 0.0
        self._down_until_s = time.monotonic() + down_s
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
        self.kills += 1

    def freeze(self, for_s: float) -> None:
        self._frozen_until_s = time.monotonic() + for_s
        self._signal(signal.SIGSTOP)

    def heal(self) -> None:
        """Have it run again, at once."""
        if self.is_frozen:
            self._frozen_until_s = 0.0
            self._signal(signal.SIGCONT)
        self._down_until_s = 0.0
        self.tend()

    def stop(self) -> int:
        """Let it drain; return its exit code.

        One that was just started is waited for: until it listens, a signal simply ends it.
        """
        assert self._process is not None
        self._signal(signal.SIGCONT)
        give_up_s = time.monotonic() + READY_WITHIN_S
        while b"ready\n" not in self._log.read_bytes()[self._said :]:
            if not self.is_up or time.monotonic() > give_up_s:
                break
            time.sleep(0.05)
        self._signal(signal.SIGTERM)
        return self._process.wait(STOPS_WITHIN_S)

    def end(self) -> None:
        """Leave nothing behind, whatever happened."""
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
