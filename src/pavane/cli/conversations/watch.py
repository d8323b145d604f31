"""`pavane conversations watch`: a conversation's tree, live."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Iterator

import click

from pavane.app import Client
from pavane.cli.connection import Where, connected, where_options
from pavane.cli.conversations.picture import Picture, find_conversation, read_picture
from pavane.cli.exits import FAILED
from pavane.cli.live import FRAME_S, Canvas, print_moment
from pavane.cli.names import complete_conversation
from pavane.cli.output import Format, is_unicode, output_option, say
from pavane.cli.runs.record import until_changed
from pavane.cli.tree import STATE_COLOURS, draw_conversation
from pavane.engine.words import handler_in_words
from pavane.insight.causes import Node, walk
from pavane.insight.timeline import Moment

CALM_S = 0.5
"""Without a contract a conversation is over once nothing of it is open for so long."""
_COLOURS = STATE_COLOURS | {
    "failed": "red", "dead": "red", "stuck": "red", "parked": "yellow", "waiting": "blue"
}  # fmt: skip


@click.command(
    epilog="""\b
Examples:
  pavane conversations watch 06611576df11721f14a7ce74 --app shop.py
  pavane conversations watch o-1 --store shop.db | tee o-1.log

\b
It ends when the conversation has ended under its contracts and nothing of it is under way, or when
it is stuck. The exit code is 0 if all went well and in time, else 1. Without a terminal each thing
that happens is one line. Ctrl-C stops watching, nothing else.
"""
)
@click.argument("id", shell_complete=complete_conversation)
@where_options
@output_option
def watch(where: Where, id: str, output: Format) -> None:
    """Follow a conversation until it is over or stuck; json and jsonl print a line each."""
    app = where.app_or_none()

    async def follow() -> Picture:
        async with connected(app, where.store) as client:
            found = await find_conversation(client, id)
            if output == "table" and sys.stdout.isatty():
                return await _follow_drawn(client, found)
            return await _follow_lines(client, found, output)

    picture = asyncio.run(follow())
    for contract in picture.contracts:
        if contract.state not in ("open", "on-time"):
            say(f"{contract.contract}: {contract.state}")
    if picture.is_stuck:
        say(f"stuck: {picture.trouble.sentence}")
    if not picture.is_good:
        click.get_current_context().exit(FAILED)


async def _is_final(client: Client, picture: Picture) -> bool:
    """Tell whether nothing follows; what was just published has yet to be seen by handlers."""
    if picture.is_stuck:
        return True
    last_us = max(node.from_us for root in picture.tree.roots for node in walk(root))
    return picture.is_over and client.store.now_us() - last_us > CALM_S * 1e6


async def _follow_drawn(client: Client, id: str) -> Picture:
    """Draw the tree again and again over itself."""
    with Canvas() as canvas:
        while True:
            picture = await read_picture(client, id)
            is_final = await _is_final(client, picture)
            width, height = shutil.get_terminal_size()
            lines = draw_conversation(
                picture.tree, picture.contracts, picture.trouble, width=width - 1,
                unicode=is_unicode(), height=None if is_final else height - 2,
            )  # fmt: skip
            canvas.draw(lines)
            if is_final:
                return picture
            await asyncio.sleep(FRAME_S)


async def _follow_lines(client: Client, id: str, output: Format) -> Picture:
    """Print what happened since the last look, one line each."""
    told: set[str] = set()
    while True:
        picture = await read_picture(client, id)
        tree = picture.tree
        for moment in sorted(_moments(picture), key=lambda one: one.at_us):
            if moment.key not in told:
                told.add(moment.key)
                print_moment(moment, output, of=tree.id, from_us=tree.from_us, colours=_COLOURS)
        sys.stdout.flush()
        if await _is_final(client, picture):
            return picture
        # What is overdue or calm by now shows without anybody writing.
        try:
            async with asyncio.timeout(CALM_S):
                await until_changed(client)
        except TimeoutError:
            pass


def _moments(picture: Picture) -> Iterator[Moment]:
    for root in picture.tree.roots:
        for node in walk(root):
            if node.kind not in ("mark", "receive", "kept", "child", "spawn"):
                yield _moment(node)
    for contract in picture.contracts:
        if contract.state != "open":
            at_us = contract.ended_us or contract.due_us
            key = f"{contract.contract} {contract.state}"
            yield Moment(at_us, key, contract.state, f"under {contract.contract}")


def _moment(node: Node) -> Moment:
    what = {"event": "event", "hop": "passed"}.get(node.kind, node.condition)
    text = node.label
    if node.kind == "event":
        text = f"{text} {node.key}".rstrip()
    elif node.kind == "hop":
        text = f"the baton to {node.service}"
    elif node.kind == "handler":
        text = handler_in_words(text)
    else:
        text = f"{node.kind} {text} {node.id}".rstrip()
    if node.attempts > 1:
        text += f" ({node.attempts} attempts)"
    if node.text:
        text += f": {node.text}"
    at_us = node.from_us if node.until_us is None else node.until_us
    key = f"{node.kind} {node.label} {node.id} {node.from_us} {node.condition} {node.attempts}"
    return Moment(at_us, key, what, text)
