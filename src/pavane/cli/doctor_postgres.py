"""What `pavane doctor` finds of a Postgres: its version, how workers wake up, and its past."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from pavane.app import Client
from pavane.cli.finding import Finding
from pavane.cli.text import clock
from pavane.errors import StoreError

if TYPE_CHECKING:
    from pavane.stores.postgres.store import PostgresStore


async def look_at_postgres(client: Client, facts: dict[str, str | int | float]) -> list[Finding]:
    """Return what there is to know of the client's database; if one fails, workers are refused."""
    return [
        Finding("postgres", "ok", f"Postgres {facts['postgres']}, schema {facts['schema']}"),
        await _wake_ups(cast("PostgresStore", client.store)),
        await _restored(client),
    ]


async def _wake_ups(store: PostgresStore) -> Finding:
    if await store.heard():
        return Finding("wake-ups", "ok", "NOTIFY: workers are told of what others write")
    return Finding(
        "wake-ups", "ok",
        "polling: no notifications arrive (a pooler in transaction mode?), so workers look by the "
        "clock",
    )  # fmt: skip


async def _restored(client: Client) -> Finding:
    try:
        lost, other = await client.restored.lost(), await client.restored.other()
    except StoreError as error:
        return Finding("restored", "fail", str(error), "Workers are refused until then.")
    if lost is not None:
        return Finding(
            "restored", "fail",
            f"refuses workers, since it was put back: it knows nothing of what was done from "
            f"{clock(lost.from_us)} until {clock(lost.until_us)}",
            "`pavane restored` lists what must be looked at; then `pavane restored --accept` lets "
            "workers go on.",
        )  # fmt: skip
    if other is not None:
        return Finding(
            "restored", "fail",
            f"refuses workers of this machine: it is another database (cluster {other.cluster}) "
            f"than the one that they worked for at this address (cluster {other.before})",
            "If that is meant, `pavane restored --accept` lets them go on with it.",
        )  # fmt: skip
    return Finding("restored", "ok", "nothing shows on this machine that it was put back")
