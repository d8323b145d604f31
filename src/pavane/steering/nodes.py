"""Nodes as people see them: the processes that work, what they own, and letting one drain."""

from __future__ import annotations

import asyncio
from typing import Literal

import msgspec

from pavane.engine.process import is_gone, this_host
from pavane.engine.session import DRAIN, tell_nodes
from pavane.errors import BadArguments, UnknownName
from pavane.stores.port import NodeRow, Store

LOOK_S = 0.1


class NodeStatus(msgspec.Struct, frozen=True):
    """What can be told of a node at a glance; times are µs since the epoch.

    `partitions` tells how many of each service's it owns. `state` is "gone" when its lease ran out,
    or its process is known to have ended, and no other node has taken its partitions over so far.
    """

    no: int
    name: str
    pid: int
    state: Literal["working", "draining", "gone"]
    partitions: dict[str, int]
    joined_us: int
    lease_until_us: int


class Nodes:
    """The nodes of a store; see the module."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def list(self) -> list[NodeStatus]:
        """Return all nodes, in the order in which they joined."""
        rows = await self._store.nodes()
        services = sorted({service for row in rows for service in row.services})
        partitions = await self._store.partition_rows(services)
        owned = {row.no: dict.fromkeys(row.services, 0) for row in rows}
        for partition in partitions:
            mine = owned.get(partition.owner or 0)
            if mine is not None:
                mine[partition.service] = mine.get(partition.service, 0) + 1
        now_us, host = self._store.now_us(), this_host()
        return [_status(row, owned[row.no], now_us, host) for row in rows]

    async def drain(self, node: str, *, force: bool = False) -> NodeStatus:
        """Ask a node, by name or number, to end its steps, hand everything over, and end.

        The request is durable and takes effect within a second, wherever the node is; asking again
        changes nothing. Raises UnknownName if there is no such node, BadArguments if it is gone or
        if nobody else works for one of its services, whose runs would wait: `force` accepts that.
        """
        nodes = await self.list()
        chosen = _find(nodes, node)
        if chosen.state == "gone":
            raise BadArguments(
                f"Node {chosen.name} is gone: its process ended, or was silent for longer than its "
                f"lease. Others take its partitions over by themselves."
            )
        others = {
            service
            for other in nodes
            if other.state == "working" and other.no != chosen.no
            for service in other.partitions
        }
        alone = sorted(set(chosen.partitions) - others)
        if alone and not force:
            raise BadArguments(
                f"Nobody but {chosen.name} works for {', '.join(alone)}: what runs there would "
                f"wait for a worker. Start another one first, or force it."
            )
        if not await self._store.ask_node(chosen.no, DRAIN):
            raise UnknownName(f"Node {chosen.name} has just left.")
        await tell_nodes(self._store)
        return chosen

    async def until_left(self, no: int) -> None:
        """Return when a node is no more: it handed everything over, or it is gone.

        What one that is gone had not handed over is taken over by those who work for the same
        services, if there are any.
        """
        while any(one.no == no and one.state != "gone" for one in await self.list()):
            await asyncio.sleep(LOOK_S)


def _status(row: NodeRow, owned: dict[str, int], now_us: int, host: str) -> NodeStatus:
    gone = is_gone(row, now_us, host)
    state = "gone" if gone else "draining" if row.asked == DRAIN else "working"
    return NodeStatus(row.no, row.name, row.pid, state, owned, row.joined_us, row.expires_us)


def _find(nodes: list[NodeStatus], name: str) -> NodeStatus:
    found = [node for node in nodes if name in (node.name, str(node.no))]
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(str(node.no) for node in found)
        raise BadArguments(f"Several nodes are called {name!r}. Give a number: {listed}.")
    known = ", ".join(node.name for node in nodes)
    raise UnknownName(f"No node is called {name!r}. Known: {known or 'none'}.")
