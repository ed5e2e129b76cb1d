"""The codec: exact types back, every corruption told from a value, isolation of what L1 holds."""

from __future__ import annotations

import enum
import hashlib
import hmac
import io
import math
import pickle
import struct
import sys
import threading
import zlib
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction
from typing import Any
from uuid import UUID, SafeUUID, uuid1
from zoneinfo import ZoneInfo

import pytest
from celery.exceptions import SoftTimeLimitExceeded

from celery_mlcache import wire
from celery_mlcache.codec import Codec
from celery_mlcache.errors import CodecError, ConfigurationError, SerializationError
from celery_mlcache.typed import MAX_DEPTH

KEY = "user:1"
HEAD = wire.pack_head(17)
BERLIN = ZoneInfo("Europe/Berlin")
BERLIN_DAY = datetime(2026, 6, 1, tzinfo=BERLIN)


def there_and_back(value: Any, codec: Codec | None = None) -> Any:
    """Return *value* as a reader in another process would have it."""
    codec = codec or Codec()
    return codec.decode(KEY, HEAD + codec.encode(KEY, value)).value


def same(a: Any, b: Any) -> bool:  # noqa: PLR0911 # one return a type
    """Whether two values are equal down to types, signs of zero, NaN, zones, folds and the order of dicts."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, Decimal):
        return a.as_tuple() == b.as_tuple()
    if isinstance(a, datetime | time):
        plain = a.replace(tzinfo=None) == b.replace(tzinfo=None)
        return plain and a.fold == b.fold and same_zone(a.tzinfo, b.tzinfo)
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, set | frozenset):
        return len(a) == len(b) and all(any(same(x, y) for y in b) for x in a)
    return a == b


def same_zone(a: tzinfo | None, b: tzinfo | None) -> bool:
    """Whether two zones are of one kind, offset and name."""
    if isinstance(a, timezone) and isinstance(b, timezone):
        return a.__getinitargs__() == b.__getinitargs__()
    return a is b


EXACT = [
    *(None, True, False, 0, -1, 2**53, 2**53 + 1, -(2**63), -(2**63) - 1, 2**64 - 1, 2**64, 10**5000, -(10**5000)),
    *(0.0, -0.0, 1.5, math.inf, -math.inf, math.nan, 5e-324),
    *("", "grün", "\U0001f600", "\ud800", "a\x00b", b"", b"\xff\x00", bytearray(b"ab"), bytearray()),
    *([], (), set(), frozenset(), {}, [[]], ((),), [()], ([],), {1, 1.5, "a", None, (1, frozenset({2}))}),
    *({"a": 1, "b": [1, (2, {"c": {3}})]}, {1: "int", "1": "str", 1.5: 0, None: 0, b"1": 0}, {True: 1, 2**70: 2}),
    *({(1, 2): 3, frozenset({1}): (4,)}, {date(2026, 1, 2): 1, "x": UUID(int=5)}, {"b": 1, "a": 2}, {"\udc80": 1}),
    *(
        [(1, "a"), (2, "b")],
        [(1, BERLIN_DAY), (BERLIN_DAY, [()])],
        [(), ()],
        [(1,), [1]],
        [[{"a": [{}]}], {"b": {1: []}}],
    ),
    *({(): {}}, {datetime(2026, 1, 1): 1}, {-0.0: 1}, {math.inf: 1}, [1, 2**64], [2**64, "\ud800", (2**70,)]),  # noqa: DTZ001
    datetime(1, 1, 1),  # noqa: DTZ001
    datetime(2026, 10, 25, 2, 30, fold=1),  # noqa: DTZ001
    datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
    datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN),
    datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN, fold=1),
    datetime(2026, 1, 1, tzinfo=UTC, fold=1),
    datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=-5, minutes=30, seconds=1, microseconds=7))),
    datetime(2026, 1, 1, tzinfo=timezone(timedelta(0), "Zulu")),
    datetime(2026, 1, 1, tzinfo=ZoneInfo("UTC")),
    *(date(1, 1, 1), date(9999, 12, 31), time(), time(1, 2, 3, 4, fold=1), time(1, tzinfo=BERLIN), time(2, tzinfo=UTC)),
    *(timedelta.max, timedelta.min, timedelta(0), timedelta(days=-1, microseconds=1)),
    *(Decimal("1.10"), Decimal("-0E+3"), Decimal("NaN"), Decimal("sNaN12"), Decimal("-Infinity"), Decimal("1E+9999")),
    *(UUID(int=0), UUID(int=2**128 - 1), UUID(int=7, is_safe=SafeUUID.safe), 1j, complex(-0.0, math.nan)),
]


@pytest.mark.parametrize("options", [{}, {"signing_keys": [b"k"]}, {"compression": "zlib", "compression_threshold": 0}])
@pytest.mark.parametrize("value", EXACT, ids=lambda v: f"{type(v).__name__}")
def test_exact_types_come_back(value, options):
    """What comes back is what went in, type for type, whatever envelope it travels in."""
    codec = Codec(**options)
    assert same(there_and_back(value, codec), value)
    for wrapped in ([value], (value,), {"k": value}, {"k": [value, (value, {"z": value})]}):
        assert same(there_and_back(wrapped, codec), wrapped)


def test_order_of_dicts_is_kept_in_both_walks():
    """A dict comes back in its own order whether its keys are plain or not."""
    assert list(there_and_back({"b": 1, "a": 2, "c": ()})) == ["b", "a", "c"]
    assert list(there_and_back({(2,): 1, "a": 2, (1,): 3})) == [(2,), "a", (1,)]


def test_safety_of_a_uuid_is_kept():
    """uuid1's note on how it was made comes back, as pickle would bring it."""
    made = uuid1()
    assert there_and_back(made).is_safe is made.is_safe
    assert there_and_back(UUID(int=1, is_safe=SafeUUID.unsafe)).is_safe is SafeUUID.unsafe


