"""Text for terminals: widths, durations, times, and what must not reach a screen as it is.

Errors and ids come from users' code. A control character in them could move the cursor or worse, so
everything foreign passes through `printable` before it is shown.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from datetime import datetime


def printable(text: str) -> str:
    """Return `text` with control characters spelled out; line feeds stay."""
    if text.isprintable():
        return text
    return "".join(
        c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def columns(text: str) -> int:
    """Return how many columns a terminal takes for `text`."""
    if text.isascii():
        return len(text)
    return sum(_columns_of(c) for c in text)


def _columns_of(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def fit(text: str, width: int, *, ellipsis: str = "…") -> str:
    """Return `text` in exactly `width` columns: padded, or cut with an ellipsis."""
    taken = columns(text)
    if taken <= width:
        return text + " " * (width - taken)
    room = width - columns(ellipsis)
    kept = ""
    for character in text:
        if columns(kept) + _columns_of(character) > room:
            break
        kept += character
    cut = (kept + ellipsis) if room > 0 else ellipsis[:width]
    return cut + " " * max(0, width - columns(cut))


def wrapped(text: str, width: int, *, lines_max: int = 4, ellipsis: str = "…") -> list[str]:
    """Return `text` in lines of at most `width` columns, broken at spaces where there are some."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split(" "):
            candidate = f"{line} {word}" if line else word
            if line and columns(candidate) > width:
                lines.append(line)
                candidate = word
            while columns(candidate) > width:
                part = fit(candidate, width, ellipsis="").rstrip()
                lines.append(part)
                candidate = candidate[len(part) :]
            line = candidate
        lines.append(line)
    if len(lines) > lines_max:
        return [*lines[: lines_max - 1], ellipsis]
    return lines


def duration(us: float) -> str:
    """Return a length of time in at most seven characters, such as "12ms", "4.2s", "3d 04h"."""
    if us < 10_000:
        return f"{max(us, 0) / 1000:.1f}ms"
    if us < 999_500:
        return f"{us / 1000:.0f}ms"
    seconds = us / 1e6
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h {minutes:02}m"
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02}h"


def clock(us: int) -> str:
    """Return a moment in local time, to the second."""
    return datetime.fromtimestamp(us / 1e6).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def short_clock(us: int) -> str:
    """Return a moment in local time: to the second if it is today, else with the date."""
    moment = datetime.fromtimestamp(us / 1e6).astimezone()
    is_today = moment.date() == datetime.now().astimezone().date()
    return moment.strftime("%H:%M:%S" if is_today else "%Y-%m-%d %H:%M")


def size(bytes: float) -> str:
    """Return an amount of memory with its unit."""
    for unit in ("bytes", "KiB", "MiB"):
        if bytes < 1024:
            return f"{bytes:.0f} {unit}" if unit == "bytes" else f"{bytes:.1f} {unit}"
        bytes /= 1024
    return f"{bytes:.1f} GiB"


def counted(count: int, noun: str) -> str:
    """Return "1 run", "2 runs"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def joined(facts: Sequence[str], dot: str, width: int) -> list[str]:
    """Join facts by dots in as many lines as they need."""
    lines: list[str] = []
    for fact in facts:
        if lines and columns(lines[-1]) + columns(dot) + columns(fact) <= width:
            lines[-1] += dot + fact
        else:
            lines.append(fact)
    return lines
