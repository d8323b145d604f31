"""A run's history becomes a timeline, and a timeline a picture that fits the terminal."""

from __future__ import annotations

import click
import msgspec
import pytest
from msgspec import Raw

from pavane.app import RunHistory, RunStatus
from pavane.cli.text import clock, columns, duration, fit, printable, wrapped
from pavane.cli.timeline import draw
from pavane.core.baton import Stop
from pavane.core.codec import encode_error
from pavane.core.envelope import Call, pack
from pavane.core.journal import Entry
from pavane.insight.timeline import Span, Timeline, moments, timeline
from pavane.stores.port import ParkedRow

T0 = 1_800_000_000_000_000
MS = 1000
CHARGE, SHIP, REFUND = "step payments.charge", "step shipping.ship", "undo payments.refund"


def at(ms: int) -> int:
    return T0 + ms * MS


def history(
    entries: list[Entry], *, status: str = "running", reason: str = "", ended_ms: int | None = None,
    trail: tuple[tuple[str, int], ...] = (("orders", 0),), parked: list[ParkedRow] | None = None,
) -> RunHistory:  # fmt: skip
    ended_us = None if ended_ms is None else at(ended_ms)
    stops = [Stop(service, at(ms), hop) for hop, (service, ms) in enumerate(trail)]
    said = RunStatus(
        "o-1", "fulfil", 1, "choreography", status, reason, "orders", stops[-1].service,
        len(stops) - 1, T0, ended_us, 0, {},
    )  # fmt: skip
    return RunHistory(said, entries, stops, [], parked or [])


def started(*issued: str) -> Entry:
    return Entry("start", T0, issued=list(issued))


def done(op: int, ms: int, *issued: str, began_ms: int = 0, attempts: int = 1) -> Entry:
    return Entry(
        "done", at(ms), op, Raw(b'"x"'), "s", attempts, at(began_ms), issued=list(issued)
    )  # fmt: skip


def failed(op: int, ms: int, error: Exception, *issued: str) -> Entry:
    return Entry("failed", at(ms), op, Raw(encode_error(error)), "s", 1, at(0), list(issued))


def seen(given: RunHistory, now_ms: int = 1000, **rest: int) -> Timeline:
    return timeline(given, now_us=at(now_ms), **rest)


def only(line: Timeline) -> Span:
    (span,) = line.spans
    return span


def picture(line: Timeline, width: int = 80, **options: bool | int) -> list[str]:
    return [click.unstyle(text) for text in draw(line, width=width, **options)]  # type: ignore


# -- the value ---------------------------------------------------------------------------------


def test_a_step_spans_from_being_asked_for_to_its_result() -> None:
    span = only(seen(history([started(CHARGE), done(0, 90, began_ms=20, attempts=3)])))
    assert (span.service, span.name, span.state, span.attempts) == ("payments", "charge", "done", 3)
    assert (span.issued_us, span.began_us, span.ended_us) == (T0, at(20), at(90))


def test_patch_marks_take_no_ordinal() -> None:
    line = seen(history([started("patch new-tax", CHARGE), done(0, 5)]))
    assert only(line).state == "done"


def test_a_failure_is_summed_up() -> None:
    span = only(seen(history([started(CHARGE), failed(0, 5, ValueError("no funds"))])))
    assert (span.state, span.text) == ("failed", "ValueError: no funds")


def test_an_open_step_is_running_and_after_the_end_it_was_dropped() -> None:
    assert only(seen(history([started(CHARGE)]))).state == "running"
    ended = history([started(CHARGE)], status="killed", ended_ms=50)
    span = only(seen(ended))
    assert (span.state, span.ended_us) == ("dropped", at(50))


def test_a_cancel_drops_what_was_open_but_no_compensation() -> None:
    entries = [started(CHARGE), Entry("cancel", at(10), issued=[REFUND])]
    line = seen(history(entries))
    assert [span.state for span in line.spans] == ["dropped", "running"]
    assert [mark.what for mark in line.marks] == ["cancel"]