class Number(enum.IntEnum):
    ONE = 1


class Word(enum.StrEnum):
    A = "a"


@dataclass
class Point:
    x: int


class Moment(datetime):
    pass


class Zone(tzinfo):
    def utcoffset(self, _when):
        return timedelta(0)


Pair = namedtuple("Pair", "a b")  # noqa: PYI024
REFUSED = [
    *(Number.ONE, Word.A, Point(1), Pair(1, 2), OrderedDict(a=1), Moment(2026, 1, 1), Fraction(1, 2), object(), len),
    *(memoryview(b"x"), range(3), iter([]), io.BytesIO(), Exception("x"), Point, type("S", (str,), {})("x"), ...),
    *(type("L", (list,), {})(), type("B", (bytes,), {})(), type("F", (float,), {})(), type("T", (tuple,), {})()),
]


@pytest.mark.parametrize("value", REFUSED, ids=lambda v: type(v).__name__)
def test_other_types_are_refused_wherever_they_hide(value):
    """A subclass or a type that is not on the list is refused, never turned into something near."""
    holders = [value, [1, value], (value,), {"a": value}, {"a": {1: value}}, [[(value,)]]]
    try:
        hash(value)
        holders += [{value}, frozenset([value]), {value: 1}, {(1, value): 1}]
    except TypeError:
        pass
    for holder in holders:
        with pytest.raises(SerializationError):
            Codec().encode(KEY, holder)


@pytest.mark.parametrize(
    ("value", "path", "type_name"),
    [
        (Fraction(1), "value", "fractions.Fraction"),
        ([1, 2, Fraction(1)], "value[2]", "fractions.Fraction"),
        ({"rows": [0, 0, 0, {"price": Fraction(1)}]}, "value['rows'][3]['price']", "fractions.Fraction"),
        ({1: {(2, 3): (object(),)}}, "value[1][(2, 3)][0]", "object"),
        ({"a": 1, Number.ONE: 1}, "list(value)[1]", f"{__name__}.Number"),
        ([{Number.ONE}], "list(value[0])[0]", f"{__name__}.Number"),
        ({"k" * 90: object()}, "value['" + "k" * 36 + "...]", "object"),
        ({10**5000: object()}, "value[int]", "object"),
        ({"at": [datetime(2026, 1, 1, tzinfo=Zone())]}, "value['at'][0].tzinfo", f"{__name__}.Zone"),
    ],
)
def test_refusals_name_path_and_type(value, path, type_name):
    """A refusal says where in the value the culprit is and what it is."""
    with pytest.raises(SerializationError) as caught:
        Codec().encode(KEY, value)
    assert (caught.value.path, caught.value.type_name) == (path, type_name)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_zone_from_a_file_is_refused():
    """A zone that another machine could not find by its key is not stored under that key."""
    files = io.BytesIO(
        b"TZif" + b"\0" * 16 + struct.pack(">6l", 0, 0, 0, 0, 1, 4) + struct.pack(">lbb", 0, 0, 0) + b"UTC\0"
    )
    zone = ZoneInfo.from_file(files, key="Europe/Berlin")
    with pytest.raises(SerializationError, match="tzinfo"):
        Codec().encode(KEY, datetime(2026, 1, 1, tzinfo=zone))


