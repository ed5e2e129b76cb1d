"""Values to tails and back (see wire.py). No Redis, no Celery; kombu only where a serializer is asked for by its name.

Header (wire.py's H bytes)::

    CRC-32, u32 | created, u64 ms | key, note, each u16 length and bytes | number of tags, u16 | tags, as the key

The CRC covers the tail but for itself and, in a counter, the digits, which Lua rewrites; 0 when signed. The note is
kombu's serializer, type and encoding. With keys, an HMAC-SHA256 of format version, key and tail follows the body.
"""

from __future__ import annotations

import hmac
import importlib
import pickle
import re
import struct
import sys
import time as clock
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from celery_mlcache import wire
from celery_mlcache.errors import CodecError, ConfigurationError, SerializationError, is_interrupt
from celery_mlcache.protocols import Decoded
from celery_mlcache.typed import BODY_ERRORS, SCALARS, dump_typed, load_typed, type_name

Thaw = Callable[[Any], Any]

_FLAG_SIGNED: Final = 1
_FLAG_ZLIB: Final = 2
_FLAG_ZSTD: Final = 4
_FLAGS: Final = frozenset({0, 1, 2, 3, 4, 5})

_ASCII: Final = 0  # the serializer of counters
_TYPED: Final = 1
_PICKLE: Final = 2
_KOMBU: Final = 3

_PREFIX: Final = struct.Struct(">BBBH")
_CREATED_AND_KEY_SIZE: Final = struct.Struct(">QH")
_FIXED: Final = struct.Struct(">BBBHIQH")  # the tail up to the key: kind, flags, serializer, H, the header's start
_FIXED_SIZE: Final = _FIXED.size - _PREFIX.size
_CRC_AT: Final = wire.HEAD_SIZE + _PREFIX.size
_KEY_AT: Final = wire.HEAD_SIZE + _FIXED.size
_NO_NAMES: Final = b"\0\0\0\0"  # no note, no tags
_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")
_MAX_HEADER: Final = 0xFFFF
_MAC_SIZE: Final = 32
_COUNTER: Final = re.compile(rb"0|-?[1-9][0-9]{0,15}")  # as Lua's "%.0f" writes it

_BODY_ERRORS: Final = (*BODY_ERRORS, zlib.error)


# --- other serializers --------------------------------------------------------------------------------------------


class _Pickle:
    """Protocol 5; the codec sees to the signature."""

    ident = _PICKLE
    note = b""

    def dumps(self, value: object) -> bytes:
        try:
            return pickle.dumps(value, 5)
        except Exception as exc:  # whatever a user's __reduce__ raises
            if is_interrupt(exc):  # a soft time limit, raised in the middle of foreign code, is no fault of the bytes
                raise
            raise SerializationError("value", type_name(value), f"does not pickle: {exc}") from exc

    def loads(self, body: bytes) -> Any:
        return pickle.loads(body)  # noqa: S301 # the MAC was checked before


class _Kombu:
    """A serializer of kombu's registry, for those who want what Celery's messages do, alterations included."""

    ident = _KOMBU

    def __init__(self, name: str) -> None:
        registry = importlib.import_module("kombu.serialization")
        self._encode_error: type[Exception] = importlib.import_module("kombu.exceptions").EncodeError
        self._name, self._dumps, self._loads = name, registry.dumps, registry.loads
        self.content_type, self._encoding, _ = self._dumps(None, serializer=name)
        self.note = f"{name}\n{self.content_type}\n{self._encoding}".encode()

    def dumps(self, value: object) -> bytes:
        try:
            payload = self._dumps(value, serializer=self._name)[2]
            return payload.encode(self._encoding) if isinstance(payload, str) else bytes(payload)
        except (self._encode_error, ValueError, TypeError, RuntimeError) as exc:
            raise SerializationError("value", type_name(value), f"is refused by kombu:{self._name}: {exc}") from exc

    def loads(self, body: bytes) -> Any:
        return self._loads(body, self.content_type, self._encoding, accept={self.content_type})


