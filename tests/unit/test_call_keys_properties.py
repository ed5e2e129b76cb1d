"""Laws of the keys of calls, over random arguments: producer and worker agree, and nothing else does."""

from __future__ import annotations

import inspect
from collections import namedtuple
from datetime import UTC, timedelta, timezone
from enum import IntEnum, StrEnum
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from kombu.serialization import dumps, loads

from celery_mlcache.calls import CallKeys, CallShape
from celery_mlcache.keys import call_key, canonical, wire


class Level(IntEnum):
    LOW = 1
    HIGH = 3


class Size(StrEnum):
    SMALL = "1"
    LARGE = "true"


class Whole(int):
    pass


class Text(str):
    __slots__ = ()


Pair = namedtuple("Pair", "left right")  # noqa: PYI024

ZONES = st.sampled_from([None, UTC, timezone(timedelta(hours=5, minutes=30)), ZoneInfo("Europe/Vienna")])
KEYS = (
    st.text(max_size=3)
    | st.integers()
    | st.floats()
    | st.booleans()
    | st.none()
    | st.sampled_from([*Level, *Size])
    | st.builds(Text, st.text(max_size=3))
)
# Few values that look alike, so that random pairs meet.
TWINS = st.sampled_from(
    [None, "null", True, 1, 1.0, "1", b"1", "true", False, 0, 0.0, -0.0, "", "[]", "s1:1", float("nan"), "NaN", 3]
) | st.sampled_from([*Level, *Size, Whole(1), Text("1"), Text("true")])
SCALARS = (
    TWINS
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.datetimes(timezones=ZONES)
    | st.dates()
    | st.times(timezones=st.sampled_from([None, UTC]))
    | st.decimals()
    | st.uuids()
)


def without_twins(pairs):
    """Return a dict of those whose keys stay apart in JSON."""
    return dict({next(iter(over_the_wire({key: 0}))): (key, item) for key, item in pairs}.values())


def containers(inner):
    """Return what kombu's JSON can hold *inner* in."""
    return (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.tuples(inner, inner)
        | st.builds(Pair, inner, inner)
        | st.lists(st.tuples(KEYS, inner), max_size=3).map(without_twins)
    )


def over_the_wire(value):
    """Return *value* as a worker gets it with Celery's default serializer."""
    content_type, encoding, payload = dumps(value, "json")
    return loads(payload, content_type, encoding)


def typed(value):
    """Return a form that is equal for equal values of equal types only."""
    if isinstance(value, list):
        return "list", tuple(typed(item) for item in value)
    if isinstance(value, dict):
        return "dict", frozenset((key, typed(item)) for key, item in value.items())
    return type(value).__name__, repr(value)


VALUES = st.recursive(SCALARS, containers, max_leaves=8)
ALIKE = st.recursive(TWINS, containers, max_leaves=3)
ARGUMENTS = ALIKE | SCALARS
# What may stand in a label.
SHOWN = st.recursive(
    TWINS | st.text(st.characters(exclude_categories=["C", "Z"]), max_size=5), containers, max_leaves=4
)


@given(VALUES)
def test_producer_and_worker_agree(value):
    """What kombu makes of a value has the form of the value, and is what we say that it is."""
    arrived = over_the_wire(value)
    assert canonical(arrived) == canonical(value)
    assert typed(wire(value)) == typed(arrived)


@given(ALIKE, ALIKE)
def test_two_values_share_a_form_exactly_if_they_arrive_alike(one, other):
    """No two arguments that a worker can tell apart share a key, and no two that it cannot have different ones."""
    assert (canonical(one) == canonical(other)) == (typed(over_the_wire(one)) == typed(over_the_wire(other)))


# ---- calls ------------------------------------------------------------------------------------------------------


PLAIN = CallShape(lambda a, b=2, *, c=None: ..., skips_self=False)
FUNCTIONS = [
    lambda a, b=2, *, c=None: ...,
    lambda a, b, *, c: ...,
    lambda a, b=2, /, c=None: ...,
    lambda a, *b, c=None: ...,
    lambda a, b=2, **c: ...,
    lambda a, /, b=2, **c: ...,
    lambda *a, **b: ...,
    lambda: ...,
]