def parked_row(*, due_ms: int, error: bytes, era: int = 0) -> ParkedRow:
    call = Call("o-1", 0, era, "payments", "charge", Raw(b"[]"), "orders", "o-1")
    return ParkedRow(
        "payments", "o-1", call.id, 0, pack(call), 4, at(due_ms), at(0), b"null", error, 0
    )  # fmt: skip


def test_a_parked_step_tells_its_next_attempt_and_its_last_error() -> None:
    row = parked_row(due_ms=1500, error=encode_error(ConnectionError("bank is away")))
    span = only(seen(history([started(CHARGE)], parked=[row])))
    assert (span.state, span.attempts, span.next_us) == ("parked", 4, at(1500))
    assert span.text == "ConnectionError: bank is away"


def test_a_parked_step_that_is_due_is_running_again() -> None:
    row = parked_row(due_ms=900, error=encode_error(ConnectionError("bank is away")))
    assert only(seen(history([started(CHARGE)], parked=[row]))).state == "running"


def test_a_parked_row_of_an_earlier_era_is_not_looked_at() -> None:
    row = parked_row(due_ms=1500, error=encode_error(ConnectionError("old")))
    entries = [started(CHARGE), Entry("rewind", at(10), 1)]
    assert only(seen(history(entries, parked=[row]))).state == "running"


def test_a_timer_that_nobody_waits_for_was_dropped() -> None:
    entries = [started("timer timer", "receive orders.Approved")]
    waiting = history(entries, status="waiting", reason="event Approved")
    assert [span.state for span in seen(waiting).spans] == ["dropped", "waiting"]


def test_a_timer_that_is_waited_for_tells_when_it_fires() -> None:
    waiting = history([started("timer timer")], status="waiting", reason="timer")
    span = only(seen(waiting, wake_us=at(9000)))
    assert (span.state, span.next_us) == ("waiting", at(9000))


def test_a_retry_by_hand_voids_results_and_is_told() -> None:
    entries = [
        started(CHARGE), failed(0, 5, ValueError("no funds")), Entry("rewind", at(100), 1),
        done(0, 120),
    ]  # fmt: skip
    line = seen(history(entries))
    assert only(line).state == "done"
    (mark,) = line.marks
    assert mark.text == "retried by hand, anew from payments.charge (ValueError: no funds)"


def test_a_run_that_a_worker_began_anew_is_not_said_to_be_retried_by_hand() -> None:
    (mark,) = seen(history([started(CHARGE), Entry("rewind", at(100), 0)])).marks
    assert mark.text == "begun anew by a worker"


def test_legs_follow_each_other_and_the_last_one_lasts_until_now() -> None:
    line = seen(history([started(CHARGE)], trail=(("orders", 0), ("payments", 10))), 70)
    legs = [(leg.service, leg.from_us, leg.until_us) for leg in line.legs]
    assert legs == [("orders", T0, at(10)), ("payments", at(10), at(70))]


def test_a_stuck_run_has_stuck_operations() -> None:
    assert only(seen(history([started(REFUND)], status="stuck", reason="why"))).state == "stuck"


def test_moments_are_in_order_and_each_has_its_key() -> None:
    entries = [started(CHARGE), done(0, 90, SHIP, attempts=2), failed(1, 120, ValueError("x"))]
    given = history(
        entries, status="failed", ended_ms=130, reason="ValueError: x",
        trail=(("orders", 0), ("payments", 10)),
    )  # fmt: skip
    found = moments(seen(given))
    assert [(m.what, m.text) for m in found] == [
        ("started", "fulfil v1 at orders, choreography"),
        ("passed", "the baton to payments"),
        ("done", "step payments.charge (2 attempts)"),
        ("failed", "step shipping.ship (ValueError: x)"),
        ("failed", "ValueError: x"),
    ]
    assert len({moment.key for moment in found}) == len(found)


# -- the picture -------------------------------------------------------------------------------


