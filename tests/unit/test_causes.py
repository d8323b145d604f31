"""What flowed in a conversation becomes a tree of causes, and the tree a picture that fits."""

from __future__ import annotations

from typing import Any

import click
import pytest
from msgspec import Raw

from pavane.app import RunHistory, RunStatus
from pavane.cli.text import clock, columns
from pavane.cli.tree import draw_conversation
from pavane.core.baton import Stop
from pavane.core.codec import encode_error
from pavane.core.journal import Entry
from pavane.engine.mailbox import MAILBOX, Kept
from pavane.engine.publishing import derived_id
from pavane.insight.causes import DEPTH_MAX, Node, Tree, tree_of, walk
from pavane.insight.timeline import Timeline, timeline
from pavane.observe.conversations import ConversationStatus
from pavane.observe.traffic import Traffic
from pavane.observe.trouble import Trouble, find_trouble
from pavane.stores.eventlog import AwaitRow, DeadRow, EventRow, HandlerRow, MarkRow, ParkedEvent
from pavane.stores.port import LAST_US, RunRow

T0, MS = 1_800_000_000_000_000, 1000
CHARGE, SEND, AUDIT = (
    HandlerRow(1, "pay", "charge", ["Placed"], 0),
    HandlerRow(2, "ship", "send", ["Paid"], 0),
    HandlerRow(3, "pay", "audit", ["Placed"], 0),
)


def at(ms: int) -> int:
    return T0 + ms * MS


class Story:
    """What flowed, written down step by step."""

    def __init__(self, *handlers: HandlerRow) -> None:
        self.traffic = Traffic("c", [], handlers=list(handlers))
        self.runs: list[Timeline] = []

    def event(
        self, type: str, ms: int, *, id: str = "", cause: str = "", source: str = "app",
        key: str = "k",
    ) -> EventRow:  # fmt: skip
        pos = len(self.traffic.events) + 1
        row = EventRow(id or "c", type, 1, key, source, at(ms), "c", cause, "", b"{}", 0, pos)
        self.traffic.events.append(row)
        return row

    def published(
        self, handler: HandlerRow, event: EventRow, type: str, ms: int, n: int = 1
    ) -> EventRow:
        id = derived_id("c", f"{event.id}>{handler.service}.{handler.name}#{n}")
        return self.event(type, ms, id=id, cause=event.id, source=handler.service)

    def handled(self, handler: HandlerRow, event: EventRow, ms: int, took_ms: int) -> None:
        mark = MarkRow(handler.no, event.pos, at(ms), took_ms * MS, 1, "done")
        self.traffic.marks.append(mark)

    def waits(self, handler: HandlerRow) -> None:
        self.traffic.reached[handler.no, 0] = 0

    def parked(self, handler: HandlerRow, event: EventRow, due_us: int, error: bytes) -> None:
        row = ParkedEvent(handler.no, event.pos, 0, event.key, 3, due_us, at(5), error)
        self.traffic.parked.append(row)

    def dead(
        self, handler: HandlerRow, event: EventRow, error: Exception, attempts: int = 5
    ) -> None:
        row = DeadRow(7, handler.no, event.pos, 0, event.key, event.type, event.id, at(90),
                      attempts, "what is the same for all", encode_error(error), b"{}")  # fmt: skip
        self.traffic.dead.append(row)
        self.traffic.marks.append(MarkRow(handler.no, event.pos, at(90), 80 * MS, 5, "dead"))

    def run(
        self, id: str, *entries: Entry, cause: str = "", status: str = "completed",
        reason: str = "", trail: tuple[tuple[str, int], ...] = (("orders", 10),),
    ) -> None:  # fmt: skip
        stops = [Stop(service, at(ms), hop) for hop, (service, ms) in enumerate(trail)]
        ended_us = at(100) if status in ("completed", "failed") else None
        said = RunStatus(
            id, "fulfil", 1, "choreography", status, reason, "orders", "orders", len(stops) - 1,
            at(10), ended_us, 0, {}, "c", cause,
        )  # fmt: skip
        self.runs.append(timeline(RunHistory(said, [*entries], stops, [], []), now_us=at(1000)))
        self.traffic.runs.append(a_row(id, status, reason))

    def tree(self) -> Tree:
        return tree_of(self.traffic, self.runs, now_us=at(1000))

    def trouble(self) -> Trouble:
        return find_trouble(self.traffic, at(1000))


