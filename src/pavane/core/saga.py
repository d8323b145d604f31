"""Sagas: compensations that run in reverse when a block of a workflow does not complete."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, ParamSpec, Protocol, Self

from pavane.core.execution import Execution, required
from pavane.errors import BadDeclaration, ContinueAsNew, Discarded

P = ParamSpec("P")

current_saga: ContextVar[Saga | None] = ContextVar("pavane_saga", default=None)


class Compensation(Protocol):
    """A step, as the saga sees it."""

    def compensate(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Coroutine[Any, Any, Any]: ...


class Saga:
    """The compensations of one `async with saga()` block; call it to register one."""

    def __init__(self) -> None:
        self._registered: list[tuple[Compensation, tuple[Any, ...], dict[str, Any]]] = []
        self._token: Token[Saga | None] | None = None
        self._execution: Execution | None = None

    def __call__(
        self, step: Callable[P, Awaitable[Any]], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Register `step(*args)` to be called if the block fails or is cancelled."""
        candidate: Any = step
        if not hasattr(candidate, "compensate"):
            raise BadDeclaration(
                f"undo({step!r}, …) needs a step, so that it is journalled and retried. Decorate "
                f"it with @service.step."
            )
        self._registered.append((candidate, args, kwargs))

    async def __aenter__(self) -> Self:
        self._execution = required("saga()")
        self._execution.saga_opened(asyncio.current_task())
        self._token = current_saga.set(self)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._token is not None:
            try:
                current_saga.reset(self._token)
            except ValueError:  # put away from another context
                return
        if isinstance(error, (Discarded, GeneratorExit)):
            return
        if error is not None and not isinstance(error, ContinueAsNew):
            while self._registered:
                step, args, kwargs = self._registered.pop()
                await _shielded(step.compensate(args, kwargs))
        if self._execution is not None:
            self._execution.saga_closed(asyncio.current_task())


async def _shielded(work: Coroutine[Any, Any, Any]) -> None:
    """Await `work` to its end whatever is cancelled meanwhile: half a compensation helps nobody."""
    task = asyncio.get_running_loop().create_task(work)
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise
    task.result()


def saga() -> Saga:
    """Open a block whose registered compensations run in reverse if it fails or is cancelled.

    ```python
    async with saga() as undo:
        payment = await charge(order.cents)
        undo(refund, payment)
    ```

    Compensations are steps: journalled, retried, recorded once. One that exhausts its retries
    leaves the run `stuck` for a person.
    """
    return Saga()
