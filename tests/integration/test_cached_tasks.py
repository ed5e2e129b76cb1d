"""Cached tasks over a real L2: two apps of one namespace stand for two processes of a fleet.

Messages go nowhere: they are caught where they are published, and executed by Celery's own tracer as a worker would.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from dataclasses import dataclass
from typing import ClassVar

import pytest
from celery import Celery, _state
from celery import signals as celery_signals
from celery.app.trace import build_tracer
from celery.exceptions import SoftTimeLimitExceeded

from celery_mlcache import cached_task, setup_cache
from celery_mlcache.entry import MISS
from celery_mlcache.errors import CallInProgressError, NotCachedError, RemoteStoreError
from celery_mlcache.fleet import modes, refreshing, signals
from celery_mlcache.fleet.app import find_fleet
from celery_mlcache.fleet.record import unpack
from celery_mlcache.keys import RedisNames
from celery_mlcache.leases import Lease, held
from tests.support.ports import HOST, free_port
from tests.support.waiting import wait_until

pytestmark = pytest.mark.redis

LONG = 30.0  # longer than any test may take
QUICK = 3.0  # far below it, and no promise


class NotFoundError(Exception):
    def __init__(self, sku, hint=None):
        super().__init__(f"no {sku}")
        self.sku, self.hint = sku, hint


class GoneError(NotFoundError):
    pass


class Strangers(Exception):  # noqa: N818 - for another process it is unknown
    pass


@dataclass
class Sent:
    """A message on its way."""

    task: str
    args: tuple
    kwargs: dict
    headers: dict
    routing_key: str
    priority: int | None


class Gate:
    """A body that tells when it runs, and ends when it may."""

    def __init__(self, answer="gated"):
        self.answer = answer
        self.entered = threading.Semaphore(0)
        self.opened = threading.Event()
        self.runs = 0

    def __call__(self, *_):
        self.runs += 1
        self.entered.release()
        assert self.opened.wait(LONG)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def wait_entered(self):
        """Return when the body runs."""
        assert self.entered.acquire(timeout=LONG)


class Fleet:
    """Apps of one namespace; each has a cache manager of its own, as each process has."""

    def __init__(self, url, namespace, stack):
        self.url, self.namespace, self.stack = url, namespace, stack
        self.names = RedisNames(namespace)
        self.task_name = f"t.{uuid.uuid4().hex[:8]}"
        self._sent, self._apps = [], []
        celery_signals.before_task_publish.connect(self._on_publish, weak=False)
        stack.callback(celery_signals.before_task_publish.disconnect, self._on_publish)
        self._pool = stack.enter_context(ThreadPoolExecutor(16))

    @property
    def sent(self):
        """All messages so far, those included that are sent behind the callers' backs."""
        for app in self._apps:
            assert find_fleet(app).errands.join(LONG)
        return self._sent

    def _on_publish(self, sender, body, headers, properties, routing_key, **_):
        args, kwargs, _ = body
        # Its headers themselves, for handlers that were connected later may still add to them.
        self._sent.append(Sent(sender, args, kwargs, headers, routing_key, properties.get("priority")))

    def app(self, **settings):
        """Return another process's app."""
        app = Celery(f"c{uuid.uuid4().hex[:8]}", broker="memory://", backend="cache+memory://", set_as_current=False)
        defaults = {"l1_enabled": False, "redis_url": self.url, "cache_namespace": self.namespace}
        setup_cache(app, **{**defaults, **settings})
        self._apps.append(app)
        self.stack.callback(app.close)
        self.stack.callback(app.mlcache.close)
        return app

    def task(self, body, *, app=None, settings=None, **options):
        """Return the task as another process has it, with this body."""

        @cached_task(
            app=self.app(**(settings or {})) if app is None else app, name=self.task_name, shared=False, **options
        )
        def task(x=1):
            return body(x)

        task.app.finalize()
        return task.app.tasks[self.task_name]

    def start(self, call, *args, **kwargs):
        """Return the future of a call in another thread."""
        return self._pool.submit(call, *args, **kwargs)

    def wait_until_waiting(self, task, count=1):
        """Return when so many callers of a process wait for the holder of a lease, or have asked for it."""
        wait_until(lambda: stat(task, "waits") >= count, LONG, "the waiters")

    def lease(self, task, *args):
        """Return the Redis key of the record of a call's lease."""
        return self.names.lease(task.cache.key(*args))

    def mark(self, task, *args):
        """Return the Redis key of the mark of a call's refresh."""
        return self.names.mark(f"refresh:{task.cache.key(*args)}")


def stat(task, name):
    """Return one of a process's counters."""
    assert find_fleet(task.app).errands.join(LONG)
    return task.cache.manager.stats()[name]


def execute(task, *args, headers=None, **request):
    """Execute a task as a worker does that has received a message; return its state and what it returned or raised."""
    task_id = uuid.uuid4().hex
    request = {
        "id": task_id,
        "task": task.name,
        "root_id": task_id,
        "retries": 0,
        "delivery_info": {"exchange": "", "routing_key": "celery"},
        "hostname": "w1@here",
        "headers": headers or {},
        **(headers or {}),
        **request,
    }
    returned, info, _, _ = build_tracer(task.name, task, app=task.app)(task_id, args, {}, request)
    if info is None:
        return "SUCCESS", returned
    return info.state, info.retval


def deliver(message, task):
    """Let a worker execute a message that was sent."""
    return execute(task, *message.args, headers=message.headers, retries=message.headers.get("retries", 0))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    """What a process has asked for it would not ask for again within a second."""
    monkeypatch.setattr(refreshing, "ASK_AGAIN", 0.0)


@pytest.fixture(autouse=True)
def _no_shared_leftovers(monkeypatch):
    """What a test shares with every app is gone after it."""
    monkeypatch.setattr(_state, "_on_app_finalizers", set(_state._on_app_finalizers))


@pytest.fixture
def fleet(shared_redis, namespace):
    """A fleet on the shared server."""
    with ExitStack() as stack:
        yield Fleet(shared_redis.url, namespace, stack)


@pytest.fixture
def redis(shared_redis):
    """A client of the shared server."""
    client = shared_redis.client()
    yield client
    client.close()


@pytest.fixture
def told():
    """What the cache's signals have told: (name, arguments)."""
    told = []
    with ExitStack() as stack:
        for name in ("cache_hit", "cache_miss", "cache_stale", "cache_error"):

            def handler(sender, signal, name=name, **what):
                told.append((name, what))

            getattr(signals, name).connect(handler, weak=False)
            stack.callback(getattr(signals, name).disconnect, handler)
        yield told


def forbidden(_):
    """Be a body that nobody may run."""
    raise AssertionError("this process was not to compute")


def numbered(start=1):
    """Return a body that returns the number of its run."""
    runs = Counter()

    def body(_):
        runs["all"] += 1
        return start + runs["all"] - 1

    body.runs = runs
    return body


