"""Services and their steps: the names that a process is made of."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    Literal,
    ParamSpec,
    Protocol,
    TypeVar,
    overload,
)

import msgspec

from pavane.core.codec import Params, encode_fitting
from pavane.core.execution import Execution, current, required
from pavane.core.operations import Mode
from pavane.core.saga import Compensation, current_saga
from pavane.errors import BadArguments, BadDeclaration, OnlyInWorkflow
from pavane.event import class_of, is_event, is_event_type, key_of
from pavane.handler import (
    BREAKER,
    Breaker,
    Handler,
    HandlerOptions,
    Origin,
    Since,
    check_returns,
    current_handler,
    per_second,
)
from pavane.policy import Duration, Limit, Retry, StepOptions, seconds

if TYPE_CHECKING:
    from pavane.workflow import Workflow

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

_NAME_MAX = 200


def checked_name(name: str, what: str) -> str:
    """Return `name` if it can be used in ids and URLs, else raise BadDeclaration."""
    if not name or len(name) > _NAME_MAX or not all(c.isalnum() or c in "_-" for c in name):
        raise BadDeclaration(
            f"{name!r} is no name for a {what}: use letters, digits, '_' and '-', at most "
            f"{_NAME_MAX}."
        )
    return name


class Step(Generic[P, R]):
    """A function of a service, called from workflows like any function; its result is journalled.

    Called outside a run it is just the function, so unit tests need no engine.
    """

    def __init__(
        self,
        service: Service,
        fn: Callable[..., Any],
        name: str,
        options: StepOptions,
        transaction: bool = False,
    ) -> None:
        self.service = service
        self.fn = fn
        self.name = name
        self.options_ = options
        self.transaction = transaction
        self.limit_name = "" if options.limit is None else options.limit.name or name
        self.params = Params.of(fn, given=1 if transaction else 0)
        self.returns_none = self.params.returns in (None, type(None))
        _ = self.params.result  # a return type that cannot be stored is refused here
        self.is_async = inspect.iscoroutinefunction(fn)
        self.__name__ = name
        self.__doc__ = fn.__doc__
        self.__wrapped__ = fn

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        execution = current()
        if execution is None:
            if self.transaction:
                raise OnlyInWorkflow(
                    f"{self} is given its connection by the engine, so it can only be called from "
                    f"a running workflow. In a test, call `{self.name}.fn(connection, …)`."
                )
            return _plainly(self.fn, args, kwargs)
        return self._durably(execution, args, kwargs)

    def compensation(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Compensation:
        """Write the arguments down and return what calls the step with them (see `saga`)."""
        execution = required("a compensation")
        raw = self._encoded(execution, args, kwargs)

        async def compensate() -> None:
            await execution.issue(
                "step", self.name, self.service.name, args=raw, detail=self.options_, undo=True
            )

        return compensate

    async def _durably(
        self, execution: Execution, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> R:
        raw = self._encoded(execution, args, kwargs)
        declared = self.options_.undo
        if declared is not None:
            saga = current_saga.get()
            if saga is not None:
                saga.register(declared, args, kwargs, of=execution.next_ordinal)
        return await execution.issue(
            "step", self.name, self.service.name, args=raw, decode=self.params.result,
            detail=self.options_,
        )  # fmt: skip

    def _encoded(
        self, execution: Execution, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bytes:
        raw = self.params.encode(args, kwargs)
        if len(raw) > execution.payload_max_bytes:
            raise execution.too_large(raw, f"The arguments of {self} are")
        return raw

    def options(
        self,
        *,
        retry: Retry | None = None,
        timeout: Duration | None = None,
        heartbeat: Duration | None = None,
    ) -> Step[P, R]:
        """Return the same step with other options for the calls made through it."""
        if self.transaction and (timeout is not None or heartbeat is not None):
            raise BadDeclaration(
                f"{self} is a transaction, which cannot be stopped: it takes no timeout= and no "
                f"heartbeat=. Keep it short, and bound what it does by its SQL."
            )
        changed = StepOptions(
            retry=retry or self.options_.retry,
            timeout_s=self.options_.timeout_s if timeout is None else seconds(timeout),
            heartbeat_s=self.options_.heartbeat_s if heartbeat is None else seconds(heartbeat),
            undo=self.options_.undo,
            limit=self.options_.limit,
        )
        return Step(self.service, self.fn, self.name, changed, self.transaction)

    def __repr__(self) -> str:
        return f"{self.service.name}.{self.name}"


async def _plainly(fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    if current_handler.get() is not None and not inspect.iscoroutinefunction(fn):
        # As in a run: what may block belongs into a thread, not into the node's event loop.
        return await asyncio.to_thread(fn, *args, **kwargs)
    result = fn(*args, **kwargs)
    return await result if inspect.isawaitable(result) else result


class StepDecorator:
    """What `@service.step(…)` returns."""

    def __init__(self, service: Service, name: str | None, options: StepOptions) -> None:
        self._service = service
        self._name = name
        self._options = options

    @overload
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, R]]) -> Step[P, R]: ...
    @overload
    def __call__(self, fn: Callable[P, R]) -> Step[P, R]: ...
    def __call__(self, fn: Callable[P, Any]) -> Step[P, Any]:
        return self._service.add_step(fn, self._name, self._options)


class TransactionDecorator:
    """What `@service.transaction(…)` returns."""

    def __init__(self, service: Service, name: str | None, options: StepOptions) -> None:
        self._service = service
        self._name = name
        self._options = options

    @overload
    def __call__(self, fn: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]) -> Step[P, R]: ...
    @overload
    def __call__(self, fn: Callable[Concatenate[Any, P], R]) -> Step[P, R]: ...
    def __call__(self, fn: Callable[Concatenate[Any, P], Any]) -> Step[P, Any]:
        if not inspect.signature(fn).parameters:
            raise BadDeclaration(
                f"Transaction {getattr(fn, '__name__', fn)} must take a connection as its first "
                f"parameter; callers leave it out."
            )
        return self._service.add_step(fn, self._name, self._options, transaction=True)


class Service:
    """A named participant that owns steps, workflows and handlers."""

    def __init__(self, name: str) -> None:
        self.name = checked_name(name, "service")
        self.steps: dict[str, Step[..., Any]] = {}
        self.workflows: dict[tuple[str, int], Workflow[..., Any]] = {}
        self.handlers: dict[str, Handler] = {}

    @overload
    def step(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> Step[P, R]: ...
    @overload
    def step(self, fn: Callable[P, R], /) -> Step[P, R]: ...
    @overload
    def step(
        self,
        /,
        *,
        name: str | None = None,
        retry: Retry | None = None,
        timeout: Duration | None = None,
        heartbeat: Duration | None = None,
        undo: Callable[..., Awaitable[Any]] | None = None,
        limit: Limit | None = None,
    ) -> StepDecorator: ...
    def step(
        self,
        fn: Any = None,
        /,
        *,
        name: str | None = None,
        retry: Retry | None = None,
        timeout: Duration | None = None,
        heartbeat: Duration | None = None,
        undo: Callable[..., Awaitable[Any]] | None = None,
        limit: Limit | None = None,
    ) -> Any:
        """Declare a step: an ordinary function, async or not, that may do anything.

        It is executed at least once, its journalled result never again. Without `retry` a failure
        goes to the workflow at once. `timeout` bounds one attempt; with `heartbeat` an attempt that
        does not call `heartbeat()` that often is given up. `undo` is a step with the same
        parameters that a surrounding `saga()` calls, with the same arguments, if its block does not
        complete; it is registered before this step starts, so it must tolerate that nothing
        happened. `limit` bounds how many attempts are made at once, or within a time, in the whole
        cluster; see `Limit`.
        """
        _check_undo(undo)
        options = StepOptions(
            retry=retry,
            timeout_s=None if timeout is None else seconds(timeout),
            heartbeat_s=None if heartbeat is None else seconds(heartbeat),
            undo=undo,
            limit=limit,
        )
        if fn is None:
            return StepDecorator(self, name, options)
        return self.add_step(fn, name, options)

    @overload
    def transaction(
        self, fn: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]], /
    ) -> Step[P, R]: ...
    @overload
    def transaction(self, fn: Callable[Concatenate[Any, P], R], /) -> Step[P, R]: ...
    @overload
    def transaction(
        self,
        /,
        *,
        name: str | None = None,
        retry: Retry | None = None,
        undo: Callable[..., Awaitable[Any]] | None = None,
        limit: Limit | None = None,
    ) -> TransactionDecorator: ...
    def transaction(
        self,
        fn: Any = None,
        /,
        *,
        name: str | None = None,
        retry: Retry | None = None,
        undo: Callable[..., Awaitable[Any]] | None = None,
        limit: Limit | None = None,
    ) -> Any:
        """Declare a step that runs inside the store's own transaction.

        ```python
        @ledger.transaction
        def book(connection, account: str, cents: int) -> int:
            sql = "UPDATE accounts SET cents = cents + ? WHERE id = ?"
            connection.execute(sql, (cents, account))
        ```

        Its first parameter is a connection of the store's database, which callers leave out: on
        SQLite one of APSW, for a plain `def`; on Postgres one of asyncpg, for an `async def`. What
        it writes there and its result are one transaction: exactly once, whatever crashes. It
        should be short, since this node writes nothing else meanwhile; it must not commit, use the
        connection later, or do anything outside of the database: it is called again if its
        transaction cannot be written. A failure rolls back what it did and is retried, or goes to
        the workflow, as for `step`; `retry`, `undo` and `limit` mean the same as there.
        """
        _check_undo(undo)
        options = StepOptions(retry=retry, undo=undo, limit=limit)
        decorator = TransactionDecorator(self, name, options)
        return decorator if fn is None else decorator(fn)

    def on(
        self,
        *events: type[Any],
        name: str | None = None,
        retry: Retry | None = None,
        timeout: Duration | None = None,
        concurrency: int = 100,
        rate: str | float | None = None,
        where: Callable[[Any], bool] | None = None,
        state: type[Any] | None = None,
        since: Since = None,
        emits: list[type[Any]] | None = None,
        on_dead: Literal["continue", "stop"] = "continue",
        batch: int = 1,
        linger: Duration = 0,
        breaker: Breaker | None = BREAKER,
        transaction: bool = False,
        instead_of: Any = None,
        shadow: bool = False,
        share: float | None = None,
        limit: Limit | None = None,
    ) -> Callable[[F], F]:
        """Declare a handler: a function, async or not, that reacts to events of these types.

        ```python
        @mail.on(OrderShipped, retry=Retry(attempts=8), concurrency=20)
        async def thank(event: OrderShipped) -> MailSent | MailBounced: ...
        ```

        What it returns (an event, a list of them, or None) or publishes with `service.publish` is
        written in one commit with the mark that it handled the event: exactly once, whatever
        crashes. Events of one key are handled one at a time and in order, different keys at once,
        up to `concurrency`, and not faster than `rate` ("100/s"), each per node; `limit` bounds
        both in the whole cluster, see `Limit`.

        `retry`: a failing event is tried again by this schedule (five attempts by default), and
        holds back only its own key; then it becomes a dead letter, and its key goes on or, with
        `on_dead="stop"`, waits for a person. `breaker` pauses the handler while most events fail.
        `timeout` bounds one attempt.

        `where` skips events for which it is false. `state=Account` gives the function, as second
        parameter, what it keeps per key: made by `Account()` at first, saved with the commit.
        A new handler starts with events from now on, or `since="beginning"` or a time.
        With `batch=` it takes a list of up to so many events, waiting up to `linger` for more.
        With `transaction=True` its last parameter is a connection of the store's database, in whose
        transaction everything else is written too; see `Service.transaction`.

        `shadow=True` runs it on live events and records what it would have published, without
        publishing. `share=0.1` lets it take a stable tenth of the keys from the handler that it is
        declared `instead_of`. `emits` lists what it publishes, if the return annotation does not.
        """
        for event in events:
            if not is_event_type(event):
                raise BadDeclaration(f"on({event!r}) must be given event classes.")
        if not events:
            raise BadDeclaration(f"@{self.name}.on(…) must name at least one event class.")
        options = HandlerOptions(
            retry=retry or Retry(),
            timeout_s=None if timeout is None else seconds(timeout),
            concurrency=concurrency, rate_per_s=per_second(rate), where=where, state=state,
            since=since, on_dead=on_dead, batch=batch, linger_s=seconds(linger), breaker=breaker,
            transaction=transaction, shadow=shadow, share=share, limit=limit,
        )  # fmt: skip

        def declare(fn: F) -> F:
            chosen = checked_name(name or fn.__name__, "handler")
            replaced = self._replaced(chosen, events, instead_of, shadow, share)
            declared = None if emits is None else tuple(emits)
            handler = Handler(self, fn, chosen, events, options, declared, replaced)
            self.add_handler(handler)
            return fn

        return declare

    def _replaced(
        self, name: str, events: tuple[type[Any], ...], instead_of: Any, shadow: bool,
        share: float | None,
    ) -> Handler | None:  # fmt: skip
        """Return the current handler that a shadow or a share is compared with or takes from."""
        if not shadow and share is None:
            if instead_of is not None:
                raise BadDeclaration(
                    f"Handler {name!r} of service {self.name!r} says instead_of=, so it needs "
                    f"shadow=True or share=0.1 (a tenth of the keys)."
                )
            return None
        known = [h for h in self.handlers.values() if h.instead_of is None and h.starts is None]
        if instead_of is None:
            same = [h for h in known if set(h.events.values()) == set(events)]
        else:
            same = [h for h in known if h.fn is instead_of or h.name == instead_of]
        if len(same) == 1:
            return same[0]
        if not known:
            raise BadDeclaration(
                f"Handler {name!r} of service {self.name!r} is compared with another handler of "
                f"the service, or takes its share from it, but there is none yet. Declare that "
                f"first."
            )
        raise BadDeclaration(
            f"Handler {name!r} of service {self.name!r} must say which handler it is compared with "
            f"or takes its share from: instead_of=… one of {', '.join(h.name for h in known)}."
        )

    def add_handler(self, handler: Handler) -> None:
        if handler.name in self.handlers:
            raise BadDeclaration(
                f"Service {self.name!r} has a handler {handler.name!r} already. Give one another "
                f'name: @{self.name}.on(…, name="…").'
            )
        shares = [
            other.options.share or 0
            for other in [*self.handlers.values(), handler]
            if other.options.share is not None and other.instead_of is handler.instead_of
        ]
        if sum(shares) > 1:
            raise BadDeclaration(
                f"The handlers that take a share of {handler.instead_of!r} take {sum(shares):g} of "
                f"its keys together; that is more than all (1)."
            )
        self.handlers[handler.name] = handler

    def add_step(
        self,
        fn: Callable[..., Any],
        name: str | None,
        options: StepOptions,
        transaction: bool = False,
    ) -> Step[..., Any]:
        if not callable(fn):
            raise BadDeclaration(f"{fn!r} cannot be a step: it must be a function that returns.")
        check_returns(fn, "step")
        chosen = checked_name(name or getattr(fn, "__name__", ""), "step")
        if chosen in self.steps:
            raise BadDeclaration(
                f"Service {self.name!r} has a step {chosen!r} already. Give one another name: "
                f'@{self.name}.step(name="…").'
            )
        step: Step[..., Any] = Step(self, fn, chosen, options, transaction)
        undo: Step[..., Any] | None = options.undo
        if undo is not None and not undo.params.take_all_of(step.params):
            raise BadDeclaration(
                f"undo={undo} cannot undo {step}: it is called with the same arguments, but one "
                f"takes {undo.params} and the other {step.params}."
            )
        self.steps[chosen] = step
        return step

    @overload
    def workflow(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> Workflow[P, R]: ...
    @overload
    def workflow(
        self,
        /,
        *,
        name: str | None = None,
        version: int = 1,
        mode: Mode = "orchestration",
        receives: list[type[Any]] | None = None,
        starts_on: type[Any] | None = None,
        keep: Duration = "1d",
        timeout: Duration | None = None,
        limit: Limit | None = None,
    ) -> Callable[[Callable[P, Coroutine[Any, Any, R]]], Workflow[P, R]]: ...
    def workflow(
        self,
        fn: Any = None,
        /,
        *,
        name: str | None = None,
        version: int = 1,
        mode: Mode = "orchestration",
        receives: list[type[Any]] | None = None,
        starts_on: type[Any] | None = None,
        keep: Duration = "1d",
        timeout: Duration | None = None,
        limit: Limit | None = None,
    ) -> Any:
        """Declare a workflow: a deterministic `async` function that describes a process.

        `mode` is how its runs are driven unless a start says otherwise. `receives` lists the event
        types that it waits for; published ones are kept for as long as `keep`, for runs that wait
        for them later. Each event of type `starts_on` starts a run of the newest version, once,
        with the event as its argument, by the id "<event's id>.<workflow's name>". A run goes on
        with the `version` it started with; keep old versions declared until their runs have ended.
        `timeout` bounds a whole run. Under a `limit` a run waits, before its code begins, until it
        may, and counts until it has ended, also while it waits for something or is stuck.
        """

        def declare(function: Callable[..., Any]) -> Workflow[..., Any]:
            from pavane.workflow import Workflow

            check_returns(function, "workflow")
            if not inspect.iscoroutinefunction(function):
                raise BadDeclaration(
                    f"{getattr(function, '__name__', function)} cannot be a workflow: write it as "
                    f"`async def`."
                )
            if mode not in ("orchestration", "choreography"):
                raise BadDeclaration(
                    f"mode={mode!r} is unknown. Write 'orchestration' or 'choreography'."
                )
            if isinstance(receives, type):
                raise BadDeclaration(
                    f"receives= takes a list of event classes: receives=[{receives.__name__}]."
                )
            chosen = checked_name(name or function.__name__, "workflow")
            if (chosen, version) in self.workflows:
                raise BadDeclaration(
                    f"Service {self.name!r} has a workflow {chosen!r} of version {version} "
                    f"already. Give this one another name= or version=."
                )
            workflow: Workflow[..., Any] = Workflow(
                self, function, chosen, version, mode, tuple(receives or ()),
                None if timeout is None else seconds(timeout), seconds(keep), limit,
            )  # fmt: skip
            self.workflows[chosen, version] = workflow
            if starts_on is not None:
                workflow.start_on(starts_on)
            return workflow

        return declare if fn is None else declare(fn)

    async def publish(self, event: Any) -> str:
        """Publish `event` from a workflow or handler, with its next commit; return its id.

        The id is derived from the run and the operation, or from the event that is handled: a
        replay or another attempt publishes nothing twice. Raises BadArguments for what is no event,
        and for one whose values are not of the types that its class declares.
        """
        if not is_event(event):
            raise BadArguments(
                f"{event!r} is no event. Derive its class from pavane.Event, or use @event."
            )
        handling = current_handler.get()
        if handling is not None:
            return handling.publish(event, self.name)
        execution = required(f"{self.name}.publish(…)")
        kind = class_of(event)
        raw = execution.checked(encode_fitting(event), f"Event {kind.event_type} is")
        key_of(event)  # what can be no key is refused here, where it is given
        operation = execution.announce(
            "publish", kind.event_type, self.name, args=raw, detail=event
        )
        return f"{execution.header.run}#{operation.ordinal}"

    def __repr__(self) -> str:
        return f"Service({self.name!r})"


def _check_undo(undo: object) -> None:
    if undo is not None and not isinstance(undo, Step):
        raise BadDeclaration(f"undo={undo!r} must be a step: decorate it with @service.step.")


# -- inside a running step ---------------------------------------------------------------------


class StepInfo(msgspec.Struct, frozen=True):
    """What a running step can know of itself.

    `idempotency_key` is the same on every attempt: give it to payment providers and the like.
    `attempt` counts from 1. `heartbeat_details` is what the last attempt reported, or None.
    """

    run: str
    service: str
    step: str
    attempt: int
    idempotency_key: str
    deadline: datetime | None
    heartbeat_details: Any


class StepContext(Protocol):
    """The engine's side of a running attempt."""

    def info(self) -> StepInfo: ...
    def beat(self, details: Any) -> None: ...
    def origin(self, content: str) -> Origin: ...


