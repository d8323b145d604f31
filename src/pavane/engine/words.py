"""What people read for the names that Pavane gives by itself: mailboxes, and what starts runs."""

from __future__ import annotations

from pavane.contract import START
from pavane.engine.duties import MONITOR
from pavane.engine.mailbox import MAILBOX
from pavane.workflow import STARTER


def handler_in_words(name: str) -> str:
    """Return the full name of a handler; what it is, for one that nobody wrote."""
    service, _, own = name.partition(".")
    if own == MAILBOX:
        return f"the mailbox of {service}"
    if own.startswith(STARTER):
        return f"the start of {service}.{own.removeprefix(STARTER)}"
    return name


def handler_with_words(name: str) -> str:
    """Return the full name of a handler, by which commands know it, and what it is besides."""
    words = handler_in_words(name)
    return name if words == name else f"{name} ({words})"


def event_in_words(type: str) -> str:
    """Return an event's type; what it tells, for one of Pavane's own."""
    return f"the start of {type.removeprefix(START)}" if type.startswith(START) else type


def source_in_words(source: str) -> str:
    """Return who published an event; what it is, if that is Pavane itself."""
    return "the monitor" if source == MONITOR else source
