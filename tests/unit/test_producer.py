"""Calls that are answered where they are made, or share one that is under way; without a worker."""

from __future__ import annotations

import os
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
from celery import Celery, group, signals, states
from celery.app.trace import build_tracer
from celery.exceptions import SoftTimeLimitExceeded

from celery_mlcache import CachedTask, cached_task, setup_cache
from celery_mlcache.fleet import lifecycle, modes
from celery_mlcache.fleet import signals as our_signals
from celery_mlcache.fleet.app import fleet_of
from celery_mlcache.fleet.producer import PAUSE, QUEUED
from celery_mlcache.fleet.serving import started_name
from celery_mlcache.keys import MAX_KEY_BYTES
from celery_mlcache.leases import Leases
from tests.support.waiting import wait_until

BUDGET = 0.05  # seconds
FAST = 1.0  # seconds, on a slow machine
SLOW = 30.0  # seconds: what the socket would wait


def make_app(**settings):
    """Return an app whose broker and results are in this process."""
    app = Celery(f"p{uuid.uuid4().hex[:8]}", broker="memory://", backend="cache+memory://", set_as_current=False)
    setup_cache(app, **settings)
    return app


@pytest.fixture
def app():
    """An app with a cache in memory."""
    app = make_app(l2_enabled=False)
    yield app
    app.mlcache.close()
    app.close()


@pytest.fixture
def shared(shared_redis, namespace):
    """An app with L2 only: every process sees the same."""
    app = make_app(redis_url=shared_redis.url, cache_namespace=namespace, l1_enabled=False, producer_budget=5.0)
    yield app
    app.mlcache.close()
    app.close()


@pytest.fixture
def sent():
    """The ids of all that is sent."""
    found = []

    def on_publish(headers=None, **_):
        found.append(headers["id"])

    signals.before_task_publish.connect(on_publish)
    yield found
    signals.before_task_publish.disconnect(on_publish)


@pytest.fixture
def runs():
    """Count executions by name."""
    return Counter()


class OopsError(Exception):
    """A user's error."""


def make_double(app, runs, **options):
    """Return a cached task."""

    @cached_task(app=app, shared=False, **options)
    def double(x):
        runs["double"] += 1
        if x < 0:
            raise OopsError(x)
        return x * 2

    return double


@pytest.fixture
def double(app, runs, sent):
    """A task that is answered where it is called; the double of 1 is cached."""
    double = make_double(app, runs, producer=True, negative={OopsError: 60})
    assert double(1) == 2
    with suppress(OopsError):
        double(-1)
    runs.clear()
    return double


def execute(task, result, *args, **headers):
    """Do with a message what a worker does."""
    request = {"id": result.id, "args": args, "kwargs": {}, "retries": 0, "headers": headers, **headers}
    return build_tracer(task.name, task, app=task.app)(result.id, args, {}, request)


# ---- answers ------------------------------------------------------------------------------------------------------


def test_a_hit_is_answered_without_a_message(app, double, sent, runs):
    """The result of a call whose answer is cached is there at once, under an id of its own, for everybody."""
    first, second = double.delay(1), double.apply_async(kwargs={"x": 1}, task_id="mine")
    assert [first.get(), second.get(), app.AsyncResult("mine").get()] == [2, 2, 2]
    assert first.id != second.id
    assert [sent, runs["double"], app.mlcache.stats()["producer_hits"]] == [[], 0, 2]


def test_a_group_of_hits_is_answered_without_a_message(double, sent):
    """Whatever ids canvas has frozen are those under which the answers are found."""
    result = group(double.s(1), group(double.s(1), double.si(1)))()
    assert [result.get(), sent] == [[2, 2, 2], []]


def test_a_hit_is_told(app, double):
    """``cache_hit`` is sent with the level "producer", and the time that was saved is counted."""
    told = []

    def on_hit(level, **_):
        told.append(level)

    our_signals.cache_hit.connect(on_hit)
    double.delay(1)
    assert told == ["producer"]
    assert app.mlcache.stats()["seconds_saved"] > 0


