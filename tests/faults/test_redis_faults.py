"""What the naive protocol gets wrong when Redis, the network or a process fails: forced, and held to the bounds."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from celery_mlcache import MISS, CacheManager, create_cache_manager
from celery_mlcache.config import CacheConfig
from celery_mlcache.factory import assemble
from celery_mlcache.keys import RedisNames
from tests.faults.actors import Actor, Watch
from tests.support.ports import free_port
from tests.support.proxy import Proxy
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.redis

DELTA = 0.3  # staleness_bound here
BOUND = DELTA + 0.15  # and what a shared machine adds between a look at the clock and an answer
Make = Callable[..., CacheManager]
NAMES = RedisNames("default")


@pytest.fixture
def make(redis_server) -> Iterator[Make]:
    """Make managers on the test's own server; each stands for a process."""
    made: list[CacheManager] = []

    def make(url: str | None = None, *, wait: bool = True, **overrides) -> CacheManager:
        settings = {"redis_url": url or redis_server.url, "staleness_bound": DELTA, "circuit_reset": 0.2, **overrides}
        manager = create_cache_manager(**settings)
        made.append(manager)
        manager.warm()
        if wait:
            wait_until(lambda: is_held(manager), what="a lease")
        return manager

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


def recovered(*caches: CacheManager) -> None:
    """Wait until all work as if nothing had happened: lease, hits in L1, invalidation."""
    writer = caches[0]
    number = time.monotonic()

    def is_well() -> bool:
        return bool(
            writer.set("health", number)
            and all(cache.get("health") == number for cache in caches)
            and is_held(*caches)
            and all(hits_l1(cache, "health") for cache in caches)
        )

    wait_until(is_well, 8, what="recovery")
    writer.set("health", "again")
    wait_until(lambda: all(cache.get("health") == "again" for cache in caches), BOUND, what="an invalidation")


class TestLostMessages:
    def test_a_killed_subscription(self, redis_server, make):
        """CLIENT KILL TYPE pubsub among 1 s of writes: no answer is older than the bound."""
        writer, reader = make(), make()
        with Watch(reader, BOUND) as watch:
            for _ in range(5):
                watch.write_for(writer.set, 0.1)
                redis_server.kill_pubsub()
                watch.write_for(writer.set, 0.1)
            recovered(writer, reader)
        assert reader.stats()["subscription_losses"] >= 3

    def test_pushes_that_are_swallowed(self, make, proxy):
        """A proxy that drops every message for 1 s: found out by the heartbeat, within the bound."""
        writer, reader = make(), make(proxy.url)
        with Watch(reader, BOUND) as watch:
            watch.write_for(writer.set, 0.2)
            proxy.drop_push()
            watch.write_for(writer.set, 1.0)
            assert proxy.dropped > 10
            proxy.drop_push(0)
            watch.write_for(writer.set, 0.2)
            recovered(writer, reader)
        assert reader.stats()["gaps"].get("lost", 0) >= 1

    def test_a_single_push_that_is_swallowed(self, make, proxy):
        """One lost message is found out by the next one's stamp at once, or by the next heartbeat."""
        writer, reader = make(), make(proxy.url)
        for number in range(5):
            writer.set("k", number)
            wait_until(lambda number=number: reader.get("k") == number and hits_l1(reader, "k"), 2)
            proxy.drop_push(1)
            writer.set("k", "lost")
            wait_until(lambda: reader.get("k") == "lost", BOUND)
            proxy.drop_push(0)
        assert proxy.dropped == 5

    def test_a_slow_network(self, make, proxy):
        """Messages that are half the bound late make no answer older than the bound."""
        writer, reader = make(), make(proxy.url)
        with Watch(reader, BOUND) as watch:
            proxy.delay(DELTA / 2, "reply")
            watch.write_for(writer.set, 1.0)
            proxy.delay(0)
            recovered(writer, reader)

    @pytest.mark.parametrize("verb", ["drop", "reset", "half_close", "cut", "deaf"])
    def test_a_broken_network(self, make, proxy, verb):
        """However the connections break, no answer is older than the bound, and it heals by itself."""
        writer, reader = make(), make(proxy.url)
        with Watch(reader, BOUND + 0.3) as watch:  # a look-up itself may wait for one socket timeout
            watch.write_for(writer.set, 0.1)
            getattr(proxy, verb)()
            watch.write_for(writer.set, 0.7)
            proxy.mend()
            recovered(writer, reader)


