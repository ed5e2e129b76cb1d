"""Canonical keys and every Redis name. Pure functions; nothing else in the package spells a Redis name.

Keys of calls. ``canonical`` gives one form to arguments that Celery's JSON may change on their way: producer and
worker, positional and keyword, tuple and list, int and str keys must agree, or the same call runs twice and never
hits. What has no such form is refused, never keyed by ``repr`` or pickle: a partial key serves wrong results.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from hashlib import blake2b
from typing import Any, Final
from uuid import UUID

from celery_mlcache.errors import CacheKeyError, SerializationError
from celery_mlcache.wire import FORMAT_VERSION, MAX_STAMP, MESSAGE_VERSION

MAX_KEY_BYTES: Final = 1024
MAX_TAGS: Final = 64  # on one entry: each costs Redis a look-up when the entry is stored
NAMESPACE_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,99}"
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def check_key(key: object) -> str:
    """Return *key* if it can be a key.

    Raises:
        CacheKeyError: It is not a ``str``, is empty, is longer than 1024 bytes of UTF-8, cannot be encoded, or
            holds a control character.
    """
    return _check_name(key, "cache key")


def check_tags(tags: object) -> tuple[str, ...]:
    """Return *tags*, each once, if they can be tags: a list, tuple or set of what could be keys, at most 64.

    Raises:
        TypeError: They are no list, tuple or set; a str would be taken for its letters.
        CacheKeyError: One of them cannot be a tag, for a reason of :func:`check_key`, or there are too many.
    """
    if not isinstance(tags, (list, tuple, set, frozenset)):
        msg = f"tags must be a list, tuple or set of str, not {tags!r:.80}"
        raise TypeError(msg)
    if not tags:
        return ()
    found = tuple(dict.fromkeys([_check_name(tag, "tag") for tag in tags]))
    if len(found) > MAX_TAGS:
        raise CacheKeyError(found[MAX_TAGS], f"is one of {len(found)} tags; at most {MAX_TAGS} are allowed", "tag")
    return found


def check_prefix(prefix: object) -> str:
    """Return *prefix* if a key could begin with it; raises CacheKeyError as :func:`check_key` does."""
    return _check_name(prefix, "prefix")


def _check_name(name: object, what: str) -> str:
    if not isinstance(name, str):
        raise CacheKeyError(name, f"must be a str, not {type(name).__name__}", what)
    if not name:
        raise CacheKeyError(name, "must not be empty", what)
    try:
        size = len(name) if name.isascii() else len(name.encode("utf-8"))
    except UnicodeEncodeError:
        raise CacheKeyError(name.encode("utf-8", "replace").decode(), "is not valid Unicode text", what) from None
    if size > MAX_KEY_BYTES:
        raise CacheKeyError(name, f"has {size} bytes of UTF-8; at most {MAX_KEY_BYTES} are allowed", what)
    # Printable text is the common case, and tells so five times faster than the pattern.
    if not name.isprintable() and _CONTROL.search(name):
        raise CacheKeyError(name, "must not hold control characters", what)
    # A subclass may hash or compare as it likes, and would run its code inside the L1 engine.
    return name if type(name) is str else str.__str__(name)


@dataclass(frozen=True, slots=True)
class RedisNames:
    """Every name that one namespace uses in Redis.

    All keys carry the hash tag ``{namespace}``, so that a script's keys share a cluster slot. The channel carries
    the database number, because Redis pub/sub ignores it, and the message version, so that releases with another
    format never see one another's messages.
    """

    namespace: str
    db: int = 0

    @property
    def counter(self) -> str:
        """The stamp counter."""
        return f"mlcache:{{{self.namespace}}}:stamp"

    @property
    def floors(self) -> str:
        """The stamps below which values are dead (see wire.py)."""
        return f"mlcache:{{{self.namespace}}}:floors"

    @property
    def channel(self) -> str:
        """The backplane's channel."""
        return f"mlcache:{{{self.namespace}}}:{self.db}:invalidate.v{MESSAGE_VERSION}"

    @property
    def value_prefix(self) -> str:
        """What stands before a user's key."""
        return f"mlcache:{{{self.namespace}}}:v{FORMAT_VERSION}:"

    def value(self, key: str) -> str:
        """The Redis key of one user key."""
        return self.value_prefix + key

    @property
    def tag_prefix(self) -> str:
        """What stands before a tag, in the name of its record."""
        return f"mlcache:{{{self.namespace}}}:t{FORMAT_VERSION}:"

    def tag(self, tag: str) -> str:
        """The Redis key of one tag's record."""
        return self.tag_prefix + tag