SENT_ALL_THE_SAME = {
    "countdown": {"countdown": 0.1},
    "eta": {"eta": datetime.now(UTC) + timedelta(seconds=1)},
    "link": {"link": [{"task": "other", "args": (), "kwargs": {}, "options": {}}]},
    "link_error": {"link_error": [{"task": "other", "args": (), "kwargs": {}, "options": {}}]},
    "chain": {"chain": [{"task": "other", "args": (), "kwargs": {}, "options": {}}]},
    "chord": {"chord": {"task": "other", "args": (), "kwargs": {}, "options": {}}},
    "retries": {"retries": 1},
    **{mode: {"mlcache": mode} for mode in modes.MODES if mode != "use"},
    "header": {"headers": {modes.HEADER: "refresh"}},
    "stamp": {modes.HEADER: ["refresh"], "stamped_headers": [modes.HEADER]},
}


@pytest.mark.parametrize("what", SENT_ALL_THE_SAME)
def test_what_says_more_than_a_plain_call_is_sent(double, sent, what):
    """Calls for later, with callbacks, of a chord or chain, retries, and those with a mode go to a worker."""
    assert double.apply_async((1,), **SENT_ALL_THE_SAME[what]).id in sent


def test_a_call_that_wants_the_cache_is_answered(double, sent):
    """The mode "use" says no more than none."""
    double.apply_async((1,), mlcache="use")
    assert sent == []


def test_a_block_with_a_mode_is_sent(double, sent):
    """The mode of the block around a call counts."""
    with double.cache.using("bypass"):
        double.delay(1)
    assert len(sent) == 1


@pytest.mark.parametrize("x", [2, -1], ids=["uncached", "exception"])
def test_what_is_no_result_is_sent(app, double, sent, x):
    """What is not cached is computed, and a cached exception is raised, by a worker."""
    assert double.delay(x).state == "PENDING"
    assert len(sent) == 1
    assert app.mlcache.stats()["producer_misses"] == 1


def test_a_task_that_does_not_ask_is_sent(app, runs, sent):
    """Without ``producer``, a hit is a worker's business."""
    double = make_double(app, runs)
    double(1)
    double.delay(1)
    assert len(sent) == 1


def test_what_beat_sends_is_sent(double, sent, monkeypatch):
    """A periodic task that was never sent would never refresh anything."""
    monkeypatch.setattr(lifecycle, "_beat_pid", os.getpid())
    double.delay(1)
    assert len(sent) == 1


def test_an_eager_call_is_eager(app, double, sent):
    """``task_always_eager`` means a result that Celery made here."""
    app.conf.task_always_eager = True
    result = double.delay(1)
    assert [type(result).__name__, result.get(), sent] == ["EagerResult", 2, []]


@pytest.mark.parametrize(
    ("args", "kwargs", "error"),
    [((), {}, TypeError), ((1, 2), {}, TypeError), ("1", {}, TypeError), ((1,), [("y", 1)], TypeError)],
    ids=["too-few", "too-many", "a-text", "pairs"],
)
def test_wrong_arguments_are_celerys_business(double, sent, args, kwargs, error):
    """Arguments that do not fit raise at the call, as they do for every task."""
    with pytest.raises(error):
        double.apply_async(args, kwargs)


def test_a_call_without_a_key_is_sent(double, sent):
    """What cannot be told apart from other calls is sent, if the broker takes it."""
    double.apply_async((object(),), serializer="pickle")
    assert len(sent) == 1


def test_an_ignored_result_is_not_stored(app, double, sent):
    """``ignore_result`` holds for an answer too."""
    result = double.apply_async((1,), ignore_result=True)
    assert [result.ignored, result.get(), sent] == [True, None, []]
    assert app.backend.get(app.backend.get_key_for_task(result.id)) is None


