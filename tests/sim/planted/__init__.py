"""Planted bugs: each re-creates a real class of mistake, to prove that the storms find it."""

from tests.sim.planted import events, limiting, runs, writing
from tests.sim.planted.plant import BUGS, Bug

__all__ = ["BUGS", "Bug", "events", "limiting", "runs", "writing"]
