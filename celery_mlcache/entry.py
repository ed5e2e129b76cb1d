"""What L1 holds, and the sentinel for a miss. Pure data and pure questions; imports nothing of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final


class Missing(Enum):
    """The type of :data:`MISS`: a one-member enum keeps its identity through pickle and types as a literal."""

    MISS = "miss"

    def __repr__(self) -> str:
        """Read as the name users import."""
        return "MISS"

    def __bool__(self) -> bool:
        """A miss is falsy."""
        return False


MISS: Final = Missing.MISS


@dataclass(frozen=True, slots=True)
class Entry:
    """One L1 entry; never mutated, never handed to users.

    Attributes:
        value: What readers get, or what ``thaw`` makes it from.
        stamp: Redis order of the write that made it.
        deadline: Seconds on the monotonic clock; dead from there on, never later than the value's life in L2.
        epoch: The process's epoch when it was put; an entry of another epoch is void.
        thaw: Makes each reader's own copy of a mutable value; None when the value cannot be changed and is shared.
        tags: What it can be invalidated by, beside its key.
    """

    value: Any
    stamp: int
    deadline: float
    epoch: int
    thaw: Callable[[Any], Any] | None = None
    tags: tuple[str, ...] = ()

    def read(self) -> Any:
        """Return the value as a reader may have it."""
        return self.value if self.thaw is None else self.thaw(self.value)