def test_a_result_backend_that_fails_costs_an_answer_only(app, double, sent, monkeypatch):
    """Where the result cannot be stored here, the message is sent."""

    def fail(*args, **kwargs):
        raise OSError

    monkeypatch.setattr(app.backend, "mark_as_done", fail)
    told = []

    def on_error(what, error, **_):
        told.append((what, type(error)))

    our_signals.cache_error.connect(on_error)
    assert double.delay(1).id in sent
    assert told == [("producer", OSError)]
    assert app.mlcache.stats()["producer_hits"] == 0


def test_what_interrupts_passes(app, double, sent, monkeypatch):
    """A soft time limit that is met here ends the task that calls, and not the attempt."""

    def interrupt(*args, **kwargs):
        raise SoftTimeLimitExceeded

    monkeypatch.setattr(app.backend, "mark_as_done", interrupt)
    with pytest.raises(SoftTimeLimitExceeded):
        double.delay(1)
    assert sent == []


def test_a_closed_cache_is_no_obstacle(app, double, sent):
    """Once its cache is closed a process can still send tasks."""
    app.mlcache.close()
    assert double.delay(1).id in sent


def test_the_answer_knows_its_value(app, double, monkeypatch):
    """Whoever has called need not ask the backend again, gets what it would get from there, and hears of it at once."""
    double(1)
    answer, heard = double.delay(1), []
    for name in ("get_task_meta", "add_pending_result"):
        monkeypatch.setattr(app.backend, name, None)
    answer.on_ready.then(heard.append)
    assert (answer.get(), answer.state, heard) == (2, states.SUCCESS, [answer])
    assert double.cache.level_of(answer) == "producer"


def test_an_early_refresh_is_sent(shared, runs, sent):
    """A hit whose time is nearly over sends one task that refreshes it."""
    double = make_double(shared, runs, producer=True, early=100, ttl=60)
    double(1)
    record_life(double, seconds=1e6)
    answers = [double.delay(1) for _ in range(3)]
    assert [answer.get() for answer in answers] == [2, 2, 2]
    assert fleet_of(shared).errands.join(10)
    assert len(sent) == 1
    assert sent[0] not in {answer.id for answer in answers}


def record_life(task, seconds):
    """Have the cached result of 1 look as if it had taken so many seconds."""
    serving = task.cache.serving
    bound = task.__class__._mlcache_shape.bind((1,), {})
    _, loaded = serving.keep(2, seconds, bound, serving.tags_of(bound))
    assert serving.manager.set(serving.keys.name(bound), loaded.value, loaded.life, tags=loaded.tags)


# ---- the budget ---------------------------------------------------------------------------------------------------


@pytest.fixture
def hasty(redis_server, namespace):
    """An app with a server of its own, little patience at calls, and very much else."""
    app = make_app(
        redis_url=redis_server.url,
        cache_namespace=namespace,
        l1_enabled=False,
        redis_socket_timeout=SLOW,
        producer_budget=BUDGET,
    )
    yield app
    app.mlcache.close()
    app.close()


@pytest.mark.parametrize("option", ["producer", "coalesce"])
@pytest.mark.parametrize("fault", ["freeze", "kill"])
def test_a_redis_that_does_not_answer_costs_the_budget_once(hasty, redis_server, sent, fault, option):
    """A call waits for as long as the budget, the calls after it for nothing; all of them are sent."""
    double = make_double(hasty, Counter(), **{option: True})
    assert double(1) == 2
    serving = double.cache.serving
    getattr(redis_server, fault)()
    began = time.monotonic()
    assert double.delay(1).id in sent
    assert time.monotonic() - began < FAST
    assert serving.is_paused

    def refuse(*args, **kwargs):
        pytest.fail("nothing is asked in a pause")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("glance", "marked_within", "mark", "holder", "resolve", "renew"):
            patch.setattr(type(serving.manager), name, refuse)
        double.delay(1)
    assert len(sent) == 2
    if fault == "freeze":
        redis_server.thaw()

        def answered():
            serving.pause(0)
            return double.delay(1).id not in sent

        if option == "producer":
            wait_until(answered, 10)  # a budget is soon overrun, on a slow machine
        else:
            assert not answered()


