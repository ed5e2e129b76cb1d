"""Keys, Redis names, tokens, and the one form that a call's arguments have on every side of the wire."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal, localcontext
from enum import Enum, Flag, IntEnum, IntFlag, StrEnum
from types import MappingProxyType
from unittest.mock import MagicMock
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, RootModel, SecretStr, field_serializer

from celery_mlcache.errors import CacheKeyError, SerializationError
from celery_mlcache.keys import (
    MAX_KEY_BYTES,
    KnownNames,
    RedisNames,
    call_key,
    canonical,
    check_key,
    check_prefix,
    check_tags,
    format_token,
    parse_token,
    wire,
)
from celery_mlcache.wire import MAX_STAMP

# ---- users' keys ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["k", "user:1", "ключ", "a b", "x" * MAX_KEY_BYTES, "é" * (MAX_KEY_BYTES // 2), "{tag}"]
)
def test_a_key_is_1_to_1024_bytes_of_text(key):
    """What is allowed comes back unchanged."""
    assert check_key(key) == key


@pytest.mark.parametrize(
    ("key", "why"),
    [
        (None, "must be a str, not NoneType"),
        (b"k", "must be a str, not bytes"),
        (1, "must be a str, not int"),
        ([], "must be a str, not list"),
        ("", "must not be empty"),
        ("x" * (MAX_KEY_BYTES + 1), "1025 bytes"),
        ("é" * (MAX_KEY_BYTES // 2) + "x", "1025 bytes"),
        ("a\nb", "control characters"),
        ("a\x00", "control characters"),
        ("a\x7f", "control characters"),
        ("a\x85", "control characters"),
        ("a\u2028b", "control characters"),
        ("\ud800", "not valid Unicode"),
    ],
    ids=repr,
)
def test_anything_else_is_refused_with_its_reason(key, why):
    """A key that no level could hold is an error before anything is sent."""
    with pytest.raises(CacheKeyError, match=why):
        check_key(key)


@given(st.text())
def test_what_is_accepted_fits_a_message(key):
    """A key that passes has no line break in it and survives UTF-8."""
    try:
        check_key(key)
    except CacheKeyError:
        return
    assert key.encode().decode() == key
    assert "\n" not in key


def test_a_subclass_of_str_becomes_a_str():
    """Its own hash and comparison never run inside an L1 engine."""

    class Odd(str):
        __slots__ = ()

        def __hash__(self):
            raise AssertionError

    assert type(check_key(Odd("k"))) is str


# ---- tags and prefixes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [["a", "b", "a"], ("a", "b"), {"a": 1, "b": 2}.keys() | set()])
def test_tags_are_told_once(given):
    """A list, a tuple or a set of them, each once."""
    assert sorted(check_tags(given)) == ["a", "b"]
    assert len(check_tags(given)) == 2


@pytest.mark.parametrize("given", ["tag", b"tag", {"a": 1}, 5, None, iter(["a"])])
def test_tags_are_a_collection(given):
    """A str would be taken for its letters, and what can be walked once only is used twice."""
    with pytest.raises(TypeError, match="tags must be a list, tuple or set of str"):
        check_tags(given)


@pytest.mark.parametrize("bad", ["", "a\nb", "x" * 1025, 5, None, "\ud800"])
def test_a_tag_is_checked_as_a_key_is(bad):
    """It is a line of a message and a part of a Redis key; the error says that it is a tag."""
    with pytest.raises(CacheKeyError, match=r"^tag "):
        check_tags(["good", bad])
    with pytest.raises(CacheKeyError, match=r"^prefix "):
        check_prefix(bad)


def test_there_are_not_too_many_tags():
    """Each costs Redis a look-up."""
    assert len(check_tags([f"t{number}" for number in range(64)])) == 64
    with pytest.raises(CacheKeyError, match="is one of 65 tags; at most 64"):
        check_tags([f"t{number}" for number in range(65)])


# ---- Redis names ------------------------------------------------------------------------------------------------


def test_every_key_of_a_namespace_has_its_hash_tag():
    """A script's keys share one cluster slot, whatever braces users put into theirs."""
    names = RedisNames("shop")
    for name in (names.counter, names.floors, names.value("k"), names.value("{other}"), names.tag("{other}")):
        assert name[name.index("{") : name.index("}") + 1] == "{shop}"


