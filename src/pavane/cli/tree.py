"""Draws a conversation in a terminal: its contracts, then one row per thing, below its cause.

A row says when it happened, what it was, how often it was tried, how long it took, and shows that
on a time axis that all rows share. Takes values and returns lines; see `timeline` for the glyphs.
"""

from __future__ import annotations

from collections.abc import Sequence

import click

from pavane.cli.text import clock, columns, counted, duration, fit, joined, printable, wrapped
from pavane.cli.timeline import ASCII, HUES, UNICODE, Glyphs
from pavane.engine.words import event_in_words, handler_in_words
from pavane.insight.causes import Node, Tree, walk
from pavane.observe.conversations import ConversationStatus
from pavane.observe.progress import Passed
from pavane.observe.trouble import Trouble

WIDTH_MIN = 60
ROWS_MAX = 1000
STATE_COLOURS = {
    "on-time": "green", "open": "cyan", "late": "yellow", "overdue": "yellow", "stuck": "red",
    "twice": "red",
}  # fmt: skip
_SIGNS = {
    "done": "done", "failed": "failed", "running": "running", "waiting": "waiting",
    "parked": "parked", "stuck": "stuck", "dropped": "dropped", "dead": "failed",
    "expired": "dropped", "unhandled": "dropped", "cut": "dropped",
}  # fmt: skip
_KINDS = {
    "event": "receive", "undo": "undo", "timer": "timer", "receive": "receive", "spawn": "spawn",
    "hop": "publish", "mark": "retry", "kept": "dropped",
}  # fmt: skip
_COLOURS = {
    "failed": "red", "dead": "red", "stuck": "red", "parked": "yellow", "waiting": "blue",
    "running": "cyan", "dropped": None, "expired": None,
}  # fmt: skip


def draw_conversation(
    tree: Tree,
    contracts: Sequence[ConversationStatus],
    trouble: Trouble,
    *,
    width: int,
    unicode: bool = True,
    height: int | None = None,
) -> list[str]:
    """Return the picture as lines of at most `width` columns.

    With `height`, earlier rows of the tree are left out so that the whole fits.
    """
    drawing = _Drawing(tree, max(width, WIDTH_MIN), UNICODE if unicode else ASCII)
    head, body = drawing.head(contracts), drawing.rows()
    tail = drawing.tail(contracts, trouble)
    rows_max = ROWS_MAX if height is None else max(3, height - len(head) - len(tail))
    if len(body) > rows_max:
        left_out = len(body) - rows_max + 1
        note = f"{drawing.glyphs.ellipsis} {counted(left_out, 'earlier row')} not shown"
        body = [click.style(note, dim=True), *body[left_out:]]
    return [*head, *body, *tail]


