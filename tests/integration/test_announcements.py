"""What each operation costs in messages: one PUBLISH however many keys it is about, none for what nobody need hear."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest

from celery_mlcache import MISS, CacheManager, create_cache_manager
from celery_mlcache.keys import RedisNames
from tests.support.processes import ROOT
from tests.support.waiting import wait_until

pytestmark = pytest.mark.redis

HUNDRED = [f"k{number}" for number in range(100)]
Act = Callable[[CacheManager], object]


@pytest.fixture
def published(redis_server) -> Callable[[], int]:
    """Count the PUBLISH commands that the server has executed, on any channel, in scripts or not."""
    client = redis_server.client()
    return lambda: int(client.info("commandstats").get("cmdstat_publish", {}).get("calls", 0))


@pytest.fixture
def cache(redis_server) -> Iterator[CacheManager]:
    """A manager with a lease, on a server that no one else uses, with a hundred keys of the tag ``all`` in it."""
    with create_cache_manager(redis_url=redis_server.url) as cache:
        cache.warm()
        wait_until(lambda: cache.stats()["lease"] == "held", what="a lease")
        cache.set_many(dict.fromkeys(HUNDRED, 1), tags=["all"])
        yield cache


class TestOneMessage:
    ACTS: ClassVar[dict[str, Act]] = {
        "set": lambda cache: cache.set("k", 2),
        "set with tags": lambda cache: cache.set("k", 2, tags=["a", "b"]),
        "set_many of 100": lambda cache: cache.set_many(dict.fromkeys(HUNDRED, 2)),
        "set_many of 500": lambda cache: cache.set_many({f"n{number}": 2 for number in range(500)}),
        "delete": lambda cache: cache.delete("k1"),
        "delete of what is not there": lambda cache: cache.delete("absent"),
        "delete_many of 100": lambda cache: cache.delete_many(HUNDRED),
        "add": lambda cache: cache.add("absent", 2),
        "incr": lambda cache: cache.incr("k1"),
        "touch": lambda cache: cache.touch("k1", 60),
        "refresh": lambda cache: cache.refresh("k1", lambda: 2),
        "expire": lambda cache: cache.expire("k1"),
        "expire_tags": lambda cache: cache.expire_tags("all"),
        "invalidate_prefix": lambda cache: cache.invalidate_prefix("k"),
        "clear": lambda cache: cache.clear(),
    }

    @pytest.mark.parametrize("act", ACTS)
    def test_is_what_it_costs(self, cache, published, act):
        """One announcement, whatever the number of keys."""
        before = published()
        assert self.ACTS[act](cache) is not None
        assert published() == before + 1

    @pytest.mark.parametrize("tags", [["all"], ["all", "other"]], ids=["one tag", "two tags"])
    def test_is_what_a_tag_costs(self, cache, published, tags):
        """A tag of a thousand entries, on the server or in this process, costs what a tag of none costs."""
        for first in range(0, 1000, 500):
            cache.set_many({f"t{number}": 1 for number in range(first, first + 500)}, tags=["all"])
        before = published()
        assert cache.invalidate_tags(*tags)
        assert published() == before + 1
        assert cache.get_many([f"t{number}" for number in range(1000)]) == {}

    def test_comes_for_each_500_keys(self, cache, published):
        """Redis serves nobody else while a script runs, so very many keys are written in steps."""
        before = published()
        cache.set_many({f"n{number}": 2 for number in range(1001)})
        assert published() == before + 3


class TestNoMessage:
    ACTS: ClassVar[dict[str, Act]] = {
        "get": lambda cache: cache.get("k1"),
        "get of what is not there": lambda cache: cache.get("absent"),
        "get_many": lambda cache: cache.get_many([*HUNDRED, "absent"]),
        "exists": lambda cache: cache.exists("absent"),
        "ttl": lambda cache: cache.ttl("k1"),
        "fill": lambda cache: cache.get_or_set("absent", lambda: 2),
        "fill with tags": lambda cache: cache.get_or_set("absent", lambda: 2, tags=["a"]),
        "fill of 100": lambda cache: cache.get_or_set_many(
            [f"n{k}" for k in HUNDRED], lambda keys: dict.fromkeys(keys, 2)
        ),
        "fill after a delete": lambda cache: cache.get_or_set("k0", lambda: 2),
        "add that is refused": lambda cache: cache.add("k1", 2),
        "touch of what is not there": lambda cache: cache.touch("absent", 60),
        "a token's way": lambda cache: cache.barrier(cache.token()),
    }

    @pytest.mark.parametrize("act", ACTS)
    def test_is_sent(self, cache, published, act):
        """Nobody holds an older value, so nobody is told."""
        cache.delete("k0")
        before = published()
        self.ACTS[act](cache)
        assert published() == before

    def test_of_a_heartbeat(self, cache, published):
        """A process that only listens publishes nothing, however often it asks for a proof."""
        before = published()
        proofs = cache._parts.tier.coherence._proof_at
        wait_until(lambda: cache._parts.tier.coherence._proof_at > proofs)
        assert published() == before

    def test_of_a_fill_that_is_stored(self, cache, redis_server, published):
        """The fill above does reach Redis: silence is not failure."""
        before = published()
        assert cache.get_or_set("absent", lambda: 2) == 2
        assert cache.stats()["fills"] == 1
        with create_cache_manager(redis_url=redis_server.url) as other:
            assert other.get("absent") == 2
        assert published() == before


class TestByHand:
    def test_anything_on_the_channel_empties_every_l1(self, redis_server):
        """After ``redis-cli DEL`` every process serves its copy; one word of anything on the channel ends that."""
        settings = {"staleness_bound": 30, "heartbeat_interval": 10, "tombstone_ttl": 300}
        with (
            redis_server.client() as client,
            create_cache_manager(redis_url=redis_server.url, **settings) as one,
            create_cache_manager(redis_url=redis_server.url, **settings) as other,
        ):
            for cache in (one, other):
                cache.warm()
                wait_until(lambda cache=cache: cache.stats()["lease"] == "held", what="a lease")
            one.set("k", 1)
            wait_until(lambda: other.get("k") == 1 and other.stats()["l1_hits"])
            names = RedisNames("default")
            assert client.delete(names.value("k")) == 1
            assert (one.get("k"), other.get("k")) == (1, 1)
            assert client.publish(names.channel, "anything") == 2
            wait_until(lambda: (one.get("k", MISS), other.get("k", MISS)) == (MISS, MISS), 2)

    def test_the_readme_names_the_channel(self):
        """What people are told to type is the name that is listened to."""
        assert f"PUBLISH '{RedisNames('NAMESPACE').channel}' " in (ROOT / "README.md").read_text("utf-8")