class TestAllAtOnce:
    def test_reads_never_go_backward(self, redis_server, make, proxy):
        """Random faults for 3 s, one writer on three processes: own writes are read, and no reader goes backward."""
        caches = [make(), make(proxy.url), make(proxy.url)]
        stop, bad, rng = threading.Event(), [], random.Random(7)

        def read(cache: CacheManager) -> None:
            newest = 0
            while not stop.wait(0.0005):
                got = cache.get("k", MISS)
                if got is not MISS:
                    if got < newest:
                        bad.append(("backward", newest, got))
                    newest = got

        def write() -> None:
            number = 0
            while not stop.wait(0.002):
                number += 1
                cache = caches[number % 3]
                if cache.set("k", number) and cache.get("k", number) < number:
                    bad.append(("own write not read", number))

        threads = [threading.Thread(target=read, args=(cache,)) for cache in caches] + [threading.Thread(target=write)]
        for thread in threads:
            thread.start()
        faults: list[Callable[[], object]] = [
            proxy.drop,
            proxy.reset,
            proxy.half_close,
            lambda: proxy.drop_push(3),
            redis_server.kill_pubsub,
            lambda: (proxy.deaf(), stop.wait(2 * DELTA), proxy.drop(), proxy.mend()),
        ]
        end = time.monotonic() + 3
        while time.monotonic() < end:
            rng.choice(faults)()
            stop.wait(rng.random() * DELTA)
        stop.set()
        for thread in threads:
            thread.join(10)
        assert not bad
        proxy.mend()
        recovered(*caches)


class TestLapsedLease:
    @pytest.fixture
    def split(self, redis_server, proxy) -> Iterator[Callable[..., CacheManager]]:
        """Make a manager whose backplane goes through the proxy, and whose commands do not."""
        made = []

        def split(**overrides) -> CacheManager:
            direct, broken = (
                CacheConfig(redis_url=url, staleness_bound=DELTA, **overrides) for url in (redis_server.url, proxy.url)
            )
            manager = CacheManager(lambda: replace(assemble(direct), backplane=assemble(broken).backplane))
            made.append(manager)
            manager.warm()
            wait_until(lambda: is_held(manager))
            return manager

        yield split
        for manager in made:
            manager.close()

    def test_bypass(self, make, proxy, split):
        """Deaf backplane: after the bound L1 is not asked any more, and L2 answers; then it heals."""
        writer, reader = make(), split()
        with Watch(reader, BOUND) as watch:
            watch.write_for(writer.set, 0.1)
            proxy.deaf()
            watch.write_for(writer.set, 2 * DELTA)
            assert reader.stats()["lease"] == "lapsed"
            bypassed = reader.stats()["bypassed"]
            watch.write_for(writer.set, 0.1)
            assert reader.stats()["bypassed"] > bypassed
            assert not hits_l1(reader, "watched")
            proxy.drop()
            proxy.mend()
            recovered(writer, reader)
        assert reader.stats()["stale_served"] == 0

    def test_own_writes_show_while_the_lease_has_lapsed(self, proxy, split):
        """Without a lease a process still reads what it wrote, and reads never go backward."""
        cache = split()
        cache.set("k", 0)
        proxy.deaf()
        wait_until(lambda: not is_held(cache))
        for number in range(1, 20):
            assert cache.set("k", number)
            assert cache.get("k") == number
        proxy.drop()
        proxy.mend()
        wait_until(lambda: is_held(cache), 5)
        for _ in range(20):
            assert cache.get("k") == 19

    def test_serve(self, make, proxy, split):
        """``serve``: L1 goes on answering, each time counted, for max_stale seconds and no longer."""
        writer, reader = make(), split(on_disconnect="serve", max_stale=1.0)
        writer.set("k", "old")
        wait_until(lambda: reader.get("k") == "old" and hits_l1(reader, "k"))
        proxy.deaf()
        began = time.monotonic()
        wait_until(lambda: not is_held(reader))
        writer.set("k", "new")
        assert reader.get("k") == "old"
        assert reader.stats()["stale_served"] == 1
        wait_until(lambda: reader.get("k") == "new", 3)
        assert 0.5 < time.monotonic() - began < 1.0 + 0.3
        assert reader.stats()["stale_served"] >= 1

    def test_serve_obeys_barriers(self, make, proxy, split):
        """``serve`` or not: after a barrier nothing older than the token is answered."""
        writer, reader = make(), split(on_disconnect="serve", max_stale=30)
        writer.set("k", "old")
        wait_until(lambda: reader.get("k") == "old" and hits_l1(reader, "k"))
        proxy.deaf()
        wait_until(lambda: not is_held(reader))
        writer.set("k", "new")
        assert reader.get("k") == "old"
        reader.barrier(writer.token())
        assert reader.get("k") == "new"
        assert reader.get_many(["k"]) == {"k": "new"}
        assert reader.get_or_set("k", lambda: "loaded") == "new"

    def test_serve_never_answers_what_this_process_replaced(self, make, proxy, split):
        """``serve``: a process's own write, taken by L2 or not, ends its own old copy."""
        reader = split(on_disconnect="serve", max_stale=30)
        reader.set("k", "old")
        reader.set("d", "old")
        wait_until(lambda: hits_l1(reader, "k"))
        proxy.deaf()
        wait_until(lambda: not is_held(reader))
        reader.set("k", "new")
        reader.delete("d")
        assert reader.get("k") == "new"
        assert reader.get("d", MISS) is MISS

    def test_a_barrier_waits_for_the_message(self, make, proxy):
        """A token from a sender that is ahead of this process's messages withdraws the lease until they come."""
        writer, reader = make(), make(proxy.url, staleness_bound=10, heartbeat_interval=5, tombstone_ttl=100)
        writer.set("k", "old")
        wait_until(lambda: reader.get("k") == "old" and hits_l1(reader, "k"))
        proxy.drop_push()
        writer.set("k", "new")
        assert reader.get("k") == "old"  # within its bound of 10 s
        reader.barrier(writer.token())
        assert reader.get("k") == "new"
        assert reader.get("k") == "new"


