"""Prefork children that come and go: recycled, killed, spawned, and born while Redis is a black hole."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fleet.fleets import BOUND, TIMEOUT, Fleet, running_fleet
from tests.support.proxy import Proxy
from tests.support.waiting import wait_until
from tests.support.worker import WorkerProcess

pytestmark = [pytest.mark.fleet, pytest.mark.redis, pytest.mark.timeout(90)]


CHILDREN = 6  # of the worker that recycles them


def footprint(worker: WorkerProcess) -> tuple[int, int]:
    """Return how many file descriptors and threads MainProcess has."""
    process = Path(f"/proc/{worker.pid}")
    return len(list((process / "fd").iterdir())), len(list((process / "task").iterdir()))


def serve(fleet: Fleet, children: int) -> set[int]:
    """Run probes until that many different processes have answered; return their pids."""
    seen: set[int] = set()
    deadline = time.monotonic() + 60
    while len(seen) < children:
        assert time.monotonic() < deadline, f"only {len(seen)} of {children} children served"
        tasks = [fleet.module.probe.delay("call", n) for n in range(CHILDREN)]
        for n, task in enumerate(tasks):
            answer = task.get(timeout=TIMEOUT)
            assert answer["answer"] == 2 * n
            seen.add(answer["pid"])
    return seen


@pytest.fixture(scope="module")
def recycling() -> Iterator[Fleet]:
    """Children for one task only; Celery replaces all of them about twice a second."""
    with running_fleet() as fleet:
        fleet.boot(concurrency=CHILDREN, args=["--max-tasks-per-child", "1"])
        yield fleet


def test_fifty_recycled_children_leave_nothing(recycling):
    """Fifty recycled children leave no subscription, no connection, and in MainProcess no descriptor and no thread."""
    serve(recycling, 2 * CHILDREN)
    wait_until(lambda: len(recycling.worker.children()) == CHILDREN)
    descriptors, threads = footprint(recycling.worker)
    serve(recycling, 50)
    wait_until(lambda: len(recycling.worker.children()) == CHILDREN)
    wait_until(lambda: recycling.subscribers() == recycling.worker.children(), 10, "one subscription for each child")
    alive = {*recycling.worker.children(), os.getpid()}
    assert {each["pid"] for each in recycling.clients()} <= alive

    def is_as_before() -> bool:
        now = footprint(recycling.worker)
        # A child that is about to come or go has one pipe less; a leak would be one for each of the fifty.
        return now[0] <= descriptors + CHILDREN and now[1] <= threads

    wait_until(is_as_before, 5, f"{footprint(recycling.worker)} back to {descriptors, threads}")
    assert recycling.runs("double:0") == 1


def test_a_child_of_a_recycling_worker_shares_l2(recycling):
    """A child that serves one task only is served by L2: its own L1 is empty."""
    recycling.double.delay(77).get(timeout=TIMEOUT)
    answers = [recycling.probe("call", 77) for _ in range(3)]
    assert len({answer["pid"] for answer in answers}) == 3
    assert [(a["l1_hits"], a["l2_hits"], a["loads"]) for a in answers] == [(0, 1, 0)] * 3


def test_the_replacement_of_a_killed_child_is_coherent():
    """After kill -9 of a child its replacement subscribes, serves, and follows invalidations."""
    with running_fleet() as fleet:
        worker = fleet.boot()
        fleet.wait_for_subscribers(worker.children())
        fleet.double.delay(5).get(timeout=TIMEOUT)
        victim, sibling = worker.children()
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: len(set(worker.children()) - {victim}) == 2, 15, "a replacement")
        fleet.wait_for_subscribers(worker.children())
        assert sibling in worker.children()
        wait_until(lambda: all(a["l1_hits"] for a in fleet.everywhere("call", 5, size=2)), 10)
        assert fleet.double.cache.invalidate(5) is True
        fleet.forget(5, 2)
        assert fleet.double.delay(5).get(timeout=TIMEOUT) == 10
        assert fleet.runs("double:5") == 2


@pytest.fixture
def behind_a_proxy() -> Iterator[tuple[Fleet, Proxy]]:
    """Children for one task only, whose L2 is behind a proxy."""
    with running_fleet() as fleet, Proxy(fleet.l2.port) as proxy:
        fleet.settings["mlcache_redis_url"] = proxy.url
        fleet.boot(args=["--max-tasks-per-child", "1"])
        yield fleet, proxy


def test_replacements_are_born_while_redis_is_a_black_hole(behind_a_proxy):
    """While Redis answers nothing, replacements start and serve: none runs into worker_proc_alive_timeout (4 s)."""
    fleet, proxy = behind_a_proxy
    serve(fleet, 2)
    proxy.deaf()
    born_before = set(fleet.worker.children())
    assert len(serve(fleet, 6) - born_before) >= 4
    victims = set(fleet.worker.children())
    for victim in victims:
        with suppress(ProcessLookupError):  # it has ended after its task
            os.kill(victim, signal.SIGKILL)
    wait_until(lambda: victims.isdisjoint(fleet.worker.children()), 5)
    serve(fleet, 4)
    proxy.mend()
    wait_until(lambda: fleet.subscribers() == fleet.worker.children(), 10, "the backplane of every child is back")
    runs = fleet.runs("double:3")
    serve(fleet, 4)
    serve(fleet, 4)
    assert fleet.runs("double:3") <= runs + 2  # two processes may run it at once, no more: the result is kept
    assert "Timed out waiting for UP message" not in fleet.worker.log()


@pytest.fixture(scope="module")
def spawned() -> Iterator[Fleet]:
    """Children that are fresh interpreters; what setup_cache() was told stands in no other place."""
    with running_fleet(worker_pool_start_method="spawn") as fleet:
        places = {"redis_url": fleet.settings.pop("mlcache_redis_url"), "l1_max_size": 77}
        places["cache_namespace"] = fleet.settings.pop("mlcache_cache_namespace")
        fleet.settings["overrides"] = places
        fleet.boot()
        yield fleet


def test_spawned_children_serve_and_are_coherent(spawned):
    """Under spawn a cached task hits, with the settings that setup_cache() got, and an invalidation arrives."""
    spawned.double.delay(1).get(timeout=TIMEOUT)
    assert spawned.double.cache.get(1) == 2
    wait_until(lambda: all(a["l1_hits"] for a in spawned.everywhere("call", 1, size=2)), 10)
    assert spawned.runs("double:1") == 1
    assert spawned.double.cache.invalidate(1) is True
    spawned.forget(1, 2)
    assert spawned.double.delay(1).get(timeout=TIMEOUT) == 2
    assert spawned.runs("double:1") == 2


def test_spawned_children_have_one_cache_each(spawned):
    """Under spawn the app's cache and the tasks' cache of a process are one, with one subscription."""
    spawned.everywhere("call", 2, size=2)
    spawned.wait_for_subscribers(spawned.worker.children()[-2:], BOUND + 10)
