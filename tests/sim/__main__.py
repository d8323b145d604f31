"""Run storms for long: `python -m tests.sim [SCENARIO …] [--seeds N] [--first N] [--mode MODE]`.

Each violation is printed with the command that repeats it; with `--trace` one storm is run, and all
that happens in it is printed. `--bugs` looks for the planted bugs instead, and prints a table.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.sim.planted import BUGS
from tests.sim.storms import MODES, PROCESSES, SCENARIOS, be_quiet, find, storm, storms


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    names = ", ".join(SCENARIOS)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {names}; all")
    parser.add_argument("--seeds", type=int, default=1000, help="how many, of each (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the first one (%(default)s)")
    parser.add_argument("--mode", choices=MODES, help="both")
    parser.add_argument("--processes", type=int, default=PROCESSES, help="%(default)s")
    parser.add_argument("--bugs", action="store_true", help="look for the planted bugs")
    parser.add_argument("--trace", action="store_true", help="print all that happens")
    chosen = parser.parse_args()
    scenarios = chosen.scenarios or list(SCENARIOS)
    for name in scenarios:
        if name not in SCENARIOS:
            parser.error(f"no scenario is called {name!r}; there are: {names}")
    modes = (chosen.mode,) if chosen.mode else MODES
    seeds = range(chosen.first, chosen.first + chosen.seeds)
    if chosen.bugs:
        return _find_all(chosen.seeds)
    if chosen.trace:
        be_quiet()
        outcome = storm(scenarios[0], chosen.first, modes[0], verbose=True)
        print(*outcome.lines, outcome.violation or "No promise was broken.", sep="\n")
        return 1 if outcome.violation else 0
    began_s, done, found = time.monotonic(), 0, 0
    total = len(seeds) * len(scenarios) * len(modes)
    for count, broken in storms(scenarios, modes, seeds, chosen.processes):
        done += count
        for one in broken:
            found += 1
            print(f"\r{one}\n", flush=True)
        spent_s = time.monotonic() - began_s
        print(
            f"\r{done:,} of {total:,} storms, {found} violations, {done / spent_s:,.0f} storms/s ",
            end="", file=sys.stderr, flush=True,
        )  # fmt: skip
    print(file=sys.stderr)
    spent_s = time.monotonic() - began_s
    print(f"{done:,} storms in {spent_s:,.0f} s, {found} violations.")
    return 1 if found else 0


def _find_all(seeds: int) -> int:
    be_quiet()
    print("| planted | storms over | seeds to find |\n|---|---|---|")
    missed = 0
    for bug in BUGS.values():
        found = find(bug, seeds)
        missed += found is None
        cost = f"more than {seeds}" if found is None else f"{found.seed + 1}"
        print(f"| {bug.says} | {bug.scenario} | {cost} |", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
