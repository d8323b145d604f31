"""Shares: who is to own which partitions, a pure function that all nodes come to the same by."""

from __future__ import annotations

from collections.abc import Sequence


def shares(owners: Sequence[int | None], hosts: Sequence[int]) -> list[int | None]:
    """Return who is to own each of some partitions, of which `owners` tells who does.

    Each of `hosts` has an even share, and no more partitions change hands than are missing there.
    While some of them have changed hands already, what is said of the others stays the same.
    """
    order = sorted(hosts)
    if not order:
        return [None] * len(owners)
    least, more = divmod(len(owners), len(order))
    quotas = {host: least + (at < more) for at, host in enumerate(order)}
    kept = dict.fromkeys(order, 0)
    planned: list[int | None] = []
    for owner in owners:
        keeps = owner in quotas and kept[owner] < quotas[owner]
        if owner is not None and keeps:
            kept[owner] += 1
        planned.append(owner if keeps else None)
    missing = iter([host for host in order for _ in range(quotas[host] - kept[host])])
    return [next(missing) if owner is None else owner for owner in planned]
