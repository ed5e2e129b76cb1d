"""What type checkers are told of a cached task: ``CachedTaskOf[P, R]``, for a task of parameters P and result R.

Types only: nothing here runs, and importing it imports no celery. With ``celery-types`` a ``CachedTaskOf[P, R]`` is a
``celery.Task[P, R]``, and goes wherever one is asked for; without, P and R are checked all the same where they stand
below, and the rest of a task is Any.

What cannot be said: the types of a ``pydantic=True`` task, which takes models or plain data and returns plain data;
those of ``s()``, whose first arguments may be the result of the task before it in a chain; the attributes of a ``base``
class. Tasks that are not made by ``@cached_task`` (classes with a ``run`` of their own, ``@app.task(base=CachedTask)``)
are what ``celery-types`` says of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Concatenate, Generic, Literal, ParamSpec, Protocol, TypeVar

from celery_mlcache.fleet.modes import Mode

if TYPE_CHECKING:
    from celery import Task
    from celery.canvas import Signature
    from celery.result import AsyncResult, EagerResult

    from celery_mlcache.entry import Missing
    from celery_mlcache.fleet.explain import Explanation
    from celery_mlcache.manager import CacheManager

__all__ = [
    "BoundTaskDecorator",
    "CachedTaskOf",
    "LooseTaskDecorator",
    "Mode",
    "StaleIfError",
    "TaskCacheOf",
    "TaskDecorator",
    "Vary",
]

P = ParamSpec("P")
R = TypeVar("R")

Vary = Callable[[], object] | Sequence[Callable[[], object]] | Mapping[str, Callable[[], object]]
StaleIfError = bool | type[Exception] | tuple[type[Exception], ...]


class TaskCacheOf(Protocol[P, R]):
    """``task.cache``; how each method fails is said by :class:`celery_mlcache.fleet.results.TaskCache`."""

    @property
    def manager(self) -> CacheManager:
        """The app's cache manager."""

    @property
    def original(self) -> Callable[P, R]:
        """The task's function, without the cache."""

    def key(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """Return the cache key of a call."""

    def tags(self, *args: P.args, **kwargs: P.kwargs) -> tuple[str, ...]:
        """Return the tags of a call's result."""

    def get(self, *args: P.args, **kwargs: P.kwargs) -> R | Literal[Missing.MISS]:
        """Return the cached result of a call, or MISS; runs nothing."""

    def set(self, value: R, /, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Store *value* as the result of a call."""

    def invalidate(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Remove one call's result from every process."""

    def invalidate_all(self) -> bool:
        """Remove every result of the task from every process."""

    def refresh(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the task's function here and now, and store the result over what is cached."""

    def refresh_async(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """Send a task that refreshes a call."""

    def explain(self, *args: P.args, **kwargs: P.kwargs) -> Explanation:
        """Say what a call would get, and why; runs nothing."""

    def warm(self, calls: Iterable[Sequence[Any] | Mapping[str, Any]], *, batch: int = 100) -> int:
        """Have workers compute those calls that are not cached, and return how many were sent."""

    def level_of(self, result: AsyncResult[Any]) -> str | None:
        """Return where a result was found, or how it came about."""

    def using(self, mode: Mode) -> AbstractContextManager[None]:
        """Give every call of the task in this block the mode."""


if TYPE_CHECKING:

    class CachedTaskOf(Task[P, R], Generic[P, R]):
        """What ``@cached_task`` returns. What depends on P and R stands here, for those without ``celery-types``."""

        @property
        def cache(self) -> TaskCacheOf[P, R]:
            """The cache of this task's results."""

        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
            """Return the result here and now, from the cache or from the function."""

        def delay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
            """Send the task with these arguments."""

        def apply_async(  # noqa: PLR0917 - Celery's own order
            self,
            args: Sequence[Any] | None = None,
            kwargs: Mapping[str, Any] | None = None,
            task_id: str | None = None,
            producer: Any = None,
            link: Any = None,
            link_error: Any = None,
            shadow: str | None = None,
            *,
            mlcache: Mode | None = None,
            **options: Any,
        ) -> AsyncResult[R]:
            """Send the task; ``mlcache`` is what this call wants of the cache."""

        def apply(
            self,
            args: Sequence[Any] | None = None,
            kwargs: Mapping[str, Any] | None = None,
            *rest: Any,
            mlcache: Mode | None = None,
            **options: Any,
        ) -> EagerResult[R]:
            """Execute the task here, as a worker would."""

        def s(self, *args: Any, **kwargs: Any) -> Signature[R]:
            """Return a signature; in a chain its first arguments may be the result of the task before."""

        def si(self, *args: P.args, **kwargs: P.kwargs) -> Signature[R]:
            """Return a signature that takes nothing of the task before."""

else:

    class CachedTaskOf(Generic[P, R]):
        """For annotations; ``isinstance`` asks for :class:`celery_mlcache.CachedTask`."""


class TaskDecorator(Protocol):
    """``@cached_task(...)``: the task has the function's parameters."""

    def __call__(self, function: Callable[P, R], /) -> CachedTaskOf[P, R]:
        """Make the task."""


class BoundTaskDecorator(Protocol):
    """``@cached_task(bind=True, ...)``: the task has the function's parameters without the first, the task itself."""

    def __call__(self, function: Callable[Concatenate[Any, P], R], /) -> CachedTaskOf[P, R]:
        """Make the task."""


class LooseTaskDecorator(Protocol):
    """``@cached_task(pydantic=True, ...)``: models or plain data go in and plain data comes out; nothing is checked."""

    def __call__(self, function: Callable[..., Any], /) -> CachedTaskOf[..., Any]:
        """Make the task."""
