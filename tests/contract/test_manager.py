"""What a user may rely on from CacheManager, on every wiring; real Redis, no fakes but the one that forbids."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from math import inf, nan
from typing import ClassVar, NamedTuple
from uuid import UUID

import pytest

from celery_mlcache import MISS, CacheManager, create_cache_manager
from celery_mlcache.config import CacheConfig
from celery_mlcache.errors import (
    CacheClosedError,
    CacheKeyError,
    NotAnIntegerError,
    RemoteStoreError,
    SerializationError,
)
from celery_mlcache.factory import assemble
from celery_mlcache.keys import RedisNames
from celery_mlcache.wire import HEAD_SIZE
from tests.support.ports import free_port
from tests.support.waiting import wait_until

pytestmark = pytest.mark.redis

WIRINGS = {
    "both": {},
    "l2": {"l1_enabled": False},
    "moka": {"l2_enabled": False, "l1_backend": "moka"},
    "cacheout": {"l2_enabled": False, "l1_backend": "cacheout"},
}
OFF = {"cache_enabled": False}
SIGNED = {"signing_keys": ("k" * 32,)}
WITH_L2 = ["both", "l2"]
Make = Callable[..., CacheManager]


@pytest.fixture
def make(shared_redis, namespace) -> Iterator[Make]:
    """Make managers of one namespace, ready to answer; closed at the end."""
    made: list[CacheManager] = []

    def make(wiring: str = "both", **overrides) -> CacheManager:
        settings = {"redis_url": shared_redis.url, "cache_namespace": namespace, **WIRINGS[wiring], **overrides}
        manager = create_cache_manager(**settings)
        made.append(manager)
        return ready(manager)

    yield make
    for manager in made:
        manager.close()


@pytest.fixture(params=WIRINGS)
def wiring(request) -> str:
    """Each wiring's name."""
    return str(request.param)


@pytest.fixture
def cache(make, wiring) -> CacheManager:
    """A manager of each wiring."""
    return make(wiring)


@pytest.fixture
def both(make) -> CacheManager:
    """A manager of both levels."""
    return make("both")


@pytest.fixture
def off(make) -> Iterator[CacheManager]:
    """A manager that is switched off."""
    with create_cache_manager(**OFF) as manager:
        yield manager


def ready(manager: CacheManager) -> CacheManager:
    """Build it and wait for its first lease."""
    manager.warm()
    wait_until(lambda: manager.stats()["lease"] == "held", what="a lease")
    return manager


def never() -> object:
    """A loader that must not run."""
    raise AssertionError("the loader ran")


class Untouchable:
    """L2 that fails the test when it is asked anything."""

    def __getattr__(self, name):
        raise AssertionError(f"L2 was asked to {name}")

    def close(self) -> None:
        """Closing is allowed."""


def forbid_l2(manager: CacheManager) -> None:
    """From now on, L2 must not be asked."""
    assert manager._parts is not None
    manager._parts = replace(manager._parts, remote=Untouchable())


def in_threads(count: int, work: Callable[[int], object]) -> list[object]:
    """Run *work* in *count* threads and return what each returned or raised, in order."""
    results: list[object] = [None] * count

    def run(number: int) -> None:
        try:
            results[number] = work(number)
        except BaseException as exc:
            results[number] = exc

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "a thread hangs"
    return results


