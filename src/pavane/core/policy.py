"""The holder policy: given what is pending, stay or pass. The one difference between the modes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pavane.core.operations import EXPIRY, Mode, Operation

JOURNAL_MAX_BYTES = 256 * 1024
HOPS_MAX = 200


@dataclass(frozen=True, slots=True)
class Stay:
    """Keep the baton and have what is pending done from here."""


@dataclass(frozen=True, slots=True)
class Pass:
    """Hand the baton to service `to`. `forced` says why it stays home from then on, if it does."""

    to: str
    forced: str = ""


Decision = Stay | Pass
STAY = Stay()


def decide(
    pending: Sequence[Operation],
    *,
    here: str,
    home: str,
    mode: Mode,
    forced: str,
    journal_bytes: int,
    hops: int,
    journal_max_bytes: int = JOURNAL_MAX_BYTES,
    hops_max: int = HOPS_MAX,
) -> Decision:
    """Decide where the run goes on; pure.

    A `receive` is served by the home service's mailbox, so the baton goes home for it. A single
    unsent step of another service takes the baton there in choreography. An operation whose
    command was sent is awaited, never passed. A journal or a number of hops above the caps brings
    the run home for good.
    """
    if len(pending) == 1 and pending[0].service == here and pending[0].kind == "step":
        return STAY
    if here != home and any(op.kind == "receive" and not op.sent for op in pending):
        return Pass(home)
    counted = pending if len(pending) == 1 else [op for op in pending if op.name != EXPIRY]
    step = counted[0] if len(counted) == 1 else None
    if step is None or step.sent or step.kind != "step":
        return STAY
    if (step.mode or mode) == "orchestration" or forced:
        return Pass(home) if here != home and step.service != here else STAY
    if step.service == here:
        return STAY
    reason = ""
    if journal_bytes > journal_max_bytes:
        reason = f"the journal grew to {journal_bytes:,} bytes (cap {journal_max_bytes:,})"
    elif hops >= hops_max:
        reason = f"the baton made {hops} hops (cap {hops_max})"
    if not reason:
        return Pass(step.service)
    return Pass(home, reason) if here != home else STAY
