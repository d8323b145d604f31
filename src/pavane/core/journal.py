"""The journal: the ordered record of every result that was delivered to a run.

A journal only grows. A row of a store holds a chunk: a JSON array of entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec
from msgspec import Raw

from pavane.core.operations import EXPIRY
from pavane.errors import CorruptJournal

What = Literal[
    "start",
    "done",
    "failed",
    "fired",
    "received",
    "cancel",
    "rewind",
    "fork",
    "unasked",
    "hop",
    "home",
]


DAMAGED = (
    "It was damaged or changed by hand: restore the store from a backup, or end the run by "
    "`pavane runs kill` and start it anew."
)


PATCH = "patch "
"""What a mark among `issued` begins with that is no operation: see `patched`."""
DELIVERIES = ("done", "failed", "fired", "received")
"""What answers an operation."""


class Entry(msgspec.Struct, array_like=True):
    """One delivery.

    `what` happened at `at_us` (microseconds since the epoch) for operation `op`; `value` is the
    encoded result, error or event; `service` did it in `attempts` attempts since `began_us`.
    `issued` are the fingerprints of what the workflow asked for in response. "unasked" delivers
    nothing: `value` lists the ordinals of operations that could not be passed on to anyone.
    """

    what: What
    at_us: int
    op: int = -1
    value: Raw = Raw(b"null")
    service: str = ""
    attempts: int = 0
    began_us: int = 0
    issued: list[str] = []

    @property
    def asked(self) -> list[str]:
        """The operations that were issued, one after the other; a patch mark is none."""
        return [mark for mark in self.issued if not mark.startswith(PATCH)]


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(list[Entry])


def encode_entry(entry: Entry) -> bytes:
    return _encoder.encode(entry)


def join_entries(entries: Iterable[bytes]) -> bytes:
    """Return the chunk of already encoded entries."""
    return b"[" + b",".join(entries) + b"]"


def decode_chunk(chunk: bytes) -> list[Entry]:
    """Return the entries of a chunk; raise CorruptJournal."""
    try:
        return _decoder.decode(chunk)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptJournal(
            f"A journal row cannot be read: {error}. Row: {chunk[:80]!r}. {DAMAGED}"
        ) from None


def effective(entries: Sequence[Entry]) -> list[Entry]:
    """Return what replay delivers: a `rewind` entry voids those from its `op` position on."""
    kept: list[Entry] = []
    for entry in entries:
        if entry.what == "rewind":
            del kept[entry.op :]
        else:
            kept.append(entry)
    return kept


def eras(entries: Iterable[Entry]) -> int:
    """Return how often the run was rewound."""
    return sum(entry.what == "rewind" for entry in entries)


def resumed_us(entries: Iterable[Entry]) -> int:
    """Return when the run was last rewound, or 0; its timeout counts from then."""
    return max((entry.at_us for entry in entries if entry.what == "rewind"), default=0)


def expiry_of(delivered: Iterable[Entry]) -> int | None:
    """Return the index of the entry by which the run's timeout passed, if it did."""
    issued: list[str] = []
    for index, entry in enumerate(delivered):
        if entry.what == "fired" and issued[entry.op] == f"timer {EXPIRY}":
            return index
        issued += entry.asked
    return None


def issue_eras(entries: Iterable[Entry]) -> list[int]:
    """Return for each operation that was asked for and not taken back, in which era it was."""
    kept: list[tuple[int, Entry]] = []
    era = 0
    for entry in entries:
        if entry.what == "rewind":
            era += 1
            del kept[entry.op :]
        else:
            kept.append((era, entry))
    return [era for era, entry in kept for _ in entry.asked]


def unasked_of(delivered: Sequence[Entry]) -> frozenset[int]:
    """Return the operations that the last entry says nobody could be asked for."""
    if not delivered or delivered[-1].what != "unasked":
        return frozenset()
    return frozenset(msgspec.json.decode(delivered[-1].value, type=list[int]))
