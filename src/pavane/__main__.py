"""`python -m pavane` is the `pavane` command."""

from __future__ import annotations

from pavane.cli import main

if __name__ == "__main__":
    main(prog_name="pavane")