# Celery's own: its result backend for Redis uses SETEX, which redis-py 8 deprecates.
@pytest.mark.filterwarnings("ignore:.*setex:DeprecationWarning")
def test_what_l1_knows_is_no_use_where_results_cannot_be_stored(redis_server, namespace, sent):
    """An answer from L1 does not wait for Celery's result backend, which would wait for a frozen Redis very long."""
    url = redis_server.url
    app = make_app(redis_url=url, cache_namespace=namespace, producer_budget=BUDGET, staleness_bound=6.0)
    app.conf.update(result_backend=url, redis_socket_timeout=SLOW)
    double = make_double(app, Counter(), producer=True)
    assert double(1) == 2
    double.delay(1)
    assert double.apply_async((1,), countdown=1).id in sent  # connects, as the first message does
    redis_server.freeze()
    double.cache.serving.pause(0)
    began = time.monotonic()
    assert double.delay(1).id in sent
    assert time.monotonic() - began < FAST
    redis_server.thaw()
    app.backend.result_consumer.stop()
    app.backend.client.close()
    app.mlcache.close()
    app.close()


def test_a_pause_ends(double):
    """A pause is a second long."""
    serving = double.cache.serving
    serving.pause(PAUSE)
    assert serving.is_paused
    serving.pause(0)
    assert not serving.is_paused
    assert PAUSE == 1.0


# ---- coalescing ---------------------------------------------------------------------------------------------------


@pytest.fixture
def joint(shared, runs, sent):
    """A task whose plain calls share one that is under way."""
    return make_double(shared, runs, coalesce=True)


@pytest.mark.parametrize("state", [None, states.RECEIVED, states.STARTED, states.RETRY])
def test_a_call_shares_one_that_is_under_way(shared, joint, sent, state):
    """While a call is queued, executed or to be retried, the same call gets its id, and no message is sent."""
    first = joint.delay(1)
    if state:
        shared.backend.store_result(first.id, OopsError("once more") if state == states.RETRY else None, state)
    second, other = joint.delay(1), joint.delay(2)
    assert [second.id, sent] == [first.id, [first.id, other.id]]
    assert shared.mlcache.stats()["calls_coalesced"] == 1


@pytest.mark.parametrize("state", [states.FAILURE, states.REVOKED, states.SUCCESS])
def test_a_call_does_not_share_one_that_has_ended(shared, joint, sent, state):
    """After the first has failed, was revoked or is done, whatever has become of its mark, the next one is sent."""
    first = joint.delay(1)
    shared.backend.store_result(first.id, 2 if state == states.SUCCESS else OopsError("no"), state)
    second, third = joint.delay(1), joint.delay(1)
    assert sent == [first.id, second.id]
    assert third.id == second.id


TOLD_APART = {
    "task_id": {"task_id": "mine"},
    "group_id": {"group_id": "g"},
    "expires": {"expires": 60},
    "reply_to": {"reply_to": "somebody"},
    "root_id": {"root_id": "r"},
    "parent_id": {"parent_id": "p"},
    "ignore_result": {"ignore_result": True},
    "queue": {"queue": "special"},
    "exchange": {"exchange": "special", "routing_key": "special"},
    "routing_key": {"routing_key": "special"},
    "priority": {"priority": 0},
    "time_limit": {"time_limit": 60},
    "soft_time_limit": {"soft_time_limit": 60},
    "own header": {"headers": {"mine": 1}},
    "own stamp": {"stamped_headers": ["mine"], "mine": ["x"]},
    **SENT_ALL_THE_SAME,
}


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "second"])
@pytest.mark.parametrize("what", TOLD_APART)
def test_a_call_that_anybody_tells_apart_is_sent(joint, sent, what, is_first):
    """A call that is more than its arguments neither shares another nor is shared."""
    options = [TOLD_APART[what], {}] if is_first else [{}, TOLD_APART[what]]
    results = [joint.apply_async((1,), **each) for each in options]
    assert [result.id for result in results] == sent
    assert len(set(sent)) == 2