def nested(depth, wrap):
    """Return 1, wrapped *depth* times."""
    value = 1
    for _ in range(depth):
        value = wrap(value)
    return value


@pytest.mark.parametrize(
    "wrap", [lambda v: [v], lambda v: (v,), lambda v: {"a": v}, lambda v: {(1,): v}, lambda v: [(v,)]]
)
def test_depth_has_a_limit_on_writing(wrap):
    """Depth within the limit comes back; beyond it, far beyond it or without end is a SerializationError."""
    value = nested(MAX_DEPTH // 2, wrap)
    assert same(there_and_back(value), value)
    for depth in (MAX_DEPTH + 5, 5_000):
        with pytest.raises(SerializationError):
            Codec().encode(KEY, nested(depth, wrap))


def test_cycles_are_refused():
    """A value that holds itself is refused, through lists, dicts or tuples, with one way round or several."""
    several: list[Any] = []
    several += [several, several, (several,)]
    mapping: dict[str, Any] = {}
    mapping["self"] = {1: mapping, 2: [mapping]}
    for value in (several, mapping):
        with pytest.raises(SerializationError, match="nested"):
            Codec().encode(KEY, value)


def test_shared_parts_cannot_explode():
    """A small value that would unfold into billions of parts is refused quickly."""
    value: list[Any] = [object]
    for _ in range(60):
        value = [value, value]
    plain: list[Any] = [1]
    for _ in range(60):
        plain = [plain, plain]
    for bomb in (value, plain):
        with pytest.raises(SerializationError):
            Codec(max_value_size=10_000).encode(KEY, bomb)


def test_deep_callers_get_a_serialization_error():
    """Near the interpreter's recursion limit, writing and reading fail as the contract says."""
    codec, value = Codec(), nested(MAX_DEPTH, lambda v: (v,))
    data = HEAD + codec.encode(KEY, value)
    seen = set()

    def dive() -> None:
        try:
            dive()
        except RecursionError:
            return
        for act in (lambda: codec.encode(KEY, value), lambda: codec.decode(KEY, data)):
            try:
                act()
            except (SerializationError, CodecError) as exc:
                seen.add(type(exc))
            except RecursionError:
                pass  # not even the first frame of the codec found room

    dive()
    assert seen == {SerializationError, CodecError}


def test_oversized_values_are_refused_on_writing():
    """A value whose body is over max_value_size is a SerializationError that says both sizes."""
    with pytest.raises(SerializationError, match=r"1003 bytes.*1000"):
        Codec(max_value_size=1000).encode(KEY, "x" * 1000)


# --- the envelope


def test_header_comes_back():
    """Tags and the writer's clock come back with the value; the clock to the millisecond."""
    codec = Codec(wall_clock=lambda: 1_790_000_000.1239)
    found = codec.decode(KEY, HEAD + codec.encode(KEY, [1], tags=("user:1", "größe", "")))
    assert found.tags == ("user:1", "größe", "")
    assert found.created == 1_790_000_000.123
    assert found.value == [1]


@pytest.mark.parametrize("tags", [["x" * 70_000], ["x" * 1000] * 70, [""] * 70_000])
def test_header_has_a_limit(tags):
    """Tags that no header holds are refused."""
    with pytest.raises(SerializationError, match="tags"):
        Codec().encode(KEY, 1.5, tags=tags)


@pytest.mark.parametrize("number", [0, -1, 7, 2**53, -(2**53)])
def test_counters_are_digits_for_lua(number):
    """An int that Lua can count with is stored as kind I, flags 0, with digits for a body, never compressed."""
    tail = Codec(compression="zlib", compression_threshold=0).encode(KEY, number)
    kind, flags, _serializer, size = struct.unpack_from(">BBBH", tail)
    assert (kind, flags, tail[5 + size :]) == (wire.KIND_INTEGER, 0, str(number).encode())
    lua = tail[: 5 + size] + b"%d" % (number // 2)
    assert Codec().decode(KEY, wire.pack_head(99) + lua).value == number // 2


@pytest.mark.parametrize(
    "digits", [b"", b"-", b"-0", b"007", b"+1", b" 1", b"1\n", b"1.0", b"1e3", b"9" * 16, b"1" * 40]
)
def test_counters_are_canonical(digits):
    """Anything but what Lua's %.0f writes, within the range, is not a counter."""
    tail = Codec().encode(KEY, 5)
    with pytest.raises(CodecError, match="body"):
        Codec().decode(KEY, HEAD + tail[:-1] + digits)


@pytest.mark.parametrize("value", [True, 2**53 + 1, 1.0])
def test_other_numbers_are_values(value):
    """What Lua cannot add to without altering it is no counter."""
    assert Codec().encode(KEY, value)[0] == wire.KIND_VALUE


SAMPLE = {"a": (1, 2.5), "b": ["x", datetime(2026, 1, 1, tzinfo=UTC)], "c": Decimal("1.5"), "d": b"raw" * 20}
CODECS = {
    "plain": Codec(),
    "zlib": Codec(compression="zlib", compression_threshold=0),
    "signed": Codec(signing_keys=[b"k"]),
    "signed zlib": Codec(signing_keys=[b"k"], compression="zlib", compression_threshold=0),
    "pickle": Codec(signing_keys=[b"k"], serializer="pickle"),
    "kombu": Codec(serializer="kombu:json"),
}


def reason(codec, data, key=KEY):
    """Return the word with which *data* is refused."""
    with pytest.raises(CodecError) as caught:
        codec.decode(key, data)
    return caught.value.reason


@pytest.mark.parametrize("name", CODECS)
def test_every_truncation_is_told(name):
    """A value cut anywhere is a CodecError."""
    data = HEAD + CODECS[name].encode(KEY, SAMPLE, tags=["t"])
    assert {reason(CODECS[name], data[:size]) for size in range(len(data))} <= {"truncated", "body", "signature"}


@pytest.mark.parametrize("name", CODECS)
def test_every_flipped_bit_is_told(name):
    """A value with any one bit flipped, outside the stamp that Redis gives it, is a CodecError."""
    data = HEAD + CODECS[name].encode(KEY, SAMPLE, tags=["t"])
    for at in (0, *range(wire.HEAD_SIZE, len(data))):
        for bit in range(8):
            assert reason(CODECS[name], data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :])


def test_counter_corruption_is_told_but_in_its_digits():
    """Every flipped bit or cut before a counter's digits is a CodecError; a signed one is covered whole."""
    for codec, covered in ((CODECS["plain"], -2), (CODECS["signed"], None)):
        data = HEAD + codec.encode(KEY, 12)
        for at in (0, *range(wire.HEAD_SIZE, len(data[:covered]))):
            assert reason(codec, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            assert reason(codec, data[:at])


def refit(tail, **changes):
    """Return the unsigned tail with other marks and a right checksum."""
    kind, flags, ident, size = struct.unpack_from(">BBBH", tail)
    marks = {"kind": kind, "flags": flags, "ident": ident, "size": size} | changes
    prefix = struct.pack(">BBBH", *marks.values())
    return HEAD + prefix + struct.pack(">I", zlib.crc32(tail[9:], zlib.crc32(prefix))) + tail[9:]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"kind": wire.KIND_TOMBSTONE}, "kind"),
        ({"kind": 0}, "kind"),
        ({"kind": wire.KIND_INTEGER}, "serializer"),
        ({"flags": 8}, "flags"),
        ({"flags": 6}, "flags"),
        ({"flags": 2}, "body"),
        ({"flags": 1}, "signed"),
        ({"ident": 0}, "serializer"),
        ({"ident": 2}, "serializer"),
        ({"ident": 3}, "serializer"),
        ({"ident": 9}, "serializer"),
        ({"size": 0}, "truncated"),
        ({"size": 0xFFFF}, "truncated"),
    ],
)
def test_strange_marks_have_reasons(changes, why):
    """Marks that the format does not have are refused by name even under a right checksum."""
    assert reason(Codec(), refit(Codec().encode(KEY, SAMPLE), **changes)) == why


