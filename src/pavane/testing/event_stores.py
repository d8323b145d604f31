"""The event half of the conformance suite: what `stores/eventlog.py` promises; see `stores.py`."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec

from pavane.errors import LeaseLost, PavaneError, StoreError, WorkFailed
from pavane.stores.eventlog import (
    AwaitRow,
    ConversationFilter,
    ConversationRow,
    DeadFilter,
    DeadRow,
    EventFilter,
    EventRow,
    HandlerRow,
    HandlerSpec,
    KeptRow,
    MarkRow,
    ParkedEvent,
    Reaction,
    ShadowRow,
    StateRow,
)
from pavane.stores.port import (
    LAST_US,
    Commit,
    Conflict,
    InboxRow,
    JournalRow,
    Store,
)
from pavane.testing.store_check import (
    CLOCK_US,
    Connections,
    Results,
    StoreCheck,
    a_commit,
    a_message,
    a_run,
    consume_all,
    into,
    joined,
    refused,
    whole_log,
    write,
    written,
)

LONG_LOG = 20_500
"""More events than a store is likely to look at in one go."""

_checks: list[StoreCheck] = []
_check = into(_checks)


# -- what is written ---------------------------------------------------------------------------


def an_event(
    store: Store, id: str, type: str = "Placed", key: str = "k", **changes: Any
) -> EventRow:
    """Return an event that was published just now, with `changes`."""
    row = EventRow(
        id=id, type=type, version=1, key=key, source="shop", at_us=1000, conversation=id, cause="",
        trace="", data=b'{"a":1}', slot=store.slot_of(key, id),
    )  # fmt: skip
    return msgspec.structs.replace(row, **changes)


def a_mark(handler: int, pos: int, **changes: Any) -> MarkRow:
    row = MarkRow(handler, pos, at_us=1000, took_us=5, attempts=1, outcome="done")
    return msgspec.structs.replace(row, **changes)


def custody(handler: int, event: EventRow, **changes: Any) -> ParkedEvent:
    """Return the row of an event that waits for its second attempt, with `changes`."""
    row = ParkedEvent(handler, event.pos, event.slot, event.key, 2, due_us=9000, began_us=1000)
    return msgspec.structs.replace(row, **changes)


def a_dead_letter(handler: int, event: EventRow, **changes: Any) -> DeadRow:
    row = DeadRow(
        no=0, handler=handler, pos=event.pos, slot=event.slot, key=event.key, type=event.type,
        event=event.id, at_us=2000, attempts=3, cause="KeyError", error=b'{"e":1}', data=event.data,
    )  # fmt: skip
    return msgspec.structs.replace(row, **changes)


def a_wait(run: str, id: str, **changes: Any) -> AwaitRow:
    return msgspec.structs.replace(
        AwaitRow("shop", "Paid", "k", run, id, at_us=1000, reply=b'{"to":1}'), **changes
    )


def a_conversation(id: str, contract: str = "orders", **changes: Any) -> ConversationRow:
    row = ConversationRow(contract, id, key="k", started_us=1000, due_us=5000, last="Placed")
    return msgspec.structs.replace(row, **changes)


def reacting(**parts: Any) -> Commit:
    return a_commit(reaction=Reaction(**parts))


async def react(store: Store, **parts: Any) -> None:
    """Write one reaction that must succeed."""
    await write(store, reaction=Reaction(**parts))


async def published(store: Store, *events: EventRow) -> list[EventRow]:
    """Publish events that are new, in one commit."""
    await write(store, events=events)
    assert all(event.pos for event in events)
    return list(events)


async def registered(store: Store, *names: str, types: Sequence[str] = ("Placed",)) -> list[int]:
    """Register handlers of the shop that begin at the log's beginning; return their numbers."""
    specs = [HandlerSpec("shop", name, tuple(types), since_us=0) for name in names]
    return [row.no for row in await store.register_handlers(specs)]


async def caught_up(store: Store, *handlers: int) -> None:
    """Move the handlers' cursors to the log's end, in every slot."""
    head = await store.events_head()
    slots = range(store.partitions)
    await react(store, cursors=[(no, slot, head) for no in handlers for slot in slots])


async def all_events(store: Store) -> list[EventRow]:
    return await store.read_events(0, LAST_US, 100_000)


async def ids_in_log(store: Store) -> list[str]:
    return [event.id for event in await all_events(store)]


# -- the log of events -------------------------------------------------------------------------


@_check
async def an_empty_store_finds_no_events(connections: Connections) -> None:
    store = await connections.open()
    assert await store.events_head() == 0
    assert await all_events(store) == []
    assert await store.find_events(EventFilter()) == []
    assert await store.event("e") is None
    assert await store.events_at([1]) == {}
    assert await store.event_types() == []
    assert await store.register_handlers([]) == []
    assert await store.handler_rows() == []
    assert await store.cursors(1) == {}
    assert await store.backlog(1) == 0
    assert await store.marks(1, 0, LAST_US) == []
    assert await store.marks_at([1]) == []
    assert await store.parked_events(1, [0], 0, 10) == []
    assert await store.parked_at([1]) == []
    assert await store.parked_count(1) == 0
    assert await store.dead_letters(DeadFilter()) == []
    assert await store.dead_counts(DeadFilter()) == []
    assert await store.state("shop", "s", "k") is None
    assert await store.shadows(1, 10) == []
    assert await store.awaits("shop", "Paid", "k") == []
    assert await store.awaits_of("r") == []
    assert await store.kept_events("shop", "Paid", "k") == []
    assert await store.conversations(ConversationFilter()) == []
    assert await store.conversation("orders", "c") is None
    assert await store.runs_in("c") == []
    assert await store.prune_events(LAST_US, 10) == 0


@_check
async def an_event_is_read_back_as_it_was(connections: Connections) -> None:
    writer, reader = await connections.open(), await connections.open()
    event = an_event(
        writer, "e", "Paid", version=3, key="ä\nb", source="bank", at_us=77, conversation="c",
        cause="d", trace="00-1", data='{"text":"🙂"}'.encode(),
    )  # fmt: skip
    await published(writer, event)
    assert event.pos == 1
    for store in (writer, reader):
        assert await all_events(store) == [event]
        assert await store.find_events(EventFilter()) == [event]
        assert await store.event("e") == event
        assert await store.events_at([1, 2]) == {1: event}
        assert await store.event_types() == [("Paid", 3, 1)]
        assert await store.events_head() == 1


@_check
async def a_slot_is_the_same_for_all_and_follows_the_key(connections: Connections) -> None:
    one, two = await connections.open(), await connections.open()
    slots = {one.slot_of(f"k{at}", "e") for at in range(1000)}
    assert slots == set(range(one.partitions))
    assert one.slot_of("k", "e1") == one.slot_of("k", "e2") == two.slot_of("k", "e")
    assert {one.slot_of("", f"e{at}") for at in range(1000)} == slots, "its id, without a key"


@_check
async def events_given_and_events_read_are_nobody_elses(connections: Connections) -> None:
    store = await connections.open()
    event = an_event(store, "e")
    event.value = object()
    await published(store, event)
    for _ in range(2):  # first change what was given, then what was read
        event.type, event.data = "x", b"x"
        for read in (
            (await all_events(store))[0], (await store.events_at([1]))[1],
            (await store.find_events(EventFilter()))[0], await store.event("e") or event,
        ):  # fmt: skip
            assert (read.type, read.data, read.value) == ("Placed", b'{"a":1}', None)
            event = read
            event.type, event.data = "x", b"x"


