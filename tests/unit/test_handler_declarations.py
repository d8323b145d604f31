"""What can be declared of a handler, and what every declaration that makes no sense says."""

from __future__ import annotations

import typing
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from pavane import BadDeclaration, Event, Service
from pavane.engine.handlers import handler_spec
from pavane.engine.registry import Registry
from pavane.errors import OnlyInHandler
from pavane.handler import Handler, delivery, emitted, per_second
from pavane.policy import Retry


class Placed(Event, key="order"):
    order: str


class Paid(Event, key="order"):
    order: str


class Refused(Event):
    pass


bank = Service("bank")


def takes_one(event: Placed) -> None: ...
def takes_two(event: Placed, state: dict[str, int]) -> None: ...
def takes_list(events: list[Placed]) -> None: ...
async def takes_connection(event: Placed, connection: Any) -> None: ...
def returns_text(event: Placed) -> str: ...


# -- rates and what is emitted -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (None, None), (5, 5.0), (0.5, 0.5), ("100/s", 100.0), ("90/m", 1.5), ("10/5s", 2.0),
        (" 36 / h ", 0.01), ("1.5/500ms", 3.0),
    ],
)  # fmt: skip
def test_rates_are_read(rate: str | float | None, expected: float | None) -> None:
    assert per_second(rate) == pytest.approx(expected)


@pytest.mark.parametrize("rate", ["fast", "100", "/s", "10/x", "0/s", 0, -1])
def test_what_is_no_rate_is_refused_with_examples(rate: str | float) -> None:
    with pytest.raises(BadDeclaration, match=r"is no rate|is not a duration"):
        per_second(rate)


@pytest.mark.parametrize(
    ("returns", "expected"),
    [
        (None, ()), (Placed, (Placed,)), (Placed | None, (Placed,)),
        (Placed | Paid | None, (Placed, Paid)), (list[Paid], (Paid,)),
        (list[Paid | Placed], (Paid, Placed)), (list[Paid] | Paid | Refused, (Paid, Refused)),
        (tuple[Placed, ...], (Placed,)), (tuple[Placed, Paid], (Placed, Paid)), (Any, ()),
    ],
)  # fmt: skip
def test_return_annotations_say_what_is_published(returns: Any, expected: Any) -> None:
    assert emitted(returns, "h") == expected


@pytest.mark.parametrize("returns", [int, str | Placed, list[dict[str, int]], Event])
def test_a_return_annotation_that_is_no_event_is_refused(returns: Any) -> None:
    with pytest.raises(BadDeclaration, match=r"Handler h returns .*which is no event\. Return an"):
        emitted(returns, "h")


# -- handlers ----------------------------------------------------------------------------------


def declare(fn: Callable[..., Any], *events: Any, **options: Any) -> Handler:
    service = Service("shop")

    @service.on(Placed, Paid)
    def both(event: Placed | Paid) -> None: ...

    @service.on(Refused, name="main")
    def main(event: Refused) -> None: ...

    service.on(*(events or (Placed,)), **{"name": "made", **options})(fn)
    return service.handlers["made"]


def test_a_handler_knows_its_events_and_what_it_publishes() -> None:
    service = Service("shop")

    @service.on(Placed, Refused, retry=Retry(attempts=2), timeout="3s", rate="5/s", linger="20ms")
    async def charge(event: Placed | Refused) -> Paid | None: ...

    handler = service.handlers["charge"]
    assert handler.events == {"Placed": Placed, "Refused": Refused}
    assert (handler.emits, handler.is_async, repr(handler)) == ((Paid,), True, "shop.charge")
    options = handler.options
    assert (options.timeout_s, options.rate_per_s, options.linger_s) == (3.0, 5.0, 0.02)
    assert declare(takes_one, emits=[Paid]).emits == (Paid,)
    assert declare(lambda event: None).emits is None  # it may publish anything


@pytest.mark.parametrize(
    ("since", "since_us"),
    [(None, None), ("beginning", 0), (datetime(2026, 1, 1, tzinfo=UTC), 1_767_225_600_000_000)],
)
def test_a_new_handler_begins_at_the_end_the_beginning_or_a_time(
    since: Any, since_us: int | None
) -> None:
    assert handler_spec(declare(takes_one, since=since)).since_us == since_us


