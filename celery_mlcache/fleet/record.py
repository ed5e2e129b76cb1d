"""What is stored for one call: its result or its exception, and what there is to know about how it was made.

Pure: no clock, no cache. A record is a tuple of plain values, so that every serializer takes it; one that reads back as
something else is no record, and the call is computed anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import GetSetDescriptorType, MemberDescriptorType
from typing import Any, Final

from celery_mlcache.errors import SerializationError

_MARK: Final = "mlcache/1"  # of this layout; another one's records are not read
_FIELDS: Final = 7
_VALUE: Final = "value[2]"  # where the codec meets the outcome
_OF_ERRORS: Final = {"[2]": ".args", "[3]": ".__dict__"}  # ... and the parts of an exception
_SLOTS: Final = (MemberDescriptorType, GetSetDescriptorType)
_FAR: Final = 1e15  # seconds; what is not nearer is no time


@dataclass(frozen=True, slots=True)
class Record:
    """One call's outcome.

    Attributes:
        value: The result; of an exception ``(module, qualified name, args, attributes)``.
        seconds: How long it took to compute.
        made_at: When it was ready, seconds since 1970 by the maker's clock.
        life: Seconds from then that it was given.
        maker: Who computed it: ``task id@host``.
        is_error: The call has raised an exception.
    """

    value: Any
    seconds: float
    made_at: float
    life: float
    maker: str
    is_error: bool = False

    def of_outcome(self, refused: SerializationError) -> SerializationError:
        """Return why this record cannot be stored, in words of the outcome: users know of no record."""
        path, kind = "exception" if self.is_error else "result", refused.type_name
        if refused.path.startswith(_VALUE):
            inner = refused.path.removeprefix(_VALUE)
            for place, name in _OF_ERRORS.items() if self.is_error else ():
                inner = name + inner.removeprefix(place) if inner.startswith(place) else inner
            path += inner
        else:
            kind = self.value[1] if self.is_error else type(self.value).__name__
        return SerializationError(path, kind, refused.why)

    def pack(self) -> tuple[Any, ...]:
        """Return what is stored."""
        return (_MARK, self.is_error, self.value, self.seconds, self.made_at, self.life, self.maker)


def unpack(stored: Any) -> Record | None:
    """Return the record in *stored*, or None where it is none."""
    if not isinstance(stored, tuple | list) or len(stored) != _FIELDS or stored[0] != _MARK:
        return None
    _, is_error, value, seconds, made_at, life, maker = stored
    if not (is_error is True or is_error is False) or not isinstance(maker, str):
        return None
    if not (_is_time(seconds) and _is_time(made_at) and _is_time(life)):
        return None
    return Record(value, seconds, made_at, life, maker, is_error)


def _is_time(number: Any) -> bool:
    return isinstance(number, float | int) and -_FAR < number < _FAR  # nan is not


def pack_error(error: Exception) -> tuple[Any, ...] | None:
    """Return what an exception is made from again, or None for one that would come back different."""
    kind = type(error)
    try:
        # An OSError keeps the name of its file apart from its args, and its __reduce__ puts it back.
        args = error.__reduce__()[1] if isinstance(error, OSError) else error.args
        packed = (kind.__module__, kind.__qualname__, args, dict(error.__dict__))
        is_same = _looks(_make(kind, packed)) == _looks(error)
    except Exception:  # noqa: BLE001 - whatever a user's class does when it is made
        return None
    return packed if is_same else None


def _looks(error: Exception) -> tuple[Any, ...]:
    """Return all that can be seen of an exception: also what is kept in slots, as ``ImportError.name`` is."""
    kinds = type(error).__mro__[: type(error).__mro__.index(Exception)]
    names = [name for kind in kinds for name, what in vars(kind).items() if isinstance(what, _SLOTS)]
    return error.args, error.__dict__, str(error), [getattr(error, name, None) for name in names]


def unpack_error(packed: Any, kinds: Iterable[type[Exception]]) -> Exception | None:
    """Return the exception, if its class is one of *kinds* or derived from one, and known to this process.

    Nothing is imported for it and no code of its ``__init__`` runs: what is stored can only name a class that is here.
    """
    try:
        module, name, _, _ = packed
        kind = next((each for each in _tree(kinds) if (each.__module__, each.__qualname__) == (module, name)), None)
        return None if kind is None else _make(kind, packed)
    except Exception:  # noqa: BLE001 - as above
        return None


def _make(kind: type[Exception], packed: Any) -> Exception:
    _, _, args, attributes = packed
    error = kind.__new__(kind, *args)
    if not (isinstance(error, OSError) and error.args):  # that one has taken the name out
        error.args = tuple(args)
    error.__dict__.update(attributes)
    return error


def _tree(kinds: Iterable[type[Exception]]) -> Iterator[type[Exception]]:
    """Yield the classes and all that are derived from them."""
    todo, met = list(kinds), set()
    while todo:
        kind = todo.pop()
        if kind not in met:
            met.add(kind)
            yield kind
            todo += kind.__subclasses__()
