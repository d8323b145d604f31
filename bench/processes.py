"""The processes that are measured: five services, steps that do nothing, results of 100 bytes."""

from __future__ import annotations

import asyncio
import os

from pavane import App, EngineConfig, Event, Limit, Service, receive

PAYLOAD = "x" * 100
RECOVERED = "PAVANE_BENCH_RECOVERED"

home = Service("home")
others = [Service(f"s{number}") for number in range(5)]


class Go(Event):
    """Lets a waiting run go on."""


@home.step
async def step() -> str:
    return PAYLOAD


remote = [service.step(name="step")(step.fn) for service in others]


@home.workflow
async def five() -> str:
    """Five steps of the home service."""
    for _ in range(5):
        result = await step()
    return result


@home.step(limit=Limit(concurrency=100))
async def limited_step() -> str:
    return PAYLOAD


@home.workflow
async def limited() -> str:
    """Five steps of the home service under a limit."""
    for _ in range(5):
        result = await limited_step()
    return result


@home.workflow
async def tour() -> str:
    """Five steps, each of another service."""
    for visit in remote:
        result = await visit()
    return result


@home.workflow
async def long(steps: int) -> int:
    for _ in range(steps):
        await step()
    return steps


@home.workflow
async def sleeper(delay_s: float) -> str:
    await asyncio.sleep(delay_s)
    return "awake"


@home.workflow(receives=[Go])
async def waiter() -> str:
    await receive(Go)
    return "gone"


@home.workflow
async def nothing() -> None:
    """End at once."""


@home.step
async def hang_before_the_crash() -> str:
    """Never return in the process that will be killed."""
    while RECOVERED not in os.environ:
        await asyncio.sleep(60)
    return PAYLOAD


@home.workflow
async def two_part() -> str:
    await step()
    return await hang_before_the_crash()


def make_app(store: str, **config: float) -> App:
    settings = EngineConfig(**config)  # type: ignore[arg-type]
    return App("bench", [home, *others], store=store, config=settings)
