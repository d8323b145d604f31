"""Shares are even, move little, and stay the same while they are carried out."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pavane.engine.shares import shares

NODES = range(1, 8)
owned = st.lists(st.none() | st.sampled_from(NODES), max_size=40)
hosting = st.sets(st.sampled_from(NODES), min_size=1)


@given(owned, hosting)
def test_shares_are_even_and_no_more_moves_than_must(
    owners: list[int | None], hosts: set[int]
) -> None:
    planned = shares(owners, sorted(hosts))
    counts = Counter(planned)
    assert set(planned) <= hosts
    assert max(counts[host] for host in hosts) - min(counts[host] for host in hosts) <= 1
    before = Counter(owner for owner in owners if owner in hosts)
    kept = Counter(old for old, new in zip(owners, planned, strict=True) if old == new)
    for host in hosts:
        assert kept[host] == min(before[host], counts[host]), "whoever has too little gives nothing"


@given(owned, hosting, st.data())
def test_what_was_planned_stays_so_while_some_of_it_is_done(
    owners: list[int | None], hosts: set[int], data: st.DataObject
) -> None:
    """Nodes look at different moments, and must not hand the same back and forth."""
    planned = shares(owners, sorted(hosts))
    halfway = [
        old if old == new else data.draw(st.sampled_from([old, new, None]))
        for old, new in zip(owners, planned, strict=True)
    ]  # fmt: skip
    assert shares(halfway, sorted(hosts)) == planned


def test_a_node_that_joins_is_given_its_share_and_nothing_else_moves() -> None:
    four = shares([None] * 32, [1, 2, 3, 4])
    five = shares(four, [1, 2, 3, 4, 5])
    assert sum(old != new for old, new in zip(four, five, strict=True)) == 6
    assert {new for old, new in zip(four, five, strict=True) if old != new} == {5}


def test_without_hosts_nobody_owns_anything() -> None:
    assert shares([1, None], []) == [None, None]