class Background:
    """One call on a thread of its own."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._result: object = None
        self._work = work
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as exc:
            self._result = exc

    def result(self, timeout: float = 5.0) -> object:
        """Return what it returned or raised."""
        self._thread.join(timeout)
        assert not self._thread.is_alive(), "the call hangs"
        return self._result


class BlockedLoader:
    """A loader that says when it has begun and ends when told."""

    def __init__(self, value: object) -> None:
        self.value = value
        self.has_begun, self.may_end = threading.Event(), threading.Event()

    def __call__(self) -> object:
        self.has_begun.set()
        assert self.may_end.wait(10)
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value


class TestGetSetDelete:
    def test_a_miss_is_the_callers_default(self, cache):
        """A miss is None, the default given, or MISS where asked for."""
        assert cache.get("k") is None
        assert cache.get("k", 7) == 7
        assert cache.get("k", MISS) is MISS

    @pytest.mark.parametrize("value", [None, False, 0, "", b"", [], {}, 0.0, ()])
    def test_falsy_values_are_values(self, cache, value):
        """What is falsy, None included, is not a miss."""
        assert cache.set("k", value) is True
        got = cache.get("k", MISS)
        assert got == value
        assert type(got) is type(value)
        assert "k" in cache
        assert cache.get_or_set("k", never) == value

    def test_a_value_is_replaced(self, cache):
        """The last write of a thread is what it reads."""
        for value in (1, "two", [3]):
            cache.set("k", value)
            assert cache.get("k") == value

    def test_delete(self, cache):
        """Delete removes, and says whether there was something."""
        cache.set("k", 1)
        assert cache.delete("k") is True
        assert cache.get("k", MISS) is MISS
        assert "k" not in cache
        assert cache.delete("k") is False

    def test_exists(self, cache):
        """``exists`` and ``in`` ask for a live value."""
        assert cache.exists("k") is False
        cache.set("k", None)
        assert cache.exists("k") is True
        assert "k" in cache

    def test_add_stores_once(self, cache):
        """``add`` stores only where nothing lives."""
        assert cache.add("k", 1) is True
        assert cache.add("k", 2) is False
        assert cache.get("k") == 1
        cache.delete("k")
        assert cache.add("k", 3) is True
        assert cache.get("k") == 3

    @pytest.mark.parametrize("wiring", WITH_L2)
    def test_add_is_atomic_over_threads(self, make, wiring):
        """Of 8 threads that add, one wins, and its value stays."""
        cache = make(wiring)
        results = in_threads(8, lambda number: cache.add("k", number))
        assert sorted(results) == [False] * 7 + [True]
        assert cache.get("k") == results.index(True)

    def test_keys_do_not_mix(self, cache):
        """Keys that look alike are different keys."""
        keys = ["a", "A", "a ", " a", "a:b", "a/b", "{a}", "ä", "a\u0308", "🦆", "%61", "\\n", "*"]
        for number, key in enumerate(keys):
            cache.set(key, number)
        assert [cache.get(key) for key in keys] == list(range(len(keys)))

    def test_keys_of_1024_bytes_are_keys(self, cache):
        """1024 bytes of UTF-8 are allowed, whatever the characters."""
        for key in ("x" * 1024, "é" * 512):
            cache.set(key, 1)
            assert cache.get(key) == 1


class TestManyKeys:
    def test_get_many_returns_what_is_there(self, cache):
        """Keys without a value are absent; each key counts once, in the order asked."""
        cache.set("a", 1)
        cache.set("b", None)
        assert cache.get_many(["b", "a", "x", "a"]) == {"b": None, "a": 1}
        assert cache.get_many([]) == {}
        assert cache.get_many(iter(["a"])) == {"a": 1}

    def test_set_many(self, cache):
        """All are stored; storing nothing is fine."""
        assert cache.set_many({"a": 1, "b": [2]}, ttl=50) is True
        assert (cache.get("a"), cache.get("b")) == (1, [2])
        assert cache.set_many({}) is True

    def test_more_than_a_batch(self, cache):
        """More keys than one script takes behave alike."""
        many = {f"k{number}": number for number in range(1201)}
        assert cache.set_many(many)
        assert cache.get_many(many) == many
        assert cache.delete_many(many) == 1201
        assert cache.get_many(many) == {}

    def test_set_many_checks_everything_first(self, cache):
        """One value that cannot be stored, and nothing is."""
        with pytest.raises(SerializationError):
            cache.set_many({"a": 1, "b": object()})
        with pytest.raises(CacheKeyError):
            cache.set_many({"a": 1, "": 2})
        assert cache.get("a", MISS) is MISS

    def test_delete_many_counts_the_living(self, cache):
        """The number is that of live values; a key named twice counts once."""
        cache.set_many({"a": 1, "b": 2})
        assert cache.delete_many(["a", "a", "b", "x"]) == 2
        assert cache.get_many(["a", "b"]) == {}
        assert cache.delete_many([]) == 0

    def test_get_or_set_many_loads_what_is_missing(self, cache):
        """The loader gets the missing keys, in order; its surplus is ignored, its lack is absent."""
        cache.set("b", 2)
        asked = []

        def loader(keys):
            asked.append(keys)
            return {"a": 1, "c": None, "surplus": 9}

        assert cache.get_or_set_many(["a", "b", "c", "lack", "a"], loader) == {"a": 1, "b": 2, "c": None}
        assert asked == [["a", "c", "lack"]]
        assert cache.get("a") == 1
        assert cache.get("surplus", MISS) is MISS
        assert cache.get_or_set_many(["a", "b", "c"], lambda keys: never()) == {"a": 1, "b": 2, "c": None}
        assert cache.get_or_set_many([], lambda keys: never()) == {}

    def test_get_or_set_many_passes_exceptions(self, cache):
        """What the loader raises is raised, unchanged."""
        error = KeyError("mine")

        def loader(keys):
            raise error

        with pytest.raises(KeyError) as caught:
            cache.get_or_set_many(["a"], loader)
        assert caught.value is error


class TestGetOrSet:
    def test_loads_once(self, cache):
        """The loader runs on a miss only, None included."""
        for key, value in (("a", 1), ("b", None)):
            assert cache.get_or_set(key, lambda value=value: value) == value
            assert cache.get_or_set(key, never) == value
            assert cache.get(key, MISS) == value

    def test_is_seen_by_every_level(self, make):
        """What one manager loads, another of the namespace finds."""
        make("both").get_or_set("k", lambda: [1])
        assert make("l2").get("k") == [1]
        assert make("both").get_or_set("k", never) == [1]

    def test_ttl_of_the_result(self, cache):
        """The life given is the life of the loaded value."""
        cache.get_or_set("k", lambda: 1, ttl=50)
        assert 48 < cache.ttl("k") <= 50

    def test_a_write_during_the_load_wins(self, cache):
        """What was written while the loader ran is neither overwritten nor hidden."""

        def loader():
            cache.set("k", "written")
            return "loaded"

        cache.get_or_set("k", loader)
        assert cache.get("k") == "written"

    def test_a_delete_during_the_load_wins(self, cache):
        """A result that began before a delete is returned and not stored."""

        def loader():
            cache.delete("k")
            return "old"

        assert cache.get_or_set("k", loader) == "old"
        assert cache.get("k", MISS) is MISS
        assert cache.stats()["fills_refused"] == 1

    def test_a_clear_during_the_load_wins(self, cache, wiring):
        """A result that began before a clear is returned and not stored."""
        cache.set("other", 1)

        def loader():
            cache.clear()
            before = cache.stats()["messages"]
            if wiring == "both":  # a moment in which the listener applies the flush, and the proof is renewed
                wait_until(lambda: cache.stats()["messages"] >= max(before, 2))
            return "old"

        assert cache.get_or_set("k", loader) == "old"
        assert cache.get("k", MISS) is MISS

    def test_the_clear_of_another_during_the_load_wins(self, make):
        """A result that began before another process's clear is not stored."""
        mine, other = make("both"), make("both")
        mine.set("seed", 1)

        def loader():
            flushes = mine.stats()["flushes"]
            other.clear()
            wait_until(lambda: mine.stats()["flushes"] > flushes)
            return "old"

        assert mine.get_or_set("k", loader) == "old"
        assert other.get("k", MISS) is MISS
        assert mine.get("k", MISS) is MISS

    def test_a_slow_set_is_not_overwritten_by_a_load_that_it_met(self, make, wiring, monkeypatch):
        """A set that has returned is never replaced by a loader that began before it ended."""
        cache = make(wiring)
        cache.set("other", 1)
        loader = BlockedLoader("loaded")
        has_stamp, may_keep = threading.Event(), threading.Event()
        tier = cache._parts.tier
        keep = tier.keep

        def slow_keep(*args, **kwargs):
            if threading.current_thread().name == "setter":
                has_stamp.set()
                assert may_keep.wait(5)
            return keep(*args, **kwargs)

        monkeypatch.setattr(tier, "keep", slow_keep)
        setter = threading.Thread(target=cache.set, args=("k", "set"), name="setter", daemon=True)
        setter.start()
        assert has_stamp.wait(5)
        reader = Background(lambda: cache.get_or_set("k", loader))
        loader.has_begun.wait(0.1)  # or it waits for the setter, which is as good
        may_keep.set()
        setter.join(5)
        loader.may_end.set()
        reader.result()
        assert cache.get("k") == "set"

    def test_refresh_runs_the_loader_and_replaces(self, cache):
        """Refresh loads though something is cached, and stores over it."""
        cache.set("k", "old")
        assert cache.refresh("k", lambda: "new", ttl=50) == "new"
        assert cache.get("k") == "new"
        assert 48 < cache.ttl("k") <= 50
        assert cache.refresh("fresh", lambda: 1) == 1
        assert cache.get("fresh") == 1

    def test_refresh_keeps_what_is_there_when_the_loader_fails(self, cache):
        """A failing refresh raises and changes nothing."""
        cache.set("k", "old")
        with pytest.raises(ZeroDivisionError):
            cache.refresh("k", lambda: 1 // 0)
        assert cache.get("k") == "old"

    @pytest.mark.parametrize("act", ["set", "delete", "clear"])
    @pytest.mark.parametrize("is_there", [True, False])
    def test_what_happens_during_a_refresh_wins(self, cache, act, is_there):
        """A refresh never stores over what happened while its loader ran."""
        if is_there:
            cache.set("k", "before")

        def loader():
            {"set": lambda: cache.set("k", "newer"), "delete": lambda: cache.delete("k"), "clear": cache.clear}[act]()
            return "old"

        assert cache.refresh("k", loader) == "old"
        assert cache.get("k", MISS) == ("newer" if act == "set" else MISS)


class TestCounters:
    def test_counts_from_the_initial(self, cache):
        """An absent key counts as *initial*."""
        assert cache.incr("a") == 1
        assert cache.incr("a", 41) == 42
        assert cache.decr("b", 3, initial=10) == 7
        assert cache.decr("b", -3) == 10
        assert (cache.get("a"), cache.get("b")) == (42, 10)
        assert type(cache.get("a")) is int

    @pytest.mark.parametrize("start", [0, -5, 2**31, -(2**52)])
    def test_counts_on_from_what_was_set(self, cache, start):
        """A number that was set is a counter."""
        cache.set("k", start)
        assert cache.incr("k", 3) == start + 3
        assert cache.get("k") == start + 3

    @pytest.mark.parametrize("value", ["5", b"5", 5.0, None, True, [1], 2**60, Decimal(5)])
    def test_other_values_are_refused_and_stay(self, cache, value):
        """What is not an integer that a counter can hold raises and does not change."""
        cache.set("k", value)
        with pytest.raises(NotAnIntegerError, match="'k'"):
            cache.incr("k")
        assert cache.get("k") == value
        assert type(cache.get("k")) is type(value)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_the_range_ends_at_2_to_53(self, cache, sign):
        """±2**53 can be reached and not left."""
        assert cache.incr("k", sign * (2**53 - 1)) == sign * (2**53 - 1)
        assert cache.incr("k", sign) == sign * 2**53
        with pytest.raises(NotAnIntegerError):
            cache.incr("k", sign)
        assert cache.get("k") == sign * 2**53
        with pytest.raises(NotAnIntegerError):
            cache.incr("fresh", sign * 2**53, initial=sign)

    @pytest.mark.parametrize("wrong", [True, 1.0, "1", None, Decimal(1)])
    def test_wrong_numbers_raise(self, cache, wrong):
        """Delta and initial are ints."""
        for call in (
            lambda: cache.incr("k", wrong),
            lambda: cache.decr("k", wrong),
            lambda: cache.incr("k", initial=wrong),
        ):
            with pytest.raises(TypeError):
                call()
        assert "k" not in cache

    def test_the_life_goes_on(self, cache):
        """Counting gives a new key its life, and an old one none."""
        cache.incr("k", ttl=50)
        cache.incr("k", ttl=500)
        assert 45 < cache.ttl("k") <= 50

    def test_no_count_is_lost(self, cache, wiring):
        """Threads that count at once lose nothing."""
        each = 100 if wiring in WITH_L2 else 2000
        in_threads(4, lambda _: [cache.incr("k") for _ in range(each)])
        assert cache.get("k") == 4 * each

    @pytest.mark.parametrize("wiring", ["moka", "cacheout"])
    def test_a_count_that_meets_another_is_not_lost(self, cache, monkeypatch):
        """An increment in the midst of another's counts (forced)."""
        cache.incr("k")
        finish = interleave(monkeypatch, cache, lambda: cache.incr("k"))
        cache.incr("k")
        finish()
        assert cache.get("k") == 3

    def test_signed_counters(self, make):
        """With signing keys, counting is compare and set: nothing is lost, and other values are refused."""
        cache = make("both", **SIGNED)
        in_threads(4, lambda _: [cache.incr("k") for _ in range(25)])
        assert cache.get("k") == 100
        assert cache.decr("n", 5, initial=1, ttl=50) == -4
        assert 45 < cache.ttl("n") <= 50
        assert cache.incr("n", ttl=500) == -3
        assert 45 < cache.ttl("n") <= 50
        cache.set("s", "x")
        with pytest.raises(NotAnIntegerError):
            cache.incr("s")
        cache.set("max", 2**53)
        with pytest.raises(NotAnIntegerError):
            cache.incr("max")


def interleave(monkeypatch, cache, act) -> Callable[[], None]:
    """Run *act* once in a thread that starts where a call without L2 has read and not yet written.

    It gets the time to do all of its harm there if nothing holds it off. Returns what waits for its end.
    """
    tier = cache._parts.tier
    stamp = tier.own_stamp
    other = threading.Thread(target=act, daemon=True)

    def meddle(*args):
        if other.ident is None:
            other.start()
            other.join(0.1)
        return stamp(*args)

    def finish() -> None:
        other.join(5)
        assert not other.is_alive()

    monkeypatch.setattr(tier, "own_stamp", meddle)
    return finish


class TestL1AloneIsAtomicToo:
    @pytest.mark.parametrize("wiring", ["moka", "cacheout"])
    def test_add(self, make, wiring, monkeypatch):
        """Of two adds that meet, one stores."""
        cache = make(wiring)
        inner = []
        finish = interleave(monkeypatch, cache, lambda: inner.append(cache.add("k", "inner")))
        outer = cache.add("k", "outer")
        finish()
        assert sorted([*inner, outer]) == [False, True]

    @pytest.mark.parametrize("wiring", ["moka", "cacheout"])
    def test_touch_does_not_bring_back_the_deleted(self, make, wiring, monkeypatch):
        """A touch that meets a delete does not resurrect the value."""
        cache = make(wiring)
        cache.set("k", "deleted")
        finish = interleave(monkeypatch, cache, lambda: cache.delete("k"))
        cache.touch("k", 50)
        finish()
        assert cache.get("k", MISS) is MISS

    @pytest.mark.parametrize("wiring", ["moka", "cacheout"])
    def test_incr_does_not_bring_back_the_deleted(self, make, wiring, monkeypatch):
        """An increment that meets a delete counts from one side of it and leaves no mixture."""
        cache = make(wiring)
        cache.set("k", 100)
        finish = interleave(monkeypatch, cache, lambda: cache.delete("k"))
        cache.incr("k")
        finish()
        assert cache.get("k", MISS) in {MISS, 1}


class TestLives:
    def test_ttl(self, cache):
        """``ttl`` is the life left, None without a value, the default where none was given."""
        assert cache.ttl("k") is None
        cache.set("k", 1, ttl=50)
        assert 48 < cache.ttl("k") <= 50
        cache.set("d", 1)
        assert 290 < cache.ttl("d") <= 3600

    def test_touch(self, cache):
        """Touch gives a live value a new life and keeps the value."""
        assert cache.touch("k", 100) is False
        cache.set("k", [1], ttl=10)
        assert cache.touch("k", 100) is True
        assert 95 < cache.ttl("k") <= 100
        assert cache.get("k") == [1]
        assert cache.touch("k", 0.05) is True
        wait_until(lambda: cache.get("k", MISS) is MISS)

    def test_a_life_ends(self, cache):
        """After its life a value is a miss in every sense."""
        cache.set("k", 1, ttl=0.05)
        wait_until(lambda: cache.get("k", MISS) is MISS)
        assert "k" not in cache
        assert cache.ttl("k") is None
        assert cache.touch("k", 10) is False
        assert cache.add("k", 2) is True

    @pytest.mark.parametrize("ttl", [1e-9, 1e-6, 0.0004, 0.001])
    def test_lives_too_short_for_redis_are_short(self, cache, ttl):
        """A life below Redis's millisecond is stored without an error, and over at once."""
        assert cache.set("k", 1, ttl=ttl) is True
        wait_until(lambda: cache.get("k", MISS) is MISS, 1)

    ENTER: ClassVar = {
        "set": lambda cache, _: cache.set("k", 1, ttl=0.15),
        "set_many": lambda cache, _: cache.set_many({"k": 1}, ttl=0.15),
        "add": lambda cache, _: cache.add("k", 1, ttl=0.15),
        "fill": lambda cache, _: cache.get_or_set("k", lambda: 1, ttl=0.15),
        "fill_many": lambda cache, _: cache.get_or_set_many(["k"], lambda keys: {"k": 1}, ttl=0.15),
        "refresh": lambda cache, _: cache.refresh("k", lambda: 1, ttl=0.15),
        "incr": lambda cache, _: cache.incr("k", ttl=0.15),
        "read": lambda cache, other: other.set("k", 1, ttl=0.15) and cache.get("k"),
        "touch": lambda cache, other: cache.set("k", 1, ttl=50) and cache.touch("k", 0.15) and cache.get("k"),
    }

    @pytest.mark.parametrize("enter", ENTER)
    def test_l1_never_outlives_l2(self, make, enter):
        """However a copy came into L1, it is gone when L2's life is over."""
        cache, other = make("both", l1_ttl=300), make("l2")
        self.ENTER[enter](cache, other)
        assert cache.get("k") == 1

        def is_over() -> bool:
            is_gone = other.get("k", MISS) is MISS
            assert not is_gone or cache.get("k", MISS) is MISS
            return is_gone

        wait_until(is_over, 2, pause=0.001)

    def test_l1_lives_no_longer_than_its_own_limit(self, make):
        """L1's copy ends at l1_ttl though L2 has more, so that a foreign write shows."""
        cache, other = make("both", l1_ttl=0.1), make("l2")
        cache.set("k", 1, ttl=50)
        hits = other.stats()["l2_hits"]
        wait_until(lambda: cache.get("k") == 1 and cache.stats()["l2_hits"] > hits, 2)

    @pytest.mark.parametrize("wiring", WITH_L2)
    @pytest.mark.parametrize(("share", "life"), [(0.0, 100), (1.0, 50)])
    def test_jitter_shortens_lives(self, shared_redis, namespace, wiring, share, life):
        """A life is shortened by up to the share that is set, never prolonged."""
        config = CacheConfig(redis_url=shared_redis.url, cache_namespace=namespace, ttl_jitter=0.5, **WIRINGS[wiring])
        with CacheManager(lambda: assemble(config), rng=lambda: share) as cache:
            cache.set("k", 1, ttl=100)
            assert life - 1 < cache.ttl("k") <= life
            cache.get_or_set("f", lambda: 1, ttl=100)
            assert life - 1 < cache.ttl("f") <= life

    def test_jitter_spreads_the_keys_of_one_call(self, make):
        """Values stored together do not all end together, which is what the jitter is for."""
        cache = make("l2", ttl_jitter=0.5)
        cache.set_many({f"k{number}": 1 for number in range(20)}, ttl=1000)
        assert len({int(cache.ttl(f"k{number}")) for number in range(20)}) > 5


class TestClear:
    def test_clear_kills_everything(self, cache):
        """After clear nothing lives, and what is written then does."""
        cache.set_many({"a": 1, "b": 2})
        cache.incr("c")
        assert cache.clear() is True
        assert cache.get_many(["a", "b", "c"]) == {}
        assert cache.ttl("a") is None
        assert cache.touch("a", 5) is False
        assert cache.delete("a") is False
        assert cache.add("b", 3) is True
        assert cache.incr("c") == 1
        assert cache.get_or_set("d", lambda: 4) == 4
        assert cache.get_many(["a", "b", "c", "d"]) == {"b": 3, "c": 1, "d": 4}

    def test_clear_leaves_other_namespaces(self, make, namespace):
        """Another namespace on the same Redis is not touched."""
        mine, other = make("both"), make("both", cache_namespace=f"{namespace}.2")
        other.set("k", 1)
        mine.clear()
        assert other.get("k") == 1
        assert make("l2", cache_namespace=f"{namespace}.2").get("k") == 1


class TestTokens:
    def test_own_barrier_hides_nothing(self, cache):
        """A barrier at one's own token loses nothing that was stored."""
        cache.set("k", 1)
        cache.barrier(cache.token())
        assert cache.get("k") == 1

    def test_a_token_covers_writes_and_deletes(self, make):
        """After a barrier with the sender's token, a reader sees at least what the sender did."""
        sender, reader = make("both"), make("both")
        for number in range(50):
            sender.set("k", number)
            reader.get("k")
            token = sender.token()
            reader.barrier(token)
            assert reader.get("k") == number
            sender.delete("k")
            reader.barrier(sender.token())
            assert reader.get("k", MISS) is MISS

    def test_a_token_covers_what_was_read(self, make):
        """A token is as new as the newest thing its process has read."""
        writer, reader = make("both"), make("l2")
        writer.set("k", 1)
        assert reader.get("k") == 1
        assert stamp_of(reader.token()) >= stamp_of(writer.token())

    def test_a_token_covers_a_deletion_that_was_read(self, make):
        """A process that has read "deleted" tells so in its token, too."""
        writer, reader = make("both"), make("l2")
        writer.set("k", 1)
        writer.delete("k")
        assert reader.get("k", MISS) is MISS
        assert stamp_of(reader.token()) >= stamp_of(writer.token())

    @pytest.mark.parametrize("wrong", ["", "x", "other@5", None, 5, b"x@1", "@", "{ns}@", "{ns}@-1", "{ns}@1e5"])
    def test_wrong_tokens_raise(self, cache, namespace, wrong):
        """What is not a token of this namespace is a ValueError."""
        token = wrong.replace("{ns}", namespace) if isinstance(wrong, str) else wrong
        with pytest.raises(ValueError):
            cache.barrier(token)

    def test_a_token_of_nowhere_heals(self, both):
        """A stamp that the server never gave withdraws the lease for a moment only, and reads go on."""
        both.set("k", 1)
        both.barrier(f"{both.stats()['namespace']}@{stamp_of(both.token()) + 10**9}")
        assert both.get("k") == 1
        wait_until(lambda: both.stats()["lease"] == "held", 3)


def stamp_of(token: str) -> int:
    """Return the number in a token."""
    return int(token.rpartition("@")[2])


class TestStateAndEnd:
    def test_stats(self, cache, namespace):
        """Stats hold counters and states, and are a snapshot."""
        before = cache.stats()
        cache.set("k", 1)
        cache.get("k")
        after = cache.stats()
        assert after["namespace"] == namespace
        assert after["writes"] == before["writes"] + 1
        assert after["l1_hits"] + after["l2_hits"] == before["l1_hits"] + before["l2_hits"] + 1
        after["gaps"]["mine"] = 1
        assert "mine" not in cache.stats()["gaps"]

    def test_asking_for_stats_starts_nothing(self):
        """Stats before the first use are zeros and build no part."""
        manager = create_cache_manager(redis_port=free_port())
        assert manager.stats()["writes"] == 0
        assert not manager.is_running

    def test_ping(self, cache, wiring):
        """Ping is L2's round trip, or None without L2."""
        if wiring in WITH_L2:
            assert 0 < cache.ping() < 5
        else:
            assert cache.ping() is None

    def test_after_close_every_call_raises(self, cache):
        """A closed manager refuses, clearly; closing twice is fine."""
        cache.set("k", 1)
        cache.close()
        cache.close()
        calls = [
            *(lambda call=call: call(cache, "k") for call in BY_KEY.values()),
            cache.clear,
            cache.token,
            cache.ping,
            cache.warm,
            lambda: cache.barrier("x@1"),
        ]
        for call in calls:
            with pytest.raises(CacheClosedError):
                call()
        assert "closed" in repr(cache)

    def test_is_a_context_manager(self, shared_redis, namespace):
        """Leaving the block closes."""
        with create_cache_manager(redis_url=shared_redis.url, cache_namespace=namespace) as cache:
            cache.set("k", 1)
        with pytest.raises(CacheClosedError):
            cache.get("k")

    def test_release_is_not_the_end(self, cache, wiring):
        """After release the next use builds everything anew; with L2 nothing stored is lost."""
        cache.set("k", 1)
        cache.release()
        assert not cache.is_running
        assert cache.get("k", MISS) == (1 if wiring in WITH_L2 else MISS)
        cache.set("k", 2)
        assert cache.get("k") == 2


BY_KEY: dict[str, Callable[[CacheManager, object], object]] = {
    "get": lambda cache, key: cache.get(key),
    "exists": lambda cache, key: cache.exists(key),
    "in": lambda cache, key: key in cache,
    "ttl": lambda cache, key: cache.ttl(key),
    "get_many": lambda cache, key: cache.get_many([key]),
    "get_or_set": lambda cache, key: cache.get_or_set(key, never),
    "get_or_set_many": lambda cache, key: cache.get_or_set_many([key], lambda keys: never()),
    "set": lambda cache, key: cache.set(key, 1),
    "add": lambda cache, key: cache.add(key, 1),
    "incr": lambda cache, key: cache.incr(key),
    "decr": lambda cache, key: cache.decr(key),
    "touch": lambda cache, key: cache.touch(key, 5),
    "refresh": lambda cache, key: cache.refresh(key, never),
    "delete": lambda cache, key: cache.delete(key),
    "delete_many": lambda cache, key: cache.delete_many([key]),
    "set_many": lambda cache, key: cache.set_many({key: 1}),
}
BY_TTL: dict[str, Callable[[CacheManager, object], object]] = {
    "set": lambda cache, ttl: cache.set("k", 1, ttl),
    "set_many": lambda cache, ttl: cache.set_many({"k": 1}, ttl),
    "add": lambda cache, ttl: cache.add("k", 1, ttl),
    "get_or_set": lambda cache, ttl: cache.get_or_set("k", never, ttl),
    "get_or_set_many": lambda cache, ttl: cache.get_or_set_many(["k"], lambda keys: never(), ttl),
    "incr": lambda cache, ttl: cache.incr("k", ttl=ttl),
    "decr": lambda cache, ttl: cache.decr("k", ttl=ttl),
    "touch": lambda cache, ttl: cache.touch("k", ttl),
    "refresh": lambda cache, ttl: cache.refresh("k", never, ttl),
}
WRONG_KEYS = {
    "int": 1,
    "bytes": b"k",
    "none": None,
    "tuple": ("k",),
    "list": ["k"],
    "dict": {},
    "empty": "",
    "too long": "x" * 1025,
    "too long in UTF-8": "é" * 512 + "x",
    "newline": "a\nb",
    "nul": "a\0",
    "delete": "a\x7f",
    "next line": "a\x85",
    "line separator": "a\u2028",
    "surrogate": "a\ud800",
}
WRONG_TTLS = [0, 0.0, -1, -0.001, nan, inf, -inf, True, False, "5", b"5", [], 1e300, 10**40, Decimal(5)]


class TestWrongArguments:
    @pytest.fixture
    def untouchable(self, make) -> CacheManager:
        """A manager whose L2 must not be asked."""
        cache = make("l2")
        forbid_l2(cache)
        return cache

    @pytest.mark.parametrize("method", BY_KEY)
    @pytest.mark.parametrize("wrong", WRONG_KEYS)
    def test_a_wrong_key_raises_before_anything_is_sent(self, untouchable, method, wrong):
        """Every method refuses what cannot be a key, and asks L2 nothing."""
        key = WRONG_KEYS[wrong]
        if method == "set_many" and wrong in {"list", "dict"}:
            pytest.skip("such a mapping cannot be made")
        with pytest.raises(CacheKeyError) as caught:
            BY_KEY[method](untouchable, key)
        assert len(str(caught.value)) < 300

    @pytest.mark.parametrize("method", BY_KEY)
    def test_a_wrong_key_raises_when_switched_off(self, off, method):
        """Switched off, the cache still refuses wrong keys, so that switching on brings no surprise."""
        with pytest.raises(CacheKeyError):
            BY_KEY[method](off, "")

    @pytest.mark.parametrize("method", BY_TTL)
    @pytest.mark.parametrize("wrong", WRONG_TTLS, ids=repr)
    def test_a_wrong_ttl_raises_before_anything_is_sent(self, untouchable, method, wrong):
        """Every method refuses what cannot be a life, and asks L2 nothing."""
        with pytest.raises(ValueError, match="ttl"):
            BY_TTL[method](untouchable, wrong)

    @pytest.mark.parametrize("method", BY_TTL)
    @pytest.mark.parametrize("wrong", [-1, nan, "5"], ids=repr)
    def test_a_wrong_ttl_raises_on_a_hit_too(self, both, method, wrong):
        """A wrong life is an error whether or not the key is cached, or it would show in production only."""
        both.set("k", 1)
        with pytest.raises(ValueError, match="ttl"):
            BY_TTL[method](both, wrong)

    def test_a_value_that_cannot_be_stored_raises(self, untouchable):
        """``set`` and ``add`` name the type, and nothing is sent."""
        for call in (untouchable.set, untouchable.add):
            with pytest.raises(SerializationError, match="object"):
                call("k", {"a": [object()]})


class Point(NamedTuple):
    x: int
    y: int


class TestWhatComesBack:
    VALUES: ClassVar = [
        (1, (2, [3])),
        {1: "a", "1": "b"},
        {1, 2},
        frozenset({"a"}),
        b"\0\xff",
        bytearray(b"x"),
        1.5,
        -0.0,
        2**70,
        -(2**63) - 1,
        Decimal("1.10"),
        datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC),
        date(2026, 1, 2),
        timedelta(days=-1, microseconds=7),
        UUID(int=5),
        "\u2028é\0",
        {"nested": [{"a": ({1}, None)}]},
        "x" * 100_000,
    ]

    @pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
    def test_both_levels_return_equal_values_and_types(self, make, value):
        """L1 and L2 answer alike, exactly what went in."""
        writer, reader, remote = make("both"), make("both"), make("l2")
        writer.set("k", value)
        first, second = reader.get("k"), reader.get("k")
        for got in (writer.get("k"), remote.get("k"), first, second, remote.get_many(["k"])["k"]):
            assert repr(got) == repr(value) or got == value
            assert type(got) is type(value)
        assert reader.stats()["l1_hits"] == 1

    def test_what_would_come_back_altered_is_refused(self, cache):
        """A type that is not restored exactly is refused, on L1 alone too."""
        for value in (Point(1, 2), object(), lambda: 0, {"k": {1: object()}}, [Exception()]):
            with pytest.raises(SerializationError):
                cache.set("k", value)

    def test_the_writer_shares_nothing_with_the_cache(self, cache):
        """Changing a value after storing it does not change the cache."""
        value = {"a": [1]}
        cache.set("set", value)
        cache.set_many({"many": value})
        cache.add("add", value)
        value["a"].append(2)
        for key in ("set", "many", "add"):
            assert cache.get(key) == {"a": [1]}

    @pytest.mark.parametrize("way", ["get", "get_many", "get_or_set", "get_or_set_many"])
    def test_readers_share_nothing(self, cache, way):
        """Changing what a read returned does not change the cache."""
        read = {
            "get": lambda: cache.get("k"),
            "get_many": lambda: cache.get_many(["k"])["k"],
            "get_or_set": lambda: cache.get_or_set("k", never),
            "get_or_set_many": lambda: cache.get_or_set_many(["k"], lambda keys: never())["k"],
        }[way]
        cache.set("k", {"a": [1]})
        for _ in range(3):
            got = read()
            assert got == {"a": [1]}
            got["a"].append(2)
            got["b"] = 1

    @pytest.mark.parametrize("way", ["get_or_set", "get_or_set_many", "refresh"])
    def test_the_loader_shares_nothing(self, cache, way):
        """Changing what a loader returned, or what the caller got, does not change the cache."""
        loaded = {"a": [1]}
        got = {
            "get_or_set": lambda: cache.get_or_set("k", lambda: loaded),
            "get_or_set_many": lambda: cache.get_or_set_many(["k"], lambda keys: {"k": loaded})["k"],
            "refresh": lambda: cache.refresh("k", lambda: loaded),
        }[way]()
        got["a"].append(2)
        loaded["a"].append(3)
        assert cache.get("k") == {"a": [1]}

    def test_followers_share_nothing(self, cache):
        """Each follower of a flight gets a value of its own."""
        loader = BlockedLoader({"a": [1]})
        followers = [Background(lambda: cache.get_or_set("k", loader)) for _ in range(4)]
        assert loader.has_begun.wait(5)
        loader.may_end.set()
        values = [follower.result() for follower in followers]
        for value in values:
            assert value == {"a": [1]}
            value["a"].append(2)
        assert cache.get("k") == {"a": [1]}

    def test_a_result_that_cannot_be_stored_is_returned(self, cache):
        """A loader's result that no level takes is returned as it is, counted, and loaded again."""
        value = object()
        assert cache.get_or_set("k", lambda: value) is value
        assert cache.get_or_set("k", lambda: value) is value
        assert cache.refresh("k", lambda: value) is value
        assert cache.get_or_set_many(["k", "l"], lambda keys: {"k": value, "l": 1}) == {"k": value, "l": 1}
        stats = cache.stats()
        assert stats["unserializable"] == 4
        assert cache.get("k", MISS) is MISS
        assert cache.get("l") == 1

    def test_strict_raises_for_it(self, make, wiring):
        """In strict mode such a result raises."""
        with pytest.raises(SerializationError):
            make(wiring, strict=True).get_or_set("k", object)


