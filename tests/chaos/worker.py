"""A node of the shop in a world that answers quickly: `python -m tests.chaos.worker ADDRESS`."""

from __future__ import annotations

import asyncio
import sys

from examples.shop import world
from pavane import EngineConfig
from pavane.cli.run import set_up_logging, work
from tests.chaos.faults import LEASE_S
from tests.chaos.shop import app

ANSWERS_AFTER_S = 0.001


def main(address: str) -> None:
    set_up_logging(-1)
    world.ANSWERS_AFTER_S = ANSWERS_AFTER_S
    # Who has nothing to do for a moment rests for long: what it misses then would show.
    app.config = EngineConfig(lease_s=LEASE_S, step_threads=16, rest_after_s=0.2, glance_s=1.0)
    asyncio.run(work(app, sorted(app.registry.services), address, quiet=False, with_parent=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
