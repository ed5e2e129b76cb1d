r"""The bytes that several processes, releases and the Lua scripts must agree on. No I/O, no clock.

Value, in a Redis string (offsets in bytes, big endian)::

    0      format version, 2
    1-8    stamp, u64: Redis order of the write
    9-16   expiry, u64: milliseconds since 1970 by the server's clock
    17-24  stale end, u64: until then it may be served where an expired value will do; 0: it may not
    25     kind: "V" value, "I" integer (body is ASCII decimal, for Lua adds to it), "T" tombstone (nothing follows)
    26     flags         \
    27     serializer     |  the *tail*: made by codec.py; lua/increment.lua relies on kind, flags and H
    28-29  H, u16         |
    30-    H bytes of header (codec.py), then the body and, when signed, the MAC   /   lua/prelude.lua reads the
           key's length, the note and the tags in it

Head (bytes 0-24) and tail are joined by the script that takes the stamp. Only the tail is signed. The expiry stands in
the value because a PTTL asked beside the value may be another value's: a key can expire and be filled in between.

Message, on the channel: lines of UTF-8 joined by ``\n`` (names hold no control characters)::

    1 \n op \n stamp \n time [\n name]...

    op      what is dead if it is older than the stamp: W written, D deleted (the keys named), T (what carries one of
            the tags named), P (keys that begin with the prefix named), F flush (everything)
    time    the server's clock when it announced, microseconds since 1970: for measuring lag, never for coherence

Floors, in one Redis string; each line after the first is a prefix that was invalidated and is not swept yet::

    floor SP newest SP guard [\n stamp SP prefix]...

    floor   values stamped below it are dead
    newest  stamp of the newest invalidation of any tag: a value not older than it needs no look at its tags
    guard   stamp of the newest invalidation of any prefix: fills that began before it are refused

Record of a tag, in a Redis string that lives longer than what carries the tag: ``stamp SP soft SP until``. What
carries the tag and is older than the stamp is dead, what is older than *soft* has expired; where there is no record,
what is older than *newest* is dead.

An unknown version, an unknown op or anything undecodable is a gap, never an exception.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from struct import Struct
from struct import error as StructError  # noqa: N812 - a class
from typing import Final

FORMAT_VERSION: Final = 2
MESSAGE_VERSION: Final = 1
MAX_STAMP: Final = 2**53 - 2**40  # Lua counts in doubles; what is above is not a stamp of ours
MAX_INTEGER: Final = 2**53  # the largest magnitude a counter may have, for the same reason

KIND_VALUE: Final = 0x56  # "V"
KIND_INTEGER: Final = 0x49  # "I"
KIND_TOMBSTONE: Final = 0x54  # "T"

_MAX_DIGITS: Final = len(str(MAX_STAMP))
_HEAD: Final = Struct(">BQQQ")
HEAD_SIZE: Final = _HEAD.size
_KEY_AT: Final = HEAD_SIZE + 17  # the key's length: after kind, flags, serializer, H, CRC and time
_U16: Final = Struct(">H")


def pack_head(stamp: int, expires_ms: int = 0, stale_ms: int = 0) -> bytes:
    """Return bytes 0-24 of a value."""
    return _HEAD.pack(FORMAT_VERSION, stamp, expires_ms, stale_ms)


def split_value(data: bytes) -> tuple[int, int, int, int] | None:
    """Return ``(stamp, expiry, stale end, kind)``, times in ms, or None where the bytes are not of this format."""
    if len(data) <= HEAD_SIZE:
        return None
    version, stamp, expires_ms, stale_ms = _HEAD.unpack_from(data)
    if version != FORMAT_VERSION or stamp > MAX_STAMP:
        return None
    return stamp, expires_ms, stale_ms, data[HEAD_SIZE]


@dataclass(frozen=True, slots=True)
class Message:
    """One announcement on the channel: what is older than ``stamp`` is dead, of the keys, tags, prefixes or of all."""

    stamp: int
    keys: tuple[str, ...] = ()
    is_flush: bool = False
    server_time: float = 0.0  # seconds since 1970 by the server's clock
    tags: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()


def parse_message(data: bytes) -> Message | None:
    """Return the message, or None for anything that is not one of ours (never raises)."""
    try:
        version, op, stamp_text, time_text, *names = data.decode("utf-8").split("\n")
        if version != str(MESSAGE_VERSION) or op not in {"W", "D", "T", "P", "F"}:
            return None
        if not (stamp_text.isascii() and stamp_text.isdigit() and time_text.isascii() and time_text.isdigit()):
            return None
        if len(stamp_text) > _MAX_DIGITS or len(time_text) > _MAX_DIGITS:
            return None
        stamp = int(stamp_text)
    except (UnicodeDecodeError, ValueError):
        return None
    if not 0 < stamp <= MAX_STAMP or (op == "F") != (not names):
        return None
    return Message(
        stamp,
        keys=tuple(names) if op in {"W", "D"} else (),
        is_flush=op == "F",
        server_time=int(time_text) / 1e6,
        tags=tuple(names) if op == "T" else (),
        prefixes=tuple(names) if op == "P" else (),
    )


def parse_order(counter: object, floors: object) -> tuple[int, int]:
    """Return the counter and the floor from their Redis strings; 0 for what is absent or garbage (never raises)."""
    return _digits(counter), _digits(floors.split(b" ", 1)[0]) if isinstance(floors, bytes) else 0


def is_plain(floors: object, values: Iterable[object]) -> bool:
    """Return whether stamps and floor alone say which of *values* are dead (never raises).

    Not where prefixes are told in *floors*, and not for a value with tags that is older than the newest invalidation.
    """
    fields = floors.split(b" ") if isinstance(floors, bytes) and b"\n" not in floors else []
    if len(fields) != 3 or not fields[1].isdigit() or len(fields[1]) > _MAX_DIGITS:  # noqa: PLR2004 - see above
        return False
    floor, newest, _ = fields
    return floor == newest or not any(
        isinstance(data, bytes) and _is_older(data, int(newest)) and _has_tags(data) for data in values
    )


def _is_older(data: bytes, stamp: int) -> bool:
    split = split_value(data)
    return split is not None and split[0] < stamp and split[3] != KIND_TOMBSTONE


def _has_tags(data: bytes) -> bool:
    """Look where codec.py's header has the number of tags; whatever cannot be read there is none of its."""
    try:
        at = _KEY_AT
        for _ in range(2):  # the key and the note
            at += 2 + _U16.unpack_from(data, at)[0]
        return bool(_U16.unpack_from(data, at)[0])
    except StructError:
        return False


def _digits(text: object) -> int:
    is_number = isinstance(text, bytes) and text.isdigit() and len(text) <= _MAX_DIGITS
    return int(text) if is_number and isinstance(text, bytes) else 0
