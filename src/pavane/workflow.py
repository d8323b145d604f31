"""Workflows, and what may be called inside them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from contextvars import Token
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, NoReturn, ParamSpec, TypeVar
from uuid import UUID

from pavane.core.codec import Params, decoder
from pavane.core.execution import Execution, current, required, section_mode
from pavane.core.operations import Mode
from pavane.errors import (
    BadArguments,
    BadDeclaration,
    ContinueAsNew,
    OnlyInWorkflow,
    UndeclaredReceive,
)
from pavane.event import class_of, is_event, is_event_type, takes
from pavane.handler import Handler, HandlerOptions, current_handler
from pavane.key import key_text
from pavane.policy import Limit

if TYPE_CHECKING:
    from pavane.service import Service

P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E")

Attribute = str | int | float | bool

STARTER = "start-"
"""What names of the handlers that start runs begin with."""
KEEPER = "~schedule:"
"""What names of the workflows that keep schedules, and ids of their runs, begin with."""


class Workflow(Generic[P, R]):
    """A process as an `async` function. Called inside another workflow it is a child run, awaited;
    outside of a run it is just the function."""

    def __init__(
        self,
        service: Service,
        fn: Callable[P, Coroutine[Any, Any, R]],
        name: str,
        version: int,
        mode: Mode,
        receives: tuple[type[Any], ...],
        timeout_s: float | None,
        keep_s: float = 86400.0,
        limit: Limit | None = None,
    ) -> None:
        for event in receives:
            if not is_event_type(event):
                raise BadDeclaration(f"receives=[{event!r}] must list Event classes.")
        self.service = service
        self.fn = fn
        self.name = name
        self.version = version
        self.mode: Mode = mode
        self.receives = receives
        self.timeout_s = timeout_s
        self.keep_s = keep_s
        self.limit = limit
        self.limit_name = "" if limit is None else limit.name or f"{name}-runs"
        self.params = Params.of(fn)
        _ = self.params.result  # a return type that cannot be stored is refused here
        self.__name__ = name
        self.__doc__ = fn.__doc__
        self.__wrapped__ = fn

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        execution = current()
        if execution is None:
            return self.fn(*args, **kwargs)
        return self._child(execution, args, kwargs)

    async def _child(
        self, execution: Execution, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> R:
        raw = execution.checked(self.params.encode(args, kwargs), f"The arguments of {self} are")
        return await execution.issue(
            "child", self.name, self.service.name, args=raw, decode=self.params.result, detail=self
        )

    def start_on(self, event_type: type[Any]) -> None:
        """Start a run for each event of this type; see `Service.workflow`.

        Its id is the event's and the workflow's name, since others may start on the same event.
        """
        if not is_event_type(event_type):
            raise BadDeclaration(f"starts_on={event_type!r} must be an event class.")
        self._check_takes(event_type)

        async def begin(event: Any) -> None:
            raw = self.params.check((event,), {})
            handling = current_handler.get()
            assert handling is not None
            id = handling.delivery().id
            # An event that a run published has an id that begins like those of the run's messages.
            handling.start(self, raw, None if "#" in id else f"{id}.{self.name}")

        name = f"{STARTER}{self.name}"
        known = self.service.handlers.get(name)
        if known is not None and known.starts is not None and known.starts.name == self.name:
            if known.starts.version > self.version:
                return  # kept for its runs only: events start the newest version
            del self.service.handlers[name]
        handler = Handler(
            self.service, begin, name, (event_type,), HandlerOptions(), (), starts=self
        )
        self.service.add_handler(handler)

    def _check_takes(self, event_type: type[Any]) -> None:
        """Raise BadDeclaration unless the workflow can be called with such an event alone."""
        name = event_type.__name__
        signature = inspect.signature(self.fn).replace(return_annotation=inspect.Signature.empty)
        try:
            signature.bind(None)
        except TypeError:
            raise BadDeclaration(
                f"Workflow {self!r} starts on {name}, so it is given that event and nothing else; "
                f"it takes {signature}. Let it take the event first, and give what follows "
                f"defaults."
            ) from None
        if not takes(self.params.annotations[0], event_type):
            raise BadDeclaration(
                f"Workflow {self!r} starts on {name}, but its first parameter is annotated as "
                f"another event: {signature}. Annotate it as {name}, or start on what it says."
            )

    async def start(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """Start a run from workflow code or a handler and leave it to itself; return its id.

        In a workflow it is a child run. In a handler it is started with the handler's commit, and
        its id is derived from the event.
        """
        handling = current_handler.get()
        if handling is not None:
            return handling.start(self, self.params.check(args, kwargs), None)
        execution = required(f"{self.name}.start(…)")
        raw = execution.checked(self.params.encode(args, kwargs), f"The arguments of {self} are")
        operation = execution.announce("spawn", self.name, self.service.name, args=raw, detail=self)
        return child_id(execution.header.run, operation.ordinal)

    async def send(self, run: str, event: Any) -> None:
        """Send `event` from a handler to the mailbox of a run of this workflow, with its commit."""
        handling = current_handler.get()
        if handling is None:
            raise OnlyInWorkflow(
                f"{self.name}.send(…) works only inside a handler. Elsewhere use "
                f"`await app.get(id).send(event)`."
            )
        self.check_receives(event)
        handling.send(self, run, event)

    def check_receives(self, event: Any) -> None:
        """Raise BadArguments for what this workflow does not declare to receive."""
        if not is_event(event):
            raise BadArguments(f"{event!r} is no event. Derive its class from pavane.Event.")
        name: str = class_of(event).event_type
        if all(known.event_type != name for known in self.receives):
            listed = ", ".join(e.event_type for e in self.receives) or "no events"
            raise BadArguments(
                f"Workflow {self.name!r} does not receive {name}; it receives: {listed}. Declare "
                f"it with receives=[{name}]."
            )

    def __repr__(self) -> str:
        return f"{self.service.name}.{self.name}"


def child_id(run: str, ordinal: int) -> str:
    """Return the id of the child run that operation `ordinal` of `run` starts."""
    return f"{run}/{ordinal}"


async def receive(event_type: type[E], *, key: str | int | None = None) -> E:
    """Await an event of this type: one that is sent to this run or, with `key`, a published one.

    What comes early waits: in the run's mailbox, or, with `key`, for as long as the workflow's
    `keep` says. Published events of a key are received in order, each once per run.
    """
    execution = required("receive(…)")
    declared: tuple[type[Any], ...] = getattr(execution.definition, "receives", ())
    if event_type not in declared:
        name = getattr(event_type, "__name__", repr(event_type))
        raise UndeclaredReceive(
            f"Workflow {execution.header.workflow!r} waits for {name} without declaring it, so an "
            f"event that comes early could not be kept. Write "
            f"@service.workflow(receives=[{name}])."
        )
    described: Any = event_type
    name, detail = described.event_type, None
    if key is not None:
        if described.event_key is None:
            raise BadArguments(
                f"{name} has no key, so no run can wait for one of key {key!r}. Write "
                f'class {name}(Event, key="…").'
            )
        if str(key) == "":
            raise BadArguments(
                f"A run cannot wait for {name} of an empty key: an event with an empty key counts "
                f"as one without."
            )
        detail = (name, key_text(key, f"receive({name}, …)"))
        name = f"{name} of {key}"
    return await execution.issue(
        "receive", name, execution.header.home, decode=decoder(event_type), detail=detail
    )


def now() -> datetime:
    """Return the time of the last delivery to this run, in UTC; the same on every replay."""
    return required("now()").now()


def scheduled_time() -> datetime | None:
    """Return the nominal time, in UTC, for which a schedule started this run; None if none did."""
    at_us = required("scheduled_time()").header.scheduled_us
    return datetime.fromtimestamp(at_us / 1e6, UTC) if at_us else None


def random() -> float:
    """Return a number from 0 to 1, the same on every replay."""
    return required("random()").random()


def uuid4() -> UUID:
    """Return a random id, the same on every replay."""
    return required("uuid4()").uuid4()


def patched(mark: str) -> bool:
    """Tell whether this run takes the new way at a change called `mark`.

    True for runs that reach this call for the first time live, False for runs that passed here
    before the change was made.
    """
    return required("patched(…)").patched(mark)


def run_id() -> str:
    """Return the id of the running workflow's run."""
    return required("run_id()").header.run


