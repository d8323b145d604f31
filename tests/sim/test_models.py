"""The simulated store against real ones: the same operations, the same answers, the same contents.

What the storms prove holds for real stores only as far as the simulated one behaves as they do.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pavane.errors import PavaneError
from pavane.stores.eventlog import (
    AwaitRow,
    ConversationRow,
    DeadFilter,
    DeadRow,
    EventFilter,
    EventRow,
    HandlerSpec,
    KeptRow,
    MarkRow,
    ParkedEvent,
    Reaction,
    ShadowRow,
    StateRow,
)
from pavane.stores.port import (
    LAST_US,
    Commit,
    Fence,
    InboxRow,
    JournalRow,
    MailRow,
    RunFilter,
    Store,
    Touched,
)
from pavane.stores.postgres import PostgresStore
from pavane.stores.sqlite import SqliteStore
from pavane.testing.sim.clock import Clock
from pavane.testing.sim.database import Database
from pavane.testing.sim.process import SimProcess
from pavane.testing.sim.trace import Trace
from pavane.testing.store_check import a_message, a_parked, a_run, joined, write, written
from tests.postgres import Database as EmptyDatabase

OF_HANDLERS = {
    "marks", "remarks", "parked_events", "unparked_events", "dead", "shadows", "cursors"
}  # fmt: skip
PARTITIONS = 2
VIEWS = 2
SERVICES = ("shop", "bank")
RUNS = ("r1", "r2", "r3")
TYPES = ("Paid", "Sent")
KEYS = ("", "k1", "k2")
HANDLERS = ("a", "b")
LIMIT = 100
OWN_TIME = {"expires_us", "joined_us", "created_us", "nonce"}
"""What a store takes from its own clock or from chance."""


# -- the stores --------------------------------------------------------------------------------


class Place(Protocol):
    """A store with its views, and how to run what asks it."""

    views: list[Store]
    fences: list[Fence]

    def run(self, view: int, work: Coroutine[Any, Any, Any]) -> Any: ...
    def close(self) -> None: ...


class Simulated:
    """The store of simulations, in calm weather."""

    def __init__(self) -> None:
        self._clock = Clock(1, Trace())
        database = Database(self._clock, PARTITIONS)
        self._processes = [
            SimProcess(self._clock, database, f"p{number}", "host", number)
            for number in range(VIEWS)
        ]
        self.views: list[Store] = [process.store for process in self._processes]
        self.fences: list[Fence] = []
        for view, store in enumerate(self.views):
            self.run(view, store.open())

    def run(self, view: int, work: Coroutine[Any, Any, Any]) -> Any:
        task = self._processes[view].spawn(work)
        self._clock.run(task.done, 10)
        return task.result()

    def close(self) -> None:
        self._clock.close()


class Real:
    """A real store: `make` returns one more connection to it."""

    def __init__(self, make: Callable[[], Store], clean_up: Callable[[], None]) -> None:
        self._runner = asyncio.Runner()
        self._clean_up = clean_up
        self.views = [make() for _ in range(VIEWS)]
        self.fences: list[Fence] = []
        for view, store in enumerate(self.views):
            self.run(view, store.open())

    def run(self, view: int, work: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(work)

    def close(self) -> None:
        for store in self.views:
            self._runner.run(store.close())
        self._runner.close()
        self._clean_up()


def sqlite() -> Place:
    folder = tempfile.TemporaryDirectory(prefix="pavane-model-")
    path = Path(folder.name) / "store.db"
    return Real(lambda: SqliteStore(path, partitions=PARTITIONS), folder.cleanup)


def postgres() -> Place:
    database = EmptyDatabase()
    url = database.__enter__()
    return Real(lambda: PostgresStore(url, partitions=PARTITIONS), database.__exit__)


# -- what is asked -----------------------------------------------------------------------------

numbers = st.integers(0, 3)
times = st.integers(1, 9)
deaths = st.integers(0, 3)
runs = st.sampled_from(RUNS)
services = st.sampled_from(SERVICES)
types = st.sampled_from(TYPES)
keys = st.sampled_from(KEYS)
handlers = st.sampled_from(range(len(HANDLERS)))
positions = st.integers(1, 6)
views = st.integers(0, VIEWS - 1)
bodies = st.sampled_from((b"{}", b'{"a":1}', b"[]"))
statuses = st.sampled_from(("running", "waiting", "stuck", "completed", "passed"))


def some(*parts: st.SearchStrategy[Any]) -> st.SearchStrategy[list[tuple[Any, ...]]]:
    return st.lists(st.tuples(*parts), max_size=2)


commits = st.fixed_dictionaries(
    {"chain": numbers},
    optional={
        "runs": some(numbers, runs, services, statuses, st.none() | times, st.none() | times),
        "journal": some(numbers, numbers, bodies),
        "messages": some(runs, numbers, services, bodies),
        "inbox": some(services, runs, numbers, times),
        "mail": some(services, runs, numbers, types, bodies),
        "mail_taken": some(services, runs, numbers),
        "parked": some(runs, numbers, services, times, numbers),
        "unparked": some(services, runs, numbers),
        "positions": some(services, runs, positions),
        "events": some(types, keys, times, bodies),
        "marks": some(handlers, positions),
        "remarks": some(handlers, positions),
        "parked_events": some(handlers, positions, keys, times, numbers),
        "unparked_events": some(handlers, positions),
        "dead": some(handlers, positions, keys, types, times),
        "undead": some(numbers),
        "asked": some(numbers, types),
        "states": some(services, types, keys, st.none() | bodies),
        "shadows": some(handlers, positions, times),
        "awaited": some(services, types, keys, runs, numbers, numbers),
        "unawaited": some(runs, numbers),
        "kept": some(services, types, keys, positions, times),
        "cursors": some(handlers, st.integers(0, PARTITIONS - 1), positions),
        "conversations": some(types, runs, keys, times, st.none() | times),
        "members": some(runs, runs),
    },
)


def made(store: Store, plan: dict[str, Any], handler_nos: Sequence[int]) -> Commit:
    """Make a commit of a plan, for one store."""

    def get(part: str, otherwise: Any) -> Any:
        rows = plan.get(part, otherwise)
        return [(handler_nos[row[0]], *row[1:]) for row in rows] if part in OF_HANDLERS else rows

    commit = Commit(chain=plan["chain"])
    commit.runs = [
        a_run(store, no, run, service, status=status, wake_us=wake, ended_us=ended)
        for no, run, service, status, wake, ended in get("runs", ())
        if no
    ]
    commit.journal = [JournalRow(*row) for row in get("journal", ())]
    commit.messages = [
        msgspec.structs.replace(a_message(store, f"{run}#{number}", to), body=body)
        for run, number, to, body in get("messages", ())
    ]
    commit.inbox = [
        InboxRow(service, f"{run}#{number}", at) for service, run, number, at in get("inbox", ())
    ]
    commit.mail = [
        MailRow(service, run, f"m{number}", type, body, 1)
        for service, run, number, type, body in get("mail", ())
    ]
    commit.mail_taken = [
        (service, run, f"m{number}" if number else "*")
        for service, run, number in get("mail_taken", ())
    ]
    commit.parked = [
        a_parked(
            store, f"{run}#{number}{service}", service, due_us=due, began_us=due, deaths=deaths
        )
        for run, number, service, due, deaths in get("parked", ())
    ]
    commit.unparked = [
        (service, f"{run}#{number}{service}") for service, run, number in get("unparked", ())
    ]
    commit.positions = [
        (store.target_of(service, run), position) for service, run, position in get("positions", ())
    ]
    commit.events = [an_event(store, *row) for row in get("events", ())]
    commit.reaction = reaction(store, get)
    return commit


def an_event(store: Store, type: str, key: str, at: int, body: bytes, id: str) -> EventRow:
    slot = store.slot_of(key, id)
    return EventRow(id, type, 1, key, "shop", at, "c", "", "", body, slot)


def reaction(store: Store, get: Callable[[str, Any], Any]) -> Reaction:
    return Reaction(
        marks=[MarkRow(no, pos, 1, 1, 1, "done") for no, pos in get("marks", ())],
        remarks=[MarkRow(no, pos, 2, 2, 2, "dropped") for no, pos in get("remarks", ())],
        parked=[
            ParkedEvent(no, pos, store.slot_of(key, "e"), key, attempt, due, 1)
            for no, pos, key, due, attempt in get("parked_events", ())
        ],
        unparked=get("unparked_events", ()),
        dead=[
            DeadRow(0, no, pos, store.slot_of(key, "e"), key, type, "e", at, 1, "why", b"1", b"{}")
            for no, pos, key, type, at in get("dead", ())
        ],
        undead=[no for (no,) in get("undead", ())],
        asked=get("asked", ()),
        states=[StateRow(*row) for row in get("states", ())],
        shadows=[ShadowRow(no, pos, at, b"[]") for no, pos, at in get("shadows", ())],
        awaited=[
            AwaitRow(service, type, key, run, f"{run}#{number}", 1, b"{}", pos)
            for service, type, key, run, number, pos in get("awaited", ())
        ],
        unawaited=[
            (run, f"{run}#{number}" if number else "*") for run, number in get("unawaited", ())
        ],
        kept=[KeptRow(*row) for row in get("kept", ())],
        cursors=get("cursors", ()),
        conversations=[
            ConversationRow(contract, run, key, at, at + 1, ended)
            for contract, run, key, at, ended in get("conversations", ())
        ],
        members=get("members", ()),
    )


async def contents(store: Store) -> dict[str, Any]:
    """Read everything that the port lets one read."""
    targets = [row.target for row in await store.partition_rows(SERVICES)]
    slots = list(range(PARTITIONS))
    found: dict[str, Any] = {
        "head": await store.log_head(),
        "log": await store.read_log(0, None, None, LIMIT, None),
        "of others": await store.read_log(0, None, targets[:1], LIMIT, 1),
        "runs": await store.list_runs(RunFilter(limit=LIMIT)),
        "rows": await store.rows_of(range(4)),
        "halted": in_order(await store.halted_runs(RUNS)),
        "journals": await store.journals(range(4)),
        "live": await store.live_runs(targets, 0, LIMIT),
        "due runs": await store.due_runs(targets, (0, 0), LAST_US, LIMIT),
        "due parked": await store.due_parked(targets, (0, ""), LAST_US, LIMIT),
        "nodes": await store.nodes(),
        "partitions": await store.partition_rows(SERVICES),
        "events": await store.read_events(0, LIMIT, LIMIT),
        "events found": await store.find_events(EventFilter()),
        "event types": await store.event_types(),
        "handlers": await store.handler_rows(),
        "dead": await store.dead_letters(DeadFilter()),
        "dead counts": await store.dead_counts(DeadFilter()),
        "marks at": await store.marks_at(range(7)),
        "parked at": await store.parked_at(range(7)),
    }
    for no in [row.no for row in await store.handler_rows()]:
        found[f"handler {no}"] = [
            await store.cursors(no), await store.backlog(no), await store.marks(no, 0, LIMIT),
            await store.parked_events(no, slots, 0, LIMIT), await store.shadows(no, LIMIT),
        ]  # fmt: skip
    for run in RUNS:
        found[f"run {run}"] = [
            in_order(await store.run_rows(run)), await store.inbox_of(run),
            in_order(await store.awaits_of(run)),
            await store.runs_in(run),
        ]  # fmt: skip
        for service in SERVICES:
            found[f"run {run} at {service}"] = [
                await store.run_row(service, run), in_order(await store.parked_of(service, run)),
                await store.mail_of(service, run),
                await store.seen(service, [f"{run}#{number}" for number in range(4)]),
            ]  # fmt: skip
    for service in SERVICES:
        for type in TYPES:
            for key in KEYS:
                found[f"{service} {type} {key}"] = [
                    await store.state(service, type, key), await store.awaits(service, type, key),
                    await store.kept_events(service, type, key),
                ]  # fmt: skip
    return found


def in_order(rows: Iterable[Any]) -> list[Any]:
    """Put rows in order whose order the port leaves open."""
    return sorted(rows, key=str)


def comparable(answer: Any) -> Any:
    """Return an answer without what a store takes from its own clock or from chance."""
    if isinstance(answer, PavaneError):
        return type(answer).__name__
    if isinstance(answer, msgspec.Struct):
        given = answer.__struct_fields__
        return {name: comparable(getattr(answer, name)) for name in given if name not in OWN_TIME}
    if isinstance(answer, dict):
        return {key: comparable(value) for key, value in answer.items()}
    if isinstance(answer, (list, tuple)):
        return [comparable(value) for value in answer]
    return answer


def difference(one: Any, other: Any) -> str:
    """Say where two answers differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        parts = [key for key in one if one[key] != other[key]]
        return "; ".join(f"{key}: {one[key]!r} and {other[key]!r}" for key in parts)
    return f"{one!r} and {other!r}"


