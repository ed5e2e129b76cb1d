"""Measure the typed serializer and its rivals against pickle 5: ``python tests/benchmarks/codec_bench.py``.

Interleaved rounds, medians, printed as ratios to pickle 5 of the same run (below 1 is faster). msgpack and ormsgpack
are measured where installed; both need the walk that finds a bytearray, as they would store it as bytes.
"""

from __future__ import annotations

import pickle
import struct
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from importlib import import_module
from itertools import compress
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from uuid import UUID

sys.path.insert(0, str(Path(__file__).parents[2]))

from celery_mlcache import wire
from celery_mlcache.codec import Codec
from celery_mlcache.typed import dump_typed, load_typed

ROUNDS, CALLS = 80, 100

DOCUMENT = {
    "id": 918273645,
    "uuid": UUID("12345678123456781234567812345678"),
    "email": "jane.doe@example.org",
    "name": "Jane Döe",
    "active": True,
    "note": None,
    "tags": ["new", "vip", "eu", "newsletter", "beta"],
    "scores": [0.25, 0.5, 0.71, 0.99, 1.75, 2.125],
    "balance": Decimal("1234.56"),
    "created": datetime(2026, 3, 1, 12, 30, 15, 123456, tzinfo=UTC),
    "position": (52.520008, 13.404954),
    "digest": bytes(range(32)),
    "visits": [12, 7, 3055, 12, 0, 99, 123456],
    "address": {"street": "Unter den Linden 77", "city": "Berlin", "zip": "10117", "country": "DE"},
    "settings": {"theme": "dark", "language": "de", "page_size": 50, "zoom": 1.25, "beta": False},
    "orders": [
        {"sku": f"SKU-{i:05d}-XL", "title": f"Some product number {i} with words", "qty": i, "price": 9.5 * i}
        for i in range(1, 6)
    ],
}

Pair = tuple[Callable[[Any], bytes], Callable[[bytes], Any]]
_STAMP = struct.Struct(">HBBBBBI")
_CONTAINERS = {list, dict, tuple, set, frozenset}


def walk_types(value: Any) -> set[type]:
    """Return every type inside *value*: the cheapest walk found, level by level, mostly in C."""
    level, kinds = [value], {type(value)}
    while level:
        members: list[Any] = []
        for container in level:
            members += container.values() if type(container) is dict else container
        kinds.update(map(type, members))
        level = list(compress(members, map(_CONTAINERS.__contains__, map(type, members))))
    return kinds


def extension(value: Any, pack: Callable[[Any], bytes]) -> tuple[int, bytes]:
    """Return code and data for the four types of the document that msgpack lacks."""
    kind = type(value)
    if kind is tuple:
        return 1, pack(list(value))
    if kind is datetime:
        fields = (value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond)
        return 2, _STAMP.pack(*fields)
    if kind is Decimal:
        return 3, str(value).encode()
    if kind is UUID:
        return 4, value.bytes
    raise TypeError(kind)


def restore(code: int, data: bytes, unpack: Callable[[bytes], Any]) -> Any:
    """Undo :func:`extension`."""
    if code == 1:
        return tuple(unpack(data))
    if code == 2:
        return datetime(*_STAMP.unpack(data), tzinfo=UTC)
    return Decimal(data.decode()) if code == 3 else UUID(bytes=bytes(data))


def rivals() -> dict[str, Pair]:
    """Return dumps and loads of every engine that is installed."""
    found: dict[str, Pair] = {"pickle 5": (lambda value: pickle.dumps(value, 5), pickle.loads)}
    found["typed (msgspec)"] = (lambda value: dump_typed(value, 1 << 24), load_typed)
    try:
        found["ormsgpack, walk + hooks"] = ormsgpack_pair(import_module("ormsgpack"))
    except ImportError:
        print("ormsgpack is not installed")  # the script's output
    try:
        found["msgpack, walk + strict_types"] = msgpack_pair(import_module("msgpack"))
    except ImportError:
        print("msgpack is not installed")
    codec = Codec(wall_clock=lambda: 0.0)
    head = wire.pack_head(1)
    found["whole codec"] = (
        lambda value: head + codec.encode("bench", value),
        lambda data: codec.decode("bench", data).value,
    )
    signed = Codec(wall_clock=lambda: 0.0, signing_keys=[b"key"])
    found["whole codec, signed"] = (
        lambda value: head + signed.encode("bench", value),
        lambda data: signed.decode("bench", data).value,
    )
    return found


def ormsgpack_pair(module: Any) -> Pair:
    """Return ormsgpack with every pass-through option on."""
    names = ("BIG_INT", "DATACLASS", "DATETIME", "ENUM", "SUBCLASS", "TUPLE", "UUID")
    option = 0
    for name in names:
        option |= getattr(module, f"OPT_PASSTHROUGH_{name}")

    def pack(value: Any) -> bytes:
        return module.packb(value, lambda x: module.Ext(*extension(x, pack)), option)

    def unpack(data: bytes) -> Any:
        return module.unpackb(data, ext_hook=lambda code, part: restore(code, part, unpack))

    return (lambda value: walk_types(value) and pack(value), unpack)


def msgpack_pair(module: Any) -> Pair:
    """Return msgpack with strict types."""

    def pack(value: Any) -> bytes:
        return module.packb(
            value, strict_types=True, default=lambda x: module.ExtType(*extension(x, pack)), buf_size=2048
        )

    def unpack(data: bytes) -> Any:
        return module.unpackb(data, ext_hook=lambda code, part: restore(code, part, unpack), strict_map_key=False)

    return (lambda value: walk_types(value) and pack(value), unpack)


def timed(call: Callable[[Any], Any], argument: Any) -> float:
    """Return microseconds for one call, over CALLS of them."""
    start = perf_counter()
    for _ in range(CALLS):
        call(argument)
    return (perf_counter() - start) / CALLS * 1e6


def main() -> None:
    """Print the table."""
    pairs = rivals()
    blobs = {name: dumps(DOCUMENT) for name, (dumps, _) in pairs.items()}
    for name, (_, loads) in pairs.items():
        assert loads(blobs[name]) == DOCUMENT, name
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
    for _ in range(ROUNDS):
        for name, (dumps, loads) in pairs.items():
            times[name].append((timed(dumps, DOCUMENT), timed(loads, blobs[name])))
    figures = {
        name: (median(d for d, _ in rows), median(v for _, v in rows), median(d + v for d, v in rows))
        for name, rows in times.items()
    }
    base = figures["pickle 5"]
    for name, figure in figures.items():
        ratios = "  ".join(f"{mine / theirs:5.2f}" for mine, theirs in zip(figure, base, strict=True))
        print(f"    {name:40}  {ratios}   ({figure[0]:.1f} + {figure[1]:.1f} us, {len(blobs[name])} bytes)")


if __name__ == "__main__":
    main()
