"""The conformance suite of the store port: named checks that any store has to pass.

A store's author gives a function that opens one more connection to one store, empty at first, and
runs every check against a fresh one. With pytest:

    @pytest.mark.parametrize("check", STORE_CHECKS, ids=str)
    def test_my_store(check, tmp_path):
        async def connect() -> Store:
            store = MyStore(tmp_path / "store")
            await store.open()
            return store

        asyncio.run(check.run(connect))

A check fails by AssertionError, or by TimeoutError where a store may tell something late. Apart
from that none sleeps, or reads a clock other than the store's.
"""

from __future__ import annotations

import asyncio
import random
import threading
from typing import Any

import msgspec

from pavane.errors import LeaseLost, PavaneError, StoreError
from pavane.stores.eventlog import ParkedEvent, Reaction
from pavane.stores.port import (
    LAST_US,
    Commit,
    Conflict,
    Fence,
    InboxRow,
    JournalRow,
    Message,
    NodeRow,
    RunFilter,
    Store,
    Touched,
)
from pavane.testing.event_stores import EVENT_STORE_CHECKS
from pavane.testing.store_check import (
    CLOCK_US,
    LEASE_US,
    SERVICES,
    Connections,
    Results,
    StoreCheck,
    a_commit,
    a_message,
    a_parked,
    a_run,
    all_targets,
    consume_all,
    into,
    joined,
    refusal,
    refused,
    some_mail,
    whole_log,
    write,
    written,
)

NOTICED_S = 10.0
"""How late a store may tell that others wrote, or that nobody did."""

_checks: list[StoreCheck] = []
_check = into(_checks)


# -- commits -----------------------------------------------------------------------------------


@_check
async def an_empty_store_finds_nothing(connections: Connections) -> None:
    store = await connections.open()
    targets = await all_targets(store)
    assert await store.run_rows("r") == []
    assert await store.run_row("shop", "r") is None
    assert await store.halted_runs(["r"]) == []
    assert await store.list_runs(RunFilter()) == []
    assert await store.journals([1, 2]) == {1: [], 2: []}
    assert await store.live_runs(targets, 0, 10) == []
    assert await store.due_runs(targets, (0, 0), LAST_US, 10) == []
    assert await store.due_parked(targets, (0, ""), LAST_US, 10) == []
    assert await store.parked_of("shop", "r") == []
    assert await store.mail_of("shop", "r") == []
    assert await store.inbox_of("r") == []
    assert await store.seen("shop", ["r"]) == set()
    assert await store.message("r") is None
    assert await whole_log(store) == []
    assert await store.log_head() == 0
    assert store.tail == 0
    assert await store.nodes() == []
    assert await store.prune(LAST_US, 10) == 0


@_check
async def a_commit_is_read_back_as_it_was(connections: Connections) -> None:
    writer, reader = await connections.open(), await connections.open()
    away = a_run(writer, 8, "r", "bank", status="passed")
    ended = a_run(
        writer, 7, "r", status="failed", mode="choreography", holder="bank", hop=3, trail=b"[1]",
        attributes=b'{"vip":true}', wake_us=9, reason="why", deaths=2, ended_us=99,
        result=b'{"no":1}', undone=1, entries=4,
    )  # fmt: skip
    parked = a_parked(writer, "r#1", beat=b'{"at":1}', error=b'{"e":1}', deaths=2)
    mail, mark = some_mail("r", "m1"), InboxRow("shop", "r#h1", 5, "bank")
    message = a_message(writer, "r#1")
    await write(
        writer, runs=[ended, away], journal=[JournalRow(7, 0, b"[1]"), JournalRow(7, 1, b"[2]")],
        messages=[message], inbox=[mark], mail=[mail], parked=[parked],
    )  # fmt: skip
    for store in (writer, reader):
        assert await store.run_row("shop", "r") == ended
        assert sorted(await store.run_rows("r"), key=lambda r: r.no) == [ended, away]
        assert await store.journals([7, 8]) == {
            7: [JournalRow(7, 0, b"[1]"), JournalRow(7, 1, b"[2]")], 8: [],
        }  # fmt: skip
        assert await store.inbox_of("r") == [mark]
        assert await store.mail_of("shop", "r") == [mail]
        assert await store.parked_of("bank", "r") == [parked]
        (logged,) = await whole_log(store)
        found = await store.message("r#1")
        for read in (logged, found):
            assert read is not None
            for slot in ("kind", "id", "to", "run", "body", "at_us", "target", "pos"):
                assert getattr(read, slot) == getattr(message, slot), slot


@_check
async def rows_given_and_rows_read_are_nobody_elses(connections: Connections) -> None:
    store = await connections.open()
    run, parked, mail = a_run(store, 1, "r"), a_parked(store, "r#1"), some_mail("r", "m")
    mark, message = InboxRow("shop", "r#h1", 1), a_message(store, "r#1")
    message.live = object()
    await write(store, runs=[run], parked=[parked], mail=[mail], inbox=[mark], messages=[message])
    await joined(store)
    for _ in range(2):  # first change what was given, then what was read
        run.status, parked.attempt, mail.type, mark.passed_to = "killed", 99, "x", "x"
        message.body = b"x"
        run = await store.run_row("shop", "r") or run
        (parked,), (mail,) = await store.parked_of("bank", "r"), await store.mail_of("shop", "r")
        (mark,), (message,) = await store.inbox_of("r"), await whole_log(store)
        assert (run.status, parked.attempt, mail.type, mark.passed_to) == ("running", 1, "Paid", "")
        assert (message.body, message.live) == (b'{"a":1}', None)
        (node,) = await store.nodes()
        assert node.services == list(SERVICES)
        node.services.clear()
        rows = await store.partition_rows(SERVICES)
        assert all(row.owner is None for row in rows)
        rows[0].owner = 77


@_check
async def done_is_called_once_on_the_event_loop(connections: Connections) -> None:
    store = await connections.open()
    loop, thread = asyncio.get_running_loop(), threading.get_ident()
    calls: list[tuple[int, Results]] = []
    ended = loop.create_future()

    def done(results: Results) -> None:
        calls.append((threading.get_ident(), results))
        if len(calls) == 4:
            ended.set_result(None)

    seq = 0
    for size in (1, 50, 0, 3):
        batch = [a_commit(journal=[JournalRow(1, seq + at, b"[]")]) for at in range(size)]
        store.submit(batch, None, done)
        seq += size
    await ended
    assert sorted(len(results) for _, results in calls) == [0, 1, 3, 50]
    assert {caller for caller, _ in calls} == {thread}
    assert not any(any(results) for _, results in calls)
    assert [row.seq for row in (await store.journals([1]))[1]] == list(range(seq))


