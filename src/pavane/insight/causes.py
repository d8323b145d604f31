"""A conversation as a tree of causes: what published what, who handled it, which runs it began.

Pure: what flowed, the timelines of the runs and a time go in, a tree comes out. An event stands
under the handler or run that published it, a handler under its event, a run under what started it,
with its steps and hops. What a handler published is known by the ids, which derive from its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec

from pavane.contract import is_internal
from pavane.core.codec import error_summary
from pavane.core.operations import EXPIRY
from pavane.engine.mailbox import MAILBOX, Kept
from pavane.engine.publishing import derived_id
from pavane.insight.timeline import Leg, Mark, Span, Timeline
from pavane.observe.traffic import Traffic
from pavane.observe.trouble import shown_error
from pavane.stores.eventlog import AwaitRow, EventRow, HandlerRow
from pavane.stores.port import LAST_US
from pavane.workflow import STARTER

Kind = Literal[
    "event", "handler", "kept", "run", "step", "undo", "timer", "receive", "child", "spawn", "hop",
    "mark",
]  # fmt: skip
Condition = Literal[
    "done", "failed", "running", "waiting", "parked", "stuck", "dropped", "dead", "expired",
    "unhandled", "cut",
]  # fmt: skip
DEPTH_MAX = 40
"""What is deeper stands at the end of the tree, as a root of its own."""
TRIES_MAX = 64
"""How many things a handler may publish, start or send in vain before one is found no more."""
_OF_RUNS = (("", "#"), ("run ", "/"), ("run ", "~"))
"""How the places of what a run published, its children and its continuations begin and go on."""
_OUTCOMES: dict[str, Condition] = {
    "done": "done", "expired": "expired", "dropped": "dropped", "dead": "dead",
}  # fmt: skip
_RUNS: dict[str, Condition] = {
    "completed": "done", "continued": "done", "failed": "failed", "cancelled": "dropped",
    "killed": "dropped", "running": "running", "waiting": "waiting", "stuck": "stuck",
}  # fmt: skip


class Node(msgspec.Struct, frozen=True):
    """One thing that happened, or is to happen, with what it caused.

    `until_us` is None while it is open; `began_us` is when its last attempt began, if that is known
    (0: not). `next_us` is when it goes on by itself; of what is "kept", by the mailbox of
    `service`, when that ends (0: it has). `text` says what there is to say: an error, what is
    waited for. `id` is that of the event or run; `key` the event's.
    """

    kind: Kind
    condition: Condition
    service: str
    name: str
    from_us: int
    until_us: int | None
    id: str = ""
    key: str = ""
    attempts: int = 0
    began_us: int = 0
    next_us: int | None = None
    text: str = ""
    children: list[Node] = []

    @property
    def label(self) -> str:
        return f"{self.service}.{self.name}" if self.service else self.name


class Tree(msgspec.Struct, frozen=True):
    """A conversation: `from_us` to `until_us` is the time that all nodes share."""

    id: str
    from_us: int
    until_us: int
    now_us: int
    roots: list[Node]
    events: int
    handled: int
    runs: int
    cut: bool

    @property
    def is_open(self) -> bool:
        """Tell whether anything of it is under way or waits."""
        return any(_is_open(node) for root in self.roots for node in walk(root))


def _is_open(node: Node) -> bool:
    return node.kind in ("handler", "run") and node.condition in ("running", "waiting", "parked")


def walk(node: Node) -> Iterable[Node]:
    """Yield a node and all below it, causes first."""
    yield node
    for child in node.children:
        yield from walk(child)


def tree_of(traffic: Traffic, runs: Sequence[Timeline], *, now_us: int) -> Tree:
    """Return the tree of causes of a conversation as it is at `now_us`."""
    builder = _Builder(traffic, runs, now_us)
    roots = builder.roots()
    nodes = [node for root in roots for node in walk(root)]
    times = [node.from_us for node in nodes] + [n.until_us for n in nodes if n.until_us is not None]
    times += [now_us] if any(_is_open(node) for node in nodes) or not times else []
    handled = sum(node.kind == "handler" and node.condition == "done" for node in nodes)
    return Tree(
        traffic.id, min(times), max(times), now_us, roots, len(builder.events), handled, len(runs),
        traffic.cut,
    )  # fmt: skip


class _Builder:
    """Puts together one tree; each event and run finds its place once."""

    def __init__(self, traffic: Traffic, runs: Sequence[Timeline], now_us: int) -> None:
        self._traffic = traffic
        self._now_us = now_us
        self.events = {e.id: e for e in traffic.events if not is_internal(e.type)}
        self._runs = {line.status.id: line for line in runs}
        # A run may have the id of the event that started it.
        places = {f"run {id}": line for id, line in self._runs.items()}
        self._left: dict[str, EventRow | Timeline] = {**self.events, **places}
        self._caused: dict[str, list[str]] = {}
        for id, event in self.events.items():
            self._caused.setdefault(event.cause, []).append(id)
        for id, line in self._runs.items():
            self._caused.setdefault(line.status.cause, []).append(f"run {id}")
        self._marks = {(mark.handler, mark.pos): mark for mark in traffic.marks}
        self._parked = {(row.handler, row.pos): row for row in traffic.parked}
        self._dead = {(row.handler, row.pos): row for row in traffic.dead}

    def roots(self) -> list[Node]:
        """Return what nothing here caused, and then whatever found no place below that."""
        found: list[Node] = []
        known = {*self.events, *self._runs}
        firsts = [
            place for place, what in self._left.items()
            if self._cause(what) not in known or self._cause(what) == _id(what)
        ]  # fmt: skip
        for place in sorted(firsts, key=self._order):
            found += self._taken([place], 0)
        while self._left:
            found += self._taken([min(self._left, key=self._order)], 0)
        return found

    def _cause(self, what: EventRow | Timeline) -> str:
        return what.cause if isinstance(what, EventRow) else what.status.cause

    def _order(self, place: str) -> tuple[int, int]:
        what = self._left[place]
        if isinstance(what, EventRow):
            return what.at_us, what.pos
        return what.status.started_us, 0

    def _taken(self, places: Iterable[str], depth: int) -> list[Node]:
        """Return the nodes of those that have no place yet, in order of time."""
        if depth > DEPTH_MAX:
            return []
        nodes: list[Node] = []
        for place in places:
            what = self._left.pop(place, None)
            if isinstance(what, EventRow):
                nodes.append(self._event(what, depth))
            elif what is not None:
                nodes.append(self._run(what, depth))
        return _in_order(nodes)

    # -- events and handlers -------------------------------------------------------------------

    def _event(self, event: EventRow, depth: int) -> Node:
        children = [
            node
            for handler in self._traffic.subscribers(event)
            if (node := self._handler(handler, event, depth + 1)) is not None
        ]
        children += [
            self._given(row, event) for row in self._traffic.awaits if row.pos == event.pos
        ]
        children += [_kept(one, event) for one in self._traffic.kept if one.pos == event.pos]
        children += self._taken(self._caused.get(event.id, ()), depth + 1)
        condition: Condition = "done" if children else "unhandled"
        return Node(
            "event", condition, "", event.type, event.at_us, event.at_us, event.id, event.key,
            children=_in_order(children),
        )  # fmt: skip

    def _given(self, row: AwaitRow, event: EventRow) -> Node:
        """Return that a run was given this event, which it waited for."""
        line = self._runs.get(row.run)
        name = row.run if line is None else line.status.workflow
        at_us = max(row.at_us, event.at_us)
        return Node("receive", "done", "", name, at_us, at_us, row.run)

    def _handler(self, handler: HandlerRow, event: EventRow, depth: int) -> Node | None:
        """Return what a handler made of an event; None if it let it pass."""
        key = handler.no, event.pos
        mark, parked, dead = self._marks.get(key), self._parked.get(key), self._dead.get(key)
        facts: dict[str, Any]
        if parked is not None:
            error = "" if parked.error == b"null" else error_summary(parked.error)
            behind = parked.due_us >= LAST_US
            facts = {
                "condition": "waiting" if behind else "parked", "from_us": parked.began_us,
                "until_us": None, "attempts": parked.attempt,
                "next_us": None if behind else parked.due_us,
                "text": error or ("behind an earlier event of its key" if behind else ""),
            }  # fmt: skip
        elif dead is not None:
            facts = {
                "condition": "dead", "from_us": event.at_us, "until_us": dead.at_us,
                "attempts": dead.attempts, "text": shown_error(dead),
            }  # fmt: skip
            if mark is not None:
                facts["from_us"] = mark.at_us - mark.took_us
        elif mark is not None:
            facts = {
                "condition": _OUTCOMES[mark.outcome], "from_us": mark.at_us - mark.took_us,
                "until_us": mark.at_us, "attempts": mark.attempts,
                "text": f"by {mark.by}" if mark.by and mark.by != handler.name else "",
            }  # fmt: skip
        elif self._traffic.is_ahead(handler, event):
            paused = handler.paused_until_us > self._now_us
            text = f"paused: {handler.reason or 'by hand'}" if paused else "not handled yet"
            facts = {
                "condition": "waiting", "from_us": event.at_us, "until_us": None, "text": text
            }  # fmt: skip
        else:
            return None
        names = [handler.name, *([mark.by] if mark is not None and mark.by else [])]
        places = self._published(handler.service, names, event)
        return Node(
            kind="handler", service=handler.service, name=handler.name,
            children=self._taken(places, depth + 1), **facts,
        )  # fmt: skip

    def _published(self, service: str, names: Sequence[str], event: EventRow) -> list[str]:
        """Return the places of what this handler published and started for an event."""
        open_ = [
            place for place in self._caused.get(event.id, ())
            if (what := self._left.get(place)) is not None
            and not place.startswith(f"{event.id}#")
            and (not isinstance(what, EventRow) or what.source == service)
        ]  # fmt: skip
        if not open_:
            return []
        by_id = {_id(self._left[place]): place for place in open_}
        found: list[str] = []
        for name in names:
            started = f"{event.id}.{name.removeprefix(STARTER)}"
            if started in by_id:
                found.append(by_id[started])
            for number in range(1, len(open_) + TRIES_MAX):
                id = derived_id(event.conversation, f"{event.id}>{service}.{name}#{number}")
                if id in by_id:
                    found.append(by_id[id])
                if len(found) == len(open_):
                    return found
        others = [h for h in self._traffic.subscribers(event) if h.name != MAILBOX]
        if sum(handler.service == service for handler in others) == 1:
            # A replay derives other ids, but nobody else here can have published these.
            found += [p for p in open_ if isinstance(self._left[p], EventRow) and p not in found]
        return found

    # -- runs ----------------------------------------------------------------------------------

    def _run(self, line: Timeline, depth: int) -> Node:
        status = line.status
        children: list[Node] = [_hop(leg) for leg in line.legs[1:]]
        children += [_mark(mark) for mark in line.marks]
        for span in line.spans:
            children += self._span(line, span, depth + 1)
        caused = self._caused.get(status.id, ())
        if status.id in self.events:  # which may have caused the rest
            own = tuple(f"{prefix}{status.id}{mark}" for prefix, mark in _OF_RUNS)
            caused = [place for place in caused if place.startswith(own)]
        children += self._taken(caused, depth + 1)
        text = status.reason if status.status in ("failed", "stuck", "waiting") else ""
        return Node(
            "run", _RUNS.get(status.status, "running"), "", status.workflow, line.from_us,
            status.ended_us, status.id, text=f"for {text}" if status.status == "waiting" else text,
            children=_in_order(children),
        )  # fmt: skip

    def _span(self, line: Timeline, span: Span, depth: int) -> list[Node]:
        run = line.status.id
        if span.kind == "publish":
            return self._taken([f"{run}#{span.op}"], depth)
        if span.kind in ("child", "spawn") and f"run {run}/{span.op}" in self._left:
            return self._taken([f"run {run}/{span.op}"], depth)
        if span.kind == "attributes" or (
            span.name == EXPIRY and span.state in ("waiting", "dropped")
        ):
            return []
        return [
            Node(
                span.kind, span.state, span.service, span.name, span.issued_us, span.ended_us, "",
                "", span.attempts, span.began_us, span.next_us, span.text,
            )
        ]  # fmt: skip


def _id(what: EventRow | Timeline) -> str:
    return what.id if isinstance(what, EventRow) else what.status.id


def _kept(kept: Kept, event: EventRow) -> Node:
    return Node(
        "kept", "unhandled", kept.service, MAILBOX, event.at_us, event.at_us,
        next_us=kept.until_us, text=kept.said,
    )  # fmt: skip


def _hop(leg: Leg) -> Node:
    return Node("hop", "done", leg.service, f"hop {leg.hop}", leg.from_us, leg.until_us)


def _mark(mark: Mark) -> Node:
    return Node("mark", "done", "", mark.what, mark.at_us, mark.at_us, text=mark.text)


def _in_order(nodes: list[Node]) -> list[Node]:
    return sorted(nodes, key=lambda node: node.from_us)
