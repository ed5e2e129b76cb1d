"""Whatever a task ends with passes through its cache untouched, and whatever Redis does, tasks succeed."""

from __future__ import annotations

from collections.abc import Iterator

import billiard
import pytest
from celery import VERSION
from celery.exceptions import SoftTimeLimitExceeded

from celery_mlcache.entry import MISS
from tests.fleet.fleets import TIMEOUT, Fleet, celery, running_fleet
from tests.support.waiting import wait_until
from tests.support.worker import WorkerError

pytestmark = [pytest.mark.fleet, pytest.mark.redis]

SECRET = "s3ntinel-pa55word"
_IS_ANSWERED = pytest.mark.skipif(
    VERSION < (5, 7) and billiard.VERSION >= (4, 3),
    reason="Celery before 5.7 cannot store the SystemExit that billiard 4.3 hands it: no task's caller is told",
)
MOODS = [
    pytest.param("error", {}, "OopsError", id="user-exception"),
    pytest.param("exit", {}, "WorkerLostError", id="system-exit", marks=_IS_ANSWERED),
    pytest.param("soft", {"soft_time_limit": 0.3}, "SoftTimeLimitExceeded", id="soft-time-limit"),
    pytest.param("hard", {"time_limit": 0.3}, "TimeLimitExceeded", id="hard-time-limit"),
]


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """A worker with two children."""
    with running_fleet() as fleet:
        fleet.boot()
        yield fleet


def call_again(fleet: Fleet, mood: str) -> str:
    """Call a moody task anew, once nothing of it is cached."""
    assert fleet.module.moody.cache.get(mood) is MISS
    return fleet.module.moody.delay(mood).get(timeout=TIMEOUT)


@pytest.mark.parametrize(("mood", "options", "error"), MOODS)
def test_a_failure_is_not_cached(fleet, mood, options, error):
    """A failed call shows its own exception, leaves nothing in the cache, and the next call is executed and cached."""
    failed = fleet.module.moody.apply_async((mood,), **options)
    raised = failed.get(timeout=TIMEOUT, propagate=False)
    assert type(raised).__name__ == error
    assert failed.state == "FAILURE"
    assert fleet.runs(f"moody:{mood}") == 1
    assert call_again(fleet, mood) == f"no longer {mood}"
    assert fleet.module.moody.delay(mood).get(timeout=TIMEOUT) == f"no longer {mood}"
    assert fleet.runs(f"moody:{mood}") == 2


def test_the_task_itself_sees_the_soft_limit(fleet):
    """SoftTimeLimitExceeded is raised inside the function, which may clean up."""
    before = fleet.runs("moody:saw-soft-limit")
    result = fleet.module.moody.apply_async(("long", 30.0), soft_time_limit=0.3)
    with pytest.raises(SoftTimeLimitExceeded):
        result.get(timeout=TIMEOUT)
    assert fleet.runs("moody:saw-soft-limit") == before + 1


def test_retry_runs_again_and_then_caches(fleet):
    """``self.retry()`` caches nothing; what the retried execution returns is cached."""
    assert fleet.module.moody.delay("retry").get(timeout=TIMEOUT) == "no longer retry"
    assert fleet.runs("moody:retry") == 2
    assert fleet.module.moody.delay("retry").get(timeout=TIMEOUT) == "no longer retry"
    assert fleet.runs("moody:retry") == 2


def test_autoretry_runs_again_and_then_caches(fleet):
    """``autoretry_for`` sees the function's exception at each execution, and its last result is cached."""
    assert [fleet.module.flaky.delay("x").get(timeout=TIMEOUT) for _ in range(2)] == ["run 3"] * 2
    assert fleet.runs("flaky:x") == 3


@pytest.mark.parametrize(("mood", "said"), [("ignore", "ignored"), ("reject", "reject requeue=False: no")])
def test_ignored_and_rejected_executions_are_not_cached(fleet, mood, said):
    """The worker itself sees Ignore and Reject; they leave no entry, and the next call is executed."""
    execution = fleet.module.moody.delay(mood)
    wait_until(lambda: f"moody[{execution.id}] {said}" in fleet.worker.log(), TIMEOUT)
    assert call_again(fleet, mood) == f"no longer {mood}"
    assert fleet.runs(f"moody:{mood}") == 2


def test_soft_limit_while_waiting_for_another_thread(fleet):
    """A call that waits for another's execution is ended by its soft limit; that execution goes on and is kept."""
    result = fleet.module.follow.apply_async((1, 2.0), soft_time_limit=0.5)
    with pytest.raises(SoftTimeLimitExceeded):
        result.get(timeout=TIMEOUT)
    assert fleet.module.slow.delay(1, 2.0).get(timeout=TIMEOUT) == 1
    assert fleet.runs("slow:1") == 1


