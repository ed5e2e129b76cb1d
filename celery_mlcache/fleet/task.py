"""``@cached_task``: a Celery task whose result is cached, looked up inside ``run``.

The base class wraps ``run`` when a task class is made, so the tracer, retries, signals, callbacks, chords, time limits
and the stored result work as for any task; ``__call__`` and ``apply_async`` are left alone. What is below ``run`` sees
the arguments in wire form. User errors, Retry, Ignore, Reject and SoftTimeLimitExceeded pass through untouched:
nothing here catches them, and nothing is stored then.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, ClassVar, Final, TypeVar, overload

from celery import Celery, Task, shared_task

from celery_mlcache.entry import MISS
from celery_mlcache.errors import CacheKeyError, ConfigurationError, SerializationError
from celery_mlcache.fleet.app import fleet_of
from celery_mlcache.keys import call_key, check_tags
from celery_mlcache.manager import CacheManager, check_ttl

F = TypeVar("F", bound=Callable[..., Any])

_WRAPPED: Final = "__mlcache_original__"

log = logging.getLogger("celery_mlcache")


@dataclass(frozen=True, slots=True)
class Options:
    """How one task is cached: the ``mlcache={...}`` of a task, or the keywords of ``@cached_task``.

    Attributes:
        ttl: Seconds a result lives; None for the cache's default.
        tags: What a result can be invalidated by; ``{name}`` stands for that argument, as in ``str.format``.
    """

    ttl: float | None = None
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse at decoration what would be refused at the first call."""
        try:
            if self.ttl is not None:
                check_ttl(self.ttl)
            object.__setattr__(self, "tags", check_tags(self.tags))
        except (ValueError, TypeError) as exc:
            raise ConfigurationError([str(exc)]) from None

    @classmethod
    def of(cls, given: Mapping[str, Any] | Options | None, task_name: str) -> Options:
        """Return checked options; raises ConfigurationError for a wrong one."""
        if isinstance(given, Options):
            return given
        given = dict(given or {})
        known = [field.name for field in fields(cls)]
        unknown = [name for name in given if name not in known]
        if unknown:
            problem = f"{task_name}: mlcache option {', '.join(unknown)} is unknown; there are {', '.join(known)}"
            raise ConfigurationError([problem])
        return cls(**given)


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


