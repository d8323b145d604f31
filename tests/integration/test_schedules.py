"""Schedules on a real store: declared, changed, steered, deleted."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pavane import App, BadArguments, Service, UnknownName, scheduled_time
from pavane.app import RunFilter
from pavane.schedule import micros
from pavane.stores.port import RunRow
from tests.integration.command_line import good, in_folder_of, pavane, worker
from tests.integration.world import Place, rows

DEADLINE_S = 60
reports = Service("reports")


@reports.workflow
async def report(about: str) -> str:
    return f"{about} of {scheduled_time()}"


def app_at(path: Path, cron: str = "0 0 1 1 *", **options: Any) -> App:
    app = App("shop", [reports], store=str(path / "shop.db"))
    if cron:
        app.schedule(cron, report, "sales", name="sales", **options)
    return app


async def until(look: Callable[[], Awaitable[Any]]) -> Any:
    async with asyncio.timeout(DEADLINE_S):
        while not (found := await look()):
            await asyncio.sleep(0.01)
    return found


async def started(app: App) -> dict[str, str]:
    runs = await app.runs(RunFilter(id_prefix="sales@", limit=1000))
    return {run.id: run.status for run in runs}


def in_loop(body: Callable[[Path], Awaitable[None]]) -> Callable[[Path], None]:
    def test(tmp_path: Path) -> None:
        asyncio.run(asyncio.wait_for(body(tmp_path), 2 * DEADLINE_S))  # type: ignore[arg-type]

    test.__name__, test.__doc__ = body.__name__, body.__doc__
    return test


@in_loop
async def test_runs_start_at_their_times_and_know_them(path: Path) -> None:
    async with app_at(path, "* * * * * *", zone="Asia/Kathmandu") as app:
        runs = await until(lambda: _some(app, 2))
        for id in sorted(runs)[:2]:
            nominal = datetime.fromisoformat(id.partition("@")[2])
            assert nominal.utcoffset() == timedelta(hours=5, minutes=45)
            result = await app.get(id).result("30s")
            assert result == f"sales of {nominal.astimezone(UTC)}"
        status = await app.get(min(runs)).status()
        assert status.cause == "~schedule:sales"
        assert status.conversation == min(runs), "each has a conversation of its own"


async def _some(app: App, count: int) -> dict[str, str]:
    found = await started(app)
    return found if len(found) >= count else {}


@in_loop
async def test_a_trigger_a_backfill_and_a_pause_do_what_they_say(path: Path) -> None:
    async with app_at(path, "0 0 * * *") as app:
        schedules = app.client.schedules
        await until(schedules.list)
        await schedules.pause("sales", reason="stocktaking")
        run = await schedules.trigger("sales")
        await until(lambda: _some(app, 1))
        assert await app.get(run).result("30s")
        begin, end = datetime(2025, 3, 1, tzinfo=UTC), datetime(2025, 3, 8, tzinfo=UTC)
        assert await schedules.backfill("sales", begin, end) == 7
        assert await schedules.backfill("sales", begin, end + timedelta(days=1)) == 8
        with pytest.raises(BadArguments, match=r"'sales' has more than 10,000 times\. If that is"):
            await schedules.backfill("sales", datetime(1970, 1, 1, tzinfo=UTC), end)
        await until(lambda: _some(app, 9))
        status = await schedules.show("sales")
        assert (status.state, status.reason, status.next_us) == ("paused", "stocktaking", 0)
        await schedules.resume("sales")

        async def works() -> bool:
            return (await schedules.show("sales")).state == "working"

        await until(works)
        assert len(await started(app)) == 9


@in_loop
async def test_a_changed_declaration_takes_effect_and_the_same_changes_nothing(path: Path) -> None:
    for cron, zone in (("0 0 1 1 *", "UTC"), ("0 0 1 1 *", "UTC"), ("0 9 * * *", "Asia/Tokyo")):
        async with app_at(path, cron, zone=zone) as app:

            async def declared(app: App = app, cron: str = cron, zone: str = zone) -> bool:
                found = await app.client.schedules.list()
                return [(one.cron, one.zone) for one in found] == [(cron, zone)]

            await until(declared)
    async with app_at(path, "0 9 * * *", zone="Asia/Tokyo") as app:
        (keeper,) = await app.runs(RunFilter(id_prefix="~schedule:"))
        assert keeper.attributes["revision"] == 1


def test_a_schedule_is_found_without_reading_all_other_runs(place: Place) -> None:
    """Each worker looks for the schedules of its app when it starts, however full the store is."""
    values = {"no": "no + n", "id": "'r' || n", "workflow": "'w'", "status": "'completed'"}
    values |= {"wake_us": "NULL", "ended_us": "1"}
    columns = RunRow.__struct_fields__
    numbers = "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers"
    crowd = (
        f"INSERT INTO runs ({', '.join(columns)}) {numbers} WHERE n < 30000)"
        f" SELECT {', '.join(values.get(name, name) for name in columns)} FROM runs, numbers"
    )

    async def body() -> None:
        app = App("shop", [reports], store=str(place))
        app.schedule("0 0 1 1 *", report, "sales", name="sales")
        async with app:
            await until(app.client.schedules.list)
            await rows(place, crowd)

            async def reading_all() -> None:
                assert await app.runs(RunFilter(workflow="none")) == []

            slow_s = await _quickest_s(reading_all)
            assert await _quickest_s(lambda: app.client.schedules.show("sales")) < slow_s / 2
            assert await _quickest_s(app.client.schedules.list) < slow_s / 2

    asyncio.run(body())


async def _quickest_s(work: Callable[[], Awaitable[Any]]) -> float:
    times: list[float] = []
    for _ in range(5):
        began = time.perf_counter()
        await work()
        times.append(time.perf_counter() - began)
    return min(times)


@in_loop
async def test_one_that_is_deleted_is_gone_and_begins_anew_when_it_is_declared_again(
    path: Path,
) -> None:
    async with app_at(path) as app:
        await until(app.client.schedules.list)
        with pytest.raises(BadArguments, match=r"Remove app\.schedule"):
            await app.client.schedules.delete("sales")
    async with app_at(path, "") as app, app_at(path).worker():
        await app.client.schedules.delete("sales")

        async def is_gone() -> bool:
            return not await app.client.schedules.list()

        await until(is_gone)
        with pytest.raises(UnknownName, match="No schedule is called 'sales'"):
            await app.client.schedules.pause("sales")
    async with app_at(path, "* * * * * *") as app:
        await until(lambda: _some(app, 1))
        (known,) = await app.client.schedules.list()
        assert known.run != "~schedule:sales"


@in_loop
async def test_a_span_that_is_no_past_is_refused(path: Path) -> None:
    async with app_at(path) as app:
        await until(app.client.schedules.list)
        now = datetime.now(UTC)
        for begin, end in ((now, now - timedelta(days=1)), (now, now + timedelta(days=1))):
            with pytest.raises(BadArguments, match="no span of the past"):
                await app.client.schedules.backfill("sales", begin, end)


SHOP = """
from pavane import App, Service

