"""What goes through the codec comes back as it was, or is refused with a sentence that helps."""

import asyncio
import dataclasses
import datetime as dt
import enum
import json
import math
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Coroutine
from decimal import Decimal
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, NoReturn, TypedDict, TypeVar, cast
from uuid import UUID

import attrs
import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pavane.core import codec
from pavane.core.codec import (
    Params,
    RemoteTraceback,
    decode_error,
    decoder,
    digest,
    encode,
    encode_error,
    encode_fitting,
    error_summary,
)
from pavane.errors import BadArguments, BadDeclaration, NotDecodable, NotEncodable, StepError

T = TypeVar("T")


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Size(enum.StrEnum):
    S = "s"
    L = "l"


class Right(enum.Flag):
    READ = 1
    WRITE = 2


class Point(NamedTuple):
    x: int
    y: float


class Row(TypedDict):
    sku: str
    amount: Decimal


class Line(msgspec.Struct, frozen=True):
    sku: str
    price: Decimal
    tags: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True, slots=True)
class Address:
    street: str
    since: dt.date | None = None


@attrs.frozen
class Parcel:
    id: UUID
    lines: tuple[Line, ...]
    address: Address | None


class Card(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    number: str = pydantic.Field(alias="cardNumber")
    expires: dt.date
    limit: Decimal
    tags: frozenset[str] = frozenset()


class Box(msgspec.Struct, Generic[T]):
    content: T


class Paid(msgspec.Struct, tag=True):
    cents: int


class Refused(msgspec.Struct, tag=True):
    reason: str


class Node(msgspec.Struct):
    value: int
    next: "Node | None" = None


# Round trips

text = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
offsets = st.integers(-1439, 1439).map(lambda m: dt.timezone(dt.timedelta(minutes=m)))
lines = st.builds(Line, text, st.decimals(allow_nan=False), st.frozensets(text, max_size=4))
addresses = st.builds(Address, text, st.none() | st.dates())
cards = st.builds(
    lambda number, expires, limit, tags: Card(
        cardNumber=number, expires=expires, limit=limit, tags=tags
    ),
    text,
    st.dates(),
    st.decimals(allow_nan=False, allow_infinity=False),
    st.frozensets(text, max_size=4),
)

SCALARS: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (str, text),
    (int, st.integers()),
    (bool, st.booleans()),
    (float, st.floats(allow_nan=False, allow_infinity=False)),
    (bytes, st.binary(max_size=16)),
    (Decimal, st.decimals(allow_nan=False)),
    (UUID, st.uuids()),
    (dt.datetime, st.datetimes() | st.datetimes(timezones=offsets)),
    (dt.date, st.dates()),
    (dt.time, st.times()),
    (dt.timedelta, st.timedeltas()),
    (Colour, st.sampled_from(Colour)),
    (Level, st.sampled_from(Level)),
    (Size, st.sampled_from(Size)),
    (Literal["a", "b"], st.sampled_from(["a", "b"])),
]
RECORDS: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (Line, lines),
    (Address, addresses),
    (Parcel, st.builds(Parcel, st.uuids(), st.lists(lines, max_size=2).map(tuple), addresses)),
    (Point, st.builds(Point, st.integers(), st.floats(allow_nan=False, allow_infinity=False))),
    (Row, st.fixed_dictionaries({"sku": text, "amount": st.decimals(allow_nan=False)})),
    (Card, cards),
    (Right, st.sampled_from([Right.READ, Right.WRITE, Right.READ | Right.WRITE])),
    (Paid | Refused, st.builds(Paid, st.integers()) | st.builds(Refused, text)),
]


@st.composite
def annotated_values(draw: st.DrawFn) -> tuple[Any, Any]:
    """Draw a type of any nesting, and a value of it."""
    annotation, values = draw(st.sampled_from(SCALARS + RECORDS))
    for _ in range(draw(st.integers(0, 3))):
        annotation, values = draw(st.sampled_from(wraps(annotation, values)))
    return annotation, draw(values)


