"""Reads runs for the commands that show them, wherever in a store they are."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable

import msgspec

from pavane.app import Client, RunStatus, status_of
from pavane.core.baton import ENDED
from pavane.core.envelope import Await, Start, unpack
from pavane.engine.held import blank_row, encode_plain
from pavane.insight.timeline import Timeline, timeline
from pavane.stores.port import ParkedRow, RunFilter, RunRow

PAGE = 200
LOOKED_AT_MAX = 1000
"""So many messages are looked through for runs that nobody has begun."""
CHECK_S = 0.02
LOOK_S = 0.2
"""How often to look although nobody wrote: a store need not tell of runs that merely go on."""
_SERVICE = re.compile(r"^(?:step|undo|child) ([^.]+)\.")


async def read_timeline(client: Client, id: str) -> Timeline:
    """Return the timeline of a run as it is now."""
    home = await client.home_row(id)
    rows = await client.store.run_rows(id)
    here = max((r for r in rows if r.status != "passed"), key=lambda r: r.hop, default=home)
    history = await client.history(id)
    # A client without the app's code knows no services, so it looks where the journal says.
    services = {history.status.home, *(stop.service for stop in history.trail)}
    for entry in history.entries:
        services |= {found[1] for mark in entry.issued if (found := _SERVICE.match(mark))}
    parked: list[ParkedRow] = []
    if history.status.status not in ENDED:
        for service in sorted(services):
            parked += await client.store.parked_of(service, id)
    status = await true_status(client, home) if is_away(home) else history.status
    history = msgspec.structs.replace(history, status=status, parked=parked)
    return timeline(
        history, now_us=client.store.now_us(), result=home.result, wake_us=here.wake_us,
        taken=await _taken(client, id),
    )  # fmt: skip


async def _taken(client: Client, run: str) -> dict[int, str]:
    """Return the ids of the published events that a run received, by the operations that did."""
    given = [(unpack(Await, r.reply), r.pos) for r in await client.store.awaits_of(run) if r.pos]
    given.sort(key=lambda one: one[0].era)  # what was asked for after a retry counts
    events = await client.store.events_at([pos for _, pos in given])
    return {wanted.op: events[pos].id for wanted, pos in given if pos in events}


def is_away(home: RunRow) -> bool:
    """Tell whether a run is elsewhere, so that its home knows only what it was told last."""
    return home.status not in ENDED and home.holder != home.service


async def true_status(client: Client, home: RunRow) -> RunStatus:
    """Return the status of a run from where it is, of which its home may know less."""
    if not is_away(home):
        return status_of(home)
    away = [r for r in await client.store.run_rows(home.id) if r.service != home.service]
    here = max((r for r in away if r.status != "passed"), key=lambda r: r.hop, default=None)
    return status_of(home, here if here is not None and here.hop >= home.hop else None)


async def read_list(client: Client, which: RunFilter) -> list[RunStatus]:
    """List runs; `which.status` is compared with what a run really does, home or away."""
    wanted = which.status
    stored = (*wanted, "passed") if {"running", "waiting", "stuck"} & set(wanted) else wanted
    found: list[RunStatus] = []
    before = which.before
    while len(found) < which.limit:
        page = msgspec.structs.replace(which, status=stored, before=before, limit=PAGE)
        rows = await client.store.list_runs(page)
        for row in rows:
            status = await true_status(client, row)
            if not wanted or status.status in wanted:
                found.append(status)
        if len(rows) < PAGE:
            break
        before = rows[-1].no
    return found[: which.limit]


async def read_unbegun(client: Client, which: RunFilter) -> list[RunStatus]:
    """List runs that were started at services which no live node hosts, newest first.

    They are messages still. As many are looked at as LOOKED_AT_MAX, of the services of this app and
    of those that got one of the newest messages.
    """
    if which.attributes or (which.status and "waiting" not in which.status):
        return []
    store = client.store
    head = await store.log_head()
    newest = await store.read_log(head - LOOKED_AT_MAX, head, None, LOOKED_AT_MAX, None)
    services = {message.to for message in newest} | set(client.registry.services)
    idle = await idle_services(client, services - {""})
    consumed = {row.target: row.position for row in await store.partition_rows(idle)}
    if not consumed:
        return []
    at = min(consumed.values())
    found: dict[str, RunStatus] = {}
    for message in await store.read_log(at, head, list(consumed), LOOKED_AT_MAX, None):
        if message.kind != "start" or message.pos <= consumed[message.target]:
            continue
        header = unpack(Start, message.body).header
        fits = header.run.startswith(which.id_prefix) and (
            which.workflow in (None, header.workflow)
        )
        if fits and await store.run_row(message.to, message.run) is None:
            row = blank_row(0, header.home, message.target, header)
            row.header, row.status = encode_plain(header), "waiting"
            row.reason = f"not begun: no node works for {header.home}"
            found[header.run] = status_of(row)
    return list(found.values())[::-1]


async def idle_services(client: Client, services: Iterable[str]) -> list[str]:
    """Return those of `services` that no live node hosts."""
    return sorted(set(services) - await client.handlers.hosted())


def needed_services(line: Timeline) -> set[str]:
    """Return the services that a run needs to go on: its holder, and those of its open steps."""
    if line.ended or line.status.status == "stuck":
        return set()
    open_steps = (
        s for s in line.spans if s.ended_us is None and s.kind in ("step", "undo", "child")
    )
    return {line.status.holder, *(span.service for span in open_steps)}


async def until_changed(client: Client) -> None:
    """Wait until someone wrote to the store, perhaps."""
    loop = asyncio.get_running_loop()
    ends = loop.time() + LOOK_S
    while not client.store.changed() and loop.time() < ends:
        await asyncio.sleep(CHECK_S)