@_check
async def one_bad_commit_in_a_batch_is_refused_alone(connections: Connections) -> None:
    store = await connections.open()
    await write(store, journal=[JournalRow(1, 0, b"[]")], inbox=[InboxRow("shop", "i", 1)])
    repeated = (
        {"journal": [JournalRow(1, 0, b"[]")]},
        {"inbox": [InboxRow("shop", "i", 2)]},
    )
    chance = random.Random(1)
    good: list[str] = []
    for size in (1, 2, 3, 7, 16, 33):
        bad = set(chance.sample(range(size), k=min(size, chance.randrange(1, 4))))
        batch: list[Commit] = []
        for at in range(size):
            id = f"b{size}-{at}"
            parts: dict[str, Any] = {
                "messages": [a_message(store, id)], "mail": [some_mail("r", id)],
                "parked": [a_parked(store, id)], "runs": [a_run(store, size * 100 + at, id)],
            }  # fmt: skip
            if at in bad:
                parts |= chance.choice(repeated)
            else:
                good.append(id)
            batch.append(a_commit(**parts))
        results = await written(store, *batch)
        assert set(refused(results)) == bad
        assert all(isinstance(results[at], Conflict) for at in bad)
    log = await whole_log(store)
    assert [m.id for m in log] == good, "the others are there, in the order of the batch"
    assert [m.pos for m in log] == list(range(1, len(good) + 1)), "refused ones leave no gap"
    assert [m.id for m in await store.mail_of("shop", "r")] == good
    assert {row.id for row in await store.list_runs(RunFilter(limit=1000))} == set(good)
    parked = await store.due_parked(await all_targets(store), (0, ""), LAST_US, 1000)
    assert {row.id for row in parked} == set(good)


@_check
async def a_refused_commit_takes_the_rest_of_its_chain_along(connections: Connections) -> None:
    store = await connections.open()
    await write(store, inbox=[InboxRow("shop", "i", 1)])
    chance = random.Random(3)
    good: list[str] = []
    for size in (1, 2, 3, 5, 12, 40, 40):
        expected: list[bool] = []
        broken: set[int] = set()
        batch: list[Commit] = []
        for at in range(size):
            id = f"b{size}-{len(good)}-{at}"
            chain, bad = chance.randrange(6), chance.random() < 0.15
            commit = a_commit(messages=[a_message(store, id)], chain=chain)
            if bad:
                commit.inbox = [InboxRow("shop", "i", 2)]
            expected.append(bad or chain in broken)
            if not expected[-1]:
                good.append(id)
            elif chain:
                broken.add(chain)
            batch.append(commit)
        results = await written(store, *batch)
        assert [result is not None for result in results] == expected
        assert all(isinstance(result, Conflict) for result in results if result is not None)
    assert [m.id for m in await whole_log(store)] == good, "the others are there, in order"


@_check
async def of_two_equal_commits_the_first_one_counts(connections: Connections) -> None:
    store = await connections.open()
    for kind in ("runs", "inbox", "journal"):
        batch: list[Commit] = []
        for at in range(3):
            parts: dict[str, Any] = {
                "runs": [a_run(store, 10 + at, f"r-{kind}")],
                "inbox": [InboxRow("shop", f"i-{kind}", 1)],
                "journal": [JournalRow(5, 0, b"[]")],
            }
            mail = [some_mail(kind, f"m{at}")]
            batch.append(a_commit(mail=mail, **{kind: parts[kind]}))
        results = await written(store, *batch)
        assert refused(results) == [1, 2], kind
        assert all(isinstance(results[at], Conflict) for at in (1, 2)), kind
        assert [row.id for row in await store.mail_of("shop", kind)] == ["m0"]


@_check
async def runs_that_ended_or_are_stuck_are_found_at_their_homes(connections: Connections) -> None:
    writer, reader = await connections.open(), await connections.open()
    ended = a_run(writer, 1, "ended", status="completed", ended_us=9)
    stuck = a_run(writer, 2, "stuck", status="stuck", reason="why")
    away = a_run(writer, 3, "stuck", "bank", status="stuck")
    other = a_run(writer, 4, "ended", "bank", home="bank", status="failed", ended_us=8)
    waits = a_run(writer, 5, "waits", status="waiting")
    await write(writer, runs=[ended, stuck, away, other, waits])
    for store in (writer, reader):
        ids = ["waits", "stuck", "none", "ended"]
        found = await store.halted_runs(ids)
        assert sorted(found, key=lambda row: row.no) == [ended, stuck, other]
        assert await store.halted_runs(["waits", "none"]) == []
        assert await store.halted_runs([]) == []


@_check
async def what_many_ask_at_once_each_is_told(connections: Connections) -> None:
    writer, reader = await connections.open(), await connections.open()
    runs = [a_run(writer, no, f"r{no}") for no in range(40)]
    await write(
        writer, runs=runs, inbox=[InboxRow("shop", run.id, 1) for run in runs[::2]],
        messages=[a_message(writer, run.id) for run in runs],
    )  # fmt: skip
    for store in (writer, reader):
        asked = [f"r{no}" for no in (*range(-3, 40), 5, 5)]
        known = {run.id: run for run in runs}
        rows = await asyncio.gather(*(store.run_row("shop", id) for id in asked))
        assert rows == [known.get(id) for id in asked]
        seen = await asyncio.gather(*(store.seen("shop", [id]) for id in asked))
        assert seen == [{id} if id in known and known[id].no % 2 == 0 else set() for id in asked]
        messages = await asyncio.gather(*(store.message(id) for id in asked))
        assert [m and m.id for m in messages] == [id if id in known else None for id in asked]
        assert rows[-1] is not rows[-2]  # whoever changes one changes no other