class TestFrozenRedis:
    def test_freeze_and_thaw(self, redis_server, make):
        """Frozen: L1 answers until the bound, then misses; thawed: what was sent late is agreed on by all."""
        a, b = make(), make()
        a.set("k", "old")
        wait_until(lambda: b.get("k") == "old" and hits_l1(b, "k"))
        redis_server.freeze()
        frozen_at = time.monotonic()
        assert b.get("k") == "old"
        wait_until(lambda: b.get("k", MISS) is MISS, 2)
        assert time.monotonic() - frozen_at < BOUND + 0.5
        assert a.set("k", "late") is False
        assert a.get("k", MISS) is MISS
        assert b.get_or_set("k", lambda: "loaded") == "loaded"
        assert a.stats()["writes_dropped"] == 1
        redis_server.thaw()
        recovered(a, b)
        truth = make(l1_enabled=False).get("k", MISS)
        assert truth in {"late", "old"}
        assert a.get("k", MISS) == b.get("k", MISS) == truth
        assert {a.stats()["circuit"], b.stats()["circuit"]} == {"closed"}

    def test_writes_that_time_out_are_never_contradicted(self, redis_server, make):
        """Delete, frozen: it may happen at the thaw, and no L1 then answers with the value from before."""
        a, b = make(), make()
        a.set("k", "old")
        wait_until(lambda: b.get("k") == "old" and hits_l1(b, "k"))
        redis_server.freeze()
        assert a.delete("k") is False
        redis_server.thaw()
        recovered(a, b)
        truth = make(l1_enabled=False).get("k", MISS)
        assert a.get("k", MISS) == b.get("k", MISS) == truth

    def test_a_process_that_was_stopped(self, shared_redis, redis_server, make):
        """SIGSTOP of the process itself: its first answer afterwards is not older than the bound."""
        writer = make()
        with Actor(shared_redis, redis_url=redis_server.url, staleness_bound=DELTA) as actor:
            for number in range(3):
                writer.set("k", number)
                wait_until(lambda number=number: actor.call("get", "k") == number)
                before = actor.call("stats")["l1_hits"]
                actor.call("get", "k")
                wait_until(
                    lambda before=before: actor.call("get", "k") is not None and actor.call("stats")["l1_hits"] > before
                )
                actor.stop_running()
                writer.set("k", "new")
                stopped = time.monotonic()
                actor.order("get", "k")
                wait_until(lambda stopped=stopped: time.monotonic() > stopped + 2 * DELTA)
                actor.go_on()
                assert actor.answer() == "new"

    @pytest.mark.timeout(60)
    def test_a_process_stopped_for_2_s(self, shared_redis, redis_server, make):
        """The same with the default bound, and 2 s."""
        writer = make(staleness_bound=1.0)
        with Actor(shared_redis, redis_url=redis_server.url) as actor:
            writer.set("k", "old")
            wait_until(lambda: actor.call("get", "k") == "old")
            actor.stop_running()
            writer.set("k", "new")
            stopped = time.monotonic()
            actor.order("get", "k")
            wait_until(lambda: time.monotonic() > stopped + 2)
            actor.go_on()
            assert actor.answer() == "new"


