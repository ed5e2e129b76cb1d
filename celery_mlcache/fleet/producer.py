"""Answers where a call is made, without a message: for tasks with ``producer=True`` or ``coalesce=True``.

A hit is stored as the result of the call's own id and told to whoever waits for it, exactly as a worker would have
done; the caller gets a plain AsyncResult, so that groups, result sets and other processes find it. Returning a finished
result object would not do: Celery's canvas throws it away and waits for the id that it has frozen before.

Not answered here, and sent as ever (the worker finds the same hit): what is part of a chord or chain or has callbacks,
what is to run later, retries, calls with a mode of their own, eager ones, and all that beat sends, for a periodic task
that refreshes would otherwise never run. A slow or dead Redis costs the budget, and nothing for a second after that; a
result backend on another server has the timeouts that Celery gives it.

Coalescing gives a plain call the AsyncResult of the same call that is under way. Two callers then share one result: a
``forget()`` or ``revoke()`` of the one is the other's too. It needs a result backend that anybody can read, and is not
for calls that anybody tells apart: those with an id, a group, a chord, a chain, callbacks, a time, or a reply address.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from celery import states
from celery.app.task import Context
from celery.backends.base import BaseKeyValueStoreBackend
from celery.utils import uuid

from celery_mlcache.entry import MISS
from celery_mlcache.errors import CacheClosedError, CacheKeyError, RemoteStoreError, SerializationError, is_interrupt
from celery_mlcache.fleet import lifecycle, modes
from celery_mlcache.fleet.app import fleet_of
from celery_mlcache.fleet.options import INTERRUPTS
from celery_mlcache.fleet.record import Record, unpack
from celery_mlcache.fleet.serving import COALESCE, Serving, started_name
from celery_mlcache.keys import MAX_KEY_BYTES
from celery_mlcache.plans import Glance, Loaded, Plan

if TYPE_CHECKING:
    from celery_mlcache.fleet.task import CachedTask

PAUSE: Final = 1.0  # seconds for which nothing is asked after the budget was overrun
HOSTNAME: Final = "mlcache"  # in the result's metadata: no worker has computed it
_SENT: Final = ("chord", "chain", "link", "link_error", "retries", "eta", "countdown")
_TOLD_APART: Final = (
    *("task_id", "group_id", "expires", "reply_to", "root_id", "parent_id", *_SENT),
    *("queue", "exchange", "routing_key", "priority", "time_limit", "soft_time_limit", "stamped_headers"),
)
QUEUED: Final = 10.0  # seconds for which a call is shared that no worker has begun with: its message may be lost
_UNDER_WAY: Final = frozenset({states.PENDING, states.RECEIVED, states.STARTED, states.RETRY})


def answer(task: CachedTask, args: Any, kwargs: Any, options: dict[str, Any]) -> Any:
    """Return an AsyncResult for a call: of an answer that was found, of a call that is under way, or of a message."""
    call = _call(task, args, kwargs, options) if _eligible(task, options) else None
    if call is None:
        return task.mlcache_publish(args, kwargs, **options)
    serving = task.cache.serving
    budget = _Budget(serving)
    sent: list[Any] = []

    def send(task_id: str | None = None) -> Any:
        more: dict[str, Any] = {}
        if task_id is not None:  # others may share it
            more = {"task_id": task_id, "headers": {**(options.get("headers") or {}), modes.CALL: "shared"}}
        sent.append(task.mlcache_publish(args, kwargs, **{**options, **more}))
        return sent[0]

    with suppress(CacheClosedError, RemoteStoreError):  # it is sent then, as any task is, and once
        is_shared = serving.options.coalesce and _is_plain(task, options)
        glance = budget.glance(call.key)
        record = unpack(glance.value)
        record = None if record is None or record.is_error else record
        if serving.options.producer:
            is_usable = record is not None and budget.can_store(glance)
            if record is not None and is_usable and (result := _answered(serving, call, record)) is not None:
                return result
            serving.manager.count("producer_misses")
        if is_shared and record is None and glance.is_answered:
            return _coalesced(serving, call, glance, budget, send)
    return sent[0] if sent else send()


class _Call(NamedTuple):
    """A call as it would be sent."""

    key: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    options: Mapping[str, Any]


def _eligible(task: CachedTask, options: Mapping[str, Any]) -> bool:
    headers = options.get("headers") or {}
    mode = headers.get(modes.HEADER) or options.get(modes.HEADER) or "use"  # a stamp is an option of its name
    return (
        mode == "use"
        and not any(options.get(name) for name in _SENT)
        and not task.app.conf.task_always_eager
        and not lifecycle.is_beat()
    )


def _call(task: CachedTask, args: Any, kwargs: Any, options: Mapping[str, Any]) -> _Call | None:
    """Return the call, or None where it has no key, or Celery is to say what is wrong with it."""
    args, kwargs = args or (), kwargs or {}
    if not (isinstance(args, list | tuple) and isinstance(kwargs, Mapping)):
        return None
    try:
        if task.typing:
            check: Any = getattr(task, "__header__", None)
            if check is not None:
                check(*args, **kwargs)
        dump: Any = getattr(task, "_dump_pydantic_arguments", None)
        if dump is not None and options.get("serializer") != "pickle":
            args, kwargs = dump(args, kwargs)  # as Celery does, from 5.7 on; before, models could not be sent
        args, kwargs = tuple(args), dict(kwargs)
        return _Call(task.cache.serving.keys.key(args, kwargs), args, kwargs, options)
    except (TypeError, SerializationError, CacheKeyError):
        return None


class _Budget:
    """What one call may spend on looking around, in seconds."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._until = time.monotonic() + fleet_of(serving.task.app).config.producer_budget

    def glance(self, key: str) -> Glance:
        """Return what is cached, as far as that can be told in time."""
        left = self._left()
        if left <= 0:
            return Glance(MISS, is_answered=False)
        return self._noted(self._serving.manager.glance(key, left))

    def can_store(self, glance: Glance) -> bool:
        """Return whether Redis answers, where Celery would store the result in one: most often it is L2's.

        L1 may answer for a while after Redis has stopped, and Celery's backend then waits for two minutes.
        """
        kinds = type(self._serving.task.backend).__mro__
        if glance.is_remote or all(kind.__module__ != "celery.backends.redis" for kind in kinds):
            return True
        self.marked("alive")
        return self._left() > 0

    def marked(self, name: str) -> bool:
        """Return whether a mark is set."""
        left = self._left()
        if left <= 0:
            return False
        is_marked, is_answered = self._serving.manager.marked_within(name, left)
        return bool(self._noted(Glance(is_marked, is_answered)).value)

    def holder(self, key: str) -> str:
        """Return who computes the call just now, or ""."""
        left = self._left()
        return self._serving.manager.holder(key, within=left) if left > 0 else ""

    def _noted(self, glance: Glance) -> Glance:
        if not glance.is_answered:
            self._serving.pause(PAUSE)
        return glance

    def _left(self) -> float:
        return 0.0 if self._serving.is_paused else self._until - time.monotonic()