@_check
async def equal_keys_of_other_services_and_runs_are_no_conflict(connections: Connections) -> None:
    store = await connections.open()
    for no, service in enumerate(SERVICES, 1):
        await write(
            store, runs=[a_run(store, no, "r", service)], journal=[JournalRow(no, 0, b"[]")],
            inbox=[InboxRow(service, "i", 1)], parked=[a_parked(store, "r#1", service)],
            mail=[some_mail("r", "m", service)],
        )  # fmt: skip
    assert len(await store.run_rows("r")) == 2
    for service in SERVICES:
        assert await store.seen(service, ["i", "j"]) == {"i"}
        assert len(await store.mail_of(service, "r")) == 1
        assert len(await store.parked_of(service, "r")) == 1


@_check
async def a_run_row_is_replaced_but_for_its_identity(connections: Connections) -> None:
    store = await connections.open()
    await write(store, runs=[a_run(store, 1, "r", wake_us=5)])
    row = a_run(
        store, 1, "r", status="completed", hop=2, holder="bank", trail=b"[2]", result=b"3",
        attributes=b'{"a":1}', reason="x", deaths=1, ended_us=7, undone=1, entries=3,
        mode="choreography", header=b'{"run":2}',
    )  # fmt: skip
    await write(store, runs=[msgspec.structs.replace(row, workflow="other", started_us=9)])
    assert await store.run_row("shop", "r") == row
    twice = [msgspec.structs.replace(row, hop=4), msgspec.structs.replace(row, hop=5)]
    await write(store, runs=twice)
    assert await store.run_row("shop", "r") == twice[1]
    # It keeps its id, so that another run of the same commit may have the one it was given.
    await write(store, runs=[msgspec.structs.replace(twice[1], id="s"), a_run(store, 2, "s")])
    assert await store.run_row("shop", "s") == a_run(store, 2, "s")
    assert await store.run_row("shop", "r") == twice[1]
    assert await store.due_runs(await all_targets(store), (0, 0), LAST_US, 10) == []


@_check
async def mail_is_kept_once_in_order_until_taken(connections: Connections) -> None:
    store = await connections.open()
    ids = [f"m{at}" for at in (5, 3, 9, 1)]
    await write(store, mail=[some_mail("r", id) for id in ids])
    await write(store, mail=[some_mail("r", "m3", body=b"2"), some_mail("r", "m0")])
    found = await store.mail_of("shop", "r")
    assert [(row.id, row.body) for row in found] == [(id, b"{}") for id in [*ids, "m0"]]
    await write(store, mail_taken=[("shop", "r", "m9"), ("shop", "r", "none")])
    assert [row.id for row in await store.mail_of("shop", "r")] == ["m5", "m3", "m1", "m0"]
    await write(store, mail=[some_mail("other", "m5"), some_mail("r", "m5", "bank")])
    await written(
        store,
        a_commit(mail_taken=[("shop", "r", "*")]),
        a_commit(mail=[some_mail("r", "later")]),
    )
    assert [row.id for row in await store.mail_of("shop", "r")] == ["later"]
    assert len(await store.mail_of("shop", "other")) == 1
    assert len(await store.mail_of("bank", "r")) == 1


@_check
async def parked_work_is_replaced_and_ended(connections: Connections) -> None:
    store = await connections.open()
    first = a_parked(store, "r#1")
    await write(store, parked=[first, a_parked(store, "r#2")])
    again = msgspec.structs.replace(
        first, attempt=2, due_us=9000, beat=b"1", error=b"2", deaths=3, call=b"{}", began_us=2
    )
    await write(store, parked=[again])
    kept = msgspec.structs.replace(again, call=first.call, began_us=first.began_us)
    assert kept in await store.parked_of("bank", "r")
    await write(store, unparked=[("bank", "r#1"), ("bank", "none"), ("shop", "r#2")])
    assert [row.id for row in await store.parked_of("bank", "r")] == ["r#2"]


@_check
async def a_position_never_goes_back(connections: Connections) -> None:
    store = await connections.open()
    fence = await joined(store)
    target, other, *_ = await all_targets(store)
    await store.claim(fence, [target, other])
    for position in (5, 3, 7, 7, 1):
        await write(store, positions=[(target, position), (LAST_US, 1)])
    await store.release(fence, [(target, 2)])
    rows = {row.target: row for row in await store.partition_rows(SERVICES)}
    assert (rows[target].position, rows[target].owner, rows[target].clean) == (7, None, True)
    assert rows[other].owner == fence.node
    await store.claim(fence, [target])
    await store.release(fence, [(target, 9)])
    assert (await store.partition_rows(["shop"]))[0].position == 9


# -- odd values --------------------------------------------------------------------------------


@_check
async def large_values_are_kept(connections: Connections) -> None:
    store = await connections.open()
    body = b'"' + "ä".encode() * 2_000_000 + b'"'
    message = a_message(store, "r#1")
    message.body = body
    await write(store, journal=[JournalRow(1, 0, body)], messages=[message])
    assert (await store.journals([1]))[1][0].body == body
    assert (await whole_log(store))[0].body == body


@_check
async def odd_text_is_kept(connections: Connections) -> None:
    store = await connections.open()
    texts = ["🙂", "\U0010ffff", "'\"\\;--", "\r\n\t", "é", "%_*", ""]
    if store.features.nul:
        texts.append("a\0b")
    for no, text in enumerate(texts, 1):
        id, body = f"r{no}#{text}", msgspec.json.encode(text)
        raw = text.encode()
        message = a_message(store, id)
        message.body = raw
        await write(
            store, runs=[a_run(store, no, f"r{no}", reason=text, result=body)],
            inbox=[InboxRow("shop", id, 1, text)], mail=[some_mail(f"r{no}", id, body=raw)],
            journal=[JournalRow(no, 0, raw)], messages=[message],
        )  # fmt: skip
        row = await store.run_row("shop", f"r{no}")
        assert row is not None
        assert (row.reason, row.result) == (text, body)
        assert await store.seen("shop", [id, "x"]) == {id}
        assert await store.inbox_of(f"r{no}") == [InboxRow("shop", id, 1, text)]
        (mail,) = await store.mail_of("shop", f"r{no}")
        assert (mail.id, mail.body) == (id, raw)
        assert (await store.journals([no]))[no][0].body == raw
        found = await store.message(id)
        assert found is not None
        assert found.body == raw
        await write(store, mail_taken=[("shop", f"r{no}", id)])
        assert await store.mail_of("shop", f"r{no}") == []


