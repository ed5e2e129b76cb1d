"""Canonical keys and every Redis name. Pure functions; nothing else in the package spells a Redis name.

Keys of calls. ``canonical`` gives one form to arguments that Celery's JSON may change on their way: producer and
worker, positional and keyword, tuple and list, int and str keys must agree, or the same call runs twice and never
hits. What has no such form is refused, never keyed by ``repr`` or pickle: a partial key serves wrong results.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from hashlib import blake2b
from typing import Any, Final
from uuid import UUID

from celery_mlcache.errors import CacheKeyError, SerializationError, is_interrupt
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

    @property
    def lease_prefix(self) -> str:
        """What stands before a user's key, in the name of the record of its lease."""
        return f"mlcache:{{{self.namespace}}}:l{FORMAT_VERSION}:"

    def lease(self, key: str) -> str:
        """The Redis key of the record of one user key's lease."""
        return self.lease_prefix + key

    def wake(self, key: str, fence: int) -> str:
        """The Redis key of the list from which those pop who wait for the release of one lease."""
        return f"mlcache:{{{self.namespace}}}:w{FORMAT_VERSION}:{fence}:{key}"

    def mark(self, key: str) -> str:
        """The Redis key of a mark."""
        return f"mlcache:{{{self.namespace}}}:m{FORMAT_VERSION}:{key}"


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
    return f"{name}:{digest(canonical(dict(arguments)))}"


def digest(form: bytes) -> str:
    """Return the 32 hexadecimal digits that stand for a canonical form in a key."""
    return blake2b(form, digest_size=16).hexdigest()


def canonical(value: Any, path: str = "arguments") -> bytes:
    """Return bytes that are equal for values that Celery's wire may turn into one another, and differ otherwise.

    Each piece is type, length, content, so no two structures share a form. What decides is what kombu's JSON gives
    back, with types: True, 1, 1.0 and "1" differ, as 0.0 and -0.0 do; a tuple is a list, a dict's keys are text, an
    instant has the offset of its zone, a subclass is its base, an object with ``__json__`` is what that returns.

    What JSON does not carry (calls in this process, or pickle) has the form of what people send in its place: an enum
    its value, a dataclass or another mapping the dict of its fields, a pydantic model its ``model_dump(mode="json")``,
    a bytearray its bytes; sets and timedeltas have forms of their own. So types of yours do not count: two dataclasses
    with equal fields have one form.

    Raises:
        SerializationError: *value* holds something without a form, or itself; or something that the wire would alter
            (two keys that become one, a dict that kombu takes for one of its envelopes, a number that JSON refuses),
            or a model that leaves a part out of its dump (a secret, an excluded field).
    """
    try:
        return _form(value)
    except (_NoFormError, RecursionError) as exc:
        raise _refusal(exc, path, value) from exc.__cause__


def wire(value: Any, path: str = "arguments") -> Any:
    """Return *value* as a worker gets it; a set as a list in a fixed order. Raises as :func:`canonical`."""
    canonical(value, path)
    return _wire(value)


class KnownNames:
    """The form of a mapping whose keys are known beforehand: that of :func:`canonical`, for less. Thread-safe.

    Attributes:
        names: The keys.
    """

    __slots__ = ("_labels", "names")

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self._labels = sorted((_form(name), name) for name in self.names)

    def form(self, values: Mapping[str, Any], path: str = "arguments") -> bytes:
        """Return ``canonical({name: values[name], ...})``; raises as that does."""
        pieces = []
        name = ""
        try:
            for label, name in self._labels:
                pieces.append(label)
                pieces.append(_form(values[name]))
        except (_NoFormError, RecursionError) as exc:
            raise _refusal(exc, f"{path}[{name!r:.40}]", values[name]) from exc.__cause__
        return _piece(b"d", b"".join(pieces))


class _NoFormError(Exception):
    """Something has no form; each container that it passes adds a step to the path, innermost first."""

    def __init__(self, type_name: str, why: str) -> None:
        super().__init__(type_name, why)
        self.type_name, self.why = type_name, why
        self.steps: list[str] = []


def _refusal(exc: _NoFormError | RecursionError, path: str, value: Any) -> SerializationError:
    if isinstance(exc, RecursionError):
        return SerializationError(path, type(value).__name__, "is nested too deep for a key")
    return SerializationError(path + "".join(reversed(exc.steps)), exc.type_name, exc.why)