def _answered(serving: Serving, call: _Call, record: Record) -> Any:
    """Store *record* as the result of this call, and return its AsyncResult; None where that failed."""
    task, options = serving.task, call.options
    task_id = options.get("task_id") or uuid()
    ignored = options.get("ignore_result")
    ignored = task.ignore_result if ignored is None else ignored
    result = task.AsyncResult(task_id)
    result.ignored = ignored
    try:
        if not ignored:
            _store(task, result, record.value, _context(task, task_id, call))
    except Exception as exc:
        if isinstance(exc, INTERRUPTS) or is_interrupt(exc):
            raise
        serving.told.note_error(call.key, "producer", exc)
        return None
    _add_trail(task, result, options)
    serving.manager.count("producer_hits")
    serving.note_hit(call.key, "producer", record)
    if serving.options.early and serving.refreshing.is_early(record):
        serving.refreshing.soon(call.key, call.args, call.kwargs, record)
    return result


def _add_trail(task: CachedTask, result: Any, options: Mapping[str, Any]) -> None:
    """Make it a child of the task that has made the call, as Celery does with what it sends."""
    parent = task.app.current_worker_task if options.get("add_to_parent", True) else None
    if parent is not None:
        parent.add_trail(result)


def _store(task: CachedTask, result: Any, value: Any, request: Any) -> None:
    """Store a value as a worker does, and let this very object know it, in the form that it has in the backend."""
    backend = task.backend
    if hasattr(backend, "binding"):  # rpc: the reply's queue must be there before the reply
        with task.app.producer_or_acquire() as producer:
            backend.on_task_call(producer, result.id)
    backend.mark_as_done(result.id, value, request)
    know: Any = getattr(result, "_maybe_set_cache", None)
    make: Any = getattr(backend, "_get_result_meta", None)
    if know is not None and make is not None and isinstance(backend, BaseKeyValueStoreBackend):
        meta = make(result=value, state=states.SUCCESS, traceback=None, request=request)
        know(backend.meta_from_decoded(backend.decode(backend.encode({**meta, "task_id": result.id}))))


