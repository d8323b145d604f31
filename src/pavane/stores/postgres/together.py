"""What many ask at the same time becomes one question.

A round trip costs more than the row it brings, and those who ask for one row each (about a run, a
mark, a message) come in hundreds when messages or results do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Generic, TypeVar

V = TypeVar("V")

KEYS_MAX = 500


class Together(Generic[V]):
    """Asks `ask` for the values of keys, those that wait by then at once, one question at a time.

    Nobody gets an answer to a question that was put before theirs. What is not found is `missing`.
    """

    def __init__(
        self, ask: Callable[[Sequence[str]], Awaitable[Mapping[str, V]]], missing: V
    ) -> None:
        self._ask = ask
        self._missing = missing
        self._waiting: list[tuple[str, asyncio.Future[V]]] = []
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, key: str) -> V:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[V] = loop.create_future()
        self._waiting.append((key, future))
        if self._task is None:
            self._task = loop.create_task(self._answer())
        return await future

    async def _answer(self) -> None:
        try:
            while asked := self._waiting[:KEYS_MAX]:
                del self._waiting[:KEYS_MAX]
                await self._answer_all(asked)
        finally:
            self._task = None

    async def _answer_all(self, asked: Sequence[tuple[str, asyncio.Future[V]]]) -> None:
        try:
            found = await self._ask(list(dict.fromkeys(key for key, _ in asked)))
        except Exception as error:
            for _, future in asked:
                if not future.done():
                    future.set_exception(error)
        else:
            for key, future in asked:
                if not future.done():
                    future.set_result(found.get(key, self._missing))