def test_a_call_that_wants_the_cache_is_shared(joint, sent):
    """The mode "use" tells no call apart from one without."""
    assert {joint.apply_async((1,), mlcache="use").id, joint.delay(1).id} == set(sent)
    assert len(sent) == 1


@pytest.mark.parametrize("room", [0, len(":call") - 1, len(":call")])
def test_a_call_whose_key_is_nearly_too_long_is_sent(shared, runs, sent, room):
    """Where there is no room in a key for the name of a shared call, each is sent; with just enough, one is shared."""
    task = make_double(shared, runs, coalesce=True, key="{x}")
    x = "x" * (MAX_KEY_BYTES - room - len(task.cache.key("x")) + 1)
    assert len(task.cache.key(x)) == MAX_KEY_BYTES - room
    assert {task.delay(x).id, task.delay(x).id} == set(sent)
    assert len(sent) == (1 if room == len(":call") else 2)


@pytest.mark.parametrize(
    ("age", "is_shared"), [(QUEUED - 1, True), (QUEUED + 1, False), (-1, False)], ids=["young", "old", "of-the-future"]
)
def test_a_call_that_no_worker_has_begun_with_is_shared_for_a_while(joint, sent, monkeypatch, age, is_shared):
    """A message may be lost: who comes later than that sends one of its own, and so does who has another clock."""
    first, now = joint.delay(1), time.time()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now + age)
        second = joint.delay(1)
    assert (second.id == first.id) is is_shared
    assert sent == list(dict.fromkeys([first.id, second.id]))


def test_a_call_that_a_worker_has_begun_with_is_shared_however_long_it_takes(joint, sent, monkeypatch):
    """That limit is for messages: a call that is computed is under way, whenever it was sent."""
    first, now = joint.delay(1), time.time()
    joint.cache.manager.mark(started_name(first.id), 60)
    assert joint.cache.manager._parts.leases.ask(joint.cache.key(1), seen=None, is_waiting=False).is_mine
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now + QUEUED + 1)
        assert joint.delay(1).id == first.id


def test_a_result_backend_that_cannot_be_asked_shares_nothing(shared, joint, sent, monkeypatch):
    """Where the state of the call under way cannot be had, the next one is sent, and it is told."""
    told = []

    def on_error(what, error, **_):
        told.append((what, type(error)))

    def fail(*args, **kwargs):
        raise ConnectionError

    our_signals.cache_error.connect(on_error)
    first = joint.delay(1)
    with monkeypatch.context() as patch:
        patch.setattr(shared.backend, "get", fail)
        second = joint.delay(1)
    assert sent == [first.id, second.id]
    assert told == [("producer", ConnectionError)]
    assert joint.delay(1).id == second.id


def test_what_interrupts_the_look_at_a_shared_call_passes(shared, joint, sent, monkeypatch):
    """A soft time limit that is met there ends the task that calls, and sends nothing."""

    def interrupt(*args, **kwargs):
        raise SoftTimeLimitExceeded

    first = joint.delay(1)
    monkeypatch.setattr(shared.backend, "get", interrupt)
    with pytest.raises(SoftTimeLimitExceeded):
        joint.delay(1)
    assert sent == [first.id]


@pytest.mark.parametrize("backend", ["rpc://", "disabled://"])
def test_results_that_nobody_else_can_read_are_not_shared(shared, joint, sent, backend):
    """Where only the caller gets a result, or nobody does, each call is sent."""
    shared.conf.result_backend = backend
    assert len({joint.delay(1).id, joint.delay(1).id}) == 2