class TestSharing:
    @pytest.mark.parametrize("settings", [{}, {"l1_enabled": True}])
    def test_one_process_computes_for_all(self, fleet, told, settings):
        """What one has computed the other finds in L2, and from then on in its own L1 if it has one."""
        one = fleet.task(lambda x: ({"rows": [x]}, (x, b"\0")), settings=settings)
        two = fleet.task(forbidden, settings=settings)
        assert execute(one) == ("SUCCESS", ({"rows": [1]}, (1, b"\0")))
        first = two()
        assert first == ({"rows": [1]}, (1, b"\0"))
        first[0]["rows"].append("mine")
        assert two() == ({"rows": [1]}, (1, b"\0"))
        levels = [what["level"] for name, what in told if name == "cache_hit"]
        assert levels[0] == "l2"
        if settings:
            wait_until(lambda: two() and told[-1][1]["level"] == "l1", LONG, "a hit in L1")
        explained = two.cache.explain()
        assert explained.maker.endswith("@w1@here")
        assert (explained.is_hit, explained.level) == (True, told[-1][1]["level"])

    @pytest.mark.parametrize(
        "settings",
        [
            {"serializer": "pickle", "signing_keys": "k" * 32},
            {"serializer": "kombu:json"},
            {"serializer": "kombu:msgpack"},
            {"signing_keys": "k" * 32, "compression": "zlib", "compression_threshold": 1},
        ],
        ids=lambda settings: settings.get("serializer", "signed"),
    )
    def test_serializers(self, fleet, settings):
        """Results and exceptions travel with every serializer, as far as that keeps types."""

        def body(x):
            if x == 2:
                raise NotFoundError("a", hint=[1])
            return {"rows": [x, 2.0, None]}

        one = fleet.task(body, settings=settings, negative={NotFoundError: 30})
        two = fleet.task(forbidden, settings=settings, negative={NotFoundError: 30})
        assert one(1) == two(1) == {"rows": [1, 2.0, None]}
        for task in (one, two):
            with pytest.raises(NotFoundError) as info:
                task(2)
            assert (info.value.args, info.value.sku, info.value.hint) == (("no a",), "a", [1])

    def test_garbage_in_redis(self, fleet, redis):
        """Bytes that nobody can read are computed over, and read by all from then on."""
        one, two = fleet.task(numbered()), fleet.task(forbidden)
        assert one() == 1
        name = fleet.names.value(one.cache.key())
        whole = redis.get(name)
        redis.set(name, whole[:-1] + bytes([whole[-1] ^ 1]), px=60_000)
        why = two.cache.explain()
        assert (why.is_hit, why.level) == (False, None)
        assert why.why.startswith("what is stored cannot be read (")
        assert one() == 2
        assert two() == 2

    def test_invalidations(self, fleet):
        """One call's, all of the task's, or a tag's: no process finds what was removed."""
        one = fleet.task(numbered(), tags=["x:{x}"])
        two = fleet.task(numbered(100), tags=["x:{x}"])
        assert [one(1), two(1)] == [1, 1]
        assert two.cache.invalidate(1)
        assert one(1) == 2
        assert two.cache.invalidate_all()
        assert one(1) == 3
        two.cache.manager.invalidate_tags("x:1")
        assert one.cache.explain(1).why.startswith("it was invalidated, or its life has ended")
        assert one(1) == 4


class TestNegative:
    def test_in_another_process(self, fleet, told):
        """It is raised there with the same type, args and attributes, without a run; the nearest class decides."""
        negative = {NotFoundError: 30, GoneError: 20}

        def body(_):
            raise GoneError("a", hint=(1, {"b"}))

        one, two = fleet.task(body, negative=negative), fleet.task(forbidden, negative=negative)
        for task in (one, two):
            with pytest.raises(GoneError) as info:
                task()
            assert (info.value.args, info.value.sku, info.value.hint) == (("no a",), "a", (1, {"b"}))
        assert (stat(two, "negative_hits"), stat(two, "loads")) == (1, 0)
        explained = two.cache.explain()
        assert (explained.is_hit, explained.is_error) == (True, True)
        assert 10 < explained.remaining <= 20
        assert [name for name, _ in told] == ["cache_miss", "cache_hit"]

    def test_one_that_the_reader_does_not_know(self, fleet):
        """A reader whose options do not name it computes, and its result replaces the exception for all."""

        def body(_):
            raise Strangers("a")

        one = fleet.task(body, negative={Strangers: 30})
        two = fleet.task(numbered(), negative={NotFoundError: 30})
        with pytest.raises(Strangers):
            one()
        assert two.cache.get() is MISS
        assert not two.cache.explain().is_hit
        assert [two(), one()] == [1, 1]

    def test_a_retry_of_a_message(self, fleet):
        """An execution with retries > 0 computes, whoever has cached the exception."""

        def body(_):
            raise NotFoundError("a")

        one = fleet.task(body, negative={NotFoundError: 30})
        two = fleet.task(numbered(), negative={NotFoundError: 30})
        assert execute(one)[0] == "FAILURE"
        assert execute(two)[0] == "FAILURE"
        assert execute(two, retries=1) == ("SUCCESS", 1)
        assert execute(one) == ("SUCCESS", 1)


class TestNegativeAndRetries:
    OPTIONS: ClassVar = {
        "negative": {NotFoundError: 30},
        "autoretry_for": (NotFoundError,),
        "retry_backoff": False,
        "default_retry_delay": 0,
    }

    def missing(self, fleet, **options):
        """Return a task that always fails, and its executions."""
        runs = []

        def body(_):
            runs.append(None)
            raise NotFoundError("a")

        return fleet.task(body, **{**self.OPTIONS, **options}), runs

    def test_only_what_the_last_attempt_has_come_to_is_cached(self, fleet):
        """While a call is tried again its exception is no outcome; then it is, and no call tries again."""
        one, runs = self.missing(fleet, max_retries=2)
        two = fleet.task(forbidden, **self.OPTIONS)
        for attempt in range(2):
            assert execute(one, retries=attempt)[0] == "RETRY"
            assert one.cache.get() is MISS
        assert execute(one, retries=2)[0] == "FAILURE"
        assert len(runs) == 3
        sent = len(fleet.sent)
        for task in (one, two):
            state, error = execute(task)
            assert (state, type(error)) == ("FAILURE", NotFoundError)
        assert len(runs) == 3
        assert len(fleet.sent) == sent

    @pytest.mark.parametrize(
        ("options", "retries"),
        [
            ({"max_retries": 0}, 0),
            ({"max_retries": 9, "retry_kwargs": {"max_retries": 1}}, 1),
            ({"max_retries": 1, "retry_kwargs": {"max_retries": None}}, 1),
            ({"max_retries": 1, "retry_kwargs": {}}, 1),
            ({"max_retries": 0, "autoretry_for": [NotFoundError], "dont_autoretry_for": [OSError]}, 0),
            ({"dont_autoretry_for": (NotFoundError,)}, 0),
            ({"autoretry_for": (OSError,)}, 0),
        ],
    )
    def test_which_attempt_is_the_last(self, fleet, options, retries):
        """It is for Celery to say, in all the ways that it has."""
        one, _ = self.missing(fleet, **options)
        for attempt in range(retries):
            assert execute(one, retries=attempt)[0] == "RETRY"
            assert one.cache.get() is MISS
        assert execute(one, retries=retries)[0] == "FAILURE"
        with pytest.raises(NotFoundError):
            one.cache.get()

    @pytest.mark.parametrize("how", ["retry", "attribute"])
    def test_a_limit_that_the_body_sets(self, fleet, how):
        """Celery's ``autoretry_for`` heeds it, so it decides which attempt is the last."""
        runs = []
        options = {**self.OPTIONS, "max_retries": 3}

        @cached_task(app=fleet.app(), bind=True, name=fleet.task_name, **options)
        def task(self):
            runs.append(None)
            if how == "retry":
                raise self.retry(exc=NotFoundError("a"), max_retries=0)
            self.override_max_retries = 0
            raise NotFoundError("a")

        assert [execute(task)[0] for _ in range(3)] == ["FAILURE"] * 3
        assert len(runs) == 1

    def test_annotations_do_not_change_what_the_decorator_says(self, fleet):
        """As for Celery, which takes the decorator's first."""
        app = fleet.app()
        app.conf.task_annotations = {fleet.task_name: {"autoretry_for": (NotFoundError,)}}
        runs = []

        @cached_task(app=app, name=fleet.task_name, **{**self.OPTIONS, "autoretry_for": (OSError,)})
        def task():
            runs.append(None)
            raise NotFoundError("a")

        assert [execute(task)[0] for _ in range(2)] == ["FAILURE"] * 2
        assert len(runs) == 1

    def test_without_a_limit(self, fleet):
        """What is tried for ever has no outcome."""
        one, _ = self.missing(fleet, max_retries=None)
        assert execute(one, retries=1000)[0] == "RETRY"
        assert one.cache.get() is MISS

    def test_a_direct_call_tries_once_and_says_nothing_of_the_others(self, fleet):
        """Its exception is not cached where a message would be tried again; one that is cached is raised."""
        one, runs = self.missing(fleet, max_retries=1)
        for _ in range(2):
            with pytest.raises(NotFoundError):
                one()
        assert len(runs) == 2
        assert execute(one, retries=1)[0] == "FAILURE"
        with pytest.raises(NotFoundError):
            one()
        assert len(runs) == 3

    def test_eager(self, fleet):
        """Eager calls are tried again as messages are."""
        one, runs = self.missing(fleet, max_retries=2)
        assert [one.apply().state for _ in range(2)] == ["FAILURE", "FAILURE"]
        assert len(runs) == 3

    def test_a_retry_of_the_users_own(self, fleet):
        """``self.retry(exc=...)`` in a body is the user's: what it raises in the end is cached, and not before."""
        app = fleet.app()

        @cached_task(app=app, bind=True, name=fleet.task_name, negative={NotFoundError: 30}, max_retries=1)
        def task(self):
            raise self.retry(exc=NotFoundError("a"), countdown=0)

        assert execute(task)[0] == "RETRY"
        assert task.cache.get() is MISS
        assert execute(task, retries=1)[0] == "FAILURE"
        with pytest.raises(NotFoundError):
            task.cache.get()
        assert execute(task)[0] == "FAILURE"


