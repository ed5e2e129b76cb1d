"""``@cached_task``: stands in the place of ``@app.task`` or ``@shared_task``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, overload

from celery import Celery, Task, shared_task

from celery_mlcache.calls import CallShape
from celery_mlcache.fleet.options import Options
from celery_mlcache.fleet.task import CachedTask


@overload
def cached_task(function: Callable[..., Any], /) -> Any: ...
@overload
def cached_task(
    function: None = None, /, *, app: Celery | None = None, base: Any = None, **options: Any
) -> Callable[[Callable[..., Any]], Any]: ...
def cached_task(
    function: Callable[..., Any] | None = None,
    /,
    *,
    app: Celery | None = None,
    base: Any = None,
    **options: Any,
) -> Any:
    """Make a Celery task whose result is cached: ``@cached_task`` or ``@cached_task(ttl=300, ...)``.

    It stands in the place of ``@app.task``; do not write both.

    Args:
        function: The function, where the decorator has no brackets.
        app: The app it belongs to; without it, as with ``@shared_task``, every app.
        base: A task class of yours to build on.
        **options: ``ttl`` and ``tags`` (see :class:`Options`); everything else is an option of ``@app.task``.

    Raises:
        ConfigurationError: An option's value is wrong.
        TypeError: What is decorated is a task already, or no function.
    """
    names = [field.name for field in fields(Options)]
    own = {name: options.pop(name) for name in names if name in options}

    def decorate(wrapped: Callable[..., Any]) -> Any:
        if isinstance(wrapped, Task) or not callable(wrapped):
            msg = (
                f"@cached_task takes a function, not {type(wrapped).__name__}: write @cached_task(ttl=...) alone, in "
                "the place of @app.task or @shared_task, and give it their options"
            )
            raise TypeError(msg)
        kind = CachedTask if base is None else _with_base(base)
        settled = Options.of(own, wrapped.__name__)
        CallShape(wrapped, skips_self=bool(options.get("bind"))).check_templates(settled.tags, wrapped.__name__)
        settings = {"mlcache": settled, "base": kind, **options}
        return shared_task(**settings)(wrapped) if app is None else app.task(**settings)(wrapped)

    return decorate if function is None else decorate(function)


def _with_base(base: Any) -> type[CachedTask]:
    if issubclass(base, CachedTask):
        kind: type[CachedTask] = base
        return kind
    return type(base.__qualname__, (CachedTask, base), {"abstract": True, "__module__": base.__module__})
