"""The tasks of the matrix: every body three times, uncached, cached, and cached with answers where it is called.

They belong to the app of worker_app.py: ``define`` makes them in the test process, and a worker imports this module.
Every body counts its executions under ``side:x``, in the control Redis; *x* is the scenario that calls it.
"""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any
from unittest import mock

from celery import Task, _state, shared_task, signals
from celery.exceptions import Ignore, Reject
from kombu.serialization import dumps
from pydantic import BaseModel

from celery_mlcache import CachedTask, cached_task
from tests.support.annotated import annotated
from tests.support.waiting import wait_until

SIDES = ("plain", "worker", "producer")


class OopsError(Exception):
    """A user's error."""


class Order(BaseModel):
    """An argument and a result."""

    sku: str
    amount: int = 1


def wire(value: Any) -> Any:
    """Return *value* as whoever waits for a result gets it; an exception as its type and arguments."""
    if isinstance(value, BaseException):
        return [type(value).__name__, wire(value.args)]
    return json.loads(dumps(value, "json")[2])


def define(home: Any) -> None:
    """Make all of it on the app of *home*, a copy of worker_app.py."""
    app = home.app

    def push(name: str, what: Any) -> None:
        with home.control() as client:
            client.rpush(f"seen:{name}", json.dumps(wire(what)))

    @app.task(name="matrix.note", shared=False)
    def note(*args, name):
        """Leave what a callback was told."""
        push(name, args)
        return list(args)

    @app.task(name="matrix.note_error", shared=False)
    def note_error(request, exc, traceback, name):
        """Leave what an errback was told."""
        push(name, exc)

    @app.task(name="matrix.die", shared=False, ignore_result=True)
    def die():
        """Take this process along."""
        os.kill(os.getpid(), signal.SIGKILL)

    class Deadly(Task):
        abstract = True

        def __call__(self, *args, **kwargs):
            """Kill the process once the body is over, and its result neither stored nor acknowledged."""
            result = super().__call__(*args, **kwargs)
            if home.count(f"over:{self.name}") == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

    @cached_task(app=app, name="matrix.joint", shared=False, ttl=600, coalesce=True)
    def joint(x):
        home.count(f"joint:{x}")
        wait_until(lambda: home.runs(f"go:{x}"), 20, x)
        if x == "failing":
            raise OopsError(x)
        return x

    for side in SIDES:
        _define(home, side, Deadly)
        _define_family(app, side)
        _define_shared(home, side)


def _define(home: Any, side: str, deadly: type[Task]) -> None:
    app = home.app

    def count(x: str) -> int:
        return home.count(f"{side}:{x}")

    def task(**options: Any) -> Any:
        def decorate(function: Any) -> Any:
            name = f"{side}.{function.__name__}"
            if side == "plain":
                return app.task(name=name, shared=False, **options)(function)
            is_producer = side == "producer"
            return cached_task(app=app, name=name, shared=False, ttl=600, producer=is_producer, **options)(function)

        return decorate

    @task()
    def echo(x, y=0):
        count(x)
        return (x, [y, 1.5, None], {"1": "é"})  # a tuple: it is a list on the way back

    @task()
    def add(a, b, x):
        count(x)
        return a + b

    @task()
    def total(numbers, x):
        count(x)
        return sum(numbers)

    @task()
    def fail(x):
        count(x)
        raise OopsError(x, 1)

    @task(bind=True)
    def bound(self, x):
        count(x)
        return [self.name.partition(".")[2], self.request.retries, x]

    @task(pydantic=True)
    @annotated
    def order(order: Order, x: str) -> Order:
        count(x)
        return Order(sku=order.sku, amount=order.amount * 2)

    @task(bind=True, max_retries=1, default_retry_delay=0)
    def retry(self, x):
        if count(x) == 1:
            raise self.retry()
        return x

    @task(autoretry_for=(OopsError,), max_retries=1, default_retry_delay=0)
    def autoretry(x):
        if count(x) == 1:
            raise OopsError(x)
        return x

    @task()
    def ignore(x):
        if count(x) == 1:
            raise Ignore
        return x

    @task()
    def reject(x):
        if count(x) == 1:
            raise Reject("no", requeue=False)
        return x

    @task(acks_late=True, reject_on_worker_lost=True)
    def late(x):
        if count(x) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return x

    @task(acks_late=True, reject_on_worker_lost=True, base=deadly)
    def over(x):
        count(x)
        return x

    @task()
    def limited(x):
        deadline = time.monotonic() + 30
        is_first = count(x) == 1
        while is_first and time.monotonic() < deadline:
            time.sleep(0.01)
        return x

    @task(bind=True)
    def replacing(self, x):
        count(x)
        raise self.replace(app.tasks[f"{side}.echo"].si(x))

    class Price(Task if side == "plain" else CachedTask):
        name = f"{side}.Price"
        mlcache = None if side == "plain" else {"ttl": 600, "producer": side == "producer"}

        def run(self, x):
            count(x)
            return self.price(x)

        def price(self, x):
            return [x, 5]

    app.register_task(Price())


def _define_family(app: Any, side: str) -> None:
    @app.task(name=f"{side}.family", shared=False)
    def family(x):
        for _ in range(2):
            app.tasks[f"{side}.echo"].delay(x)
        app.tasks[f"{side}.echo"].apply_async((x,), add_to_parent=False)
        return x


def _define_shared(home: Any, side: str) -> None:
    """Make a task for every app; in the test process, where other tests have theirs, for this one only."""

    def shared(x):
        home.count(f"{side}:{x}")
        return [x, "shared"]

    def share() -> None:
        if side == "plain":
            shared_task(name="plain.shared")(shared)
        else:
            cached_task(name=f"{side}.shared", ttl=600, producer=side == "producer")(shared)

    if _is_worker():
        share()
        return
    before = set(_state._on_app_finalizers)
    with mock.patch.object(_state, "_get_active_apps", list):
        share()
    (finalize,) = _state._on_app_finalizers - before
    finalize(home.app)
    _state._on_app_finalizers -= {finalize}


def _is_worker() -> bool:
    return bool(json.loads(os.environ.get("FLEET_SETTINGS", "{}")).get("is_worker"))


def _tell_what_happens(home: Any) -> None:
    """Leave the end of each execution where a test finds it that has no result backend."""

    def push(task_id: str, state: str, value: Any) -> None:
        with home.control() as client:
            client.rpush(f"ended:{task_id}", json.dumps([state, wire(value)]))

    @signals.task_prerun.connect(weak=False)
    def on_prerun(task: Any, args: Any, **_: Any) -> None:
        home.count(f"received:{task.name}:{args[0] if args else ''}")

    @signals.task_postrun.connect(weak=False)
    def on_postrun(task_id: str, state: str, retval: Any, **_: Any) -> None:
        push(task_id, state, None if state in {"IGNORED", "REJECTED", "RETRY"} else retval)

    @signals.task_revoked.connect(weak=False)
    def on_revoked(request: Any, **_: Any) -> None:
        push(request.id, "REVOKED", None)


if _is_worker():
    from tests.fleet import worker_app

    define(worker_app)
    _tell_what_happens(worker_app)