class TestSingleFlight:
    def test_the_other_process_waits(self, fleet):
        """While one computes, callers of the other wait and get its result, woken as soon as it is there."""
        gate = Gate({"rows": [1]})
        one, two = fleet.task(gate), fleet.task(forbidden)
        first = fleet.start(one)
        gate.wait_entered()
        others = [fleet.start(execute, two) for _ in range(3)] + [fleet.start(two) for _ in range(3)]
        fleet.wait_until_waiting(two)
        gate.opened.set()
        assert first.result(LONG) == {"rows": [1]}
        for each in others:
            assert each.result(LONG) in ({"rows": [1]}, ("SUCCESS", {"rows": [1]}))
        assert gate.runs == 1
        assert (stat(two, "loads"), stat(two, "wait_timeouts")) == (0, 0)
        assert 0 < stat(two, "wait_seconds") < LONG

    @pytest.mark.parametrize("how", ["zero", "short", "setting"])
    def test_the_wait_is_over(self, fleet, how):
        """After ``max_wait`` a caller computes; the one that computed first keeps its result in the cache."""
        gate = Gate("slow")
        options = {} if how == "setting" else {"max_wait": 0 if how == "zero" else 0.05}
        settings = {"single_flight_wait": 0.05} if how == "setting" else {}
        one, two = fleet.task(gate), fleet.task(numbered(7), settings=settings, **options)
        first = fleet.start(one)
        gate.wait_entered()
        assert two() == 7
        assert stat(two, "wait_timeouts") == 1
        gate.opened.set()
        assert first.result(LONG) == 7
        assert one() == two() == 7

    def test_explain_names_who_computes(self, fleet):
        """While nothing is stored yet and somebody is about to, that is the answer."""
        gate = Gate()
        one, two = fleet.task(gate), fleet.task(forbidden)
        first = fleet.start(one)
        gate.wait_entered()
        explained = two.cache.explain()
        assert explained.why == f"nothing is stored yet: {explained.holder} computes it just now"
        assert (explained.is_hit, explained.level) == (False, None)
        gate.opened.set()
        first.result(LONG)
        assert two.cache.explain().why == "its result is cached"

    def test_compute(self, fleet):
        """With "compute" nobody waits; the first result stands."""
        gate = Gate("late")
        one, two = fleet.task(gate), fleet.task(numbered(7), on_contention="compute")
        first = fleet.start(one)
        gate.wait_entered()
        assert two() == 7
        gate.opened.set()
        assert first.result(LONG) == 7
        assert (stat(two, "waits"), stat(two, "wait_timeouts")) == (0, 0)

    def test_raise(self, fleet):
        """With "raise" the caller is told who computes and for how long at least; also inside of one process."""
        gate = Gate()
        one, two = fleet.task(gate), fleet.task(forbidden, on_contention="raise")
        first = fleet.start(one)
        gate.wait_entered()
        with pytest.raises(CallInProgressError) as info:
            two()
        assert info.value.key == two.cache.key()
        assert 0 < info.value.remaining <= 5
        assert info.value.owner
        assert execute(two)[0] == "FAILURE"
        gate.opened.set()
        first.result(LONG)
        assert two() == "gated"

    def test_raise_in_one_process(self, fleet):
        """Another thread of this process counts as another one."""
        gate = Gate()
        task = fleet.task(gate, on_contention="raise")
        first = fleet.start(task)
        gate.wait_entered()
        with pytest.raises(CallInProgressError, match="this process"):
            task()
        gate.opened.set()
        assert first.result(LONG) == task() == "gated"

    def test_retry_in_a_worker(self, fleet):
        """With "retry" the message is sent again for later, with all that it had, and no retry is counted."""
        gate = Gate()
        one, two = fleet.task(gate), fleet.task(forbidden, on_contention="retry")
        first = fleet.start(one)
        gate.wait_entered()
        state, why = execute(two, 1, headers={"mine": 1}, root_id="root", timelimit=[60, 50])
        assert state == "RETRY"
        assert isinstance(why.exc, CallInProgressError)
        assert 0 < why.when <= 5
        (message,) = fleet.sent
        assert (message.task, tuple(message.args), message.headers["retries"]) == (two.name, (1,), 0)
        assert message.headers["eta"]
        assert (message.headers["mine"], message.headers["root_id"]) == (1, "root")
        assert message.headers["timelimit"] == [60, 50]
        gate.opened.set()
        first.result(LONG)
        assert deliver(message, two) == ("SUCCESS", "gated")

    def test_retry_in_a_process_that_computes_it(self, fleet):
        """Where another thread of the very process computes, it comes again as late as where another process does."""
        gate = Gate()
        one = fleet.task(gate, on_contention="retry", settings={"single_flight_lease": 8.0})
        first = fleet.start(one)
        gate.wait_entered()
        state, why = execute(one)
        assert state == "RETRY"
        assert why.exc.owner == "this process"
        assert 4.0 <= why.when <= 8.0
        gate.opened.set()
        first.result(LONG)

    def test_retry_comes_again_within_one_lease(self, fleet, redis):
        """Where a lease seems to last for an hour, for the clock was set back, the message does not wait that long."""
        two = fleet.task(forbidden, on_contention="retry", settings={"single_flight_lease": 2.0})
        far = int(time.time() * 1000) + 3_600_000
        redis.hset(fleet.lease(two), mapping={"fence": 1000 * far, "until": far, "waiters": 0, "owner": "dead"})
        state, why = execute(two)
        assert state == "RETRY"
        assert why.exc.remaining > 3000
        assert 0 < why.when <= 2.0

    @pytest.mark.parametrize("kind", ["direct", "eager", "nested"])
    def test_retry_elsewhere_waits(self, fleet, kind):
        """Where nobody else could take the message up again, "retry" waits."""
        gate = Gate()
        one, two = fleet.task(gate), fleet.task(forbidden, on_contention="retry")

        @two.app.task(name=f"{two.name}.outer")
        def outer():
            return two()

        first = fleet.start(one)
        gate.wait_entered()
        call = {
            "direct": two,
            "eager": lambda: two.apply().get(),
            "nested": lambda: execute(outer)[1],
        }[kind]
        other = fleet.start(call)
        fleet.wait_until_waiting(two)
        gate.opened.set()
        assert other.result(LONG) == first.result(LONG) == "gated"
        assert fleet.sent == []

    def test_retry_without_a_broker(self, fleet, caplog, monkeypatch):
        """Where the message cannot be sent, the call is computed after all."""
        gate = Gate()
        one, two = fleet.task(gate), fleet.task(numbered(7), on_contention="retry")

        def broken(*args, **options):
            raise ConnectionError("no broker")

        monkeypatch.setattr(two, "mlcache_publish", broken)
        first = fleet.start(one)
        gate.wait_entered()
        with caplog.at_level(logging.WARNING, "celery_mlcache"):
            assert execute(two) == ("SUCCESS", 7)
        assert any(
            each.message.startswith("a call could not be sent again, and is computed") for each in caplog.records
        )
        gate.opened.set()
        first.result(LONG)
        assert one() == two() == 7

    @pytest.mark.parametrize("hook", [lambda _: False, lambda _: 1 / 0])
    def test_a_result_that_is_not_cached(self, fleet, hook):
        """Those who waited for it compute on their own, all at once: they do not wait for one another."""
        gate, rest = Gate(), threading.Barrier(3, timeout=LONG)
        one = fleet.task(gate, cache_if=hook)
        others = [fleet.task(lambda _: rest.wait() >= 0, cache_if=hook) for _ in range(3)]
        first = fleet.start(one)
        gate.wait_entered()
        waiting = [fleet.start(task) for task in others]
        for task in others:
            fleet.wait_until_waiting(task)
        gate.opened.set()
        assert first.result(LONG) == "gated"
        assert [each.result(LONG) for each in waiting] == [True] * 3

    def test_the_holder_fails(self, fleet):
        """Its error is its own; of those who waited one computes, and the others get that result."""
        gate, second = Gate(ValueError("mine")), Gate("second")
        one = fleet.task(gate)
        others = [fleet.task(second) for _ in range(3)]
        first = fleet.start(one)
        gate.wait_entered()
        waiting = [fleet.start(task) for task in others]
        for task in others:
            fleet.wait_until_waiting(task)
        gate.opened.set()
        with pytest.raises(ValueError, match="mine"):
            first.result(LONG)
        second.wait_entered()
        second.opened.set()
        assert [each.result(LONG) for each in waiting] == ["second"] * 3
        assert second.runs == 1

    def test_a_negative_result_is_shared(self, fleet):
        """An exception that is cached ends the waiting of the others as a result does."""
        gate = Gate(NotFoundError("a"))
        one = fleet.task(gate, negative={NotFoundError: 30})
        two = fleet.task(forbidden, negative={NotFoundError: 30})
        first = fleet.start(one)
        gate.wait_entered()
        other = fleet.start(two)
        fleet.wait_until_waiting(two)
        gate.opened.set()
        for each in (first, other):
            with pytest.raises(NotFoundError):
                each.result(LONG)
        assert stat(two, "negative_hits") == 1

    @pytest.mark.parametrize("loss", ["deleted", "overwritten"])
    def test_a_lost_lease(self, fleet, redis, loss):
        """Who has lost its lease while it ran stores nothing over what its successor has stored."""
        gate = Gate("late")
        one = fleet.task(gate)
        successor = fleet.task(lambda _: "successor", ttl=0.05)
        first = fleet.start(one)
        gate.wait_entered()
        if loss == "deleted":
            redis.delete(fleet.lease(one))
        else:
            redis.hset(fleet.lease(one), mapping={"until": "1"})
        assert successor() == "successor"
        wait_until(lambda: successor.cache.get() is MISS, LONG, "the successor's result to end")
        gate.opened.set()
        assert first.result(LONG) == "late"
        assert one.cache.get() is MISS
        assert stat(one, "fills_refused") == 1

    def test_a_winner_that_is_an_error(self, fleet):
        """Who has computed a result returns it, though another one's exception was stored first; nothing runs twice."""
        gate = Gate("mine")
        one = fleet.task(gate, negative={NotFoundError: 30})

        def body(_):
            raise NotFoundError("a")

        two = fleet.task(body, negative={NotFoundError: 30}, max_wait=0)
        first = fleet.start(one)
        gate.wait_entered()
        with pytest.raises(NotFoundError):
            two()
        gate.opened.set()
        assert first.result(LONG) == "mine"
        assert gate.runs == 1
        with pytest.raises(NotFoundError):
            one()

    def test_invalidated_meanwhile(self, fleet):
        """A call that began before an invalidation is returned and not stored."""
        gate = Gate("old")
        one, two = fleet.task(gate, tags=["x:{x}"]), fleet.task(numbered(7), tags=["x:{x}"])
        first = fleet.start(one)
        gate.wait_entered()
        two.cache.invalidate_all()
        gate.opened.set()
        assert first.result(LONG) == "old"
        assert two() == 7

    @pytest.mark.parametrize("how", ["close", "release"])
    def test_closed_meanwhile(self, fleet, how):
        """A call under way when its cache is closed is answered."""
        gate = Gate()
        one = fleet.task(gate, early=True, stale_ttl=5)
        first = fleet.start(execute, one)
        gate.wait_entered()
        getattr(one.cache.manager, how)()
        gate.opened.set()
        assert first.result(LONG) == ("SUCCESS", "gated")