# -- the machine -------------------------------------------------------------------------------


class Stores(RuleBasedStateMachine):
    """Asks every store for the same and compares what they answer."""

    real: Callable[[], Place] = staticmethod(sqlite)
    tells_at_once = True
    """Whether changes are told of as they happen; the port lets a store do so late."""
    places: Sequence[Place] = ()

    @initialize()
    def open(self) -> None:
        self.places = [Simulated(), self.real()]
        self.handler_nos: list[int] = []
        self.published = 0
        for view in range(VIEWS):
            self.both(view, lambda place, store: store.register(SERVICES))
        self.register_handlers(0, None, TYPES)

    def teardown(self) -> None:
        for place in self.places:
            place.close()

    def both(self, view: int, ask: Callable[[Place, Store], Coroutine[Any, Any, Any]]) -> list[Any]:
        """Ask all, compare, and return the answers."""
        answers: list[Any] = []
        for place in self.places:
            try:
                answers.append(place.run(view, ask(place, place.views[view])))
            except PavaneError as error:
                answers.append(error)
        first = comparable(answers[0])
        for answer in answers[1:]:
            assert comparable(answer) == first, difference(first, comparable(answer))
        return answers

    def new_event(self) -> str:
        self.published += 1
        return f"e{self.published}"

    def fence(self, place: Place, node: int) -> Fence | None:
        """Return a node's fence, which may be lost; none for 0."""
        return place.fences[-node % len(place.fences)] if place.fences and node else None

    @rule(view=views, node=numbers, plans=st.lists(commits, min_size=1, max_size=3))
    def write(self, view: int, node: int, plans: list[dict[str, Any]]) -> None:
        for plan in plans:
            plan["events"] = [(*row, self.new_event()) for row in plan.get("events", ())]

        async def ask(place: Place, store: Store) -> Any:
            known = {row.no for row in await store.dead_letters(DeadFilter(limit=LIMIT))}
            batch = [made(store, plan, self.handler_nos) for plan in plans]
            for made_of in [commit.reaction for commit in batch if commit.reaction]:
                # Nobody can ask for a dead letter that nobody could read yet.
                made_of.undead = [no for no in made_of.undead if no in known]
                made_of.asked = [(no, what) for no, what in made_of.asked if no in known]
            results = await written(store, *batch, fence=self.fence(place, node))
            events = [[row.pos for row in commit.events] for commit in batch]
            sent = [[row.pos for row in commit.messages] for commit in batch]
            told = [
                (result, None if result else (at, of))
                for result, at, of in zip(results, events, sent, strict=True)
            ]
            return told, store.tail

        self.both(view, ask)

    @rule(view=views, number=positions, type=types)
    def publish_again(self, view: int, number: int, type: str) -> None:
        """Alone, since stores may give others of its batch other positions."""
        id = f"e{min(number, self.published)}"

        async def ask(place: Place, store: Store) -> int:
            event = an_event(store, type, "k1", 1, b"{}", id)
            await write(store, events=[event])
            return event.pos

        if self.published:
            self.both(view, ask)

    @rule(view=views)
    def join(self, view: int) -> None:
        answers = self.both(view, lambda place, store: joined(store))
        for place, fence in zip(self.places, answers, strict=True):
            place.fences.append(fence)

    @rule(view=views, node=numbers, what=st.lists(st.tuples(services, runs), max_size=3))
    def claim(self, view: int, node: int, what: list[tuple[str, str]]) -> None:
        async def ask(place: Place, store: Store) -> Any:
            fence = self.fence(place, node)
            return fence and await store.claim(fence, [store.target_of(*it) for it in what])

        self.both(view, ask)

    @rule(view=views, node=numbers, what=st.lists(st.tuples(services, runs, positions), max_size=3))
    def release(self, view: int, node: int, what: list[tuple[str, str, int]]) -> None:
        async def ask(place: Place, store: Store) -> Any:
            fence = self.fence(place, node)
            given = [(store.target_of(service, run), pos) for service, run, pos in what]
            return fence and await store.release(fence, given)

        self.both(view, ask)

    @rule(view=views, node=numbers)
    def renew(self, view: int, node: int) -> None:
        async def ask(place: Place, store: Store) -> Any:
            fence = self.fence(place, node)
            return fence and store.renew(fence)

        self.both(view, ask)

    @rule(
        view=views,
        node=numbers,
        runs=st.dictionaries(numbers, deaths, max_size=2),
        events=st.dictionaries(st.tuples(numbers, numbers), deaths, max_size=2),
    )
    def leave(
        self, view: int, node: int, runs: dict[int, int], events: dict[tuple[int, int], int]
    ) -> None:
        async def ask(place: Place, store: Store) -> Any:
            fence = self.fence(place, node)
            parked = {("bank", f"r{no}#1"): runs[no] for no in runs}
            tries = [("shop", f"{RUNS[0]}#{no}") for no in runs]
            touched = [Touched(runs, parked), Touched(events=events, tries=tries)]
            return fence and await store.leave(fence, touched)

        self.both(view, ask)

    @rule(view=views, node=numbers, renewed=st.booleans())
    def expire(self, view: int, node: int, renewed: bool) -> None:
        async def ask(place: Place, store: Store) -> None:
            fence = self.fence(place, node)
            nodes = [it for it in await store.nodes() if fence and it.no == fence.node]
            if renewed and fence:
                await asyncio.sleep(0.001)
                store.renew(fence)
            await store.expire(nodes)

        self.both(view, ask)

    @rule(view=views, node=numbers, nos=st.lists(numbers, max_size=2))
    def touch(self, view: int, node: int, nos: list[int]) -> None:
        async def ask(place: Place, store: Store) -> Any:
            fence = self.fence(place, node)
            parked = [a_parked(store, "r1#1", deaths=2)] if nos else []
            return fence and await store.touch(fence, dict.fromkeys(nos, 2), parked)

        self.both(view, ask)

    @rule(view=views, count=st.integers(1, 9))
    def take_run_numbers(self, view: int, count: int) -> None:
        self.both(view, lambda place, store: store.take_run_numbers(count))

    @rule(view=views, since=st.none() | times, listens=st.sets(types, min_size=1))
    def register_handlers(self, view: int, since: int | None, listens: Iterable[str]) -> None:
        specs = [HandlerSpec("shop", name, tuple(sorted(listens)), since) for name in HANDLERS]
        rows, *_ = self.both(view, lambda place, store: store.register_handlers(specs))
        self.handler_nos = [row.no for row in rows]

    @rule(view=views, which=handlers, until=times)
    def pause_handler(self, view: int, which: int, until: int) -> None:
        no = self.handler_nos[which]
        self.both(view, lambda place, store: store.pause_handler(no, until, "why"))

    @rule(view=views, which=handlers)
    def forget_handler(self, view: int, which: int) -> None:
        """Nothing is written any more for one that is forgotten, so it is made known again."""
        no = self.handler_nos[which]
        self.both(view, lambda place, store: store.forget_handler(no))
        self.register_handlers(view, None, TYPES)

    @rule(view=views, before=times, limit=st.integers(1, 3))
    def prune(self, view: int, before: int, limit: int) -> None:
        self.both(view, lambda place, store: store.prune(before * 1000, limit))

    @rule(view=views, before=times)
    def prune_events(self, view: int, before: int) -> None:
        self.both(view, lambda place, store: store.prune_events(before, LIMIT))

    @rule(view=views)
    def read_the_tail(self, view: int) -> None:
        async def ask(place: Place, store: Store) -> Any:
            messages = await store.read_log(store.tail, None, None, LIMIT, None)
            store.tail = max(store.tail, await store.log_head())
            return messages

        self.both(view, ask)

    @precondition(lambda self: self.tells_at_once)
    @rule(view=views)
    def changed(self, view: int) -> None:
        """Who has looked, and nobody writes, sees no change."""

        async def ask(place: Place, store: Store) -> Any:
            store.changed()
            return store.changed()

        self.both(view, ask)

    @invariant()
    def contents_are_the_same(self) -> None:
        if self.places:
            self.both(0, lambda place, store: contents(store))


class PostgresStores(Stores):
    """The same with Postgres, which takes longer to begin."""

    real = staticmethod(postgres)
    tells_at_once = False


TestStores = Stores.TestCase
TestStores.settings = settings(
    max_examples=40, stateful_step_count=20, deadline=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
TestPostgresStores = PostgresStores.TestCase
TestPostgresStores.settings = settings(
    TestStores.settings, max_examples=8, stateful_step_count=15, derandomize=True, database=None
)  # the same examples each time: it takes longer to look at what others would find


def test_what_others_wrote_is_told_alike() -> None:
    stores = Stores()
    stores.open()
    try:
        stores.changed(0)
        stores.both(1, lambda place, store: write(store, journal=[JournalRow(1, 0, b"[]")]))

        async def looks(place: Place, store: Store) -> bool:
            return store.changed()

        assert stores.both(0, looks)[0] is True
    finally:
        stores.teardown()
