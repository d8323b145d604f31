"""What `pavane doctor` checks of events and handlers: names that do not meet, and what lies about.

Checks of the code come first, then those of the log, of dead letters and of handlers.
"""

from __future__ import annotations

import types
from collections.abc import AsyncIterator, Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from pavane.app import Client
from pavane.cli.finding import Finding
from pavane.cli.text import counted
from pavane.contract import is_internal
from pavane.engine.mailbox import MAILBOX
from pavane.engine.publishing import read_event
from pavane.engine.registry import Registry
from pavane.engine.words import handler_in_words, handler_with_words
from pavane.errors import BadEvent
from pavane.steering.handlers import HandlerStatus
from pavane.stores.eventlog import EventFilter, EventRow

BEHIND_MAX = 10_000
"""Events in a backlog above which a handler is far behind."""
SAMPLE = 20
"""Events of each type and version that are read; the newest ones."""
SCAN_MAX = 2_000
NAMED_MAX = 3


async def look_at_events(client: Client) -> list[Finding]:
    """Return what is found about the events, handlers and dead letters of a store."""
    types = await client.store.event_types()
    published = {type for type, _, _ in types if not is_internal(type)}
    if not (published or any(client.registry.handlers())):
        return []
    handlers = await client.handlers.list()
    findings = _unheard(client.registry, published)
    findings += await _misfits(client, published)
    findings.append(await _dead(client))
    findings += _handlers(handlers)
    return findings


# -- the code ----------------------------------------------------------------------------------


def _unheard(registry: Registry, published: set[str]) -> list[Finding]:
    """Find handlers and workflows that wait for an event which nobody declares to publish."""
    declared, names = _publishers(registry)
    found: list[Finding] = []
    for type, takers in _takers(registry).items():
        kind = registry.events[type]
        if type in declared or type in published or kind.__name__ in names:
            continue
        close = get_close_matches(type, declared | published, 1)
        meant = f" Perhaps {close[0]} is meant." if close else ""
        found.append(
            Finding(
                "names", "warn",
                f"nobody declares to publish {type}, for which {', '.join(takers)} wait"
                f"{'s'[len(takers) > 1:]}, and none was ever published",
                f"All is well if it comes from outside (app.publish, `pavane events publish`)."
                f"{meant} Else let a handler return it, or list it in its emits=[…].",
            )
        )  # fmt: skip
    if registry.services and not found:
        found.append(
            Finding("names", "ok", "every event that is waited for is published somewhere")
        )
    return found


def _takers(registry: Registry) -> dict[str, list[str]]:
    """Return who reacts to each event type: handlers, and workflows that wait for it."""
    takers: dict[str, list[str]] = {}
    for handler in registry.handlers():
        if handler.name != MAILBOX:
            for type in handler.events:
                takers.setdefault(type, []).append(handler_in_words(repr(handler)))
    for workflow in registry.workflows.values():
        for event in workflow.receives:
            kind: Any = event
            if kind.event_key is not None:
                takers.setdefault(kind.event_type, []).append(repr(workflow))
    return takers


def _publishers(registry: Registry) -> tuple[set[str], set[str]]:
    """Return the event types that handlers declare, and all names that other code mentions."""
    declared: set[str] = set()
    names: set[str] = set()
    for handler in registry.handlers():
        declared |= {event.event_type for event in handler.emits or ()}
        if handler.emits is None:
            names |= set(_names_in(handler.fn))
    for workflow in registry.workflows.values():
        names |= set(_names_in(workflow.fn))
    return declared, names


def _names_in(fn: Any) -> Iterator[str]:
    """Yield every global name and attribute that a function's code mentions."""
    pending: list[types.CodeType] = [fn.__code__] if hasattr(fn, "__code__") else []
    while pending:
        code = pending.pop()
        yield from code.co_names
        pending += [part for part in code.co_consts if isinstance(part, types.CodeType)]


# -- the log -----------------------------------------------------------------------------------


async def _misfits(client: Client, published: set[str]) -> list[Finding]:
    """Find events in the log that the code, as it is now, cannot read."""
    found: list[Finding] = []
    read = 0
    for type in sorted(published & set(client.registry.events)):
        kind = client.registry.events[type]
        async for version, rows in _samples(client, type):
            read += len(rows)
            wrong = [(row, error) for row in rows if (error := _misfit(kind, row))]
            if wrong:
                found.append(_misfit_finding(kind, version, len(rows), wrong))
    if read and not found:
        return [Finding("schemas", "ok", f"{counted(read, 'event')} of the log read, all fit")]
    return found


