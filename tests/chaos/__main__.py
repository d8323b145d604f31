"""Chaos with real processes: `python -m tests.chaos [--store ADDRESS] [--orders N] [--seed N]`.

Some nodes share one store and work for the shop of the examples, in its three forms at once, while
nodes are killed, frozen past their lease and started again. When the time is over everything heals,
and then every order must come to its end, with nothing lost, doubled or half done.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.chaos.chaos import Chaos, Plan


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--store", help="address; an SQLite file in a new folder by default")
    parser.add_argument("--orders", type=int, default=3000, help="%(default)s")
    parser.add_argument("--seconds", type=float, default=30.0, help="of trouble (%(default)s)")
    parser.add_argument("--nodes", type=int, default=4, help="%(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of what goes wrong when (%(default)s)")
    chosen = parser.parse_args()
    plan = Plan(chosen.orders, chosen.seconds, chosen.nodes, chosen.seed)
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
        outcome = Chaos(plan, Path(folder), chosen.store, say=print).run()
    print(outcome)
    return 1 if outcome.violations else 0


if __name__ == "__main__":
    sys.exit(main())
