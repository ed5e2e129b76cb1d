"""How one task is cached: its options, checked when the task is made.

Where the same option is given in several places, the later of these wins: ``app.conf.mlcache_tasks["*"]``, the task's
base classes, the decorator (or the class), ``app.conf.mlcache_tasks[name]``, Celery's own ``task_annotations``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Final, Self, get_args

from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded, TaskPredicate

from celery_mlcache.errors import (
    CallInProgressError,
    ConfigurationError,
    MLCacheError,
    NotCachedError,
    is_interrupt,
)
from celery_mlcache.keys import check_tags
from celery_mlcache.plans import MAX_TTL, Contention, check_stale_ttl, check_ttl

CONTENTIONS: Final[tuple[str, ...]] = get_args(Contention)
RETRIES: Final = ("autoretry_for", "dont_autoretry_for", "retry_kwargs")  # Celery's, of a task or its decorator
# What tells the worker what to do with the task, and says nothing of its result.
INTERRUPTS: Final = (Retry, Ignore, Reject, SoftTimeLimitExceeded, TaskPredicate)
_MAX_PRIORITY: Final = 255

Seconds = float | timedelta
Ttl = Seconds | Callable[[Any], Seconds | None] | None


@dataclass(frozen=True, slots=True)
class Options:
    """How one task is cached: the ``mlcache={...}`` of a task, or the keywords of ``@cached_task``.

    Times are seconds, or a timedelta. Functions given here run wherever the task is called or executed, and must be
    quick; where one raises, that result is not cached, ``hook_failures`` counts it and ``cache_error`` is sent.

    Attributes:
        ttl: How long a result lives: a time, or a function of the result that returns one (None: the default; 0 or
            less: it is not cached). None for the cache's ``l2_ttl``.
        jitter: At most this part of a life is taken off at random, 0 to 1; None for the cache's ``ttl_jitter``.
        cache_if: Function of the result: whether it is cached.
        cache_none: Whether a result that is None is cached.
        negative: Exception classes whose exceptions are cached too, and for how long. They are raised again where the
            result would have been returned. Never cached: Retry, Ignore, Reject, SoftTimeLimitExceeded.
        max_size: Bytes that a result may take in Redis; a larger one is returned and not cached. None for any.
        tags: What a result can be invalidated by: templates, in which ``{name}`` stands for that argument as in
            ``str.format``, or a function of the arguments (a mapping by name) and the result.
        ignore: Arguments that make no difference.
        key: A template such as ``"price:{sku}"``, which names the arguments that make a difference and can be read in
            the key, or a function of the arguments that returns what makes the difference.
        version: Results of another version are not found: text or a number; ``"source"`` for the function's own code,
            without comments, layout and docstring.
        vary: What else makes a difference (a tenant, a locale): functions without arguments, by name.
        stale_ttl: How much longer than its life a result may be served, while one task computes it anew.
        stale_if_error: Errors for which a stale result stands in: True for every one, False for none, or classes.
        early: Refresh shortly before the life ends, by chance, the earlier the longer the task takes (XFetch):
            False, True, or its factor beta; 1 is best in theory, more is earlier.
        refresh_queue: The queue for tasks that refresh; None for that of the task.
        refresh_priority: Their priority; None for the lowest, on a broker of which we know that.
        on_contention: What a call does while another one computes the same: "wait" for it, take the "stale" result,
            "retry" later and hold no worker meanwhile, "compute" too, or "raise" CallInProgressError.
        max_wait: How long "wait" and "stale" wait before they compute; None for the cache's ``single_flight_wait``.
        producer: Whether a call whose result is cached is answered where it is made, without a message.
        coalesce: Whether a plain call, while the same is under way, gets that one's AsyncResult.
    """

    ttl: Ttl = None
    jitter: float | None = None
    cache_if: Callable[[Any], bool] | None = None
    cache_none: bool = True
    negative: Mapping[type[Exception], float] = field(default_factory=dict)
    max_size: int | None = None
    tags: tuple[str, ...] | Callable[[Mapping[str, Any], Any], Sequence[str]] = ()
    ignore: tuple[str, ...] = ()
    key: str | Callable[..., object] | None = None
    version: str | int | None = None
    vary: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    stale_ttl: float = 0.0
    stale_if_error: bool | tuple[type[Exception], ...] = True
    early: float = 0.0
    refresh_queue: str | None = None
    refresh_priority: int | None = None
    on_contention: Contention = "wait"
    max_wait: float | None = None
    producer: bool = False
    coalesce: bool = False
    # Names of the options that were given: the others leave room for those of other places.
    stated: frozenset[str] = field(init=False, repr=False, compare=False)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note which options are given, also one that is given its default."""
        self = object.__new__(cls)
        object.__setattr__(self, "stated", frozenset((*OPTION_NAMES[: len(args)], *kwargs)))
        return self

    def __post_init__(self) -> None:
        """Refuse at decoration what would be refused at the first call; raises ConfigurationError, all at once."""
        problems = []
        for name, check in _CHECKS.items():
            try:
                object.__setattr__(self, name, check(getattr(self, name)))
            except (ValueError, TypeError) as exc:
                problems.append(str(exc) if str(exc).startswith((name, "tag ", "tags ")) else f"{name}: {exc}")
        flags = {name: getattr(self, name) for name in ("cache_none", "producer", "coalesce")}
        problems += [
            f"{name} must be True or False, not {value!r:.80}"
            for name, value in flags.items()
            if not isinstance(value, bool)
        ]
        if problems:
            raise ConfigurationError(problems)

    def whole(self, task_name: str) -> Options:
        """Return these options, now of all places; raises ConfigurationError where they do not go together."""
        if self.on_contention == "stale" and not self.stale_ttl:
            why = "on_contention='stale' needs a stale_ttl, or there is never anything stale"
            raise ConfigurationError([f"{task_name}: {why}"])
        return self

    def changed(self, given: Any, task_name: str) -> Options:
        """Return these options with those that *given* states in their place.

        Raises ConfigurationError for a wrong one, and names the task.
        """
        if given is None:
            return self
        if isinstance(given, Options):
            given = {name: getattr(given, name) for name in given.stated}
        if not isinstance(given, Mapping):
            problem = f"{task_name}: mlcache must be a mapping of options, not {given!r:.80}"
            raise ConfigurationError([problem])
        unknown = [name for name in given if name not in OPTION_NAMES]
        if unknown:
            close = get_close_matches(str(unknown[0]), OPTION_NAMES, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            names = ", ".join(map(str, unknown))
            problem = f"{task_name}: mlcache option {names} is unknown{hint}; there are {', '.join(OPTION_NAMES)}"
            raise ConfigurationError([problem])
        try:
            changed = replace(self, **given)
        except ConfigurationError as exc:
            problems = [f"{task_name}: {problem}" for problem in exc.problems]
        else:
            object.__setattr__(changed, "stated", self.stated | set(given))
            return changed
        raise ConfigurationError(problems)

    def inherited(self, classes: Sequence[type], task_name: str) -> Options:
        """Return these options under those that *classes* state, nearest first; raises as :meth:`changed`."""
        options = self
        for each in reversed(classes):
            own = each.__dict__
            # What was declared: where the base is a task itself, Celery's annotations replace the attribute.
            options = options.changed(own.get("_mlcache_declared", own.get("mlcache")), task_name)
        return options

    def negative_life(self, error: BaseException) -> float | None:
        """Return for how many seconds *error* is cached, or None; the class nearest to its own decides."""
        if not self.negative or isinstance(error, (*INTERRUPTS, MLCacheError)) or is_interrupt(error):
            return None  # ours say something of this moment, and nothing of the call
        return next((self.negative[kind] for kind in type(error).__mro__ if kind in self.negative), None)

    def forgives(self, error: Exception) -> bool:
        """Return whether a stale result may stand in for *error*."""
        if isinstance(error, (*INTERRUPTS, CallInProgressError, NotCachedError)):
            return False
        return isinstance(error, self.stale_if_error) if isinstance(self.stale_if_error, tuple) else self.stale_if_error


# --- one check for each option: returns what is kept, raises ValueError or TypeError -------------------------------


def seconds(time: Any) -> Any:
    """Return a timedelta's seconds; everything else passes."""
    return time.total_seconds() if isinstance(time, timedelta) else time


def _ttl(value: Any) -> Any:
    return value if value is None or callable(value) else check_ttl(seconds(value))


def _jitter(value: Any) -> Any:
    if value is None or (_is_number(value) and 0 <= value <= 1):
        return value
    msg = f"jitter must be a number between 0 and 1, or None for the cache's own, not {value!r:.80}"
    raise ValueError(msg)


def _callable(value: Any) -> Any:
    if value is None or callable(value):
        return value
    msg = f"must be a function of the result, not {value!r:.80}"
    raise ValueError(msg)


def _negative(value: Any) -> Any:
    if not isinstance(value, Mapping):
        msg = f"negative must be a mapping of exception classes to seconds, not {value!r:.80}"
        raise TypeError(msg)
    found = {}
    for kind, time in value.items():
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            msg = f"negative takes classes of Exception, not {kind!r:.80}"
            raise TypeError(msg)
        if issubclass(kind, (*INTERRUPTS, MLCacheError)):
            msg = f"negative cannot take {kind.__name__}: it says something of this moment, and nothing of the call"
            raise ValueError(msg)  # noqa: TRY004 - it is a class of exceptions
        try:
            found[kind] = check_ttl(seconds(time))
        except ValueError:
            msg = f"negative: {kind.__name__} must live a number of seconds > 0 and <= {MAX_TTL:g}, not {time!r:.80}"
            raise ValueError(msg) from None
    return MappingProxyType(found)


def _max_size(value: Any) -> Any:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    msg = f"max_size must be a number of bytes > 0, or None, not {value!r:.80}"
    raise ValueError(msg)


def _tags(value: Any) -> Any:
    return value if callable(value) else check_tags(value)


def _names(value: Any) -> Any:
    if isinstance(value, str) or not isinstance(value, Sequence | set | frozenset):
        msg = f"ignore must be a list or tuple of argument names, not {value!r:.80}"
        raise TypeError(msg)
    if not all(isinstance(name, str) for name in value):
        msg = f"ignore takes names of arguments, not {value!r:.80}"
        raise TypeError(msg)
    return tuple(value)


def _key(value: Any) -> Any:
    if value is None or callable(value) or (isinstance(value, str) and value):
        return value
    msg = f"key must be a template such as 'price:{{sku}}' or a function, not {value!r:.80}"
    raise TypeError(msg)


def _version(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    msg = f"version must be a text, a whole number or 'source', not {value!r:.80}"
    raise TypeError(msg)


def _vary(value: Any) -> Any:
    if callable(value):
        value = (value,)
    if isinstance(value, Mapping):
        found = dict(value)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        # With its place, for all lambdas have one name.
        found = {f"{number}:{getattr(each, '__qualname__', '')}": each for number, each in enumerate(value)}
    else:
        msg = f"vary must be functions without arguments, by name, not {value!r:.80}"
        raise TypeError(msg)
    for name, each in found.items():
        if not isinstance(name, str) or not callable(each):
            msg = f"vary takes functions without arguments, by name, not {name!r:.40}: {each!r:.80}"
            raise TypeError(msg)
    return MappingProxyType(found)


def _stale_if_error(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    kinds = tuple(value) if isinstance(value, tuple | list | set | frozenset) else (value,)
    if all(isinstance(kind, type) and issubclass(kind, Exception) for kind in kinds):
        return kinds
    msg = f"stale_if_error must be True, False or classes of Exception, not {value!r:.80}"
    raise TypeError(msg)


def _early(value: Any) -> Any:
    if isinstance(value, bool):
        return float(value)
    if _is_number(value) and 0 <= value <= 100:  # noqa: PLR2004 - at 100 all is refreshed all the time
        return float(value)
    msg = f"early must be True, False or a factor between 0 and 100, not {value!r:.80}"
    raise ValueError(msg)


def _queue(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value):
        return value
    msg = f"refresh_queue must be the name of a queue, or None, not {value!r:.80}"
    raise TypeError(msg)


def _priority(value: Any) -> Any:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_PRIORITY):
        return value
    msg = f"refresh_priority must be a whole number between 0 and {_MAX_PRIORITY}, or None, not {value!r:.80}"
    raise ValueError(msg)


def _contention(value: Any) -> Any:
    if value in CONTENTIONS:
        return value
    msg = f"on_contention must be one of {', '.join(CONTENTIONS)}, not {value!r:.80}"
    raise ValueError(msg)


def _max_wait(value: Any) -> Any:
    value = seconds(value)
    if value is None or (_is_number(value) and 0 <= value <= 86400):  # noqa: PLR2004 - a day
        return value
    msg = f"max_wait must be a number of seconds between 0 and 86400, or None, not {value!r:.80}"
    raise ValueError(msg)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_CHECKS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "ttl": _ttl,
    "jitter": _jitter,
    "cache_if": _callable,
    "negative": _negative,
    "max_size": _max_size,
    "tags": _tags,
    "ignore": _names,
    "key": _key,
    "version": _version,
    "vary": _vary,
    "stale_ttl": lambda value: check_stale_ttl(seconds(value)),
    "stale_if_error": _stale_if_error,
    "early": _early,
    "refresh_queue": _queue,
    "refresh_priority": _priority,
    "on_contention": _contention,
    "max_wait": _max_wait,
}
OPTION_NAMES: Final = tuple(each.name for each in fields(Options) if each.init)