@pytest.mark.parametrize("options", [{"ignore_result": True}, {"expires": 60}], ids=["ignore-result", "expires"])
def test_a_task_whose_calls_are_not_alike_is_sent(shared, runs, sent, options):
    """What the task itself says counts as what a call says: the first would expire before the second."""
    task = make_double(shared, runs, coalesce=True, **options)
    assert len({task.delay(1).id, task.delay(1).id}) == 2


def test_a_call_that_is_over_is_shared_no_more(shared, joint, sent, runs):
    """Once a worker has executed it, the same call is sent anew, even if nobody knows its result any more."""
    first = joint.delay(1)
    execute(joint, first, 1, **{modes.CALL: call_name(joint)})
    first.forget()
    assert joint.delay(1).id != first.id
    assert [len(sent), runs["double"]] == [2, 1]


def test_a_call_that_is_over_before_it_is_marked_is_not_shared(shared, joint, sent, runs, monkeypatch):
    """A worker may be faster than the sender is with its mark: who comes next must not wait for what is gone."""
    publish = CachedTask.mlcache_publish

    def publish_and_execute(self, args, kwargs, **options):
        result = publish(self, args, kwargs, **options)
        execute(self, result, *args, **options.get("headers", {}))
        return result

    monkeypatch.setattr(CachedTask, "mlcache_publish", publish_and_execute)
    first = joint.delay(1)
    assert first.get() == 2
    first.forget()
    second = joint.delay(1)
    assert second.id != first.id
    assert second.get() == 2
    assert [len(sent), runs["double"]] == [2, 1]


def test_a_call_that_is_to_be_retried_is_shared_on(shared, sent, runs):
    """A retry is the same call: who comes in between gets its result."""

    @cached_task(app=shared, shared=False, coalesce=True, bind=True, max_retries=1, default_retry_delay=0)
    def moody(self, x):
        runs["moody"] += 1
        raise self.retry()

    first = moody.delay(1)
    assert execute(moody, first, 1, **{modes.CALL: call_name(moody)}).info.state == states.RETRY
    assert moody.delay(1).id == first.id
    assert runs["moody"] == 1


def test_a_failed_publication_is_not_shared(joint, sent, monkeypatch):
    """A call that could not be sent leaves no mark: the next one is sent."""

    def fail(*args, **kwargs):
        raise OSError

    with monkeypatch.context() as patch:
        patch.setattr(CachedTask, "mlcache_publish", fail)
        with pytest.raises(OSError):
            joint.delay(1)
    assert joint.delay(1).id in sent


def test_a_cached_result_comes_first(shared, runs, sent):
    """With both options a hit is answered at once, and a miss shares what is under way."""
    task = make_double(shared, runs, coalesce=True, producer=True)
    first = task.delay(1)
    assert task.delay(1).id == first.id
    task(1)
    hit = task.delay(1)
    assert hit.id != first.id
    assert [hit.get(), sent] == [2, [first.id]]


def call_name(task):
    """Return the name of the mark of the call with 1."""
    return f"call:{task.cache.key(1)}"


@pytest.mark.parametrize("way", ["invalidate", "invalidate_all", "tag", "prefix", "clear", "delete"])
def test_an_invalidation_ends_the_sharing(shared, sent, runs, way):
    """Who calls after an invalidation gets nothing that may have been computed before it."""
    task = make_double(shared, runs, coalesce=True, tags=["x:{x}"])
    first = task.delay(1)
    assert task.delay(1).id == first.id
    manager = task.cache.manager
    {
        "invalidate": lambda: task.cache.invalidate(1),
        "invalidate_all": task.cache.invalidate_all,
        "tag": lambda: manager.invalidate_tags("x:1"),
        "prefix": lambda: manager.invalidate_prefix("task:"),
        "clear": manager.clear,
        "delete": lambda: manager.delete(task.cache.key(1)),
    }[way]()
    second = task.delay(1)
    assert second.id != first.id
    assert task.delay(1).id == second.id
    assert sent == [first.id, second.id]


