"""When each process's cache starts and ends: the worker's signals, connected once, idempotent, never blocking.

=============  ==========================================  ===============================
process        starts at                                   ends at
=============  ==========================================  ===============================
prefork child  ``worker_process_init``                     ``worker_process_shutdown``
solo           ``worker_process_init``                     ``worker_shutdown``
threads,       ``worker_ready`` (``worker_process_init``   ``worker_shutdown``
gevent, ...    never fires there)
MainProcess    never: it is confined at ``worker_init``
of prefork     and has L2 only
anything else  its first use                               its own end
=============  ==========================================  ===============================

Celery kills a replacement child that has not reported after 4 s, and 100 ms after a hard time limit; it swallows what
handlers raise. So nothing here does network I/O, closing takes 50 ms at most in a child, and nothing depends on it:
a SIGKILL skips all of it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from celery import current_app, signals
from celery.concurrency import get_implementation

from celery_mlcache.errors import ConfigurationError

if TYPE_CHECKING:
    from celery_mlcache.fleet.app import Fleet

TASKS: Final = "mlcache_tasks"  # of app.conf: options by task name, "*" for all
CHILD_BUDGET: Final = 0.05  # seconds: SIGKILL follows a hard time limit after 0.1
MAIN_BUDGET: Final = 0.5

log = logging.getLogger("celery_mlcache")
_find: Callable[[Any], Fleet | None] = lambda _app: None  # noqa: E731 - until the first app is set up
_everyone: Callable[[], list[Fleet]] = list
_confined_pid: int | None = None
_beat_pid: int | None = None


def confine_process() -> None:
    """Note that this process is a prefork MainProcess."""
    global _confined_pid  # noqa: PLW0603 - a process is confined as a whole, whatever apps it holds
    _confined_pid = os.getpid()


def is_confined() -> bool:
    """Return whether this process is a prefork MainProcess: no L1, no listener and no thread, for any app."""
    return _confined_pid == os.getpid()


def connect(find: Callable[[Any], Fleet | None], everyone: Callable[[], list[Fleet]]) -> None:
    """Connect the handlers; calling it again changes nothing."""
    global _find, _everyone
    _find, _everyone = find, everyone
    for signal, handler in (
        (signals.worker_init, on_worker_init),
        (signals.worker_process_init, on_process_init),
        (signals.worker_ready, on_worker_ready),
        (signals.worker_process_shutdown, on_process_shutdown),
        (signals.worker_shutdown, on_worker_shutdown),
        (signals.beat_init, on_beat),
        (signals.beat_embedded_init, on_beat),
    ):
        signal.connect(handler, weak=False, dispatch_uid=f"mlcache.{handler.__name__}")


def on_worker_init(sender: Any, **_: Any) -> None:
    """MainProcess, before anything is forked: settle the settings, confine prefork, register the commands."""
    fleet = _find(sender.app)
    if is_prefork(sender.pool_cls):
        confine_process()
        for each in _everyone():
            each.confine()
    if fleet is None:
        return
    import celery_mlcache.fleet.control  # noqa: F401, PLC0415 - 60 ms that producers need not pay

    try:
        config = fleet.config
        for task in sender.app.tasks.values():
            check = getattr(task, "mlcache_check", None)
            if check is not None:
                check()
            elif getattr(task, "mlcache", None) is not None:
                log.warning("%s has options for a cache and none: it needs base=CachedTask", task.name)
        unknown = sorted({*(sender.app.conf.get(TASKS) or {})} - {"*", *sender.app.tasks})
        if unknown:
            text = "mlcache_tasks names tasks that this worker does not have: %s"
            log.warning(text, ", ".join(unknown), extra={"tasks": unknown})
    except ConfigurationError as exc:
        # Only BaseException passes through a signal. A worker with a cache that cannot work must not look healthy.
        msg = f"celery_mlcache: {exc}"
        raise SystemExit(msg) from None
    log.debug("cache ready to start", extra={"namespace": config.cache_namespace})


def on_beat(**_: Any) -> None:
    """Beat, by itself or beside a worker: what it sends must be executed."""
    global _beat_pid  # noqa: PLW0603 - it is a process's whole life
    _beat_pid = os.getpid()


def is_beat() -> bool:
    """Return whether this process runs beat."""
    return _beat_pid == os.getpid()


def on_process_init(**_: Any) -> None:
    """Prefork children and solo: start the backplane's thread, and return at once."""
    _warm(current_app)  # the signal names no app


def on_worker_ready(sender: Any, **_: Any) -> None:
    """The other pools. Prefork's MainProcess is confined and passes by."""
    _warm(sender.app)


def on_process_shutdown(**_: Any) -> None:
    """Prefork children: be polite to Redis if 50 ms suffice."""
    _release(current_app, CHILD_BUDGET)  # the signal names no app


def on_worker_shutdown(sender: Any, **_: Any) -> None:
    """MainProcess of every pool, unless it was a cold shutdown."""
    _release(sender.app, MAIN_BUDGET)


def is_prefork(pool: Any) -> bool:
    """Return whether *pool*, an alias, a path or a class, forks (or spawns) children."""
    from celery.concurrency.prefork import TaskPool  # noqa: PLC0415 - billiard is only for workers

    implementation = get_implementation(pool)
    return isinstance(implementation, type) and issubclass(implementation, TaskPool)


def _warm(app: Any) -> None:
    fleet = _find(app)
    if fleet is not None and not is_confined():
        fleet.cache.warm()


def _release(app: Any, budget: float) -> None:
    fleet = _find(app)
    if fleet is not None:
        began = time.monotonic()
        fleet.errands.join(budget / 2)
        fleet.cache.release(max(0.0, budget - (time.monotonic() - began)))