class TestReentrancy:
    def test_direct_calls(self, fleet):
        """A calls B calls A, with the same arguments: the inner A runs, for the outer one would never end otherwise."""
        app = fleet.app(single_flight_wait=LONG)
        depth = Counter()

        def body(x):
            depth["a"] += 1
            return b(x) if depth["a"] == 1 else "inner"

        a = fleet.task(body, app=app)

        @cached_task(app=app, name=f"{a.name}.b")
        def b(x):
            return a(x)

        began = time.monotonic()
        assert a(1) == "inner"
        assert time.monotonic() - began < QUICK
        assert depth["a"] == 2
        assert stat(a, "waits") == 0

    def test_over_messages(self, fleet):
        """The lease of a call is named in the messages that it sends, and what they execute does not wait for it."""
        gate = Gate("outer")
        one = fleet.task(lambda x: child.apply_async((x,)) and gate(x))
        two = fleet.task(lambda _: "inner", settings={"single_flight_wait": LONG})

        @one.app.task(name=f"{one.name}.child")
        def child(x):
            return x

        grandchild = two.app.task(name=f"{one.name}.grandchild")(_call(two))
        first = fleet.start(execute, one, 1)
        gate.wait_entered()
        (message,) = fleet.sent
        assert len(message.headers["mlcache_held"]) == 1
        began = time.monotonic()
        assert execute(grandchild, 1, headers=message.headers) == ("SUCCESS", "inner")
        assert time.monotonic() - began < QUICK
        assert stat(two, "waits") == 0
        gate.opened.set()
        assert first.result(LONG)[0] == "SUCCESS"

    def test_ancestors_are_handed_on(self, fleet):
        """A task that holds nothing hands on what its sender holds; one that is not a descendant's carries nothing."""
        plain = fleet.task(forbidden)

        @plain.app.task(name=f"{plain.name}.plain")
        def send():
            plain.app.send_task(plain.name, (1,))

        execute(send, headers={"mlcache_held": [5, "x", 6]})
        execute(send, headers={"mlcache_held": "garbage"})
        execute(send, headers={"mlcache_held": list(range(1, 101))})
        execute(send)
        assert [message.headers.get("mlcache_held") for message in fleet.sent] == [
            [5, 6],
            None,
            list(range(37, 101)),
            None,
        ]

    def test_what_an_interrupt_has_left_behind_is_forgotten(self, fleet, monkeypatch):
        """A message acts under its own lease only, whatever the one before it in this thread did not get to let go."""
        seen = []
        one = fleet.task(lambda _: seen.append(held()))

        def interrupted(*_):
            raise SoftTimeLimitExceeded

        def work():
            with monkeypatch.context() as patch:
                patch.setattr(Lease, "__exit__", interrupted)
                assert execute(one, 1)[0] == "FAILURE"
            assert held() == seen[0]
            execute(one, 2)

        copy_context().run(work)
        assert [len(fences) for fences in seen] == [1, 1]
        assert seen[0] != seen[1]

    def test_held_is_given_back(self, fleet):
        """After the call, messages name nothing."""
        one = fleet.task(numbered())
        one()
        one.apply_async((5,))
        assert "mlcache_held" not in fleet.sent[0].headers