def format_token(namespace: str, stamp: int) -> str:
    """Return the causal token of *stamp*: text that survives any header."""
    return f"{namespace}@{stamp}"


def parse_token(token: object, namespace: str) -> int:
    """Return the stamp in *token*.

    Raises:
        ValueError: It is not a token of this namespace.
    """
    owner, _, digits = token.rpartition("@") if isinstance(token, str) else ("", "", "")
    is_number = digits.isascii() and digits.isdigit() and len(digits) <= len(str(MAX_STAMP))
    if owner != namespace or not is_number or int(digits) > MAX_STAMP:
        msg = f"barrier() takes a token of the namespace {namespace!r}, not {token!r:.80}"
        raise ValueError(msg)
    return int(digits)


def call_key(name: str, arguments: Mapping[str, Any]) -> str:
    """Return the key of a call of *name* with its bound *arguments*, defaults applied.

    Raises:
        SerializationError: An argument has no canonical form; names its path and type.
    """
    return f"{name}:{blake2b(canonical(dict(arguments)), digest_size=16).hexdigest()}"


def canonical(value: Any, path: str = "arguments") -> bytes:
    """Return bytes that are equal for values that Celery's wire may turn into one another, and differ otherwise.

    Each piece is type, length, content, so no two structures share a form.

    Raises:
        SerializationError: *value* holds something without a canonical form, or itself.
    """
    try:
        return _canonical(value, path)
    except RecursionError:
        raise SerializationError(path, type(value).__name__, "is nested too deep for a key") from None


def _canonical(value: Any, path: str) -> bytes:
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, bool):
        return _piece("c", str(value).encode())
    for kind, tag, text in _SCALARS:
        if isinstance(value, kind):
            return _scalar(value, path, tag, text)
    if isinstance(value, (list, tuple)):
        return _piece("l", b"".join([_canonical(item, f"{path}[{i}]") for i, item in enumerate(value)]))
    if isinstance(value, (set, frozenset)):
        return _piece("e", b"".join(sorted(_canonical(item, f"{path}{{}}") for item in value)))
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    elif hasattr(type(value), "model_dump"):
        value = value.model_dump(mode="json")  # what Celery's pydantic=True sends
    if isinstance(value, Mapping):
        pairs = [(_key_text(key, path), _canonical(item, f"{path}[{key!r:.40}]")) for key, item in value.items()]
        pairs.sort()
        return _piece("d", b"".join([key + item for key, item in pairs]))
    raise SerializationError(path, f"{type(value).__module__}.{type(value).__qualname__}", "has no form in a cache key")


def _scalar(value: Any, path: str, tag: str, text: Callable[[Any], bytes]) -> bytes:
    try:
        return _piece(tag, text(value))
    except UnicodeEncodeError:
        raise SerializationError(path, type(value).__name__, "is not valid Unicode text") from None


def _piece(tag: str, content: bytes) -> bytes:
    return b"%s%d:%s" % (tag.encode(), len(content), content)


def _key_text(key: Any, path: str) -> bytes:
    """Dictionary keys are text on the wire: JSON turns 1 into "1", True into "true", None into "null"."""
    if isinstance(key, Enum):
        key = key.value
    if key is None or isinstance(key, bool):
        key = {None: "null", True: "true", False: "false"}[key]
    elif isinstance(key, (int, float)):
        key = repr(key)
    if not isinstance(key, str):
        raise SerializationError(path, f"key of type {type(key).__qualname__}", "has no form in a cache key")
    return _canonical(key, path)


_SCALARS: Final[tuple[tuple[type, str, Callable[[Any], bytes]], ...]] = (
    (str, "s", lambda value: str.encode(value, "utf-8")),
    (int, "i", lambda value: b"%d" % value),
    (float, "f", lambda value: float.__repr__(value).encode()),
    (bytes, "b", bytes),
    (bytearray, "b", bytes),
    (datetime, "D", lambda value: datetime.isoformat(value).encode()),
    (date, "d", lambda value: date.isoformat(value).encode()),
    (time, "t", lambda value: time.isoformat(value).encode()),
    (timedelta, "x", lambda value: b"%d,%d,%d" % (value.days, value.seconds, value.microseconds)),
    (Decimal, "n", lambda value: str(value).encode()),
    (UUID, "u", lambda value: value.bytes),
)
