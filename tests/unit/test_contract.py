"""What contracts of conversations refuse, in words that teach, and how they judge."""

from __future__ import annotations

from typing import Any

import pytest

from pavane import App, BadDeclaration, ConversationOverdue, Event, Service
from pavane.contract import Contract
from pavane.observe.progress import follow, milestones_of, state_of
from pavane.stores.eventlog import ConversationRow, EventRow

shop, other = Service("shop"), Service("other")


class Placed(Event, key="id"):
    id: str


class Paid(Event, key="id"):
    id: str


class Shipped(Event, key="id"):
    id: str


class Cancelled(Event, key="id"):
    id: str


@shop.workflow
async def fulfil(id: str) -> None: ...


@other.workflow
async def foreign(id: str) -> None: ...


def contract(**changes: Any) -> Contract:
    given = {"start": Placed, "ends": [Shipped, Cancelled], "within": "10s", **changes}
    return App("shop", [shop], store="memory:").conversation(**given)


def refusal(**changes: Any) -> str:
    with pytest.raises(BadDeclaration) as caught:
        contract(**changes)
    return str(caught.value)


# -- declaring ---------------------------------------------------------------------------------


def test_a_contract_is_named_after_its_start_by_default() -> None:
    assert contract().name == "Placed"
    assert contract(start=fulfil).name == "fulfil"
    assert contract(name="sales").name == "sales"


def test_it_knows_the_types_that_matter() -> None:
    assert contract(milestones=[Paid]).types == ["Placed", "Shipped", "Cancelled", "Paid"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"start": "Placed"}, "conversation(start='Placed') must begin with an event class or a"),
        ({"ends": []}, "'Placed' has no ends, so it would always be overdue. Name the events"),
        ({"ends": ["Shipped"]}, "ends=['Shipped'] must list event classes"),
        ({"ends": [Shipped, Shipped]}, "ends= lists Shipped twice"),
        ({"ends": [Shipped, Placed]}, "begins and ends with Placed; name another event in ends="),
        ({"within": 0}, "has within=0; give it some time, such as '2h'"),
        ({"within": "soon"}, "'soon'"),
        ({"milestones": [str]}, "milestones=[<class 'str'>] must list event classes"),
        ({"milestones": [Shipped]}, "Shipped is its start or an end, so no milestone"),
        ({"milestones": {Paid: "1m"}}, "milestone Paid has 60 s, more than the 10 s of the whole"),
        ({"name": "a b"}, "'a b' is no name for a conversation"),
        ({"start": foreign}, "No workflow is called 'foreign'. Known: fulfil"),
    ],
)
def test_a_contract_that_cannot_work_is_refused(changes: dict[str, Any], text: str) -> None:
    assert text in refusal(**changes)


def test_two_contracts_of_one_name_are_refused() -> None:
    app = App("shop", [shop], store="memory:")
    app.conversation(start=Placed, ends=[Shipped], within="1h")
    with pytest.raises(BadDeclaration, match="Two conversations are called 'Placed'"):
        app.conversation(start=Placed, ends=[Cancelled], within="2h")
    app.conversation(start=Placed, ends=[Cancelled], within="2h", name="cancelled")


def test_two_event_classes_of_one_name_are_refused() -> None:
    class Shipped(Event):
        pass

    app = App("shop", [shop], store="memory:")
    app.conversation(start=Placed, ends=[Cancelled], within="1h", milestones=[globals()["Shipped"]])
    with pytest.raises(BadDeclaration, match="Two event classes are called 'Shipped'"):
        app.conversation(start=Paid, ends=[Shipped], within="1h")


def test_the_event_that_tells_of_an_overdue_conversation_is_keyed_by_it() -> None:
    assert ConversationOverdue.event_key == "conversation"


# -- judging -----------------------------------------------------------------------------------

T0, S = 1_800_000_000_000_000, 1_000_000
WATCHED = contract(milestones={Paid: "2s"})


