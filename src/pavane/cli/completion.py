"""`pavane completion`: the script that teaches a shell to complete `pavane`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command(
    epilog="""\b
Examples:
  pavane completion bash > ~/.local/share/bash-completion/completions/pavane
  pavane completion zsh > "${fpath[1]}/_pavane"
  pavane completion fish > ~/.config/fish/completions/pavane.fish

\b
Commands and options complete, and workflow names, events and run ids once --app or --store (or
PAVANE_APP, PAVANE_STORE) says where they are.
"""
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell."""
    found = get_completion_class(shell)
    assert found is not None
    root = ctx.find_root().command
    click.echo(found(root, {}, "pavane", "_PAVANE_COMPLETE").source())