def test_other_reasons():
    """Version, tombstone, key and emptiness each have their word."""
    data = HEAD + Codec().encode(KEY, SAMPLE)
    assert reason(Codec(), b"") == "truncated"
    later = bytes([wire.FORMAT_VERSION + 1])
    assert reason(Codec(), later + data[1:]) == "version"
    assert reason(Codec(), later) == "version"
    assert reason(Codec(), data[:1] + b"\xff" * 8 + data[9:]) == "version"
    assert reason(Codec(), HEAD + b"T") == "kind"
    assert reason(Codec(), data, key="user:2") == "key"
    assert reason(Codec(), data, key="\ud800") == "body"


def sealed(body, ident=1, key=KEY):
    """Return unsigned data with *body* under a right checksum."""
    raw = key.encode()
    rest = struct.pack(">QH", 0, len(raw)) + raw + b"\0\0\0\0" + body
    prefix = struct.pack(">BBBH", wire.KIND_VALUE, 0, ident, 18 + len(raw))
    return HEAD + prefix + struct.pack(">I", zlib.crc32(rest, zlib.crc32(prefix))) + rest


def ext(code, data):
    """Return a msgpack extension."""
    return b"\xc9" + struct.pack(">Ib", len(data), code) + data


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"\xc1", b"\xc0\xc0", b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"\xa1\xff", b"\x81\x80\x01"),
        *(ext(99, b""), ext(-7, b""), ext(-1, b"\xff" * 8), ext(0, b"\x01"), ext(1, b"\x91\x80"), ext(3, b"\x91\x01")),
        *(
            ext(3, b"\x92\x90\x01"),
            ext(4, b""),
            ext(4, b"\xff" * 13),
            ext(4, b"\x00\x01\x01\x01" + b"\0" * 8 + b"\x06"),
        ),
        *(
            ext(5, b"\0\0\0\0"),
            ext(6, b"\xff" * 9),
            ext(7, b"\x7f" * 12),
            ext(8, b"one"),
            ext(8, b"\xff"),
            ext(9, b"short"),
        ),
        *(ext(10, b"\0"), ext(13, b"\xff")),
        ext(4, struct.pack(">HBBBBBIB", 2026, 1, 1, 0, 0, 0, 0, 4) + b"\xaf../../etc/passwd"[:16]),
        ext(4, struct.pack(">HBBBBBIB", 2026, 1, 1, 0, 0, 0, 0, 4) + b"\xa7Nowhere"),
        ext(4, struct.pack(">HBBBBBIB", 2026, 1, 1, 0, 0, 0, 0, 4) + b"\xa6Europe"),
        ext(4, struct.pack(">HBBBBBIB", 2026, 1, 1, 0, 0, 0, 0, 4) + b"\x93\x7f\x00\x00"),
    ],
)
def test_strange_bodies_are_told(body):
    """A body that no writer of ours makes is a CodecError even under a right checksum."""
    assert reason(Codec(), sealed(body)) == "body"