def _form(value: Any) -> bytes:
    # A subclass may not mean what its base does: only exact types go straight to their form.
    make = _FORMS.get(type(value))
    return _form(_plainer(value)) if make is None else make(value)


def _wire(value: Any) -> Any:
    kind = type(value)
    if kind not in _FORMS:
        return _wire(_plainer(value))
    if kind is list or kind is tuple:
        return [_wire(item) for item in value]
    if kind is set or kind is frozenset:
        return [_wire(item) for item in sorted(value, key=_form)]
    if kind is dict:
        return {_key_text(key): _wire(item) for key, item in value.items()}
    if kind is datetime or kind is time:
        return kind.fromisoformat(kind.isoformat(value))  # its zone becomes an offset
    return bytes(value) if kind is bytearray else value


# ---- forms of exact types ---------------------------------------------------------------------------------------


def _piece(tag: bytes, content: bytes) -> bytes:
    return b"%b%d:%b" % (tag, len(content), content)


def _text_form(value: str) -> bytes:
    try:
        content = value.encode()
    except UnicodeEncodeError:
        raise _NoFormError("str", "is not valid Unicode text") from None
    return b"s%d:%b" % (len(content), content)


def _int_form(value: int) -> bytes:
    return _piece(b"i", _digits(value).encode())


def _digits(value: int) -> str:
    try:
        return int.__repr__(value)
    except ValueError:
        raise _NoFormError("int", "has more digits than JSON takes") from None


def _moment_form(tag: bytes, kind: type[datetime | time]) -> Callable[[Any], bytes]:
    # A zone's utcoffset() is foreign code.
    return lambda value: _piece(tag, _ask(kind.isoformat, value).encode())


def _list_form(value: Iterable[Any]) -> bytes:
    pieces: list[bytes] = []
    try:
        for item in value:
            pieces.append(_form(item))  # noqa: PERF401 - the error says how far we came
    except _NoFormError as exc:
        exc.steps.append(f"[{len(pieces)}]")
        raise
    return _piece(b"l", b"".join(pieces))


def _set_form(value: Iterable[Any]) -> bytes:
    try:
        return _piece(b"e", b"".join(sorted([_form(item) for item in value])))
    except _NoFormError as exc:
        exc.steps.append("{}")
        raise


def _dict_form(value: Mapping[Any, Any]) -> bytes:
    forms: dict[str, bytes] = {}
    for key, item in value.items():
        text = key if type(key) is str else _key_text(key)
        if text in forms:
            raise _NoFormError("dict", f"has two keys that are {text!r:.40} on the wire")
        try:
            forms[text] = _form(item)
        except _NoFormError as exc:
            exc.steps.append(f"[{text!r:.40}]")
            raise
    if forms.keys() == _ENVELOPE:
        raise _NoFormError("dict", "has the keys of kombu's envelopes, and would not arrive as a dict")
    return _piece(b"d", b"".join(sorted([_text_form(text) + form for text, form in forms.items()])))


def _key_text(key: Any) -> str:
    """Dictionary keys are text on the wire: JSON turns 1 into "1", True into "true", None into "null"."""
    if key is None or isinstance(key, bool):
        return {None: "null", True: "true", False: "false"}[key]
    if isinstance(key, str):
        return str.__str__(key)
    if isinstance(key, int):
        return _digits(key)
    if isinstance(key, float):
        text = float.__repr__(key)
        return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(text, text)
    if isinstance(key, Enum):
        return _key_text(_ask(_value_of, key))
    raise _NoFormError(f"key of type {type(key).__qualname__}", "has no form in a cache key")


_ENVELOPE: Final = {"__type__", "__value__"}
_FORMS: Final[Mapping[type, Callable[[Any], bytes]]] = {
    type(None): lambda _: b"c4:None",
    bool: lambda value: b"c4:True" if value else b"c5:False",
    str: _text_form,
    int: _int_form,
    float: lambda value: _piece(b"f", repr(value).encode()),
    bytes: lambda value: _piece(b"b", value),
    bytearray: lambda value: _piece(b"b", bytes(value)),
    datetime: _moment_form(b"D", datetime),
    date: lambda value: _piece(b"d", value.isoformat().encode()),
    time: _moment_form(b"t", time),
    timedelta: lambda value: _piece(b"x", b"%d,%d,%d" % (value.days, value.seconds, value.microseconds)),
    # The caller's decimal context may write the exponent in lower case.
    Decimal: lambda value: _piece(b"n", str(value).replace("e", "E").encode()),
    UUID: lambda value: _piece(b"u", value.bytes),
    list: _list_form,
    tuple: _list_form,
    set: _set_form,
    frozenset: _set_form,
    dict: _dict_form,
}