def wraps(inner: Any, values: st.SearchStrategy[Any]) -> list[tuple[Any, st.SearchStrategy[Any]]]:
    few = st.lists(values, max_size=3)
    wrapped: list[tuple[Any, st.SearchStrategy[Any]]] = [
        (list[inner], few),
        (tuple[inner, ...], few.map(tuple)),
        (tuple[inner, int], st.tuples(values, st.integers())),
        (dict[str, inner], st.dictionaries(text, values, max_size=3)),
        (Box[inner], st.builds(Box, values)),
        (inner | None, st.none() | values),
    ]
    if any(inner is scalar for scalar, _ in SCALARS):
        wrapped += [
            (set[inner], st.sets(values, max_size=4)),
            (frozenset[frozenset[inner]], st.frozensets(st.frozensets(values), max_size=3)),
        ]
        if inner is not bool:
            wrapped.append((dict[inner, int], st.dictionaries(values, st.integers(), max_size=3)))
    return wrapped


def shape(value: Any) -> Any:
    """Return a value with the types of all its parts, because 1 == 1.0 == True."""
    kind = type(value)
    if isinstance(value, dict):
        return kind, {key: (type(key), shape(item)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return kind, [shape(item) for item in value]
    if isinstance(value, set | frozenset):
        return kind, {(type(item), item) for item in value}
    if isinstance(value, Box):
        return kind, shape(value.content)
    return kind, value


@given(annotated_values())
def test_a_value_comes_back_equal_and_of_the_same_type(drawn: tuple[Any, Any]) -> None:
    annotation, value = drawn
    assert shape(decoder(annotation)(encode(value))) == shape(value)


@given(annotated_values())
def test_what_came_back_is_written_as_the_same_bytes(drawn: tuple[Any, Any]) -> None:
    annotation, value = drawn
    raw = encode(value)
    assert encode(decoder(annotation)(raw)) == raw


plain_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
)  # fmt: skip


@given(plain_json)
def test_plain_json_needs_no_annotation(value: Any) -> None:
    assert shape(decoder(Any)(encode(value))) == shape(value)
    assert json.loads(encode(value)) == value


def test_a_dict_keeps_its_order() -> None:
    assert list(decoder(Any)(encode({"b": 1, "a": 2}))) == ["b", "a"]


@pytest.mark.parametrize(
    ("value", "raw"),
    [
        ({"pear", "apple", "fig"}, '["apple","fig","pear"]'),
        ({3, 20, 100}, "[3,20,100]"),
        ({Colour.RED, Colour.BLUE}, '["blue","red"]'),
        ({1, "a", None}, '["a",1,null]'),
        (({"b", "a"},), '[["a","b"]]'),
        (frozenset({frozenset({"x", "y"}), frozenset({"z"})}), '[["x","y"],["z"]]'),
        (Line("tea", Decimal(1), frozenset("ab")), '{"sku":"tea","price":"1","tags":["a","b"]}'),
        (Box({2: [{"b", "a"}]}), '{"content":{"2":[["a","b"]]}}'),
        (
            [
                Card(
                    cardNumber="1",
                    expires=dt.date(2030, 1, 1),
                    limit=Decimal(1),
                    tags=frozenset("ba"),
                )
            ],
            '[{"number":"1","expires":"2030-01-01","limit":"1","tags":["a","b"]}]',
        ),
    ],
    ids=lambda given: given if isinstance(given, str) else "",  # a set's repr is in no order
)
def test_sets_are_written_sorted_wherever_they_are(value: Any, raw: str) -> None:
    assert encode(value).decode() == raw


def test_the_hash_seed_does_not_show_in_the_bytes() -> None:
    program = (
        "from pavane.core.codec import encode\n"
        "words = 'abcdefgh'\n"
        "print(encode([set(words), {frozenset(words), frozenset(words[:3])}, {'k': {*words, 1}}]))"
    )
    source = Path(codec.__file__).parents[2]
    written = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(source)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(written) == 1


def test_writing_a_set_does_not_change_the_record_that_holds_it() -> None:
    line = Line("tea", Decimal(1), frozenset({"b", "a"}))
    encode([line])
    assert line.tags == frozenset({"b", "a"})


def test_a_pydantic_model_is_read_by_name_and_by_alias() -> None:
    by_alias = b'{"cardNumber":"1","expires":"2030-01-01","limit":"9"}'
    card = decoder(Card)(by_alias)
    assert card == Card(cardNumber="1", expires=dt.date(2030, 1, 1), limit=Decimal(9))
    assert decoder(Card)(encode(card)) == card


def test_pydantic_is_never_imported_by_the_codec() -> None:
    program = (
        "import sys, pavane.core.codec as c; c.encode({1}); assert 'pydantic' not in sys.modules"
    )
    source = Path(codec.__file__).parents[2]
    subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(source)},
        check=True,
    )