class _Drawing:
    """One picture: its columns, its axis, its colours."""

    def __init__(self, tree: Tree, width: int, glyphs: Glyphs) -> None:
        self._tree = tree
        self._width = width
        self.glyphs = glyphs
        nodes = [node for root in tree.roots for node in walk(root)]
        services = dict.fromkeys(node.service for node in nodes if node.service)
        self._hues = {name: HUES[at % len(HUES)] for at, name in enumerate(services)}
        self._indent_max = max(8, width // 4)
        self._room_max = width // 2 - 8
        tries = max((node.attempts for node in nodes), default=0)
        self._tries = 2 + len(str(tries)) if tries > 1 else 0
        lengths = [
            columns(self._indent(depth) + self._name(node)) + 2
            for root in tree.roots
            for node, depth in _levels(root, 0)
        ]
        self._left = min(max(lengths, default=20), self._room_max)
        self._gutter = 9 + self._left + self._tries + 9
        self._room = width - self._gutter
        self._axis_us = max(tree.until_us - tree.from_us, 1)

    # -- header --------------------------------------------------------------------------------

    def head(self, contracts: Sequence[ConversationStatus]) -> list[str]:
        tree = self._tree
        dot = f" {self.glyphs.dot} "
        lines = [click.style(f"conversation {printable(tree.id)}", bold=True)]
        for contract in contracts:
            lines += self._contract(contract)
        facts = [
            f"began {clock(tree.from_us)}",
            f"{'for' if tree.is_open else 'took'} {duration(self._axis_us)}",
            counted(tree.events, "event"),
            counted(tree.handled, "handling"),
            counted(tree.runs, "run"),
        ]
        if tree.cut:
            facts.append("too large to be shown whole")
        lines += [_dim(line) for line in joined(facts, dot, self._width)]
        return [*lines, "", _dim(" " * self._gutter + self._scale())]

    def _contract(self, contract: ConversationStatus) -> list[str]:
        state = "ended twice" if contract.state == "twice" else contract.state
        head = click.style(f"{printable(contract.contract)} ", bold=True)
        head += click.style(state.replace("-", " "), fg=STATE_COLOURS[contract.state], bold=True)
        limit = duration(contract.due_us - contract.started_us)
        if contract.ended_us is None:
            text = f", due within {limit}, by {clock(contract.due_us)}"
        else:
            took = duration(contract.ended_us - contract.started_us)
            ends = f", {contract.ends} ends" if contract.ends > 1 else ""
            text = f", {contract.end} after {took} of {limit}{ends}"
        first, *more = self._wrapped(text, self._width - columns(click.unstyle(head))) or [""]
        lines = [head + _dim(first), *(_dim(f"  {part}") for part in more)]
        if contract.milestones:
            parts = [self._milestone(m, contract.started_us) for m in contract.milestones]
            for part in self._wrapped(", ".join(parts), self._width - 2):
                lines.append(_dim(f"  {part}"))
        return lines

    def _wrapped(self, text: str, width: int) -> list[str]:
        return wrapped(text, max(width, 20), ellipsis=self.glyphs.ellipsis)

    def _milestone(self, passed: Passed, started_us: int) -> str:
        due = "" if passed.due_us is None else f" of {duration(passed.due_us - started_us)}"
        if passed.reached_us is not None:
            late = " late:" if passed.state == "late" else ""
            return f"{passed.type}{late} after {duration(passed.reached_us - started_us)}{due}"
        return f"{passed.type} {passed.state}{due and f', within{due[3:]}'}"

    def _scale(self) -> str:
        end, middle = duration(self._axis_us), duration(self._axis_us / 2)
        cells = [" "] * self._room
        cells[0:1] = "0"
        if self._room >= 26:
            at = self._room // 2 - len(middle) // 2
            cells[at : at + len(middle)] = middle
        cells[self._room - len(end) :] = end
        return "".join(cells)

    # -- rows ----------------------------------------------------------------------------------

    def rows(self) -> list[str]:
        found: list[str] = []
        for root in self._tree.roots:
            key = ""
            for node, depth in _levels(root, 0):
                found.append(self._row(node, depth, shows_key=node.key not in ("", key)))
                key = node.key or key
                found += self._notes(node, depth)
        return found

    def _indent(self, depth: int) -> str:
        return " " * min(2 * depth, self._indent_max)

    def _name(self, node: Node, shows_key: bool = True) -> str:
        name = printable(node.label)
        if node.kind == "run":
            return f"run {name}  {printable(node.id)}"
        if node.kind == "receive" and node.id:
            named = "" if name == node.id else f"{name} "
            return f"run {named}{printable(node.id)} receives it"
        if node.kind == "event":
            name = f"{name}  {printable(node.key)}" if node.key and shows_key else name
            return f"{name}  unhandled" if node.condition == "unhandled" else name
        if node.kind == "receive":
            return f"receive {printable(node.name)}"
        if node.kind == "hop":
            return f"{node.name} to {printable(node.service)}"
        if node.kind == "kept":
            return f"in {handler_in_words(name)}"
        if node.kind == "handler":
            return handler_in_words(name)
        return name if node.kind in ("step", "timer", "mark") else f"{node.kind} {name}"

    def _row(self, node: Node, depth: int, *, shows_key: bool) -> str:
        colour = _COLOURS.get(node.condition, "green")
        faint = node.condition in ("dropped", "expired") or node.kind in ("hop", "mark", "kept")
        sign = self.glyphs.signs[_SIGNS[node.condition]]
        if node.kind in _KINDS and node.condition in ("done", "unhandled"):
            sign = self.glyphs.signs[_KINDS[node.kind]]
        offset = f"+{duration(node.from_us - self._tree.from_us)}".rjust(8)
        name = self._name(node, shows_key)
        indent = self._indent(depth)
        room = self._left - columns(indent) - 2
        label = fit(name, room, ellipsis=self.glyphs.ellipsis)
        tries = ""
        if self._tries:
            tries = f" {self.glyphs.times}{node.attempts}" if node.attempts > 1 else ""
            tries = tries.ljust(self._tries)
        is_moment = node.kind in ("event", "mark", "kept") or (
            node.kind == "receive" and bool(node.id)
        )
        until_us = self._tree.now_us if node.until_us is None else node.until_us
        length = "" if is_moment else duration(until_us - node.from_us)
        text = _dim(offset) + " " + indent + click.style(f"{sign} ", fg=colour, dim=faint)
        text += click.style(label, dim=faint, bold=node.kind in ("event", "run"))
        text += click.style(tries, fg="yellow") + _dim(length.rjust(7) + "  ")
        return (text + self._bar(node, is_moment)).rstrip()

    def _bar(self, node: Node, is_moment: bool) -> str:
        glyphs = self.glyphs
        first, last = self._cells(node.from_us, node.until_us or self._tree.until_us)
        if is_moment:
            return " " * first + click.style("|", dim=True)
        body = {
            "run": glyphs.wait, "timer": glyphs.wait, "receive": glyphs.wait, "child": glyphs.wait,
            "hop": glyphs.wait,
        }.get(node.kind, glyphs.full)  # fmt: skip
        if node.condition in ("waiting", "dropped"):
            body = glyphs.wait
        elif node.condition == "parked":
            body = glyphs.queued
        bar = body * (last + 1 - first)
        if node.began_us > node.from_us and body == glyphs.full:
            began, _ = self._cells(node.began_us, node.until_us or self._tree.until_us)
            bar = glyphs.queued * (began - first) + body * (last + 1 - began)
        if node.until_us is None and node.condition != "stuck":
            bar = bar[:-1] + glyphs.more
        colour = self._hues.get(node.service)
        if node.condition in ("failed", "dead", "stuck"):
            colour = "red"
        return " " * first + click.style(bar, fg=colour, dim=node.kind == "hop")

    def _cells(self, from_us: int, until_us: int) -> tuple[int, int]:
        """Return the first and last column of a stretch of time; at least one column."""
        start_us = self._tree.from_us
        first = int((from_us - start_us) * self._room / self._axis_us)
        last = int((until_us - start_us) * self._room / self._axis_us + 0.5) - 1
        first = min(max(first, 0), self._room - 1)
        return first, min(max(last, first), self._room - 1)

    def _notes(self, node: Node, depth: int) -> list[str]:
        """Return what is told below a row: an error, what is waited for."""
        text = printable(node.text)
        if node.condition == "parked" and node.next_us is not None:
            wait = duration(node.next_us - self._tree.now_us)
            text = f"attempt {node.attempts} in {wait}; the last one failed with {text}"
        elif node.condition == "dead":
            text = f"gave up: {text}"
        elif node.condition == "expired":
            text = text or "too old, or not for it"
        elif node.kind == "kept":
            until = f"kept until {clock(node.next_us)}" if node.next_us else "not kept any more"
            text = f"{until}, nobody took it" + (f"; {text}" if text else "")
        elif node.condition == "unhandled":
            return []
        elif node.kind in ("child", "spawn"):
            text = text if node.condition == "failed" else ""
        if not text:
            return []
        bad = node.condition in ("failed", "dead", "stuck")
        margin = " " * 9 + self._indent(depth) + "  "
        lines = self._wrapped(text, self._width - columns(margin) - 2)
        return [
            margin
            + click.style((self.glyphs.hook if at == 0 else "  ") + part, dim=not bad,
                          fg="red" if bad else None)
            for at, part in enumerate(lines)
        ]  # fmt: skip

    # -- what there is to do -------------------------------------------------------------------

    def tail(self, contracts: Sequence[ConversationStatus], trouble: Trouble) -> list[str]:
        """Say what holds it up, of one that should be over or has something to repair."""
        waits = any(status.state in ("overdue", "stuck") for status in contracts)
        if not waits and not trouble.dead and not trouble.blocked:
            return []
        word = "stuck" if trouble.stuck else "goes on"
        said: list[tuple[str, str]] = []
        if waits and trouble.last:
            after = duration(self._tree.now_us - trouble.last_us)
            said.append(("last event", f"{event_in_words(trouble.last)}, {after} ago"))
        for grave in trouble.dead[:5]:
            who = handler_in_words(grave.handler)
            said.append(("dead letter", f"{grave.no}: {who} gave up {grave.type}: {grave.error}"))
        for run in (*trouble.blocked[:5], *(trouble.failed[:5] if waits else ())):
            said.append((f"{run.status} run", run.sentence))
        for one in trouble.expected[:5] if waits else ():
            facts = [f"for {one.waits_for}"]
            if one.what == "handler":
                facts += [f"backlog {one.backlog:,}", f"dead letters {one.dead:,}"]
            facts += [one.cause] if one.cause else []
            who = handler_in_words(one.name) if one.what == "handler" else one.name
            said.append(("expected next", f"{who} {', '.join(facts)}"))
        if waits and trouble.stuck and len(said) == 1:
            said.append(("expected next", f"nothing reacts to {event_in_words(trouble.last)}"))
        label = max((len(name) for name, _ in said), default=0)
        lines: list[str] = []
        for name, text in said:
            for at, part in enumerate(self._wrapped(printable(text), self._width - label - 2)):
                colour = "red" if trouble.stuck else "yellow"
                head = click.style(name.ljust(label), fg=colour) if at == 0 else " " * label
                lines.append(f"{head}  {part}")
        title = [click.style(word, fg="red" if trouble.stuck else "yellow", bold=True)]
        return ["", *(title if waits else []), *lines] if lines else []


def _levels(node: Node, depth: int) -> list[tuple[Node, int]]:
    found = [(node, depth)]
    for child in node.children:
        found += _levels(child, depth + 1)
    return found


def _dim(text: str) -> str:
    return click.style(text, dim=True)