class TestLostData:
    def test_restarted_empty(self, redis_server, make):
        """An empty Redis: L1's answers end within the bound, everyone starts anew, and agrees."""
        a, b = make(), make()
        a.set("k", "old")
        wait_until(lambda: b.get("k") == "old" and hits_l1(b, "k"))
        redis_server.restart_empty()
        wait_until(lambda: b.get("k", MISS) is MISS, 3)
        assert b.add("k", "new") or b.set("k", "new")
        recovered(a, b)
        assert a.get("k") == b.get("k") == "new"
        assert b.stats()["subscription_losses"] >= 1

    def test_restarted_with_data(self, redis_server, make):
        """A Redis that comes back as it was: nobody disagrees with it, and the stamps go on."""
        a, b = make(), make()
        for number in range(50):
            a.set(f"k{number}", number)
        redis_server.restart()
        recovered(a, b)
        keys = [f"k{number}" for number in range(50)]
        truth = make(l1_enabled=False).get_many(keys)
        assert a.get_many(keys) == b.get_many(keys) == truth
        assert truth == {} or len(truth) == 50

    def test_restarted_with_older_data(self, redis_server, make):
        """A restart that loses the last writes: nobody goes on answering what is lost, beyond the bound."""
        a, b = make(), make()
        a.set("k", "saved")
        redis_server.save()
        a.set("k", "lost")
        a.delete("other")
        wait_until(lambda: b.get("k") == "lost" and hits_l1(b, "k"))
        redis_server.kill()
        redis_server.start()
        recovered(a, b)
        truth = make(l1_enabled=False).get("k", MISS)
        assert truth in {"saved", MISS}
        assert a.get("k", MISS) == b.get("k", MISS) == truth

    @pytest.mark.parametrize("key", ["counter", "floor", "both", "everything"])
    def test_lost_control_keys(self, redis_server, make, key):
        """A counter or floor that vanishes (eviction, DEL, FLUSHALL) makes nobody disagree or run backward."""
        a, b = make(), make()
        client = redis_server.client()
        for number in range(3):
            a.set("k", ["old", number])
            wait_until(lambda number=number: b.get("k") == ["old", number] and hits_l1(b, "k"), 3)
            before = a.token()
            names = {"counter": [NAMES.counter], "floor": [NAMES.floors], "both": [NAMES.counter, NAMES.floors]}
            if key == "everything":
                redis_server.flushall()
            else:
                client.delete(*names[key])
            # The stored value may be dead now, or not; but within the bound all say the same.
            lost_at = time.monotonic()
            wait_until(lambda lost_at=lost_at: time.monotonic() > lost_at + BOUND)
            truth = make(l1_enabled=False).get("k", MISS)
            assert a.get("k", MISS) == b.get("k", MISS) == truth
            assert b.set("k", "new")
            assert b.get("k") == "new"
            wait_until(lambda: a.get("k") == "new", BOUND)
            assert int(b.token().split("@")[1]) > int(before.split("@")[1])
            recovered(a, b)

    def test_flushall_while_fills_are_in_flight(self, redis_server, make):
        """A FLUSHALL between a miss and its fill: the fill is refused, for nobody can know what it overtook."""
        a, b = make(), make()
        a.set("seed", 1)

        def loader():
            redis_server.flushall()
            return "old"

        assert a.get_or_set("k", loader) == "old"
        assert b.get("k", MISS) is MISS
        recovered(a, b)

    def test_flushall_and_delete_while_a_fill_is_in_flight(self, redis_server, make):
        """A FLUSHALL takes the tombstone away; the fill that the tombstone would have refused is refused still."""
        a, b = make(), make()
        a.set("seed", 1)

        def loader():
            b.delete("k")
            redis_server.flushall()
            b.set("other", 1)  # seeds the counter again
            return "old"

        assert a.get_or_set("k", loader) == "old"
        assert b.get("k", MISS) is MISS
        assert a.get("k", MISS) is MISS

    def test_flushall_under_load(self, redis_server, make):
        """Fills, writes and FLUSHALLs at once: no error, and all agree afterwards."""
        caches = [make() for _ in range(3)]
        stop = threading.Event()
        errors: list[BaseException] = []

        def work(cache: CacheManager, number: int) -> None:
            try:
                while not stop.is_set():
                    for key in ("x", "y"):
                        cache.get_or_set(key, lambda: number)
                        cache.set(key, number)
                        cache.delete(key)
            except BaseException as exc:
                errors.append(exc)

        threads = [threading.Thread(target=work, args=(cache, number)) for number, cache in enumerate(caches)]
        for thread in threads:
            thread.start()
        for _ in range(10):
            redis_server.flushall()
            stop.wait(0.05)
        stop.set()
        for thread in threads:
            thread.join(10)
        assert not errors
        recovered(*caches)
        truth = make(l1_enabled=False).get_many(["x", "y"])
        assert all(cache.get_many(["x", "y"]) == truth for cache in caches)

    def test_an_evicting_server(self):
        """A Redis that evicts anything, control keys too: every answer is right or a miss, nothing raises."""
        with (
            RedisServer("--maxmemory", "3mb", "--maxmemory-policy", "allkeys-random") as server,
            create_cache_manager(redis_url=server.url, staleness_bound=DELTA) as a,
            create_cache_manager(redis_url=server.url, staleness_bound=DELTA) as b,
        ):
            payload = "x" * 20_000
            wrong = []
            for number in range(1500):
                key = f"k{number % 300}"
                a.set(key, [number, payload])
                got = b.get(key, MISS)
                if got is not MISS and got[0] > number:
                    wrong.append((key, got[0]))
            assert not wrong
            assert server.client().info("stats")["evicted_keys"] > 0
            latest = {f"k{number % 300}": number for number in range(1500)}
            settled = time.monotonic()
            wait_until(lambda: time.monotonic() > settled + BOUND)
            for cache in (a, b):
                for key, number in latest.items():
                    got = cache.get(key, MISS)
                    assert got is MISS or got[0] == number
            assert a.stats()["l2_errors"] == b.stats()["l2_errors"] == 0