@pytest.mark.parametrize(
    ("fn", "options", "why"),
    [
        (takes_two, {}, r"must take 1 parameter \(event\); it takes 2"),
        (takes_one, {"state": dict}, r"must take 2 parameters \(event, state\); it takes 1"),
        (takes_one, {"transaction": True}, r"must take 2 parameters \(event, connection\)"),
        (takes_one, {"batch": 2}, "batch=2, so its first parameter must be annotated as a list"),
        (takes_one, {"concurrency": 0}, r"concurrency= and batch= .* must be at least 1"),
        (takes_list, {"batch": 0}, r"concurrency= and batch= .* must be at least 1"),
        (takes_one, {"on_dead": "halt"}, r"on_dead='halt' .*Write 'continue' or 'stop'"),
        (takes_one, {"since": "start"}, r"since='start' .*Write 'beginning' or a datetime"),
        (takes_one, {"since": timedelta(1)}, "is no place in the log"),
        (returns_text, {}, r"returns <class 'str'>, which is no event"),
        (takes_one, {"name": "no name"}, r"'no name' is no name for a handler"),
        (takes_one, {"name": "main"}, r"has a handler 'main' already\. Give one another name"),
        (takes_one, {"shadow": True}, r"instead_of=… one of both, main"),
        (takes_one, {"share": 0.1, "instead_of": "other"}, r"instead_of=… one of both, main"),
        (takes_one, {"instead_of": "main"}, r"needs shadow=True or share=0\.1"),
        (takes_one, {"share": 0.1, "instead_of": "both"}, "must take the same: Placed, Paid"),
        (
            takes_connection,
            {"transaction": True, "shadow": True, "instead_of": "both"},
            "must not change anything",
        ),
    ],
)
def test_a_handler_that_makes_no_sense_says_why(
    fn: Callable[..., Any], options: dict[str, Any], why: str
) -> None:
    with pytest.raises(BadDeclaration, match=why):
        declare(fn, **options)


def takes_other(event: Paid) -> None: ...
def takes_others(events: list[Paid | Refused]) -> None: ...
def takes_several(event: Paid | Placed | None) -> None: ...
def takes_any_event(event: Event) -> None: ...
def takes_untyped(event) -> None: ...  # pyright: ignore
def takes_any_list(events: typing.List) -> None: ...  # noqa: UP006  # pyright: ignore


@pytest.mark.parametrize(
    ("fn", "options", "annotated"),
    [
        (takes_other, {}, r"its parameter 'event' is annotated as \S+\.Paid\. Annotate it as what"),
        (takes_others, {"batch": 2}, r"its parameter 'events' is annotated as list\["),
    ],
)
def test_a_handler_is_annotated_as_what_it_handles(
    fn: Callable[..., Any], options: dict[str, Any], annotated: str
) -> None:
    with pytest.raises(
        BadDeclaration, match=rf"Handler shop\.made handles \S+Placed, .*{annotated}"
    ):
        declare(fn, **options)


@pytest.mark.parametrize(
    "fn", [takes_one, takes_several, takes_any_event, takes_untyped, takes_any_list]
)
def test_a_handler_may_be_annotated_as_more_or_not_at_all(fn: Callable[..., Any]) -> None:
    assert declare(fn).events == {"Placed": Placed}


def test_a_handler_of_several_events_is_annotated_as_all_of_them() -> None:
    with pytest.raises(BadDeclaration, match=r"handles \S+Refused, .*annotated as \S+Paid"):
        declare(takes_several, Placed, Refused)


@dataclass
class NeedsOwner:
    owner: str


@dataclass(frozen=True)
class Total:
    cents: int = 0


@dataclass(frozen=True)
class Basket:
    skus: list[str] = field(default_factory=list[str])


class Sum(msgspec.Struct, frozen=True):
    cents: int = 0


def takes_state(event: Placed, state: Any) -> None: ...


def test_a_state_can_be_made_without_arguments() -> None:
    why = r"state=NeedsOwner, but NeedsOwner\(\), .* fails: .*'owner'\. Give its fields defaults"
    with pytest.raises(BadDeclaration, match=why):
        declare(takes_state, state=NeedsOwner)


