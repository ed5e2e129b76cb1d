"""Answers where a call is made, without a message: for tasks with ``producer=True`` or ``coalesce=True``.

A hit is stored as the result of the call's own id and told to whoever waits for it, exactly as a worker would have
done; the caller gets a plain AsyncResult, so that groups, result sets and other processes find it. Returning a finished
result object would not do: Celery's canvas throws it away and waits for the id that it has frozen before.

Not answered here, and sent as ever (the worker finds the same hit): what is part of a chord or chain or has callbacks,
what is to run later, retries, calls with a mode of their own, eager ones, and all that beat sends, for a periodic task
that refreshes would otherwise never run. A slow or dead Redis costs the budget, and nothing for a second after that.

Coalescing gives a plain call the AsyncResult of the same call that is under way. Two callers then share one result: a
``forget()`` or ``revoke()`` of the one is the other's too. It needs a result backend that anybody can read, and is not
for calls that anybody tells apart: those with an id, a group, a chord, a chain, callbacks, a time, or a reply address.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

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
from celery_mlcache.fleet.serving import COALESCE, Serving, over_name
from celery_mlcache.manager import CacheManager

if TYPE_CHECKING:
    from celery_mlcache.fleet.task import CachedTask

PAUSE: Final = 1.0  # seconds for which nothing is asked after the budget was overrun
HOSTNAME: Final = "mlcache"  # in the result's metadata: no worker has computed it
_SENT: Final = ("chord", "chain", "link", "link_error", "retries", "eta", "countdown")
_TOLD_APART: Final = ("task_id", "group_id", "expires", "reply_to", "root_id", "parent_id", *_SENT)
_UNDER_WAY: Final = frozenset({states.PENDING, states.RECEIVED, states.STARTED, states.RETRY})


def answer(task: CachedTask, args: Any, kwargs: Any, options: dict[str, Any]) -> Any:
    """Return an AsyncResult for a call: of an answer that was found, of a call that is under way, or of a message."""
    call = _call(task, args, kwargs, options) if _eligible(task, options) else None
    if call is None:
        return task.mlcache_publish(args, kwargs, **options)
    key, as_sent = call
    serving = task.cache.serving
    budget = _Budget(serving)
    with suppress(CacheClosedError):  # it is sent then, as any task is
        if serving.options.producer:
            record = budget.find(key)
            result = None if record is None else _answered(serving, key, record, (*as_sent, options))
            if result is not None:
                return result
    if serving.options.coalesce and _is_plain(task, options):
        return _coalesced(serving, key, budget, (args, kwargs, options))
    return task.mlcache_publish(args, kwargs, **options)


def _eligible(task: CachedTask, options: Mapping[str, Any]) -> bool:
    headers = options.get("headers") or {}
    mode = headers.get(modes.HEADER) or options.get(modes.HEADER) or "use"  # a stamp is an option of its name
    return (
        mode == "use"
        and not any(options.get(name) for name in _SENT)
        and not task.app.conf.task_always_eager
        and not lifecycle.is_beat()
    )


def _call(
    task: CachedTask, args: Any, kwargs: Any, options: Mapping[str, Any]
) -> tuple[str, tuple[tuple[Any, ...], dict[str, Any]]] | None:
    """Return the call's key, and its arguments as they would be sent; None where Celery is to say what is wrong."""
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
        return task.cache.serving.keys.key(args, kwargs), (args, kwargs)
    except (TypeError, SerializationError, CacheKeyError):
        return None