current_step: ContextVar[StepContext | None] = ContextVar("pavane_step", default=None)


def step_info() -> StepInfo:
    """Return what the running step can know of itself; outside a run, a first attempt.

    A step that a handler calls is just a function: its attempt and idempotency key are then those
    of the handler, see `delivery()`. They are the same for all steps that the handler calls.
    """
    context = current_step.get()
    if context is None:
        if current() is not None:
            raise OnlyInWorkflow("step_info() belongs into a step, not into workflow code.")
        handling = current_handler.get()
        if handling is not None:
            event = handling.delivery()
            return StepInfo("", "", "", event.attempt, event.idempotency_key, None, None)
        return StepInfo("", "", "", 1, "outside-a-run", None, None)
    return context.info()


def heartbeat(details: Any = None) -> None:
    """Report that the running step is alive; its next attempt finds `details`.

    Outside a run it does nothing; in workflow code it raises OnlyInWorkflow.
    """
    context = current_step.get()
    if context is not None:
        context.beat(details)
    elif current() is not None:
        raise OnlyInWorkflow("heartbeat() belongs into a step, not into workflow code.")


def deadline_from(timeout_s: float | None, now_s: float) -> datetime | None:
    return None if timeout_s is None else datetime.fromtimestamp(now_s + timeout_s, UTC)
