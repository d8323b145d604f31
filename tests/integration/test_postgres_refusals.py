"""Databases that are refused, with the reason and the remedy; and those that are not."""

from __future__ import annotations

from pavane.stores.postgres import PostgresStore
from tests.integration.world import in_loop
from tests.postgres import Database, Role, server


def as_role(url: str, name: str) -> str:
    """Return the address of the same database for another user."""
    return url.replace("//postgres@", f"//{name}@")


async def opened(url: str) -> None:
    """Open a store, and close it again."""
    store = PostgresStore(url, partitions=8)
    await store.open()
    await store.close()


@in_loop
async def test_a_schema_that_was_made_for_the_role_is_taken() -> None:
    """It may have no right to make one, which Postgres checks also if it is there."""
    with Role() as role, Database() as url:
        server().execute(f"CREATE SCHEMA pavane AUTHORIZATION {role}", url.rpartition("/")[2])
        await opened(as_role(url, role))