@pytest.mark.parametrize("kind", [int, str, tuple, Total, Sum])
def test_a_state_can_be_changed(kind: type[Any]) -> None:
    why = rf"state={kind.__name__}, which cannot be changed, so nothing would ever be kept"
    with pytest.raises(BadDeclaration, match=why):
        declare(takes_state, state=kind)


@pytest.mark.parametrize("kind", [dict, list, Basket])
def test_a_state_may_be_a_container(kind: type[Any]) -> None:
    assert declare(takes_state, state=kind).options.state is kind


def yields(event: Placed) -> Iterator[Paid]:
    yield Paid(order=event.order)


async def yields_later(event: Placed) -> AsyncIterator[Paid]:
    yield Paid(order=event.order)


@pytest.mark.parametrize("fn", [yields, yields_later])
def test_what_yields_is_neither_handler_nor_step_nor_workflow(fn: Any) -> None:
    why = rf"{fn.__name__} cannot be a (handler shop\.made|step|workflow): it has a `yield`"
    for decorate in (declare, Service("shop").step, Service("shop").workflow):
        with pytest.raises(BadDeclaration, match=why):
            decorate(fn)


def test_a_batch_has_no_keyed_state() -> None:
    def with_state(events: list[Placed], state: dict[str, int]) -> None: ...

    with pytest.raises(BadDeclaration, match="cannot have both state= and a batch"):
        declare(with_state, state=dict)


def test_a_shadow_needs_a_handler_that_is_declared_before_it() -> None:
    with pytest.raises(BadDeclaration, match=r"there is none yet\. Declare that first\."):
        Service("shop").on(Placed, shadow=True)(takes_one)


@pytest.mark.parametrize("share", [0, -0.1, 1.5])
def test_a_share_is_a_part(share: float) -> None:
    with pytest.raises(BadDeclaration, match=r"must be above 0, at most 1"):
        declare(takes_one, Refused, share=share, instead_of="main")


def test_a_shadow_changes_nothing() -> None:
    def written(event: Placed, connection: Any) -> None: ...

    with pytest.raises(BadDeclaration, match=r"must not change anything: leave out transaction="):
        declare(written, transaction=True, shadow=True, instead_of="both")
    with pytest.raises(BadDeclaration, match=r"must not change anything: leave out share="):
        declare(takes_one, shadow=True, share=0.1, instead_of="both")


def test_a_share_takes_lists_if_the_current_handler_does() -> None:
    service = Service("shop")
    service.on(Placed, batch=5, name="main")(takes_list)
    with pytest.raises(BadDeclaration, match="must take the same: a list of Placed"):
        service.on(Placed, share=0.1)(takes_one)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("retry", Retry(attempts=9)), ("rate", "5/s"), ("concurrency", 7), ("on_dead", "stop"),
        ("breaker", None), ("since", "beginning"),
    ],
)  # fmt: skip
def test_a_share_follows_its_handler_in_what_is_not_decided_event_by_event(
    option: str, value: Any
) -> None:
    service = Service("s")
    service.on(Placed, name="main", **{option: value})(takes_one)
    service.on(Placed, name="same", share=0.1, instead_of="main", **{option: value})(takes_one)
    service.on(Placed, name="silent", share=0.1, instead_of="main")(takes_one)
    other = Service("other")
    other.on(Placed, name="main")(takes_one)
    with pytest.raises(BadDeclaration, match=rf"follows it in {option}=, so declare that there"):
        other.on(Placed, share=0.1, instead_of="main", **{option: value})(takes_one)


def test_shares_of_one_handler_are_no_more_than_all() -> None:
    service = Service("shop")
    service.on(Placed, name="main")(takes_one)
    service.on(Placed, name="a", share=0.6, instead_of="main")(takes_one)
    service.on(Placed, name="b", share=0.4, instead_of=service.handlers["main"].name)(takes_one)
    with pytest.raises(BadDeclaration, match=r"take 1\.1 of its keys together"):
        service.on(Placed, name="c", share=0.1, instead_of="main")(takes_one)