def set_attributes(**attributes: Attribute) -> None:
    """Set searchable attributes of this run (`pavane runs list --where name=value`)."""
    execution = required("set_attributes(…)")
    for name, value in attributes.items():
        if not isinstance(value, (str, int, float, bool)):  # pyright: ignore
            raise BadArguments(f"Attribute {name}={value!r} must be text, a number or a bool.")
    execution.announce(
        "attributes", ",".join(sorted(attributes)), "", detail=attributes,
        args=execution.encoded(attributes, "The attributes are"),
    )  # fmt: skip


def continue_as_new(*args: Any, **kwargs: Any) -> NoReturn:
    """End this run and continue it as a new one with these arguments and a fresh journal."""
    required("continue_as_new(…)")
    raise ContinueAsNew(args, kwargs)


class Section:
    """An `async with` block whose operations are driven in one mode."""

    def __init__(self, mode: Mode) -> None:
        self._mode: Mode = mode
        self._token: Token[Mode | None] | None = None

    async def __aenter__(self) -> None:
        required(f"a section in {self._mode}")
        self._token = section_mode.set(self._mode)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._token is not None and not isinstance(error, GeneratorExit):
            section_mode.reset(self._token)


def orchestrated() -> Section:
    """Drive the block's operations from where the baton is, whatever the run's mode."""
    return Section("orchestration")


def choreographed() -> Section:
    """Pass the baton in this block, whatever the run's mode."""
    return Section("choreography")
