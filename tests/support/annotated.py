"""Annotations that every release of Celery can read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_type_hints

import celery


def annotated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give *function*, of a ``pydantic=True`` task, its annotations as types: before 5.6, Celery reads none as text."""
    if celery.VERSION < (5, 6):
        function.__annotations__ = get_type_hints(function)
    return function