@_check
async def nul_is_kept_or_refused(connections: Connections) -> None:
    store = await connections.open()
    await write(store, runs=[a_run(store, 1, "r", reason="a\0b")])
    row = await store.run_row("shop", "r")
    assert row is not None
    assert row.reason == ("a\0b" if store.features.nul else "a␀b")
    commit = a_commit(inbox=[InboxRow("shop", "a\0b", 1)])
    (result,) = await written(store, commit)
    assert (result is None) == store.features.nul, "one that has to be exact"
    assert await store.seen("shop", ["x"]) == set()


@_check
async def what_cannot_be_stored_is_refused_alone(connections: Connections) -> None:
    store = await connections.open()
    fence = await joined(store)
    lone = a_message(store, "r#1")
    lone.id = "\ud800"
    bad: list[dict[str, Any]] = [
        {"messages": [lone]},
        {"inbox": [InboxRow("shop", "\udfff", 1)]},
        {"mail": [some_mail("r", "m", body=b"\xff")]},
        {"journal": [JournalRow(1, 0, b"\xed\xa0\x80")]},
        {"runs": [a_run(store, 2**64, "r")]},
        {"parked": [a_parked(store, "r#1", due_us=2**63)]},
    ]
    for at, parts in enumerate(bad):
        parts["inbox"] = [InboxRow("shop", f"before{at}", 1), *parts.get("inbox", ())]
    batch = [a_commit(**parts) for parts in bad]
    for at in range(len(bad)):
        batch.insert(at * 2 + 1, a_commit(journal=[JournalRow(7, at, b"[]")]))
    results = await written(store, *batch, fence=fence)
    assert refused(results) == list(range(0, len(batch), 2))
    for result in results[::2]:
        assert isinstance(result, PavaneError)
        assert not isinstance(result, (Conflict, LeaseLost, StoreError))
        assert "cannot be stored" in str(result)
    assert len((await store.journals([7]))[7]) == len(bad)
    assert await store.seen("shop", [f"before{at}" for at in range(len(bad))]) == set()
    await write(store, fence, messages=[a_message(store, "r#2")])


# -- the log -----------------------------------------------------------------------------------


