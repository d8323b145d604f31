"""Handlers: functions of a service that react to events."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable
from contextvars import ContextVar
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, Protocol, Union

import msgspec

from pavane.core.codec import decoder, resolve_hints
from pavane.errors import BadDeclaration, OnlyInHandler
from pavane.event import is_event_type, is_frozen, takes
from pavane.policy import Duration, Limit, Retry, seconds

if TYPE_CHECKING:
    from pavane.service import Service
    from pavane.workflow import Workflow

_RATE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*/\s*(.+?)\s*")
BEGINNING = "beginning"
Since = datetime | Literal["beginning"] | None
_IMMUTABLE = (int, float, complex, Decimal, str, bytes, tuple, frozenset, types.NoneType)


class Breaker(msgspec.Struct, frozen=True):
    """When a handler is paused because most of its events fail.

    It opens when, of the last `window` attempts, at least the share `failures` failed; after
    `pause` one event is tried, and only if that succeeds the handler goes on. Each failed trial
    doubles the pause, up to `most`.
    """

    window: int = 20
    failures: float = 0.8
    pause: Duration = "5s"
    most: Duration = "5m"

    def __post_init__(self) -> None:
        if self.window < 1 or not 0 < self.failures <= 1:
            raise BadDeclaration(
                f"{self!r}: window must be at least 1, failures above 0 and at most 1."
            )
        for duration in (self.pause, self.most):
            seconds(duration)


BREAKER = Breaker()


OF_BOTH = {
    "retry": "retry", "concurrency": "concurrency", "rate_per_s": "rate", "since": "since",
    "on_dead": "on_dead", "batch": "batch", "linger_s": "linger", "breaker": "breaker",
    "limit": "limit",
}  # fmt: skip
"""Options of a handler that the ones which take a share of its keys have in common with it, by the
names that they are declared by: what they are about is not decided event by event."""


class HandlerOptions(msgspec.Struct, frozen=True):
    """The declared behaviour of a handler. Times are seconds here; None means none."""

    retry: Retry = Retry()
    timeout_s: float | None = None
    concurrency: int = 100
    rate_per_s: float | None = None
    where: Callable[[Any], bool] | None = None
    state: type[Any] | None = None
    since: Since = None
    on_dead: Literal["continue", "stop"] = "continue"
    batch: int = 1
    linger_s: float = 0.0
    breaker: Breaker | None = BREAKER
    transaction: bool = False
    shadow: bool = False
    share: float | None = None
    limit: Limit | None = None


class Handler:
    """A function of a service that reacts to events; called directly it is just the function."""

    def __init__(
        self,
        service: Service,
        fn: Callable[..., Any],
        name: str,
        events: tuple[type[Any], ...],
        options: HandlerOptions,
        emits: tuple[type[Any], ...] | None,
        instead_of: Handler | None = None,
        starts: Workflow[..., Any] | None = None,
    ) -> None:
        self.service = service
        self.fn = fn
        self.name = name
        self.events = {event.event_type: event for event in events}
        self.options = options
        self.instead_of = instead_of
        self.starts = starts
        check_returns(fn, f"handler {self!r}")
        self.is_async = inspect.iscoroutinefunction(fn)
        hints, _ = resolve_hints(fn)
        first = next(iter(inspect.signature(fn).parameters), "")
        self.takes_list = typing.get_origin(hints.get(first)) is list
        self.emits = emits
        if emits is None and hints.get("return", Any) is not Any:
            self.emits = emitted(hints["return"], f"{self!r}")
        self.limit_name = "" if options.limit is None else options.limit.name or name
        self._check(fn)
        self._check_annotation(first, hints.get(first))
        self._check_state()
        self.state_decoder = None if options.state is None else decoder(options.state)
        self.__name__ = name
        self.__doc__ = fn.__doc__
        self.__wrapped__ = fn

    def read_state(self, raw: bytes | None) -> Any:
        """Return the state that is stored for a key, or a new one; None if it keeps none."""
        if self.state_decoder is None or self.options.state is None:
            return None
        return self.options.state() if raw is None else self.state_decoder(raw)

    def _check(self, fn: Callable[..., Any]) -> None:
        options = self.options
        given = ["event"]
        given += ["state"] if options.state is not None else []
        given += ["connection"] if options.transaction else []
        takes = list(inspect.signature(fn).parameters.values())
        if len(takes) != len(given):
            raise BadDeclaration(
                f"Handler {self!r} must take {len(given)} parameter{'s'[: len(given) > 1]} "
                f"({', '.join(given)}); it takes {len(takes)}: {inspect.signature(fn)}."
            )
        if options.batch > 1 and not self.takes_list:
            raise BadDeclaration(
                f"Handler {self!r} has batch={options.batch}, so its first parameter must be "
                f"annotated as a list of events."
            )
        if options.state is not None and self.takes_list:
            raise BadDeclaration(f"Handler {self!r} cannot have both state= and a batch of events.")
        if options.transaction and options.timeout_s is not None:
            raise BadDeclaration(
                f"Handler {self!r} cannot have both timeout= and transaction=True: what runs "
                f"inside the store's transaction cannot be stopped."
            )
        if options.concurrency < 1 or options.batch < 1:
            raise BadDeclaration(f"concurrency= and batch= of {self!r} must be at least 1.")
        if options.on_dead not in ("continue", "stop"):
            raise BadDeclaration(
                f"on_dead={options.on_dead!r} of {self!r} is unknown. Write 'continue' or 'stop'."
            )
        since: Any = options.since
        if since not in (None, BEGINNING) and not isinstance(since, datetime):
            raise BadDeclaration(
                f"since={options.since!r} of {self!r} is no place in the log. Write 'beginning' or "
                f"a datetime, or leave it out to begin with events from now on."
            )
        self._check_variant()

    def _check_annotation(self, name: str, hint: object) -> None:
        given = next(iter(typing.get_args(hint)), None) if self.takes_list else hint
        for event in self.events.values():
            if not takes(given, event):
                raise BadDeclaration(
                    f"Handler {self!r} handles {_spelled(event)}, but its parameter {name!r} is "
                    f"annotated as {_spelled(hint)}. Annotate it as what it is given, or handle "
                    f"what it is annotated as."
                )

    def _check_state(self) -> None:
        kind = self.options.state
        if kind is None:
            return
        name = kind.__name__
        try:
            new = kind()
        except Exception as error:
            raise BadDeclaration(
                f"Handler {self!r} has state={name}, but {name}(), which makes the state of a new "
                f"key, fails: {error}. Give its fields defaults."
            ) from error
        if isinstance(new, _IMMUTABLE) or _is_value(new):
            raise BadDeclaration(
                f"Handler {self!r} has state={name}, which cannot be changed, so nothing would "
                f"ever be kept. Use what can, such as a dataclass with a field."
            )

    def _check_variant(self) -> None:
        share, main = self.options.share, self.instead_of
        if self.options.shadow and (self.options.transaction or share is not None):
            raise BadDeclaration(
                f"Handler {self!r} is a shadow, which must not change anything: leave out "
                f"{'share=' if share is not None else 'transaction='}."
            )
        if share is None:
            return
        if not 0 < share <= 1:
            raise BadDeclaration(f"share={share} of {self!r} must be above 0, at most 1.")
        if main is not None and (
            set(self.events.values()) != set(main.events.values())
            or self.takes_list != main.takes_list
        ):
            what = "a list of " if main.takes_list else ""
            raise BadDeclaration(
                f"Handler {self!r} takes a share of the keys of {main!r}, so it must take the "
                f"same: {what}{', '.join(main.events)}."
            )
        default = HandlerOptions()
        for name, option in OF_BOTH.items():
            own = getattr(self.options, name)
            if main is not None and own not in (
                getattr(default, name), getattr(main.options, name)
            ):  # fmt: skip
                raise BadDeclaration(
                    f"Handler {self!r} takes a share of the keys of {main!r} and follows it in "
                    f"{option}=, so declare that there."
                )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)

    @property
    def state_name(self) -> str:
        """Under which name its keyed state is kept; a shadow has one of its own."""
        assert self.options.state is not None
        name = self.options.state.__name__
        return f"{name}~{self.name}" if self.options.shadow else name

    def __repr__(self) -> str:
        return f"{self.service.name}.{self.name}"


def check_returns(fn: Callable[..., Any], what: str) -> None:
    """Raise BadDeclaration for a generator: called, it would run no line of its code."""
    if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
        raise BadDeclaration(
            f"{getattr(fn, '__name__', fn)} cannot be a {what}: it has a `yield`, and must be a "
            f"function that returns. Return what it yields, as a list."
        )


def _is_value(instance: object) -> bool:
    """Tell whether neither an instance nor what it holds can be changed."""
    if not is_frozen(type(instance)):
        return False
    try:
        hash(instance)
    except TypeError:
        return False
    return True


def _spelled(annotation: object) -> str:
    if isinstance(annotation, type):
        return f"{annotation.__module__}.{annotation.__qualname__}"
    return str(annotation)


def emitted(returns: object, what: str) -> tuple[type[Any], ...]:
    """Return the event types that a return annotation declares: `A | B | None` or `list[A]`."""
    if returns in (None, type(None), Any, inspect.Parameter.empty):
        return ()
    if typing.get_origin(returns) in (list, tuple):
        inner = [arg for arg in typing.get_args(returns) if arg is not Ellipsis]
        return tuple(dict.fromkeys(kind for arg in inner for kind in emitted(arg, what)))
    if typing.get_origin(returns) in (Union, types.UnionType):
        parts = typing.get_args(returns)
        return tuple(dict.fromkeys(kind for part in parts for kind in emitted(part, what)))
    if is_event_type(returns):
        return (typing.cast("type[Any]", returns),)
    raise BadDeclaration(
        f"Handler {what} returns {returns!r}, which is no event. Return an event, a list of events "
        f"or None, and annotate it so."
    )


def per_second(rate: str | float | None) -> float | None:
    """Return a rate such as "100/s", "50/m" or a number a second, per second."""
    if rate is None or isinstance(rate, (int, float)):
        value = rate
    else:
        found = _RATE.fullmatch(rate)
        if found is None:
            raise BadDeclaration(f'{rate!r} is no rate. Write "100/s", "50/m", "10/5s".')
        every = found[2] if found[2][0].isdigit() else f"1{found[2]}"
        value = float(found[1]) / (seconds(every) or 1)
    if value is not None and value <= 0:
        raise BadDeclaration(f"{rate!r} is no rate: it must be above 0.")
    return value


# -- inside a running handler ------------------------------------------------------------------


class Delivery(msgspec.Struct, frozen=True):
    """What a running handler can know of the event that it handles (of a batch, the first one).

    `idempotency_key` is the same on every attempt. `attempt` counts from 1.
    """

    id: str
    type: str
    key: str
    source: str
    time: datetime
    conversation: str
    cause: str
    attempt: int
    idempotency_key: str


class Origin(msgspec.Struct, frozen=True):
    """What an event inherits from the step or handler that publishes it through a connection.

    `id` is the same whenever an attempt publishes the same again.
    """

    id: str
    source: str
    conversation: str
    cause: str
    trace: str
    payload_max_bytes: int


class HandlerContext(Protocol):
    """The engine's side of a running handler; `registry` holds the names of its app."""

    @property
    def registry(self) -> object: ...
    def origin(self, content: str) -> Origin: ...

    def delivery(self) -> Delivery: ...
    def publish(self, event: Any, source: str) -> str: ...
    def start(self, workflow: Any, args: bytes, id: str | None) -> str: ...
    def send(self, workflow: Any, run: str, event: Any) -> None: ...
    def delete_state(self) -> None: ...


current_handler: ContextVar[HandlerContext | None] = ContextVar("pavane_handler", default=None)


def delivery() -> Delivery:
    """Return what the running handler can know of the event that it handles."""
    return _running("delivery()").delivery()


def delete_state() -> None:
    """Delete the keyed state of the running handler, with its commit, whatever it changes in it.

    The next event of the key finds a new one. Raises OnlyInHandler outside of a handler that has
    `state=`.
    """
    _running("delete_state()").delete_state()


def _running(what: str) -> HandlerContext:
    context = current_handler.get()
    if context is None:
        raise OnlyInHandler(f"{what} works only inside a handler that Pavane calls.")
    return context
