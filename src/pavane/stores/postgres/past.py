"""The past of a database: tells a backup that was put back, and a database that is another one.

Nothing inside of a restored database tells what it has forgotten. So nodes beat in it every few
seconds, durably, and each notes the newest beat, whoever's it is, in a small file of its machine. A
database without the noted beat was put back: steps since then were done, and it would have them
done again. Work is refused there until a person has looked, and accepted it as the next generation.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import random
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from pavane.core.tasks import stop_all
from pavane.errors import StoreError
from pavane.stores.postgres.connection import Connection, place_of
from pavane.stores.postgres.writer import Work

log = logging.getLogger("pavane.postgres")

STATE_VARIABLE = "PAVANE_STATE"
"""Names the folder in which machines keep what they know of databases."""
BEAT_S = 10.0
FRESH = 0.1
"""The part of `BEAT_S` for which one node's beat does for all: many need not beat each."""

KEPT_US = 30 * 86400 * 1_000_000
"""How long the beats of nodes that left are kept; what was noted before that tells nothing."""

_READ = (
    "SELECT cluster, generation, pavane.clock_us() AS now_us,"
    " (SELECT value FROM pavane.meta WHERE key = 'next_run') = '1'"
    " AND (SELECT log + events FROM pavane.heads) = 0 AS blank,"
    " (SELECT beaten_us FROM pavane.beats WHERE nonce = $1) AS beaten_us,"
    " (SELECT max(beaten_us) FROM pavane.beats WHERE beaten_us <= $2) AS known_us,"
    " newest.nonce, newest.beaten_us AS newest_us"
    " FROM pavane.past LEFT JOIN"
    " (SELECT * FROM pavane.beats ORDER BY beaten_us DESC LIMIT 1) AS newest ON true"
)
_BEAT = (
    "INSERT INTO pavane.beats VALUES ($1, pavane.clock_us()) ON CONFLICT (nonce) DO UPDATE"
    " SET beaten_us = greatest(beats.beaten_us + 1, excluded.beaten_us) RETURNING beaten_us"
)


class Beat(msgspec.Struct, frozen=True):
    """That a node, by its nonce, worked in a generation of a cluster at a time in µs."""

    cluster: str
    generation: int
    nonce: str
    beaten_us: int


class Found(msgspec.Struct, frozen=True):
    """What a database is, against what is noted of it on this machine.

    `is_blank` is one in which nothing was begun. `lost` is from when to when, in µs, the database
    knows nothing, if it was put back. `newest` is the newest beat in it, if one is fresh.
    """

    cluster: str
    generation: int
    is_blank: bool
    noted: Beat | None
    lost: tuple[int, int] | None
    newest: Beat | None = None

    @property
    def other(self) -> str:
        """The cluster that was worked for here, if this is another one; else empty."""
        noted = self.cluster if self.noted is None else self.noted.cluster
        return "" if noted == self.cluster else noted


class _Noted(msgspec.Struct, frozen=True):
    place: str
    beat: Beat