class TestGoneRedis:
    def test_down_at_the_start(self, make):
        """Redis is not there yet: nothing waits long, everything works without it, and it is found by itself."""
        with RedisServer() as server:
            server.kill()
            cache = make(server.url, wait=False)
            began = time.monotonic()
            assert cache.get("k", MISS) is MISS
            assert cache.set("k", 1) is False
            assert cache.get_or_set("k", lambda: 2) == 2
            assert time.monotonic() - began < 1
            wait_until(lambda: cache.stats()["backplane"] == "down")
            server.start()
            recovered(cache)
            stats = cache.stats()
            assert (stats["circuit"], stats["backplane"]) == ("closed", "up")
            assert stats["l2_errors"] > 0
            assert stats["writes_dropped"] >= 1

    def test_dying_mid_run(self, redis_server, make):
        """Redis dies under load: no exception, counters that tell, recovery without help."""
        a, b = make(), make()
        a.set("k", 1)
        stop, errors = threading.Event(), []

        def work(cache: CacheManager) -> None:
            try:
                number = 0
                while not stop.is_set():
                    number += 1
                    cache.set("k", number)
                    cache.get("k")
                    cache.get_or_set(f"x{number % 7}", lambda number=number: number)
                    cache.incr("n")
                    cache.delete(f"x{number % 5}")
            except BaseException as exc:
                errors.append(exc)

        threads = [threading.Thread(target=work, args=(cache,)) for cache in (a, b, a)]
        for thread in threads:
            thread.start()
        stop.wait(0.2)
        redis_server.kill()
        wait_until(lambda: a.stats()["circuit"] != "closed" and b.stats()["circuit"] != "closed")
        stats = a.stats()
        assert stats["writes_dropped"] > 0
        assert stats["l2_errors"] > 0
        wait_until(lambda: a.stats()["l2_rejected"] > 0)
        wait_until(lambda: {a.stats()["backplane"], b.stats()["backplane"]} == {"down"})
        redis_server.start()
        wait_until(lambda: a.stats()["circuit"] == "closed" and b.stats()["circuit"] == "closed", 5)
        stop.set()
        for thread in threads:
            thread.join(10)
        assert not errors
        recovered(a, b)

    def test_logs_once_for_each_change(self, redis_server, make, caplog):
        """An outage is one line for each thing that changed, not one for each call."""
        cache = make()
        caplog.set_level("INFO", "celery_mlcache")
        caplog.clear()
        redis_server.kill()
        wait_until(lambda: cache.stats()["backplane"] == "down")
        for _ in range(200):
            cache.set("k", 1)
            cache.get("k")
        wait_until(lambda: cache.stats()["circuit"] == "open")
        redis_server.start()
        recovered(cache)
        texts = [re.split(r":| \(", record.getMessage())[0] for record in caplog.records]
        assert sorted(set(texts)) == sorted(texts)
        states = ["backplane is down", "backplane is up", "circuit is open", "circuit is closed"]
        assert {f"the cache's {state}" for state in states} == set(texts)

    def test_a_port_that_nobody_listens_on_costs_no_cpu(self):
        """A Redis that never comes is tried for with pauses."""
        with create_cache_manager(redis_host="127.0.0.1", redis_port=free_port()) as cache:
            began = (time.monotonic(), time.process_time())
            cache.warm()
            wait_until(lambda: time.monotonic() > began[0] + 1)
            assert time.process_time() - began[1] < 0.3