reports = Service("reports")


@reports.workflow
async def report(about: str) -> str:
    return about


app = App("shop", [reports])
app.schedule("0 9 * * mon-fri", report, "sales", name="sales", zone="Europe/Berlin")
"""


def test_the_command_line_shows_and_steers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "schedule_shop.py").write_text(SHOP)
    with in_folder_of(tmp_path, "schedule_shop.py", monkeypatch):
        with worker(tmp_path, "schedule_shop.py") as process:
            try:
                asyncio.run(_steer())
            finally:
                process.terminate()
                assert process.wait(DEADLINE_S) == 0
        assert good("schedules", "list").splitlines()[1].split()[:2] == ["sales", "paused"]


async def _steer() -> None:
    async def prints(*words: str, of: tuple[str, ...]) -> str:
        async def look() -> str:
            out = await asyncio.to_thread(good, "schedules", *of)
            return out if all(word in out for word in words) else ""

        return await until(look)

    await prints("sales", "working", "0 9 * * mon-fri", "Europe/Berlin", of=("list",))
    shown = await prints("Monday through Friday", "T09:00:00+0", of=("show", "sales"))
    assert shown.count("next") == 5
    run = (await asyncio.to_thread(good, "schedules", "trigger", "sales")).strip()
    await prints(f"{run}  completed", of=("show", "sales"))
    span = ("--since", "2026-03-02", "--until", "2026-03-09")
    counted = await asyncio.to_thread(pavane, "schedules", "backfill", "sales", *span, "--dry-run")
    assert counted.stderr == "would ask sales for 5 runs\n"
    await asyncio.to_thread(good, "schedules", "backfill", "sales", *span)
    await prints("sales@2026-03-06T09:00:00+01:00  completed", of=("show", "sales"))
    told = json.loads(await asyncio.to_thread(good, "schedules", "show", "sales", "-o", "json"))
    assert {"id": "sales@2026-03-06T09:00:00+01:00", "status": "completed"} in told["runs"]
    assert told["schedule"]["last_us"] >= micros(datetime(2026, 3, 6, 8, tzinfo=UTC))
    await asyncio.to_thread(good, "schedules", "pause", "sales", "--reason", "stocktaking")
    await prints("paused  stocktaking", of=("show", "sales"))
    refusal = await asyncio.to_thread(pavane, "schedules", "delete", "sales", "--yes")
    assert refusal.exit_code == 2
    assert "Remove app.schedule" in refusal.stderr
    missing = await asyncio.to_thread(pavane, "schedules", "resume", "sale")
    assert "Did you mean 'sales'?" in missing.stderr
