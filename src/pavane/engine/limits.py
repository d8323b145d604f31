"""Limits: who may begin, decided in one place for the whole cluster.

Each limit lives, by its key, in one partition of the service that declares it. Who wants to begin
asks there, by a message, and begins when a permit comes; who has ended gives it back. Permits and
those who wait are rows, written in the commit that tells of them, so that they outlive the node
that decides. The same work that asks again, after a takeover, is given the permit that it has.

Nothing is ever given back in a commit with other things, so a permit can be left over when a
process dies. As long as others wait, whoever has one is asked now and then whether it is needed; a
permit that nobody knows of any more is given back. A permit bears the nonce of the last asking,
so that what is late can neither use nor give back a newer one.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import insort
from collections.abc import Callable, Collection
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

import msgspec
from msgspec import Raw

from pavane.core.baton import ENDED
from pavane.core.envelope import Permit, Reply, pack, unpack
from pavane.errors import PavaneError
from pavane.policy import Limit, seconds
from pavane.stores.eventlog import AwaitRow, Reaction, StateRow
from pavane.stores.port import Commit, Message

if TYPE_CHECKING:
    from pavane.engine.session import Session

log = logging.getLogger("pavane.limits")

LIMIT = "~limit:"
"""What the types of waits, and the names of states, begin with that are about a limit."""
AGE_US = 60_000_000
"""One step of priority counts like so long a wait, so that nobody waits for ever."""
SLOTS = 10
"""A rate's time is counted in so many parts."""
PROBE_US = 1_000_000
"""Who has a permit that others wait for is asked after so long, then after twice that, …"""
PROBE_MAX_US = 60_000_000
STRAY_US = 2_000_000
PROBES_MAX = 200

Place = tuple[str, str, str]
"""The service that declares a limit, the limit's name, and the key of those who share it."""


def line_key(asked_us: int, priority: int) -> int:
    """Return what those who wait are ordered by."""
    return asked_us - priority * AGE_US


class _Asked:
    """What one piece of work asked for here; `begin` is called once, when the permit comes."""

    __slots__ = ("begin", "permit")

    def __init__(self, permit: Permit, begin: Callable[[Message], None] | None) -> None:
        self.permit = permit
        self.begin: Callable[[Message], None] | None = begin


class _Table:
    """Who has permits of one place, and who waits for one."""

    def __init__(self, place: Place, target: int) -> None:
        self.place = place
        self.target = target
        self.permits: dict[str, Permit] = {}
        """Those that are given and those that are waited for, by work."""
        self.waiting: list[tuple[int, str]] = []
        """The work that waits, first whose turn is first."""
        self.slots: dict[int, int] = {}
        """How many were given in each part of the rate's time, of late."""
        self.probes: dict[str, tuple[int, int]] = {}
        """When who has a permit is asked next whether it is needed, and how long that was."""
        self.loading: list[Callable[[], None]] | None = []
        self.unsettled = 0
        self.timer: asyncio.TimerHandle | None = None

    @property
    def given(self) -> int:
        """How many permits are given."""
        return len(self.permits) - len(self.waiting)

    def wait(self, permit: Permit) -> None:
        self.permits[permit.work] = permit
        insort(self.waiting, (line_key(permit.asked_us, permit.priority), permit.work))

    def give(self, permit: Permit, probed_us: int) -> None:
        """Have a permit given, and its owner asked at a time whether it is needed."""
        self.permits[permit.work] = permit
        self.probes[permit.work] = (probed_us, PROBE_US)

    def drop(self, permit: Permit) -> None:
        del self.permits[permit.work]
        if permit.given_us:
            del self.probes[permit.work]
        else:
            self.waiting.remove((line_key(permit.asked_us, permit.priority), permit.work))

    def row(self, permit: Permit) -> AwaitRow:
        service, limit, key = self.place
        id = self.row_id(permit.work)
        return AwaitRow(service, LIMIT + limit, key, "", id, permit.asked_us, pack(permit))

    def row_id(self, work: str) -> str:
        _, limit, key = self.place
        return f"{limit}/{key}/{work}"


