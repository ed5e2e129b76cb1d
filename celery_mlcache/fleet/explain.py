"""``task.cache.explain(...)``: why a call would, or would not, be answered from the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Explanation:
    """What there is to know about one call; asking changes nothing, and runs nothing.

    Attributes:
        task: The task's name.
        key: The call's key; None where it has none.
        parts: What the key is made of: version, the arguments that make a difference in wire form, what was ignored,
            what else varies.
        level: Where a result was found: "l1", "l2", "stale" (in L2, its life has ended), or None.
        is_hit: Whether the call would be answered without running the task, as things are.
        why: The reason, in a sentence.
        age: Seconds since the result was computed, by the clocks of its maker and this host; None without one.
        remaining: Seconds of life that it has left; of a stale one, until it is gone.
        took: Seconds that it took to compute.
        maker: Who computed it: ``task id@host``.
        is_error: It is an exception, cached by ``negative``.
        tags: What it can be invalidated by.
        holder: Who computes it just now: ``host:pid``.
    """

    task: str
    key: str | None
    why: str
    parts: Mapping[str, Any] = field(default_factory=dict)
    level: Literal["l1", "l2", "stale"] | None = None
    is_hit: bool = False
    age: float | None = None
    remaining: float | None = None
    took: float | None = None
    maker: str | None = None
    is_error: bool = False
    tags: tuple[str, ...] = ()
    holder: str | None = None

    def __str__(self) -> str:
        """Return it for people, a line for each thing that is known."""
        lines = [f"{self.task}: {'hit' if self.is_hit else 'miss'}: {self.why}"]
        for name in ("key", "level", "age", "remaining", "took", "maker", "holder"):
            value = getattr(self, name)
            if value is not None:
                lines.append(f"  {name:<10}{f'{value:.3f} s' if isinstance(value, float) else value}")
        if self.tags:
            lines.append(f"  tags      {', '.join(self.tags)}")
        lines += [
            f"  {name:<10}{value!r:.200}" for name, value in self.parts.items() if value not in ({}, (), [], None)
        ]
        return "\n".join(lines)
