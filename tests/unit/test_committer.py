"""The committer, on a store whose answers the test gives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from pavane.engine.committer import Committer
from pavane.errors import LeaseLost, PavaneError
from pavane.stores.memory import MemoryStore
from pavane.stores.port import Commit, Conflict, Fence
from tests.integration.world import in_loop

Results = Sequence[PavaneError | None]


class Desk(MemoryStore):
    """Keeps what is submitted until it is answered."""

    features = msgspec.structs.replace(MemoryStore.features, batch_max=2)

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Sequence[Commit]] = []

    def submit(
        self, batch: Sequence[Commit], fence: Fence | None, done: Callable[[Results], None]
    ) -> None:
        self.asked.append(batch)
        self.answer = done


class Office:
    """A committer at a desk, and in which order it told what became of commits."""

    def __init__(self) -> None:
        self.desk = Desk()
        self.told: list[str] = []
        self.lost: list[PavaneError] = []
        self.committer = Committer(
            self.desk, Fence(1, "n", 1), lambda _: None, lambda _: None, self.lost.append
        )

    def submit(self, *names: str, chain: int = 0) -> None:
        for name in names:
            self.committer.submit(Commit(lambda error, name=name: self._tell(name, error), chain))

    def _tell(self, name: str, error: PavaneError | None) -> None:
        self.told.append(name if error is None else f"{name}: {type(error).__name__}")


@in_loop
async def test_the_next_batch_is_on_its_way_before_anyone_is_told_of_the_first() -> None:
    office = Office()
    office.submit("a", "b", "c", "d", "e")
    await asyncio.sleep(0)
    office.desk.answer([None, None])
    assert len(office.desk.asked) == 2
    assert office.told == []
    await asyncio.sleep(0)
    assert office.told == ["a", "b"]
    flushed = asyncio.create_task(office.committer.flush())
    office.desk.answer([None, None])
    office.desk.answer([None])
    assert not flushed.done()
    await flushed
    assert office.told == ["a", "b", "c", "d", "e"]


@in_loop
async def test_what_follows_a_refused_commit_of_its_chain_is_refused_and_told_after_it() -> None:
    office = Office()
    office.submit("a", "b", chain=7)
    office.submit("other")
    office.submit("c", chain=7)
    await asyncio.sleep(0)
    office.desk.answer([None, Conflict("there")])
    assert [len(batch) for batch in office.desk.asked] == [2, 1]  # not what builds on it
    office.desk.answer([None])
    await office.committer.flush()
    assert office.told[:2] == ["a", "b: Conflict"]
    assert sorted(office.told[2:]) == ["c: Conflict", "other"]


@in_loop
async def test_nothing_is_written_any_more_once_it_is_closed() -> None:
    office = Office()
    office.committer.close()
    office.submit("late")
    await office.committer.flush()
    assert office.desk.asked == []
    assert office.told == ["late: LeaseLost"]


@in_loop
async def test_nothing_is_written_under_a_lost_lease_and_everybody_is_told() -> None:
    office = Office()
    names = [f"c{at}" for at in range(5000)]
    office.submit(*names)
    await asyncio.sleep(0)
    office.desk.answer([LeaseLost("gone")] * 2)
    await office.committer.flush()
    assert len(office.desk.asked) == 1
    assert len(office.lost) == 1
    assert office.told == [f"{name}: LeaseLost" for name in names]
