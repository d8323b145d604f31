"""Reads all that is needed to draw a conversation."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pavane.app import Client
from pavane.cli.runs.record import read_timeline
from pavane.cli.text import clock
from pavane.errors import BadArguments, UnknownName, UnknownRun
from pavane.insight.causes import Tree, tree_of
from pavane.insight.timeline import Timeline
from pavane.observe.conversations import ConversationStatus
from pavane.observe.traffic import conversation_of
from pavane.observe.trouble import Trouble
from pavane.stores.eventlog import ConversationFilter, ConversationRow

SAME_KEY_MAX = 20


class Picture(msgspec.Struct, frozen=True):
    """A conversation as shown: how it stands under its contracts, and its tree of causes."""

    contracts: list[ConversationStatus]
    trouble: Trouble
    tree: Tree

    @property
    def is_over(self) -> bool:
        """Tell whether it has ended under every contract and nothing of it is under way."""
        return not self.tree.is_open and all(c.ended_us is not None for c in self.contracts)

    @property
    def is_stuck(self) -> bool:
        """Tell whether nothing goes on until somebody repairs something."""
        if any(contract.state == "stuck" for contract in self.contracts):
            return True
        return bool(self.trouble.dead or self.trouble.blocked) and not self.tree.is_open

    @property
    def is_good(self) -> bool:
        good = all(contract.state in ("open", "on-time") for contract in self.contracts)
        return good and not self.trouble.dead and not self.trouble.blocked


async def find_conversation(client: Client, name: str) -> str:
    """Return the id of the conversation of which `name` is the key, or in which it is an id.

    An id goes before a key. Raises UnknownName if it is neither, BadArguments if it is the key of
    several.
    """
    try:
        return await conversation_of(client.store, name)
    except UnknownName:
        rows = await client.store.conversations(ConversationFilter(key=name, limit=SAME_KEY_MAX))
        ids = dict.fromkeys(row.id for row in rows)
        if not ids:
            raise
        if len(ids) > 1:
            raise BadArguments(_which_one(name, rows)) from None
        return rows[0].id


def _which_one(key: str, rows: Sequence[ConversationRow]) -> str:
    lines = [f"  {r.id}  under {r.contract}, started {clock(r.started_us)}" for r in rows]
    more = f"\n(the newest {SAME_KEY_MAX})" if len(rows) == SAME_KEY_MAX else ""
    listed = "\n".join(lines)
    return f"Several conversations have the key {key!r}; give the id of one.\n{listed}{more}"


async def read_picture(client: Client, id: str) -> Picture:
    """Return the conversation that `id` belongs to as it is now; raise UnknownName."""
    found = await client.conversations.show(id)
    runs: list[Timeline] = []
    for run in dict.fromkeys(row.id for row in found.traffic.runs):
        try:
            runs.append(await read_timeline(client, run))
        except UnknownRun:
            pass  # it was deleted meanwhile, or has begun elsewhere only
    tree = tree_of(found.traffic, runs, now_us=client.store.now_us())
    return Picture(found.contracts, found.trouble, tree)
