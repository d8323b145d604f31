"""Limits as people see them: how much is used, and who waits."""

from __future__ import annotations

import msgspec

from pavane.core.envelope import Permit, unpack
from pavane.engine.limits import LIMIT, line_key
from pavane.engine.process import living
from pavane.engine.registry import Registry
from pavane.policy import seconds
from pavane.stores.port import Store


class Turn(msgspec.Struct, frozen=True):
    """Who has a permit or waits for one; times are µs since the epoch, 0 for not yet.

    `work` is a run's id; "<run>#<operation>!<attempt>" for a step; "<handler>@<event>.<attempt>".
    `node` has the partition that it is in; "" if nobody has it, since that node is gone: who takes
    it over goes on by the same permit, and one that nobody needs is given back once others wait.
    """

    work: str
    priority: int
    asked_us: int
    given_us: int
    node: str


class LimitStatus(msgspec.Struct, frozen=True):
    """What can be told of one limit, for those that share one key.

    `concurrency`, `rate` and `per_s` are what this app declares, None where it does not. `given`
    have a permit now, `waiting` wait for one, first the one whose turn is next.
    """

    service: str
    limit: str
    key: str
    concurrency: int | None
    rate: int | None
    per_s: float | None
    given: list[Turn]
    waiting: list[Turn]


class Limits:
    """The limits of a store; see the module."""

    def __init__(self, store: Store, registry: Registry) -> None:
        self._store = store
        self._registry = registry

    async def list(self) -> list[LimitStatus]:
        """Return the limits that are in use, or waited for, with who uses them."""
        nodes = await self._store.nodes()
        services = {*self._registry.services}
        services.update(name for node in nodes for name in node.services)
        names = {node.no: node.name for node in living(nodes, self._store)}
        partitions = await self._store.partition_rows(sorted(services))
        at = {row.target: names.get(row.owner or 0, "") for row in partitions}
        found: list[LimitStatus] = []
        for service in sorted(services):
            turns: dict[tuple[str, str], list[Turn]] = {}
            for row in await self._store.awaits_like(service, LIMIT):
                permit = unpack(Permit, row.reply)
                node = at.get(permit.target, "")
                turn = Turn(permit.work, permit.priority, row.at_us, permit.given_us, node)
                turns.setdefault((permit.limit, permit.key), []).append(turn)
            found += [
                self._status(service, limit, key, of) for (limit, key), of in sorted(turns.items())
            ]
        return found

    def _status(self, service: str, name: str, key: str, turns: list[Turn]) -> LimitStatus:
        limit = self._registry.limits.get((service, name))
        given = [turn for turn in turns if turn.given_us]
        waiting = [turn for turn in turns if not turn.given_us]
        waiting.sort(key=lambda turn: line_key(turn.asked_us, turn.priority))
        return LimitStatus(
            service, name, key, limit and limit.concurrency, limit and limit.rate,
            seconds(limit.per) if limit is not None and limit.rate is not None else None,
            given, waiting,
        )  # fmt: skip