def test_names_do_not_collide():
    """No user key reaches the counter or the floor, and no namespace another's values."""
    one, other = RedisNames("a"), RedisNames("a:v1")
    names = [one.counter, one.floors, one.channel, one.value("stamp"), one.value("floors"), one.tag("stamp")]
    assert len(set(names)) == len(names)
    assert one.value("v1:k") != other.value("k")
    assert not other.value("k").startswith(one.value_prefix)


def test_the_channel_names_the_database():
    """Redis pub/sub knows no databases: two of them must not hear one another."""
    assert RedisNames("a", 0).channel != RedisNames("a", 1).channel


def test_the_value_prefix_is_what_stands_before_a_key():
    """The rest of a value's name is the user's key."""
    names = RedisNames("a")
    assert names.value("k") == names.value_prefix + "k"


# ---- tokens -----------------------------------------------------------------------------------------------------


@given(st.integers(0, MAX_STAMP), st.sampled_from(["default", "a@b", "shop:eu"]))
def test_a_token_comes_back(stamp, namespace):
    """Formatting and parsing are inverse."""
    assert parse_token(format_token(namespace, stamp), namespace) == stamp


@pytest.mark.parametrize(
    "token", [None, 5, b"a@5", "", "a", "a@", "a@x", "a@-1", "b@5", "@5", "a@5.0", "a@ 5", "a@٣", f"a@{MAX_STAMP + 1}"]
)
def test_what_is_no_token_of_the_namespace_is_a_value_error(token):
    """Anything may stand in a message's header."""
    with pytest.raises(ValueError, match="barrier"):
        parse_token(token, "a")


@given(st.text())
def test_no_text_raises_anything_else(token):
    """Random text is a ValueError or a token."""
    try:
        assert 0 <= parse_token(token, "a") <= MAX_STAMP
    except ValueError as exc:
        assert "barrier" in str(exc)  # noqa: PT017 - only sometimes


@pytest.mark.parametrize("digits", ["9" * 4000, "9" * 5000], ids=len)
def test_a_token_with_too_many_digits_is_no_token(digits):
    """A hostile header costs nothing and is refused in our words."""
    with pytest.raises(ValueError, match="barrier"):
        parse_token(f"a@{digits}", "a")


# ---- arguments of calls -----------------------------------------------------------------------------------------


class Colour(Enum):
    RED = "red"


class Level(IntEnum):
    HIGH = 3


@dataclass
class Point:
    x: int
    y: int


class Model(BaseModel):
    when: date
    name: str = "n"


class Numbers(RootModel):
    root: list[int]


class Size(StrEnum):
    LARGE = "large"


class Labelled(str, Enum):  # noqa: UP042 - its value is not its text
    """Its members are texts, and their values something else."""

    def __new__(cls, text, label):
        member = str.__new__(cls, text)
        member._value_ = label
        return member

    ONE = ("one", "The first")


class Bits(IntFlag):
    READ = 1
    WRITE = 2


class Mode(Flag):
    FAST = 4


class Holiday(date, Enum):
    NEW_YEAR = 2026, 1, 1


class Text(str):
    __slots__ = ()

    def __str__(self):
        return "something else"

    __repr__ = __str__


class Whole(int):
    def __repr__(self):
        return "many"

    __str__ = __repr__

    def __index__(self):
        return 0


class Part(float):
    def __repr__(self):
        return "some"

    __float__ = __hash__ = None


class Moment(datetime):
    def isoformat(self, *args):
        return "now"


class Blob(bytes):
    pass


class Ratio(Decimal):
    pass


