"""The cause of a dead letter is the same for all events that failed alike."""

from __future__ import annotations

import pytest

from pavane.core.codec import encode_error
from pavane.engine.custody import cause_of
from pavane.stores.eventlog import EventRow

EVENT = EventRow("ev-abc", "Paid", 1, "ada", "shop", 0, "ev-abc", "", "", b"{}")


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ValueError("no stock for ada"), "ValueError: no stock for …"),
        (ValueError("event ev-abc is bad"), "ValueError: event … is bad"),
        (KeyError("o-17"), "KeyError: '…'"),
        (ValueError("12 pieces at 9.90 on 2024-05-01T10:00"), "ValueError: … pieces at … on …"),
        (ConnectionError("HTTP 503: unavailable"), "ConnectionError: HTTP 503: unavailable"),
        (ConnectionError("HTTP 404"), "ConnectionError: HTTP 404"),
        (RuntimeError(), "RuntimeError"),
        (ValueError("adaptor is gone"), "ValueError: adaptor is gone"),
    ],
)
def test_what_differs_from_event_to_event_is_left_out(error: Exception, cause: str) -> None:
    assert cause_of(encode_error(error), EVENT) == cause
