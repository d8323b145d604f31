"""A run that this node holds: its row, its execution, and what of it is not durable yet."""

from __future__ import annotations

from functools import partial
from itertools import count

import msgspec

from pavane.core.baton import Header, Outcome, Stop
from pavane.core.execution import Execution
from pavane.core.journal import Entry, encode_entry
from pavane.stores.eventlog import EventRow
from pavane.stores.port import InboxRow, JournalRow, MailRow, Message, RunRow
from pavane.workflow import Attribute

CLEARED_BY = 2
"""Deliveries that clear a suspect: the first may have been there, not durable, when it struck."""
_json = msgspec.json.Encoder()
_chains = count(1)
_plain = msgspec.json.Decoder(str)
_trail = msgspec.json.Decoder(list[Stop])
_attributes = msgspec.json.Decoder(dict[str, str | int | float | bool])
_header = msgspec.json.Decoder(Header)


class Held(msgspec.Struct, eq=False):
    """The state of one run at one service of this node.

    `entries` are all encoded journal entries while the baton may still be passed, else None;
    `unwritten` those that no commit carries yet. `arrival` is the baton's inbox mark until the
    first commit takes it. `local` are operations whose step runs here, `queued` those
    of them that are in custody and wait for a permit. `consuming` are log
    messages to be acknowledged with the next commit. `chain` ties its commits together. `dirty`:
    the row changed since it was written. `mail` waits in the mailbox, `taken` are ids of what was
    delivered from there; while `reads_mail` nothing is, since earlier events may be there. `marks`,
    published `events` and new `members` of its conversation go with the next commit. `suspect`: it
    was touched after a crash, and is cleared by so many more deliveries.
    """

    row: RunRow
    header: Header
    execution: Execution
    exists: bool
    trail: list[Stop] = []
    attributes: dict[str, Attribute] = {}
    entries: list[bytes] | None = []
    unwritten: list[bytes] = []
    count: int = 0
    size_bytes: int = 0
    arrival: InboxRow | None = None
    consuming: list[Message] = []
    local: set[int] = set()
    queued: set[int] = set()
    mail: list[MailRow] = []
    taken: set[str] = set()
    reads_mail: bool = False
    marks: list[InboxRow] = []
    events: list[EventRow] = []
    members: list[tuple[str, str]] = []
    commits: int = 0
    dead: bool = False
    chain: int = msgspec.field(default_factory=partial(next, _chains))
    dirty: bool = False
    suspect: int = 0
    undone: int = 0
    home_row: RunRow | None = None
    key: tuple[str, str] = ("", "")

    def __post_init__(self) -> None:
        self.dirty = not self.exists
        self.undone = self.row.undone
        self.key = (self.row.service, self.row.id)

    @property
    def outcome(self) -> Outcome | None:
        return self.execution.outcome

    @property
    def at_work(self) -> set[int]:
        """The operations whose step is not just waiting for a permit."""
        return self.local - self.queued

    def knows_mail(self, id: str) -> bool:
        """Tell whether an event of the mailbox waits here, or was delivered from here."""
        return id in self.taken or any(known.id == id for known in self.mail)

    def record(self, entry: Entry, travel_max_bytes: int) -> None:
        """Append a delivered entry."""
        self.append(encode_entry(entry), travel_max_bytes)

    def append(self, raw: bytes, travel_max_bytes: int) -> None:
        """Append an encoded entry; at home a journal too large to travel is not kept in memory."""
        self.unwritten.append(raw)
        self.count += 1
        self.size_bytes += len(raw) + 1
        if self.entries is not None:
            if self.size_bytes > travel_max_bytes and self.row.service == self.row.home:
                self.entries = None
            else:
                self.entries.append(raw)

    def take_journal(self) -> list[JournalRow]:
        """Return what must be written of the journal, as one chunk."""
        if not self.unwritten:
            return []
        seq = self.count - len(self.unwritten)
        chunk = b"[" + b",".join(self.unwritten) + b"]"
        self.unwritten = []
        return [JournalRow(self.row.no, seq, chunk)]


def blank_row(no: int, service: str, target: int, header: Header) -> RunRow:
    """Return the row of a run that begins at `service`; its header is encoded when written."""
    return RunRow(
        no=no, service=service, id=header.run, target=target, workflow=header.workflow,
        version=header.version, mode=header.mode, home=header.home, status="running",
        holder=service, hop=0, header=b"", trail=b"[]", attributes=b"{}",
        wake_us=None, reason="", deaths=0, started_us=header.started_us, ended_us=None,
        result=None, undone=0, entries=0,
    )  # fmt: skip


def encode_plain(value: object) -> bytes:
    return _json.encode(value)


def decode_plain(raw: bytes) -> str:
    return _plain.decode(raw)


def decode_trail(raw: bytes) -> list[Stop]:
    return _trail.decode(raw)


def decode_attributes(raw: bytes) -> dict[str, Attribute]:
    return _attributes.decode(raw)


def decode_header(raw: bytes) -> Header:
    return _header.decode(raw)