def test_deep_bodies_do_not_crash():
    """Extensions within extensions within lists, thousands deep, are a CodecError."""
    body = b"\xc0"
    for _ in range(3000):
        body = ext(0, b"\x91" * 3 + body)
    assert reason(Codec(), sealed(body)) == "body"


def test_bombs_are_refused_before_they_unfold():
    """A compressed body that would unfold over the cap is a CodecError, and so is rubbish after it."""
    small = Codec(max_value_size=1000)
    made = Codec(compression="zlib").encode(KEY, "x" * 5_000_000)
    assert len(made) < 30_000
    assert reason(small, HEAD + made) == "size"
    assert reason(small, HEAD + Codec().encode(KEY, "x" * 5000)) == "size"
    tail = Codec(compression="zlib", compression_threshold=0).encode(KEY, "x" * 500)
    assert reason(small, refit(tail + b"rubbish")) == "body"
    assert reason(small, refit(tail[:-3])) == "body"


def test_compression_starts_at_the_threshold_and_must_pay():
    """Small bodies and those that do not shrink stay raw; zlib is read whatever is set."""
    codec = Codec(compression="zlib", compression_threshold=100)
    assert codec.encode(KEY, "x" * 50)[1] == 0
    assert codec.encode(KEY, "x" * 500)[1] == 2
    assert codec.encode(KEY, hashlib.shake_128(b"").digest(5000))[1] == 0
    assert Codec().decode(KEY, HEAD + codec.encode(KEY, "x" * 500)).value == "x" * 500


@pytest.fixture
def fake_zstd(monkeypatch):
    """Stand in for the zstd modules with zlib, so that our use of either is run without them."""

    class Module:
        ZstdError = zlib.error

        class ZstdCompressor:
            def __init__(self, level):
                self.level = level

            def compress(self, body):
                return struct.pack(">I", len(body)) + zlib.compress(body)

        class ZstdDecompressor:
            def decompress(self, body, max_output_size, allow_extra_data):
                assert not allow_extra_data
                return zlib.decompress(body[4:])

        @staticmethod
        def frame_content_size(body):
            return struct.unpack_from(">I", body)[0]

    monkeypatch.setitem(sys.modules, "zstandard", Module)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="the standard library has zstd")
def test_zstd_through_the_package(fake_zstd):
    """Zstd comes back, is capped by the size it declares, and its errors are CodecErrors."""
    codec = Codec(compression="zstd", compression_threshold=0)
    tail = codec.encode(KEY, "x" * 500)
    assert tail[1] == 4
    assert codec.decode(KEY, HEAD + tail).value == "x" * 500
    assert reason(Codec(max_value_size=100), HEAD + tail) == "size"
    assert reason(codec, refit(tail[:-3])) == "body"


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="the standard library has zstd")
def test_zstd_without_a_package(monkeypatch, fake_zstd):
    """Without a package zstd cannot be chosen, and what others wrote with it is a CodecError."""
    data = HEAD + Codec(compression="zstd", compression_threshold=0).encode(KEY, "x" * 500)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ConfigurationError, match="zstandard"):
        Codec(compression="zstd")
    assert reason(Codec(), data) == "flags"


