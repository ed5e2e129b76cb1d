"""``@cached_task``: stands in the place of ``@app.task`` or ``@shared_task``.

What may live here: how a function becomes a cached task, and what is said to those who write it wrongly. Celery takes
any keyword for an attribute of the task and any callable for a function, so what it would accept and never use is
refused here, where it is written, with the right spelling.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from difflib import get_close_matches
from types import FunctionType
from typing import Any, Final, Literal, ParamSpec, TypeVar, overload

from celery import Celery, Task, _state
from celery.local import PromiseProxy, Proxy

from celery_mlcache.calls import CallKeys, CallShape
from celery_mlcache.fleet.options import OPTION_NAMES, Options, Seconds, Ttl
from celery_mlcache.fleet.task import CachedTask
from celery_mlcache.fleet.typing import (
    BoundTaskDecorator,
    CachedTaskOf,
    LooseTaskDecorator,
    StaleIfError,
    TaskDecorator,
    Vary,
)
from celery_mlcache.plans import Contention

P = ParamSpec("P")
R = TypeVar("R")

_NO_ATTRIBUTES: Final = frozenset(  # options of @app.task that are no attributes of Task
    {
        *inspect.signature(Celery._task_from_fun).parameters,  # noqa: SLF001 - the only list there is
        *("shared", "lazy", "filter"),
        *("autoretry_for", "dont_autoretry_for", "retry_kwargs", "retry_backoff", "retry_backoff_max", "retry_jitter"),
        *("queue", "exchange", "routing_key", "delivery_mode", "compression", "immediate", "mandatory"),
    }
)
_CLOSE: Final = 0.65  # difflib's ratio of "tll" and "ttl" is 0.67
_ALONE: Final = (
    "write @cached_task(ttl=...) alone, in the place of @app.task or @shared_task, and give it their options"
)
_FUNCTION: Final = "write a function (def) that calls it, and @cached_task above that"
_CLASS: Final = (
    "write a function outside of a class, or a class-based task: class Price(CachedTask) with a method run, "
    'a name, mlcache = {"ttl": ...}, and app.register_task(Price())'
)
_POSITIONAL: Final[Mapping[type | tuple[type, ...], str]] = {
    Celery: "an app is given by name: write @cached_task(app=app, ...)",
    str: "a name is given by name: write @cached_task(name={0!r}, ...)",
    (int, float, timedelta): "a ttl is given by name: write @cached_task(ttl={0!r}, ...)",
    Mapping: "options are given by name: write @cached_task(**options)",
}
_NO_FUNCTION: Final[Mapping[type | tuple[type, ...], str]] = {
    (type, staticmethod, classmethod, property, functools.cached_property): _CLASS,
    (functools.partial, functools.partialmethod): f"that has no name, and a task needs one: {_FUNCTION}",
}
_LIST: Final = "a generator is used up by the first who reads it: write a function that returns a list"
_NO_RESULT: Final[Mapping[Callable[[Any], bool], str]] = {
    inspect.iscoroutinefunction: (
        "a coroutine is no result, and Celery awaits none: write def in the place of async def, and in it "
        "return asyncio.run(...)"
    ),
    inspect.isgeneratorfunction: _LIST,
    inspect.isasyncgenfunction: _LIST,
}


@overload
def cached_task(function: Callable[P, R], /) -> CachedTaskOf[P, R]: ...
@overload
def cached_task(
    *,
    pydantic: Literal[True],
    app: Celery | None = None,
    base: type[Task[..., Any]] | None = None,
    bind: bool = False,
    ttl: Ttl = None,
    jitter: float | None = None,
    cache_if: Callable[[Any], bool] | None = None,
    cache_none: bool = True,
    negative: Mapping[type[Exception], Seconds] = ...,
    max_size: int | None = None,
    tags: Sequence[str] | Callable[[Mapping[str, Any], Any], Sequence[str]] = (),
    ignore: Sequence[str] = (),
    key: str | Callable[..., object] | None = None,
    version: str | int | None = None,
    vary: Vary = ...,
    stale_ttl: Seconds = 0.0,
    stale_if_error: StaleIfError = True,
    early: bool | float = False,
    refresh_queue: str | None = None,
    refresh_priority: int | None = None,
    on_contention: Contention = "wait",
    max_wait: Seconds | None = None,
    producer: bool = False,
    coalesce: bool = False,
    **options: Any,
) -> LooseTaskDecorator: ...
@overload
def cached_task(
    *,
    bind: Literal[True],
    pydantic: Literal[False] = False,
    app: Celery | None = None,
    base: type[Task[..., Any]] | None = None,
    ttl: Ttl = None,
    jitter: float | None = None,
    cache_if: Callable[[Any], bool] | None = None,
    cache_none: bool = True,
    negative: Mapping[type[Exception], Seconds] = ...,
    max_size: int | None = None,
    tags: Sequence[str] | Callable[[Mapping[str, Any], Any], Sequence[str]] = (),
    ignore: Sequence[str] = (),
    key: str | Callable[..., object] | None = None,
    version: str | int | None = None,
    vary: Vary = ...,
    stale_ttl: Seconds = 0.0,
    stale_if_error: StaleIfError = True,
    early: bool | float = False,
    refresh_queue: str | None = None,
    refresh_priority: int | None = None,
    on_contention: Contention = "wait",
    max_wait: Seconds | None = None,
    producer: bool = False,
    coalesce: bool = False,
    **options: Any,
) -> BoundTaskDecorator: ...
@overload
def cached_task(
    *,
    bind: Literal[False] = False,
    pydantic: Literal[False] = False,
    app: Celery | None = None,
    base: type[Task[..., Any]] | None = None,
    ttl: Ttl = None,
    jitter: float | None = None,
    cache_if: Callable[[Any], bool] | None = None,
    cache_none: bool = True,
    negative: Mapping[type[Exception], Seconds] = ...,
    max_size: int | None = None,
    tags: Sequence[str] | Callable[[Mapping[str, Any], Any], Sequence[str]] = (),
    ignore: Sequence[str] = (),
    key: str | Callable[..., object] | None = None,
    version: str | int | None = None,
    vary: Vary = ...,
    stale_ttl: Seconds = 0.0,
    stale_if_error: StaleIfError = True,
    early: bool | float = False,
    refresh_queue: str | None = None,
    refresh_priority: int | None = None,
    on_contention: Contention = "wait",
    max_wait: Seconds | None = None,
    producer: bool = False,
    coalesce: bool = False,
    **options: Any,
) -> TaskDecorator: ...
def cached_task(function: Any = None, /, *, app: Any = None, base: Any = None, **options: Any) -> Any:
    """Make a Celery task whose result is cached: ``@cached_task`` or ``@cached_task(ttl=300, ...)``.

    It stands in the place of ``@app.task``; do not write both. (Two more spellings: ``@app.task(base=CachedTask,
    mlcache={"ttl": 300})``, where ``mlcache`` without the base would do nothing at all; and a class derived from
    :class:`CachedTask`.) ``price.delay("a", qty=2)`` and ``price.cache.get("a", qty=2)`` are checked against the
    function's parameters by mypy and pyright; see :mod:`celery_mlcache.fleet.typing` for what cannot be.

    Args:
        function: The function, where the decorator has no brackets.
        app: The app it belongs to; without it, as with ``@shared_task``, every app.
        base: A task class of yours to build on; without it that of each app (``Celery(task_cls=...)``). Options that
            stand in its ``mlcache`` and are not given here are its own.
        **options: Those of :class:`Options`, or ``mlcache={...}`` in their place; everything else is an option of
            ``@app.task``, or an attribute of the task.

    Raises:
        ConfigurationError: An option's value is wrong.
        TypeError: What is decorated is no plain function, or a keyword is probably a misspelled option; says how to
            write it.
    """
    own = _own_options(options)
    if app is not None and not isinstance(app, Celery):
        msg = f"app must be a Celery app, not {app!r:.80}: write @cached_task(app=app, ...)"
        raise TypeError(msg)
    if base is not None and not (isinstance(base, type) and issubclass(base, Task)):
        msg = (
            f"base must be a task class, not {base!r:.80}: write class Base(celery.Task) or class Base(CachedTask), "
            "and @cached_task(base=Base, ...)"
        )
        raise TypeError(msg)
    _check_names(options, base or (Task if app is None else app.Task))

    def decorate(wrapped: Any) -> Any:
        is_bound = bool(options.get("bind"))
        _check_function(wrapped, is_bound=is_bound)
        name = wrapped.__name__
        known = Options().inherited(base.__mro__ if base else (), name).changed(own, name).whole(name)
        _check_options(known, CallShape(wrapped, skips_self=is_bound), name)
        if not name.isidentifier():  # Celery compiles a "def" of that name when the task is made
            msg = f"@cached_task takes a function with a name, not {name}: {_FUNCTION}"
            raise TypeError(msg)
        # As they were given: what the app's settings say of every task stands below them.
        return _register(wrapped, app, base, {"mlcache": own, "on_bound": classmethod(_on_bound), **options})

    if function is None:
        return decorate
    _check_bare(function)
    return decorate(function)


def _own_options(options: dict[str, Any]) -> Any:
    """Take the cache's own options out of *options*."""
    own = {name: options.pop(name) for name in OPTION_NAMES if name in options}
    if "mlcache" not in options:
        return own
    if own:
        first = next(iter(own))
        msg = f"mlcache={{...}} and {first}= are two ways to say one thing: write @cached_task({first}=..., ...) only"
        raise TypeError(msg)
    return options.pop("mlcache")