class TestForeignBytes:
    CORRUPT: ClassVar = {
        "text": lambda data: b"hello",
        "empty": lambda data: b"",
        "head only": lambda data: data[:HEAD_SIZE],
        "truncated": lambda data: data[:-3],
        "flipped": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        "kind": lambda data: data[:HEAD_SIZE] + b"?" + data[HEAD_SIZE + 1 :],
        "flags": lambda data: data[: HEAD_SIZE + 1] + b"\xee" + data[HEAD_SIZE + 2 :],
        "header too long": lambda data: data[: HEAD_SIZE + 3] + b"\xff\xff" + data[HEAD_SIZE + 5 :],
        "other version": lambda data: b"\x63" + data[1:],
        "stamp from nowhere": lambda data: data[:1] + b"\xff" * 8 + data[9:],
    }

    @pytest.mark.parametrize("how", CORRUPT)
    @pytest.mark.parametrize("wiring", WITH_L2)
    def test_are_a_miss_and_then_replaced(self, make, shared_redis, namespace, wiring, how):
        """Bytes that are not ours are a miss that is counted, and get_or_set puts a value in their place."""
        cache, name = make(wiring), RedisNames(namespace).value("k")
        make("l2").set("k", "value")
        client = shared_redis.client()
        client.set(name, self.CORRUPT[how](client.get(name)), px=50_000)
        assert cache.get("k", MISS) is MISS
        assert cache.stats()["misses"] == 1
        assert cache.get_or_set("k", lambda: "healed") == "healed"
        assert cache.get_or_set("k", never) == "healed"
        assert make("l2").get("k") == "healed"

    @pytest.mark.parametrize("act", ["set", "delete", "add", "incr"])
    @pytest.mark.parametrize("how", ["text", "flipped", "stamp from nowhere"])
    def test_can_be_written_over(self, make, shared_redis, namespace, how, act):
        """Bytes that read as a miss do not stand in a writer's way."""
        cache, name = make("l2"), RedisNames(namespace).value("k")
        cache.set("k", "value")
        client = shared_redis.client()
        client.set(name, self.CORRUPT[how](client.get(name)), px=50_000)
        if act == "add" and how == "flipped":
            pytest.skip("a live value whose body is broken is there, as far as Lua can see")
        if act == "incr" and how == "flipped":
            pytest.skip("as for add")
        outcome = {
            "set": lambda: cache.set("k", 1),
            "delete": lambda: cache.delete("k") in {True, False},
            "add": lambda: cache.add("k", 1),
            "incr": lambda: cache.incr("k") == 1,
        }[act]()
        assert outcome is True
        assert cache.get("k", MISS) == (MISS if act == "delete" else 1)
        assert cache.stats()["writes_dropped"] == 0

    def test_a_value_without_a_life_is_replaced(self, make, shared_redis, namespace):
        """A foreign PERSIST makes a value a miss; get_or_set then gives it a life again."""
        cache = make("l2")
        cache.set("k", "old")
        shared_redis.client().persist(RedisNames(namespace).value("k"))
        cache.get_or_set("k", lambda: "new")
        assert cache.get_or_set("k", lambda: "newer") in {"old", "new"}

    @pytest.mark.parametrize("act", ["get_or_set", "set", "delete", "add", "incr", "touch"])
    def test_another_type_is_no_hindrance(self, make, shared_redis, namespace, act):
        """A foreign list under our key is a miss that every write can end."""
        cache, name = make("l2"), RedisNames(namespace).value("k")
        cache.set("seed", 1)
        shared_redis.client().rpush(name, "x")
        assert cache.get("k", MISS) is MISS
        {
            "get_or_set": lambda: cache.get_or_set("k", lambda: 1),
            "set": lambda: cache.set("k", 1),
            "delete": lambda: cache.delete("k"),
            "add": lambda: cache.add("k", 1),
            "incr": lambda: cache.incr("k"),
            "touch": lambda: cache.touch("k", 5),
        }[act]()
        stats = cache.stats()
        assert (stats["writes_dropped"], stats["l2_errors"]) == (0, 0)
        assert cache.get("k", MISS) == (MISS if act in {"delete", "touch"} else 1)


