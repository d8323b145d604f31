"""`pavane conversations`: all that one first event or start led to."""

from __future__ import annotations

import click

from pavane.cli.lazy import LazyGroup


@click.command(
    cls=LazyGroup,
    epilog="""\b
Examples:
  pavane conversations list --app shop.py --state stuck
  pavane conversations show o-1 --store shop.db
  pavane conversations watch 0661157ad1f4c8 --app shop.py

\b
A conversation is everything that one first event, or the start of a run, led to, whichever services
it touched. `app.conversation(…)` declares how one should end, and by when; show and watch draw any.
Every command takes --app and --store (or PAVANE_APP and PAVANE_STORE); --store alone is enough.
""",
    lazily={
        "list": (
            "pavane.cli.conversations.look:list_conversations",
            "List conversations under a contract, newest first.",
        ),
        "show": ("pavane.cli.conversations.look:show", "Draw one as a tree of causes over time."),
        "watch": ("pavane.cli.conversations.watch:watch", "Follow one until it is over or stuck."),
    },
)
def conversations() -> None:
    """See what an event or start led to, and whether in time."""
