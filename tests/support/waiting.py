"""Waiting for a state, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], timeout: float = 5.0, what: str = "", *, pause: float = 0.005) -> T:
    """Return the first truthy answer of *condition*, asked every *pause* seconds; AssertionError after *timeout*."""
    deadline = time.monotonic() + timeout
    while True:
        if answer := condition():
            return answer
        if time.monotonic() >= deadline:
            name = what or getattr(condition, "__qualname__", repr(condition))
            raise AssertionError(f"did not happen within {timeout:g} s: {name} (last answer: {answer!r})")
        time.sleep(pause)
