"""What goes wrong when: drawn before anything runs, so that a seed says it all."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

LEASE_S = 1.5
BEGIN_S = 1.5
EVERY_S = (0.8, 2.5)
LONGEST_S: Mapping[str, float] = {
    "kill": 2.0, "freeze": 4 * LEASE_S, "cut": 0.0, "half-open": 0.0,
    "silence": 4 * LEASE_S, "outage": 60.0, "shutdown": 3.0, "immediate": 1.0, "crash": 1.0,
}  # fmt: skip
"""How long each lasts at most: a node is away, a wire loses bytes, a server is down."""


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong `at_s` seconds after the beginning, for `for_s`.

    `victim` numbers a node, or the customer behind the last of them. `lost` are the directions in
    which a wire loses what it is given; a silent one keeps it, and delivers it late.
    """

    at_s: float
    kind: str
    victim: int
    for_s: float
    lost: tuple[str, ...] = ()

    def __str__(self) -> str:
        lasting = f" for {self.for_s:.1f} s" if self.for_s else ""
        lost = f", losing {' and '.join(self.lost)}" if self.lost else ""
        return f"{self.at_s:6.1f} s  {self.kind} {self.victim}{lasting}{lost}"


@dataclass(frozen=True)
class Climate:
    """Which faults there are on some store, and how often each, relative to the others.

    `outage_s` is how long the store is away altogether, once, in the middle; 0 for never.
    """

    weights: Mapping[str, int]
    of_wires: frozenset[str] = field(default_factory=frozenset[str])
    outage_s: float = 0.0


def draw(climate: Climate, seed: int, seconds: float, nodes: int) -> list[Fault]:
    """Draw what goes wrong within `seconds`."""
    chance = random.Random(seed)
    kinds, weights = zip(*climate.weights.items(), strict=True)
    faults: list[Fault] = []
    at_s = BEGIN_S
    while at_s < seconds:
        (kind,) = chance.choices(kinds, weights)
        victim = chance.randrange(nodes + 1 if kind in climate.of_wires else nodes)
        for_s = chance.uniform(0.1, 1.0) * LONGEST_S[kind]
        lost = chance.choice((("asks",), ("answers",), ("asks", "answers")))
        is_lossy = kind in ("half-open", "silence")
        faults.append(Fault(at_s, kind, victim, for_s, lost if is_lossy else ()))
        at_s += chance.uniform(*EVERY_S)
    if climate.outage_s:
        at_s = seconds * chance.uniform(0.3, 0.6)
        lost = chance.choice(((), ("asks", "answers")))
        faults.append(Fault(at_s, "outage", nodes, climate.outage_s, lost))
    return sorted(faults, key=lambda fault: fault.at_s)
