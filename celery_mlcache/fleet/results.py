"""``task.cache``: a task's results in the cache, and the look-up that stands before its function."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

from celery_mlcache.entry import MISS
from celery_mlcache.errors import CacheKeyError, SerializationError
from celery_mlcache.fleet.app import fleet_of
from celery_mlcache.fleet.options import Options
from celery_mlcache.keys import call_key, check_tags
from celery_mlcache.manager import CacheManager

if TYPE_CHECKING:
    from celery_mlcache.fleet.task import CachedTask

log = logging.getLogger("celery_mlcache")


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
