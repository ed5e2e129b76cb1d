"""The base class of cached tasks: a Celery task whose result is looked up inside ``run``.

The base class wraps ``run`` when a task class is made, so the tracer, retries, signals, callbacks, chords, time limits
and the stored result work as for any task; ``__call__`` is left alone. What is below ``run`` sees the arguments in wire
form. ``apply_async`` and ``apply`` do no more than turn ``mlcache=`` into a header, unless a task asks for answers
where it is called (producer.py).
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

from celery import Celery, Task

from celery_mlcache.calls import CallShape
from celery_mlcache.fleet import modes, producer
from celery_mlcache.fleet.app import fleet_of
from celery_mlcache.fleet.options import OPTION_NAMES, RETRIES, Options
from celery_mlcache.fleet.results import TaskCache

_NO_RESULT: Final = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
_WRAPPED: Final = "__mlcache_original__"
_REST: Final = ("task_id", "producer", "link", "link_error", "shadow")  # of Celery's apply_async, in its order

log = logging.getLogger("celery_mlcache")


class CachedTask(Task):  # type: ignore[type-arg]  # generic in the stubs only
    """Base class of cached tasks: ``@app.task(base=CachedTask, mlcache={"ttl": 60})``.

    A hit is served inside the worker (or wherever the task is called), so everything Celery does around a task goes
    on. A cached ``bind=True`` task that returns its own request id returns the first one's; tasks that are called for
    their side effects must not be cached.

    Attributes:
        mlcache: Options, as a mapping; see :class:`~celery_mlcache.fleet.options.Options`. Those that it does not name
            are the base class's.
        cache: The cache of this task's results.
    """

    abstract = True
    mlcache: ClassVar[Mapping[str, Any] | Options | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Wrap the ``run`` of this class: a staticmethod from ``@app.task``, a method, or that of another base."""
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("_decorated"):  # by app.task, which makes an attribute of every option
            strays = {name: cls.__dict__[name] for name in OPTION_NAMES if name in cls.__dict__}
            if strays:
                shown = ", ".join(f"{name!r}: ..." for name in strays)
                msg = f"{cls.__name__}: options of the cache go into one: write mlcache={{{shown}}}, or @cached_task"
                raise TypeError(msg)
        cls._mlcache_declared = cls.__dict__.get("mlcache")  # Celery's annotations will replace the attribute
        own = cls.__dict__ if cls.__dict__.get("_decorated") else {}
        cls._mlcache_retries = {name: own[name] for name in RETRIES if name in own}  # annotations do not change these
        run: Any = inspect.getattr_static(cls, "run")
        if run is Task.__dict__["run"] or hasattr(run, _WRAPPED):
            return
        is_static = isinstance(run, staticmethod)
        original = run.__func__ if is_static else run

        if any(ask(original) for ask in _NO_RESULT):
            msg = f"{cls.__name__}: run must return its result; a coroutine or a generator is none"
            raise TypeError(msg)

        @functools.wraps(original)
        def cached_run(self: CachedTask, *args: Any, **kwargs: Any) -> Any:
            call = original if is_static else functools.partial(original, self)
            if type(self)._mlcache_original is not original:  # noqa: SLF001 - our own class
                return call(*args, **kwargs)  # super().run() of an overriding run: that one is cached already
            return self.cache.serving.answer(call, args, kwargs)

        setattr(cached_run, _WRAPPED, original)
        cls.run = cached_run  # type: ignore[method-assign, assignment]  # one class's run among many
        cls._mlcache_original = staticmethod(original)
        cls._mlcache_takes_self = not is_static
        cls._mlcache_shape = CallShape(original, skips_self=not is_static)

    _mlcache_declared: ClassVar[Any] = None
    _mlcache_retries: ClassVar[Mapping[str, Any]] = {}
    _mlcache_original: ClassVar[Callable[..., Any]]
    _mlcache_takes_self: ClassVar[bool]
    _mlcache_shape: ClassVar[CallShape]

    @classmethod
    def on_bound(cls, app: Celery) -> None:
        """Give the app its cache, if nobody has: a worker checks the settings before it takes a task."""
        super().on_bound(app)
        fleet_of(app)

    @functools.cached_property
    def cache(self) -> TaskCache:
        """The cache of this task's results."""
        return TaskCache(self)

    def mlcache_check(self) -> None:
        """Raise ConfigurationError if an option is wrong, wherever it was given: a worker asks before it starts."""
        _ = self.cache
        # Celery's annotations, and a class of the user's, make an attribute of anything.
        strays = [name for name in OPTION_NAMES if hasattr(self, name) and not callable(getattr(self, name))]
        if strays:
            text = "%s has attributes that are named like options of the cache, which go into mlcache={...}: %s"
            log.warning(text, self.name, ", ".join(strays), extra={"task": self.name, "names": strays})

    def apply_async(
        self, args: Any = None, kwargs: Any = None, *rest: Any, mlcache: modes.Mode | None = None, **options: Any
    ) -> Any:
        """Send the task, as Celery does, or answer it here.

        Args:
            args: As Celery's; and so is everything that is not named below.
            kwargs: As Celery's.
            *rest: As Celery's.
            mlcache: What this call wants of the cache: "use" it; "refresh": compute, and store the result over what is
                cached; "bypass": compute, and leave the cache alone; "only": raise NotCachedError where it would have
                to compute; "stale-ok": take a stale result where there is one, in place of waiting.
            **options: As Celery's.

        Raises:
            ValueError: *mlcache* is none of these.
        """
        options |= dict(zip(_REST, rest, strict=False))
        self._mlcache_choose(mlcache, options)
        settings = self.cache.options
        if settings.producer or settings.coalesce:
            return producer.answer(self, args, kwargs, options)
        return self.mlcache_publish(args, kwargs, **options)

    def mlcache_publish(self, args: Any, kwargs: Any, **options: Any) -> Any:
        """Send the task, whatever is cached."""
        return super().apply_async(args, kwargs, **options)

    def apply(self, args: Any = None, kwargs: Any = None, *rest: Any, mlcache: Any = None, **options: Any) -> Any:
        """Execute the task here, as Celery does; *mlcache* as for :meth:`apply_async`."""
        self._mlcache_choose(mlcache, options)
        return super().apply(args, kwargs, *rest, **options)

    def retry(self, args: Any = None, kwargs: Any = None, exc: Any = None, *rest: Any, **options: Any) -> Any:
        """Retry as Celery does; but an exception out of the cache is raised: it is what all retries have come to."""
        if exc is not None and self.request.__dict__.get(modes.FOUND) == id(exc):
            raise exc
        return super().retry(args, kwargs, exc, *rest, **options)

    def _mlcache_choose(self, mode: object, options: dict[str, Any]) -> None:
        """Turn a mode into a header: an unknown option would be lost on the way."""
        if mode is not None and modes.LEVEL in (options.get("stamped_headers") or ()):
            options[modes.LEVEL] = mode  # a stamp of this name, which Celery takes out of the options itself
            mode = mode if mode in modes.MODES else None  # ... and may be somebody else's
        if mode is None:
            mode = modes.ambient_mode(self)
            if mode is None or modes.HEADER in (options.get("headers") or {}):
                return
        options["headers"] = {**(options.get("headers") or {}), modes.HEADER: modes.check_mode(mode)}
