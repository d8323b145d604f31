"""Draws a run's timeline in a terminal: a header, who held the baton when, and a bar per operation.

Takes a `Timeline` and returns lines; colours are ANSI codes that whoever prints takes out where
they are not wanted. All bars share one time axis.
"""

from __future__ import annotations

from typing import Any

import click
import msgspec

from pavane.cli.text import clock, columns, counted, duration, fit, joined, printable, wrapped
from pavane.core.operations import EXPIRY
from pavane.insight.timeline import Leg, Mark, Span, Timeline

WIDTH_MIN = 50
ROWS_MAX = 400
HUES = ("cyan", "magenta", "yellow", "blue", "green", "bright_red", "bright_cyan", "bright_magenta")
STATUS_COLOURS = {
    "completed": "green", "failed": "red", "cancelled": "yellow", "killed": "red", "stuck": "red",
    "running": "cyan", "waiting": "blue", "continued": "green",
}  # fmt: skip


class Glyphs(msgspec.Struct, frozen=True):
    """The characters of a drawing; each takes one column, whatever the font."""

    full: str
    """An attempt of a step, or the holding of the baton."""
    queued: str
    """A step that was asked for but not begun, or that failed and is tried again."""
    wait: str
    """A timer or event that is waited for."""
    more: str
    """The right end of something that goes on."""
    hook: str
    ellipsis: str
    dot: str
    times: str
    signs: dict[str, str]


UNICODE = Glyphs(
    "█", "░", "·", "▸", "└ ", "…", "·", "×",
    {
        "done": "✓", "failed": "✗", "running": "▸", "parked": "◌", "stuck": "!", "dropped": "-",
        "waiting": "○", "undo": "↶", "timer": "◷", "receive": "◆", "publish": "»", "spawn": "»",
        "attributes": "=", "cancel": "✗", "retry": "↻", "fork": "⑂",
        "fault": "↯",
    },
)  # fmt: skip
ASCII = Glyphs(
    "#", ":", ".", ">", "` ", "...", "-", "x",
    {
        "done": "+", "failed": "x", "running": ">", "parked": "o", "stuck": "!", "dropped": "-",
        "waiting": "o", "undo": "<", "timer": "t", "receive": "e", "publish": ">", "spawn": ">",
        "attributes": "=", "cancel": "x", "retry": "r", "fork": "f",
        "fault": "!",
    },
)  # fmt: skip


def draw(
    line: Timeline, *, width: int, unicode: bool = True, height: int | None = None
) -> list[str]:
    """Return the picture as lines of at most `width` columns.

    With `height`, earlier operations are left out so that the whole fits.
    """
    return _Drawing(line, max(width, WIDTH_MIN), UNICODE if unicode else ASCII, height).lines()