class TestOtherProcesses:
    def test_a_writer_killed_among_its_writes(self, shared_redis, redis_server, make):
        """SIGKILL of a writer leaves no process with a value that L2 has not."""
        readers = [make(), make()]
        remote = make(l1_enabled=False)
        for _ in range(2):
            with Actor(shared_redis, redis_url=redis_server.url, staleness_bound=DELTA) as actor:
                actor.order("write_for", 5)
                for reader in readers:
                    wait_until(lambda reader=reader: reader.get("watched"))
                actor.kill()
            wait_until(lambda: remote.get("watched") == readers[0].get("watched") == readers[1].get("watched"), BOUND)
            remote.delete("watched")

    def test_processes_agree(self, shared_redis, redis_server):
        """Three processes, one key: each sees the others' writes within the bound, and tokens make it at once."""
        settings = {"redis_url": redis_server.url, "staleness_bound": DELTA}
        with Actor(shared_redis, **settings) as a, Actor(shared_redis, **settings) as b:
            for number in range(30):
                a.call("set", "k", number)
                b.call("barrier", a.call("token"))
                assert b.call("get", "k") == number
                b.call("delete", "k")
                a.call("barrier", b.call("token"))
                assert a.call("get", "k") is None

    def test_foreign_writes_show_after_l1s_life(self, redis_server, make):
        """The documented limit: a foreign DEL is not announced, and shows when L1's copy ends."""
        cache = make(l1_ttl=0.4)
        cache.set("k", 1)
        redis_server.client().delete(NAMES.value("k"))
        wait_until(lambda: cache.get("k", MISS) is MISS, 0.4 + BOUND)


@pytest.mark.filterwarnings("ignore:LIB_CACHE_SYNC_ENABLED is off")
def test_the_watch_sees_a_cache_without_the_protocol(make):
    """The watch itself: with invalidation switched off, it does find answers that are too old."""
    writer, reader = make(), make(cache_sync_enabled=False)
    with pytest.raises(AssertionError, match="too old"), Watch(reader, BOUND) as watch:
        watch.write_for(writer.set, 3 * BOUND)


def test_the_proxy_is_what_is_tested(proxy: Proxy, make):
    """Both connections of a manager go through the proxy."""
    cache = make(proxy.url)
    cache.set("k", 1)
    assert proxy.accepted == 2