@given(st.sampled_from(FUNCTIONS), st.lists(st.integers(), max_size=4), st.dictionaries(st.sampled_from("abcd"), TWINS))
@example(FUNCTIONS[2], [1], {"a": 2})
@example(FUNCTIONS[2], [], {"a": 2})
@example(FUNCTIONS[3], [1], {"b": 2})
@example(FUNCTIONS[4], [1], {"c": 2})
@example(FUNCTIONS[5], [1], {"a": 2})
def test_calls_are_bound_as_python_binds_them(function, args, kwargs):
    """By hand or not, names, values, defaults and errors are those of inspect, whose error is the call's own."""
    signature = inspect.signature(function)
    shape = CallShape(function, skips_self=False)
    try:
        expected = signature.bind(*args, **kwargs)
    except TypeError as exc:
        with pytest.raises(TypeError) as caught:
            shape.bind(tuple(args), kwargs)
        assert caught.value.args == exc.args  # noqa: PT017 - only sometimes
        return
    expected.apply_defaults()
    bound = shape.bind(tuple(args), kwargs)
    assert repr(sorted(bound.items())) == repr(sorted(expected.arguments.items()))
    assert repr(shape.spread(bound)) == repr((list(expected.args), expected.kwargs))


@given(st.sampled_from(FUNCTIONS), st.lists(ARGUMENTS, max_size=4), st.dictionaries(st.sampled_from("abcd"), ARGUMENTS))
def test_a_key_without_options_is_that_of_the_bound_arguments(function, args, kwargs):
    """What is compiled at decoration gives what is computed from the call."""
    shape = CallShape(function, skips_self=False)
    try:
        bound = shape.bind(tuple(args), kwargs)
    except TypeError:
        return
    assert CallKeys("shop.f", shape).key(tuple(args), kwargs) == call_key("task:shop.f", bound)


CONFIGURED = [
    CallKeys("f", PLAIN),
    CallKeys("f", PLAIN, ignore=["c"]),
    CallKeys("f", PLAIN, key="{a}{b}"),
    CallKeys("f", PLAIN, key="{a}:{b!r:>5}", version=1),
    CallKeys("f", PLAIN, key=lambda a, b, **_: (a, b)),
    CallKeys("f", PLAIN, key=lambda a, b, **_: {"a": a, "b": b}, version="x", vary={"t": lambda: 1}),
]


@given(st.sampled_from(CONFIGURED), SHOWN, SHOWN)
def test_every_way_to_write_a_call_has_one_key(keys, one, other):
    """By position, by name or by default, here or in the worker: the same call is the same call."""
    key = keys.key((one, other), {})
    assert keys.key((one,), {"b": other, "c": None}) == key
    assert keys.key((), {"b": other, "a": one}) == key
    assert keys.key((over_the_wire(one),), {"b": over_the_wire(other)}) == key
    assert keys.key((one, 2), {}) == keys.key((one,), {})
    assert keys.parts(PLAIN.bind((one, other), {}))["digest"] == key.rpartition(":")[2]


@given(st.sampled_from(CONFIGURED), st.tuples(TWINS, TWINS), st.tuples(TWINS, TWINS))
def test_two_calls_share_a_key_exactly_if_their_arguments_arrive_alike(keys, one, other):
    """Whatever the label shows, (1, 23) is not (12, 3), and "1" is not 1."""
    assert (keys.key(one, {}) == keys.key(other, {})) == (typed(over_the_wire(one)) == typed(over_the_wire(other)))


NAMES = st.sampled_from(["a", "a:b", "a@1", "a@1:b", "a:b:b"])


@given(
    st.lists(
        st.tuples(NAMES, st.sampled_from([None, 1, "1:b"]), st.sampled_from([None, "b", "{x}", "{x}:b", str, repr])),
        min_size=2,
        max_size=2,
        unique=True,
    ),
    st.sampled_from(["b", "b:b"]),
)
def test_two_tasks_never_share_a_key(tasks, argument):
    """A name that looks like a version or a label of another task is its own still."""
    one, other = [
        CallKeys(
            name, CallShape((lambda: 0) if key == "b" else (lambda x: x), skips_self=False), key=key, version=version
        )
        for name, version, key in tasks
    ]
    args = [() if key == "b" else (argument,) for _, _, key in tasks]
    same_task = tasks[0][:2] == tasks[1][:2]
    assert same_task or one.key(args[0], {}) != other.key(args[1], {})