@_check
async def a_reaction_given_and_rows_read_are_nobody_elses(connections: Connections) -> None:
    store = await connections.open()
    (no,) = await registered(store, "h")
    (event,) = await published(store, an_event(store, "e"))
    mark, parked, dead = a_mark(no, 1), custody(no, event), a_dead_letter(no, event)
    wait, kept = a_wait("r", "r#1"), KeptRow("shop", "Paid", "k", 1, 5000)
    shadow, talk = ShadowRow(no, 1, 1000, b"[1]"), a_conversation("c")
    await react(
        store, marks=[mark], parked=[parked], dead=[dead], awaited=[wait], kept=[kept],
        shadows=[shadow], conversations=[talk],
    )  # fmt: skip
    for _ in range(2):  # first change what was given, then what was read
        mark.by, parked.again, dead.asked, wait.pos = "x", "x", "x", 9
        kept.expires_us, shadow.events, talk.last = 9, b"x", "x"
        (mark,), (parked,) = await store.marks(no, 0, 9), await store.parked_at([1])
        (dead,), (wait,) = await store.dead_letters(DeadFilter()), await store.awaits_of("r")
        (kept,) = await store.kept_events("shop", "Paid", "k")
        (shadow,) = await store.shadows(no, 9)
        talk = await store.conversation("orders", "c") or talk
        assert (mark.by, parked.again, dead.asked, wait.pos) == ("", "", "", 0)
        assert (kept.expires_us, shadow.events, talk.last) == (5000, b"[1]", "Placed")
        (row,) = await store.handler_rows()
        assert row.types == ["Placed"]
        row.types.append("x")
        (await store.cursors(no))[0] = 99
        assert (await store.cursors(no))[0] == 0


@_check
async def events_are_read_by_range_type_and_slot(connections: Connections) -> None:
    store = await connections.open()
    types = ("Placed", "Paid", "Sent")
    given = [an_event(store, f"e{at}", types[at % 3], f"k{at}") for at in range(12)]
    await published(store, *given[:5])
    await published(store, *given[5:])

    async def positions(*query: Any) -> list[int]:
        return [event.pos for event in await store.read_events(*query)]

    assert [event.pos for event in given] == list(range(1, 13))
    assert await positions(0, 12, 100) == list(range(1, 13))
    assert await positions(3, 7, 100) == [4, 5, 6, 7]
    assert await positions(3, 7, 2) == [4, 5]
    assert await positions(3, LAST_US, 100) == list(range(4, 13)), "the range may be open"
    assert await positions(12, LAST_US, 100) == []
    assert await positions(7, 3, 100) == []
    assert await positions(0, 12, 0) == []
    assert await positions(0, 12, 100, ["Paid"]) == [2, 5, 8, 11]
    assert await positions(2, 11, 2, ["Paid", "Sent"]) == [3, 5]
    assert await positions(0, 12, 100, []) == []
    slots = sorted({event.slot for event in given})[1:4]
    wanted = [event.pos for event in given if event.slot in slots]
    assert await positions(0, 12, 100, None, slots) == wanted
    assert await positions(0, 12, 100, None, []) == []
    both = [event.pos for event in given if event.slot in slots and event.type == "Paid"]
    assert await positions(0, 12, 100, ["Paid"], slots) == both


@_check
async def events_are_found_by_filter_newest_first(connections: Connections) -> None:
    store = await connections.open()
    await published(
        store,
        an_event(store, "a", key="k1", at_us=10),
        an_event(store, "b", "Paid", "k2", source="bank", at_us=30, conversation="a", cause="a"),
        an_event(store, "c", "Sent", "k1", at_us=20, conversation="a", cause="b"),
        an_event(store, "d", key="k2", at_us=40),
    )

    async def ids(**which: Any) -> str:
        return "".join(event.id for event in await store.find_events(EventFilter(**which)))

    assert await ids() == "dcba"
    assert await ids(limit=2) == "dc"
    assert await ids(limit=0) == ""
    assert await ids(before=3) == "ba"
    assert await ids(types=("Paid", "Sent")) == "cb"
    assert await ids(key="k1") == "ca"
    assert await ids(key="") == ""
    assert await ids(source="bank") == "b"
    assert await ids(conversation="a") == "cba"
    assert await ids(conversation="a", before=3, limit=1) == "b"
    assert await ids(cause="b") == "c"
    assert await ids(since_us=30) == "db"
    assert await ids(since_us=20, conversation="a", key="k1", types=("Sent",)) == "c"


@_check
async def a_long_log_is_searched_to_its_ends(connections: Connections) -> None:
    store = await connections.open()
    (late,) = [row.no for row in await store.register_handlers([HandlerSpec("shop", "late", ())])]
    first = an_event(store, "first", "Rare", "rare", at_us=1)
    last = an_event(store, "last", "Rare", "rare", at_us=2)
    between = [an_event(store, f"e{at}", key=f"k{at % 50}", at_us=1) for at in range(LONG_LOG)]
    await published(store, first, *between, last)
    assert await store.read_events(0, LAST_US, 10, ["Rare"]) == [first, last]
    assert await store.read_events(0, LAST_US, 1, ["Rare"]) == [first]
    assert await store.read_events(1, last.pos, 10, ["Rare"], [last.slot]) == [last]
    assert len(await all_events(store)) == LONG_LOG + 2
    assert len(await store.read_events(5, LAST_US, LONG_LOG - 10)) == LONG_LOG - 10
    assert await store.find_events(EventFilter(key="rare")) == [last, first]
    assert await store.find_events(EventFilter(key="rare", before=last.pos)) == [first]
    assert await store.find_events(EventFilter(since_us=2)) == [last]
    rows = await store.register_handlers(
        [
            HandlerSpec("shop", "late", ("Rare",)),
            HandlerSpec("shop", "timed", ("Rare",), since_us=2),
            HandlerSpec("shop", "all", ("Placed",), since_us=0),
            HandlerSpec("shop", "future", ("Placed",), since_us=3),
        ]
    )
    assert [await store.backlog(row.no) for row in rows] == [2, 1, LONG_LOG, 0]
    assert set((await store.cursors(late)).values()) == {0}
    assert await store.event_types() == [("Placed", 1, LONG_LOG), ("Rare", 1, 2)]


@_check
async def types_are_counted_with_their_newest_version(connections: Connections) -> None:
    store = await connections.open()
    await published(store, an_event(store, "a"), an_event(store, "b", version=2))
    await published(store, an_event(store, "c", "Paid"), an_event(store, "d"))
    await write(store, events=[an_event(store, "d", version=9), an_event(store, "d", "Other")])
    assert await store.event_types() == [("Paid", 1, 1), ("Placed", 2, 3)]


