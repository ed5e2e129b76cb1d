"""The base class of cached tasks: a Celery task whose result is looked up inside ``run``.

The base class wraps ``run`` when a task class is made, so the tracer, retries, signals, callbacks, chords, time limits
and the stored result work as for any task; ``__call__`` and ``apply_async`` are left alone. What is below ``run`` sees
the arguments in wire form. User errors, Retry, Ignore, Reject and SoftTimeLimitExceeded pass through untouched:
nothing here catches them, and nothing is stored then.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

from celery import Celery, Task

from celery_mlcache.calls import CallShape
from celery_mlcache.fleet.app import fleet_of
from celery_mlcache.fleet.options import Options
from celery_mlcache.fleet.results import TaskCache

_WRAPPED: Final = "__mlcache_original__"


class CachedTask(Task):  # type: ignore[type-arg]  # generic in the stubs only
    """Base class of cached tasks: ``@app.task(base=CachedTask, mlcache={"ttl": 60})``.

    A hit is served inside the worker (or wherever the task is called), so everything Celery does around a task goes
    on. A cached ``bind=True`` task that returns its own request id returns the first one's; tasks that are called for
    their side effects must not be cached.

    Attributes:
        mlcache: Options, as a mapping.
        cache: The cache of this task's results.
    """

    abstract = True
    mlcache: ClassVar[Mapping[str, Any] | Options | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Wrap the ``run`` of this class: a staticmethod from ``@app.task``, a method, or that of another base."""
        super().__init_subclass__(**kwargs)
        run: Any = inspect.getattr_static(cls, "run")
        if run is Task.__dict__["run"] or hasattr(run, _WRAPPED):
            return
        is_static = isinstance(run, staticmethod)
        original = run.__func__ if is_static else run

        @functools.wraps(original)
        def cached_run(self: CachedTask, *args: Any, **kwargs: Any) -> Any:
            call = original if is_static else functools.partial(original, self)
            if type(self)._mlcache_original is not original:  # noqa: SLF001 - our own class
                return call(*args, **kwargs)  # super().run() of an overriding run: that one is cached already
            return self.cache.run(call, args, kwargs)

        setattr(cached_run, _WRAPPED, original)
        cls.run = cached_run  # type: ignore[method-assign, assignment]  # one class's run among many
        cls._mlcache_original = staticmethod(original)
        cls._mlcache_takes_self = not is_static
        cls._mlcache_shape = CallShape(original, skips_self=not is_static)

    _mlcache_original: ClassVar[Callable[..., Any]]
    _mlcache_takes_self: ClassVar[bool]
    _mlcache_shape: ClassVar[CallShape]

    @classmethod
    def on_bound(cls, app: Celery) -> None:
        """Give the app its cache, if nobody has: a worker checks the settings before it takes a task."""
        fleet_of(app)

    @functools.cached_property
    def cache(self) -> TaskCache:
        """The cache of this task's results."""
        return TaskCache(self)