class Past:
    """What this machine knows of the database at `dsn`; see the module."""

    def __init__(self, dsn: str) -> None:
        self._place = place_of(dsn)
        parts = urlsplit(dsn)
        exact = f"{parts.netloc.rpartition('@')[2]}{parts.path}?{parts.query}"
        self.file = _folder() / f"postgres-{hashlib.sha256(exact.encode()).hexdigest()[:16]}.json"
        self._nonce = ""
        self._task: asyncio.Task[None] | None = None
        self._warned = False
        self.is_quiet = False
        """Whether this node does nothing that a database which was put back would have forgotten.
        """

    # -- what the machine knows ----------------------------------------------------------------

    def noted(self) -> Beat | None:
        """Return the newest beat that was noted on this machine."""
        try:
            return msgspec.json.decode(self.file.read_bytes(), type=_Noted).beat
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            raise StoreError(
                f"{self.file} should tell how far {self._place} had come, and cannot be read: "
                f"{error}. Remove it if you know that the database was not put back."
            ) from error

    def note(self, beat: Beat) -> None:
        """Note a beat that is durable in the database; the file is replaced whole."""
        half = self.file.with_suffix(f".{os.getpid()}.{threading.get_ident()}.part")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with half.open("wb") as file:
                file.write(msgspec.json.encode(_Noted(self._place, beat)))
                file.flush()
                os.fsync(file.fileno())
            half.replace(self.file)
        except OSError as error:
            if not self._warned:
                log.warning(
                    "A backup of %s that is put back will not be noticed here: %s. Let $%s name "
                    "a folder that stays.", self._place, error, STATE_VARIABLE,
                )  # fmt: skip
            self._warned = True

    def forget(self) -> None:
        """Let nothing be noted of what was worked for until now."""
        try:
            self.file.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(
                f"{self.file} tells of another database than {self._place} is, and cannot be "
                f"removed: {error}. Remove it."
            ) from error

    # -- asking the database -------------------------------------------------------------------

    async def look(self, connection: Connection) -> Found:
        """Compare the database with what is noted."""
        noted = self.noted()
        given = ("", 0) if noted is None else (noted.nonce, noted.beaten_us)
        row = await connection.fetchrow(_READ, *given)
        cluster, generation = row["cluster"], row["generation"]
        newest = None
        if (row["newest_us"] or 0) > row["now_us"] - round(FRESH * BEAT_S * 1e6):
            newest = Beat(cluster, generation, row["nonce"], row["newest_us"])
        lost = None
        if noted is not None and noted.cluster == cluster and generation <= noted.generation:
            is_old = noted.beaten_us < row["now_us"] - KEPT_US  # its beat may have been deleted
            is_there = (row["beaten_us"] or 0) >= noted.beaten_us
            if generation < noted.generation or not (is_there or is_old):
                lost = (row["known_us"] or 0, noted.beaten_us)
        return Found(cluster, generation, row["blank"], noted, lost, newest)

    async def check(self, connection: Connection) -> Found:
        """Refuse a database that was put back, or is another one than before; else return it.

        Another one that is blank is taken as it is, for good: it will not be blank for long.
        """
        found = await self.look(connection)
        if found.other and found.is_blank:
            self.forget()
        elif found.other:
            raise StoreError(
                f"{self._place} is another database (cluster {found.cluster}) than the one that "
                f"this machine worked for at this address (cluster {found.other}). If that "
                f"is meant, `pavane restored --accept` lets workers of this machine go on with it."
            )
        if found.lost is not None:
            since, until = (_moment(us) for us in found.lost)
            raise StoreError(
                f"{self._place} was put back: it knows nothing of what was done after {since}, and "
                f"this machine worked for it until {until}. `pavane restored` lists what must be "
                f"looked at; then `pavane restored --accept` lets workers go on."
            )
        return found

    async def accept(self, connection: Connection) -> None:
        """Make the database the next generation, newer than what is noted here.

        Of another database nothing is noted that it could be older than: this machine takes it.
        """
        found = await self.look(connection)
        if found.other:
            self.forget()
            return
        await connection.execute(
            "UPDATE pavane.past SET generation = greatest(generation, $1) + 1",
            0 if found.noted is None else found.noted.generation,
        )

    async def beat(self, connection: Connection, nonce: str, *, also_fresh: bool = False) -> Beat:
        """Beat, unless the database is refused; return what may be noted when it is committed.

        If any beat will do, a fresh one is not repeated.
        """
        found = await self.check(connection)
        if also_fresh and found.newest is not None:
            return found.newest
        beaten_us = await connection.fetchval(_BEAT, nonce)
        await connection.execute(
            "DELETE FROM pavane.beats WHERE beaten_us < pavane.clock_us() - $1", KEPT_US
        )
        return Beat(found.cluster, found.generation, nonce, beaten_us)

    # -- beating -------------------------------------------------------------------------------

    @property
    def is_kept(self) -> bool:
        """Whether a node beats here."""
        return self._task is not None

    def keep(self, nonce: str, ask: Callable[[Work], Awaitable[Any]]) -> None:
        """Beat and note until `stop`, with a new nonce from now on."""
        self._nonce = nonce
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._keep(ask))

    async def _keep(self, ask: Callable[[Work], Awaitable[Any]]) -> None:
        while True:
            await asyncio.sleep(BEAT_S * (0.75 + random.random() / 4))  # not all at once
            if self.is_quiet:
                continue
            with suppress(StoreError):  # the next one tells as much
                beat = await ask(lambda c: self.beat(c, self._nonce, also_fresh=True))
                await asyncio.to_thread(self.note, beat)

    async def stop(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            await stop_all([task])


def _moment(us: int) -> str:
    return datetime.fromtimestamp(us / 1e6).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")


def _folder() -> Path:
    given = os.environ.get(STATE_VARIABLE)
    if given:
        return Path(given)
    states = os.environ.get("XDG_STATE_HOME")
    return (Path(states) if states else Path.home() / ".local" / "state") / "pavane"