@_check
async def an_id_is_in_the_log_once(connections: Connections) -> None:
    one, two = await connections.open(), await connections.open()
    first, again = an_event(one, "a"), an_event(one, "a", "Other")
    await write(one, events=[first, again, an_event(one, "b")])
    assert (first.pos, again.pos) == (1, 0), "within a commit"
    for store in (one, two):
        repeated, new = an_event(store, "a", "Other", data=b"2"), an_event(store, f"n{id(store)}")
        results = await written(
            store,
            a_commit(events=[repeated], journal=[JournalRow(1, int(store is one), b"[]")]),
            a_commit(events=[new, an_event(store, "b")]),
            a_commit(events=[an_event(store, new.id)]),
        )
        assert not any(results), "publishing twice is no conflict"
        assert repeated.pos == 0
        assert await store.event(new.id) == new
    assert len((await one.journals([1]))[1]) == 2, "the rest of the commit is written"
    log = await all_events(two)
    assert [event.id for event in log[:2]] == ["a", "b"]
    assert len(log) == 4
    assert log[0] == first
    assert await one.events_head() >= log[-1].pos
    (after,) = await published(two, an_event(two, "z"))
    assert after.pos > log[-1].pos
    assert await two.events_head() == after.pos


@_check
async def a_repeated_batch_of_many_changes_nothing(connections: Connections) -> None:
    store = await connections.open()
    given = await published(store, *(an_event(store, f"e{at}") for at in range(0, 700, 2)))
    mixed = [an_event(store, f"e{at}") for at in range(700)]
    results = await written(
        store, *(a_commit(events=mixed[at : at + 7]) for at in range(0, 700, 7))
    )
    assert not any(results)
    assert [event.pos > 0 for event in mixed] == [at % 2 == 1 for at in range(700)]
    new = [event for event in mixed if event.pos]
    assert await all_events(store) == [*given, *new]
    assert await store.event_types() == [("Placed", 1, 700)]


@_check
async def events_are_part_of_their_commit(connections: Connections) -> None:
    store = await connections.open()
    (no,) = await registered(store, "h")
    await write(store, journal=[JournalRow(1, 0, b"[]")])
    (result,) = await written(
        store,
        a_commit(
            events=[an_event(store, "lost")], journal=[JournalRow(1, 0, b"[]")],
            reaction=Reaction(marks=[a_mark(no, 1)], cursors=[(no, 0, 1)], members=[("c", "r")]),
        ),
    )  # fmt: skip
    assert isinstance(result, Conflict)
    assert await all_events(store) == []
    assert await store.marks(no, 0, LAST_US) == []
    assert (await store.cursors(no))[0] == 0
    message, event = a_message(store, "r#1"), an_event(store, "kept")
    await write(
        store, events=[event], messages=[message], runs=[a_run(store, 1, "r")],
        reaction=Reaction(marks=[a_mark(no, 9)], members=[("c", "r")]),
    )  # fmt: skip
    assert await all_events(store) == [event]
    assert [m.id for m in await whole_log(store)] == ["r#1"]
    assert await store.marks(no, 0, LAST_US) == [a_mark(no, 9)]
    assert await store.runs_in("c") == ["r"]


@_check
async def a_bad_commit_leaves_the_events_of_others_in_their_places(
    connections: Connections,
) -> None:
    store = await connections.open()
    await write(store, inbox=[InboxRow("shop", "i", 1)], events=[an_event(store, "known")])
    chance = random.Random(4)
    good: list[EventRow] = []
    for size in (1, 2, 3, 7, 16, 33):
        bad = set(chance.sample(range(size), k=min(size, chance.randrange(1, 4))))
        batch: list[Commit] = []
        again: list[EventRow] = []
        for at in range(size):
            events = [an_event(store, f"b{size}-{at}-{n}") for n in range(chance.randrange(3))]
            again.append(an_event(store, "known"))
            commit = a_commit(events=[*events, again[-1]])
            if at in bad:
                commit.inbox = [InboxRow("shop", "i", 2)]
            else:
                good += events
            batch.append(commit)
        results = await written(store, *batch)
        assert set(refused(results)) == bad
        assert all(event.pos == 0 for at, event in enumerate(again) if at not in bad)
    log = (await all_events(store))[1:]
    assert log == good, "in the order of the batch, and each was told its place"
    assert all(a.pos < b.pos for a, b in pairwise(log))
    assert await store.event_types() == [("Placed", 1, len(good) + 1)]


@_check
async def no_event_or_reaction_lands_under_a_lost_lease(connections: Connections) -> None:
    one, two = await connections.open(), await connections.open()
    lost = await joined(one)
    (no,) = await registered(one, "h")
    (event,) = await published(one, an_event(one, "e"))
    await react(one, parked=[custody(no, event)])
    await two.expire(await two.nodes())
    for size in (1, 30):
        batch = [
            a_commit(
                events=[an_event(one, f"n{at}")],
                reaction=Reaction(
                    marks=[a_mark(no, 1 + at)], unparked=[(no, 1)], cursors=[(no, event.slot, 9)],
                    dead=[a_dead_letter(no, event)], states=[StateRow("shop", "s", "k", b"1")],
                ),
            )
            for at in range(size)
        ]  # fmt: skip
        results = await written(one, *batch, fence=lost)
        assert all(isinstance(result, LeaseLost) for result in results)
    assert await all_events(two) == [event]
    assert await two.marks(no, 0, LAST_US) == []
    assert await two.parked_at([1]) == [custody(no, event)]
    assert set((await two.cursors(no)).values()) == {0}
    assert await two.dead_letters(DeadFilter()) == []
    assert await two.state("shop", "s", "k") is None


@_check
async def an_event_reader_skips_nothing_while_others_publish(connections: Connections) -> None:
    reader = await connections.open()
    writers = [await connections.open() for _ in range(2)]
    chance = random.Random(5)
    publishing = len(writers)
    read: list[EventRow] = []

    async def keep_publishing(name: str, store: Store) -> None:
        nonlocal publishing
        fence = await joined(store)
        serial = 0
        for _ in range(30):
            batch: list[Commit] = []
            for _ in range(chance.choice((1, 1, 2, 15))):
                events = [
                    an_event(store, f"{name}{serial + n}") for n in range(chance.randrange(3))
                ]
                serial += len(events)
                shared = an_event(store, f"shared{serial // 3}")  # each of the two may be first
                batch.append(a_commit(events=[*events, shared]))
            head = await store.events_head()
            assert not any(await written(store, *batch, fence=fence))
            assert all(e.pos > head or e.pos == 0 for commit in batch for e in commit.events)
        publishing -= 1

    async def keep_reading() -> None:
        after = 0
        while True:
            ended = not publishing
            head = await reader.events_head()
            while after < head:
                page = await reader.read_events(after, head, 7)
                read.extend(page)
                after = page[-1].pos if len(page) == 7 else head
                if chance.random() < 0.5:
                    await asyncio.sleep(0)
            if ended:
                return
            await asyncio.sleep(0)

    names = "ab"
    await asyncio.gather(keep_reading(), *map(keep_publishing, names, writers))
    assert read == await all_events(reader)
    assert len({event.id for event in read}) == len(read)
    for name in names:
        own = [event.id for event in read if event.id.startswith(name)]
        assert own == [f"{name}{at}" for at in range(len(own))], "in the order of submission"