def test_nul_is_kept() -> None:
    assert decoder(str)(encode("a\0b")) == "a\0b"


def test_subclasses_of_scalars_are_written_as_plain_ones() -> None:
    class Markup(str):
        __slots__ = ()

        def __str__(self) -> str:
            return "not this"

    assert encode(Markup("<b>")) == b'"<b>"'
    assert encode([type("Float64", (float,), {})(1.5)]) == b"[1.5]"


# Refusals to write


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("wrap", "where"),
    [
        (lambda x: x, ""),
        (lambda x: {"a": [None, x]}, " at `['a'][1]`"),
        (lambda x: [None, 2**80, x], " at `[2]`"),
        (lambda x: Box(Point(1, x)), " at `.content[1]`"),
        (lambda x: type("Float64", (float,), {})(x), ""),
    ],
)
def test_a_float_that_is_not_finite_is_refused(
    bad: float, wrap: Callable[[float], Any], where: str
) -> None:
    with pytest.raises(NotEncodable) as caught:
        encode(wrap(bad))
    assert str(caught.value) == (
        f"The float {bad}{where} has no JSON form. Use None, or a Decimal or str that says it."
    )


def test_nan_in_a_pydantic_model_is_refused() -> None:
    class Reading(pydantic.BaseModel):
        celsius: float

    with pytest.raises(NotEncodable, match=r"The float nan at `\[0\]\.celsius`"):
        encode([Reading(celsius=math.nan)])


@pytest.mark.parametrize("value", [None, [None], "null", {"null": 1.5}, [None, b"\xcb\x7f\xf8"]])
def test_null_alone_is_no_reason_to_refuse(value: Any) -> None:
    assert encode(value)


class Account:
    pass


def test_an_unknown_class_is_refused_with_its_name_its_place_and_what_to_do() -> None:
    with pytest.raises(NotEncodable) as caught:
        encode({"owner": [1, Account()]})
    assert str(caught.value) == (
        "A value of type `Account` at `['owner'][1]` cannot be written as JSON (`Account` has no"
        " JSON form). Return plain data (a dict, list, dataclass or Struct), or convert it in the"
        " step."
    )


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(NotEncodable) as caught:
        encode({"name": "a\ud800"})
    assert str(caught.value) == (
        r"The str 'a\ud800' at `['name']` holds a lone surrogate, which UTF-8 cannot write. Repair"
        ' it with `.encode(errors="replace").decode()`, or return bytes.'
    )
    with pytest.raises(NotEncodable, match="The dict has a key that has no JSON form"):
        encode({"\udfff": 1})


def test_a_key_that_is_no_scalar_is_refused() -> None:
    with pytest.raises(NotEncodable) as caught:
        encode([{(1, 2): 3}])
    assert str(caught.value) == (
        "The dict at `[0]` has a key that has no JSON form (`tuple` has no JSON form). Use str,"
        " int, enum, date or UUID keys, or a list of pairs."
    )


def test_a_value_that_contains_itself_is_refused() -> None:
    ring: list[Any] = []
    ring.append(ring)
    with pytest.raises(NotEncodable, match="`list` contains itself or is nested too deeply"):
        encode(ring)
    node = Node(1)
    node.next = node
    with pytest.raises(NotEncodable, match="`Node` contains itself"):
        encode(node)


