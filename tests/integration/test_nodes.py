"""Several nodes on one store: they share the work, hand it over, and survive kills and stops."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from pavane import Client, Run
from pavane.core.operations import Mode
from pavane.errors import BadArguments, UnknownName
from pavane.stores.port import PartitionRow
from tests.integration import crew
from tests.integration.crew import most_executions, recorded
from tests.integration.fleet import Fleet, connected, is_free, start
from tests.integration.world import PATIENT_S, falls_asleep, in_loop, until, until_asleep


async def partitions(client: Client) -> list[PartitionRow]:
    return await client.store.partition_rows([service.name for service in crew.SERVICES])


async def owners(client: Client) -> set[int | None]:
    return {row.owner for row in await partitions(client)}


async def until_owned_by(client: Client, count: int, without: int | None = None) -> set[int]:
    """Wait until every partition has an owner and there are so many of them."""

    async def shared() -> set[int]:
        found = await owners(client)
        if None in found or len(found) != count or without in found:
            return set()
        return {owner for owner in found if owner is not None}

    return await until(shared, f"{count} owners")


async def stop_between_transactions(process: subprocess.Popen[bytes], store: str) -> bool:
    """Stop a process unless it is writing: SQLite's lock would be stopped with it, for all."""
    process.send_signal(signal.SIGSTOP)
    # Its threads run on until this is told.
    await asyncio.to_thread(os.waitid, os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    free = await is_free(store)
    if not free:
        process.send_signal(signal.SIGCONT)
    return free


# -- sharing -----------------------------------------------------------------------------------


@in_loop
async def test_two_nodes_share_evenly_and_one_takes_over_when_the_other_is_killed(
    fleet: Fleet, mode: Mode
) -> None:
    """Invariants 1, 4, 9: what is journalled is not done again, and nothing is lost."""
    first, _ = fleet.launch(), fleet.launch()
    async with AsyncExitStack() as stack:
        client = await connected(stack, fleet)
        await until_owned_by(client, 2)

        async def evenly() -> bool:
            counts = Counter(row.owner for row in await partitions(client))
            return max(counts.values()) - min(counts.values()) <= 2

        await until(evenly, "even shares")
        runs = [await start(client, crew.steady, 6, 0.02, mode=mode) for _ in range(24)]

        async def under_way() -> bool:
            return len(recorded()) > 60

        await until(under_way)
        first.kill()
        first.wait()
        for run in runs:
            assert await run.result(timeout=30) == 30
        await until_owned_by(client, 1)
        assert most_executions() <= 2
        doubled = [key for key, count in Counter(k for _, k, _ in recorded()).items() if count > 1]
        assert len(doubled) <= 24
        for run in runs:
            entries = (await run.history()).entries
            done = [entry.op for entry in entries if entry.what == "done"]
            assert len(done) == len(set(done)) == 12


@in_loop
async def test_a_node_that_was_stopped_for_three_leases_writes_nothing_more_and_joins_again(
    fleet: Fleet, mode: Mode
) -> None:
    """Invariant 2: nothing under an older fence lands after a newer one."""
    lease_s = 2.0  # which a busy machine does not end for the other one too
    first = fleet.launch(lease_s=lease_s)
    async with AsyncExitStack() as stack:
        client = await connected(stack, fleet)
        zombie = (await until_owned_by(client, 1)).pop()
        fleet.launch(lease_s=lease_s)
        await until_owned_by(client, 2)
        runs = [await start(client, crew.steady, 8, 0.03, mode=mode) for _ in range(16)]

        async def under_way() -> bool:
            return len(recorded()) > 40

        await until(under_way)
        await until(functools.partial(stop_between_transactions, first, fleet.store))
        await until_owned_by(client, 1, without=zombie)
        head = await client.store.log_head()
        await asyncio.sleep(2 * lease_s)  # until three leases are over
        first.send_signal(signal.SIGCONT)
        for run in runs:
            assert await run.result(timeout=30) == 56
        await until_owned_by(client, 2, without=zombie)
        late = await client.store.read_log(head, None, None, 9999, None)
        of_others = await client.store.read_log(head, None, None, 9999, zombie)
        assert {it.pos for it in late} <= {it.pos for it in of_others}, "the zombie wrote messages"
        assert most_executions() <= 2
        for run in runs:
            entries = (await run.history()).entries
            done = [entry.op for entry in entries if entry.what == "done"]
            assert len(done) == len(set(done)) == 16


@in_loop
async def test_a_node_that_joins_and_one_that_leaves_do_nothing_twice(
    fleet: Fleet, mode: Mode
) -> None:
    """Invariants 1, 4: partitions are handed over in order, so each step is executed once."""
    first = fleet.launch()
    async with AsyncExitStack() as stack:
        client = await connected(stack, fleet)
        await until_owned_by(client, 1)
        runs = [await start(client, crew.steady, 12, 0.05, mode=mode) for _ in range(12)]

        async def under_way() -> bool:
            return len(recorded()) > 20

        await until(under_way)
        fleet.launch()
        await until_owned_by(client, 2)
        first.terminate()
        assert await asyncio.to_thread(first.wait, 30) == 0
        await until_owned_by(client, 1)
        for run in runs:
            assert await run.result(timeout=30) == 132
        assert most_executions() == 1
        assert len(recorded()) == 12 * 24


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
@in_loop
async def test_sleepers_that_were_handed_over_wake_once(tmp_path: Path, fleet: Fleet) -> None:
    """Invariants 2, 4: their old owner has forgotten them."""
    async with AsyncExitStack() as stack:
        client = await connected(stack, fleet)
        first = crew.app_on(fleet.store, PATIENT_S)
        await stack.enter_async_context(first.worker())
        await until_owned_by(client, 1)
        runs: list[Run[Any]] = []

        async def nap(for_s: float) -> Run[Any]:
            """Begin many; return the first of them."""
            runs[:] = await asyncio.gather(*(start(client, crew.naps, for_s) for _ in range(40)))
            for run in runs[1:]:
                await falls_asleep(run)
            return runs[0]

        await until_asleep(nap, 2.0)
        await stack.enter_async_context(crew.app_on(fleet.store, PATIENT_S).worker())
        await until_owned_by(client, 2)
        for run in runs:
            assert await run.result(timeout=60) == 1
        assert most_executions() == 1


@in_loop
async def test_services_may_live_in_processes_of_their_own(fleet: Fleet, mode: Mode) -> None:
    """Invariant 8."""
    fleet.launch("deck")
    fleet.launch("galley")
    async with AsyncExitStack() as stack:
        client = await connected(stack, fleet)
        runs = [await start(client, crew.steady, 3, 0.0, mode=mode) for _ in range(5)]
        for run in runs:
            assert await run.result(timeout=30) == 6
        where = {name: {pid for n, _, pid in recorded() if n == name} for name in ("tick", "cook")}
        assert len(where["tick"]) == len(where["cook"]) == 1
        assert where["tick"] != where["cook"]
        assert most_executions() == 1


# -- ends --------------------------------------------------------------------------------------


@in_loop
async def test_a_node_that_is_terminated_lets_its_steps_end(fleet: Fleet, mode: Mode) -> None:
    """Invariant 1: their results are journalled, so nobody does them again."""
    first = fleet.launch()
    async with AsyncExitStack() as stack:
        client = await connected(stack, fleet)
        run = await start(client, crew.lingers, mode=mode)

        async def lingering() -> bool:
            return bool(recorded("linger"))

        await until(lingering)
        first.terminate()
        await asyncio.sleep(0.1)
        assert first.poll() is None, "it did not wait for its step"
        (fleet.folder / "go").touch()
        assert await asyncio.to_thread(first.wait, 30) == 0
        assert await owners(client) == {None}
        fleet.launch()
        assert await run.result(timeout=30) == "went"
        assert len(recorded("linger")) == 1


@in_loop
async def test_a_node_that_is_asked_to_drain_hands_everything_over_and_ends(
    fleet: Fleet, mode: Mode
) -> None:
    """Invariants 1, 4: its steps end, and the other one goes on with its runs."""
    first = fleet.launch()
    async with AsyncExitStack() as stack:
        client = await connected(stack, fleet)
        leaves = (await until_owned_by(client, 1)).pop()
        with pytest.raises(BadArguments, match=r"Nobody but .* works for deck, galley"):
            await client.nodes.drain(str(leaves))
        runs = [await start(client, crew.steady, 8, 0.05, mode=mode) for _ in range(12)]
        fleet.launch()
        stays = (await until_owned_by(client, 2)) - {leaves}

        async def both_have_both() -> bool:
            return all(len(node.partitions) == 2 for node in await client.nodes.list())

        await until(both_have_both, "partitions of each service at each node")
        # Asked twice at once, since it may have left a moment later: once more changes nothing.
        both = await asyncio.gather(
            *[client.nodes.drain(str(leaves)) for _ in range(2)], return_exceptions=True
        )
        known = [one for one in both if not isinstance(one, UnknownName)]
        asked, *again = sorted(known, key=lambda one: one.state == "draining")
        assert asked.state == "working", "whichever of them looked first"
        assert all(one.name == asked.name for one in again)
        assert await asyncio.to_thread(first.wait, 30) == 0
        await client.nodes.until_left(leaves)
        assert await until_owned_by(client, 1) == stays
        with pytest.raises(UnknownName, match=f"No node is called '{leaves}'"):
            await client.nodes.drain(str(leaves))
        for run in runs:
            assert await run.result(timeout=30) == 56
        assert most_executions() == 1


@in_loop
async def test_what_is_asked_of_a_node_that_is_gone_is_asked_of_nobody_else(
    fleet: Fleet,
) -> None:
    """A process that dies while it drains has no successor that drains as well."""
    first = fleet.launch()
    async with AsyncExitStack() as stack:
        client = await connected(stack, fleet)
        dies = (await until_owned_by(client, 1)).pop()
        run = await start(client, crew.lingers)

        async def lingering() -> bool:
            return bool(recorded("linger"))

        await until(lingering)
        await client.nodes.drain(str(dies), force=True)

        async def draining() -> bool:
            return [node.state for node in await client.nodes.list()] == ["draining"]

        await until(draining)
        first.kill()
        first.wait()
        await asyncio.wait_for(client.nodes.until_left(dies), 30)  # though nobody takes over
        assert [node.state for node in await client.nodes.list()] == ["gone"]
        with pytest.raises(BadArguments, match="is gone"):
            await client.nodes.drain(str(dies))
        (fleet.folder / "go").touch()
        fleet.launch()
        assert await run.result(timeout=30) == "went"
        assert [node.state for node in await client.nodes.list()] == ["working"]


@in_loop
async def test_an_app_whose_node_drained_goes_on_as_a_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "RECORD", tmp_path / "record.txt")
    app = crew.app_on(str(tmp_path / "world.db"), PATIENT_S)
    async with app, app.connect() as other:
        (node,) = await other.nodes.list()
        await other.nodes.drain(node.name, force=True)
        await asyncio.wait_for(app.client.drained(), 30)
        assert await other.nodes.list() == []
        run = await app.start(crew.steady, 2, 0.0)
        async with crew.app_on(str(tmp_path / "world.db"), PATIENT_S):
            assert await run.result(timeout=30) == 2


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
@pytest.mark.skipif(sys.platform != "linux", reason="limits another process")
@in_loop
async def test_a_node_whose_disk_failed_opens_its_store_anew_and_goes_on(fleet: Fleet) -> None:
    """Invariants 4, 10: after an I/O error what the old connections remember is not trusted."""
    import resource  # not everywhere

    node = fleet.launch()
    async with AsyncExitStack() as stack:
        client = await connected(stack, fleet)
        await until_owned_by(client, 1)
        _, hard = resource.prlimit(node.pid, resource.RLIMIT_FSIZE)

        async def nap(for_s: float) -> Run[Any]:
            """Have the disk fail while the run sleeps."""
            resource.prlimit(node.pid, resource.RLIMIT_FSIZE, (hard, hard))
            run = await until_asleep(lambda for_s: start(client, crew.naps, for_s), for_s)
            resource.prlimit(node.pid, resource.RLIMIT_FSIZE, (4096, hard))
            return run

        run = await until_asleep(nap, 0.5)
        ticks = len(recorded("tick"))

        async def opens_anew() -> bool:
            return "opens its store anew" in (fleet.folder / "0.log").read_text()

        await until(opens_anew)
        assert len(recorded("tick")) == ticks
        resource.prlimit(node.pid, resource.RLIMIT_FSIZE, (hard, hard))
        assert await run.result(timeout=30) == 1
        assert node.poll() is None


@in_loop
async def test_a_run_sleeps_over_a_kill(fleet: Fleet, mode: Mode) -> None:
    """Invariants 4, 10."""
    first = fleet.launch()
    async with AsyncExitStack() as stack:
        client = await connected(stack, fleet)
        await until_owned_by(client, 1)  # a slow start of the process is no part of the nap
        run = await until_asleep(lambda for_s: start(client, crew.naps, for_s, mode=mode), 1.0)
        first.kill()
        first.wait()
        fleet.launch()
        assert await run.result(timeout=60) == 1
        assert most_executions() == 1


@in_loop
async def test_what_a_step_reported_is_seen_by_the_attempt_after_a_crash(
    fleet: Fleet, mode: Mode
) -> None:
    first = fleet.launch()
    async with AsyncExitStack() as stack:
        client = await connected(stack, fleet)
        run = await start(client, crew.carries, mode=mode)

        async def kept() -> bool:
            return any(row.beat != b"null" for row in (await run.history()).parked)

        await until(kept)
        first.kill()
        first.wait()
        fleet.launch()
        assert await run.result(timeout=30) == {"at": 7}