class TestCounts:
    @pytest.mark.parametrize("wiring", [*WIRINGS, "off"])
    def test_look_ups_add_up(self, make, off, wiring):
        """Every look-up ends as one of hit in L1, hit in L2, miss, or coalesced."""
        cache = off if wiring == "off" else make(wiring)
        before = cache.stats()
        cache.get("a")
        cache.get_or_set("a", lambda: 1)
        cache.get_or_set("a", lambda: 1)
        cache.get("a")
        cache.get_many(["a", "b", "b", "c"])
        cache.get_or_set_many(["a", "d"], lambda keys: dict.fromkeys(keys, 1))
        after = cache.stats()
        names = ("l1_hits", "l2_hits", "misses", "coalesced")
        assert sum(after[name] - before[name] for name in names) == 1 + 1 + 1 + 1 + 3 + 2

    def test_exists_counts_alike_on_hit_and_miss(self, cache):
        """Asking whether a key exists is a look-up always, or never."""
        cache.set("there", 1)
        names = ("l1_hits", "l2_hits", "misses", "coalesced")
        totals = []
        for key in ("there", "gone"):
            before = cache.stats()
            cache.exists(key)
            after = cache.stats()
            totals.append(sum(after[name] - before[name] for name in names))
        assert totals[0] == totals[1]

    def test_writes_and_loads(self, cache):
        """Writes, deletes, loads and failures are counted by the key."""
        cache.set_many({"a": 1, "b": 2})
        cache.delete_many(["a", "b"])
        cache.get_or_set("c", lambda: 1)
        with pytest.raises(ZeroDivisionError):
            cache.get_or_set("d", lambda: 1 // 0)
        stats = cache.stats()
        assert (stats["writes"], stats["deletes"], stats["loads"], stats["load_failures"]) == (2, 2, 2, 1)
        assert stats["fills"] == 1
        assert stats["load_seconds"] > 0


class TestSingleFlight:
    def test_eight_threads_load_once(self, cache):
        """One loader run serves all who ask meanwhile."""
        runs = []
        barrier = threading.Barrier(8)

        def ask(_number):
            barrier.wait(5)
            return cache.get_or_set("k", lambda: runs.append(1) or ["v"])

        assert in_threads(8, ask) == [["v"]] * 8
        assert len(runs) == 1
        assert cache.stats()["loads"] == 1

    def test_a_follower_waits_no_longer_than_set(self, make, wiring):
        """A follower whose wait is over runs its own loader."""
        cache = make(wiring, single_flight_wait=0.05)
        loader = BlockedLoader("slow")
        leader = Background(lambda: cache.get_or_set("k", loader))
        assert loader.has_begun.wait(5)
        assert cache.get_or_set("k", lambda: "own") == "own"
        loader.may_end.set()
        assert leader.result() in {"slow", "own"}
        assert cache.get("k") == "own"

    @pytest.mark.parametrize("error", [ValueError("x"), SystemExit(3), KeyboardInterrupt()], ids=repr)
    def test_each_caller_gets_its_own_exception(self, cache, error):
        """What a loader raises reaches its caller unchanged; followers then run theirs."""
        loader = BlockedLoader(error)
        leader = Background(lambda: cache.get_or_set("k", loader))
        assert loader.has_begun.wait(5)
        mine = RuntimeError("mine")

        def fail():
            raise mine

        follower = Background(lambda: cache.get_or_set("k", fail))
        loader.may_end.set()
        assert leader.result() is error
        assert follower.result() is mine
        assert cache.get_or_set("k", lambda: "well") == "well"

    def test_a_killed_leader_wakes_its_followers(self, cache):
        """No BaseException of a leader leaves followers waiting."""

        class Kill(BaseException):
            pass

        loader = BlockedLoader(Kill())
        leader = Background(lambda: cache.get_or_set("k", loader))
        assert loader.has_begun.wait(5)
        followers = [Background(lambda: cache.get_or_set("k", lambda: "next")) for _ in range(3)]
        loader.may_end.set()
        assert type(leader.result()) is Kill
        assert [follower.result(5) for follower in followers] == ["next"] * 3

    def test_a_loader_may_ask_for_its_own_key(self, cache):
        """A loader that asks for the key it loads gets an answer, not a deadlock."""
        assert cache.get_or_set("k", lambda: [cache.get_or_set("k", lambda: 1)]) in ([1], 1)
        assert cache.get("k") in ([1], 1)

    def test_two_loaders_that_ask_for_each_other(self, make, wiring):
        """Two loaders in two threads, each asking for the other's key, end after the longest wait."""
        cache = make(wiring, single_flight_wait=0.1)
        barrier = threading.Barrier(2)

        def ask(number):
            def loader():
                barrier.wait(5)
                return cache.get_or_set(f"k{1 - number}", lambda: f"inner{number}")

            return cache.get_or_set(f"k{number}", loader)

        results = in_threads(2, ask)
        assert all(isinstance(result, str) for result in results), results

    @pytest.mark.parametrize("act", ["delete", "clear", "set"])
    def test_a_newcomer_never_shares_an_overtaken_flight(self, cache, act):
        """Who asks after an invalidation does not get what was loaded before it."""
        loader = BlockedLoader("old")
        cache.set("other", 1)
        leader = Background(lambda: cache.get_or_set("k", loader))
        assert loader.has_begun.wait(5)
        {"delete": lambda: cache.delete("k"), "clear": cache.clear, "set": lambda: cache.set("k", "new")}[act]()
        newcomer = Background(lambda: cache.get_or_set("k", lambda: "new"))
        try:
            assert newcomer.result(1) == "new"
        finally:
            loader.may_end.set()
        leader.result()
        assert cache.get("k") == "new"

    def test_a_newcomer_after_a_barrier_does_not_share(self, make):
        """Who asks after a barrier does not get what a flight read before it."""
        cache, other = make("both"), make("l2")
        loader = BlockedLoader("old")
        leader = Background(lambda: cache.get_or_set("k", loader))
        assert loader.has_begun.wait(5)
        other.set("k", "new")
        cache.barrier(other.token())
        newcomer = Background(lambda: cache.get_or_set("k", lambda: "own"))
        try:
            assert newcomer.result(1) == "new"
        finally:
            loader.may_end.set()
        leader.result()
        assert cache.get("k") == "new"


def celery_errors() -> list[BaseException]:
    """What Celery unwinds a task with."""
    from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded

    return [SoftTimeLimitExceeded(), Retry("again"), Ignore(), Reject("no", requeue=True)]


class TestWhatUnwindsATask:
    @pytest.mark.parametrize("error", celery_errors(), ids=lambda error: type(error).__name__)
    def test_passes_through_a_loader_untouched(self, cache, error):
        """What Celery raises in a loader reaches Celery as the same object, and nothing is left behind."""

        def loader():
            raise error

        for call in (
            lambda: cache.get_or_set("k", loader),
            lambda: cache.refresh("k", loader),
            lambda: cache.get_or_set_many(["k"], lambda keys: loader()),
        ):
            with pytest.raises(type(error)) as caught:
                call()
            assert caught.value is error
        assert cache.get_or_set("k", lambda: 1) == 1

    @pytest.mark.parametrize("error", celery_errors(), ids=lambda error: type(error).__name__)
    @pytest.mark.parametrize("act", ["get", "set", "get_or_set"])
    def test_passes_through_a_socket_read(self, make, monkeypatch, error, act):
        """Raised while a reply is awaited, it passes, and the connection out of step is never used again."""
        cache = make("l2")
        cache.set("k", 1)
        cache.set("out of step", "wrong")
        (connection,) = cache._parts.remote._idle

        def interrupted(*args, **kwargs):
            raise error

        monkeypatch.setattr(connection, "read_response", interrupted)
        with pytest.raises(type(error)) as caught:
            {
                "get": lambda: cache.get("out of step"),
                "set": lambda: cache.set("k", 1),
                "get_or_set": lambda: cache.get_or_set("out of step", never),
            }[act]()
        assert caught.value is error
        assert connection not in cache._parts.remote._idle
        assert connection._sock is None
        assert cache.get("k") == 1
        assert cache.stats()["circuit"] == "closed"

    def test_an_interrupted_write_leaves_no_copy(self, make, monkeypatch):
        """A set whose reply never came may have happened: L1 does not answer with the older value."""
        cache = make("both")
        cache.set("k", "old")
        (connection,) = cache._parts.remote._idle
        read = connection.read_response

        def interrupted(*args, **kwargs):
            read(*args, **kwargs)
            raise KeyboardInterrupt

        monkeypatch.setattr(connection, "read_response", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.set("k", "new")
        assert cache.get("k") == "new"


class TestRoundTrips:
    def test_a_hit_in_l1_does_not_touch_l2(self, both):
        """Nothing of a hit, in the front or behind it, asks L2."""
        both.set_many({"k": 1, "m": [2]})
        forbid_l2(both)
        for _ in range(3):
            assert both.get("k") == 1
            assert both.get_or_set("m", never) == [2]
            assert both.get_many(["k", "m"]) == {"k": 1, "m": [2]}
            assert both.get_or_set_many(["k"], lambda keys: never()) == {"k": 1}
            assert "k" in both
            both._parts.tier.local._front.clear()

    @pytest.fixture
    def commands(self, redis_server):
        """A manager on a server of its own, and a function that returns the commands that a call cost."""
        with create_cache_manager(redis_url=redis_server.url, l1_enabled=False) as cache:
            cache.set_many({f"k{number}": number for number in range(100)})
            cache.delete("warm")
            cache.get_or_set("warm", lambda: 1)
            cache.delete("warm")
            client = redis_server.client()

            def cost(call):
                client.config_resetstat()
                call(cache)
                stats = client.info("commandstats")
                quiet = {"cmdstat_config|resetstat", "cmdstat_info"}
                return {name[8:]: stat["calls"] for name, stat in stats.items() if name not in quiet}

            yield cost

    def test_set_is_one_script_and_one_announcement(self, commands):
        """A set costs one round trip and one PUBLISH."""
        cost = commands(lambda cache: cache.set("k0", 2))
        assert (cost["evalsha"], cost["publish"]) == (1, 1)
        assert set(cost) <= {"evalsha", "publish", "incr", "set", "get", "time"}

    def test_many_are_one_script_and_one_announcement(self, commands):
        """100 keys are written, and deleted, with one script and one PUBLISH."""
        many = {f"k{number}": 0 for number in range(100)}
        for call in (lambda cache: cache.set_many(many), lambda cache: cache.delete_many(many)):
            cost = commands(call)
            assert (cost["evalsha"], cost["publish"]) == (1, 1)

    def test_many_are_read_in_one_round_trip(self, commands, monkeypatch):
        """100 keys are read with one MGET, sent as one packet."""
        cost = commands(lambda cache: cache.get_many([f"k{number}" for number in range(100)]))
        assert cost["mget"] == 1
        assert set(cost) <= {"mget", "time"}

    def test_a_fill_announces_nothing(self, commands):
        """A miss that is loaded costs one read and one script, and no PUBLISH."""
        cost = commands(lambda cache: cache.get_or_set("warm", lambda: 1))
        assert (cost["mget"], cost["evalsha"]) == (1, 1)
        assert "publish" not in cost


class TestWithoutL2:
    EXPECTED: ClassVar = {
        "get": None,
        "exists": False,
        "in": False,
        "ttl": None,
        "get_many": {},
        "set": False,
        "add": False,
        "incr": 1,
        "decr": -1,
        "touch": False,
        "delete": False,
        "delete_many": 0,
        "set_many": False,
    }

    @pytest.mark.parametrize("wiring", WITH_L2)
    def test_nothing_raises(self, make, wiring):
        """Without Redis every call answers as if nothing were cached, and loaders run."""
        cache = create_cache_manager(redis_port=free_port(), redis_host="127.0.0.1", **WIRINGS[wiring])
        with cache:
            for method, expected in self.EXPECTED.items():
                assert BY_KEY[method](cache, "k") == expected, method
            assert cache.get_or_set("k", lambda: [1]) == [1]
            assert cache.get_or_set_many(["k"], lambda keys: {"k": 1}) == {"k": 1}
            assert cache.refresh("k", lambda: 2) == 2
            assert cache.clear() is False
            assert cache.ping() is None
            assert cache.token()
            stats = cache.stats()
            assert stats["writes"] == stats["l2_hits"] == stats["l1_hits"] == 0
            assert stats["l2_errors"] + stats["l2_rejected"] >= 10
            assert stats["writes_dropped"] >= 8
            assert stats["circuit"] == "open"

    @pytest.mark.parametrize("method", [*BY_KEY, "clear"])
    @pytest.mark.parametrize("wiring", WITH_L2)
    def test_strict_raises(self, wiring, method):
        """In strict mode every call says that Redis failed."""
        cache = create_cache_manager(
            redis_port=free_port(), redis_host="127.0.0.1", strict=True, circuit_threshold=100, **WIRINGS[wiring]
        )
        with cache, pytest.raises(RemoteStoreError) as caught:
            cache.clear() if method == "clear" else BY_KEY[method](cache, "k")
        assert caught.value.__cause__ is not None


class TestSwitchedOff:
    def test_every_get_misses_and_every_loader_runs(self, off):
        """Switched off: nothing is kept, nothing connects, loaders run."""
        runs = []
        for _ in range(3):
            assert off.get_or_set("k", lambda: runs.append(1) or 5) == 5
        assert len(runs) == 3
        assert off.refresh("k", lambda: 6) == 6
        assert off.get_or_set_many(["k"], lambda keys: {"k": 7}) == {"k": 7}
        assert off.get("k", MISS) is MISS
        for method, expected in TestWithoutL2.EXPECTED.items():
            assert BY_KEY[method](off, "k") == expected, method
        assert off.clear() is True
        off.barrier(off.token())
        assert off.ping() is None
        stats = off.stats()
        assert (stats["backplane"], stats["circuit"], stats["l1_engine"]) == ("off", "off", None)
        assert stats["writes_dropped"] == stats["l2_errors"] == 0

    def test_loaders_do_not_wait_for_one_another(self, off):
        """Switched off means off: no single-flight either."""
        loader = BlockedLoader(1)
        first = Background(lambda: off.get_or_set("k", loader))
        assert loader.has_begun.wait(5)
        assert off.get_or_set("k", lambda: 2) == 2
        loader.may_end.set()
        assert first.result() == 1


class TestSpeed:
    def test_an_open_circuit_answers_at_once(self):
        """With Redis known to be dead, a call costs about nothing."""
        with create_cache_manager(redis_port=free_port(), redis_host="127.0.0.1", circuit_reset=60) as cache:
            while cache.stats()["circuit"] != "open":
                cache.get("k")
            began = time.perf_counter()
            for _ in range(100):
                cache.get("k")
            assert time.perf_counter() - began < 0.5
