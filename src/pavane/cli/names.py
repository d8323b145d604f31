"""What completes on the command line: targets, names, and the ids of what is in the store.

Completion is a courtesy: whatever goes wrong, it offers nothing and says nothing.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from pavane.app import App, Client
    from pavane.engine.registry import Registry

IDS_MAX = 100


def _quietly(
    complete: Callable[[click.Context, str], list[CompletionItem]],
) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    def completed(
        ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        with contextlib.suppress(Exception), contextlib.redirect_stderr(io.StringIO()):
            return complete(ctx, incomplete)
        return []

    return completed


def complete_target(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    return [CompletionItem(incomplete, type="file")]


def _app(ctx: click.Context) -> App:
    from pavane.cli.connection import Where

    target: str | None = ctx.params.get("target") or os.environ.get("PAVANE_APP")
    return Where(target, ctx.params.get("store")).app_or_none()


def _declared(
    names: Callable[[Registry], Iterable[str]],
) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """Complete names that the app's code declares."""

    @_quietly
    def complete(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        found = sorted(set(names(_app(ctx).registry)))
        return [CompletionItem(name) for name in found if name.startswith(incomplete)]

    return complete


complete_workflow = _declared(lambda registry: registry.workflow_names())
complete_service = _declared(lambda registry: registry.services)
complete_event = _declared(lambda registry: registry.events)
complete_contract = _declared(lambda registry: registry.contracts)


def _looked_up(
    ctx: click.Context,
    incomplete: str,
    look: Callable[[Client], Awaitable[list[CompletionItem]]],
    given: str = "",
) -> list[CompletionItem]:
    """Return what in the store begins like that, without what argument `given` holds already."""
    import asyncio

    app = _app(ctx)

    async def connect() -> list[CompletionItem]:
        from pavane.cli.connection import connected

        async with connected(app, ctx.params.get("store")) as client:
            return await look(client)

    taken: Any = ctx.params.get(given) or ()
    return [
        item
        for item in asyncio.run(connect())
        if item.value.startswith(incomplete) and item.value not in map(str, taken)
    ]


@_quietly
def complete_run(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    async def look(client: Client) -> list[CompletionItem]:
        from pavane.stores.port import RunFilter

        found = await client.runs(RunFilter(id_prefix=incomplete, limit=IDS_MAX))
        return [CompletionItem(s.id, help=f"{s.workflow}, {s.status}") for s in found]

    return _looked_up(ctx, incomplete, look, "ids")


@_quietly
def complete_step(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    """Complete the steps at which the run of the command can be forked."""

    async def look(client: Client) -> list[CompletionItem]:
        # Behind an option without its value click has parsed no argument yet.
        steps = await client.fork_steps(ctx.params["run"] or ctx.args[0])
        return [CompletionItem(name) for name in dict.fromkeys(steps)]

    return _looked_up(ctx, incomplete, look)


@_quietly
def complete_logged_event(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    async def look(client: Client) -> list[CompletionItem]:
        from pavane.stores.eventlog import EventFilter

        found = await client.events.list(EventFilter(limit=IDS_MAX * 10))
        return [CompletionItem(row.id, help=f"{row.type} {row.key}") for row in found]

    return _looked_up(ctx, incomplete, look)[:IDS_MAX]


@_quietly
def complete_handler(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    async def look(client: Client) -> list[CompletionItem]:
        names = [f"{row.service}.{row.name}" for row in await client.store.handler_rows()]
        names += [repr(h) for h in client.registry.handlers() if h.options.share is not None]
        return [CompletionItem(name) for name in names]

    return _looked_up(ctx, incomplete, look, "names")


@_quietly
def complete_schedule(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    async def look(client: Client) -> list[CompletionItem]:
        return [
            CompletionItem(one.name, help=f"{one.cron}, {one.state}")
            for one in await client.schedules.list()
        ]

    return _looked_up(ctx, incomplete, look, "names")


@_quietly
def complete_node(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    async def look(client: Client) -> list[CompletionItem]:
        return [
            CompletionItem(one.name, help=f"{one.state}, pid {one.pid}")
            for one in await client.nodes.list()
        ]

    return _looked_up(ctx, incomplete, look)


@_quietly
def complete_limit(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    async def look(client: Client) -> list[CompletionItem]:
        return [
            CompletionItem(one.limit, help=f"of {one.service}, {len(one.waiting)} waiting")
            for one in await client.limits.list()
        ]

    return _looked_up(ctx, incomplete, look)


@_quietly
def complete_dead(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    async def look(client: Client) -> list[CompletionItem]:
        return [
            CompletionItem(str(row.no), help=f"{row.type} {row.key}: {row.cause}")
            for row in await client.dead.list(limit=IDS_MAX)
        ]

    return _looked_up(ctx, incomplete, look, "numbers")


@_quietly
def complete_conversation(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    async def look(client: Client) -> list[CompletionItem]:
        return [
            CompletionItem(row.id, help=f"{row.contract} {row.key}, {row.state}")
            for row in await client.conversations.list(limit=IDS_MAX)
        ]

    return _looked_up(ctx, incomplete, look)