def _call(task):
    def call(x):
        return task(x)

    return call


class TestStale:
    def aged(self, fleet, **options):
        """Return two processes' tasks and a body, one result of which is stale by now."""
        body = numbered()
        options = {"ttl": 60, "stale_ttl": 60, **options}
        one, two = fleet.task(body, **options), fleet.task(forbidden, **options)
        assert one() == 1
        assert one.cache.manager.expire(one.cache.key())
        return one, two, body

    def test_by_time(self, fleet):
        """When its life ends a result is stale, and gone when the stale time is over."""
        one = fleet.task(numbered(), ttl=0.05, stale_ttl=1.5)
        assert one() == 1
        wait_until(lambda: one.cache.get() is MISS, LONG, "the end of its life", pause=0.001)
        assert one() == 1
        assert one.cache.explain().level in {"stale", None}
        wait_until(lambda: one.cache.explain().level is None, LONG, "the end of the stale time")
        assert one() == 2

    def test_served_at_once_and_refreshed_once(self, fleet, told):
        """Whoever asks gets it, marked as stale; one message goes out in the whole fleet, and its task replaces it."""
        one, two, body = self.aged(fleet)
        futures = [fleet.start(call) for _ in range(8) for call in (two, lambda: execute(two)[1])]
        assert {each.result(LONG) for each in futures} == {1}
        (message,) = fleet.sent
        assert (tuple(message.args), message.headers["mlcache_mode"], message.headers["ignore_result"]) == (
            (),
            "refresh",
            True,
        )
        assert stat(two, "refreshes_sent") == 1
        assert stat(two, "stale_served") == 16
        stale = [what for name, what in told if name == "cache_stale"]
        assert len(stale) == 16
        assert all(what["error"] is None and what["age"] >= 0 and what["key"] == two.cache.key() for what in stale)
        assert "cache_hit" not in [name for name, _ in told]
        explained = two.cache.explain()
        assert (explained.is_hit, explained.level) == (True, "stale")
        assert "served while one task computes it anew" in explained.why

        assert deliver(message, one) == ("SUCCESS", 2)
        assert [two(), two()] == [2, 2]
        assert len(fleet.sent) == 1
        assert body.runs["all"] == 2

    def test_the_request_says_so(self, fleet):
        """``request.mlcache`` of a stale answer is "stale"."""
        _, two, _ = self.aged(fleet)
        levels = []

        def postrun(sender, task, **_):
            levels.append(task.request.mlcache)

        celery_signals.task_postrun.connect(postrun, sender=two, weak=False)
        assert execute(two) == ("SUCCESS", 1)
        celery_signals.task_postrun.disconnect(postrun, sender=two)
        assert levels == ["stale"]

    def test_a_late_duplicate(self, fleet):
        """A refresh that comes when somebody else has done it is skipped, and returns what there is."""
        one, two, body = self.aged(fleet)
        two()
        (message,) = fleet.sent
        assert deliver(message, one) == ("SUCCESS", 2)
        assert deliver(message, one) == ("SUCCESS", 2)
        assert body.runs["all"] == 2
        assert stat(one, "refreshes_skipped") == 1

    def test_a_refresh_while_one_runs(self, fleet):
        """A second refresh does not wait for the first one, and does nothing."""
        one, two, _ = self.aged(fleet)
        two()
        (message,) = fleet.sent
        gate = Gate("new")
        holder = fleet.task(gate, ttl=60, stale_ttl=60)
        first = fleet.start(deliver, message, holder)
        gate.wait_entered()
        assert deliver(message, one) == ("SUCCESS", None)
        assert stat(one, "refreshes_skipped") == 1
        gate.opened.set()
        assert first.result(LONG) == ("SUCCESS", "new")
        assert two() == "new"

    @pytest.mark.parametrize("since", ["yesterday", None, [1]])
    def test_a_garbled_header(self, fleet, since):
        """A refresh whose header cannot be understood refreshes."""
        one, _, _ = self.aged(fleet)
        headers = {"mlcache_mode": "refresh", "mlcache_since": since}
        assert execute(one, headers=headers) == ("SUCCESS", 2)

    def test_a_refresh_that_fails(self, fleet, redis):
        """The stale result stays, and it is tried again a few seconds later, not by the next reader at once."""
        one, two, _ = self.aged(fleet)
        two()
        (message,) = fleet.sent
        failing = fleet.task(lambda _: 1 / 0, ttl=60, stale_ttl=60)
        assert deliver(message, failing)[0] == "FAILURE"
        assert two() == 1
        assert len(fleet.sent) == 1
        assert 0 < redis.pttl(fleet.mark(one)) <= 1000 * refreshing.FAILED
        redis.delete(fleet.mark(one))
        assert two() == 1
        assert len(fleet.sent) == 2
        assert deliver(fleet.sent[1], one) == ("SUCCESS", 2)

    @pytest.mark.parametrize("was", ["stale", "fresh"])
    @pytest.mark.parametrize("forgive", [True, NotFoundError, False])
    def test_a_refresh_that_fails_with_what_would_be_cached(self, fleet, monkeypatch, was, forgive):
        """A good result that is still there stays; only where no error is forgiven does the error take its place."""
        options = {
            "ttl": 60,
            "stale_ttl": 60,
            "early": True,
            "negative": {NotFoundError: 30},
            "stale_if_error": forgive,
        }
        monkeypatch.setattr(refreshing.Refreshing, "is_early", lambda self, record: was == "fresh")
        one, two = fleet.task(numbered(), **options), fleet.task(forbidden, **options)
        assert one() == 1
        if was == "stale":
            one.cache.manager.expire(one.cache.key())
        assert two() == 1
        (message,) = fleet.sent
        monkeypatch.setattr(refreshing.Refreshing, "is_early", lambda self, record: False)

        def body(_):
            raise NotFoundError("a")

        failing = fleet.task(body, **options)
        assert deliver(message, failing)[0] == "FAILURE"
        if forgive:
            assert two() == 1
        else:
            with pytest.raises(NotFoundError):
                two()

    def test_arguments_that_cannot_be_sent(self, fleet):
        """After one try the call is computed where it is made, and others are served stale results as ever."""
        one = fleet.task(numbered(), ttl=60, stale_ttl=60)
        assert [one({1, 2}), one(5)] == [1, 2]
        for arg in ({1, 2}, 5):
            one.cache.manager.expire(one.cache.key(arg))
        assert one({1, 2}) == 1
        assert (stat(one, "refreshes_failed"), stat(one, "refreshes_sent")) == (1, 0)
        assert [one({1, 2}), one({1, 2}), one(5)] == [3, 3, 2]
        assert (stat(one, "refreshes_failed"), stat(one, "refreshes_sent")) == (1, 1)

    def test_the_mark_is_short_until_the_message_is_sent(self, fleet, redis, monkeypatch):
        """A process that dies while it sends a refresh holds others up for seconds; a sent message, for longer."""
        gate = Gate()
        _, two, _ = self.aged(fleet)
        monkeypatch.setattr(two, "mlcache_publish", lambda *_, **__: gate())
        assert two() == 1
        gate.wait_entered()
        assert 0 < redis.pttl(fleet.mark(two)) <= 1000 * refreshing.MARK_SENDING
        gate.opened.set()
        assert stat(two, "refreshes_sent") == 1
        assert 1000 * refreshing.MARK_SENDING < redis.pttl(fleet.mark(two)) <= 1000 * refreshing.MARK_LIFE

    def test_a_worker_that_is_faster_than_the_sender_takes_the_mark_away_for_good(self, fleet, redis, monkeypatch):
        """A refresh that is over before its sender has noted that it was sent holds nobody up."""
        one, two, _ = self.aged(fleet)
        publish = two.mlcache_publish

        def publish_and_execute(*args, **options):
            result = publish(*args, **options)
            assert deliver(fleet._sent[-1], one)[0] == "SUCCESS"
            return result

        monkeypatch.setattr(two, "mlcache_publish", publish_and_execute)
        assert two() == 1
        assert stat(two, "refreshes_sent") == 1
        assert not redis.exists(fleet.mark(two))

    def test_queue_and_priority(self, fleet):
        """They reach the message; refresh_async() takes them too."""
        _, two, _ = self.aged(fleet, refresh_queue="slow", refresh_priority=3)
        two()
        assert len(fleet.sent) == 1
        two.cache.refresh_async()
        assert [(message.routing_key, message.priority) for message in fleet.sent] == [("slow", 3)] * 2
        assert "mlcache_since" not in fleet.sent[1].headers

    def test_a_broker_that_fails(self, fleet, monkeypatch, caplog, told):
        """The stale result is served all the same, it is counted and told, and the next reader tries again."""
        monkeypatch.setattr(refreshing, "NO_BROKER", 0.0)
        _, two, _ = self.aged(fleet)
        publish = two.mlcache_publish

        def broken(*args, **options):
            raise ConnectionError("no broker")

        monkeypatch.setattr(two, "mlcache_publish", broken)
        with caplog.at_level(logging.WARNING, "celery_mlcache"):
            assert [two(), two()] == [1, 1]
        assert stat(two, "refreshes_failed") == 2
        assert [(what["what"], type(what["error"])) for name, what in told if name == "cache_error"] == [
            ("refresh", ConnectionError)
        ] * 2
        assert sum(each.message.startswith("a refresh could not be sent") for each in caplog.records) == 1
        monkeypatch.setattr(two, "mlcache_publish", publish)
        assert two() == 1
        assert (len(fleet.sent), stat(two, "refreshes_sent")) == (1, 1)

    def test_a_broker_that_is_away_is_left_alone_for_a_while(self, fleet, monkeypatch):
        """After one refresh could not be sent, the next few seconds' are not tried; others in the fleet may."""
        _, two, _ = self.aged(fleet)
        tries = []

        def broken(*args, **options):
            tries.append(args)
            raise OSError("no broker")

        monkeypatch.setattr(two, "mlcache_publish", broken)
        for _ in range(3):
            assert two() == 1
            stat(two, "loads")
        assert (len(tries), stat(two, "refreshes_failed")) == (1, 3)

    def test_a_reader_waits_for_no_broker(self, fleet, monkeypatch):
        """Stale results are served while the message is on its way, however long the broker takes."""
        gate = Gate()
        _, two, _ = self.aged(fleet)
        monkeypatch.setattr(two, "mlcache_publish", lambda *_, **__: gate())
        assert two() == 1
        gate.wait_entered()
        assert two() == 1
        gate.opened.set()
        assert (stat(two, "refreshes_sent"), gate.runs) == (1, 1)

    def test_a_process_asks_once_a_second(self, fleet, monkeypatch):
        """Readers of a hot key that is stale do not ask L2 for the mark each time."""
        monkeypatch.setattr(refreshing, "ASK_AGAIN", LONG)
        _, two, _ = self.aged(fleet)
        manager, asked = two.cache.manager, []
        monkeypatch.setattr(manager, "mark", lambda *args, **_: asked.append(args))
        assert [two() for _ in range(5)] == [1] * 5
        assert len(fleet.sent) == 0
        assert len(asked) == 1

    def test_eager(self, fleet):
        """In eager mode the refresh runs at once, and what it raises does not reach the reader."""
        one, _, body = self.aged(fleet)
        one.app.conf.task_always_eager = True
        assert one.apply().get() == 1
        assert body.runs["all"] == 2
        assert one() == 2

    @pytest.mark.parametrize("way", ["expire", "tag"])
    def test_soft_invalidation(self, fleet, way):
        """A soft invalidation makes a result stale, a hard one removes it."""
        options = {"ttl": 60, "stale_ttl": 60, "tags": ["x:{x}"]}
        one, two = fleet.task(numbered(), **options), fleet.task(forbidden, **options)
        assert one() == 1
        manager = two.cache.manager
        assert manager.expire(two.cache.key()) if way == "expire" else manager.expire_tags("x:1")
        assert [two(), two.cache.get()] == [1, MISS]
        assert deliver(fleet.sent[0], one) == ("SUCCESS", 2)
        assert two() == 2
        manager.expire(two.cache.key())
        assert manager.invalidate_tags("x:1")
        assert one() == 3

    def test_only(self, fleet):
        """A stale result is not what "only" wants."""
        _, two, _ = self.aged(fleet)
        with pytest.raises(NotCachedError):
            two.apply(mlcache="only").get()

    @pytest.mark.parametrize(
        ("forgive", "is_forgiven"),
        [(True, True), (False, False), (ArithmeticError, True), (KeyError, False), ((KeyError, ArithmeticError), True)],
    )
    def test_if_error(self, fleet, told, forgive, is_forgiven):
        """Where the function fails, a stale result stands in for what was named, and is marked as such."""
        one, _, _ = self.aged(fleet, on_contention="stale", stale_if_error=forgive)
        failing = fleet.task(lambda _: 1 / 0, ttl=60, stale_ttl=60, on_contention="stale", stale_if_error=forgive)
        del told[:]
        explained = failing.cache.explain()
        assert (explained.is_hit, explained.level) == (False, "stale")
        assert explained.why.endswith("served only where another one computes it, or where that fails")
        if not is_forgiven:
            with pytest.raises(ZeroDivisionError):
                failing()
            return
        assert execute(failing) == ("SUCCESS", 1)
        ((name, what),) = told
        assert (name, type(what["error"])) == ("cache_stale", ZeroDivisionError)
        assert stat(failing, "stale_served") == 1
        assert fleet.sent == []
        assert one() == 2

    def test_on_contention(self, fleet):
        """With "stale" one computes, and the others take the stale result meanwhile, without messages."""
        _, _, _ = self.aged(fleet, on_contention="stale")
        gate = Gate("new")
        holder = fleet.task(gate, ttl=60, stale_ttl=60, on_contention="stale")
        reader = fleet.task(forbidden, ttl=60, stale_ttl=60, on_contention="stale")
        first = fleet.start(holder)
        gate.wait_entered()
        assert [reader(), holder()] == [1, 1]
        assert stat(reader, "stale_served") == stat(holder, "stale_served") == 1
        gate.opened.set()
        assert first.result(LONG) == reader() == "new"

    def test_stale_ok(self, fleet):
        """With the mode "stale-ok" a stale result is taken where the option would compute."""
        one, two, _ = self.aged(fleet, on_contention="stale")
        assert two.apply(mlcache="stale-ok").get() == 1
        assert len(fleet.sent) == 1
        assert one() == 2

    def test_without_anything_stale(self, fleet):
        """With "stale" and nothing stale a caller waits."""
        gate = Gate("new")
        options = {"stale_ttl": 60, "on_contention": "stale"}
        holder, reader = fleet.task(gate, **options), fleet.task(forbidden, **options)
        first = fleet.start(holder)
        gate.wait_entered()
        other = fleet.start(reader)
        fleet.wait_until_waiting(reader)
        gate.opened.set()
        assert first.result(LONG) == other.result(LONG) == "new"

    def test_errors_are_never_stale(self, fleet):
        """An exception that was cached is computed anew when its life ends."""
        left = iter([NotFoundError("a")])

        def body(_):
            for error in left:
                raise error
            return "fine"

        one = fleet.task(body, negative={NotFoundError: 60}, stale_ttl=60)
        with pytest.raises(NotFoundError):
            one()
        one.cache.manager.expire(one.cache.key())
        assert one() == "fine"


