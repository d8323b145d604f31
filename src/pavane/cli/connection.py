"""Which app and which store a command is about: the options, and a client for them."""

from __future__ import annotations

import functools
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import click
import msgspec

from pavane.app import App, Client
from pavane.cli.names import complete_target
from pavane.cli.target import find_app
from pavane.config import STORE_VARIABLE, make_store
from pavane.errors import NoStore
from pavane.stores.port import Store


class Where(msgspec.Struct, frozen=True):
    """The app and store that the command line names; None where it does not."""

    target: str | None
    store: str | None

    def app(self) -> App:
        """Return the app, or say that one must be named."""
        if self.target is None:
            raise click.UsageError(
                "Which app? Give --app shop.py (or shop:app), or set PAVANE_APP. This needs the "
                "app's code, so a store alone does not do."
            )
        return find_app(self.target)

    def app_or_none(self, what: str = "runs") -> App:
        """Return the app; one without services, if only a store is named."""
        if self.target is not None:
            return find_app(self.target)
        if self.store is None and not os.environ.get(STORE_VARIABLE):
            raise click.UsageError(
                f"Which {what}? Give --app shop.py or --store shop.db, or set PAVANE_APP or "
                f"{STORE_VARIABLE}."
            )
        return App("cli", [], store=self.store)


Command = Callable[..., Any]


def where_options(command: Command) -> Command:
    """Add --app and --store; the command gets them as `where`."""

    @click.option(
        "-a",
        "--app",
        "target",
        envvar="PAVANE_APP",
        metavar="TARGET",
        shell_complete=complete_target,
        help="The app: shop.py, shop:app or shop.py:app. Default: $PAVANE_APP.",
    )
    @click.option(
        "-s", "--store", metavar="ADDRESS", shell_complete=complete_target,
        help="Its store, such as shop.db. Default: the app's own, or $PAVANE_STORE.",
    )  # fmt: skip
    @functools.wraps(command)
    def wrapped(target: str | None, store: str | None, **options: Any) -> Any:
        return command(where=Where(target or None, store), **options)

    return wrapped


def target_argument(command: Command) -> Command:
    """Add TARGET, the app to work for; without one, and without $PAVANE_APP, say so."""

    @click.argument("target", envvar="PAVANE_APP", required=False, shell_complete=complete_target)
    @functools.wraps(command)
    def wrapped(target: str | None, **options: Any) -> Any:
        if not target:
            raise click.UsageError("Which app? Give TARGET, such as shop.py, or set PAVANE_APP.")
        return command(target=target, **options)

    return wrapped


@asynccontextmanager
async def connected(app: App, store: str | None, *, create: bool = False) -> AsyncGenerator[Client]:
    """Open a client; a store that is not there yet is made only with `create`.

    So is one on Postgres brought up to date only with `create`: workers of the version before could
    not start again.
    """
    address = store if store is not None else own_address(app)
    checked = None if address is None else check_store(address, create=create)
    async with app.connect(store=checked) as client:
        yield client


def own_address(app: App) -> str | None:
    """Return where the app keeps its state; None if it was given a store object of its own."""
    given: object = getattr(app, "_store", None)
    return app.address if given is None or isinstance(given, str) else None


def check_store(address: str, *, create: bool = False) -> Store:
    """Return the store; raise NoStore if other processes cannot share it, or it is not there."""
    store = make_store(address, create=create)
    if not store.features.shared:
        raise NoStore(
            f"{address} lives only inside the process that works on it, so nothing can be seen of "
            f"it from here. Give the app a file: App(…, store='shop.db')."
        )
    path: object = getattr(store, "path", None)
    if isinstance(path, Path) and not path.exists() and not create:
        raise NoStore(
            f"There is no store at {path}. `pavane run` and `pavane runs start` make "
            f"one; perhaps you are in another directory, or need --store."
        )
    return store


async def register_home(client: Client, run: str) -> None:
    """Make the home of a run known, so that requests can be addressed to it without its code."""
    await client.store.register([(await client.home_row(run)).home])
