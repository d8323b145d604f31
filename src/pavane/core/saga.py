"""Sagas: compensations that run in reverse when a block of a workflow does not complete."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar, Token
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, ParamSpec, Protocol, Self

from pavane.core.execution import Execution, Undoing, required
from pavane.errors import BadDeclaration, ContinueAsNew, Discarded, PavaneError

P = ParamSpec("P")

current_saga: ContextVar[Saga | None] = ContextVar("pavane_saga", default=None)


Compensation = Callable[[], Coroutine[Any, Any, None]]
"""Asks for a step that undoes something, with the arguments that it was registered with."""


CHECKED = "undo(…) checks its arguments"
"""The mark of runs that were refused arguments; those that had gone on before go on."""


class Compensating(Protocol):
    """A step, as the saga sees it."""

    def compensation(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Compensation: ...


class _Registered(NamedTuple):
    step: Compensating
    compensate: Compensation
    undoing: Undoing


class Saga:
    """The compensations of one `async with saga()` block; call it to register one."""

    def __init__(self) -> None:
        self._registered: list[_Registered] = []
        self._has_failed = False
        self._token: Token[Saga | None] | None = None
        self._execution: Execution | None = None

    def __call__(
        self, step: Callable[P, Awaitable[Any]], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Register `step(*args)` to be called if the block fails or is cancelled.

        The arguments are written down now: later changes of them do not count. Raises BadArguments,
        NotEncodable or TooLarge when they are not such that the step can be called with them.
        """
        candidate: Any = step
        if not hasattr(candidate, "compensation"):
            raise BadDeclaration(
                f"undo({step!r}, …) needs a step, so that it is journalled and retried. Decorate "
                f"it with @service.step."
            )
        self.register(candidate, args, kwargs)

    def register(
        self, step: Compensating, args: tuple[Any, ...], kwargs: dict[str, Any], of: int = -1
    ) -> None:
        """Register a compensation; `of` is the operation that it undoes, if that is known."""
        execution = required("undo(…)")
        try:
            compensate = step.compensation(args, kwargs)
        except PavaneError as error:
            if execution.patched(CHECKED):
                raise
            compensate = partial(_refuse, error)
        undoing = Undoing(execution.fed, of)
        self._registered.append(_Registered(step, compensate, undoing))
        if self._has_failed:
            execution.undoing.append(undoing)

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
        execution = self._execution
        if execution is None:
            return
        if error is not None and not isinstance(error, ContinueAsNew):
            self._has_failed = True
            execution.undoing += [one.undoing for one in self._registered]
            while self._registered:
                one = self._registered.pop()
                try:
                    await _shielded(one.compensate())
                except (Exception, asyncio.CancelledError) as failure:
                    left = [repr(one.step), *(repr(later.step) for later in self._registered[::-1])]
                    await execution.not_undone(failure, left)
                one.undoing.until = execution.fed
        execution.saga_closed(asyncio.current_task())


async def _refuse(error: PavaneError) -> None:
    raise error


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

    Compensations are steps: journalled, retried, recorded once. Their arguments are checked and
    written down when they are registered. One that exhausts its retries, or cannot be asked for,
    leaves the run `stuck` for a person, with all that is left to be undone.
    """
    return Saga()