def _check_options(options: Options, shape: CallShape, name: str) -> None:
    """Refuse options that do not fit the function; raises ConfigurationError."""
    if not callable(options.tags):
        shape.check_templates(options.tags, name)
    version = None if options.version == "source" else options.version  # read when the task is used
    CallKeys(name, shape, ignore=options.ignore, key=options.key, version=version, vary=options.vary)


def _check_names(options: Mapping[str, Any], base: type) -> None:
    """Refuse a keyword that looks like a misspelled option of the cache."""
    if "cache" in options:
        msg = "cache= would hide the task's own .cache: its options are given by name, as in @cached_task(ttl=...)"
        raise TypeError(msg)
    for name in options:
        if name in _NO_ATTRIBUTES or hasattr(base, name):
            continue
        close = get_close_matches(name, OPTION_NAMES, n=1, cutoff=_CLOSE)
        if close:
            msg = (
                f"@cached_task has no option {name!r}: did you mean {close[0]!r}? An attribute of that name for your "
                f"own use goes on a class: class Base(celery.Task) with {name} = None, and @cached_task(base=Base, ...)"
            )
            raise TypeError(msg)


def _check_function(wrapped: Any, *, is_bound: bool) -> None:
    """Refuse what is no plain function; raises TypeError with the right spelling."""
    if hint := _hint(wrapped, is_bound=is_bound):
        msg = f"@cached_task takes a function, not {_kind_name(wrapped)}: {hint}"
        raise TypeError(msg)