@_check
async def events_and_reactions_that_cannot_be_stored_are_refused_alone(
    connections: Connections,
) -> None:
    store = await connections.open()
    fence = await joined(store)
    lone, large = "\ud800", 2**63
    event = an_event(store, "e")
    bad: list[dict[str, Any]] = [
        {"events": [msgspec.structs.replace(event, **change)]}
        for change in (
            {"id": lone}, {"type": lone}, {"source": lone}, {"conversation": lone},
            {"cause": lone}, {"trace": lone}, {"data": b"\xff"}, {"at_us": large},
            {"version": large}, {"slot": large},
        )
    ] + [
        {"reaction": reaction}
        for reaction in (
            Reaction(marks=[a_mark(1, large)]), Reaction(marks=[a_mark(1, 1, by=lone)]),
            Reaction(remarks=[a_mark(1, 1, took_us=large)]),
            Reaction(parked=[custody(1, event, error=b"\xff")]),
            Reaction(parked=[custody(1, event, data=b"\xff")]),
            Reaction(dead=[a_dead_letter(1, event, cause=lone)]),
            Reaction(dead=[a_dead_letter(1, event, at_us=-large - 1)]),
            Reaction(asked=[(1, lone)]), Reaction(undead=[large]), Reaction(unparked=[(1, large)]),
            Reaction(unawaited=[(lone, "*")]),
            Reaction(states=[StateRow("shop", "s", lone, b"1")]),
            Reaction(states=[StateRow("shop", "s", lone, None)]),
            Reaction(states=[StateRow("shop", "s", "k", b"\xff")]),
            Reaction(shadows=[ShadowRow(1, 1, 1, b"\xff")]), Reaction(awaited=[a_wait(lone, "i")]),
            Reaction(kept=[KeptRow("shop", "Paid", "k", 1, large)]),
            Reaction(cursors=[(1, 1, large)]), Reaction(conversations=[a_conversation(lone)]),
            Reaction(conversations=[a_conversation("c", milestones=b"\xff")]),
            Reaction(members=[("c", lone)]),
        )
    ]  # fmt: skip
    batch: list[Commit] = []
    for at, parts in enumerate(bad):
        batch.append(a_commit(inbox=[InboxRow("shop", f"before{at}", 1)], **parts))
        batch.append(a_commit(events=[an_event(store, f"good{at}")]))
    results = await written(store, *batch, fence=fence)
    assert refused(results) == list(range(0, len(batch), 2))
    for result in results[::2]:
        assert isinstance(result, PavaneError)
        assert not isinstance(result, (Conflict, LeaseLost, StoreError))
        assert "cannot be stored" in str(result)
    assert await ids_in_log(store) == [f"good{at}" for at in range(len(bad))]
    assert await store.seen("shop", [f"before{at}" for at in range(len(bad))]) == set()


@_check
async def work_that_fails_takes_the_rest_of_its_chain_along(connections: Connections) -> None:
    store = await connections.open()
    if not store.features.transactions:
        return

    def fail(connection: Any, state: bytes | None) -> Any:
        raise KeyError("x")

    batch = [a_commit(events=[an_event(store, f"e{at}")]) for at in range(5)]
    batch[0].chain = batch[1].chain = batch[4].chain = 7
    batch[1].work = batch[3].work = fail
    results = await written(store, *batch)
    assert [type(result) for result in results] == [
        type(None), WorkFailed, type(None), WorkFailed, Conflict,
    ]  # fmt: skip
    assert await ids_in_log(store) == ["e0", "e2"]


# -- handlers ----------------------------------------------------------------------------------


@_check
async def handlers_begin_where_they_are_told(connections: Connections) -> None:
    store = await connections.open()
    # The clocks of publishers differ: times need not rise with positions.
    times = (10, 30, 20, 40)
    await published(store, *(an_event(store, f"e{at_us}", at_us=at_us) for at_us in times))
    begins = {None: 4, 0: 0, 10: 0, 15: 1, 20: 1, 30: 1, 31: 3, 40: 3, 41: 4}
    specs = [HandlerSpec("shop", f"since {at}", ("Placed",), at) for at in begins]
    before_us = store.now_us()
    rows = await store.register_handlers(specs)
    assert [(row.service, row.name, row.types) for row in rows] == [
        (spec.service, spec.name, ["Placed"]) for spec in specs
    ]
    after_us = store.now_us()
    assert all(before_us - CLOCK_US <= row.created_us <= after_us + CLOCK_US for row in rows)
    assert all((row.paused_until_us, row.reason) == (0, "") for row in rows)
    slots = range(store.partitions)
    for row, position in zip(rows, begins.values(), strict=True):
        assert await store.cursors(row.no) == dict.fromkeys(slots, position), row.name
    assert [await store.backlog(row.no) for row in rows] == [4 - at for at in begins.values()]


@_check
async def handlers_are_made_known_once(connections: Connections) -> None:
    one, two = await connections.open(), await connections.open()
    specs = [
        HandlerSpec("shop", "b", ("Paid", "Placed"), 0), HandlerSpec("shop", "a", ("Placed",)),
        HandlerSpec("bank", "b", ("Placed",)),
    ]  # fmt: skip
    rows = await one.register_handlers(specs)
    await published(one, an_event(one, "e"))
    await react(one, cursors=[(rows[0].no, 0, 1)])
    assert await one.register_handlers(specs) == rows
    assert await two.register_handlers(specs[::-1]) == rows[::-1], "in the order given"
    assert await two.handler_rows() == [rows[2], rows[1], rows[0]], "by service and name"
    assert len({row.no for row in rows}) == 3
    changed = HandlerSpec("shop", "b", ("Sent", "Placed"), 99)
    (row,) = await two.register_handlers([changed])
    assert row == msgspec.structs.replace(rows[0], types=["Placed", "Sent"])
    assert (await one.cursors(row.no))[0] == 1, "it goes on where it was"
    assert (await one.handler_rows())[2] == row


@_check
async def clients_that_register_at_once_agree(connections: Connections) -> None:
    one, two = await connections.open(), await connections.open()
    await published(one, an_event(one, "e"))
    specs = [HandlerSpec("shop", f"h{at}", ("Placed",), 0) for at in range(5)]
    both = await asyncio.gather(
        one.register_handlers(specs), two.register_handlers([*specs[3:], *specs[:3]])
    )
    assert sorted(both[1], key=lambda row: row.name) == both[0] == await one.handler_rows()
    for row in both[0]:
        assert await two.cursors(row.no) == dict.fromkeys(range(two.partitions), 0)


@_check
async def a_handler_is_paused_and_goes_on(connections: Connections) -> None:
    one, two = await connections.open(), await connections.open()
    no, other = await registered(one, "h", "i")

    async def paused() -> list[tuple[int, str]]:
        return [(row.paused_until_us, row.reason) for row in await one.handler_rows()]

    for until_us, reason in ((LAST_US, "by hand"), (5000, "too many failures"), (0, "")):
        await two.pause_handler(no, until_us, reason)
        await two.pause_handler(no + other + 1, until_us, "nobody")
        assert await paused() == [(until_us, reason), (0, "")]
    await two.pause_handler(no, LAST_US, "by hand")
    await registered(one, "h", types=("Paid",))
    assert await paused() == [(LAST_US, "by hand"), (0, "")], "registering does not resume it"