class _Drawing:
    """One picture: its columns, its axis, its colours."""

    def __init__(self, line: Timeline, width: int, glyphs: Glyphs, height: int | None) -> None:
        self._line = line
        self._width = width
        self._glyphs = glyphs
        self._height = height
        self._spans = [s for s in line.spans if not _is_noise(s)]
        services = [leg.service for leg in line.legs] + [s.service for s in self._spans]
        names = [name for name in dict.fromkeys(services) if name]
        self._colours = {name: HUES[at % len(HUES)] for at, name in enumerate(names)}
        longest = max(
            [columns(self._label(s)) for s in self._spans] + [columns(n) for n in names] + [8]
        )
        self._label_width = min(longest, max(16, width * 2 // 5))
        self._tries = any(s.attempts > 1 for s in self._spans)
        self._gutter = 2 + self._label_width + (5 if self._tries else 0) + 9
        self._room = width - self._gutter
        self._axis_us = max(line.until_us - line.from_us, 1)

    def lines(self) -> list[str]:
        head = [*self._header(), ""]
        lanes = self._lanes()
        tail = self._outcome()
        rows = self._rows()
        if self._height is not None:
            rows_max = max(3, self._height - len(head) - len(lanes) - len(tail) - 1)
        else:
            rows_max = ROWS_MAX
        return [*head, *lanes, *self._clipped(rows, rows_max), *tail]

    def _clipped(self, rows: list[list[str]], rows_max: int) -> list[str]:
        flat = [text for row in rows for text in row]
        if len(flat) <= rows_max:
            return flat
        left_out = 0
        count = len(flat)
        while rows and count > rows_max - 1:
            count -= len(rows.pop(0))
            left_out += 1
        note = f"  {self._glyphs.ellipsis} {counted(left_out, 'earlier row')} not shown"
        return [_dim(note), *(text for row in rows for text in row)]

    # -- header --------------------------------------------------------------------------------

    def _header(self) -> list[str]:
        status = self._line.status
        dot = f" {self._glyphs.dot} "
        version = f" v{status.version}" if status.version != 1 else ""
        name = f"{printable(status.workflow)}{version}  {printable(status.id)}"
        state = status.status
        if status.compensated and self._line.ended:
            state += f", {status.compensated} undone"
        gap = " " * max(2, self._width - columns(name) - columns(state))
        took = "took" if self._line.ended else "for"
        facts = [
            f"{status.mode} from {status.home}",
            f"started {clock(status.started_us)}",
            f"{took} {duration(self._axis_us)}",
            counted(status.hops, "hop"),
        ]
        if not self._line.ended:
            facts.append(f"at {status.holder}")
        if status.compensated and not self._line.ended:
            facts.append(f"{status.compensated} undone")
        facts += [f"{k}={printable(str(v))}" for k, v in status.attributes.items()]
        colour = STATUS_COLOURS.get(status.status)
        first = click.style(name, bold=True) + gap + click.style(state, fg=colour, bold=True)
        return [first, *(_dim(text) for text in joined(facts, dot, self._width))]

    # -- lanes ---------------------------------------------------------------------------------

    def _lanes(self) -> list[str]:
        """Return the axis and one lane per service that held the baton."""
        legs = self._line.legs
        scale = " " * self._gutter + self._scale()
        if not legs:
            return [_dim(scale)]
        title = fit("baton held by", self._gutter, ellipsis=self._glyphs.ellipsis)
        lanes = [_dim(title + self._scale())]
        by_service: dict[str, list[Leg]] = {}
        for leg in legs:
            by_service.setdefault(leg.service, []).append(leg)
        for service, held in by_service.items():
            cells = [" "] * self._room
            for leg in held:
                first, last = self._cells(leg.from_us, leg.until_us)
                cells[first : last + 1] = self._glyphs.full * (last + 1 - first)
            label = fit(f"  {printable(service)}", self._gutter - 9, ellipsis=self._glyphs.ellipsis)
            total = duration(sum(leg.until_us - leg.from_us for leg in held)).rjust(7) + "  "
            bar = click.style("".join(cells).rstrip(), fg=self._colours[service])
            lanes.append(label + _dim(total) + bar)
        return [*lanes, ""]

    def _scale(self) -> str:
        """Return the axis' labels: start, middle and end, as far as there is room."""
        end = duration(self._axis_us)
        middle = duration(self._axis_us / 2)
        cells = [" "] * self._room
        cells[0:1] = "0"
        if self._room >= 30:
            at = self._room // 2 - len(middle) // 2
            cells[at : at + len(middle)] = middle
        cells[self._room - len(end) :] = end
        return "".join(cells)

    def _cells(self, from_us: int, until_us: int) -> tuple[int, int]:
        """Return the first and last column of a stretch of time; at least one column."""
        start_us = self._line.from_us
        first = int((from_us - start_us) * self._room / self._axis_us)
        last = int((until_us - start_us) * self._room / self._axis_us + 0.5) - 1
        first = min(max(first, 0), self._room - 1)
        return first, min(max(last, first), self._room - 1)

    # -- operations ----------------------------------------------------------------------------

    def _rows(self) -> list[list[str]]:
        timed = [(span.issued_us, self._row(span)) for span in self._spans]
        for mark in self._line.marks:
            text = self._fault(mark) if mark.what == "fault" else self._mark(mark)
            timed.append((mark.at_us, [click.style(text, fg="yellow")]))
        timed.sort(key=lambda row: row[0])
        return [row for _, row in timed]

    def _mark(self, mark: Mark) -> str:
        """Return what happened to the run, with its moment if the text leaves room for it."""
        text = f"{self._glyphs.signs[mark.what]} {printable(mark.text)}"
        if columns(text) > self._gutter:
            return text
        column, _ = self._cells(mark.at_us, mark.at_us)
        return fit(text, self._gutter, ellipsis="") + " " * column + "|"

    def _fault(self, mark: Mark) -> str:
        """Return a mishap beside its moment: to the right, where there is more room, or left."""
        sign, text = self._glyphs.signs[mark.what], printable(mark.text)
        column, _ = self._cells(mark.at_us, mark.at_us)
        at = self._gutter + column
        if column <= self._room // 2:
            text = fit(text, self._room - column - 2, ellipsis=self._glyphs.ellipsis)
            return f"{sign} fault".ljust(at) + f"| {text.rstrip()}"
        text = fit(text, at - 9, ellipsis=self._glyphs.ellipsis).rstrip()
        return f"{sign} fault " + f"{text} |".rjust(at - 7)

    def _label(self, span: Span) -> str:
        label = printable(span.label)
        if span.kind == "undo":
            return f"undo {label}"
        return label if span.kind in ("step", "timer") else f"{span.kind} {label}"

    def _row(self, span: Span) -> list[str]:
        colour, faint = self._tone(span)
        sign = self._sign(span)
        label = fit(self._label(span), self._label_width, ellipsis=self._glyphs.ellipsis)
        tries = ""
        if self._tries:
            tries = f" {self._glyphs.times}{span.attempts}" if span.attempts > 1 else ""
            tries = tries.ljust(5)
        length = "" if span.kind in ("publish", "spawn", "attributes") else self._length(span)
        left = click.style(f"{sign} ", fg=colour, dim=faint) + click.style(label, dim=faint)
        left += click.style(tries, fg="yellow") + click.style(length.rjust(7) + "  ", dim=True)
        return [left + self._bar(span), *self._notes(span)]

    def _tone(self, span: Span) -> tuple[str | None, bool]:
        if span.state in ("failed", "stuck"):
            return "red", False
        if span.state == "dropped":
            return None, True
        if span.state == "parked" or span.kind == "undo":
            return "yellow", False
        return ("green" if span.state == "done" else "cyan"), False

    def _sign(self, span: Span) -> str:
        signs = self._glyphs.signs
        if span.state in ("failed", "parked", "stuck", "dropped"):
            return signs[span.state]
        if span.kind == "undo":
            return signs["undo"]
        if span.state == "done":
            return signs.get(span.kind, signs["done"])
        return signs[span.state]

    def _length(self, span: Span) -> str:
        return duration((span.ended_us or self._line.now_us) - span.issued_us)

    def _bar(self, span: Span) -> str:
        glyphs = self._glyphs
        ended_us = span.ended_us or self._line.until_us
        first, last = self._cells(span.issued_us, ended_us)
        if span.kind in ("timer", "receive", "child") or span.state in ("waiting", "dropped"):
            body, tail = "", glyphs.wait * (last + 1 - first)
        elif span.state == "parked":
            body, tail = glyphs.queued * (last + 1 - first), ""
        else:
            began, _ = self._cells(max(span.began_us, span.issued_us), ended_us)
            body, tail = glyphs.queued * (began - first), glyphs.full * (last + 1 - began)
        if span.ended_us is None and span.state != "stuck":
            bar = body + tail
            body, tail = body[: len(bar) - 1], (bar[len(body) : -1] if tail else "") + glyphs.more
        colour = "red" if span.state in ("failed", "stuck") else self._colours.get(span.service)
        dim = span.state == "dropped"
        return " " * first + click.style(body, fg=colour) + click.style(tail, fg=colour, dim=dim)

    def _notes(self, span: Span) -> list[str]:
        """Return what is told below a row: an error, the next attempt."""
        text = printable(span.text)
        if span.state == "parked" and span.next_us is not None:
            wait = duration(span.next_us - self._line.now_us)
            text = f"attempt {span.attempts} in {wait}; the last one failed with {text}"
        elif span.kind == "timer" and span.next_us is not None:
            text = f"fires at {clock(span.next_us)} or later"
        elif span.state == "stuck":
            text = ""
        elif span.state == "running" and span.attempts > 1 and text:
            text = f"attempt {span.attempts} under way; the last one failed with {text}"
        if not text:
            return []
        colour = "red" if span.state == "failed" else None
        hook = f"  {self._glyphs.hook}"
        lines = wrapped(text, self._width - 4)
        return [
            click.style((hook if at == 0 else "    ") + part, fg=colour, dim=colour is None)
            for at, part in enumerate(lines)
        ]

    # -- outcome -------------------------------------------------------------------------------

    def _outcome(self) -> list[str]:
        line, status = self._line, self._line.status
        said: list[str] = []
        if line.problem:
            said += _labelled("not all of it can be shown", line.problem, self._width, "red")
        if not line.legs and not line.ended:
            said += _labelled(
                "not begun", f"no worker has taken it at {status.home}", self._width, "blue"
            )
        if status.status == "stuck":
            said += _labelled("stuck", status.reason, self._width, "red")
        elif status.status == "failed":
            said += _labelled("failed", status.reason, self._width, "red")
        elif status.status == "waiting" and status.reason:
            said += _labelled("waits for", status.reason, self._width, "blue")
        elif status.successor:
            said += _labelled("went on as", f"run {status.successor}", self._width, "green")
        elif status.status == "completed":
            said += _labelled("result", _shown(line.result), self._width, "green")
        if line.mail:
            kept = ", ".join(dict.fromkeys(line.mail))
            said += _labelled("in its mailbox", kept, self._width, None)
        return ["", *said] if said else []


def _is_noise(span: Span) -> bool:
    """Tell whether an operation says nothing: attributes are in the header, and so on."""
    if span.kind == "attributes":
        return True
    return span.kind == "timer" and span.name == EXPIRY and span.state in ("waiting", "dropped")


def _labelled(label: str, text: str, width: int, colour: str | None) -> list[str]:
    room = width - columns(label) - 2
    lines = wrapped(printable(text), max(room, 20), lines_max=40) or [""]
    indent = " " * (columns(label) + 2)
    return [
        (click.style(label, fg=colour, bold=True) + "  " if at == 0 else indent)
        + coloured_diff(part)
        for at, part in enumerate(lines)
    ]


def coloured_diff(text: str) -> str:
    """Colour a line of a diff, as a replay mismatch shows one."""
    if text.startswith(("+", "-")) and not text.startswith(("+++", "---")):
        return click.style(text, fg="green" if text[0] == "+" else "red")
    return text


def _shown(result: Any) -> str:
    return msgspec.json.encode(result).decode()


def _dim(text: str) -> str:
    return click.style(text, dim=True)