@pytest.mark.parametrize("leaf", [None, math.nan, {1}, Account(), "\ud800"])
@pytest.mark.parametrize("depth", [100, 300, 450, 600, 900, 960, 5_000])
def test_depth_is_never_a_recursion_error(leaf: Any, depth: int) -> None:
    value = leaf
    for _ in range(depth):
        value = [value]
    try:
        encode(value)
    except NotEncodable as refusal:
        assert len(str(refusal)) < 10_000


def test_a_coroutine_asks_for_an_await() -> None:
    coroutine = asyncio.sleep(0)
    with pytest.raises(NotEncodable) as caught:
        encode({"paid": coroutine})
    coroutine.close()
    assert str(caught.value) == (
        "There is a coroutine at `['paid']` where a value should be. Is an `await` missing?"
    )


def test_a_model_that_cannot_be_dumped_is_refused() -> None:
    class Broken(pydantic.BaseModel):
        @pydantic.model_serializer
        def dump(self) -> dict[str, Any]:
            raise RuntimeError("no power")

    with pytest.raises(NotEncodable, match=r"`Broken` cannot be written as JSON \(.*no power"):
        encode(Broken())


# Decoders


class Parcel(msgspec.Struct):
    id: str
    grams: int | None = None


@dataclasses.dataclass
class Label:
    parcel: Parcel
    grams: float = 0


class Stamp(pydantic.BaseModel):
    cents: int = pydantic.Field(ge=0)


@pytest.mark.parametrize(
    "value", [Parcel("a"), Parcel("a", 1), Label(Parcel("a"), 1), Stamp(cents=1)]
)
def test_what_fits_its_class_is_written_as_ever(value: Any) -> None:
    assert encode_fitting(value) == encode(value)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (Parcel(cast("Any", 1)), r"This Parcel .*: Expected `str`, got `int` - at `\$\.id`\. Make"),
        (Parcel("a", cast("Any", "1")), r"Expected `int \| null`, got `str` - at `\$\.grams`"),
        (Label(Parcel(cast("Any", None))), r"This Label .*got `null` - at `\$\.parcel\.id`"),
        (Stamp.model_construct(cents=-1), r"(?s)This Stamp .*cents\n.*greater than or equal to 0"),
    ],
)
def test_what_does_not_fit_its_class_is_refused_with_field_and_type(value: Any, why: str) -> None:
    with pytest.raises(BadArguments, match=why):
        encode_fitting(value)


def test_a_decoder_is_made_once() -> None:
    assert decoder(dict[str, Line]) is decoder(dict[str, Line])
    assert decoder(Literal[1]) is not decoder(Literal[True])


@pytest.mark.parametrize("annotation", [Any, object, NoReturn])
def test_without_a_type_there_is_plain_data(annotation: Any) -> None:
    assert decoder(annotation)(b'{"a":[1,"x",null]}') == {"a": [1, "x", None]}


@pytest.mark.parametrize(
    ("annotation", "raw", "why"),
    [
        (int, b'"x"', "Stored data does not fit `int`: Expected `int`, got `str`."),
        (Line, b'{"sku":1}', "`Line`: Expected `str`, got `int` - at `$.sku`."),
        (list[Address], b"[{}]", "missing required field `street` - at `$[0]`."),
        (list[int], b"[1", "`list[int]`: Input data was truncated."),
        (Any, b"[" * 100_000, "maximum recursion depth exceeded"),
        (str, b'"\xff"', "utf-8"),
        (str, b'"\\ud800aaaaaa"', "JSON is malformed"),
        (Card, b'{"cardNumber":1}', "validation errors for Card"),
        (Colour, b'"green"', "`Colour`: Invalid enum value 'green'."),
    ],
)
def test_data_that_does_not_fit_is_refused(annotation: Any, raw: bytes, why: str) -> None:
    with pytest.raises(NotDecodable) as caught:
        decoder(annotation)(raw)
    assert why.casefold() in str(caught.value).casefold()
    assert str(caught.value).endswith(
        "It was written by other code, or the type has changed: give new fields a default, and"
        " keep reading what old ones may hold."
    )


