"""What the README and docs/testing.md show of tests works as it is written there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pavane.testing import RehearsalFailed  # loaded here, it stays the same in all runs of pytest

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parents[2]


def program(file: str, mark: str) -> str:
    """Return the one Python program of a page that holds `mark`."""
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / file).read_text(encoding="utf-8"), re.DOTALL
    )
    (found,) = [block for block in blocks if mark in block]
    return found


def played(pytester: pytest.Pytester, *options: str) -> pytest.RunResult:
    return pytester.runpytest_inprocess("-p", "no:asyncio", "-p", "no:anyio", *options)


def test_the_readme_shows_a_wrong_process_that_is_found(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_refunds=program("README.md", "place_an_order"))
    result = played(pytester)
    result.assert_outcomes(failed=1)
    result.stdout.re_match_lines([
        rf"E .*{RehearsalFailed.__name__}: seed \d+, \w+: the invariant is broken",
        r"E +o-1 \w+, and \d+ cents were kept",
        r"E +Of \d+ faults, \d matter",
        r"E +fulfil  o-1 ",
        r"E +Repeat it:  rehearse\(…, seeds=\[\d+\], modes=\[",
    ])  # fmt: skip


def test_the_docs_show_one_that_survives(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_refunds=program("docs/testing.md", "bank.cancelled.add"))
    played(pytester).assert_outcomes(passed=1)


def test_the_docs_show_tests_in_simulation(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(shop=program("docs/testing.md", 'how do you like it?")\n    await orders'))
    pytester.makepyfile(test_shop=program("docs/testing.md", "test_a_fake_bank"))
    (ini,) = re.findall(
        r"```toml\n(.*?)```", (ROOT / "docs/testing.md").read_text(encoding="utf-8"), re.DOTALL
    )
    pytester.makepyprojecttoml(ini)
    played(pytester).assert_outcomes(passed=4)