def _foreign_serializer(serializer: str, *, is_signed: bool, problems: list[str]) -> _Pickle | _Kombu | None:
    if serializer == "typed":
        return None
    needs_key = f"serializer={serializer!r} runs code on reading: it needs signing_keys"
    if serializer == "pickle":
        if not is_signed:
            problems.append(needs_key)
        return _Pickle()
    scheme, _, name = serializer.partition(":")
    if scheme != "kombu" or not name or name == "raw":
        problems.append(f"serializer={serializer!r} is none of typed, pickle, kombu:<name>")
        return None
    try:
        made = _Kombu(name)
    except Exception as exc:  # noqa: BLE001 # a missing kombu, an unknown name, a package the name needs
        problems.append(f"serializer={serializer!r} cannot be used: {exc}")
        return None
    if made.content_type == "application/x-python-serialize" and not is_signed:
        problems.append(needs_key)
    return made


# --- compression --------------------------------------------------------------------------------------------------


def _decompress(decompressor: Any, body: bytes, limit: int) -> bytes:
    """Run a zlib or zstd decompressor over *body*, which must be one whole stream of at most *limit* bytes."""
    data: bytes = decompressor.decompress(body, limit + 1)
    if len(data) > limit:
        raise CodecError("size")
    if not decompressor.eof or decompressor.unused_data:
        raise CodecError("body")
    return data


class _Zlib:
    """zlib's decompressor, under the names that compression.zstd gives: what is left over counts as unused."""

    def __init__(self) -> None:
        self._made = zlib.decompressobj()

    def decompress(self, body: bytes, limit: int) -> bytes:
        return self._made.decompress(body, limit)

    @property
    def eof(self) -> bool:
        return self._made.eof

    @property
    def unused_data(self) -> bytes:
        return self._made.unused_data


class _Zstd:
    """compression.zstd (Python 3.14) or the zstandard package, whichever is there; ImportError when neither is."""

    def __init__(self) -> None:
        self._is_stdlib = sys.version_info >= (3, 14)
        self._module: Any = importlib.import_module("compression.zstd" if self._is_stdlib else "zstandard")
        self._error: type[Exception] = self._module.ZstdError

    def compress(self, body: bytes) -> bytes:
        if self._is_stdlib:
            return bytes(self._module.compress(body, 1))
        return bytes(self._module.ZstdCompressor(level=1).compress(body))  # one a call: they are not thread-safe

    def decompress(self, body: bytes, limit: int) -> bytes:
        try:
            if self._is_stdlib:
                return _decompress(self._module.ZstdDecompressor(), body, limit)
            # zstandard trusts the size a frame declares, so it is looked at first; ours always declare it.
            if not 0 <= self._module.frame_content_size(body) <= limit:
                raise CodecError("size")
            made = self._module.ZstdDecompressor().decompress(body, max_output_size=limit, allow_extra_data=False)
            return bytes(made)
        except self._error as exc:
            raise CodecError("body") from exc


def _find_zstd() -> _Zstd | None:
    try:
        return _Zstd()
    except ImportError:
        return None


# --- the codec ----------------------------------------------------------------------------------------------------


_FROZEN_CONTAINERS: Final = frozenset({tuple, frozenset})
_SHALLOW_COPY: Final[dict[type, Thaw]] = {list: list.copy, dict: dict.copy, set: set.copy}


class _Opened(NamedTuple):
    """What stored bytes hold, found good; the body is not compressed any more."""

    ident: int
    created_ms: int
    tags: tuple[str, ...]
    body: bytes


def _why_short(data: bytes) -> str:
    is_tombstone = len(data) > wire.HEAD_SIZE and data[wire.HEAD_SIZE] == wire.KIND_TOMBSTONE
    if data[:1] not in {b"", bytes((wire.FORMAT_VERSION,))}:
        return "version"
    return "kind" if is_tombstone else "truncated"


def _join_names(note: bytes, tags: Sequence[str]) -> bytes:
    """Return the header from the note on."""
    if not note and not tags:
        return _NO_NAMES
    raw_tags = [tag.encode() for tag in tags]
    try:
        parts = [_U16.pack(len(note)), note, _U16.pack(len(raw_tags))]
        for tag in raw_tags:
            parts += _U16.pack(len(tag)), tag
    except struct.error:
        raise SerializationError("tags", type_name(tags), "are too many or too long") from None
    return b"".join(parts)


def _split_names(names: bytes) -> tuple[bytes, tuple[str, ...]]:
    """Undo :func:`_join_names`; raises CodecError, struct.error or ValueError over anything else."""
    if names == _NO_NAMES:
        return b"", ()
    note, at = _name(names, 0)
    (count,) = _U16.unpack_from(names, at)
    at += 2
    tags = []
    for _ in range(count):
        tag, at = _name(names, at)
        tags.append(tag.decode())
    if at != len(names):
        raise CodecError("truncated")
    return note, tuple(tags)