@_check
async def a_handler_is_forgotten_with_all_that_is_its_own(connections: Connections) -> None:
    one, two = await connections.open(), await connections.open()
    no, other = await registered(one, "h", "i")
    events = await published(one, *(an_event(one, f"e{at}", key="k") for at in range(3)))
    first, second, third = events
    for handler in (no, other):
        await react(
            one, marks=[a_mark(handler, first.pos)], parked=[custody(handler, second)],
            shadows=[ShadowRow(handler, first.pos, 1, b"[]")],
            cursors=[(handler, first.slot, first.pos)],
        )  # fmt: skip
    await react(one, dead=[a_dead_letter(no, third)])
    assert not await two.forget_handler(no), "what is given up for people is theirs to drop"
    assert [row.no for row in await one.handler_rows()] == [no, other]
    assert (await one.cursors(no))[first.slot] == first.pos
    assert await one.parked_count(no) == 1
    (letter,) = await one.dead_letters(DeadFilter())
    await react(one, undead=[letter.no])
    for _ in range(2):
        assert await two.forget_handler(no)
        assert [row.no for row in await one.handler_rows()] == [other]
        assert await one.cursors(no) == {}
        assert await one.marks(no, 0, LAST_US) == []
        assert await one.shadows(no, 9) == []
        assert [row.handler for row in await one.parked_at([second.pos])] == [other]
        assert [row.pos for row in await one.marks(other, 0, LAST_US)] == [first.pos]
        assert len(await one.shadows(other, 9)) == 1
    await react(one, cursors=[(no, first.slot, third.pos)])  # by a node that did not know
    assert await one.cursors(no) == {}
    (again,) = await registered(one, "h")
    assert again not in (no, other)
    assert await one.backlog(again) == 3, "it is a new one, and this one begins at the beginning"


@_check
async def a_handler_that_is_forgotten_holds_back_no_events(connections: Connections) -> None:
    store = await connections.open()
    (no,) = await registered(store, "h")
    await published(store, an_event(store, "e", at_us=1))
    assert await store.prune_events(2, 9) == 0
    assert await store.forget_handler(no)
    assert await store.prune_events(2, 9) == 1
    assert await ids_in_log(store) == []


@_check
async def a_cursor_never_moves_back(connections: Connections) -> None:
    store = await connections.open()
    no, other = await registered(store, "h", "i")
    slot, next_slot = 0, 1
    for position in (5, 3, 7, 7, 1):
        await react(store, cursors=[(no, slot, position), (no, next_slot, position)])
    await react(store, cursors=[(no, slot, 9), (no, slot, 8)])
    await react(store, cursors=[(no, store.partitions, 9), (no + other + 1, slot, 9)])
    found = await store.cursors(no)
    assert (found[slot], found[next_slot]) == (9, 7)
    assert len(found) == store.partitions
    assert set((await store.cursors(other)).values()) == {0}
    assert await store.cursors(no + other + 1) == {}


@_check
async def a_backlog_is_what_nobody_took_on_yet(connections: Connections) -> None:
    store = await connections.open()
    no, other = await registered(store, "h", "i", types=("Placed", "Paid"))
    assert await store.backlog(no) == 0
    keys = ("a", "b", "a", "b", "a", "b")
    events = await published(store, *(an_event(store, f"e{n}", key=k) for n, k in enumerate(keys)))
    await published(store, an_event(store, "other", "Sent"), an_event(store, "paid", "Paid", "c"))
    assert await store.backlog(no) == 7, "only its types"
    await react(store, marks=[a_mark(no, events[1].pos)], parked=[custody(no, events[3])])
    assert await store.backlog(no) == 5
    await react(store, cursors=[(no, events[0].slot, events[2].pos)])
    below = [e for e in events if e.slot == events[0].slot and e.pos <= events[2].pos]
    handled = {e.pos for e in below} | {events[1].pos, events[3].pos}
    assert await store.backlog(no) == 7 - len(handled)
    assert await store.backlog(other) == 7
    await caught_up(store, no)
    assert await store.backlog(no) == 0
    await registered(store, "i", types=("Paid",))
    assert await store.backlog(other) == 1


# -- marks -------------------------------------------------------------------------------------


@_check
async def a_mark_is_unique_and_a_repeated_one_refuses_its_commit(connections: Connections) -> None:
    one, two = await connections.open(), await connections.open()
    full = a_mark(1, 5, at_us=9, took_us=7, attempts=3, outcome="expired", by="v2")
    await react(one, marks=[full, a_mark(1, 6), a_mark(2, 5, outcome="dropped")])
    for store in (one, two):
        results = await written(
            store,
            reacting(marks=[a_mark(3, 1 + (store is one))]),
            reacting(marks=[a_mark(1, 5)], states=[StateRow("shop", "s", "k", b"1")]),
            reacting(marks=[a_mark(4, 1), a_mark(4, 1)]),
            reacting(marks=[a_mark(5, 1 + (store is one))]),
            reacting(marks=[a_mark(5, 1 + (store is one))]),
        )
        assert refused(results) == [1, 2, 4]
        assert all(isinstance(results[at], Conflict) for at in (1, 2, 4))
    assert await two.state("shop", "s", "k") is None
    assert await two.marks(1, 0, LAST_US) == [full, a_mark(1, 6)]
    assert await two.marks(1, 5, 6) == [a_mark(1, 6)]
    assert await two.marks(1, 4, 5) == [full]
    assert await two.marks(4, 0, LAST_US) == []
    assert len(await two.marks(3, 0, LAST_US)) == len(await two.marks(5, 0, LAST_US)) == 2


@_check
async def a_remark_replaces_and_counts_as_a_mark(connections: Connections) -> None:
    store = await connections.open()
    await react(store, marks=[a_mark(1, 5, outcome="dead")])
    better = a_mark(1, 5, at_us=2000, took_us=1, attempts=9, outcome="done", by="v2")
    await react(store, remarks=[better, a_mark(1, 7)])
    assert await store.marks(1, 0, LAST_US) == [better, a_mark(1, 7)]
    results = await written(
        store,
        reacting(remarks=[a_mark(1, 8)]),
        reacting(marks=[a_mark(1, 8, by="late")]),
        reacting(marks=[a_mark(1, 9)]),
        reacting(remarks=[a_mark(1, 9, by="again")]),
    )
    assert refused(results) == [1], "commits take effect in the order of the batch"
    assert await store.marks(1, 7, LAST_US) == [a_mark(1, 8), a_mark(1, 9, by="again")]


@_check
async def marks_of_all_handlers_are_found_by_event(connections: Connections) -> None:
    store = await connections.open()
    one, two, three = await registered(store, "a", "b", "c")
    marks = [
        a_mark(three, 5, at_us=10), a_mark(one, 5, at_us=20), a_mark(one, 6, at_us=20),
        a_mark(two, 5, at_us=20),
    ]  # fmt: skip
    await react(store, marks=[*marks, a_mark(one, 7, at_us=1)])
    assert await store.marks_at([6, 5, 8]) == [marks[0], marks[1], marks[2], marks[3]]
    assert await store.marks_at([6]) == [marks[2]]
    assert await store.marks_at([]) == []


# -- custody, dead letters, states, shadows ------------------------------------------------------


