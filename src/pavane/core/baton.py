"""The baton: everything another service needs to go on with a run."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Raw

from pavane.core.codec import FORMAT
from pavane.core.operations import Mode
from pavane.errors import CorruptJournal

Status = Literal[
    "running", "waiting", "passed", "stuck", "completed", "failed", "cancelled", "killed",
    "continued",
]  # fmt: skip
ENDED: frozenset[Status] = frozenset({"completed", "failed", "cancelled", "killed", "continued"})


class Parent(msgspec.Struct, frozen=True, array_like=True):
    """Who waits for a child run: the parent's operation and the service that holds the parent."""

    run: str
    op: int
    holder: str
    era: int = 0


class Header(msgspec.Struct, omit_defaults=True):
    """What is known of a run from its start; it travels with the baton."""

    run: str
    workflow: str
    version: int
    home: str
    mode: Mode
    started_us: int
    conversation: str
    timeout_us: int = 0
    parent: Parent | None = None
    seed: str = ""
    era: int = 0
    forced: str = ""
    """Why the run stays orchestrated whatever its mode says; empty if it does not."""
    cause: str = ""
    """What started it: an event, or the run that it is a child or the continuation of."""
    scheduled_us: int = 0
    """The nominal time for which a schedule started it; 0 if none did."""
    priority: int = 0
    """Whose turn it is where there is a limit: the higher one's."""
    limit: str = ""
    """The limit that its code waits for before it begins; empty if there was none then."""
    limit_key: str = ""
    resumed_us: int = 0
    """When it was last taken back, from when its timeout counts; 0 if it never was."""


def chain_of(run: str) -> tuple[str, int]:
    """Return the run that `run`, by `continue_as_new`, goes back to, and its number from there."""
    base, mark, number = run.rpartition("~")
    return (base, int(number)) if mark and number.isdigit() else (run, 1)


def chained(base: str, number: int) -> str:
    """Return the id of the run of this number in the chain that begins with `base`."""
    return f"{base}~{number}" if number > 1 else base


class Outcome(msgspec.Struct, frozen=True, array_like=True):
    """How a run ended: `value` is the encoded result, error, or arguments of the next run."""

    status: Status
    value: Raw = Raw(b"null")


class Stop(msgspec.Struct, frozen=True, array_like=True):
    """One station of a run: `service` held the baton from `at_us` on, by its hop number `hop`."""

    service: str
    at_us: int
    hop: int


class Baton(msgspec.Struct, array_like=True):
    """One hop of a run: its header, its journal so far, and where it has been.

    `entries` is one chunk (see `journal`). With an `outcome` the run has ended and goes home.
    `sent` are the pending operations that someone was asked to do already.
    """

    format: int
    header: Header
    hop: int
    count: int
    entries: Raw
    trail: list[Stop]
    attributes: dict[str, str | int | float | bool]
    outcome: Outcome | None = None
    sent: list[int] = []


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Baton)


def encode_baton(baton: Baton) -> bytes:
    return _encoder.encode(baton)


def decode_baton(body: bytes) -> Baton:
    """Return the baton of a message; raise CorruptJournal."""
    try:
        baton = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptJournal(f"A baton cannot be read: {error}.") from None
    if baton.format > FORMAT:
        raise CorruptJournal(
            f"A baton has format {baton.format}, this Pavane reads up to {FORMAT}: upgrade it here."
        )
    return baton