# --- signatures


def test_signing_keys_rotate():
    """The first key signs, every key verifies, an unknown key does not."""
    data = HEAD + Codec(signing_keys=[b"old"]).encode(KEY, SAMPLE)
    assert Codec(signing_keys=[b"new", b"old"]).decode(KEY, data).value == SAMPLE
    assert reason(Codec(signing_keys=[b"new"]), data) == "signature"
    newer = HEAD + Codec(signing_keys=[b"new", b"old"]).encode(KEY, 5)
    assert Codec(signing_keys=[b"new"]).decode(KEY, newer).value == 5


def test_signatures_are_demanded_and_refused_symmetrically():
    """With keys nothing unsigned is read; without keys nothing signed; nothing moves to another key."""
    signed, plain = CODECS["signed"], CODECS["plain"]
    for value in (SAMPLE, 5):
        assert reason(signed, HEAD + plain.encode(KEY, value)) == "unsigned"
        assert reason(plain, HEAD + signed.encode(KEY, value)) == "signed"
        assert reason(signed, HEAD + signed.encode(KEY, value), key="user:2") == "signature"


def test_stamp_is_not_signed():
    """Lua may set the stamp of a signed value."""
    tail = CODECS["signed"].encode(KEY, SAMPLE)
    assert CODECS["signed"].decode(KEY, wire.pack_head(2**40) + tail).value == SAMPLE


def test_signature_is_checked_before_anything_is_unfolded(monkeypatch):
    """Neither decompression nor a serializer sees a byte of a body with a wrong signature."""
    seen = []
    data = HEAD + Codec(
        signing_keys=[b"other"], serializer="pickle", compression="zlib", compression_threshold=0
    ).encode(KEY, ["x" * 500])
    monkeypatch.setattr(zlib, "decompressobj", lambda: seen.append("zlib"))
    monkeypatch.setattr(pickle, "loads", lambda body: seen.append("pickle"))
    assert reason(Codec(signing_keys=[b"k"], serializer="pickle"), data) == "signature"
    assert seen == []


EXECUTED = []


def execute(word):
    """Leave a trace of having been run."""
    EXECUTED.append(word)


class Bomb:
    def __reduce__(self):
        return execute, ("boom",)


def test_pickle_runs_only_where_it_was_asked_for_and_signed():
    """Unpickling happens in a codec set to pickle, for a valid signature, and nowhere else."""
    EXECUTED.clear()
    body = pickle.dumps(Bomb())
    ours = HEAD + CODECS["pickle"].encode(KEY, Bomb())
    others = HEAD + Codec(signing_keys=[b"other"], serializer="pickle").encode(KEY, Bomb())
    EXECUTED.clear()
    assert reason(CODECS["plain"], sealed(body, ident=2)) == "serializer"
    assert reason(CODECS["plain"], sealed(body, ident=1)) == "body"
    assert reason(CODECS["pickle"], sealed(body, ident=2)) == "unsigned"
    assert reason(CODECS["pickle"], others) == "signature"
    assert reason(CODECS["signed"], ours) == "serializer"
    assert EXECUTED == []
    CODECS["pickle"].decode(KEY, ours)
    assert EXECUTED == ["boom"]


def test_pickle_keeps_what_typed_refuses():
    """Signed pickle brings objects back; it refuses with SerializationError on writing, CodecError on reading."""
    codec = CODECS["pickle"]
    assert there_and_back({"p": Point(3), "n": Number.ONE}, codec) == {"p": Point(3), "n": Number.ONE}
    with pytest.raises(SerializationError, match="pickle"):
        codec.encode(KEY, lambda: None)
    tail = codec.encode(KEY, "x")[:-32]
    broken = tail.replace(b"\x8c\x01x", b"c\x01x")
    mac = hmac.digest(b"k", HEAD[:1] + struct.pack(">H", len(KEY)) + KEY.encode() + broken, "sha256")
    assert reason(codec, HEAD + broken + mac) == "body"


def test_typed_is_read_whatever_is_set():
    """A change of serializer does not lose what typed wrote; the way back is a counted miss."""
    data = HEAD + CODECS["plain"].encode(KEY, SAMPLE)
    assert CODECS["kombu"].decode(KEY, data).value == SAMPLE
    assert CODECS["pickle"].decode(KEY, HEAD + CODECS["signed"].encode(KEY, SAMPLE)).value == SAMPLE
    assert reason(CODECS["plain"], HEAD + CODECS["kombu"].encode(KEY, [1])) == "serializer"
    assert reason(Codec(serializer="kombu:yaml"), HEAD + CODECS["kombu"].encode(KEY, [1])) == "serializer"