def test_soft_limit_while_redis_is_frozen():
    """A call that waits for a frozen L2 is ended by its soft limit, and no later call gets that answer for its own."""
    with running_fleet(mlcache_redis_socket_timeout=8.0, overrides={"circuit_threshold": 1000}) as fleet:
        fleet.boot(concurrency=1)
        fleet.wait_for_subscribers(fleet.worker.children())
        expected = {x: fleet.double.delay(x).get(timeout=TIMEOUT) for x in range(3)}
        fleet.app.mlcache.clear()  # so that the next calls ask L2
        fleet.l2.freeze()
        try:
            results = [fleet.double.apply_async((x,), soft_time_limit=0.5) for x in range(3)]
            for result in results:
                with pytest.raises(SoftTimeLimitExceeded):
                    result.get(timeout=TIMEOUT)
        finally:
            fleet.l2.thaw()
        for _ in range(3):
            assert {x: fleet.double.delay(x).get(timeout=TIMEOUT) for x in range(3)} == expected
        assert [fleet.runs(f"double:{x}") for x in range(3)] == [2, 2, 2]


def test_a_dead_l2_costs_no_task():
    """Tasks succeed on a worker that started without L2, the cache begins when L2 comes, and again after it died."""
    with running_fleet(mlcache_l1_tll=5) as fleet:
        fleet.l2.kill()
        fleet.boot()
        for x in (1, 2):
            assert fleet.double.delay(x).get(timeout=TIMEOUT) == 2 * x
        for _ in range(2):
            fleet.l2.start()
            wait_until(lambda: fleet.subscribers() == fleet.worker.children(), 10, "every child subscribes by itself")
            wait_until(lambda: all(a["l1_hits"] for a in fleet.everywhere("call", 3, size=2)), 10, "L1 answers")
            fleet.l2.kill()
            assert [fleet.double.delay(x).get(timeout=TIMEOUT) for x in (3, 4, 5)] == [6, 8, 10]
        # Settings that do not exist are told where the settings are read: in the worker's log.
        assert "did you mean mlcache_l1_ttl?" in fleet.worker.log()
        fleet.l2.start()


@pytest.mark.parametrize(
    ("conf", "env", "name"),
    [
        pytest.param({}, {"LIB_REDIS_PORT": "99999"}, "LIB_REDIS_PORT=99999", id="environment"),
        pytest.param({"mlcache_l1_ttl": -1}, {}, "mlcache_l1_ttl=-1", id="app.conf"),
    ],
)
def test_a_worker_with_wrong_settings_does_not_start(conf, env, name):
    """A wrong setting ends the worker at its start, with the setting's name, value and bounds in its output."""
    with running_fleet() as fleet:
        fleet.settings |= conf
        with pytest.raises(WorkerError, match=r"ended with [1-9]") as caught:
            fleet.boot(env=env)
    assert name in str(caught.value)
    assert "must be" in str(caught.value)


PLACES = [
    pytest.param("mlcache_redis_url", "", id="app.conf-redis-url"),
    pytest.param("mlcache_backend_url", "", id="app.conf-backend-url"),
    pytest.param("", "LIB_REDIS_URL", id="environment-url"),
    pytest.param("", "LIB_REDIS_PASSWORD", id="environment-password"),
]


@pytest.mark.parametrize(("key", "variable"), PLACES)
def test_no_password_is_shown(key, variable):
    """A password that works is shown neither by ``celery report`` and ``celery inspect conf`` nor in the log."""
    with running_fleet() as fleet:
        plain = fleet.settings.pop("mlcache_redis_url")
        url = plain.replace("://", f"://:{SECRET}@")
        env = {}
        if key:
            fleet.settings[key] = url
        elif variable == "LIB_REDIS_URL":
            env = {variable: url}
        else:
            fleet.settings["mlcache_redis_url"] = plain
            env = {variable: SECRET}
        fleet.l2.client().config_set("requirepass", SECRET)
        fleet.boot("solo", env=env)
        answer = fleet.probe("call", 1)
        wait_until(lambda: fleet.probe("call", 1)["stats"]["lease"] == "held")
        assert answer["stats"]["fills"] == 1
        shown = [
            str(fleet.app.control.inspect(timeout=10, limit=1).conf()),
            str(fleet.app.control.inspect(timeout=10, limit=1).conf(with_defaults=True)),
            celery({**fleet.env, **env}, "report").stdout,
        ]
        assert all("mlcache_" in text for text in shown)
        assert [text for text in (*shown, fleet.worker.log()) if SECRET in text] == []


def test_a_result_says_where_it_was_found(fleet):
    """Whoever has called learns it from the result's metadata: computed, from the cache, or stale."""
    double, level_of = fleet.module.double, fleet.module.double.cache.level_of
    found = []
    for options in ({}, {}, {"mlcache": "refresh"}, {"mlcache": "bypass"}):
        result = double.apply_async(("level",), **options)
        found.append((result.get(timeout=TIMEOUT), level_of(result)))
    assert found[1][1] in {"l1", "l2"}
    assert [level for _, level in (found[0], *found[2:])] == ["miss", "refresh", "bypass"]
    assert level_of(double.AsyncResult("never")) is None
    plain = fleet.module.probe.delay("stats")
    plain.get(timeout=TIMEOUT)
    assert level_of(plain) is None
