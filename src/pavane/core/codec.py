"""How values, arguments and errors become bytes, and come back as the types they were.

Everything that is journalled or sent passes through here, and a workflow is only ever given what
came back out of it. That is why a live value and its replay have the same type.

Guarantees:

- The same value has the same bytes in every process: sets are written sorted, dicts and fields
  keep their order.
- Nothing is lost quietly that can be noticed at a bearable price: NaN, infinities, lone surrogates
  and unknown classes are refused, with a sentence that says where they are and what to do.
- Reading never imports a module and never runs the `__init__` of an exception.

What JSON cannot say is not kept: the subclass of a `str`, `int`, `float` or `dict`, the name of a
time zone (its offset is kept, to the minute), and whatever a pydantic model hides when it is
dumped (`SecretStr`).

All that depends on a type or a signature is worked out once, in `decoder` and `Params.of`.
"""

from __future__ import annotations

import collections.abc
import contextlib
import copy
import dataclasses
import datetime
import decimal
import difflib
import enum
import functools
import hashlib
import inspect
import math
import re
import sys
import traceback
import types
import typing
import uuid
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, Final, NoReturn, Protocol, TypeVar, cast, overload

import msgspec
import msgspec.inspect

from pavane.errors import BadArguments, BadDeclaration, NotDecodable, NotEncodable, StepError

__all__ = [
    "FORMAT",
    "Params",
    "RemoteTraceback",
    "decode_error",
    "decoder",
    "digest",
    "encode",
    "encode_error",
    "encode_fitting",
    "error_summary",
    "resolve_hints",
]

FORMAT: Final = 1
"""Version of this encoding. Envelopes carry it, so that a later one can be told apart."""

T = TypeVar("T")
Decode = Callable[[bytes], T]


def digest(raw: bytes) -> str:
    """Return a short hash (16 hex digits) that is the same in every process and release."""
    return hashlib.blake2s(raw, digest_size=8).hexdigest()


# Values


def encode(value: object) -> bytes:
    """Write a value as JSON.

    Takes builtins, dataclasses, Structs, attrs classes, dates and times, `Decimal`, `UUID`, enums,
    `bytes`, tuples, sets, and pydantic models. Raises `NotEncodable` for anything else.
    """
    try:
        raw = _write(value)
        if type(value) in _FLAT:
            return raw
        # msgspec turns NaN and infinities into null, and writes sets in memory order. Neither can
        # be there without these characters, and most values have neither.
        if b"null" in raw and value is not None and _may_hold_nan(value) and _holds_nan(value):
            raise ValueError("a float is not finite")
        last_array = raw.rfind(b"[")
        is_flat = last_array < 0 or (last_array == 0 and issubclass(type(value), tuple))
        if not is_flat and _holds_set(value):
            raw = _write(_with_sorted_sets(value))
    except Exception as error:
        raise NotEncodable(_explain_refusal(value, error)) from error
    return raw


def encode_fitting(value: object) -> bytes:
    """Write an instance as JSON, and prove that its class will be able to read it.

    Raises `NotEncodable`, and `BadArguments` that names the field, what it takes and was given.
    """
    raw, kind = encode(value), type(value)
    try:
        decoder(kind)(raw)
    except NotDecodable as error:
        raise BadArguments(
            f"This {_spell(kind)} does not fit its class: {_reason(error.__cause__)}. Make it of"
            " the types that the class declares; nothing was written."
        ) from error
    return raw


@overload
def decoder(annotation: type[T]) -> Decode[T]: ...
@overload
def decoder(annotation: object) -> Decode[Any]: ...
def decoder(annotation: object) -> Decode[Any]:
    """Return the function that reads values of an annotated type; the same one for the same type.

    `Any`, `object` and a missing annotation give plain JSON data. Raises `BadDeclaration` when
    values of the type could not be told apart or rebuilt; what is returned raises `NotDecodable`.
    """
    try:
        hash(annotation)
    except TypeError:  # Annotated with a list, say
        return _new_decoder(annotation)
    return _cached_decoder(annotation)


_ANYTHING = (Any, object, inspect.Parameter.empty, NoReturn, typing.Never)


def _new_decoder(
    annotation: object,
    misfit: str = "Stored data does not fit",
    remedy: str = "It was written by other code, or the type has changed: give new fields a"
    " default, and keep reading what old ones may hold.",
) -> Decode[Any]:
    read = msgspec.json.Decoder(_readable(annotation), dec_hook=_from_plain).decode

    def decode(raw: bytes) -> Any:
        try:
            return read(raw)
        except Exception as error:
            raise NotDecodable(
                f"{misfit} `{_spell(annotation)}`: {_reason(error)}. {remedy}"
            ) from error

    return decode