def busy() -> Timeline:
    entries = [
        started("attributes order", CHARGE),
        done(1, 400, SHIP, began_ms=200, attempts=3),
        failed(2, 900, RuntimeError("no truck"), REFUND),
        done(3, 1000, began_ms=900),
    ]
    given = history(
        entries, status="failed", ended_ms=1000, reason="RuntimeError: no truck",
        trail=(
            ("orders", 0), ("payments", 0), ("shipping", 400), ("payments", 900), ("orders", 1000)
        ),
    )  # fmt: skip
    return seen(msgspec.structs.replace(given, status=_with_undone(given.status)), 2000)


def _with_undone(status: RunStatus) -> RunStatus:
    return msgspec.structs.replace(status, compensated=1)


def test_the_picture_of_a_failed_run() -> None:
    assert picture(busy(), 72) == [
        "fulfil  o-1                                             failed, 1 undone",
        f"choreography from orders · started {clock(T0)} · took 1.0s",
        "4 hops",
        "",
        "baton held by                       0               500ms           1.0s",
        "  orders                     0.0ms  █                                  █",
        "  payments                   500ms  ██████████████                  ████",
        "  shipping                   500ms                ██████████████████",
        "",
        "✓ payments.charge      ×3    400ms  ░░░░░░░███████",
        "✗ shipping.ship              500ms                ██████████████████",
        "  └ RuntimeError: no truck",
        "↶ undo payments.refund       100ms                                  ████",
        "",
        "failed  RuntimeError: no truck",
    ]


@pytest.mark.parametrize("width", [50, 80, 140])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    assert max(columns(text) for text in picture(busy(), width)) <= width


def test_a_plain_terminal_gets_ascii() -> None:
    assert all(text.isascii() for text in picture(busy(), unicode=False))


def test_a_low_window_leaves_earlier_rows_out() -> None:
    entries = [started(CHARGE)] + [done(op, op + 1, CHARGE) for op in range(60)]
    drawn = picture(seen(history(entries)), height=20)
    assert len(drawn) <= 20
    assert any("earlier rows not shown" in text for text in drawn)


def test_control_characters_never_reach_the_terminal() -> None:
    entries = [started(CHARGE), failed(0, 5, ValueError("\x1b[2Jboo\x07"))]
    drawn = "".join(picture(seen(history(entries))))
    assert "\x1b" not in drawn
    assert "\\x1b[2Jboo\\x07" in drawn


def test_a_run_that_took_no_time_can_be_drawn() -> None:
    line = seen(history([started()], status="completed", ended_ms=0))
    assert any("result  null" in text for text in picture(line))


def test_the_runs_own_timeout_is_not_drawn_until_it_fires() -> None:
    entries = [started("timer expiry", CHARGE)]
    assert not any("expiry" in text for text in picture(seen(history(entries))))
    entries.append(Entry("fired", at(5), 0))
    assert any("expiry" in text for text in picture(seen(history(entries))))


# -- text --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("us", "text"),
    [
        (0, "0.0ms"), (1234, "1.2ms"), (412_000, "412ms"), (999_700, "1.0s"), (59_940_000, "59.9s"),
        (59_990_000, "1m 00s"), (3_599_900_000, "1h 00m"), (90_000_000_000, "1d 01h"),
    ],
)  # fmt: skip
def test_durations_are_short(us: int, text: str) -> None:
    assert duration(us) == text


def test_wide_characters_take_two_columns() -> None:
    assert columns("注文") == 4
    assert fit("注文書", 5) == "注文…"
    assert fit("ab", 4) == "ab  "


def test_long_words_are_broken_and_many_lines_cut() -> None:
    assert wrapped("aaaa bb cccccc", 4) == ["aaaa", "bb", "cccc", "cc"]
    assert wrapped("a\nb\nc", 9, lines_max=2) == ["a", "…"]


def test_line_feeds_stay_printable() -> None:
    assert printable("a\nb\tc") == "a\nb\\tc"