def a_row(id: str, status: Any, reason: str) -> RunRow:
    return RunRow(
        no=1, service="orders", id=id, target=0, workflow="fulfil", version=1, mode="choreography",
        home="orders", status=status, holder="orders", hop=0, header=b"{}", trail=b"[]",
        attributes=b"{}", wake_us=None, reason=reason, deaths=0, started_us=at(10), ended_us=None,
        result=None, undone=0, entries=1,
    )  # fmt: skip


def outline(tree: Tree) -> list[str]:
    """Write the tree as indented names."""

    def lines(node: Node, depth: int) -> list[str]:
        sign = "" if node.condition == "done" else f" ({node.condition})"
        below = [line for child in node.children for line in lines(child, depth + 1)]
        return [f"{'  ' * depth}{node.kind} {node.label}{sign}", *below]

    return [line for root in tree.roots for line in lines(root, 0)]


def only(tree: Tree, kind: str) -> Node:
    (node,) = [node for root in tree.roots for node in walk(root) if node.kind == kind]
    return node


# -- the tree ----------------------------------------------------------------------------------


def test_an_event_stands_below_the_handler_that_published_it() -> None:
    story = Story(CHARGE, SEND)
    placed = story.event("Placed", 0)
    story.handled(CHARGE, placed, 20, 15)
    paid = story.published(CHARGE, placed, "Paid", 20)
    story.handled(SEND, paid, 40, 10)
    story.published(SEND, paid, "Shipped", 40)
    assert outline(story.tree()) == [
        "event Placed",
        "  handler pay.charge",
        "    event Paid",
        "      handler ship.send",
        "        event Shipped (unhandled)",
    ]


def test_two_handlers_of_one_service_are_told_apart_by_what_they_published() -> None:
    story = Story(CHARGE, AUDIT)
    placed = story.event("Placed", 0)
    story.handled(CHARGE, placed, 20, 15)
    story.handled(AUDIT, placed, 10, 5)
    story.published(CHARGE, placed, "Paid", 20)
    story.published(AUDIT, placed, "Audited", 10, n=2)
    assert outline(story.tree()) == [
        "event Placed",
        "  handler pay.charge",
        "    event Paid (unhandled)",
        "  handler pay.audit",
        "    event Audited (unhandled)",
    ]


def test_a_handling_spans_from_its_first_attempt_to_its_commit() -> None:
    story = Story(CHARGE)
    story.handled(CHARGE, story.event("Placed", 0), 20, 15)
    node = only(story.tree(), "handler")
    assert (node.from_us, node.until_us, node.attempts) == (at(5), at(20), 1)


def test_a_failing_handler_tells_its_next_attempt_and_its_last_error() -> None:
    story = Story(CHARGE)
    story.parked(CHARGE, story.event("Placed", 0), at(1500), encode_error(OSError("no bank")))
    node = only(story.tree(), "handler")
    assert (node.condition, node.attempts, node.next_us) == ("parked", 3, at(1500))
    assert node.text == "OSError: no bank"
    assert node.until_us is None
    assert story.tree().is_open


def test_what_is_behind_another_of_its_key_waits() -> None:
    story = Story(CHARGE)
    story.parked(CHARGE, story.event("Placed", 0), LAST_US, b"null")
    node = only(story.tree(), "handler")
    assert (node.condition, node.text) == ("waiting", "behind an earlier event of its key")


def test_a_dead_letter_is_a_leaf_with_its_error() -> None:
    story = Story(CHARGE)
    story.dead(CHARGE, story.event("Placed", 0), ValueError("no funds"))
    node = only(story.tree(), "handler")
    assert (node.condition, node.attempts, node.text) == ("dead", 5, "ValueError: no funds")
    assert (node.from_us, node.until_us) == (at(10), at(90))


def test_a_handler_that_has_yet_to_come_to_the_event_waits_and_one_that_passed_it_is_left_out() -> (
    None
):
    story = Story(CHARGE)
    story.event("Placed", 0)
    assert outline(story.tree()) == ["event Placed (unhandled)"]
    story.waits(CHARGE)
    assert outline(story.tree()) == ["event Placed", "  handler pay.charge (waiting)"]
    assert only(story.tree(), "handler").text == "not handled yet"


def test_a_paused_handler_says_so() -> None:
    paused = HandlerRow(1, "pay", "charge", ["Placed"], 0, LAST_US, "breaker: 20 of 20 failed")
    story = Story(paused)
    story.event("Placed", 0)
    story.waits(paused)
    assert only(story.tree(), "handler").text == "paused: breaker: 20 of 20 failed"


