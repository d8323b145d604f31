"""What people ask of handlers while nodes work, stop and take over, on a real SQLite file."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from pavane import App, Breaker, Client, EngineConfig, Event, Retry, Service
from pavane.errors import BadArguments, UnknownName
from pavane.steering.dead import DeadQuery
from pavane.steering.events import Replay
from pavane.stores.eventlog import EventFilter
from pavane.stores.port import Commit
from tests.integration.world import in_loop, until


class Asked(Event, key="who"):
    who: str
    number: int = 0


class Hurried(Event, key="who", ttl="0.5s"):
    who: str
    number: int = 0


class Answered(Event, key="who"):
    who: str
    number: int


class Desk:
    """A service whose only handler fails while `closed`."""

    def __init__(
        self, path: Path, *, breaker: Breaker | None = None, declared: bool = True,
        kind: type[Asked | Hurried] = Asked,
    ) -> None:  # fmt: skip
        self.closed = True
        service = Service("desk")
        if declared:

            @service.on(kind, retry=Retry(attempts=1), breaker=breaker)
            async def answer(event: Any) -> Answered:
                if self.closed:
                    raise ConnectionError("closed")
                return Answered(who=event.who, number=event.number)

        config = EngineConfig(lease_s=2.0)
        self.app = App("desk", [service], store=str(path), config=config)


async def answers(client: Client) -> list[int]:
    rows = await client.events.list(EventFilter(types=("Answered",)))
    return [int(row.data.decode().rpartition(":")[2].rstrip("}")) for row in reversed(rows)]


async def ask(client: Client, count: int, who: str = "ada") -> None:
    for number in range(count):
        await client.publish(Asked(who=who, number=number), source="test")


async def all_dead(client: Client, count: int) -> None:
    async def reached() -> bool:
        return sum(group.count for group in await client.dead.groups()) == count

    await until(reached, f"{count} dead letters")


async def retry_all(client: Client) -> int:
    return await client.dead.retry(DeadQuery())


@in_loop
async def test_retried_dead_letters_of_a_key_are_handled_in_order(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "desk.db")
    async with desk.app.worker() as client:
        await ask(client, 30)
        await all_dead(client, 30)
        desk.closed = False
        assert await retry_all(client) == 30
        assert await retry_all(client) == 0

        async def answered() -> bool:
            return len(await answers(client)) == 30

        await until(answered)
        assert await answers(client) == list(range(30))
        assert await client.dead.groups() == []


@in_loop
async def test_what_is_retried_by_hand_is_handled_however_old_it_is(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "desk.db", kind=Hurried)
    async with desk.app.worker() as client:

        async def is_dead() -> bool:
            """Publish, until one is handled before its time to live is over."""
            id = await client.publish(Hurried(who="ada"), source="test")

            async def outcome() -> str:
                (handled,) = (await client.events.story(id)).handled
                return handled.outcome.replace("waiting", "")

            return await until(outcome) == "dead"

        await until(is_dead)
        await asyncio.sleep(0.55)
        desk.closed = False
        await retry_all(client)

        async def answered() -> bool:
            return await answers(client) == [0]

        await until(answered)


@in_loop
async def test_retrying_all_ends_while_everything_fails_again(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "desk.db")
    async with desk.app.worker() as client:
        await ask(client, 5)
        await all_dead(client, 5)
        before = {row.no for row in await client.dead.list()}
        assert await retry_all(client) == 5

        async def renewed() -> bool:
            now = {row.no for row in await client.dead.list()}
            return len(now) == 5 and not now & before

        await until(renewed)


@in_loop
async def test_what_was_asked_for_without_a_node_is_done_when_one_starts(tmp_path: Path) -> None:
    path = tmp_path / "desk.db"
    async with Desk(path).app.worker() as client:
        await ask(client, 3)
        await all_dead(client, 3)
    async with Desk(path).app.connect() as client:
        assert await retry_all(client) == 3
    desk = Desk(path)
    desk.closed = False
    async with desk.app.worker() as client:

        async def answered() -> bool:
            return await answers(client) == [0, 1, 2]

        await until(answered)


@in_loop
async def test_a_handler_not_declared_any_more_can_drop_but_not_retry(tmp_path: Path) -> None:
    path = tmp_path / "desk.db"
    async with Desk(path).app.worker() as client:
        await ask(client, 1)
        await all_dead(client, 1)
    async with Desk(path, declared=False).app.worker() as client:
        assert await retry_all(client) == 1

        async def refused() -> bool:
            return [row.asked for row in await client.dead.list()] == [""]

        await until(refused, "the request to be given back")
        assert [count async for count in client.dead.drop(DeadQuery())] == [1]
        await all_dead(client, 0)
        (status,) = await client.handlers.list()
        assert status.state == "undeclared"


@in_loop
async def test_only_a_handler_that_no_code_has_can_be_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "desk.db"
    async with Desk(path).app.worker() as client:
        await ask(client, 1)
        await all_dead(client, 1)
        with pytest.raises(BadArguments, match="declared in the app's code; delete it there"):
            await client.handlers.forget("desk.answer")
    without = Desk(path, declared=False)
    async with without.app.worker() as client:
        with pytest.raises(BadArguments, match="has dead letters; see to them first"):
            await client.handlers.forget("desk.answer")
        assert [count async for count in client.dead.drop(DeadQuery())] == [1]
        await all_dead(client, 0)
        await ask(client, 2, "bob")
        async with App("other", [], store=str(path)).connect() as stranger:
            with pytest.raises(BadArguments, match="A node works for desk now, perhaps with"):
                await stranger.handlers.forget("desk.answer")
        given_up = await client.handlers.forget("answer")
        assert (given_up.name, given_up.backlog) == ("answer", 2)
        assert await client.handlers.list() == []
        with pytest.raises(UnknownName):
            await client.handlers.forget("desk.answer")
    again = Desk(path)
    again.closed = False
    async with again.app.worker() as client:  # begins at the log's end, as any new handler
        await client.publish(Asked(who="cyd", number=7), source="test")

        async def answered() -> bool:
            return await answers(client) == [7]

        await until(answered)


@in_loop
async def test_two_replays_of_one_event_are_both_handled(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "desk.db")
    desk.closed = False
    async with desk.app.worker() as client:
        await ask(client, 2)

        async def answered() -> int:
            return len(await answers(client))

        async def first() -> bool:
            return await answered() == 2

        await until(first)
        await client.handlers.pause("answer")

        async def paused() -> bool:
            session = client.node.session if client.node else None
            assert session is not None
            return all(s.paused_until_us for s in session.handlers.consumer.subscriptions)

        await until(paused)
        # Planned before either is in custody, as two people would at the same time.
        one = aiter(client.events.replay("answer", Replay(), "one"))
        two = aiter(client.events.replay("answer", Replay(), "two"))
        pages = await asyncio.gather(anext(one), anext(two))
        assert pages == [2, 2]
        await client.handlers.resume("answer")

        async def thrice() -> bool:
            return await answered() == 6

        await until(thrice)


@in_loop
async def test_a_breaker_left_open_by_a_dead_node_holds_nobody_back(tmp_path: Path) -> None:
    path = tmp_path / "desk.db"
    breaker = Breaker(window=2, failures=0.5, pause="5m")
    async with Desk(path, breaker=breaker).app.worker() as client:
        await ask(client, 4)

        async def broken() -> bool:
            return (await client.handlers.list())[0].state == "breaker"

        await until(broken)
    desk = Desk(path, breaker=breaker)
    desk.closed = False
    async with desk.app.worker() as client:
        await client.publish(Asked(who="eve", number=9), source="test")

        async def answered() -> bool:
            return 9 in await answers(client)

        await until(answered)


@in_loop
async def test_everybody_who_waits_for_the_committer_goes_on(tmp_path: Path) -> None:
    async with Desk(tmp_path / "desk.db").app.worker() as client:
        session = client.node.session if client.node else None
        assert session is not None
        session.submit(Commit(lambda error: None))
        async with asyncio.timeout(30):
            await asyncio.gather(*(session.committer.flush() for _ in range(3)))