@pytest.mark.parametrize("name", ["json", "yaml", "msgpack"])
def test_kombu_does_what_kombu_does(name):
    """kombu:<name> alters what kombu alters and nothing else."""
    serialization = pytest.importorskip("kombu.serialization")
    value = {"a": [1, (2, 3)], "b": "grün", "c": None}
    content_type, encoding, payload = serialization.dumps(value, serializer=name)
    expected = serialization.loads(payload, content_type, encoding, accept={content_type})
    codec = Codec(serializer=f"kombu:{name}")
    assert same(there_and_back(value, codec), expected)
    assert same(read(codec.shelve(KEY, value, codec.encode(KEY, value))), expected)
    with pytest.raises(SerializationError, match="kombu"):
        codec.encode(KEY, {"x": object()})


def test_kombu_pickle_needs_a_signature():
    """Kombu's pickle is pickle."""
    with pytest.raises(ConfigurationError, match="signing_keys"):
        Codec(serializer="kombu:pickle")
    assert there_and_back(Point(1), Codec(serializer="kombu:pickle", signing_keys=[b"k"])) == Point(1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"serializer": "pickle"}, "signing_keys"),
        ({"serializer": "json"}, "kombu:<name>"),
        ({"serializer": "kombu:"}, "kombu:<name>"),
        ({"serializer": "kombu:raw"}, "kombu:<name>"),
        ({"serializer": "kombu:nonsense"}, "nonsense"),
        ({"compression": "lz4"}, "none of none, zlib, zstd"),
        ({"compression_threshold": -1}, "negative"),
        ({"max_value_size": 0}, "positive"),
        ({"signing_keys": [b""]}, "signing_keys"),
        ({"signing_keys": ["text"]}, "signing_keys"),
        ({"serializer": "pickle", "compression": "lz4"}, "2 settings"),
    ],
)
def test_settings_fail_at_construction(options, words):
    """Wrong settings are told at once, all in one message."""
    with pytest.raises(ConfigurationError, match=words):
        Codec(**options)


# --- what L1 holds


def read(shelved):
    """Return what a reader of L1 gets."""
    value, thaw = shelved
    return value if thaw is None else thaw(value)


MUTABLE = [
    *([1, "a"], {"a": 1}, {1, 2}, bytearray(b"ab"), [[1], {"a": [2]}], {"a": {"b": [1]}}, ([1], 2), {(1,): [2]}),
    *([], {}, [(1, 2), frozenset({3})], {"a": (1, [2])}),
]


def spoil(value):
    """Change every list, dict, set and bytearray inside."""
    if isinstance(value, list | tuple):
        for member in value:
            spoil(member)
    if isinstance(value, dict):
        for member in value.values():
            spoil(member)
        value["spoiled"] = 1
    elif isinstance(value, list | bytearray):
        value.append(66)
    elif isinstance(value, set):
        value.add("spoiled")


@pytest.mark.parametrize("name", ["plain", "signed zlib", "pickle"])
@pytest.mark.parametrize("value", MUTABLE, ids=repr)
def test_what_l1_holds_is_isolated(value, name):
    """Changing what was stored, or what any reader got, never changes the next read."""
    codec = CODECS[name]
    expected, written = there_and_back(value), there_and_back(value)
    tail = codec.encode(KEY, written)
    decoded = codec.decode(KEY, HEAD + tail)
    assert not decoded.is_shareable
    shelves = [codec.shelve(KEY, written, tail), codec.shelve_decoded(KEY, decoded, tail)]
    spoil(written)
    spoil(decoded.value)
    for shelved in shelves:
        for _ in range(3):
            got = read(shelved)
            assert same(got, expected)
            spoil(got)


@pytest.mark.parametrize("value", [1, 2**60, "x", None, (1, ("a", b"b")), frozenset({(1, 2)}), datetime(2026, 1, 1)])  # noqa: DTZ001
def test_immutable_values_are_shared(value):
    """What nobody can change is held as it is and read without a copy."""
    codec = Codec()
    tail = codec.encode(KEY, value)
    kept, thaw = codec.shelve(KEY, value, tail)
    assert kept is value
    assert thaw is None
    decoded = codec.decode(KEY, HEAD + tail)
    assert decoded.is_shareable
    assert codec.shelve_decoded(KEY, decoded, tail) == (decoded.value, None)


