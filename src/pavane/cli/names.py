"""What completes on the command line: targets, workflows, events and the ids of runs.

Completion is a courtesy: whatever goes wrong, it offers nothing and says nothing.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from pavane.app import App

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


@_quietly
def complete_workflow(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    names = sorted({name for name, _ in _app(ctx).registry.workflows})
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


@_quietly
def complete_service(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    names = sorted(_app(ctx).registry.services)
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


@_quietly
def complete_event(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    names = sorted(_app(ctx).registry.events)
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


@_quietly
def complete_run(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    import asyncio

    app = _app(ctx)

    async def look() -> list[CompletionItem]:
        from pavane.cli.connection import connected
        from pavane.stores.port import RunFilter

        which = RunFilter(id_prefix=incomplete, limit=IDS_MAX)
        async with connected(app, ctx.params.get("store")) as client:
            return [
                CompletionItem(s.id, help=f"{s.workflow}, {s.status}")
                for s in await client.list(which)
            ]

    given: Any = ctx.params.get("ids") or ()
    return [item for item in asyncio.run(look()) if item.value not in given]
