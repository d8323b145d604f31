"""Events: typed, immutable facts, known by name."""

from __future__ import annotations

import sys
import typing
from collections.abc import Callable
from types import ModuleType, NoneType, UnionType
from typing import Any, ClassVar, TypeVar, Union, cast, overload

import msgspec
from msgspec import UNSET, UnsetType

from pavane.errors import BadDeclaration, UnknownName
from pavane.key import key_text
from pavane.policy import Duration, seconds

Upcast = Callable[[dict[str, Any]], dict[str, Any]]
C = TypeVar("C", bound=type)
U = TypeVar("U", bound=Callable[[dict[str, Any]], dict[str, Any]])

_StructMeta = type(msgspec.Struct)


def _describe(
    cls: Any,
    fields: tuple[str, ...],
    key: str | UnsetType | None,
    version: int,
    type_name: str | None,
    ttl: Duration | UnsetType | None,
) -> None:
    name = type_name or cls.__name__
    if isinstance(key, UnsetType):
        key = getattr(cls, "event_key", None)
    if key is not None and key not in fields:
        raise BadDeclaration(
            f"Event {cls.__name__} has key={key!r}, which is not one of its fields "
            f"({', '.join(fields) or 'it has none'})."
        )
    if not name.replace(".", "_").replace("-", "_").isidentifier():
        raise BadDeclaration(
            f"{name!r} is no name for an event: use letters, digits, '_', '-' and '.'."
        )
    if version < 1:
        raise BadDeclaration(f"Event {name} has version={version}; versions count from 1.")
    cls.event_key = key
    cls.event_version = version
    cls.event_type = name
    if not isinstance(ttl, UnsetType):
        cls.event_ttl_s = None if ttl is None else seconds(ttl)
    elif not hasattr(cls, "event_ttl_s"):
        cls.event_ttl_s = None
    cls.event_upcasts = {}
    cls.event_frozen = is_frozen(cls)


def is_frozen(cls: Any) -> bool:
    """Tell whether instances cannot be changed, so that several handlers may be given one."""
    if isinstance(cls, _StructMeta):
        return cast("Any", cls).__struct_config__.frozen
    if hasattr(cls, "__dataclass_params__"):
        return cls.__dataclass_params__.frozen
    return bool(getattr(cls, "model_config", {}).get("frozen"))


def _upcast(cls: Any, version: int) -> Callable[[U], U]:
    if not 1 <= version < cls.event_version:
        raise BadDeclaration(
            f"{cls.event_type}.upcast({version}) must name an older version than "
            f"{cls.event_version}, which the class has now."
        )

    def declare(fn: U) -> U:
        if version in cls.event_upcasts:
            raise BadDeclaration(f"{cls.event_type}.upcast({version}) is declared twice.")
        cls.event_upcasts[version] = fn
        return fn

    return declare


class EventMeta(_StructMeta):
    """Takes `key=`, `version=`, `type_name=` and `ttl=` off the class statement of an event."""

    def __new__(
        mcls,
        name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        *,
        key: str | UnsetType | None = UNSET,
        version: int = 1,
        type_name: str | None = None,
        ttl: Duration | UnsetType | None = UNSET,
        **options: Any,
    ) -> Any:
        options.setdefault("frozen", True)
        options.setdefault("kw_only", True)
        cls: Any = super().__new__(mcls, name, bases, namespace, **options)
        _describe(cls, cls.__struct_fields__, key, version, type_name, ttl)
        return cls


class Event(msgspec.Struct, metaclass=EventMeta):
    """A fact that happened, published to whoever listens.

    ```python
    class OrderPlaced(Event, key="order_id", version=2):
        order_id: str
        cents: int

    @OrderPlaced.upcast(1)
    def _(old: dict) -> dict:              # what version 1 said, in the words of version 2
        return {"order_id": old["order_id"], "cents": old["euros"] * 100}
    ```

    `key` names the field that orders events and routes them: those of one key are handled in order.
    `version` counts incompatible changes; old ones are read through their upcasts, one version at
    a time. With `ttl` an event that is older when its turn comes is not handled any more.
    `type_name` is its name in the log, the class's name by default. A subclass is an event of its
    own, with a name and version of its own; it inherits `key` and `ttl`, and None undoes either.
    """

    event_key: ClassVar[str | None]
    event_version: ClassVar[int]
    event_type: ClassVar[str]
    event_ttl_s: ClassVar[float | None]
    event_upcasts: ClassVar[dict[int, Upcast]]
    event_frozen: ClassVar[bool]

    @classmethod
    def upcast(cls, version: int) -> Callable[[U], U]:
        """Declare how data of `version` reads as the next version."""
        return _upcast(cls, version)


