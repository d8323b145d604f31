"""A batch as values for the statements that write it: the rows of its commits, folded.

One statement a table writes all rows of a batch, so what commits do to one row one after the other
is folded into what becomes of it in the end: a row is written once, and what is taken away is taken
away before what is written. Only that is folded which the order of commits decides; what must be
there once (journal entries, marks) goes along as often as it was given, so that it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pavane.stores.eventlog import (
    ConversationRow,
    DeadRow,
    EventRow,
    MarkRow,
    ParkedEvent,
    Reaction,
)
from pavane.stores.port import Commit, Conflict, JournalRow, MailRow, Message, ParkedRow, RunRow

Row = tuple[Any, ...]

_JOURNAL = """(
    SELECT array_agg((j.run, j.seq, j.body)::pavane.journal_1)
    FROM unnest(
        string_to_array($6, ',')::bigint[], string_to_array($7, ',')::integer[], $8::text[]
    ) AS j (run, seq, body)
)"""
"""The rows of a journal, which are most of what is written, with their numbers as text: composites
and numbers in an array cost asyncpg twice as long as texts, or more."""
WRITE = f"""
SELECT * FROM pavane.write_1(
    $1, $2, $3, $4, $5, {_JOURNAL}, {", ".join(f"${at}" for at in range(9, 18))}
)
"""
WRITE_CHUNK = """
WITH proven AS (
    UPDATE pavane.nodes SET expires_us = pavane.clock_us() + $3, batch = $4
    WHERE no = $1 AND nonce = $2 AND batch = $4 - 1 RETURNING no
)
INSERT INTO pavane.journal SELECT $5::bigint, $6::integer, $7::text FROM proven
RETURNING 'written' AS verdict, 0 AS log_before
"""
"""What `write_1` does with a batch of nothing but one chunk of a journal, in less time: a run that
is alone commits little else. No row comes back if the lease, or the number of the batch before, is
not as expected, and then nothing was written; `write_1` tells why."""
_EMPTY: list[Row] = []


class Batch:
    """Some commits, in order, as the rows that are written.

    Raises Conflict for what repeats something of the same batch, and whatever making a row of a bad
    value raises.
    """

    def __init__(self, commits: Sequence[Commit]) -> None:
        self.size_bytes = 0
        """About how much it is, by what may be large in it."""
        self.messages: list[Message] = []
        self.events: list[EventRow] = []
        runs: dict[int, Row] = {}
        self._journal: list[JournalRow] = []
        inbox: list[Row] = []
        reactions: list[Reaction] = []
        self._mail: dict[tuple[str, str, str], Row] = {}
        self._mail_taken: dict[tuple[str, str, str], None] = {}
        self._parked: dict[tuple[str, str], Row] = {}
        self._unparked: dict[tuple[str, str], None] = {}
        positions: dict[int, int] = {}
        for commit in commits:
            if commit.messages:
                self.messages += commit.messages
            for run in commit.runs:
                known = runs.get(run.no)
                runs[run.no] = _run(run) if known is None else _run_again(known, run)
                if run.result is not None:
                    self.size_bytes += len(run.result)
            if commit.journal:
                self._journal += commit.journal
            for mark in commit.inbox:
                inbox.append((mark.id, mark.service, mark.at_us, mark.passed_to))
            if commit.mail or commit.mail_taken:
                self._fold_mail(commit)
            if commit.parked or commit.unparked:
                self._fold_parked(commit)
            for target, position in commit.positions:
                positions[target] = max(position, positions.get(target, position))
            if commit.events:
                self.events += commit.events
            if commit.reaction is not None:
                reactions.append(commit.reaction)
                self.size_bytes += sum([len(state.body or b"") for state in commit.reaction.states])
        self.size_bytes += sum([len(chunk.body) for chunk in self._journal])
        self.size_bytes += sum([len(message.body) for message in self.messages])
        self.size_bytes += sum([len(event.data) for event in self.events])
        self._values = (
            list(runs.values()) or None,
            *_columns(self._journal),
            [(m.target, m.kind, m.id, m.to, m.run, m.at_us, m.body.decode()) for m in self.messages]
            if self.messages else _EMPTY,
            inbox or None,
            list(self._mail_taken) or None,
            list(self._mail.values()) or None,
            list(self._unparked) or None,
            list(self._parked.values()) or None,
            sorted(positions.items()) or None,
            [_event(e) for e in self.events] if self.events else _EMPTY,
            _Reactions(reactions).values() if reactions else None,
        )  # fmt: skip

    @property
    def concerns_others(self) -> bool:
        """Whether other processes may wait to be told of some of it."""
        return bool(self.messages or self.events)

    @property
    def values(self) -> Row:
        """What `write_1` takes after the fence and the batch's number.

        None costs less than no rows; but the two logs are counted, and a reaction without one of
        its parts would be none to Postgres.
        """
        return self._values

    @property
    def chunk(self) -> Row | None:
        """The only row, if there is one, and it is a chunk of a journal."""
        runs, _, _, _, *others = self._values
        if len(self._journal) != 1 or runs or any(others):
            return None
        (only,) = self._journal
        return (only.run, only.seq, only.body.decode())

    def placed(self, log_before: int, events_before: int, new_events: Sequence[int]) -> None:
        """Tell messages and events where in the logs they are."""
        for pos, message in enumerate(self.messages, log_before + 1):
            message.pos = pos
        if len(new_events) == len(self.events):
            for pos, event in enumerate(self.events, events_before + 1):
                event.pos = pos
        else:
            new = set(new_events)
            for pos, event in enumerate(self.events, events_before + 1):
                event.pos = pos if pos in new else 0

    def _fold_mail(self, commit: Commit) -> None:
        for row in commit.mail:
            self._mail.setdefault((row.service, row.run, row.id), mail_values(row))
            self.size_bytes += len(row.body)
        for taken in commit.mail_taken:
            service, run, id = taken
            self._mail_taken[service, run, id] = None
            if id == "*":
                for key in [key for key in self._mail if key[:2] == (service, run)]:
                    del self._mail[key]
            else:
                self._mail.pop((service, run, id), None)

    def _fold_parked(self, commit: Commit) -> None:
        for row in commit.parked:
            self.size_bytes += len(row.call)
            key = (row.service, row.id)
            known = self._parked.get(key)
            self._parked[key] = parked_values(row) if known is None else _parked_again(known, row)
        for service, id in commit.unparked:
            self._unparked[service, id] = None
            self._parked.pop((service, id), None)


class _Reactions:
    """What handlers made of events, folded like the rest of a batch."""

    def __init__(self, reactions: Sequence[Reaction]) -> None:
        self._marks: list[Row] = []
        self._remarks: dict[tuple[int, int], Row] = {}
        self._unparked: dict[tuple[int, int], None] = {}
        self._parked: dict[tuple[int, int], Row] = {}
        self._undead: dict[int, None] = {}
        self._dead: list[Row] = []
        self._asked: dict[int, str] = {}
        self._states: dict[tuple[str, str, str], bytes | None] = {}
        self._shadows: dict[tuple[int, int], Row] = {}
        self._unawaited: dict[tuple[str, str], None] = {}
        self._awaited: dict[tuple[str, str], Row] = {}
        self._kept: dict[Row, Row] = {}
        self._cursors: dict[tuple[int, int], int] = {}
        self._conversations: dict[tuple[str, str], Row] = {}
        self._members: dict[tuple[str, str], None] = {}
        for reaction in reactions:
            self._fold_progress(reaction)
            self._fold_custody(reaction)
            self._fold_mailbox(reaction)
            self._fold_rest(reaction)

    def values(self) -> Row:
        states = self._states.items()
        return (
            self._marks,
            list(self._remarks.values()),
            list(self._unparked),
            list(self._parked.values()),
            list(self._undead),
            self._dead,
            list(self._asked.items()),
            [(*key, None) for key, body in states if body is None],
            [(*key, body.decode()) for key, body in states if body is not None],
            list(self._shadows.values()),
            list(self._unawaited),
            list(self._awaited.values()),
            list(self._kept.values()),
            [(*key, position) for key, position in self._cursors.items()],
            list(self._conversations.values()),
            list(self._members),
        )

    def _fold_progress(self, r: Reaction) -> None:
        for mark in r.marks:
            if (mark.handler, mark.pos) in self._remarks:
                raise Conflict("This event was marked in the same batch.")
            self._marks.append(_mark(mark))
        for mark in r.remarks:
            self._remarks[mark.handler, mark.pos] = _mark(mark)
        for handler, slot, position in r.cursors:
            known = self._cursors.get((handler, slot), position)
            self._cursors[handler, slot] = max(position, known)

    def _fold_custody(self, r: Reaction) -> None:
        for handler, pos in r.unparked:
            self._unparked[handler, pos] = None
            self._parked.pop((handler, pos), None)
        for row in r.parked:
            self._parked[row.handler, row.pos] = _parked_event(row)
        self._undead.update(dict.fromkeys(r.undead))
        self._dead += map(_dead, r.dead)
        self._asked.update(r.asked)

    def _fold_mailbox(self, r: Reaction) -> None:
        for run, id in r.unawaited:
            self._unawaited[run, id] = None
            if id == "*":
                for key in [key for key in self._awaited if key[0] == run]:
                    del self._awaited[key]
            else:
                self._awaited.pop((run, id), None)
        for a in r.awaited:
            self._awaited[a.run, a.id] = (
                a.service, a.type, a.key, a.run, a.id, a.at_us, a.reply.decode(), a.pos
            )  # fmt: skip
        for k in r.kept:
            row = (k.service, k.type, k.key, k.pos, k.expires_us)
            self._kept.setdefault(row[:4], row)

    def _fold_rest(self, r: Reaction) -> None:
        for state in r.states:
            self._states[state.service, state.name, state.key] = state.body
        for s in r.shadows:
            self._shadows[s.handler, s.pos] = (
                s.handler, s.pos, s.at_us, s.events.decode(), s.error.decode()
            )  # fmt: skip
        for row in r.conversations:
            self._conversations[row.contract, row.id] = _conversation(row)
        self._members.update(dict.fromkeys(r.members))


def _columns(journal: Sequence[JournalRow]) -> tuple[str | None, str | None, list[str] | None]:
    if not journal:
        return None, None, None
    return (
        ",".join([str(chunk.run) for chunk in journal]),
        ",".join([str(chunk.seq) for chunk in journal]),
        [chunk.body.decode() for chunk in journal],
    )


def _run(r: RunRow) -> Row:
    return (
        r.no, r.service, r.id, r.target, r.workflow, r.version, r.mode, r.home, r.status, r.holder,
        r.hop, r.header.decode(), r.trail.decode(), r.attributes.decode(), r.wake_us,
        r.reason.replace("\0", "␀") if "\0" in r.reason else r.reason,
        r.deaths, r.started_us, r.ended_us, None if r.result is None else r.result.decode(),
        r.undone, r.entries,
    )  # fmt: skip


def _run_again(first: Row, r: RunRow) -> Row:
    """Return what becomes of a run that is written again: what never changes stays."""
    row = _run(r)
    return (*first[:6], row[6], first[7], *row[8:17], first[17], *row[18:])


def parked_values(r: ParkedRow) -> Row:
    return (
        r.id, r.service, r.run, r.target, r.call.decode(), r.attempt, r.due_us, r.began_us,
        r.beat.decode(), r.error.decode(), r.deaths,
    )  # fmt: skip


def _parked_again(first: Row, r: ParkedRow) -> Row:
    row = parked_values(r)
    return (*first[:5], row[5], row[6], first[7], *row[8:])


def mail_values(r: MailRow) -> Row:
    return (r.service, r.run, r.id, r.type, r.body.decode(), r.at_us)


def _event(e: EventRow) -> Row:
    return (
        e.slot, e.id, e.type, e.version, e.key, e.source, e.at_us, e.conversation, e.cause, e.trace,
        e.data.decode(),
    )  # fmt: skip


def _mark(r: MarkRow) -> Row:
    return (r.handler, r.pos, r.at_us, r.took_us, r.attempts, r.outcome, r.by)


def _parked_event(r: ParkedEvent) -> Row:
    return (
        r.handler, r.pos, r.slot, r.key, r.attempt, r.due_us, r.began_us, r.error.decode(),
        r.deaths, r.again, None if r.data is None else r.data.decode(), r.dead,
    )  # fmt: skip


def _dead(r: DeadRow) -> Row:
    return (
        r.handler, r.pos, r.slot, r.key, r.type, r.event, r.at_us, r.attempts, r.cause,
        r.error.decode(), r.data.decode(), r.holds, r.asked, r.again,
    )  # fmt: skip


def _conversation(r: ConversationRow) -> Row:
    return (
        r.contract, r.id, r.key, r.started_us, r.due_us, r.ended_us, r.end, r.ends, r.last,
        r.last_us, r.milestones.decode(), r.raised,
    )  # fmt: skip