@pytest.mark.parametrize("way", ["invalidate", "tag"])
def test_an_invalidation_while_a_call_is_sent_ends_its_sharing(shared, sent, runs, monkeypatch, way):
    """A worker may have read what it computes from before it: so nobody else may take it for newer."""
    task = make_double(shared, runs, coalesce=True, tags=["x:{x}"])
    publish = CachedTask.mlcache_publish

    def publish_and_invalidate(self, *args, **options):
        result = publish(self, *args, **options)
        task.cache.invalidate(1) if way == "invalidate" else task.cache.manager.invalidate_tags("x:1")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(CachedTask, "mlcache_publish", publish_and_invalidate)
        first = task.delay(1)
    assert task.delay(1).id != first.id


def test_a_worker_that_has_died_is_not_waited_for(shared, joint, sent):
    """A task that a worker has begun with is under way as long as somebody holds the call's lease, and no longer."""
    first = joint.delay(1)
    manager, key = joint.cache.manager, joint.cache.key(1)
    manager.mark(started_name(first.id), 60)
    parts = manager._parts
    grant = parts.leases.ask(key, seen=None, is_waiting=False)
    assert joint.delay(1).id == first.id
    assert parts.remote.release(key, grant.fence, word="again")
    second = joint.delay(1)
    assert second.id != first.id
    assert sent == [first.id, second.id]


def test_a_worker_on_its_way_to_the_lease_is_not_taken_for_a_dead_one(joint, sent, monkeypatch):
    """A call is shared from its message to its result, also while its worker has begun and holds no lease yet."""
    first, met, ask = joint.delay(1), [], Leases.ask

    def ask_late(*args, **kwargs):
        met.append(joint.delay(1).id)
        return ask(*args, **kwargs)

    monkeypatch.setattr(Leases, "ask", ask_late)
    assert execute(joint, first, 1, **{modes.CALL: call_name(joint)}).retval == 2
    assert met == [first.id]


def test_a_forgotten_call_that_was_answered_from_the_cache_is_not_joined(shared, sent):
    """A worker that only had to look says so too: nobody waits for a result that is over and gone."""

    @cached_task(app=shared, shared=False, coalesce=True, ttl=60, negative={OopsError: 60})
    def look(x):
        raise OopsError(x)

    first = look.delay(1)
    with pytest.raises(OopsError):
        look(1)
    execute(look, first, 1, **{modes.CALL: call_name(look)})
    assert look.cache.manager.stats()["negative_hits"] == 1
    first.forget()
    assert look.delay(1).id != first.id
    assert len(sent) == 2


def test_a_worker_marks_what_it_has_begun_with(shared, sent):
    """Under the lease, and only where it computes."""
    marked = []

    @cached_task(app=shared, shared=False, coalesce=True)
    def look(x):
        manager = look.cache.manager
        marked.append(manager.marked_within(started_name(look.request.id), 5.0))
        marked.append(bool(manager.holder(look.cache.key(x), within=5.0)))

    first, second = look.delay(1), look.delay(2)
    execute(look, first, 1, **{modes.CALL: call_name(look)})
    execute(look, first, 1, **{modes.CALL: call_name(look)})
    execute(look, second, 2)  # nobody may wait for it
    assert marked == [(True, True), True, (False, True), True]


def test_a_shared_call_is_a_child_of_the_task_that_has_made_it(shared, joint, sent):
    """As what is sent is, and what is answered."""
    first = joint.delay(1)

    @shared.task(bind=True, shared=False)
    def parent(self):
        joint.delay(1)
        return [child.id for child in self.request.children]

    shared.finalize()
    parent = shared.tasks[parent.name]
    assert execute(parent, parent.AsyncResult("parent")).retval == [first.id]


def test_threads_that_call_at_the_same_time_send_one_message(shared, joint, sent):
    """Where several threads of a process make the same call at once, one of them sends it."""
    with ThreadPoolExecutor(8) as pool:
        ids = {result.id for result in pool.map(lambda _: joint.delay(1), range(8))}
    assert ids == set(sent)
    assert len(sent) == 1