class TestEarly:
    def test_one_refresh(self, fleet, told, monkeypatch):
        """Lots fall for one refresh in the fleet; who draws it is served what is fresh."""
        monkeypatch.setattr("celery_mlcache.fleet.refreshing.Refreshing.is_early", lambda self, record: True)
        body = numbered()
        one, two = fleet.task(body, early=True), fleet.task(forbidden, early=True)
        assert one() == 1
        del told[:]
        assert {fleet.start(two).result(LONG) for _ in range(8)} == {1}
        (message,) = fleet.sent
        assert {name for name, _ in told} == {"cache_hit"}
        assert stat(two, "stale_served") == 0
        assert deliver(message, one) == ("SUCCESS", 2)
        assert two() == 2

    def test_off(self, fleet, monkeypatch):
        """Without the option nobody refreshes."""
        monkeypatch.setattr("celery_mlcache.fleet.refreshing.Refreshing.is_early", lambda self, record: True)
        one = fleet.task(numbered())
        assert [one(), one()] == [1, 1]
        assert fleet.sent == []


class TestModes:
    def test_refresh_in_two_processes(self, fleet):
        """A refresh replaces what is cached for all; while it runs, those who find something take that."""
        gate = Gate("new")
        one, two = fleet.task(numbered()), fleet.task(gate)
        assert one() == 1
        refreshing = fleet.start(two.apply, mlcache="refresh")
        gate.wait_entered()
        assert one() == 1
        gate.opened.set()
        assert refreshing.result(LONG).get() == "new"
        assert one() == "new"

    def test_misses_wait_for_a_refresh(self, fleet):
        """Who misses while a refresh runs gets its result."""
        gate = Gate("new")
        one, two = fleet.task(forbidden), fleet.task(gate)
        refreshing = fleet.start(two.cache.refresh)
        gate.wait_entered()
        other = fleet.start(one)
        fleet.wait_until_waiting(one)
        gate.opened.set()
        assert refreshing.result(LONG) == other.result(LONG) == "new"

    def test_a_message_with_a_mode(self, fleet):
        """A mode travels as a header and does what it says in the worker; a retry carries it on."""
        one = fleet.task(numbered())
        assert one() == 1
        one.apply_async(mlcache="refresh", headers={"mine": 1})
        (message,) = fleet.sent
        assert (message.headers["mlcache_mode"], message.headers["mine"]) == ("refresh", 1)
        assert deliver(message, one) == ("SUCCESS", 2)

    @pytest.mark.parametrize("mode", ["refresh", "use", "bogus", 5, None])
    @pytest.mark.parametrize("way", ["send_task", "signature", "set"])
    def test_a_call_by_name(self, fleet, caplog, monkeypatch, mode, way):
        """Where the task is not registered the option is a header all the same, and a wrong one is told of, once."""
        monkeypatch.setattr(modes, "_told", set())
        one, name = fleet.task(numbered()), fleet.task_name
        assert one() == 1
        app = fleet.app()
        assert name not in app.tasks
        for _ in range(2):
            if way == "send_task":
                app.send_task(name, mlcache=mode)
            elif way == "signature":
                app.signature(name, mlcache=mode).apply_async()
            else:
                app.signature(name).set(mlcache=mode).apply_async()
        (message, _) = fleet.sent
        is_known = mode in modes.MODES
        assert message.headers.get("mlcache_mode") == (mode if is_known else None)
        assert "mlcache" not in message.headers
        assert deliver(message, one) == ("SUCCESS", 2 if mode == "refresh" else 1)
        warned = [record.getMessage() for record in caplog.records if "unknown mode" in record.getMessage()]
        assert len(warned) == (not is_known and mode is not None)
        assert all(f"one of use, refresh, bypass, only, stale-ok, not {mode!r}" in text for text in warned)

    def test_a_call_by_name_with_headers(self, fleet):
        """Headers stay as they are; of two ways to say it, the header was meant for the message."""
        app = fleet.app()
        app.send_task("t", headers={"mlcache_mode": "only", "mine": 1}, mlcache="refresh")
        app.send_task("t", stamped_headers=["mlcache"], mlcache="a stamp of somebody else's")
        meant, foreign = fleet.sent
        assert (meant.headers["mlcache_mode"], meant.headers["mine"]) == ("only", 1)
        assert "mlcache_mode" not in foreign.headers
        assert foreign.headers["stamps"] == {"mlcache": "a stamp of somebody else's"}

    def test_an_unknown_mode_in_a_message(self, fleet, caplog, monkeypatch):
        """The worker takes it for "use", and says so once."""
        monkeypatch.setattr(modes, "_told", set())
        one = fleet.task(numbered())
        assert [execute(one, headers={"mlcache_mode": "olny"}) for _ in range(3)] == [("SUCCESS", 1)] * 3
        (warned,) = [record.getMessage() for record in caplog.records if "mode" in record.getMessage()]
        assert warned == (
            "an unknown mode was taken for 'use': mlcache must be one of use, refresh, bypass, only, stale-ok, "
            "not 'olny'"
        )

    def test_a_header_of_the_users_that_is_named_like_ours(self, fleet, redis):
        """With a header "mlcache" that means something else a message is a message: it has its mode, and can retry."""
        one = fleet.task(numbered(), on_contention="retry")
        assert one(1) == 1
        assert execute(one, 1, headers={"mlcache": "mine", "mlcache_mode": "refresh"}) == ("SUCCESS", 2)
        soon = int(time.time() * 1000) + 5000
        redis.hset(fleet.lease(one, 2), mapping={"fence": 1000 * soon, "until": soon, "waiters": 0, "owner": "else"})
        assert execute(one, 2, headers={"mlcache": "mine"})[0] == "RETRY"

    def test_a_stamp_that_is_named_like_the_option(self, fleet):
        """A stamp "mlcache" is a mode, where the headers do not get."""
        one = fleet.task(numbered())
        assert one() == 1
        stamped = one.s()
        stamped.stamp(mlcache="refresh")
        stamped.apply_async()
        (message,) = fleet.sent
        message.headers.pop("mlcache_mode", None)
        assert deliver(message, one) == ("SUCCESS", 2)

    def test_a_retry_in_a_worker_keeps_the_mode(self, fleet):
        """``self.retry()`` sends it along."""
        app = fleet.app()

        @cached_task(app=app, bind=True, name=fleet.task_name)
        def task(self):
            raise self.retry(countdown=0)

        assert execute(task, headers={"mlcache_mode": "refresh"})[0] == "RETRY"
        assert (fleet.sent[0].headers["mlcache_mode"], fleet.sent[0].headers["retries"]) == ("refresh", 1)