class _Budget:
    """What one call may spend on looking around, in seconds."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._until = time.monotonic() + fleet_of(serving.task.app).config.producer_budget

    def find(self, key: str) -> Record | None:
        """Return a fresh result of the call that is cached, and no exception."""
        manager = self._serving.manager
        value = MISS
        left = self._left()
        if left > 0:
            value, is_answered = manager.get_within(key, left)
            self._note(is_answered=is_answered)
        record = unpack(value)
        if record is None or record.is_error:
            manager.count("producer_misses")
            return None
        return record

    def marked(self, name: str) -> str:
        """Return whose mark is set, or ""."""
        left = self._left()
        if left <= 0:
            return ""
        owner, is_answered = self._serving.manager.marked_within(name, left)
        self._note(is_answered=is_answered)
        return owner

    def _left(self) -> float:
        return 0.0 if self._serving.is_paused else self._until - time.monotonic()

    def _note(self, *, is_answered: bool) -> None:
        if not is_answered:
            self._serving.pause(PAUSE)


def _answered(serving: Serving, key: str, record: Record, call: tuple[Any, Any, dict[str, Any]]) -> Any:
    """Store *record* as the result of this call, and return its AsyncResult; None where that failed."""
    task = serving.task
    args, kwargs, options = call
    task_id = options.get("task_id") or uuid()
    ignored = options.get("ignore_result")
    ignored = task.ignore_result if ignored is None else ignored
    try:
        if not ignored:
            _store(task, task_id, record.value, _context(task, task_id, args, kwargs, options))
    except Exception as exc:
        if isinstance(exc, INTERRUPTS) or is_interrupt(exc):
            raise
        serving.note_error(key, "producer", exc)
        return None
    result = task.AsyncResult(task_id)
    result.ignored = ignored
    if options.get("add_to_parent", True):
        parent = task.app.current_worker_task
        if parent is not None:
            parent.add_trail(result)
    serving.manager.count("producer_hits")
    serving.note_hit(key, "producer", record)
    if serving.options.early and serving.is_early(record):
        serving.refresh_soon(key, args, kwargs, record)
    return result


def _store(task: CachedTask, task_id: str, value: Any, request: Any) -> None:
    backend = task.backend
    # As when a message is sent: whoever listens must do so before the result is told, as for AsyncResult.then().
    if hasattr(backend, "binding"):  # rpc: the reply's queue must be there before the reply
        with task.app.producer_or_acquire() as producer:
            backend.on_task_call(producer, task_id)
    else:
        backend.on_task_call(None, task_id)
    backend.mark_as_done(task_id, value, request)


def _context(task: CachedTask, task_id: str, args: Any, kwargs: Any, options: Mapping[str, Any]) -> Any:
    parent = task.app.current_worker_task
    request = parent.request if parent is not None else None
    return Context(
        id=task_id,
        task=task.name,
        args=args,
        kwargs=kwargs,
        group=options.get("group_id"),
        group_index=options.get("group_index"),
        root_id=options.get("root_id") or (request and (request.root_id or request.id)) or task_id,
        parent_id=options.get("parent_id") or (request and request.id),
        reply_to=options.get("reply_to") or task.app.thread_oid,
        correlation_id=task_id,
        delivery_info={},
        hostname=HOSTNAME,
        retries=0,
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
    )


def _coalesced(serving: Serving, key: str, budget: _Budget, call: tuple[Any, Any, dict[str, Any]]) -> Any:
    task, name = serving.task, f"call:{key}"
    args, kwargs, options = call
    with suppress(CacheClosedError):
        owner = budget.marked(name)
        if owner:
            result = task.AsyncResult(owner)
            if result.state in _UNDER_WAY:
                serving.manager.count("calls_coalesced")
                return result
    task_id = uuid()
    headers = {**(options.get("headers") or {}), modes.CALL: name}
    sent = task.mlcache_publish(args, kwargs, **{**options, "task_id": task_id, "headers": headers})
    if not serving.is_paused:
        with suppress(CacheClosedError, RemoteStoreError):  # whoever calls next sends a message of its own
            _mark(serving.manager, name, task_id)
    return sent


def _mark(manager: CacheManager, name: str, task_id: str) -> None:
    """Name the task that others may wait for, unless it is over.

    Only now that it was sent: a mark must never name a task that was not. Whoever calls in between sends a message of
    its own, and the workers see to it that it runs once all the same.
    """
    if not manager.mark(name, COALESCE, owner=task_id, is_new=False):
        return
    over, is_answered = manager.marked_within(over_name(task_id), COALESCE)
    if over or not is_answered:
        # A worker was faster, and found no mark to remove: others would wait for what its caller may have forgotten.
        manager.unmark(name, owner=task_id)
