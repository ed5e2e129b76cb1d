"""One worker for each pool and broker: L1 in every serving process, coherent, and gone without a trace."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator

import pytest

from tests.fleet.fleets import BOUND, TIMEOUT, Fleet, release_times, running_fleet
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.fleet, pytest.mark.redis]

POOLS = ("prefork", "solo", "threads", "gevent", "eventlet")
CHILDREN = 2


class Pooled(Fleet):
    pool: str
    size: int  # how many processes serve


@pytest.fixture(
    scope="module",
    params=[
        *[pytest.param((pool, "redis"), id=f"{pool}-redis") for pool in POOLS],
        *[pytest.param((pool, "amqp"), id=f"{pool}-amqp", marks=pytest.mark.rabbitmq) for pool in POOLS],
    ],
)
def fleet(request) -> Iterator[Fleet]:
    """One worker, shared by the tests of a pool and broker; its end is checked as well."""
    pool, broker = request.param
    if pool in {"gevent", "eventlet"} and importlib.util.find_spec(pool) is None:
        pytest.skip(f"{pool} is not installed")
    amqp_url = request.getfixturevalue("module_amqp_url") if broker == "amqp" else None
    with running_fleet(amqp_url=amqp_url) as fleet:
        fleet.pool, fleet.size = pool, CHILDREN if pool == "prefork" else 1
        fleet.boot(pool, CHILDREN)
        yield fleet
        _check_warm_shutdown(fleet)


def _check_warm_shutdown(fleet: Fleet) -> None:
    fleet.cache.release()
    assert fleet.stop(fleet.worker) < 12  # of which Celery's own share is up to 10 s, nudged or not
    times = release_times(fleet.worker.log())
    assert len(times) == fleet.size + (fleet.pool == "prefork")
    assert sum(times) < 1
    wait_until(lambda: fleet.l2.pubsub_count(fleet.channel) == 0, 2, "no subscription left")
    wait_until(lambda: fleet.clients() == [], 2, "no connection left")
    assert "Traceback" not in fleet.worker.log()


@pytest.fixture
def fresh(request, fleet) -> int:
    """An argument that no other test uses."""
    return int(fleet.counts.incr("fresh"))


def serving(fleet: Fleet) -> list[int]:
    """Return the pids of the processes that execute tasks."""
    return fleet.worker.children() if fleet.pool == "prefork" else [fleet.worker.pid]


def test_each_serving_process_has_one_subscription(fleet):
    """Each process that executes tasks is subscribed exactly once; MainProcess of prefork is not."""
    fleet.wait_for_subscribers(serving(fleet))
    assert len(serving(fleet)) == fleet.size
    assert fleet.l2.pubsub_count(fleet.channel) == fleet.size + fleet.cache.is_running


def test_a_call_is_executed_once_and_then_served(fleet, fresh):
    """A task called twice is executed once, and its result is the same."""
    assert [fleet.double.delay(fresh).get(timeout=TIMEOUT) for _ in range(3)] == [fresh * 2] * 3
    assert fleet.runs(f"double:{fresh}") == 1


def test_levels_answer_in_their_order(fleet, fresh):
    """In each process the first call is a load or an L2 hit, and every later one an L1 hit that needs no Redis."""
    fleet.wait_for_subscribers(serving(fleet))
    fleet.double.delay(fresh).get(timeout=TIMEOUT)
    wait_until(lambda: all(a["stats"]["lease"] == "held" for a in fleet.everywhere("stats", size=fleet.size)))
    fleet.everywhere("call", fresh, size=fleet.size)
    later = fleet.everywhere("call", fresh, size=fleet.size)
    assert [(a["answer"], a["l1_hits"], a["l2_hits"], a["loads"]) for a in later] == [(fresh * 2, 1, 0, 0)] * fleet.size
    assert all(a["stats"]["l1_entries"] and a["stats"]["backplane"] == "up" for a in later)
    assert fleet.runs(f"double:{fresh}") == 1


def warmed(fleet: Fleet, x: int) -> None:
    """Put the call's result into every process's L1."""
    fleet.double.delay(x).get(timeout=TIMEOUT)  # alone, for two processes would both run it
    wait_until(
        lambda: all(a["l1_hits"] for a in fleet.everywhere("call", x, size=fleet.size)), 10, "every L1 has the result"
    )


@pytest.mark.parametrize("way", ["task", "app"])
def test_a_producer_invalidates_every_process(fleet, fresh, way):
    """What a producer invalidates, through the task or through the app's cache, is gone everywhere within the bound."""
    warmed(fleet, fresh)
    key = fleet.double.cache.key(fresh)
    was_there = fleet.double.cache.invalidate(fresh) if way == "task" else fleet.app.mlcache.delete(key)
    told_at = time.monotonic()
    assert was_there is True
    fleet.forget(fresh, fleet.size)
    assert time.monotonic() - told_at < BOUND + 4  # the bound, and room for a starved machine
    assert fleet.double.delay(fresh).get(timeout=TIMEOUT) == fresh * 2
    assert fleet.runs(f"double:{fresh}") == 2


@pytest.mark.parametrize("act", ["invalidate", "invalidate_in_two_steps"])
def test_a_task_invalidates_its_siblings_and_the_producer(fleet, fresh, act):
    """What a task invalidates is gone from its sibling processes and from the producer's own L1."""
    warmed(fleet, fresh)
    wait_until(lambda: fleet.cache.stats()["lease"] == "held" or fleet.double.cache.get(fresh) is None)
    assert fleet.double.cache.get(fresh) == fresh * 2
    assert fleet.probe(act, fresh)["answer"] is True
    fleet.forget(fresh, fleet.size)
    key = fleet.double.cache.key(fresh)
    wait_until(lambda: fleet.cache.get(key) is None, BOUND + 4)


def test_nothing_was_lost(fleet, fresh):
    """The backplane has told every process each invalidation: no gap, no error, no dropped write."""
    warmed(fleet, fresh)
    fleet.double.cache.invalidate(fresh)
    fleet.forget(fresh, fleet.size)
    for answer in fleet.everywhere("stats", size=fleet.size):
        stats = answer["stats"]
        assert stats["messages"] >= 1
        assert (stats["l2_errors"], stats["writes_dropped"], stats["message_garbage"]) == (0, 0, 0)
        assert stats["subscription_losses"] == 0