@_check
async def a_parked_event_is_kept_until_it_is_unparked(connections: Connections) -> None:
    writer, store = await connections.open(), await connections.open()
    events = await published(
        writer, *(an_event(writer, f"e{n}", key="ab"[n % 2]) for n in range(6))
    )
    a, b = events[0].slot, events[1].slot
    full = custody(
        1, events[0], attempt=7, due_us=LAST_US, began_us=3, error=b'{"e":1}', deaths=2,
        again="replay", data=b"[1]", dead=4,
    )  # fmt: skip
    others = [custody(1, event) for event in events[1:]]
    theirs = custody(2, events[0])
    await react(writer, parked=[*others[::-1], full, theirs])

    async def parked(*query: Any) -> list[int]:
        return [row.pos for row in await store.parked_events(*query)]

    assert await store.parked_events(1, [a, b], 0, 100) == [full, *others]
    assert await parked(1, [a, b], 2, 3) == [3, 4, 5]
    assert await parked(1, [a, b], 0, 100, "b") == [2, 4, 6]
    assert await parked(1, [a, b], 2, 1, "b") == [4]
    assert await parked(1, [a], 0, 100) == [e.pos for e in events if e.slot == a]
    assert await parked(1, [], 0, 100) == []
    assert await parked(3, [a, b], 0, 100) == []
    assert await store.parked_at([2, 1, 9]) == [full, theirs, others[0]]
    assert await store.parked_at([]) == []
    assert [await store.parked_count(no) for no in (1, 2, 3)] == [6, 1, 0]

    again = custody(1, events[0], attempt=8, slot=b, key="b")
    await react(writer, parked=[again], unparked=[(1, 1), (1, 2), (1, 99), (9, 3)])
    assert await store.parked_events(1, [a, b], 0, 2) == [again, others[1]], "taken before written"
    await react(writer, parked=[custody(1, events[1]), custody(1, events[1], attempt=5)])
    assert await store.parked_at([2]) == [custody(1, events[1], attempt=5)]
    assert await store.parked_at([1]) == [again, theirs]


@_check
async def dead_letters_are_numbered_and_kept_whole(connections: Connections) -> None:
    one, two = await connections.open(), await connections.open()
    (event,) = await published(one, an_event(one, "e"))
    dead = a_dead_letter(1, event, no=77, holds=True, asked="retry", again="replay", data=b"[2]")
    await react(one, dead=[dead, a_dead_letter(2, event)])
    found = await two.dead_letters(DeadFilter())
    assert [row.handler for row in found] == [1, 2]
    assert found[0] == msgspec.structs.replace(dead, no=found[0].no)
    await react(two, undead=[found[1].no, 99])
    await react(two, dead=[a_dead_letter(3, event)])
    (first, new) = await one.dead_letters(DeadFilter())
    assert first == found[0]
    assert new.no > found[1].no, "a number is never used twice"
    await react(one, asked=[(new.no, "drop"), (99, "drop")])
    assert [row.asked for row in await two.dead_letters(DeadFilter())] == ["retry", "drop"]


@_check
async def dead_letters_are_found_and_counted_by_filter(connections: Connections) -> None:
    store = await connections.open()
    events = await published(
        store, an_event(store, "a"), an_event(store, "b", "Paid", "l"), an_event(store, "c")
    )
    a, b, c = events
    await react(
        store,
        dead=[
            a_dead_letter(1, a, at_us=30), a_dead_letter(1, b, holds=True, at_us=10),
            a_dead_letter(2, a, cause="ValueError"), a_dead_letter(2, b),
            a_dead_letter(1, c, at_us=20),
        ],
    )  # fmt: skip
    first = (await store.dead_letters(DeadFilter()))[0].no

    async def found(**which: Any) -> list[int]:
        return [row.no - first + 1 for row in await store.dead_letters(DeadFilter(**which))]

    assert await found() == [1, 2, 3, 4, 5]
    assert await found(limit=2) == [1, 2]
    assert await found(after=first + 1, limit=2) == [3, 4]
    assert await found(handlers=(2, 9)) == [3, 4]
    assert await found(handlers=(1, 2), after=first + 1) == [3, 4, 5]
    assert await found(type="Paid") == [2, 4]
    assert await found(key="k") == [1, 3, 5]
    assert await found(cause="ValueError") == [3]
    assert await found(numbers=(first + 3, first, 99)) == [1, 4]
    assert await found(numbers=(first + 3, first), after=first) == [4]
    slots = {a.slot: [1, 3, 5], b.slot: [2, 4]}
    assert await found(slots=(b.slot,)) == (slots[b.slot] if len(slots) == 2 else [1, 2, 3, 4, 5])
    assert await found(slots=()) == []
    assert await found(positions=(b.pos, c.pos)) == [2, 4, 5]
    assert await found(holding=True) == [2]
    assert await found(holding=True, handlers=(1,), key="l", slots=(b.slot,)) == [2]
    assert await found(handlers=(1,), key="k", type="Placed", positions=(c.pos,)) == [5]

    async def counts(**which: Any) -> list[tuple[int, str, str, int, int, int]]:
        return await store.dead_counts(DeadFilter(**which))

    assert await counts() == [
        (1, "Placed", "KeyError", 2, 20, 30), (1, "Paid", "KeyError", 1, 10, 10),
        (2, "Paid", "KeyError", 1, 2000, 2000), (2, "Placed", "ValueError", 1, 2000, 2000),
    ]  # fmt: skip
    assert await counts(handlers=(2,), type="Paid") == [(2, "Paid", "KeyError", 1, 2000, 2000)]
    assert await counts(holding=True) == [(1, "Paid", "KeyError", 1, 10, 10)]
    assert await counts(slots=()) == []


@_check
async def states_are_kept_by_service_name_and_key(connections: Connections) -> None:
    one, two = await connections.open(), await connections.open()
    keys = [("shop", "s", "k"), ("bank", "s", "k"), ("shop", "t", "k"), ("shop", "s", "")]
    await react(one, states=[StateRow(*key, str(n).encode()) for n, key in enumerate(keys)])
    assert [await two.state(*key) for key in keys] == [b"0", b"1", b"2", b"3"]
    await react(one, states=[StateRow(*keys[0], b"x"), StateRow(*keys[1], None)])
    assert [await two.state(*key) for key in keys] == [b"x", None, b"2", b"3"]
    await react(one, states=[StateRow(*keys[0], b"y"), StateRow(*keys[0], None)])
    await react(one, states=[StateRow(*keys[1], None), StateRow(*keys[1], b'"\xc3\xa4"')])
    assert [await two.state(*key) for key in keys[:2]] == [None, b'"\xc3\xa4"'], "in their order"


@_check
async def shadows_are_read_newest_first(connections: Connections) -> None:
    store = await connections.open()
    rows = [ShadowRow(1, pos, 1000 - pos, b"[%d]" % pos) for pos in (3, 1, 2)]
    other = ShadowRow(2, 9, 1, b"[]", b'{"e":1}')
    await react(store, shadows=[*rows, other])
    assert await store.shadows(1, 2) == [rows[0], rows[2]]
    assert await store.shadows(2, 9) == [other]
    again = ShadowRow(1, 3, 5, b"[]", b'{"e":2}')
    await react(store, shadows=[again])
    assert await store.shadows(1, 9) == [again, rows[2], rows[1]]


# -- the mailbox -------------------------------------------------------------------------------


