"""Events on their way into the log and out of it: rows, ids, CloudEvents, upcasting."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from hashlib import blake2s
from typing import Any

import msgspec

from pavane.contract import start_type
from pavane.core.baton import Header
from pavane.core.codec import decoder, encode, encode_fitting
from pavane.errors import BadEvent, NotDecodable, TooLarge
from pavane.event import class_of, key_of
from pavane.handler import Origin
from pavane.stores.eventlog import EventRow, EventStore

_plain = msgspec.json.Decoder(dict[str, Any])
_TRACE_ID = slice(3, 35)
SCHEMA = "pavane:event:"


def event_row(
    store: EventStore, event: Any, *, id: str, source: str, at_us: int, conversation: str,
    cause: str, trace: str = "", data: bytes | None = None,
) -> EventRow:  # fmt: skip
    """Return the row that publishes `event`; `data` is its encoding, if that is at hand.

    Raises BadArguments for an event whose values do not fit its class.
    """
    kind = class_of(event)
    if data is None:
        data = encode_fitting(event)
    key = key_of(event)
    return EventRow(
        id, kind.event_type, kind.event_version, key, source, at_us, conversation, cause, trace,
        data, store.slot_of(key, id),
    )  # fmt: skip


def start_row(store: EventStore, header: Header) -> EventRow:
    """Return the row that tells that a run began, for whoever reads the log of events."""
    run = header.run
    return EventRow(
        f"{run}#start", start_type(header.workflow), 1, run, header.home, header.started_us,
        header.conversation, header.cause, "", b"{}", store.slot_of(run, run),
    )  # fmt: skip


def checked_size(row: EventRow, limit: int) -> EventRow:
    if len(row.data) > limit:
        raise TooLarge(
            f"Event {row.type} takes {len(row.data):,} bytes; the limit is {limit:,}. Store large "
            f"data elsewhere and pass a reference. Nothing was written."
        )
    return row


def derived_id(conversation: str, seed: str) -> str:
    """Return an id that is the same whenever the same cause asks for it, by the same `seed`.

    It begins with the conversation's, so that what belongs together lies together in an index.
    """
    return f"{conversation}.{blake2s(seed.encode(), digest_size=8).hexdigest()}"


def origin(
    seed: str, content: str, counts: Counter[str], source: str, conversation: str, cause: str,
    trace: str, limit: int,
) -> Origin:  # fmt: skip
    """Return what an event inherits that is published through a connection.

    Its id derives from what is published and not from the order: an attempt that goes on where the
    last one stopped publishes what is new, and only what is the same again is recognised.
    """
    counts[content] += 1
    id = derived_id(conversation, f"{seed}!{counts[content]}{content}")
    return Origin(id, source, conversation, cause, trace, limit)


def read_event(cls: Any, row: EventRow, data: bytes | None = None) -> Any:
    """Return the event of a row as an instance of `cls`, through its upcasts; raise BadEvent."""
    if data is None and type(row.value) is cls:
        return row.value
    raw = upcast(cls, row.version, row.data if data is None else data)
    try:
        value = decoder(cls)(raw)
    except NotDecodable as error:
        raise BadEvent(
            f"Event {row.id} is no {cls.event_type} (version {cls.event_version}): "
            f"{error.__cause__ or error}."
        ) from error
    if data is None and cls.event_frozen:
        row.value = value
    return value


def upcast(cls: Any, version: int, data: bytes) -> bytes:
    """Return `data` of an older version in the words of the class as it is now; raise BadEvent.

    A newer version means what this code cannot know, even if its data happens to fit the class.
    """
    if version == cls.event_version:
        return data
    if version > cls.event_version:
        raise BadEvent(
            f"{cls.event_type} version {version} was published by newer code; the code here knows "
            f"version {cls.event_version}. Deploy the newer code here, then retry."
        )
    try:
        plain = _plain.decode(data)
        for step in range(version, cls.event_version):
            if step not in cls.event_upcasts:
                raise BadEvent(
                    f"Nothing tells how {cls.event_type} version {step} reads as version "
                    f"{step + 1}. Declare @{cls.__name__}.upcast({step})."
                )
            plain = cls.event_upcasts[step](plain)
        return encode(plain)
    except BadEvent:
        raise
    except Exception as error:
        raise BadEvent(
            f"Upcasting {cls.event_type} from version {version} failed: {error!r}."
        ) from error


def cloud_event(row: EventRow) -> dict[str, Any]:
    """Return the event with its CloudEvents 1.0 attributes, as a dict that is valid JSON.

    They are those of the row alone, whichever code looks at it.
    """
    envelope: dict[str, Any] = {
        "specversion": "1.0",
        "id": row.id,
        "source": f"/pavane/{row.source}",
        "type": row.type,
        "time": datetime.fromtimestamp(row.at_us / 1e6, UTC).isoformat().replace("+00:00", "Z"),
        "datacontenttype": "application/json",
        "dataschema": schema_uri(row.type, row.version),
        "correlationid": row.conversation,
        "traceparent": traceparent(row),
        "data": msgspec.Raw(row.data),
    }
    if row.key:
        envelope["subject"] = row.key
    if row.cause:
        envelope["causationid"] = row.cause
    return envelope


def schema_uri(type: str, version: int) -> str:
    """Return what names the schema of an event; `pavane events schema` resolves it."""
    return f"{SCHEMA}{type}:{version}"


def traceparent(row: EventRow) -> str:
    """Return the W3C trace context: one trace a conversation, one span an event."""
    trace = row.trace[_TRACE_ID] if row.trace else _hex(row.conversation, 16)
    return f"00-{trace}-{_hex(row.id, 8)}-01"


def _hex(text: str, size: int) -> str:
    return blake2s(text.encode(), digest_size=size).hexdigest()


def json_schema(cls: Any) -> dict[str, Any]:
    """Return the JSON Schema of an event class."""
    if hasattr(cls, "model_json_schema"):
        schema = cls.model_json_schema()
    else:
        schema = msgspec.json.schema(cls, schema_hook=_schema_of_other)
    return {"$id": schema_uri(cls.event_type, cls.event_version), **schema}


def _schema_of_other(kind: Any) -> dict[str, Any]:
    """Tell no more than the name of what msgspec does not know, such as a pydantic model."""
    return {"title": kind.__name__}