def _context(task: CachedTask, task_id: str, call: _Call) -> Any:
    parent = task.app.current_worker_task
    request = parent.request if parent is not None else None
    options = call.options
    stamped = options.get("stamped_headers") or []
    return Context(
        id=task_id,
        task=task.name,
        args=call.args,
        kwargs=call.kwargs,
        group=options.get("group_id"),
        group_index=options.get("group_index"),
        root_id=options.get("root_id") or (request and (request.root_id or request.id)) or task_id,
        parent_id=options.get("parent_id") or (request and request.id),
        reply_to=options.get("reply_to") or task.app.thread_oid,
        correlation_id=task_id,
        delivery_info={},
        hostname=HOSTNAME,
        retries=0,
        stamped_headers=stamped,
        stamps={name: options.get(name) for name in stamped},
        mlcache="producer",
    )


# ---- coalescing -------------------------------------------------------------------------------------------------


def _is_plain(task: CachedTask, options: Mapping[str, Any]) -> bool:
    ignored = options.get("ignore_result")
    ignored = task.ignore_result if ignored is None else ignored
    return (
        not ignored
        and task.expires is None
        and isinstance(task.backend, BaseKeyValueStoreBackend)
        and not any(options.get(name) is not None for name in _TOLD_APART)
        and not set(options.get("headers") or ()) - {modes.HEADER}
    )


def _coalesced(serving: Serving, call: _Call, seen: Glance, budget: _Budget, send: Callable[..., Any]) -> Any:
    """Return the AsyncResult of the same call that is under way, or of a message that others may share from now on.

    What names the call under way is an entry of the cache, with the tags of the result, stored by a fenced add after
    the message was sent: so an invalidation of the call since then, or while it was sent, ends the sharing, and it
    never names a task that was not sent. Who calls in between sends a message of its own, and the workers see to it
    that it runs once all the same.
    """
    task, manager, name = serving.task, serving.manager, f"{call.key}:call"
    if len(name.encode()) > MAX_KEY_BYTES:
        return send()
    found = budget.glance(name)
    if found.is_answered and _is_under_way(task, call.key, found.value, seen, budget):
        return _joined(serving, found.value[0], call)
    if not found.is_answered:
        return send()
    sent: list[Any] = []

    def load() -> Loaded:
        task_id, now = uuid(), manager.now()
        sent.append(send(task_id))
        return Loaded((task_id, now, time.time()), COALESCE, tags, is_jittered=False)

    tags = serving.tags_of(type(task)._mlcache_shape.bind(call.args, call.kwargs))  # noqa: SLF001 - our own class
    plan = Plan(load, tags=tags)
    shared = (manager.resolve if found.value is MISS else manager.renew)(name, plan)
    if sent:
        return sent[0]
    return _joined(serving, shared.value[0], call)  # another thread was sending it


def _joined(serving: Serving, task_id: str, call: _Call) -> Any:
    """Return the AsyncResult of a call that others have made."""
    serving.manager.count("calls_coalesced")
    result = serving.task.AsyncResult(task_id)
    _add_trail(serving.task, result, call.options)
    return result


def _is_under_way(task: CachedTask, key: str, found: Any, seen: Glance, budget: _Budget) -> bool:
    if not (isinstance(found, tuple | list) and len(found) == 3):  # noqa: PLR2004 - what _coalesced stores
        return False
    task_id, since, sent_at = found
    try:
        state = task.AsyncResult(task_id).state
    except Exception as exc:
        if isinstance(exc, INTERRUPTS) or is_interrupt(exc):
            raise
        task.cache.serving.told.note_error(key, "producer", exc)
        return False
    if seen.stamp > since or state not in _UNDER_WAY:
        return False
    # A worker that has begun holds the lease until it is done. If nobody does, it is over and forgotten, or has died.
    if state == states.RETRY:
        return True
    if budget.marked(started_name(task_id)):
        return bool(budget.holder(key))
    return bool(0 <= time.time() - sent_at <= QUEUED)
