"""``task.cache``: one task's results in the cache, for those who would read, replace, drop or understand them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from celery.canvas import Signature

from celery_mlcache.calls import CallKeys, source_version
from celery_mlcache.entry import MISS
from celery_mlcache.errors import CacheKeyError, ConfigurationError, SerializationError
from celery_mlcache.fleet import modes
from celery_mlcache.fleet.explain import Explanation
from celery_mlcache.fleet.lifecycle import TASKS
from celery_mlcache.fleet.options import Options
from celery_mlcache.fleet.record import Record, unpack, unpack_error
from celery_mlcache.fleet.serving import Serving
from celery_mlcache.manager import CacheManager
from celery_mlcache.plans import Inspection

if TYPE_CHECKING:
    from celery_mlcache.fleet.task import CachedTask

WARM_BATCH: Final = 100


class TaskCache:
    """What ``task.cache`` offers. Thread- and fork-safe, as the manager is.

    Arguments are those of the task; where one has no canonical form the call is a *bypass*: it runs, nothing is
    cached, and it is logged once for each task.

    Raises:
        ConfigurationError: An option is wrong, wherever it was given.
    """

    def __init__(self, task: CachedTask) -> None:
        kind = type(task)
        self._task = task
        self._shape = kind._mlcache_shape  # noqa: SLF001 - our own class
        options = settle(task)
        if not callable(options.tags):
            self._shape.check_templates(options.tags, task.name)
        keys = CallKeys(
            task.name,
            self._shape,
            ignore=options.ignore,
            key=options.key,
            version=source_version(kind._mlcache_original) if options.version == "source" else options.version,  # noqa: SLF001
            vary=options.vary,
        )
        self.options = options
        self.serving = Serving(task, options, keys)

    @property
    def manager(self) -> CacheManager:
        """The app's cache manager."""
        return self.serving.manager

    @property
    def original(self) -> Callable[..., Any]:
        """The task's function without the cache; of a bound task or a class, bound."""
        kind = type(self._task)
        original = kind._mlcache_original  # noqa: SLF001 - our own class
        return functools.partial(original, self._task) if kind._mlcache_takes_self else original  # noqa: SLF001

    # ---- one call -------------------------------------------------------------------------------------------

    def key(self, *args: Any, **kwargs: Any) -> str:
        """Return the cache key of a call.

        Raises:
            TypeError: The arguments do not fit the task.
            SerializationError: An argument has no form in a key.
            CacheKeyError: The task's own ``key`` or ``vary`` gives none for these arguments.
        """
        return self.serving.keys.key(args, kwargs)

    def tags(self, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """Return the tags of a call's result, as far as the arguments tell.

        Raises:
            TypeError: The arguments do not fit the task.
            CacheKeyError: With these arguments one of them cannot be a tag.
        """
        return self.serving.tags_of(self._shape.bind(args, kwargs))

    def get(self, *args: Any, **kwargs: Any) -> Any:
        """Return the cached result of a call, or MISS; runs nothing.

        Raises what the call has raised, where that is cached (``negative``), and as :meth:`key`.
        """
        return self._read(self.manager.get(self.key(*args, **kwargs), MISS))

    def set(self, result: Any, /, *args: Any, **kwargs: Any) -> bool:
        """Store *result* as that of a call, in every process; return whether it was stored.

        The task's options decide, as if it had been computed: ``cache_if`` may refuse it. Raises as :meth:`key`, and
        SerializationError for a result that would come back altered.
        """
        bound = self._shape.bind(args, kwargs)
        kept = self.serving.keep(result, 0.0, bound, self.serving.tags_of(bound))
        if kept is None:
            return False
        record, loaded = kept
        key = self.serving.keys.name(bound)
        try:
            return self.manager.put(key, loaded)
        except SerializationError as exc:
            raise record.of_outcome(exc) from None

    def invalidate(self, *args: Any, **kwargs: Any) -> bool:
        """Remove one call's result from every process; return whether there was one. Raises as :meth:`key`."""
        return self.manager.delete(self.key(*args, **kwargs))

    def invalidate_all(self) -> bool:
        """Remove the results of every call of this task from every process, in O(1); return whether L2 was told.

        Raises:
            RemoteStoreError: Only with ``strict``.
        """
        return self.manager.invalidate_tags(self.serving.own_tag)

    def refresh(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task's function here and now, store the result over what is cached, and return it.

        An invalidation that passes meanwhile wins: the result is then returned and not stored. Raises what the
        function raises, and TypeError for arguments that do not fit the task.
        """
        with self.using("refresh"):
            self._task.push_request(args=args, kwargs=kwargs)  # a direct call, as Celery makes one
            try:
                return self.serving.answer(self.original, args, kwargs)
            finally:
                self._task.pop_request()

    def refresh_async(self, *args: Any, **kwargs: Any) -> Any:
        """Send a task that refreshes a call, on the task's ``refresh_queue``, and return its AsyncResult."""
        return self.serving.refreshing.send(args, kwargs)

    def using(self, mode: modes.Mode) -> AbstractContextManager[None]:
        """Give every call of this task in a block, direct or sent, a mode: ``with price.cache.using("refresh"): ...``.

        Calls that the bodies of these calls make have none of it: each call computes once.

        Raises:
            ValueError: It is not one.
        """
        return modes.Using(self._task, mode)

    def level_of(self, result: Any) -> str | None:
        """Return where the result of an AsyncResult was found, for those who must know a stale one when they see it.

        "l1", "l2" (also where it had to wait for another process), "shared" (another call in its process was computing
        it), "stale", "producer", or how it came about: "miss", "refresh", "bypass", "uncacheable". None before it is
        there, for an EagerResult, and where the result backend keeps no more than Celery's own columns.
        """
        try:
            found: dict[str, Any] = result._get_task_meta()  # noqa: SLF001 - Celery has no public way
        except (AttributeError, NotImplementedError):  # there is no result backend
            return None
        return found.get(modes.LEVEL)

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """Tell why a call would, or would not, be answered from the cache; two or three round trips to L2.

        Raises:
            TypeError: The arguments do not fit the task.
        """
        name = self._task.name
        bound = self._shape.bind(args, kwargs)
        try:
            key = self.serving.keys.name(bound)
            tags = self.serving.tags_of(bound)
        except (SerializationError, CacheKeyError) as exc:
            return Explanation(name, None, f"the call has no key, so it always runs: {exc}")
        seen = self.manager.inspect(key)
        record = unpack(seen.value)
        holder = self.manager.holder(key) or None
        why, parts = _why(seen, record, is_hit=False, holder=holder), self.serving.keys.parts(bound)
        found = Explanation(name, key, why, parts, tags=tags, holder=holder)
        if record is None:
            return found
        error = unpack_error(record.value, self.options.negative) if record.is_error else None
        is_known = error is not None or not record.is_error
        is_hit = is_known and (seen.level != "stale" or self.serving.takes_stale("use"))
        return Explanation(
            name,
            key,
            _why(seen, record, is_hit=is_hit)
            if is_known
            else "what is stored is an exception that this process does not know",
            found.parts,
            level=seen.level,
            is_hit=is_hit,
            age=time.time() - record.made_at,
            remaining=seen.remaining,
            took=record.seconds,
            maker=record.maker,
            is_error=record.is_error,
            tags=seen.tags,
            holder=holder,
        )

    # ---- many calls -----------------------------------------------------------------------------------------

    def warm(self, calls: Iterable[Sequence[Any] | Mapping[str, Any]], *, batch: int = WARM_BATCH) -> int:
        """Have workers compute those of *calls* that are not cached, and return how many were sent.

        Each batch costs one round trip to L2, and the messages for what it lacks go out over one connection. Nobody
        waits for them, and their results are in the cache only.

        Args:
            calls: Each is the positional arguments of a call (a tuple or list), its keyword arguments (a mapping), or
                a signature of this task.
            batch: How many to look up at a time, > 0.

        Raises:
            TypeError: A call is none of these, or does not fit the task; those before its batch were sent.
            ValueError: *batch* is out of range.
        """
        if not isinstance(batch, int) or batch < 1:
            msg = f"batch must be a whole number > 0, not {batch!r:.80}"
            raise ValueError(msg)
        given, sent = iter(calls), 0
        while chunk := [_call(each, self._task.name) for each in islice(given, batch)]:
            wanted: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
            for args, kwargs in chunk:
                bound = self._shape.bind(args, kwargs)
                try:
                    self.serving.tags_of(bound)
                    wanted.setdefault(self.serving.keys.name(bound), (args, kwargs))
                except (SerializationError, CacheKeyError):
                    continue  # no use: its result could not be found
            cached = self.manager.get_many(wanted)
            missing = [call for key, call in wanted.items() if unpack(cached.get(key)) is None]
            if missing:
                with self._task.app.producer_or_acquire() as producer:
                    for args, kwargs in missing:
                        self._task.mlcache_publish(args, kwargs, producer=producer, ignore_result=True)
            sent += len(missing)
        return sent

    def _read(self, stored: Any) -> Any:
        record = unpack(stored)
        if record is None:
            return MISS
        if not record.is_error:
            return record.value
        error = unpack_error(record.value, self.options.negative)
        if error is None:
            return MISS
        raise error


def settle(task: CachedTask) -> Options:
    """Return a task's options from all places that may give some; see :mod:`celery_mlcache.fleet.options`."""
    kind, name = type(task), task.name
    conf = task.app.conf.get(TASKS) or {}
    if not isinstance(conf, Mapping):
        raise ConfigurationError([f"{TASKS} must be a mapping of task names to options, not {conf!r:.80}"])
    options = Options().changed(conf.get("*"), f"{TASKS}['*']")
    options = options.inherited(kind.__mro__, name).changed(conf.get(name), f"{TASKS}[{name!r}]")
    given = kind.__dict__.get("mlcache")
    is_annotated = given is not kind._mlcache_declared  # noqa: SLF001 - our own class
    return (options.changed(given, name) if is_annotated else options).whole(name)


def _call(given: Any, task_name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(given, Signature):
        if given.task != task_name:
            msg = f"warm() of {task_name} takes signatures of that task, not of {given.task}"
            raise TypeError(msg)
        return tuple(given.args), dict(given.kwargs)
    if isinstance(given, Mapping):
        return (), dict(given)
    if isinstance(given, tuple | list):
        return tuple(given), {}
    msg = f"warm() takes the arguments of each call as a tuple, list or mapping: [({given!r:.40},), ...]"
    raise TypeError(msg)


def _why(seen: Inspection, record: Record | None, *, is_hit: bool, holder: str | None = None) -> str:
    if record is None and holder is not None:
        return f"nothing is stored yet: {holder} computes it just now"
    if record is None:
        return seen.why or "what is stored under the key is not a result of this release"
    if seen.level == "stale" and not is_hit:
        return "its life has ended, and it is served only where another one computes it, or where that fails"
    if seen.level == "stale":
        return "its life has ended, and it is served while one task computes it anew"
    what = "the exception that it has raised" if record.is_error else "its result"
    return f"{what} is cached"