@overload
def event(cls: C, /) -> C: ...
@overload
def event(
    *,
    key: str | UnsetType | None = UNSET,
    version: int = 1,
    type_name: str | None = None,
    ttl: Duration | UnsetType | None = UNSET,
) -> Callable[[C], C]: ...
def event(
    cls: Any = None,
    /,
    *,
    key: str | UnsetType | None = UNSET,
    version: int = 1,
    type_name: str | None = None,
    ttl: Duration | UnsetType | None = UNSET,
) -> Any:
    """Make an event of a dataclass or pydantic model; see `Event` for what the options mean."""

    def declare(cls: C) -> C:
        fields = (
            getattr(cls, "model_fields", None)
            or getattr(cls, "__dataclass_fields__", None)
            or getattr(cls, "__struct_fields__", None)
        )
        if fields is None:
            raise BadDeclaration(
                f"@event is for dataclasses and pydantic models; {cls!r} is neither. Put "
                f"@event above @dataclass, or derive the class from pavane.Event."
            )
        _describe(cls, tuple(fields), key, version, type_name, ttl)
        described: Any = cls
        described.upcast = staticmethod(lambda version: _upcast(cls, version))  # pyright: ignore
        return cls

    return declare if cls is None else declare(cls)


class _Module(ModuleType):
    """Importing this module sets `pavane.event` to it, where `from pavane import event` looks."""

    def __call__(self, *cls: Any, **options: Any) -> Any:
        return event(*cls, **options)


sys.modules[__name__].__class__ = _Module


def is_event_type(cls: object) -> bool:
    return isinstance(cls, type) and "event_type" in cls.__dict__ and cls is not Event


def is_event(value: object) -> bool:
    return is_event_type(type(value))


def takes(annotation: object, event_type: type[Any]) -> bool:
    """Tell whether what is annotated so may be given such events: not if it names others only."""
    is_union = typing.get_origin(annotation) in (Union, UnionType)
    parts = typing.get_args(annotation) if is_union else (annotation,)
    return any(
        not is_event_type(part) or issubclass(event_type, cast("type[Any]", part))
        for part in parts
        if part is not NoneType
    )


def class_of(event: object) -> Any:
    """Return the class of an event, whose attributes describe it."""
    return type(event)


def places_of(one: type[Any], other: type[Any]) -> str:
    """Tell where two classes are defined, so that a person finds both."""
    places = [f"{cls.__module__}.{cls.__qualname__}" for cls in (one, other)]
    if places[0] != places[1]:
        return " and ".join(places)
    lines = " and ".join(map(str, _lines_of(one)))
    return f"{places[0]}, which is defined twice{lines and f' (at lines {lines})'}"


def _lines_of(cls: type[Any]) -> list[int]:
    """Return the lines at which the module of a class defines classes of its name, if it can."""
    import ast
    import inspect

    try:
        tree = ast.parse(inspect.getsource(sys.modules[cls.__module__]))
    except (KeyError, OSError, TypeError, SyntaxError):
        return []
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return sorted(node.lineno for node in classes if node.name == cls.__name__)


def key_of(event: Any) -> str:
    """Return the ordering key of `event` as text; empty when its class declares none, or it is
    None: such an event is in no order with others. Raise BadArguments for what can be no key."""
    described = class_of(event)
    name: str | None = described.event_key
    key = None if name is None else getattr(event, name)
    return "" if key is None else key_text(key, f"Event {described.event_type}")


def type_for(name: str, known: dict[str, type[Any]]) -> type[Any]:
    """Return the event class called `name`, or raise UnknownName."""
    if name not in known:
        raise UnknownName(f"No event type is called {name!r}. Known: {', '.join(known) or 'none'}.")
    return known[name]