def test_a_run_shows_its_steps_hops_and_what_it_published() -> None:
    story = Story()
    entries = [
        Entry("start", at(10), issued=["step pay.charge"]),
        Entry("done", at(40), 0, Raw(b"1"), "pay", 2, at(30), issued=["publish orders.Shipped"]),
    ]
    story.run("c", *entries, trail=(("orders", 10), ("pay", 12)))
    story.event("Shipped", 40, id="c#1", cause="c", source="orders")
    assert outline(story.tree()) == [
        "run fulfil",
        "  step pay.charge",
        "  hop pay.hop 1",
        "  event Shipped (unhandled)",
    ]


def test_a_run_stands_below_the_handler_that_started_it() -> None:
    start = HandlerRow(4, "orders", "start-fulfil", ["Placed"], 0)
    story = Story(start, CHARGE)
    placed = story.event("Placed", 0)
    story.handled(start, placed, 5, 1)
    story.handled(CHARGE, placed, 20, 5)
    story.run("c.fulfil", Entry("start", at(10)), cause="c")
    story.published(CHARGE, placed, "Paid", 20)
    assert outline(story.tree()) == [
        "event Placed",
        "  handler orders.start-fulfil",
        "    run fulfil",
        "  handler pay.charge",
        "    event Paid (unhandled)",
    ]


def test_a_run_with_the_id_of_an_event_takes_nothing_from_it() -> None:
    story = Story(CHARGE)
    placed = story.event("Placed", 0)
    story.handled(CHARGE, placed, 20, 5)
    story.run("c", Entry("start", at(10)), cause="c")
    story.published(CHARGE, placed, "Paid", 20)
    assert outline(story.tree()) == [
        "event Placed",
        "  run fulfil",
        "  handler pay.charge",
        "    event Paid (unhandled)",
    ]


def test_children_and_continuations_stand_below_their_run() -> None:
    story = Story()
    story.run("c", Entry("start", at(10), issued=["child orders.fulfil"]))
    story.run("c/0", Entry("start", at(12)), cause="c")
    story.run("c~2", Entry("start", at(60)), cause="c")
    names = [(node.kind, node.id) for root in story.tree().roots for node in walk(root)]
    assert names == [("run", "c"), ("run", "c/0"), ("run", "c~2")]


def test_a_run_that_was_given_an_event_is_shown_below_it() -> None:
    story = Story()
    story.run("r", Entry("start", at(10)))
    event = story.event("Paid", 20, id="e")
    story.traffic.awaits.append(
        AwaitRow("orders", "Paid", "k", "r", "r#0", at(15), b"", pos=event.pos)
    )
    assert outline(story.tree()) == ["run fulfil", "event Paid", "  receive fulfil"]


def test_a_run_of_another_conversation_that_took_the_event_is_shown_below_it() -> None:
    story = Story()
    event = story.event("Paid", 20, id="c")
    story.traffic.awaits.append(
        AwaitRow("orders", "Paid", "k", "r-1", "r-1#0", at(15), b"", pos=event.pos)
    )
    assert outline(story.tree()) == ["event Paid", "  receive r-1"]
    assert "run r-1 receives it" in "\n".join(picture(story, 100))


def test_an_event_that_stays_in_a_mailbox_says_so_and_who_took_another_one() -> None:
    mailbox = HandlerRow(6, "orders", MAILBOX, ["Paid"], 0)
    story = Story(mailbox)
    event = story.event("Paid", 20, id="c")
    story.handled(mailbox, event, 21, 1)
    story.traffic.mailed.add((mailbox.no, event.pos))
    story.traffic.kept.append(Kept("orders", event.pos, at(9000), {"r": True}))
    text = "\n".join(picture(story, 100))
    assert "unhandled" not in text
    assert "in the mailbox of orders" in text
    assert f"kept until {clock(at(9000))}, nobody took it; run r took another one" in text


def test_an_event_that_a_mailbox_has_yet_to_take_waits_there() -> None:
    mailbox = HandlerRow(6, "orders", MAILBOX, ["Paid"], 0)
    story = Story(mailbox)
    story.event("Paid", 20, id="c")
    story.waits(mailbox)
    text = "\n".join(picture(story, 100))
    assert "the mailbox of orders" in text
    assert "~" not in text
    assert story.trouble().sentence == "the mailbox of orders has yet to handle Paid"