@_check
async def waits_are_found_by_event_and_by_run(connections: Connections) -> None:
    writer, store = await connections.open(), await connections.open()
    waits = [
        a_wait("r", "r#2", at_us=20), a_wait("r", "r#1", at_us=20), a_wait("q", "q#1", at_us=20),
        a_wait("s", "s#1", at_us=10),
    ]  # fmt: skip
    others = [
        a_wait("r", "r#3", key="l"), a_wait("r", "r#4", type="Sent"),
        a_wait("r", "r#5", service="bank", at_us=5),
    ]  # fmt: skip
    await react(writer, awaited=[*waits, *others])
    assert await store.awaits("shop", "Paid", "k") == [waits[3], waits[2], waits[1], waits[0]]
    assert await store.awaits_of("r") == [others[2], waits[1], waits[0], *others[:2]]
    assert await store.awaits_like("shop", "Sen") == [others[1]]
    assert len(await store.awaits_like("shop", "")) == len(waits) + 2
    assert await store.awaits_like("bank", "Paid") == [others[2]]
    assert await store.awaits_like("bank", "Sent") == []
    given = a_wait("r", "r#2", at_us=30, pos=7, reply=b"2")
    moved = a_wait("r", "r#3", key="k", at_us=40)
    await react(writer, awaited=[given, moved])
    assert await store.awaits("shop", "Paid", "l") == []
    assert await store.awaits("shop", "Paid", "k") == [waits[3], waits[2], waits[1], given, moved]
    await react(writer, unawaited=[("r", "r#2"), ("r", "none"), ("q", "r#1")])
    assert [row.id for row in await store.awaits_of("r")] == ["r#5", "r#1", "r#3", "r#4"]
    await react(writer, unawaited=[("r", "*")], awaited=[a_wait("r", "r#9")])
    assert [row.id for row in await store.awaits_of("r")] == ["r#9"], "taken before written"
    assert [row.run for row in await store.awaits("shop", "Paid", "k")] == ["s", "q", "r"]


@_check
async def kept_events_are_found_in_log_order(connections: Connections) -> None:
    writer, store = await connections.open(), await connections.open()
    rows = [KeptRow("shop", "Paid", "k", pos, 5000 + pos) for pos in (3, 1, 2)]
    others = [
        KeptRow("bank", "Paid", "k", 1, 1), KeptRow("shop", "Sent", "k", 1, 1),
        KeptRow("shop", "Paid", "l", 1, 1),
    ]  # fmt: skip
    await react(writer, kept=[*rows, *others])
    await react(writer, kept=[KeptRow("shop", "Paid", "k", 3, 9000)])
    assert await store.kept_events("shop", "Paid", "k") == [rows[1], rows[2], rows[0]]
    for row in others:
        assert await store.kept_events(row.service, row.type, row.key) == [row]


# -- conversations -----------------------------------------------------------------------------


@_check
async def conversations_are_found_by_state(connections: Connections) -> None:
    writer, store = await connections.open(), await connections.open()
    full = a_conversation(
        "d", started_us=40, due_us=60, ended_us=70, end="Sent", ends=2, last="Paid", last_us=90,
        milestones=b'{"Paid":1}', raised=True,
    )  # fmt: skip
    rows = {
        "a": a_conversation("a", started_us=10, due_us=50),
        "b": a_conversation("b", started_us=20, due_us=500),
        "c": a_conversation("c", started_us=30, due_us=50, ended_us=45, ends=1),
        "d": full,
        "e": a_conversation("a", "refunds", started_us=40, due_us=50, raised=True),
    }
    await react(writer, conversations=list(rows.values()))

    async def found(**which: Any) -> str:
        names = {(row.contract, row.id): name for name, row in rows.items()}
        listed = await store.conversations(ConversationFilter(**which))
        return "".join(names[row.contract, row.id] for row in listed)

    assert await found() == "decba", "newest start first, then by contract"
    assert await found(limit=2) == "de"
    assert await found(contract="orders") == "dcba"
    assert await found(id="a") == "ea"
    assert await found(contract="orders", id="a") == "a"
    assert await found(state="open") == "eba"
    assert await found(state="overdue", now_us=50) == "ea"
    assert await found(state="overdue", now_us=49) == ""
    assert await found(state="overdue", now_us=50, contract="orders", limit=1) == "a"
    assert await found(state="unraised", now_us=50) == "a"
    assert await found(state="unraised", now_us=49) == ""
    assert await found(state="ended") == "dc"
    assert await found(state="ended", id="c") == "c"
    assert await found(state="twice") == "d"
    assert await found(state="twice", contract="refunds") == ""
    assert await store.conversation("orders", "d") == full
    assert await store.conversation("refunds", "d") is None
    over = a_conversation("a", started_us=99, due_us=98, ended_us=97, key="l", ends=2, last="Sent")
    await react(writer, conversations=[over])
    assert await store.conversation("orders", "a") == over, "replaced whole"
    assert await found(state="twice") == "ad"
    assert await found(state="open", contract="orders") == "b"
    assert await found(key="l") == "a"
    assert await found(key="l", contract="refunds") == ""
    assert await found(key="nobody's") == ""


@_check
async def a_conversation_has_its_runs_and_their_children(connections: Connections) -> None:
    store = await connections.open()
    ids = ("c", "c/1", "c/1/2", "c0", "c#1", "m", "m/1", "x", "x/1", "a", "%", "_")
    await write(store, runs=[a_run(store, no, id) for no, id in enumerate(ids, 1)])
    await write(store, runs=[a_run(store, 100, "c", "bank"), a_run(store, 101, "m", "bank")])
    assert await store.runs_in("c") == ["c", "c/1", "c/1/2"]
    await react(store, members=[("c", "m"), ("c", "a"), ("c", "c/1"), ("c", "gone"), ("e", "x")])
    await react(store, members=[("c", "m"), ("e", "m")])
    assert await store.runs_in("c") == ["c", "c/1", "c/1/2", "a", "m", "m/1"], "each once"
    assert await store.runs_in("e") == ["m", "m/1", "x", "x/1"], "one that an event began"
    assert await store.runs_in("%") == ["%"]


# -- upkeep ------------------------------------------------------------------------------------


@_check
async def pruning_takes_old_events_with_what_belongs_to_them(connections: Connections) -> None:
    store = await connections.open()
    no, other = await registered(store, "h", "i")
    times = (10, 9000, 20, 30)  # in the order of publishers' clocks, which differ
    events = await published(
        store, *(an_event(store, f"e{n}", version=4 - n, at_us=at) for n, at in enumerate(times))
    )
    marks = [a_mark(handler, e.pos) for e in events for handler in (no, other)]
    await react(store, marks=marks, shadows=[ShadowRow(no, e.pos, 1, b"[]") for e in events])
    assert await store.prune_events(100, 10) == 0, "nobody is past them"
    await caught_up(store, no, other)
    assert await store.prune_events(10, 10) == 0, "not old enough"
    assert await store.prune_events(100, 10) == 3
    assert await all_events(store) == [events[1]]
    assert await store.event("e0") is None
    assert await store.event_types() == [("Placed", 3, 1)]
    assert await store.marks_at([1, 2, 3, 4]) == [a_mark(no, 2), a_mark(other, 2)]
    assert [row.pos for row in await store.shadows(no, 10)] == [2]
    assert await store.events_head() == 4
    assert await store.prune_events(100, 10) == 0
    (again,) = await published(store, an_event(store, "e0"))
    assert again.pos == 5, "a position is never given twice, an id once it is forgotten"
    await caught_up(store, no, other)
    assert await store.prune_events(LAST_US, 10) == 2
    assert await store.event_types() == []
    assert await store.register_handlers([HandlerSpec("shop", "late", ("Placed",), 0)])
    assert set((await store.cursors(other + 1)).values()) == {5}, "at the end of an empty log"