@attrs.frozen
class Secretive:
    name: str
    _pin: int


class FloatEnum(enum.Enum):
    HALF = 0.5


class Holder(msgspec.Struct):
    account: Account | None


@pytest.mark.parametrize(
    ("annotation", "why"),
    [
        (Line | Address, "`Line | Address` cannot be read back from JSON: Type unions may not"),
        (str | Decimal, "Tag the classes of a union"),
        (Account, "`Account` cannot be read back from JSON: nothing tells how to rebuild a"),
        (list[Holder], "nothing tells how to rebuild a `Account`. Use builtins, dataclasses"),
        (dict[tuple[int, int], str], "keys of a dict must be of one scalar type"),
        (dict[str | int, str], "keys of a dict must be of one scalar type"),
        (Secretive, "the private field `_pin` of `Secretive` would not be written"),
        (FloatEnum, "Enums must contain either all str or all int values"),
        (Callable[[], int], "nothing tells how to rebuild"),
    ],
)
def test_a_type_that_cannot_be_read_back_is_refused_at_once(annotation: Any, why: str) -> None:
    with pytest.raises(BadDeclaration) as caught:
        decoder(annotation)
    assert why.replace("`Line | Address`", f"`{codec_spelling(annotation)}`") in str(caught.value)


def codec_spelling(annotation: Any) -> str:
    return repr(annotation).replace("typing.", "")


# Arguments


async def charge(order_id: str, cents: int = 100, *, at: dt.date | None = None) -> Decimal:
    raise NotImplementedError


CHARGE = Params.of(charge)


@pytest.mark.parametrize(
    ("args", "kwargs", "raw"),
    [
        (("o-1",), {}, b'["o-1",100,null]'),
        (("o-1", 5), {}, b'["o-1",5,null]'),
        ((), {"cents": 5, "order_id": "o-1"}, b'["o-1",5,null]'),
        (("o-1",), {"at": dt.date(2030, 1, 1)}, b'["o-1",100,"2030-01-01"]'),
    ],
)
def test_arguments_are_stored_in_the_order_of_the_parameters(
    args: tuple[Any, ...], kwargs: dict[str, Any], raw: bytes
) -> None:
    assert CHARGE.encode(args, kwargs) == raw
    assert CHARGE.check(args, kwargs) == raw


def test_arguments_come_back_as_a_call() -> None:
    raw = CHARGE.encode(("o-1",), {"at": dt.date(2030, 1, 1)})
    assert CHARGE.decode(raw) == (("o-1", 100), {"at": dt.date(2030, 1, 1)})


@given(st.data())
def test_any_call_binds_as_python_binds_it(data: st.DataObject) -> None:
    def fn(a: int, /, b: int, c: int = 3, *, d: int, e: int = 5) -> None: ...

    args = tuple(data.draw(st.lists(st.integers(), max_size=4)))
    kwargs = data.draw(st.dictionaries(st.sampled_from("abcdef"), st.integers(), max_size=5))
    params = Params.of(fn)
    try:
        bound = params._signature.bind(*args, **kwargs)  # pyright: ignore[reportPrivateUsage]
    except TypeError:
        with pytest.raises(BadArguments):
            params.encode(args, kwargs)
        return
    bound.apply_defaults()
    assert params.decode(params.encode(args, kwargs)) == (bound.args, bound.kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs", "why"),
    [
        ((), {}, "missing a required argument: 'order_id'."),
        (("o", 1, 2), {}, "too many positional arguments."),
        (("o",), {"order_id": "o"}, "multiple values for argument 'order_id'."),
        (("o",), {"cent": 1}, "unexpected keyword argument 'cent'. Did you mean `cents`?"),
        (("o",), {"zzz": 1}, "unexpected keyword argument 'zzz'."),
    ],
)
def test_a_call_that_does_not_fit_is_refused(
    args: tuple[Any, ...], kwargs: dict[str, Any], why: str
) -> None:
    with pytest.raises(BadArguments) as caught:
        CHARGE.encode(args, kwargs)
    assert str(caught.value).endswith(why)
    assert str(caught.value).startswith("Cannot call `charge(order_id: str, cents: int = 100, at: ")


