"""Chaos with real processes: `python -m tests.chaos [--store KIND] [--orders N] [--seed N]`.

Some nodes share one store and work for the shop of the examples, in its three forms at once, while
nodes are killed, frozen past their lease and started again; and on Postgres connections are cut and
silenced and the server goes down. When the time is over everything heals, and then every order must
come to its end, with nothing lost, doubled or half done. A seed says what goes wrong when.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path

from tests.chaos.chaos import Chaos, Plan
from tests.chaos.grounds import OneFile, OnePostgres


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--store", choices=("sqlite", "postgres"), default="sqlite")
    parser.add_argument("--orders", type=int, default=20_000, help="%(default)s")
    parser.add_argument("--seconds", type=float, default=600.0, help="of trouble (%(default)s)")
    parser.add_argument("--nodes", type=int, default=4, help="%(default)s")
    parser.add_argument("--outage", type=float, default=60.0, help="s without Postgres")
    parser.add_argument("--seed", type=int, help="of what goes wrong when; drawn if not given")
    chosen = parser.parse_args()
    seed = random.randrange(1_000_000) if chosen.seed is None else chosen.seed
    plan = Plan(chosen.orders, chosen.seconds, chosen.nodes, seed)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"--seed {seed}, in {folder}")
    is_file = chosen.store == "sqlite"
    ground = OneFile(folder) if is_file else OnePostgres(folder, plan.nodes, chosen.outage)
    outcome = Chaos(plan, folder, ground, say=print).run()
    print(outcome)
    if outcome.violations:
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
