"""Storms: what a seed lets go wrong, when, and for how long.

Each seed draws first which kinds of faults there are at all (swarm testing: few at a time find
what all at once hide), then their times. A storm is a list of values, so it can be shown, and a
smaller one tried. When it is over, everything heals.
"""

from __future__ import annotations

from random import Random
from typing import Literal

import msgspec

Kind = Literal[
    "kill", "stop", "freeze", "stick", "cut", "unreachable", "down", "full", "stall", "slow",
    "ambiguous", "outside",
]  # fmt: skip
KINDS: tuple[Kind, ...] = (
    "kill", "stop", "freeze", "stick", "cut", "unreachable", "down", "full", "stall", "slow",
    "ambiguous", "outside",
)  # fmt: skip
KINDS_PROBABILITY = 0.3
EACH_MAX = 3
DURATION_US = {"down": 400_000, "full": 400_000, "stall": 900_000}
DURATION_MAX_US = 1_500_000
"""A few times the lease: who is silent for so long has lost it."""
SKEW_MAX_US = 30_000
CUSTOMER = -1
_SENTENCES: dict[Kind, str] = {
    "kill": "{who} is killed, and started again after {time}",
    "stop": "{who} is asked to stop, and started again after {time}",
    "freeze": "{who} is frozen for {time}",
    "stick": "the event loop of {who} is stuck for {time}",
    "cut": "{who} loses its connection to the database",
    "unreachable": "{who} cannot reach the database for {time}",
    "down": "the database refuses connections for {time}",
    "full": "the disk of the database is full for {time}",
    "stall": "the database does not answer for {time}",
    "slow": "the database is slow for {time}",
    "ambiguous": "some writes are answered with an error, done or not, for {time}",
    "outside": "half of the calls to the world outside fail, done or not, for {time}",
}
LENGTH_US = (500_000, 2_500_000)
BRIEF_MIN_US = 20_000


class Fault(msgspec.Struct, frozen=True):
    """Something that goes wrong at a time, for a while, perhaps at one node.

    `callbacks` more run there before a kill, so that it may hit between any two of them.
    """

    at_us: int
    kind: Kind
    node: int
    for_us: int
    callbacks: int = 0

    def __str__(self) -> str:
        who = "the customer" if self.node == CUSTOMER else f"node{self.node}"
        return _SENTENCES[self.kind].format(who=who, time=f"{self.for_us / 1e6:.3f} s")


class Storm(msgspec.Struct, frozen=True):
    """All that goes wrong, and how the services are spread: by node, the numbers it works for.

    What a process takes for the store's time is off by up to `skew_us`.
    """

    faults: tuple[Fault, ...]
    ends_us: int
    layout: tuple[tuple[int, ...], ...]
    same_host: bool
    skew_us: int = 0


def calm(services: int) -> Storm:
    """Return a storm in which nothing goes wrong, on one node that works for so many services."""
    return Storm((), 0, (tuple(range(services)),), same_host=True)


def draw_storm(seed: int, services: int, length_us: tuple[int, int] | None = None) -> Storm:
    """Draw the storm of a seed for so many services.

    With `length_us` it is over after a time within these, and in every other one all mishaps are
    brief compared with that, so that they can hit what follows after others.
    """
    random = Random(f"storm {seed}")
    nodes = random.choice((1, 2, 3, 3))
    layout = _draw_layout(random, nodes, services)
    ends_us = random.randrange(*(length_us or LENGTH_US))
    is_brief = length_us is not None and random.random() < 0.5
    faults: list[Fault] = []
    for kind in KINDS:
        if random.random() >= KINDS_PROBABILITY:
            continue
        for _ in range(random.randint(1, EACH_MAX)):
            node = random.randrange(CUSTOMER if kind in ("cut", "unreachable") else 0, nodes)
            longest_us = DURATION_US.get(kind, DURATION_MAX_US)
            if is_brief:
                longest_us = max(ends_us // 4, BRIEF_MIN_US)
            faults.append(
                Fault(
                    random.randrange(ends_us), kind, node, random.randrange(10_000, longest_us),
                    random.randrange(30),
                )
            )  # fmt: skip
    same_host = random.random() < 0.5
    skew_us = random.randrange(SKEW_MAX_US) if random.random() < KINDS_PROBABILITY else 0
    return Storm(tuple(sorted(faults, key=_time_of)), ends_us, layout, same_host, skew_us)


def _time_of(fault: Fault) -> int:
    return fault.at_us


def _draw_layout(random: Random, nodes: int, services: int) -> tuple[tuple[int, ...], ...]:
    """Let every node work for all, or each service have some nodes of its own."""
    everything = tuple(range(services))
    if nodes == 1 or random.random() < 0.5:
        return (everything,) * nodes
    hosted: list[set[int]] = [set() for _ in range(nodes)]
    for service in everything:
        for node in random.sample(range(nodes), random.randint(1, nodes)):
            hosted[node].add(service)
    return tuple(tuple(sorted(some)) or everything for some in hosted)