def test_a_handler_names_event_classes() -> None:
    with pytest.raises(BadDeclaration, match=r"must name at least one event class"):
        bank.on()
    with pytest.raises(BadDeclaration, match=r"on\(<class 'int'>\) must be given event classes"):
        bank.on(cast("Any", int))


def test_two_classes_under_one_name_are_refused_by_the_app() -> None:
    one, other = Service("one"), Service("other")

    class Twin(Event, type_name="Placed"):
        pass

    def takes_twin(event: Twin) -> None: ...

    one.on(Placed)(takes_one)
    other.on(Twin)(takes_twin)
    with pytest.raises(BadDeclaration, match=r"Two event classes are called 'Placed'.*type_name="):
        Registry([one, other])


def test_two_classes_under_one_name_are_told_apart_by_where_they_are() -> None:
    class Twin(Event, type_name="Placed"):
        pass

    def takes_any(event: Any) -> None: ...

    service = Service("shop")
    service.on(Placed)(takes_one)
    service.on(Twin)(takes_any)
    why = r"'Placed': tests\.\S+\.Placed and tests\.\S+<locals>\.Twin\. Rename one"
    with pytest.raises(BadDeclaration, match=why):
        Registry([service])


TWICE = """from pavane import Event, Service

class Lost(Event): ...
service = Service("shop")
service.on(Lost, name="find")(lambda event: None)

class Lost(Event): ...
service.on(Lost, name="search")(lambda event: None)
"""


def test_a_class_that_is_defined_twice_is_told_with_its_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "twice_lost.py").write_text(TWICE)
    monkeypatch.syspath_prepend(tmp_path)
    service = import_module("twice_lost").service
    why = r"'Lost': twice_lost\.Lost, which is defined twice \(at lines 3 and 7\)\. Rename one"
    with pytest.raises(BadDeclaration, match=why):
        Registry([service])


def test_of_several_versions_of_a_workflow_the_newest_starts_on_events() -> None:
    service = Service("shop")

    async def fulfil(event: Placed) -> None: ...

    for version in (1, 3, 2):
        service.workflow(name="fulfil", version=version, starts_on=Placed)(fulfil)
    (handler,) = service.handlers.values()
    assert handler.starts is not None
    assert (handler.name, handler.starts.version) == ("start-fulfil", 3)


def test_starts_on_names_an_event_class() -> None:
    async def fulfil(event: Placed) -> None: ...

    with pytest.raises(BadDeclaration, match=r"starts_on=<class 'int'> must be an event class"):
        bank.workflow(starts_on=int)(fulfil)


async def takes_more(event: Placed, x: int) -> None: ...
async def takes_nothing() -> None: ...
async def takes_by_name(*, event: Placed) -> None: ...


@pytest.mark.parametrize("fn", [takes_more, takes_nothing, takes_by_name])
def test_a_workflow_that_starts_on_an_event_can_be_called_with_it_alone(fn: Any) -> None:
    why = r"is given that event and nothing else; it takes \(.*\)\. Let it take the event first"
    with pytest.raises(BadDeclaration, match=why):
        Service("shop").workflow(starts_on=Placed)(fn)


def test_a_workflow_that_starts_on_an_event_is_annotated_so() -> None:
    async def settle(event: Paid) -> None: ...

    why = r"shop\.settle starts on Placed, but its first parameter .*Annotate it as Placed, or"
    with pytest.raises(BadDeclaration, match=why):
        Service("shop").workflow(starts_on=Placed)(settle)


def test_a_workflow_that_starts_on_an_event_may_have_defaults_and_no_annotations() -> None:
    async def settle(event, cents=5) -> None: ...  # pyright: ignore

    service = Service("shop")
    service.workflow(starts_on=Placed)(cast("Any", settle))
    assert list(service.handlers) == ["start-settle"]


def test_outside_of_a_handler_there_is_no_delivery() -> None:
    with pytest.raises(OnlyInHandler, match="works only inside a handler"):
        delivery()


def test_called_directly_it_is_just_the_function() -> None:
    service = Service("shop")

    @service.on(Placed)
    def charge(event: Placed) -> Paid:
        return Paid(order=event.order)

    assert charge(Placed(order="a")) == Paid(order="a")
    assert service.handlers["charge"](Placed(order="a")) == Paid(order="a")
