"""The backplane on a real server: what reaches another process's L1, what garbage does, what is left behind."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from celery_mlcache import MISS, CacheManager, create_cache_manager
from celery_mlcache.keys import RedisNames
from celery_mlcache.wire import MAX_STAMP
from tests.support.waiting import wait_until

pytestmark = pytest.mark.redis

Make = Callable[..., CacheManager]


@pytest.fixture
def make(shared_redis, namespace) -> Iterator[Make]:
    """Make managers of one namespace with a lease; each stands for a process."""
    made: list[CacheManager] = []

    def make(**overrides) -> CacheManager:
        settings = {"redis_url": shared_redis.url, "cache_namespace": namespace, **overrides}
        manager = create_cache_manager(**settings)
        made.append(manager)
        manager.warm()
        wait_until(lambda: manager.stats()["lease"] == "held", what="a lease")
        return manager

    yield make
    for manager in made:
        manager.close()


@pytest.fixture
def publish(shared_redis, namespace) -> Callable[[bytes], int]:
    """Say something on the namespace's channel that no process of ours has said."""
    client = shared_redis.client()
    return lambda data: client.publish(RedisNames(namespace).channel, data)


def hits_l1(cache: CacheManager, key: str) -> bool:
    """Whether a read of *key* is answered by L1 now."""
    before = cache.stats()["l1_hits"]
    cache.get(key)
    return cache.stats()["l1_hits"] > before


def stamp(cache: CacheManager) -> int:
    """Return the newest stamp applied."""
    return int(cache._parts.tier.coherence.applied)


def all_is_heard(*caches: CacheManager) -> None:
    """Wait until each has applied the message of every write that any of them made.

    A count of messages does not tell that: the one that arrives next may be of an earlier write.
    """
    newest = max(cache._parts.tier.coherence.highest for cache in caches)
    wait_until(lambda: all(stamp(cache) >= newest for cache in caches), 30, what="the last message")


