"""Event classes: key, version, upcasts, time to live, CloudEvents envelope and JSON schema."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast
from uuid import UUID

import msgspec
import pydantic
import pytest

import pavane
from pavane import BadArguments, BadDeclaration, Event, Limit, event
from pavane.engine.publishing import cloud_event, derived_id, json_schema, read_event
from pavane.errors import BadEvent, UnknownName
from pavane.event import is_event, is_event_type, key_of, type_for
from pavane.stores.eventlog import EventRow


class Placed(Event, key="order", version=3, ttl="1h"):
    order: str
    cents: int
    note: str = ""


@Placed.upcast(1)
def _(old: dict[str, Any]) -> dict[str, Any]:
    return {"order": old["id"], "euros": old["euros"]}


@Placed.upcast(2)
def _(old: dict[str, Any]) -> dict[str, Any]:
    return {"order": old["order"], "cents": old["euros"] * 100}


@event(key="sku", version=2, type_name="stock.Changed")
@dataclass
class Changed:
    sku: str
    count: int


@Changed.upcast(1)  # pyright: ignore
def _(old: dict[str, Any]) -> dict[str, Any]:
    return {"sku": old["sku"], "count": 0}


@event(key="name")
class Joined(pydantic.BaseModel):
    name: str
    age: int = pydantic.Field(ge=0)


class Ping(Event):
    at: int = 0


def row(cls: Any, data: bytes, version: int = 1, **more: Any) -> EventRow:
    values: dict[str, Any] = {
        "id": "e1", "type": cls.event_type, "version": version, "key": "k", "source": "shop",
        "at_us": 1_700_000_000_000_000, "conversation": "c1", "cause": "", "trace": "",
        "data": data, **more,
    }  # fmt: skip
    return EventRow(**values)


# -- declaring ---------------------------------------------------------------------------------


def test_a_class_says_its_key_version_name_and_time_to_live() -> None:
    assert (Placed.event_key, Placed.event_version) == ("order", 3)
    assert (Placed.event_type, Placed.event_ttl_s) == ("Placed", 3600.0)
    described: Any = Changed
    assert (described.event_key, described.event_type) == ("sku", "stock.Changed")
    assert (Ping.event_key, Ping.event_ttl_s) == (None, None)


def test_a_subclass_inherits_key_and_time_to_live_but_neither_name_nor_version() -> None:
    class Express(Placed):
        hours: int = 24

    assert (Express.event_key, Express.event_ttl_s) == ("order", 3600.0)
    assert (Express.event_type, Express.event_version, Express.event_upcasts) == ("Express", 1, {})
    assert key_of(Express(order="a", cents=1)) == "a"


def test_a_subclass_may_have_another_key_and_time_to_live_or_none() -> None:
    class Booked(Placed, key="cents", ttl=None): ...

    class Noted(Booked, key=None, ttl="5s"): ...

    assert (Booked.event_key, Booked.event_ttl_s) == ("cents", None)
    assert (Noted.event_key, Noted.event_ttl_s) == (None, 5.0)


def test_a_decorated_subclass_inherits_too() -> None:
    @event(type_name="stock.Counted")
    @dataclass
    class Counted(Changed):
        by: str = ""

    described: Any = Counted
    assert (described.event_key, described.event_version) == ("sku", 1)


def test_events_are_immutable_and_built_by_name() -> None:
    placed = Placed(order="a", cents=1)
    with pytest.raises(AttributeError):
        placed.cents = 2  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        Placed("a", 1)  # pyright: ignore[reportCallIssue]


def test_the_decorator_can_be_had_from_the_package() -> None:
    module: Any = pavane.event

    @module(key="a")
    @dataclass
    class Other:
        a: str

    assert is_event(Other("x"))

    @module
    @dataclass
    class Bare:
        a: str

    described: Any = Bare
    assert (described.event_type, described.event_key) == ("Bare", None)
    assert is_event_type(Joined)
    assert not is_event_type(Event)
    assert not is_event_type(int)
    assert not is_event(Placed)


def test_a_subclass_of_a_decorated_class_is_no_event_of_its_own() -> None:
    @dataclass
    class More(Changed):
        more: int = 0

    assert not is_event_type(More)


@pytest.mark.parametrize(
    ("value", "key"),
    [("a", "a"), (7, "7"), (UUID(int=1), str(UUID(int=1))), (None, ""), ("", "")],
)
def test_the_key_is_text_and_none_is_no_key(value: Any, key: str) -> None:
    class Keyed(Event, key="k"):
        k: Any

    assert key_of(Keyed(k=value)) == key
    assert key_of(Ping()) == ""


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("a\0b", "NUL"), ("\ud800", "lone surrogate"), ("k" * 1001, "1,001 bytes"),
        ("ä" * 501, "1,002 bytes"),
    ],
)  # fmt: skip
def test_what_no_store_could_keep_or_find_is_refused_as_a_key(key: str, why: str) -> None:
    class Keyed(Event, key="k"):
        k: str

    with pytest.raises(BadArguments, match=f"^Event Keyed .*{why}"):
        key_of(Keyed(k=key))
    with pytest.raises(BadArguments, match=why):
        Limit(concurrency=1, key=lambda: key).key_of((), {})


def test_only_frozen_events_are_shared_between_handlers() -> None:
    shared = row(Placed, b'{"order":"a","cents":1}', 3)
    assert read_event(Placed, shared) is read_event(Placed, shared)
    own = row(Changed, b'{"sku":"a","count":1}', 2)
    assert read_event(Changed, own) is not read_event(Changed, own)


def declare(**options: Any) -> type[Event]:
    class Made(Event, **options):
        a: str

    return Made


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"key": "b"}, r"Event Made has key='b', which is not one of its fields \(a\)\."),
        ({"type_name": "no name"}, r"'no name' is no name for an event: use letters, digits"),
        ({"version": 0}, r"Event Made has version=0; versions count from 1\."),
        ({"ttl": "soon"}, r"'soon' is not a duration\."),
    ],
)
def test_a_declaration_that_makes_no_sense_says_why(options: dict[str, Any], why: str) -> None:
    with pytest.raises(BadDeclaration, match=why):
        declare(**options)


def test_upcasts_are_declared_once_and_from_older_versions() -> None:
    with pytest.raises(BadDeclaration, match=r"Placed\.upcast\(3\) must name an older version"):
        Placed.upcast(3)
    with pytest.raises(BadDeclaration, match=r"Placed\.upcast\(1\) is declared twice\."):
        Placed.upcast(1)(dict)


def test_only_dataclasses_and_models_can_be_decorated() -> None:
    with pytest.raises(BadDeclaration, match=r"int'> is neither\. Put @event above @dataclass"):
        event(key="a")(int)
    with pytest.raises(BadDeclaration, match=r"'order_id' is neither\. Put @event above"):
        event(cast("Any", "order_id"))


def test_an_unknown_type_lists_the_known_ones() -> None:
    with pytest.raises(UnknownName, match=r"No event type is called 'X'\. Known: Placed\."):
        type_for("X", {"Placed": Placed})
    assert type_for("Placed", {"Placed": Placed}) is Placed


# -- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "data"),
    [
        (1, b'{"id":"a","euros":5}'),
        (2, b'{"order":"a","euros":5}'),
        (3, b'{"order":"a","cents":500}'),
        (3, b'{"order":"a","cents":500,"added_later":[1]}'),
    ],
)
def test_older_events_are_read_through_their_upcasts_one_version_at_a_time(
    version: int, data: bytes
) -> None:
    assert read_event(Placed, row(Placed, data, version)) == Placed(order="a", cents=500)


def test_dataclasses_and_models_are_read_and_upcast_alike() -> None:
    assert read_event(Changed, row(Changed, b'{"sku":"a"}', 1)) == Changed("a", 0)
    assert read_event(Joined, row(Joined, b'{"name":"a","age":3}')) == Joined(name="a", age=3)


@pytest.mark.parametrize(
    ("cls", "version", "data", "why"),
    [
        (Placed, 3, b'{"cents":1}', "Event e1 is no Placed .version 3.*order"),
        (Placed, 3, b'{"order":"a","cents":"x"}', "Expected `int`, got `str`"),
        (
            Placed,
            4,
            b'{"order":"a","cents":500}',
            r"Placed version 4 was published by newer code; the code here knows version 3\. "
            r"Deploy the newer code here, then retry\.",
        ),
        (Placed, 1, b'{"order":"a"}', r"Upcasting Placed from version 1 failed: KeyError\('id'\)"),
        (Placed, 2, b"[]", "Upcasting Placed from version 2 failed"),
        (Joined, 1, b'{"name":"a","age":-1}', "greater than or equal to 0"),
    ],
)
def test_data_that_does_not_fit_is_a_bad_event_with_its_reason(
    cls: Any, version: int, data: bytes, why: str
) -> None:
    with pytest.raises(BadEvent, match=why):
        read_event(cls, row(cls, data, version))


def test_a_missing_upcast_says_what_to_declare() -> None:
    class Late(Event, version=3):
        a: str

    with pytest.raises(BadEvent, match=r"Nothing tells.*Declare @Late\.upcast\(1\)\."):
        read_event(Late, row(Late, b"{}", 1))


# -- as others see it --------------------------------------------------------------------------


def test_the_envelope_is_cloudevents_with_cause_and_trace() -> None:
    trace = f"00-{'ab' * 16}-{'cd' * 8}-01"
    told = cloud_event(row(Placed, b'{"order":"a"}', 3, cause="e0", trace=trace))
    assert msgspec.json.decode(msgspec.json.encode(told)) == {
        "specversion": "1.0",
        "id": "e1",
        "source": "/pavane/shop",
        "type": "Placed",
        "time": "2023-11-14T22:13:20Z",
        "datacontenttype": "application/json",
        "dataschema": "pavane:event:Placed:3",
        "subject": "k",
        "correlationid": "c1",
        "causationid": "e0",
        "traceparent": told["traceparent"],
        "data": {"order": "a"},
    }
    version, trace_id, span, flags = told["traceparent"].split("-")
    assert (version, trace_id, len(span), flags) == ("00", "ab" * 16, 16, "01")


def test_one_trace_is_one_conversation_and_without_key_there_is_no_subject() -> None:
    first, second = (
        cloud_event(row(Ping, b"{}", id=id, key="")) for id in ("e1", "e2")
    )  # fmt: skip
    assert "subject" not in first
    assert "causationid" not in first
    assert first["traceparent"][:36] == second["traceparent"][:36]
    assert first["traceparent"] != second["traceparent"]


def test_a_derived_id_is_the_same_for_the_same_cause_only() -> None:
    assert derived_id("c", "seed") == derived_id("c", "seed")
    assert len({derived_id("c", seed) for seed in ("a#1", "a#2", "b#1")}) == 3
    assert derived_id("c", "a").startswith("c.")


@pytest.mark.parametrize("cls", [Placed, Changed, Joined])
def test_every_kind_of_event_has_a_json_schema(cls: Any) -> None:
    schema = json_schema(cls)
    assert schema["$id"] == f"pavane:event:{cls.event_type}:{cls.event_version}"
    inner: Any = schema.get("$defs", {}).get(cls.__name__, schema)
    assert set(inner["properties"]) >= {cls.event_key}
    assert inner["type"] == "object"


def test_a_schema_names_what_it_cannot_describe() -> None:
    class Met(Event):
        who: Joined

    inner = json_schema(Met)["$defs"]["Met"]
    assert inner["properties"]["who"] == {"title": "Joined"}
