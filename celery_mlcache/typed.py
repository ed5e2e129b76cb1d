"""The default serializer: exact types to msgpack and back, by msgspec; what it cannot restore exactly it refuses.

Theory of operation. msgpack is written and read by msgspec in one call each, without hooks on the way in: a walk in
Python *lowers* what msgpack does not know (tuples, sets, datetimes, ...) to extension types, and hands every list or
dict of plain values to the engine untouched. Types are compared by identity, so what is not on the list is refused.
When the quick walk or the engine balks, a slow walk repeats the work step by step, finds forms for what is rare (big
integers, lone surrogates), or names the path to what has none.

Engines, dumps + loads of 1 KB of mixed data, medians relative to pickle 5 (tests/benchmarks/codec_bench.py):

    ========================================  =====  =====  =====
    engine                                    dumps  loads  both
    ========================================  =====  =====  =====
    pickle 5                                   1.00   1.00   1.00
    typed (msgspec)                            0.97   0.58   0.79
    ormsgpack, behind the same walk            0.81   0.63   0.71
    msgpack, behind the same walk              1.19   0.95   1.08
    typed, envelope and checksum included      1.20   1.01   1.14
    the same, signed                           1.47   1.61   1.56
    ========================================  =====  =====  =====

Left: msgpack and ormsgpack turn a bytearray into bytes unasked, and ormsgpack replaces whatever its hooks raise, a soft
time limit included, by its own error; msgspec passes exceptions through and counts recursion as the interpreter does.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from functools import lru_cache
from itertools import chain
from types import NoneType
from typing import Any, Final
from uuid import UUID, SafeUUID
from zoneinfo import ZoneInfo

import msgspec

from celery_mlcache.errors import SerializationError

MAX_DEPTH: Final = 100  # levels of containers: far above real data, far below what a reader deep in a stack can hold

# --- lowering -----------------------------------------------------------------------------------------------------

_NATIVE: Final = frozenset({NoneType, bool, int, float, str, bytes})
_ROWS: Final = {tuple}
_TREES: Final = frozenset({list, dict})
_PLAIN: Final = _NATIVE | _TREES
SCALARS: Final = _NATIVE | {datetime, date, time, timedelta, Decimal, UUID, complex}

_MIN_NATIVE_INTEGER: Final = -(2**63)
_MAX_NATIVE_INTEGER: Final = 2**64 - 1

(
    _EXT_TUPLE,
    _EXT_SET,
    _EXT_FROZENSET,
    _EXT_PAIRS,
    _EXT_DATETIME,
    _EXT_DATE,
    _EXT_TIME,
    _EXT_TIMEDELTA,
    _EXT_DECIMAL,
    _EXT_UUID,
    _EXT_COMPLEX,
    _EXT_BYTEARRAY,
    _EXT_INTEGER,
    _EXT_SURROGATES,
    _EXT_NAIVE,
    _EXT_UTC,
    _EXT_ROWS,
) = range(17)  # stored: append, never renumber

_ALTERED: Final = "cannot be stored without altering it"
_UNKNOWN: Final = SafeUUID.unknown
_MAKE_DATETIME: Final[Callable[..., datetime]] = datetime
_MAKE_TIME: Final[Callable[..., time]] = time
_ENCODE: Final = msgspec.msgpack.Encoder().encode
_Ext: Final = msgspec.msgpack.Ext

_DATETIME: Final = struct.Struct(">HBBBBBIB")
_STAMP: Final = struct.Struct(">HBBBBBI")
_TIME: Final = struct.Struct(">BBBIB")
_DATE: Final = struct.Struct(">HBB")
_TIMEDELTA: Final = struct.Struct(">iii")
_COMPLEX: Final = struct.Struct(">dd")
_FOLD: Final = 1  # the last byte of a datetime or time: fold, and which zone follows
_ZONE_UTC: Final = 2
_ZONE_OTHER: Final = 4


class _RefusedError(Exception):
    """The quick walk cannot go on; the slow walk says why."""

    def __init__(self, suffix: str = "", culprit: object = None, why: str = _ALTERED) -> None:
        super().__init__(suffix, culprit, why)
        self.suffix, self.culprit, self.why = suffix, culprit, why


def _is_plain(value: Any, limit: int) -> bool:
    """Whether lists, dicts and native values are all there is: a walk by levels, a node costs next to no Python."""
    level = [value]
    for _ in range(MAX_DEPTH - 3):
        limit -= sum(map(len, level))
        dicts = [c for c in level if type(c) is dict]
        if limit < 0 or not _NATIVE.issuperset(map(type, chain.from_iterable(dicts))):
            return False
        members = list(chain.from_iterable(map(dict.values, dicts)))
        members += chain.from_iterable([c for c in level if type(c) is list])
        kinds = set(map(type, members))
        if kinds <= _NATIVE:
            return True
        if not kinds <= _PLAIN:
            return False
        level = [m for m in members if type(m) not in _NATIVE]
    return False


def _lower_list(value: list[Any], depth: int, left: list[int]) -> Any:
    first = type(value[0]) if value else NoneType
    # Below some ten members the walk by levels costs more than it saves; deep down it would be repeated too often.
    if first in _TREES and len(value) > 10 and depth < 3 and _is_plain(value, left[0]):  # noqa: PLR2004
        return value
    if first is not tuple or set(map(type, value)) != _ROWS:
        return _lower_members(value, depth, left)
    # Rows of a query: one extension for all, not one each.
    left[0] -= len(value) + sum(map(len, value))
    if depth >= MAX_DEPTH or left[0] < 0:
        raise _RefusedError
    if _NATIVE.issuperset(map(type, chain.from_iterable(value))):
        return _Ext(_EXT_ROWS, _ENCODE(value))
    return _Ext(_EXT_ROWS, _ENCODE([_lower_members(row, depth + 1, left) for row in value]))


def _lower_members(members: Any, depth: int, left: list[int]) -> Any:
    """Return the members as msgpack has them; *left* bounds the number of nodes, which shared parts could explode."""
    left[0] -= len(members)
    if depth > MAX_DEPTH or left[0] < 0:
        raise _RefusedError
    if _NATIVE.issuperset(map(type, members)):
        return members
    depth += 1
    return [m if type(m) in _NATIVE else _LOWER[type(m)](m, depth, left) for m in members]


def _lower_dict(value: dict[Any, Any], depth: int, left: list[int]) -> Any:
    left[0] -= len(value)
    if depth > MAX_DEPTH or left[0] < 0:
        raise _RefusedError
    if not _NATIVE.issuperset(map(type, value)):
        return _Ext(_EXT_PAIRS, _ENCODE(_lower_members(_flatten(value), depth, left)))
    if _NATIVE.issuperset(map(type, value.values())):
        return value
    depth += 1
    return {k: v if type(v) in _NATIVE else _LOWER[type(v)](v, depth, left) for k, v in value.items()}


def _flatten(value: dict[Any, Any]) -> list[Any]:
    return [part for pair in value.items() for part in pair]


def _lower_tuple(value: tuple[Any, ...], depth: int, left: list[int]) -> Any:
    return _Ext(_EXT_TUPLE, _ENCODE(_lower_members(value, depth, left)))


def _lower_set(value: set[Any], depth: int, left: list[int]) -> Any:
    return _Ext(_EXT_SET, _ENCODE(_lower_members(value, depth, left)))


def _lower_frozenset(value: frozenset[Any], depth: int, left: list[int]) -> Any:
    return _Ext(_EXT_FROZENSET, _ENCODE(_lower_members(value, depth, left)))


def _lower_zone(zone: tzinfo | None) -> tuple[int, bytes]:
    if zone is None:
        return 0, b""
    if zone is UTC:
        return _ZONE_UTC, b""
    if type(zone) is timezone:
        offset, *name = zone.__getinitargs__()  # type: ignore[attr-defined] # what pickle and copy use
        return _ZONE_OTHER, _ENCODE([offset.days, offset.seconds, offset.microseconds, *name])
    if type(zone) is ZoneInfo:
        return _ZONE_OTHER, _lower_zone_info(zone)
    raise _RefusedError(".tzinfo", zone)


@lru_cache(maxsize=64)
def _lower_zone_info(zone: ZoneInfo) -> bytes:
    try:
        zone.__reduce__()
    except pickle.PicklingError:  # made from a file: its key, if any, may name something else elsewhere
        raise _RefusedError(".tzinfo", zone) from None
    return _ENCODE(zone.key)


def _lower_datetime(x: datetime, _depth: int, _left: list[int]) -> Any:
    if not x.fold and ((zone_info := x.tzinfo) is None or zone_info is UTC):
        stamp = _STAMP.pack(x.year, x.month, x.day, x.hour, x.minute, x.second, x.microsecond)
        return _Ext(_EXT_NAIVE if zone_info is None else _EXT_UTC, stamp)
    mark, zone = _lower_zone(x.tzinfo)
    fixed = _DATETIME.pack(x.year, x.month, x.day, x.hour, x.minute, x.second, x.microsecond, mark | x.fold)
    return _Ext(_EXT_DATETIME, fixed + zone)


def _lower_time(x: time, _depth: int, _left: list[int]) -> Any:
    mark, zone = _lower_zone(x.tzinfo)
    return _Ext(_EXT_TIME, _TIME.pack(x.hour, x.minute, x.second, x.microsecond, mark | x.fold) + zone)


def _lower_uuid(x: UUID, _depth: int, _left: list[int]) -> Any:
    data = x.int.to_bytes(16, "big")
    if x.is_safe is not _UNKNOWN:
        data += b"\1" if x.is_safe is SafeUUID.safe else b"\0"
    return _Ext(_EXT_UUID, data)


def _lower_integer(x: int) -> Any:
    if _MIN_NATIVE_INTEGER <= x <= _MAX_NATIVE_INTEGER:
        return x
    return _Ext(_EXT_INTEGER, x.to_bytes(x.bit_length() // 8 + 1, "big", signed=True))


def _lower_string(x: str) -> Any:
    try:
        x.encode()
    except UnicodeEncodeError:
        return _Ext(_EXT_SURROGATES, x.encode("utf-8", "surrogatepass"))
    return x


# A KeyError in here is a type that is not ours; the slow walk turns it into words.
_LOWER: Final[dict[type, Callable[[Any, int, list[int]], Any]]] = {
    list: _lower_list,
    dict: _lower_dict,
    tuple: _lower_tuple,
    set: _lower_set,
    frozenset: _lower_frozenset,
    datetime: _lower_datetime,
    date: lambda x, _d, _l: _Ext(_EXT_DATE, _DATE.pack(x.year, x.month, x.day)),
    time: _lower_time,
    timedelta: lambda x, _d, _l: _Ext(_EXT_TIMEDELTA, _TIMEDELTA.pack(x.days, x.seconds, x.microseconds)),
    Decimal: lambda x, _d, _l: _Ext(_EXT_DECIMAL, str(x).encode()),
    UUID: _lower_uuid,
    complex: lambda x, _d, _l: _Ext(_EXT_COMPLEX, _COMPLEX.pack(x.real, x.imag)),
    bytearray: lambda x, _d, _l: _Ext(_EXT_BYTEARRAY, bytes(x)),
}


def type_name(value: object) -> str:
    """Return the qualified name of *value*'s type, without "builtins"."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _step(path: str, key: object) -> str:
    try:
        shown = repr(key)
    except ValueError:  # an integer of more digits than Python prints
        shown = type_name(key)
    return f"{path}[{shown if len(shown) <= 40 else shown[:37] + '...'}]"  # noqa: PLR2004