class TestInvalidation:
    ACTS: ClassVar = {
        "set": (lambda cache: cache.set("k", "new"), "new"),
        "set_many": (lambda cache: cache.set_many({"k": "new", "l": 1}), "new"),
        "delete": (lambda cache: cache.delete("k"), MISS),
        "delete_many": (lambda cache: cache.delete_many(["k", "l", "x"]), MISS),
        "clear": (lambda cache: cache.clear(), MISS),
        "touch": (lambda cache: cache.touch("k", 50), "old"),
        "refresh": (lambda cache: cache.refresh("k", lambda: "new"), "new"),
    }

    @pytest.mark.parametrize("act", ACTS)
    def test_reaches_the_other_process(self, make, act):
        """Whatever one process does to a key, the other's L1 soon answers with the outcome."""
        mine, other = make(), make(staleness_bound=30, heartbeat_interval=10, tombstone_ttl=300)
        mine.set("k", "old")
        assert other.get("k") == "old"
        assert hits_l1(other, "k")
        do, expected = self.ACTS[act]
        do(mine)
        all_is_heard(mine, other)
        assert not hits_l1(other, "k")
        assert other.get("k", MISS) == expected
        assert mine.get("k", MISS) == expected
        assert other.stats()["lease"] == "held"
        assert not other.stats()["gaps"].keys() & {"hole", "lost", "garbage", "regress"}

    def test_incr_reaches_the_other_process(self, make):
        """A counter is the same everywhere a moment later."""
        mine, other = make(), make()
        mine.incr("n")
        assert other.get("n") == 1
        assert other.incr("n") == 2
        wait_until(lambda: mine.get("n") == 2, 1)

    def test_hundreds_of_keys_travel_in_one_message(self, make):
        """A write of many keys voids each of them with one message."""
        mine, other = make(), make()
        many = {f"k{number}": 0 for number in range(400)}
        mine.set_many(many)
        assert other.get_many(many) == many
        mine.set_many(dict.fromkeys(many, 1))
        all_is_heard(mine, other)
        wait_until(lambda: other.stats()["messages"] >= 2)
        assert other.stats()["messages"] == 2
        assert set(other.get_many(many).values()) == {1}

    def test_own_writes_survive_their_own_message(self, make):
        """A process's own announcement does not throw its own copy away."""
        mine = make()
        for number in range(20):
            mine.set("k", number)
        all_is_heard(mine)
        assert hits_l1(mine, "k")
        assert mine.get("k") == 19

    def test_a_fill_tells_nobody(self, make):
        """A fill publishes nothing, and yet every process finds it."""
        mine, other = make(), make()
        mine.set("first", 1)
        wait_until(lambda: other.stats()["messages"] == 1)
        assert mine.get_or_set("k", lambda: 5) == 5
        assert other.get("k") == 5
        assert hits_l1(mine, "k")
        mine.set("last", 1)
        all_is_heard(mine, other)
        wait_until(lambda: other.stats()["messages"] >= 2)
        assert other.stats()["messages"] == 2

    def test_lag_is_measured(self, make):
        """Every message's way is timed, and no time is negative."""
        mine, other = make(), make()
        mine.set("k", 1)
        wait_until(lambda: other.stats()["invalidation_lag"]["count"] >= 1)
        lag = other.stats()["invalidation_lag"]
        assert 0 <= lag["mean"] <= lag["max"] < 5

    def test_writers_and_readers_agree_after_a_storm(self, make):
        """Four processes write the same keys at once; when all is said, all L1s and L2 agree."""
        caches = [make() for _ in range(4)]
        remote = make(l1_enabled=False)
        keys = [f"k{number}" for number in range(5)]

        def storm(cache: CacheManager, seed: int) -> None:
            rng = random.Random(seed)
            for number in range(150):
                key = rng.choice(keys)
                match rng.randrange(4):
                    case 0:
                        cache.delete(key)
                    case 1:
                        cache.get(key)
                    case 2:
                        cache.get_or_set(key, lambda number=number: [seed, number])
                    case _:
                        cache.set(key, [seed, number])

        threads = [threading.Thread(target=storm, args=(cache, seed)) for seed, cache in enumerate(caches)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        truth = remote.get_many(keys)
        all_is_heard(*caches)
        for cache in caches:
            assert cache.get_many(keys) == truth
            assert cache.get_many(keys) == truth
            assert cache.stats()["lease"] == "held"


class TestGarbage:
    GARBAGE: ClassVar = {
        "random": lambda applied: random.Random(1).randbytes(200),
        "empty": lambda applied: b"",
        "version": lambda applied: b"9\nW\n%d\n1\nk" % (applied + 1),
        "op": lambda applied: b"1\nX\n%d\n1\nk" % (applied + 1),
        "no keys": lambda applied: b"1\nW\n%d\n1" % (applied + 1),
        "not UTF-8": lambda applied: b"1\nW\n%d\n1\n\xff" % (applied + 1),
        "5 MB": lambda applied: b"1\nW\n%d\n1\n" % (applied + 1) + b"k\xff" * 2_500_000,
        "huge stamp": lambda applied: b"1\nW\n%d\n1\nk" % (MAX_STAMP - 1),
        "huge flush": lambda applied: b"1\nF\n%d\n1" % (MAX_STAMP - 1),
        "stamp beyond": lambda applied: b"1\nF\n%d\n1" % (MAX_STAMP + 1),
        "endless digits": lambda applied: b"1\nF\n" + b"9" * 5000 + b"\n1",
        "an old stamp": lambda applied: b"1\nW\n%d\n1\nk" % (applied - 1),
        "the next stamp": lambda applied: b"1\nW\n%d\n1\nother" % (applied + 1),
        "the next stamp, flushing": lambda applied: b"1\nF\n%d\n1" % (applied + 1),
    }

    @pytest.mark.parametrize("times", [1, 2, 5])
    @pytest.mark.parametrize("kind", GARBAGE)
    def test_voids_l1_and_passes(self, make, publish, kind, times):
        """Garbage on the channel costs L1 its content, never the listener: lease and hits return."""
        mine, other = make(), make()
        mine.set("k", "old")
        assert other.get("k") == "old"
        all_is_heard(mine, other)
        data = self.GARBAGE[kind](stamp(other))
        before = other.stats()["messages"]
        for _ in range(times):
            assert publish(data) == 2
        wait_until(lambda: other.stats()["messages"] >= before + times)
        assert mine.set("k", "new")
        wait_until(lambda: other.get("k") == "new", 1.5)
        wait_until(lambda: all(each.stats()["lease"] == "held" and hits_l1(each, "k") for each in (mine, other)), 3)
        mine.delete("k")
        wait_until(lambda: other.get("k", MISS) is MISS, 1.5)
        assert other.stats()["subscriptions"] <= 2

    def test_5_mb_that_are_ours(self, make, publish):
        """A valid message of megabytes is applied like any other."""
        mine = make()
        mine.set("k", 1)
        all_is_heard(mine)
        keys = b"\n".join(b"key-%d" % number for number in range(400_000))
        publish(b"1\nW\n%d\n1\nk\n" % (stamp(mine) + 1) + keys)
        wait_until(lambda: mine.stats()["messages"] >= 2)
        wait_until(lambda: mine.set("k", 2) and mine.stats()["lease"] == "held" and hits_l1(mine, "k"), 4)

    def test_counts_what_happened(self, make, publish):
        """Reasons of gaps, flushes and re-seeds are counted where an operator looks."""
        mine = make()
        publish(b"garbage")
        wait_until(lambda: mine.stats()["message_garbage"] == 1)
        assert mine.stats()["gaps"]["garbage"] == 1

    def test_a_reseed_is_counted(self, redis_server):
        """A lost counter shows in ``reseeds``."""
        with create_cache_manager(redis_url=redis_server.url) as cache:
            cache.set("k", 1)
            wait_until(lambda: cache.stats()["lease"] == "held")
            before = cache.stats()["reseeds"]
            redis_server.flushall()
            cache.set("k", 2)
            wait_until(lambda: cache.stats()["reseeds"] > before, 3, what="the count")
            wait_until(lambda: cache.stats()["lease"] == "held" and hits_l1(cache, "k"), 3)


class TestSubscription:
    def test_a_killed_subscription_is_had_again(self, redis_server):
        """CLIENT KILL TYPE pubsub: L1 is void, the lease returns with a new subscription, and it is counted."""
        with (
            create_cache_manager(redis_url=redis_server.url) as mine,
            create_cache_manager(redis_url=redis_server.url) as other,
        ):
            mine.set("k", 0)
            wait_until(lambda: other.get("k") == 0 and other.stats()["lease"] == "held")
            for number in range(1, 6):
                assert redis_server.kill_pubsub() == 2
                mine.set("k", number)
                wait_until(lambda number=number: other.get("k") == number, 1.2)
                wait_until(
                    lambda: all(
                        each.stats()["lease"] == "held" and each.stats()["backplane"] == "up" and hits_l1(each, "k")
                        for each in (mine, other)
                    ),
                    4,
                )
            assert other.stats()["subscriptions"] == 6
            assert other.stats()["subscription_losses"] == 5

    def test_exactly_one_subscription_each(self, shared_redis, namespace, make):
        """A process holds one subscription, however often it is used and warmed, and none after close."""
        caches = [make() for _ in range(3)]
        for cache in caches:
            cache.warm()
            cache.set("k", 1)
        channel = RedisNames(namespace).channel
        assert shared_redis.pubsub_count(channel) == 3
        for cache in caches:
            cache.close()
        wait_until(lambda: shared_redis.pubsub_count(channel) == 0)

    def test_warm_and_set_do_not_wait_for_the_backplane(self, redis_server):
        """On a frozen server, starting costs no time on the caller's thread."""
        redis_server.freeze()
        with create_cache_manager(redis_url=redis_server.url) as cache:
            began = time.perf_counter()
            cache.warm()
            assert time.perf_counter() - began < 0.2
        redis_server.thaw()


class TestEnding:
    def test_stop_does_not_wait_for_the_heartbeat(self, make):
        """Closing ends the thread at once, however far away the next heartbeat is."""
        cache = make(staleness_bound=60, heartbeat_interval=25, tombstone_ttl=600)
        cache.set("k", 1)
        assert cache._parts.backplane.stop(10.0)

    def test_stop_while_redis_is_gone(self, redis_server):
        """Closing while the thread tries to connect again is quick too."""
        cache = create_cache_manager(redis_url=redis_server.url)
        cache.set("k", 1)
        wait_until(lambda: cache.stats()["lease"] == "held")
        redis_server.kill()
        wait_until(lambda: cache.stats()["backplane"] == "down")
        began = time.perf_counter()
        cache.close()
        assert time.perf_counter() - began < 0.5
        assert not threads_of(cache)

    def test_an_abandoned_manager_goes(self, shared_redis, namespace):
        """A manager that nobody holds is collected, and its thread and subscription end."""
        cache = create_cache_manager(redis_url=shared_redis.url, cache_namespace=namespace)
        cache.set("k", 1)
        wait_until(lambda: cache.stats()["lease"] == "held")
        names = threads_of(cache)
        assert names
        reference = weakref.ref(cache)
        cache = None
        gc.collect()
        wait_until(lambda: reference() is None, 2)
        wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name in names], 2)
        wait_until(lambda: shared_redis.pubsub_count(RedisNames(namespace).channel) == 0)

    @pytest.mark.parametrize("how", ["close", "release", "abandon"])
    def test_nothing_leaks(self, shared_redis, namespace, how):
        """30 cycles of making, using and ending leave no thread, no descriptor and no client behind."""

        def cycle() -> None:
            cache = create_cache_manager(redis_url=shared_redis.url, cache_namespace=namespace)
            cache.set("k", 1)
            wait_until(lambda: cache.stats()["lease"] == "held")
            if how == "close":
                cache.close()
            elif how == "release":
                cache.release()
                cache.get("k")
                cache.release()

        cycle()
        gc.collect()
        wait_until(lambda: not mine_on(shared_redis), 5)
        before = (threading.active_count(), descriptors())
        for _ in range(30):
            cycle()
        gc.collect()
        wait_until(lambda: threading.active_count() <= before[0], 5)
        wait_until(lambda: descriptors() <= before[1], 5)
        wait_until(lambda: not mine_on(shared_redis), 5)


def mine_on(server) -> list[str]:
    """Return the connections of managers on a server."""
    return [each["id"] for each in server.client().client_list() if each["name"].startswith("mlcache:")]


def threads_of(cache: CacheManager) -> list[str]:
    """Return the names of the backplane threads that carry the manager's namespace."""
    name = cache.stats()["namespace"]
    return [thread.name for thread in threading.enumerate() if thread.name == f"mlcache-backplane-{name}"]


def descriptors() -> int:
    """Return how many sockets this process has open."""
    count = 0
    for each in Path("/proc/self/fd").iterdir():
        try:
            count += str(each.readlink()).startswith("socket:")
        except OSError:
            continue
    return count