@pytest.mark.parametrize("value", [[1, "a"], {"a": (1,)}, {1, 2}])
def test_flat_values_thaw_by_their_own_copy(value):
    """A flat container costs a reader one copy in C, not a decoding."""
    codec = Codec()
    kept, thaw = codec.shelve(KEY, value, codec.encode(KEY, value))
    assert (kept, thaw) == (value, getattr(type(value), "copy"))  # noqa: B009 # the very function
    assert kept is not value


def test_shared_values_are_still_the_caches_own():
    """With copy_values off readers share one object, which is neither the writer's nor the first reader's."""
    codec = Codec(copy_values=False)
    value = {"a": [1]}
    tail = codec.encode(KEY, value)
    decoded = codec.decode(KEY, HEAD + tail)
    for kept, thaw in (codec.shelve(KEY, value, tail), codec.shelve_decoded(KEY, decoded, tail)):
        assert thaw is None
        assert kept == value
        assert kept["a"] is not value["a"]
        assert kept["a"] is not decoded.value["a"]


def test_l1_holds_what_l2_returns():
    """A serializer that alters values alters them in L1 too."""
    codec = CODECS["kombu"]
    for value in ((1, 2), {"a": (1,)}, "x", [Decimal(1)]):
        tail = codec.encode(KEY, value)
        assert same(read(codec.shelve(KEY, value, tail)), codec.decode(KEY, HEAD + tail).value)


def test_a_pickle_that_cannot_be_read_back_is_not_shelved():
    """What pickles but does not unpickle is a SerializationError on its way into L1."""

    class Local(Exception):  # noqa: N818
        def __init__(self, a, b):
            super().__init__(a)

    Local.__qualname__ = "Local"
    globals()["Local"] = Local
    try:
        value = Local(1, 2)
        with pytest.raises(SerializationError, match="read back"):
            CODECS["pickle"].shelve(KEY, value, CODECS["pickle"].encode(KEY, value))
    finally:
        del globals()["Local"]


def test_interruptions_pass_through_reading(monkeypatch):
    """An exception from outside, such as a soft time limit, is not taken for a bad body."""

    class SoftTimeLimit(Exception):  # noqa: N818
        pass

    def interrupted(_data):
        raise SoftTimeLimit

    data = HEAD + Codec().encode(KEY, (1, 2))
    monkeypatch.setitem(sys.modules["celery_mlcache.typed"]._RAISE, 0, interrupted)
    with pytest.raises(SoftTimeLimit):
        Codec().decode(KEY, data)


class Interrupted:
    """Unpickles into the soft time limit that a signal handler would raise there."""

    def __reduce__(self):
        return _raise_soft_limit, ()


def _raise_soft_limit():
    raise SoftTimeLimitExceeded


def test_soft_time_limit_passes_through_pickle(monkeypatch):
    """Neither reading nor writing takes Celery's soft time limit for a fault of the value."""
    codec = Codec(signing_keys=[b"k"], serializer="pickle")
    data = HEAD + codec.encode(KEY, Interrupted())
    with pytest.raises(SoftTimeLimitExceeded):
        codec.decode(KEY, data)
    monkeypatch.setattr(pickle, "dumps", lambda *_: _raise_soft_limit())
    with pytest.raises(SoftTimeLimitExceeded):
        codec.encode(KEY, Interrupted())


def test_one_codec_serves_many_threads():
    """Threads that share a codec do not see one another."""
    codec, failures = Codec(signing_keys=[b"k"], compression="zlib", compression_threshold=64), []

    def work(number):
        value = {"n": (number,) * 50, "t": datetime(2026, 1, 1, tzinfo=UTC) + timedelta(number)}
        failures.extend(number for _ in range(100) if not same(there_and_back(value, codec), value))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("width", [1, 10, 11, 40])
@pytest.mark.parametrize("odd", [None, (1,), bytearray(b"x"), 2**70, "\ud800", {(1,): 2}, [{"a": (1,)}]])
def test_short_cuts_for_rows_change_nothing(width, odd):
    """Lists of rows, long or short, come back exactly, whatever one of the rows holds."""
    for row in ({"id": 1, "tags": ["a", odd]}, [1, [odd]], (1, "a", odd), {"id": odd}):
        plain = {"id": 1, "tags": []} if type(row) is dict else type(row)((1, "b"))
        assert same(there_and_back([plain] * width + [row]), [plain] * width + [row])
    with pytest.raises(SerializationError, match=r"value\[\d+\]\[1\]"):
        Codec().encode(KEY, [(1, 2)] * width + [(1, Pair(1, 2))])
