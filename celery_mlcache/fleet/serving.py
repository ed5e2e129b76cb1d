"""How one call of a cached task is answered: the look-up that stands before its function.

::

    answer(call) ── bypass, or no key ──▶ the function
        ├── "only" ──▶ the cached result, or NotCachedError
        ├── "refresh" ──▶ the function, and its result over what is cached
        └── "use", "stale-ok" ── manager.resolve ──▶ l1 · l2 · stale (and a task that refreshes) · the function

What may live here: what a call's mode and the task's options mean. In which order levels are asked, and who loads in
the fleet, is the manager's. User errors pass through untouched, and so does what tells the worker what to do (Retry,
Ignore, Reject, SoftTimeLimitExceeded, SystemExit); only what ``negative`` or ``stale_if_error`` name is ever caught.
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from celery.exceptions import Retry

from celery_mlcache import leases
from celery_mlcache.calls import CallKeys, names_in
from celery_mlcache.entry import MISS
from celery_mlcache.errors import (
    CacheClosedError,
    CacheKeyError,
    CallInProgressError,
    NotCachedError,
    RemoteStoreError,
    SerializationError,
    is_interrupt,
)
from celery_mlcache.fleet import modes, signals
from celery_mlcache.fleet.app import fleet_of
from celery_mlcache.fleet.lineage import ancestry
from celery_mlcache.fleet.options import INTERRUPTS, RETRIES, Options, seconds
from celery_mlcache.fleet.record import Record, pack_error, unpack, unpack_error
from celery_mlcache.fleet.refreshing import Refreshing
from celery_mlcache.fleet.telling import IN_OPTION, Telling
from celery_mlcache.keys import check_tags, wire
from celery_mlcache.manager import CacheManager
from celery_mlcache.plans import MAX_TTL, Answer, Loaded, Plan, check_ttl

if TYPE_CHECKING:
    from celery_mlcache.fleet.task import CachedTask

T = TypeVar("T")

COALESCE: Final = 60.0  # seconds for which the same call may be answered by one that is under way
RETRY_AT_LEAST: Final = 0.05  # seconds, for a retry in place of waiting
HOST: Final = socket.gethostname()


@dataclass(eq=False, slots=True)
class Call:
    """One call on its way."""

    run: Callable[[], Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    bound: Mapping[str, Any]
    key: str
    tags: tuple[str, ...]  # as far as the arguments tell
    since: Any = None  # of a message that refreshes: when what it should replace was made
    shared_id: str | None = None  # of a message that others may have been told to wait for: see producer.py
    record: Record | None = None  # what its own function has made
    error: Exception | None = None  # what it has raised, if that is cached
    result: Any = None
    took: float = 0.0  # seconds
    has_begun: bool = False  # its function
    failure: Exception | None = None  # what that has raised, if it is not cached


class Serving:
    """Answers the calls of one task. Thread- and fork-safe, as the manager is."""

    def __init__(self, task: CachedTask, options: Options, keys: CallKeys) -> None:
        self.task = task
        self.options = options
        self.keys = keys
        self.own_tag = f"task:{task.name}"  # of every result: what invalidate_all() needs
        self.told = Telling(task)
        self.refreshing = Refreshing(self.told, options)
        self._paused_until = 0.0
        templates = () if callable(options.tags) else options.tags
        self._tag_names = tuple(dict.fromkeys(name for template in templates for name in names_in(template)))

    @property
    def manager(self) -> CacheManager:
        """The app's cache manager."""
        return self.told.manager

    @property
    def is_paused(self) -> bool:
        """Return whether producers are not to ask L2 just now, for it has been too slow for them."""
        return time.monotonic() < self._paused_until

    def pause(self, seconds: float) -> None:
        """Let producers not ask L2 for so long."""
        self._paused_until = time.monotonic() + seconds

    # ---- one call -------------------------------------------------------------------------------------------

    def answer(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the cached result of a call, or run it and cache what it returns."""
        request = self.task.request
        is_message = self._is_message(request)
        mode = modes.mode_of(self.task, request)
        since = None if modes.is_nested(request) else modes.header_of(request, modes.SINCE)
        request.__dict__[modes.BEGUN] = True  # only now: what comes of this request from here on is nested
        if is_message:
            leases.begin()
        if mode == "bypass":
            return self._run_uncached(run, args, kwargs, "bypass")
        try:
            bound = type(self.task)._mlcache_shape.bind(args, kwargs)  # noqa: SLF001 - our own class
        except TypeError:
            return run(*args, **kwargs)  # what does not fit raises there, from the function itself
        try:
            call = Call(lambda: run(*args, **kwargs), args, kwargs, bound, self.keys.name(bound), self.tags_of(bound))
        except (SerializationError, CacheKeyError) as exc:
            self.told.note_uncacheable(exc)
            if mode == "only":
                raise NotCachedError(self.task.name, "", f"the call has no key: {exc}") from exc
            return self._run_uncached(run, args, kwargs, "uncacheable")
        call.since = since
        if is_message and self.options.coalesce and isinstance(modes.header_of(request, modes.CALL), str):
            call.shared_id = request.id
        request.__dict__[modes.LEVEL] = mode if mode == "refresh" else "miss"  # what the body sees, if it runs
        return self._answer_told(call, request, mode, is_message=is_message)

    def _answer_told(self, call: Call, request: Any, mode: str, *, is_message: bool) -> Any:
        """Answer a call that has a key, and see to it that whatever comes of it is told."""
        try:
            answer = self._answer(call, request, mode, is_message=is_message)
        except Retry:
            raise  # it is under way, as it was
        except CacheClosedError:
            if call.has_begun:
                raise  # it is the body's own
            if mode == "only":
                raise NotCachedError(self.task.name, call.key, "the cache is closed") from None
            return call.run()
        except Exception as exc:
            if isinstance(exc, SerializationError) and call.record is not None:  # ``strict``; the body's own has none
                raise call.record.of_outcome(exc) from None
            if exc is call.failure and not isinstance(exc, INTERRUPTS) and not is_interrupt(exc):
                self.told.send(signals.cache_miss, call.key, seconds=call.took, is_cached=False)
            self._mark_begun(call)
            raise
        self._mark_begun(call)
        return answer

    def _answer(self, call: Call, request: Any, mode: str, *, is_message: bool) -> Any:
        if mode == "only":
            return self._answer_only(call, request)
        if mode == "refresh":
            return self._answer_refresh(call, request)
        return self._answer_use(call, request, mode, is_message=is_message)

    def _answer_use(self, call: Call, request: Any, mode: str, *, is_message: bool) -> Any:
        try:
            manager = self.manager
            answer = manager.front(call.key) or manager.resolve(call.key, self._plan(call, mode, is_message=is_message))
        except CallInProgressError as exc:
            if self.options.on_contention != "retry" or exc.key != call.key:
                raise  # in the latter case it is of a call inside of this one
            self._retry(request, exc)  # raises Retry, if the broker takes the message
            answer = self.manager.renew(call.key, self._plan(call, "refresh"))
        if answer.is_loaded:
            return self._finish_loaded(call, answer, request)
        record = unpack(answer.value)
        error = self._error_of(record)
        is_own = answer.level == "miss"  # it ran here, and another one's result, which was first, won
        is_unusable = record is None or (record.is_error and (error is None or request.retries or is_own))
        if is_unusable and is_own:
            return self._finish_loaded(call, answer, request)  # not that error, and not a second run
        if record is None or is_unusable:
            # Foreign bytes, or an exception that this process does not know, or that a retry is to overcome.
            answer = self.manager.renew(call.key, self._plan(call, "refresh"))
            return self._finish_loaded(call, answer, request)
        return self._finish_found(call, answer, record, error, request)

    def _error_of(self, record: Record | None) -> Exception | None:
        return unpack_error(record.value, self.options.negative) if record is not None and record.is_error else None

    def _finish_found(self, call: Call, answer: Answer, record: Record, error: Exception | None, request: Any) -> Any:
        level = answer.level
        request.__dict__[modes.LEVEL] = level
        if level == "stale":
            self.told.send(signals.cache_stale, call.key, age=time.time() - record.made_at, error=answer.error)
            if answer.error is None:
                self.refreshing.soon(call.key, call.args, call.kwargs, record)
        elif level == "miss":  # it ran here, and somebody else's result was first
            self.told.send(signals.cache_miss, call.key, seconds=record.seconds, is_cached=True)
        else:
            self.note_hit(call.key, level, record)
            if self.options.early and self.refreshing.is_early(record):
                self.refreshing.soon(call.key, call.args, call.kwargs, record)
        if error is not None:
            self.told.count("negative_hits")
            request.__dict__[modes.FOUND] = id(error)  # itself would keep its traceback, and so the request, alive
            raise error
        return record.value

    def note_hit(self, key: str, level: str, record: Record) -> None:
        """Count and tell that a call was answered out of the cache."""
        self.told.count("seconds_saved", record.seconds)
        self.told.send(signals.cache_hit, key, level=level, seconds_saved=record.seconds)

    def _finish_loaded(self, call: Call, answer: Answer, request: Any) -> Any:
        if answer.is_degraded:
            self.told.send(signals.cache_error, call.key, what="l2", error=None)
        elif call.record is not None and answer.refused is not None:
            self.told.note_unstorable(call.key, call.record.of_outcome(answer.refused))
        self.told.send(signals.cache_miss, call.key, seconds=call.took, is_cached=answer.is_stored)
        request.__dict__[modes.LEVEL] = "refresh" if request.__dict__.get(modes.LEVEL) == "refresh" else "miss"
        if call.error is not None:
            raise call.error
        return call.result

    def _answer_only(self, call: Call, request: Any) -> Any:
        answer = self.manager.find(call.key)
        record = None if answer is None else unpack(answer.value)
        error = self._error_of(record)
        if answer is None or record is None or (record.is_error and error is None):
            raise NotCachedError(self.task.name, call.key, "its result is not cached, and was wanted from there only")
        return self._finish_found(call, answer, record, error, request)

    def _answer_refresh(self, call: Call, request: Any) -> Any:
        if call.since is None:
            return self._finish_loaded(call, self.manager.renew(call.key, self._plan(call, "refresh")), request)
        return self._answer_background(call, request, call.since)

    def _answer_background(self, call: Call, request: Any, since: Any) -> Any:
        """Do what a reader of a stale result has asked for, unless somebody else did it or is about to."""
        record = unpack(self.manager.get(call.key, MISS))
        is_done = record is not None and isinstance(since, int | float) and record.made_at > since
        answer, is_settled, mark = None, True, self.refreshing.mark_name(call.key)
        try:
            if not is_done:
                is_settled = False
                answer = self.manager.renew(call.key, self._plan(call, "refresh", contention="raise"))
                is_settled = answer.is_stored
        except CallInProgressError as exc:
            if exc.key != call.key:
                raise  # of a call inside of this one
            is_settled = True
        finally:
            if is_settled:
                self.told.unmark(mark)
            else:  # what goes wrong is not tried again by the next reader at once
                self.refreshing.has_failed(call.key)
        if answer is None:
            self.told.count("refreshes_skipped")
            return None if record is None or record.is_error else record.value
        return self._finish_loaded(call, answer, request)

    # ---- loading --------------------------------------------------------------------------------------------

    def _plan(self, call: Call, mode: str, *, is_message: bool = False, contention: Any = None) -> Plan:
        options = self.options
        if contention is None:
            contention = "wait" if mode == "refresh" else options.on_contention
            if contention == "retry" and not is_message:
                contention = "wait"  # nobody else could take it up again
        return Plan(
            lambda: self._load(call),
            tags=call.tags,
            wants_stale=self.takes_stale(mode) and self.refreshing.is_possible(call.key),
            forgives=options.forgives if options.stale_ttl else None,
            is_shared=True,
            contention=contention,
            max_wait=options.max_wait,
            ancestry=ancestry,
        )

    def takes_stale(self, mode: str) -> bool:
        """Return whether a call is answered with what is stale although nobody computes it."""
        options = self.options
        return options.stale_ttl > 0 and mode != "refresh" and (options.on_contention != "stale" or mode == "stale-ok")

    def _load(self, call: Call) -> Loaded:
        """Run the function; what it raises passes, or is what is stored."""
        options = self.options
        self._mark_begun(call)  # now that the lease is held
        call.has_begun, began = True, time.monotonic()
        try:
            call.result = modes.run_apart(self.task, call.run)
        except Exception as exc:
            life = options.negative_life(exc)
            packed = None if life is None else pack_error(exc)
            # A good result that is still there is worth more than the news that it cannot be had now; and what is to
            # be tried again is no outcome yet.
            is_spared = (call.since is not None and options.forgives(exc)) or self._is_to_be_retried(exc)
            if life is None or packed is None or is_spared:
                call.failure, call.took = exc, time.monotonic() - began
                if life is not None and not is_spared and self._is_on:
                    why = SerializationError("exception", type(exc).__name__, "would come back different")
                    self.told.note_unstorable(call.key, why)
                raise
            call.error, call.took = exc, time.monotonic() - began
            call.record = self._record(packed, call.took, life, is_error=True)
            return Loaded(
                call.record.pack(), call.record.life, call.tags, is_jittered=False, is_optional=True, is_told=True
            )
        call.took = time.monotonic() - began
        try:
            kept = self.keep(call.result, call.took, call.bound, call.tags)
        except Exception as exc:
            if isinstance(exc, INTERRUPTS) or is_interrupt(exc):
                raise
            self.told.note_hook(call.key, exc)
            kept = None
        if kept is None:
            return Loaded(call.result, is_kept=False)
        call.record, loaded = kept
        return loaded

    def _mark_begun(self, call: Call) -> None:
        """Let those who share the call look for its lease from now on: where there is none, it is over, or dead."""
        if call.shared_id is not None and not call.has_begun:
            with suppress(CacheClosedError, RemoteStoreError):
                self.manager.mark(started_name(call.shared_id), COALESCE, is_new=False)

    def _is_to_be_retried(self, error: Exception) -> bool:
        """Return whether ``autoretry_for`` has a message tried again after *error*, as many attempts as there were.

        By the rules of Celery's ``add_autoretry_behaviour``, which wraps a task's ``run`` and keeps them to itself.
        """
        task: Any = self.task
        given = type(task)._mlcache_retries  # noqa: SLF001 - our own class
        kinds, spared, more = (given.get(name, getattr(task, name, ())) for name in RETRIES)
        if not isinstance(error, tuple(kinds)) or isinstance(error, tuple(spared)):
            return False
        most = getattr(task, "override_max_retries", dict(more or ()).get("max_retries"))
        most = task.max_retries if most is None else most
        return most is None or (task.request.retries or 0) < most

    def keep(
        self, result: Any, took: float, bound: Mapping[str, Any], tags: tuple[str, ...]
    ) -> tuple[Record, Loaded] | None:
        """Return how a result is to be stored, or None where the options say not to; raises what they raise."""
        options = self.options
        life = _ask("ttl", self._life, result)
        if life <= 0 or (result is None and not options.cache_none):
            return None
        if options.cache_if is not None and not _ask("cache_if", options.cache_if, result):
            return None
        if callable(options.tags):
            make = options.tags
            tags = check_tags((*tags, *_ask("tags", lambda: check_tags(make(dict(bound), result)))))
        record = self._record(result, took, life)
        loaded = Loaded(
            record.pack(),
            record.life,
            tags,
            options.stale_ttl,
            is_jittered=False,
            max_size=options.max_size,
            is_told=True,
        )
        return record, loaded

    def _record(self, value: Any, took: float, life: float, *, is_error: bool = False) -> Record:
        jitter = self._config.ttl_jitter if self.options.jitter is None else self.options.jitter
        life = min(life * (1 - jitter * random.random()), MAX_TTL)  # noqa: S311 - spreads load
        request = self.task.request
        maker = f"{request.id or 'a direct call'}@{request.hostname or HOST}"
        return Record(value, took, time.time(), life, maker, is_error)

    @property
    def _config(self) -> Any:
        return fleet_of(self.task.app).config

    @property
    def _is_on(self) -> bool:
        config = self._config
        return bool(config.cache_enabled and (config.l1_enabled or config.l2_enabled))

    def _life(self, result: Any) -> float:
        """Return the seconds that a result is to live; 0 or less: not at all."""
        ttl: Any = self.options.ttl
        if callable(ttl):
            ttl = seconds(ttl(result))
            if isinstance(ttl, int | float) and not isinstance(ttl, bool) and ttl <= 0:
                return 0.0
            if ttl is not None:
                check_ttl(ttl)
        return float(self._config.l2_ttl if ttl is None else ttl)

    def tags_of(self, bound: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the tags that the arguments tell; raises CacheKeyError where one cannot be a tag."""
        templates = self.options.tags
        if not templates or callable(templates):
            return (self.own_tag,)
        try:
            # As in the key: what a call is invalidated by must not depend on which side of the broker it is made.
            known = {name: wire(bound[name], f"arguments[{name!r}]") for name in self._tag_names if name in bound}
            return check_tags((self.own_tag, *[template.format_map(known) for template in templates]))
        except (CacheKeyError, SerializationError):
            raise
        except Exception as exc:  # whatever a user's __format__ raises
            raise CacheKeyError(", ".join(templates), f"cannot be made from these arguments: {exc!r}", "tag") from exc

    def _run_uncached(
        self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], level: str
    ) -> Any:
        self.task.request.__dict__[modes.LEVEL] = level
        if level == "bypass":
            self.told.count("bypassed_calls")
        return modes.run_apart(self.task, lambda: run(*args, **kwargs))

    # ---- contention -----------------------------------------------------------------------------------------

    @staticmethod
    def _is_message(request: Any) -> bool:
        """Return whether a worker executes a message, and not something further inside of it."""
        return bool(request.id) and not (request.called_directly or request.is_eager or modes.is_nested(request))

    def _retry(self, request: Any, why: CallInProgressError) -> None:
        """Send the message again, for later, and end this execution. The user's own retries are not touched."""
        lease = self._config.single_flight_lease
        # Of a call in this very process it is not known; a server whose clock was set back counts leases by the hour.
        remaining = min(why.remaining or lease, lease)
        countdown = max(remaining, RETRY_AT_LEAST) * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load
        again = self.task.signature_from_request(request, countdown=countdown, retries=request.retries)
        try:
            self.task.mlcache_publish(again.args, again.kwargs, **again.options)
        except Exception as exc:
            if isinstance(exc, INTERRUPTS) or is_interrupt(exc):
                raise
            self.told.warn_once("a call could not be sent again, and is computed", exc)
            return
        when: Any = countdown
        raise Retry(exc=why, when=when, sig=again)


def _ask(option: str, function: Callable[..., T], *args: Any) -> T:
    """Return what an option's function says; note on what it raises which option it was."""
    try:
        return function(*args)
    except Exception as exc:
        note = f"{IN_OPTION}{option}"
        with suppress(Exception):  # a frozen one takes none, and what another has for notes is its own affair
            if note not in getattr(exc, "__notes__", ()):  # it may raise one and the same each time
                exc.add_note(note)
        raise


def started_name(task_id: str) -> str:
    """Return the name of the mark of a shared call's task that a worker has begun with."""
    return f"started:{task_id}"