_cached_decoder = functools.lru_cache(maxsize=4096)(_new_decoder)


def _readable(annotation: object) -> Any:
    """Return the annotation in the form that msgspec takes, or raise `BadDeclaration`."""
    if any(annotation is anything for anything in _ANYTHING):
        return Any
    try:
        kinds = _kinds_within(msgspec.inspect.type_info(annotation), {})
        problem = next(filter(None, map(_find_problem, kinds)), None)
    except Exception as error:
        problem = _reason(error)
    if problem is None:
        return annotation
    advice = (
        "Tag the classes of a union (`class Paid(Struct, tag=True)`), or use one type"
        if "union" in problem
        else "Use builtins, dataclasses, Structs, attrs classes or pydantic models"
    )
    raise BadDeclaration(
        f"`{_spell(annotation)}` cannot be read back from JSON: {problem}. {advice}."
    )


_KEYS = (
    msgspec.inspect.AnyType,
    msgspec.inspect.StrType,
    msgspec.inspect.IntType,
    msgspec.inspect.FloatType,
    msgspec.inspect.BytesType,
    msgspec.inspect.DateTimeType,
    msgspec.inspect.DateType,
    msgspec.inspect.TimeType,
    msgspec.inspect.TimeDeltaType,
    msgspec.inspect.UUIDType,
    msgspec.inspect.DecimalType,
    msgspec.inspect.EnumType,
    msgspec.inspect.LiteralType,
)


def _find_problem(info: object) -> str | None:
    """Say what msgspec would accept now and refuse, or quietly drop, when values arrive."""
    match info:
        case msgspec.inspect.CustomType(cls=cls) if not _is_pydantic_model(cls):
            return f"nothing tells how to rebuild a `{_spell(cls)}`"
        case msgspec.inspect.DictType(key_type=key) if not isinstance(key, _KEYS):
            return "keys of a dict must be of one scalar type, such as `str`, `int` or an enum"
        case msgspec.inspect.DataclassType(cls=cls) if hidden := _hidden_field(cls):
            return f"the private field `{hidden}` of `{_spell(cls)}` would not be written"
        case _:
            return None


def _hidden_field(cls: type) -> str | None:
    """Return the name of an attrs field that msgspec leaves out, if there is one."""
    if not hasattr(cls, "__attrs_attrs__"):
        return None
    return next((name for name in _fields(cls) if name.startswith("_")), None)


# Classes that msgspec does not know


class _PydanticModel(Protocol):
    """The part of `pydantic.BaseModel` (2.11 or later) that is used here."""

    model_fields: typing.ClassVar[Mapping[str, object]]

    def model_dump(self, **options: object) -> object: ...
    def model_copy(self, *, update: Mapping[str, object]) -> _PydanticModel: ...
    @classmethod
    def model_validate_json(cls, json_data: bytes, **options: object) -> _PydanticModel: ...


def _is_pydantic_model(cls: object) -> typing.TypeGuard[type[_PydanticModel]]:
    """Tell without importing pydantic: a model can only be there if somebody else has done it."""
    model = getattr(sys.modules.get("pydantic"), "BaseModel", None)
    return model is not None and isinstance(cls, type) and issubclass(cls, model)


def _dump(model: _PydanticModel, **options: object) -> object:
    # By field name and without computed fields, because this is what can always be read back.
    return model.model_dump(mode="json", by_alias=False, round_trip=True, **options)