class Ident(UUID):
    pass


class Bag(dict):
    pass


class Row(list):
    pass


class Custom:
    """Says itself what it is in JSON, as kombu asks."""

    def __init__(self, *content):
        self.content = content

    def __json__(self):
        return {"content": self.content}


Pair = namedtuple("Pair", "left right")  # noqa: PYI024


def over_the_wire(value):
    """Return *value* as a worker gets it with Celery's default serializer."""
    from kombu.utils.json import dumps, loads

    return loads(dumps(value))


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -5,
        10**30,
        1.5,
        1e300,
        "text",
        "ключ",
        "",
        (),
        (1, 2),
        [1, [2, (3, [])]],
        {},
        {"a": 1, "b": [1, {"c": (2,)}]},
        {1: "int key", 2: {3: "deep"}},
        {True: 1},
        {None: 1},
        {1.5: "float key"},
        OrderedDict([("b", 1), ("a", 2)]),
        Level.HIGH,
        {"level": Level.HIGH},
        {Level.HIGH: 1},
        datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC),
        datetime(2026, 7, 2, 3, 4, 5, tzinfo=ZoneInfo("Europe/Vienna")),
        datetime(2026, 1, 2, tzinfo=timezone(timedelta(hours=5, minutes=30))),
        datetime(2026, 1, 2, 3, 4),  # noqa: DTZ001 - users have them
        date(2026, 1, 2),
        time(3, 4, 5),
        Decimal("1.10"),
        Decimal("1E+3"),
        UUID(int=5),
        b"bytes",
        b"\xff\x00",
        b"",
        [Decimal("0.1"), (UUID(int=1), b"x", {"d": date(2026, 1, 2)})],
        float("nan"),
        -0.0,
        {float("nan"): 1, float("inf"): 2, -float("inf"): 3, -0.0: 4},
        Size.LARGE,
        {Size.LARGE: 1},
        Labelled.ONE,
        {Labelled.ONE: Labelled.ONE},
        Bits.READ | Bits.WRITE,
        {Bits.WRITE: 1},
        Holiday.NEW_YEAR,
        Text("text"),
        {Text("key"): Text("text")},
        Whole(7),
        {Whole(7): Whole(8)},
        Part(1.5),
        [Moment(2026, 1, 2, tzinfo=UTC)],
        Blob(b"x"),
        Ratio("1.50"),
        Ident(int=7),
        Bag(a=Row([1, 2])),
        Pair(1, (2,)),
        Custom(1, Custom("x", None)),
        datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Vienna")),
        datetime(1890, 1, 1, tzinfo=ZoneInfo("Europe/Vienna")),
        time(3, 4, tzinfo=UTC),
        time(3, 4, tzinfo=ZoneInfo("Europe/Vienna")),
        datetime(1, 1, 1),  # noqa: DTZ001
        date.max,
        Decimal("NaN"),
        Decimal("-Infinity"),
        Decimal("-0.00"),
        10**4000,
        {"__type__": "date"},
        {"__type__": "date", "__value__": "2026-01-02", "more": 1},
    ],
    ids=lambda value: f"{type(value).__name__} {value!r:.30}",
)
def test_producer_and_worker_agree_on_the_form_of_an_argument(value):
    """What Celery's JSON makes of a value has the same form as the value."""
    assert canonical(over_the_wire(value)) == canonical(value)
    assert repr(wire(value)) == repr(over_the_wire(value))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, 2), [1, 2]),
        ({1: 2}, {"1": 2}),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({1, 2, 30}, {30, 2, 1}),
        ({1, 2}, frozenset({2, 1})),
        (Level.HIGH, 3),
        (Colour.RED, "red"),
        ({Colour.RED: 1}, {"red": 1}),
        (bytearray(b"x"), b"x"),
        (MappingProxyType({"a": 1}), {"a": 1}),
        (Point(1, 2), {"x": 1, "y": 2}),
        (Model(when=date(2026, 1, 2)), {"when": "2026-01-02", "name": "n"}),
        (Numbers([1, 2]), [1, 2]),
        (Mode.FAST, 4),
        ({Mode.FAST: 1}, {"4": 1}),
        (UserDict(a=1), {"a": 1}),
        ([Point(Level.HIGH, (1,))], ({"y": [1], "x": 3},)),
    ],
    ids=repr,
)
def test_forms_that_the_wire_makes_equal_are_equal(one, other):
    """What a worker cannot tell apart has one key."""
    assert canonical(one) == canonical(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, "1"),
        (1, True),
        (0, False),
        (1, 1.0),
        (None, "None"),
        ("", None),
        (["a", "b"], ["ab"]),
        (["a", ["b"]], [["a"], "b"]),
        ([], {}),
        ([1], {1}),
        (b"x", "x"),
        (date(2026, 1, 2), "2026-01-02"),
        (Decimal("1.0"), Decimal("1.00")),
        (timedelta(seconds=1), timedelta(milliseconds=1)),
        (UUID(int=5), str(UUID(int=5))),
        ({"a": None}, {}),
        ("1:x", "1"),
        ([["a"], []], [["a", []]]),
        ({"a": "b"}, ["a", "b"]),
        (0.0, -0.0),
        (float("nan"), "nan"),
        (date(2026, 1, 2), datetime(2026, 1, 2)),  # noqa: DTZ001 - users have them
        (datetime(2026, 1, 2), datetime(2026, 1, 2, tzinfo=UTC)),  # noqa: DTZ001
        (datetime(2026, 1, 2, tzinfo=UTC), datetime(2026, 1, 2, 1, tzinfo=timezone(timedelta(hours=1)))),
        (time(1), time(1, tzinfo=UTC)),
        (Decimal(1), 1),
        (Decimal(0), Decimal("-0")),
        ({1: "a"}, {1.0: "a"}),
        ({True: "a"}, {"True": "a"}),
        ({None: "a"}, {"None": "a"}),
        pytest.param({"a", "b"}, ["a", "b"], id="a set-a list"),  # its repr is another in every process
    ],
    ids=repr,
)
def test_forms_of_different_values_differ(one, other):
    """Different arguments never share a key."""
    assert canonical(one) != canonical(other)


