"""`pavane doctor`: looks for what would keep processes from running, and says what to do about it.

Each check is a small function that returns findings. A check that cannot look at something because
an earlier one failed is left out.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path
from typing import Any

import apsw
import click

from pavane.app import App, Client
from pavane.cli.connection import Where, connected, where_options
from pavane.cli.doctor_events import look_at_events
from pavane.cli.doctor_postgres import look_at_postgres
from pavane.cli.exits import FAILED
from pavane.cli.finding import Finding, Level
from pavane.cli.output import Format, is_unicode, output_option, print_json, terminal_width
from pavane.cli.runs.record import read_list, read_unbegun
from pavane.cli.text import counted, duration, printable, size, wrapped
from pavane.config import without_password
from pavane.core.codec import error_summary
from pavane.engine.duties import without_duties
from pavane.engine.process import living
from pavane.errors import NoStore, PavaneError
from pavane.stores.port import COUNT_MAX, LAST_US, NodeRow, ParkedRow, RunFilter

PYTHON_MIN = (3, 11)
SQLITE_MIN = (3, 51, 3)
"""The first release without the WAL-reset corruption bug."""
WAL_MAX_BYTES = 64 * 2**20
DISK_MIN_BYTES = 512 * 2**20
QUICK_CHECK_MAX_BYTES = 128 * 2**20
OVERDUE_US = 60_000_000
PARKED_MAX = 1000


@click.command(
    epilog="""\b
Examples:
  pavane doctor --app shop.py
  pavane doctor --store /var/lib/shop/shop.db -o json
  pavane doctor --app shop.py --strict