@_check
async def the_log_is_read_by_range_partition_and_origin(connections: Connections) -> None:
    store = await connections.open()
    one, two = await joined(store), await joined(store)
    for at in range(12):
        to = ("shop", "bank", "")[at % 3]
        fence = (one, two, None)[at // 4]
        await write(store, fence, messages=[a_message(store, f"r{at}#1", to)])
    log = await whole_log(store)
    assert [m.pos for m in log] == list(range(1, 13))
    assert await store.log_head() == 12

    async def positions(*query: Any) -> list[int]:
        return [m.pos for m in await store.read_log(*query)]

    assert await positions(3, 7, None, 100, None) == [4, 5, 6, 7]
    assert await positions(3, None, None, 2, None) == [4, 5]
    assert await positions(0, None, None, 100, one.node) == list(range(5, 13))
    assert await positions(0, None, None, 100, two.node) == [1, 2, 3, 4, 9, 10, 11, 12]
    targets = sorted({m.target for m in log})[1:4]
    wanted = [m.pos for m in log if m.target in targets]
    assert await positions(0, None, targets, 100, None) == wanted
    assert await positions(wanted[0], 12, targets, 1, None) == wanted[1:2]
    assert await positions(0, None, [], 100, None) == []
    assert await positions(12, None, None, 100, None) == []


@_check
async def the_newest_message_of_an_id_is_found(connections: Connections) -> None:
    store = await connections.open()
    await write(store, messages=[a_message(store, "r", "shop"), a_message(store, "s", "shop")])
    await write(store, messages=[a_message(store, "r", "bank")])
    found = await store.message("r")
    assert found is not None
    assert (found.to, found.pos) == ("bank", 3)


@_check
async def a_store_that_is_reopened_goes_on(connections: Connections) -> None:
    store, other = await connections.open(), await connections.open()
    fence = await joined(store)
    await write(store, fence, messages=[a_message(store, "a")])
    commit = Commit(lambda error: None)
    commit.messages = [a_message(store, "b")]
    results: asyncio.Future[Results] = asyncio.get_running_loop().create_future()
    reopening = asyncio.ensure_future(store.reopen())
    await asyncio.sleep(0)
    store.submit([commit], fence, results.set_result)
    assert await store.log_head() >= 1, "it can be read all the time"
    await reopening
    assert await results == [None]
    assert store.renew(fence)
    assert store.target_of("shop", "r") == other.target_of("shop", "r")
    assert [m.id for m in await whole_log(other)] == ["a", "b"]


@_check
async def the_tail_moves_over_own_messages_only(connections: Connections) -> None:
    mine, other = await connections.open(), await connections.open()
    fence, theirs = await joined(mine), await joined(other)
    await write(mine, fence, messages=[a_message(mine, "a"), a_message(mine, "b")])
    assert mine.tail == 2
    assert other.tail == 0
    await write(mine, messages=[a_message(mine, "c")])
    assert mine.tail == 2, "without a fence nobody routes it: it has to be read"
    mine.tail = 3
    await write(other, theirs, messages=[a_message(other, "d")])
    await write(mine, fence, messages=[a_message(mine, "e")])
    assert mine.tail == 3, "what another one wrote before is not read yet"
    mine.tail = await mine.log_head()
    await write(mine, fence, journal=[JournalRow(1, 0, b"[]")])
    assert mine.tail == 5
    await write(mine, fence, messages=[a_message(mine, "f")])
    assert mine.tail == 6
    third = await connections.open()
    assert third.tail == 6


@_check
async def changes_by_others_are_noticed(connections: Connections) -> None:
    mine, other = await connections.open(), await connections.open()
    for wanted in (False, True, False):
        if wanted:
            await write(other, messages=[a_message(other, "a")])
        async with asyncio.timeout(NOTICED_S):  # it may be told late, and without a reason
            while mine.changed() is not wanted:
                await asyncio.sleep(0.01)


@_check
async def a_reader_skips_nothing_while_others_write(connections: Connections) -> None:
    reader = await connections.open()
    writers = [await connections.open() for _ in range(2)]
    chance = random.Random(2)
    writing = len(writers)
    read: list[Message] = []

    async def keep_writing(name: str, store: Store) -> None:
        nonlocal writing
        fence = await joined(store)
        serial = 0
        for _ in range(40):
            batch: list[Commit] = []
            for _ in range(chance.choice((1, 1, 2, 15))):
                ids = [f"{name}#{serial + at}" for at in range(chance.randrange(3))]
                serial += len(ids)
                batch.append(a_commit(messages=[a_message(store, id) for id in ids]))
            head = await store.log_head()
            assert not any(await written(store, *batch, fence=fence))
            assert all(m.pos > head for commit in batch for m in commit.messages)
        writing -= 1

    async def keep_reading() -> None:
        while True:
            last = not writing
            head = await reader.log_head()
            while reader.tail < head:
                page = await reader.read_log(reader.tail, head, None, 7, None)
                read.extend(page)
                reader.tail = page[-1].pos if len(page) == 7 else head
                if chance.random() < 0.5:
                    await asyncio.sleep(0)
            if last:
                return
            await asyncio.sleep(0)

    names = "ab"
    await asyncio.gather(keep_reading(), *map(keep_writing, names, writers))
    assert [m.pos for m in read] == list(range(1, len(read) + 1))
    assert [m.id for m in read] == [m.id for m in await whole_log(reader)]
    for name in names:
        own = [m.id for m in read if m.run == name]
        assert own == [f"{name}#{at}" for at in range(len(own))], "in the order of submission"


# -- finding runs and parked work --------------------------------------------------------------


@_check
async def runs_are_listed_by_filter_newest_first(connections: Connections) -> None:
    store = await connections.open()
    gold, plain = b'{"vip":true,"n":3,"na.me":"x"}', b'{"vip":false,"n":4,"na.me":"y\\"z"}'
    runs = [
        a_run(store, 1, "a-1", attributes=gold),
        a_run(store, 2, "a-2", status="waiting", attributes=plain),
        a_run(store, 3, "b-1", workflow="shop.refund"),
        a_run(store, 4, "a%_", "bank", home="bank", status="completed", ended_us=5),
        a_run(store, 5, "a-1", "bank"),
    ]
    await write(store, runs=runs)

    async def numbers(**which: Any) -> list[int]:
        return [row.no for row in await store.list_runs(RunFilter(**which))]

    assert await numbers() == [4, 3, 2, 1], "only at home, newest first"
    assert await numbers(limit=2) == [4, 3]
    assert await numbers(before=3) == [2, 1]
    assert await numbers(service="bank") == [4]
    assert await numbers(workflow="shop.refund") == [3]
    assert await numbers(status=("waiting", "completed")) == [4, 2]
    assert await numbers(id_prefix="a-") == [2, 1]
    assert await numbers(id_prefix="a%") == [4]
    assert await numbers(attributes=(("vip", True),)) == [1]
    assert await numbers(attributes=(("vip", False), ("n", 4))) == [2]
    assert await numbers(attributes=(("na.me", 'y"z'),)) == [2]
    assert await numbers(attributes=(("n", "3"),)) == []
    assert await numbers(attributes=(('odd"name', 1),)) == []
    assert await numbers(service="shop", status=("running",), id_prefix="a", before=9) == [1]
    assert (await store.list_runs(RunFilter(limit=1)))[0] == runs[3]


@_check
async def live_runs_are_paged_by_number(connections: Connections) -> None:
    store = await connections.open()
    runs = [a_run(store, no, f"r{no}", status="running") for no in range(1, 12)]
    for row, status in zip(runs, ("waiting", "stuck", "passed", "completed"), strict=False):
        row.status = status
    await write(store, runs=runs[::-1])
    targets = sorted({row.target for row in runs[:9]})
    live = [r.no for r in runs if r.status in ("running", "stuck") and r.target in targets]
    found: list[int] = []
    while page := await store.live_runs(targets, found[-1] if found else 0, 3):
        found += [row.no for row in page]
    assert found == live


@_check
async def due_runs_are_paged_through_ties(connections: Connections) -> None:
    store = await connections.open()
    wakes = [5, 5, 5, 5, 5, 3, 3, 9, 5, None, 20, 0]
    runs = [a_run(store, no, f"r{no}", wake_us=wake) for no, wake in enumerate(wakes, 1)]
    await write(store, runs=runs)
    await write(store, runs=[msgspec.structs.replace(runs[1], wake_us=None)])
    await write(store, runs=[msgspec.structs.replace(runs[2], wake_us=4)])
    targets = await all_targets(store)
    found: list[tuple[int, int]] = []
    while page := await store.due_runs(targets, found[-1] if found else (0, 0), 9, 2):
        found += [(row.wake_us or 0, row.no) for row in page]
    assert found == [(0, 12), (3, 6), (3, 7), (4, 3), (5, 1), (5, 4), (5, 5), (5, 9), (9, 8)]
    one = runs[0].target
    owned = await store.due_runs([one], (0, 0), LAST_US, 100)
    assert {row.target for row in owned} == {one}
    assert 1 in [row.no for row in owned]


@_check
async def due_parked_work_is_paged_through_ties(connections: Connections) -> None:
    store = await connections.open()
    dues = {"r1#1": 5, "r2#1": 5, "r1#10": 5, "r1#2": 5, "r9#1": 4, "r3#1": 6, "r4#1": 99}
    await write(store, parked=[a_parked(store, id, due_us=due) for id, due in dues.items()])
    targets = await all_targets(store)
    found: list[tuple[int, str]] = []
    while page := await store.due_parked(targets, found[-1] if found else (0, ""), 6, 2):
        found += [(row.due_us, row.id) for row in page]
    assert found == sorted((due, id) for id, due in dues.items() if due <= 6)
    shop = [row.target for row in await store.partition_rows(["shop"])]
    assert await store.due_parked(shop, (0, ""), LAST_US, 100) == []


@_check
async def inbox_marks_are_found_by_run_and_service(connections: Connections) -> None:
    store = await connections.open()
    marks = [
        InboxRow("bank", "r#2", 1), InboxRow("shop", "r#2", 2), InboxRow("shop", "r#1", 3, "bank"),
    ]  # fmt: skip
    others = [InboxRow("shop", id, 1) for id in ("r", "rr#1", "r/1#1", "q#r#1", "r$")]
    await write(store, inbox=[*marks, *others])
    assert await store.inbox_of("r") == sorted(marks, key=lambda row: (row.id, row.service))
    assert await store.seen("shop", ["r#1", "r#2", "r#3", "r"]) == {"r#1", "r#2", "r"}
    assert await store.seen("bank", ["r#1", "r#2"]) == {"r#2"}
    assert await store.seen("bank", []) == set()


# -- membership --------------------------------------------------------------------------------


@_check
async def services_have_the_same_partitions_for_all(connections: Connections) -> None:
    one, two = await connections.open(), await connections.open()
    assert one.partitions == two.partitions
    assert one.target_of("shop", "r") == two.target_of("shop", "r")
    rows = await one.partition_rows(SERVICES)
    assert len(rows) == 2 * one.partitions
    assert len({row.target for row in rows}) == len(rows)
    assert all(row.target > 0 and row.owner is None and row.clean for row in rows)
    for service in SERVICES:
        own = {row.target for row in await two.partition_rows([service])}
        assert {one.target_of(service, f"r{at}") for at in range(1000)} == own
        slots = [row.partition for row in rows if row.service == service]
        assert sorted(slots) == list(range(one.partitions))


@_check
async def a_new_service_begins_at_the_end_of_the_log(connections: Connections) -> None:
    store = await connections.open()
    await write(store, messages=[a_message(store, "r#1"), a_message(store, "r#2")])
    await store.register(["late", "shop"])
    assert {row.position for row in await store.partition_rows(["late"])} == {2}
    assert {row.position for row in await store.partition_rows(["shop"])} == {0}
    await store.register(["late"])
    assert len(await store.partition_rows(["late"])) == store.partitions


@_check
async def run_numbers_are_given_once(connections: Connections) -> None:
    one, two = await connections.open(), await connections.open()
    counts = [1, 5, 1, 100, 3] * 4
    firsts = await asyncio.gather(
        *((one, two)[at % 2].take_run_numbers(count) for at, count in enumerate(counts))
    )
    taken = [
        no
        for first, count in zip(firsts, counts, strict=True)
        for no in range(first, first + count)
    ]
    assert len(set(taken)) == sum(counts)
    assert min(taken) > 0


@_check
async def nodes_join_renew_and_leave(connections: Connections) -> None:
    one, two = await connections.open(), await connections.open()
    before_us = one.now_us()
    row = await one.join("a", "host", 42, ["shop"], LEASE_US)
    assert (row.name, row.host, row.pid, row.services) == ("a", "host", 42, ["shop"])
    assert before_us + LEASE_US - CLOCK_US <= row.expires_us
    assert row.expires_us <= two.now_us() + LEASE_US + CLOCK_US
    assert before_us - CLOCK_US <= row.joined_us <= two.now_us() + CLOCK_US
    assert await two.nodes() == [row]
    assert await two.ask_node(row.no, "drain")
    assert not await two.ask_node(row.no + 1, "drain")
    assert [node.asked for node in await one.nodes()] == ["drain"]
    shorter, now_us = Fence(row.no, row.nonce, LEASE_US // 2), two.now_us()
    assert one.renew(shorter)
    (renewed,) = await two.nodes()
    assert now_us + LEASE_US // 2 - CLOCK_US <= renewed.expires_us
    assert renewed.expires_us <= two.now_us() + LEASE_US // 2 + CLOCK_US
    assert not one.renew(Fence(row.no, "other", LEASE_US))
    assert not one.renew(Fence(row.no + 1, row.nonce, LEASE_US))
    targets = await all_targets(one)
    await one.claim(shorter, targets)
    await one.leave(Fence(row.no, "other", LEASE_US))
    assert len(await two.nodes()) == 1
    await one.leave(shorter)
    assert await two.nodes() == []
    assert all(r.owner is None and not r.clean for r in await two.partition_rows(SERVICES))
    assert not one.renew(shorter)
    again = await one.join("a", "host", 42, ["shop"], LEASE_US)
    assert again.no > row.no
    assert again.nonce != row.nonce
    assert again.asked == "", "what was asked of one is not asked of who comes after it"


@_check
async def who_renews_sees_who_else_is_there(connections: Connections) -> None:
    one, two = await connections.open(), await connections.open()
    mine = await joined(one)
    alone = one.renew(mine)
    assert alone is not None
    assert (alone.roster, alone.expires_us) == ((0, 0, 0), LAST_US)
    theirs = await joined(two)
    (_, row) = await one.nodes()
    seen = one.renew(mine)
    assert seen is not None
    assert (seen.roster, seen.expires_us) == ((1, theirs.node, 0), row.expires_us)
    await two.ask_node(mine.node, "drain")
    asked = one.renew(mine)
    assert asked is not None
    assert asked.roster == (1, theirs.node, 1), "it is told what people ask of itself, too"
    assert two.renew(Fence(theirs.node, theirs.nonce, LEASE_US // 2))
    sooner = one.renew(mine)
    assert two.renew(theirs)
    later = one.renew(mine)
    assert sooner is not None
    assert later is not None
    assert later.expires_us > sooner.expires_us + LEASE_US // 4
    await two.leave(theirs)
    left = one.renew(mine)
    assert left is not None
    assert left.roster == (0, 0, 1)


@_check
async def every_batch_prolongs_the_lease(connections: Connections) -> None:
    store = await connections.open()
    fence = await joined(store)
    assert store.renew(Fence(fence.node, fence.nonce, LEASE_US // 2))
    (before,) = await store.nodes()
    await write(store, fence, journal=[JournalRow(1, 0, b"[]")])
    (prolonged,) = await store.nodes()
    assert prolonged.expires_us > before.expires_us + LEASE_US // 4


@_check
async def partitions_have_one_owner(connections: Connections) -> None:
    one, two = await connections.open(), await connections.open()
    mine, theirs = await joined(one), await joined(two)
    targets = await all_targets(one)
    few = targets[:3]
    claimed = await one.claim(mine, few)
    assert [row.target for row in claimed] == few
    assert all(row.owner is None and row.clean for row in claimed), "as they were left"
    assert await two.claim(theirs, few) == []
    halves = await asyncio.gather(one.claim(mine, targets), two.claim(theirs, targets))
    assert sorted(row.target for half in halves for row in half) == targets[3:]
    owners = {row.target: row.owner for row in await one.partition_rows(SERVICES)}
    for fence, half in zip((mine, theirs), halves, strict=True):
        assert all(owners[row.target] == fence.node for row in half)
    await two.release(theirs, [(few[0], 0)])
    assert (await one.partition_rows(SERVICES))[0].owner == mine.node, "not theirs to give"
    await one.release(mine, [(few[0], 4)])
    (got,) = await two.claim(theirs, few)
    assert (got.target, got.clean, got.position) == (few[0], True, 4)


@_check
async def expiry_frees_partitions_unclean(connections: Connections) -> None:
    one, two = await connections.open(), await connections.open()
    mine, theirs = await joined(one), await joined(two)
    targets = await all_targets(one)
    await one.claim(mine, targets[:2])
    await two.claim(theirs, targets[2:3])
    gone = [node for node in await two.nodes() if node.no == mine.node]
    assert one.renew(Fence(mine.node, mine.nonce, LEASE_US // 2))
    await two.expire(gone)
    assert len(await two.nodes()) == 2, "it was renewed meanwhile"
    await two.expire([node for node in await two.nodes() if node.no == mine.node])
    assert [node.no for node in await one.nodes()] == [theirs.node]
    rows = {row.target: row for row in await one.partition_rows(SERVICES)}
    assert [(rows[t].owner, rows[t].clean) for t in targets[:2]] == [(None, False)] * 2
    assert rows[targets[2]].owner == theirs.node
    got = await two.claim(theirs, targets[:2])
    assert [row.clean for row in got] == [False, False]
    await two.release(theirs, [(targets[0], 0)])
    (again,) = await two.claim(theirs, targets[:1])
    assert again.clean


@_check
async def nothing_lands_under_a_lost_lease(connections: Connections) -> None:
    one, two = await connections.open(), await connections.open()
    lost, theirs = await joined(one), await joined(two)
    targets = await all_targets(one)
    await one.claim(lost, targets)
    run = a_run(one, 1, "r")
    parked = a_parked(one, "r#1")
    await write(one, lost, runs=[run], parked=[parked], journal=[JournalRow(1, 0, b"[]")])
    gone: list[NodeRow] = [node for node in await two.nodes() if node.no == lost.node]
    await two.expire(gone)
    await two.claim(theirs, targets)
    for size in (1, 30):
        batch = [
            a_commit(
                journal=[JournalRow(1, 1 + at, b"[]")], messages=[a_message(one, f"r#{at}")],
                inbox=[InboxRow("shop", f"i{at}", 1)], positions=[(targets[0], 9)],
                mail=[some_mail("r", f"m{at}")], unparked=[("bank", "r#1")],
                runs=[msgspec.structs.replace(run, status="completed")],
            )
            for at in range(size)
        ]  # fmt: skip
        results = await written(one, *batch, fence=lost)
        assert all(isinstance(result, LeaseLost) for result in results)
    assert "lost its lease" in str(results[0])
    assert not one.renew(lost)
    for work in (
        one.claim(lost, targets), one.release(lost, [(targets[0], 9)]),
        one.touch(lost, {1: 9}, [msgspec.structs.replace(parked, deaths=1)]),
    ):  # fmt: skip
        assert isinstance(await refusal(work), LeaseLost)
    await one.leave(lost)
    assert one.tail == 0
    assert await two.run_row("shop", "r") == run
    assert await two.parked_of("bank", "r") == [parked]
    assert len((await two.journals([1]))[1]) == 1
    assert await whole_log(two) == []
    assert await two.mail_of("shop", "r") == []
    assert await two.seen("shop", ["i0", "i1"]) == set()
    rows = await two.partition_rows(SERVICES)
    assert {(row.owner, row.position) for row in rows} == {(theirs.node, 0)}
    await write(two, theirs, journal=[JournalRow(1, 1, b"[]")])


# -- upkeep ------------------------------------------------------------------------------------


@_check
async def a_touch_is_counted(connections: Connections) -> None:
    one, two = await connections.open(), await connections.open()
    fence = await joined(one)
    run, parked = a_run(one, 1, "r", deaths=1), a_parked(one, "r#1")
    await write(one, fence, runs=[run, a_run(one, 2, "s")], parked=[parked])
    parked.deaths = 3
    await one.touch(fence, {1: 2, 99: 2}, [parked])
    await one.touch(fence, {1: 3}, [])
    await one.touch(fence, {1: 3}, [])  # as when its answer was lost
    await one.touch(fence, {1: 2}, [])
    assert await two.run_row("shop", "r") == msgspec.structs.replace(run, deaths=3)
    assert await two.run_row("shop", "s") == a_run(one, 2, "s")
    assert await two.parked_of("bank", "r") == [parked]


@_check
async def who_leaves_alive_takes_back_the_deaths_it_counted(connections: Connections) -> None:
    one, two = await connections.open(), await connections.open()
    fence = await joined(one)
    targets = await all_targets(one)
    await one.claim(fence, targets)
    runs = [a_run(one, no, f"r{no}", deaths=4) for no in range(1, 5)]
    parked = [a_parked(one, f"r{no}#1", deaths=4) for no in range(1, 5)]
    events = [ParkedEvent(1, pos, 0, "", 1, 1, 1, deaths=4) for pos in range(1, 5)]
    runs[0].deaths = parked[0].deaths = events[0].deaths = 0  # it went on since
    marks = [InboxRow("shop", f"r1#try{number}", 1) for number in (1, 2, 3)]
    await write(one, fence, runs=runs, parked=parked, reaction=Reaction(parked=events), inbox=marks)
    touched = [
        Touched({1: 3, 2: 3, 99: 3}, tries=[("shop", "r1#try2"), ("bank", "r1#try1")]),
        Touched({3: 2}, {("bank", "r1#1"): 3, ("bank", "r2#1"): 2}, {(1, 1): 3, (1, 2): 0}),
        Touched(parked={("bank", "r9#1"): 1}, events={(9, 1): 1}, tries=[("shop", "r1#try3")]),
        Touched(),
    ]
    await one.leave(Fence(fence.node, "other", LEASE_US), touched)
    assert await two.run_row("shop", "r2") == runs[1], "it is not who leaves"
    await one.leave(fence, touched)
    await one.leave(fence, touched)

    runs[1].deaths, runs[2].deaths = 3, 2
    parked[1].deaths, events[1].deaths = 2, 0
    assert [await two.run_row("shop", row.id) for row in runs] == runs
    assert [(await two.parked_of("bank", row.run))[0] for row in parked] == parked
    assert await two.parked_at([row.pos for row in events]) == events
    assert await two.seen("shop", [mark.id for mark in marks]) == {"r1#try1"}
    assert await two.nodes() == []
    assert all(row.owner is None for row in await two.partition_rows(SERVICES))


async def _finished_run(store: Store, no: int, id: str, **changes: Any) -> None:
    """Write a run that ended at 5000, with something of every kind at both services."""
    ended: dict[str, Any] = {"status": "completed", "ended_us": 5000}
    home = a_run(store, no, id, **(ended | changes))
    away = a_run(store, no + 1, id, "bank", status="passed")
    marks = [("shop", f"{id}#start"), ("shop", id), ("bank", f"{id}#1")]
    await write(
        store,
        runs=[home, away],
        journal=[JournalRow(no, 0, b"[]"), JournalRow(no + 1, 0, b"[]")],
        mail=[some_mail(id, "m"), some_mail(id, "m", "bank")],
        inbox=[InboxRow(service, mark, 1) for service, mark in marks],
        messages=[a_message(store, f"{id}#1")],
    )


async def _is_there(store: Store, no: int, id: str) -> set[bool]:
    """Tell, for everything that `_finished_run` wrote but the message, whether it is there."""
    found: list[Any] = [*(await store.journals([no, no + 1])).values()]
    for service in SERVICES:
        found += [await store.run_row(service, id), await store.mail_of(service, id)]
    for service, mark in (("shop", f"{id}#start"), ("shop", id), ("bank", f"{id}#1")):
        found.append(await store.seen(service, [mark]))
    return {bool(it) for it in found}


@_check
async def pruning_takes_old_runs_whole(connections: Connections) -> None:
    store = await connections.open()
    await _finished_run(store, 10, "old")
    await _finished_run(store, 20, "young", ended_us=20_000)
    await _finished_run(store, 30, "open", ended_us=None, status="waiting")
    await _finished_run(store, 40, "old/1", ended_us=None, status="running")
    await consume_all(store)
    assert await store.prune(10_000, 100) == 1 + 4
    assert await _is_there(store, 10, "old") == {False}
    for no, id in ((30, "open"), (40, "old/1")):
        assert await _is_there(store, no, id) == {True}, id
    assert await store.run_row("shop", "young") is not None
    assert await whole_log(store) == []
    assert await store.log_head() == 4
    assert await store.prune(10_000, 100) == 0
    await write(store, inbox=[InboxRow("shop", "old#start", 1)], runs=[a_run(store, 50, "old")])


@_check
async def pruning_keeps_what_is_not_consumed(connections: Connections) -> None:
    store = await connections.open()
    await write(store, inbox=[InboxRow("bank", "a#1", 1), InboxRow("shop", "e#1", 1)],
                messages=[a_message(store, "a#1"), a_message(store, "e#1", "")])  # fmt: skip
    await _finished_run(store, 10, "old")
    assert await store.prune(10_000, 100) == 1, "the run, but no message"
    assert [m.id for m in await whole_log(store)] == ["a#1", "e#1", "old#1"]
    assert await store.seen("bank", ["a#1", "old#1"]) == {"a#1", "old#1"}
    assert await store.seen("shop", ["e#1", "old#start", "old"]) == {"e#1"}
    head = await store.log_head()
    bank = {row.target for row in await store.partition_rows(["bank"])}
    await write(store, positions=[(target, head) for target in bank])
    assert await store.prune(10_000, 100) == 2, "an event stays until all have consumed it"
    assert [m.id for m in await whole_log(store)] == ["e#1"]
    assert await store.seen("bank", ["a#1", "old#1"]) == set()
    await consume_all(store)
    assert await store.prune(500, 100) == 0, "not old enough"
    assert await store.prune(10_000, 100) == 1
    assert await store.seen("shop", ["e#1"]) == set()


@_check
async def pruning_goes_on_in_small_batches(connections: Connections) -> None:
    store = await connections.open()
    for at in range(7):
        await _finished_run(store, 10 * at + 1, f"r{at}", ended_us=5000 + at)
    await consume_all(store)
    counts = [await store.prune(10_000, 3) for _ in range(4)]
    assert counts == [6, 6, 2, 0]
    for at in range(7):
        assert await _is_there(store, 10 * at + 1, f"r{at}") == {False}


# -- opening and closing -----------------------------------------------------------------------


@_check
async def a_store_describes_itself(connections: Connections) -> None:
    store = await connections.open()
    await write(store, runs=[a_run(store, 1, "r"), a_run(store, 2, "r", "bank")],
                messages=[a_message(store, "r#1")], parked=[a_parked(store, "r#1")])  # fmt: skip
    facts = await store.describe()
    assert facts["kind"]
    assert facts["place"]
    assert (facts["runs"], facts["messages"], facts["parked"]) == (1, 1, 1)


@_check
async def a_closed_store_refuses_work(connections: Connections) -> None:
    store = await connections.open()
    fence = await joined(store)
    await connections.close(store)
    await store.close()
    for work in (
        written(store, a_commit(journal=[JournalRow(1, 0, b"[]")])), store.take_run_numbers(1),
        store.run_row("shop", "r"), store.claim(fence, [1]), store.register(["another"]),
    ):  # fmt: skip
        try:
            results: Any = await work
        except StoreError as error:
            results = [error]
        assert isinstance(results[0], StoreError)
        assert "closed" in str(results[0])


@_check
async def closing_writes_what_was_submitted(connections: Connections) -> None:
    store, other = await connections.open(), await connections.open()
    for at in range(60):
        size = 1 if at % 2 else 20
        batch = [a_commit(journal=[JournalRow(at, seq, b"[]")]) for seq in range(size)]
        store.submit(batch, None, lambda results: None)
    await connections.close(store)
    journals = await other.journals(range(60))
    assert [len(journals[at]) for at in range(60)] == [20, 1] * 30


@_check
async def a_durable_store_is_found_again(connections: Connections) -> None:
    store = await connections.open()
    if not store.features.durable:
        return
    targets = await all_targets(store)
    run = a_run(store, 1, "r")
    await write(store, runs=[run], messages=[a_message(store, "r#1")], positions=[(targets[0], 1)])
    first = await store.take_run_numbers(10)
    await connections.close(store)
    again = await connections.open()
    assert await again.run_row("shop", "r") == run
    assert again.tail == 1
    assert await again.take_run_numbers(1) >= first + 10
    assert await all_targets(again) == targets
    assert (await again.partition_rows(["shop"]))[0].position == 1


STORE_CHECKS: tuple[StoreCheck, ...] = (*_checks, *EVENT_STORE_CHECKS)
"""Every check: of this file, then of events."""