@_check
async def pruning_keeps_events_that_a_handler_is_not_past(connections: Connections) -> None:
    store = await connections.open()
    no, other = await registered(store, "h", "i")
    (idle,) = await registered(store, "idle", types=("Sent",))
    events = await published(store, *(an_event(store, f"e{n}", key=f"k{n}") for n in range(20)))
    slot = events[7].slot
    await caught_up(store, no, idle)
    moved = [(other, at, 20) for at in range(store.partitions) if at != slot]
    await react(store, cursors=[*moved, (other, slot, 7)])
    assert await store.prune_events(LAST_US, 100) == sum(
        e.slot != slot or e.pos <= 7 for e in events
    )
    left = [e for e in events if e.slot == slot and e.pos > 7]
    assert await all_events(store) == left
    assert await store.backlog(other) == len(left)
    await react(store, cursors=[(other, slot, 20)])
    late = await registered(store, "late")
    assert await store.prune_events(LAST_US, 100) == 0, "a new one has still to read them"
    await caught_up(store, *late)
    assert await store.prune_events(LAST_US, 100) == len(left)


@_check
async def pruning_keeps_events_that_something_refers_to(connections: Connections) -> None:
    store = await connections.open()
    (no,) = await registered(store, "h")
    parked, dead, kept, late, done = await published(
        store, *(an_event(store, id) for id in ("parked", "dead", "kept", "late", "done"))
    )
    await react(
        store, parked=[custody(no, parked)], dead=[a_dead_letter(no, dead)],
        kept=[
            KeptRow("shop", "Paid", "k", kept.pos, 5000), KeptRow("shop", "Paid", "k", late.pos, 90)
        ],
        marks=[a_mark(no, dead.pos, outcome="dead")],
    )  # fmt: skip
    await caught_up(store, no)
    assert await store.prune_events(5000, 100) == 2 + 1, "what is done, and what was kept too long"
    assert await all_events(store) == [parked, dead, kept]
    assert len(await store.marks_at([dead.pos])) == 1
    assert [row.pos for row in await store.kept_events("shop", "Paid", "k")] == [kept.pos]
    (letter,) = await store.dead_letters(DeadFilter())
    await react(store, unparked=[(no, parked.pos)], undead=[letter.no])
    assert await store.prune_events(5001, 100) == 3 + 1
    assert await all_events(store) == []
    assert await store.events_head() == done.pos


@_check
async def pruning_goes_on_in_small_batches_of_every_kind(connections: Connections) -> None:
    store = await connections.open()
    await published(store, *(an_event(store, f"e{n}") for n in range(7)))
    await react(
        store, kept=[KeptRow("shop", "Paid", f"k{n}", 90 + n, 10) for n in range(4)],
        conversations=[a_conversation(f"c{n}", ended_us=10 + n) for n in range(5)],
    )  # fmt: skip
    counts = [await store.prune_events(5000, 3) for _ in range(4)]
    assert counts == [3 + 3 + 3, 3 + 1 + 2, 1, 0]
    assert await all_events(store) == []
    assert await store.conversations(ConversationFilter()) == []


@_check
async def pruning_forgets_conversations_and_waits_that_are_over(connections: Connections) -> None:
    store = await connections.open()
    await published(store, an_event(store, "old"), an_event(store, "young", at_us=9000))
    await react(
        store,
        conversations=[
            a_conversation("a", ended_us=10), a_conversation("b", ended_us=5000),
            a_conversation("c"),
        ],
        awaited=[
            a_wait("r", "open", at_us=1), a_wait("r", "gone", pos=1),
            a_wait("r", "there", pos=2), a_wait("r", "now", pos=1, at_us=5000),
        ],
    )  # fmt: skip
    assert await store.prune_events(5000, 100) == 1 + 1 + 1
    assert [row.id for row in await store.conversations(ConversationFilter())] == ["b", "c"]
    assert [row.id for row in await store.awaits_of("r")] == ["open", "there", "now"]


@_check
async def a_pruned_run_leaves_its_conversation_and_waits_for_nothing(
    connections: Connections,
) -> None:
    store = await connections.open()
    waits = [a_wait("r", "r#1"), a_wait("r", "r#2", pos=1), a_wait("s", "s#1")]
    await write(
        store, runs=[a_run(store, 1, "r", status="completed", ended_us=5), a_run(store, 2, "s")],
        reaction=Reaction(members=[("c", "r"), ("c", "s")], awaited=waits),
    )  # fmt: skip
    await consume_all(store)
    assert await store.prune(10, 10) == 1
    assert await store.awaits("shop", "Paid", "k") == waits[1:], "nothing is given twice"
    await write(store, runs=[a_run(store, 3, "r")])
    assert await store.runs_in("c") == ["s"]


@_check
async def a_store_describes_its_events(connections: Connections) -> None:
    store = await connections.open()
    facts = await store.describe()
    assert (facts["events"], facts["dead letters"]) == (0, 0)
    events = await published(store, an_event(store, "a"), an_event(store, "b"))
    await react(store, dead=[a_dead_letter(1, events[0])])
    facts = await store.describe()
    assert (facts["events"], facts["dead letters"]) == (2, 1)


@_check
async def a_closed_store_refuses_work_with_events(connections: Connections) -> None:
    store = await connections.open()
    await connections.close(store)
    for work in (
        written(store, a_commit(events=[an_event(store, "e")])), all_events(store),
        store.events_head(), store.register_handlers([HandlerSpec("shop", "h", ())]),
        store.pause_handler(1, 0, ""), store.forget_handler(1), store.prune_events(1, 1),
    ):  # fmt: skip
        try:
            results: Any = await work
        except StoreError as error:
            results = [error]
        assert isinstance(results[0], StoreError)
        assert "closed" in str(results[0])


@_check
async def events_of_a_durable_store_are_found_again(connections: Connections) -> None:
    store = await connections.open()
    if not store.features.durable:
        return
    (no,) = await registered(store, "h")
    (event,) = await published(store, an_event(store, "e"))
    await react(
        store, marks=[a_mark(no, 1)], cursors=[(no, event.slot, 1)], parked=[custody(no, event)],
        states=[StateRow("shop", "s", "k", b"1")],
    )  # fmt: skip
    row: HandlerRow = (await store.handler_rows())[0]
    await connections.close(store)
    again = await connections.open()
    assert await all_events(again) == [event]
    assert await again.handler_rows() == [row]
    assert await again.marks(no, 0, 1) == [a_mark(no, 1)]
    assert (await again.cursors(no))[event.slot] == 1
    assert await again.parked_at([1]) == [custody(no, event)]
    assert await again.state("shop", "s", "k") == b"1"
    results: Results = await written(again, reacting(marks=[a_mark(no, 1)]))
    assert isinstance(results[0], Conflict)


EVENT_STORE_CHECKS: tuple[StoreCheck, ...] = tuple(_checks)
"""Every check, in the order of this file."""
