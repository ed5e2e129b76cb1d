"""The Celery app of one peer, for its workers and its callers; run by the Python of that peer's own environment.

What may live here: the app, the tasks, and how each peer declares them. Only the standard library, celery, redis and
the one peer named by ``PEER`` are imported, and Python 3.9 with Celery 4.4 must be able to run it, for jobtastic.

A task does what the *plan* in Redis says for this execution of this call, so a call can block the first time and
return the second time with the same arguments.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import redis
from celery import Celery
from celery.signals import worker_ready

PEER = os.environ["PEER"]
SERVER = os.environ["PEER_REDIS"]  # redis://host:port
LIFE = 60  # seconds a result, or a lock without a recommendation of its own, lives
SHORT = 2  # the same, for the task whose result is let expire
LIMIT = 1  # seconds, hard
EXPIRY = 10  # celery-singleton's lock_expiry

app = Celery("peers", broker=f"{SERVER}/0", backend=f"{SERVER}/1")
app.conf.update(
    worker_prefetch_multiplier=1,  # no call waits behind one that was killed
    broker_connection_retry_on_startup=True,
    task_serializer="json",
    accept_content=["json"],
)
ledger = redis.Redis.from_url(f"{SERVER}/2", decode_responses=True)

Declare = Callable[..., Any]
Forget = Callable[[Any, dict[str, Any]], Any]


def name_of(x: Any) -> str:
    """Return under which name the executions with *x* are counted."""
    return x if isinstance(x, str) else "-".join(str(part) for part in x)


def execute(x: Any) -> dict[str, Any]:
    """Count this execution, do what is planned for it, and return its number."""
    name = name_of(x)
    ledger.rpush(f"starts:{name}", f"{time.time():.6f}:{os.getpid()}:{os.getppid()}")  # first: who counts looks here
    run = ledger.incr(f"runs:{name}")
    step = ledger.hget(f"plan:{name}", str(run)) or ledger.hget(f"plan:{name}", "each") or "0"
    if step == "raise":
        raise ValueError("as planned")
    time.sleep(float(step))
    return {"name": name, "run": run}


# --- how each peer declares a task, and how it is told to forget a call ---------------------------------------------


def plain() -> tuple[Declare, Forget | None, str]:
    """Celery itself."""

    def declare(function: Any, *, only: Sequence[str] | None = None, life: float = LIFE, **options: Any) -> Any:
        return app.task(name=function.__name__, **options)(function)

    return declare, None, ""


def mlcache() -> tuple[Declare, Forget | None, str]:
    """celery_mlcache."""
    from celery_mlcache import cached_task, setup_cache

    setup_cache(app)
    spares_messages = PEER.endswith("coalesce")

    def declare(function: Any, *, only: Sequence[str] | None = None, life: float = LIFE, **options: Any) -> Any:
        if only:
            options["ignore"] = ("trace",)
        if spares_messages:
            options |= {"producer": True, "coalesce": True}
        return cached_task(app=app, ttl=life, name=function.__name__, **options)(function)

    return declare, lambda task, kwargs: task.cache.invalidate(**kwargs), "`task.cache.invalidate(...)`"


def once() -> tuple[Declare, Forget | None, str]:
    """celery-once, as its README sets it up."""
    from celery_once import QueueOnce

    app.conf.ONCE = {
        "backend": "celery_once.backends.Redis",
        "settings": {"url": f"{SERVER}/3", "default_timeout": 60 * 60},
    }
    is_graceful = PEER.endswith("graceful")

    def declare(function: Any, *, only: Sequence[str] | None = None, life: float = LIFE, **options: Any) -> Any:
        settings = {"graceful": is_graceful, **({"keys": list(only)} if only else {})}
        return app.task(name=function.__name__, base=QueueOnce, once=settings, **options)(function)

    def forget(task: Any, kwargs: dict[str, Any]) -> Any:
        return task.once_backend.clear_lock(task.get_key([], kwargs))

    return declare, forget, "`task.once_backend.clear_lock(task.get_key(...))`"


def singleton() -> tuple[Declare, Forget | None, str]:
    """celery-singleton: the README's quick start, its ``clear_locks`` when a worker starts, its lock_expiry."""
    from celery_singleton import Singleton, clear_locks

    if PEER.endswith("expiry"):
        app.conf.singleton_lock_expiry = EXPIRY

    @worker_ready.connect(weak=False)
    def unlock_all(**_: Any) -> None:
        clear_locks(app)

    def declare(function: Any, *, only: Sequence[str] | None = None, life: float = LIFE, **options: Any) -> Any:
        extra = {"unique_on": list(only)} if only else {}
        return app.task(name=function.__name__, base=Singleton, **extra, **options)(function)

    def forget(task: Any, kwargs: dict[str, Any]) -> Any:
        return task.release_lock(task_kwargs=kwargs)

    return declare, forget, "`task.release_lock(...)`"


def jobtastic() -> tuple[Declare, Forget | None, str]:
    """jobtastic: a class for each task, its significant keyword arguments, and a cache of its own kind in Redis."""
    import json

    from jobtastic import JobtasticTask
    from jobtastic.cache.base import WrappedCache

    class Cache(WrappedCache):
        """Redis without Django or Werkzeug; what is None (the id of no task) is absent, as it looks in theirs."""

        def set(self, key: str, value: Any, timeout: int | None = None) -> Any:
            return value is not None and super().set(key, value, timeout)

    app.conf.JOBTASTIC_CACHE = Cache(redis.Redis.from_url(f"{SERVER}/3", decode_responses=True))

    def declare(function: Any, *, only: Sequence[str] | None = None, life: float = LIFE, **options: Any) -> Any:
        takes_self = options.pop("bind", False)

        def calculate_result(self: Any, *args: Any, **kwargs: Any) -> Any:
            return function(self, *args, **kwargs) if takes_self else function(*args, **kwargs)

        members = {
            "calculate_result": calculate_result,
            "name": function.__name__,
            "significant_kwargs": [("x", json.dumps)],
            "herd_avoidance_timeout": LIFE,
            "cache_duration": life,
            "__module__": __name__,
            **options,
        }
        return app.register_task(type(function.__name__, (JobtasticTask,), members)())

    return declare, None, ""


_declare, forget, forget_label = {
    "plain": plain,
    "mlcache": mlcache,
    "once": once,
    "singleton": singleton,
    "jobtastic": jobtastic,
}[PEER.partition("-")[0]]()


# --- the tasks ------------------------------------------------------------------------------------------------------


def _work(x: Any, y: int = 2) -> Any:
    return execute(x)


def _bound(self: Any, x: Any) -> Any:
    assert self.name.endswith("bound"), self
    return execute(x)


def _partial(x: Any, trace: str = "") -> Any:
    return execute(x)


def _limited(x: Any) -> Any:
    return execute(x)


def _short(x: Any) -> Any:
    return execute(x)


work = _declare(_work)
bound = _declare(_bound, bind=True)
partial = _declare(_partial, only=("x",))
limited = _declare(_limited, time_limit=LIMIT)
short = _declare(_short, life=SHORT)


@app.task(name="collect")
def collect(values: Any) -> Any:
    """The body of a chord."""
    return values


@app.task(name="bystander")
def bystander() -> None:
    """Nothing to do with the calls beside it."""
