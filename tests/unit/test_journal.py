"""The journal as it is stored: chunks that read back, and what a rewind voids."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from pavane.core.baton import Baton, Header, Outcome, Stop, decode_baton, encode_baton
from pavane.core.codec import FORMAT, encode
from pavane.core.journal import (
    Entry,
    decode_chunk,
    effective,
    encode_entry,
    eras,
    issue_eras,
    join_entries,
)
from pavane.errors import CorruptJournal


def entries(*ops: int) -> list[Entry]:
    return [Entry("done", 1, op) for op in ops]


def rewind(to: int) -> Entry:
    return Entry("rewind", 2, to)


@given(st.lists(st.tuples(st.integers(-1, 9), st.text(max_size=20), st.lists(st.text(max_size=9)))))
def test_entries_come_back_from_a_chunk_as_they_were(
    fields: list[tuple[int, str, list[str]]],
) -> None:
    written = [
        Entry("done", 5, op, Raw(encode(value)), "pay", 2, 3, issued)
        for op, value, issued in fields
    ]
    read = decode_chunk(join_entries(map(encode_entry, written)))
    assert [bytes(entry.value) for entry in read] == [bytes(entry.value) for entry in written]
    assert [entry.issued for entry in read] == [entry.issued for entry in written]
    assert [(e.what, e.at_us, e.op, e.service, e.attempts, e.began_us) for e in read] == [
        ("done", 5, op, "pay", 2, 3) for op, _, _ in fields
    ]


@pytest.mark.parametrize(
    "chunk",
    [b"", b"[", b"{}", b'[["nonsense",1]]', b'[["done"]]', b"\xff\xfe", b'[["done",1,"x"]]'],
)
def test_a_row_that_cannot_be_read_is_named_as_such(chunk: bytes) -> None:
    with pytest.raises(CorruptJournal, match="cannot be read"):
        decode_chunk(chunk)


def test_an_entry_of_a_later_release_with_more_fields_can_be_read() -> None:
    raw = encode_entry(Entry("done", 1, 0))
    assert decode_chunk(b"[" + raw[:-1] + b',"more"]]')[0].op == 0


def test_a_rewind_voids_what_came_after_its_place_and_nothing_else() -> None:
    journal = [*entries(0, 1, 2), rewind(2), *entries(5, 6), rewind(3), *entries(7)]
    assert [entry.op for entry in effective(journal)] == [0, 1, 5, 7]
    assert eras(journal) == 2


def test_a_rewind_at_the_end_keeps_everything() -> None:
    assert [entry.op for entry in effective([*entries(0, 1), rewind(2)])] == [0, 1]


def baton() -> Baton:
    header = Header("r", "flow", 1, "home", "choreography", 1, "r")
    chunk = join_entries(map(encode_entry, entries(0, 1)))
    return Baton(FORMAT, header, 3, 2, Raw(chunk), [Stop("home", 1, 0)], {"a": 1})


def test_a_baton_comes_back_as_it_was() -> None:
    read = decode_baton(encode_baton(baton()))
    assert (read.header, read.hop, read.count) == (baton().header, 3, 2)
    assert (read.trail, read.attributes, read.outcome) == ([Stop("home", 1, 0)], {"a": 1}, None)
    assert [entry.op for entry in decode_chunk(bytes(read.entries))] == [0, 1]


def test_an_ended_baton_carries_its_outcome() -> None:
    ended = baton()
    ended.outcome = Outcome("completed", Raw(b'"fine"'))
    read = decode_baton(encode_baton(ended)).outcome
    assert read is not None
    assert (read.status, bytes(read.value)) == ("completed", b'"fine"')


def test_a_baton_of_a_later_format_is_refused_with_what_to_do() -> None:
    later = baton()
    later.format = FORMAT + 1
    with pytest.raises(CorruptJournal, match="upgrade"):
        decode_baton(encode_baton(later))


@pytest.mark.parametrize("cut", [0, 1, 10, -1])
def test_a_torn_baton_is_refused(cut: int) -> None:
    with pytest.raises(CorruptJournal, match="baton"):
        decode_baton(encode_baton(baton())[:cut])


def test_an_operation_keeps_the_era_in_which_it_was_asked_for() -> None:
    def asked(*marks: str) -> Entry:
        return Entry("done", 1, 0, issued=list(marks))

    journal = [asked("step a.b"), asked("patch x", "step a.c"), asked("step a.d", "step a.e")]
    assert issue_eras(journal) == [0, 0, 0, 0]
    assert issue_eras([*journal, rewind(3)]) == [0, 0, 0, 0]
    assert issue_eras([*journal, rewind(2), asked("step a.d")]) == [0, 0, 1]
    assert issue_eras([*journal, rewind(2), asked("step a.d"), rewind(1)]) == [0]
    assert issue_eras([asked(), rewind(0), asked("step a.b"), rewind(1), asked("t")]) == [1, 2]