def test_check_names_the_parameter_what_it_takes_and_what_it_got() -> None:
    def pay(order_id: str, cents: int) -> None: ...

    with pytest.raises(BadArguments) as caught:
        Params.of(pay).check(("o-1", "5"), {})
    assert str(caught.value) == (
        "Argument `cents` of `pay(order_id: str, cents: int)` does not fit `int`: Expected `int`,"
        ' got `str`. Got "5".'
    )


def test_an_argument_that_cannot_be_written_is_named() -> None:
    with pytest.raises(NotEncodable) as caught:
        CHARGE.encode(({"a": Account()},), {})
    assert str(caught.value).startswith(
        "Argument `order_id` of `charge`: A value of type `Account` at `['a']` cannot be written"
    )


def test_arguments_of_an_older_signature_take_the_new_defaults() -> None:
    assert CHARGE.decode(b'["o-1"]') == (("o-1", 100), {"at": None})


def test_a_default_is_never_shared_between_calls() -> None:
    def fn(a: int, seen: list[int] = []) -> None: ...  # noqa: B006

    params = Params.of(fn)
    first = params.decode(b"[1]")[0][1]
    first.append(1)
    assert params.decode(b"[1]")[0][1] == []


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"[]", "No argument is stored for the parameter `order_id` of `charge("),
        (b'["o",1,null,4]', "4 arguments are stored for `charge("),
        (b'["o","x",null]', "Argument `cents` of `charge("),
        (b'{"a":1}', "The stored arguments of `charge` are no JSON array: Expected `array`"),
        (b"[", "The stored arguments of `charge` are no JSON array: Input data was truncated."),
    ],
)
def test_stored_arguments_that_do_not_fit_are_refused(raw: bytes, why: str) -> None:
    with pytest.raises(NotDecodable) as caught:
        CHARGE.decode(raw)
    assert str(caught.value).startswith(why)


def test_a_function_without_parameters_takes_none() -> None:
    def tick() -> None: ...

    assert Params.of(tick).encode((), {}) == b"[]"
    assert Params.of(tick).decode(b"[]") == ((), {})


def test_star_arguments_are_refused() -> None:
    def many(*items: int) -> None: ...
    def named(**items: int) -> None: ...

    with pytest.raises(BadDeclaration) as caught:
        Params.of(many)
    assert str(caught.value) == (
        "`many` takes `*items`, but durable functions take named parameters, because every argument"
        " is stored and checked by its parameter. Write `items: list` instead."
    )
    with pytest.raises(BadDeclaration, match=r"`\*\*items`.*Write `items: dict` instead"):
        Params.of(named)


def test_a_parameter_of_a_type_that_cannot_be_read_is_refused() -> None:
    def open_account(account: Account) -> None: ...

    with pytest.raises(BadDeclaration, match="Parameter `account` of `open_account`: `Account`"):
        Params.of(open_account)


def test_a_default_that_does_not_fit_is_refused() -> None:
    def wrong(cents: int = None) -> None: ...  # pyright: ignore  # noqa: RUF013
    def unwritable(client: Any = Account) -> None: ...

    with pytest.raises(BadDeclaration) as caught:
        Params.of(wrong)
    assert str(caught.value) == (
        "The default None of parameter `cents` of `wrong` does not fit `int`: Expected `int`, got"
        " `null`. Defaults are stored like arguments: widen the annotation (`| None`), or use a"
        " default of that type."
    )
    with pytest.raises(BadDeclaration, match="of parameter `client` of `unwritable`"):
        Params.of(unwritable)


def test_the_result_decoder_reads_what_awaiting_gives() -> None:
    def coroutine() -> Coroutine[Any, Any, Decimal]: ...  # pyright: ignore
    def awaitable() -> Awaitable[Decimal]: ...  # pyright: ignore
    def untyped():  # pyright: ignore
        ...

    for fn in (charge, coroutine, awaitable):
        assert Params.of(fn).result(b'"1.50"') == Decimal("1.50")
    assert Params.of(untyped).result(b'"1.50"') == "1.50"  # pyright: ignore