def test_what_has_an_unknown_cause_is_a_root() -> None:
    story = Story()
    story.event("Placed", 0)
    story.event("Late", 50, id="x", cause="pruned")
    assert outline(story.tree()) == ["event Placed (unhandled)", "event Late (unhandled)"]


def test_causes_that_go_in_a_circle_end_nowhere_but_are_all_shown() -> None:
    story = Story()
    story.event("A", 0, id="a", cause="b")
    story.event("B", 1, id="b", cause="a")
    assert outline(story.tree()) == ["event A", "  event B (unhandled)"]


def test_a_very_long_chain_goes_on_as_another_root() -> None:
    story = Story()
    for number in range(3 * DEPTH_MAX):
        story.event("A", number, id=str(number), cause=str(number - 1) if number else "")
    tree = story.tree()
    nodes = [node.id for root in tree.roots for node in walk(root)]
    assert sorted(map(int, nodes)) == list(range(3 * DEPTH_MAX))
    assert len(tree.roots) == 3


def test_the_event_that_tells_of_a_start_is_not_shown() -> None:
    story = Story()
    story.event("~start-fulfil", 10, id="c#start")
    story.run("c", Entry("start", at(10)))
    assert outline(story.tree()) == ["run fulfil"]


# -- what holds it up --------------------------------------------------------------------------


def test_a_dead_letter_makes_it_stuck_and_names_the_handler() -> None:
    story = Story(CHARGE)
    story.dead(CHARGE, story.event("Placed", 0), ValueError("no funds"))
    trouble = story.trouble()
    assert trouble.stuck
    assert trouble.last == "Placed"
    assert trouble.sentence == "pay.charge gave up Placed after 5 attempts: ValueError: no funds"


def test_a_handler_that_has_yet_to_come_is_the_consumer_expected_next() -> None:
    story = Story(CHARGE)
    story.event("Placed", 0)
    story.waits(CHARGE)
    (expected,) = story.trouble().expected
    assert (expected.what, expected.name, expected.waits_for) == ("handler", "pay.charge", "Placed")
    assert story.trouble().stuck


def test_what_only_starts_runs_is_told_in_words() -> None:
    start = HandlerRow(4, "orders", "start-fulfil", ["Placed"], 0)
    story = Story(start)
    story.dead(start, story.event("Placed", 0), ValueError("no"), attempts=1)
    said = "the start of orders.fulfil gave up Placed after 1 attempt: ValueError: no"
    assert story.trouble().sentence == said
    assert "✗ the start of orders.fulfil" in "\n".join(picture(story, 100))


def test_a_run_whose_start_is_the_last_event_is_told_in_words() -> None:
    story = Story()
    story.event("~start-fulfil", 10, id="c#start")
    assert story.trouble().sentence == "nothing reacts to the start of fulfil"
    lines = picture(story, 100)
    assert any(line.startswith("last event     the start of fulfil") for line in lines)


def test_a_service_that_no_node_hosts_is_the_cause() -> None:
    story = Story(CHARGE)
    story.event("Placed", 0)
    story.waits(CHARGE)
    story.traffic.hosted = {"ship"}
    said = "pay.charge has yet to handle Placed (no node hosts pay)"
    assert story.trouble().sentence == said
    story.parked(CHARGE, story.traffic.events[0], at(1500), b"null")
    assert story.trouble().sentence == said
    assert story.trouble().stuck


def test_a_run_that_waits_for_a_service_that_no_node_hosts_is_stuck() -> None:
    story = Story()
    story.run("r", Entry("start", at(10), issued=["step pay.charge"]), status="running")
    story.traffic.hosted = {"orders"}
    story.traffic.needs["r"] = {"pay"}
    assert story.trouble().sentence == "run r waits for pay (no node hosts pay)"
    assert story.trouble().stuck
    story.traffic.hosted = {"orders", "pay"}
    assert not story.trouble().stuck


def test_a_breaker_that_tries_again_by_itself_is_not_stuck() -> None:
    reason = "breaker: 20 of 20 failed"
    broken = HandlerRow(1, "pay", "charge", ["Placed"], 0, at(2000), reason)
    story = Story(broken)
    story.event("Placed", 0)
    story.waits(broken)
    assert not story.trouble().stuck
    said = "pay.charge has yet to handle Placed (paused: breaker: 20 of 20 failed)"
    assert story.trouble().sentence == said
    story.traffic.hosted = set()
    assert story.trouble().stuck


