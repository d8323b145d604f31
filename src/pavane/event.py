"""Events: typed, immutable facts, known by name."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from pavane.errors import BadDeclaration, UnknownName

_StructMeta = type(msgspec.Struct)


class EventMeta(_StructMeta):
    """Takes `key=`, `version=` and `name=` off the class statement of an event."""

    def __new__(
        mcls,
        name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        *,
        key: str | None = None,
        version: int = 1,
        type_name: str | None = None,
        **options: Any,
    ) -> Any:
        options.setdefault("frozen", True)
        options.setdefault("kw_only", True)
        cls: Any = super().__new__(mcls, name, bases, namespace, **options)
        fields: tuple[str, ...] = cls.__struct_fields__
        if key is not None and key not in fields:
            raise BadDeclaration(
                f"Event {name} has key={key!r}, which is not one of its fields "
                f"({', '.join(fields) or 'it has none'})."
            )
        cls.event_key = key
        cls.event_version = version
        cls.event_type = type_name or name
        return cls


class Event(msgspec.Struct, metaclass=EventMeta):
    """A fact that happened, published to whoever listens.

    ```python
    class OrderPlaced(Event, key="order_id"):
        order_id: str
        cents: int
    ```

    `key` names the field that orders events and routes them; `version` counts incompatible changes.
    """

    event_key: ClassVar[str | None]
    event_version: ClassVar[int]
    event_type: ClassVar[str]


def is_event_type(cls: object) -> bool:
    return isinstance(cls, type) and issubclass(cls, Event)


def key_of(event: Event) -> str:
    """Return the ordering key of `event` as text; empty when its class declares none."""
    name = type(event).event_key
    return "" if name is None else str(getattr(event, name))


def type_for(name: str, known: dict[str, type[Event]]) -> type[Event]:
    """Return the event class called `name`, or raise UnknownName."""
    if name not in known:
        raise UnknownName(f"No event type is called {name!r}. Known: {', '.join(known) or 'none'}.")
    return known[name]