def _check_bare(given: Any) -> None:
    """Refuse what stands in the brackets without a name; raises TypeError with the right spelling."""
    is_app = given is _state.current_app
    if not is_app and issubclass(type(given), Proxy):  # to ask a task's proxy what it is would make the task
        return
    for kinds, hint in _POSITIONAL.items():
        if is_app or isinstance(given, kinds):
            msg = f"@cached_task takes a function, not {_kind_name(given)}: {hint.format(given)}"
            raise TypeError(msg)


def _hint(wrapped: Any, *, is_bound: bool) -> str | None:
    if issubclass(type(wrapped), Proxy) or isinstance(wrapped, Task):  # in this order, as above
        return f"that is a task already: {_ALONE}"
    for kinds, hint in _NO_FUNCTION.items():
        if isinstance(wrapped, kinds):
            return hint
    if not callable(wrapped):
        return _ALONE
    for is_one, hint in _NO_RESULT.items():
        if is_one(wrapped):
            return hint
    # By dir(), for to ask for annotations may evaluate them. Celery needs both names.
    if not {"__name__", "__annotations__"} <= set(dir(getattr(wrapped, "__func__", wrapped))):
        return _FUNCTION
    return f"Celery would not pass it its object: {_CLASS}" if not is_bound and _is_method(wrapped) else None


def _is_method(function: Any) -> bool:
    scope = getattr(function, "__qualname__", "").rpartition(".")[0]
    if inspect.ismethod(function) or not scope or scope.endswith("<locals>"):
        return False
    return next(iter(inspect.signature(function).parameters), None) in {"self", "cls"}


def _kind_name(thing: Any) -> str:
    """Say what *thing* is, without asking a proxy, as isinstance() would."""
    if issubclass(type(thing), type):
        return f"the class {thing.__name__}"
    name = type(thing).__name__
    return f"{name} {thing.__qualname__}" if type(thing) is FunctionType else name


def _register(wrapped: Any, app: Celery | None, base: Any, settings: dict[str, Any]) -> Any:
    is_shared, is_lazy = settings.pop("shared", True), settings.pop("lazy", True)

    def make(app: Any, *, lazy: bool = False) -> Any:
        kind = _with_cache(base or app.Task)
        return app.task(base=kind, shared=False, lazy=lazy, **settings)(wrapped)

    def find() -> Any:
        current = _state.get_current_app()
        name = settings.get("name") or current.gen_task_name(wrapped.__name__, wrapped.__module__)
        task = current.tasks[name]
        if not isinstance(task, CachedTask):
            msg = f"another decorator has taken the name {name} of a cached task: {_ALONE}"
            raise TypeError(msg)
        return task

    # As shared_task does; that would give the task of every app the same base, and not the app's own.
    if is_shared or app is None:
        _state.connect_on_app_finalize(make)
    if app is not None:
        return make(app, lazy=is_lazy)
    for each in _state._get_active_apps():  # type: ignore[attr-defined]  # noqa: SLF001 - as shared_task does
        if each.finalized:
            make(each)
    return Proxy(find)


def _with_cache(base: type) -> type[CachedTask]:
    if issubclass(base, CachedTask):
        return base
    return type(base.__qualname__, (CachedTask, base), {"abstract": True, "__module__": base.__module__})


def _on_bound(kind: type[CachedTask], app: Any) -> None:
    """Refuse a task that another decorator has made of this one, when the app is finalized."""
    above: Any = super(kind, kind)  # Celery has made the class, so it is nobody's base
    above.on_bound(app)
    for task in list(app.tasks.values()) if app.finalized else ():
        run = type(task).__dict__.get("run")
        function = run.__func__ if type(run) is staticmethod else run
        if issubclass(type(function), CachedTask | PromiseProxy) and isinstance(function, kind):
            msg = f"@app.task has made the task {task.name} of the cached task {kind.name}: {_ALONE}"
            raise TypeError(msg)