def test_only_asking_for_the_result_looks_at_the_return_type() -> None:
    def handler() -> Line | Address: ...  # pyright: ignore

    params = Params.of(handler)
    assert params.returns == Line | Address
    with pytest.raises(BadDeclaration, match="What `handler` returns: `"):
        _ = params.result


def test_hints_are_found_in_the_functions_around_and_others_are_any() -> None:
    class Local(msgspec.Struct):
        x: int

    def seen(a: "Local", b: "Decimal") -> "Local":
        return Local(a.x)

    def unseen(a: "Hidden", b: "Decimal") -> None: ...  # pyright: ignore  # noqa: F821

    assert Params.of(seen).decode(b'[{"x":1},"1"]') == ((Local(1), Decimal(1)), {})
    assert Params.of(seen).unresolved == ()
    assert Params.of(unseen).decode(b'[{"x":1},"1"]') == (({"x": 1}, Decimal(1)), {})
    assert Params.of(unseen).unresolved == ("a",)


def test_an_annotation_that_is_no_type_is_refused() -> None:
    def fn(a: "1+") -> None: ...  # pyright: ignore  # noqa: F722

    with pytest.raises(BadDeclaration, match=r"The annotation `1\+` of `a` of `fn` is no type"):
        Params.of(fn)


def test_constraints_in_annotations_are_kept() -> None:
    from typing import Annotated

    def fn(cents: Annotated[int, msgspec.Meta(ge=1)]) -> None: ...

    with pytest.raises(BadArguments, match="Expected `int` >= 1"):
        Params.of(fn).check((0,), {})


# Errors


class CardDeclined(Exception):
    def __init__(self, reason: str, cents: int) -> None:
        super().__init__(reason)
        self.cents = cents
        self._secret = "s"

    class Blocked(Exception):
        pass


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def test_an_error_comes_back_with_its_class_arguments_and_public_state() -> None:
    error = raised(CardDeclined("no funds", 500))
    error.add_note("second try")
    back = decode_error(encode_error(error))
    assert type(back) is CardDeclined
    assert back.args == ("no funds",)
    assert str(back) == "no funds"
    assert back.cents == 500
    assert not hasattr(back, "_secret")
    assert back.__notes__ == ["second try"]


def test_the_original_trace_is_the_cause() -> None:
    back = decode_error(encode_error(raised(ValueError("x"))))
    assert isinstance(back.__cause__, RemoteTraceback)
    assert "in raised" in str(back.__cause__)
    assert "ValueError: x" in str(back.__cause__)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        KeyError("k"),
        OSError(2, "No such file"),
        FileNotFoundError(2, "No such file", "f"),
        Frozen(3),
        CardDeclined.Blocked("b"),
        StepError("shop:Gone", "away"),
        BadArguments("b"),
        TimeoutError(),
        AssertionError(),
    ],
    ids=repr,
)
def test_common_errors_come_back_alike(error: Exception) -> None:
    back = decode_error(encode_error(raised(error)))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert back.args == error.args
    assert getattr(back, "errno", None) == getattr(error, "errno", None)


def test_a_group_comes_back_with_its_errors() -> None:
    group = ExceptionGroup("two", [CardDeclined("no", 1), ExceptionGroup("in", [KeyError("k")])])
    back = decode_error(encode_error(raised(group)))
    assert isinstance(back, ExceptionGroup)
    declined, inner = back.exceptions
    assert isinstance(declined, CardDeclined)
    assert isinstance(inner, ExceptionGroup)
    assert isinstance(inner.exceptions[0], KeyError)


def test_no_init_is_called() -> None:
    class_name = f"{__name__}:Explosive"
    back = decode_error(msgspec.json.encode({"type": class_name, "message": "m", "args": ["m"]}))
    assert type(back) is Explosive
    assert str(back) == "m"


class Explosive(Exception):
    def __new__(cls, *args: Any) -> "Explosive":
        raise AssertionError

    def __init__(self) -> None:
        raise AssertionError


