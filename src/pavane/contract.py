"""Contracts of conversations: what is to have happened, and by when, after something began."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, cast

import msgspec

from pavane.errors import BadDeclaration
from pavane.event import Event, is_event_type
from pavane.policy import Duration, seconds
from pavane.service import checked_name
from pavane.workflow import Workflow


class Milestone(msgspec.Struct, frozen=True):
    """An event that is to be seen on the way, perhaps within a time of its own."""

    type: str
    within_us: int | None = None


class Contract(msgspec.Struct, frozen=True):
    """A conversation begins with `start` and is to end with one of `ends` within a time.

    `start` is the type of an event; for one that begins with a run, of the event that tells so.
    `classes` are the event classes that it names.
    """

    name: str
    start: str
    ends: tuple[str, ...]
    within_us: int
    milestones: tuple[Milestone, ...] = ()
    workflow: str = ""
    classes: tuple[type[Any], ...] = ()

    @property
    def types(self) -> list[str]:
        """All event types that say how far a conversation is."""
        return list(dict.fromkeys([self.start, *self.ends, *(m.type for m in self.milestones)]))


class ConversationOverdue(Event, key="conversation"):
    """A conversation has not ended within its time; published once for it by the monitor.

    `subject` is the key of the event that began it (or the id of the run), `last` the type of the
    newest event seen in it (or "the start of fulfil", of a run), `missing` its milestones that were
    not reached, and `trouble` says in a sentence what holds it up.
    """

    contract: str
    conversation: str
    subject: str
    started: datetime
    due: datetime
    last: str
    last_at: datetime
    missing: list[str]
    trouble: str


INTERNAL = "~"
"""Begins the types of Pavane's own events; names that users give cannot begin so."""
START = f"{INTERNAL}start-"


def start_type(workflow: str) -> str:
    """Return the type of the event that tells that a run of a workflow began."""
    return f"{START}{workflow}"


def is_internal(type: str) -> bool:
    """Tell whether events of this type are Pavane's own, and not for people to see."""
    return type.startswith(INTERNAL)


def make_contract(
    start: Any,
    ends: Sequence[type[Any]],
    within: Duration,
    milestones: Mapping[Any, Duration | None] | Sequence[type[Any]] | None,
    name: str | None,
) -> Contract:
    """Return a contract as declared by `App.conversation`, or raise BadDeclaration."""
    if isinstance(start, Workflow):
        workflow = cast("Workflow[..., Any]", start).name
        type, chosen = start_type(workflow), name or workflow
    elif is_event_type(start):
        workflow, type = "", start.event_type
        chosen = name or type.replace(".", "-")
    else:
        raise BadDeclaration(
            f"conversation(start={start!r}) must begin with an event class or a workflow."
        )
    checked_name(chosen, "conversation")
    what = f"Conversation {chosen!r}"
    ended = _types(ends, f"{what}: ends=")
    if not ended:
        raise BadDeclaration(
            f"{what} has no ends, so it would always be overdue. Name the events that end it: "
            f"ends=[OrderShipped, OrderCancelled]."
        )
    if type in ended:
        raise BadDeclaration(f"{what} begins and ends with {type}; name another event in ends=.")
    within_us = _within_us(within, what)
    given = milestones if isinstance(milestones, Mapping) else dict.fromkeys(milestones or ())
    passed = _types(list(given), f"{what}: milestones=")
    for milestone in passed:
        if milestone == type or milestone in ended:
            raise BadDeclaration(f"{what}: {milestone} is its start or an end, so no milestone.")
    limits = [
        None if limit is None else _within_us(limit, f"{what}, milestone {milestone}")
        for milestone, limit in zip(passed, given.values(), strict=True)
    ]
    for milestone, limit in zip(passed, limits, strict=True):
        if limit is not None and limit > within_us:
            raise BadDeclaration(
                f"{what}: milestone {milestone} has {limit / 1e6:g} s, more than the "
                f"{within_us / 1e6:g} s of the whole."
            )
    begins: list[Any] = [] if workflow else [start]
    classes: list[type[Any]] = [*begins, *ends, *given]
    return Contract(
        chosen, type, ended, within_us,
        tuple(Milestone(m, limit) for m, limit in zip(passed, limits, strict=True)),
        workflow, tuple(classes),
    )  # fmt: skip


def _types(classes: Sequence[Any], what: str) -> tuple[str, ...]:
    for cls in classes:
        if not is_event_type(cls):
            raise BadDeclaration(f"{what}[{cls!r}] must list event classes.")
    names = [cls.event_type for cls in classes]
    for name in names:
        if names.count(name) > 1:
            raise BadDeclaration(f"{what} lists {name} twice.")
    return tuple(names)


def _within_us(within: Duration, what: str) -> int:
    limit_us = round(seconds(within) * 1e6)
    if limit_us <= 0:
        raise BadDeclaration(f"{what} has within={within!r}; give it some time, such as '2h'.")
    return limit_us