WIRE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def typed(value):
    """Return a form in which 1, 1.0 and True differ."""
    if isinstance(value, list):
        return "list", tuple(typed(item) for item in value)
    if isinstance(value, dict):
        return "dict", frozenset((key, typed(item)) for key, item in value.items())
    return type(value).__name__, repr(value)


@given(WIRE, WIRE)
def test_two_wire_values_have_the_same_form_only_if_they_are_the_same(one, other):
    """No two structures share their bytes."""
    assert (canonical(one) == canonical(other)) == (typed(one) == typed(other))


@given(WIRE)
def test_every_wire_value_keeps_its_form_over_the_wire(value):
    """The form is what both sides of a message compute."""
    assert canonical(over_the_wire(value)) == canonical(value)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (object(), "arguments"),
        ({"a": [1, object()]}, r"arguments\['a'\]\[1\]"),
        ([(0, {"b": print})], r"arguments\[0\]\[1\]\['b'\]"),
        ({(1, 2): 3}, "arguments"),
        (1j, "arguments"),
        (Point, "arguments"),
        (["\ud800"], r"arguments\[0\]"),
    ],
    ids=["object", "nested", "function", "tuple key", "complex", "class", "surrogate"],
)
def test_what_has_no_form_is_refused_with_its_path(value, path):
    """Never keyed by repr: a partial key serves wrong results."""
    with pytest.raises(SerializationError, match=f"^{path}: "):
        canonical(value)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ([{1: "a", "1": "b"}], r"arguments\[0\]: dict has two keys that are '1' on the wire"),
        ({None: 1, "null": 2}, "two keys that are 'null'"),
        ({"__type__": "date", "__value__": "2026-01-02"}, "keys of kombu's envelopes"),
        (10**5000, "more digits than JSON takes"),
        ({10**5000: 1}, "more digits than JSON takes"),
        ({b"k": 1}, "key of type bytes"),
        ({date(2026, 1, 2): 1}, "key of type date"),
        ({UUID(int=1): 1}, "key of type UUID"),
        (memoryview(b"x"), "builtins.memoryview has no form"),
        (MagicMock(), "has no form"),
        (range(3), "builtins.range has no form"),
        ({"a": 1}.items(), "has no form"),
        (Model, "has no form"),
        (Colour, "has no form"),
        (SecretStr("s"), "has no form"),
    ],
    ids=lambda value: f"{value!r:.30}" if isinstance(value, str) else type(value).__name__,
)
def test_what_the_wire_would_alter_or_refuse_is_refused(value, why):
    """Two arguments that differ never share a key because one of them did not arrive as it was."""
    with pytest.raises(SerializationError, match=why):
        canonical(value)
    with pytest.raises(SerializationError, match=why):
        wire(value)


