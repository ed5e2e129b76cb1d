"""The Celery app of the fleet tests: ``-A tests.fleet.worker_app``, with settings as JSON in FLEET_SETTINGS.

The test process loads a copy of its own for each fleet (``tests.fleet.fleets.load_app``), to be the producer.
Executions are counted in the *control* Redis, which no test breaks: L2 has a server of its own.
"""

from __future__ import annotations

import json
import os
import threading
import time
from typing import Any

import redis
from celery import Celery, signals
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from celery.result import allow_join_result

from celery_mlcache import cached_task, setup_cache
from celery_mlcache.entry import MISS
from tests.support.waiting import wait_until

settings: dict[str, Any] = json.loads(os.environ.get("FLEET_SETTINGS", "{}"))
beat_uses_cache: bool = settings.pop("beat_uses_cache", False)
control_url: str = settings.pop("control_url", "redis://127.0.0.1:1")
overrides: dict[str, Any] = settings.pop("overrides", {})
# In the test process no copy may become the current app: there are several.
app = Celery("fleet-tests", set_as_current=settings.pop("is_worker", False), include=settings.pop("more_modules", []))
app.conf.update(settings)
_began = [0.0]


def _before_release(**_: Any) -> None:
    _began[0] = time.monotonic()


def _after_release(**_: Any) -> None:
    os.write(1, b"cache released in %.3f s\n" % (time.monotonic() - _began[0]))  # to the worker's log


# Handlers run in the order of connecting, so these two stand around the library's own.
for _signal in (signals.worker_shutdown, signals.worker_process_shutdown):
    _signal.connect(_before_release, weak=False)
cache = setup_cache(app, **overrides)
for _signal in (signals.worker_shutdown, signals.worker_process_shutdown):
    _signal.connect(_after_release, weak=False)


@signals.beat_init.connect(weak=False)
def _use_the_cache_in_beat(**_: Any) -> None:
    if beat_uses_cache:
        cache.set("beat", 1)


def control() -> redis.Redis:
    """Return a connection to the server for counts and meetings."""
    return redis.Redis.from_url(control_url, protocol=2, socket_timeout=10, decode_responses=True)


def count(name: str) -> int:
    """Count one execution, where every process and the test see it."""
    with control() as client:
        return int(client.incr(f"runs:{name}"))


def runs(name: str) -> int:
    """Return how often it was counted."""
    with control() as client:
        return int(client.get(f"runs:{name}") or 0)


def meet(name: str, size: int) -> None:
    """Wait until *size* tasks are here: then each is in another process, or thread."""
    with control() as client:
        client.rpush(f"met:{name}", os.getpid())
        deadline = time.monotonic() + 10
        while client.llen(f"met:{name}") < size:
            assert time.monotonic() < deadline, f"only {client.llen(f'met:{name}')} of {size} came to {name}"
            time.sleep(0.005)


@cached_task(app=app, shared=False, ttl=600, tags=["x:{x}"])
def double(x: Any) -> Any:
    """Count and double."""
    count(f"double:{x}")
    return x * 2


@app.task(shared=False)
def probe(act: str, *args: Any, meeting: str = "", size: int = 1) -> dict[str, Any]:
    """Do *act* in this process, once *size* of us are running; tell what it cost."""
    if meeting:
        meet(meeting, size)
    before = cache.stats()
    answer = _ACTS[act](*args)
    after = cache.stats()
    names = ("l1_hits", "l2_hits", "loads")
    return {"pid": os.getpid(), "answer": answer, **{n: after[n] - before[n] for n in names}, "stats": after}


def _peek(x: Any) -> Any:
    value = double.cache.get(x)
    return None if value is MISS else value


def _invalidate(x: Any) -> bool:
    return double.cache.invalidate(x)


_ACTS: dict[str, Any] = {
    "call": double,
    "peek": _peek,
    "invalidate": _invalidate,
    "invalidate_in_two_steps": lambda x: cache.delete(double.cache.key(x)),
    "get": cache.get,
    "set": cache.set,
    "headers": lambda: dict(app.current_task.request.headers or {}),
    "wait_for": lambda name: wait_until(lambda: runs(name), 10, name),
    "set_and_fail": lambda key, value: {}[cache.set(key, value)],
    "set_and_count": lambda key, value, name: cache.set(key, value) and count(name),
    "stats": lambda: None,
    "threads": lambda: sorted(thread.name for thread in threading.enumerate()),
}


