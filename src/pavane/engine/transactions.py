"""Transactions: does steps that are declared so, inside the commit that records their result.

What such a step writes, its mark, the reply to the run's holder and the end of its custody are one
commit, so it takes effect once, with the result that the run is told. The mark is looked at first:
a run that asks again, after a crash or when a person lets it go on, is told the recorded result.
A failed attempt leaves nothing and goes the way of every failed attempt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Raw

from pavane.core.envelope import Reply, pack, unpack
from pavane.errors import LeaseLost, PavaneError, StoreError, WorkFailed
from pavane.service import Step, current_step
from pavane.stores.port import Commit, Conflict, InboxRow, Message

if TYPE_CHECKING:
    from pavane.engine.session import Session
    from pavane.engine.steps import Attempt, Steps


async def then(
    call: Coroutine[Any, Any, Any], variables: Context, use: Callable[[Any], None]
) -> None:
    """Await user code in its context, and use what it returns."""
    use(await asyncio.get_running_loop().create_task(call, context=variables))


class Transactions:
    """Owns what `steps` does inside the transactions of one session; see the module."""

    def __init__(self, session: Session, steps: Steps) -> None:
        self._session = session
        self._steps = steps
        self._store = session.store

    def begin(self, attempt: Attempt, step: Step[..., Any]) -> None:
        """Make one attempt with the next batch that is written."""
        call, now = attempt.call, self._session.now_us()
        commit = Commit(partial(self._written, attempt))
        commit.inbox = [InboxRow(call.service, call.work_id, now)]
        if attempt.message is not None:
            commit.inbox = [*commit.inbox, InboxRow(attempt.message.to, attempt.message.id, now)]
        commit.unparked = attempt.unparked
        target = self._store.target_of(call.reply_to, call.run)
        reply = Message("reply", call.work_id, call.reply_to, call.run, b"", now, target)
        commit.messages = [reply]
        commit.work = partial(self._work, attempt, step, reply)
        self._session.submit(commit)

    def _work(
        self,
        attempt: Attempt,
        step: Step[..., Any],
        reply: Message,
        connection: Any,
        state: bytes | None,
    ) -> Coroutine[Any, Any, None] | None:
        """Call the step where its commit is written; perhaps more than once before it is."""
        if attempt.revoked:
            raise PavaneError("The run gave this step up before it began.")
        args, kwargs = attempt.arguments(step)
        attempt.outboxed = None
        variables = copy_context()
        variables.run(current_step.set, attempt)

        def answer(result: Any) -> None:
            raw = b"null" if step.returns_none else self._steps.encoded(step, result)
            reply.body = pack(attempt.reply(True, raw))

        result = variables.run(step.fn, connection, *args, **kwargs)
        if not step.is_async:
            return answer(result)
        return then(result, variables, answer)

    def _written(self, attempt: Attempt, error: PavaneError | None) -> None:
        if isinstance(error, (LeaseLost, StoreError)):
            return  # the session ends
        if isinstance(error, Conflict):
            self._session.spawn(self._answer_again(attempt))
        elif isinstance(error, WorkFailed):
            self._steps.transacted(attempt, error.error)
        else:
            self._steps.transacted(attempt, error)

    async def _answer_again(self, attempt: Attempt) -> None:
        """Tell the run what became of this step before."""
        call = attempt.call
        recorded = await self._store.message(call.work_id)
        if recorded is not None:
            # A person may have had the run go on since; it listens to its present era only.
            reply = msgspec.structs.replace(unpack(Reply, recorded.body), era=call.era)
        elif await self._store.seen(call.service, [call.work_id]):
            reply = Reply(
                call.run, call.op, call.era, "", False, Raw(b"null"), call.service, 0, 0,
                f"Step {call.service}.{call.step} was done, but its result has left the log. Look "
                f"at what it wrote, and fork the run or kill it.",
            )  # fmt: skip
        else:  # the command was revoked, or another copy of it is answered
            self._steps.transacted(attempt, None)
            return
        held, message = attempt.held, attempt.message
        attempt.message = None  # it is consumed with the answer
        self._steps.transacted(attempt, None)
        if held is not None:
            self._session.holder.step_done(held.key, reply, attempt.unparked)
        else:
            self._steps.answer(call, reply, attempt.unparked, message)