# ---- everything else, one step nearer to an exact type ----------------------------------------------------------


def _ask(question: Callable[[Any], Any], value: Any) -> Any:
    """Ask what may be a user's code; what it raises becomes ours, except for what Celery raises in a task."""
    try:
        return question(value)
    except _NoFormError:
        raise
    except Exception as exc:
        if is_interrupt(exc):
            raise
        raise _NoFormError(_type_name(value), f"cannot be read for a key: {type(exc).__name__}") from exc


def _plainer(value: Any) -> Any:
    return _ask(_step, value)


def _step(value: Any) -> Any:
    """Return what stands for *value*, in the order in which kombu's encoder asks."""
    for kind, content in _NATIVE:
        if isinstance(value, kind):
            return content(value)
    if hasattr(type(value), "__json__"):
        return value.__json__()
    for kind, arrives in _CARRIED:
        if isinstance(value, kind):
            return _unaltered(value, arrives(value))
    for test, content in _SUBSTITUTES:
        if test(value):
            return content(value)
    raise _NoFormError(_type_name(value), "has no form in a cache key")


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _unaltered(value: Any, arrived: Any) -> Any:
    """Refuse a subclass that holds more than its base does, such as nanoseconds: the rest would not count."""
    if arrived == value:  # a subclass that redefines equality need not redefine the lack of it
        return arrived
    raise _NoFormError(_type_name(value), f"is more than the {type(arrived).__name__} that the wire makes of it")


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


def _value_of(member: Any) -> Any:
    return member.value


def _is_record(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def _fields_of(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _dump(model: Any) -> Any:
    if _hides(model):
        raise _NoFormError(_type_name(model), "leaves a secret or an excluded field out of its dump")
    return model.model_dump(mode="json")  # what people send to a task with pydantic=True


def _hides(value: Any) -> bool:
    """Return whether a model's dump is silent on a part of it: models that differ there would share a form."""
    kind = type(value)
    if hasattr(kind, "get_secret_value"):
        return True
    if hasattr(kind, "model_fields"):
        omits = any(field.exclude or getattr(field, "exclude_if", None) for field in kind.model_fields.values())
        return omits or any(_hides(item) for _, item in value)
    if _is_record(value):
        return _hides(_fields_of(value))
    if isinstance(value, Mapping):
        return any(_hides(item) for item in value.values())
    return isinstance(value, (list, tuple, set, frozenset)) and any(_hides(item) for item in value)


# What JSON writes by itself. It looks at the content, whatever a subclass says of itself.
_NATIVE: Final[tuple[tuple[Any, Callable[[Any], Any]], ...]] = (
    (str, str.__str__),
    (int, int.__index__),
    (float, float.__float__),
    ((list, tuple), list),
    (dict, lambda value: dict(value.items())),
)
# What kombu adds to it: encoded and decoded as kombu does.
_CARRIED: Final[tuple[tuple[type, Callable[[Any], Any]], ...]] = (
    (datetime, lambda value: datetime.fromisoformat(datetime.isoformat(value))),
    (date, lambda value: datetime.fromisoformat(value.isoformat()).date()),
    (time, lambda value: time.fromisoformat(value.isoformat())),
    (Decimal, lambda value: Decimal(str(value))),
    (UUID, lambda value: UUID(value.hex)),
    (bytes, lambda value: memoryview(value).tobytes()),
)
# What it refuses, so that it comes from this process or by pickle.
_SUBSTITUTES: Final[tuple[tuple[Callable[[Any], bool], Callable[[Any], Any]], ...]] = (
    (_is(Enum), _value_of),
    (_is(bytearray), lambda value: memoryview(value).tobytes()),
    (_is(set, frozenset), frozenset),
    (_is_record, _fields_of),
    (lambda value: hasattr(type(value), "model_dump"), _dump),
    (_is(Mapping), lambda value: dict(value.items())),
)