class Fine(datetime):
    """Counts nanoseconds, of which the wire knows nothing."""

    nanosecond = 5

    def __eq__(self, other):
        return isinstance(other, Fine) and datetime.__eq__(self, other)

    __hash__ = datetime.__hash__


class Rounded(Decimal):
    def __str__(self):
        return f"{self:.1f}"


class Longer(timedelta):
    nanoseconds = 5


@pytest.mark.parametrize(
    "value", [Fine(2026, 1, 2), Rounded("1.11"), Longer(1)], ids=lambda value: type(value).__name__
)
def test_a_subclass_that_holds_more_than_its_base_is_refused(value):
    """What would not count might make the difference."""
    with pytest.raises(SerializationError, match=type(value).__name__):
        canonical(value)


class Login(BaseModel):
    user: str
    password: SecretStr


class Partial(BaseModel):
    a: int
    b: int = Field(0, exclude=True)


class Nested(BaseModel, extra="allow", arbitrary_types_allowed=True):
    inner: object


@dataclass
class Holder:
    inner: object


@pytest.mark.parametrize(
    "model",
    [
        Login(user="u", password="p"),
        Partial(a=1),
        Nested(inner=Login(user="u", password="p")),
        Nested(inner=[{"a": (Partial(a=1),)}]),
        Nested(inner=Holder(SecretStr("s"))),
        Nested(inner=1, more=SecretStr("s")),
    ],
    ids=repr,
)
def test_a_model_that_hides_a_part_from_its_dump_is_refused(model):
    """Two logins whose passwords are stars in JSON would share one result."""
    with pytest.raises(SerializationError, match="leaves a secret or an excluded field out"):
        canonical({"model": model})


def test_a_field_that_is_excluded_at_times_hides_too():
    """Two values that are both left out would share a form."""
    pytest.importorskip("pydantic", minversion="2.12", reason="older releases have no exclude_if")

    class Sparse(BaseModel):
        a: int = Field(0, exclude_if=lambda value: value < 2)

    with pytest.raises(SerializationError, match="leaves a secret or an excluded field out"):
        canonical(Sparse(a=1))


class Angry:
    def __init__(self, error):
        self.error = error

    def __json__(self):
        raise self.error


@dataclass
class Broken:
    x: int

    def __getattribute__(self, name):
        if name == "x":
            raise LookupError(name)
        return object.__getattribute__(self, name)


class Undumpable(BaseModel):
    x: int

    @field_serializer("x")
    def fail(self, _):
        raise OSError


