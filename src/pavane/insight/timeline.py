"""A run's history as a timeline: who held the baton when, and what became of each operation.

Pure: a `RunHistory` and a time go in, a `Timeline` comes out. Whoever draws it (the terminal, the
dashboard) decides nothing about the run. What a journal does not tell is guessed here, in one
place: that an operation was given up is not recorded, so a timer that has not fired, of a run that
does not wait for one, counts as dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from pavane.app import RunHistory, RunStatus
from pavane.core.baton import ENDED, Stop
from pavane.core.codec import error_summary
from pavane.core.envelope import Call, unpack
from pavane.core.journal import DELIVERIES, Entry, effective, eras
from pavane.core.operations import EXPIRY
from pavane.errors import CorruptJournal

Kind = Literal["step", "undo", "timer", "receive", "child", "spawn", "publish", "attributes"]
State = Literal["done", "failed", "running", "waiting", "parked", "stuck", "dropped"]

_AT_ONCE = ("spawn", "publish", "attributes")
_NO_SERVICE = ("timer", "attributes")


class Leg(msgspec.Struct, frozen=True):
    """`service` held the baton from `from_us` until `until_us`; hop 0 is the start."""

    service: str
    hop: int
    from_us: int
    until_us: int


class Span(msgspec.Struct, frozen=True):
    """One operation of a run, from when it was asked for until its result was delivered.

    `began_us` is when its last attempt began (0: unknown); `ended_us` is None while it is open.
    `next_us` is when a parked step is tried again, or a timer fires, if that is known. `text` is an
    error's summary, or what else there is to say.
    """

    op: int
    kind: Kind
    service: str
    name: str
    state: State
    issued_us: int
    began_us: int
    ended_us: int | None
    attempts: int
    next_us: int | None
    text: str

    @property
    def label(self) -> str:
        return f"{self.service}.{self.name}" if self.service else self.name


class Mark(msgspec.Struct, frozen=True):
    """Something that happened to the run as a whole; a fault is a simulated mishap."""

    at_us: int
    what: Literal["cancel", "retry", "fork", "fault"]
    text: str


class Timeline(msgspec.Struct, frozen=True):
    """What there is to draw of a run. Times are microseconds since the epoch.

    `from_us` to `until_us` is the axis that legs and spans share. `result` is the decoded result of
    a completed run; `problem` says why part of the history is missing, if so.
    """

    status: RunStatus
    from_us: int
    until_us: int
    now_us: int
    legs: list[Leg]
    spans: list[Span]
    marks: list[Mark]
    mail: list[str]
    result: Any
    problem: str

    @property
    def ended(self) -> bool:
        return self.status.status in ENDED


class Moment(msgspec.Struct, frozen=True):
    """One line of a run's or conversation's life; `key` tells it from all others of the same."""

    at_us: int
    key: str
    what: str
    text: str


def timeline(
    history: RunHistory, *, now_us: int, result: bytes | None = None, wake_us: int | None = None,
    taken: Mapping[int, str] | None = None,
) -> Timeline:  # fmt: skip
    """Return the timeline of a run as it is at `now_us`.

    `result` is the stored result of its row; `wake_us` when its next timer is due, if known;
    `taken` the ids of the published events that it received, by its operations.
    """
    status = history.status
    delivered = effective(history.entries)
    legs = _legs(history.trail, status.ended_us or now_us)
    first_us = status.started_us  # a fork's shared entries are older
    until_us = status.ended_us or now_us
    return Timeline(
        status=status,
        from_us=first_us,
        until_us=max(until_us, first_us, *(entry.at_us for entry in delivered)),
        now_us=now_us,
        legs=legs,
        spans=_Spans(history, delivered, now_us, wake_us, taken or {}).all(),
        marks=_marks(history.entries),
        mail=[mail.type for mail in history.mail],
        result=msgspec.json.decode(result) if result and status.status == "completed" else None,
        problem=history.problem,
    )


def _legs(trail: Sequence[Stop], end_us: int) -> list[Leg]:
    ends = [*(stop.at_us for stop in trail[1:]), end_us]
    return [
        Leg(stop.service, stop.hop, stop.at_us, max(stop.at_us, end))
        for stop, end in zip(trail, ends, strict=False)
    ]


def _fingerprints(entries: Iterable[Entry]) -> Iterable[tuple[str, int]]:
    """Yield what was asked for and when, in the order of the operations' ordinals."""
    for entry in entries:
        for mark in entry.asked:
            yield mark, entry.at_us


def _marks(entries: Sequence[Entry]) -> list[Mark]:
    marks: list[Mark] = []
    kept: list[Entry] = []
    for entry in entries:
        if entry.what == "rewind":
            # By hand a run is never taken back to before its beginning.
            text = _voided(kept, kept[entry.op :]) if entry.op else "begun anew by a worker"
            marks.append(Mark(entry.at_us, "retry", text))
            del kept[entry.op :]
            continue
        kept.append(entry)
        if entry.what == "cancel":
            marks.append(Mark(entry.at_us, "cancel", "asked to cancel"))
        elif entry.what == "fork":
            marks.append(Mark(entry.at_us, "fork", "forked here from another run"))
    return marks


def _voided(kept: Sequence[Entry], voided: Sequence[Entry]) -> str:
    """Say what a retry took back."""
    asked = [mark.partition(" ")[2] for mark, _ in _fingerprints(kept)]
    lost = [
        asked[entry.op] + (f" ({error_summary(bytes(entry.value))})" * (entry.what == "failed"))
        for entry in voided
        if entry.what in DELIVERIES and 0 <= entry.op < len(asked)
    ]
    return "retried by hand" + (f", anew from {', '.join(lost[:3])}" if lost else "")