class CallShape:
    """Binds a call's arguments to names, with defaults applied; made once for each task.

    Plain signatures are bound by hand: ``inspect.Signature.bind`` costs 11 us a call.
    """

    __slots__ = ("_defaults", "_is_plain", "_names", "_positional", "_signature")

    def __init__(self, function: Callable[..., Any], *, skips_self: bool) -> None:
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())[1 if skips_self else 0 :]
        self._signature = signature.replace(parameters=parameters)
        self._is_plain = all(p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY} for p in parameters)
        self._positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self._names = {p.name for p in parameters}
        self._defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

    def check_templates(self, tags: Sequence[str], task_name: str) -> None:
        """Refuse tags that name what is no argument; raises ConfigurationError."""
        names = {*self._names, *(p.name for p in self._signature.parameters.values())}
        for tag in tags:
            try:
                fields = [name for _, name, _, _ in string.Formatter().parse(tag) if name is not None]
            except ValueError as exc:
                raise ConfigurationError([f"{task_name}: the tag {tag!r} is no template: {exc}"]) from None
            for field in fields:
                name = re.split(r"[.\[]", field, maxsplit=1)[0]
                if name not in names:
                    known = ", ".join(sorted(names)) or "it has none"
                    problem = f"{task_name}: the tag {tag!r} names {name!r}, which is no argument of the task ({known})"
                    raise ConfigurationError([problem])

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return argument values by name; raises TypeError as the call itself would."""
        if self._is_plain and len(args) <= len(self._positional):
            bound = {**self._defaults, **dict(zip(self._positional, args, strict=False)), **kwargs}
            is_clean = not any(name in kwargs for name in self._positional[: len(args)])
            if is_clean and bound.keys() == self._names:
                return bound
        found = self._signature.bind(*args, **kwargs)
        found.apply_defaults()
        return found.arguments


class TaskCache:
    """What ``task.cache`` offers. Thread- and fork-safe, as the manager is.

    Arguments are those of the task; where one has no canonical form the call is a *bypass*: it runs, nothing is
    cached, and it is logged once for each task.
    """

    def __init__(self, task: CachedTask) -> None:
        self._task = task
        self._options = Options.of(task.mlcache, task.name)
        task._mlcache_shape.check_templates(self._options.tags, task.name)  # noqa: SLF001 - our own class
        self._has_warned = False

    @property
    def manager(self) -> CacheManager:
        """The app's cache manager."""
        return fleet_of(self._task.app).cache

    def key(self, *args: Any, **kwargs: Any) -> str:
        """Return the cache key of a call.

        Raises:
            TypeError: The arguments do not fit the task.
            SerializationError: An argument has no form in a key.
        """
        return self._name(self._bind(args, kwargs))

    def tags(self, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """Return the tags of a call's result.

        Raises:
            TypeError: The arguments do not fit the task.
            CacheKeyError: With these arguments one of them cannot be a tag.
        """
        return self._tags(self._bind(args, kwargs))

    def get(self, *args: Any, **kwargs: Any) -> Any:
        """Return the cached result of a call, or MISS; runs nothing. Raises as :meth:`key`."""
        return self.manager.get(self.key(*args, **kwargs), MISS)

    def invalidate(self, *args: Any, **kwargs: Any) -> bool:
        """Remove one call's result from every process; return whether there was one. Raises as :meth:`key`."""
        return self.manager.delete(self.key(*args, **kwargs))

    def refresh(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task's function here and now, store the result over what is cached, and return it.

        An invalidation that passes meanwhile wins: the result is then returned and not stored. Raises what the
        function raises, and as :meth:`key`.
        """
        bound = self._bind(args, kwargs)
        key, tags = self._name(bound), self._tags(bound)
        kind = type(self._task)
        original = kind._mlcache_original  # noqa: SLF001 - our own class
        call = functools.partial(original, self._task) if kind._mlcache_takes_self else original  # noqa: SLF001
        return self.manager.refresh(key, lambda: call(*args, **kwargs), self._options.ttl, tags=tags)

    def run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the cached result, or run *call* and cache it; for CachedTask."""
        try:
            bound = self._bind(args, kwargs)
        except TypeError:
            return call(*args, **kwargs)  # what does not fit raises there, from the function itself
        try:
            key, tags = self._name(bound), self._tags(bound)
        except (SerializationError, CacheKeyError) as exc:
            self._bypass(exc)
            return call(*args, **kwargs)
        return self.manager.get_or_set(key, lambda: call(*args, **kwargs), self._options.ttl, tags=tags)

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        return self._task._mlcache_shape.bind(args, kwargs)  # noqa: SLF001 - our own class

    def _name(self, bound: Mapping[str, Any]) -> str:
        return call_key(f"task:{self._task.name}", bound)

    def _tags(self, bound: Mapping[str, Any]) -> tuple[str, ...]:
        templates = self._options.tags
        if not templates:
            return ()
        # As in the key: on its way through the broker an enum becomes its value.
        wire = {name: value.value if isinstance(value, Enum) else value for name, value in bound.items()}
        try:
            return check_tags([template.format_map(wire) for template in templates])
        except CacheKeyError:
            raise
        except Exception as exc:  # whatever a user's __format__ raises
            raise CacheKeyError(", ".join(templates), f"cannot be made from these arguments: {exc!r}", "tag") from exc

    def _bypass(self, why: Exception) -> None:
        self.manager.count_bypass()
        if not self._has_warned:
            self._has_warned = True
            log.warning("a call cannot be cached", extra={"task": self._task.name, "why": str(why)})


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