class Nowhere(tzinfo):
    def utcoffset(self, _):
        raise KeyError

    tzname = dst = utcoffset


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (Angry(ZeroDivisionError()), "Angry cannot be read for a key: ZeroDivisionError"),
        (Broken(1), "Broken cannot be read for a key: LookupError"),
        (Undumpable(x=1), "Undumpable cannot be read for a key"),
        (datetime(2026, 1, 2, tzinfo=Nowhere()), "datetime cannot be read for a key: KeyError"),
        (time(1, tzinfo=Nowhere()), "time cannot be read for a key: KeyError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_of_the_value_itself_becomes_ours(value, error):
    """A call is bypassed, and never broken, by what an argument raises when it is read."""
    with pytest.raises(SerializationError, match=rf"^here\[0\]: .*{error}") as caught:
        canonical([value], "here")
    assert caught.value.__cause__ is not None


def test_what_celery_raises_in_a_task_passes():
    """A time limit that strikes while a key is made ends the task."""
    with pytest.raises(SoftTimeLimitExceeded):
        canonical([Angry(SoftTimeLimitExceeded())])


def test_the_context_of_decimals_makes_no_difference():
    """A process that writes exponents in lower case has the same keys."""
    usual = canonical(Decimal("1E+30"))
    with localcontext() as context:
        context.capitals = 0
        assert canonical(Decimal("1E+30")) == usual


def test_sets_are_shown_in_one_order():
    """What explains a key is the same in every process."""
    assert wire({"c", "a", "b"}) == ["a", "b", "c"]
    assert wire([frozenset({(2, 1), (1, 2)}), bytearray(b"x")]) == [[[1, 2], [2, 1]], b"x"]


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.lists(st.text())))
def test_known_names_have_the_form_of_the_mapping(values):
    """What is prepared gives what is computed."""
    assert KnownNames(values).form({**values, "other": object()}) == canonical(values)


def test_known_names_tell_the_path_of_what_has_no_form():
    """As canonical does."""
    names = KnownNames(["a", "b"])
    with pytest.raises(SerializationError, match=r"^arguments\['b'\]\[1\]: builtins.object has no form"):
        names.form({"a": 1, "b": [1, object()]})
    loop = []
    loop.append(loop)
    with pytest.raises(SerializationError, match=r"^vary\['b'\]: list is nested too deep"):
        names.form({"a": 1, "b": loop}, "vary")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "840c1a235567ab98878babc5a978e327"),
        ({"sku": "A-1", "n": 12}, "39ea8b1ecb53c44d8f4390b70169be78"),
        ({"a": (None, True, 1.5, b"x"), "b": {"k": {1, 2}}}, "a41d269c03b55caeebe6e10f7925bc23"),
        (
            {"a": [date(2026, 1, 2), datetime(2026, 1, 2, tzinfo=UTC), time(1), timedelta(1)]},
            "470e1df7058d2e8c89a25f1c148738ac",
        ),
        (
            {"a": [Decimal("1.0"), UUID(int=1), Colour.RED, Point(1, 2)], "ä": {1: 2}},
            "269573b023a0bfb49a2f982f0f3ab1c1",
        ),
    ],
)
def test_keys_of_earlier_releases_stay_valid(arguments, expected):
    """Processes of two releases find one another's results while a fleet is renewed."""
    assert call_key("task:x", arguments) == f"task:x:{expected}"


def test_a_value_that_holds_itself_is_refused():
    """Depth without end is an error of ours."""
    loop = []
    loop.append(loop)
    with pytest.raises(SerializationError, match="nested too deep"):
        canonical(loop)


def test_a_call_key_names_its_task():
    """People see whose result it is, and two tasks never share one."""
    one, other = call_key("shop.price", {"sku": "A"}), call_key("shop.stock", {"sku": "A"})
    assert one.startswith("shop.price:")
    assert one.rpartition(":")[2] == other.rpartition(":")[2]
    assert check_key(one) == one


@given(st.dictionaries(st.text(max_size=5), st.integers()), st.dictionaries(st.text(max_size=5), st.integers()))
def test_call_keys_are_equal_for_equal_arguments_only(one, other):
    """Order does not matter; anything else does."""
    assert (call_key("f", one) == call_key("f", other)) == (one == other)