class _SlowWalk:
    """Lowers with a path in hand, every node by itself; raises SerializationError where there is no form."""

    def __init__(self, nodes: int) -> None:
        self._nodes = nodes

    def lower(self, value: Any, path: str, depth: int = 0) -> Any:
        kind = type(value)
        if kind is int:
            return _lower_integer(value)
        if kind is str:
            return _lower_string(value)
        if kind in _NATIVE:
            return value
        if kind in {list, tuple, set, frozenset, dict}:
            return self._container(value, path, depth)
        if kind not in _LOWER:
            raise SerializationError(path, type_name(value), _ALTERED)
        try:
            return _LOWER[kind](value, 0, [0])
        except _RefusedError as exc:
            raise SerializationError(path + exc.suffix, type_name(exc.culprit), exc.why) from None

    def _container(self, value: Any, path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise SerializationError("value", type_name(value), f"is nested deeper than {MAX_DEPTH}, or holds itself")
        self._nodes -= len(value)
        if self._nodes < 0:
            raise SerializationError("value", type_name(value), "has more parts than max_value_size has bytes")
        kind = type(value)
        if kind is dict:
            return self._dict(value, path, depth)
        base = path if kind in {list, tuple} else f"list({path})"
        members = [self.lower(member, f"{base}[{i}]", depth + 1) for i, member in enumerate(value)]
        if kind is list:
            return members
        code = _EXT_TUPLE if kind is tuple else _EXT_SET if kind is set else _EXT_FROZENSET
        return _Ext(code, _ENCODE(members))

    def _dict(self, value: dict[Any, Any], path: str, depth: int) -> Any:
        keys = [self.lower(key, f"list({path})[{i}]", depth + 1) for i, key in enumerate(value)]
        members = [self.lower(member, _step(path, key), depth + 1) for key, member in value.items()]
        if _NATIVE.issuperset(map(type, keys)):
            return dict(zip(keys, members, strict=True))
        return _Ext(_EXT_PAIRS, _ENCODE([part for pair in zip(keys, members, strict=True) for part in pair]))


def dump_typed(value: object, limit: int) -> bytes:
    """Return the body for *value*, of at most about *limit* nodes; raises SerializationError, never alters."""
    try:
        try:
            kind = type(value)
            return _ENCODE(value if kind in _NATIVE else _LOWER[kind](value, 0, [limit]))
        except (_RefusedError, KeyError, OverflowError, UnicodeEncodeError):
            return _ENCODE(_SlowWalk(limit).lower(value, "value"))
    except RuntimeError as exc:  # RecursionError: the caller is deep already; else another thread changed a dict or set
        raise SerializationError("value", type_name(value), f"could not be walked: {exc}") from exc


# --- raising ------------------------------------------------------------------------------------------------------


def _raise_zone(mark: int, data: memoryview) -> tzinfo | None:
    kind = mark & ~_FOLD
    if kind != _ZONE_OTHER:
        if data or kind not in {0, _ZONE_UTC}:
            raise ValueError(mark)
        return UTC if kind else None
    match _DECODE(data):
        case str(key):
            return ZoneInfo(key)
        case [int(days), int(seconds), int(microseconds), *name]:
            return timezone(timedelta(days, seconds, microseconds), *name)
        case _:
            raise ValueError(mark)


def _raise_datetime(data: memoryview) -> datetime:
    *fields, mark = _DATETIME.unpack_from(data)
    return _MAKE_DATETIME(*fields, _raise_zone(mark, data[_DATETIME.size :]), fold=mark & _FOLD)


def _raise_time(data: memoryview) -> time:
    *fields, mark = _TIME.unpack_from(data)
    return _MAKE_TIME(*fields, _raise_zone(mark, data[_TIME.size :]), fold=mark & _FOLD)


def _raise_uuid(data: memoryview) -> UUID:
    if len(data) not in {16, 17}:
        raise ValueError(len(data))
    safe = _UNKNOWN if len(data) == 16 else SafeUUID.safe if data[16] else SafeUUID.unsafe  # noqa: PLR2004
    # UUID.__init__ takes three times as long; this is what UUID.__setstate__ does (tests/benchmarks/codec_bench.py).
    made = UUID.__new__(UUID)
    object.__setattr__(made, "int", int.from_bytes(data[:16], "big"))
    object.__setattr__(made, "is_safe", safe)
    return made


def _raise_pairs(data: memoryview) -> dict[Any, Any]:
    parts = iter(_DECODE(data))
    return dict(zip(parts, parts, strict=True))


_RAISE: Final[dict[int, Callable[[memoryview], Any]]] = {
    _EXT_TUPLE: lambda data: tuple(_DECODE(data)),
    _EXT_SET: lambda data: set(_DECODE(data)),
    _EXT_FROZENSET: lambda data: frozenset(_DECODE(data)),
    _EXT_PAIRS: _raise_pairs,
    _EXT_ROWS: lambda data: list(map(tuple, _DECODE(data))),
    _EXT_NAIVE: lambda data: _MAKE_DATETIME(*_STAMP.unpack(data)),
    _EXT_UTC: lambda data: _MAKE_DATETIME(*_STAMP.unpack(data), UTC),
    _EXT_DATETIME: _raise_datetime,
    _EXT_DATE: lambda data: date(*_DATE.unpack(data)),
    _EXT_TIME: _raise_time,
    _EXT_TIMEDELTA: lambda data: timedelta(*_TIMEDELTA.unpack(data)),
    _EXT_DECIMAL: lambda data: Decimal(str(data, "ascii")),
    _EXT_UUID: _raise_uuid,
    _EXT_COMPLEX: lambda data: complex(*_COMPLEX.unpack(data)),
    _EXT_BYTEARRAY: bytearray,
    _EXT_INTEGER: lambda data: int.from_bytes(data, "big", signed=True),
    _EXT_SURROGATES: lambda data: str(data, "utf-8", "surrogatepass"),
}

_DECODE: Final[Callable[[bytes | memoryview], Any]] = msgspec.msgpack.Decoder(
    ext_hook=lambda code, data: _RAISE[code](data),
).decode

# All that msgspec and the constructors above raise over strange bytes. Not Exception: a soft time limit gets through.
BODY_ERRORS: Final = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    RecursionError,
    MemoryError,
    OSError,  # a zone's file
    struct.error,
    msgspec.MsgspecError,
)

load_typed: Final = _DECODE