\b
The exit code is 1 if a check fails; with --strict, also for a warning.
"""
)
@where_options
@click.option("--strict", is_flag=True, help="Exit with 1 for warnings, too.")
@output_option
def doctor(where: Where, strict: bool, output: Format) -> None:
    """Check Python, SQLite, the store, its nodes and its runs; say what to do."""
    findings = [_python(), _sqlite()]
    app: App | None = None
    try:
        app = where.app_or_none()
    except PavaneError as error:
        findings.append(Finding("app", "fail", str(error), "Repair it; the traceback is above."))
    except click.UsageError:
        remedy = "Give --app or --store to have more checked."
        findings.append(Finding("app", "warn", "no app and no store was named", remedy))
    if app is not None:
        findings += asyncio.run(_look(app, where))
    _print(findings, output)
    levels = {finding.level for finding in findings}
    if "fail" in levels or (strict and "warn" in levels):
        click.get_current_context().exit(FAILED)


def _print(findings: list[Finding], output: Format) -> None:
    if output != "table":
        print_json(findings, output)
        return
    width = max(len(finding.check) for finding in findings)
    room = max(terminal_width() - width - 8, 30)
    arrow = "→ " if is_unicode() else "-> "
    colours: dict[Level, str] = {"ok": "green", "warn": "yellow", "fail": "red"}
    for finding in findings:
        level = click.style(finding.level.ljust(4), fg=colours[finding.level], bold=True)
        first, *rest = wrapped(printable(finding.text), room) or [""]
        click.echo(f"{level}  {finding.check.ljust(width)}  {first}")
        for text in rest:
            click.echo(" " * (width + 8) + text)
        for at, text in enumerate(wrapped(finding.remedy, room - 2)):
            click.echo(" " * (width + 8) + (arrow if at == 0 else " " * len(arrow)) + text)


# -- this machine ------------------------------------------------------------------------------


def _python() -> Finding:
    version = sys.version.split()[0]
    if sys.version_info < PYTHON_MIN:
        needed = ".".join(map(str, PYTHON_MIN))
        return Finding("python", "fail", f"Python {version}", f"Use Python {needed} or newer.")
    return Finding("python", "ok", f"Python {version}")


def _sqlite() -> Finding:
    version = apsw.sqlite_lib_version()
    if tuple(int(part) for part in version.split(".")) < SQLITE_MIN:
        return Finding(
            "sqlite", "fail", f"SQLite {version} can damage a store under load (a WAL-reset bug)",
            "Upgrade it: pip install --upgrade apsw.",
        )  # fmt: skip
    return Finding("sqlite", "ok", f"SQLite {version}")


# -- the store ---------------------------------------------------------------------------------


async def _look(app: App, where: Where) -> list[Finding]:
    store = where.store
    findings: list[Finding] = []
    if app.registry.services:
        steps = sum(len(service.steps) for service in app.registry.services.values())
        findings.append(
            Finding(
                "app", "ok",
                f"{app.name}: {counted(len(app.registry.services), 'service')}, "
                f"{counted(len(app.registry.workflows), 'workflow')}, {counted(steps, 'step')}",
            )
        )  # fmt: skip
    try:
        async with connected(app, store) as client:
            return findings + await _look_inside(client, _worker(where))
    except NoStore as error:
        if store is None:
            return [*findings, Finding("store", "warn", str(error))]
        return [*findings, Finding("store", "fail", str(error), "Name the right one by --store.")]
    except PavaneError as error:
        return [*findings, Finding("store", "fail", str(error), "See the message.")]


def _worker(where: Where) -> str:
    """Return the command that starts a worker for the app and store that were named."""
    store = "" if where.store is None else f" --store {without_password(where.store)}"
    return f"pavane run {where.target or 'APP'}{store}"


async def _look_inside(client: Client, worker: str) -> list[Finding]:
    facts = await client.store.describe()
    held = ", ".join(
        _at_least(int(facts[word]), word[:-1]) for word in ("runs", "events", "messages")
    )
    findings = [
        Finding(
            "store", "ok", f"{facts['kind']} {facts['place']}, {size(int(facts['bytes']))}: {held}"
        )
    ]
    if facts["kind"] == "SQLite":
        path = Path(str(facts["place"]))
        findings += [_pragmas(path), _wal(int(facts["wal bytes"])), _disk(path)]
        if int(facts["bytes"]) <= QUICK_CHECK_MAX_BYTES:
            findings.append(_intact(path))
    is_refused = False
    if facts["kind"] == "Postgres":
        found = await look_at_postgres(client, facts)
        is_refused = any(finding.level == "fail" for finding in found)
        findings += found
    nodes = await client.store.nodes()
    live = living(nodes, client.store)
    findings.append(_nodes(live, len(nodes) - len(live), worker, is_refused))
    findings += await _partitions(client, live, worker)
    findings.append(await _stuck(client))
    findings += await _unbegun(client)
    findings.append(await _parked(client, bool(live)))
    findings += await look_at_events(client)
    return findings


def _at_least(count: int, noun: str) -> str:
    more = count == COUNT_MAX + 1  # a store counts no further
    return f"more than {counted(COUNT_MAX, noun)}" if more else counted(count, noun)


def _read(path: Path, sql: str) -> object:
    with apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY) as connection:
        cursor: Any = connection.execute(sql)  # pyright: ignore[reportUnknownMemberType]
        return cursor.get


def _pragmas(path: Path) -> Finding:
    mode = _read(path, "PRAGMA journal_mode")
    if mode != "wal":
        return Finding(
            "durability", "fail", f"journal_mode is {mode}, not wal",
            "Put the file on a local disk; network file systems cannot hold it.",
        )  # fmt: skip
    return Finding("durability", "ok", "journal_mode=wal, and every writer uses synchronous=FULL")


def _wal(bytes: int) -> Finding:
    if bytes > WAL_MAX_BYTES:
        return Finding(
            "wal", "warn", f"the write-ahead log has grown to {size(bytes)}",
            "Something reads the file for long, which holds back checkpoints: close open sqlite3 "
            "shells and backups; it shrinks when the last process has closed the store.",
        )  # fmt: skip
    return Finding("wal", "ok", f"the write-ahead log has {size(bytes)}")


def _disk(path: Path) -> Finding:
    free = shutil.disk_usage(path.parent).free
    if free < DISK_MIN_BYTES:
        return Finding("disk", "warn", f"{size(free)} free", "Free some space before it is full.")
    return Finding("disk", "ok", f"{size(free)} free")


def _intact(path: Path) -> Finding:
    said = _read(path, "PRAGMA quick_check(1)")
    if said != "ok":
        return Finding("integrity", "fail", str(said), "Restore the file from a backup.")
    return Finding("integrity", "ok", "quick_check found nothing wrong")


# -- nodes -------------------------------------------------------------------------------------


def _nodes(live: list[NodeRow], gone: int, worker: str, is_refused: bool) -> Finding:
    left = f"; {counted(gone, 'node')} ended without leaving" if gone else ""
    if not live:
        start = "When workers are let in again, start one" if is_refused else "Start a worker"
        return Finding("nodes", "warn", f"no node is at work{left}", f"{start}: {worker}.")
    listed = ", ".join(f"{node.name} ({', '.join(without_duties(node.services))})" for node in live)
    return Finding("nodes", "ok", f"{counted(len(live), 'live node')}: {listed}{left}")


async def _partitions(client: Client, live: list[NodeRow], worker: str) -> list[Finding]:
    hosted = {service for node in live for service in without_duties(node.services)}
    names = sorted(hosted | set(client.registry.services))
    if not names or not live:
        return []
    rows = await client.store.partition_rows(names)
    numbers = {node.no for node in live}
    unowned = {
        name: sum(row.service == name and row.owner not in numbers for row in rows)
        for name in names
    }
    idle = [name for name in names if name not in hosted]
    if idle:
        options = " ".join(f"--service {name}" for name in idle)
        return [
            Finding(
                "partitions", "warn", f"no live node hosts {', '.join(idle)}: their steps wait",
                f"Start a worker for them: {worker} {options}.",
            )
        ]  # fmt: skip
    free = [f"{name} ({count})" for name, count in unowned.items() if count]
    if free:
        return [
            Finding(
                "partitions", "warn", f"partitions without a live owner: {', '.join(free)}",
                "A live node takes them within seconds; look again, then at the log of the nodes.",
            )
        ]  # fmt: skip
    return [Finding("partitions", "ok", f"all {len(rows)} partitions are owned")]


# -- runs --------------------------------------------------------------------------------------


async def _stuck(client: Client) -> Finding:
    stuck = await read_list(client, RunFilter(status=("stuck",), limit=100))
    if not stuck:
        return Finding("stuck runs", "ok", "none")
    first = stuck[0]
    many = "100 or more" if len(stuck) == 100 else str(len(stuck))
    return Finding(
        "stuck runs", "warn",
        f"{many}, such as {first.id}: {(first.reason.splitlines() or [''])[0]}",
        "`pavane runs list --status stuck` lists them, `pavane runs show ID` tells why; repair the "
        "cause, then `pavane runs retry ID`.",
    )  # fmt: skip


async def _unbegun(client: Client) -> list[Finding]:
    unbegun = await read_unbegun(client, RunFilter())
    if not unbegun:
        return []
    homes = sorted({status.home for status in unbegun})
    options = " ".join(f"--service {home}" for home in homes)
    return [
        Finding(
            "unbegun runs", "warn",
            f"{counted(len(unbegun), 'run')} started and not begun, such as {unbegun[0].id}: no "
            f"node works for {', '.join(homes)}",
            f"Start a worker for them: pavane run shop.py {options}.",
        )
    ]  # fmt: skip


async def _parked(client: Client, at_work: bool) -> Finding:
    nodes = await client.store.nodes()
    services = {name for node in nodes for name in without_duties(node.services)}
    services |= set(client.registry.services)
    rows = await client.store.partition_rows(sorted(services))
    targets = [row.target for row in rows]
    found = await client.store.due_parked(targets, (0, ""), LAST_US, PARKED_MAX)
    failing = [row for row in found if row.error != b"null"]
    if not failing:
        return Finding("parked steps", "ok", "none waits for another attempt")
    worst = max(failing, key=lambda row: row.attempt)
    text = f"{_many(len(failing))}; most often tried: {_parked_text(worst)}"
    late_us = client.store.now_us() - min(row.due_us for row in failing)
    if late_us > OVERDUE_US:
        remedy = "Look at the log of the nodes that host it." if at_work else "Start a worker."
        text = f"overdue by {duration(late_us)}; {text}"
        return Finding("parked steps", "warn", text, remedy)
    return Finding("parked steps", "ok", text)


def _many(count: int) -> str:
    return f"{PARKED_MAX:,} or more" if count >= PARKED_MAX else counted(count, "step")


def _parked_text(row: ParkedRow) -> str:
    return f"run {row.run}, attempt {row.attempt} next: {error_summary(row.error)}"