class Limits:
    """Owns what one session asks of limits, and the limits of its partitions; see the module."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._store = session.store
        self._loop = asyncio.get_running_loop()
        self._asked: dict[str, _Asked] = {}
        self._strays: dict[str, tuple[Permit, int]] = {}
        """Permits that nobody knows of, and when they are given back."""
        self._tables: dict[Place, _Table] = {}
        self._numbers = count()

    # -- asking --------------------------------------------------------------------------------

    def ask(
        self,
        place: Place,
        work: str,
        to: str,
        target: int,
        begin: Callable[[Message], None],
        priority: int = 0,
    ) -> None:
        """Call `begin` once `work`, of partition `target` of service `to`, has a permit.

        It is given the message that the permit came by, to be consumed when that may be forgotten.
        """
        nonce = f"{self._session.fence.node}.{next(self._numbers)}"
        permit = Permit(work, nonce, *place, to, target, priority)
        self._asked[work] = _Asked(permit, begin)
        self._say("permit-ask", permit)

    def give_back(self, work: str) -> None:
        """Let go of a permit, or of the wish for one."""
        asked = self._asked.pop(work, None)
        if asked is not None and self._session.open:
            self._say("permit-back", asked.permit)

    def forget(self, work: str) -> None:
        """Leave what was asked for to the next owner of its partition, who asks again."""
        self._asked.pop(work, None)

    def message(self, kind: str, permit: Permit) -> Message:
        """Return what asks a limit for a permit, or gives it back."""
        id = f"{permit.work}#{kind}{permit.era}~{permit.nonce}"
        now, target = self._session.now_us(), self._target_of(_place(permit))
        return Message(kind, id, permit.service, permit.work, pack(permit), now, target)

    def given_message(self, message: Message) -> None:
        """Begin what a permit came for."""
        permit = unpack(Permit, message.body)
        asked = self._asked.get(permit.work)
        if asked is None:
            self._session.steps.permitted_message(message, permit)
        elif asked.permit.nonce == permit.nonce and asked.begin is not None:
            begin, asked.begin = asked.begin, None
            begin(message)
        else:
            self._session.consumed(message)

    def hold(self, permit: Permit) -> bool:
        """Note that what a permit came for begins after all; tell whether it had not yet."""
        if permit.work in self._asked:
            return False
        self._asked[permit.work] = _Asked(permit, None)
        return True

    def is_stale(self, permit: Permit) -> bool:
        """Tell whether a permit was given so long ago that it counts no more in the limit's rate.

        They pile up while who decides has a node, and who asked has none.
        """
        limit = self._session.registry.limits.get((permit.service, permit.limit))
        if limit is None or limit.rate is None or not permit.given_us:
            return False
        return permit.given_us + round(seconds(limit.per) * 1e6) < self._session.now_us()

    def refuse(self, permit: Permit) -> None:
        """Give back, soon, what nobody here knows of.

        Not at once: what it is for was under way in a process that died, perhaps, and is about to
        be taken up here.
        """
        if permit.work not in self._asked:
            self._strays.setdefault(permit.work, (permit, self._session.now_us() + STRAY_US))

    def probe_message(self, message: Message) -> None:
        """Say so if a permit is not needed any more."""
        permit = unpack(Permit, message.body)
        if permit.op >= 0:
            self._session.spawn(self._probe_run(message, permit))
            return
        self._session.consumed(message)
        asked = self._asked.get(permit.work)
        if asked is None:
            self.refuse(permit)
        elif _place(asked.permit) != _place(permit):
            self._say("permit-back", permit)

    async def _probe_run(self, message: Message, permit: Permit) -> None:
        row = await self._store.run_row(permit.to, permit.work)
        if not self._session.owns(message.target):
            return
        self._session.consumed(message)
        if row is None or row.status in ENDED:
            self._say("permit-back", permit)

    def _say(self, kind: str, permit: Permit) -> None:
        self._session.submit(Commit(messages=[self.message(kind, permit)]))

    def _target_of(self, place: Place) -> int:
        """Return the partition where the limit of a place is decided."""
        service, limit, key = place
        return self._store.target_of(service, f"{LIMIT}{limit}/{key}")

    # -- deciding ------------------------------------------------------------------------------

    def ask_message(self, message: Message) -> None:
        self._at_table(message, self._asks)

    def back_message(self, message: Message) -> None:
        self._at_table(message, self._gives_back)

    def _at_table(self, message: Message, work: Callable[[_Table, Permit, Message], None]) -> None:
        permit = unpack(Permit, message.body)
        table = self._table(_place(permit), message.target)
        if table.loading is not None:
            table.loading.append(partial(work, table, permit, message))
        else:
            work(table, permit, message)

    def _table(self, place: Place, target: int) -> _Table:
        table = self._tables.get(place)
        if table is None:
            table = self._tables[place] = _Table(place, target)
            self._session.spawn(self._load(table))
        return table

    async def _load(self, table: _Table) -> None:
        service, limit, key = table.place
        rows = await self._store.awaits(service, LIMIT + limit, key)
        state = await self._store.state(service, LIMIT + limit, key)
        if self._tables.get(table.place) is not table or not self._session.owns(table.target):
            return  # handed over meanwhile
        now = self._session.now_us()
        for row in rows:
            permit = unpack(Permit, row.reply)
            if permit.given_us:
                table.give(permit, now)
            else:
                table.wait(permit)
        if state is not None:
            table.slots = dict(msgspec.json.decode(state, type=list[tuple[int, int]]))
        came, table.loading = table.loading or [], None
        table.unsettled += 1  # it must not be put away before all that came is dealt with
        for work in came:
            work()
        table.unsettled -= 1
        self._serve_now(table)

    def _asks(self, table: _Table, permit: Permit, message: Message) -> None:
        known = table.permits.get(permit.work)
        permit.pos = message.pos
        if known is None:
            permit.asked_us = message.at_us
            table.wait(permit)
        elif known.pos > message.pos:
            self._session.consumed(message)
            return
        else:
            # Its place in the line, which is made of these, and its permit stay.
            permit.asked_us, permit.priority = known.asked_us, known.priority
            if self.is_stale(known):
                table.drop(known)
                table.wait(permit)
            else:
                permit.given_us = known.given_us
                table.permits[permit.work] = permit
        if permit.given_us:
            self._write(table, [permit], message, [permit])
            return
        served = self._serve(table)
        self._write(table, served if permit in served else [permit, *served], message, served)

    def _gives_back(self, table: _Table, permit: Permit, message: Message) -> None:
        known = table.permits.get(permit.work)
        if known is None or known.nonce != permit.nonce:
            self._session.consumed(message)
            self._forget_idle(table)
            return
        table.drop(known)
        served = self._serve(table)
        self._write(table, served, message, served, gone=[permit.work])

    def _limit_of(self, table: _Table) -> Limit | None:
        service, limit, _ = table.place
        return self._session.registry.limits.get((service, limit))

    def _serve(self, table: _Table) -> list[Permit]:
        """Give permits to those whose turn it is, as long as there are any."""
        served: list[Permit] = []
        limit = self._limit_of(table)
        now = self._session.now_us()
        while table.waiting:
            most = None if limit is None else limit.concurrency
            if most is not None and table.given >= most:
                break
            if limit is not None and limit.rate is not None:
                free_us = _counted(table.slots, limit, now)
                if free_us:
                    self._serve_at(table, free_us)
                    break
            _, work = table.waiting.pop(0)
            permit = table.permits[work]
            permit.given_us = now
            table.give(permit, now + PROBE_US)
            served.append(permit)
        return served

    def _serve_at(self, table: _Table, at_us: int) -> None:
        if table.timer is None:
            delay_s = max(0.0, (at_us - self._session.now_us()) / 1e6)
            table.timer = self._loop.call_later(delay_s, self._serve_later, table)

    def _serve_later(self, table: _Table) -> None:
        table.timer = None
        if self._tables.get(table.place) is table and self._session.owns(table.target):
            self._serve_now(table)

    def _serve_now(self, table: _Table) -> None:
        served = self._serve(table)
        if served:
            self._write(table, served, None, served)
        else:
            self._forget_idle(table)

    def _write(
        self,
        table: _Table,
        rows: list[Permit],
        message: Message | None,
        answers: list[Permit],
        gone: list[str] | None = None,
    ) -> None:
        """Write what was decided, with the answers, in one commit."""
        service, limit, key = table.place
        now = self._session.now_us()
        reaction = Reaction(awaited=[table.row(permit) for permit in rows])
        if gone:
            reaction.unawaited = [("", table.row_id(work)) for work in gone]
        declared = self._limit_of(table)
        if declared is not None and declared.rate is not None and answers:
            body = msgspec.json.encode(sorted(table.slots.items()))
            reaction.states = [StateRow(service, LIMIT + limit, key, body)]
        table.unsettled += 1

        def written(error: PavaneError | None) -> None:
            table.unsettled -= 1
            if error is None:
                if message is not None:
                    self._session.consumed(message)
                self._forget_idle(table)
            elif self._session.open:
                log.error("limit %s of %s: %s", limit, service, error)
                self._close(table)  # what is there counts
                if message is not None:
                    self._session.redeliver(message)

        messages = [self._answer(permit, now) for permit in answers]
        self._session.submit(Commit(written, messages=messages, reaction=reaction))

    def _answer(self, permit: Permit, now_us: int) -> Message:
        if permit.op < 0:
            id = f"{permit.work}#permit-given~{permit.nonce}"
            body = pack(permit)
            kind = "permit-given"
        else:
            id = f"{permit.work}#permit-given{permit.era}"
            body = pack(
                Reply(
                    permit.work, permit.op, permit.era, permit.fingerprint, True, Raw(b"null"),
                    permit.service, 0, permit.given_us,
                )
            )  # fmt: skip
            kind = "reply"
        return Message(kind, id, permit.to, permit.work, body, now_us, permit.target)

    def _forget_idle(self, table: _Table) -> None:
        """Put away what is in the store as well, or of no use any more."""
        if table.permits or table.unsettled or table.loading is not None:
            return
        limit = self._limit_of(table)
        if table.slots and limit is not None and limit.rate is not None:
            width = round(seconds(limit.per) * 1e6 / SLOTS)
            ends_us = (max(table.slots) + SLOTS + 1) * width
            if ends_us > self._session.now_us():
                self._serve_at(table, ends_us)
                return
        if table.slots:
            service, name, key = table.place
            states = [StateRow(service, LIMIT + name, key, None)]
            self._session.submit(Commit(reaction=Reaction(states=states)))
        self._close(table)

    def _close(self, table: _Table) -> None:
        if table.timer is not None:
            table.timer.cancel()
        if self._tables.get(table.place) is table:
            del self._tables[table.place]

    # -- life ----------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether nobody has, or asked for, what is limited here."""
        return not self._asked and not self._strays and not self._tables

    async def own(self, service: str, targets: Collection[int]) -> None:
        """Go on with the limits of these partitions: there may be room since for who waits.

        Those that are declared no more are among them: nobody needs to wait for these.
        """
        rows = await self._store.awaits_like(service, LIMIT)
        for limit, key in dict.fromkeys((row.type.removeprefix(LIMIT), row.key) for row in rows):
            place = (service, limit, key)
            target = self._target_of(place)
            if target in targets:
                self._table(place, target)

    def tick(self) -> None:
        """Ask some of those who have had a permit for long whether it is needed."""
        now = self._session.now_us()
        for work, (permit, due_us) in list(self._strays.items()):
            if due_us <= now:
                del self._strays[work]
                if work not in self._asked and self._session.owns(permit.target):
                    self._say("permit-back", permit)
        probed: list[Message] = []
        for table in self._tables.values():
            if not table.waiting or not self._session.owns(table.target):
                continue
            for work, (due_us, after_us) in table.probes.items():
                if due_us > now or len(probed) >= PROBES_MAX:
                    continue
                after_us = min(2 * after_us, PROBE_MAX_US)
                table.probes[work] = (now + after_us, after_us)
                permit = table.permits[work]
                id = f"{work}#permit-probe~{permit.nonce}.{now}"
                probed.append(
                    Message(
                        "permit-probe", id, permit.to, work, pack(permit), now, permit.target
                    )
                )  # fmt: skip
        if probed:
            self._session.submit(Commit(messages=probed))

    def release(self, targets: set[int]) -> None:
        """Leave the limits of these partitions to their next owner."""
        for table in [table for table in self._tables.values() if table.target in targets]:
            self._close(table)

    def close(self) -> None:
        for table in list(self._tables.values()):
            self._close(table)
        self._asked.clear()


def _place(permit: Permit) -> Place:
    return permit.service, permit.limit, permit.key


def _counted(slots: dict[int, int], limit: Limit, now_us: int) -> int:
    """Count one more begun now, or return when one may begin.

    No stretch of the rate's time touches more than eleven tenths of it, so no eleven of them in a
    row count more than the rate.
    """
    assert limit.rate is not None
    width = round(seconds(limit.per) * 1e6 / SLOTS)
    this = now_us // width
    for slot in [slot for slot in slots if slot < this - SLOTS]:
        del slots[slot]
    if sum(slots.values()) < limit.rate:
        slots[this] = slots.get(this, 0) + 1
        return 0
    return (min(slots) + SLOTS + 1) * width