def event(type: str, after_s: float, key: str = "k") -> EventRow:
    at_us = T0 + round(after_s * S)
    return EventRow(f"{type}{after_s}", type, 1, key, "shop", at_us, "c", "", "", b"{}")


def followed(*events: EventRow) -> ConversationRow:
    row = None
    for one in events:
        row = follow(WATCHED, row, one)
    assert row is not None
    return row


def test_only_the_start_begins_a_conversation() -> None:
    assert follow(WATCHED, None, event("Paid", 1)) is None
    row = followed(event("Placed", 0, "o-1"))
    assert (row.id, row.key, row.started_us, row.due_us) == ("c", "o-1", T0, T0 + 10 * S)


def test_a_second_start_changes_no_deadline() -> None:
    row = followed(event("Placed", 0), event("Placed", 5))
    assert (row.started_us, row.due_us, row.last_us) == (T0, T0 + 10 * S, T0 + 5 * S)


@pytest.mark.parametrize(
    ("events", "after_s", "state"),
    [
        ([event("Placed", 0)], 9.9, "open"),
        ([event("Placed", 0)], 10, "overdue"),
        ([event("Placed", 0), event("Shipped", 10)], 50, "on-time"),
        ([event("Placed", 0), event("Cancelled", 10.1)], 50, "late"),
        ([event("Placed", 0), event("Shipped", 1), event("Shipped", 2)], 3, "twice"),
        ([event("Placed", 0), event("Shipped", 1), event("Cancelled", 20)], 30, "twice"),
    ],
)
def test_how_a_conversation_stands(events: list[EventRow], after_s: float, state: str) -> None:
    assert state_of(followed(*events), T0 + round(after_s * S)) == state


def test_an_overdue_one_that_something_holds_up_is_stuck_and_an_ended_one_never() -> None:
    row = followed(event("Placed", 0))
    assert state_of(row, T0 + 11 * S, stuck=True) == "stuck"
    assert state_of(row, T0 + 9 * S, stuck=True) == "open"
    ended = followed(event("Placed", 0), event("Shipped", 20))
    assert state_of(ended, T0 + 30 * S, stuck=True) == "late"


def test_the_first_end_counts() -> None:
    row = followed(event("Placed", 0), event("Cancelled", 1), event("Shipped", 2))
    assert (row.end, row.ended_us, row.ends) == ("Cancelled", T0 + S, 2)


def test_events_that_clocks_put_in_another_order_leave_the_newest_as_the_last() -> None:
    row = followed(event("Placed", 0), event("Paid", 5), event("Placed", 3))
    assert (row.last, row.last_us) == ("Paid", T0 + 5 * S)


@pytest.mark.parametrize(
    ("events", "after_s", "state", "reached_s"),
    [
        ([], 1, "pending", None),
        ([], 2, "missed", None),
        ([event("Shipped", 1)], 1, "missed", None),
        ([event("Paid", 2)], 5, "reached", 2),
        ([event("Paid", 3)], 5, "late", 3),
        ([event("Paid", 1), event("Paid", 4)], 5, "reached", 1),
    ],
)
def test_how_a_milestone_stands(
    events: list[EventRow], after_s: float, state: str, reached_s: float | None
) -> None:
    row = followed(event("Placed", 0), *events)
    (passed,) = milestones_of(WATCHED, row, T0 + round(after_s * S))
    assert (passed.type, passed.state, passed.due_us) == ("Paid", state, T0 + 2 * S)
    assert passed.reached_us == (None if reached_s is None else T0 + reached_s * S)


def test_without_the_contract_at_hand_milestones_that_were_reached_are_known() -> None:
    row = followed(event("Placed", 0), event("Paid", 3))
    (passed,) = milestones_of(None, row, T0 + 5 * S)
    assert (passed.type, passed.reached_us, passed.state) == ("Paid", T0 + 3 * S, "reached")