@pytest.mark.parametrize(
    "type_name",
    [
        "shop.unknown:Gone",
        "builtins:KeyboardInterrupt",
        "builtins:int",
        "builtins:Nothing.Here",
        "os:path.join",
        "this:Zen",
        "",
        ":",
        "builtins:",
        f"{__name__}:test_x.<locals>.Local",
    ],
)
def test_a_class_that_is_not_loaded_or_no_error_gives_a_step_error(type_name: str) -> None:
    back = decode_error(msgspec.json.encode({"type": type_name, "message": "gone"}))
    assert type(back) is StepError
    assert (back.type_name, back.message) == (type_name, "gone")
    assert "this" not in sys.modules


def test_a_local_class_gives_a_step_error() -> None:
    class Local(Exception):
        pass

    back = decode_error(encode_error(Local("here")))
    assert type(back) is StepError
    assert str(back).endswith("Local: here")


def test_an_error_that_was_only_passed_through_is_written_as_it_was() -> None:
    raw = msgspec.json.encode(
        {"type": "other:Gone", "message": "m", "args": [1, 2], "state": {"a": 1}, "trace": "t"}
    )
    assert encode_error(raised(decode_error(raw))) == raw


def test_an_error_that_cannot_print_itself_without_its_state_gives_a_step_error() -> None:
    back = decode_error(encode_error(Private(7)))
    assert type(back) is StepError
    assert back.message == "private 7"


class Private(Exception):
    def __init__(self, n: int) -> None:
        super().__init__(n)
        self._n = n

    def __str__(self) -> str:
        return f"private {self._n}"


class BadStr(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


class BadDict(Exception):
    @property
    def __dict__(self) -> Any:  # pyright: ignore
        raise RuntimeError("no")


class BadArgs(Exception):
    @property
    def args(self) -> Any:  # pyright: ignore
        raise RuntimeError("no")


def deep_error() -> BaseException:
    def dive() -> None:
        dive()

    try:
        dive()
    except RecursionError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    "error",
    [
        BadStr("x"),
        BadDict("x"),
        BadArgs("x"),
        ValueError("\ud800"),
        ValueError(Account(), math.nan),
        type("Odd", (Exception,), {"__module__": None, "__qualname__": "Odd.x"})("x"),
        asyncio.CancelledError(),
        SystemExit(3),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        ValueError("x" * 1_000_000),
        BaseExceptionGroup("g", [KeyboardInterrupt()]),
        deep_error(),
    ],
    ids=lambda e: type(e).__name__.encode("ascii", "replace").decode(),
)
def test_writing_an_error_never_raises(error: BaseException) -> None:
    raw = encode_error(raised(error))
    assert len(raw) < 60_000
    assert isinstance(decode_error(raw), Exception)
    assert error_summary(raw)


def test_arguments_that_cannot_be_written_are_replaced_by_the_message() -> None:
    back = decode_error(encode_error(ValueError("lost", Account)))
    assert back.args == (str(("lost", Account)),)


def test_the_trace_is_short() -> None:
    trace = str(decode_error(encode_error(deep_error())).__cause__)
    assert len(trace.splitlines()) <= 25
    assert "RecursionError" in trace


@pytest.mark.parametrize(
    ("raw", "summary"),
    [
        (encode_error(CardDeclined("no funds", 1)), "CardDeclined: no funds"),
        (encode_error(CardDeclined.Blocked()), "Blocked"),
        (encode_error(ValueError("one\ntwo")), "ValueError: one …"),
        (b"[", "an error that cannot be read"),
    ],
)
def test_a_summary_is_one_line(raw: bytes, summary: str) -> None:
    assert error_summary(raw) == summary


def test_what_is_no_error_is_refused() -> None:
    with pytest.raises(NotDecodable, match="A stored error cannot be read: Expected `object`"):
        decode_error(b"[]")


# Digests


def test_a_digest_is_short_and_the_same_everywhere() -> None:
    assert digest(b"pavane") == "e99141f5e2bc3ed9"
    assert len(digest(b"")) == 16
    assert digest(b"a") != digest(b"b")