async def _samples(client: Client, type: str) -> AsyncIterator[tuple[int, list[EventRow]]]:
    """Yield the newest events of a type, version by version."""
    by_version: dict[int, list[EventRow]] = {}
    before: int | None = None
    for _ in range(0, SCAN_MAX, 200):
        rows = await client.events.list(EventFilter(types=(type,), before=before, limit=200))
        for row in rows:
            sample = by_version.setdefault(row.version, [])
            if len(sample) < SAMPLE:
                sample.append(row)
        if len(rows) < 200:
            break
        before = rows[-1].pos
    for version, sample in sorted(by_version.items()):
        yield version, sample


def _misfit(kind: Any, row: EventRow) -> str:
    try:
        read_event(kind, row)
    except BadEvent as error:
        return str(error)
    return ""


def _misfit_finding(
    kind: Any, version: int, read: int, wrong: list[tuple[EventRow, str]]
) -> Finding:
    type = kind.event_type
    row, error = wrong[0]
    if version < kind.event_version:
        remedy = f"Repair or declare @{kind.__name__}.upcast({version})"
    elif version > kind.event_version:
        remedy = "Deploy the newer code here, too"
    else:
        remedy = (
            f"Give what is new a default, or raise version= to {version + 1} and declare "
            f"@{kind.__name__}.upcast({version})"
        )
    return Finding(
        "schemas", "fail",
        f"{len(wrong)} of the newest {read} events {type} of version {version} do not fit the "
        f"class. {error}",
        f"{remedy}; handlers would give such events up. `pavane events show {row.id}` shows it.",
    )  # fmt: skip


# -- dead letters and handlers -----------------------------------------------------------------


async def _dead(client: Client) -> Finding:
    groups = await client.dead.groups()
    if not groups:
        return Finding("dead letters", "ok", "none")
    total = sum(group.count for group in groups)
    worst = groups[0]
    return Finding(
        "dead letters", "warn",
        f"{total:,}; most often ({worst.count:,}) {handler_with_words(worst.handler)}: "
        f"{worst.cause}",
        "`pavane dead list` groups them by cause; repair the cause, then `pavane dead retry`, "
        "`edit` or `drop`.",
    )  # fmt: skip


def _handlers(handlers: Sequence[HandlerStatus]) -> list[Finding]:
    by_state: dict[str, list[HandlerStatus]] = {}
    for handler in handlers:
        if handler.share is None:
            by_state.setdefault(handler.state, []).append(handler)
    found: list[Finding] = []
    if paused := by_state.get("paused"):
        reasons = ", ".join(f"{_name(h)} ({h.reason})" for h in paused)
        names = " ".join(f"{h.service}.{h.name}" for h in paused)
        found.append(
            Finding("handlers", "warn", f"paused: {reasons}", f"`pavane handlers resume {names}`.")
        )
    if broken := by_state.get("breaker"):
        remedy = "It tries again by itself; repair the cause, or `pavane handlers resume`."
        reasons = "; ".join(f"{_name(h)}, {h.reason}" for h in broken)
        found.append(Finding("handlers", "warn", reasons, remedy))
    if gone := by_state.get("undeclared"):
        found.append(_gone(gone))
    behind = [h for h in handlers if h.backlog > BEHIND_MAX and h.state != "undeclared"]
    if behind:
        listed = ", ".join(f"{_name(h)} ({h.backlog:,} events)" for h in behind)
        found.append(
            Finding(
                "handlers", "warn", f"far behind: {listed}",
                "Start more workers for their services, or raise concurrency= and rate=.",
            )
        )  # fmt: skip
    if not found and by_state:
        found.append(Finding("handlers", "ok", "none is paused or far behind"))
    return found


def _gone(gone: list[HandlerStatus]) -> Finding:
    listed = ", ".join(_name(h) for h in gone[:NAMED_MAX])
    return Finding(
        "handlers", "warn",
        f"{counted(len(gone), 'handler')} in the store and not in the code: {listed}. "
        f"Events since are kept for them and cannot be pruned",
        "Declare them again if that is a mistake (renamed? name=\"…\" keeps the old name, and its "
        "progress). Otherwise `pavane handlers forget NAME`.",
    )  # fmt: skip


def _name(handler: HandlerStatus) -> str:
    return handler_with_words(f"{handler.service}.{handler.name}")
