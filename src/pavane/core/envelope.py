"""What the messages between services say: each kind one value, encoded as JSON."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from msgspec import Raw

from pavane.core.baton import Header, Status
from pavane.errors import CorruptJournal


class Call(msgspec.Struct, array_like=True):
    """A command: have `step` of `service` done for operation `op` of `run`.

    `options` overrides the declared ones; `reply_to` is the service that holds the run. `deaths` is
    how many times the run was touched after a crash before it asked; `asked_in` the era in which it
    first did, which is older than `era` if a person had the run go on since. `priority` is the
    run's. `attempt`, `began_us` and `beat` tell how far it got where it was begun; most begin here.
    The message id and the idempotency key derive from run and operation.
    """

    run: str
    op: int
    era: int
    service: str
    step: str
    args: Raw
    reply_to: str
    conversation: str
    undo: bool = False
    options: Raw = Raw(b"null")
    deaths: int = 0
    asked_in: int = 0
    priority: int = 0
    attempt: int = 1
    began_us: int = 0
    beat: Raw = Raw(b"null")

    @property
    def id(self) -> str:
        return operation_id(self.run, self.op, self.era)

    @property
    def work_id(self) -> str:
        """The mark, and the reply, of a transaction: the same however often it is asked for."""
        return f"{operation_id(self.run, self.op, self.asked_in)}t"


class Reply(msgspec.Struct, array_like=True):
    """What became of an operation: a result, an error, or (`stuck`) why a person must look.

    `version` is that of a published event, which whoever holds the run reads by its own code.
    """

    run: str
    op: int
    era: int
    fingerprint: str
    ok: bool
    value: Raw
    service: str
    attempts: int
    began_us: int
    stuck: str = ""
    version: int = 0


class Start(msgspec.Struct, array_like=True):
    """Start a run; `args` is the encoded array of its arguments."""

    header: Header
    args: Raw


class Signal(msgspec.Struct, array_like=True):
    """An event for the mailbox of a run."""

    type: str
    body: Raw


class Request(msgspec.Struct, array_like=True):
    """What a person asks of a run (cancel, kill, retry)."""

    by: str = ""


class Note(msgspec.Struct, array_like=True):
    """Tells home where a travelling run waits."""

    hop: int
    holder: str
    status: Status
    reason: str


class Await(msgspec.Struct, array_like=True):
    """A run waits (or waits no more) for a published event of `type` and `key`.

    One that came before it, longer ago than `keep_us`, is none for it; 0: as old as they are kept.
    """

    run: str
    op: int
    era: int
    home: str
    type: str
    key: str
    fingerprint: str
    keep_us: int = 0

    @property
    def id(self) -> str:
        return operation_id(self.run, self.op, self.era)


class Permit(msgspec.Struct, array_like=True):
    """What is said of a permit of `limit` of `service`, for those that share `key`.

    `work` is what it is for, `nonce` tells one asking from another; `to` and `target` are where its
    answers go. For a run (`op` is not negative) the answer is a reply to that operation. The limit
    notes when it was asked for first, when it was given (0: not yet), and at which position of the
    log it was asked for last: at a takeover what is older may be read later.
    """

    work: str
    nonce: str
    service: str
    limit: str
    key: str
    to: str
    target: int
    priority: int = 0
    asked_us: int = 0
    given_us: int = 0
    pos: int = 0
    op: int = -1
    era: int = 0
    fingerprint: str = ""


class Redo(msgspec.Struct, array_like=True):
    """Handle the event at `pos` by `handler` (its number) once more, or with `drop` never.

    `dead` is the dead letter it is about, 0 for a replay, which `again` names; `data` replaces the
    event's payload.
    """

    handler: int
    pos: int
    dead: int = 0
    again: str = ""
    data: Raw = Raw(b"null")
    drop: bool = False


def operation_id(run: str, op: int, era: int) -> str:
    """Return the id of what operation `op` sends; a later era is a retry asked for by a person."""
    return f"{run}#{op}.{era}" if era else f"{run}#{op}"


def hop_id(run: str, hop: int) -> str:
    return f"{run}#h{hop}"


T = TypeVar("T")
_encoder = msgspec.json.Encoder()
_decoders: dict[type[Any], msgspec.json.Decoder[Any]] = {}


def pack(value: msgspec.Struct) -> bytes:
    return _encoder.encode(value)


def unpack(kind: type[T], body: bytes) -> T:
    """Return the value of a message body; raise CorruptJournal."""
    decoder = _decoders.get(kind) or _decoders.setdefault(kind, msgspec.json.Decoder(kind))
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptJournal(f"A message cannot be read as {kind.__name__}: {error}.") from None
