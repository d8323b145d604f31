"""Keys: the texts by which events are ordered and awaited, and limits are shared.

A key is looked up in the store, so it must be one that every store can keep and find. One that is
not must fail whoever gives it: a node that met it in the store could not go on.
"""

from __future__ import annotations

from pavane.errors import BadArguments

KEY_MAX_BYTES = 1000
"""An index of Postgres takes entries of 2,700 bytes, of which the key is the longest part."""


def key_text(value: object, whose: str) -> str:
    """Return `value` as the text of a key; `whose` begins the error that refuses one."""
    text = value if type(value) is str else str(value)
    if text.isascii():
        size_bytes = len(text)
    else:
        try:
            size_bytes = len(text.encode())
        except UnicodeEncodeError:
            raise BadArguments(
                f"{whose} has the key {text[:40]!a}, which holds a lone surrogate, and UTF-8 "
                f"cannot write that."
            ) from None
    if "\0" in text:
        raise BadArguments(
            f"{whose} has the key {text[:40]!r}, which holds a NUL character, and Postgres keeps "
            f"none."
        )
    if size_bytes > KEY_MAX_BYTES:
        raise BadArguments(
            f"{whose} has a key of {size_bytes:,} bytes, which begins with {text[:40]!r}; the "
            f"limit is {KEY_MAX_BYTES:,}. Use a shorter one, such as a hash."
        )
    return text