def _name(names: bytes, at: int) -> tuple[bytes, int]:
    (size,) = _U16.unpack_from(names, at)
    end = at + 2 + size
    return names[at + 2 : end], end


def _is_frozen(value: object) -> bool:
    """Whether nothing inside can be changed: a walk by levels, as a pickled tuple may be deeper than the stack."""
    if type(value) in SCALARS:
        return True
    level: list[Any] = [value]
    while level:
        if not _FROZEN_CONTAINERS.issuperset(map(type, level)):
            return False
        level = [m for c in level for m in c if type(m) not in SCALARS]
    return True


def _are_frozen(members: Iterable[object]) -> bool:
    return SCALARS.issuperset(map(type, members)) or all(map(_is_frozen, members))


def _shallow_copy(value: Any) -> Thaw | None:
    """Return what copies *value* if a shallow copy shares nothing that can be changed."""
    copy = _SHALLOW_COPY.get(type(value))
    if copy is None or not _are_frozen(value):
        return None
    return copy if type(value) is not dict or _are_frozen(value.values()) else None


class Codec:
    """Makes tails from values and values from stored bytes; thread-safe, fork-safe, holds no open resource.

    Args:
        serializer: "typed" (exact types or SerializationError), "pickle" (with *signing_keys* only) or
            "kombu:<name>" (alters what kombu alters). Typed payloads can be read whatever is set here.
        signing_keys: The first signs, all verify; empty: nothing is signed and nothing signed is read.
        compression: "none", "zlib" (level 1) or "zstd" (level 1; Python 3.14 or the zstandard package).
        compression_threshold: Bodies of fewer bytes stay as they are.
        max_value_size: Bytes; the largest body before compression on writing, after decompression on reading.
        wall_clock: Seconds since 1970, for ``Decoded.created``.
        copy_values: Each reader of L1 gets an own copy; False: all share one, which nobody may change.

    Raises:
        ConfigurationError: With every problem found.

    Limits: a counter without a signature has no checksum over its digits.
    """

    def __init__(
        self,
        *,
        serializer: str = "typed",
        signing_keys: Sequence[bytes] = (),
        compression: str = "none",
        compression_threshold: int = 4096,
        max_value_size: int = 16 * 1024 * 1024,
        wall_clock: Callable[[], float] = clock.time,
        copy_values: bool = True,
    ) -> None:
        problems: list[str] = []
        self._keys = tuple(signing_keys)
        if not all(isinstance(key, bytes) and key for key in self._keys):
            problems.append("signing_keys holds something that is not bytes, or empty")
        self._foreign = _foreign_serializer(serializer, is_signed=bool(self._keys), problems=problems)
        self._zstd = _find_zstd()
        self._compress, self._compress_flag = self._compressor(compression, problems)
        if compression_threshold < 0:
            problems.append(f"compression_threshold={compression_threshold} is negative")
        if max_value_size <= 0:
            problems.append(f"max_value_size={max_value_size} is not positive")
        if problems:
            raise ConfigurationError(problems)
        self._threshold = compression_threshold
        self._max_value_size = max_value_size
        self._wall_clock = wall_clock
        self._copies = copy_values
        self._readable = {_ASCII, _TYPED} if self._foreign is None else {_ASCII, _TYPED, self._foreign.ident}

    def _compressor(self, name: str, problems: list[str]) -> tuple[Callable[[bytes], bytes] | None, int]:
        if name == "zlib":
            return partial(zlib.compress, level=1), _FLAG_ZLIB
        if name == "zstd" and self._zstd is not None:
            return self._zstd.compress, _FLAG_ZSTD
        if name == "zstd":
            problems.append("compression='zstd' needs the zstandard package (or Python 3.14)")
        elif name != "none":
            problems.append(f"compression={name!r} is none of none, zlib, zstd")
        return None, 0

    def encode(self, key: str, value: object, *, tags: Sequence[str] = ()) -> bytes:
        """Return the tail for *value*.

        Raises:
            SerializationError: The value, or its encoded size, is not one that can be stored; names the path.
        """
        note, flags = b"", _FLAG_SIGNED if self._keys else 0
        if type(value) is int and -wire.MAX_INTEGER <= value <= wire.MAX_INTEGER:
            kind, ident, body = wire.KIND_INTEGER, _ASCII, b"%d" % value
        else:
            kind = wire.KIND_VALUE
            if self._foreign is None:
                ident, body = _TYPED, dump_typed(value, self._max_value_size)
            else:
                ident, note, body = self._foreign.ident, self._foreign.note, self._foreign.dumps(value)
            if len(body) > self._max_value_size:
                why = f"takes {len(body)} bytes, max_value_size is {self._max_value_size}"
                raise SerializationError("value", type_name(value), why)
            if self._compress is not None and len(body) >= self._threshold:
                packed = self._compress(body)
                if len(packed) < len(body):
                    body, flags = packed, flags | self._compress_flag
        return self._seal(key.encode(), (kind, flags, ident), (note, tags), body)

    def _seal(
        self, raw_key: bytes, marks: tuple[int, int, int], names: tuple[bytes, Sequence[str]], body: bytes
    ) -> bytes:
        raw_names = _join_names(*names)
        size = _FIXED_SIZE + len(raw_key) + len(raw_names)
        if size > _MAX_HEADER:
            raise SerializationError("tags", type_name(names[1]), f"and key take {size} bytes, a header {_MAX_HEADER}")
        prefix = _PREFIX.pack(*marks, size)
        created_ms = max(0, int(self._wall_clock() * 1000))
        rest = b"".join((_CREATED_AND_KEY_SIZE.pack(created_ms, len(raw_key)), raw_key, raw_names, body))
        if self._keys:
            tail = b"".join((prefix, b"\0\0\0\0", rest))
            return tail + self._mac(self._keys[0], raw_key, tail)
        covered = rest[: size - 4] if marks[0] == wire.KIND_INTEGER else rest
        return b"".join((prefix, _U32.pack(zlib.crc32(covered, zlib.crc32(prefix))), rest))

    @staticmethod
    def _mac(signing_key: bytes, raw_key: bytes, tail: bytes) -> bytes:
        covered = b"".join((bytes((wire.FORMAT_VERSION,)), _U16.pack(len(raw_key)), raw_key, tail))
        return hmac.digest(signing_key, covered, "sha256")

    def decode(self, key: str, data: bytes) -> Decoded:
        """Return what *data*, head and tail, holds for *key*; never runs code from it unless it is signed pickle.

        Raises:
            CodecError: And nothing else; the reason is one of version, kind, flags, serializer, truncated, key,
                signed, unsigned, signature, size, body.
        """
        try:
            opened = self._open(key.encode(), data)
            value = self._load(opened.ident, opened.body)
        except _BODY_ERRORS as exc:
            raise CodecError("body") from exc
        return Decoded(value, _is_frozen(value), opened.tags, opened.created_ms / 1000)

    def _open(self, raw_key: bytes, data: bytes) -> _Opened:
        """Check all that can be checked before the body is looked into, then take it out of the compression."""
        if len(data) < _KEY_AT:
            raise CodecError(_why_short(data))
        if wire.split_value(data) is None:
            raise CodecError("version")
        kind, flags, ident, size, crc, created_ms, key_size = _FIXED.unpack_from(data, wire.HEAD_SIZE)
        self._check_marks(kind, flags, ident)
        start, end = _CRC_AT + size, len(data)
        if size < _FIXED_SIZE or start > end:
            raise CodecError("truncated")
        if self._keys or flags & _FLAG_SIGNED:
            self._verify(raw_key, flags, data[wire.HEAD_SIZE :])
            end -= _MAC_SIZE
        else:
            covered = data[_CRC_AT + 4 : start if kind == wire.KIND_INTEGER else end]
            if zlib.crc32(covered, zlib.crc32(data[wire.HEAD_SIZE : _CRC_AT])) != crc:
                raise CodecError("body")
        names_at = _KEY_AT + key_size
        if data[_KEY_AT:names_at] != raw_key:
            raise CodecError("key")
        note, tags = _split_names(data[names_at:start])
        if ident == _KOMBU and (self._foreign is None or note != self._foreign.note):
            raise CodecError("serializer")
        return _Opened(ident, created_ms, tags, self._unpack(flags, data[start:end]))

    def _check_marks(self, kind: int, flags: int, ident: int) -> None:
        if kind not in {wire.KIND_VALUE, wire.KIND_INTEGER}:
            raise CodecError("kind")
        if flags not in _FLAGS or (kind == wire.KIND_INTEGER and flags & ~_FLAG_SIGNED):
            raise CodecError("flags")
        if (ident == _ASCII) != (kind == wire.KIND_INTEGER) or ident not in self._readable:
            raise CodecError("serializer")

    def _verify(self, raw_key: bytes, flags: int, tail: bytes) -> None:
        if not self._keys:
            raise CodecError("signed")  # nothing here can tell whether it is genuine
        if not flags & _FLAG_SIGNED:
            raise CodecError("unsigned")
        content, mac = tail[:-_MAC_SIZE], tail[-_MAC_SIZE:]
        if not any(hmac.compare_digest(mac, self._mac(signing_key, raw_key, content)) for signing_key in self._keys):
            raise CodecError("signature")

    def _unpack(self, flags: int, body: bytes) -> bytes:
        if flags & _FLAG_ZLIB:
            return _decompress(_Zlib(), body, self._max_value_size)
        if flags & _FLAG_ZSTD:
            if self._zstd is None:
                raise CodecError("flags")
            return self._zstd.decompress(body, self._max_value_size)
        if len(body) > self._max_value_size:
            raise CodecError("size")
        return body

    def _load(self, ident: int, body: bytes) -> Any:
        if ident == _TYPED:
            return load_typed(body)
        if ident == _ASCII:
            if _COUNTER.fullmatch(body) is None or abs(number := int(body)) > wire.MAX_INTEGER:
                raise CodecError("body")
            return number
        try:
            return self._thaw(ident)(body)
        except Exception as exc:  # whatever a user's __setstate__ raises
            if is_interrupt(exc):  # a soft time limit, raised in the middle of foreign code, is no fault of the bytes
                raise
            raise CodecError("body") from exc

    def _own_body(self, tail: bytes) -> tuple[int, bytes]:
        """Return serializer and body of a tail that this process has made or checked."""
        _, flags, ident, size = _PREFIX.unpack_from(tail)
        end = len(tail) - _MAC_SIZE if flags & _FLAG_SIGNED else len(tail)
        return ident, self._unpack(flags, tail[_PREFIX.size + size : end])

    def _thaw(self, ident: int) -> Thaw:
        return load_typed if ident == _TYPED or self._foreign is None else self._foreign.loads

    def shelve(self, key: str, value: object, tail: bytes) -> tuple[Any, Thaw | None]:  # noqa: ARG002 # the protocol's
        """Return ``(value, thaw)`` for L1 after :meth:`encode` made *tail* from *value*; shares only what is immutable.

        What other serializers alter is altered in L1 too, so that both levels return equal values.

        Raises:
            SerializationError: Pickle or kombu cannot read what they wrote.
        """
        ident, body = self._own_body(tail)
        if ident == _ASCII or (ident == _TYPED and _is_frozen(value)):
            return value, None
        thaw = self._thaw(ident)
        if ident == _TYPED and self._copies and type(value) is not bytearray and _shallow_copy(value) is None:
            return body, thaw  # what thaws it makes the copy, so none is made now
        try:
            own = self._load(ident, body)
        except (CodecError, *_BODY_ERRORS) as exc:
            raise SerializationError("value", type_name(value), "cannot be read back") from exc
        if not self._copies or _is_frozen(own):
            return own, None
        return self._shelve_own(own, body, thaw)

    def shelve_decoded(self, key: str, decoded: Decoded, tail: bytes) -> tuple[Any, Thaw | None]:  # noqa: ARG002
        """Return ``(value, thaw)`` for L1 of what :meth:`decode` found in *tail*; isolated from ``decoded.value``."""
        if decoded.is_shareable:
            return decoded.value, None
        ident, body = self._own_body(tail)
        if not self._copies:
            return self._load(ident, body), None
        copy = _shallow_copy(decoded.value)
        return self._shelve_own(decoded.value if copy is None else copy(decoded.value), body, self._thaw(ident))

    @staticmethod
    def _shelve_own(own: Any, body: bytes, thaw: Thaw) -> tuple[Any, Thaw]:
        if type(own) is bytearray:
            return bytes(own), bytearray
        copy = _shallow_copy(own)
        return (body, thaw) if copy is None else (own, copy)
