"""Drawing over what was drawn before, and giving the cursor back."""

from __future__ import annotations

import pytest

from pavane.cli.live import Canvas


def test_a_canvas_draws_over_what_it_drew_before(capsys: pytest.CaptureFixture[str]) -> None:
    with Canvas() as canvas:
        canvas.draw(["one", "two"])
        canvas.draw(["three"])
    assert capsys.readouterr().out == "\x1b[?25lone\ntwo\n\x1b[2F\x1b[Jthree\n\x1b[?25h"


def test_what_a_canvas_keeps_is_not_drawn_over(capsys: pytest.CaptureFixture[str]) -> None:
    with Canvas() as canvas:
        canvas.draw(["one"])
        canvas.keep()
        canvas.draw(["two"])
    assert capsys.readouterr().out == "\x1b[?25lone\n\ntwo\n\x1b[?25h"


def test_the_cursor_is_given_back_after_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), Canvas():
        raise KeyboardInterrupt
    assert capsys.readouterr().out == "\x1b[?25l\x1b[?25h"