@app.task(shared=False, bind=True)
def report(self: Any, name: str) -> None:
    """Leave the headers of this message where the test finds them."""
    with control() as client:
        client.set(f"report:{name}", json.dumps(self.request.headers or {}))


@app.task(shared=False, bind=True, max_retries=1)
def hand_on(self: Any, key: str, value: Any, queue: str) -> dict[str, Any]:
    """Write here, and read in whichever process takes the retry."""
    if not self.request.retries:
        cache.set(key, value)
        raise self.retry(countdown=0, queue=queue, kwargs={"key": key, "value": value, "queue": queue}, args=())
    return {"pid": os.getpid(), "answer": cache.get(key), "headers": dict(self.request.headers or {})}


class OopsError(Exception):
    """A user's error."""


@cached_task(app=app, shared=False, bind=True, max_retries=1, default_retry_delay=0)
def moody(self: Any, mood: str, seconds: float = 30.0) -> str:
    """End badly at the first execution, and well at the next."""
    if count(f"moody:{mood}") > 1:
        return f"no longer {mood}"
    if mood == "error":
        raise OopsError(mood)
    if mood == "exit":
        raise SystemExit(3)
    if mood == "retry":
        raise self.retry(countdown=0)
    if mood == "ignore":
        raise Ignore
    if mood == "reject":
        raise Reject("no", requeue=False)
    # Soft and hard limits.
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            time.sleep(0.01)
    except SoftTimeLimitExceeded:
        count("moody:saw-soft-limit")
        raise
    return "slept"


@cached_task(app=app, shared=False)
def slow(x: int, seconds: float) -> int:
    """Take its time."""
    count(f"slow:{x}")
    time.sleep(seconds)
    return x


@app.task(shared=False)
def follow(x: int, seconds: float) -> int:
    """Ask for what another thread of this process is computing."""
    began = threading.Event()

    def lead() -> None:
        began.set()
        slow(x, seconds)

    leader = threading.Thread(target=lead)
    leader.start()
    began.wait()
    with control() as client:
        while not client.get(f"runs:slow:{x}"):
            time.sleep(0.005)
    try:
        return slow(x, seconds)
    finally:
        leader.join()


@cached_task(
    app=app, shared=False, autoretry_for=(OopsError,), max_retries=2, default_retry_delay=0, retry_jitter=False
)
def flaky(mood: str) -> str:
    """Fail twice."""
    runs = count(f"flaky:{mood}")
    if runs < 3:
        raise OopsError(mood)
    return f"run {runs}"


def _hold(x: str, seconds: float, seconds_again: float) -> int:
    """Say who computes this, take its time, and return which execution this was."""
    started = count(f"start:{x}")
    with control() as client:
        client.rpush(f"holders:{x}", os.getpid())  # from here on it may be killed
    time.sleep(seconds if started == 1 else seconds_again)
    count(f"end:{x}")
    return started


@cached_task(app=app, shared=False, ttl=600)
def hold(x: str, seconds: float, seconds_again: float = 0.0) -> int:
    """Take its time, and remember the result."""
    return _hold(x, seconds, seconds_again)


@cached_task(app=app, shared=False, ttl=lambda _: 0.7)
def brief(x: str, seconds: float) -> int:
    """Take its time, for a result that soon is gone."""
    return _hold(x, seconds, 0.0)


@cached_task(app=app, shared=False, on_contention="retry")
def patient(x: str, seconds: float) -> int:
    """Come back later, and hold no process meanwhile, while another one computes this."""
    started = count(f"start:{x}")
    wait_until(lambda: runs(f"go:{x}"), seconds, f"go:{x}")
    return started


@cached_task(app=app, shared=False, on_contention="raise")
def hasty(x: str, seconds: float) -> int:
    """Fail while another one computes this."""
    started = count(f"start:{x}")
    wait_until(lambda: runs(f"go:{x}"), seconds, f"go:{x}")
    return started


@cached_task(app=app, shared=False)
def outer(x: str, depth: int) -> int:
    """Compute with the help of other tasks, which ask for this very call again."""
    count(f"outer:{x}:{depth}")
    if runs(f"outer:{x}:{depth}") > 1:
        return -1
    with allow_join_result():
        return between.delay(x, depth).get(timeout=20) + 1


@app.task(shared=False)
def between(x: str, depth: int) -> int:
    """Know nothing of caches, and pass it on."""
    with allow_join_result():
        return outer.delay(x, depth).get(timeout=20)