class _Spans:
    """Works out what became of each operation of one history."""

    def __init__(
        self, history: RunHistory, delivered: Sequence[Entry], now_us: int, wake_us: int | None,
        taken: Mapping[int, str],
    ) -> None:  # fmt: skip
        self._status = history.status
        self._delivered = delivered
        self._now_us = now_us
        self._wake_us = wake_us
        self._taken = taken
        self._results = {e.op: e for e in delivered if e.what in DELIVERIES}
        self._cancelled_us = max((e.at_us for e in delivered if e.what == "cancel"), default=0)
        self._waits = self._status.reason.split(", ")
        era = eras(history.entries)
        self._parked = {
            call.op: row
            for row in history.parked
            if (call := _call(row.call)) is not None and call.era == era
        }

    def all(self) -> list[Span]:
        return [
            self._span(op, fingerprint, issued_us)
            for op, (fingerprint, issued_us) in enumerate(_fingerprints(self._delivered))
        ]

    def _span(self, op: int, fingerprint: str, issued_us: int) -> Span:
        word, _, rest = fingerprint.partition(" ")
        kind: Kind = msgspec.convert(word, Kind)
        service, dot, name = rest.partition(".")
        if not dot or kind in _NO_SERVICE:
            service, name = "", rest
        entry = self._results.get(op)
        if entry is not None:
            return self._delivered_span(op, kind, service, name, issued_us, entry)
        if kind in _AT_ONCE:
            child = f"run {self._status.id}/{op}" if kind == "spawn" else ""
            return Span(op, kind, service, name, "done", issued_us, 0, issued_us, 0, None, child)
        return self._open_span(op, kind, service, name, issued_us)

    def _delivered_span(
        self, op: int, kind: Kind, service: str, name: str, issued_us: int, entry: Entry
    ) -> Span:
        state: State = "failed" if entry.what == "failed" else "done"
        text = error_summary(bytes(entry.value)) if state == "failed" else ""
        if kind == "child" and not text:
            text = f"run {self._status.id}/{op}"
        if kind == "receive" and op in self._taken:
            text = f"event {self._taken[op]}"
        began_us = entry.began_us if kind in ("step", "undo") else 0
        ended_us = max(issued_us, entry.at_us)
        return Span(
            op,
            kind,
            service,
            name,
            state,
            issued_us,
            began_us,
            ended_us,
            entry.attempts,
            None,
            text,
        )

    def _open_span(self, op: int, kind: Kind, service: str, name: str, issued_us: int) -> Span:
        state: State = "running" if kind in ("step", "undo", "child") else "waiting"
        began_us, attempts, next_us, text, ended_us = 0, 0, None, "", None
        if kind == "child":
            text = f"run {self._status.id}/{op}"
        if self._is_dropped(kind, name, issued_us):
            state, ended_us = "dropped", self._dropped_us(issued_us)
        elif self._status.status == "stuck":
            state = "stuck"
        elif kind == "timer":
            next_us = self._wake_us
        elif (row := self._parked.get(op)) is not None:
            attempts, failed = row.attempt, row.error != b"null"
            text = error_summary(row.error) if failed else ""
            if failed and row.due_us > self._now_us:
                state, next_us = "parked", row.due_us
            else:
                began_us = row.due_us
        return Span(
            op, kind, service, name, state, issued_us, began_us, ended_us, attempts, next_us, text
        )

    def _is_dropped(self, kind: Kind, name: str, issued_us: int) -> bool:
        status = self._status.status
        if status in ENDED or (kind != "undo" and issued_us < self._cancelled_us):
            return True
        if kind != "timer" or name == EXPIRY:
            return False
        return status == "waiting" and "timer" not in self._waits

    def _dropped_us(self, issued_us: int) -> int | None:
        if issued_us < self._cancelled_us:
            return self._cancelled_us
        return self._status.ended_us


def _call(raw: bytes) -> Call | None:
    try:
        return unpack(Call, raw)
    except CorruptJournal:
        return None


def moments(line: Timeline) -> list[Moment]:
    """Return the run's life as lines in the order in which they happened, for logs."""
    status = line.status
    found = [
        Moment(status.started_us, "start", "started",
               f"{status.workflow} v{status.version} at {status.home}, {status.mode}")
    ]  # fmt: skip
    for leg in line.legs[1:]:
        found.append(Moment(leg.from_us, f"hop{leg.hop}", "passed", f"the baton to {leg.service}"))
    for mark in line.marks:
        found.append(Moment(mark.at_us, f"{mark.what}{mark.at_us}", mark.what, mark.text))
    for span in line.spans:
        found += _span_moments(span)
    found.sort(key=lambda moment: moment.at_us)
    if status.status in ENDED:
        found.append(Moment(status.ended_us or line.until_us, "end", status.status, status.reason))
    elif status.status == "stuck":
        found.append(Moment(line.now_us, "stuck" + status.reason, "stuck", status.reason))
    return found


def _span_moments(span: Span) -> Iterable[Moment]:
    if span.kind == "attributes":
        return
    key = f"{span.op}{span.state}{span.issued_us}"
    what = f"{span.kind} {span.label}" if span.label != span.kind else span.label
    if span.state in ("done", "failed"):
        details = [f"{span.attempts} attempts"] if span.attempts > 1 else []
        details += [span.text] if span.text else []
        text = what + (f" ({'; '.join(details)})" if details else "")
        yield Moment(span.ended_us or span.issued_us, key, span.state, text)
    elif span.state == "parked":
        text = f"{what}: attempt {span.attempts} follows: {span.text}"
        yield Moment(span.next_us or span.issued_us, f"{key}{span.attempts}", "parked", text)
    elif span.state == "waiting" and span.name != EXPIRY:
        yield Moment(span.issued_us, key, "waits", what)
