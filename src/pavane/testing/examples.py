"""Examples of values, and a rehearsal made of them for an app that has none of its own.

Nothing of the user's steps and handlers is executed, since what they do may be real. So all that
such a rehearsal can find is workflow code that does not end, or that does not replay.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from random import Random
from typing import Any

import msgspec
from msgspec import inspect as types

from pavane.app import App
from pavane.core.codec import decoder
from pavane.errors import BadArguments, RunEnded
from pavane.testing.rehearsal import Rehearsal
from pavane.testing.sim.app import Sim
from pavane.workflow import Workflow

DEPTH_MAX = 6
EXAMPLES = 10
MOMENT = "2025-06-15T12:00:00Z"
_PLAIN: dict[type, Any] = {
    types.NoneType: None, types.AnyType: "a", types.BytesType: "YQ==", types.ByteArrayType: "YQ==",
    types.DateTimeType: MOMENT, types.DateType: MOMENT[:10], types.TimeType: MOMENT[11:19],
    types.TimeDeltaType: "PT1S", types.DecimalType: "1",
    types.UUIDType: "00000000-0000-4000-8000-000000000001",
}  # fmt: skip
_OF_YOUR_OWN = (
    "Write a rehearsal of your own, beside the app or in another module: "
    "`from pavane.testing import Rehearsal`, then `mine = Rehearsal(app, scenario, invariant)`."
)


def example(annotation: object, random: Random) -> Any:
    """Return a value of an annotated type; raise BadArguments if none can be made up."""
    try:
        raw = msgspec.json.encode(_plain(types.type_info(annotation), random, DEPTH_MAX))
        return decoder(annotation)(raw)
    except Exception as error:
        raise BadArguments(
            f"No example of {annotation} can be made up: {error.__cause__ or error}\n{_OF_YOUR_OWN}"
        ) from error


def _plain(kind: Any, random: Random, depth: int) -> Any:
    """Return the JSON data of an example."""
    if type(kind) in _PLAIN:
        return _PLAIN[type(kind)]
    again = partial(_plain, random=random, depth=depth - 1)
    match kind:
        case types.BoolType():
            return random.random() < 0.5
        case types.IntType() | types.FloatType():
            low = kind.ge if kind.ge is not None else (kind.gt + 1 if kind.gt is not None else 0)
            high = kind.le if kind.le is not None else low + 1000
            return random.randint(int(low), max(int(low), int(high)))
        case types.StrType():
            return random.choice("abc") * max(1, kind.min_length or 1)
        case types.EnumType():
            return random.choice([member.value for member in kind.cls])
        case types.LiteralType():
            return random.choice(kind.values)
        case types.UnionType():
            kinds = [it for it in kind.types if not isinstance(it, types.NoneType)]
            return again(random.choice(kinds)) if depth > 0 else None
        case types.TupleType():
            return [again(it) for it in kind.item_types]
        case types.VarTupleType() | types.ListType() | types.SetType() | types.FrozenSetType():
            return [again(kind.item_type)] if depth > 0 else []
        case types.DictType():
            return {again(kind.key_type): again(kind.value_type)} if depth > 0 else {}
        case types.StructType() | types.DataclassType() | types.TypedDictType():
            made: dict[str, Any] = {f.encode_name: again(f.type) for f in kind.fields if f.required}
            if isinstance(kind, types.StructType) and kind.tag_field is not None:
                made[kind.tag_field] = kind.tag
            return made
        case types.CustomType() if hasattr(kind.cls, "model_fields"):
            return _model(kind.cls, again)
        case _:
            raise ValueError(f"nothing is known of {type(kind).__name__}")


def _model(cls: Any, again: Callable[[Any], Any]) -> dict[str, Any]:
    """Return the data of a pydantic model."""
    required = {name: it for name, it in cls.model_fields.items() if it.is_required()}
    return {name: again(types.type_info(it.annotation)) for name, it in required.items()}


def example_rehearsal(app: App) -> Rehearsal[None]:
    """Return a rehearsal that starts each workflow, and publishes each event that is handled.

    Raises BadArguments at once if there is nothing to begin with, or no example of something.
    """
    registry = app.registry
    fakes: dict[Any, Any] = {}
    events: dict[type[Any], _Examples] = {}
    for service in registry.services.values():
        for step in service.steps.values():
            fakes[step] = partial(_answer, _Examples(step.params.returns, step).made[0])
        for handler in service.handlers.values():
            if handler.starts is None:
                fakes[handler] = _nothing
            events |= {it: _Examples(it, handler) for it in handler.events.values()}
    newest = {name: registry.workflow(name) for name, _ in registry.workflows}
    calls = {name: _Call(workflow) for name, workflow in newest.items()}
    received = {
        name: [_Examples(it, workflow) for it in workflow.receives]
        for name, workflow in newest.items()
    }
    if not calls and not events:
        raise BadArguments(
            f"App {app.name!r} has no workflows to start and handles no events. {_OF_YOUR_OWN}"
        )

    async def begin_each(sim: Sim[None]) -> None:
        for number in (1, 2):
            for name, call in calls.items():
                await call.start(sim, f"{name}-{number}")
            for examples in events.values():
                await sim.publish(examples.draw(sim.random))
        await sim.settle()
        await _send_what_is_awaited(sim, received)

    def all_end(sim: Sim[None]) -> None:
        """That they do is what every rehearsal checks."""

    return Rehearsal(app, begin_each, all_end, fakes=fakes)


class _Examples:
    """Values of a type, made up before anything is played: so what has none is refused at once."""

    def __init__(self, annotation: object, whose: object) -> None:
        random = Random(f"{whose}")
        try:
            self.made = [example(annotation, random) for _ in range(EXAMPLES)]
        except BadArguments as error:
            raise BadArguments(f"{whose}: {error}") from error

    def draw(self, random: Random) -> Any:
        return random.choice(self.made)


class _Call:
    """How a workflow is started, with examples of its arguments."""

    def __init__(self, workflow: Workflow[..., Any]) -> None:
        self._workflow = workflow
        parameters = inspect.signature(workflow.fn).parameters.values()
        self._args: list[_Examples] = []
        self._kwargs: dict[str, _Examples] = {}
        for parameter, it in zip(parameters, workflow.params.annotations, strict=True):
            examples = _Examples(it, f"{workflow!r}, {parameter.name}")
            if parameter.kind is parameter.KEYWORD_ONLY:
                self._kwargs[parameter.name] = examples
            else:
                self._args.append(examples)

    async def start(self, sim: Sim[None], id: str) -> None:
        args = [it.draw(sim.random) for it in self._args]
        kwargs = {name: it.draw(sim.random) for name, it in self._kwargs.items()}
        await sim.start(self._workflow, *args, id=id, **kwargs)


async def _send_what_is_awaited(sim: Sim[None], received: dict[str, list[_Examples]]) -> None:
    """Send each waiting run an example of all that it receives, and cancel what waits on."""
    for status in sim.runs():
        for examples in received[status.workflow]:
            with suppress(RunEnded):
                await sim.get(status.id).send(examples.draw(sim.random))
    await sim.settle()
    for status in sim.runs():
        if "event" in status.reason and "timer" not in status.reason:
            with suppress(RunEnded):
                await sim.get(status.id).cancel()


def _answer(value: Any, *args: Any, **kwargs: Any) -> Any:
    return value


def _nothing(*args: Any) -> None:
    """Stand in for a handler: take the event, publish nothing."""