class TestWarm:
    def test_batches(self, fleet):
        """Each batch is one round trip, and a message for each call that is not cached."""
        one = fleet.task(lambda x: x)
        for x in range(0, 20, 2):
            one(x)
        reads = []
        remote = one.cache.manager._parts.remote
        read = remote.read
        remote.read = lambda keys, **options: reads.append(len(keys)) or read(keys, **options)
        assert one.cache.warm([(x,) for x in range(20)] * 2, batch=8) == 20
        remote.read = read
        assert reads == [8, 8, 8, 8, 8]
        assert sorted(message.args[0] for message in fleet.sent) == sorted([*range(1, 20, 2)] * 2)
        assert all(message.headers["ignore_result"] for message in fleet.sent)
        for message in fleet.sent:
            deliver(message, one)
        assert one.cache.warm([(x,) for x in range(20)]) == 0

    def test_what_is_not_known_is_sent(self, fleet):
        """Without L2 nothing is known to be cached."""
        one = fleet.task(lambda x: x, settings={"redis_url": f"redis://{HOST}:{free_port()}/0"})
        assert one.cache.warm([(1,), (2,)]) == 2


class TestTrouble:
    @pytest.fixture
    def dead(self, fleet):
        """Settings of a process whose Redis is not there."""
        return {"redis_url": f"redis://{HOST}:{free_port()}/0"}

    def test_dead(self, fleet, dead, told, caplog):
        """Calls run, nothing is raised, and it costs little; explain() says what is the matter."""
        body = numbered()
        one = fleet.task(body, settings=dead, stale_ttl=60, early=True, on_contention="retry")
        began = time.monotonic()
        with caplog.at_level(logging.WARNING):
            assert [one() for _ in range(20)] == list(range(1, 21))
            assert execute(one)[0] == "SUCCESS"
        assert time.monotonic() - began < QUICK
        assert [what["what"] for name, what in told if name == "cache_error"] == ["l2"] * 21
        assert [what["is_cached"] for name, what in told if name == "cache_miss"] == [False] * 21
        explained = one.cache.explain()
        assert (explained.is_hit, explained.why) == (False, "L2 does not answer")
        assert one.cache.get() is MISS
        assert [one.cache.set("v"), one.cache.invalidate(), one.cache.invalidate_all()] == [False, False, False]
        with pytest.raises(NotCachedError):
            one.apply(mlcache="only").get()
        assert one.cache.refresh() == 22
        assert len(caplog.records) < 10

    def test_strict(self, fleet, dead):
        """With ``strict`` the caller is told."""
        one = fleet.task(numbered(), settings={**dead, "strict": True})
        for call in (one, one.cache.refresh, one.cache.get, one.cache.explain, one.cache.invalidate_all):
            with pytest.raises(RemoteStoreError):
                call()

    def test_frozen(self, redis_server, namespace):
        """A server that froze holds calls up for a moment each until the breaker opens; then they run at once."""
        with ExitStack() as stack:
            fleet = Fleet(redis_server.url, namespace, stack)
            body = numbered()
            one = fleet.task(body, stale_ttl=60, settings={"circuit_reset": LONG})
            assert [one(), one()] == [1, 1]
            redis_server.freeze()
            stack.callback(redis_server.thaw)
            began = time.monotonic()
            assert [one() for _ in range(20)] == list(range(2, 22))
            assert time.monotonic() - began < 10 * QUICK
            began = time.monotonic()
            assert [one() for _ in range(20)] == list(range(22, 42))
            assert time.monotonic() - began < QUICK

    def test_frozen_while_one_waits(self, redis_server, namespace):
        """Who waits for another's result on a server that freezes computes soon after."""
        with ExitStack() as stack:
            fleet = Fleet(redis_server.url, namespace, stack)
            gate = Gate()
            one, two = fleet.task(gate), fleet.task(numbered(7), settings={"single_flight_wait": LONG})
            first = fleet.start(one)
            gate.wait_entered()
            other = fleet.start(two)
            fleet.wait_until_waiting(two)
            redis_server.freeze()
            assert other.result(10) == 7
            redis_server.thaw()
            gate.opened.set()
            assert first.result(LONG) in {"gated", 7}

    def test_what_is_served_for_want_of_better_is_stale(self, redis_server, namespace, told):
        """With ``on_disconnect="serve"`` an answer of L1 without a lease is told as stale, and not as a hit."""
        with ExitStack() as stack:
            fleet = Fleet(redis_server.url, namespace, stack)
            settings = {"l1_enabled": True, "on_disconnect": "serve", "max_stale": LONG, "staleness_bound": 1.0}
            one, levels = fleet.task(numbered(), settings=settings), []
            assert one() == 1
            wait_until(lambda: one() == 1 and told[-1][1].get("level") == "l1", LONG, "a hit in L1")
            redis_server.kill()
            wait_until(lambda: one.cache.manager.stats()["lease"] != "held", LONG, "the end of the lease")
            del told[:]

            def postrun(sender, task, **_):
                levels.append(task.request.mlcache)

            celery_signals.task_postrun.connect(postrun, sender=one, weak=False)
            assert execute(one) == ("SUCCESS", 1)
            celery_signals.task_postrun.disconnect(postrun, sender=one)
            assert ([name for name, _ in told], levels) == (["cache_stale"], ["stale"])
            assert one.apply(mlcache="only").get() == 1
            assert [name for name, _ in told] == ["cache_stale"] * 2

    def test_the_mark_of_a_lost_refresh_ends(self, fleet, redis):
        """A message that was lost is sent again when its mark has ended, and no later."""
        options = {"ttl": 60, "stale_ttl": 60}
        one = fleet.task(numbered(), **options)
        one()
        one.cache.manager.expire(one.cache.key())
        assert [one(), one()] == [1, 1]
        assert len(fleet.sent) == 1
        assert 0 < redis.pttl(fleet.mark(one)) <= 60_000
        redis.delete(fleet.mark(one))
        assert one() == 1
        assert len(fleet.sent) == 2

    def test_what_is_stored(self, fleet):
        """A record says what was computed, how long it took, when, for how long and by whom."""
        one = fleet.task(lambda x: [x], ttl=40)
        before = time.time()
        execute(one)
        record = unpack(one.cache.manager.get(one.cache.key()))
        assert (record.value, record.life, record.is_error) == ([1], 40.0, False)
        assert before <= record.made_at <= time.time()
        assert 0 <= record.seconds < QUICK
        task_id, _, host = record.maker.partition("@")
        assert (len(task_id), host) == (32, "w1@here")
