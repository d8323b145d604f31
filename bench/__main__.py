"""Run benchmarks: `python -m bench [NAME …] [--json]`."""

from __future__ import annotations

import argparse
import asyncio
import inspect
import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from bench.figures import show

BENCHES = {
    "steps": "bench.steps",
    "latency": "bench.steps",
    "start": "bench.steps",
    "limits": "bench.steps",
    "sleepers": "bench.scale",
    "recovery": "bench.scale",
    "long": "bench.scale",
    "import": "bench.imports",
    "incidents": "bench.incidents",
    "events": "bench.events",
    "publish": "bench.events",
    "fanout": "bench.events",
    "backlog": "bench.events",
    "mailbox": "bench.events",
    "simulator": "bench.simulator",
    "postgres": "bench.postgres",
    "cluster": "bench.cluster",
    "spread": "bench.spread",
    "growth": "bench.cluster",
    "pruning": "bench.cluster",
    "idle": "bench.cluster",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)}; all")
    parser.add_argument("--json", action="store_true", help="one JSON line a figure")
    chosen = parser.parse_args()
    for name in chosen.names or BENCHES:
        if name not in BENCHES:
            parser.error(f"no benchmark is called {name!r}; there are: {', '.join(BENCHES)}")
        measure = getattr(import_module(BENCHES[name]), name.replace("import", "imports"))
        if not chosen.json:
            summary = (inspect.getdoc(measure) or "").partition("\n")[0]
            print(f"{name}: {summary}", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix="pavane-bench-") as folder:
            os.environ["PAVANE_STATE"] = folder  # what is known of databases that are gone
            show(asyncio.run(measure(Path(folder))), chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