def _to_plain(value: object) -> object:
    if _is_pydantic_model(type(value)):
        return _dump(cast("_PydanticModel", value))
    if isinstance(value, str):  # a subclass; numpy's floats come here too
        return str.__str__(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    raise TypeError(f"`{_spell(type(value))}` has no JSON form")


def _from_plain(cls: type, plain: object) -> object:
    if _is_pydantic_model(cls):
        # As JSON, because a strict model takes a date from JSON text but not from a Python str.
        json_data = msgspec.json.encode(plain)
        return cls.model_validate_json(json_data, by_alias=True, by_name=True)
    raise TypeError(f"nothing tells how to rebuild a `{_spell(cls)}`")


_write = msgspec.json.Encoder(enc_hook=_to_plain).encode
_FLAT = frozenset({str, int, bool, type(None)})
"""Types of values that hold no others, and neither NaN nor a set."""


# What to look for inside a value


_pack = msgspec.msgpack.Encoder(enc_hook=_to_plain).encode
_PACKED_NAN = re.compile(rb"\xcb[\x7f\xff][\xf0-\xff]")
"""A float in MessagePack whose exponent is all ones: NaN or an infinity."""


def _may_hold_nan(value: object) -> bool:
    """Tell at the speed of C; sometimes wrong about `bytes`, never about floats."""
    try:
        return _PACKED_NAN.search(_pack(value)) is not None
    except OverflowError:  # an int above 64 bits, which JSON can have
        return True


def _holds_nan(value: object) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    return any(_holds_nan(part) for _, part in _labelled_parts(value))


_without_sets: Final[set[type]] = {
    str, int, bool, float, types.NoneType, bytes, bytearray, memoryview, uuid.UUID,
    decimal.Decimal, datetime.datetime, datetime.date, datetime.time, datetime.timedelta,
}  # fmt: skip
"""Types whose values hold no sets; record classes join when they are first met."""
_MAX_WITHOUT_SETS: Final = 4096


def _holds_set(value: Any) -> bool:
    kind: type = type(value)  # pyright: ignore[reportUnknownVariableType]
    if kind in _without_sets:
        return False
    if kind is list or kind is tuple:
        parts = value
    elif kind is dict:
        parts = value.values()
    elif isinstance(value, set | frozenset):
        return True
    else:
        _learn(kind)
        parts = [part for _, part in _labelled_parts(value)]
    # Most often this settles it, without a loop in Python.
    return not _without_sets.issuperset(map(type, parts)) and any(map(_holds_set, parts))


def _learn(cls: type[object]) -> None:
    """Note a class that, as its fields are declared, cannot hold a set."""
    if len(_without_sets) < _MAX_WITHOUT_SETS and not _may_declare_set(cls):
        _without_sets.add(cls)


@functools.lru_cache(maxsize=4096)
def _may_declare_set(cls: type[object]) -> bool:
    if issubclass(cls, enum.Enum):
        return False
    if not _fields(cls) or _is_pydantic_model(cls):
        return True
    try:
        declared = _kinds_within(msgspec.inspect.type_info(cls), {})
    except Exception:  # msgspec can write classes that it cannot read
        return True
    return any(isinstance(kind, _MAY_BE_SETS) for kind in declared)


_MAY_BE_SETS = (
    msgspec.inspect.SetType,
    msgspec.inspect.FrozenSetType,
    msgspec.inspect.AnyType,
    msgspec.inspect.CustomType,
)


def _kinds_within(info: object, seen: dict[int, object]) -> Iterable[object]:
    """Return a type as msgspec sees it and all types that it is made of, each once."""
    if id(info) not in seen:
        seen[id(info)] = info
        for part in _kinds_beneath(info):
            _kinds_within(part, seen)
    return seen.values()


def _kinds_beneath(info: object) -> Iterable[object]:
    if isinstance(info, msgspec.inspect.Type | msgspec.inspect.Field):
        return [getattr(info, name) for name in info.__struct_fields__]
    return cast("tuple[object, ...]", info) if isinstance(info, tuple) else ()


@functools.lru_cache(maxsize=4096)
def _fields(cls: type[object]) -> tuple[str, ...]:
    """Return the names of a class's own data; none for a class that is no record."""
    if dataclasses.is_dataclass(cls):
        return tuple(field.name for field in dataclasses.fields(cls))
    if _is_pydantic_model(cls):
        return tuple(cls.model_fields)
    attributes = cast("Sequence[Any]", getattr(cls, "__attrs_attrs__", ()))
    own_names = tuple(attribute.name for attribute in attributes)
    return own_names or cast("tuple[str, ...]", getattr(cls, "__struct_fields__", ()))


_SORTABLE: Final[frozenset[type]] = frozenset({str, int, bytes, datetime.date, uuid.UUID})


def _with_sorted_sets(value: object) -> object:
    """Return a copy that encodes the same, but with sets as sorted lists."""
    if isinstance(value, set | frozenset):
        members = cast("Iterable[Any]", value)
        kinds = set(map(type, members))
        if len(kinds) == 1 and kinds <= _SORTABLE:
            return sorted(members)
        return sorted(map(_with_sorted_sets, members), key=_write)
    if isinstance(value, dict):
        items = cast("dict[object, object]", value).items()
        return {key: _with_sorted_sets(item) for key, item in items}
    if isinstance(value, list | tuple):
        return [_with_sorted_sets(item) for item in cast("Iterable[object]", value)]
    names = _fields(type(value))
    return _replaced(value, {name: _with_sorted_sets(getattr(value, name)) for name in names})


def _replaced(record: object, changes: dict[str, object]) -> object:
    if not changes:
        return record
    if _is_pydantic_model(type(record)):
        model = cast("_PydanticModel", record).model_copy(update=changes)
        return _dump(model, warnings=False)  # it would warn of lists where it expects sets
    copied = copy.copy(record)
    for name, changed in changes.items():
        if isinstance(copied, msgspec.Struct):
            msgspec.structs.force_setattr(copied, name, changed)
        else:
            object.__setattr__(copied, name, changed)  # frozen dataclasses refuse setattr
    return copied


# Why a value was refused. All of this is slow and runs only for a message.


def _explain_refusal(value: object, error: Exception) -> str:
    if isinstance(error, RecursionError):
        return (
            f"A value of type `{_spell(type(value))}` contains itself or is nested too deeply to be"
            " written as JSON. Return plain data, with ids in place of references."
        )
    culprit, path = _culprit(value)
    where = f" at `{_clip(path, 1_000)}`" if path else ""
    match culprit:
        case float():
            return (
                f"The float {culprit}{where} has no JSON form. Use None, or a Decimal or str that"
                " says it."
            )
        case str():
            return (
                f"The str {_clip(ascii(culprit))}{where} holds a lone surrogate, which UTF-8 cannot"
                ' write. Repair it with `.encode(errors="replace").decode()`, or return bytes.'
            )
        case collections.abc.Coroutine():
            return f"There is a coroutine{where} where a value should be. Is an `await` missing?"
        case dict():
            return (
                f"The dict{where} has a key that has no JSON form ({_reason(error)}). Use str, int,"
                " enum, date or UUID keys, or a list of pairs."
            )
        case _:
            return (
                f"A value of type `{_spell(type(culprit))}`{where} cannot be written as JSON"
                f" ({_reason(error)}). Return plain data (a dict, list, dataclass or Struct), or"
                " convert it in the step."
            )


def _culprit(value: object) -> tuple[object, str]:
    """Follow the parts that cannot be written down to the innermost one, and return its path."""
    path = ""
    while True:
        for label, part in _labelled_parts(value):
            if not _is_writable(part):
                value, path = part, path + label
                break
        else:
            return value, path


def _labelled_parts(value: object) -> Iterable[tuple[str, object]]:
    if isinstance(value, dict):
        items = cast("dict[object, object]", value).items()
        return ((f"[{_clip(ascii(key), 60)}]", item) for key, item in items)
    if isinstance(value, list | tuple | set | frozenset):
        return ((f"[{i}]", item) for i, item in enumerate(cast("Iterable[object]", value)))
    return ((f".{name}", getattr(value, name, None)) for name in _fields(type(value)))


def _is_writable(value: object) -> bool:
    try:
        _write(value)
    except Exception:
        return False
    return not _holds_nan(value)


def _reason(error: BaseException | None) -> str:
    return _clip(str(error).rstrip("."), 400) or type(error).__name__


def _spell(annotation: object) -> str:
    """Write a type as its author would."""
    if annotation is inspect.Parameter.empty:
        return "Any"
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if annotation.__module__ == "builtins":
            return annotation.__qualname__
        return annotation.__qualname__.rpartition("<locals>.")[2]
    return repr(annotation).replace("typing.", "")


def _clip(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else f"{text[:limit]}…"


# Arguments


class _Missing(enum.Enum):
    """Stands for "no default", because None is one."""

    MISSING = enum.auto()


_MISSING: Final = _Missing.MISSING


class _Param(msgspec.Struct, frozen=True):
    name: str
    annotation: object
    decode: Decode[Any]
    default: object
    default_raw: bytes
    by_position: bool
    by_name: bool

    @property
    def is_required(self) -> bool:
        return self.default is _MISSING

    def __str__(self) -> str:
        spelled = f"{self.name}: {_spell(self.annotation)}"
        return spelled if self.is_required else f"{spelled} = {_clip(repr(self.default), 40)}"


class Params:
    """What a durable function takes and returns, worked out once from its signature.

    Arguments are stored as a JSON array in the order of the parameters, defaults included. So a
    parameter may be renamed, and one with a default may be added at the end, while runs that began
    before go on.

    `name` is the function's qualified name, `returns` its return annotation (of an async function,
    what awaiting it gives), `unresolved` the parameters whose annotation names something that could
    not be found: they are read as plain JSON data.
    """

    def __init__(self, fn: Callable[..., object], given: int) -> None:
        self.name: str = _name_of(fn)
        signature = _signature(fn)
        if given:
            left = list(signature.parameters.values())[given:]
            signature = signature.replace(parameters=left)
        hints, self.unresolved = resolve_hints(fn)
        self.returns: object = _awaited(hints.get("return", Any))
        self._signature = signature
        self._params = [self._param(p, hints) for p in signature.parameters.values()]
        self._positional_count = sum(p.by_position for p in self._params)
        self._is_all_positional = self._positional_count == len(self._params)
        self._keyword_names = [p.name for p in self._params[self._positional_count :]]
        # By number of positional arguments: the parameters that are left to fill.
        self._rest = [
            [(p.name if p.by_name else None, p.default) for p in self._params[n:]]
            for n in range(self._positional_count + 1)
        ]
        all_types = tuple(_readable(p.annotation) for p in self._params)
        self._read_all = msgspec.json.Decoder(
            types.GenericAlias(tuple, all_types), dec_hook=_from_plain
        ).decode

    @classmethod
    def of(cls, fn: Callable[..., object], *, given: int = 0) -> Params:
        """Read a function's signature and type hints.

        The first `given` parameters are left out: they are given when it is called, and not stored.
        Raises `BadDeclaration` for `*args` or `**kwargs`, for a type that cannot be read back, and
        for a default that does not fit its type. The return type is looked at by `result` only.
        """
        return cls(fn, given)

    @property
    def annotations(self) -> list[object]:
        """The annotation of each parameter, in order."""
        return [param.annotation for param in self._params]

    @functools.cached_property
    def result(self) -> Decode[Any]:
        """The decoder of what the function returns. Raises `BadDeclaration` like `decoder`."""
        with _declaring(f"What `{self.name}` returns"):
            return _new_decoder(
                self.returns,
                f"What `{self.name}` returned does not fit its declared return type",
                "Correct what it returns, or the annotation.",
            )

    def encode(self, args: Sequence[object], kwargs: Mapping[str, object]) -> bytes:
        """Bind arguments as a call would, and write them.

        Raises `BadArguments` when they do not fit the signature, `NotEncodable` when a value has no
        JSON form. Types are not compared; see `check`.
        """
        if not (args or kwargs or self._params):
            return b"[]"
        complete = not kwargs and len(args) == self._positional_count and self._is_all_positional
        values = tuple(args) if complete else self._bind(args, kwargs)
        try:
            return encode(values)
        except NotEncodable:
            self._refuse_unwritable(values)
            raise

    def check(self, args: Sequence[object], kwargs: Mapping[str, object]) -> bytes:
        """Do as `encode`, and prove that the function will be able to read what was written.

        Raises `BadArguments` that names the parameter, what it takes and what it was given.
        """
        raw = self.encode(args, kwargs)
        try:
            self._read_all(raw)
        except Exception:
            self._read_each(raw, BadArguments)
        return raw

    def decode(self, raw: bytes) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Read arguments back: positional ones, and those of keyword-only parameters.

        An array that is shorter than the signature takes the defaults of the parameters that came
        later. Raises `NotDecodable`.
        """
        if raw == b"[]" and not self._params:
            return (), {}
        try:
            values: tuple[Any, ...] = self._read_all(raw)
        except Exception:
            values = self._read_each(raw, NotDecodable)
        if self._is_all_positional:
            return values, {}
        count = self._positional_count
        return values[:count], dict(zip(self._keyword_names, values[count:], strict=True))

    def take_all_of(self, other: Params) -> bool:
        """Tell whether a call that fits `other`, by position, fits this as well."""
        needed = [p for p in other._params if p.default is _MISSING]
        for params in (other._params, needed):
            args = [p.name for p in params if p.by_position]
            kwargs = {p.name: p.name for p in params if not p.by_position}
            try:
                self._signature.bind(*args, **kwargs)
            except TypeError:
                return False
        return True

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self._params))})"

    def _param(self, p: inspect.Parameter, hints: Mapping[str, object]) -> _Param:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            stars, plain = ("*", "list") if p.kind is p.VAR_POSITIONAL else ("**", "dict")
            raise BadDeclaration(
                f"`{self.name}` takes `{stars}{p.name}`, but durable functions take named"
                " parameters, because every argument is stored and checked by its parameter."
                f" Write `{p.name}: {plain}` instead."
            )
        annotation = hints.get(p.name, Any)
        with _declaring(f"Parameter `{p.name}` of `{self.name}`"):
            decode = decoder(annotation)
        default, default_raw = _MISSING, b""
        if p.default is not p.empty:
            default, default_raw = p.default, self._encode_default(p, annotation, decode)
        return _Param(
            name=p.name,
            annotation=annotation,
            decode=decode,
            default=default,
            default_raw=default_raw,
            by_position=p.kind is not p.KEYWORD_ONLY,
            by_name=p.kind is not p.POSITIONAL_ONLY,
        )

    def _encode_default(
        self, p: inspect.Parameter, annotation: object, decode: Decode[Any]
    ) -> bytes:
        try:
            raw = encode(p.default)
            decode(raw)
        except (NotEncodable, NotDecodable) as error:
            raise BadDeclaration(
                f"The default {_clip(repr(p.default), 60)} of parameter `{p.name}` of `{self.name}`"
                f" does not fit `{_spell(annotation)}`: {_reason(error.__cause__)}."
                " Defaults are stored like arguments: widen the annotation"
                " (`| None`), or use a default of that type."
            ) from error
        return raw

    def _bind(self, args: Sequence[object], kwargs: Mapping[str, object]) -> tuple[object, ...]:
        """Do what `inspect.Signature.bind` and `apply_defaults` do, ten times faster."""
        if len(args) > self._positional_count:
            self._refuse_call(args, kwargs)
        values = list(args)
        used = 0
        for name, default in self._rest[len(args)]:
            if name is not None and name in kwargs:
                values.append(kwargs[name])
                used += 1
            elif default is _MISSING:
                self._refuse_call(args, kwargs)
            else:
                values.append(default)
        if used != len(kwargs):
            self._refuse_call(args, kwargs)
        return tuple(values)

    def _refuse_call(self, args: Sequence[object], kwargs: Mapping[str, object]) -> NoReturn:
        complaint = "the arguments do not fit"
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as error:
            complaint = str(error)
        names = [p.name for p in self._params]
        unknown = next((name for name in kwargs if name not in names), None)
        near = difflib.get_close_matches(unknown or "", names, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise BadArguments(f"Cannot call `{self}`: {complaint}.{hint}")

    def _refuse_unwritable(self, values: Sequence[object]) -> None:
        for param, value in zip(self._params, values, strict=True):
            try:
                encode(value)
            except NotEncodable as error:
                raise NotEncodable(f"Argument `{param.name}` of `{self.name}`: {error}") from error

    def _read_each(
        self, raw: bytes, refuse: type[BadArguments | NotDecodable]
    ) -> tuple[object, ...]:
        """Read one argument after the other: slower, but it can fill in defaults and say which."""
        try:
            stored = _read_array(raw)
        except Exception as error:
            raise refuse(
                f"The stored arguments of `{self.name}` are no JSON array: {_reason(error)}."
            ) from error
        if len(stored) > len(self._params):
            raise refuse(
                f"{len(stored)} arguments are stored for `{self}`, which takes {len(self._params)}."
                " Keep parameters while runs that were started with them are under way."
            )
        values: list[object] = []
        for i, param in enumerate(self._params):
            if i < len(stored):
                values.append(self._read_one(param, bytes(stored[i]), refuse))
            elif param.is_required:
                raise refuse(
                    f"No argument is stored for the parameter `{param.name}` of `{self}`. Give"
                    " parameters that are added later a default."
                )
            else:
                values.append(param.decode(param.default_raw))
        return tuple(values)

    def _read_one(
        self, param: _Param, raw: bytes, refuse: type[BadArguments | NotDecodable]
    ) -> object:
        try:
            return param.decode(raw)
        except NotDecodable as error:
            shown = _clip(raw.decode(errors="replace"), 60)
            raise refuse(
                f"Argument `{param.name}` of `{self}` does not fit `{_spell(param.annotation)}`:"
                f" {_reason(error.__cause__)}. Got {shown}."
            ) from error


_read_array = msgspec.json.Decoder(list[msgspec.Raw]).decode


@contextlib.contextmanager
def _declaring(subject: str) -> Generator[None]:
    try:
        yield
    except BadDeclaration as error:
        raise BadDeclaration(f"{subject}: {error}") from error


def _name_of(fn: Callable[..., object]) -> str:
    name = getattr(fn, "__qualname__", None) or type(fn).__qualname__
    return str(name).rpartition("<locals>.")[2]


def _signature(fn: Callable[..., object]) -> inspect.Signature:
    if sys.version_info >= (3, 14):
        import annotationlib

        return inspect.signature(fn, annotation_format=annotationlib.Format.FORWARDREF)
    return inspect.signature(fn)


def resolve_hints(fn: Callable[..., object]) -> tuple[dict[str, object], tuple[str, ...]]:
    """Return a function's type hints by parameter, and the parameters that have none to be found.

    Classes that are local to another function can only be found if this function mentions them
    in its code too; others are left out, and so are names imported for type checkers only.
    """
    inner: Any = inspect.unwrap(fn)
    if isinstance(inner, functools.partial):
        inner = cast("Any", inner).func
    scope = _scope(inner)
    try:
        return typing.get_type_hints(inner, localns=scope, include_extras=True), ()
    except Exception:
        pass  # one by one, then
    hints: dict[str, object] = {}
    unresolved: list[str] = []
    for name, annotation in _annotations(inner).items():
        try:
            hints[name] = _resolve_hint(annotation, getattr(inner, "__globals__", {}), scope)
        except NameError:
            unresolved.append(name)
        except Exception as error:
            raise BadDeclaration(
                f"The annotation `{annotation}` of `{name}` of `{_name_of(fn)}` is no type:"
                f" {_reason(error)}."
            ) from error
    return hints, tuple(unresolved)


def _resolve_hint(annotation: object, module: dict[str, Any], scope: dict[str, Any]) -> object:
    def bearer() -> None: ...

    bearer.__annotations__ = {"it": annotation}
    return typing.get_type_hints(bearer, module, scope, include_extras=True)["it"]


def _annotations(fn: Any) -> dict[str, object]:
    if sys.version_info >= (3, 14):
        import annotationlib

        return annotationlib.get_annotations(fn, format=annotationlib.Format.FORWARDREF)
    return dict(getattr(fn, "__annotations__", {}))


def _scope(fn: Any) -> dict[str, Any]:
    """Return the variables that a nested function has from the functions around it."""
    code = getattr(fn, "__code__", None)
    found: dict[str, Any] = {}
    cells = getattr(fn, "__closure__", None) or ()
    for name, cell in zip(getattr(code, "co_freevars", ()), cells, strict=False):
        with contextlib.suppress(ValueError):  # not assigned yet
            found[name] = cell.cell_contents
    return found


def _awaited(annotation: Any) -> object:
    """Return what is left of `Awaitable[T]` or `Coroutine[..., T]`, when a plain `def` says so."""
    if typing.get_origin(annotation) in (collections.abc.Awaitable, collections.abc.Coroutine):
        return typing.get_args(annotation)[-1]
    return annotation


# Errors

_TRACE_LINES: Final = 20
_TEXT_LIMIT: Final = 8_000
"""Characters of a message or trace that are kept; bytes of each argument and attribute."""
_GROUP_LIMIT: Final = 32
"""Errors of an exception group that are kept, and how deep groups may nest."""


class RemoteTraceback(Exception):
    """The text of a traceback from where an error was first raised; the error's `__cause__`."""

    def __init__(self, trace: str) -> None:
        super().__init__(trace)
        self.trace = trace

    def __str__(self) -> str:
        return f'\n"""\n{self.trace}"""'


class _ErrorRecord(msgspec.Struct, omit_defaults=True):
    type: str
    message: str
    args: list[Any] = []
    state: dict[str, Any] = {}
    trace: str = ""
    notes: list[str] = []
    errors: list[_ErrorRecord] = []


_read_error = msgspec.json.Decoder(_ErrorRecord).decode


def encode_error(exc: BaseException) -> bytes:
    """Write an exception: class, message, arguments, public attributes, notes, end of its trace.

    Never raises, whatever the exception does when it is looked at; what has no JSON form is left
    out. An error that was only passed through here as a `StepError` is written as it was received.
    """
    try:
        return msgspec.json.encode(_record(exc, _GROUP_LIMIT))
    except Exception as error:
        # All that the exception could spoil is guarded one by one; this is for what nobody foresaw.
        cls = type(exc)
        message = f"an error that could not be written ({type(error).__name__})"
        return msgspec.json.encode(_ErrorRecord(type=_class_name(cls), message=message))


def decode_error(raw: bytes) -> Exception:
    """Rebuild an exception, of its own class if this process has loaded it, else a `StepError`.

    Nothing is imported and no `__init__` is called, because they could do anything. The original
    trace is the `__cause__`. Raises `NotDecodable` when `raw` is no error at all.
    """
    try:
        record = _read_error(raw)
    except Exception as error:
        raise NotDecodable(f"A stored error cannot be read: {_reason(error)}.") from error
    return _revive(record)


def error_summary(raw: bytes) -> str:
    """Return an encoded error in one line, such as "CardDeclined: no funds". Never raises."""
    try:
        record = _read_error(raw)
    except Exception:
        return "an error that cannot be read"
    name = record.type.rpartition(":")[2].rpartition(".")[2]
    lines = record.message.strip().splitlines() or [""]
    more = " …" if len(lines) > 1 else ""
    return f"{name}: {lines[0]}{more}" if lines[0] else name


def _record(exc: BaseException, depth: int) -> _ErrorRecord:
    received: object = getattr(exc, "_received", None) if type(exc) is StepError else None
    if isinstance(received, _ErrorRecord):
        return received
    message = _text(exc)
    record = _ErrorRecord(
        type=_class_name(type(exc)),
        message=message,
        args=_plain_args(exc, message),
        state=_plain_state(exc),
        trace=_trace(exc),
        notes=_notes(exc),
    )
    if isinstance(exc, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", exc)
        record.args = [_clean(group.message)]
        record.errors = [
            _record(error, depth - 1) for error in group.exceptions[:_GROUP_LIMIT] if depth
        ]
    return record


def _class_name(cls: type) -> str:
    return _clean(f"{cls.__module__}:{cls.__qualname__}")


def _text(exc: BaseException) -> str:
    try:
        return _clean(str(exc))
    except Exception as error:
        return f"a message that could not be written ({type(error).__name__})"


def _clean(text: str) -> str:
    # Not by way of str methods that a subclass may have changed.
    kept = _clip(str.__str__(text), _TEXT_LIMIT)
    return kept.encode(errors="backslashreplace").decode()


def _plain_args(exc: BaseException, message: str) -> list[Any]:
    # The file names of an OSError are only in what it says to pickle.
    args: Any = OSError.__reduce__(exc)[1] if isinstance(exc, OSError) else exc.args
    plain = [_plain(arg) for arg in args]
    return [message] if None in plain else plain


def _plain_state(exc: BaseException) -> dict[str, Any]:
    try:
        items = list(vars(exc).items())
    except Exception:  # whatever a property called __dict__ may raise
        return {}
    public = ((_clean(name), _plain(value)) for name, value in items if name[:1] != "_")
    return {name: plain for name, plain in public if plain is not None}


def _plain(value: object) -> msgspec.Raw | None:
    try:
        raw = encode(value)
    except Exception:
        return None
    return msgspec.Raw(raw) if len(raw) <= _TEXT_LIMIT else None


def _trace(exc: BaseException) -> str:
    try:
        text = "".join(traceback.format_exception(exc, limit=-_TRACE_LINES))
    except Exception:
        return ""
    lines = text.splitlines(keepends=True)[-_TRACE_LINES:]
    return _clean("".join(lines)[-_TEXT_LIMIT:])


def _notes(exc: BaseException) -> list[str]:
    notes: object = vars(exc).get("__notes__") if hasattr(exc, "__notes__") else None
    if not isinstance(notes, list):
        return []
    return [_clean(note) for note in cast("list[object]", notes) if isinstance(note, str)]


def _revive(record: _ErrorRecord) -> Exception:
    cls = loaded_class(record.type)
    try:
        exc = _rebuild(cls, record) if cls else _stand_in(record)
    except Exception:
        exc = _stand_in(record)
    if record.notes:
        vars(exc)["__notes__"] = record.notes
    if record.trace:
        # Not by assignment, which a frozen dataclass would refuse.
        BaseException.__setattr__(exc, "__cause__", RemoteTraceback(record.trace))
    return exc


def _stand_in(record: _ErrorRecord) -> StepError:
    exc = StepError(record.type, record.message)
    # Kept to be written again as it was, for a process that has the class.
    vars(exc)["_received"] = record
    return exc


def loaded_class(type_name: str) -> type[Exception] | None:
    module, _, qualname = type_name.partition(":")
    found: object = sys.modules.get(module)
    for part in qualname.split("."):
        # Not by getattr, which may import: a module can have a `__getattr__`.
        found = getattr(found, "__dict__", {}).get(part)
    return found if isinstance(found, type) and issubclass(found, Exception) else None


def _rebuild(cls: type[Exception], record: _ErrorRecord) -> Exception:
    """Make an exception as its builtin base does it, past any `__new__` or `__init__` of users."""
    base = cast("Any", next(c for c in cls.__mro__ if c.__module__ == "builtins"))
    args = record.args
    if issubclass(cls, ExceptionGroup):
        args = [*args, [_revive(error) for error in record.errors]]
    exc: Exception = base.__new__(cls, *args)
    with contextlib.suppress(TypeError):  # UnicodeDecodeError wants the bytes it had
        base.__init__(exc, *args)
    state = record.state.items()
    vars(exc).update({name: value for name, value in state if not name.startswith("_")})
    str(exc)  # one that cannot be printed without what was left out is worse than a StepError
    return exc