def test_an_attempt_that_follows_moves_it() -> None:
    story = Story(CHARGE)
    story.parked(CHARGE, story.event("Placed", 0), at(1500), b"null")
    assert not story.trouble().stuck


def test_nothing_that_reacts_is_stuck_too() -> None:
    story = Story()
    story.event("Placed", 0)
    assert story.trouble().stuck
    assert story.trouble().sentence == "nothing reacts to Placed"


@pytest.mark.parametrize(
    ("status", "reason", "stuck", "text"),
    [
        ("running", "", False, "it goes on after its start"),
        ("waiting", "timer", False, "run r waits for timer"),
        ("waiting", "event Paid of k", True, "run r waits for event Paid of k"),
        ("waiting", "event Paid of k, timer", False, "run r waits for event Paid of k, timer"),
        ("stuck", "Quarantined: five\nmore", True, "run r is stuck: Quarantined: five"),
        ("failed", "ValueError: no", True, "run r failed: ValueError: no"),
    ],
)
def test_a_run_moves_it_or_holds_it_up(status: str, reason: str, stuck: bool, text: str) -> None:
    story = Story()
    story.run("r", Entry("start", at(10)), status=status, reason=reason)
    assert (story.trouble().stuck, story.trouble().sentence) == (stuck, text)


def test_the_last_event_is_not_the_one_that_tells_it_is_overdue() -> None:
    story = Story()
    story.event("Placed", 0)
    story.event("ConversationOverdue", 500, id="o", cause="c")
    assert story.trouble().last == "Placed"


def test_the_last_event_is_not_one_that_reacts_to_it_being_overdue() -> None:
    story = Story()
    story.event("Placed", 0)
    story.event("ConversationOverdue", 500, id="o", cause="c")
    story.event("Escalated", 510, id="e", cause="o")
    story.event("Mailed", 520, id="m", cause="e")
    assert story.trouble().last == "Placed"


def test_who_is_told_that_it_is_overdue_is_not_expected_next() -> None:
    alarm = HandlerRow(5, "desk", "alarm", ["ConversationOverdue"], 0)
    story = Story(alarm)
    story.event("Placed", 0)
    story.event("ConversationOverdue", 500, id="o", cause="c")
    story.waits(alarm)
    assert story.trouble().expected == []


# -- the picture -------------------------------------------------------------------------------


def full_story() -> Story:
    story = Story(CHARGE, SEND, AUDIT)
    placed = story.event("Placed", 0, key="o-1")
    story.handled(CHARGE, placed, 20, 15)
    story.dead(AUDIT, placed, ValueError("much too long a text " * 9))
    paid = story.published(CHARGE, placed, "Paid", 20)
    story.parked(SEND, paid, at(1500), encode_error(OSError("no van")))
    story.run("r", Entry("start", at(10), issued=["step pay.charge"]), cause="c", status="running")
    return story


STATUS = ConversationStatus(
    "c", "sales", "stuck", "o-1", T0, at(500), None, "", 0, "Paid", at(20), [], True
)


def picture(story: Story, width: int, **options: Any) -> list[str]:
    lines = draw_conversation(story.tree(), [STATUS], story.trouble(), width=width, **options)
    return [click.unstyle(line) for line in lines]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("unicode", [True, False])
def test_no_line_is_wider_than_the_terminal(width: int, unicode: bool) -> None:
    lines = picture(full_story(), width, unicode=unicode)
    assert max(map(columns, lines)) <= width
    assert unicode or all(line.isascii() for line in lines)


def test_the_picture_says_what_happened() -> None:
    text = "\n".join(picture(full_story(), 100))
    assert "sales stuck, due within 500ms" in text
    assert "◆ Placed  o-1" in text
    assert "✓ pay.charge" in text
    assert "×5" in text
    assert "gave up: ValueError: much too long" in text
    assert "attempt 3 in 500ms; the last one failed with OSError: no van" in text
    assert "last event" in text
    assert "dead letter" in text


def test_a_deep_chain_still_shows_its_names() -> None:
    story = Story()
    for number in range(30):
        story.event(f"Event{number}", number, id=str(number), cause=str(number - 1) or "")
    lines = picture(story, 80)
    assert any("Event29" in line for line in lines)
    assert max(map(columns, lines)) <= 80


def test_with_a_height_earlier_rows_are_left_out() -> None:
    story = Story()
    for number in range(100):
        story.event("A", number, id=str(number))
    lines = picture(story, 80, height=20)
    assert len(lines) == 20
    assert any("earlier rows not shown" in line for line in lines)
